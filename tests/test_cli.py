"""The command line answers every mistake with one clear line, and writes nothing."""

import contextlib
import json
import os
import random
import re
import shutil
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

COIN = "configs/coin.toml"


@pytest.fixture(autouse=True)
def _tiny_studies(monkeypatch, tmp_path):
    tiny_studies.install(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, which tests copy."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_studies.install(patch, tmp_path_factory.mktemp("finished"))
        assert main(["run", COIN, "--out", "run"]) == 0
        return Path("run").absolute()


@pytest.fixture
def folder_of_coin(finished, capsys):
    shutil.copytree(finished, "run")
    capsys.readouterr()


# ---- Mistakes in a config: status 2, one line, nothing written

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
    "another name of a backend": (
        ('"cpu"', '"CUDA"'),
        'backend: expected one of auto, cpu, gpu, tpu, got "CUDA"; nearest: gpu',
    ),
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
    "table too deep": (b"[" + b"a." * 5_000 + b"a]", "a: expected at most 20 levels, got more"),
    "list too deep": (b"a = " + b"[" * 300 + b"]" * 300, "a: expected at most 20 levels, got more"),
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
        ("coin." * 5_000 + "a=1", "--set: expected a key of at most 20 parts, got 5001"),
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


LONG, RAW = "k" * 50_000, "r\udcff"  # RAW: the byte 0xff, as Python has it in an argument


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", COIN, "--set", f"coin.{LONG}=1"],
        ["run", COIN, "--set", f"{LONG}.a=1"],
        ["run", COIN, "--set", f"coin.flips.{LONG}=1"],
        ["run", COIN, "--set", LONG],
        ["run", COIN, "--out", LONG],
        ["run", COIN, f"--{LONG}"],
        ["run", LONG],
        ["report", LONG],
        ["results", "run", "--format", LONG],
        ["results", "run", "--query", LONG],
        [LONG],
    ],
)
def test_what_is_long_is_shortened(capsys, folder_of_coin, arguments):
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert len(line) < 1000


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", RAW],
        ["run", COIN, "--out", RAW],
        ["run", COIN, f"--out={RAW}"],
        ["run", COIN, "--set", f"coin.flips={RAW}"],
        ["results", "run", "--query", RAW],
        ["report", RAW],
        [RAW],
    ],
)
def test_an_argument_that_is_not_utf8_is_one_line(capsys, arguments):
    got = arguments[-1].replace("\udcff", r"\xff")
    assert_refused(arguments, f'python -m experiments: expected arguments and a folder in UTF-8, got "{got}"', capsys)


def test_a_folder_to_work_in_that_is_not_utf8_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(os, "getcwd", lambda: RAW)
    line = 'python -m experiments: expected arguments and a folder in UTF-8, got "r\\xff"'
    assert_refused(["run", COIN], line, capsys)


def test_a_config_whose_name_is_not_utf8_is_listed(capsys):
    Path(f"configs/{RAW}.toml").write_text("# A claim.\n", encoding="utf-8")
    assert main(["list"]) == 0
    assert r"  configs/r\udcff.toml: A claim." in capsys.readouterr().out


