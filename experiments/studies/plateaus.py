"""Plateaus: how much of the loss surface is flat under each loss, in slices through two weights.

A network has one layer of tanh and a softmax. Two of its weights vary, one of each layer, and all others stay. The
loss over these two is a surface. Glorot and Bengio showed one such surface: that of squared error has more plateaus
than that of cross-entropy. Here many are drawn.

The two losses have different scales. So each surface is divided by its range in the slice. The gradient at a point is
multiplied by the width of the slice: the change of the loss, if it kept that gradient. The point is flat if this change
is below a share of the range.

Every draw has its own inputs, labels, weights and pair of weights, the same for both losses.

Source: Glorot and Bengio (2010), Understanding the difficulty of training deep feedforward neural networks, figure 5.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import binomtest

from experiments import arms, plots, stats
from experiments.arms import SOFTMAX_CE, SOFTMAX_SE
from experiments.findings import GRADIENT, Hypothesis, Plot, Section, Table, Tier
from experiments.results import Progress, Record, Setting

ARMS = (SOFTMAX_CE, SOFTMAX_SE)
SHARE = 0.8  # of the draws, in which cross-entropy has to have the smaller flat area
SEED = 70_000

Count = Annotated[int, msgspec.Meta(ge=2, le=1000)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Each slice is a square of `points` x `points` points, from -reach to reach. Flat is below each of the shares."""

    draws: Annotated[int, msgspec.Meta(ge=10, le=10_000)]
    num_features: Count
    hidden_units: Count
    num_classes: Count
    examples: Count
    reach: Annotated[float, msgspec.Meta(gt=0, le=100)]
    points: Count
    flat_below: Annotated[list[Annotated[float, msgspec.Meta(gt=0, lt=1)]], msgspec.Meta(min_length=1, max_length=6)]


@partial(jax.jit, static_argnames=("arm", "points"))
def surface(arm: str, network: dict[str, Array], reach: Float[Array, ""], points: int) -> tuple[Array, Array]:
    """Loss [points, points] over the slice, and the norm of its gradient there. The first weight of each layer varies.

    The units of a layer are exchangeable. So the first weight is as good as any other.
    """
    axis = jnp.linspace(-reach, reach, points)

    def loss(pair):
        first, second = (network[name].at[0, 0].set(pair[i]) for i, name in enumerate(("first", "second")))
        z = jnp.tanh(network["x"] @ first) @ second
        return jnp.mean(arms.loss(arm, z, network["labels"]))

    grid = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    value, gradient = jax.vmap(jax.value_and_grad(loss))(grid)
    return value.reshape(points, points), jnp.linalg.norm(gradient, axis=-1).reshape(points, points)


def drawn(config: Config, draw: int) -> dict[str, np.ndarray]:
    """The network, inputs and labels of a draw."""
    rng = np.random.default_rng([SEED, draw])
    sizes = {"x": (config.examples, config.num_features), "first": (config.num_features, config.hidden_units),
             "second": (config.hidden_units, config.num_classes)}  # fmt: skip
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in sizes.items()}
    return arrays | {"labels": rng.integers(config.num_classes, size=config.examples).astype(np.int32)}


