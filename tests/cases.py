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
from jprob import bayes, bernoulli, calibration, categorical, expectation, gaussian, linear_categorical, metrics, mvn


class Case(NamedTuple):
    """A call `function(*args)`, with what the contract may expect of it."""

    function: Callable
    args: tuple[jax.Array, ...]
    differentiable: tuple[int, ...] = ()
    is_map: bool = False  # the result has the dtype of the first argument, instead of float32 at least
    is_integer: bool = False  # the result is of int32 or bool, for any arguments
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
SET_Z = jnp.asarray(_rng.normal(0, 2, (BATCH, 16, CLASSES)), jnp.float32)
SET_CLASS = jnp.argmax(SET_Z + _rng.gumbel(0, 3, SET_Z.shape), axis=-1).astype(jnp.int32)
SET_WEIGHT = jnp.asarray(_rng.uniform(0.1, 0.9, SET_CLASS.shape), jnp.float32)
MATRIX = jnp.asarray(_rng.uniform(1, 9, (BATCH, CLASSES, CLASSES)), jnp.float32)
TABLE = tuple(jnp.asarray(_rng.uniform(1, 2, (BATCH, 4)), jnp.float32) for _ in range(4))

# For densities: a second scale and a larger end, vectors of three numbers and Cholesky factors.
SCALE2, HIGH = SCALE * jnp.exp(Z[:, 0] / 4), X + SCALE
VECTOR, VECTOR2 = (jnp.asarray(_rng.normal(0, 1, (BATCH, 3)), jnp.float32) for _ in range(2))
TRIL, TRIL2 = (jnp.asarray(np.tril(_rng.normal(0, 0.3, (BATCH, 3, 3)), -1) + [np.diag(d) for d in d_], jnp.float32)
               for d_ in _rng.uniform(0.5, 2, (2, BATCH, 3)))  # fmt: skip
COVARIANCE = TRIL @ jnp.swapaxes(TRIL, -1, -2)

# Tokens and kernels of eight models, in blocks of two tokens.
TOKENS = 4
HIDDEN, HIDDEN2 = (jnp.asarray(_rng.normal(0, 1, (BATCH, TOKENS, 4)), jnp.float32) for _ in range(2))
KERNEL, KERNEL2 = (jnp.asarray(_rng.normal(0, 1, (BATCH, 4, CLASSES)), jnp.float32) for _ in range(2))
BIAS = jnp.asarray(_rng.normal(0, 1, (BATCH, CLASSES)), jnp.float32)
TOKEN_WEIGHT = jnp.asarray(_rng.uniform(0.1, 0.9, (BATCH, TOKENS)), jnp.float32)
TOKEN_CLASS = jnp.asarray(_rng.integers(0, CLASSES, (BATCH, TOKENS)))
TOKEN_TARGET = jnp.asarray(_rng.dirichlet(np.ones(CLASSES), (BATCH, TOKENS)), jnp.float32)
TWO_TOKENS = 2 * CLASSES * 4  # bytes of their logits in float32
TOP = jnp.asarray(np.argsort(_rng.uniform(size=(BATCH, TOKENS, CLASSES)))[..., :2])


def confusion(labels, predictions, weights):
    return metrics.confusion_matrix(labels, predictions, num_classes=CLASSES, weights=weights)


def perplexity(nll, weights):
    return metrics.perplexity(nll, weights=weights)


def reliability(logits, labels, weights, **options):
    return jnp.stack(calibration.reliability(logits, labels, num_bins=4, weights=weights, **options))


def fit_temperature(logits, labels, weights):
    return calibration.fit_temperature(logits, labels, weights=weights)


def of_table(function):
    """The function with the fields of the table as its arguments, and an array as its result."""
    return lambda *fields: jnp.stack(jax.tree.leaves(function(calibration.Reliability(*fields))), axis=-1)


def stacked(function, signature, **fixed):
    """A function that gives a NamedTuple of equal shapes, over any batch, with an array as its result."""
    return jnp.vectorize(lambda *args: jnp.stack(function(*args, **fixed), axis=-1), signature=signature)


def weighted(function):
    return lambda *args: function(*args[:-1], weights=args[-1])


