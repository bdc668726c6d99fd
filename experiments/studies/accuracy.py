"""Accuracy: how many digits of a probability function, and of its gradient, survive in each library.

A formula can be stable and lose every digit all the same: logsumexp(z) - z_y never overflows, but where the model is
confident it is a difference of two nearly equal numbers. So each function is called where it is hard, not only where it
is usual, and every entry of its value and of its gradient is compared with the truth:

    error = |got - true| / max(|true|, smallest normal number) / u,    u = 2^-24 in float32, 2^-8 in bfloat16

with u half the spacing at 1 of the dtype of the inputs, the same unit for every library: 1 u is the rounding of a
result to that dtype, 1/u is "no digit", and more is counted as that. An error below the smallest normal number is none.
What is measured is the largest error of all entries and examples of a regime.

The truth is the definition in mpmath at 120 digits, with gradients in closed form, of the inputs as the dtype holds
them. Each comes with its size, the sum of the magnitudes of its terms: where they cancel (p - t for a soft target t),
the bounds of jprob are relative to the size, as its docstrings say, while the error above never is.

A peer's function is its own where it has one, called in the form its documentation recommends for logits, and else the
usual line made of its own primitives. A new peer is one entry in LIBRARIES.
"""

import importlib.util
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib import import_module
from typing import Annotated, Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import matplotlib
import mpmath
import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from mpmath import mpf

from experiments import plots
from experiments.config import distinct
from experiments.report import Hypothesis, Plot, Section, Table, decided
from experiments.results import Progress, Record, Setting, Value

