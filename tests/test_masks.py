"""Laws of the categorical functions that count no digits: shapes, masks, labels, numbers that are traced, faults."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprob
from jprob import categorical

U = 2.0**-24


def test_log_prob_is_minus_the_cross_entropy():
    z, y = jnp.array([[1.0, 20.0, 0.0], [0.0, -jnp.inf, 2.0]]), jnp.array([1, 1])
    assert categorical.log_prob(y, z).tolist() == (-categorical.cross_entropy(z, y)).tolist()
    assert categorical.log_prob(y, z)[1] == -jnp.inf


def test_mode_is_the_first_of_the_most_probable_that_exist():
    z = jnp.array([[1.0, 3.0, 3.0], [4.0, 0.0, 4.0], [-jnp.inf, -jnp.inf, -5.0]])
    assert categorical.mode(z).tolist() == [1, 0, 2]
    assert categorical.mode(z, where=jnp.array([True, False, True])).tolist() == [2, 0, 2]
    assert categorical.mode(z, axis=0).tolist() == [1, 0, 1]


def test_samples_have_the_shape_asked_for():
    for options, shape in (({}, (4, 3)), ({"axis": 0}, (3, 5)), ({"axis": 1, "shape": (7, 4, 5)}, (7, 4, 5))):
        draw = functools.partial(categorical.sample, **options)
        draws = jax.eval_shape(draw, jax.random.key(0), jnp.zeros((4, 3, 5)))
        assert (draws.shape, draws.dtype) == (shape, jnp.int32)


def test_a_negative_temperature_draws_no_class():
    z, temperature = jnp.zeros((3, 4)), jnp.array([[1.0], [-1.0], [jnp.nan]])
    draws = categorical.sample(jax.random.key(0), z, temperature=temperature, shape=(5, 3))
    assert (draws[:, 0] >= 0).all()
    assert (draws[:, 1:] == -1).all()
    assert jnp.isnan(categorical.cross_entropy(z, draws[0])).tolist() == [False, True, True]


# Every function of rows of logits, with the other argument fixed.
OF_ROWS = {
    "softmax": lambda z, y, **k: categorical.softmax(z, **k),
    "log_softmax": lambda z, y, **k: categorical.log_softmax(z, **k),
    "entropy": lambda z, y, **k: categorical.entropy(z, **k),
    "cross_entropy": lambda z, y, **k: categorical.cross_entropy(z, y, **k),
    "soft cross_entropy": lambda z, y, **k: categorical.cross_entropy(z, jax.nn.one_hot(y, z.shape[-1]), **k),
    "no target": lambda z, y, **k: categorical.cross_entropy(z, jnp.zeros_like(z), **k),
    "smoothed": lambda z, y, **k: categorical.cross_entropy(z, y, label_smoothing=0.1, **k),
    "smoothed fully": lambda z, y, **k: categorical.cross_entropy(z, y, label_smoothing=1.0, **k),
    "brier_score": lambda z, y, **k: categorical.brier_score(z, y, **k),
    "kl of p": lambda z, y, **k: categorical.kl_divergence(z, jnp.zeros_like(z), **k),
    "kl of q": lambda z, y, **k: categorical.kl_divergence(jnp.zeros_like(z), z, **k),
    "js": lambda z, y, **k: categorical.js_divergence(z, jnp.zeros_like(z), **k),
    "distillation": lambda z, y, **k: categorical.distillation_loss(z, jnp.zeros_like(z), temperature=2.0, **k),
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_a_masked_class_is_a_class_that_was_never_there(name):
    """The class has a logit of any kind."""
    f, where, short = OF_ROWS[name], jnp.array([True, True, True, False]), jnp.array([[1.0, 20.0, 0.5]])
    hidden = jnp.array([5.0, 100.0, jnp.inf, jnp.nan])
    full, y = jnp.concatenate([jnp.tile(short, (4, 1)), hidden[:, None]], axis=1), jnp.ones(4, int)

    def both(z, y, **how):
        return f(z, y, **how), jax.grad(lambda z: f(z, y, **how).sum())(z)

    program = jax.jit(lambda short, full: (both(short, y[:1]), both(full, y, where=where)))
    (want, grad_want), (got, grad_got) = program(short, full)
    np.testing.assert_allclose(got[:, :3] if got.ndim == 2 else got, np.repeat(want, 4, 0), rtol=4 * U)
    assert (grad_got[:, 3] == 0).all()
    np.testing.assert_allclose(grad_got[:, :3], np.repeat(grad_want, 4, 0), rtol=8 * U, atol=1e-38)


def test_target_mass_on_a_class_that_does_not_exist_is_removed():
    z, where = jnp.array([1.0, 20.0, 0.5]), jnp.array([True, False, True])
    two = z[jnp.array([0, 2])]
    for labels, kept in ((1, [0.0, 0.0]), ([0.0, 1.0, 0.0], [0.0, 0.0]), ([0.25, 0.5, 0.25], [0.25, 0.25])):
        for loss in (categorical.cross_entropy, categorical.brier_score):
            got, slope = jax.value_and_grad(loss)(z, jnp.array(labels), where=where)
            want, short = jax.value_and_grad(loss)(two, jnp.array(kept))
            chex.assert_trees_all_close((got, slope), (want, jnp.array([short[0], 0.0, short[1]])), rtol=8 * U)
    value, slope = jax.value_and_grad(lambda z: categorical.log_prob(jnp.array(1), z, where=where))(z)
    assert value == -jnp.inf
    assert slope.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", OF_ROWS)
def test_a_row_without_any_class_is_an_empty_sum(name):
    f = functools.partial(OF_ROWS[name], y=jnp.ones(3, int), where=jnp.zeros(4, bool))
    z = jnp.stack([jnp.arange(4.0), jnp.full(4, -jnp.inf), jnp.full(4, jnp.nan)])
    value, slope = jax.jit(lambda z: (f(z), jax.grad(lambda z: f(z).sum())(z)))(z)
    assert (value == (-jnp.inf if name == "log_softmax" else 0)).all()
    assert (slope == 0).all()


@pytest.mark.parametrize("name", OF_ROWS)
def test_no_distribution_is_nan_and_only_in_its_row(name):
    none = [[-math.inf, -math.inf], [math.nan, 0.0], [0.0, math.nan], [math.inf, 0.0]]
    out = OF_ROWS[name](jnp.array([*none, [1.0, 0.0]]), jnp.zeros(5, int))
    assert jnp.isnan(out[:4]).all()
    assert jnp.isfinite(out[4]).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_labels_of_any_integer_dtype_count_alike(dtype):
    """Also where the number of classes does not fit the labels' own dtype."""
    k = min(jnp.iinfo(dtype).max + 1, 40_000)
    logits, labels = jnp.zeros((2, k)), jnp.array([5, k - 1])
    for f in (categorical.cross_entropy, categorical.brier_score):
        assert f(logits, labels.astype(dtype)).tolist() == f(logits, labels).tolist()
    error, _ = jprob.checkify(categorical.cross_entropy)(logits, labels.astype(dtype))
    assert error.get() is None


