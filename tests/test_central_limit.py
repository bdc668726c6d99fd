"""Distances from the Gaussian: exact ones against brute force, draws against exact ones, and verdicts that can fail."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from scipy import stats as distributions

from experiments import plots
from experiments.results import Record
from experiments.studies import central_limit
from experiments.studies.central_limit import CHANCE, SOURCES

CONFIG = central_limit.Config(num_terms=[1, 8, 32, 64], draws=2000)
LATTICE = f"Bernoulli({CHANCE:g})"


@pytest.mark.parametrize("name", SOURCES)
def test_the_moments_of_a_source_are_those_of_one_term(name):
    source = SOURCES[name]
    term = source.total(1)
    variance, skewness, kurtosis = (float(value) for value in term.stats("vsk"))
    assert source.mean == pytest.approx(term.mean())
    got = source.sd**2, source.skewness, source.kurtosis
    assert got == pytest.approx((variance, skewness, kurtosis), abs=1e-12)
    assert source.rho == pytest.approx(term.expect(lambda x: abs(x - source.mean) ** 3), rel=1e-7)


def test_the_exact_distance_of_uniform_terms_is_that_of_the_sum_of_powers():
    """The sum cancels, so that it takes 40 digits."""
    with mpmath.workdps(40):
        n = 8

        def gap(z):
            x = mpmath.mpf(n) / 2 + z * mpmath.sqrt(mpmath.mpf(n) / 12)
            total = sum((-1) ** k * mpmath.binomial(n, k) * max(x - k, 0) ** n for k in range(n + 1))
            return abs(total / mpmath.factorial(n) - mpmath.ncdf(z))

        want = float(max(gap(mpmath.mpf(z)) for z in central_limit.GRID[::4]))
    # A grid of step 0.04 misses the maximum by a share of 0.02^2 / 2 times 4, the curvature there.
    assert SOURCES["uniform"].exact(n) == pytest.approx(want, rel=1e-3)


def test_the_exact_distance_of_a_lattice_is_the_largest_at_its_jumps():
    n, gaps = 5, []
    chances = np.zeros(n + 1)
    for outcome in itertools.product((0, 1), repeat=n):
        chances[sum(outcome)] += math.prod(CHANCE if one else 1 - CHANCE for one in outcome)
    for ones in range(n + 1):
        z = (ones - n * CHANCE) / math.sqrt(n * CHANCE * (1 - CHANCE))
        goal = (1 + math.erf(z / math.sqrt(2))) / 2
        gaps += [abs(chances[:ones].sum() - goal), abs(chances[: ones + 1].sum() - goal)]
    assert SOURCES[LATTICE].exact(n) == pytest.approx(max(gaps), rel=1e-12)


@pytest.mark.parametrize("name", SOURCES)
def test_the_expansion_is_the_limit_of_the_exact_distance(name):
    """The rest is smaller by n^-1/2 at least; its constants are below 1 for these sources."""
    source, n = SOURCES[name], 256
    assert source.exact(n) / source.expansion(n) == pytest.approx(1, abs=n**-0.5)


def test_a_measured_distance_is_that_of_the_sorted_sample():
    sample = np.random.default_rng(1).normal(size=500) + 0.3
    goal, ranks = distributions.norm.cdf(np.sort(sample)), np.arange(501) / 500
    want = max(np.max(ranks[1:] - goal), np.max(goal - ranks[:-1]))
    assert central_limit.measured(sample) == pytest.approx(want, abs=1e-6)


@pytest.fixture(scope="module")
def records():
    return [record for record in central_limit.run(CONFIG) if isinstance(record, Record)]


def test_draws_agree_with_the_exact_distances(records):
    """The error has the bound of Dvoretzky, Kiefer and Wolfowitz at level .05 for all 16 cells."""
    assert len(records) == 4 * len(CONFIG.num_terms)
    for _, values in records:
        assert values["measured"] == pytest.approx(values["exact"], abs=central_limit.floor(CONFIG))


def test_verdicts_follow_the_distances():
    def verdicts(exact=lambda n: 1, measured=lambda n: 1):
        """The distances are expansions, and Cauchy's constant, times a function of the number of terms."""
        changed = []
        for name, n in itertools.product([*SOURCES, central_limit.CAUCHY], CONFIG.num_terms):
            base = SOURCES[name].expansion(n) if name in SOURCES else central_limit.cauchy_distance()
            values = {"exact": base * (exact(n) if name in SOURCES else 1), "measured": base * measured(n)}
            changed.append(Record({"source": name, "terms": n}, values))
        with plots.style():
            return [h.verdict for h in central_limit.report(CONFIG, changed).hypotheses]

    holds, fails = "holds", "falsified"
    assert verdicts() == [holds, holds, holds, holds]
    assert verdicts(exact=lambda n: 3) == [fails, holds, fails, fails]
    assert verdicts(exact=lambda n: (64 / n) ** 0.06)[1:3] == [fails, holds]
    assert verdicts(measured=lambda n: 5) == [fails, holds, holds, fails]
