"""Likelihood: the loss of maximum likelihood is a cross-entropy, and squared error is that of a Gaussian.

The data x_1, ..., x_n take values v with shares s_v. A model has the density q_v there. The data are recorded on a
grid of width w, which is 1 for counts and classes. Then

    mean of -log q = -sum_v s_v log q_v                                  cross-entropy of the shares and the model
                   = sum_v s_v log(s_v / (w q_v)) - sum_v s_v log s_v + log w     KL(shares || model) + entropy + log w

The entropy of the data knows no parameter. So the highest likelihood and the least KL divergence have one place. The
sums over classes or counts are exact. A density times w is the probability of a cell only for small w. The identity
holds for any w.

Two families have the losses of regression as negative log-likelihoods, up to a factor and a constant:

    Gaussian, fixed scale   (x - loc)^2 / (2 scale^2) + log scale + log(2 pi) / 2    least at the mean
    Laplace, fixed scale    |x - loc| / scale + log(2 scale)                         least at the median

The mean of the former depends on the data through their mean and variance alone. It is the cross-entropy of the
Gaussian with these two, as `gaussian.cross_entropy` gives it.

All is float64. The likelihoods run through jprob and jax on the device, one example at a time. The sums over values run
through scipy on the host.

Sources: Cover and Thomas (2006), Elements of Information Theory, 2.3; Bishop (2006), Pattern Recognition and Machine
Learning, 1.2.5 and 1.6.1.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from scipy import special
from scipy import stats as scipy_stats

from experiments import plots
from experiments.findings import FUNCTION, Hypothesis, Plot, Section, Table, Tier, decided
from experiments.results import Progress, Record, Setting
from jprob import categorical, gaussian, mle

TOLERANCE = 1e-12
SEED, WIDTH = 40_000, 0.25  # of the first draw; of the grid of continuous data: a power of two, so that it is exact
RATE, LOC, SCALE, NUM_CLASSES = 3.0, 1.5, 2.0, 5
TWO_SCALES = (1.0, 5.0)
LOCATIONS = np.linspace(LOC - 4, LOC + 4, 65)
PROBS = np.linspace(0.02, 0.98, 49)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every family has its data, and models with parameters drawn next to those of the data."""

    num_examples: Annotated[int, msgspec.Meta(ge=11, le=1_000_000)]
    models: Annotated[int, msgspec.Meta(ge=1, le=10_000)]

    def __post_init__(self):
        if self.num_examples % 2 == 0:
            raise ValueError(f"num_examples: expected an odd number, whose median is unique, got {self.num_examples}")


class Family(NamedTuple):
    """A family of distributions: data, models, and -log q on the device and on the host."""

    draw: Callable[[np.random.Generator, int], np.ndarray]
    model: Callable[[np.random.Generator], tuple[Any, ...]]
    nll: Callable[..., jax.Array]
    log_density: Callable[..., np.ndarray]
    width: float


def on_grid(x: np.ndarray) -> np.ndarray:
    """Observations rounded to the grid on which they are recorded."""
    return WIDTH * np.round(x / WIDTH)


def near(rng: np.random.Generator) -> tuple[float, float]:
    """A location and a scale near those of the data."""
    return LOC + rng.normal(), SCALE * math.exp(rng.normal() / 2)


FAMILIES = {
    "Gaussian": Family(
        lambda rng, n: on_grid(rng.normal(LOC, SCALE, n)), near, gaussian.nll, scipy_stats.norm.logpdf, WIDTH
    ),
    "Laplace": Family(
        lambda rng, n: on_grid(rng.laplace(LOC, SCALE, n)),
        near,
        lambda x, loc, scale: -jax.scipy.stats.laplace.logpdf(x, loc, scale),
        scipy_stats.laplace.logpdf,
        WIDTH,
    ),
    "categorical": Family(
        lambda rng, n: rng.choice(NUM_CLASSES, n, p=np.arange(1, NUM_CLASSES + 1) / np.arange(NUM_CLASSES + 1).sum()),
        lambda rng: (rng.normal(size=NUM_CLASSES),),
        lambda x, logits: categorical.cross_entropy(jnp.broadcast_to(logits, (x.size, logits.size)), x),
        lambda v, logits: special.log_softmax(logits)[v],
        1.0,
    ),
    "Poisson": Family(
        lambda rng, n: rng.poisson(RATE, n).astype(np.float64),
        lambda rng: (RATE * math.exp(rng.normal() / 2),),
        lambda x, rate: -jax.scipy.stats.poisson.logpmf(x, rate),
        scipy_stats.poisson.logpmf,
        1.0,
    ),
}


