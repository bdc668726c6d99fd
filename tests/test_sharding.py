"""Placement is all there is to it: data, params or seeds spread over a mesh train as on one device, to rounding.

The mesh is that of `jax.make_mesh`, with explicit axes, or one with automatic axes: no law knows of the difference.
"""

import re
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jprob import mle

host = sys.modules["jprob.mle.fit"]

SIZE, FEATURES, HIDDEN = 48, 8, 16
_rng = np.random.default_rng(0)
X = np.asarray(_rng.normal(size=(SIZE, FEATURES)), np.float32)
Y = np.asarray(_rng.normal(size=SIZE), np.float32)
PARAMS = {
    "kernel": np.asarray(_rng.normal(size=(FEATURES, HIDDEN)) / 3, np.float32),
    "bias": np.zeros(HIDDEN, np.float32),
    "out": np.asarray(_rng.normal(size=HIDDEN) / 4, np.float32),
}


def lenient(optimizer):
    """optax's adam multiplies numbers of two dtypes, which strict promotion refuses: its update alone is free of it."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


# An epsilon of 1 makes an update err no more than its gradient. A usual one divides a gradient near 0 by its size.
ADAM = lenient(optax.adam(0.1, eps=1.0))
OPTIONS = {"num_steps": 12, "batch_size": 16}
VALIDATED = {"validate_every": 6, "ema_decay": 0.9}
AUTOMATIC = (AxisType.Auto,)
ROWS, COLUMNS = {"kernel": ("d",), "out": ("d",)}, {"kernel": (None, "d"), "out": ("d",)}


@pytest.fixture(autouse=True)
def _chunks_of_one_row(monkeypatch):
    """So that a fit compiles one program, and begins a chunk at each step."""
    monkeypatch.setattr(host, "_SECONDS_OF_A_CHUNK", 0.0)


def nll(params, batch, key):
    x, y = batch
    return jnp.square(jnp.tanh(x @ params["kernel"] + params["bias"][None]) @ params["out"] - y) / 2


@cache
def mesh(axis_types=None):
    return jax.make_mesh((jax.device_count(),), ("d",), axis_types)


def spread(tree, *axes, axis_types=None):
    return jax.device_put(tree, NamedSharding(mesh(axis_types), PartitionSpec(*axes)))


def placed(axes, axis_types=None):
    return {name: spread(leaf, *axes.get(name, ()), axis_types=axis_types) for name, leaf in PARAMS.items()}


def places(tree):
    return jax.tree.map(lambda x: (x.sharding, x.committed), tree)


def assert_same_places(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.sharding.mesh == w.sharding.mesh
        assert g.sharding.is_equivalent_to(w.sharding, g.ndim)


def ran(params, data, nll=nll, **options):
    return mle.run(nll, ADAM, mle.init(params, ADAM, jax.random.key(7)), data, **(OPTIONS | options))


def fitted(params, data, nll=nll, **options):
    return mle.fit(nll, ADAM, params, data, jax.random.key(7), **(OPTIONS | {"progress": "none"} | options))


@cache
def on_one_device():
    return ran(PARAMS, (X, Y), validation=(X[:16], Y[:16]), **VALIDATED)


def arrays(tree):
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]


def assert_close(got, want):
    """A gradient errs by the roundings of sums over 16 examples and 16 features, 32 of its size. A tenth of that comes
    to the params at each step, with one rounding of their own: in 12 steps less than 60."""
    for g, w in zip(arrays(got), arrays(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=60 * 2.0**-24 * float(np.abs(w).max(initial=0)))


def assert_same_bits(got, want):
    for g, w in zip(arrays(got), arrays(want), strict=True):
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


@pytest.mark.parametrize(
    ("axes", "train", "axis_types"),
    [({}, ran, None), (COLUMNS, ran, AUTOMATIC), (COLUMNS, ran, None), (ROWS, fitted, AUTOMATIC), (ROWS, fitted, None)],
)
def test_spread_over_a_mesh_it_is_the_same_and_all_stays_where_it_was(axes, train, axis_types):
    seen = []

    def watched(params, batch, key):
        assert AxisType.Explicit not in jax.typeof(batch[0]).sharding.mesh.axis_types
        jax.debug.inspect_array_sharding(batch[0], callback=seen.append)
        return nll(params, batch, key)

    params = placed(axes, axis_types)
    data, validation = spread(((X, Y), (X[:16], Y[:16])), "d", axis_types=axis_types)
    state, history = train(params, data, watched, validation=validation, **VALIDATED)[:2]
    assert_close((state, history), on_one_device())
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(state)} == {mesh(axis_types)}
    before = mle.init(params, ADAM, jax.random.key(7)).optimizer_state[0]
    assert places(state.params) == places(state.average.ema) == places(state.best.params) == places(params)
    assert places((state.optimizer_state[0].mu, state.optimizer_state[0].nu)) == places((before.mu, before.nu))
    # No device takes more than its share of a batch, be it to train or to validate.
    assert len(seen) == 2
    assert {sharding.shard_shape((16, FEATURES)) for sharding in seen} == {(2, FEATURES)}


def test_each_part_of_a_batch_is_spread_as_the_batch_is():
    """No device takes more than its share of the examples of a part through the hidden layer."""
    micro_batches = 2
    batch = spread((X[:32], Y[:32]), "d", axis_types=AUTOMATIC)
    state = mle.init(placed({}, AUTOMATIC), ADAM, jax.random.key(7))
    stepped = jax.jit(lambda state, batch: mle.step(nll, ADAM, state, batch, micro_batches=micro_batches))
    program = stepped.lower(state, batch).compile().as_text()
    hidden = re.findall(rf" f32\[(\d+),{HIDDEN}\]\S* dot\(", program)
    assert max(map(int, hidden)) == 32 // micro_batches // jax.device_count()


def test_a_batch_that_the_devices_cannot_share_is_trained_on_all_the_same():
    """Batches of 10, the last of 48 examples short, in two parts."""
    options = {"batch_size": 10, "micro_batches": 2}
    got, want = (ran(params, data, **options) for params, data in
                 [(placed(ROWS), spread((X, Y), "d")), (PARAMS, (X, Y))])  # fmt: skip
    assert_close(got, want)
    assert places(got[0].params) == places(placed(ROWS))


def test_seeds_spread_over_a_mesh_are_the_same_members():
    train = jax.vmap(lambda key: mle.run(nll, ADAM, mle.init(PARAMS, ADAM, key), (X, Y), num_steps=12, batch_size=16))
    keys = jax.random.split(jax.random.key(7), 16)
    got, want = train(spread(keys, "d")), train(keys)
    assert_close(got, want)
    share = NamedSharding(mesh(), PartitionSpec("d"))
    for leaf in jax.tree.leaves((got[0].params, got[0].optimizer_state, got[1].loss)):
        assert leaf.sharding.is_equivalent_to(share, leaf.ndim)
        assert leaf.sharding.mesh == share.mesh


def test_batches_made_in_place_are_trained_on_in_place():
    def batch_at(step, put=lambda batch: spread(batch, "d")):
        rows = (np.arange(16) + 16 * step) % SIZE
        return put((X[rows], Y[rows]))

    got = fitted(placed(COLUMNS), batch_at)
    want = fitted(PARAMS, lambda step: batch_at(step, lambda batch: batch))
    assert_close(got[:2], want[:2])
    assert places(got.state.params) == places(placed(COLUMNS))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(fitted(PARAMS, batch_at).state)} == {mesh()}


class Computing:
    """Batches made by arithmetic on a mesh with explicit axes, as is all that its position goes through."""

    def __init__(self):
        self.step = spread(np.int32(0))

    def __iter__(self):
        while True:
            self.step = self.step + 1
            rows = (np.arange(16) + 16 * int(self.step)) % SIZE
            yield jax.tree.map(lambda x: 1 * x, spread((X[rows], Y[rows]), "d"))

    def state_dict(self):
        return {"step": int(1 * self.step)}

    def load_state_dict(self, position):
        self.step = position["step"] * spread(np.int32(1))


def test_batches_may_be_computed_on_a_mesh_with_explicit_axes(tmp_path):
    want = fitted(placed(COLUMNS), Computing())
    fitted(placed(COLUMNS), Computing(), num_steps=6, checkpoint_dir=tmp_path)
    assert_same_bits(fitted(placed(COLUMNS), Computing(), checkpoint_dir=tmp_path)[:2], want[:2])
    batches = iter(Computing())
    assert_same_bits(fitted(placed(COLUMNS), lambda step: next(batches))[:2], want[:2])


@pytest.mark.parametrize("where", ["a mesh", "data on a device", "params on a device"])
def test_chunks_of_one_length_are_one_program_though_they_begin_elsewhere(where, caplog):
    """After the first, all of the state was placed; before, only what the caller had."""
    params, data = {
        "a mesh": lambda: (placed(COLUMNS), spread((X, Y), "d")),
        "data on a device": lambda: (PARAMS, jax.device_put((X, Y), jax.devices()[0])),
        "params on a device": lambda: (jax.device_put(PARAMS, jax.devices()[3]), (X, Y)),
    }[where]()
    with jax.log_compiles():
        fitted(params, data, lambda params, batch, key: nll(params, batch, key))
    assert sum(record.getMessage().startswith("Compiling jit(_rows)") for record in caplog.records) == 1


def test_fit_trains_on_the_device_where_data_lie():
    device = jax.devices()[3]
    state = fitted(PARAMS, jax.device_put((X, Y), device)).state
    assert {x.device for x in arrays(state)} == {device}


@pytest.mark.parametrize("first", ["one device", "a mesh"])
def test_a_checkpoint_goes_on_where_the_next_run_places_it(first, tmp_path):
    cases = {"one device": (PARAMS, (X, Y)), "a mesh": (placed(COLUMNS), spread((X, Y), "d"))}
    saved = fitted(*cases.pop(first), checkpoint_dir=tmp_path).state
    (other,) = cases.values()
    untouched = fitted(*other, checkpoint_dir=tmp_path).state
    assert_same_bits(untouched, saved)
    assert places(untouched.params) == places(mle.init(other[0], ADAM, jax.random.key(7)).params)
    longer = fitted(*other, checkpoint_dir=tmp_path, num_steps=24)
    assert_close(longer[:2], fitted(*other, num_steps=24)[:2])
    assert places(longer.state.params) == places(untouched.params)


def test_one_step_stays_where_it_was():
    """Half of the examples count, in two parts."""
    weights = jnp.arange(SIZE) % 2

    @jax.jit
    def stepped(params, data, weights):
        return mle.step(nll, ADAM, mle.init(params, ADAM, jax.random.key(7)), data, weights=weights, micro_batches=2)

    got, want = stepped(placed(COLUMNS), *spread(((X, Y), weights), "d")), stepped(PARAMS, (X, Y), weights)
    assert_close(got, want)
    assert_same_places(got[0].params, placed(COLUMNS))


def test_what_was_traced_with_explicit_axes_has_them_still():
    """They have them in the caller's program, and if all that is made lies on a mesh."""
    trained = jax.jit(lambda params, data: ran(params, data, validation=data, **VALIDATED))
    with jax.set_mesh(mesh()):
        state, history = trained(placed(COLUMNS), spread((X, Y), "d"))
    assert_close((state, history), ran(PARAMS, (X, Y), validation=(X, Y), **VALIDATED))
    for tree in (state.params, state.average.ema, state.best.params, state.optimizer_state[0].mu):
        assert_same_places(tree, placed(COLUMNS))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves((state, history))} == {mesh()}


