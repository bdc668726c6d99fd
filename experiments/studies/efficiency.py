"""Efficiency: the information that squared error of a probability loses, and the robustness that it buys.

Labels follow a logistic regression: the probability of y = 1 is the sigmoid of b x, and x is standard normal.
Intercept and coefficient b are fitted by cross-entropy, which is maximum likelihood, and by squared error of the
probability. Both are consistent. The efficiency of squared error compares the variances of the fitted coefficient:
that under maximum likelihood divided by that under squared error.

A share c of the labels is then flipped. The weight of an example in the gradient is p - y under cross-entropy. The
factor p (1 - p) of squared error bounds the influence of a confidently wrong label.

The theory holds for many examples n. Each fit solves sum_i psi_i = 0. The fit tends to the root of E[psi], with
variance E[psi^2] / (n E[psi']^2): the sandwich. By symmetry the intercept is 0 and does not enter. The share of y = 1
at x is r, and p is the sigmoid of b x:

    cross-entropy   psi = (p - y) x              E[psi'] = E[p (1 - p) x^2]
    squared error   psi = (p - y) p (1 - p) x    E[psi'] = E[((p (1 - p))^2 + (p - r) p (1 - p) (1 - 2 p)) x^2]

Sources: Huber (1967), Proc. Fifth Berkeley Symposium 1; White (1982), Econometrica 50(1); Gneiting and Raftery (2007).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, NamedTuple, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float, Float64
from scipy.optimize import brentq
from scipy.special import expit

from experiments import arms, plots, stats
from experiments.config import distinct, split
from experiments.findings import COEFFICIENTS, Hypothesis, Plot, Section, Table, Tier, decided
from experiments.results import Progress, Record, Setting
from jprob import bernoulli, mle

TOLERANCE = 0.05
SEED = 30_000
LOSSES = {"cross-entropy": bernoulli.cross_entropy, "squared error": bernoulli.brier_score}
COLOURS = dict(zip(LOSSES, (arms.COLOURS[arm] for arm in (arms.SOFTMAX_CE, arms.SOFTMAX_SE)), strict=True))
GRID = np.linspace(-9, 9, 20_001)  # of x; what lies beyond weighs 1e-18
DENSITY = np.exp(-(GRID**2) / 2) / np.exp(-(GRID**2) / 2).sum()

Coefficient = Annotated[float, msgspec.Meta(gt=0, le=20)]
Count = Annotated[int, msgspec.Meta(ge=20, le=100_000)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every coefficient is fitted from every number of examples, with clean labels and with a share of them flipped."""

    coefficients: Annotated[list[Coefficient], msgspec.Meta(min_length=2, max_length=12)]
    num_examples: Annotated[list[Count], msgspec.Meta(min_length=1, max_length=6)]
    flipped: Annotated[float, msgspec.Meta(gt=0, le=0.3)]
    replications: Annotated[int, msgspec.Meta(ge=10, le=100_000)]

    def __post_init__(self):
        distinct(self, "coefficients", "num_examples")


class Limit(NamedTuple):
    """The number that a fitted coefficient tends to, and n times its variance there."""

    coefficient: float
    variance: float

    def error(self, coefficient: float, num_examples: int) -> float:
        """Root mean square error."""
        return float(np.hypot(self.coefficient - coefficient, np.sqrt(self.variance / num_examples)))


def limit(loss: str, coefficient: float, flipped: float) -> Limit:
    """The root of E[psi] and the sandwich, by sums over a grid of x."""
    r = flipped + (1 - 2 * flipped) * expit(coefficient * GRID)

    def factor(b):
        p = expit(b * GRID)
        return p, (np.ones_like(p) if loss == "cross-entropy" else p * expit(-b * GRID))

    def mean_psi(b):
        p, weight = factor(b)
        return np.sum(DENSITY * (p - r) * weight * GRID)

    root = float(cast(float, brentq(mean_psi, coefficient / 20, 2 * coefficient, xtol=1e-12)))
    p, weight = factor(root)
    spread = p * (1 - p)
    change = spread if loss == "cross-entropy" else spread**2 + (p - r) * spread * (1 - 2 * p)
    squared = np.sum(DENSITY * (p * p - 2 * p * r + r) * (weight * GRID) ** 2)
    return Limit(root, float(squared / np.sum(DENSITY * change * GRID**2) ** 2))


