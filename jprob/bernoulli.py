"""The Bernoulli distribution: yes or no, given by one logit.

The logit z is the log-odds log(p / (1 - p)) of "yes": p = sigmoid(z) and 1 - p = sigmoid(-z). The distribution is the
categorical one with logits (0, z). Both probabilities come from exponentials of -|z|, never as 1 minus the other. So
the small one keeps its digits.

Values and gradients are computed in float32 at least (float64 where an input has it). Their relative error is at most
16 u, u half the spacing at 1 of that dtype: one logit is given exactly, and no difference of logits is rounded. A
gradient p - y may cancel if y is a soft label. Its error is then relative to the larger of (1 - y) p and y (1 - p).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Key, Real

from . import _accurate, _checks, categorical


@_checks.public()
def cross_entropy(
    logits: Float[Array, "*shape"], labels: Real[Array, "*shape"] | Bool[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Cross-entropy -y log p - (1 - y) log(1 - p) of a label y and p = sigmoid(logits).

    The gradient in the logits is p - y, never rounded to 0 where the prediction is confident and right. The gradient in
    the label is -z.

    Args:
      logits: z, log-odds of "yes" in any floating dtype; -inf and inf are certain.
      labels: y in [0, 1] in the same shape: floating-point (a probability of "yes" is a soft label), integer or bool.

    Returns:
      One value per logit in nats, at least float32, never negative: inf where a certain prediction is wrong, 0 where
      it is right. A label that is missing (NaN) or outside [0, 1] gives NaN with a gradient of 0. So a masked one is
      harmless. Relative error at most 16 u.

    Raises:
      ValueError: the logits are not floating-point, the labels are complex, or the shapes differ.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, 4.3.2.

    >>> print(cross_entropy(jnp.array([20.0, -20.0]), jnp.array([1, 1])))
    [2.0611537e-09 2.0000000e+01]
    """
    return _cross_entropy("cross_entropy", logits, labels)


