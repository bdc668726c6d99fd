"""The multivariate normal distribution of D real numbers, given by its mean `loc` and a Cholesky factor `scale_tril`.

A draw is loc + L z, with L = scale_tril lower triangular and z independent standard normal numbers. So L L^T is the
covariance. L is to D dimensions what a standard deviation is to one: its diagonal is positive, and its entries have the
unit of x. L is never squared: the covariance of a standard deviation of 1e-30 does not exist in float32. `scale_tril`
makes it from a covariance, a precision (the inverse of one), or the standard deviations alone.

The last axis of loc holds the dimensions, the last two of scale_tril. A loc of one number serves all dimensions. Axes
before these broadcast as in `gaussian`, and a factor that a batch shares is never copied. Entries of scale_tril above
the diagonal are not read. A factor with a diagonal that is not positive gives NaN, with gradient 0. Computed in float32
at least (float64 where an input has it); u is half the spacing at 1 of that dtype. k is the condition number of L for
the substitution, max_i (|L^-1| |L| 1)_i: 1 for a diagonal L, however different its scales.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Key, Real

from . import _accurate, _checks, _placement, _weights, gaussian

_Loc = float | Float[Array, "*#batch #D"] | Real[Array, ""]  # one number may serve all dimensions


class Parameters(NamedTuple):
    """The parameters of a multivariate normal."""

    loc: Array  # mean
    scale_tril: Array  # lower Cholesky factor of the covariance


@_checks.public()
def log_prob(
    x: Float[Array, "*#batch D"], loc: _Loc, scale_tril: Float[Array, "*#batch D D"]
) -> Float[Array, "*batch"]:
    """Log-density `-|r|^2 / 2 - sum_i log L_ii - D log(2 pi) / 2` with r = L^-1 (x - loc).

    Args:
      x: where to evaluate, floating-point.
      loc: mean, in the unit of x.
      scale_tril: L, lower triangular with a positive diagonal, in the unit of x.

    Returns:
      One log-density per example in nats, at least float32; NaN for a diagonal that is not positive. Error at most
      (8 + 4 D k) u of the sum of the magnitudes of the terms.

    Raises:
      ValueError: an argument is not floating-point, the dimensions differ, or the batches do not broadcast.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, 2.3.

    >>> print(f"{log_prob(jnp.zeros(2), jnp.zeros(2), jnp.eye(2)):.4f}")
    -1.8379
    """
    given = _canonical("log_prob", {"x": x, "loc": loc}, {"scale_tril": scale_tril})
    return _mapped(_log_prob, "(d),(d),(d,d)->()", *given)


def _log_prob(x, loc, scale_tril):
    lower, ok = _usable(scale_tril)
    r, far = _standardised(lower, x - loc)
    # A sum of univariate log-densities of standard numbers; the scales enter by their logarithms alone.
    return _accurate.nan_unless(ok, jnp.sum(gaussian.log_prob(r) - jnp.log(_placement.diagonal(lower))) - far)


@_checks.public()
def entropy(scale_tril: Float[Array, "*batch D D"]) -> Float[Array, "*batch"]:
    """Differential entropy sum_i log L_ii + D (1 + log(2 pi)) / 2, in nats.

    Args:
      scale_tril: L, lower triangular with a positive diagonal.

    Returns:
      One value per matrix, at least float32, of either sign; NaN for a diagonal that is not positive. Error at most
      (4 + log2 D) u of the sum of |log L_ii| + 1.42.

    Raises:
      ValueError: the matrix is not floating-point, or not square.

    Source: Cover and Thomas (2006), Elements of Information Theory, 8.4.

    >>> print(f"{entropy(jnp.eye(2)):.4f}")
    2.8379
    """
    (scale_tril,) = _canonical("entropy", {}, {"scale_tril": scale_tril})
    return _mapped(_entropy, "(d,d)->()", scale_tril)


def _entropy(scale_tril):
    lower, ok = _usable(scale_tril)
    return _accurate.nan_unless(ok, jnp.sum(gaussian.entropy(_placement.diagonal(lower))))


@_checks.public()
def kl_divergence(
    p_loc: _Loc, p_scale_tril: Float[Array, "*#batch D D"], q_loc: _Loc, q_scale_tril: Float[Array, "*#batch D D"]
) -> Float[Array, "*batch"]:
    """Kullback-Leibler divergence KL(p || q), in nats.

    The value is `sum_i (M_ii^2 - 1 - 2 log M_ii) / 2 + sum_{i > j} M_ij^2 / 2 + |r|^2 / 2`. M = Lq^-1 Lp is lower
    triangular, and r = Lq^-1 (p_loc - q_loc). No term is negative. Those of the diagonal are the univariate ones of the
    diagonals of Lp and Lq. Below it M is Lq^-1 (Lp - Lq), an exact difference where p and q are close.

    Args:
      p_loc: mean of p, the reference.
      p_scale_tril: Lp, lower triangular with a positive diagonal.
      q_loc: mean of q, the approximation.
      q_scale_tril: Lq, likewise.

    Returns:
      One value per pair, at least float32, never negative: 0 where p = q; NaN for a diagonal that is not positive.
      Relative error at most `(32 + 8 D k) u` for q's k and diagonal matrices, also where p and q nearly agree. Full
      matrices have that of `|Lq^-1| (|Lp - Lq| 1 + |p_loc - q_loc|)`, which the substitution may cancel.

    Raises:
      ValueError: an argument is not floating-point, the dimensions differ, or the batches do not broadcast.

    Source: Kullback and Leibler (1951), Annals of Mathematical Statistics 22(1).

    >>> print(f"{kl_divergence(jnp.ones(2), jnp.eye(2), jnp.zeros(2), jnp.eye(2)):.4f}")
    1.0000
    """
    factors = {"p_scale_tril": p_scale_tril, "q_scale_tril": q_scale_tril}
    given = _canonical("kl_divergence", {"p_loc": p_loc, "q_loc": q_loc}, factors)
    return _mapped(_kl_divergence, "(d),(d),(d,d),(d,d)->()", *given)


def _kl_divergence(p_loc, q_loc, p_scale_tril, q_scale_tril):
    (p, p_ok), (q, q_ok) = _usable(p_scale_tril), _usable(q_scale_tril)
    (r, far), below = _standardised(q, p_loc - q_loc), jnp.tril(_solve(q, p - q), -1)
    stretch = gaussian.kl_divergence(0.0, _placement.diagonal(p), 0.0, _placement.diagonal(q))
    squares = jnp.sum(jnp.square(below)) + jnp.sum(jnp.square(r))
    return _accurate.nan_unless(p_ok & q_ok, jnp.sum(stretch) + squares / 2 + far)


@_checks.public(static=("shape",))
def sample(
    key: Key[Array, ""], loc: _Loc, scale_tril: Float[Array, "*#batch D D"], *, shape: tuple[int, ...] | None = None
) -> Float[Array, "*sample D"]:
    """Draws loc + L z with standard normal z: differentiable in loc and L.

    Args:
      key: a random key.
      loc: mean.
      scale_tril: L, lower triangular with a positive diagonal.
      shape: of the draws, static, without the axis of dimensions: it ends in the shape that the batches of loc and
        scale_tril broadcast to, which is the default.

    Returns:
      Independent draws of the given shape and D, at least float32; NaN for a diagonal that is not positive. The noise
      is as exact as `jax.random.normal`, and what follows adds (4 + D) u of |loc| + |L| |z|.

    Raises:
      ValueError: an argument is not floating-point, the dimensions differ, the batches do not broadcast, or `shape`
        does not end in theirs.

    >>> print(sample(jax.random.key(0), jnp.zeros(2), jnp.eye(2), shape=(5,)).shape)
    (5, 2)
    """
    loc, scale_tril = _canonical("sample", {"loc": loc}, {"scale_tril": scale_tril})
    batch = jnp.broadcast_shapes(loc.shape[:-1], scale_tril.shape[:-2])
    shape = _checks.sample_shape("sample", shape, batch, "the batch")
    loc, scale_tril = (jnp.expand_dims(v, range(len(shape) - len(batch))) for v in (loc, scale_tril))
    # The sum has the explicit axes of all, as `vectorize` asks of what it maps over.
    like = jnp.zeros_like(loc + _placement.diagonal(scale_tril))
    z = jax.random.normal(key, (*shape, loc.shape[-1]), loc.dtype) + like
    return _mapped(_draw, "(d),(d,d),(d)->(d)", loc, scale_tril, z)


def _draw(loc, scale_tril, z):
    lower, ok = _usable(scale_tril)
    return _accurate.nan_unless(ok, loc + jnp.matmul(lower, z, precision="highest"))


@_checks.public(static=("axis",))
def fit(
    x: Float[Array, "*shape D"],
    *,
    axis: int = -2,
    weights: Real[Array, "*#shape"] | Bool[Array, "*#shape"] | None = None,
) -> Parameters:
    """Maximum-likelihood fit: the weighted mean, and a factor of the weighted mean of the products of deviations.

    The factor is the triangle of a QR decomposition of the deviations themselves: their products would have the square
    of its condition number.

    Args:
      x: observations of D numbers, on the last axis.
      axis: the axis of the observations, another one; it is summed away.
      weights: how often each counts, real numbers or bool, not negative, broadcast to the shape of x without its last
        axis. An observation of weight 0 does not count, even if it is not finite. Only the ratios matter.

    Returns:
      Parameters(loc, scale_tril), at least float32. All is NaN with gradient 0 without any weight, for a negative or
      infinite one, or an infinite observation. Observations may lie in a subspace, as fewer than D + 1 do. The diagonal
      of the factor then has a 0, up to rounding, and no gradient that means anything.

      The error of loc from n observations is at most (16 + log2 n) u of |loc| + scale. That of the factor is
      `(8 + log2 n + 4 D) k u` of the largest entry of its row, if the D dimensions have one scale. Its terms: 8 for a
      deviation and the root of its share, log2 n for the sums; 4 for each reflection of the QR decomposition; k for the
      substitution.

    Raises:
      ValueError: x is not floating-point, or the weights do not broadcast; or `axis` is that of the dimensions, out of
        range or empty.

    Source: Golub and Van Loan (2013), Matrix Computations, 5.3.

    >>> loc, factor = fit(jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]))
    >>> print(jnp.round(factor @ factor.T, 4))
    [[0.5 0. ]
     [0.  2. ]]
    """
    _checks.floating("fit", x=x)
    if not isinstance(axis, int) or x.ndim < 2 or axis in (-1, x.ndim - 1):
        raise ValueError(f"fit: axis must be one of {_checks.describe(x)} before the last, got {axis!r}")
    if weights is not None and hasattr(weights, "dtype"):
        _checks.broadcasts("fit", "weights", weights, x[..., 0], "x without its last axis")
        weights = weights[..., None]
    x, w, ok, front = _weights.weighted("fit", x, axis, weights)
    ok &= jnp.sum(w, axis=front) > 0
    share, loc, deviation = _weights.deviations(x, w, front)
    share, deviation = jnp.moveaxis(share[..., 0], front, -1), jnp.moveaxis(deviation, front, -2)
    factor = _triangle(share, deviation)
    return Parameters(_accurate.nan_unless(ok, jnp.squeeze(loc, front)), _accurate.nan_unless(ok[..., None], factor))


@jax.custom_jvp
def _triangle(share, deviation):
    """L with L L^T = sum_i share_i deviation_i deviation_i^T."""
    rows = jnp.sqrt(share)[..., None] * deviation
    return _placement.automatic(_from_qr, rows, spec=_placement.spec(rows)[:-2])


def _from_qr(rows):
    # At least D rows: fewer would give a factor that is not square.
    missing = max(0, rows.shape[-1] - rows.shape[-2])
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 2) + [(0, missing), (0, 0)])
    upper = jnp.linalg.qr(rows, mode="r")
    sign = jnp.where(_placement.diagonal(upper) < 0, -1, 1).astype(rows.dtype)
    return jnp.swapaxes(upper * sign[..., None], -2, -1)


@_triangle.defjvp
def _triangle_jvp(primals, tangents):
    """The tangent of L L^T is a sum of d share w w^T + share (dv w^T + w dv^T).

    w and v are the deviations in units of L.
    """
    factor = _triangle(*primals)
    change = jnp.vectorize(_triangle_change, signature="(d,d),(n),(n,d),(n),(n,d)->(d,d)")
    return factor, change(factor, *primals, *tangents)


def _triangle_change(factor, share, deviation, d_share, d_deviation):
    lower, _ = _usable(factor)
    whitened = _solve(lower, deviation.T)
    half = share[None] * _solve(lower, d_deviation.T) + d_share[None] / 2 * whitened
    moved = jnp.matmul(half, whitened.T, precision="highest")
    return _change(lower, moved + moved.T)


def _change(lower, moved):
    """The change of L where that of L L^T is L moved L^T: L times the lower triangle, with half the diagonal."""
    half = jnp.tril(moved, -1) + jnp.diag(_placement.diagonal(moved) / 2)
    return jnp.matmul(lower, half, precision="highest")


@_checks.public()
def scale_tril(
    *,
    covariance: Float[Array, "*batch D D"] | None = None,
    precision: Float[Array, "*batch D D"] | None = None,
    diagonal: Float[Array, "*batch D"] | None = None,
) -> Float[Array, "*batch D D"]:
    """Cholesky factor: the lower triangular L with L L^T = covariance, from the one argument that is given.

    Args:
      covariance: symmetric and positive definite; its lower triangle is read.
      precision: the inverse of a covariance, symmetric and positive definite; its upper triangle is read.
      diagonal: standard deviations of independent dimensions, positive: L is the diagonal matrix of them.

    Returns:
      One matrix per matrix (or row), at least float32, with zeros above the diagonal; NaN where the argument is not
      positive definite. A diagonal is exact. Each entry of L L^T errs by 4 D u of the product of the two standard
      deviations. For a precision the same holds of the precision.

    Raises:
      ValueError: not exactly one argument is given, it is not floating-point, or a matrix is not square.

    Source: Higham (2002), Accuracy and Stability of Numerical Algorithms, 10.1.

    >>> print(scale_tril(covariance=jnp.array([[4.0, 2.0], [2.0, 2.0]])))
    [[2. 0.]
     [1. 1.]]
    """
    given = {"covariance": covariance, "precision": precision, "diagonal": diagonal}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        names = ", ".join(given) or "none"
        raise ValueError(f"scale_tril: expected exactly one of covariance, precision and diagonal, got {names}")
    _checks.floating("scale_tril", **given)
    ((name, value),) = given.items()
    value = value.astype(_accurate.compute_dtype(value))
    if diagonal is not None:
        if value.ndim == 0:
            raise ValueError(f"scale_tril: diagonal must have an axis of dimensions, got {_checks.describe(value)}")
        _checks.expect(value > 0, value, "scale_tril: standard deviation {value} is not positive")
        return jnp.vectorize(jnp.diag, signature="(d)->(d,d)")(_accurate.nan_unless(value > 0, value))
    _square("scale_tril", name, value)
    # Reversing both axes makes a lower factor an upper one: P = U U^T, whose inverse is U^-T U^-1.
    factor = _cholesky(value if precision is None else jnp.flip(value, (-2, -1)))
    definite = jnp.all(jnp.isfinite(factor), axis=(-2, -1))
    top = jnp.min(_placement.diagonal(value), axis=-1)
    _checks.expect(definite, top, f"scale_tril: {name} is not positive definite (smallest diagonal entry {{value}})")
    if covariance is not None:
        return _accurate.nan_unless(definite[..., None, None], factor)
    inverse = jnp.vectorize(_inverse, signature="(d,d)->(d,d)")
    return _placement.automatic(inverse, factor, spec=_placement.spec(factor)[:-2])


def _inverse(factor):
    lower, ok = _usable(factor)
    return _accurate.nan_unless(ok, _solve(jnp.flip(lower, (-2, -1)).T, jnp.eye(len(lower), dtype=lower.dtype)))


@jax.custom_jvp
def _cholesky(matrix):
    factor = partial(jax.lax.linalg.cholesky, symmetrize_input=True)
    return _placement.automatic(factor, matrix, spec=_placement.spec(matrix)[:-2])


@_cholesky.defjvp
def _cholesky_jvp(primals, tangents):
    """L phi(L^-1 dA L^-T)."""
    factor = _cholesky(*primals)
    return factor, jnp.vectorize(_cholesky_change, signature="(d,d),(d,d)->(d,d)")(factor, *tangents)


def _cholesky_change(factor, d_matrix):
    lower, _ = _usable(factor)
    return _change(lower, _solve(lower, _solve(lower, (d_matrix + d_matrix.T) / 2).T))


def _square(function, name, matrix):
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{function}: {name} must be square, got {_checks.describe(matrix)}")


def _canonical(function, vectors, matrices):
    """Vectors and matrices with batches of one rank that broadcast, in the dtype computed in."""
    # A Python number may be an integer, and is one of a weak type once it is traced.
    weak = {n: isinstance(v, int | float) or getattr(v, "weak_type", False) for n, v in vectors.items()}
    given = {n: jnp.asarray(v * 1.0) if weak[n] else v for n, v in vectors.items()} | matrices
    _checks.floating(function, **given)
    for name, matrix in matrices.items():
        _square(function, name, matrix)
        diagonal = _placement.diagonal(matrix)
        _checks.expect(diagonal > 0, diagonal, f"{function}: {name} has {{value}} on its diagonal, not positive")
    size = next(iter(matrices.values())).shape[-1]
    dtype = _accurate.compute_dtype(*given.values())
    for name, value in given.items():
        # A mean may be one number for all dimensions.
        if name.endswith("loc") and value.shape[-1:] in ((), (1,)):
            given[name] = jnp.broadcast_to(value, (*value.shape[:-1], size))
        elif value.shape[-1:] != (size,):
            raise ValueError(f"{function}: {name} must have {size} dimensions, got {_checks.describe(value)}")
    batches = [value.shape[: -2 if name in matrices else -1] for name, value in given.items()]
    rank = len(_checks.broadcast_shape(function, given, batches))
    # One rank without a copy: `vectorize` maps over no axis of length 1, so that what is shared is solved with once.
    return [
        jnp.expand_dims(value, range(rank - len(batch))).astype(dtype)
        for value, batch in zip(given.values(), batches, strict=True)
    ]


def _mapped(function, signature, *arrays):
    """`jnp.vectorize`, which takes no explicit axes in jax 0.12 if the function calls others that are compiled."""
    inputs, output = (part.split("),(") for part in signature.split("->"))
    cores = [part.count("d") for part in (*inputs, *output)]
    batches = [_placement.spec(x)[: x.ndim - core] for x, core in zip(arrays, cores, strict=False)]
    size = max(map(len, batches))
    names = zip(*([None] * (size - len(batch)) + [*batch] for batch in batches), strict=True)
    batch = [next((name for name in axis if name is not None), None) for axis in names]
    call = jnp.vectorize(function, signature=signature)
    return _placement.automatic(call, *arrays, spec=[*batch, *[None] * cores[-1]])


def _usable(matrix):
    """The lower triangle, or the unit matrix where it is none of a Cholesky factor, and whether it is one."""
    lower = jnp.tril(matrix)
    ok = jnp.all(jnp.isfinite(lower)) & jnp.all(_checks.FINITE_POSITIVE.holds(_placement.diagonal(lower)))
    return jnp.where(ok, lower, jnp.eye(len(lower), dtype=lower.dtype)), ok


def _standardised(lower, offset):
    """L^-1 offset and the constant 0. An offset that is not finite gives 0 and a constant that is inf or NaN."""
    near = jnp.all(jnp.isfinite(offset))
    r = _solve(lower, jnp.where(near, offset, 0)[:, None])[:, 0]
    return r, jax.lax.stop_gradient(jnp.where(near, 0, jnp.sum(jnp.abs(offset))))


@jax.custom_jvp
def _solve(lower, right):
    """L^-1 right by forward substitution."""
    return jax.lax.linalg.triangular_solve(lower, right, left_side=True, lower=True)


@_solve.defjvp
def _solve_jvp(primals, tangents):
    """L^-1 (d right - dL solution); a solution that overflows must not meet a tangent of 0."""
    (lower, _), (d_lower, d_right) = primals, tangents
    solution = _solve(*primals)
    seen = jnp.where(jnp.isfinite(solution), solution, 0)
    return solution, _solve(lower, d_right - jnp.matmul(d_lower, seen, precision="highest"))
