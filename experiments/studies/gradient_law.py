"""The gradient law: how the size of the gradient in the logits depends on the margin.

Class 0 is the truth and class 1 the rival; the margin is m = z_rival - z_truth, so m > 0 is wrong and m < 0 is right.
One class dominates: the rival for m > 0, the truth for m < 0. The K - 1 others are level with each other. The arms
are those of `experiments.arms`.

Numbers of softmax + squared error are for L = ||p - y||^2 / 2: the Brier score is 2 L, a mean over classes 2 L / K. The
lower logits of a linear output are 0. A sigmoid has no rival. So each class is wrong (or right) by m log-odds alone.
The classes other than truth and rival are right by |m|.

Let e^m >> K. The norm tends to sqrt 2 under softmax + cross-entropy, and to `sqrt(K^2 + K + 2) e^-m` under softmax +
squared error. The logarithm of the norm then changes by 0 and by -1 per nat. For K = 2 the truth's entry of the latter
is largest at m = ln 2, with 8/27. For uniform p the latter is 1 / K of the former.

The measurements are float32 derivatives through jprob on the device. The theory is NumPy float64 from the closed forms.

Sources: Solla, Levin and Fleisher (1988); Golik, Doetsch and Ney (2013); Hui and Belkin (2021).
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float, Float64

from experiments import arms, plots
from experiments.arms import LINEAR_SE, SIGMOID_CE, SIGMOID_SE, SOFTMAX_CE, SOFTMAX_SE
from experiments.config import distinct
from experiments.findings import DRAWS, GRADIENT, Hypothesis, Plot, Section, Table, Tier, decided
from experiments.results import Progress, Record, Setting

USUAL = "softmax + squared error, usual code"
SLOPES = {SOFTMAX_CE: (0.0, 0.01), SOFTMAX_SE: (-1.0, 0.02)}  # arm -> value claimed, half-width allowed
HALF_SPACING = 2.0**-24
PEAK_MARGINS = np.arange(0.0, 2.0, 1e-3)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Margins run from -margin_limit to margin_limit; beyond 43 the square of e^-m underflows float32."""

    num_classes: Annotated[
        list[Annotated[int, msgspec.Meta(ge=2, le=10_000)]], msgspec.Meta(min_length=1, max_length=4)
    ]
    margin_limit: Annotated[float, msgspec.Meta(ge=18.0, le=43.0)]
    margin_step: Annotated[float, msgspec.Meta(ge=0.01, le=0.5)]

    def __post_init__(self):
        distinct(self, "num_classes")


def logits(arm: str, margin: Float64[np.ndarray, " n"], num_classes: int) -> Float[np.ndarray, "n k"]:
    """Logits of float32 with the given margins, as the module describes them for each arm."""
    z = np.zeros((margin.size, num_classes))
    if arm in (SIGMOID_CE, SIGMOID_SE):
        z[:] = -np.abs(margin)[:, None]
        z[:, 0], z[:, 1] = -margin, margin
    else:
        z[:, 0], z[:, 1] = np.maximum(-margin, 0), np.maximum(margin, 0)
    return z.astype(np.float32)


def loss(arm: str, z: Float[Array, " k"]) -> Float[Array, ""]:
    """The arm's loss of one example of class 0. USUAL is squared error as it is usually written, left to autodiff."""
    if arm == USUAL:
        return jnp.sum((jax.nn.softmax(z) - (jnp.arange(z.size) == 0).astype(z.dtype)) ** 2) / 2
    return arms.loss(arm, z, jnp.zeros((), jnp.int32))


def measure(arm: str, margin: Float64[np.ndarray, " n"], num_classes: int) -> dict[str, np.ndarray]:
    """Float32 gradients on the device, and their norm on the host: squares of e^-m would underflow on the device."""
    gradient = jax.jit(jax.vmap(jax.grad(lambda z: loss(arm, z))))
    g = np.asarray(gradient(logits(arm, margin, num_classes)), np.float64)
    return {"margin": margin, "norm": np.linalg.norm(g, axis=1), "truth": g[:, 0], "rival": g[:, 1]}


