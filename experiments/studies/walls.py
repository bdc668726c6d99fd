"""Floating-point walls: the margins from which a computed gradient is exactly 0, though the true one is not.

The margin m is the distance of the leading logit from all others, which are level. It comes in two places:

    right side    the true class leads; softmax + cross-entropy, gradient of the true class -(K - 1) e^-m
    wrong side    a wrong class leads; softmax + squared error, gradient of that class K e^-m

Squared error is half the Brier score, ||p - y||^2 / 2. Both forms are for large m, K is the number of classes.

The usual code computes in the dtype of the logits, with p bits of significand. It is optax's cross-entropy and the
square of `jax.nn.softmax`, both left to autodiff. A sum 1 + d rounds to 1 if d <= 2^-p. A difference 1 - d does so if
d <= 2^-(p + 1). The normaliser 1 + (K - 1) e^-m gives the wall of cross-entropy. Squared error has one more, that of
the mean error 1 - e^-m, and the later of the two counts:

    cross-entropy     m = p ln 2 + ln(K - 1)
    squared error     m = p ln 2 + max(ln 2, ln(K - 1))

The normaliser is taken as added up in the best order, the smallest terms first. Terms that are added to 1 one at a
time are lost from m = p ln 2 on. So the order of a device may put the wall anywhere between the two.

jprob's code has no such sum. It computes in float32 at least, and rounds the gradient to the dtype of the logits. So
bfloat16 and float16 logits have no wall from their few bits. Its gradient c e^-m, c = K - 1 or K, ends by underflow:

    m = min(U + ln c, V), U of the dtype of the logits, V of the dtype computed in

A device that flushes subnormal numbers to 0 has U = -e ln 2, 2^e the smallest normal number. One that keeps them has
U = (p - e) ln 2, since half of the smallest subnormal number rounds to 0. The device at hand is probed for each dtype.

Source: Blanchard, Higham and Higham (2021), Accurately computing the log-sum-exp and softmax functions, IMA J. Numer.
Anal. 41(4).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments import plots
from experiments.arms import SOFTMAX_CE, SOFTMAX_SE
from experiments.config import distinct
from experiments.findings import Hypothesis, Plot, Section, Table, decided
from experiments.results import Progress, Record
from jprob import categorical

TOLERANCE = 0.25
USUAL, JPROB = CODES = ("usual code", "jprob")
SIDES = {SOFTMAX_CE: "right side, true class", SOFTMAX_SE: "wrong side, wrong class"}
DTYPES = ("float64", "float32", "bfloat16", "float16")
COLOURS = dict(zip(DTYPES, (plots.PALETTE[5], *plots.PALETTE[:3]), strict=True))
WIDTHS = dict(zip(DTYPES, (7.0, 5.0, 3.2, 1.6), strict=True))  # all curves lie on one line until they end


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Margins run from margin_step to margin_limit, rounded to each dtype."""

    dtypes: Annotated[
        list[Literal["float64", "float32", "bfloat16", "float16"]], msgspec.Meta(min_length=1, max_length=4)
    ]
    num_classes: Annotated[
        list[Annotated[int, msgspec.Meta(ge=2, le=10_000)]], msgspec.Meta(min_length=1, max_length=4)
    ]
    margin_step: Annotated[float, msgspec.Meta(ge=0.001, le=0.25)]
    margin_limit: Annotated[float, msgspec.Meta(ge=20.0, le=1000.0)]

    def __post_init__(self):
        distinct(self, "dtypes", "num_classes")


def wider(dtype: str) -> str:
    """The dtype that jprob computes in."""
    return "float64" if dtype == "float64" else "float32"


def keeps_subnormals(dtype: str) -> bool:
    """Whether the device keeps a number below the smallest normal one of a dtype, computed as jprob computes it."""
    with jax.enable_x64(True):
        product = jax.jit(lambda x, y: (x * y).astype(dtype))
        below = np.asarray(float(jnp.finfo(dtype).tiny) / 4, wider(dtype))
        return float(product(below, np.ones_like(below))) > 0


def underflow(dtype: str, kept: bool) -> float:
    """U: the margin from which e^-m rounds to 0."""
    bits = jnp.finfo(dtype).nmant + 1
    return float((kept * bits - jnp.finfo(dtype).minexp) * math.log(2))


