"""The study of block sizes computes the same with each, and its verdict follows from the times."""

import jax
import numpy as np
import pytest

from experiments.results import Record
from experiments.studies import block_size as study

CONFIG = study.Config(cells=[[6, 4, 9]], dtypes=["float32"], functions=["log_prob"], block_sizes=[2, 4, 8], rounds=2)


@pytest.mark.parametrize("function", study.FUNCTIONS)
def test_blocks_change_no_result(function):
    x, call = study.inputs(6, 4, 9, "float32"), study.FUNCTIONS[function]
    one, two = (jax.jit(lambda *x, b=b: call(*x, block_bytes=b))(*x) for b in (2 * 4 * 9 * 2, None))
    assert float(one) == pytest.approx(float(two), rel=1e-6)


def test_a_block_beyond_all_tokens_is_left_out():
    record = study.measure("log_prob", [6, 4, 9], "float32", CONFIG)
    assert record.values.keys() == {"default", "seconds_2", "seconds_4", "seconds_default"}
    assert record.values["default"] == 6


def test_a_better_block_falsifies_the_default():
    def verdict(default):
        times = {"seconds_2": np.full(4, 1.0), "seconds_4": np.full(4, 2.0), "seconds_default": np.full(4, default)}
        settings = {"function": "log_prob", "dtype": "float32", "tokens": 6, "hidden": 4, "vocabulary": 9}
        return study.report(CONFIG, [Record(settings, {"default": 6, **times})]).hypotheses[0].verdict

    assert [verdict(seconds) for seconds in (0.9, 1.1, 1.2)] == ["holds", "holds", "falsified"]
