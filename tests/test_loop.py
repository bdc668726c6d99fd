"""The laws of the training loop."""

import re
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_sharding import lenient

import jprob
from jprob import categorical, mle

U = 2.0**-24
SIZE, FEATURES, CLASSES = 23, 5, 3
_rng = np.random.default_rng(0)
X = jnp.asarray(_rng.normal(size=(SIZE, FEATURES)), jnp.float32)
Y = jnp.asarray(_rng.integers(0, CLASSES, SIZE))
PARAMS = {"kernel": jnp.asarray(_rng.normal(size=(FEATURES, CLASSES)), jnp.float32), "bias": jnp.zeros((1, CLASSES))}
OPTIMIZERS = {"sgd": optax.sgd(0.1, momentum=0.9), "adam": lenient(optax.adam(1e-2))}
step = jax.jit(mle.step, static_argnums=(0, 1), static_argnames=("micro_batches", "ema_decay"))


def nll(params, batch, key):
    x, y = batch
    return categorical.cross_entropy(x @ params["kernel"] + params["bias"], y)


def noisy_nll(params, batch, key):
    x, y = batch
    return nll(params, (x + 0.1 * jax.random.normal(key, x.shape), y), key)


def assert_same_bits(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        if jnp.issubdtype(g.dtype, jax.dtypes.prng_key):
            g, w = jax.random.key_data(g), jax.random.key_data(w)
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


def assert_close(got, want, roundings):
    """Each leaf up to so many roundings of its largest number."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=roundings * U * float(np.abs(w).max()))


def start(optimizer, seed=0, params=PARAMS):
    return mle.init(params, optimizer, jax.random.key(seed))


@cache
def order(seed, epochs=2):
    """Which example comes when, [epochs, SIZE]: the loss of a batch of one tells which one it was."""
    tell = lambda params, x, key: params * 0 + x  # noqa: E731
    state = start(optax.sgd(0.0), seed, jnp.zeros(()))
    _, history = mle.run(tell, optax.sgd(0.0), state, jnp.arange(23.0), num_steps=23 * epochs, batch_size=1)
    return np.asarray(history.loss, int).reshape(epochs, SIZE)


@cache
def loop_of_steps(name, micro_batches=1, ema_decay=None):
    """Two epochs of `run` with batches of 4, written by hand: final state, metrics of all steps, sizes of batches."""
    optimizer = OPTIMIZERS[name]
    state, metrics, sizes = start(optimizer), [], []
    options = {"micro_batches": micro_batches, "ema_decay": ema_decay}
    for epoch in order(0):
        for ids in np.split(epoch, range(4, SIZE, 4)):
            filled, weights = np.pad(ids, (0, 4 - len(ids))), jnp.arange(4) < len(ids)
            state, measured = step(nll, optimizer, state, (X[filled], Y[filled]), weights=weights, **options)
            metrics.append(measured)
            sizes.append(len(ids))
    return state, jax.tree.map(lambda *x: np.stack(x), *metrics), np.array(sizes)


def climber(table):
    """Training adds 1 to the one param at each step, with SGD(1); validation looks its score up at that number."""

    def climb(w, validates, key):
        return jnp.where(validates, jnp.asarray(table)[w.astype(jnp.int32)], -w)

    return climb


def climb(table, num_steps, state=None, **options):
    optimizer = optax.sgd(1.0)
    state = start(optimizer, params=jnp.zeros(())) if state is None else state
    options = {"validation": jnp.ones(1, bool), "validate_every": 1} | options
    return mle.run(climber(table), optimizer, state, jnp.zeros(2, bool), num_steps=num_steps, batch_size=2, **options)


def test_the_order_is_new_in_each_epoch_and_follows_from_the_key():
    first = order(0)
    assert (np.sort(first) == np.arange(SIZE)).all()
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
        pytest.param((X, Y), jnp.ones(()), "step: weights must have the shape [23] of the examples, got float32[]",
                     marks=pytest.mark.wrong_types),
        pytest.param((X, Y), jnp.ones((23, 1)),
                     "step: weights must have the shape [23] of the examples, got float32[23, 1]",
                     marks=pytest.mark.wrong_types),
        ((X, Y[:3]), None, "step: expected batch with one leading axis of examples, got shapes [(23, 5), (3,)]"),
        ((), None, "step: expected batch with one leading axis of examples, got shapes []"),
    ],
)  # fmt: skip
def test_a_step_says_what_it_expected(batch, weights, message):
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=re.escape(message)):
        mle.step(nll, optimizer, start(optimizer), batch, weights=weights)


def test_no_weight_at_all_gives_loss_0_and_gradient_0():
    optimizer = optax.sgd(0.1)
    state, metrics = mle.step(nll, optimizer, start(optimizer), (X, Y), weights=jnp.zeros(SIZE))
    assert (metrics.loss, metrics.gradient_norm) == (0, 0)
    assert_same_bits(state.params, PARAMS)


VALIDATED = {"log_every": 2, "validation": (X[:5], Y[:5]), "validate_every": 4, "ema_decay": 0.9}
ALL = {**VALIDATED, "patience": 1, "micro_batches": 2, "num_steps": 8, "batch_size": 4}
TUNED = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-2, momentum=0.9)


def in_pieces(cuts, optimizer, rate=None, **options):
    state, pieces = start(optimizer), []
    if rate is not None:
        state.optimizer_state.hyperparams["learning_rate"] = jnp.float32(rate)
    for length in cuts:
        options |= {"num_steps": length, "batch_size": 4}
        state, piece = mle.run(noisy_nll, optimizer, state, (X, Y), **options)
        pieces.append(piece)
    return state, jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)


def test_runs_in_pieces_are_one_run_bit_for_bit():
    """Also when cut within an epoch (6 steps of 4), at its end, and into a single step."""
    adam = OPTIMIZERS["adam"]
    assert_same_bits(in_pieces([5, 1, 6], adam), in_pieces([12], adam))


@pytest.mark.parametrize("rate", [1e-2, 10.0], ids=["to the end", "early stop"])
def test_so_they_are_with_every_option(rate):
    """A rate of 10 overshoots, so that patience ends."""
    whole, history = in_pieces([24], TUNED, rate, **ALL)
    assert (rate == 10.0) == (whole.step < 24)
    assert_same_bits(in_pieces([8, 16], TUNED, rate, **ALL), (whole, history))


@pytest.mark.parametrize(
    ("name", "options"), [("sgd", {}), ("adam", {"micro_batches": 2, "ema_decay": 0.9})], ids=["plain", "options"]
)
def test_run_is_a_loop_of_steps(name, options):
    optimizer = OPTIMIZERS[name]
    want, metrics, _ = loop_of_steps(name, **options)
    got, history = mle.run(nll, optimizer, start(optimizer), (X, Y), num_steps=12, batch_size=4, **options)
    # 12 steps, each with its rounding; none is amplified, the loss being convex.
    assert_close(got.params, want.params, 12 * 4)
    assert_close(got.average, want.average, 12 * 4)
    assert_same_bits((got.step, got.skipped, got.key), (want.step, want.skipped, want.key))
    assert_close(history[:4], metrics[:4], 12 * 16)


def test_a_row_is_the_mean_over_its_steps():
    """The mean of the loss is by examples, that of the norms by steps; each epoch ends with a batch of 3."""
    optimizer, log_every = OPTIMIZERS["sgd"], 2
    _, steps, sizes = loop_of_steps("sgd")
    options = {"num_steps": 12, "batch_size": 4, "log_every": log_every}
    _, history = mle.run(nll, optimizer, start(optimizer), (X, Y), **options)
    cut = lambda x: x.reshape(-1, log_every)  # noqa: E731
    loss = np.average(cut(steps.loss), axis=1, weights=cut(sizes))
    want = loss, cut(steps.gradient_norm).mean(axis=1), cut(steps.update_norm).mean(axis=1)
    assert_close(history[:3], want, 12 * 16)
    assert history.skipped.tolist() == [0] * (12 // log_every)


def test_the_row_of_an_epoch_is_the_mean_over_all_data():
    optimizer = optax.sgd(0.0)
    _, history = mle.run(nll, optimizer, start(optimizer), (X, Y), num_steps=12, batch_size=4, log_every=6)
    np.testing.assert_allclose(history.loss, jnp.mean(nll(PARAMS, (X, Y), None)), rtol=8 * U)


def test_vmap_over_seeds_is_each_seed_alone():
    """Each with its own order, validations, best and average."""
    optimizer = OPTIMIZERS["adam"]
    keys = jax.random.split(jax.random.key(7), 3)
    options = {**VALIDATED, "num_steps": 12, "batch_size": 4}

    def train(key):
        return mle.run(noisy_nll, optimizer, mle.init(PARAMS, optimizer, key), (X, Y), **options)

    together, history = jax.jit(jax.vmap(train))(keys)
    for i, key in enumerate(keys):
        alone, alone_history = train(key)
        mine, mine_history = jax.tree.map(lambda x, i=i: x[i], (together, history))
        assert_close((mine.params, mine.average, mine.best), (alone.params, alone.average, alone.best), 12 * 8)
        assert_same_bits(
            (mine.key, mine.step, mine.validations_since_best), (alone.key, alone.step, alone.validations_since_best)
        )
        assert_close(mine_history, alone_history, 12 * 64)
    assert not np.allclose(history.loss[0], history.loss[1]), "each seed has an order of its own"


def test_vmap_over_learning_rates_and_initial_params():
    rates = jnp.array([0.0, 0.1, 1.0])

    def train(rate, params):
        optimizer = optax.sgd(rate)
        state = mle.init(params, optimizer, jax.random.key(0))
        return mle.run(nll, optimizer, state, (X, Y), num_steps=12, batch_size=4)[0].params

    many = jax.tree.map(lambda x: jnp.stack([x, x + 1, x + 2]), PARAMS)
    together, alone = jax.jit(jax.vmap(train))(rates, many), jax.jit(train)
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], many)
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone(rates[i], one), 12 * 16)
    assert_same_bits(jax.tree.map(lambda x: x[0], together), PARAMS)


def test_vmap_over_hyperparameters_that_are_part_of_the_state():
    plain, options = OPTIMIZERS["sgd"], {"num_steps": 12, "batch_size": 4}

    @jax.jit
    @jax.vmap
    def train(rate):
        state = start(TUNED)
        state.optimizer_state.hyperparams["learning_rate"] = rate
        return mle.run(nll, TUNED, state, (X, Y), **options)[0].params

    together = train(jnp.array([0.0, 0.1]))
    assert_same_bits(jax.tree.map(lambda x: x[0], together), PARAMS)
    want, _ = mle.run(nll, plain, start(plain), (X, Y), **options)
    assert_close(jax.tree.map(lambda x: x[1], together), want.params, 12 * 4)


def test_each_step_has_a_key_of_its_own():
    draw = lambda p, x, key: jax.random.uniform(key, x.shape) + 0 * p  # noqa: E731
    optimizer = optax.sgd(0.0)
    state = start(optimizer, params=jnp.zeros(()))
    _, history = mle.run(draw, optimizer, state, jnp.zeros(4), num_steps=8, batch_size=2)
    assert len(set(history.loss.tolist())) == 8


def test_no_program_has_an_effect():
    """An effect, be it a callback or a check, would cost every call its fast dispatch."""
    optimizer = OPTIMIZERS["adam"]
    for train in (partial(mle.run, **ALL), partial(mle.step, micro_batches=2, ema_decay=0.9)):
        assert not jax.make_jaxpr(partial(train, nll, optimizer))(start(optimizer), (X[:12], Y[:12])).effects


def test_run_lowers_for_every_platform():
    optimizer, platforms = OPTIMIZERS["adam"], ("cpu", "cuda", "tpu")

    @jax.jit
    def train(params, x, y):
        state = mle.init(params, optimizer, jax.random.key(0))
        return mle.run(nll, optimizer, state, (x, y), **ALL)[1]

    exported = jax.export.export(train, platforms=platforms)(PARAMS, X, Y)
    assert exported.platforms == platforms
    assert "callback" not in exported.mlir_module()


def test_it_fits_by_maximum_likelihood():
    """The MLE of a categorical is the frequency of its classes."""
    optimizer = optax.sgd(0.5)
    frequencies = lambda logits, y, key: categorical.cross_entropy(jnp.broadcast_to(logits, (*y.shape, 3)), y)  # noqa: E731
    state = start(optimizer, params=jnp.zeros(3))
    state, history = mle.run(frequencies, optimizer, state, Y, num_steps=300, batch_size=SIZE)
    np.testing.assert_allclose(categorical.softmax(state.params), np.bincount(Y) / SIZE, rtol=64 * U)
    assert history.gradient_norm[-1] < 1e-6 < history.gradient_norm[0]


# Validation, the best params, and stopping early


@pytest.mark.parametrize(("batch_size", "ema_decay"), [(4, 0.5), (40, None)])
def test_a_score_is_the_mean_over_the_validation_data(batch_size, ema_decay):
    """Whatever is left over in the last batch; by the average where there is one."""
    optimizer, data = OPTIMIZERS["sgd"], (X[:7], Y[:7])
    options = {"num_steps": 6, "batch_size": batch_size, "validation": data, "validate_every": 3}
    state, history = mle.run(nll, optimizer, start(optimizer), (X, Y), ema_decay=ema_decay, **options)
    scored = state.params if ema_decay is None else state.average.ema
    np.testing.assert_allclose(history.validation[1], jnp.mean(nll(scored, data, None)), rtol=16 * U)
    assert history.validation[0] != history.validation[1]


def test_validation_draws_the_same_numbers_each_time():
    draw = lambda w, x, key: jax.random.uniform(key, x.shape) + 0 * w  # noqa: E731
    optimizer = optax.sgd(0.1)
    options = {"num_steps": 4, "batch_size": 2, "validation": jnp.zeros(6), "validate_every": 1}
    _, history = mle.run(draw, optimizer, start(optimizer, params=jnp.zeros(())), jnp.zeros(4), **options)
    assert len(set(history.validation.tolist())) == 1
    assert not set(history.validation.tolist()) & set(history.loss.tolist())


TABLES = {
    "falls": [9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.125],
    "turns": [9.0, 5.0, 3.0, 4.0, 6.0, 7.0, 1.0, 8.0, 9.0],
    "equal": [9.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0],
    "NaN first": [9.0, np.nan, np.nan, 3.0, np.nan, 4.0, 3.0, 2.0, np.nan],
    "NaN": [np.nan] * 9,
    "infinite": [9.0, np.inf, -np.inf, np.nan, 1.0, 1.0, 1.0, 1.0, 1.0],
}


def judged(scores, patience):
    """Best score, its step, validations since, steps taken: by a loop on the host."""
    best, at, waited, taken = np.inf, 0, 0, 0
    for taken, score in enumerate(scores, 1):
        best, at, waited = (score, taken, 0) if score < best else (best, at, waited + 1)
        if waited == patience:
            break
    return best, at, waited, taken


@pytest.mark.parametrize("patience", [None, 2])
def test_the_best_params_are_kept_and_patience_ends(patience):
    """All tables at once, under vmap: each member stops on its own."""
    tables = jnp.array(list(TABLES.values()))
    state, history = jax.jit(jax.vmap(lambda table: climb(table, 8, patience=patience)))(tables)
    for i, table in enumerate(TABLES.values()):
        best, at, waited, taken = judged(table[1:], patience)
        mine = jax.tree.map(lambda x, i=i: x[i], state)
        assert (mine.best.score, mine.best.step, mine.best.params) == (best, at, at)
        assert (mine.validations_since_best, mine.step, mine.params) == (waited, taken, taken)
        np.testing.assert_array_equal(history.validation[i], table[1 : taken + 1] + [np.inf] * (8 - taken))
        np.testing.assert_array_equal(history.loss[i], [-w for w in range(taken)] + [np.inf] * (8 - taken))
        assert history.skipped[i].tolist() == [0] * 8


def test_a_stopped_member_keeps_its_bits_while_others_go_on():
    """The turned sign makes validation worse from the first step on; else each step improves it."""
    optimizer = optax.sgd(0.1)
    options = {"num_steps": 4, "batch_size": SIZE, "validate_every": 1, "patience": 1}
    options["validation"] = (X, Y, jnp.ones(SIZE, bool))

    def turned(params, batch, key):
        return jnp.where(batch[2], 1, params["sign"]) * nll(params, batch[:2], key)

    @jax.jit
    @jax.vmap
    def train(sign, state):
        # A sign has a gradient too; it is put back before each run, and changes little in one.
        state = state._replace(params=state.params | {"sign": sign})
        return mle.run(turned, optimizer, state, (X, Y, jnp.zeros(SIZE, bool)), **options)

    signs = jnp.array([1.0, -1.0])
    first, history = train(signs, jax.vmap(lambda sign: start(optimizer, params=PARAMS | {"sign": sign}))(signs))
    later, after = train(signs, first)
    stopped = partial(jax.tree.map, lambda x: x[1])
    assert (first.step.tolist(), later.step.tolist()) == ([4, 2], [8, 2])
    assert_same_bits(stopped(later), stopped(first)._replace(params=stopped(first).params | {"sign": signs[1]}))
    assert np.isinf(history.loss).tolist() == [[False] * 4, [False] * 2 + [True] * 2]
    assert np.isinf(after.validation).tolist() == [[False] * 4, [True] * 4]


# Micro-batches


@pytest.mark.parametrize("micro_batches", [3, 12])
@pytest.mark.parametrize(
    "weights", [None, jnp.array([1.0, 0, 2, 0, 0, 0, 0.5, 1, 1, 1, 3, 0])], ids=["equal", "weights"]
)
def test_micro_batches_have_the_gradient_of_the_whole_batch(micro_batches, weights):
    """A part may hold no weight at all; SGD(1) tells the gradient."""
    optimizer = optax.sgd(1.0)
    batch = X[:12], Y[:12]
    whole, want = step(nll, optimizer, start(optimizer), batch, weights=weights)
    split, got = step(nll, optimizer, start(optimizer), batch, weights=weights, micro_batches=micro_batches)
    assert_close(split.params, whole.params, 16)
    assert_close(got, want, 16)


def test_so_it_is_for_the_short_batch_of_an_epoch():
    """The last 7 of 23 examples in batches of 8 lie in three parts and a half."""
    optimizer = OPTIMIZERS["sgd"]
    options = {"num_steps": 6, "batch_size": 8}
    whole, want = mle.run(nll, optimizer, start(optimizer), (X, Y), **options)
    split, got = mle.run(nll, optimizer, start(optimizer), (X, Y), **options, micro_batches=4)
    assert_close(split.params, whole.params, 6 * 16)
    assert_close(got[:3], want[:3], 6 * 64)


def test_micro_batches_are_summed_in_float32():
    """4096 gradients of 100 are 409 600, past float16; 4096 of 1 after one of 4096 are lost in bfloat16."""
    optimizer = optax.sgd(1.0)
    linear = lambda w, x, key: w * x  # noqa: E731
    for dtype, x in (("float16", np.full(4096, 100.0)), ("bfloat16", np.array([4096.0] + [1.0] * 4095))):
        state = start(optimizer, params=jnp.zeros((), dtype))
        got, _ = step(linear, optimizer, state, jnp.asarray(x, dtype), micro_batches=1024)
        want = jnp.asarray(-x.mean(), dtype)
        assert got.params == want
        assert got.params.dtype == dtype


def test_each_part_draws_numbers_of_its_own():
    draw = lambda w, x, key: jax.random.uniform(key, x.shape) + 0 * w  # noqa: E731
    optimizer = optax.sgd(1.0)
    state = start(optimizer, params=jnp.zeros(()))
    one, two = (mle.step(draw, optimizer, state, jnp.zeros(2), micro_batches=n)[1].loss for n in (1, 2))
    assert one != two


# Steps with something that is not finite are skipped


def spoilt(fault):
    """A loss per example that has this fault where x is 0."""
    return {
        "loss NaN": lambda w, x, key: w * x + jnp.where(x == 0, jnp.nan, 0),
        "loss inf": lambda w, x, key: w * x + jnp.where(x == 0, jnp.inf, 0),
        "loss -inf": lambda w, x, key: w * x + jnp.where(x == 0, -jnp.inf, 0),
        "gradient NaN": lambda w, x, key: jnp.sqrt(jnp.abs(w) * jnp.abs(x)) + w * x,  # 0 times the derivative at 0
        "gradient inf": lambda w, x, key: jnp.sqrt(jnp.where(x == 0, jnp.abs(w - 1), 1)) + w * x,
        "norm overflows": lambda w, x, key: jnp.where(x == 0, 1e30 * w, w * x),
    }[fault]


FAULTS = ["loss NaN", "loss inf", "loss -inf", "gradient NaN", "gradient inf", "norm overflows"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(fault):
    """Adam's count too stays where it was."""
    optimizer, options = OPTIMIZERS["adam"], {"ema_decay": 0.9}
    state = start(optimizer, params=jnp.ones(()))
    state, _ = mle.step(lambda w, x, key: 0 * w + x, optimizer, state, jnp.ones(2), **options)
    after, metrics = mle.step(spoilt(fault), optimizer, state, jnp.array([0.0, 2.0]), **options)
    assert metrics.skipped == 1
    assert np.isfinite(metrics.loss) == (not fault.startswith("loss"))
    assert not np.isfinite(metrics.loss + metrics.gradient_norm)
    kept = lambda state: (state.params, state.optimizer_state, state.average, state.key)  # noqa: E731
    assert_same_bits(kept(after), kept(state))
    assert (after.step, after.skipped) == (2, 1)


def test_so_does_an_update_that_is_not_finite():
    optimizer = optax.chain(OPTIMIZERS["adam"], optax.scale(np.inf))
    state = start(optimizer)
    after, metrics = step(nll, optimizer, state, (X, Y))
    assert_same_bits((after.params, after.optimizer_state), (state.params, state.optimizer_state))
    assert (metrics.skipped, np.isfinite(metrics.gradient_norm), np.isfinite(metrics.update_norm)) == (1, True, False)


@pytest.mark.parametrize("fault", ["loss NaN", "gradient NaN"])
def test_a_run_goes_on_after_what_is_not_finite(fault):
    """As if the example were not there: of 1 ... 4 and 0, in batches of one, Adam sees 1 ... 4."""
    optimizer, x = OPTIMIZERS["adam"], jnp.arange(5.0)
    state = start(optimizer, params=jnp.ones(()))
    after, history = mle.run(spoilt(fault), optimizer, state, x, num_steps=10, batch_size=1)
    assert (after.skipped, after.step, after.optimizer_state[0].count) == (2, 10, 8)
    assert history.skipped.sum() == 2
    # A row of both kinds is the mean of the sound steps; one of skipped steps alone shows what is not finite.
    _, rows = mle.run(spoilt(fault), optimizer, state, x, num_steps=10, batch_size=1, log_every=5)
    sound = np.where(history.skipped == 0, history.loss, 0).reshape(2, 5).sum(axis=1) / 4
    np.testing.assert_allclose(rows.loss, sound, rtol=16 * U)
    assert rows.skipped.tolist() == [1, 1]
    _, rows = mle.run(spoilt(fault), optimizer, state, x[:1], num_steps=4, batch_size=1, log_every=2)
    assert not np.isfinite(rows.loss + rows.gradient_norm).any()
    assert rows.skipped.tolist() == [2, 2]


# The average of the params


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_is_the_closed_form(decay):
    """The average of the params 1 ... n: sum d^(n - i) i / sum d^(n - i)."""
    n = 40
    state, _ = climb([0.0], n, validation=None, validate_every=None, ema_decay=decay)
    weights = decay ** np.arange(n - 1, -1.0, -1)
    want = np.average(np.arange(1.0, n + 1), weights=weights)
    # Each of n pulls towards a param rounds three times, and shrinks what was there.
    np.testing.assert_allclose(state.average.ema, want, rtol=3 * n * U)
    assert state.average.count == n


def test_the_average_of_bfloat16_is_kept_in_float32():
    """Steps of 2^-7 at 1, which bfloat16 has; means of them it has not."""
    optimizer = optax.sgd(2.0**-7)
    state = start(optimizer, params=jnp.ones((), jnp.bfloat16))
    down = lambda w, x, key: -w + x  # noqa: E731
    options = {"num_steps": 2, "batch_size": 1, "ema_decay": 0.5}
    state, _ = mle.run(down, optimizer, state, jnp.zeros(1, jnp.bfloat16), **options)
    want = 1 + (1 * 0.5 + 2) / 1.5 * 2.0**-7
    np.testing.assert_allclose(state.average.ema, want, rtol=6 * U)
    assert (state.average.ema.dtype, state.params.dtype) == (jnp.float32, jnp.bfloat16)


# The state, and the program


def test_the_state_is_one_pytree():
    """It comes back from its leaves and goes on."""
    optimizer = OPTIMIZERS["adam"]
    train = partial(mle.run, nll, optimizer, data=(X, Y), **ALL)
    state, _ = train(start(optimizer))
    leaves, treedef = jax.tree.flatten(state)
    again = jax.tree.unflatten(treedef, [x if x.dtype == state.key.dtype else np.asarray(x) for x in leaves])
    assert_same_bits(train(again)[0], train(state)[0])


def test_the_buffers_of_a_state_can_be_given_away():
    """None is in it twice, neither in the first state nor in one with an average and a best."""
    optimizer = OPTIMIZERS["adam"]
    train = partial(mle.run, nll, optimizer, data=(X, Y), **ALL)
    state = start(optimizer, params=jax.tree.map(jnp.copy, PARAMS))
    for _ in range(2):
        want = jax.block_until_ready(train(state)[0])
        got = jax.jit(lambda state: train(state)[0], donate_argnums=0)(state)
        assert all(x.is_deleted() for x in jax.tree.leaves(state))
        assert_same_bits(got, want)
        state = jax.tree.map(jnp.copy, got)


def test_there_is_one_trace_per_shape():
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(nll, n=1)
    optimizer, options = OPTIMIZERS["adam"], {"num_steps": 8, "batch_size": 4}
    state, _ = mle.run(counted, optimizer, start(optimizer, 0), (X, Y), **options)
    mle.run(counted, optimizer, start(optimizer, 1), (X + 1, Y), **options)
    mle.run(counted, optimizer, state, (X, Y), **options)


# Checks by jax itself


MODES = {
    "leaks": jax.checking_leaks,
    "reuse of keys": partial(jax.debug_key_reuse, True),
    "NaN": partial(jax.debug_nans, True),
    "no jit": jax.disable_jit,
}


@pytest.mark.parametrize("mode", MODES)
def test_step_and_run_pass_in_every_mode_of_jax(mode):
    """Also where patience ends, from one state twice, and with labels of numpy's int64."""
    optimizer, drawing = OPTIMIZERS["sgd"], nll if mode == "no jit" else noisy_nll
    options = {**VALIDATED, "num_steps": 4, "batch_size": 12, "patience": 1}
    options |= {"num_steps": 2, "validate_every": 2} if mode == "no jit" else {}
    data, weights = (np.asarray(X), np.asarray(Y, np.int64)), jnp.arange(12) < 10
    with MODES[mode]():
        batch = tuple(a[:12] for a in data)
        state, _ = step(drawing, optimizer, start(optimizer), batch, weights=weights, ema_decay=0.9)
        for _ in range(2 if mode == "reuse of keys" else 1):
            after, history = mle.run(drawing, optimizer, state, data, **options)
            chex.assert_tree_all_finite((after.params, history))
        if mode == "NaN":
            assert climb([1.0, 2.0, 3.0, 4.0], 3, patience=1)[1].validation.tolist() == [2.0, 3.0, np.inf]


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_keys_of_every_implementation_keep_the_laws(implementation):
    """Each epoch a permutation, pieces the whole, and a member of vmap the same as alone: in order and in keys."""
    optimizer, key = optax.sgd(0.0), jax.random.key(3, impl=implementation)
    keys = jax.random.split(key, 3)

    def tell(w, x, key):
        """The example's number, below 8, and some bits of the key."""
        return x + 8.0 * (jax.random.key_data(key)[0] % 2**18).astype(jnp.float32) + 0.0 * w

    @partial(jax.jit, static_argnums=1)
    def train(state, num_steps):
        state, history = mle.run(tell, optimizer, state, jnp.arange(7.0), num_steps=num_steps, batch_size=1)
        return state, history.loss

    begin = partial(mle.init, jnp.zeros(()), optimizer)
    together = np.asarray(jax.jit(jax.vmap(lambda key: train(begin(key), 14)[1]))(keys), int)
    for member, key in zip(together, keys, strict=True):
        state, first = train(begin(key), 5)
        assert np.concatenate([first, train(state, 9)[1]]).tolist() == member.tolist()
    assert (np.sort((together % 8).reshape(6, 7)) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in (together % 8).reshape(6, 7).tolist()}) == 6
    assert np.unique(together // 8).size == together.size


def test_the_checks_name_a_bad_label_inside_nll():
    optimizer, bad = OPTIMIZERS["sgd"], (X, Y.at[3].set(7))
    for train in (mle.step, partial(mle.run, num_steps=6, batch_size=4)):
        error, _ = jprob.checkify(train)(nll, optimizer, start(optimizer), bad)
        assert error.get().startswith("cross_entropy: label 7 is outside [0, 3)")


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_negative_weight_is_named_by_the_checks_and_skips_the_step(micro_batches):
    optimizer, weights = OPTIMIZERS["sgd"], jnp.array([1.0, -1.0, 2.0, 1.0])
    stepped = partial(mle.step, nll, optimizer, start(optimizer), (X[:4], Y[:4]), micro_batches=micro_batches)
    state, metrics = stepped(weights=weights)
    assert np.isnan(metrics.loss)
    assert metrics.skipped == 1
    assert_same_bits(state.params, PARAMS)
    error, _ = jprob.checkify(stepped)(weights=weights)
    assert error.get().startswith("step: weight -1.0 is negative")


# Faults


OTHER = start(optax.sgd(0.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "run: num_steps must be a whole number of at least 1, got 0"),
        pytest.param({"batch_size": 2.0}, "run: batch_size must be a whole number of at least 1, got 2.0",
                     marks=pytest.mark.wrong_types),
        ({"log_every": 0}, "run: log_every must be a whole number of at least 1, got 0"),
        ({"validate_every": -1}, "run: validate_every must be a whole number of at least 1, got -1"),
        ({"patience": 0}, "run: patience must be a whole number of at least 1, got 0"),
        ({"micro_batches": 0}, "run: micro_batches must be a whole number of at least 1, got 0"),
        ({"log_every": 4}, "run: num_steps must be a multiple of log_every = 4, got 6"),
        ({"validation": (X, Y), "validate_every": 4}, "run: num_steps must be a multiple of validate_every = 4, got 6"),
        ({"log_every": 2, "validation": (X, Y), "validate_every": 3},
         "run: validate_every must be a multiple of log_every = 2, got 3"),
        ({"micro_batches": 3}, "run: batch_size must be a multiple of micro_batches = 3, got 4"),
        ({"validation": (X, Y)}, "run: validation and validate_every must be given together, got validation alone"),
        ({"validate_every": 2}, "run: validation and validate_every must be given together, got validate_every alone"),
        ({"patience": 2}, "run: patience needs validation and validate_every, got neither"),
        ({"ema_decay": 1.0}, "run: ema_decay must lie between 0 and 1, got 1.0"),
        ({"validation": (X, Y[:5]), "validate_every": 3},
         "run: expected validation with one leading axis of examples, got shapes [(23, 5), (5,)]"),
        ({"data": (X, Y[:5])}, "run: expected data with one leading axis of examples, got shapes [(23, 5), (5,)]"),
        ({"data": map(int, "12")}, "run: data must be arrays with one leading axis of examples, got map"),
        ({"validation": map(int, "12"), "validate_every": 3},
         "run: validation must be arrays with one leading axis of examples, got map"),
        ({"data": ()}, "run: expected data with one leading axis of examples, got shapes []"),
        ({"data": (X[:0], Y[:0])}, "run: expected data with one leading axis of examples, got shapes [(0, 5), (0,)]"),
        ({"nll": lambda p, b, k: nll(p, b, k).mean()}, "run: nll must return one loss for each of 4 examples, or mle"),
        ({"nll": lambda p, b, k: b[1]}, "run: what nll returns must be a floating-point array, got int32[4]"),
        pytest.param({"state": PARAMS}, "run: state must be a State, as init gives it, got dict",
                     marks=pytest.mark.wrong_types),
        ({"state": OTHER}, "run: state.optimizer_state must be of this optimizer, PyTreeDef("),
        ({"state": start(OPTIMIZERS["sgd"])._replace(average=optax.EmaState(jnp.array(1), PARAMS))},
         "run: ema_decay must be given, since the state has an average, got None"),
    ],
)  # fmt: skip
def test_a_fault_says_what_was_expected(change, message):
    optimizer = OPTIMIZERS["sgd"]
    given = {"nll": nll, "state": start(optimizer), "data": (X, Y), "num_steps": 6, "batch_size": 4} | change
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        mle.run(given.pop("nll"), optimizer, given.pop("state"), given.pop("data"), **given)
    assert "\n" not in str(caught.value)