OURS, ABSENT, DIGITS, SINGLE = "jprob", "absent", 120, 2.0**-24
UNITS = {"float32": SINGLE, "bfloat16": 2.0**-8}
PARTS = ("value", "gradient")
Several = msgspec.Meta(min_length=1, max_length=4)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every regime has `examples` examples, of the first number of classes; the others are one random regime each."""

    dtypes: Annotated[list[Literal["float32", "bfloat16"]], Several]
    functions: Annotated[list[str], msgspec.Meta(min_length=1)]
    libraries: Annotated[list[str], msgspec.Meta(min_length=1)]
    examples: Annotated[int, msgspec.Meta(ge=1, le=100)]
    num_classes: Annotated[list[Annotated[int, msgspec.Meta(ge=3, le=1000)]], Several]
    spread: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)]
    margins: Annotated[list[Annotated[float, msgspec.Meta(ge=1.0, le=80.0)]], Several]
    shift: Annotated[float, msgspec.Meta(ge=1.0, le=1e6)]
    differences: Annotated[list[Annotated[float, msgspec.Meta(ge=1e-7, le=0.1)]], Several]
    scales: Annotated[list[Annotated[float, msgspec.Meta(ge=1e-32, le=1e32)]], Several]
    tails: Annotated[list[Annotated[float, msgspec.Meta(ge=1.0, le=40.0)]], Several]
    seed: Annotated[int, msgspec.Meta(ge=0)]

    def __post_init__(self):
        distinct(self, "dtypes", "functions", "libraries", "num_classes", "margins", "differences", "scales", "tails")
        if unknown := [name for name in self.functions if name not in FUNCTIONS]:
            raise ValueError(f"functions: expected any of {', '.join(FUNCTIONS)}, got {unknown[0]}")
        if OURS not in self.libraries or not {*self.libraries} <= {*LIBRARIES}:
            raise ValueError(f"libraries: expected {OURS} and any of {', '.join(LIBRARIES)}, got {self.libraries}")


# ---- Regimes: name -> arrays with a leading axis of examples, float64 until they are rounded to a dtype

Batch = tuple[np.ndarray, ...]
Regimes = dict[str, Batch]


def _random_logits(config: Config, rng: np.random.Generator, k: int) -> np.ndarray:
    return config.spread * rng.normal(size=(config.examples, k))


def _peaked(z: np.ndarray, tops: np.ndarray, margin: float) -> np.ndarray:
    """Logits between -1 and 0, but for the class `top`, which is at the margin."""
    z = -np.abs(np.sin(z))
    z[np.arange(len(z)), tops] = margin
    return z


def labelled(config: Config, rng: np.random.Generator) -> Regimes:
    """Logits and an integer class each."""
    out = {}
    for k in config.num_classes:
        out[f"random, K = {k}"] = _random_logits(config, rng, k), rng.integers(k, size=config.examples)
    k = config.num_classes[0]
    z, y = _random_logits(config, rng, k), rng.integers(k, size=config.examples)
    out["equal logits"] = np.repeat(z[:, :1], k, axis=1), y
    for m in config.margins:
        out[f"right by {m:g}"] = _peaked(z, y, m), y
        out[f"wrong by {m:g}"] = _peaked(z, (y + 1) % k, m), y
    out[f"shifted by {config.shift:g}"] = z + config.shift, y
    impossible = z.copy()
    impossible[np.arange(len(z)), (y + 1) % k] = -np.inf
    out["an impossible class"] = impossible, y
    return out


def targets(config: Config, rng: np.random.Generator) -> Regimes:
    """Logits and a target distribution: Dirichlet, and 0 for the class that is impossible or the confident one."""
    out = {}
    for name, (z, y) in labelled(config, rng).items():
        t = rng.dirichlet(np.ones(z.shape[1]), size=len(z))
        if name[:5] in ("right", "an im"):  # a confident prediction is right where its class has all of the target
            t = np.eye(z.shape[1])[y]
        out[name] = z, t
    return out


def pairs(config: Config, rng: np.random.Generator) -> Regimes:
    """Two rows of logits, p's and q's."""
    out: Regimes = {}
    for k in config.num_classes:
        out[f"random, K = {k}"] = _random_logits(config, rng, k), _random_logits(config, rng, k)
    k = config.num_classes[0]
    (p, q), noise = (_random_logits(config, rng, k) for _ in range(2)), rng.normal(size=(config.examples, k))
    tops = rng.integers(k, size=config.examples)
    for d in config.differences:
        out[f"differ by {d:g}"] = p, p + d * noise
    for m in config.margins:
        out[f"agreed by {m:g}"] = _peaked(p, tops, m), _peaked(q, tops, m)
        out[f"opposed by {m:g}"] = _peaked(p, tops, m), _peaked(q, (tops + 1) % k, m)
    out[f"shifted by {config.shift:g}"] = p, q + config.shift
    hole = np.where(np.arange(k) == tops[:, None], -np.inf, 0)
    out["an impossible class"] = p + hole, q + hole
    return out


def single_logits(config: Config, rng: np.random.Generator) -> Regimes:
    """A logit and a label of 0 or 1."""
    z, y = config.spread * rng.normal(size=config.examples), rng.integers(2, size=config.examples)
    sign = np.where(y == 1, 1.0, -1.0)
    out = {"random": (z, y), "equal logits": (0 * z, y)}
    for m, (name, side) in itertools.product(config.margins, (("right", 1), ("wrong", -1))):
        out[f"{name} by {m:g}"] = side * sign * (m + np.abs(np.sin(z))), y
    return out


def single_pairs(config: Config, rng: np.random.Generator) -> Regimes:
    """Two logits, p's and q's."""
    p, q, noise = config.spread * rng.normal(size=(3, config.examples))
    near = {f"differ by {d:g}": (p, p + d * noise) for d in config.differences}
    sign = np.sign(p)
    agreed = {f"agreed by {m:g}": (sign * (m - np.abs(np.sin(p))), sign * (m - np.abs(np.sin(q))))
              for m in config.margins}  # fmt: skip
    opposed = {f"opposed by {m:g}": (sign * m, -sign * (m - np.abs(np.sin(q)))) for m in config.margins}
    return {"random": (p, q), **near, **agreed, **opposed}


def _scaled(config: Config, rng: np.random.Generator, scale: float) -> Batch:
    """loc and scale of a Gaussian, in the unit `scale`."""
    return scale * rng.normal(size=config.examples), scale * np.exp(rng.normal(size=config.examples) / 2)


def _units(config: Config) -> dict[str, float]:
    return {"random": 1.0, **{f"scale {s:g}": s for s in config.scales}}


def points(config: Config, rng: np.random.Generator) -> Regimes:
    """x, loc and scale; the tails are on both sides."""
    out: Regimes = {}
    for name, unit in _units(config).items():
        loc, scale = _scaled(config, rng, unit)
        out[name] = loc + scale * rng.normal(size=config.examples), loc, scale
    sign = (-1.0) ** np.arange(config.examples)
    for t in config.tails:
        loc, scale = _scaled(config, rng, 1.0)
        out[f"{t:g} sigma out"] = loc + sign * t * scale, loc, scale
    return out


def intervals(config: Config, rng: np.random.Generator) -> Regimes:
    """low, high, loc and scale."""
    out: Regimes = {}
    for name, unit in _units(config).items():
        loc, scale = _scaled(config, rng, unit)
        low = loc + scale * rng.normal(size=config.examples)
        out[name] = low, low + scale * rng.uniform(0.1, 2, size=config.examples), loc, scale
    sign = (-1.0) ** np.arange(config.examples)
    for t in config.tails:
        loc, scale = _scaled(config, rng, 1.0)
        low = loc + scale * np.where(sign > 0, t, -t - 0.5)
        out[f"{t:g} sigma out"] = low, low + 0.5 * scale, loc, scale
    for d in config.differences:
        loc, scale = _scaled(config, rng, 1.0)
        out[f"{d:g} wide"] = loc + 0.5 * scale, loc + (0.5 + d) * scale, loc, scale
    return out


def gaussian_pairs(config: Config, rng: np.random.Generator) -> Regimes:
    """loc and scale of p, then of q."""
    out: Regimes = {}
    for name, unit in _units(config).items():
        out[name] = *_scaled(config, rng, unit), *_scaled(config, rng, unit)
    loc, scale = _scaled(config, rng, 1.0)
    noise = rng.normal(size=(2, config.examples))
    for d in config.differences:
        out[f"differ by {d:g}"] = loc, scale, loc + d * noise[0], scale * (1 + d * noise[1])
    return out


def levels(config: Config, rng: np.random.Generator) -> Regimes:
    """A probability, loc and scale."""
    n = config.examples
    usual = {name: (rng.uniform(0.01, 0.99, size=n), *_scaled(config, rng, s)) for name, s in _units(config).items()}
    return {**usual, "q = 1e-30 to 1e-3": (10 ** rng.uniform(-30, -3, size=n), *_scaled(config, rng, 1.0))}


def scales(config: Config, rng: np.random.Generator) -> Regimes:
    """A scale alone."""
    return {name: (_scaled(config, rng, unit)[1],) for name, unit in _units(config).items()}


def vectors(config: Config, rng: np.random.Generator) -> Regimes:
    """x, loc and scale_tril in three dimensions."""
    out: Regimes = {}
    for name, unit in _units(config).items():
        x, loc = unit * rng.normal(size=(2, config.examples, 3))
        lower = np.tril(rng.normal(size=(config.examples, 3, 3)) / 2, -1)
        out[name] = x, loc, unit * (lower + np.eye(3) * np.exp(rng.normal(size=(config.examples, 1, 3)) / 2))
    return out


def outcomes(config: Config, rng: np.random.Generator) -> Regimes:
    """Values, and the logits of their probabilities."""
    out = {name: (rng.normal(size=z.shape), z) for name, (z, _) in labelled(config, rng).items()
           if not name.startswith(("wrong", "shifted"))}  # fmt: skip
    v, z = out[f"random, K = {config.num_classes[0]}"]
    return {**out, f"values shifted by {config.shift:g}": (v + config.shift, z)}


def rounded(batch: Batch, dtype: str) -> Batch | None:
    """As the dtype holds it; None where it does not: a number is lost, or two arguments become equal."""
    out = tuple(a if a.dtype.kind == "i" else np.asarray(jnp.asarray(a, dtype), np.float64) for a in batch)
    both = list(zip(batch, out, strict=True))
    lost = any(np.any((np.isfinite(a) & ~np.isfinite(b)) | ((a != 0) & (b == 0))) for a, b in both)
    merged = any(_all_equal(x, y) and not _all_equal(a, b) for (a, x), (b, y) in itertools.combinations(both, 2))
    return None if lost or merged else out


def _all_equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.all(a == b))


# ---- The truth: every function from its definition


Real = Any  # an mpf, whose annotations would make it complex after any function


class Entry(NamedTuple):
    """A number, and the sum of the magnitudes of the terms it is the sum of."""

    want: Real
    size: Real


class Truth(NamedTuple):
    """What a function should return for one example, and its gradient in each argument, one after the other."""

    value: list[Entry]
    gradient: list[Entry]


def one(x: Real) -> Entry:
    return Entry(x, abs(x))


def total(terms: Sequence[Real]) -> Entry:
    return Entry(mpmath.fsum(terms), mpmath.fsum(map(abs, terms)))


Row = tuple[Real, ...]


@lru_cache(maxsize=4096)
def _distribution(z: Row) -> tuple[list[Real], list[Real]]:
    """Softmax of a row and its logarithm."""
    top = max(z)
    weights = [mpmath.exp(x - top) for x in z]
    log_total = mpmath.log(mpmath.fsum(weights))
    return [w / mpmath.exp(log_total) for w in weights], [x - top - log_total for x in z]


def _minus_label(p: list[Real], y: int) -> list[Real]:
    return [x - (i == y) for i, x in enumerate(p)]


def softmax(z: Row, y: int) -> Truth:
    p, _ = _distribution(z)
    return Truth([one(x) for x in p], [one(-p[y] * e) for e in _minus_label(p, y)])


def log_softmax(z: Row, y: int) -> Truth:
    p, log_p = _distribution(z)
    return Truth([one(x) for x in log_p], [one(-e) for e in _minus_label(p, y)])


def cross_entropy(z: Row, y: int) -> Truth:
    p, log_p = _distribution(z)
    return Truth([one(-log_p[y])], [one(e) for e in _minus_label(p, y)])


def soft_cross_entropy(z: Row, t: Row) -> Truth:
    p, log_p = _distribution(z)
    value = total([-a * b for a, b in zip(t, log_p, strict=True) if a])
    mass = mpmath.fsum(t)
    return Truth([value], [total([a * mass, -b]) for a, b in zip(p, t, strict=True)])


def _spread(x: Sequence[Real], p: list[Real]) -> list[Real]:
    """sum_j p_j |x_i - x_j|, in float64: a size needs no digits."""
    values, weights = np.array(x, np.float64), np.array(p, np.float64)
    return [mpf(s) for s in (np.abs(values[:, None] - values) @ weights).tolist()]


def brier_score(z: Row, y: int) -> Truth:
    p, _ = _distribution(z)
    e = _minus_label(p, y)
    mean = mpmath.fsum(a * b for a, b in zip(p, e, strict=True))
    slopes = [Entry(2 * a * (b - mean), 2 * a * s) for a, b, s in zip(p, e, _spread(e, p), strict=True)]
    return Truth([one(mpmath.fsum(x**2 for x in e))], slopes)


def entropy(z: Row, y: int) -> Truth:
    p, log_p = _distribution(z)
    h = mpmath.fsum(-a * b for a, b in zip(p, log_p, strict=True) if a)
    return Truth([one(h)], [total([-a * b, -a * h]) if a else one(a) for a, b in zip(p, log_p, strict=True)])


def kl_divergence(zp: Row, zq: Row) -> Truth:
    (p, log_p), (q, log_q) = _distribution(zp), _distribution(zq)
    ratio = [a - b if c else c for a, b, c in zip(log_p, log_q, p, strict=True)]
    kl, change = mpmath.fsum(a * t for a, t in zip(p, ratio, strict=True)), [b - a for a, b in zip(p, q, strict=True)]
    moved = mpmath.fsum(map(abs, change))  # q_i - p_i is also what the other classes leave over
    in_q = [Entry(c, min(a + b, moved - abs(c))) for a, b, c in zip(p, q, change, strict=True)]
    return Truth([one(kl)], [total([a * t, -a * kl]) for a, t in zip(p, ratio, strict=True)] + in_q)


def js_divergence(zp: Row, zq: Row) -> Truth:
    p, q = (_distribution(z)[0] for z in (zp, zq))
    value, slopes = mpf(0), []
    for a, b in ((p, q), (q, p)):
        terms = [x * mpmath.log(2 * x / (x + y)) if x else x for x, y in zip(a, b, strict=True)]
        kl, largest = mpmath.fsum(terms), max(map(abs, terms))
        value += kl / 2
        slopes += [Entry((t - x * kl) / 2, largest) for t, x in zip(terms, a, strict=True)]
    return Truth([one(value)], slopes)


def _odds(z: Real) -> tuple[Real, Real]:
    """Probability of yes and of no."""
    return 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))


def bernoulli_cross_entropy(z: Real, y: int) -> Truth:
    p, no = _odds(z)
    return Truth([one(-mpmath.log(p if y else no))], [one(-no if y else p)])


def bernoulli_entropy(z: Real, y: int) -> Truth:
    p, no = _odds(z)
    return Truth([total([-p * mpmath.log(p), -no * mpmath.log(no)])], [one(-z * p * no)])


def bernoulli_kl_divergence(zp: Real, zq: Real) -> Truth:
    (p, no), (q, q_no) = _odds(zp), _odds(zq)
    return Truth([one(p * mpmath.log(p / q) + no * mpmath.log(no / q_no))], [one(p * no * (zp - zq)), one(q - p)])


def _phi(r: Real) -> Real:
    return mpmath.exp(-r * r / 2) / mpmath.sqrt(2 * mpmath.pi)


def _above(r: Real) -> Real:
    return mpmath.erfc(r / mpmath.sqrt(2)) / 2


def log_prob(x: Real, loc: Real, scale: Real) -> Truth:
    r = (x - loc) / scale
    value = total([-r * r / 2, -mpmath.log(scale), -mpmath.log(2 * mpmath.pi) / 2])
    return Truth([value], [one(-r / scale), one(r / scale), total([r * r / scale, -1 / scale])])


def cdf(x: Real, loc: Real, scale: Real) -> Truth:
    r = (x - loc) / scale
    p = _phi(r) / scale
    return Truth([one(_above(-r))], [one(p), one(-p), one(-r * p)])


def log_cdf(x: Real, loc: Real, scale: Real) -> Truth:
    r = (x - loc) / scale
    hazard = _phi(r) / _above(-r) / scale
    value = mpmath.log1p(-_above(r)) if r > 0 else mpmath.log(_above(-r))
    return Truth([one(value)], [one(hazard), one(-hazard), one(-r * hazard)])


def interval_prob(low: Real, high: Real, loc: Real, scale: Real) -> Truth:
    a, b = (low - loc) / scale, (high - loc) / scale
    value = _above(a) - _above(b) if a > 0 else _above(-b) - _above(-a)  # on the side where both are small
    p, q = _phi(a) / scale, _phi(b) / scale
    return Truth([one(value)], [one(-p), one(q), one(p - q), total([a * p, -b * q])])


def gaussian_kl_divergence(p_loc: Real, p: Real, q_loc: Real, q: Real) -> Truth:
    d = p_loc - q_loc
    value = (p / q) ** 2 / 2 + (d / q) ** 2 / 2 - mpf(1) / 2 - mpmath.log(p / q)
    in_q = total([(q**2 - p**2) / q**3, -(d**2) / q**3])
    return Truth([one(value)], [one(d / q**2), one((p**2 - q**2) / (p * q**2)), one(-d / q**2), in_q])


def quantile(level: Real, loc: Real, scale: Real) -> Truth:
    r = mpmath.sqrt(2) * mpmath.erfinv(2 * level - 1)
    return Truth([total([loc, scale * r])], [one(scale / _phi(r)), one(mpf(1)), one(r)])


def gaussian_entropy(scale: Real) -> Truth:
    return Truth([total([mpmath.log(scale), (1 + mpmath.log(2 * mpmath.pi)) / 2])], [one(1 / scale)])


def mvn_log_prob(x: Row, loc: Row, tril: tuple[Row, ...]) -> Truth:
    """With W = L^-1, r = W (x - loc) and g = W^T r: slopes -g, g, and g_i r_j - [i = j] / L_ii."""
    n, inverse = range(len(x)), cast(Any, mpmath.matrix(tril)) ** -1
    r = [total([inverse[i, j] * (x[j] - loc[j]) for j in n]) for i in n]
    columns = [[inverse[j, i] for j in n] for i in n]
    g = [Entry(mpmath.fdot(w, [e.want for e in r]), mpmath.fdot(map(abs, w), [e.size for e in r])) for w in columns]
    log_scales = [mpmath.log(tril[i][i]) for i in n]
    constant = len(x) * mpmath.log(2 * mpmath.pi) / 2
    value = total([*(-(e.want**2) / 2 for e in r), *(-s for s in log_scales), -constant])
    corner = [[1 / tril[i][i] if i == j else mpf(0) for j in n] for i in n]
    below = [[Entry(g[i].want * r[j].want - corner[i][j], g[i].size * r[j].size + corner[i][j]) for j in n] for i in n]
    in_tril = [below[i][j] if j <= i else one(mpf(0)) for i in n for j in n]
    return Truth([value], [Entry(-e.want, e.size) for e in g] + g + in_tril)


def variance(v: Row, z: Row) -> Truth:
    p, _ = _distribution(z)
    mean = mpmath.fsum(a * x for a, x in zip(p, v, strict=True))
    square = [(x - mean) ** 2 for x in v]
    var = mpmath.fsum(a * s for a, s in zip(p, square, strict=True))
    in_values = [Entry(2 * a * (x - mean), 2 * a * s) for a, x, s in zip(p, v, _spread(v, p), strict=True)]
    return Truth([one(var)], in_values + [total([a * s, -a * var]) for a, s in zip(p, square, strict=True)])


# ---- Functions: which inputs, which gradient, which truth, and the bound of jprob in u of float32


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

    inputs: Callable[[Config, np.random.Generator], Regimes]
    argnums: tuple[int, ...]  # the arguments that the gradient is taken in
    truth: Callable[..., Truth]
    bound: Callable[..., tuple[float, float]]  # of value and gradient, for one example
    is_map: bool = False  # one value a class; the gradient is that of the entry of the label


FUNCTIONS = {
    "softmax": Function(labelled, (0,), softmax, lambda z, y: (16 + gap(z), 24 + 3 * gap(z)), is_map=True),
    "log_softmax": Function(labelled, (0,), log_softmax, lambda z, y: _logits_bound(z), is_map=True),
    "cross_entropy": Function(labelled, (0,), cross_entropy, lambda z, y: _logits_bound(z)),
    "cross_entropy, soft": Function(targets, (0,), soft_cross_entropy, lambda z, t: _logits_bound(z)),
    "brier_score": Function(labelled, (0,), brier_score, lambda z, y: (24 + 2 * gap(z), 24 + 3 * gap(z))),
    "entropy": Function(labelled, (0,), entropy, lambda z, y: _logits_bound(z)),
    "kl_divergence": Function(pairs, (0, 1), kl_divergence, _logits_bound),
    "js_divergence": Function(pairs, (0, 1), js_divergence, _logits_bound),
    "bernoulli.cross_entropy": Function(single_logits, (0,), bernoulli_cross_entropy, lambda z, y: (16, 16)),
    "bernoulli.entropy": Function(single_logits, (0,), bernoulli_entropy, lambda z, y: (16, 16)),
    "bernoulli.kl_divergence": Function(single_pairs, (0, 1), bernoulli_kl_divergence,
                                        lambda p, q: (16 + max(abs(p), abs(q)),) * 2),
    "gaussian.log_prob": Function(points, (0, 1, 2), log_prob, lambda *args: (8, 8)),
    "gaussian.cdf": Function(points, (0, 1, 2), cdf, _cdf_bound),
    "gaussian.log_cdf": Function(points, (0, 1, 2), log_cdf, _log_cdf_bound),
    "gaussian.interval_prob": Function(intervals, (0, 1, 2, 3), interval_prob, _interval_bound),
    "gaussian.kl_divergence": Function(gaussian_pairs, (0, 1, 2, 3), gaussian_kl_divergence, lambda *args: (16, 16)),
    "gaussian.quantile": Function(levels, (0, 1, 2), quantile, lambda *args: (16, 32)),
    "gaussian.entropy": Function(scales, (0,), gaussian_entropy, lambda scale: (4, 4)),
    "mvn.log_prob": Function(vectors, (0, 1, 2), mvn_log_prob, lambda x, loc, tril: _condition_bound(tril)),
    "expectation.variance": Function(outcomes, (0, 1), variance, lambda v, z: (32 + 2 * gap(z), 32 + 3 * gap(z))),
}  # fmt: skip


# ---- Libraries: which of their functions stands for which. All take and return a batch


def _jprob() -> dict[str, Callable]:
    """Each function by its name; those without a label leave it out."""
    calls = {}
    for name in FUNCTIONS:
        module, _, verb = f"categorical.{name}".removesuffix(", soft").rpartition(".")
        calls[name] = getattr(import_module(f"jprob.{module.removeprefix('categorical.')}"), verb)
    unlabelled = ("softmax", "log_softmax", "entropy", "bernoulli.entropy")
    return calls | {name: lambda z, y, call=calls[name]: call(z) for name in unlabelled}


def _of_label(x: Any, y: Any) -> Any:
    return jnp.take_along_axis(x, y[:, None], axis=-1)[:, 0]


def _jax() -> dict[str, Callable]:
    from jax.nn import log_sigmoid, log_softmax, sigmoid, softmax
    from jax.scipy.special import entr, rel_entr
    from jax.scipy.stats import multivariate_normal, norm

    def js(zp, zq):
        p, q = softmax(zp), softmax(zq)
        return (rel_entr(p, (p + q) / 2) + rel_entr(q, (p + q) / 2)).sum(-1) / 2

    def mvn(x, loc, tril):
        lower = jnp.tril(tril)
        return jax.vmap(multivariate_normal.logpdf)(x, loc, lower @ jnp.swapaxes(lower, -1, -2))

    return {
        "softmax": lambda z, y: softmax(z),
        "log_softmax": lambda z, y: log_softmax(z),
        "cross_entropy": lambda z, y: -_of_label(log_softmax(z), y),
        "brier_score": lambda z, y: ((softmax(z) - jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)) ** 2).sum(-1),
        "entropy": lambda z, y: entr(softmax(z)).sum(-1),
        "kl_divergence": lambda zp, zq: rel_entr(softmax(zp), softmax(zq)).sum(-1),
        "js_divergence": js,
        "bernoulli.cross_entropy": lambda z, y: -log_sigmoid(jnp.where(y == 1, z, -z)),
        "bernoulli.entropy": lambda z, y: entr(sigmoid(z)) + entr(sigmoid(-z)),
        "bernoulli.kl_divergence": lambda p, q: rel_entr(sigmoid(p), sigmoid(q)) + rel_entr(sigmoid(-p), sigmoid(-q)),
        "gaussian.log_prob": norm.logpdf,
        "gaussian.cdf": norm.cdf,
        "gaussian.log_cdf": norm.logcdf,
        "gaussian.interval_prob": lambda low, high, loc, scale: norm.cdf(high, loc, scale) - norm.cdf(low, loc, scale),
        "gaussian.quantile": norm.ppf,
        "mvn.log_prob": mvn,
    }


def _optax() -> dict[str, Callable]:
    from jax.nn import log_softmax
    from optax import losses

    return {
        "cross_entropy": losses.softmax_cross_entropy_with_integer_labels,
        "cross_entropy, soft": losses.safe_softmax_cross_entropy,
        "kl_divergence": lambda zp, zq: losses.kl_divergence_with_log_targets(log_softmax(zq), log_softmax(zp)),
        "bernoulli.cross_entropy": lambda z, y: losses.sigmoid_binary_cross_entropy(z, y.astype(z.dtype)),
    }


def _distributions(d: Any, categorical: Any, bernoulli: Any, mvn: Any, kl: Callable) -> dict[str, Callable]:
    """The interface that distrax, numpyro, TFP and torch have in common, but for the names of some classes."""
    return {
        "cross_entropy": lambda z, y: -categorical(logits=z).log_prob(y),
        "entropy": lambda z, y: categorical(logits=z).entropy(),
        "kl_divergence": lambda zp, zq: kl(categorical(logits=zp), categorical(logits=zq)),
        "bernoulli.cross_entropy": lambda z, y: -bernoulli(logits=z).log_prob(y),
        "bernoulli.entropy": lambda z, y: bernoulli(logits=z).entropy(),
        "bernoulli.kl_divergence": lambda p, q: kl(bernoulli(logits=p), bernoulli(logits=q)),
        "gaussian.log_prob": lambda x, loc, scale: d.Normal(loc, scale).log_prob(x),
        "gaussian.cdf": lambda x, loc, scale: d.Normal(loc, scale).cdf(x),
        "gaussian.interval_prob": lambda a, b, loc, scale: d.Normal(loc, scale).cdf(b) - d.Normal(loc, scale).cdf(a),
        "gaussian.kl_divergence": lambda a, s, b, t: kl(d.Normal(a, s), d.Normal(b, t)),
        "gaussian.entropy": lambda scale: d.Normal(0 * scale, scale).entropy(),
        "mvn.log_prob": lambda x, loc, tril: mvn(loc, tril).log_prob(x),
    }


def _distrax() -> dict[str, Callable]:
    d = import_module("distrax")

    return {
        **_distributions(d, d.Categorical, d.Bernoulli, d.MultivariateNormalTri, lambda p, q: p.kl_divergence(q)),
        "softmax": lambda z, y: d.Categorical(logits=z).probs,
        "log_softmax": lambda z, y: d.Categorical(logits=z).logits,
        "gaussian.log_cdf": lambda x, loc, scale: d.Normal(loc, scale).log_cdf(x),
    }


def _numpyro() -> dict[str, Callable]:
    d = import_module("numpyro.distributions")

    def mvn(loc, tril):
        return d.MultivariateNormal(loc, scale_tril=jnp.tril(tril))

    missing = ("kl_divergence", "bernoulli.kl_divergence")  # it has that of Gaussians alone
    shared = _distributions(d, d.Categorical, d.Bernoulli, mvn, d.kl_divergence)
    return {
        **{name: call for name, call in shared.items() if name not in missing},
        "softmax": lambda z, y: d.Categorical(logits=z).probs,
        "gaussian.log_cdf": lambda x, loc, scale: d.Normal(loc, scale).log_cdf(x),
        "gaussian.quantile": lambda q, loc, scale: d.Normal(loc, scale).icdf(q),
    }


def _tfp() -> dict[str, Callable]:
    substrate = import_module("tensorflow_probability.substrates.jax")
    d, stats = substrate.distributions, substrate.stats

    return {
        **_distributions(d, d.Categorical, d.Bernoulli, d.MultivariateNormalTriL, lambda p, q: p.kl_divergence(q)),
        "softmax": lambda z, y: d.Categorical(logits=z).probs_parameter(),
        "brier_score": lambda z, y: 1 + stats.brier_score(y, z),  # defined without the 1
        "gaussian.log_cdf": lambda x, loc, scale: d.Normal(loc, scale).log_cdf(x),
        "gaussian.quantile": lambda q, loc, scale: d.Normal(loc, scale).quantile(q),
        "expectation.variance": jax.vmap(lambda v, z: d.FiniteDiscrete(v, logits=z).variance()),
    }


def _torch() -> dict[str, Callable]:
    torch, d, f = (import_module(name) for name in ("torch", "torch.distributions", "torch.nn.functional"))

    def quiet(kind):
        return partial(kind, validate_args=False)

    def mvn(loc, tril):
        return d.MultivariateNormal(loc, scale_tril=tril.tril(), validate_args=False)

    def kl(zp, zq):
        return f.kl_div(f.log_softmax(zq, -1), f.log_softmax(zp, -1), reduction="none", log_target=True).sum(-1)

    def bce(z, y):
        return f.binary_cross_entropy_with_logits(z, y.to(z.dtype), reduction="none")

    return {
        **_distributions(d, quiet(d.Categorical), quiet(d.Bernoulli), mvn, d.kl_divergence),
        "softmax": lambda z, y: f.softmax(z, -1),
        "log_softmax": lambda z, y: f.log_softmax(z, -1),
        "cross_entropy": lambda z, y: f.cross_entropy(z, y, reduction="none"),
        "cross_entropy, soft": lambda z, t: f.cross_entropy(z, t, reduction="none"),
        "kl_divergence": kl,
        "bernoulli.cross_entropy": bce,
        "gaussian.log_cdf": lambda x, loc, scale: torch.special.log_ndtr((x - loc) / scale),
        # Normal.icdf is infinite from q = 1e-8 down.
        "gaussian.quantile": lambda q, loc, scale: loc + scale * torch.special.ndtri(q),
    }


Results = tuple[np.ndarray, list[np.ndarray]]  # value, and gradient in each argument, as float64


def in_jax(call: Callable, function: Function, batch: Batch, dtype: str) -> Results:
    """Value and gradient under jit, which is how they are used."""

    @jax.jit
    def evaluate(*args):
        def of_moved(*moved):
            given = dict(zip(function.argnums, moved, strict=True))
            return call(*(given.get(i, arg) for i, arg in enumerate(args)))

        value, pull = jax.vjp(of_moved, *(args[i] for i in function.argnums))
        seed = jax.nn.one_hot(args[1], value.shape[-1], dtype=value.dtype) if function.is_map else jnp.ones_like(value)
        return value, pull(seed)

    value, gradient = evaluate(*(jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else dtype) for a in batch))
    return np.asarray(value, np.float64), [np.asarray(g, np.float64) for g in gradient]


def in_torch(call: Callable, function: Function, batch: Batch, dtype: str) -> Results:
    """Value and gradient by torch's autograd, on the CPU."""
    torch = import_module("torch")
    args = [torch.from_numpy(a) for a in batch]
    args = [a.to(getattr(torch, dtype)) if a.is_floating_point() else a for a in args]
    moved = [args[i].requires_grad_() for i in function.argnums]
    value = call(*args)
    picked = value.gather(-1, args[1][:, None]) if function.is_map else value
    gradient = torch.autograd.grad(picked.sum(), moved, allow_unused=True, materialize_grads=True)
    return value.detach().double().numpy(), [g.double().numpy() for g in gradient]


