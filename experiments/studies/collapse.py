"""Collapse: does the rounding of the usual cross-entropy stop a training and make its loss spike?

A network learns addition modulo p (two one-hot numbers in, two layers of ReLU, p logits out) by full batches, far
beyond the step at which it is right about every training example. The arms start from the same draws and differ in the
loss alone:

    usual      logsumexp(z) - z_y in float32, by autodiff, as in optax and torch
    jprob      `categorical.cross_entropy` in float32
    float64    softplus(logsumexp_{j != y} z_j - z_y) on logits cast to float64, its gradient cast back to float32
    nudged     the float64 loss from output weights one bit larger: what rounding elsewhere does to a training
    usual16, jprob16    the two float32 losses on logits rounded to bfloat16

The log-odds of an example are log(p_y / (1 - p_y)), and its negative log-likelihood (nll) is softplus of minus them.
Both are computed in float64 for every arm. In the usual loss 1 + e^-odds rounds to 1 from log-odds of 24 ln 2 = 16.64
on (23 ln 2 = 15.94 by another count of roundings; 8 ln 2 = 5.55 in bfloat16). Then the gradient of the true class is
exactly 0, and the gradient no longer sums to 0 over the classes. Adam's second moment underflows if the square of a
gradient is below 2^-126, and e^-odds is from log-odds of 63 ln 2 = 43.67 on.

Protocol: hypotheses, thresholds and the family of tests stand in the config. Learning rates are set there too and are
the same for all losses: nothing is selected. Every seed draws its own split and its own initial weights. Holm's
correction runs over the family; intervals of accuracies are those of resampled splits (Nadeau and Bengio, 2003).

Sources: Prieto et al. (2025), arXiv 2501.04697; Liu et al. (2026), arXiv 2605.06152; Chou (2025), Grokking Baseline
Revisited.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Float64, Int

from experiments import plots, stats
from experiments.config import distinct, split
from experiments.findings import Hypothesis, Plot, Section, Table, decided
from experiments.results import Progress, Record
from jprob import categorical, mle

LABELS = {"usual": "usual float32", "jprob": "jprob float32", "float64": "float64", "nudged": "float64, nudged",
          "usual16": "usual, bfloat16 logits", "jprob16": "jprob, bfloat16 logits"}  # fmt: skip
COLOURS = dict(zip(LABELS, (plots.PALETTE[i] for i in (1, 0, 4, 5, 2, 3)), strict=True))
BITS = {"usual": 24, "usual16": 8}  # of the significand
MOMENT = 63 * math.log(2)  # log-odds from which e^-2 odds underflows float32
HALF_SPACING = 2.0**-24

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=30)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
LossName = Literal["usual", "jprob", "float64", "nudged", "usual16", "jprob16"]


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An optimizer that trains several losses. Weight decay is decoupled; SGD and Lion have no eps."""

    name: Name
    optimizer: Literal["sgd", "adam", "lion"]
    learning_rate: Positive
    weight_decay: NotNegative
    eps: NotNegative
    losses: Annotated[list[LossName], msgspec.Meta(min_length=3, max_length=6)]

    def __post_init__(self):
        distinct(self, "losses")
        if missing := {"usual", "jprob", "float64"} - set(self.losses):
            raise ValueError(f"losses: expected usual, jprob and float64 among them, got none of {sorted(missing)}")


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The thresholds of the verdicts: relative ones of the nll, others in log-odds, steps or points of accuracy."""

    agreement: Positive  # two trainings agree while the nll of one is so close to that of the other
    exact_to: Positive  # log-odds up to which jprob has to agree with float64
    wall_tolerance: Positive  # log-odds
    moment_tolerance: Positive  # log-odds
    spike_rise: Positive  # a spike is a rise of the nll by this factor ...
    spike_window: Count  # ... within so many steps
    spikes_below: Positive  # log-odds; above them Adam may fail for reasons that are not the loss's
    same_accuracy: Positive  # points
    alpha: Positive


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A paired test of the usual loss against jprob's; Holm's family is the list of them."""

    measure: Literal["spikes", "accuracy"]
    training: Name


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One training for each loss, optimizer and seed."""

    modulus: Annotated[int, msgspec.Meta(ge=3, le=200)]
    train_share: Annotated[float, msgspec.Meta(ge=0.1, le=0.9)]
    hidden_units: Count
    adam_b2: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    num_steps: Count
    log_every: Count
    first_seed: Annotated[int, msgspec.Meta(ge=0)]
    seeds: Annotated[int, msgspec.Meta(ge=2, le=100)]
    trainings: Annotated[list[Training], msgspec.Meta(min_length=1, max_length=9)]
    rules: Rules
    family: list[Comparison]

    def __post_init__(self):
        distinct(self, "family")
        names = [training.name for training in self.trainings]
        if len(set(names)) < len(names):
            raise ValueError(f"trainings: expected distinct names, got {names}")
        if self.rules.spike_window % self.log_every or self.num_steps % self.log_every:
            raise ValueError(f"log_every: expected a divisor of spike_window and num_steps, got {self.log_every}")

    @property
    def num_train(self) -> int:
        """How many pairs are trained on."""
        return round(self.train_share * self.modulus**2)


def usual(z: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
    """The form of optax and torch, in the dtype of the logits."""
    return jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0]


def log_odds(z: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float64[Array, " n"]:
    """log(p_y / (1 - p_y)) = z_y - logsumexp of the others, in float64: nothing cancels but the logits themselves."""
    z = z.astype(jnp.float64)
    own = jnp.arange(z.shape[-1])[None] == labels[:, None]
    others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, z), axis=-1)
    return jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0] - others


def exact(z: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float64[Array, " n"]:
    """The cross-entropy in float64, without jprob."""
    return jax.nn.softplus(-log_odds(z, labels))


LOSSES: dict[str, Callable[..., Array]] = {
    "usual": usual,
    "jprob": categorical.cross_entropy,
    "float64": exact,
    "nudged": exact,
    "usual16": lambda z, labels: usual(z.astype(jnp.bfloat16), labels),
    "jprob16": lambda z, labels: categorical.cross_entropy(z.astype(jnp.bfloat16), labels),
}


def features(params, pairs):
    """The last hidden layer. The product of two one-hot numbers with a kernel is a sum of two of its rows."""
    first = params["left"][pairs[:, 0]] + params["right"][pairs[:, 1]]
    return jax.nn.relu(jax.nn.relu(first) @ params["hidden"])


def initial_params(config: Config, seed: int, loss: str) -> dict[str, np.ndarray]:
    """He initialisation, drawn on the host, so that every arm and device starts from the same numbers."""
    generator = np.random.Generator(np.random.PCG64(seed))
    p, h = config.modulus, config.hidden_units
    shapes = {"left": (p, h, 2 * p), "right": (p, h, 2 * p), "hidden": (h, h, h), "output": (h, p, h)}
    params = {name: np.float32(generator.normal(size=(rows, columns)) * np.sqrt(2 / fan_in))
              for name, (rows, columns, fan_in) in shapes.items()}  # fmt: skip
    if loss == "nudged":
        params["output"] = np.nextafter(params["output"], np.float32(np.inf))
    return params


def all_pairs(config: Config, seed: int) -> np.ndarray:
    """All pairs of numbers in the seed's order; the first `num_train` are trained on."""
    order = np.random.Generator(np.random.PCG64([seed, 1])).permutation(config.modulus**2)
    return np.stack(np.divmod(order, config.modulus), axis=1).astype(np.int32)


