"""Exactness of the Gaussian functions, value and gradient, in units of u."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jprob
from jprob import gaussian

U = {"bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}  # of the dtype computed in
# The formulas are the same in float64, the coefficients of its series are not.
WIDTHS = ["float64", pytest.param("float32", marks=pytest.mark.optimized),
          pytest.param("float64", marks=[pytest.mark.optimized, pytest.mark.slow], id="float64 as is")]  # fmt: skip
WIDE = {"bfloat16": "float32", "float32": "float32", "float64": "float64"}  # the dtype computed in

RNG = np.random.default_rng(0)
# The tails, the turn to the continued fraction at -4, the mean; one standard deviation, where r^2 - 1 is 0.
R = [*np.linspace(-30, 30, 9), *RNG.uniform(-4.2, -3.8, 3), *RNG.uniform(-2, 2, 4), 1e-5, 1.0, -1.0, 1 + 2e-7, 1.01]
SCALES = {
    "bfloat16": [1e-30, 0.37, 1e30, 3e38],
    "float32": [1.2e-38, 1e-30, 1e-20, 0.37, 1, 1e20, 1e30, 8e37, 3e38],
    "float64": [2.3e-308, 1e-200, 1e-30, 1, 1e30, 1e200, 1.7e308],
}


def regimes(dtype):
    """x, loc and scale: every r at every scale, where they are numbers of the dtype and not below its normal ones."""
    r, scale = (a.ravel() for a in np.meshgrid(R, SCALES[dtype]))
    scale = jnp.asarray(scale, dtype)
    # A mean next to which x - loc is rounded.
    with np.errstate(over="ignore", invalid="ignore"):
        loc = jnp.asarray(np.resize([0.0, 0.3, -1.7], r.size) * np.asarray(scale, np.float64), dtype)
        x = jnp.asarray(r * np.asarray(scale, np.float64) + np.asarray(loc, np.float64), dtype)
    keep = np.ones(r.size, bool)
    for value in (x, loc):
        size = np.abs(np.asarray(value, np.float64))
        keep &= np.isfinite(size) & ((size == 0) | (size >= float(jnp.finfo(dtype).tiny)))
    assert keep.sum() >= 0.7 * r.size
    return [value[keep] for value in (x, loc, scale)]


def with_slopes(function, *args):
    """Value and gradients of every example, in one compiled call."""
    value, slopes = jax.jit(jax.vmap(jax.value_and_grad(function, tuple(range(len(args))))))(*args)
    assert value.dtype == WIDE[args[0].dtype.name]
    assert {slope.dtype for slope in slopes} == {args[0].dtype}
    return [value, *slopes]


def tiny(dtype):
    """The smallest normal number of the dtype computed in."""
    return float(jnp.finfo(WIDE[dtype]).tiny)


def within(got, want, bound, dtype, size=None, out=None):
    """Error at most `bound` u of the truth (or of `size`), with one rounding to `out`; or a number flushed to 0."""
    out = jnp.finfo(WIDE[dtype] if out is None else out)
    if abs(want) > float(out.max) / 2:  # next to which r^2 itself is beyond the range
        assert abs(got) > float(out.max) / 4
        return
    assert math.isfinite(got), (got, float(want))
    rounding = float(out.eps) / 2 * abs(want) if out.bits == 16 else 0
    error = abs(oracles.mpf(float(got)) - want)
    assert error <= bound * U[dtype] * abs(want if size is None else size) + rounding + 4 * float(out.tiny), (
        got,
        float(want),
    )


@pytest.fixture(params=WIDTHS)
def wide(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture(params=["bfloat16", *WIDTHS])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def truths(x, loc, scale):
    """For each function what value and gradients should be, each with its bound, and what the error is relative to."""
    mp = oracles.mpmath
    r = (x - loc) / scale
    lower, upper = oracles.gaussian_cdf(x, loc, scale), oracles.gaussian_cdf(-x, -loc, scale)
    density = mp.exp(-r * r / 2) / (scale * mp.sqrt(2 * mp.pi))
    hazard = density / lower
    tail = 16 + 3 * float(r * r)
    steep = 48 if r < 0 else tail
    value = oracles.gaussian_log_prob(x, loc, scale)
    terms = r * r / 2 + abs(mp.log(scale)) + mp.log(2 * mp.pi) / 2
    slope, excess = r / scale, (r - 1) * (r + 1)
    return {
        "log_prob": [(value, 8, terms), (-slope, 8), (slope, 8), (excess / scale, 8)],
        "nll": [(-value, 8, terms), (slope, 8), (-slope, 8), (-excess / scale, 8)],
        "prob": [(density, tail), (-density * slope, tail), (density * slope, tail), (excess * density / scale, tail)],
        "cdf": [(lower, tail if r < 0 else 16), (density, tail), (-density, tail), (-r * density, tail)],
        "log_cdf": [(mp.log(lower) if r < 0 else mp.log1p(-upper), 16 if r < 0 else tail), (hazard, steep),
                    (-hazard, steep), (-r * hazard, steep)],
    }  # fmt: skip


def test_every_function_of_a_point_is_exact_at_any_scale_to_30_sigma(dtype):
    args = regimes(dtype)
    results = {
        name: with_slopes(getattr(gaussian, name), *args) for name in ("log_prob", "nll", "prob", "cdf", "log_cdf")
    }
    for i, point in enumerate(zip(*map(oracles.exactly, args), strict=True)):
        r = (point[0] - point[1]) / point[2]
        for name, wants in truths(*point).items():
            # Beyond 18.6 standard deviations exp(-r^2 / 4) itself is below the numbers of float32.
            if name in ("prob", "cdf") and dtype != "float64" and abs(r) > 18:
                continue
            for k, (got, want) in enumerate(zip(results[name], wants, strict=True)):
                if name == "log_cdf" and k > 0 and dtype != "float64" and r > 18:
                    continue
                truth, bound, *size = want
                within(float(got[i]), truth, bound, dtype, *size, out=got.dtype)


@pytest.mark.parametrize("beta", [0.0, pytest.param(0.25, marks=pytest.mark.slow), 1.0])
def test_a_log_scale_is_as_good_as_its_exponential(wide, beta):
    logs = [s for s in (-80.0, -60.0, -1.5, 0.0, 2.25, 60.0, 80.0) if beta == 0 or abs(2 * beta * s) < 60]
    x, log_scale = (jnp.asarray(a.ravel(), wide) for a in np.meshgrid(R, logs))
    args = [x * jnp.exp(log_scale / 2), 0 * x, log_scale]
    calls = {"nll": lambda x, loc, s: gaussian.nll(x, loc, log_scale=s, beta=beta)}
    if beta == 0:
        calls |= {"log_prob": lambda x, loc, s: gaussian.log_prob(x, loc, log_scale=s),
                  "prob": lambda x, loc, s: gaussian.prob(x, loc, log_scale=s)}  # fmt: skip
    results = {name: with_slopes(call, *args) for name, call in calls.items()}
    mp = oracles.mpmath
    for i, (a, b, s) in enumerate(zip(*map(oracles.exactly, args), strict=True)):
        scale = mp.exp(s)
        r, size = (a - b) / scale, abs(float(s))
        value, terms = oracles.gaussian_log_prob(a, b, scale), (a - b) ** 2 / scale**2 / 2 + abs(s) + 1
        weight, density = mp.exp(2 * beta * s), mp.exp(value)
        plain, tail = 8 + size + (8 + 2 * size) * (beta > 0), (16 + 4 * size) * (1 + float(r * r))
        slopes = (r / scale, -r / scale, 1 - r * r)
        wants = {"nll": [(-value * weight, plain, terms * weight)] + [(w * weight, plain) for w in slopes]}
        wants["nll"][3] = ((1 - r * r) * weight, plain, (1 + r * r) * weight)
        wants["log_prob"] = [(value, plain, terms), *((-w, plain) for w in slopes[:2]), (r * r - 1, plain, 1 + r * r)]
        wants["prob"] = [(density, tail), *((-w * density, tail) for w in slopes[:2]),
                         ((r * r - 1) * density, tail, (1 + r * r) * density)]  # fmt: skip
        for name, result in results.items():
            if name == "prob" and abs(r) > 18:
                continue
            for got, (truth, bound, *relative) in zip(result, wants[name], strict=True):
                within(float(got[i]), truth, bound, wide, *relative, out=got.dtype)


def test_a_log_scale_beyond_the_range_of_its_scale_leads_back():
    x, log_scale = jnp.array([0.0, 1.0]), jnp.array([100.0, 100.0])
    for log in (log_scale, -log_scale):
        value, *_, slope = with_slopes(lambda x, loc, s: gaussian.nll(x, loc, log_scale=s), x, 0 * x, log)
        assert value[0] == pytest.approx(float(log[0]) + 0.9189385)
        assert slope[0] == 1
        assert slope[1] * log[1] > 0 or value[1] == math.inf


def test_infinite_points_have_density_0():
    assert gaussian.log_prob(jnp.array([-jnp.inf, jnp.inf])).tolist() == [-math.inf, -math.inf]
    ends, logs = jnp.array([-jnp.inf, jnp.inf] * 2), jnp.repeat(jnp.array([-80.0, 80.0]), 2)
    values = with_slopes(lambda x, s: gaussian.prob(x, log_scale=s), ends, logs)
    assert jnp.stack(values).tolist() == [[0] * 4] * 3
    assert gaussian.nll(ends, log_scale=logs).tolist() == [math.inf] * 4


def test_a_difference_of_infinities_is_undefined():
    assert jnp.isnan(gaussian.log_prob(jnp.array(jnp.inf), jnp.inf))
    assert gaussian.log_prob(jnp.array(3e38), -3e38, 3e38) == pytest.approx(-2 - math.log(3e38) - 0.9189385, rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_not_positive_and_finite_is_nan_and_named(scale):
    x = jnp.zeros(2)
    scales = jnp.array([scale, 1.0])
    error, value = jprob.checkify(gaussian.log_prob)(x, 0.0, scales)
    assert jnp.isnan(value).tolist() == [True, False]
    assert f"log_prob: scale {scale:.1f} is not positive" in error.get()


@pytest.mark.parametrize("function", [gaussian.log_prob, gaussian.prob, gaussian.log_cdf])
@pytest.mark.parametrize("scale", [1e-38, 1e-45])
def test_a_subnormal_scale_is_not_positive(function, scale):
    args = jnp.zeros(()), jnp.zeros(()), jnp.float32(scale)
    assert jnp.isnan(function(*args))
    slopes = jax.jit(jax.grad(lambda *args: jnp.where(False, function(*args), 0.0), (0, 1, 2)))(*args)
    chex.assert_trees_all_equal(slopes, (jnp.zeros(()),) * 3)


@pytest.mark.parametrize("name", ["log_prob", "prob", "nll"])
def test_scale_and_log_scale_exclude_each_other_in_every_mode(name):
    call = lambda *a: getattr(gaussian, name)(jnp.array(0.5), *a, log_scale=0.5)  # noqa: E731
    for scale in (2.0, 1.0, jnp.array(2.0)):
        with jax.disable_jit(), pytest.raises(ValueError, match=f"{name}: expected scale or log_scale, got both"):
            call(0.0, scale)
        with pytest.raises(ValueError, match=f"{name}: expected scale or log_scale, got both"):
            call(0.0, scale)


def test_limits_at_infinity_have_gradient_0():
    ends = jnp.array([-jnp.inf, jnp.inf])
    assert gaussian.prob(ends).tolist() == [0, 0]
    assert gaussian.cdf(ends).tolist() == [0, 1]
    assert gaussian.log_cdf(ends).tolist() == [-math.inf, 0]
    for function in (gaussian.prob, gaussian.cdf):
        _, *slopes = with_slopes(function, ends, jnp.zeros(2), jnp.ones(2))
        assert jnp.stack(slopes).tolist() == [[0, 0]] * 3
    orders = [jax.grad(gaussian.log_cdf), jax.grad(jax.grad(gaussian.log_cdf))]
    assert jax.jit(lambda x: [order(x) for order in orders])(jnp.inf) == [0, 0]
    assert gaussian.log_cdf(jnp.array(-1e18)) == pytest.approx(-5e35)


@functools.cache
def _quantile(p):
    """Newton's method, each step of which doubles the digits, on log Phi, which is concave."""
    r = oracles.mpf(0)
    if p == 0.5:
        return r
    if p > 0.5:
        return -_quantile(1 - p)
    for _ in range(40):
        total = oracles.gaussian_cdf(r, oracles.mpf(0), oracles.mpf(1))
        r -= oracles.mpmath.log(total / p) * total / oracles.mpmath.npdf(r)
    return r


