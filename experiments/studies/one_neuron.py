"""One neuron: the classic demonstration of learning slowdown, with its correct gradients.

A sigmoid neuron a = sigmoid(w x + b) is to answer 0 to the input x = 1. It starts badly wrong, or very badly, and takes
gradient steps in w and b. As x = 1 the two gradients are equal, d = dC/dw = dC/db:

    squared error   C = a^2 / 2        d = a * a (1 - a)
    cross-entropy   C = -log(1 - a)    d = a

The sigmoid's derivative a (1 - a) is in the first gradient and cancels from the second. Squared error hardly moves
while a is near 1. Nielsen (2015), chapter 3, shows this with rate .15 for squared error and .005 for cross-entropy. The
scripts of that page step by 1 / (1 - a) under cross-entropy: that is dC/da without the derivative, and grows as e^z.
They are js/saturation3.js and 4, repository mnielsen/nnadl_site, commit dab1c22. Here the step is a; theirs is drawn,
too.

Measured are float32 steps on the device, with gradients by autodiff through jprob. The theory is the same recursion in
Python's float64, with d written out by hand.

Source: Nielsen (2015), Neural Networks and Deep Learning, chapter 3.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float, Float64

from experiments import arms, plots
from experiments.config import distinct
from experiments.findings import GENTLE_TRAINING, Hypothesis, Plot, Section, Table, Tier, decided
from experiments.results import Progress, Record, Setting
from jprob import bernoulli

TOLERANCE = 1e-4
SQUARED, CROSS = "squared error", "cross-entropy"
SCRIPT, SCRIPT_RATE = "the page's script", 0.005
COLOURS = {SQUARED: arms.COLOURS[arms.SOFTMAX_SE], CROSS: arms.COLOURS[arms.SOFTMAX_CE]}

Weight = Annotated[float, msgspec.Meta(ge=-10.0, le=10.0)]


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A loss and the rate it is trained with."""

    loss: Literal["squared error", "cross-entropy"]
    rate: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every training runs from every start (w, b)."""

    starts: Annotated[list[tuple[Weight, Weight]], msgspec.Meta(min_length=1, max_length=4)]
    trainings: Annotated[list[Training], msgspec.Meta(min_length=1)]
    num_steps: Annotated[int, msgspec.Meta(ge=1, le=100_000)]

    def __post_init__(self):
        distinct(self, "starts", "trainings")


class Path(NamedTuple):
    """Output a and cost C before the first step and after each one."""

    output: np.ndarray
    cost: np.ndarray


def cost(loss: str, params: Float[Array, " 2"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """C and the output a, for x = 1 and target 0."""
    logit = params[0] * 1.0 + params[1]
    output = jax.nn.sigmoid(logit)
    return (output**2 / 2 if loss == SQUARED else bernoulli.cross_entropy(logit, jnp.zeros_like(logit))), output


@partial(jax.jit, static_argnames=("loss", "num_steps"))
def train(loss: str, rate: Float[Array, ""], start: Float[Array, " 2"], num_steps: int) -> tuple[Array, Array]:
    """(output, cost) along `num_steps` gradient steps."""

    def step(params, _):
        (value, output), gradient = jax.value_and_grad(partial(cost, loss), has_aux=True)(params)
        return params - rate * gradient, (output, value)

    return jax.lax.scan(step, start, length=num_steps + 1)[1]


def theory(loss: str, rate: float, start: tuple[float, float], num_steps: int) -> Path:
    """The recursion of `train` written out, in float64; for SCRIPT the update that the book's page makes."""
    w, b = start
    path = Path(np.empty(num_steps + 1), np.empty(num_steps + 1))
    for index in range(num_steps + 1):
        odds = math.exp(-min(max(w + b, -700.0), 700.0))  # beyond, the page's update leaves the range of float64
        a, rest = 1 / (1 + odds), odds / (1 + odds)
        path.output[index], path.cost[index] = a, a * a / 2 if loss == SQUARED else -math.log(rest)
        d = {SQUARED: a * a * rest, CROSS: a, SCRIPT: 1 / rest}[loss]
        w, b = w - rate * d, b - rate * d
    return path


def steps_to_half(output: Float64[np.ndarray, " n"]) -> float:
    """The number of steps after which the output is below 1/2; infinite where it stays above."""
    below = np.flatnonzero(output < 0.5)
    return float(below[0]) if below.size else math.inf


