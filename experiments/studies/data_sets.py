"""Data sets: how little the loss matters from an ordinary start, once each arm has its own learning rate.

Tables and images are classified by a linear model, or by one with a layer of tanh, the MLP. The deep MLP has two layers
of ReLU. The CNN has three convolutions with ReLU, and goes with sequences alone. The output weights begin small, so no
example starts confidently wrong. The arms are softmax + cross-entropy and softmax + squared error, trained by Adam.
The features are standardised by the mean and deviation of the training examples; a pixel that never changes stays 0.
The accuracy of cross-entropy stands next to published ones, for a data set that has them.

Protocol: every seed draws its own split, initial weights and order of the batches, the same for both arms. The learning
rate is tuned for each arm, data set and model. The criterion is the mean validation accuracy of the selection seeds.
The half-decade grid is widened while the best rate lies at its edge. Seeds that select are not seeds that report.
Splits of one data set overlap. So intervals and p-values are those of Nadeau and Bengio. "The same" means the two
one-sided tests at half a point, with Holm's correction over all data sets and models.

Sources: Hui and Belkin (2021), ICLR; Demirkaya, Chen and Oymak (2020); Nadeau and Bengio (2003); Schuirmann (1987).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax

from experiments import data, plots, stats, tuning
from experiments.arms import SOFTMAX_CE, SOFTMAX_SE
from experiments.config import distinct
from experiments.errors import InputError
from experiments.findings import GENTLE_ACCURACY, Hypothesis, Plot, Section, Table, Tier
from experiments.results import Progress, Record, Setting
from experiments.tuning import Member
from jprob import categorical, mle

ARMS = (SOFTMAX_CE, SOFTMAX_SE)
OUTPUT_STD = 0.01
DEEP_UNITS = [100, 100]  # of the MLP that published figures for MNIST-1D are of
CONVOLUTIONS = [(5, 1, 25), (3, 25, 25), (3, 25, 25)]  # of that CNN: width, channels in, channels out; stride 2
LABEL = 40  # characters of a data set and model in the figure
POINTS, SAME = 2.0, 0.5  # of accuracy: a gap that counts, and one that counts as none
SELECTION_SEED, REPORT_SEED = 80_000, 90_000  # the first; the verdicts' rules were fixed before these seeds ran

Decade = Annotated[float, msgspec.Meta(ge=-8, le=4, multiple_of=0.5)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Data sets by name, idx:FOLDER or openml:NAME. The rates of Adam go from one decimal logarithm to another."""

    names: Annotated[list[str], msgspec.Meta(min_length=1, max_length=8)]
    models: Annotated[list[Literal["linear", "MLP", "deep MLP", "CNN"]], msgspec.Meta(min_length=1)]
    hidden_units: Count
    epochs: Count
    batch_size: Count
    decades: Annotated[list[Decade], msgspec.Meta(min_length=2, max_length=2)]
    widen_at_most: Annotated[int, msgspec.Meta(ge=0, le=20)]
    selection_seeds: Count
    report_seeds: Annotated[int, msgspec.Meta(ge=2, le=1000)]
    trained_together: Count

    def __post_init__(self):
        distinct(self, "names", "models")
        if self.decades[0] > self.decades[1]:
            raise ValueError(f"decades: expected the lower end first, got {self.decades}")
        try:
            for name in self.names:
                data.check(name)
        except InputError as error:
            raise ValueError(f"names: {error}") from None
        if not {model for _, model in jobs(self)}.issuperset(self.models):
            raise ValueError(f"models: expected one of {data.SEQUENCES} among the names for a CNN, got {self.names}")


def jobs(config: Config) -> list[tuple[str, str]]:
    """Each data set with each model, but a CNN with sequences alone: other features have no neighbours."""
    pairs = itertools.product(config.names, config.models)
    return [(name, model) for name, model in pairs if model != "CNN" or name in data.SEQUENCES]


def require(config: Config) -> None:
    """Whether the data are there. A report is made without them."""
    for name in config.names:
        data.require(name)


def standardised(dataset: data.Dataset) -> list[data.Split]:
    """The three splits, by the mean and deviation of the training features."""
    mean, deviation = dataset.train.features.mean(axis=0), dataset.train.features.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1)
    return [
        each._replace(features=np.where(deviation > 0, (each.features - mean) / scale, 0).astype(np.float32))
        for each in dataset[:3]
    ]