def test_quantile_is_the_inverse_of_cdf_at_any_scale(dtype):
    q = [1e-30, 1e-12, 1e-6, 2.44e-4, 0.01, 0.13, 0.3, 0.4999, 0.5, 0.7, 0.9, 0.99]
    q = [p for p in q if p > float(jnp.finfo(dtype).tiny)]
    scale = [s for s in SCALES[dtype] if s < float(jnp.finfo(dtype).max) / 20]
    q, scale = (jnp.asarray(a.ravel(), dtype) for a in np.meshgrid(q, scale))
    value, *slopes = with_slopes(gaussian.quantile, q, scale, scale)
    for i, (p, loc, s) in enumerate(zip(*map(oracles.exactly, (q, scale, scale)), strict=True)):
        r = _quantile(p)
        within(float(value[i]), loc + s * r, 16, dtype, abs(loc) + abs(s * r))
        wants = s / oracles.mpmath.npdf(r), oracles.mpf(1), r
        for got, want, bound in zip(slopes, wants, (32, 0, 16), strict=True):
            within(float(got[i]), want, bound, dtype, out=got.dtype)
    ends = gaussian.quantile(jnp.array([0.0, 1.0, -0.1, 1.1]), 2.0, 1e-30)
    assert ends[:2].tolist() == [-math.inf, math.inf]
    assert jnp.isnan(ends[2:]).all()


