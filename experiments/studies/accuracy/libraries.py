"""Libraries: which of their functions stands for which. All take and return a batch."""

import importlib.util
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .functions import FUNCTIONS, Function
from .regimes import Batch

OURS = "jprob"


def _jprob() -> dict[str, Callable]:
    """Each function by its name; those without a label leave it out."""
    calls = {}
    for name in FUNCTIONS:
        module, _, verb = f"categorical.{name}".removesuffix(", soft").rpartition(".")
        calls[name] = getattr(import_module(f"jprob.{module.removeprefix('categorical.')}"), verb)
    unlabelled = ("softmax", "log_softmax", "entropy", "bernoulli.entropy")
    return calls | {name: lambda z, y, call=calls[name]: call(z) for name in unlabelled}


def _of_label(x: Any, y: Any) -> Any:
    return jnp.take_along_axis(x, y[:, None], axis=-1)[:, 0]


def _jax() -> dict[str, Callable]:
    from jax.nn import log_sigmoid, log_softmax, sigmoid, softmax
    from jax.scipy.special import entr, rel_entr
    from jax.scipy.stats import multivariate_normal, norm

    def js(zp, zq):
        p, q = softmax(zp), softmax(zq)
        return (rel_entr(p, (p + q) / 2) + rel_entr(q, (p + q) / 2)).sum(-1) / 2

    def mvn(x, loc, tril):
        lower = jnp.tril(tril)
        return jax.vmap(multivariate_normal.logpdf)(x, loc, lower @ jnp.swapaxes(lower, -1, -2))

    return {
        "softmax": lambda z, y: softmax(z),
        "log_softmax": lambda z, y: log_softmax(z),
        "cross_entropy": lambda z, y: -_of_label(log_softmax(z), y),
        "brier_score": lambda z, y: ((softmax(z) - jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)) ** 2).sum(-1),
        "entropy": lambda z, y: entr(softmax(z)).sum(-1),
        "kl_divergence": lambda zp, zq: rel_entr(softmax(zp), softmax(zq)).sum(-1),
        "js_divergence": js,
        "bernoulli.cross_entropy": lambda z, y: -log_sigmoid(jnp.where(y == 1, z, -z)),
        "bernoulli.entropy": lambda z, y: entr(sigmoid(z)) + entr(sigmoid(-z)),
        "bernoulli.kl_divergence": lambda p, q: rel_entr(sigmoid(p), sigmoid(q)) + rel_entr(sigmoid(-p), sigmoid(-q)),
        "gaussian.log_prob": norm.logpdf,
        "gaussian.cdf": norm.cdf,
        "gaussian.log_cdf": norm.logcdf,
        "gaussian.interval_prob": lambda low, high, loc, scale: norm.cdf(high, loc, scale) - norm.cdf(low, loc, scale),
        "gaussian.quantile": norm.ppf,
        "mvn.log_prob": mvn,
    }


def _optax() -> dict[str, Callable]:
    from jax.nn import log_softmax
    from optax import losses

    return {
        "cross_entropy": losses.softmax_cross_entropy_with_integer_labels,
        "cross_entropy, soft": losses.safe_softmax_cross_entropy,
        "kl_divergence": lambda zp, zq: losses.kl_divergence_with_log_targets(log_softmax(zq), log_softmax(zp)),
        "bernoulli.cross_entropy": lambda z, y: losses.sigmoid_binary_cross_entropy(z, y.astype(z.dtype)),
    }


def _distributions(d: Any, categorical: Any, bernoulli: Any, mvn: Any, kl: Callable) -> dict[str, Callable]:
    """The interface that distrax, numpyro, TFP and torch have in common, but for the names of some classes."""
    return {
        "cross_entropy": lambda z, y: -categorical(logits=z).log_prob(y),
        "entropy": lambda z, y: categorical(logits=z).entropy(),
        "kl_divergence": lambda zp, zq: kl(categorical(logits=zp), categorical(logits=zq)),
        "bernoulli.cross_entropy": lambda z, y: -bernoulli(logits=z).log_prob(y),
        "bernoulli.entropy": lambda z, y: bernoulli(logits=z).entropy(),
        "bernoulli.kl_divergence": lambda p, q: kl(bernoulli(logits=p), bernoulli(logits=q)),
        "gaussian.log_prob": lambda x, loc, scale: d.Normal(loc, scale).log_prob(x),
        "gaussian.cdf": lambda x, loc, scale: d.Normal(loc, scale).cdf(x),
        "gaussian.interval_prob": lambda a, b, loc, scale: d.Normal(loc, scale).cdf(b) - d.Normal(loc, scale).cdf(a),
        "gaussian.kl_divergence": lambda a, s, b, t: kl(d.Normal(a, s), d.Normal(b, t)),
        "gaussian.entropy": lambda scale: d.Normal(0 * scale, scale).entropy(),
        "mvn.log_prob": lambda x, loc, tril: mvn(loc, tril).log_prob(x),
    }


def _distrax() -> dict[str, Callable]:
    d = import_module("distrax")

    return {
        **_distributions(d, d.Categorical, d.Bernoulli, d.MultivariateNormalTri, lambda p, q: p.kl_divergence(q)),
        "softmax": lambda z, y: d.Categorical(logits=z).probs,
        "log_softmax": lambda z, y: d.Categorical(logits=z).logits,
        "gaussian.log_cdf": lambda x, loc, scale: d.Normal(loc, scale).log_cdf(x),
    }


