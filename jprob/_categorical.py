"""Rules of the categorical distribution: losses, divergences and their derivatives, on logits that are checked.

`z` is an array of logits in the dtype computed in and `axis` its class axis, as in `_accurate`. Every function keeps
that axis with length 1 where it sums over classes.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from . import _accurate, _placement


def tempered(z, axis, temperature):
    """(z - max z) / T, and its limits: T = 0 leaves only the maximum, and no gradient; T = inf makes all equal."""
    d = _accurate.shifted(z, axis)
    possible = d > -jnp.inf  # -inf / inf is NaN; the inner select keeps it out of the gradient
    warm = jnp.where(possible, d, 0) / jnp.where(temperature > 0, temperature, 1)
    cold = jax.lax.stop_gradient(jnp.where(d < 0, -jnp.inf, d))
    return jnp.where(temperature == 0, cold, jnp.where(possible, warm, d))


def is_class(z, labels, axis):
    """Whether each class is the label."""
    sharding = jax.typeof(z).sharding
    return jax.lax.broadcasted_iota(jnp.int32, z.shape, axis, out_sharding=sharding) == labels.astype(jnp.int32)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def class_loss(z, labels, axis):
    """-log p_y = (m - z_y) + log(sum_j exp(z_j - m)), with y left out of the sum.

    At the maximum, exp(z_y - m) - 1 = 0 is added to the others. Elsewhere the loss is at least ln 2, and has no small
    number to keep. A row without a possible class gives log 0 - log 0, NaN.
    """
    top = _accurate.finite_maximum(z, axis)
    others = _accurate.sum_where(lambda k, z: (k != labels.astype(k.dtype), jnp.exp(z - top)), axis, z)
    gap = _placement.entries(z, labels, axis) - top
    return jnp.log1p(others + (jnp.exp(gap) - 1)) - gap


@class_loss.defjvp
def _class_loss_jvp(axis, primals, tangents):
    (z, labels), (dz, _) = primals, tangents
    loss, residual = loss_and_residual(z, labels, axis)
    return loss, _accurate.total(residual * dz, axis)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def loss_and_residual(z, labels, axis):
    """The loss, and p - y: p_j for the others, and minus their sum for y, never p_y - 1."""
    top = _accurate.finite_maximum(z, axis)
    # The gradient takes the place of these exponentials in memory. To compute them again costs a CPU more.
    exponentials = _accurate.kept(jnp.exp(z - top))
    others = _accurate.sum_where(lambda k, e: (k != labels.astype(k.dtype), e), axis, exponentials)
    gap = _placement.entries(z, labels, axis) - top
    below = others + (jnp.exp(gap) - 1)  # the sum of all less 1; -1 in a row without a possible class
    share, at_label = (_accurate.once(x / jnp.maximum(1 + below, 0.5), z, axis) for x in (jnp.ones_like(gap), -others))
    return jnp.log1p(below) - gap, jnp.where(is_class(z, labels, axis), at_label, exponentials * share)


@loss_and_residual.defjvp
def loss_and_residual_jvp(axis, primals, tangents):
    (z, labels), (dz, _) = primals, tangents
    loss, residual = loss_and_residual(z, labels, axis)
    p = _accurate.probs(z, axis)
    return (loss, residual), (_accurate.total(residual * dz, axis), p * _accurate.centred(p, dz, axis))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def uniform_loss(z, axis):
    """The mean of -log p_i over the possible classes, log sum_i exp(z_i - m) + mean (m - z_i): at least log K."""
    possible = (z > -jnp.inf).astype(z.dtype)
    top, count = _accurate.finite_maximum(z, axis), jnp.maximum(_accurate.total(possible, axis), 1)
    gaps = _accurate.sum_where(lambda k, z: (z > -jnp.inf, top - z), axis, z)
    return jnp.log(_accurate.total(jnp.exp(z - top), axis)) + gaps / count + _accurate.undefined(z, axis)


@uniform_loss.defjvp
def _uniform_loss_jvp(axis, primals, tangents):
    """sum_i (p_i - 1 / K) dz_i."""
    (z,), (dz,) = primals, tangents
    possible = (z > -jnp.inf).astype(z.dtype)
    target = possible / jnp.maximum(_accurate.total(possible, axis), 1)
    return uniform_loss(z, axis), _accurate.total((_accurate.probs(z, axis) - target) * dz, axis)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def target_loss(z, targets, axis):
    """-sum_i t_i log p_i = sum t log1p(sum_exp_below_max) + sum_i t_i (m - z_i): no term is negative."""
    return target_terms(z, targets, axis)[0]


@partial(target_loss.defjvp, symbolic_zeros=True)
def _target_loss_jvp(axis, primals, tangents):
    """sum_i (p_i sum(t) - t_i) dz_i - sum_i log p_i dt_i, the latter over possible classes."""
    (z, targets), (dz, dt) = primals, tangents
    out, residual = target_terms(z, targets, axis)
    slope = jnp.zeros_like(out)
    if type(dz) is not SymbolicZero:
        slope += _accurate.total(residual * dz, axis)
    if type(dt) is not SymbolicZero:
        log_p = _accurate.log_softmax(z, axis)
        slope -= _accurate.total(jnp.where(jnp.isfinite(log_p), log_p, 0) * dt, axis)
    return out, slope


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def target_terms(z, targets, axis):
    """The loss, and p_i sum(t) - t_i; for the one class with p > 1/2 what the others have of t, less sum(t) (1 - p_i).

    The gradient of a row of targets with a NaN or an infinite one is 0.
    """
    rows, mass = _accurate.normaliser(z, axis), _accurate.total(targets, axis)
    gaps = _accurate.sum_where(lambda k, z, t: (t != 0, t * (rows.top - z)), axis, z, targets)
    rest = _accurate.sum_where(lambda k, z, t: (z != rows.top, t), axis, z, targets)
    log_total = jnp.log1p(rows.others) + _accurate.undefined(z, axis)
    # A select last, as in a loss of labels.
    loss = jnp.where(jnp.isnan(log_total), log_total, mass * log_total + gaps)
    scale, at_top = (_accurate.once(x, z, axis) for x in (mass * rows.share, rest - mass * rows.lack))

    def error(z, targets, rows, scale, at_top):
        return jnp.where(z == rows.large, at_top, scale * jnp.exp(z - rows.top) - targets)

    residual = _accurate.each(error, axis, z, targets, rows, scale, at_top)
    return loss, jnp.where(jnp.isfinite(mass), residual, 0)


@target_terms.defjvp
def target_terms_jvp(axis, primals, tangents):
    """d(p_i sum(t) - t_i) = sum(t) p_i (dz_i - <p, dz>) + p_i sum(dt) - dt_i."""
    (z, targets), (dz, dt) = primals, tangents
    (loss, residual), finite = target_terms(z, targets, axis), _finite_rows(targets, axis)
    p, log_p = _accurate.probs(z, axis), _accurate.log_softmax(z, axis)
    terms = residual * dz - jnp.where(jnp.isfinite(log_p), log_p, 0) * dt
    slope = _accurate.total(finite, axis) * (p * _accurate.centred(p, dz, axis)) + (p * _accurate.total(dt, axis) - dt)
    return (loss, residual), (_accurate.total(terms, axis), slope)


def _finite_rows(targets, axis):
    """0 for a row of targets with a NaN or an infinite one, whose loss has no gradient."""
    return jnp.where(jnp.isfinite(_accurate.total(targets, axis)), targets, 0)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def squared_error(z, targets, axis):
    """sum_i e_i^2."""
    rows = _accurate.normaliser(z, axis)
    squares = _accurate.sum_where(lambda k, z, t: (z != jnp.inf, jnp.square(_error(rows, z, t))), axis, z, targets)
    return squares + _accurate.undefined(z, axis)


def _error(rows, z, targets):
    """e = p - t; for the one class with p > 1/2 it is `(1 - t) - (1 - p)`, both known without cancellation."""
    return jnp.where(z == rows.large, (1 - targets) - rows.lack, jnp.exp(z - rows.top) * rows.share - targets)


@squared_error.defjvp
def _squared_error_jvp(axis, primals, tangents):
    """d sum e^2 = 2 sum_i p_i (e_i - <p, e>) dz_i - 2 sum_i e_i dt_i."""
    (z, targets), (dz, dt) = primals, tangents
    finite = _finite_rows(targets, axis)
    slope = _brier_slope(z, finite, axis) * dz - _probability_error(z, finite, axis) * dt
    return squared_error(z, targets, axis), 2 * _accurate.total(slope, axis)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _probability_error(z, targets, axis):
    return _error(_accurate.normaliser(z, axis), z, targets)


@_probability_error.defjvp
def _probability_error_jvp(axis, primals, tangents):
    (z, targets), (dz, dt) = primals, tangents
    p = _accurate.probs(z, axis)
    dp = p * _accurate.centred(p, dz, axis)
    return _probability_error(z, targets, axis), dp - dt


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _brier_slope(z, targets, axis):
    """`p_i c_i` with `c_i = e_i - <p, e>`, without subtracting two close numbers for the classes near the maximum.

    Any reference r gives `c_i = c_r - (e_r - e_i)` with `c_r = <p, e_r - e>`. Let r be a class at the maximum (the mean
    of those that tie). Then `e_r - e_i` of a class near it is `(t_i - t_r) - p_r expm1(shifted_i)`. For the others
    `e_i - <p, e>` is exact enough. There `<p, e> = sum_i p_i (p_i - <p, t>)`, and
    `p_i - <p, t> = p_r (exp(shifted_i) - <t, exp(shifted)>)`.
    """
    rows, total = _accurate.normaliser(z, axis), partial(_accurate.total, axis=axis)
    top, p_r = rows.top, rows.share
    ties, of_ties = (
        _accurate.sum_where(lambda k, z, t, x=x: (z == top, x(t)), axis, z, targets)
        for x in (jnp.ones_like, lambda t: t)
    )
    t_r = of_ties / jnp.maximum(ties, 1)
    e_r = jnp.where(rows.others < 1, (1 - t_r) - rows.lack, p_r - t_r)
    t_r, e_r = (_accurate.once(x, z, axis) for x in (t_r, e_r))

    def drop(z, t):
        near = z - top > -math.log(2)
        return near, jnp.where(near, (t - t_r) - p_r * jnp.expm1(z - top), e_r - _error(rows, z, t))

    dropped = _accurate.sum_where(
        lambda k, z, t: (z != jnp.inf, jnp.exp(z - top) * p_r * drop(z, t)[1]), axis, z, targets
    )
    growth = jnp.expm1(z - top)
    missing = total(targets * growth) + (total(targets) - 1)
    mean = _accurate.once(p_r * total(jnp.exp(z - top) * p_r * (growth - missing)), z, axis)
    near, fall = drop(z, targets)
    return jnp.exp(z - top) * p_r * jnp.where(near, dropped - fall, _error(rows, z, targets) - mean)


@_brier_slope.defjvp
def _brier_slope_jvp(axis, primals, tangents):
    """The tangent `dp_i c_i + p_i (de_i - <dp, e> - <p, de>)`, with `dp_i c_i = (p_i c_i) (dz_i - <p, dz>)`."""
    (z, targets), (dz, dt) = primals, tangents
    p, e = _accurate.probs(z, axis), _probability_error(z, targets, axis)
    slope, centred = _brier_slope(z, targets, axis), _accurate.centred(p, dz, axis)
    dp = p * centred
    de = dp - dt
    return slope, slope * centred + p * (de - _accurate.total(dp * e + p * de, axis))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def entropy(z, axis):
    """H = log1p(sum_exp_below_max) + sum p_i (m - z_i): no term is negative."""
    _, others, gap = _mean_gap(z, axis)
    return jnp.log1p(others) + gap + _accurate.undefined(z, axis)


def _mean_gap(z, axis):
    """The maximum m, the sum of exponentials below it, and sum p_i (m - z_i)."""
    top = _accurate.finite_maximum(z, axis)
    others = _accurate.sum_exp_below_max(z, axis, top)
    top = _accurate.once(top, z, axis)
    gaps = _accurate.sum_where(lambda k, z: (z > -jnp.inf, jnp.exp(z - top) * _finite(top - z)), axis, z)
    return top, others, gaps / (1 + others)


def _finite(gap):
    """The gap, and 0 for that of an impossible class, whose probability of 0 it is about to meet."""
    return jnp.where(gap < jnp.inf, gap, 0)


@entropy.defjvp
def _entropy_jvp(axis, primals, tangents):
    """The tangent `-sum p_i (log p_i + H) dz_i`, with `log p_i + H = sum_j p_j (m - z_j) - (m - z_i)`."""
    (z,), (dz,) = primals, tangents
    top, others, gap = (_accurate.once(x, z, axis) for x in _mean_gap(z, axis))
    slope = jnp.exp(z - top) / (1 + others) * (_finite(top - z) - gap)
    return entropy(z, axis), _accurate.total(slope * dz, axis)


def top_and_shift(z, axis, scale: Any = 1.0):
    """The maximum, and what the logits are measured from: the maximum where it is huge in units of `scale`, else 0."""
    top = jax.lax.stop_gradient(_accurate.finite_maximum(z, axis))
    return top, jnp.where(jnp.abs(top) > scale * math.sqrt(jnp.finfo(z.dtype).max), top, 0)


def _room(z):
    """A size of logits beyond all use, differences of which are finite."""
    return float(jnp.finfo(z.dtype).max / 8)


class _Pair(NamedTuple):
    """Two distributions over the same classes, and how they differ; numbers per row but for the logits.

    Attributes:
      p, q: logits.
      shift_p, shift_q: what finite logits are measured from: their maximum where it is huge, else 0.
      top_p, top_q: maximum of the finite logits.
      total_p, total_q: sums of exp(p - top_p) and exp(q - top_q).
      reference: q - p of p's top class, and its rounding error.
      mean: of q - p - reference under p.
      excluded: whether q excludes a class that p does not.
    """

    p: Array
    q: Array
    shift_p: Array
    shift_q: Array
    top_p: Array
    top_q: Array
    total_p: Array
    total_q: Array
    reference: tuple[Array, Array]
    mean: Array
    excluded: Array

    def kept(self):
        """For another pass."""
        rows = self._asdict()
        del rows["p"], rows["q"]
        return self._replace(**_accurate.kept(rows))

    def finite(self, p, q):
        """Finite logits, so that no difference is infinite: an impossible class gets minus `_room`."""
        return jnp.maximum(p - self.shift_p, -_room(p)), jnp.maximum(q - self.shift_q, -_room(q))

    def centred(self, p, q):
        """q - p less its mean under p. Measured from the top class, that class keeps its digits too."""
        (p, q), (r_high, r_low) = self.finite(p, q), self.reference
        high, low = _accurate.difference(q, p)
        return ((high - r_high) + (low - r_low)) - self.mean

    def shifted(self, p, q):
        p, q = self.finite(p, q)
        return p - self.top_p, q - self.top_q

    def probs(self, p, q):
        p, q = self.shifted(p, q)
        return jnp.exp(p) / self.total_p, jnp.exp(q) / self.total_q

    def log_ratio(self, p, q, divergence):
        """log q - log p = centred - KL(p || q). A divergence above 1 has no small difference to lose."""
        d, (p, q) = self.centred(p, q), self.shifted(p, q)
        return jnp.where(divergence > 1, (q - p) - jnp.log(self.total_q / self.total_p), d - divergence)


def _pair(p_logits, q_logits, axis) -> _Pair:
    once, logits = partial(_accurate.once, z=p_logits, axis=axis), (p_logits, q_logits)
    (top_p, shift_p), (top_q, shift_q) = (top_and_shift(z, axis) for z in logits)
    lowest, room = jnp.finfo(top_p.dtype).min, _room(top_p)
    tops = [jnp.where(top > lowest, top - s, -room) for top, s in ((top_p, shift_p), (top_q, shift_q))]
    zero = jnp.zeros_like(top_p)
    pair = _Pair(p_logits, q_logits, shift_p, shift_q, tops[0], tops[1], zero, zero, (zero, zero), zero, zero)
    total_p, total_q = (
        _accurate.sum_where(lambda k, *z, i=i: (z[i] > -jnp.inf, jnp.exp(pair.shifted(*z)[i])), axis, *logits)
        for i in (0, 1)
    )
    fixed = [jax.lax.stop_gradient(z) for z in logits]

    def at_top(k, p, q):
        out = (q == -jnp.inf) & (p > -jnp.inf)
        return (p == top_p) | out, jnp.where(out, jnp.inf, pair.finite(p, q)[1])

    most = _accurate.max_where(at_top, axis, *fixed)
    # XLA may compute logits twice. Then none may be the maximum.
    high, low = _accurate.difference(jnp.where(jnp.abs(most) < jnp.inf, most, pair.top_q), pair.top_p)
    totals = {"total_p": jnp.maximum(total_p, 0.5), "total_q": jnp.maximum(total_q, 0.5)}  # at least 1, or no class
    pair = pair._replace(**totals, reference=(once(high), once(low)), excluded=most == jnp.inf).kept()
    return pair._replace(mean=_mean(pair, axis)).kept()


def _mean(pair, axis):
    """The mean of q - p under p, less what `pair` takes for it."""

    def term(k, p, q):
        return p > -jnp.inf, jnp.exp(pair.shifted(p, q)[0]) * pair.centred(p, q)

    return _accurate.once(_accurate.sum_where(term, axis, pair.p, pair.q) / pair.total_p, pair.p, axis)


def kl_divergence(p_logits, q_logits, axis):
    undefined = _accurate.undefined(p_logits, axis) + _accurate.undefined(q_logits, axis)
    return _finite_kl(p_logits, q_logits, axis) + undefined


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _finite_kl(p_logits, q_logits, axis):
    return _kl(_pair(p_logits, q_logits, axis), axis)


def _kl(pair, axis):
    """KL = `log sum_i p_i exp(d_i) = log1p(sum_i p_i (exp(d_i) - 1 - d_i))` with <p, d> = 0: no term is negative.

    An error of the mean reaches the divergence in second order only. exp(d) is taken from d where d is small. It comes
    from the logits of q elsewhere, also where p is 0. A divergence above 1 has no small difference to lose.
    """
    # exp(q - top_q - shift) = exp(p - top_p + d)
    (high, low), (top_high, top_low) = pair.reference, _accurate.difference(pair.top_q, pair.top_p)
    shift = _accurate.once(((high - top_high) + (low - top_low)) + pair.mean, pair.p, axis)
    largest = math.log(jnp.finfo(shift.dtype).max) / 2  # beyond it, `far` is the divergence

    def term(k, p, q):
        d, (shifted_p, shifted_q) = pair.centred(p, q), pair.shifted(p, q)
        near, far = jnp.clip(d, -1, 2), jnp.exp(jnp.minimum(shifted_q - shift, largest))
        p_i = jnp.exp(shifted_p)
        x = jnp.where(near == d, p_i * _accurate.near_exp_remainder(near), far - p_i * (1 + d))
        return jnp.maximum(p, q) > -jnp.inf, x

    excess = _accurate.sum_where(term, axis, pair.p, pair.q) / pair.total_p
    far = jnp.log(pair.total_q / pair.total_p) - shift
    kl = jnp.where(far > 1, far, jnp.log1p(excess))
    return _accurate.once(jnp.where(pair.excluded, jnp.inf, kl), pair.p, axis)


@partial(_finite_kl.defjvp, symbolic_zeros=True)
def _finite_kl_jvp(axis, primals, tangents):
    """dKL = sum_i -p_i d_i dz^p_i + (q_i - p_i) dz^q_i."""
    p_logits, q_logits = primals
    # The divergence by its rule, which is finite where its plain derivative is not; XLA merges what both compute.
    pair, kl = _pair(p_logits, q_logits, axis), _finite_kl(p_logits, q_logits, axis)
    pair = pair._replace(mean=_accurate.kept((pair.mean, kl))[0]).kept()
    return kl, _along(kl, (partial(_kl_slope_p, pair, axis), partial(_kl_slope_q, pair, axis, kl)), tangents, axis)


def _along(out, slopes, tangents, axis):
    """The derivative of `out`: the sum of gradient * tangent over classes. No gradient of a constant is computed."""
    pairs = zip(slopes, tangents, strict=True)
    terms = [_accurate.total(slope() * dz, axis) for slope, dz in pairs if type(dz) is not SymbolicZero]
    return sum(terms, jnp.zeros_like(out))


def _kl_slope_p(pair, axis):
    """-p d, and 0 where the divergence is infinite. The mean is taken once more, from near it."""

    def slope(pair, rest):
        p, _ = pair.probs(pair.p, pair.q)
        return jnp.where((p == 0) | pair.excluded, 0, -p * (pair.centred(pair.p, pair.q) - rest))

    return _accurate.each(slope, axis, pair, _mean(pair, axis))


def _kl_slope_q(pair, axis, kl):
    """q - p, through expm1 where they are close."""

    def slope(pair, kl):
        (p, q), t = pair.probs(pair.p, pair.q), pair.log_ratio(pair.p, pair.q, kl)
        return jnp.where((p > 0) & (t < 1), p * jnp.expm1(jnp.minimum(t, 1)), q - p)

    return _accurate.each(slope, axis, pair, kl)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def js_divergence(p_logits, q_logits, weight, axis):
    """sum_i m_i h(t_i), t = log q - log p and m = w p + (1 - w) q. A derivative takes the weight w for a constant."""
    pair, kl = _pair(p_logits, q_logits, axis), _finite_kl(p_logits, q_logits, axis)

    def term(k, p, q):
        t, (a, b) = pair.log_ratio(p, q, kl), pair.probs(p, q)
        t = jnp.where((p == -jnp.inf) == (q == -jnp.inf), t, jnp.where(p == -jnp.inf, _LARGE_GAP, -_LARGE_GAP))
        return jnp.maximum(p, q) > -jnp.inf, (weight * a + (1 - weight) * b) * _js_term(t, weight)

    undefined = _accurate.undefined(p_logits, axis) + _accurate.undefined(q_logits, axis)
    most = -(jax.scipy.special.xlogy(weight, weight) + jax.scipy.special.xlog1py(1 - weight, -weight))
    return jnp.minimum(_accurate.sum_where(term, axis, pair.p, pair.q), most) + undefined


# A log-ratio at which the smaller probability is nothing next to the larger, in every dtype.
_LARGE_GAP = 80.0


def _log_mixture(x, total):
    """log1p(x), total = 1 + x, as -log1p(-x / total) for x < 0: XLA's log1p errs by 240 u in float64 near -0.4."""
    size = jnp.log1p(jnp.where(x < 0, -x / total, x))
    return jnp.where(x < 0, -size, size)


