"""Checks of the arguments of `step`, `run` and `fit` beyond floating-point arrays, each answered by one line."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from .._checks import describe

_MULTIPLES = "num_steps log_every", "num_steps validate_every", "validate_every log_every", "batch_size micro_batches"


def options(
    function: str, *, validation: PyTree | None = None, ema_decay: float | None = None, **counts: int | None
) -> None:
    """The options that `run`, `step` and `fit` share: whole numbers, some of them multiples of others, and a decay."""
    given = {name: value for name, value in counts.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{function}: {name} must be a whole number of at least 1, got {value!r}")
    for name, part in map(str.split, _MULTIPLES):
        if name in given and part in given and given[name] % given[part]:
            raise ValueError(f"{function}: {name} must be a multiple of {part} = {given[part]}, got {given[name]}")
    if (validation is None) == ("validate_every" in given):
        only = "validation" if validation is not None else "validate_every"
        raise ValueError(f"{function}: validation and validate_every must be given together, got {only} alone")
    if "patience" in given and validation is None:
        raise ValueError(f"{function}: patience needs validation and validate_every, got neither")
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"{function}: ema_decay must lie between 0 and 1, got {ema_decay!r}")


def state(function: str, value: Any) -> None:
    """It is a `State`."""
    if not hasattr(value, "validations_since_best"):
        raise ValueError(f"{function}: state must be a State, as init gives it, got {describe(value)}")


def training(given: Any, validation: Any = None, validation_weights: Any = None, **counts: int | None) -> None:
    """The options of a training, and the counts of the function that trains; `given` is a `Training`."""
    nlls = {"nll": given.nll, "validation_nll": given.validation_nll or given.nll}
    functions(given.function, **nlls, optimizer=given.optimizer, evaluation_params=given.evaluation_params)
    names = "batch_size", "micro_batches", "log_every", "validate_every", "patience", "ema_decay"
    options(given.function, validation=validation, **counts, **{name: getattr(given, name) for name in names})
    if not isinstance(given.monitor, str):
        raise ValueError(f'{given.function}: monitor must be "loss" or the name of a metric, got {given.monitor!r}')
    if given.monitor_mode not in ("min", "max", *([None] if given.monitor == "loss" else [])):
        raise ValueError(f'{given.function}: monitor_mode must be "min" or "max", got {given.monitor_mode!r}')
    monitor = None if given.monitor == "loss" else given.monitor
    alone = {"validation_weights": validation_weights, "validation_nll": given.validation_nll, "monitor": monitor}
    for name, value in alone.items():
        if validation is None and value is not None:
            raise ValueError(f"{given.function}: {name} needs validation, got none")


def optimizer_state(given: Any, state: Any) -> None:
    """The state is one that this optimizer goes on from, and its average, if it has one, is kept."""
    if given.ema_decay is None and state.average is not None:
        raise ValueError(f"{given.function}: ema_decay must be given, since the state has an average, got None")
    expected = jax.tree.structure(jax.eval_shape(given.optimizer.init, state.params))
    if (got := jax.tree.structure(state.optimizer_state)) != expected:
        raise ValueError(f"{given.function}: state.optimizer_state must be of this optimizer, {expected}, got {got}")


def functions(function: str, **given: Any) -> None:
    """Each is what it is called, and hashable: it is static, a part of the key of the compiled program."""
    for name, value in given.items():
        expected = "an optax gradient transformation" if name == "optimizer" else "a function"
        right = isinstance(value, optax.GradientTransformation) if name == "optimizer" else callable(value)
        if right:
            try:
                hash(value)
                continue
            except TypeError:
                expected = "hashable, such as a function defined with def"
        cure = "; pass its gradient_transformation()" if hasattr(value, "gradient_transformation") else ""
        raise ValueError(f"{function}: {name} must be {expected}, got {describe(value)}{cure}")


def key(function: str, value: Any) -> Any:
    """The key, which is one of typed random keys."""
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise ValueError(f"{function}: key must be made by jax.random.key, got {describe(value)}")
    return value
