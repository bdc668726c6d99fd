"""Times that can be compared: every contestant in turn, round by round, and ratios within a round.

Times of one run drift with the machine; the ratio of two programs that run one after the other does not. So a benchmark
keeps the time of every contestant in every round. It reports the median over rounds of a ratio.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from experiments import stats
from experiments.findings import Hypothesis
from experiments.results import Record


def race(contestants: Sequence[Callable[[], object]], rounds: int, seconds: float = 0.0) -> np.ndarray:
    """Seconds a call, [contestants, rounds]: everyone runs once a round, each round starting one further on.

    A time is that of as many calls as take `seconds`, or of one. The last result of a sample is waited for.
    """
    for run in contestants:
        jax.block_until_ready(run())  # the first call may still load or allocate
    calls = [1] * len(contestants)
    for i, run in enumerate(contestants):
        while seconds and _seconds(run, calls[i]) < seconds:
            calls[i] *= 2
    taken = np.empty((len(contestants), rounds))
    for i in range(rounds):
        for j in np.roll(np.arange(len(contestants)), -i).tolist():
            taken[j, i] = _seconds(contestants[j], calls[j]) / calls[j]
    return taken


def _seconds(run: Callable[[], object], calls: int) -> float:
    result, start = None, time.perf_counter()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return time.perf_counter() - start


def ratio(record: Record, name: str, base: str) -> np.ndarray:
    """One contestant's time by another's, round by round."""
    return np.asarray(record.values[f"seconds_{name}"]) / np.asarray(record.values[f"seconds_{base}"])


def ratio_text(record: Record, name: str, base: str) -> str:
    """The median of the ratio with its 95 % interval; nothing where one of the two has not run."""
    if not {f"seconds_{name}", f"seconds_{base}"} <= record.values.keys():
        return ""
    ratios = ratio(record, name, base)
    low, high = stats.bca_interval(ratios, np.median)
    return f"{np.median(ratios):.3g} [{low:.3g}, {high:.3g}]"


def judge(
    records: Sequence[Record], name: str, base: str, limit: float, sign: int = 1
) -> tuple[np.ndarray, Record, str]:
    """Median ratios, the worst record, and whether all medians are at most the limit; with sign -1, at least.

    Falsified where the 95 % interval of a median lies beyond the limit, undecided where a median alone does.
    """
    medians = np.array([np.median(ratio(r, name, base)) for r in records])
    over = [stats.bca_interval(sign * ratio(r, name, base), np.median).low > sign * limit for r in records]
    beyond = np.max(sign * medians) > sign * limit
    verdict = "falsified" if any(over) else "undecided" if beyond else "holds"
    return medians, records[int(np.argmax(sign * medians))], verdict


def hypothesis(
    claim: str,
    records: Sequence[Record],
    name: str,
    base: str,
    limit: float,
    names: Mapping[str, str],
    name_of: Callable[[Record], str],
    sign: int = 1,
) -> Hypothesis:
    """The claim that `judge` judges, with the range of its medians and the worst of them."""
    medians, worst, verdict = judge(records, name, base, limit, sign)
    return Hypothesis(
        claim,
        f"time of {names[name]} / {names[base]}: {min(medians):.3g} to {max(medians):.3g}; at its worst "
        f"{ratio_text(worst, name, base)} ({name_of(worst)})",
        f"somewhere the 95 % interval of the median ratio lies {'above' if sign > 0 else 'below'} {limit:g}; undecided "
        "while a median does",
        verdict,
    )
