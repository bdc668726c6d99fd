"""Faulty: breaks off after one record for as long as there is a file named `broken`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from experiments.findings import Section
from experiments.results import Progress, Record


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many records to write."""

    pieces: int


def run(config: Config) -> Iterator[Record | Progress]:
    for piece in range(config.pieces):
        yield Record({"piece": piece}, {"value": float(piece)})
        if Path("broken").exists():
            raise FileNotFoundError("a mistake in the study")


def report(config: Config, records: Sequence[Record]) -> Section:
    return Section("Faulty", [], f"{len(records)} records", [], [], [])