def _js_term(t, weight):
    """h(t) = w r(L) + (1 - w) r(L - t) with L = log(m / p): the divergence of a class per unit of m, both terms >= 0.

    r(x) = 1 - (1 + x) e^-x = e^-x (e^x - 1 - x).
    """
    t = jnp.clip(t, -_LARGE_GAP, _LARGE_GAP)
    e, less, other = jnp.exp(t), jnp.expm1(t), 1 - weight
    of_p, of_q = weight + other * e, weight / e + other  # m / p and m / q
    low, high = _log_mixture(other * less, of_p), _log_mixture(-weight * less / e, of_q)
    return weight * _excess(low, 1 / of_p) + other * _excess(high, 1 / of_q)


def _excess(x, inverse):
    """1 - (1 + x) e^-x, given e^-x, with relative accuracy also where x is small."""
    near = jnp.clip(x, -1, 2)
    return jnp.where(near == x, inverse * _accurate.near_exp_remainder(near), 1 - (1 + x) * inverse)


@partial(js_divergence.defjvp, symbolic_zeros=True)
def _js_divergence_jvp(axis, primals, tangents):
    """`dJS = sum_i w p_i (log(p_i / m_i) - KL(p || m)) dz^p_i`, and the same for q with 1 - w."""
    p_logits, q_logits, weight = primals
    # Both weights from here: 1 - (1 - w) has no digit of a small w left.
    sides = (p_logits, q_logits, weight, 1 - weight), (q_logits, p_logits, 1 - weight, weight)
    out = js_divergence(*primals, axis)
    return out, _along(out, [partial(_js_slope, *side, axis) for side in sides], tangents[:2], axis)


