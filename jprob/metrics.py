"""Metrics of a classifier: the confusion matrix, what follows from it, and perplexity.

The confusion matrix C counts: C[i, j] is how often class i was predicted as j (rows are labels, as in scikit-learn).
The matrix is a sum over examples: those of batches add, and those of devices too (`jax.lax.psum`). Every metric below
is a ratio of its sums, taken last: the mean of the precisions of batches is not the precision.

A class has a true-positive count C[k, k]. Its support is the sum of its row, and its number of predictions that of its
column. Recall divides the first by the second, precision by the third, F1 by the mean of both. A ratio with a
denominator of 0 is 0, value and gradient. `average` says how classes become one number:

- `None` leaves one value per class.
- "macro" is the mean over classes that occur as label or prediction.
- "weighted" is the mean weighted by support.
- "micro" pools the counts of all classes first. Each error is then one false positive and one false negative, so
  precision, recall and F1 all equal accuracy.

That is scikit-learn's rule, with `zero_division=0`. One thing differs: an example of weight 0 is no occurrence of its
class here.

Counts without weights are integers, exact up to 2**31 per entry; sums of weights are floating-point. The metrics take
both. A negative entry, from an overflow or a class out of range, makes every metric of its matrix NaN. u is half the
spacing at 1 of the dtype (2**-24 for float32).
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Integer, Real

from . import _accurate, _checks, _placement, _weights

_AVERAGES = (None, "macro", "micro", "weighted")


@_checks.public(static=("num_classes",))
def confusion_matrix(
    labels: Integer[Array, "*shape"],
    predictions: Integer[Array, "*shape"],
    *,
    num_classes: int,
    weights: Real[Array, "*shape"] | Bool[Array, "*shape"] | None = None,
) -> Real[Array, "{num_classes} {num_classes}"]:
    """Counts C[i, j] of examples with label i and prediction j, or the sums of their weights.

    Args:
      labels: integer classes in [0, K), in any shape: every entry is an example, and all are summed.
      predictions: integer classes in [0, K) in the same shape, such as `categorical.mode(logits)`.
      num_classes: K, static, at most 46340.
      weights: one weight per example, not negative, in the same shape. None counts each example once, and a boolean
        mask counts those that are True.

    Returns:
      C in shape [K, K]. Counts (no weights, or a mask) have dtype int32, or int64 if the classes have it: they are
      exact below 2**31 (2**63). Sums of n weights are at least float32. Their relative error is at most 2 sqrt(n) u,
      more for n K^2 > 2**24. A negative weight makes its entry NaN.

      A class outside [0, K) makes all of C invalid, unless its weight is 0, and `checkify` names it. Sums are then NaN
      with a gradient of 0. Counts have no NaN, and are negative. Every metric of such a matrix is NaN. Added counts
      keep a negative entry, unless the number of invalid ones is a multiple of 2**min(K^2, 31).

    Raises:
      ValueError: labels or predictions are not integers, a shape differs, or the weights are not real numbers; or
        `num_classes` is not an integer in [1, 46340].

    >>> first = confusion_matrix(jnp.array([0, 1, 2]), jnp.array([0, 2, 2]), num_classes=3)
    >>> second = confusion_matrix(jnp.array([0, 1]), jnp.array([1, 1]), num_classes=3)
    >>> print(first + second)
    [[1 1 0]
     [0 1 1]
     [0 0 1]]
    """
    _checks.size("confusion_matrix", "num_classes", num_classes, 46340)  # whose square is below 2**31
    return _placement.automatic(partial(_confusion_matrix, num_classes), labels, predictions, weights)


@_checks.public()
def accuracy(matrix: Real[Array, "*batch K K"]) -> Float[Array, "*batch"]:
    """Accuracy: the share of examples whose prediction is their label, sum_k C[k, k] / sum C.

    Args:
      matrix: confusion matrix C of counts or sums of weights, rows the labels, or any batch of them.

    Returns:
      One value in [0, 1] per matrix, at least float32: 0 for a matrix of zeros. Relative error at most (4 + K) u.

    Raises:
      ValueError: the matrix holds no integer or floating-point numbers, or its last two axes are not square.

    >>> print(accuracy(jnp.array([[3.0, 1.0], [0.0, 4.0]])))
    0.875
    """
    counts, row, _ = _counts("accuracy", matrix)
    return _weights.ratio(jnp.sum(counts, axis=-1), jnp.sum(row, axis=-1))


@_checks.public()
def balanced_accuracy(matrix: Real[Array, "*batch K K"]) -> Float[Array, "*batch"]:
    """Balanced accuracy: the mean recall of the classes that occur as a label, so that each counts the same.

    Args:
      matrix: confusion matrix C of counts or sums of weights, rows the labels, or any batch of them.

    Returns:
      One value in [0, 1] per matrix, at least float32: 0 for a matrix of zeros. Relative error at most (6 + 2 K) u.

    Raises:
      ValueError: as for `accuracy`.

    Source: Brodersen et al. (2010), The balanced accuracy and its posterior distribution.

    >>> print(balanced_accuracy(jnp.array([[3.0, 1.0], [0.0, 4.0]])))
    0.875
    >>> print(balanced_accuracy(jnp.array([[9.0, 0.0], [1.0, 0.0]])))
    0.5
    """
    counts, row, _ = _counts("balanced_accuracy", matrix)
    return _weights.ratio(jnp.sum(_weights.ratio(counts, row), axis=-1), jnp.sum(row != 0, axis=-1, dtype=row.dtype))


@_checks.public(static=("average",))
def precision(
    matrix: Real[Array, "*batch K K"], *, average: Literal["macro", "micro", "weighted"] | None = None
) -> Float[Array, "*result"]:
    """Precision: the share of the examples predicted as class k that are of it, C[k, k] / sum_i C[i, k].

    Args:
      matrix: confusion matrix C of counts or sums of weights, rows the labels, or any batch of them.
      average: None for one value per class; "macro", "micro" or "weighted" for one number. Static.

    Returns:
      K values in [0, 1] per matrix or the average of them, at least float32: 0 for a class never predicted. Relative
      error at most (6 + 2 K) u.

    Raises:
      ValueError: `average` is none of these, or as for `accuracy`.

    >>> print(precision(jnp.array([[3.0, 1.0], [0.0, 4.0]])))
    [1.  0.8]
    """
    counts, row, column = _counts("precision", matrix)
    return _averaged("precision", counts, column, row, column, average)


@_checks.public(static=("average",))
def recall(
    matrix: Real[Array, "*batch K K"], *, average: Literal["macro", "micro", "weighted"] | None = None
) -> Float[Array, "*result"]:
    """Recall: the share of the examples of class k that are predicted as such, C[k, k] / sum_j C[k, j].

    Args:
      matrix: confusion matrix C of counts or sums of weights, rows the labels, or any batch of them.
      average: None for one value per class; "macro", "micro" or "weighted" for one number. Static.

    Returns:
      K values in [0, 1] per matrix or the average of them, at least float32: 0 for a class that is no label. Relative
      error at most (6 + 2 K) u. The weighted average is the accuracy.

    Raises:
      ValueError: as for `precision`.

    >>> print(recall(jnp.array([[3.0, 1.0], [0.0, 4.0]])))
    [0.75 1.  ]
    """
    counts, row, column = _counts("recall", matrix)
    return _averaged("recall", counts, row, row, column, average)


@_checks.public(static=("average",))
def f1_score(
    matrix: Real[Array, "*batch K K"], *, average: Literal["macro", "micro", "weighted"] | None = None
) -> Float[Array, "*result"]:
    """F1 score: the harmonic mean of precision and recall, 2 C[k, k] / (sum_j C[k, j] + sum_i C[i, k]).

    The macro average is the mean of the classes' scores, not the score of the mean precision and recall.

    Args:
      matrix: confusion matrix C of counts or sums of weights, rows the labels, or any batch of them.
      average: None for one value per class; "macro", "micro" or "weighted" for one number. Static.

    Returns:
      K values in [0, 1] per matrix or the average of them, at least float32: 0 for a class never predicted rightly, or
      that does not occur. Relative error at most (6 + 2 K) u.

    Raises:
      ValueError: as for `precision`.

    Source: van Rijsbergen (1979), Information Retrieval, 7; the two macro averages: Opitz and Burst (2019).

    >>> print(f1_score(jnp.array([[3.0, 2.0], [0.0, 4.0]])))
    [0.75 0.8 ]
    """
    counts, row, column = _counts("f1_score", matrix)
    return _averaged("f1_score", counts, (row + column) / 2, row, column, average)


@_checks.public()
def perplexity(
    nll: Float[Array, "*shape"],
    *,
    weights: Real[Array, "*shape"] | Bool[Array, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Perplexity exp(sum_i w_i nll_i / sum_i w_i): the exponential of the mean negative log-likelihood.

    The perplexity is the number of equally likely classes that have that mean. The mean comes before the exponential.
    To join batches, add their sums of w_i nll_i and of w_i.

    Args:
      nll: negative log-likelihoods in nats, one per example or token in any shape, as from `categorical.cross_entropy`.
      weights: one weight per value, not negative, in the same shape; a mask is one. None weighs all the same.

    Returns:
      One number, at least float32, at least 1 where no nll is negative: 1 where the weights are all 0 or nothing came
      in; inf beyond the largest number of the dtype (a mean above 88.7 in float32); NaN if a weight is negative. A
      value of weight 0 does not count, also if it is infinite. Relative error at most (16 + m) u for a mean of m of up
      to 1000 values. The sum of n values adds log2(n) m u. The gradient of an infinite or NaN result is 0.

    Raises:
      ValueError: the nll is not floating-point, or the weights are no real numbers of its shape.

    Source: Jelinek et al. (1977), Journal of the Acoustical Society of America 62.

    >>> print(f"{perplexity(jnp.log(jnp.array([2.0, 8.0, 1e9])), weights=jnp.array([1.0, 1.0, 0.0])):.3f}")
    4.000
    """
    return _placement.automatic(_perplexity, nll, weights)


