"""The study of a transformer trains one model by both losses, and its verdicts follow from the numbers."""

import jax
import numpy as np
import pytest

from experiments.errors import InputError
from experiments.results import Record
from experiments.studies import transformer as study

CONFIG = study.Config(layers=1, width=4, sequences=2, words=3, softcap=2.0, learning_rate=0.01,
                      head_dtypes=["float32", "bfloat16"], rounds=2, steps=2)  # fmt: skip


def test_both_losses_are_those_of_the_softcapped_logits():
    rng = np.random.default_rng(0)
    hidden, table = (rng.normal(0, 3, shape).astype(np.float32) for shape in ((2, 3, 4), (7, 4)))
    labels = rng.integers(0, 7, (2, 3))
    logits = 2 * np.tanh(hidden @ table.T / 2)
    want = np.mean(np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0])
    for name in study.NAMES:
        assert float(study.loss(name, "float32", CONFIG, *map(jax.numpy.asarray, (hidden, table, labels)))) == (
            pytest.approx(float(want), rel=1e-5)
        )


def test_a_word_knows_none_that_comes_after_it():
    model = study.model(CONFIG, 7)
    hidden = jax.jit(model.hidden)
    out = [hidden(model.params, jax.numpy.array([[1, 2, last]])) for last in (3, 4)]
    np.testing.assert_array_equal(out[0][:, :2], out[1][:, :2])
    assert not np.allclose(out[0][:, 2], out[1][:, 2])


def record(head, name, seconds, loss):
    settings = {"head": head, "loss": name, "vocabulary": 7}
    return Record(settings, {"seconds": np.full(4, seconds), "loss": np.array([2.0, loss]), "bytes": 1 << 20})


def verdicts(jprob=1.0, plain=2.0, narrow=1.0, loss=1.0):
    rows = [record(head, name, seconds * factor, loss if name == "jprob" else 1.0)
            for head, factor in (("float32", 1.0), ("bfloat16", narrow))
            for name, seconds in (("jprob", jprob), ("plain", plain))]  # fmt: skip
    return [claim.verdict for claim in study.report(CONFIG, rows).hypotheses]


def test_each_claim_can_fail():
    assert verdicts() == ["holds"] * 3
    assert verdicts(plain=0.9) == ["falsified", "holds", "holds"]
    assert verdicts(loss=1.02) == ["holds", "falsified", "holds"]
    assert verdicts(loss=np.nan) == ["holds", "falsified", "holds"]
    assert verdicts(narrow=1.2) == ["holds", "holds", "falsified"]


def test_no_flax_is_one_line(monkeypatch):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^transformer: expected flax, got a Python without it: pip install flax$"):
        study.require(CONFIG)
