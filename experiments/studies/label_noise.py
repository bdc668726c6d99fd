"""Label noise: what cross-entropy and squared error make of wrong labels, and what early stopping hides.

A share c of the labels of the training and validation examples is wrong: exactly round(c n) of n labels are replaced,
each by one of the other classes, drawn uniformly. Larger shares replace the same labels and more. Test labels are
clean. The right class stays the most frequent one while c < (K - 1) / K. So the limit for many examples stays right,
for every arm. A model that can memorise all labels does not reach this limit.

Half the Brier score of an example is at most 1. Cross-entropy has no bound, so wrong labels pull harder under it. A
loss whose sum over all labels is constant is robust to symmetric noise: Ghosh, Kumar and Sastry (2017). The sum of the
Brier score is bounded, and that of cross-entropy is not.

The model classifies digits (64 pixels, 10 classes) through one ReLU layer, trained with Adam. Every seed draws its own
split, wrong labels and initial weights. The arms are paired: equal seeds have equal draws.

Seeds that select the learning rate are not report seeds. Rates within one standard error of the best are ties: the
middle one is taken. The half-decade grid is widened while the best rate lies at its edge. The rate of an arm is tuned
at the last epoch, in two ways:

- "to generalise": the highest accuracy on noisy validation labels. A small rate can win, since it stops early too.
- "to memorise": the highest accuracy on the noisy training labels.

Noisy labels order classifiers as clean ones do. A classifier of accuracy a has the expected accuracy on noisy labels

    a (1 - c) + (1 - a) c / (K - 1)

"Last" is the last epoch, and "best" the epoch with the highest validation accuracy. An arm may lead since it memorises
later. So the arms are also compared at the epochs where each has memorised half of the wrong labels. Intervals are
those of Nadeau and Bengio, since splits of one data set overlap.

Sources: Ghosh, Kumar and Sastry (2017), AAAI; Zhang et al. (2017), ICLR (memorisation); Nadeau and Bengio (2003);
Cover and Hart (1967), IEEE Trans. Inf. Theory 13(1).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jaxtyping import Float64, Int32

from experiments import arms, data, plots, stats, tuning
from experiments.arms import LINEAR_SE, SOFTMAX_CE, SOFTMAX_SE
from experiments.config import distinct, split
from experiments.findings import Hypothesis, Plot, Section, Table
from experiments.results import Progress, Record
from jprob import mle

ARMS = (SOFTMAX_CE, SOFTMAX_SE, LINEAR_SE)
GENERALISE, MEMORISE = "to generalise", "to memorise"
WAYS = (GENERALISE, MEMORISE)
LEVEL = 0.5  # the share of wrong labels memorised at which arms are compared
OUTPUT_STD = 0.01
SELECTION_SEED, REPORT_SEED = 40_000, 60_000  # the first; the verdicts' rules were fixed before the report seeds ran

Share = Annotated[float, msgspec.Meta(ge=0, le=0.8)]
Decade = Annotated[float, msgspec.Meta(ge=-8, le=4, multiple_of=0.5)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The rates of Adam go from one decimal logarithm to another, in steps of half a decade."""

    shares: Annotated[list[Share], msgspec.Meta(min_length=2, max_length=8)]
    judged_share: Share
    hidden_units: Count
    epochs: Count
    batch_size: Count
    decades: Annotated[list[Decade], msgspec.Meta(min_length=2, max_length=2)]
    widen_at_most: Annotated[int, msgspec.Meta(ge=0, le=20)]
    selection_seeds: Count
    report_seeds: Annotated[int, msgspec.Meta(ge=2, le=1000)]
    trained_together: Count

    def __post_init__(self):
        distinct(self, "shares")
        part = len(self.shares) == 1  # made by `parts` alone, since a file has two or more
        if not part and not (self.judged_share and {0.0, self.judged_share} <= {*self.shares}):
            raise ValueError(f"shares: expected 0 and the judged share, which is above 0, got {self.shares}")
        if self.decades[0] > self.decades[1]:
            raise ValueError(f"decades: expected the lower end first, got {self.decades}")

    @property
    def cells(self) -> list[tuple[float, str]]:
        """The share of wrong labels, and the way to tune."""
        cells = [(share, GENERALISE) for share in sorted(self.shares)]
        return cells + [(self.judged_share, MEMORISE)] * (self.judged_share in self.shares)


