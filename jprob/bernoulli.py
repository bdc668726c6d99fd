"""The Bernoulli distribution: yes or no, given by one logit.

The logit z is the log-odds log(p / (1 - p)) of "yes", so p = sigmoid(z) and 1 - p = sigmoid(-z). It is the categorical
distribution with logits (0, z). Both probabilities come from exponentials of -|z|, never as 1 minus the other, so that
the small one keeps its digits.

Values and gradients are computed in float32 at least (float64 where an input has it), with a relative error of at most
16 u, u half the spacing at 1 of that dtype: one logit is given exactly, and no difference of logits is rounded.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from . import _accurate, _checks


@jax.jit
def cross_entropy(
    logits: Float[Array, "*shape"], labels: Float[Array, "*shape"] | Int[Array, "*shape"] | Bool[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Cross-entropy -y log p - (1 - y) log(1 - p) of a label y and p = sigmoid(logits).

    The gradient in the logits is p - y, and it is never rounded to 0 where the prediction is confident and right. The
    gradient in the label is -z.

    Args:
      logits: z, log-odds of "yes" in any floating dtype; -inf and inf are certain.
      labels: y in [0, 1] in the same shape: floating-point (a probability of "yes" is a soft label), integer or bool.

    Returns:
      One value per logit in nats, at least float32, never negative: inf where a certain prediction is wrong, 0 where
      it is right; NaN where a label is outside [0, 1]. Relative error at most 16 u.

    Raises:
      ValueError: the logits are not floating-point, the labels are complex, or the shapes differ.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, 4.3.2.

    >>> print(cross_entropy(jnp.array([20.0, -20.0]), jnp.array([1, 1])))
    [2.0611537e-09 2.0000000e+01]
    """
    _checks.floating("cross_entropy", logits=logits)
    if not hasattr(labels, "dtype") or jnp.issubdtype(labels.dtype, jnp.complexfloating):
        raise ValueError(f"cross_entropy: labels must be real numbers or bool, got {_checks.describe(labels)}")
    _checks.same_shape("cross_entropy", "logits", "labels", logits.shape, labels)
    soft = jnp.issubdtype(labels.dtype, jnp.floating)
    dtype = _accurate.compute_dtype(logits, labels) if soft else _accurate.compute_dtype(logits)
    y = labels.astype(dtype)
    inside = (y >= 0) & (y <= 1)
    _checks.expect(inside, y, "cross_entropy: label {value} is outside [0, 1]")
    z = logits.astype(dtype)
    y = jnp.where(inside, y, jnp.nan)
    return _accurate.weigh(y, _softplus(-z)) + _accurate.weigh(1 - y, _softplus(z))


@jax.custom_jvp
def _sigmoid(z):
    """1 / (1 + exp(-z)), through an exponential that cannot overflow. The derivative is sigmoid(z) sigmoid(-z)."""
    return jnp.exp(jnp.minimum(z, 0)) / (1 + jnp.exp(-jnp.abs(z)))


@_sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    return _sigmoid(z), _sigmoid(z) * _sigmoid(-z) * dz


@jax.custom_jvp
def _softplus(z):
    """log(1 + exp(z)) = -log sigmoid(-z). The derivative is sigmoid(z)."""
    return jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-jnp.abs(z)))


@_softplus.defjvp
def _softplus_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    return _softplus(z), _sigmoid(z) * dz
