"""An export of a results folder shows every number in full, and changes nothing."""

import csv
import io
import json
import math
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import tiny_studies

from experiments import export, folders, results
from experiments.__main__ import main


@pytest.fixture(autouse=True)
def _tiny_studies(monkeypatch, tmp_path):
    tiny_studies.install(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run, which tests copy."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_studies.install(patch, tmp_path_factory.mktemp("finished"))
        assert main(["run", "configs/coin.toml", "--out", "run", "--set", "coin.flips=3"]) == 0
        odd = results.Record({"bias": 0.9}, {"odd": np.array([math.nan, math.inf, -math.inf, 0.1])})
        with folders.existing(Path("run")) as run:
            run.store.write("extra", odd)
        return Path("run").absolute()


@pytest.fixture
def folder(finished, capsys):
    capsys.readouterr()
    return shutil.copytree(finished, Path("run"))


def printed(capsys, *arguments):
    assert main(["results", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_table_has_a_line_a_curve(capsys, folder):
    header, *lines = printed(capsys, folder).splitlines()
    assert header.split() == ["run", "name", "points", "first", "last"]
    assert [line.split() for line in lines][-1] == ["extra/bias=0.9", "odd", "4", "nan", "0.1"]
    assert len(lines) == 5  # two coins with share and off, and the odd one


def test_csv_has_every_number_in_full(capsys, folder):
    rows = list(csv.DictReader(io.StringIO(printed(capsys, folder, "--format", "csv"))))
    odd = [float(row["value"]) for row in rows if row["name"] == "odd"]
    np.testing.assert_array_equal(odd, [math.nan, math.inf, -math.inf, 0.1])
    with folders.existing(folder) as run:
        share = run.store.records("coin")[0].values["share"]
    read = [float(row["value"]) for row in rows if row["run"] == "coin/bias=0.5,hand=left" and row["name"] == "share"]
    np.testing.assert_array_equal(read, share)


def test_sql_makes_the_database_anew(capsys, folder):
    copy = Path("copy")
    copy.mkdir()
    (copy / folders.MANIFEST).write_bytes((folder / folders.MANIFEST).read_bytes())
    with sqlite3.connect(copy / folders.DATABASE) as database:
        database.executescript(printed(capsys, folder, "--format", "sql"))
    database.close()
    query = "SELECT *, typeof(value) FROM measurements ORDER BY run, name, step"
    assert export.answer(copy, query) == export.answer(folder, query)
    for table in ("runs", "studies", "hypotheses", "summary"):
        assert export.answer(copy, f"SELECT * FROM {table}") == export.answer(folder, f"SELECT * FROM {table}")


@pytest.mark.parametrize(
    ("query", "answer"),
    [
        ("SELECT count(*) AS n FROM runs", "n\n3\n"),
        ("SELECT verdict, study FROM hypotheses WHERE 0", "verdict,study\n"),
        ("WITH a AS (SELECT 1 AS x) SELECT x, 0.1 + 0.2 AS y, NULL AS z FROM a", "x,y,z\n1,0.30000000000000004,nan\n"),
        ("SELECT json_extract(settings, '$.hand') AS hand FROM runs LIMIT 1", "hand\nleft\n"),
    ],
)
def test_a_query_is_answered(capsys, folder, query, answer):
    assert printed(capsys, folder, "--format", "csv", "--query", query) == answer


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM runs",
        "DROP TABLE runs",
        "INSERT INTO runs VALUES ('a', 'b', 'c')",
        "CREATE TABLE extra (x)",
        "ATTACH 'other.sqlite' AS other",
        "VACUUM INTO 'other.sqlite'",
        "PRAGMA user_version = 3",
        "BEGIN",
        "SELECT 1; DELETE FROM runs",
        "SELEKT 1",
        "SELECT nothing FROM runs",
        "",
        "-- nothing",
    ],
)
def test_a_query_that_is_not_one_reading_statement_is_one_line(capsys, folder, query):
    before = tiny_studies.tree()
    assert main(["results", str(folder), "--query", query]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("--query: expected one SELECT, got ")
    assert printed.err.count("\n") == 1
    assert tiny_studies.tree() == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "nowhere: expected the folder of a run, got one without manifest.json"),
        (["configs"], "configs: expected the folder of a run, got one without manifest.json"),
        (["bad"], "bad/results.sqlite: expected the database of a run: file is not a database"),
        (["hollow"], "hollow/results.sqlite: expected the database of a run, got one without studies"),
        (["run", "--format", "sql", "--query", "SELECT 1"],
         "--format sql: expected table or csv with --query; sql is the whole database"),
    ],
)  # fmt: skip
def test_a_folder_without_results_is_one_line(capsys, arguments, line):
    for name, content in {"bad": b"text" * 999, "hollow": b""}.items():
        Path(name).mkdir()
        Path(name, folders.MANIFEST).write_text(json.dumps(tiny_studies.MANIFEST))
        Path(name, folders.DATABASE).write_bytes(content)
    before = tiny_studies.tree()
    assert main(["results", *arguments]) == 2
    assert capsys.readouterr() == ("", line + "\n")
    assert tiny_studies.tree() == before
