"""The laws of `fit`: it is `run`, for any chunks and any number of stops, and says what it does."""

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_loop import assert_same_bits, lenient

import jprob
from jprob import categorical, mle
from jprob.mle import _order, fit, terminal

host = sys.modules["jprob.mle.fit"]

ROOT = Path(__file__).parent.parent
SIZE, FEATURES = 24, 5
_rng = np.random.default_rng(0)
X = jnp.asarray(_rng.normal(size=(SIZE, FEATURES)), jnp.float32)
Y = jnp.asarray(_rng.normal(size=SIZE), jnp.float32)
PARAMS = {"dense": {"kernel": jnp.asarray(_rng.normal(size=FEATURES), jnp.float32), "bias": jnp.zeros(())}}
ADAM = lenient(optax.adam(0.1))
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


def broken_at(number):
    """As `nll`, but without a finite gradient in the batch of one step."""

    def broken(params, batch, key):
        spoilt = jnp.where(batch[2] == number, jnp.nan, 0.0)
        return nll(params, batch[:2], key) + spoilt * params["dense"]["kernel"].sum()

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
def _no_time_passes(monkeypatch):
    """Chunks are of one row, in one program; lines and checkpoints come at the end, on a machine of any speed."""
    monkeypatch.setattr(host, "_SECONDS_OF_A_CHUNK", 0.0)
    for module in (host, terminal):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 0.0))


def fitted(data=(X, Y), nll=nll, params=PARAMS, optimizer=ADAM, **options):
    return fit(nll, optimizer, params, data, KEY, **{"num_steps": 60, "batch_size": 4, "progress": "none"} | options)


def ran(data=(X, Y), **options):
    return mle.run(nll, ADAM, mle.init(PARAMS, ADAM, KEY), data, **{"num_steps": 60, "batch_size": 4} | options)


def nll_of_a_list():
    """An nll that is not hashable."""

    class Unhashable:
        __hash__ = None

        def __call__(self, params, batch, key):
            return nll(params, batch, key)

    return Unhashable()


VALIDATION = {"validation": (X[:7], Y[:7]), "validate_every": 12, "log_every": 3}
OPTIONS = {
    "plain": {},
    "rows, short batches, parts": {"batch_size": 10, "log_every": 6, "micro_batches": 2},
    "validation, average": VALIDATION | {"ema_decay": 0.9},
}


@pytest.mark.parametrize(
    ("options", "seconds"),
    [*((options, 0.0) for options in OPTIONS.values()), (OPTIONS["validation, average"], 1e9)],
    ids=[*OPTIONS, "largest"],
)
def test_it_is_run_bit_for_bit_in_chunks_of_any_size(options, seconds, monkeypatch):
    monkeypatch.setattr(host, "_SECONDS_OF_A_CHUNK", seconds)
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
def test_chunks_are_short(seconds_of_a_row, monkeypatch):
    """A call takes 0.5 ms next to its rows. All goes up to 1.5 times as fast or as slow."""
    monkeypatch.setattr(host, "_SECONDS_OF_A_CHUNK", 0.3)
    clock, done, chunks, rng = [0.0], 0, 0, np.random.default_rng(0)
    total = 100_000 if seconds_of_a_row < 0.1 else 4000
    monkeypatch.setattr(host.time, "monotonic", lambda: clock[0])
    pace = host._Pace()
    while done < total:
        num_rows = pace.num_rows(total - done)
        seconds = (5e-4 + num_rows * seconds_of_a_row) * 1.5 ** rng.uniform(-1, 1)
        assert seconds <= 0.3 * 1.5**2 or num_rows == 1
        clock[0] += seconds
        pace.done(num_rows)
        done, chunks = done + num_rows, chunks + 1
    assert chunks <= 3 + total * max(seconds_of_a_row * 1.5**2 / 0.25, 1 / host._MOST_ROWS)


