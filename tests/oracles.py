"""The truth: every function from its definition, in mpmath at 240 digits. Nothing here imports jprob.

Rows are sequences of mpf; a class that is impossible has the logit -inf. Gradients are central differences of the
definition itself. Their step is so small (1e-40) that their error (1e-80) is below every number tested.
"""

from collections.abc import Callable, Sequence

import mpmath
import numpy as np
from mpmath import mpf

mpmath.mp.dps = 240
STEP = mpf(10) ** -40

Row = Sequence[mpf]


def exactly(values) -> list[mpf]:
    """Floating-point numbers of any dtype, without rounding."""
    return [mpf(float(v)) for v in np.asarray(values, dtype=np.float64).ravel()]


def softmax(z: Row) -> list[mpf]:
    top = max(z)
    weights = [mpmath.exp(x - top) for x in z]
    total = mpmath.fsum(weights)
    return [w / total for w in weights]


def log_softmax(z: Row) -> list[mpf]:
    return [mpmath.log(p) if p else -mpmath.inf for p in softmax(z)]


def cross_entropy(z: Row, targets: Row) -> mpf:
    return mpmath.fsum(-t * log_p for t, log_p in zip(targets, log_softmax(z), strict=True) if t)


def brier_score(z: Row, targets: Row) -> mpf:
    return mpmath.fsum((p - t) ** 2 for p, t in zip(softmax(z), targets, strict=True))


def entropy(z: Row) -> mpf:
    return mpmath.fsum(-p * mpmath.log(p) for p in softmax(z) if p)


def kl_divergence(zp: Row, zq: Row) -> mpf:
    pairs = zip(softmax(zp), softmax(zq), strict=True)
    return mpmath.fsum(p * mpmath.log(p / q) if q else mpmath.inf for p, q in pairs if p)


def js_divergence(zp: Row, zq: Row, weight: float | mpf = 0.5) -> mpf:
    p, q = softmax(zp), softmax(zq)
    m = [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]
    sides = (weight, p), (1 - weight, q)
    return mpmath.fsum(w * a * mpmath.log(a / b) for w, r in sides for a, b in zip(r, m, strict=True) if a)


def bernoulli_cross_entropy(z: mpf, y: mpf) -> mpf:
    return y * mpmath.log1p(mpmath.exp(-z)) + (1 - y) * mpmath.log1p(mpmath.exp(z))


def gaussian_log_prob(x: mpf, loc: mpf, scale: mpf) -> mpf:
    return -(((x - loc) / scale) ** 2) / 2 - mpmath.log(scale) - mpmath.log(2 * mpmath.pi) / 2


def gaussian_cdf(x: mpf, loc: mpf, scale: mpf) -> mpf:
    return mpmath.erfc(-(x - loc) / scale / mpmath.sqrt(2)) / 2


def gaussian_interval_prob(low: mpf, high: mpf, loc: mpf, scale: mpf) -> mpf:
    return gaussian_cdf(high, loc, scale) - gaussian_cdf(low, loc, scale)


def gaussian_log_interval_prob(a: mpf, b: mpf) -> mpf:
    """log_interval_prob of a standard Gaussian, in the tail where both ends are small: the other would cancel."""
    if a + b < 0:
        a, b = -b, -a
    upper = mpmath.mpf(0) if mpmath.isinf(b) else mpmath.erfc(b / mpmath.sqrt(2))
    return mpmath.log((mpmath.erfc(a / mpmath.sqrt(2)) - upper) / 2)


def gaussian_cross_entropy(p_loc: mpf, p_scale: mpf, q_loc: mpf, q_scale: mpf) -> mpf:
    mean_square = p_scale**2 + (p_loc - q_loc) ** 2
    return mean_square / (2 * q_scale**2) + mpmath.log(q_scale) + mpmath.log(2 * mpmath.pi) / 2


def gaussian_kl_divergence(p_loc: mpf, p_scale: mpf, q_loc: mpf, q_scale: mpf) -> mpf:
    own = gaussian_cross_entropy(p_loc, p_scale, p_loc, p_scale)
    return gaussian_cross_entropy(p_loc, p_scale, q_loc, q_scale) - own


def mean(values: Row, probs: Row) -> mpf:
    return mpmath.fsum(v * p for v, p in zip(values, probs, strict=True)) / mpmath.fsum(probs)


def variance(values: Row, probs: Row) -> mpf:
    centre = mean(values, probs)
    return mean([(v - centre) ** 2 for v in values], probs)


def log_evidence(prior: Row, likelihood: Row) -> mpf:
    return mpmath.log(mpmath.fsum(p * mpmath.exp(x) for p, x in zip(softmax(prior), likelihood, strict=True)))


def mvn_log_prob(x: Row, loc: Row, scale_tril: mpmath.matrix) -> mpf:
    offset = mpmath.matrix([a - b for a, b in zip(x, loc, strict=True)])
    covariance = scale_tril * scale_tril.T
    square = (offset.T * covariance**-1 * offset)[0]
    return -(square + mpmath.log(mpmath.det(covariance)) + len(loc) * mpmath.log(2 * mpmath.pi)) / 2


def mvn_kl_divergence(p_loc: Row, p_tril: mpmath.matrix, q_loc: Row, q_tril: mpmath.matrix) -> mpf:
    p, q = p_tril * p_tril.T, q_tril * q_tril.T
    inverse, offset = q**-1, mpmath.matrix([a - b for a, b in zip(p_loc, q_loc, strict=True)])
    product = inverse * p
    trace = mpmath.fsum(product[i, i] for i in range(len(p_loc)))
    square = (offset.T * inverse * offset)[0]
    return (trace - len(p_loc) + square + mpmath.log(mpmath.det(q) / mpmath.det(p))) / 2


def gradient(f: Callable[[Row], mpf], z: Row) -> list[mpf]:
    """Partial derivatives of f at z; 0 for a logit of -inf, which no step can move."""
    return [mpf(0) if mpmath.isinf(z[i]) else (f(_moved(z, i, STEP)) - f(_moved(z, i, -STEP))) / (2 * STEP)
            for i in range(len(z))]  # fmt: skip


def _moved(z: Row, i: int, step: mpf) -> list[mpf]:
    return [x + step if j == i else x for j, x in enumerate(z)]


def error(got, want, atol: float = 0.0, scale=None) -> float:
    """Largest relative error of an array against a sequence of truths (or a single one).

    An error of at most `atol` counts as none: it is the smallest normal number of the result's dtype, below which XLA
    may flush to 0. `scale` replaces the truth as what the error is relative to: one for all, or a list of one for each.
    """
    want = [want] if isinstance(want, mpf) else list(want)
    scale = want if scale is None else scale if isinstance(scale, list) else [scale] * len(want)
    got = np.asarray(got, dtype=np.float64).ravel()
    assert got.size == len(want), f"{got.size} results, {len(want)} truths"
    return max(map(lambda g, w, s: _error(g, w, s, atol), got, want, scale), default=0.0)


def _error(got: float, want: mpf, scale: mpf, atol: float) -> float:
    if mpmath.isinf(want) or mpmath.isnan(want) or not np.isfinite(got):
        same = got == float(want) or (np.isnan(got) and mpmath.isnan(want))
        return 0.0 if same else float("inf")
    distance = abs(mpf(got) - want)
    return 0.0 if distance <= atol else float(distance / abs(scale)) if scale else float("inf")
