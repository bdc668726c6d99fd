"""Figures in one quiet style, as SVG that stands inside a page.

A figure is made by `figure`. pyplot would keep a list of all figures and need a display. Matplotlib
reads its settings when an artist is made. So a study's `report` is called within `style()`, and its figures obey.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.rcsetup import cycler

# Told apart by lightness as well as by hue: in print, and under all common kinds of colour blindness.
PALETTE = ("#12355B", "#C03A1E", "#1B9E77", "#56B4E9", "#F0C040", "#8C8C8C")

WIDTH, NARROW = 8.4, 4.0  # inches of every figure on a page and on a phone, so that all have type of one size
_SIZE = 9  # points, of all type

# How a closed form is drawn over a measurement: `axes.plot(m, formula(m), **THEORY)`.
THEORY = {"color": "black", "linestyle": "--", "linewidth": 0.9, "zorder": 3}

_INK, _RULE = "#333333", "#dddddd"

_STYLE = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.labelsize": _SIZE,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.7,
    "axes.titlesize": _SIZE,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "font.size": _SIZE,
    "legend.frameon": False,
    "legend.fontsize": _SIZE,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": _SIZE,
    "ytick.labelsize": _SIZE,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    # Text as outlines: a fifth more bytes, and the same picture with any fonts.
    "svg.fonttype": "path",
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "svg.hashsalt": "jprob",  # without it the names inside an SVG are drawn at random
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within, Matplotlib draws in the project's style: its own defaults, not the user's, and then ours."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def figure(*, columns: int = 1, rows: int = 1, height: float = 4.2) -> tuple[Figure, np.ndarray]:
    """A fresh figure of WIDTH x `height` inches, and its axes in reading order, as a one-dimensional array."""
    with style():
        made = Figure(figsize=(WIDTH, height), layout="constrained")
        return made, made.subplots(rows, columns, squeeze=False).ravel()


def legend(made: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend for all panels, below them, in as many columns as the width takes; a handle may be several artists."""
    if not labels:
        return
    points = 0.55 * _SIZE * max(map(len, labels)) + 5 * _SIZE  # letters are half as wide as high
    columns = max(1, min(len(labels), int(72 * made.get_figwidth() / points)))
    made.legend(handles, labels, loc="outside lower center", ncols=columns)


def stack(made: Figure) -> None:
    """Makes a figure one for a phone, its panels below each other; to be called once it is drawn for a page."""
    axes = made.axes
    for old in made.legends[:]:
        old.remove()
        made.set_figwidth(NARROW)
        legend(made, [each for each in old.legend_handles if each], [text.get_text() for text in old.texts])
    place = axes[0].get_subplotspec()
    rows = place.get_gridspec().nrows if place else 1
    made.set_size_inches(NARROW, len(axes) * max(2.5, 0.85 * made.get_figheight() / rows))
    grid = GridSpec(len(axes), 1, figure=made)
    for i, axis in enumerate(axes):
        axis.set_subplotspec(grid[i])
        if not axis.get_ylabel():  # the first panel of a row speaks for all
            axis.set_ylabel(axes[0].get_ylabel())
        if not len(axis.get_yticks()):
            axis.set_yticks(axes[0].get_yticks(), [text.get_text() for text in axes[0].get_yticklabels()])


def svg(figure: Figure, *, prefix: str = "") -> str:
    """The figure as an `<svg>` element that scales with the page; equal figures give equal bytes.

    Args:
      figure: the layout starts from where it ended, and a second drawing of the same differs in the last digits.
      prefix: opens every id. Figures on one page need different ones: Matplotlib calls the first of each axes_1.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # neither an XML declaration nor a document type may stand inside a page
    text = re.sub(r'\bid="|\bhref="#|url\(#', lambda match: match[0] + prefix, text)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)  # the viewBox keeps the proportions


def pdf(figure: Figure) -> bytes:
    """The figure as a PDF for a paper, its text as text; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return buffer.getvalue()
