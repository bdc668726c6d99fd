"""The laws of the full-batch fit and of its standard errors."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from test_loop import MODES, assert_same_bits

import jprob
from jprob import calibration, categorical, gaussian
from jprob.mle.full_batch import covariance, fit_full_batch

U, U64 = 2.0**-24, 2.0**-53
SIZE, FEATURES, CLASSES = 120, 3, 3
_rng = np.random.default_rng(0)
X = _rng.normal(size=(SIZE, FEATURES))
Y = _rng.integers(0, CLASSES, SIZE)
COUNTS = _rng.integers(0, 4, SIZE)
PENALTY = 0.1  # the loss is convex by at least this much


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def lenient():
    """optax's L-BFGS adds an int32 to an int64 under x64, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def ridge(params, batch, key):
    """Logistic regression under a Gaussian prior on everything."""
    x, y = batch
    return categorical.cross_entropy(x @ params, y) + PENALTY / 2 * jnp.sum(jnp.square(params))


def penalised(params, batch, key):
    """As scikit-learn has it: the bias is free, and each example bears its share of the penalty."""
    x, y, share = batch
    loss = categorical.cross_entropy(x @ params["kernel"] + params["bias"][None], y)
    return loss + share * jnp.sum(jnp.square(params["kernel"]))


def normal(params, x, key):
    return gaussian.nll(x, params["loc"], log_scale=params["log_scale"])


def classes(dtype):
    return jnp.zeros((FEATURES, CLASSES), dtype), (jnp.asarray(X, dtype), jnp.asarray(Y))


def standard(dtype, loc=0.0):
    return {"loc": jnp.asarray(loc, dtype), "log_scale": jnp.asarray(0.0, dtype)}


# ---- The fit


@pytest.mark.parametrize(
    ("dtype", "inverse_penalty", "tolerance"),
    [("float64", 0.1, 1e-10), ("float64", 1.0, 1e-10), ("float64", 10.0, 1e-10), ("float32", 0.1, 1e-6)],
)
def test_it_agrees_with_scikit_learn(dtype, inverse_penalty, tolerance, lenient):
    """The kernel to C n times the tolerance, since the loss is convex in it by 1 / (C n): 1e-6 in float64."""
    x, y = map(np.asarray, load_iris(return_X_y=True))
    n, allowed = len(y), inverse_penalty * len(y) * tolerance
    model = LogisticRegression(C=inverse_penalty, tol=1e-12, max_iter=10_000, solver="newton-cg").fit(x, y)

    with jax.enable_x64(dtype == "float64"):
        params = {"kernel": jnp.zeros((4, 3), dtype), "bias": jnp.zeros(3, dtype)}
        data = (jnp.asarray(x, dtype), jnp.asarray(y), jnp.full(n, 1 / (2 * inverse_penalty * n), dtype))
        fit = fit_full_batch(penalised, params, data, gradient_tolerance=tolerance)
    assert fit.converged
    assert dtype == "float32" or allowed <= 1e-6
    np.testing.assert_allclose(fit.params["kernel"].T, model.coef_, rtol=0, atol=allowed)
    # The bias minimises for the kernel at hand: it follows the mean logit, x of up to 8 by the kernel's error.
    bias, want = np.asarray(fit.params["bias"]), model.intercept_
    np.testing.assert_allclose(bias - bias.mean(), want - want.mean(), rtol=0, atol=8 * allowed)


def test_it_agrees_with_fit_temperature():
    logits = jnp.asarray(_rng.normal(0, 3, size=(SIZE, CLASSES)), jnp.float32)
    labels = categorical.sample(jax.random.key(0), logits / 2)
    nll = lambda inverse, batch, key: categorical.cross_entropy(inverse * batch[0], batch[1])  # noqa: E731
    fit = fit_full_batch(nll, jnp.array(1.0), (logits, labels), gradient_tolerance=1e-6)
    curvature = jax.jit(jax.hessian(lambda b: jnp.mean(nll(b, (logits, labels), None))))(fit.params)
    assert fit.converged
    # Beside the tolerance, both gradients have the rounding of a mean of logits of about 3.
    allowed = (1e-6 + 2 * 3 * 16 * U) / (curvature * fit.params)
    np.testing.assert_allclose(1 / fit.params, calibration.fit_temperature(logits, labels), rtol=float(allowed))


