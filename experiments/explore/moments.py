"""1. Distributions and moments: six outcomes, their mean and variance, and an estimate that converges to the mean."""

import marimo

app = marimo.App(width="medium", css_file="page.css", app_title="Distributions and moments")

with app.setup:
    import altair as alt
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.explore import _page as page
    from jprob import categorical, expectation

    STARTS = {
        "die": [1.0] * 6,
        "loaded die": [1.0, 1.0, 1.0, 1.0, 1.0, 5.0],
        "classifier output": [0.1, 0.3, 6.0, 2.0, 0.5, 0.1],
    }
    DRAWS = 4000


@app.cell(hide_code=True)
def _():
    page.intro(
        "Distributions and moments",
        "A distribution over six outcomes has one probability for each, and they sum to 1. Mean and variance are "
        "exact sums over the outcomes. An average over samples estimates the mean, and its error falls with the root "
        "of their number.",
        r"\mathrm{E}[x] = \sum_k p_k x_k, \quad \mathrm{Var}[x] = \sum_k p_k (x_k - \mathrm{E}\,x)^2",
    )
    return


@app.function
@jax.jit
def measure(weights, samples, seed):
    """Probabilities, moments, and the running estimate of the mean with its standard error."""
    logits, values = jnp.log(weights), jnp.arange(1.0, 7)
    mean, variance = expectation.mean(values, logits), expectation.variance(values, logits)
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    off = values[jax.vmap(lambda key: categorical.sample(key, logits))(keys)] - mean
    n = jnp.arange(1.0, DRAWS + 1)
    shift = jnp.cumsum(off) / n
    error = jnp.sqrt(jnp.maximum(jnp.cumsum(off**2) / n - shift**2, 0) / jnp.maximum(n - 1, 1))
    return {
        "probs": categorical.softmax(logits),
        "total": jnp.sum(categorical.softmax(logits)),
        "mean": mean,
        "variance": variance,
        "deviation": jnp.sqrt(variance),
        "estimate": mean + shift[samples - 1],
        "error": error[samples - 1],
    }, {"running": mean + shift, "error": error}


@app.function
def compute(values):
    """All that the page shows, by name."""
    weights = page.floats(values, [f"weight of {k}" for k in range(1, 7)]) * np.array(
        STARTS[values["distribution"]], np.float32
    )
    found, curve = jax.device_get(measure(weights, np.int32(values["samples"]), np.int32(values["seed"])))
    return page.flat(found) | {"curve": curve}


@app.function
def code(values):
    """The same by plain jprob."""
    start = STARTS[values["distribution"]]
    weights = [round(values[f"weight of {k + 1}"] * start[k], 4) for k in range(6)]
    return f"""
import jax
import jax.numpy as jnp
from jprob import categorical, expectation

logits, values = jnp.log(jnp.array({weights})), jnp.arange(1.0, 7)
probs = categorical.softmax(logits)
total = jnp.sum(probs)
mean = expectation.mean(values, logits)
variance = expectation.variance(values, logits)
estimate, error = expectation.monte_carlo(
    lambda k: values[k], lambda key: categorical.sample(key, logits), jax.random.key({values["seed"]}),
    num_samples={values["samples"]},
)
"""


@app.cell(hide_code=True)
def _():
    controls = page.controls(
        distribution=list(STARTS),
        **{f"weight_of_{k}": (0.1, 5, 0.1, 1) for k in range(1, 7)},
        samples=(10, DRAWS, 10, 500),
        seed=(0, 20, 1, 0),
    )
    page.panel(controls)
    return (controls,)


@app.function
def bars(found):
    """Probabilities, with the mean and one standard deviation to either side."""
    x = alt.X("x:Q", title="outcome", scale=alt.Scale(domain=[0.4, 6.6]), axis=alt.Axis(values=list(range(1, 7))))
    data = page.rows(x=np.arange(1, 7), p=[found[f"probs_{k}"] for k in range(6)])
    y = alt.Y("p:Q", title="probability")
    bar = alt.Chart(data).mark_bar(size=26, color=page.BLUE).encode(x=x, y=y)
    mean, deviation = float(found["mean"]), float(found["deviation"])
    span = alt.Chart(page.rows(x=[mean - deviation], end=[mean + deviation])).mark_rect(color=page.GOLD, opacity=0.25)
    rule = alt.Chart(page.rows(x=[mean])).mark_rule(color=page.RED, strokeWidth=3).encode(x=x)
    return page.chart([span.encode(x=x, x2="end:Q"), bar, rule], "Probabilities; mean (line) and one deviation (band)")


@app.function
def converging(found, samples):
    """The running mean, within two standard errors."""
    at = np.unique(np.round(np.geomspace(2, samples, 120))).astype(int)
    mean, error = (found["curve"][name][at - 1] for name in ("running", "error"))
    x = alt.X("n:Q", title="samples", scale=alt.Scale(type="log"))
    y = alt.Y("mean:Q", title="estimate of the mean", scale=alt.Scale(zero=False))
    band = alt.Chart(page.rows(n=at, mean=mean - 2 * error, high=mean + 2 * error)).mark_area(
        color=page.SKY, opacity=0.35
    )
    line = alt.Chart(page.rows(n=at, mean=mean)).mark_line(color=page.BLUE).encode(x=x, y=y)
    exact = alt.Chart(page.rows(mean=[found["mean"]])).mark_rule(color=page.RED).encode(y=y)
    return page.chart([band.encode(x=x, y=y, y2="high:Q"), line, exact], "Estimate within two standard errors")


@app.cell(hide_code=True)
def _(controls):
    found = compute(controls.value)
    page.show(
        page.numbers(
            {
                "mean": "mean",
                "variance": "variance",
                "total": "sum of all probabilities",
                "estimate": "estimate of the mean",
                "error": "its standard error",
            }
            | {f"probs_{k}": f"p of {k + 1}" for k in range(6)},
            found,
        )
    )
    return (found,)


@app.cell(hide_code=True)
def _(controls, found):
    page.show(
        bars(found),
        converging(found, int(controls.value["samples"])),
    )
    return


@app.cell(hide_code=True)
def _(controls):
    page.code(code(controls.value))
    return


if __name__ == "__main__":
    app.run()
