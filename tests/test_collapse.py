"""The study of collapse: its losses and closed forms against independent truth, and verdicts that can fail."""

import math

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest

from experiments import results
from experiments.results import Record
from experiments.studies import collapse
from experiments.studies.collapse import losses, section
from experiments.studies.collapse.settings import Comparison, Rules, Training

U = 2.0**-24
ADAM = Training(
    name="Adam",
    operation="addition",
    layer_norm=False,
    optimizer="adam",
    learning_rate=1e-3,
    weight_decay=0.0,
    eps=1e-30,
    losses=["usual", "jprob", "float64"],
)
DECAY = msgspec.structs.replace(ADAM, name="AdamW", weight_decay=0.5)
CONFIG = collapse.Config(
    modulus=5,
    train_share=0.6,
    hidden_units=3,
    adam_b2=0.98,
    num_steps=40,
    log_every=10,
    first_seed=0,
    seeds=8,
    trainings=[ADAM, DECAY],
    rules=Rules(
        agreement=0.01,
        exact_to=40.0,
        wall_tolerance=1.0,
        moment_tolerance=3.0,
        spike_rise=10.0,
        spike_window=20,
        spikes_below=30.0,
        same_accuracy=1.0,
        alpha=0.05,
    ),
    family=[
        Comparison(measure="spikes", training="Adam"),
        Comparison(measure="spikes", training="AdamW"),
        Comparison(measure="accuracy", training="AdamW"),
    ],
)


def value_and_gradient(loss, z, labels):
    with jax.enable_x64(True):
        y = jnp.asarray(labels)
        value, pull = jax.vjp(lambda z: losses.LOSSES[loss](z, y), jnp.asarray(z, jnp.float32))
        return np.asarray(value, np.float64), np.asarray(pull(jnp.ones_like(value))[0], np.float64)


def right_by(margin, num_classes=2):
    """One example of class 0, the others level with each other."""
    return np.array([[margin] + [0.0] * (num_classes - 1)], np.float32), np.array([0], np.int32)


def test_the_losses_are_one_function_where_nothing_rounds():
    z = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    labels = (np.arange(50) % 7).astype(np.int32)
    want, slope = value_and_gradient("float64", z, labels)
    for loss in ("usual", "jprob"):
        value, gradient = value_and_gradient(loss, z, labels)
        np.testing.assert_allclose(value, want, rtol=40 * U, atol=16 * U)  # gaps of 5 at most, terms of size 4
        np.testing.assert_allclose(gradient, slope, rtol=0, atol=16 * U)


@pytest.mark.parametrize("num_classes", [2, 97])
@pytest.mark.parametrize("margin", [5.0, 20.0, 36.0, 60.0])
def test_float64_and_jprob_keep_what_the_usual_loss_loses(margin, num_classes):
    """Against -s / (1 + s) with s = (K - 1) e^-m, in Python's floats. Float64's usual form ends at 36.7."""
    others = num_classes - 1
    (z, labels), s = right_by(margin, num_classes), others * math.exp(-margin)
    value, gradient = value_and_gradient("float64", z, labels)
    np.testing.assert_allclose(value, math.log1p(s), rtol=1e-12)
    assert gradient[0, 0] == pytest.approx(-s / (1 + s), rel=U)  # cast to float32
    value, gradient = value_and_gradient("jprob", z, labels)
    np.testing.assert_allclose(value, math.log1p(s), rtol=(16 + margin) * U)
    np.testing.assert_allclose(gradient[0], np.r_[-s, np.full(others, s / others)] / (1 + s), rtol=(16 + margin) * U)
    value, gradient = value_and_gradient("usual", z, labels)
    assert (value[0] == 0) == (margin >= 20)
    assert (gradient[0, 0] == 0) == (margin > 24 * math.log(2) + math.log(others))


def test_a_gradient_that_lost_its_true_class_no_longer_sums_to_0():
    """K = 97, margin 25: what is left of the usual gradient are the other classes."""
    z, labels = right_by(25.0, 97)
    sums = {loss: value_and_gradient(loss, z, labels)[1].sum() for loss in ("usual", "jprob", "float64")}
    s = 96 * math.exp(-25)
    assert sums["usual"] == pytest.approx(s, rel=1e-5)
    assert abs(sums["jprob"]) <= 4 * (16 + 25) * U * s
    assert abs(sums["float64"]) <= 2 * U * s


