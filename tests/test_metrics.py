"""Confusion matrices and their metrics: against scikit-learn, also where a class is absent; sums, weights, limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from jax.sharding import PartitionSpec as P

import jprob
from jprob import metrics

U = 2.0**-24
K = 5


def pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Labels and predictions by regime."""
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, K, 200), rng.integers(0, K, 200)
    mostly = np.where(rng.uniform(size=200) < 0.7, labels, guesses)
    return {
        "random": (labels, guesses),
        "mostly right": (labels, mostly),
        "all right": (labels, labels),
        "all wrong": (labels, (labels + 1) % K),
        "no class 2 in the labels": (np.where(labels == 2, 0, labels), mostly),
        "no class 2 in the predictions": (labels, np.where(mostly == 2, 0, mostly)),
        "no class 2 at all": (np.where(labels == 2, 0, labels), np.where(mostly == 2, 0, mostly)),
        "one class": (np.full(7, 3), np.full(7, 3)),
        "one label, another prediction": (np.full(7, 3), np.full(7, 1)),
        "one example": (np.array([4]), np.array([0])),
    }


@pytest.fixture(params=pairs().items(), ids=list(pairs()))
def pair(request):
    return request.param[1]


@pytest.fixture(params=[False, True], ids=["counted", "weighted"])
def weights(request, pair):
    return np.random.default_rng(1).uniform(0.5, 2, pair[0].shape).astype(np.float32) if request.param else None


def matrix(pair, weights=None, num_classes=K):
    w = None if weights is None else jnp.asarray(weights)
    return metrics.confusion_matrix(jnp.asarray(pair[0]), jnp.asarray(pair[1]), num_classes=num_classes, weights=w)


def test_the_confusion_matrix_is_that_of_scikit_learn(pair, weights):
    want = sklearn.metrics.confusion_matrix(*pair, labels=range(K), sample_weight=weights)
    got = matrix(pair, weights)
    assert got.dtype == (jnp.int32 if weights is None else jnp.float32)
    bound = 0 if weights is None else 2 * np.sqrt(200) * U
    np.testing.assert_allclose(got, want, rtol=bound, atol=0)


@pytest.mark.parametrize("average", [None, "macro", "micro", "weighted"])
@pytest.mark.parametrize("name", ["precision", "recall", "f1_score"])
def test_ratios_are_those_of_scikit_learn(name, average, pair, weights):
    peer = getattr(sklearn.metrics, name if name == "f1_score" else f"{name}_score")
    # One value per class needs all classes named; an average runs over those that occur, and must not be told others.
    labels = range(K) if average is None else None
    want = peer(*pair, average=average, labels=labels, sample_weight=weights, zero_division=0)
    got = getattr(metrics, name)(matrix(pair, weights), average=average)
    # The bound of the ratio and that of the sums in it.
    np.testing.assert_allclose(got, want, rtol=(4 + 2 * K + 4 * np.sqrt(200)) * U, atol=0)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_accuracies_are_those_of_scikit_learn(pair, weights):
    c, bound = matrix(pair, weights), (4 + 2 * K + 4 * np.sqrt(200)) * U
    want = sklearn.metrics.accuracy_score(*pair, sample_weight=weights)
    np.testing.assert_allclose(metrics.accuracy(c), want, rtol=bound, atol=0)
    want = sklearn.metrics.balanced_accuracy_score(*pair, sample_weight=weights)
    np.testing.assert_allclose(metrics.balanced_accuracy(c), want, rtol=bound, atol=0)


def ratios(c):
    named = [getattr(metrics, n)(c, average=a) for n in ("precision", "recall", "f1_score")
             for a in ("macro", "micro", "weighted")]  # fmt: skip
    return jnp.stack([metrics.accuracy(c), metrics.balanced_accuracy(c), *named])


def test_nothing_at_all_is_0_with_a_gradient_of_0():
    c = matrix((np.zeros(0, int), np.zeros(0, int)))
    assert not jnp.any(c)
    assert not jnp.any(ratios(c))
    assert not jnp.any(jax.jacrev(ratios)(c.astype(jnp.float32)))
    assert not jnp.any(metrics.f1_score(c))


