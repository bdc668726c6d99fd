"""Initialisation: the variance of pre-activations and of gradients through a deep network, before any training.

The network has n units a layer and no biases, and inputs of n0 features with mean square 1. s^2 is the variance of a
weight, f the activation function, z a standard Gaussian. Pre-activations of a wide network are Gaussian with variance
q. Gradients in them have variance g, from cotangents of variance 1 at the last layer:

    q[1] = n0 s[1]^2        q[l + 1] = n s^2 E[f(sqrt(q[l]) z)^2]        g[l] = n s^2 E[f'(sqrt(q[l]) z)^2] g[l + 1]

ReLU has E[f^2] = q / 2 and E[f'^2] = 1/2. Glorot's n s^2 is 1 and halves both a layer; He's is 2 and keeps both. A
normalisation divides pre-activations by their standard deviation d. So q is 1, and g gets a factor 1 / d^2:

    layer normalisation (over units)       d^2 = n s^2 E[f(z)^2]
    batch normalisation (over examples)    d^2 = n s^2 (E[f(z)^2] - E[f(z)]^2)

So s cancels. Gradients grow by E[f'^2] / Var[f] a layer under batch normalisation: by pi / (pi - 1) for ReLU.

Chance moves a mean square of n units. Its relative variance P grows by P[l + 1] = c^2 P[l] + k / n, to first order. k
is E[f^4] / E[f^2]^2 - 1, and c the exponent of q in E[f^2]. The spread of gradients follows alike.

Sources: Glorot and Bengio (2010), AISTATS; He et al. (2015), ICCV; Poole et al. (2016), NeurIPS; Yang et al. (2019), A
Mean Field Theory of Batch Normalization, ICLR.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float, Float64, Int
from matplotlib.ticker import MaxNLocator

from experiments import data, plots
from experiments.config import distinct
from experiments.findings import Hypothesis, Plot, Section, Table, decided
from experiments.results import Progress, Record
from jprob import categorical

STANDARD_ERRORS = 4.0
HALVING_TOLERANCE, RATE_TOLERANCE, SPREAD_ALLOWED = 0.1, 0.05, 1.05
VANISHED = 1e-6
SEED = 32_000
ACTIVATIONS = {"tanh": jnp.tanh, "ReLU": jax.nn.relu}
DERIVATIVES = {"tanh": lambda y: 1 - np.tanh(y) ** 2, "ReLU": lambda y: (y > 0).astype(float)}
AXES = {"none": None, "batch": 0, "layer": -1}  # that the normalisation takes its mean over
GLOROT, HE = "Glorot", "He"
# An even number of points leaves out 0, ReLU's kink. Gauss-Hermite nodes would converge slowly because of it.
GRID = np.linspace(-9, 9, 20_000)
DENSITY = np.exp(-(GRID**2) / 2) / np.exp(-(GRID**2) / 2).sum()

Std = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Glorot, He and normal weights of each standard deviation, each in networks of all activations and norms."""

    width: Annotated[int, msgspec.Meta(ge=8, le=4096)]
    depth: Annotated[int, msgspec.Meta(ge=3, le=100)]
    examples: Annotated[int, msgspec.Meta(ge=8, le=1024)]
    stds: Annotated[list[Std], msgspec.Meta(min_length=1, max_length=3)]
    seeds: Annotated[int, msgspec.Meta(ge=2, le=1000)]

    def __post_init__(self):
        distinct(self, "stds")

    @property
    def inits(self) -> list[str]:
        """Names of the initialisations."""
        return [GLOROT, HE, *(f"std {std:g}" for std in self.stds)]


def initializer(init: str) -> jax.nn.initializers.Initializer:
    """The initialisation of that name."""
    named = {GLOROT: jax.nn.initializers.glorot_normal, HE: jax.nn.initializers.he_normal}
    return named[init]() if init in named else jax.nn.initializers.normal(float(init.split()[1]))


