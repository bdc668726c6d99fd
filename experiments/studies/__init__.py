"""The studies, one module or package each: every module in this folder is a study, and there is no list to edit.

A study offers three names, see `Study`: its settings, a generator of records, and a reading of stored records. Three
more are for some:

    parts(config) -> list[Config]                     of a study that takes minutes. Their records together are those
                                                      of the whole. A part is a job, and what an interrupted run does
                                                      not measure twice.
    tier(config, settings, value) -> Tier | None      of a study whose values agree between devices, see
                                                      `experiments.compare`
    require(config)                                   of a study whose config names files or libraries. It raises an
                                                      `InputError` if one is not there, before a run, and not for a
                                                      report.

The first line of its docstring is its title. Studies never import each other.
"""

import ast
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import msgspec

from experiments.errors import InputError
from experiments.findings import Section
from experiments.results import Progress, Record


@runtime_checkable  # which checkers of types need
class Study(Protocol):
    """The interface that the harness expects of a module in this folder."""

    Config: type[msgspec.Struct]
    """Frozen, without defaults: the file is the whole record. Ranges stand in `Annotated[..., msgspec.Meta(...)]`."""

    def run(self, config: Any) -> Iterator[Record | Progress]:
        """Does the work, without I/O: yields a Record for each finished piece, and Progress now and then."""
        ...

    def report(self, config: Any, records: Sequence[Record]) -> Section:
        """Reads the stored records: figures, hypotheses with verdicts, and what speaks against them."""
        ...


def names() -> list[str]:
    """The names of all studies, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Study:
    """Imports one study; the others stay unloaded.

    Raises:
      InputError: it lacks one of the names that a study offers.
    """
    module = importlib.import_module(f"{__name__}.{name}")
    offered = ("Config", "run", "report")
    if lacking := [part for part in offered if not hasattr(module, part)]:
        raise InputError(f"{name}: expected a study with Config, run and report, got one without {', '.join(lacking)}")
    return cast(Study, module)


def parts(study: Study, config: Any) -> list[Any]:
    """The config cut into the parts of the study; one that is never cut is its only part."""
    return getattr(study, "parts", lambda whole: [whole])(config)


def title(name: str) -> str:
    """The first line of a study's docstring, read without importing it (a study imports jax)."""
    docstring = ast.get_docstring(ast.parse(path(name).read_text(encoding="utf-8"), str(path(name))))
    return docstring.splitlines()[0] if docstring else ""


def path(name: str) -> Path:
    """The file of a study, or the first file of its package, found without importing it."""
    spec = importlib.util.find_spec(f"{__name__}.{name}")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def files(name: str) -> list[Path]:
    """All files of a study."""
    first = path(name)
    return [*first.parent.rglob("*.py")] if first.name == "__init__.py" else [first]
