"""Calibration: does a share c of the predictions with probability c come true?

A classifier gives its predicted class the probability c, its confidence. A calibrated classifier is right in a share c
of these predictions. `reliability` sorts examples by confidence into bins and sums what each bin needs. Tables of
batches add up, field by field, to that of the whole: `jax.tree.map(jnp.add, a, b)`. Tables of devices do too:
`jax.lax.psum(table, axis_name)`. Options bin by equal weight, or each class apart. These metrics follow from the sums:

- `expected_calibration_error`, the mean gap between confidence and accuracy.
- `maximum_calibration_error`, the largest gap.
- `brier_decomposition`, the parts of the squared error of the confidence.

A bin without weight counts nothing; without any weight every metric is 0.

`fit_temperature` calibrates: it divides the logits by the one number T that makes held-out labels most likely. Every
prediction stays as it is.

Classes are on the last axis of the logits, and -inf marks an impossible class. The prediction is the first of the most
probable classes (`categorical.mode`). Computed in float32 at least (float64 where an input has it). u is half the
spacing at 1 of that dtype (2**-24 for float32). R is the largest gap between finite logits of a row. A confidence has a
relative error of at most (16 + R) u. A sum over n examples has 2 sqrt(n) u more.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Bool, Float, Integer, Real

from . import _accurate, _categorical, _checks, _placement, _weights

# Steps of Newton's method. 20 000 random sets with logits from 1e-8 to 1e8 and weights from 1e-25 to 1 were tried. They
# need at most 28 in float32 and 20 in float64; usual ones need 6.
_STEPS = 32


class Reliability(NamedTuple):
    """Sums over the examples of each confidence bin; tables of one `num_bins` add up."""

    weight: Float[Array, "*batch num_bins"]  # of weights w: the number of examples, if they have none
    confidence: Float[Array, "*batch num_bins"]  # of w c
    correct: Float[Array, "*batch num_bins"]  # of w where the prediction is the label
    squared_error: Float[Array, "*batch num_bins"]  # of w (c - 1)^2 where it is, and w c^2 where not


class BrierDecomposition(NamedTuple):
    """The Brier score of the confidence = reliability - resolution + uncertainty + within_bin."""

    score: Float[Array, "*batch"]  # mean of (c - correct)^2
    reliability: Float[Array, "*batch"]  # mean squared gap between a bin's confidence and its accuracy; 0 is best
    resolution: Float[Array, "*batch"]  # variance of the bins' accuracies; the larger the better
    uncertainty: Float[Array, "*batch"]  # a (1 - a) of the overall accuracy a
    within_bin: Float[Array, "*batch"]  # variance of c in its bin - 2 covariance of c and correctness there


@_checks.public(static=("num_bins", "class_wise", "equal_mass"))
def reliability(
    logits: Float[Array, "*shape K"],
    labels: Integer[Array, "*shape"],
    *,
    num_bins: int = 15,
    class_wise: bool = False,
    equal_mass: bool = False,
    weights: Real[Array, "*shape"] | Bool[Array, "*shape"] | None = None,
) -> Reliability:
    """Reliability table: the sums of weight, confidence, hits and squared error in each bin of confidence.

    The confidence is c = max softmax(logits). The B bins have equal width and hold their upper edge: bin k is
    (k / B, (k + 1) / B]. So c = 1 falls into the last. A reliability diagram draws correct / weight against
    confidence / weight.

    Args:
      logits: unnormalised log-probabilities in any floating dtype, classes last; every row is an example, and all are
        summed.
      labels: integer classes in [0, K), in the logits' shape without the last axis.
      num_bins: B, static.
      class_wise: static. True makes a table of each class k, with c the probability of k. A hit is then a label of k.
      equal_mass: static. True makes bins of equal weight, from the order of the confidences. Confidences that tie share
        a bin. The edges differ from batch to batch, so these tables do not add up.
      weights: one weight per example, not negative, in the labels' shape; a mask is one. None counts each once.

    Returns:
      A `Reliability` of arrays [B], or [K, B] if class-wise, at least float32. A row of NaN or without a possible class
      belongs to no bin, and makes every sum NaN. A label outside [0, K) makes the hits and the squared error of its bin
      NaN. A negative weight makes all sums of its bin NaN. None of them counts if its weight is 0. Counts are exact
      below 2**24 a bin. Each sum has a relative error of at most (32 + 2 R + 2 sqrt(n)) u. A confidence within
      (16 + R) u of an edge may fall on its other side. Gradients in logits and weights are those within the bins.
      `jax.export` needs a known number of examples.

    Raises:
      ValueError: the logits are not floating-point, the labels are not integers, or a shape differs; or the weights are
        not real numbers, or `num_bins` is not an integer in [1, 2**24]; or an option is not True or False.

    Source: Guo et al. (2017), On Calibration of Modern Neural Networks; Nixon et al. (2019), Measuring Calibration in
    Deep Learning.

    >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6]]))
    >>> table = reliability(logits, jnp.array([0, 0, 0]), num_bins=2)
    >>> print(table.weight, table.confidence, table.correct)
    [0. 3.] [0.        2.1999998] [0. 2.]
    """
    _checks.size("reliability", "num_bins", num_bins, 2**24)
    for name, value in {"class_wise": class_wise, "equal_mass": equal_mass}.items():
        if not isinstance(value, bool):
            raise ValueError(f"reliability: {name} must be True or False, got {value!r}")
    return _placement.automatic(partial(_reliability, num_bins, class_wise, equal_mass), logits, labels, weights)


def _reliability(num_bins, class_wise, equal_mass, logits, labels, weights):
    z, y, w = _examples("reliability", logits, labels, weights)
    valid, label, w = ((y >= 0) & (y < z.shape[1]))[:, None], y[:, None], w[:, None]
    p = _accurate.softmax(z, 1)
    if class_wise:
        confidence, hit = p, _categorical.is_class(z, label, 1)
        error = _categorical.loss_and_residual(z, jnp.where(valid, label, 0), 1)[1]
    else:
        confidence, hit = jnp.max(p, axis=1, keepdims=True), jax.lax.argmax(z, 1, y.dtype)[:, None] == label
        # For a hit the error is 1 - c. As the sum of the other classes it keeps its digits near c = 1.
        error = jnp.where(hit, _accurate.top_complement(z, 1), confidence)
    correct = jnp.where(valid, hit.astype(z.dtype), jnp.nan)
    squared_error = jnp.where(valid, jnp.square(error), jnp.nan)
    values = jnp.stack([jnp.ones_like(confidence), confidence, correct, squared_error], axis=-1)
    known, forecasts = jnp.isfinite(confidence), confidence.shape[1]
    index = jnp.ceil(confidence * num_bins) - 1
    if equal_mass:
        ranked = jnp.where(known & (w > 0), confidence, jnp.inf)
        index = jnp.floor(jax.vmap(_mass_below, (1, None), 1)(ranked, jnp.where(w > 0, w, 0)[:, 0]) * num_bins)
    index = jnp.clip(jnp.where(known, index, 0).astype(jnp.int32), 0, num_bins - 1)
    values = _accurate.multiply_no_nan(w[..., None], jnp.where(known[..., None], values, 0))
    index += num_bins * jnp.arange(forecasts, dtype=index.dtype)[None]
    sums = _weights.sum_by(index.ravel(), values.reshape(-1, 4), num_bins * forecasts)
    sums = jnp.where(jnp.all(known | (w == 0)), sums, jnp.nan).T
    return Reliability(*sums.reshape(4, forecasts, num_bins) if class_wise else sums)


def _mass_below(x, w):
    """The share of the weight of smaller entries, the same for entries that tie."""
    order = jnp.argsort(x)
    mass = jnp.cumsum(w[order])
    first = jnp.searchsorted(x[order], x)
    return _weights.ratio((mass - w[order])[first], mass[-1]) if x.size else x


@_checks.public()
def expected_calibration_error(table: Reliability) -> Float[Array, "*batch"]:
    """Expected calibration error: the mean over examples of |accuracy - mean confidence| of their bin.

    Args:
      table: sums per bin, from `reliability`, or any batch of them (bins on the last axis).

    Returns:
      One value in [0, 1] per table, at least float32: 0 for a table without weight. The absolute error is that of the
      table's sums, relative to its weight, and (4 + B) u more.

    Raises:
      ValueError: the table is not a `Reliability`, a field is not floating-point, or their shapes differ.

    Source: Naeini, Cooper and Hauskrecht (2015), AAAI; Guo et al. (2017). The error depends on the bins, and is biased
    upwards when they hold few examples.

    >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6]]))
    >>> table = reliability(logits, jnp.array([0, 0, 0]), num_bins=2)
    >>> print(f"{expected_calibration_error(table):.4f}")
    0.0667
    """
    table = _checked("expected_calibration_error", table)
    gap = jnp.sum(jnp.abs(table.correct - table.confidence), axis=-1)
    return _weights.ratio(gap, jnp.sum(table.weight, axis=-1))


@_checks.public()
def maximum_calibration_error(table: Reliability) -> Float[Array, "*batch"]:
    """Maximum calibration error: the largest |accuracy - mean confidence| of any bin that holds an example.

    Args:
      table: sums per bin, from `reliability`, or any batch of them (bins on the last axis).

    Returns:
      One value in [0, 1] per table, at least float32: 0 for a table without weight. The absolute error is that of the
      bin's sums, relative to its weight, and 4 u more.

    Raises:
      ValueError: as for `expected_calibration_error`.

    Source: Naeini, Cooper and Hauskrecht (2015), AAAI.

    >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6]]))
    >>> table = reliability(logits, jnp.array([0, 0, 0]), num_bins=5)
    >>> print(f"{maximum_calibration_error(table):.4f}")
    0.6000
    """
    table = _checked("maximum_calibration_error", table)
    return jnp.max(_weights.ratio(jnp.abs(table.correct - table.confidence), table.weight), axis=-1)


@_checks.public()
def brier_decomposition(table: Reliability) -> BrierDecomposition:
    """Brier score of the confidence, in parts: score = reliability - resolution + uncertainty + within_bin.

    The event that is forecast with probability c is "the prediction is right". Bin k has the weight share v_k, the mean
    confidence c_k and the accuracy a_k; a is the overall accuracy:

        reliability = sum_k v_k (c_k - a_k)^2,  resolution = sum_k v_k (a_k - a)^2,  uncertainty = a (1 - a)

    The three make up the score where all confidences of a bin are equal (Murphy). Elsewhere `within_bin` is the rest:
    the sum over bins of `v_k (variance of c in bin k - 2 covariance of c and correctness in it)`. This rest tends to 0
    with the width of the bins (Stephenson). For two classes the score is half of `categorical.brier_score`.

    Args:
      table: sums per bin, from `reliability`, or any batch of them (bins on the last axis).

    Returns:
      A `BrierDecomposition` of one value per table each, at least float32: all 0 for a table without weight. The score
      has the relative error of the table and (4 + B) u more. The other parts have the same as an absolute error.

    Raises:
      ValueError: as for `expected_calibration_error`.

    Source: Murphy (1973), Journal of Applied Meteorology 12; Stephenson, Coelho and Jolliffe (2008), Weather and
    Forecasting 23.

    >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.75, 0.25], [0.75, 0.25], [0.5, 0.5]]))
    >>> parts = brier_decomposition(reliability(logits, jnp.array([0, 0, 1, 0]), num_bins=2))
    >>> print(" ".join(f"{name} {value:.4f}" for name, value in parts._asdict().items()))
    score 0.2213 reliability 0.0758 resolution 0.0208 uncertainty 0.1875 within_bin -0.0212
    """
    table = _checked("brier_decomposition", table)
    weight, confidence, correct, squared_error = table
    total = jnp.sum(weight, axis=-1, keepdims=True)
    share = _weights.ratio(weight, total)
    accuracy = _weights.ratio(correct, weight)
    overall = _weights.ratio(jnp.sum(correct, axis=-1, keepdims=True), total)
    miss = _weights.ratio(jnp.sum(weight - correct, axis=-1, keepdims=True), total)
    score = jnp.sum(_weights.ratio(squared_error, total), axis=-1)
    gap = _weights.ratio(confidence - correct, weight)
    parts = (
        jnp.sum(share * jnp.square(gap), axis=-1),
        jnp.sum(share * jnp.square(accuracy - overall), axis=-1),
        jnp.squeeze(overall * miss, -1),
    )
    return BrierDecomposition(score, *parts, score - (parts[0] - parts[1] + parts[2]))


@_checks.public()
def fit_temperature(
    logits: Float[Array, "*shape K"],
    labels: Integer[Array, "*shape"],
    *,
    weights: Real[Array, "*shape"] | Bool[Array, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Temperature T that minimises the mean negative log-likelihood of softmax(logits / T).

    The loss is convex in b = 1 / T, and its gradient is P - N. P is the mean excess of the expected logit over the
    label's from the classes above the label. N is the mean lack of it from those below. Newton's method on log(P / N)
    finds the zero. That function is nearly linear in b where a few wrong examples oppose many right ones. The steps are
    kept inside a bracket, and their number is fixed.

    Args:
      logits: unnormalised log-probabilities in any floating dtype, classes last, of examples that were not trained on;
        -inf marks an impossible class.
      labels: integer classes in [0, K), in the logits' shape without the last axis.
      weights: one weight per example, not negative, in the labels' shape; a mask is one. None weighs all the same.

    Returns:
      T > 0, one number, at least float32, for `categorical.softmax(logits, temperature=T)`. A loss without a minimum
      gives its limit:

      - T = 0 if every label has the largest logit of its row: more certainty is always better there. Use more held-out
        examples then, or a bound such as `jnp.maximum(T, 0.05)`, since logits / 0 is NaN.
      - T = inf if the mean label's logit is no more than the mean logit. The logits then tell nothing of the labels, or
        the wrong way round.
      - T = inf if an impossible class has occurred.
      - T = 1 if it changes nothing: no weight, one class, or logits that are equal in each row.
      - T = NaN if a weight is negative. T = NaN if a row is NaN or without a possible class, or a label is outside
        [0, K); these do not count with a weight of 0.

      The relative error is at most `(16 + R / T) u` times `P / (b |dP/db - dN/db|)`, plus that of the sums over
      examples. The factor is the loss's own sensitivity to rounding. The gradients in logits and weights are those of
      the minimum, and 0 if T is a limit or NaN.

    Raises:
      ValueError: as for `reliability`.

    Source: Guo et al. (2017), On Calibration of Modern Neural Networks; Platt (1999).

    >>> logits = 3 * jnp.log(jnp.array([[0.75, 0.25]] * 4))
    >>> print(f"{fit_temperature(logits, jnp.array([0, 0, 0, 1])):.4f}")
    3.0000
    """
    return _placement.automatic(_fit_temperature, logits, labels, weights)


