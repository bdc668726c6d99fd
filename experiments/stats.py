"""Intervals and tests for paired comparisons over seeds.

Both arms run with the same seeds, so that the differences between the arms are what is random. Independent differences
get a bootstrap interval and a sign-flip test. Differences over resampled splits of one data set share examples: they
get the corrected t statistics of Nadeau and Bengio. Equivalence tests say that there is no difference, and a family of
tests gets Holm's correction.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

_EXACT_UP_TO = 20  # differences: 2^19 sums, a few milliseconds
_NUM_RESAMPLES = 9_999
_NUM_FLIPS = 99_999


class Interval(NamedTuple):
    """A confidence interval; unpacks into its two ends."""

    low: float
    high: float


def bca_interval(
    values: ArrayLike,
    statistic: Callable[..., np.ndarray | np.floating] = np.mean,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a statistic, bias-corrected and accelerated (BCa).

    The result is the percentile interval if the correction is undefined, as for a median whose jackknife has no spread.

    Args:
      values: [n], independent, n >= 2.
      statistic: from values to a number; it takes `axis` as NumPy's reductions do.
      confidence: the probability with which the interval covers the statistic of the population.
      seed: of the resampling (PCG64): the same values give the same interval.

    Returns:
      The two ends. Equal values give an interval of width zero.

    Raises:
      ValueError: fewer than two values, or one that is not finite.

    Source: Efron (1987), J. Am. Stat. Assoc. 82(397).
    """
    sample = _finite(values, "values", at_least=2)
    if np.all(sample == sample[0]):
        point = float(statistic(sample))
        return Interval(point, point)
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns of the degenerate correction, and returns nan
            interval = scipy_stats.bootstrap(
                (sample,),
                statistic,
                n_resamples=_NUM_RESAMPLES,
                confidence_level=confidence,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite(interval.low) and np.isfinite(interval.high):
            break
    return Interval(float(interval.low), float(interval.high))


def sign_flip_p(differences: ArrayLike, *, seed: int = 0) -> float:
    """Two-sided p-value of "the differences are symmetric about 0", by flipping their signs.

    p is the share of the 2^n sign patterns whose |sum| reaches the observed one: exact up to 20 differences, estimated
    from 99 999 random patterns (PCG64) above. The smallest possible p is 2^(1 - n), or 1e-5.

    Args:
      differences: [n], paired, n >= 1.
      seed: of the random patterns.

    Raises:
      ValueError: no differences, or one that is not finite.

    Source: Fisher (1935), The Design of Experiments, section 21.
    """
    sample = _finite(differences, "differences", at_least=1)
    # Sums of the same numbers in another order differ by rounding; without the slack a tie would count as less.
    reached = abs(sample.sum()) - sample.size * np.finfo(float).eps * np.abs(sample).sum()
    if sample.size <= _EXACT_UP_TO:
        return float(np.mean(np.abs(_signed_sums(sample)) >= reached))
    generator = np.random.default_rng(seed)
    count = 0
    for size in _chunks(_NUM_FLIPS, 10_000):
        signs = 1.0 - 2.0 * generator.integers(0, 2, (size, sample.size), dtype=np.int8)
        count += int(np.sum(np.abs(signs @ sample) >= reached))
    return (1 + count) / (1 + _NUM_FLIPS)  # the observed pattern is one of the possible: p is never 0


def _signed_sums(sample: np.ndarray) -> np.ndarray:
    """sum_i s_i x_i for every sign pattern with s_0 = +1; the others are their negatives."""
    sums = sample[:1]
    for value in sample[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's step-down correction for a family of tests.

    Args:
      p_values: [n], one a test.

    Returns:
      Adjusted p-values in the same order. Rejecting those below alpha keeps the probability of any false rejection
      below alpha, under any dependence between the tests.

    Raises:
      ValueError: a p-value outside [0, 1].

    Source: Holm (1979), Scand. J. Stat. 6(2).

    >>> holm([0.03, 0.01, 0.04]).tolist()
    [0.06, 0.03, 0.06]
    """
    p = _finite(p_values, "p_values", at_least=0)
    if np.any((p < 0) | (p > 1)):
        raise ValueError(f"p_values: expected numbers in [0, 1], got {p}")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


def resampled_interval(differences: ArrayLike, overlap: float, *, confidence: float = 0.95) -> Interval:
    """Interval of a mean difference over resampled splits of one data set.

    The splits share examples. So the variance of the mean is `1 / n + n_test / n_train` times the sample variance, not
    `1 / n` of it. An interval over seeds that share one split would say nothing about other test examples.

    Args:
      differences: [n], paired, one a split, n >= 2.
      overlap: n_test / n_train, not negative; 0 for independent differences.
      confidence: the probability with which the interval covers the mean over all splits.

    Returns:
      The two ends, by Student's t with n - 1 degrees of freedom.

    Raises:
      ValueError: fewer than two differences, or one that is not finite.

    Source: Nadeau and Bengio (2003), Machine Learning 52(3).
    """
    sample = _finite(differences, "differences", at_least=2)
    reach = scipy_stats.t.ppf((1 + confidence) / 2, df=sample.size - 1) * _standard_error(sample, overlap)
    return Interval(float(sample.mean() - reach), float(sample.mean() + reach))


def resampled_p(differences: ArrayLike, overlap: float) -> float:
    """Two-sided p-value of "the mean difference is 0", for the differences of `resampled_interval`."""
    sample = _finite(differences, "differences", at_least=2)
    error = _standard_error(sample, overlap)
    if error == 0:
        return 1.0 if sample[0] == 0 else 0.0
    return float(2 * scipy_stats.t.sf(abs(sample.mean()) / error, df=sample.size - 1))


def _standard_error(sample: np.ndarray, overlap: float) -> float:
    return 0.0 if np.all(sample == sample[0]) else float(sample.std(ddof=1) * np.sqrt(1 / sample.size + overlap))


def equivalence(differences: ArrayLike, margin: float, overlap: float = 0.0) -> float:
    """p-value of "the mean difference lies outside (-margin, margin)", by two one-sided t tests.

    A small p supports "no difference worth mentioning", which a large p of a test of no difference does not.

    Args:
      differences: [n], paired, n >= 2.
      margin: the largest difference that counts as none; positive.
      overlap: n_test / n_train of resampled splits, as for `resampled_interval`; 0 for independent differences.

    Returns:
      The larger of the two one-sided p-values. Differences without spread give 0 inside the margin and 1 outside.

    Raises:
      ValueError: fewer than two differences, one that is not finite, or a margin that is not positive.

    Source: Schuirmann (1987), J. Pharmacokinet. Biopharm. 15(6).
    """
    sample = _finite(differences, "differences", at_least=2)
    if not margin > 0:
        raise ValueError(f"margin: expected a positive number, got {margin}")
    room = margin - abs(sample.mean())  # to the nearer end; the test against the farther one has the smaller p
    error = _standard_error(sample, overlap)
    if error == 0:
        return 0.0 if room > 0 else 1.0
    return float(scipy_stats.t.sf(room / error, df=sample.size - 1))


def _finite(values: ArrayLike, name: str, at_least: int) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size < at_least or not np.all(np.isfinite(sample)):
        raise ValueError(f"{name}: expected at least {at_least} finite numbers in one dimension, got {values}")
    return sample
