"""The training loop: what `mle.run` costs next to a hand-written `lax.scan`, and saves next to other loops.

Everyone trains the same small network (64-128-10, ReLU) on 1024 digits with Adam, from the same initial weights. Each
epoch has a new order. The contestants: `mle.run`, which also records the norms and skips what is not finite; the
`lax.scan` that a person would write instead; a Python loop over a jitted `mle.step`; the loop of torch on the CPU, if
it is installed; and scikit-learn's `MLPClassifier.partial_fit`. The first two train any number of seeds at once under
`vmap`. The others train one, and are compared by the time of a step of one seed.

The costs of `run` and `fit` are measured next to a Python loop by hand. That loop runs over a jitted step, which
donates its params and state. The costs are bytes alive at most, programs compiled, and time.

Every contestant trains once a round. The order moves on from round to round, so that a disturbance of the machine meets
them all. The study compares the ratio of two times of the same round, and its median over rounds.
"""

import contextlib
import functools
import gc
import importlib
import importlib.util
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from matplotlib.ticker import LogLocator

from experiments import data, plots, stats, timing
from experiments.config import distinct
from experiments.findings import Hypothesis, Plot, Section, Table
from experiments.results import Progress, Record, Setting
from jprob import categorical, mle

EXAMPLES, FEATURES, HIDDEN, CLASSES = 1024, 64, 128, 10
LEARNING_RATE = 1e-3
OPTIMIZER = optax.adam(LEARNING_RATE)
SLOWER = 1.03  # a ratio to the hand-written scan up to which `run` counts as not slower
OVERHEAD = 1.02  # a ratio of `fit` to `run` up to which it counts as free
RECORD_EVERY = 100  # steps of a row of history, for both of these
FASTER = {"torch": 4.0, "sklearn": 2.5}  # how many times their time is claimed to be that of `run`
COPIES = 2  # of params and optimizer state that `fit` may keep alive
NAMES = {"run": "mle.run", "scan": "lax.scan by hand", "python": "a Python loop of mle.step", "torch": "torch",
         "sklearn": "scikit-learn"}  # fmt: skip