def optimizer_of(training: Training, b2: float) -> optax.GradientTransformation:
    """A direction, decoupled weight decay, and a rate."""
    direction = {
        "sgd": optax.identity,
        "adam": lambda: optax.scale_by_adam(b2=b2, eps=training.eps),
        "lion": optax.scale_by_lion,
    }[training.optimizer]()
    decay = optax.add_decayed_weights(training.weight_decay)
    return optax.chain(direction, decay, optax.scale_by_learning_rate(training.learning_rate))


def gradients(loss: str, z: Float[Array, "n k"], labels: Int[Array, " n"]) -> dict[str, Array]:
    """How the arm's gradient in these logits differs from that of float64."""
    got = jax.grad(lambda z: jnp.sum(LOSSES[loss](z, labels)))(z).astype(jnp.float64)
    want = jax.grad(lambda z: jnp.sum(exact(z, labels)))(z.astype(jnp.float64))
    size, odds = jnp.max(jnp.abs(want), axis=-1), log_odds(z, labels)
    bound = (16 + jnp.max(z, axis=-1) - jnp.min(z, axis=-1)) * HALF_SPACING
    off = jnp.max(jnp.abs(got - want), axis=-1) / (size * bound)
    dead = jnp.take_along_axis(got, labels[:, None], axis=-1)[:, 0] == 0
    normal = size > 2.0**-120  # smaller ones, or their parts, may be flushed to 0
    largest = jnp.max(jnp.abs(got), axis=-1)
    return {
        "error": jnp.max(jnp.where(normal, off, 0)),
        "dead": jnp.mean(dead & normal),
        "lowest_dead": jnp.min(jnp.where(dead & normal, odds, jnp.inf)),
        "highest_live": jnp.max(jnp.where(dead, -jnp.inf, odds)),
        "class_sum": jnp.max(jnp.abs(jnp.sum(got, axis=-1)) / jnp.where(largest > 0, largest, 1)),
    }


