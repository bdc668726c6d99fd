"""The accurate pieces that the public functions share.

`z` is an array of logits in the dtype computed in. `axis` is its class axis, counted from the front, or `Sharded` if
several devices share the classes. A sum over classes keeps that axis with length 1. `shifted` is z - max z, never
positive. `sum_exp_below_max` is the sum of exp(shifted) over all classes but one maximum: 1 + that is the normaliser,
and it holds the digits that the sum with 1 rounds away. A row without a possible class (all -inf) is no distribution:
its value is NaN, and its derivatives are finite.

A sum that leaves a class out is a `fold`. XLA on CPU hands every sum of 4096 elements or more to a library that knows
no select. XLA writes all K terms to memory before such a sum. `fold` adds up slices of the class axis lane by lane.
Only the sum of the lanes is left to the library.

The plain derivative of each piece is right too. A scan needs that: jax takes the second derivative of the functions in
a rule there, and not by their rules.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
    return _psum(_sum(x, axis), axis)


def _sum(x, axis):
    return jnp.sum(x, axis=_place(axis), keepdims=True)


def _psum(x, axis):
    return x if isinstance(axis, int) else jax.lax.psum(x, axis.name)


def maximum(z: Array, axis: int | Sharded) -> Array:
    """Maximum over all classes; that of several devices is a constant to a derivative, since `pmax` has none."""
    if isinstance(axis, int):
        return jnp.max(z, axis=axis, keepdims=True)
    return jax.lax.pmax(jax.lax.stop_gradient(jnp.max(z, axis=axis.axis, keepdims=True)), axis.name)


def _place(axis: int | Sharded) -> int:
    return axis if isinstance(axis, int) else axis.axis


def _lanes(z: Array, axis: int | Sharded) -> int:
    """Classes of a slice: all of them where the array is small, or where the class axis is sharded explicitly."""
    size = z.shape[_place(axis)]
    if (size <= 16 and _small(z)) or jax.typeof(z).sharding.spec[_place(axis)] is not None:
        return size
    # LLVM vectorises 32 lanes without a remainder. At most 16 classes are one lane each.
    return 1 if size <= 16 else min(size, 32 * -(-size // 512))


def _small(z: Array) -> bool:
    """Whether an array is too small for a loop over rows to pay. One of a symbolic shape counts as large."""
    return isinstance(z.size, int) and z.size < 1024


def fold(step: Callable, carry: Any, last: Callable, axis: int | Sharded, *arrays: Array) -> Any:
    """carry = step(carry, classes, *slices) over slices of the class axis on CPU, over the whole axis elsewhere.

    `last(carry)` is the result: numbers per row, made of the lanes that the carry keeps on the class axis. They are the
    lanes of one device where the axis is `Sharded`. The last operation of `step` must be a select: XLA on CPU then
    makes one loop of all slices, with exp, select and + in registers.
    """
    place, size, lanes = _place(axis), arrays[0].shape[_place(axis)], _lanes(arrays[0], axis)

    def slices(lanes, *arrays):
        out = carry
        for start in range(0, size, lanes):
            low = min(start, size - lanes)  # the last slice overlaps the one before
            parts = [jax.lax.slice_in_dim(x, low, low + lanes, axis=place) for x in arrays]
            sharding = jax.typeof(parts[0]).sharding
            k = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, place, out_sharding=sharding) + low
            new = step(out, k, *parts)
            out = jax.tree.map(lambda a, b, k=k, s=start: jnp.where(k >= s, a, b), new, out) if low < start else new
        return last(out)

    if lanes == size:
        return slices(size, *arrays)
    return jax.lax.platform_dependent(*arrays, cpu=partial(slices, lanes), default=partial(slices, size))


def kept(x: Any) -> Any:
    """x, behind a barrier on CPU: XLA writes to memory what two passes share, and shares nothing across it."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def once(x: Array, z: Array, axis: int | Sharded) -> Array:
    """x, one number per row of `z`, which XLA on CPU repeats in each use unless it is a quotient."""
    if _lanes(z, axis) == z.shape[_place(axis)]:
        return x
    divided = lambda x: jax.lax.optimization_barrier(x / jnp.where(jnp.isnan(x), jnp.nan, 1).astype(x.dtype))  # noqa: E731
    return jax.lax.platform_dependent(x, cpu=divided, default=lambda x: x)


