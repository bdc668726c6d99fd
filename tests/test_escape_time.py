"""Escape times: closed forms against integrated flows, steps against plain loops, and verdicts that can fail."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from experiments import plots
from experiments.arms import LINEAR_SE, SOFTMAX_CE, SOFTMAX_SE
from experiments.results import Progress, Record
from experiments.studies import escape_time

LABEL = np.array([1.0, 0.0])


def gradient(arm, z):
    """From the definitions, in float64."""
    if arm == LINEAR_SE:
        return z - LABEL
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    e = p - LABEL
    return e if arm == SOFTMAX_CE else p * (e - p @ e)


@pytest.mark.parametrize("arm", escape_time.ARMS)
@pytest.mark.parametrize("margin", [0.1, 1.0, 5.0, 9.0])
@pytest.mark.parametrize("level", [0.5, -2.0])
def test_flow_time_is_that_of_the_integrated_flow(arm, margin, level):
    want = escape_time.flow_time(arm, np.array([margin]))
    path = solve_ivp(
        lambda _, z: -gradient(arm, z),
        (0, 1.5 * want[0]),
        [level - margin / 2, level + margin / 2],
        "DOP853",
        events=lambda _, z: z[1] - z[0],
        rtol=1e-11,
        atol=1e-12,
    )
    # The integrator keeps 1e-11 a step and takes some hundred steps.
    np.testing.assert_allclose(path.t_events[0], want, rtol=1e-8)


# .999 in float32 is off by 1.3e-8, that is by 1.3e-5 of 1 - .999^n for any n. This is by far Adam's largest rounding.
# It is optax's rounding. A plain loop that makes it too is matched twenty times better.
with jax.numpy_dtype_promotion("standard"):  # a float to an integer power, as optax has it
    BIAS = np.asarray(1 - jnp.array([[0.9, 0.999]], jnp.float32) ** jnp.arange(1, 100)[:, None], np.float64)


def by_hand(arm, rule, margin, rate, eps, momentum=0.9):
    """The same escape as a plain float64 loop; only Adam's 1 - decay^n are those that float32 has."""
    z = np.array([-margin, margin]) / 2 + (0.5 if arm == LINEAR_SE else 0)
    first = second = np.zeros(2)
    for index in range(100_000):
        g, before = gradient(arm, z), z[1] - z[0]
        if rule == "SGD":
            z = z - rate * g
        elif rule == "momentum":
            first = momentum * first + g
            z = z - rate * first
        else:
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            mean, square = first / BIAS[index, 0], second / BIAS[index, 1]
            z = z - rate * mean / (np.sqrt(square) + eps)
        after = z[1] - z[0]
        if after <= 0:
            return index + before / (before - after)
    raise AssertionError("no escape")


def sgd(margin, rate, limit):
    """An escape under squared error: the steps made, and those that it took."""
    lanes = escape_time.Lanes(*(jnp.array([x], jnp.float32) for x in (margin, rate, 0.0)))
    *_, (steps, state) = escape_time.escape(SOFTMAX_SE, "SGD", 0.9, lanes, limit)
    return steps, escape_time.steps_taken(state)


def test_a_lane_that_does_not_escape_is_nan():
    steps, taken = sgd(18.0, 1e-3, 1000)
    assert steps == escape_time.CHUNK
    assert np.isnan(taken).all()


def test_sum_is_exact():
    rng = np.random.default_rng(0)
    z, update = (rng.standard_normal(4096) * 10.0 ** rng.integers(-12, 4, 4096) for _ in range(2))
    z, update = z.astype(np.float32), update.astype(np.float32)
    total, lost = jax.jit(escape_time.add)(z, np.zeros_like(z), update)
    for a, b, t, r in zip(
        z.tolist(), update.tolist(), np.asarray(total).tolist(), np.asarray(lost).tolist(), strict=True
    ):
        assert Fraction(t) + Fraction(r) == Fraction(a) + Fraction(b)


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
def test_plain_parameters_stall_where_a_step_is_half_an_ulp(rate):
    margin = escape_time.STALL_MARGINS
    stalls = escape_time.stalls(rate, margin)
    place = escape_time.stall_margin(rate)
    # Rounding of the margin and of the gradient blurs the place by 1e-6: one grid point of .01 at most.
    assert stalls[margin > place + 0.015].all()
    assert not stalls[margin < place - 0.015].any()


def test_compensated_parameters_do_not():
    margin = 16.25
    assert escape_time.stalls(1.0, np.array([margin])).all()
    # (16 + 3 R) u = 4e-6 for the gradients, and the flow's own lr / T = 1e-6.
    time = escape_time.flow_time(SOFTMAX_SE, np.array([margin]))
    np.testing.assert_allclose(sgd(margin, 1.0, 10_000_000)[1], time, rtol=1e-5)


@pytest.mark.parametrize("eps", [1e-2, 1e-4, 1e-5])
def test_knee_of_the_theory_is_near_its_name(eps):
    margins = np.arange(0.5, 14.01, 0.5)
    steps = escape_time.predicted_steps(SOFTMAX_SE, "Adam", 0.01, eps, 0.9, margins)
    slope = escape_time.growth({"margin": margins, "steps": steps}, 0.01)
    # ln(2 / eps) leaves out (1 + e^-m)^3, 3 e^-m = 1.5 eps of it; a secant over .5 is 1 % steeper than the tangent.
    assert escape_time.knee(*slope) == pytest.approx(math.log(2 / eps), abs=0.03)


