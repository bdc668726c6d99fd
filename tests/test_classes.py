"""Classes: gradients against their ratio, training against a plain loop, and verdicts that can fail."""

import itertools

import jax
import msgspec
import numpy as np
import pytest

from experiments import plots
from experiments.arms import SOFTMAX_CE
from experiments.results import Record
from experiments.studies import classes
from experiments.studies.classes import MEAN, SUM

SETTINGS = {"num_classes": [2, 20], "num_features": 3, "centre_std": 1.0, "train_examples": 60, "test_examples": 50,
            "epochs": 2, "batch_size": 60, "decades": [0.0, 0.5], "widen_at_most": 0, "selection_seeds": 1,
            "report_seeds": 4, "trained_together": 12}  # fmt: skip
CONFIG = msgspec.convert(SETTINGS, classes.Config)


@pytest.mark.parametrize("num_classes", [2, 200])
def test_gradients_at_uniform_p_have_the_ratio(num_classes):
    """The gradient in the bias is that in the logits; float32 errs by 32 u of it for logits that are level."""
    params = {"kernel": np.zeros((1, num_classes), np.float32), "bias": np.zeros(num_classes, np.float32)}

    @jax.jit
    @jax.grad
    def gradient(params, *weights):
        return classes.nll(params, (np.ones((1, 1), np.float32), np.zeros(1, np.int32), *weights), None)[0]

    of_arm = {
        arm: gradient(params, *(np.full(1, w, np.float32) for w in classes.weights_of(arm, num_classes)))["bias"]
        for arm in classes.ARMS
    }
    for arm, got in of_arm.items():
        scaled = classes.gradient_ratio(arm, num_classes) * got
        np.testing.assert_allclose(scaled, of_arm[SOFTMAX_CE], rtol=64 * 2.0**-24)


def by_hand(arm, rate, seed, num_classes):
    """Full-batch descent in float64 from the definitions, as one batch is an epoch here."""
    drawn = classes.draw(seed, num_classes, CONFIG)
    x, y = drawn["train"].astype(np.float64), np.eye(num_classes)[drawn["train_labels"]]
    kernel, bias = drawn["kernel"].astype(np.float64), np.zeros(num_classes)
    for _ in range(CONFIG.epochs):
        z = x @ kernel + bias
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        e = p - y
        square = p * (e - (p * e).sum(axis=1, keepdims=True))
        g = {SOFTMAX_CE: e, SUM: square, MEAN: 2 / num_classes * square}[arm] / len(x)
        kernel, bias = kernel - rate * x.T @ g, bias - rate * g.sum(axis=0)
    right = np.argmax(drawn["test"] @ kernel + bias, axis=1) == drawn["test_labels"]
    return 100 * right.mean()


def test_run_trains_every_cell_as_a_plain_loop_does():
    """A float32 rounding may turn one of 50 examples that lies between two classes."""
    records = [record for record in classes.run(CONFIG) if isinstance(record, Record)]
    assert len(records) == 2 * (3 + 3 + 2)
    with plots.style():
        section = classes.report(CONFIG, records)
    assert section.hypotheses[0].verdict == "undecided"  # two rates: the best one lies at an edge
    assert plots.svg(section.plots[0].figure).startswith("<svg")
    for row, (k, arm) in zip(section.tables[0].rows, itertools.product((2, 20), classes.ARMS), strict=True):
        tested = next(r for r in records if r.settings == {"part": "tuned", "arm": arm, "num_classes": k})
        rate = min((1.0, 10**0.5), key=lambda rate, row=row: abs(rate - float(row[2])))
        want = [by_hand(arm, rate, classes.REPORT_SEED + i, k) for i in range(CONFIG.report_seeds)]
        np.testing.assert_allclose(tested.values["test"], want, atol=2.01)


def made(ratios, leads):
    """Records with the given tuned ratios, in half-decades, and leads of cross-entropy, by number of classes."""
    for k, arm in itertools.product((2, 20), classes.ARMS):
        at = {SOFTMAX_CE: 0, SUM: ratios[k], MEAN: ratios[k]}[arm]
        rates = np.arange(-3, 9)
        accuracy = 90.0 - np.abs(rates - at)
        values = {"half_decades": rates, "validation": accuracy, "error": np.zeros(rates.size)}
        yield Record({"part": "rates", "arm": arm, "num_classes": k}, values)
        noise = np.array([0.0, 0.1, -0.1, 0.0])
        test = 80 + (noise if arm == SOFTMAX_CE else -leads[k] * np.ones(4))
        for part in ("tuned", "shared"):
            yield Record({"part": part, "arm": arm, "num_classes": k}, {"test": test})


@pytest.mark.parametrize(
    ("ratios", "leads", "want"),
    [
        ({2: 1, 20: 3}, {2: 0.0, 20: 0.5}, ["holds", "holds"]),
        ({2: 0, 20: 2}, {2: 0.0, 20: 0.5}, ["holds", "holds"]),
        ({2: 1, 20: 1}, {2: 0.0, 20: 0.5}, ["falsified", "holds"]),
        ({2: 3, 20: 3}, {2: 0.0, 20: 0.5}, ["falsified", "holds"]),
        ({2: 1, 20: 8}, {2: 0.0, 20: 0.5}, ["undecided", "holds"]),
        ({2: 1, 20: 3}, {2: 0.0, 20: 1.5}, ["holds", "falsified"]),
        ({2: 1, 20: 3}, {2: 0.0, 20: 0.99}, ["holds", "undecided"]),
        ({2: 1, 20: 3}, {2: 3.0, 20: 3.0}, ["holds", "holds"]),
    ],
)
def test_verdicts_follow_the_numbers(ratios, leads, want):
    records = list(made(ratios, leads))
    if leads[20] == 0.99:  # a spread of the growth, whose interval then reaches above 1
        records = [
            r._replace(values={"test": r.values["test"] - np.array([0.4, -0.4, 0.3, -0.3])})
            if r.settings == {"part": "tuned", "arm": SUM, "num_classes": 20} else r for r in records
        ]  # fmt: skip
    with plots.style():
        assert [h.verdict for h in classes.report(CONFIG, records).hypotheses] == want


def test_the_ends_of_the_grid_come_in_order():
    with pytest.raises(msgspec.ValidationError, match="lower end first"):
        msgspec.convert(SETTINGS | {"decades": [1.0, 0.0]}, classes.Config)