def test_full_batches_spread_over_a_mesh_are_fitted_as_they_are_on_one_device():
    """Each fit ends within tolerance / curvature of the optimum. The test sees 60 roundings.

    The covariance errs by the condition of the Hessian, 9, times the roundings of sums over 48 examples.
    """

    def linear(params, batch, key):
        return jnp.square(batch[0] @ params - batch[1]) / 2

    start, tolerance, data = np.zeros(FEATURES, np.float32), 1e-6, spread((X, Y), "d")
    want = mle.fit_full_batch(linear, start, (X, Y), gradient_tolerance=tolerance)
    got = mle.fit_full_batch(linear, spread(start, "d"), data, gradient_tolerance=tolerance)
    assert want.converged
    assert got.converged
    least, *_, most = np.linalg.eigvalsh(X.T @ X / SIZE)
    assert most / least < 9
    np.testing.assert_allclose(got.params, want.params, rtol=0, atol=2 * tolerance / least)
    covariances = [mle.covariance(linear, want.params, d, kind="sandwich") for d in (data, (X, Y))]
    assert_close(*covariances)


def test_a_key_on_the_mesh_draws_the_same_numbers():
    """The noise does not reach the Hessian, so that the covariance errs as it does without."""

    def noisy(params, batch, key):
        return jnp.square(batch[0] @ params - batch[1] + jax.random.normal(key, batch[1].shape)) / 2

    start, key = np.zeros(FEATURES, np.float32), jax.random.key(3)
    assert mle.fit_full_batch(noisy, start, (X, Y), key=spread(key)).converged
    want = mle.covariance(noisy, start, (X, Y), kind="sandwich", key=key)
    for data in ((X, Y), spread((X, Y), "d")):
        assert_close(mle.covariance(noisy, start, data, kind="sandwich", key=spread(key)), want)


def test_weights_may_lie_on_the_mesh_alone():
    weights, state = jnp.arange(SIZE) % 2, mle.init(PARAMS, ADAM, jax.random.key(7))
    got, want = (mle.step(nll, ADAM, state, (X, Y), weights=w) for w in (spread(weights, "d"), weights))
    assert_close(got, want)


def test_a_number_on_the_mesh_among_the_data_is_told_from_examples():
    with pytest.raises(ValueError, match="run: expected data with one leading axis of examples"):
        ran(PARAMS, (spread(X, "d"), spread(np.float32(1))))
