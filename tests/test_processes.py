"""Two processes with a mesh over both do what one does; in training they stop together, and go on together."""

import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_sharding import (
    ADAM,
    COLUMNS,
    ROWS,
    VALIDATED,
    X,
    Y,
    arrays,
    assert_close,
    assert_same_bits,
    mesh,
    nll,
    on_one_device,
    placed,
    places,
    spread,
)

from jprob import linear_categorical, mle
from jprob.mle import checkpoint

host = sys.modules["jprob.mle.fit"]

ROOT = Path(__file__).parent.parent
_rng = np.random.default_rng(1)


def fitted(folder, axes, **options):
    data, validation = spread(((X, Y), (X[:16], Y[:16])), "d")
    options |= {"num_steps": 12, "batch_size": 16, "validation": validation, "checkpoint_dir": folder} | VALIDATED
    return mle.fit(nll, ADAM, placed(axes), data, jax.random.key(7), progress="none", **options)


def join(number, port, heartbeat=100):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number, heartbeat_timeout_seconds=heartbeat)


def train(number, port, folder, stops_after=None):
    """Trains in a process with two devices. The second gets a signal, if any, once this step is saved."""
    join(number, port)
    host._SECONDS_OF_A_CHUNK = 1e-5
    # Between two looks at the clock the first sees a second pass and the other none: its chunks would be long, and
    # nothing saved.
    host.time = SimpleNamespace(monotonic=(lambda: 0.0) if number else itertools.count().__next__)
    save = host.checkpoint.save

    def save_and_send(store, saved):
        save(store, saved)
        if number and saved.step == stops_after:
            signal.raise_signal(signal.SIGTERM)

    host.checkpoint.save = save_and_send
    result = fitted(folder, COLUMNS, save_every_seconds=1e-9 if stops_after else 1e9)
    assert places(result.state.params) == places(placed(COLUMNS))
    everywhere = NamedSharding(result.state.params["kernel"].sharding.mesh, PartitionSpec())
    copied = jax.jit(lambda state: state, out_shardings=everywhere)(result.state)
    np.savez(f"{folder}.{number}.npz", *arrays((copied, result.history)))


