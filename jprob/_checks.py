"""Checks of arguments, each answered by one line that names the function, what was expected and what came.

Static faults (dtype, shape, axis, a Python number out of range) raise ValueError while the function is traced. Faults
of the data cannot raise under `jit`. They are traced only under `jprob.checkify`, since a check is an effect. A program
with an effect leaves the fast dispatch path of `jit`.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify as jax_checkify

from . import _accurate

P = ParamSpec("P")
T = TypeVar("T")

# A user context is part of every cache key of jax: what is traced with checks never serves a call without them.
_checking = jax.make_user_context(False)


def checkify(function: Callable[P, T]) -> Callable[P, tuple[jax_checkify.Error, T]]:
    """`jax.experimental.checkify.checkify(function)`, with the data checks of jprob switched on.

    Use it to find bad data: a label out of range, a negative scale, probabilities passed as logits. It works through
    `jit`, `vmap`, `scan`, `grad`, `mle.step` and `mle.run`. Outside of it no jprob function checks data, so that no
    call pays for it.

    Args:
      function: any function of arrays that calls jprob functions.

    Returns:
      A function of the same arguments. It returns the pair `(error, result)`, shapes and dtypes of the result
      unchanged. `error.get()` is the message of the first failed check, or None. `error.throw()` raises it.

    A limit of jax: a check inside a `scan` is lost when the whole scan is differentiated. Take `checkify` of the scan,
    or the gradient inside of it.

    >>> from jprob import categorical
    >>> error, loss = checkify(categorical.cross_entropy)(jnp.zeros((2, 3)), jnp.array([0, 7]))
    >>> print(error.get().split(" (")[0])
    cross_entropy: label 7 is outside [0, 3)
    """
    checked = jax_checkify.checkify(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> tuple[jax_checkify.Error, T]:
        with _checking(True):
            return checked(*args, **kwargs)

    return call


class Range(NamedTuple):
    """The values that a number may have: in words, and as a condition on a Python number or an array."""

    words: str
    holds: Callable[[Any], Any]


UNIT_INTERVAL = Range("in [0, 1]", lambda x: (x >= 0) & (x <= 1))
NOT_NEGATIVE = Range("at least 0", lambda x: x >= 0)
FINITE_NOT_NEGATIVE = Range("finite and at least 0", lambda x: (x >= 0) & (x < math.inf))
# A subnormal number may be 0 on a device, and its inverse is not finite.
FINITE_POSITIVE = Range(
    "finite and above 0", lambda x: (x >= jnp.finfo(jnp.result_type(x, float)).tiny) & (x < math.inf)
)


def public(*, static: Sequence[str] = (), **numbers: Range) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a public function: `jax.jit`, with every wrong argument answered by one line.

    `static` names the static arguments. `numbers` are keyword arguments that may be swept or annealed: they are traced,
    so a new value compiles nothing. A Python number among them is checked against its range at once. One equal to the
    default is dropped. The function then sees its default as a Python number, and leaves out what it switches on.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name, signature = function.__name__, inspect.signature(function)

        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            # Under `disable_jit` numpy arrays come as they are, of a dtype that a program without x64 has not.
            args, kwargs = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, (args, kwargs))
            return function(*args, **kwargs)

        compiled = jax.jit(traced, static_argnames=tuple(static))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for number, range in numbers.items():
                value = kwargs.get(number)
                if isinstance(value, int | float):
                    if not range.holds(value):
                        raise ValueError(f"{name}: {number} must be {range.words}, got {value!r}")
                    if value == signature.parameters[number].default:
                        del kwargs[number]
            try:
                return compiled(*args, **kwargs)
            except (TypeError, ValueError, OverflowError) as error:
                known = str(error).startswith(f"{name}: ")
                fault = None if known else _fault(name, signature, static, args, kwargs)
                if fault is None:
                    raise
                raise ValueError(fault) from None

        setattr(call, "compiled", compiled)  # noqa: B010, for `lower` and the like
        return call

    return decorate


def _fault(function, signature, static, args, kwargs):
    """The fault of the arguments that `jit` refused, or None if they are not to blame."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        return f"{function}: {error}"
    for name, value in given.items():
        if name in static:
            try:
                hash(value)
            except TypeError:
                got = describe(value) if hasattr(value, "dtype") or "\n" in repr(value) else repr(value)
                return f"{function}: {name} is static and must be a hashable Python value, got {got}"
        elif name == "key":
            if not _is_key(value):
                return f"{function}: key must be one key, as jax.random.key makes it, got {describe(value)}"
        elif value is not signature.parameters[name].default:
            for leaf in value if hasattr(value, "_fields") else [value]:
                if isinstance(leaf, int) and not -(2**31) <= leaf < 2**31:
                    return f"{function}: {name} must be a number that fits its dtype, got the integer {leaf}"
                if isinstance(leaf, jax.ShapeDtypeStruct):
                    return f"{function}: {name} must be an array of real numbers, got a ShapeDtypeStruct"
                if not (isinstance(leaf, int | float) or holds(leaf, *_REAL)):
                    return f"{function}: {name} must be an array of real numbers, got {describe(leaf)}"
    return None


