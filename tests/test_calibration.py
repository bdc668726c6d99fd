"""Reliability tables, what follows from them, and temperatures: against definitions in float64, and the limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.optimize import brentq

import jprob
from jprob import calibration

U = 2.0**-24


def examples(n=400, k=5, spread=2.0, dtype=np.float32):
    """Logits, labels drawn at temperature 2, weights."""
    rng = np.random.default_rng(n + k)
    z = rng.normal(0, spread, (n, k)).astype(dtype)
    labels = np.argmax(z / (2 * spread) + rng.gumbel(size=(n, k)), axis=1)
    return jnp.asarray(z), jnp.asarray(labels), jnp.asarray(rng.uniform(0, 2, n).astype(dtype))


def forecasts(z, labels):
    """Confidence and correctness, in float64."""
    z = np.asarray(z, np.float64)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p.max(axis=1), (p.argmax(axis=1) == np.asarray(labels)).astype(float)


def bins_of(c, num_bins):
    return np.clip(np.ceil(c * num_bins).astype(int) - 1, 0, num_bins - 1)


@pytest.mark.parametrize("num_bins", [1, 7, 15])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.optimized
def test_all_follows_its_definition(num_bins, weighted):
    z, labels, w = examples()
    table = calibration.reliability(z, labels, num_bins=num_bins, weights=w if weighted else None)
    c, o = forecasts(z, labels)
    v = np.asarray(w, np.float64) if weighted else np.ones(len(c))
    k = bins_of(c, num_bins)
    # Within this of an edge either bin is right, and no example may be there.
    bound = (32 + 2 * 14 + 2 * np.sqrt(400)) * U
    assert np.abs(c * num_bins - np.round(c * num_bins)).min() > 2 * bound
    for got, value in zip(table, (np.ones_like(c), c, o, (c - o) ** 2), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, np.bincount(k, v * value, num_bins), rtol=bound, atol=0)

    members = [k == b for b in range(num_bins) if np.any(v[k == b])]
    share = np.array([v[m].sum() for m in members]) / v.sum()
    mean = lambda x: np.array([np.average(x[m], weights=v[m]) for m in members])  # noqa: E731
    confidence, accuracy, overall = mean(c), mean(o), np.average(o, weights=v)
    gaps = np.abs(confidence - accuracy)
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=bound + (4 + num_bins) * U)  # noqa: E731
    close(calibration.expected_calibration_error(table), np.sum(share * gaps))
    close(calibration.maximum_calibration_error(table), gaps.max())
    parts = calibration.brier_decomposition(table)
    close(parts.score, np.average((c - o) ** 2, weights=v))
    close(parts.reliability, np.sum(share * gaps**2))
    close(parts.resolution, np.sum(share * (accuracy - overall) ** 2))
    close(parts.uncertainty, overall * (1 - overall))
    # Variance of the confidence in its bin, less twice its covariance with the outcome.
    within = mean(c * c) - confidence**2 - 2 * (mean(c * o) - confidence * accuracy)
    close(parts.within_bin, np.sum(share * within))
    close(parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin, parts.score)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_table_of_each_class_follows_its_definition(weighted):
    z, labels, w = examples()
    w = w if weighted else jnp.ones_like(w)
    table = calibration.reliability(z, labels, class_wise=True, weights=w)
    for k in range(z.shape[1]):
        c = np.asarray(jax.nn.softmax(z))[:, k]
        o = np.asarray(labels == k).astype(float)
        for got, value in zip(table, (np.ones_like(c), c, o, (c - o) ** 2), strict=True):
            np.testing.assert_allclose(got[k], np.bincount(bins_of(c, 15), w * value, 15), rtol=1e-5, atol=0)
    # Probabilities of a class are compared with its share, so that a sure and right model has no error.
    sure = calibration.reliability(20 * jax.nn.one_hot(labels, 5), labels, class_wise=True)
    np.testing.assert_allclose(calibration.expected_calibration_error(sure), 0, atol=1e-8)


@pytest.mark.parametrize("num_bins", [1, 4, 7])
def test_bins_of_equal_mass_hold_equal_weight(num_bins):
    z, labels, _ = examples(n=56)
    table = calibration.reliability(z, labels, num_bins=num_bins, equal_mass=True)
    np.testing.assert_array_equal(table.weight, np.full(num_bins, 56 / num_bins))
    c, o = (np.sort(x) if i == 0 else x for i, x in enumerate(forecasts(z, labels)))
    np.testing.assert_allclose(table.confidence, c.reshape(num_bins, -1).sum(1), rtol=1e-5)
    assert table.correct.sum() == o.sum()
    # Any order and any padding give the same table, and confidences that tie share a bin.
    order = np.random.default_rng(0).permutation(56)
    chex.assert_trees_all_close(
        calibration.reliability(z[order], labels[order], num_bins=num_bins, equal_mass=True), table, rtol=1e-5
    )
    padded = jnp.concatenate([z, jnp.full((3, 5), jnp.nan)]), jnp.concatenate([labels, jnp.full(3, -1)])
    mask = jnp.arange(59) < 56
    masked = calibration.reliability(*padded, num_bins=num_bins, equal_mass=True, weights=mask)
    chex.assert_trees_all_close(masked, table, rtol=1e-5)
    ties = calibration.reliability(jnp.zeros((8, 2)), jnp.zeros(8, int), num_bins=num_bins, equal_mass=True)
    np.testing.assert_array_equal(ties.weight, [8] + [0] * (num_bins - 1))


@pytest.mark.optimized
def test_a_confident_model_keeps_the_digits_of_its_error():
    z = jnp.array([[20.0, 0.0]])
    table = calibration.reliability(z, jnp.array([0]))
    assert float(table.squared_error[-1]) == pytest.approx(float(np.exp(-40.0)), rel=1e-5)


def test_bins_hold_their_upper_edge():
    z = jnp.array([[0.0, -jnp.inf, -jnp.inf, -jnp.inf], [0.0, 0.0, -jnp.inf, -jnp.inf], [0.0, 0.0, 0.0, 0.0]])
    assert calibration.reliability(z, jnp.array([0, 0, 0]), num_bins=4).weight.tolist() == [1, 1, 0, 1]
    certain = jnp.array([[0.0, -jnp.inf], [200.0, 0.0]])
    assert calibration.reliability(certain, jnp.array([0, 1])).weight.tolist() == [0] * 14 + [2]
    assert calibration.reliability(certain, jnp.array([0, 1])).correct[-1] == 1


def test_of_classes_that_tie_the_first_is_predicted():
    z = jnp.zeros((3, 3))
    assert calibration.reliability(z, jnp.array([0, 1, 2]), num_bins=1).correct.tolist() == [1]


def test_one_class_is_certain_and_right():
    table = calibration.reliability(jnp.array([[3.0], [-1.0]]), jnp.array([0, 0]))
    assert calibration.expected_calibration_error(table) == 0
    assert not np.any(jax.tree.leaves(calibration.brier_decomposition(table)))


def summary(table):
    parts = calibration.brier_decomposition(table)
    errors = calibration.expected_calibration_error(table), calibration.maximum_calibration_error(table)
    return jnp.stack([*errors, *parts])


@pytest.mark.parametrize(("dtype", "last"), [(np.uint8, 255), (np.int8, 127)])
def test_labels_of_a_small_dtype_are_compared_as_wider_ones(dtype, last):
    z, y, _ = examples(20, last + 1)
    y = y.at[0].set(last)
    for function in (calibration.reliability, calibration.fit_temperature):
        chex.assert_trees_all_equal(function(z, y.astype(dtype)), function(z, y))
        chex.assert_tree_all_finite(function(z, y))


def test_no_weight_is_0_with_a_gradient_of_0():
    z, labels, w = examples(20)
    empty = calibration.reliability(z[:0], labels[:0])
    for table in (empty, calibration.reliability(z, labels, weights=0 * w)):
        assert not np.any(summary(table))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jacrev(summary)(table)))


def test_batches_and_devices_add():
    z, labels, w = examples()
    whole = calibration.reliability(z, labels, weights=w)
    first = calibration.reliability(z[:150], labels[:150], weights=w[:150])
    second = calibration.reliability(z[150:], labels[150:], weights=w[150:])
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def summed(z, labels, w):
        return jax.lax.psum(calibration.reliability(z, labels, weights=w), "batch")

    devices = jax.shard_map(summed, mesh=mesh, in_specs=P("batch"), out_specs=P())(z, labels, w)
    for table in (jax.tree.map(jnp.add, first, second), devices):
        for got, want in zip(table, whole, strict=True):
            np.testing.assert_allclose(got, want, rtol=4 * np.sqrt(400) * U, atol=0)


def test_weights_are_repetition_and_a_mask_is_absence():
    z, labels, _ = examples(60)
    times = np.random.default_rng(5).integers(0, 3, 60)
    for w in (times, times > 0):
        kept = np.repeat(np.arange(60), w)
        got = calibration.reliability(z, labels, weights=jnp.asarray(w))
        for a, b in zip(got, calibration.reliability(z[kept], labels[kept]), strict=True):
            np.testing.assert_allclose(a, b, rtol=4 * np.sqrt(60) * U, atol=0)
        got = calibration.fit_temperature(z, labels, weights=jnp.asarray(w))
        assert got == pytest.approx(float(calibration.fit_temperature(z[kept], labels[kept])), rel=1e-6)


@pytest.mark.parametrize("bad", [-1, 5])
def test_a_label_out_of_range_is_nan_and_named_unless_it_weighs_0(bad):
    z, labels, _ = examples(30)
    labels = labels.at[3].set(bad)
    table = calibration.reliability(z, labels)
    assert jnp.isfinite(table.weight).all()
    assert jnp.isfinite(table.confidence).all()
    assert int(jnp.isnan(table.correct).sum()) == 1
    assert jnp.isnan(calibration.expected_calibration_error(table))
    assert jnp.isnan(calibration.fit_temperature(z, labels))
    assert not jnp.any(jax.grad(calibration.fit_temperature)(z, labels))
    present = jnp.ones(30).at[3].set(0)
    for function in (calibration.reliability, calibration.fit_temperature):
        error, _ = jprob.checkify(function)(z, labels)
        assert f"{function.__name__}: label {bad} is outside [0, 5)" in error.get()
        error, got = jprob.checkify(function)(z, labels, weights=present)
        assert error.get() is None
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("row", [jnp.nan, -jnp.inf])
def test_a_row_that_is_no_distribution_is_passed_on_unless_it_weighs_0(row):
    z, labels, _ = examples(30)
    broken, present = z.at[3].set(row), jnp.ones(30).at[3].set(0)
    assert all(jnp.isnan(field).all() for field in calibration.reliability(broken, labels))
    assert jnp.isnan(calibration.fit_temperature(broken, labels))
    for got, want in (
        (calibration.reliability(broken, labels, weights=present), calibration.reliability(z, labels, weights=present)),
        (
            jax.value_and_grad(calibration.fit_temperature)(broken, labels, weights=present),
            jax.value_and_grad(calibration.fit_temperature)(z, labels, weights=present),
        ),
    ):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def fitted(z, labels, w=None) -> float:
    """The zero of the derivative of the loss in log(1 / T), in float64."""
    z, labels = np.asarray(z, np.float64), np.asarray(labels)
    w = np.ones(len(z)) if w is None else np.asarray(w, np.float64)
    gap, excess = z - z.max(axis=1, keepdims=True), z - z[np.arange(len(z)), labels][:, None]
    excess = np.where(gap > -np.inf, excess, 0)

    def slope(log_b):
        p = np.exp(np.exp(log_b) * gap)
        return np.sum(w * np.sum(p * excess, axis=1) / p.sum(axis=1))

    scale = np.log(np.ptp(z[np.isfinite(z)]))
    return np.exp(-brentq(slope, -scale - 12, -scale + 12, xtol=1e-14, rtol=1e-14))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "spread"), [(50, 2, 1), (400, 5, 3), (400, 5, 1e-30), (400, 5, 1e30), (300, 100, 9)]
)
def test_the_temperature_is_that_of_scipy(n, k, spread, weighted):
    z, labels, w = examples(n, k, spread)
    w = w if weighted else None
    assert calibration.fit_temperature(z, labels, weights=w) == pytest.approx(fitted(z, labels, w), rel=1e-6)


def test_the_temperature_is_that_of_scipy_in_float64():
    with jax.enable_x64(True):
        z, labels, w = examples(dtype=np.float64)
        z = z.at[:100, 4].set(-jnp.inf)
        labels = jnp.where((jnp.arange(400) < 100) & (labels == 4), 0, labels)
        got = calibration.fit_temperature(z, labels, weights=w)
        assert got.dtype == jnp.float64
        assert got == pytest.approx(fitted(z, labels, w), rel=1e-12)


def test_hard_sets_converge():
    """Weights and gaps over many orders of magnitude, where plain Newton steps creep or leave the range."""
    rng = np.random.default_rng(6)
    z = rng.choice([-1, 1], (200, 6, 4)) * 10.0 ** rng.uniform(-3, 3, (200, 6, 4))
    labels = np.where(rng.uniform(size=(200, 6)) < 0.7, z.argmax(axis=-1), rng.integers(0, 4, (200, 6)))
    w = 10.0 ** rng.uniform(-20, 0, (200, 6))
    with jax.enable_x64(True):
        t = np.asarray(jax.vmap(lambda z, y, w: calibration.fit_temperature(z, y, weights=w))(z, labels, w))
    inner = np.flatnonzero((t > 0) & np.isfinite(t))
    assert len(inner) > 60
    for i in inner:
        gap, excess = z[i] - z[i].max(axis=1, keepdims=True), z[i] - z[i][np.arange(6), labels[i]][:, None]

        def sides(t, gap=gap, excess=excess, w=w[i]):
            p = np.exp(gap / t)
            share = (w / p.sum(axis=1))[:, None] * p * excess
            return share.clip(0).sum(), -share.clip(None, 0).sum()

        # The derivative in 1 / T changes its sign at T.
        above, below = sides(t[i] * (1 - 1e-9))
        assert above >= below
        above, below = sides(t[i] * (1 + 1e-9))
        assert above <= below


@pytest.mark.parametrize(
    ("want", "z", "labels"),
    [
        (0, [[1.0, 0.0], [0.0, 3.0]], [0, 1]),  # all right
        (0, [[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]], [1, 0]),  # right, sharing the top
        (0, [[1.0, -np.inf], [0.0, 1.0]], [0, 1]),
        (np.inf, [[1.0, 0.0], [1.0, 0.0]], [0, 1]),  # no information
        (np.inf, [[1.0, 0.0], [0.0, 3.0]], [1, 0]),  # the wrong way round
        (np.inf, [[1.0, -np.inf], [3.0, 0.0]], [1, 0]),  # the impossible happened
        (1, [[2.0, 2.0], [5.0, 5.0]], [0, 1]),  # equal
        (1, [[2.0, -np.inf], [5.0, 5.0]], [0, 1]),
        (1, [[2.0], [3.0]], [0, 0]),  # one class
    ],
)
def test_the_temperature_has_its_limits(want, z, labels):
    z, labels = jnp.array(z), jnp.array(labels)
    w = jnp.ones(2)
    assert calibration.fit_temperature(z, labels) == want
    slopes = jax.grad(lambda z, w: calibration.fit_temperature(z, labels, weights=w), (0, 1))(z, w)
    assert not any(jnp.any(slope) for slope in slopes)


def test_without_weight_the_temperature_is_1():
    z, labels, w = examples(20)
    assert calibration.fit_temperature(z, labels, weights=0 * w) == 1
    assert calibration.fit_temperature(z[:0], labels[:0]) == 1


def test_the_gradient_is_that_of_the_minimum():
    """Against central differences of scipy's minimum, whose error is about step^2 + 1e-13 / step."""
    z, labels, w = examples(50, 2, 1)
    w = w.at[5].set(0)
    slopes = jax.grad(lambda z, w: calibration.fit_temperature(z, labels, weights=w), (0, 1))(z, w)
    z, w, step = np.asarray(z, np.float64), np.asarray(w, np.float64), 1e-5
    for place in [(0, 0), (3, 1), (7, 1), (5, 0)]:
        shift = np.zeros_like(z)
        shift[place] = step
        want = (fitted(z + shift, labels, w) - fitted(z - shift, labels, w)) / (2 * step)
        assert slopes[0][place] == pytest.approx(want, rel=1e-4, abs=1e-6)
    for place in (0, 5, 9):
        shift = np.zeros_like(w)
        shift[place] = step
        want = (fitted(z, labels, w + shift) - fitted(z, labels, w - shift)) / (2 * step)
        assert slopes[1][place] == pytest.approx(want, rel=1e-4, abs=1e-6)