def test_one_class_there_is():
    assert ratios(matrix((np.zeros(3, int), np.zeros(3, int)), num_classes=1)).tolist() == [1] * 11


def test_weights_are_repetition_and_weight_0_is_absence():
    labels, predictions = pairs()["mostly right"]
    times = np.random.default_rng(2).integers(0, 4, labels.shape)
    repeated = matrix((np.repeat(labels, times), np.repeat(predictions, times)))
    for w in (times, times.astype(np.float32)):
        chex.assert_trees_all_equal(matrix((labels, predictions), w), repeated.astype(jnp.float32))
    masked = matrix((labels, predictions), times > 0)
    chex.assert_trees_all_equal(masked, matrix((labels[times > 0], predictions[times > 0])))
    chex.assert_trees_all_equal_dtypes(masked, repeated)


def test_batches_add_and_shape_does_not_matter():
    labels, predictions = pairs()["random"]
    whole = matrix((labels, predictions))
    assert jnp.array_equal(matrix((labels[:77], predictions[:77])) + matrix((labels[77:], predictions[77:])), whole)
    assert jnp.array_equal(matrix((labels.reshape(4, 5, 10), predictions.reshape(4, 5, 10))), whole)


def test_devices_add():
    labels, predictions = (jnp.asarray(a) for a in pairs()["random"])
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def summed(labels, predictions):
        return jax.lax.psum(metrics.confusion_matrix(labels, predictions, num_classes=K), "batch")

    sharded = jax.shard_map(summed, mesh=mesh, in_specs=P("batch"), out_specs=P())
    assert jnp.array_equal(sharded(labels, predictions), matrix((labels, predictions)))


@pytest.mark.parametrize(("dtype", "last"), [(np.uint8, 255), (np.int8, 127), (np.uint16, 299), (np.int16, 299)])
def test_labels_of_a_small_dtype_are_compared_as_wider_ones(dtype, last):
    y = np.array([0, last], dtype)
    assert jnp.diagonal(matrix((y, y), num_classes=last + 1))[y.astype(int)].tolist() == [1, 1]
    got = matrix((y, y[::-1]), np.ones(2, np.float32), num_classes=last + 1)
    assert (got[0, last], got[last, 0], got.sum()) == (1, 1, 2)


def test_counts_are_exact_as_far_as_an_integer_goes():
    """A float32 counter would stop at 2**24, and the sum of batches too."""
    zeros = jnp.zeros(2**24 + 1, jnp.int8)
    total = metrics.confusion_matrix(zeros, zeros, num_classes=1)
    assert total.item() == 2**24 + 1
    one = matrix((np.zeros(1, int), np.zeros(1, int)), num_classes=1)
    assert (total + one).item() == 2**24 + 2
    assert metrics.accuracy(total + one) == 1
    with jax.enable_x64(True):
        assert matrix((np.zeros(1, np.int64), np.zeros(1, np.int32)), num_classes=1).dtype == jnp.int64


def test_sums_of_weights_keep_their_digits():
    """Added one after the other, a million weights of 0.1 err by 160 000 u."""
    n, w = 10**6, np.float32(0.1)
    zeros = jnp.zeros(n, jnp.int32)
    got = metrics.confusion_matrix(zeros, zeros, num_classes=2, weights=jnp.full(n, w))[0, 0]
    assert abs(float(got) / (n * float(w)) - 1) <= 2 * np.sqrt(n) * U


def test_the_gradient_in_the_weights_is_the_gradient_in_the_entry():
    labels, predictions = pairs()["mostly right"]
    w = jnp.ones(labels.shape)
    slope = jax.grad(lambda w: metrics.f1_score(matrix((labels, predictions), w), average="macro"))(w)
    entry = jax.grad(lambda c: metrics.f1_score(c, average="macro"))(matrix((labels, predictions), w))
    np.testing.assert_allclose(
        slope, entry[labels, predictions], rtol=64 * U, atol=64 * U * float(jnp.abs(entry).max())
    )