def fit_mvn(x, weights):
    loc, scale_tril = mvn.fit(x, weights=weights)
    return jnp.concatenate([loc[None], scale_tril])


def draw(key):
    return gaussian.sample(key, LOC, SCALE)


def monte_carlo(key):
    return jnp.stack(expectation.monte_carlo(jnp.sin, draw, key, num_samples=4))


def linear(name, signature, **options):
    """A function of hidden and kernel, over any batch of models."""
    return jnp.vectorize(partial(getattr(linear_categorical, name), **options), signature=signature)


def linear_loss(hidden, kernel, bias, labels, weights):
    loss, aux = linear_categorical.cross_entropy(
        hidden, kernel, labels, bias=bias, weights=weights, label_smoothing=0.1, z_loss=0.01, softcap=9.0,
        temperature=0.5, has_aux=True, block_bytes=TWO_TOKENS)  # fmt: skip
    return jnp.concatenate([loss[None], aux.nll, aux.logsumexp])


def log_prob_and_entropy(labels, hidden, kernel):
    return jnp.stack(linear_categorical.log_prob_and_entropy(labels, hidden, kernel), axis=-1)


def top_distillation(hidden, kernel, log_probs, indices):
    top = {"top_log_probs": log_probs, "top_indices": indices}
    return linear_categorical.distillation_loss(hidden, kernel, **top, temperature=2.0)


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
    "categorical.js_divergence, weighted": Case(
        lambda p, q: categorical.js_divergence(p, q, weight=0.9), (Z, Z2), (0, 1)),
    "categorical.distillation_loss": Case(
        lambda s, t: categorical.distillation_loss(s, t, temperature=2.0), (Z, Z2), (0, 1)),
    "categorical.log_prob": Case(categorical.log_prob, (CLASS, Z), (1,)),
    "categorical.mode": Case(categorical.mode, (Z,), is_integer=True),
    "categorical.sample": Case(categorical.sample, (KEY, Z), is_integer=True, per_example=False),
    "bernoulli.log_prob": Case(bernoulli.log_prob, (YES, X), (0, 1)),
    "bernoulli.prob": Case(bernoulli.prob, (X,), (0,), is_map=True),
    "bernoulli.entropy": Case(bernoulli.entropy, (X,), (0,)),
    "bernoulli.kl_divergence": Case(bernoulli.kl_divergence, (X, LOC), (0, 1)),
    "bernoulli.brier_score": Case(bernoulli.brier_score, (X, YES), (0, 1)),
    "bernoulli.sample": Case(bernoulli.sample, (KEY, X), is_integer=True, per_example=False),
    "bernoulli.cross_entropy": Case(bernoulli.cross_entropy, (X, YES), (0, 1)),
    "gaussian.log_prob": Case(gaussian.log_prob, (X, LOC, SCALE), (0, 1, 2)),
    "gaussian.log_prob, log_scale": Case(
        lambda x, loc, log_scale: gaussian.log_prob(x, loc, log_scale=log_scale), (X, LOC, Z[:, 0]), (0, 1, 2)),
    "gaussian.prob": Case(gaussian.prob, (X, LOC, SCALE), (0, 1, 2)),
    "gaussian.prob, log_scale": Case(
        lambda x, loc, log_scale: gaussian.prob(x, loc, log_scale=log_scale), (X, LOC, Z[:, 0]), (0, 1, 2)),
    "gaussian.cdf": Case(gaussian.cdf, (X, LOC, SCALE), (0, 1, 2)),
    "gaussian.log_cdf": Case(gaussian.log_cdf, (X, LOC, SCALE), (0, 1, 2)),
    "gaussian.quantile": Case(gaussian.quantile, (YES, LOC, SCALE), (0, 1, 2)),
    "gaussian.log_interval_prob": Case(gaussian.log_interval_prob, (X, HIGH, LOC, SCALE2), (0, 1, 2, 3)),
    "gaussian.interval_prob": Case(gaussian.interval_prob, (X, HIGH, LOC, SCALE2), (0, 1, 2, 3)),
    "gaussian.entropy": Case(gaussian.entropy, (SCALE,), (0,)),
    "gaussian.kl_divergence": Case(gaussian.kl_divergence, (X, SCALE, LOC, SCALE2), (0, 1, 2, 3)),
    "gaussian.kl_divergence, log_scale": Case(
        lambda p, log_p, q, log_q: gaussian.kl_divergence(p, q_loc=q, p_log_scale=log_p, q_log_scale=log_q),
        (X, Z[:, 0], LOC, Z2[:, 0]), (0, 1, 2, 3)),
    "gaussian.cross_entropy": Case(gaussian.cross_entropy, (X, SCALE, LOC, SCALE2), (0, 1, 2, 3)),
    "gaussian.nll": Case(gaussian.nll, (X, LOC, SCALE), (0, 1, 2)),
    "gaussian.nll, log_scale": Case(
        lambda x, loc, log_scale: gaussian.nll(x, loc, log_scale=log_scale), (X, LOC, Z[:, 0]), (0, 1, 2)),
    "gaussian.nll, beta": Case(lambda *args: gaussian.nll(*args, beta=0.5), (X, LOC, SCALE), (0, 1)),
    "gaussian.fit": Case(stacked(weighted(gaussian.fit), "(n),(n)->(f)"), (SET_Z[..., 0], SET_WEIGHT), (0, 1)),
    "gaussian.sample": Case(gaussian.sample, (KEY, LOC, SCALE), (1, 2), per_example=False),
    "expectation.mean": Case(expectation.mean, (Z2, Z), (0, 1)),
    "expectation.variance": Case(expectation.variance, (Z2, Z), (0, 1)),
    "expectation.monte_carlo": Case(monte_carlo, (KEY,), per_example=False),
    "bayes.log_posterior": Case(bayes.log_posterior, (Z, Z2), (0, 1), is_map=True),
    "bayes.log_evidence": Case(bayes.log_evidence, (Z, Z2), (0, 1)),
    "bayes.update": Case(jnp.vectorize(bayes.update, signature="(k),(t,k)->(t,k)"), (Z, SET_Z[:, :2]), (0, 1),
                         is_map=True),
    "bayes.gaussian_posterior": Case(stacked(weighted(bayes.gaussian_posterior), "(),(),(n),(),(n)->(f)"),
                                     (LOC, SCALE, SET_Z[..., 0], SCALE2, SET_WEIGHT), (0, 1, 2, 3, 4)),
    "bayes.beta_posterior": Case(stacked(weighted(bayes.beta_posterior), "(),(),(n),(n)->(f)"),
                                 (SCALE, SCALE2, SET_WEIGHT[::-1], SET_WEIGHT), (0, 1, 2, 3)),
    "linear_categorical.cross_entropy": Case(
        jnp.vectorize(linear_loss, signature="(n,h),(h,v),(v),(n),(n)->(f)"),
        (HIDDEN, KERNEL, BIAS, TOKEN_CLASS, TOKEN_WEIGHT), (0, 1, 2, 4)),
    "linear_categorical.cross_entropy, soft": Case(
        linear("cross_entropy", "(n,h),(h,v),(n,v)->(n)", reduction="none"), (HIDDEN, KERNEL, TOKEN_TARGET), (0, 1)),
    "linear_categorical.log_prob_and_entropy": Case(
        jnp.vectorize(log_prob_and_entropy, signature="(n),(n,h),(h,v)->(n,f)"), (TOKEN_CLASS, HIDDEN, KERNEL), (1, 2)),
    "linear_categorical.log_prob": Case(
        linear("log_prob", "(n),(n,h),(h,v)->(n)", block_bytes=TWO_TOKENS), (TOKEN_CLASS, HIDDEN, KERNEL), (1, 2)),
    "linear_categorical.entropy": Case(linear("entropy", "(n,h),(h,v)->(n)", softcap=9.0), (HIDDEN, KERNEL), (0, 1)),
    "linear_categorical.kl_divergence": Case(
        linear("kl_divergence", "(n,h),(h,v),(n,h),(h,v)->(n)"), (HIDDEN, KERNEL, HIDDEN2, KERNEL2), (0, 1, 2, 3)),
    "linear_categorical.js_divergence": Case(
        linear("js_divergence", "(n,h),(h,v),(n,h),(h,v)->(n)", weight=0.9), (HIDDEN, KERNEL, HIDDEN2, KERNEL2),
        (0, 1, 2, 3)),
    "linear_categorical.distillation_loss": Case(
        jnp.vectorize(top_distillation, signature="(n,h),(h,v),(n,k),(n,k)->(n)"),
        (HIDDEN, KERNEL, -SET_WEIGHT[:, : 2 * TOKENS].reshape(BATCH, TOKENS, 2), TOP), (0, 1, 2)),
    "linear_categorical.mode": Case(linear("mode", "(n,h),(h,v)->(n)"), (HIDDEN, KERNEL), is_integer=True),
    "linear_categorical.sample": Case(
        linear_categorical.sample, (KEY, HIDDEN, KERNEL[0]), is_integer=True, per_example=False),
    "mvn.log_prob": Case(mvn.log_prob, (VECTOR, VECTOR2, TRIL), (0, 1, 2)),
    "mvn.entropy": Case(mvn.entropy, (TRIL,), (0,)),
    "mvn.kl_divergence": Case(mvn.kl_divergence, (VECTOR, TRIL, VECTOR2, TRIL2), (0, 1, 2, 3)),
    "mvn.sample": Case(mvn.sample, (KEY, VECTOR, TRIL), (1, 2), per_example=False),
    "mvn.fit": Case(jnp.vectorize(fit_mvn, signature="(n,d),(n)->(e,d)"), (SET_Z, SET_WEIGHT), (0, 1)),
    "mvn.scale_tril, covariance": Case(lambda matrix: mvn.scale_tril(covariance=matrix), (COVARIANCE,), (0,)),
    "mvn.scale_tril, precision": Case(lambda matrix: mvn.scale_tril(precision=matrix), (COVARIANCE,), (0,)),
    "mvn.scale_tril, diagonal": Case(lambda scale: mvn.scale_tril(diagonal=scale), (jnp.exp(VECTOR),), (0,)),
    "metrics.confusion_matrix": Case(confusion, (SET_CLASS[0], SET_CLASS[1], SET_WEIGHT[0]), (2,), per_example=False),
    "metrics.confusion_matrix, sets": Case(jnp.vectorize(confusion, signature="(n),(n),(n)->(k,k)"),
                                           (SET_CLASS, SET_CLASS[::-1], SET_WEIGHT), (2,)),
    "metrics.accuracy": Case(metrics.accuracy, (MATRIX,), (0,)),
    "metrics.balanced_accuracy": Case(metrics.balanced_accuracy, (MATRIX,), (0,)),
    **{f"metrics.{name}, {average}": Case(partial(getattr(metrics, name), average=average), (MATRIX,), (0,))
       for name, average in [("precision", "macro"), ("recall", "weighted"), ("f1_score", None), ("f1_score", "micro")]
       },
    "metrics.perplexity": Case(perplexity, (X, SCALE), (0, 1), per_example=False),
    "metrics.perplexity, sets": Case(jnp.vectorize(perplexity, signature="(n),(n)->()"),
                                     (SET_Z[..., 0], SET_WEIGHT), (0, 1)),
    "calibration.reliability": Case(reliability, (SET_Z[0], SET_CLASS[0], SET_WEIGHT[0]), (0, 2), per_example=False),
    "calibration.reliability, sets": Case(jnp.vectorize(reliability, signature="(n,k),(n),(n)->(f,b)"),
                                          (SET_Z, SET_CLASS, SET_WEIGHT), (0, 2)),
    "calibration.reliability, of each class": Case(
        jnp.vectorize(partial(reliability, class_wise=True, equal_mass=True), signature="(n,k),(n),(n)->(f,k,b)"),
        (SET_Z, SET_CLASS, SET_WEIGHT), (0, 2)),
    "calibration.expected_calibration_error": Case(of_table(calibration.expected_calibration_error), TABLE, (0, 1, 2)),
    "calibration.maximum_calibration_error": Case(of_table(calibration.maximum_calibration_error), TABLE, (0, 1, 2)),
    "calibration.brier_decomposition": Case(of_table(calibration.brier_decomposition), TABLE, (0, 1, 2, 3)),
    "calibration.fit_temperature": Case(
        fit_temperature, (SET_Z[0], SET_CLASS[0], SET_WEIGHT[0]), (0, 2), per_example=False),
    "calibration.fit_temperature, sets": Case(jnp.vectorize(fit_temperature, signature="(n,k),(n),(n)->()"),
                                              (SET_Z, SET_CLASS, SET_WEIGHT), (0, 2)),
}  # fmt: skip