def theory(arm: str, margin: Float64[np.ndarray, " n"], num_classes: int) -> dict[str, Float64[np.ndarray, " n"]]:
    """The closed form of `measure`: every entry sums terms of one sign (but for those near 0 of a linear output)."""
    m, others, e = np.asarray(margin, np.float64), num_classes - 2, np.exp(-np.abs(margin))
    top = 1 / (1 + (num_classes - 1) * e)
    t, r, o = np.where(m > 0, e * top, top), np.where(m > 0, top, e * top), e * top
    miss = r + others * o  # 1 - p_truth
    wrong, right, flat = (
        1 / (1 + np.exp(-m)),
        e / (1 + e),
        e / (1 + e) ** 2,
    )  # of sigmoids; flat = s (1 - s), of any class
    truth, rival, other = {
        SOFTMAX_CE: (-miss, r, o),
        # g_j = p_j sum_k p_k (e_j - e_k); g_truth = -2 p_truth L.
        SOFTMAX_SE: (
            -t * (miss**2 + r**2 + others * o**2),
            r * (t * (r + miss) + others * o * (r - o)),
            o * (t * (o + miss) + r * (o - r)),
        ),
        LINEAR_SE: (np.maximum(-m, 0) - 1, np.maximum(m, 0), 0 * m),
        SIGMOID_CE: (-wrong, wrong, right),
        SIGMOID_SE: (-wrong * flat, wrong * flat, right * flat),
    }[arm]
    return {"norm": np.sqrt(truth**2 + rival**2 + others * other**2), "truth": truth, "rival": rival}


def tier(config: Config, settings: Mapping[str, Setting], value: str) -> Tier | None:
    """Gradients, but for those that the usual code rounds away."""
    if value == "margin":
        return DRAWS
    return None if settings["arm"] == USUAL else GRADIENT


def run(config: Config) -> Iterator[Record | Progress]:
    """One record an arm and number of classes; then squared error as usually written, and its peak, for K = 2."""
    steps = math.floor(config.margin_limit / config.margin_step)
    # Rounded to float32 first, so that theory and measurement are given the same margins.
    margin = (np.arange(-steps, steps + 1) * config.margin_step).astype(np.float32).astype(np.float64)
    peak = PEAK_MARGINS.astype(np.float32).astype(np.float64)
    jobs = [("law", arm, k, margin) for k in config.num_classes for arm in arms.ALL]
    jobs += [("law", USUAL, 2, margin), ("peak", SOFTMAX_SE, 2, peak)]
    for done, (part, arm, k, m) in enumerate(jobs):
        yield Progress(done / len(jobs), f"{arm}, {k} classes")
        yield Record({"part": part, "arm": arm, "num_classes": k}, {**measure(arm, m, k)})


Curves = dict[tuple[str, str, int], dict[str, np.ndarray]]


def slope(margin: np.ndarray, norm: np.ndarray, low: float, high: float) -> float:
    """Least-squares derivative of log norm in m over low <= m <= high; minus infinity where a gradient is 0."""
    inside = (margin >= low) & (margin <= high)
    if not np.all(norm[inside] > 0):
        return -math.inf
    return float(np.polyfit(margin[inside], np.log(norm[inside]), 1)[0])


def _wrong_slope(curves: Curves, arm: str, k: int) -> float:
    curve = curves["law", arm, k]
    return slope(curve["margin"], curve["norm"], math.log(k) + 4, 15.0)


def slope_hypothesis(curves: Curves, config: Config, arm: str) -> Hypothesis:
    """The derivative of log norm of one arm, for every number of classes."""
    claimed, width = SLOPES[arm]
    slopes = {k: _wrong_slope(curves, arm, k) for k in config.num_classes}
    claim = {
        SOFTMAX_CE: "Confidently wrong, the gradient of softmax + cross-entropy keeps its size at every margin.",
        SOFTMAX_SE: "Confidently wrong by $m$, the gradient of softmax + squared error decays as $e^-m$.",
    }[arm]
    return Hypothesis(
        claim,
        "slope of log norm against $m$: " + ", ".join(f"{s:+.5f} ($K = {k}$)" for k, s in slopes.items()),
        f"a slope over $m$ in $[ln K + 4, 15]$ is more than {width} from ${claimed:g}$",
        decided(all(abs(s - claimed) <= width for s in slopes.values())),
        against_slope(curves, config, arm),
    )


