"""Distillation: calibration against its definition, certain teachers against labels, and verdicts that can fail."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from experiments import plots
from experiments.results import Record
from experiments.studies import distillation
from experiments.studies.distillation import BINS, LABELS

CONFIG = distillation.Config(
    teacher_examples=40,
    hidden_units=8,
    teacher_steps=60,
    student_examples=20,
    student_steps=30,
    batch_size=20,
    learning_rate=0.01,
    temperatures=[1.0, 8.0],
    seeds=3,
)


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Within optax's adam an integer count multiplies floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_scores_of_a_teacher_are_those_of_the_definitions():
    rng = np.random.default_rng(1)
    z, labels = 6 * rng.normal(size=(2, 1, 300, 4)).astype(np.float32), rng.integers(0, 4, (2, 1, 300))
    z += 5 * np.eye(4, dtype=np.float32)[labels]
    got = distillation.teacher_scores(z[0], labels[0].astype(np.int32), z[1], labels[1].astype(np.int32))

    def nll(logits, labels):
        return -np.mean(log_softmax(logits, axis=-1)[np.arange(len(labels)), labels])

    temperature = minimize_scalar(lambda t: nll(z[0, 0] / t, labels[0, 0]), bounds=(0.1, 20), method="bounded").x
    assert got["temperature"][0] == pytest.approx(temperature, rel=1e-4)
    for when, scaled in (("before", z[1, 0]), ("after", z[1, 0] / temperature)):
        probs = softmax(scaled.astype(float), axis=-1)
        confidence, right = probs.max(-1), probs.argmax(-1) == labels[1, 0]
        bins = np.ceil(confidence * BINS).astype(int)
        gaps = [abs(np.sum(right[bins == b]) - np.sum(confidence[bins == b])) for b in range(1, BINS + 1)]
        # The temperatures differ by 1e-4: a confidence may cross an edge, which moves the error by 1 / 300.
        assert got[f"{when}, ece"][0] == pytest.approx(sum(gaps) / 300, abs=1e-6 if when == "before" else 1 / 300)
        assert got[f"{when}, nll"][0] == pytest.approx(nll(scaled, labels[1, 0]), rel=1e-4)
        assert got[f"{when}, accuracy"][0] == pytest.approx(right.mean())
    assert got["moved"][0] == 0


def test_a_certain_teacher_teaches_the_labels():
    """A margin of 200 makes soft labels one-hot in float32. Both losses then have one gradient at T = 1."""
    rng, seeds = np.random.default_rng(2), [1, 2, 3]  # in the shapes of the run below, which compiles nothing again
    labels = rng.integers(0, 10, (3, 20)).astype(np.int32)
    examples = {"x": rng.uniform(size=(3, 20, 64)).astype(np.float32), "labels": labels}
    margin = 200 * np.eye(10, dtype=np.float32)[labels]
    soft = examples | {"teacher": margin, "temperature": np.ones((3, 20), np.float32)}
    soft = jax.tree.map(lambda x: np.concatenate([x, x]), soft)
    hard = distillation.train(CONFIG, distillation.label_nll, 30, (64, 10), seeds, examples)
    warm = distillation.train(CONFIG, distillation.soft_nll, 30, (64, 10), seeds * 2, soft)
    for got, want in zip(*(jax.tree.leaves(tree) for tree in (warm, hard)), strict=True):
        # Adam divides by the size of the gradient: rounding moves a step by its own share of the rate.
        assert np.asarray(got[:3]) == pytest.approx(np.asarray(want), abs=1e-3)
        assert float(jnp.max(jnp.abs(want))) > 0.1


def test_a_run_scores_every_teacher_and_student():
    records = [record for record in distillation.run(CONFIG) if isinstance(record, Record)]
    teachers = [values for settings, values in records if settings["part"] == "teacher"]
    students = [(s["student"], s["seed"]) for s, _ in records if s["part"] == "student"]
    assert students == list(itertools.product([LABELS, "T = 1", "T = 8"], [1, 2, 3]))
    for values in teachers:
        assert values["before, weight"].sum() == values["after, weight"].sum() == 450
        assert values["before, accuracy"] == values["after, accuracy"]
        assert 450 * values["before, accuracy"] == pytest.approx(values["before, correct"].sum())
    assert all(20 < values["test"] <= 100 for settings, values in records if settings["part"] == "student")


def test_verdicts_follow_the_scores():
    def verdicts(log_t=1.0, decrease=0.01, moved=0, warm=3.0, one=0.0, spread=0.1):
        """Three seeds, whose gains differ by the spread."""
        made = []
        for seed in (1, 2, 3):
            shift = 1 + spread * (seed - 2)
            values = {"temperature": np.exp(log_t * shift), "moved": moved, "train accuracy": 1.0}
            for when, error in (("before", 0.05), ("after", 0.05 - decrease * shift)):
                table = {f"{when}, {name}": np.ones(BINS) for name in distillation.TABLES}
                values |= table | {f"{when}, ece": error, f"{when}, nll": 0.3, f"{when}, accuracy": 0.9}
            made.append(Record({"part": "teacher", "seed": seed}, values))
            for student, lead in ((LABELS, 0.0), ("T = 1", one), ("T = 8", warm)):
                points = {"validation": 80 + lead, "test": 80 + lead * shift}
                made.append(Record({"part": "student", "student": student, "seed": seed}, points))
        with plots.style():
            return [h.verdict for h in distillation.report(CONFIG, made).hypotheses]

    holds, fails, open_ = "holds", "falsified", "undecided"
    assert verdicts() == [holds] * 4
    assert verdicts(log_t=-1.0) == [fails, holds, holds, holds]
    assert verdicts(decrease=-0.01) == [fails, holds, holds, holds]
    assert verdicts(moved=1) == [holds, fails, holds, holds]
    assert verdicts(warm=-3.0, one=-4.0) == [holds, holds, fails, holds]
    assert verdicts(one=5.0) == [holds, holds, holds, fails]
    assert verdicts(spread=1.0) == [open_, holds, open_, open_]
