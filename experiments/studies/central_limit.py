"""Central limit: the distance between the distribution of a mean and the Gaussian, against the number of terms.

The distance is Kolmogorov's: the largest difference of the two distribution functions. A mean of n independent terms
is standardised: its expected value is taken off, and the result divided by sigma / sqrt(n).

    bound       C rho / (sigma^3 sqrt(n)), C = 0.4748, rho = E|x - mean|^3                    Berry and Esseen
    expansion   (|g| + 3 h / sigma) / (6 sqrt(2 pi n)), g the skewness, h the step of a lattice            Esseen
    expansion   |k| max |x^3 - 3 x| phi(x) / (24 n) if g and h are 0, k the excess kurtosis             Edgeworth

The exact distributions are those of Irwin and Hall (uniform terms), the gamma and the binomial. The measured distance
is that of N drawn means. It errs by more than e with probability 2 exp(-2 N e^2) at most (Dvoretzky, Kiefer and
Wolfowitz). So a distance below about 1 / sqrt(N) cannot be measured.

Sources: Esseen (1945), Acta Mathematica 77; Massart (1990), Annals of Probability 18(3), for the constant 2;
Shevtsova (2011), arXiv 1111.6554, for C.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Float64
from scipy import stats as distributions

from experiments import plots
from experiments.config import distinct
from experiments.findings import FUNCTION, Hypothesis, Plot, Section, Table, Tier, decided
from experiments.results import Progress, Record, Setting
from jprob import gaussian

BERRY_ESSEEN = 0.4748
LEAST_TERMS = 8  # of the fits: below, the expansions do not hold yet
EXPONENT_TOLERANCE, CONSTANT_TOLERANCE = 0.05, 0.05
LEVEL = 0.05
SEED = 31_000
CHANCE = 0.1  # of a one, in the skewed discrete source
GRID = np.linspace(-3, 3, 601)  # holds 0 and -1, where the distances of the skewed sources lie
QUARTILE = float(distributions.norm.ppf(0.75))

Terms = Annotated[int, msgspec.Meta(ge=1, le=4096)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Means of each number of terms are drawn so many times, from every source."""

    num_terms: Annotated[list[Terms], msgspec.Meta(min_length=3, max_length=20)]
    draws: Annotated[int, msgspec.Meta(ge=100, le=1_000_000)]

    def __post_init__(self):
        distinct(self, "num_terms")
        if sum(n >= LEAST_TERMS for n in self.num_terms) < 2:
            raise ValueError(f"num_terms: expected two numbers or more that are at least {LEAST_TERMS}")


class Source(NamedTuple):
    """A distribution of terms: its moments, its draws and the exact distribution of a sum."""

    mean: float
    sd: float
    rho: float  # E|x - mean|^3
    skewness: float
    kurtosis: float  # in excess of the Gaussian's
    step: float  # of the lattice of its values; 0 without one
    exponent: float  # of the number of terms in the distance, by the expansions
    draw: Callable[[np.random.Generator, tuple[int, int]], Any]
    total: Callable[[int], Any]  # from a number of terms to the distribution of their sum

    def bound(self, n: np.ndarray | int) -> Any:
        """The bound of Berry and Esseen."""
        return BERRY_ESSEEN * self.rho / (self.sd**3 * np.sqrt(n))

    def expansion(self, n: np.ndarray | int) -> Any:
        """The leading term of the distance for many terms."""
        if self.exponent == -1:
            return abs(self.kurtosis) / 24 * np.max(np.abs(GRID**3 - 3 * GRID) * distributions.norm.pdf(GRID)) / n
        return (abs(self.skewness) + 3 * self.step / self.sd) / (6 * np.sqrt(2 * np.pi * n))

    def standardised(self, total: np.ndarray, n: int) -> Any:
        """Sums of n terms, as standardised means."""
        return (total - n * self.mean) / (self.sd * np.sqrt(n))

    def exact(self, n: int) -> float:
        """The distance between the standardised mean of n terms and the Gaussian."""
        if not self.step:
            sums = n * self.mean + self.sd * np.sqrt(n) * GRID
            return float(np.max(np.abs(self.total(n).cdf(sums) - distributions.norm.cdf(GRID))))
        ones = np.arange(n + 1)
        after, goal = self.total(n).cdf(ones), distributions.norm.cdf(self.standardised(ones, n))
        before = np.concatenate([[0.0], after[:-1]])  # to the left of a jump the distance can be larger
        return float(np.max(np.maximum(np.abs(after - goal), np.abs(before - goal))))


