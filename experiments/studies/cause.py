"""Cause: that the small gradient itself, and not the loss or the scale of the inputs, costs the accuracy.

From confidently wrong starts softmax + squared error falls behind softmax + cross-entropy. Its gradient in the logits
differs from p - y in two ways: it is small where p is confident, and it has another direction. Two more arms take the
two apart. Each has a gradient g in the logits instead of a loss:

    cross-entropy             p - y
    squared error             J (p - y), with J = diag p - p p^T
    squared error, rescaled   J (p - y), for each example rescaled to the norm of p - y
    cross-entropy, weighted   2 p_t (1 - p_t) (p - y), which for two classes is the gradient of squared error

The rescaled arm has the direction of squared error with the size of cross-entropy, and the weighted arm the reverse.
Preconditioned by the pseudoinverse of J, squared error is cross-entropy exactly: the report checks that identity.

The inputs are the pixels of handwritten digits: raw, centred, or whitened. Other inputs have other margins at the same
start. So the output weights are rescaled until the root mean square of the start's logits is that of raw inputs.

Protocol: a linear model, trained by SGD. Every seed draws its own split, initial weights and order of the batches, the
same for all arms. The learning rate is tuned for each arm and input. The criterion is the mean validation accuracy of
the selection seeds. The half-decade grid is widened while the best rate lies at its edge. Seeds that select are not
seeds that report. Splits of one data set overlap. So the intervals are those of Nadeau and Bengio.

Sources: Solla, Levin and Fleisher (1988); LeCun, Bottou, Orr and Müller (1998), Efficient BackProp, for whitening;
Nadeau and Bengio (2003).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from experiments import arms, data, plots, stats, tuning
from experiments.arms import SOFTMAX_CE, SOFTMAX_SE
from experiments.findings import Hypothesis, Plot, Section, Table, decided
from experiments.results import Progress, Record
from experiments.tuning import Member
from jprob import categorical, mle

RESCALED, WEIGHTED = f"{SOFTMAX_SE}, rescaled", f"{SOFTMAX_CE}, weighted"
ARMS = (SOFTMAX_CE, SOFTMAX_SE, RESCALED, WEIGHTED)
COLOURS = dict(zip(ARMS, (arms.COLOURS[SOFTMAX_CE], arms.COLOURS[SOFTMAX_SE], *plots.PALETTE[3:5]), strict=True))
INPUTS = ("raw", "centred", "whitened")
HALF = 0.5  # of the gap, which the size of the gradient has to explain
IDENTITY = 1e-4  # relative error of pinv(J) J (p - y): see `identity`
SELECTION_SEED, REPORT_SEED = 100_000, 110_000  # the first; the verdicts' rules were fixed before these seeds ran

Decade = Annotated[float, msgspec.Meta(ge=-8, le=6, multiple_of=0.5)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The standard deviation is that of the output weights on raw inputs. Decimal logarithms give the ends of rates."""

    std: Annotated[float, msgspec.Meta(gt=0, le=100)]
    epochs: Count
    batch_size: Count
    decades: Annotated[list[Decade], msgspec.Meta(min_length=2, max_length=2)]
    widen_at_most: Annotated[int, msgspec.Meta(ge=0, le=20)]
    selection_seeds: Count
    report_seeds: Annotated[int, msgspec.Meta(ge=2, le=1000)]
    trained_together: Count

    def __post_init__(self):
        if self.decades[0] > self.decades[1]:
            raise ValueError(f"decades: expected the lower end first, got {self.decades}")


