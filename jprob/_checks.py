"""What a function demands of its arguments, said in one line.

Static faults (dtype, shape, axis) raise ValueError while the function is traced. Faults of the data cannot raise under
`jit`: they are stated as `checkify.debug_check`, which costs nothing until the caller wraps the program in
`checkify.checkify` and then reads `cross_entropy: label 7 is outside [0, 3)`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify


def describe(value: Any) -> str:
    """`float32[3, 4]` for an array, the type's name for anything else."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__


def floating(function: str, **arguments: Any) -> None:
    """Each argument is an array of real floating-point numbers."""
    for name, value in arguments.items():
        if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{function}: {name} must be a floating-point array, got {describe(value)}")


def class_axis(function: str, logits: jax.Array, axis: int) -> int:
    """`axis` counted from the front."""
    if not isinstance(axis, int) or isinstance(axis, bool) or not -logits.ndim <= axis < logits.ndim:
        raise ValueError(f"{function}: axis must be an axis of logits {describe(logits)}, got {axis!r}")
    if logits.shape[axis] == 0:
        raise ValueError(f"{function}: expected at least one class on axis {axis} of logits, got {describe(logits)}")
    return axis % logits.ndim


def same_shape(function: str, expected: str, got: str, shape: Sequence[int], value: jax.Array) -> None:
    """`value`, called `got` in the signature, has the shape of the argument called `expected`."""
    if value.shape != tuple(shape):
        raise ValueError(f"{function}: {got} must have the shape {list(shape)} of {expected}, got {describe(value)}")


def mask(function: str, where: jax.Array, logits: jax.Array) -> None:
    """`where` is boolean and broadcasts to the shape of `logits`."""
    if not hasattr(where, "dtype") or where.dtype != jnp.bool_:
        raise ValueError(f"{function}: where must be a boolean array, got {describe(where)}")
    broadcasts(function, "where", where, logits)


def broadcasts(function: str, name: str, value: jax.Array, logits: jax.Array) -> None:
    """`value` broadcasts to the shape of `logits`, without making it larger."""
    trailing = logits.shape[logits.ndim - value.ndim :] if value.ndim <= logits.ndim else None
    if trailing is None or any(n not in (1, k) for n, k in zip(value.shape, trailing, strict=True)):
        raise ValueError(f"{function}: {name} must broadcast to {list(logits.shape)} of logits, got {describe(value)}")


def expect(ok: jax.Array, value: jax.Array, message: str) -> None:
    """Under checkify: `ok` holds everywhere, else `message` with the largest offending `value` in its `{value}`."""
    if ok.size == 0:
        return
    value = value.astype(jnp.promote_types(value.dtype, jnp.int8))  # bool has no order
    info = jnp.finfo if jnp.issubdtype(value.dtype, jnp.floating) else jnp.iinfo
    # A reduction, since no element can be taken out of an array that is sharded explicitly.
    checkify.debug_check(jnp.all(ok), message, value=jnp.max(jnp.where(ok, info(value.dtype).min, value)))


def logits_not_probs(function: str, logits: jax.Array, axis: int) -> None:
    """Under checkify: the rows of `logits` are not probabilities, which a second softmax would flatten."""
    if logits.size <= logits.shape[axis] or logits.shape[axis] == 1:
        return  # a single row may sum to 1 by chance
    total = jnp.sum(logits, axis=axis, dtype=jnp.promote_types(logits.dtype, jnp.float32))
    # Rows of 0 and 1 alone may be a one-hot bias of true logits, so that they do not count as probabilities.
    fractional = jnp.any((logits > 0) & (logits < 1), axis=axis)
    probs = jnp.all((logits >= 0) & (logits <= 1), axis=axis) & fractional & (jnp.abs(total - 1) < 2**-8)
    message = f"{function}: logits are probabilities (their rows sum to {{value}}); pass their logarithm"
    checkify.debug_check(~jnp.all(probs), message, value=jnp.max(total))


def labels_in_range(function: str, labels: jax.Array, num_classes: int) -> None:
    """Under checkify: integer labels lie in [0, num_classes)."""
    expect((labels >= 0) & (labels < num_classes), labels, f"{function}: label {{value}} is outside [0, {num_classes})")


def targets_are_probs(function: str, targets: jax.Array, axis: int) -> None:
    """Under checkify: target distributions are not negative and sum to 1."""
    expect(targets >= 0, targets, f"{function}: target {{value}} is negative")
    total = jnp.sum(targets, axis=axis)
    # Wide enough for targets rounded to bfloat16: each class errs by at most 2**-9 of itself, so the sum does too.
    expect(jnp.abs(total - 1) <= 2**-8, total, f"{function}: a row of targets sums to {{value}}, not 1")


def weights(function: str, expected: str, shape: Sequence[int], value: jax.Array) -> jax.Array:
    """The weights: real numbers or bool, one for each example of the argument called `expected`, and not negative."""
    if not hasattr(value, "dtype") or jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise ValueError(f"{function}: weights must be an array of real numbers, got {describe(value)}")
    same_shape(function, expected, "weights", shape, value)
    expect(value >= 0, value, f"{function}: weight {{value}} is negative")
    return value


def broadcast_together(function: str, dtype: jnp.dtype, **arguments: Any) -> list[jax.Array]:
    """Real arguments (arrays or numbers), broadcast to one shape and cast to `dtype`."""
    arrays = {name: jnp.asarray(value) for name, value in arguments.items()}
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise ValueError(f"{function}: {name} must be real, got {describe(array)}")
    try:
        shape = jnp.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {describe(array)}" for name, array in arrays.items())
        raise ValueError(f"{function}: expected shapes that broadcast together, got {shapes}") from None
    return [jnp.broadcast_to(array, shape).astype(dtype) for array in arrays.values()]


def nats_to(function: str, base: float | None) -> float:
    """Factor from nats to the unit of `base`."""
    if base is None:
        return 1.0
    if not 1 < base < math.inf:
        raise ValueError(f"{function}: base must be a number above 1, or None for nats, got {base}")
    return 1 / math.log(base)


def sample_shape(function: str, shape: Sequence[int] | None, batch: Sequence[int], name: str) -> tuple[int, ...]:
    """The shape of a sample: `batch`, or a given one that ends in it."""
    shape, batch = tuple(batch if shape is None else shape), tuple(batch)
    if len(shape) < len(batch) or shape[len(shape) - len(batch) :] != batch:
        raise ValueError(f"{function}: shape must end in {list(batch)}, the shape of {name}, got {list(shape)}")
    return shape
