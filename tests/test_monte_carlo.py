"""Monte Carlo: moments and coverage against independent sums, draws against theory, and verdicts that can fail."""

import itertools

import mpmath
import numpy as np
import pytest

from experiments import plots
from experiments.results import Record
from experiments.studies import monte_carlo
from experiments.studies.monte_carlo import QUANTITIES, RARE

CONFIG = monte_carlo.Config(num_samples=[16, 64, 256], draws=30_000, replications=400)
FUNCTIONS = {"x^2": lambda x: x * x, "exp(x)": mpmath.exp, RARE: lambda x: mpmath.mpf(1)}


@pytest.mark.parametrize("name", QUANTITIES)
def test_the_moments_of_a_quantity_are_those_of_its_integrals(name):
    limits = [3, 30] if name == RARE else [-30, 0, 30]

    def expect(power):
        return mpmath.quad(lambda x: FUNCTIONS[name](x) ** power * mpmath.npdf(x), limits)

    first, second, third, fourth = map(expect, (1, 2, 3, 4))
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    want = float(first), float(mpmath.sqrt(variance)), float(central / variance**2 - 3)
    assert tuple(QUANTITIES[name]) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("n", [16, 100, 20_000])
def test_the_coverage_of_a_rare_event_is_the_sum_over_its_counts(n):
    """No more than 1000 counts have a chance above 1e-16 here."""
    p, total = mpmath.ncdf(-3), mpmath.mpf(0)
    for count in range(min(n, 1000) + 1):
        mean = mpmath.mpf(count) / n
        if abs(mean - p) <= mpmath.mpf("1.96") * mpmath.sqrt(mean * (1 - mean) / (n - 1)):
            total += mpmath.binomial(n, count) * p**count * (1 - p) ** (n - count)
    assert monte_carlo.rare_coverage(n) == pytest.approx(float(total), rel=1e-9)


@pytest.fixture(scope="module")
def records():
    return [record for record in monte_carlo.run(CONFIG) if isinstance(record, Record)]


def test_draws_have_the_error_and_the_coverage_of_the_theory(records):
    assert len(records) == len(QUANTITIES) * len(CONFIG.num_samples)
    for settings, values in records:
        n, quantity = settings["samples"], QUANTITIES[settings["quantity"]]
        spread = np.sqrt((2 + quantity.kurtosis / n) / CONFIG.times(n)) / 2
        assert values["error"] * np.sqrt(n) / quantity.sd == pytest.approx(1, abs=4 * spread)
        if settings["quantity"] == RARE:
            want = monte_carlo.rare_coverage(n)
            assert values["coverage"] == pytest.approx(want, abs=4 * monte_carlo.noise(CONFIG, n, want))


def test_verdicts_follow_the_estimates():
    config = monte_carlo.Config(num_samples=[16, 256, 16_384], draws=30_000, replications=400)

    def verdicts(error=lambda n: 1, coverage=lambda name, n, want: want):
        """The estimates are those of the theory, with changes."""
        made = []
        for name, n in itertools.product(QUANTITIES, config.num_samples):
            wrong = QUANTITIES[name].sd / np.sqrt(n) * error(n)
            covered = coverage(name, n, monte_carlo.rare_coverage(n) if name == RARE else 0.95)
            made.append(Record({"quantity": name, "samples": n}, {"error": wrong, "coverage": covered}))
        with plots.style():
            return [h.verdict for h in monte_carlo.report(config, made).hypotheses]

    holds, fails = "holds", "falsified"
    assert verdicts() == [holds, holds, holds]
    assert verdicts(error=lambda n: n**0.03) == [fails, holds, holds]
    assert verdicts(error=lambda n: 1.5) == [fails, holds, holds]
    assert verdicts(coverage=lambda name, n, want: want - 0.05 * (name == "exp(x)")) == [holds, fails, holds]
    assert verdicts(coverage=lambda name, n, want: 0.6 if n == 16 else want) == [holds, holds, fails]
    assert verdicts(coverage=lambda name, n, want: 0.5 if n == 256 else want) == [holds, holds, fails]