def _fit_temperature(logits, labels, weights):
    z, y, w = _examples("fit_temperature", logits, labels, weights)
    return _temperature(z, w, y) if z.size else jnp.ones((), z.dtype)


@jax.custom_jvp
def _temperature(z, w, y):
    """The T > 0 at which the gradient of the loss in 1 / T is 0, or the limit."""
    counted = (w != 0)[:, None]
    gap = jnp.where(counted, _accurate.shifted(z, 1), 0)
    valid = (y >= 0) & (y < z.shape[1])
    possible = gap > -jnp.inf
    no_row = jnp.any(jnp.isnan(gap), axis=1) | ~jnp.any(possible, axis=1)
    unknown = counted & (no_row | ~valid | jnp.isnan(w))[:, None]
    label = jnp.where(valid, y, 0)[:, None]
    surprised = ~jnp.take_along_axis(possible, label, axis=1)
    gap = jnp.where(possible, gap, 0)
    scale = jnp.max(-gap)
    gap = gap / jnp.where(scale > 0, scale, 1)
    label_gap = jnp.take_along_axis(gap, label, axis=1)
    excess = jnp.where(possible, gap - label_gap, 0)
    share = w / jnp.where(jnp.max(w) > 0, jnp.max(w), 1)
    share = share / jnp.maximum(1, jnp.sum(share))

    def slopes(b):
        """P, N and their derivatives at 1 / T = b, in units of `scale`."""
        p = _accurate.softmax(jnp.where(possible, b * gap, -jnp.inf), 1)
        dp = p * (gap - jnp.sum(p * gap, axis=1, keepdims=True))
        sides = jnp.maximum(excess, 0), jnp.maximum(-excess, 0)
        return [jnp.sum(share * jnp.sum(factor * side, axis=1)) for factor in (p, dp) for side in sides]

    def step(_, state):
        low, high, b, older, last = state
        above, below, d_above, d_below = slopes(b)
        low, high = jnp.where(above < below, b, low), jnp.where(above < below, high, b)
        newton = b - jnp.log(above / below) / (d_above / above - d_below / below)
        moved = jnp.abs(newton - b)
        # Rounding alone may lead out of the bracket by a digit, at the end.
        done = moved <= 8 * jnp.finfo(z.dtype).eps * b
        fair = (newton > low) & (newton < high) & (moved <= older / 2)
        after = jnp.where(done | fair, newton, jnp.sqrt(low) * jnp.sqrt(high))
        return low, high, after, last, jnp.abs(after - b)

    above, below, *_ = slopes(jnp.zeros((), z.dtype))
    wrong = jnp.sum(share * -label_gap[:, 0])
    # The bracket. No variance of gaps up to 1 is above 1/4, so that P - N rises at most that fast. N <=
    # (K - 1) / (e b), since x e^(-b x) is at most 1 / (e b). P is at least wrong / K.
    tiny, classes = jnp.finfo(z.dtype).tiny, z.shape[1]
    low = jnp.maximum(4 * (below - above) * (1 - 2**-10), tiny)
    high = jnp.maximum(classes * (classes - 1) / (math.e * jnp.maximum(wrong, tiny)) * (1 + 2**-10), low)
    never = jnp.full_like(low, jnp.inf)
    _, _, b, _, _ = jax.lax.fori_loop(0, _STEPS, step, (low, high, jnp.clip(scale, low, high), never, never))
    temperature = jnp.where(above >= below, jnp.inf, scale / b)
    temperature = jnp.where(wrong == 0, 0, temperature)
    temperature = jnp.where(scale == 0, 1, temperature)
    temperature = jnp.where(jnp.any(surprised), jnp.inf, temperature)
    return jnp.where(jnp.any(unknown), jnp.nan, temperature)


