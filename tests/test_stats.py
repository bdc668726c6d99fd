"""Intervals that cover, and p-values that equal their definitions."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments import stats

GENERATOR = np.random.default_rng(5)
EXP = GENERATOR.exponential(size=30)


# ---- bca_interval


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_the_interval_of_a_normal_mean_is_that_of_the_t_distribution(confidence):
    values = scipy_stats.norm.ppf((np.arange(400) + 0.5) / 400, loc=3, scale=2)
    low, high = stats.bca_interval(values, confidence=confidence, seed=1)
    error = values.std(ddof=1) / math.sqrt(400)
    want = scipy_stats.t.interval(confidence, 399, loc=3, scale=error)
    # A quantile of 9 999 resamples is itself random. Its standard error is `sqrt(.025 * .975 / 9999) / pdf = .027`.
    assert np.abs(np.subtract((low, high), want)).max() <= 0.1 * error


def test_the_interval_equals_the_definition_of_bca():
    """Efron's formula written out: bias z0 from the share below the mean, acceleration a from the jackknife."""
    low, high = stats.bca_interval(EXP, seed=2)
    means = EXP[np.random.default_rng(3).integers(0, 30, (200_000, 30))].mean(axis=1)
    z0 = scipy_stats.norm.ppf(np.mean(means < EXP.mean()))
    jackknife = (EXP.sum() - EXP) / 29
    d = jackknife.mean() - jackknife
    a = np.sum(d**3) / (6 * np.sum(d**2) ** 1.5)
    z = z0 + scipy_stats.norm.ppf([0.025, 0.975])
    want = np.quantile(means, scipy_stats.norm.cdf(z0 + z / (1 - a * z)))
    assert np.abs(np.subtract((low, high), want)).max() <= 0.1 * EXP.std() / math.sqrt(30)


def test_the_interval_covers_the_mean_of_a_skewed_population():
    covered = [
        low <= 1 <= high
        for low, high in (stats.bca_interval(np.random.default_rng(k).exponential(size=40), seed=k) for k in range(100))
    ]
    assert 0.86 <= np.mean(covered) <= 1  # .95 less four standard errors of a share of 100


def test_the_same_seed_gives_the_same_interval():
    assert stats.bca_interval(EXP, seed=4) == stats.bca_interval(EXP, seed=4)
    assert stats.bca_interval(EXP, seed=4) != stats.bca_interval(EXP, seed=5)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.5])
@pytest.mark.parametrize("count", [2, 20])
def test_equal_values_give_an_interval_of_width_zero(value, count):
    low, high = stats.bca_interval(np.full(count, value), seed=0)
    assert low == high
    assert low == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("values", [[0.0] * 9 + [1.0], [0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
@pytest.mark.parametrize("statistic", [np.mean, np.median, np.max])
def test_nearly_equal_values_give_a_finite_interval_around_the_statistic(values, statistic):
    low, high = stats.bca_interval(values, statistic, seed=0)
    assert 0 <= low <= statistic(values) <= high <= 1


# ---- sign_flip_p


def sign_flip_by_definition(differences):
    patterns = np.array(list(itertools.product([1, -1], repeat=len(differences))))
    return np.mean(np.abs(patterns @ differences) >= abs(np.sum(differences)) - 1e-12)


@pytest.mark.parametrize("count", range(1, 11))
def test_the_p_value_counts_all_sign_patterns(count):
    differences = GENERATOR.normal(size=count) + 0.5
    assert stats.sign_flip_p(differences) == sign_flip_by_definition(differences)


@pytest.mark.parametrize("count", [3, 8])
def test_the_p_value_is_that_of_scipy(count):
    differences = GENERATOR.normal(size=count) + 0.5
    want = scipy_stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=10_000)
    assert stats.sign_flip_p(differences) == pytest.approx(want.pvalue, rel=1e-12)


@pytest.mark.parametrize("differences", [[0.1, 0.2, -0.3], [0.1] * 7 + [-0.1] * 3, [1 / 450, 2 / 450, -3 / 450, 0.0]])
def test_ties_count_however_their_sums_are_rounded(differences):
    assert stats.sign_flip_p(differences) == sign_flip_by_definition(differences)


def test_known_p_values():
    assert stats.sign_flip_p([0.0] * 5) == 1
    assert stats.sign_flip_p([2.0]) == 1
    assert stats.sign_flip_p([1.0] * 20) == 2.0**-19
    assert stats.sign_flip_p([1.0] * 30) == 1e-5  # the smallest that 99 999 patterns can show


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6])
def test_random_patterns_estimate_the_exact_p_value(shift, monkeypatch):
    differences = GENERATOR.normal(size=18) + shift
    exact = stats.sign_flip_p(differences)
    monkeypatch.setattr(stats, "_EXACT_UP_TO", 0)
    estimate = stats.sign_flip_p(differences, seed=1)
    assert estimate == stats.sign_flip_p(differences, seed=1)
    assert abs(estimate - exact) <= 4 * math.sqrt(exact * (1 - exact) / 1e5) + 1e-5


def test_p_values_of_symmetric_differences_are_uniform():
    p = [stats.sign_flip_p(np.random.default_rng(k).standard_cauchy(10)) for k in range(400)]
    assert scipy_stats.kstest(p, "uniform").pvalue > 1e-3


