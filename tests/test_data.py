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


def test_arrays_are_shared_and_cannot_be_written(digits):
    assert data.load("digits") is digits
    with pytest.raises(ValueError, match="read-only"):
        digits.train.features[0, 0] = 1


def test_what_was_loaded_is_on_record(digits):
    assert data.digests()["digits"] == digits.sha256


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match='unknown data set "digit", expected one of digits; nearest: digits'):
        data.load("digit")
