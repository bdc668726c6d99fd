"""7. Cross-entropy and squared error: which gradient vanishes as a prediction gets worse, and what that costs."""

import marimo

app = marimo.App(width="medium", css_file="page.css", app_title="Cross-entropy and squared error")

with app.setup:
    import csv

    import altair as alt
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.arms import SOFTMAX_CE, SOFTMAX_SE
    from experiments.explore import _page as page
    from experiments.studies.escape_time import predicted_steps
    from experiments.studies.gradient_law import theory
    from jprob import categorical

    DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    ARMS = {"ce": SOFTMAX_CE, "se": SOFTMAX_SE}
    MOST, STEPS = 100, 2000  # classes, and steps of an escape
    MARGINS = np.arange(-120, 121, dtype=np.float32)
    FORMS = {"ce": "cross-entropy, jprob", "usual_ce": "cross-entropy, usual", "se": "squared error, jprob"}
    FORMS |= {"usual_se": "squared error, usual"}
    STORED = (page.HERE / "wrong_start.csv").read_text().splitlines()[1:]
    NAMES = {arm: name.removeprefix("softmax + ") for arm, name in ARMS.items()}
    LOOK = alt.Scale(domain=list(NAMES.values()), range=[page.BLUE, page.RED])


@app.cell(hide_code=True)
def _():
    page.intro(
        "Cross-entropy and squared error",
        "Class 1 is true, and a rival leads it by the margin m. The gradient of cross-entropy keeps its size as m "
        "grows, and that of squared error falls. A wrong start therefore costs squared error many steps.",
        r"\|g_\mathrm{CE}\| \to \sqrt{2}, \qquad \|g_\mathrm{SE}\| \approx \sqrt{K^2 + K + 2} \; e^{-m}",
    )
    return


@app.function
def losses(z, where=None):
    """Losses of logits whose first class is true, [n, K] or [K]: by jprob, and as they are usually written."""
    truth = jnp.zeros(z.shape[:-1], jnp.int32)

    def usual_se(z):
        y = jax.nn.one_hot(truth, z.shape[-1], dtype=z.dtype)
        return jnp.sum((jax.nn.softmax(z, where=where) - y) ** 2, axis=-1) / 2

    return {
        "ce": lambda z: categorical.cross_entropy(z, truth, where=where),
        "se": lambda z: categorical.brier_score(z, truth, where=where) / 2,
        "usual_ce": lambda z: -jax.nn.log_softmax(z, where=where)[..., 0],
        "usual_se": usual_se,
    }


@app.function
def gradient(form, z, where=None):
    """The gradient of each example's loss in its logits."""
    return jax.grad(lambda z: jnp.sum(losses(z, where)[form](z)))(z)


@app.function
@jax.jit
def measure(margin, count):
    """Norms at the margin and along all margins, and the leading class's entry there, in every dtype."""
    margins = jnp.append(jnp.array(MARGINS), margin)
    z = jnp.zeros((margins.size, MOST))
    z = z.at[:, 0].set(jnp.maximum(-margins, 0)).at[:, 1].set(jnp.maximum(margins, 0))
    where = jnp.broadcast_to(jnp.arange(MOST)[None] < count, z.shape)
    found = {}
    for form in FORMS:
        exact = None if form.startswith("usual") else gradient(form, z, where)
        for name, dtype in DTYPES.items():
            # jprob computes in float32 and rounds the gradient; these logits are exact in every dtype.
            g = gradient(form, z.astype(dtype), where) if exact is None else jnp.astype(exact, dtype)
            g = jnp.where(where, jnp.astype(g, jnp.float32), 0)
            largest = jnp.max(jnp.abs(g), axis=1, keepdims=True)  # the squares of small entries would underflow
            norm = largest[:, 0] * jnp.linalg.norm(g / jnp.where(largest > 0, largest, 1), axis=1)
            found[name, form] = norm, jnp.where(margins > 0, g[:, 1], g[:, 0])
    return found


