"""The benchmark: everyone computes the same, the race is fair, and verdicts can fail."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.results import Record
from experiments.studies import speed

FUNCTIONS = list(speed.PEERS)
CONFIG = speed.Config(functions=FUNCTIONS, shapes=[[4, 3]], dtypes=["float32"], rounds=4, seconds_a_sample=0.0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_contestants_compute_the_same(function):
    """The usual regime, in which the peers keep their digits too: logits of spread 3."""
    x, (*both, fields) = speed.inputs([4, 3], "float32"), speed.CALLS[function]
    for mode in speed.MODES:
        programs = [speed.program(call, mode, fields, x) for call in both]
        ours, peers = (speed.runner(*program, 12)() for program in programs)
        chex.assert_trees_all_close(ours, peers, rtol=1e-5, atol=1e-6)  # 16 + R of about 12 units of 6e-8 each


def test_a_forward_call_is_the_public_function_itself():
    for ours, _, fields in speed.CALLS.values():
        assert speed.program(ours, speed.MODES[0], fields, speed.inputs([4, 3], "float32"))[0] is ours


def test_the_step_trains_the_same_with_each_loss():
    with jax.numpy_dtype_promotion("standard"):  # optax's adam multiplies floats by an integer count
        steps = [speed.training_step(loss) for loss in speed.CALLS["cross_entropy"][:2]]
        (ours, params, _), (peers, of_peer, _) = (step(*arguments) for step, arguments in steps)
    np.testing.assert_allclose(ours, peers, rtol=1e-6)  # a mean of losses near ln 10, of a few roundings each
    chex.assert_trees_all_close(params, of_peer, atol=2e-3)  # two steps at most, where a gradient is rounding


def test_torch_runs_only_where_it_is(monkeypatch):
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    assert speed.torch_program("cross_entropy", speed.MODES[0], speed.inputs([4, 3], "float32")) is None


def records(ratio_of):
    rng = np.random.default_rng(0)
    for function, mode in speed.kinds(CONFIG):
        peer = 1 + 0.01 * rng.normal(size=15)
        cell = {"function": function, "dtype": "float32", "rows": 4, "classes": 3, "mode": mode}
        times = {"seconds_jprob": ratio_of * peer * (1 + 0.01 * rng.normal(size=15)), "seconds_peer": peer}
        yield Record(cell, {**times, "seconds_copy": peer, "bytes_jprob": 0, "bytes_peer": 1 << 20})


@pytest.mark.parametrize(("ratio", "verdict"), [(0.5, "holds"), (1.05, "holds"), (1.3, "falsified")])
def test_verdicts_follow_the_ratios(ratio, verdict):
    section = speed.report(CONFIG, list(records(ratio)))
    assert {h.verdict for h in section.hypotheses} == {verdict}
    assert {bool(h.against) for h in section.hypotheses} == {verdict == "falsified"}
    assert len(section.tables) == len(FUNCTIONS)
    assert f"{ratio:.2f}"[:3] in section.tables[0].rows[0][2]


def test_inputs_are_distributions():
    x = speed.inputs([4, 3], "bfloat16")
    assert x.logits.dtype == x.targets.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(x.targets, np.float32).sum(axis=1), 1, atol=3 * 2.0**-9)
    assert jax.tree.map(lambda a: a.shape, x) == speed.Inputs((4, 3), (4, 3), (4,), (4, 3))


def test_temporaries_are_those_of_the_program():
    x = jnp.ones((256, 256))
    assert speed.temporaries(jnp.negative, [x]) < x.nbytes <= speed.temporaries(lambda x: (x @ x) @ x, [x])