@pytest.mark.parametrize("start", [0.0, 30.0])
def test_it_agrees_with_the_closed_form_of_a_gaussian(start, x64, lenient):
    x = jnp.asarray(_rng.normal(2, 3, SIZE))
    fit = fit_full_batch(normal, standard("float64", start), x, gradient_tolerance=1e-9)
    loc, scale = gaussian.fit(x)
    assert fit.converged
    # The Hessian is diag(1 / scale^2, 2), so that a gradient of g leaves g scale^2 and g / 2.
    np.testing.assert_allclose(fit.params["loc"], loc, rtol=0, atol=1e-9 * float(scale) ** 2)
    np.testing.assert_allclose(fit.params["log_scale"], jnp.log(scale), rtol=0, atol=1e-9)
    np.testing.assert_allclose(fit.loss, gaussian.entropy(scale), rtol=8 * U64)


def test_weights_are_repetitions(x64, lenient):
    """Both to within tolerance / convexity of the one minimum."""
    params, (x, y) = classes("float64")
    weighted = fit_full_batch(ridge, params, (x, y), weights=jnp.asarray(COUNTS, float), gradient_tolerance=1e-9)
    rows = np.repeat(np.arange(SIZE), COUNTS)
    repeated = fit_full_batch(ridge, params, (x[rows], y[rows]), gradient_tolerance=1e-9)
    assert weighted.converged & repeated.converged
    np.testing.assert_allclose(weighted.params, repeated.params, rtol=0, atol=2e-9 / PENALTY)


def test_an_example_of_weight_0_is_not_there_even_if_it_is_nan():
    x, weights = jnp.array([1.0, jnp.nan, 3.0, 8.0]), jnp.array([1.0, 0.0, 1.0, 2.0])
    fit = fit_full_batch(normal, standard("float32"), x, weights=weights)
    assert fit.converged
    # The Hessian is diag(1 / 9.5, 2), 9.5 the variance: a gradient of 1e-5 leaves 9.5e-5 in loc and 5e-6 in log_scale.
    np.testing.assert_allclose(fit.params["loc"], 5, rtol=0, atol=9.5e-5 + 16 * 5 * U)
    errors = covariance(normal, fit.params, x, weights=weights).standard_errors
    # The curvature goes with scale^-2, the error with its root: off by as much as log_scale, and by a part of loc's.
    np.testing.assert_allclose(errors["log_scale"], 1 / np.sqrt(2 * 4), rtol=2e-5 + 32 * U)


def test_vmap_is_each_alone_over_data_weights_and_params(x64, lenient):
    params, (x, y) = classes("float64")
    xs = jnp.stack([x, x[::-1], 2 * x])
    weights = jnp.asarray(_rng.integers(1, 4, (3, SIZE)), float)
    starts = jnp.asarray(_rng.normal(size=(3, *params.shape)))

    def alone(params, x, weights):
        return fit_full_batch(ridge, params, (x, y), weights=weights, gradient_tolerance=1e-9)

    together = jax.vmap(alone)(starts, xs, weights)
    assert together.converged.all()
    for i in range(3):
        want = alone(starts[i], xs[i], weights[i])
        np.testing.assert_allclose(together.params[i], want.params, rtol=0, atol=2e-9 / PENALTY)


