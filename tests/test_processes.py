"""Two processes with a mesh over both train as one does; they stop together, and go on together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
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
    nll,
    on_one_device,
    placed,
    places,
    spread,
)

from jprob import mle
from jprob.mle import driver

ROOT = Path(__file__).parent.parent


def fitted(folder, axes, **options):
    data, validation = spread(((X, Y), (X[:16], Y[:16])), "d")
    options |= {"num_steps": 12, "batch_size": 16, "validation": validation, "checkpoint_dir": folder} | VALIDATED
    return mle.fit(nll, ADAM, placed(axes), data, jax.random.key(7), progress="none", **options)


def train(number, port, folder, heartbeat, saves_often, last_step, last_signal):
    """In a process of its own, with two devices. It sends itself a signal, if any, once a step is saved."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number, heartbeat_timeout_seconds=heartbeat)
    driver._SECONDS_OF_A_CHUNK = 1e-5
    if number == 1:  # by whose own clock no time passes: chunks would be long, and nothing saved
        driver.time = SimpleNamespace(monotonic=lambda: 0.0)
    save = driver.checkpoint.save

    def save_and_send(store, saved):
        save(store, saved)
        if saved.step == last_step:
            signal.raise_signal(last_signal)
            time.sleep(1)  # for the thread that waits for it

    driver.checkpoint.save = save_and_send
    result = fitted(folder, COLUMNS, save_every_seconds=1e-9 if saves_often else 1e9)
    assert places(result.state.params) == places(placed(COLUMNS))
    everywhere = NamedSharding(result.state.params["kernel"].sharding.mesh, PartitionSpec())
    copied = jax.jit(lambda state: state, out_shardings=everywhere)(result.state)
    np.savez(f"{folder}.{number}.npz", *arrays((copied, result.history)))


def two(folder, heartbeat=100, saves_often=False, last_step=-1, last_signal=0):
    """The exit codes of two processes, the second of which gets the signal, and what they told."""
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
        given = (number, port, str(folder), heartbeat, saves_often, last_step if number else -1, int(last_signal))
        code = f"from test_processes import train; train{given}"
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)

    both = [started(number) for number in range(2)]
    try:
        told = [process.communicate(timeout=300)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    return [process.returncode for process in both], told


def lines(told):
    return [line for line in told.splitlines() if line.startswith("fit: ")]


def test_two_processes_stop_and_go_on_together_and_one_goes_on_from_them(tmp_path, capfd):
    folder = tmp_path / "run"
    codes, told = two(folder, saves_often=True, last_step=3, last_signal=signal.SIGTERM)
    assert codes == [143, 143], told
    (line,) = lines(told[0])
    where = f"saved in {folder}"
    stopped = re.fullmatch(
        rf"fit: stopped by SIGTERM at step (\d) of 12; {where}; the same call goes on from there", line
    )
    assert stopped, told[0]
    assert 4 <= int(stopped[1]) <= 6
    assert lines(told[1]) == []

    # The first one waits for the other, until nothing has been heard of it for 10 seconds.
    codes, told = two(folder, heartbeat=10, saves_often=True, last_step=8, last_signal=signal.SIGKILL)
    assert codes[1] == -signal.SIGKILL, told
    assert codes[0] != 0
    assert lines(told[0])[0] == f"fit: going on from step {stopped[1]} of 12, {where}"

    codes, told = two(folder)
    assert codes == [0, 0], told
    assert re.fullmatch(f"fit: going on from step [89] of 12, {where}", *lines(told[0])), told[0]
    assert lines(told[1]) == []

    result = fitted(folder, ROWS)
    assert f"fit: ended before, at step 12 of 12, {where}\n" in capfd.readouterr().err
    assert places(result.state.params) == places(placed(ROWS))
    assert_close(result[:2], on_one_device())
    for number in range(2):
        with np.load(f"{folder}.{number}.npz") as ending:
            assert_same_bits([ending[name] for name in ending.files], result[:2])
