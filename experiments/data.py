"""Data sets by name, split the same way on every machine. None needs a network: scikit-learn or Python ships them.

Splits are drawn on the host with NumPy's PCG64. So a CPU, a GPU and a TPU train on the same examples. The loaded data
are hashed, and the hash stands in the run's manifest.
"""

import hashlib
import itertools
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.errors import InputError, unknown

_WORDS, _CONTEXT = 600_000, 8
_SEED = 0  # of the split that `load` gives: part of the data set's definition, not a setting


class Split(NamedTuple):
    """Examples and their classes."""

    features: np.ndarray  # float32[examples, features]; of words int32, their numbers
    labels: np.ndarray  # int32[examples], 0 to num_classes - 1


class Dataset(NamedTuple):
    """A classification problem. Fit on `train`, choose on `validation`, report on `test`."""

    train: Split
    validation: Split
    test: Split
    num_classes: int
    sha256: str  # of the six arrays


def load(name: str) -> Dataset:
    """The data set of that name. Its arrays are shared by all who load it, and read-only.

    Raises:
      InputError: there is no such data set.
    """
    if name not in _LOADERS:
        raise InputError(unknown(name, sorted(_LOADERS), f'data set "{name}"'))
    if name not in _loaded:
        _loaded[name] = _LOADERS[name]()
    return _loaded[name]


def resampled(name: str, seed: int) -> Dataset:
    """The examples of a data set in another split of the same sizes, drawn with a seed >= 1.

    Raises:
      InputError: there is no such data set.
    """
    dataset = load(name)
    features, labels = map(np.concatenate, zip(dataset.train, dataset.validation, dataset.test, strict=True))
    return _split(features, labels, seed)


def digests() -> dict[str, str]:
    """The data sets that this process has loaded, and their SHA-256."""
    return {name: dataset.sha256 for name, dataset in _loaded.items()}


def _digits() -> Dataset:
    """1797 images of handwritten digits, 8 x 8 pixels with values k / 16: 1077 train, 270 validate, 450 test."""
    from sklearn.datasets import load_digits  # a second to import: only who wants the data waits

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    return _split(pixels / 16, labels)


def _python_source() -> Dataset:
    """600 000 words of the source files that this Python ships: 8 in a row, and which comes next.

    The files are in the order of their names; a word is a run of letters, digits and underscores, or any other sign.
    The first 8 tenths of the text train, the next validates, the last tests. The classes are the words, in the order
    they come.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py")))
    found = (word for text in texts for word in re.findall(r"\w+|[^\w\s]", text))
    words = list(itertools.islice(found, _WORDS))
    if len(words) < _WORDS:
        raise InputError(f"{folder}: expected Python's source files with {_WORDS} words, got {len(words)} words")
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    text = np.array([numbers[word] for word in words], np.int32)
    contexts, labels = np.lib.stride_tricks.sliding_window_view(text, _CONTEXT)[:-1], text[_CONTEXT:]
    ends = [len(labels) * tenths // 10 for tenths in (0, 8, 9, 10)]
    train, validation, test = (Split(contexts[i:j].copy(), labels[i:j].copy()) for i, j in itertools.pairwise(ends))
    return _dataset(train, validation, test, len(numbers))


def _split(features: np.ndarray, labels: np.ndarray, seed: int = _SEED) -> Dataset:
    """A quarter for testing, then a fifth of the rest for validation, each with the classes in proportion."""
    from sklearn.model_selection import train_test_split

    generator = np.random.RandomState(np.random.PCG64(seed))  # the one way to give scikit-learn a PCG64
    whole = Split(features.astype(np.float32), labels.astype(np.int32))

    def part(split: Split, fraction: float) -> tuple[Split, Split]:
        parts = train_test_split(*split, test_size=fraction, stratify=split.labels, random_state=generator)
        large, small, large_labels, small_labels = map(np.asarray, parts)
        return Split(large, large_labels), Split(small, small_labels)

    rest, test = part(whole, 0.25)
    train, validation = part(rest, 0.2)
    return _dataset(train, validation, test, int(labels.max()) + 1)


def _dataset(train: Split, validation: Split, test: Split, num_classes: int) -> Dataset:
    arrays = [*train, *validation, *test]
    for array in arrays:
        array.setflags(write=False)
    return Dataset(train, validation, test, num_classes, _digest(arrays))


def _digest(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


_LOADERS: dict[str, Callable[[], Dataset]] = {"digits": _digits, "python_source": _python_source}
_loaded: dict[str, Dataset] = {}