# The arguments that each function asks for, by name: for calls with one of them replaced by something hostile.
_ROW = {"key": KEY, "logits": Z, "labels": CLASS, "p_logits": Z, "q_logits": Z2, "student_logits": Z,
        "teacher_logits": Z2, "temperature": 2.0, "x": X, "loc": LOC, "scale": SCALE, "q": YES, "low": X, "high": HIGH,
        "p_loc": X, "p_scale": SCALE, "q_loc": LOC, "q_scale": SCALE2, "log_prior": Z, "log_likelihood": Z2,
        "log_likelihoods": Z[None], "prior_loc": LOC[0], "prior_scale": SCALE[0], "prior_alpha": SCALE[0],
        "prior_beta": SCALE2[0], "values": Z2, "fn": jnp.sin, "sample": draw, "num_samples": 4,
        "predictions": CLASS, "num_classes": CLASSES, "matrix": MATRIX, "nll": X,
        "table": calibration.Reliability(*TABLE), "hidden": HIDDEN[0], "kernel": KERNEL[0], "p_hidden": HIDDEN[0],
        "p_kernel": KERNEL[0], "q_hidden": HIDDEN2[0], "q_kernel": KERNEL2[0], "student_hidden": HIDDEN[0],
        "student_kernel": KERNEL[0], "teacher_hidden": HIDDEN2[0], "teacher_kernel": KERNEL2[0]}  # fmt: skip
