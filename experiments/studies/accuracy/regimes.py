"""Regimes: name -> arrays with a leading axis of examples, float64 until they are rounded to a dtype."""

import itertools
from typing import Annotated

import jax.numpy as jnp
import msgspec
import numpy as np

Several = msgspec.Meta(min_length=1, max_length=4)


class Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every regime has `examples` examples, of the first number of classes; the others are one random regime each."""

    examples: Annotated[int, msgspec.Meta(ge=1, le=100)]
    num_classes: Annotated[list[Annotated[int, msgspec.Meta(ge=3, le=1000)]], Several]
    spread: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)]
    margins: Annotated[list[Annotated[float, msgspec.Meta(ge=1.0, le=80.0)]], Several]
    shift: Annotated[float, msgspec.Meta(ge=1.0, le=1e6)]
    differences: Annotated[list[Annotated[float, msgspec.Meta(ge=1e-7, le=0.1)]], Several]
    scales: Annotated[list[Annotated[float, msgspec.Meta(ge=1e-32, le=1e32)]], Several]
    tails: Annotated[list[Annotated[float, msgspec.Meta(ge=1.0, le=40.0)]], Several]
    seed: Annotated[int, msgspec.Meta(ge=0)]


Batch = tuple[np.ndarray, ...]
Regimes = dict[str, Batch]


def _random_logits(sizes: Sizes, rng: np.random.Generator, k: int) -> np.ndarray:
    return sizes.spread * rng.normal(size=(sizes.examples, k))


def _peaked(z: np.ndarray, tops: np.ndarray, margin: float) -> np.ndarray:
    """Logits between -1 and 0, but for the class `top`, which is at the margin."""
    z = -np.abs(np.sin(z))
    z[np.arange(len(z)), tops] = margin
    return z


def labelled(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """Logits and an integer class each."""
    out = {}
    for k in sizes.num_classes:
        out[f"random, K = {k}"] = _random_logits(sizes, rng, k), rng.integers(k, size=sizes.examples)
    k = sizes.num_classes[0]
    z, y = _random_logits(sizes, rng, k), rng.integers(k, size=sizes.examples)
    out["equal logits"] = np.repeat(z[:, :1], k, axis=1), y
    for m in sizes.margins:
        out[f"right by {m:g}"] = _peaked(z, y, m), y
        out[f"wrong by {m:g}"] = _peaked(z, (y + 1) % k, m), y
    out[f"shifted by {sizes.shift:g}"] = z + sizes.shift, y
    impossible = z.copy()
    impossible[np.arange(len(z)), (y + 1) % k] = -np.inf
    out["an impossible class"] = impossible, y
    return out


def targets(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """Logits and a target distribution: Dirichlet, and 0 for the class that is impossible or the confident one."""
    out = {}
    for name, (z, y) in labelled(sizes, rng).items():
        t = rng.dirichlet(np.ones(z.shape[1]), size=len(z))
        if name[:5] in ("right", "an im"):  # a confident prediction is right where its class has all of the target
            t = np.eye(z.shape[1])[y]
        out[name] = z, t
    return out


def pairs(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """Two rows of logits, p's and q's."""
    out: Regimes = {}
    for k in sizes.num_classes:
        out[f"random, K = {k}"] = _random_logits(sizes, rng, k), _random_logits(sizes, rng, k)
    k = sizes.num_classes[0]
    (p, q), noise = (_random_logits(sizes, rng, k) for _ in range(2)), rng.normal(size=(sizes.examples, k))
    tops = rng.integers(k, size=sizes.examples)
    for d in sizes.differences:
        out[f"differ by {d:g}"] = p, p + d * noise
    for m in sizes.margins:
        out[f"agreed by {m:g}"] = _peaked(p, tops, m), _peaked(q, tops, m)
        out[f"opposed by {m:g}"] = _peaked(p, tops, m), _peaked(q, (tops + 1) % k, m)
    out[f"shifted by {sizes.shift:g}"] = p, q + sizes.shift
    hole = np.where(np.arange(k) == tops[:, None], -np.inf, 0)
    out["an impossible class"] = p + hole, q + hole
    return out


def single_logits(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """A logit and a label of 0 or 1."""
    z, y = sizes.spread * rng.normal(size=sizes.examples), rng.integers(2, size=sizes.examples)
    sign = np.where(y == 1, 1.0, -1.0)
    out = {"random": (z, y), "equal logits": (0 * z, y)}
    for m, (name, side) in itertools.product(sizes.margins, (("right", 1), ("wrong", -1))):
        out[f"{name} by {m:g}"] = side * sign * (m + np.abs(np.sin(z))), y
    return out


def single_pairs(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """Two logits, p's and q's."""
    p, q, noise = sizes.spread * rng.normal(size=(3, sizes.examples))
    near = {f"differ by {d:g}": (p, p + d * noise) for d in sizes.differences}
    sign = np.sign(p)
    agreed = {f"agreed by {m:g}": (sign * (m - np.abs(np.sin(p))), sign * (m - np.abs(np.sin(q))))
              for m in sizes.margins}  # fmt: skip
    opposed = {f"opposed by {m:g}": (sign * m, -sign * (m - np.abs(np.sin(q)))) for m in sizes.margins}
    return {"random": (p, q), **near, **agreed, **opposed}


def _scaled(sizes: Sizes, rng: np.random.Generator, scale: float) -> Batch:
    """loc and scale of a Gaussian, in the unit `scale`."""
    return scale * rng.normal(size=sizes.examples), scale * np.exp(rng.normal(size=sizes.examples) / 2)


def _units(sizes: Sizes) -> dict[str, float]:
    return {"random": 1.0, **{f"scale {s:g}": s for s in sizes.scales}}


def points(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """x, loc and scale; the tails are on both sides."""
    out: Regimes = {}
    for name, unit in _units(sizes).items():
        loc, scale = _scaled(sizes, rng, unit)
        out[name] = loc + scale * rng.normal(size=sizes.examples), loc, scale
    sign = (-1.0) ** np.arange(sizes.examples)
    for t in sizes.tails:
        loc, scale = _scaled(sizes, rng, 1.0)
        out[f"{t:g} sigma out"] = loc + sign * t * scale, loc, scale
    return out


def intervals(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """low, high, loc and scale."""
    out: Regimes = {}
    for name, unit in _units(sizes).items():
        loc, scale = _scaled(sizes, rng, unit)
        low = loc + scale * rng.normal(size=sizes.examples)
        out[name] = low, low + scale * rng.uniform(0.1, 2, size=sizes.examples), loc, scale
    sign = (-1.0) ** np.arange(sizes.examples)
    for t in sizes.tails:
        loc, scale = _scaled(sizes, rng, 1.0)
        low = loc + scale * np.where(sign > 0, t, -t - 0.5)
        out[f"{t:g} sigma out"] = low, low + 0.5 * scale, loc, scale
    for d in sizes.differences:
        loc, scale = _scaled(sizes, rng, 1.0)
        out[f"{d:g} wide"] = loc + 0.5 * scale, loc + (0.5 + d) * scale, loc, scale
    return out


def gaussian_pairs(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """loc and scale of p, then of q."""
    out: Regimes = {}
    for name, unit in _units(sizes).items():
        out[name] = *_scaled(sizes, rng, unit), *_scaled(sizes, rng, unit)
    loc, scale = _scaled(sizes, rng, 1.0)
    noise = rng.normal(size=(2, sizes.examples))
    for d in sizes.differences:
        out[f"differ by {d:g}"] = loc, scale, loc + d * noise[0], scale * (1 + d * noise[1])
    return out


def levels(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """A probability, loc and scale."""
    n = sizes.examples
    usual = {name: (rng.uniform(0.01, 0.99, size=n), *_scaled(sizes, rng, s)) for name, s in _units(sizes).items()}
    return {**usual, "q = 1e-30 to 1e-3": (10 ** rng.uniform(-30, -3, size=n), *_scaled(sizes, rng, 1.0))}


def scales(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """A scale alone."""
    return {name: (_scaled(sizes, rng, unit)[1],) for name, unit in _units(sizes).items()}


def vectors(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """x, loc and scale_tril in three dimensions."""
    out: Regimes = {}
    for name, unit in _units(sizes).items():
        x, loc = unit * rng.normal(size=(2, sizes.examples, 3))
        lower = np.tril(rng.normal(size=(sizes.examples, 3, 3)) / 2, -1)
        out[name] = x, loc, unit * (lower + np.eye(3) * np.exp(rng.normal(size=(sizes.examples, 1, 3)) / 2))
    return out


def outcomes(sizes: Sizes, rng: np.random.Generator) -> Regimes:
    """Values, and the logits of their probabilities."""
    out = {name: (rng.normal(size=z.shape), z) for name, (z, _) in labelled(sizes, rng).items()
           if not name.startswith(("wrong", "shifted"))}  # fmt: skip
    v, z = out[f"random, K = {sizes.num_classes[0]}"]
    return {**out, f"values shifted by {sizes.shift:g}": (v + sizes.shift, z)}


def rounded(batch: Batch, dtype: str) -> Batch | None:
    """As the dtype holds it; None where it does not: a number is lost, or two arguments become equal."""
    out = tuple(a if a.dtype.kind == "i" else np.asarray(jnp.asarray(a, dtype), np.float64) for a in batch)
    both = list(zip(batch, out, strict=True))
    lost = any(np.any((np.isfinite(a) & ~np.isfinite(b)) | ((a != 0) & (b == 0))) for a, b in both)
    merged = any(_all_equal(x, y) and not _all_equal(a, b) for (a, x), (b, y) in itertools.combinations(both, 2))
    return None if lost or merged else out


def _all_equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.all(a == b))
