"""Accuracy: how many digits of a probability function, and of its gradient, survive in each library.

A formula can be stable and lose every digit all the same. logsumexp(z) - z_y never overflows; for a confident model it
is a difference of two nearly equal numbers. So each function is called where it is hard, not only where it is usual.
Every entry of its value and of its gradient is compared with the truth:

    error = |got - true| / max(|true|, smallest normal number) / u,    u = 2^-24 in float32, 2^-8 in bfloat16

u is half the spacing at 1 of the dtype of the inputs, the same unit for every library. 1 u is the rounding of a result
to that dtype. 1/u is "no digit", and more is counted as that. An error below the smallest normal number is none. The
study measures the largest error of all entries and examples of a regime.

The truth is the definition in mpmath at 120 digits, with gradients in closed form. Its inputs are those that the dtype
holds. Each truth comes with its size, the sum of the magnitudes of its terms. Terms may cancel, as p - t does for a
soft target t. The bounds of jprob are then relative to the size, as its docstrings say. The error above never is.

The function of a peer is its own if it has one. The call is the one that its documentation recommends for logits.
Otherwise it is the usual line made of its primitives. A new peer is one entry in LIBRARIES.
"""

import itertools
import sys
from collections.abc import Iterator

import msgspec
import numpy as np

from experiments.results import Progress, Record, Setting, Value

from .errors import Wanted, compare, wanted
from .functions import FUNCTIONS, Function
from .libraries import LIBRARIES, Results, installed, measure
from .regimes import Batch, rounded
from .section import ABSENT, report
from .settings import Config

__all__ = ["Config", "report", "run"]


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