def _is_key(value):
    dtype, shape = getattr(value, "dtype", jnp.dtype(bool)), getattr(value, "shape", None)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return shape == ()
    return dtype == jnp.uint32 and shape == jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


def describe(value: Any) -> str:
    """`float32[3, 4]` for an array, the type's name for anything else."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__


_REAL = (jnp.bool_, jnp.integer, jnp.floating)


def holds(value: Any, *kinds: Any) -> bool:
    """Whether it is an array of one of these kinds of numbers. Floating-point numbers have 16 bits or more."""
    dtype: Any = getattr(value, "dtype", object)
    small = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 2
    return any(jnp.issubdtype(dtype, kind) for kind in kinds) and not small


def floating(function: str, **arguments: Any) -> None:
    """Each argument is an array of real floating-point numbers of 16 bits or more."""
    for name, value in arguments.items():
        if not holds(value, jnp.floating):
            raise ValueError(f"{function}: {name} must be a floating-point array, got {describe(value)}")


def real(function: str, **arguments: Any) -> None:
    """Each argument is an array of bool, integers, or floating-point numbers of 16 bits or more."""
    for name, value in arguments.items():
        if not holds(value, *_REAL):
            raise ValueError(f"{function}: {name} must be an array of real numbers, got {describe(value)}")


def axis_of(function: str, name: str, array: jax.Array, axis: int, entry: str) -> int:
    """`axis` counted from the front. It holds at least one entry of the array, the argument called `name`."""
    if not isinstance(axis, int) or isinstance(axis, bool) or not -array.ndim <= axis < array.ndim:
        raise ValueError(f"{function}: axis must be an axis of {name} {describe(array)}, got {axis!r}")
    if array.shape[axis] == 0:
        raise ValueError(f"{function}: expected at least one {entry} on axis {axis} of {name}, got {describe(array)}")
    return axis % array.ndim


def class_axis(function: str, logits: jax.Array, axis: int) -> int:
    """`axis` counted from the front, of logits that are floating-point and, under checkify, no probabilities."""
    floating(function, logits=logits)
    axis = axis_of(function, "logits", logits, axis, "class")
    logits_not_probs(function, logits, axis)
    return axis


def size(function: str, name: str, value: Any, largest: int) -> None:
    """`value` is a Python integer in [1, largest]."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise ValueError(f"{function}: {name} must be an integer in [1, {largest}], got {value!r}")


def same_shape(function: str, expected: str, got: str, shape: Sequence[int], value: jax.Array) -> None:
    """`value`, called `got` in the signature, has the shape of the argument called `expected`."""
    if value.shape != tuple(shape):
        raise ValueError(f"{function}: {got} must have the shape {list(shape)} of {expected}, got {describe(value)}")


def mask(function: str, where: jax.Array, logits: jax.Array) -> None:
    """`where` is boolean and broadcasts to the shape of `logits`."""
    if not holds(where, jnp.bool_):
        raise ValueError(f"{function}: where must be a boolean array, got {describe(where)}")
    broadcasts(function, "where", where, logits)


def broadcasts(function: str, name: str, value: jax.Array, array: jax.Array, expected: str = "logits") -> None:
    """`value` broadcasts to the shape of `array`, the argument called `expected`, without making it larger."""
    pairs = zip(value.shape[::-1], array.shape[::-1], strict=False)
    if value.ndim > array.ndim or any(n not in (1, k) for n, k in pairs):
        shape = list(array.shape)
        raise ValueError(f"{function}: {name} must broadcast to {shape} of {expected}, got {describe(value)}")


def expect(ok: jax.Array, value: jax.Array, message: str) -> None:
    """Under checkify: `ok` holds everywhere, else `message` with the largest offending `value` in its `{value}`."""
    if not _checking.value or ok.size == 0:
        return
    value = value.astype(jnp.int8) if value.dtype == jnp.bool_ else value  # bool has no largest
    info = jnp.finfo if jnp.issubdtype(value.dtype, jnp.floating) else jnp.iinfo
    # A reduction, since no element can be taken out of an array that is sharded explicitly.
    jax_checkify.check(jnp.all(ok), message, value=jnp.max(jnp.where(ok, info(value.dtype).min, value)))


def logits_not_probs(function: str, logits: jax.Array, axis: int) -> None:
    """Under checkify: the rows of `logits` are not probabilities, which a second softmax would flatten."""
    if not _checking.value or logits.size <= logits.shape[axis] or logits.shape[axis] == 1:
        return  # a single row may sum to 1 by chance
    total = jnp.sum(logits, axis=axis, dtype=_accurate.compute_dtype(logits))
    # Rows of 0 and 1 alone do not count as probabilities: they may be a one-hot bias of true logits.
    fractional = jnp.any((logits > 0) & (logits < 1), axis=axis)
    probs = jnp.all((logits >= 0) & (logits <= 1), axis=axis) & fractional & (jnp.abs(total - 1) < 2**-8)
    message = f"{function}: logits are probabilities (their rows sum to {{value}}); pass their logarithm"
    jax_checkify.check(~jnp.all(probs), message, value=jnp.max(total))


