"""What a study hands to the report: claims with verdicts, figures, tables."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # listing the studies must not load matplotlib
    from matplotlib.figure import Figure

VERDICTS = ("holds", "falsified", "undecided")


class Hypothesis(NamedTuple):
    """A claim that could have failed, and how it fared."""

    claim: str  # one sentence
    measured: str  # the figures with their interval, formatted for people: "-0.9998 [-1.0003, -0.9994]"
    falsified_if: str  # the rule, in words with its numbers
    verdict: str  # one of VERDICTS


def decided(holds: bool | np.bool_) -> str:
    """Of a claim that has been decided."""
    return "holds" if holds else "falsified"


class Plot(NamedTuple):
    """A figure made by `plots.figure`, and what to see in it."""

    figure: "Figure"
    caption: str


class Table(NamedTuple):
    """Numbers, formatted for people."""

    caption: str
    header: list[str]
    rows: list[list[str]]


class Section(NamedTuple):
    """What a study has to say."""

    title: str
    text: str  # plain paragraphs, separated by blank lines
    plots: list[Plot]
    hypotheses: list[Hypothesis]
    tables: list[Table]
    counter_evidence: list[str]  # what speaks against the claim, one sentence with figures each
