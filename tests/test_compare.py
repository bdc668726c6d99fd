"""Two runs agree within the tier of each value, and by their verdicts; a difference is told, with its place."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_studies

from experiments import compare, findings, folders, studies
from experiments.__main__ import main
from experiments.findings import GENTLE_ACCURACY, GENTLE_TRAINING, Tier
from experiments.results import Record


@pytest.fixture
def runs(monkeypatch, tmp_path, capsys):
    """The same run twice, and a function that changes the second by hand."""
    tiny_studies.install(monkeypatch, tmp_path)
    assert main(["run", "configs/coin.toml", "--out", "first"]) == 0
    shutil.copytree("first", "second")
    capsys.readouterr()

    def change(record, verdict=None):
        with folders.existing(Path("second")) as run:
            old = run.store.records("coin")
            kept = record(old)
            run.store.database.execute("DELETE FROM runs")
            run.store.database.execute("DELETE FROM measurements")
            run.store.finish("coin", 1.0, kept)
            if verdict:
                run.store.database.execute("UPDATE hypotheses SET verdict = ?", [verdict])
                run.store.database.commit()

    return change


def scaled(name, factor):
    return lambda records: [Record(s, v | {name: np.asarray(v[name]) * factor}) for s, v in records]


def tiers(monkeypatch, **of_values):
    monkeypatch.setattr(studies.load("coin"), "tier", lambda config, s, value: of_values.get(value), raising=False)


def told(capsys, status):
    assert main(["compare", "first", "second"]) == status
    out, error = capsys.readouterr()
    assert error == ("" if status == 0 else "first and second do not agree\n")
    return " ".join(out.split())


def test_a_run_agrees_with_itself_to_the_bit(runs, capsys):
    words = told(capsys, 0)
    assert "differences of the runs: none" in words
    assert "coin none 4 4 0" in words
    assert "verdicts: 1 of 1 are the same" in words
    assert "figures: 1 of 1 are the same" in words


def test_a_value_may_differ_by_its_tier_and_no_more(runs, capsys, monkeypatch):
    tiers(monkeypatch, share=GENTLE_TRAINING)
    runs(scaled("share", 1 + 9e-4))
    words = told(capsys, 0)
    assert all(word in words for word in ("gentle", "0.0009", "holds"))
    runs(scaled("share", 1 + 2e-4))
    words = told(capsys, 1)
    assert all(word in words for word in ("gentle", "0.0011", "falsified"))


def test_a_value_without_a_tier_is_told_and_not_judged(runs, capsys):
    runs(scaled("share", 2.0))
    assert "coin none 4 2 0.5 share of" in told(capsys, 0)


def test_another_verdict_is_told(runs, capsys):
    runs(lambda records: records, verdict="falsified")
    words = told(capsys, 1)
    assert "coin: holds and falsified: The share of heads is the bias [to .1]." in words
    assert "verdicts: 0 of 1 are the same" in words
    runs(lambda records: records, verdict="undecided")  # which contradicts none
    assert "coin: holds and undecided: The share of heads" in told(capsys, 0)


def test_a_record_that_one_run_lacks_is_told(runs, capsys):
    runs(lambda records: records[:1])
    assert "only in one run: coin/bias=0.75,hand=left" in told(capsys, 1)


@pytest.mark.parametrize(
    ("tier", "x", "y", "want"),
    [
        (GENTLE_TRAINING, [1.0, np.nan, np.inf, 0.0], [1.0, np.nan, np.inf, 0.0], 0.0),
        (GENTLE_TRAINING, [2.0, 4.0], [2.0, 5.0], 0.2),
        (GENTLE_TRAINING, [1.0], [np.nan], np.inf),
        (GENTLE_TRAINING, [1.0], [np.inf], np.inf),
        (GENTLE_TRAINING, [1.0, 2.0], [1.0], np.inf),
        (Tier("steps", 0.0, slack=1.0), [7.0, 100.0], [8.0, 102.0], 1 / 102),
        (GENTLE_ACCURACY, [90.0], [90.25], 0.25),
    ],
)
def test_a_difference_is_relative_or_in_points_and_nothing_hides(tier, x, y, want):
    assert compare._difference(tier, np.array(x), np.array(y)) == pytest.approx(want)


def test_accuracies_are_compared_as_means_over_seeds():
    parts = [
        ("accuracy of cell", np.array([90.0]), np.array([92.0])),
        ("accuracy of cell", np.array([90.0]), np.array([88.4])),
    ]
    ((what, x, y),) = compare._over_seeds(GENTLE_ACCURACY, parts)
    assert (what, compare._difference(GENTLE_ACCURACY, x, y)) == ("accuracy of cell", pytest.approx(0.2))


@pytest.mark.parametrize(("other", "want"), [([np.nan, 90.25], 0.25), ([90.0, 90.0], np.inf), ([90.0, np.nan], np.inf)])
def test_a_seed_without_a_number_hides_no_other(other, want):
    parts = [("accuracy", np.array([x]), np.array([y])) for x, y in zip([np.nan, 90.0], other, strict=True)]
    ((_, x, y),) = compare._over_seeds(GENTLE_ACCURACY, parts)
    assert compare._difference(GENTLE_ACCURACY, x, y) == pytest.approx(want)


def test_an_accuracy_at_another_learning_rate_is_told_and_not_judged(runs, capsys, monkeypatch):
    tiers(monkeypatch, share=GENTLE_ACCURACY._replace(given="off"))
    runs(scaled("share", 3.0))
    assert "coin gentle accuracy 2 0 1.5 0.5 falsified share of" in told(capsys, 1)
    runs(scaled("off", 2.0))
    assert "coin none 4 0 0.67 share of" in told(capsys, 0)


def test_each_tier_is_explained_and_used():
    page = (Path(__file__).parents[1] / "docs/running-studies.md").read_text()
    rows = page.partition("| tier | largest difference |\n|---|---|\n")[2].partition("\n\n")[0]
    loaded = map(studies.load, studies.names())
    places = [vars(findings), *map(vars, loaded)]
    made, *used = ({each.name for each in place.values() if isinstance(each, Tier)} for place in places)
    assert set().union(*used) == made
    assert set(re.findall(r"^    (\w+(?: \w+)?)  ", compare.__doc__, re.MULTILINE)) == made
    assert set(re.findall(r"^\| ([\w ]+) \|", rows, re.MULTILINE)) == made | {"none"}


def test_no_run_is_one_line(runs, capsys):
    assert main(["compare", "first", "nowhere"]) == 2
    assert capsys.readouterr().err == "nowhere: expected the folder of a run, got one without manifest.json\n"
