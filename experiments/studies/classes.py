"""Classes: how many there are, and the learning rate that squared error then needs.

K is the number of classes. Uniform p gives softmax + squared error 1 / K times the gradient of softmax + cross-entropy
in the logits. So one learning rate for both handicaps squared error by K, before any saturation.

Squared error is half the sum over classes, ||p - y||^2 / 2. The mean over classes, ||p - y||^2 / K, has 2 / K times
its gradient. The rates with equal first steps are then, relative to that of cross-entropy:

    sum over classes     K
    mean over classes    K^2 / 2

The features of class k are Gaussian with unit variance around a centre, itself drawn from a Gaussian. The model is
linear, with weights drawn with a small standard deviation, and it is trained by SGD. A point is one per cent of the
test examples.

Protocol: every seed draws its own centres, examples, weights and order of the batches, the same for all arms. The
learning rate is tuned for each arm and K. The criterion is the mean validation accuracy of the selection seeds. The
half-decade grid is the same for all, and is widened while the best rate lies at its edge. Rates within one standard
error of the best are ties: the middle one is taken. Seeds that select are not seeds that report.

Sources: Glorot and Bengio (2010), Understanding the difficulty of training deep feedforward neural networks; Hui and
Belkin (2021), Evaluation of neural architectures trained with square loss vs cross-entropy, ICLR.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax

from experiments import arms, plots, stats, tuning
from experiments.arms import SOFTMAX_CE, SOFTMAX_SE
from experiments.config import distinct, split
from experiments.findings import Hypothesis, Plot, Section, Table, decided
from experiments.results import Progress, Record
from experiments.tuning import Curve, Member, best, outside, ties
from jprob import categorical, mle

SUM, MEAN = f"{SOFTMAX_SE}, sum", f"{SOFTMAX_SE}, mean"
ARMS = (SOFTMAX_CE, SUM, MEAN)
COLOURS = dict(zip(ARMS, (arms.COLOURS[SOFTMAX_CE], arms.COLOURS[SOFTMAX_SE], plots.PALETTE[4]), strict=True))
FACTOR, POINTS = math.sqrt(10), 1.0  # how far a ratio may be from K, one step of the grid; how far the gap may grow
SELECTION_SEED, REPORT_SEED = 50_000, 60_000  # the first; the verdicts' rules were fixed before these seeds ran
STD = 0.01

Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Decade = Annotated[float, msgspec.Meta(ge=-8, le=8, multiple_of=0.5)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The grid of learning rates is given by the decimal logarithm of its ends, in steps of half a decade."""

    num_classes: Annotated[list[Annotated[int, msgspec.Meta(ge=2, le=1000)]], msgspec.Meta(min_length=2, max_length=8)]
    num_features: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    centre_std: Annotated[float, msgspec.Meta(gt=0, le=10)]
    train_examples: Count
    test_examples: Count
    epochs: Count
    batch_size: Count
    decades: Annotated[list[Decade], msgspec.Meta(min_length=2, max_length=2)]
    widen_at_most: Annotated[int, msgspec.Meta(ge=0, le=20)]
    selection_seeds: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    report_seeds: Annotated[int, msgspec.Meta(ge=2, le=1000)]
    trained_together: Count

    def __post_init__(self):
        distinct(self, "num_classes")
        if self.decades[0] > self.decades[1]:
            raise ValueError(f"decades: expected the lower end first, got {self.decades}")


def gradient_ratio(arm: str, num_classes: int) -> float:
    """The rate of an arm relative to that of cross-entropy, for equal gradients at uniform p."""
    return {SOFTMAX_CE: 1.0, SUM: float(num_classes), MEAN: num_classes**2 / 2}[arm]


def weights_of(arm: str, num_classes: int) -> tuple[float, float]:
    """The arm's loss as a weighted sum of cross-entropy and Brier score: one program trains all arms."""
    return {SOFTMAX_CE: (1.0, 0.0), SUM: (0.0, 0.5), MEAN: (0.0, 1 / num_classes)}[arm]


