"""The cause of the gap: gradients of all arms against float64, inputs with equal logits, and verdicts that can fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data, plots
from experiments.results import Record, Value
from experiments.studies import cause
from experiments.studies.cause import ARMS, INPUTS, RESCALED, SOFTMAX_CE, SOFTMAX_SE, WEIGHTED, Member

CONFIG = cause.Config(std=4.0, epochs=1, batch_size=512, decades=[-1.0, -0.5], widen_at_most=0, selection_seeds=1,
                      report_seeds=2, trained_together=4)  # fmt: skip
Z = np.array([[0.5, -1.0, 2.0], [3.0, 0.0, 0.25], [0.0, 12.0, 1.0]])
Y = np.array([0, 2, 0])


def by_hand(z, y):
    """The gradient of each arm in float64, and p - y."""
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    e = p - np.eye(z.shape[1])[y]
    square = p * (e - np.sum(p * e, axis=1, keepdims=True))
    size = np.linalg.norm(e, axis=1, keepdims=True) / np.linalg.norm(square, axis=1, keepdims=True)
    true = p[np.arange(len(y)), y][:, None]
    return {SOFTMAX_CE: e, SOFTMAX_SE: square, RESCALED: size * square, WEIGHTED: 2 * true * (1 - true) * e}


@pytest.mark.parametrize("arm", ARMS)
def test_the_gradient_of_an_arm_is_its_formula(arm):
    """Each entry to 32 u of the largest of its row: gaps of 12 and two factors."""
    z, y, want = jnp.float32(Z), jnp.asarray(Y), by_hand(Z, Y)[arm]
    got = jax.grad(lambda z: jnp.sum(jax.lax.stop_gradient(cause.gradient(jnp.array(ARMS.index(arm)), z, y)) * z))(z)
    bound = 64 * 2.0**-24 * np.abs(want).max(axis=1, keepdims=True)
    assert (np.abs(got - want) <= bound).all()


def test_weighted_cross_entropy_is_squared_error_for_two_classes():
    two = by_hand(Z[:, :2], np.array([0, 1, 0]))
    np.testing.assert_allclose(two[WEIGHTED], two[SOFTMAX_SE], rtol=1e-9)  # p - y cancels to 1e-5


def test_a_rescaled_gradient_keeps_its_size_where_squared_error_underflows():
    z, y = jnp.array([[0.0, 90.0, 0.0]]), jnp.array([0])
    g = cause.gradient(jnp.array(ARMS.index(RESCALED)), z, y)
    assert jnp.isfinite(g).all()
    middle = cause.gradient(jnp.array(ARMS.index(RESCALED)), z / 2, y)
    assert float(jnp.linalg.norm(middle)) == pytest.approx(np.sqrt(2), rel=1e-5)


def test_squared_error_preconditioned_is_cross_entropy_and_a_wrong_gradient_is_seen():
    z, y = jnp.float32(Z), jnp.asarray(Y)
    entropy, square = (cause.gradient(jnp.array(ARMS.index(a)), z, y) for a in (SOFTMAX_CE, SOFTMAX_SE))
    assert cause.identity(z, square, entropy)["identity"] <= cause.IDENTITY
    assert cause.identity(z, square.at[1, 0].multiply(1.01), entropy)["identity"] > cause.IDENTITY


@pytest.mark.parametrize(
    ("row", "counts"),
    [
        ([0.0, 60.0, 1.0], True),  # wrong: g is e^-60
        ([0.0, 80.0, 1.0], False),  # g is a normal number still, of which underflow may have taken 2^-11
        ([34.0, 0.0, 1.0], True),  # right: e is e^-33, and g is e^-67
        ([46.0, 0.0, 1.0], False),  # g has underflown
        ([500.0, 0.0, 1.0], False),  # e is 0
    ],
)
def test_an_example_counts_in_the_identity_unless_its_gradient_underflows(row, counts):
    z, y = jnp.array([row]), jnp.array([0])
    found = cause.identity(z, *(cause.gradient(jnp.array(ARMS.index(a)), z, y) for a in (SOFTMAX_SE, SOFTMAX_CE)))
    assert int(found["identified"]) == counts
    assert found["identity"] <= cause.IDENTITY


@pytest.mark.parametrize("inputs", INPUTS)
def test_inputs_are_what_they_are_called_and_start_with_equal_logits(inputs):
    params, (train, _, test) = cause.drawn(inputs, 1, 4.0)
    raw, _ = cause.drawn("raw", 1, 4.0)
    x = data.resampled("digits", 1).train.features
    if inputs != "raw":
        np.testing.assert_allclose(train.features.mean(axis=0), 0, atol=1e-5)
    if inputs == "whitened":
        covariance = np.cov(train.features.T, bias=True)
        kept = np.diag(covariance) > 0.5
        assert kept.sum() > 40
        # Each float32 feature is off by 2^-24 of itself, and features have variance 1: twice that, and as much room.
        np.testing.assert_allclose(covariance, np.diag(kept), atol=4 * 2.0**-24)
    size = [np.sqrt(np.mean(np.square(a @ b["kernel"]))) for a, b in ((x, raw), (train.features, params))]
    assert size[1] == pytest.approx(size[0], rel=1e-4)
    assert test.features.shape == (450, 64)


def test_it_runs_small_and_reports():
    records = [record for record in cause.run(CONFIG) if isinstance(record, Record)]
    assert [tuple(r.settings.values()) for r in records] == [(i, a) for i in INPUTS for a in ARMS]
    with plots.style():
        section = cause.report(CONFIG, records)
    assert section.hypotheses[-1].verdict == "holds"
    counted = min(np.min(r.values["identified"]) for r in records)
    assert counted > 0.75 * len(data.load("digits").train.labels)


def test_members_do_not_know_each_other():
    train = cause.trainer("raw", CONFIG)
    alone, other = Member(SOFTMAX_SE, 0, 3), Member(SOFTMAX_CE, 1, 4)
    np.testing.assert_allclose(train([alone])["test"][0], train([other, alone])["test"][1], rtol=1e-6)


def records(gaps, spread=0.5):
    """Accuracies by arm on raw inputs, and of squared error on whitened ones, below 90."""
    noise = spread * np.array([-1.0, 1.0, -0.5, 0.5])
    for inputs in INPUTS:
        for arm in ARMS:
            below = gaps.get("whitened" if inputs == "whitened" and arm == SOFTMAX_SE else arm, 0.0)
            test = 90 - below - noise * (arm != SOFTMAX_CE)
            values: dict[str, Value] = {
                "test": test,
                "margin": 9 + noise,
                "wrong": 90 + noise,
                "identity": 1e-6 + 0 * noise,
            }
            values |= {"identified": 95 + noise, "rate": 0.1, "at_edge": float(inputs == "whitened")}
            yield Record({"inputs": inputs, "arm": arm}, values)


@pytest.mark.parametrize(
    ("gaps", "verdicts"),
    [
        ({SOFTMAX_SE: 30.0, RESCALED: 3.0, WEIGHTED: 25.0, "whitened": 10.0}, ["holds", "holds", "holds"]),
        ({SOFTMAX_SE: 30.0, RESCALED: 25.0, WEIGHTED: 5.0, "whitened": -10.0}, ["falsified"] * 3),
        ({SOFTMAX_SE: 30.0, RESCALED: 15.0, WEIGHTED: 15.0, "whitened": 0.0}, ["undecided"] * 3),
        # Without a gap there is no half of it: neither arm can explain what is not there.
        ({SOFTMAX_SE: 0.0, RESCALED: -10.0, WEIGHTED: 10.0, "whitened": 0.0}, ["undecided"] * 3),
    ],
)
def test_verdicts_follow_the_gaps(gaps, verdicts):
    with plots.style():
        made = cause.report(CONFIG, [*records(gaps)]).hypotheses
    assert [h.verdict for h in made[:3]] == verdicts
    assert [sum("edge" in line for line in h.against) for h in made] == [0, 0, len(ARMS), 0]


def test_an_identity_without_examples_is_undecided():
    far = [Record(s, {**v, "identified": np.zeros(4)}) for s, v in records({SOFTMAX_SE: 30.0})]
    with plots.style():
        assert cause.report(CONFIG, far).hypotheses[-1].verdict == "undecided"
