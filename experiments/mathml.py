"""Formulas in a text: `$e^-m$` is MathML on the page, and e^-m on a terminal.

The notation is that of the docstrings: ^ and _ for superscripts and subscripts, sqrt(...), names of several letters
upright, `m0` for m with the index 0. It takes no TeX, so it reads well in plain text too.
"""

import re
from html import escape

_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|[^\W\d_]+\d*|\|\||<=|>=|\S")
_NAMES = {"beta": "β", "eps": "ε", "tau": "τ"}
_SIGNS = {"-": "−", "*": "·", "||": "‖", "<=": "≤", ">=": "≥"}


def plain(text: str) -> str:
    """A text with its formulas as they are written, for a terminal or a database."""
    return text.replace("$", "")


def html(text: str) -> str:
    """A text as HTML, with its formulas as MathML.

    >>> html("1 < $m0$")
    '1 &lt; <math><mrow><msub><mi>m</mi><mn>0</mn></msub></mrow></math>'
    """
    pieces = text.split("$")
    return "".join(_breakable(piece) if i % 2 else escape(piece, quote=False) for i, piece in enumerate(pieces))


def _breakable(text: str) -> str:
    """A formula that a narrow page may break after its signs of equality."""
    return "\u200b".join(formula(part) for part in re.split(r"(?<= =) ", text))


def formula(text: str) -> str:
    """A formula as MathML."""
    tokens, rows = _TOKEN.findall(text), []
    while tokens:
        rows.append(_row(tokens))
    return f"<math>{''.join(rows)}</math>"


def _row(tokens: list[str], end: str = "") -> str:
    """Consumes tokens up to the closing sign `end`."""
    out: list[str] = []
    while tokens and tokens[0] != end:
        base = _atom(tokens)
        while tokens and tokens[0] in "^_":
            tag = "msup" if tokens.pop(0) == "^" else "msub"
            base = f"<{tag}>{base}{_script(tokens)}</{tag}>"
        if out and not (out[-1].startswith("<mo") or base.startswith("<mo")):
            out.append('<mspace width="0.17em"/>')
        out.append(base)
    return f"<mrow>{''.join(out)}</mrow>"


def _script(tokens: list[str]) -> str:
    """A superscript or subscript: one thing, with its sign; brackets around it are dropped."""
    if not tokens:
        return "<mrow></mrow>"
    if tokens[0] == "-":
        tokens.pop(0)
        return f"<mrow><mo>−</mo>{_script(tokens)}</mrow>"
    return _group(tokens) if tokens[0] == "(" else _atom(tokens)


def _group(tokens: list[str]) -> str:
    tokens.pop(0)
    inside = _row(tokens, ")")
    del tokens[:1]
    return inside


def _atom(tokens: list[str]) -> str:
    if tokens[0] == "(":
        return f'<mrow><mo stretchy="false">(</mo>{_group(tokens)}<mo stretchy="false">)</mo></mrow>'
    token = tokens.pop(0)
    if token == "sqrt":
        return f"<msqrt>{_script(tokens)}</msqrt>"
    if match := re.fullmatch(r"([^\W\d]+)(\d*)", token):
        name = f"<mi>{_NAMES.get(match[1], match[1])}</mi>"
        return f"<msub>{name}<mn>{match[2]}</mn></msub>" if match[2] else name
    if token[0].isdigit() or (token[0] == "." and len(token) > 1):
        return f"<mn>{token}</mn>"
    if token in ("|", "||"):  # which may open or close, and so needs no space
        return f'<mo stretchy="false" lspace="0" rspace="0">{_SIGNS.get(token, token)}</mo>'
    return f"<mo>{escape(_SIGNS.get(token, token))}</mo>"
