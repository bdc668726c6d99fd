"""Rates are tuned inside their grid, and ties go to the middle. Members are trained in chunks of one size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import arms, tuning


def test_the_grid_grows_until_the_best_rate_lies_inside():
    """Against a made-up accuracy with its peak at rate 7, far outside the grid."""
    asked = []

    def score(wanted):
        asked.extend(wanted)
        return np.array([80.0 - abs(rate - 7) for _, rate, _ in wanted])

    curve = tuning.tune(score, ["a"], [0, 1, 2], [5], 20)["a"]
    assert sorted(curve) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert tuning.best(curve) == 7
    assert tuning.outside(curve) is None
    assert len(asked) == 9, "nothing is trained twice"
    narrow = tuning.tune(score, ["a"], [0, 1, 2], [5], 0)["a"]
    assert tuning.outside(narrow) == 3, "an optimum at the edge is known as such"


def test_each_cell_has_its_scores_with_their_standard_errors():
    score = lambda wanted: np.array([cell + 10 * rate + seed for cell, rate, seed in wanted])  # noqa: E731
    curves = tuning.tune(score, [0.25, 0.5], [1, 0, -1], [3, 5], 0)
    assert curves[0.5] == {1: (14.5, 1.0), 0: (4.5, 1.0), -1: (-5.5, 1.0)}
    assert curves[0.25][1] == (14.25, 1.0)


def test_of_equally_good_rates_the_middle_one_is_taken():
    assert tuning.best({0: (1.0, 0.1), 1: (2.0, 0.1), 2: (2.0, 0.1), 3: (2.0, 0.1), 4: (0.0, 0.1)}) == 2
    # A rate within one standard error of the best ties with it, however small its own error is.
    assert tuning.best({0: (1.0, 0.0), 1: (1.9, 0.0), 2: (1.95, 0.0), 3: (2.0, 0.2), 4: (1.7, 0.0)}) == 2
    curve = {-1: (80.0, 1.0), 0: (90.0, 1.0), 1: (90.5, 1.0), 2: (89.8, 1.0), 3: (20.0, 0.0)}
    assert (tuning.ties(curve), tuning.best(curve), tuning.outside(curve)) == ([0, 1, 2], 1, None)
    assert tuning.outside({0: (3.0, 0.0), 1: (2.0, 0.0)}) == -1


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_members_are_trained_in_chunks_of_one_size_and_come_back_in_order(count):
    sizes = []

    def train(members):
        sizes.append(len(members))
        return {"square": np.square(members), "pair": np.stack([members, members], axis=1)}

    got = tuning.together(train, list(range(count)), 3)
    np.testing.assert_array_equal(got["square"], np.arange(count) ** 2)
    assert got["pair"].shape == (count, 2)
    assert sizes == [3] * -(-count // 3)


def test_arms_have_the_gradients_they_are_named_for():
    z, y = jnp.array([[0.5, -1.0, 2.0], [3.0, 0.0, 0.25]]), jnp.array([0, 2])
    p, target = np.asarray(jax.nn.softmax(z), np.float64), np.eye(3)[np.asarray(y)]
    e, s = p - target, 1 / (1 + np.exp(-np.asarray(z, np.float64)))
    want = {
        arms.SOFTMAX_CE: e,
        arms.SOFTMAX_SE: p * (e - np.sum(p * e, axis=1, keepdims=True)),
        arms.LINEAR_SE: np.asarray(z) - target,
        arms.SIGMOID_CE: s - target,
        arms.SIGMOID_SE: (s - target) * s * (1 - s),
    }
    for arm in arms.ALL:
        got = jax.grad(lambda z, arm=arm: arms.loss(arm, z, y).sum())(z)
        np.testing.assert_allclose(got, want[arm], rtol=0, atol=1e-6)  # softmax of float32, u = 6e-8, gaps of 3