def _confusion_matrix(num_classes, labels, predictions, weights):
    name = "confusion_matrix"
    labels = _checks.classes(name, "labels", labels, "labels", getattr(labels, "shape", ()))
    predictions = _checks.classes(name, "predictions", predictions, "labels", labels.shape)
    w = _checks.weights(name, "labels", labels.shape, weights)
    counted = w != 0
    valid = _checks.in_range(name, "label", labels, num_classes, counted)
    valid &= _checks.in_range(name, "prediction", predictions, num_classes, counted)
    row, column = (jnp.where(valid, c, 0).astype(jnp.int32) for c in (labels, predictions))
    if weights is None or weights.dtype == jnp.bool_:
        w = counted.astype(jnp.int64 if 8 in (labels.dtype.itemsize, predictions.dtype.itemsize) else jnp.int32)
        # The sum of odd * 2**k such matrices has the sign bit of entry k set, for any counts.
        info = jnp.iinfo(w.dtype)
        invalid = jnp.asarray(info.min, w.dtype) >> (jnp.arange(num_classes**2, dtype=w.dtype) % (info.bits - 1))
    else:
        invalid = jnp.nan
    counts = _weights.sum_by((row * num_classes + column).ravel(), jnp.where(valid, w, 0).ravel(), num_classes**2)
    return jnp.where(jnp.all(valid | ~counted), counts, invalid).reshape(num_classes, num_classes)


