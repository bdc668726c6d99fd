"""A config is the whole record of a run: what it says is what is run, and what it cannot mean is said in one line."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
import tiny_studies

from experiments import config, studies
from experiments.errors import InputError, nearest, shown, unknown


@pytest.fixture(autouse=True)
def _tiny_studies(monkeypatch, tmp_path):
    tiny_studies.install(monkeypatch, tmp_path)


COIN = Path("configs/coin.toml")


def coin(*overrides: str) -> Any:
    return config.load(COIN, overrides).studies["coin"]


def test_a_config_is_the_typed_form_of_its_file():
    loaded = config.load(COIN)
    assert loaded.file == "configs/coin.toml"
    assert loaded.backend == "cpu"
    assert msgspec.to_builtins(loaded.studies) == {
        "coin": {"seed": 7, "flips": 1000, "biases": [0.5, 0.75], "toss": {"height": 1.5, "hand": "left"}}
    }


def test_a_config_cannot_be_changed():
    for frozen, name in ((config.load(COIN), "backend"), (coin(), "flips"), (coin().toss, "hand")):
        with pytest.raises(AttributeError):
            setattr(frozen, name, 3)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("coin.flips=10", lambda c: c.flips == 10),
        (" coin.flips = 1_0 # ten", lambda c: c.flips == 10),
        ("coin.biases=[0.125]", lambda c: c.biases == [0.125]),
        ("coin.toss.height=1e-3", lambda c: c.toss.height == 1e-3),
        ("coin.toss.height=2", lambda c: type(c.toss.height) is float),  # a float may be written as an integer
        ('coin.toss.hand="right"', lambda c: c.toss.hand == "right"),
        ("coin.toss.hand=right", lambda c: c.toss.hand == "right"),  # a string without quotes
        ("coin.toss={hand = 'right', height = 0.5}", lambda c: (c.toss.hand, c.toss.height) == ("right", 0.5)),
    ],
)
def test_set_replaces_one_value(override, read):
    assert read(coin(override))


def test_the_last_of_two_overrides_counts():
    assert coin("coin.flips=10", "coin.flips=20").flips == 20


def test_a_study_can_be_added_from_the_command_line():
    loaded = config.load(COIN, ["faulty.pieces=2"])
    assert list(loaded.studies) == ["coin", "faulty"]


def test_only_the_named_studies_are_imported(monkeypatch):
    imported = []
    load = studies.load
    monkeypatch.setattr(studies, "load", lambda name: imported.append(name) or load(name))
    config.load(COIN)
    assert imported == ["coin"]


class Nested(msgspec.Struct, frozen=True):
    rate: Annotated[float, msgspec.Meta(gt=0)]
    decay: float = 0.5


class Everything(msgspec.Struct, frozen=True):
    pair: tuple[int, float]
    many: tuple[Annotated[int, msgspec.Meta(ge=1)], ...]
    tables: list[Nested]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair": [1]}, "pair: expected array of length 2, got [1]"),
        ({"pair": [1, 2.0, 3]}, "pair: expected array of length 2, got [1, 2.0, 3]"),
        ({"pair": [1, "x"]}, 'pair[1]: expected float, got "x"'),
        ({"many": [1, 2, 0]}, "many[2]: expected int >= 1, got 0"),
        ({"many": 3}, "many: expected array, got 3"),
        ({"tables": [{"rate": 1, "decay": 1}, {"rate": 0, "decay": 1}]}, "tables[1].rate: expected float > 0.0, got 0"),
        ({"tables": [{"decay": 1.0}]}, "tables[0].rate: missing, expected float"),
        # A default is no excuse: the file is the whole record.
        ({"tables": [{"rate": 1.0}]}, "tables[0].decay: missing, expected float"),
        ({"tables": [{"rat": 1.0}]}, "tables[0].rat: unknown key, expected one of rate, decay; nearest: rate"),
    ],
)  # fmt: skip
def test_a_mistake_inside_a_list_or_table_is_named_by_its_place(change, message):
    good = {"pair": [1, 2], "many": [], "tables": [{"rate": 1, "decay": 1}]}
    origin = config._Origin("x.toml", frozenset())
    config._check(good, Everything, (), origin)
    with pytest.raises(InputError) as caught:
        config._check(good | change, Everything, (), origin)
    assert str(caught.value) == f"x.toml: {message}"


def test_the_nearest_name_is_one_that_resembles():
    assert unknown("pionts", ["points", "seed"]) == "unknown key, expected one of points, seed; nearest: points"
    assert nearest("zzz", ["points", "seed"]) == ""
    assert unknown("x", []) == "unknown key, expected one of (there is none)"


SHOWN = {
    "lines": "a\nb\r\u2028c",
    "long": "x" * 500,
    "list": list(range(500)),
    "lists": [[["\n"]]] * 3,
    "integer": 1 << 20_000,
    "table": {"a": "\n"},
}


@pytest.mark.parametrize("value", SHOWN.values(), ids=SHOWN)
def test_a_value_is_shown_on_one_short_line(value):
    assert len(shown(value)) <= 60
    assert len(shown(value).splitlines()) == 1
