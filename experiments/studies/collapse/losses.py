"""The losses, what is exact about them, and where their roundings end them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float64, Int

from jprob import categorical

LABELS = {"usual": "usual float32", "jprob": "jprob float32", "float64": "float64", "nudged": "float64, nudged",
          "usual16": "usual, bfloat16 logits", "jprob16": "jprob, bfloat16 logits",
          "smoothed": "usual, smoothed labels"}  # fmt: skip
BITS = {"usual": 24, "usual16": 8}  # of the significand
SMOOTHING = 0.1  # share of a target that is spread over all classes
MOMENT = 63 * math.log(2)  # log-odds from which e^-2 odds underflows float32
HALF_SPACING, TINY = 2.0**-24, 2.0**-126  # half the spacing of float32 at 1, and its smallest normal number


def usual(z: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
    """The form of optax and torch, in the dtype of the logits."""
    return jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0]


def smoothed(z: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
    """The usual form with label smoothing."""
    return (1 - SMOOTHING) * usual(z, labels) - SMOOTHING * jnp.mean(jax.nn.log_softmax(z, axis=-1), axis=-1)


def log_odds(z: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float64[Array, " n"]:
    """log(p_y / (1 - p_y)) = z_y - logsumexp of the others, in float64: nothing cancels but the logits themselves."""
    z = z.astype(jnp.float64)
    own = jnp.arange(z.shape[-1], dtype=labels.dtype)[None] == labels[:, None]
    others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, z), axis=-1)
    return jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0] - others


def exact(z: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float64[Array, " n"]:
    """The cross-entropy in float64, without jprob."""
    return jax.nn.softplus(-log_odds(z, labels))


LOSSES: dict[str, Callable[..., Array]] = {
    "usual": usual,
    "jprob": categorical.cross_entropy,
    "float64": exact,
    "nudged": exact,
    "usual16": lambda z, labels: usual(z.astype(jnp.bfloat16), labels),
    "jprob16": lambda z, labels: categorical.cross_entropy(z.astype(jnp.bfloat16), labels),
    "smoothed": smoothed,
}


def gradients(loss: str, z: Float[Array, "n k"], labels: Int[Array, " n"]) -> dict[str, Array]:
    """How the arm's gradient in these logits differs from that of float64."""
    got = jax.grad(lambda z: jnp.sum(LOSSES[loss](z, labels)))(z).astype(jnp.float64)
    z = z.astype(jnp.float64)
    want = jax.grad(lambda z: jnp.sum(exact(z, labels)))(z)
    size, odds = jnp.max(jnp.abs(want), axis=-1), log_odds(z, labels)
    bound = (16 + jnp.max(z, axis=-1) - jnp.min(z, axis=-1)) * HALF_SPACING
    flushed = (z.shape[-1] - 1) * TINY  # what a sum may lose: terms below the smallest normal number
    off = jnp.maximum(jnp.max(jnp.abs(got - want), axis=-1) - flushed, 0) / (size * bound)
    dead = jnp.take_along_axis(got, labels[:, None], axis=-1)[:, 0] == 0
    normal = size > flushed
    largest = jnp.max(jnp.abs(got), axis=-1)
    return {
        "error": jnp.max(jnp.where(normal, off, 0)),
        "dead": jnp.mean(dead & normal),
        "lowest_dead": jnp.min(jnp.where(dead & normal, odds, jnp.inf)),
        "highest_live": jnp.max(jnp.where(dead, -jnp.inf, odds)),
        "class_sum": jnp.max(jnp.abs(jnp.sum(got, axis=-1)) / jnp.where(largest > 0, largest, 1)),
    }


def moment_wall(b2: float) -> float:
    """Log-odds from which Adam's share of a square, (1 - b2) e^-2 odds, underflows."""
    return MOMENT + math.log(1 - b2) / 2