def data_of(name: str, config: Config) -> np.ndarray:
    """The data of a family."""
    rng = np.random.default_rng([SEED, list(FAMILIES).index(name), 0])
    return FAMILIES[name].draw(rng, config.num_examples)


def identities(name: str, config: Config) -> dict[str, np.ndarray]:
    """Each model's mean negative log-likelihood, its cross-entropy, and KL divergence with entropy."""
    family, x = FAMILIES[name], data_of(name, config)
    values, counts = np.unique(x, return_counts=True)
    shares = counts / x.size
    nll = jax.jit(lambda *params: jnp.mean(family.nll(jnp.asarray(x), *params)))
    rng = np.random.default_rng([SEED, list(FAMILIES).index(name), 1])
    rows = []
    for params in (family.model(rng) for _ in range(config.models)):
        log_q = family.log_density(values, *params)
        kl = np.sum(special.rel_entr(shares, family.width * np.exp(log_q)))
        entropy = scipy_stats.entropy(shares) + math.log(family.width)
        row = {"nll": float(nll(*params)), "cross_entropy": -np.sum(shares * log_q), "kl": kl, "entropy": entropy}
        if name == "Gaussian":
            fitted = gaussian.fit(jnp.asarray(x))
            row["moments"] = float(gaussian.cross_entropy(*fitted, *params))
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def descend(x: np.ndarray) -> np.ndarray:
    """The locations of least mean squared error and of least Gaussian negative log-likelihood, by one descent."""

    def both(params, x, key):
        return (x - params[0]) ** 2 + gaussian.nll(x, params[1], SCALE)

    with jax.numpy_dtype_promotion("standard"):  # optax's L-BFGS adds two integer dtypes
        return np.asarray(mle.fit_full_batch(both, jnp.zeros(2), jnp.asarray(x), gradient_tolerance=1e-14).params)


def minima(config: Config) -> Iterator[Record]:
    """The place of the least loss, of the least negative log-likelihood, and in closed form."""
    x = data_of("Gaussian", config)
    fits = dict(zip(("loss", "nll"), descend(x), strict=True)) | {"closed": gaussian.fit(jnp.asarray(x)).loc}
    yield Record({"part": "minima", "family": "Gaussian"}, {name: float(value) for name, value in fits.items()})
    x = data_of("Laplace", config)
    at = np.unique(x)  # a convex function with edges at the observations alone is least at one of them
    distance = jnp.mean(jnp.abs(jnp.asarray(x)[:, None] - at[None]), axis=0)
    nll = jnp.mean(FAMILIES["Laplace"].nll(jnp.asarray(x)[:, None], jnp.asarray(at)[None], SCALE), axis=0)
    fits = {"loss": at[int(jnp.argmin(distance))], "nll": at[int(jnp.argmin(nll))], "closed": np.median(x)}
    fits["mean"] = x.mean()
    yield Record({"part": "minima", "family": "Laplace"}, {name: float(value) for name, value in fits.items()})
    # Half of the examples have another scale: the likelihood then weighs them, and squared error does not.
    rng = np.random.default_rng([SEED, len(FAMILIES)])
    scales = np.resize(TWO_SCALES, config.num_examples)
    x = rng.normal(LOC, scales)
    weighted = float(gaussian.fit(jnp.asarray(x), weights=jnp.asarray(scales**-2)).loc)
    yield Record({"part": "minima", "family": "two scales"}, {"loss": float(x.mean()), "nll": weighted})


def curves(config: Config) -> Iterator[Record]:
    """Losses and negative log-likelihoods over a location, and over the probability of one of two classes."""
    for name, power in (("Gaussian", 2), ("Laplace", 1)):
        x, at = jnp.asarray(data_of(name, config))[:, None], jnp.asarray(LOCATIONS)[None]
        nll = jnp.mean(FAMILIES[name].nll(x, at, SCALE), axis=0)
        loss = jnp.mean(jnp.abs(x - at) ** power, axis=0)
        values = {"place": LOCATIONS, "nll": np.asarray(nll), "loss": np.asarray(loss)}
        yield Record({"part": "curve", "family": name}, values)
    labels = data_of("categorical", config) == NUM_CLASSES - 1
    logits = jnp.stack([jnp.log1p(-PROBS), jnp.log(PROBS)], axis=1)
    target = jnp.broadcast_to(jnp.array([1 - labels.mean(), labels.mean()]), logits.shape)
    nll, kl = categorical.cross_entropy(logits, target), categorical.kl_divergence(jnp.log(target), logits)
    values = {"place": PROBS, "nll": np.asarray(nll), "kl": np.asarray(kl), "share": labels.mean()}
    yield Record({"part": "curve", "family": "categorical"}, values)


