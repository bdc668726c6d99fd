"""Exactness of the categorical functions: value and gradient against mpmath, in units of u."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jprob import categorical

U = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}  # of the dtype computed in
# float16 takes the path of bfloat16: computed in float32, rounded once. float64 takes that of float32.
DTYPES = ["bfloat16", "float64", pytest.param("float16", marks=pytest.mark.slow),
          pytest.param("float32", marks=pytest.mark.optimized),
          pytest.param("float64", marks=[pytest.mark.optimized, pytest.mark.slow], id="float64 as is")]  # fmt: skip


def rows() -> dict[str, list[float]]:
    """Logits by regime. Halves and small integers are exact in every dtype."""
    return {
        "one class": [3.0],
        "equal": [0.0, 0.0],
        "tie of three": [2.0, 2.0, 2.0],
        "tie at the top": [5.0, 5.0, -3.0],
        "near": [1.0, 1.0078125, 0.9921875],
        **{f"margin {m}": [float(m), 0.0, 0.5] for m in (1, 4, 12, 17, 20, 60, 87, 100)},
        **{f"margin -{m}": [float(-m), 0.0, -0.5] for m in (1, 4, 12, 17, 20, 60, 100)},
        "impossible class": [1.0, -math.inf, 0.0],
        "impossible first": [-math.inf, 20.0, 0.0],
    }


def as_dtype(row, dtype: str) -> jax.Array:
    return jnp.asarray(np.asarray(row), dtype=dtype)


def together(rows, dtype: str) -> jax.Array:
    """One array, so that each function compiles once a dtype: a row of fewer classes gets impossible ones."""
    return as_dtype([[*row, *[-math.inf] * (3 - len(row))] for row in rows], dtype)


def span(*rows) -> float:
    """R: the largest gap between finite logits of a row."""
    finite = [np.asarray(r, np.float64)[np.isfinite(np.asarray(r, np.float64))] for r in rows]
    return max(float(np.ptp(r)) for r in finite)


def computed_in(dtype) -> str:
    return "float64" if dtype == "float64" else "float32"


def tolerance(dtype: str, out: str, *logits) -> float:
    """(16 + R) u, and one rounding to the dtype of the result."""
    rounding = float(jnp.finfo(out).eps) / 2 if out != "float64" else 0.0
    return (16 + span(*logits)) * U[dtype] + (rounding if U[dtype] < rounding else 0.0)


def tiny(dtype) -> float:
    """The largest number that may be flushed to 0: the smallest normal one of the result and the dtype computed in."""
    return max(float(jnp.finfo(dtype).tiny), float(jnp.finfo(computed_in(dtype)).tiny))


@pytest.fixture(params=DTYPES)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@functools.cache
def value_and_slopes(function, argnums=0, batched=True):
    """Value and gradients of each row of a batch, or of one row. Compiled once for each shape and dtype."""
    program = jax.value_and_grad(function, argnums)
    return jax.jit(jax.vmap(program) if batched else program)


def one_hot(k: int, label: int) -> list:
    return [oracles.mpf(i == label) for i in range(k)]


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_maps_and_their_jacobians_have_the_digits_their_logits_determine(name, dtype):
    """Each entry of the jacobian, the 1 - p of a confident class included, in forward and in reverse mode."""
    fn, oracle, batch = getattr(categorical, name), getattr(oracles, name), together(rows().values(), dtype)
    got, *jacobians = jax.jit(lambda z: (fn(z), jax.vmap(jax.jacfwd(fn))(z), jax.vmap(jax.jacrev(fn))(z)))(batch)
    assert got.dtype == dtype
    for case, logits, out, *both in zip(rows(), np.asarray(batch), got, *map(np.asarray, jacobians), strict=True):
        z = oracles.exactly(logits)
        assert oracles.error(out, oracle(z), tiny(dtype)) <= tolerance(dtype, dtype, logits), case
        for i in np.flatnonzero(np.isfinite(logits)):
            want = oracles.gradient(lambda row, i=i: oracle(row)[i], z)
            # softmax: p_i times (delta - p_j), two factors with an error of R u each.
            bound = tolerance(dtype, dtype, logits, 2 * logits if name == "softmax" else logits)
            assert all(oracles.error(jacobian[i], want, tiny(dtype)) <= bound for jacobian in both), (case, i)


def each_label(dtype):
    """Rows of logits with each of their labels."""
    cases = [(row, label) for row in rows().values() for label in sorted({0, 1 % len(row), len(row) - 1})]
    return together([row for row, _ in cases], dtype), jnp.array([label for _, label in cases])


def test_cross_entropy_and_its_gradient_never_saturate(dtype):
    batch, labels = each_label(dtype)
    values, gradients = value_and_slopes(categorical.cross_entropy)(batch, labels)
    assert (values.dtype, gradients.dtype) == (computed_in(dtype), dtype)
    for logits, label, value, got in zip(np.asarray(batch), labels.tolist(), values, gradients, strict=True):
        z, y = oracles.exactly(logits), one_hot(3, label)
        bound = tolerance(dtype, computed_in(dtype), logits)
        assert oracles.error(value, oracles.cross_entropy(z, y), tiny(computed_in(dtype))) <= bound, (z, label)
        want = [a - b for a, b in zip(oracles.softmax(z), y, strict=True)]
        assert oracles.error(got, want, tiny(dtype)) <= tolerance(dtype, dtype, logits), (z, label)


def test_brier_score_and_its_gradient_are_exact_where_they_decay(dtype):
    batch, labels = each_label(dtype)
    values, gradients = value_and_slopes(categorical.brier_score)(batch, labels)
    assert (values.dtype, gradients.dtype) == (computed_in(dtype), dtype)
    for logits, label, value, got in zip(np.asarray(batch), labels.tolist(), values, gradients, strict=True):
        z, y = oracles.exactly(logits), one_hot(3, label)
        bound = tolerance(dtype, computed_in(dtype), 2 * logits) + 8 * U[dtype]
        assert oracles.error(value, oracles.brier_score(z, y), tiny(computed_in(dtype))) <= bound, (z, label)
        p = oracles.softmax(z)
        e = [a - b for a, b in zip(p, y, strict=True)]
        want = [2 * a * oracles.mpmath.fsum(b * (e[i] - d) for b, d in zip(p, e, strict=True)) for i, a in enumerate(p)]
        assert want == pytest.approx(oracles.gradient(lambda row, y=y: oracles.brier_score(row, y), z), 1e-25, 1e-60)
        assert oracles.error(got, want, tiny(dtype)) <= tolerance(dtype, dtype, 3 * logits), (z, label)


@pytest.mark.optimized
def test_one_and_two_classes_need_no_third():
    """The shapes that the batches above do not have."""
    for row in ([3.0], [0.0, 0.0], [20.0, 0.0], [-17.0, 0.0]):
        logits, z, y = jnp.array(row), oracles.exactly(row), one_hot(len(row), 0)
        for name, more in (("cross_entropy", 0), ("brier_score", 8 * U["float32"])):
            value, got = jax.value_and_grad(getattr(categorical, name))(logits, jnp.array(0))
            oracle = functools.partial(getattr(oracles, name), targets=y)
            assert oracles.error(value, oracle(z)) <= tolerance("float32", "float32", 2 * logits) + more
            want = oracles.gradient(oracle, z)
            assert oracles.error(got, want, 1e-37) <= tolerance("float32", "float32", 3 * logits) + more
        assert oracles.error(categorical.entropy(logits), oracles.entropy(z)) <= tolerance("float32", "float32", logits)


TARGETS = {
    "one-hot": [0.0, 1.0, 0.0],
    "soft": [0.25, 0.5, 0.25],
    "with a zero": [0.75, 0.0, 0.25],
    "nearly one-hot": [1 - 2.0**-8, 2.0**-8, 0.0],
}


def test_soft_targets_are_exact(dtype):
    cases = [(row, target) for row in rows().values() if len(row) == 3 for target in TARGETS.values()]
    batch, targets = (as_dtype(x, dtype) for x in zip(*cases, strict=True))
    values, slopes = value_and_slopes(categorical.cross_entropy, (0, 1))(batch, targets)
    for logits, t, value, dz, dt in zip(*map(np.asarray, (batch, targets, values, *slopes)), strict=True):
        z, y = oracles.exactly(logits), oracles.exactly(t)
        bound = tolerance(dtype, computed_in(dtype), logits)
        assert oracles.error(value, oracles.cross_entropy(z, y), tiny(computed_in(dtype))) <= bound, (z, y)
        p = oracles.softmax(z)
        for got, a, b in zip(dz.astype(np.float64), p, y, strict=True):
            # If p and the target differ little, the digits that p itself lacks bound those of the difference.
            bound = tolerance(dtype, dtype, logits) * max(abs(a - b), a if a < 0.5 else 1 - a)
            assert abs(oracles.mpf(got) - (a - b)) <= bound + tiny(dtype), (z, y)
        loss = [-log_p if a else oracles.mpf(0) for a, log_p in zip(p, oracles.log_softmax(z), strict=True)]
        assert oracles.error(dt, loss, tiny(dtype)) <= tolerance(dtype, dtype, logits), (z, y)


def test_label_smoothing_equals_the_smoothed_target_over_possible_classes(dtype):
    batch, smoothing = together(rows().values(), dtype), as_dtype([0.1, 0.5, 1.0], computed_in(dtype))
    first = jnp.zeros(len(batch), jnp.int32)

    def smoothed(labels):
        return jax.vmap(lambda e: categorical.cross_entropy(batch, labels, label_smoothing=e))(smoothing)

    for values in jax.jit(lambda: [smoothed(labels) for labels in (first, jax.nn.one_hot(first, 3, dtype=dtype))])():
        for e, losses in zip(oracles.exactly(smoothing), values, strict=True):
            for logits, got in zip(np.asarray(batch), losses, strict=True):
                z = oracles.exactly(logits)
                possible = np.isfinite(logits)
                target = [(1 - e) * t + e * p / possible.sum() for t, p in zip(one_hot(3, 0), possible, strict=True)]
                # 1 - e is rounded once more; the smoothed target, in soft form, twice.
                bound = tolerance(dtype, computed_in(dtype), logits) + 3 * U[dtype]
                assert oracles.error(got, oracles.cross_entropy(z, target), tiny(computed_in(dtype))) <= bound, (z, e)


def test_entropy_is_exact(dtype):
    batch = together(rows().values(), dtype)
    for logits, value, gradient in zip(
        *map(np.asarray, (batch, *value_and_slopes(categorical.entropy)(batch))), strict=True
    ):
        z = oracles.exactly(logits)
        bound = tolerance(dtype, computed_in(dtype), logits)
        assert oracles.error(value, oracles.entropy(z), tiny(computed_in(dtype))) <= bound, z
        want = oracles.gradient(oracles.entropy, z)
        terms = [p * (oracles.entropy(z) - oracles.mpmath.log(p)) if p else oracles.mpf(0) for p in oracles.softmax(z)]
        for g, w, term in zip(gradient.astype(np.float64), want, terms, strict=True):
            assert abs(oracles.mpf(g) - w) <= tolerance(dtype, dtype, logits) * max(term, abs(w)) + tiny(dtype), z


PERTURBATION = {"float16": 2.0**-9, "bfloat16": 2.0**-6, "float32": 2.0**-20, "float64": 2.0**-48}


def pairs() -> dict[str, tuple]:
    """p, and q - p in units: 1 stands for the smallest perturbation that the dtype holds next to 1."""
    return {
        "equal": ([0.5, 1.0, 1.5], [0, 0, 0]),
        "nearly equal": ([0.5, 1.0, 1.5], [2, 0, -2]),
        "near": ([0.5, 1.0, 1.5], [64, 16, -32]),
        "near and confident": ([20.0, 1.0, 1.5], [0, 64, -32]),
        "near but one": ([1.0, 0.5, -40.0], [2, -2, "+20"]),
        "apart": ([-0.75, 0.75], ["+0.375", "+2.25"]),
        **{f"opposed by {m}": ([float(m), 0.0], [f"-{m}", f"+{m}"]) for m in (1, 5, 20, 50, 100)},
        "impossible under both": ([1.0, -math.inf, 0.0], [2, 0, 0]),
        "impossible under p": ([1.0, -math.inf, 0.0], ["+1", "=3", "+0"]),
        "nearly all outside p": ([1.0, -math.inf, 0.0], ["+1", "=30", "+0"]),
        "impossible under q": ([1.0, 2.0, 0.0], ["+1", "=-inf", "+0"]),
    }


def each_pair(dtype):
    def changed(p, change):
        return [float(c[1:]) if str(c)[0] == "=" else z + (float(c) if isinstance(c, str) else c * PERTURBATION[dtype])
                for z, c in zip(p, change, strict=True)]  # fmt: skip

    cases = pairs().values()
    return together([p for p, _ in cases], dtype), together([changed(*case) for case in cases], dtype)


def test_kl_has_the_digits_its_inputs_determine(dtype):
    batch = each_pair(dtype)
    values, slopes = value_and_slopes(categorical.kl_divergence, (0, 1))(*batch)
    for case, p, q, value, dp, dq in zip(pairs(), *map(np.asarray, (*batch, values, *slopes)), strict=True):
        zp, zq = oracles.exactly(p), oracles.exactly(q)
        want = oracles.kl_divergence(zp, zq)
        assert value >= 0
        bound = tolerance(dtype, computed_in(dtype), p, q)
        assert oracles.error(value, want, tiny(computed_in(dtype))) <= bound, case
        probs = list(zip(oracles.softmax(zp), oracles.softmax(zq), strict=True))
        bound, scale = tolerance(dtype, dtype, p, q), max(abs(b - a) for a, b in probs)
        assert oracles.error(dq, [b - a for a, b in probs], tiny(dtype), scale) <= bound, case
        slope = [a * (oracles.mpmath.log(a / b) - want) if a and b else oracles.mpf(0) for a, b in probs]
        if not np.isfinite(float(want)):
            slope = [oracles.mpf(0)] * 3
        assert oracles.error(dp, slope, tiny(dtype), max(map(abs, slope))) <= bound, case


@pytest.mark.parametrize(("function", "argnums"), [
    (categorical.kl_divergence, (0, 1)),
    pytest.param(lambda z, other: categorical.cross_entropy(z, jax.nn.softmax(other)), (0,), marks=pytest.mark.slow),
    pytest.param(lambda z, other: categorical.cross_entropy(z, jnp.argmax(other, -1)), (0,), marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.optimized
def test_many_rows_of_few_classes_have_the_digits_of_each(function, argnums):
    """A CPU has loops over rows for them."""
    p, q = each_pair("float32")
    want, slopes = value_and_slopes(function, argnums)(p, q)
    many = [jnp.tile(z, (400, 1)) for z in (p, q)]
    out, pull = jax.jit(lambda *z: jax.vjp(function, *z))(*many)
    for first, got in ((want, out), *zip(slopes, jax.jit(pull)(jnp.ones_like(out)), strict=False)):
        got = np.reshape(got, (400, *first.shape))
        chex.assert_trees_all_equal(got, np.broadcast_to(got[0], got.shape))
        for logits, a, b in zip(zip(p, q, strict=True), first, got[0], strict=True):
            bound = 2 * tolerance("float32", "float32", *logits)
            np.testing.assert_allclose(b, a, bound, bound * np.max(np.abs(a), where=np.isfinite(a), initial=0))


def weighted_js(p_logits, q_logits, weight):
    return categorical.js_divergence(p_logits, q_logits, weight=weight)


# 1 less the last one is no float32.
@pytest.mark.parametrize("weight", [0.5, pytest.param(2.0**-20, marks=pytest.mark.slow), float(np.float32(1e-6))])
def test_js_has_the_digits_its_inputs_determine(dtype, weight):
    batch, w = each_pair(dtype), oracles.mpf(weight)
    values, slopes = value_and_slopes(weighted_js, (0, 1))(*batch, jnp.full(len(pairs()), weight))
    reverse = categorical.js_divergence(*batch[::-1], weight=1 - weight)
    assert slopes[0].dtype == slopes[1].dtype == dtype
    most = float(-w * oracles.mpmath.log(w) - (1 - w) * oracles.mpmath.log(1 - w))
    for case, p, q, value, back, *both in zip(
        pairs(), *map(np.asarray, (*batch, values, reverse, *slopes)), strict=True
    ):
        zp, zq = oracles.exactly(p), oracles.exactly(q)
        bound = tolerance(dtype, computed_in(dtype), p, q)
        assert 0 <= value <= np.asarray(most, value.dtype) * (1 + 2 * np.finfo(value.dtype).eps)
        assert oracles.error(value, oracles.js_divergence(zp, zq, w), tiny(computed_in(dtype))) <= bound, case
        if float(np.float32(1 - weight)) == 1 - weight:
            assert float(back) == pytest.approx(float(value), rel=bound, abs=tiny(computed_in(dtype)))
        wants = (
            oracles.gradient(lambda z, zq=zq: oracles.js_divergence(z, zq, w), zp),
            oracles.gradient(lambda z, zp=zp: oracles.js_divergence(zp, z, w), zq),
        )
        probs = oracles.softmax(zp), oracles.softmax(zq)
        mixture = [w * a + (1 - w) * b for a, b in zip(*probs, strict=True)]
        for got, want, share, own in zip(both, wants, (w, 1 - w), probs, strict=True):
            terms = [share * a * abs(oracles.mpmath.log(a / m)) for a, m in zip(own, mixture, strict=True) if a]
            # 1e-60: the error that central differences leave where the true gradient is 0.
            scale = max(*terms, *map(abs, want), oracles.mpf(10) ** -60)
            assert oracles.error(got, want, tiny(dtype), scale) <= tolerance(dtype, dtype, p, q), case


def test_distillation_is_the_tempered_divergence(dtype):
    student, teacher = as_dtype([1.0, -2.0, 0.5], dtype), as_dtype([0.0, 3.0, -1.0], dtype)
    temperatures = as_dtype([0.5, 1.0, 2.0, 3.0], computed_in(dtype))
    loss = jax.value_and_grad(lambda s, t, c: categorical.distillation_loss(s, t, temperature=c), argnums=(0, 1))
    values, slopes = jax.jit(jax.vmap(loss, (None, None, 0)))(student, teacher, temperatures)

    def oracle(s, t, c):
        return c**2 * oracles.kl_divergence([x / c for x in t], [x / c for x in s])

    s, t = oracles.exactly(student), oracles.exactly(teacher)
    for c, value, ds, dt in zip(oracles.exactly(temperatures), values, *slopes, strict=True):
        assert oracles.error(value, oracle(s, t, c)) <= tolerance(dtype, computed_in(dtype), student, teacher)
        for got, want in (
            (ds, oracles.gradient(lambda z, c=c: oracle(z, t, c), s)),
            (dt, oracles.gradient(lambda z, c=c: oracle(s, z, c), t)),
        ):
            assert oracles.error(got, want, scale=max(map(abs, want))) <= tolerance(dtype, dtype, student, teacher)


@pytest.mark.parametrize("temperature", [0.3, 3.0])
@pytest.mark.optimized
def test_distillation_takes_logits_whose_quotient_by_the_temperature_overflows(temperature):
    """The teacher is certain of class 0."""
    student, teacher = jnp.array([1.0, 2.0, 3.0]), jnp.array([3e38, -3e38, 0.0])
    loss = lambda z: categorical.distillation_loss(z, teacher, temperature=temperature)  # noqa: E731
    want = lambda z: -(temperature**2) * categorical.log_softmax(z, temperature=temperature)[0]  # noqa: E731
    chex.assert_trees_all_close(
        jax.value_and_grad(loss)(student), jax.value_and_grad(want)(student), rtol=64 * 2.0**-24
    )


def test_distillation_at_a_high_temperature_matches_the_logits():
    student, teacher = jnp.array([1.0, -1.0, 0.5]), jnp.array([0.5, 0.0, 2.0])
    slope = jax.grad(lambda s: categorical.distillation_loss(s, teacher, temperature=1e4))(student)
    want = (student - student.mean()) - (teacher - teacher.mean())
    # The next order is z / T = 2e-4 of it.
    np.testing.assert_allclose(slope, want / 3, rtol=0, atol=2e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_draws_have_the_frequencies_of_their_distribution(temperature):
    z, n = jnp.array([0.0, 1.0, -2.0, -jnp.inf, 1.5]), 200_000
    where = jnp.array([True, True, True, True, False])
    draws = categorical.sample(jax.random.key(1), z, where=where, temperature=temperature, shape=(n,))
    p = np.asarray(categorical.softmax(z, where=where, temperature=temperature), np.float64)
    counts = np.bincount(draws, minlength=5)
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all(), "5 standard errors"
    assert counts[3] == counts[4] == 0


def test_draws_at_temperature_0_are_modes_and_at_infinity_uniform():
    z = jnp.array([1.0, 3.0, 3.0, -jnp.inf])
    cold = categorical.sample(jax.random.key(0), z, temperature=0.0, shape=(1000,))
    assert set(cold.tolist()) == {1, 2}
    hot = np.bincount(categorical.sample(jax.random.key(0), z, temperature=jnp.inf, shape=(90_000,)), minlength=4)
    assert hot[3] == 0
    assert np.abs(hot[:3] - 30_000).max() <= 5 * math.sqrt(20_000)


@pytest.mark.optimized
def test_rare_classes_are_drawn_as_often_as_they_should_be():
    """2^-28 is below the resolution of 23 random bits. 4e7 draws of 23 bits would hold 5 of them instead of .15."""
    z = jnp.array([0.0, -28 * math.log(2)])
    draw = jax.jit(lambda key: jnp.sum(categorical.sample(key, z, shape=(4_000_000,))))
    assert sum(int(draw(key)) for key in jax.random.split(jax.random.key(0), 10)) <= 1


MANY = 100_000
# Logits of p, what those of q differ by, and the logits of single classes. Class 0 is the label.
CROWDS = {
    "all equal": ([0.1], [0.0], {}),
    "spread by 1": ([0.0, 0.3, 1.0], [-0.7, 0.3], {}),
    "spread by 30": ([0.0, 13.7, 30.0], [-9.1, 0.0, 6.3], {}),
    "nearly equal": ([0.0, 0.3, 1.0], [-(2.0**-12), 0.0, 2.0**-12], {}),
    "right by 12": ([0.1], [-0.7, 0.3], {0: 12.4}),
    "right by 30": ([0.1], [-0.7, 0.3], {0: 30.1}),
    "wrong by 12": ([0.1], [-0.7, 0.3], {1: 12.4}),
}
OF_MANY = {
    "softmax": (lambda p, q, t: categorical.softmax(p)[0], (0,)),
    "log_softmax": (lambda p, q, t: categorical.log_softmax(p)[0], (0,)),
    "cross_entropy": (lambda p, q, t: categorical.cross_entropy(p, jnp.array(0)), (0,)),
    "soft cross_entropy": (lambda p, q, t: categorical.cross_entropy(p, t), (0, 2)),
    "entropy": (lambda p, q, t: categorical.entropy(p), (0,)),
    "kl_divergence": (lambda p, q, t: categorical.kl_divergence(p, q), (0, 1)),
    "js_divergence": (lambda p, q, t: categorical.js_divergence(p, q), (0, 1)),
    "brier_score": (lambda p, q, t: categorical.brier_score(p, jnp.array(0)), (0,)),
}


@functools.cache
def crowd(case):
    """Logits of p and q and a target over many classes in random order; the group of each class, and the groups.

    The classes of a group are alike. So the oracle needs one term for each of at most 30 groups, times its size.
    """
    levels, changes, single = CROWDS[case]
    rng = np.random.default_rng(0)
    p = rng.choice(np.float32(levels), MANY)
    p[list(single)] = list(single.values())
    q = p + rng.choice(np.float32(changes), MANY)
    target = np.repeat(np.float32([0.5, 2.0**-16, 0.0]), [1, 2**15, MANY - 2**15 - 1])
    rows = np.stack([p, q, target, np.arange(MANY) == 0])
    groups, group, sizes = np.unique(rows, axis=1, return_inverse=True, return_counts=True)
    return rows[:3], group, [oracles.exactly(row) for row in (*groups, sizes)]


def total(n, *factors):
    return oracles.mpmath.fsum(map(math.prod, zip(n, *factors, strict=True)))


def probability(z, n):
    """Probability of one class of each group: n classes of one logit are one class whose logit is log n more."""
    together = oracles.softmax([x + oracles.mpmath.log(k) for x, k in zip(z, n, strict=True)])
    return [p / k for p, k in zip(together, n, strict=True)]


def log_ratio(a, b):
    return [oracles.mpmath.log(x / y) for x, y in zip(a, b, strict=True)]


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def centred(p, v, n):
    """p_i (v_i - <p, v>), and the sizes of its terms."""
    mean, size = total(n, p, v), total(n, p, map(abs, v))
    return [a * (x - mean) for a, x in zip(p, v, strict=True)], [a * (abs(x) + size) for a, x in zip(p, v, strict=True)]


@functools.cache
def truths(case):
    """The value of each function, and the entries of each gradient with the sizes that scale their errors."""
    z_p, z_q, t, y, n = crowd(case)[2]
    p, q = probability(z_p, n), probability(z_q, n)
    m, surprise, wrong = [(a + b) / 2 for a, b in zip(p, q, strict=True)], log_ratio([1] * len(p), p), minus(p, y)
    js_p, js_q = ([x / 2 for x in log_ratio(r, m)] for r in (p, q))
    return {
        "softmax": (total(y, p), (centred(p, y, n)[0], None)),
        "log_softmax": (-total(y, surprise), (minus(y, p), None)),
        "cross_entropy": (total(y, surprise), (minus(p, y), None)),
        "soft cross_entropy": (total(n, t, surprise), (minus(p, t), list(map(max, p, t))), (surprise, None)),
        "entropy": (total(n, p, surprise), centred(p, surprise, n)),
        "kl_divergence": (
            total(n, p, log_ratio(p, q)),
            centred(p, log_ratio(p, q), n),
            (minus(q, p), list(map(max, p, q))),
        ),
        "js_divergence": (total(n, p, js_p) + total(n, q, js_q), centred(p, js_p, n), centred(q, js_q, n)),
        "brier_score": (total(n, wrong, wrong), centred(p, [2 * e for e in wrong], n)),
    }


def ends(values, group):
    """The least value of each group, then the largest of each."""
    groups = np.split(np.asarray(values)[np.argsort(group)], np.cumsum(np.bincount(group))[:-1])
    return [np.min(g) for g in groups] + [np.max(g) for g in groups]


@pytest.mark.parametrize(
    ("case", "name", "batch"),
    [*(pytest.param(case, name, (), marks=[pytest.mark.slow] if name == "js_divergence" else [])  # compiles for 7 s
       for case in CROWDS for name in OF_MANY),
     ("spread by 30", "cross_entropy", (2,)),
     *(pytest.param("spread by 30", name, (2,), marks=pytest.mark.slow) for name in ("entropy", "kl_divergence"))],
)  # fmt: skip
@pytest.mark.optimized
def test_many_classes_add_the_logarithm_of_their_number(case, name, batch):
    (function, argnums), (rows, group, _) = OF_MANY[name], crowd(case)
    program = value_and_slopes(function, argnums, batched=bool(batch))
    value, slopes = program(*(np.broadcast_to(r, (*batch, MANY)) for r in rows))
    # A gradient of softmax has two factors, each with an error of R u; brier_score is as its docstring says.
    r, r_slope, more = {"softmax": (1, 2, 0), "brier_score": (2, 3, 8)}.get(name, (1, 1, 0))
    logits, more = rows[:2] if 1 in argnums else rows[:1], (more + math.log2(MANY)) * U["float32"]
    want, *wants = truths(case)[name]
    error = oracles.error(np.ravel(value)[-1], want, tiny("float32"))
    assert error <= tolerance("float32", "float32", *(r * z for z in logits)) + more
    for got, (entries, scale) in zip(slopes, wants, strict=True):
        least_and_largest = ends(np.reshape(got, (-1, MANY))[-1], group)
        error = oracles.error(least_and_largest, 2 * entries, tiny("float32"), scale and 2 * scale)
        assert error <= tolerance("float32", "float32", *(r_slope * z for z in logits)) + more


@pytest.mark.parametrize(("p", "q"), [
    ([28.0, 30.0, -22.0], [27.0, 29.0, -25.0]),
    ([20.0, 13.0], [23.0, -14.0]),
    ([27.0, -7.5, -9.5], [-9.5, -7.5, 27.0]),
    ([40.0, 0.0, 1.0], [41.0, 0.5, 1.0]),
])  # fmt: skip
@pytest.mark.optimized
def test_kl_slopes_of_confident_classes_keep_their_digits(p, q):
    """Each entry is compared on its own scale, not the largest one's; that of the top class is the rest."""
    slopes = jax.grad(categorical.kl_divergence, argnums=(0, 1))(jnp.array(p), jnp.array(q))
    zp, zq = oracles.exactly(p), oracles.exactly(q)
    wants = (
        oracles.gradient(lambda z: oracles.kl_divergence(z, zq), zp),
        oracles.gradient(lambda z: oracles.kl_divergence(zp, z), zq),
    )
    for got, want in zip(slopes, wants, strict=True):
        assert oracles.error(got, want, tiny("float32")) <= tolerance("float32", "float32", jnp.array(p), jnp.array(q))


