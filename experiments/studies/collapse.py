"""Collapse: does the rounding of the usual cross-entropy stop a training and make it spike?

A network learns addition modulo p (two one-hot numbers in, two layers of ReLU, p logits out) by full batches, far
beyond the step at which it is right about every training example. In float32 the usual cross-entropy, a log-sum-exp
less a logit, has a gradient of exactly 0 for the true class once its log-odds pass 24 ln 2 = 16.6: the gradient's sum
over the classes is then no longer 0, and soon the loss is exactly 0. Three losses train the same network from the same
draws, and nothing else differs between them:

    usual      logsumexp(z) - z_y in float32, by autodiff, as in optax and torch
    jprob      `categorical.cross_entropy` in float32
    float64    the usual form on logits cast to float64, its gradient cast back to float32

The log-odds of an example are log p_y / (1 - p_y) = -log(exp(nll) - 1), with the nll computed exactly for every arm.
A spike is a rise of that nll by ten times within 100 steps.

Liu et al. (2026) blame loss spikes on this rounding; others blame Adam's second moment, which underflows in float32 at
log-odds of 43.7, and say that a float64 loss is no cure under weight decay. The hypotheses were fixed before the first
run, and the report gives each verdict whichever way it falls.

Sources: Prieto et al. (2025), arXiv 2501.04697; Liu et al. (2026), arXiv 2605.06152; Chou (2025), Grokking Baseline
Revisited.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jaxtyping import Array, Float, Float64, Int

from experiments import plots, stats
from experiments.config import distinct, split
from experiments.findings import Hypothesis, Plot, Section, Table, decided
from experiments.results import Progress, Record
from jprob import categorical, mle

LOSSES = {"usual": "usual, float32", "jprob": "jprob, float32", "float64": "usual, float64"}
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW with decay", "lion": "Lion"}
COLOURS = dict(zip(LOSSES, (plots.COLOURS["B"], plots.COLOURS["A"], "black"), strict=True))
WALL = 24 * math.log(2)  # log-odds at which the usual float32 gradient of the true class becomes 0
WINDOW, RISE = 100, 10.0  # a spike: so many steps, so many times
AGREEMENT, EXACT_TO = 0.01, 40.0

Rate = Annotated[float, msgspec.Meta(gt=0.0, le=10.0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An optimizer and its learning rate, the same for all losses: the arms differ in rounding alone."""

    optimizer: Literal["sgd", "adam", "adamw", "lion"]
    learning_rate: Rate


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One training for each loss, optimizer and seed. `log_every` divides the steps of a spike's window."""

    modulus: Annotated[int, msgspec.Meta(ge=3, le=200)]
    train_share: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
    hidden_units: Count
    trainings: Annotated[list[Training], msgspec.Meta(min_length=1, max_length=4)]
    weight_decay: Annotated[float, msgspec.Meta(ge=0.0, le=10.0)]
    num_steps: Count
    log_every: Annotated[int, msgspec.Meta(ge=1, le=WINDOW)]
    seeds: Annotated[int, msgspec.Meta(ge=1, le=100)]

    def __post_init__(self):
        distinct(self, "trainings")
        if WINDOW % self.log_every or self.num_steps % self.log_every:
            raise ValueError(f"log_every: expected a divisor of {WINDOW} and of num_steps, got {self.log_every}")


def usual(z: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
    """The form of optax and torch, in the dtype of the logits."""
    return jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0]


