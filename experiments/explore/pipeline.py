"""8. The framework pipeline: logits, softmax, loss and gradient of one prediction, digit by digit in each library."""

import marimo

app = marimo.App(width="medium", css_file="page.css", app_title="The framework pipeline")

with app.setup:
    import importlib.util

    import altair as alt
    import jax
    import numpy as np
    import optax

    from experiments.explore import _page as page
    from jprob import categorical

    CLASSES = ["cat", "dog", "bird"]
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None


@app.cell(hide_code=True)
def _():
    page.intro(
        "The framework pipeline",
        "A model sees a picture of a cat and gives one logit for each class. Softmax makes probabilities of them, and "
        "cross-entropy a loss. The gradient tells each logit where to go.",
        r"z \;\to\; p = \mathrm{softmax}(z) \;\to\; -\log p_y \;\to\; p - y",
    )
    return


@app.function
@jax.jit
def measure(logits, label):
    """Probabilities, loss and gradient, by jprob and by optax."""
    found = {"jprob": categorical.cross_entropy, "optax": optax.softmax_cross_entropy_with_integer_labels}
    probs = {"jprob": categorical.softmax(logits), "optax": jax.nn.softmax(logits)}
    made = {name: jax.value_and_grad(loss)(logits, label) for name, loss in found.items()}
    return {name: {"probs": probs[name], "loss": made[name][0], "gradient": made[name][1]} for name in found}


@app.function
def by_torch(logits, label):
    """The same by torch, if it is installed."""
    if torch is None:
        return {}
    z = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(z[None], torch.tensor([int(label)]))
    loss.backward()
    arrays = {"probs": torch.softmax(z, 0), "loss": loss, "gradient": z.grad}
    return {"torch": {name: np.asarray(value.detach()) for name, value in arrays.items()}}


@app.function
def exactly(logits, label):
    """The same from the definitions in float64, where no term cancels."""
    z = np.asarray(logits, np.float64)
    powers = np.exp(z - z.max())
    probs, others = powers / powers.sum(), np.exp(np.delete(z, label) - z[label]).sum()
    gradient = probs.copy()
    gradient[label] = -others / (1 + others)
    return {"probs": probs, "loss": np.log1p(others), "gradient": gradient}


@app.function
def compute(values):
    """All that the page shows, by name."""
    logits, label = page.floats(values, [f"logit of {name}" for name in CLASSES]), CLASSES.index(values["true class"])
    libraries = jax.device_get(measure(logits, np.int32(label))) | by_torch(logits, label)
    exact, found = exactly(logits, label), page.flat(libraries["jprob"])
    for library, made in {"exact": exact, **libraries}.items():
        found |= {f"{library}_{name}": f"{float(x):.8e}" for name, x in page.flat(made).items()}
    return found | {"libraries": list(libraries), "logits": logits}


@app.function
def code(values):
    """The same by plain jprob."""
    logits = [float(values[f"logit of {name}"]) for name in CLASSES]
    return f"""
import jax
import jax.numpy as jnp
from jprob import categorical

logits, label = jnp.array({logits}), {CLASSES.index(values["true class"])}  # {", ".join(CLASSES)}
probs = categorical.softmax(logits)
loss, gradient = jax.value_and_grad(categorical.cross_entropy)(logits, label)
"""


@app.cell(hide_code=True)
def _():
    controls = page.controls(
        logit_of_cat=(-30, 30, 0.1, 2),
        logit_of_dog=(-30, 30, 0.1, 1),
        logit_of_bird=(-30, 30, 0.1, 0.1),
        true_class=CLASSES,
    )
    page.panel(controls)
    return (controls,)


@app.function
def steps(found):
    """Logits, probabilities and gradient of each class, in one chart each."""
    made = []
    shown = {"logits": [float(z) for z in found["logits"]]}
    shown |= {name: [float(found[f"{name}_{k}"]) for k in range(3)] for name in ("probs", "gradient")}
    for (name, values), colour in zip(shown.items(), (page.GREY, page.BLUE, page.GREEN), strict=True):
        bar = alt.Chart(page.rows(name=CLASSES, value=values)).mark_bar(color=colour)
        y = alt.Y("name:N", title=None, sort=CLASSES)
        made.append(page.chart([bar.encode(x=alt.X("value:Q", title=None), y=y)], name, height=80))
    return "".join(made)


@app.function
def digits(text, exact):
    """A number with its wrong digits marked: those from the first that is not of the exact value on."""
    off = abs(float(text) - float(exact)) / abs(float(exact)) if float(exact) else 0.0
    right = 9 if off == 0 else int(np.clip(np.floor(-np.log10(2 * off)), 0, 9))
    mantissa, _, exponent = text.partition("e")
    cut = mantissa.index(".") + right if right else mantissa.index(".") - 1
    return f"{mantissa[:cut]}<mark>{mantissa[cut:]}</mark>e{exponent}"


@app.function
def comparison(found):
    """Each number in each library, to nine digits."""
    rows = []
    labels = {"loss": "loss"} | {f"probs_{k}": f"p, {name}" for k, name in enumerate(CLASSES)}
    labels |= {f"gradient_{k}": f"gradient, {name}" for k, name in enumerate(CLASSES)}
    for name, label in labels.items():
        exact = found[f"exact_{name}"]
        rows.append([label, exact, *(digits(found[f"{lib}_{name}"], exact) for lib in found["libraries"])])
    return page.table(["float32", "exact", *found["libraries"]], rows)


@app.cell(hide_code=True)
def _(controls):
    found = compute(controls.value)
    page.show(
        page.numbers(
            {"loss": "loss, nats"}
            | {f"probs_{k}": f"p, {name}" for k, name in enumerate(CLASSES)}
            | {f"gradient_{k}": f"gradient, {name}" for k, name in enumerate(CLASSES)},
            found,
        )
    )
    return (found,)


@app.cell(hide_code=True)
def _(found):
    absent = "" if torch else " torch is not installed here."
    page.show(
        steps(found),
        comparison(found)
        + f"<p>Marked digits are wrong. The loss of a prediction that is right by 20 is not 0.{absent}</p>",
    )
    return


@app.cell(hide_code=True)
def _(controls):
    page.code(code(controls.value))
    return


if __name__ == "__main__":
    app.run()
