"""A large vocabulary: what `linear_categorical.cross_entropy` costs next to the loss that keeps its logits.

The task is the value and both gradients of the mean loss of N tokens. Its inputs are hidden [N, H] and kernel [H, V].
The contestants: jprob; the plain form, optax's loss of `hidden @ kernel` with float32 logits; tokamax and torch's
`linear_cross_entropy`, if they are installed; and the three products alone, without any loss, which nobody can do
without. Each round runs everyone in turn. The memory is that of XLA's temporaries, what a program needs beyond its
arguments and results. On Linux the growth of the resident size while it runs is measured too, results included. That
tells of torch as well.

The growth of both with N and V is measured in float32, one of the two at a time. jprob and the plain form are timed
up to the size of logits that the config allows each. Beyond that they are compiled for their memory.

The practical case is a model of words, trained on the source files that Python ships. It trains once by each of the two
losses, from the same weights in the same order.
"""

import ctypes
import importlib
import importlib.util
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from matplotlib.ticker import LogLocator

from experiments import data, plots, timing
from experiments.config import distinct
from experiments.findings import Hypothesis, Plot, Section, Table
from experiments.results import Progress, Record, Value
from jprob import categorical, linear_categorical, mle

PLAIN_LIMIT, PRODUCTS_LIMIT = 1.0, 1.1  # ratios of times up to which jprob counts as no slower
MEMORY_LIMIT = 7.0  # how many times the temporaries of jprob fit into those of the plain form
FLAT = 1.1  # a ratio of temporaries up to which they count as the same
PROPORTIONAL = 0.1  # by how much the exponent of a power law may miss 1
LARGE = 4096  # tokens from which on the logits dwarf the kernel
CURVES_AGREE = 1e-3  # a relative difference of losses up to which two curves are one
NAMES = {
    "jprob": "jprob",
    "plain": "optax, plain",
    "products": "three products",
    "tokamax": "tokamax",
    "torch": "torch",
}

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Cell = Annotated[list[Count], msgspec.Meta(min_length=2, max_length=2)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Each cell is [tokens, vocabulary].

    `growth_tokens` grow at the vocabulary of `growth_cell`, and `growth_vocabularies` at its tokens. A contestant is
    timed if the N x V logits in float32 have at most `timed_mebibytes`. The limit of the plain form is
    `plain_mebibytes`.

    The model reads `context` words of `width` numbers each, and takes `steps` steps on batches of so many tokens.
    """

    hidden: Count
    cells: Annotated[list[Cell], msgspec.Meta(min_length=1)]
    dtypes: Annotated[list[Literal["float32", "bfloat16"]], msgspec.Meta(min_length=1)]
    rounds: Annotated[int, msgspec.Meta(ge=2, le=1000)]
    growth_cell: Cell
    growth_tokens: Annotated[list[Count], msgspec.Meta(min_length=2)]
    growth_vocabularies: Annotated[list[Count], msgspec.Meta(min_length=2)]
    growth_rounds: Annotated[int, msgspec.Meta(ge=2, le=1000)]
    timed_mebibytes: Count
    plain_mebibytes: Count
    context: Annotated[int, msgspec.Meta(ge=1, le=16)]
    width: Count
    steps: Annotated[int, msgspec.Meta(ge=2, le=1 << 20)]
    batch_size: Count

    def __post_init__(self):
        distinct(self, "cells", "dtypes", "growth_tokens", "growth_vocabularies")


class Inputs(NamedTuple):
    """One batch, and the kernel."""

    hidden: jax.Array
    kernel: jax.Array
    labels: jax.Array


def inputs(tokens: int, width: int, vocabulary: int, dtype: str) -> Inputs:
    """Drawn on the host: logits of standard deviation 1."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 1, (tokens, width)).astype(np.float32)
    kernel = rng.normal(0, width**-0.5, (width, vocabulary)).astype(np.float32)
    labels = rng.integers(0, vocabulary, tokens).astype(np.int32)
    return Inputs(jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), jnp.asarray(labels))


def ours(hidden, kernel, labels):
    """By jprob."""
    return linear_categorical.cross_entropy(hidden, kernel, labels)