@pytest.mark.optimized
def test_more_classes_than_float32_counts():
    last = 2**24 + 1
    z = jnp.zeros(last + 1).at[last].set(30.0).at[last - 1].set(29.0)
    want = math.log1p(math.exp(-1) + last * math.exp(-30))
    for label, loss in ((last, want), (last - 1, want + 1)):
        assert categorical.cross_entropy(z, jnp.array(label)) == pytest.approx(loss, rel=1e-5)
        p = math.exp(-loss)
        assert categorical.brier_score(z, jnp.array(label)) == pytest.approx(2 * (1 - p) ** 2, rel=1e-4)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_temperature_divides_the_logits(name, dtype):
    batch = together(rows().values(), dtype)
    temperatures = as_dtype([0.24273796379566193, 0.25, 0.7, 2.0, 3.3, 100.0], computed_in(dtype))
    got = jax.jit(jax.vmap(lambda t: getattr(categorical, name)(batch, temperature=t)))(temperatures)
    for t, outs in zip(temperatures, got, strict=True):
        for logits, out in zip(np.asarray(batch), outs, strict=True):
            want = getattr(oracles, name)([x / oracles.exactly(t)[0] for x in oracles.exactly(logits)])
            bound = tolerance(dtype, dtype, 3 * logits.astype(np.float64) / float(t))
            assert oracles.error(out, want, tiny(dtype)) <= bound, (logits, t)


