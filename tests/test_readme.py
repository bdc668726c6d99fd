"""The README tells the truth: its code runs, and what it names exists."""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest
from cases import PLANS, public_functions

from jprob import mle

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


# Long trainings: what they call has tests of its own, which take less.
LONG = ("mle.fit(", "jax.vmap(train)")
CODE = [
    pytest.param(code, marks=[pytest.mark.slow] if any(call in code for call in LONG) else [])
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
]


@pytest.mark.parametrize("code", CODE)
def test_its_code_runs_and_prints_what_it_says(code):
    assert len(code.strip().splitlines()) <= (10 if code in TEXT[: TEXT.index("## Two commands")] else 40)
    out = io.StringIO()
    # A program of a person who sets nothing.
    with contextlib.redirect_stdout(out), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "README.md", "exec"), {})
    promised = re.findall(r"print\(.*\)  # (.*?)(?:\.\.\.)?$", code, re.MULTILINE)
    printed = out.getvalue().splitlines()
    assert promised
    for want, got in zip(promised, printed, strict=True):
        assert got.startswith(want)


def test_its_function_table_is_the_public_interface():
    listed = set(re.findall(r"^\| `(\w+\.\w+)\(", TEXT, re.MULTILINE))
    loop = {f"mle.{name}" for name, value in vars(mle).items() if callable(value) and name.islower()}
    assert listed == set(public_functions()) | PLANS | loop


def test_its_files_and_commands_exist():
    for path in re.findall(r"(?:configs|experiments|tests|jprob)/[\w/\-]+\.\w+", TEXT):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