def test_a_tilde_is_the_users_folder(capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    assert main(["run", COIN, "--out=~/run"]) == 0
    assert main(["report", "~/run"]) == main(["results", "~/run"]) == 0
    assert Path("home/run/report.html").exists()
    assert not Path("~").exists()
    capsys.readouterr()
    line = "python -m experiments run: argument --out: expected a user who has a folder, got ~nobody-of-this-name/run"
    assert_refused(["run", COIN, "--out=~nobody-of-this-name/run"], f"{line}; --help shows how", capsys)


@pytest.mark.parametrize("lacking", ["Config", "run", "report"])
def test_a_study_that_lacks_a_part_is_refused_before_it_runs(capsys, monkeypatch, lacking):
    Path("mine").mkdir()
    names = {
        "Config": "import msgspec\nclass Config(msgspec.Struct): pass",
        "run": "run = print",
        "report": "report = print",
    }
    text = "\n".join(code for name, code in names.items() if name != lacking)
    Path(f"mine/no_{lacking}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(Path("mine").absolute())])
    Path(COIN).write_text(f'backend = "cpu"\n[no_{lacking}]\n', encoding="utf-8")
    assert main(["run", COIN, "--out", "run"]) == 2
    want = f"no_{lacking}: expected a study with Config, run and report, got one without {lacking}\n"
    assert capsys.readouterr().err == want
    assert not Path("run").exists()


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


DIFFERENCES = {
    "coin.seed: 7 there, 8 here": lambda there: there["config"]["studies"]["coin"].update(seed=7),
    "source: other code": lambda there: there.update(source="0" * 64),
    'versions.jax: "0.1" there, ': lambda there: there["versions"].update(jax="0.1"),
    'device.kind: "abacus" there, "cpu" here': lambda there: there["device"].update(kind="abacus"),
    "numerics.XLA_FLAGS: none there, ": lambda there: there["numerics"].update(XLA_FLAGS=None),
}


@pytest.mark.parametrize(("said", "change"), DIFFERENCES.items(), ids=DIFFERENCES)
def test_the_folder_of_another_run_is_left_alone(capsys, folder_of_coin, said, change):
    seed = "8" if "seed" in said else "7"
    stored = json.loads(Path("run/manifest.json").read_text())
    change(stored)
    Path("run/manifest.json").write_text(json.dumps(stored | {"identity": "a" * 64}))
    before = tiny_studies.tree()
    assert main(["run", COIN, "--out", "run", "--set", f"coin.seed={seed}"]) == 2
    line = capsys.readouterr().err
    start, end = "run: expected a new folder or run ", "; python -m experiments report run redraws that one\n"
    assert re.match(rf"{start}\w{{8}}, got run aaaaaaaa \({re.escape(said)}", line)
    assert line.endswith(end)
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
        ("run", 0o555, "report", "run/figures/coin-1.svg: cannot be written"),
    ],
)
def test_a_folder_without_permission_is_one_line(open_folder, finished, capsys, path, mode, command, line):
    shutil.copytree(finished, "run")
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


@pytest.mark.usefixtures("folder_of_coin")
@pytest.mark.parametrize("arguments", [*OUTPUTS, ["report", "run"]])
def test_output_that_does_not_fit_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        status, _, errors = ended(*arguments, stdout=full)
    assert (status, errors) == (2, "stdout: cannot be written: No space left on device\n")


@pytest.mark.usefixtures("folder_of_coin")
def test_a_closed_output_is_one_line():
    command = f"import os, sys; os.close(1); os.execv(sys.executable, {tiny_studies.COMMAND} + sys.argv[1:])"
    for arguments in [["list"], ["results", "run"], ["report", "run"]]:
        status, _, errors = ended(*arguments, program=command)
        assert (status, errors) == (2, "stdout: cannot be written: it is closed\n")


@pytest.mark.usefixtures("folder_of_coin")
@pytest.mark.parametrize("loss", ["os.close(2)", "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)"])
@pytest.mark.parametrize(("arguments", "status"), [(["run", COIN, "--out", "run"], 0), (["run", "nowhere"], 2)])
def test_nobody_who_listens_is_no_mistake(loss, arguments, status):
    """On a folder that is finished, what goes to stderr comes first."""
    command = f"import os, sys; {loss}; os.execv(sys.executable, {tiny_studies.COMMAND} + sys.argv[1:])"
    got, out, _ = ended(*arguments, program=command)
    assert got == status
    assert out.endswith("report: run/report.html\n") == (status == 0)
    assert "finished before" not in out


@pytest.mark.usefixtures("folder_of_coin")
def test_a_backend_of_matplotlib_changes_nothing(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "zzz")
    assert ended("report", "run")[0::2] == (0, "")


