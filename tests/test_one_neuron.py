"""The one-neuron demonstration: the recursion against differentiated definitions, and verdicts that can fail."""

import math

import mpmath
import msgspec
import numpy as np
import pytest
from mpmath import mpf

from experiments import plots
from experiments.results import Progress, Record
from experiments.studies import one_neuron
from experiments.studies.one_neuron import CROSS, SCRIPT, SQUARED


def output(w, b):
    return 1 / (1 + mpmath.exp(-(w + b)))


COSTS = {SQUARED: lambda a: a**2 / 2, CROSS: lambda a: -mpmath.log(1 - a), SCRIPT: lambda a: -mpmath.log(1 - a)}


def differentiated(loss, rate, start, num_steps):
    """The recursion with gradients by central differences of the definition, at 60 digits."""
    step, path = mpf(10) ** -20, []
    with mpmath.workdps(60):
        w, b = map(mpf, start)
        for _ in range(num_steps + 1):
            a, cost = output(w, b), COSTS[loss]
            path.append((float(a), float(cost(a))))
            if loss == SCRIPT:  # the derivative in the output, not in the weight
                dw = db = (cost(a + step) - cost(a - step)) / (2 * step)
            else:
                dw = (cost(output(w + step, b)) - cost(output(w - step, b))) / (2 * step)
                db = (cost(output(w, b + step)) - cost(output(w, b - step))) / (2 * step)
            w, b = w - mpf(rate) * dw, b - mpf(rate) * db
    return np.array(path).T


@pytest.mark.parametrize("loss", [SQUARED, CROSS, SCRIPT])
@pytest.mark.parametrize("start", [(0.6, 0.9), (2.0, 2.0), (-1.0, 5.0)])
def test_theory_is_gradient_descent_on_the_definition(loss, start):
    got = one_neuron.theory(loss, 0.005 if loss == SCRIPT else 0.15, start, 100)
    want = differentiated(loss, 0.005 if loss == SCRIPT else 0.15, start, 100)
    # 1 - a has lost z / ln 2 of 53 bits at a start z = 4. 100 steps add their roundings: `100 e^4 2^-53 = 6e-13`.
    np.testing.assert_allclose(np.array(got), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [SQUARED, CROSS])
def test_training_is_the_theory_in_float32(loss):
    got = one_neuron.train(loss, np.float32(0.15), np.array([2.0, 2.0], np.float32), 300)
    want = one_neuron.theory(loss, 0.15, (2.0, 2.0), 300)
    # Each of 300 steps rounds w and b (up to 2: half an ulp is 2^-24) and so z, twice: 300 * 2^-23 in z. The gradient
    # of C and a in z is at most 1.
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=0, atol=300 * 2.0**-23)


def test_steps_to_half():
    assert one_neuron.steps_to_half(np.array([0.9, 0.5, 0.4, 0.3])) == 2
    assert one_neuron.steps_to_half(np.array([0.9, 0.8])) == math.inf


def test_matching_rate_is_the_smallest():
    rate = one_neuron.matching_rate((2.0, 2.0), 17)
    for factor, reached in ((1.0, True), (0.999, False)):
        path = one_neuron.theory(SQUARED, factor * rate, (2.0, 2.0), 17)
        assert (one_neuron.steps_to_half(path.output) <= 17) == reached


SETTINGS = {
    "starts": [[0.6, 0.9], [2.0, 2.0]],
    "trainings": [
        {"loss": "squared error", "rate": 0.15},
        {"loss": "cross-entropy", "rate": 0.005},
        {"loss": "cross-entropy", "rate": 0.15},
    ],
    "num_steps": 300,
}
CONFIG = msgspec.convert(SETTINGS, one_neuron.Config)


@pytest.fixture(scope="module")
def records():
    pieces = list(one_neuron.run(CONFIG))
    assert all(0 <= piece.done <= 1 for piece in pieces if isinstance(piece, Progress))
    return [piece for piece in pieces if isinstance(piece, Record)]


def verdicts(records, config=CONFIG):
    return [hypothesis.verdict for hypothesis in one_neuron.report(config, records).hypotheses]


def test_report(records):
    with plots.style():
        section = one_neuron.report(CONFIG, records)
    assert [hypothesis.verdict for hypothesis in section.hypotheses] == ["holds"] * 2
    assert len(section.plots[0].figure.axes) == 4
    assert plots.svg(section.plots[0].figure).startswith("<svg")
    assert all(len(row) == len(table.header) for table in section.tables for row in table.rows)
    # Nielsen (2015): the outputs .82 and .98 become .09 and .20 in 300 steps of squared error.
    squared = [row for row in section.tables[0].rows if row[1] == SQUARED]
    assert [f"{float(row[3]):.2f} {float(row[5]):.2f}" for row in squared] == ["0.82 0.09", "0.98 0.20"]


@pytest.mark.parametrize("name", ["output", "cost"])
@pytest.mark.parametrize("wrong", [2e-4, math.nan])
def test_a_wrong_curve_is_falsified(records, name, wrong):
    settings, values = records[-1]
    bad = values[name] + np.where(np.arange(values[name].size) == 150, wrong, 0)
    assert verdicts([*records[:-1], Record(settings, {**values, name: bad})])[0] == "falsified"


def test_a_faster_squared_error_is_falsified(records):
    def swapped(settings):
        other = {SQUARED: CROSS, CROSS: SQUARED}
        return {**settings, "loss": other[settings["loss"]]} if settings["rate"] == 0.15 else settings

    assert verdicts([Record(swapped(settings), values) for settings, values in records])[1] == "falsified"


def test_no_common_rate_is_undecided():
    config = msgspec.convert({**SETTINGS, "trainings": SETTINGS["trainings"][:2]}, one_neuron.Config)
    records = [piece for piece in one_neuron.run(config) if isinstance(piece, Record)]
    assert verdicts(records, config) == ["holds", "undecided"]


@pytest.mark.parametrize(
    "wrong", [{"num_steps": 0}, {"starts": []}, {"trainings": [{"loss": "hinge", "rate": 0.1}]}, {"starts": [[1.0]]}]
)
def test_config_refuses(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**SETTINGS, **wrong}, one_neuron.Config)