def test_a_slow_log_does_not_shorten_the_chunks(monkeypatch):
    """A row takes 10 ms and the log a minute, by a clock that stands still otherwise."""
    clock, reports = [0.0], []
    monkeypatch.setattr(host.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(host, "_SECONDS_OF_A_CHUNK", 0.3)
    advance = host._Arrays.advance

    def timed(feed, state, step, num_rows, stop):
        clock[0] += 0.01 * num_rows
        return advance(feed, state, step, num_rows, stop)

    def log(report):
        clock[0] += 60.0
        reports.append(report.step)

    monkeypatch.setattr(host._Arrays, "advance", timed)
    fitted(log=log, num_steps=600, save_every_seconds=1e9)
    assert len(reports) <= 4 + 600 * 0.01 / 0.2


def test_chunks_of_all_lengths_are_one_program(monkeypatch):
    traces = []

    def counted(params, batch, key):
        traces.append(batch[0].shape)
        return nll(params, batch, key)

    fitted(nll=counted)
    once = len(traces)
    traces.clear()
    monkeypatch.setattr(host, "_SECONDS_OF_A_CHUNK", 1e9)
    fitted(nll=counted, num_steps=600)
    assert not traces
    assert once <= 4  # for the type of a row, and for its program; not once a chunk


@pytest.mark.parametrize("log_every", [1, 6])
@pytest.mark.parametrize("data", [batch_at, Batches()], ids=["function", "iterable"])
def test_batches_go_through_step(data, log_every):
    state, losses = mle.init(PARAMS, ADAM, KEY), []
    one = jax.jit(mle.step, static_argnums=(0, 1))
    for number in range(60):
        state, metrics = one(nll, ADAM, state, batch_at(number if data is batch_at else number % 5))
        losses.append(metrics.loss)
    result = fitted(data, log_every=log_every)
    assert_same_bits(result.state, state)
    # A row's mean is a sum of at most 6 products, in an order of the compiler's.
    np.testing.assert_allclose(result.history.loss, np.reshape(losses, (-1, log_every)).mean(1), rtol=8 * 2.0**-24)


def test_batches_are_validated_as_arrays_are():
    """The batches are those of `run`, in its order: all must agree to the rounding of the two programs.

    A gradient errs by 16 roundings, over 4 examples and 5 features. A twentieth of that comes to the params, with
    another rounding: 2 a step. No later step enlarges them, since 2 is below 2 over the curvature. A residual and a
    gradient, sums over 5 and 4 of these, differ by 10 times as much.
    """
    rows = _order.batches(KEY, jnp.array(0), SIZE, 600, 4)
    options = VALIDATION | {"ema_decay": 0.9, "patience": 2, "num_steps": 600, "optimizer": optax.sgd(0.05)}
    got, want = fitted(lambda step: (X[rows[step]], Y[rows[step]]), **options), fitted(**options)
    assert got.reason == want.reason == "patience"
    assert got.state.step == want.state.step
    assert got.state.best.step == want.state.best.step
    for name in ("loss", "gradient_norm", "update_norm", "validation"):
        g, w = getattr(got.history, name), getattr(want.history, name)
        np.testing.assert_allclose(g, w, rtol=0, atol=20 * int(got.state.step) * 2.0**-24 * float(w.max()))


def stopping_at(step, number):
    """Batches whose source sends the process a signal, once."""
    sent = []

    def batch(at):
        if at == step and not sent:
            sent.append(signal.raise_signal(number))
        return batch_at(at)

    return batch


def test_sigterm_ends_it_in_order_and_the_same_call_goes_on(tmp_path, capfd):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        fitted(stopping_at(20, signal.SIGTERM), checkpoint_dir=tmp_path / "run")
    assert caught.value.code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    where = f"saved in {tmp_path}/run"
    # The signal comes as the batch of step 20 is fetched, and that step is still taken.
    stopped = f"fit: stopped by SIGTERM at step 21 of 60; {where}; the same call goes on from there\n"
    assert capfd.readouterr().err == stopped
    assert_same_bits(fitted(batch_at, checkpoint_dir=tmp_path / "run")[:2], fitted(batch_at)[:2])
    assert capfd.readouterr().err == f"fit: going on from step 21 of 60, {where}\n"


def test_ctrl_c_is_a_keyboard_interrupt_that_holds_what_was_reached(capfd):
    """A prompt or a notebook lives on, with or without a folder."""
    with pytest.raises(KeyboardInterrupt) as caught:
        fitted(stopping_at(20, signal.SIGINT))
    line = "stopped by SIGINT at step 21 of 60; not saved: there is no checkpoint_dir"
    assert capfd.readouterr().err == f"fit: {line}\n"
    assert str(caught.value) == line
    assert caught.value.result.reason == "SIGINT"
    assert_same_bits(caught.value.result[:2], fitted(batch_at, num_steps=21)[:2])


def test_a_script_that_ctrl_c_ends_has_status_130():
    code = """if True:
        import signal, sys, jax, numpy as np, optax
        from jprob.mle import fit
        def batch_at(step):
            signal.raise_signal(signal.SIGINT) if step == 3 else None
            return np.ones(2, np.float32)
        fit(lambda p, x, key: p * x, optax.sgd(0.1), 0.0, batch_at, jax.random.key(0), num_steps=9, batch_size=2)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode in (130, -signal.SIGINT)  # a shell calls both 130
    assert done.stderr.count("fit: stopped by SIGINT at step") == 1


def test_a_second_ctrl_c_interrupts_at_once():
    def batch(step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return batch_at(step)

    with pytest.raises(KeyboardInterrupt) as caught:
        fitted(batch)
    assert not hasattr(caught.value, "result")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_forked_worker_has_its_own_signals_and_holds_nothing_up():
    """It runs in a new process: to fork where jax has threads is to be warned."""
    code = """if True:
        import multiprocessing, time, jax, numpy as np, optax
        from jprob.mle import fit
        context, workers = multiprocessing.get_context("fork"), []
        def work(ready):
            ready.set()
            time.sleep(9999)
        def batch_at(step):
            if step == 3:
                for ready in (context.Event(), context.Event()):
                    workers.append(context.Process(target=work, args=(ready,), daemon=True))
                    workers[-1].start()
                    ready.wait()
                workers[0].terminate()
                workers[0].join()
            return np.ones(2, np.float32)
        nll = lambda p, x, key: p * x
        options = {"num_steps": 6, "batch_size": 2, "progress": "none"}
        result = fit(nll, optax.sgd(0.1), 0.0, batch_at, jax.random.key(0), **options)
        print(result.state.step, workers[0].exitcode, workers[1].is_alive())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"6 {-signal.SIGTERM} True\n")


