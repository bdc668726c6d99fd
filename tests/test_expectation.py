"""Exactness of expectations, in units of u, and the law of Monte Carlo estimates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jprob import expectation, gaussian

U = {"float32": 2.0**-24, "float64": 2.0**-53}


def test_the_die_has_mean_3_5_and_variance_35_12():
    faces = jnp.arange(1, 7)
    assert expectation.mean(faces, jnp.zeros(6)) == 3.5
    assert expectation.variance(faces, jnp.zeros(6)) == pytest.approx(35 / 12, rel=2 * U["float32"])


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
@pytest.mark.parametrize("margin", [0.0, 5.0, 20.0, 60.0])
@pytest.mark.optimized
def test_moments_keep_their_digits(dtype, offset, margin):
    """Beside a large common offset, and where one outcome is nearly certain."""
    rng = np.random.default_rng(0)
    v = jnp.asarray(offset + rng.normal(size=5), dtype)
    z = jnp.asarray(rng.normal(size=5), dtype).at[2].add(margin)
    values, probs = oracles.exactly(v), oracles.softmax(oracles.exactly(z))
    span = float(jnp.max(z) - jnp.min(z))
    top = values[int(jnp.argmax(z))]
    mean, var = oracles.mean(values, probs), oracles.variance(values, probs)
    near = oracles.mean([abs(x - top) for x in values], probs)
    bound = (16 + span) * near + 2 * abs(top)
    assert abs(oracles.mpf(float(expectation.mean(v, z))) - mean) <= bound * U[dtype]
    assert oracles.error(expectation.variance(v, z), var) <= (32 + 2 * span) * U[dtype]
    slope = jax.grad(expectation.mean, (0, 1))(v, z)
    assert oracles.error(slope[0], probs) <= (16 + span) * U[dtype]
    terms = [p * (abs(x - mean) + near) for x, p in zip(values, probs, strict=True)]
    for got, x, p, size in zip(slope[1], values, probs, terms, strict=True):
        assert abs(oracles.mpf(float(got)) - p * (x - mean)) <= (16 + 2 * span) * U[dtype] * size
    slope = jax.grad(expectation.variance, (0, 1))(v, z)
    for i, (x, p, size) in enumerate(zip(values, probs, terms, strict=True)):
        assert abs(oracles.mpf(float(slope[0][i])) - 2 * p * (x - mean)) <= (32 + 4 * span) * U[dtype] * size
        want, size = p * ((x - mean) ** 2 - var), p * ((abs(x - mean) + near) ** 2 + var)
        assert abs(oracles.mpf(float(slope[1][i])) - want) <= (32 + 4 * span) * U[dtype] * size


def test_variance_is_0_where_the_value_is_certain():
    assert expectation.variance(jnp.full(3, 0.1), jnp.arange(3.0)) == 0
    assert expectation.variance(jnp.arange(3.0), jnp.array([-jnp.inf, 0.0, -jnp.inf])) == 0


def test_what_cannot_happen_does_not_count():
    v, z = jnp.array([jnp.inf, 1.0, 3.0, jnp.nan]), jnp.array([-jnp.inf, 0.0, 0.0, -jnp.inf])
    for function, want in ((expectation.mean, 2), (expectation.variance, 1)):
        assert function(v, z) == want
        slopes = jax.grad(function, (0, 1))(v, z)
        assert jnp.isfinite(jnp.stack(slopes)).all()
        assert slopes[0][0] == slopes[1][0] == slopes[0][3] == slopes[1][3] == 0
    assert expectation.mean(v[:2], jnp.zeros(2)) == math.inf
    assert jnp.isnan(expectation.mean(jnp.array([jnp.inf, -jnp.inf]), jnp.zeros(2)))
    assert jnp.isnan(expectation.mean(v[1:3], jnp.full(2, -jnp.inf)))


def cube(x):
    return x**3


def standard(key):
    return gaussian.sample(key, 0.0, 1.0)


def test_the_standard_error_is_the_spread_of_the_estimates():
    keys = jax.random.split(jax.random.key(1), 400)
    run = lambda key: expectation.monte_carlo(cube, standard, key, num_samples=1000)  # noqa: E731
    estimate = jax.jit(jax.vmap(run))(keys)
    # The variance of x^3 is 15. 400 estimates give their spread to 1 / sqrt(800), their mean to its 20th part.
    spread = gaussian.fit(estimate.mean).scale
    assert spread == pytest.approx((15 / 1000) ** 0.5, rel=5 / 800**0.5)
    assert jnp.mean(estimate.standard_error) == pytest.approx(float(spread), rel=0.2)
    assert abs(jnp.mean(estimate.mean)) < 5 * spread / 20
    np.testing.assert_allclose(estimate.mean[3], run(keys[3]).mean, rtol=1e-5)


def test_an_estimate_is_the_mean_of_its_draws():
    key = jax.random.key(2)
    draws = jnp.stack([standard(k) for k in jax.random.split(key, 5)])
    got = expectation.monte_carlo(lambda x: 1e4 + x, standard, key, num_samples=5)
    assert got.mean == pytest.approx(float(1e4 + jnp.mean(draws)), rel=1e-6)
    # Each sum is rounded to 2^-10 at 1e4, and the spread of the rounded ones is exact.
    assert got.standard_error == pytest.approx(float(jnp.std(draws, ddof=1)) / 5**0.5, abs=2**-10)
    constant = expectation.monte_carlo(lambda x: jnp.float32(0.1), standard, key, num_samples=5)
    assert constant == (jnp.float32(0.1), 0)


@jax.jit
def slope_of_the_second_moment(loc):
    def estimate(loc):
        draw = lambda key: gaussian.sample(key, loc, 1.0)  # noqa: E731
        return expectation.monte_carlo(jnp.square, draw, jax.random.key(3), num_samples=10_000).mean

    return jax.grad(estimate)(loc)


def test_the_gradient_flows_through_what_the_sampler_closes_over():
    # d E (loc + z)^2 = 2 loc, estimated with a standard error of 2 / 100.
    for loc in (0.5, -2.0):
        assert slope_of_the_second_moment(loc) == pytest.approx(2 * loc, abs=5 * 0.02)


def test_a_draw_may_be_a_tree_and_a_result_any_shape():
    pair = lambda key: {"x": standard(key), "y": jnp.ones(2)}  # noqa: E731
    got = expectation.monte_carlo(lambda d: d["x"] * d["y"] > 0, pair, jax.random.key(4), num_samples=1000)
    assert got.mean.shape == got.standard_error.shape == (2,)
    assert got.mean == pytest.approx(0.5, abs=5 * 0.5 / 1000**0.5)
