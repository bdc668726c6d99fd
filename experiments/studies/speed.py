"""Speed: what exactness costs next to the peers, and next to a plain copy of the array.

A call is that of a user: jprob's public function directly, the peer's under `jax.jit`. The gradient is that of the mean
over rows, in the logits, under `jax.jit` for both. Every contestant runs once a round. The order moves on from round to
round, so that a disturbance of the machine meets them all. The study compares the ratio of two times of the same round,
and its median over rounds. Times drift and ratios do not.

A call of few logits costs mostly its dispatch. Up to QUEUED logits the calls of a sample are queued, as in a training
loop. Only the last one is waited for. Larger calls are waited for one by one.

The contestants: jprob; the peer, optax where it has the function and jax.nn where not; torch on the CPU, if it is
installed and the device is a CPU; and a copy of the logits. The copy reads and writes each of them once. It is the
floor for anything that returns an array of that size. The memory is that of XLA's temporaries: the program's need
beyond its arguments and results. Last comes a whole training step written by hand, once with each cross-entropy.
"""

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax

from experiments import plots, timing
from experiments.config import distinct
from experiments.findings import Hypothesis, Plot, Section, Table
from experiments.results import Progress, Record, Setting
from jprob import categorical

MODES = ("forward", "value and gradient")
STEP, BATCH, FEATURES, HIDDEN, CLASSES = ("cross_entropy", "training step"), 32, 64, 128, 10
SLOWER = 1.1  # a ratio to the peer up to which a function counts as not slower
QUEUED = 1 << 17
PEERS = {"cross_entropy": "optax", "cross_entropy, soft": "optax", "entropy": "jax.nn", "kl_divergence": "optax",
         "softmax": "jax.nn", "log_softmax": "jax.nn"}  # fmt: skip

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Shape = Annotated[list[Count], msgspec.Meta(min_length=2, max_length=2)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Each shape is [rows, classes]; a time is that of as many calls as take `seconds_a_sample`, or of one."""

    functions: Annotated[
        list[Literal["cross_entropy", "cross_entropy, soft", "entropy", "kl_divergence", "softmax", "log_softmax"]],
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


@jax.jit
def optax_kl_divergence(others: jax.Array, logits: jax.Array) -> jax.Array:
    """optax takes log-probabilities, and q first."""
    return optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(logits), jax.nn.log_softmax(others))


@jax.jit
def plain_entropy(logits: jax.Array) -> jax.Array:
    """From the log-probabilities of jax.nn, as code without a library writes it."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


optax_cross_entropy = jax.jit(optax.losses.softmax_cross_entropy_with_integer_labels)
CALLS = {  # function -> what jprob has, what the peer has, and the fields of Inputs that they take
    "cross_entropy": (categorical.cross_entropy, optax_cross_entropy, ["logits", "labels"]),
    "cross_entropy, soft": (categorical.cross_entropy, jax.jit(optax.losses.softmax_cross_entropy),
                            ["logits", "targets"]),
    "entropy": (categorical.entropy, plain_entropy, ["logits"]),
    "kl_divergence": (categorical.kl_divergence, optax_kl_divergence, ["others", "logits"]),
    "softmax": (categorical.softmax, jax.jit(jax.nn.softmax), ["logits"]),
    "log_softmax": (categorical.log_softmax, jax.jit(jax.nn.log_softmax), ["logits"]),
}  # fmt: skip


def program(call: Callable, mode: str, fields: Sequence[str], x: Inputs) -> tuple[Callable, list[jax.Array]]:
    """A call or its gradient, and its arguments."""
    arguments = [getattr(x, field) for field in fields]
    if mode == MODES[0]:
        return call, arguments

    def scalar(cotangent, *arguments):
        out = call(*arguments)
        return jnp.vdot(out, cotangent).astype(jnp.float32) if out.ndim > 1 else jnp.mean(out)

    # The cotangent of a map is no constant, which XLA would fold.
    return jax.jit(jax.value_and_grad(scalar, 1 + fields.index("logits"))), [x.others, *arguments]


def temporaries(call: Callable, arguments: Sequence[Any]) -> int:
    """Bytes that the program needs beyond its arguments and results; 0 where the backend does not tell."""
    memory = jax.jit(call).lower(*arguments).compile().memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes


def runner(call: Callable, arguments: Sequence[Any], size: int) -> Callable[[], object]:
    """Calls, and waits for the result unless the logits are few."""
    if size <= QUEUED:
        return lambda: call(*arguments)
    return lambda: jax.block_until_ready(call(*arguments))


def training_step(loss: Callable) -> tuple[Callable, list[Any]]:
    """A step of Adam down the mean loss of a small network, written by hand, and its arguments."""
    optimizer, x = optax.adam(1e-3), inputs([BATCH, FEATURES], "float32")
    shapes = [(FEATURES, HIDDEN), (1, HIDDEN), (HIDDEN, CLASSES), (1, CLASSES)]
    params = [jnp.full(shape, 0.01) for shape in shapes]

    def mean_loss(params, features, labels):
        hidden, hidden_bias, output, output_bias = params
        return jnp.mean(loss(jax.nn.relu(features @ hidden + hidden_bias) @ output + output_bias, labels))

    @jax.jit
    def step(params, state, features, labels):
        value, gradient = jax.value_and_grad(mean_loss)(params, features, labels)
        updates, state = optimizer.update(gradient, state)
        return value, optax.apply_updates(params, updates), state

    return step, [params, optimizer.init(params), x.logits, x.labels % CLASSES]


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


def measure(
    config: Config, cell: dict[str, Setting], programs: dict[str, tuple[Callable, list]], others: dict[str, Callable]
) -> Record:
    """Everyone's time in every round, and the temporaries of the two `programs`."""
    size = int(cell["rows"]) * int(cell["classes"])
    contestants = {name: runner(*each, size) for name, each in programs.items()} | others
    taken = timing.race(list(contestants.values()), config.rounds, config.seconds_a_sample)
    times = {f"seconds_{name}": row for name, row in zip(contestants, taken, strict=True)}
    return Record(cell, times | {f"bytes_{name}": temporaries(*programs[name]) for name in ("jprob", "peer")})


def run(config: Config) -> Iterator[Record | Progress]:
    """A record for each function, shape, dtype and mode, with every contestant's time in every round; then the step."""
    cells = list(itertools.product(config.dtypes, config.shapes, config.functions, MODES))
    for done, (dtype, shape, function, mode) in enumerate(cells):
        yield Progress(done / len(cells), f"{function}, {dtype}[{shape[0]}, {shape[1]}], {mode}")
        x, (ours, peer, fields) = inputs(shape, dtype), CALLS[function]
        programs = {name: program(call, mode, fields, x) for name, call in (("jprob", ours), ("peer", peer))}
        torch_run = torch_program(function, mode, x)
        cell = {"function": function, "dtype": dtype, "rows": shape[0], "classes": shape[1], "mode": mode}
        copied = {"copy": (jax.jit(jnp.copy), [x.logits])}
        yield measure(config, cell, programs | copied, {} if torch_run is None else {"torch": torch_run})
    if STEP in kinds(config):
        cell = {"function": STEP[0], "dtype": "float32", "rows": BATCH, "classes": CLASSES, "mode": STEP[1]}
        losses = {"jprob": categorical.cross_entropy, "peer": optax_cross_entropy}
        yield measure(config, cell, {name: training_step(loss) for name, loss in losses.items()}, {})


def kinds(config: Config) -> list[tuple[str, str]]:
    """The pairs that are compared with the peer: each function and mode, and the training step."""
    return [*itertools.product(config.functions, MODES), *([STEP] if STEP[0] in config.functions else [])]


def cell_name(record: Record) -> str:
    """For people: "float32[1024, 32000], forward"."""
    s = record.settings
    return f"{s['dtype']}[{s['rows']}, {s['classes']}], {s['mode']}"


def cells_of(records: Sequence[Record], function: str, mode: str) -> list[Record]:
    """Every shape and dtype."""
    return [r for r in records if r.settings["function"] == function and r.settings["mode"] == mode]


def not_slower(records: Sequence[Record], function: str, mode: str) -> Hypothesis:
    """jprob takes no more than 1.1 times what its peer takes, in any shape and dtype."""
    peer = PEERS[function]
    claim = f"{function}, {mode}: jprob is no slower than {peer}, up to a factor of {SLOWER}."
    names = {"jprob": "jprob", "peer": peer}
    cells = cells_of(records, function, mode)
    over = sum(np.median(timing.ratio(r, "jprob", "peer")) > SLOWER for r in cells)
    against = [f"jprob is slower in {over} of {len(cells)} cases."] if over else []
    made = timing.hypothesis(claim, cells, "jprob", "peer", SLOWER, names, cell_name)
    return made._replace(against=against)


def time_table(records: Sequence[Record], function: str) -> Table:
    """Every shape, dtype and mode of one function."""
    rows = []
    for record in records:
        if record.settings["function"] == function:
            microseconds = 1e6 * np.median(np.asarray(record.values["seconds_jprob"]))
            mebibytes = [float(np.asarray(record.values[f"bytes_{name}"])) / 2**20 for name in ("jprob", "peer")]
            ratios = [timing.ratio_text(record, "jprob", other) for other in ("peer", "torch", "copy")]
            rows.append([cell_name(record), f"{microseconds:,.1f}", *ratios, *(f"{m:.1f}" for m in mebibytes)])
    header = ["", "jprob, us", f"/ {PEERS[function]}", "/ torch", "/ copy", "jprob, MiB", f"{PEERS[function]}, MiB"]
    caption = (
        f"{function}: median time of jprob, median ratio to the others in the same round with its 95 % interval, and "
        "temporaries, the memory beyond arguments and results. An empty cell: not run here."
    )
    return Table(caption, header, rows)


def ratio_figure(records: Sequence[Record], config: Config) -> Plot:
    """A dot for every cell, by function."""
    figure, axes = plots.figure(columns=2, height=0.55 * len(config.functions) + 1.6)
    names, shapes = [str(name) for name in config.functions], [tuple(shape) for shape in config.shapes]
    looks = {"float32": ("o", plots.PALETTE[0]), "bfloat16": ("s", plots.PALETTE[1])}
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
        axis.tick_params(axis="x", which="minor")
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [])
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    plots.legend(figure, list(handles.values()), list(handles))
    top_down = ", ".join(f"[{rows}, {classes}]" for rows, classes in shapes)
    return Plot(
        figure, f"Median ratio to the peer, below 1 where jprob is faster. Of each function's dots: {top_down}."
    )


def abstract(records: Sequence[Record], config: Config) -> list[str]:
    """The range of the ratios of cross-entropy with its gradient, or of the first function."""
    function = config.functions[0]
    ratios = [np.median(timing.ratio(r, "jprob", "peer")) for r in cells_of(records, function, MODES[1])]
    return [
        f"{function} of jprob with its gradient takes {min(ratios):.2g} to {max(ratios):.2g} times as long as that of "
        f"{PEERS[function]}, over {len(ratios)} combinations of shape and dtype."
    ]


def report(config: Config, records: Sequence[Record]) -> Section:
    """Ratios, times and memory."""
    text = (
        "Times of one run drift with the machine; the ratio of two programs that run in turn does not. The peer is "
        "optax for the losses and jax.nn for the maps; the copy reads and writes the array of logits once."
    )
    hypotheses = [not_slower(records, *kind) for kind in kinds(config)]
    tables = [time_table(records, function) for function in config.functions]
    return Section("Speed", abstract(records, config), text, [ratio_figure(records, config)], hypotheses, tables)
