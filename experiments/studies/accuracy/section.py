"""The report: the ten lines, the heat map, and every row where jprob is not the best."""

import itertools
import math
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from experiments import plots
from experiments.findings import Hypothesis, Plot, Section, Table, decided
from experiments.results import Record

from .errors import SINGLE, UNITS
from .libraries import OURS
from .settings import Config

ABSENT, PARTS = "absent", ("value", "gradient")
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
    """The lines in which jprob leaves its bound."""
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
        "of at most $(16 + R) u$, with $R$ the largest gap "
        "between logits.",
        measured,
        "an error is above the bound in the function's docstring, and one rounding to the dtype of the result",
        decided(not out),
        against_bound(rows),
    )


def advantages(rows: Rows, peer: str) -> dict[Line, tuple[float, float]]:
    """(error of jprob, error of the peer) where the peer's is smaller."""
    ours, theirs = lines_of(rows, OURS), lines_of(rows, peer)
    both = {line: (_finite(ours[line], line[0]), _finite(theirs[line], line[0])) for line in theirs if line in ours}
    return {line: pair for line, pair in both.items() if pair[1] < pair[0]}


def margin_of(dtype: str) -> float:
    """The largest difference that is noise: 16 u of float32, and one rounding to a narrower dtype."""
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
        against_peers(rows, peers),
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
            colour = "#333333" if lost else plots.PALETTE[0] if undefined else colours(0.75 * norm(max(off, 1.0)))
            axis.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=colour, lw=0)
            ink = "white" if lost or undefined else "black"
            axis.text(x + 0.5, y + 0.54, _label(off, u), ha="center", va="center", color=ink)
    axis.set(xlim=(0, len(here)), ylim=(len(rows), 0), title=part)
    axis.set_xticks([x + 0.5 for x in range(len(here))], here, rotation=90)
    axis.tick_params(length=0, labeltop=True, labelbottom=True)
    axis.grid(False)


def heat_map(dtype: str, rows: Rows, here: Sequence[str]) -> Plot:
    """All rows of one dtype, the value's errors next to the gradient's."""
    u, mine = UNITS[dtype], {key: cells for key, cells in rows.items() if key[0] == dtype}
    figure, (left, right) = plots.figure(columns=2, height=1.6 + 0.17 * len(mine))
    for axis, part in ((left, PARTS[0]), (right, PARTS[1])):
        _panel(axis, mine, here, part, u)
        for y, (one_row, next_row) in enumerate(itertools.pairwise(mine), start=1):
            if one_row[1] != next_row[1]:
                axis.axhline(y, color="black", lw=0.6)
    left.set_yticks([y + 0.5 for y in range(len(mine))], [f"{key[1]}: {key[2]}" for key in mine])
    right.set_yticks([])
    caption = (
        f"{dtype}: largest error in u = 2^{math.log2(u):g}, on a logarithmic scale from 1 u (pale) to 1/u (red). "
        "Black, 'none': no digit is left. Blue: NaN or infinite where the truth is finite. Empty: the library has no "
        "such function, or refuses the dtype."
    )
    return Plot(figure, caption, stacks=False)


def against_bound(rows: Rows) -> list[str]:
    """The places where jprob leaves its bound, and those where its bound allows a large error."""
    off, out = lines_of(rows, OURS), broken(rows)
    said = [f"jprob leaves its bound in {named(line)}: {shown(off[line], line[0])}." for line in out]
    wide = {line: e for line, e in off.items() if e > 200 * SINGLE / UNITS[line[0]] + 1 and line not in out}
    if wide:
        worst = max(wide, key=lambda line: wide[line])
        said.append(
            f"Within its bounds jprob errs by more than $200 u$ in {len(wide)} rows, most in {named(worst)} with "
            f"{shown(wide[worst], worst[0])} u: entries where the terms cancel, or far tails, whose bound is $3 r^2 u$."
        )
    said.append(
        "Errors are not speed. The regimes are those in which formulas of this kind are known to fail. All of it was "
        "measured on one device with one version of each library."
    )
    return said


def against_peers(rows: Rows, peers: Sequence[str]) -> list[str]:
    """Rows in which a peer is better."""
    said = []
    for peer in peers:
        twice = {line: pair for line, pair in advantages(rows, peer).items() if pair[0] > 1 and pair[0] >= 2 * pair[1]}
        if twice:
            told = (f"{named(line)} {shown(b, line[0])} against {shown(a, line[0])}" for line, (a, b) in twice.items())
            where = f"in {len(twice)} of {len(lines_of(rows, peer))} rows"
            said.append(f"{peer} is more exact than jprob by a factor of 2 or more {where}: {'; '.join(told)}.")
    return said


def abstract(config: Config, rows: Rows, peers: Sequence[str]) -> list[str]:
    """Rows without a digit, next to those of the peers."""
    lost = {
        library: sum(not off < 1 / UNITS[line[0]] for line, off in lines_of(rows, library).items())
        for library in (OURS, *peers)
    }
    told = ", ".join(f"{lost[peer]} of {len(lines_of(rows, peer))} ({peer})" for peer in peers) or "not measured"
    return [
        f"jprob has lost all digits of a value or gradient in {lost[OURS]} of {len(lines_of(rows, OURS))} rows, each "
        f"of which is a function in a regime that is usual or hard; its peers have in {told}."
    ]


def report(config: Config, records: Sequence[Record]) -> Section:
    """The ten lines, the heat map, and every row where jprob is not the best."""
    rows, versions = rows_of(records), versions_of(records)
    here = [name for name, version in versions.items() if version != ABSENT]
    absent, peers = [name for name in versions if name not in here], [name for name in here if name != OURS]
    told = ", ".join(f"{name} {versions[name]}" for name in peers) or "none"
    text = (
        f"Peers measured: {told}. Not installed here, and absent from all that follows: {', '.join(absent) or 'none'}. "
        "pip install jprob[bench] brings them.\n\n"
        "An error is |got - true| / max(|true|, smallest normal number) in the unit $u$, half the spacing at 1 of "
        "the inputs' dtype: 1 u is a rounding, 1/u or more is no digit. Each number is the largest over all entries "
        "and examples of a row, against the definition in mpmath at 120 digits.\n\n"
        "Right by 20 is a prediction whose true class leads by 20 nats, wrong by 20 one whose rival does. Peers "
        "are called in their own most stable form for logits; those without an interval "
        "probability subtract two cdfs, and jax takes a covariance in place of its factor."
    )
    hypotheses = [bound_hypothesis(rows), peers_hypothesis(rows, peers), sign_hypothesis(rows, peers)]
    return Section(
        "Accuracy",
        abstract(config, rows, peers),
        text,
        [heat_map(config.dtypes[0], rows, here)],
        hypotheses,
        tables(config, rows, here),
    )
