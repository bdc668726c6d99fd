"""The study of imbalance: the best classifier against independent truth, trainings near it, verdicts that can fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import balanced_accuracy_score

from experiments import plots
from experiments.arms import SOFTMAX_CE, SOFTMAX_SE
from experiments.results import Record
from experiments.studies import imbalance
from jprob import categorical

CONFIG = imbalance.Config(
    ratios=[1, 20],
    rare_classes=2,
    distance=3.0,
    other_features=2,
    train_examples=2000,
    examples_per_class=400,
    batch_size=100,
    num_steps=200,
    log_every=20,
    decades=[0.0, 0.5],
    widen_at_most=0,
    selection_seeds=1,
    report_seeds=4,
    trained_together=2,
)


@pytest.mark.parametrize("prior", [0.5, 0.99])
def test_the_best_recall_of_two_classes_has_a_closed_form(prior):
    """a (x_0 - x_1) has mean a^2 and variance 2 a^2 in class 0."""
    both, log_odds = np.array([prior, 1 - prior]), np.log(prior / (1 - prior))
    want = norm.cdf((9 + np.array([log_odds, -log_odds])) / (3 * np.sqrt(2)))
    np.testing.assert_allclose(imbalance.best_recalls(both, 3.0), want, rtol=1e-9)


def test_the_best_recalls_are_those_of_the_rule():
    """The recalls of 200 000 draws have four standard errors of room."""
    prior = CONFIG.counts(20) / CONFIG.train_examples
    want = imbalance.best_recalls(prior, CONFIG.distance)
    x = np.random.default_rng(0).normal(size=(200_000, 3))
    for k, recall in enumerate(want):
        given = np.argmax(CONFIG.distance * (x + CONFIG.distance * np.eye(3)[k]) + np.log(prior), axis=1)
        assert np.mean(given == k) == pytest.approx(recall, abs=4 * np.sqrt(recall * (1 - recall) / 200_000))


def test_a_rare_example_weighs_2_p_under_squared_error():
    """The model knows the prior: the right class has p = 1 / 102, and another nearly all the rest."""
    z = jnp.log(jnp.array([100.0, 1.0, 1.0]))
    half_brier = jax.grad(lambda z: categorical.brier_score(z, jnp.array(1)) / 2)(z)[1]
    cross_entropy = jax.grad(lambda z: categorical.cross_entropy(z, jnp.array(1)))(z)[1]
    assert half_brier / cross_entropy == pytest.approx(2 / 102, rel=0.03)  # terms of order p are left out


def test_the_constant_class_has_the_base_rate():
    labels = np.repeat(np.arange(3), CONFIG.counts(20))
    accuracy, balanced = imbalance.constant(CONFIG, 20)
    assert accuracy == pytest.approx(100 * np.mean(labels == 0), rel=1e-6)
    assert balanced == pytest.approx(100 * balanced_accuracy_score(labels, np.zeros_like(labels)), rel=1e-6)


def test_a_training_comes_near_the_best_classifier():
    """The deviation of balanced accuracy over 1200 test examples is .9 points. Four, and 2 points of fit, are left."""
    members = [imbalance.Member(20, 0, seed) for seed in (1, 2)]
    measured = imbalance.trainer(SOFTMAX_CE, CONFIG)(members)
    assert measured["balanced"].shape == (2, 10)
    accuracy, balanced = imbalance.best_scores(CONFIG, 20)
    np.testing.assert_allclose(measured["balanced"][:, -1], balanced, atol=4 * 0.9 + 2)
    np.testing.assert_allclose(measured["accuracy"][:, -1], accuracy, atol=2)
    frequent = 3 * measured["balanced"] - 2 * measured["recall"]  # balanced accuracy is the mean recall
    prior = CONFIG.counts(20) / CONFIG.train_examples
    want = prior[0] * frequent + (1 - prior[0]) * measured["recall"]  # both rare classes weigh the same
    # Some sixteen roundings of numbers up to 100 lie between the two.
    np.testing.assert_allclose(measured["accuracy"], want, atol=16 * 100 * 2.0**-24)


def made(plain, balanced):
    """Records with these leads of cross-entropy, in points, with a spread of a hundredth."""
    for arm in imbalance.ARMS:
        for ratio in CONFIG.ratios:
            for seed in range(CONFIG.report_seeds):
                lead = (arm == SOFTMAX_CE) * (1 + 0.01 * seed)
                leads = dict.fromkeys(imbalance.MEASURES, 0.0) | {"accuracy": plain, "balanced": balanced}
                values = {name: np.full(10, 80.0) + lead * by for name, by in leads.items()}
                values |= {"rate": 1.0, "at_edge": 1.0}
                yield Record({"part": "seeds", "arm": arm, "ratio": ratio, "seed": seed}, values)


def test_verdicts_follow_the_trainings():
    def verdicts(plain, balanced):
        curves = imbalance.curves_of(CONFIG, list(made(plain, balanced)))
        return [imbalance.lag_hypothesis(CONFIG, curves).verdict, imbalance.hidden_hypothesis(CONFIG, curves).verdict]

    assert verdicts(0.1, 3.0) == ["holds", "holds"]
    assert verdicts(-0.1, 0.2) == ["holds", "falsified"]
    assert verdicts(2.0, 3.0) == ["holds", "falsified"]
    assert verdicts(-2.0, 3.0) == ["holds", "falsified"]
    assert verdicts(0.0, 0.0) == ["falsified", "falsified"]
    assert verdicts(0.0, -3.0) == ["falsified", "falsified"]
    assert verdicts(0.4925, 3.0) == ["holds", "undecided"]
    with plots.style():
        lag, hidden = imbalance.report(CONFIG, list(made(0.1, 3.0))).hypotheses
    assert (lag.verdict, hidden.verdict) == ("holds", "holds")
    assert "+3.0" in lag.measured
    assert sum("edge" in line for line in lag.against) == 4
    assert SOFTMAX_SE in "".join(lag.against)