def plain(hidden, kernel, labels):
    """The plain form, with all logits in memory."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def tokamax(hidden, kernel, labels):
    """The loss of tokamax in chunks, if this version has that for every device."""
    loss = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
    importlib.import_module("absl.flags").FLAGS(["experiments"])  # or it takes this process's options for its own
    chunked = "chunked_xla" in str(inspect.signature(loss))
    return loss(hidden, labels, kernel, reduction="mean", implementation="chunked_xla" if chunked else "xla")


def products(hidden, kernel, labels):
    """The products that no loss can do without: the logits, and two products with something of their size."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32).astype(hidden.dtype)
    return logits[0, 0], (jnp.dot(logits, kernel.T), jnp.dot(hidden.T, logits))


class Program(NamedTuple):
    """A compiled program, and the bytes of its temporaries; not every compiler tells."""

    run: Callable[[], object]
    temporaries: int | None


def compiled(name: str, x: Inputs) -> Program:
    """A contestant's value and both gradients."""
    losses = {"jprob": ours, "plain": plain, "tokamax": tokamax}
    call = products if name == "products" else jax.value_and_grad(losses[name], argnums=(0, 1))
    program = jax.jit(call).lower(*x).compile()
    memory = program.memory_analysis()
    return Program(partial(run_to_the_end, program, x), None if memory is None else memory.temp_size_in_bytes)


def torch_program(x: Inputs) -> Program:
    """torch's fused loss on the CPU."""
    torch = importlib.import_module("torch")  # heavy, and in no default install
    dtype = torch.bfloat16 if x.hidden.dtype == jnp.bfloat16 else torch.float32
    hidden = torch.tensor(np.asarray(x.hidden, np.float32)).to(dtype).requires_grad_()
    rows = torch.tensor(np.asarray(x.kernel, np.float32).T.copy()).to(dtype).requires_grad_()
    labels = torch.tensor(np.asarray(x.labels, np.int64))
    loss = lambda: torch.nn.functional.linear_cross_entropy(hidden, rows, labels)  # noqa: E731
    return Program(lambda: torch.autograd.grad(loss(), (hidden, rows)), None)


def contestants(x: Inputs) -> dict[str, Program]:
    """Everyone who can run here."""
    names = ["jprob", "plain", "products", *(["tokamax"] if importlib.util.find_spec("tokamax") else [])]
    found = {name: compiled(name, x) for name in names}
    if jax.default_backend() == "cpu" and torch_competes(x.hidden.dtype):
        found["torch"] = torch_program(x)
    return found


def torch_competes(dtype: jnp.dtype) -> bool:
    """Not every torch has the loss, and a CPU without instructions for bfloat16 takes 35 times as long there."""
    if importlib.util.find_spec("torch") is None:
        return False
    torch = importlib.import_module("torch")
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return False
    return dtype != jnp.bfloat16 or any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def growth_of_resident_size(run: Callable[[], object]) -> int | None:
    """Bytes by which this process grew while a program ran, its results included; nothing where Linux does not tell."""
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not peak.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
    peak.write_text("5")  # the peak starts again
    before = _kibibytes(status, "VmRSS")
    out = run()
    after = _kibibytes(status, "VmHWM")
    del out
    return 1024 * (after - before)


