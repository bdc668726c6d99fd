"""6. Maximum likelihood: a Gaussian, a coin and a classifier, as their parameters move and as they are fitted."""

import marimo

app = marimo.App(width="medium", css_file="page.css", app_title="Maximum likelihood")

with app.setup:
    import altair as alt
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from experiments.explore import _page as page
    from jprob import bernoulli, categorical, gaussian, mle

    MODELS = ("Gaussian", "coin", "classifier")
    POINTS, EACH, MARKS = 20, 2, 60  # examples, steps of the fit between two marks of its path, and marks
    LOCS, SCALES = np.linspace(-3, 5, 21, dtype=np.float32), np.geomspace(0.2, 5, 14).astype(np.float32)
    LOGITS = np.linspace(-4, 4, 81, dtype=np.float32)
    COLOURS = alt.Scale(domain=[0, 1, 2], range=[page.BLUE, page.RED, page.GREEN])
    OPTIMIZER = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))(learning_rate=0.1)


@app.cell(hide_code=True)
def _():
    page.intro(
        "Maximum likelihood",
        "The likelihood of parameters is the probability they give to the data. It is a product, so its logarithm is "
        "a sum, and losses are its negative mean. A fit follows the gradient to the parameters that make the data "
        "most probable.",
        r"\hat\theta = \arg\max_\theta \prod_i p_\theta(x_i) = \arg\min_\theta -\sum_i \log p_\theta(x_i)",
    )
    return


@app.function
def draw(seed):
    """Points on a line, flips of a coin, and points of three classes in the plane with their labels."""
    keys = jax.random.split(jax.random.key(seed), 3)
    points = 1 + 1.5 * jax.random.normal(keys[0], (POINTS,))
    flips = jax.random.bernoulli(keys[1], 0.7, (POINTS,)).astype(jnp.int32)
    labels = jnp.arange(3 * POINTS) % 3
    centres = jnp.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return points, flips, (centres[labels] + jax.random.normal(keys[2], (3 * POINTS, 2)), labels)


@app.function
def nll_of_points(params, batch, key):
    return gaussian.nll(batch, params["loc"], log_scale=params["log_scale"])


@app.function
def nll_of_flips(params, batch, key):
    return bernoulli.cross_entropy(jnp.broadcast_to(params, batch.shape), batch)


@app.function
def nll_of_classes(params, batch, key):
    return categorical.cross_entropy(batch[0] @ params, batch[1])


@app.function
def nll_of_all(params, batch, key):
    """The three losses added: their parameters are apart, so one fit is three, and compiles in a third of the time."""
    points, flips, (features, labels) = batch
    of_classes = nll_of_classes(params[2], (features.reshape(-1, 2), labels.ravel()), key)
    of_points, of_flips = nll_of_points(params[0], points, key), nll_of_flips(params[1], flips, key)
    return of_points + of_flips + jnp.mean(jnp.reshape(of_classes, (-1, 3)), axis=1)


@app.function
@jax.jit
def measure(given, seed, rate):
    """Likelihoods of the given parameters, and the path of a fit that starts from them."""
    loc, scale, heads, angle, length = given
    turns = angle * jnp.pi / 180 + 2 * jnp.pi / 3 * jnp.arange(3.0)
    params = (
        {"loc": loc, "log_scale": jnp.log(scale)},
        jnp.log(heads) - jnp.log1p(-heads),
        length * jnp.stack([jnp.cos(turns), jnp.sin(turns)]),
    )
    data = draw(seed)
    points, flips, (features, labels) = data
    losses = nll_of_points, nll_of_flips, nll_of_classes

    def means(params):
        return [jnp.mean(nll(start, x, None)) for nll, start, x in zip(losses, params, data, strict=True)]

    state = mle.init(params, OPTIMIZER, jax.random.key(0))
    state = state._replace(optimizer_state=optax.tree.set(state.optimizer_state, learning_rate=rate))
    batch = points, flips, (features.reshape(-1, 3, 2), labels.reshape(-1, 3))

    def on(state, _):
        state = mle.run(nll_of_all, OPTIMIZER, state, batch, num_steps=EACH, batch_size=POINTS)[0]
        return state, state.params

    state, path = jax.lax.scan(on, state, None, MARKS)
    sizes = jnp.array([POINTS, POINTS, 3 * POINTS], float)
    log_likelihood = -sizes * jnp.stack(means(params))
    found = {
        "log_likelihood": log_likelihood,
        "likelihood": jnp.exp(log_likelihood),
        "nll": -log_likelihood / sizes,
        "fitted": jnp.stack(means(state.params)),
        "path": jax.tree.map(lambda first, rest: jnp.append(first[None], rest, axis=0), params, path),
    }
    grid = jax.vmap(jax.vmap(lambda m, s: -jnp.mean(gaussian.log_prob(points, m, s)), (0, None)), (None, 0))
    found["grid"] = grid(jnp.array(LOCS), jnp.array(SCALES))
    found["curve"] = jax.vmap(lambda z: jnp.mean(nll_of_flips(z, flips, None)))(jnp.array(LOGITS))
    return found, data