def gain(init: str, fan_in: int, fan_out: int) -> float:
    """fan_in s^2."""
    given = {GLOROT: 2 * fan_in / (fan_in + fan_out), HE: 2.0}
    return given[init] if init in given else fan_in * float(init.split()[1]) ** 2


# ---- Theory


class Curves(NamedTuple):
    """Variances by layer, and how far the mean over seeds may be off, relative to them."""

    forward: Float64[np.ndarray, " depth"]
    gradient: Float64[np.ndarray, " depth"]
    forward_tolerance: Float64[np.ndarray, " depth"]
    gradient_tolerance: Float64[np.ndarray, " depth"]


def expect(values: np.ndarray) -> float:
    """The mean of values at the points of the grid under a standard Gaussian."""
    return float(np.sum(DENSITY * values))


@lru_cache(maxsize=10_000)
def squares(activation: str, q: float) -> tuple[float, float, float, float]:
    """E[f^2], E[f'^2] and the fourth moments over their squares, E[f^4] / E[f^2]^2 and E[f'^4] / E[f'^2]^2."""
    y = np.sqrt(q) * GRID
    f, derivative = (np.tanh(y) if activation == "tanh" else np.maximum(y, 0)), DERIVATIVES[activation](y)
    second, slant = expect(f**2), expect(derivative**2)
    return second, slant, expect(f**4) / second**2, expect(derivative**4) / slant**2


def growth(activation: str, norm: str) -> float:
    """Factor of the gradient's variance from a layer to the one below it, under a normalisation."""
    second, slant, *_ = squares(activation, 1.0)
    f = np.tanh(GRID) if activation == "tanh" else np.maximum(GRID, 0)
    return slant / (second - (expect(f) ** 2 if norm == "batch" else 0))


def theory(config: Config, activation: str, norm: str, init: str, num_features: int) -> Curves:
    """The recursions, with the tolerances of networks without normalisation."""
    depth, n, each = config.depth, config.width, gain(init, config.width, config.width)
    if norm != "none":
        ones = np.ones(depth)
        return Curves(ones, growth(activation, norm) ** np.arange(depth - 1.0, -1, -1), ones * np.inf, ones * np.inf)
    q, p, factor, back, bend, couple = np.zeros((6, depth))
    q[0] = gain(init, num_features, n)
    for layer in range(depth):
        second, slant, fourth, slant4 = squares(activation, q[layer])
        moved = squares(activation, q[layer] * np.exp(1e-3))
        c = np.log(moved[0] / second) / 1e-3  # exponents of q in both moments
        factor[layer], back[layer] = each * slant, (3 * slant4 - 1) / n
        couple[layer] = abs(np.log(moved[1] / slant) / 1e-3) * np.sqrt(p[layer])
        if layer + 1 < depth:
            q[layer + 1], p[layer + 1] = each * second, c**2 * p[layer] + (fourth - 1) / n
            bend[layer + 1] = bend[layer] + (1 - c) * p[layer] / 2  # a concave recursion of a random q
    factor[-1], back[-1], couple[-1] = 1, 2 / n, 0
    g, spread, coupled = (np.cumsum(x[::-1])[::-1] for x in (np.log(factor), back, couple))
    errors = STANDARD_ERRORS / np.sqrt(config.seeds)
    forward = errors * np.sqrt(np.expm1(p + 2 / n)) + bend
    return Curves(q, np.exp(g), forward, errors * (np.sqrt(np.expm1(spread)) + coupled) + coupled**2)


# ---- Measurement


def draw(init: str, key: Array, sizes: tuple[int, int, int, int]) -> tuple[Array, Array, Array]:
    """Weights of the first layer, of all hidden ones and of the output."""
    num_features, width, depth, num_classes = sizes
    keys, make = jax.random.split(key, depth + 1), initializer(init)
    hidden = jnp.stack([make(key, (width, width), jnp.float32) for key in keys[2:]])
    return make(keys[0], (num_features, width), jnp.float32), hidden, make(keys[1], (width, num_classes), jnp.float32)


