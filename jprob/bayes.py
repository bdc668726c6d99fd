"""Bayes' rule: the posterior of hypotheses from their prior and the likelihood of an observation.

posterior_k = prior_k likelihood_k / evidence. The evidence sum_k prior_k likelihood_k is the probability of the
observation under the prior. The logarithmic form is an addition and a softmax, and nothing underflows. An example: 1 %
of people have an illness, and a test has sensitivity 99 % and 5 % false positives. Then 16.7 % of the positives have
it.

Hypotheses k are the classes of a categorical distribution. A prior is given by logits: unnormalised log-probabilities,
such as `jnp.log(probs)`, and -inf for an impossible hypothesis. A posterior comes out as log-probabilities, which are
logits for the next update. For a continuous unknown, the conjugate pairs keep a posterior in the family of its prior.

Computed in float32 at least (float64 where an input has it); u is half the spacing at 1 of that dtype. R is the largest
gap between finite log-priors of a row plus that between its finite log-likelihoods: constants common to all hypotheses
cost nothing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Real

from . import _accurate, _checks, _placement, _weights, gaussian


class Beta(NamedTuple):
    """The parameters of a beta distribution of a probability; its mean is alpha / (alpha + beta)."""

    alpha: Array  # 1 + the number of "yes" seen, from a uniform prior
    beta: Array  # 1 + the number of "no"


@_checks.public(static=("axis",))
def log_posterior(
    log_prior: Float[Array, "*#shape"], log_likelihood: Float[Array, "*#shape"], *, axis: int = -1
) -> Float[Array, "*shape"]:
    """Log-posterior of the hypotheses after an observation: log_softmax(log_prior + log_likelihood).

    Args:
      log_prior: logits of the hypotheses before the observation; -inf marks an impossible one.
      log_likelihood: log-probability (or log-density) of the observation under each hypothesis, up to one constant for
        all of them; -inf where a hypothesis excludes it. The shapes broadcast, with the hypotheses on the same axis.
      axis: the axis of the hypotheses.

    Returns:
      An array of the shape they broadcast to, in the dtype they promote to, at most 0: -inf where the prior is, or the
      likelihood; NaN along the row, with gradient 0, if that leaves none, or for a logit of +inf. Relative error at
      most (16 + R) u and one rounding to the dtype; the most probable hypothesis keeps its digits too.

    Raises:
      ValueError: an argument is not floating-point, `axis` is out of range, or the shapes do not broadcast.

    Source: MacKay (2003), Information Theory, Inference, and Learning Algorithms, 2.3.

    >>> has_it, positive = jnp.log(jnp.array([0.01, 0.99])), jnp.log(jnp.array([0.99, 0.05]))
    >>> print(f"{100 * jnp.exp(log_posterior(has_it, positive))[0]:.1f} %")
    16.7 %
    """
    prior, likelihood, axis, dtype = _canonical("log_posterior", log_prior, log_likelihood, axis)
    return _normalised(_joint(prior, likelihood, axis), axis).astype(dtype)


@_checks.public(static=("axis",))
def log_evidence(
    log_prior: Float[Array, "*#shape"], log_likelihood: Float[Array, "*#shape"], *, axis: int = -1
) -> Float[Array, "*rest"]:
    """Log-evidence log sum_k prior_k likelihood_k: the log-probability of the observation under the prior.

    The prior is normalised first: its logits may have any common offset, and those of the likelihood count as they are.
    Gradients: the posterior in the log-likelihood, posterior - prior in the log-prior.

    Args:
      log_prior: logits of the hypotheses; -inf marks an impossible one.
      log_likelihood: log-probability (or log-density) of the observation under each hypothesis; -inf where a hypothesis
        excludes it. The shapes broadcast, with the hypotheses on the same axis.
      axis: the axis of the hypotheses; it is summed away.

    Returns:
      One value per row in nats, at least float32: -inf where every possible hypothesis excludes the observation, NaN
      where no hypothesis is possible or a logit is +inf. Both have gradient 0. Log-likelihoods of discrete observations
      are at most 0. For these the relative error is at most (16 + 2 R) u. The bound also holds for an evidence near 1,
      whose logarithm is near 0. Else it is that of |log-likelihood| + |result|, for the hypothesis that explains the
      observation best.

    Raises:
      ValueError: an argument is not floating-point, `axis` is out of range, or the shapes do not broadcast.

    Source: MacKay (2003), Information Theory, Inference, and Learning Algorithms, 28.

    >>> has_it, positive = jnp.log(jnp.array([0.01, 0.99])), jnp.log(jnp.array([0.99, 0.05]))
    >>> print(f"{jnp.exp(log_evidence(has_it, positive)):.4f}")
    0.0594
    """
    prior, likelihood, axis, _ = _canonical("log_evidence", log_prior, log_likelihood, axis)
    likelihood = _allowed(prior, likelihood)
    before, best = (_accurate.maximum(z, axis) for z in (prior, prior + likelihood))
    possible = jnp.isfinite(best)
    prior, likelihood = (jnp.where(possible, z, 0) for z in (prior, likelihood))
    value = jnp.where(possible, _log_evidence(prior, likelihood, axis), -jnp.inf)
    return jnp.squeeze(_accurate.nan_unless(jnp.isfinite(before) & (best < jnp.inf), value), axis)


@_checks.public()
def update(
    log_prior: Float[Array, "*#shape"], log_likelihoods: Float[Array, "steps *#shape"]
) -> Float[Array, "steps *shape"]:
    """Log-posterior after each of a sequence of observations, which are independent given the hypothesis.

    The posterior after one observation is the prior of the next. So the last is the posterior given all of them, in any
    order.

    Args:
      log_prior: logits of the hypotheses, on the last axis; -inf marks an impossible one.
      log_likelihoods: as in `log_posterior`, one for each observation, along an additional first axis.

    Returns:
      One posterior per observation along the first axis, each in the shape that one likelihood and the prior broadcast
      to; the dtype is what they promote to. Rows as in `log_posterior`; NaN from the observation on that leaves no
      hypothesis. After t observations the relative error is at most (16 + R + S log2 2t) u. One rounding to the dtype
      adds to it. S is the sum of the t gaps of their log-likelihoods.

    Raises:
      ValueError: an argument is not floating-point, has no axis, or the shapes do not broadcast.

    Source: MacKay (2003), Information Theory, Inference, and Learning Algorithms, 3.

    >>> fair_or_biased, heads = jnp.zeros(2), jnp.log(jnp.array([[0.5, 0.75]] * 3))
    >>> for fair, biased in jnp.exp(update(fair_or_biased, heads)):
    ...     print(f"{fair:.4f} {biased:.4f}")
    0.4000 0.6000
    0.3077 0.6923
    0.2286 0.7714
    """
    _checks.floating("update", log_prior=log_prior, log_likelihoods=log_likelihoods)
    if log_likelihoods.ndim < 2:
        expected = "one axis of observations and one of hypotheses"
        raise ValueError(f"update: log_likelihoods must have {expected}, got {_checks.describe(log_likelihoods)}")
    # The prior and one likelihood get one rank, so that neither meets the axis of observations.
    rank = max(log_prior.ndim, log_likelihoods.ndim - 1)
    log_likelihoods = jnp.expand_dims(log_likelihoods, range(1, 2 + rank - log_likelihoods.ndim))
    log_prior = jnp.expand_dims(log_prior, range(1 + rank - log_prior.ndim))
    prior, likelihoods, axis, dtype = _canonical("update", log_prior, log_likelihoods, -1)
    total = jnp.cumsum(_gap(_allowed(prior, likelihoods), axis), axis=0)
    return _normalised(_joint(prior, total, axis), axis).astype(dtype)


@_checks.public(static=("axis",))
def gaussian_posterior(
    prior_loc: float | Real[Array, "*#rest"],
    prior_scale: float | Real[Array, "*#rest"],
    x: Float[Array, "*shape"],
    scale: float | Real[Array, "*#rest"],
    *,
    axis: int = -1,
    weights: Real[Array, "*#shape"] | Bool[Array, "*#shape"] | None = None,
) -> gaussian.Parameters:
    """Posterior of the mean of a Gaussian whose standard deviation is known, from a Gaussian prior of that mean.

    The posterior is Gaussian again. Let m be the mean of n observations, a = prior_scale and b = scale / sqrt(n). Its
    scale is 1 / sqrt(1 / a^2 + 1 / b^2). Its loc is m + (prior_loc - m) b^2 / (a^2 + b^2).

    Args:
      prior_loc: mean of the prior.
      prior_scale: its standard deviation, positive; inf for a flat prior.
      x: observations, floating-point.
      scale: the known standard deviation of one observation, positive and finite.
      axis: the axis of the observations; it is summed away, and the other arguments broadcast with what remains.
      weights: how often each observation counts, real numbers or bool, not negative, broadcast to the shape of x; their
        sum is n.

    Returns:
      gaussian.Parameters(loc, scale), at least float32: the prior where there is no weight. They are NaN, with gradient
      0, for a scale that is not positive or a negative or infinite weight; likewise for an infinite observation or
      prior_loc. Error for n observations at most (24 + log2 n) u, for any scales the dtype holds. That of loc is
      relative to |loc| and the distance of prior and observations, that of scale to itself.

    Raises:
      ValueError: an argument is not real, `axis` is out of range or empty, or the shapes do not broadcast.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, 2.3.6.

    >>> loc, scale = gaussian_posterior(0.0, 1.0, jnp.array([1.0, 2.0, 3.0]), 1.0)
    >>> print(f"{loc:.4f} +- {scale:.4f}")
    1.5000 +- 0.5000
    """
    x, w, ok, axis = _weights.weighted("gaussian_posterior", x, axis, weights)
    observed, count = jnp.squeeze(_weights.deviations(x, w, axis)[1], axis), jnp.sum(w, axis=axis)
    given = {"prior_loc": prior_loc, "prior_scale": prior_scale, "x": observed, "scale": scale}
    prior_loc, a, observed, b = _checks.broadcast_together("gaussian_posterior", **given)
    count, ok = (jnp.broadcast_to(v, a.shape) for v in (count.astype(a.dtype), ok))
    known = _checks.FINITE_POSITIVE.holds(b)
    _checks.expect(a > 0, a, "gaussian_posterior: prior_scale {value} is not positive")
    _checks.expect(known, b, "gaussian_posterior: scale {value} is not positive and finite")
    ok &= (a > 0) & known & jnp.isfinite(prior_loc)
    prior_loc, a, b = jnp.where(ok, prior_loc, 0), jnp.where(ok, a, 1), jnp.where(ok, b, 1)
    some = count != 0
    b = _accurate.divide(b, jnp.sqrt(jnp.where(some, count, 1)))
    step = observed - prior_loc
    # From the nearer of the two, so that what is added is the smaller correction.
    loc = jnp.where(_share(a, b) < 0.5, observed - _share(a, b) * step, prior_loc + _share(b, a) * step)
    loc, scale = jnp.where(some, loc, prior_loc), jnp.where(some, _parallel(a, b), a)
    return gaussian.Parameters(_accurate.nan_unless(ok, loc), _accurate.nan_unless(ok, scale))


@_checks.public(static=("axis",))
def beta_posterior(
    prior_alpha: float | Real[Array, "*#rest"],
    prior_beta: float | Real[Array, "*#rest"],
    labels: Real[Array, "*shape"] | Bool[Array, "*shape"],
    *,
    axis: int = -1,
    weights: Real[Array, "*#shape"] | Bool[Array, "*#shape"] | None = None,
) -> Beta:
    """Posterior of the probability of "yes", from a beta prior: alpha grows by the number of "yes", beta by the "no".

    Args:
      prior_alpha: alpha of the prior, positive; 1 and 1 are the uniform prior, 1/2 and 1/2 that of Jeffreys.
      prior_beta: beta of the prior, positive.
      labels: what was observed, in [0, 1]: integer or bool, or floating-point (a share of "yes").
      axis: the axis of the observations; it is summed away, and the prior broadcasts with what remains.
      weights: how often each observation counts, real numbers or bool, not negative, broadcast to the shape of the
        labels. One of weight 0 does not count, also with a bad label.

    Returns:
      Beta(alpha, beta), at least float32: the prior where there is no weight. They are NaN, with gradient 0, for a
      prior that is not positive or a negative or infinite weight; likewise for a label outside [0, 1]. Relative error
      for n observations at most (4 + log2 n) u.

    Raises:
      ValueError: an argument is not real, `axis` is out of range or empty, or the shapes do not broadcast.

    Source: Gelman et al. (2013), Bayesian Data Analysis, 2.1.

    >>> posterior = beta_posterior(1.0, 1.0, jnp.array([True, True, False]))
    >>> print(posterior.alpha, posterior.beta)
    3.0 2.0
    """
    _checks.real("beta_posterior", labels=labels)
    y = labels.astype(_accurate.compute_dtype(labels))
    y, w, ok, axis = _weights.weighted("beta_posterior", y, axis, weights, "labels")
    inside = ((y >= 0) & (y <= 1)) | (w == 0)
    _checks.expect(inside, y, "beta_posterior: label {value} is outside [0, 1]")
    y, ok = jnp.where(inside, y, 0), ok & jnp.all(inside, axis=axis)
    yes, no = (jnp.sum(w * share, axis=axis) for share in (y, 1 - y))
    given = {"prior_alpha": prior_alpha, "prior_beta": prior_beta, "labels": yes, "others": no}
    alpha, beta, yes, no = _checks.broadcast_together("beta_posterior", **given)
    for name, value in (("prior_alpha", alpha), ("prior_beta", beta)):
        _checks.expect(value > 0, value, f"beta_posterior: {name} {{value}} is not positive")
    ok = jnp.broadcast_to(ok, alpha.shape) & (alpha > 0) & (beta > 0)
    return Beta(_accurate.nan_unless(ok, alpha + yes), _accurate.nan_unless(ok, beta + no))


def _canonical(function, log_prior, log_likelihood, axis):
    """Both in one shape and in the dtype computed in, the axis from the front; and the dtype they promote to."""
    _checks.floating(function, log_prior=log_prior, log_likelihood=log_likelihood)
    prior, likelihood = _checks.broadcast_together(function, log_prior=log_prior, log_likelihood=log_likelihood)
    axis = _checks.axis_of(function, "the hypotheses", prior, axis, "hypothesis")
    _checks.logits_not_probs(function, prior, axis)
    with jax.numpy_dtype_promotion("standard"):
        return prior, likelihood, axis, jnp.promote_types(log_prior.dtype, log_likelihood.dtype)


def _gap(z, axis):
    """z - max z. The maximum is held constant under differentiation, where it cancels, but only to rounding."""
    return z - jax.lax.stop_gradient(_accurate.maximum(z, axis))


def _joint(prior, likelihood, axis):
    """log prior + log likelihood up to a constant; each is taken from its maximum first, which loses no digit."""
    return _allowed(prior, _gap(prior, axis) + _gap(_allowed(prior, likelihood), axis))


def _allowed(prior, z):
    """z, and -inf for what the prior excludes, however likely it makes the observation: -inf + inf is NaN."""
    return jnp.where(prior == -jnp.inf, -jnp.inf, z)


def _normalised(joint, axis):
    """log_softmax, and NaN with gradient 0 along a row without a hypothesis."""
    possible = jnp.isfinite(_accurate.maximum(joint, axis))
    return _accurate.nan_unless(possible, _accurate.log_softmax(jnp.where(possible, joint, 0), axis))


def _ratios(prior, likelihood, axis):
    """r and c with log evidence = r + c; r is the log-likelihood of one hypothesis. Likelihoods are `_allowed`.

    evidence = e^r (1 + sum_k p_k (e^(l_k - r) - 1)). For log-likelihoods at most 0, r is the largest, so that r and c
    have one sign. Else r is that of the best explanation, of which the evidence is at least the prior's share.
    """
    p, log_p = _accurate.softmax(prior, axis), _accurate.log_softmax(prior, axis)
    largest = _accurate.maximum(likelihood, axis)
    best = jnp.argmax(log_p + likelihood, axis=axis, keepdims=True)
    r = jnp.where(largest <= 0, largest, _placement.entries(likelihood, best, axis))
    t = likelihood - r
    # exp(log p + t), not p exp(t): p may be below the smallest number where the product is not.
    joint = jnp.exp(log_p + t)
    change = _accurate.total(jnp.where(t < 1, p * jnp.expm1(jnp.minimum(t, 1)), joint - p), axis)
    # Below -0.25 the sum has cancelled, and between -0.42 and -0.36 XLA's float64 log1p errs by 240 u.
    return r, jnp.where(change > -0.25, jnp.log1p(jnp.maximum(change, -0.25)), jnp.log(_accurate.total(joint, axis)))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _log_evidence(prior, likelihood, axis):
    r, c = _ratios(prior, likelihood, axis)
    return r + c


@_log_evidence.defjvp
def _log_evidence_jvp(axis, primals, tangents):
    """sum_k posterior_k dl_k + (posterior_k - prior_k) dz_k, the difference by expm1 where they are close."""
    (prior, likelihood), (d_prior, d_likelihood) = primals, tangents
    posterior = _accurate.softmax(_joint(prior, likelihood, axis), axis)
    slope = posterior * d_likelihood + _learned(prior, likelihood, axis) * d_prior
    return _log_evidence(prior, likelihood, axis), _accurate.total(slope, axis)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _learned(prior, likelihood, axis):
    """posterior - prior = prior (likelihood / evidence - 1)."""
    r, c = _ratios(prior, likelihood, axis)
    t = (likelihood - r) - c
    p = _accurate.softmax(prior, axis)
    far = _accurate.softmax(_joint(prior, likelihood, axis), axis) - p
    return jnp.where(t < 1, p * jnp.expm1(jnp.minimum(t, 1)), far)


@_learned.defjvp
def _learned_jvp(axis, primals, tangents):
    """d posterior - d prior, each p_i (dz_i - <p, dz>)."""
    (prior, likelihood), (d_prior, d_likelihood) = primals, tangents
    joint = _joint(prior, likelihood, axis)
    p, q = _accurate.softmax(joint, axis), _accurate.softmax(prior, axis)
    after, before = p * _accurate.centred(p, d_prior + d_likelihood, axis), q * _accurate.centred(q, d_prior, axis)
    return _learned(prior, likelihood, axis), after - before


@jax.custom_jvp
def _share(a, b):
    """b^2 / (a^2 + b^2): the share of a in the precision 1 / a^2 + 1 / b^2."""
    return 1 / (1 + jnp.square(a / b))


@_share.defjvp
def _share_jvp(primals, tangents):
    """2 share(a, b) share(b, a) (db / b - da / a), the second share for 1 minus the first."""
    (a, b), (da, db) = primals, tangents
    both = 2 * _share(a, b) * _share(b, a)
    return _share(a, b), both * (_accurate.divide(db, b) - _accurate.divide(da, a))


@jax.custom_jvp
def _parallel(a, b):
    """1 / sqrt(1 / a^2 + 1 / b^2), by the larger of the two."""
    small, large = jnp.minimum(a, b), jnp.maximum(a, b)
    return small / jnp.sqrt(1 + jnp.square(small / large))


@_parallel.defjvp
def _parallel_jvp(primals, tangents):
    """(s / a)^3 da + (s / b)^3 db."""
    (a, b), (da, db) = primals, tangents
    s = _parallel(a, b)
    return s, _accurate.divide(s, a) ** 3 * da + _accurate.divide(s, b) ** 3 * db
