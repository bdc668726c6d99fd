"""Eight CPU devices and strict promotion for every test; set before jax starts."""

import functools
import gc
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# The settings of a strict program: no silent promotion of dtypes or ranks. Set here, subprocesses have them too.
os.environ |= {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
# Threads of BLAS that wait for each other take a hundred times the time of the fits here.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# To take the frames of jax out of a traceback takes longer than the call that raises.
os.environ["JAX_TRACEBACK_FILTERING"] = "off"

import jax
import jaxtyping
import pytest
import submitit  # noqa: F401
from jax._src import compiler


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: make test-slow runs it"))


# Tracing makes objects by the million. Looking through them as often as usual takes a tenth of the time.
gc.set_threshold(100_000, 50, 100)

# On import, submitit has logging close its handlers. The handler of absl closes pytest's stderr, if that is replaced at
# the time. Here nothing is.


@pytest.fixture(autouse=True)
def _types_are_checked(request):
    """But where a test hands over wrong ones, to see what the function says."""
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("wrong_types") is not None)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """x64 for the tests that ask for it. A module that tries other dtypes has its own fixture."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


# Here, and in tests with the marker `optimized`, programs are compiled as a user has them: digits are counted, or bits
# compared with those of another process. Elsewhere a program is compared with a program, and to make either fast takes
# longer than to run it.
OPTIMIZED = {"test_accuracy", "test_launch", "test_killed", "test_precision", "test_processes"}


_USUAL = compiler.get_compile_options
_QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


def _is_known(option):
    """Whether this version of XLA takes an option; it lists none."""
    try:
        jax.jit(lambda: 0, compiler_options=dict([option]))()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.cache
def _known():
    return dict(filter(_is_known, _QUICK.items()))


def _quick_options(known, *args, env_options_overrides=None, **options):
    return _USUAL(*args, env_options_overrides=known | (env_options_overrides or {}), **options)


def _optimize(value):
    """Compiles programs as a user has them, or as fast as XLA can: in a quarter of the time."""
    jax.config.update("jax_disable_most_optimizations", not value)
    quick = functools.partial(_quick_options, _known())
    compiler.get_compile_options = _USUAL if value else quick  # jax has no public setting for all programs


_optimize(False)  # also the programs that modules run on import


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Ahead of all fixtures; no program is one that was compiled the other way."""
    optimize = item.path.stem in OPTIMIZED or item.get_closest_marker("optimized") is not None
    if optimize != (compiler.get_compile_options is _USUAL):
        jax.clear_caches()
        _optimize(optimize)


@pytest.fixture(autouse=True, scope="module")
def _programs_of_a_module():
    """They serve no other module; kept, they fill gigabytes."""
    yield
    jax.clear_caches()
