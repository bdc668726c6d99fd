"""The study of data sets: one program trains both arms, features are standardised, and verdicts can fail."""

import math
import shutil

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest
from scipy.ndimage import correlate1d
from test_data import written

from experiments import data, plots
from experiments.__main__ import main
from experiments.arms import SOFTMAX_CE, SOFTMAX_SE, loss
from experiments.results import Record
from experiments.studies import data_sets
from experiments.studies.data_sets import Member


@pytest.fixture(autouse=True)
def _as_optax_asks():
    """Its adam multiplies floats by an integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


CONFIG = data_sets.Config(names=["wine"], models=["linear"], hidden_units=3, epochs=2, batch_size=64,
                          decades=[-2.0, -1.5], widen_at_most=0, selection_seeds=1, report_seeds=2,
                          trained_together=2)  # fmt: skip


def test_features_are_standardised_by_the_training_examples_alone():
    wine = data.load("wine")
    still = wine.train.features.copy()
    still[:, 0] = 7
    train, validation, test = data_sets.standardised(wine._replace(train=wine.train._replace(features=still)))
    np.testing.assert_allclose(train.features[:, 1:].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train.features[:, 1:].std(axis=0), 1, rtol=1e-5)
    assert not any(part.features[:, 0].any() for part in (train, validation, test))
    mean, deviation = (getattr(np, name)(still[:, 1], dtype=np.float64) for name in ("mean", "std"))
    want = (wine.test.features[:, 1] - mean) / deviation
    # The mean of a hundred float32 numbers is off by some of its ulps. So is a difference from it.
    np.testing.assert_allclose(test.features[:, 1], want, rtol=0, atol=64 * 2.0**-24 * mean / deviation)


@pytest.mark.parametrize("arm", data_sets.ARMS)
def test_a_training_is_that_by_hand(arm):
    """Adam over batches in the order of `mle.run`: here one batch is all, so that the order does not count."""
    whole = data_sets.Config(**{**{f: getattr(CONFIG, f) for f in CONFIG.__struct_fields__}, "batch_size": 1000})
    got = data_sets.trainer("wine", "linear", whole)([Member(arm, -2, 1), Member(SOFTMAX_CE, -4, 2)])
    train, _, test = data_sets.standardised(data.resampled("wine", 1))
    (params,) = data_sets.initial_params(1, [(13, 3)])
    optimizer = optax.adam(0.1)
    state = optimizer.init(params)
    for _ in range(2):

        def mean(p):
            return jnp.mean(loss(arm, data_sets.outputs([p], train.features), jnp.asarray(train.labels)))

        updates, state = optimizer.update(jax.grad(mean)(params), state)
        params = optax.apply_updates(params, updates)
    right = np.asarray(jnp.argmax(data_sets.outputs([params], test.features), axis=-1)) == test.labels
    assert got["test"][0] == pytest.approx(100 * right.mean(), rel=1e-6)


def test_an_mlp_has_a_layer_of_tanh_and_a_deep_one_two_of_relu():
    x, layer = jnp.array([[-1.0, 2.0]]), {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    np.testing.assert_allclose(data_sets.outputs([layer] * 2, x), jnp.tanh(x), rtol=1e-6)
    np.testing.assert_array_equal(data_sets.outputs([layer] * 3, x), [[0.0, 2.0]])
    trained = data_sets.trainer("wine", "deep MLP", CONFIG)([Member(arm, -4, 1) for arm in data_sets.ARMS])
    assert (trained["test"] > 80).all()


def test_a_cnn_has_three_convolutions_of_stride_2_and_fits_where_the_signal_is():
    """Against scipy: every other value of a correlation, padded by 0. A CNN beats a linear model on MNIST-1D."""
    shapes = data_sets.shapes_of("CNN", 40, 64, 10)
    assert sum(math.prod(shape) + shape[-1] for shape in shapes) == 5210  # weights of the published model
    params = data_sets.initial_params(1, shapes)
    x = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)
    planes = x[:, :, None]
    for layer in params[:-1]:
        kernel = layer["kernel"]
        summed = [[sum(correlate1d(plane[:, i], kernel[:, i, j], mode="constant") for i in range(kernel.shape[1]))
                   for j in range(kernel.shape[2])] for plane in planes]  # fmt: skip
        planes = np.maximum(np.moveaxis(summed, 1, 2)[:, ::2], 0)
    want = planes.reshape(2, -1) @ params[-1]["kernel"]
    # Sums of up to 125 terms of size below 1, in float32.
    np.testing.assert_allclose(data_sets.outputs(params, jnp.asarray(x)), want, rtol=0, atol=125 * 2.0**-24)
    config = msgspec.structs.replace(CONFIG, names=["mnist1d"], models=["linear", "CNN"])
    linear, cnn = (data_sets.trainer("mnist1d", m, config)([Member(SOFTMAX_CE, -4, 1)])["test"] for m in config.models)
    assert cnn > linear + 10


def test_a_cnn_goes_with_sequences_alone():
    names = ["wine", "mnist1d"]
    config = msgspec.structs.replace(CONFIG, names=names, models=["linear", "CNN"])
    assert data_sets.jobs(config) == [("wine", "linear"), ("mnist1d", "linear"), ("mnist1d", "CNN")]
    assert [job for part in data_sets.parts(config) for job in data_sets.jobs(part)] == data_sets.jobs(config)
    with pytest.raises(ValueError, match=r"models: expected one of \['mnist1d'\] among the names for a CNN, got"):
        msgspec.structs.replace(config, names=["wine"])


def test_it_runs_small_and_an_unknown_name_is_refused_before_it():
    records = [record for record in data_sets.run(CONFIG) if isinstance(record, Record)]
    assert len(records) == 4
    with plots.style():
        section = data_sets.report(CONFIG, records)
    assert [row[0] for row in section.tables[0].rows] == ["wine, linear"]
    with pytest.raises(ValueError, match="names: unknown data set"):
        data_sets.Config(**{**{f: getattr(CONFIG, f) for f in CONFIG.__struct_fields__}, "names": ["whine"]})


@pytest.mark.parametrize(
    ("lead", "spread", "verdicts"),
    [
        (0.0, 0.01, ["holds", "holds"]),
        (1.0, 0.01, ["holds", "falsified"]),
        (-1.0, 0.01, ["holds", "falsified"]),
        (2.5, 0.01, ["falsified", "falsified"]),
        (-2.5, 0.01, ["falsified", "falsified"]),
        (0.0, 9.0, ["undecided", "undecided"]),
    ],
)
def test_verdicts_follow_the_leads(lead, spread, verdicts):
    noise = spread * np.array([-1.0, 1.0, -0.5, 0.5])
    values = {"rate": 0.1, "at_edge": 0.0, "overlap": 0.4}
    records = [
        Record({"part": "seeds", "data": "wine", "model": "linear", "arm": arm},
               values | {"test": 90 + (lead + noise) * (arm == SOFTMAX_CE)})
        for arm in (SOFTMAX_CE, SOFTMAX_SE)
    ]  # fmt: skip
    with plots.style():
        assert [h.verdict for h in data_sets.report(CONFIG, records).hypotheses] == verdicts


def accuracies(name, test):
    """Records of both arms with the linear model."""
    values = {"rate": 0.1, "at_edge": 0.0, "overlap": 0.25, "test": np.array(test)}
    settings = {"part": "seeds", "data": name, "model": "linear"}
    return [Record(settings | {"arm": arm}, {**values}) for arm in (SOFTMAX_CE, SOFTMAX_SE)]


def test_published_accuracies_stand_next_to_those_of_cross_entropy():
    with plots.style():
        tables = data_sets.report(CONFIG, accuracies("wine", [90.0, 91.0]) + accuracies("mnist1d", [33.0, 35.0])).tables
    (row,) = tables[1].rows
    assert row[0] == "mnist1d, linear"
    assert row[1].startswith("34.0 [")
    assert row[2:] == ["32", "+2.0", "logistic regression", "Greydanus and Kobak (2024), ICML"]
    with plots.style():
        assert len(data_sets.report(CONFIG, accuracies("wine", [90.0, 91.0])).tables) == 1


def write(config, path):
    """A config of this study alone."""
    lines = [f"{name} = {value!r}" for name, value in msgspec.to_builtins(config).items()]
    path.write_text("\n".join(["# Small.", 'backend = "cpu"', "[data_sets]", *lines]))


def test_files_of_images_are_trained_on_and_not_needed_for_the_report(tmp_path, capsys):
    name, _ = written(tmp_path / "mnist")
    write(msgspec.structs.replace(CONFIG, names=[name]), tmp_path / "config.toml")
    folder = str(tmp_path / "run")
    assert main(["run", str(tmp_path / "config.toml"), "--out", folder]) == 0
    assert data.digests()[name] in (tmp_path / "run" / "manifest.json").read_text()
    shutil.rmtree(tmp_path / "mnist")
    assert main(["report", folder]) == 0
    assert main(["compare", folder, folder]) == 0


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("idx:/nowhere", "data_sets: /nowhere: expected train-images-idx3-ubyte or"),
        ("python_source", 'data_sets: names: expected a data set whose features are measurements, got "python_source"'),
    ],
)
def test_data_that_cannot_serve_are_refused_before_the_run(tmp_path, capsys, name, line):
    write(CONFIG, tmp_path / "config.toml")
    setting = f'data_sets.names=["{name}"]'
    assert main(["run", str(tmp_path / "config.toml"), "--set", setting, "--out", str(tmp_path / "run")]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"--set: {line}") or f": {line}" in told
    assert not (tmp_path / "run").exists()
