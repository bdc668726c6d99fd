"""A run: what it shows and records, when it continues, and how it ends before its end."""

import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import jax
import pytest
import tiny_studies

from experiments import data, folders, manifest, results, studies
from experiments.__main__ import main

COIN = "configs/coin.toml"


@pytest.fixture(autouse=True)
def _tiny_studies(monkeypatch, tmp_path):
    tiny_studies.install(monkeypatch, tmp_path)
    monkeypatch.setattr(manifest, "source_digest", lambda folders: "unchanged")  # though someone may be editing them


def test_a_run_shows_its_verdicts_and_where_the_report_is(capsys):
    assert main(["run", COIN]) == 0
    printed = capsys.readouterr()
    (folder,) = Path("results").iterdir()
    stored = json.loads((folder / "manifest.json").read_text())
    assert folder.name == f"coin-{stored['identity'][:8]}"
    assert printed.out.endswith(f"report: {folder}/report.html\n")
    assert all(len(line) <= 100 for line in printed.out.splitlines()[:-1])
    words = " ".join(printed.out.split())
    assert "study claim measured verdict" in words
    assert "coin The share of heads is the bias [to .1]." in words
    assert "coin: 0%, starting\n" in printed.err
    assert re.search(r"coin: 100%, finished in \d+\.\d s, 2 records\n", printed.err)
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json", "results.sqlite", "report.html", "report.md", "figures"}  # fmt: skip


def test_the_same_command_shows_the_same_run_again(capsys):
    assert main(["run", COIN]) == 0
    first, before = capsys.readouterr().out, tiny_studies.tree()
    assert main(["run", COIN]) == 0
    printed = capsys.readouterr()
    assert printed.err == "finished before, kept as it is: coin\n"
    assert printed.out == first
    after = tiny_studies.tree()
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if not name.endswith(".sqlite"))


def test_the_identity_is_that_of_settings_code_and_device_alone(capsys, monkeypatch):
    def identity(*overrides):
        assert main(["run", COIN, *(part for item in overrides for part in ("--set", item))]) == 0
        return Path(capsys.readouterr().out.splitlines()[-1].removeprefix("report: ")).parent.name

    first = identity()
    assert identity("backend=auto") == first or jax.default_backend() != "cpu"
    assert identity("coin.toss.height=1.5") == first
    assert identity("coin.toss.height=1.25") != first
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " ")
    assert identity() != first
    monkeypatch.undo()


def test_an_error_in_a_study_keeps_what_is_finished_and_the_same_command_continues(capsys):
    command = ["run", COIN, "--set", "faulty.pieces=3", "--out", "run"]
    Path("broken").touch()
    with pytest.raises(FileNotFoundError, match="a mistake in the study"):
        main(command)
    with folders.existing(Path("run")) as run:
        assert run.store.finished().keys() == {"coin"}
        assert len(run.store.records("faulty")) == 1
    Path("broken").unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert "finished before, kept as it is: coin\n" in capsys.readouterr().err
    with folders.existing(Path("run")) as run:
        assert run.store.finished().keys() == {"coin", "faulty"}
        assert len(run.store.records("faulty")) == 3


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_what_is_measured_is_not_measured_twice(monkeypatch, capsys, last):
    """An error in each of four parts in turn: the same command runs the others, and the folder is that of one run."""
    command, grid, ran = ["run", COIN, "--set", "grid.arms=['A', 'B']", "--set", "grid.seeds=[1, 2]"], None, []
    assert main([*command, "--out", "whole"]) == 0
    grid = studies.load("grid")
    measure = grid.run

    def run(config):
        yield results.Progress(0.5, "")
        ran.append((config.arms[0], config.seeds[0]))
        yield from measure(config)
        if len(ran) == last + 1:
            raise RuntimeError("broken off after the record")

    monkeypatch.setattr(grid, "run", run)
    loaded = {"coins": "first"}
    monkeypatch.setattr(data, "digests", lambda: loaded)
    with pytest.raises(RuntimeError, match="broken off"):
        main([*command, "--out", "run"])
    if last:  # a part is finished
        loaded["coins"] = "others"
        assert main([*command, "--out", "run"]) == 2
        line = "run: coins: expected the data of what is measured, got others; remove the folder to measure again\n"
        assert capsys.readouterr().err.endswith(line)
        loaded["coins"], ran[last + 1 :] = "first", []
    assert main([*command, "--out", "run"]) == 0
    cells = [("A", 1), ("A", 2), ("B", 1), ("B", 2)]
    assert ran == cells[: last + 1] + cells[last:]
    with folders.existing(Path("run")) as resumed, folders.existing(Path("whole")) as whole:
        assert resumed.store.digest("grid") == whole.store.digest("grid")