Seeds = Annotated[int, msgspec.Meta(ge=1, le=1024)]
BatchSize = Annotated[int, msgspec.Meta(ge=1, le=EXAMPLES)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Each batch size divides the 1024 examples: a short batch would be another step for each contestant."""

    batch_sizes: Annotated[list[BatchSize], msgspec.Meta(min_length=1)]
    seeds: Annotated[list[Seeds], msgspec.Meta(min_length=1)]
    epochs: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    fit_batch_size: BatchSize
    fit_steps: Annotated[int, msgspec.Meta(ge=RECORD_EVERY, le=1 << 24, multiple_of=RECORD_EVERY)]
    rounds: Annotated[int, msgspec.Meta(ge=2, le=1000)]

    def __post_init__(self):
        distinct(self, "batch_sizes", "seeds")
        for size in self.batch_sizes:
            if EXAMPLES % size:
                raise ValueError(f"batch_sizes: expected divisors of {EXAMPLES}, got {size}")


class Task(NamedTuple):
    """The task that everyone trains: data and initial weights as host arrays, and how long."""

    features: np.ndarray  # float32[examples, 64]
    labels: np.ndarray  # int32[examples]
    params: dict[str, np.ndarray]
    batch_size: int
    epochs: int

    @property
    def num_steps(self) -> int:
        return self.epochs * len(self.labels) // self.batch_size


def task(batch_size: int, epochs: int) -> Task:
    """1024 digits, and weights of variance 2 / inputs."""
    train, rng = data.load("digits").train, np.random.default_rng(0)
    params = {
        "hidden": rng.normal(0, np.sqrt(2 / FEATURES), (FEATURES, HIDDEN)).astype(np.float32),
        "hidden_bias": np.zeros(HIDDEN, np.float32),
        "output": rng.normal(0, np.sqrt(2 / HIDDEN), (HIDDEN, CLASSES)).astype(np.float32),
        "output_bias": np.zeros(CLASSES, np.float32),
    }
    return Task(train.features[:EXAMPLES], train.labels[:EXAMPLES], params, batch_size, epochs)


def nll(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array], key: jax.Array | None) -> jax.Array:
    """The network, and its loss per example."""
    hidden = jax.nn.relu(batch[0] @ params["hidden"] + params["hidden_bias"][None])
    return categorical.cross_entropy(hidden @ params["output"] + params["output_bias"][None], batch[1])


def run_loop(t: Task, params, examples, key):
    """By `mle.run`: losses of all steps, and the trained params."""
    state = mle.init(params, OPTIMIZER, key)
    state, history = mle.run(nll, OPTIMIZER, state, examples, num_steps=t.num_steps, batch_size=t.batch_size)
    return history.loss, state.params


def scan_loop(t: Task, params, examples, key):
    """By hand, with nothing that training does not need."""

    def epoch(carry, key):
        order = jax.random.permutation(key, len(t.labels)).reshape(-1, t.batch_size)
        return jax.lax.scan(step, carry, order)

    def step(carry, rows):
        params, state = carry
        batch = jax.tree.map(lambda x: x[rows], examples)
        loss, gradient = jax.value_and_grad(lambda params: jnp.mean(nll(params, batch, None)))(params)
        updates, state = OPTIMIZER.update(gradient, state)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(epoch, (params, OPTIMIZER.init(params)), jax.random.split(key, t.epochs))
    return losses.ravel(), params


def program(loop, t: Task, seeds: int) -> tuple[Callable[[], object], float]:
    """A compiled function that trains that many seeds by one of these loops, and the seconds of its compilation."""
    train = lambda params, examples, key: loop(t, params, examples, key)  # noqa: E731
    keys = jax.random.key(0)
    if seeds > 1:
        train, keys = jax.vmap(train, in_axes=(None, None, 0)), jax.random.split(keys, seeds)
    arguments = (*jax.device_put((t.params, (t.features, t.labels))), keys)
    start = time.perf_counter()
    compiled = jax.jit(train).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return lambda: jax.block_until_ready(compiled(*arguments)), seconds


def batches(t: Task) -> Iterator[np.ndarray]:
    """Rows of the examples of each step, for loops on the host."""
    rng = np.random.default_rng(0)
    for _ in range(t.epochs):
        yield from rng.permutation(len(t.labels)).reshape(-1, t.batch_size)


def python_loop(t: Task) -> Callable[[], object]:
    """One dispatch a step."""
    step = jax.jit(mle.step, static_argnums=(0, 1))
    params = jax.device_put(t.params)

    def train():
        state, losses = mle.init(params, OPTIMIZER, jax.random.key(0)), []
        for rows in batches(t):
            state, metrics = step(nll, OPTIMIZER, state, (t.features[rows], t.labels[rows]))
            losses.append(metrics.loss)
        return np.array(jax.device_get(losses)), jax.block_until_ready(state.params)  # to stack them would compile

    return train


def torch_loop(t: Task) -> Callable[[], object] | None:
    """As torch's tutorials have it, on the CPU; nothing where there is no torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")  # heavy, and in no default install
    x, y = torch.tensor(t.features), torch.tensor(t.labels, dtype=torch.int64)

    def train():
        model = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES)
        )
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), t.params.values(), strict=True):
                parameter.copy_(torch.tensor(value.T))
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), []
        for rows in map(torch.as_tensor, batches(t)):
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).numpy(), [p.detach().numpy().T for p in model.parameters()]

    return train


def sklearn_loop(t: Task) -> Callable[[], object]:
    """A call of `partial_fit` is one step where it is given one batch. Its initial weights are its own."""
    from sklearn.neural_network import MLPClassifier

    def train():
        model = MLPClassifier((HIDDEN,), learning_rate_init=LEARNING_RATE, alpha=0, random_state=0)
        model.set_params(batch_size=t.batch_size)  # the constructor's annotation knows "auto" alone
        losses = []
        for rows in batches(t):
            model.partial_fit(t.features[rows], t.labels[rows], classes=np.arange(CLASSES))
            losses.append(model.loss_)
        return np.array(losses), model.coefs_

    return train


