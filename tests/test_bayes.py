"""Bayes' rule against its definition, in units of u."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jprob import bayes, gaussian

U = {"float32": 2.0**-24, "float64": 2.0**-53}
INF = jnp.inf


def span(x):
    return float(jnp.max(x) - jnp.min(x))


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 20.0])
@pytest.mark.optimized
def test_the_posterior_is_exact_whatever_constants_are_added(dtype, spread, shift):
    rng = np.random.default_rng(0)
    prior, likelihood = (jnp.asarray(shift + spread * rng.normal(size=6), dtype) for _ in range(2))
    joint = [a + b for a, b in zip(oracles.exactly(prior), oracles.exactly(likelihood), strict=True)]
    got = bayes.log_posterior(prior, likelihood)
    assert oracles.error(got, oracles.log_softmax(joint)) <= (16 + span(prior) + span(likelihood)) * U[dtype]


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 40.0])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
@pytest.mark.optimized
def test_the_log_evidence_keeps_its_digits_near_0(dtype, size, sign, spread):
    rng = np.random.default_rng(1)
    prior = jnp.asarray(spread * rng.normal(size=6), dtype)
    likelihood = jnp.asarray(sign * size * rng.uniform(0, 1, 6), dtype)
    z, x = oracles.exactly(prior), oracles.exactly(likelihood)
    want = oracles.log_evidence(z, x)
    bound = (16 + 2 * (span(prior) + span(likelihood))) * U[dtype]
    best = x[int(jnp.argmax(prior + likelihood))]
    scale = abs(want) if sign < 0 else abs(want) + abs(best)
    assert abs(oracles.mpf(float(bayes.log_evidence(prior, likelihood))) - want) <= bound * scale
    slopes = jax.grad(bayes.log_evidence, (0, 1))(prior, likelihood)
    before, after = oracles.softmax(z), oracles.softmax([a + b for a, b in zip(z, x, strict=True)])
    assert oracles.error(slopes[1], after) <= bound
    for got, p, q, t in zip(slopes[0], before, after, x, strict=True):
        close = p * (abs(t) + abs(want)) if abs(t - want) < 1 else p + q
        assert abs(oracles.mpf(float(got)) - (q - p)) <= 2 * bound * max(close, abs(q - p))


def test_a_sure_observation_has_evidence_1():
    assert bayes.log_evidence(jnp.array([3.0, -1.0]), jnp.zeros(2)) == 0
    assert bayes.log_evidence(jnp.array([5.0, 5.0, 4.0]), jnp.full(3, -2.5)) == -2.5


def test_what_is_excluded_stays_so():
    none = bayes.log_posterior(jnp.array([0.0, -INF]), jnp.array([-INF, 0.0]))
    assert jnp.isnan(none).all()
    assert bayes.log_evidence(jnp.array([0.0, -INF]), jnp.array([-INF, 0.0])) == -math.inf
    # The prior excludes the second, however likely it makes the observation; the third excludes the observation.
    prior, likelihood = jnp.array([0.0, -INF, 0.0]), jnp.array([-1.0, INF, -INF])
    assert bayes.log_posterior(prior, likelihood).tolist() == [0, -math.inf, -math.inf]
    assert bayes.log_evidence(prior, likelihood) == pytest.approx(-1 - math.log(2))
    slopes = jax.grad(bayes.log_evidence, (0, 1))(prior, likelihood)
    assert jnp.stack(slopes) == pytest.approx(np.array([[0.5, 0, -0.5], [1, 0, 0]]))
    for prior in (jnp.full(2, -INF), jnp.array([INF, 0.0])):
        assert jnp.isnan(bayes.log_posterior(prior, jnp.zeros(2))).all()
        assert jnp.isnan(bayes.log_evidence(prior, jnp.zeros(2)))
    impossible = jax.grad(bayes.log_evidence, (0, 1))(jnp.zeros(2), jnp.full(2, -INF))
    assert jnp.stack(impossible).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("steps", [1, 7, 300])
@pytest.mark.optimized
def test_updating_one_by_one_is_updating_at_once(dtype, steps):
    rng = np.random.default_rng(2)
    prior = jnp.asarray(rng.normal(size=4), dtype)
    likelihoods = jnp.asarray(rng.normal(size=(steps, 4)), dtype)
    got = bayes.update(prior, likelihoods)
    assert got.shape == (steps, 4)
    sums, gaps = oracles.exactly(prior), span(prior)
    step = prior
    for t in range(steps):
        sums = [a + b for a, b in zip(sums, oracles.exactly(likelihoods[t]), strict=True)]
        gaps += span(likelihoods[t])
        if t in (0, 5, steps - 1):
            bound = (16 + gaps * (1 + math.log2(2 * (t + 1)))) * U[dtype]
            assert oracles.error(got[t], oracles.log_softmax(sums)) <= bound
        step = bayes.log_posterior(step, likelihoods[t]) if steps < 10 else got[t]
    # The loop rounds its posterior at each step.
    np.testing.assert_allclose(got[-1], step, rtol=64 * steps * U[dtype])
    batch = bayes.log_posterior(prior, jnp.sum(likelihoods, axis=0))
    np.testing.assert_allclose(got[-1], batch, rtol=64 * steps * U[dtype])


def test_batches_of_sequences_and_priors_broadcast():
    prior, likelihoods = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(4, 1, 3) ** 0.5
    got = bayes.update(prior, likelihoods)
    assert got.shape == (4, 2, 3)
    np.testing.assert_array_equal(got[:, 1], bayes.update(prior[1], likelihoods[:, 0]))
    np.testing.assert_array_equal(bayes.update(prior, likelihoods[:, 0]), got)
    assert bayes.update(prior, likelihoods[:0]).shape == (0, 2, 3)


def test_an_impossible_observation_ends_a_sequence_from_there_on():
    likelihoods = jnp.array([[0.0, 0.0], [-INF, 0.0], [-INF, -INF], [0.0, 0.0]])
    got = bayes.update(jnp.zeros(2), likelihoods)
    assert got[1].tolist() == [-math.inf, 0]
    assert jnp.isnan(got).any(axis=1).tolist() == [False, False, True, True]


@pytest.mark.parametrize("a", [1.0, 1e-3, 1e-30, 1e30])
@pytest.mark.parametrize("b", [1.0, 1e-30, 1e30])
@pytest.mark.optimized
def test_the_gaussian_posterior_is_exact_for_any_scales(dtype, a, b):
    x = jnp.asarray([1.0, 2.5, -0.5], dtype) * a
    w = jnp.asarray([1.0, 0.5, 2.0], dtype)
    args = [jnp.asarray(v, dtype) for v in (0.75 * a, a)]
    got = bayes.gaussian_posterior(*args, x, jnp.asarray(b, dtype), weights=w)
    loc, scale = (oracles.exactly(v)[0] for v in args)
    noise, values, weights = oracles.exactly(jnp.asarray(b, dtype))[0], oracles.exactly(x), oracles.exactly(w)
    n, m = oracles.mpmath.fsum(weights), oracles.mean(values, weights)
    precision = 1 / scale**2 + n / noise**2
    assert oracles.error(got.scale, 1 / oracles.mpmath.sqrt(precision)) <= 24 * U[dtype]
    want = (loc / scale**2 + m * n / noise**2) / precision
    assert abs(oracles.mpf(float(got.loc)) - want) <= 26 * U[dtype] * (abs(want) + abs(m - loc) + abs(m))


def test_observations_one_by_one_are_observations_at_once():
    x = jnp.array([0.3, -1.2, 2.2, 0.9])
    at_once = bayes.gaussian_posterior(1.0, 2.0, x, 0.7)
    one = gaussian.Parameters(jnp.float32(1.0), jnp.float32(2.0))
    for value in x:
        one = bayes.gaussian_posterior(*one, value[None], 0.7)
    np.testing.assert_allclose(jnp.stack(one), jnp.stack(at_once), rtol=64 * U["float32"])
    beta, labels = bayes.Beta(jnp.float32(1), jnp.float32(1)), jnp.array([1, 0, 1, 1])
    for label in labels:
        beta = bayes.beta_posterior(*beta, label[None])
    assert beta == bayes.beta_posterior(1.0, 1.0, labels) == (4, 2)


def test_without_weight_the_prior_stays():
    x, w = jnp.array([1.0, jnp.nan]), jnp.zeros(2)
    total = lambda *args: sum(bayes.gaussian_posterior(*args, weights=w))  # noqa: E731
    assert bayes.gaussian_posterior(0.5, 2.0, x, 1.0, weights=w) == (0.5, 2)
    slopes = jax.grad(total, (0, 1, 2, 3))(0.5, 2.0, x, 1.0)
    assert [jnp.asarray(s).tolist() for s in slopes] == [1, 1, [0, 0], 0]
    assert bayes.beta_posterior(0.5, 2.0, x, weights=w) == (0.5, 2)
    for seen in (jnp.array([True, False]), jnp.array([1, 0])):
        assert bayes.gaussian_posterior(0.5, 2.0, x, 1.0, weights=seen) == bayes.gaussian_posterior(
            0.5, 2.0, x[:1], 1.0
        )
        assert bayes.beta_posterior(0.5, 2.0, x, weights=seen) == (1.5, 2)
