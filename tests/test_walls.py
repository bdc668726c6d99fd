"""Walls: formulas against plain NumPy arithmetic, the device's walls against formulas, and verdicts that can fail."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import manifest, plots
from experiments.arms import SOFTMAX_CE, SOFTMAX_SE
from experiments.results import Record
from experiments.studies import walls
from experiments.studies.walls import JPROB, USUAL

CONFIG = walls.Config(dtypes=["float32", "float16"], num_classes=[2], margin_step=0.05, margin_limit=95.0)


def last_margin(gradient, low, high):
    """By bisection: the gradient is not 0 at the lower end, and 0 at the upper."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gradient(middle) != 0 else (low, middle)
    return low


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_the_usual_walls_are_those_of_rounded_arithmetic(dtype, num_classes):
    """Each operation is rounded to the dtype; the small terms of the normaliser are added up first."""
    kind, one = np.dtype(dtype).type, np.dtype(dtype).type(1)

    def probs(margin):
        e = kind(math.exp(-margin))
        total = one + kind((num_classes - 1) * e)
        return one / total, e / total

    def squared(margin):
        p, e = probs(margin)
        mean = p * p + e * (e - one) + kind(num_classes - 2) * (e * e)
        return p * (p - mean)

    for arm, gradient in ((SOFTMAX_CE, lambda m: probs(m)[0] - one), (SOFTMAX_SE, squared)):
        want = walls.wall(arm, USUAL, dtype, num_classes, True, True)
        # The margin and e^-m have roundings of their own, each of at most 19 ulp of 1.
        assert last_margin(gradient, 2.0, 60.0) == pytest.approx(want, abs=64 * float(np.finfo(kind).eps))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_underflow_is_that_of_the_dtype(dtype):
    """The host keeps subnormal numbers. It rounds to bfloat16 through float32, which has 2^-16 there."""
    kind = jnp.dtype(dtype).type
    wall = walls.underflow(dtype, True)
    assert (kind(math.exp(-wall + 1e-4)) > 0, kind(math.exp(-wall - 1e-4)) > 0) == (True, False)
    normal = walls.underflow(dtype, False)
    tiny = float(jnp.finfo(dtype).tiny)
    assert math.exp(-normal) == pytest.approx(tiny, rel=1e-12)
    assert walls.underflow("float32", True) == pytest.approx(103.97, abs=0.005)


def test_the_probe_agrees_with_that_of_the_manifest():
    assert walls.keeps_subnormals("float32") == manifest.keeps_subnormals()


def test_a_wall_is_found_between_two_margins():
    margin, gradient = np.arange(1.0, 6.0), np.array([1.0, 0.0, -1.0, 0.0, math.nan])
    wall = walls.find_wall(margin, gradient, 3.5)
    assert wall == (3.0, 4.0, 2.0, 3.5)
    assert wall.off == 0
    assert wall._replace(formula=4.5).off == 0.5
    assert wall._replace(formula=2.5).off == 0.5
    assert walls.find_wall(margin, np.ones(5), 99.0).off == 0
    assert walls.find_wall(margin, np.zeros(5), 99.0).off == 98


@pytest.fixture(scope="module")
def records():
    return [record for record in walls.run(CONFIG) if isinstance(record, Record)]


def sections(records):
    with plots.style():
        return walls.report(CONFIG, records)


def test_the_walls_of_two_classes_are_those_of_the_formulas(records):
    """Two classes leave no order of the sum open. The exponential errs by an ulp: the grid is coarser."""
    assert len(records) == 8
    for settings, values in records:
        key = (*(settings[name] for name in ("arm", "code", "dtype")), 2)
        kept = bool(values["keeps_subnormals"]), bool(values["wider_keeps_subnormals"])
        wall = walls.find_wall(values["margin"], values["leading"], walls.wall(*key, *kept))
        assert wall.off <= 0.01, key
    section = sections(records)
    assert [h.verdict for h in section.hypotheses] == ["holds"] * 3
    assert len(section.tables[0].rows) == 8


@pytest.mark.parametrize(("arm", "code", "index"), [(SOFTMAX_CE, USUAL, 0), (SOFTMAX_SE, USUAL, 1),
                                                    (SOFTMAX_CE, JPROB, 2), (SOFTMAX_SE, JPROB, 2)])  # fmt: skip
@pytest.mark.parametrize("shift", [-1, 1])
def test_verdicts_follow_the_gradients(records, arm, code, index, shift):
    def changed(settings, values):
        if (settings["arm"], settings["code"], settings["dtype"]) != (arm, code, "float32"):
            return values
        last = np.flatnonzero(values["leading"])[-1] + round(shift * 0.4 / CONFIG.margin_step)
        gradient = np.where(np.arange(values["leading"].size) <= last, 1e-9, 0)
        return values | {"leading": gradient}

    verdicts = [h.verdict for h in sections([Record(s, changed(s, v)) for s, v in records]).hypotheses]
    assert verdicts == ["falsified" if i == index else "holds" for i in range(3)]