def test_init_says_what_it_expected():
    with pytest.raises(ValueError, match=re.escape("init: params['n'] must be a floating-point array, got int32[2]")):
        mle.init({"n": jnp.arange(2)}, optax.sgd(0.1), jax.random.key(0))


@pytest.mark.wrong_types
def test_a_key_of_old_is_refused_by_all():
    old, optimizer = jax.random.PRNGKey(3), OPTIMIZERS["sgd"]
    for function, call in {
        "init": lambda: mle.init(PARAMS, optimizer, old),
        "fit_full_batch": lambda: mle.fit_full_batch(nll, PARAMS, (X, Y), key=old),
        "covariance": lambda: mle.covariance(nll, PARAMS, (X, Y), key=old),
    }.items():
        message = f"{function}: key must be made by jax.random.key, got uint32[2]"
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_an_optimizer_that_changes_types_is_refused():
    widen = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, jax.tree.map(jnp.float32, s)))
    state = start(widen, params=jnp.ones(3, jnp.bfloat16))
    expected = "step: expected an optimizer state with bfloat16[3] at [2], the optimizer gave float32[3]"
    with pytest.raises(ValueError, match=re.escape(expected)):
        mle.step(lambda w, x, key: x * w[0], widen, state, jnp.ones(2, jnp.bfloat16))