class Library(NamedTuple):
    """Where a library's functions come from, and how they are evaluated."""

    module: str
    functions: Callable[[], dict[str, Callable]]
    evaluate: Callable[[Callable, Function, Batch, str], Results] = in_jax


LIBRARIES = {
    OURS: Library("jprob", _jprob),
    "jax": Library("jax", _jax),
    "optax": Library("optax", _optax),
    "distrax": Library("distrax", _distrax),
    "numpyro": Library("numpyro", _numpyro),
    "tfp": Library("tensorflow_probability", _tfp),
    "torch": Library("torch", _torch, in_torch),
}


def installed(name: str) -> bool:
    return importlib.util.find_spec(LIBRARIES[name].module) is not None


# ---- The measure


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


def _arguments(batch: Batch, i: int) -> list[Any]:
    """Example i, exactly."""

    def exactly(a: Any) -> Any:
        return tuple(map(exactly, a)) if isinstance(a, list) else mpf(a) if isinstance(a, float) else a

    return [exactly(array[i].tolist()) for array in batch]


def _as_float(x: Any) -> float:
    return float(x) if mpmath.isinf(x) or abs(x) < mpf(10) ** 300 else math.copysign(math.inf, x)


def wanted(function: Function, batch: Batch, dtype: str) -> tuple[Wanted, Wanted]:
    """The truth of value and gradient for every example of a batch."""
    with mpmath.workdps(DIGITS):
        truths = [function.truth(*_arguments(batch, i)) for i in range(len(batch[0]))]
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