def log_mean_square(x: Float[Array, "depth b n"]) -> Float[Array, " depth"]:
    """By layer. The largest entry is taken out, since squares of 1e-20 leave float32."""
    largest = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)
    scaled = x / jnp.where(largest > 0, largest, 1)
    return 2 * jnp.log(largest[:, 0, 0]) + jnp.log(jnp.mean(jnp.square(scaled), axis=(1, 2)))


@jax.jit
def measure(
    params: tuple[Array, Array, Array],
    x: Float[Array, "b f"],
    labels: Int[Array, " b"],
    cotangent: Float[Array, "b n"],
    activation: Int[Array, ""],
    norm: Int[Array, ""],
) -> dict[str, Array]:
    """Logarithms of mean squares by layer: of what enters the activation function, and of gradients in it.

    Activation and normalisation are numbers in ACTIVATIONS and AXES, so that one program serves all.
    """

    def f(y):
        return jax.lax.switch(activation, list(ACTIVATIONS.values()), y)

    def normalised(h):
        kinds = [partial(jax.nn.standardize, axis=axis) if axis is not None else jnp.copy for axis in AXES.values()]
        return jax.lax.switch(norm, kinds, h)

    def outputs(probes):  # zeros added to the pre-activations: a gradient in them is one in the pre-activations
        first, hidden, last = params

        def layer(below, weights_and_probe):
            above = normalised(f(below) @ weights_and_probe[0]) + weights_and_probe[1]
            return above, above

        start = normalised(x @ first) + probes[0]
        top, rest = jax.lax.scan(layer, start, (hidden, probes[1:]))
        logits = f(top) @ last
        losses = categorical.cross_entropy(logits, labels), categorical.brier_score(logits, labels) / 2
        sums = jnp.stack([jnp.sum(cotangent * top), *(jnp.sum(loss) for loss in losses)])
        return sums, jnp.concatenate([start[None], rest])

    probes = jnp.zeros((len(params[1]) + 1, *cotangent.shape))
    gradients, values = jax.jacrev(outputs, has_aux=True)(probes)
    forward = log_mean_square(values)
    scaled = values / jnp.exp(forward / 2)[:, None, None]
    named = zip(("gradient", "cross-entropy", "squared error"), jax.vmap(log_mean_square)(gradients), strict=True)
    return {"forward": forward, "kurtosis": jnp.mean(scaled**4, axis=(1, 2)) - 3, **dict(named)}


def run(config: Config) -> Iterator[Record | Progress]:
    """One record for each initialisation, activation and normalisation: means over seeds, by layer."""
    digits = data.load("digits")
    features, labels = np.asarray(digits.train.features, np.float64), digits.train.labels
    features = (features - features.mean(axis=1, keepdims=True)) / features.std(axis=1, keepdims=True)
    sizes = features.shape[1], config.width, config.depth, digits.num_classes
    cells = [(activation, norm) for activation in ACTIVATIONS for norm in AXES]
    for i, init in enumerate(config.inits):
        found: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {cell: [] for cell in cells}
        for seed in range(config.seeds):
            yield Progress((i + seed / config.seeds) / len(config.inits), f"{init}, seed {seed}")
            rng = np.random.default_rng([SEED, seed])
            chosen = rng.choice(len(labels), config.examples, replace=False)
            cotangent = rng.normal(size=(config.examples, config.width)).astype(np.float32)
            params = draw(init, jax.random.key(SEED + seed), sizes)
            examples = features[chosen].astype(np.float32), labels[chosen], cotangent
            for activation, norm in cells:
                kind = np.int32(list(ACTIVATIONS).index(activation)), np.int32(list(AXES).index(norm))
                logs = jax.tree.map(lambda x: np.asarray(x, np.float64), measure(params, *examples, *kind))
                found[activation, norm].append({k: v if k == "kurtosis" else np.exp(v) for k, v in logs.items()})
        for (activation, norm), each in found.items():
            values = jax.tree.map(lambda *x: np.mean(x, axis=0), *each)
            settings = {"init": init, "activation": activation, "norm": norm, "features": features.shape[1]}
            yield Record(settings, values)