def wall(arm: str, code: str, dtype: str, num_classes: int, kept: bool, kept_wider: bool) -> float:
    """The formula of the module for the last margin with a gradient."""
    bits = jnp.finfo(dtype).nmant + 1
    if code == JPROB:
        factor = num_classes - (arm == SOFTMAX_CE)
        return min(underflow(dtype, kept) + math.log(factor), underflow(wider(dtype), kept_wider))
    tail = max(num_classes - 1, 1 if arm == SOFTMAX_CE else 2)
    return bits * math.log(2) + math.log(tail)


def loss(arm: str, code: str, z: Float[Array, " k"]) -> Float[Array, ""]:
    """The loss of one example, whose true class is 0 on the right side and 1 on the wrong side."""
    label = jnp.asarray(int(arm == SOFTMAX_SE), jnp.int32)
    y = (jnp.arange(z.size) == label).astype(z.dtype)
    losses: dict[tuple[str, bool], Callable[[], Array]] = {
        (SOFTMAX_CE, False): lambda: optax.losses.softmax_cross_entropy_with_integer_labels(z, label),
        (SOFTMAX_CE, True): lambda: categorical.cross_entropy(z, label),
        (SOFTMAX_SE, False): lambda: jnp.sum((jax.nn.softmax(z) - y) ** 2) / 2,
        (SOFTMAX_SE, True): lambda: categorical.brier_score(z, label) / 2,
    }
    return losses[arm, code == JPROB]()


def measure(arm: str, code: str, dtype: str, num_classes: int, config: Config) -> dict[str, np.ndarray]:
    """Gradient of the leading class 0 on the grid of a dtype, and the sum of the gradient over classes."""
    steps = math.floor(config.margin_limit / config.margin_step)
    margin = np.unique((np.arange(1, steps + 1) * config.margin_step).astype(jnp.dtype(dtype)))
    z = np.zeros((margin.size, num_classes), margin.dtype)
    z[:, 0] = margin
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        gradient = np.asarray(jax.jit(jax.vmap(jax.grad(lambda z: loss(arm, code, z))))(jnp.asarray(z)), np.float64)
    return {"margin": margin.astype(np.float64), "leading": gradient[:, 0], "sum": gradient.sum(axis=1)}


def run(config: Config) -> Iterator[Record | Progress]:
    """One record for each arm, code, dtype and number of classes, with the probes of the device."""
    jobs = list(itertools.product(SIDES, CODES, config.dtypes, config.num_classes))
    kept = {dtype: keeps_subnormals(dtype) for dtype in DTYPES}
    for done, (arm, code, dtype, k) in enumerate(jobs):
        yield Progress(done / len(jobs), f"{arm}, {code}, {dtype}, {k} classes")
        probes = {"keeps_subnormals": int(kept[dtype]), "wider_keeps_subnormals": int(kept[wider(dtype)])}
        settings = {"arm": arm, "code": code, "dtype": dtype, "num_classes": k}
        yield Record(settings, {**measure(arm, code, dtype, k, config), **probes})


class Wall(NamedTuple):
    """The last margin with a gradient, the next of the grid, the first without one, and the formula."""

    last: float
    next: float
    first_zero: float
    formula: float

    @property
    def off(self) -> float:
        """Distance of the formula from the gap of the grid that holds the wall."""
        return max(self.last - self.formula, self.formula - self.next, 0.0)


def find_wall(margin: np.ndarray, gradient: np.ndarray, formula: float) -> Wall:
    """A NaN counts as no gradient. Beyond the grid the wall may lie anywhere."""
    alive = np.abs(gradient) > 0
    last = int(np.flatnonzero(alive)[-1]) if alive.any() else -1
    first_zero = float(margin[~alive][0]) if not alive.all() else math.inf
    beyond = float(margin[last + 1]) if last + 1 < margin.size else math.inf
    return Wall(float(margin[last]) if last >= 0 else 0.0, beyond, first_zero, formula)


Walls = dict[tuple[str, str, str, int], Wall]  # by arm, code, dtype and number of classes


def deviations(walls: Walls, arms: Sequence[str], code: str, num_classes: int) -> dict[str, float]:
    """Distance from the formula by dtype: the larger one of the arms."""
    found: dict[str, float] = {}
    for (arm, of, dtype, k), wall in walls.items():
        if (of, k) == (code, num_classes) and arm in arms:
            found[dtype] = max(found.get(dtype, 0.0), wall.off)
    return found


