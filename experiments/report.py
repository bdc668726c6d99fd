"""From stored records to one page: every hypothesis with its figure, numbers and verdict, and what speaks against it.

The page is a single file without any outside request, and the same bytes for the same results. It is made from the
results folder alone, by the studies' own `report` functions. The same text is in report.md. Each figure is also a file,
as SVG for a page and as PDF for a paper.
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

PAGE, TEXT, FIGURES = "report.html", "report.md", "figures"
_SENTENCES = 5  # of the abstract of the page


def build(run: Run) -> dict[str, Section]:
    """Writes report.html, report.md, figures and the table of hypotheses; returns the sections by study.

    Raises:
      InputError: the folder was written by other code, or cannot be written.
    """
    wanted, finished = run.manifest["config"]["studies"], run.store.finished()
    sections = {name: _section(run, name) for name in wanted if name in finished}
    unfinished = [name for name in wanted if name not in finished]
    drawings = {name: _drawings(name, section) for name, section in sections.items()}
    texts = {name: page(name, run.manifest, sections, drawings, unfinished) for name in (TEXT, PAGE)}
    with folders.writing(run.folder):
        (run.folder / FIGURES).mkdir(exist_ok=True)
        for name, svgs in drawings.items():
            for i, svg in enumerate(svgs, start=1):
                folders.replace(run.folder / FIGURES / f"{name}-{i}.svg", svg.wide)
                folders.replace(run.folder / FIGURES / f"{name}-{i}.pdf", svg.pdf)
        run.store.write_hypotheses([(name, *said) for name, said in _verdicts(sections)])
        for name, text in texts.items():
            folders.replace(run.folder / name, text)
    return sections


def configured(run: Run, name: str) -> tuple[studies.Study, Any]:
    """A study of a run, and its settings.

    Raises:
      InputError: the folder was written by other code.
    """
    if name not in studies.names():
        raise InputError(f"{run.folder}: written by other code: there is no study {name} here")
    study = studies.load(name)
    try:
        return study, msgspec.convert(run.manifest["config"]["studies"][name], study.Config)
    except msgspec.ValidationError as error:
        raise InputError(f"{run.folder}: written by other code: {name}: {error}") from None


def _section(run: Run, name: str) -> Section:
    study, config = configured(run, name)
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
    """A figure as SVG, for a page and for a phone, and as PDF."""

    wide: Markup
    narrow: Markup | None  # None: it does not stack
    pdf: bytes


def _drawings(name: str, section: Section) -> list[Drawing]:
    """Drawing changes a figure, so a section serves once."""
    drawings = []
    for i, plot in enumerate(section.plots, start=1):
        wide, narrow = Markup(plots.svg(plot.figure, prefix=f"{name}-{i}-")), None  # its texts are escaped
        pdf = plots.pdf(plot.figure)
        if plot.stacks:
            with plots.style():
                plots.stack(plot.figure)
            narrow = Markup(plots.svg(plot.figure, prefix=f"{name}-{i}-narrow-"))
        drawings.append(Drawing(wide, narrow, pdf))
    return drawings


def page(
    name: str,
    manifest: dict[str, Any],
    sections: dict[str, Section],
    drawings: dict[str, list[Drawing]],
    unfinished: list[str],
) -> str:
    """The whole report: as HTML for the name of `PAGE`, as Markdown for that of `TEXT`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name == PAGE,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "math": lambda text: Markup(html(text)),  # which escapes
        "code": _code,
        "cell": lambda text: text.replace("|", "\\|"),
        "numeric": _numeric,
        "paragraphs": _paragraphs,
        "verdicts": lambda section: list(_counts([section]).items()),
    }
    title, _, subtitle = manifest["config"]["title"].rstrip(".").partition(": ")
    return environment.get_template(f"{name}.jinja").render(
        title=title or manifest["config"]["file"],
        subtitle=subtitle and f"{subtitle[0].upper()}{subtitle[1:]}.",
        abstract=" ".join(_abstract(list(sections.values()))),
        manifest=manifest,
        facts=[(name, "none" if value is None else str(value)) for name, value in folders.flat(manifest)],
        sections=sections,
        drawings=drawings,
        unfinished=unfinished,
        figures=FIGURES,
    )


def _counts(sections: Sequence[Section]) -> dict[str, int]:
    """How many claims met each verdict, of those that any did."""
    found = Counter(each.verdict for section in sections for each in section.hypotheses)
    return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}


def _abstract(sections: Sequence[Section]) -> Iterator[str]:
    """The findings of the studies, and how many of their claims stand."""
    found = [sentence for section in sections for sentence in section.abstract]
    yield from found[:_SENTENCES]  # each section opens with its own
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
    cells = [[cell for cell in column if cell not in ("", "-")] for column in columns]
    return [bool(column) and all(_NUMBER.match(cell) for cell in column) for column in cells]


def _code(text: str) -> str:
    """A text as Markdown, with its formulas as code."""
    outside = lambda part: re.sub(r"([\\`*<])", r"\\\1", part)  # noqa: E731
    return "".join(f"`{part}`" if i % 2 else outside(part) for i, part in enumerate(text.split("$")))


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in textwrap.dedent(text).strip().split("\n\n") if paragraph.strip()]


def print_hypotheses(sections: dict[str, Section]) -> None:
    """The verdicts as a table on stdout, readable at 100 columns."""
    rows = [(name, claim, measured, verdict) for name, (claim, measured, _, verdict) in _verdicts(sections)]
    print_table(("study", "claim", "measured", "verdict"), rows, wrapped=True)
