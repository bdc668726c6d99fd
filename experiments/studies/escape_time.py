"""Escape time: how many steps it takes to leave a confidently wrong start.

Two free logits start at margin m0 = z_rival - z_truth, and gradient steps bring it to 0. The clock is tau = lr * steps.
Small steps follow the flow dm/dtau = g_truth - g_rival, which takes the time T from m0 to 0:

    softmax + cross-entropy   dm/dtau = -2 / (1 + e^-m)          T = (m0 + 1 - e^-m0) / 2
    softmax + squared error   dm/dtau = -4 e^-m / (1 + e^-m)^3   T = (e^m0 + 3 m0 - 3 e^-m0 - e^-2m0 / 2 + 5/2) / 4
    linear + squared error    dm/dtau = -(1 + m)                 T = ln(1 + m0)

T is linear, exponential and logarithmic in m0. Both softmax arms know the margin alone. The linear output knows the
level of the logits as well. Its margin decays towards that of the one-hot target, -1, so 0 is an event on the way. Its
mean logit moves independently. It starts at the target's mean, 1/2, and the two logits halve the way between them. The
steps are then

    SGD       T / lr
    momentum  T (1 - beta) / lr: a geometric sum of past gradients, once it has filled
    Adam      m0 / (2 lr) + eps T / lr: each logit moves by lr g / (g + eps), if the second moment follows g^2

Adam is sign descent, linear in m0, plus eps times SGD. Under softmax + squared error, g = 2 e^-m far out. Then dT/dm0
reaches twice the linear rate 1 / (2 lr) at the knee m0 = ln(2 / eps): up to there Adam hides the saturation.

Sources: Solla, Levin and Fleisher (1988); Hui and Belkin (2021); Kingma and Ba (2015); compensated sums: Knuth, The Art
of Computer Programming 2, 4.2.2.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Float64, Int32, PyTree
from matplotlib import colormaps

from experiments import arms, plots
from experiments.arms import LINEAR_SE, SOFTMAX_CE, SOFTMAX_SE
from experiments.config import distinct
from experiments.findings import DRAWS, STEPS, Hypothesis, Plot, Section, Table, Tier, decided
from experiments.results import Progress, Record, Setting

ARMS = (SOFTMAX_CE, SOFTMAX_SE, LINEAR_SE)
RULES = ("SGD", "momentum", "Adam")
PLAIN = "plain float32"
GENTLE_RATE, TOLERANCE, KNEE_TOLERANCE = 0.01, 0.02, 1.5
CHUNK, UNROLL = 1 << 18, 4  # steps a call, and steps an iteration of its loop
STALL_MARGINS = np.arange(0.0, 24.0, 0.01)

Rate = Annotated[float, msgspec.Meta(ge=1e-6, le=1.0)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A start whose predicted number of steps exceeds `max_steps` is left out, and counted."""

    max_margin: Annotated[float, msgspec.Meta(ge=1.0, le=20.0)]
    margin_step: Annotated[float, msgspec.Meta(ge=0.125, le=1.0)]
    learning_rates: Annotated[list[Rate], msgspec.Meta(min_length=1)]
    momentum: Annotated[float, msgspec.Meta(ge=0.0, le=0.99)]
    adam_eps: Annotated[list[Annotated[float, msgspec.Meta(ge=1e-8, le=0.1)]], msgspec.Meta(min_length=1)]
    max_steps: Annotated[int, msgspec.Meta(ge=100, le=100_000_000)]

    def __post_init__(self):
        distinct(self, "learning_rates", "adam_eps")


