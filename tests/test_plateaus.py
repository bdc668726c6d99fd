"""Plateaus: the surface against float64, the flat area of known surfaces, and a verdict that can fail."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import plots
from experiments.arms import SOFTMAX_CE, SOFTMAX_SE
from experiments.results import Record
from experiments.studies import plateaus

CONFIG = plateaus.Config(draws=10, num_features=3, hidden_units=2, num_classes=3, examples=4, reach=5.0, points=5,
                         flat_below=[0.05, 0.2])  # fmt: skip


@pytest.mark.parametrize("arm", plateaus.ARMS)
def test_a_surface_is_the_loss_of_the_network_and_its_gradient_the_difference(arm):
    network = plateaus.drawn(CONFIG, 3)

    def loss(a, b):
        first, second = (network[name].astype(float) for name in ("first", "second"))
        first[0, 0], second[0, 0] = a, b
        z = np.tanh(network["x"].astype(float) @ first) @ second
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        y = np.eye(3)[network["labels"]]
        return np.mean(-np.log(np.sum(p * y, 1)) if arm == SOFTMAX_CE else np.sum((p - y) ** 2, 1) / 2)

    value, norm = plateaus.surface(arm, network, jnp.float32(5.0), 5)
    step = 1e-6
    for i, j in ((0, 0), (1, 3), (4, 2)):
        a, b = np.linspace(-5, 5, 5)[[i, j]]
        slopes = [(loss(a + step * u, b + step * v) - loss(a - step * u, b - step * v)) / (2 * step)
                  for u, v in ((1, 0), (0, 1))]  # fmt: skip
        assert float(value[i, j]) == pytest.approx(loss(a, b), rel=1e-5)
        assert float(norm[i, j]) == pytest.approx(np.hypot(*slopes), rel=1e-3, abs=1e-6)


def test_the_flat_area_is_that_of_known_surfaces():
    """A plane has the same gradient everywhere: over the width it changes the loss by the whole range."""
    axis = np.linspace(-5, 5, 101)
    assert plateaus.flat_shares(CONFIG, np.tile(axis, (101, 1)), np.ones((101, 101))).tolist() == [0, 0]
    # A ramp on a fifth of the width, and a plateau elsewhere.
    value = np.tile(np.clip(axis, -1, 1), (101, 1))
    norm = np.tile((np.abs(axis) < 1).astype(float), (101, 1))
    assert plateaus.flat_shares(CONFIG, value, norm) == pytest.approx([0.8, 0.8], abs=0.02)
    np.testing.assert_array_equal(plateaus.flat_shares(CONFIG, 7 * value, 7 * norm),
                                  plateaus.flat_shares(CONFIG, value, norm))  # fmt: skip


def test_it_runs_small_and_reports():
    records = [record for record in plateaus.run(CONFIG) if isinstance(record, Record)]
    with plots.style():
        section = plateaus.report(CONFIG, records)
    assert len(section.tables[0].rows) == 2


@pytest.mark.parametrize(("won", "verdict"), [(100, "holds"), (78, "undecided"), (50, "falsified")])
def test_the_verdict_follows_the_share_of_slices(won, verdict):
    many = plateaus.Config(**{n: getattr(CONFIG, n) for n in CONFIG.__struct_fields__} | {"draws": 100})
    lower = np.where(np.arange(100) < won, 0.1, 0.5)
    records = [
        Record({"part": "flat", "arm": arm, "below": below}, {"share": lower if arm == SOFTMAX_CE else 0 * lower + 0.3})
        for arm in (SOFTMAX_CE, SOFTMAX_SE)
        for below in many.flat_below
    ]
    records += [Record({"part": "surface", "arm": arm}, {"surface": np.arange(25.0)}) for arm in plateaus.ARMS]
    with plots.style():
        (hypothesis,) = plateaus.report(many, records).hypotheses
    assert hypothesis.verdict == verdict
