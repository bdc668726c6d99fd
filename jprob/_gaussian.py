"""The pieces of the Gaussian functions that have a derivative rule.

r is (x - loc) / scale. A function of `scale` and `log_scale` takes both, which say the same, and its derivative in
`log_scale` alone: no scale is squared, and a logarithm that is given keeps its digits. A coefficient that is not finite
is 0, or a tangent is multiplied by one finite factor after the other: 0 times an infinite coefficient is NaN.
"""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import erf, erfc

from . import _accurate, _placement, _weights

HALF_LOG_2PI = math.log(2 * math.pi) / 2
_ROOT = math.sqrt(0.5)


def scale_of(log_scale: Array) -> Array:
    """exp(log_scale), or the nearest number that is normal as its inverse is."""
    limit = math.floor(-math.log(jnp.finfo(log_scale.dtype).tiny))
    return jnp.exp(jnp.clip(log_scale, -limit, limit))


def in_units(scale: Array, *points: Array) -> tuple[Array, ...]:
    """A unit, and the scale and the points times it: nearer to 1 where sums and inverses would leave the range."""
    sizes = [jnp.where(jnp.isinf(point), 0, jnp.abs(point)) for point in points]
    largest = reduce(jnp.maximum, sizes, scale)
    # Points of 2^128 may be as far apart as 2^129; at the other end, so may a difference of two be too small.
    unit = jnp.where(scale > 2.0**64, 2.0**-8, jnp.where(largest < 2.0**-64, 2.0**60, 1)).astype(scale.dtype)
    return unit, scale * unit, *(point * unit for point in points)


def distances(x: Array, loc: Array | float, scale: Array) -> tuple[Array, Array]:
    """r - 1 and r + 1, each with all its digits: also with those that x - loc rounds off."""
    offset, lost = _accurate.difference(x, loc)
    lost = jax.lax.stop_gradient(_finite(lost))
    return ((offset - scale) + lost) / scale, ((offset + scale) + lost) / scale


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


@jax.custom_jvp
def log_prob(x: Array, loc: Array, scale: Array, log_scale: Array) -> Array:
    """-r^2 / 2 - log_scale - log(2 pi) / 2."""
    return -jnp.square((x - loc) / scale) / 2 - log_scale - HALF_LOG_2PI


@log_prob.defjvp
def _log_prob_jvp(primals, tangents):
    """-(r / scale) (d x - d loc) + (r^2 - 1) d log_scale."""
    (x, loc, scale, _), (d_x, d_loc, _, d_log) = primals, tangents
    near = jnp.isfinite((x - loc) / scale)
    x, loc = jnp.where(near, x, 0), jnp.where(near, loc, 0)
    # Times the inverse: XLA turns a division of a quotient into one by scale * scale, which leaves the dtype's range.
    inverse, (below, above) = 1 / scale, distances(x, loc, scale)
    slope = (d_loc - d_x) * inverse * ((x - loc) / scale) + _finite(below * above) * d_log
    return log_prob(*primals), slope


def _halves(r, scale):
    """Two factors of the density: at a scale of 1e-30 it is normal where exp(-r^2 / 2) is not."""
    half = jnp.exp(-jnp.square(r) / 4)
    return half, half * (1 / scale) * math.exp(-HALF_LOG_2PI)


def _seen(r):
    """Whether exp(-r^2 / 4) is a normal number: farther out the gradient of a density is 0, and r may be infinite."""
    return jnp.abs(r) < 2 * math.sqrt(-math.log(jnp.finfo(r.dtype).tiny))


def _densities(r, scale):
    """p and p r for the density p at r."""
    seen = _seen(r)
    r = jnp.where(seen, r, 0)
    half, rest = (jnp.where(seen, factor, 0) for factor in _halves(r, scale))
    return half * rest, half * r * rest


@jax.custom_jvp
def prob(x: Array, loc: Array, scale: Array, log_scale: Array) -> Array:
    """exp(-r^2 / 2) / (scale sqrt(2 pi))."""
    half, rest = _halves((x - loc) / scale, scale)
    return half * rest


