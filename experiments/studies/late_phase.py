"""The late phase: how fast the last error goes once the prediction is right.

The K logits are free and start at 0; class 0 is the truth. Gradient steps follow the flow dz/dtau = -gradient, with
tau = learning rate * steps. The other classes stay level with each other. So the margin d = z_truth - z_other suffices,
and the missing probability is q = 1 - p_truth = (K - 1) / (K - 1 + e^d):

    softmax + cross-entropy   dd/dtau = c q             q -> 1 / (c tau),         c = K / (K - 1)
    softmax + squared error   dd/dtau = c^2 (1 - q) q^2   q -> 1 / sqrt(2 c^2 tau)
    linear + squared error    d(z - y)/dtau = -(z - y)  ||z - y|| = e^-tau

Squared error is half the squared distance, ||p - y||^2 / 2 or ||z - y||^2 / 2. The limits follow from
dq/dtau = -q (1 - q) dd/dtau with 1 - q -> 1. For K = 2 they are 1 / (2 tau) and 1 / sqrt(8 tau).

Measured are plain gradient steps in float64 through jprob. The same steps in float32 show the roundings, with jprob's
loss and with the usual code. The theory integrates the margin.

Sources: Soudry et al. (2018), The Implicit Bias of Gradient Descent on Separable Data, JMLR 19; Hairer, Norsett and
Wanner (1993), Solving Ordinary Differential Equations I (the integrator).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jaxtyping import Array, Float, Float64
from scipy.integrate import solve_ivp

from experiments import arms, plots
from experiments.arms import LINEAR_SE, SOFTMAX_CE, SOFTMAX_SE
from experiments.findings import DRAWS, GENTLE_TRAINING, Hypothesis, Plot, Section, Table, Tier, decided
from experiments.results import Progress, Record, Setting
from jprob import categorical

TOLERANCE = 0.03
EXPONENTS = {SOFTMAX_CE: -1.0, SOFTMAX_SE: -0.5}
ARMS = (*EXPONENTS, LINEAR_SE)
DOUBLE, SINGLE, USUAL = CODES = ("float64", "float32, jprob", "float32, usual code")
POINTS = 25  # a decade of tau


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Two classes carry the claims; another number of classes is run for comparison."""

    other_classes: Annotated[int, msgspec.Meta(ge=3, le=1000)]
    learning_rate: Annotated[float, msgspec.Meta(ge=1e-4, le=0.1)]
    max_tau: Annotated[float, msgspec.Meta(ge=100.0, le=1e6)]


def loss(arm: str, code: str, z: Float[Array, " k"]) -> Float[Array, ""]:
    """The loss of one example of class 0."""
    truth, y = jnp.zeros((), jnp.int32), (jnp.arange(z.size) == 0).astype(z.dtype)
    losses: dict[tuple[str, bool], Callable[[], Array]] = {
        (SOFTMAX_CE, False): lambda: categorical.cross_entropy(z, truth),
        (SOFTMAX_CE, True): lambda: optax.losses.softmax_cross_entropy_with_integer_labels(z, truth),
        (SOFTMAX_SE, False): lambda: categorical.brier_score(z, truth) / 2,
        (SOFTMAX_SE, True): lambda: jnp.sum((jax.nn.softmax(z) - y) ** 2) / 2,
        (LINEAR_SE, False): lambda: jnp.sum((z - y) ** 2) / 2,
    }
    return losses[arm, code == USUAL]()


@partial(jax.jit, static_argnames=("arm", "code"))
def descend(arm: str, code: str, z: Float[Array, " k"], rate: Float[Array, ""], steps: Array) -> Float[Array, "n k"]:
    """The logits after each number of steps; the numbers ascend."""
    gradient = jax.grad(partial(loss, arm, code))

    def on(z, count):
        z = jax.lax.fori_loop(0, count, lambda _, z: z - rate * gradient(z), z)
        return z, z

    return jax.lax.scan(on, z, jnp.diff(steps, prepend=0))[1]


def log_steps(config: Config) -> np.ndarray:
    """The numbers of steps that are recorded, level in their logarithm."""
    last = config.max_tau / config.learning_rate
    return np.unique(np.round(np.logspace(0, math.log10(last), round(POINTS * math.log10(last)))).astype(np.int32))


def error(arm: str, z: Float64[np.ndarray, "n k"]) -> Float64[np.ndarray, " n"]:
    """The missing probability 1 - p_truth, or the distance of linear outputs from the label."""
    if arm == LINEAR_SE:
        return np.linalg.norm(z - np.eye(z.shape[1])[0], axis=1)
    odds = np.exp(z[:, 1:] - z[:, :1]).sum(axis=1)
    return odds / (1 + odds)


