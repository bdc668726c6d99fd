"""What the command line answers: one clear line to every mistake, and nothing written."""

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest
import tiny_studies

from experiments import studies
from experiments.__main__ import main


@pytest.fixture(autouse=True)
def _tiny_studies(monkeypatch, tmp_path):
    tiny_studies.install(monkeypatch, tmp_path)


# ---- Mistakes in a config: status 2, one line, nothing written

COIN = "configs/coin.toml"
JAX_FINDS = jax.default_backend()
MISTAKES = {
    # what is changed in the file -> the line
    "unknown key": (
        ("flips = 1000", "flisp = 1000"),
        "coin.flisp: unknown key, expected one of seed, flips, biases, toss; nearest: flips",
    ),
    "unknown key in a table": (
        ("height = 1.5", "heigth = 1.5"),
        "coin.toss.heigth: unknown key, expected one of height, hand; nearest: height",
    ),
    "quoted key": (
        ("flips = 1000", '"fl\\nips" = 1000'),
        'coin."fl\\nips": unknown key, expected one of seed, flips, biases, toss; nearest: flips',
    ),
    "missing key": (("flips = 1000", ""), "coin.flips: missing, expected int"),
    "missing choice": (('hand = "left"', ""), "coin.toss.hand: missing, expected one of left, right"),
    "missing table": (('[coin.toss]\nheight = 1.5\nhand = "left"', ""), "coin.toss: missing, expected a table"),
    "wrong type": (("flips = 1000", 'flips = "many"'), 'coin.flips: expected int, got "many"'),
    "fraction for a count": (("flips = 1000", "flips = 1.5"), "coin.flips: expected int, got 1.5"),
    "truth for a count": (("flips = 1000", "flips = true"), "coin.flips: expected int, got true"),
    "date": (("flips = 1000", "flips = 2026-01-01"), "coin.flips: expected int, got 2026-01-01"),
    "number for a table": (
        ('[coin.toss]\nheight = 1.5\nhand = "left"', "toss = 3"),
        "coin.toss: expected a table, got 3",
    ),
    "table for a number": (("flips = 1000", "flips = {a = 1}"), "coin.flips: expected int, got a table"),
    "too small": (("flips = 1000", "flips = 0"), "coin.flips: expected int >= 1, got 0"),
    "too large": (("flips = 1000", "flips = 1_000_000"), "coin.flips: expected int <= 100000, got 1000000"),
    "far too large": (
        ("height = 1.5", f"height = {10**400}"),
        "coin.toss.height: expected float, got an integer of 1329 bits",
    ),
    "at an open end": (("height = 1.5", "height = 0"), "coin.toss.height: expected float > 0.0, got 0"),
    "empty list": (("[0.5, 0.75]", "[]"), "coin.biases: expected array of length >= 1, got []"),
    "in a list": (("[0.5, 0.75]", "[0.5, 1.0]"), "coin.biases[1]: expected float < 1.0, got 1.0"),
    "not a number": (("height = 1.5", "height = nan"), "coin.toss.height: expected a finite number, got nan"),
    "infinite": (("height = 1.5", "height = -inf"), "coin.toss.height: expected a finite number, got -inf"),
    "infinite by size": (("height = 1.5", "height = 1e999"), "coin.toss.height: expected a finite number, got inf"),
    "not a number in a list": (("[0.5, 0.75]", "[nan]"), "coin.biases[0]: expected a finite number, got nan"),
    "not a choice": (
        ('hand = "left"', 'hand = "lefd"'),
        'coin.toss.hand: expected one of left, right, got "lefd"; nearest: left',
    ),
    "keys that contradict": (("[0.5, 0.75]", "[0.5, 0.5]"), "coin: biases: expected each once"),
    "unknown study": (
        ("[coin]", "[coyn]"),
        "coyn: unknown study, expected one of coin, endless, faulty, grid; nearest: coin",
    ),
    "number for a study": (('backend = "cpu"', 'backend = "cpu"\nfaulty = 3'), "faulty: expected a table, got 3"),
    "unknown top-level key": (
        ('backend = "cpu"', 'backend = "cpu"\nbakend = 1'),
        "bakend: unknown key, expected one of backend, coin, endless, faulty, grid; nearest: backend",
    ),
    "unknown backend": (('"cpu"', '"gpus"'), 'backend: expected one of auto, cpu, gpu, tpu, got "gpus"; nearest: gpu'),
    "number for a backend": (('"cpu"', "3"), "backend: expected one of auto, cpu, gpu, tpu, got 3"),
    "missing backend": (('backend = "cpu"', ""), "backend: missing, expected one of auto, cpu, gpu, tpu"),
    "absent backend": (('"cpu"', '"tpu"'), f'backend: "tpu" is not available here: jax finds {JAX_FINDS}'),
}  # fmt: skip


