"""Laws that hold for all inputs, looked for where they break: hypothesis draws the inputs and shrinks what fails.

Both sides of an equation are within (16 + R) u of the same true number. So they differ by at most twice that, unless a
law says more. Logits that are multiples of 1/8 can be shifted without rounding, and then nothing may change.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprob import bayes, bernoulli, categorical, gaussian, linear_categorical

U = 2.0**-24
CLASSES = 5

settings.register_profile("laws", max_examples=150, deadline=None, derandomize=True)
settings.load_profile("laws")

eighths = st.integers(-800, 800).map(lambda n: n / 8)
impossible = st.just(-math.inf)


def rows(element, size=CLASSES):
    return st.lists(element, min_size=size, max_size=size).map(lambda row: np.array(row, np.float32))


# At least the first class is possible; ties, margins of 200 and impossible classes are all likely.
logits = st.tuples(eighths, rows(eighths | st.integers(-2, 2).map(float) | impossible, CLASSES - 1)).map(
    lambda parts: np.concatenate([[np.float32(parts[0])], parts[1]])
)
classes = st.integers(0, CLASSES - 1)
numbers = st.floats(-100, 100, width=32)
scales = st.floats(-60, 60).map(lambda e: np.float32(10.0 ** (e / 2)))

OF_LOGITS = {
    "softmax": categorical.softmax,
    "log_softmax": categorical.log_softmax,
    "cross_entropy": lambda z: categorical.cross_entropy(z, jnp.array(1)),
    "brier_score": lambda z: categorical.brier_score(z, jnp.array(1)),
    "entropy": categorical.entropy,
    "gradient of cross_entropy": jax.jit(jax.grad(lambda z: categorical.cross_entropy(z, jnp.array(1)))),
}
DIVERGENCES = {"kl": categorical.kl_divergence, "js": categorical.js_divergence}


# Log-probabilities, and probabilities, of rows of logits and labels.
LOG_PROBS = {
    "log_softmax": lambda z, y: categorical.log_softmax(z),
    "log_prob": lambda z, y: categorical.log_prob(y, z),
    "fused log_prob": lambda z, y: linear_categorical.log_prob(y, z, jnp.eye(z.shape[1], dtype=z.dtype)),
    "bernoulli.log_prob": lambda z, y: bernoulli.log_prob(jnp.broadcast_to(y[:, None] % 2, z.shape), z),
    "gaussian.log_cdf": lambda z, y: gaussian.log_cdf(z),
    "gaussian.log_interval_prob": lambda z, y: gaussian.log_interval_prob(z, z + jnp.abs(z[:, :1])),
    "bayes.log_posterior": lambda z, y: bayes.log_posterior(z, z[::-1]),
}
PROBS = {
    "softmax": lambda z, y: categorical.softmax(z),
    "tempered softmax": lambda z, y: categorical.softmax(z, temperature=0.3),
    "bernoulli.prob": lambda z, y: bernoulli.prob(z),
    "gaussian.cdf": lambda z, y: gaussian.cdf(z),
    "gaussian.interval_prob": lambda z, y: gaussian.interval_prob(z, z + jnp.abs(z[:, :1])),
}


@pytest.mark.parametrize("name", LOG_PROBS | PROBS)
@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float32", *(pytest.param(other, marks=pytest.mark.slow) for other in ("float16", "float64"))]
)
def test_no_probability_is_above_1(name, dtype):
    rng = np.random.default_rng(0)
    low, high = (-jnp.inf, 0) if name in LOG_PROBS else (0, 1)
    with jax.enable_x64(dtype == "float64"):
        for classes in (3, 1000) if dtype == "float32" else (1000,):
            z = rng.normal(0, 1, (200, classes)) * rng.choice([1e-3, 1.0, 10.0, 60.0], (200, 1))
            out = (LOG_PROBS | PROBS)[name](jnp.asarray(z, dtype), jnp.asarray(rng.integers(0, classes, 200)))
            assert ((out >= low) & (out <= high)).all()


def span(*rows):
    return max(float(np.ptp(row[np.isfinite(row)])) for row in rows)


def close(got, want, bound):
    """Equal to `bound` of each entry; below the smallest normal number anything may have been flushed to 0."""
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=bound, atol=np.finfo(np.float32).tiny)


@pytest.mark.parametrize("name", OF_LOGITS)
@given(z=logits, shift=st.integers(-10_000, 10_000))
def test_a_common_shift_changes_no_bit(name, z, shift):
    np.testing.assert_array_equal(OF_LOGITS[name](z + np.float32(shift)), OF_LOGITS[name](z))


@pytest.mark.parametrize("name", DIVERGENCES)
@given(p=logits, q=logits, shift=st.integers(-10_000, 10_000))
def test_a_shift_of_either_side_changes_no_divergence(name, p, q, shift):
    got, want = DIVERGENCES[name](p, q + np.float32(shift)), DIVERGENCES[name](p, q)
    close(got, want, 2 * (16 + span(p, q)) * U)
    assert DIVERGENCES[name](p, p + np.float32(shift)) == 0


@pytest.mark.parametrize("name", DIVERGENCES)
@given(p=logits, q=logits, order=st.permutations(range(CLASSES)))
def test_divergences_are_not_negative_and_do_not_know_the_order_of_the_classes(name, p, q, order):
    value = DIVERGENCES[name](p, q)
    assert value >= 0
    close(DIVERGENCES[name](p[order], q[order]), value, 2 * (16 + span(p, q)) * U)


@given(z=logits, label=classes, order=st.permutations(range(CLASSES)))
def test_a_loss_follows_its_class(z, label, order):
    moved = order.index(label)
    for loss in (categorical.cross_entropy, categorical.brier_score):
        close(loss(z[order], jnp.array(moved)), loss(z, jnp.array(label)), 2 * (16 + 2 * span(z)) * U)


@pytest.mark.parametrize("name", [name for name in OF_LOGITS if name not in ("softmax", "log_softmax")])
@given(z=logits, extra=eighths, place=st.integers(2, CLASSES))
def test_an_impossible_class_is_a_class_that_was_never_there(name, z, extra, place):
    """The masks of `where` become -inf, whose class must add nothing; behind the label, so that its index stays."""
    masked = np.insert(z, place, -np.inf).astype(np.float32)
    got, want = OF_LOGITS[name](masked), OF_LOGITS[name](z)
    if got.ndim:
        assert got[place] == 0
        got = np.delete(got, place)
    close(got, want, 4 * U)


@given(z=logits)
def test_probabilities_sum_to_1_and_normalising_twice_is_normalising(z):
    p = np.asarray(categorical.softmax(z), np.float64)
    # Each is off by (16 + R) u of itself at most.
    assert abs(p.sum() - 1) <= (16 + span(z)) * U
    once = categorical.log_softmax(z)
    close(categorical.log_softmax(once), once, 2 * (16 + span(z)) * U)


@given(z=logits)
def test_entropy_lies_between_0_and_log_k(z):
    assert 0 <= categorical.entropy(z) <= math.log(CLASSES) * (1 + 16 * U)


@given(p=rows(eighths), q=rows(eighths))
def test_cross_entropy_is_entropy_plus_divergence(p, q):
    total = categorical.entropy(p) + categorical.kl_divergence(p, q)
    # The probabilities that serve as targets are rounded too, by (16 + R) u.
    close(categorical.cross_entropy(q, categorical.softmax(p)), total, 3 * (16 + span(p, q)) * U)


@given(z=numbers, label=st.booleans())
def test_bernoulli_is_categorical_with_two_classes(z, label):
    pair, y = np.array([0, z], np.float32), jnp.array(int(label))
    close(bernoulli.cross_entropy(jnp.float32(z), y), categorical.cross_entropy(pair, y), 2 * (16 + abs(z)) * U)


@given(ends=st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3).map(sorted))
def test_intervals_add(ends):
    a, b, c = ends
    left, right, whole = gaussian.interval_prob(a, b), gaussian.interval_prob(b, c), gaussian.interval_prob(a, c)
    far = max(a, -c, 0.0)
    assert 0 <= whole <= 1
    # Three values, each within (24 + 3 r^2) u of itself, r the end nearest to the mean; a part may lie farther out.
    bound = (24 + 3 * far**2) * U * float(whole) + (24 + 3 * 81) * U * (float(left) + float(right))
    assert abs(float(left) + float(right) - float(whole)) <= bound + np.finfo(np.float32).tiny


# Rows of logits, and what makes the other argument of a masked row as bad as it can be.
MASKED_ROWS = [[1.0, 0.0, 2.0], [1.0, -math.inf, 0.0], [-math.inf, 1.0, 0.0], [-math.inf] * 3, [1e36, -1e36, 0.0]]
BAD_LABELS = [0, -1, -100, 3, 2**31 - 1]
BAD_TARGETS = [[1.0, 0.0, 0.0], [math.nan, 0.0, 1.0], [math.nan] * 3, [math.inf, 0.0, 0.0], [-1.0, 0.0, 2.0]]
BAD_LOGITS = [[0.0, 1.0, 0.0], [-math.inf, 0.0, 1.0], [0.0, -math.inf, -math.inf], [-math.inf] * 3, [1e36, -1e36, 0.0]]
TEMPERATURES = [0.0, 0.5, 2.0, math.inf, -1.0]
YES = [0.5, -1.0, 2.0, math.nan, math.inf]
PER_EXAMPLE = {
    "cross_entropy": (categorical.cross_entropy, BAD_LABELS, np.int32),
    "smoothed": (lambda z, y: categorical.cross_entropy(z, y, label_smoothing=0.1), BAD_LABELS, np.int32),
    "smoothed fully": (lambda z, y: categorical.cross_entropy(z, y, label_smoothing=1.0), BAD_LABELS, np.int32),
    "brier_score": (categorical.brier_score, BAD_LABELS, np.int32),
    "log_prob": (lambda z, y: categorical.log_prob(y, z), BAD_LABELS, np.int32),
    "soft cross_entropy": (categorical.cross_entropy, BAD_TARGETS, np.float32),
    "soft smoothed": (lambda z, t: categorical.cross_entropy(z, t, label_smoothing=0.1), BAD_TARGETS, np.float32),
    "soft brier_score": (categorical.brier_score, BAD_TARGETS, np.float32),
    "entropy": (lambda z, _: categorical.entropy(z), [0], np.int32),
    "kl_divergence": (categorical.kl_divergence, BAD_LOGITS, np.float32),
    "js_divergence": (categorical.js_divergence, BAD_LOGITS, np.float32),
    "distillation_loss": (
        lambda s, t: categorical.distillation_loss(s, t, temperature=2.0), BAD_LOGITS, np.float32),
    "softmax": (lambda z, t: categorical.softmax(z, temperature=t[..., None]), TEMPERATURES, np.float32),
    "log_softmax": (lambda z, t: categorical.log_softmax(z, temperature=t[..., None]), TEMPERATURES, np.float32),
    "bernoulli.cross_entropy": (bernoulli.cross_entropy, YES, np.float32),
    "bernoulli.log_prob": (lambda z, y: bernoulli.log_prob(y, z), YES, np.float32),
    "bernoulli.brier_score": (bernoulli.brier_score, YES, np.float32),
    "bernoulli.entropy": (lambda z, _: bernoulli.entropy(z), [0], np.int32),
    "bernoulli.kl_divergence": (bernoulli.kl_divergence, [0.0, -math.inf, math.inf], np.float32),
}  # fmt: skip


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_a_masked_example_poisons_nothing(name):
    """Its gradient is exactly 0, for any value; unmasked it is finite, and so is the second derivative."""
    function, bad, dtype = PER_EXAMPLE[name]
    rows = [0.0, 5.0, -math.inf, math.inf] if "bernoulli" in name else MASKED_ROWS
    pairs = [(row, other) for row in rows for other in bad]
    z, other = np.array([p[0] for p in pairs], np.float32), np.array([p[1] for p in pairs], dtype)
    moving = (0, 1) if dtype == np.float32 and not name.endswith("softmax") else (0,)
    args, rng = (z, other), np.random.default_rng(0)
    direction = tuple(rng.normal(size=args[i].shape).astype(np.float32) for i in moving)

    def derivatives(weight, *args):
        def loss(*values):
            out = function(*values, *args[len(values) :])
            return jnp.sum(jnp.where(weight != 0, out, 0))

        values, slope = args[: len(moving)], jax.grad(loss, moving)
        forward, second = (
            jax.jvp(loss, values, direction)[1],
            jax.jvp(lambda *v: slope(*v, *args[len(v) :]), values, direction)[1],
        )
        return slope(*args), (forward, second, jax.grad(lambda *v: jax.jvp(loss, v, direction)[1], moving)(*values))

    program = jax.jit(derivatives)
    masked, rest = program(0.0, *args)
    assert all((slope == 0).all() for slope in masked)
    chex.assert_tree_all_finite((rest, program(1.0, *args)))


PRODUCERS = {
    "tanh": lambda h: 5 * jnp.tanh(h / 5),
    "quotient": lambda h: 7 * h / jnp.sqrt(jnp.mean(h * h, axis=-1, keepdims=True)),
}
CONSUMERS = {
    "log_softmax": categorical.log_softmax,
    "entropy": categorical.entropy,
    "smoothed": lambda z: categorical.cross_entropy(z, jnp.arange(len(z)) % z.shape[-1], label_smoothing=0.1),
    "brier": lambda z: categorical.brier_score(z, jnp.arange(len(z)) % z.shape[-1]),
    "kl": lambda z: categorical.kl_divergence(z, z[::-1]),
}


@pytest.mark.parametrize("consumer", CONSUMERS.values(), ids=CONSUMERS)
@pytest.mark.parametrize("producer", PRODUCERS.values(), ids=PRODUCERS)
@pytest.mark.optimized
def test_logits_made_in_the_same_program_cost_their_rounding_alone(producer, consumer):
    """XLA may compute them again for each sum, an ulp or two apart. A logit then need not equal its own maximum."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(0, 4, (64, 24)), jnp.float32)
    logits = jax.jit(producer)(hidden)
    apart, together = consumer(logits), jax.jit(lambda h: consumer(producer(h)))(hidden)
    # An error of 4 u of the logits; a value moves by as much, times at most the largest gap (an entropy, a divergence).
    size = float(jnp.max(jnp.abs(logits)))
    np.testing.assert_allclose(together, apart, rtol=64 * 2.0**-24, atol=4 * 2.0**-24 * size * max(1, 2 * size))