@pytest.mark.parametrize(("loss", "bits"), [("usual", 24), ("usual16", 8)])
def test_the_gradient_of_the_true_class_ends_at_the_wall(loss, bits):
    """Two classes: 1 + e^-m is 1 from m = bits ln 2 on."""
    wall = bits * math.log(2)
    room = 0.01 if bits == 24 else 0.04  # logits near 5.5 are multiples of 2^-5 in bfloat16
    assert value_and_gradient(loss, *right_by(wall - room))[1][0, 0] < 0
    assert value_and_gradient(loss, *right_by(wall + room))[1][0, 0] == 0
    exact = {"usual": "jprob", "usual16": "jprob16"}[loss]
    assert value_and_gradient(exact, *right_by(wall + 60))[1][0, 0] < 0


@pytest.mark.parametrize("margin", [3.0, 30.0, 80.0, 84.0, 85.5])
def test_the_measure_of_a_gradient_allows_what_float32_flushes(margin):
    """58 classes whose probabilities straddle the smallest normal number, e^-87.3; a lost digit is no flush."""
    z = np.array([[margin] + [0.0] * 3 + [-1.2] * 55], np.float32)
    with jax.enable_x64(True):
        z, labels = jnp.asarray(z), jnp.array([0], jnp.int32)
        assert losses.gradients("jprob", z, labels)["error"] <= 1
        assert (losses.gradients("usual", z, labels)["error"] > 1e3) == (margin > 3)


def test_log_odds_are_those_of_the_softmax():
    z = np.array([[3.0, 1.0, 0.5], [40.0, 0.0, -2.0], [-700.0, 0.0, 0.0]], np.float32)
    with jax.enable_x64(True):
        got = losses.log_odds(jnp.asarray(z), jnp.array([1, 0, 0], jnp.int32))
    want = [1 - np.logaddexp(3.0, 0.5), 40 - np.logaddexp(0.0, -2.0), -700 - math.log(2)]
    np.testing.assert_allclose(got, want, rtol=1e-14)


@pytest.mark.parametrize("b2", [0.98, 0.99])
def test_adams_second_moment_fails_where_the_square_of_a_gradient_underflows(b2):
    """g^2 < 2^-126 from g = e^-m with m = 63 ln 2 = 43.67 on; its part of the mean, (1 - b2) g^2, a little before."""
    optimizer = collapse.optimizer_of(ADAM, b2)
    margin = np.arange(38.0, 46.0, 0.01)
    gradient = jnp.asarray(np.exp(-margin), jnp.float32)
    assert pytest.approx(43.668, abs=1e-3) == losses.MOMENT
    squares = np.asarray(jax.jit(jnp.square)(gradient))
    assert margin[squares == 0].min() == pytest.approx(losses.MOMENT, abs=0.02)

    @jax.jit
    def steps(gradient):
        state = optimizer.init(jnp.zeros_like(gradient))
        for _ in range(5):
            updates, state = optimizer.update(gradient, state, jnp.zeros_like(gradient))
        return updates

    with jax.numpy_dtype_promotion("standard"):
        moves = np.abs(np.asarray(steps(gradient)))
    last = losses.moment_wall(b2)
    assert last == pytest.approx(losses.MOMENT + math.log(1 - b2) / 2)
    np.testing.assert_allclose(moves[margin < last - 0.1], 1e-3, rtol=0.1)  # Adam's rate, however small the gradient
    assert moves[margin > last + 0.02].min() > 1e6  # e^-m / 1e-30


def test_draws_are_paired():
    """The arms differ in the loss alone; one bit sets the nudged one apart; other seeds differ."""
    same, nudged = (collapse.initial_params(CONFIG, 3, loss) for loss in ("jprob", "nudged"))
    np.testing.assert_array_equal(same["hidden"], nudged["hidden"])
    np.testing.assert_array_equal(np.nextafter(same["output"], np.float32(np.inf)), nudged["output"])
    pairs = collapse.all_pairs(CONFIG, ADAM, 3)
    assert sorted(map(tuple, pairs.tolist())) == [(a, b) for a in range(5) for b in range(5)]
    assert CONFIG.num_train == 15
    assert not np.array_equal(pairs, collapse.all_pairs(CONFIG, ADAM, 4))


