"""The README and the pages of docs/ tell the truth: their code prints what it says, and what they name exists."""

import ast
import contextlib
import io
import re
import sys
import tokenize
from pathlib import Path

import jax
import pytest
from cases import PLANS, public_functions

import experiments.__main__
from experiments import studies
from jprob import mle

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]}
FILES = [
    str(path.relative_to(ROOT)) for part in ("jprob", "experiments", "tests") for path in ROOT.glob(f"{part}/**/*.py")
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d*)?(?:e[-+]\d+)?")
CODE = {page: BLOCK.findall(text) for page, text in PAGES.items() if BLOCK.search(text)}


@pytest.fixture(autouse=True)
def _as_a_user(tmp_path, monkeypatch):
    """The program of a person who sets nothing, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("page", CODE)
def test_the_code_of_a_page_runs_in_order_and_prints_what_it_says(page):
    names = {"__name__": "__main__"}
    for code in CODE[page]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, page, "exec"), names)
        printed, promised = out.getvalue(), "\n".join(re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE))
        assert NUMBER.sub("0", printed).splitlines() == NUMBER.sub("0", promised).splitlines()
        # The last of eight digits may differ from one CPU to the next.
        numbers, wanted = map(float, NUMBER.findall(printed)), list(map(float, NUMBER.findall(promised)))
        assert list(numbers) == pytest.approx(wanted, rel=1e-6, abs=0)


def test_the_first_block_of_the_readme_is_short_and_prints():
    first = CODE["README.md"][0]
    assert len(first.splitlines()) <= 10
    assert "print(" in first
    assert len(PAGES["README.md"].splitlines()) <= 180


def test_the_table_of_functions_is_the_public_interface():
    listed = set(re.findall(r"^\| \[`(\w+\.\w+)", PAGES["docs/reference/index.md"], re.MULTILINE))
    loop = {f"mle.{name}" for name, value in vars(mle).items() if callable(value) and name.islower()}
    assert listed == set(public_functions()) | PLANS | loop


@pytest.mark.parametrize("page", PAGES)
def test_the_files_and_commands_of_a_page_exist(page):
    blocks = re.findall(r'^``` ?\w+ title="(.*?)"', PAGES[page], re.MULTILINE)  # the files that a page tells to write
    for path in re.findall(r"(?<![\w/])(?:configs|experiments|tests|jprob|docs)/[\w/\-]+\.\w+", PAGES[page]):
        assert (ROOT / path).is_file() or path in blocks, path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", PAGES[page]):
        assert re.search(rf"^{target}\b.*:", makefile, re.MULTILINE), target


BANNED = (
    r"beside|anew|whatever|whoever|of its own|by itself|in the place of|is dear|in vain|takes part|surprise|slopes?"
    r"|(?<=[.:?!] )(?:Where|What|Of|With|In)|^(?:Where|What|Of|With|In)"
)


def prose(text):
    """The paragraphs and list items of a page as plain text: no code, tables, headings or comments."""
    apart = r"^```.*?^```$|^(?:#|\||:::|!|    options| *\S+ = |<!--|\[).*?$"
    text = re.sub(apart, "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`", "code", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text))
    return [" ".join(part.split()).strip("-* ") for part in re.split(r"\n\s*\n|\n *(?:[-*]|\d+\.) ", text)]


def words(source):
    """The docstrings of a file, without examples and indented tables, and its comments: one page of paragraphs."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            apart = r"(?:\A|\n\n)(?:>>>|    ).*?(?=\n\n|\Z)"
            yield re.sub(apart, "", ast.get_docstring(node) or "", flags=re.DOTALL) + "\n\n"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ") + "\n"
        elif token.type != tokenize.NL or not token.line.strip():  # code or an empty line ends a comment
            yield "\n\n"


def keeps_its_rule(text):
    for paragraph in prose(text):
        assert not (found := re.search(rf"\b(?:{BANNED})\b", paragraph)), (found[0], paragraph)
        for sentence in re.split(r"(?<=[.:?!;])\s", paragraph):
            assert len(sentence.split()) <= 20, sentence


@pytest.mark.parametrize("page", PAGES)
def test_the_prose_of_a_page_keeps_its_rule(page):
    keeps_its_rule(PAGES[page])


@pytest.mark.parametrize("file", FILES)
def test_the_prose_of_code_keeps_its_rule(file):
    keeps_its_rule("".join(words((ROOT / file).read_text())))


def test_the_skeleton_of_a_study_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("experiments.findings")
    titled = re.compile(r'^``` ?\w+ title="(.*?)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
    files = titled.findall(PAGES["docs/writing-a-study.md"])
    for path, text in files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (study, text), (config, _) = files
    assert len(text.splitlines()) <= 44
    monkeypatch.setattr(studies, "__path__", [str((tmp_path / study).parent)])
    try:
        assert experiments.__main__.main(["run", config, "--out", "run"]) == 0
    finally:
        sys.modules.pop(f"experiments.studies.{Path(study).stem}", None)
    assert (tmp_path / "run/report.html").exists()
    assert "holds" in capsys.readouterr().out
