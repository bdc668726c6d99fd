"""The coin: the share of heads approaches the bias.

Every kind of setting, value and piece of report that the harness has to carry.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np

from experiments import plots
from experiments.findings import Hypothesis, Plot, Section, Table
from experiments.results import Progress, Record


class Toss(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table within the study's table."""

    height: Annotated[float, msgspec.Meta(gt=0, le=3)]
    hand: Literal["left", "right"]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How often to flip which coins."""

    seed: Annotated[int, msgspec.Meta(ge=0)]
    flips: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    biases: Annotated[list[Annotated[float, msgspec.Meta(gt=0, lt=1)]], msgspec.Meta(min_length=1)]
    toss: Toss

    def __post_init__(self) -> None:
        if len(set(self.biases)) < len(self.biases):
            raise ValueError("biases: expected each once")


def run(config: Config) -> Iterator[Record | Progress]:
    generator = np.random.default_rng(config.seed)
    for index, bias in enumerate(config.biases):
        yield Progress(index / len(config.biases), f"bias {bias}")
        heads = generator.random(config.flips) < bias
        share = np.cumsum(heads) / np.arange(1, config.flips + 1)
        yield Record({"bias": bias, "hand": config.toss.hand}, {"share": share, "off": share[-1] - bias})


def report(config: Config, records: Sequence[Record]) -> Section:
    figure, axes = plots.figure()
    for record in records:
        axes[0].plot(np.asarray(record.values["share"])[::50], label=f"bias {record.settings['bias']}")
    worst = max(abs(float(record.values["off"])) for record in records)
    return Section(
        title="The coin",
        abstract=[f"After {config.flips} flips the share of heads is {worst:.4f} off at most."],
        text="A coin has a <bias>.\n\nIts flips show it.",
        plots=[Plot(figure, "Share of heads against flips & more flips.")],
        hypotheses=[
            Hypothesis(
                claim="The share of heads is the bias [to .1].",
                measured=f"{worst:.4f}",
                falsified_if="further off than .1",
                verdict="holds" if worst <= 0.1 else "falsified",
                against=[f"After $n1$ = {config.flips} flips the share is still {worst:.4f} off."],
            )
        ],
        tables=[
            Table("Distances", ["bias", "off"], [[str(r.settings["bias"]), str(r.values["off"])] for r in records])
        ],
    )
