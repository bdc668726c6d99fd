"""What every public function promises, whatever it computes."""

import functools
import gc
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, HOSTILE, PLANS, Case, public_functions, valid_arguments
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jprob

U = 2.0**-24

# Each of these cases has a custom derivative rule that no other one has: together they try every rule.
RULES = [
    "categorical.cross_entropy, smoothed", "categorical.brier_score", "categorical.entropy",
    "categorical.js_divergence", "bernoulli.entropy", "gaussian.log_prob", "gaussian.log_prob, log_scale",
    "gaussian.prob", "gaussian.prob, log_scale", "gaussian.cdf", "gaussian.log_cdf", "gaussian.quantile",
    "gaussian.interval_prob", "gaussian.log_interval_prob", "gaussian.fit", "gaussian.kl_divergence",
    "gaussian.cross_entropy", "gaussian.nll", "gaussian.nll, log_scale", "expectation.mean", "expectation.variance",
    "bayes.log_evidence", "bayes.gaussian_posterior", "mvn.log_prob", "mvn.fit", "mvn.scale_tril, covariance",
    "linear_categorical.cross_entropy", "calibration.fit_temperature",
]  # fmt: skip
# One of each module, for laws that are laws of its code and not of each function.
MODULES = [
    "categorical.cross_entropy", "bernoulli.cross_entropy", "gaussian.nll", "mvn.log_prob", "expectation.mean",
    "bayes.log_posterior", "linear_categorical.log_prob", "metrics.confusion_matrix", "metrics.f1_score, micro",
    "calibration.reliability",
]  # fmt: skip

VECTORIZED = jnp.vectorize(abs).__code__  # the code of all that is vectorized, which is a vmap itself


def takes_axis(case):
    parameters = inspect.signature(case.function).parameters
    return case.per_example and "axis" in parameters


def is_key(array):
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """The scope groups the tests by case, so that each finds what the others have compiled."""
    return CASES[request.param]


def where(condition):
    """The cases of which this holds."""
    return these([name for name, case in CASES.items() if condition(case)])


def these(names):
    return pytest.mark.parametrize("case", names, indirect=True)


batched = where(lambda case: case.per_example)  # the leading axes are all the batch
smooth = where(lambda case: case.differentiable)  # there is something to differentiate


def close(got, want, u=64 * U):
    """Equal to rounding: 64 u covers the reordering of a sum of 3 and of the divisions around it."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=u, atol=u * float(np.abs(w).max()))


def jit(function):
    """Laws compare programs of the same few numbers: code that is fast takes twice as long to compile."""
    return jax.jit(
        function, compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    )


def value_and_gradient(case):
    """Value, and gradient of the sum of its squares: its cotangents are not 1. Nothing where nothing is smooth."""

    def both(*args):
        return forward_and_backward(case, *args)[:2]

    return both


def forward_and_backward(case, *args):
    """Value, gradient, and what the forward pass keeps for the backward one."""
    if not case.differentiable:
        return case.function(*args), (), ()
    function = lambda *values: case.function(*moved(case, values, args))  # noqa: E731
    value, pull = jax.vjp(function, *(args[i] for i in case.differentiable))
    return value, pull(2 * value), jax.tree.leaves(pull)


@functools.cache
def program(function, differentiable):
    """Compiled once for each shape and dtype, whichever test asks first."""
    return jit(functools.partial(forward_and_backward, Case(function, (), differentiable)))


def evaluated(case):
    """Value and gradient, by a program that the tests of a case share."""
    return program(case.function, case.differentiable)(*case.args)[:2]


def moved(case, values, args=None):
    """The arguments, with these in the place of the differentiable ones."""
    args = case.args if args is None else args
    return [dict(zip(case.differentiable, values, strict=True)).get(i, a) for i, a in enumerate(args)]


def varied(case):
    """The function of its differentiable arguments alone, and these arguments."""
    return lambda *values: case.function(*moved(case, values)), tuple(case.args[i] for i in case.differentiable)


def cast(case, dtype):
    """The case with arguments of this dtype, where they are floating-point."""
    return case._replace(args=tuple(a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in case.args))


def normal(seed, likes):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in likes)


def one_example(case):
    return [a[0] for a in case.args] if case.per_example else case.args


def equations(jaxpr):
    """All equations, also those inside of others."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(getattr(inner, "jaxpr", inner))


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


def as_numpy(array):
    """What a user has who comes from numpy: int64 and float64, which a program without x64 has not."""
    if is_key(array):
        return array
    array = np.asarray(array)
    return array.astype({"i": np.int64, "f": np.float64}.get(array.dtype.kind, array.dtype))


