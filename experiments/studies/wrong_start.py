"""The wrong start: which initialisations make the vanishing gradient of squared error cost accuracy.

The model classifies handwritten digits (64 pixels, 10 classes), and is linear or has one tanh layer. Its output weights
are drawn with a standard deviation s. The larger s, the larger the logits before the first step, and nine of ten are
wrong: with s = 4 most examples start confidently wrong. The arms are three of `experiments.arms`.

The participation ratio `(sum g)^2 / (n sum g^2)` tells how many examples contribute to the first step. g is the norm of
an example's gradient in the logits. The ratio is 1 if all pull alike, 1 / n if one does.

Protocol: every seed draws its own split of the digits, its own initial weights and its own order of the batches. The
arms are paired: equal seeds have equal draws. The learning rate is tuned for each arm, optimizer, model and s. The
criterion is the mean validation accuracy of the selection seeds, over a half-decade grid. The grid is widened while the
best rate lies at its edge. Rates within one standard error of the best are ties: the middle one is taken. Seeds that
select are not seeds that report. A run that diverges counts as accuracy 0. Splits of one data set overlap. So intervals
and p-values are those of Nadeau and Bengio. Holm's correction covers all comparisons of the softmax arms. "No
difference" means the two one-sided tests at half a point.

Sources: Solla, Levin and Fleisher (1988); Nadeau and Bengio (2003); Glorot and Bengio (2010); Hui and Belkin (2021).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import arms, data, plots, stats, tuning
from experiments.arms import LINEAR_SE, SOFTMAX_CE, SOFTMAX_SE
from experiments.config import distinct, split
from experiments.findings import GENTLE_ACCURACY, Hypothesis, Plot, Section, Table, Tier, decided
from experiments.results import Progress, Record, Setting
from jprob import categorical, mle

ARMS = (SOFTMAX_CE, SOFTMAX_SE, LINEAR_SE)
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"sgd": optax.sgd, "adam": optax.adam}
MODEL_NAMES = {"linear": "linear", "mlp": "MLP"}
OPTIMIZER_NAMES = {"sgd": "SGD", "adam": "Adam"}
MARGIN = 0.5  # accuracy points that count as no difference
SELECTION_SEED, REPORT_SEED = 10_000, 20_000  # the first; the verdicts' rules were fixed before these seeds ran

Std = Annotated[float, msgspec.Meta(gt=0, le=100)]
Decade = Annotated[float, msgspec.Meta(ge=-8, le=4, multiple_of=0.5)]
Decades = Annotated[list[Decade], msgspec.Meta(min_length=2, max_length=2)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Grids of learning rates are given by the decimal logarithm of their ends, in steps of half a decade."""

    models: Annotated[list[Literal["linear", "mlp"]], msgspec.Meta(min_length=1, max_length=2)]
    optimizers: Annotated[list[Literal["sgd", "adam"]], msgspec.Meta(min_length=1, max_length=2)]
    ordinary_std: Std
    wrong_std: Std
    other_stds: list[Std]
    hidden_units: Count
    epochs: Count
    batch_size: Count
    sgd_decades: Decades
    adam_decades: Decades
    widen_at_most: Annotated[int, msgspec.Meta(ge=0, le=20)]
    selection_seeds: Count
    report_seeds: Annotated[int, msgspec.Meta(ge=2, le=1000)]
    trained_together: Count

    def __post_init__(self):
        distinct(self, "models", "optimizers")
        for name in ("sgd_decades", "adam_decades"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: expected the lower end first, got [{low}, {high}]")

    @property
    def stds(self) -> list[float]:
        """All standard deviations, ascending."""
        return sorted({self.ordinary_std, self.wrong_std, *self.other_stds})

    def rates(self, optimizer: str) -> list[int]:
        """The grid of an optimizer, in half-decades."""
        low, high = self.sgd_decades if optimizer == "sgd" else self.adam_decades
        return list(range(round(2 * low), round(2 * high) + 1))


class Member(NamedTuple):
    """One training: its output weights' standard deviation, learning rate in half-decades, and seed."""

    std: float
    rate: int
    seed: int


def outputs(params, x):
    """Logits of the model that `params` describe: linear, or through one layer of tanh."""
    if "hidden" in params:
        x = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return x @ params["output"]["kernel"] + params["output"]["bias"][None]


def initial_params(model: str, member: Member, num_features: int, num_classes: int, hidden_units: int):
    """Drawn on the host by the seed, so that every arm, std and device starts from the same numbers."""
    generator = np.random.Generator(np.random.PCG64(member.seed))
    params, width = {}, num_features
    if model == "mlp":
        kernel = generator.normal(size=(num_features, hidden_units)) * np.sqrt(2 / (num_features + hidden_units))
        params["hidden"] = {"kernel": kernel, "bias": np.zeros(hidden_units)}
        width = hidden_units
    kernel = member.std * generator.normal(size=(width, num_classes))
    params["output"] = {"kernel": kernel, "bias": np.zeros(num_classes)}
    return jax.tree.map(np.float32, params)


def participation(arm: str, z, labels):
    """(sum g)^2 / (n sum g^2), g the norm of each example's gradient in its logits."""
    gradient = jax.grad(lambda z: jnp.sum(arms.loss(arm, z, labels)))(z)
    # Relative to the largest entry, the squares of e^-60 stay in range.
    largest = jnp.maximum(jnp.max(jnp.abs(gradient)), jnp.finfo(gradient.dtype).tiny)
    size = jnp.linalg.norm(gradient / largest, axis=-1)
    return jnp.square(jnp.sum(size)) / (size.size * jnp.sum(jnp.square(size)))


def scores(arm: str, params, split: data.Split) -> dict[str, jax.Array]:
    """Accuracy in points, with the proper scores where the outputs are logits; accuracy 0 where they are not finite."""
    z = outputs(params, split.features)
    right = jnp.argmax(z, axis=-1) == split.labels
    values = {"accuracy": jnp.where(jnp.isfinite(z).all(), 100 * jnp.mean(right), 0)}
    if arm != LINEAR_SE:
        values["nll"] = jnp.mean(categorical.cross_entropy(z, split.labels))
        values["brier"] = jnp.mean(categorical.brier_score(z, split.labels))
    return values


def trainer(model: str, optimizer_name: str, arm: str, config: Config) -> Callable[[Sequence[Member]], dict]:
    """A function from members to what was measured of each; it compiles once, for `trained_together` at a time."""
    digits = data.load("digits")
    steps = -(-len(digits.train.labels) // config.batch_size)
    optimizer = optax.inject_hyperparams(OPTIMIZERS[optimizer_name])(learning_rate=0.0)

    def nll(params, batch, key):
        return arms.loss(arm, outputs(params, batch[0]), batch[1])

    @jax.jit
    @jax.vmap
    def members(params, rate, key, train, validation, test):
        def epoch(state, _):
            state, _ = mle.run(nll, optimizer, state, train, num_steps=steps, batch_size=config.batch_size)
            return state, scores(arm, state.params, validation)["accuracy"]

        state = optax.tree.set(mle.init(params, optimizer, key), learning_rate=rate)
        state, curve = jax.lax.scan(epoch, state, length=config.epochs)
        start = participation(arm, outputs(params, train.features), train.labels)
        final = scores(arm, state.params, test)
        return {"participation": start, "validation": curve} | {f"test_{name}": value for name, value in final.items()}

    def train(chunk: Sequence[Member]) -> dict:
        shape = (digits.train.features.shape[1], digits.num_classes, config.hidden_units)
        params = jax.tree.map(lambda *x: np.stack(x), *(initial_params(model, member, *shape) for member in chunk))
        rates = np.array([10.0 ** (member.rate / 2) for member in chunk], np.float32)
        keys = jnp.stack([jax.random.key(member.seed) for member in chunk])
        drawn = {member.seed: data.resampled("digits", member.seed) for member in chunk}
        splits = jax.tree.map(lambda *x: np.stack(x), *(drawn[member.seed][:3] for member in chunk))
        return members(params, rates, keys, *splits)

    return lambda wanted: tuning.together(train, wanted, config.trained_together)


def tune(train: Callable, grid: Sequence[int], config: Config) -> dict[float, tuning.Curve]:
    """The curve of each std, by the accuracy after the last epoch."""

    def score(wanted):
        return train([Member(*each) for each in wanted])["validation"][:, -1]

    seeds = range(SELECTION_SEED, SELECTION_SEED + config.selection_seeds)
    return tuning.tune(score, config.stds, grid, seeds, config.widen_at_most)


def parts(config: Config) -> list[Config]:
    """Every model and optimizer is a part."""
    return split(config, "models", "optimizers")


def tier(config: Config, settings: Mapping[str, Setting], value: str) -> Tier | None:
    """Accuracy from an ordinary start. A confident start amplifies rounding."""
    gentle = settings["part"] == "seeds" and settings["std"] == config.ordinary_std
    return GENTLE_ACCURACY if gentle and value == "test_accuracy" else None


def run(config: Config) -> Iterator[Record | Progress]:
    """For each model, optimizer and arm: the learning-rate curves, then the report seeds at the best rate."""
    jobs = [(m, o, a) for m in config.models for o in config.optimizers for a in ARMS]
    for done, (model, optimizer, arm) in enumerate(jobs):
        cell = {"model": model, "optimizer": optimizer, "arm": arm}
        yield Progress(done / len(jobs), f"{cell_name(cell)}, {arm}: rates")
        train = trainer(model, optimizer, arm, config)
        tried = tune(train, config.rates(optimizer), config)
        for std, curve in tried.items():
            rates = sorted(curve)
            values = {"rate": 10.0 ** (np.array(rates) / 2), "validation": np.array([curve[r][0] for r in rates])}
            yield Record({"part": "rates", **cell, "std": std}, values)
        yield Progress((done + 0.6) / len(jobs), f"{cell_name(cell)}, {arm}: seeds")
        seeds = range(REPORT_SEED, REPORT_SEED + config.report_seeds)
        members = [Member(std, tuning.best(tried[std]), seed) for std in config.stds for seed in seeds]
        measured = train(members)
        for i, member in enumerate(members):
            values = {name: column[i] for name, column in measured.items()}
            at_edge = float(tuning.outside(tried[member.std]) is not None)
            values |= {"rate": 10.0 ** (member.rate / 2), "at_edge": at_edge}
            yield Record({"part": "seeds", **cell, "std": member.std, "seed": member.seed}, values)


Seeds = Callable[..., np.ndarray]


def seeds_of(records: Sequence[Record]) -> Seeds:
    """`pick(name, model=..., optimizer=..., arm=..., std=...)`: the values of all report seeds, in their order."""

    def pick(name: str, **settings) -> np.ndarray:
        rows = [r for r in records if {"part": "seeds", **settings}.items() <= r.settings.items()]
        return np.array([r.values[name] for r in sorted(rows, key=lambda r: r.settings["seed"])])

    return pick


def gap(pick: Seeds, better: str, worse: str, **cell) -> np.ndarray:
    """Paired differences of the test accuracy, in points."""
    return pick("test_accuracy", arm=better, **cell) - pick("test_accuracy", arm=worse, **cell)


def overlap() -> float:
    """n_test / n_train of the splits."""
    digits = data.load("digits")
    return len(digits.test.labels) / len(digits.train.labels)


def interval(values: np.ndarray) -> stats.Interval:
    """The 95 % interval of a mean over seeds, each with its own split."""
    return stats.resampled_interval(values, overlap())


def interval_text(differences: np.ndarray) -> str:
    """Mean and 95 % interval, in points."""
    low, high = interval(differences)
    return f"{differences.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def cells(config: Config) -> list[dict[str, str]]:
    """Each model with each optimizer."""
    return [{"model": m, "optimizer": o} for m in config.models for o in config.optimizers]


def cell_name(cell: Mapping[str, str]) -> str:
    """For people: "MLP, Adam"."""
    return f"{MODEL_NAMES[cell['model']]}, {OPTIMIZER_NAMES[cell['optimizer']]}"


def gaps_at(pick: Seeds, config: Config, optimizer: str, std: float) -> dict[str, np.ndarray]:
    """Paired differences of the softmax arms by model, under one optimizer and from one start."""
    return {m: gap(pick, SOFTMAX_CE, SOFTMAX_SE, std=std, model=m, optimizer=optimizer) for m in config.models}


def gaps_text(gaps: Mapping[str, np.ndarray]) -> str:
    """The gap of each model with its interval."""
    return "lead of softmax + cross-entropy in points of accuracy: " + "; ".join(
        f"{MODEL_NAMES[m]} {interval_text(g)}" for m, g in gaps.items()
    )


def ordinary_hypothesis(pick: Seeds, config: Config, optimizer: str) -> Hypothesis:
    """From an ordinary start the arms differ little."""
    gaps = gaps_at(pick, config, optimizer, config.ordinary_std)
    return Hypothesis(
        f"Under {OPTIMIZER_NAMES[optimizer]} from an ordinary start (output std {config.ordinary_std:g}), softmax + "
        f"squared error costs at most {MARGIN} points of accuracy.",
        gaps_text(gaps),
        f"a model's mean lead is above {MARGIN} points; undecided while an interval reaches above it",
        ordinary_verdict(list(gaps.values())),
        at_edges(pick, config, optimizer, config.ordinary_std),
    )


def ordinary_verdict(gaps: Sequence[np.ndarray]) -> str:
    """No gap above the margin, and no interval that leaves one open."""
    if any(g.mean() > MARGIN for g in gaps):
        return "falsified"
    return "holds" if all(interval(g).high <= MARGIN for g in gaps) else "undecided"


def wrong_hypothesis(pick: Seeds, config: Config, optimizer: str) -> Hypothesis:
    """From a confidently wrong start squared error stays behind."""
    gaps = gaps_at(pick, config, optimizer, config.wrong_std)
    return Hypothesis(
        f"Under {OPTIMIZER_NAMES[optimizer]} from a confidently wrong start (output std {config.wrong_std:g}) "
        "softmax + squared error costs accuracy, though its learning rate is tuned separately.",
        gaps_text(gaps),
        "the 95 % interval of a model's mean lead holds 0, or lies below it",
        decided(all(interval(g).low > 0 for g in gaps.values())),
        against_wrong(pick, config, optimizer),
    )


def against_wrong(pick: Seeds, config: Config, optimizer: str) -> list[str]:
    """The case against "squared error saturates, so use cross-entropy"."""
    said = []
    for model in config.models:
        cell = {"model": model, "optimizer": optimizer}
        linear = gap(pick, LINEAR_SE, SOFTMAX_SE, std=config.wrong_std, **cell)
        cure = "is no cure" if linear.mean() < 0 else "does better"
        said.append(
            f"{MODEL_NAMES[model]}: linear + squared error, which does not saturate, {cure}. From this start its lead "
            f"over softmax + squared error is {interval_text(linear)} points."
        )
    return said + at_edges(pick, config, optimizer, config.wrong_std)


def at_edges(pick: Seeds, config: Config, optimizer: str, std: float) -> list[str]:
    """Arms whose best rate may lie beyond the grid."""
    cells = [{"model": m, "optimizer": optimizer, "arm": arm, "std": std} for m in config.models for arm in ARMS]
    return [
        f"{MODEL_NAMES[cell['model']]}: the best learning rate of {cell['arm']} lies at the edge of its grid."
        for cell in cells
        if pick("at_edge", **cell)[0]
    ]


def participation_hypothesis(pick: Seeds, config: Config) -> Hypothesis:
    """Fewer examples contribute to the first step of squared error if they start confidently wrong."""
    ratios, holds = [], True
    for model in config.models:
        cell = {"model": model, "optimizer": config.optimizers[0]}
        a, b = (pick("participation", arm=arm, std=config.wrong_std, **cell) for arm in ARMS[:2])
        holds &= interval(a - b).low > 0
        ratios.append(f"{MODEL_NAMES[model]} {a.mean():.2f} and {b.mean():.2f}")
    return Hypothesis(
        "The reason shows in the first step: from a confidently wrong start, fewer examples contribute to the gradient "
        "under softmax + squared error than under softmax + cross-entropy.",
        f"participation ratio at output std {config.wrong_std:g}, cross-entropy first: " + "; ".join(ratios),
        "the 95 % interval of the difference holds 0, or lies below it",
        decided(holds),
    )


def panels(names: Sequence[str], label: str) -> tuple[Figure, np.ndarray]:
    """A row of panels with these names, which share the vertical axis and its label."""
    figure, axes = plots.figure(columns=len(names), height=3.2)
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name)
        axis.sharey(axes[0])
    axes[0].set_ylabel(label)
    return figure, axes


def against_std(axis: Axes, pick: Seeds, config: Config, name: str, cell: Mapping[str, str]) -> None:
    """Mean over seeds with its interval, against the output std."""
    for arm in ARMS:
        values = [pick(name, arm=arm, std=std, **cell) for std in config.stds]
        mean = np.array([v.mean() for v in values])
        bars = np.abs(np.array([interval(v) for v in values]).T - mean)
        axis.errorbar(config.stds, mean, yerr=bars, color=arms.COLOURS[arm], marker="o", capsize=2, label=arm)
    axis.set(xscale="log", xlabel="output std")


def accuracy_figure(pick: Seeds, config: Config) -> Plot:
    """Figure of the accuracy that the start costs."""
    figure, axes = panels([cell_name(cell) for cell in cells(config)], "test accuracy (%)")
    for axis, cell in zip(axes, cells(config), strict=True):
        against_std(axis, pick, config, "test_accuracy", cell)
        axis.set_ylim(0, 105)
    plots.legend(figure, *axes[0].get_legend_handles_labels())
    return Plot(
        figure,
        "Test accuracy against the start, the standard deviation of the output weights: mean over paired seeds with "
        "95 % intervals.",
    )


def participation_figure(pick: Seeds, config: Config) -> Plot:
    """How many pull; before the first step the optimizer makes no difference."""
    figure, axes = panels([MODEL_NAMES[model] for model in config.models], "participation ratio at the start")
    for axis, model in zip(axes, config.models, strict=True):
        against_std(axis, pick, config, "participation", {"model": model, "optimizer": config.optimizers[0]})
    plots.legend(figure, *axes[0].get_legend_handles_labels())
    return Plot(
        figure,
        "How much of the data contributes to the first step: 1 if all gradients have the same norm, $1 / n$ if one of "
        "$n$ counts.",
    )


def epochs_figure(pick: Seeds, config: Config) -> Plot:
    """Validation accuracy epoch by epoch from the wrong start."""
    figure, axes = panels([cell_name(cell) for cell in cells(config)], "validation accuracy (%)")
    for axis, cell in zip(axes, cells(config), strict=True):
        for arm in ARMS:
            curves = pick("validation", arm=arm, std=config.wrong_std, **cell)
            epoch = np.arange(1, curves.shape[1] + 1)
            axis.plot(epoch, curves.mean(axis=0), color=arms.COLOURS[arm], label=arm)
            axis.fill_between(epoch, curves.min(axis=0), curves.max(axis=0), color=arms.COLOURS[arm], alpha=0.15, lw=0)
        axis.set_xlabel("epoch")
    plots.legend(figure, *axes[0].get_legend_handles_labels())
    caption = (
        f"From the wrong start (output std {config.wrong_std:g}): mean over seeds, and from the worst to the best."
    )
    return Plot(figure, caption)


def rates_figure(records: Sequence[Record], config: Config) -> Plot:
    """The learning-rate curves by which each arm got its rate."""
    figure, axes = panels([cell_name(cell) for cell in cells(config)], "validation accuracy (%)")
    looks = {config.ordinary_std: "-", config.wrong_std: ":"}
    for axis, cell in zip(axes, cells(config), strict=True):
        for record in records:
            if {"part": "rates", **cell}.items() <= record.settings.items() and record.settings["std"] in looks:
                arm, std = str(record.settings["arm"]), float(record.settings["std"])
                style = {"color": arms.COLOURS[arm], "linestyle": looks[std], "marker": "o", "markersize": 3}
                axis.plot(
                    record.values["rate"], record.values["validation"], **style, label=f"{arm}, output std {std:g}"
                )
        axis.set(xscale="log", xlabel="learning rate")
    plots.legend(figure, *axes[0].get_legend_handles_labels())
    caption = (
        "How each arm got its learning rate: mean validation accuracy of the selection seeds, 0 where a run diverged."
    )
    return Plot(figure, caption)


def gap_table(pick: Seeds, config: Config) -> Table:
    """Every comparison of the softmax arms."""
    rows, p_values = [], []
    for cell in cells(config):
        for std in config.stds:
            g = gap(pick, SOFTMAX_CE, SOFTMAX_SE, std=std, **cell)
            accuracy = [f"{pick('test_accuracy', arm=arm, std=std, **cell).mean():.2f}" for arm in ARMS]
            rates = [tuning.rate_text(pick("rate", arm=arm, std=std, **cell)[0]) for arm in ARMS]
            p_values.append(stats.resampled_p(g, overlap()))
            same = f"{stats.equivalence(g, MARGIN, overlap()):.3f}"
            pairs = [f"{a} at {rate}" for a, rate in zip(accuracy, rates, strict=True)]
            rows.append([cell_name(cell), f"{std:g}", *pairs, interval_text(g), same])
    for row, p in zip(rows, stats.holm(p_values), strict=True):
        row.insert(6, f"{p:.3f}")
    header = ["model", "output std", *ARMS, "lead", "$p$ (Holm)", f"$p$ of |lead| > {MARGIN}"]
    caption = (
        "Test accuracy in %, mean over seeds, at the learning rate that was chosen; and the lead of softmax + "
        "cross-entropy over softmax + squared error with its 95 % interval. The first $p$ is of no difference, the "
        "second of one larger than the margin."
    )
    return Table(caption, header, rows)


def abstract(pick: Seeds, config: Config) -> list[str]:
    """The leads from both starts, over all models and optimizers."""
    leads = {
        std: [g.mean() for o in config.optimizers for g in gaps_at(pick, config, o, std).values()]
        for std in (config.wrong_std, config.ordinary_std)
    }
    wrong, ordinary = ((min(g), max(g)) for g in leads.values())
    return [
        "In training on handwritten digits, each learning rate tuned, softmax + cross-entropy leads softmax + squared "
        f"error by {wrong[0]:.1f} to {wrong[1]:.1f} points of accuracy if most examples start confidently wrong, and "
        f"by {ordinary[0]:+.2f} to {ordinary[1]:+.2f} from an ordinary start."
    ]


def report(config: Config, records: Sequence[Record]) -> Section:
    """Accuracy and participation against the start, with every learning-rate curve."""
    pick = seeds_of(records)
    text = (
        "A classifier of handwritten digits is trained, linear or with one hidden layer of tanh units (MLP), by SGD or "
        "Adam. Three arms are compared: softmax + cross-entropy, softmax + squared error, linear + squared error."
        "\n\n"
        "The gradient of softmax + squared error vanishes if the prediction is confidently wrong. Whether that costs "
        "anything depends on how many examples start there. The output weights are therefore drawn with a growing "
        "standard deviation, the output std. Nothing else changes: the learning rate is tuned for each arm and each "
        "start on a validation split.\n\n"
        "A point is one per cent of the test examples. The lead is the accuracy of softmax + cross-entropy less that "
        "of softmax + squared error. The participation ratio is $(g_1 + ... + g_n)^2 / (n (g_1^2 + ... + g_n^2))$, "
        "with $g_i$ the norm of the gradient of example $i$ in its logits."
    )
    figures = [
        accuracy_figure(pick, config),
        participation_figure(pick, config),
        epochs_figure(pick, config),
        rates_figure(records, config),
    ]
    hypotheses = [
        *(ordinary_hypothesis(pick, config, optimizer) for optimizer in config.optimizers),
        *(wrong_hypothesis(pick, config, optimizer) for optimizer in config.optimizers),
        participation_hypothesis(pick, config),
    ]
    return Section(
        "Accuracy after a wrong start", abstract(pick, config), text, figures, hypotheses, [gap_table(pick, config)]
    )
