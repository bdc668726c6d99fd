"""Exactness of the Bernoulli functions, value and gradient, in units of u."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jprob
from jprob import bernoulli

U = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}  # of the dtype computed in
LOGITS = [0.0, 2.0**-8, 1.0, 8.0, 17.0, 20.0, 60.0, 87.0]


DTYPES = ["bfloat16", "float64", pytest.param("float16", marks=pytest.mark.slow),
          pytest.param("float32", marks=pytest.mark.optimized),
          pytest.param("float64", marks=[pytest.mark.optimized, pytest.mark.slow], id="float64 as is")]  # fmt: skip


@pytest.fixture(params=DTYPES)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def computed_in(dtype) -> str:
    return "float64" if dtype == "float64" else "float32"


def tiny(dtype) -> float:
    return max(float(jnp.finfo(dtype).tiny), float(jnp.finfo(computed_in(dtype)).tiny))


def each(function):
    """Value and gradients of each element, in one program a dtype."""
    argnums = (0, 1) if function is bernoulli.cross_entropy else 0
    return jax.jit(jax.vmap(jax.value_and_grad(function, argnums)))


def test_cross_entropy_has_the_digits_its_logit_determines(dtype):
    cases = [(logit, label) for logit in [*LOGITS, *(-z for z in LOGITS)] for label in (0.0, 0.25, 0.5, 1.0)]
    batch = [jnp.asarray(x, dtype) for x in zip(*cases, strict=True)]
    values, slopes = each(bernoulli.cross_entropy)(*batch)
    assert values.dtype == computed_in(dtype)
    rounding = float(jnp.finfo(dtype).eps) / 2
    for z, y, value, dz, dy in zip(*map(oracles.exactly, batch), *map(np.asarray, (values, *slopes)), strict=True):
        assert oracles.error(value, oracles.bernoulli_cross_entropy(z, y), tiny(values.dtype)) <= 16 * U[dtype]
        p = 1 / (1 + oracles.mpmath.exp(-z))
        # (1 - y) p and y (1 - p) have 16 u each; where they cancel the error stays that of the larger.
        terms = max((1 - y) * p, y / (1 + oracles.mpmath.exp(z)))
        assert abs(oracles.mpf(float(dz)) - (p - y)) <= 16 * U[dtype] * terms + rounding * abs(p - y) + tiny(dtype)
        assert oracles.error(dy, -z, tiny(dtype)) <= 16 * U[dtype] + rounding


def test_entropy_and_brier_score_are_exact(dtype):
    batch = jnp.asarray([*LOGITS, *(-z for z in LOGITS)], dtype)
    rounding = float(jnp.finfo(dtype).eps) / 2
    entropies = each(bernoulli.entropy)(batch)
    scores = [each(bernoulli.brier_score)(batch, jnp.full(len(batch), label)) for label in (0, 1)]
    for i, z in enumerate(oracles.exactly(batch)):
        p, q = 1 / (1 + oracles.mpmath.exp(-z)), 1 / (1 + oracles.mpmath.exp(z))
        value, slope = (x[i] for x in entropies)
        want = -p * oracles.mpmath.log(p) - q * oracles.mpmath.log(q)
        assert oracles.error(value, want, tiny(value.dtype)) <= 16 * U[dtype]
        assert oracles.error(slope, -z * p * q, tiny(dtype)) <= 16 * U[dtype] + rounding
        for score, error in zip(scores, (p, -q), strict=True):
            value, slope = (x[i] for x in score)
            assert oracles.error(value, error**2, tiny(value.dtype)) <= 16 * U[dtype]
            assert oracles.error(slope, 2 * error * p * q, tiny(dtype)) <= 16 * U[dtype] + rounding


@pytest.mark.parametrize(("p", "q"), [(0.0, 0.0), (1.0, 1.0 + 2.0**-20), (-3.0, 4.0), (20.0, 19.0), (60.0, -60.0)])
@pytest.mark.optimized
def test_kl_has_the_digits_its_inputs_determine(p, q):
    got = bernoulli.kl_divergence(jnp.array(p), jnp.array(q))
    want = oracles.kl_divergence([oracles.mpf(0), oracles.mpf(p)], [oracles.mpf(0), oracles.mpf(q)])
    assert got >= 0
    assert oracles.error(got, want) <= (16 + max(abs(p), abs(q))) * 2.0**-24


def test_certain_answers_have_no_entropy_and_a_log_probability_of_0_or_infinity():
    certain = jnp.array([jnp.inf, -jnp.inf])
    assert bernoulli.entropy(certain).tolist() == [0, 0]
    assert jax.grad(lambda z: bernoulli.entropy(z).sum())(certain).tolist() == [0, 0]
    assert bernoulli.brier_score(certain, jnp.array([0, 0])).tolist() == [1, 0]
    assert bernoulli.kl_divergence(jnp.zeros(2), certain).tolist() == [math.inf, math.inf]
    assert bernoulli.kl_divergence(certain, certain).tolist() == [0, 0]
    assert bernoulli.log_prob(jnp.array([False, False]), certain).tolist() == [-math.inf, 0]
    loss = bernoulli.cross_entropy
    assert loss(certain, jnp.array([1.0, 0.0])).tolist() == [0, 0]
    assert loss(certain, jnp.array([0.0, 1.0])).tolist() == [math.inf, math.inf]
    assert jax.grad(lambda z: loss(z, jnp.ones(2)).sum())(certain).tolist() == [0, -1]
    assert bernoulli.sample(jax.random.key(0), certain, shape=(9, 2)).all(axis=0).tolist() == [True, False]


def test_draws_have_the_frequency_of_their_probability():
    z, n = jnp.array([-3.0, 0.0, 1.5]), 200_000
    p = np.asarray(jax.nn.sigmoid(z), np.float64)
    draws = bernoulli.sample(jax.random.key(3), z, shape=(n, 3))
    assert draws.dtype == jnp.bool_
    assert (np.abs(np.asarray(draws).sum(axis=0) - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all(), "5 standard errors"


@pytest.mark.parametrize("sign", [-1, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.optimized
def test_rare_answers_are_drawn_as_often_as_they_should_be(sign):
    """2^-28 is below the resolution of 23 random bits. 4e7 draws of 23 bits would hold 5 of them instead of .15."""
    z = jnp.array(sign * 28 * math.log(2))
    draw = jax.jit(lambda key: jnp.sum(bernoulli.sample(key, z, shape=(4_000_000,)) != (sign > 0)))
    assert sum(int(draw(key)) for key in jax.random.split(jax.random.key(0), 10)) <= 1


@pytest.mark.parametrize("label", [jnp.array([True, False]), jnp.array([1, 0])])
def test_hard_labels_may_be_bool_or_integer(label):
    want = bernoulli.cross_entropy(jnp.array([3.0, 3.0]), jnp.array([1.0, 0.0]))
    assert bernoulli.cross_entropy(jnp.array([3.0, 3.0]), label).tolist() == want.tolist()


@pytest.mark.parametrize("label", [-0.5, 1.5, 2, -1])
def test_a_label_outside_0_and_1_is_nan_and_named(label):
    labels = jnp.array([label, 1])
    value = bernoulli.cross_entropy(jnp.zeros(2), labels)
    assert jnp.isnan(value[0])
    assert jnp.isfinite(value[1])
    assert jax.grad(lambda z: bernoulli.cross_entropy(z, labels).sum())(jnp.zeros(2))[0] == 0
    error, _ = jprob.checkify(bernoulli.cross_entropy)(jnp.zeros(2), labels)
    assert f"cross_entropy: label {float(label)} is outside [0, 1]" in error.get()