def test_interval_prob_keeps_its_digits_however_narrow(wide):
    rng = np.random.default_rng(1)
    scale = np.repeat(SCALES[wide], 24)
    low = rng.uniform(-9, 9, scale.size)
    high = low + np.exp(rng.uniform(np.log(1e-6), np.log(20), scale.size))
    keep = (scale < float(jnp.finfo(wide).max) / 40) & (scale > tiny(wide) * 4)
    args = [jnp.asarray(v[keep] * scale[keep], wide) for v in (low, high, np.full_like(low, 0.3), np.ones_like(low))]
    value, *slopes = with_slopes(gaussian.interval_prob, *args)
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


def test_log_interval_prob_is_exact_in_both_tails_narrow_and_wide(wide):
    rng = np.random.default_rng(1)
    low = np.concatenate([rng.uniform(-9, 9, 60), rng.uniform(-60, 60, 60), [14, 40, 5, -1e4]])
    high = low + np.concatenate([np.exp(rng.uniform(np.log(1e-4), np.log(20), 120)), [6, 0.01, np.inf, 3]])
    scale = np.resize([1e-30, 1, 1e30], low.size)
    args = [jnp.asarray(v * scale, wide) for v in (low, high, np.full_like(low, 0.3), np.ones_like(low))]
    value, *slopes = with_slopes(gaussian.log_interval_prob, *args)
    for i, (a, b, loc, s) in enumerate(zip(*map(oracles.exactly, args), strict=True)):
        p, q = (a - loc) / s, (b - loc) / s
        want = oracles.gaussian_log_interval_prob(p, q)
        at_low, at_high = (0 if oracles.mpmath.isinf(r) else oracles.mpmath.exp(-r * r / 2 - want) for r in (p, q))
        at_low, at_high = (at / oracles.mpmath.sqrt(2 * oracles.mpmath.pi) for at in (at_low, at_high))
        q = p if oracles.mpmath.isinf(q) else q
        near, straddles = min(abs(p), abs(q)), p < 0 < q
        within(float(value[i]), want, 24 + 3 * float(near**2) * straddles, wide)
        # The bound is 3 u more for each power of e: the density is so far below that at the mean or the nearer end.
        for got, r, at in ((slopes[0], p, -at_low), (slopes[1], q, at_high)):
            at = at if abs(at) > tiny(wide) else 0 * s
            within(float(got[i]), at / s, 24 + 1.5 * float(r * r - near**2 * (not straddles)), wide)
        far = 24 + 1.5 * float(max(abs(p), abs(q)) ** 2) * straddles
        within(float(slopes[2][i]), (at_low - at_high) / s, far, wide, (at_low + at_high) / s if straddles else None)
        size = (
            abs(p * (at_low - at_high)) + (q - p) * at_high if p > 0 else abs(q * (at_low - at_high)) + (q - p) * at_low
        )
        within(float(slopes[3][i]), (p * at_low - q * at_high) / s, far, wide,
               (abs(p) * at_low + abs(q) * at_high if straddles else size) / s)  # fmt: skip


