"""Block size: how long `linear_categorical` takes with blocks of other sizes than its default.

A block of few tokens spends its time on the kernel's gradient, which each block reads and writes. The logits of many
tokens leave the cache. The best size between depends on H, V and the device. Each cell has one shape and dtype, and one
function. Its value and its gradients in hidden and kernel are timed with each block size in turn, round by round.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from experiments import plots, timing
from experiments.config import distinct
from experiments.findings import Hypothesis, Plot, Section, Table
from experiments.results import Progress, Record
from jprob import linear_categorical

FUNCTIONS: dict[str, Callable[..., jax.Array]] = {
    "cross_entropy": lambda h, k, labels, **form: linear_categorical.cross_entropy(h, k, labels, **form),
    "log_prob": lambda h, k, labels, **form: jnp.mean(linear_categorical.log_prob(labels, h, k, **form)),
    "entropy": lambda h, k, labels, **form: jnp.mean(linear_categorical.entropy(h, k, **form)),
    "kl_divergence": lambda h, k, labels, **form: jnp.mean(
        linear_categorical.kl_divergence(h, k, jax.lax.stop_gradient(h), jax.lax.stop_gradient(k[:, ::-1]), **form)
    ),
}
DEFAULT = "default"
CLOSE = 1.15  # a ratio of the default's time to the best one's up to which the default counts as well chosen

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Shape = Annotated[list[Count], msgspec.Meta(min_length=3, max_length=3)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Each cell is [tokens, H, V]; a block size is a number of tokens, and one beyond all tokens is left out."""

    cells: Annotated[list[Shape], msgspec.Meta(min_length=1)]
    dtypes: Annotated[list[Literal["float32", "bfloat16"]], msgspec.Meta(min_length=1)]
    functions: Annotated[
        list[Literal["cross_entropy", "log_prob", "entropy", "kl_divergence"]], msgspec.Meta(min_length=1)
    ]
    block_sizes: Annotated[list[Count], msgspec.Meta(min_length=1)]
    rounds: Annotated[int, msgspec.Meta(ge=2, le=1000)]

    def __post_init__(self):
        distinct(self, "cells", "dtypes", "functions", "block_sizes")


@functools.cache
def inputs(tokens: int, hidden: int, vocabulary: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Drawn on the host: hidden [tokens, H], a kernel [H, V] for logits of standard deviation 1, and labels."""
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 1, (tokens, hidden)).astype(np.float32)
    kernel = rng.normal(0, hidden**-0.5, (hidden, vocabulary)).astype(np.float32)
    labels = rng.integers(0, vocabulary, tokens).astype(np.int32)
    return jnp.asarray(rows, dtype), jnp.asarray(kernel, dtype), jnp.asarray(labels)


def measure(function: str, cell: Sequence[int], dtype: str, config: Config) -> Record:
    """The time of each block size in every round, and the tokens of a default block."""
    tokens, hidden, vocabulary = cell
    x, sides = inputs(tokens, hidden, vocabulary, dtype), 2 if function == "kl_divergence" else 1
    sizes = {str(size): 4 * sides * vocabulary * size for size in config.block_sizes if size <= tokens}
    programs = {
        name: jax.jit(jax.value_and_grad(partial(FUNCTIONS[function], block_bytes=most), (0, 1)))
        for name, most in (sizes | {DEFAULT: None}).items()
    }
    taken = timing.race([partial(program, *x) for program in programs.values()], config.rounds)
    settings = {"function": function, "dtype": dtype, "tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}
    rows = jax.ShapeDtypeStruct((hidden, sides * vocabulary), x[1].dtype)  # of logits: two a token for two models
    default = linear_categorical.plan(x[0], rows).block_size
    return Record(settings, {"default": default, **{f"seconds_{n}": s for n, s in zip(programs, taken, strict=True)}})


def run(config: Config) -> Iterator[Record | Progress]:
    """A record for each shape, dtype and function."""
    jobs = list(itertools.product(config.cells, config.dtypes, config.functions))
    for done, (cell, dtype, function) in enumerate(jobs):
        yield Progress(done / len(jobs), f"{function}, {dtype}, {cell}")
        yield measure(function, cell, dtype, config)


def name_of(record: Record) -> str:
    """Function, shape and dtype of a record."""
    s = record.settings
    return f"{s['function']}, {s['tokens']} tokens, H {s['hidden']}, V {s['vocabulary']}, {s['dtype']}"


def medians(record: Record) -> dict[str, float]:
    """The median time of each block size that was tried."""
    times = {k.removeprefix("seconds_"): v for k, v in record.values.items() if k.startswith("seconds_")}
    return {name: float(np.median(np.asarray(seconds))) for name, seconds in times.items()}


def against_best(record: Record) -> Record:
    """The same record, with the times of the best block size as those of "best"."""
    times = medians(record)
    best = min((name for name in times if name != DEFAULT), key=times.__getitem__)
    return Record(record.settings, {**record.values, "seconds_best": record.values[f"seconds_{best}"]})


def well_chosen(records: Sequence[Record]) -> Hypothesis:
    """No block size is much better than the default."""
    return timing.hypothesis(f"The default block takes at most {CLOSE:g} times as long as the best that was tried.",
                             [against_best(r) for r in records], DEFAULT, "best", CLOSE,
                             {DEFAULT: "the default", "best": "the best"}, name_of)  # fmt: skip


def figure(config: Config, records: Sequence[Record]) -> Plot:
    """The time of each block size next to that of the default, for the first function and dtype."""
    chart, axes = plots.figure(columns=1, height=3.6)
    panel = np.atleast_1d(axes)[0]
    shown = [
        r for r in records if (r.settings["function"], r.settings["dtype"]) == (config.functions[0], config.dtypes[0])
    ]
    for record in shown:
        times = medians(record)
        sizes = [size for size in config.block_sizes if str(size) in times]
        s = record.settings
        panel.plot(sizes, [times[str(size)] / times[DEFAULT] for size in sizes], "o-",
                   label=f"H {s['hidden']}, V {s['vocabulary']}, {s['tokens']} tokens")  # fmt: skip
    panel.axhline(1, **plots.THEORY)
    panel.set(xscale="log", xlabel="tokens a block", ylabel="time / time of the default")
    panel.set_xticks(config.block_sizes, [f"{size}" for size in config.block_sizes])
    panel.minorticks_off()
    panel.legend(fontsize="small")
    return Plot(chart, f"{config.functions[0]}, {config.dtypes[0]}: value and both gradients.")


def report(config: Config, records: Sequence[Record]) -> Section:
    """A table of ratios."""
    header = ["", "default, tokens", "default, s", *(f"{size} / default" for size in config.block_sizes)]
    rows = [
        [name_of(r), f"{int(np.asarray(r.values['default']))}", f"{medians(r)[DEFAULT]:.3g}",
         *(timing.ratio_text(r, str(size), DEFAULT) for size in config.block_sizes)]
        for r in records
    ]  # fmt: skip
    text = "A block is a number of tokens whose logits are in memory at once. Blocks change the time and no result."
    caption = "Median time with the default block, and median ratios of others to it with their 95 % intervals."
    ratios = [np.median(timing.ratio(against_best(r), DEFAULT, "best")) for r in records]
    abstract = [
        f"The default block takes {min(ratios):.2f} to {max(ratios):.2f} times as long as the best that was tried."
    ]
    return Section("Block size", abstract, text, [figure(config, records)], [well_chosen(records)],
                   [Table(caption, header, rows)])  # fmt: skip