@app.function
@jax.jit
def escape(start, rate):
    """The margin after each step of gradient descent on two free logits."""

    def path(arm):
        def step(z, _):
            z = z - rate * gradient(arm, z)
            return z, z[1] - z[0]

        return jax.lax.scan(step, jnp.stack([jnp.zeros_like(start), start]), None, STEPS)[1]

    return {arm: path(arm) for arm in ARMS}


@app.function
def first_zeros(entry):
    """The margins beyond which the entry is exactly 0: of right predictions, and of wrong ones."""
    left, right = MARGINS[entry[:-1] != 0][[0, -1]]
    return ["never here" if abs(end) == MARGINS[-1] else f"{end:+.0f}" for end in (left, right)]


@app.function
def compute(values):
    """All that the page shows, by name."""
    margin, start, rate = page.floats(values, ["margin", "start margin", "learning rate"])
    count = np.int32(values["classes"])
    curves, paths = jax.device_get((measure(margin, count), escape(start, rate)))
    found = {"curves": {form: curves[values["dtype"], form] for form in FORMS}, "paths": paths}
    for arm, name in ARMS.items():
        found[f"norm_{arm}"] = found["curves"][arm][0][-1]
        found[f"theory_{arm}"] = float(theory(name, np.array([margin], float), int(count))["norm"][0])
        out = np.flatnonzero(paths[arm] <= 0)
        found[f"steps_{arm}"] = f"{out[0] + 1:,}" if out.size else f"over {STEPS:,}"
        found[f"predicted_{arm}"] = int(
            predicted_steps(name, "SGD", float(rate), 0.0, 0.0, np.array([start], float))[0]
        )
    for form in FORMS:
        found[f"right_{form}"], found[f"wrong_{form}"] = first_zeros(found["curves"][form][1])
    return found


@app.function
def code(values):
    """The same by plain jprob."""
    margin = float(values["margin"])
    logits = [max(-margin, 0.0), max(margin, 0.0)] + [0.0] * min(2, int(values["classes"]) - 2)
    padding = f" + [0.0] * {int(values['classes']) - len(logits)}" if values["classes"] > len(logits) else ""
    return f"""
import jax
import jax.numpy as jnp
import numpy as np
from jprob import categorical

logits = jnp.array({logits}{padding}, "{values["dtype"]}")
gradient_ce = jax.grad(categorical.cross_entropy)(logits, 0)
gradient_se = jax.grad(lambda z: categorical.brier_score(z, 0) / 2)(logits)
norm_ce = np.linalg.norm(np.float64(gradient_ce))
norm_se = np.linalg.norm(np.float64(gradient_se))
"""


@app.cell(hide_code=True)
def _():
    controls = page.controls(
        margin=(-40, 40, 0.5, 8),
        classes=(2, MOST, 1, 10),
        dtype=list(DTYPES),
        start_margin=(0.5, 12, 0.5, 5),
        learning_rate=(0.05, 1, 0.05, 0.5),
        model=["linear", "mlp"],
        optimizer=["sgd", "adam"],
    )
    page.panel(controls)
    return (controls,)


@app.function
def norms(found, margin, count):
    """Norms against the margin with their theory, and the chosen margin."""
    shown = np.abs(MARGINS) <= 40
    m = MARGINS[shown]
    x = alt.X("m:Q", title="margin m: right on the left of 0, wrong on its right")
    y = alt.Y("norm:Q", title="norm", axis=alt.Axis(format=".0e", tickCount=6))
    y = y.scale(type="log", domain=[1e-18, 10], clamp=True)
    layers = []
    for arm, name in ARMS.items():
        norm = found["curves"][arm][0][:-1][shown]
        data = page.rows(m=m[norm > 0], norm=norm[norm > 0], loss=NAMES[arm])
        colour = alt.Color("loss:N", scale=LOOK)
        layers.append(alt.Chart(data).mark_line(strokeWidth=4, opacity=0.6).encode(x=x, y=y, color=colour))
        data = page.rows(m=m, norm=theory(name, m.astype(float), count)["norm"])
        dashes = alt.Chart(data).mark_line(strokeWidth=1.5, strokeDash=[4, 4], color=page.GREY)
        layers.append(dashes.encode(x=x, y=y))
    now = alt.Chart(page.rows(m=[margin])).mark_rule(color=page.GREY).encode(x=x)
    return page.chart([*layers, now], "Norm of the gradient; dashes: theory, line: the chosen margin")


