"""The gradient law: closed forms against finite differences of the definitions, and verdicts that can fail."""

import math

import mpmath
import msgspec
import numpy as np
import pytest
from mpmath import mpf

from experiments import arms, plots
from experiments.arms import LINEAR_SE, SIGMOID_CE, SIGMOID_SE, SOFTMAX_CE, SOFTMAX_SE
from experiments.results import Progress, Record
from experiments.studies import gradient_law

MARGINS = [-40.0, -17.0, -1.5, 0.0, 0.6875, 3.0, 17.0, 40.0]


def softmax(z):
    total = mpmath.fsum(mpmath.exp(x) for x in z)
    return [mpmath.exp(x) / total for x in z]


def half_square(outputs):
    return (mpmath.fsum(x**2 for x in outputs[1:]) + (outputs[0] - 1) ** 2) / 2


def sigmoids(z):
    return [1 / (1 + mpmath.exp(-x)) for x in z]


DEFINITIONS = {
    SOFTMAX_CE: lambda z: -mpmath.log(softmax(z)[0]),
    SOFTMAX_SE: lambda z: half_square(softmax(z)),
    LINEAR_SE: half_square,
    SIGMOID_CE: lambda z: -mpmath.log(sigmoids(z)[0]) - mpmath.fsum(mpmath.log(1 - s) for s in sigmoids(z)[1:]),
    SIGMOID_SE: lambda z: half_square(sigmoids(z)),
}


def truth(arm, margin, num_classes):
    """The gradient's entries of truth, rival and one other class, by central differences at 120 digits."""
    z = [mpf(x) for x in gradient_law.logits(arm, np.array([margin]), num_classes)[0].tolist()]
    step = mpf(10) ** -40  # the error of a central difference is of order step^2 = 1e-80
    entries = []
    with mpmath.workdps(120):
        for i in range(min(num_classes, 3)):
            ends = [DEFINITIONS[arm]([*z[:i], z[i] + d, *z[i + 1 :]]) for d in (step, -step)]
            entries.append((ends[0] - ends[1]) / (2 * step))
    return entries if num_classes > 2 else [*entries, mpf(0)]


@pytest.mark.parametrize("arm", arms.ALL)
@pytest.mark.parametrize("num_classes", [2, 3, 100])
def test_theory_is_the_derivative_of_the_definition(arm, num_classes):
    got = gradient_law.theory(arm, np.array(MARGINS), num_classes)
    for i, margin in enumerate(MARGINS):
        true, rival, other = truth(arm, margin, num_classes)
        want = {"truth": true, "rival": rival, "norm": mpmath.sqrt(true**2 + rival**2 + (num_classes - 2) * other**2)}
        for name, value in want.items():
            # A dozen float64 operations without cancellation: under 32 roundings of 2^-53.
            assert abs(got[name][i] - float(value)) <= 32 * 2.0**-53 * abs(float(value)), (name, margin)


def test_margin_is_as_described():
    for arm in arms.ALL:
        z = gradient_law.logits(arm, np.array([-3.0, 5.0]), 4)
        gap = z[:, 1] - z[:, 0]
        np.testing.assert_array_equal(gap, [-6, 10] if arm in (SIGMOID_CE, SIGMOID_SE) else [-3, 5])
        assert np.all(z[:, 2:] == np.minimum(z[:, 0], z[:, 1])[:, None])


def test_named_values_of_squared_error():
    peak = gradient_law.theory(SOFTMAX_SE, np.array([math.log(2) - 1e-3, math.log(2), math.log(2) + 1e-3]), 2)["truth"]
    assert peak[1] == pytest.approx(-8 / 27, rel=1e-15)
    assert peak[1] < min(peak[0], peak[2])
    for k in (2, 10, 100):
        a, b = (gradient_law.theory(arm, np.array([0.0, 35.0]), k)["norm"] for arm in (SOFTMAX_CE, SOFTMAX_SE))
        assert b[0] == pytest.approx(a[0] / k, rel=1e-14)
        # e^m >> K: the first neglected term is of order K e^-35 = 1e-13.
        assert b[1] == pytest.approx(math.sqrt(k * k + k + 2) * math.exp(-35), rel=1e-11)
        assert a[1] == pytest.approx(math.sqrt(2), rel=1e-11)


