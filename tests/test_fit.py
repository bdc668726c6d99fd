"""The laws of `fit`: it is `run`, whatever its chunks are and however often it is stopped, and says what it does."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jprob import mle
from jprob.mle import _order, driver, terminal
from jprob.mle.driver import fit

ROOT = Path(__file__).parent.parent
SIZE, FEATURES = 24, 5
_rng = np.random.default_rng(0)
X = jnp.asarray(_rng.normal(size=(SIZE, FEATURES)), jnp.float32)
Y = jnp.asarray(_rng.normal(size=SIZE), jnp.float32)
PARAMS = {"dense": {"kernel": jnp.asarray(_rng.normal(size=FEATURES), jnp.float32), "bias": jnp.zeros(())}}
ADAM = optax.adam(0.1)
KEY = jax.random.key(7)


def nll(params, batch, key):
    x, y = batch
    return jnp.square(x @ params["dense"]["kernel"] + params["dense"]["bias"] - y) / 2


def broken_from(first, leaf="kernel"):
    """As `nll`, but without a finite gradient in one leaf where the batch says so: its third part is the step."""

    def broken(params, batch, key):
        spoilt = jnp.where(batch[2] >= first, jnp.nan, 0.0)
        return nll(params, batch[:2], key) + spoilt * params["dense"][leaf].sum()

    return broken


class Batches:
    """Batches in an order of their own, two epochs of which differ in length from any interval in these tests."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        while self.number < 5:
            self.number += 1
            yield batch_at(self.number - 1)
        self.number = 0

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, position):
        self.number = position["number"]


def batch_at(step):
    rows = np.arange(4 * step, 4 * step + 4) % SIZE
    return np.asarray(X)[rows], np.asarray(Y)[rows]


def with_step(step):
    return *batch_at(step), np.full(4, step)


def sound(step):
    return *batch_at(step), np.zeros(4, int)


@pytest.fixture(autouse=True)
def _chunks_of_one_row(monkeypatch):
    """So that a test compiles one program, and has as many chunks as there can be."""
    monkeypatch.setattr(driver, "_SECONDS_OF_A_CHUNK", 0.0)