def test_temperature_has_its_limits():
    z = jnp.array([1.0, 3.0, 3.0, -jnp.inf])
    assert categorical.softmax(z, temperature=0.0).tolist() == [0, 0.5, 0.5, 0]
    np.testing.assert_allclose(categorical.softmax(z, temperature=jnp.inf), [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-7)
    jacobians = jax.jit(jax.jacrev(lambda z, t: categorical.softmax(z, temperature=t), (0, 1)))
    for temperature in (0.0, math.inf):
        assert not any(slopes.any() for slopes in jacobians(z, temperature))
    assert (jax.grad(lambda z: categorical.log_softmax(z, temperature=0.0)[1])(z) == 0).all()
    slope = jax.grad(lambda t: categorical.log_softmax(z, temperature=t)[0])(2.0)
    # log p_0 = -log(1 + 2 exp(2 / T)); at T = 2 its derivative is e / (1 + 2 e).
    assert slope == pytest.approx(math.e / (1 + 2 * math.e), rel=1e-6)


@pytest.mark.optimized
def test_a_nan_is_none_that_the_compiler_may_replace():
    """XLA on CPU makes a number of `exp(where(ok, x, nan))`, also if exp and where come from two functions."""
    z, tempered = jnp.array([1.0, 2.0]), jax.jit(lambda z, t: categorical.softmax(z, temperature=t))
    assert jnp.isnan(jax.jit(lambda z: categorical.softmax(z, temperature=jnp.array(-1.0)))(z)).all()
    assert jnp.isnan(tempered(z, -1.0)).all()
    for loss in (categorical.cross_entropy, categorical.brier_score):
        of_exp = jax.jit(lambda z, y, loss=loss: jnp.exp(-loss(z, y)))
        assert jnp.isnan(of_exp(z, jnp.array(2)))
        assert jnp.isnan(jax.vmap(of_exp, (None, 0))(z, jnp.array([-1, 7, 100]))).all()


def test_units_are_nats_or_bits():
    z = jnp.array([0.0, 0.0, 0.0, 0.0])
    assert categorical.entropy(z, base=2) == 2
    assert categorical.entropy(z) == pytest.approx(math.log(4))
    q = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
    assert categorical.kl_divergence(q, z, base=2) == pytest.approx(0.25, rel=1e-6)