class Member(NamedTuple):
    """One training; the rate in half-decades."""

    share: float
    rate: int
    seed: int


def corrupted(labels: Int32[np.ndarray, " n"], share: float, num_classes: int, generator: np.random.Generator):
    """The labels with a share of them wrong. Equal generators replace the same labels for a smaller share."""
    order = generator.permutation(len(labels))
    others = (labels + generator.integers(1, num_classes, len(labels))) % num_classes
    chosen = order[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[chosen] = others[chosen]
    return noisy


def outputs(params, x):
    """Logits, through one layer of ReLU."""
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"][None]


def drawn(member: Member, hidden_units: int):
    """Initial params, the split with its wrong labels, and the clean training labels: all by the seed."""
    digits, generator = data.resampled("digits", member.seed), np.random.default_rng(member.seed)
    features, classes = digits.train.features.shape[1], digits.num_classes
    kernels = {
        "hidden": generator.normal(size=(features, hidden_units)) * np.sqrt(2 / (features + hidden_units)),
        "output": generator.normal(size=(hidden_units, classes)) * OUTPUT_STD,
    }
    params = {name: {"kernel": kernel, "bias": np.zeros(kernel.shape[1])} for name, kernel in kernels.items()}
    train, validation = (
        part._replace(labels=corrupted(part.labels, member.share, classes, generator)) for part in digits[:2]
    )
    return jax.tree.map(np.float32, params), (train, validation, digits.test), digits.train.labels


def trainer(arm: str, config: Config) -> Callable[[Sequence[Member]], dict[str, np.ndarray]]:
    """A function from members to the curves of each by epoch; it compiles once, for `trained_together` at a time."""
    steps = -(-len(data.load("digits").train.labels) // config.batch_size)
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)

    def nll(params, batch, key):
        return arms.loss(arm, outputs(params, batch[0]), batch[1])

    def accuracy(params, split):
        z = outputs(params, split.features)
        right = jnp.mean(jnp.argmax(z, axis=-1) == split.labels)
        return jnp.where(jnp.isfinite(z).all(), 100 * right, 0)  # a run that diverges is wrong everywhere

    @jax.jit
    @jax.vmap
    def members(params, rate, key, splits, clean):
        train, validation, test = splits

        wrong = train.labels != clean

        def epoch(state, _):
            state, _ = mle.run(nll, optimizer, state, train, num_steps=steps, batch_size=config.batch_size)
            right = jnp.argmax(outputs(state.params, train.features), axis=-1) == train.labels
            memorised = jnp.sum(wrong & right) / jnp.maximum(jnp.sum(wrong), 1)
            scores = {"validation": accuracy(state.params, validation), "test": accuracy(state.params, test)}
            return state, scores | {"training": 100 * jnp.mean(right), "memorised": memorised}

        state = optax.tree.set(mle.init(params, optimizer, key), learning_rate=rate)
        return jax.lax.scan(epoch, state, length=config.epochs)[1]

    def train(chunk: Sequence[Member]) -> dict[str, np.ndarray]:
        params, splits, clean = jax.tree.map(lambda *x: np.stack(x), *(drawn(m, config.hidden_units) for m in chunk))
        keys = jnp.stack([jax.random.key(member.seed) for member in chunk])
        rates = np.array([10.0 ** (m.rate / 2) for m in chunk], np.float32)
        measured = members(params, rates, keys, splits, clean)
        return {name: np.asarray(x, np.float64) for name, x in measured.items()}

    return lambda wanted: tuning.together(train, wanted, config.trained_together)


def tuned_rates(train, config: Config) -> dict[tuple[float, str], tuning.Curve]:
    """The curve of each cell. Both ways to tune share their trainings."""
    seeds = range(SELECTION_SEED, SELECTION_SEED + config.selection_seeds)
    low, high = (round(2 * end) for end in config.decades)
    final: dict[Member, tuple[float, float]] = {}  # accuracy to generalise and to memorise

    def score(wanted):
        members = [Member(share, rate, seed) for (share, _), rate, seed in wanted]
        fresh = [member for member in dict.fromkeys(members) if member not in final]
        if fresh:
            measured = train(fresh)
            last = measured["validation"][:, -1], measured["training"][:, -1]
            final.update(zip(fresh, zip(*last, strict=True), strict=True))
        return np.array([final[m][WAYS.index(way)] for m, ((_, way), _, _) in zip(members, wanted, strict=True)])

    return tuning.tune(score, config.cells, range(low, high + 1), seeds, config.widen_at_most)


def parts(config: Config) -> list[Config]:
    """Every share of wrong labels is a part."""
    return split(config, "shares")


def run(config: Config) -> Iterator[Record | Progress]:
    """For each share of wrong labels and arm: the validation accuracy of every rate, then the report seeds."""
    jobs = [(part, arm) for part in parts(config) for arm in ARMS]
    for done, (part, arm) in enumerate(jobs):
        yield Progress(done / len(jobs), f"{part.shares[0]:.0%} wrong labels, {arm}: rates")
        train = trainer(arm, part)
        tried = tuned_rates(train, part)
        for (share, tuned), curve in tried.items():
            rates = sorted(curve)
            values = {"rate": 10 ** (np.array(rates) / 2), "accuracy": np.array([curve[rate][0] for rate in rates])}
            yield Record({"part": "rates", "arm": arm, "share": share, "tuned": tuned}, values)
        yield Progress((done + 0.6) / len(jobs), f"{part.shares[0]:.0%} wrong labels, {arm}: seeds")
        seeds = range(REPORT_SEED, REPORT_SEED + config.report_seeds)
        wanted = [(cell, Member(cell[0], tuning.best(tried[cell]), seed)) for cell in part.cells for seed in seeds]
        measured = train([member for _, member in wanted])
        for i, ((share, tuned), member) in enumerate(wanted):
            values = {name: column[i] for name, column in measured.items()} | {"rate": 10.0 ** (member.rate / 2)}
            values |= {"at_edge": float(tuning.outside(tried[share, tuned]) is not None)}
            yield Record({"part": "seeds", "arm": arm, "share": share, "tuned": tuned, "seed": member.seed}, values)


class Runs(NamedTuple):
    """The report seeds of one arm, share and tuning."""

    test: Float64[np.ndarray, "seeds epochs"]
    validation: Float64[np.ndarray, "seeds epochs"]
    memorised: Float64[np.ndarray, "seeds epochs"]
    rate: float
    at_edge: bool  # of its grid

    @property
    def last(self) -> np.ndarray:
        """Test accuracy at the last epoch."""
        return self.test[:, -1]

    @property
    def best(self) -> np.ndarray:
        """Test accuracy at the epoch with the highest validation accuracy, the first of equals."""
        return np.take_along_axis(self.test, self.validation.argmax(1)[:, None], 1)[:, 0]

    @property
    def halfway(self) -> np.ndarray:
        """Test accuracy at the first epoch with half of the wrong labels memorised; NaN for a seed without."""
        reached = self.memorised >= LEVEL
        at = np.take_along_axis(self.test, reached.argmax(1)[:, None], 1)[:, 0]
        return np.where(reached.any(axis=1), at, np.nan)


Cells = dict[tuple[str, float, str], Runs]  # (arm, share of wrong labels, way to tune)


def cells_of(config: Config, records: Sequence[Record]) -> Cells:
    """The report seeds by cell, in the order of the seeds."""
    cells: Cells = {}
    for arm in ARMS:
        for share, tuned in config.cells:
            wanted = {"part": "seeds", "arm": arm, "share": share, "tuned": tuned}
            rows = [r for r in records if wanted.items() <= r.settings.items()]
            rows.sort(key=lambda r: r.settings["seed"])
            test, validation, memorised, rate, at_edge = (
                np.array([r.values[name] for r in rows]) for name in Runs._fields
            )
            cells[arm, share, tuned] = Runs(test, validation, memorised, float(rate[0]), bool(at_edge[0]))
    return cells


def interval(differences: np.ndarray) -> stats.Interval:
    """The 95 % interval of a mean over seeds, each with its own split."""
    digits = data.load("digits")
    return stats.resampled_interval(differences, len(digits.test.labels) / len(digits.train.labels))


def told(differences: np.ndarray) -> str:
    """Mean and 95 % interval, in points."""
    low, high = interval(differences)
    return f"{differences.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def sign(differences: np.ndarray) -> str:
    """The verdict of the claim that the mean is positive."""
    low, high = interval(differences)
    return "holds" if low > 0 else "falsified" if high < 0 else "undecided"


def leads(cells: Cells, share: float, tuned: str, arm: str = SOFTMAX_SE) -> tuple[np.ndarray, np.ndarray]:
    """The arm's lead over softmax + cross-entropy at the last and at the best epoch, in points."""
    squared, ce = cells[arm, share, tuned], cells[SOFTMAX_CE, share, tuned]
    return squared.last - ce.last, squared.best - ce.best


def edges(cells: Cells, share: float, tuned: str) -> list[str]:
    """Arms whose best rate may lie beyond the grid."""
    return [
        f"The best learning rate of {arm}, {tuning.rate_text(cells[arm, share, tuned].rate)}, lies at the edge of its "
        "grid."
        for arm in ARMS
        if cells[arm, share, tuned].at_edge
    ]


def halfway_text(cells: Cells, share: float, tuned: str) -> str:
    """The lead at equal memorised shares, over the seeds where both arms get there."""
    squared, ce = (cells[arm, share, tuned].halfway for arm in (SOFTMAX_SE, SOFTMAX_CE))
    lead = squared - ce
    lead = lead[np.isfinite(lead)]
    if len(lead) < 2:
        return f"In {len(lead)} of {len(squared)} seeds both softmax arms memorise {LEVEL:.0%} of the wrong labels."
    return (
        f"At equal memorised shares, {LEVEL:.0%} of the wrong labels, the lead is {told(lead)} ({len(lead)} of "
        f"{len(squared)} seeds)."
    )


def hypotheses(config: Config, cells: Cells, tuned: str) -> list[Hypothesis]:
    """The order at the last epoch, and what early stopping hides of it, with rates tuned one way."""
    share = config.judged_share
    last, best = leads(cells, share, tuned)
    (clean, _), (linear, linear_best) = leads(cells, 0.0, GENERALISE), leads(cells, share, tuned, LINEAR_SE)
    learnt = ", ".join(f"{cells[arm, share, tuned].memorised[:, -1].mean():.0%} ({arm})" for arm in ARMS)
    drop = [(runs.best - runs.last).mean() for runs in (cells[arm, share, tuned] for arm in ARMS[:2])]
    order = Hypothesis(
        f"Label noise favours squared error: with {share:.0%} wrong labels and rates tuned {tuned}, softmax + squared "
        "error ends with a higher test accuracy than softmax + cross-entropy.",
        f"lead of softmax + squared error at the last epoch, in points of accuracy: {told(last)}",
        "the 95 % interval of the lead lies below 0; undecided while it holds 0",
        sign(last),
        [
            f"The lead is {told(clean)} points without noise, tuned to generalise.",
            f"From the best epoch to the last, squared error loses {drop[1]:.1f} points, cross-entropy {drop[0]:.1f}.",
            f"Wrong training labels memorised at the end: {learnt}.",
            halfway_text(cells, share, tuned),
            f"The lead of linear + squared error over softmax + cross-entropy is {told(linear)}.",
            *edges(cells, share, tuned),
        ],
    )
    stopping = Hypothesis(
        f"Early stopping hides it: with {share:.0%} wrong labels and rates tuned {tuned}, the lead of softmax + "
        "squared error is smaller at the best epoch than at the last.",
        f"lead at the last epoch less lead at the best, in points of accuracy: {told(last - best)}",
        "the 95 % interval of the difference of the leads lies below 0; undecided while it holds 0",
        sign(last - best),
        [f"The lead at the best epoch is {told(best)} points. That of linear + squared error is {told(linear_best)}."],
    )
    return [order, stopping]


def curves_figure(config: Config, cells: Cells) -> Plot:
    """Test accuracy against the epoch for both ways to tune, and against the share of wrong labels memorised."""
    share = config.judged_share
    made, axes = plots.figure(columns=2, height=3.6)
    for arm in ARMS:
        colour, (cautious, runs) = arms.COLOURS[arm], (cells[arm, share, tuned] for tuned in WAYS)
        mean, spread = runs.test.mean(axis=0), runs.test.std(axis=0, ddof=1)
        epochs = np.arange(1, len(mean) + 1)
        axes[0].plot(epochs, mean, color=colour, label=arm)
        axes[0].fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axes[0].plot(epochs, cautious.test.mean(axis=0), ":", color=colour)
        axes[1].plot(100 * runs.memorised.mean(axis=0), mean, color=colour)
    axes[0].set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(100 * (1 - share) - 20, 100))
    axes[1].set(xlabel="wrong labels memorised (%)", xlim=(0, 100))
    axes[1].sharey(axes[0])
    plots.legend(made, *axes[0].get_legend_handles_labels())
    return Plot(
        made,
        f"Test accuracy with {share:.0%} wrong labels, mean over seeds. Solid: rates tuned to memorise, with one "
        "deviation of the seeds. Dotted: rates tuned to generalise. Right: each epoch of the solid lines.",
    )


