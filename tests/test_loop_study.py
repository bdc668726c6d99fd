"""The benchmark of the loops: everyone trains the same, the race is fair, and verdicts can fail."""

import importlib.util
import itertools

import jax
import numpy as np
import pytest

from experiments.results import Record
from experiments.studies import loop

U = 2.0**-24
CONFIG = {"batch_sizes": [32, 1024], "seeds": [1, 8], "epochs": 4, "fit_batch_size": 128, "fit_steps": 100,
          "rounds": 2}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_in_a_run():
    """The precision of a run; optax's adam, by which everyone trains, multiplies floats by an integer count."""
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        yield


def settings(**change):
    return loop.Config(**(CONFIG | change))


def host(values):
    return [np.asarray(value) for value in values]


def test_contestants_train_the_same():
    """One batch holds all examples, so the order is nothing: each loss and weight is the same but for rounding."""
    t = loop.task(loop.EXAMPLES, epochs=4)
    want, params = loop.program(loop.scan_loop, t, 1)[0]()
    assert want.shape == (4,)
    assert want[-1] < want[0]
    others = {"run": loop.program(loop.run_loop, t, 1)[0], "python": loop.python_loop(t), "torch": loop.torch_loop(t)}
    for name, train in others.items():
        if train is not None:
            losses, trained = train()
            # A mean of 1024 losses of about 2.5. A step of Adam is the same size however small the gradient. So
            # rounding may turn single steps of a weight round, by no more than the rate each.
            np.testing.assert_allclose(losses, want, rtol=64 * U, err_msg=name)
            trained = trained.values() if isinstance(trained, dict) else trained
            for got, wanted in zip(host(trained), host(params.values()), strict=True):
                np.testing.assert_allclose(got, wanted, atol=4 * loop.LEARNING_RATE, rtol=0, err_msg=name)
                assert np.mean(np.abs(got - wanted) > 1e-5) < 0.01


@pytest.mark.parametrize("name", ["scan", "run", "torch", "sklearn"])
def test_all_take_as_many_steps_and_learn_each_seed_in_its_own_order(name):
    t = loop.task(128, epochs=3)
    on_device = {"scan": loop.scan_loop, "run": loop.run_loop}
    train = loop.program(on_device[name], t, 3)[0] if name in on_device else loop.host_loops(t).get(name)
    if train is None:
        assert name == "torch"
        assert importlib.util.find_spec("torch") is None
        return
    losses = np.atleast_2d(train()[0])
    assert losses.shape == (3 if name in on_device else 1, t.num_steps) == (len(losses), 24)
    assert np.unique(losses[:, 0]).size == len(losses)
    assert (losses[:, 0] > 2).all()
    assert (losses[:, -4:].mean(axis=1) < losses[:, 0] - 0.4).all()


def test_host_batches_hold_every_example_once_an_epoch():
    t = loop.task(32, epochs=2)
    rows = np.concatenate(list(loop.batches(t))).reshape(2, loop.EXAMPLES)
    assert (np.sort(rows) == np.arange(loop.EXAMPLES)).all()
    assert (rows[0] != rows[1]).any()


def test_a_time_is_that_of_a_step_of_one_seed(monkeypatch):
    """Every program of this cell takes 80 ms: for 8 steps of 2 seeds on the device, of 1 seed on the host."""
    monkeypatch.setattr(loop.timing, "race", lambda contestants, rounds: np.full((len(contestants), rounds), 0.08))
    monkeypatch.setattr(loop, "program", lambda *_: (None, 1.5))
    monkeypatch.setattr(loop, "host_loops", lambda _: {"python": None})
    record = loop.measure_cell(loop.task(128, epochs=1), seeds=2, rounds=3)
    assert record.settings == {"part": "loops", "batch_size": 128, "seeds": 2}
    np.testing.assert_allclose(record.values["seconds_run"], [0.005] * 3)
    np.testing.assert_allclose(record.values["seconds_python"], [0.01] * 3)
    assert record.values["compile_scan"] == 1.5


