"""The truth: every function from its definition, in mpmath."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import mpmath
import numpy as np
from mpmath import mpf

Real = Any  # an mpf, whose annotations would make it complex after any function


class Entry(NamedTuple):
    """A number, and the sum of the magnitudes of the terms it is the sum of."""

    want: Real
    size: Real


class Truth(NamedTuple):
    """The true value of a function for one example, and its gradient in each argument, one after the other."""

    value: list[Entry]
    gradient: list[Entry]


def one(x: Real) -> Entry:
    return Entry(x, abs(x))


def total(terms: Sequence[Real]) -> Entry:
    return Entry(mpmath.fsum(terms), mpmath.fsum(map(abs, terms)))


Row = tuple[Real, ...]


@lru_cache(maxsize=4096)
def _distribution(z: Row) -> tuple[list[Real], list[Real]]:
    """Softmax of a row and its logarithm."""
    top = max(z)
    weights = [mpmath.exp(x - top) for x in z]
    log_total = mpmath.log(mpmath.fsum(weights))
    return [w / mpmath.exp(log_total) for w in weights], [x - top - log_total for x in z]


def _minus_label(p: list[Real], y: int) -> list[Real]:
    return [x - (i == y) for i, x in enumerate(p)]


def softmax(z: Row, y: int) -> Truth:
    p, _ = _distribution(z)
    return Truth([one(x) for x in p], [one(-p[y] * e) for e in _minus_label(p, y)])


def log_softmax(z: Row, y: int) -> Truth:
    p, log_p = _distribution(z)
    return Truth([one(x) for x in log_p], [one(-e) for e in _minus_label(p, y)])


def cross_entropy(z: Row, y: int) -> Truth:
    p, log_p = _distribution(z)
    return Truth([one(-log_p[y])], [one(e) for e in _minus_label(p, y)])


def soft_cross_entropy(z: Row, t: Row) -> Truth:
    p, log_p = _distribution(z)
    value = total([-a * b for a, b in zip(t, log_p, strict=True) if a])
    mass = mpmath.fsum(t)
    return Truth([value], [total([a * mass, -b]) for a, b in zip(p, t, strict=True)])


def _spread(x: Sequence[Real], p: list[Real]) -> list[Real]:
    """sum_j p_j |x_i - x_j|, in float64: a size needs no digits."""
    values, weights = np.array(x, np.float64), np.array(p, np.float64)
    return [mpf(s) for s in (np.abs(values[:, None] - values) @ weights).tolist()]


def brier_score(z: Row, y: int) -> Truth:
    p, _ = _distribution(z)
    e = _minus_label(p, y)
    mean = mpmath.fsum(a * b for a, b in zip(p, e, strict=True))
    slopes = [Entry(2 * a * (b - mean), 2 * a * s) for a, b, s in zip(p, e, _spread(e, p), strict=True)]
    return Truth([one(mpmath.fsum(x**2 for x in e))], slopes)


def entropy(z: Row, y: int) -> Truth:
    p, log_p = _distribution(z)
    h = mpmath.fsum(-a * b for a, b in zip(p, log_p, strict=True) if a)
    return Truth([one(h)], [total([-a * b, -a * h]) if a else one(a) for a, b in zip(p, log_p, strict=True)])


def kl_divergence(zp: Row, zq: Row) -> Truth:
    (p, log_p), (q, log_q) = _distribution(zp), _distribution(zq)
    ratio = [a - b if c else c for a, b, c in zip(log_p, log_q, p, strict=True)]
    kl, change = mpmath.fsum(a * t for a, t in zip(p, ratio, strict=True)), [b - a for a, b in zip(p, q, strict=True)]
    moved = mpmath.fsum(map(abs, change))  # q_i - p_i is also what the other classes leave over
    in_q = [Entry(c, min(a + b, moved - abs(c))) for a, b, c in zip(p, q, change, strict=True)]
    return Truth([one(kl)], [total([a * t, -a * kl]) for a, t in zip(p, ratio, strict=True)] + in_q)


def js_divergence(zp: Row, zq: Row) -> Truth:
    p, q = (_distribution(z)[0] for z in (zp, zq))
    value, slopes = mpf(0), []
    for a, b in ((p, q), (q, p)):
        terms = [x * mpmath.log(2 * x / (x + y)) if x else x for x, y in zip(a, b, strict=True)]
        kl, largest = mpmath.fsum(terms), max(map(abs, terms))
        value += kl / 2
        slopes += [Entry((t - x * kl) / 2, largest) for t, x in zip(terms, a, strict=True)]
    return Truth([one(value)], slopes)


def _odds(z: Real) -> tuple[Real, Real]:
    """Probability of yes and of no."""
    return 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))


def bernoulli_cross_entropy(z: Real, y: int) -> Truth:
    p, no = _odds(z)
    return Truth([one(-mpmath.log(p if y else no))], [one(-no if y else p)])


def bernoulli_entropy(z: Real, y: int) -> Truth:
    p, no = _odds(z)
    return Truth([total([-p * mpmath.log(p), -no * mpmath.log(no)])], [one(-z * p * no)])


def bernoulli_kl_divergence(zp: Real, zq: Real) -> Truth:
    (p, no), (q, q_no) = _odds(zp), _odds(zq)
    return Truth([one(p * mpmath.log(p / q) + no * mpmath.log(no / q_no))], [one(p * no * (zp - zq)), one(q - p)])


def _phi(r: Real) -> Real:
    return mpmath.exp(-r * r / 2) / mpmath.sqrt(2 * mpmath.pi)


def _above(r: Real) -> Real:
    return mpmath.erfc(r / mpmath.sqrt(2)) / 2


def log_prob(x: Real, loc: Real, scale: Real) -> Truth:
    r = (x - loc) / scale
    value = total([-r * r / 2, -mpmath.log(scale), -mpmath.log(2 * mpmath.pi) / 2])
    return Truth([value], [one(-r / scale), one(r / scale), total([r * r / scale, -1 / scale])])


def cdf(x: Real, loc: Real, scale: Real) -> Truth:
    r = (x - loc) / scale
    p = _phi(r) / scale
    return Truth([one(_above(-r))], [one(p), one(-p), one(-r * p)])


def log_cdf(x: Real, loc: Real, scale: Real) -> Truth:
    r = (x - loc) / scale
    hazard = _phi(r) / _above(-r) / scale
    value = mpmath.log1p(-_above(r)) if r > 0 else mpmath.log(_above(-r))
    return Truth([one(value)], [one(hazard), one(-hazard), one(-r * hazard)])


def interval_prob(low: Real, high: Real, loc: Real, scale: Real) -> Truth:
    a, b = (low - loc) / scale, (high - loc) / scale
    value = _above(a) - _above(b) if a > 0 else _above(-b) - _above(-a)  # on the side where both are small
    p, q = _phi(a) / scale, _phi(b) / scale
    return Truth([one(value)], [one(-p), one(q), one(p - q), total([a * p, -b * q])])


def gaussian_kl_divergence(p_loc: Real, p: Real, q_loc: Real, q: Real) -> Truth:
    d = p_loc - q_loc
    value = (p / q) ** 2 / 2 + (d / q) ** 2 / 2 - mpf(1) / 2 - mpmath.log(p / q)
    in_q = total([(q**2 - p**2) / q**3, -(d**2) / q**3])
    return Truth([one(value)], [one(d / q**2), one((p**2 - q**2) / (p * q**2)), one(-d / q**2), in_q])


def quantile(level: Real, loc: Real, scale: Real) -> Truth:
    r = mpmath.sqrt(2) * mpmath.erfinv(2 * level - 1)
    return Truth([total([loc, scale * r])], [one(scale / _phi(r)), one(mpf(1)), one(r)])


def gaussian_entropy(scale: Real) -> Truth:
    return Truth([total([mpmath.log(scale), (1 + mpmath.log(2 * mpmath.pi)) / 2])], [one(1 / scale)])


def mvn_log_prob(x: Row, loc: Row, tril: tuple[Row, ...]) -> Truth:
    """Let W = L^-1, r = W (x - loc), g = W^T r. The gradients are -g, g, and `g_i r_j - [i = j] / L_ii`."""
    n, inverse = range(len(x)), cast(Any, mpmath.matrix(tril)) ** -1
    r = [total([inverse[i, j] * (x[j] - loc[j]) for j in n]) for i in n]
    columns = [[inverse[j, i] for j in n] for i in n]
    g = [Entry(mpmath.fdot(w, [e.want for e in r]), mpmath.fdot(map(abs, w), [e.size for e in r])) for w in columns]
    log_scales = [mpmath.log(tril[i][i]) for i in n]
    constant = len(x) * mpmath.log(2 * mpmath.pi) / 2
    value = total([*(-(e.want**2) / 2 for e in r), *(-s for s in log_scales), -constant])
    corner = [[1 / tril[i][i] if i == j else mpf(0) for j in n] for i in n]
    below = [[Entry(g[i].want * r[j].want - corner[i][j], g[i].size * r[j].size + corner[i][j]) for j in n] for i in n]
    in_tril = [below[i][j] if j <= i else one(mpf(0)) for i in n for j in n]
    return Truth([value], [Entry(-e.want, e.size) for e in g] + g + in_tril)


def variance(v: Row, z: Row) -> Truth:
    p, _ = _distribution(z)
    mean = mpmath.fsum(a * x for a, x in zip(p, v, strict=True))
    square = [(x - mean) ** 2 for x in v]
    var = mpmath.fsum(a * s for a, s in zip(p, square, strict=True))
    in_values = [Entry(2 * a * (x - mean), 2 * a * s) for a, x, s in zip(p, v, _spread(v, p), strict=True)]
    return Truth([one(var)], in_values + [total([a * s, -a * var]) for a, s in zip(p, square, strict=True)])