# The richer protocol


def rich(params, batch, key, model_state):
    """Losses of two tokens an example, of which the second counts half; and how many batches there were."""
    y = batch[1]
    losses = jnp.stack([nll(params, batch, key), 2 * nll(params, batch, key)], axis=1)
    weights = jnp.array([[1.0, 0.5]]) * jnp.ones((len(y), 1))
    return mle.Output(losses, weights, {"right": losses > 1}, jax.tree.map(lambda n: n + 1, model_state))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_weights_metrics_and_model_state_of_an_output(micro_batches):
    optimizer, batch, weights = OPTIMIZERS["sgd"], (X[:4], Y[:4]), jnp.array([1.0, 3.0, 0.0, 2.0])
    state = mle.init(PARAMS, optimizer, jax.random.key(0), model_state={"batches": jnp.zeros((), jnp.int32)})
    after, metrics = mle.step(rich, optimizer, state, batch, weights=weights, micro_batches=micro_batches)
    losses = np.asarray(rich(PARAMS, batch, None, None).losses)
    w = np.asarray(weights)[:, None] * [1.0, 0.5]
    np.testing.assert_allclose(metrics.loss, np.sum(w * losses) / w.sum(), rtol=16 * U)
    np.testing.assert_allclose(metrics.metrics["right"], np.sum(w * (losses > 1)) / w.sum(), rtol=16 * U)
    assert metrics.weight == w.sum()
    assert after.model_state["batches"] == micro_batches
    # A row sums up by these weights, a skipped step leaves the model state, and members have their own.
    data = (X, Y.at[0].set(7))
    members = jax.vmap(lambda key: mle.run(rich, optimizer, state._replace(key=key), data, num_steps=6, batch_size=4))
    states, history = members(jax.random.split(jax.random.key(1), 2))
    assert (states.skipped == 1).all()
    assert states.model_state["batches"].tolist() == [5, 5]
    assert history.metrics["right"].shape == (2, 6)
    message = "run: micro_batches must divide each batch of a model with a state, got 2 for the 1 examples of the last"
    with pytest.raises(ValueError, match=message):
        mle.run(rich, optimizer, state, (X[:5], Y[:5]), num_steps=6, batch_size=4, micro_batches=2)


