"""The study of a large vocabulary measures what it says, and its verdicts follow from the numbers."""

import jax
import msgspec
import numpy as np
import pytest

from experiments.results import Record
from experiments.studies import linear_categorical as study

CONFIG = study.Config(hidden=8, cells=[[24, 7]], dtypes=["float32"], rounds=3, growth_cell=[2048, 32768],
                      growth_tokens=[1024, 2048, 4096], growth_vocabularies=[8192, 32768], growth_rounds=2,
                      timed_mebibytes=1, plain_mebibytes=1, context=2, width=4, steps=3, batch_size=16)  # fmt: skip


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


def test_growth_is_timed_where_the_logits_are_not_too_large():
    def measured(tokens, vocabulary):
        return study.measure_growth(tokens, vocabulary, msgspec.structs.replace(CONFIG, timed_mebibytes=2)).values

    most, more, most_of_all = (measured(256, v) for v in (1024, 2048, 2049))  # 1 MiB, 2 MiB, and more than that
    assert most["seconds_jprob"].shape == most["seconds_plain"].shape == (2,)
    assert "seconds_jprob" in more
    assert "seconds_plain" not in more
    assert "seconds_jprob" not in most_of_all
    assert most_of_all["bytes_planned"] == 4 * (256 + 8) * 2049
    assert most_of_all["bytes_plain"] >= 4 * 256 * 2049


def test_both_lines_share_a_cell():
    cells = study.growth_cells(CONFIG)
    assert cells == [(1024, 32768), (2048, 32768), (4096, 32768), (2048, 8192)]
    tokens, vocabulary = study.lines(CONFIG, list(records())[1:-2])
    assert tokens.sizes.tolist() == [1024, 2048, 4096]
    assert vocabulary.sizes.tolist() == [8192, 32768]


def test_both_losses_train_the_same_model():
    with jax.numpy_dtype_promotion("standard"):  # optax's adam itself fails under strict promotion
        config = msgspec.structs.replace(CONFIG, steps=40)
        fused, plain = (np.asarray(study.train(config, way).values["loss"]) for way in (True, False))
    assert fused.shape == (40,)
    np.testing.assert_allclose(fused, plain, rtol=1e-5)
    assert plain[-10:].mean() < plain[:10].mean()


def records(times=(0.9, 1.05), plain=1000, jprob=100, growth=1.0, beyond=1.0, power=1.0, apart=0.0):
    """A study with these ratios of time, bytes, growth with the tokens, power of time, and difference of curves."""
    cell = {"part": "cost", "tokens": 4096, "vocabulary": 32000, "dtype": "float32"}
    seconds = dict(zip(("seconds_plain", "seconds_products"), (np.full(5, 1 / ratio) for ratio in times), strict=True))
    yield Record(cell, {"seconds_jprob": np.ones(5), **seconds, "bytes_plain": plain, "bytes_jprob": jprob})
    for tokens, vocabulary in study.growth_cells(CONFIG):
        size = vocabulary * growth ** (tokens > 2048)
        taken = np.full(2, 1e-8 * tokens * vocabulary**power)
        times = {"seconds_jprob": taken} | ({"seconds_plain": taken} if tokens < 4096 else {})
        yield Record({"part": "growth", "tokens": tokens, "vocabulary": vocabulary},
                     {"bytes_jprob": size * beyond, "bytes_planned": size, "bytes_plain": tokens * vocabulary, **times}
                     )  # fmt: skip
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
        ({"growth": 3}, {3}),
        ({"apart": 0.01}, {4}),
        ({"beyond": 1.2}, {5}),
        ({"power": 1.2}, {6}),
    ],
)
def test_verdicts_follow_from_the_numbers(change, falsified):
    section = study.report(CONFIG, list(records(**change)))
    verdicts = [hypothesis.verdict for hypothesis in section.hypotheses]
    assert verdicts == ["falsified" if i in falsified else "holds" for i in range(7)]
    assert len(section.plots) == 3
    assert len(section.tables[0].rows) == 1
    assert {i for i, each in enumerate(section.hypotheses) if each.against} == falsified & {0, 2}


def test_what_a_compiler_does_not_tell_stays_open():
    bare = [Record(r.settings, {k: v for k, v in r.values.items() if "bytes" not in k}) for r in records()]
    verdicts = [hypothesis.verdict for hypothesis in study.report(CONFIG, bare).hypotheses]
    assert verdicts == ["holds", "holds", "undecided", "undecided", "holds", "undecided", "holds"]