def test_knee_needs_a_crossing():
    margin = np.arange(4.0)
    assert escape_time.knee(margin, np.array([1.0, 1.0, 1.0, 1.0])) == math.inf
    assert escape_time.knee(margin, np.array([3.0, 3.0, 3.0, 3.0])) == math.inf
    assert escape_time.knee(margin, np.array([1.0, np.nan, np.nan, np.nan])) == math.inf
    assert escape_time.knee(margin, np.array([1.0, 1.0, 4.0, 9.0])) == pytest.approx(1.5)


SETTINGS = {
    "max_margin": 8.0,
    "margin_step": 0.5,
    "learning_rates": [0.01, 0.1],
    "momentum": 0.9,
    "adam_eps": [1e-2, 1e-8],
    "max_steps": 50_000,
}
CONFIG = msgspec.convert(SETTINGS, escape_time.Config)


@pytest.fixture(scope="module")
def records():
    with jax.numpy_dtype_promotion("standard"):  # optax's adam multiplies floats by an integer count
        pieces = list(escape_time.run(CONFIG))
    done = [piece.done for piece in pieces if isinstance(piece, Progress)]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(1)
    return [piece for piece in pieces if isinstance(piece, Record)]


@pytest.mark.parametrize("arm", escape_time.ARMS)
@pytest.mark.parametrize("rule", escape_time.RULES)
def test_escape_makes_the_steps_of_a_plain_loop(records, arm, rule):
    margins, eps = [0.5, 1.5, 4.5], 1e-2 if rule == "Adam" else 0.0
    want = [by_hand(arm, rule, margin, 0.1, eps) for margin in margins]
    ((_, measured),) = [r for r in records if r.settings == {"arm": arm, "rule": rule, "rate": 0.1, "eps": eps}]
    got = measured["steps"][np.isin(measured["margin"], margins)]
    # A gradient errs by (16 + 3 * 5) u = 2e-6 of itself, and so do the steps. Each of Adam's n <= 46 updates rounds its
    # moments 3 or 4 times; the first forgets after 10, the second's root halves: 31 + 3 * 10 + 4 * 46 / 2 = 153 u.
    np.testing.assert_allclose(got, want, rtol=1e-5 if rule == "Adam" else 4e-6)


def verdicts(records, config=CONFIG):
    return [hypothesis.verdict for hypothesis in escape_time.report(config, records).hypotheses]


def test_report(records):
    with plots.style():
        section = escape_time.report(CONFIG, records)
    assert [hypothesis.verdict for hypothesis in section.hypotheses] == ["holds"] * 3
    assert all(plots.svg(plot.figure).startswith("<svg") for plot in section.plots)
    assert all(len(row) == len(table.header) for table in section.tables for row in table.rows)
    # B by SGD at lr .01: e^m / .04 > 50 000 from m = 7.6 on, that is the start 8 alone.
    assert "\n\n1 combinations" in section.text


def test_starts_out_of_reach_are_left_out():
    lanes, left_out = escape_time.plan(msgspec.structs.replace(CONFIG, max_steps=500, learning_rates=[0.1]))[
        SOFTMAX_SE, "SGD"
    ]
    margins = np.arange(0.5, 8.01, 0.5)
    reached = margins[escape_time.flow_time(SOFTMAX_SE, margins) / 0.1 <= 500]
    assert lanes == [(m, 0.1, 0.0) for m in reached]
    assert left_out == 16 - len(reached) > 0


def test_nothing_to_decide_is_undecided(records):
    # No rate is gentle, and the knee at ln(2e8) = 19 is beyond the starts.
    config = msgspec.structs.replace(CONFIG, learning_rates=[0.1], adam_eps=[1e-8])
    kept = [r for r in records if r.settings["rate"] == 0.1 and r.settings["eps"] != 1e-2]
    assert verdicts(kept, config) == ["undecided"] * 3


def changed(records, change, **where):
    out = []
    for settings, values in records:
        hit = all(settings[name] == value for name, value in where.items())
        out.append(Record(settings, {**values, "steps": change(values)} if hit else values))
    return out


@pytest.mark.parametrize("arm", escape_time.ARMS)
@pytest.mark.parametrize("wrong", [1.03, 0.97, np.nan])
def test_a_wrong_time_is_falsified(records, arm, wrong):
    where = {"arm": arm, "rule": "SGD", "rate": 0.01}
    assert verdicts(changed(records, lambda v: v["steps"] * wrong, **where))[0] == "falsified"


@pytest.mark.parametrize("rate", [0.01, 0.1])
@pytest.mark.parametrize("shift", [-2.5, 2.5, math.inf])
def test_a_wrong_knee_is_falsified(records, rate, shift):
    def moved(values):
        m = values["margin"]
        eps = 2 * math.exp(-math.log(2 / 1e-2) - shift)
        return escape_time.predicted_steps(SOFTMAX_SE, "Adam", rate, eps, 0.9, m)

    where = {"arm": SOFTMAX_SE, "rule": "Adam", "rate": rate, "eps": 1e-2}
    after = verdicts(changed(records, moved, **where))
    assert after[1:] == (["falsified", "holds"] if rate == 0.01 else ["holds", "falsified"])


@pytest.mark.parametrize("wrong", [{"learning_rates": [2.0]}, {"momentum": 1.0}, {"max_steps": 10}, {"adam_eps": []}])
def test_config_refuses(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**SETTINGS, **wrong}, escape_time.Config)
