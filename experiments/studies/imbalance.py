"""Imbalance: rare classes lag, and plain accuracy does not show it.

One class is frequent, and each of R rare classes has one example for every r of it. The features of a class are normal
with covariance I. The center of class k lies at distance a from 0, on axis k. The best classifier for the prior pi is
linear: it predicts the class with the largest a x_k + ln pi_k. Its recall of class k is

    integral of phi(t) prod_(j != k) Phi(t + a + (ln pi_k - ln pi_j) / a) dt

with the normal density phi and distribution function Phi. Rare classes have the lower recall even under the best
classifier. An arm lags if it has less.

A linear model starts from zeros: all classes are equally probable. The weights of a rare example in the gradient differ
between the arms once the model knows the prior. Its probability is then about 1 / r. The gradient of cross-entropy in
the logit of the right class is p - 1. That of half the Brier score is smaller by a factor of about 2 p.

Protocol: every seed draws its own data. The arms are paired: equal seeds have equal data. Both arms take the same
number of SGD steps. The learning rate is tuned for each arm and ratio, on seeds that are not report seeds. The
criterion is the balanced accuracy of validation data at the last step. Rates within one standard error of the best are
ties: the middle one is taken. The half-decade grid is widened while the best
rate lies at its edge. Validation and test data have equal classes.
Their examples are weighted by the prior for accuracy and F1. Balanced accuracy and recall do not depend on the weights.
Data sets are independent, so intervals are bootstrap intervals.

Sources: Brodersen et al. (2010), ICPR (balanced accuracy); He and Garcia (2009), IEEE Trans. Knowl. Data Eng. 21(9).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jaxtyping import Float64, Int
from scipy.stats import norm

from experiments import arms, plots, stats, tuning
from experiments.arms import SOFTMAX_CE, SOFTMAX_SE
from experiments.config import distinct
from experiments.findings import Hypothesis, Plot, Section, Table, decided
from experiments.results import Progress, Record
from jprob import categorical, metrics, mle

ARMS = (SOFTMAX_CE, SOFTMAX_SE)
MEASURES = {
    "accuracy": "accuracy",
    "balanced": "balanced accuracy",
    "f1": "macro F1",
    "recall": "rare recall",
    "p_true": "rare probability",
}
MARGIN = 0.5  # accuracy points that count as hidden
EARLY = 0.1  # the share of the steps after which "early" is measured
SELECTION_SEED, REPORT_SEED = 70_000, 80_000  # the first; the verdicts' rules were fixed before these seeds ran
GRID = np.linspace(-9, 9, 4001)  # of the normal integral; what lies beyond weighs 1e-18

Ratio = Annotated[int, msgspec.Meta(ge=1, le=1000)]
Decade = Annotated[float, msgspec.Meta(ge=-8, le=4, multiple_of=0.5)]
Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The rates of SGD go from one decimal logarithm to another, in steps of half a decade."""

    ratios: Annotated[list[Ratio], msgspec.Meta(min_length=2, max_length=8)]
    rare_classes: Annotated[int, msgspec.Meta(ge=1, le=20)]
    distance: Annotated[float, msgspec.Meta(gt=0, le=20)]
    other_features: Annotated[int, msgspec.Meta(ge=0, le=100)]
    train_examples: Annotated[int, msgspec.Meta(ge=100, le=100_000)]
    examples_per_class: Count
    batch_size: Count
    num_steps: Count
    log_every: Count
    decades: Annotated[list[Decade], msgspec.Meta(min_length=2, max_length=2)]
    widen_at_most: Annotated[int, msgspec.Meta(ge=0, le=20)]
    selection_seeds: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    report_seeds: Annotated[int, msgspec.Meta(ge=2, le=1000)]
    trained_together: Count

    def __post_init__(self):
        distinct(self, "ratios")
        if self.num_steps % self.log_every:
            raise ValueError(f"num_steps: expected a multiple of log_every, got {self.num_steps}")
        if self.decades[0] > self.decades[1]:
            raise ValueError(f"decades: expected the lower end first, got {self.decades}")
        if min(self.counts(ratio).min() for ratio in self.ratios) < 1:
            raise ValueError("train_examples: expected enough for one example of each class")

    @property
    def early(self) -> int:
        """The number of the row of a curve that "early" means."""
        return max(0, round(EARLY * self.num_steps / self.log_every) - 1)

    def counts(self, ratio: int) -> Int[np.ndarray, " K"]:
        """Training examples of each class, the frequent one first."""
        rare = round(self.train_examples / (ratio + self.rare_classes))
        return np.array([self.train_examples - rare * self.rare_classes, *[rare] * self.rare_classes])