_p, _spread = CHANCE, CHANCE * (1 - CHANCE)
SOURCES = {
    "uniform": Source(
        0.5, 12**-0.5, 1 / 32, 0, -1.2, 0, -1, lambda rng, shape: rng.random(shape), distributions.irwinhall
    ),
    "exponential": Source(
        1, 1, 12 / np.e - 2, 2, 6, 0, -0.5, lambda rng, shape: rng.exponential(size=shape), distributions.gamma
    ),
    f"Bernoulli({CHANCE:g})": Source(
        _p,
        _spread**0.5,
        _spread * (_p**2 + (1 - _p) ** 2),
        (1 - 2 * _p) / _spread**0.5,
        (1 - 6 * _spread) / _spread,
        1,
        -0.5,
        lambda rng, shape: rng.random(shape) < CHANCE,
        lambda n: distributions.binom(n, CHANCE),
    ),
}
CAUCHY = "Cauchy"
COLOURS = dict(zip([*SOURCES, CAUCHY], (plots.PALETTE[i] for i in (2, 0, 1, 5)), strict=True))


def cauchy_distance() -> float:
    """The distance of a Cauchy variable from the Gaussian with its quartiles; means of any number of terms have it."""
    return float(np.max(np.abs(distributions.cauchy.cdf(GRID / QUARTILE) - distributions.norm.cdf(GRID))))


def totals(draw: Callable, rng: np.random.Generator, draws: int, n: int) -> Float64[np.ndarray, " draws"]:
    """Sums of n terms, drawn in blocks so that memory does not grow with n."""
    blocks = [min(64, n - start) for start in range(0, n, 64)]
    return np.asarray(sum(draw(rng, (draws, block)).sum(axis=1) for block in blocks), np.float64)


def measured(sample: np.ndarray) -> float:
    """Kolmogorov's distance between drawn numbers and the standard Gaussian."""
    sample = sample.astype(np.float32)
    return float(
        distributions.kstest(sample, lambda x: np.asarray(gaussian.cdf(jnp.asarray(x))), method="asymp").statistic
    )


def tier(config: Config, settings: Mapping[str, Setting], value: str) -> Tier | None:
    """The exact distance, computed in float64 on the host."""
    return FUNCTION if value == "exact" else None


def run(config: Config) -> Iterator[Record | Progress]:
    """One record for each source and number of terms: the exact distance and the measured one."""
    for i, name in enumerate([*SOURCES, CAUCHY]):
        for n in config.num_terms:
            yield Progress((i + n / sum(config.num_terms)) / (1 + len(SOURCES)), f"{name}, {n} terms")
            rng = np.random.default_rng([SEED, i, n])
            if name == CAUCHY:
                draw = totals(lambda rng, shape: rng.standard_cauchy(shape), rng, config.draws, n)
                exact, sample = cauchy_distance(), draw / n * QUARTILE
            else:
                source = SOURCES[name]
                exact, sample = source.exact(n), source.standardised(totals(source.draw, rng, config.draws, n), n)
            yield Record({"source": name, "terms": n}, {"exact": exact, "measured": measured(sample)})


Distances = dict[tuple[str, int], tuple[float, float]]  # (source, terms) -> exact, measured


