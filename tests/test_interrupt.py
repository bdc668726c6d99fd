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


# Sends SIGINT to its own process as Python begins to import MODULE: at the same place, however fast the machine is.
HOOK = """
import _signal, os, sys
_signal.signal(2, _signal.default_int_handler)  # which a process in the background may have inherited as ignored
class Finder:
    def find_spec(name, path=None, target=None):
        if name == MODULE:
            sys.meta_path.remove(Finder)
            os.kill(os.getpid(), 2)
sys.meta_path.insert(0, Finder)
"""
PROGRAM = "import runpy; runpy.run_module('experiments', run_name='__main__')"


def interrupted_before(module, *arguments, program=PROGRAM):
    """Status and stderr of a command that gets SIGINT as it comes to import `module`."""
    code = HOOK.replace("MODULE", repr(module)) + program
    environment = tiny_studies.environment()
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


# The modules in the order of import. The first 20 ms are Python's own start, out of the program's reach.
@pytest.mark.parametrize("module", ["signal", "argparse", "tomllib", "msgspec._core", "numpy._core.multiarray"])
def test_ctrl_c_while_modules_load_is_one_line(module):
    status, errors = interrupted_before(module, "run", str(ROOT / "configs/study.toml"))
    assert status == 130
    assert errors in ("", LINE)  # no line yet where the watch does not stand


@pytest.mark.parametrize("module", ["matplotlib", "experiments.report", "matplotlib.backends.backend_mixed"])
def test_ctrl_c_while_a_report_is_made_is_one_line(module):
    assert main(["run", "configs/coin.toml", "--out", "run"]) == 0
    before = tiny_studies.tree()
    status, errors = interrupted_before(module, "report", "run", program=tiny_studies.COMMAND[2])
    assert status == 130
    assert re.fullmatch(r"interrupted: (nothing was written|what is measured is in run; .* makes the report)\n", errors)
    assert tiny_studies.tree() == before


def test_ctrl_c_is_python_s_own_again_afterwards():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(["list"]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
