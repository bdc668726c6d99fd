"""Grid: one record a cell, each cell a part; arm A is killed while there is a file named `deadly-A`."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from experiments import config as configs
from experiments.findings import Section
from experiments.results import Progress, Record


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Two sides of a grid."""

    arms: list[str]
    seeds: list[int]


def parts(config: Config) -> list[Config]:
    return configs.split(config, "arms", "seeds")


def run(config: Config) -> Iterator[Record | Progress]:
    for arm in config.arms:
        for seed in config.seeds:
            if Path(f"deadly-{arm}").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            curve = np.asarray(jnp.cumsum(jax.random.normal(jax.random.key(seed), [100])))
            yield Record({"arm": arm, "seed": seed}, {"curve": curve, "nan": float("nan"), "last": curve[-1]})


def report(config: Config, records: Sequence[Record]) -> Section:
    return Section("Grid", [], f"{[record.settings for record in records]}", [], [], [])
