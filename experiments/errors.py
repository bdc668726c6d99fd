"""Mistakes of the caller, each told in one line: what was expected, what came, and the nearest known name.

An `InputError` is a mistake in a config, an option or a folder: `python -m experiments` prints its message and ends
with status 2. An `UnfinishedError`, also one line, tells of jobs that failed or runs that differ: status 1. Any other
exception is a mistake in the program and shows its traceback.
"""

import difflib
import json
from collections.abc import Collection


class InputError(Exception):
    """The command cannot be done; the message is one line for the person who asked."""


class UnfinishedError(Exception):
    """The answer is no, or some of what was asked for is not done; the message is one line that says what."""


def unknown(name: str, known: Collection[str], what: str = "key") -> str:
    """Says that `name` is unknown, what would have been known, and which of it is nearest.

    >>> unknown("pionts", ["points", "seed"])
    'unknown key, expected one of points, seed; nearest: points'
    """
    return f"unknown {what}, expected one of {', '.join(known) or '(there is none)'}{nearest(name, known)}"


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a message: "; nearest: x", or nothing where no known name resembles `name`."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; nearest: {matches[0]}" if matches else ""


def shown(value: object, limit: int = 60) -> str:
    """A value as TOML spells it, on one line and at most `limit` characters long."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print one beyond 4300 digits
    if isinstance(value, list):
        text = f"[{', '.join(shown(item, limit) for item in value[:limit])}]"
    elif isinstance(value, str):
        text = json.dumps(value, ensure_ascii=not value.isprintable())  # a line break would make two lines of one
    else:
        text = str(value).lower() if isinstance(value, bool | None) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