def host_loops(t: Task) -> dict[str, Callable[[], object]]:
    """The loops that train one seed from the host. torch and scikit-learn would be on another device than a GPU."""
    loops = {"python": python_loop(t)}
    if jax.default_backend() == "cpu":
        loops |= {"sklearn": sklearn_loop(t)}
        if (torch_train := torch_loop(t)) is not None:
            loops["torch"] = torch_train
    return loops


def measure_cell(t: Task, seeds: int, rounds: int) -> Record:
    """Every contestant's seconds for a step of one seed, in every round."""
    (run_train, run_compile), (scan_train, scan_compile) = (program(f, t, seeds) for f in (run_loop, scan_loop))
    contestants = {"run": run_train, "scan": scan_train, **host_loops(t)}
    taken = timing.race(list(contestants.values()), rounds) / t.num_steps
    together = {"run": seeds, "scan": seeds}
    times = {f"seconds_{name}": row / together.get(name, 1) for name, row in zip(contestants, taken, strict=True)}
    compiling = {"compile_run": run_compile, "compile_scan": scan_compile}
    return Record({"part": "loops", "batch_size": t.batch_size, "seeds": seeds}, times | compiling)


def fit_once(
    t: Task, num_steps: int, directory: str | None = None, log: Callable[[mle.Report], None] | None = None
) -> Callable[[], object]:
    """By `fit`, which says on stderr where it resumes."""
    params, examples = jax.device_put((t.params, (t.features, t.labels)))

    def train():
        with contextlib.redirect_stderr(io.StringIO()):
            result = mle.fit(nll, OPTIMIZER, params, examples, jax.random.key(0), num_steps=num_steps,
                                batch_size=t.batch_size, log_every=RECORD_EVERY, checkpoint_dir=directory,
                                progress="none", log=log)  # fmt: skip
        return jax.block_until_ready(result.state)

    return train


def measure_fit(t: Task, num_steps: int, rounds: int) -> Record:
    """`fit` next to one `run` of as many steps, and what a checkpoint adds to it."""
    arguments = jax.device_put((t.params, (t.features, t.labels)))

    def run_once():
        state = mle.init(arguments[0], OPTIMIZER, jax.random.key(0))
        return jax.block_until_ready(mle.run(nll, OPTIMIZER, state, arguments[1], num_steps=num_steps,
                                             batch_size=t.batch_size, log_every=RECORD_EVERY))  # fmt: skip

    times = dict(zip(("fit", "run"), timing.race([fit_once(t, num_steps), run_once], rounds), strict=True))
    if importlib.util.find_spec("orbax") is not None:
        times |= checkpoint_times(t, rounds)
    values = {f"seconds_{name}": row for name, row in times.items()}
    return Record({"part": "fit", "batch_size": t.batch_size, "steps": num_steps}, values)


def by_hand(t: Task, num_steps: int, watch: Callable[[object], object]) -> Callable[[], object]:
    """A step that writes over its params and state, called for each batch."""
    params, examples = jax.device_put((t.params, (t.features, t.labels)))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, examples, rows):
        batch = jax.tree.map(lambda x: x[rows], examples)
        loss, gradient = jax.value_and_grad(lambda params: jnp.mean(nll(params, batch, None)))(params)
        updates, state = OPTIMIZER.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    def train():
        own, losses = jax.tree.map(jnp.copy, params), []
        orders = itertools.chain.from_iterable(batches(t) for _ in itertools.count())
        state = OPTIMIZER.init(own)
        for number, rows in zip(range(num_steps), orders, strict=False):
            own, state, loss = step(own, state, examples, rows)
            losses.append(loss)
            if number % RECORD_EVERY == 0:
                watch(own)
        return jax.block_until_ready(own), np.array(jax.device_get(losses))

    return train


_PROGRAMS: list[str] = []  # one entry for each program that was compiled, once `programs` is called


@functools.cache
def programs() -> list[str]:
    """The list of programs compiled from now on."""

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            _PROGRAMS.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return _PROGRAMS


def alive() -> int:
    """Bytes of all arrays on the device."""
    return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())