def wall_hypothesis(
    config: Config, walls: Walls, claim: str, arms: Sequence[str], code: str, against: list[str]
) -> Hypothesis:
    """Every wall of some arms and of one code lies where the formula says."""
    each = {k: deviations(walls, arms, code, k) for k in config.num_classes}
    told = "; ".join(f"$K = {k}$: " + ", ".join(f"{d} {off:.2f}" for d, off in row.items()) for k, row in each.items())
    worst = max(max(row.values()) for row in each.values())
    return Hypothesis(
        claim,
        f"distance between formula and wall in nats, by dtype: {told}",
        f"a formula is more than {TOLERANCE:g} from the gap of the grid that holds the wall",
        decided(worst <= TOLERANCE),
        against,
    )


def against_entropy(config: Config, walls: Walls, curves: dict[tuple, dict[str, np.ndarray]]) -> list[str]:
    """The order of the sum, and what the wall costs."""
    said = []
    many, dtype = max(config.num_classes), config.dtypes[0]
    for each in config.dtypes:
        wall = walls[SOFTMAX_CE, USUAL, each, many]
        if wall.off > TOLERANCE:
            low = wall.formula - math.log(many - 1)
            said.append(
                f"The order of the sum counts: the wall of {each} with {many} classes lies at {wall.last:.2f}, between "
                f"{low:.2f} (terms added to 1 one at a time) and {wall.formula:.2f} (added up before)."
            )
    curve, wall = curves[SOFTMAX_CE, USUAL, dtype, many], walls[SOFTMAX_CE, USUAL, dtype, many]
    at = int(np.searchsorted(curve["margin"], wall.next))
    if at < curve["margin"].size:
        said.append(
            f"The wall is at a small gradient, and only the true class is lost. At $m = {wall.next:.2f}$ the gradient "
            f"of {dtype} sums to {curve['sum'][at]:.1e} over the classes, where the exact one sums to 0."
        )
    return said


def against_squared(config: Config, walls: Walls) -> list[str]:
    """The formula of two classes is too early for more."""
    bits = {dtype: jnp.finfo(dtype).nmant + 1 for dtype in config.dtypes}
    many = max(config.num_classes)
    off = {
        dtype: walls[SOFTMAX_SE, USUAL, dtype, many]._replace(formula=(p + 1) * math.log(2)).off
        for dtype, p in bits.items()
    }
    said = [
        f"The normaliser belongs to the formula. Without it, $(p + 1) ln 2$ is up to {max(off.values()):.2f} off for "
        f"{many} classes."
    ] * (max(off.values()) > TOLERANCE)
    worst = max(config.dtypes, key=lambda dtype: walls[SOFTMAX_SE, USUAL, dtype, many].off)
    wall = walls[SOFTMAX_SE, USUAL, worst, many]
    if wall.off > TOLERANCE:
        said.append(f"The order of the sum counts here as well: {worst}, {many} classes, {wall.last:.2f}.")
    return said


def against_exact(config: Config, walls: Walls, flushed: dict[str, bool]) -> list[str]:
    """The walls that jprob has."""
    few = min(config.num_classes)
    ends = {dtype: walls[SOFTMAX_CE, JPROB, dtype, few] for dtype in config.dtypes}
    said = [
        f"jprob has walls too, by underflow. Its last margins under cross-entropy with {few} classes: "
        + ", ".join(f"{d} {w.last:.2f}" if w.next < math.inf else f"{d} beyond the grid" for d, w in ends.items())
        + "."
    ]
    if "bfloat16" in ends:
        said.append("The wall of bfloat16 is that of float32, which jprob computes in: both have the same exponents.")
    if "float16" in ends:
        said.append("The wall of float16 comes from the exponents of the gradient alone; a scaled loss moves it.")
    names = [dtype for dtype, flush in flushed.items() if flush]
    said.append(f"This device flushes the subnormal numbers of {', '.join(names)} to 0." if names else
                "This device keeps subnormal numbers.")  # fmt: skip
    return said


