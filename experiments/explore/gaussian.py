"""2. Gaussian: its bands and intervals, why sums come near it, and what it makes of a deep network's start."""

import marimo

app = marimo.App(width="medium", css_file="page.css", app_title="Gaussian")

with app.setup:
    import altair as alt
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.explore import _page as page
    from jprob import gaussian

    SOURCES = ["uniform", "exponential", "coin"]
    SUMS, TERMS = 2000, 32
    LAYERS, WIDTH = 20, 64
    # Weights that keep the size of a ReLU layer, of a linear layer, and of none.
    STARTS = {"He": (2 / WIDTH) ** 0.5, "Xavier": WIDTH**-0.5, "too small": 0.05, "too large": 0.25}
    EDGES = np.linspace(-4, 4, 41, dtype=np.float32)


@app.cell(hide_code=True)
def _():
    page.intro(
        "Gaussian",
        "A Gaussian has a mean and a standard deviation, and they fix the probability of every interval. A sum of many "
        "independent terms comes near it. Weights of a network start as its samples, and their scale decides what "
        "arrives at the end.",
        r"p(x) = \frac{1}{\sigma \sqrt{2 \pi}} \, e^{-(x - \mu)^2 / 2 \sigma^2}",
    )
    return


@app.function
@jax.jit
def intervals(loc, scale, low, high):
    """Bands, the interval, and the density for the chart."""
    x = loc + scale * jnp.linspace(-4.0, 4.0, 161)
    return {
        "within": gaussian.interval_prob(-jnp.arange(1.0, 4), jnp.arange(1.0, 4)),
        "interval": gaussian.interval_prob(jnp.minimum(low, high), jnp.maximum(low, high), loc, scale),
        "peak": gaussian.prob(loc, loc, scale),
        "x": x,
        "density": gaussian.prob(x, loc, scale),
    }


@app.function
@jax.jit
def sums(source, terms, seed):
    """Standardised sums, their histogram, and the largest gap between their distribution and the Gaussian's."""
    key = jax.random.key(seed)
    draws = jnp.stack(
        [
            (jax.random.uniform(key, (SUMS, TERMS)) - 0.5) * 12**0.5,
            jax.random.exponential(key, (SUMS, TERMS)) - 1,
            jax.random.rademacher(key, (SUMS, TERMS), jnp.float32),
        ]
    )[source]
    total = jnp.sum(jnp.where(jnp.arange(TERMS)[None] < terms, draws, 0), axis=1) / jnp.sqrt(terms.astype(jnp.float32))
    # Rounded, so that equal sums of a coin are equal.
    ordered = jnp.sort(jnp.round(total, 4))
    share = jnp.searchsorted(ordered, ordered, side="right") / SUMS
    below = jnp.searchsorted(ordered, ordered, side="left") / SUMS
    cdf = gaussian.cdf(ordered)
    gap = jnp.max(jnp.maximum(jnp.abs(share - cdf), jnp.abs(below - cdf)))
    return {"gap": gap, "histogram": jnp.histogram(total, bins=EDGES)[0] / SUMS / (EDGES[1] - EDGES[0])}


@app.function
@jax.jit
def depth(relu, normalised, seed):
    """The standard deviation of each layer's output, from each start."""
    keys = jax.random.split(jax.random.key(seed))
    weights = jax.random.normal(keys[1], (LAYERS, WIDTH, WIDTH))

    def layer(h, weight):
        h = h @ weight
        h = jnp.where(relu, jax.nn.relu(h), jnp.tanh(h))
        h = jnp.where(normalised, jax.nn.standardize(h), h)
        return h, jnp.std(h)

    def through(std):
        return jax.lax.scan(layer, jax.random.normal(keys[0], (WIDTH, WIDTH)), std * weights)[1]

    return jax.vmap(through)(jnp.array(list(STARTS.values())))


@app.function
def compute(values) -> dict:
    """All that the page shows, by name."""
    seed, terms = np.int32(values["seed"]), np.int32(values["terms"])
    here = intervals(*page.floats(values, ["mean", "standard deviation", "low", "high"]))
    of_sums = sums(np.int32(SOURCES.index(values["source"])), terms, seed)
    std = depth(np.bool_(values["activation"] == "ReLU"), np.bool_(values["normalise"]), seed)
    here, of_sums, std = jax.device_get((here, of_sums, std))
    found = here | of_sums | {"std": std}
    shown = {name: found[name] for name in ("within", "interval", "peak", "gap")}
    return page.flat(shown | {"last": std[:, -1]}) | found


