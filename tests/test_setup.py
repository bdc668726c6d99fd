"""The set-up: what the wheel holds, what the lock pins, and when `make` takes .venv for ready."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

import jax
import pytest
import tiny_studies
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_configs import SMOKE

import jprob

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LOCKS = ["requirements.lock", "docs.lock"]
PYTHONS = ["3.11", "3.12", "3.13"]
MAKE = shutil.which("make")
needs_make = pytest.mark.skipif(MAKE is None, reason="make is not installed")


def build(kind, folder):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder], cwd=ROOT, check=True)
    (archive,) = folder.iterdir()
    return archive


def test_the_wheel_holds_jprob_alone(tmp_path):
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if not name.startswith(f"jprob-{jprob.__version__}.dist-info/")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "jprob").rglob("*.py")}
    assert names == sources | {"jprob/py.typed"}


def test_the_sdist_holds_jprob_and_what_builds_it(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        top = {Path(name).parts[1] for name in sdist.getnames()}
    assert top - {".gitignore"} == {"jprob", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"}


def pins(lock):
    """Each entry of a lock: the requirement as pip reads it, and its hashes."""
    text = (ROOT / lock).read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [(Requirement(re.sub(r"\s--hash=\S+", "", line)), re.findall(r"--hash=(\S+)", line)) for line in lines]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_one_version_and_its_hashes(lock):
    assert pins(lock)
    for requirement, hashes in pins(lock):
        assert [spec.operator for spec in requirement.specifier] == ["=="], requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_host_and_no_path(lock):
    assert not re.search(r"://|@ |^-|(^|\s)/\w", (ROOT / lock).read_text(), re.MULTILINE)


def locked(lock, python):
    """The version of each package that a lock has for a Python."""
    here = default_environment() | {
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }
    active = [pin for pin, _ in pins(lock) if pin.marker is None or pin.marker.evaluate(here)]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in active}
    assert len(versions) == len(active), "two pins of one package"
    return versions


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_serves_each_dependency_on_each_python(lock, python):
    versions, extras = locked(lock, python), PROJECT["optional-dependencies"]
    chosen = {extra: needs for extra, needs in extras.items() if extra not in ("bench", "docs")}
    assert chosen.keys() == set(re.findall(r"--extra (\w+)", (ROOT / "Makefile").read_text()))
    groups = [PYPROJECT["build-system"]["requires"], PROJECT["dependencies"], *chosen.values()]
    if lock == "docs.lock":  # whose environment holds nothing else
        groups = [extras["docs"]]
    for need in map(Requirement, itertools.chain(*groups)):
        version = versions.get(canonicalize_name(need.name))
        assert version is not None, need
        assert need.specifier.contains(version), (need, version)


def selected(python):
    """An environment in which the command of a Python runs, also if pyenv keeps it."""
    return os.environ | {"PYENV_VERSION": python}


def can_make_a_venv(python):
    try:
        command = [f"python{python}", "-c", "import ensurepip, venv"]
        return subprocess.run(command, env=selected(python), capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


# Together they have all tiers of `experiments.compare`.
JUDGED = ["gradient_law", "escape_time", "efficiency", "data_sets", "likelihood", "one_neuron"]


@pytest.mark.slow
def test_studies_agree_under_another_version_of_jax(tmp_path):
    """Values with a tier, and verdicts, of the smallest settings."""
    others = [python for python in PYTHONS if locked("requirements.lock", python)["jax"] != jax.__version__]
    found = [python for python in others if can_make_a_venv(python)]
    if not found:
        pytest.skip(f"no Python of another jax makes a venv here, tried {', '.join(others)}")
    head, *tables = re.split(r"\n(?=\[)", (ROOT / "configs/study.toml").read_text())
    chosen = [table for table in tables if table[1 : table.index("]")] in JUDGED]
    (tmp_path / "small.toml").write_text("\n".join([head, *chosen]))
    settings = [f"--set={name}.{item}" for name in JUDGED for item in SMOKE[name]]
    # optax's adam multiplies floats by an integer count.
    env = tiny_studies.environment() | {"JAX_NUMPY_DTYPE_PROMOTION": "standard", "XLA_FLAGS": ""}

    with tempfile.TemporaryDirectory() as folder:  # a gigabyte, which tmp_path would keep
        there = f"{folder}/bin/python"
        subprocess.run([f"python{found[0]}", "-m", "venv", folder], env=selected(found[0]), check=True)
        pip = [there, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", "--no-compile"]
        subprocess.run([*pip, "--require-hashes", "-r", "requirements.lock"], cwd=ROOT, check=True)
        runs = [
            subprocess.Popen(
                [python, "-m", "experiments", "run", "small.toml", *settings, "--out", out], cwd=tmp_path, env=env
            )
            for python, out in ((sys.executable, "here"), (there, "there"))
        ]
        assert [run.wait() for run in runs] == [0, 0]
    versions = [json.loads((tmp_path / out / "manifest.json").read_text())["versions"] for out in ("here", "there")]
    assert versions[0]["jax"] != versions[1]["jax"]
    compare = [sys.executable, "-m", "experiments", "compare", "here", "there"]
    compared = subprocess.run(compare, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert compared.returncode == 0, compared.stdout


@pytest.fixture
def workplace(tmp_path):
    """A copy of the files that the set-up reads, with a bin/ that is all of PATH."""
    folder = tmp_path / "a folder"
    (folder / "bin").mkdir(parents=True)
    for name in ["Makefile", "pyproject.toml", *LOCKS]:
        shutil.copyfile(ROOT / name, folder / name)
    for tool in ["cat", "cp", "mkdir", "rm", "touch"]:
        (folder / "bin" / tool).symlink_to(shutil.which(tool))
    return folder


def make(folder, *arguments):
    # The suite itself may run under make, whose flags would otherwise reach this one.
    env = {"PATH": str(folder / "bin"), "LC_ALL": "C"}
    return subprocess.run([MAKE, *arguments], cwd=folder, env=env, capture_output=True, text=True)


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@needs_make
def test_help_lists_every_target_and_is_the_default():
    targets = re.findall(r"^([a-z-]+):(?!.*=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    shown = subprocess.run([MAKE, "help"], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in shown.splitlines()] == list(dict.fromkeys(targets))
    assert all(len(line.split()) > 2 for line in shown.splitlines())
    assert subprocess.run([MAKE], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout == shown


OLD = "sys.version_info = (3, 10, 9)"
BARE = "sys.modules['ensurepip'] = None"


@needs_make
@pytest.mark.parametrize("target", ["study", "test", "docs", "lint", "lock"])
@pytest.mark.parametrize(("python", "says"), [(None, "missing"), (OLD, "too old"), (BARE, "python3-venv")])
def test_a_python_that_will_not_do_is_one_line(workplace, target, python, says):
    if python:
        script(
            workplace / "bin/python3",
            f'[ "$1" != -V ] || exec "{sys.executable}" -V\n'
            '[ "$1" = -c ] || exit 1\n'
            f"""exec "{sys.executable}" -c "import sys; {python}; exec(sys.argv[1])" "$2\"""",
        )
    ran = make(workplace, "-j4", target)
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert says in ran.stderr
    assert not (workplace / ".venv").exists()