def test_two_parts_that_describe_a_record_alike_are_stopped_each_time(monkeypatch):
    grid = studies.load("grid")
    monkeypatch.setattr(grid, "parts", lambda config: [config, config])
    for _ in range(2):
        with pytest.raises(ValueError, match="two records have the settings"):
            main(["run", COIN, "--set", "grid.arms=['A']", "--set", "grid.seeds=[1]", "--out", "run"])


def test_a_study_that_describes_two_records_alike_is_stopped(monkeypatch):
    coin = studies.load("coin")
    monkeypatch.setattr(coin, "run", lambda config: iter([results.Record({"a": 1}, {"x": 1.0})] * 2))
    with pytest.raises(ValueError, match="two records have the settings"):
        main(["run", COIN])


def test_an_error_in_a_study_is_a_traceback_that_ends_in_the_place_and_status_1():
    Path("broken").touch()
    command = [*tiny_studies.COMMAND, "run", COIN, "--set", "faulty.pieces=3", "--out", "run"]
    done = subprocess.run(command, env=tiny_studies.environment(), capture_output=True, text=True)
    assert done.returncode == 1
    place = "configs/coin.toml: faulty: an error in the study; what is measured is in run"
    assert done.stderr.endswith(f"FileNotFoundError: a mistake in the study\n{place}\n")


@pytest.mark.parametrize(
    ("inside", "number", "status"),
    [("execution", signal.SIGINT, 130), ("compilation", signal.SIGINT, 130), ("execution", signal.SIGTERM, 143)],
)
def test_a_signal_ends_a_run_though_xla_does_not_return(inside, number, status):
    command = [*tiny_studies.COMMAND, "run", COIN, "--set", f"endless.inside={inside}", "--out", "run"]
    process = subprocess.Popen(
        command, env=tiny_studies.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    last_piece = {"execution": 1, "compilation": 2}[inside]
    tiny_studies.wait_until(lambda: f"endless/piece={last_piece}" in stored_runs(Path("run")))
    time.sleep(0.5)  # from the record into the call
    assert process.poll() is None
    process.send_signal(number)
    out, errors = process.communicate(timeout=tiny_studies.PATIENCE)
    assert process.returncode == status
    assert errors.splitlines()[-1] == "interrupted: what is measured is in run; the same command does the rest"
    assert "Traceback" not in errors
    assert out == ""
    with folders.existing(Path("run")) as run:
        assert run.store.finished().keys() == {"coin"}
        assert len(run.store.records("coin")) == 2
        assert len(run.store.records("endless")) == last_piece


@pytest.mark.parametrize("size", [500, 20_000, 60_000, 100_000])  # too small for the manifest, tables, record, next
def test_a_full_disk_is_one_line_and_the_same_command_continues(capsys, size):
    """The system refuses files beyond `size`: the path of a full disk without another disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        assert main(["run", COIN, "--out", "run"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    errors = capsys.readouterr().err
    assert re.fullmatch(r"(coin: 0%, starting\n)?run\S*: cannot be (written|used): .*\n", errors)
    assert len(stored_runs(Path("run"))) == (size > 60_000)
    assert not list(Path("run").glob("*.tmp"))
    assert main(["run", COIN, "--out", "run"]) == 0
    assert len(stored_runs(Path("run"))) == 2


def stored_runs(folder):
    if not (folder / folders.DATABASE).exists():
        return []
    with sqlite3.connect(folder / folders.DATABASE) as database:
        try:
            rows = database.execute("SELECT run FROM runs").fetchall()
        except sqlite3.OperationalError:  # not made yet
            rows = []
    database.close()
    return [row[0] for row in rows]
