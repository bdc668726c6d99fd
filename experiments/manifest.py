"""How a run's numbers came about: the config, the code, the versions, the device.

All of it that can change a number is hashed into the run's identity. The same command on the same code and machine
finds its folder again and continues; anything else gets another folder, so that results never mix.
"""

import hashlib
import itertools
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np

from experiments import studies
from experiments.config import Config

Device = Any  # jax.Device, which type checkers take for a variable

_JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)
_PACKAGES = ("jax", "jaxlib", "optax", "numpy", "scipy", "scikit-learn")


def describe(config: Config, device: Device | None) -> dict[str, Any]:
    """The manifest of a new run. Called under the settings (device, matmul precision) of the run.

    Without a device it is that of a run whose jobs find theirs: what they measured on is None until it is known.
    """
    settings = msgspec.to_builtins(config.studies)
    determined = determinants(config, device)
    return {
        "identity": digest([settings, determined]),
        "config": {
            "file": config.file,
            "title": config.title,
            "backend": config.backend,
            "studies": settings,
            "sha256": digest(settings),
        },
        **determined,
        "git": git_state(_package_folder("experiments")),
        "data": {},  # data set -> sha256 of what was loaded
        "seconds": {},  # study -> seconds, compilation included
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def determinants(config: Config, device: Device | None) -> dict[str, Any]:
    """The conditions that determine the numbers, next to the settings."""
    return {
        "source": source_digest(_sources(config.studies)),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "device": device and _device(device),
        "numerics": device and _numerics(),
    }


def _device(device: Device) -> dict[str, Any]:
    count = jax.device_count(device.platform)
    return {"backend": device.platform, "kind": device.device_kind, "count": count}


def _sources(names: Iterable[str]) -> Iterator[Path]:
    """The Python files that can change a number: of jprob, of the harness, and of the studies that run."""
    harness = _package_folder("experiments")
    yield from [*_package_folder("jprob").rglob("*.py"), *harness.glob("*.py")]
    yield from itertools.chain.from_iterable(map(studies.files, names))


def source_digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.parent.name}/{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def git_state(folder: Path) -> dict[str, Any]:
    """The commit that `folder` is at, and whether the tree has changes; None where there is no commit or no git."""
    try:
        commit, changes = (_git(folder, *command) for command in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def _numerics() -> dict[str, Any]:
    settings = {name: getattr(jax.config, name) for name in _JAX_SETTINGS}
    return {"XLA_FLAGS": os.environ.get("XLA_FLAGS"), **settings, "keeps_subnormals": keeps_subnormals()}


def keeps_subnormals() -> bool:
    """Whether 1e-40, below float32's smallest normal number, survives a compiled multiplication."""
    tiny, one = np.float32(1e-40), np.float32(1.0)  # arguments: constants would be multiplied by the compiler
    return bool(jax.jit(lambda x, y: x * y)(tiny, one) > 0)


def digest(value: Any) -> str:
    """SHA-256 over a value of JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package_folder(name: str) -> Path:
    spec = util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])