@prob.defjvp
def _prob_jvp(primals, tangents):
    """p ((r^2 - 1) d log_scale - (r / scale) (d x - d loc))."""
    (x, loc, scale, _), (d_x, d_loc, _, d_log) = primals, tangents
    seen = _seen(_accurate.divide(x - loc, scale))
    x, loc = jnp.where(seen, x, 0), jnp.where(seen, loc, 0)
    r, (below, above) = _accurate.divide(x - loc, scale), distances(x, loc, scale)
    half, rest = (jnp.where(seen, factor, 0) for factor in _halves(r, scale))
    slope = (d_loc - d_x) * (1 / scale) * (half * r) * rest + half * (below * above) * rest * d_log
    return prob(*primals), slope


@jax.custom_jvp
def cdf(offset: Array, scale: Array) -> Array:
    """Phi(r) with r = offset / scale."""
    return erfc(-(offset / scale) * _ROOT) / 2


@cdf.defjvp
def _cdf_jvp(primals, tangents):
    """p (d offset - r d scale), p the density."""
    (offset, scale), (d_offset, d_scale) = primals, tangents
    p, p_r = _densities(_accurate.divide(offset, scale), scale)
    return cdf(offset, scale), p * d_offset - p_r * d_scale


# From here on down, log Phi and its derivative come from the continued fraction; nearer, from erfc.
_TAIL = -4.0


@jax.custom_jvp
def _excess(r):
    """h + r of the hazard h = phi(r) / Phi(r), the derivative of log Phi: near 1 / |r| far below 0.

    The continued fraction is `h = x + 1 / (x + 2 / (x + 3 / (x + ...)))` with x = -r. It is written in 1 / x^2, so that
    no x overflows.
    """
    inverse = 1 / jnp.maximum(-r, -_TAIL)
    square = jnp.square(inverse)
    tail = jnp.ones_like(r)
    for n in range(40 if r.dtype == jnp.float64 else 12, 1, -1):
        tail = 1 + n * square / tail
    return jnp.where(r < _TAIL, inverse / tail, _near_hazard(r) + jnp.minimum(r, jnp.finfo(r.dtype).max))


@_excess.defjvp
def _excess_jvp(primals, tangents):
    """d (h + r) = (1 - h (h + r)) dr."""
    (r,), (dr,) = primals, tangents
    excess = _excess(r)
    return excess, (1 - _hazard(r) * excess) * dr


def _near_hazard(r):
    """phi(r) / Phi(r) by its definition, down to the tail."""
    near = jnp.maximum(r, _TAIL)
    return jnp.exp(-jnp.square(near) / 2 - HALF_LOG_2PI) / (erfc(-near * _ROOT) / 2)


def _hazard(r):
    """phi(r) / Phi(r)."""
    return jnp.where(r < _TAIL, _excess(jnp.minimum(r, _TAIL)) - r, _near_hazard(r))


def _log_phi(r):
    """log Phi(r): of the complement well above 0, through the hazard in the lower tail."""
    upper = jnp.log1p(-erfc(jnp.maximum(r, 0) * _ROOT) / 2)
    lower = jnp.log(erfc(-jnp.maximum(r, _TAIL) * _ROOT) / 2)
    # -r^2 / 2 - log h - log(2 pi) / 2: h is at least 4 here, so that all terms have one sign.
    tail = -jnp.square(r) / 2 - jnp.log(_hazard(jnp.minimum(r, _TAIL))) - HALF_LOG_2PI
    # Not from 0 on: between -0.42 and -0.36 XLA's float64 log1p errs by 240 u.
    return jnp.where(r < _TAIL, tail, jnp.where(r < 0.6, lower, upper))


@jax.custom_jvp
def log_cdf(offset: Array, scale: Array) -> Array:
    """log Phi(r) with r = offset / scale."""
    return _log_phi(offset / scale)