@app.function
def code(values):
    """The same by plain jprob."""
    low, high = sorted((values["low"], values["high"]))
    draw = {
        "uniform": f"(jax.random.uniform(key, ({SUMS}, {TERMS})) - 0.5) * 12**0.5",
        "exponential": f"jax.random.exponential(key, ({SUMS}, {TERMS})) - 1",
        "coin": f"jax.random.rademacher(key, ({SUMS}, {TERMS}), float)",
    }[values["source"]]
    activation = {"ReLU": "jax.nn.relu", "tanh": "jnp.tanh"}[values["activation"]]
    normalise = "\n        h = jax.nn.standardize(h)" if values["normalise"] else ""
    return f"""
import jax
import jax.numpy as jnp
from jprob import gaussian

loc, scale = {float(values["mean"])}, {float(values["standard deviation"])}
within = gaussian.interval_prob(-jnp.arange(1.0, 4), jnp.arange(1.0, 4))  # 1, 2 and 3 standard deviations
interval = gaussian.interval_prob({float(low)}, {float(high)}, loc, scale)
peak = gaussian.prob(loc, loc, scale)

key = jax.random.key({values["seed"]})
draws = ({draw})[:, :{values["terms"]}]  # mean 0, variance 1
total = jnp.sort(jnp.round(jnp.sum(draws, axis=1) / {values["terms"]}**0.5, 4))
cdf = gaussian.cdf(total)
sides = [jnp.searchsorted(total, total, side=side) / {SUMS} for side in ("left", "right")]
gap = jnp.max(jnp.abs(jnp.stack(sides) - cdf))

first, second = jax.random.split(key)
last = []
for std in {list(STARTS.values())}:  # {", ".join(STARTS)}
    h = jax.random.normal(first, ({WIDTH}, {WIDTH}))
    for weight in std * jax.random.normal(second, ({LAYERS}, {WIDTH}, {WIDTH})):
        h = {activation}(h @ weight){normalise}
    last.append(jnp.std(h))
"""


@app.cell(hide_code=True)
def _():
    controls = page.controls(
        mean=(-5, 5, 0.1, 0),
        standard_deviation=(0.1, 5, 0.1, 1),
        low=(-10, 10, 0.1, -1),
        high=(-10, 10, 0.1, 2),
        source=SOURCES,
        terms=(1, TERMS, 1, 3),
        activation=["ReLU", "tanh"],
        seed=(0, 20, 1, 0),
        normalise=False,
    )
    page.panel(controls)
    return (controls,)


@app.function
def bell(found, low, high):
    """The density, with the interval filled."""
    low, high = sorted((low, high))
    x, y = alt.X("x:Q", title="x"), alt.Y("p:Q", title="density")
    line = alt.Chart(page.rows(x=found["x"], p=found["density"])).mark_line(color=page.BLUE).encode(x=x, y=y)
    inside = (found["x"] >= low) & (found["x"] <= high)
    area = alt.Chart(page.rows(x=found["x"][inside], p=found["density"][inside])).mark_area(color=page.SKY, opacity=0.5)
    loc, scale = float(found["x"][80]), float(found["x"][100] - found["x"][80])
    bands = alt.Chart(page.rows(x=loc + scale * np.array([-3, -2, -1, 1, 2, 3]))).mark_rule(
        color=page.GREY, strokeDash=[3, 3]
    )
    return page.chart([area.encode(x=x, y=y), bands.encode(x=x), line], "Density; dashes at 1, 2 and 3 deviations")


@app.function
def histogram(found):
    """Sums next to the standard Gaussian."""
    x = (EDGES[1:] + EDGES[:-1]) / 2
    axes = {"x": alt.X("x:Q", title="standardised sum"), "y": alt.Y("p:Q", title="density")}
    bars = alt.Chart(page.rows(low=EDGES[:-1], high=EDGES[1:], p=found["histogram"], zero=0.0)).mark_rect(
        color=page.GOLD
    )
    bars = bars.encode(x=alt.X("low:Q", title="standardised sum"), x2="high:Q", y=axes["y"], y2="zero:Q")
    bell = alt.Chart(page.rows(x=x, p=np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi))).mark_line(color=page.BLUE)
    return page.chart([bars, bell.encode(**axes)], f"{SUMS} sums (bars) and the standard Gaussian (line)")


@app.function
def layers(found):
    """Standard deviations through depth."""
    names = np.repeat(list(STARTS), LAYERS)
    data = page.rows(layer=np.tile(np.arange(1, LAYERS + 1), len(STARTS)), std=found["std"].ravel(), start=names)
    y = alt.Y(
        "std:Q", title="standard deviation", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e", tickCount=6)
    )
    line = (
        alt.Chart(data)
        .mark_line()
        .encode(
            x=alt.X("layer:Q", title="layer"), y=y, color=alt.Color("start:N", scale=page.COLOURED, sort=list(STARTS))
        )
    )
    return page.chart([line], f"Size of the output of {LAYERS} layers, by the start of the weights")


@app.cell(hide_code=True)
def _(controls):
    found = compute(controls.value)
    page.show(
        page.numbers(
            {
                "interval": "probability from low to high",
                "within_0": "within 1 deviation",
                "within_1": "within 2 deviations",
                "within_2": "within 3 deviations",
                "peak": "density at the mean",
                "gap": "largest gap of the sums' distribution",
            }
            | {f"last_{k}": f"last layer, {start}" for k, start in enumerate(STARTS)},
            found,
        )
    )
    return (found,)


@app.cell(hide_code=True)
def _(controls, found):
    page.show(
        bell(found, controls.value["low"], controls.value["high"]),
        histogram(found),
        layers(found),
    )
    return


@app.cell(hide_code=True)
def _(controls):
    page.code(code(controls.value))
    return


if __name__ == "__main__":
    app.run()