def assert_refused(arguments, line, capsys):
    before = tiny_studies.tree()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err == line + "\n"
    assert printed.out == ""
    assert tiny_studies.tree() == before


@pytest.mark.parametrize(("change", "problem"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_config_is_one_line(capsys, change, problem):
    text = tiny_studies.COIN.replace(*change)
    assert text != tiny_studies.COIN
    Path(COIN).write_text(text, encoding="utf-8")
    assert_refused(["run", COIN], f"{COIN}: {problem}", capsys)


FILES = {
    "not UTF-8": (b'backend = "cpu"\n# \xff\n', "line 2: expected UTF-8, got the byte 0xff"),
    "not TOML": (b"backend = cpu\n", "not TOML: Invalid value (at line 1, column 11)"),
    "twice": (b"[coin]\na = 1\na = 2\n", "not TOML: Cannot overwrite a value (at line 3, column 6)"),
    "too deep": (b"a = " + b"[" * 10_000, "not TOML: "),
    "too long a number": (b"a = " + b"9" * 5_000, "not TOML: Exceeds the limit"),
    "empty": (b"", "backend: missing, expected one of auto, cpu, gpu, tpu"),
    "no study": (
        b'backend = "cpu"',
        "expected a table for at least one study of coin, endless, faulty, grid, got none",
    ),
}


@pytest.mark.parametrize(("content", "problem"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_config_is_one_line(capsys, content, problem):
    Path(COIN).write_bytes(content)
    before = tiny_studies.tree()
    assert main(["run", COIN]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"{COIN}: {problem}")
    assert printed.err.count("\n") == 1
    assert tiny_studies.tree() == before


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("configs/con.toml", "configs/con.toml: no such file; nearest: configs/coin.toml"),
        ("nowhere/at/all", "nowhere/at/all: no such file"),
        ("configs", "configs: expected a TOML file, got a directory"),
        ("configs/coin.toml/x", "configs/coin.toml/x: cannot be read: Not a directory"),
        ("two\nlines", "two lines: no such file"),
    ],
)
def test_a_path_that_leads_to_no_file_is_one_line(capsys, path, line):
    assert_refused(["run", path], line, capsys)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("coin.flips", '--set: expected key.key=value, got "coin.flips"'),
        ("=3", '--set: expected key.key=value, got "=3"'),
        ("coin..flips=3", '--set: expected key.key=value, got "coin..flips=3"'),
        ("", '--set: expected key.key=value, got ""'),
        ("coin.flips=", '--set: coin.flips: expected int, got ""'),
        ("coin.flips=0", "--set: coin.flips: expected int >= 1, got 0"),
        ("coin.flips=ten", '--set: coin.flips: expected int, got "ten"'),
        ("coin.flips=1\nseed=2", '--set: coin.flips: expected int, got "1\\nseed=2"'),
        ("coin.toss.height=nan", "--set: coin.toss.height: expected a finite number, got nan"),
        ("coin.flops=3", "--set: coin.flops: unknown key, expected one of seed, flips, biases, toss; nearest: flips"),
        ("coin.flips.a=3", "--set: coin.flips.a: expected coin.flips to be a table, got 1000"),
        ("coin=3", "--set: coin: expected a table, got 3"),
        ("con.flips=3", "--set: con: unknown study, expected one of coin, endless, faulty, grid; nearest: coin"),
        ("endless.outside=3", "--set: endless.outside: unknown key, expected one of inside; nearest: inside"),
        ("backend=gpus", '--set: backend: expected one of auto, cpu, gpu, tpu, got "gpus"; nearest: gpu'),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, override, line):
    assert_refused(["run", COIN, "--set", override], line, capsys)


@pytest.mark.parametrize(
    "arguments",
    [[], ["rum"], ["run"], ["run", COIN, "--sett", "a=1"], ["results", "x", "--format", "xml"], ["list", "extra"]],
)
def test_a_mistake_in_the_command_is_one_line(capsys, arguments):
    before = tiny_studies.tree()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("python -m experiments")
    assert printed.err.endswith("; --help shows how\n")
    assert printed.err.count("\n") == 1
    assert tiny_studies.tree() == before


def test_a_mistake_is_answered_before_jax_is_loaded():
    code = (
        "import sys; from experiments.__main__ import main; "
        "assert main(['run', 'nowhere.toml']) == 2; assert main(['run', 'nowhere.toml', '--launch', 'local:1']) == 2; "
        "assert not {'jax', 'matplotlib', 'scipy', 'sklearn', 'submitit'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=tiny_studies.environment(), capture_output=True)


# ---- Folders


@pytest.mark.parametrize(
    ("out", "line"),
    [
        ("taken", "taken: expected a new or empty folder, got one that holds other files"),
        ("file", "file: expected a folder, got a file"),
        ("file/run", "file/run: cannot be written: Not a directory"),
        ("/proc/run", "/proc/run: cannot be written: No such file or directory"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(capsys, out, line):
    Path("taken").mkdir()
    Path("taken", "thesis.tex").touch()
    Path("file").touch()
    assert_refused(["run", COIN, "--out", out], line, capsys)


def test_the_folder_of_another_run_is_left_alone(capsys):
    assert main(["run", COIN, "--out", "run"]) == 0
    capsys.readouterr()
    before = tiny_studies.tree()
    assert main(["run", COIN, "--out", "run", "--set", "coin.seed=8"]) == 2
    assert re.fullmatch(
        r"run: expected a new folder or run \w{8}, got run \w{8} \(another config, other code, or another device\)\n",
        capsys.readouterr().err,
    )
    assert tiny_studies.tree() == before


def test_list_names_studies_and_configs(capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "studies",
        "  coin: The coin: the share of heads approaches the bias.",
        "  endless: Endless: one record, and then a call into XLA that does not return while anyone waits.",
        "  faulty: Faulty: breaks off after one record for as long as there is a file named `broken`.",
        "  grid: Grid: one record a cell, each cell a part; arm A is killed while there is a file named `deadly-A`.",
        "configs",
        "  configs/coin.toml: Heads come as often as the bias says. A second.",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'"""Doc."""\nif\n', "line 2: expected Python, got invalid syntax"),
        (b'"""\xff"""\n', "expected UTF-8, got the byte 0xff"),
        (b'"""Doc."""\n\0', "expected Python, got source code string cannot contain null bytes"),
    ],
)
def test_a_broken_study_does_not_hide_the_others(capsys, monkeypatch, content, problem):
    Path("mine").mkdir()
    Path("mine/broken.py").write_bytes(content)
    Path("mine/raising.py").write_text('"""Raising: as it is imported."""\nraise RuntimeError', encoding="utf-8")
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(Path("mine").absolute())])
    Path("configs/folder.toml").mkdir()
    assert main(["list"]) == 2
    printed = capsys.readouterr()
    for listed in ("coin: The coin", "raising: Raising: as it is imported.", COIN):
        assert listed in printed.out
    broken = re.escape(str(Path("mine/broken.py").absolute()))
    assert re.match(f"{broken}: {problem}; ", printed.err)
    assert printed.err.endswith("; configs/folder.toml: cannot be read: Is a directory\n")
    assert printed.err.count("\n") == 1


# ---- Processes


def ended(*arguments, program=None, **options):
    """A process, as (status, stdout, stderr)."""
    command = tiny_studies.COMMAND if program is None else [sys.executable, "-c", program]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    done = subprocess.run([*command, *arguments], env=tiny_studies.environment(), **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def open_folder(monkeypatch):
    """A working directory that others may enter; pytest's own lie in one that they may not."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.chdir(name)
        Path("configs").mkdir()
        Path(COIN).write_text(tiny_studies.COIN, encoding="utf-8")
        yield Path(name)


@contextlib.contextmanager
def unprivileged():
    """Within, a process of root is one of nobody: root is kept out by no mode."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("path", "mode", "command", "line"),
    [
        ("run", 0, "run", "run/manifest.json: cannot be read"),
        ("run", 0, "report", "run/manifest.json: cannot be read"),
        ("run", 0, "results", "run/manifest.json: cannot be read"),
        ("run/manifest.json", 0, "run", "run/manifest.json: cannot be read"),
        ("run/manifest.json", 0, "results", "run/manifest.json: cannot be read"),
        ("run/results.sqlite", 0, "run", "run/results.sqlite: cannot be used"),
        ("run/results.sqlite", 0, "report", "run/results.sqlite: cannot be used"),
        ("run/results.sqlite", 0, "results", "run/results.sqlite: cannot be used"),
        ("run", 0o555, "report", "run/figures/coin-1.svg.tmp: cannot be written"),
    ],
)
def test_a_folder_without_permission_is_one_line(open_folder, capsys, path, mode, command, line):
    assert main(["run", COIN, "--out", "run"]) == 0
    for each in (open_folder, Path("run"), *Path("run").rglob("*")):
        each.chmod(0o755)
    before = tiny_studies.tree()
    Path(path).chmod(mode)
    arguments = ["run", COIN, "--out", "run"] if command == "run" else [command, "run"]
    capsys.readouterr()
    with unprivileged():
        assert main(arguments) == 2
    Path(path).chmod(0o755)
    assert re.fullmatch(f"{line}: .*\n", capsys.readouterr().err)
    assert tiny_studies.tree() == before


@pytest.mark.parametrize(("backend", "platforms"), [("auto", "cuda"), ("auto", "coin"), ("cpu", "cuda")])
def test_a_platform_without_its_plugin_is_one_line(monkeypatch, backend, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    line = f'--set: backend: "{backend}" is not available here: jax finds none (JAX_PLATFORMS={platforms})\n'
    assert ended("run", COIN, "--set", f"backend={backend}") == (2, "", line)
    assert not Path("results").exists()


OUTPUTS = [["list"], ["results", "run"], ["results", "run", "--format", "csv"], ["results", "run", "--format", "sql"]]


@pytest.mark.parametrize("arguments", [*OUTPUTS, ["report", "run"]])
def test_output_that_does_not_fit_is_one_line(arguments):
    assert main(["run", COIN, "--out", "run"]) == 0
    with open("/dev/full", "w") as full:
        status, _, errors = ended(*arguments, stdout=full)
    assert (status, errors) == (2, "stdout: cannot be written: No space left on device\n")


def test_a_closed_output_is_one_line():
    assert main(["run", COIN, "--out", "run"]) == 0
    command = f"import os, sys; os.close(1); os.execv(sys.executable, {tiny_studies.COMMAND} + sys.argv[1:])"
    for arguments in [["list"], ["results", "run"], ["report", "run"]]:
        status, _, errors = ended(*arguments, program=command)
        assert (status, errors) == (2, "stdout: cannot be written: it is closed\n")


def test_settings_that_are_not_json_are_one_line(capsys):
    assert main(["run", COIN, "--out", "run"]) == 0
    with contextlib.closing(sqlite3.connect("run/results.sqlite")) as database, database:
        database.execute("UPDATE runs SET settings = '{'")
    capsys.readouterr()
    assert main(["report", "run"]) == 2
    line = r"run/results\.sqlite: cannot be used: settings of .*: expected JSON, got '\{'\n"
    assert re.fullmatch(line, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [*OUTPUTS, ["report", "run"]])
def test_a_reader_that_has_enough_is_no_mistake(arguments):
    assert main(["run", COIN, "--out", "run"]) == 0
    reader, writer = os.pipe()
    os.close(reader)
    status, _, errors = ended(*arguments, stdout=writer)
    os.close(writer)
    assert (status, errors) == (0, "")


@pytest.mark.parametrize(("arguments", "status"), [(["run", COIN], 0), (["run", "nowhere"], 2), (["--help"], 0)])
def test_the_exit_status_is_that_of_main(arguments, status):
    done = subprocess.run(
        [*tiny_studies.COMMAND, *arguments], env=tiny_studies.environment(), capture_output=True, text=True
    )
    assert done.returncode == status
    assert "Traceback" not in done.stderr