def test_in_another_thread_it_leaves_the_signals_alone():
    results, before = [], signal.getsignal(signal.SIGINT)

    def work():
        results.append(fitted())

    thread = threading.Thread(target=work)
    thread.start()
    assert signal.getsignal(signal.SIGINT) is before
    thread.join()
    assert_same_bits(results[0][:2], ran())


def test_it_may_train_longer_than_before(tmp_path, capfd):
    fitted(num_steps=24, checkpoint_dir=tmp_path)
    longer = fitted(num_steps=60, checkpoint_dir=tmp_path)
    assert_same_bits(longer[:2], ran())
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
            fitted(Stopping(), log_every=3, checkpoint_dir=tmp_path)
    got, want = fitted(Batches(), log_every=3, checkpoint_dir=tmp_path), fitted(Batches(), log_every=3)
    assert_same_bits(got[:2], want[:2])


BROKEN = {leaf: broken_from(21, leaf) for leaf in ("kernel", "bias")}


@pytest.mark.parametrize(
    ("data", "first", "log_every", "leaf"),
    [(with_step, 21, 1, "kernel"), (with_step, 21, 3, "bias")],
    ids=["rows of 1", "rows of 3"],
)
def test_steps_that_stay_non_finite_end_it_with_the_leaf_and_the_state_before(data, first, log_every, leaf, tmp_path):
    options = {"log_every": log_every, "max_skipped": 6, "checkpoint_dir": tmp_path}
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
    got, want = fitted(sound, BROKEN[leaf], **options), fitted(sound, BROKEN[leaf], log_every=log_every)
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

    with pytest.raises(FloatingPointError, match="loss inf, the gradient is finite; "):
        fitted(nll=infinite)