@app.function
def escapes(found, start):
    """The margin at each step."""
    steps = np.unique(np.round(np.geomspace(1, STEPS, 120))).astype(int)
    layers = [
        page.rows(step=np.append(0.5, steps), m=np.append(start, found["paths"][arm][steps - 1]), loss=name)
        for arm, name in NAMES.items()
    ]
    x = alt.X("step:Q", title="step", scale=alt.Scale(type="log", domain=[0.5, STEPS]))
    y, colour = alt.Y("m:Q", title="margin"), alt.Color("loss:N", scale=LOOK)
    lines = [alt.Chart(data).mark_line().encode(x=x, y=y, color=colour) for data in layers]
    zero = alt.Chart(page.rows(m=[0.0])).mark_rule(color=page.GREY, strokeDash=[4, 4]).encode(y=y)
    return page.chart([*lines, zero], "Escape from a wrong start: gradient descent on two logits")


@app.function
def accuracies(model, optimizer):
    """Test accuracy against the start, as the study has measured it."""
    chosen = [row for row in csv.DictReader(STORED) if (row["model"], row["optimizer"]) == (model, optimizer)]
    chosen = [row for row in chosen if row["arm"] in ARMS.values()]
    columns = {name: [float(row[name]) for row in chosen] for name in ("std", "mean", "least", "most")}
    data = page.rows(loss=[row["arm"].removeprefix("softmax + ") for row in chosen], **columns)
    x = alt.X("std:Q", title="standard deviation of the output weights at the start").scale(type="log", nice=False)
    y, colour = alt.Y("mean:Q", title="test accuracy, %", scale=alt.Scale(zero=False)), alt.Color("loss:N", scale=LOOK)
    line = alt.Chart(data).mark_line(point=True).encode(x=x, y=y, color=colour)
    span = alt.Chart(data).mark_rule(opacity=0.6).encode(x=x, y=alt.Y("least:Q"), y2="most:Q", color=colour)
    return page.chart([span, line], "Test accuracy on digits: mean and range of 12 seeds, each rate tuned")


@app.cell(hide_code=True)
def _(controls):
    found = compute(controls.value)
    page.show(
        page.numbers(
            {
                "norm_ce": "norm, cross-entropy",
                "theory_ce": "its theory",
                "norm_se": "norm, squared error",
                "theory_se": "its theory",
                "steps_ce": "steps out, cross-entropy",
                "predicted_ce": "predicted",
                "steps_se": "steps out, squared error",
                "predicted_se": "predicted",
            },
            found,
        )
    )
    return (found,)


@app.cell(hide_code=True)
def _(controls, found):
    values = controls.value
    page.show(
        norms(found, float(values["margin"]), int(values["classes"])),
        escapes(found, float(values["start margin"])),
        f"<p>The gradient of the leading class is exactly 0 beyond these margins in {values['dtype']}.</p>"
        + page.table(
            ["form", "right", "wrong"],
            [
                [name, *(page.output(f"{side}_{form}", found[f"{side}_{form}"]) for side in ("right", "wrong"))]
                for form, name in FORMS.items()
            ],
        ),
        accuracies(values["model"], values["optimizer"]),
    )
    return


@app.cell(hide_code=True)
def _(controls):
    page.code(code(controls.value))
    return


if __name__ == "__main__":
    app.run()