def against_slope(curves: Curves, config: Config, arm: str) -> list[str]:
    """The limits of the claim on the derivative of log norm of an arm."""
    k = config.num_classes[0]
    linear = curves["law", LINEAR_SE, k]
    if arm == SOFTMAX_CE:
        right = slope(linear["margin"], curves["law", SOFTMAX_CE, k]["norm"], -15.0, -math.log(k) - 4)
        return [
            f"If the prediction is right, the gradient of cross-entropy vanishes as $e^(-|m|)$ (slope {right:+.3f}), "
            "as that of a loss near its least value must. The claim is about wrong predictions alone."
        ]
    at = int(np.argmin(np.abs(linear["margin"] - 15)))
    square, entropy = (_wrong_slope(curves, sigmoid, k) for sigmoid in (SIGMOID_SE, SIGMOID_CE))
    return [
        f"Squared error itself does not saturate: linear + squared error has a gradient of {linear['norm'][at]:.2f} at "
        "$m = 15$, which grows with the margin. The cause is the softmax in front of the square.",
        f"A sigmoid in front does the same: slope {square:+.3f} under sigmoid + squared error, {entropy:+.3f} under "
        "sigmoid + cross-entropy.",
    ]


def exactness_hypothesis(curves: Curves, config: Config) -> Hypothesis:
    """Measured against theory at every margin, within the library's bound of (16 + 3 R) u."""
    worst = dict.fromkeys(arms.ALL, 0.0)
    for arm, k in itertools.product(arms.ALL, config.num_classes):
        curve = curves["law", arm, k]
        want = theory(arm, curve["margin"], k)["norm"]
        off = np.abs(curve["norm"] - want) / np.where(want > 0, want, 1)
        worst[arm] = float(np.maximum(worst[arm], np.max(off)))  # keeps a NaN, as max() does not
    bound = (16 + 3 * config.margin_limit) * HALF_SPACING
    return Hypothesis(
        "The gradient that float32 delivers is the one that the formulas give, at every margin and for every arm.",
        "largest relative deviation of the norm: " + ", ".join(f"{off:.1e} ({arm})" for arm, off in worst.items()),
        f"a norm deviates by more than $(16 + 3 R) u$ = {bound:.1e}, with $R = {config.margin_limit:g}$ and "
        "$u = 2^-24$",
        decided(all(off <= bound for off in worst.values())),
        against_exactness(curves),
    )


def against_exactness(curves: Curves) -> list[str]:
    """The usual code does not deliver it."""
    usual = curves["law", USUAL, 2]
    want = theory(SOFTMAX_SE, usual["margin"], 2)["rival"]
    at17 = int(np.argmin(np.abs(usual["margin"] - 17)))
    last = float(np.max(usual["margin"][usual["rival"] > 0]))
    return [
        "This holds for jprob, not for the usual code of softmax + squared error. At "
        f"$m = {usual['margin'][at17]:g}$ its gradient of the rival is "
        f"{abs(usual['rival'][at17] / want[at17] - 1):.0%} off. Beyond $m = {last:g}$ it is 0, and the truth "
        f"{theory(SOFTMAX_SE, np.array([last]), 2)['rival'][0]:.1e}."
    ]


def uniform_hypothesis(curves: Curves, config: Config) -> Hypothesis:
    """A handicap of squared error that is there before any saturation."""
    off = {}
    for k in config.num_classes:
        a, b = (curves["law", arm, k] for arm in (SOFTMAX_CE, SOFTMAX_SE))
        start = int(np.argmin(np.abs(a["margin"])))
        off[k] = float((k * b["norm"][start] - a["norm"][start]) / max(a["norm"][start], HALF_SPACING))
    bound = 32 * HALF_SPACING  # each of the two within 16 u: no gap between logits, R = 0
    return Hypothesis(
        "At uniform $p$ the gradient of softmax + squared error is that of softmax + cross-entropy divided by $K$: a "
        "learning rate that both share handicaps squared error before any saturation.",
        "$K$ times the ratio of the norms, less 1: " + ", ".join(f"{d:+.1e} ($K = {k}$)" for k, d in off.items()),
        f"$K$ times the ratio of the norms is more than $32 u$ = {bound:.1e} from 1",
        decided(all(abs(d) <= bound for d in off.values())),
    )