def test_numpy_arrays_are_taken_where_jit_is_disabled(case):
    """From shapes alone: each operation is traced, and none is compiled."""
    args = [as_numpy(a) for a in case.args]
    with jax.disable_jit():
        got = jax.eval_shape(lambda: case.function(*args))
    want = jax.eval_shape(case.function, *case.args)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)


@these(MODULES)
def test_jit_equals_eager(case):
    with jax.disable_jit():
        got = case.function(*(as_numpy(a) for a in case.args))
    close(got, evaluated(case)[0])


@batched
def test_batches_equal_a_loop(case):
    loop = jit(lambda *args: jax.lax.map(lambda args: value_and_gradient(case)(*args), args))
    close(evaluated(case), loop(*case.args))


@where(lambda case: case.per_example and getattr(case.function, "__code__", None) is not VECTORIZED)
def test_vmap_equals_a_batch(case):
    close(jit(jax.vmap(value_and_gradient(case)))(*case.args), evaluated(case))


@where(takes_axis)
def test_any_axis_may_hold_the_classes(case):
    turned = [a.T if a.ndim == 2 else a for a in case.args]
    close(jit(functools.partial(case.function, axis=0))(*turned), evaluated(case)[0].T)


@these(RULES)
def test_forward_and_reverse_mode_agree(case):
    function, args = varied(case)

    tangents, cotangents = normal(0, args), normal(1, [jax.eval_shape(function, *args)])
    pushed, pulled = jit(lambda: (jax.jvp(function, args, tangents)[1], jax.vjp(function, *args)[1](*cotangents)))()
    terms = [np.asarray(t) * np.asarray(g) for t, g in zip(tangents, pulled, strict=True)]
    forward, reverse = float(np.sum(np.asarray(cotangents[0]) * pushed)), float(sum(map(np.sum, terms)))
    assert abs(forward - reverse) <= 64 * U * sum(float(np.abs(term).sum()) for term in terms)


@these(RULES)
def test_second_derivatives_are_those_of_the_function(case):
    """Hessian-vector products in both orders of differentiation, against differences of the gradient in float64."""
    function, args = varied(case)
    direction = normal(1, args)
    squares = lambda *values: jnp.sum(jnp.square(function(*values)))  # noqa: E731
    slope = lambda f: jax.grad(f, tuple(range(len(args))))  # noqa: E731
    push = lambda *values: jax.jvp(squares, values, direction)[1]  # noqa: E731
    products = jit(lambda: (jax.jvp(slope(squares), args, direction)[1], slope(push)(*args)))()
    want = _difference_of_gradients(case, direction)
    for order, product in zip(("forward over reverse", "reverse over forward"), products, strict=True):
        for got, truth in zip(product, want, strict=True):
            scale = max(1, float(np.abs(truth).max()))
            np.testing.assert_allclose(np.asarray(got), truth, rtol=0, atol=2e-5 * scale, err_msg=order)


def _difference_of_gradients(case, direction):
    """The central difference has an error of step^2 = 1e-10 of the next derivatives, and of u / step = 1e-11."""
    step = 1e-5
    with jax.enable_x64(True):
        wide = cast(case, jnp.float64)
        args = varied(wide)[1]
        up, down = (
            program(case.function, case.differentiable)(
                *moved(wide, [a + h * np.float64(d) for a, d in zip(args, direction, strict=True)])
            )[1]
            for h in (step, -step)
        )
    return [(np.asarray(a) - np.asarray(b)) / (2 * step) for a, b in zip(up, down, strict=True)]


def test_rules_are_all_the_rules():
    """Second derivatives and nested transformations are tried once a rule, which finds its case here."""

    def rules(name):
        traced = equations(jax.make_jaxpr(CASES[name].function)(*CASES[name].args).jaxpr)
        infos = [e.params["call_jaxpr"].jaxpr.debug_info.func_src_info for e in traced
                 if e.primitive.name == "custom_jvp_call"]  # fmt: skip
        return {info for info in infos if f" at {jprob.__path__[0]}" in info}

    tried = set().union(*map(rules, RULES))
    assert {name: left for name in CASES if (left := rules(name) - tried)} == {}