def each(f: Callable, axis: int | Sharded, *arrays: Any) -> Array:
    """f(*arrays), a number per class of arrays that keep all axes.

    LLVM vectorises the innermost loop alone, which is too short over few classes. On CPU it is then one over rows.
    """
    place, z = _place(axis), jax.tree.leaves(arrays)[0]
    if not 1 < z.shape[place] <= 16 or _small(z) or jax.typeof(z).sharding.spec[place] is not None:
        return f(*arrays)

    def across(*arrays):
        out = f(*jax.tree.map(lambda x: jnp.moveaxis(x, place, 0), arrays))
        return jnp.moveaxis(kept(out), 0, place)  # without the barrier XLA may take both transpositions out

    return jax.lax.platform_dependent(*arrays, cpu=across, default=f)


def sum_where(term: Callable, axis: int | Sharded, *arrays: Array) -> Array:
    """Sum over classes of x where keep, with keep, x = term(classes, *slices)."""

    def step(acc, k, *parts):
        keep, x = term(k, *parts)
        return jnp.where(keep, acc + x, acc)

    sums = fold(step, jnp.zeros((), arrays[0].dtype), partial(_sum, axis=axis), axis, *arrays)
    return once(_psum(sums, axis), arrays[0], axis)


def max_where(term: Callable, axis: int | Sharded, *arrays: Array) -> Array:
    """Largest x where keep, with keep, x = term(classes, *slices), and -inf where none is kept."""

    def step(most, k, *parts):
        keep, x = term(k, *parts)
        return jnp.where(keep, jnp.maximum(most, x), most)

    last = partial(jnp.max, axis=_place(axis), keepdims=True)
    x = fold(step, jnp.full((), -jnp.inf, arrays[0].dtype), last, axis, *arrays)
    return x if isinstance(axis, int) else jax.lax.pmax(x, axis.name)