# ---- The run


def groups(function: Function, config: Config, dtype: str) -> Iterator[tuple[dict[str, slice], Batch]]:
    """The regimes, joined where the shapes agree, so that each shape is compiled once.

    More classes than the first number of them only in the first dtype: compiling them takes half of the time.
    """
    if dtype != config.dtypes[0]:
        config = msgspec.structs.replace(config, num_classes=config.num_classes[:1])
    regimes = function.inputs(config, np.random.default_rng(config.seed))
    held = {name: batch for name, arrays in regimes.items() if (batch := rounded(arrays, dtype)) is not None}
    shapes = {name: tuple(a.shape[1:] for a in batch) for name, batch in held.items()}
    for shape in dict.fromkeys(shapes.values()):
        names = [name for name in held if shapes[name] == shape]
        slices = {name: slice(i * config.examples, (i + 1) * config.examples) for i, name in enumerate(names)}
        yield slices, tuple(np.concatenate(arrays) for arrays in zip(*(held[name] for name in names), strict=True))


def measure(library: str, call: Callable, function: Function, batch: Batch, dtype: str) -> Results | None:
    """What the library returns; None where it refuses the dtype or the shapes."""
    try:
        return LIBRARIES[library].evaluate(call, function, batch, dtype)
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        if library == OURS:
            raise
        return None