@pytest.mark.parametrize("label", [-1, -3, 3, 100])
def test_a_label_out_of_range_is_nan_there_alone(label):
    """It must not wrap to the last classes, nor pass for a class without a logit."""
    logits, labels = jnp.zeros((2, 3)), jnp.array([label, 1])
    for f in (categorical.cross_entropy, categorical.brier_score):
        value, gradient = f(logits, labels), jax.grad(lambda z, f=f: f(z, labels).sum())(logits)
        assert jnp.isnan(value[0])
        assert (gradient[0] == 0).all()
        assert jnp.isfinite(value[1])
        assert jnp.isfinite(gradient[1]).all()


def test_a_temperature_below_0_is_nan():
    for temperature in (-1.0, jnp.nan):
        assert jnp.isnan(categorical.softmax(jnp.array([1.0, 2.0]), temperature=jnp.array(temperature))).all()
        loss = functools.partial(categorical.distillation_loss, temperature=jnp.array(temperature))
        value, slope = jax.value_and_grad(loss)(jnp.array([1.0, 2.0]), jnp.zeros(2))
        assert jnp.isnan(value)
        assert (slope == 0).all()


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy", "sample"])
def test_a_number_that_is_swept_compiles_once_and_its_default_costs_nothing(name):
    function, z = OF_ROWS.get(name, lambda z, y, **k: categorical.sample(jax.random.key(0), z, **k)), jnp.arange(3.0)
    function = functools.partial(function, y=jnp.array(0))
    number, default = ("label_smoothing", 0.0) if name == "cross_entropy" else ("temperature", 1.0)
    compiled = getattr(categorical, name).compiled
    compiled.clear_cache()
    for value in (0.25, 0.5, jnp.array(0.75)):
        function(z, **{number: value})
    assert compiled._cache_size() <= 2, "a Python number and an array"
    explicit, left_out = (str(jax.make_jaxpr(functools.partial(function, **k))(z)) for k in ({number: default}, {}))
    assert explicit == left_out


def test_a_fault_of_the_data_speaks_through_transformations():
    logits = jnp.zeros((2, 3))
    loss = lambda z, y: categorical.cross_entropy(z, y)  # noqa: E731
    labels = jnp.array([1, 7])
    for f in (
        jax.vmap(loss),
        jax.grad(lambda z, y: loss(z, y).sum()),
        lambda z, y: jax.lax.scan(lambda c, zy: (c, loss(*zy)), 0, (z, y)),
    ):
        error, _ = jprob.checkify(f)(logits, labels)
        assert "cross_entropy: label 7 is outside [0, 3)" in error.get()
    assert jprob.checkify(loss)(logits, jnp.array([1, 2]))[0].get() is None