@pytest.mark.parametrize("arm", arms.ALL)
def test_measurement_keeps_the_digits(arm):
    curve = gradient_law.measure(arm, np.array(MARGINS), 10)
    want = gradient_law.theory(arm, np.array(MARGINS), 10)
    for name in ("norm", "truth", "rival"):
        np.testing.assert_allclose(curve[name], want[name], rtol=(16 + 3 * 40) * 2.0**-24, atol=0)


def test_the_usual_implementation_loses_them():
    usual = gradient_law.measure(gradient_law.USUAL, np.array([8.0, 17.0, 18.0]), 2)["rival"]
    want = gradient_law.theory(SOFTMAX_SE, np.array([8.0, 17.0, 18.0]), 2)["rival"]
    assert usual[0] == pytest.approx(want[0], rel=1e-3)
    assert abs(usual[1] / want[1] - 1) > 0.2
    assert usual[2] == 0


CONFIG = msgspec.convert(
    {"num_classes": [2, 10], "margin_limit": 20.0, "margin_step": 0.5}, gradient_law.Config, strict=True
)


@pytest.fixture(scope="module")
def records():
    pieces = list(gradient_law.run(CONFIG))
    done = [piece.done for piece in pieces if isinstance(piece, Progress)]
    assert done == sorted(done)
    assert 0 <= done[0] <= done[-1] <= 1
    return [piece for piece in pieces if isinstance(piece, Record)]


def verdicts(records):
    return [hypothesis.verdict for hypothesis in gradient_law.report(CONFIG, records).hypotheses]


def test_report(records):
    with plots.style():
        section = gradient_law.report(CONFIG, records)
    assert [hypothesis.verdict for hypothesis in section.hypotheses] == ["holds"] * 5
    assert all(plots.svg(plot.figure).startswith("<svg") for plot in section.plots)
    assert all(len(row) == len(table.header) for table in section.tables for row in table.rows)
    assert "28%" in section.hypotheses[2].against[0]  # the usual implementation at margin 17


def changed(records, arm, part="law", **changes):
    """The records with curves of one arm changed: name -> function of the curves."""
    out = []
    for settings, values in records:
        hit = settings["arm"] == arm and settings["part"] == part
        new = {name: change(values) for name, change in changes.items()} if hit else {}
        out.append(Record(settings, {**values, **new}))
    return out


@pytest.mark.parametrize(
    ("index", "arm", "part", "changes"),
    [
        (0, SOFTMAX_SE, "law", {"norm": lambda v: v["norm"] * np.exp(0.03 * v["margin"])}),
        (0, SOFTMAX_SE, "law", {"norm": lambda v: 0 * v["norm"]}),
        (1, SOFTMAX_CE, "law", {"norm": lambda v: v["norm"] * np.exp(-0.02 * v["margin"])}),
        (2, SIGMOID_SE, "law", {"norm": lambda v: v["norm"] * (1 + 2e-5)}),
        (2, LINEAR_SE, "law", {"norm": lambda v: v["norm"] * np.nan}),
        (3, SOFTMAX_CE, "law", {"norm": lambda v: v["norm"] * (1 + 1e-5)}),
        (4, SOFTMAX_SE, "peak", {"truth": lambda v: v["truth"] * (1 + 1e-4)}),
        (4, SOFTMAX_SE, "peak", {"margin": lambda v: v["margin"] + 0.01}),
    ],
)
def test_a_wrong_result_is_falsified(records, index, arm, part, changes):
    assert verdicts(changed(records, arm, part, **changes))[index] == "falsified"


@pytest.mark.parametrize(
    "wrong", [{"margin_limit": 60.0}, {"num_classes": []}, {"num_classes": [1]}, {"margin_step": 0.0}, {"extra": 1}]
)
def test_config_refuses(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**msgspec.to_builtins(CONFIG), **wrong}, gradient_law.Config)
