"""Exactness of the Gaussian functions, value and gradient, in units of u."""

import math
import re

import jax
import jax.numpy as jnp
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
