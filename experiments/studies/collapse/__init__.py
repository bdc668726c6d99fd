"""Collapse: does the rounding of the usual cross-entropy stop a training and make its loss spike?

A network learns a + b or a / b modulo p by full batches. It has two one-hot numbers as input, two layers of ReLU, and
p logits. A LayerNorm without parameters may stand before the logits. The training goes far beyond the step at which
every training example is right. The arms start from the same draws and differ in the loss alone:

    usual      logsumexp(z) - z_y in float32, by autodiff, as in optax and torch
    jprob      `categorical.cross_entropy` in float32
    float64    softplus(logsumexp_{j != y} z_j - z_y) on logits cast to float64, its gradient cast back to float32
    nudged     the float64 loss from output weights one bit larger: what rounding elsewhere does to a training
    usual16, jprob16    the two float32 losses on logits rounded to bfloat16
    smoothed    the usual loss with label smoothing of .1

The log-odds of an example are `log(p_y / (1 - p_y))`. Its negative log-likelihood (nll) is softplus of minus them.
Both are computed in float64 for every arm. The usual loss rounds 1 + e^-odds to 1 from log-odds of `24 ln 2 = 16.64`
on. Another count of roundings gives `23 ln 2 = 15.94`; bfloat16 has `8 ln 2 = 5.55`. The gradient of the true class is
then exactly 0. The sum of the gradient over the classes is no longer 0. Adam's second moment underflows if the square
of a gradient is below 2^-126. The gradient e^-odds is so small from log-odds of `63 ln 2 = 43.67` on.

Protocol: hypotheses, thresholds and the family of tests stand in the config. Learning rates are set there too and are
the same for all losses: nothing is selected. Every seed draws its own split and its own initial weights. Holm's
correction runs over the family; intervals of accuracies are those of resampled splits (Nadeau and Bengio, 2003).

Sources: Prieto et al. (2025), arXiv 2501.04697; Liu et al. (2026), arXiv 2605.06152; Chou (2025), Grokking Baseline
Revisited.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jax import Array

from experiments.config import split
from experiments.results import Progress, Record
from jprob import mle

from .losses import LABELS, LOSSES, gradients, log_odds
from .section import report
from .settings import Config, Training

__all__ = ["Config", "report", "run"]


def features(training: Training, params, pairs):
    """The inputs of the output layer. The product of two one-hot numbers with a kernel is a sum of two of its rows."""
    first = params["left"][pairs[:, 0]] + params["right"][pairs[:, 1]]
    last = jax.nn.relu(jax.nn.relu(first) @ params["hidden"])
    return jax.nn.standardize(last) if training.layer_norm else last


def answers(training: Training, pairs, p: int):
    """a + b or a / b modulo p, the class of each pair."""
    if training.operation == "division":
        inverses = np.array([0, *(pow(b, -1, p) for b in range(1, p))], np.int32)
        return pairs[:, 0] * jnp.asarray(inverses)[pairs[:, 1]] % p
    return (pairs[:, 0] + pairs[:, 1]) % p


def initial_params(config: Config, seed: int, loss: str) -> dict[str, np.ndarray]:
    """He initialisation, drawn on the host, so that every arm and device starts from the same numbers."""
    generator = np.random.Generator(np.random.PCG64(seed))
    p, h = config.modulus, config.hidden_units
    shapes = {"left": (p, h, 2 * p), "right": (p, h, 2 * p), "hidden": (h, h, h), "output": (h, p, h)}
    params = {name: (generator.normal(size=(rows, columns)) * np.sqrt(2 / fan_in)).astype(np.float32)
              for name, (rows, columns, fan_in) in shapes.items()}  # fmt: skip
    if loss == "nudged":
        params["output"] = np.nextafter(params["output"], np.float32(np.inf))
    return params


def all_pairs(config: Config, training: Training, seed: int) -> np.ndarray:
    """All pairs of numbers in the seed's order; the first `num_train` are trained on."""
    order = np.random.Generator(np.random.PCG64([seed, 1])).permutation(config.modulus**2)
    pairs = np.stack(np.divmod(order, config.modulus), axis=1).astype(np.int32)
    return pairs[pairs[:, 1] != 0] if training.operation == "division" else pairs


def optimizer_of(training: Training, b2: float) -> optax.GradientTransformation:
    """A direction, decoupled weight decay, and a rate."""
    direction = {
        "sgd": optax.identity,
        "adam": lambda: optax.scale_by_adam(b2=b2, eps=training.eps),
        "lion": optax.scale_by_lion,
    }[training.optimizer]()
    decay = optax.add_decayed_weights(training.weight_decay)
    return optax.chain(direction, decay, optax.scale_by_learning_rate(training.learning_rate))


def measured(training: Training, loss: str, state: mle.State, start, train, test) -> dict[str, Array]:
    """The numbers that are recorded at a moment of a training."""
    h, labels = features(training, state.params, train[0]), train[1]
    z = h @ state.params["output"]
    odds = log_odds(z, labels)
    right = jnp.argmax(features(training, state.params, test[0]) @ state.params["output"], axis=-1) == test[1]
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
    pairs = np.stack([all_pairs(config, training, seed) for seed in seeds])
    params = jax.tree.map(lambda *x: np.stack(x), *(initial_params(config, seed, loss) for seed in seeds))
    keys = jax.random.split(jax.random.key(0), config.seeds)

    def nll(params, batch, key):
        return LOSSES[loss](features(training, params, batch[0]) @ params["output"], batch[1])

    @jax.jit
    @jax.vmap
    def members(params, pairs, key):
        labels = answers(training, pairs, config.modulus)
        train, test = ((pairs[:count], labels[:count]), (pairs[count:], labels[count:]))

        def look_and_step(state, _):
            row = measured(training, loss, state, params, train, test)
            return mle.run(nll, optimizer, state, train, num_steps=config.log_every, batch_size=count)[0], row

        rows = config.num_steps // config.log_every + 1
        return jax.lax.scan(look_and_step, mle.init(params, optimizer, key), length=rows)[1]

    with jax.enable_x64(True):  # for all arms, so that they differ in nothing but the loss
        return {name: np.asarray(x, np.float64) for name, x in members(params, pairs, keys).items()}


def parts(config: Config) -> list[Config]:
    """Every optimizer is a part, with the comparisons that are its own."""
    families = [[each for each in config.family if each.training == training.name] for training in config.trainings]
    alone = [msgspec.structs.replace(config, family=[])] * len(families)
    cut = [split(each, "trainings")[i] for i, each in enumerate(alone)]
    return [msgspec.structs.replace(part, family=family) for part, family in zip(cut, families, strict=True)]


def run(config: Config) -> Iterator[Record | Progress]:
    """One record for each optimizer, loss and seed."""
    jobs = [(training, loss) for training in config.trainings for loss in training.losses]
    for done, (training, loss) in enumerate(jobs):
        yield Progress(done / len(jobs), f"{training.name}, {LABELS[loss]}")
        rows = train_all(config, training, loss)
        for i in range(config.seeds):
            settings = {"training": training.name, "loss": loss, "seed": config.first_seed + i}
            yield Record(settings, {name: x[i] for name, x in rows.items()})