def floor(config: Config) -> float:
    """The largest error of a measured distance, at the level of the study shared among all cells."""
    cells = (1 + len(SOURCES)) * len(config.num_terms)
    return float(np.sqrt(np.log(2 * cells / LEVEL) / (2 * config.draws)))


def exponent(config: Config, found: Distances, name: str) -> float:
    """The fitted power of the number of terms in the exact distance."""
    terms = [n for n in config.num_terms if n >= LEAST_TERMS]
    return float(np.polyfit(np.log(terms), [np.log(found[name, n][0]) for n in terms], 1)[0])


def bound_hypothesis(config: Config, found: Distances) -> Hypothesis:
    """No distance is above the bound of Berry and Esseen."""
    most = max(config.num_terms)
    shares = {name: [found[name, n][0] / s.bound(n) for n in config.num_terms] for name, s in SOURCES.items()}
    over = max(found[name, n][1] - source.bound(n) for name, source in SOURCES.items() for n in config.num_terms)
    told = "; ".join(f"{name} {min(share):.3f} to {max(share):.3f}" for name, share in shares.items())
    largest = max(abs(found[CAUCHY, n][1] - cauchy_distance()) for n in config.num_terms)
    return Hypothesis(
        "The distance of the mean from the Gaussian is at most the bound of Berry and Esseen, which falls as $n^-.5$.",
        f"exact distance over the bound: {told}; measured distance minus the bound: at most {over:+.3f}",
        f"an exact distance is above the bound, or a measured one by more than {floor(config):.4f}",
        decided(max(map(max, shares.values())) <= 1 and over <= floor(config)),
        [
            f"The bound is loose for a symmetric source: at {most} terms it is "
            f"{SOURCES['uniform'].bound(most) / found['uniform', most][0]:.0f} times the distance of the uniform.",
            f"A source without variance has no such bound: a mean of {most} Cauchy terms is at distance "
            f"{found[CAUCHY, most][1]:.3f}, as one term is; no number of terms departs by more than {largest:.3f}.",
        ],
    )


def exponent_hypothesis(config: Config, found: Distances) -> Hypothesis:
    """Skewed sources converge as n^-1/2, a symmetric one as 1 / n."""
    each = {name: exponent(config, found, name) for name in SOURCES}
    worst = max(abs(each[name] - source.exponent) for name, source in SOURCES.items())
    hidden = [n for n in config.num_terms if found["uniform", n][0] < floor(config)]
    against = [
        f"The exponents are those of exact distances: {config.draws} draws cannot tell the distance of {n} uniform "
        "terms or more from 0."
        for n in sorted(hidden)[:1]
    ]
    return Hypothesis(
        "The distance falls as $n^-.5$ for skewed sources and as $n^-1$ for the uniform one.",
        "fitted exponents: "
        + "; ".join(f"{name} {each[name]:.3f} (theory {source.exponent:g})" for name, source in SOURCES.items()),
        f"an exponent over $n >= {LEAST_TERMS}$ is more than {EXPONENT_TOLERANCE:g} from the theory",
        decided(worst <= EXPONENT_TOLERANCE),
        against,
    )


def constant_hypothesis(config: Config, found: Distances) -> Hypothesis:
    """The constants are those of the expansions."""
    most, least = max(config.num_terms), min(n for n in config.num_terms if n >= LEAST_TERMS)

    def ratios(n):
        return {name: found[name, n][0] / source.expansion(n) for name, source in SOURCES.items()}

    return Hypothesis(
        "Skewness and the step of a lattice set the distance, and kurtosis does where both are 0.",
        f"exact distance over its expansion at {most} terms: "
        + "; ".join(f"{name} {ratio:.3f}" for name, ratio in ratios(most).items()),
        f"a ratio is more than {CONSTANT_TOLERANCE:g} from 1",
        decided(max(abs(ratio - 1) for ratio in ratios(most).values()) <= CONSTANT_TOLERANCE),
        [f"At {least} terms the ratios are " + ", ".join(f"{ratio:.2f}" for ratio in ratios(least).values()) + "."],
    )


