"""Two runs next to each other: CPU and GPU, two versions of jax, or one machine twice.

Both runs have the same studies. A study assigns a tier to each value that it stores: how far the value may differ
between devices. A value without a tier is one of a training that amplifies rounding: only the verdicts that follow from
it can agree.

    draws               equal bits: data, splits and initial weights are drawn on the host
    function            2e-6, relative
    gradient            1e-5, relative
    coefficients        1e-3 of a fit, relative, next to 1e-3: a descent ends within its tolerance
    steps               1e-3 of a gentle training, relative, next to one step
    gentle training     1e-3, relative: no example starts confidently wrong
    gentle accuracy     half a point, of the mean over seeds, if both runs tuned the same learning rate

The tuned rate is the best of a few, by a count of right answers. So one example can turn it.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import folders, report
from experiments.export import print_table
from experiments.findings import Tier
from experiments.folders import Run
from experiments.results import Record, run_key


class Row(NamedTuple):
    """The values of one tier in one study."""

    study: str
    tier: Tier | None
    values: int
    equal: int  # in all bits
    largest: float  # difference, in the unit of the tier
    where: str  # the value of that difference

    @property
    def verdict(self) -> str:
        """Whether the tier holds; empty if there is none."""
        return "" if self.tier is None else "holds" if self.largest <= self.tier.allowed else "falsified"


class Comparison(NamedTuple):
    """All of two runs."""

    rows: list[Row]
    verdicts: int  # claims that both runs judged
    turned: list[str]  # those with different verdicts
    opposed: bool  # whether one of them holds in one run and is falsified in the other
    alone: list[str]  # records and studies that one run lacks
    figures: str  # how many are equal, byte for byte

    @property
    def agree(self) -> bool:
        """Whether every tier holds, no verdict is the opposite, and nothing is missing."""
        return not (self.opposed or self.alone or any(row.verdict == "falsified" for row in self.rows))


def compared(first: Path, second: Path) -> Comparison:
    """Compares what two folders hold.

    Raises:
      InputError: one of them holds no run, or one of other code.
    """
    with folders.existing(first) as a, folders.existing(second) as b:
        done = [set(run.store.finished()) for run in (a, b)]
        alone = [f"study {name}" for name in sorted(done[0] ^ done[1])]
        rows, both = [], [name for name in a.manifest["config"]["studies"] if name in done[0] & done[1]]
        for name in both:
            pairs, missing = _pairs(name, a, b)
            alone += missing
            rows += _rows(a, name, pairs)
        said = [run.store.verdicts() for run in (a, b)]
        claims = {name: [each.get(name, []) for each in said] for name in both}
        judged = [(name, *pair) for name, (mine, other) in claims.items() for pair in zip(mine, other, strict=False)]
        turned = [f"{name}: {mine[1]} and {other[1]}: {mine[0]}" for name, mine, other in judged if mine[1] != other[1]]
        opposed = any({mine[1], other[1]} == {"holds", "falsified"} for _, mine, other in judged)
        alone += [f"claims of {name}" for name, (mine, other) in claims.items() if len(mine) != len(other)]
        return Comparison(rows, len(judged), turned, opposed, alone, _figures(first, second))


def _pairs(name: str, a: Run, b: Run) -> tuple[list[tuple[Record, Record]], list[str]]:
    """The records of both runs by their settings, and the keys of those that only one has."""
    first, second = ({run_key(name, record.settings): record for record in run.store.records(name)} for run in (a, b))
    both = [(key, first[key], second[key]) for key in first if key in second]
    lacking = [f"{value} of {key}" for key, x, y in both for value in sorted(x.values.keys() ^ y.values.keys())]
    return [(x, y) for _, x, y in both], sorted(first.keys() ^ second.keys()) + lacking


def _rows(run: Run, name: str, pairs: list[tuple[Record, Record]]) -> Iterator[Row]:
    study, config = report.configured(run, name)
    tier_of = getattr(study, "tier", lambda config, settings, value: None)
    values = defaultdict(list)  # by tier: (what, first, second)
    for mine, other in pairs:
        for value in sorted(mine.values.keys() & other.values.keys()):
            tier = tier_of(config, mine.settings, value)
            if tier and not np.array_equal(mine.values.get(tier.given, 0), other.values.get(tier.given, 0)):
                tier = None
            kept = {k: v for k, v in mine.settings.items() if k != "seed" or not (tier and tier.over_seeds)}
            both = (np.atleast_1d(np.asarray(record.values[value], float)) for record in (mine, other))
            values[tier].append((f"{value} of {run_key(name, kept)}", *both))
    for tier in sorted(values, key=lambda tier: (tier is None, tier)):
        parts = values[tier]
        equal = sum(np.array_equal(x, y, equal_nan=True) for _, x, y in parts)
        differences = [(_difference(tier, x, y), what) for what, x, y in _over_seeds(tier, parts)]
        yield Row(name, tier, len(parts), equal, *max(differences, key=lambda pair: pair[0]))


def _over_seeds(tier: Tier | None, parts: list) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Means over the seeds of a value, if the tier is one of means; all seeds if one is NaN in one run alone."""
    if tier is None or not tier.over_seeds:
        yield from parts
        return
    groups = defaultdict(lambda: ([], []))
    for what, x, y in parts:  # a curve without a seed in its settings has a value a seed
        for seeds, values in zip(groups[what], (x, y), strict=True):
            seeds.extend(values)
    for what, both in groups.items():
        x, y = (np.array(seeds) for seeds in both)
        if x.shape == y.shape and np.array_equal(np.isnan(x), np.isnan(y)):
            x, y = (np.nanmean(seeds, keepdims=True) if not np.isnan(seeds).all() else seeds for seeds in (x, y))
        yield what, x, y