def test_log_interval_prob_has_its_corner_cases():
    inf = jnp.inf
    low, high = jnp.array([-inf, 1.0, inf, -inf, 2.0]), jnp.array([inf, 1.0, inf, 0.0, 1.0])
    value, *slopes = with_slopes(gaussian.log_interval_prob, low, high)
    assert value.tolist()[:3] == [0, -inf, -inf]
    assert value[3] == pytest.approx(math.log(0.5))
    assert jnp.isnan(value[4])
    assert jnp.stack(slopes)[:, jnp.array([0, 1, 2, 4])].tolist() == [[0] * 4] * 2


def test_interval_prob_has_its_corner_cases():
    inf = jnp.inf
    low = jnp.array([-inf, 0.0, -inf, inf, 1.0, -inf, 5.0])
    high = jnp.array([inf, inf, 0.0, inf, 1.0, -inf, inf])
    got = gaussian.interval_prob(low, high)
    assert got[:6].tolist() == [1, 0.5, 0.5, 0, 0, 0]
    assert got[6] == pytest.approx(2.866516e-07, rel=1e-6)
    _, *slopes = with_slopes(gaussian.interval_prob, low, high, jnp.zeros(7), jnp.ones(7))
    assert jnp.isfinite(jnp.stack(slopes)).all()
    inside = gaussian.interval_prob(-jnp.arange(1.0, 4.0), jnp.arange(1.0, 4.0))
    assert inside == pytest.approx([0.682689492, 0.954499736, 0.997300204], rel=16 * 2.0**-24)