def test_an_answer_solves_its_pair():
    """a / b is the one number whose product with b is a. No number is divided by 0."""
    divide = msgspec.structs.replace(ADAM, operation="division")
    pairs = collapse.all_pairs(CONFIG, divide, 3)
    assert sorted(map(tuple, pairs.tolist())) == [(a, b) for a in range(5) for b in range(1, 5)]
    assert len(pairs) == divide.num_pairs(5)
    a, b = pairs.T
    np.testing.assert_array_equal(collapse.answers(divide, jnp.asarray(pairs), 5) * b % 5, a)
    np.testing.assert_array_equal((collapse.answers(ADAM, jnp.asarray(pairs), 5) - b) % 5, a)


def test_layer_norm_leaves_features_of_mean_0_and_deviation_1():
    config = msgspec.structs.replace(CONFIG, hidden_units=30)
    params, pairs = collapse.initial_params(config, 3, "jprob"), jnp.asarray(collapse.all_pairs(config, ADAM, 3))
    plain = np.asarray(collapse.features(ADAM, params, pairs), np.float64)
    norm = collapse.features(msgspec.structs.replace(ADAM, layer_norm=True), params, pairs)
    spread = plain.std(axis=1, keepdims=True)
    want = (plain - plain.mean(axis=1, keepdims=True)) / np.sqrt(spread**2 + 1e-5)
    np.testing.assert_allclose(norm, want, rtol=0, atol=64 * U * (plain.max() / spread.min()))


def test_smoothed_labels_spread_a_tenth_over_all_classes():
    """optax's cross-entropy of a distribution."""
    z = 4 * np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    labels = (np.arange(50) % 7).astype(np.int32)
    value, gradient = value_and_gradient("smoothed", z, labels)
    target = 0.9 * np.eye(7)[labels] + 0.1 / 7
    with jax.enable_x64(True):
        want = optax.softmax_cross_entropy(z.astype(np.float64), target)
        probs = np.asarray(jax.nn.softmax(z.astype(np.float64)))
    np.testing.assert_allclose(value, want, rtol=0, atol=16 * U * np.abs(z).max())
    np.testing.assert_allclose(gradient, probs - target, rtol=0, atol=16 * U)


def test_a_spike_is_a_fast_rise():
    rules = CONFIG.rules  # ten times within 2 measurements

    def at(*nll):
        return section.spikes(np.array(nll, float), rules, CONFIG.log_every).tolist()

    assert at(1, 0.1, 0.01, 0.001) == []
    assert at(1, 9, 81, 729) == [2], "81 is more than ten times 1, and what follows is the same spike"
    assert at(1, 3, 9, 27, 81) == []
    assert at(1, 0.1, 2, 0.1, 0.01, 3) == [2, 5]
    assert at(1, 0.1, np.nan, np.nan) == [2], "a training that is not finite has spiked, once"
    assert at(1, 0.1, np.inf) == [2]


N = 61  # measurements of a simulated training: log-odds 0, 1, ... 60


def simulated(trainings=CONFIG.trainings, **changes) -> list[Record]:
    """Records of trainings that bear every claim out; `changes` are functions by loss that spoil the curves."""
    odds = np.arange(N, dtype=float)
    records = []
    for training in trainings:
        for loss in training.losses:
            for seed in range(CONFIG.seeds):
                mine = odds.copy()
                if loss == "smoothed":
                    mine = np.minimum(mine, 5.0)
                if loss == "usual":
                    mine[16:] = 16.0
                    mine[20] = 10.0  # a spike: e^7 times
                if loss in ("jprob", "float64"):
                    mine[45:] = -5.0  # Adam fails after log-odds of 44
                if training is DECAY and loss in ("jprob", "float64"):
                    mine[25] = 18.0  # with decay the exact losses spike too
                values = {
                    "nll": np.exp(-mine), "log_odds": mine, "own_loss": np.exp(-mine), "error": np.full(N, 0.5),
                    "dead": np.zeros(N), "lowest_dead": np.full(N, 16.0 if loss == "usual" else np.inf),
                    "highest_live": np.full(N, 16.5), "class_sum": np.zeros(N), "weight_mean": np.ones(N),
                    "weight_mean_moved": np.zeros(N), "feature_mean": np.ones(N), "cosine": np.zeros(N),
                    "accuracy": np.full(N, (50.0 if loss == "usual" else 90.0) + 0.1 * seed * (loss == "jprob")),
                    "no_moment": np.zeros(N), "skipped": np.zeros(N),
                }  # fmt: skip
                if loss in changes:
                    changes[loss](values, training)
                records.append(Record({"training": training.name, "loss": loss, "seed": seed}, values))
    return records


