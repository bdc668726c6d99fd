"""A results folder belongs to one run and one process, and survives any end of the process."""

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from tiny_studies import MANIFEST

from experiments import folders
from experiments.errors import InputError
from experiments.results import Record


@pytest.fixture
def run(tmp_path):
    with folders.create(tmp_path / "run", MANIFEST) as opened:
        yield opened


def test_the_manifest_is_replaced_as_a_whole(run, monkeypatch):
    run.update_manifest(seconds={"study": 1.0})
    path = run.folder / folders.MANIFEST
    assert json.loads(path.read_text()) == MANIFEST | {"seconds": {"study": 1.0}}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.update_manifest(seconds={})
    assert json.loads(path.read_text())["seconds"] == {"study": 1.0}


WRITER = """
import sys, numpy as np
from pathlib import Path
from experiments import folders
from experiments.results import Record
with folders.create(Path(sys.argv[1]), {MANIFEST}) as run:
    for piece in range(100_000):
        run.store.write("study", Record({"piece": piece}, {"curve": np.full(500, float(piece))}))
        print("written", flush=True)
"""


@pytest.mark.parametrize("count", [1, 5, 20])
def test_a_killed_writer_leaves_whole_records(tmp_path, count):
    folder = tmp_path / "run"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER.replace("{MANIFEST}", repr(MANIFEST)), str(folder)], stdout=subprocess.PIPE
    )
    with writer:
        assert writer.stdout is not None
        for _ in range(count):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    with folders.create(folder, MANIFEST) as run:  # neither lock nor journal is in the way
        records = run.store.records("study")
    assert len(records) >= count
    for piece, record in enumerate(records):
        assert record.settings == {"piece": piece}
        np.testing.assert_array_equal(record.values["curve"], np.full(500, float(piece)))


def test_the_same_run_is_opened_again_and_another_is_refused(tmp_path):
    folder = tmp_path / "run"
    with folders.create(folder, MANIFEST) as run:
        run.store.write("study", Record({"arm": "A"}, {"loss": 0.1}))
    with folders.create(folder, MANIFEST | {"started": "later"}) as run:
        assert len(run.store.records("study")) == 1
        assert run.manifest["started"] == "today"  # what was stored counts
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with (
        pytest.raises(InputError, match="expected a new folder or run bbbbbbbb, got run aaaaaaaa"),
        folders.create(folder, MANIFEST | {"identity": "b" * 64}),
    ):
        pass
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_two_processes_cannot_write_the_same_run(run):
    with pytest.raises(InputError, match="another process is writing this run"), folders.create(run.folder, MANIFEST):
        pass


def test_an_empty_folder_is_taken_and_one_with_other_files_is_not(tmp_path):
    with folders.create(tmp_path, MANIFEST):
        pass
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(InputError, match="expected a new or empty folder"), folders.create(other, MANIFEST):
        pass
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_a_folder_whose_process_was_killed_at_once_is_taken(tmp_path):
    (tmp_path / "manifest.json.12-34.tmp").write_text('{"iden')
    with folders.create(tmp_path, MANIFEST) as run:
        assert run.store.records("study") == []


def test_an_error_of_the_study_is_not_taken_for_one_of_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="mistake"), folders.create(tmp_path, MANIFEST):
        raise FileNotFoundError("a mistake of the study")


def test_a_file_that_does_not_fit_leaves_the_old_one_and_no_half(run, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"manifest\.json: cannot be written: No space left on device"):
            run.update_manifest(seconds={"study": 1.0})
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


def test_two_who_write_a_file_at_once_do_not_meet(tmp_path, monkeypatch):
    """Each has its own name until its text is on the disk. The folder is, too, after it has the new name."""
    path, done, replace, sync = tmp_path / "page", [], os.replace, os.fsync

    def other_first(unfinished, target):
        if not done:
            done.append(unfinished)
            folders.replace(path, "other")
        done.append((unfinished.read_text(), replace(unfinished, target)))

    synced = []
    monkeypatch.setattr(os, "replace", other_first)
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")) or sync(number)
    )
    folders.replace(path, "mine")
    assert [text for text, _ in done[1:]] == ["other", "mine"]
    assert path.read_text() == "mine"
    assert [name == str(tmp_path) for name in synced] == [False, False, True, True]
    assert list(tmp_path.iterdir()) == [path]


def test_a_mistake_in_our_own_sql_is_not_taken_for_one_of_the_database(tmp_path):
    with pytest.raises(sqlite3.ProgrammingError), folders.create(tmp_path / "run", MANIFEST) as run:
        run.store.database.execute("SELECT ?")
