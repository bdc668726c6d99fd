"""Equal figures give equal bytes, and stand next to each other inside a page."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import matplotlib.colors
import numpy as np
import pytest

from experiments import plots


def drawing():
    margin = np.linspace(-5, 5, 21)
    with plots.style():
        figure, axes = plots.figure(columns=2, rows=1)
        for name, colour in zip("ABCDEF", plots.PALETTE, strict=True):
            axes[0].plot(margin, np.exp(-margin), "o-", color=colour, label=name)
        axes[1].plot(margin, np.exp(-margin), **plots.THEORY, label="theory $e^{-m}$")
        axes[0].set(yscale="log", xlabel="margin < 0 & > 0")
        axes[0].legend()
    return figure


def test_equal_figures_give_equal_bytes():
    assert plots.svg(drawing()) == plots.svg(drawing())


def test_the_users_settings_change_nothing():
    want = plots.svg(drawing())
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "none", "axes.grid": True}):
        assert plots.svg(drawing()) == want


def test_the_style_ends_with_its_block():
    before = dict(matplotlib.rcParams)
    drawing()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_axes_come_in_reading_order(columns, rows):
    figure, axes = plots.figure(columns=columns, rows=rows)
    assert axes.shape == (columns * rows,)
    assert list(axes) == figure.axes


def test_colours_differ_in_print_too():
    """By their lightness L* (CIE 1976); the grey comes last, and is told apart by having no hue."""
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in plots.PALETTE[:-1]])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16
    assert np.diff(lightness).min() > 9


def test_on_a_phone_the_panels_lie_below_each_other():
    figure = drawing()
    with plots.style():
        plots.legend(figure, *figure.axes[0].get_legend_handles_labels())
    plots.svg(figure)
    plots.stack(figure)
    root = ElementTree.fromstring(plots.svg(figure))
    assert root.attrib["viewBox"].split()[2] == f"{72 * plots.NARROW:g}"
    upper, lower = (axis.get_position() for axis in figure.axes)
    assert lower.y1 < upper.y0
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == list("ABCDEF")
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_svg_is_one_element_that_scales_and_asks_for_nothing():
    text = plots.svg(drawing())
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & set(root.keys())
    assert "metadata" not in text
    assert not re.search(r"url\((?!#)|href=\"(?!#)|@import|@font-face", text)


def test_a_prefix_keeps_two_figures_apart():
    def names(prefix):
        text = plots.svg(drawing(), prefix=prefix)
        defined = set(re.findall(r'\bid="([^"]+)"', text))
        used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
        assert {left or right for left, right in used} <= defined  # every reference still has its target
        return defined

    assert not names("a-") & names("b-")


def test_pyplot_is_never_loaded():
    code = "import sys, experiments.report, experiments.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