def test_a_member_that_is_done_does_not_change():
    """Next to a member that takes long, and next to itself: the same bits, and the same steps."""
    params, (x, y) = classes("float32")
    fit = jax.jit(jax.vmap(lambda x: fit_full_batch(ridge, params, (x, y))))
    done, slow = x / 100, 100 * x
    both, self = fit(jnp.stack([done, slow])), fit(jnp.stack([done, done]))
    assert both.steps[1] > 2 * both.steps[0] > 0
    assert_same_bits(jax.tree.map(lambda a: a[0], both), jax.tree.map(lambda a: a[0], self))


def test_an_optimum_takes_no_steps():
    params, data = classes("float32")
    first = fit_full_batch(ridge, params, data)
    again = fit_full_batch(ridge, first.params, data)
    assert first.converged
    assert again.converged
    assert again.steps == 0 < first.steps
    assert_same_bits(again.params, first.params)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("float32", 1e-6), ("float64", 1e-12)])
def test_where_it_converged_the_gradient_is_within_the_tolerance(dtype, tolerance, lenient):
    with jax.enable_x64(dtype == "float64"):
        fit = fit_full_batch(ridge, *classes(dtype), gradient_tolerance=tolerance)
    with jax.enable_x64(True):
        params, data = jnp.asarray(fit.params, "float64"), classes("float64")[1]
        gradient = jax.jit(jax.grad(lambda p: jnp.mean(ridge(p, data, None))))(params)
    assert fit.converged
    assert np.asarray(fit.gradient_norm) <= tolerance
    # The gradient is a mean of entries of about 1, each rounded 16 times.
    noise = 16 * (U if dtype == "float32" else U64)
    np.testing.assert_allclose(np.linalg.norm(gradient), fit.gradient_norm, rtol=0, atol=noise)


def test_data_without_an_optimum_end_after_max_steps():
    """A plane separates the classes: the likelihood rises to 1 as the params go to infinity."""
    x = jnp.linspace(-1, 1, 20)[:, None]
    nll = lambda w, batch, key: categorical.cross_entropy(batch[0] @ w, batch[1])  # noqa: E731
    data = (x, (x[:, 0] > 0).astype(int))
    fit = fit_full_batch(nll, jnp.zeros((1, 2)), data, gradient_tolerance=1e-12, max_steps=12)
    assert not fit.converged
    assert fit.steps == 12
    assert jnp.isfinite(fit.params).all()


def test_where_rounding_allows_no_more_it_ends_and_says_so():
    fit = fit_full_batch(ridge, *classes("float32"), gradient_tolerance=0.0)
    assert not fit.converged
    assert fit.steps < 100
    assert fit.gradient_norm < 16 * U


def test_where_no_search_finds_a_way_it_ends_and_says_so():
    """The gradient of |x - p| jumps: it is never near 0, and its minimum, the median, is a kink."""
    x = jnp.asarray(_rng.normal(size=15), jnp.float32)
    nll = lambda p, x, key: jnp.abs(x - p)  # noqa: E731
    fit = fit_full_batch(nll, jnp.array(3.0), x)
    assert not fit.converged
    assert fit.steps < 100
    # Away from the kink the loss, a mean of 15, rises by 1 / 15 at least; its roundings, 16 each, tell no less apart.
    assert abs(fit.params - jnp.median(x)) <= 15 * 2 * 16 * U * fit.loss


def test_a_search_that_finds_no_lower_point_moves_nothing():
    """Told the wrong way, it would go up at any step."""
    nll = lambda p, x, key: x * (2 * jax.lax.stop_gradient(p) - p)  # noqa: E731  its value is x p, its gradient -x
    fit = fit_full_batch(nll, jnp.array(0.0), jnp.ones(3))
    assert not fit.converged
    assert fit.params == 0


@pytest.mark.parametrize("start", [jnp.nan, jnp.inf, 1e30])
def test_a_start_that_is_not_finite_is_returned(start):
    fit = fit_full_batch(normal, standard("float32", start), jnp.arange(7.0))
    assert not fit.converged
    assert fit.steps == 0
    assert_same_bits(fit.params["loc"], jnp.float32(start))