def figure(config: Config, curves: dict[tuple, dict[str, np.ndarray]], walls: Walls) -> Plot:
    """Size of the gradient against the margin for the least number of classes, by code and arm."""
    made, axes = plots.figure(columns=2, rows=2, height=6.4)
    k = min(config.num_classes)
    for axis, (arm, code) in zip(axes, itertools.product(SIDES, CODES), strict=True):
        for dtype in sorted(config.dtypes, key=DTYPES.index):
            curve, wall = curves[arm, code, dtype, k], walls[arm, code, dtype, k]
            seen = np.abs(curve["leading"]) > 0
            m, size = curve["margin"][seen], np.abs(curve["leading"][seen])
            axis.plot(m, size, color=COLOURS[dtype], lw=WIDTHS[dtype], label=dtype, solid_capstyle="butt")
            if wall.formula <= config.margin_limit:
                axis.axvline(wall.formula, color=COLOURS[dtype], ls=":", lw=1.3, zorder=1)
        line = np.linspace(1, config.margin_limit, 200)
        theory = np.exp(-line) * (k - (arm == SOFTMAX_CE))
        axis.plot(line, theory, **plots.THEORY, label="theory")
        axis.set(yscale="log", ylim=(1e-45, 10), title=f"{arm}, {code}", xlabel=f"margin (nats), {SIDES[arm]}")
    for axis in axes[::2]:
        axis.set_ylabel("size of the gradient")
    plots.legend(made, *axes[0].get_legend_handles_labels())
    caption = (
        f"Gradient of the leading class against its margin, with {k} classes. A curve ends at its last margin with a "
        "gradient that is not 0. Dotted: the formula of that wall. Dashed: the gradient in exact arithmetic, for large "
        "margins."
    )
    return Plot(made, caption)


def table(walls: Walls) -> Table:
    """Every wall next to its formula."""
    rows = []
    for (arm, code, dtype, k), wall in walls.items():
        ends = [f"{x:.2f}" if x < math.inf else "none" for x in (wall.last, wall.next, wall.first_zero)]
        rows.append([f"{arm}, {SIDES[arm]}", code, dtype, f"{k}", f"{wall.formula:.2f}", *ends, f"{wall.off:.2f}"])
    header = ["gradient", "code", "dtype", "classes", "formula", "last", "next", "first 0", "distance"]
    caption = (
        "Walls in nats of margin: the last margin of the grid with a gradient, the next one, and the first without. "
        "The distance is that of the formula from the gap between last and next."
    )
    return Table(caption, header, rows)


def report(config: Config, records: Sequence[Record]) -> Section:
    """The walls of the usual code, and those of jprob."""
    curves: dict[tuple, dict[str, np.ndarray]] = {}
    walls: Walls = {}
    flushed: dict[str, bool] = {}
    for settings, values in records:
        arm, code, dtype = (str(settings[name]) for name in ("arm", "code", "dtype"))
        key = arm, code, dtype, int(settings["num_classes"])
        kept, kept_wider = (bool(values[name]) for name in ("keeps_subnormals", "wider_keeps_subnormals"))
        curves[key] = {name: np.asarray(values[name]) for name in ("margin", "leading", "sum")}
        walls[key] = find_wall(curves[key]["margin"], curves[key]["leading"], wall(*key, kept, kept_wider))
        flushed[dtype] = not kept
    text = (
        "The margin $m$ is the lead of one logit over all others. If the leading class is the true one, the gradient "
        "of cross-entropy falls as $e^-m$. If the leading class is wrong, that of softmax + squared error does. "
        "Neither is ever 0, but a computed gradient is from some margin on. That margin is called a wall here.\n\n"
        "The usual code forms $1 + e^-m$ or $1 - e^-m$, so its walls follow from the bits of the significand. jprob "
        "leaves the 1 out and computes in float32 at least, so its walls follow from the exponents."
    )
    few = min(config.num_classes)

    def last(code):
        ends = {dtype: walls[SOFTMAX_CE, code, dtype, few] for dtype in config.dtypes}
        return ", ".join(
            f"{d} {w.last:.1f}" if w.next < math.inf else f"{d} beyond {w.last:.0f}" for d, w in ends.items()
        )

    abstract = [
        "If the prediction is right, the usual cross-entropy loses the gradient of the true class at a margin of "
        f"{last(USUAL)}; jprob's lasts to {last(JPROB)} ({few} classes)."
    ]
    hypotheses = [
        wall_hypothesis(
            config, walls,
            "On the right side, the usual cross-entropy has no gradient of the true class beyond $p ln 2 + ln(K - 1)$, "
            "with $p$ the bits of the significand.",
            [SOFTMAX_CE], USUAL, against_entropy(config, walls, curves),
        ),
        wall_hypothesis(
            config, walls,
            "On the wrong side, softmax + squared error in the usual code has no gradient of the wrong class beyond "
            "$p ln 2 + max(ln 2, ln(K - 1))$.",
            [SOFTMAX_SE], USUAL, against_squared(config, walls),
        ),
        wall_hypothesis(
            config, walls,
            "The gradient of jprob is not 0 before it underflows, under either loss.",
            list(SIDES), JPROB, against_exact(config, walls, flushed),
        ),
    ]  # fmt: skip
    return Section("Floating-point walls", abstract, text, [figure(config, curves, walls)], hypotheses, [table(walls)])
