"""The accurate pieces that the public functions share.

`z` is an array of logits in the dtype computed in, `axis` its class axis, counted from the front, or `Sharded` where
several devices share the classes. A sum over classes keeps that axis with length 1. `shifted` is z - max z, never
positive. `sum_exp_below_max` is the sum of exp(shifted) over all classes but one maximum: 1 + that is the normaliser,
and it holds the digits that the sum with 1 rounds away. A row without a possible class (all -inf) is no distribution:
its value is NaN, and its derivatives are finite.

Masks are arithmetic (factors 0 and 1, minimums) where they meet an exponential: XLA on CPU fuses exp into the sum over
classes only while the expression holds no select, and otherwise writes all the exponentials to memory.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


def compute_dtype(*arrays: Array | jnp.dtype | float) -> jnp.dtype:
    """At least float32; float64 where an input has it."""
    with jax.numpy_dtype_promotion("standard"):  # a strict program asks that arrays are cast, which this dtype is for
        return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


class Sharded(NamedTuple):
    """A class axis inside `shard_map`: each device of the mesh axis `name` has its part of the classes on `axis`."""

    axis: int
    name: str


def total(x: Array, axis: int | Sharded) -> Array:
    """Sum over all classes."""
    if isinstance(axis, int):
        return jnp.sum(x, axis=axis, keepdims=True)
    return jax.lax.psum(jnp.sum(x, axis=axis.axis, keepdims=True), axis.name)


def maximum(z: Array, axis: int | Sharded) -> Array:
    """Maximum over all classes; that of several devices is a constant to a derivative, since `pmax` has none."""
    if isinstance(axis, int):
        return jnp.max(z, axis=axis, keepdims=True)
    return jax.lax.pmax(jax.lax.stop_gradient(jnp.max(z, axis=axis.axis, keepdims=True)), axis.name)


def nan_unless(ok: Array, x: Array) -> Array:
    """x where `ok`, NaN elsewhere, with a gradient of exactly 0 there: what is left out downstream poisons nothing.

    The NaN is computed, not a constant: XLA on CPU (jax 0.10 and 0.12) makes a number of exp(where(ok, x, nan)), since
    LLVM may take any number for the integer part of a NaN that it knows of.
    """
    return jnp.where(ok, x, 0) + jnp.sqrt(jnp.where(ok, 0, -1).astype(x.dtype))


def undefined(z: Array, axis: int | Sharded) -> Array:
    """0 for a row with a possible class, NaN for one without, as a constant to a derivative."""
    return nan_unless(maximum(z, axis) != -jnp.inf, jnp.zeros((), z.dtype))


def shifted(z: Array, axis: int | Sharded) -> Array:
    """z - max z; -inf for each class of a row without a possible one, so that no derivative meets a NaN."""
    return z - finite_maximum(z, axis)


def finite_maximum(z: Array, axis: int | Sharded) -> Array:
    """`maximum`, but the lowest number in a row without a possible class, so that no difference is -inf + inf."""
    return jnp.maximum(maximum(z, axis), jnp.finfo(z.dtype).min)


def exp_shifted(z: Array, axis: int | Sharded) -> Array:
    """exp(shifted): 1 for a maximum.

    Its plain derivative is right too, up to a common factor, also for classes that tie: where a scan is rematerialised,
    jax takes a second derivative of this, and not by the rules of those that call it.
    """
    return jnp.exp(z - jax.lax.stop_gradient(finite_maximum(z, axis)))


def below_top(shifted: Array) -> Array:
    """1 for each class below the maximum, 0 for the maximum itself and for all that tie with it.

    Never less than 0: a logit that XLA computes twice, in two fusions, may be above its own maximum by a rounding.
    """
    return jax.lax.stop_gradient(jnp.clip(_lifted(shifted), 0, 1))


def _lifted(shifted: Array) -> Array:
    """0 at the maximum, above 1 elsewhere: the largest finite number lifts the smallest normal difference above 1."""
    return -shifted * jnp.finfo(shifted.dtype).max


def sum_exp_below_max(z: Array, axis: int | Sharded) -> Array:
    """Sum of exp(shifted) over all classes but one maximum, and 0 in a row without a possible class.

    Logits that come from a tanh or a quotient XLA on CPU may compute anew for each sum, with another rounding, so that
    a logit misses its own maximum. Below it, it is in the sum, is not counted as a tie, and 1 is taken off.
    """
    d = shifted(z, axis)
    exponentials = jnp.exp(d)
    # exp(shifted) is at most 1, so that the minimum leaves every maximum out and changes no other class.
    below = total(jnp.minimum(jax.lax.stop_gradient(jnp.maximum(_lifted(d), 0)), exponentials), axis)
    at_top = total(exponentials, axis) - below
    ties = jax.lax.stop_gradient(jnp.round(at_top))
    if not isinstance(axis, int):  # there the maximum is a constant to a derivative, and the classes at it are none
        ties += at_top - jax.lax.stop_gradient(at_top)
    return jnp.maximum(below + (ties - 1), 0)


def softmax(z: Array, axis: int | Sharded) -> Array:
    """`probs`, NaN in a row without a possible class."""
    return probs(z, axis) + undefined(z, axis)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def probs(z: Array, axis: int | Sharded) -> Array:
    """p_i = exp(z_i) / sum_j exp(z_j), and 0 in a row without a possible class. d p_i = p_i (dz_i - <p, dz>)."""
    e = exp_shifted(z, axis)
    return e / jnp.maximum(total(e, axis), 0.5)  # a sum without its maximum is 0


@probs.defjvp
def _probs_jvp(axis, primals, tangents):
    (z,), (dz,) = primals, tangents
    p = probs(z, axis)
    # Selected, so that in reverse mode an infinite cotangent of an impossible class (its log, say) stops here.
    return p, jnp.where(p == 0, 0, p * centred(p, dz, axis))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def log_softmax(z: Array, axis: int | Sharded) -> Array:
    """log p_i = shifted_i - log1p(sum_exp_below_max), both of one sign. d log p_i = dz_i - <p, dz>."""
    return shifted(z, axis) - (jnp.log1p(sum_exp_below_max(z, axis)) + undefined(z, axis))


@log_softmax.defjvp
def _log_softmax_jvp(axis, primals, tangents):
    (z,), (dz,) = primals, tangents
    return log_softmax(z, axis), centred(probs(z, axis), dz, axis)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def top_complement(z: Array, axis: int | Sharded) -> Array:
    """1 - max p = s / (1 + s) with s = sum_exp_below_max, which 1 - p would round to 0 once p is within u of 1."""
    others = sum_exp_below_max(z, axis)
    return others / (1 + others) + undefined(z, axis)


@top_complement.defjvp
def _top_complement_jvp(axis, primals, tangents):
    (z,), (dz,) = primals, tangents
    p = probs(z, axis)
    dp = p * centred(p, dz, axis)
    return top_complement(z, axis), -total(unique_top(z, axis) * dp, axis)


def unique_top(z: Array, axis: int | Sharded) -> Array:
    """1 for the maximum where nothing ties with it, else 0 everywhere (then no class has p > 1/2)."""
    top = 1 - below_top(shifted(z, axis))
    return top * (total(top, axis) == 1).astype(top.dtype)


def centred(p: Array, v: Array, axis: int | Sharded) -> Array:
    """v_i - <p, v>, linear in v, each entry of its matrix (delta_ij - p_j) accurate.

    Only 1 - p of a class with p > 1/2 could cancel. With v measured from that class, `a`, its own entry is 0: what is
    left is w_i - sum_{j != a} p_j w_j. The transpose, which reverse mode uses, leaves the class out of its sums alike.
    """
    large = jnp.finfo(p.dtype).max
    a = jax.lax.stop_gradient(jnp.clip((p - 0.5) * large, 0, 1))
    w = (1 - a) * (v - total(a * v, axis))
    return w - total(p * w, axis)


@jax.custom_jvp
def multiply_no_nan(weight: Array, value: Array) -> Array:
    """weight * value, with 0 * inf = 0: what has weight 0 does not count, however impossible it is."""
    return jnp.where(weight == 0, 0, weight * value)


@multiply_no_nan.defjvp
def _multiply_no_nan_jvp(primals, tangents):
    """d(w v) = v dw + w dv, without what is infinite or NaN: a derivative is finite where the value is not."""
    weight, value = (jnp.where(jnp.isfinite(x), x, 0) for x in primals)
    dweight, dvalue = tangents
    return multiply_no_nan(*primals), value * dweight + weight * dvalue


def dot_no_nan(weights: Array, shifted: Array, axis: int | Sharded) -> Array:
    """sum_i weight_i shifted_i over classes of positive weight: `multiply_no_nan` by arithmetic."""
    largest = jnp.finfo(shifted.dtype).max
    floor = -jnp.minimum(jnp.abs(weights) * largest, 4) * largest  # 0 where the weight is, else -inf
    return total(weights * jnp.maximum(shifted, floor), axis)


def exp_remainder(t: Array) -> Array:
    """e^t - 1 - t >= 0, with relative accuracy also where t is small."""
    near = jnp.clip(t, -1, 2)
    return near_exp_remainder(near) + (jnp.exp(t) - jnp.exp(near)) - (t - near)


def near_exp_remainder(t: Array) -> Array:
    """e^t - 1 - t >= 0 for -1 <= t <= 2: f(t) = (e^h - 1)^2 + 2 f(h) with h = t / 2, where f(h) is a series."""
    h = t / 2
    # h^2 (1 / 2! + h / 3! + ...): the first term left out is below u relative to 1 / 2!, for |h| <= 1.
    terms = [1 / math.factorial(n) for n in range(2, 20 if t.dtype == jnp.float64 else 12)]
    series = jnp.full_like(h, terms[-1])
    for term in terms[-2::-1]:
        series = series * h + term
    f = h * h * series
    return jnp.square(f + h) + 2 * f


def difference(a: Array, b: Array | float) -> tuple[Array, Array]:
    """a - b as the rounded difference and its rounding error (Knuth's two-sum)."""
    high = a - b
    b_seen = high - a
    return high, (a - (high - b_seen)) - (b + b_seen)


@jax.custom_jvp
def divide(a: Array, b: Array) -> Array:
    """a / b, whose derivative (da - (a / b) db) / b never squares b, as that of jnp does: 1e-30 has no square."""
    return a / b


@divide.defjvp
def _divide_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    ratio = divide(a, b)
    return ratio, divide(da, b) - ratio * divide(db, b)
