"""The categorical whose logits are hidden @ kernel: a softmax over a vocabulary, without the logits in memory.

The last layer of a language model makes V logits of each token's H numbers. The N x V logits are the largest array of a
training step. These functions give what `categorical` gives for `hidden @ kernel + bias`, with the same bounds. They
work on a block of tokens at a time: the logits of the block are made, reduced and forgotten. A block is the unit of
memory, set by `block_bytes` (see `plan`). There is no loop if all the logits fit into one block. Blocks change no
result beyond the order of the sum over tokens in the kernel's gradient.

The logits are z = cap(hidden @ kernel + bias) / T. A `softcap` c makes cap(x) = c tanh(x / c); otherwise cap(x) = x.
Products and sums are accumulated in float32 at least (float64 where an operand has it). A gradient is cast to its
operand's dtype once, at the end. The errors are those of `categorical`: u = 2**-24 for float32, and R is the largest
gap between the logits of a token. They are errors of the logits as computed: the product is rounded as any product of
matrices. A gradient keeps its digits through a softcap too, however saturated a logit is. The largest 2 |x| / c adds to
its R.

A number among the options (`softcap`, `temperature`, `label_smoothing`, `z_loss`) is traced. A new value compiles
nothing. An array of one number may be annealed in a `scan` or swept by `vmap`. Each number is cast to the dtype
computed in, and a constant to a derivative. A Python number outside its range is a ValueError; a traced one gives NaN.

A token that a mask takes out of the result has no gradient, for any label and a finite hidden. Use `weights` if a
masked hidden may be NaN or inf. A label out of range gives NaN, and an impossible class may give inf; the gradient of
either is finite. A logit of +inf gives NaN.

`cross_entropy` alone reduces over tokens, since that saves a product. Its sum is one number: the gradients of hidden
and kernel come out of the pass that makes the loss. That takes 3 products instead of 4. Give it all tokens at once. A
`lax.map` or `scan` that is differentiated as a whole would keep a kernel's gradient for each turn. Take the gradient
inside of it, or wrap the call in `jax.checkpoint`. Do not `vmap` the loss over examples.

Operands that are sharded under the compiler need nothing. A block takes its tokens from all over the batch, so every
device has its share of each. Inside `shard_map`, `axis_name` is the mesh axis over which the vocabulary is sharded.
Each device then makes the logits of its classes, and sends out a few numbers per token. Classes that only fill up
the last devices get a bias of -inf, and are ignored. Take gradients outside `shard_map`, or inside of one that checks
what varies (`check_vma=True`, the default). Without that check jax transposes a psum to another psum, and gradients
taken inside are wrong.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Integer, Key, Real

from . import _accurate, _blocks, _categorical, _checks, _linear_categorical, _placement, _vocabulary, _weights
from ._blocks import Plan as Plan

_REDUCTIONS = ("mean", "sum", "none")
_FORM = ("transposed_kernel", "block_bytes", "axis_name")
_CAP = {"softcap": _checks.FINITE_POSITIVE, "temperature": _checks.FINITE_POSITIVE}
_LOSS = {"label_smoothing": _checks.UNIT_INTERVAL, "z_loss": _checks.FINITE_NOT_NEGATIVE}
_MIXTURE = {"weight": _checks.UNIT_INTERVAL}


class Aux(NamedTuple):
    """The values per token that `cross_entropy` returns next to the loss; all but `correct` are differentiable.

    Attributes:
      nll: the cross-entropy without smoothing, z-loss or weight; 0 for a token of weight 0.
      logsumexp: the logarithm of the normaliser, log sum_j exp(z_j); 0 for a token of weight 0.
      correct: whether the label, or the mode of the target distribution, is the mode (of classes that tie, the first);
        False for a token of weight 0.
      weight: one number, the sum of the weights.
    """

    nll: Float[Array, "*tokens"]
    logsumexp: Float[Array, "*tokens"]
    correct: Bool[Array, "*tokens"]
    weight: Float[Array, ""]


@_checks.public(static=(*_FORM, "reduction", "has_aux"), **_CAP, **_LOSS)
def cross_entropy(
    hidden: Float[Array, "*tokens H"],
    kernel: Float[Array, "_ _"],
    labels: Integer[Array, "*tokens"] | Float[Array, "*tokens _"],
    *,
    bias: Float[Array, "_"] | None = None,
    weights: Real[Array, "*tokens"] | Bool[Array, "*tokens"] | None = None,
    label_smoothing: float | Real[Array, ""] = 0.0,
    z_loss: float | Real[Array, ""] = 0.0,
    softcap: float | Real[Array, ""] | None = None,
    temperature: float | Real[Array, ""] = 1.0,
    transposed_kernel: bool = False,
    reduction: str = "mean",
    has_aux: bool = False,
    block_bytes: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Aux]:
    """Cross-entropy -log p_y of labels y, or -sum_i y_i log p_i of target distributions y, reduced over tokens.

    p = softmax(z) are the probabilities of the classes.

    Value and gradients of a reduced loss take 3 products of the size of hidden @ kernel. The value alone takes 1. The
    backward pass makes the logits again for the reduction "none", and for the gradients of what `has_aux` adds.

    Args:
      hidden: [..., H], one vector a token, in any floating dtype.
      kernel: [H, V], whose columns are the classes.
      labels: y, integer classes in [0, V), in the shape [...] of the tokens. Or floating-point target distributions
        [..., V], which a derivative takes for constants.
      bias: [V], added to the logits; -inf marks an impossible class, with any softcap.
      weights: [...], one weight per token, not negative; a mask is one. A token of weight 0 is ignored, even if its
        hidden is NaN or its label is -1. It adds nothing to any value or gradient; that in its weight is 0 too.
      label_smoothing: e in [0, 1]. The target becomes (1 - e) y + e / V, V the number of possible classes. Only a bias
        marks an impossible class here: without one, all classes count, also if the kernel holds -inf.
      z_loss: a finite number of at least 0. Adds z_loss * logsumexp(z)^2 per token, which keeps the normaliser near 1.
      softcap: c, with 0 < c < inf: logits are limited to [-c, c] by c tanh(x / c). None for no limit.
      temperature: T, with 0 < T < inf.
      transposed_kernel: static; whether the kernel is [V, H], as a table of embeddings is. The kernel is not copied.
      reduction: static: "mean" (divided by the sum of the weights), "sum", or "none" (each loss times its weight).
      has_aux: static; whether to return `Aux` too.
      block_bytes: static, bytes of a block of logits: 64 MiB by default, or 512 tokens if that is more.
      axis_name: static; the mesh axis of an enclosing `shard_map`, over which the classes are sharded. The parts of
        kernel, bias and targets are equal; a bias of -inf fills up the last. Labels count through all classes. Hidden,
        labels, weights and the result are the same on the whole axis.

    Returns:
      The loss in nats, at least float32: one number, or one per token for "none"; the pair (loss, Aux) with `has_aux`.
      The loss is 0 with a gradient of 0 where no token has a weight; NaN for a label outside [0, V), with the gradient
      of the other tokens; inf for an impossible class, with a gradient of p - y. Each token's loss is a sum of terms
      that are not negative. Relative error at most (16 + R) u of each term; V classes add log2(V) u for their sum. The
      same holds for a gradient entry in z, as far as p and the target differ.

    Raises:
      ValueError: a dtype, a shape or an option is not as above.

    Source: Wijmans et al. (2025), Cut Your Losses in Large-Vocabulary Language Models; z-loss: Chowdhery et al. (2022).

    >>> hidden, kernel = jnp.array([[20.0, 0.0], [0.0, 20.0]]), jnp.eye(2)
    >>> print(cross_entropy(hidden, kernel, jnp.array([0, 0]), reduction="none"))
    [2.0611537e-09 2.0000000e+01]
    >>> loss, aux = cross_entropy(hidden, kernel, jnp.array([0, -1]), weights=jnp.array([1, 0]), has_aux=True)
    >>> print(loss, aux.correct[0], aux.weight)
    2.0611537e-09 True 1.0
    """
    name = "cross_entropy"
    form = _form(name, transposed_kernel, block_bytes, axis_name, has_aux)._replace(has_bias=bias is not None)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, got {reduction!r}")
    _check_operands(name, form, hidden, kernel, bias)
    if weights is not None:
        weights = _checks.weights(name, "hidden without its last axis", hidden.shape[:-1], weights)
    if _checks.holds(labels, jnp.floating):
        labels, inside = _targets(name, form, hidden, kernel, labels, weights)
    else:
        labels, inside = _labels(name, form, hidden, kernel, labels, weights)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap, "temperature": temperature}
    numbers = _numbers(name, _blocks.dtype_of(hidden, kernel, bias, weights, labels), **options)
    return _placed(partial(_cross_entropy, form, reduction), [hidden, kernel, bias], numbers, labels, inside, weights)


@_checks.public(static=_FORM, **_CAP)
def log_prob(
    labels: Integer[Array, "*tokens"],
    hidden: Float[Array, "*tokens H"],
    kernel: Float[Array, "_ _"],
    *,
    bias: Float[Array, "_"] | None = None,
    softcap: float | Real[Array, ""] | None = None,
    temperature: float | Real[Array, ""] = 1.0,
    transposed_kernel: bool = False,
    block_bytes: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*tokens"]:
    """Log-probability log p_y of each token's class y, p = softmax(z).

    Args:
      labels: y, integer classes in [0, V), in the shape [...] of the tokens.
      hidden: [..., H], one vector a token, in any floating dtype.
      kernel: [H, V], whose columns are the classes.
      bias: [V], added to the logits; -inf marks an impossible class.
      softcap: as in `cross_entropy`.
      temperature: T, with 0 < T < inf.
      transposed_kernel: static; whether the kernel is [V, H].
      block_bytes: static, as in `cross_entropy`.
      axis_name: static, as in `cross_entropy`.

    Returns:
      One value per token in nats, at least float32, at most 0: -inf for an impossible class; NaN for a label outside
      [0, V), with a gradient of 0. Relative error at most (16 + R) u; of a gradient entry in z too.

    Raises:
      ValueError: a dtype, a shape or an option is not as above.

    >>> print(log_prob(jnp.array([1]), jnp.array([[1.0]]), jnp.log(jnp.array([[0.75, 0.25]]))))
    [-1.3862944]
    """
    form = _form("log_prob", transposed_kernel, block_bytes, axis_name)
    _check_operands("log_prob", form, hidden, kernel, bias)
    labels, inside = _labels("log_prob", form, hidden, kernel, labels)
    numbers = _numbers("log_prob", _blocks.dtype_of(hidden, kernel, bias), softcap=softcap, temperature=temperature)

    def rows(z, labels, inside):
        return _accurate.nan_unless(inside, -_vocabulary.nll_terms(z, labels[:, None], form.axis)[0][:, 0])

    return _placed(partial(_blocks.per_token, rows, form), [(hidden, kernel, bias)], numbers, labels, inside)


@_checks.public(static=_FORM, **_CAP)
def log_prob_and_entropy(
    labels: Integer[Array, "*tokens"],
    hidden: Float[Array, "*tokens H"],
    kernel: Float[Array, "_ _"],
    *,
    bias: Float[Array, "_"] | None = None,
    softcap: float | Real[Array, ""] | None = None,
    temperature: float | Real[Array, ""] = 1.0,
    transposed_kernel: bool = False,
    block_bytes: int | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """`log_prob` and `entropy` of the same logits, which are made once: a policy gradient with an entropy bonus.

    Args:
      labels: y, integer classes in [0, V), in the shape [...] of the tokens.
      hidden: [..., H], one vector a token, in any floating dtype.
      kernel: [H, V], whose columns are the classes.
      bias: [V], added to the logits; -inf marks an impossible class.
      softcap: as in `cross_entropy`.
      temperature: T, with 0 < T < inf.
      transposed_kernel: static; whether the kernel is [V, H].
      block_bytes: static, as in `cross_entropy`.
      axis_name: static, as in `cross_entropy`.

    Returns:
      The pair (log_prob, entropy), each one value per token in nats, at least float32. The ranges are those of the two
      functions. Relative error at most (16 + R) u.

    Raises:
      ValueError: a dtype, a shape or an option is not as above.

    >>> log_p, entropy = log_prob_and_entropy(jnp.array([1]), jnp.ones((1, 1)), jnp.log(jnp.array([[0.5, 0.5]])))
    >>> print(log_p, entropy)
    [-0.6931472] [0.6931472]
    """
    name = "log_prob_and_entropy"
    form = _form(name, transposed_kernel, block_bytes, axis_name)
    _check_operands(name, form, hidden, kernel, bias)
    labels, inside = _labels(name, form, hidden, kernel, labels)
    numbers = _numbers(name, _blocks.dtype_of(hidden, kernel, bias), softcap=softcap, temperature=temperature)

    def rows(z, labels, inside):
        log_prob = -_vocabulary.nll_terms(z, labels[:, None], form.axis)[0][:, 0]
        return _accurate.nan_unless(inside, log_prob), _categorical.entropy(z, form.axis)[:, 0]

    return _placed(partial(_blocks.per_token, rows, form), [(hidden, kernel, bias)], numbers, labels, inside)


@_checks.public(static=(*_FORM, "base"), **_CAP)
def entropy(
    hidden: Float[Array, "*tokens H"],
    kernel: Float[Array, "_ _"],
    *,
    bias: Float[Array, "_"] | None = None,
    base: float | None = None,
    softcap: float | Real[Array, ""] | None = None,
    temperature: float | Real[Array, ""] = 1.0,
    transposed_kernel: bool = False,
    block_bytes: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*tokens"]:
    """Shannon entropy H = -sum_i p_i log p_i of each token's p = softmax(z).

    Args:
      hidden: [..., H], one vector a token, in any floating dtype.
      kernel: [H, V], whose columns are the classes.
      bias: [V], added to the logits; -inf marks an impossible class.
      base: unit of the result, static: None for nats, 2 for bits.
      softcap: as in `cross_entropy`.
      temperature: T, with 0 < T < inf.
      transposed_kernel: static; whether the kernel is [V, H].
      block_bytes: static, as in `cross_entropy`.
      axis_name: static, as in `cross_entropy`.

    Returns:
      One value per token, at least float32, never negative. Relative error at most (16 + R) u, as for
      `categorical.entropy`: log V, where all logits are equal, may be exceeded by that.

    Raises:
      ValueError: a dtype, a shape or an option is not as above.

    >>> print(entropy(jnp.ones((2, 3)), jnp.zeros((3, 8)), base=2))
    [3. 3.]
    """
    unit = _checks.nats_to("entropy", base)
    form = _form("entropy", transposed_kernel, block_bytes, axis_name)
    _check_operands("entropy", form, hidden, kernel, bias)
    numbers = _numbers("entropy", _blocks.dtype_of(hidden, kernel, bias), softcap=softcap, temperature=temperature)

    def rows(z):
        return _categorical.entropy(z, form.axis)[:, 0] * unit

    return _placed(partial(_blocks.per_token, rows, form), [(hidden, kernel, bias)], numbers)


@_checks.public(static=(*_FORM, "base"), **_CAP)
def kl_divergence(
    p_hidden: Float[Array, "*tokens P"],
    p_kernel: Float[Array, "_ _"],
    q_hidden: Float[Array, "*tokens Q"],
    q_kernel: Float[Array, "_ _"],
    *,
    p_bias: Float[Array, "_"] | None = None,
    q_bias: Float[Array, "_"] | None = None,
    base: float | None = None,
    softcap: float | Real[Array, ""] | None = None,
    temperature: float | Real[Array, ""] = 1.0,
    transposed_kernel: bool = False,
    block_bytes: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*tokens"]:
    """Kullback-Leibler divergence KL(p || q) = sum_i p_i log(p_i / q_i) of each token's distributions.

    Args:
      p_hidden: [..., P], one vector a token, of p, the reference.
      p_kernel: [P, V], whose columns are the classes.
      q_hidden: [..., Q], the same tokens, of q, the approximation.
      q_kernel: [Q, V], the same classes.
      p_bias: [V], added to the logits of p; -inf marks an impossible class.
      q_bias: [V], added to the logits of q.
      base: unit of the result, static: None for nats, 2 for bits.
      softcap: as in `cross_entropy`, for both.
      temperature: T, with 0 < T < inf, for both.
      transposed_kernel: static; whether both kernels are [V, H].
      block_bytes: static, as in `cross_entropy`, for the logits of both together.
      axis_name: static, as in `cross_entropy`: both kernels are sharded alike.

    Returns:
      One value per token, at least float32, never negative: 0 where p = q, inf where q excludes a class that p does
      not. Relative error at most (16 + R) u of the logits as computed, as for `categorical.kl_divergence`.

    Raises:
      ValueError: a dtype, a shape or an option is not as above.

    >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
    >>> print(f"{kl_divergence(jnp.ones((1, 1)), p, jnp.ones((1, 1)), q)[0]:.4f}")
    0.5108
    """
    unit = _checks.nats_to("kl_divergence", base)
    form = _form("kl_divergence", transposed_kernel, block_bytes, axis_name)
    sides = _two_sides("kl_divergence", form, "pq", (p_hidden, p_kernel, p_bias), (q_hidden, q_kernel, q_bias))
    numbers = _numbers(
        "kl_divergence", _blocks.dtype_of(*sides[0], *sides[1]), softcap=softcap, temperature=temperature
    )

    return (
        _placed(partial(_blocks.per_token, partial(_linear_categorical.divergence, form), form), sides, numbers) * unit
    )


@_checks.public(static=(*_FORM, "base"), **_CAP, **_MIXTURE)
def js_divergence(
    p_hidden: Float[Array, "*tokens P"],
    p_kernel: Float[Array, "_ _"],
    q_hidden: Float[Array, "*tokens Q"],
    q_kernel: Float[Array, "_ _"],
    *,
    weight: float | Real[Array, ""] = 0.5,
    p_bias: Float[Array, "_"] | None = None,
    q_bias: Float[Array, "_"] | None = None,
    base: float | None = None,
    softcap: float | Real[Array, ""] | None = None,
    temperature: float | Real[Array, ""] = 1.0,
    transposed_kernel: bool = False,
    block_bytes: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*tokens"]:
    """Jensen-Shannon divergence `w KL(p || m) + (1 - w) KL(q || m)` of each token, with `m = w p + (1 - w) q`.

    Use it to distil on the student's own samples: the weight leads from forward to reverse KL. JS with w = 1/2 is
    symmetric, as `categorical.js_divergence` says.

    Args:
      p_hidden: [..., P], one vector a token, of the first distribution.
      p_kernel: [P, V], whose columns are the classes.
      q_hidden: [..., Q], the same tokens, of the second distribution.
      q_kernel: [Q, V], the same classes.
      weight: w in [0, 1].
      p_bias: [V], added to the logits of p; -inf marks an impossible class.
      q_bias: [V], added to the logits of q.
      base: unit of the result, static: None for nats, 2 for bits.
      softcap: as in `cross_entropy`, for both.
      temperature: T, with 0 < T < inf, for both.
      transposed_kernel: static; whether both kernels are [V, H].
      block_bytes: static, as in `cross_entropy`, for the logits of both together.
      axis_name: static, as in `cross_entropy`: both kernels are sharded alike.

    Returns:
      One value per token, at least float32, in `[0, -w log w - (1 - w) log(1 - w)]`. The divergence is 0 where p = q,
      and finite where one of them excludes a class. Relative error at most (16 + R) u of the logits as computed.

    Raises:
      ValueError: a dtype, a shape or an option is not as above.

    Source: Agarwal et al. (2024), On-Policy Distillation of Language Models.

    >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
    >>> print(f"{js_divergence(jnp.ones((1, 1)), p, jnp.ones((1, 1)), q)[0]:.4f}")
    0.1017
    """
    name = "js_divergence"
    unit = _checks.nats_to(name, base)
    form = _form(name, transposed_kernel, block_bytes, axis_name)
    sides = _two_sides(name, form, "pq", (p_hidden, p_kernel, p_bias), (q_hidden, q_kernel, q_bias))
    options = {"softcap": softcap, "temperature": temperature, "weight": jnp.asarray(weight)}
    numbers = _numbers(name, _blocks.dtype_of(*sides[0], *sides[1]), **options)

    def divergence(sides, numbers):
        rows = lambda p, q: _categorical.js_divergence(p, q, numbers.weight, form.axis)[:, 0]  # noqa: E731
        return _blocks.per_token(rows, form, sides, numbers)

    return _placed(divergence, sides, numbers) * unit


@_checks.public(static=_FORM, **_CAP)
def distillation_loss(
    student_hidden: Float[Array, "*tokens S"],
    student_kernel: Float[Array, "_ _"],
    teacher_hidden: Float[Array, "*tokens T"] | None = None,
    teacher_kernel: Float[Array, "_ _"] | None = None,
    *,
    temperature: float | Real[Array, ""],
    top_log_probs: Float[Array, "*tokens k"] | None = None,
    top_indices: Integer[Array, "*tokens k"] | None = None,
    student_bias: Float[Array, "_"] | None = None,
    teacher_bias: Float[Array, "_"] | None = None,
    softcap: float | Real[Array, ""] | None = None,
    transposed_kernel: bool = False,
    block_bytes: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*tokens"]:
    """Distillation loss T^2 KL(teacher_T || student_T) of each token, both distributions tempered by T.

    The teacher is given as hidden and kernel, or as its k most probable classes and their log-probabilities. The
    teacher in the second form is normalised over these k classes. The loss is then the divergence within them, plus
    -log of the student's total probability of them: two terms that are not negative.

    Args:
      student_hidden: [..., S], one vector a token, of the model that learns.
      student_kernel: [S, V], whose columns are the classes.
      teacher_hidden: [..., T], the same tokens, of the model that teaches; or None.
      teacher_kernel: [T, V], the same classes; or None.
      temperature: T, with 0 < T < inf.
      top_log_probs: [..., k], log-probabilities (or logits) of the teacher, where it has no hidden and kernel.
      top_indices: [..., k], their classes, integers in [0, V), no two of a token the same.
      student_bias: [V], added to the student's logits; -inf marks an impossible class.
      teacher_bias: [V], added to the teacher's logits.
      softcap: as in `cross_entropy`, for the logits of both, before T divides them.
      transposed_kernel: static; whether both kernels are [V, H].
      block_bytes: static, as in `cross_entropy`, for the logits of both together.
      axis_name: static, as in `cross_entropy`: both kernels are sharded alike, and indices count through all classes.

    Returns:
      One value per token in nats, at least float32, never negative; inf where the student excludes a class that the
      teacher does not; NaN for an index outside [0, V), with a gradient of 0. Relative error at most (16 + R / T) u of
      the logits as computed, as for `categorical.distillation_loss`; in the second form of each of its terms.

    Raises:
      ValueError: a dtype, a shape or an option is not as above; or the teacher is not given in one of the two ways.

    Source: Hinton, Vinyals and Dean (2015), Distilling the Knowledge in a Neural Network.

    >>> teacher, student = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 0.0]])
    >>> print(distillation_loss(student, jnp.eye(2), teacher, jnp.eye(2), temperature=2.0))
    [0.44377...]
    >>> top = {"top_log_probs": teacher, "top_indices": jnp.array([[0, 1]])}
    >>> print(distillation_loss(student, jnp.eye(2), temperature=2.0, **top))
    [0.44377...]
    """
    name = "distillation_loss"
    form = _form(name, transposed_kernel, block_bytes, axis_name)
    student, teacher = (student_hidden, student_kernel, student_bias), (teacher_hidden, teacher_kernel, teacher_bias)
    by_top = top_log_probs is not None or top_indices is not None
    if teacher_hidden is not None and teacher_kernel is not None and not by_top:
        sides, top = _two_sides(name, form, ("student", "teacher"), student, teacher), ()
        rows = partial(_linear_categorical.divergence, reverse=True)
    elif top_log_probs is not None and top_indices is not None and all(x is None for x in teacher):
        _check_operands(name, form, *student, "student_")
        sides, rows = [student], _linear_categorical.top_divergence
        top = (top_log_probs, *_check_top(form, student_hidden, student_kernel, top_log_probs, top_indices))
    else:
        names = "teacher_hidden", "teacher_kernel", "teacher_bias", "top_log_probs", "top_indices"
        got = [name for name, x in zip(names, (*teacher, top_log_probs, top_indices), strict=True) if x is not None]
        expected = "either teacher_hidden and teacher_kernel or top_log_probs and top_indices"
        raise ValueError(f"{name}: expected {expected}, got {', '.join(got) or 'none of them'}")
    dtype = _blocks.dtype_of(*student, *teacher)
    numbers = _numbers(name, dtype, softcap=softcap, temperature=jnp.asarray(temperature))

    def loss(sides, numbers, *top):
        t = numbers.temperature
        top = [x.astype(dtype) / t for x in top[:1]] + [*top[1:]]
        return _blocks.per_token(partial(rows, form), form, sides, numbers, *top) * jnp.square(t)

    return _placed(loss, sides, numbers, *top)


@_checks.public(static=_FORM)
def mode(
    hidden: Float[Array, "*tokens H"],
    kernel: Float[Array, "_ _"],
    *,
    bias: Float[Array, "_"] | None = None,
    transposed_kernel: bool = False,
    block_bytes: int | None = None,
    axis_name: str | None = None,
) -> Int[Array, "*tokens"]:
    """Mode: the most probable class of each token; of several, the first.

    Args:
      hidden: [..., H], one vector a token, in any floating dtype.
      kernel: [H, V], whose columns are the classes. No temperature or softcap changes their order.
      bias: [V], added to the logits; -inf marks an impossible class.
      transposed_kernel: static; whether the kernel is [V, H].
      block_bytes: static, as in `cross_entropy`.
      axis_name: static, as in `cross_entropy`. The result counts through all classes.

    Returns:
      One class per token, of dtype int32: an index, which no rounding (no u) enters beyond that of the logits.

    Raises:
      ValueError: a dtype or a shape is not as above.

    >>> print(mode(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])))
    [1 0]
    """
    form = _form("mode", transposed_kernel, block_bytes, axis_name)
    _check_operands("mode", form, hidden, kernel, bias)

    def rows(z):
        return _vocabulary.mode(z, form.axis)[:, 0]

    return _placed(partial(_blocks.per_token, rows, form), [(hidden, kernel, bias)], _blocks.Numbers())


@_checks.public(static=_FORM, softcap=_checks.FINITE_POSITIVE, temperature=_checks.NOT_NEGATIVE)
def sample(
    key: Key[Array, ""],
    hidden: Float[Array, "*tokens H"],
    kernel: Float[Array, "_ _"],
    *,
    bias: Float[Array, "_"] | None = None,
    softcap: float | Real[Array, ""] | None = None,
    temperature: float | Real[Array, ""] = 1.0,
    transposed_kernel: bool = False,
    block_bytes: int | None = None,
    axis_name: str | None = None,
) -> Int[Array, "*tokens"]:
    """Draws one class per token with the probabilities softmax(z), as the arg-max of logits plus Gumbel noise.

    Args:
      key: a random key. A token's key is made of this one and the token's number. Every 128 classes have a key made of
        the token's key and their number. So neither blocks nor a sharded vocabulary change the draw. This needs
        threefry keys, the usual ones; rbg draws otherwise in each block. If `shard_map` shards the tokens, each device
        counts its own from 0: give each device another key.
      hidden: [..., H], one vector a token, in any floating dtype.
      kernel: [H, V], whose columns are the classes.
      bias: [V], added to the logits; -inf marks an impossible class.
      softcap: as in `cross_entropy`.
      temperature: T >= 0: 0 draws the mode (any of several that tie), inf any possible class. A traced T that is
        negative draws -1.
      transposed_kernel: static; whether the kernel is [V, H].
      block_bytes: static, as in `cross_entropy`.
      axis_name: static, as in `cross_entropy`. The result counts through all classes.

    Returns:
      Independent draws, of dtype int32. The noise has the full resolution of the dtype computed in: classes rarer than
      u are drawn as often as they should be. The noise takes the memory of 8 blocks next to that of the logits.

    Raises:
      ValueError: a dtype, a shape or an option is not as above.

    Source: Gumbel (1954); Maddison, Tarlow and Minka (2014).

    >>> draws = sample(jax.random.key(1), jnp.ones((10_000, 1)), jnp.log(jnp.array([[0.25, 0.75]])))
    >>> print(f"{jnp.mean(draws):.2f}")
    0.75
    """
    form = _form("sample", transposed_kernel, block_bytes, axis_name)
    _check_operands("sample", form, hidden, kernel, bias)
    dtype = _blocks.dtype_of(hidden, kernel, bias)
    temperature = _checks.number("sample", "temperature", temperature, _checks.NOT_NEGATIVE, dtype)
    numbers = _numbers("sample", dtype, softcap=softcap)._replace(temperature=temperature)
    number = jnp.arange(math.prod(hidden.shape[:-1]), dtype=jnp.uint32).reshape(hidden.shape[:-1])

    def draw(sides, numbers, number, key):
        def rows(z, number):
            noise = _vocabulary.noise(_vocabulary.folded(key, number), z, form.axis)
            return _vocabulary.mode(_categorical.tempered(z, form.axis, numbers.temperature) + noise, form.axis)[:, 0]

        return _blocks.per_token(rows, form, sides, numbers._replace(temperature=None), number)

    return _placed(draw, [(hidden, kernel, bias)], numbers, number, key)


def plan(
    hidden: Float[Array, "*tokens H"] | jax.ShapeDtypeStruct,
    kernel: Float[Array, "_ _"] | jax.ShapeDtypeStruct,
    *,
    transposed_kernel: bool = False,
    block_bytes: int | None = None,
) -> Plan:
    """The blocks in which `cross_entropy` would go through these tokens: nothing is computed.

    A block has the largest number of tokens whose logits keep to `block_bytes`. Somewhat fewer are taken if these
    divide all tokens evenly. The default is 64 MiB, or 512 tokens if that is more. Each block adds to the kernel's
    gradient, and smaller ones would spend their time reading and writing it. Gradients of the functions per token make
    the logits of each block again. A single block of all tokens saves them that.

    Args:
      hidden: [..., H], an array or a `jax.ShapeDtypeStruct`.
      kernel: [H, V], an array or a `jax.ShapeDtypeStruct`.
      transposed_kernel: whether the kernel is [V, H].
      block_bytes: bytes of a block of logits; None for the default.

    Returns:
      A `Plan` of integers, the same for every dtype that is computed in float32: no rounding (no u) enters.

    Raises:
      ValueError: the shapes do not fit, or `block_bytes` is not a positive integer.

    >>> hidden, kernel = jax.ShapeDtypeStruct((8, 512, 512), "bfloat16"), jax.ShapeDtypeStruct((512, 32_000), "float32")
    >>> plan(hidden, kernel)
    Plan(blocks=8, block_size=512, remainder=0, bytes=65536000)
    """
    form = _form("plan", transposed_kernel, block_bytes)
    _check_operands("plan", form, hidden, kernel, None)
    return _blocks.plan(form, hidden, kernel, _blocks.dtype_of(hidden, kernel))


def _form(function, transposed, block_bytes, axis_name=None, has_aux=False) -> _blocks.Form:
    for name, value in {"transposed_kernel": transposed, "has_aux": has_aux}.items():
        if not isinstance(value, bool):
            raise ValueError(f"{function}: {name} must be True or False, got {value!r}")
    if block_bytes is not None and (type(block_bytes) is not int or block_bytes <= 0):
        raise ValueError(f"{function}: block_bytes must be a positive integer, got {block_bytes!r}")
    form = _blocks.Form(transposed, block_bytes, has_aux=has_aux)
    if axis_name is None:
        return form
    try:
        jax.lax.axis_size(axis_name)
    except (NameError, TypeError, ValueError):
        raise ValueError(f"{function}: axis_name must be an axis of an outer shard_map, got {axis_name!r}") from None
    return form._replace(axis=_accurate.Sharded(1, axis_name))


def _numbers(function, dtype, **options) -> _blocks.Numbers:
    """Constants to a derivative. A default, which `public` never traces, becomes None."""
    defaults = {"softcap": None, "temperature": 1, "label_smoothing": 0, "z_loss": 0, "weight": None}
    kept = {name: x for name, x in options.items() if hasattr(x, "dtype") or x != defaults[name]}
    ranges = _CAP | _LOSS | _MIXTURE
    numbers = {name: _checks.number(function, name, x, ranges[name], dtype) for name, x in kept.items()}
    return jax.lax.stop_gradient(_blocks.Numbers(**numbers))


def _check_operands(function, form, hidden, kernel, bias, side=""):
    _checks.floating(function, **{f"{side}hidden": hidden, f"{side}kernel": kernel})
    if hidden.ndim < 1 or kernel.ndim != 2 or kernel.shape[int(form.transposed)] != hidden.shape[-1]:
        expected = f"[{'V, H' if form.transposed else 'H, V'}] with {side}hidden [..., H]"
        got = f"{_checks.describe(kernel)} with {_checks.describe(hidden)}"
        raise ValueError(f"{function}: {side}kernel must be {expected}, got {got}")
    num_classes = _blocks.num_classes(form, kernel)
    if num_classes == 0:
        raise ValueError(f"{function}: expected at least one class, got {side}kernel {_checks.describe(kernel)}")
    if bias is not None:
        _checks.floating(function, **{f"{side}bias": bias})
        _checks.same_shape(function, f"the classes of {side}kernel", f"{side}bias", (num_classes,), bias)


def _two_sides(function, form, names, first, second):
    for side, (hidden, kernel, bias) in zip(names, (first, second), strict=True):
        _check_operands(function, form, hidden, kernel, bias, f"{side}_")
    (one, other), (tokens, others) = names, (list(side[0].shape[:-1]) for side in (first, second))
    if tokens != others:
        raise ValueError(f"{function}: {other}_hidden must have the tokens {tokens} of {one}_hidden, got {others}")
    classes = [_blocks.num_classes(form, operands[1]) for operands in (first, second)]
    if classes[0] != classes[1]:
        raise ValueError(f"{function}: both kernels must have the same classes, got {classes[0]} and {classes[1]}")
    return [first, second]


def _size_of_vocabulary(form, kernel):
    return _blocks.num_classes(form, kernel) * _vocabulary.shards(form.axis)


def _labels(function, form, hidden, kernel, labels, weights=None):
    """Labels in range, 0 for any other, and which of them were."""
    labels = _checks.classes(function, "labels", labels, "hidden without its last axis", hidden.shape[:-1])
    counted = True if weights is None else weights != 0
    inside = _checks.in_range(
        function, "label", labels, _blocks.num_classes(form, kernel) * _vocabulary.shards(form.axis), counted
    )
    return jnp.where(inside, labels, 0), inside


def _targets(function, form, hidden, kernel, targets, weights):
    """Target distributions as constants, all of which are in range."""
    shape = (*hidden.shape[:-1], _blocks.num_classes(form, kernel))
    if targets.shape != shape:
        expected = f"the shape {list(shape)} of the logits"
        raise ValueError(f"{function}: floating-point labels must have {expected}, got {_checks.describe(targets)}")
    if isinstance(form.axis, int):  # no shard knows the sum
        unused = jnp.zeros(shape[:-1], bool) if weights is None else weights == 0
        _checks.targets_are_probs(function, jnp.where(unused[..., None], 1 / shape[-1], targets), -1)
    return jax.lax.stop_gradient(targets), jnp.ones(shape[:-1], bool)


def _check_top(form, hidden, kernel, log_probs, indices):
    name = "distillation_loss"
    _checks.floating(name, top_log_probs=log_probs)
    if log_probs.ndim == 0 or log_probs.shape[:-1] != hidden.shape[:-1] or log_probs.shape[-1] == 0:
        expected = f"the shape {[*hidden.shape[:-1], 'k']}"
        raise ValueError(f"{name}: top_log_probs must have {expected}, got {_checks.describe(log_probs)}")
    indices = _checks.classes(name, "top_indices", indices, "top_log_probs", log_probs.shape)
    inside = _checks.in_range(
        name, "top_indices", indices, _blocks.num_classes(form, kernel) * _vocabulary.shards(form.axis)
    )
    ordered = jnp.sort(indices, axis=-1)
    message = f"{name}: top_indices has class {{value}} twice for one token"
    _checks.expect(ordered[..., 1:] != ordered[..., :-1], ordered[..., 1:], message)
    return jnp.where(inside, indices, 0), jnp.all(inside, axis=-1)


def _placed(function, sides, numbers, *operands) -> Any:
    """`function(sides, numbers, *operands)`, whose results are sharded as the tokens of the first operand are.

    A number out of its range is replaced by 1, so that no gradient meets its NaN. The results are NaN, or -1 for draws.
    """
    given, spec = jax.tree.leaves(numbers), _placement.spec(jax.tree.leaves(sides)[0])[:-1]
    usable = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), 1, x), numbers)
    out = _placement.automatic(function, sides, usable, *operands, spec=spec)
    if not given:
        return out
    ok = ~jnp.isnan(sum(given))
    nan_unless = {"f": partial(_accurate.nan_unless, ok), "i": lambda x: jnp.where(ok, x, -1)}
    return jax.tree.map(lambda x: nan_unless.get(x.dtype.kind, lambda x: x)(x), out)


def _cross_entropy(form: _blocks.Form, reduction, operands, numbers, labels, inside, weights):
    hidden, kernel, bias = operands
    tokens = hidden.shape[:-1]
    dtype = _blocks.dtype_of(hidden, kernel, bias, weights, labels)
    w = jnp.ones(tokens, dtype) if weights is None else weights.astype(dtype)
    if weights is not None:
        w = _linear_categorical.counted(w, w)  # its gradient is 0 where it is 0
        hidden = jnp.where((w == 0)[..., None], 0, hidden)
    total, known = jnp.sum(w), inside | (w == 0)
    if reduction == "none":
        loss, *aux = _linear_categorical.losses(form, numbers, hidden, kernel, bias, labels, dtype)
        loss = _accurate.nan_unless(known, _accurate.multiply_no_nan(w, _linear_categorical.counted(w, loss)))
    else:
        # Shares of the weight, not a quotient of two sums: so the gradients leave the loop as they are returned.
        share = jnp.where(inside, _weights.ratio(w, total) if reduction == "mean" else w, 0)
        rows = [x.reshape(-1, *x.shape[len(tokens) :]) for x in (hidden, labels, share)]
        flat = (rows[0], kernel, bias, *rows[1:])
        loss, aux = _linear_categorical.weighted_sum(form, numbers, *flat)
        loss += _accurate.nan_unless(jnp.all(known), jnp.zeros_like(loss))
        aux = [x.reshape(tokens) for x in aux]
    if not form.has_aux:
        return loss
    nll, logsumexp, correct = (_linear_categorical.counted(w, x) for x in aux)
    return loss, Aux(_accurate.nan_unless(known, nll), logsumexp, (correct == 1) & inside, total)