def test_validation_has_its_own_nll_and_the_best_follow_a_metric():
    def other(params, batch, key):
        losses = nll(params, batch, key)
        return mle.Output(losses + 1, metrics={"minus": -losses})

    optimizer = OPTIMIZERS["sgd"]
    options = {"num_steps": 12, "batch_size": 4, "validation": (X, Y), "validate_every": 3}
    by_loss, plain = mle.run(nll, optimizer, start(optimizer), (X, Y), **options)
    more = {"validation_nll": other, "monitor": "minus", "monitor_mode": "max"}
    by_metric, history = mle.run(nll, optimizer, start(optimizer), (X, Y), **options, **more)
    np.testing.assert_allclose(history.validation, plain.validation + 1, rtol=16 * U)
    np.testing.assert_allclose(history.validation_metrics["minus"], -plain.validation, rtol=16 * U)
    assert by_metric.best.step == by_loss.best.step
    np.testing.assert_allclose(by_metric.best.score, -by_loss.best.score, rtol=16 * U)
    with pytest.raises(ValueError, match="run: monitor must be one of loss, minus, got 'accuracy'"):
        mle.run(nll, optimizer, start(optimizer), (X, Y), **options, **more | {"monitor": "accuracy"})


def test_weights_of_examples_are_repetitions():
    """Whole batches, whose order does not matter: weight 2 is the example twice, weight 0 is none."""
    optimizer, weights = OPTIMIZERS["sgd"], np.arange(SIZE) % 3
    repeated = np.repeat(np.arange(SIZE), weights)
    x = X.at[0].set(jnp.nan)  # of weight 0
    got, history = mle.run(
        nll, optimizer, start(optimizer), (x, Y), weights=jnp.asarray(weights), num_steps=5, batch_size=SIZE
    )
    size = len(repeated)
    want, rows = mle.run(nll, optimizer, start(optimizer), (X[repeated], Y[repeated]), num_steps=5, batch_size=size)
    np.testing.assert_allclose(history.loss, rows.loss, rtol=64 * U)
    assert_close(got.params, want.params, 5 * 8)