def run(config: Config) -> Iterator[Record | Progress]:
    """One record a library, whether it is here; then one a function, regime, dtype and library that has it."""
    here = [name for name in config.libraries if installed(name)]
    calls = {name: LIBRARIES[name].functions() for name in here}
    for name in config.libraries:
        version = getattr(sys.modules[LIBRARIES[name].module], "__version__", "here") if name in here else ABSENT
        yield Record({"part": "library", "library": name, "version": version}, {"installed": float(name in here)})
    jobs = list(itertools.product(config.dtypes, config.functions))
    for done, (dtype, name) in enumerate(jobs):
        yield Progress(done / len(jobs), f"{name}, {dtype}")
        function = FUNCTIONS[name]
        for slices, batch in groups(function, config, dtype):
            truth = wanted(function, batch, dtype)
            for library in here:
                if name not in calls[library]:
                    continue
                results = measure(library, calls[library][name], function, batch, dtype)
                for regime, rows in slices.items():
                    settings: dict[str, Setting] = {
                        "part": "error",
                        "dtype": dtype,
                        "function": name,
                        "regime": regime,
                        "library": library,
                    }
                    yield Record(settings, _of_rows(results, truth, rows, dtype))


def _of_rows(results: Results | None, truth: tuple[Wanted, Wanted], rows: slice, dtype: str) -> dict[str, Value]:
    if results is None:
        return {"refused": 1.0}
    of_regime = results[0][rows], [g[rows] for g in results[1]]
    value, gradient = (Wanted(each.want[rows], each.allowed[rows]) for each in truth)
    return compare(of_regime, (value, gradient), dtype)


