"""Speed: what exactness costs beside the peers, and beside a plain copy of the array.

Each function runs over a batch of rows of logits, forward (the mean over rows, or the map itself) and with its
gradient in the logits. In one round every contestant runs in turn, in an order that moves on from round to round, so
that a disturbance of the machine meets them all; a time is that of several calls in a row. What is compared is the
ratio of two times of the same round, and its median over rounds, since times drift and ratios do not.

The contestants: jprob; the peer, optax where it has the function and jax.nn where not; torch on the CPU, where it is
installed and the device is a CPU; and a copy of the logits, which reads and writes each of them once and is the floor
for anything that returns an array of that size. The memory is that of XLA's temporaries: what the program needs beyond
its arguments and results.
"""

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax

from experiments import plots, timing
from experiments.config import distinct
from experiments.report import Hypothesis, Plot, Section, Table
from experiments.results import Progress, Record
from jprob import categorical

MODES = ("forward", "value and gradient")
SLOWER = 1.1  # a ratio to the peer up to which a function counts as not slower
PEERS = {"cross_entropy": "optax", "cross_entropy, soft": "optax", "kl_divergence": "optax", "softmax": "jax.nn",
         "log_softmax": "jax.nn"}  # fmt: skip

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Shape = Annotated[list[Count], msgspec.Meta(min_length=2, max_length=2)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Each shape is [rows, classes]; a time is that of as many calls as fit into `seconds_a_sample`, or of one."""

    functions: Annotated[
        list[Literal["cross_entropy", "cross_entropy, soft", "kl_divergence", "softmax", "log_softmax"]],
        msgspec.Meta(min_length=1),
    ]
    shapes: Annotated[list[Shape], msgspec.Meta(min_length=1)]
    dtypes: Annotated[list[Literal["float32", "bfloat16"]], msgspec.Meta(min_length=1)]
    rounds: Annotated[int, msgspec.Meta(ge=2, le=1000)]
    seconds_a_sample: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]

    def __post_init__(self):
        distinct(self, "functions", "shapes", "dtypes")


class Inputs(NamedTuple):
    """One batch: logits, as many others, a class and a target distribution each."""

    logits: jax.Array
    others: jax.Array
    labels: jax.Array
    targets: jax.Array


def inputs(shape: Sequence[int], dtype: str) -> Inputs:
    """Drawn on the host: logits of standard deviation 3, targets that sum to 1 up to their rounding."""
    rng = np.random.default_rng(0)
    rows, classes = shape
    z, other = (jnp.asarray(rng.normal(0, 3, shape).astype(np.float32), dtype) for _ in range(2))
    return Inputs(z, other, jnp.asarray(rng.integers(0, classes, rows), jnp.int32), jax.nn.softmax(other))


def ours(function: str) -> Callable[[Inputs], jax.Array]:
    """The function as jprob has it."""
    return {
        "cross_entropy": lambda x: categorical.cross_entropy(x.logits, x.labels),
        "cross_entropy, soft": lambda x: categorical.cross_entropy(x.logits, x.targets),
        "kl_divergence": lambda x: categorical.kl_divergence(x.others, x.logits),
        "softmax": lambda x: categorical.softmax(x.logits),
        "log_softmax": lambda x: categorical.log_softmax(x.logits),
    }[function]


def peer(function: str) -> Callable[[Inputs], jax.Array]:
    """The same from the peer; optax's KL takes log-probabilities, and q first."""
    return {
        "cross_entropy": lambda x: optax.losses.softmax_cross_entropy_with_integer_labels(x.logits, x.labels),
        "cross_entropy, soft": lambda x: optax.losses.softmax_cross_entropy(x.logits, x.targets),
        "kl_divergence": lambda x: optax.losses.kl_divergence_with_log_targets(
            jax.nn.log_softmax(x.logits), jax.nn.log_softmax(x.others)
        ),
        "softmax": lambda x: jax.nn.softmax(x.logits),
        "log_softmax": lambda x: jax.nn.log_softmax(x.logits),
    }[function]


def program(call: Callable[[Inputs], jax.Array], mode: str, x: Inputs) -> tuple[Callable[[], object], int]:
    """What runs the compiled program to its end, and the bytes of its temporaries."""

    is_map = jax.eval_shape(call, x).ndim > 1

    def forward(logits, rest):
        out = call(rest._replace(logits=logits))
        return out if is_map else jnp.mean(out)

    def scalar(logits, rest):
        out = forward(logits, rest)
        return jnp.vdot(out, rest.others).astype(jnp.float32) if is_map else out  # a cotangent that is no constant

    compiled = jax.jit(forward if mode == MODES[0] else jax.value_and_grad(scalar)).lower(x.logits, x).compile()
    memory = compiled.memory_analysis()
    temporaries = 0 if memory is None else memory.temp_size_in_bytes  # not every backend tells
    return lambda: jax.block_until_ready(compiled(x.logits, x)), temporaries


def copy(x: Inputs) -> Callable[[], object]:
    """Reads and writes every logit once."""
    copied = jax.jit(jnp.copy)
    return lambda: jax.block_until_ready(copied(x.logits))


def torch_program(function: str, mode: str, x: Inputs) -> Callable[[], object] | None:
    """torch's cross-entropy on the CPU, where there is a torch; nothing for the other functions and devices."""
    on_cpu = next(iter(x.logits.devices())).platform == "cpu"
    if function != "cross_entropy" or not on_cpu or importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")  # heavy, and in no default install
    dtype = torch.bfloat16 if x.logits.dtype == jnp.bfloat16 else torch.float32
    logits = torch.tensor(np.asarray(x.logits, np.float32)).to(dtype).requires_grad_()
    labels = torch.tensor(np.asarray(x.labels, np.int64))

    def forward():
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(logits, labels)

    def both():
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), logits)

    return forward if mode == MODES[0] else both