def tier(config: Config, settings: Mapping[str, Setting], value: str) -> Tier | None:
    """All is float64, and a descent ends at a gradient of 1e-14."""
    return FUNCTION


def run(config: Config) -> Iterator[Record | Progress]:
    """One record of identities a family, then the minima and the curves."""
    for done, name in enumerate(FAMILIES):
        yield Progress(done / (len(FAMILIES) + 1), name)
        with jax.enable_x64(True):
            record = Record({"part": "identities", "family": name}, {**identities(name, config)})
        yield record
    yield Progress(len(FAMILIES) / (len(FAMILIES) + 1), "minima and curves")
    with jax.enable_x64(True):
        records = [*minima(config), *curves(config)]
    yield from records


Parts = dict[tuple[str, str], dict[str, Any]]  # by part and family


def identity_errors(values: dict[str, Any]) -> dict[str, float]:
    """Largest deviation from the mean negative log-likelihood, relative to it or to 1; NaN if one is."""
    nll = np.asarray(values["nll"])
    other = {"cross-entropy": values["cross_entropy"], "KL + entropy": values["kl"] + values["entropy"]}
    other |= {"matching Gaussian": values["moments"]} if "moments" in values else {}
    return {name: float(np.max(np.abs(each - nll) / np.maximum(np.abs(nll), 1))) for name, each in other.items()}


def identity_hypothesis(config: Config, parts: Parts) -> Hypothesis:
    """The mean negative log-likelihood three ways."""
    errors = {name: np.max(list(identity_errors(parts["identities", name]).values())) for name in FAMILIES}
    floor = {name: float(parts["identities", name]["entropy"][0]) for name in FAMILIES}
    return Hypothesis(
        "A mean negative log-likelihood is the cross-entropy of the data and the model: KL divergence plus the entropy "
        "of the data.",
        f"largest deviation over {config.models} models: "
        + ", ".join(f"{e:.1e} ({name})" for name, e in errors.items()),
        f"a deviation is more than {TOLERANCE:g} of the value, or of 1 if that is larger",
        decided(all(e <= TOLERANCE for e in errors.values())),
        [
            "The entropy is a floor that the loss keeps: "
            + ", ".join(f"{value:.2f} ({name})" for name, value in floor.items())
            + ". A loss of 0 needs data without spread.",
            f"The two continuous families need the width of the grid, {WIDTH:g}. The entropy and the KL divergence of "
            "data relative to a density depend on it, and the likelihood on the unit of the data.",
            "The identity is algebra and says nothing about whether the family suits the data.",
        ],
    )


def minima_hypothesis(parts: Parts) -> Hypothesis:
    """The loss and the likelihood have one minimum."""
    each = {name: parts["minima", name] for name in ("Gaussian", "Laplace")}
    off = {
        name: float(np.max(np.abs(np.array([fit["loss"], fit["nll"]]) - fit["closed"]))) for name, fit in each.items()
    }
    mixed = parts["minima", "two scales"]
    return Hypothesis(
        "Squared error is least where a Gaussian of fixed scale is most likely, at the mean. Absolute error is least "
        "where a Laplace distribution is, at the median.",
        ", ".join(f"{name}: {each[name]['closed']:.4f}, largest deviation {e:.1e}" for name, e in off.items()),
        f"a place is more than {TOLERANCE:g} from the mean or median",
        decided(all(e <= TOLERANCE for e in off.values())),
        [
            "The scale must be fixed and the same for all. If half of the examples have scale "
            f"{TWO_SCALES[0]:g} and half {TWO_SCALES[1]:g}, squared error is least at {mixed['loss']:.4f} and the "
            f"likelihood highest at {mixed['nll']:.4f}.",
            f"The two families differ on one sample: the Laplace data have mean {each['Laplace']['mean']:.4f}.",
        ],
    )


