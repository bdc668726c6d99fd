"""The promises of every public function."""

import functools
import gc
import inspect
import itertools
import re
from contextlib import nullcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, HOSTILE, KEY, MEANINGLESS, PLANS, Case, public_functions, valid_arguments
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jprob
from jprob import bayes, bernoulli, calibration, categorical, expectation, gaussian, metrics, mvn
from jprob import linear_categorical as linear

U = 2.0**-24

# Each of these cases has a custom derivative rule that no other one has: together they try every rule.
RULES = [
    "categorical.cross_entropy, smoothed", "categorical.cross_entropy, soft", "categorical.brier_score",
    "categorical.entropy", "categorical.js_divergence", "bernoulli.entropy", "gaussian.log_prob",
    "gaussian.log_prob, log_scale", "gaussian.prob", "gaussian.prob, log_scale", "gaussian.cdf", "gaussian.log_cdf",
    "gaussian.quantile", "gaussian.interval_prob", "gaussian.kl_divergence", "gaussian.cross_entropy", "gaussian.nll",
    "gaussian.nll, log_scale", "expectation.mean", "expectation.variance", "bayes.log_evidence",
    "bayes.gaussian_posterior", "linear_categorical.cross_entropy", "calibration.fit_temperature",
    "calibration.reliability, of each class", "gaussian.fit",
    "gaussian.log_interval_prob", "mvn.fit", "mvn.log_prob", "mvn.kl_divergence", "mvn.scale_tril, covariance",
]  # fmt: skip
# One of each module, for laws that are laws of its code and not of each function.
MODULES = [
    "categorical.cross_entropy", "bernoulli.cross_entropy", "gaussian.nll", "mvn.log_prob", "expectation.mean",
    "bayes.log_posterior", "linear_categorical.log_prob", "metrics.confusion_matrix", "metrics.f1_score, micro",
    "calibration.reliability",
]  # fmt: skip

# Laws whose values are those of jax, if a trace or another law passes: three of them, the others if asked for.
FEW = ("categorical.cross_entropy", "gaussian.nll", "metrics.confusion_matrix")


def slow_but(few, names):
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


VECTORIZED = jnp.vectorize(abs).__code__  # the code of all that is vectorized, which is a vmap itself


def is_vmap(case):
    return getattr(case.function, "__code__", None) is VECTORIZED


# The same rules for many sets at once, or with another number.
REPETITIONS = [name for name in CASES if name.endswith(", sets")] + ["categorical.js_divergence, weighted"]


def repeated(name):
    """The name, marked slow if it is of a repetition."""
    return pytest.param(name, marks=pytest.mark.slow) if name in REPETITIONS else name


def takes_axis(case):
    parameters = inspect.signature(case.function).parameters
    return case.per_example and "axis" in parameters


def is_key(array):
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


@pytest.fixture(params=[*map(repeated, CASES)], scope="module")
def case(request):
    """The scope groups the tests by case, so that each finds what the others have compiled."""
    return CASES[request.param]


def where(condition):
    """The cases of which this holds."""
    return these([name for name, case in CASES.items() if condition(case)])


def these(names):
    return pytest.mark.parametrize("case", [*map(repeated, names)], indirect=True)


smooth = where(lambda case: case.differentiable)  # there is something to differentiate


