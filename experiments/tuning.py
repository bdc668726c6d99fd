"""Learning rates tuned for each arm on a half-decade grid, and trainings of many members in one program.

A rate is given in half-decades: 2 stands for 10, -1 for 10^(-1/2).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np

Curve = dict[int, tuple[float, float]]  # by rate: mean validation score, and its standard error
Cell = TypeVar("Cell")
Training = TypeVar("Training")


class Member(NamedTuple):
    """One training of an arm."""

    arm: str
    rate: int
    seed: int


def tune(
    score: Callable[[list[tuple[Cell, int, int]]], np.ndarray],
    cells: Iterable[Cell],
    grid: Iterable[int],
    seeds: Sequence[int],
    widen_at_most: int,
) -> dict[Cell, Curve]:
    """The curve of each cell. Its grid grows while its best rate lies at the edge.

    Args:
      score: validation scores of trainings (cell, rate, seed), in their order.
      cells: what is tuned apart from the others.
      grid: rates to begin with.
      seeds: those that select, and report nothing.
      widen_at_most: how often a grid may grow.
    """
    tried: dict[Cell, Curve] = {cell: {} for cell in cells}
    grid = list(grid)
    wanted = [(cell, rate) for cell in tried for rate in grid]
    for _ in range(widen_at_most + 1):
        scores = score([(cell, rate, seed) for cell, rate in wanted for seed in seeds]).reshape(len(wanted), len(seeds))
        errors = scores.std(axis=1) / np.sqrt(max(1, len(seeds) - 1))
        for (cell, rate), mean, error in zip(wanted, scores.mean(axis=1), errors, strict=True):
            tried[cell][rate] = float(mean), float(error)
        wanted = [(cell, beyond) for cell, curve in tried.items() if (beyond := outside(curve)) is not None]
        if not wanted:
            break
    return tried


def of_arms(
    train: Callable[[list[Member]], dict[str, np.ndarray]],
    arms: Sequence[str],
    decades: Sequence[float],
    seeds: Sequence[int],
    widen_at_most: int,
) -> dict[str, Curve]:
    """The curve of each arm, by the value "validation" that `train` measures; decades are the ends of the grid."""

    def score(wanted):
        return train([Member(*each) for each in wanted])["validation"]

    low, high = (round(2 * end) for end in decades)
    return tune(score, arms, range(low, high + 1), seeds, widen_at_most)


def ties(curve: Curve) -> list[int]:
    """The rates within one standard error of the best score, ascending."""
    highest, error = max(curve.values())
    return sorted(rate for rate, (mean, _) in curve.items() if mean >= highest - error)


def best(curve: Curve) -> int:
    """The middle one of the ties."""
    top = ties(curve)
    return top[len(top) // 2]


def outside(curve: Curve) -> int | None:
    """The next rate beyond the edge of the grid that the best one lies at, if it does."""
    rate = best(curve)
    return {min(curve): rate - 1, max(curve): rate + 1}.get(rate)


def rate_text(rate: float) -> str:
    """Two digits of a learning rate, without an exponent while it is below a million.

    >>> rate_text(10**-2.5), rate_text(10**2.5)
    ('0.0032', '320')
    """
    return f"{float(f'{rate:.2g}'):g}"


def together(
    train: Callable[[Sequence[Training]], dict[str, np.ndarray]], members: Sequence[Training], size: int
) -> dict[str, np.ndarray]:
    """The measurements of all members by `train`, [members, ...] each. It sees `size` at a time, and compiles once."""
    full = [*members, *[members[-1]] * (-len(members) % size)]
    parts = [train(full[i : i + size]) for i in range(0, len(full), size)]
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(members)], *parts)