def _numpyro() -> dict[str, Callable]:
    d = import_module("numpyro.distributions")

    def mvn(loc, tril):
        return d.MultivariateNormal(loc, scale_tril=jnp.tril(tril))

    missing = ("kl_divergence", "bernoulli.kl_divergence")  # it has that of Gaussians alone
    shared = _distributions(d, d.Categorical, d.Bernoulli, mvn, d.kl_divergence)
    return {
        **{name: call for name, call in shared.items() if name not in missing},
        "softmax": lambda z, y: d.Categorical(logits=z).probs,
        "gaussian.log_cdf": lambda x, loc, scale: d.Normal(loc, scale).log_cdf(x),
        "gaussian.quantile": lambda q, loc, scale: d.Normal(loc, scale).icdf(q),
    }


def _tfp() -> dict[str, Callable]:
    substrate = import_module("tensorflow_probability.substrates.jax")
    d, stats = substrate.distributions, substrate.stats

    return {
        **_distributions(d, d.Categorical, d.Bernoulli, d.MultivariateNormalTriL, lambda p, q: p.kl_divergence(q)),
        "softmax": lambda z, y: d.Categorical(logits=z).probs_parameter(),
        "brier_score": lambda z, y: 1 + stats.brier_score(y, z),  # defined without the 1
        "gaussian.log_cdf": lambda x, loc, scale: d.Normal(loc, scale).log_cdf(x),
        "gaussian.quantile": lambda q, loc, scale: d.Normal(loc, scale).quantile(q),
        "expectation.variance": jax.vmap(lambda v, z: d.FiniteDiscrete(v, logits=z).variance()),
    }


def _torch() -> dict[str, Callable]:
    torch, d, f = (import_module(name) for name in ("torch", "torch.distributions", "torch.nn.functional"))

    def quiet(kind):
        return partial(kind, validate_args=False)

    def mvn(loc, tril):
        return d.MultivariateNormal(loc, scale_tril=tril.tril(), validate_args=False)

    def kl(zp, zq):
        return f.kl_div(f.log_softmax(zq, -1), f.log_softmax(zp, -1), reduction="none", log_target=True).sum(-1)

    def bce(z, y):
        return f.binary_cross_entropy_with_logits(z, y.to(z.dtype), reduction="none")

    return {
        **_distributions(d, quiet(d.Categorical), quiet(d.Bernoulli), mvn, d.kl_divergence),
        "softmax": lambda z, y: f.softmax(z, -1),
        "log_softmax": lambda z, y: f.log_softmax(z, -1),
        "cross_entropy": lambda z, y: f.cross_entropy(z, y, reduction="none"),
        "cross_entropy, soft": lambda z, t: f.cross_entropy(z, t, reduction="none"),
        "kl_divergence": kl,
        "bernoulli.cross_entropy": bce,
        "gaussian.log_cdf": lambda x, loc, scale: torch.special.log_ndtr((x - loc) / scale),
        # Normal.icdf is infinite from q = 1e-8 down.
        "gaussian.quantile": lambda q, loc, scale: loc + scale * torch.special.ndtri(q),
    }


Results = tuple[np.ndarray, list[np.ndarray]]  # value, and gradient in each argument, as float64


def in_jax(call: Callable, function: Function, batch: Batch, dtype: str) -> Results:
    """Value and gradient under jit, which is how they are used."""

    @jax.jit
    def evaluate(*args):
        def of_moved(*moved):
            given = dict(zip(function.argnums, moved, strict=True))
            return call(*(given.get(i, arg) for i, arg in enumerate(args)))

        value, pull = jax.vjp(of_moved, *(args[i] for i in function.argnums))
        seed = jax.nn.one_hot(args[1], value.shape[-1], dtype=value.dtype) if function.is_map else jnp.ones_like(value)
        return value, pull(seed)

    value, gradient = evaluate(*(jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else dtype) for a in batch))
    return np.asarray(value, np.float64), [np.asarray(g, np.float64) for g in gradient]


def in_torch(call: Callable, function: Function, batch: Batch, dtype: str) -> Results:
    """Value and gradient by torch's autograd, on the CPU."""
    torch = import_module("torch")
    args = [torch.from_numpy(a) for a in batch]
    args = [a.to(getattr(torch, dtype)) if a.is_floating_point() else a for a in args]
    moved = [args[i].requires_grad_() for i in function.argnums]
    value = call(*args)
    picked = value.gather(-1, args[1][:, None]) if function.is_map else value
    gradient = torch.autograd.grad(picked.sum(), moved, allow_unused=True, materialize_grads=True)
    return value.detach().double().numpy(), [g.double().numpy() for g in gradient]


class Library(NamedTuple):
    """The origin of a library's functions, and how they are evaluated."""

    module: str
    functions: Callable[[], dict[str, Callable]]
    evaluate: Callable[[Callable, Function, Batch, str], Results] = in_jax


LIBRARIES = {
    OURS: Library("jprob", _jprob),
    "jax": Library("jax", _jax),
    "optax": Library("optax", _optax),
    "distrax": Library("distrax", _distrax),
    "numpyro": Library("numpyro", _numpyro),
    "tfp": Library("tensorflow_probability", _tfp),
    "torch": Library("torch", _torch, in_torch),
}


def installed(name: str) -> bool:
    return importlib.util.find_spec(LIBRARIES[name].module) is not None


def measure(library: str, call: Callable, function: Function, batch: Batch, dtype: str) -> Results | None:
    """The results of the library; None if it refuses the dtype or the shapes."""
    try:
        return LIBRARIES[library].evaluate(call, function, batch, dtype)
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        if library == OURS:
            raise
        return None