def draws_hypothesis(config: Config, found: Distances) -> Hypothesis:
    """Draws agree with the exact distances."""
    name, n = max(found, key=lambda cell: abs(found[cell][0] - found[cell][1]))
    worst = abs(found[name, n][0] - found[name, n][1])
    return Hypothesis(
        f"Measured distances agree with exact ones within the error of {config.draws} draws, also for Cauchy terms, "
        "whose distance stays the same.",
        f"largest difference {worst:.4f} ({name}, {n} terms)",
        f"a difference is above {floor(config):.4f}, which all {len(found)} together exceed in {LEVEL:.0%} of studies "
        "at most",
        decided(worst <= floor(config)),
    )


def figure(config: Config, found: Distances) -> Plot:
    """Distances against the number of terms."""
    made, axes = plots.figure(columns=2, height=3.8)
    terms = np.array(sorted(config.num_terms))
    for name, colour in COLOURS.items():
        for axis, which in zip(axes, (0, 1), strict=True):
            axis.loglog(terms, [found[name, n][which] for n in terms], "o", color=colour, label=name)
        if name in SOURCES:
            axes[0].loglog(terms, SOURCES[name].expansion(terms), **plots.THEORY)
            axes[0].loglog(terms, SOURCES[name].bound(terms), ":", color=colour, linewidth=1.2)
        axes[1].loglog(terms, [found[name, n][0] for n in terms], **plots.THEORY)
    axes[1].axhline(floor(config), color="black", linewidth=0.7)
    axes[0].set(title="exact", xlabel="terms n", ylabel="distance from the Gaussian")
    axes[1].set(title=f"measured, {config.draws} draws", xlabel="terms n", ylim=axes[0].get_ylim())
    plots.legend(made, *axes[0].get_legend_handles_labels())
    return Plot(
        made,
        "Left: exact distances. Dashed: leading term of the expansion. Dotted: bound of Berry and Esseen. "
        "Right: measured distances. Dashed: the exact ones. The level line is the largest error of the draws.",
    )


def report(config: Config, records: Sequence[Record]) -> Section:
    """Rates of the central limit theorem, and a source without it."""
    found: Distances = {}
    for settings, values in records:
        key = str(settings["source"]), int(settings["terms"])
        found[key] = float(values["exact"]), float(values["measured"])
    text = (
        "The central limit theorem says that the mean of many independent terms is nearly Gaussian, not how many are "
        "many. The distance here is the largest difference of the two distribution functions.\n\n"
        "Berry and Esseen bound the distance by the third absolute moment: it falls at least as $n^-.5$. A lattice is "
        "a source with evenly spaced values, such as 0 and 1. The distribution of its mean has jumps of size $n^-.5$."
    )
    most = max(config.num_terms)
    abstract = [
        f"The mean of {most} terms is within {found['uniform', most][0]:.1g} of the Gaussian for uniform terms, "
        f"{found['exponential', most][0]:.1g} for exponential ones, and {found[CAUCHY, most][1]:.1g} for Cauchy ones."
    ]
    rows = [
        [name, f"{n}", f"{exact:.3g}", f"{got:.3g}"]
        + ([f"{SOURCES[name].bound(n):.3g}", f"{SOURCES[name].expansion(n):.3g}"] if name in SOURCES else ["", ""])
        for (name, n), (exact, got) in found.items()
    ]
    header = ["source", "terms", "exact", "measured", "bound", "expansion"]
    makers = bound_hypothesis, exponent_hypothesis, constant_hypothesis, draws_hypothesis
    hypotheses = [make(config, found) for make in makers]
    table = Table("Distance between the standardised mean and the Gaussian.", header, rows)
    return Section("Central limit", abstract, text, [figure(config, found)], hypotheses, [table])
