"""Rules of `linear_categorical`: losses and divergences of blocks of tokens, and the gradients made with them."""

from functools import partial
from itertools import compress

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from . import _accurate, _blocks, _categorical, _vocabulary


def counted(weights, x):
    """x, but 0 where the weight is: the replacement of such a token has a loss too, and so a gradient in the weight."""
    return jnp.where(weights == 0, 0, x)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def weighted_sum(form: _blocks.Form, numbers, hidden, kernel, bias, labels, weights):
    """sum_i w_i loss_i, and of each token what `Aux` holds."""
    loss, *aux = losses(form, numbers, hidden, kernel, bias, labels, weights.dtype)
    return jnp.sum(_accurate.multiply_no_nan(weights, counted(weights, loss))), aux


@partial(weighted_sum.defjvp, symbolic_zeros=True)
def _weighted_sum_jvp(form: _blocks.Form, primals, tangents):
    """The tangent `<dX, d hidden> + <dW, d kernel> + <db, d bias> + sum_i loss_i d w_i`, with dX, dW, db at once.

    The gradients are made together with the loss, from its logits. Reverse mode only scales them.
    """
    numbers, *operands, labels, weights = primals
    _, *directions, _, dweights = tangents
    moved = [x is not None and type(dx) is not SymbolicZero for x, dx in zip(operands, directions, strict=True)]
    loss, aux, slopes = _loss_and_slopes(form, moved, *primals)
    loss = counted(weights, loss)
    slope = jnp.zeros_like(out := jnp.sum(_accurate.multiply_no_nan(weights, loss)))
    for d, dx in zip(slopes, compress(directions, moved), strict=True):
        slope += _vocabulary.psum(jnp.sum(d * dx.astype(d.dtype)), form.axis)
    if type(dweights) is not SymbolicZero:
        slope += jnp.sum(jnp.where(jnp.isfinite(loss), loss, 0) * dweights)
    return (out, aux), (slope, _aux_tangents(form, numbers, moved, aux, operands, directions, labels))


def losses(form: _blocks.Form, numbers, hidden, kernel, bias, labels, dtype):
    """The losses of each token, by `_loss_rows`: differentiable by making the logits again."""

    def rows(z, labels):
        return _loss_rows(form, numbers, z, labels)[0]

    return _blocks.per_token(rows, form, [(hidden, kernel, bias)], numbers, labels, dtype=dtype)


def _aux_tangents(form: _blocks.Form, numbers, moved, aux, operands, directions, labels):
    """The tangents of nll and logsumexp, by making the logits again; unused, they cost nothing under `jit`."""
    if not (aux and any(moved)):
        return [jnp.zeros_like(x) for x in aux]

    def smooth(*values):
        values = iter(values)
        hidden, kernel, bias = (next(values) if move else x for x, move in zip(operands, moved, strict=True))
        return losses(form, numbers, hidden, kernel, bias, labels, aux[0].dtype)[1:3]

    _, (nll, logsumexp) = jax.jvp(smooth, [*compress(operands, moved)], [*compress(directions, moved)])
    return [nll, logsumexp, 0 * aux[2]]


def _loss_and_slopes(form: _blocks.Form, moved, numbers, hidden, kernel, bias, labels, weights):
    """Loss and aux per token, and the gradients of the weighted sum in those operands that move."""
    dtype = weights.dtype
    shape = _blocks.plan(form, hidden, kernel, dtype)
    varying = jax.tree.leaves((numbers, hidden, kernel, bias, labels, weights))

    def body(sums, block):
        x, y, w = block

        z, uncap = jax.vjp(partial(_blocks.cap, numbers), _blocks.plus(bias, _blocks.product(form, x, kernel, dtype)))
        (loss, *aux), slope = _loss_rows(form, numbers, z, y)
        (dz,) = uncap(w[:, None] * slope)
        steps = [_blocks.kernel_slope(form, x, dz), jnp.sum(dz, axis=0)]
        sums = [total + step for total, step in zip(sums, compress(steps, moved[1:]), strict=True)]
        return sums, (loss, aux, *([_blocks.hidden_slope(form, dz, kernel)] if moved[0] else []))

    starts = [jnp.zeros(kernel.shape, dtype), jnp.zeros(_blocks.num_classes(form, kernel), dtype)]
    starts = [_blocks.varying(start, *varying) for start in compress(starts, moved[1:])]
    sums, (loss, aux, *dx) = _blocks.scan(shape, body, starts, (hidden, labels, weights), in_place=True)
    return loss, aux, [*dx, *sums]


