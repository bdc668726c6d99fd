"""Functions: which inputs, which gradient, which truth, and the bound of jprob in u of float32."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import regimes, truth
from .regimes import Regimes, Sizes
from .truth import Truth


def gap(*rows: np.ndarray) -> float:
    """R: the largest gap between the finite logits of a row."""
    return max(float(np.ptp(row[np.isfinite(row)])) for row in rows)


def _logits_bound(*rows: np.ndarray) -> tuple[float, float]:
    return 16 + gap(*rows), 16 + gap(*rows)


def _cdf_bound(x: float, loc: float, scale: float) -> tuple[float, float]:
    r = (x - loc) / scale
    return 16 + 3 * min(r, 0.0) ** 2, 16 + 3 * r**2


def _log_cdf_bound(x: float, loc: float, scale: float) -> tuple[float, float]:
    above = max((x - loc) / scale, 0.0)
    return 16 + 3 * above**2, 48 + 3 * above**2


def _interval_bound(low: float, high: float, loc: float, scale: float) -> tuple[float, float]:
    a, b = (low - loc) / scale, (high - loc) / scale
    nearest, farthest = max(a, -b, 0.0), max(abs(a), abs(b))
    return 24 + 3 * nearest**2, 24 + 3 * farthest**2


def _condition_bound(tril: np.ndarray) -> tuple[float, float]:
    k = float(np.max(np.abs(np.linalg.inv(tril)) @ np.abs(tril) @ np.ones(len(tril))))
    return 8 + 4 * len(tril) * k, 8 + 4 * len(tril) * k


class Function(NamedTuple):
    """A function of LIBRARIES."""

    inputs: Callable[[Sizes, np.random.Generator], Regimes]
    argnums: tuple[int, ...]  # the arguments that the gradient is taken in
    truth: Callable[..., Truth]
    bound: Callable[..., tuple[float, float]]  # of value and gradient, for one example
    is_map: bool = False  # one value a class; the gradient is that of the entry of the label


FUNCTIONS = {
    "softmax": Function(
        regimes.labelled, (0,), truth.softmax, lambda z, y: (16 + gap(z), 24 + 3 * gap(z)), is_map=True
    ),
    "log_softmax": Function(regimes.labelled, (0,), truth.log_softmax, lambda z, y: _logits_bound(z), is_map=True),
    "cross_entropy": Function(regimes.labelled, (0,), truth.cross_entropy, lambda z, y: _logits_bound(z)),
    "cross_entropy, soft": Function(regimes.targets, (0,), truth.soft_cross_entropy, lambda z, t: _logits_bound(z)),
    "brier_score": Function(regimes.labelled, (0,), truth.brier_score, lambda z, y: (24 + 2 * gap(z), 24 + 3 * gap(z))),
    "entropy": Function(regimes.labelled, (0,), truth.entropy, lambda z, y: _logits_bound(z)),
    "kl_divergence": Function(regimes.pairs, (0, 1), truth.kl_divergence, _logits_bound),
    "js_divergence": Function(regimes.pairs, (0, 1), truth.js_divergence, _logits_bound),
    "bernoulli.cross_entropy": Function(
        regimes.single_logits, (0,), truth.bernoulli_cross_entropy, lambda z, y: (16, 16)
    ),
    "bernoulli.entropy": Function(regimes.single_logits, (0,), truth.bernoulli_entropy, lambda z, y: (16, 16)),
    "bernoulli.kl_divergence": Function(
        regimes.single_pairs, (0, 1), truth.bernoulli_kl_divergence, lambda p, q: (16 + max(abs(p), abs(q)),) * 2
    ),
    "gaussian.log_prob": Function(regimes.points, (0, 1, 2), truth.log_prob, lambda *args: (8, 8)),
    "gaussian.cdf": Function(regimes.points, (0, 1, 2), truth.cdf, _cdf_bound),
    "gaussian.log_cdf": Function(regimes.points, (0, 1, 2), truth.log_cdf, _log_cdf_bound),
    "gaussian.interval_prob": Function(regimes.intervals, (0, 1, 2, 3), truth.interval_prob, _interval_bound),
    "gaussian.kl_divergence": Function(
        regimes.gaussian_pairs, (0, 1, 2, 3), truth.gaussian_kl_divergence, lambda *args: (16, 16)
    ),
    "gaussian.quantile": Function(regimes.levels, (0, 1, 2), truth.quantile, lambda *args: (16, 32)),
    "gaussian.entropy": Function(regimes.scales, (0,), truth.gaussian_entropy, lambda scale: (4, 4)),
    "mvn.log_prob": Function(
        regimes.vectors, (0, 1, 2), truth.mvn_log_prob, lambda x, loc, tril: _condition_bound(tril)
    ),
    "expectation.variance": Function(
        regimes.outcomes, (0, 1), truth.variance, lambda v, z: (32 + 2 * gap(z), 32 + 3 * gap(z))
    ),
}