def test_kl_and_cross_entropy_keep_the_digits_of_near_equal_scales(dtype):
    gaps = np.array([0.0, 1e-6, 1e-3, 0.1, 0.3, 1.0, 5.0])
    scale, gap, p_loc, widen = (a.ravel() for a in np.meshgrid(SCALES[dtype], gaps, [0.0, -1.0], [-1.0, 0.0, 1.0]))
    least, most = float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).max) / 200
    keep = (scale > 200 * least) & (scale < most) & ((p_loc * gap == 0) | (scale > least / np.maximum(gap, 1e-9)))
    scale, gap, p_loc, widen = (v[keep] for v in (scale, gap, p_loc, widen))
    args = [jnp.asarray(v, dtype) for v in (scale * p_loc * gap, scale * np.exp(widen * gap), 0 * scale, scale)]
    value, *slopes = with_slopes(gaussian.kl_divergence, *args)
    cost, *steps = with_slopes(gaussian.cross_entropy, *args)
    assert (value >= 0).all()
    for i, (a, p, b, q) in enumerate(zip(*map(oracles.exactly, args), strict=True)):
        within(float(value[i]), oracles.gaussian_kl_divergence(a, p, b, q), 16, dtype)
        square, excess = ((a - b) / q) ** 2, (p / q - 1) * (p / q + 1)
        size = abs(oracles.mpmath.log(q)) + 1 + ((p / q) ** 2 + square) / 2
        within(float(cost[i]), oracles.gaussian_cross_entropy(a, p, b, q), 8, dtype, size)
        wants = ((a - b) / q**2, excess / p, -(a - b) / q**2, -(excess + square) / q)
        sizes = (None, None, None, (abs(excess) + square) / q)
        for k, (want, total) in enumerate(zip(wants, sizes, strict=True)):
            within(float(slopes[k][i]), want, 16, dtype, total, out=slopes[k].dtype)
            if k != 1:
                within(float(steps[k][i]), want, 16, dtype, total, out=steps[k].dtype)
        within(float(steps[1][i]), p / q**2, 16, dtype, out=steps[1].dtype)
        if a == b and p == q:
            assert value[i] == 0
            assert not any(slope[i] for slope in slopes)


def test_kl_with_log_scales_keeps_the_digits_of_what_a_vae_predicts(wide):
    gap = np.array([0.0, 1e-6, 1e-3, 0.1, 1.0, -5.0, 20.0])
    loc, q_log, gap = (a.ravel() for a in np.meshgrid([0.0, 1e-3, 2.0], [0.0, 0.7, -3.0], gap))
    args = [jnp.asarray(v, wide) for v in (loc, q_log + gap, q_log)]
    call = lambda loc, p, q: gaussian.kl_divergence(loc, p_log_scale=p, q_log_scale=q)  # noqa: E731
    value, *slopes = with_slopes(call, *args)
    for i, (a, p, q) in enumerate(zip(*map(oracles.exactly, args), strict=True)):
        d, square, size = p - q, a**2 * oracles.mpmath.exp(-2 * q), 16 + 4 * abs(float(p)) + 4 * abs(float(q))
        excess = oracles.mpmath.expm1(2 * d)
        within(float(value[i]), (excess - 2 * d + square) / 2, size, wide)
        wants = a * oracles.mpmath.exp(-2 * q), excess, -excess - square
        for got, want, total in zip(slopes, wants, (None, None, abs(excess) + square), strict=True):
            within(float(got[i]), want, size, wide, total)
    standard = gaussian.kl_divergence(args[0], p_log_scale=args[1])
    np.testing.assert_array_equal(standard, gaussian.kl_divergence(args[0], p_log_scale=args[1], q_log_scale=0.0))
    noise = [
        gaussian.sample(jax.random.key(0), args[0], **s) for s in ({"log_scale": args[2]}, {"scale": jnp.exp(args[2])})
    ]
    np.testing.assert_array_equal(*noise)