def _kibibytes(status: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def measure_cell(tokens: int, vocabulary: int, dtype: str, width: int, rounds: int) -> Record:
    """Every contestant's time in every round, and its memory."""
    found = contestants(inputs(tokens, width, vocabulary, dtype))
    taken = timing.race([program.run for program in found.values()], rounds)
    values = {f"seconds_{name}": row for name, row in zip(found, taken, strict=True)}
    values |= {f"bytes_{name}": p.temporaries for name, p in found.items() if p.temporaries is not None}
    resident = {name: growth_of_resident_size(program.run) for name, program in found.items()}
    values |= {f"resident_{name}": grown for name, grown in resident.items() if grown is not None}
    return Record({"part": "cost", "tokens": tokens, "vocabulary": vocabulary, "dtype": dtype}, values)


def growth_cells(config: Config) -> list[tuple[int, int]]:
    """The cells of both lines, each once."""
    tokens, vocabulary = config.growth_cell
    lines = [(n, vocabulary) for n in config.growth_tokens], [(tokens, v) for v in config.growth_vocabularies]
    return list(dict.fromkeys(itertools.chain(*lines)))


def measure_growth(tokens: int, vocabulary: int, config: Config) -> Record:
    """Temporaries of the two losses, the bytes that jprob plans for, and times where the logits are not too large."""
    shapes = (tokens, config.hidden), (config.hidden, vocabulary)
    hidden, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    values: dict[str, Value] = {"bytes_planned": linear_categorical.plan(hidden, kernel).bytes + 4 * kernel.size}
    limits = {"jprob": config.timed_mebibytes, "plain": min(config.timed_mebibytes, config.plain_mebibytes)}
    programs = {}
    for name, loss in (("jprob", ours), ("plain", plain)):
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, kernel, labels).compile()
        memory = program.memory_analysis()
        if memory is not None:
            values[f"bytes_{name}"] = memory.temp_size_in_bytes
        if 4 * tokens * vocabulary <= limits[name] << 20:
            programs[name] = program
    if programs:
        x = inputs(tokens, config.hidden, vocabulary, "float32")
        runs = [partial(run_to_the_end, program, x) for program in programs.values()]
        taken = timing.race(runs, config.growth_rounds)
        values |= {f"seconds_{name}": row for name, row in zip(programs, taken, strict=True)}
    return Record({"part": "growth", "tokens": tokens, "vocabulary": vocabulary}, values)


def run_to_the_end(program: Callable[..., object], x: Inputs) -> object:
    """Its results, which are there when this returns."""
    return jax.block_until_ready(program(*x))


def nll(fused: bool) -> Callable[..., jax.Array]:
    """Minus the log-probability of each next word, from the words before it, by one of the two ways."""

    def words(params, batch, key):
        contexts, labels = batch
        read = params["words"][contexts].reshape(len(contexts), -1)
        hidden = jax.nn.gelu(read @ params["hidden"])
        if fused:
            return -linear_categorical.log_prob(labels, hidden, params["kernel"])
        return categorical.cross_entropy(hidden @ params["kernel"], labels)

    return words