def tier(config: Config, settings: Mapping[str, Setting], value: str) -> Tier | None:
    """One training of one neuron amplifies nothing."""
    return GENTLE_TRAINING


def run(config: Config) -> Iterator[Record | Progress]:
    """One record a start and training: output and cost, step by step."""
    jobs = [(start, training) for start in config.starts for training in config.trainings]
    for done, ((w, b), training) in enumerate(jobs):
        yield Progress(done / len(jobs), f"{training.loss}, lr {training.rate:g}")
        path = train(training.loss, jnp.float32(training.rate), jnp.array([w, b], jnp.float32), config.num_steps)
        settings = {"w": w, "b": b, "loss": training.loss, "rate": training.rate}
        yield Record(settings, {name: np.asarray(x, np.float64) for name, x in zip(Path._fields, path, strict=True)})


Paths = dict[tuple[float, float, str, float], Path]  # (w, b, loss, rate)


def deviation(key: tuple[float, float, str, float], path: Path) -> float:
    """Largest absolute deviation of a measured path, output or cost, from the float64 recursion."""
    w, b, loss, rate = key
    want = theory(loss, rate, (w, b), path.output.size - 1)
    return float(np.max(np.abs(np.array(path) - np.array(want))))


def integration_hypothesis(paths: Paths) -> Hypothesis:
    """Float32 on the device against float64 by hand."""
    worst = np.max([deviation(key, path) for key, path in paths.items()])  # NaN if one is, unlike max()
    return Hypothesis(
        "The demonstration's curves are what the formulas give: no part of them is rounding.",
        f"largest deviation of an output or a cost at any step: {worst:.1e}",
        f"a number is more than ${TOLERANCE:g}$ from the same recursion in float64",
        decided(worst <= TOLERANCE),
    )


def shared_rate(config: Config) -> float | None:
    """The largest rate that both losses are trained with."""
    rates = [{t.rate for t in config.trainings if t.loss == loss} for loss in (SQUARED, CROSS)]
    return max(rates[0] & rates[1], default=None)


def slowdown_hypothesis(config: Config, paths: Paths) -> Hypothesis:
    """Both losses at one rate, from the most wrong start."""
    w, b = worst_start(config)
    rate = shared_rate(config)
    verdict, measured = "undecided", "no rate is trained under both losses"
    if rate is not None:
        slow, fast = (steps_to_half(paths[w, b, loss, rate].output) for loss in (SQUARED, CROSS))
        measured = f"at learning rate {rate:g}: {slow:g} steps (squared error), {fast:g} (cross-entropy)"
        verdict = "undecided" if slow == fast == math.inf else decided(fast < slow)
    return Hypothesis(
        f"From $w = {w:g}$ and $b = {b:g}$, at the same learning rate, the output is below 1/2 sooner under "
        "cross-entropy than under squared error.",
        measured,
        "squared error needs as few steps or fewer",
        verdict,
        against_slowdown(config, paths),
    )


def worst_start(config: Config) -> tuple[float, float]:
    """The start with the largest output."""
    return max(config.starts, key=sum)


def matching_rate(start: tuple[float, float], steps: int) -> float:
    """The smallest rate at which squared error is below 1/2 after `steps` steps, by bisection of log rate."""
    low, high = 1e-4, 1e4
    for _ in range(60):
        middle = math.sqrt(low * high)
        reached = steps_to_half(theory(SQUARED, middle, start, steps).output) <= steps
        low, high = (low, middle) if reached else (middle, high)
    return high


def figure(config: Config, paths: Paths) -> Plot:
    """Cost above, output below, one column a start."""
    columns, fastest = len(config.starts), max(each.rate for each in config.trainings)
    made, axes = plots.figure(columns=columns, rows=2, height=5.6)
    for (row, name), (column, (w, b)) in itertools.product(enumerate(("cost", "output")), enumerate(config.starts)):
        axis, script = axes[row * columns + column], theory(SCRIPT, SCRIPT_RATE, (w, b), config.num_steps)
        label = f"cross-entropy, lr {SCRIPT_RATE:g}, as the book's script steps"
        axis.plot(getattr(script, name), color=plots.PALETTE[5], lw=1.4, label=label)
        for each in config.trainings:
            look = {"color": COLOURS[each.loss], "lw": 2.8 if each.rate == fastest else 1.4}
            axis.plot(getattr(paths[w, b, each.loss, each.rate], name), label=f"{each.loss}, lr {each.rate:g}", **look)
            axis.plot(getattr(theory(each.loss, each.rate, (w, b), config.num_steps), name), **plots.THEORY)
        axis.set(xlabel="step")
        if name == "cost":
            axis.set(yscale="log", ylabel="cost $C$, of each loss", title=f"start $w = {w:g}$, $b = {b:g}$")
        else:
            axis.set(ylim=(0, 1), ylabel="output $a$ (target 0)", title=f"start $w = {w:g}$, $b = {b:g}$")
    axes[0].plot([], [], **plots.THEORY, label="theory")
    plots.legend(made, *axes[0].get_legend_handles_labels())
    caption = (
        "Cost and output against the step, with learning rate lr. Squared error rests on a plateau if the start is "
        "very wrong; cross-entropy at the same rate does not. Dashed: the recursion in float64."
    )
    return Plot(made, caption)