def measure_cost(t: Task, num_steps: int, rounds: int) -> Record:
    """Copies of params and optimizer state alive at most, programs compiled, and seconds, of each of three."""
    peak = 0

    def watch(_: object) -> None:
        nonlocal peak
        peak = max(peak, alive())

    params, examples = jax.device_put((t.params, (t.features, t.labels)))

    def run_once():
        state = mle.init(params, OPTIMIZER, jax.random.key(0))
        after = mle.run(nll, OPTIMIZER, state, examples, num_steps=num_steps, batch_size=t.batch_size,
                        log_every=RECORD_EVERY)  # fmt: skip
        watch(after)
        return after

    contestants = {"hand": by_hand(t, num_steps, watch), "run": run_once, "fit": fit_once(t, num_steps, log=watch)}
    state = jax.eval_shape(lambda: (t.params, OPTIMIZER.init(params)))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    values = {}
    for name, train in contestants.items():
        jax.clear_caches()
        gc.collect()
        before, compiled, start = alive(), len(programs()), time.perf_counter()
        peak = before
        jax.block_until_ready(train())
        values[f"first_{name}"] = time.perf_counter() - start
        values[f"programs_{name}"] = len(programs()) - compiled
        values[f"copies_{name}"] = (peak - before) / size
    taken = timing.race(list(contestants.values()), rounds)
    values |= {f"seconds_{name}": row for name, row in zip(contestants, taken, strict=True)}
    return Record({"part": "cost", "batch_size": t.batch_size, "steps": num_steps}, values)


def checkpoint_times(t: Task, rounds: int) -> dict[str, np.ndarray]:
    """Times of the shortest fit: without a checkpoint, with one saved at its end, and resumed where it has ended."""
    taken = np.array([checkpoint_round(t) for _ in range(rounds + 1)])
    return dict(zip(("short", "saved", "resumed"), taken[1:].T, strict=True))  # the first round loads orbax


def checkpoint_round(t: Task) -> list[float]:
    with tempfile.TemporaryDirectory() as directory:
        times = [time.perf_counter()]
        for where in (None, directory, directory):
            fit_once(t, RECORD_EVERY, where)()
            times.append(time.perf_counter())
    return np.diff(times).tolist()


def run(config: Config) -> Iterator[Record | Progress]:
    """A record for each batch size and number of seeds, one of `fit`, and one of its costs."""
    cells = list(itertools.product(config.batch_sizes, config.seeds))
    parts, t = len(cells) + 2, task(config.fit_batch_size, 1)
    for done, (batch_size, seeds) in enumerate(cells):
        yield Progress(done / parts, cell_name(batch_size, seeds))
        yield measure_cell(task(batch_size, config.epochs), seeds, config.rounds)
    yield Progress(len(cells) / parts, "fit, and its checkpoints")
    yield measure_fit(t, config.fit_steps, config.rounds)
    yield Progress((len(cells) + 1) / parts, "memory, programs and time")
    yield measure_cost(t, config.fit_steps, config.rounds)


def cell_name(batch_size: Setting, seeds: Setting) -> str:
    """For people: "batches of 32, 8 seeds"."""
    return f"batches of {batch_size}, {seeds} seed{'s' if seeds != 1 else ''}"


def name_of(record: Record) -> str:
    """The same of a record."""
    return cell_name(record.settings["batch_size"], record.settings["seeds"])


def scan_hypothesis(records: Sequence[Record]) -> Hypothesis:
    """`run` takes no more than 1.03 times what the scan takes, in any cell."""
    claim = f"mle.run is no slower than a hand-written lax.scan, up to a factor of {SLOWER}."
    against = [sentence for record in records if (sentence := slower_text(record))]
    return timing.hypothesis(claim, records, "run", "scan", SLOWER, NAMES, name_of)._replace(against=against)


def faster_hypothesis(records: Sequence[Record], name: str) -> Hypothesis:
    """The other takes at least so many times what `run` takes, in every cell."""
    factor = FASTER[name]
    claim = f"A step of one seed takes {NAMES[name]} at least {factor:g} times as long as mle.run."
    if any(f"seconds_{name}" not in record.values for record in records):
        return Hypothesis(claim, f"{NAMES[name]} has not run here", "a median ratio is smaller", "undecided")
    made = timing.hypothesis(claim, records, name, "run", factor, NAMES, name_of, sign=-1)
    return made._replace(against=[compile_text(records[0], name)])


