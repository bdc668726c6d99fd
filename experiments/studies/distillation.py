"""Distillation: the calibration of an overfitted teacher, and what a small student learns from its soft labels.

The teacher has one hidden layer of tanh. It trains on few digits with cross-entropy, long after it has them all right.
Its margins grow on, so it becomes overconfident. One number T repairs that: logits / T, with the T that makes
validation labels most likely. T changes no prediction, since it keeps the order of the logits.

The student is linear and trains on some of the teacher's examples: with their labels alone, or with the teacher's
probabilities at a temperature T, by T^2 KL(teacher_T || student_T). An overconfident teacher says at T = 1 little more
than the labels. A larger T shows how it orders the wrong classes. The loss tends to squared error of the centred
logits over 2 K as T grows.

Every seed draws its own split of digits. The teacher's T and the best T of distillation come from validation examples,
and all numbers from test examples.

Sources: Hinton, Vinyals and Dean (2015), Distilling the Knowledge in a Neural Network; Guo et al. (2017), On
Calibration of Modern Neural Networks; Nadeau and Bengio (2003), Machine Learning 52(3), for the intervals.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jaxtyping import Array

from experiments import data, plots, stats
from experiments.config import distinct
from experiments.findings import Hypothesis, Plot, Section, Table, decided
from experiments.results import Progress, Record
from jprob import calibration, categorical, mle

BINS = 10
COLDEST = 0.05  # of a fitted temperature, which is 0 where all validation labels are right
LABELS = "labels alone"
TABLES = ("weight", "confidence", "correct")

Temperature = Annotated[float, msgspec.Meta(ge=0.1, le=1000)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Rate = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One teacher a seed, and one student a seed for the labels and for each temperature."""

    teacher_examples: Annotated[int, msgspec.Meta(ge=10, le=1077)]
    hidden_units: Count
    teacher_steps: Count
    student_examples: Annotated[int, msgspec.Meta(ge=10, le=1077)]
    student_steps: Count
    batch_size: Count
    learning_rate: Rate
    temperatures: Annotated[list[Temperature], msgspec.Meta(min_length=2, max_length=12)]
    seeds: Annotated[int, msgspec.Meta(ge=2, le=1000)]

    def __post_init__(self):
        distinct(self, "temperatures")
        if 1.0 not in self.temperatures:
            raise ValueError("temperatures: expected 1 among them")
        if self.student_examples > self.teacher_examples:
            raise ValueError("student_examples: expected at most teacher_examples, whose first ones they are")


def initial_params(seed: int, *widths: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Kernel and bias of each layer, drawn on the host."""
    rng = np.random.default_rng([seed, *widths])
    kernels = [rng.normal(size=shape) / np.sqrt(shape[0]) for shape in itertools.pairwise(widths)]
    return [(kernel.astype(np.float32), np.zeros(kernel.shape[1], np.float32)) for kernel in kernels]


def outputs(params, x):
    """Logits: linear layers, with tanh between them."""
    *hidden, (kernel, bias) = params
    for each in hidden:
        x = jnp.tanh(x @ each[0] + each[1][None])
    return x @ kernel + bias[None]


def label_nll(params, batch, key):
    """The loss of labels: cross-entropy."""
    return categorical.cross_entropy(outputs(params, batch["x"]), batch["labels"])


def soft_nll(params, batch, key):
    """The loss of a teacher's soft labels. All examples of a batch have one temperature."""
    student = outputs(params, batch["x"])
    return categorical.distillation_loss(student, batch["teacher"], temperature=batch["temperature"][0])


def train(config: Config, nll: Callable, num_steps: int, widths: Sequence[int], seeds: Sequence[int], examples: Any):
    """Params of one member a seed, trained together by Adam. The examples have the seeds as leading axis."""
    optimizer = optax.adam(config.learning_rate)
    size = min(config.batch_size, examples["x"].shape[1])
    params = jax.tree.map(lambda *x: np.stack(x), *(initial_params(seed, *widths) for seed in seeds))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])

    @jax.jit
    @jax.vmap
    def members(params, key, examples):
        state = mle.init(params, optimizer, key)
        state, _ = mle.run(nll, optimizer, state, examples, num_steps=num_steps, batch_size=size, log_every=num_steps)
        return state.params

    return members(params, keys, examples)


