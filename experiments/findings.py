"""Findings that a study hands to the report: claims with verdicts, figures, tables.

Formulas in all texts but the tables' stand between dollar signs, see `experiments.mathml`.
"""

from collections.abc import Sequence
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
    against: Sequence[str] = ()  # what speaks against the claim or limits it, one sentence with figures each


class Tier(NamedTuple):
    """How far a stored value may differ between two devices."""

    name: str
    allowed: float  # relative; if `over_seeds`, absolute, for means over seeds
    slack: float = 0.0  # an absolute difference that counts as none
    over_seeds: bool = False
    given: str = ""  # a value that both records share, or the tier does not hold for them: the tuned learning rate


DRAWS = Tier("draws", 0.0)
FUNCTION = Tier("function", 2e-6)
GRADIENT = Tier("gradient", 1e-5)
COEFFICIENTS = Tier("coefficients", 1e-3, slack=1e-3)
STEPS = Tier("steps", 1e-3, slack=1.0)
GENTLE_TRAINING = Tier("gentle training", 1e-3)
GENTLE_ACCURACY = Tier("gentle accuracy", 0.5, over_seeds=True, given="rate")


def decided(holds: bool | np.bool_) -> str:
    """The verdict of a claim that has been decided."""
    return "holds" if holds else "falsified"


class Plot(NamedTuple):
    """A figure made by `plots.figure`, and what to see in it."""

    figure: "Figure"
    caption: str
    stacks: bool = True  # whether its panels may stand below each other on a phone; if not, it is scrolled there


class Table(NamedTuple):
    """Numbers, formatted for people."""

    caption: str
    header: list[str]
    rows: list[list[str]]


class Section(NamedTuple):
    """The findings of a study."""

    title: str
    abstract: list[str]  # what was found, in sentences with figures: first in its section, and the page opens with five
    text: str  # plain paragraphs, separated by blank lines; each term is defined where it is first used
    plots: list[Plot]  # the first is shown at the top of the page if the study comes first
    hypotheses: list[Hypothesis]
    tables: list[Table]