def test_second_derivatives_in_a_rematerialised_scan_are_those_outside():
    """There jax differentiates what a rule calls, and no rule of that; logits that tie are where it shows."""
    rng = np.random.default_rng(0)
    hidden, kernel, labels = rng.integers(-1, 2, (8, 3)), rng.integers(-1, 2, (3, CLASSES)), rng.integers(0, CLASSES, 8)
    args, direction = (hidden * 1.0, kernel * 1.0), (rng.normal(size=(8, 3)), rng.normal(size=(3, CLASSES)))
    args, direction = jax.tree.map(jnp.float32, (args, direction))
    functions = [
        lambda z, y: jnp.square(categorical.cross_entropy(z, y)),
        lambda z, y: jnp.square(categorical.entropy(z)),
        lambda z, y: categorical.brier_score(z, y),
        lambda z, y: categorical.log_softmax(z)[..., 0],
        lambda z, y: categorical.kl_divergence(z, z[..., ::-1] / 2),
    ]

    def product(function, remat):
        def loss(hidden, kernel):
            body = remat(lambda block: function(block[0] @ kernel, block[1]))
            return jnp.sum(jax.lax.map(body, (hidden.reshape(4, 2, 3), labels.reshape(4, 2))))

        return jax.jvp(jax.grad(loss, (0, 1)), args, direction)[1]

    for got, want in jax.jit(
        lambda: [[product(f, remat) for remat in (jax.checkpoint, lambda f: f)] for f in functions]
    )():
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=0, atol=64 * U * float(np.abs(w).max()))
