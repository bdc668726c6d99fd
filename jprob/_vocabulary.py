"""Rows of logits over a vocabulary that may be sharded: modes, noise, and the logits of given classes.

`z` is [tokens, classes]. `axis` is 1, or `Sharded` inside `shard_map`, where each device has a part of the classes.
"""

from functools import partial

import jax
import jax.numpy as jnp

from . import _accurate

_NOISE = 128  # classes that draw with one key


def shards(axis):
    return 1 if isinstance(axis, int) else jax.lax.axis_size(axis.name)


def _offset(z, axis):
    """The number of the first class of this shard."""
    return 0 if isinstance(axis, int) else jax.lax.axis_index(axis.name) * z.shape[1]


def psum(x, axis):
    return x if isinstance(axis, int) else jax.lax.psum(x, axis.name)


def finite_top(z, axis):
    return jax.lax.stop_gradient(_accurate.finite_maximum(z, axis))


def mode(z, axis):
    """The first class at the maximum; the first NaN, where one is."""
    place = jax.lax.argmax(z, 1, jnp.int32)[:, None] + _offset(z, axis)
    if isinstance(axis, int):
        return place
    local = jax.lax.stop_gradient(jnp.max(z, axis=1, keepdims=True))
    # A NaN is above +inf; the maximum of several devices may drop it.
    is_nan = jnp.isnan(local)
    nowhere = jax.lax.pmax(is_nan.astype(jnp.int32), axis.name) == 0
    first = is_nan | (nowhere & (local == jax.lax.pmax(local, axis.name)))
    return jax.lax.pmin(jnp.where(first, place, 2**31 - 1), axis.name)


def folded(key, numbers):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)


def noise(keys, z, axis):
    """Gumbel noise for each token, by its key, and class: that of a class does not depend on the shard that has it.

    `_NOISE` classes, counted from the first of all, draw with one key. A shard may begin and end within them.
    """
    size, first = z.shape[1], _offset(z, axis)
    count = size // _NOISE
    if size % _NOISE:
        count += 1 if isinstance(axis, int) else 2
    draw = partial(jax.random.gumbel, shape=(_NOISE,), dtype=z.dtype, mode="high")

    def row(key):
        noise = jax.vmap(draw)(folded(key, first // _NOISE + jnp.arange(count)))
        return jax.lax.dynamic_slice_in_dim(noise.ravel(), first % _NOISE, size)

    return jax.vmap(row)(keys)


def _label_terms(z, labels, axis):
    """exp(gap) with 0 for the label, the mask of the label, the sum of the former, and the label's gap.

    One pass over z: a mask of its size would be written to memory for each sum that it enters.
    """
    top = finite_top(z, axis)
    place, here, label_logit = logits_at(z, labels, axis)
    at_label = jnp.arange(z.shape[1], dtype=place.dtype)[None] == place
    never = jnp.minimum(top, -jnp.inf)  # a constant would be an array of the size of z, kept through the loop
    others = jnp.exp(jnp.where(at_label, never, z - top))
    return others, at_label, _accurate.total(others, axis), psum(jnp.where(here, label_logit - top, 0), axis)


def logits_at(z, classes, axis):
    """The places of these classes of each row in this shard, whether they are in it, and their logits."""
    place = classes - jnp.asarray(_offset(z, axis), classes.dtype)
    here = (place >= 0) & (place < z.shape[1])
    return place, here, jnp.take_along_axis(z, jnp.where(here, place, 0), axis=1, mode="promise_in_bounds")


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def nll_terms(z, labels, axis):
    """-log p_y = `log1p(others exp(-gap)) = log_total - gap`, y left out of the others, and its gradient p - y.

    Two more results: `log_total = log1p(others + (exp(gap) - 1))`, the logarithm of the sum of all exponentials, and
    its gradient p.

    Near the maximum the first form keeps the digits of the others. XLA may compute a tanh or a quotient again for the
    label alone. The label then misses its own maximum by a rounding. The form holds there too. Far below the maximum,
    others is at least 1, and there is no small number to keep. p - y is p_j for the others, and minus their sum for y,
    never p_y - 1. All are plainly differentiable: a rematerialised scan takes a second derivative of what is written
    here, and not by the rule.
    """
    exponentials, at_label, others, gap = _label_terms(z, labels, axis)
    log_total, total = jnp.log1p(others + jnp.expm1(gap)), jnp.maximum(others + jnp.exp(gap), 0.5)
    nll = jnp.where(gap > -1, jnp.log1p(others * jnp.exp(-jnp.maximum(gap, -1))), log_total - gap)
    p, residual = (jnp.where(at_label, x, exponentials) / total for x in (jnp.exp(gap), -others))
    return nll, residual, log_total, p


@nll_terms.defjvp
def _nll_terms_jvp(axis, primals, tangents):
    """d(p_j - y_j) = p_j (dz_j - <p, dz>): measured from the class with p > 1/2, if there is one, no 1 - p cancels."""
    (z, labels), (dz, _) = primals, tangents
    nll, residual, log_total, p = nll_terms(z, labels, axis)
    dp = p * _accurate.centred(p, dz, axis)
    dnll, dlog_total = (_accurate.total(x * dz, axis) for x in (residual, p))
    return (nll, residual, log_total, p), (dnll, dp, dlog_total, dp)


def normaliser(z, axis):
    """Maximum and log sum_j exp(z_j - max). The value is by `sum_exp_below_max`, the derivative plain."""
    plain = jnp.log(_accurate.total(_accurate.exp_shifted(z, axis), axis))
    value = jnp.log1p(_accurate.sum_exp_below_max(z, axis))
    return finite_top(z, axis), jax.lax.stop_gradient(value) + (plain - jax.lax.stop_gradient(plain))