# ---- Report

Cells = dict[tuple[str, str, str], tuple[dict[str, np.ndarray], Curves]]  # (activation, norm, init) -> got, theory


def per_layer(curve: np.ndarray) -> float:
    """The mean factor from a layer to the next."""
    return float((curve[-1] / curve[0]) ** (1 / (len(curve) - 1)))


def recursion_hypothesis(config: Config, cells: Cells) -> Hypothesis:
    """Variances follow the recursions of a wide network."""
    excess, told = 0.0, []
    for part in ("forward", "gradient"):
        worst = (0.0, 0.0, 1.0, "")
        for (activation, norm, init), (got, want) in cells.items():
            if norm == "none":
                off = np.abs(got[part] / getattr(want, part) - 1)
                allowed = getattr(want, f"{part}_tolerance")
                layer = int(np.argmax(off / allowed))
                name = f"{activation}, {init}, layer {layer + 1}"
                worst = max(worst, (float(off[layer] / allowed[layer]), float(off[layer]), float(allowed[layer]), name))
        excess = max(excess, worst[0])
        told.append(f"{part} variance off by {worst[1]:.0%} where {worst[2]:.0%} is allowed ({worst[3]})")
    return Hypothesis(
        "Variances of pre-activations and of gradients follow the recursions of a wide network.",
        f"the largest share of its tolerance, of {config.seeds} seeds: {'; '.join(told)}",
        f"a mean over seeds is off by more than {STANDARD_ERRORS:g} standard errors, which the width sets, and the "
        "bend of the recursion",
        decided(excess <= 1),
    )


def relu_hypothesis(config: Config, cells: Cells) -> Hypothesis:
    """He keeps ReLU's variance, Glorot halves it."""
    he, glorot = (cells["ReLU", "none", init][0]["forward"] for init in (HE, GLOROT))
    low, high, factor = min(he / he[0]), max(he / he[0]), per_layer(glorot)
    tanh = {init: cells["tanh", "none", init][0] for init in (HE, GLOROT)}
    return Hypothesis(
        f"He keeps the variance of ReLU's pre-activations within a factor 2 through {config.depth} layers, and Glorot "
        "halves it a layer.",
        f"He: {low:.2f} to {high:.2f} times that of the first layer; Glorot: factor {factor:.3f} a layer",
        f"He's leaves .5 to 2, or Glorot's factor is more than {HALVING_TOLERANCE:.0%} from .5",
        decided(low >= 0.5 and high <= 2 and abs(factor / 0.5 - 1) <= HALVING_TOLERANCE),
        [
            f"Glorot is made for tanh, and does not keep its variance: {tanh[GLOROT]['forward'][0]:.2f} falls to "
            f"{tanh[GLOROT]['forward'][-1]:.2f}.",
            f"He under tanh keeps the forward variance, but not that of gradients: a factor "
            f"{1 / per_layer(tanh[HE]['gradient']):.2f} a layer downwards.",
        ],
    )


def vanishing_hypothesis(config: Config, cells: Cells) -> Hypothesis:
    """Small weights let all vanish."""
    init = f"std {min(config.stds):g}"
    both = [cells[activation, "none", init][0] for activation in ACTIVATIONS]
    forward = [got["forward"][-1] / got["forward"][0] for got in both]
    gradient = [got["gradient"][0] / got["gradient"][-1] for got in both]
    told = [" and ".join(f"{value:.0e}" for value in values) for values in (forward, gradient)]
    return Hypothesis(
        f"Weights of {init} let pre-activations and gradients vanish.",
        f"variance that is left after {config.depth} layers ({' and '.join(ACTIVATIONS)}): {told[0]}, and {told[1]} of "
        "gradients",
        f"a share above {VANISHED:g} is left",
        decided(max(*forward, *gradient) <= VANISHED),
    )