def close(got, want, u=64 * U):
    """Equal to rounding: 64 u covers the reordering of a sum of 3 and of the divisions around it."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=u, atol=u * float(np.abs(w).max()))


def forward_and_backward(case, *args):
    """Value, gradient of the sum of its squares, and what the forward pass keeps for the backward one.

    The cotangents of the gradient are not 1. There is none where nothing is smooth.
    """
    if not case.differentiable:
        return case.function(*args), (), ()
    function = lambda *values: case.function(*moved(case, values, args))  # noqa: E731
    value, pull = jax.vjp(function, *(args[i] for i in case.differentiable))
    return value, pull(2 * value), jax.tree.leaves(pull)


@functools.cache
def program(function, differentiable):
    """Traced and compiled once for each shape and dtype, whichever test asks first."""
    return jax.jit(functools.partial(forward_and_backward, Case(function, (), differentiable)))


def value_and_gradient(case):
    return lambda *args: program(case.function, case.differentiable)(*args)[:2]


def evaluated(case):
    """Value and gradient, by a program that the tests of a case share."""
    return value_and_gradient(case)(*case.args)


def moved(case, values, args=None):
    """The arguments, with these for the differentiable ones."""
    args = case.args if args is None else args
    return [dict(zip(case.differentiable, values, strict=True)).get(i, a) for i, a in enumerate(args)]


def varied(case):
    """The function of its differentiable arguments alone, and these arguments."""
    return lambda *values: case.function(*moved(case, values)), tuple(case.args[i] for i in case.differentiable)


def cast(case, dtype):
    """The case with floating-point arguments of this dtype, and integers of the widest one that is on."""
    kinds = {"f": dtype, "i": jax.dtypes.canonicalize_dtype(np.int64)}
    return case._replace(args=tuple(a if is_key(a) else a.astype(kinds.get(a.dtype.kind, a.dtype)) for a in case.args))


def shapes(case, dtype):
    """The shapes and dtypes of these arguments, without their values."""
    return jax.eval_shape(lambda: cast(case, dtype).args)


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
    """The arrays of a numpy user: int64 and float64, which a program without x64 has not."""
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


@these(slow_but(FEW, MODULES))
def test_jit_equals_eager(case):
    with jax.disable_jit():
        got = case.function(*(as_numpy(a) for a in case.args))
    close(got, evaluated(case)[0])


# By vmap. The loop below has the rest: a case that is a vmap itself is one example alone there.
MAPPED = [name for name in dict.fromkeys([*RULES, *MODULES]) if CASES[name].per_example and not is_vmap(CASES[name])]


@these(MAPPED)
def test_a_batch_has_the_shapes_of_each_example_alone(case):
    got, want = (jax.eval_shape(f, *case.args) for f in (jax.vmap(value_and_gradient(case)), value_and_gradient(case)))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)


@these(slow_but(MODULES, MAPPED))
def test_a_batch_is_each_example_alone(case):
    close(jax.jit(jax.vmap(value_and_gradient(case)))(*case.args), evaluated(case))


@where(takes_axis)
def test_any_axis_may_hold_the_classes(case):
    turned = [a.T if a.ndim == 2 else a for a in case.args]
    close(jax.jit(functools.partial(case.function, axis=0))(*turned), evaluated(case)[0].T)


@these(RULES)
def test_forward_and_reverse_mode_agree(case):
    function, args = varied(case)

    tangents, cotangents = normal(0, args), normal(1, [jax.eval_shape(function, *args)])
    pushed, pulled = jax.jit(lambda: (jax.jvp(function, args, tangents)[1], jax.vjp(function, *args)[1](*cotangents)))()
    terms = [np.asarray(t) * np.asarray(g) for t, g in zip(tangents, pulled, strict=True)]
    forward, reverse = float(np.sum(np.asarray(cotangents[0]) * pushed)), float(sum(map(np.sum, terms)))
    assert abs(forward - reverse) <= 64 * U * sum(float(np.abs(term).sum()) for term in terms)


@these(RULES)
@pytest.mark.parametrize(
    "order", ["forward over reverse", pytest.param("reverse over forward", marks=pytest.mark.slow)]
)
def test_second_derivatives_are_those_of_the_function(case, order):
    """A Hessian-vector product in either order of differentiation, against differences of the gradient in float64."""
    function, args = varied(case)
    direction = normal(1, args)
    squares = lambda *values: jnp.sum(jnp.square(function(*values)))  # noqa: E731
    push = lambda f: lambda *values: jax.jvp(f, values, direction)[1]  # noqa: E731
    slope = lambda f: jax.grad(f, tuple(range(len(args))))  # noqa: E731
    product = push(slope(squares)) if order == "forward over reverse" else slope(push(squares))
    for got, truth in zip(jax.jit(lambda: product(*args))(), _difference_of_gradients(case, direction), strict=True):
        np.testing.assert_allclose(np.asarray(got), truth, rtol=0, atol=2e-5 * max(1, float(np.abs(truth).max())))


def _difference_of_gradients(case, direction):
    """The central difference errs by step^2 = 1e-10 of the next derivatives, and by u / step = 1e-11."""
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
    """Leaks are found by a search of all objects: without those that are there before, it takes milliseconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_older")