def shares_figure(config: Config, cells: Cells) -> Plot:
    """Accuracy at the last and at the best epoch against the share of wrong labels."""
    made, axes = plots.figure(columns=2, height=3.6)
    shares = np.array(sorted(config.shares))
    for axis, name in zip(axes, ("last", "best"), strict=True):
        for arm in ARMS:
            values = [getattr(cells[arm, share, GENERALISE], name) for share in shares]
            mean = np.array([v.mean() for v in values])
            bars = np.abs(np.array([interval(v) for v in values]).T - mean)
            axis.errorbar(100 * shares, mean, yerr=bars, color=arms.COLOURS[arm], marker="o", capsize=2, label=arm)
            memorised = getattr(cells[arm, config.judged_share, MEMORISE], name).mean()
            axis.plot(100 * config.judged_share, memorised, "x", color=arms.COLOURS[arm], markersize=8)
        axis.plot(100 * shares, 100 * (1 - shares), **plots.THEORY, label="nearest training label")
        axis.set(xlabel="wrong labels (%)", title=f"{name} epoch")
        axis.sharey(axes[0])
    axes[0].set_ylabel("test accuracy (%)")
    plots.legend(made, *axes[0].get_legend_handles_labels())
    return Plot(
        made,
        "Test accuracy with rates tuned to generalise, and 95 % intervals. Crosses: rates tuned to memorise. Dashed: a "
        "copy of the label of the nearest training example, if that example has the right class.",
    )


