"""What `step`, `run` and `fit` demand of their arguments beyond floating-point arrays, said in one line."""

from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from .._checks import describe

_MULTIPLES = {
    "num_steps": ("record_every", "validate_every"),
    "validate_every": ("record_every",),
    "batch_size": ("micro_batches",),
}


def options(
    function: str, *, validation: PyTree | None = None, average_decay: float | None = None, **counts: int | None
) -> None:
    """The options that `run`, `step` and `fit` share: whole numbers, some of them multiples of others, and a decay."""
    given = {name: value for name, value in counts.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{function}: {name} must be a whole number of at least 1, got {value!r}")
    for name, parts in _MULTIPLES.items():
        for part in parts:
            if name in given and part in given and given[name] % given[part]:
                expected = f"a multiple of {part} = {given[part]}"
                raise ValueError(f"{function}: {name} must be {expected}, got {given[name]}")
    if (validation is None) == ("validate_every" in given):
        only = "validation" if validation is not None else "validate_every"
        raise ValueError(f"{function}: validation and validate_every must be given together, got {only} alone")
    if "patience" in given and validation is None:
        raise ValueError(f"{function}: patience needs validation and validate_every, got neither")
    if average_decay is not None and not 0 < average_decay < 1:
        raise ValueError(f"{function}: average_decay must lie between 0 and 1, got {average_decay!r}")


def state(function: str, value: Any, optimizer: optax.GradientTransformation, average_decay: float | None) -> None:
    """It is a `State` with what this optimizer goes on from; and its average, if it has one, is kept."""
    if not hasattr(value, "stale"):
        raise ValueError(f"{function}: state must be a State, as init gives it, got {describe(value)}")
    if average_decay is None and value.average is not None:
        raise ValueError(f"{function}: average_decay must be given, since the state has an average, got None")
    expected = jax.tree.structure(jax.eval_shape(optimizer.init, value.params))
    if (got := jax.tree.structure(value.optimizer_state)) != expected:
        raise ValueError(f"{function}: state.optimizer_state must be of this optimizer, {expected}, got {got}")


def same_types(function: str, old: PyTree, new: PyTree) -> None:
    """The optimizer changes no shape or dtype of what it updates: a loop must end with the types it began with."""
    for expected, got in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if (expected.shape, expected.dtype) != (got.shape, got.dtype):
            types = f"of {describe(expected)}, got {describe(got)}"
            raise ValueError(f"{function}: expected an optimizer that keeps the type {types}")
