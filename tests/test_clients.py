"""Real models trained by `mle`, compared with the same loop written by hand: dropout, batch norm, padding, a kill."""

from functools import partial

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jprob import categorical, mle
from jprob.mle import _order

SIZE, BATCH, STEPS, U = 32, 8, 24, 2.0**-24
_rng = np.random.default_rng(0)
X = jnp.asarray(_rng.normal(2.0, 3.0, (SIZE, 6)), jnp.float32)
Y = jnp.asarray(_rng.integers(0, 3, SIZE), jnp.int32)
KEY = jax.random.key(3)
ADAM = optax.adam(0.01)


class Network(nnx.Module):
    """Dense, batch norm, dropout, dense."""

    def __init__(self, rngs):
        self.hidden, self.norm = nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout, self.out = nnx.Dropout(0.5), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x))), rngs=rngs))


def flax_client():
    graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

    def nll(params, batch, key, model_state):
        model = nnx.merge(graph, params, model_state)
        model.train()
        losses = categorical.cross_entropy(model(batch[0], rngs=nnx.Rngs(key)), batch[1])
        return mle.Output(losses, model_state=nnx.state(model, nnx.Not(nnx.Param)))

    def evaluate(params, batch, key, model_state):
        model = nnx.merge(graph, params, model_state, copy=True)
        model.eval()
        logits = model(batch[0])
        return mle.Output(
            categorical.cross_entropy(logits, batch[1]), metrics={"accuracy": categorical.mode(logits) == batch[1]}
        )

    return params, rest, nll, evaluate


class Perceptron(eqx.Module):
    """The same in Equinox."""

    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear
    activation: callable

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.hidden, self.out = eqx.nn.Linear(6, 8, key=first), eqx.nn.Linear(8, 3, key=second)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.dropout, self.activation = eqx.nn.Dropout(0.5), jax.nn.relu

    def __call__(self, x, state, key=None):
        x, state = self.norm(self.hidden(x), state)
        return self.out(self.dropout(self.activation(x), key=key)), state


def equinox_client():
    model, state = eqx.nn.make_with_state(Perceptron)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    arrays, rest = eqx.partition(state, eqx.is_array)

    def logits(params, x, model_state, keys, inference):
        model = eqx.nn.inference_mode(eqx.combine(params, static), inference)
        state = eqx.combine(model_state, rest)
        keyed = 0 if keys is not None else None
        z, state = jax.vmap(model, (0, None, keyed), (0, None), axis_name="batch")(x, state, keys)
        return z, eqx.filter(state, eqx.is_array)

    def nll(params, batch, key, model_state):
        keys = jax.random.split(key, len(batch[1]))
        z, model_state = logits(params, batch[0], model_state, keys, False)
        return mle.Output(categorical.cross_entropy(z, batch[1]), model_state=model_state)

    def evaluate(params, batch, key, model_state):
        z, _ = logits(params, batch[0], model_state, None, True)
        accuracy = categorical.mode(z) == batch[1]
        return mle.Output(categorical.cross_entropy(z, batch[1]), metrics={"accuracy": accuracy})

    return params, arrays, nll, evaluate


CLIENTS = {"flax": flax_client, "equinox": equinox_client}