@pytest.fixture
def nothing_older():
    """What leaks is found by a search of all objects: without those that are there before, it takes milliseconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_older")
def test_nothing_leaks_out_of_a_trace(case):
    with jax.checking_leaks():
        jax.eval_shape(value_and_gradient(case), *cast(case, jnp.float16).args)


def test_dtypes_of_value_and_gradient(case):
    """From shapes alone, which compiles nothing: with x64 and without, the same."""
    for dtype, x64 in ((jnp.float16, False), (jnp.bfloat16, True)):
        with jax.enable_x64(x64):
            value, slopes = jax.eval_shape(value_and_gradient(case), *cast(case, dtype).args)
        expected = dtype if case.is_map else jnp.float32
        assert value.dtype in ((jnp.int32, jnp.bool_) if case.is_integer else (expected,))
        assert all(slope.dtype == dtype for slope in slopes)


@smooth
def test_float64_is_computed_in_float64(case):
    """No number of the program is a float32."""
    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(value_and_gradient(case))(*cast(case, jnp.float64).args)
    dtypes = {(v.aval.dtype, e.primitive.name) for e in equations(jaxpr.jaxpr) for v in e.outvars}
    assert not {(d, name) for d, name in dtypes if jnp.issubdtype(d, jnp.floating) and d != jnp.float64}


@pytest.mark.parametrize("name", public_functions())
def test_one_trace_per_shape(name):
    """The second call finds the program of the first."""
    case = next(case for key, case in CASES.items() if key.split(",")[0] == name)
    args, function = one_example(case), name.split(".")[1]

    def inner():
        jaxpr = jax.make_jaxpr(lambda *args: case.function(*args))(*args).jaxpr
        return next(e.params["jaxpr"] for e in equations(jaxpr) if e.params.get("name") == function)

    assert inner() is inner()


@these([name for name in RULES if CASES[name].per_example])
def test_scan_checkpoint_and_shard_map_change_nothing(case):
    """One inside the other: each of eight devices scans over its examples, and rematerialises them."""

    def nested(*args):
        return jax.lax.scan(lambda c, args: (c, jax.checkpoint(case.function)(*args)), 0, args)[1]

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(nested, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
    close(jit(value_and_gradient(case._replace(function=sharded)))(*case.args), evaluated(case))


def on_explicit_axes(case, place):
    """The arguments, with their leading axis on a mesh as `jax.make_mesh` makes it."""
    sharding = NamedSharding(jax.make_mesh((8,), ("batch",)), P("batch"))
    return [a if is_key(a) or a.ndim == 0 or a.shape[0] % 8 else place(a, sharding) for a in case.args]


def test_explicit_axes_are_taken(case):
    """From shapes alone: without its sharding rule, an operation fails while it is traced."""
    like = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)  # noqa: E731
    got = jax.eval_shape(value_and_gradient(case), *on_explicit_axes(case, like))
    for g, w in zip(
        jax.tree.leaves(got), jax.tree.leaves(jax.eval_shape(value_and_gradient(case), *case.args)), strict=True
    ):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)


@these(MODULES)
def test_explicit_axes_change_nothing(case):
    close(jit(value_and_gradient(case))(*on_explicit_axes(case, jax.device_put)), evaluated(case))


@where(lambda case: is_key(case.args[0]))
@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_implementation_draw_and_are_used_once(case, implementation):
    with jax.debug_key_reuse(True):
        first, again, second = (
            case.function(jax.random.key(i, impl=implementation), *case.args[1:]) for i in (3, 3, 4)
        )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def test_value_and_gradient_lower_for_every_platform(case):
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(value_and_gradient(case)), platforms=platforms)
    assert exported(*case.args).platforms == platforms


def test_no_call_pays_for_checks(case):
    """A program with an effect leaves the fast dispatch path of jit, which costs ten times the call of a small loss."""
    assert not jax.make_jaxpr(value_and_gradient(case))(*case.args).effects


def test_valid_arguments_pass_the_debug_checks(case):
    """`debug_nans` looks at all that a program returns: also at what the forward pass keeps for the backward one."""
    with jax.debug_nans(True):
        jax.block_until_ready(program(case.function, case.differentiable)(*case.args))
    assert jit(jprob.checkify(case.function))(*case.args)[0].get() is None


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


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", public_functions())
def test_what_is_wrong_is_told_in_one_line(name):
    """Each argument in turn is hostile: either the call has a meaning, or its error is one line of the function."""
    function, valid = public_functions()[name], valid_arguments(name)
    faults = []
    for parameter, (what, value) in itertools.product(inspect.signature(function).parameters, HOSTILE.items()):
        try:
            jax.eval_shape(functools.partial(function, **(valid | {parameter: value})))
        except ValueError as error:
            if not str(error).startswith(f"{function.__name__}: ") or "\n" in str(error):
                faults.append(f"{parameter}={what}: {str(error).splitlines()[0]}")
        except Exception as error:
            faults.append(f"{parameter}={what}: {type(error).__name__}: {str(error).splitlines()[0]}")
    assert not faults, "\n".join(faults)
