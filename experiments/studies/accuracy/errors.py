"""The measure: errors of values and gradients in u, and as shares of the bound of jprob."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import mpmath
import numpy as np
from mpmath import mpf

from experiments.results import Value

from .functions import Function
from .libraries import Results
from .regimes import Batch

DIGITS, SINGLE = 120, 2.0**-24
UNITS = {"float32": SINGLE, "bfloat16": 2.0**-8}


class Wanted(NamedTuple):
    """The truth of a batch as arrays [examples, entries]: float64, whose own error is 2^-29 u."""

    want: np.ndarray
    allowed: np.ndarray  # the error that jprob's bound admits


def error(got: np.ndarray, want: np.ndarray, dtype: str) -> np.ndarray:
    """Error of each entry in u, at most 1/u: NaN or infinite where the result is and the truth is not."""
    u, tiny, largest = UNITS[dtype], float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).max)
    want = np.where(np.abs(want) > largest, np.copysign(np.inf, want), want)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(got - want)
        off = np.minimum(distance / np.maximum(np.abs(want), tiny) / u, 1 / u)
    off = np.where(distance <= tiny, 0.0, off)
    off = np.where(np.isinf(want), np.where(got == want, 0.0, 1 / u), off)
    off = np.where(np.isinf(got) & np.isfinite(want), np.inf, off)
    return np.where(np.isnan(got) & ~np.isnan(want), np.nan, off)


def share(got: np.ndarray, wanted: Wanted, dtype: str) -> np.ndarray:
    """Error of each entry as a share of the bound: above 1, or NaN, it is broken."""
    off = error(got, wanted.want, dtype)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((off > 0) & np.isfinite(off), np.abs(got - wanted.want) / wanted.allowed, off)


def arguments(batch: Batch, i: int) -> list[Any]:
    """Example i, exactly."""

    def exactly(a: Any) -> Any:
        return tuple(map(exactly, a)) if isinstance(a, list) else mpf(a) if isinstance(a, float) else a

    return [exactly(array[i].tolist()) for array in batch]


def _as_float(x: Any) -> float:
    return float(x) if mpmath.isinf(x) or abs(x) < mpf(10) ** 300 else math.copysign(math.inf, x)


def wanted(function: Function, batch: Batch, dtype: str) -> tuple[Wanted, Wanted]:
    """The truth of value and gradient for every example of a batch."""
    with mpmath.workdps(DIGITS):
        truths = [function.truth(*arguments(batch, i)) for i in range(len(batch[0]))]
        bounds = [function.bound(*(array[i] for array in batch)) for i in range(len(batch[0]))]
        rounding = UNITS[dtype] if UNITS[dtype] > SINGLE else 0.0
        both = []
        for part in range(2):
            want = np.array([[_as_float(e.want) for e in truth[part]] for truth in truths])
            size = np.array([[_as_float(e.size) for e in truth[part]] for truth in truths])
            bound = SINGLE * np.array([pair[part] for pair in bounds])[:, None]
            both.append(Wanted(want, bound * size + (rounding * np.abs(want) if rounding else 0.0)))
    return both[0], both[1]


def compare(results: Results, truth: tuple[Wanted, Wanted], dtype: str) -> dict[str, Value]:
    """The largest error of value and gradient, the largest share of the bound, and the lowest value below 0."""
    n = len(truth[0].want)
    value, gradient = results[0].reshape(n, -1), np.concatenate([g.reshape(n, -1) for g in results[1]], axis=1)
    values: dict[str, Value] = {"lowest": float(np.min(np.nan_to_num(value)))}
    for part, got, true in (("value", value, truth[0]), ("gradient", gradient, truth[1])):
        values[part] = float(np.max(error(got, true.want, dtype)))
        values[f"{part} share"] = float(np.max(share(got, true, dtype)))
    return values