def flat_shares(config: Config, value: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """The share of the area that is flat, for each threshold."""
    change = norm * 2 * config.reach / np.ptp(value)
    return np.array([np.mean(change < below) for below in config.flat_below])


def tier(config: Config, settings: Mapping[str, Setting], value: str) -> Tier | None:
    """Surfaces are functions. The flat shares count points, and one may lie at the threshold."""
    return GRADIENT if value in ("surface", "range") else None


def run(config: Config) -> Iterator[Record | Progress]:
    """For each loss: the flat shares of all draws by threshold, and the surface of the first draw."""
    networks = [drawn(config, draw) for draw in range(config.draws)]
    for done, arm in enumerate(ARMS):
        yield Progress(done / len(ARMS), f"{arm}, {config.draws} slices")
        found = [tuple(map(np.asarray, surface(arm, n, jnp.float32(config.reach), config.points))) for n in networks]
        shares = np.array([flat_shares(config, *each) for each in found])
        for i, below in enumerate(config.flat_below):
            yield Record({"part": "flat", "arm": arm, "below": below}, {"share": shares[:, i]})
        yield Record({"part": "surface", "arm": arm}, {"surface": found[0][0].ravel()})


Flat = dict[tuple[str, float], np.ndarray]  # (arm, threshold) -> flat share of every draw


def hypothesis(config: Config, flat: Flat) -> Hypothesis:
    """Cross-entropy has the smaller flat area in most draws."""
    below = config.flat_below[0]
    less = {b: flat[SOFTMAX_SE, b] - flat[SOFTMAX_CE, b] for b in config.flat_below}
    won = int(np.sum(less[below] > 0))
    low, high = binomtest(won, config.draws).proportion_ci()
    gain = stats.bca_interval(100 * less[below])
    others = [f"With the threshold at {b:.0%}, the share is {np.mean(less[b] > 0):.0%}." for b in config.flat_below[1:]]
    return Hypothesis(
        "The surface of squared error has more plateaus: its flat area is the larger one in at least "
        f"{SHARE:.0%} of random slices.",
        f"larger in {won} of {config.draws} slices, {won / config.draws:.0%} [{low:.0%}, {high:.0%}]; flat area of "
        + ", ".join(f"{arm} {flat[arm, below].mean():.0%}" for arm in ARMS)
        + f", difference {100 * less[below].mean():.1f} [{gain.low:.1f}, {gain.high:.1f}] points",
        f"the 95 % interval of the share lies below {SHARE:.0%}; undecided while it holds {SHARE:.0%}",
        "holds" if low >= SHARE else "falsified" if high < SHARE else "undecided",
        [
            *others,
            f"In {int(np.sum(less[below] < 0))} slices the flat area of cross-entropy is the larger one.",
        ],
    )


def figure(config: Config, surfaces: dict[str, np.ndarray], flat: Flat) -> Plot:
    """The surface of the first draw under both losses, and the flat areas of all."""
    made, axes = plots.figure(columns=3, height=3.2)
    axis = np.linspace(-config.reach, config.reach, config.points)
    for panel, arm in zip(axes[:2], ARMS, strict=True):
        value = (surfaces[arm] - surfaces[arm].min()) / np.ptp(surfaces[arm])
        panel.contourf(axis, axis, value.T, levels=np.linspace(0, 1, 11), cmap="Blues")
        panel.contour(axis, axis, value.T, levels=np.linspace(0, 1, 11), colors="white", linewidths=0.4)
        panel.set(title=arm, xlabel="weight of the first layer")
        panel.grid(visible=False)
    axes[0].set_ylabel("weight of the second layer")
    below = config.flat_below[0]
    pair = [100 * flat[arm, below] for arm in ARMS]
    axes[2].plot(*pair, ".", color=plots.PALETTE[2])
    most = max(1.0, *(area.max() for area in pair))
    axes[2].plot([0, most], [0, most], **plots.THEORY)
    axes[2].set(title="flat area (%)", xlabel=SOFTMAX_CE, ylabel=SOFTMAX_SE)
    return Plot(
        made,
        "Left and middle: the first draw, each loss from its least value (light) to its largest (dark), in ten steps. "
        "Right: the flat areas of every draw. Dashed: equal areas.",
    )


def table(config: Config, flat: Flat) -> Table:
    """Flat areas by threshold."""
    rows = [
        [f"{below:.0%}", *(f"{100 * flat[arm, below].mean():.1f}" for arm in ARMS),
         f"{np.mean(flat[SOFTMAX_SE, below] > flat[SOFTMAX_CE, below]):.0%}"]
        for below in config.flat_below
    ]  # fmt: skip
    header = ["flat below", *(f"{arm} (%)" for arm in ARMS), "larger under squared error"]
    return Table("Mean flat area by threshold, and the share of slices where squared error has more.", header, rows)


def report(config: Config, records: Sequence[Record]) -> Section:
    """Which surface has more plateaus."""
    flat: Flat = {(str(s["arm"]), float(s["below"])): np.asarray(v["share"]) for s, v in records if s["part"] == "flat"}
    surfaces = {
        str(s["arm"]): np.asarray(v["surface"]).reshape(config.points, config.points)
        for s, v in records
        if s["part"] == "surface"
    }
    below = config.flat_below[0]
    text = (
        f"A network with {config.hidden_units} units of tanh classifies {config.examples} random inputs into "
        f"{config.num_classes} random classes. Two of its weights vary from {-config.reach:g} to {config.reach:g}, one "
        "of each layer. Each loss is divided by its range in the slice.\n\n"
        f"A point is flat if its gradient, kept up over the width of the slice, changes the loss by less than "
        f"{below:.0%} of the range."
    )
    ce, se = (flat[arm, below].mean() for arm in ARMS)
    abstract = [
        f"In slices through two weights {se:.0%} of the surface of squared error is flat, and {ce:.0%} of that of "
        "cross-entropy."
    ]
    figures = [figure(config, surfaces, flat)]
    return Section("Plateaus", abstract, text, figures, [hypothesis(config, flat)], [table(config, flat)])
