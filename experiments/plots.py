"""Figures in one quiet style, as SVG that stands inside a page.

A figure is made by `figure`, never by pyplot, which would keep a list of all figures and need a display. Matplotlib
reads its settings when an artist is made, so a study's `report` is called within `style()`, and what it draws obeys.
"""

import contextlib
import io
import re
from collections.abc import Iterator

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

# By arm. Okabe and Ito's palette: told apart under all common kinds of colour blindness, and in print by lightness.
COLOURS = {"A": "#0072B2", "B": "#D55E00", "C": "#009E73", "D": "#CC79A7"}

# How a closed form is drawn over a measurement: `axes.plot(m, formula(m), **THEORY)`.
THEORY = {"color": "black", "linestyle": "--", "linewidth": 0.9, "zorder": 3}

_INK, _RULE = "#333333", "#dddddd"

_STYLE = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9.5,
    "axes.prop_cycle": cycler(color=[*COLOURS.values(), "#56B4E9", "#E69F00", "#666666"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.7,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    # Text as outlines: a fifth more bytes, and the same picture whatever fonts the reader has.
    "svg.fonttype": "path",
    "svg.hashsalt": "jprob",  # without it the names inside an SVG are drawn at random
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within, Matplotlib draws in the project's style: its own defaults, not the user's, and then ours."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def figure(*, columns: int = 1, rows: int = 1, width: float = 7.0, height: float = 4.2) -> tuple[Figure, np.ndarray]:
    """A fresh figure of `width` x `height` inches, and its axes in reading order, as a one-dimensional array."""
    with style():
        made = Figure(figsize=(width, height), layout="constrained")
        return made, made.subplots(rows, columns, squeeze=False).ravel()


def svg(figure: Figure, *, prefix: str = "") -> str:
    """The figure as an `<svg>` element that scales with the page; equal figures give equal bytes.

    Args:
      figure: drawn once only: the layout starts from where it ended, and a second drawing differs in the last digits.
      prefix: opens every id. Figures on one page need different ones: Matplotlib calls the first of each axes_1.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # neither an XML declaration nor a document type may stand inside a page
    text = re.sub(r'\bid="|\bhref="#|url\(#', lambda match: match[0] + prefix, text)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)  # the viewBox keeps the proportions
