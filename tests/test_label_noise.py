"""The study of label noise: its labels against their laws, its trainings alone and together, verdicts that can fail."""

import jax
import msgspec
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from experiments import data, folders, plots, tuning
from experiments.__main__ import main
from experiments.arms import SOFTMAX_CE, SOFTMAX_SE
from experiments.results import Record
from experiments.studies import label_noise
from experiments.studies.label_noise import MEMORISE, Member

CONFIG = label_noise.Config(
    shares=[0.0, 0.4],
    judged_share=0.4,
    hidden_units=4,
    epochs=2,
    batch_size=256,
    decades=[-2.0, -1.5],
    widen_at_most=0,
    selection_seeds=1,
    report_seeds=4,
    trained_together=2,
)


def test_the_share_of_wrong_labels_is_exact_and_the_wrong_classes_are_uniform():
    labels = np.arange(40_000, dtype=np.int32) % 10
    some, more = (label_noise.corrupted(labels, share, 10, np.random.default_rng(1)) for share in (0.2, 0.6))
    assert [np.sum(noisy != labels) for noisy in (some, more)] == [8000, 24_000]
    assert np.all(more[some != labels] == some[some != labels])  # the larger share replaces the same labels, and more
    counts = np.bincount((more - labels) % 10, minlength=10)[1:]
    # Each of 9 counts is binomial with mean 24 000 / 9; five deviations are allowed.
    np.testing.assert_allclose(counts, 24_000 / 9, atol=5 * np.sqrt(24_000 / 9))
    # A classifier with errors that know nothing of the noise: a (1 - c) + (1 - a) c / (K - 1).
    given = label_noise.corrupted(labels, 0.3, 10, np.random.default_rng(2))
    assert np.mean(given == more) == pytest.approx(0.7 * 0.4 + 0.3 * 0.6 / 9, abs=5 * np.sqrt(0.25 / 40_000))


def test_a_copy_of_the_nearest_label_is_right_as_often_as_labels_are():
    """The clean rule errs by 2 %. The deviation over eight test sets of 450 is .8 points: four are allowed."""
    found = []
    for seed in range(1, 9):
        digits = data.resampled("digits", seed)
        noisy = label_noise.corrupted(digits.train.labels, 0.4, 10, np.random.default_rng(seed))
        nearest = KNeighborsClassifier(1).fit(digits.train.features, noisy)
        found.append(nearest.score(digits.test.features, digits.test.labels))
    assert np.mean(found) == pytest.approx(0.6, abs=0.02 + 4 * 0.008)


def test_a_training_is_the_same_alone_and_with_others():
    """Three members fill two calls of two, so that the last call holds one member twice."""
    train = label_noise.trainer(SOFTMAX_SE, CONFIG)
    members = [Member(0.4, -4, 5), Member(0.0, -3, 5), Member(0.4, -3, 6)]
    with jax.numpy_dtype_promotion("standard"):  # optax's adam multiplies floats by an integer count
        together, alone = train(members), train(members[1:2])
    assert together["test"].shape == (3, CONFIG.epochs)
    for name, values in alone.items():
        np.testing.assert_allclose(together[name][1], values[0], rtol=0, atol=1)  # one test example weighs .2 points
    assert np.all(together["memorised"][1] == 0)
    assert not np.array_equal(together["test"][0], together["test"][2])


def test_a_rate_at_the_edge_widens_the_grid_and_both_ways_share_their_trainings():
    """Validation has its best rate at -3 half-decades, beyond the grid, and training at -4."""
    wide, asked = msgspec.structs.replace(CONFIG, decades=[-3.0, -2.0], widen_at_most=3), []

    def train(members):
        asked.extend(members)
        scores = np.array([[-abs(m.rate + 3), -abs(m.rate + 4)] for m in members], float)
        return {"validation": scores[:, :1], "training": scores[:, 1:]}

    tried = label_noise.tuned_rates(train, wide)
    best = {cell: tuning.best(curve) for cell, curve in tried.items()}
    assert best == {(0.0, "to generalise"): -3, (0.4, "to generalise"): -3, (0.4, "to memorise"): -4}
    assert all(tuning.outside(curve) is None for curve in tried.values())
    assert len(asked) == len(set(asked))