def peak_hypothesis(curves: Curves) -> Hypothesis:
    """The largest entry for K = 2. A maximum is flat: u in the value blurs its place by about sqrt u = 2e-4."""
    curve = curves["peak", SOFTMAX_SE, 2]
    top = int(np.argmax(np.abs(curve["truth"])))
    height, place = abs(float(curve["truth"][top])) / (8 / 27) - 1, float(curve["margin"][top])
    return Hypothesis(
        "With two classes the gradient of softmax + squared error in the true logit is largest at "
        "$m = ln 2 = 0.69315$, with $8/27$. It falls with every further nat of margin.",
        f"largest $|g_truth|$ = $8/27$ times (1 {height:+.1e}), at $m = {place:.4f}$",
        "the height is more than 1e-5 off, relatively, or the place more than .003",
        decided(abs(height) <= 1e-5 and abs(place - math.log(2)) <= 3e-3),
    )


def law_figure(curves: Curves, config: Config) -> Plot:
    """Log norm against margin, one panel a number of classes."""
    columns = len(config.num_classes)
    figure, axes = plots.figure(columns=columns, height=3.7)
    looks = {arm: {"color": arms.COLOURS[arm], "lw": 2.6} for arm in arms.ALL}
    # These two coincide with others.
    looks[SOFTMAX_CE]["lw"], looks[SIGMOID_SE]["lw"] = 5.0, 4.0
    for axis, k in zip(axes, config.num_classes, strict=True):
        for arm in arms.ALL:
            curve = curves["law", arm, k]
            seen = curve["norm"] > 0
            m, want = curve["margin"][seen], theory(arm, curve["margin"], k)["norm"][seen]
            axis.plot(m, curve["norm"][seen], label=arm, zorder=1.5 + (looks[arm]["lw"] < 3), **looks[arm])
            axis.plot(m, want, **plots.THEORY, label="theory" if arm == arms.ALL[-1] else None)
        axis.axvspan(math.log(k) + 4, 15, color="0.93", zorder=0)
        axis.set(yscale="log", ylim=(1e-19, 1e3), title=f"$K = {k}$ classes", xlabel="margin $m$ (nats)")
    axes[0].set_ylabel("norm of the gradient in the logits")
    plots.legend(figure, *axes[0].get_legend_handles_labels())
    caption = (
        "Norm of the gradient in the logits against the margin $m = z_rival - z_truth$: the prediction is right on the "
        "left of 0 and wrong on its right. Colour: float32 through jprob. Dashed: closed forms. Slopes are fitted in "
        "the grey band. For $K > 2$ softmax + squared error is largest near $|m| = ln K$, where one class has about "
        "half of the probability."
    )
    return Plot(figure, caption)


def detail_figure(curves: Curves) -> Plot:
    """K = 2: the peak of squared error, and what is left of its tail in the usual implementation."""
    figure, (left, right) = plots.figure(columns=2, height=3.4)
    near, usual, fine = curves["peak", SOFTMAX_SE, 2], curves["law", USUAL, 2], np.linspace(-4, 10, 400)
    left.plot(near["margin"], np.abs(near["truth"]), color=arms.COLOURS[SOFTMAX_SE], lw=3.5, label="measured")
    left.plot(fine, np.abs(theory(SOFTMAX_SE, fine, 2)["truth"]), **plots.THEORY, label="$2 e^{-m} / (1 + e^{-m})^3$")
    left.annotate(
        r"$8/27$ at $m = \ln 2$", (math.log(2), 8 / 27), (3.2, 0.2), arrowprops={"arrowstyle": "-", "lw": 0.6}
    )
    left.set(xlabel="margin $m$ (nats)", ylabel=r"$|g_\mathrm{truth}|$", ylim=(0, 0.32))
    far = (usual["margin"] >= 8) & (usual["margin"] <= 24)
    m, shown = usual["margin"][far], np.where(usual["rival"] > 0, usual["rival"], np.nan)[far]
    right.plot(m, theory(SOFTMAX_SE, m, 2)["rival"], **plots.THEORY, label="theory")
    right.plot(m, shown, "o", ms=3, color=plots.PALETTE[5], label="usual code, float32")
    right.set(yscale="log", xlabel="margin $m$ (nats)", ylabel=r"$g_\mathrm{rival}$")
    for axis in (left, right):
        axis.legend(loc="upper right")
    caption = (
        "Softmax + squared error for $K = 2$. Left: the gradient in the true logit is largest at $m = ln 2$. Right: "
        "sum((softmax(z) - y)**2) / 2, left to autodiff, rounds the gradient of the rival to multiples of $2^-24$, "
        "and to 0 where the dots end."
    )
    return Plot(figure, caption)


