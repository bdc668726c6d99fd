"""The Gaussian (normal) distribution of one real number, given by its mean `loc` and standard deviation `scale`.

Its density is exp(-r^2 / 2) / (scale sqrt(2 pi)) with r = (x - loc) / scale, the distance from the mean in standard
deviations. Its negative log-likelihood is squared error divided by 2 scale^2, plus log scale: with a fixed scale,
maximum likelihood is least squares.

A scale is a standard deviation, never a variance: the square of 1e-30 is 0 in float32, and every formula here
standardises before it squares, so that any positive scale of the dtype works. Arguments broadcast against each other.
Computed in float32 at least (float64 where an input has it); u is half the spacing at 1 of that dtype.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from . import _accurate, _checks


@jax.jit
def log_prob(
    x: Float[Array, "*#shape"],
    loc: float | Float[Array, "*#shape"] = 0.0,
    scale: float | Float[Array, "*#shape"] = 1.0,
    *,
    log_scale: float | Float[Array, "*#shape"] | None = None,
) -> Float[Array, "*shape"]:
    """Log-density -r^2 / 2 - log scale - log(2 pi) / 2 with r = (x - loc) / scale.

    Gradients: -r / scale in x, r / scale in loc, (r^2 - 1) / scale in scale, r^2 - 1 in log_scale.

    Args:
      x: where to evaluate, floating-point.
      loc: mean, in the unit of x.
      scale: standard deviation, positive, in the unit of x. Leave it out where `log_scale` is given.
      log_scale: its logarithm, any real number: the form for a network that predicts the scale.

    Returns:
      The log-density (in nats, per unit of x) in the shape all arguments broadcast to, at least float32; -inf at
      x = +-inf; NaN for a scale that is not positive. Error at most 8 u of |r^2 / 2| + |log scale| + log(2 pi) / 2:
      a log-density may pass through 0. With `log_scale`, (8 + |log_scale|) u. Gradient entries likewise, r^2 - 1 taken
      as a product of a sum and a difference so that it keeps its digits near one standard deviation.

    Raises:
      ValueError: an argument is complex, the shapes do not broadcast, or both scale and log_scale are given.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, 1.2.4.

    >>> print(f"{log_prob(jnp.array(0.0)):.6f}")
    -0.918939
    >>> print(f"{log_prob(jnp.array(1e-30), 0.0, 1e-30):.4f}")
    67.6586
    """
    if log_scale is not None and not isinstance(scale, float):
        raise ValueError("log_prob: expected scale or log_scale, got both")
    _checks.floating("log_prob", x=x)
    given = {"loc": loc, "scale": scale} if log_scale is None else {"loc": loc, "log_scale": log_scale}
    dtype = _accurate.compute_dtype(x, *given.values())
    x, loc, spread = _checks.broadcast_together("log_prob", dtype, x=x, **given)
    if log_scale is not None:
        return _log_prob_log_scale(x - loc, spread)
    _checks.expect(spread > 0, spread, "log_prob: scale {value} is not positive")
    return _log_prob(x - loc, jnp.where(spread > 0, spread, jnp.nan))


_HALF_LOG_2PI = math.log(2 * math.pi) / 2


@jax.custom_jvp
def _log_prob(offset, scale):
    """-r^2 / 2 - log scale - log(2 pi) / 2, r = offset / scale."""
    return -jnp.square(offset / scale) / 2 - jnp.log(scale) - _HALF_LOG_2PI


@_log_prob.defjvp
def _log_prob_jvp(primals, tangents):
    """-(r / scale) d offset + ((r^2 - 1) / scale) d scale."""
    (offset, scale), (d_offset, d_scale) = primals, tangents
    # Times the inverse: XLA turns a division of a quotient into one by scale * scale, which leaves the dtype's range.
    inverse = 1 / scale
    # r^2 - 1 = (offset - scale) (offset + scale) / scale^2: near one standard deviation the difference is exact.
    excess = ((offset - scale) * inverse) * ((offset + scale) * inverse)
    slope = -(offset / scale * inverse) * d_offset + excess * inverse * d_scale
    return _log_prob(offset, scale), slope


@jax.custom_jvp
def _log_prob_log_scale(offset, log_scale):
    return -jnp.square(offset * jnp.exp(-log_scale)) / 2 - log_scale - _HALF_LOG_2PI


@_log_prob_log_scale.defjvp
def _log_prob_log_scale_jvp(primals, tangents):
    """-(r / scale) d offset + (r - 1) (r + 1) d log_scale, r = offset exp(-log_scale)."""
    (offset, log_scale), (d_offset, d_log_scale) = primals, tangents
    inverse = jnp.exp(-log_scale)
    r = offset * inverse
    slope = -(r * inverse) * d_offset + (r - 1) * (r + 1) * d_log_scale
    return _log_prob_log_scale(offset, log_scale), slope
