"""The arms that several studies compare: an output with a loss, and the colour that each has in every figure.

Each gradient is that in the logits:

    softmax + cross-entropy     gradient p - y
    softmax + squared error     half the Brier score, ||p - y||^2 / 2: gradient p_i (e_i - <p, e>), e = p - y
    linear + squared error      ||z - y||^2 / 2: gradient z - y
    sigmoid + cross-entropy     one sigmoid a class, the cross-entropies added: gradient s - y
    sigmoid + squared error     one sigmoid a class, ||s - y||^2 / 2: gradient (s - y) s (1 - s)
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from experiments import plots
from jprob import bernoulli, categorical

SOFTMAX_CE = "softmax + cross-entropy"
SOFTMAX_SE = "softmax + squared error"
LINEAR_SE = "linear + squared error"
SIGMOID_CE = "sigmoid + cross-entropy"
SIGMOID_SE = "sigmoid + squared error"

ALL = (SOFTMAX_CE, SOFTMAX_SE, LINEAR_SE, SIGMOID_CE, SIGMOID_SE)
COLOURS: dict[str, str] = dict(zip(ALL, plots.PALETTE, strict=False))


def loss(arm: str, z: Float[Array, "*n k"], labels: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """The arm's loss of each example, from its logits."""
    if arm == SOFTMAX_CE:
        return categorical.cross_entropy(z, labels)
    if arm == SOFTMAX_SE:
        return categorical.brier_score(z, labels) / 2
    y = jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype)
    each = {
        LINEAR_SE: lambda: jnp.square(z - y) / 2,
        SIGMOID_CE: lambda: bernoulli.cross_entropy(z, y),
        # |s - y| is the probability of the opposite label, exp(-cross-entropy): its derivative cancels nowhere.
        SIGMOID_SE: lambda: jnp.exp(-2 * bernoulli.cross_entropy(z, 1 - y)) / 2,
    }
    return jnp.sum(each[arm](), axis=-1)