def train(config: Config, fused: bool) -> Record:
    """The loss of every step."""
    words = data.load("python_source")
    rng, vocabulary, read = np.random.default_rng(0), words.num_classes, config.context * config.width

    def draw(rows, columns):
        return jnp.asarray(rng.normal(0, rows**-0.5, (rows, columns)).astype(np.float32))

    params = {"words": draw(vocabulary, config.width), "hidden": draw(read, config.hidden // 4),
              "kernel": draw(config.hidden // 4, vocabulary)}  # fmt: skip
    contexts = words.train.features[:, -config.context :]
    examples = jax.device_put((contexts, words.train.labels))
    optimizer = optax.adam(2e-3)
    state = mle.init(params, optimizer, jax.random.key(0))
    _, history = mle.run(nll(fused), optimizer, state, examples, num_steps=config.steps, batch_size=config.batch_size)
    settings = {"part": "training", "loss": "jprob" if fused else "plain", "vocabulary": vocabulary}
    return Record(settings, {"loss": np.asarray(history.loss)})


def run(config: Config) -> Iterator[Record | Progress]:
    """A record for each cell and dtype, for each cell of growth, and for each of the two training runs."""
    cells, growing = list(itertools.product(config.dtypes, config.cells)), growth_cells(config)
    total = len(cells) + len(growing) + 2
    for done, (dtype, (tokens, vocabulary)) in enumerate(cells):
        yield Progress(done / total, f"{tokens} tokens, {vocabulary} words, {dtype}")
        yield measure_cell(tokens, vocabulary, dtype, config.hidden, config.rounds)
    for done, (tokens, vocabulary) in enumerate(growing, len(cells)):
        yield Progress(done / total, f"growth: {tokens} tokens, {vocabulary} words")
        yield measure_growth(tokens, vocabulary, config)
    for done, fused in enumerate((True, False), total - 2):
        yield Progress(done / total, f"training, {'jprob' if fused else 'plain'}")
        yield train(config, fused)


def part(records: Sequence[Record], name: str) -> list[Record]:
    """The records of one part of the study."""
    return [record for record in records if record.settings["part"] == name]


def number(record: Record, name: str) -> float:
    """A single value; NaN where it was not measured."""
    return float(np.asarray(record.values.get(name, np.nan)))


def cell_name(record: Record) -> str:
    """For people: "4096 tokens, 32000 words, float32"."""
    s = record.settings
    return f"{s['tokens']} tokens, {s['vocabulary']} words, {s['dtype']}"


def no_slower(records: Sequence[Record], base: str, limit: float) -> Hypothesis:
    """jprob takes no more than so many times what another takes, in any cell."""
    medians, worst, verdict = timing.judge(records, "jprob", base, limit)
    than = "the plain form" if base == "plain" else "its three products alone"
    return Hypothesis(
        f"jprob takes at most {limit:g} times as long as {than}.",
        f"time of jprob / {NAMES[base]}: {min(medians):.2f} to {max(medians):.2f}; at its worst "
        f"{timing.ratio_text(worst, 'jprob', base)} ({cell_name(worst)})",
        f"somewhere the 95 % interval of the median ratio lies above {limit:g}; undecided while a median does",
        verdict,
    )


def lean(records: Sequence[Record]) -> Hypothesis:
    """The temporaries of jprob are a small part of the plain form's, if the logits are the larger array."""
    large = [r for r in records if np.asarray(r.settings["tokens"]) >= LARGE]
    shares = [number(r, "bytes_plain") / number(r, "bytes_jprob") for r in large]
    known = bool(shares) and bool(np.all(np.isfinite(shares)))
    measured = "no such cell has run, or the compiler does not tell"
    if known:
        worst = large[int(np.argmin(shares))]
        sizes = (number(worst, f"bytes_{name}") / 2**20 for name in ("plain", "jprob"))
        measured = "{:.0f} MiB against {:.0f} MiB".format(*sizes) + f", {min(shares):.1f} to 1 ({cell_name(worst)})"
    return Hypothesis(
        f"From {LARGE} tokens on, in float32, the plain form needs {MEMORY_LIMIT:g} times the temporaries of jprob.",
        measured,
        f"somewhere it needs fewer than {MEMORY_LIMIT:g} times as many bytes",
        "undecided" if not known else "holds" if min(shares) >= MEMORY_LIMIT else "falsified",
    )


class Line(NamedTuple):
    """One quantity grows, "tokens" or "vocabulary", and the other stays at `fixed`."""

    name: str
    fixed: str
    records: list[Record]

    @property
    def sizes(self) -> np.ndarray:
        """The sizes of the axis that grows."""
        return np.array([size(record, self.name) for record in self.records], float)


def lines(config: Config, growth: Sequence[Record]) -> tuple[Line, Line]:
    """Both, each in the order of size."""
    tokens, vocabulary = config.growth_cell
    first = [r for r in growth if size(r, "vocabulary") == vocabulary and size(r, "tokens") in config.growth_tokens]
    second = [r for r in growth if size(r, "tokens") == tokens and size(r, "vocabulary") in config.growth_vocabularies]
    return (
        Line("tokens", f"{vocabulary} words", sorted(first, key=lambda r: size(r, "tokens"))),
        Line("vocabulary", f"{tokens} tokens", sorted(second, key=lambda r: size(r, "vocabulary"))),
    )


def size(record: Record, name: str) -> int:
    """The tokens or the vocabulary of a record."""
    return int(np.asarray(record.settings[name]))


def flat(line: Line) -> Hypothesis:
    """More tokens need no more temporaries, once a block is full."""
    tokens, counts = line.sizes, np.array([number(r, "bytes_jprob") for r in line.records])
    known = bool(np.all(np.isfinite(counts)))
    growth = float(counts[-1] / counts[0]) if known else float("nan")
    return Hypothesis(
        f"From {tokens[0]:.0f} to {tokens[-1]:.0f} tokens the temporaries of jprob stay the same, up to a factor of "
        f"{FLAT}.",
        f"{growth:.3f} times as many, for {tokens[-1] / tokens[0]:g} times the tokens"
        if known
        else "the compiler does not tell",
        f"they grow by more than a factor of {FLAT}",
        "undecided" if not known else "holds" if growth <= FLAT else "falsified",
    )


def planned(growth: Sequence[Record]) -> Hypothesis:
    """One knows the memory beforehand, for any tokens and words."""
    shares = np.array([number(r, "bytes_jprob") / number(r, "bytes_planned") for r in growth])
    known = bool(np.all(np.isfinite(shares)))
    worst = growth[int(np.argmax(shares))]
    cell = f"{size(worst, 'tokens')} tokens, {size(worst, 'vocabulary')} words"
    return Hypothesis(
        "Whatever the tokens and words, the temporaries of jprob are a block of logits, as `plan` tells, and the "
        f"kernel's gradient, up to a factor of {FLAT}.",
        f"at most {np.max(shares):.3f} of that ({cell})" if known else "the compiler does not tell",
        f"somewhere they are more than {FLAT} times that",
        "undecided" if not known else "holds" if np.max(shares) <= FLAT else "falsified",
    )


def proportional(both: Sequence[Line]) -> Hypothesis:
    """The time of jprob is a power of tokens and of words, with an exponent near 1."""
    exponents = [exponent(line) for line in both]
    known = bool(np.all(np.isfinite(exponents)))
    miss = np.max(np.abs(np.array(exponents) - 1))
    return Hypothesis(
        f"The time of jprob grows in proportion to the tokens and to the words: as a power of {1 - PROPORTIONAL:g} to "
        f"{1 + PROPORTIONAL:g}.",
        "; ".join(f"{line.name}: power {power:.3f}" for line, power in zip(both, exponents, strict=True)),
        f"a least-squares fit of the logarithms misses 1 by more than {PROPORTIONAL:g}",
        "undecided" if not known else "holds" if miss <= PROPORTIONAL else "falsified",
    )


def exponent(line: Line) -> float:
    """The exponent of size in a fit of log time on log size; NaN where fewer than two sizes were timed."""
    seconds = np.array([median_seconds(r, "jprob") for r in line.records])
    timed = np.isfinite(seconds)
    if timed.sum() < 2:
        return float("nan")
    return float(np.polyfit(np.log(line.sizes[timed]), np.log(seconds[timed]), 1)[0])


def median_seconds(record: Record, name: str) -> float:
    """NaN where it was not timed."""
    return float(np.median(np.asarray(record.values.get(f"seconds_{name}", np.nan))))


def same_curve(records: Sequence[Record]) -> Hypothesis:
    """The two training runs."""
    fused, whole = (curve(records, loss) for loss in ("jprob", "plain"))
    worst = float(np.max(np.abs(fused - whole) / np.abs(whole)))
    return Hypothesis(
        f"Trained by either loss, a model has the same losses, up to {CURVES_AGREE:g} of each.",
        f"largest relative difference {worst:.2g} over {len(whole)} steps; the loss falls from {whole[0]:.3f} to "
        f"{np.mean(whole[-10:]):.3f}",
        f"somewhere they differ by more than {CURVES_AGREE:g}",
        "holds" if worst <= CURVES_AGREE else "falsified",
    )


def curve(records: Sequence[Record], loss: str) -> np.ndarray:
    """The losses of a training run."""
    return next(np.asarray(r.values["loss"]) for r in records if r.settings["loss"] == loss)


def cost_table(records: Sequence[Record]) -> Table:
    """Every cell: times and memory of all who ran."""
    others = [name for name in NAMES if name != "jprob" and any(f"seconds_{name}" in r.values for r in records)]
    rows = []
    for record in records:
        ratios = [timing.ratio_text(record, "jprob", name) for name in others]
        sizes = [memory_text(record, name) for name in ("jprob", *others)]
        seconds = np.median(np.asarray(record.values["seconds_jprob"]))
        rows.append([cell_name(record), f"{seconds:.3g}", *ratios, *sizes])
    header = ["", "jprob, s", *(f"/ {NAMES[name]}" for name in others),
              *(f"{NAMES[name]}, MiB" for name in ("jprob", *others))]  # fmt: skip
    caption = (
        "Median time of jprob, median ratios to the others in the same round with their 95 % intervals, and memory: "
        "temporaries, and in brackets the growth of the resident size. An empty cell: not run, or not told."
    )
    return Table(caption, header, rows)


def memory_text(record: Record, name: str) -> str:
    """Temporaries (resident), in MiB."""
    temporaries, resident = (number(record, f"{kind}_{name}") / 2**20 for kind in ("bytes", "resident"))
    told = "" if np.isnan(temporaries) else f"{temporaries:.0f}"
    return told if np.isnan(resident) else f"{told} ({resident:.0f})".strip()


def growth_figure(both: Sequence[Line], label: str, value: Callable[[Record, str], float], caption: str) -> Plot:
    """A value of both losses in two panels, by tokens and by words."""
    figure, axes = plots.figure(columns=2, height=3.4)
    for panel, line in zip(axes, both, strict=True):
        for name, colour in (("plain", plots.PALETTE[0]), ("jprob", plots.PALETTE[1])):
            panel.plot(line.sizes, [value(r, name) for r in line.records], "o-", color=colour, label=NAMES[name])
        panel.set(xscale="log", yscale="log", xlabel=line.name, ylabel=label, title=line.fixed)
        panel.set_xticks(line.sizes, [f"{n / 1024:.3g}k" for n in line.sizes])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
    axes[0].legend()
    return Plot(figure, f"Value and both gradients, float32; k = 1024. {caption}")


def mebibytes(record: Record, name: str) -> float:
    """Mebibytes of temporaries."""
    return number(record, f"bytes_{name}") / 2**20


def training_figure(records: Sequence[Record]) -> Plot:
    """Both curves, one on top of the other, and their difference."""
    figure, (above, below) = plots.figure(columns=2, height=3.4)
    fused, whole = (curve(records, loss) for loss in ("jprob", "plain"))
    above.plot(whole, color=plots.PALETTE[0], lw=4, alpha=0.4, label=NAMES["plain"])
    above.plot(fused, color=plots.PALETTE[1], lw=1, label="jprob")
    above.set(xlabel="step", ylabel="loss, nats a word")
    above.legend()
    below.plot(np.abs(fused - whole) / whole, color=plots.PALETTE[2], lw=1)
    below.axhline(CURVES_AGREE, **plots.THEORY)
    below.set(xlabel="step", ylabel="relative difference", yscale="log")
    return Plot(figure, f"A model of {records[0].settings['vocabulary']} words, trained by either loss.")


def abstract(cells: Sequence[Record]) -> list[str]:
    """Time and memory next to the plain form."""
    ratios = [np.median(timing.ratio(r, "jprob", "plain")) for r in cells]
    memory = [number(r, "bytes_plain") / number(r, "bytes_jprob") for r in cells]
    return [
        f"The loss of a large vocabulary by jprob takes {min(ratios):.2f} to {max(ratios):.2f} times as long as with "
        f"all logits in memory, which needs {min(memory):.1f} to {max(memory):.1f} times as much memory beyond its "
        "arguments and results."
    ]


def report(config: Config, records: Sequence[Record]) -> Section:
    """Times, memory, growth and training."""
    text = (
        "The logits of N tokens over V words are the largest array of a language model's step. jprob makes them a "
        "block of tokens at a time, and their gradient with them, so that no more than a block is ever in memory."
    )
    cost, growth, training = (part(records, name) for name in ("cost", "growth", "training"))
    both = lines(config, growth)
    exact = [r for r in cost if r.settings["dtype"] == "float32"] or cost
    hypotheses = [
        no_slower(exact, "plain", PLAIN_LIMIT),
        no_slower(exact, "products", PRODUCTS_LIMIT),
        lean(exact),
        flat(both[0]),
        same_curve(training),
        planned(growth),
        proportional(both),
    ]
    slower = [
        f"{cell_name(r)}: jprob takes {timing.ratio_text(r, 'jprob', name)} times as long as {NAMES[name]}."
        for r in cost
        for name in ("plain", "tokamax", "torch")
        if f"seconds_{name}" in r.values and np.median(timing.ratio(r, "jprob", name)) > PLAIN_LIMIT
    ]
    fat = [
        f"{cell_name(r)}: the plain form needs {share:.1f} times the temporaries of jprob."
        for r in cost
        if (share := number(r, "bytes_plain") / number(r, "bytes_jprob")) < MEMORY_LIMIT
    ]
    hypotheses[0], hypotheses[2] = hypotheses[0]._replace(against=slower), hypotheses[2]._replace(against=fat)
    figures = [
        growth_figure(both, "seconds", median_seconds, "A line ends where the config allows no larger logits."),
        growth_figure(both, "temporaries, MiB", mebibytes, "Compiled, also where nothing is timed."),
        training_figure(training),
    ]
    return Section("A large vocabulary", abstract(exact), text, figures, hypotheses, [cost_table(cost)])
