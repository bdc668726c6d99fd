"""From a TOML file to a frozen, typed object, or to one line that says what is wrong with it.

A config has the key `backend` and one table per study, named after its module in `experiments/studies`. The study's
`Config` states names, types and ranges. It has no defaults: the file is the whole record of a run. The option `--set
study.key=value` replaces a value before anything is checked, so the command line obeys the same ranges.

TOML is data: reading it executes nothing. Only the studies that the file names are imported, and only once the file
itself is known to be sound. So a misspelt path does not wait for jax to load.
"""

import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec

from experiments import studies
from experiments.errors import InputError, nearest, shown, unknown

Key = tuple[str | int, ...]
Backend = Literal["auto", "cpu", "gpu", "tpu"]
Settings = TypeVar("Settings", bound=msgspec.Struct)

_LEVELS = 20  # of tables and lists: more than any study has, and fewer than Python can follow
_ALSO = {"cuda": "gpu", "nvidia": "gpu", "rocm": "gpu"}  # what others call it


class Config(msgspec.Struct, frozen=True):
    """A config as resolved: what the run is a function of."""

    file: str  # as it was named, for messages and for the name of the results folder
    title: str  # its headline
    backend_from: str  # the file, or --set: where to correct the backend
    backend: Backend
    studies: dict[str, msgspec.Struct]  # by module name, in the order of the file


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config, applies the `key.key=value` overrides, and checks every value.

    Raises:
      InputError: names the file (or `--set`), the dotted key, what was expected and what came.
    """
    text = _read(path)
    table = _parsed(path, text)
    overridden = {key for item in overrides for key in _override(table, item)}
    origin = _Origin(str(path), frozenset(overridden))
    _check_finite(table, (), origin)
    _check_top(table, origin)
    settings = {name: value for name, value in table.items() if name != "backend"}
    return Config(
        file=str(path),
        title=headline(text),
        backend_from="--set" if ("backend",) in overridden else str(path),
        backend=table["backend"],
        studies={name: _study_settings(name, value, origin) for name, value in settings.items()},
    )


def distinct(settings: msgspec.Struct, *names: str) -> None:
    """For a study's `__post_init__`: what a list holds twice would be run, and recorded, twice.

    Raises:
      ValueError: names the list and what came; `load` makes one line of it.
    """
    for name in names:
        values = getattr(settings, name)
        if any(value in values[:i] for i, value in enumerate(values)):
            came = msgspec.json.decode(msgspec.json.encode(values))
            raise ValueError(f"{name}: expected distinct values, got {shown(came)}")


def split(settings: Settings, *names: str) -> list[Settings]:
    """For a study's `parts`: the cells of the grid that the named lists span, the last list running fastest.

    >>> class Grid(msgspec.Struct):
    ...     arms: list[str]
    ...     seeds: list[int]
    >>> [(cell.arms, cell.seeds) for cell in split(Grid(["A", "B"], [1, 2]), "arms", "seeds")]
    [(['A'], [1]), (['A'], [2]), (['B'], [1]), (['B'], [2])]
    """
    cells = itertools.product(*(getattr(settings, name) for name in names))
    return [
        msgspec.structs.replace(settings, **{name: [value] for name, value in zip(names, cell, strict=True)})
        for cell in cells
    ]


class _Origin(NamedTuple):
    """The origin of values, so that a message can open with the place to correct."""

    file: str
    overridden: frozenset[Key]  # what `--set` wrote, and the tables it made on the way

    def error(self, key: Key, problem: str) -> InputError:
        from_command_line = any(key[:length] in self.overridden for length in range(1, len(key) + 1))
        return InputError(f"{'--set' if from_command_line else self.file}: {_dotted(key)}: {problem}")


def _dotted(key: Key) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{_quoted(part)}" for part in key)
    return "".join(parts).removeprefix(".")


def _quoted(part: str) -> str:
    return part if re.fullmatch(r"[\w-]{1,60}", part) else shown(part)


# ---- The file and the command line


def headline(text: str) -> str:
    """The first line of a config's header comment."""
    return next((line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#")), "")


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        neighbours = [str(other) for other in path.parent.glob("*.toml")]
        raise InputError(f"{path}: no such file{nearest(str(path), neighbours)}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: expected a TOML file, got a directory") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: expected UTF-8, got the byte 0x{data[error.start]:02x}") from None


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib's own, an integer of 4300 digits, arrays a thousand deep
        raise InputError(f"{path}: not TOML: {error}") from None


def _override(table: dict[str, Any], item: str) -> Iterator[Key]:
    """Writes `key.key=value` into `table`; yields the keys that are the command line's from now on."""
    name, equals, text = item.partition("=")
    parts = tuple(name.strip().split("."))
    if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in parts):
        raise InputError(f"--set: expected key.key=value, got {shown(item)}")
    if len(parts) > _LEVELS:
        raise InputError(f"--set: expected a key of at most {_LEVELS} parts, got {len(parts)}")
    for depth, part in enumerate(parts[:-1], start=1):
        if part not in table:
            table[part] = {}
            yield parts[:depth]
        table = table[part]
        if not isinstance(table, dict):
            raise InputError(
                f"--set: {_dotted(parts)}: expected {_dotted(parts[:depth])} to be a table, got {shown(table)}"
            )
    table[parts[-1]] = _toml_value(text)
    yield parts


def _toml_value(text: str) -> Any:
    """The TOML value that `text` spells, or `text` itself: `--set backend=cpu` needs no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text  # a newline in `text` could open a second key


# ---- Checks: each finds one kind of mistake and names the place


def _check_finite(value: Any, key: Key, origin: _Origin) -> None:
    """No setting may be nan or inf: they pass range checks (nan even both ends of one). None may be too deep."""
    if isinstance(value, float) and not math.isfinite(value):
        raise origin.error(key, f"expected a finite number, got {value}")
    if len(key) > _LEVELS:
        raise origin.error(key[:1], f"expected at most {_LEVELS} levels, got more")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, item in items:
        _check_finite(item, (*key, part), origin)


def _check_top(table: dict[str, Any], origin: _Origin) -> None:
    """The top level: `backend`, and at least one table that is named after a study."""
    known = studies.names()
    for name, value in table.items():
        if name in known and not isinstance(value, dict):
            raise origin.error((name,), f"expected a table, got {shown(value)}")
        if name != "backend" and name not in known:
            is_table = isinstance(value, dict)
            problem = unknown(name, known, "study") if is_table else unknown(name, ["backend", *known])
            raise origin.error((name,), problem)
    if "backend" not in table:
        raise origin.error(("backend",), f"missing, expected {_expected(Backend)}")
    _check(table["backend"], Backend, ("backend",), origin)
    if len(table) == 1:
        raise InputError(f"{origin.file}: expected a table for at least one study of {', '.join(known)}, got none")


def _study_settings(name: str, table: dict[str, Any], origin: _Origin) -> msgspec.Struct:
    study = studies.load(name)
    _check(table, study.Config, (name,), origin)
    try:
        settings = msgspec.convert(table, study.Config)
        getattr(study, "require", lambda settings: None)(settings)
    except (msgspec.ValidationError, InputError) as error:  # keys that do not fit together, or data that are not there
        raise origin.error((name,), str(error)) from None
    return settings


def _check(value: Any, kind: Any, key: Key, origin: _Origin) -> None:
    """Walks `value` along the type `kind`, so that a message knows the key and the value at fault.

    msgspec alone would name the constraint but not the value, and the unknown key but not its neighbours.
    """
    plain = _plain(kind)
    if _is_table(plain):
        _check_table(value, plain, key, origin)
        return
    if isinstance(value, list) and get_origin(plain) in (list, tuple):
        item_kinds = get_args(plain)
        repeated = get_origin(plain) is list or item_kinds[-1] is Ellipsis
        for index, item in enumerate(value[: None if repeated else len(item_kinds)]):
            _check(item, item_kinds[0 if repeated else index], (*key, index), origin)
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        near = ""
        if isinstance(value, str) and get_origin(plain) is Literal:
            near = nearest(_ALSO.get(value.lower(), value), get_args(plain))
        raise origin.error(key, f"expected {_expected(kind, value)}, got {shown(value)}{near}") from None


def _check_table(value: Any, kind: type[msgspec.Struct], key: Key, origin: _Origin) -> None:
    if not isinstance(value, dict):
        raise origin.error(key, f"expected a table, got {shown(value)}")
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for name in value:
        if name not in fields:
            raise origin.error((*key, name), unknown(name, fields))
    for name, field in fields.items():
        if name not in value:  # even where the field has a default: the file is the whole record
            raise origin.error((*key, name), f"missing, expected {_expected(field)}")
        _check(value[name], field, (*key, name), origin)


def _expected(kind: Any, value: object = None) -> str:
    """The value that `kind` asks for, in words: if it has several constraints, the one that `value` breaks."""
    plain = _plain(kind)
    if get_origin(plain) is Literal:
        return f"one of {', '.join(str(choice) for choice in get_args(plain))}"
    if _is_table(plain):
        return "a table"
    for attempt in (value, object()):  # of an object msgspec says the type alone
        try:
            msgspec.convert(attempt, kind)
        except msgspec.ValidationError as error:  # "Expected `int` >= 1", "Expected `int`, got `str` - at `$[0]`"
            if message := re.match(r"Expected (.+?)(?:, got .*)?(?: - at .*)?$", str(error)):
                return message[1].replace("`", "")
    return "another value"


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _is_table(plain: Any) -> bool:
    return isinstance(plain, type) and issubclass(plain, msgspec.Struct)