@pytest.fixture
def python3(workplace):
    """A python3 that makes a .venv at once, in which pip succeeds unless a file `broken` lies about."""
    pip = 'case "$*" in -V) echo Python 3.11.0;; *"-m pip"*) echo "$@" >>pip.log; [ ! -e broken ];; esac'
    venv = '"-m venv --clear .venv") mkdir -p .venv/bin && cp inner .venv/bin/python;;'
    script(workplace / "inner", pip)
    script(workplace / "bin/python3", f'case "$*" in -V) echo Python 3.11.0;; {venv} esac')
    return workplace


def is_ready(folder):
    return make(folder, "-q", ".venv/ready").returncode == 0


def newer(path):
    later = path.stat().st_mtime + 60
    os.utime(path, (later, later))


@needs_make
def test_a_set_up_runs_once_and_checks_hashes(python3):
    first = make(python3, "-j4", "lint", "test")
    assert first.returncode == 0, first.stderr
    assert len(first.stderr.splitlines()) == 1
    assert "Python 3.11.0" in first.stderr
    locked, project = (python3 / "pip.log").read_text().splitlines()
    assert locked.endswith("--require-hashes -r requirements.lock")
    assert "--no-deps --no-build-isolation --editable ." in project

    assert make(python3, "lint").stderr == ""
    assert len((python3 / "pip.log").read_text().splitlines()) == 2


@needs_make
def test_a_set_up_that_failed_is_not_ready_and_recovers(python3):
    (python3 / "broken").touch()
    assert make(python3, "lint").returncode != 0
    assert (python3 / ".venv/bin/python").exists()
    assert not is_ready(python3)
    (python3 / "broken").unlink()
    assert make(python3, "lint").returncode == 0
    assert is_ready(python3)


@needs_make
@pytest.mark.parametrize(
    ("change", "installs"),
    [
        (lambda at: newer(at / "requirements.lock"), 2),
        (lambda at: newer(at / "pyproject.toml"), 1),
        (lambda at: (at / ".venv/bin/python").unlink(), 2),
        (lambda at: script(at / ".venv/bin/python", "echo Python 3.12.0"), 2),
    ],
    ids=["lock changed", "project changed", "python gone", "python changed"],
)
def test_a_venv_goes_stale(python3, change, installs):
    make(python3, ".venv/ready")
    assert is_ready(python3)
    (python3 / "pip.log").unlink()
    change(python3)
    assert not is_ready(python3)
    assert make(python3, ".venv/ready").returncode == 0
    assert len((python3 / "pip.log").read_text().splitlines()) == installs
