"""The categorical distribution: one of K classes, given by K logits.

Logits are unnormalised log-probabilities: any real numbers z with p_i = exp(z_i) / sum_j exp(z_j), and -inf for an
impossible class. Only their differences count. Log-probabilities are logits too, so `jnp.log(probs)` is the way in from
probabilities, and `log_softmax` of `log_softmax` changes nothing.

The functions, by what they compute:

- `softmax` and `log_softmax`: the probabilities and their logarithms.
- `cross_entropy`: the negative log-probability -log p_y of an observed class y, which is the loss of maximum
  likelihood. Its gradient is p - y.
- `brier_score`: the squared error of the probabilities, a loss that saturates.
- `entropy`: the mean negative log-probability under p itself.
- `kl_divergence`: the excess of q, an approximation, over that of p, the reference. Cross-entropy of p and q = entropy
  of p + KL(p || q).

Every function takes one example or any batch of them, and returns one value per example. Only the class axis is
reduced. Computed in float32 at least (float64 where an input has it).

Accuracy: u is half the spacing at 1 of that dtype (2**-24 for float32). R is the largest gap between finite logits of a
row. Values and gradient entries have a relative error of at most (16 + R) u for up to 1000 classes. The bound holds at
any confidence, unless a function states another one. More classes add log2(K) u for the sum. An entry may be a
difference: p_i - t_i of a soft target, q_i - p_i of two distributions. Its error is relative to the larger of the two,
or of what they lack to 1. Probabilities and their products below the smallest normal number may be flushed to 0. So may
a value that they alone make up.

One exception: XLA on CPU (jax 0.10 to 0.12) adds up a batch of exactly one row, [1, K], less accurately. The error
grows with K, measured up to 500 u at K = 100 000. Affected are entropies, divergences, Brier scores and soft targets.
The same row as [K], or two of them, keep the bound.

Corner cases, the same in all functions:

- A logit of -inf makes its class impossible. A row of nothing else is no distribution, and gives NaN.
- A class that `where` removes is a class that is not there: its probability is 0, its log-probability -inf, and target
  mass on it is removed too. A row without any class left is an empty sum: 0.
- A NaN among the logits gives NaN in that row alone. A logit of +inf is not supported, and gives NaN in its row too.
- A value may be NaN (a label outside [0, K)) or inf (an impossible label), but its gradient is finite: that of the
  finite part, or 0. So `jnp.where(mask, loss, 0)` is safe for any labels, and for masked logits that are finite or
  -inf.

Under `jprob.checkify` each function says which of its expectations the data break.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Integer, Key, Real

from . import _accurate, _categorical, _checks, _placement


@_checks.public(static=("axis",), temperature=_checks.NOT_NEGATIVE)
def softmax(
    logits: Float[Array, "*shape"],
    *,
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
    temperature: float | Real[Array, "*#shape"] = 1.0,
) -> Float[Array, "*shape"]:
    """Softmax: the probabilities p_i = exp(z_i / T) / sum_j exp(z_j / T).

    Args:
      logits: z, unnormalised log-probabilities in any floating dtype; -inf marks an impossible class.
      axis: the class axis.
      where: classes that exist, broadcast to the logits' shape. Any other has probability 0.
      temperature: T >= 0, a number or an array. An array broadcasts to the logits' shape, with length 1 on the class
        axis. T = 1 gives the distribution itself. T = 0 gives its mode, shared by classes that tie, with a gradient of
        0. T = inf gives the uniform distribution over the possible classes. A negative T in an array gives NaN. The
        gradient in T is that of 0 < T < inf; it needs R / T^2 to be a finite number of the dtype.

    Returns:
      An array of the logits' shape and dtype whose sum over `axis` is 1. An impossible class has 0, however far apart
      the others are. Relative error at most (16 + 3 R / T) u and one rounding to the dtype; (16 + R) u at T = 1.

    Raises:
      ValueError: the logits are not floating-point, `axis` is out of range, or `where` or `temperature` does not
        broadcast; or `temperature` is a negative Python number.

    >>> print(softmax(jnp.log(jnp.array([1.0, 2.0, 1.0]))))
    [0.25 0.5  0.25]
    >>> print(softmax(jnp.array([1.0, 3.0, 3.0]), temperature=0.0))
    [0.  0.5 0.5]
    """
    z, axis, where, cold = _tempered_logits("softmax", logits, axis, where, temperature)
    return _existing(_accurate.softmax(z, axis) + cold, where, 0).astype(logits.dtype)


@_checks.public(static=("axis",), temperature=_checks.NOT_NEGATIVE)
def log_softmax(
    logits: Float[Array, "*shape"],
    *,
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
    temperature: float | Real[Array, "*#shape"] = 1.0,
) -> Float[Array, "*shape"]:
    """Log-probabilities log p_i = z_i / T - log sum_j exp(z_j / T): the normalised logits.

    Args:
      logits: z, unnormalised log-probabilities in any floating dtype; -inf marks an impossible class.
      axis: the class axis.
      where: classes that exist, broadcast to the logits' shape. Any other has log-probability -inf, with a
        gradient of 0.
      temperature: T >= 0, as in `softmax`.

    Returns:
      An array of the logits' shape and dtype, at most 0, and -inf for an impossible class. The most probable class
      keeps its digits too: -2.06e-9 at a margin of 20. Relative error at most (16 + 3 R / T) u, as for `softmax`.

    Raises:
      ValueError: as for `softmax`.

    >>> print(log_softmax(jnp.array([20.0, 0.0])))
    [-2.0611537e-09 -2.0000000e+01]
    """
    z, axis, where, cold = _tempered_logits("log_softmax", logits, axis, where, temperature)
    return _existing(_accurate.log_softmax(z, axis) + cold, where, -jnp.inf).astype(logits.dtype)


@_checks.public(static=("axis",), label_smoothing=_checks.UNIT_INTERVAL)
def cross_entropy(
    logits: Float[Array, "*shape"],
    labels: Integer[Array, "*rest"] | Float[Array, "*shape"],
    *,
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
    label_smoothing: float | Real[Array, ""] = 0.0,
) -> Float[Array, "*rest"]:
    """Cross-entropy -sum_i y_i log p_i of labels y and p = softmax(logits); for a class y it is -log p_y.

    Its mean over independent examples is their negative log-likelihood per example. The gradient in the logits is
    p - y, for targets that sum to 1. No entry of it is rounded to 0: at a margin of 20 the true class gets -2.06e-9.
    The gradient in target y_i is -log p_i, and 0 for an impossible class.

    Args:
      logits: z, unnormalised log-probabilities in any floating dtype; -inf marks an impossible class.
      labels: integer classes in [0, K), in the logits' shape without `axis`; or a target distribution over the classes,
        floating-point, in the logits' shape.
      axis: the class axis; it is summed away.
      where: classes that exist, broadcast to the logits' shape. Any other has probability 0, and target mass on it is
        removed: an integer label there gives 0 with a gradient of 0.
      label_smoothing: e in [0, 1], one number. The target becomes (1 - e) y + e / K over the K possible classes.

    Returns:
      One value per example in nats, at least float32, never negative: inf where a target has an impossible class (the
      gradient stays p - y); NaN with a gradient of 0 for an integer label outside [0, K) or a NaN target. A target of 0
      does not count: an impossible class costs nothing there. Relative error at most (16 + R) u; of a gradient entry
      too, as far as p and the target differ.

    Raises:
      ValueError: a dtype, a shape, `axis`, `where` or `label_smoothing` is not as above.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, 4.3.4; label smoothing: Szegedy et al. (2016).

    >>> logits = jnp.array([[20.0, 0.0], [0.0, 20.0]])
    >>> print(cross_entropy(logits, jnp.array([0, 0])))
    [2.0611537e-09 2.0000000e+01]
    >>> print(jax.grad(lambda z: cross_entropy(z, jnp.array(0)))(logits[0]))
    [-2.0611537e-09  2.0611537e-09]
    """
    z, labels, valid, axis, where = _labelled("cross_entropy", logits, labels, axis, where)
    loss = _categorical.target_loss(z, labels, axis) if valid is None else _categorical.class_loss(z, labels, axis)
    if valid is not None and where is not None:
        kept = _placement.entries(where, labels, axis)
        loss = jnp.where(kept, loss, 0)
    if not (isinstance(label_smoothing, float) and label_smoothing == 0):
        e = _checks.number("cross_entropy", "label_smoothing", label_smoothing, _checks.UNIT_INTERVAL, z.dtype)
        uniform = _categorical.uniform_loss(z, axis)
        loss = _accurate.multiply_no_nan(1 - e, loss) + _accurate.multiply_no_nan(e, uniform)
    return _per_example(loss, axis, where, valid)


@_checks.public(static=("axis",))
def brier_score(
    logits: Float[Array, "*shape"],
    labels: Integer[Array, "*rest"] | Float[Array, "*shape"],
    *,
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
) -> Float[Array, "*rest"]:
    """Brier score sum_i (p_i - y_i)^2 of p = softmax(logits): the squared error of the probabilities.

    The sum over classes as Brier wrote it, in [0, 2]: twice the "half squared error", and K times a mean over classes.
    The gradient in the logits is 2 p_i (e_i - sum_j p_j e_j) with e = p - y. The gradient decays as exp(-margin) where
    the prediction is confidently wrong. Plain differentiation gives rounding there, and then 0; this gradient is
    accurate.

    Args:
      logits: z, unnormalised log-probabilities in any floating dtype; -inf marks an impossible class.
      labels: integer classes in [0, K), in the logits' shape without `axis`; or a target distribution over the classes,
        floating-point, in the logits' shape.
      axis: the class axis; it is summed away.
      where: classes that exist, broadcast to the logits' shape. Any other has probability 0, and target mass on it is
        removed: an integer label there gives the sum of p_i^2.

    Returns:
      One value per example, at least float32, in [0, 2]; NaN with a gradient of 0 where an integer label is outside
      [0, K) or a target is NaN. For a class as label the value has a relative error of at most (24 + 2 R) u. A gradient
      entry has (24 + 3 R) u of the sum of its terms |e_i - e_j| p_i p_j; each of these products has its own R u. For a
      target distribution both are relative to these terms with p + t for |e|.

    Raises:
      ValueError: a dtype, a shape, `axis` or `where` is not as above.

    Source: Brier (1950), Monthly Weather Review 78(1).

    >>> print(brier_score(jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.array(0)))
    0.375
    """
    z, labels, valid, axis, where = _labelled("brier_score", logits, labels, axis, where)
    if valid is not None:
        labels = _existing(_categorical.is_class(z, labels, axis).astype(z.dtype), where, 0)
    return _per_example(_categorical.squared_error(z, labels, axis), axis, where, valid)


@_checks.public(static=("axis", "base"))
def entropy(
    logits: Float[Array, "*shape"],
    *,
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
    base: float | None = None,
) -> Float[Array, "*rest"]:
    """Shannon entropy H = -sum_i p_i log p_i of p = softmax(logits).

    Args:
      logits: z, unnormalised log-probabilities in any floating dtype; -inf marks an impossible class.
      axis: the class axis; it is summed away.
      where: classes that exist, broadcast to the logits' shape. Any other has probability 0.
      base: unit of the result, static: None for nats, 2 for bits.

    Returns:
      One value per example, at least float32, never negative: 0 where one class has all the probability, log K where
      all K are equal. Relative error at most (16 + R) u. The gradient is p_i (H + log p_i) up to sign; its error is
      relative to the sum of its terms.

    Raises:
      ValueError: the logits are not floating-point, `axis` is out of range, `where` does not broadcast, or `base` is
        not above 1.

    Source: Cover and Thomas (2006), Elements of Information Theory, 2.1.

    >>> print(entropy(jnp.zeros(8), base=2))
    3.0
    """
    unit = _checks.nats_to("entropy", base)
    z, axis, where = _canonical("entropy", logits, axis, where)
    return _per_example(_categorical.entropy(z, axis), axis, where) * unit


@_checks.public(static=("axis", "base"))
def kl_divergence(
    p_logits: Float[Array, "*shape"],
    q_logits: Float[Array, "*shape"],
    *,
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
    base: float | None = None,
) -> Float[Array, "*rest"]:
    """Kullback-Leibler divergence KL(p || q) = sum_i p_i log(p_i / q_i), p and q the softmax of their logits.

    Args:
      p_logits: logits of p, the reference; -inf marks an impossible class.
      q_logits: logits of q, the approximation, in the same shape.
      axis: the class axis; it is summed away.
      where: classes that exist, broadcast to the logits' shape. Any other has probability 0 under both.
      base: unit of the result, static: None for nats, 2 for bits.

    Returns:
      One value per pair, at least float32, never negative: 0 where p = q, also where their logits differ by a
      constant; inf where q has probability 0 for a class that p has not. The divergence keeps its digits where p and q
      nearly agree: a difference of 1e-6 in the logits is a divergence near 1e-13 of full relative accuracy. Relative
      error at most (16 + R) u, R over both. Gradients: q - p in q's logits, p_i (log(p_i / q_i) - KL) in p's, each
      adding up to 0. The error of the latter is relative to p_i times the largest |log(p_j / q_j) - KL|. An infinite
      divergence has the gradient 0 in p's logits.

    Raises:
      ValueError: a dtype, `axis`, `where` or `base` is not as above, or the shapes differ.

    Source: Kullback and Leibler (1951), Annals of Mathematical Statistics 22(1). The form is the Bregman divergence of
    the log-normaliser (Banerjee et al., 2005, JMLR 6).

    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{kl_divergence(p, q, base=2):.4f} bits")
    0.2075 bits
    """
    unit = _checks.nats_to("kl_divergence", base)
    p, q, axis, where = _canonical_pair("kl_divergence", axis, where, p_logits=p_logits, q_logits=q_logits)
    return _per_example(_categorical.kl_divergence(p, q, axis), axis, where) * unit


@_checks.public(static=("axis", "base"), weight=_checks.UNIT_INTERVAL)
def js_divergence(
    p_logits: Float[Array, "*shape"],
    q_logits: Float[Array, "*shape"],
    *,
    weight: float | Real[Array, ""] = 0.5,
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
    base: float | None = None,
) -> Float[Array, "*rest"]:
    """Jensen-Shannon divergence `w KL(p || m) + (1 - w) KL(q || m)` with `m = w p + (1 - w) q`.

    JS is finite where KL is not. JS with w = 1/2 is symmetric, and its square root is a metric. JS / w tends to
    KL(p || q) as w falls to 0. JS / (1 - w) tends to KL(q || p) as w rises to 1.

    Args:
      p_logits: logits of p; -inf marks an impossible class.
      q_logits: logits of q, in the same shape.
      weight: w in [0, 1], one number, traced. A derivative takes it for a constant.
      axis: the class axis; it is summed away.
      where: classes that exist, broadcast to the logits' shape. Any other has probability 0 under both.
      base: unit of the result, static: None for nats, 2 for bits.

    Returns:
      One value per pair, at least float32, in `[0, -w log w - (1 - w) log(1 - w)]`. The lower end is for p = q. The
      upper end, ln 2 nats for w = 1/2, is for p and q that share no class. A traced weight outside [0, 1] gives NaN.
      The divergence keeps its digits where p and q nearly agree. Relative error at most (16 + R) u, R over both. The
      error of a gradient entry is relative to the largest of its terms w p_i log(p_i / m_i).

    Raises:
      ValueError: as for `kl_divergence`, or `weight` is not as above.

    Source: Lin (1991), IEEE Transactions on Information Theory 37(1). The weight is the beta of Agarwal et al. (2024),
    On-Policy Distillation of Language Models.

    >>> p, q = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.5, 0.5]))
    >>> print(f"{js_divergence(p, q, base=2):.4f} bits")
    0.3113 bits
    """
    unit = _checks.nats_to("js_divergence", base)
    p, q, axis, where = _canonical_pair("js_divergence", axis, where, p_logits=p_logits, q_logits=q_logits)
    weight = _checks.number("js_divergence", "weight", weight, _checks.UNIT_INTERVAL, p.dtype)
    return _per_example(_categorical.js_divergence(p, q, jax.lax.stop_gradient(weight), axis), axis, where) * unit


@_checks.public(static=("axis",), temperature=_checks.FINITE_POSITIVE)
def distillation_loss(
    student_logits: Float[Array, "*shape"],
    teacher_logits: Float[Array, "*shape"],
    *,
    temperature: float | Real[Array, ""],
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
) -> Float[Array, "*rest"]:
    """Distillation loss T^2 KL(teacher_T || student_T), both distributions tempered by T.

    The factor T^2 keeps the gradient's size: it tends to (z_student - z_teacher) / K, both centred, as T grows.

    Args:
      student_logits: logits of the model that learns, in any floating dtype; -inf marks an impossible class.
      teacher_logits: logits of the model that teaches, in the same shape.
      temperature: T, one number with 0 < T < inf. Another one in an array gives NaN.
      axis: the class axis; it is summed away.
      where: classes that exist, broadcast to the logits' shape. Any other has probability 0 under both.

    Returns:
      One value per example in nats, at least float32, never negative; inf where the student excludes a class that the
      teacher does not. Relative error at most (16 + R / T) u, if the logits divided by T are exact. A T that is a power
      of 2 keeps them exact. Otherwise their rounding counts once they differ by less than R.

    Raises:
      ValueError: `temperature` is not one number, is a Python number outside (0, inf), or as for `kl_divergence`.

    Source: Hinton, Vinyals and Dean (2015), Distilling the Knowledge in a Neural Network.

    >>> teacher, student = jnp.array([2.0, 0.0]), jnp.array([0.0, 0.0])
    >>> print(f"{distillation_loss(student, teacher, temperature=2.0):.4f}")
    0.4438
    """
    name, logits = "distillation_loss", {"student_logits": student_logits, "teacher_logits": teacher_logits}
    student, teacher, axis, where = _canonical_pair(name, axis, where, **logits)
    given = _checks.number(name, "temperature", temperature, _checks.FINITE_POSITIVE, student.dtype)
    t = jnp.where(jnp.isnan(given), 1, given)  # a NaN here would be one of all gradients
    # One of the two is 1. A quotient by the other would leave the range for huge logits.
    below, above = jnp.minimum(t, 1), jnp.maximum(t, 1)
    scaled = [z / above for z in (teacher, student)]
    teacher, student = ((z - _categorical.top_and_shift(z, axis, below)[1]) / below for z in scaled)
    loss = _per_example(_categorical.kl_divergence(teacher, student, axis), axis, where)
    return _accurate.nan_unless(given > 0, loss * jnp.square(t))


@_checks.public(static=("axis",))
def log_prob(
    labels: Integer[Array, "*rest"],
    logits: Float[Array, "*shape"],
    *,
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
) -> Float[Array, "*rest"]:
    """Log-probability log p_y of the class y, p = softmax(logits): minus the `cross_entropy` of y.

    Args:
      labels: y, integer classes in [0, K), in the logits' shape without `axis`.
      logits: unnormalised log-probabilities in any floating dtype; -inf marks an impossible class.
      axis: the class axis.
      where: classes that exist, broadcast to the logits' shape. Any other has log-probability -inf, with a gradient of
        0.

    Returns:
      One value per example in nats, at least float32, at most 0: -inf for an impossible class, NaN with a gradient of 0
      for a label outside [0, K). Relative error at most (16 + R) u; of a gradient entry too.

    Raises:
      ValueError: the labels are not integers, or as for `cross_entropy`.

    >>> print(log_prob(jnp.array(1), jnp.log(jnp.array([0.75, 0.25]))))
    -1.3862944
    """
    if not _checks.holds(labels, jnp.integer):
        raise ValueError(f"log_prob: labels must be integer classes, got {_checks.describe(labels)}")
    z, labels, valid, axis, where = _labelled("log_prob", logits, labels, axis, where)
    there = None if where is None else _placement.entries(where, labels, axis)
    return _per_example(_existing(-_categorical.class_loss(z, labels, axis), there, -jnp.inf), axis, None, valid)


@_checks.public(static=("axis",))
def mode(
    logits: Float[Array, "*shape"], *, axis: int = -1, where: Bool[Array, "*#shape"] | None = None
) -> Int[Array, "*rest"]:
    """Mode: the most probable class; of several, the first.

    Args:
      logits: unnormalised log-probabilities in any floating dtype.
      axis: the class axis; it is reduced away.
      where: classes that exist, broadcast to the logits' shape. No other is chosen, unless none exists.

    Returns:
      One class per example, of dtype int32: an index, which no rounding (no u) enters. If a logit is NaN, its index.

    Raises:
      ValueError: as for `softmax`.

    >>> print(mode(jnp.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])))
    [1 0]
    """
    z, axis, _ = _canonical("mode", logits, axis, where)
    return jax.lax.argmax(z, axis, jnp.int32)


@_checks.public(static=("axis", "shape"), temperature=_checks.NOT_NEGATIVE)
def sample(
    key: Key[Array, ""],
    logits: Float[Array, "*shape"],
    *,
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
    temperature: float | Real[Array, "*#shape"] = 1.0,
    shape: tuple[int, ...] | None = None,
) -> Int[Array, "*sample"]:
    """Draws classes with the probabilities softmax(logits / T), as the arg-max of logits plus Gumbel noise.

    Args:
      key: a random key.
      logits: unnormalised log-probabilities in any floating dtype; -inf marks an impossible class.
      axis: the class axis; it is reduced away.
      where: classes that exist, broadcast to the logits' shape. No other is drawn, unless none exists.
      temperature: T >= 0, as in `softmax`: 0 draws the mode (any of several that tie), inf any possible class. A
        negative T in an array draws -1, which is no class: every loss of it is NaN.
      shape: of the result, static: it ends in the logits' shape without `axis`, which is the default.

    Returns:
      Independent draws, int32. The noise has the full resolution of the dtype computed in: classes rarer than u are
      drawn as often as they should be.

    Raises:
      ValueError: `shape` does not end in the logits' shape without `axis`, or as for `softmax`.

    Source: Gumbel (1954); Maddison, Tarlow and Minka (2014).

    >>> draws = sample(jax.random.key(0), jnp.log(jnp.array([0.25, 0.75])), shape=(10_000,))
    >>> print(f"{jnp.mean(draws):.2f}")
    0.75
    """
    z, axis, _, undrawn = _tempered_logits("sample", logits, axis, where, temperature)
    shape = _checks.sample_shape("sample", shape, z.shape[:axis] + z.shape[axis + 1 :], "logits without the class axis")
    z = _accurate.shifted(z, axis)  # next to a large logit the noise would be rounded away
    draws = jax.random.categorical(key, z, axis - z.ndim, shape, mode="high").astype(jnp.int32)
    undrawn = jnp.broadcast_to(jnp.isnan(undrawn), (*z.shape[:axis], 1, *z.shape[axis + 1 :]))
    return jnp.where(jnp.broadcast_to(jnp.squeeze(undrawn, axis), shape), -1, draws)


def _canonical(function, logits, axis, where, *computed_with):
    """Logits to compute with (checked, masked, in the dtype computed in), the axis from the front, `where` in full.

    A row that `where` leaves without a class gets logits of 0: it is computed as any other, and then left out.
    """
    axis = _checks.class_axis(function, logits, axis)
    z = logits.astype(_accurate.compute_dtype(logits, *computed_with))
    if where is None:
        return z, axis, None
    _checks.mask(function, where, logits)
    where = jnp.broadcast_to(where, z.shape)
    return jnp.where(where, z, jnp.where(jnp.any(where, axis=axis, keepdims=True), -jnp.inf, 0)), axis, where


def _existing(out, where, without):
    """`out` of the classes that exist; any other has the value `without`, and a gradient of 0."""
    return out if where is None else jnp.where(where, out, without)


def _per_example(out, axis, where, valid=None):
    """`out` without the class axis: NaN where not `valid`, and 0 where no class exists, both with a gradient of 0."""
    if valid is not None:
        # A select last: otherwise XLA on CPU computes the losses within the sum of their mean, one by one.
        out = jnp.where(valid, out, _accurate.nan_unless(valid, out))
    if where is not None:
        out = jnp.where(jnp.any(where, axis=axis, keepdims=True), out, 0)
    return jnp.squeeze(out, axis)


def _canonical_pair(function, axis, where, **logits):
    """Two rows of logits over the same classes, in one dtype, the axis from the front, `where` in full."""
    (p_name, p), (q_name, q) = logits.items()
    _checks.floating(function, **logits)
    _checks.same_shape(function, p_name, q_name, p.shape, q)
    p, front, where_p = _canonical(function, p, axis, where, q)
    q, _, _ = _canonical(function, q, axis, where, p)
    return p, q, front, where_p


def _tempered_logits(function, logits, axis, where, temperature):
    """As `_canonical`, divided by T, and 0; NaN for each row with a T that is negative or NaN."""
    if isinstance(temperature, float) and temperature == 1:
        z, axis, where = _canonical(function, logits, axis, where)
        return z, axis, where, jnp.zeros((), z.dtype)
    temperature = jnp.asarray(temperature)
    if not jnp.issubdtype(temperature.dtype, jnp.integer):
        _checks.floating(function, temperature=temperature)
    z, axis, where = _canonical(function, logits, axis, where, temperature)
    _checks.broadcasts(function, "temperature", temperature, z)
    if temperature.ndim >= z.ndim - axis and temperature.shape[axis - z.ndim] != 1 and z.shape[axis] != 1:
        got = _checks.describe(temperature)
        raise ValueError(f"{function}: temperature must have length 1 on the class axis {axis} of logits, got {got}")
    _checks.expect(temperature >= 0, temperature, f"{function}: temperature {{value}} is negative")
    temperature = temperature.astype(z.dtype).reshape((1,) * (z.ndim - temperature.ndim) + temperature.shape)
    cold = _accurate.nan_unless(temperature >= 0, jnp.zeros((), z.dtype))
    return _categorical.tempered(z, axis, temperature), axis, where, cold


def _labelled(function, logits, labels, axis, where):
    """Logits, labels, whether each label is valid, axis and `where`.

    Integer labels get a class axis of length 1; one that is not valid is 0 instead. Target distributions have the dtype
    computed in, no mass on a class that does not exist, and None for `valid`.
    """
    if _checks.holds(labels, jnp.floating):
        z, axis, where = _canonical(function, logits, axis, where, labels)
        _checks.same_shape(function, "logits", "floating-point labels", logits.shape, labels)
        _checks.targets_are_probs(function, labels, axis)
        return z, _existing(labels.astype(z.dtype), where, 0), None, axis, where
    if not _checks.holds(labels, jnp.integer):
        raise ValueError(f"{function}: labels must be integer or floating-point, got {_checks.describe(labels)}")
    z, axis, where = _canonical(function, logits, axis, where)
    expected = logits.shape[:axis] + logits.shape[axis + 1 :]
    labels = _checks.classes(function, "labels", labels, "logits without the class axis", expected)
    valid = _checks.in_range(function, "label", labels, logits.shape[axis])
    labels, valid = (jnp.expand_dims(x, axis) for x in (labels, valid))
    return z, jnp.where(valid, labels, 0), valid, axis, where