def put(name, at, value, only=None):
    """Spoils a curve; the nll follows the log-odds."""

    def change(values, training):
        if only in (None, training.name):
            values[name][at] = value
            if name == "log_odds":
                values["nll"] = np.exp(-values["log_odds"])

    return change


CASES = {
    "as claimed": ({}, {}),
    "gradient off": ({"jprob": put("error", 3, 1.5)}, {0: "falsified"}),
    "exact departs": ({"jprob": put("nll", 35, 1.02 * math.exp(-35))}, {1: "falsified"}),
    "usual departs early": ({"usual": put("nll", 12, 1.02 * math.exp(-12))}, {2: "falsified"}),
    "usual does not depart": ({"usual": put("log_odds", slice(None), np.arange(N))},
                              {2: "falsified", 4: "undecided", 5: "holds"}),
    "gradient gone too early": ({"usual": put("lowest_dead", 3, 14.0)}, {3: "falsified"}),
    "gradient there too late": ({"usual": put("highest_live", 3, 18.0)}, {3: "falsified"}),
    "gradient never gone": ({"usual": put("lowest_dead", slice(None), np.inf)}, {3: "undecided"}),
    "exact spikes": ({"jprob": put("log_odds", 25, 15.0, "Adam")}, {1: "falsified", 4: "falsified"}),
    "with decay exact does not": ({"jprob": put("log_odds", 25, 25.0)}, {1: "falsified", 5: "falsified"}),
    "none spikes": ({"jprob": put("log_odds", 25, 25.0), "usual": put("log_odds", slice(16, None), 16.0)},
                    {1: "falsified", 4: "undecided", 5: "undecided"}),
    "no better": ({"jprob": put("accuracy", slice(None), 50.0)}, {6: "falsified"}),
    "worse": ({"jprob": put("accuracy", slice(None), 40.0)}, {6: "falsified"}),
    "Adam fails early": ({"jprob": put("log_odds", slice(37, 40), -5.0, "Adam")}, {1: "falsified", 7: "falsified"}),
    "Adam does not fail": ({loss: put("log_odds", slice(None), np.arange(N)) for loss in ("jprob", "float64")},
                           {5: "falsified", 7: "undecided"}),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "differs"), CASES.values(), ids=CASES)
def test_verdicts_follow_the_figures(changes, differs):
    config = msgspec.structs.replace(CONFIG, num_steps=10 * (N - 1))
    got = [h.verdict for h in collapse.report(config, simulated(**changes)).hypotheses]
    assert got == [differs.get(i, "holds") for i in range(8)]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"smoothed": put("log_odds", 40, 0.0)}, "falsified"),
        ({"usual": put("log_odds", slice(16, None), 16.0)}, "undecided"),
    ],
    ids=["as claimed", "smoothed spikes", "none spikes"],
)
def test_the_claim_of_smoothing_has_each_verdict(changes, verdict):
    training = msgspec.structs.replace(ADAM, losses=[*ADAM.losses, "smoothed"])
    family = [Comparison(measure="smoothing", training="Adam")]
    config = msgspec.structs.replace(CONFIG, num_steps=10 * (N - 1), trainings=[training], family=family)
    claims = collapse.report(config, simulated([training], **changes)).hypotheses
    assert [h.verdict for h in claims if "label smoothing" in h.claim] == [verdict]


@pytest.mark.parametrize(("layer_norm", "verdict"), [(False, "holds"), (True, "falsified")])
def test_an_exact_loss_without_spikes_speaks_against_the_claim_that_layer_norm_makes_them(layer_norm, verdict):
    training = msgspec.structs.replace(ADAM, layer_norm=layer_norm)
    config = msgspec.structs.replace(CONFIG, num_steps=10 * (N - 1), trainings=[training], family=CONFIG.family[:1])
    claims = collapse.report(config, simulated([training])).hypotheses
    assert [(h.verdict, "LayerNorm" in h.claim) for h in claims if "spikes" in h.claim] == [(verdict, layer_norm)]


def test_the_claim_of_agreement_has_each_verdict():
    config = msgspec.structs.replace(CONFIG, num_steps=10 * (N - 1), trainings=[ADAM], family=CONFIG.family[:1])

    def verdict(**changes):
        records = [r for r in simulated(**changes) if r.settings["training"] == "Adam"]
        return collapse.report(config, records).hypotheses[1].verdict

    assert verdict() == "holds"
    assert verdict(jprob=put("nll", 35, 1.02 * math.exp(-35))) == "falsified"
    assert verdict(jprob=put("nll", 35, np.nan)) == "falsified", "a training that is not finite has departed"
    assert verdict(jprob=put("nll", 41, 1.0)) == "holds", "beyond 40 nothing is claimed"
    stays = {loss: put("log_odds", slice(30, None), 30.0) for loss in ("jprob", "float64")}
    assert verdict(**stays) == "undecided", "a training that does not get to 40 cannot tell"


