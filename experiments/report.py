"""From stored records to one page: every hypothesis with its figure, numbers and verdict, and what speaks against it.

The page is a single file without any outside request, and the same bytes for the same results. It is made from the
results folder alone, by the studies' own `report` functions.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from experiments import folders, plots, studies
from experiments.errors import InputError
from experiments.export import print_table
from experiments.findings import VERDICTS, Hypothesis, Section
from experiments.folders import Run

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
                folders.replace(run.folder / FIGURES / f"{name}-{i}.svg", svg)
        run.store.write_hypotheses([(name, *hypothesis) for name, hypothesis in _hypotheses(sections)])
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


def _hypotheses(sections: dict[str, Section]) -> Iterator[tuple[str, Hypothesis]]:
    return ((name, hypothesis) for name, section in sections.items() for hypothesis in section.hypotheses)


def _drawings(name: str, section: Section) -> list[Markup]:
    """The figures as SVG. Drawing changes a figure, so a section serves once."""
    svgs = (plots.svg(plot.figure, prefix=f"{name}-{i}-") for i, plot in enumerate(section.plots, start=1))
    return [Markup(svg) for svg in svgs]  # Matplotlib has escaped the texts in it


def page(
    manifest: dict[str, Any], sections: dict[str, Section], drawings: dict[str, list[Markup]], unfinished: list[str]
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
    environment.filters["paragraphs"] = _paragraphs
    return environment.get_template("report.html.jinja").render(
        manifest=manifest,
        facts=[(name, "none" if value is None else str(value)) for name, value in folders.flat(manifest)],
        sections=sections,
        drawings=drawings,
        hypotheses=list(_hypotheses(sections)),
        unfinished=unfinished,
    )


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in textwrap.dedent(text).strip().split("\n\n") if paragraph.strip()]


def print_hypotheses(sections: dict[str, Section]) -> None:
    """The verdicts as a table on stdout, readable at 100 columns."""
    rows = [(name, each.claim, each.measured, each.verdict) for name, each in _hypotheses(sections)]
    print_table(("study", "claim", "measured", "verdict"), rows, wrapped=True)