def test_no_weight_at_all_is_an_optimum_anywhere():
    fit = fit_full_batch(ridge, *classes("float32"), weights=jnp.zeros(SIZE))
    assert fit.converged
    assert (fit.loss, fit.gradient_norm, fit.steps) == (0, 0, 0)


def test_the_key_is_the_same_in_every_evaluation():
    nll = lambda p, x, key: jnp.square(x + jax.random.normal(key, x.shape) - p)  # noqa: E731
    x = jnp.arange(5.0)
    for key in (None, jax.random.key(7)):
        fit = fit_full_batch(nll, jnp.array(0.0), x, key=key)
        drawn = jax.random.normal(jax.random.key(0) if key is None else key, x.shape)
        assert fit.converged
        np.testing.assert_allclose(fit.params, jnp.mean(x + drawn), rtol=1e-5)


def test_params_keep_their_structure_and_dtypes(x64, lenient):
    """Also when data of a wider dtype make the loss one of float64."""
    params = {"loc": jnp.zeros((), "float32"), "log_scale": jnp.zeros((), "float64")}
    fit = fit_full_batch(normal, params, jnp.asarray(X[:, 0]))
    assert jax.tree.map(jnp.result_type, fit.params) == {"loc": jnp.float32, "log_scale": jnp.float64}
    narrow = fit_full_batch(normal, standard("float32"), jnp.asarray(X[:, 0]))
    assert narrow.loss.dtype == narrow.gradient_norm.dtype == narrow.params["loc"].dtype == jnp.float32
    assert covariance(normal, narrow.params, jnp.asarray(X[:, 0])).matrix.dtype == jnp.float32
    assert fit.converged & narrow.converged


def test_both_lower_for_every_platform_and_call_no_host():
    platforms = ("cpu", "cuda", "tpu")

    @jax.jit
    def both(params, x, y):
        fit = fit_full_batch(ridge, params, (x, y))
        return fit, covariance(ridge, fit.params, (x, y), kind="sandwich")

    params, (x, y) = classes("float32")
    exported = jax.export.export(both, platforms=platforms)(params, x, y)
    assert exported.platforms == platforms
    assert "callback" not in exported.mlir_module()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "no jit"])
def test_both_pass_in_every_mode_of_jax(mode):
    nll = lambda p, x, key: jnp.square(x + jax.random.normal(key, x.shape) - p)  # noqa: E731
    x, key = jnp.arange(5.0), jax.random.key(7)
    with MODES[mode]():
        fit = fit_full_batch(nll, jnp.array(0.0), x, key=key)
        assert fit.converged
        assert jnp.isfinite(covariance(nll, fit.params, x, key=key).matrix).all()


def test_a_negative_weight_is_named_by_the_checks_and_gives_nan():
    params, data = classes("float32")
    weights = jnp.ones(SIZE).at[3].set(-1)
    fit = fit_full_batch(ridge, params, data, weights=weights)
    assert jnp.isnan(fit.loss)
    assert (fit.converged, fit.steps) == (False, 0)
    assert jnp.isnan(covariance(ridge, params, data, weights=weights, kind="sandwich").matrix).all()
    for function in (fit_full_batch, covariance):
        error, _ = jprob.checkify(partial(function, ridge))(params, data, weights=weights)
        assert error.get().startswith(f"{function.__name__}: weight -1.0 is negative")


# ---- Standard errors


def test_the_errors_of_a_gaussian_are_the_known_ones():
    """scale / sqrt(n) and 1 / sqrt(2 n), independent of each other. The sums and products round some 64 times."""
    x = jnp.asarray(_rng.normal(2, 3, SIZE), jnp.float32)
    loc, scale = gaussian.fit(x)
    (error, log_error), matrix = covariance(lambda p, x, key: gaussian.nll(x, p[0], log_scale=p[1]),
                                            (loc, jnp.log(scale)), x)  # fmt: skip
    np.testing.assert_allclose(error, scale / np.sqrt(SIZE), rtol=64 * U)
    np.testing.assert_allclose(log_error, 1 / np.sqrt(2 * SIZE), rtol=64 * U)
    np.testing.assert_allclose(matrix[0, 1] / (error * log_error), 0, atol=64 * U)