def two(call, folder, *arguments):
    """The exit codes of two processes that run `call(number, port, folder, *arguments)`, and what they told."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{folder}.cache")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def started(number):
        code = f"from test_processes import {call}; {call}{(number, port, str(folder), *arguments)}"
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)

    both = [started(number) for number in range(2)]
    try:
        told = [process.communicate(timeout=900)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    return [process.returncode for process in both], told


def lines(told):
    return [line for line in told.splitlines() if line.startswith("fit: ")]


@pytest.mark.slow
def test_two_processes_stop_and_go_on_together_and_one_goes_on_from_them(tmp_path, capfd):
    folder = tmp_path / "run"
    codes, told = two("train", folder, 3)
    assert codes == [143, 143], told
    (line,) = lines(told[0])
    where = f"saved in {folder}"
    assert line == f"fit: stopped by SIGTERM at step 4 of 12; {where}; the same call goes on from there"
    assert lines(told[1]) == []

    codes, told = two("train", folder)
    assert codes == [0, 0], told
    assert lines(told[0]) == [f"fit: going on from step 4 of 12, {where}"]
    assert lines(told[1]) == []

    result = fitted(folder, ROWS)
    assert f"fit: ended before, at step 12 of 12, {where}\n" in capfd.readouterr().err
    assert places(result.state.params) == places(placed(ROWS))
    assert_close(result[:2], on_one_device())
    for number in range(2):
        with np.load(f"{folder}.{number}.npz") as ending:
            assert_same_bits([ending[name] for name in ending.files], result[:2])


class Shares:
    """Batches of which each process gives its half, or one that is alone all."""

    def __init__(self, number):
        self.number, self.given = number, 0

    def at(self, step):
        size = 16 // jax.process_count()
        rows = (16 * step + size * self.number + np.arange(size)) % len(X)
        share = partial(jax.make_array_from_process_local_data, NamedSharding(mesh(), PartitionSpec("d")))
        return jax.tree.map(share, (X[rows], Y[rows], np.full(size, step)))

    def __iter__(self):
        while self.given < 9:
            self.given += 1
            yield self.at(self.given - 1)
        self.given = 0

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, position):
        self.given = position["given"]


def trained_on_shares(number, kind, spoilt_from=99, **options):
    """Spoilt are the batches, from a step on, by what makes no finite gradient in one leaf."""
    data = Shares(number) if kind == "iterable" else Shares(number).at

    def spoilt(params, batch, key):
        return nll(params, batch[:2], key) + jnp.where(batch[2] >= spoilt_from, jnp.nan, 0.0) * params["out"].sum()

    options = {"num_steps": 12, "batch_size": 16, "max_skipped": 3, "progress": "none"} | options
    return mle.fit(spoilt, ADAM, placed(COLUMNS), data, jax.random.key(7), **options)


def feed(number, port, folder, kind, ending):
    """Trains from batches in a new process. The end of the training, if any, comes to the second alone.

    The first one then waits for the other, until nothing has been heard of it for 10 seconds.
    """
    join(number, port, 10 if ending == "kill" else 100)
    host._SECONDS_OF_A_CHUNK = 0.0
    write = checkpoint._write

    def write_unless_it_ends(store, saved):
        if number and ending == "full disk" and saved.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        write(store, saved)
        if number and ending == "kill" and saved.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._write = write_unless_it_ends
    try:
        result = trained_on_shares(number, kind, checkpoint_dir=folder, save_every_seconds=1e-9)
        untouched = trained_on_shares(number, kind)
        for got, want in zip(arrays(result[:2]), arrays(untouched[:2]), strict=True):
            assert_same_bits(*([shard.data for shard in x.addressable_shards] for x in (got, want)))
        trained_on_shares(number, kind, spoilt_from=5, checkpoint_dir=f"{folder}-spoilt")
    except (OSError, FloatingPointError) as error:
        print(error, file=sys.stderr)


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_ends_both_in_one_line_and_any_number_go_on(tmp_path, capfd):
    folder = tmp_path / "run"
    codes, told = two("feed", folder, "function", "full disk")
    assert codes == [0, 0], told
    for errors, reason in zip(told, ("process 1 of 2 could not go on", os.strerror(27)), strict=True):
        message = f"fit: checkpoint {folder}/4 cannot be written: {reason}; the last good one is {folder}/3"
        assert lines(errors) == [message]
        assert "Traceback" not in errors
    assert {path.name for path in folder.iterdir()} == {"1", "2", "3", ".lock"}
    trained_on_shares(0, "function", num_steps=4, checkpoint_dir=folder)
    assert capfd.readouterr().err == f"fit: going on from step 3 of 4, saved in {folder}\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["function", "iterable"])
def test_each_process_gives_its_share_of_the_batches_and_what_one_is_killed_in_goes_on(kind, tmp_path):
    folder = tmp_path / "run"
    codes, told = two("feed", folder, kind, "kill")
    assert codes[1] == -signal.SIGKILL, told
    assert codes[0] != 0
    (gone,) = lines(told[0])
    assert gone.endswith(f"; if another process has gone, start all again: they go on from step 7, saved in {folder}")

    codes, told = two("feed", folder, kind, "")
    assert codes == [0, 0], told
    assert "Traceback" not in told[0] + told[1]
    failed = (
        "fit: 3 steps in a row failed, from step 5 on: loss nan, the gradient is not finite in params['out'];"
        f" the state of step 5 is saved in {folder}-spoilt"
    )
    going_on, skipped, last = lines(told[0])
    assert (going_on, last) == (f"fit: going on from step 7 of 12, saved in {folder}", failed)
    assert skipped.startswith("fit: step 5 is skipped: loss nan, ")
    assert lines(told[1]) == [failed]


def logged(number, port, folder):
    """Trains in a new process: the log of the first fails after step 3."""
    join(number, port)
    host._SECONDS_OF_A_CHUNK = 0.0

    def log(report):
        if report.step == 3:
            raise LookupError("fit: the tracker is down")

    try:
        trained_on_shares(number, "function", log=log, checkpoint_dir=folder)
    except (LookupError, OSError) as error:
        print(error.args[0], file=sys.stderr)


@pytest.mark.slow
def test_a_log_that_fails_ends_both_with_what_was_reached_saved(tmp_path):
    folder = tmp_path / "run"
    codes, told = two("logged", folder)
    assert codes == [0, 0], told
    assert lines(told[0]) == ["fit: the tracker is down"]
    assert lines(told[1]) == ["fit: process 0 of 2 could not go on"]
    assert {path.name for path in folder.iterdir()} == {"3", ".lock"}


def share_vocabulary(number, port, folder):
    """Runs in a new process: a loss whose tokens and classes lie on two processes, by the compiler and by name."""
    join(number, port)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = PartitionSpec("data"), PartitionSpec(None, "model"), PartitionSpec("data")
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(VOCABULARY, specs, strict=True)]

    def of_a_shard(hidden, kernel, labels):
        total = fused(hidden, kernel, labels, reduction="sum", axis_name="model")
        return jax.lax.psum(total, "data") / len(VOCABULARY[2])

    by_name = jax.shard_map(of_a_shard, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    everywhere = NamedSharding(mesh, PartitionSpec())
    both = [jax.jit(jax.value_and_grad(f, (0, 1)), out_shardings=everywhere)(*placed) for f in (fused, by_name)]
    np.savez(f"{folder}.{number}.npz", *jax.tree.leaves(both))


VOCABULARY = X, _rng.normal(size=(X.shape[1], 50)).astype(np.float32), _rng.integers(0, 50, len(X)).astype(np.int32)
fused = partial(linear_categorical.cross_entropy, block_bytes=8 * 50 * 4)  # 8 tokens, so that there are blocks


def test_two_processes_share_a_vocabulary(tmp_path):
    codes, told = two("share_vocabulary", tmp_path / "loss")
    assert codes == [0, 0], told
    want = jax.tree.leaves(jax.value_and_grad(fused, (0, 1))(*VOCABULARY))
    for number in range(2):
        with np.load(tmp_path / f"loss.{number}.npz") as got:
            for name, wanted in zip(got.files, 2 * want, strict=True):
                # Sums over 48 tokens or 50 classes, in two orders.
                np.testing.assert_allclose(got[name], wanted, rtol=0, atol=48 * 2.0**-24 * float(np.abs(wanted).max()))