def _loss_rows(form: _blocks.Form, numbers: _blocks.Numbers, z, labels):
    """The results for each row: loss, and with `has_aux` nll, logsumexp and 1 for a label that is the mode.

    The gradient of the loss, `(1 - e) (p - y) + e (p - 1 / V) + 2 z_loss logsumexp p`, comes with them. It is written
    out: the transpose of a psum is another psum in a `shard_map` that does not check what varies.
    """
    axis, e, z_loss = form.axis, numbers.label_smoothing, numbers.z_loss
    if labels.ndim == 1:
        labels = labels[:, None]
        nll, residual, log_total, p = _vocabulary.nll_terms(z, labels, axis)
    else:
        z = _accurate.kept(z)  # the class at the maximum is found by comparison
        nll, residual = _categorical.target_terms(z, labels.astype(z.dtype), axis)
        log_total, p = _vocabulary.normaliser(z, axis)[1], _accurate.probs(z, axis)
        labels = _vocabulary.mode(labels, axis)
    loss, slope, outputs = nll, residual, ()
    if e is not None or z_loss is not None or form.has_aux:
        top = _vocabulary.finite_top(z, axis)
        logsumexp = top + log_total
        outputs = (nll, logsumexp, (_vocabulary.mode(z, axis).astype(labels.dtype) == labels).astype(z.dtype))
        if e is not None:
            count, gaps = z.shape[1] * _vocabulary.shards(axis), z - top
            target = e / count
            if form.has_bias:  # which may exclude classes; to count them costs two passes
                possible = z > -jnp.inf
                count = jnp.maximum(_accurate.total(possible.astype(z.dtype), axis), 1)
                target, gaps = jnp.where(possible, e / count, 0), jnp.where(possible, gaps, 0)
            smooth = log_total - _accurate.total(gaps, axis) / count
            # At e = 1 an infinite loss of the label does not count: 0 * inf is NaN. A NaN stays one.
            loss = jnp.where(jnp.isinf(nll) & (e == 1), 0, (1 - e) * nll) + e * smooth
            slope = (1 - e) * residual + (e * p - target)
        if z_loss is not None:
            loss += z_loss * jnp.square(logsumexp)
            slope += 2 * z_loss * logsumexp * p
    return [x[:, 0] for x in (loss, *(outputs if form.has_aux else ()))], slope


def divergence(form: _blocks.Form, p, q, *, reverse=False):
    return _categorical.kl_divergence(*((q, p) if reverse else (p, q)), form.axis)[:, 0]


def top_divergence(form: _blocks.Form, z, log_probs, indices, inside):
    """KL(t || s) of a teacher t over k classes: within them, and log1p of the odds against them."""
    place, here, logits = _vocabulary.logits_at(z, indices, form.axis)
    within = _vocabulary.psum(jnp.where(here, logits, 0), form.axis)
    # If the student excludes all of them, they are no distribution that a divergence could be taken from.
    excluded = jnp.all(within == -jnp.inf, axis=1, keepdims=True)
    within = jnp.where(excluded, 0, within)
    # A finite logit beyond all use, since a row without any class is no distribution.
    place = jnp.where(here, place, z.shape[1])
    outside = z.at[jnp.arange(z.shape[0])[:, None], place].set(jnp.finfo(z.dtype).min / 8, mode="drop")
    (top_in, log_in), (top_out, log_out) = _vocabulary.normaliser(within, 1), _vocabulary.normaliser(outside, form.axis)
    odds = (top_out - top_in) + (log_out - log_in)
    loss = _categorical.kl_divergence(log_probs, within, 1) + jax.nn.softplus(odds)
    loss = jnp.where(excluded, jnp.inf + _accurate.undefined(z, form.axis), loss)
    return _accurate.nan_unless(inside, loss[:, 0])
