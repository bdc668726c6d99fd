"""A benchmark's times: everyone in turn, and ratios within a round."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments import timing
from experiments.results import Record


@pytest.mark.parametrize(("seconds", "before"), [(0.0, 3), (1e-9, 6)], ids=["one call", "as many as take so long"])
def test_everyone_runs_once_a_round_and_nobody_always_first(seconds, before):
    order = []
    contestants = [lambda: order.append("a"), lambda: order.append("b"), lambda: order.append("c")]
    taken = timing.race(contestants, 3, seconds)
    assert taken.shape == (3, 3)
    assert (taken > 0).all()
    rounds = [order[i : i + 3] for i in range(before, before + 9, 3)]
    assert [sorted(r) for r in rounds] == [["a", "b", "c"]] * 3
    assert sorted(r[0] for r in rounds) == ["a", "b", "c"]


def test_a_time_is_that_of_one_of_the_calls_that_take_so_long(monkeypatch):
    ends = []  # each call takes 2 seconds of this clock
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: 2.0 * len(ends)))
    (taken,) = timing.race([lambda: ends.append(None)], 3, 5.0)
    assert taken.tolist() == [2, 2, 2]
    assert len(ends) == 1 + (1 + 2 + 4) + 3 * 4


def test_a_ratio_is_that_of_a_round():
    record = Record({}, {"seconds_a": np.array([2.0, 40.0, 6.0]), "seconds_b": np.array([1.0, 10.0, 2.0])})
    assert timing.ratio(record, "a", "b").tolist() == [2, 4, 3]
    assert timing.ratio_text(record, "a", "b").startswith("3 [")
    assert timing.ratio_text(record, "a", "c") == timing.ratio_text(record, "c", "a") == ""


@pytest.mark.parametrize(
    ("times", "sign", "verdict"),
    [
        ([0.9, 0.9, 0.9], 1, "holds"),
        ([1.2, 1.2, 1.2], 1, "falsified"),
        ([0.9, 1.2, 1.2], 1, "undecided"),
        ([1.2, 1.2, 1.2], -1, "holds"),
        ([0.9, 0.9, 0.9], -1, "falsified"),
    ],
)
def test_a_verdict_is_that_of_the_worst_record(times, sign, verdict):
    good = Record({"name": "good"}, {"seconds_a": np.full(3, 1.0 - 0.5 * sign), "seconds_b": np.ones(3)})
    record = Record({"name": "other"}, {"seconds_a": np.array(times), "seconds_b": np.ones(3)})
    medians, worst, got = timing.judge([good, record], "a", "b", 1.0, sign)
    assert got == verdict
    assert medians.tolist() == [1 - 0.5 * sign, np.median(times)]
    assert worst is record