def logistic(beta, batch, key):
    x, y = batch
    return jax.nn.softplus(x @ beta) - y * (x @ beta)


def poisson(beta, batch, key):
    x, y = batch
    return jnp.exp(x @ beta) - y * (x @ beta)


MODELS = {"logistic": (logistic, lambda eta: 1 / (2 + 2 * np.cosh(eta))), "poisson": (poisson, np.exp)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_the_covariance_of_a_generalised_linear_model_is_the_known_one(name, dtype):
    """The known one is `(X^T W X)^-1` and `(X^T W X)^-1 X^T R^2 X (X^T W X)^-1`.

    R = y - E y, with W the variance of y, at any params.
    """
    nll, variance = MODELS[name]
    beta, y = np.array([0.5, -0.3, 0.8]), _rng.integers(0, 2, SIZE)
    eta = X @ beta
    residual = y - (np.exp(eta) if name == "poisson" else 1 / (1 + np.exp(-eta)))
    information = X.T @ (variance(eta)[:, None] * X)
    want = np.linalg.inv(information)
    wants = {"fisher": want, "sandwich": want @ (X.T @ (residual[:, None] ** 2 * X)) @ want}
    scale = np.sqrt(np.diag(information))
    # About k u; 64 for the sums and the rounding of the data.
    allowed = 64 * np.linalg.cond(information / np.outer(scale, scale)) * (U if dtype == "float32" else U64)
    with jax.enable_x64(dtype == "float64"):
        data = (jnp.asarray(X, dtype), jnp.asarray(y, dtype))
        for kind, want in wants.items():
            got = covariance(nll, jnp.asarray(beta, dtype), data, kind=kind)
            errors = np.sqrt(np.diag(want))
            np.testing.assert_allclose(got.matrix / np.outer(errors, errors), want / np.outer(errors, errors),
                                       rtol=0, atol=allowed)  # fmt: skip
            np.testing.assert_allclose(got.standard_errors, errors, rtol=allowed)


def test_the_sandwich_of_a_linear_regression_is_that_of_white(x64):
    """HC0, (X^T X)^-1 X^T diag(e^2) X (X^T X)^-1, however the scale that the model assumes."""
    y = X @ [1.0, 2.0, 3.0] + _rng.normal(size=SIZE) * np.exp(X[:, 0])
    beta, *_ = np.linalg.lstsq(X, y)
    bread = np.linalg.inv(X.T @ X)
    want = bread @ (X.T @ ((y - X @ beta)[:, None] ** 2 * X)) @ bread
    for scale in (1.0, 7.0):
        nll = lambda b, batch, key, scale=scale: gaussian.nll(batch[1], batch[0] @ b, scale)  # noqa: E731
        got = covariance(nll, jnp.asarray(beta), (jnp.asarray(X), jnp.asarray(y)), kind="sandwich")
        np.testing.assert_allclose(got.matrix, want, rtol=0, atol=64 * U64 * np.linalg.cond(bread) * want.max())
        assert_same_bits(got.matrix, got.matrix.T)


def test_the_sandwich_sees_that_the_model_is_wrong(x64):
    """A Gaussian fitted to Laplace draws: the variance of log_scale is (kurtosis - 1) / (4 n), not 1 / (2 n)."""
    x = jnp.asarray(_rng.laplace(size=4000))
    loc, scale = gaussian.fit(x)
    params = {"loc": loc, "log_scale": jnp.log(scale)}
    kurtosis = jnp.mean(((x - loc) / scale) ** 4)
    fisher, sandwich = (covariance(normal, params, x, kind=k).standard_errors for k in ("fisher", "sandwich"))
    np.testing.assert_allclose(sandwich["log_scale"], jnp.sqrt((kurtosis - 1) / (4 * x.size)), rtol=1e-12)
    np.testing.assert_allclose(fisher["log_scale"], 1 / np.sqrt(2 * x.size), rtol=1e-12)
    np.testing.assert_allclose(sandwich["loc"], fisher["loc"], rtol=1e-12)
    assert sandwich["log_scale"] > 1.4 * fisher["log_scale"]  # sqrt(5 / 2) of an endless sample


def test_both_kinds_agree_where_the_model_is_right(x64):
    """The ratio of the variances of log_scale is (kurtosis - 1) / 2; a sample's kurtosis has deviation sqrt(24 / n)."""
    n = 10_000
    x = jnp.asarray(np.random.default_rng(1).normal(size=n))
    loc, scale = gaussian.fit(x)
    params = {"loc": loc, "log_scale": jnp.log(scale)}
    fisher, sandwich = (covariance(normal, params, x, kind=k).matrix for k in ("fisher", "sandwich"))
    np.testing.assert_allclose(sandwich[1, 1] / fisher[1, 1], 1, atol=4 * np.sqrt(24 / n) / 2)


@pytest.mark.parametrize("kind", ["fisher", "sandwich"])
def test_another_parametrisation_has_the_covariance_of_the_delta_method(kind, x64):
    """C' = J C J^T with J the Jacobian, at the optimum; off it, the curvature of the map would enter, times g."""
    x = jnp.asarray(_rng.laplace(2, 3, SIZE))
    loc, scale = gaussian.fit(x)
    change = lambda p: jnp.stack([p[0] + 2 * p[1], jnp.exp(p[1])])  # noqa: E731
    back = lambda q: jnp.stack([q[0] - 2 * jnp.log(q[1]), jnp.log(q[1])])  # noqa: E731
    nll = lambda p, x, key: gaussian.nll(x, p[0], log_scale=p[1])  # noqa: E731
    params = jnp.stack([loc, jnp.log(scale)])
    jacobian = jax.jit(jax.jacobian(change))(params)
    want = jacobian @ covariance(nll, params, x, kind=kind).matrix @ jacobian.T
    got = covariance(lambda q, x, key: nll(back(q), x, key), change(params), x, kind=kind).matrix
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_weights_of_the_covariance_are_repetitions(x64):
    params, (x, y) = classes("float64")
    rows = np.repeat(np.arange(SIZE), COUNTS)
    got = covariance(ridge, params + 1, (x, y), kind="sandwich", weights=jnp.asarray(COUNTS)).matrix
    want = covariance(ridge, params + 1, (x[rows], y[rows]), kind="sandwich").matrix
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * float(want.max()))


