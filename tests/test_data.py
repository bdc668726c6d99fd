"""The same examples in the same splits on every machine."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments import data
from experiments.errors import InputError

PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_are_split_as_published(digits):
    sizes = {part: getattr(digits, part).labels.shape for part in PARTS}
    assert sizes == {"train": (1077,), "validation": (270,), "test": (450,)}
    assert digits.num_classes == 10
    for part in PARTS:
        features, labels = getattr(digits, part)
        assert features.shape == (len(labels), 64)
        assert (features.dtype, labels.dtype) == (np.float32, np.int32)
        assert features.min() >= 0
        assert features.max() <= 1


def test_every_example_is_in_one_split_with_its_label(digits):
    def rows(pixels, labels):
        return sorted((*row, label) for row, label in zip(pixels.tolist(), labels.tolist(), strict=True))

    features, labels = (np.concatenate([getattr(digits, part)[i] for part in PARTS]) for i in (0, 1))
    pixels, classes = load_digits(return_X_y=True)
    assert rows(features * 16, labels) == rows(pixels, classes)


def test_classes_are_in_proportion(digits):
    whole = np.bincount(load_digits().target) / 1797  # pyright: ignore
    for part in PARTS:
        labels = getattr(digits, part).labels
        assert np.abs(np.bincount(labels) - whole * len(labels)).max() <= 1.5


def test_the_splits_are_the_same_bits_everywhere(digits):
    assert digits.sha256 == "d27a5ba3ec17499956cacc9eb4e713f6f1dd85353e0b20dbc32f1b164df53100"


def test_other_splits_are_other_draws_of_the_same_examples(digits):
    one, same, other = (data.resampled("digits", seed) for seed in (1, 1, 2))
    assert one.sha256 == same.sha256
    assert len({one.sha256, other.sha256, digits.sha256}) == 3
    for part in PARTS:
        assert getattr(one, part).labels.shape == getattr(digits, part).labels.shape
    rows = [np.sort(np.concatenate([getattr(d, part).features.sum(axis=1) for part in PARTS])) for d in (one, digits)]
    np.testing.assert_array_equal(*rows)


def test_words_of_python_predict_the_next_one():
    """Which words these are depends on the Python; that the text goes on from row to row does not."""
    words = data.load("python_source")
    sizes = [len(getattr(words, part).labels) for part in PARTS]
    assert sum(sizes) == 600_000 - 8
    assert 0.79 < sizes[0] / sum(sizes) < 0.81
    for part in PARTS:
        features, labels = getattr(words, part)
        assert features.shape == (len(labels), 8)
        assert features.dtype == labels.dtype == np.int32
        assert (features[1:, :-1] == features[:-1, 1:]).all()
        assert (features[1:, -1] == labels[:-1]).all()
    every = np.concatenate([words.train.features[0], *(getattr(words, part).labels for part in PARTS)])
    assert np.unique(every).size == words.num_classes
    assert words.num_classes > 10_000


def test_without_source_files_the_words_are_missed(monkeypatch, tmp_path):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=f"{tmp_path}: expected Python's source files with 600000 words, got 0 words"):
        data._LOADERS["python_source"]()


def test_arrays_are_shared_and_cannot_be_written(digits):
    assert data.load("digits") is digits
    with pytest.raises(ValueError, match="read-only"):
        digits.train.features[0, 0] = 1


def test_what_was_loaded_is_on_record(digits):
    assert data.digests()["digits"] == digits.sha256


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(
        InputError, match='unknown data set "digit", expected one of digits, python_source; nearest: digits'
    ):
        data.load("digit")