def test_fit_and_its_checkpoints_are_timed(capsys, tmp_path):
    """Without a line on stderr, though `fit` tells where it resumes."""
    t = loop.task(32, 1)
    record = loop.measure_fit(t, loop.RECORD_EVERY, rounds=1)
    names = ("fit", "run", "short", "saved", "resumed")
    assert {name: len(times) for name, times in record.values.items()} == {f"seconds_{name}": 1 for name in names}
    assert capsys.readouterr().err == ""
    loop.fit_once(t, loop.RECORD_EVERY, str(tmp_path))()
    assert any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_cost_of_fit_is_measured_next_to_a_donating_loop():
    """The loop by hand holds one copy; `run` what it is given and what it gives, `fit` no more."""
    record = loop.measure_cost(loop.task(1024, 1), loop.RECORD_EVERY, rounds=2)
    assert record.settings == {"part": "cost", "batch_size": 1024, "steps": loop.RECORD_EVERY}
    copies = {name: record.values[f"copies_{name}"] for name in ("hand", "run", "fit")}
    np.testing.assert_allclose(copies["hand"], 1, rtol=0.05)
    np.testing.assert_allclose(copies["run"], 2, rtol=0.5)
    assert 0.9 < copies["fit"] <= 2.05
    assert record.values["programs_hand"] > 0
    table, (memory, _) = loop.cost_table(record), loop.cost_hypotheses(record)
    assert memory.verdict == "holds"
    assert [row[0] for row in table.rows] == ["a donating loop by hand", "mle.run", "mle.fit"]
    slow = {"seconds_hand": np.ones(15), "seconds_run": np.ones(15), "seconds_fit": np.linspace(2, 2.1, 15)}
    more = record.values | slow | {"copies_fit": 3.0}
    section = loop.report(settings(), [*records(), loop.Record(record.settings, more)])
    assert [hypothesis.verdict for hypothesis in section.hypotheses[-2:]] == ["falsified", "falsified"]
    assert section.tables[-1].rows[2][1] == "3.00"


def test_torch_runs_only_where_it_is(monkeypatch):
    monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: None)
    assert loop.torch_loop(loop.task(1024, 1)) is None


def test_no_host_loop_races_a_gpu(monkeypatch):
    monkeypatch.setattr(loop.jax, "default_backend", lambda: "gpu")
    assert set(loop.host_loops(loop.task(1024, 1))) == {"python"}


def records(run=1.0, fit=1.0, other=10.0, torch=True):
    """Times of rounds whose ratios scatter by 1 %."""
    rng = np.random.default_rng(0)

    def times(factors):
        base = 1 + 0.1 * rng.normal(size=15)
        return {f"seconds_{name}": f * base * (1 + 0.01 * rng.normal(size=15)) for name, f in factors.items()}

    for batch_size, seeds in itertools.product([32, 1024], [1, 8]):
        rivals = {"python": 3, "sklearn": other} | ({"torch": other} if torch else {})
        values = times({"run": run, "scan": 1} | {name: run * f for name, f in rivals.items()})
        cell = {"part": "loops", "batch_size": batch_size, "seeds": seeds}
        yield Record(cell, values | {"compile_run": 2.0, "compile_scan": 1.0})
    values = times({"fit": fit, "run": 1, "short": 0.1, "saved": 0.2, "resumed": 0.3})
    yield Record({"part": "fit", "batch_size": 128, "steps": 100}, values)


def verdicts(**change):
    section = loop.report(settings(), list(records(**change)))
    return [hypothesis.verdict for hypothesis in section.hypotheses]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ["holds", "holds", "holds", "holds"]),
        ({"run": 1.2}, ["falsified", "holds", "holds", "holds"]),
        ({"fit": 1.1}, ["holds", "holds", "holds", "falsified"]),
        ({"other": 3.0}, ["holds", "falsified", "holds", "holds"]),
        ({"other": 2.0}, ["holds", "falsified", "falsified", "holds"]),
        ({"torch": False}, ["holds", "undecided", "holds", "holds"]),
    ],
)
def test_verdicts_follow_the_ratios(change, expected):
    assert verdicts(**change) == expected


def test_what_is_shown_is_what_was_measured():
    section = loop.report(settings(), list(records(run=1.2)))
    (plot,), (table, checkpoints) = section.plots, section.tables
    assert len(table.rows) == 4
    assert table.rows[1][0] == "batches of 32, 8 seeds"
    assert table.rows[1][2].startswith("1.2")
    assert table.header[5] == "scikit-learn / run"
    assert table.rows[1][5].startswith(("9.9", "10"))
    np.testing.assert_allclose([float(row[1]) for row in checkpoints.rows], [100, 300], rtol=0.1)
    assert [len(each.against) for each in section.hypotheses] == [4, 1, 1, 0]  # slower in each cell; compiling
    assert plot.figure.axes


@pytest.mark.parametrize("sizes", [[100], [32, 32]])
def test_batch_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="batch_sizes: expected"):
        settings(batch_sizes=sizes)