def forward_hypothesis(config: Config, cells: Cells) -> Hypothesis:
    """Normalisation removes the initialisation from the forward pass."""
    ratios = {}
    for norm in ("batch", "layer"):
        for activation in ACTIVATIONS:
            last = [cells[activation, norm, init][0]["forward"][-1] for init in config.inits]
            ratios[norm, activation] = max(last) / min(last)
    without = [cells["ReLU", "none", init][0]["forward"][-1] for init in config.inits]
    return Hypothesis(
        "Normalisation makes the forward variance independent of the initialisation.",
        "largest variance at the last layer over the smallest: "
        + "; ".join(f"{norm}, {activation} {ratio:.4f}" for (norm, activation), ratio in ratios.items()),
        f"a ratio is above {SPREAD_ALLOWED:g}",
        decided(max(ratios.values()) <= SPREAD_ALLOWED),
        [
            f"Normalisation does so by construction. The ratio is {max(without) / min(without):.0e} without it (ReLU).",
        ],
    )


def batch_hypothesis(config: Config, cells: Cells) -> Hypothesis:
    """Batch normalisation lets gradients explode."""
    told, ratios = [], []
    for activation in ACTIVATIONS:
        want = growth(activation, "batch")
        rates = [1 / per_layer(cells[activation, "batch", init][0]["gradient"]) for init in config.inits]
        ratios += [rate / want for rate in rates]
        told.append(f"{activation} {min(rates):.3f} to {max(rates):.3f} (theory {want:.3f})")
    layer = [1 / per_layer(cells["ReLU", "layer", init][0]["gradient"]) for init in config.inits]
    he = 1 / per_layer(cells["ReLU", "none", HE][0]["gradient"])
    bottom = np.divide(*cells["ReLU", "batch", HE][0]["gradient"][:2])
    return Hypothesis(
        "Batch normalisation makes the variance of gradients grow towards the input, at a rate that the activation "
        "function sets and the initialisation does not.",
        f"factor a layer: {'; '.join(told)}",
        f"a factor is more than {RATE_TOLERANCE:.0%} from the theory under some initialisation",
        decided(max(abs(ratio - 1) for ratio in ratios) <= RATE_TOLERANCE),
        [
            f"The mean that it takes off is the cause under ReLU: layer normalisation has factors {min(layer):.3f} to "
            f"{max(layer):.3f}, and He without normalisation {he:.3f}.",
            f"The theory is for large batches that are Gaussian in each unit. The rates of {config.examples} digits "
            f"are off by {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}, and {bottom:.2f} at the first layer (ReLU).",
        ],
    )