def _difference(tier: Tier | None, x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference of two curves, relative unless the tier is one of points; inf if only one is finite."""
    if x.shape != y.shape:
        return math.inf
    alike = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        size = 1.0 if tier is not None and tier.over_seeds else np.maximum(np.abs(x), np.abs(y))
        distance = np.maximum(np.abs(x - y) - (tier.slack if tier is not None else 0), 0)
        ratio = np.where(alike, 0, distance / np.where(alike, 1, size))
    return float(np.max(np.where(np.isfinite(ratio), ratio, math.inf), initial=0))


def _figures(first: Path, second: Path) -> str:
    """How many figures of the first run have the same bytes in the second."""
    names = sorted(path.name for path in (first / report.FIGURES).glob("*.svg"))
    there = [name for name in names if (second / report.FIGURES / name).is_file()]
    equal = [n for n in there if len({(folder / report.FIGURES / n).read_bytes() for folder in (first, second)}) == 1]
    return f"{len(equal)} of {len(names)}"


def show(comparison: Comparison, first: Path, second: Path) -> None:
    """Prints the tiers, the verdicts that differ, and what differs in how the numbers came about."""
    with folders.existing(first) as a, folders.existing(second) as b:
        print(f"differences of the runs: {folders.differences(a.manifest, b.manifest) or 'none'}")
    header = ("study", "tier", "values", "equal bits", "largest difference", "allowed", "verdict", "largest in")
    rows = [
        (row.study, row.tier.name if row.tier else "none", f"{row.values}", f"{row.equal}", f"{row.largest:.2g}",
         f"{row.tier.allowed:g}" if row.tier else "", row.verdict, row.where if row.largest else "")
        for row in comparison.rows
    ]  # fmt: skip
    print_table(header, rows, wrapped=True)
    for line in (*comparison.turned, *(f"only in one run: {what}" for what in comparison.alone)):
        print(line)
    print(f"verdicts: {comparison.verdicts - len(comparison.turned)} of {comparison.verdicts} are the same")
    print(f"figures: {comparison.figures} are the same, byte for byte")
