"""Maximum likelihood for small problems: the optimum itself, and how far the data determine it.

Use these functions if all examples fit into one batch and the params into a few hundred numbers. The negative
log-likelihood is then a function without noise. `fit_full_batch` descends to where its gradient is rounding, with no
learning rate to tune. `covariance` reads off its curvature there how far the params would move with other data.

Both take the same `nll(params, batch, key)` as `run`, and call it with all of the data at once. A prior is a part of
`nll`: add -log prior(params) / n to each example, n their total weight. The optimum is then the most probable params.
An L2 penalty |params|^2 / (2 C), as in scikit-learn, is the Gaussian prior of variance C.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float, Int, Key, PyTree, Real

from .. import _accurate, _checks, _placement, mvn
from . import _arguments
from .objective import Nll, Objective, num_examples, without_weightless

# Pairs of steps that L-BFGS remembers: with 50, ill-conditioned problems take about half the steps of the usual 10.
_MEMORY = 50
# Steps in a row that find neither a lower loss nor a smaller gradient. Sound descent has had up to 15 of them: the loss
# no longer tells two points apart, and the gradient still does.
_PATIENCE = 20
# Without the short cuts that accelerators take by default: a covariance needs its digits.
_product = partial(jnp.matmul, precision="highest")


class FullBatchFit(NamedTuple):
    """The result of a fit.

    Attributes:
      params: the fitted params, in the structure and dtypes of the initial ones.
      loss: their mean negative log-likelihood per example, in nats.
      gradient_norm: Euclidean norm of its gradient over all params.
      steps: line searches made, int32.
      converged: whether the norm is at most the tolerance.
    """

    params: PyTree
    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


class Covariance(NamedTuple):
    """How far maximum-likelihood estimates vary with the data.

    Attributes:
      standard_errors: the root of the variance of each parameter, in the structure of the params.
      matrix: the covariance of all params, in the order of `jax.flatten_util.ravel_pytree`.
    """

    standard_errors: PyTree
    matrix: Float[Array, "P P"]


@_checks.public(static=("nll", "max_steps"), gradient_tolerance=_checks.NOT_NEGATIVE)
def fit_full_batch(
    nll: Nll,
    params: PyTree,
    data: PyTree,
    *,
    weights: Real[Array, " n"] | Bool[Array, " n"] | None = None,
    gradient_tolerance: float | Real[Array, ""] = 1e-5,
    max_steps: int = 1000,
    key: Key[Array, ""] | None = None,
) -> FullBatchFit:
    """Minimises the mean negative log-likelihood of all data by L-BFGS with a line search.

    Each step searches along the quasi-Newton direction for a point that satisfies the strong Wolfe conditions. Near the
    optimum a loss can no longer show that it fell. Hager and Zhang's condition on its derivative stands in there. A
    search that finds no point moves nothing and clears the memory. The fit ends when the norm of the gradient is at
    most the tolerance; after `max_steps`; or after 20 steps in a row that reach neither a lower loss nor a smaller
    gradient. Rounding allows no more then. `converged` tells the first end from the others. `jax.vmap` fits many at
    once, over data, weights or initial params. A fit that has ended changes no more.

    Args:
      nll: `nll(params, batch, key) -> Array[batch]`, the negative log-likelihood of each example, in nats, with a
        continuous gradient.
      params: initial parameters, any pytree of float32 or float64 arrays.
      data: all examples, a pytree of arrays with the same leading axis.
      weights: how often each example counts, not negative. Examples of weight 0 are ignored. A negative one makes the
        loss NaN, so that the start is returned; `jprob.checkify` names it.
      gradient_tolerance: the norm to reach, in nats per unit of the params, not negative. float32 reaches about 1e-6
        where features and params are of the order of 1. The limit is the noise of the gradient, u times the mean size
        of an example's own.
      max_steps: number of line searches at most, static. Each evaluates loss and gradient once or twice, at most 20
        times.
      key: the key that `nll` is given in every evaluation, so that it is one function; by default
        `jax.random.key(0)`.

    Returns:
      A `FullBatchFit`, in the dtype of the params. An error g of the gradient leaves one of H^-1 g in the params, H the
      Hessian of the loss. A start where loss or gradient is not finite is returned as it is, not converged. A loss may
      have no minimum, as for classes that a plane separates. Its gradient vanishes far out. Any tolerance above 0 is
      then met by params that only `max_steps` and the tolerance bound.

    Raises:
      ValueError: the params are not float32 or float64; the arrays of `data` differ in their leading axis or hold no
        example; `weights` are not one number per example; `nll` does not return one value per example; or an option is
        out of range.
      TypePromotionError: under x64 with strict promotion, since optax's L-BFGS adds an int32 to an int64. Use
        `jax.numpy_dtype_promotion("standard")` around the call.

    Source: Nocedal and Wright (2006), Numerical Optimization, algorithms 3.5, 3.6 and 7.5; Hager and Zhang (2006), ACM
    Trans. Math. Softw. 32(1).

    >>> x = jnp.array([1.0, 2.0, 6.0])
    >>> nll = lambda p, x, key: p["log_scale"] + jnp.square((x - p["loc"]) * jnp.exp(-p["log_scale"])) / 2
    >>> fit = fit_full_batch(nll, {"loc": jnp.array(0.0), "log_scale": jnp.array(0.0)}, x)
    >>> print(f"{fit.params['loc']:.3f} {jnp.exp(fit.params['log_scale']):.3f} {fit.converged}")
    3.000 2.160 True
    """
    _arguments.options("fit_full_batch", max_steps=max_steps)
    key = _arguments.key("fit_full_batch", jax.random.key(0) if key is None else key)
    fitted = partial(_fitted, nll, max_steps)
    return _placement.automatic(fitted, params, data, weights, key, gradient_tolerance)


@_checks.public(static=("nll", "kind"))
def covariance(
    nll: Nll,
    params: PyTree,
    data: PyTree,
    *,
    kind: Literal["fisher", "sandwich"] = "fisher",
    weights: Real[Array, " n"] | Bool[Array, " n"] | None = None,
    key: Key[Array, ""] | None = None,
) -> Covariance:
    """Covariance of maximum-likelihood estimates, and the standard error of each, from the data they were fitted to.

    H is the Hessian of the summed negative log-likelihood, and g_i the gradient of that of example i:

        fisher    H^-1, the inverse of the observed Fisher information: right where the model is
        sandwich  H^-1 (sum_i g_i g_i^T) H^-1: right also where the model is not, for the params of the distribution
                  nearest to the truth; it needs independent examples

    Both are for large n, where the estimates are normal about the params they estimate. They differ where the model is
    wrong. If `nll` has a prior, `fisher` is the covariance of Laplace's approximation to the posterior.

    Args:
      nll: `nll(params, batch, key) -> Array[batch]`, the negative log-likelihood of each example, in nats, twice
        differentiable.
      params: where the likelihood is highest, as from `fit_full_batch`: any pytree of float32 or float64 arrays.
      data: the examples they were fitted to, a pytree of arrays with the same leading axis.
      kind: which of the two.
      weights: how often each example counts, not negative: weight 2 is the example twice, so that doubling all weights
        halves the covariance.
      key: the key that `nll` is given; by default `jax.random.key(0)`.

    Returns:
      `Covariance(standard_errors, matrix)`, in the dtype of the params. NaN throughout if H is not positive definite in
      floating point. These params are then no minimum, or the data do not determine them all: collinear features, the
      common shift of softmax logits, no examples. Rounding may also leave such an H barely positive. Some standard
      errors then come out larger than the others by 1 / sqrt(u). The relative error is about k u, k the condition
      number of H scaled to a unit diagonal. Takes the memory of the gradients of all examples, n P numbers.

    Raises:
      ValueError: `kind` is neither of the two, or as for `fit_full_batch`.

    Source: Efron and Hinkley (1978), Biometrika 65(3); Huber (1967), Proc. Fifth Berkeley Symposium; White (1980),
    Econometrica 48(4).

    >>> x = jnp.array([1.0, 2.0, 6.0])
    >>> nll = lambda mean, x, key: jnp.square(x - mean) / 2  # as if the variance were 1; it is 14 / 3
    >>> for kind in ("fisher", "sandwich"):
    ...     print(f"{covariance(nll, jnp.array(3.0), x, kind=kind).standard_errors:.4f}")
    0.5774
    1.2472
    """
    if kind not in ("fisher", "sandwich"):
        raise ValueError(f"covariance: kind must be one of fisher, sandwich, got {kind!r}")
    key = _arguments.key("covariance", jax.random.key(0) if key is None else key)
    return _placement.automatic(partial(_covariance, nll, kind), params, data, weights, key)


class _Search(NamedTuple):
    """The numbers that the fit carries from one line search to the next."""

    flat: Array
    loss: Array
    gradient: Array
    gradient_norm: Array
    memory: optax.OptState
    steps: Array
    steps_since_best: Array  # steps since the loss or the gradient norm was last below all before it
    lowest: Array  # those two
    flattest: Array


def _fitted(nll, max_steps, params, data, weights, key, tolerance):
    flat, unravel = _flat("fit_full_batch", params)
    tolerance = _checks.number("fit_full_batch", "gradient_tolerance", tolerance, _checks.NOT_NEGATIVE, flat.dtype)
    data, weights = _examples("fit_full_batch", data, weights)
    mean, solver = Objective("fit_full_batch", nll).mean, optax.lbfgs(memory_size=_MEMORY)

    def objective(flat):
        # One dtype throughout, that of the params, for any dtype that nll returns.
        return mean(unravel(flat), None, data, key, weights)[0].astype(flat.dtype)

    def goes_on(search):
        finite = jnp.isfinite(search.loss) & jnp.isfinite(search.gradient_norm)
        in_time = (search.steps < max_steps) & (search.steps_since_best < _PATIENCE)
        return finite & in_time & (search.gradient_norm > tolerance)

    def one(search):
        # Under vmap a search that is done runs on with the others; without a gradient it ends at once.
        gradient = jnp.where(goes_on(search), search.gradient, 0)
        return _line_search(solver, objective, search._replace(gradient=gradient))

    loss, gradient = jax.value_and_grad(objective)(flat)
    norm, zero = jnp.linalg.norm(gradient), jnp.zeros((), jnp.int32)
    start = _Search(flat, loss, gradient, norm, solver.init(flat), zero, zero, loss, norm)
    end = jax.lax.while_loop(goes_on, one, start)
    converged = end.gradient_norm <= tolerance
    return FullBatchFit(unravel(end.flat), end.loss, end.gradient_norm, end.steps, converged)


def _covariance(nll, kind, params, data, weights, key):
    flat, unravel = _flat("covariance", params)
    data, weights = _examples("covariance", data, weights)

    def losses(flat):
        return Objective("covariance", nll).of_examples(unravel(flat), data, key).astype(flat.dtype)

    hessian = jax.hessian(lambda flat: jnp.sum(weights.astype(flat.dtype) * losses(flat)))(flat)
    factor = mvn.scale_tril(precision=hessian)
    matrix = _product(factor, factor.T)
    if kind == "sandwich":
        gradients = jnp.sqrt(weights.astype(flat.dtype))[:, None] * jax.jacfwd(losses)(flat)
        # From a product with its own transpose comes no negative variance.
        half = _product(_product(gradients, factor), factor.T)
        matrix = _product(half.T, half)
    return Covariance(unravel(jnp.sqrt(jnp.diagonal(matrix))), matrix)


def _line_search(solver, objective, search):
    updates, memory = solver.update(
        search.gradient, search.memory, search.flat, value=search.loss, grad=search.gradient, value_fn=objective
    )
    line = memory[-1]
    # optax then takes the last point it tried, however high.
    failed = line.info.decrease_error > 0
    new = (optax.apply_updates(search.flat, updates), line.value, line.grad, memory)
    old = (search.flat, search.loss, search.gradient, solver.init(search.flat))
    flat, loss, gradient, memory = jax.tree.map(partial(jnp.where, failed), old, new)
    norm = jnp.linalg.norm(gradient)
    lowest, flattest = jnp.minimum(loss, search.lowest), jnp.minimum(norm, search.flattest)
    steps_since_best = jnp.where((loss < search.lowest) | (norm < search.flattest), 0, search.steps_since_best + 1)
    return _Search(flat, loss, gradient, norm, memory, search.steps + 1, steps_since_best, lowest, flattest)


def _flat(function, params):
    """The params as one vector, and the way back."""
    for leaf in jax.tree.leaves(params):
        if getattr(leaf, "dtype", None) not in (jnp.float32, jnp.float64):
            raise ValueError(f"{function}: params must be float32 or float64 arrays, got {_checks.describe(leaf)}")
    # All in one dtype, since strict promotion refuses two.
    dtype = _accurate.compute_dtype(*jax.tree.leaves(params))
    flat, unravel = ravel_pytree(jax.tree.map(lambda p: p.astype(dtype), params))
    return flat, lambda flat: jax.tree.map(lambda x, p: x.astype(p.dtype), unravel(flat), params)


def _examples(function, data, weights):
    """Data and weights, none of which lets through an example that does not count."""
    size = num_examples(function, "data", data)
    if weights is None:
        return data, jnp.ones(size)
    weights = _checks.weights(function, "the examples", (size,), weights)
    return without_weightless(data, weights), weights
