"""The study of a large vocabulary measures what it says, and its verdicts follow from the numbers."""

import jax
import numpy as np
import pytest

from experiments.results import Record
from experiments.studies import linear_categorical as study

CONFIG = study.Config(hidden=8, cells=[[24, 7]], dtypes=["float32"], rounds=3, growth=[8, 16], growth_vocabulary=7,
                      context=2, width=4, steps=3, batch_size=16)  # fmt: skip


def test_everyone_computes_the_same_loss_and_gradients():
    x = study.inputs(24, 8, 7, "float32")
    found = study.contestants(x)
    assert {"jprob", "plain", "products"} <= found.keys()
    want = found.pop("plain").run()
    del found["products"]
    for program in found.values():
        for got, wanted in zip(jax.tree.leaves(program.run())[-2:], want[1], strict=True):
            # torch has the kernel the other way round
            got = np.asarray(got).T if got.shape != wanted.shape else np.asarray(got)
            np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert float(found["jprob"].run()[0]) == pytest.approx(float(want[0]), rel=1e-5)


def test_the_products_are_those_of_the_loss():
    x = study.inputs(24, 8, 7, "float32")
    text = jax.jit(study.products).lower(*x).as_text()
    assert text.count("dot_general") == 3


def test_torch_and_tokamax_run_only_where_they_are(monkeypatch):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    assert study.contestants(study.inputs(24, 8, 7, "float32")).keys() == {"jprob", "plain", "products"}


def test_resident_size_grows_by_what_a_program_takes():
    size = 64 << 20
    grown = study.growth_of_resident_size(lambda: np.ones(size, np.uint8))
    assert grown is None or 0.9 * size <= grown <= 2 * size


def test_both_losses_train_the_same_model():
    fused, plain = (np.asarray(study.train(CONFIG, way).values["loss"]) for way in (True, False))
    assert fused.shape == (3,)
    np.testing.assert_allclose(fused, plain, rtol=1e-5)
    assert plain[-1] < plain[0]


def records(times=(0.9, 1.05), plain=1000, jprob=100, growth=(100, 105), apart=0.0):
    """A study with these ratios of time, bytes, and relative difference of the curves."""
    cell = {"part": "cost", "tokens": 4096, "vocabulary": 32000, "dtype": "float32"}
    seconds = dict(zip(("seconds_plain", "seconds_products"), (np.full(5, 1 / ratio) for ratio in times), strict=True))
    yield Record(cell, {"seconds_jprob": np.ones(5), **seconds, "bytes_plain": plain, "bytes_jprob": jprob})
    for tokens, size in zip((4096, 65536), growth, strict=True):
        yield Record({"part": "growth", "tokens": tokens, "vocabulary": 32000},
                     {"bytes_jprob": size, "bytes_plain": tokens})  # fmt: skip
    losses = np.linspace(9, 5, 20)
    for loss, curve in (("jprob", losses * (1 + apart)), ("plain", losses)):
        yield Record({"part": "training", "loss": loss, "vocabulary": 99}, {"loss": curve})


@pytest.mark.parametrize(
    ("change", "falsified"),
    [
        ({}, set()),
        ({"times": (1.2, 1.05)}, {0}),
        ({"times": (0.9, 1.3)}, {1}),
        ({"jprob": 200}, {2}),
        ({"growth": (100, 300)}, {3}),
        ({"apart": 0.01}, {4}),
    ],
)
def test_verdicts_follow_from_the_numbers(change, falsified):
    section = study.report(CONFIG, list(records(**change)))
    verdicts = [hypothesis.verdict for hypothesis in section.hypotheses]
    assert verdicts == ["falsified" if i in falsified else "holds" for i in range(5)]
    assert len(section.plots) == 2
    assert len(section.tables[0].rows) == 1
    assert bool(section.counter_evidence) == bool(falsified & {0, 2, 3})


def test_what_a_compiler_does_not_tell_stays_open():
    bare = [Record(r.settings, {k: v for k, v in r.values.items() if "bytes" not in k}) for r in records()]
    verdicts = [hypothesis.verdict for hypothesis in study.report(CONFIG, bare).hypotheses]
    assert verdicts == ["holds", "holds", "undecided", "undecided", "holds"]