def test_two_verdicts_of_a_difference():
    rules, few = CONFIG.rules, np.array([5, 4, 6, 5, 5, 4, 5, 6])
    none = np.zeros(8)
    assert section.vanish(few, none, 0.01, 0.05) == "holds"
    assert section.vanish(few, none, 0.2, 0.05) == "undecided"
    assert section.vanish(none, none, 1.0, 0.05) == "undecided"
    assert section.vanish(few, np.eye(8)[0], 0.01, 0.05) == "falsified"
    assert section.better(10.0 + 0.1 * few, 0.01, rules, 1.5) == "holds"
    assert section.better(-10.0 - 0.1 * few, 0.01, rules, 1.5) == "falsified"
    assert section.better(0.01 * few, 0.3, rules, 1.5) == "falsified", "it is equivalent to none"
    assert section.better(10.0 * (few - 5), 0.9, rules, 1.5) == "undecided"


def test_holms_family_is_that_of_the_config():
    config = msgspec.structs.replace(CONFIG, num_steps=10 * (N - 1))
    tests = section.compare(section.curves_of(simulated()), config)
    assert list(tests) == [("spikes", "Adam"), ("spikes", "AdamW"), ("accuracy", "AdamW")]
    differences, p = tests["spikes", "Adam"]
    np.testing.assert_array_equal(differences, 1)
    assert p == pytest.approx(2 * 2**-7)  # sign flips of 8 equal differences, second of three: accuracy comes first
    assert tests["spikes", "AdamW"][1] == 1, "both spike once"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_every": 15}, "log_every: expected a divisor of spike_window and num_steps, got 15"),
        ({"trainings": [ADAM, ADAM]}, "trainings: expected distinct names"),
        ({"trainings": [DECAY]}, r"family: expected trainings of \['AdamW'\], got \['Adam'\]"),
        (
            {"family": [Comparison(measure="smoothing", training="Adam")]},
            r"family: expected smoothed among the losses of \['Adam'\], got none",
        ),
        (
            {"modulus": 6, "trainings": [msgspec.structs.replace(ADAM, operation="division"), DECAY]},
            "modulus: expected a prime for division, got 6",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(change, message):
    built = msgspec.to_builtins(CONFIG) | {name: msgspec.to_builtins(value) for name, value in change.items()}
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(built, collapse.Config)


def test_parts_are_configs_that_cover_the_whole():
    parts = collapse.parts(CONFIG)
    assert [part.trainings for part in parts] == [[ADAM], [DECAY]]
    assert [each for part in parts for each in part.family] == CONFIG.family
    for part in parts:
        assert msgspec.convert(msgspec.to_builtins(part), collapse.Config) == part


def test_it_runs_small_and_reports():
    arms = msgspec.structs.replace(ADAM, learning_rate=1e-2, losses=list(losses.LOSSES))
    arms = msgspec.structs.replace(arms, operation="division", layer_norm=True)
    config = msgspec.structs.replace(CONFIG, trainings=[arms], family=CONFIG.family[:1], seeds=2)
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        items = list(collapse.run(config))
    records = [item for item in items if isinstance(item, Record)]
    done = [item.done for item in items if isinstance(item, results.Progress)]
    assert done == sorted(done)
    assert len(records) == 7 * 2
    for record in records:
        assert all(np.shape(x) == (5,) for x in record.values.values())
        assert 0 <= record.values["accuracy"].min() <= record.values["accuracy"].max() <= 100
    first = {r.settings["loss"]: r.values["nll"][0] for r in records if r.settings["seed"] == 0}
    assert first["usual"] == first["jprob"] == first["float64"], "all start alike"
    last = {r.settings["loss"]: r.values["nll"][-1] for r in records if r.settings["seed"] == 0}
    assert last["jprob"] < 0.9 * first["jprob"]
    assert last["jprob"] == pytest.approx(last["float64"], rel=1e-4)
    found = collapse.report(config, records)
    assert found.hypotheses[0].verdict == "holds"
    assert len(found.tables[0].rows) == 7
