"""A transformer of words: a training step with the fused loss, and with the loss that keeps its logits.

The model is a decoder by Flax. Its last layer is its table of words, and a softcap bounds the logits. It reads the
source files that Python ships. Each contestant takes a step of Adam on one batch, in a step that donates its state.
They are two losses, each with a head of each dtype:

    jprob    linear_categorical.cross_entropy
    plain    optax's loss of the logits, which are made at once, in float32

Each round times everyone in turn. Then each trains from the same weights on the same batches.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax

from experiments import data, plots, timing
from experiments.config import distinct
from experiments.errors import InputError
from experiments.findings import Hypothesis, Plot, Section, Table
from experiments.results import Progress, Record
from jprob import linear_categorical

HEADS = 4  # of attention
NAMES = {"jprob": "jprob", "plain": "optax, plain"}
CURVES_AGREE = {"float32": 1e-3, "bfloat16": 1e-2}  # a relative difference of losses up to which two curves are one
SLOWER = 1.0  # a ratio of times up to which a step counts as no slower
DTYPE_SLOWER = 1.1  # the same, of a head in bfloat16 to one in float32

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`width` numbers stand for a word. A batch has so many sequences of so many words; training takes `steps`."""

    layers: Count
    width: Annotated[int, msgspec.Meta(ge=HEADS, le=1 << 16, multiple_of=HEADS)]
    sequences: Count
    words: Count
    softcap: Annotated[float, msgspec.Meta(gt=0, le=1000)]
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)]
    head_dtypes: Annotated[list[Literal["float32", "bfloat16"]], msgspec.Meta(min_length=1)]
    rounds: Annotated[int, msgspec.Meta(ge=2, le=1000)]
    steps: Annotated[int, msgspec.Meta(ge=2, le=1 << 20)]

    def __post_init__(self):
        distinct(self, "head_dtypes")


def require(config: Config) -> None:
    """Flax makes the model."""
    if importlib.util.find_spec("flax") is None:
        raise InputError("transformer: expected flax, got a Python without it: pip install flax")


class Model(NamedTuple):
    """The weights, and a function of them and of words that gives the last layer's inputs."""

    params: Any
    hidden: Callable[[Any, jax.Array], jax.Array]