@pytest.mark.parametrize("max_skipped", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("cuts", [[20], [10, 10], [1] * 20, [4, 5, 11]])
def test_series_of_failures_are_found_across_chunks(cuts, max_skipped):
    """Against a loop over the rows."""
    for seed in range(20):
        fails = np.random.default_rng(seed).random(20) < 0.6
        want = next((i for i in range(20) if i + max_skipped <= 20 and fails[i : i + max_skipped].all()), None)
        before, done, got = 0, 0, None
        for length in cuts:
            first, before = host._failing_rows(fails[done : done + length], before, max_skipped)
            if first is not None:
                got = done + first
                break
            done += length
        assert got == want


def sometimes(params, batch, key):
    return nll(params, batch[:2], key) + jnp.where(batch[2] % 10 < 3, jnp.nan, 0.0)


def test_a_few_failures_are_counted_passed_over_and_told(capfd):
    result = fitted(with_step, nll=sometimes, max_skipped=4)
    assert result.state.skipped == 18
    assert result.history.skipped.sum() == 18
    why = "loss nan, the gradient is finite"
    assert result.skipped == f"18 of 60 steps skipped: {why}"
    assert capfd.readouterr().err == f"fit: step 0 is skipped: {why}\nfit: {result.skipped}\n"
    with pytest.raises(FloatingPointError, match="fit: 3 steps in a row failed, from step 0 on"):
        fitted(with_step, nll=sometimes, max_skipped=3)


def test_a_skipped_step_names_the_leaf_and_the_label(capfd):
    """Every fifth batch has a label outside of [0, 3)."""
    start = {"w": jnp.ones((FEATURES, 3))}

    def loss(params, batch, key):
        return categorical.cross_entropy(batch[0] @ params["w"], batch[1])

    def labelled(step):
        return batch_at(step)[0], np.full(4, 7 if step % 5 == 2 else 1)

    result = fit(loss, ADAM, start, labelled, KEY, num_steps=20, batch_size=4, progress="none")
    message = "cross_entropy: label 7 is outside [0, 3)"
    assert result.skipped == f"4 of 20 steps skipped: loss nan, the gradient is finite: {message}"
    assert f"fit: step 2 is skipped: loss nan, the gradient is finite: {message}" in capfd.readouterr().err


def test_a_masked_label_is_not_named_for_the_fault_of_another(capfd):
    """Padding of -100 has weight 0. The fault is a feature that is NaN, or an update that overflows."""

    def padded(params, batch, key):
        return mle.Output(categorical.cross_entropy(batch[0] @ params, batch[1]), weights=batch[1] >= 0)

    x, y, start = jnp.ones((4, FEATURES)), jnp.array([0, 1, -100, 1]), jnp.zeros((FEATURES, 3))
    for features, rate, told in [
        (x.at[0, 0].set(jnp.nan), 0.1, "loss nan, the gradient is not finite in params"),
        (10 * x, 3e38, "loss 1.0986123085021973, the gradient is finite, but not the update"),
    ]:
        batch = lambda step, features=features: (features, y)  # noqa: E731
        result = fit(padded, optax.sgd(rate), start, batch, KEY, num_steps=1, batch_size=4, progress="none")
        assert result.skipped == f"1 of 1 steps skipped: {told}"


def with_key(key):
    return fit(nll, ADAM, PARAMS, (X, Y), key, num_steps=1, batch_size=4, progress="none")


def test_inside_of_a_trace_it_is_refused_in_one_line():
    message = "fit: expected a call outside of jit, vmap and checkify, which take mle.run and mle.step"
    for traced in (jprob.checkify(fitted), jax.jit(fitted), lambda: jax.vmap(lambda key: with_key(key))(KEY[None])):
        with pytest.raises(ValueError, match=message):
            traced()


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


def test_a_log_gets_each_row_once_and_may_end_it(tmp_path):
    reports, (state, rows) = [], ran(**VALIDATION)

    def log(report):
        reports.append(report._replace(state=None))
        return report.step >= 30

    result = fitted(**VALIDATION, log=log, checkpoint_dir=tmp_path)
    assert (result.reason, int(result.state.step)) == ("log", 30)
    seen = np.concatenate([report.history.loss for report in reports])
    np.testing.assert_array_equal(seen, rows.loss[:10])
    np.testing.assert_array_equal(np.concatenate([r.history.validation for r in reports]), rows.validation[:2])
    assert_same_bits(fitted(**VALIDATION, checkpoint_dir=tmp_path).state, state)


@pytest.mark.parametrize("data", [(X, Y), batch_at], ids=["arrays", "batches"])
def test_it_holds_two_copies_of_params_and_optimizer_state(data):
    """Next to the caller's own params. The params have a size that nothing else has."""
    size, copies = 12_345, []

    def large(params, batch, key):
        return nll(params["small"], batch, key) + 0 * params["large"].sum()

    def count(report):
        copies.append(sum(x.size == size for x in jax.live_arrays()))

    def counted(step):
        count(step)
        return batch_at(step)

    params = {"small": PARAMS, "large": jnp.zeros(size)}
    fitted(counted if data is batch_at else data, large, params, log=count)
    of_one_state = 3  # params and the two moments of adam
    assert max(copies) <= 1 + 2 * of_one_state


def test_a_log_that_fails_leaves_what_was_reached(tmp_path):
    def log(report):
        if report.step > 20:
            raise OSError("the tracker is down")

    with pytest.raises(OSError, match="the tracker is down"):
        fitted(log=log, checkpoint_dir=tmp_path)
    assert_same_bits(fitted(checkpoint_dir=tmp_path)[:2], ran())
    assert fitted(log=lambda report: np.bool_(report.step >= 20)).reason == "log"
    steps = []
    fitted(log=lambda report: steps.append(report.step))
    assert steps == list(range(1, 61))  # the last one too
    assert fitted(log=lambda report: report.step).reason == "num_steps"  # what write() returns is no wish


def test_the_step_of_a_row_that_fails_is_found(capfd):
    result = fitted(with_step, nll=broken_at(7), log_every=5)
    assert result.skipped.startswith(
        "1 of 60 steps skipped: loss nan, the gradient is not finite in params['dense']['k"
    )


def test_a_source_that_cannot_repeat_a_batch_ends_nothing():
    taken = set()

    def once(step):
        if step in taken:
            raise LookupError
        taken.add(step)
        return with_step(step)

    assert fitted(once, nll=broken_at(1)).skipped == "1 of 60 steps skipped: loss nan, gradient norm nan"


def test_an_error_has_what_was_reached():
    def failing(step):
        if step == 9:
            raise LookupError("gone")
        return batch_at(step)

    with pytest.raises(RuntimeError, match=r"fit: data\(9\) failed: LookupError: gone, at step 9 of 60; not") as caught:
        fitted(failing)
    assert_same_bits(caught.value.result[:2], fitted(batch_at, num_steps=9)[:2])


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_source_that_fails_once_within_a_chunk_ends_it(seconds, monkeypatch):
    """A loader would begin again after it, and a generator seem to have ended: after 9 batches it fails, as told."""
    monkeypatch.setattr(host, "_SECONDS_OF_A_CHUNK", seconds)

    class Loader:
        def __iter__(self):
            for number in range(20):
                if number == 9:
                    raise LookupError("gone")
                yield batch_at(number)

    for data in (Loader(), iter(Loader())):
        with pytest.raises(RuntimeError, match="fit: data failed after 9 batches: LookupError: gone, at step 9 of 60"):
            fitted(data)


def test_an_iterator_ends_it_in_one_line_with_what_was_reached(tmp_path, capfd):
    result = fitted(map(batch_at, range(20)), checkpoint_dir=tmp_path)
    assert (result.reason, int(result.state.step)) == ("data", 20)
    assert capfd.readouterr().err == "fit: data ended after 20 batches, at step 20 of 60\n"
    assert_same_bits(fitted(batch_at, checkpoint_dir=tmp_path).state, fitted(batch_at).state)


def test_a_source_without_a_position_says_what_a_resume_does(tmp_path, capfd):
    class Loader:
        """As of torch: iterated again for each epoch, without a position."""

        def __iter__(self):
            return map(batch_at, range(6))

    fitted(Loader(), num_steps=24, checkpoint_dir=tmp_path)
    longer = fitted(Loader(), num_steps=60, checkpoint_dir=tmp_path)
    told = "fit: data cannot tell their position: the source begins again with its first batch\n"
    assert told in capfd.readouterr().err
    assert_same_bits(longer.state, fitted(batch_at).state)  # 24 is the end of an epoch, and 6 batches are all


@pytest.mark.parametrize("before", [True, False])
def test_a_source_that_had_another_kind_of_position_says_what_a_resume_does(before, tmp_path, capfd):
    """One with a position is followed by one without, or the other way round: the data begin again."""

    class Loader:
        def __iter__(self):
            return map(batch_at, range(6))

    class Positioned(Loader):
        def state_dict(self):
            return {"batches": 0}

        def load_state_dict(self, state):
            assert state == {"batches": 0}

    first, second = (Positioned, Loader) if before else (Loader, Positioned)
    fitted(first(), num_steps=24, checkpoint_dir=tmp_path)
    longer = fitted(second(), num_steps=60, checkpoint_dir=tmp_path)
    told = "fit: data cannot tell their position: the source begins again with its first batch\n"
    assert told in capfd.readouterr().err
    assert_same_bits(longer.state, fitted(batch_at).state)


def test_an_optimizer_that_asks_for_more_is_saved(tmp_path):
    """Also where the program of its update is described for a checkpoint: the value alone, or a function of params."""

    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: -0.01 * g * jnp.minimum(value, 1), updates), state

    asking = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    searching = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))
    for name, optimizer in {"value": asking, "search": searching}.items():
        where = {"checkpoint_dir": tmp_path / name}
        saved, plain = (fitted(optimizer=optimizer, num_steps=9, **options) for options in (where, {}))
        assert_same_bits(saved.state, plain.state)