def test_dtypes_of_value_and_gradient_and_no_leak_of_a_trace(case):
    """From shapes alone, which compiles nothing: with x64 and without, the same."""
    for dtype, x64, mode in ((jnp.float16, False, jax.checking_leaks()), (jnp.bfloat16, True, nullcontext())):
        with jax.enable_x64(x64):
            args = shapes(case, dtype)
            with mode:
                value, slopes = jax.eval_shape(value_and_gradient(case), *args)
        expected = dtype if case.is_map else jnp.float32
        assert value.dtype in ((jnp.int32, jnp.bool_) if case.is_integer else (expected,))
        assert all(slope.dtype == dtype for slope in slopes)


@smooth
def test_float64_is_computed_in_float64(case):
    """No number of the program is a float32."""
    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(value_and_gradient(case))(*shapes(case, jnp.float64))
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


def nested(case):
    """One inside the other: each of eight devices scans over its examples, and rematerialises them."""

    def scanned(*args):
        return jax.lax.scan(lambda c, args: (c, jax.checkpoint(case.function)(*args)), 0, args)[1]

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(scanned, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
    return case._replace(function=sharded)


NESTED = [name for name in RULES if CASES[name].per_example]


@these(NESTED)
def test_scan_checkpoint_and_shard_map_are_taken(case):
    """From shapes alone: a rule that does not nest fails while it is traced."""
    got, want = (jax.eval_shape(value_and_gradient(each), *case.args) for each in (nested(case), case))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)


@these(slow_but(["categorical.cross_entropy, smoothed", "categorical.entropy", *MODULES], NESTED))
def test_scan_checkpoint_and_shard_map_change_nothing(case):
    close(evaluated(nested(case)), evaluated(case))


def on_explicit_axes(case, place):
    """The arguments, with their leading axis on a mesh as `jax.make_mesh` makes it."""
    sharding = NamedSharding(jax.make_mesh((8,), ("batch",)), P("batch"))
    return [a if is_key(a) or a.ndim == 0 or a.shape[0] % 8 else place(a, sharding) for a in case.args]


def shape_on(array, sharding):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def test_explicit_axes_are_taken(case):
    """From shapes alone: without its sharding rule, an operation fails while it is traced."""
    got = jax.eval_shape(value_and_gradient(case), *on_explicit_axes(case, shape_on))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, jax.eval_shape(value_and_gradient(case), *case.args))


@these(slow_but([*FEW, "linear_categorical.log_prob", "mvn.sample"],
                [*MODULES, "gaussian.quantile", "mvn.kl_divergence", "mvn.sample"]))  # fmt: skip
def test_explicit_axes_change_nothing(case):
    args = on_explicit_axes(case, jax.device_put)
    with jax.set_mesh(jax.make_mesh((8,), ("batch",))):
        close(jax.jit(value_and_gradient(case))(*args), evaluated(case))


def classes_first(case):
    """The case with its classes on the leading axis."""
    args = tuple(a if a.ndim == 2 else a[:3] for a in case.args)
    return case._replace(function=functools.partial(case.function, axis=0), args=args)


@where(takes_axis)
def test_classes_on_an_explicit_axis_are_taken(case):
    classes = classes_first(case)
    got = jax.eval_shape(value_and_gradient(classes), *on_explicit_axes(classes, shape_on))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, jax.eval_shape(value_and_gradient(classes), *classes.args))