@partial(jax.jit, static_argnames=("loss",))
def fit(
    loss: str, x: Float[Array, "r n"], y: Float[Array, "r n"], coefficient: Float[Array, ""]
) -> tuple[Array, Array]:
    """The fitted coefficient of every replication, and whether the fit converged. The descent starts at the truth."""

    def nll(params, batch, key):
        return LOSSES[loss](params[0] + params[1] * batch[0], batch[1])

    start = jnp.stack([jnp.zeros_like(coefficient), coefficient])
    # At the tolerance the coefficient is far within its standard error.
    descend = partial(mle.fit_full_batch, nll, start, gradient_tolerance=1e-6, max_steps=100)
    result = jax.vmap(lambda *data: descend(data))(x, y)
    return result.params[:, 1], result.converged


def tier(config: Config, settings: Mapping[str, Setting], value: str) -> Tier | None:
    """Fitted coefficients, to what the tolerance of the descent leaves."""
    return COEFFICIENTS


def parts(config: Config) -> list[Config]:
    """Every coefficient is a part."""
    return split(config, "coefficients")


def run(config: Config) -> Iterator[Record | Progress]:
    """One record for each coefficient, number of examples and share of flipped labels: all fitted coefficients."""
    cells = [(s, n, c) for s in config.coefficients for n in config.num_examples for c in (0.0, config.flipped)]
    for done, (coefficient, n, flipped) in enumerate(cells):
        yield Progress(done / len(cells), f"coefficient {coefficient:g}, {n} examples, {flipped:.0%} flipped")
        # The draws of a coefficient and a number of examples are the same for both shares, and for both losses.
        rng = np.random.default_rng([SEED, round(1000 * coefficient), n])
        x, u, v = rng.normal(size=(config.replications, n)), *rng.uniform(size=(2, config.replications, n))
        y = (u < expit(coefficient * x)) ^ (v < flipped)
        data = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
        values = {}
        for loss in LOSSES:
            fitted, converged = fit(loss, *data, jnp.float32(coefficient))
            values |= {loss: np.asarray(fitted, np.float64), f"{loss}, converged": float(jnp.mean(converged))}
        yield Record({"coefficient": coefficient, "examples": n, "flipped": flipped}, values)


Fits = dict[
    tuple[float, int, float], dict[str, Float64[np.ndarray, " r"]]
]  # (coefficient, examples, flipped) -> by loss


def efficiency(fits: dict[str, np.ndarray]) -> float:
    """Variance under maximum likelihood over variance under squared error."""
    return float(np.var(fits["cross-entropy"], ddof=1) / np.var(fits["squared error"], ddof=1))


def theory(coefficient: float) -> float:
    """The efficiency for many examples."""
    ce, se = (limit(loss, coefficient, 0.0).variance for loss in LOSSES)
    return ce / se


def error(fitted: np.ndarray, coefficient: float) -> float:
    """Root mean square error of a fitted coefficient."""
    return float(np.sqrt(np.mean((fitted - coefficient) ** 2)))


def efficiency_hypothesis(config: Config, fits: Fits) -> Hypothesis:
    """The sandwich tells what squared error loses."""
    most = max(config.num_examples)
    each = {
        coefficient: (efficiency(fits[coefficient, most, 0.0]), theory(coefficient))
        for coefficient in config.coefficients
    }
    worst = max(abs(got - want) for got, want in each.values())
    told = "; ".join(
        f"coefficient {coefficient:g}: {got:.2f} (theory {want:.2f})" for coefficient, (got, want) in each.items()
    )
    few = min(config.num_examples)
    against = [
        f"The efficiency for {few} examples is {efficiency(fits[coefficient, few, 0.0]):.2f} at coefficient "
        f"{coefficient:g}. The theory is for many."
        for coefficient in (min(config.coefficients), max(config.coefficients))
        if few != most
    ]
    return Hypothesis(
        "Squared error of a probability is consistent but inefficient: the variance of its coefficient exceeds that of "
        "maximum likelihood by the factor of the sandwich formula.",
        f"efficiency with {most} examples: {told}",
        f"an efficiency is more than {TOLERANCE:g} from the formula",
        decided(worst <= TOLERANCE),
        against,
    )