def flow_time(arm: str, margin: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """T(m0), the time of the gradient flow from margin m0 to 0, in units of lr * steps."""
    m, e = np.asarray(margin, np.float64), np.exp(-np.asarray(margin, np.float64))
    return {
        SOFTMAX_CE: (m + 1 - e) / 2,
        SOFTMAX_SE: (1 / e + 3 * m - 3 * e - e**2 / 2 + 2.5) / 4,
        LINEAR_SE: np.log1p(m),
    }[arm]


def predicted_steps(
    arm: str,
    rule: str,
    rate: float | Float64[np.ndarray, " n"],
    eps: float | Float64[np.ndarray, " n"],
    momentum: float,
    margin: Float64[np.ndarray, " n"],
) -> Float64[np.ndarray, " n"]:
    """Steps from m0 to 0 in the limit of small steps."""
    time = flow_time(arm, margin)
    return {"SGD": time, "momentum": time * (1 - momentum), "Adam": margin / 2 + eps * time}[rule] / rate


class Lanes(NamedTuple):
    """Escapes that run side by side: what each starts from and steps by."""

    margin: Float32[Array, "*n"]
    rate: Float32[Array, "*n"]
    eps: Float32[Array, "*n"]


class State(NamedTuple):
    """One escape: its logits as the unevaluated sum z + lost, and where it was when the margin passed 0."""

    z: Float32[Array, "*n 2"]
    lost: Float32[Array, "*n 2"]
    memory: PyTree
    before: Int32[Array, "*n"]  # whole steps made before the one that passes 0; -1 until then
    part: Float32[Array, "*n"]  # the part of that step up to 0, by linear interpolation


def loss(arm: str, z: Float[Array, " 2"]) -> Float[Array, ""]:
    """The arm's loss, class 0 being the truth."""
    return arms.loss(arm, z, jnp.zeros((), jnp.int32))


def optimizer(rule: str, rate: Array, eps: Array, momentum: float) -> optax.GradientTransformation:
    """The optax optimizer that a rule names; Adam with its usual decays .9 and .999."""
    if rule == "Adam":
        return optax.adam(rate, eps=eps)
    return optax.sgd(rate, momentum=momentum if rule == "momentum" else None)


def start(arm: str, rule: str, momentum: float, lanes: Lanes) -> State:
    """The first states: half of the margin on each side of 0, or of 1/2 of a linear output."""

    def one(margin, rate, eps):
        z = jnp.stack([-margin, margin]) / 2 + (0.5 if arm == LINEAR_SE else 0.0)
        memory = optimizer(rule, rate, eps, momentum).init(z)
        return State(z, jnp.zeros_like(z), memory, jnp.full((), -1, jnp.int32), jnp.zeros((), z.dtype))

    return jax.vmap(one)(*lanes)


def add(z: Float[Array, "*n"], lost: Float[Array, "*n"], update: Float[Array, "*n"]) -> tuple[Array, Array]:
    """z + lost + update as a rounded sum and what its rounding lost (Knuth's two-sum, exact for any sizes).

    Without it a start is not left at all once `lr * g < ulp(z) / 2`, as `z + lr * g` is then z. An example is softmax +
    squared error at lr = .01. The condition holds from `2 lr e^-m0 = 2^-22` on, that is from m0 = 11.34. Logits of
    m0 / 2 in [4, 8) have an ulp of 2^-21.
    """
    update = update + lost
    total = z + update
    seen = total - z
    return total, (z - (total - seen)) + (update - seen)


def step(arm: str, rule: str, momentum: float, lane: Lanes, index: Array, state: State) -> State:
    """Step number `index` of one lane. A lane that has escaped goes on, and nobody looks at it again."""
    # The gradient is taken at z alone: leaving out `lost`, half an ulp, changes it by 2^-22 of itself at most.
    gradient = jax.grad(partial(loss, arm))(state.z)
    updates, memory = optimizer(rule, lane.rate, lane.eps, momentum).update(gradient, state.memory)
    z, lost = add(state.z, state.lost, jnp.asarray(updates))
    was, now = (z[1] - z[0] + (lost[1] - lost[0]) for z, lost in ((state.z, state.lost), (z, lost)))
    passes = (now <= 0) & (state.before < 0)
    before = jnp.where(passes, index, state.before)
    return State(z, lost, memory, before, jnp.where(passes, was / (was - now), state.part))


@partial(jax.jit, static_argnames=("arm", "rule", "momentum"))
def advance(arm: str, rule: str, momentum: float, lanes: Lanes, index: Array, state: State) -> State:
    """CHUNK steps of all lanes, or fewer once all have escaped."""
    batch = jax.vmap(partial(step, arm, rule, momentum), in_axes=(0, None, 0))

    def some(carry):
        done, state = carry
        for _ in range(UNROLL):
            state, done = batch(lanes, index + done, state), done + 1
        return done, state

    def busy(carry):
        done, state = carry
        return (done < CHUNK) & jnp.any(state.before < 0)

    return jax.lax.while_loop(busy, some, (jnp.zeros((), jnp.int32), state))[1]


def escape(arm: str, rule: str, momentum: float, lanes: Lanes, limit: int) -> Iterator[tuple[int, State]]:
    """Steps made and states, chunk by chunk, until every lane has escaped or `limit` steps are made."""
    steps, state = 0, start(arm, rule, momentum, lanes)
    while steps < limit and np.any(np.asarray(state.before) < 0):
        state = advance(arm, rule, momentum, lanes, jnp.asarray(steps, jnp.int32), state)
        steps += CHUNK
        yield steps, state


def steps_taken(state: State) -> Float64[np.ndarray, " n"]:
    """Each lane's steps to margin 0, NaN where it is still on its way."""
    before = np.asarray(state.before, np.float64)
    return np.where(before < 0, np.nan, before + np.asarray(state.part, np.float64))


def stalls(rate: float, margin: Float64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether one plain float32 step of SGD under squared error leaves both logits as they were, as do all later."""
    descent = optax.sgd(rate)

    @jax.jit
    @jax.vmap
    def stays(margin):
        z = jnp.stack([-margin, margin]) / 2
        updates, _ = descent.update(jax.grad(partial(loss, SOFTMAX_SE))(z), descent.init(z))
        return jnp.all(optax.apply_updates(z, updates) == z)

    return np.asarray(stays(margin.astype(np.float32)))


def stall_margin(rate: float) -> float:
    """Theory of `stalls`: the smallest of STALL_MARGINS where lr g is less than half an ulp of the logits +- m / 2."""
    m = STALL_MARGINS
    size = rate * 2 * np.exp(-m) / (1 + np.exp(-m)) ** 3
    return float(m[size < np.spacing((m / 2).astype(np.float32)) / 2][0])


def plan(config: Config) -> dict[tuple[str, str], tuple[list[tuple[float, float, float]], int]]:
    """(arm, rule) -> its lanes (margin, rate, eps) within `max_steps`, and how many were left out."""
    margins = config.margin_step * np.arange(1, math.floor(config.max_margin / config.margin_step) + 1)
    lanes = {}
    for arm, rule in itertools.product(ARMS, RULES):
        all_eps = config.adam_eps if rule == "Adam" else [0.0]
        kept, count = [], 0
        for rate, eps in itertools.product(config.learning_rates, all_eps):
            short = margins[predicted_steps(arm, rule, rate, eps, config.momentum, margins) <= config.max_steps]
            kept += [(float(margin), rate, eps) for margin in short]
            count += margins.size - short.size
        lanes[arm, rule] = kept, count
    return lanes


def tier(config: Config, settings: Mapping[str, Setting], value: str) -> Tier | None:
    """A count of steps may differ by one. Plain float32 parameters stall by the rounding of the device."""
    if value == "steps":
        return STEPS
    return DRAWS if value == "margin" else None


def run(config: Config) -> Iterator[Record | Progress]:
    """One record for each arm, rule, rate and eps: starts and steps; one a rate for plain float32 parameters."""
    lanes = {key: np.array(kept).T for key, (kept, _) in plan(config).items() if kept}
    work = {}
    for (arm, rule), (margin, rate, eps) in lanes.items():
        work[arm, rule] = float(np.max(predicted_steps(arm, rule, rate, eps, config.momentum, margin), initial=CHUNK))
    done = 0.0
    for (arm, rule), (margin, rate, eps) in lanes.items():
        share, taken = work[arm, rule], np.zeros(0)
        batch = Lanes(*(jnp.asarray(x, jnp.float32) for x in (margin, rate, eps)))
        for steps, state in escape(arm, rule, config.momentum, batch, 2 * math.ceil(share)):
            taken = steps_taken(state)
            yield Progress((done + min(steps, share)) / sum(work.values()), f"{arm}, {rule}, {steps} steps")
        done += share
        for at_rate, at_eps in dict.fromkeys(zip(rate.tolist(), eps.tolist(), strict=True)):
            mine = (rate == at_rate) & (eps == at_eps)
            settings = {"arm": arm, "rule": rule, "rate": at_rate, "eps": at_eps}
            yield Record(settings, {"margin": margin[mine], "steps": taken[mine]})
    for rate in config.learning_rates:
        stuck = stalls(rate, STALL_MARGINS).astype(np.float64)
        yield Record(
            {"arm": SOFTMAX_SE, "rule": PLAIN, "rate": rate, "eps": 0.0}, {"margin": STALL_MARGINS, "stalls": stuck}
        )


Curves = dict[tuple[str, str, float, float], dict[str, np.ndarray]]  # (arm, rule, rate, eps)


def deviation(config: Config, curves: Curves, arm: str, rule: str, rate: float) -> Float64[np.ndarray, " n"]:
    """Measured steps / predicted steps - 1 at every start; infinite where a lane did not escape."""
    off = [np.zeros(0)]
    for (*which, eps), curve in curves.items():
        if which == [arm, rule, rate]:
            off.append(curve["steps"] / predicted_steps(arm, rule, rate, eps, config.momentum, curve["margin"]) - 1)
    return np.nan_to_num(np.concatenate(off), nan=np.inf)


def growth(curve: dict[str, np.ndarray], rate: float) -> tuple[np.ndarray, np.ndarray]:
    """dT/dm0 in units of the linear rate 1 / (2 lr), between neighbouring starts."""
    margin = curve["margin"]
    return (margin[1:] + margin[:-1]) / 2, 2 * rate * np.diff(curve["steps"]) / np.diff(margin)


def knee(margin: np.ndarray, slope: np.ndarray) -> float:
    """The margin beyond which the growth stays above 2, interpolated in its logarithm; infinite if there is none."""
    low = np.flatnonzero(~(slope >= 2))
    if low.size == 0 or low[-1] + 1 == slope.size:
        return math.inf
    i = int(low[-1])
    part = math.log(2 / slope[i]) / math.log(slope[i + 1] / slope[i])
    return float(margin[i] + part * (margin[i + 1] - margin[i]))


def knees(curves: Curves) -> dict[tuple[float, float], float]:
    """(rate, eps) -> knee - ln(2 / eps) of squared error, wherever the starts reach far enough to show it."""
    found = {}
    for (arm, rule, rate, eps), curve in curves.items():
        place = math.log(2 / eps) if eps else math.inf
        if (arm, rule) == (SOFTMAX_SE, "Adam") and curve["margin"][-1] >= place + KNEE_TOLERANCE:
            found[rate, eps] = knee(*growth(curve, rate)) - place
    return found


def _verdict(values: Sequence[float], width: float) -> str:
    return decided(all(abs(value) <= width for value in values)) if values else "undecided"


def sgd_hypothesis(config: Config, curves: Curves) -> Hypothesis:
    """SGD against the flow, at the gentle rates."""
    rates = [rate for rate in config.learning_rates if rate <= GENTLE_RATE]
    off = {arm: [x for rate in rates for x in deviation(config, curves, arm, "SGD", rate)] for arm in ARMS}
    worst = {arm: max(map(abs, xs)) for arm, xs in off.items() if xs}
    return Hypothesis(
        "Escape takes time linear in the margin under softmax + cross-entropy, exponential under softmax + squared "
        "error, logarithmic under linear + squared error: SGD takes the time $T$ of the gradient flow.",
        "largest deviation from $T$: " + (", ".join(f"{x:.2%} ({arm})" for arm, x in worst.items()) or "not measured"),
        f"a start at $lr <= {GENTLE_RATE:g}$ takes more than {TOLERANCE:.0%} more or less than $T$, under any arm",
        _verdict([] if len(worst) < len(ARMS) else list(worst.values()), TOLERANCE),
        against_flow(config, curves),
    )


def knee_hypothesis(config: Config, curves: Curves, *, gentle: bool) -> Hypothesis:
    """Adam's knee, at the rates of `sgd_hypothesis` or at the larger ones."""
    found = {key: off for key, off in knees(curves).items() if (key[0] <= GENTLE_RATE) == gentle}
    shown = ", ".join(f"{off:+.2f} ($lr = {rate:g}$, $eps = {eps:g}$)" for (rate, eps), off in found.items())
    return Hypothesis(
        f"At $lr {'<=' if gentle else '>'} {GENTLE_RATE:g}$ Adam hides the saturation of softmax + squared error up to "
        "the knee $m0 = ln(2 / eps)$, and no further.",
        "knee less $ln(2 / eps)$: " + (shown or "no knee within reach of the starts"),
        "a knee, where one more nat takes twice the $1 / (2 lr)$ steps of sign descent, is more than "
        f"{KNEE_TOLERANCE:g} from $ln(2 / eps)$",
        _verdict(list(found.values()), KNEE_TOLERANCE),
        against_knee(config, curves) if gentle else (),
    )


def time_figure(config: Config, curves: Curves) -> Plot:
    """Time against start, one panel a rule, in the clock that compares its steps with the flow."""
    figure, axes = plots.figure(columns=3, height=3.9)
    fine = np.linspace(0.1, config.max_margin, 300)
    for axis, rule in zip(axes, RULES, strict=True):
        eps = config.adam_eps[0] if rule == "Adam" else 0.0
        clock = 1 / (1 - config.momentum) if rule == "momentum" else 1.0
        for arm in ARMS:
            for rate, marker in zip(config.learning_rates, itertools.cycle("os^v")):
                curve = curves.get((arm, rule, rate, eps), {"margin": np.zeros(0), "steps": np.zeros(0)})
                look = {"ms": 4, "alpha": 0.75, "mew": 0, "color": arms.COLOURS[arm], "label": f"{arm}, lr {rate:g}"}
                axis.plot(curve["margin"], clock * rate * curve["steps"], marker, **look)
            want = clock * predicted_steps(arm, rule, 1.0, eps, config.momentum, fine)
            axis.plot(fine, want, **plots.THEORY, label="theory" if arm == ARMS[-1] else None)
        title = rf"Adam, $\epsilon = {eps:g}$" if rule == "Adam" else rule
        axis.set(yscale="log", title=title, xlabel="start margin $m_0$ (nats)")
        axis.set_ylabel(r"lr $\cdot$ steps $/\,(1 - \beta)$" if rule == "momentum" else r"lr $\cdot$ steps")
    plots.legend(figure, *axes[0].get_legend_handles_labels())
    caption = (
        "Time from margin $m0$ to 0. Dots: steps made on the device, with learning rate lr. Dashed: the limit of small "
        "steps."
    )
    return Plot(figure, caption)


def knee_figure(config: Config, curves: Curves) -> Plot:
    """Figure of the steps that one more nat of margin costs Adam under squared error, for each eps."""
    rates = config.learning_rates
    figure, axes = plots.figure(columns=len(rates), height=3.6)
    fine = np.linspace(0.25, config.max_margin, 300)
    colours = colormaps["viridis"](np.linspace(0.0, 0.85, len(config.adam_eps)))
    for axis, rate in zip(axes, rates, strict=True):
        for eps, colour in zip(config.adam_eps, colours, strict=True):
            curve = curves.get((SOFTMAX_SE, "Adam", rate, eps), {"margin": np.zeros(0), "steps": np.zeros(0)})
            axis.plot(*growth(curve, rate), "o-", ms=3, lw=1, color=colour, label=rf"$\epsilon = {eps:g}$")
            axis.plot(fine, 1 + eps * np.exp(fine) * (1 + np.exp(-fine)) ** 3 / 2, **plots.THEORY)
            if math.log(2 / eps) <= config.max_margin:
                axis.axvline(math.log(2 / eps), color=colour, lw=0.9)
        axis.axhline(2, color="0.5", lw=0.9)
        axis.set(yscale="log", ylim=(0.2, 300), title=f"lr {rate:g}", xlabel="start margin $m_0$ (nats)")
    axes[0].set_ylabel("steps of one more nat, in units of 1 / (2 lr)")
    axes[0].plot([], [], **plots.THEORY, label="theory")
    plots.legend(figure, *axes[0].get_legend_handles_labels())
    caption = (
        "Adam under softmax + squared error: the steps that one more nat of start margin takes. Vertical: "
        "$ln(2 / eps)$. Horizontal: 2, the level of the knee. Dashed: the limit of small steps, with a second moment "
        "that follows the gradient at once."
    )
    return Plot(figure, caption)


def stall_places(curves: Curves) -> dict[float, float]:
    """Rate -> the first margin from which on every start of plain float32 SGD stalls."""
    places = {}
    for (_, rule, rate, _), curve in curves.items():
        if rule == PLAIN:
            moving = np.flatnonzero(curve["stalls"] == 0)
            first = moving[-1] + 1 if moving.size else 0
            places[rate] = float(curve["margin"][min(first, curve["margin"].size - 1)])
    return places


def tables(config: Config, curves: Curves) -> list[Table]:
    """How far every rule and rate is from its limit, and where plain float32 parameters stand still."""
    rows = []
    for rule, arm, rate in itertools.product(RULES, ARMS, config.learning_rates):
        off = deviation(config, curves, arm, rule, rate)
        if off.size:
            rows.append([rule, arm, f"{rate:g}", str(off.size), f"{np.abs(off).max():.2%}", f"{off[-1]:+.3%}"])
    header = ["rule", "arm", "lr", "starts", "largest deviation", "deviation at the last start"]
    stalled = [[f"{rate:g}", f"{m:.2f}", f"{stall_margin(rate):.2f}"] for rate, m in stall_places(curves).items()]
    return [
        Table("Measured steps against the limit of small steps.", header, rows),
        Table(
            "Start margin from which plain float32 SGD under softmax + squared error never moves.",
            ["lr", "measured", "lr g = half an ulp"],
            stalled,
        ),
    ]


def against_flow(config: Config, curves: Curves) -> list[str]:
    """The effects that the flow leaves out."""
    coarse, fine = max(config.learning_rates), min(config.learning_rates)
    off = {arm: np.abs(deviation(config, curves, arm, "SGD", coarse)).max(initial=0) for arm in ARMS}
    slow = deviation(config, curves, SOFTMAX_CE, "momentum", fine)
    said = [
        f"At $lr = {coarse:g}$ SGD is off $T$ by up to {', '.join(f'{x:.0%} ({arm})' for arm, x in off.items())}. "
        "At $lr = 1$ one step under linear + squared error reaches the target from anywhere.",
        f"In float32 the exponential law ends early. At $lr = {fine:g}$ plain parameters do not move at all from "
        f"$m0 = {stall_places(curves)[fine]:.2f}$ on, as a step is less than half an ulp of the logits. The escapes "
        "here keep what rounding loses in a second number.",
    ]
    if slow.size:
        said.append(
            "Momentum nears its limit only once its sum has filled, after about $1 / (1 - beta)$ = "
            f"{1 / (1 - config.momentum):.0f} steps. At $lr = {fine:g}$ softmax + cross-entropy is {slow[0]:+.0%} off "
            f"the limit at the first start, {slow[-1]:+.0%} at the last."
        )
    return said


def against_knee(config: Config, curves: Curves) -> list[str]:
    """Adam is no sign descent."""
    fine = min(config.learning_rates)
    ratios = [growth(curve, key[2])[1] for key, curve in curves.items() if key[:3] == (SOFTMAX_SE, "Adam", fine)]
    least = min((float(np.min(x, initial=np.inf)) for x in ratios), default=math.inf)
    return [
        "Adam below its knee is not sign descent: its second moment remembers the small gradients of the start. At "
        f"$lr = {fine:g}$ one more nat takes as little as {least:.2f} of the $1 / (2 lr)$ steps of sign descent."
    ]


def abstract(config: Config, curves: Curves) -> list[str]:
    """How far SGD is from the laws, and what they mean at the last start."""
    fine = min(config.learning_rates)
    off = max(float(np.abs(deviation(config, curves, arm, "SGD", fine)).max(initial=0)) for arm in ARMS)
    last = float(curves[SOFTMAX_SE, "SGD", fine, 0.0]["margin"][-1])
    steps = {arm: predicted_steps(arm, "SGD", fine, 0.0, config.momentum, np.array([last]))[0] for arm in ARMS}
    return [
        "The steps to leave such a start grow linearly in its margin under softmax + cross-entropy, exponentially "
        f"under softmax + squared error and logarithmically under linear + squared error: from {last:g} nats at "
        f"learning rate {fine:g} they are {', '.join(f'{n:,.0f}' for n in steps.values())} respectively, and SGD is "
        f"within {off:.1%} of these laws."
    ]


def report(config: Config, records: Sequence[Record]) -> Section:
    """The three laws, the knee, and where they end."""
    curves: Curves = {}
    for at, values in records:
        key = (str(at["arm"]), str(at["rule"]), float(at["rate"]), float(at["eps"]))
        curves[key] = {name: np.asarray(value) for name, value in values.items()}
    left_out = sum(count for _, count in plan(config).values())
    text = (
        "Two logits start confidently wrong: the wrong one leads by the margin $m0$, in nats. Gradient steps with the "
        "learning rate lr bring the margin to 0. Three arms take them. Softmax + cross-entropy pulls with the same "
        "force from everywhere, softmax + squared error with a force of $e^-m$, and linear + squared error with one "
        "that grows with the distance.\n\n"
        "The gradient flow is the limit of small steps. Its time from $m0$ to 0, in units of lr times steps, is "
        "$T = (m0 + 1 - e^-m0) / 2$ under softmax + cross-entropy, "
        "$T = (e^m0 + 3 m0 - 3 e^-m0 - e^(-2 m0) / 2 + 5 / 2) / 4$ under softmax + squared error and "
        "$T = ln(1 + m0)$ under linear + squared error. The last presumes a one-hot target: its margin decays towards "
        "-1 and passes 0 on the way.\n\n"
        "Adam divides each gradient by its recent size plus $eps$. Gradients far below $eps$ therefore count as what "
        "they are, and larger ones as their sign."
    )
    if left_out:
        text += (
            f"\n\n{left_out} combinations of arm, rule, rate, eps and start were left out, as they are predicted to "
            f"take more than max_steps = {config.max_steps:,} steps."
        )
    hypotheses = [sgd_hypothesis(config, curves), knee_hypothesis(config, curves, gentle=True)]
    if max(config.learning_rates) > GENTLE_RATE:
        hypotheses.append(knee_hypothesis(config, curves, gentle=False))
    figures = [time_figure(config, curves), knee_figure(config, curves)]
    return Section(
        "Steps out of a wrong start", abstract(config, curves), text, figures, hypotheses, tables(config, curves)
    )