@log_cdf.defjvp
def _log_cdf_jvp(primals, tangents):
    """h (d offset - r d scale) / scale; above 0, where h may be below the smallest number, from the density."""
    (offset, scale), (d_offset, d_scale) = primals, tangents
    above = offset > 0
    positive = jnp.where(above, offset, 0)
    p, p_r = _densities(_accurate.divide(positive, scale), scale)
    upper = (p * d_offset - p_r * d_scale) / cdf(positive, scale)
    r = _accurate.divide(jnp.where(above, 0, offset), scale)
    near, inverse = jnp.isfinite(r), 1 / scale
    r = jnp.where(near, r, 0)
    lower = (d_offset * inverse - d_scale * inverse * r) * jnp.where(near, _hazard(r), 0)
    return log_cdf(offset, scale), jnp.where(above, upper, lower)


@jax.custom_jvp
def quantile(q: Array) -> Array:
    """The inverse of Phi."""
    return _placement.automatic(jax.scipy.special.ndtri, q, spec=_placement.spec(q))


@quantile.defjvp
def _quantile_jvp(primals, tangents):
    """dq / phi(r), with phi = q h of the hazard h: exp(r^2 / 2) would turn the rounding of r into r^2 times as much."""
    (q,), (dq,) = primals, tangents
    r, tail = quantile(q), jnp.minimum(q, 1 - q)
    return r, _finite(1 / (tail * _hazard(jnp.where(tail > 0, -jnp.abs(r), 0)))) * dq


def _ends(low, high, loc, scale):
    """The ends in standard deviations, their distance, whether that is narrow, and whether they are mirrored.

    They are mirrored so that the end nearer to the mean, if both are on one side, is the first.
    """
    a, b = _accurate.divide(low - loc, scale), _accurate.divide(high - loc, scale)
    mirrored = ~(a > 0)
    a, b = jnp.where(mirrored, -b, a), jnp.where(mirrored, -a, b)
    width = _accurate.divide(high - low, scale)
    return a, b, width, width * jnp.maximum(1, jnp.abs(a + width / 2)) <= 2, mirrored


def _mean_density(middle, width):
    """Mean of `exp(-(middle width s + (width s)^2 / 2))` over s in [-1/2, 1/2], by Gauss-Legendre quadrature."""
    nodes, node_weights = np.polynomial.legendre.leggauss(10 if middle.dtype == jnp.float64 else 6)
    step = [width * (node / 2) for node in nodes.tolist()]
    terms = [w / 2 * jnp.exp(-s * (middle + s / 2)) for w, s in zip(node_weights.tolist(), step, strict=True)]
    return sum(terms[1:], terms[0])


def _around(a, b):
    """Probability between ends on both sides of the mean."""
    return (erf(b * _ROOT) - erf(a * _ROOT)) / 2


def _of_ends(ends, at_a, at_b, tangents):
    """The tangent of a function of both ends.

    It is `at_high d high - at_low d low - (at_high - at_low) d loc - (b at_high - a at_low) d scale`. The densities at
    the ends have the ratio e^e, e = (b^2 - a^2) / 2. If they are close, their difference is the larger one times expm1,
    which keeps its digits.
    """
    (a, b, width, narrow, mirrored), (d_low, d_high, d_loc, d_scale) = ends, tangents
    e = width * ((a + b) / 2)
    close = jnp.abs(e) < 1
    e = jnp.where(close, e, 0)
    drop = jnp.where(close, jnp.where(e >= 0, -at_a * jnp.expm1(-e), at_b * jnp.expm1(e)), at_a - at_b)
    a, b, width = _finite(a), _finite(b), _finite(width)
    stretch = jnp.where((a >= 0) | narrow, a * drop - width * at_b, a * at_a - b * at_b)
    at_low, at_high = jnp.where(mirrored, at_b, at_a), jnp.where(mirrored, at_a, at_b)
    return at_high * d_high - at_low * d_low + jnp.where(mirrored, -drop, drop) * d_loc + stretch * d_scale


@jax.custom_jvp
def interval_prob(low: Array, high: Array, loc: Array, scale: Array) -> Array:
    """Phi at high minus Phi at low."""
    a, b, width, narrow, _ = _ends(low, high, loc, scale)
    middle = a + width / 2
    wide = jnp.where(a < 0, _around(a, b), (erfc(a * _ROOT) - erfc(b * _ROOT)) / 2)
    density = jnp.exp(-jnp.square(middle) / 2 - HALF_LOG_2PI)
    return jnp.where(narrow, density * width * _mean_density(middle, width), wide)