def run(config: Config) -> Iterator[Record | Progress]:
    """A record for each function, shape, dtype and mode, with every contestant's time in every round."""
    cells = list(itertools.product(config.dtypes, config.shapes, config.functions, MODES))
    for done, (dtype, shape, function, mode) in enumerate(cells):
        yield Progress(done / len(cells), f"{function}, {dtype}[{shape[0]}, {shape[1]}], {mode}")
        x = inputs(shape, dtype)
        jprob_run, jprob_bytes = program(ours(function), mode, x)
        peer_run, peer_bytes = program(peer(function), mode, x)
        contestants = {"jprob": jprob_run, "peer": peer_run, "copy": copy(x)}
        if (torch_run := torch_program(function, mode, x)) is not None:
            contestants["torch"] = torch_run
        taken = timing.race(list(contestants.values()), config.rounds, config.seconds_a_sample)
        cell = {"function": function, "dtype": dtype, "rows": shape[0], "classes": shape[1], "mode": mode}
        times = {f"seconds_{name}": row for name, row in zip(contestants, taken, strict=True)}
        yield Record(cell, {**times, "bytes_jprob": jprob_bytes, "bytes_peer": peer_bytes})


def cell_name(record: Record) -> str:
    """For people: "float32[1024, 32000], forward"."""
    s = record.settings
    return f"{s['dtype']}[{s['rows']}, {s['classes']}], {s['mode']}"


def not_slower(records: Sequence[Record], function: str, mode: str) -> Hypothesis:
    """In no shape and dtype does jprob take more than 1.1 times what its peer takes."""
    cells = [r for r in records if r.settings["function"] == function and r.settings["mode"] == mode]
    medians, worst, verdict = timing.judge(cells, "jprob", "peer", SLOWER)
    return Hypothesis(
        f"{function}, {mode}: jprob is no slower than {PEERS[function]}, up to a factor of {SLOWER}.",
        f"time of jprob / {PEERS[function]}: {min(medians):.2f} to {max(medians):.2f}; at its worst "
        f"{timing.ratio_text(worst, 'jprob', 'peer')} ({cell_name(worst)})",
        f"somewhere the 95 % interval of the median ratio lies above {SLOWER}; undecided while a median does",
        verdict,
    )