@partial(_temperature.defjvp, symbolic_zeros=True)
def _temperature_jvp(primals, tangents):
    """The gradient g = sum_i w_i g_i, g_i = <p, z> - z_y, stays 0 as the minimum moves.

    `dT / T = (sum_i g_i dw_i + w_i sum_k (p_k - y_k + b p_k (z_k - <p, z>)) dz_k) / (b c)`
    with p = softmax(b z), b = 1 / T and c = sum_i w_i var_i.
    """
    (z, w, y), (dz, dw, _) = primals, tangents
    temperature = _temperature(z, w, y)
    inside = (temperature > 0) & (temperature < jnp.inf)
    label = jax.nn.one_hot(y, z.shape[1], dtype=z.dtype)
    x = _accurate.shifted(z, 1)
    # A row that makes T infinite or NaN, had it any weight, has no gradient.
    counts = ~jnp.any(jnp.isnan(x) | ((label > 0) & (x == -jnp.inf)), axis=1, keepdims=True)
    possible = x > -jnp.inf
    x = jnp.where(possible & counts, x, 0)
    scale = jax.lax.stop_gradient(jnp.max(jnp.where((w != 0)[:, None], -x, 0), initial=0))
    scale = jnp.where(scale > 0, scale, 1)
    x, b = x / scale, scale / jnp.where(inside, temperature, scale)
    p = _accurate.softmax(jnp.where(possible | ~counts, b * x, -jnp.inf), 1)
    centred = x - jnp.sum(p * x, axis=1, keepdims=True)
    curvature = jnp.sum(w * jnp.sum(p * jnp.square(centred), axis=1))
    inside &= curvature > 0
    moved = jnp.zeros_like(temperature)
    if type(dw) is not SymbolicZero:
        moved -= jnp.sum(jnp.sum(label * centred, axis=1) * dw)
    if type(dz) is not SymbolicZero:
        moved += jnp.sum(jnp.where(counts, w[:, None], 0) * (p - label + b * p * centred) * dz) / scale
    factor = temperature / (b * jnp.where(inside, curvature, 1))
    return temperature, jnp.where(inside, factor, 0) * moved