@_checks.public()
def log_prob(
    labels: Real[Array, "*shape"] | Bool[Array, "*shape"], logits: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Log-probability of the label y: log p for "yes", log(1 - p) for "no", minus the `cross_entropy`.

    Args:
      labels: y, 0 or 1 in the logits' shape: bool, integer or floating-point; between 0 and 1 an expectation.
      logits: z, log-odds of "yes" in any floating dtype.

    Returns:
      One value per logit in nats, at least float32, at most 0, or NaN as in `cross_entropy`. Relative error at most
      16 u.

    Raises:
      ValueError: as for `cross_entropy`.

    >>> print(log_prob(jnp.array(False), jnp.array(-20.0)))
    -2.0611537e-09
    """
    return -_cross_entropy("log_prob", logits, labels)


@_checks.public()
def prob(logits: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Probability p = 1 / (1 + exp(-z)) of "yes", the sigmoid, with its digits in both tails.

    Use `prob(-logits)` for 1 - p, which rounding would lose.

    Args:
      logits: z, log-odds of "yes" in any floating dtype; -inf and inf are certain.

    Returns:
      One value per logit in [0, 1], in the logits' dtype. Relative error at most 16 u and one rounding to that dtype,
      of the gradient p (1 - p) too.

    Raises:
      ValueError: the logits are not floating-point.

    >>> print(prob(jnp.array([-20.0, 0.0])), jax.grad(prob)(20.0))
    [2.0611537e-09 5.0000000e-01] 2.0611537e-09
    """
    _checks.floating("prob", logits=logits)
    return _sigmoid(logits.astype(_accurate.compute_dtype(logits))).astype(logits.dtype)


@_checks.public(static=("base",))
def entropy(logits: Float[Array, "*shape"], *, base: float | None = None) -> Float[Array, "*shape"]:
    """Entropy -p log p - (1 - p) log(1 - p) of p = sigmoid(logits).

    Args:
      logits: z, log-odds of "yes" in any floating dtype; -inf and inf are certain.
      base: unit of the result, static: None for nats, 2 for bits.

    Returns:
      One value per logit, at least float32: ln 2 nats (1 bit) at z = 0, 0 where certain. Relative error at most 16 u;
      of the gradient -z p (1 - p) too.

    Raises:
      ValueError: the logits are not floating-point, or `base` is not a number above 1.

    Source: Cover and Thomas (2006), Elements of Information Theory, 2.1.

    >>> print(entropy(jnp.array(0.0), base=2))
    1.0
    """
    _checks.floating("entropy", logits=logits)
    return _entropy(logits.astype(_accurate.compute_dtype(logits))) * _checks.nats_to("entropy", base)


@_checks.public(static=("base",))
def kl_divergence(
    p_logits: Float[Array, "*shape"], q_logits: Float[Array, "*shape"], *, base: float | None = None
) -> Float[Array, "*shape"]:
    """Kullback-Leibler divergence KL(p || q), p and q the sigmoid of their logits.

    The value is p log(p / q) + (1 - p) log((1 - p) / (1 - q)).

    Args:
      p_logits: log-odds of "yes" under p, the reference.
      q_logits: log-odds of "yes" under q, the approximation, in the same shape.
      base: unit of the result, static: None for nats, 2 for bits.

    Returns:
      One value per pair, at least float32, never negative: 0 where p = q, inf where q is certain and p is not. The
      divergence keeps its digits where p and q nearly agree. Relative error at most (16 + R) u, R the larger of |z_p|
      and |z_q|: it is the divergence of two classes with logits (0, z). An infinite divergence has the gradient 0 in
      p's logits.

    Raises:
      ValueError: a dtype or `base` is not as above, or the shapes differ.

    Source: Kullback and Leibler (1951), Annals of Mathematical Statistics 22(1).

    >>> print(f"{kl_divergence(jnp.array(0.0), jnp.array(2.0)):.4f}")
    0.4338
    """
    _checks.floating("kl_divergence", p_logits=p_logits, q_logits=q_logits)
    _checks.same_shape("kl_divergence", "p_logits", "q_logits", p_logits.shape, q_logits)
    # The larger of the two logits is 0: a certain answer excludes the other one.
    p, q = (jnp.stack([jnp.minimum(-z, 0), jnp.minimum(z, 0)], axis=-1) for z in (p_logits, q_logits))
    return categorical.kl_divergence(p, q, base=base)


@_checks.public()
def brier_score(
    logits: Float[Array, "*shape"], labels: Real[Array, "*shape"] | Bool[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Brier score (p - y)^2 of p = sigmoid(logits), in [0, 1]: half that of the two classes "yes" and "no".

    The gradient 2 (p - y) p (1 - p) decays as exp(-|z|) where the prediction is confidently wrong.

    Args:
      logits: z, log-odds of "yes" in any floating dtype; -inf and inf are certain.
      labels: y in [0, 1] in the same shape: floating-point, integer or bool.

    Returns:
      One value per logit, at least float32. A label that is missing (NaN) or outside [0, 1] gives NaN with a gradient
      of 0. Relative error at most 16 u for a label of 0 or 1, of a gradient entry too; for a soft label as far as p and
      y differ.

    Raises:
      ValueError: as for `cross_entropy`.

    Source: Brier (1950), Monthly Weather Review 78(1).

    >>> print(brier_score(jnp.array(0.0), jnp.array(1)))
    0.25
    """
    z, y, inside = _canonical("brier_score", logits, labels)
    # p - y = (1 - y) p - y (1 - p): for y = 0 and 1 a single term, without cancellation.
    return _accurate.nan_unless(inside, jnp.square((1 - y) * _sigmoid(z) - y * _sigmoid(-z)))


@_checks.public(static=("shape",))
def sample(
    key: Key[Array, ""], logits: Float[Array, "*shape"], *, shape: tuple[int, ...] | None = None
) -> Bool[Array, "*sample"]:
    """Draws "yes" with probability sigmoid(logits).

    Args:
      key: a random key.
      logits: z, log-odds of "yes" in any floating dtype; -inf and inf are certain.
      shape: of the result, static: it ends in the logits' shape, which is the default.

    Returns:
      Independent draws, of dtype bool. The rarer answer is drawn as often as it should be, down to probabilities far
      below u.

    Raises:
      ValueError: the logits are not floating-point, or `shape` does not end in their shape.

    >>> draws = sample(jax.random.key(0), jnp.array(1.0986123), shape=(10_000,))
    >>> print(f"{jnp.mean(draws):.2f}")
    0.75
    """
    _checks.floating("sample", logits=logits)
    shape = _checks.sample_shape("sample", shape, logits.shape, "logits")
    z = jnp.broadcast_to(logits.astype(_accurate.compute_dtype(logits)), shape)
    # The rare answer is what is drawn: near 1 a probability has no digits left for what is missing to 1.
    rare = jax.random.bernoulli(key, _sigmoid(-jnp.abs(z)), shape, mode="high")
    return rare ^ (z > 0)


def _cross_entropy(function, logits, labels):
    z, y, inside = _canonical(function, logits, labels)
    loss = _accurate.multiply_no_nan(y, _softplus(-z)) + _accurate.multiply_no_nan(1 - y, _softplus(z))
    return _accurate.nan_unless(inside, loss)


def _canonical(function, logits, labels):
    """Logits and labels in the dtype computed in, and whether each label is in [0, 1]; one that is not is 0 instead."""
    _checks.floating(function, logits=logits)
    _checks.real(function, labels=labels)
    _checks.same_shape(function, "logits", "labels", logits.shape, labels)
    dtype = _accurate.compute_dtype(logits, labels)
    y = labels.astype(dtype)
    inside = (y >= 0) & (y <= 1)
    _checks.expect(inside, y, f"{function}: label {{value}} is outside [0, 1]")
    return logits.astype(dtype), jnp.where(inside, y, 0), inside


@jax.custom_jvp
def _entropy(z):
    """log(1 + e^-a) + a sigmoid(-a) with a = |z|: both terms are positive. The derivative is -z p (1 - p)."""
    a = jnp.where(jnp.isinf(z), 0, jnp.abs(z))
    return jnp.where(jnp.isinf(z), 0, _softplus(-a) + a * _sigmoid(-a))


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    finite = jnp.where(jnp.isinf(z), 0, z)  # 0 * inf: a certain answer has entropy 0 and gradient 0
    return _entropy(z), -finite * _sigmoid(z) * _sigmoid(-z) * dz


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