def best_recalls(prior: Float64[np.ndarray, " K"], distance: float) -> Float64[np.ndarray, " K"]:
    """The recall of each class under the best classifier for the prior."""
    shift = distance + (np.log(prior)[:, None] - np.log(prior)) / distance
    below = norm.cdf(GRID[:, None, None] + shift)
    below[:, np.arange(len(prior)), np.arange(len(prior))] = 1
    return np.trapezoid(norm.pdf(GRID)[:, None] * below.prod(axis=2), GRID, axis=0)


class Member(NamedTuple):
    """One training; the rate in half-decades."""

    ratio: int
    rate: int
    seed: int


def drawn(ratio: int, seed: int, config: Config):
    """Training, validation and test data: features and labels. Equal seeds share the draws of all ratios."""
    generator = np.random.default_rng(seed)
    equal = np.full(config.rare_classes + 1, config.examples_per_class)
    for counts in (config.counts(ratio), equal, equal):
        labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        features = generator.normal(size=(len(labels), len(counts) + config.other_features))
        features[np.arange(len(labels)), labels] += config.distance
        yield np.float32(features), labels


def trainer(arm: str, config: Config) -> Callable[[Sequence[Member]], dict[str, np.ndarray]]:
    """A function from members to the curves of each: one row every `log_every` steps. It compiles once."""
    classes = config.rare_classes + 1
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)

    def outputs(params, x):
        return x @ params["kernel"] + params["bias"][None]

    def nll(params, batch, key):
        z, labels = outputs(params, batch[0]), batch[1]
        return categorical.cross_entropy(z, labels) if arm == SOFTMAX_CE else categorical.brier_score(z, labels) / 2

    def scores(params, split, prior):
        z, labels = outputs(params, split[0]), split[1]
        given = categorical.mode(z)
        matrix = metrics.confusion_matrix(labels, given, num_classes=classes, weights=prior[labels])
        p_true = jnp.exp(-categorical.cross_entropy(z, labels))
        rare = {"recall": jnp.mean(metrics.recall(matrix)[1:]), "p_true": jnp.mean(p_true, where=labels > 0)}
        plain, balanced = metrics.accuracy(matrix), metrics.balanced_accuracy(matrix)
        return {"accuracy": plain, "balanced": balanced, "f1": metrics.f1_score(matrix, average="macro"), **rare}

    @jax.jit
    @jax.vmap
    def members(rate, key, prior, train, validation, test):
        def piece(state, _):
            taken = config.log_every
            state, _ = mle.run(nll, optimizer, state, train, num_steps=taken, batch_size=config.batch_size)
            measured = scores(state.params, test, prior)
            return state, measured | {"validation": scores(state.params, validation, prior)["balanced"]}

        params = {"kernel": jnp.zeros((train[0].shape[1], classes)), "bias": jnp.zeros(classes)}
        state = optax.tree.set(mle.init(params, optimizer, key), learning_rate=rate)
        return jax.lax.scan(piece, state, length=config.num_steps // config.log_every)[1]

    def train(chunk: Sequence[Member]) -> dict[str, np.ndarray]:
        sets = jax.tree.map(lambda *x: np.stack(x), *(tuple(drawn(m.ratio, m.seed, config)) for m in chunk))
        priors = np.stack([config.counts(m.ratio) / config.train_examples for m in chunk]).astype(np.float32)
        keys = jnp.stack([jax.random.key(m.seed) for m in chunk])
        rates = np.array([10.0 ** (m.rate / 2) for m in chunk], np.float32)
        curves = members(rates, keys, priors, *sets)
        return {name: 100 * np.asarray(curve, np.float64) for name, curve in curves.items()}

    return lambda wanted: tuning.together(train, wanted, config.trained_together)


def run(config: Config) -> Iterator[Record | Progress]:
    """For each arm: the validation curve of every ratio over the rates, then the report seeds at the best rate."""
    for done, arm in enumerate(ARMS):
        yield Progress(done / len(ARMS), f"{arm}: rates")
        train = trainer(arm, config)
        seeds = range(SELECTION_SEED, SELECTION_SEED + config.selection_seeds)
        low, high = (round(2 * end) for end in config.decades)

        def score(wanted, train=train):
            return train([Member(*each) for each in wanted])["validation"][:, -1]

        tried = tuning.tune(score, config.ratios, range(low, high + 1), seeds, config.widen_at_most)
        for ratio, curve in tried.items():
            rates = sorted(curve)
            values = {"rate": 10 ** (np.array(rates) / 2), "balanced": np.array([curve[rate][0] for rate in rates])}
            yield Record({"part": "rates", "arm": arm, "ratio": ratio}, values)
        yield Progress((done + 0.7) / len(ARMS), f"{arm}: seeds")
        seeds = range(REPORT_SEED, REPORT_SEED + config.report_seeds)
        members = [Member(ratio, tuning.best(tried[ratio]), seed) for ratio in config.ratios for seed in seeds]
        measured = train(members)
        for i, member in enumerate(members):
            values = {name: measured[name][i] for name in MEASURES} | {"rate": 10.0 ** (member.rate / 2)}
            values |= {"at_edge": float(tuning.outside(tried[member.ratio]) is not None)}
            yield Record({"part": "seeds", "arm": arm, "ratio": member.ratio, "seed": member.seed}, values)


Curves = dict[tuple[str, int], dict[str, Float64[np.ndarray, "seeds rows"]]]  # (arm, ratio) -> measure -> curves


def curves_of(config: Config, records: Sequence[Record]) -> Curves:
    """The report seeds, in their order, with their rates, and whether a rate lies at the edge of its grid."""
    curves: Curves = {}
    for arm in ARMS:
        for ratio in config.ratios:
            wanted = {"part": "seeds", "arm": arm, "ratio": ratio}
            rows = [r for r in records if wanted.items() <= r.settings.items()]
            rows.sort(key=lambda r: r.settings["seed"])
            names = *MEASURES, "rate", "at_edge"
            curves[arm, ratio] = {name: np.array([r.values[name] for r in rows]) for name in names}
    return curves


def gap(curves: Curves, ratio: int, name: str, row: int = -1) -> np.ndarray:
    """Paired differences, cross-entropy less squared error, in points."""
    return curves[SOFTMAX_CE, ratio][name][:, row] - curves[SOFTMAX_SE, ratio][name][:, row]


def told(differences: np.ndarray) -> str:
    """Mean and 95 % interval, in points."""
    low, high = stats.bca_interval(differences)
    return f"{differences.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def constant(config: Config, ratio: int) -> tuple[float, float]:
    """Accuracy, which is the base rate, and balanced accuracy of the constant frequent class, in points."""
    prior = (config.counts(ratio) / config.train_examples).astype(np.float32)
    labels = jnp.arange(len(prior))
    matrix = metrics.confusion_matrix(labels, jnp.zeros_like(labels), num_classes=len(prior), weights=prior)
    return 100 * float(metrics.accuracy(matrix)), 100 * float(metrics.balanced_accuracy(matrix))


def best_scores(config: Config, ratio: int) -> tuple[float, float]:
    """Accuracy and balanced accuracy of the best classifier for the prior, in points."""
    prior = config.counts(ratio) / config.train_examples
    recalls = best_recalls(prior, config.distance)
    return 100 * float(prior @ recalls), 100 * float(recalls.mean())


def lag_hypothesis(config: Config, curves: Curves) -> Hypothesis:
    """Squared error has the lower balanced accuracy."""
    ratio, even = max(config.ratios), min(config.ratios)
    edges = [
        f"The best learning rate of {arm} at 1:{r}, {tuning.rate_text(curves[arm, r]['rate'][0])}, lies at the edge of "
        "its grid."
        for arm in ARMS
        for r in config.ratios
        if curves[arm, r]["at_edge"][0]
    ]
    steps = config.log_every * (config.early + 1)
    balanced = gap(curves, ratio, "balanced")
    return Hypothesis(
        f"Rare classes lag under squared error: at 1:{ratio} and equal steps, its balanced accuracy is lower.",
        f"balanced accuracy, cross-entropy less squared error, in points: {told(balanced)} after {config.num_steps} "
        f"steps; rare recall {told(gap(curves, ratio, 'recall'))}",
        "the 95 % interval of the gap in balanced accuracy holds 0, or lies below it",
        decided(stats.bca_interval(balanced).low > 0),
        [
            f"The gap after {steps} steps is {told(gap(curves, ratio, 'balanced', config.early))} points.",
            f"The gap in accuracy is {told(gap(curves, ratio, 'accuracy'))} points.",
            f"The gap at 1:{even} is {told(gap(curves, even, 'balanced'))} points after {config.num_steps} steps.",
            f"The best classifier has a balanced accuracy of {best_scores(config, ratio)[1]:.1f} % at 1:{ratio} and "
            f"{best_scores(config, even)[1]:.1f} % at 1:{even}. That part of the lag is the prior's.",
            *edges,
        ],
    )


def hidden_hypothesis(config: Config, curves: Curves) -> Hypothesis:
    """Plain accuracy does not show it."""
    ratio = max(config.ratios)
    plain, balanced = (gap(curves, ratio, name) for name in ("accuracy", "balanced"))
    (low, high), (least, most) = stats.bca_interval(plain), stats.bca_interval(balanced)
    hidden, seen = min(low, -high) > -MARGIN and least > MARGIN, max(low, -high) > MARGIN or most < MARGIN
    base, constant_balanced = constant(config, ratio)
    return Hypothesis(
        f"Plain accuracy hides it: at 1:{ratio} the arms differ by less than {MARGIN} points of accuracy, and by more "
        "of balanced accuracy.",
        f"cross-entropy less squared error, in points: accuracy {told(plain)}, balanced accuracy {told(balanced)}",
        f"the 95 % interval of the gap in accuracy lies beyond {MARGIN} points, or that in balanced accuracy below; "
        "undecided while one reaches across",
        "holds" if hidden else "falsified" if seen else "undecided",
        [
            f"Balanced accuracy does not count precision. The gap in macro F1, which does, is "
            f"{told(gap(curves, ratio, 'f1'))} points.",
            f"The constant frequent class has an accuracy of {base:.1f} % and a balanced accuracy of "
            f"{constant_balanced:.1f} %.",
        ],
    )


def steps_figure(config: Config, curves: Curves) -> Plot:
    """Balanced accuracy and the probability of the rare classes against the steps, at the largest ratio."""
    ratio = max(config.ratios)
    made, axes = plots.figure(columns=2, height=3.6)
    steps = np.arange(config.log_every, config.num_steps + 1, config.log_every)
    for axis, name in zip(axes, ("balanced", "p_true"), strict=True):
        for arm in ARMS:
            values, colour = curves[arm, ratio][name], arms.COLOURS[arm]
            mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1)
            axis.plot(steps, mean, color=colour, label=arm)
            axis.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axis.set(xlabel="step", ylim=(0, 100))
    axes[0].axhline(best_scores(config, ratio)[1], **plots.THEORY, label="best classifier for the prior")
    axes[0].set(title="balanced accuracy (%)")
    axes[1].set(title="mean probability of the right class, rare examples (%)")
    plots.legend(made, *axes[0].get_legend_handles_labels())
    return Plot(made, f"Training at 1:{ratio}: mean over seeds, and one deviation of the seeds.")