# ---- The report

Values = dict[str, float]
Rows = dict[tuple[str, str, str], dict[str, Values]]  # (dtype, function, regime) -> library -> what `compare` gives
Line = tuple[str, str, str, str]  # dtype, function, regime, part


def rows_of(records: Sequence[Record]) -> Rows:
    rows: Rows = {}
    for settings, values in records:
        if settings["part"] == "error":
            key = (str(settings["dtype"]), str(settings["function"]), str(settings["regime"]))
            rows.setdefault(key, {})[str(settings["library"])] = {name: float(x) for name, x in values.items()}
    return rows


def versions_of(records: Sequence[Record]) -> dict[str, str]:
    return {str(s["library"]): str(s["version"]) for s, _ in records if s["part"] == "library"}


def lines_of(rows: Rows, library: str) -> dict[Line, float]:
    """The errors of one library, NaN and infinity and all."""
    return {(*key, part): cells[library][part] for key, cells in rows.items() for part in PARTS
            if library in cells and "refused" not in cells[library]}  # fmt: skip


def named(line: Line) -> str:
    dtype, function, regime, part = line
    return f"{function} ({regime}, {part}{'' if dtype == 'float32' else f', {dtype}'})"


def shown(off: float, dtype: str) -> str:
    """An error in u for people."""
    if math.isnan(off):
        return "NaN"
    if math.isinf(off):
        return "inf"
    if off >= 1 / UNITS[dtype]:
        return "no digit"
    return f"{off:.1f}" if off < 9.95 else f"{off:,.0f}".replace(",", " ")


