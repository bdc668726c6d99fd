"""Likelihood identities: values from closed forms and mpmath, minima by search, and verdicts that can fail."""

import jax
import mpmath
import msgspec
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from experiments import plots
from experiments.results import Record
from experiments.studies import likelihood

CONFIG = likelihood.Config(num_examples=101, models=3)

# -log q of one observation from the definitions, with 30 digits.
DEFINITIONS = {
    "Gaussian": lambda x, loc, scale: mpmath.log(scale * mpmath.sqrt(2 * mpmath.pi)) + ((x - loc) / scale) ** 2 / 2,
    "Laplace": lambda x, loc, scale: mpmath.log(2 * scale) + abs(x - loc) / scale,
    "categorical": lambda x, logits: mpmath.log(sum(map(mpmath.exp, logits))) - logits[int(x)],
    "Poisson": lambda x, rate: rate - x * mpmath.log(rate) + mpmath.loggamma(x + 1),
}


@pytest.mark.parametrize("name", likelihood.FAMILIES)
def test_the_mean_of_a_family_is_that_of_its_definition(name):
    """A hundred terms have a rounding each, of a few units at most: 1e-14 of values between 1 and 10."""
    with jax.enable_x64(True):
        got = likelihood.identities(name, CONFIG)
    params = likelihood.FAMILIES[name].model(np.random.default_rng([40_000, list(likelihood.FAMILIES).index(name), 1]))
    x = likelihood.data_of(name, CONFIG)
    with mpmath.workdps(30):
        exact = [mpmath.mpf(v) if np.ndim(v) == 0 else [mpmath.mpf(float(u)) for u in v] for v in params]
        want = float(sum(DEFINITIONS[name](mpmath.mpf(float(each)), *exact) for each in x) / x.size)
    for value in (got["nll"], got["cross_entropy"], got["kl"] + got["entropy"]):
        assert value[0] == pytest.approx(want, rel=1e-14)


@pytest.fixture(scope="module")
def records():
    return [record for record in likelihood.run(CONFIG) if isinstance(record, Record)]


def values_of(records, part, family):
    return next(v for s, v in records if s == {"part": part, "family": family})


def test_kl_is_not_negative_for_counts_and_classes(records):
    """Their probabilities add up to 1. A density times the width does so for a fine grid alone."""
    for family in ("categorical", "Poisson"):
        assert np.all(values_of(records, "identities", family)["kl"] >= 0)


def test_minima_are_those_of_a_search(records):
    """A search sees a minimum to the square root of the rounding of its values."""
    for family, power in (("Gaussian", 2), ("Laplace", 1)):
        x, fit = likelihood.data_of(family, CONFIG), values_of(records, "minima", family)
        found = minimize_scalar(lambda p, x=x, power=power: np.mean(np.abs(x - p) ** power), bounds=(-1, 4),
                                method="bounded", options={"xatol": 1e-9}).x  # fmt: skip
        for name in ("loss", "nll", "closed"):
            assert fit[name] == pytest.approx(found, abs=1e-6)


def test_curves_differ_by_a_factor_and_a_constant(records):
    for family, factor in (("Gaussian", 2 * likelihood.SCALE**2), ("Laplace", likelihood.SCALE)):
        curve = values_of(records, "curve", family)
        rest = curve["nll"] - curve["loss"] / factor
        assert np.ptp(rest) <= 1e-13


def test_verdicts_follow_the_numbers(records):
    def verdicts(part=None, family=None, name=None, add=0.0):
        def changed(settings, values):
            hit = (settings["part"], settings["family"]) == (part, family)
            return values | {name: values[name] + add} if hit else values

        with plots.style():
            section = likelihood.report(CONFIG, [Record(s, changed(s, v)) for s, v in records])
        return [h.verdict for h in section.hypotheses]

    assert verdicts() == ["holds", "holds"]
    for family in likelihood.FAMILIES:
        for name in ("cross_entropy", "kl", "nll"):
            assert verdicts("identities", family, name, 1e-10) == ["falsified", "holds"]
    assert verdicts("identities", "Gaussian", "moments", np.nan) == ["falsified", "holds"]
    for family in ("Gaussian", "Laplace"):
        assert verdicts("minima", family, "nll", 1e-11) == ["holds", "falsified"]


def test_an_even_number_has_no_single_median():
    with pytest.raises(msgspec.ValidationError, match="odd"):
        msgspec.convert({"num_examples": 100, "models": 1}, likelihood.Config)