def test_a_step_with_an_average_is_the_body_of_a_scan():
    optimizer = OPTIMIZERS["sgd"]
    state = mle.init(PARAMS, optimizer, jax.random.key(0), average=True)
    body = lambda state, batch: mle.step(nll, optimizer, state, batch, ema_decay=0.9)  # noqa: E731
    batches = jax.tree.map(lambda a: a[:20].reshape(5, 4, *a.shape[1:]), (X, Y))
    after, metrics = jax.lax.scan(body, state, batches)
    want = mle.init(PARAMS, optimizer, jax.random.key(0))
    for number in range(5):
        want, _ = mle.step(nll, optimizer, want, jax.tree.map(lambda a: a[number], batches), ema_decay=0.9)  # noqa: B023
    assert_close(after.average, want.average, 5 * 8)
    assert metrics.loss.shape == (5,)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((jnp.ones(4), {}), "step: nll must return one loss for each of 4 examples, or mle.Output, got tuple"),
        (jnp.ones(()), "step: nll must return one loss for each of 4 examples, or mle.Output, got float32[]"),
        (mle.Output(jnp.ones((3, 2))),
         "step: nll must return losses with the leading axis of 4 examples, got float32[3, 2]"),
        (mle.Output(jnp.ones(4), jnp.ones(3)), "step: weights must have the shape [4] of losses, got float32[3]"),
        (mle.Output(jnp.ones(4), metrics={"a": jnp.ones(2)}),
         "step: metrics['a'] must have the shape [4] of losses, got float32[2]"),
        (mle.Output(jnp.ones(4), metrics=[jnp.ones(4)]),
         "step: metrics of nll must be a dict from names to arrays, got list"),
        (mle.Output(jnp.ones(4), metrics={"a": {"b": jnp.ones(4)}}),
         "step: metrics of nll must be a dict from names to arrays, got dict"),
        (mle.Output(jnp.ones(4), model_state=jnp.ones(2)),
         "step: nll returned a model_state; give init one to start from"),
    ],
)  # fmt: skip
def test_what_nll_returns_is_told_in_one_line(returned, message):
    optimizer = OPTIMIZERS["sgd"]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        mle.step(lambda params, batch, key: returned, optimizer, start(optimizer), (X[:4], Y[:4]))
    assert "\n" not in str(caught.value).split("\n---")[0]
