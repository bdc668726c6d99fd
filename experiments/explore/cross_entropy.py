"""5. Cross-entropy: the loss of a prediction, its two parts, its gradient, and the mistake of a second softmax."""

import marimo

app = marimo.App(width="medium", css_file="page.css", app_title="Cross-entropy")

with app.setup:
    import altair as alt
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.explore import _page as page
    from jprob import categorical

    CLASSES = ("1", "2", "3", "4")


@app.cell(hide_code=True)
def _():
    page.intro(
        "Cross-entropy",
        "Cross-entropy is the loss of a predicted distribution p under a target y. It is the entropy of the target "
        "plus the divergence from target to prediction. Its gradient in the logits is p - y.",
        r"H(y, p) = -\sum_k y_k \log p_k = H(y) + \mathrm{KL}(y \,\|\, p)",
    )
    return


@app.function
@jax.jit
def measure(logits, label, smoothing):
    """Loss, parts and gradient; and the loss of log-probabilities and of probabilities, taken for logits."""
    targets = (1 - smoothing) * jax.nn.one_hot(label, logits.size) + smoothing / logits.size
    loss, gradient = jax.value_and_grad(categorical.cross_entropy)(logits, targets)
    return {
        "loss": loss,
        "bits": loss / jnp.log(2.0),
        "entropy": categorical.entropy(jnp.log(targets)),
        "kl": categorical.kl_divergence(jnp.log(targets), logits),
        "probs": categorical.softmax(logits),
        "targets": targets,
        "gradient": gradient,
        "of_log_probs": categorical.cross_entropy(categorical.log_softmax(logits), targets),
        "of_probs": categorical.cross_entropy(categorical.softmax(logits), targets),
        "gradient_of_probs": jax.grad(lambda z: categorical.cross_entropy(categorical.softmax(z), targets))(logits),
    }


@app.function
def compute(values):
    """All that the page shows, by name."""
    logits, smoothing = page.floats(values, [f"logit {name}" for name in CLASSES]), np.float32(values["smoothing"])
    return page.flat(jax.device_get(measure(logits, np.int32(int(values["true class"]) - 1), smoothing)))


@app.function
def code(values):
    """The same by plain jprob."""
    logits, label = [float(values[f"logit {name}"]) for name in CLASSES], int(values["true class"]) - 1
    return f"""
import jax
import jax.numpy as jnp
from jprob import categorical

logits, smoothing = jnp.array({logits}), {values["smoothing"]}
targets = (1 - smoothing) * jax.nn.one_hot({label}, 4) + smoothing / 4
loss, gradient = jax.value_and_grad(categorical.cross_entropy)(logits, targets)
bits = loss / jnp.log(2)
entropy = categorical.entropy(jnp.log(targets))
kl = categorical.kl_divergence(jnp.log(targets), logits)
probs = categorical.softmax(logits)
of_log_probs = categorical.cross_entropy(categorical.log_softmax(logits), targets)  # the same: logits they are
of_probs = categorical.cross_entropy(probs, targets)  # the mistake: a second softmax
"""


@app.cell(hide_code=True)
def _():
    controls = page.controls(
        **{f"logit_{name}": (-10, 10, 0.1, at) for name, at in zip(CLASSES, (2, 1, 0.1, -1), strict=True)},
        true_class=list(CLASSES),
        smoothing=(0, 1, 0.05, 0.1),
    )
    page.panel(controls)
    return (controls,)


@app.function
def parts(found):
    """Entropy and divergence, which add up to the loss."""
    names = ["entropy of the target", "divergence"]
    data = page.rows(part=names, nats=[float(found["entropy"]), float(found["kl"])], order=[0, 1])
    bar = (
        alt.Chart(data)
        .mark_bar()
        .encode(
            x=alt.X("nats:Q", title="nats"), color=alt.Color("part:N", scale=page.COLOURED, sort=names), order="order:O"
        )
    )
    return page.chart([bar], "Loss = entropy of the target + divergence", height=70)


@app.function
def curve(found, label):
    """-log p, with the true class as a point."""
    p = np.geomspace(1e-3, 1, 80)
    axes = {"x": alt.X("p:Q", title="probability of the true class"), "y": alt.Y("nats:Q", title="-log p, nats")}
    line = alt.Chart(page.rows(p=p, nats=-np.log(p))).mark_line(color=page.BLUE).encode(**axes)
    now = max(float(found[f"probs_{label}"]), 1e-3)
    point = alt.Chart(page.rows(p=[now], nats=[-np.log(now)])).mark_point(color=page.RED, filled=True, size=120)
    return page.chart([line, point.encode(**axes)], "-log p; p under 0.001 stands at the edge")


@app.function
def arrows(found):
    """p - y for each class: descent moves the logit the other way."""
    gradient = np.array([found[f"gradient_{k}"] for k in range(4)], float)
    data = page.rows(k=list(CLASSES), zero=0.0, g=gradient, tip=np.where(gradient < 0, 180, 0))
    x, y = alt.X("k:N", title="class", axis=alt.Axis(labelAngle=0)), alt.Y("g:Q", title="p - y")
    y = y.scale(domain=[-1, 1])
    stem = alt.Chart(data).mark_rule(strokeWidth=3, color=page.GREEN).encode(x=x, y=y, y2="zero:Q")
    tip = alt.Chart(data).mark_point(shape="triangle", filled=True, size=110, color=page.GREEN, opacity=1)
    tip = tip.encode(x=x, y=y, angle=alt.Angle("tip:Q", scale=None))
    return page.chart([stem, tip], "Gradient in the logits")


@app.cell(hide_code=True)
def _(controls):
    found = compute(controls.value)
    page.show(
        page.numbers(
            {
                "loss": "loss, nats",
                "bits": "loss, bits",
                "entropy": "entropy of the target",
                "kl": "divergence",
                "of_log_probs": "loss of log-probabilities as logits",
                "of_probs": "loss of probabilities as logits",
            },
            found,
        )
    )
    return (found,)


@app.cell(hide_code=True)
def _(controls, found):
    columns = "targets", "probs", "gradient", "gradient_of_probs"
    page.show(
        page.table(
            ["class", "target y", "p", "gradient p - y", "gradient, two softmaxes"],
            [[name, *(page.output(f"{c}_{k}", found[f"{c}_{k}"]) for c in columns)] for k, name in enumerate(CLASSES)],
        )
        + "<p>Log-probabilities are logits, so a function of logits takes both. A second softmax is a mistake: without "
        "smoothing its loss never falls below 0.74 here.</p>",
        parts(found) + curve(found, int(controls.value["true class"]) - 1),
        arrows(found),
    )
    return


@app.cell(hide_code=True)
def _(controls):
    page.code(code(controls.value))
    return


if __name__ == "__main__":
    app.run()