def classes(function: str, name: str, value: jax.Array, expected: str, shape: Sequence[int]) -> jax.Array:
    """Integer classes in the shape of the argument called `expected`, of 32 bits at least.

    A label of a smaller dtype could not be compared with the number of classes: 256 is 0 in uint8.
    """
    if not holds(value, jnp.integer):
        raise ValueError(f"{function}: {name} must be integer classes, got {describe(value)}")
    same_shape(function, expected, name, shape, value)
    value = jnp.asarray(value)
    return value if value.dtype.itemsize >= 4 else value.astype(jnp.int32)


def in_range(function: str, name: str, value: jax.Array, num_classes: int, counted: Any = True) -> jax.Array:
    """Whether each class lies in [0, num_classes); under checkify, all those that are `counted` do."""
    inside = (value >= 0) & (value < num_classes)
    expect(inside | ~jnp.asarray(counted), value, f"{function}: {name} {{value}} is outside [0, {num_classes})")
    return inside


def targets_are_probs(function: str, targets: jax.Array, axis: int) -> None:
    """Under checkify: target distributions are not negative and sum to 1."""
    expect(targets >= 0, targets, f"{function}: target {{value}} is negative")
    total = jnp.sum(targets, axis=axis)
    # Wide enough for targets rounded to bfloat16: each class errs by at most 2**-9 of itself, so the sum does too.
    expect(jnp.abs(total - 1) <= 2**-8, total, f"{function}: a row of targets sums to {{value}}, not 1")


def weights(function: str, expected: str, shape: Sequence[int], value: jax.Array | None) -> jax.Array:
    """Weights (real numbers or bool, one for each example of the argument called `expected`), in float32 at least.

    A negative one is NaN. None is 1 for each example.
    """
    value = jnp.ones(shape, jnp.float32) if value is None else value
    real(function, weights=value)
    same_shape(function, expected, "weights", shape, value)
    value = jnp.asarray(value).astype(_accurate.compute_dtype(value))
    expect(value >= 0, value, f"{function}: weight {{value}} is negative")
    return _accurate.nan_unless(value >= 0, value)


def number(function: str, name: str, value: Any, range: Range, dtype: jnp.dtype) -> jax.Array:
    """One number, traced or not, in `dtype`: NaN outside of its range."""
    value = jnp.asarray(value)
    if value.ndim or not holds(value, jnp.floating, jnp.integer):
        raise ValueError(f"{function}: {name} must be one real number, got {describe(value)}")
    value = value.astype(dtype)
    expect(range.holds(value), value, f"{function}: {name} {{value}} is not {range.words}")
    return _accurate.nan_unless(range.holds(value), value)


def broadcast_together(function: str, **arguments: Any) -> list[jax.Array]:
    """Real arguments (arrays or numbers), broadcast to one shape and cast to the dtype computed in."""
    dtype = _accurate.compute_dtype(*arguments.values())
    arrays = {name: jnp.asarray(value) for name, value in arguments.items()}
    real(function, **arrays)
    shape = broadcast_shape(function, arrays)
    return [jnp.broadcast_to(array, shape).astype(dtype) for array in arrays.values()]


def broadcast_shape(function: str, arrays: dict[str, jax.Array], shapes: Sequence[Sequence[int]] = ()) -> Sequence[int]:
    """The shape that the arrays broadcast to, or the given parts of their shapes.

    One of them has it already, unless all have equally many axes: [3] with [3, 1] is rarely meant to be [3, 3].
    """
    shapes = [tuple(shape) for shape in shapes or [array.shape for array in arrays.values()]]
    try:
        shape = jnp.broadcast_shapes(*shapes)
    except ValueError:
        shape = None
    if shape is None or (shape not in shapes and len({len(s) for s in shapes if s}) > 1):
        got = ", ".join(f"{name} {describe(array)}" for name, array in arrays.items())
        raise ValueError(f"{function}: expected shapes that broadcast to that of one argument, got {got}")
    return shape


def nats_to(function: str, base: float | None) -> float:
    """Factor from nats to the unit of `base`."""
    if base is None:
        return 1.0
    if not isinstance(base, int | float) or not 1 < base < math.inf:
        raise ValueError(f"{function}: base must be a number above 1, or None for nats, got {base!r}")
    return 1 / math.log(base)


def sample_shape(function: str, shape: Sequence[int] | None, batch: Sequence[int], name: str) -> tuple[int, ...]:
    """The shape of a sample: `batch`, or a given one that ends in it."""
    batch = tuple(batch)
    if shape is None:
        return batch
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"{function}: shape must be a tuple of integers, got {shape!r}")
    if shape[len(shape) - len(batch) :] != batch:
        raise ValueError(f"{function}: shape must end in {list(batch)}, the shape of {name}, got {list(shape)}")
    return shape