@jax.jit
@jax.vmap
def teacher_scores(validation: Array, validation_labels: Array, test: Array, labels: Array) -> dict[str, Array]:
    """The fitted temperature of logits, and their calibration on test examples before and after it."""
    temperature = jnp.maximum(calibration.fit_temperature(validation, validation_labels), COLDEST)
    cooled = test / temperature
    values = {"temperature": temperature, "moved": jnp.sum(categorical.mode(test) != categorical.mode(cooled))}
    for when, z in (("before", test), ("after", cooled)):
        table = calibration.reliability(z, labels, num_bins=BINS)
        values |= {f"{when}, {name}": getattr(table, name) for name in TABLES} | {
            f"{when}, ece": calibration.expected_calibration_error(table),
            f"{when}, nll": jnp.mean(categorical.cross_entropy(z, labels)),
            f"{when}, accuracy": jnp.mean(categorical.mode(z) == labels),
        }
    return values


def run(config: Config) -> Iterator[Record | Progress]:
    """One record for each seed's teacher, and one for each student."""
    yield Progress(0.0, "teachers")
    seeds = range(1, config.seeds + 1)
    drawn = [data.resampled("digits", seed) for seed in seeds]
    splits = [jax.tree.map(lambda *x: np.stack(x), *(each[i] for each in drawn)) for i in range(3)]
    train_split, validation, test = splits
    features, classes = train_split.features.shape[-1], drawn[0].num_classes
    each_seed = jax.jit(jax.vmap(outputs))

    n = config.teacher_examples
    examples = {"x": train_split.features[:, :n], "labels": train_split.labels[:, :n]}
    widths = features, config.hidden_units, classes
    params = train(config, label_nll, config.teacher_steps, widths, seeds, examples)
    logits = [each_seed(params, split.features) for split in splits]
    measured = teacher_scores(logits[1], validation.labels, logits[2], test.labels)
    measured["train accuracy"] = jnp.mean(jnp.argmax(logits[0][:, :n], -1) == examples["labels"], axis=1)
    for i, seed in enumerate(seeds):
        yield Record({"part": "teacher", "seed": seed}, {k: np.asarray(v)[i] for k, v in measured.items()})

    yield Progress(0.6, "students")
    n, warmth = config.student_examples, config.temperatures
    few = {"x": train_split.features[:, :n], "labels": train_split.labels[:, :n]}
    soft = [few | {"teacher": logits[0][:, :n], "temperature": np.full((len(seeds), n), t, np.float32)} for t in warmth]
    together = jax.tree.map(lambda *x: np.concatenate(x), *soft)
    learn = partial(train, config, num_steps=config.student_steps, widths=(features, classes))
    hard = learn(nll=label_nll, seeds=seeds, examples=few)
    students = hard, learn(nll=soft_nll, seeds=[*seeds] * len(warmth), examples=together)
    params = jax.tree.map(lambda *x: np.concatenate(x), *students)
    for i, temperature in enumerate([None, *warmth]):
        own = jax.tree.map(lambda x, i=i: x[i * len(seeds) : (i + 1) * len(seeds)], params)
        right = [np.mean(np.argmax(each_seed(own, s.features), -1) == s.labels, axis=1) for s in (validation, test)]
        for j, seed in enumerate(seeds):
            values = {"validation": float(100 * right[0][j]), "test": float(100 * right[1][j])}
            yield Record({"part": "student", "student": student_name(temperature), "seed": seed}, {**values})


def student_name(temperature: float | None) -> str:
    """The name of the student that learns at a temperature, or from labels."""
    return LABELS if temperature is None else f"T = {temperature:g}"


Teachers = dict[str, np.ndarray]  # by name, one row a seed
Students = dict[str, dict[str, np.ndarray]]  # by student: points of accuracy on "validation" and "test", one a seed


def interval(values: np.ndarray) -> stats.Interval:
    """The 95 % interval of a mean over seeds, each with its own split."""
    digits = data.load("digits")
    return stats.resampled_interval(values, len(digits.test.labels) / len(digits.train.labels))


def text_of(values: np.ndarray, digits: int = 2) -> str:
    """Mean and interval."""
    low, high = interval(values)
    return f"{values.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def positive(*gains: np.ndarray) -> str:
    """Whether all means are above 0: undecided while an interval holds 0 and none lies below."""
    ends = [interval(gain) for gain in gains]
    if any(high < 0 for _, high in ends):
        return "falsified"
    return "holds" if all(low > 0 for low, _ in ends) else "undecided"