OPENING = [["report", "run"], ["results", "run"], ["run", COIN, "--out", "run"]]
CHANGES = {
    "a value": "UPDATE measurements SET value = value + 1e-9 WHERE name = 'off'",
    "a value that is text": "UPDATE measurements SET value = 'heads' WHERE step = 7",
    "bytes": "UPDATE measurements SET value = x'ff' WHERE step = 7",
    "a name": "UPDATE measurements SET name = 'shar' WHERE name = 'share'",
    "settings": "UPDATE runs SET settings = '{'",
    "settings that are no table": "UPDATE runs SET settings = '3'",
    "a curve cut off": "DELETE FROM measurements WHERE step > 500",
    "a run": "DELETE FROM runs WHERE settings LIKE '%0.75%'",
}


@pytest.mark.parametrize("command", OPENING)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_values_that_were_changed_are_one_line(capsys, folder_of_coin, change, command):
    with contextlib.closing(sqlite3.connect("run/results.sqlite")) as database, database:
        database.execute(change)
    before = tiny_studies.tree()
    assert main(command) == 2
    line = "run/results.sqlite: coin: expected the records that were measured, got others; "
    assert capsys.readouterr().err == f"{line}remove the folder to measure them again\n"
    assert tiny_studies.tree() == before


SCHEMAS = {
    "another column": "ALTER TABLE measurements RENAME COLUMN value TO number",
    "a column too many": "ALTER TABLE runs ADD COLUMN more",
    "no table": "DROP TABLE hypotheses",
    "a table for a view": "DROP VIEW summary; CREATE TABLE summary (run)",
}


@pytest.mark.parametrize("command", OPENING)
@pytest.mark.parametrize("change", SCHEMAS.values(), ids=SCHEMAS)
def test_tables_that_hold_something_else_are_one_line(capsys, folder_of_coin, change, command):
    with contextlib.closing(sqlite3.connect("run/results.sqlite")) as database:
        database.executescript(change)
    assert main(command) == 2
    table = re.search("measurements|runs|hypotheses|summary", change)[0]
    how = "without" if "DROP TABLE" in change else "with another"
    line = f"run/results.sqlite: expected the database of a run, got one {how} {table}\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("seed", range(9))
def test_random_bytes_in_a_database_change_no_page(capsys, folder_of_coin, seed):
    """They hit unread bytes, and the page stays as it was; or one line says that the file is damaged."""
    page, path, rng = Path("run/report.html").read_bytes(), Path("run/results.sqlite"), random.Random(seed)
    content = bytearray(path.read_bytes())
    at = rng.randrange(4096, len(content) - 256)
    content[at : at + 256] = rng.randbytes(256)
    path.write_bytes(content)
    status = main(["report", "run"])
    errors = capsys.readouterr().err
    assert Path("run/report.html").read_bytes() == page
    assert (status, errors.count("\n")) in [(0, 0), (2, 1)]
    assert not errors or errors.startswith("run/results.sqlite: ")


@pytest.mark.parametrize("key", ["seconds", "data", "versions", "git", "started", "config", "device", "source"])
@pytest.mark.parametrize("command", OPENING)
def test_a_manifest_that_lacks_a_key_is_one_line(capsys, folder_of_coin, key, command):
    stored = json.loads(Path("run/manifest.json").read_text())
    del stored[key]
    Path("run/manifest.json").write_text(json.dumps(stored))
    capsys.readouterr()
    before = tiny_studies.tree()
    assert main(command) == 2
    line = f"run/manifest.json: expected the manifest of a run: Object missing required field `{key}`\n"
    assert capsys.readouterr().err == line
    assert tiny_studies.tree() == before


def test_a_column_is_shown_by_its_name(capsys, folder_of_coin):
    assert main(["results", "run", "--query", "SELECT 1 AS '[bold]', 2 AS '[/red]'"]) == 0
    assert capsys.readouterr().out.split() == ["[bold]", "[/red]", "1", "2"]


@pytest.mark.usefixtures("folder_of_coin")
@pytest.mark.parametrize("arguments", [*OUTPUTS, ["report", "run"]])
def test_a_reader_that_has_enough_is_no_mistake(arguments):
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