def test_vmap_of_the_covariance_is_each_alone(x64):
    params, (x, y) = classes("float64")
    xs = jnp.stack([x, 2 * x])
    together = jax.vmap(lambda x: covariance(ridge, params, (x, y), kind="sandwich"))(xs)
    for i in range(2):
        alone = covariance(ridge, params, (xs[i], y), kind="sandwich")
        for got, want in zip(together, alone, strict=True):
            np.testing.assert_allclose(got[i], want, rtol=0, atol=1e-13 * float(want.max()))


def regression(params, batch, key):
    return gaussian.nll(batch[1], params["slope"] * batch[0], log_scale=params["log_scale"])


@jax.jit
@jax.vmap
def fitted_and_judged(x, y):
    start = {"slope": jnp.array(0.0), "log_scale": jnp.array(0.0)}
    fit = fit_full_batch(regression, start, (x, y), gradient_tolerance=1e-4)
    return fit, *(covariance(regression, fit.params, (x, y), kind=k).standard_errors for k in ("fisher", "sandwich"))


@pytest.mark.parametrize(("noise", "kind"), [("equal", "fisher"), ("unequal", "sandwich")])
def test_the_standard_error_is_the_spread_over_data_sets(noise, kind):
    """1000 data sets are drawn, fitted and judged at once. Their spread has deviation 1 / sqrt(2 * 1000) of itself."""
    sets, n = 1000, 200
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (sets, n))
    scale = 1 if noise == "equal" else jnp.exp(x / 2)
    y = 3 * x + scale * jax.random.normal(keys[1], (sets, n))

    fit, *errors = fitted_and_judged(x, y)
    spread = float(jnp.std(fit.params["slope"]))
    ratios = dict(zip(("fisher", "sandwich"), [float(jnp.mean(e["slope"])) / spread for e in errors], strict=True))
    assert fit.converged.all()
    # Four of its deviations. The two params that were fitted to n examples add 3 / n of itself each.
    np.testing.assert_allclose(ratios[kind], 1, atol=4 / np.sqrt(2 * sets) + 6 / n)
    assert noise == "equal" or ratios["fisher"] < 0.8