def shapes_of(model: str, features: int, hidden_units: int, num_classes: int) -> list[tuple[int, ...]]:
    """The kernels of a model. Three convolutions of stride 2 leave an eighth of the points."""
    if model == "CNN":
        return [*CONVOLUTIONS, (CONVOLUTIONS[-1][-1] * math.ceil(features / 8), num_classes)]
    hidden = {"linear": [], "MLP": [hidden_units], "deep MLP": DEEP_UNITS}[model]
    return [*itertools.pairwise([features, *hidden, num_classes])]


def initial_params(seed: int, shapes: Sequence[tuple[int, ...]]) -> list[dict[str, np.ndarray]]:
    """The layers, drawn on the host by the seed: Glorot's deviation, and a small one for the outputs."""
    rng = np.random.default_rng(seed)
    stds = [*(np.sqrt(2 / (math.prod(shape[:-2]) * sum(shape[-2:]))) for shape in shapes[:-1]), OUTPUT_STD]
    kernels = [std * rng.normal(size=shape) for std, shape in zip(stds, shapes, strict=True)]
    return [{"kernel": k.astype(np.float32), "bias": np.zeros(k.shape[-1], np.float32)} for k in kernels]


def convolution(x, kernel):
    """Stride 2, padded by 0, as one product: a `lax.conv` with a kernel for each member is eight times slower."""
    width, length = len(kernel), math.ceil(x.shape[1] / 2)
    padded = jnp.pad(x.reshape(*x.shape[:2], -1), [(0, 0), (width // 2, width // 2), (0, 0)])
    windows = jnp.concatenate([padded[:, i : i + 2 * length - 1 : 2] for i in range(width)], axis=-1)
    rows = windows.reshape(-1, windows.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return rows.reshape(len(x), length, -1)


def outputs(params, x):
    """Logits: linear, through one layer of tanh, or through several of ReLU, dense or convolutions."""
    *hidden, output = params
    activation = jnp.tanh if len(hidden) == 1 else jax.nn.relu
    for layer in hidden:
        dense = layer["kernel"].ndim == 2
        x = x @ layer["kernel"] if dense else convolution(x, layer["kernel"])
        x = activation(x + jnp.expand_dims(layer["bias"], range(x.ndim - 1)))
    return x.reshape(len(x), -1) @ output["kernel"] + output["bias"][None]


def nll(params, batch, key):
    """The loss of the arm: both are computed, and one has the weight 0, so that one program trains both arms."""
    x, labels, is_entropy = batch
    z = outputs(params, x)
    return jnp.where(is_entropy, categorical.cross_entropy(z, labels), categorical.brier_score(z, labels) / 2)


def trainer(name: str, model: str, config: Config) -> Callable[[Sequence[Member]], dict[str, np.ndarray]]:
    """A function from members to their accuracies in points; it compiles once, for `trained_together` at a time."""
    dataset = data.resampled(name, SELECTION_SEED)  # whose sizes are those of every seed
    size, features = dataset.train.features.shape
    shapes = shapes_of(model, features, config.hidden_units, dataset.num_classes)
    batch_size = min(config.batch_size, size)
    steps = config.epochs * -(-size // batch_size)
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)

    def accuracy(params, split):
        z = outputs(params, split.features)
        return jnp.where(jnp.isfinite(z).all(), 100 * jnp.mean(jnp.argmax(z, axis=-1) == split.labels), 0)

    @jax.jit
    @jax.vmap
    def members(params, rate, is_entropy, key, train, validation, test):
        state = optax.tree.set(mle.init(params, optimizer, key), learning_rate=rate)
        examples = *train, jnp.broadcast_to(is_entropy, size)
        state, _ = mle.run(nll, optimizer, state, examples, num_steps=steps, batch_size=batch_size, log_every=steps)
        return {"validation": accuracy(state.params, validation), "test": accuracy(state.params, test)}

    def train(chunk: Sequence[Member]) -> dict[str, np.ndarray]:
        drawn = {m.seed: standardised(data.resampled(name, m.seed)) for m in chunk}
        params = {seed: initial_params(seed, shapes) for seed in drawn}
        stacked = jax.tree.map(lambda *x: np.stack(x), *((params[m.seed], drawn[m.seed]) for m in chunk))
        rates = np.array([10.0 ** (m.rate / 2) for m in chunk], np.float32)
        keys = jnp.stack([jax.random.key(m.seed) for m in chunk])
        measured = members(stacked[0], rates, np.array([m.arm == SOFTMAX_CE for m in chunk]), keys, *stacked[1])
        return {name: np.asarray(x, np.float64) for name, x in measured.items()}

    return lambda wanted: tuning.together(train, wanted, config.trained_together)


def tier(config: Config, settings: Mapping[str, Setting], value: str) -> Tier | None:
    """The accuracies of the report seeds."""
    return GENTLE_ACCURACY if settings["part"] == "seeds" and value == "test" else None


def parts(config: Config) -> list[Config]:
    """Every data set and model is a part."""
    return [msgspec.structs.replace(config, names=[name], models=[model]) for name, model in jobs(config)]


def run(config: Config) -> Iterator[Record | Progress]:
    """For each data set and model: the learning-rate curves, then the report seeds at the best rates."""
    todo = jobs(config)
    for done, (name, model) in enumerate(todo):
        yield Progress(done / len(todo), f"{name}, {model}: rates")
        train, dataset = trainer(name, model, config), data.resampled(name, SELECTION_SEED)
        seeds = range(SELECTION_SEED, SELECTION_SEED + config.selection_seeds)
        tried = tuning.of_arms(train, ARMS, config.decades, seeds, config.widen_at_most)
        yield Progress((done + 0.7) / len(todo), f"{name}, {model}: seeds")
        seeds = range(REPORT_SEED, REPORT_SEED + config.report_seeds)
        members = [Member(arm, tuning.best(tried[arm]), seed) for arm in ARMS for seed in seeds]
        tested = train(members)["test"].reshape(len(ARMS), len(seeds))
        for (arm, curve), accuracies in zip(tried.items(), tested, strict=True):
            settings = {"data": name, "model": model, "arm": arm}
            values = {"rate": 10.0 ** (np.array(sorted(curve)) / 2),
                      "validation": np.array([curve[rate][0] for rate in sorted(curve)])}  # fmt: skip
            yield Record({"part": "rates", **settings}, {**values})
            values = {"test": accuracies, "rate": 10.0 ** (tuning.best(curve) / 2),
                      "at_edge": float(tuning.outside(curve) is not None),
                      "overlap": len(dataset.test.labels) / len(dataset.train.labels)}  # fmt: skip
            yield Record({"part": "seeds", **settings}, {**values})


class Cell(NamedTuple):
    """A data set with a model: accuracies by seed of both arms, and n_test / n_train."""

    data: str
    model: str
    entropy: np.ndarray
    square: np.ndarray
    overlap: float
    edges: list[str]

    @property
    def gap(self) -> np.ndarray:
        """Lead of cross-entropy, in points."""
        return self.entropy - self.square

    @property
    def interval(self) -> stats.Interval:
        """95 % of the mean lead."""
        return stats.resampled_interval(self.gap, self.overlap)

    @property
    def text(self) -> str:
        """The mean lead with its interval."""
        return f"{self.gap.mean():+.2f} [{self.interval.low:+.2f}, {self.interval.high:+.2f}]"


Cells = dict[str, Cell]  # by "data set, model"


def cells_of(records: Sequence[Record]) -> Cells:
    """The cells, in the order of the records."""
    found = {(r.settings["data"], r.settings["model"], r.settings["arm"]): r.values
             for r in records if r.settings["part"] == "seeds"}  # fmt: skip
    cells: Cells = {}
    for name, model in dict.fromkeys(key[:2] for key in found):
        both = [found[name, model, arm] for arm in ARMS]
        edges = [arm for arm, values in zip(ARMS, both, strict=True) if float(values["at_edge"])]
        entropy, square = (np.asarray(values["test"]) for values in both)
        cells[f"{name}, {model}"] = Cell(str(name), str(model), entropy, square, float(both[0]["overlap"]), edges)
    return cells


def leads(cells: Cells) -> str:
    """All leads, for people."""
    each = "; ".join(f"{name} {cell.text}" for name, cell in cells.items())
    return f"lead of softmax + cross-entropy in points of accuracy: {each}"


def small_hypothesis(cells: Cells) -> Hypothesis:
    """No data set shows a gap that counts."""
    large = [name for name, cell in cells.items() if abs(cell.gap.mean()) > POINTS]
    open_ones = [name for name, cell in cells.items() if max(map(abs, cell.interval)) > POINTS]
    edges = [
        f"The best rate of {arm} on {name} lies at the edge of its grid."
        for name, cell in cells.items()
        for arm in cell.edges
    ]
    return Hypothesis(
        f"From an ordinary start, with its own learning rate, neither loss leads by more than {POINTS:g} points of "
        "accuracy on any data set.",
        leads(cells),
        f"a mean lead of either is above {POINTS:g} points; undecided while an interval reaches beyond it",
        "falsified" if large else "undecided" if open_ones else "holds",
        [*(f"The interval of {name} reaches beyond {POINTS:g} points." for name in open_ones), *edges],
    )


def same_hypothesis(cells: Cells) -> Hypothesis:
    """The gap is within half a point."""
    p = stats.holm([stats.equivalence(cell.gap, SAME, cell.overlap) for cell in cells.values()])
    apart = [n for n, c in cells.items() if c.interval.low > SAME or c.interval.high < -SAME]
    worst = max(cells, key=lambda name: abs(cells[name].gap.mean()))
    return Hypothesis(
        f"The two losses are the same within {SAME:g} points of accuracy on every data set.",
        "largest p-value of the two one-sided tests, by Holm: "
        + "; ".join(f"{name} {value:.2g}" for name, value in zip(cells, p, strict=True)),
        f"an interval lies beyond {SAME:g} points; undecided while a p-value is above .05",
        "falsified" if apart else "holds" if max(p) <= 0.05 else "undecided",
        [f"The largest mean lead is that on {worst}: {cells[worst].text} points."],
    )


def figure(cells: Cells) -> Plot:
    """The lead on each data set."""
    made, (axis,) = plots.figure(height=1.4 + 0.35 * len(cells))
    for row, cell in enumerate(cells.values()):
        mean = cell.gap.mean()
        reach = [[mean - cell.interval.low], [cell.interval.high - mean]]
        axis.errorbar(mean, row, xerr=reach, fmt="o", color=plots.PALETTE[0], capsize=3)
    axis.axvspan(-SAME, SAME, color=plots.PALETTE[5], alpha=0.2, linewidth=0)
    axis.axvline(0, color="black", linewidth=0.7)
    labels = [name if len(name) <= LABEL else f"...{name[-LABEL:]}" for name in cells]  # a folder has a long name
    axis.set_yticks(range(len(cells)), labels)
    axis.set(xlabel="lead of softmax + cross-entropy (points of accuracy)", ylim=(len(cells) - 0.5, -0.5))
    return Plot(made, f"Mean lead and its 95 % interval. Grey: within {SAME:g} points, which counts as no lead.")


def published_table(cells: Cells) -> Iterator[Table]:
    """The accuracies that others report, if they do for any of the data sets."""
    rows = []
    for name, cell in cells.items():
        published = data.PUBLISHED.get(cell.data, {}).get(cell.model)
        if published is not None:
            mean, interval = cell.entropy.mean(), stats.resampled_interval(cell.entropy, cell.overlap)
            here = f"{mean:.1f} [{interval.low:.1f}, {interval.high:.1f}]"
            rows.append([name, here, f"{published.accuracy:g}", f"{mean - published.accuracy:+.1f}", published.model,
                         published.source])  # fmt: skip
    if rows:
        caption = f"Test accuracy under {SOFTMAX_CE} in %, with its 95 % interval, next to that of others."
        yield Table(caption, ["data, model", "here", "published", "difference", "model of others", "source"], rows)


def report(config: Config, records: Sequence[Record]) -> Section:
    """The leads, and whether they count."""
    cells = cells_of(records)
    text = (
        "The output weights begin small, so all classes are equally likely at first. The learning rate is tuned for "
        "each loss. The lead is the test accuracy under softmax + cross-entropy less that under softmax + squared "
        "error, in points.\n\nEvery seed draws its own split. The intervals say what other splits would show."
    )
    largest = max(abs(cell.gap.mean()) for cell in cells.values())
    abstract = [
        f"From an ordinary start with tuned rates, the largest mean lead of either loss is {largest:.1f} points on "
        f"{len(config.names)} data sets with {len(config.models)} models."
    ]
    rows = []
    for name, cell in cells.items():
        means = f"{cell.entropy.mean():.2f}", f"{cell.square.mean():.2f}"
        rows.append([name, *means, cell.text, f"{stats.equivalence(cell.gap, SAME, cell.overlap):.2g}"])
    header = ["data, model", *ARMS, "lead", f"p of a lead beyond {SAME:g}"]
    table = Table("Test accuracy in %, mean over seeds, and the lead with its 95 % interval.", header, rows)
    hypotheses = [small_hypothesis(cells), same_hypothesis(cells)]
    return Section("Data sets", abstract, text, [figure(cells)], hypotheses, [table, *published_table(cells)])