def figure(parts: Parts) -> Plot:
    """Each loss over a location, and cross-entropy over a probability."""
    made, (left, right) = plots.figure(columns=2, height=3.9)
    names = {"Gaussian": "squared error", "Laplace": "absolute error"}
    for (name, loss), colour in zip(names.items(), plots.PALETTE, strict=False):
        curve = parts["curve", name]
        place, nll, error = (np.asarray(curve[key]) for key in ("place", "nll", "loss"))
        scaled = error / (2 * SCALE**2) + math.log(SCALE) + math.log(2 * math.pi) / 2
        scaled = scaled if name == "Gaussian" else error / SCALE + math.log(2 * SCALE)
        left.plot(place, nll, color=colour, lw=3.2, label=f"{name}, dashed: scaled {loss}")
        left.plot(place, scaled, **plots.THEORY)
        left.axvline(parts["minima", name]["closed"], color=colour, ls=":", lw=1.3)
    left.set(xlabel="location", ylabel="mean negative log-likelihood (nats)")
    curve = parts["curve", "categorical"]
    place, nll, kl, share = (np.asarray(curve[key]) for key in ("place", "nll", "kl", "share"))
    entropy = scipy_stats.entropy([share, 1 - share])
    right.plot(place, nll, color=plots.PALETTE[2], lw=3.2, label="cross-entropy")
    right.plot(place, kl + entropy, **plots.THEORY, label="KL divergence + entropy")
    right.axhline(entropy, color=plots.PALETTE[5], lw=1.3, label="entropy of the data")
    right.axvline(float(share), color=plots.PALETTE[2], ls=":", lw=1.3)
    right.set(xlabel="probability of the class", ylim=(0, None))
    handles, labels = (a + b for a, b in zip(*(x.get_legend_handles_labels() for x in (left, right)), strict=True))
    plots.legend(made, handles, labels)
    return Plot(
        made,
        f"Left: negative log-likelihoods with scale {SCALE:g} over the location; dashed, the loss divided by "
        "$2 scale^2$ or by the scale, plus a constant. Dotted: mean and median. Right: two classes, over the "
        "probability of one. Dotted: its share of the data.",
    )


def table(parts: Parts) -> Table:
    """The identities of every family, at its first model."""
    rows = []
    for name in FAMILIES:
        values = parts["identities", name]
        numbers = [f"{np.asarray(values[key])[0]:.6f}" for key in ("nll", "cross_entropy", "kl", "entropy")]
        errors = [f"{identity_errors(values).get(key, math.nan):.1e}" for key in ("cross-entropy", "KL + entropy")]
        rows.append([name, *numbers, *errors])
    header = ["family", "negative log-likelihood", "cross-entropy", "KL", "entropy", "error", "error of the sum"]
    caption = (
        "Each family with its first model, in nats. The entropy includes the logarithm of the width. The errors are "
        "the largest over all models: of the cross-entropy, and of KL + entropy."
    )
    return Table(caption, header, rows)


def report(config: Config, records: Sequence[Record]) -> Section:
    """Likelihood as cross-entropy, and the losses of regression as likelihoods."""
    parts: Parts = {(str(settings["part"]), str(settings["family"])): values for settings, values in records}
    text = (
        "Maximum likelihood minimises the mean of $-log q$ over the data. The data take each value with some share. So "
        "this mean is the cross-entropy of the shares and the model, for any family. Cross-entropy is KL divergence "
        "plus entropy, and the entropy of the data is constant. Maximum likelihood finds the model of least KL "
        "divergence.\n\n"
        "Squared error and cross-entropy are no opposites in this sense. Squared error is the cross-entropy of a "
        "Gaussian with a fixed scale, up to a factor and a constant. Absolute error is that of a Laplace distribution."
    )
    hypotheses = [identity_hypothesis(config, parts), minima_hypothesis(parts)]
    worst = np.max([np.max(list(identity_errors(parts["identities", name]).values())) for name in FAMILIES])
    abstract = [
        "Every mean negative log-likelihood is a cross-entropy, KL divergence plus the entropy of the data, to "
        f"{worst:.0e} for {len(FAMILIES)} families; squared error is the one of a Gaussian with fixed scale."
    ]
    return Section("Likelihood", abstract, text, [figure(parts)], hypotheses, [table(parts)])
