"""The late phase: the flow against the flow of all logits, steps against plain loops, and verdicts that can fail."""

import math

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

from experiments import plots
from experiments.arms import LINEAR_SE, SOFTMAX_CE, SOFTMAX_SE
from experiments.results import Record
from experiments.studies import late_phase

CONFIG = late_phase.Config(other_classes=4, learning_rate=0.1, max_tau=1000.0)


def gradient(arm, z):
    """From the definitions, in float64."""
    y = np.eye(len(z))[0]
    if arm == LINEAR_SE:
        return z - y
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    e = p - y
    return e if arm == SOFTMAX_CE else p * (e - p @ e)


@pytest.mark.parametrize("arm", late_phase.ARMS)
@pytest.mark.parametrize("num_classes", [2, 5])
def test_the_flow_of_the_margin_is_that_of_all_logits(arm, num_classes):
    tau = np.array([0.1, 1.0, 10.0])
    path = solve_ivp(
        lambda _, z: -gradient(arm, z), (0, 10), np.zeros(num_classes), "DOP853", t_eval=tau, rtol=1e-11, atol=1e-13
    )
    # The integrator keeps 1e-11 a step and takes some dozen steps; e^-10 of a linear output magnifies its error.
    want = late_phase.error(arm, path.y.T)
    np.testing.assert_allclose(late_phase.flow(arm, num_classes, tau), want, rtol=1e-6)


@pytest.mark.parametrize(("arm", "a"), [(SOFTMAX_CE, 1), (SOFTMAX_SE, 2)])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_the_law_is_the_limit_of_the_flow(arm, a, num_classes):
    """The time is the integral of `dq / (c^a q^(a + 1) (1 - q)^a)`, taken in u = 1 / q."""
    c = num_classes / (num_classes - 1)
    q0 = 1 / c

    def time(q):
        return quad(lambda u: u ** (2 * a - 1) / (c * (u - 1)) ** a, 1 / q0, 1 / q, epsrel=1e-11)[0]

    tau = np.array([30.0, 1e3])
    got = late_phase.flow(arm, num_classes, tau)
    np.testing.assert_allclose([time(q) for q in got], tau, rtol=1e-7)
    tau = np.array([1e3, 1e7])
    off = np.abs(late_phase.flow(arm, num_classes, tau) / late_phase.limit(arm, num_classes, tau) - 1)
    assert off[1] < min(0.01, off[0] / 10)


@pytest.fixture(scope="module")
def records():
    return [record for record in late_phase.run(CONFIG) if isinstance(record, Record)]


def test_steps_are_those_of_a_plain_loop(records):
    """500 steps in float64, each of some 20 roundings, whose errors do not grow: the flow is contracting."""
    for settings, values in records:
        if settings["code"] == late_phase.DOUBLE:
            z, arm, steps = np.zeros(settings["num_classes"]), settings["arm"], np.round(values["tau"] / 0.1)
            path = [z := z - 0.1 * gradient(arm, z) for _ in range(500)]
            few = steps[steps <= 500].astype(int)
            want = late_phase.error(arm, np.array(path)[few - 1])
            np.testing.assert_allclose(values["error"][: few.size], want, rtol=1e-10, atol=1e-14)


def test_steps_follow_the_flow(records):
    """The error of Euler's method is of the order of the rate; that of a distance e^-tau grows with tau.

    Float32 errs by half an ulp a step at most, 2.4e-7 of a logit near 4. A step is 2e-5 or more.
    """
    assert len(records) == 10
    for settings, values in records:
        if settings["arm"] != LINEAR_SE:
            want = late_phase.flow(settings["arm"], settings["num_classes"], values["tau"])
            np.testing.assert_allclose(values["error"], want, rtol=CONFIG.learning_rate)


def test_verdicts_follow_the_exponents(records):
    def verdicts(arm=None, power=0.0, values_of=lambda error: error):
        def change(settings, values):
            scaled = values_of(values["error"] * values["tau"] ** power)
            return values | {"error": scaled} if settings["arm"] == arm else values

        with plots.style():
            section = late_phase.report(CONFIG, [Record(s, change(s, v)) for s, v in records])
        return [h.verdict for h in section.hypotheses]

    # At time 1000 the exponents are within .02 of those claimed.
    assert verdicts() == ["holds", "holds"]
    for power in (-0.06, 0.06):
        assert verdicts(SOFTMAX_CE, power) == ["falsified", "holds"]
        assert verdicts(SOFTMAX_SE, power) == ["holds", "falsified"]
    assert verdicts(SOFTMAX_CE, values_of=lambda error: error * math.nan) == ["falsified", "holds"]