def best(config: Config, students: Students) -> str:
    """The student of the temperature with the best mean accuracy on validation examples."""
    return max(map(student_name, config.temperatures), key=lambda name: students[name]["validation"].mean())


def calibration_hypothesis(config: Config, teachers: Teachers, students: Students) -> Hypothesis:
    """The overfitted teacher is overconfident, and a temperature repairs it."""
    hotter = np.log(teachers["temperature"])
    before, after = (100 * teachers[f"{when}, ece"] for when in ("before", "after"))
    worse = int(np.sum(after > before))
    nll = teachers["before, nll"] - teachers["after, nll"]
    return Hypothesis(
        "A teacher that is overfitted with cross-entropy is overconfident: its fitted temperature is above 1, and "
        "lowers the calibration error.",
        f"log T {text_of(hotter)}, T {np.exp(hotter.mean()):.2f}; calibration error in points {before.mean():.2f} "
        f"before, {after.mean():.2f} after, decrease {text_of(before - after)}",
        "the 95 % interval of log T or of the decrease lies below 0; undecided while one holds 0",
        positive(hotter, before - after),
        [
            f"Temperature scaling makes the calibration error larger on {worse} of {len(before)} splits.",
            f"The error that is left has a part of chance: each split has {teachers['before, weight'][0].sum():.0f} "
            f"test examples. The negative log-likelihood falls by {text_of(nll, 3)} nats.",
        ],
    )


def order_hypothesis(config: Config, teachers: Teachers, students: Students) -> Hypothesis:
    """No prediction changes."""
    moved = int(teachers["moved"].sum())
    return Hypothesis(
        "Temperature scaling changes no prediction, so the accuracy stays the same.",
        f"{moved} of {teachers['before, weight'].sum():.0f} predictions changed; accuracy "
        f"{teachers['before, accuracy'].mean():.2%} before, {teachers['after, accuracy'].mean():.2%} after",
        "a prediction changes",
        decided(moved == 0 and np.array_equal(teachers["before, accuracy"], teachers["after, accuracy"])),
    )


def gain_hypothesis(config: Config, teachers: Teachers, students: Students) -> Hypothesis:
    """Soft labels beat labels."""
    name = best(config, students)
    gain, one = (students[each]["test"] - students[LABELS]["test"] for each in (name, "T = 1"))
    teacher = 100 * teachers["before, accuracy"].mean()
    return Hypothesis(
        f"A student with {config.student_examples} examples learns more from the teacher's soft labels than from the "
        "labels alone, at the temperature that is best on validation examples.",
        f"{name}; lead over labels alone in points of test accuracy {text_of(gain)}",
        "the 95 % interval of the lead lies below 0; undecided while it holds 0",
        positive(gain),
        [
            f"At T = 1 the lead is {text_of(one)}: the overconfident teacher says little more than the labels.",
            f"The student stays {teacher - students[name]['test'].mean():.1f} points behind the teacher, which saw "
            f"{config.teacher_examples} labels.",
        ],
    )


def warm_hypothesis(config: Config, teachers: Teachers, students: Students) -> Hypothesis:
    """The gain needs a temperature above 1."""
    name, fitted = best(config, students), np.exp(np.log(teachers["temperature"]).mean())
    gain = students[name]["test"] - students["T = 1"]["test"]
    edge = student_name(max(config.temperatures))
    against = [
        f"The temperature that calibrates the teacher is {fitted:.2f}. That of the best student is another matter: it "
        "is to show the order of the wrong classes, not to be honest."
    ]
    if name == edge:
        against.append(f"The best temperature is the largest tried, {edge}, so that a larger one may be better still.")
    return Hypothesis(
        "The temperature makes the difference: the best one beats T = 1.",
        f"lead of {name} over T = 1 in points of test accuracy {text_of(gain)}",
        "the 95 % interval of the lead lies below 0; undecided while it holds 0",
        positive(gain) if name != "T = 1" else "falsified",
        against,
    )