@app.function
def compute(values):
    """All that the page shows, by name."""
    given = page.floats(values, ["mean", "deviation", "heads", "angle", "length"])
    found, data = jax.device_get(measure(given, np.int32(values["seed"]), np.float32(values["learning rate"])))
    named = page.flat({name: found[name] for name in ("likelihood", "log_likelihood", "nll", "fitted")})
    if not values["fit"]:
        named |= {f"fitted_{k}": "switch on fit" for k in range(3)}
    return named | {"path": found["path"], "grid": found["grid"], "curve": found["curve"], "data": data}


@app.function
def code(values):
    """The same by plain jprob."""
    loc, scale, heads, angle, length = (float(values[n]) for n in ("mean", "deviation", "heads", "angle", "length"))
    fit = f"""
fitted = []
for loss, start, examples in zip(losses, params, data):
    optimizer = optax.adam({values["learning rate"]})
    state = mle.init(start, optimizer, jax.random.key(0))
    options = {{"num_steps": {EACH * MARKS}, "batch_size": len(jax.tree.leaves(examples)[0])}}
    state, history = mle.run(loss, optimizer, state, examples, **options)
    fitted.append(jnp.mean(loss(state.params, examples, None)))
"""
    return f"""
import jax
import jax.numpy as jnp
import optax
from jprob import bernoulli, categorical, gaussian, mle

keys = jax.random.split(jax.random.key({values["seed"]}), 3)
points = 1 + 1.5 * jax.random.normal(keys[0], ({POINTS},))
flips = jax.random.bernoulli(keys[1], 0.7, ({POINTS},)).astype(int)
labels = jnp.arange({3 * POINTS}) % 3
centres = jnp.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
data = points, flips, (centres[labels] + jax.random.normal(keys[2], ({3 * POINTS}, 2)), labels)

losses = (
    lambda params, x, key: gaussian.nll(x, params["loc"], log_scale=params["log_scale"]),
    lambda logit, x, key: bernoulli.cross_entropy(jnp.broadcast_to(logit, x.shape), x),
    lambda kernel, x, key: categorical.cross_entropy(x[0] @ kernel, x[1]),
)
turns = jnp.deg2rad({angle}) + 2 * jnp.pi / 3 * jnp.arange(3)
params = (
    {{"loc": jnp.array({loc}), "log_scale": jnp.log({scale})}},
    jnp.log({heads}) - jnp.log1p(-{heads}),
    {length} * jnp.stack([jnp.cos(turns), jnp.sin(turns)]),
)
log_likelihood = [-jnp.sum(loss(p, x, None)) for loss, p, x in zip(losses, params, data)]
likelihood = [jnp.exp(each) for each in log_likelihood]
nll = [jnp.mean(loss(p, x, None)) for loss, p, x in zip(losses, params, data)]
{fit if values["fit"] else ""}"""


@app.cell(hide_code=True)
def _():
    controls = page.controls(
        mean=(-3, 5, 0.1, -1),
        deviation=(0.2, 5, 0.1, 3),
        heads=(0.05, 0.95, 0.05, 0.2),
        angle=(-180, 180, 5, 90),
        length=(0, 4, 0.1, 1),
        learning_rate=(0.02, 0.5, 0.02, 0.1),
        seed=(0, 20, 1, 0),
        fit=True,
    )
    page.panel(controls)
    return (controls,)


@app.function
def bell(found, fit):
    """The points, the density of the parameters, and that of the fit."""
    x = np.linspace(-5, 7, 121)
    path = found["path"][0]
    shown = {"given": 0} | ({"fitted": -1} if fit else {})
    layers = []
    for (name, at), colour in zip(shown.items(), (page.BLUE, page.RED), strict=False):
        scale = float(np.exp(path["log_scale"][at]))
        p = np.exp(-(((x - float(path["loc"][at])) / scale) ** 2) / 2) / scale / np.sqrt(2 * np.pi)
        line = alt.Chart(page.rows(x=x, p=p, density=name)).mark_line(strokeWidth=2.5)
        colour = alt.Color("density:N", scale=alt.Scale(domain=["given", "fitted"], range=[page.BLUE, page.RED]))
        layers.append(line.encode(x=alt.X("x:Q", title="x"), y=alt.Y("p:Q", title="density"), color=colour))
    ticks = alt.Chart(page.rows(x=found["data"][0], p=0.0)).mark_point(color=page.GREY, filled=True, size=45, opacity=1)
    return page.chart([*layers, ticks.encode(x="x:Q", y="p:Q")], f"Gaussian: {POINTS} points and its density")