def robust_hypothesis(config: Config, fits: Fits) -> Hypothesis:
    """Flipped labels turn the order round."""
    coefficient, n = max(config.coefficients), max(config.num_examples)
    fitted = fits[coefficient, n, config.flipped]
    gains = (fitted["cross-entropy"] - coefficient) ** 2 - (fitted["squared error"] - coefficient) ** 2
    low, high = stats.bca_interval(gains)
    ce, se = (error(fitted[loss], coefficient) for loss in LOSSES)
    clean = [error(fits[coefficient, n, 0.0][loss], coefficient) for loss in LOSSES]
    biases = [limit(loss, coefficient, config.flipped).coefficient for loss in LOSSES]
    return Hypothesis(
        f"Flipped labels turn the order round: with {config.flipped:.0%} of them, the error of a coefficient of "
        f"{coefficient:g} is smaller under squared error.",
        f"root mean square error with {n} examples: {ce:.2f} (cross-entropy), {se:.2f} (squared error); difference of "
        f"the squares {gains.mean():.2f} [{low:.2f}, {high:.2f}]",
        "the 95 % interval of the difference of the squares holds 0, or lies below it",
        decided(low > 0),
        [
            f"Clean labels have the other order: {clean[0]:.2f} (cross-entropy) and {clean[1]:.2f} (squared error).",
            f"Neither loss is right about flipped labels. For many examples the coefficients tend to {biases[0]:.2f} "
            f"(cross-entropy) and {biases[1]:.2f} (squared error), not to {coefficient:g}.",
        ],
    )


def figure(config: Config, fits: Fits) -> Plot:
    """Efficiency, and the error with flipped labels, against the coefficient."""
    made, axes = plots.figure(columns=2, height=3.4)
    line = np.linspace(min(config.coefficients), max(config.coefficients), 60)
    for n, marker in zip(config.num_examples, "osD^vP", strict=False):
        values = [efficiency(fits[coefficient, n, 0.0]) for coefficient in config.coefficients]
        axes[0].plot(config.coefficients, values, marker, color=plots.PALETTE[2], label=f"{n} examples")
    axes[0].plot(line, [theory(coefficient) for coefficient in line], **plots.THEORY, label="theory")
    axes[0].set(xlabel="coefficient", ylabel="efficiency of squared error", title="clean labels", ylim=(0, 1.1))
    axes[0].legend()
    n = max(config.num_examples)
    for loss, colour in COLOURS.items():
        values = [error(fits[coefficient, n, config.flipped][loss], coefficient) for coefficient in config.coefficients]
        axes[1].plot(config.coefficients, values, "o", color=colour, label=loss)
        axes[1].plot(line, [limit(loss, s, config.flipped).error(s, n) for s in line], **plots.THEORY)
    axes[1].set(xlabel="coefficient", ylabel="root mean square error", title=f"{config.flipped:.0%} of labels flipped")
    axes[1].legend()
    return Plot(
        made,
        "Left: variance of the fitted coefficient under cross-entropy over that under squared error. Right: error of "
        f"the fitted coefficient with {n} examples. Dashed: the theory for many examples.",
    )


def table(config: Config, fits: Fits) -> Table:
    """Bias and error of every cell."""
    rows = []
    for (coefficient, n, flipped), each in fits.items():
        for loss in LOSSES:
            want = limit(loss, coefficient, flipped)
            numbers = each[loss].mean(), want.coefficient, error(each[loss], coefficient), want.error(coefficient, n)
            rows.append([f"{coefficient:g}", f"{n}", f"{flipped:.0%}", loss, *(f"{number:.3f}" for number in numbers)])
    header = ["coefficient", "examples", "flipped", "loss", "mean", "theory", "error", "theory"]
    return Table("Mean and root mean square error of the fitted coefficients, next to the theory.", header, rows)


def report(config: Config, records: Sequence[Record]) -> Section:
    """The loss of squared error on clean labels, and its gain on flipped ones."""
    fits: Fits = {}
    for settings, values in records:
        key = float(settings["coefficient"]), int(settings["examples"]), float(settings["flipped"])
        fits[key] = {loss: np.asarray(values[loss]) for loss in LOSSES}
    text = (
        "A logistic regression has labels of probability $1 / (1 + e^(-b x))$, with coefficient $b$ and $x$ standard "
        "normal. Cross-entropy is its maximum likelihood. Squared error of the probability is a proper score too, so "
        "both find the true coefficient from enough examples.\n\n"
        "Efficiency is the variance of the fitted coefficient under maximum likelihood, divided by that under squared "
        "error. An efficiency of one half means that squared error needs twice the examples."
    )
    coefficient, n = max(config.coefficients), max(config.num_examples)
    abstract = [
        f"Squared error of a probability needs {1 / efficiency(fits[coefficient, n, 0.0]):.1f} times the examples of "
        f"cross-entropy for a coefficient of {coefficient:g}, and resists flipped labels better."
    ]
    hypotheses = [efficiency_hypothesis(config, fits), robust_hypothesis(config, fits)]
    if hypotheses[1].verdict != "holds":
        abstract = [abstract[0].split(", and")[0] + "."]
    return Section("Efficiency", abstract, text, [figure(config, fits)], hypotheses, [table(config, fits)])