def _examples(function, logits, labels, weights):
    """Logits [n, K], labels [n] and weights [n] to compute with, checked."""
    _checks.class_axis(function, logits, -1)
    shape, classes = logits.shape[:-1], logits.shape[-1]
    labels = _checks.classes(function, "labels", labels, "logits without the last axis", shape)
    w = _checks.weights(function, "logits without the last axis", shape, weights)
    dtype = _accurate.compute_dtype(logits, w)
    _checks.in_range(function, "label", labels, classes, w != 0)
    return logits.astype(dtype).reshape(-1, classes), labels.ravel(), w.ravel().astype(dtype)


def _checked(function, table):
    """The table in the dtype computed in."""
    if not isinstance(table, Reliability):
        raise ValueError(f"{function}: table must be a Reliability, got {_checks.describe(table)}")
    _checks.floating(function, **table._asdict())
    for name, value in table._asdict().items():
        _checks.same_shape(function, "table.weight", f"table.{name}", table.weight.shape, value)
    if table.weight.ndim == 0 or table.weight.shape[-1] == 0:
        raise ValueError(f"{function}: expected at least one bin, got table.weight {_checks.describe(table.weight)}")
    _checks.expect(table.weight >= 0, table.weight, f"{function}: weight {{value}} is negative")
    dtype = _accurate.compute_dtype(*table)
    return Reliability(*(value.astype(dtype) for value in table))