def slope_table(curves: Curves, config: Config) -> Table:
    """Slopes of every arm on both sides, and the size of the tail of squared error."""
    rows = []
    for k in config.num_classes:
        for arm in arms.ALL:
            curve = curves["law", arm, k]
            left = slope(curve["margin"], curve["norm"], -15.0, -math.log(k) - 4)
            at = int(np.argmin(np.abs(curve["margin"] - 15)))
            tail = f"{curve['norm'][at] * math.exp(curve['margin'][at]):.3f}" if arm == SOFTMAX_SE else ""
            claim = f"{math.sqrt(k * k + k + 2):.3f}" if arm == SOFTMAX_SE else ""
            rows.append([str(k), arm, f"{left:+.4f}", f"{_wrong_slope(curves, arm, k):+.4f}", tail, claim])
    header = ["$K$", "arm", "slope, right side", "slope, wrong side", "$e^m$ norm, $m = 15$", "$sqrt(K^2 + K + 2)$"]
    return Table("Slope of log norm against $m$ over $ln K + 4 <= |m| <= 15$.", header, rows)


def abstract(curves: Curves, config: Config) -> list[str]:
    """The derivatives of log norm, next to those of the theory."""
    square, entropy = ([_wrong_slope(curves, arm, k) for k in config.num_classes] for arm in (SOFTMAX_SE, SOFTMAX_CE))
    return [
        "If a prediction is confidently wrong by a margin $m$ in the logits, the gradient of softmax + squared error "
        "falls as $e^-m$ and that of softmax + cross-entropy does not: the log of its norm has slope "
        f"{min(square):.3f} to {max(square):.3f} in $m$ under the first (theory: -1) and {min(entropy):+.4f} to "
        f"{max(entropy):+.4f} under the second (theory: 0)."
    ]


def report(config: Config, records: Sequence[Record]) -> Section:
    """The law for every arm, with its figure, rates and exceptions."""
    curves: Curves = {
        (str(r.settings["part"]), str(r.settings["arm"]), int(r.settings["num_classes"])): {
            name: np.asarray(value) for name, value in r.values.items()
        }
        for r in records
    }
    text = (
        "A classifier has $K$ logits $z$, one a class. The true class is the truth, the likeliest other one the rival, "
        "and the margin $m = z_rival - z_truth$ tells by how many nats the prediction is wrong. $p$ is the softmax of "
        "the logits and $y$ is 1 for the truth and 0 otherwise.\n\n"
        "An arm is an output with a loss. Softmax + cross-entropy is the usual classifier. Softmax + squared error has "
        "the loss $L = ||p - y||^2 / 2$, linear + squared error $||z - y||^2 / 2$. The two arms with a sigmoid treat "
        "each class as a question of yes or no.\n\n"
        "A loss teaches through its gradient $g$ in the logits. Under softmax + cross-entropy $g = p - y$, whose norm "
        "stays near $sqrt(2)$ for every wrong prediction. Squared error multiplies by the derivative of the softmax, "
        "which shrinks with the probability of the truth: $g_truth = -2 p_truth L$ exactly.\n\n"
        "The Brier score is $2 L$: its gradients are twice those here. A mean over classes multiplies by $2 / K$."
    )
    hypotheses = [
        slope_hypothesis(curves, config, SOFTMAX_SE),
        slope_hypothesis(curves, config, SOFTMAX_CE),
        exactness_hypothesis(curves, config),
        uniform_hypothesis(curves, config),
        peak_hypothesis(curves),
    ]
    figures = [law_figure(curves, config), detail_figure(curves)]
    return Section(
        "Gradient against margin", abstract(curves, config), text, figures, hypotheses, [slope_table(curves, config)]
    )