@pytest.fixture(autouse=True)
def _promotion_as_usual():
    """Flax, Equinox and optax's adam fail by themselves under strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def batch_at(step):
    rows = np.arange(BATCH * step, BATCH * (step + 1)) % SIZE
    return X[rows], Y[rows]


def by_hand(params, model_state, nll, num_steps):
    """The loop that a user writes with optax."""
    optimizer_state, losses = ADAM.init(params), []

    @jax.jit
    def step(params, model_state, optimizer_state, batch, number):
        key = jax.random.fold_in(jax.random.split(KEY)[1], number)

        def objective(params):
            out = nll(params, batch, key, jax.tree.map(lambda x: x, model_state))  # Flax asks for new containers
            return jnp.mean(out.losses), out.model_state

        (loss, model_state), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, optimizer_state = ADAM.update(gradient, optimizer_state)
        return optax.apply_updates(params, updates), model_state, optimizer_state, loss

    for number in range(num_steps):
        params, model_state, optimizer_state, loss = step(
            params, model_state, optimizer_state, batch_at(number), jnp.int32(number)
        )
        losses.append(loss)
    return params, model_state, jnp.stack(losses)


class StopError(Exception):
    """A source that fails."""


@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_a_model_with_dropout_and_batch_norm_is_trained_as_by_hand_through_a_failure(client, tmp_path):
    params, model_state, nll, evaluate = client()
    want = by_hand(params, model_state, nll, STEPS)
    options = {
        "num_steps": STEPS, "batch_size": BATCH, "model_state": model_state, "validation": (X, Y), "progress": "none",
        "validate_every": 8, "validation_nll": evaluate, "checkpoint_dir": tmp_path,
    }  # fmt: skip
    fit = partial(mle.fit, nll, ADAM, params)

    def failing(step):
        if step == 13:
            raise StopError
        return batch_at(step)

    with pytest.raises(RuntimeError, match=r"fit: data\(13\) failed: StopError: , at step \d+ of 24; saved in "):
        fit(failing, KEY, **options)
    state, history, *_ = fit(batch_at, KEY, **options)
    # Each step rounds its params once; Adam divides a gradient by its own size, and passes on its relative error.
    chex.assert_trees_all_close(history.loss, want[2], rtol=64 * STEPS * U)
    close = partial(chex.assert_trees_all_close, rtol=0, atol=64 * STEPS * U)
    close(state.params, want[0])
    close(state.model_state, want[1])
    # Dropout is off and the running statistics are in use where it is validated.
    out = evaluate(state.params, (X, Y), KEY, state.model_state)
    chex.assert_trees_all_close(history.validation[-1], jnp.mean(out.losses), rtol=16 * U)
    accuracy = jnp.mean(out.metrics["accuracy"].astype(jnp.float32))
    chex.assert_trees_all_close(history.validation_metrics["accuracy"][-1], accuracy, rtol=16 * U)
    loaded = mle.load_params(tmp_path, params, "last", model_state=model_state)
    chex.assert_trees_all_equal(loaded, (state.params, state.model_state))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_token_mean_over_padded_sequences_is_exact_for_any_split(micro_batches):
    """Against the mean over all tokens of the batch, differentiated as a whole."""
    lengths = np.arange(1, 9)
    tokens = jnp.asarray(_rng.integers(0, 5, (8, 9)), jnp.int32)
    labels = jnp.where(np.arange(8) < lengths[:, None], tokens[:, 1:], -100)

    def nll(params, batch, key):
        tokens, labels = batch
        losses = categorical.cross_entropy(params["embed"][tokens[:, :-1]] @ params["out"], labels)
        return mle.Output(losses, weights=labels >= 0, metrics={"losses": losses})

    params = {
        "embed": jax.random.normal(jax.random.key(0), (5, 4)),
        "out": jax.random.normal(jax.random.key(1), (4, 5)),
    }

    def objective(params):
        losses = nll(params, (tokens, labels), KEY).losses
        return jnp.sum(jnp.where(labels >= 0, losses, 0)) / jnp.sum(labels >= 0)

    want, gradient = jax.value_and_grad(objective)(params)
    sgd = optax.sgd(1.0)
    after, metrics = mle.step(nll, sgd, mle.init(params, sgd, KEY), (tokens, labels), micro_batches=micro_batches)
    chex.assert_trees_all_close((metrics.loss, metrics.metrics["losses"]), (want, want), rtol=16 * U)
    assert metrics.weight == lengths.sum()
    chex.assert_trees_all_close(after.params, jax.tree.map(jnp.subtract, params, gradient), rtol=0, atol=32 * U)


def test_a_flax_module_that_is_closed_over_is_told_in_one_line():
    model = Network(nnx.Rngs(0))

    def nll(params, batch, key):
        return categorical.cross_entropy(model(batch[0], rngs=nnx.Rngs(key)), batch[1]) + 0 * params

    with pytest.raises(ValueError, match=r"step: nll changes a Flax module that it closes over; pass it by nnx.split"):
        mle.step(nll, ADAM, mle.init(jnp.zeros(()), ADAM, KEY), (X, Y))
    with pytest.raises(
        ValueError, match=r"init: params.norm.axis_name must be a floating-point array, got str; see eqx."
    ):
        mle.init(eqx.nn.make_with_state(Perceptron)(jax.random.key(0))[0], ADAM, KEY)


@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_batch_norm_sees_no_filler_in_a_short_batch(client):
    """An epoch has 8, 8 and 4 examples. The order is that of the run, and the truth a loop by hand."""
    params, model_state, nll, _ = client()
    data = X[:20], Y[:20]
    state, history = mle.run(
        nll, ADAM, mle.init(params, ADAM, KEY, model_state=model_state), data, num_steps=3, batch_size=8
    )
    order = _order.batches(KEY, jnp.int32(0), 20, 3, 8)
    want = mle.init(params, ADAM, KEY, model_state=model_state)
    for row in order:
        row = row[row < 20]
        want, metrics = mle.step(nll, ADAM, want, (X[row], Y[row]))
    chex.assert_trees_all_close(state.model_state, want.model_state, rtol=0, atol=64 * 3 * U)
    chex.assert_trees_all_close(history.loss[-1], metrics.loss, rtol=64 * 3 * U)
