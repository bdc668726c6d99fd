"""The accuracy study: its measure against hand-made cases, its truth against finite differences, verdicts that fail."""

import importlib.util
import itertools
import math

import jax.numpy as jnp
import mpmath
import msgspec
import numpy as np
import pytest
from mpmath import mpf

from experiments import plots
from experiments.results import Progress, Record
from experiments.studies import accuracy
from experiments.studies.accuracy import errors, truth
from experiments.studies.accuracy.functions import FUNCTIONS
from experiments.studies.accuracy.regimes import rounded
from experiments.studies.accuracy.section import shown

SETTINGS = {
    "dtypes": ["float32"],
    "functions": ["cross_entropy", "kl_divergence"],
    "libraries": ["jprob"],
    "examples": 2,
    "num_classes": [3],
    "spread": 3.0,
    "margins": [20.0],
    "shift": 1e4,
    "differences": [1e-2],
    "scales": [1e-3],
    "tails": [5.0],
    "seed": 0,
}
CONFIG = msgspec.convert(SETTINGS, accuracy.Config)


@pytest.mark.parametrize("dtype", errors.UNITS)
@pytest.mark.parametrize("n", [0.0, 1.0, 2.0, 1000.0])
@pytest.mark.parametrize("want", [1.0, -0.5, 1024.0])
def test_a_value_off_by_n_u_is_measured_as_n(dtype, n, want):
    """u is half the spacing at 1: the neighbour above a power of 2 is 2 u away."""
    u = errors.UNITS[dtype]
    assert float(jnp.asarray(1 + 2 * u, dtype)) == 1 + 2 * u
    assert float(jnp.asarray(1 + u, dtype)) == 1
    got = errors.error(np.array([want * (1 + n * u)]), np.array([want]), dtype)
    assert got == pytest.approx(min(n, 1 / u), abs=1e-6)


@pytest.mark.parametrize(
    ("got", "want", "off"),
    [
        (0.0, 0.0, 0.0),
        (1e-39, 0.0, 0.0),  # below the smallest normal number
        (0.0, 1e-39, 0.0),
        (1e-9, 0.0, 2**24),  # of a truth of 0 nothing is right but 0
        (0.0, 1e-9, 2**24),
        (-1.0, 1.0, 2**24),  # capped: no digit
        (math.inf, 1.0, math.inf),
        (-math.inf, -math.inf, 0.0),
        (math.inf, -math.inf, 2**24),
        (1.0, math.inf, 2**24),
        (math.inf, 1e39, 0.0),  # beyond the range of float32
        (math.nan, 1.0, math.nan),
        (math.nan, math.inf, math.nan),
    ],
)
def test_special_values(got, want, off):
    assert errors.error(np.array([got]), np.array([want]), "float32").tolist() == pytest.approx([off], nan_ok=True)


def test_errors_are_shown_as_what_they_are():
    told = [shown(x, "float32") for x in (0.04, 9.94, 12.3, 3069.0, 2.0**24, math.inf, math.nan)]
    assert told == ["0.0", "9.9", "12", "3 069", "no digit", "inf", "NaN"]


def moved(args, k, index, step):
    """The arguments with one number moved."""

    def move(x, index):
        return x + step if not index else tuple(move(a, index[1:]) if i == index[0] else a for i, a in enumerate(x))

    return [move(a, index) if i == k else a for i, a in enumerate(args)]


def indices(x):
    """The places of all numbers in nested tuples."""
    return [(i, *rest) for i, a in enumerate(x) for rest in indices(a)] if isinstance(x, tuple) else [()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_closed_gradients_are_the_derivatives_of_the_values(name):
    function, step = FUNCTIONS[name], mpf(10) ** -40
    regimes = function.inputs(CONFIG, np.random.default_rng(1))
    with mpmath.workdps(240):
        for regime, batch in itertools.islice(regimes.items(), 4):
            args = errors.arguments(rounded(batch, "float32"), 0)
            want_of, entry = function.truth(*args), args[1] if function.is_map else 0
            places = [(k, index) for k in function.argnums for index in indices(args[k])]
            assert len(want_of.gradient) == len(places)
            for (k, index), got in zip(places, want_of.gradient, strict=True):
                if len(index) == 2 and index[1] > index[0]:
                    continue  # above the diagonal of scale_tril
                ends = [function.truth(*moved(args, k, index, s)).value[entry].want for s in (step, -step)]
                want = (ends[0] - ends[1]) / (2 * step)
                # A central difference errs by about step^2 times a third derivative; 1e-3^-3 at a scale of 1e-3.
                assert abs(got.want - want) <= mpf(10) ** -30 * (1 + abs(want)), (regime, index)
                assert got.size >= abs(got.want) * (1 - mpf(10) ** -12), (regime, index)  # some sizes are of float64


def test_values_by_hand():
    z = (mpf(0), mpmath.log(3))
    assert float(truth.cross_entropy(z, 0).value[0].want) == pytest.approx(math.log(4), rel=1e-15)
    assert float(truth.brier_score(z, 0).value[0].want) == pytest.approx(9 / 8, rel=1e-15)
    assert float(truth.entropy(z, 0).value[0].want) == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-15)
    assert float(truth.kl_divergence(z, (mpf(0), mpf(0))).value[0].want) == pytest.approx(
        0.75 * math.log(1.5) - 0.25 * math.log(2), rel=1e-15
    )
    assert float(truth.cdf(mpf(0), mpf(0), mpf(1)).value[0].want) == 0.5
    assert float(truth.quantile(mpf(0.5), mpf(3), mpf(2)).value[0].want) == 3
    third = (mpf(1), mpf(2), mpf(3)), (mpf(0), mpf(0), mpf(0))
    assert float(truth.variance(*third).value[0].want) == pytest.approx(2 / 3, rel=1e-15)