# ---- holm


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.02, 0.03, 0.04], [0.04, 0.06, 0.06, 0.06]),  # as R's p.adjust(p, "holm")
        ([0.04, 0.01, 0.03], [0.06, 0.03, 0.06]),
        ([0.5, 0.6, 1.0], [1.0, 1.0, 1.0]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_holm_by_hand(p_values, adjusted):
    np.testing.assert_allclose(stats.holm(p_values), adjusted, rtol=1e-15)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_holm_rejects_what_the_step_down_procedure_rejects(alpha):
    for _ in range(50):
        p = GENERATOR.beta(0.3, 2, size=6)
        rejected = np.zeros(6, bool)
        for rank, index in enumerate(np.argsort(p)):  # the smallest against alpha / 6, the next against alpha / 5, ...
            if p[index] > alpha / (6 - rank):
                break
            rejected[index] = True
        np.testing.assert_array_equal(stats.holm(p) <= alpha, rejected)


# ---- equivalence


@pytest.mark.parametrize("mean", [-0.9, -0.2, 0.0, 0.4, 2.0])
def test_equivalence_is_the_larger_of_two_one_sided_t_tests(mean):
    differences = GENERATOR.normal(mean, 0.5, size=20)
    _, above = scipy_stats.ttest_1samp(differences, -0.5, alternative="greater")
    _, below = scipy_stats.ttest_1samp(differences, 0.5, alternative="less")
    assert stats.equivalence(differences, 0.5) == pytest.approx(np.max([above, below]), rel=1e-12)


@pytest.mark.parametrize(("value", "p"), [(0.0, 0.0), (0.4, 0.0), (-0.4, 0.0), (0.5, 1.0), (0.6, 1.0), (-0.6, 1.0)])
def test_equivalence_without_spread_is_decided_by_the_mean(value, p):
    assert stats.equivalence([value] * 5, 0.5) == p


def test_equivalence_at_the_margin_is_a_coin_toss():
    assert stats.equivalence([0.0, 1.0], 0.5) == 0.5


# ---- what has no answer


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, math.nan], [1.0, math.inf], [[1.0, 2.0]]])
def test_values_that_determine_nothing_are_refused(bad):
    with pytest.raises(ValueError, match=r"values: expected at least 2 finite numbers in one dimension"):
        stats.bca_interval(bad, seed=0)
    with pytest.raises(ValueError, match=r"differences: expected at least 2 finite numbers"):
        stats.equivalence(bad, 1.0)


@pytest.mark.parametrize("bad", [[], [math.nan]])
def test_no_differences_have_no_p_value(bad):
    with pytest.raises(ValueError, match=r"differences: expected at least 1 finite numbers"):
        stats.sign_flip_p(bad)


@pytest.mark.parametrize("bad", [[-0.1], [1.1], [math.nan]])
def test_a_p_value_lies_between_0_and_1(bad):
    with pytest.raises(ValueError, match="p_values: expected"):
        stats.holm(bad)


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan])
def test_a_margin_is_positive(margin):
    with pytest.raises(ValueError, match="margin: expected a positive number"):
        stats.equivalence([0.0, 1.0], margin)


def split_gaps(repetition: int, num_splits: int, own_splits: bool) -> np.ndarray:
    """Test accuracies of two arms that do not differ: nearest class means by one half of the features or by the other.

    Each seed trains on its own half of the training examples. It draws its own split, or shares one with all.
    """
    generator = np.random.default_rng(repetition)
    labels = generator.integers(0, 2, 300)
    features = generator.normal(size=(300, 8)) + 0.4 * labels[:, None]
    gaps, order = [], generator.permutation(300)
    for _ in range(num_splits):
        order = generator.permutation(300) if own_splits else order
        train, test = order[:200], order[200:]
        drawn = generator.choice(train, 100)
        means = np.stack([features[drawn][labels[drawn] == k].mean(axis=0) for k in (0, 1)])
        far = np.square(features[test, None] - means).reshape(100, 2, 2, 4).sum(axis=3)
        right = (far[:, 1] < far[:, 0]) == labels[test, None]
        gaps.append(right[:, 0].mean() - right[:, 1].mean())
    return np.array(gaps)


def test_the_resampled_interval_covers_no_difference_and_that_of_seeds_on_one_split_does_not():
    covers = lambda interval: interval.low <= 0 <= interval.high  # noqa: E731
    own = [covers(stats.resampled_interval(split_gaps(i, 10, True), 100 / 200)) for i in range(500)]
    assert 0.92 <= np.mean(own) <= 0.98
    shared = [covers(stats.resampled_interval(split_gaps(i, 10, False), 0.0)) for i in range(500)]
    assert np.mean(shared) < 0.6


def test_resampled_p_is_that_of_the_interval():
    gaps = np.array([0.5, 1.0, 0.2, 0.9, -0.1, 0.6])
    for overlap in (0.0, 0.4):
        p = stats.resampled_p(gaps, overlap)
        low, high = stats.resampled_interval(gaps, overlap, confidence=1 - p)
        assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-12)
    assert stats.resampled_p(gaps, 0.0) == pytest.approx(scipy_stats.ttest_1samp(gaps, 0).pvalue)
    assert stats.resampled_p([1.0, 1.0], 0.4) == 0
    assert stats.resampled_p([0.0, 0.0], 0.4) == 1
