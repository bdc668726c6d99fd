"""Exactness of the Gaussian functions, value and gradient, in units of u."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental import checkify

from jprob import gaussian

U = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}  # of the dtype computed in


def points(dtype):
    """x, loc, scale: the tails, the inflection point and its neighbours, scales whose square leaves float32."""
    yield from [(0.0, 0.0, 1.0), (30.0, 0.0, 1.0), (3.0, 2.0, 1.0), (1.0078125, 0.0, 1.0), (-5.0, 1.5, 0.25)]
    if dtype != "float16":
        yield from [(s * r, 0.0, s) for s in (1e-30, 1e-20, 1e20, 1e30) for r in (0.5, 1.0, 4.0)]


@pytest.fixture(params=U)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def check(got, terms, dtype):
    """Error at most 8 u of the sum of the magnitudes of the terms, and one rounding to the dtype."""
    want = oracles.mpmath.fsum(terms)
    size = oracles.mpmath.fsum(abs(t) for t in terms)
    rounding = float(jnp.finfo(got.dtype).eps) / 2 if got.dtype != jnp.float64 else 0
    assert abs(oracles.mpf(float(got)) - want) <= 8 * U[dtype] * size + rounding * abs(want) + float(
        jnp.finfo(got.dtype).tiny
    )


def test_log_prob_and_its_gradients_are_exact_at_any_scale(dtype):
    for point in points(dtype):
        args = [jnp.asarray(v, dtype) for v in point]
        value, (dx, dloc, dscale) = jax.value_and_grad(gaussian.log_prob, argnums=(0, 1, 2))(*args)
        assert value.dtype == jnp.promote_types(dtype, jnp.float32)
        assert {dx.dtype, dloc.dtype, dscale.dtype} == {args[0].dtype}
        x, loc, scale = (oracles.exactly(a)[0] for a in args)
        r = (x - loc) / scale
        terms = [-r * r / 2, -oracles.mpmath.log(scale), -oracles.mpmath.log(2 * oracles.mpmath.pi) / 2]
        assert abs(oracles.mpmath.fsum(terms) - oracles.gaussian_log_prob(x, loc, scale)) < 1e-100
        check(value, terms, dtype)
        for got, want in ((dx, -r / scale), (dloc, r / scale), (dscale, (r - 1) * (r + 1) / scale)):
            if abs(want) < float(jnp.finfo(got.dtype).max):
                check(got, [want], dtype)


def test_the_gradient_in_log_scale_is_r_squared_minus_1(dtype):
    for x, loc, log_scale in ((1.0, 0.0, 0.0), (2.0, -1.0, 0.5), (0.5, 0.0, -4.0), (1.0078125, 0.0, 0.0)):
        args = [jnp.asarray(v, dtype) for v in (x, loc)]
        log_scale = jnp.asarray(log_scale, dtype)
        f = lambda s, args=args: gaussian.log_prob(*args, log_scale=s)  # noqa: E731
        value, slope = jax.value_and_grad(f)(log_scale)
        x, loc, s = (oracles.exactly(a)[0] for a in (*args, log_scale))
        r = (x - loc) * oracles.mpmath.exp(-s)
        check(value, [-r * r / 2, -s, -oracles.mpmath.log(2 * oracles.mpmath.pi) / 2], dtype)
        # r carries a relative error of a few u, which (r - 1) (r + 1) turns into an absolute one of 2 r^2.
        check(slope, [r * r, oracles.mpf(-1)], dtype)


@pytest.mark.parametrize("log_scale", [-150.0, -89.0, 89.0, 150.0])
def test_a_log_scale_beyond_the_range_of_its_scale(log_scale):
    """exp(89) is inf in float32: at the mean r is 0 all the same, and the log-density near 88."""
    f = lambda s: gaussian.log_prob(jnp.array(0.0), 0.0, log_scale=s)  # noqa: E731
    value, slope = jax.value_and_grad(f)(jnp.array(log_scale))
    assert float(value) == pytest.approx(-log_scale - math.log(2 * math.pi) / 2, rel=1e-6)
    assert slope == -1


def test_it_integrates_to_1_and_squared_error_is_its_nll():
    x = jnp.linspace(-40.0, 40.0, 200_001)
    assert jnp.trapezoid(jnp.exp(gaussian.log_prob(x, 1.5, 2.0)), x) == pytest.approx(1, rel=1e-5)
    fixed = gaussian.log_prob(x, 0.5, 1.0)
    offset = fixed + (x - 0.5) ** 2 / 2
    assert offset == pytest.approx(-math.log(2 * math.pi) / 2, abs=801 * 2.0**-24 * 2)


def test_infinite_points_have_density_0():
    assert gaussian.log_prob(jnp.array([-jnp.inf, jnp.inf])).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_nan_and_named(scale):
    x = jnp.zeros(2)
    scales = jnp.array([scale, 1.0])
    assert jnp.isnan(gaussian.log_prob(x, 0.0, scales)).tolist() == [True, False]
    error, _ = checkify.checkify(gaussian.log_prob)(x, 0.0, scales)
    assert f"log_prob: scale {scale:.1f} is not positive" in error.get()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: gaussian.log_prob(x, 0.0, x, log_scale=x), "log_prob: expected scale or log_scale, got both"),
        (lambda x: gaussian.log_prob(jnp.arange(3)), "log_prob: x must be a floating-point array, got int32[3]"),
        (
            lambda x: gaussian.log_prob(x, jnp.zeros(2)),
            "expected shapes that broadcast together, got x float32[3], loc",
        ),
        (lambda x: gaussian.log_prob(x, 1j), "log_prob: loc must be real, got complex64[]"),
    ],
)
def test_a_static_fault_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(jnp.ones(3))
    assert "\n" not in str(caught.value)


RNG = np.random.default_rng(0)
R = [*RNG.uniform(-30, 30, 40), *RNG.uniform(-4.2, -3.8, 6), *RNG.uniform(-1, 1, 20), *RNG.normal(0, 1e-5, 4), 0.0]


def tiny(dtype):
    """The smallest normal number of the dtype computed in."""
    return float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).tiny)


@pytest.fixture(params=["float32", "float64"])
def wide(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def within(got, want, bound, dtype, size=None):
    """Error at most `bound` u of the truth (or of `size`), or one number that may be flushed to 0."""
    scale = abs(want if size is None else size)
    assert math.isfinite(got), (got, float(want))
    assert abs(oracles.mpf(float(got)) - want) <= bound * U[dtype] * scale + 4 * tiny(dtype), (got, float(want))


@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-30, 1e30])
def test_prob_cdf_and_log_cdf_keep_their_digits_to_30_sigma(wide, scale):
    scales = jnp.full(len(R), scale, wide)
    loc = scales * 0.3
    x = jnp.asarray(R, wide) * scales + loc
    results = {}
    for name in ("prob", "cdf", "log_cdf"):
        function = getattr(gaussian, name)
        slopes = jax.grad(lambda *a, f=function: jnp.sum(f(*a)), (0, 1, 2))(x, loc, scales)
        results[name] = [function(x, loc, scales), *slopes]
    largest = float(jnp.finfo(wide).max)
    for i, (a, b, s) in enumerate(zip(*map(oracles.exactly, (x, loc, scales)), strict=True)):
        r = (a - b) / s
        lower, upper = oracles.gaussian_cdf(a, b, s), oracles.gaussian_cdf(-a, -b, s)
        density = oracles.mpmath.exp(-r * r / 2) / (s * oracles.mpmath.sqrt(2 * oracles.mpmath.pi))
        hazard = density / lower
        tail, steep = 16 + 3 * float(r * r), 48 if r < 0 else 16 + 3 * float(r * r)
        log_lower = oracles.mpmath.log(lower) if r < 0 else oracles.mpmath.log1p(-upper)
        want = {
            "prob": [(density, tail), (-r * density / s, tail), (r * density / s, tail),
                     ((r * r - 1) * density / s, tail, (r * r + 1) * density / s)],
            "cdf": [(lower, tail if r < 0 else 16), (density, tail), (-density, tail), (-r * density, tail)],
            "log_cdf": [(log_lower, 16 if r < 0 else tail), (hazard, steep), (-hazard, steep), (-r * hazard, steep)],
        }  # fmt: skip
        for name, truths in want.items():
            for got, (truth, bound, *size) in zip(results[name], truths, strict=True):
                # Beyond 18.6 standard deviations exp(-r^2 / 4) itself is below the numbers of float32.
                if abs(truth) < largest and not (wide == "float32" and abs(r) > 18 and name != "log_cdf"):
                    within(float(got[i]), truth, bound, wide, *size)


def test_limits_at_infinity_have_gradient_0():
    ends = jnp.array([-jnp.inf, jnp.inf])
    assert gaussian.prob(ends).tolist() == [0, 0]
    assert gaussian.cdf(ends).tolist() == [0, 1]
    assert gaussian.log_cdf(ends).tolist() == [-math.inf, 0]
    for function in (gaussian.prob, gaussian.cdf):
        slopes = jax.grad(lambda *a, f=function: jnp.sum(f(*a)), (0, 1, 2))(ends, jnp.zeros(2), jnp.ones(2))
        assert jnp.stack(slopes).tolist() == [[0, 0]] * 3
    for order in (jax.grad, lambda f: jax.grad(jax.grad(f))):
        assert order(gaussian.log_cdf)(jnp.array(jnp.inf)) == 0
    assert gaussian.log_cdf(jnp.array(-1e18)) == pytest.approx(-5e35)


def test_quantile_is_the_inverse_of_cdf(wide):
    q = jnp.asarray([1e-30, 1e-6, 0.01, 0.13, 0.3, 0.4999, 0.5, 0.7, 0.9, 0.999], wide)
    r = gaussian.quantile(q)
    slope = jax.grad(lambda q: jnp.sum(gaussian.quantile(q)))(q)
    for got, p, d in zip(r, oracles.exactly(q), slope, strict=True):
        truth = oracles.mpf(float(got))
        for _ in range(8):  # Newton: each step doubles the digits
            density = oracles.mpmath.npdf(truth)
            truth -= (oracles.gaussian_cdf(truth, oracles.mpf(0), oracles.mpf(1)) - p) / density
        within(float(got), truth, 16, wide)
        within(float(d), 1 / oracles.mpmath.npdf(truth), 16 + 32 * float(truth**2), wide)
    ends = gaussian.quantile(jnp.array([0.0, 1.0, -0.1, 1.1]), 2.0, 1e-30)
    assert ends[:2].tolist() == [-math.inf, math.inf]
    assert jnp.isnan(ends[2:]).all()


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_interval_prob_keeps_its_digits_however_narrow(wide, scale):
    rng = np.random.default_rng(1)
    low = rng.uniform(-9, 9, 60)
    high = low + np.exp(rng.uniform(np.log(1e-6), np.log(20), 60))
    args = [jnp.asarray(v, wide) * scale for v in (low, high, np.full(60, 0.3), np.ones(60))]
    value = gaussian.interval_prob(*args)
    slopes = jax.grad(lambda *a: jnp.sum(gaussian.interval_prob(*a)), (0, 1, 2, 3))(*args)
    for i, (a, b, loc, s) in enumerate(zip(*map(oracles.exactly, args), strict=True)):
        p, q = (a - loc) / s, (b - loc) / s
        near, far = (0 if p < 0 < q else float(min(abs(p), abs(q))), float(min(abs(p), abs(q))))
        within(float(value[i]), oracles.gaussian_interval_prob(a, b, loc, s), 24 + 3 * near**2, wide)
        at_low, at_high = (oracles.mpmath.npdf(r) / s for r in (p, q))
        within(float(slopes[0][i]), -at_low, 16 + 3 * float(p * p), wide)
        within(float(slopes[1][i]), at_high, 16 + 3 * float(q * q), wide)
        within(float(slopes[2][i]), at_low - at_high, 32 + 4 * far**2, wide)
        size = abs(p * (at_high - at_low)) + (q - p) * at_high
        within(float(slopes[3][i]), p * at_low - q * at_high, 32 + 4 * far**2, wide, size)


def test_interval_prob_has_its_corner_cases():
    inf = jnp.inf
    low = jnp.array([-inf, 0.0, -inf, inf, 1.0, -inf, 5.0])
    high = jnp.array([inf, inf, 0.0, inf, 1.0, -inf, inf])
    got = gaussian.interval_prob(low, high)
    assert got[:6].tolist() == [1, 0.5, 0.5, 0, 0, 0]
    assert got[6] == pytest.approx(2.866516e-07, rel=1e-6)
    slopes = jax.grad(lambda *a: jnp.sum(gaussian.interval_prob(*a)), (0, 1, 2, 3))(
        low, high, jnp.zeros(7), jnp.ones(7)
    )
    assert jnp.isfinite(jnp.stack(slopes)).all()
    error, value = checkify.checkify(gaussian.interval_prob)(jnp.ones(1), jnp.zeros(1))
    assert "interval_prob: low 1.0 is above high" in error.get()
    assert jnp.isnan(value).all()
    inside = gaussian.interval_prob(-jnp.arange(1.0, 4.0), jnp.arange(1.0, 4.0))
    assert inside == pytest.approx([0.682689492, 0.954499736, 0.997300204], rel=16 * 2.0**-24)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-3, 0.1, 0.3, 1.0, 5.0])
def test_kl_and_cross_entropy_keep_the_digits_of_near_equal_scales(wide, scale, gap):
    p_scale = jnp.asarray([scale * math.exp(gap), scale * math.exp(-gap), scale, scale * math.exp(gap)], wide)
    q_scale = jnp.full(4, scale, wide)
    p_loc = jnp.asarray([0.0, 0.0, scale * gap, -scale * gap], wide)
    args = [p_loc, p_scale, jnp.zeros(4, wide), q_scale]
    value, cost = gaussian.kl_divergence(*args), gaussian.cross_entropy(*args)
    slopes = jax.grad(lambda *a: jnp.sum(gaussian.kl_divergence(*a)), (0, 1, 2, 3))(*args)
    same = jax.grad(lambda *a: jnp.sum(gaussian.cross_entropy(*a)), (0, 2, 3))(*args)
    assert (value >= 0).all()
    for i, (a, p, b, q) in enumerate(zip(*map(oracles.exactly, args), strict=True)):
        truth = oracles.gaussian_kl_divergence(a, p, b, q)
        within(float(value[i]), truth, 16, wide)
        square, excess = ((a - b) / q) ** 2, (p / q - 1) * (p / q + 1)
        size = abs(oracles.mpmath.log(q)) + 1 + ((p / q) ** 2 + square) / 2
        within(float(cost[i]), oracles.gaussian_cross_entropy(a, p, b, q), 8, wide, size)
        wants = ((a - b) / q**2, excess / p, -(a - b) / q**2, -(excess + square) / q)
        sizes = (None, None, None, (abs(excess) + square) / q)
        for got, want, total in zip(slopes, wants, sizes, strict=True):
            within(float(got[i]), want, 16, wide, total)
        for got, j in zip(same, (0, 2, 3), strict=True):
            within(float(got[i]), wants[j], 16, wide, sizes[j])
    if gap == 0:
        assert value.tolist() == [0] * 4
        assert not jnp.stack(slopes).any()


def test_kl_of_scales_that_share_no_digit_is_their_log_ratio():
    assert gaussian.kl_divergence(0.0, 1e-30, 0.0, 1e30) == pytest.approx(60 * math.log(10) - 0.5, rel=1e-6)
    assert gaussian.kl_divergence(0.0, 1e30, 0.0, 1e-30) == math.inf


def test_cross_entropy_is_entropy_plus_kl_and_nll_where_p_is_a_point():
    args = (jnp.array(0.3), 1.7, -0.4, 0.9)
    assert gaussian.cross_entropy(*args) == pytest.approx(gaussian.entropy(1.7) + gaussian.kl_divergence(*args))
    assert gaussian.cross_entropy(args[0], 0.0, -0.4, 0.9) == pytest.approx(gaussian.nll(args[0], -0.4, 0.9))


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.25, 3.0, 1e-30, 1e30])
def test_beta_nll_weighs_the_gradient_by_a_constant(wide, beta, scale):
    x, loc, s = (jnp.asarray(v, wide) for v in (1.5 * scale, 0.25 * scale, scale))
    slopes = jax.grad(lambda *a: gaussian.nll(*a, beta=beta), (0, 1, 2))(x, loc, s)
    a, b, c = (oracles.exactly(v)[0] for v in (x, loc, s))
    r, weight = (a - b) / c, c ** (2 * oracles.mpf(beta) - 1)
    bound = 16 if beta in (0, 0.5, 1) else 16 + 2 * abs(math.log(scale))
    for got, want in zip(slopes, (r * weight, -r * weight, (1 - r * r) * weight), strict=True):
        within(float(got), want, bound, wide)
    if abs(math.log(scale)) < 2:
        by_log = jax.grad(lambda t: gaussian.nll(x, loc, log_scale=t, beta=beta))(jnp.log(s))
        assert by_log == pytest.approx(float((1 - r * r) * weight * c), rel=1e-5)
        plain = -gaussian.log_prob(x, loc, s) * s ** (2 * beta)
        assert gaussian.nll(x, loc, s, beta=beta) == pytest.approx(float(plain), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
@pytest.mark.parametrize("spread", [1.0, 1e-30, 1e30])
def test_fit_keeps_its_digits_beside_a_large_mean(wide, offset, spread):
    rng = np.random.default_rng(2)
    x = jnp.asarray(offset * spread + spread * rng.normal(size=100), wide)
    w = jnp.asarray(rng.uniform(0, 2, 100), wide)
    loc, scale = gaussian.fit(x, weights=w)
    values, probs = oracles.exactly(x), oracles.exactly(w)
    root = oracles.mpmath.sqrt(oracles.variance(values, probs))
    within(float(loc), oracles.mean(values, probs), 23, wide, abs(oracles.mean(values, probs)) + root)
    within(float(scale), root, 23, wide)


def test_fit_is_where_the_likelihood_is_highest():
    x, w = jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([1.0, 0.5, 2.0, 1.0])
    slopes = jax.grad(lambda p: jnp.sum(w * gaussian.nll(x, *p)))(gaussian.fit(x, weights=w))
    assert jnp.abs(jnp.stack(slopes)).max() < 1e-5
    twice = gaussian.fit(jnp.array([1.0, 2.0, 2.0]))
    assert jnp.stack(gaussian.fit(jnp.array([1.0, 2.0]), weights=jnp.array([1.0, 2.0]))) == pytest.approx(
        jnp.stack(twice)
    )


def test_fit_without_spread_or_weight_has_gradient_0():
    total = lambda x, w: sum(gaussian.fit(x, weights=w))  # noqa: E731
    assert gaussian.fit(jnp.full(3, 0.1)) == (jnp.float32(0.1), 0)
    assert jax.grad(total)(jnp.full(4, 0.1), jnp.ones(4)).tolist() == [0.25] * 4
    assert jnp.isnan(jnp.stack(gaussian.fit(jnp.ones(3), weights=jnp.zeros(3)))).all()
    assert jax.grad(total)(jnp.ones(3), jnp.zeros(3)).tolist() == [0] * 3
    unseen = gaussian.fit(jnp.array([1.0, 3.0, jnp.nan, jnp.inf]), weights=jnp.array([1.0, 1.0, 0.0, 0.0]))
    assert unseen == (2, 1)
    error, value = checkify.checkify(lambda w: gaussian.fit(jnp.ones(2), weights=w))(jnp.array([1.0, -1.0]))
    assert "fit: weight -1.0 is negative" in error.get()
    assert jnp.isnan(value.loc)


def test_samples_have_the_shape_asked_for_and_the_distribution_given():
    key = jax.random.key(0)
    loc, scale = jnp.array([0.0, 5.0]), jnp.array([1e-3, 2.0])
    x = gaussian.sample(key, loc, scale, shape=(100_000, 2))
    got = gaussian.fit(x, axis=0)
    # Five standard errors of a mean and of a standard deviation.
    assert (jnp.abs(got.loc - loc) < 5 * scale / 100_000**0.5).all()
    assert (jnp.abs(got.scale / scale - 1) < 5 / 200_000**0.5).all()
    assert gaussian.sample(key, loc, 1.0).shape == (2,)
    noise = gaussian.sample(key)
    slopes = jax.grad(lambda *a: gaussian.sample(key, *a), (0, 1))(3.0, 0.5)
    assert slopes == (1, noise)
    with pytest.raises(ValueError, match=re.escape("sample: shape must end in [2], the shape of loc and scale")):
        gaussian.sample(key, loc, shape=(3,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: gaussian.nll(x, beta=2.0), "nll: beta must be in [0, 1], got 2.0"),
        (lambda x: gaussian.fit(x, axis=1), "fit: axis must be an axis of x float32[3] that is not empty, got 1"),
        (lambda x: gaussian.fit(x[:0]), "fit: axis must be an axis of x float32[0] that is not empty, got -1"),
        (
            lambda x: gaussian.fit(x, weights=jnp.ones((2, 3))),
            "fit: weights must broadcast to [3] of x, got float32[2, 3]",
        ),
        (lambda x: gaussian.entropy(1j), "entropy: scale must be real, got complex64[]"),
        (
            lambda x: gaussian.interval_prob(x, jnp.arange(3)),
            "interval_prob: high must be a floating-point array, got int32[3]",
        ),
    ],
)
def test_a_static_fault_of_the_others_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(jnp.ones(3))
    assert "\n" not in str(caught.value)