def table(config: Config, cells: Cells) -> Table:
    """All cells."""
    rows = []
    for (arm, share, tuned), runs in cells.items():
        memorised = f"{runs.memorised[:, -1].mean():.0%}" if share else "-"
        numbers = f"{runs.last.mean():.1f}", f"{runs.best.mean():.1f}", memorised
        rows.append([arm, f"{share:.0%}", tuned, tuning.rate_text(runs.rate), *numbers])
    header = ["arm", "wrong labels", "tuned", "rate", "last (%)", "best (%)", "memorised"]
    return Table(
        "Test accuracy at the last and at the best epoch, and the share of wrong labels memorised.", header, rows
    )


def report(config: Config, records: Sequence[Record]) -> Section:
    """The order of the arms under label noise."""
    cells, share = cells_of(config, records), config.judged_share
    text = (
        "A share of the training and validation labels is replaced by another class, drawn uniformly. Test labels are "
        "clean. A model with enough weights memorises wrong labels, and loses accuracy while it does. The loss of an "
        "example is bounded under squared error of the probabilities, and unbounded under cross-entropy.\n\n"
        "The lead is the test accuracy of an arm less that of softmax + cross-entropy, in points. The best epoch is "
        "that with the highest accuracy on noisy validation labels. The learning rate is tuned for each arm by an "
        "accuracy on noisy labels at the last epoch: that of validation (to generalise) or of training (to memorise)."
    )
    lasts = {tuned: leads(cells, share, tuned)[0] for tuned in WAYS}
    abstract = [
        f"{share:.0%} wrong labels: softmax + squared error ends {told(lasts[GENERALISE])} points above softmax + "
        f"cross-entropy with rates tuned to generalise, and {told(lasts[MEMORISE])} with rates tuned to memorise."
    ]
    claims = [h for tuned in WAYS for h in hypotheses(config, cells, tuned)]
    figures = [curves_figure(config, cells), shares_figure(config, cells)]
    return Section("Label noise", abstract, text, figures, claims, [table(config, cells)])
