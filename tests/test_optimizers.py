"""Every optimizer of optax trains in `run` and `fit`: what it asks for it gets, and its state keeps its types."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jprob import mle

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)
PARAMS = {"w": jnp.full((4, 3), 0.3), "b": jnp.zeros(3)}
KEY = jax.random.key(1)


# Two that combine others.
EXCEPT = ("chain", "named_chain")


def nll(params, batch, key):
    return jnp.sum((batch @ params["w"] + params["b"][None] - 1) ** 2, -1)


def optimizers():
    """Those that need nothing but a learning rate."""
    for module in (optax, contrib):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith(("scale_by", "_")) or "GradientTransformation" not in str(inspect.signature(function)):
                continue
            required = [
                parameter.name
                for parameter in inspect.signature(function).parameters.values()
                if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            ]
            if required in ([], ["learning_rate"]) and name not in EXCEPT:
                yield pytest.param(function, {"learning_rate": 0.05} if required else {}, id=name)


@pytest.mark.filterwarnings("ignore")  # some are deprecated, and trained all the same
@pytest.mark.parametrize(("optimizer", "options"), [*optimizers()])
def test_it_is_traced(optimizer, options):
    with jax.numpy_dtype_promotion("standard"):  # adam and others of optax fail under strict promotion
        state = mle.init(PARAMS, optimizer(**options), KEY)
        run = lambda state: mle.run(nll, optimizer(**options), state, X, num_steps=2, batch_size=8)  # noqa: E731
        after, history = jax.eval_shape(run, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert history.loss.shape == (2,)


ASKING = {
    "value": optax.polyak_sgd(),
    "value of momo": contrib.momo(),
    "value_fn": optax.lbfgs(),
    "value of a chain": optax.chain(optax.sgd(0.05), contrib.reduce_on_plateau(patience=1)),
    "grad_fn": contrib.sam(
        optax.sgd(0.05), optax.chain(contrib.normalize(), optax.sgd(0.05)), opaque_mode=True, sync_period=2
    ),
    "obj_fn": contrib.sophia(0.05),
    "its own average": contrib.schedule_free_sgd(0.05),
}


@pytest.mark.parametrize("name", ASKING)
def test_what_an_optimizer_asks_for_it_gets(name):
    """The loss falls, and the same steps by hand give the same params."""
    optimizer, rows = ASKING[name], np.arange(16).reshape(2, 8)
    value = lambda params, batch: jnp.mean(nll(params, batch, None))  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        state, params = mle.init(PARAMS, optimizer, KEY), PARAMS
        optimizer_state = optimizer.init(PARAMS)
        for row in rows:
            state, metrics = mle.step(nll, optimizer, state, X[row])
            loss, gradient = jax.value_and_grad(value)(params, X[row])
            if name == "grad_fn":
                extra = {"grad_fn": lambda params, _: jax.grad(value)(params, X[row])}  # noqa: B023
            elif name == "obj_fn":
                extra = {"obj_fn": lambda params: value(params, X[row])}  # noqa: B023
            else:
                extra = {"value": loss, "grad": gradient, "value_fn": lambda params: value(params, X[row])}  # noqa: B023
            updates, optimizer_state = optax.with_extra_args_support(optimizer).update(
                gradient, optimizer_state, params, **extra
            )
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(metrics.loss, loss, rtol=64 * 2.0**-24)
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        # A line search and a quotient of gradients amplify the rounding of both.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e4 * 2.0**-24 * float(jnp.abs(want).max()))


def test_a_lookahead_trains_its_fast_params_and_is_scored_by_the_slow_ones():
    optimizer = optax.lookahead(optax.sgd(0.05), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    options = {"num_steps": 8, "batch_size": 8, "validation": X, "validate_every": 8}
    with jax.numpy_dtype_promotion("standard"):
        state, history = mle.run(nll, optimizer, mle.init(params, optimizer, KEY), X, **options)
    assert history.loss[-1] < history.loss[0]
    want = jnp.mean(nll(state.params.slow, X, None))
    np.testing.assert_allclose(history.validation[-1], want, rtol=64 * 2.0**-24)
    assert jax.tree.structure(state.best.params) == jax.tree.structure(PARAMS)


def test_schedule_free_is_scored_where_it_evaluates():
    optimizer = contrib.schedule_free_sgd(0.05)
    evaluated = lambda state: contrib.schedule_free_eval_params(state.optimizer_state, state.params)  # noqa: E731
    options = {"num_steps": 8, "batch_size": 8, "validation": X, "validate_every": 8, "evaluation_params": evaluated}
    with jax.numpy_dtype_promotion("standard"):
        state, history = mle.run(nll, optimizer, mle.init(PARAMS, optimizer, KEY), X, **options)
        want = jnp.mean(nll(evaluated(state), X, None))
    np.testing.assert_allclose(history.validation[-1], want, rtol=64 * 2.0**-24)


def test_injected_learning_rates_are_vmapped_without_retracing_or_leaking():
    traces = []

    def counted(params, batch, key):
        traces.append(batch.shape)
        return nll(params, batch, key)

    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)

    @jax.jit
    @jax.vmap
    def train(rate, key):
        state = optax.tree.set(mle.init(PARAMS, optimizer, key), learning_rate=rate)
        return mle.run(counted, optimizer, state, X, num_steps=4, batch_size=8)

    rates, keys = jnp.array([0.01, 0.05]), jax.random.split(KEY)
    with jax.numpy_dtype_promotion("standard"), jax.checking_leaks():
        together, _ = train(rates, keys)
        before = len(traces)
        train(rates * 2, keys)
        assert len(traces) == before
        sgd = optax.sgd(0.05)
        alone, _ = mle.run(nll, sgd, mle.init(PARAMS, sgd, keys[1]), X, num_steps=4, batch_size=8)
    np.testing.assert_allclose(together.params["w"][1], alone.params["w"], rtol=0, atol=64 * 2.0**-24)


@pytest.mark.wrong_types
def test_what_no_optimizer_may_be_or_ask_for_is_told_in_one_line():
    def update(updates, state, params=None, *, temperature):
        return updates, state

    steps = optax.MultiSteps(optax.sgd(0.1), 2)
    asking = optax.GradientTransformationExtraArgs(lambda params: (), update)
    for optimizer, message in [
        (
            steps,
            "step: optimizer must be an optax gradient transformation, got MultiSteps; pass its gradient_transformat",
        ),
        (asking, "step: optimizer asks for what a step does not have: "),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            mle.step(nll, optimizer, mle.init(PARAMS, optimizer, KEY), X)
        assert "\n" not in str(caught.value).split("\n---")[0]
    with jax.numpy_dtype_promotion("standard"):
        mle.step(nll, steps.gradient_transformation(), mle.init(PARAMS, steps.gradient_transformation(), KEY), X)