def test_kl_of_scales_that_share_no_digit_is_their_log_ratio():
    assert gaussian.kl_divergence(0.0, 1e-30, 0.0, 1e30) == pytest.approx(60 * math.log(10) - 0.5, rel=1e-6)
    assert gaussian.kl_divergence(0.0, 1e30, 0.0, 1e-30) == math.inf


# The law above tries a beta of 1, with a log_scale.
@pytest.mark.parametrize("beta", [0.5, *(pytest.param(beta, marks=pytest.mark.slow) for beta in (0.25, 1.0))])
def test_beta_nll_weighs_the_gradient_by_a_constant(wide, beta):
    args = regimes(wide)
    usual = (args[2] > 1e-15) & (args[2] < 1e15)  # scales whose weight is in the range of the dtype
    args = [value[usual] for value in args]
    value, *slopes = with_slopes(lambda *a: gaussian.nll(*a, beta=jnp.asarray(beta)), *args)
    for i, (a, b, c) in enumerate(zip(*map(oracles.exactly, args), strict=True)):
        r, weight, log_scale = (a - b) / c, c ** (2 * oracles.mpf(beta)), oracles.mpmath.log(c)
        bound = 16 + 2 * abs(float(log_scale))
        terms = (r * r / 2 + abs(log_scale) + 1) * weight
        within(float(value[i]), -oracles.gaussian_log_prob(a, b, c) * weight, bound, wide, terms)
        wants = (r * weight / c, -r * weight / c, (1 - r * r) * weight / c)
        for got, want in zip(slopes, wants, strict=True):
            within(float(got[i]), want, bound, wide)


def test_beta_is_traced_and_its_default_costs_nothing():
    x, scale = jnp.array([0.3, -2.0]), jnp.array([0.5, 2.0])
    programs = [str(jax.make_jaxpr(lambda x, beta=beta: gaussian.nll(x, 0.0, scale, **beta))(x))
                for beta in ({}, {"beta": 0.0}, {"beta": 0})]  # fmt: skip
    assert len(set(programs)) == 1
    swept = jax.vmap(lambda beta: gaussian.nll(x, 0.0, scale, beta=beta))(jnp.array([0.0, 0.5, 2.0]))
    assert swept[0] == pytest.approx(gaussian.nll(x, 0.0, scale))
    assert swept[1] == pytest.approx(gaussian.nll(x, 0.0, scale, beta=0.5))
    assert jnp.isnan(swept[2]).all()
    assert jax.grad(lambda x: gaussian.nll(x[0], beta=jnp.array(2.0)))(x).tolist() == [0, 0]


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


def test_fit_without_spread_or_weight_has_gradient_0():
    total = lambda x, w: sum(gaussian.fit(x, weights=w))  # noqa: E731
    assert gaussian.fit(jnp.full(3, 0.1)) == (jnp.float32(0.1), 0)
    assert jax.grad(total)(jnp.full(4, 0.1), jnp.ones(4)).tolist() == [0.25] * 4
    assert jnp.isnan(jnp.stack(gaussian.fit(jnp.ones(3), weights=jnp.zeros(3)))).all()
    assert jax.grad(total)(jnp.ones(3), jnp.zeros(3)).tolist() == [0] * 3
    unseen = gaussian.fit(jnp.array([1.0, 3.0, jnp.nan, jnp.inf]), weights=jnp.array([1.0, 1.0, 0.0, 0.0]))
    assert unseen == (2, 1)
    for weights in (jnp.array([True, True, False, False]), jnp.array([1, 1, 0, 0], jnp.int8)):
        assert gaussian.fit(jnp.array([1.0, 3.0, jnp.nan, jnp.inf]), weights=weights) == (2, 1)


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
