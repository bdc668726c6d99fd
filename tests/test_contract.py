"""What every public function promises, whatever it computes."""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH, CASES, PLANS, public_functions
from jax.sharding import PartitionSpec as P

import jprob

U = 2.0**-24


def takes_axis(case):
    parameters = inspect.signature(case.function).parameters
    return case.per_example and "axis" in parameters


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """The scope groups the tests by case, so that each finds what the others have compiled."""
    return CASES[request.param]


def where(condition):
    """The cases of which this holds."""
    return pytest.mark.parametrize("case", [name for name, case in CASES.items() if condition(case)], indirect=True)


batched = where(lambda case: case.per_example)  # the leading axes are all the batch
smooth = where(lambda case: case.differentiable)  # there is something to differentiate


def close(got, want, u=64 * U):
    """Equal to rounding: 64 u covers the reordering of a sum of 3 and of the divisions around it."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=u, atol=u * float(np.abs(w).max()))


@functools.cache
def both(function, differentiable):
    """Value, and gradient of the sum of its squares: its cotangents are not 1. Nothing where nothing is smooth."""
    slope = jax.grad(lambda *args: jnp.sum(jnp.square(function(*args))), argnums=differentiable)
    return jax.jit(lambda *args: (function(*args), slope(*args) if differentiable else ()))


def value_and_gradient(case):
    """Compiled once for each shape and dtype, whichever test asks first."""
    return both(case.function, case.differentiable)


def moved(case, values):
    """The arguments, with these in the place of the differentiable ones."""
    return [dict(zip(case.differentiable, values, strict=True)).get(i, a) for i, a in enumerate(case.args)]


def varied(case):
    """The function of its differentiable arguments alone, and these arguments."""
    return lambda *values: case.function(*moved(case, values)), tuple(case.args[i] for i in case.differentiable)


def cast(case, dtype):
    """The case with arguments of this dtype, where they are floating-point."""
    return case._replace(args=tuple(a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in case.args))


def normal(seed, likes):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in likes)


def test_every_public_function_has_a_case():
    assert {name.split(",")[0] for name in CASES} == set(public_functions())


@pytest.mark.parametrize("name", [*public_functions(), *PLANS])
def test_the_docstring_is_complete(name):
    function = getattr(getattr(jprob, name.split(".")[0]), name.split(".")[1])
    doc, parameters = function.__doc__, inspect.unwrap(function).__code__
    names = parameters.co_varnames[: parameters.co_argcount + parameters.co_kwonlyargcount]
    args = doc[doc.index("Args:") : doc.index("Returns:")]
    for parameter in names:
        assert re.search(rf"^\s+{parameter}: ", args, re.MULTILINE), f"{name}: {parameter} is not documented"
    returns = doc[doc.index("Returns:") : doc.index("Raises:")]
    assert re.search(r"dtype|float32", returns), f"{name}: dtype of the result"
    assert re.search(r"\bu\b", returns), f"{name}: accuracy of the result"
    assert ">>> " in doc


def test_jit_equals_eager(case):
    # One example: eagerly each operation compiles by itself, and those of few small shapes are shared by many cases.
    args = [a[0] for a in case.args] if case.per_example else case.args
    want = value_and_gradient(case)(*args)
    with jax.disable_jit():
        got = value_and_gradient(case)(*args)
    close(got, want)


@batched
def test_vmap_equals_a_loop(case):
    loop = [value_and_gradient(case)(*(a[i] for a in case.args)) for i in range(BATCH)]
    want = jax.tree.map(lambda *x: np.stack(x), *loop)
    close(jax.jit(jax.vmap(value_and_gradient(case)))(*case.args), want)


@where(takes_axis)
def test_any_axis_may_hold_the_classes(case):
    want = case.function(*case.args)
    turned = [a.T if a.ndim == 2 else a for a in case.args]
    close(case.function(*turned, axis=0), want.T)


@smooth
def test_forward_and_reverse_mode_agree(case):
    function, args = varied(case)

    tangents, cotangents = normal(0, args), normal(1, [jax.eval_shape(function, *args)])
    pushed, pulled = jax.jit(lambda: (jax.jvp(function, args, tangents)[1], jax.vjp(function, *args)[1](*cotangents)))()
    terms = [np.asarray(t) * np.asarray(g) for t, g in zip(tangents, pulled, strict=True)]
    forward, reverse = float(np.sum(np.asarray(cotangents[0]) * pushed)), float(sum(map(np.sum, terms)))
    assert abs(forward - reverse) <= 64 * U * sum(float(np.abs(term).sum()) for term in terms)


@smooth
def test_second_derivatives_are_those_of_the_function(case):
    """Hessian-vector products in both orders of differentiation, against differences of the gradient in float64."""
    function, args = varied(case)
    direction = normal(1, args)
    squares = lambda *values: jnp.sum(jnp.square(function(*values)))  # noqa: E731
    slope = lambda f: jax.grad(f, tuple(range(len(args))))  # noqa: E731
    push = lambda *values: jax.jvp(squares, values, direction)[1]  # noqa: E731
    products = {
        "forward over reverse": jax.jit(lambda: jax.jvp(slope(squares), args, direction)[1]),
        "reverse over forward": jax.jit(lambda: slope(push)(*args)),
    }
    want = _difference_of_gradients(case, direction)
    for order, product in products.items():
        for got, truth in zip(product(), want, strict=True):
            scale = max(1, float(np.abs(truth).max()))
            np.testing.assert_allclose(np.asarray(got), truth, rtol=0, atol=2e-5 * scale, err_msg=order)


def _difference_of_gradients(case, direction):
    """The central difference has an error of step^2 = 1e-10 of the next derivatives, and of u / step = 1e-11."""
    step = 1e-5
    with jax.enable_x64(True):
        wide = cast(case, jnp.float64)
        args = varied(wide)[1]
        up, down = (
            value_and_gradient(case)(
                *moved(wide, [a + h * np.float64(d) for a, d in zip(args, direction, strict=True)])
            )[1]
            for h in (step, -step)
        )
    return [(np.asarray(a) - np.asarray(b)) / (2 * step) for a, b in zip(up, down, strict=True)]


def test_dtypes_of_value_and_gradient(case):
    """From shapes alone, which compiles nothing: with x64 and without, the same."""
    for dtype, x64 in itertools.product((jnp.float16, jnp.bfloat16, jnp.float32), (False, True)):
        with jax.enable_x64(x64):
            value, slopes = jax.eval_shape(value_and_gradient(case), *cast(case, dtype).args)
        expected = dtype if case.is_map else jnp.float32
        assert value.dtype in ((jnp.int32, jnp.bool_) if case.is_integer else (expected,))
        assert all(slope.dtype == dtype for slope in slopes)


@smooth
def test_float64_is_computed_in_float64(case):
    with jax.enable_x64(True):
        value, slopes = value_and_gradient(case)(*cast(case, jnp.float64).args)
    assert value.dtype == jnp.float64
    assert not np.array_equal(value, np.float32(value))
    assert all(slope.dtype == jnp.float64 for slope in slopes)


@pytest.mark.parametrize("name", public_functions())
def test_one_trace_per_shape(name):
    case = next(case for key, case in CASES.items() if key.split(",")[0] == name)
    function = public_functions()[name]
    # One example: a batch would go through vmap where the case is vectorised, and past the cache.
    args = [a[0] for a in case.args] if case.per_example else case.args
    function.compiled.clear_cache()
    for _ in range(3):
        case.function(*args)
    assert function.compiled._cache_size() == 1


@batched
def test_scan_checkpoint_and_shard_map_change_nothing(case):
    """One inside the other: each of eight devices scans over its examples, and rematerialises them."""

    def nested(*args):
        return jax.lax.scan(lambda c, args: (c, jax.checkpoint(case.function)(*args)), 0, args)[1]

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(nested, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
    got = value_and_gradient(case._replace(function=sharded))(*case.args)
    close(got, value_and_gradient(case)(*case.args))


def test_value_and_gradient_lower_for_every_platform(case):
    platforms = ("cpu", "cuda", "tpu")
    assert jax.export.export(value_and_gradient(case), platforms=platforms)(*case.args).platforms == platforms


def test_no_call_pays_for_checks(case):
    """A program with an effect leaves the fast dispatch path of jit, which costs ten times the call of a small loss."""
    assert not jax.make_jaxpr(value_and_gradient(case))(*case.args).effects


def test_valid_arguments_pass_the_debug_checks(case):
    assert jprob.checkify(case.function)(*case.args)[0].get() is None


def test_checks_are_traced_where_they_are_asked_for_and_nowhere_else():
    """A program traced without checks serves no call that asks for them, nor the other way round."""
    labels = jnp.array([0, 7])
    loss = jax.jit(lambda z: jprob.categorical.cross_entropy(z, labels).sum())
    z = jnp.zeros((2, 3))
    for _ in range(2):
        loss(z)
        error, _ = jprob.checkify(loss)(z)
        assert "cross_entropy: label 7 is outside [0, 3)" in error.get()
    assert not jax.make_jaxpr(loss)(z).effects