def _cell(cells: dict[str, Values], library: str, part: str, line: tuple[str, str, str]) -> str:
    if library not in cells:
        return ""
    if "refused" in cells[library]:
        return "refused"
    negative = part == "value" and "divergence" in line[1] and cells[library]["lowest"] < 0
    return shown(cells[library][part], line[0]) + (", negative" if negative else "")


def _finite(off: float, dtype: str) -> float:
    """Errors in an order: NaN and infinity count as no digit."""
    return off if math.isfinite(off) else 1 / UNITS[dtype]


def broken(rows: Rows) -> list[Line]:
    """Where jprob leaves its bound."""
    return [(*key, part) for key, cells in rows.items() for part in PARTS if not cells[OURS][f"{part} share"] <= 1]


def bound_hypothesis(rows: Rows) -> Hypothesis:
    """Every error against the bound that the docstring states."""
    shares = {(*key, part): cells[OURS][f"{part} share"] for key, cells in rows.items() for part in PARTS}
    out = broken(rows)
    largest = max((line for line in shares if line not in out), key=lambda line: shares[line], default=None)
    measured = f"{len(shares) - len(out)} of {len(shares)} rows are within it"
    measured += f", the nearest to it at {shares[largest]:.2f} of it: {named(largest)}" if largest else ""
    off = lines_of(rows, OURS)
    measured += "; outside: " + ", ".join(f"{named(line)} {shown(off[line], line[0])}" for line in out) if out else ""
    return Hypothesis(
        "Every value and gradient entry of jprob has all the digits that its documentation promises: for most an error "
        "of at most (16 + R) u, R the largest gap between logits.",
        measured,
        "an error is above the bound in the function's docstring, and one rounding to the dtype of the result",
        decided(not out),
    )


def advantages(rows: Rows, peer: str) -> dict[Line, tuple[float, float]]:
    """(error of jprob, error of the peer) where the peer's is smaller."""
    ours, theirs = lines_of(rows, OURS), lines_of(rows, peer)
    both = {line: (_finite(ours[line], line[0]), _finite(theirs[line], line[0])) for line in theirs if line in ours}
    return {line: pair for line, pair in both.items() if pair[1] < pair[0]}


def margin_of(dtype: str) -> float:
    """What a difference may be for it to be noise: 16 u of float32, and one rounding to a narrower dtype."""
    u = UNITS[dtype]
    return 16 * SINGLE / u + (u > SINGLE)


def peers_hypothesis(rows: Rows, peers: Sequence[str]) -> Hypothesis:
    """Whether any peer is more exact in any row."""
    gains = {(peer, line): ours - theirs for peer in peers for line, (ours, theirs) in advantages(rows, peer).items()}
    found = [key for key, gain in gains.items() if gain > margin_of(key[1][0])]
    lines = list(dict.fromkeys(line for _, line in found))
    off = lines_of(rows, OURS)
    measured = f"{len(lines)} of {len(off)} rows" if peers else "no peer is installed"
    if lines:
        by = {line: ", ".join(peer for peer, other in found if other == line) for line in lines}
        measured += ": " + "; ".join(f"{named(line)}: {by[line]}" for line in lines)
    return Hypothesis(
        "No peer is more exact than jprob by more than 16 u in any row.",
        measured,
        "the error of a peer is smaller by more than 16 u of float32 (in bfloat16: by more than 1 u)",
        decided(not lines) if peers else "undecided",
    )


def sign_hypothesis(rows: Rows, peers: Sequence[str]) -> Hypothesis:
    """A divergence is never negative."""
    divergences = {key: cells for key, cells in rows.items() if "divergence" in key[1]}
    count = {library: sum(cells[library].get("lowest", 0) < 0 for cells in divergences.values() if library in cells)
             for library in (OURS, *peers)}  # fmt: skip
    told = ", ".join(f"{n} ({library})" for library, n in count.items())
    return Hypothesis(
        "No divergence that jprob returns is negative.",
        f"rows with a negative divergence, of {len(divergences)}: {told}",
        "one of jprob's is below 0",
        decided(count[OURS] == 0),
    )


def ten_lines(config: Config) -> list[tuple[str, str, str]]:
    """Function, regime and part of the rows that matter most to who trains and compares models."""
    margin, near = f"{config.margins[0]:g}", f"differ by {sorted(config.differences)[len(config.differences) // 2]:g}"
    return [
        ("cross_entropy", f"right by {margin}", "value"),
        ("cross_entropy", f"right by {margin}", "gradient"),
        ("cross_entropy", f"shifted by {config.shift:g}", "value"),
        ("bernoulli.cross_entropy", f"right by {margin}", "value"),
        ("entropy", f"right by {margin}", "value"),
        ("kl_divergence", near, "value"),
        ("brier_score", f"wrong by {margin}", "gradient"),
        ("gaussian.log_prob", f"scale {config.scales[0]:g}", "gradient"),
        ("gaussian.interval_prob", f"{config.tails[0]:g} sigma out", "value"),
        ("gaussian.kl_divergence", near, "value"),
    ]