@these(["categorical.softmax", "categorical.cross_entropy", "categorical.kl_divergence", "bayes.log_evidence"])
def test_classes_may_lie_on_an_explicit_axis(case):
    classes = classes_first(case)
    close(jax.jit(value_and_gradient(classes))(*on_explicit_axes(classes, jax.device_put)), evaluated(classes))


@these(["metrics.confusion_matrix", "metrics.perplexity", "calibration.reliability", "calibration.fit_temperature"])
def test_weights_may_lie_on_no_axis(case):
    """Examples on an explicit mesh, their weights on none."""
    args = *on_explicit_axes(case, jax.device_put)[:-1], case.args[-1]
    close(jax.jit(value_and_gradient(case))(*args), evaluated(case))


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


SYMBOLIC = ["categorical.cross_entropy", "categorical.kl_divergence", "linear_categorical.log_prob"]


@these(slow_but(SYMBOLIC, [name for name, case in CASES.items() if case.per_example]))
@pytest.mark.wrong_types  # jaxtyping knows no symbolic sizes
def test_the_number_of_examples_may_be_symbolic(case):
    (size,) = jax.export.symbolic_shape("examples")
    shapes = [jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for x in map(jnp.asarray, case.args)]
    exported = jax.export.export(jax.jit(functools.partial(forward_and_backward, case)))(*shapes)
    close(exported.call(*case.args)[:2], evaluated(case))


def test_no_call_pays_for_checks(case):
    """A program with an effect leaves the fast dispatch path of jit. That costs ten times the call of a small loss."""
    assert not jax.make_jaxpr(value_and_gradient(case))(*case.args).effects


def test_valid_arguments_pass_the_debug_checks(case):
    """`debug_nans` looks at all that a program returns: also at what the forward pass keeps for the backward one."""
    with jax.debug_nans(True):
        jax.block_until_ready(program(case.function, case.differentiable)(*case.args))
    assert jax.jit(jprob.checkify(case.function))(*case.args)[0].get() is None