def ratios_figure(config: Config, curves: Curves) -> Plot:
    """Plain and balanced accuracy against the ratio, with the constant class and the best classifier."""
    made, axes = plots.figure(columns=2, height=3.6)
    ratios = sorted(config.ratios)
    line = np.unique(np.geomspace(ratios[0], ratios[-1], 25).astype(int)).tolist()
    for i, (axis, name) in enumerate(zip(axes, ("accuracy", "balanced"), strict=True)):
        for arm, marker in zip(ARMS, "os", strict=True):
            ends = [curves[arm, ratio][name][:, -1] for ratio in ratios]
            bars = np.abs(np.array([[*stats.bca_interval(v)] for v in ends]).T - [v.mean() for v in ends])
            style = {"color": arms.COLOURS[arm], "marker": marker, "linestyle": "", "capsize": 2, "label": arm}
            axis.errorbar(ratios, [v.mean() for v in ends], yerr=bars, **style)
        axis.plot(line, [best_scores(config, r)[i] for r in line], **plots.THEORY, label="best classifier")
        axis.plot(line, [constant(config, r)[i] for r in line], ":", color=plots.PALETTE[5], label="constant class")
        axis.set(xscale="log", xlabel="examples of the frequent class for a rare one", title=f"{MEASURES[name]} (%)")
        axis.set(ylim=(0, 105))
    plots.legend(made, *axes[0].get_legend_handles_labels())
    return Plot(
        made,
        "Both measures after the last step, with 95 % intervals. A constant class has the accuracy of its base rate.",
    )