def draw(seed: int, num_classes: int, config: Config) -> dict[str, np.ndarray]:
    """A seed's initial weights, and its examples to train, to validate and to test."""
    rng = np.random.default_rng([seed, num_classes])
    centres = config.centre_std * rng.normal(size=(num_classes, config.num_features))
    drawn = {"kernel": (STD * rng.normal(size=centres.T.shape)).astype(np.float32)}
    sizes = {"train": config.train_examples, "validation": config.test_examples, "test": config.test_examples}
    for name, size in sizes.items():
        labels = rng.integers(num_classes, size=size)
        x = centres[labels] + rng.normal(size=(size, config.num_features))
        drawn |= {name: x.astype(np.float32), f"{name}_labels": labels.astype(np.int32)}
    return drawn


def outputs(params, x):
    """Logits of the linear model."""
    return x @ params["kernel"] + params["bias"][None]


def nll(params, batch, key):
    """The weighted sum of both losses, each example with the weights of its member."""
    x, labels, entropy_weight, square_weight = batch
    z = outputs(params, x)
    entropy, square = categorical.cross_entropy(z, labels), categorical.brier_score(z, labels)
    return entropy_weight * entropy + square_weight * square


def trainer(num_classes: int, config: Config) -> Callable[[Sequence[Member]], dict[str, np.ndarray]]:
    """A function from members to their accuracies in points; it compiles once, for `trained_together` at a time."""
    steps = config.epochs * -(-config.train_examples // config.batch_size)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)

    @jax.jit
    @jax.vmap
    def train(drawn, rate, key, weights):
        params = {"kernel": drawn["kernel"], "bias": jnp.zeros(num_classes)}
        state = optax.tree.set(mle.init(params, optimizer, key), learning_rate=rate)
        shares = (jnp.broadcast_to(w, config.train_examples) for w in weights)
        data = (drawn["train"], drawn["train_labels"], *shares)
        state, _ = mle.run(nll, optimizer, state, data, num_steps=steps, batch_size=config.batch_size, log_every=steps)

        def accuracy(name):
            z = outputs(state.params, drawn[name])
            right = jnp.argmax(z, axis=-1) == drawn[f"{name}_labels"]
            return jnp.where(jnp.isfinite(z).all(), 100 * jnp.mean(right), 0)

        return {name: accuracy(name) for name in ("validation", "test")}

    def train_chunk(chunk: Sequence[Member]) -> dict[str, np.ndarray]:
        of_seed = {member.seed: draw(member.seed, num_classes, config) for member in chunk}
        drawn = jax.tree.map(lambda *x: np.stack(x), *(of_seed[member.seed] for member in chunk))
        rates = np.array([10.0 ** (member.rate / 2) for member in chunk], np.float32)
        keys = jnp.stack([jax.random.key(member.seed) for member in chunk])
        weights = np.array([weights_of(member.arm, num_classes) for member in chunk], np.float32)
        return {name: np.asarray(x, np.float64) for name, x in train(drawn, rates, keys, weights).items()}

    return lambda wanted: tuning.together(train_chunk, wanted, config.trained_together)


def parts(config: Config) -> list[Config]:
    """Every number of classes is a part."""
    return split(config, "num_classes")


def run(config: Config) -> Iterator[Record | Progress]:
    """For each number of classes: the learning-rate curves, then the report seeds at the best and at a shared rate."""
    for done, k in enumerate(config.num_classes):
        yield Progress(done / len(config.num_classes), f"{k} classes: rates")
        train = trainer(k, config)
        seeds = range(SELECTION_SEED, SELECTION_SEED + config.selection_seeds)
        tried = tuning.of_arms(train, ARMS, config.decades, seeds, config.widen_at_most)
        for arm, curve in tried.items():
            rates = sorted(curve)
            validation, errors = (np.array([curve[rate][i] for rate in rates]) for i in (0, 1))
            values = {"half_decades": np.array(rates), "validation": validation, "error": errors}
            yield Record({"part": "rates", "arm": arm, "num_classes": k}, {**values})
        yield Progress((done + 0.7) / len(config.num_classes), f"{k} classes: seeds")
        seeds = range(REPORT_SEED, REPORT_SEED + config.report_seeds)
        runs = [("tuned", arm, best(curve)) for arm, curve in tried.items()]
        runs += [("shared", arm, best(tried[SOFTMAX_CE])) for arm in (SUM, MEAN)]
        tested = train([Member(arm, rate, seed) for _, arm, rate in runs for seed in seeds])["test"]
        for (part, arm, _), accuracy in zip(runs, tested.reshape(len(runs), len(seeds)), strict=True):
            yield Record({"part": part, "arm": arm, "num_classes": k}, {"test": accuracy})


Curves = dict[tuple[str, int], Curve]  # by arm and number of classes
Accuracies = dict[tuple[str, str, int], np.ndarray]  # by part, arm and number of classes: one value a report seed


def ratio(curves: Curves, arm: str, num_classes: int) -> float:
    """The tuned rate of an arm over that of cross-entropy."""
    return 10.0 ** ((best(curves[arm, num_classes]) - best(curves[SOFTMAX_CE, num_classes])) / 2)


def ratio_range(curves: Curves, arm: str, num_classes: int) -> tuple[float, float]:
    """The ratios that the ties leave open."""
    mine, other = (ties(curves[each, num_classes]) for each in (arm, SOFTMAX_CE))
    return 10.0 ** ((mine[0] - other[-1]) / 2), 10.0 ** ((mine[-1] - other[0]) / 2)


def ratio_hypothesis(config: Config, curves: Curves) -> Hypothesis:
    """The tuned rates are in the ratio of the gradients at uniform p."""
    found = {k: ratio(curves, SUM, k) for k in config.num_classes}
    off = max(abs(math.log(each / k)) for k, each in found.items())
    edges = [(arm, k) for (arm, k), curve in curves.items() if arm != MEAN and outside(curve) is not None]
    wide = {k: ratio_range(curves, SUM, k) for k in config.num_classes}
    mean = {k: ratio(curves, MEAN, k) for k in config.num_classes}
    against = [
        "The accuracy is flat near the best rate. Within one standard error of it lie the ratios "
        + ", ".join(f"{low:.3g} to {high:.3g} ($K = {k}$)" for k, (low, high) in wide.items())
        + ".",
        "The reduction moves the rate as much. With the mean over classes the ratios are "
        + ", ".join(f"{each:.3g} ($K = {k}$, theory {gradient_ratio(MEAN, k):.3g})" for k, each in mean.items())
        + ".",
    ]
    power = float(np.polyfit(np.log(list(found)), np.log(list(found.values())), 1)[0])
    against += [f"The ratio $K$ is that of the first step alone. The tuned ratios grow as a power {power:.2f} of $K$."]
    against += [f"The best rate of {arm} with {k} classes lies at the edge of its grid." for arm, k in edges]
    return Hypothesis(
        "The tuned learning rate of softmax + squared error, summed over classes, is $K$ times that of softmax + "
        "cross-entropy, as the gradients at uniform $p$ say.",
        "ratio of the tuned rates: " + ", ".join(f"{each:.3g} ($K = {k}$)" for k, each in found.items()),
        f"a ratio is off $K$ by more than a factor sqrt 10 = {FACTOR:.2f}; undecided if a rate lies at an edge",
        "undecided" if edges else decided(off <= math.log(FACTOR) + 1e-9),
        against,
    )


def gap(accuracies: Accuracies, num_classes: int, part: str = "tuned", arm: str = SUM) -> np.ndarray:
    """Paired differences of the test accuracy, in points: that of cross-entropy less that of the arm."""
    return accuracies["tuned", SOFTMAX_CE, num_classes] - accuracies[part, arm, num_classes]


def interval_text(differences: np.ndarray) -> str:
    """Mean and 95 % interval, in points."""
    low, high = stats.bca_interval(differences)
    return f"{differences.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def gap_hypothesis(config: Config, accuracies: Accuracies) -> Hypothesis:
    """Tuned, squared error does not fall behind as classes are added."""
    few, many = min(config.num_classes), max(config.num_classes)
    growth = gap(accuracies, many) - gap(accuracies, few)
    high = stats.bca_interval(growth).high
    verdict = "falsified" if growth.mean() > POINTS else "holds" if high <= POINTS else "undecided"
    shared = "; ".join(f"$K = {k}$ {interval_text(gap(accuracies, k, 'shared'))}" for k in config.num_classes)
    entropy = {k: accuracies["tuned", SOFTMAX_CE, k].mean() for k in (few, many)}
    means = "; ".join(f"$K = {k}$ {interval_text(gap(accuracies, k, 'shared', MEAN))}" for k in config.num_classes)
    return Hypothesis(
        f"With tuned rates the lead of softmax + cross-entropy grows by at most {POINTS:g} point of accuracy from "
        f"{few} to {many} classes.",
        f"growth of the lead {interval_text(growth)} points; lead "
        + "; ".join(f"$K = {k}$ {interval_text(gap(accuracies, k))}" for k in config.num_classes),
        f"the mean growth is above {POINTS:g}; undecided while its 95 % interval reaches above it",
        verdict,
        [
            f"At the rate that is best for cross-entropy, the lead over squared error summed over classes is {shared}.",
            f"Over the mean over classes it is {means} at that rate.",
            f"The task changes with $K$: the accuracy of softmax + cross-entropy is {entropy[few]:.1f} % with {few} "
            f"classes and {entropy[many]:.1f} % with {many}. The number of steps does not.",
        ],
    )


def figure(config: Config, curves: Curves, accuracies: Accuracies) -> Plot:
    """Ratio of the tuned rates, and the lead, against the number of classes."""
    made, (left, right) = plots.figure(columns=2, height=3.9)
    ks = np.array(config.num_classes)
    for arm in (SUM, MEAN):
        middle = np.array([ratio(curves, arm, k) for k in config.num_classes])
        low, high = np.array([ratio_range(curves, arm, k) for k in config.num_classes]).T
        bars = np.maximum([middle - low, high - middle], 0)
        left.errorbar(ks, middle, yerr=bars, fmt="o", capsize=2, color=COLOURS[arm], label=arm)
    for arm in (SUM, MEAN):
        theory = [gradient_ratio(arm, k) for k in config.num_classes]
        left.plot(ks, theory, **plots.THEORY, label="theory" if arm == MEAN else None)
    looks = {"tuned": {"color": COLOURS[SUM], "marker": "o"}, "shared": {"color": plots.PALETTE[5], "marker": "s"}}
    for part, look in looks.items():
        gaps = [gap(accuracies, k, part) for k in config.num_classes]
        mean = np.array([each.mean() for each in gaps])
        bars = np.abs(np.array([stats.bca_interval(each) for each in gaps]).T - mean)
        right.errorbar(ks, mean, yerr=bars, capsize=2, label=f"sum, {part} rate", **look)
    left.set(xscale="log", yscale="log", xlabel="classes", ylabel="ratio of tuned learning rates")
    right.set(xscale="log", xlabel="classes", ylabel="lead of cross-entropy (points)")
    for axis in (left, right):
        axis.set_xticks(ks, [f"{k}" for k in ks], minor=False)
        axis.minorticks_off()
    handles, labels = (a + b for a, b in zip(*(x.get_legend_handles_labels() for x in (left, right)), strict=True))
    plots.legend(made, handles, labels)
    return Plot(
        made,
        "Left: learning rate of squared error over that of cross-entropy, each tuned; bars show the ties. Dashed: "
        "$K$ and $K^2 / 2$. Right: the lead of softmax + cross-entropy with 95 % intervals, squared error at its own "
        "rate or at that of cross-entropy.",
    )


def rates_figure(config: Config, curves: Curves) -> Plot:
    """The learning-rate curves by which each arm got its rate."""
    shown = sorted({min(config.num_classes), max(config.num_classes)})
    made, axes = plots.figure(columns=len(shown), height=3.4)
    for axis, k in zip(axes, shown, strict=True):
        for arm in ARMS:
            curve = curves[arm, k]
            rates = np.array(sorted(curve))
            means = [curve[rate][0] for rate in rates]
            axis.plot(10.0 ** (rates / 2), means, color=COLOURS[arm], marker="o", markersize=3, label=arm)
            axis.axvline(10.0 ** (best(curve) / 2), color=COLOURS[arm], ls=":", lw=1.3)
        axis.set(xscale="log", xlabel="learning rate", title=f"{k} classes")
    axes[0].set_ylabel("validation accuracy (%)")
    plots.legend(made, *axes[0].get_legend_handles_labels())
    return Plot(made, "Mean validation accuracy of the selection seeds. Dotted: the learning rate that was chosen.")


def table(config: Config, curves: Curves, accuracies: Accuracies) -> Table:
    """Tuned rates and accuracies of every cell."""
    rows = []
    for k in config.num_classes:
        for arm in ARMS:
            tuned = accuracies["tuned", arm, k].mean()
            shared = f"{accuracies['shared', arm, k].mean():.2f}" if arm != SOFTMAX_CE else "as tuned"
            numbers = [f"{x:.3g}" for x in (10.0 ** (best(curves[arm, k]) / 2), ratio(curves, arm, k))]
            rows.append([f"{k}", arm, *numbers, f"{gradient_ratio(arm, k):.3g}", f"{tuned:.2f}", shared])
    header = ["classes", "arm", "rate", "ratio", "theory", "accuracy", "at the shared rate"]
    caption = (
        "The tuned learning rates, their ratio to that of cross-entropy, and the test accuracy in %, mean over seeds. "
        "The shared rate is that of cross-entropy."
    )
    return Table(caption, header, rows)


def report(config: Config, records: Sequence[Record]) -> Section:
    """The rates that squared error needs, and what is left of the lead once it has them."""
    curves: Curves = {}
    accuracies: Accuracies = {}
    for settings, values in records:
        part, arm, k = str(settings["part"]), str(settings["arm"]), int(settings["num_classes"])
        if part == "rates":
            columns = (np.asarray(values[name]).tolist() for name in ("half_decades", "validation", "error"))
            curves[arm, k] = {round(rate): (mean, error) for rate, mean, error in zip(*columns, strict=True)}
        else:
            accuracies[part, arm, k] = np.asarray(values["test"])
    text = (
        f"A linear softmax model tells $K$ Gaussian clusters apart, in {config.num_features} dimensions. Its weights "
        "start small, so $p$ is uniform before the first step. There the gradient of half the squared error, summed "
        "over classes, is that of cross-entropy divided by $K$. The mean over classes divides it by $K / 2$ again.\n\n"
        "A learning rate that suits cross-entropy is thus too small for squared error. The rate is tuned for each arm "
        "and each $K$. The lead is the accuracy of softmax + cross-entropy less that of softmax + squared error."
    )
    few, many = min(config.num_classes), max(config.num_classes)
    abstract = [
        f"With {many} classes softmax + squared error trails by {gap(accuracies, many, 'shared').mean():.1f} points at "
        f"the learning rate of cross-entropy and by {gap(accuracies, many).mean():.1f} at its own, which is "
        f"{ratio(curves, SUM, many):.3g} times as large; with {few} classes by {gap(accuracies, few).mean():.1f}."
    ]
    hypotheses = [ratio_hypothesis(config, curves), gap_hypothesis(config, accuracies)]
    figures = [figure(config, curves, accuracies), rates_figure(config, curves)]
    return Section("Number of classes", abstract, text, figures, hypotheses, [table(config, curves, accuracies)])
