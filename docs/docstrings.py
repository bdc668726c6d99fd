"""Prepares docstrings for the reference: readable formulas, examples as code, `Returns` as a paragraph.

Docstrings hold plain text, so that they read well in a terminal. Markdown would take their `*` and `>>>` for markup.
"""

import re
import textwrap
from typing import Any

import griffe

_SECTIONS = ("Args:", "Attributes:", "Raises:")
_FORMULAS = [
    (r"\b(\w)\*\*(-?\w+)", r"\1<sup>\2</sup>"),
    (r"([\w)])\^(?:\(([^()]*)\)|(-?\w+))", lambda m: f"{m[1]}<sup>{m[2] or m[3]}</sup>"),
    (r"\b(sum|max|min)_(?:\{([^}]*)\}|(\w+)\b)", lambda m: f"{m[1]}<sub>{m[2] or m[3]}</sub>"),
    (r"(?<![\w.`])([A-Za-z])_([a-z0-9]|top)\b", r"\1<sub>\2</sub>"),
    (r"\bsum(?=<sub>)", "Σ"),
    (r"\bsqrt *(?=[(\d])", "√"),
    (r"\blog2(?=\()", "log<sub>2</sub>"),
    (r" \* ", " · "),
    (r"\*", r"\\*"),
    (r"\|\|", "‖"),
    (r"<=", "≤"),
    (r">=", "≥"),
    (r"!=", "≠"),
]


class ReadableDocstrings(griffe.Extension):
    """Rewrites the docstrings of the packages that are documented."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrites all docstrings of a package once it is loaded."""
        self._rewrite(pkg)

    def _rewrite(self, each: Any) -> None:
        if each.is_alias:
            return
        if each.docstring:
            each.docstring.value = readable(each.docstring.value)
        for member in each.members.values():
            self._rewrite(member)


def readable(text: str) -> str:
    """The docstring as Markdown with the sections that griffe reads."""
    return "\n\n".join(_block(block) for block in re.split(r"\n{2,}", text.strip("\n")))


def _block(block: str) -> str:
    head, _, rest = block.partition("\n")
    if head.startswith(">>>"):
        return f"```pycon\n{block}\n```"
    if head == "Returns:":
        return f"**Returns:**\n\n{formulas(textwrap.dedent(rest))}"
    if head in _SECTIONS:
        return f"{head}\n{formulas(rest)}"
    if head.startswith("    "):
        return block  # a table or formulas in columns
    return formulas(re.sub(r"^Source:", "**Source:**", block))


def formulas(text: str) -> str:
    """The text with subscripts, superscripts and signs, outside of backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    for pattern, replacement in _FORMULAS:
        parts[::2] = [re.sub(pattern, replacement, part) for part in parts[::2]]
    return "".join(parts)