def measured(loss: str, state: mle.State, start, train, test) -> dict[str, Array]:
    """What is written down of a moment in a training."""
    h, labels = features(state.params, train[0]), train[1]
    z = h @ state.params["output"]
    odds = log_odds(z, labels)
    right = jnp.argmax(features(state.params, test[0]) @ state.params["output"], axis=-1) == test[1]
    weight_mean, feature_mean = jnp.mean(state.params["output"], axis=1), jnp.mean(h, axis=0)
    norms = jnp.linalg.norm(weight_mean), jnp.linalg.norm(feature_mean)
    first, second = (optax.tree.get(state.optimizer_state, name, default=()) for name in ("mu", "nu"))
    lost = jax.tree.leaves(jax.tree.map(lambda m, v: jnp.sum((v == 0) & (m != 0)), first, second)) if second else []
    return gradients(loss, z, labels) | {
        "nll": jnp.mean(jax.nn.softplus(-odds)),
        "own_loss": jnp.mean(LOSSES[loss](z, labels)),
        "log_odds": jnp.mean(odds),
        "weight_mean": norms[0],
        "weight_mean_moved": jnp.linalg.norm(weight_mean - jnp.mean(start["output"], axis=1)),
        "feature_mean": norms[1],
        "cosine": jnp.dot(weight_mean, feature_mean) / jnp.maximum(norms[0] * norms[1], 1e-30),
        "accuracy": 100 * jnp.mean(right),
        "no_moment": jnp.sum(jnp.array(lost)) if lost else jnp.zeros(()),
        "skipped": state.skipped,
    }


def train_all(config: Config, training: Training, loss: str) -> dict[str, np.ndarray]:
    """All seeds at once: [seeds, measurements], the first before the first step."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    optimizer, count = optimizer_of(training, config.adam_b2), config.num_train
    pairs = np.stack([all_pairs(config, seed) for seed in seeds])
    params = jax.tree.map(lambda *x: np.stack(x), *(initial_params(config, seed, loss) for seed in seeds))
    keys = jax.random.split(jax.random.key(0), config.seeds)

    def nll(params, batch, key):
        return LOSSES[loss](features(params, batch[0]) @ params["output"], batch[1])

    @jax.jit
    @jax.vmap
    def members(params, pairs, key):
        labels = (pairs[:, 0] + pairs[:, 1]) % config.modulus
        train, test = ((pairs[:count], labels[:count]), (pairs[count:], labels[count:]))

        def look_and_step(state, _):
            row = measured(loss, state, params, train, test)
            return mle.run(nll, optimizer, state, train, num_steps=config.log_every, batch_size=count)[0], row

        rows = config.num_steps // config.log_every + 1
        return jax.lax.scan(look_and_step, mle.init(params, optimizer, key), length=rows)[1]

    with jax.enable_x64(True):  # for all arms, so that they differ in nothing but the loss
        return {name: np.asarray(x, np.float64) for name, x in members(params, pairs, keys).items()}


def parts(config: Config) -> list[Config]:
    """Every optimizer is a part."""
    return split(config, "trainings")


def run(config: Config) -> Iterator[Record | Progress]:
    """One record for each optimizer, loss and seed."""
    jobs = [(training, loss) for training in config.trainings for loss in training.losses]
    for done, (training, loss) in enumerate(jobs):
        yield Progress(done / len(jobs), f"{training.name}, {LABELS[loss]}")
        rows = train_all(config, training, loss)
        for i in range(config.seeds):
            settings = {"training": training.name, "loss": loss, "seed": config.first_seed + i}
            yield Record(settings, {name: x[i] for name, x in rows.items()})
