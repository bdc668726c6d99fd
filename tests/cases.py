"""Every public function of floor 1 with valid arguments: a public name without a case fails the contract test."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jprob
from jprob import bernoulli, categorical, gaussian


class Case(NamedTuple):
    """A call `function(*args)`: the leading axis of every argument is the batch."""

    function: Callable
    args: tuple[jax.Array, ...]
    differentiable: tuple[int, ...]
    is_map: bool = False  # the result has the dtype of the first argument, instead of float32 at least


_rng = np.random.default_rng(0)
BATCH, CLASSES = 8, 3  # one example for each of eight devices
Z, Z2 = (jnp.asarray(_rng.normal(0, 2, (BATCH, CLASSES)), jnp.float32) for _ in range(2))
CLASS = jnp.asarray(_rng.integers(0, CLASSES, BATCH))
TARGET = jnp.asarray(_rng.dirichlet(np.ones(CLASSES), BATCH), jnp.float32)
X, LOC = (jnp.asarray(_rng.normal(0, 1, BATCH), jnp.float32) for _ in range(2))
SCALE = jnp.exp(X - LOC)
YES = jnp.asarray(_rng.uniform(0.1, 0.9, BATCH), jnp.float32)

CASES = {
    "categorical.softmax": Case(categorical.softmax, (Z,), (0,), is_map=True),
    "categorical.softmax, tempered": Case(lambda z, t: categorical.softmax(z, temperature=t),
                                          (Z, SCALE[:, None]), (0, 1), is_map=True),
    "categorical.log_softmax": Case(categorical.log_softmax, (Z,), (0,), is_map=True),
    "categorical.cross_entropy": Case(categorical.cross_entropy, (Z, CLASS), (0,)),
    "categorical.cross_entropy, soft": Case(categorical.cross_entropy, (Z, TARGET), (0, 1)),
    "categorical.cross_entropy, smoothed": Case(
        lambda z, y: categorical.cross_entropy(z, y, label_smoothing=0.1), (Z, CLASS), (0,)),
    "categorical.brier_score": Case(categorical.brier_score, (Z, CLASS), (0,)),
    "categorical.brier_score, soft": Case(categorical.brier_score, (Z, TARGET), (0, 1)),
    "categorical.entropy": Case(categorical.entropy, (Z,), (0,)),
    "categorical.kl_divergence": Case(categorical.kl_divergence, (Z, Z2), (0, 1)),
    "bernoulli.cross_entropy": Case(bernoulli.cross_entropy, (X, YES), (0, 1)),
    "gaussian.log_prob": Case(gaussian.log_prob, (X, LOC, SCALE), (0, 1, 2)),
    "gaussian.log_prob, log_scale": Case(
        lambda x, loc, log_scale: gaussian.log_prob(x, loc, log_scale=log_scale), (X, LOC, Z[:, 0]), (0, 1, 2)),
}  # fmt: skip


def public_functions() -> dict[str, Callable]:
    """`module.name` -> function, for every public function defined in a module of floor 1."""
    modules = {name: module for name, module in vars(jprob).items() if isinstance(module, ModuleType)}
    return {
        f"{name}.{attribute}": value
        for name, module in modules.items()
        if not name.startswith("_") and module.__name__ == f"jprob.{name}" and not hasattr(module, "__path__")
        for attribute, value in vars(module).items()
        if not attribute.startswith("_") and callable(value) and inspect.unwrap(value).__module__ == module.__name__
    }
