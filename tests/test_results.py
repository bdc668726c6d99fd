"""A record read back equals the record written."""

import contextlib
import math
import sqlite3

import numpy as np
import pytest

from experiments import results
from experiments.results import Record


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.sqlite"


@pytest.fixture
def store(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(results.SCHEMA)
        yield results.Store(database)


def equal(left: Record, right: Record) -> bool:
    """Equality in which nan equals nan, and a number is no curve of one step."""
    return (
        left.settings == right.settings
        and left.values.keys() == right.values.keys()
        and all(
            np.shape(value) == np.shape(right.values[name])
            and np.array_equal(value, right.values[name], equal_nan=True)
            for name, value in left.values.items()
        )
    )


RECORDS = {
    "number": Record({"arm": "A"}, {"loss": 0.1}),
    "curve": Record({"arm": "A"}, {"loss": np.array([3.0, 1.0, 2.0])}),
    "curve of one step": Record({"arm": "A"}, {"loss": np.array([3.0])}),
    "not finite": Record({"arm": "A"}, {"a": math.nan, "b": math.inf, "c": np.array([math.nan, -math.inf, 1.0])}),
    "all nan": Record({"arm": "A"}, {"a": np.full(3, math.nan)}),
    "extremes": Record({"arm": "A"}, {"a": np.array([5e-324, 1e-310, 1.7976931348623157e308, -0.1, 2.0**53 + 2])}),
    "many settings": Record({"arm": 'a "b", c=d/é', "num_classes": 10, "rate": 1e-3}, {"loss": 1.0}),
    "no settings": Record({}, {"loss": 1.0}),
    "no values": Record({"arm": "A"}, {}),
    "long": Record({"arm": "A"}, {"loss": np.arange(5000.0), "other": np.arange(3.0)}),
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_read_back_equals_the_record_written(store, path, record):
    store.write("study", record)
    with contextlib.closing(sqlite3.connect(path)) as database:
        (read,) = results.Store(database).records("study")
    assert equal(read, record)
    assert all(np.asarray(value).dtype == np.float64 for value in read.values.values())


@pytest.mark.parametrize("value", [np.float32(0.5), np.int32(3), 3, np.arange(3), np.array([0.5, 0.25], np.float32)])
def test_every_real_type_is_read_back_as_float64(store, value):
    store.write("study", Record({"seed": np.int64(3), "rate": np.float32(0.5)}, {"x": value}))  # pyright: ignore
    assert equal(store.records("study")[0], Record({"seed": 3, "rate": 0.5}, {"x": np.asarray(value, np.float64)}))


@pytest.mark.parametrize("value", [np.array([]), np.ones((2, 2))])
def test_what_is_neither_a_number_nor_a_curve_is_refused_and_nothing_stored(store, value):
    with pytest.raises(ValueError, match="expected a number or a curve of at least one step"):
        store.write("study", Record({"arm": "A"}, {"good": 1.0, "bad": value}))
    assert store.records("study") == []


def test_records_come_in_the_order_of_writing_and_by_study(store):
    for arm in "CAB":
        store.write("one", Record({"arm": arm}, {"x": 1.0}))
        store.write("two", Record({"arm": arm}, {"x": 2.0}))
    assert [record.settings["arm"] for record in store.records("one")] == ["C", "A", "B"]
    assert {record.values["x"] for record in store.records("two")} == {2.0}


def test_a_record_with_the_same_settings_is_replaced_as_a_whole(store):
    store.write("study", Record({"a": 1, "b": 2}, {"old": np.arange(9.0), "x": 1.0}))
    store.write("study", Record({"b": 2, "a": 1}, {"x": 2.0}))
    assert store.records("study") == [Record({"a": 1, "b": 2}, {"x": 2.0})]


def test_different_settings_have_different_keys():
    different = [{}, {"a": 1}, {"a": "1"}, {"a": 1.0}, {"a": "1,b=2"}, {"a": 1, "b": 2}, {"a": "x"}, {"a": '"x"'}]
    assert len({results.run_key("study", settings) for settings in different}) == len(different)
    assert results.run_key("gradient_law", {"num_classes": 10, "arm": "B"}) == "gradient_law/arm=B,num_classes=10"


def test_the_database_answers_in_plain_sql(store):
    store.write("study", Record({"arm": "B"}, {"curve": np.array([1.0, math.nan, math.inf]), "number": 4.0}))

    def answer(query):
        return store.database.execute(query).fetchall()

    assert answer("SELECT * FROM runs") == [("study/arm=B", "study", '{"arm": "B"}')]
    assert answer("SELECT step, name, value FROM measurements ORDER BY name, step") == [
        (0, "curve", 1.0),
        (1, "curve", None),  # nan
        (2, "curve", math.inf),
        (-1, "number", 4.0),
    ]
    assert answer("SELECT * FROM summary ORDER BY name") == [
        ("study/arm=B", "curve", 3, 1.0, math.inf),
        ("study/arm=B", "number", 1, 4.0, 4.0),
    ]
    assert answer("PRAGMA journal_mode") == [("delete",)]


def test_a_study_is_finished_when_it_says_so(store):
    store.write("study", Record({}, {"x": 1.0}))
    assert store.finished() == {}
    store.finish("study", 1.5)
    assert store.finished() == {"study": 1.5}