@app.function
def landscape(found, fit):
    """The mean loss of each mean and deviation, and the path of the fit."""
    scales, locs = np.meshgrid(SCALES, LOCS, indexing="ij")
    half, ratio = (LOCS[1] - LOCS[0]) / 2, (SCALES[1] / SCALES[0]) ** 0.5
    cells = page.rows(
        x=locs - half,
        x2=locs + half,
        y=scales / ratio,
        y2=scales * ratio,
        nll=np.round(np.minimum(found["grid"], 6), 2),
    )
    x = alt.X("x:Q", title="mean", scale=alt.Scale(domain=[-3, 5], clamp=True))
    y = alt.Y("y:Q", title="deviation", scale=alt.Scale(type="log", domain=[0.2, 5], clamp=True))
    colour = alt.Color("nll:Q", scale=alt.Scale(scheme="viridis", reverse=True), title="mean loss, at most 6")
    rect = alt.Chart(cells).mark_rect().encode(x=x, x2="x2:Q", y=y, y2="y2:Q", color=colour)
    path, last = found["path"][0], None if fit else 1
    steps = page.rows(x=path["loc"][:last], y=np.exp(path["log_scale"])[:last], order=np.arange(MARKS + 1)[:last])
    line = (
        alt.Chart(steps)
        .mark_line(color="white", point={"color": "white", "size": 18})
        .encode(x=x, y=y, order="order:Q")
    )
    start = alt.Chart(page.rows(x=path["loc"][:1], y=np.exp(path["log_scale"][:1])))
    start = start.mark_point(color=page.RED, filled=True, size=110, opacity=1).encode(x=x, y=y)
    return page.chart([rect, line, start], "Gaussian: loss of all parameters, and the path of the fit")


@app.function
def coin(found, fit):
    """The mean loss against the probability of heads, and the path of the fit along it."""
    heads = 1 / (1 + np.exp(-LOGITS))
    x = alt.X("p:Q", title="probability of heads", scale=alt.Scale(domain=[0, 1]))
    y = alt.Y("nll:Q", title="mean loss, nats", scale=alt.Scale(zero=False))
    line = alt.Chart(page.rows(p=heads, nll=found["curve"])).mark_line(color=page.BLUE).encode(x=x, y=y)
    logits = found["path"][1][: None if fit else 1]
    steps = page.rows(p=1 / (1 + np.exp(-logits)), nll=np.interp(logits, LOGITS, found["curve"]))
    marks = alt.Chart(steps).mark_point(color=page.RED, filled=True, size=45, opacity=0.7).encode(x=x, y=y)
    count = int(found["data"][1].sum())
    return page.chart([line, marks], f"Coin: {count} heads in {POINTS} flips, and the path of the fit")


@app.function
def plane(found, fit):
    """The points of three classes, and the weights of each class along the fit."""
    (points, labels), path = found["data"][2], found["path"][2][: None if fit else 1]
    x, y = alt.X("x:Q", title="first feature"), alt.Y("y:Q", title="second feature")
    colour = alt.Color("class:N", scale=COLOURS)
    dots = alt.Chart(page.rows(**{"x": points[:, 0], "y": points[:, 1], "class": labels}))
    layers = [dots.mark_point(filled=True, opacity=0.45, size=30).encode(x=x, y=y, color=colour)]
    for k in range(3):
        steps = page.rows(**{"x": path[:, 0, k], "y": path[:, 1, k], "class": k, "order": np.arange(len(path))})
        line = alt.Chart(steps).mark_line(strokeWidth=3).encode(x=x, y=y, color=colour, order="order:Q")
        arrow = page.rows(**{"x": [0.0, path[-1, 0, k]], "y": [0.0, path[-1, 1, k]], "class": k})
        arrow = alt.Chart(arrow).mark_line(strokeDash=[4, 4], point=True).encode(x=x, y=y, color=colour)
        layers += [line, arrow]
    return page.chart(layers, "Classifier: points, weights of each class (dashes), and their path")


@app.cell(hide_code=True)
def _(controls):
    found = compute(controls.value)
    columns = "likelihood", "log_likelihood", "nll", "fitted"
    page.show(
        page.table(
            ["model", "likelihood", "log-likelihood", "mean loss", "mean loss, fitted"],
            [[name, *(page.output(f"{c}_{k}", found[f"{c}_{k}"]) for c in columns)] for k, name in enumerate(MODELS)],
        )
        + "<p>A likelihood of many examples underflows to 0. Its logarithm does not.</p>"
    )
    return (found,)


@app.cell(hide_code=True)
def _(controls, found):
    fit = controls.value["fit"]
    page.show(
        bell(found, fit),
        landscape(found, fit),
        coin(found, fit),
        plane(found, fit),
    )
    return


@app.cell(hide_code=True)
def _(controls):
    page.code(code(controls.value))
    return


if __name__ == "__main__":
    app.run()