BINARY = jnp.asarray(Y % 2, jnp.float32)
UNDETERMINED = {
    "the same feature twice": (logistic, jnp.zeros(2), (jnp.asarray(X[:, [0, 0]], jnp.float32), BINARY)),
    "a feature that is always 0": (logistic, jnp.zeros(2), (jnp.asarray(X[:, :2] * [1, 0], jnp.float32), BINARY)),
    "no minimum": (lambda p, x, key: -jnp.square(p - x), jnp.zeros(()), jnp.arange(3.0)),
    "NaN": (normal, standard("float32", jnp.nan), jnp.arange(3.0)),
}


@pytest.mark.parametrize("name", UNDETERMINED)
def test_what_the_data_do_not_determine_is_nan(name):
    nll, params, data = UNDETERMINED[name]
    got = covariance(nll, params, data, kind="sandwich")
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(got))


def test_without_any_weight_all_is_nan():
    got = covariance(normal, standard("float32"), jnp.arange(3.0), weights=jnp.zeros(3))
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(got))


# ---- Faults


@pytest.mark.parametrize("function", [fit_full_batch, covariance])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": jnp.zeros(3, "bfloat16")}, "params must be float32 or float64 arrays, got bfloat16[3]"),
        ({"params": jnp.zeros(3, int)}, "params must be float32 or float64 arrays, got int32[3]"),
        ({"data": (jnp.zeros(3), jnp.zeros(2))}, "expected data with one leading axis of examples, got shapes"),
        pytest.param({"weights": jnp.ones((3, 1))}, "weights must have the shape [3] of the examples, got float32[3, ",
                     marks=pytest.mark.wrong_types),
        ({"nll": lambda p, x, key: jnp.sum(p)}, "nll must return one loss for each of 3 examples, or mle"),
    ],
)  # fmt: skip
def test_a_fault_says_what_was_expected(function, change, message):
    given = {"nll": lambda p, x, key: jnp.sum(p) * x, "params": jnp.zeros(3), "data": jnp.zeros(3)} | change
    weights = {"weights": given["weights"]} if "weights" in given else {}
    with pytest.raises(ValueError, match=re.escape(f"{function.__name__}: {message}")) as caught:
        function(given["nll"], given["params"], given["data"], **weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "option", "message"),
    [
        (fit_full_batch, {"max_steps": 0}, "fit_full_batch: max_steps must be a whole number of at least 1, got 0"),
        (fit_full_batch, {"gradient_tolerance": -1.0}, "gradient_tolerance must be at least 0, got -1.0"),
        (fit_full_batch, {"gradient_tolerance": float("nan")}, "gradient_tolerance must be at least 0, got nan"),
        pytest.param(covariance, {"kind": "HC3"}, "covariance: kind must be one of fisher, sandwich, got 'HC3'",
                     marks=pytest.mark.wrong_types),
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_named(function, option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(normal, standard("float32"), jnp.arange(3.0), **option)