def loss(name: str, z: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
    """The loss of each example. The gradient of a cast to float64 is a cast to float32."""
    if name == "jprob":
        return categorical.cross_entropy(z, labels)
    return usual(z.astype(jnp.float64) if name == "float64" else z, labels)


def features(params: Mapping[str, Array], pairs: Int[Array, "n 2"], modulus: int) -> Float[Array, "n h"]:
    """The last hidden layer. The first product, of two one-hot numbers, is a sum of two rows."""
    first = params["left"][pairs[:, 0]] + params["right"][pairs[:, 1]]
    return jax.nn.relu(jax.nn.relu(first) @ params["hidden"])


def initial_params(config: Config, seed: int) -> dict[str, np.ndarray]:
    """He initialisation, drawn on the host, so that every arm and device starts from the same numbers."""
    generator = np.random.Generator(np.random.PCG64(seed))
    p, h = config.modulus, config.hidden_units
    shapes = {"left": (p, h, 2 * p), "right": (p, h, 2 * p), "hidden": (h, h, h), "output": (h, p, h)}
    return {name: np.float32(generator.normal(size=(rows, columns)) * np.sqrt(2 / fan_in))
            for name, (rows, columns, fan_in) in shapes.items()}  # fmt: skip


def examples(config: Config, seed: int) -> tuple[np.ndarray, int]:
    """All pairs of numbers in the seed's order, and how many of them are trained on."""
    order = np.random.Generator(np.random.PCG64([seed, 1])).permutation(config.modulus**2)
    return np.stack(np.divmod(order, config.modulus), axis=1).astype(np.int32), round(config.train_share * order.size)


def optimizer_of(training: Training, weight_decay: float) -> optax.GradientTransformation:
    """No epsilon hides what Adam's second moment does: 1e-30, as in the trials that found it."""
    rate = training.learning_rate
    return {
        "sgd": lambda: optax.sgd(rate),
        "adam": lambda: optax.adam(rate, b2=0.99, eps=1e-30),
        "adamw": lambda: optax.adamw(rate, b2=0.99, eps=1e-30, weight_decay=weight_decay),
        "lion": lambda: optax.lion(rate),
    }[training.optimizer]()


def measured(name: str, params, train, test, modulus: int) -> dict[str, Array]:
    """What is written down of a moment in a training."""
    h, labels = features(params, train[0], modulus), train[1]
    z = h @ params["output"]
    exact = categorical.cross_entropy(z, labels)
    log_odds = -jnp.log(jnp.expm1(exact))
    own, gradient = jax.value_and_grad(lambda z: jnp.sum(loss(name, z, labels)))(z)
    weight_mean, feature_mean = jnp.mean(params["output"], axis=1), jnp.mean(h, axis=0)
    norms = jnp.linalg.norm(weight_mean), jnp.linalg.norm(feature_mean)
    right = jnp.argmax(features(params, test[0], modulus) @ params["output"], axis=-1) == test[1]
    largest = jnp.max(jnp.abs(gradient), axis=-1)
    return {
        "nll": jnp.mean(exact),
        "own_loss": (own / labels.size).astype(jnp.float32),
        "least_log_odds": jnp.min(log_odds),
        "mean_log_odds": jnp.mean(log_odds),
        "no_gradient": jnp.mean(largest == 0),
        "class_sum": jnp.max(jnp.abs(jnp.sum(gradient, axis=-1)) / jnp.where(largest == 0, 1, largest)),
        "weight_mean": norms[0],
        "feature_mean": norms[1],
        "cosine": jnp.dot(weight_mean, feature_mean) / jnp.maximum(norms[0] * norms[1], 1e-30),
        "test_accuracy": 100 * jnp.mean(right),
    }


def train_all(config: Config, training: Training, name: str) -> dict[str, np.ndarray]:
    """All seeds at once: [seeds, measurements], one before the first step and one every `log_every` steps."""
    seeds, optimizer = range(config.seeds), optimizer_of(training, config.weight_decay)
    drawn = [examples(config, seed) for seed in seeds]
    pairs, count = np.stack([pairs for pairs, _ in drawn]), drawn[0][1]
    params = jax.tree.map(lambda *x: np.stack(x), *(initial_params(config, seed) for seed in seeds))
    keys = jax.random.split(jax.random.key(0), config.seeds)

    def nll(params, batch, key):
        return loss(name, features(params, batch[0], config.modulus) @ params["output"], batch[1])

    @jax.jit
    @jax.vmap
    def members(params, pairs, key):
        labels = (pairs[:, 0] + pairs[:, 1]) % config.modulus
        train, test = (jax.tree.map(lambda x: x[part], (pairs, labels)) for part in (slice(count), slice(count, None)))
        look = partial(measured, name, train=train, test=test, modulus=config.modulus)

        def some_steps(state, _):
            state, _ = mle.run(nll, optimizer, state, train, num_steps=config.log_every, batch_size=count)
            return state, look(params=state.params) | {"skipped": state.skipped}

        start = look(params=params) | {"skipped": jnp.int32(0)}
        state = mle.init(params, optimizer, key)
        rows = jax.lax.scan(some_steps, state, length=config.num_steps // config.log_every)[1]
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, rows)

    with jax.enable_x64(True) if name == "float64" else contextlib.nullcontext():
        return {key: np.asarray(x) for key, x in members(params, pairs, keys).items()}


def parts(config: Config) -> list[Config]:
    """Every optimizer by itself."""
    return split(config, "trainings")


def run(config: Config) -> Iterator[Record | Progress]:
    """One record for each optimizer, loss and seed."""
    jobs = [(training, name) for training in config.trainings for name in LOSSES]
    for done, (training, name) in enumerate(jobs):
        yield Progress(done / len(jobs), f"{OPTIMIZERS[training.optimizer]}, {LOSSES[name]}")
        rows = train_all(config, training, name)
        for seed in range(config.seeds):
            settings = {"optimizer": training.optimizer, "loss": name, "seed": seed}
            yield Record(settings, {key: np.asarray(x[seed], np.float64) for key, x in rows.items()})


Curve = Float64[np.ndarray, " n"]


def pick(records: Sequence[Record], name: str, **settings) -> Float64[np.ndarray, "seeds n"]:
    """The curves of all seeds."""
    return np.stack([r.values[name] for r in records if settings.items() <= r.settings.items()])


def departure(got: Curve, want: Curve) -> int | None:
    """The first measurement at which two curves of the nll differ by more than `AGREEMENT`."""
    apart = np.flatnonzero(~(np.abs(got - want) <= AGREEMENT * want))
    return int(apart[0]) if apart.size else None


def num_spikes(nll: Curve, log_every: int) -> int:
    """How often the nll rises above `RISE` times its least value in the `WINDOW` steps before."""
    window = WINDOW // log_every
    least = np.array([np.min(nll[max(0, i - window) : i], initial=np.inf) for i in range(nll.size)])
    high = ~(nll <= RISE * least)
    high[0] = False
    return int(np.sum(high[1:] & ~high[:-1]))


def departures(records: Sequence[Record], optimizer: str, name: str) -> tuple[list[float], bool]:
    """The mean log-odds at which each seed leaves float64's nll, and whether it was the loss that left.

    A seed that never leaves counts with the log-odds that float64 reached. Beyond `EXACT_TO` nothing counts: Adam's own
    second moment fails there.
    """
    got, want = (pick(records, "nll", optimizer=optimizer, loss=loss_name) for loss_name in (name, "float64"))
    odds = pick(records, "mean_log_odds", optimizer=optimizer, loss="float64")
    places = [departure(*pair) for pair in zip(got, want, strict=True)]
    left = [place is not None and odd[place] < EXACT_TO for place, odd in zip(places, odds, strict=True)]
    at = [float(np.max(odd) if place is None else odd[place]) for place, odd in zip(places, odds, strict=True)]
    return at, any(left)


def exact_hypothesis(records: Sequence[Record], config: Config) -> Hypothesis:
    """The exact float32 loss does what float64 does."""
    found = {t.optimizer: departures(records, t.optimizer, "jprob") for t in config.trainings}
    texts = [
        f"{OPTIMIZERS[o]} {min(at):.1f}{'' if left else ' (the highest reached)'}" for o, (at, left) in found.items()
    ]
    return Hypothesis(
        f"jprob's float32 loss trains as the float64 loss does, to {100 * AGREEMENT:.0f} % of the nll, up to log-odds "
        f"of {EXACT_TO:.0f}.",
        "mean log-odds at the first difference, least of the seeds: " + "; ".join(texts),
        f"a seed differs by more than {100 * AGREEMENT:.0f} % at mean log-odds below {EXACT_TO:.0f}",
        decided(not any(left for _, left in found.values())),
    )


def wall_hypothesis(records: Sequence[Record], config: Config) -> Hypothesis:
    """The usual float32 loss leaves at the wall."""
    texts, verdicts = [], []
    for training in config.trainings:
        reached = pick(records, "mean_log_odds", optimizer=training.optimizer, loss="float64").max(axis=1)
        if np.min(reached) < WALL:
            texts.append(f"{OPTIMIZERS[training.optimizer]} reaches {np.min(reached):.1f} only")
            continue
        stuck = pick(records, "no_gradient", optimizer=training.optimizer, loss="usual") == 1
        odds = pick(records, "least_log_odds", optimizer=training.optimizer, loss="usual")
        at = [float(o[np.argmax(s)]) if s.any() else math.nan for s, o in zip(stuck, odds, strict=True)]
        texts.append(f"{OPTIMIZERS[training.optimizer]} {min(at):.2f} to {max(at):.2f}")
        verdicts.append(all(abs(x - WALL) <= 1 for x in at))
    return Hypothesis(
        f"The usual float32 loss stops training where its gradient is 0 for every example: at log-odds of {WALL:.1f}.",
        "least log-odds of an example when no gradient is left: " + "; ".join(texts),
        f"a seed goes on training, or stops more than 1 from {WALL:.1f}",
        decided(all(verdicts)) if verdicts else "undecided",
    )


def spikes(records: Sequence[Record], config: Config, optimizer: str) -> dict[str, list[int]]:
    """Of each loss, the number of spikes of each seed."""
    return {name: [num_spikes(nll, config.log_every) for nll in pick(records, "nll", optimizer=optimizer, loss=name)]
            for name in LOSSES}  # fmt: skip


def spike_hypothesis(records: Sequence[Record], config: Config, optimizer: str) -> Hypothesis | None:
    """Whether the exact loss cures the spikes: expected without weight decay, and not expected with it."""
    if optimizer not in {training.optimizer for training in config.trainings}:
        return None
    counts = spikes(records, config, optimizer)
    usual_spikes, exact_spikes = sum(counts["usual"]), sum(counts["jprob"])
    measured_text = "; ".join(f"{LOSSES[name]}: {sum(c)}" for name, c in counts.items())
    if optimizer == "adam":
        claim = "Under Adam without weight decay the usual loss spikes and the exact one does not."
        rule, verdict = "the exact loss spikes, or the usual one does not", decided(usual_spikes > 0 == exact_spikes)
    else:
        claim = "Under AdamW with weight decay the exact loss spikes too: there the rounding is not the cause."
        rule, verdict = "the exact loss does not spike", decided(exact_spikes > 0)
    return Hypothesis(claim, f"spikes of {config.seeds} seeds together: {measured_text}", rule, verdict)


def generalisation_hypothesis(records: Sequence[Record], config: Config) -> Hypothesis:
    """Whether a training that goes on generalises better."""
    texts, better = [], []
    for training in config.trainings:
        last = {name: pick(records, "test_accuracy", optimizer=training.optimizer, loss=name)[:, -1] for name in LOSSES}
        gaps = last["jprob"] - last["usual"]
        text = f"{OPTIMIZERS[training.optimizer]} {gaps.mean():+.1f}"
        if gaps.size > 2 and np.ptp(gaps) > 0:
            low, high = stats.bca_interval(gaps)
            text += f" [{low:+.1f}, {high:+.1f}]"
            better.append(low > 0)
        texts.append(text)
    return Hypothesis(
        "The exact loss generalises better at the end, under one optimizer at least.",
        "test accuracy, jprob less usual, in points: " + "; ".join(texts),
        "no optimizer has an interval above 0",
        decided(any(better)) if better else "undecided",
    )


def figure(records: Sequence[Record], config: Config) -> Plot:
    """Nll and log-odds against the step."""
    made, axes = plots.figure(columns=len(config.trainings), rows=2, width=3.2 * len(config.trainings) + 0.6, height=5)
    steps = np.arange(config.num_steps // config.log_every + 1) * config.log_every
    for column, training in enumerate(config.trainings):
        top, bottom = axes[column], axes[len(config.trainings) + column]
        for name, label in LOSSES.items():
            line = {"color": COLOURS[name], "linestyle": "--" if name == "float64" else "-", "linewidth": 1.2}
            cell = {"optimizer": training.optimizer, "loss": name}
            top.plot(steps, np.median(np.maximum(pick(records, "nll", **cell), 1e-40), axis=0), label=label, **line)
            bottom.plot(steps, np.median(pick(records, "mean_log_odds", **cell), axis=0), **line)
        top.set(title=OPTIMIZERS[training.optimizer], yscale="log", ylabel="training nll" if not column else "")
        bottom.axhline(WALL, **plots.THEORY)
        bottom.set(xlabel="step", ylabel="mean log-odds" if not column else "")
    axes[0].legend()
    return Plot(
        made,
        "Training nll, computed exactly, and mean log-odds of the training examples against the step; medians of the "
        f"seeds. The dashed line is 24 ln 2 = {WALL:.1f}, at which the usual float32 gradient is 0.",
    )


def table(records: Sequence[Record], config: Config) -> Table:
    """The end of each training."""
    header = ["optimizer", "loss", "nll", "its own loss", "least log-odds", "no gradient", "sum over classes",
              "weight mean", "cosine", "spikes", "skipped", "test accuracy"]  # fmt: skip
    rows = []
    for training in config.trainings:
        counts = spikes(records, config, training.optimizer)
        for name, label in LOSSES.items():
            cell = {"optimizer": training.optimizer, "loss": name}
            last = {key: pick(records, key, **cell)[:, -1] for key in records[0].values}
            class_sum = pick(records, "class_sum", **cell).max()
            rows.append([
                OPTIMIZERS[training.optimizer], label, f"{np.median(last['nll']):.1e}",
                f"{np.median(last['own_loss']):.1e}", f"{np.median(last['least_log_odds']):.1f}",
                f"{100 * np.median(last['no_gradient']):.0f} %", f"{class_sum:.0e}",
                f"{np.median(last['weight_mean']):.2f}", f"{np.median(last['cosine']):.2f}", f"{sum(counts[name])}",
                f"{np.sum(last['skipped']):.0f}", f"{np.mean(last['test_accuracy']):.1f}",
            ])  # fmt: skip
    return Table(
        "Medians of the seeds after the last step (spikes and skipped steps are sums, test accuracy is a mean). Sum "
        "over classes: the largest of a training, relative to the largest entry of the example's gradient.",
        header,
        rows,
    )


def report(config: Config, records: Sequence[Record]) -> Section:
    """Verdicts in the order of the question: is it exact, where is the wall, are there spikes, does it matter."""
    hypotheses = [exact_hypothesis(records, config), wall_hypothesis(records, config),
                  spike_hypothesis(records, config, "adam"), spike_hypothesis(records, config, "adamw"),
                  generalisation_hypothesis(records, config)]  # fmt: skip
    against = []
    for training in config.trainings:
        under = f"Under {OPTIMIZERS[training.optimizer]}"
        ends = {
            name: np.median(pick(records, "nll", optimizer=training.optimizer, loss=name)[:, -1]) for name in LOSSES
        }
        if ends["jprob"] >= ends["usual"]:
            against.append(f"{under} the exact loss ends with an nll of {ends['jprob']:.1e}, "
                           f"the usual one with {ends['usual']:.1e}.")  # fmt: skip
        odds = pick(records, "mean_log_odds", optimizer=training.optimizer, loss="float64")
        if np.max(odds) < WALL:
            against.append(f"{under} log-odds of {np.max(odds):.1f} are the highest reached: "
                           "the wall plays no part there.")  # fmt: skip
    return Section(
        "Does the rounding of the loss stop training?",
        __doc__.split("\n\n", 1)[1].split("\n\nSources")[0] if __doc__ else "",
        [figure(records, config)],
        [h for h in hypotheses if h is not None],
        [table(records, config)],
        against,
    )
