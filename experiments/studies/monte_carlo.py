"""Monte Carlo: the error of a mean of n draws, and how often its 95 % interval holds the truth.

x is standard normal, and f(x) has the standard deviation sd. The root mean square error of the mean is sd / sqrt(n)
for every n. Three quantities have known values, with excess kurtosis k and p = P(x > 3):

    x^2        mean 1            sd sqrt(2)            k = 12
    exp(x)     mean sqrt(e)      sd sqrt(e (e - 1))    k = e^4 + 2 e^3 + 3 e^2 - 6
    x > 3      mean p            sd sqrt(p (1 - p))    k = (1 - 6 p (1 - p)) / (p (1 - p))

The interval is the mean +- 1.96 standard errors, and the standard error is estimated from the same draws. Its coverage
tends to 95 % with n. The number of draws above 3 is binomial, so the coverage of p is a sum over its values:

    coverage = sum of C(n, j) p^j (1 - p)^(n - j) over all j with |m - p| <= 1.96 sqrt(m (1 - m) / (n - 1)), m = j / n

No draw above 3 gives the interval [0, 0], which never holds p. A root mean square of r replications has the
relative error sqrt((2 + k / n) / r) / 2.

Source: Owen (2013), Monte Carlo theory, methods and examples, 2; Brown, Cai and DasGupta (2001), Statistical Science
16(2), on the interval of a proportion.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Key
from scipy import stats as distributions

from experiments import plots
from experiments.config import distinct
from experiments.findings import Hypothesis, Plot, Section, Table, decided
from experiments.results import Progress, Record
from jprob import expectation, gaussian

LEVEL, QUANTILE = 0.95, 1.96
EXPONENT_TOLERANCE = 0.02
STANDARD_ERRORS = 4.0
SEED = 33_000
TOGETHER = 2**17  # draws in memory
THRESHOLD = 3.0

Samples = Annotated[int, msgspec.Meta(ge=2, le=10_000_000)]


def batch_size(n: int) -> int:
    """Means of n samples that are drawn at once."""
    return max(1, TOGETHER // n)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every number of samples is replicated until the draws are so many, and at least so many times."""

    num_samples: Annotated[list[Samples], msgspec.Meta(min_length=3, max_length=12)]
    draws: Annotated[int, msgspec.Meta(ge=100, le=1_000_000_000)]
    replications: Annotated[int, msgspec.Meta(ge=20, le=100_000)]

    def __post_init__(self):
        distinct(self, "num_samples")

    def times(self, n: int) -> int:
        """Replications of n samples: whole batches, since a rest would be compiled as well."""
        return -(-max(self.replications, self.draws // n) // batch_size(n)) * batch_size(n)


class Quantity(NamedTuple):
    """The true moments of a quantity."""

    mean: float
    sd: float
    kurtosis: float  # in excess of the Gaussian's


_p, _e = float(distributions.norm.sf(THRESHOLD)), np.e
_spread = _p * (1 - _p)
SQUARE, EXPONENTIAL, RARE = "x^2", "exp(x)", f"x > {THRESHOLD:g}"
QUANTITIES = {
    SQUARE: Quantity(1.0, 2**0.5, 12.0),
    EXPONENTIAL: Quantity(_e**0.5, (_e * (_e - 1)) ** 0.5, _e**4 + 2 * _e**3 + 3 * _e**2 - 6),
    RARE: Quantity(_p, _spread**0.5, (1 - 6 * _spread) / _spread),
}
COLOURS = dict(zip(QUANTITIES, (plots.PALETTE[i] for i in (2, 0, 1)), strict=True))


def quantities(x: Array) -> Array:
    """All three, of one draw."""
    return jnp.stack([jnp.square(x), jnp.exp(x), (x > THRESHOLD).astype(x.dtype)])


def standard_normal(key: Key[Array, ""]) -> Array:
    """One draw."""
    return gaussian.sample(key, 0.0, 1.0)


@partial(jax.jit, static_argnames=("num_samples",))
def estimates(keys: Key[Array, " r"], num_samples: int) -> expectation.Estimate:
    """An estimate [3] for each key."""
    one = partial(expectation.monte_carlo, quantities, standard_normal, num_samples=num_samples)
    return jax.lax.map(one, keys, batch_size=batch_size(num_samples))


def run(config: Config) -> Iterator[Record | Progress]:
    """One record for each number of samples and quantity."""
    truth = np.array([quantity.mean for quantity in QUANTITIES.values()])
    for done, n in enumerate(config.num_samples):
        yield Progress(done / len(config.num_samples), f"{n} samples, {config.times(n)} times")
        keys = jax.random.split(jax.random.fold_in(jax.random.key(SEED), n), config.times(n))
        mean, error = (np.asarray(value, np.float64) for value in estimates(keys, n))
        rms = np.sqrt(np.mean((mean - truth) ** 2, axis=0))
        covered = np.mean(np.abs(mean - truth) <= QUANTILE * error, axis=0)
        for i, name in enumerate(QUANTITIES):
            yield Record({"quantity": name, "samples": n}, {"error": float(rms[i]), "coverage": float(covered[i])})


Found = dict[tuple[str, int], tuple[float, float]]  # (quantity, samples) -> root mean square error, coverage


def rare_coverage(n: int) -> float:
    """The coverage of the interval for the rare event, by the binomial distribution."""
    ones = np.arange(min(n, 1000 + 10 * int(n * _p)) + 1)
    mean = ones / n
    inside = np.abs(mean - _p) <= QUANTILE * np.sqrt(mean * (1 - mean) / (n - 1))
    return float(np.sum(distributions.binom.pmf(ones, n, _p)[inside]))


def exponent(config: Config, found: Found, name: str) -> float:
    """The fitted power of the number of samples in the error."""
    errors = [found[name, n][0] for n in config.num_samples]
    return float(np.polyfit(np.log(config.num_samples), np.log(errors), 1)[0])


def noise(config: Config, n: int, coverage: float = LEVEL) -> float:
    """The standard error of a measured coverage."""
    return float(np.sqrt(coverage * (1 - coverage) / config.times(n)))


def error_hypothesis(config: Config, found: Found) -> Hypothesis:
    """The error falls as 1 / sqrt(n), and is sd there."""
    each = {name: exponent(config, found, name) for name in QUANTITIES}
    worst, told = 0.0, ""
    for (name, n), (error, _) in found.items():
        quantity = QUANTITIES[name]
        ratio = error * np.sqrt(n) / quantity.sd
        share = abs(ratio - 1) / (np.sqrt((2 + quantity.kurtosis / n) / config.times(n)) / 2)
        if share >= worst:
            worst, told = share, f"{ratio:.3f}, {share:.1f} standard errors from 1 ({name}, {n} samples)"
    relative = {name: quantity.sd / quantity.mean for name, quantity in QUANTITIES.items()}
    return Hypothesis(
        "The error of a Monte Carlo mean is the standard deviation of the quantity over $sqrt(n)$, for few draws too.",
        "fitted exponents: "
        + "; ".join(f"{name} {value:.3f}" for name, value in each.items())
        + f"; error $sqrt(n)$ / sd farthest from 1: {told}",
        f"an exponent is more than {EXPONENT_TOLERANCE:g} from -.5, or an error more than {STANDARD_ERRORS:g} standard "
        "errors from sd / $sqrt(n)$",
        decided(max(abs(value + 0.5) for value in each.values()) <= EXPONENT_TOLERANCE and worst <= STANDARD_ERRORS),
        [
            f"The rate says nothing of the size: an error of 10 % takes {100 * relative[SQUARE] ** 2:.0f} draws for "
            f"{SQUARE} and {100 * relative[RARE] ** 2:.0f} for {RARE}."
        ],
    )


def coverage_hypothesis(config: Config, found: Found) -> Hypothesis:
    """The interval has its level with many draws."""
    most, least = max(config.num_samples), min(config.num_samples)
    reach = float(distributions.norm.ppf(1 - (1 - LEVEL) / (2 * len(QUANTITIES)))) * noise(config, most)
    got = {name: found[name, most][1] for name in QUANTITIES}
    return Hypothesis(
        f"The interval of mean +- {QUANTILE} standard errors holds the truth in {LEVEL:.0%} of the cases, with {most} "
        "draws.",
        f"coverage with {most} draws: " + "; ".join(f"{name} {value:.1%}" for name, value in got.items()),
        f"a coverage is more than {100 * reach:.1f} points from {LEVEL:.0%}, the noise of {config.times(most)} "
        "replications for all three",
        decided(max(abs(value - LEVEL) for value in got.values()) <= reach),
        [
            f"Few draws cover less: with {least} it is "
            + ", ".join(f"{found[name, least][1]:.1%} ({name})" for name in QUANTITIES)
            + ".",
            f"The exact coverage of {RARE} with {most} draws is {rare_coverage(most):.1%}, since only "
            f"{most * _p:.0f} of them are expected to be above {THRESHOLD:g}.",
        ],
    )


def rare_hypothesis(config: Config, found: Found) -> Hypothesis:
    """The coverage of a rare event is that of a binomial count, far below its level."""
    worst, told, least = 0.0, "", min(config.num_samples)
    for n in config.num_samples:
        want = rare_coverage(n)
        share = abs(found[RARE, n][1] - want) / noise(config, n, want)
        if share >= worst:
            worst, told = share, f"{found[RARE, n][1]:.2%} against {want:.2%} with {n} draws"
    low = found[RARE, least][1]
    return Hypothesis(
        "The interval of a rare event misses far more often than it says while few draws hit the event: a count of 0 "
        "gives an interval of width 0.",
        f"coverage {low:.1%} with {least} draws; farthest from the binomial formula: {told}, {worst:.1f} standard "
        "errors",
        f"the coverage with {least} draws is above half of {LEVEL:.0%}, or one is more than {STANDARD_ERRORS:g} "
        "standard errors from the formula",
        decided(low <= LEVEL / 2 and worst <= STANDARD_ERRORS),
    )


def figure(config: Config, found: Found) -> Plot:
    """Error and coverage against the number of draws."""
    made, axes = plots.figure(columns=2, height=3.8)
    samples = np.array(sorted(config.num_samples))
    for name, colour in COLOURS.items():
        quantity = QUANTITIES[name]
        relative = np.array([found[name, n][0] for n in samples]) / quantity.mean
        axes[0].loglog(samples, relative, "o", color=colour, label=name)
        axes[0].loglog(samples, quantity.sd / quantity.mean / np.sqrt(samples), **plots.THEORY)
        axes[1].semilogx(samples, [100 * found[name, n][1] for n in samples], "o", color=colour, label=name)
    line = np.unique(np.geomspace(samples[0], samples[-1], 200).round()).astype(int)
    axes[1].semilogx(line, [100 * rare_coverage(int(n)) for n in line], **plots.THEORY)
    axes[1].axhline(100 * LEVEL, color="black", linewidth=0.7)
    axes[0].set(title="error of the mean", xlabel="draws n", ylabel="error / truth")
    axes[1].set(title=f"coverage of the {LEVEL:.0%} interval", xlabel="draws n", ylabel="%", ylim=(-3, 103))
    plots.legend(made, *axes[0].get_legend_handles_labels())
    return Plot(
        made,
        "Left: root mean square error over the true value. Dashed: sd / $sqrt(n)$. Right: share of intervals that hold "
        f"the truth. Dashed: the binomial formula for {RARE}.",
    )


def report(config: Config, records: Sequence[Record]) -> Section:
    """The rate of Monte Carlo, and where its interval fails."""
    found: Found = {}
    for settings, values in records:
        key = str(settings["quantity"]), int(settings["samples"])
        found[key] = float(values["error"]), float(values["coverage"])
    text = (
        "A Monte Carlo mean estimates an expected value by the mean of draws. One more digit takes a hundred times the "
        "draws. The standard error estimates the error from the draws themselves, so it can be wrong as well.\n\n"
        f"The draws are standard normal. The three quantities are $x^2$, $exp(x)$ and whether $x > {THRESHOLD:g}$, "
        f"which has probability {_p:.5f}. Coverage is the share of intervals that hold the true value."
    )
    least = min(config.num_samples)
    abstract = [
        f"The error of a Monte Carlo mean falls as $n^-.5$ for all quantities, but with {least} draws the 95 % "
        f"interval of a rare event holds the truth in {found[RARE, least][1]:.0%} of the cases."
    ]
    rows = [
        [
            name,
            f"{n}",
            *(f"{value:.3g}" for value in (error, QUANTITIES[name].sd / np.sqrt(n))),
            f"{coverage:.1%}",
            exact,
        ]
        for (name, n), (error, coverage) in found.items()
        for exact in [f"{rare_coverage(n):.1%}" if name == RARE else ""]
    ]
    header = ["quantity", "draws", "error", "sd / sqrt(n)", "coverage", "binomial"]
    hypotheses = [make(config, found) for make in (error_hypothesis, coverage_hypothesis, rare_hypothesis)]
    table = Table("Root mean square error and coverage of Monte Carlo means.", header, rows)
    return Section("Monte Carlo", abstract, text, [figure(config, found)], hypotheses, [table])