class GrainIterator:
    """The part of Grain's iterators that tells and takes a position."""

    def __init__(self, as_bytes):
        self.number, self.as_bytes = 0, as_bytes

    def __iter__(self):
        return self

    def __next__(self):
        if self.number == 5:
            raise StopIteration
        self.number += 1
        return batch_at(self.number - 1)

    def get_state(self):
        return bytes([self.number]) if self.as_bytes else {"number": self.number}

    def set_state(self, state):
        self.number = state[0] if self.as_bytes else state["number"]


class GrainDataset:
    """Iterated again for each epoch."""

    def __init__(self, as_bytes):
        self.as_bytes = as_bytes

    def __iter__(self):
        return GrainIterator(self.as_bytes)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_grain_dataset_goes_on_after_the_batches_that_were_used(as_bytes, tmp_path):
    fitted(GrainDataset(as_bytes), num_steps=24, checkpoint_dir=tmp_path)
    got = fitted(GrainDataset(as_bytes), checkpoint_dir=tmp_path)
    assert_same_bits(got[:2], fitted(GrainDataset(as_bytes))[:2])
    assert_same_bits(got.state, fitted(Batches()).state)


def test_arrays_of_other_libraries_and_of_float64_are_the_same_run(tmp_path):
    class Tensor:
        """As of torch."""

        def __init__(self, array):
            self.array, self.shape = array, array.shape

        def __array__(self, dtype=None, copy=None):
            return self.array

    wide = np.asarray(X, np.float64), np.asarray(Y, np.float64)
    want = ran()
    assert_same_bits(fitted(wide)[:2], want)
    assert_same_bits(fitted(tuple(map(Tensor, wide)))[:2], want)
    fitted(num_steps=24, checkpoint_dir=tmp_path)
    assert_same_bits(fitted(wide, checkpoint_dir=tmp_path)[:2], want)