def nan_unless(ok: Array, x: Array) -> Array:
    """x where `ok`, NaN elsewhere, with a gradient of exactly 0 there: what is left out downstream poisons nothing.

    The NaN is computed, not a constant: XLA on CPU (jax 0.10 and 0.12) makes a number of `exp(where(ok, x, nan))`. LLVM
    may take any number for the integer part of a NaN that it knows of.
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
    return jnp.maximum(kept(maximum(z, axis)), jnp.finfo(z.dtype).min)


def exp_shifted(z: Array, axis: int | Sharded) -> Array:
    """exp(shifted): 1 for a maximum. Its plain derivative is right up to a common factor."""
    return jnp.exp(z - jax.lax.stop_gradient(finite_maximum(z, axis)))


def sum_exp_below_max(z: Array, axis: int | Sharded, top: Array | None = None) -> Array:
    """Sum of exp(shifted) over all classes but one maximum, and 0 in a row without a possible class.

    Each lane leaves out the first class at the maximum that it has, and its sign says so. All but one of those classes
    tie: they count 1 each.

    Some logits come from a tanh or a quotient. XLA on CPU may compute them again for each sum, with another rounding. A
    logit then misses its own maximum. Below it, it is in the sum, is not counted as a tie, and 1 is taken off.
    """
    top = finite_maximum(z, axis) if top is None else top

    def step(carry, k, z):
        acc, seen = carry
        first, e = (z == top) & ~seen, jnp.exp(z - top)
        return jnp.where(first, acc + (e - 1), acc + e), seen | first  # e - 1 is 0, with the derivative of e

    def last(carry):
        # Below 0: a product in z and the difference from its maximum in one instruction, whose exp is below 1.
        acc, tiny = jnp.where(carry[0] < 0, 0, carry[0]), jnp.finfo(z.dtype).tiny
        lanes = jnp.where(carry[1], -acc - tiny, acc)  # at 0 the absolute value has no derivative
        size, seen = jnp.abs(lanes), jnp.signbit(lanes).astype(z.dtype)
        below, tops = _sum(size, axis), _sum(seen, axis)
        if lanes.shape == z.shape:  # one slice: what this sum left out, `seen` may count otherwise
            tops = jnp.round(jax.lax.stop_gradient(_sum(size + seen, axis) - below))
        return below - tops * tiny, tops

    below, tops = (_psum(x, axis) for x in fold(step, (jnp.zeros((), z.dtype), jnp.zeros((), bool)), last, axis, z))
    return once(jnp.maximum(below + (tops - 1), 0), z, axis)


def softmax(z: Array, axis: int | Sharded) -> Array:
    """`probs`, NaN in a row without a possible class."""
    return probs(z, axis, 0.0)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def probs(z: Array, axis: int | Sharded, least: float = 0.5) -> Array:
    """p_i = exp(z_i) / sum_j exp(z_j), and 0 in a row without a possible class. d p_i = p_i (dz_i - <p, dz>)."""
    e = exp_shifted(z, axis)
    return e / jnp.maximum(total(e, axis), least)  # a sum without its maximum is 0


@probs.defjvp
def _probs_jvp(axis, least, primals, tangents):
    (z,), (dz,) = primals, tangents
    p = probs(z, axis)
    # Selected, so that in reverse mode an infinite cotangent of an impossible class (its log, say) stops here.
    return probs(z, axis, least), jnp.where(p == 0, 0, p * centred(p, dz, axis))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def log_softmax(z: Array, axis: int | Sharded) -> Array:
    """log p_i = shifted_i - log1p(sum_exp_below_max), both of one sign. d log p_i = dz_i - <p, dz>."""
    top = finite_maximum(z, axis)
    return (z - top) - (jnp.log1p(sum_exp_below_max(z, axis, top)) + undefined(z, axis))


@log_softmax.defjvp
def _log_softmax_jvp(axis, primals, tangents):
    (z,), (dz,) = primals, tangents
    rows = normaliser(z, axis)
    log_total = once(jnp.log1p(rows.others) + undefined(z, axis), z, axis)
    return (z - rows.top) - log_total, centred(jnp.exp(z - rows.top) * rows.share, dz, axis)


class Normaliser(NamedTuple):
    """Numbers per row.

    Attributes:
      top: the maximum.
      others: `sum_exp_below_max`.
      share: 1 / (1 + others), the probability of a class at the maximum.
      lack: others / (1 + others), 1 minus that. 1 - p would round it to 0 once p is within u of 1.
      large: the logit of the one class with p > 1/2, or inf. LLVM vectorises one comparison with a number of the row
        next to an exponential, and no more.
    """

    top: Array
    others: Array
    share: Array
    lack: Array
    large: Array


def normaliser(z: Array, axis: int | Sharded) -> Normaliser:
    top = finite_maximum(z, axis)
    others = sum_exp_below_max(z, axis, top)
    rows = 1 / (1 + others), others / (1 + others), jnp.where(others < 1, top, jnp.inf)
    return Normaliser(kept(top), others, *(once(x, z, axis) for x in rows))


def top_complement(z: Array, axis: int | Sharded) -> Array:
    """1 - max p."""
    return normaliser(z, axis).lack + undefined(z, axis)


def centred(p: Array, v: Array, axis: int | Sharded) -> Array:
    """`v_i - <p, v>`, linear in v, each entry of its matrix `delta_ij - p_j` accurate, and of its transpose too.

    Only 1 - p of a class with p > 1/2 could cancel. A single pass takes the sum of the others for 1 - p. A CPU prefers
    two: with v measured from that class, its own entry is 0, and the others need no 1 - p.
    """
    large = jnp.finfo(p.dtype).max

    def one_pass(p, v):
        top = jax.lax.stop_gradient((p > 0.5).astype(p.dtype))
        below = 1 - top
        lack, of_top, of_rest = (total(x, axis) for x in (below * p, top * p * v, below * p * v))
        return (below + top * lack) * v - below * of_top - of_rest

    def two_passes(p, v):
        # The barrier hides that it is 0. A clamp, and what follows a sum without a select, are slow with the library.
        zero = jax.lax.optimization_barrier(jnp.zeros((), p.dtype))
        row = lambda x: jnp.where(zero == 0, total(x, axis), 0)  # noqa: E731
        below = jax.lax.stop_gradient(jnp.maximum(jnp.minimum((0.5 - p) * large + 1, 1), zero))
        w = below * (v - row((1 - below) * v))
        return w - row(p * w)

    if not isinstance(axis, int) or _lanes(p, axis) == p.shape[axis]:
        return one_pass(p, v)
    return jax.lax.platform_dependent(p, v, cpu=two_passes, default=one_pass)


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
    """a / b with the derivative `(da - (a / b) db) / b`. b is never squared, as it is by jnp: 1e-30 has no square."""
    return a / b


@divide.defjvp
def _divide_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    ratio = divide(a, b)
    return ratio, divide(da, b) - ratio * divide(db, b)
