"""Killed at any moment and started again, `fit` ends with the bits of a run that was never touched.

A process kills itself before a given operation on files; until then no clock has a say in its work.
"""

import itertools
import multiprocessing
import os
import random
import signal
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jprob import mle
from jprob.mle import checkpoint

host = sys.modules["jprob.mle.fit"]

# Its processes are forked from one that has imported all this already: a start takes a tenth of the time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["jax", "numpy", "optax", "orbax.checkpoint", "jprob.mle.fit"])
_rng = np.random.default_rng(0)
X = np.asarray(_rng.normal(size=(23, 5)), np.float32)
Y = np.asarray(_rng.normal(size=23), np.float32)


class Batches:
    def __init__(self):
        self.number = 0

    def __iter__(self):
        while self.number < 57:
            self.number += 1
            rows = np.arange(4 * self.number, 4 * self.number + 4) % 23
            yield X[rows], Y[rows]
        self.number = 0

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, position):
        self.number = position["number"]


STEPS_OF_A_SAVE = 60  # three chunks, each from one validation to the next
KINDS = {"arrays": {"data": (X, Y), "log_every": 5}, "batches": {"data": Batches(), "log_every": 4}}


def nll(params, batch, key):
    x, y = batch
    noise = 0.1 * jax.random.uniform(key, y.shape)
    return jnp.square(x @ params["w"] + params["b"] + noise - y) / 2


def die_at(save, operation):
    """Kills this process before such an operation on files, counted from the begin of a save; 0 is the start of all."""
    begun, done, write = 0, 0, checkpoint._write

    def counted_write(*arguments):
        nonlocal begun
        begun += 1
        write(*arguments)

    def hook(event, _):
        nonlocal done
        if begun >= save and event.startswith(("open", "os.")):
            done += 1
            if done == operation + 1:  # to kill is an operation, too
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._write = counted_write
    sys.addaudithook(hook)


def train(kind, num_steps, folder, cache, ending, death=None):
    """Trains in a new process; the result is in the file `ending`, once it is there."""
    host.time = SimpleNamespace(monotonic=itertools.count().__next__)  # two ticks a chunk
    host._SECONDS_OF_A_CHUNK = 1e9
    if death:
        die_at(*death)
    for name, value in (("dir", cache), ("min_compile_time_secs", 0), ("min_entry_size_bytes", -1)):
        prefix = "jax_compilation_cache_" if name == "dir" else "jax_persistent_cache_"
        jax.config.update(prefix + name, value)
    errors = os.open(ending.with_suffix(".stderr"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, sys.stderr.fileno())
    result = mle.fit(
        nll,
        optax.sgd(1e-3, momentum=0.9),
        {"w": jnp.zeros(5), "b": jnp.zeros(())},
        key=jax.random.key(0),
        batch_size=4,
        validation=(X[:9], Y[:9]),
        ema_decay=0.99,
        checkpoint_dir=folder,
        num_steps=num_steps,
        validate_every=20,
        save_every_seconds=6,
        progress="none",
        **KINDS[kind],
    )
    state = result.state._replace(key=jax.random.key_data(result.state.key))
    with ending.with_suffix(".tmp").open("wb") as file:
        np.savez(file, *jax.tree.leaves((state, result.history)))
    ending.with_suffix(".tmp").replace(ending)


def names(folder):
    return {name for name in os.listdir(folder) if name.isdigit()} if folder.exists() else set()


def damage_the_newest(folder, rng):
    steps = sorted(map(int, names(folder)))
    if len(steps) > 1:
        path = rng.choice([path for path in sorted((folder / str(steps[-1])).rglob("*")) if path.is_file()])
        path.write_bytes(path.read_bytes()[: rng.choice([0, path.stat().st_size // 2])])


def moments(seed, kills):
    """Moments from the start on, with nothing to read at first, or in one of the first three saves."""
    rng = random.Random(seed)
    return [(rng.choice([0, 1, 2, 3]), rng.randrange(100)) for _ in range(kills)]


@pytest.mark.parametrize(
    ("kind", "deaths"),
    [
        ("arrays", [(3, 20), (0, 40)]),
        ("batches", [(3, 50)]),
        pytest.param("arrays", moments("arrays", 8), marks=pytest.mark.slow),
        pytest.param("batches", moments("batches", 9), marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(kind, deaths, tmp_path):
    rng, cache = random.Random(kind), os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    untouched, ending, folder = tmp_path / "untouched.npz", tmp_path / "ending.npz", tmp_path / "run"
    num_steps = (4 * len(deaths) + 2) * STEPS_OF_A_SAVE

    def child(*arguments):
        process = CONTEXT.Process(target=train, args=(kind, num_steps, *arguments))
        process.start()
        process.join()
        return process.exitcode

    assert child(None, cache, untouched) == 0
    for number, death in enumerate(deaths, 1):
        assert child(folder, cache, ending, death) == -signal.SIGKILL
        if number in (len(deaths) // 2, len(deaths)):
            damage_the_newest(folder, rng)
    assert child(folder, cache, ending) == 0
    told = ending.with_suffix(".stderr").read_text()
    with np.load(ending) as got, np.load(untouched) as want:
        assert len(got.files) == len(want.files)
        for name in want.files:
            assert got[name].dtype == want[name].dtype
            assert got[name].tobytes() == want[name].tobytes(), name
    assert "going on from step" in told
    assert "cannot be read" in told
    assert "Traceback" not in told