def figures(config: Config, cells: Cells) -> list[Plot]:
    """Variances by layer, without normalisation and with it."""
    colours = dict(zip(config.inits, (plots.PALETTE[i] for i in (2, 0, 1, 3, 4)), strict=False))
    layers = np.arange(1, config.depth + 1)
    plain, axes = plots.figure(columns=2, rows=2, height=6.2)
    for axis, (part, activation) in zip(
        axes, [(part, a) for part in ("forward", "gradient") for a in ACTIVATIONS], strict=True
    ):
        for init, colour in colours.items():
            got, want = cells[activation, "none", init]
            axis.semilogy(layers, got[part], "o", color=colour, label=init)
            axis.semilogy(layers, getattr(want, part), **plots.THEORY)
        axis.set(title=f"{activation}, {'pre-activations' if part == 'forward' else 'gradients'}", xlabel="layer")
    axes[0].set_ylabel("variance")
    axes[2].set_ylabel("variance")
    plots.legend(plain, *axes[0].get_legend_handles_labels())
    normed, axes = plots.figure(columns=2, height=3.6)
    for axis, activation in zip(axes, ACTIVATIONS, strict=True):
        for norm, marker, colour in (("batch", "o", plots.PALETTE[1]), ("layer", "^", plots.PALETTE[0])):
            for i, init in enumerate(config.inits):
                got, _ = cells[activation, norm, init]
                label = f"{norm} normalisation, all weights" if i == 0 else None
                axis.semilogy(layers, got["gradient"], marker, color=colour, label=label)
            axis.semilogy(layers, cells[activation, norm, HE][1].gradient, **plots.THEORY)
        axis.set(title=f"{activation}, gradients", xlabel="layer")
    axes[0].set_ylabel("variance")
    plots.legend(normed, *axes[0].get_legend_handles_labels())
    for axis in [*plain.axes, *normed.axes]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return [
        Plot(plain, "Variance by layer, without normalisation. Dashed: the recursion of a wide network."),
        Plot(normed, "Variance of gradients under batch and layer normalisation. Dashed: the theory, for any weights."),
    ]


def table(config: Config, cells: Cells) -> Table:
    """Numbers that every network starts from."""
    rows = []
    for (activation, norm, init), (got, _) in cells.items():
        numbers = got["forward"][-1], got["gradient"][0] / got["gradient"][-1]
        losses = [np.sqrt(config.width * got[loss][0]) for loss in ("cross-entropy", "squared error")]
        shown = [f"{value:.2g}" for value in (*numbers, *losses)]
        rows.append([activation, norm, init, *shown, f"{got['kurtosis'][-1]:+.2f}"])
    header = ["activation", "normalisation", "weights", "variance", "gradients", "cross-entropy", "squared error"]
    return Table(
        "Variance at the last layer; variance of gradients at the first layer over that at the last; norm of the "
        "gradient of either loss (softmax, digits) at the first layer; excess kurtosis of the last pre-activations.",
        [*header, "kurtosis"],
        rows,
    )


def report(config: Config, records: Sequence[Record]) -> Section:
    """The recursions, what they make of Glorot, He and bad weights, and what normalisation changes."""
    cells: Cells = {}
    for settings, values in records:
        activation, norm, init = (str(settings[name]) for name in ("activation", "norm", "init"))
        got = {name: np.asarray(value) for name, value in values.items()}
        cells[activation, norm, init] = got, theory(config, activation, norm, init, int(settings["features"]))
    text = (
        "A pre-activation is the number that enters an activation function. Its variance $q$ and that of the gradient "
        "in it change from layer to layer by a factor, which the variance of the weights sets. Through many layers a "
        "factor other than 1 makes both vanish or explode, before any training.\n\n"
        "Glorot draws weights of variance $2 / (n0 + n1)$ for $n0$ inputs and $n1$ outputs. He draws $2 / n0$, since "
        "ReLU halves the mean square. Normalisation divides pre-activations by their standard deviation: over the "
        "examples of a batch for each unit, or over the units of a layer for each example.\n\n"
        "Small logits give all classes one probability. The gradient of squared error is then that of cross-entropy "
        "over the number of classes."
    )
    rate = 1 / per_layer(cells["ReLU", "batch", HE][0]["gradient"])
    he = cells["ReLU", "none", HE][0]["forward"]
    abstract = [
        f"He's weights leave {he[-1] / he[0]:.2f} of the variance of ReLU's pre-activations after {config.depth} "
        f"layers; batch normalisation fixes it for any weights, but gradients then grow by {rate:.2f} a layer."
    ]
    makers = recursion_hypothesis, relu_hypothesis, vanishing_hypothesis, forward_hypothesis, batch_hypothesis
    hypotheses = [make(config, cells) for make in makers]
    return Section("Initialisation", abstract, text, figures(config, cells), hypotheses, [table(config, cells)])