def measure(arm: str, code: str, num_classes: int, config: Config) -> dict[str, np.ndarray]:
    """Error along the descent, computed on the host from the logits."""
    dtype, steps = np.float64 if code == DOUBLE else np.float32, log_steps(config)
    with jax.enable_x64(code == DOUBLE), jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        z = descend(arm, code, np.zeros(num_classes, dtype), np.asarray(config.learning_rate, dtype), steps)
    return {"tau": config.learning_rate * steps, "error": error(arm, np.asarray(z, np.float64))}


def tier(config: Config, settings: Mapping[str, Setting], value: str) -> Tier | None:
    """Softmax in float64. The steps of float32 end, and those of a linear output arrive, by the device's rounding."""
    if value == "tau":
        return DRAWS
    return GENTLE_TRAINING if settings["code"] == DOUBLE and settings["arm"] != LINEAR_SE else None


def run(config: Config) -> Iterator[Record | Progress]:
    """One record an arm and number of classes in float64; for two classes also the float32 ones."""
    jobs = [(arm, DOUBLE, k) for arm in ARMS for k in (2, config.other_classes)]
    jobs += [(arm, code, 2) for arm, code in itertools.product(EXPONENTS, (SINGLE, USUAL))]
    for done, (arm, code, k) in enumerate(jobs):
        yield Progress(done / len(jobs), f"{arm}, {code}, {k} classes")
        yield Record({"arm": arm, "code": code, "num_classes": k}, {**measure(arm, code, k, config)})


Curves = dict[tuple[str, str, int], dict[str, np.ndarray]]  # (arm, code, classes)


