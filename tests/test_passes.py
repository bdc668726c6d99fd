"""How often a program reads and writes arrays of the size of the logits: that is its time on a GPU.

The test counts in the program that jax lowers for CUDA, before XLA. XLA makes one kernel of elementwise operations and
of sums of an array that do not wait for each other. So a pass is a step of waiting. A sum or maximum over classes waits
for the passes that make its operand. A result of the logits' size waits for those that make its numbers per row.
"""

import math

import jax
import jax.numpy as jnp
import pytest

from jprob import categorical

ROWS, CLASSES = 8, 4096
Z, LABELS = jnp.zeros((ROWS, CLASSES)), jnp.zeros(ROWS, jnp.int32)


def passes(function, *args):
    """How many passes read full-size arrays, and how many results of that size are written."""
    module = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    functions = {op.name.value: op for op in module.body.operations}

    def full(value):
        return math.prod(value.type.shape) >= Z.size

    def run(block, arguments, outer):
        """For each result, the passes before it, by their place in the order of waiting."""
        known = dict(outer) | dict(zip(block.arguments, arguments, strict=True))
        for op in block.operations:
            before = frozenset().union(*(known[x] for x in op.operands))
            name = op.operation.name
            assert name not in ("stablehlo.optimization_barrier", "stablehlo.while"), name
            if name == "stablehlo.slice":
                assert full(op.operands[0]) == full(op.results[0]), "a part of the classes"
            if name.endswith(".return"):
                return [(known[x], full(x)) for x in op.operands]
            if name == "func.call":
                results = run(functions[op.callee.value].regions[0].blocks[0], [known[x] for x in op.operands], {})
            elif name == "stablehlo.case" and len(op.regions) == 1:
                results = run(op.regions[0].blocks[0], [], known)
            elif name == "stablehlo.reduce" and full(op.operands[0]) and not full(op.results[0]):
                results = [(before | {len(before) + 1}, False)] * len(op.results)
            else:
                results = [(before, False)] * len(op.results)
            known |= {x: done for x, (done, _) in zip(op.results, results, strict=True)}
        raise AssertionError("no return")

    main = functions["main"].regions[0].blocks[0]
    results = run(main, [frozenset()] * len(main.arguments), {})
    reads = frozenset().union(*(done | {len(done) + 1} if is_full else done for done, is_full in results))
    return len(reads), sum(is_full for _, is_full in results)


def value_and_gradient(function, argnum=0):
    return jax.value_and_grad(lambda *args: jnp.sum(function(*args)), argnum)


def map_and_pull(function):
    return lambda z, cotangent: jax.vjp(function, z)[1](cotangent)


def smoothed(z, labels):
    return categorical.cross_entropy(z, labels, label_smoothing=0.1)


# The maximum, sums that need it alone, and a result of the logits' size that needs those. A divergence needs the mean
# of the difference after the sums, and itself after the mean; its gradients need it.
NEEDED = {
    "cross_entropy": (categorical.cross_entropy, (Z, LABELS), (2, 0)),
    "cross_entropy, gradient": (value_and_gradient(categorical.cross_entropy), (Z, LABELS), (3, 1)),
    "smoothed": (smoothed, (Z, LABELS), (2, 0)),
    "smoothed, gradient": (value_and_gradient(smoothed), (Z, LABELS), (3, 1)),
    "soft targets": (categorical.cross_entropy, (Z, Z), (2, 0)),
    "soft targets, gradient": (value_and_gradient(categorical.cross_entropy), (Z, Z), (3, 1)),
    "entropy": (categorical.entropy, (Z,), (2, 0)),
    "entropy, gradient": (value_and_gradient(categorical.entropy), (Z,), (3, 1)),
    "softmax": (categorical.softmax, (Z,), (3, 1)),
    "softmax, gradient": (map_and_pull(categorical.softmax), (Z, Z), (4, 1)),
    "log_softmax": (categorical.log_softmax, (Z,), (3, 1)),
    "log_softmax, gradient": (map_and_pull(categorical.log_softmax), (Z, Z), (4, 1)),
    "kl_divergence": (categorical.kl_divergence, (Z, Z), (4, 0)),
    "kl_divergence, gradient in p": (value_and_gradient(categorical.kl_divergence), (Z, Z), (5, 1)),
    "kl_divergence, gradient in q": (value_and_gradient(categorical.kl_divergence, 1), (Z, Z), (5, 1)),
    "js_divergence": (categorical.js_divergence, (Z, Z), (5, 0)),
    "brier_score": (categorical.brier_score, (Z, LABELS), (3, 0)),
    "brier_score, gradient": (value_and_gradient(categorical.brier_score), (Z, LABELS), (4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_a_gpu_goes_over_the_logits_as_often_as_the_formula_needs(name):
    function, args, needed = NEEDED[name]
    assert passes(function, *args) == needed


def test_what_waits_is_counted():
    assert passes(lambda z: jnp.sum(z, axis=1), Z) == (1, 0)
    assert passes(lambda z: jnp.sum(z, axis=1) + jnp.max(z, axis=1), Z) == (1, 0)
    assert passes(lambda z: z - jnp.max(z, axis=1, keepdims=True), Z) == (2, 1)
    assert passes(jax.nn.logsumexp, Z) == (2, 0)
    with pytest.raises(AssertionError, match="barrier"):
        passes(jax.lax.optimization_barrier, Z)
    with pytest.raises(AssertionError, match="a part"):
        passes(lambda z: z[:, 1:], Z)