def fit_hypothesis(record: Record) -> Hypothesis:
    """`fit` with nothing to save."""
    *_, verdict = timing.judge([record], "fit", "run", OVERHEAD)
    seconds = np.median(np.asarray(record.values["seconds_run"]))
    return Hypothesis(
        f"mle.fit takes at most {OVERHEAD} times as long as mle.run.",
        f"time of fit / run: {timing.ratio_text(record, 'fit', 'run')} ({record.settings['steps']} steps with batches "
        f"of {record.settings['batch_size']}, {seconds:.2g} s)",
        f"the 95 % interval of the median ratio lies above {OVERHEAD}; undecided while the median does",
        verdict,
    )


def cost_hypotheses(record: Record) -> list[Hypothesis]:
    """`fit` in the memory of two copies, and in the time of the loop by hand."""
    copies, steps = (float(np.asarray(record.values["copies_fit"])), record.settings["steps"])
    names = {"fit": "mle.fit", "hand": "a donating loop by hand"}
    memory = Hypothesis(
        f"mle.fit keeps at most {COPIES} copies of params and optimizer state alive from one chunk to the next.",
        f"{copies:.2f} copies alive at most, next to the caller's own params and data ({steps} steps)",
        f"more than {COPIES} copies, and a twentieth for history and numbers, are alive",
        "holds" if copies <= COPIES + 0.05 else "falsified",
    )
    claim = f"mle.fit takes at most {OVERHEAD} times as long as a Python loop over a donating step."
    return [memory, timing.hypothesis(claim, [record], "fit", "hand", OVERHEAD, names, lambda _: f"{steps} steps")]


def cost_table(record: Record) -> Table:
    """Memory, programs and time of the loop by hand, `run` and `fit`."""
    names = {"hand": "a donating loop by hand", "run": "mle.run", "fit": "mle.fit"}

    def row(name):
        copies, compiled, first = (
            np.asarray(record.values[f"{what}_{name}"]) for what in ("copies", "programs", "first")
        )
        seconds = np.median(np.asarray(record.values[f"seconds_{name}"]))
        ratio = timing.ratio_text(record, name, "hand")
        return [names[name], f"{copies:.2f}", f"{compiled:.0f}", f"{first:.2g}", f"{seconds:.2g}", ratio]

    caption = (
        "Copies of params and optimizer state alive at most, next to what the caller holds, as seen between steps, "
        "between chunks and after run; programs compiled in a first call with empty caches, small ones included; the "
        "time of that call, and of a later one of "
        f"{record.settings['steps']} steps."
    )
    header = ["", "copies alive", "programs", "first call, s", "later call, s", "later call / by hand"]
    return Table(caption, header, [row(name) for name in names])


def loop_table(records: Sequence[Record]) -> Table:
    """Every batch size and number of seeds."""
    others = [name for name in NAMES if f"seconds_{name}" in records[0].values and name not in ("run", "scan")]
    rows = []
    for record in records:
        steps = 1 / np.median(np.asarray(record.values["seconds_run"]))
        compiling = [f"{float(np.asarray(record.values[f'compile_{name}'])):.2g}" for name in ("run", "scan")]
        ratios = [timing.ratio_text(record, name, "run") for name in others]
        rows.append([name_of(record), f"{steps:,.0f}", timing.ratio_text(record, "run", "scan"), *ratios, *compiling])
    header = ["", "run, steps/s", "run / scan", *(f"{NAMES[name]} / run" for name in others),
              "compiling run, s", "scan, s"]  # fmt: skip
    caption = (
        "Steps that run takes in a second, those of every seed counted; median ratios of the times of a step of one "
        "seed in the same round, with their 95 % intervals; and the time to trace and compile."
    )
    return Table(caption, header, rows)


def checkpoint_table(record: Record) -> Table:
    """The times of a save and a resume, at the median."""
    short, saved, resumed = (
        1e3 * np.median(np.asarray(record.values[f"seconds_{name}"])) for name in ("short", "saved", "resumed")
    )
    rows = [["open a folder and save", f"{saved - short:.0f}"], ["resume, where training had ended", f"{resumed:.0f}"]]
    return Table("Checkpoints of mle.fit: median time, for this network and Adam's moments.", ["", "ms"], rows)