def table(config: Config, paths: Paths) -> Table:
    """The numbers that are read off the curves."""
    rows = []
    for (w, b, loss, rate), path in paths.items():
        steps = steps_to_half(path.output)
        half = f"{steps:g}" if math.isfinite(steps) else f"> {config.num_steps}"
        ends = [f"{path.output[0]:.4f}", half, f"{path.output[-1]:.4f}", f"{path.cost[-1]:.4f}"]
        rows.append([f"({w:g}, {b:g})", loss, f"{rate:g}", *ends, f"{deviation((w, b, loss, rate), path):.1e}"])
    header = [
        "start ($w$, $b$)",
        "loss",
        "lr",
        "first $a$",
        "steps to $a < 1 / 2$",
        "last $a$",
        "last $C$",
        "deviation",
    ]
    return Table(f"{config.num_steps} steps; the deviation is from the float64 recursion.", header, rows)


def against_slowdown(config: Config, paths: Paths) -> list[str]:
    """The rates differ, the page's gradient is not the gradient, and a larger rate makes up for the derivative."""
    w, b = start = worst_start(config)
    last = {(loss, rate): path.output[-1] for (*at, loss, rate), path in paths.items() if tuple(at) == start}
    finals = "; ".join(f"{output:.3f} ({loss}, {rate:g})" for (loss, rate), output in last.items())
    script = theory(SCRIPT, SCRIPT_RATE, start, config.num_steps).output
    said = [
        f"The learning rate decides as much as the loss. The outputs after {config.num_steps} steps are {finals}.",
        "The scripts of the book's web page step by $1 / (1 - a)$ under cross-entropy, not by $a$: from this start by "
        f"{1 / (1 - script[0]):.0f} instead of {script[0]:.2f}. At learning rate {SCRIPT_RATE:g} their output is below "
        f"1/2 after {steps_to_half(script):g} steps and ends at {script[-1]:.3f}.",
    ]
    rate = shared_rate(config)
    fast = math.inf if rate is None else steps_to_half(paths[w, b, CROSS, rate].output)
    if rate is not None and 0 < fast < math.inf:
        matching = matching_rate(start, int(fast))
        said.append(
            f"A larger learning rate makes up for the derivative here: at {matching:.2f}, {matching / rate:.1f} times "
            f"as large, squared error needs the {fast:g} steps of cross-entropy at {rate:g}. One example does not show "
            "what many examples of different margins, sharing a rate, would need."
        )
    return said


def report(config: Config, records: Sequence[Record]) -> Section:
    """The four panels and what they do and do not show."""
    paths: Paths = {}
    for settings, values in records:
        key = (float(settings["w"]), float(settings["b"]), str(settings["loss"]), float(settings["rate"]))
        paths[key] = Path(np.asarray(values["output"]), np.asarray(values["cost"]))
    text = (
        "The output of a neuron is $a$, the sigmoid of $w x + b$. It should answer 0 to the input $x = 1$ and starts "
        "near 1: the demonstration of Nielsen (2015), chapter 3. The gradient of squared error carries the derivative "
        "of the sigmoid, $a (1 - a)$, which vanishes there. The gradient of cross-entropy is the error $a$.\n\n"
        "Published demonstrations give the two losses different learning rates. Here they are trained at one rate too, "
        "so that the shapes and the speeds can be compared."
    )
    hypotheses = [integration_hypothesis(paths), slowdown_hypothesis(config, paths)]
    tables = [table(config, paths)]
    return Section("One neuron", [], text, [figure(config, paths)], hypotheses, tables)