def diagrams(teachers: Teachers) -> Plot:
    """Accuracy against confidence, before and after temperature scaling."""
    made, axes = plots.figure(columns=2, height=3.9)
    for axis, when in zip(axes, ("before", "after"), strict=True):
        weight, confidence, correct = (teachers[f"{when}, {name}"].sum(axis=0) for name in TABLES)
        held = weight > 0
        edges = np.arange(BINS)[held] / BINS
        axis.bar(edges, correct[held] / weight[held], 1 / BINS, align="edge", color=plots.PALETTE[3], edgecolor="white")
        axis.plot(confidence[held] / weight[held], correct[held] / weight[held], "o", color=plots.PALETTE[0])
        axis.plot([0, 1], [0, 1], **plots.THEORY)
        error = 100 * teachers[f"{when}, ece"].mean()
        axis.set(title=f"{when} scaling, calibration error {error:.1f} points", xlabel="confidence", xlim=(0, 1))
    axes[0].set_ylabel("accuracy")
    return Plot(
        made,
        "Reliability of the teachers, test examples of all seeds. A bar is the accuracy in a bin of confidence, a dot "
        "stands at the mean confidence. Dashed: calibrated.",
    )


def curve(config: Config, teachers: Teachers, students: Students) -> Plot:
    """Accuracy of the students against the temperature."""
    made, (axis,) = plots.figure(height=3.6)
    warmth = sorted(config.temperatures)
    gains = [students[student_name(t)]["test"] - students[LABELS]["test"] for t in warmth]
    ends = np.array([interval(gain) for gain in gains])
    base = students[LABELS]["test"].mean()
    means = base + np.array([gain.mean() for gain in gains])
    axis.errorbar(warmth, means, np.abs(base + ends.T - means), fmt="o", color=plots.PALETTE[0], capsize=3)
    for level, colour, name in (
        (base, plots.PALETTE[1], f"student, {LABELS}"),
        (100 * teachers["before, accuracy"].mean(), plots.PALETTE[2], "teacher"),
    ):
        axis.axhline(level, color=colour, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(warmth, [f"{t:g}" for t in warmth])
    axis.set(xlabel="temperature of distillation", ylabel="test accuracy in %")
    axis.legend(loc="center left")
    return Plot(made, "Mean over seeds, with the 95 % interval of the lead over labels alone.")


def report(config: Config, records: Sequence[Record]) -> Section:
    """A temperature after training calibrates a teacher, and one in training helps its student."""
    ordered = sorted(records, key=lambda record: record.settings["seed"])
    rows = [record.values for record in ordered if record.settings["part"] == "teacher"]
    teachers: Teachers = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    students: Students = {}
    for temperature in [None, *config.temperatures]:
        name = student_name(temperature)
        own = [r.values for r in ordered if r.settings.get("student") == name]
        students[name] = {split: np.array([row[split] for row in own]) for split in ("validation", "test")}
    makers = calibration_hypothesis, order_hypothesis, gain_hypothesis, warm_hypothesis
    hypotheses = [make(config, teachers, students) for make in makers]
    text = (
        "A classifier is calibrated if a share $c$ of its predictions with confidence $c$ are right. The calibration "
        "error is the mean difference of both over bins of confidence. Temperature scaling divides the logits by $T$: "
        "above 1 it lowers every confidence.\n\n"
        "Distillation trains a small model, the student, on the probabilities of a large one, the teacher. The "
        f"teachers have {config.hidden_units} hidden units and {config.teacher_examples} labelled digits. The students "
        f"are linear and see {config.student_examples} of these."
    )
    name = best(config, students)
    before, after = (100 * teachers[f"{when}, ece"].mean() for when in ("before", "after"))
    soft, hard = (students[each]["test"].mean() for each in (name, LABELS))
    abstract = [
        f"One temperature takes the calibration error of an overfitted teacher from {before:.1f} to {after:.1f} "
        f"points; its soft labels at {name} give a linear student {soft:.1f} % accuracy, labels alone {hard:.1f} %."
    ]
    table = []
    for student, both in students.items():
        lead = "" if student == LABELS else text_of(both["test"] - students[LABELS]["test"])
        table.append([student, f"{both['validation'].mean():.1f}", f"{both['test'].mean():.1f}", lead])
    header = ["student", "validation", "test", "lead over labels alone"]
    shown = Table("Accuracy of the students in %, and their lead with its 95 % interval.", header, table)
    figures = [diagrams(teachers), curve(config, teachers, students)]
    return Section("Distillation", abstract, text, figures, hypotheses, [shown])