@pytest.fixture(scope="module")
def records():
    config = msgspec.structs.replace(CONFIG, libraries=["jprob", "jax", "torch"])
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
        pieces = list(accuracy.run(config))
    done = [piece.done for piece in pieces if isinstance(piece, Progress)]
    assert done == sorted(done)
    return [piece for piece in pieces if isinstance(piece, Record)]


def report(records):
    with plots.style():
        return accuracy.report(CONFIG, records)


def test_a_run(records):
    section = report(records)
    assert all(plots.svg(plot.figure).startswith("<svg") for plot in section.plots)
    ten, every = section.tables
    assert ten.header == ["function", "regime", "of", "jprob", "jax"]
    assert ["cross_entropy", "right by 20", "value"] in [row[:3] for row in ten.rows]
    assert all(len(row) == len(table.header) for table in section.tables for row in table.rows)
    confident = next(row for row in every.rows if row[:3] == ["cross_entropy", "right by 20", "gradient"])
    assert confident[4] == "no digit"
    assert float(confident[3]) <= 16 + 21
    assert section.hypotheses[0].verdict == section.hypotheses[2].verdict == "holds"


def test_a_library_that_is_absent_is_named_as_absent(records):
    of_torch = [r for r in records if r.settings["library"] == "torch"]
    assert [(r.settings["version"], r.values["installed"]) for r in of_torch] == [("absent", 0.0)]
    assert "absent from all that follows: torch." in report(records).text


def changed(records, library, **values):
    """The records with the last row of a library changed."""
    last = max(i for i, r in enumerate(records) if r.settings["library"] == library and r.settings["part"] == "error"
               and r.settings["function"] == "kl_divergence")  # fmt: skip
    new = {name.replace("_", " "): value for name, value in values.items()}
    return [r._replace(values={**r.values, **new}) if i == last else r for i, r in enumerate(records)]


@pytest.mark.parametrize(
    ("index", "library", "values"),
    [
        (0, "jprob", {"value_share": 1.01}),
        (0, "jprob", {"gradient_share": math.nan}),
        (0, "jprob", {"value_share": math.inf, "value": math.inf}),
        (1, "jprob", {"value": 2e4}),
        (1, "jprob", {"value": math.nan}),
        (2, "jprob", {"lowest": -1e-9}),
    ],
)
def test_a_wrong_result_is_falsified(records, index, library, values):
    section = report(changed(records, library, **values))
    assert section.hypotheses[index].verdict == "falsified"
    assert "kl_divergence" in section.hypotheses[index].measured or index == 2


def test_peers_are_told_where_they_are_better(records):
    section = report(changed(changed(records, "jprob", value=30.0), "jax", value=10.0))
    assert any("jax is more exact" in s and "value) 10 against 30" in s for s in section.hypotheses[1].against)
    alone = [r for r in records if r.settings["library"] != "jax"]
    assert report(alone).hypotheses[1].verdict == "undecided"


def test_what_a_dtype_cannot_hold_is_left_out():
    near, far = (np.array([[1.0, 2.0]]), np.array([[1.0, 2.0001]])), (np.array([1e-46]),)
    assert rounded(near, "float32") is not None
    assert rounded(near, "bfloat16") is None
    assert rounded(far, "float32") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"libraries": ["jax"]},
        {"libraries": ["jprob", "numpy"]},
        {"functions": ["softmin"]},
        {"dtypes": ["float16"]},
        {"margins": []},
    ],
)
def test_config_refuses(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**SETTINGS, **wrong}, accuracy.Config)