_OTHERS = {
    "bernoulli": {"logits": X, "labels": YES, "p_logits": X, "q_logits": LOC},
    "bayes": {"scale": SCALE[0], "labels": CLASS == 0},
    "linear_categorical": {"labels": TOKEN_CLASS[0]},
    "mvn": {"x": VECTOR, "loc": VECTOR2, "scale_tril": TRIL, "p_loc": VECTOR, "q_loc": VECTOR2, "p_scale_tril": TRIL,
            "q_scale_tril": TRIL2, "covariance": COVARIANCE},
}  # fmt: skip
_ASKED = {"teacher_hidden", "teacher_kernel", "covariance"}  # by the function itself, though they have defaults


def valid_arguments(name: str) -> dict:
    """The arguments that this public function cannot do without."""
    module, function = name.split(".")
    values = _ROW | _OTHERS.get(module, {})
    parameters = inspect.signature(getattr(getattr(jprob, module), function)).parameters.values()
    return {p.name: values[p.name] for p in parameters if p.default is p.empty or p.name in _ASKED}


HOSTILE = {
    "text": "text", "None": None, "a list": [1.0, [2.0]], "an object": object(), "2**63": 2**63, "1j": 1j,
    "nan": float("nan"), "float8": jnp.zeros((BATCH, CLASSES), jnp.float8_e4m3fn), "texts": np.array(["a", "b"]),
    "another shape": jnp.zeros((2, 5, 7)), "an integer": jnp.int32(5), "a dict": {"a": X},
}  # fmt: skip
MEANINGLESS = {"text", "a list", "an object", "1j", "float8", "texts", "a dict"}  # whichever argument it is

PLANS = {"linear_categorical.plan"}  # answered from shapes alone: no program to compile, no value to differentiate


def public_functions() -> dict[str, Callable]:
    """`module.name` -> function, for every public function defined in a module of floor 1."""
    modules = {name: module for name, module in vars(jprob).items() if isinstance(module, ModuleType)}
    return {
        f"{name}.{attribute}": value
        for name, module in modules.items()
        if not name.startswith("_") and module.__name__ == f"jprob.{name}" and not hasattr(module, "__path__")
        for attribute, value in vars(module).items()
        if not attribute.startswith("_")
        and callable(value)
        and not inspect.isclass(value)
        and inspect.unwrap(value).__module__ == module.__name__
        and f"{name}.{attribute}" not in PLANS
    }