Z, X, I, EYE = jnp.zeros((2, 3)), jnp.ones(3), jnp.zeros(3, jnp.int32), jnp.eye(3)  # noqa: E741
# Faults of the values, by their messages.
DATA_FAULTS = {
    "cross_entropy: label 7 is outside [0, 3)": lambda: categorical.cross_entropy(Z, jnp.array([1, 7])),
    "log_prob: label 4294967295 is outside [0, 3)":
        lambda: categorical.log_prob(jnp.array([0, 2**32 - 1], jnp.uint32), Z),
    "reliability: label 4294967295 is outside [0, 3)":
        lambda: calibration.reliability(EYE, jnp.full(3, 2**32 - 1, jnp.uint32)),
    "brier_score: label -1 is outside [0, 3)": lambda: categorical.brier_score(Z, jnp.array([-1, 0])),
    "cross_entropy: a row of targets sums to 1.5, not 1": lambda: categorical.cross_entropy(Z, Z + 0.5),
    "cross_entropy: target -0.5 is negative": lambda: categorical.cross_entropy(X, jnp.array([1.5, -0.5, 0.0])),
    "cross_entropy: logits are probabilities": lambda: categorical.cross_entropy(jax.nn.softmax(EYE), I),
    "sample: temperature -1.0 is negative": lambda: categorical.sample(KEY, Z, temperature=jnp.array(-1.0)),
    "log_posterior: logits are probabilities": lambda: bayes.log_posterior(jnp.full((2, 2), 0.5), jnp.zeros(2)),
    "gaussian_posterior: prior_scale 0.0 is not positive": lambda: bayes.gaussian_posterior(0.0, 0.0, X, 1.0),
    "gaussian_posterior: scale -1.0 is not positive": lambda: bayes.gaussian_posterior(0.0, 1.0, X, -1.0),
    "gaussian_posterior: weight -1.0 is negative": lambda: bayes.gaussian_posterior(0.0, 1.0, X, 1.0, weights=-X),
    "beta_posterior: label 2.0 is outside [0, 1]": lambda: bayes.beta_posterior(1.0, 1.0, 2 * X),
    "beta_posterior: prior_alpha 0.0 is not positive": lambda: bayes.beta_posterior(0.0, 1.0, X),
    "mean: logits are probabilities": lambda: expectation.mean(X, Z + 1 / 3),
    "fit: weight -1.0 is negative": lambda: gaussian.fit(X, weights=-X),
    "interval_prob: low 1.0 is above high": lambda: gaussian.interval_prob(X, 0 * X),
    "log_prob: scale_tril has -1.0 on its diagonal, not positive": lambda: mvn.log_prob(X, X, -EYE),
    "entropy: scale_tril has 0.0 on its diagonal, not positive": lambda: mvn.entropy(EYE.at[1, 1].set(0)),
    "scale_tril: covariance is not positive definite": lambda: mvn.scale_tril(covariance=EYE - 2),
    "scale_tril: standard deviation 0.0 is not positive": lambda: mvn.scale_tril(diagonal=0 * X),
    "confusion_matrix: weight -1.0 is negative": lambda: metrics.confusion_matrix(I, I, num_classes=1, weights=-X),
    "perplexity: weight -1.0 is negative": lambda: metrics.perplexity(X, weights=-X),
    "f1_score: count -1.0 is negative": lambda: metrics.f1_score(-EYE),
    "reliability: weight -1.0 is negative": lambda: calibration.reliability(EYE, I, weights=-X),
    "fit_temperature: weight -1.0 is negative": lambda: calibration.fit_temperature(EYE, I, weights=-X),
    "fit_temperature: logits are probabilities": lambda: calibration.fit_temperature(jax.nn.softmax(EYE), I),
    "expected_calibration_error: weight -1.0 is negative":
        lambda: calibration.expected_calibration_error(calibration.Reliability(-X, X, X, X)),
    "distillation_loss: top_indices 9 is outside [0, 3)": lambda: linear.distillation_loss(
        EYE, EYE, temperature=2.0, top_log_probs=X[:, None], top_indices=jnp.full((3, 1), 9)),
    "distillation_loss: top_indices has class 2 twice for one token": lambda: linear.distillation_loss(
        EYE, EYE, temperature=2.0, top_log_probs=EYE, top_indices=jnp.full((3, 3), 2)),
}  # fmt: skip


@pytest.mark.parametrize("message", DATA_FAULTS)
def test_a_fault_of_the_data_is_named_under_checkify(message):
    """The value is NaN, unless it has a meaning."""
    error, value = jprob.checkify(DATA_FAULTS[message])()
    assert error.get().startswith(message)
    if not re.search("probabilities|target|twice|^sample|^expected", message):
        assert any(jnp.isnan(x).any() for x in jax.tree.leaves(value))


BAD = (np.inf, -np.inf, np.nan, -1.0, 0.0, 2.0, 1e-38)


# Categorical and Bernoulli losses have a law with labels and targets that are worse, in test_laws.py.
@these([name for name, case in CASES.items() if case.per_example and case.differentiable
        and name.startswith(("gaussian.", "mvn.", "bayes.", "expectation."))])  # fmt: skip
def test_a_masked_example_poisons_nothing(case):
    """A cotangent of 0 for one example: its arguments change no gradient, its own nor one that others share."""

    def gradients(shared, *args):
        """Gradients of the sum over all examples but the first. Arguments that are shared have one row for all."""

        def loss(*values):
            rows = [jnp.where(one, jnp.broadcast_to(v[1:2], v.shape), v) for one, v in zip(shared, values, strict=True)]
            out = case.function(*rows)
            return jnp.sum(jnp.where((jnp.arange(8) > 0).reshape(-1, *[1] * (out.ndim - 1)), out, 0))

        return jax.grad(loss, case.differentiable)(*args)

    program, each = jax.jit(gradients), np.arange(len(case.args))
    for i, others in itertools.product(case.differentiable, (False, True)):
        shared = others & (each != i)
        want = program(shared, *case.args)
        for bad in BAD:
            for place in {(0,), (0,) * case.args[i].ndim}:
                args = list(case.args)
                args[i] = np.asarray(args[i]).copy()
                args[i][place] = bad
                got = program(shared, *args)
                chex.assert_trees_all_equal(got, want, custom_message=f"argument {i} is {bad}")


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