def assert_same_bits(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(g.dtype, jax.dtypes.prng_key):
            g, w = jax.random.key_data(g), jax.random.key_data(w)
        assert g.dtype == w.dtype
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


def fitted(data=(X, Y), nll=nll, params=PARAMS, optimizer=ADAM, **options):
    return fit(nll, optimizer, params, data, KEY, **{"num_steps": 60, "batch_size": 4, "progress": "none"} | options)


def ran(data=(X, Y), **options):
    return mle.run(nll, ADAM, mle.init(PARAMS, ADAM, KEY), data, **{"num_steps": 60, "batch_size": 4} | options)


VALIDATION = {"validation": (X[:7], Y[:7]), "validate_every": 12, "record_every": 3}
OPTIONS = {
    "plain": {},
    "rows, short batches, parts": {"batch_size": 10, "record_every": 6, "micro_batches": 2},
    "validation, average": VALIDATION | {"average_decay": 0.9},
}


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["smallest", "largest"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_run_bit_for_bit_in_chunks_of_any_size(options, seconds, monkeypatch):
    monkeypatch.setattr(driver, "_SECONDS_OF_A_CHUNK", seconds)
    state, history = ran(**options)
    result = fitted(**options)
    assert_same_bits(result.state, state)
    assert_same_bits(result.history, history)
    assert result.reason == "num_steps"


def test_patience_ends_it_where_run_freezes(tmp_path):
    options = VALIDATION | {"patience": 2, "num_steps": 600}
    state, history = ran(**options)
    result = fitted(**options)
    assert_same_bits(result.state, state)
    assert result.reason == "patience"
    taken = int(state.step)
    assert taken < 600, "it must have been frozen for this test to mean anything"
    assert_same_bits(result.history.loss, history.loss[: taken // 3])
    assert_same_bits(result.history.validation, history.validation[: taken // 12])


@pytest.mark.parametrize("seconds_of_a_row", [1e-5, 1e-3, 0.1, 5.0])
@pytest.mark.parametrize(("num_rows", "interval"), [(100_000, None), (100_000, 100), (77, None), (5000, 5)])
def test_chunks_are_short_and_of_few_sizes(num_rows, interval, seconds_of_a_row, monkeypatch):
    """On a machine where a call takes 0.5 ms beside its rows, and all goes up to 1.5 times as fast or as slow."""
    monkeypatch.undo()
    pace, clock, done, chunks, rng = driver._Pace(), [0.0], 0, 0, np.random.default_rng(0)
    monkeypatch.setattr(driver.time, "monotonic", lambda: clock[0])
    while done < num_rows:
        length = interval or num_rows
        room = min(length - done % length, num_rows - done)
        size, calls = driver._size(pace, room, length)
        assert 1 <= size * calls <= room
        assert calls < 8
        seconds = (5e-4 * calls + size * calls * seconds_of_a_row) * 1.5 ** rng.uniform(-1, 1)
        assert seconds <= 0.3 * 1.5**2 or size * calls == 1
        pace.sizes.add(size)
        clock[0] += seconds
        driver._keep_time(pace, size * calls)
        done, chunks = done + size * calls, chunks + 1
    assert len(pace.sizes) <= 6
    if seconds_of_a_row >= 0.1:
        assert pace.sizes <= {1, interval}, "7 calls make a chunk, and no other program is worth its compilation"
    if interval is None and num_rows > 1000:
        assert chunks <= 3 + 10 + num_rows * seconds_of_a_row * 1.5 / 0.05  # 10 at most for the remainder


def test_the_next_chunk_is_asked_for_before_the_last_is_waited_for():
    events = []
    chunks = (events.append(f"ask {i}") or i for i in range(3))
    for chunk in driver._one_in_flight(chunks):
        events.append(f"wait {chunk}")
    assert events == ["ask 0", "ask 1", "wait 0", "ask 2", "wait 1", "wait 2"]


@pytest.mark.parametrize("record_every", [1, 6])
@pytest.mark.parametrize("data", [batch_at, Batches()], ids=["function", "iterable"])
def test_batches_go_through_step(data, record_every):
    state, losses = mle.init(PARAMS, ADAM, KEY), []
    one = jax.jit(mle.step, static_argnums=(0, 1))
    for number in range(60):
        state, metrics = one(nll, ADAM, state, batch_at(number if data is batch_at else number % 5))
        losses.append(metrics.loss)
    result = fitted(data, record_every=record_every)
    assert_same_bits(result.state, state)
    # A row's mean is a sum of at most 6 products, in an order of the compiler's.
    np.testing.assert_allclose(result.history.loss, np.reshape(losses, (-1, record_every)).mean(1), rtol=8 * 2.0**-24)


def test_batches_are_validated_as_arrays_are():
    """The batches are those of `run`, in its order, so that all must agree to the rounding of the two programs.

    A gradient errs by 16 roundings, over 4 examples and 5 features, and a twentieth of that comes to the params with a
    rounding of their own: 2 a step, which no later step enlarges, since it is below 2 over the curvature. A residual
    and a gradient, sums over 5 and 4 of these, differ by 10 times as much.
    """
    rows = _order.batches(jax.random.split(KEY)[0], jnp.array(0), SIZE, 600, 4)
    options = VALIDATION | {"average_decay": 0.9, "patience": 2, "num_steps": 600, "optimizer": optax.sgd(0.05)}
    got, want = fitted(lambda step: (X[rows[step]], Y[rows[step]]), **options), fitted(**options)
    assert got.reason == want.reason == "patience"
    assert got.state.step == want.state.step
    assert got.state.best.step == want.state.best.step
    for name in ("loss", "gradient_norm", "update_norm", "validation"):
        g, w = getattr(got.history, name), getattr(want.history, name)
        np.testing.assert_allclose(g, w, rtol=0, atol=20 * int(got.state.step) * 2.0**-24 * float(w.max()))


def stopping_at(step, number, data=batch_at):
    """Batches whose source sends the process a signal, once, and gives the thread that waits for it time to see it."""
    sent = []

    def batch(at):
        if at == step and not sent:
            sent.append(signal.raise_signal(number))
            time.sleep(0.5)
        return data(at)

    return batch


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_in_order_and_the_same_call_goes_on(number, code, tmp_path, capfd):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        fitted(stopping_at(20, number), checkpoint_dir=tmp_path / "run")
    assert caught.value.code == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    _, errors = capfd.readouterr()
    where = f"saved in {tmp_path}/run; the same call goes on from there"
    step = re.fullmatch(rf"fit: stopped by {number.name} at step (\d+) of 60; {where}\n", errors)
    assert step, errors
    assert 19 <= int(step[1]) <= 24
    assert_same_bits(fitted(batch_at, checkpoint_dir=tmp_path / "run")[:2], fitted(batch_at)[:2])
    assert capfd.readouterr().err == f"fit: going on from step {step[1]} of 60, saved in {tmp_path}/run\n"


def test_without_a_folder_a_signal_says_that_nothing_is_saved(capfd):
    with pytest.raises(SystemExit):
        fitted(stopping_at(20, signal.SIGINT))
    errors = capfd.readouterr().err
    assert re.fullmatch(r"fit: stopped by SIGINT at step \d+ of 60; not saved: there is no checkpoint_dir\n", errors)


def test_a_second_ctrl_c_ends_it_at_once():
    """Also while the main thread is in a call that no handler in Python interrupts."""
    code = """if True:
        import ctypes, os, signal, threading, time, jax, jax.numpy as jnp, optax
        from jprob.mle.driver import fit
        def batch_at(step):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
                ctypes.CDLL(None).usleep(999_999_000)  # goes on where a signal interrupts it only for its handler in C
                ctypes.CDLL(None).sleep(999)
            return jnp.ones(2)
        fit(lambda p, x, key: p * x, optax.sgd(0.1), 0.0, batch_at, jax.random.key(0), num_steps=9, batch_size=2)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 130
    assert done.stderr.endswith("fit: ended at once by a second Ctrl-C; what was saved before stays\n")


def test_a_forked_worker_has_its_own_signals_and_holds_nothing_up():
    """In a process of its own: to fork where jax has threads is to be warned."""
    code = """if True:
        import multiprocessing, time, jax, numpy as np, optax
        from jprob.mle import fit
        context, workers = multiprocessing.get_context("fork"), []
        def work(ready):
            ready.set()
            time.sleep(40)
        def batch_at(step):
            if step == 3:
                for ready in (context.Event(), context.Event()):
                    workers.append(context.Process(target=work, args=(ready,), daemon=True))
                    workers[-1].start()
                    ready.wait()
                workers[0].terminate()
                workers[0].join(10)
            return np.ones(2, np.float32)
        nll = lambda p, x, key: p * x
        options = {"num_steps": 6, "batch_size": 2, "progress": "none"}
        result = fit(nll, optax.sgd(0.1), 0.0, batch_at, jax.random.key(0), **options)
        print(result.state.step, workers[0].exitcode, workers[1].is_alive())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"6 {-signal.SIGTERM} True\n")


def test_in_another_thread_it_leaves_the_signals_alone():
    results, before = [], signal.getsignal(signal.SIGINT)

    def work():
        results.append(fitted())

    thread = threading.Thread(target=work)
    thread.start()
    assert signal.getsignal(signal.SIGINT) is before
    thread.join()
    assert_same_bits(results[0][:2], fitted()[:2])


def test_it_may_train_longer_than_before(tmp_path, capfd):
    fitted(num_steps=24, checkpoint_dir=tmp_path)
    longer = fitted(num_steps=60, checkpoint_dir=tmp_path)
    assert_same_bits(longer[:2], fitted()[:2])
    assert capfd.readouterr().err == f"fit: going on from step 24 of 60, saved in {tmp_path}\n"
    with pytest.raises(ValueError, match=f"fit: {tmp_path} has a checkpoint of step 60, past 24"):
        fitted(num_steps=24, checkpoint_dir=tmp_path)


@pytest.mark.parametrize("options", [{}, VALIDATION | {"patience": 2, "num_steps": 600}], ids=["num_steps", "patience"])
def test_a_run_that_has_ended_is_returned_without_training(options, tmp_path, capfd):
    want = fitted(**options, checkpoint_dir=tmp_path)
    traced = []

    def untouched(params, batch, key):
        traced.append(batch)
        return nll(params, batch, key)

    got = fitted(nll=untouched, **options, checkpoint_dir=tmp_path)
    assert not traced
    assert_same_bits(got[:2], want[:2])
    assert got.reason == want.reason
    assert "fit: ended before, at step" in capfd.readouterr().err


@pytest.mark.parametrize("stops", [(7, 31), (5, 10, 12)])
def test_an_iterable_goes_on_after_the_batches_that_were_used(stops, tmp_path):
    class Stopping(Batches):
        def __iter__(self):
            for batch in super().__iter__():
                given.append(self.number)
                if len(given) == stop:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

    for stop in stops:  # noqa: B007  `Stopping` reads it
        given = []
        with pytest.raises(SystemExit):
            fitted(Stopping(), record_every=3, checkpoint_dir=tmp_path)
    got, want = fitted(Batches(), record_every=3, checkpoint_dir=tmp_path), fitted(Batches(), record_every=3)
    assert_same_bits(got[:2], want[:2])


BROKEN = {leaf: broken_from(21, leaf) for leaf in ("kernel", "bias")}


@pytest.mark.parametrize(
    ("data", "first", "record_every", "leaf"),
    [(with_step, 21, 1, "kernel"), (with_step, 21, 3, "bias")],
    ids=["rows of 1", "rows of 3"],
)
def test_steps_that_stay_non_finite_end_it_with_the_leaf_and_the_state_before(
    data, first, record_every, leaf, tmp_path
):
    options = {"record_every": record_every, "max_skipped": 6, "checkpoint_dir": tmp_path}
    with pytest.raises(FloatingPointError) as caught:
        fitted(data, BROKEN[leaf], **options)
    pattern = (
        rf"fit: 6 steps in a row failed, from step {first} on: loss nan, the gradient is not finite in"
        rf" params\['dense'\]\['{leaf}'\]; the state of step {first} is saved in {tmp_path}"
    )
    assert re.fullmatch(pattern, str(caught.value))
    # The same call fails in the same way, from what was saved.
    with pytest.raises(FloatingPointError, match=re.escape(str(caught.value))):
        fitted(data, BROKEN[leaf], **options)
    got, want = fitted(sound, BROKEN[leaf], **options), fitted(sound, BROKEN[leaf], record_every=record_every)
    assert_same_bits(got[:2], want[:2])


def test_the_batch_of_arrays_that_fails_is_the_one_that_run_took():
    """One example of 24 is spoilt. The first batch with it, and the leaf that it reaches, depend on the order."""
    spoilt = jnp.where(jnp.arange(SIZE) == 5, 99, 0)
    _, history = mle.run(BROKEN["bias"], ADAM, mle.init(PARAMS, ADAM, KEY), (X, Y, spoilt), num_steps=6, batch_size=5)
    first = int(jnp.argmax(history.skipped))
    where = f"from step {first} on: loss nan, the gradient is not finite in params['dense']['bias']; "
    with pytest.raises(FloatingPointError, match=re.escape(where)):
        fitted((X, Y, spoilt), BROKEN["bias"], max_skipped=1, batch_size=5)


def test_an_update_that_is_not_finite_is_named_so():
    broken = optax.GradientTransformation(lambda params: (), lambda g, s, p=None: (jax.tree.map(jnp.log, g), s))
    with pytest.raises(FloatingPointError, match=r"loss \d.*, the gradient is finite, but not the update; "):
        fit(nll, broken, PARAMS, (X, Y), KEY, num_steps=60, batch_size=4, max_skipped=2, progress="none")


def test_a_loss_that_is_infinite_with_a_finite_gradient_is_named_so():
    def infinite(params, batch, key):
        return nll(params, batch, key) + jnp.inf

    with pytest.raises(FloatingPointError, match="loss inf, the gradient is finite, of norm "):
        fitted(nll=infinite)


@pytest.mark.parametrize("max_skipped", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("cuts", [[20], [10, 10], [1] * 20, [4, 5, 11]])
def test_series_of_failures_are_found_across_chunks(cuts, max_skipped):
    """Against a loop over the rows."""
    for seed in range(20):
        fails = np.random.default_rng(seed).random(20) < 0.6
        want = next((i for i in range(20) if i + max_skipped <= 20 and fails[i : i + max_skipped].all()), None)
        plan, before, done, got = driver._Plan(*[1] * 12)._replace(max_skipped=max_skipped), 0, 0, None
        for length in cuts:
            first, before = driver._failing_rows(fails[done : done + length], before, plan)
            if first is not None:
                got = done + first
                break
            done += length
        assert got == want


def test_a_few_failures_are_counted_and_passed_over():
    def sometimes(params, batch, key):
        return nll(params, batch[:2], key) + jnp.where(batch[2] % 10 < 3, jnp.nan, 0.0)

    result = fitted(with_step, nll=sometimes, max_skipped=4)
    assert result.state.skipped == 18
    assert result.history.skipped.sum() == 18
    with pytest.raises(FloatingPointError, match="fit: 3 steps in a row failed, from step 0 on"):
        fitted(with_step, nll=sometimes, max_skipped=3)


LINE = r"fit: step (\d+) of 60, loss \d\.\d+(, \S+ steps/s, \d+:\d\d:\d\d left)?\n"


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(capfd, monkeypatch):
    fitted(progress="auto")
    assert re.fullmatch(LINE, capfd.readouterr().err)
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", 0.0)
    fitted(progress="auto")
    lines = capfd.readouterr().err.splitlines(keepends=True)
    assert [int(re.fullmatch(LINE, line)[1]) for line in lines] == list(range(1, 61))


def test_silence_is_silent(capfd):
    fitted(progress="none")
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_without_rich_lines(capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    fitted(progress="auto")
    shown = capfd.readouterr().err
    for part in ("60/60", "━", "loss", "steps/s", "0:00:00 left"):
        assert part in shown
    monkeypatch.setattr(terminal.importlib.util, "find_spec", lambda name: None)
    fitted(progress="auto")
    assert re.fullmatch(LINE, capfd.readouterr().err)


class NotOfJson(Batches):
    def state_dict(self):
        return {"number": np.arange(2)}


class Empty(Batches):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "fit: num_steps must be a whole number of at least 1, got 0"),
        ({"max_skipped": 0}, "fit: max_skipped must be a whole number of at least 1, got 0"),
        ({"keep": 0}, "fit: keep must be a whole number of at least 1, got 0"),
        ({"record_every": 7}, "fit: num_steps must be a multiple of record_every = 7, got 60"),
        (VALIDATION | {"validate_every": 9}, "fit: num_steps must be a multiple of validate_every = 9, got 60"),
        ({"validate_every": 6}, "fit: validation and validate_every must be given together, got validate_every alone"),
        ({"patience": 6}, "fit: patience needs validation and validate_every, got neither"),
        ({"progress": "loud"}, 'fit: progress must be "auto" or "none", got \'loud\''),
        ({"data": (X, Y[:5])}, "fit: expected data with one leading axis of examples, got shapes [(24, 5), (5,)]"),
        ({"data": iter([1])}, "fit: data must be arrays, a function of the step, or an iterable with state_dict and"),
        ({"data": NotOfJson()}, "fit: state_dict() of data must be made of values of JSON: Object of type ndarray"),
        ({"data": Empty()}, "fit: data must give batches each time they are iterated, got none"),
        ({"nll": lambda p, b, k: nll(p, b, k).mean()}, "fit: nll must return one value for each of 4 examples, got"),
        ({"data": batch_at, "nll": lambda p, b, k: b[1] > 0}, "fit: what nll returns must be a floating-point array"),
        ({"data": lambda step: ()}, "fit: expected a batch of data with one leading axis of examples, got shapes []"),
    ],
)
def test_a_fault_says_what_was_expected(change, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        fitted(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.wrong_types
def test_an_old_key_is_refused():
    with pytest.raises(ValueError, match=re.escape("fit: key must be made by jax.random.key, got uint32[2]")):
        fit(nll, ADAM, PARAMS, (X, Y), jax.random.PRNGKey(0), num_steps=1, batch_size=1)