def tables(config: Config, rows: Rows, here: Sequence[str]) -> list[Table]:
    """The ten lines in the first dtype, then all of them, one table a dtype."""

    def line(dtype: str, function: str, regime: str, part: str) -> list[str]:
        key = (dtype, function, regime)
        return [function, regime, part, *(_cell(rows[key], library, part, key) for library in here)]

    header, first = ["function", "regime", "of", *here], config.dtypes[0]
    ten = [line(first, *each) for each in ten_lines(config) if (first, *each[:2]) in rows]
    out = [
        Table(f"The ten lines: largest error in u of {first}; empty where a library lacks the function.", header, ten)
    ]
    for dtype in config.dtypes:
        every = [line(*key, part) for key in rows if key[0] == dtype for part in PARTS]
        out.append(Table(f"{dtype}: largest error in u = 2^{math.log2(UNITS[dtype]):g}.", header, every))
    return out


def _label(off: float, u: float) -> str:
    """At most four characters for a cell of the heat map."""
    if not math.isfinite(off) or off >= 1 / u:
        return "NaN" if math.isnan(off) else "inf" if math.isinf(off) else "none"
    return f"{off:.1f}" if off < 9.95 else f"{off:.0f}" if off < 999.5 else f"{off:.0e}".replace("e+0", "e")


def _panel(axis: Axes, rows: Rows, here: Sequence[str], part: str, u: float) -> None:
    norm, colours = LogNorm(1, 1 / u), matplotlib.colormaps["YlOrRd"]
    for y, cells in enumerate(rows.values()):
        for x, library in enumerate(here):
            if library not in cells or "refused" in cells[library]:
                continue
            off = cells[library][part]
            lost, undefined = off >= 1 / u and math.isfinite(off), not math.isfinite(off)
            colour = "#333333" if lost else plots.COLOURS["A"] if undefined else colours(0.75 * norm(max(off, 1.0)))
            axis.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=colour, lw=0)
            ink = "white" if lost or undefined else "black"
            axis.text(x + 0.5, y + 0.54, _label(off, u), ha="center", va="center", fontsize=6, color=ink)
    axis.set(xlim=(0, len(here)), ylim=(len(rows), 0), title=part)
    axis.set_xticks([x + 0.5 for x in range(len(here))], here, fontsize=7)
    axis.tick_params(length=0, labeltop=True, labelbottom=True)
    axis.grid(False)


def heat_map(dtype: str, rows: Rows, here: Sequence[str]) -> Plot:
    """All rows of one dtype, the value's errors beside the gradient's."""
    u, mine = UNITS[dtype], {key: cells for key, cells in rows.items() if key[0] == dtype}
    figure, (left, right) = plots.figure(columns=2, width=2.6 + 0.9 * len(here), height=0.8 + 0.135 * len(mine))
    for axis, part in ((left, PARTS[0]), (right, PARTS[1])):
        _panel(axis, mine, here, part, u)
        for y, (one_row, next_row) in enumerate(itertools.pairwise(mine), start=1):
            if one_row[1] != next_row[1]:
                axis.axhline(y, color="black", lw=0.6)
    left.set_yticks([y + 0.5 for y in range(len(mine))], [f"{key[1]}: {key[2]}" for key in mine], fontsize=6)
    right.set_yticks([])
    caption = (
        f"{dtype}: largest error in u = 2^{math.log2(u):g}, on a logarithmic scale from 1 u (pale) to 1/u (red). "
        "Black, 'none': no digit is left. Blue: NaN or infinite where the truth is finite. Empty: the library has no "
        "such function, or refuses the dtype."
    )
    return Plot(figure, caption)


def counter_evidence(rows: Rows, peers: Sequence[str]) -> list[str]:
    """Rows where a peer is better, where jprob leaves its bound, and where its bound allows a large error."""
    off = lines_of(rows, OURS)
    said = [f"jprob leaves its bound in {named(line)}: {shown(off[line], line[0])}." for line in broken(rows)]
    for peer in peers:
        twice = {line: pair for line, pair in advantages(rows, peer).items() if pair[0] > 1 and pair[0] >= 2 * pair[1]}
        if twice:
            told = (f"{named(line)} {shown(b, line[0])} against {shown(a, line[0])}" for line, (a, b) in twice.items())
            where = f"in {len(twice)} of {len(lines_of(rows, peer))} rows"
            said.append(f"{peer} is more exact than jprob by a factor of 2 or more {where}: {'; '.join(told)}.")
    wide = {line: e for line, e in off.items() if e > 200 * SINGLE / UNITS[line[0]] + 1 and line not in broken(rows)}
    if wide:
        worst = max(wide, key=lambda line: wide[line])
        said.append(
            f"Within its bounds jprob errs by more than 200 u in {len(wide)} rows, most in {named(worst)} with "
            f"{shown(wide[worst], worst[0])} u: entries where the terms cancel, or far tails, whose bound is 3 r^2 u."
        )
    said.append(
        "Errors are not speed, the regimes are where formulas of this kind are known to fail, and all of it was "
        "measured on one device with one version of each library."
    )
    return said


def report(config: Config, records: Sequence[Record]) -> Section:
    """The ten lines, the heat map, and every row where jprob is not the best."""
    rows, versions = rows_of(records), versions_of(records)
    here = [name for name, version in versions.items() if version != ABSENT]
    absent, peers = [name for name in versions if name not in here], [name for name in here if name != OURS]
    told = ", ".join(f"{name} {versions[name]}" for name in peers) or "none"
    text = (
        f"Peers measured: {told}. Not installed here, and absent from all that follows: {', '.join(absent) or 'none'}. "
        "`pip install jprob[bench]` brings them.\n\n"
        "An error is |got - true| / max(|true|, smallest normal number) in u, half the spacing at 1 of the inputs' "
        "dtype: 1 u is a rounding, 1/u or more is no digit. Each number is the largest over all entries and examples "
        "of a row, against the definition in mpmath at 120 digits.\n\n"
        "`right by 20` is a prediction whose true class leads by 20 nats, `wrong by 20` one whose rival does. Peers "
        "are called in their own most stable form for logits; those without an interval "
        "probability subtract two cdfs, and jax takes a covariance in place of its factor."
    )
    hypotheses = [bound_hypothesis(rows), peers_hypothesis(rows, peers), sign_hypothesis(rows, peers)]
    return Section(
        "Accuracy",
        text,
        [heat_map(config.dtypes[0], rows, here)],
        hypotheses,
        tables(config, rows, here),
        counter_evidence(rows, peers),
    )