# Faults of types, shapes and numbers, by their messages: those that the hostile values below do not bring about.
WRONG = {
    "softmax: logits must be a floating-point array, got int32[3]": lambda: categorical.softmax(I),
    "softmax: axis must be an axis of logits float32[2, 3], got 2": lambda: categorical.softmax(Z, axis=2),
    "softmax: expected at least one class on axis -1": lambda: categorical.softmax(Z[:, :0]),
    "cross_entropy: labels must have the shape [2] of logits without the": lambda: categorical.cross_entropy(Z, I),
    "brier_score: floating-point labels must have the shape [2, 3] of logits": lambda: categorical.brier_score(Z, X),
    "cross_entropy: labels must be integer or floating-point, got": lambda: categorical.cross_entropy(EYE, X > 0),
    "softmax: where must be a boolean array, got float32[3]": lambda: categorical.softmax(Z, where=X),
    "softmax: where must broadcast to [2, 3] of logits, got bool[3, 3]": lambda: categorical.softmax(Z, where=EYE > 0),
    "softmax: temperature must have length 1 on the class axis 1 of": lambda: categorical.softmax(Z, temperature=Z),
    "softmax: temperature must broadcast to [2, 3] of logits, got": lambda: categorical.softmax(Z, temperature=X[:2]),
    "cross_entropy: label_smoothing must be in [0": lambda: categorical.cross_entropy(EYE, I, label_smoothing=1.5),
    "entropy: base must be a number above 1": lambda: categorical.entropy(Z, base=1),
    "log_prob: labels must be integer classes, got float32[3]": lambda: categorical.log_prob(X, EYE),
    "log_prob: labels must have the shape [2] of logits without the class axis": lambda: categorical.log_prob(I, Z),
    "sample: shape must end in [2], the shape of logits without the": lambda: categorical.sample(KEY, Z, shape=(3,)),
    "distillation_loss: temperature must be one real": lambda: categorical.distillation_loss(Z, Z, temperature=X),
    "sample: temperature must be at least 0, got -1": lambda: categorical.sample(KEY, Z, temperature=-1),
    "kl_divergence: q_logits must have the shape [2, 3] of p_logits, got": lambda: categorical.kl_divergence(Z, X),
    "cross_entropy: logits must be a floating-point array, got int32[3]": lambda: bernoulli.cross_entropy(I, X),
    "cross_entropy: labels must have the shape [3] of logits, got": lambda: bernoulli.cross_entropy(X, X[:2]),
    "kl_divergence: expected q_scale or q_log_scale": lambda: gaussian.kl_divergence(X, X, q_scale=X, q_log_scale=X),
    "log_prob: x must be a floating-point array, got int32[3]": lambda: gaussian.log_prob(I),
    "log_prob: loc must be an array of real numbers, got complex64[]": lambda: gaussian.log_prob(X, 1j),
    "log_prob: expected shapes that broadcast to that of one argument, got x": lambda: gaussian.log_prob(X, X[:2]),
    "nll: expected shapes that broadcast to that of one argument, got x": lambda: gaussian.nll(X, X[:, None]),
    "nll: beta must be in [0, 1], got 2.0": lambda: gaussian.nll(X, beta=2.0),
    "fit: axis must be an axis of x float32[3], got 1": lambda: gaussian.fit(X, axis=1),
    "fit: expected at least one observation on axis -1 of x, got float32[0]": lambda: gaussian.fit(X[:0]),
    "fit: weights must broadcast to [3] of x, got float32[2, 3]": lambda: gaussian.fit(X, weights=Z),
    "interval_prob: high must be a floating-point array, got int32[3]": lambda: gaussian.interval_prob(X, I),
    "sample: shape must end in [2], the shape of loc and scale": lambda: gaussian.sample(KEY, X[:2], shape=(3,)),
    "scale_tril: expected exactly one of covariance, precision and diagonal, got none": mvn.scale_tril,
    "scale_tril: diagonal must have an axis of dimensions, got float32[]": lambda: mvn.scale_tril(diagonal=X[0]),
    "scale_tril: expected exactly one of covariance, precision": lambda: mvn.scale_tril(covariance=EYE, diagonal=X),
    "scale_tril: precision must be square, got float32[2, 3]": lambda: mvn.scale_tril(precision=Z),
    "log_prob: x must have 3 dimensions, got float32[2]": lambda: mvn.log_prob(X[:2], X, EYE),
    "log_prob: expected shapes that broadcast to that of one argument, got": lambda: mvn.log_prob(Z, Z[:, None], EYE),
    "fit: weights must broadcast to [2] of x without its last axis, got float32[3]": lambda: mvn.fit(Z, weights=X),
    "fit: axis must be one of float32[2, 3] before the last, got -1": lambda: mvn.fit(Z, axis=-1),
    "log_posterior: expected shapes that broadcast to that of one argument": lambda: bayes.log_posterior(X, X[:2]),
    "log_evidence: axis must be an axis of the hyp": lambda: bayes.log_evidence(X, X, axis=1),
    "log_posterior: log_prior must be a floating-point array, got int32[3]": lambda: bayes.log_posterior(I, X),
    "update: log_likelihoods must have one axis of observations": lambda: bayes.update(X, X),
    "gaussian_posterior: weights must broadcast to": lambda: bayes.gaussian_posterior(0.0, 1.0, X, 1.0, weights=X[:2]),
    "gaussian_posterior: axis must be an axis of x": lambda: bayes.gaussian_posterior(0.0, 1.0, X, 1.0, axis=1),
    "variance: values must broadcast to [3] of logits": lambda: expectation.variance(X[:2], X),
    "monte_carlo: num_samples must be an integer in [2, 2^31), got 1":
        lambda: expectation.monte_carlo(jnp.sin, gaussian.sample, KEY, num_samples=1),
    "monte_carlo: what fn returns must be an array of real numbers, got tuple":
        lambda: expectation.monte_carlo(lambda x: (x, x), gaussian.sample, KEY, num_samples=2),
    "confusion_matrix: num_classes must be an integer in [1": lambda: metrics.confusion_matrix(I, I, num_classes=0),
    "confusion_matrix: labels must be integer classes, got": lambda: metrics.confusion_matrix(X, I, num_classes=2),
    "confusion_matrix: predictions must be integer classes": lambda: metrics.confusion_matrix(I, EYE, num_classes=2),
    "confusion_matrix: predictions must have the shape [3]": lambda: metrics.confusion_matrix(I, I[:2], num_classes=2),
    "confusion_matrix: weights must have the shape [3] of labels, got float32[3, 1]":
        lambda: metrics.confusion_matrix(I, I, num_classes=2, weights=X[:, None]),
    "f1_score: matrix must be a floating-point array, got bool[3, 3]": lambda: metrics.f1_score(EYE > 0),
    "accuracy: matrix must have the shape [..., K, K], got float32[2, 3]": lambda: metrics.accuracy(Z),
    "reliability: num_bins must be an integer in [1, 16777216]": lambda: calibration.reliability(EYE, I, num_bins=0),
    "fit_temperature: labels must be integer classes, got float32[3]": lambda: calibration.fit_temperature(EYE, X),
    "fit_temperature: labels must have the shape [2] of logits without the": lambda: calibration.fit_temperature(Z, I),
    "reliability: weights must have the shape [3] of logits": lambda: calibration.reliability(EYE, I, weights=Z),
    "brier_decomposition: table.correct must have the shape [3] of table.weight, got float32[2]":
        lambda: calibration.brier_decomposition(calibration.Reliability(X, X, X[:2], X)),
    "cross_entropy: hidden must be a floating-point array, got int32[3]": lambda: linear.cross_entropy(I, EYE, I),
    "cross_entropy: kernel must be [H, V] with hidden [..., H], got": lambda: linear.cross_entropy(EYE, Z, I),
    "log_prob: kernel must be [V, H] with hidden [...": lambda: linear.log_prob(I, EYE, Z.T, transposed_kernel=True),
    "cross_entropy: expected at least one class, got kernel": lambda: linear.cross_entropy(EYE, EYE[:, :0], I),
    "cross_entropy: floating-point labels must have the shape [3, 3]": lambda: linear.cross_entropy(EYE, EYE, X),
    "cross_entropy: labels must have the shape [3] of hidden without": lambda: linear.cross_entropy(EYE, EYE, I[:2]),
    "cross_entropy: weights must have the shape [3] of": lambda: linear.cross_entropy(EYE, EYE, I, weights=X[:2]),
    "entropy: bias must have the shape [3] of the classes of kernel": lambda: linear.entropy(EYE, EYE, bias=X[:2]),
    "cross_entropy: z_loss must be finite and at least 0, got -1": lambda: linear.cross_entropy(EYE, EYE, I, z_loss=-1),
    "entropy: softcap must be finite and above 0, got 0": lambda: linear.entropy(EYE, EYE, softcap=0),
    "log_prob: temperature must be finite and above 0, got 0": lambda: linear.log_prob(I, EYE, EYE, temperature=0),
    "plan: block_bytes must be a positive integer, got 0": lambda: linear.plan(EYE, EYE, block_bytes=0),
    "mode: block_bytes must be a positive integer, got True": lambda: linear.mode(EYE, EYE, block_bytes=True),
    "cross_entropy: has_aux must be True or False, got 'yes'": lambda: linear.cross_entropy(EYE, EYE, I, has_aux="yes"),
    "cross_entropy: transposed_kernel must be True or False, got 1":
        lambda: linear.cross_entropy(EYE, EYE, I, transposed_kernel=1),
    "reliability: class_wise must be True or False, got 1": lambda: calibration.reliability(EYE, I, class_wise=1),
    "sample: key must be one key, as jax.random.key makes it, got uint32[3]":
        lambda: gaussian.sample(jnp.zeros(3, jnp.uint32)),
    "cross_entropy: logits must be an array of real numbers, got a ShapeDtypeStruct":
        lambda: categorical.cross_entropy(jax.eval_shape(lambda: EYE), I),
    "entropy: scale must be an array of real numbers, got key<fry>[]": lambda: gaussian.entropy(KEY),
    "kl_divergence: q_hidden must have the tokens [3] of p_hidden": lambda: linear.kl_divergence(EYE, EYE, Z, EYE),
    "kl_divergence: both kernels must have the same classes, got 3": lambda: linear.kl_divergence(EYE, EYE, EYE, Z.T),
    "distillation_loss: expected either teacher_hidden": lambda: linear.distillation_loss(EYE, EYE, EYE, temperature=1),
    "distillation_loss: top_indices must be integer classes, got float32[3, 3]":
        lambda: linear.distillation_loss(EYE, EYE, temperature=1.0, top_log_probs=EYE, top_indices=EYE),
}  # fmt: skip


@pytest.mark.wrong_types
@pytest.mark.parametrize("message", WRONG)
def test_a_static_mistake_is_one_line(message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        WRONG[message]()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", public_functions())
def test_what_is_wrong_is_told_in_one_line(name):
    """Each argument in turn is hostile: the call has a meaning, if it may, or its error is one line of the function."""
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
        else:
            if what in MEANINGLESS:
                faults.append(f"{parameter}={what}: taken")
    assert not faults, "\n".join(faults)
