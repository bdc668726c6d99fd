"""4. Softmax: logits and a temperature become probabilities, also where the usual form overflows."""

import marimo

app = marimo.App(width="medium", css_file="page.css", app_title="Softmax")

with app.setup:
    import altair as alt
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.explore import _page as page
    from jprob import categorical

    START = (2.0, 1.0, 0.1, -1.0, 0.5, 0.0, -0.5, -2.0)
    DRAWS = 1000


@app.cell(hide_code=True)
def _():
    page.intro(
        "Softmax",
        "Softmax turns logits into probabilities. Only differences of logits count, so a shift of all logits changes "
        "nothing. A temperature T divides the logits: 0 leaves the largest, and a large T makes all classes equal.",
        r"p_k = \frac{e^{z_k / T}}{\sum_j e^{z_j / T}}",
    )
    return


@app.function
@jax.jit
def measure(logits, count, temperature, seed):
    """Probabilities of the classes that exist, stable and naive, and how often each is drawn."""
    where = jnp.arange(logits.size) < count
    terms = jnp.where(where, jnp.exp(logits / temperature), 0)
    possible = jnp.where(where, logits, -jnp.inf)
    drawn = categorical.sample(jax.random.key(seed), possible, shape=(DRAWS,), temperature=temperature)
    probs = categorical.softmax(logits, where=where, temperature=temperature)
    return {
        "terms": terms,
        "naive": terms / jnp.sum(terms),
        "probs": probs,
        "drawn": jnp.bincount(drawn, length=logits.size) / DRAWS,
        "bits": categorical.entropy(jnp.log(probs), base=2),
    }


@app.function
def compute(values):
    """All that the page shows, by name."""
    logits = page.floats(values, [f"logit {k + 1}" for k in range(8)]) + np.float32(
        1000 * values["add 1000 to all logits"]
    )
    count, seed = np.int32(values["classes"]), np.int32(values["seed"])
    found = jax.device_get(measure(logits, count, np.float32(values["temperature"]), seed))
    named = {f"{name}_{k}": found[name][k] for name in ("terms", "naive", "probs", "drawn") for k in range(count)}
    return named | {"bits": found["bits"], "logits": logits, "count": int(count)}


@app.function
def code(values):
    """The same by plain jprob."""
    logits = [values[f"logit {k + 1}"] + 1000 * values["add 1000 to all logits"] for k in range(int(values["classes"]))]
    return f"""
import jax
import jax.numpy as jnp
from jprob import categorical

logits, temperature = jnp.array({[float(z) for z in logits]}), {values["temperature"]}
probs = categorical.softmax(logits, temperature=temperature)
bits = categorical.entropy(jnp.log(probs), base=2)
possible = jnp.pad(logits, (0, {8 - len(logits)}), constant_values=-jnp.inf)  # of 8 classes, as on the page
samples = categorical.sample(jax.random.key({values["seed"]}), possible, shape=({DRAWS},), temperature=temperature)
drawn = jnp.bincount(samples, length={len(logits)}) / {DRAWS}
"""


@app.cell(hide_code=True)
def _():
    controls = page.controls(
        **{f"logit_{k + 1}": (-5, 5, 0.1, START[k]) for k in range(8)},
        classes=(2, 8, 1, 3),
        temperature=(0, 20, 0.1, 1),
        seed=(0, 20, 1, 0),
        add_1000_to_all_logits=False,
    )
    page.panel(controls)
    return (controls,)


@app.function
def bars(found):
    """Probabilities as bars, and the share of each class in the samples as a mark."""
    classes = np.arange(found["count"])
    probs, drawn = ([float(found[f"{name}_{k}"]) for k in classes] for name in ("probs", "drawn"))
    x = alt.X("class:O", title="class", axis=alt.Axis(labelAngle=0))
    y = alt.Y("p:Q", title="probability", scale=alt.Scale(domain=[0, 1]))
    bar = alt.Chart(page.rows(**{"class": classes + 1, "p": probs})).mark_bar(color=page.BLUE).encode(x=x, y=y)
    tick = alt.Chart(page.rows(**{"class": classes + 1, "p": drawn})).mark_tick(color=page.RED, thickness=3)
    return page.chart([bar, tick.encode(x=x, y=y)], f"Softmax (bars) and share in {DRAWS} samples (marks)")


@app.cell(hide_code=True)
def _(controls):
    found = compute(controls.value)
    page.show(page.numbers({"bits": "entropy, bits"}, found))
    return (found,)


@app.cell(hide_code=True)
def _(found):
    names = "terms", "naive", "probs", "drawn"
    classes = [
        [str(k + 1), page.text(found["logits"][k]), *(page.output(f"{n}_{k}", found[f"{n}_{k}"]) for n in names)]
        for k in range(found["count"])
    ]
    page.show(
        page.table(["class", "logit", "e<sup>z/T</sup>", "naive p", "jprob p", "sampled"], classes),
        bars(found),
    )
    return


@app.cell(hide_code=True)
def _(controls):
    page.code(code(controls.value))
    return


if __name__ == "__main__":
    app.run()