def slower_text(records: Sequence[Record], function: str, mode: str) -> str:
    """In how many shapes and dtypes a function is slower; nothing where it is in none."""
    cells = [r for r in records if r.settings["function"] == function and r.settings["mode"] == mode]
    over = sum(np.median(timing.ratio(r, "jprob", "peer")) > SLOWER for r in cells)
    return f"{function}, {mode}: slower than {PEERS[function]} in {over} of {len(cells)} cases." if over else ""


def time_table(records: Sequence[Record], function: str) -> Table:
    """Every shape, dtype and mode of one function."""
    rows = []
    for record in records:
        if record.settings["function"] == function:
            milliseconds = 1e3 * np.median(np.asarray(record.values["seconds_jprob"]))
            mebibytes = [float(np.asarray(record.values[f"bytes_{name}"])) / 2**20 for name in ("jprob", "peer")]
            ratios = [timing.ratio_text(record, "jprob", other) for other in ("peer", "torch", "copy")]
            rows.append([cell_name(record), f"{milliseconds:.2f}", *ratios, *(f"{m:.1f}" for m in mebibytes)])
    header = ["", "jprob, ms", f"/ {PEERS[function]}", "/ torch", "/ copy", "jprob, MiB", f"{PEERS[function]}, MiB"]
    caption = (
        f"{function}: median time of jprob, median ratio to the others in the same round with its 95 % interval, and "
        "temporaries. An empty cell: not run here."
    )
    return Table(caption, header, rows)


def ratio_figure(records: Sequence[Record], config: Config) -> Plot:
    """A dot for every cell, by function."""
    figure, axes = plots.figure(columns=2, width=8.4, height=0.55 * len(config.functions) + 1.6)
    names, shapes = [str(name) for name in config.functions], [tuple(shape) for shape in config.shapes]
    looks = {"float32": ("o", plots.COLOURS["A"]), "bfloat16": ("s", plots.COLOURS["B"])}
    for axis, mode in zip(axes, MODES, strict=True):
        for record in records:
            function, dtype, rows, classes = (record.settings[k] for k in ("function", "dtype", "rows", "classes"))
            if record.settings["mode"] == mode:
                within = (shapes.index((int(rows), int(classes))) + 0.5) / len(shapes) - 0.5
                marker, colour = looks[str(dtype)]
                height = names.index(str(function)) + 0.7 * within
                axis.plot(np.median(timing.ratio(record, "jprob", "peer")), height, marker, color=colour, label=dtype)
        axis.axvline(1, **plots.THEORY)
        axis.set(xscale="log", xlabel="time of jprob / peer", title=mode, ylim=(len(config.functions) - 0.5, -0.5))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="minor", labelsize=7)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [])
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    top_down = ", ".join(f"[{rows}, {classes}]" for rows, classes in shapes)
    return Plot(
        figure, f"Median ratio to the peer, below 1 where jprob is faster. Of each function's dots: {top_down}."
    )


def report(config: Config, records: Sequence[Record]) -> Section:
    """Ratios, times and memory."""
    text = (
        "Times of one run drift with the machine; the ratio of two programs that run in turn does not. The peer is "
        "optax for the losses and jax.nn for the maps; the copy reads and writes the array of logits once."
    )
    hypotheses = [not_slower(records, function, mode) for function in config.functions for mode in MODES]
    slower = [sentence for f in config.functions for mode in MODES if (sentence := slower_text(records, f, mode))]
    tables = [time_table(records, function) for function in config.functions]
    return Section("Speed", text, [ratio_figure(records, config)], hypotheses, tables, slower)
