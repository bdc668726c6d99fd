"""The laws of master weights: float32 training, whose params are rounded."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_loop import assert_same_bits, lenient

from jprob import mle

U = 2.0**-24
SIZE = 20_000
_rng = np.random.default_rng(0)
X = jnp.asarray(_rng.integers(-8, 9, (6, SIZE)) / 4, jnp.float32)  # gradients that bfloat16 has
W = jnp.asarray(_rng.normal(size=SIZE), jnp.float32)


def linear(params, x, key):
    """Its gradient is x, for any params."""
    return x.astype(params["w"].dtype) @ params["w"]


def train(optimizer, dtype, num_steps=6, **options):
    state = mle.init({"w": W.astype(dtype)}, optimizer, jax.random.key(0))
    return mle.run(linear, optimizer, state, X, num_steps=num_steps, batch_size=1, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_too_small_for_the_params_arrive(dtype):
    """A thousand of them, each a 64th of what would round to a change at 1."""
    small = float(jnp.finfo(dtype).eps) / 128
    down = lambda w, x, key: w * x  # noqa: E731
    arrived = []
    for optimizer in (optax.sgd(small), mle.master_weights(optax.sgd(small))):
        state = mle.init(jnp.ones((), dtype), optimizer, jax.random.key(0))
        state, _ = mle.run(down, optimizer, state, jnp.ones(1, dtype), num_steps=1000, batch_size=1)
        arrived.append(float(1 - state.params))
    assert arrived[0] == 0
    # The params are at most half their spacing below 1, eps / 4, from the copy.
    assert arrived[1] == pytest.approx(1000 * small, abs=32 * small)
    assert 1 - state.optimizer_state.params == pytest.approx(1000 * small, abs=1000 * U)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_steps", [1, 12])
def test_the_params_are_the_copy_rounded_bit_for_bit(num_steps, dtype):
    """Alone, and under `vmap` at rates below the rounding, as usual, and across zero."""
    once = jax.jit(lambda rate: train(mle.master_weights(lenient(optax.adam(rate))), dtype, num_steps)[0])
    for state in (once(jnp.array(0.1)), jax.jit(jax.vmap(once))(jnp.array([1e-4, 0.1, 3.0]))):
        assert state.params["w"].dtype == dtype
        assert_same_bits(state.params["w"], state.optimizer_state.params["w"].astype(dtype))


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), lenient(optax.adam(0.01))], ids=["sgd", "adam"])
def test_the_copy_is_trained_as_float32_params_are(optimizer):
    """The gradient does not depend on the params; the start is a number that bfloat16 has."""
    got, _ = train(mle.master_weights(optimizer), jnp.bfloat16)
    state = mle.init({"w": W.astype(jnp.bfloat16).astype(jnp.float32)}, optimizer, jax.random.key(0))
    want, _ = mle.run(linear, optimizer, state, X, num_steps=6, batch_size=1)
    copy = got.optimizer_state.params["w"]
    # Adding what leads there to the rounded params rounds once more a step, relative to the larger of both.
    np.testing.assert_allclose(copy, want.params["w"], rtol=0, atol=6 * 4 * U * float(jnp.abs(W).max()))


def test_params_in_float32_are_trained_as_they_are():
    with_copy, history = train(mle.master_weights(optax.sgd(0.1)), jnp.float32)
    without, want = train(optax.sgd(0.1), jnp.float32)
    for got, expected in ((with_copy.params["w"], without.params["w"]), (history.update_norm, want.update_norm)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=6 * 4 * U * float(jnp.abs(expected).max()))
    assert_same_bits(with_copy.params["w"], with_copy.optimizer_state.params["w"])


def test_a_skipped_step_leaves_the_copy_as_it_was():
    optimizer = mle.master_weights(lenient(optax.adam(0.1)))
    state, _ = train(optimizer, jnp.bfloat16, ema_decay=0.5)
    lost = lambda params, x, key: linear(params, x, key) + jnp.nan  # noqa: E731
    after, metrics = mle.step(lost, optimizer, state, X, ema_decay=0.5)
    assert metrics.skipped == 1
    kept = (state.params, state.optimizer_state, state.average)
    assert_same_bits((after.params, after.optimizer_state, after.average), kept)


def test_the_buffers_of_a_state_with_a_copy_can_be_given_away():
    """Also where the params are float32, as their copy is."""
    optimizer = mle.master_weights(optax.sgd(0.1, momentum=0.9))
    once = jax.jit(lambda state: mle.run(linear, optimizer, state, X, num_steps=1, batch_size=1)[0], donate_argnums=0)
    before = mle.init({"w": jnp.copy(W)}, optimizer, jax.random.key(0))
    for _ in range(2):
        after = once(before)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
        before = after


def test_an_update_without_params_says_what_it_expected():
    optimizer = mle.master_weights(optax.sgd(0.1))
    with pytest.raises(ValueError, match=re.escape("master_weights: update must be given the params, got None")):
        optimizer.update(W, optimizer.init(W))


def test_a_loss_scale_trains_what_float16_rounds_to_0():
    """A gradient of 2^-26 is below the smallest float16. The scale is taken off again in float32."""
    scale, params = 2.0**12, {"w": jnp.ones(1, jnp.float16)}

    def tiny(params, x, key):
        return x * params["w"][0].astype(jnp.float16) * jnp.float16(2.0**-13)

    def scaled(params, x, key):
        return (scale * tiny(params, x, key).astype(jnp.float32)).astype(jnp.float32)

    x = jnp.full(2, 2.0**-13, jnp.float16)
    plain = mle.master_weights(optax.sgd(2.0**20))
    lossless = mle.master_weights(optax.chain(optax.scale(1 / scale), optax.sgd(2.0**20)))
    lost, _ = mle.step(tiny, plain, mle.init(params, plain, jax.random.key(0)), x)
    kept, _ = mle.step(scaled, lossless, mle.init(params, lossless, jax.random.key(0)), x)
    assert lost.optimizer_state.params["w"][0] == 1
    assert kept.optimizer_state.params["w"][0] == 1 - 2.0**-6
