"""What every public function promises, whatever it computes."""

import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH, CASES, public_functions
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

from jprob import _checks

U = 2.0**-24


def takes_axis(case):
    parameters = inspect.signature(case.function).parameters
    return case.per_example and "axis" in parameters


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=[name for name, case in CASES.items() if case.per_example])
def batched(request):
    """A case whose leading axes are all the batch."""
    return CASES[request.param]


@pytest.fixture(params=[name for name, case in CASES.items() if case.differentiable])
def smooth(request):
    """A case with something to differentiate."""
    return CASES[request.param]


@pytest.fixture(params=[name for name, case in CASES.items() if takes_axis(case)])
def with_axis(request):
    """A case of a function with a class axis."""
    return CASES[request.param]


def close(got, want, u=64 * U):
    """Equal to rounding: 64 u covers the reordering of a sum of 3 and of the divisions around it."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=u, atol=u * float(np.abs(w).max()))


def gradient(case):
    """Gradient of the sum of squares of the result: its cotangents are not 1. Nothing where nothing is smooth."""
    if not case.differentiable:
        return lambda *args: ()
    return jax.grad(lambda *args: jnp.sum(jnp.square(case.function(*args))), argnums=case.differentiable)


def varied(case):
    """The function of its differentiable arguments alone, and these arguments."""

    def function(*moved):
        args = list(case.args)
        for position, value in zip(case.differentiable, moved, strict=True):
            args[position] = value.astype(args[position].dtype) if value.dtype != args[position].dtype else value
        return case.function(*args)

    return function, tuple(case.args[i] for i in case.differentiable)


def test_every_public_function_has_a_case():
    assert {name.split(",")[0] for name in CASES} == set(public_functions())


@pytest.mark.parametrize("name", public_functions())
def test_the_docstring_is_complete(name):
    function = public_functions()[name]
    doc, parameters = function.__doc__, function.__wrapped__.__code__
    names = parameters.co_varnames[: parameters.co_argcount + parameters.co_kwonlyargcount]
    args = doc[doc.index("Args:") : doc.index("Returns:")]
    for parameter in names:
        assert re.search(rf"^\s+{parameter}: ", args, re.MULTILINE), f"{name}: {parameter} is not documented"
    returns = doc[doc.index("Returns:") : doc.index("Raises:")]
    assert re.search(r"dtype|float32", returns), f"{name}: dtype of the result"
    assert re.search(r"\bu\b", returns), f"{name}: accuracy of the result"
    assert ">>> " in doc


def test_jit_equals_eager(case):
    want = case.function(*case.args), gradient(case)(*case.args)
    with jax.disable_jit():
        got = case.function(*case.args), gradient(case)(*case.args)
    close(got, want)


def test_vmap_equals_a_loop(batched):
    case = batched
    loop = [case.function(*(a[i] for a in case.args)) for i in range(BATCH)]
    close(jax.vmap(case.function)(*case.args), jnp.stack(loop))
    loop = [gradient(case)(*(a[i] for a in case.args)) for i in range(BATCH)]
    close(jax.vmap(gradient(case))(*case.args), jax.tree.map(lambda *x: jnp.stack(x), *loop))


def test_any_axis_may_hold_the_classes(with_axis):
    want = with_axis.function(*with_axis.args)
    moved = [a.T if a.ndim == 2 else a for a in with_axis.args]
    close(with_axis.function(*moved, axis=0), want.T)


def test_forward_and_reverse_mode_agree(smooth):
    function, args = varied(smooth)
    rng = np.random.default_rng(0)
    tangents = tuple(jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in args)
    out, pushed = jax.jvp(function, args, tangents)
    cotangent = jnp.asarray(rng.normal(size=out.shape), out.dtype)
    _, pull = jax.vjp(function, *args)
    forward = jnp.sum(cotangent * pushed)
    reverse = sum(jnp.sum(t * g) for t, g in zip(tangents, pull(cotangent), strict=True))
    scale = sum(float(jnp.sum(jnp.abs(t * g))) for t, g in zip(tangents, pull(cotangent), strict=True))
    assert abs(float(forward - reverse)) <= 64 * U * scale


def test_second_derivatives_are_those_of_the_function(smooth):
    """Hessian-vector products in both orders of differentiation, against differences of the gradient in float64."""
    function, args = varied(smooth)
    rng = np.random.default_rng(1)
    direction = tuple(jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in args)
    slope = jax.grad(lambda *moved: jnp.sum(jnp.square(function(*moved))), tuple(range(len(args))))
    push = lambda *moved: jax.jvp(lambda *m: jnp.sum(jnp.square(function(*m))), moved, direction)[1]  # noqa: E731
    products = {
        "forward over reverse": jax.jit(lambda: jax.jvp(slope, args, direction)[1]),
        "reverse over forward": jax.jit(lambda: jax.grad(push, tuple(range(len(args))))(*args)),
    }
    want = _difference_of_gradients(smooth, direction)
    for order, product in products.items():
        for got, truth in zip(product(), want, strict=True):
            scale = max(1, float(np.abs(truth).max()))
            np.testing.assert_allclose(np.asarray(got), truth, rtol=0, atol=2e-5 * scale, err_msg=order)


def _difference_of_gradients(case, direction):
    """The central difference has an error of step^2 = 1e-10 of the next derivatives, and of u / step = 1e-11."""
    with jax.enable_x64(True):
        wide = [a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in case.args]
        function, args = varied(case._replace(args=tuple(wide)))
        slope = jax.jit(jax.grad(lambda *moved: jnp.sum(jnp.square(function(*moved))), tuple(range(len(args)))))
        step = 1e-5
        up, down = (
            slope(*(a + sign * step * d.astype(jnp.float64) for a, d in zip(args, direction, strict=True)))
            for sign in (1, -1)
        )
        return [np.asarray((a - b) / (2 * step)) for a, b in zip(up, down, strict=True)]


def test_dtypes_of_value_and_gradient(case):
    """From shapes alone, which compiles nothing: with x64 and without, the same."""
    for dtype, x64 in itertools.product((jnp.float16, jnp.bfloat16, jnp.float32), (False, True)):
        args = tuple(a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in case.args)
        with jax.enable_x64(x64):
            value, slopes = jax.eval_shape(lambda *args: (case.function(*args), gradient(case)(*args)), *args)
        expected = dtype if case.is_map else jnp.float32
        assert value.dtype in ((jnp.int32, jnp.bool_) if case.is_integer else (expected,))
        assert all(slope.dtype == dtype for slope in slopes)


def test_float64_is_computed_in_float64(smooth):
    case = smooth
    with jax.enable_x64(True):
        args = tuple(a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in case.args)
        value = case.function(*args)
        assert value.dtype == jnp.float64
        assert not np.array_equal(value, value.astype(jnp.float32))
        assert all(g.dtype == jnp.float64 for g in gradient(case)(*args))


@pytest.mark.parametrize("name", public_functions())
def test_one_trace_per_shape(name):
    case = next(case for key, case in CASES.items() if key.split(",")[0] == name)
    function = public_functions()[name]
    # One example: a batch would go through vmap where the case is vectorised, and past the cache.
    args = [a[0] for a in case.args] if case.per_example else case.args
    function.clear_cache()
    for _ in range(3):
        case.function(*args)
    assert function._cache_size() == 1


def test_scan_checkpoint_and_shard_map_change_nothing(batched):
    """One inside the other: each of eight devices scans over its examples, and rematerialises them."""

    def nested(*args):
        return jax.lax.scan(lambda c, args: (c, jax.checkpoint(batched.function)(*args)), 0, args)[1]

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.jit(jax.shard_map(nested, mesh=mesh, in_specs=P("batch"), out_specs=P("batch")))
    close(sharded(*batched.args), batched.function(*batched.args))
    close(jax.jit(gradient(batched._replace(function=sharded)))(*batched.args), gradient(batched)(*batched.args))


def test_value_and_gradient_lower_for_every_platform(case):
    both = jax.jit(lambda *args: (case.function(*args), gradient(case)(*args)))
    for platform in ("cpu", "cuda", "tpu"):
        exported = jax.export.export(both, platforms=[platform])(*case.args)
        assert exported.platforms == (platform,)


def test_debug_checks_cost_nothing(case, monkeypatch):
    """The compiled program is the same with the checks taken out, up to the numbers of its instructions."""

    def compiled():
        jax.clear_caches()
        text = jax.jit(case.function).lower(*case.args).compile().as_text()
        text = re.sub(r", metadata={[^}]*}", "", text[re.search(r"^(%|ENTRY)", text, re.MULTILINE).start() :])
        order = {}
        return re.sub(r"%?[A-Za-z_][\w\-]*(\.\d+)+", lambda m: f"%{order.setdefault(m[0], len(order))}", text)

    checked = compiled()
    monkeypatch.setattr(_checks.checkify, "debug_check", lambda *args, **kwargs: None)
    assert compiled() == checked


def test_valid_arguments_pass_the_debug_checks(case):
    assert checkify.checkify(case.function)(*case.args)[0].get() is None
