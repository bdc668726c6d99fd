"""The study of wrong starts: its pieces against independent truth, and verdicts that can fail."""

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from experiments import data, results
from experiments.arms import LINEAR_SE, SOFTMAX_CE, SOFTMAX_SE
from experiments.results import Record
from experiments.studies import wrong_start
from experiments.studies.wrong_start import Member

CONFIG = wrong_start.Config(
    models=["linear", "mlp"],
    optimizers=["sgd", "adam"],
    ordinary_std=0.01,
    wrong_std=4.0,
    other_stds=[],
    hidden_units=4,
    epochs=1,
    batch_size=256,
    sgd_decades=[0.0, 0.5],
    adam_decades=[-2.0, -1.5],
    widen_at_most=0,
    selection_seeds=1,
    report_seeds=2,
    trained_together=4,
)


def test_participation_is_1_for_equal_pulls_and_1_over_n_for_one():
    level = jnp.zeros((5, 3))
    assert wrong_start.participation(SOFTMAX_CE, level, jnp.arange(5) % 3) == pytest.approx(1, rel=1e-6)
    lone = jnp.tile(jnp.array([60.0, 0.0, 0.0]), (5, 1)).at[0].set(0)
    # Four are right by 60 and pull with e^-60; one is level.
    assert wrong_start.participation(SOFTMAX_CE, lone, jnp.zeros(5, int)) == pytest.approx(1 / 5, rel=1e-6)
    hopeless = jnp.tile(jnp.array([0.0, 60.0, 0.0]), (5, 1))
    # All are equally wrong, with e^-60 each: the ratio must not drown in the squares of 1e-26.
    assert wrong_start.participation(SOFTMAX_SE, hopeless, jnp.zeros(5, int)) == pytest.approx(1, rel=1e-6)


def test_draws_are_paired():
    """Equal seeds differ in the scale of the output layer alone; other seeds differ."""
    small, large, other = (
        wrong_start.initial_params("mlp", member, 64, 10, 32)
        for member in (Member(0.5, 0, 7), Member(4.0, 2, 7), Member(4.0, 2, 8))
    )
    np.testing.assert_array_equal(small["hidden"]["kernel"], large["hidden"]["kernel"])
    np.testing.assert_array_equal(8 * small["output"]["kernel"], large["output"]["kernel"])
    assert not np.array_equal(large["hidden"]["kernel"], other["hidden"]["kernel"])
    assert np.std(large["output"]["kernel"]) == pytest.approx(4, rel=0.2)  # 320 draws: 5 standard errors


def test_each_model_and_optimizer_has_its_parts():
    params = wrong_start.initial_params("linear", Member(1.0, 0, 0), 64, 10, 32)
    assert jax.tree.map(np.shape, params) == {"output": {"kernel": (64, 10), "bias": (10,)}}
    assert {name: CONFIG.rates(name) for name in wrong_start.OPTIMIZERS} == {"sgd": [0, 1], "adam": [-4, -3]}


def test_a_diverged_run_has_accuracy_0():
    split = data.load("digits").test
    params = {"output": {"kernel": jnp.full((64, 10), jnp.nan), "bias": jnp.zeros(10)}}
    assert wrong_start.scores(SOFTMAX_CE, params, split)["accuracy"] == 0


def seeds(accuracies, part=(0.9, 0.3)) -> list[Record]:
    """Report records with given mean accuracies by (arm, std), spread by seed."""
    return [
        Record(
            {"part": "seeds", "model": m, "optimizer": o, "arm": arm, "std": std, "seed": seed},
            {"test_accuracy": accuracies[arm, std] + 0.05 * np.sin(seed + len(arm) % 7), "rate": 0.1, "at_edge": 0.0,
             "participation": part[arm != SOFTMAX_CE] + 0.01 * seed * (arm != SOFTMAX_CE),
             "validation": np.array([50.0, 90.0])},
        )
        for m in ("linear", "mlp") for o in ("sgd", "adam") for arm in wrong_start.ARMS
        for std in (0.01, 4.0) for seed in range(8)
    ]  # fmt: skip


TRUE = {
    (SOFTMAX_CE, 0.01): 96.0,
    (SOFTMAX_SE, 0.01): 96.0,
    (LINEAR_SE, 0.01): 95.0,
    (SOFTMAX_CE, 4.0): 95.0,
    (SOFTMAX_SE, 4.0): 60.0,
    (LINEAR_SE, 4.0): 40.0,
}


@pytest.mark.parametrize(
    ("change", "part", "want"),
    [
        ({}, (0.9, 0.3), ["holds", "holds", "holds", "holds", "holds"]),
        ({(SOFTMAX_SE, 0.01): 95.0}, (0.9, 0.3), ["falsified", "falsified", "holds", "holds", "holds"]),
        ({(SOFTMAX_SE, 4.0): 95.0}, (0.9, 0.3), ["holds", "holds", "falsified", "falsified", "holds"]),
        ({(SOFTMAX_SE, 4.0): 96.0}, (0.9, 0.9), ["holds", "holds", "falsified", "falsified", "falsified"]),
    ],
)
def test_verdicts_follow_the_figures(change, part, want):
    section = wrong_start.report(CONFIG, seeds(TRUE | change, part))
    assert [h.verdict for h in section.hypotheses] == want


def test_it_runs_small_and_reports():
    config = msgspec.structs.replace(CONFIG, models=["mlp"], optimizers=["sgd"])
    with jax.default_matmul_precision("highest"):  # as in a run, so that both compile the same programs
        items = list(wrong_start.run(config))
    records = [item for item in items if isinstance(item, Record)]
    done = [item.done for item in items if isinstance(item, results.Progress)]
    assert done == sorted(done)
    # 3 arms, 2 starts: a curve of rates and 2 report seeds each.
    assert len(records) == 3 * 2 * (1 + 2)
    for record in records:
        if record.settings["part"] == "seeds":
            assert 0 <= record.values["test_accuracy"] <= 100
            assert 0 < record.values["participation"] <= 1 + 1e-6
    section = wrong_start.report(config, records)
    assert len(section.plots) == 4
    assert len(section.tables[0].rows) == 2