def model(config: Config, vocabulary: int) -> Model:
    """Blocks of causal attention and a perceptron, each after a layer norm and next to a residual."""
    from flax import nnx  # what only this study needs

    rngs, width = nnx.Rngs(0), config.width

    class Block(nnx.Module):
        def __init__(self):
            self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
            self.attend = nnx.MultiHeadAttention(HEADS, width, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

        def __call__(self, x, mask):
            x = x + self.attend(self.norms[0](x), mask=mask)
            return x + self.down(nnx.gelu(self.up(self.norms[1](x))))

    class Decoder(nnx.Module):
        def __init__(self):
            self.words = nnx.Embed(vocabulary, width, rngs=rngs)
            self.places = nnx.Embed(config.words, width, rngs=rngs)
            self.blocks = nnx.List([Block() for _ in range(config.layers)])
            self.norm = nnx.LayerNorm(width, rngs=rngs)

        def __call__(self, words):
            x = self.words(words) + self.places(jnp.arange(config.words))[None]
            mask = nnx.make_causal_mask(words)
            for block in self.blocks:
                x = block(x, mask)
            return self.norm(x)

    graph, params = nnx.split(Decoder(), nnx.Param)
    return Model(params, lambda params, words: nnx.merge(graph, params, copy=True)(words))


def loss(name: str, dtype: str, config: Config, hidden: jax.Array, table: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean loss of the words, from the inputs of the last layer and its table."""
    hidden, table = hidden.astype(dtype), table.astype(dtype)
    if name == "jprob":
        options = {"transposed_kernel": True, "softcap": config.softcap}
        return linear_categorical.cross_entropy(hidden, table, labels, **options)
    logits = jnp.einsum("bth,vh->btv", hidden, table, preferred_element_type=jnp.float32)
    logits = config.softcap * jnp.tanh(logits / config.softcap)
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


class Trainer:
    """A compiled step of one contestant, and where its training stands."""

    def __init__(self, config: Config, name: str, dtype: str, model: Model, batch: np.ndarray):
        optimizer = optax.adam(config.learning_rate)

        def step(carry, text):
            def objective(params):
                return loss(name, dtype, config, model.hidden(params, text[:, :-1]),
                            params["words"]["embedding"][...], text[:, 1:])  # fmt: skip

            params, state = carry
            value, gradient = jax.value_and_grad(objective)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        self.carry = jax.tree.map(jnp.array, (model.params, optimizer.init(model.params)))  # a copy, to be donated
        self.program = jax.jit(step, donate_argnums=0).lower(self.carry, batch).compile()

    def __call__(self, batch: np.ndarray) -> jax.Array:
        """The loss of a batch, before a step down it."""
        self.carry, value = self.program(self.carry, batch)
        return jax.block_until_ready(value)


def batches(config: Config) -> tuple[np.ndarray, int]:
    """[batch, sequences, words + 1] of a text in random order, and the number of its words."""
    text = data.load("python_source")
    words, size = text.train.features[:, 0], config.words + 1
    rows = words[: len(words) // size * size].reshape(-1, size)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(rows))[: config.sequences] for _ in range(config.steps)]
    return np.stack([rows[order] for order in orders]), text.num_classes


def run(config: Config) -> Iterator[Record | Progress]:
    """A record of times and temporaries, and a loss curve, for each contestant and dtype of the head."""
    text, vocabulary = batches(config)
    made = model(config, vocabulary)
    cells = list(itertools.product(config.head_dtypes, NAMES))
    trainers = {}
    for done, (dtype, name) in enumerate(cells):
        yield Progress(done / (2 * len(cells)), f"compiling {name}, {dtype}")
        trainers[dtype, name] = Trainer(config, name, dtype, made, text[0])
    yield Progress(0.5, "timing")
    curves = {cell: [float(trainer(batch)) for batch in text] for cell, trainer in trainers.items()}
    taken = timing.race([partial(trainer, text[0]) for trainer in trainers.values()], config.rounds)
    for (cell, trainer), seconds in zip(trainers.items(), taken, strict=True):
        memory = trainer.program.memory_analysis()
        values = {"loss": np.array(curves[cell]), "seconds": seconds}
        values |= {} if memory is None else {"bytes": memory.temp_size_in_bytes}
        yield Record({"head": cell[0], "loss": cell[1], "vocabulary": vocabulary}, values)


def paired(records: Sequence[Record], dtype: str) -> Record:
    """Both contestants of a dtype in one record."""
    both = {str(r.settings["loss"]): r for r in records if r.settings["head"] == dtype}
    values = {f"{what}_{name}": both[name].values[what] for name in NAMES for what in both[name].values}
    return Record({"head": dtype}, values)


def report(config: Config, records: Sequence[Record]) -> Section:
    """Times, memory and curves."""
    pairs = [paired(records, dtype) for dtype in config.head_dtypes]
    claims = [
        timing.hypothesis("A step takes no longer with the fused loss than with optax's, softcap included.", pairs,
                          "jprob", "plain", SLOWER, NAMES, lambda r: f"{r.settings['head']} head"),
        same_curves(pairs),
    ]  # fmt: skip
    if {"float32", "bfloat16"} <= set(config.head_dtypes):
        claims.append(narrow_head(paired(records, "float32"), paired(records, "bfloat16")))
    header = ["head", "jprob, s a step", "/ optax, plain", "jprob, MiB", "optax, plain, MiB"]
    rows = [[str(pair.settings["head"]), f"{np.median(np.asarray(pair.values['seconds_jprob'])):.3g}",
             timing.ratio_text(pair, "jprob", "plain"), *(mebibytes(pair, name) for name in NAMES)]
            for pair in pairs]  # fmt: skip
    caption = "Median time of a training step, the median ratio with its 95 % interval, and temporaries of the step."
    low, high = (f(np.median(timing.ratio(pair, "jprob", "plain")) for pair in pairs) for f in (min, max))
    text = (
        f"{config.layers} layers of width {config.width} read {config.sequences} sequences of {config.words} words, "
        f"out of {records[0].settings['vocabulary']}. The logits pass through a softcap of {config.softcap:g}."
    )
    abstract = [f"A training step of a small transformer takes {low:.2f} to {high:.2f} times as long with the fused "
                "loss as with all logits in memory."]  # fmt: skip
    return Section("A transformer of words", abstract, text, [curves_figure(pairs)], claims,
                   [Table(caption, header, rows)])  # fmt: skip


def mebibytes(pair: Record, name: str) -> str:
    """Temporaries, or nothing where the compiler does not tell."""
    value = pair.values.get(f"bytes_{name}")
    return "" if value is None else f"{float(np.asarray(value)) / 2**20:.0f}"


def same_curves(pairs: Sequence[Record]) -> Hypothesis:
    """Both losses train the same model."""
    worst, over = [], False
    for pair in pairs:
        ours, plain = (np.asarray(pair.values[f"loss_{name}"]) for name in NAMES)
        worst.append(float(np.max(np.abs(ours - plain) / plain)))
        over |= not worst[-1] <= CURVES_AGREE[str(pair.settings["head"])]
    limits = ", ".join(f"{CURVES_AGREE[str(pair.settings['head'])]:g} ({pair.settings['head']} head)" for pair in pairs)
    return Hypothesis(
        f"Trained by either loss, the model has the same losses, up to a relative difference of {limits}.",
        "largest difference " + ", ".join(f"{w:.2g}" for w in worst),
        "somewhere they differ by more",
        "falsified" if over else "holds",
    )


def narrow_head(wide: Record, narrow: Record) -> Hypothesis:
    """A head in bfloat16 costs no time."""
    both = Record(
        {}, {"seconds_bfloat16": narrow.values["seconds_jprob"], "seconds_float32": wide.values["seconds_jprob"]}
    )
    return timing.hypothesis(
        "With the fused loss, a step with a head in bfloat16 takes no longer than with one in float32.", [both],
        "bfloat16", "float32", DTYPE_SLOWER, {"bfloat16": "bfloat16", "float32": "float32"}, lambda r: "jprob",
    )  # fmt: skip


def curves_figure(pairs: Sequence[Record]) -> Plot:
    """The loss of each step."""
    figure, axes = plots.figure(columns=len(pairs), height=3.2)
    for panel, pair in zip(np.atleast_1d(axes), pairs, strict=True):
        for name, colour, lw, alpha in (("plain", plots.PALETTE[0], 4, 0.4), ("jprob", plots.PALETTE[1], 1, 1.0)):
            panel.plot(np.asarray(pair.values[f"loss_{name}"]), color=colour, lw=lw, alpha=alpha, label=NAMES[name])
        panel.set(xlabel="step", ylabel="loss, nats a word", title=f"{pair.settings['head']} head")
        panel.legend()
    return Plot(figure, "The loss of each batch, before its step.")
