"""Four small studies that stand in for the real ones, so that tests see the harness alone."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import studies

FOLDER = Path(__file__).parent

COIN = """\
# Heads come as often as the bias says. A second.
# Expected: both shares within .1.
backend = "cpu"

[coin]
seed = 7
flips = 1000
biases = [0.5, 0.75]

[coin.toss]
height = 1.5
hand = "left"
"""

MANIFEST = {  # the least of one
    "identity": "a" * 64,
    "started": "today",
    "config": {"file": "a.toml", "title": "A", "studies": {}},
    "source": "s",
    "versions": {},
    "device": None,
    "numerics": None,
    "git": {},
    "data": {},
    "seconds": {},
}

# The command that a process runs instead of `python -m experiments` to find these studies.
COMMAND = [
    sys.executable,
    "-c",
    f"import sys; from experiments import studies; studies.__path__[:] = [{str(FOLDER)!r}]; "
    "from experiments.__main__ import main; sys.exit(main())",
]


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Replaces the real studies by these, and works in `folder`, with configs/coin.toml in it."""
    monkeypatch.setattr(studies, "__path__", [str(FOLDER)])
    monkeypatch.chdir(folder)
    (folder / "configs").mkdir()
    (folder / "configs" / "coin.toml").write_text(COIN, encoding="utf-8")


def environment() -> dict[str, str]:
    """Environment in which a process finds the project from any folder."""
    tests = FOLDER.parent
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}


def tree() -> dict[str, bytes]:
    """Every file below the working directory, to see that nothing was written."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}


PATIENCE = 600  # seconds that bound a hang, and nothing else: no test depends on how fast the machine is


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.05)
