"""From stored records to one page: every hypothesis with its figure, numbers and verdict, and what speaks against it.

The page is a single file without any outside request, and the same bytes for the same results. It is made from the
results folder alone, by the studies' own `report` functions.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec
from markupsafe import Markup

from experiments import folders, plots, studies
from experiments.errors import InputError
from experiments.export import print_table
from experiments.findings import VERDICTS, Section, Table
from experiments.folders import Run
from experiments.mathml import html, plain

PAGE, FIGURES = "report.html", "figures"


def build(run: Run) -> dict[str, Section]:
    """Writes report.html, its figures and the table of hypotheses from what is stored; returns the sections by study.

    Raises:
      InputError: the folder was written by other code, or cannot be written.
    """
    configured, finished = run.manifest["config"]["studies"], run.store.finished()
    sections = {name: _section(run, name, settings) for name, settings in configured.items() if name in finished}
    unfinished = [name for name in configured if name not in finished]
    drawings = {name: _drawings(name, section) for name, section in sections.items()}
    text = page(run.manifest, sections, drawings, unfinished)
    with folders.writing(run.folder):
        (run.folder / FIGURES).mkdir(exist_ok=True)
        for name, svgs in drawings.items():
            for i, svg in enumerate(svgs, start=1):
                folders.replace(run.folder / FIGURES / f"{name}-{i}.svg", svg.wide)
        run.store.write_hypotheses([(name, *said) for name, said in _verdicts(sections)])
        folders.replace(run.folder / PAGE, text)
    return sections


def _section(run: Run, name: str, settings: Any) -> Section:
    if name not in studies.names():
        raise InputError(f"{run.folder}: written by other code: there is no study {name} here")
    study = studies.load(name)
    try:
        config = msgspec.convert(settings, study.Config)
    except msgspec.ValidationError as error:
        raise InputError(f"{run.folder}: written by other code: {name}: {error}") from None
    with plots.style():
        section = study.report(config, run.store.records(name))
    for hypothesis in section.hypotheses:
        if hypothesis.verdict not in VERDICTS:
            raise ValueError(f"{name}: expected a verdict of {VERDICTS}, got {hypothesis.verdict!r}")
    return section


def _verdicts(sections: dict[str, Section]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Study, and claim, measurement, rule and verdict of each hypothesis, formulas as they are written."""
    for name, section in sections.items():
        for each in section.hypotheses:
            yield name, (*map(plain, (each.claim, each.measured, each.falsified_if)), each.verdict)


class Drawing(NamedTuple):
    """A figure as SVG, for a page and for a phone."""

    wide: Markup
    narrow: Markup | None  # None: it does not stack


def _drawings(name: str, section: Section) -> list[Drawing]:
    """Drawing changes a figure, so a section serves once."""
    drawings = []
    for i, plot in enumerate(section.plots, start=1):
        wide, narrow = Markup(plots.svg(plot.figure, prefix=f"{name}-{i}-")), None  # its texts are escaped
        if plot.stacks:
            with plots.style():
                plots.stack(plot.figure)
            narrow = Markup(plots.svg(plot.figure, prefix=f"{name}-{i}-narrow-"))
        drawings.append(Drawing(wide, narrow))
    return drawings


def page(
    manifest: dict[str, Any], sections: dict[str, Section], drawings: dict[str, list[Drawing]], unfinished: list[str]
) -> str:
    """The whole page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "math": lambda text: Markup(html(text)),  # which escapes
        "numeric": _numeric,
        "paragraphs": _paragraphs,
        "verdicts": lambda section: list(_counts([section]).items()),
    }
    title, _, subtitle = manifest["config"]["title"].rstrip(".").partition(": ")
    return environment.get_template("report.html.jinja").render(
        title=title or manifest["config"]["file"],
        subtitle=subtitle and f"{subtitle[0].upper()}{subtitle[1:]}.",
        abstract=" ".join(_abstract(list(sections.values()))),
        manifest=manifest,
        facts=[(name, "none" if value is None else str(value)) for name, value in folders.flat(manifest)],
        sections=sections,
        drawings=drawings,
        unfinished=unfinished,
    )


def _counts(sections: Sequence[Section]) -> dict[str, int]:
    """How many claims met each verdict, of those that any did."""
    found = Counter(each.verdict for section in sections for each in section.hypotheses)
    return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}


def _abstract(sections: Sequence[Section]) -> Iterator[str]:
    """The findings of the studies, and how many of their claims stand."""
    for section in sections:
        yield from section.abstract
    counts = _counts(sections)
    if total := sum(counts.values()):
        words = {"holds": ("holds", "hold"), "falsified": ("is falsified", "are falsified"),
                 "undecided": ("is undecided", "are undecided")}  # fmt: skip
        told = [f"{count} {words[verdict][count > 1]}" for verdict, count in counts.items()]
        yield f"Of {total} claim{'s' if total > 1 else ''} {', '.join(told)}."


_NUMBER = re.compile(r"[-+−<>]?\s?\d|[-+]?\.\d|(NaN|inf|no digit|refused)\b")


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers, to be aligned at their right."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.header)
    cells = [[cell for cell in column if cell] for column in columns]
    return [bool(column) and all(_NUMBER.match(cell) for cell in column) for column in cells]


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in textwrap.dedent(text).strip().split("\n\n") if paragraph.strip()]


def print_hypotheses(sections: dict[str, Section]) -> None:
    """The verdicts as a table on stdout, readable at 100 columns."""
    rows = [(name, claim, measured, verdict) for name, (claim, measured, _, verdict) in _verdicts(sections)]
    print_table(("study", "claim", "measured", "verdict"), rows, wrapped=True)