def _js_slope(p_logits, q_logits, weight, other, axis):
    """`w p_i (l_i - <p, l>)` with `l_i = log(p_i / m_i) = -log(w + (1 - w) exp(t_i))`, less a constant that cancels.

    `other` is 1 - w. l itself is 0 for t = 0, where p and q agree; l + log w is 0 where q is far below p. The one that
    is small where p lies keeps the digits of the differences.
    """
    pair = _pair(p_logits, q_logits, axis)
    p, _ = pair.probs(pair.p, pair.q)
    t = pair.log_ratio(pair.p, pair.q, _finite_kl(p_logits, q_logits, axis))
    t = jnp.where((q_logits == -jnp.inf) & (p_logits > -jnp.inf), -_LARGE_GAP, t)
    capped = jnp.clip(t, -_LARGE_GAP, _LARGE_GAP)
    mixture = _log_mixture(other * jnp.expm1(capped), weight + other * jnp.exp(capped))
    near = -(mixture + jnp.maximum(t - _LARGE_GAP, 0))
    s = t + jnp.log(other / jnp.maximum(weight, jnp.finfo(t.dtype).tiny))
    below = -jnp.maximum(s, 0) - jnp.log1p(jnp.exp(-jnp.abs(s)))
    far = _accurate.total(p * t, axis) < -1
    return weight * p * _accurate.centred(p, jnp.where(far, below, near), axis)