def limit(arm: str, num_classes: int, tau: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """The closed form for large tau; of a linear output it is exact."""
    c = num_classes / (num_classes - 1)
    return {SOFTMAX_CE: 1 / (c * tau), SOFTMAX_SE: 1 / (c * np.sqrt(2 * tau)), LINEAR_SE: np.exp(-tau)}[arm]


def flow(arm: str, num_classes: int, tau: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """The error along the flow: that of the integrated margin under a softmax."""
    if arm == LINEAR_SE:
        return limit(arm, num_classes, tau)
    c = num_classes / (num_classes - 1)

    def missing(d):
        return 1 / (1 + np.exp(d) / (num_classes - 1))

    def change(_, d):
        q = missing(d)
        return c * q if arm == SOFTMAX_CE else c**2 * (1 - q) * q**2

    return missing(solve_ivp(change, (0, tau[-1]), [0.0], "DOP853", t_eval=tau, rtol=1e-10, atol=1e-12).y[0])


def exponent(curve: dict[str, np.ndarray], low: float, high: float) -> float:
    """Least-squares derivative of log error in log tau over low <= tau <= high; NaN if an error is not positive."""
    tau, error = curve["tau"], curve["error"]
    inside = (tau >= low) & (tau <= high * (1 + 1e-9))
    if not np.all(error[inside] > 0):
        return math.nan
    return float(np.polyfit(np.log(tau[inside]), np.log(error[inside]), 1)[0])


def off_flow(curves: Curves, arm: str, num_classes: int) -> float:
    """Largest relative distance of the float64 steps from the flow."""
    curve = curves[arm, DOUBLE, num_classes]
    return float(np.max(np.abs(curve["error"] / flow(arm, num_classes, curve["tau"]) - 1)))


def exponent_hypothesis(config: Config, curves: Curves, arm: str) -> Hypothesis:
    """The power law of one arm over the last decade."""
    low, high = config.max_tau / 10, config.max_tau
    got = exponent(curves[arm, DOUBLE, 2], low, high)
    law = {SOFTMAX_CE: "$1 / (2 tau)$", SOFTMAX_SE: "$1 / sqrt(8 tau)$"}[arm]
    curve = curves[arm, DOUBLE, 2]
    ratio = curve["error"][-1] / limit(arm, 2, curve["tau"][-1:])[0]
    return Hypothesis(
        f"Once right, the missing probability $1 - p_truth$ falls as {law} under {arm}, with two classes.",
        f"exponent over $tau$ from {low:g} to {high:g}: {got:+.4f}; at the end {ratio:.4f} of the law; steps within "
        f"{off_flow(curves, arm, 2):.1e} of the integrated flow",
        f"the exponent is more than {TOLERANCE:g} from ${EXPONENTS[arm]:g}$",
        decided(abs(got - EXPONENTS[arm]) <= TOLERANCE),
        against_exponent(config, curves, arm),
    )


def against_exponent(config: Config, curves: Curves, arm: str) -> list[str]:
    """Other classes, an earlier decade, the linear output, and float32."""
    low, high = config.max_tau / 10, config.max_tau
    many = exponent(curves[arm, DOUBLE, config.other_classes], low, high)
    early = exponent(curves[arm, DOUBLE, 2], 1.0, 10.0)
    said = [
        f"The law is late: from $tau$ 1 to 10 the exponent is {early:+.3f}.",
        f"The exponent with {config.other_classes} classes is {many:+.4f}; the factor in front differs.",
    ]
    if arm == SOFTMAX_CE:
        linear, own = (curves[each, DOUBLE, 2] for each in (LINEAR_SE, arm))
        at = int(np.searchsorted(own["tau"], 20.0))
        said.append(
            f"Neither softmax is fast. At $tau = {own['tau'][at]:.1f}$ linear + squared error has a distance of "
            f"{linear['error'][at]:.1e} from the label, and softmax + cross-entropy misses {own['error'][at]:.1e} of "
            "the probability."
        )
    exact = curves[arm, DOUBLE, 2]["error"]
    off = {code: float(curves[arm, code, 2]["error"][-1] / exact[-1] - 1) for code in (SINGLE, USUAL)}
    laws = {code: exponent(curves[arm, code, 2], low, high) for code in off}
    said.append(
        "Plain float32 steps round the logits, with any loss. At the end the missing probability is "
        + " and ".join(f"{off[code]:+.1%} off, exponent {laws[code]:+.3f} ({code})" for code in off)
        + "."
    )
    return said


def figure(config: Config, curves: Curves) -> Plot:
    """The error against tau, and its exponent."""
    made, (left, right) = plots.figure(columns=2, height=4.0)
    for arm, k in itertools.product(ARMS, (2, config.other_classes)):
        curve = curves[arm, DOUBLE, k]
        seen = curve["error"] > 1e-9  # linear outputs go on to the rounding of the label
        tau, error = curve["tau"][seen], curve["error"][seen]
        width, name = (2.4, arm) if k == 2 else (1.2, f"{arm}, {k} classes")
        look = {"color": arms.COLOURS[arm], "lw": width, "alpha": width / 2.4}
        left.plot(tau, error, label=name, **look)
        last = (arm, k) == (ARMS[-1], config.other_classes)
        left.plot(tau, flow(arm, k, curve["tau"])[seen], **plots.THEORY, label="theory" if last else None)
        if arm in EXPONENTS:
            right.plot(np.sqrt(tau[1:] * tau[:-1]), np.diff(np.log(error)) / np.diff(np.log(tau)), **look)
    for claimed in EXPONENTS.values():
        right.axhline(claimed, **plots.THEORY)
    left.set(xscale="log", yscale="log", xlabel=r"time $\tau$ = learning rate × steps", ylabel="error")
    right.set(xscale="log", xlabel=r"time $\tau$", ylabel="exponent", ylim=(-1.3, 0.1))
    plots.legend(made, *left.get_legend_handles_labels())
    return Plot(
        made,
        "Left: missing probability under a softmax, distance from the label of a linear output. Dashed: the integrated "
        "flow. Right: the exponent, that is the derivative of log error in log time. Dashed: $-1$ and $-1/2$.",
    )


def table(config: Config, curves: Curves) -> Table:
    """Errors and exponents of every descent."""
    rows = []
    for (arm, code, k), curve in curves.items():
        end = float(curve["error"][-1])
        law = exponent(curve, config.max_tau / 10, config.max_tau) if arm in EXPONENTS else math.nan
        want = float(limit(arm, k, curve["tau"][-1:])[0])
        rows.append([arm, code, f"{k}", f"{end:.3e}", f"{want:.3e}", f"{law:+.4f}" if law == law else "none"])
    header = ["arm", "arithmetic", "classes", "error at the end", "law", "exponent"]
    return Table(f"The error at time {config.max_tau:g}, and its exponent over the last decade.", header, rows)


def report(config: Config, records: Sequence[Record]) -> Section:
    """The two power laws next to the exponential of the linear output."""
    curves: Curves = {}
    for settings, values in records:
        key = str(settings["arm"]), str(settings["code"]), int(settings["num_classes"])
        curves[key] = {name: np.asarray(values[name]) for name in ("tau", "error")}
    text = (
        "Free logits descend from 0 on one example. Its prediction is right from the first step, so what is measured "
        "is the late phase alone. Time $tau$ is the learning rate times the number of steps. The error is the missing "
        "probability $q = 1 - p_truth$, or the distance of linear outputs from the label.\n\n"
        "Each gradient vanishes with the error: as $q$ under cross-entropy, as $q^2$ under softmax + squared error. A "
        "step in the logits changes $q$ by $q$ times as much. Hence the rates $q^2$ and $q^3$, and the powers $-1$ and "
        "$-1/2$ of time."
    )
    ends = {arm: curves[arm, DOUBLE, 2]["error"][-1] for arm in EXPONENTS}
    abstract = [
        f"Late in training, {ends[SOFTMAX_CE]:.1e} of the probability is missing at time {config.max_tau:g} under "
        f"softmax + cross-entropy, and {ends[SOFTMAX_SE]:.1e} under softmax + squared error: powers of time, not "
        "exponentials."
    ]
    hypotheses = [exponent_hypothesis(config, curves, arm) for arm in EXPONENTS]
    return Section("Late phase", abstract, text, [figure(config, curves)], hypotheses, [table(config, curves)])