@pytest.fixture
def trained(monkeypatch):
    """The shares of wrong labels that are trained on, by a stand-in whose curves depend on the member alone."""
    shares = []

    def train(members):
        shares.extend(member.share for member in members)
        curves = np.array([np.random.default_rng([m.seed, round(10 * m.share), -m.rate]).random(2) for m in members])
        return dict.fromkeys(("validation", "test", "training", "memorised"), curves)

    monkeypatch.setattr(label_noise, "trainer", lambda arm, config: train)
    return shares


def records_of(config):
    return [record for record in label_noise.run(config) if isinstance(record, Record)]


def test_the_parts_have_the_cells_and_the_records_of_the_whole(trained):
    parts = label_noise.parts(CONFIG)
    assert sorted(cell for part in parts for cell in part.cells) == sorted(CONFIG.cells)
    np.testing.assert_equal([r for part in parts for r in records_of(part)], records_of(CONFIG))


def test_an_interrupted_run_trains_no_share_again(trained, monkeypatch, tmp_path):
    lines = [f"{name} = {value!r}" for name, value in msgspec.to_builtins(CONFIG).items()]
    path = tmp_path / "small.toml"
    path.write_text("\n".join(["# Small.", 'backend = "cpu"', "[label_noise]", *lines]))
    command = ["run", str(path), "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    make = label_noise.trainer

    def broken(arm, config):
        assert config.judged_share not in config.shares, "broken off"
        return make(arm, config)

    with monkeypatch.context() as patch:
        patch.setattr(label_noise, "trainer", broken)
        with pytest.raises(AssertionError, match="broken off"):
            main([*command, str(tmp_path / "run")])
    trained.clear()
    assert main([*command, str(tmp_path / "run")]) == 0
    assert set(trained) == {CONFIG.judged_share}
    with folders.existing(tmp_path / "whole") as whole, folders.existing(tmp_path / "run") as run:
        assert run.store.digest("label_noise") == whole.store.digest("label_noise")


@pytest.mark.parametrize(("shares", "judged"), [([0.4], 0.4), ([0.2, 0.4], 0.4), ([0.0, 0.2], 0.4), ([0.0, 0.2], 0.0)])
def test_shares_that_the_report_lacks_are_refused(shares, judged):
    settings = msgspec.to_builtins(CONFIG) | {"shares": shares, "judged_share": judged}
    with pytest.raises(msgspec.ValidationError, match="shares"):
        msgspec.convert(settings, label_noise.Config)


def made(last, best, clean, ways=label_noise.WAYS):
    """Records with the given leads of squared error, in points. The best epoch is the first."""
    for arm in label_noise.ARMS:
        for share, tuned in CONFIG.cells:
            for seed in range(CONFIG.report_seeds):
                lead = np.array([best, last] if share else [clean, clean]) * (arm != SOFTMAX_CE and tuned in ways)
                # The deviation .01 of the leads makes their interval far narrower than a point.
                test = np.array([90.0, 70.0]) + lead * (1 + 0.01 * seed)
                values = {
                    "test": test,
                    "validation": np.array([2.0, 1.0]),
                    "memorised": np.array([0.5, 0.9]),
                    "rate": 10**-2,
                    "at_edge": 1.0,
                }
                settings = {"part": "seeds", "arm": arm, "share": share, "tuned": tuned, "seed": seed}
                yield Record(settings, values)


def test_verdicts_follow_the_trainings():
    def section(records):
        with plots.style():
            return label_noise.report(CONFIG, list(records))

    def verdicts(*leads):
        return [h.verdict for h in section(made(*leads)).hypotheses]

    assert verdicts(10, 2, 0) == ["holds"] * 4
    assert verdicts(-10, 2, 0) == ["falsified"] * 4
    assert verdicts(0, 0, 0) == ["undecided"] * 4
    assert verdicts(5, 9, 0) == ["holds", "falsified"] * 2
    assert verdicts(10, 2, 0, [MEMORISE]) == ["undecided"] * 2 + ["holds"] * 2
    last, stopping = section(made(10, 2, -2)).hypotheses[:2]
    assert "+10.15" in last.measured
    assert "+8.12" in stopping.measured
    assert any("-2.03" in line for line in last.against)
    assert any("wrong labels, the lead is +2.03" in line for line in last.against)  # half is memorised at once
    assert sum("edge" in line for line in last.against) == len(label_noise.ARMS)