@interval_prob.defjvp
def _interval_prob_jvp(primals, tangents):
    scale, ends = primals[-1], _ends(*primals)
    at_a, at_b = (_densities(end, scale)[0] for end in ends[:2])
    return interval_prob(*primals), _of_ends(ends, at_a, at_b, tangents)


def _beyond(a, b, width):
    """`Q(b) / Q(a)` of the upper tails Q = phi / h, from the hazards and `phi(b) / phi(a)`, which loses no digit."""
    return jnp.where(b == jnp.inf, 0, jnp.exp(-width * ((a + b) / 2)) * _hazard(-a) / _hazard(-b))


@jax.custom_jvp
def log_interval_prob(low: Array, high: Array, loc: Array, scale: Array) -> Array:
    """log of `interval_prob`: of the mean density, of the complement around the mean, or of two tails."""
    a, b, width, narrow, _ = _ends(low, high, loc, scale)
    middle = a + width / 2
    thin = jnp.log(width) + jnp.log(_mean_density(middle, width)) - jnp.square(middle) / 2 - HALF_LOG_2PI
    outside = (erfc(-a * _ROOT) + erfc(b * _ROOT)) / 2
    # The complement alone while it is small: between -0.42 and -0.36 XLA's float64 log1p errs by 240 u.
    around = jnp.where(outside < 0.25, jnp.log1p(-outside), jnp.log(_around(a, b)))
    tail = _log_phi(-a) + jnp.log1p(-_beyond(a, b, width))
    return jnp.where(narrow, thin, jnp.where(a < 0, around, tail))


@log_interval_prob.defjvp
def _log_interval_prob_jvp(primals, tangents):
    """As of `interval_prob`, with the densities at the ends divided by the probability between them."""
    (*_, scale), ends, out = primals, _ends(*primals), log_interval_prob(*primals)
    a, b, width, narrow, _ = ends
    around = ~narrow & (a < 0)
    # Each form sees its own kind of ends alone: elsewhere it may overflow, and 0 times its derivative is NaN.
    w, middle = jnp.where(narrow & (width > 0), width, 1), jnp.where(narrow, a + width / 2, 0)
    mean = w * _mean_density(middle, w)
    # The squares of an end and of the middle differ by width times their mean, over 2.
    thin = [jnp.exp(s * w * (middle - s * w / 4) / 2) / mean for s in (1, -1)]
    inner = [jnp.where(around, end, other) for end, other in ((a, -1), (b, 1))]
    across = [jnp.exp(-jnp.square(end) / 2 - HALF_LOG_2PI) / _around(*inner) for end in inner]
    outer = ~narrow & (a >= 0) & jnp.isfinite(a)
    near, far, apart = jnp.where(outer, a, 0), jnp.where(outer, b, 1), jnp.where(outer, width, 1)
    tail = _hazard(-near) / (1 - _beyond(near, far, apart))
    tails = [tail, tail * jnp.exp(-apart * ((near + far) / 2))]
    kinds, possible = zip(thin, across, tails, strict=True), jnp.isfinite(out)
    at_a, at_b = (jnp.where(possible, jnp.where(narrow, x, jnp.where(around, y, z)), 0) for x, y, z in kinds)
    return out, _of_ends(ends, at_a, at_b, [tangent * (1 / scale) for tangent in tangents])


@jax.custom_jvp
def half_square(offset: Array, scale: Array, log_scale: Array) -> Array:
    """r^2 / 2 with r = offset / scale."""
    return jnp.square(offset / scale) / 2


@half_square.defjvp
def _half_square_jvp(primals, tangents):
    """(r / scale) d offset - r^2 d log_scale."""
    (offset, scale, _), (d_offset, _, d_log) = primals, tangents
    # The inverse, since XLA would make offset / scale / scale the quotient by a square, which leaves the range.
    inverse = 1 / scale
    r = _finite(offset * inverse)
    return half_square(*primals), d_offset * inverse * r - _finite(r * r) * d_log