def gradient(arm: Int[Array, ""], z: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float[Array, "n k"]:
    """The arm's gradient in the logits; arms are numbered in the order of ARMS."""
    entropy, square = (
        jax.grad(lambda z, name=name: jnp.sum(arms.loss(name, z, labels)))(z) for name in (SOFTMAX_CE, SOFTMAX_SE)
    )
    # The norm relative to the largest entry: the squares of e^-60 would underflow.
    largest = jnp.maximum(jnp.max(jnp.abs(square), axis=-1, keepdims=True), jnp.finfo(z.dtype).tiny)
    direction = square / largest
    length = jnp.maximum(jnp.linalg.norm(direction, axis=-1, keepdims=True), jnp.finfo(z.dtype).tiny)
    rescaled = direction / length * jnp.linalg.norm(entropy, axis=-1, keepdims=True)
    log_p = categorical.log_prob(labels, z)
    weighted = (2 * jnp.exp(log_p) * -jnp.expm1(log_p))[:, None] * entropy
    return jnp.stack([entropy, square, rescaled, weighted])[arm]


def nll(params, batch, key):
    """A value with the gradient of the arm; the value itself says nothing."""
    x, labels, arm = batch
    z = outputs(params, x)
    return jnp.sum(jax.lax.stop_gradient(gradient(arm[0], z, labels)) * z, axis=-1)


def outputs(params, x):
    """Logits of the linear model."""
    return x @ params["kernel"] + params["bias"][None]


def prepared(dataset: data.Dataset, inputs: str) -> list[data.Split]:
    """The three splits, centred or whitened by the training examples. Directions without variance are left out."""
    x = dataset.train.features.astype(np.float64)
    mean = x.mean(axis=0) if inputs != "raw" else np.zeros(x.shape[1])
    turn = np.eye(x.shape[1])
    if inputs == "whitened":
        variance, directions = np.linalg.eigh(np.cov(x.T, bias=True))
        kept = variance > 1e-3 * variance.max()
        turn = np.where(kept, directions / np.sqrt(np.where(kept, variance, 1)), 0)
    return [s._replace(features=((s.features - mean) @ turn).astype(np.float32)) for s in dataset[:3]]


def drawn(inputs: str, seed: int, std: float):
    """A seed's splits and initial weights. The root mean square of the start's logits is that of raw inputs."""
    dataset = data.resampled("digits", seed)
    raw, splits = dataset.train.features, prepared(dataset, inputs)
    kernel = std * np.random.default_rng(seed).normal(size=(raw.shape[1], dataset.num_classes))
    size = [np.sqrt(np.mean(np.square(x @ kernel))) for x in (raw, splits[0].features)]
    params = {"kernel": (kernel * size[0] / size[1]).astype(np.float32), "bias": np.zeros(kernel.shape[1], np.float32)}
    return params, splits


def trainer(inputs: str, config: Config) -> Callable[[Sequence[Member]], dict[str, np.ndarray]]:
    """A function from members to what is measured of each; one program trains all arms."""
    size = len(data.load("digits").train.labels)
    steps = config.epochs * -(-size // config.batch_size)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)

    def accuracy(params, split):
        z = outputs(params, split.features)
        return jnp.where(jnp.isfinite(z).all(), 100 * jnp.mean(jnp.argmax(z, axis=-1) == split.labels), 0)

    @jax.jit
    @jax.vmap
    def members(params, rate, arm, key, splits):
        train, validation, test = splits
        z = outputs(params, train.features)
        true = jnp.take_along_axis(z, train.labels[:, None], axis=-1)[:, 0]
        others = jnp.where(jax.nn.one_hot(train.labels, z.shape[-1], dtype=bool), -jnp.inf, z)
        margin = jnp.max(others, axis=-1) - true
        entropy, square = (gradient(jnp.array(ARMS.index(a)), z, train.labels) for a in (SOFTMAX_CE, SOFTMAX_SE))
        state = optax.tree.set(mle.init(params, optimizer, key), learning_rate=rate)
        examples = *train, jnp.broadcast_to(arm, size)
        state, _ = mle.run(
            nll, optimizer, state, examples, num_steps=steps, batch_size=config.batch_size, log_every=steps
        )
        return {
            "validation": accuracy(state.params, validation),
            "test": accuracy(state.params, test),
            "margin": jnp.nanmedian(jnp.where(margin > 0, margin, jnp.nan)),
            "wrong": 100 * jnp.mean(margin > 0),
            **identity(z, square, entropy),
        }

    def train(chunk: Sequence[Member]) -> dict[str, np.ndarray]:
        of_seed = {m.seed: drawn(inputs, m.seed, config.std) for m in chunk}
        params, splits = jax.tree.map(lambda *x: np.stack(x), *(of_seed[m.seed] for m in chunk))
        rates = np.array([10.0 ** (m.rate / 2) for m in chunk], np.float32)
        numbers = np.array([ARMS.index(m.arm) for m in chunk], np.int32)
        measured = members(params, rates, numbers, jnp.stack([jax.random.key(m.seed) for m in chunk]), splits)
        return {name: np.asarray(x, np.float64) for name, x in measured.items()}

    return lambda wanted: tuning.together(train, wanted, config.trained_together)


def identity(z: Float[Array, "n k"], square: Float[Array, "n k"], entropy: Float[Array, "n k"]) -> dict[str, Array]:
    """The largest error of e = p - y, solved from g = J e and relative to its norm; and the number of examples.

    g_i = p_i (e_i - c) with c = <p, e>. So e_i = g_i / p_i + c, and c follows from the sum of e, which is 0.

    A g_i that underflows is off by the smallest normal number, and e_i by that over p_i. Examples count if this is
    below 2 u of ||e||. Their R is at most 72. Neither |e_i| nor |c| is above ||e||. The relative error of g is at most
    (16 + 3 R) u. That of e is at most (16 + R) u, and that of p R u. Together these allow (80 + 17 R) u, or 8e-5.
    """
    log_p, size = categorical.log_softmax(z), jnp.linalg.norm(entropy, axis=-1)
    ratio = jnp.sign(square) * jnp.exp(jnp.log(jnp.abs(square)) - log_p)
    solved = ratio - jnp.mean(ratio, axis=-1, keepdims=True)
    error = jnp.max(jnp.abs(solved - entropy), axis=-1) / size
    limits = jnp.finfo(z.dtype)
    known = jnp.min(log_p, axis=-1) + jnp.log(size) > jnp.log(limits.tiny / limits.eps)
    return {"identity": jnp.max(jnp.where(known, error, 0)), "identified": jnp.sum(known)}


def run(config: Config) -> Iterator[Record | Progress]:
    """For each input: the learning-rate curves of all arms, then the report seeds at the best rates."""
    for done, inputs in enumerate(INPUTS):
        yield Progress(done / len(INPUTS), f"{inputs} inputs: rates")
        train = trainer(inputs, config)
        seeds = range(SELECTION_SEED, SELECTION_SEED + config.selection_seeds)
        tried = tuning.of_arms(train, ARMS, config.decades, seeds, config.widen_at_most)
        yield Progress((done + 0.7) / len(INPUTS), f"{inputs} inputs: seeds")
        seeds = range(REPORT_SEED, REPORT_SEED + config.report_seeds)
        measured = train([Member(arm, tuning.best(tried[arm]), seed) for arm in ARMS for seed in seeds])
        for i, arm in enumerate(ARMS):
            mine = slice(i * len(seeds), (i + 1) * len(seeds))
            values = {name: column[mine] for name, column in measured.items()}
            values |= {"rate": 10.0 ** (tuning.best(tried[arm]) / 2)}
            values |= {"at_edge": float(tuning.outside(tried[arm]) is not None)}
            yield Record({"inputs": inputs, "arm": arm}, {**values})


Cells = dict[tuple[str, str], dict[str, np.ndarray]]  # (inputs, arm) -> measured, by seed


def interval(values: np.ndarray) -> stats.Interval:
    """The 95 % interval of a mean over seeds, each with its own split."""
    digits = data.load("digits")
    return stats.resampled_interval(values, len(digits.test.labels) / len(digits.train.labels))


def told(values: np.ndarray) -> str:
    """Mean and interval, in points."""
    low, high = interval(values)
    return f"{values.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def lead(cells: Cells, inputs: str, arm: str) -> np.ndarray:
    """The lead of cross-entropy over an arm, in points of accuracy."""
    return cells[inputs, SOFTMAX_CE]["test"] - cells[inputs, arm]["test"]


def edges(cells: Cells, inputs: str) -> list[str]:
    """Arms whose best rate may lie beyond the grid."""
    return [
        f"The best rate of {arm} on {inputs} inputs lies at the edge of its grid."
        for arm in ARMS
        if float(cells[inputs, arm]["at_edge"])
    ]


def part_hypothesis(cells: Cells, claim: str, part: np.ndarray, whole: np.ndarray, what: str) -> Hypothesis:
    """A part of the gap is at least half of it: the interval of the part less half of the whole decides."""
    low, high = interval(part - HALF * whole)
    gap = interval(whole).low > 0
    return Hypothesis(
        claim,
        f"{what} {told(part)} points of the gap {told(whole)}" + (f": {part.mean() / whole.mean():.0%}" if gap else ""),
        f"the 95 % interval of the part less {HALF:.0%} of the gap lies below 0; undecided while it holds 0, or that "
        "of the gap does",
        "undecided" if not gap else "holds" if low > 0 else "falsified" if high < 0 else "undecided",
        edges(cells, "raw"),
    )


def size_hypothesis(cells: Cells) -> Hypothesis:
    """Squared error closes the gap once its size is restored."""
    whole, left = lead(cells, "raw", SOFTMAX_SE), lead(cells, "raw", RESCALED)
    claim = (
        "The small gradient is the cause: rescaled to the size of $p - y$, the gradient of squared error closes at "
        "least half of the gap, with its direction unchanged."
    )
    made = part_hypothesis(cells, claim, whole - left, whole, "closed are")
    return made._replace(against=[f"The direction costs what is left: {told(left)} points.", *made.against])


def weight_hypothesis(cells: Cells) -> Hypothesis:
    """Cross-entropy with the size of squared error opens it."""
    whole, opened = lead(cells, "raw", SOFTMAX_SE), lead(cells, "raw", WEIGHTED)
    claim = (
        "The reverse holds as well: cross-entropy whose gradient is weighted by $2 p_t (1 - p_t)$ falls behind by at "
        "least half of the gap."
    )
    return part_hypothesis(cells, claim, opened, whole, "lost are")


def inputs_hypothesis(cells: Cells) -> Hypothesis:
    """Whitening at the same margins leaves a gap."""
    gap = lead(cells, "whitened", SOFTMAX_SE)
    low, high = interval(gap)
    margins = "; ".join(f"{inputs} {cells[inputs, SOFTMAX_CE]['margin'].mean():.1f}" for inputs in INPUTS)
    return Hypothesis(
        "The margin is the cause, not the inputs: whitened inputs with the same logits at the start leave a gap.",
        "lead of softmax + cross-entropy in points of accuracy: "
        + "; ".join(f"{inputs} {told(lead(cells, inputs, SOFTMAX_SE))}" for inputs in INPUTS),
        "the 95 % interval on whitened inputs lies below 0; undecided while it holds 0",
        "holds" if low > 0 else "falsified" if high < 0 else "undecided",
        [
            f"The median margins by which the start is wrong are alike, not equal: {margins} nats.",
            "The inputs matter too: on raw inputs the gap is "
            f"{lead(cells, 'raw', SOFTMAX_SE).mean() - gap.mean():+.1f} points larger.",
            *edges(cells, "whitened"),
        ],
    )


def identity_hypothesis(cells: Cells) -> Hypothesis:
    """Preconditioned, squared error is cross-entropy."""
    worst = max(float(values["identity"].max()) for values in cells.values())
    fewest = min(float(values["identified"].min()) for values in cells.values())
    return Hypothesis(
        "Preconditioned by the pseudoinverse of J, the gradient of squared error is that of cross-entropy.",
        f"largest relative error at the starts: {worst:.1e}, over {fewest:.0f} or more examples of each",
        f"an error is above {IDENTITY:g}; undecided where a start has no example",
        decided(worst <= IDENTITY) if fewest > 0 else "undecided",
        ["Examples whose gradient of squared error underflows in float32 are left out."],
    )


def figure(cells: Cells) -> Plot:
    """Accuracy of every arm on every input."""
    made, (axis,) = plots.figure(height=3.4)
    for i, arm in enumerate(ARMS):
        means = np.array([cells[inputs, arm]["test"].mean() for inputs in INPUTS])
        reach = [abs(interval(cells[inputs, arm]["test"]).low - m) for inputs, m in zip(INPUTS, means, strict=True)]
        place = np.arange(len(INPUTS)) + 0.2 * (i - 1.5)
        axis.bar(place, means, 0.18, yerr=reach, color=COLOURS[arm], capsize=2, label=arm)
    axis.set_xticks(range(len(INPUTS)), [f"{inputs} inputs" for inputs in INPUTS])
    axis.set(ylabel="test accuracy (%)", ylim=(0, 100))
    plots.legend(made, *axis.get_legend_handles_labels())
    return Plot(made, "Test accuracy from a confidently wrong start, mean over seeds with 95 % intervals.")


def report(config: Config, records: Sequence[Record]) -> Section:
    """The parts of the gap."""
    cells: Cells = {
        (str(s["inputs"]), str(s["arm"])): {name: np.asarray(v) for name, v in values.items()} for s, values in records
    }
    whole, left = lead(cells, "raw", SOFTMAX_SE), lead(cells, "raw", RESCALED)
    text = (
        "The gradient of softmax + squared error in the logits is that of softmax + cross-entropy, $p - y$, multiplied "
        "by the Jacobian $J$ of the softmax. The product is small for a confident prediction, and has another "
        "direction. Two arms separate size and direction.\n\n"
        f"The linear model starts from output weights of standard deviation {config.std:g}, so that "
        f"{cells['raw', SOFTMAX_CE]['wrong'].mean():.0f} % of the examples are wrong, by a median margin of "
        f"{cells['raw', SOFTMAX_CE]['margin'].mean():.0f} nats. The gap is the lead of softmax + cross-entropy in "
        "points of test accuracy."
    )
    abstract = [
        f"Rescaled to the size of $p - y$, the gradient of squared error closes {(whole - left).mean():.0f} of the "
        f"{whole.mean():.0f} points that it loses from a confidently wrong start."
    ]
    rows = []
    for (inputs, arm), values in cells.items():
        behind = "" if arm == SOFTMAX_CE else told(-lead(cells, inputs, arm))
        rows.append([inputs, arm, tuning.rate_text(float(values["rate"])), f"{values['test'].mean():.1f}", behind])
    header = ["inputs", "arm", "rate", "accuracy (%)", "lead over cross-entropy"]
    table = Table("Test accuracy, and the lead with its 95 % interval in points.", header, rows)
    makers = size_hypothesis, weight_hypothesis, inputs_hypothesis, identity_hypothesis
    hypotheses = [make(cells) for make in makers]
    return Section("Cause", abstract, text, [figure(cells)], hypotheses, [table])