def _perplexity(nll, weights):
    _checks.floating("perplexity", nll=nll)
    w = _checks.weights("perplexity", "nll", nll.shape, weights)
    dtype = _accurate.compute_dtype(nll, w)
    # Shares of the weight, not a quotient of two sums, which may overflow.
    w = w.astype(dtype)
    share = _weights.ratio(w, jnp.sum(w))
    mean = jnp.sum(_accurate.multiply_no_nan(share, nll.astype(dtype)))
    constant = jax.lax.stop_gradient(mean)
    return jnp.exp(jnp.where(jnp.exp(constant) < jnp.inf, mean, constant))


def _counts(function, matrix):
    """True positives, sums of rows and sums of columns, each of shape [..., K]."""
    if not jnp.issubdtype(getattr(matrix, "dtype", object), jnp.integer):
        _checks.floating(function, matrix=matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise ValueError(f"{function}: matrix must have the shape [..., K, K], got {_checks.describe(matrix)}")
    c = matrix.astype(_accurate.compute_dtype(matrix))
    _checks.expect(c >= 0, c, f"{function}: count {{value}} is negative")
    c = jnp.where(jnp.any(c < 0, axis=(-2, -1), keepdims=True), jnp.nan, c)
    return _placement.diagonal(c), jnp.sum(c, axis=-1), jnp.sum(c, axis=-2)


def _averaged(function, hits, total, row, column, average):
    """hits / total for each class, or the average."""
    if average not in _AVERAGES:
        raise ValueError(f"{function}: average must be one of {', '.join(map(repr, _AVERAGES))}, got {average!r}")
    if average == "micro":
        return _weights.ratio(jnp.sum(hits, axis=-1), jnp.sum(row, axis=-1))
    score = _weights.ratio(hits, total)
    if average == "macro":
        return _weights.ratio(jnp.sum(score, axis=-1), jnp.sum(row + column != 0, axis=-1, dtype=row.dtype))
    if average == "weighted":
        return _weights.ratio(jnp.sum(row * score, axis=-1), jnp.sum(row, axis=-1))
    return score
