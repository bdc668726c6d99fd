"""Ctrl-C ends a command at once with status 130 and no traceback, from the first import to the last line."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_studies

from experiments.__main__ import main

ROOT = Path(__file__).parent.parent
LINE = "interrupted: nothing was written\n"


@pytest.fixture(autouse=True)
def _tiny_studies(monkeypatch, tmp_path):
    tiny_studies.install(monkeypatch, tmp_path)


PYTHON = [sys.executable, "-X", "importtime"]


def interrupted_after(module, command):
    """Status and stderr of a command that got SIGINT as soon as Python told that `module` is imported."""
    process = subprocess.Popen(
        command,
        env=tiny_studies.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if re.search(rf"\| +{re.escape(module)}$", line):
            process.send_signal(signal.SIGINT)
            break
    else:
        raise AssertionError(f"{module} was not imported")
    _, errors = process.communicate(timeout=30)
    return process.returncode, "".join(re.findall(r"^(?!import time:).*\n", errors, re.MULTILINE))


# In the order of import. What comes before, some 20 ms of Python's own start, is out of the program's reach.
@pytest.mark.parametrize("module", ["enum", "argparse", "tomllib", "msgspec._core", "numpy._core.multiarray"])
@pytest.mark.parametrize("command", [["list"], ["run", str(ROOT / "configs/study.toml")], ["results", "x"]])
def test_ctrl_c_while_modules_load_is_one_line(command, module):
    status, errors = interrupted_after(module, [*PYTHON, "-m", "experiments", *command])
    assert status == 130
    assert errors in ("", LINE)  # no line yet where the watch does not stand


@pytest.mark.parametrize("module", ["matplotlib", "experiments.report", "matplotlib.backends.backend_mixed"])
def test_ctrl_c_while_a_report_is_made_is_one_line(module):
    assert main(["run", "configs/coin.toml", "--out", "run"]) == 0
    before = tiny_studies.tree()
    status, errors = interrupted_after(module, [*PYTHON, *tiny_studies.COMMAND[1:], "report", "run"])
    assert status == 130
    assert re.fullmatch(r"interrupted: (nothing was written|what is measured is in run; .* makes the report)\n", errors)
    assert tiny_studies.tree() == before


def test_ctrl_c_is_python_s_own_again_afterwards():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(["list"]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
