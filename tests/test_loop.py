"""The laws of the training loop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jprob import categorical, mle

U = 2.0**-24
SIZE, FEATURES, CLASSES = 23, 5, 3
_rng = np.random.default_rng(0)
X = jnp.asarray(_rng.normal(size=(SIZE, FEATURES)), jnp.float32)
Y = jnp.asarray(_rng.integers(0, CLASSES, SIZE))
PARAMS = {"kernel": jnp.asarray(_rng.normal(size=(FEATURES, CLASSES)), jnp.float32), "bias": jnp.zeros(CLASSES)}
OPTIMIZERS = {"sgd": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(1e-2)}


def nll(params, batch, key):
    x, y = batch
    return categorical.cross_entropy(x @ params["kernel"] + params["bias"], y)


def noisy_nll(params, batch, key):
    x, y = batch
    return nll(params, (x + 0.1 * jax.random.normal(key, x.shape), y), key)


def seen(params, ids, key):
    """Each example adds its own unit vector to the gradient: with SGD(1) the params count who was seen."""
    return -params[ids]


def assert_same_bits(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(g.dtype, jax.dtypes.prng_key):
            g, w = jax.random.key_data(g), jax.random.key_data(w)
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


def start(optimizer, seed=0, params=PARAMS):
    return mle.init(params, optimizer, jax.random.key(seed))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 23, 40])
def test_every_example_comes_once_an_epoch(batch_size):
    steps = -(-SIZE // batch_size)
    optimizer = optax.sgd(1.0)
    state = start(optimizer, params=jnp.zeros(SIZE))
    for _ in range(3):
        before = state.params
        state, _ = mle.run(seen, optimizer, state, jnp.arange(SIZE), num_steps=steps, batch_size=batch_size)
        # A batch of b examples moves each by 1 / b; the last batch holds what is left.
        gain = np.asarray(state.params - before)
        last = SIZE - (steps - 1) * batch_size
        share = np.where(np.isclose(gain, 1 / last), last, batch_size)
        np.testing.assert_allclose(gain * share, 1, rtol=8 * U)
        assert (share == last).sum() in (last, SIZE)


def test_the_order_is_new_in_each_epoch_and_follows_from_the_key():
    def order(seed, epochs=2):
        tell = lambda params, x, key: params * 0 + x  # noqa: E731  the loss of a batch of one tells which one it was
        state = start(optax.sgd(0.0), seed, jnp.zeros(()))
        _, history = mle.run(tell, optax.sgd(0.0), state, jnp.arange(23.0), num_steps=23 * epochs, batch_size=1)
        return np.asarray(history.loss).reshape(epochs, 23)

    first = order(0)
    assert (np.sort(first) == np.arange(23)).all()
    assert (first[0] != first[1]).any()
    assert (first == order(0)).all()
    assert (first != order(1)).any()


def test_the_short_batch_counts_its_own_examples_alone():
    """A padded row must not pull on the mean, not even with a loss that is infinite."""
    optimizer = optax.sgd(0.1)
    _, history = mle.run(nll, optimizer, start(optimizer), (X, Y), num_steps=1, batch_size=40)
    _, want = mle.step(nll, optimizer, start(optimizer), (X, Y))
    np.testing.assert_allclose(history.loss[0], want.loss, rtol=16 * U)
    np.testing.assert_allclose(history.gradient_norm[0], want.gradient_norm, rtol=16 * U)
    hostile = lambda p, x, key: jnp.where(x == 22.0, jnp.inf, 1.0) + 0 * p  # noqa: E731
    weights = jnp.arange(23) < 22
    _, metrics = mle.step(hostile, optimizer, start(optimizer, params=jnp.zeros(())), jnp.arange(23.0), weights=weights)
    assert metrics.loss == 1


def test_an_example_of_weight_0_is_not_there_even_if_it_is_nan():
    surprise = lambda w, x, key: -jnp.log(w * x)  # noqa: E731  infinite at 0, with a gradient of 0 / 0
    optimizer = optax.sgd(0.1)
    state, x = start(optimizer, params=jnp.ones(())), jnp.array([0.0, 1.0, jnp.nan, 2.0])
    got, metrics = mle.step(surprise, optimizer, state, x, weights=jnp.array([0.0, 1.0, 0.0, 2.0]))
    want, wanted = mle.step(surprise, optimizer, state, jnp.array([1.0, 2.0, 2.0]))
    np.testing.assert_allclose(metrics.loss, wanted.loss, rtol=8 * U)
    np.testing.assert_allclose(got.params, want.params, rtol=8 * U)


def test_losses_of_low_precision_are_summed_in_float32():
    constant = lambda w, x, key: (x + w * 0).astype(jnp.float16)  # noqa: E731
    optimizer = optax.sgd(0.1)
    _, metrics = mle.step(constant, optimizer, start(optimizer, params=jnp.zeros(())), jnp.full(70_000, 20.0))
    assert metrics.loss == 20
    assert metrics.loss.dtype == jnp.float32


@pytest.mark.parametrize(
    ("batch", "weights", "message"),
    [
        ((X, Y), jnp.ones(()), "step: weights must be one number for each of 23 examples, got shape ()"),
        ((X, Y), jnp.ones((23, 1)), "step: weights must be one number for each of 23 examples, got shape (23, 1)"),
        ((X, Y[:3]), None, "step: expected batch with one leading axis of examples, got shapes [(23, 5), (3,)]"),
        ((), None, "step: expected batch with one leading axis of examples, got shapes []"),
    ],
)
def test_a_step_says_what_it_expected(batch, weights, message):
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=re.escape(message)):
        mle.step(nll, optimizer, start(optimizer), batch, weights=weights)


def test_no_weight_at_all_gives_loss_0_and_gradient_0():
    optimizer = optax.sgd(0.1)
    state, metrics = mle.step(nll, optimizer, start(optimizer), (X, Y), weights=jnp.zeros(SIZE))
    assert (metrics.loss, metrics.gradient_norm) == (0, 0)
    assert_same_bits(state.params, PARAMS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("cuts", [(1, 16), (6, 11), (5, 1, 1, 10)])
def test_runs_in_pieces_are_one_run_bit_for_bit(cuts, optimizer):
    """Also when cut within an epoch (6 steps of 4), at its end, and into single steps."""
    whole, history = mle.run(noisy_nll, optimizer, start(optimizer), (X, Y), num_steps=sum(cuts), batch_size=4)
    state, pieces = start(optimizer), []
    for length in cuts:
        state, piece = mle.run(noisy_nll, optimizer, state, (X, Y), num_steps=length, batch_size=4)
        pieces.append(piece)
    assert_same_bits(state, whole)
    assert_same_bits(jax.tree.map(lambda *x: jnp.concatenate(x), *pieces), history)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_run_is_a_loop_of_steps(optimizer):
    """Against a loop that is written by hand, with the batches the order gives (read off by a run that only looks)."""
    look = lambda p, batch, key: batch[2] + 0 * p  # noqa: E731
    data = (X, Y, jnp.arange(float(SIZE)))
    _, ids = mle.run(
        look, optax.sgd(0.0), start(optax.sgd(0.0), params=jnp.zeros(())), data, num_steps=46, batch_size=1
    )
    state = start(optimizer)
    for i in np.asarray(ids.loss, int):
        state, _ = jax.jit(mle.step, static_argnums=(0, 1))(nll, optimizer, state, (X[i][None], Y[i][None]))
    whole, _ = mle.run(nll, optimizer, start(optimizer), (X, Y), num_steps=46, batch_size=1)
    for got, want in zip(jax.tree.leaves(whole.params), jax.tree.leaves(state.params), strict=True):
        # 46 steps, each with its rounding; none is amplified, the loss being convex.
        np.testing.assert_allclose(got, want, rtol=0, atol=46 * 4 * U * float(jnp.abs(want).max()))


def test_vmap_over_seeds_is_each_seed_alone():
    optimizer = OPTIMIZERS["adam"]
    keys = jax.random.split(jax.random.key(7), 3)

    def train(key):
        return mle.run(noisy_nll, optimizer, mle.init(PARAMS, optimizer, key), (X, Y), num_steps=14, batch_size=4)

    together, history = jax.vmap(train)(keys)
    for i, key in enumerate(keys):
        alone, alone_history = train(key)
        for got, want in zip(jax.tree.leaves(together.params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=0, atol=14 * 8 * U * float(jnp.abs(want).max()))
        np.testing.assert_allclose(history.loss[i], alone_history.loss, rtol=14 * 64 * U)
    assert not np.allclose(history.loss[0], history.loss[1]), "each seed has an order of its own"


def test_vmap_over_learning_rates_and_initial_params():
    rates = jnp.array([0.0, 0.1, 1.0])

    def train(rate, params):
        optimizer = optax.sgd(rate)
        state = mle.init(params, optimizer, jax.random.key(0))
        return mle.run(nll, optimizer, state, (X, Y), num_steps=12, batch_size=4)[0].params

    many = jax.tree.map(lambda x: jnp.stack([x, x + 1, x + 2]), PARAMS)
    together = jax.vmap(train)(rates, many)
    for i in range(3):
        alone = train(float(rates[i]), jax.tree.map(lambda x, i=i: x[i], many))
        for got, want in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=0, atol=12 * 16 * U * float(jnp.abs(want).max()))
    assert_same_bits(jax.tree.map(lambda x: x[0], together), PARAMS)


def test_each_step_has_a_key_of_its_own():
    draw = lambda p, x, key: jax.random.uniform(key, x.shape) + 0 * p  # noqa: E731
    optimizer = optax.sgd(0.0)
    state = start(optimizer, params=jnp.zeros(()))
    _, history = mle.run(draw, optimizer, state, jnp.zeros(4), num_steps=8, batch_size=2)
    assert len(set(history.loss.tolist())) == 8


def test_the_program_holds_no_callback():
    optimizer = OPTIMIZERS["adam"]
    lowered = mle.run.lower(nll, optimizer, start(optimizer), (X, Y), num_steps=5, batch_size=4)
    assert "callback" not in lowered.as_text()
    assert "while" in lowered.as_text()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_run_lowers_for(platform):
    optimizer = OPTIMIZERS["adam"]

    @jax.jit
    def train(params, x, y):
        state = mle.init(params, optimizer, jax.random.key(0))
        return mle.run(nll, optimizer, state, (x, y), num_steps=5, batch_size=4)[1]

    assert jax.export.export(train, platforms=[platform])(PARAMS, X, Y).platforms == (platform,)


def test_it_fits_by_maximum_likelihood():
    """The MLE of a categorical is the frequency of its classes."""
    optimizer = optax.sgd(0.5)
    frequencies = lambda logits, y, key: categorical.cross_entropy(jnp.broadcast_to(logits, (*y.shape, 3)), y)  # noqa: E731
    state = start(optimizer, params=jnp.zeros(3))
    state, history = mle.run(frequencies, optimizer, state, Y, num_steps=300, batch_size=SIZE)
    np.testing.assert_allclose(categorical.softmax(state.params), np.bincount(Y) / SIZE, rtol=64 * U)
    assert history.gradient_norm[-1] < 1e-6 < history.gradient_norm[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "run: num_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "run: batch_size must be at least 1, got 0"),
        ({"data": (X, Y[:5])}, "run: expected data with one leading axis of examples, got shapes [(23, 5), (5,)]"),
        ({"data": ()}, "run: expected data with one leading axis of examples, got shapes []"),
        ({"data": (X[:0], Y[:0])}, "run: expected data with one leading axis of examples, got shapes [(0, 5), (0,)]"),
        ({"nll": lambda p, b, k: nll(p, b, k).mean()}, "step: nll must return one value for each of 4 examples, got"),
    ],
)
def test_a_fault_says_what_was_expected(change, message):
    given = {"nll": nll, "data": (X, Y), "num_steps": 3, "batch_size": 4} | change
    optimizer = OPTIMIZERS["sgd"]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        mle.run(given["nll"], optimizer, start(optimizer), given["data"],
                num_steps=given["num_steps"], batch_size=given["batch_size"])  # fmt: skip
    assert "\n" not in str(caught.value)