@jax.custom_jvp
def log_ratio(p: Array, q: Array) -> Array:
    """log(p / q), with all its digits where p and q are close. The derivative is dp / p - dq / q."""
    ratio, (below, _) = p / q, distances(p, 0, q)
    near, info = jnp.abs(below) < 0.2, jnp.finfo(p.dtype)
    usable = (ratio > info.tiny) & (ratio < info.max)
    far = jnp.where(usable, jnp.log(ratio), jnp.log(p) - jnp.log(q))
    return jnp.where(near, jnp.log1p(jnp.where(near, below, 0)), far)


@log_ratio.defjvp
def _log_ratio_jvp(primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    return log_ratio(p, q), _accurate.divide(dp, p) - _accurate.divide(dq, q)


@jax.custom_jvp
def scale_divergence(d: Array, below: Array) -> Array:
    """(e^(2 d) - 1 - 2 d) / 2, with below = e^d - 1."""
    near = jnp.abs(below) < 0.2
    return jnp.where(near, _accurate.exp_remainder(2 * jnp.where(near, d, 0)) / 2, below * (below + 2) / 2 - d)


@scale_divergence.defjvp
def _scale_divergence_jvp(primals, tangents):
    """(e^(2 d) - 1) dd."""
    (d, below), (dd, _) = primals, tangents
    return scale_divergence(d, below), _finite(below * (below + 2)) * dd


@jax.custom_jvp
def scale_cost(p: Array, q: Array, q_log: Array) -> Array:
    """(p / q)^2 / 2 + q_log for scales p and q."""
    return jnp.square(p / q) / 2 + q_log


@scale_cost.defjvp
def _scale_cost_jvp(primals, tangents):
    """The tangent `(p / q^2) dp - ((p / q)^2 - 1) d log q`, 0 in q exactly where p = q."""
    (p, q, _), (dp, _, d_log) = primals, tangents
    inverse, (below, above) = 1 / q, distances(p, 0, q)
    return scale_cost(*primals), dp * inverse * _finite(p * inverse) - _finite(below * above) * d_log


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def fit(x: Array, w: Array, axis: int) -> tuple[Array, Array]:
    """Weighted mean and root of the weighted mean square deviation from it, both with the axis of length 1."""
    share, loc, deviation = _weights.deviations(x, w, axis)
    # The unit is the largest deviation: the square of 1e-30 is 0.
    unit = jnp.max(jnp.where(w == 0, 0, jnp.abs(deviation)), axis=axis, keepdims=True)
    scaled = deviation / jnp.where(unit == 0, 1, unit)
    return loc, unit * jnp.sqrt(jnp.sum(_accurate.multiply_no_nan(share, jnp.square(scaled)), axis=axis, keepdims=True))


@fit.defjvp
def _fit_jvp(axis, primals, tangents):
    """The tangents of the mean and the scale, with W the sum of the weights.

    d loc = `sum_i share_i dx_i + (x_i - loc) dw_i / W`.
    d scale = `sum_i share_i z_i dx_i + scale (z_i^2 - 1) dw_i / (2 W)`.
    z_i = (x_i - loc) / scale, and 0 where the scale is 0: there it has a corner, whose one-sided derivatives have the
    mean 0.
    """
    (x, w), (dx, dw) = primals, tangents
    loc, scale = fit(x, w, axis)
    share, _, deviation = _weights.deviations(x, w, axis)
    total = jnp.sum(w, axis=axis, keepdims=True)
    dw = dw / jnp.where(total == 0, 1, total)
    spread, deviation = _finite(scale), _finite(deviation)
    z = jnp.where(spread > 0, _accurate.divide(deviation, jnp.where(spread > 0, spread, 1)), 0)
    d_loc = jnp.sum(share * dx + deviation * dw, axis=axis, keepdims=True)
    d_scale = jnp.sum(share * z * dx + spread * (z - 1) * (z + 1) / 2 * dw, axis=axis, keepdims=True)
    return (loc, scale), (d_loc, d_scale)