@pytest.mark.parametrize(("what", "bad"), [("label", -1), ("label", K), ("prediction", -1), ("prediction", K + 2)])
def test_a_class_out_of_range_makes_the_sum_invalid_and_is_named_unless_it_weighs_0(what, bad):
    good, place = np.array([0, 1, 2]), 0 if what == "label" else 1
    pair = [good, good]
    pair[place] = np.array([0, bad, 2])
    call = lambda w: matrix(pair, w)  # noqa: E731
    for w in (None, np.ones(3, bool), np.ones(3, np.float32)):
        assert jnp.all(call(w) < 0 if w is None or w.dtype == bool else jnp.isnan(call(w)))
        assert jnp.all(jnp.isnan(ratios(call(w))))
        assert f"confusion_matrix: {what} {bad} is outside [0, {K})" in jprob.checkify(call)(w)[0].get()
    assert not jnp.any(jax.grad(lambda w: call(w)[0, 0])(jnp.ones(3)))
    absent = np.array([1.0, 0.0, 1.0])
    error, got = jprob.checkify(call)(absent)
    assert error.get() is None
    np.testing.assert_array_equal(got, matrix((good[[0, 2]], good[[0, 2]])))


@pytest.mark.parametrize("times", [1, 2, 3, 4, 8, 24, 1024])
def test_a_sum_of_invalid_counts_is_invalid(times):
    """Equal marks would cancel: twice -2**31 is 0."""
    bad = matrix(([0, -100], [0, 1])) * times
    assert jnp.any(bad < 0)
    assert jnp.all(jnp.isnan(ratios(bad + matrix(pairs()["random"]))))


def test_a_nan_in_the_matrix_is_passed_on():
    c = jnp.ones((3, 3)).at[0, 1].set(jnp.nan)
    assert jnp.all(jnp.isnan(ratios(c)))
    assert jnp.isnan(metrics.recall(c)).tolist() == [True, False, False]
    assert jnp.isnan(metrics.precision(c)).tolist() == [False, True, False]


def test_perplexity_is_the_exponential_of_the_weighted_mean():
    rng = np.random.default_rng(3)
    nll, w = rng.uniform(0, 9, (40, 5)).astype(np.float32), rng.uniform(0, 2, (40, 5)).astype(np.float32)
    mean = np.average(nll.astype(np.float64), weights=w.astype(np.float64))
    got = metrics.perplexity(jnp.asarray(nll), weights=jnp.asarray(w))
    np.testing.assert_allclose(got, np.exp(mean), rtol=(16 + mean) * U)
    mean = nll.astype(np.float64).mean()
    np.testing.assert_allclose(metrics.perplexity(jnp.asarray(nll)), np.exp(mean), rtol=(16 + mean) * U)


def test_perplexity_has_its_limits():
    nll = jnp.array([1.0, jnp.inf, 2.0])
    assert metrics.perplexity(nll) == jnp.inf
    assert metrics.perplexity(jnp.array([90.0, 88.0])) == jnp.inf
    assert metrics.perplexity(nll, weights=jnp.zeros(3)) == 1
    assert metrics.perplexity(jnp.zeros(0)) == 1
    masked = jnp.array([True, False, True])
    assert metrics.perplexity(nll, weights=masked) == pytest.approx(np.exp(1.5), rel=18 * U)
    slope = jax.grad(lambda x: metrics.perplexity(x, weights=masked))(nll)
    np.testing.assert_allclose(slope, np.exp(1.5) * np.array([0.5, 0, 0.5]), rtol=18 * U)
    for number in (0, 1):
        slope = jax.grad(lambda x, w: metrics.perplexity(x, weights=w), number)(jnp.ones(3), jnp.zeros(3))
        assert not jnp.any(slope)
    assert jnp.isnan(metrics.perplexity(nll, weights=jnp.array([1.0, 0.0, -1.0])))
    for x in (nll, nll.at[0].set(200)):  # an infinite result
        assert not jnp.any(jax.grad(lambda x: metrics.perplexity(x, weights=jnp.ones(3)))(x))