def ratio_figure(records: Sequence[Record]) -> Plot:
    """A row for every cell: on the left `run` next to the scan, on the right the others next to `run`."""
    figure, (left, right) = plots.figure(columns=2, height=0.3 * len(records) + 1.7)
    heights = np.arange(len(records))
    others = [name for name in NAMES if f"seconds_{name}" in records[0].values and name not in ("run", "scan")]
    colours = dict(zip(("run", *others), plots.PALETTE, strict=False))
    for axis, pairs in ((left, [("run", "scan")]), (right, [(name, "run") for name in others])):
        for name, base in pairs:
            intervals = np.array([stats.bca_interval(timing.ratio(r, name, base), np.median) for r in records])
            axis.hlines(heights, *intervals.T, color=colours[name], lw=1.2)
            medians = [np.median(timing.ratio(r, name, base)) for r in records]
            axis.plot(medians, heights, "o", color=colours[name], label=NAMES[name])
        axis.axvline(1, **plots.THEORY)
        axis.set(ylim=(len(records) - 0.5, -0.5))
    left.set(xlabel="time of mle.run / lax.scan by hand")
    left.set_yticks(heights, [name_of(record) for record in records])
    right.set(xlabel="time of another / mle.run", xscale="log")
    right.set_yticks(heights, [])
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:g}")
    right.minorticks_off()
    handles = [each for axis in (left, right) for each in zip(*axis.get_legend_handles_labels(), strict=True)]
    plots.legend(figure, [handle for handle, _ in handles], [label for _, label in handles])
    return Plot(
        figure,
        "Median ratios and their 95 % intervals. Left: what run costs, below 1 where it is faster. Right: how many "
        "times as long a step of one seed takes the others.",
    )


def slower_text(record: Record) -> str:
    """A cell in which `run` is slower than by hand; nothing where it is not."""
    slower = np.median(timing.ratio(record, "run", "scan")) > SLOWER
    return (
        f"{name_of(record)}: run takes {timing.ratio_text(record, 'run', 'scan')} times the scan's time."
        if slower
        else ""
    )


def compile_text(record: Record, rival: str) -> str:
    """The time of compiling, in steps of a loop that needs none."""
    seconds = float(np.asarray(record.values["compile_run"]))
    step = float(np.median(np.asarray(record.values[f"seconds_{rival}"])))
    return (
        f"{name_of(record)}: before its first step run is traced and compiled, for {seconds:.2g} s. {NAMES[rival]} "
        f"needs nothing of the kind, and has taken {seconds / step:,.0f} steps by then."
    )


def abstract(loops: Sequence[Record], fit: Record) -> list[str]:
    """The costs of `run` and `fit`."""
    ratios = [np.median(timing.ratio(r, "run", "scan")) for r in loops]
    return [
        f"Training by mle.run takes {min(ratios):.2g} to {max(ratios):.2g} times as long as a lax.scan written by "
        f"hand, and mle.fit {np.median(timing.ratio(fit, 'fit', 'run')):.3g} times as long as mle.run."
    ]


def report(config: Config, records: Sequence[Record]) -> Section:
    """Ratios and times."""
    loops, (fit,), costs = ([r for r in records if r.settings["part"] == part] for part in ("loops", "fit", "cost"))
    text = (
        f"A network of {FEATURES}-{HIDDEN}-{CLASSES} trains on {EXAMPLES} digits with Adam for {config.epochs} epochs, "
        "again and again. mle.run and the scan train all seeds at once; the other loops train one, and the time of a "
        "step of one seed is what is compared.\n\n"
        "mle.run does more than the scan: it records the norms of gradient and update, leaves out a step that is not "
        "finite, and goes on from any step as if it had never stopped."
    )
    hypotheses = [scan_hypothesis(loops), *(faster_hypothesis(loops, name) for name in FASTER), fit_hypothesis(fit)]
    hypotheses += [hypothesis for record in costs for hypothesis in cost_hypotheses(record)]
    tables = [loop_table(loops)] + ([checkpoint_table(fit)] if "seconds_saved" in fit.values else [])
    tables += map(cost_table, costs)
    return Section("The training loop", abstract(loops, fit), text, [ratio_figure(loops)], hypotheses, tables)