def test_weights_of_examples_are_those_of_run():
    weights = jnp.arange(SIZE) % 3
    options = VALIDATION | {"weights": weights, "batch_size": 5, "validation_weights": weights[:7]}
    assert_same_bits(fitted(**options)[:2], ran(**options))


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
        ({"max_to_keep": 0}, "fit: max_to_keep must be a whole number of at least 1, got 0"),
        ({"log_every": 7}, "fit: num_steps must be a multiple of log_every = 7, got 60"),
        (VALIDATION | {"validate_every": 9}, "fit: num_steps must be a multiple of validate_every = 9, got 60"),
        ({"validate_every": 6}, "fit: validation and validate_every must be given together, got validate_every alone"),
        ({"patience": 6}, "fit: patience needs validation and validate_every, got neither"),
        (
            VALIDATION | {"validation": (X for _ in range(3))},
            "fit: validation must be arrays with one leading axis of ex",
        ),
        ({"progress": "loud"}, 'fit: progress must be "auto" or "none", got \'loud\''),
        ({"data": (X, Y[:5])}, "fit: expected data with one leading axis of examples, got shapes [(24, 5), (5,)]"),
        ({"data": [(X, Y)]}, "fit: data must be arrays with one leading axis of examples (a tuple or dict of them), a"),
        ({"data": [(X, Y)]}, "or iterator of batches, got list; pass a tuple of arrays, or lambda step: batch"),
        ({"data": (X, "y")}, "or iterator of batches, got a tuple with str"),
        ({"data": 3}, "or iterator of batches, got int"),
        ({"data": batch_at, "weights": Y}, "fit: weights are for arrays; let nll return those of a batch in an"),
        ({"validation_nll": nll}, "fit: validation_nll needs validation, got none"),
        pytest.param({"log": 3}, "fit: log must be a function, got int", marks=pytest.mark.wrong_types),
        pytest.param({"monitor": 3}, "the name of a metric, got 3", marks=pytest.mark.wrong_types),
        ({"monitor_mode": "low"}, 'fit: monitor_mode must be "min" or "max", got \'low\''),
        (VALIDATION | {"monitor": "right"}, 'fit: monitor_mode must be "min" or "max", got None'),
        (VALIDATION | {"monitor": "right", "monitor_mode": "max"}, "fit: monitor must be one of loss, got 'right'"),
        ({"params": {"w": "a"}}, "init: params['w'] must be a floating-point array, got str; see eqx.partition(model"),
        ({"nll": nll_of_a_list()}, "fit: nll must be hashable, such as a function defined with def, got "),
        ({"data": NotOfJson()}, "fit: state_dict() of data must be made of values of JSON: Object of type ndarray"),
        ({"data": Empty()}, "fit: data must give batches each time they are iterated, got none"),
        (
            {"nll": lambda p, b, k: nll(p, b, k).mean()},
            "fit: nll must return one loss for each of 4 examples, or mle",
        ),
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
    with pytest.raises(ValueError, match=re.escape("init: key must be made by jax.random.key, got uint32[2]")):
        fit(nll, ADAM, PARAMS, (X, Y), jax.random.PRNGKey(0), num_steps=1, batch_size=1)
