"""The parts of a page: controls, numbers, charts and code in one look, for any width, light or dark."""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import marimo as mo
import numpy as np
from altair.utils import schemapi

# Those of experiments.plots, lighter where a dark background would swallow them.
PALETTE = ("#3D78B4", "#D9532F", "#1B9E77", "#56B4E9", "#D9A520", "#8C8C8C")
BLUE, RED, GREEN, SKY, GOLD, GREY = PALETTE
CONFIG = {
    "view": {"stroke": None},
    "axis": {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "gridOpacity": 0.4},
    "legend": {"orient": "bottom", "title": None, "labelLimit": 320, "columns": 2, "labelFontSize": 11},
}
COLOURED = alt.Scale(range=list(PALETTE))


HERE = Path(__file__).parent  # a notebook does not know its own place

# Altair checks each part of a chart as it is made. That takes longer than a step of a slider may.
schemapi.DEBUG_MODE = False
alt.data_transformers.consolidate_datasets = False


def intro(title: str, sentences: str, formula: str) -> mo.Html:
    """The head of a page: its title, three sentences and one formula."""
    return mo.md(f"# {title}\n\n{sentences}\n\n$$\n{formula}\n$$\n\n[All explorers](../)")


def controls(**named: Any) -> Any:
    """Controls by their labels: (low, high, step, value) is a slider, a list of words a choice, a truth value a switch.

    A slider has even steps: its value is then the number that a screen reader says. Underscores stand for spaces.
    """
    made = {}
    for name, given in named.items():
        label = name.replace("_", " ")
        if isinstance(given, bool):
            made[label] = mo.ui.switch(given, label=label)
        elif isinstance(given, list):
            made[label] = mo.ui.dropdown(given, value=given[0], label=label, full_width=True)
        else:
            made[label] = mo.ui.slider(*given, label=label, show_value=True, full_width=True)
    return mo.ui.dictionary(made)


def panel(controls: Any) -> mo.Html:
    """All controls of a page, in as many columns as the width takes."""
    return mo.Html(f'<div class="controls">{"".join(each.text for each in controls.elements.values())}</div>')


def floats(values: Mapping[str, Any], names: Iterable[str]) -> np.ndarray:
    """Values of controls as one array: of one dtype, whether the browser sent 1 or 1.0."""
    return np.array([values[name] for name in names], np.float32)


def flat(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Numbers by name: entry k of an array `probs` is `probs_k`."""
    named = {}
    for name, value in found.items():
        named |= {f"{name}_{k}": x for k, x in enumerate(value)} if np.ndim(value) else {name: value}
    return named


def text(value: Any) -> str:
    """A number as a page shows it."""
    if isinstance(value, str):
        return value
    if np.issubdtype(np.asarray(value).dtype, np.integer):
        return f"{value:,}"
    number = float(value)
    if math.isnan(number):
        return "NaN"
    if number == 0:
        return "0"
    if not 1e-3 <= abs(number) < 1e5:
        return f"{number:.3e}"
    return f"{number:.{4 - max(0, math.floor(math.log10(abs(number))))}f}"  # of float32, 5 digits are safe


def output(name: str, value: Any, *, said: bool = False) -> str:
    """A number that a program finds by its name; `said`: a screen reader says it when it changes."""
    live = "" if said else ' aria-live="off"'
    return f'<output data-name="{name}"{live}>{html.escape(text(value))}</output>'


def numbers(labels: Mapping[str, str], shown: Mapping[str, Any]) -> str:
    """The numbers of a page by their labels. The first is the one to say aloud."""
    boxes = [
        f"<div><span>{label}</span>{output(name, shown[name], said=at == 0)}</div>"
        for at, (name, label) in enumerate(labels.items())
    ]
    return f'<div class="numbers">{"".join(boxes)}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls where it is wider than the page. The first cell of a row names it."""
    head = "".join(f'<th scope="col">{each}</th>' for each in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{each}</td>" for each in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def rows(**columns: Any) -> alt.InlineData:
    """Data of a chart from columns; a number stands for a column of that number, and NaN for a gap.

    As a text: altair copies and checks each number of a list, which takes longer than all else.
    """
    arrays = [np.ravel(each).tolist() for each in np.broadcast_arrays(*map(np.asarray, columns.values()))]
    cells = [[x if isinstance(x, str) else "" if x != x else f"{x:.6g}" for x in column] for column in arrays]
    lines = map(",".join, zip(*cells, strict=True))
    # Named, since not all channels would read a text as a number.
    numbers = {name: "number" for name, each in zip(columns, arrays, strict=True) if not isinstance([*each, 0][0], str)}
    return alt.InlineData("\n".join([",".join(columns), *lines]), format=alt.CsvDataFormat(type="csv", parse=numbers))


class Drawn:
    """A chart as marimo shows it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec

    def _mime_(self) -> tuple[Any, str]:
        return "application/vnd.vegalite.v6+json", json.dumps(self.spec)


def chart(layers: Sequence[alt.Chart], title: str, *, height: int = 240) -> str:
    """A chart as wide as its place, of layers. It has no menu, whose links would lead off the machine.

    The layers are joined here: altair would copy each of them several times.
    """
    specs = [layer.to_dict(validate=False) for layer in layers]
    spec = {"$schema": specs[0]["$schema"], "width": "container", "height": height, "config": CONFIG}
    spec["layer"] = [{key: each[key] for key in ("data", "mark", "encoding")} for each in specs]
    spec |= {"background": "transparent", "usermeta": {"embedOptions": {"actions": False, "renderer": "canvas"}}}
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{mo.as_html(Drawn(spec)).text}</figure>"


def show(*parts: str) -> mo.Html:
    """Tables and charts that change with the controls, in one column or two; a part alone takes the whole width."""
    return mo.Html(f'<div class="charts">{"".join(f"<div>{each}</div>" for each in parts)}</div>')


def code(program: str) -> mo.Html:
    """The end of a page: the program that gives the numbers it shows."""
    return mo.md(f"The code with these values:\n\n```python\n{program.strip()}\n```")
