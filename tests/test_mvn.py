"""The multivariate normal against its definition, in units of u."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jprob import gaussian, mvn

U = {"float32": 2.0**-24, "float64": 2.0**-53}


def factor(size, rng, scale=1.0):
    return scale * (np.tril(0.5 * rng.normal(size=(size, size)), -1) + np.diag(rng.uniform(0.5, 2, size)))


def condition(lower):
    lower = np.asarray(lower, np.float64)
    return float(np.max(np.abs(np.linalg.inv(lower)) @ np.abs(lower) @ np.ones(len(lower))))


def matrix(lower):
    return oracles.mpmath.matrix([oracles.exactly(row) for row in np.tril(lower)])


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.optimized
def test_log_prob_is_that_of_the_covariance(dtype, size, scale):
    rng = np.random.default_rng(size)
    lower = jnp.asarray(factor(size, rng, scale), dtype)
    x, loc = (jnp.asarray(scale * rng.normal(size=size), dtype) for _ in range(2))
    want = oracles.mvn_log_prob(oracles.exactly(x), oracles.exactly(loc), matrix(lower))
    logs = sum(abs(np.log(np.asarray(jnp.diagonal(lower), np.float64))))
    square = float(abs(want)) + logs + size
    bound = (8 + 4 * size * condition(lower)) * U[dtype]
    assert abs(oracles.mpf(float(mvn.log_prob(x, loc, lower))) - want) <= bound * (square + logs + size)


def test_independent_dimensions_are_a_sum_of_gaussians():
    rng = np.random.default_rng(0)
    x, loc, scale = (jnp.asarray(np.exp(rng.normal(size=4)), jnp.float32) for _ in range(3))
    lower = mvn.scale_tril(diagonal=scale)
    want = jnp.sum(gaussian.log_prob(x, loc, scale))
    assert mvn.log_prob(x, loc, lower) == pytest.approx(float(want), rel=32 * U["float32"])
    assert mvn.entropy(lower) == pytest.approx(float(jnp.sum(gaussian.entropy(scale))), rel=16 * U["float32"])
    args = (x, scale, loc, scale[::-1])
    want = jnp.sum(gaussian.kl_divergence(*args))
    got = mvn.kl_divergence(x, lower, loc, mvn.scale_tril(diagonal=scale[::-1]))
    assert got == pytest.approx(float(want), rel=64 * U["float32"])


def test_what_stands_above_the_diagonal_is_not_read():
    rng = np.random.default_rng(1)
    lower = jnp.asarray(factor(3, rng), jnp.float32)
    full = lower + jnp.triu(jnp.full((3, 3), jnp.nan), 1)
    x = jnp.ones(3)
    assert mvn.log_prob(x, jnp.zeros(3), full) == mvn.log_prob(x, jnp.zeros(3), lower)
    assert mvn.kl_divergence(x, full, jnp.zeros(3), lower) == mvn.kl_divergence(x, lower, jnp.zeros(3), full)
    slope = jax.grad(mvn.log_prob, 2)(x, jnp.zeros(3), lower)
    assert not jnp.triu(slope, 1).any()


@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-3, 0.1, 1.0])
@pytest.mark.optimized
def test_kl_is_never_negative_and_keeps_its_digits_near_equality(dtype, gap):
    rng = np.random.default_rng(3)
    q = jnp.asarray(factor(4, rng), dtype)
    p = jnp.asarray(q * np.exp(gap * rng.normal(size=(4, 4))), dtype)
    p_loc = jnp.asarray(gap * rng.normal(size=4), dtype)
    got = mvn.kl_divergence(p_loc, p, jnp.zeros(4, dtype), q)
    want = oracles.mvn_kl_divergence(oracles.exactly(p_loc), matrix(p), [oracles.mpf(0)] * 4, matrix(q))
    chex.assert_trees_all_equal(got, mvn.kl_divergence(p_loc, p, 0, q))
    assert got >= 0
    assert (got == 0) == (gap == 0)
    # |Lq^-1| times the differences: what the substitution may cancel.
    inverse = np.abs(np.linalg.inv(np.asarray(q, np.float64)))
    moved = inverse @ np.abs(np.asarray(p - q, np.float64)), inverse @ np.abs(np.asarray(p_loc, np.float64))
    size = float(abs(want)) + sum(float(np.sum(m**2)) for m in moved)
    assert abs(oracles.mpf(float(got)) - want) <= (32 + 8 * 4 * condition(q)) * U[dtype] * size


def test_a_factor_that_a_batch_shares_is_never_copied():
    """One triangular solve with a right-hand side per point: temporaries are of the size of the points."""
    n, size = 500, 64
    lower = jnp.asarray(factor(size, np.random.default_rng(0)), jnp.float32)
    x = jnp.ones((n, size))
    key = jax.random.key(0)
    calls = {
        "log_prob": lambda x, lower: mvn.log_prob(x, 0.0, lower),
        "log_prob, of two factors": lambda x, lower: mvn.log_prob(
            x.reshape(2, -1, size), 0.0, jnp.stack([lower] * 2)[:, None]
        ),
        "kl_divergence": lambda x, lower: mvn.kl_divergence(x, lower, 0.0, 2 * lower),
        "sample": lambda x, lower: mvn.sample(key, x, lower),
    }
    for name, call in calls.items():
        for f in (call, jax.grad(lambda *args, call=call: jnp.sum(call(*args)), (0, 1))):
            memory = jax.jit(f).lower(x, lower).compile().memory_analysis()
            assert memory.temp_size_in_bytes <= 16 * x.nbytes < n * lower.nbytes / 2, name


def test_a_mean_of_one_number_serves_all_dimensions():
    lower, x = jnp.asarray(factor(3, np.random.default_rng(0)), jnp.float32), jnp.ones((4, 3))
    want = mvn.log_prob(x, jnp.full(3, 0.5), lower)
    for loc in (0.5, jnp.array(0.5), jnp.array([0.5]), jnp.full((4, 1), 0.5)):
        np.testing.assert_array_equal(mvn.log_prob(x, loc, lower), want)
    kl = mvn.kl_divergence(0.5, lower, jnp.zeros((4, 1)), lower)
    np.testing.assert_array_equal(kl, mvn.kl_divergence(jnp.full((4, 3), 0.5), lower, jnp.zeros(3), lower))


def test_a_masked_point_leaves_the_shared_factor_alone():
    lower, x = jnp.asarray(factor(3, np.random.default_rng(0)), jnp.float32), jnp.ones((4, 3))
    total = lambda x, loc, lower: jnp.sum(jnp.where(jnp.arange(4) > 0, mvn.log_prob(x, loc, lower), 0))  # noqa: E731
    slope = jax.grad(total, (0, 1, 2))
    want = slope(x, jnp.zeros(3), lower)
    for bad in (jnp.inf, jnp.nan, 3e38):
        jax.tree.map(np.testing.assert_array_equal, slope(x.at[0, 1].set(bad), jnp.zeros(3), lower), want)


def test_samples_have_the_mean_and_covariance_asked_for():
    rng = np.random.default_rng(4)
    lower, loc = jnp.asarray(factor(3, rng), jnp.float32), jnp.arange(3.0)
    x = mvn.sample(jax.random.key(0), loc, lower, shape=(100_000,))
    assert x.shape == (100_000, 3)
    got = mvn.fit(x)
    # Five standard errors; of an entry of the factor at most that of a standard deviation, times sqrt 2.
    scale = float(jnp.max(jnp.sum(jnp.square(lower), axis=1))) ** 0.5
    assert jnp.abs(got.loc - loc).max() < 5 * scale / 100_000**0.5
    assert jnp.abs(got.scale_tril - lower).max() < 5 * scale / 100_000**0.5
    assert mvn.sample(jax.random.key(0), jnp.zeros((2, 1, 3)), lower[None]).shape == (2, 1, 3)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e-30])
@pytest.mark.optimized
def test_fit_is_the_weighted_mean_and_covariance(dtype, offset, scale):
    rng = np.random.default_rng(5)
    x = jnp.asarray(scale * (offset + rng.normal(size=(50, 3)) @ factor(3, rng).T), dtype)
    w = jnp.asarray(rng.uniform(0, 2, 50), dtype)
    got = mvn.fit(x, weights=w)
    columns, probs = [oracles.exactly(x[:, i]) for i in range(3)], oracles.exactly(w)
    means = [oracles.mean(c, probs) for c in columns]
    centred = [[v - m for v in c] for c, m in zip(columns, means, strict=True)]
    pairs = [[oracles.mean([s * t for s, t in zip(a, b, strict=True)], probs) for b in centred] for a in centred]
    want = oracles.mpmath.cholesky(oracles.mpmath.matrix(pairs))
    bound = (8 + np.log2(50) + 4 * 3) * condition([[float(want[i, j] / scale) for j in range(3)] for i in range(3)])
    for i in range(3):
        row = [abs(want[i, j]) for j in range(3)]
        size = abs(means[i]) + oracles.mpmath.norm(row)
        assert abs(oracles.mpf(float(got.loc[i])) - means[i]) <= (16 + np.log2(50)) * U[dtype] * size
        for j in range(3):
            assert abs(oracles.mpf(float(got.scale_tril[i, j])) - want[i, j]) <= bound * U[dtype] * max(row)


def test_fit_of_few_or_no_observations():
    line = mvn.fit(jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    assert line.scale_tril @ line.scale_tril.T == pytest.approx(np.outer([1, 0, -1], [1, 0, -1]), abs=1e-6)
    none = mvn.fit(jnp.ones((4, 2)), weights=jnp.zeros(4))
    assert jnp.isnan(none.loc).all()
    assert jnp.isnan(none.scale_tril).all()
    some = mvn.fit(jnp.array([[1.0, 2.0], [3.0, 0.0], [jnp.nan, 5.0]]), weights=jnp.array([True, True, False]))
    assert some.loc.tolist() == [2, 1]
    first = mvn.fit(jnp.ones((4, 2, 3)).at[0].set(2), axis=0)
    assert first.loc.shape == (2, 3)
    assert first.scale_tril.shape == (2, 3, 3)


def test_a_factor_comes_from_a_covariance_or_a_precision(dtype):
    rng = np.random.default_rng(6)
    lower = jnp.asarray(factor(4, rng), dtype)
    covariance = lower @ lower.T
    bound = 64 * condition(lower) ** 2 * U[dtype]
    np.testing.assert_allclose(mvn.scale_tril(covariance=covariance), lower, rtol=0, atol=bound)
    precision = jnp.linalg.inv(covariance)
    got = mvn.scale_tril(precision=(precision + precision.T) / 2)
    np.testing.assert_allclose(got, lower, rtol=0, atol=4 * bound)
    assert not jnp.triu(got, 1).any()


def test_observations_may_lie_on_an_explicit_axis():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    with jax.set_mesh(jax.make_mesh((8,), ("batch",))):
        got = mvn.fit(jax.device_put(x, jax.P("batch")))
    chex.assert_trees_all_close(got, mvn.fit(x), rtol=64 * U["float32"], atol=64 * U["float32"])
