"""Killed at any moment and started again, `fit` ends with the bits of a run that was never touched."""

import multiprocessing
import os
import random
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jprob.mle import driver

# Its processes are forked from one that has imported all this already: a start takes a tenth of the time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["jax", "numpy", "optax", "orbax.checkpoint", "jprob.mle.driver"])
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


KINDS = {
    "arrays": {"data": (X, Y), "num_steps": 400_000, "record_every": 40, "validate_every": 2000},
    "batches": {"data": Batches(), "num_steps": 3000, "record_every": 4, "validate_every": 20},
}


def nll(params, batch, key):
    x, y = batch
    noise = 0.1 * jax.random.uniform(key, y.shape)
    return jnp.square(x @ params["w"] + params["b"] + noise - y) / 2


def train(kind, folder, cache, ending, save_every_seconds=60.0):
    """In a process of its own; what it comes to is in the file `ending`, once it is there."""
    driver._SECONDS_OF_A_CHUNK = 0.02  # edges and checkpoints all the time, rather than between long chunks
    for name, value in (("dir", cache), ("min_compile_time_secs", 0), ("min_entry_size_bytes", -1)):
        prefix = "jax_compilation_cache_" if name == "dir" else "jax_persistent_cache_"
        jax.config.update(prefix + name, value)
    errors = os.open(ending.with_suffix(".stderr"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, sys.stderr.fileno())
    result = driver.fit(
        nll,
        optax.adam(1e-3),
        {"w": jnp.zeros(5), "b": jnp.zeros(())},
        key=jax.random.key(0),
        batch_size=4,
        validation=(X[:9], Y[:9]),
        average_decay=0.99,
        checkpoint_dir=folder,
        save_every_seconds=save_every_seconds,
        progress="none",
        **KINDS[kind],
    )
    state = result.state._replace(key=jax.random.key_data(result.state.key))
    with ending.with_suffix(".tmp").open("wb") as file:
        np.savez(file, *jax.tree.leaves((state, result.history)))
    ending.with_suffix(".tmp").replace(ending)


def killed_at_random(process, folder, rng):
    """Whether it was killed: as a rule after it wrote for some time, else at any moment from its start on."""
    before = names(folder)
    process.start()
    wanted = rng.choice([0, 1, 2, 3, 4])
    while process.is_alive() and len(names(folder) - before) < wanted:
        time.sleep(0.002)
    process.join(rng.uniform(0, 0.2 if wanted else 1.0))
    process.kill()
    process.join()
    return process.exitcode != 0


def names(folder):
    return {name for name in os.listdir(folder) if name.isdigit()} if folder.exists() else set()


def damage_the_newest(folder, rng):
    steps = sorted(map(int, names(folder)))
    if len(steps) > 1:
        path = rng.choice([path for path in sorted((folder / str(steps[-1])).rglob("*")) if path.is_file()])
        path.write_bytes(path.read_bytes()[: rng.choice([0, path.stat().st_size // 2])])


@pytest.mark.parametrize(("kind", "kills"), [("arrays", 10), ("batches", 10)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(kind, kills, tmp_path):
    rng, cache = random.Random(kind), os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    untouched, ending, folder = tmp_path / "untouched.npz", tmp_path / "ending.npz", tmp_path / "run"
    reference = CONTEXT.Process(target=train, args=(kind, None, cache, untouched))
    reference.start()
    reference.join()
    for number in range(1, kills + 1):
        process = CONTEXT.Process(target=train, args=(kind, folder, cache, ending, 0.05))
        assert killed_at_random(process, folder, rng), "it had ended before: make it longer"
        if number in (kills // 2, kills):
            damage_the_newest(folder, rng)
    last = CONTEXT.Process(target=train, args=(kind, folder, cache, ending))
    last.start()
    last.join()
    told = ending.with_suffix(".stderr").read_text()
    with np.load(ending) as got, np.load(untouched) as want:
        assert len(got.files) == len(want.files)
        for name in want.files:
            assert got[name].dtype == want[name].dtype
            assert got[name].tobytes() == want[name].tobytes(), name
    assert "going on from step" in told
    assert "cannot be read" in told
    assert "Traceback" not in told
