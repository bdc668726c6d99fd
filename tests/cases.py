"""Every public function of floor 1 with valid arguments: a public name without a case fails the contract test."""

import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jprob
from jprob import bernoulli, calibration, categorical, gaussian, metrics


class Case(NamedTuple):
    """A call `function(*args)`, with what the contract may expect of it."""

    function: Callable
    args: tuple[jax.Array, ...]
    differentiable: tuple[int, ...] = ()
    is_map: bool = False  # the result has the dtype of the first argument, instead of float32 at least
    is_integer: bool = False  # the result is of int32 or bool, whatever the arguments
    per_example: bool = True  # the leading axis of every argument is the batch, and examples do not meet


KEY = jax.random.key(0)
_rng = np.random.default_rng(0)
BATCH, CLASSES = 8, 3  # one example for each of eight devices
Z, Z2 = (jnp.asarray(_rng.normal(0, 2, (BATCH, CLASSES)), jnp.float32) for _ in range(2))
CLASS = jnp.asarray(_rng.integers(0, CLASSES, BATCH))
TARGET = jnp.asarray(_rng.dirichlet(np.ones(CLASSES), BATCH), jnp.float32)
X, LOC = (jnp.asarray(_rng.normal(0, 1, BATCH), jnp.float32) for _ in range(2))
SCALE = jnp.exp(X - LOC)
YES = jnp.asarray(_rng.uniform(0.1, 0.9, BATCH), jnp.float32)
# Eight sets of examples for what sums over examples, and the tables that it makes of them.
SET_Z = jnp.asarray(_rng.normal(0, 2, (BATCH, 12, CLASSES)), jnp.float32)
SET_CLASS = jnp.argmax(SET_Z + _rng.gumbel(0, 3, SET_Z.shape), axis=-1).astype(jnp.int32)
SET_WEIGHT = jnp.asarray(_rng.uniform(0.1, 0.9, SET_CLASS.shape), jnp.float32)
MATRIX = jnp.asarray(_rng.uniform(1, 9, (BATCH, CLASSES, CLASSES)), jnp.float32)
TABLE = tuple(jnp.asarray(_rng.uniform(1, 2, (BATCH, 4)), jnp.float32) for _ in range(4))


def confusion(labels, predictions, weights):
    return metrics.confusion_matrix(labels, predictions, num_classes=CLASSES, weights=weights)


def reliability(logits, labels, weights):
    return jnp.stack(calibration.reliability(logits, labels, num_bins=4, weights=weights))


def fit_temperature(logits, labels, weights):
    return calibration.fit_temperature(logits, labels, weights=weights)


def of_table(function):
    """The function with the fields of the table as its arguments, and an array as its result."""
    return lambda *fields: jnp.stack(jax.tree.leaves(function(calibration.Reliability(*fields))), axis=-1)


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
    "categorical.js_divergence": Case(categorical.js_divergence, (Z, Z2), (0, 1)),
    "categorical.distillation_loss": Case(
        lambda s, t: categorical.distillation_loss(s, t, temperature=2.0), (Z, Z2), (0, 1)),
    "categorical.log_prob": Case(categorical.log_prob, (CLASS, Z), (1,)),
    "categorical.mode": Case(categorical.mode, (Z,), is_integer=True),
    "categorical.sample": Case(categorical.sample, (KEY, Z), is_integer=True, per_example=False),
    "bernoulli.log_prob": Case(bernoulli.log_prob, (YES, X), (0, 1)),
    "bernoulli.entropy": Case(bernoulli.entropy, (X,), (0,)),
    "bernoulli.kl_divergence": Case(bernoulli.kl_divergence, (X, LOC), (0, 1)),
    "bernoulli.brier_score": Case(bernoulli.brier_score, (X, YES), (0, 1)),
    "bernoulli.sample": Case(bernoulli.sample, (KEY, X), is_integer=True, per_example=False),
    "bernoulli.cross_entropy": Case(bernoulli.cross_entropy, (X, YES), (0, 1)),
    "gaussian.log_prob": Case(gaussian.log_prob, (X, LOC, SCALE), (0, 1, 2)),
    "gaussian.log_prob, log_scale": Case(
        lambda x, loc, log_scale: gaussian.log_prob(x, loc, log_scale=log_scale), (X, LOC, Z[:, 0]), (0, 1, 2)),
    "metrics.confusion_matrix": Case(jnp.vectorize(confusion, signature="(n),(n),(n)->(k,k)"),
                                     (SET_CLASS, SET_CLASS[::-1], SET_WEIGHT), (2,)),
    "metrics.accuracy": Case(metrics.accuracy, (MATRIX,), (0,)),
    "metrics.balanced_accuracy": Case(metrics.balanced_accuracy, (MATRIX,), (0,)),
    **{f"metrics.{name}, {average}": Case(partial(getattr(metrics, name), average=average), (MATRIX,), (0,))
       for name in ("precision", "recall", "f1_score") for average in (None, "macro", "micro", "weighted")},
    "metrics.perplexity": Case(jnp.vectorize(lambda nll, w: metrics.perplexity(nll, weights=w), signature="(n),(n)->()"),
                               (SET_Z[..., 0], SET_WEIGHT), (0, 1)),
    "calibration.reliability": Case(jnp.vectorize(reliability, signature="(n,k),(n),(n)->(f,b)"),
                                    (SET_Z, SET_CLASS, SET_WEIGHT), (0, 2)),
    "calibration.expected_calibration_error": Case(of_table(calibration.expected_calibration_error), TABLE, (0, 1, 2)),
    "calibration.maximum_calibration_error": Case(of_table(calibration.maximum_calibration_error), TABLE, (0, 1, 2)),
    "calibration.brier_decomposition": Case(of_table(calibration.brier_decomposition), TABLE, (0, 1, 2, 3)),
    "calibration.fit_temperature": Case(jnp.vectorize(fit_temperature, signature="(n,k),(n),(n)->()"),
                                        (SET_Z, SET_CLASS, SET_WEIGHT), (0, 2)),
}  # fmt: skip


def public_functions() -> dict[str, Callable]:
    """`module.name` -> function, for every public function defined in a module of floor 1."""
    modules = {name: module for name, module in vars(jprob).items() if isinstance(module, ModuleType)}
    return {
        f"{name}.{attribute}": value
        for name, module in modules.items()
        if not name.startswith("_") and module.__name__ == f"jprob.{name}" and not hasattr(module, "__path__")
        for attribute, value in vars(module).items()
        if not attribute.startswith("_") and callable(value) and not inspect.isclass(value) and inspect.unwrap(value).__module__ == module.__name__
    }