def table(config: Config, curves: Curves) -> Table:
    """All measures of every ratio after the last step."""
    rows = []
    for ratio in config.ratios:
        for arm in ARMS:
            each = curves[arm, ratio]
            numbers = [f"{each[name][:, -1].mean():.1f}" for name in MEASURES]
            early = f"{each['p_true'][:, config.early].mean():.1f}"
            rows.append([f"1:{ratio}", arm, tuning.rate_text(each["rate"][0]), *numbers, early])
        for name, pair in (("best classifier", best_scores(config, ratio)), ("constant", constant(config, ratio))):
            rows.append([f"1:{ratio}", name, "-", *(f"{value:.1f}" for value in pair), *["-"] * 4])
    header = ["ratio", "arm", "rate", *MEASURES.values(), "the same, early"]
    return Table(
        f"Measures after the last step, in %, and the rare probability after {EARLY:.0%} of them.", header, rows
    )


def report(config: Config, records: Sequence[Record]) -> Section:
    """The lag of the rare classes."""
    curves, ratio = curves_of(config, records), max(config.ratios)
    text = (
        "One class is frequent, and every rare class has one example for $r$ of it. The classes are normal with equal "
        "covariance, so the best classifier for the prior is linear and known.\n\n"
        "Accuracy weighs examples as they occur. Balanced accuracy is the mean recall of the classes. A constant "
        "prediction of the frequent class has the base rate as its accuracy, and $1 / K$ as its balanced accuracy, for "
        "$K$ classes. Macro F1 is the mean over classes of the harmonic mean of precision and recall. The rare "
        "probability is the mean predicted probability of the right class, over examples of the rare classes."
    )
    base, constant_balanced = constant(config, ratio)
    balanced, plain = (told(gap(curves, ratio, name)) for name in ("balanced", "accuracy"))
    abstract = [
        f"Imbalance of 1:{ratio}: softmax + cross-entropy leads softmax + squared error by {balanced} points of "
        f"balanced accuracy and {plain} of accuracy. A constant class has {base:.1f} % accuracy and "
        f"{constant_balanced:.1f} % balanced accuracy."
    ]
    figures = [steps_figure(config, curves), ratios_figure(config, curves)]
    claims = [lag_hypothesis(config, curves), hidden_hypothesis(config, curves)]
    return Section("Imbalance", abstract, text, figures, claims, [table(config, curves)])
