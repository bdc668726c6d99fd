"""The order of the examples: each once an epoch, every order as likely as any other, and the same from wherever."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jprob.mle import _order

batches = jax.jit(_order.batches, static_argnums=(2, 3, 4))


def orders(size, count):
    """[count, size]: the first epoch under so many keys."""
    one = jax.jit(jax.vmap(lambda key: _order.batches(key, jnp.array(0), size, 1, size)[0]))
    return np.asarray(one(jax.random.split(jax.random.key(size), count)))


@pytest.mark.parametrize(("size", "batch_size"), [(1, 1), (2, 3), (10, 10), (12, 4), (13, 4), (1000, 128)])
def test_every_example_comes_once_an_epoch(size, batch_size):
    steps = -(-size // batch_size)
    rows = np.asarray(batches(jax.random.key(0), jnp.array(0), size, 3 * steps, batch_size))
    epochs = rows.reshape(3, steps * batch_size)
    assert (np.sort(epochs[:, :size], axis=1) == np.arange(size)).all()
    assert (epochs[:, size:] == size).all()
    if size >= 10:
        assert (epochs[0] != epochs[1]).any()
        assert (epochs[1] != epochs[2]).any()


@pytest.mark.parametrize(("start", "num_steps"), [(0, 1), (3, 1), (2, 5), (7, 9), (999, 4)])
def test_a_batch_follows_from_its_step(start, num_steps):
    whole = np.asarray(batches(jax.random.key(1), jnp.array(0), 13, 1010, 4))
    part = batches(jax.random.key(1), jnp.array(start), 13, num_steps, 4)
    assert (part == whole[start : start + num_steps]).all()


def test_the_last_steps_that_can_be_counted_have_batches():
    rows = batches(jax.random.key(1), jnp.array(2**31 - 5, jnp.int32), 12, 3, 4)
    assert (np.sort(rows.ravel()) == np.arange(12)).all(), "2^31 - 5 is where an epoch of 3 steps begins"


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(size):
    drawn = orders(size, 50_000) @ size ** np.arange(size)
    _, counts = np.unique(drawn, return_counts=True)
    assert counts.size == math.factorial(size)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.slow
def test_large_orders_are_as_random_ones():
    """By what a shuffle with too few rounds gets wrong: places, distances, fixed points, kept successors, runs."""
    count, size = 10_000, 1000
    drawn = orders(size, count)
    poisson = np.append(stats.poisson(1).pmf(np.arange(5)), stats.poisson(1).sf(4)) * count

    def as_poisson(events):
        return stats.chisquare(np.bincount(np.minimum(events.sum(1), 5), minlength=6), poisson).pvalue

    steps, ranks = np.diff(drawn, axis=1), np.argsort(drawn[:, 3:6]) @ [9, 3, 1]
    pvalues = {
        "place": stats.chisquare(np.bincount(drawn[:, 333], minlength=size)).pvalue,
        "distance": stats.chisquare(np.bincount(steps[:, 0] % size, minlength=size)[1:]).pvalue,
        "fixed points": as_poisson(drawn == np.arange(size)),
        "successors": as_poisson(steps == 1),
        "predecessors": as_poisson(steps == -1),
        "order of three": stats.chisquare(np.unique(ranks, return_counts=True)[1]).pvalue,
    }
    assert min(pvalues.values()) > 1e-3, pvalues
