"""The manifest tells how the numbers came about, and its identity changes with everything that can change them."""

import json
import os
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_studies

from experiments import manifest
from experiments.__main__ import main


@pytest.fixture(autouse=True)
def _tiny_studies(monkeypatch, tmp_path):
    tiny_studies.install(monkeypatch, tmp_path)


def test_the_manifest_tells_how_the_numbers_came_about():
    assert main(["run", "configs/coin.toml", "--out", "run", "--set", "coin.flips=10"]) == 0
    stored = json.loads(Path("run/manifest.json").read_text())
    assert stored["config"]["studies"]["coin"]["flips"] == 10
    assert stored["config"]["file"] == "configs/coin.toml"
    assert re.fullmatch(r"[0-9a-f]{64}", stored["config"]["sha256"])
    assert stored["versions"]["jax"] == jax.__version__
    assert stored["versions"]["numpy"] == np.__version__
    assert stored["device"] == {"backend": "cpu", "kind": "cpu", "count": jax.device_count("cpu")}
    assert stored["numerics"]["jax_default_matmul_precision"] == "highest"
    assert stored["numerics"]["XLA_FLAGS"] == os.environ["XLA_FLAGS"]
    assert isinstance(stored["numerics"]["keeps_subnormals"], bool)
    assert stored["git"].keys() == {"commit", "dirty"}
    assert stored["seconds"].keys() == {"coin"}


def test_changed_code_has_another_digest(tmp_path):
    one, inner = tmp_path / "package" / "a.py", tmp_path / "package" / "inner" / "a.py"
    inner.parent.mkdir(parents=True)
    one.write_text("x = 1")
    inner.write_text("x = 1")
    digests = {manifest.source_digest(paths) for paths in ([one], [inner], [one, inner])}
    one.write_text("x = 2")
    digests.add(manifest.source_digest([one]))
    assert len(digests) == 4
    assert manifest.source_digest([inner, one]) == manifest.source_digest([one, inner])


def test_the_code_of_a_study_that_does_not_run_does_not_count():
    files = {path.name for path in manifest._sources(["coin"])}
    assert {"coin.py", "runner.py", "categorical.py"} <= files
    assert not {"endless.py", "faulty.py"} & files


def test_git_state_is_that_of_the_tree(tmp_path):
    assert manifest.git_state(tmp_path) == {"commit": None, "dirty": None}
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init"], ["commit", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True, capture_output=True)
    state = manifest.git_state(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", state["commit"])
    assert state["dirty"] is True  # the configs folder of the fixture
    assert manifest.git_state(tmp_path / "nowhere") == {"commit": None, "dirty": None}
