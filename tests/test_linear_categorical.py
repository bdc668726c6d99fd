"""The fused loss is the dense one: values, gradients and corner cases, in blocks, sharded, and in memory."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jprob
from jprob import categorical
from jprob import linear_categorical as linear

U = 2.0**-24
N, H, V = 10, 4, 7
_rng = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return jnp.asarray(_rng.normal(0, scale, shape), jnp.float32)


X, X2, W, W2, B, WEIGHTS = normal(N, H), normal(N, H), normal(H, V), normal(H, V), normal(V), jnp.abs(normal(N))
Y = jnp.asarray(_rng.integers(0, V, N))
FOUR = 4 * V * 4  # bytes of the logits of four tokens: two blocks, and two tokens that remain


def close(got, want, u=64 * U):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=0, atol=u * max(1e-30, float(np.abs(w).max())))


def logits(x, w, b=0.0, *, softcap=None, temperature=1.0):
    z = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    z += jnp.broadcast_to(b, z.shape)
    return (z if softcap is None else softcap * jnp.tanh(z / softcap)) / temperature


def plain(x, w, b, weights, *, label_smoothing=0.0, z_loss=0.0, reduction="mean", **form):
    """The loss and Aux, from all the logits."""
    z = logits(x, w, b, **form)
    nll, lse = categorical.cross_entropy(z, Y), jax.nn.logsumexp(z, axis=-1)
    loss = weights * (categorical.cross_entropy(z, Y, label_smoothing=label_smoothing) + z_loss * lse**2)
    total = {"mean": jnp.sum(loss) / jnp.sum(weights), "sum": jnp.sum(loss), "none": loss}[reduction]
    return total, linear.Aux(nll, lse, categorical.mode(z) == Y, jnp.sum(weights))


OPTIONS = {
    "mean": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "temperature": 0.5},
    "sum": {"reduction": "sum", "label_smoothing": 1.0, "temperature": 2.0},
    "none": {"reduction": "none", "z_loss": 0.01, "softcap": 5.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss_is_that_of_the_logits(options):
    """Values and all gradients (those of nll and logsumexp too), for any blocks and both layouts of the kernel."""
    cotangents = normal(N), normal(N), normal(N)

    def both(function):
        def scalar(*args):
            loss, aux = function(*args)
            return jnp.vdot(cotangents[0][: loss.size], loss) + jnp.vdot(cotangents[1], aux.nll) + jnp.vdot(
                cotangents[2], aux.logsumexp
            ), (loss, aux)  # fmt: skip

        return jax.value_and_grad(scalar, (0, 1, 2, 3), has_aux=True)(X, W, B, WEIGHTS)

    def fused(x, w, b, weights, **how):
        kernel = w.T if how.get("transposed_kernel") else w
        return linear.cross_entropy(x, kernel, Y, bias=b, weights=weights, has_aux=True, **options, **how)

    want = jax.jit(lambda: both(functools.partial(plain, **options)))()
    ways = [{}, {"block_bytes": FOUR, "transposed_kernel": True}]
    for got in jax.jit(lambda: [both(functools.partial(fused, **way)) for way in ways])():
        close(got, want)


@pytest.mark.parametrize("name", ["mean", "sum", pytest.param("none", marks=pytest.mark.slow)])
def test_a_target_distribution_is_one_of_the_logits(name):
    """Values and gradients, in blocks, sharded or not; a label and its one-hot are the same."""
    options = OPTIONS[name]
    targets, one_hot = jax.nn.softmax(normal(16, 8)), jax.nn.one_hot(SHARDED_Y.ravel(), 8)
    x, w, b, weights = SHARDED[0].reshape(16, H), *SHARDED[1:3], SHARDED[3].ravel()
    form = {name: options[name] for name in ("softcap", "temperature") if name in options}

    def dense(x, w, b, t):
        z = logits(x, w, b, **form)
        loss = categorical.cross_entropy(z, t, label_smoothing=options.get("label_smoothing", 0.0))
        loss = weights * (loss + options.get("z_loss", 0) * jax.nn.logsumexp(z, axis=-1) ** 2)
        return jnp.sum(loss) / (jnp.sum(weights) if options.get("reduction", "mean") == "mean" else 1)

    def fused(x, w, b, t, **how):
        return jnp.sum(linear.cross_entropy(x, w, t, bias=b, weights=weights, **options, **how))

    specs = P(), P(None, "model"), P("model"), P(None, "model")
    sharded = over_devices(functools.partial(fused, axis_name="model"), specs, P(), data=1)
    ways = [functools.partial(fused, block_bytes=6 * 8 * 4), sharded]
    both = lambda f: jax.value_and_grad(f, (0, 1, 2))  # noqa: E731
    want, *got = jax.jit(lambda *a: [both(way)(*a) for way in (dense, *ways)])(x, w, b, targets)
    for each in got:
        close(each, want, 128 * U)
    labels = [SHARDED_Y.ravel(), one_hot]
    of_label, of_one_hot = jax.jit(lambda *a: [both(lambda *a, y=y: fused(*a, y))(*a) for y in labels])(x, w, b)
    close(of_one_hot, of_label, 128 * U)


def test_a_target_distribution_keeps_the_digits_of_a_confident_token():
    hidden, kernel, targets = jnp.array([[20.0, 0.0]]), jnp.eye(2), jnp.array([[1.0, 0.0]])
    value, slope = jax.value_and_grad(lambda x: linear.cross_entropy(x, kernel, targets))(hidden)
    want, want_slope = jax.value_and_grad(lambda z: categorical.cross_entropy(z, targets)[0])(hidden)
    assert value > 0
    assert (slope[0] != 0).all()
    close((value, slope), (want, want_slope))


def test_padding_of_targets_is_ignored_and_no_fault():
    """Rows of zeros or NaN with weight 0: no value, no gradient, and nothing to tell under checkify."""
    padded = jnp.stack([jnp.full(V, 1 / V), jnp.zeros(V), jnp.full(V, jnp.nan)])
    loss = jax.value_and_grad(lambda x, weights: linear.cross_entropy(x, W, padded, weights=weights))
    error, (value, slope) = jprob.checkify(loss)(X[:3], jnp.array([1.0, 0.0, 0.0]))
    assert error.get() is None
    close((value, slope[0]), jax.value_and_grad(lambda x: linear.cross_entropy(x[None], W, padded[:1]))(X[0]))
    assert not slope[1:].any()
    error, _ = jprob.checkify(loss)(X[:3], jnp.array([1.0, 1.0, 0.0]))
    assert "sums to 0.0, not 1" in error.get()


def test_each_operand_of_the_loss_may_move_alone():
    """Without aux the rule is a shorter one."""

    def fused(x, w, b, weights):
        call = functools.partial(linear.cross_entropy, x, w, Y, bias=b, block_bytes=FOUR)
        return call(weights=weights) + 2 * call()

    def dense(x, w, b, weights):
        return plain(x, w, b, weights)[0] + 2 * plain(x, w, b, jnp.ones(N))[0]

    def slopes(loss):
        return [jax.value_and_grad(loss, i)(X, W, B, WEIGHTS) for i in range(4)]

    got, want = jax.jit(lambda: (slopes(fused), slopes(dense)))()
    close(got, want, 128 * U)


def test_the_others_are_those_of_the_logits():
    """Values and gradients of what is per token, in blocks, over tokens of any shape."""
    x, x2, y = (a.reshape(2, 5, *a.shape[1:]) for a in (X, X2, Y))
    cotangent = normal(2, 5)
    p, q = (lambda x, w, _a, _b: logits(x, w, softcap=5.0)), (lambda _a, _b, x, w: logits(x, w, softcap=5.0))
    few = {"block_bytes": FOUR, "softcap": 5.0}

    def distilled(*args):
        return linear.distillation_loss(*args, temperature=2.0, **few)

    def dense_distilled(*args):
        return categorical.distillation_loss(p(*args), q(*args), temperature=2.0)

    pairs = [
        (lambda *a: linear.log_prob(y, *a[:2], **few), lambda *a: categorical.log_prob(y, p(*a))),
        (lambda *a: linear.entropy(*a[:2], base=2, **few), lambda *a: categorical.entropy(p(*a), base=2)),
        (
            lambda *a: sum(linear.log_prob_and_entropy(y, *a[:2], **few)),
            lambda *a: categorical.log_prob(y, p(*a)) + categorical.entropy(p(*a)),
        ),
        (lambda *a: linear.kl_divergence(*a, **few), lambda *a: categorical.kl_divergence(p(*a), q(*a))),
        (
            lambda *a: linear.js_divergence(*a, weight=0.25, **few),
            lambda *a: categorical.js_divergence(p(*a), q(*a), weight=0.25),
        ),
        (distilled, dense_distilled),
    ]

    def both(function):
        value, pull = jax.vjp(function, x, W, x2, W2)
        return value, pull(cotangent)

    for got, want in jax.jit(lambda: [(both(fused), both(dense)) for fused, dense in pairs])():
        close(got, want, 256 * U)


def test_a_teacher_of_its_top_classes_is_one_that_excludes_the_others():
    k, temperature = 2, 2.0
    indices = jnp.argsort(normal(N, V), axis=-1)[:, :k]
    log_probs = normal(N, k)

    def fused(x, w, log_probs):
        top = {"top_log_probs": log_probs, "top_indices": indices}
        return linear.distillation_loss(x, w, temperature=temperature, block_bytes=FOUR, **top)

    def dense(x, w, log_probs):
        teacher = jnp.full((N, V), -jnp.inf).at[jnp.arange(N)[:, None], indices].set(log_probs)
        return categorical.distillation_loss(x @ w, teacher, temperature=temperature)

    def both(function):
        return function(X, W, log_probs), jax.grad(lambda *a: jnp.sum(function(*a)), (0, 1, 2))(X, W, log_probs)

    got, want = jax.jit(lambda: (both(fused), both(dense)))()
    close(got, want, 128 * U)


def test_a_student_that_excludes_all_top_classes_is_infinitely_far():
    top = {"top_log_probs": jnp.zeros((N, 2)), "top_indices": jnp.tile(jnp.array([[0, 1]]), (N, 1))}

    @jax.jit
    def loss_and_slope(bias):
        def total(w):
            loss = linear.distillation_loss(X, w, temperature=2.0, student_bias=bias, **top)
            return jnp.sum(jnp.minimum(loss, 9.0)), loss

        return jax.grad(total, has_aux=True)(W)

    for bias, want in ((jnp.zeros(V).at[:2].set(-jnp.inf), np.inf), (jnp.full(V, -jnp.inf), np.nan)):
        slope, loss = loss_and_slope(bias)
        np.testing.assert_array_equal(loss, np.full(N, want))
        assert jnp.isfinite(slope).all()


def test_draws_and_modes_do_not_depend_on_the_blocks():
    key, x = jax.random.key(0), jnp.tile(X[:1], (4000, 1))

    def draw(temperature, **how):
        return linear.sample(key, x, W, bias=B, temperature=jnp.float32(temperature), **how)

    alike = draw(1.0)
    np.testing.assert_array_equal(draw(1.0, block_bytes=1024 * V * 4), alike)
    share = np.bincount(np.asarray(alike), minlength=V) / len(x)
    p = np.asarray(categorical.softmax(X[0] @ W + B))
    # Five standard deviations of a share.
    assert np.all(np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / len(x)))
    np.testing.assert_array_equal(linear.mode(X, W.T, transposed_kernel=True, block_bytes=FOUR), jnp.argmax(X @ W, -1))
    np.testing.assert_array_equal(draw(0.0), jnp.argmax(x @ W + B[None], -1))
    np.testing.assert_array_equal(draw(-1.0), np.full(len(x), -1))


@pytest.mark.parametrize("how", [{}, {"block_bytes": FOUR}], ids=["one block", "blocks"])
def test_the_bits_of_a_token_do_not_depend_on_the_others_of_its_batch(how):
    call = functools.partial(linear.log_prob_and_entropy, kernel=W, **how)
    others = jnp.arange(N) % 3 > 0
    changed = call(jnp.where(others, (Y + 1) % V, Y), jnp.where(others[:, None], 3 * X2, X))
    for got, want in zip(changed, call(Y, X), strict=True):
        np.testing.assert_array_equal(got[~others], want[~others])


@pytest.mark.parametrize("v", [1, 3, 32_001])
def test_equal_logits_give_log_v_to_the_last_digit(v):
    x, w, y = jnp.zeros((3, 2)), jnp.zeros((2, v)), jnp.array([0, v // 2, v - 1])
    loss, aux = linear.cross_entropy(x, w, y, reduction="none", has_aux=True, block_bytes=4 * v)
    for got in (loss, aux.nll, aux.logsumexp, linear.entropy(x, w), -linear.log_prob(y, x, w)):
        np.testing.assert_array_equal(got, np.full(3, np.float32(math.log(v))))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_confident_tokens_keep_their_gradient(temperature):
    """The label is at the top by a margin that float32 cannot add to 1.

    dW holds nothing else, as x is the unit matrix. A quotient is off by an ulp or two, 4 u of the logit. An
    exponential is off by as much of itself.
    """
    margins = np.array([1.0, 12, 17, 20, 40])
    n = len(margins)
    w = _rng.normal(0, 1, (n, V)).round(2)
    w[:, 2] = w.max(1) + margins
    w, y = jnp.asarray(w, jnp.float32), jnp.full(n, 2)
    z = np.asarray(w, np.float64) / temperature
    others = np.exp(np.delete(z, 2, 1) - z[:, 2:3]).sum(1)
    loss = functools.partial(linear.cross_entropy, jnp.eye(n), labels=y, block_bytes=2 * V * 4, temperature=temperature)
    value, slope = jax.jit(lambda: (loss(w, reduction="none"), jax.grad(lambda w: loss(w, reduction="sum"))(w)))()
    bound = (16 + 9 * np.abs(z).max()) * U
    np.testing.assert_allclose(value, np.log1p(others), rtol=bound)
    np.testing.assert_allclose(slope[:, 2], -others / (1 + others) / temperature, rtol=2 * bound + 64 * U)


@pytest.mark.parametrize("c", [pytest.param(2.0, marks=pytest.mark.slow), 30.0])
@pytest.mark.optimized
def test_a_softcap_keeps_the_digits_of_every_gradient(c):
    """However far beyond the cap a logit lies, and of second derivatives too, in the rematerialised scan of blocks.

    A tanh is off by 4 u: the logits by 4 c u, and a ratio of two exponentials by 8 c u.
    """
    beyond = np.array([0, 0.5, 4, 6, 8, 10, 40])
    n = len(beyond)
    rows = np.stack([beyond * c, np.full(n, c / 2), np.zeros(n)], 1).astype(np.float32)
    other = np.float32([0, c / 4, -c / 2])
    y, x, fixed, two = jnp.ones(n, int), jnp.eye(n), jnp.tile(other[None], (n, 1)), [0.0, 3.0]
    how = {"softcap": c, "block_bytes": 2 * 3 * 4}
    top = {"top_log_probs": jnp.tile(jnp.array([two]), (n, 1)), "top_indices": jnp.tile(jnp.array([[0, 1]]), (n, 1))}

    def capped(z, temperature=1):
        return [c * mpmath.tanh(a / c) / temperature for a in z]

    q, q_tempered = (capped(oracles.exactly(other), t) for t in (1, 2))
    two_tempered = [a / 2 for a in oracles.exactly(two)] + [-mpmath.inf]
    distilled = functools.partial(linear.distillation_loss, temperature=2.0, **how)
    verbs = {
        "cross_entropy": (lambda w: linear.cross_entropy(x, w, y, reduction="none", **how),
                          lambda z: oracles.cross_entropy(capped(z), [0, 1, 0])),
        "log_prob": (lambda w: linear.log_prob(y, x, w, **how), lambda z: -oracles.cross_entropy(capped(z), [0, 1, 0])),
        "entropy": (lambda w: linear.entropy(x, w, **how), lambda z: oracles.entropy(capped(z))),
        "p": (lambda w: linear.kl_divergence(x, w, x, fixed, **how), lambda z: oracles.kl_divergence(capped(z), q)),
        "q": (lambda w: linear.kl_divergence(x, fixed, x, w, **how), lambda z: oracles.kl_divergence(q, capped(z))),
        "student": (lambda w: distilled(x, w, x, fixed), lambda z: 4 * oracles.kl_divergence(q_tempered, capped(z, 2))),
        "top": (lambda w: distilled(x, w, **top), lambda z: 4 * oracles.kl_divergence(two_tempered, capped(z, 2))),
    }  # fmt: skip

    def slope(verb):
        return jax.grad(lambda w: jnp.sum(verb(w)))

    def second(w):
        return jax.jvp(slope(verbs["cross_entropy"][0]), (w,), (jnp.zeros_like(w).at[:, 0].set(1),))[1]

    slopes, curves = jax.jit(lambda w: ({name: slope(verb)(w) for name, (verb, _) in verbs.items()}, second(w)))(rows)
    step, tiny = mpmath.mpf(10) ** -20, float(np.finfo(np.float32).tiny)
    for i, row in enumerate(map(oracles.exactly, rows)):
        bound = (16 + float(capped(row)[0]) + 2 * beyond[i] + 8 * c) * U
        for name, (_, definition) in verbs.items():
            assert oracles.error(slopes[name][i], oracles.gradient(definition, row), tiny) <= bound, (name, i)
        up, down = (oracles.gradient(verbs["cross_entropy"][1], [row[0] + h, *row[1:]]) for h in (step, -step))
        if beyond[i] >= 4:  # nearer to 0 the two terms of a second derivative cancel
            assert (
                oracles.error(curves[i], [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)], tiny) <= bound
            )


SETTINGS = {
    "bias": True, "weights": True, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "temperature": 0.5,
    "transposed_kernel": True, "reduction": "sum", "dtype": "bfloat16", "size": 640.0,
}  # fmt: skip
# Each setting in three of five trials, no two in the same three, and a trial of none: so of any two settings there is a
# trial with both, with either alone, and with neither.
TRIALS = [
    {name: SETTINGS[name] for name, trials in zip(SETTINGS, itertools.combinations(range(5), 3), strict=False)
     if trial in trials} for trial in range(-1, 5)
]  # fmt: skip


@pytest.mark.parametrize("settings", TRIALS, ids=[",".join(trial) for trial in TRIALS])
@pytest.mark.optimized
def test_errors_of_settings_together_are_at_most_those_of_the_plain_form(settings):
    """Values and gradients in blocks, against float64 from the same operands. The plain form has them in float32."""
    form = {name: settings[name] for name in ("softcap", "temperature") if name in settings}
    others = {name: settings.get(name, 0.0) for name in ("label_smoothing", "z_loss")}
    dtype = settings.get("dtype", "float32")
    operands = [a.astype(dtype) for a in (X, settings.get("size", 3.0) * W, B, WEIGHTS)]

    def usual(x, w, b, weights):
        z = jnp.matmul(x, w) + (b[None] if "bias" in settings else 0)
        if "softcap" in form:
            z = form["softcap"] * jnp.tanh(z / form["softcap"])
        z /= form.get("temperature", 1.0)
        log_probs, e = jax.nn.log_softmax(z), others["label_smoothing"]
        loss = -(1 - e) * jnp.take_along_axis(log_probs, Y[:, None], 1)[:, 0] - e * jnp.mean(log_probs, axis=1)
        loss += others["z_loss"] * jnp.square(jax.nn.logsumexp(z, axis=1))
        weights = weights if "weights" in settings else jnp.ones_like(weights)
        return jnp.sum(weights * loss) / (1 if "reduction" in settings else jnp.sum(weights))

    def fused(x, w, b, weights):
        how = {name: settings[name] for name in ("transposed_kernel", "reduction") if name in settings}
        how |= {"bias": b} if "bias" in settings else {}
        how |= {"weights": weights} if "weights" in settings else {}
        kernel = w.T if "transposed_kernel" in settings else w
        return linear.cross_entropy(x, kernel, Y, block_bytes=FOUR, **others, **form, **how)

    def results(loss, operands):
        value, slopes = jax.jit(jax.value_and_grad(loss, range(4)))(*operands)
        assert all(slope.dtype == a.dtype for slope, a in zip(slopes, operands, strict=True))
        return [np.asarray(a, np.float64) for a in (value, *slopes)]

    with jax.enable_x64(True):
        truth = results(usual, [jnp.asarray(np.asarray(a), jnp.float64) for a in operands])
    peers = results(usual, [a.astype(jnp.float32) for a in operands])
    for i, (got, peer, want) in enumerate(zip(results(fused, operands), peers, truth, strict=True)):
        # Two roundings of the same sum differ by a few u. A gradient is rounded to its operand's dtype once.
        slack = (4 * U + (2.0**-8 if i and dtype == "bfloat16" else 0)) * np.abs(want).max()
        assert np.abs(got - want).max() <= np.abs(peer - want).max() + slack


@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 11])
def test_any_number_of_tokens_beside_a_block_of_four(tokens):
    """Fewer than a block, one, and more; none, one and one less than a block that remain."""
    x, y, kernels = normal(tokens, H), Y[:1].repeat(tokens), (W, W[:, :1])
    how = {"block_bytes": FOUR}
    assert linear.plan(x, W, **how).block_size == min(4, tokens)

    def both(loss):
        return [jax.value_and_grad(loss, (0, 1))(x, w) for w in kernels]

    def fused(x, w):
        return linear.cross_entropy(x, w, jnp.minimum(y, w.shape[1] - 1), block_bytes=16 * w.shape[1])

    def dense(x, w):
        return jnp.mean(categorical.cross_entropy(x @ w, jnp.minimum(y, w.shape[1] - 1)))

    got, want = jax.jit(lambda: (both(fused), both(dense)))()
    close(got, want)
    one_class = jax.tree.leaves(got[1])
    assert not any(value.any() for value in one_class)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_token_without_weight_is_as_if_not_there(reduction):
    """Whatever its hidden and label are. A token of class 0 stands in for it, which is impossible here."""
    bias, gone, kept = jnp.zeros(V).at[0].set(-jnp.inf), jnp.array([3, 7]), np.delete(np.arange(N), [3, 7])
    bad, y = X.at[3].set(jnp.nan).at[7].set(jnp.inf), jnp.maximum(Y, 1).at[3].set(-1).at[7].set(V)
    weights = WEIGHTS.at[gone].set(0)

    @jax.jit
    def both(x, y, weights):
        def total(x, w, weights):
            how = {"reduction": reduction, "has_aux": True, "block_bytes": FOUR}
            loss, aux = linear.cross_entropy(x, w, y, bias=bias, weights=weights, **how)
            return jnp.sum(loss) + jnp.sum(aux.nll) + jnp.sum(aux.logsumexp), aux

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(x, W, weights)

    (loss, aux), (dx, dw, dweights) = both(bad, y, weights)
    (want, _), want_slopes = both(X[kept], y[kept], weights[kept])
    close((loss, (dx[kept], dw, dweights[kept])), (want, want_slopes))
    assert not any(a[gone].any() for a in (dx, dweights, aux.nll, aux.logsumexp, aux.correct))
    assert aux.weight == jnp.sum(weights)

    for rows, nothing in ((N, jnp.zeros(N)), (0, WEIGHTS[:0])):
        (loss, aux), slopes = both(bad[:rows], y[:rows], nothing)
        assert loss == 0 == aux.weight
        assert not any(slope.any() for slope in slopes)


def test_smoothing_alone_squares_no_logsumexp():
    got = linear.cross_entropy(1e20 * X, W, Y, label_smoothing=0.1, reduction="none")
    np.testing.assert_allclose(got, categorical.cross_entropy((1e20 * X) @ W, Y, label_smoothing=0.1), rtol=64 * U)


def test_weights_of_float64_widen_all_that_they_meet():
    with jax.enable_x64(True):
        weights = jnp.asarray(WEIGHTS, jnp.float64)

        def loss(x):
            return linear.cross_entropy(x, W, Y, weights=weights, has_aux=True, block_bytes=FOUR)

        (value, aux), slope = jax.value_and_grad(loss, has_aux=True)(X)
        assert value == loss(X)[0]
        assert {value.dtype, aux.nll.dtype} == {jnp.dtype(jnp.float64)}
        assert slope.dtype == jnp.float32


def test_a_label_out_of_range_is_nan_there_and_nowhere_else():
    """The gradients of a mean, that of the weights too, are those of the other tokens."""
    bad = jnp.concatenate([jnp.array([-1, -100, V, 2**31 - 1, -(2**31)]), Y[5:]])

    @jax.jit
    def both(y):
        def mean(x, w, weights):
            return linear.cross_entropy(x, w, y, weights=weights, has_aux=True, block_bytes=FOUR)

        each = linear.cross_entropy(X, W, y, reduction="none", z_loss=0.1, block_bytes=FOUR)
        return (each, linear.log_prob(y, X, W)), jax.value_and_grad(mean, (0, 1, 2), has_aux=True)(X, W, jnp.ones(N))

    each, ((mean, aux), slopes) = both(bad)
    for got, want in zip(each, both(Y)[0], strict=True):
        np.testing.assert_array_equal(np.isnan(got), np.arange(N) < 5)
        close(got[5:], want[5:])
    close(aux.nll[5:], -each[1][5:])
    assert np.isnan([mean, *aux.nll[:5]]).all()
    assert not aux.correct[:5].any()
    close(slopes[:2], jax.grad(lambda *a: linear.cross_entropy(*a, Y, weights=jnp.arange(N) >= 5) / 2, (0, 1))(X, W))
    assert jnp.isfinite(slopes[2]).all()
    error, _ = jprob.checkify(linear.cross_entropy)(X, W, Y.at[3].set(-100))
    assert re.search(rf"cross_entropy: label -100 is outside \[0, {V}\)", error.get() or "")


NUMBERS = {"label_smoothing": [0.1, 0.3], "z_loss": [0.01, 0.1], "softcap": [5.0, 9.0], "temperature": [0.5, 2.0]}


def test_a_number_may_be_swept_or_annealed():
    """As the same Python number, of which a new one compiles nothing; the default leaves out what it switches on."""

    def value_and_slope(numbers):
        return jax.value_and_grad(lambda w: linear.cross_entropy(X, w, Y, block_bytes=FOUR, **numbers))(W)

    each = [{name: values[i] for name, values in NUMBERS.items()} for i in range(2)]
    linear.cross_entropy.compiled.clear_cache()
    assert len({float(linear.cross_entropy(X, W, Y, **numbers)) for numbers in each}) == 2
    assert linear.cross_entropy.compiled._cache_size() == 1
    want = jax.tree.map(lambda *values: jnp.stack(values), *map(value_and_slope, each))
    numbers = {name: jnp.array(values) for name, values in NUMBERS.items()}
    close(jax.vmap(value_and_slope)(numbers), want)
    close(jax.lax.map(value_and_slope, numbers), want)
    default = {"label_smoothing": 0, "z_loss": 0.0, "softcap": None, "temperature": 1}
    programs = [str(jax.make_jaxpr(lambda n=numbers: value_and_slope(n))()) for numbers in ({}, default)]
    assert programs[0] == programs[1]


@pytest.mark.parametrize(
    ("name", "value"), [("label_smoothing", 2.0), ("z_loss", -1.0), ("softcap", 0.0), ("temperature", math.inf)]
)
def test_an_array_out_of_range_gives_nan_and_is_named_under_checkify(name, value):
    call = jprob.checkify(lambda number: linear.cross_entropy(X, W, Y, **{name: number}))
    error, loss = call(jnp.float32(value))
    assert error.get().startswith(f"cross_entropy: {name} {value} is not")
    assert np.isnan(loss)
    others = [
        lambda w, **numbers: linear.log_prob(Y, X, w, **numbers),
        lambda w, **numbers: linear.entropy(X, w, **numbers),
        lambda w, **numbers: linear.kl_divergence(X, w, X, W, **numbers),
        lambda w, **numbers: linear.distillation_loss(X, w, X, W, **{"temperature": 1.0} | numbers),
    ]

    def masked(w, verb):
        out = verb(w, **{name: jnp.float32(value)})
        return jnp.where(False, out, 0).sum(), out

    for verb in [
        functools.partial(linear.cross_entropy, X, labels=Y),
        *(others if name in ("softcap", "temperature") else ()),
    ]:
        slope, out = jax.grad(masked, has_aux=True)(W, verb)
        assert np.isnan(out).all()
        assert not slope.any()


def test_top_indices_of_16_bits_name_65536_classes():
    w, log_probs = jnp.linspace(0, 1, 65_536)[None], jnp.zeros((1, 2))

    def loss(indices):
        top = {"top_log_probs": log_probs, "top_indices": indices}
        return linear.distillation_loss(jnp.ones((1, 1)), w, temperature=1.0, **top)

    error, got = jprob.checkify(loss)(jnp.array([[0, 65_535]], jnp.uint16))
    assert error.get() is None
    assert got == loss(jnp.array([[0, 65_535]]))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32"])
def test_labels_of_any_integer_dtype(dtype):
    w = normal(H, 300)
    close(linear.cross_entropy(X, w, Y.astype(dtype)), linear.cross_entropy(X, w, Y))


@pytest.mark.parametrize(
    "form",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"label_smoothing": 0.1},
        {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 1.0},
    ],
)
def test_an_impossible_class_is_as_if_not_there(form):
    """Whatever the options: no softcap makes it possible, and no smoothing expects it."""
    bias, labels = jnp.zeros(V).at[2].set(-jnp.inf), jnp.where(Y == 2, 3, Y)
    keep = np.delete(np.arange(V), 2)
    softcap = {name: form[name] for name in form if name == "softcap"}

    def losses(w, bias, labels):
        loss = functools.partial(linear.cross_entropy, X, w, labels, bias=bias, block_bytes=FOUR, **form)
        return loss(), jnp.sum(loss(reduction="none")), jnp.sum(linear.entropy(X, w, bias=bias, **softcap))

    def slope(w, bias, labels):
        return jax.grad(lambda w: sum(losses(w, bias, labels)))(w)

    ways = (W, bias, labels), (W[:, keep], None, labels - jnp.int32(labels > 2))
    got, want, got_slope, want_slope = jax.jit(lambda: [f(*args) for f in (losses, slope) for args in ways])()
    close((got, got_slope[:, keep]), (want, want_slope))
    assert not got_slope[:, 2].any()
    assert jnp.isinf(linear.log_prob(jnp.full(N, 2), X, W, bias=bias, **softcap)).all()


def test_second_derivatives_of_the_loss_alone():
    """The reduced loss, in blocks, both ways; also where classes tie, as for a kernel that starts from 0."""
    direction = normal(N, H), normal(H, V)

    def products(loss, w):
        f, args = loss, (X, w)
        push = lambda *a: jax.jvp(f, a, direction)[1]  # noqa: E731
        return jax.jvp(jax.grad(f, (0, 1)), args, direction)[1], jax.grad(push, (0, 1))(*args)

    def fused(x, w, reduction="mean"):
        return jnp.sum(jnp.square(linear.cross_entropy(x, w, Y, reduction=reduction, block_bytes=FOUR)))

    def token_losses(x, w):
        return jnp.sum(jnp.square(optax.losses.softmax_cross_entropy_with_integer_labels(x @ w, Y)))

    def mean(x, w):
        return jnp.square(jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(x @ w, Y)))

    pairs = [(fused, mean), (functools.partial(fused, reduction="none"), token_losses)]
    each = jax.jit(lambda w: [[products(f, w) for f in pair] for pair in pairs])
    for got, want in each(W) + each(jnp.zeros_like(W)):
        close(got[0], want[0], 256 * U)
        close(got[1], want[1], 256 * U)


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()


def products(program):
    return len(re.findall(r" dot\(", program.as_text()))


def test_memory_and_products_are_those_of_the_plan():
    shapes = (1024, 64), (64, 4096)
    args = *((shape, jnp.float32) for shape in shapes), ((1024,), jnp.int32)
    block = 2**20
    kernel = 64 * 4096 * 4

    def loss(x, w, y, **options):
        return linear.cross_entropy(x, w, y, block_bytes=block, **options)

    plan = linear.plan(*(jax.ShapeDtypeStruct(*a) for a in args[:2]), block_bytes=block)
    assert plan == (16, 64, 0, block)
    gradient = compiled(jax.value_and_grad(loss, (0, 1)), *args)
    # The kernel's gradient of a block, its logits and their exponentials, and what has the size of the tokens.
    assert gradient.memory_analysis().temp_size_in_bytes <= kernel + 2 * block + 4 * 1024 * 64 * 4
    assert products(gradient) == 3
    value = compiled(loss, *args)
    assert value.memory_analysis().temp_size_in_bytes <= 2 * block + 4 * 1024 * 64 * 4
    assert products(value) == 1
    with_aux = jax.value_and_grad(functools.partial(loss, has_aux=True), (0, 1), has_aux=True)
    assert products(compiled(with_aux, *args)) == 3
    assert products(compiled(jax.grad(loss), *args)) == 2

    def per_token(x, w):
        return jnp.sum(linear.entropy(x, w, block_bytes=block))

    entropy = compiled(jax.grad(per_token, (0, 1)), *args[:2])
    assert entropy.memory_analysis().temp_size_in_bytes <= 2 * kernel + 6 * block < 1024 * 4096 * 4


def test_a_value_needs_no_copy_of_a_kernel_of_low_precision():
    """A copy in float32 would be as large as 16 blocks."""
    block, key = 2**18, jax.random.key(0)
    x, w = ((256, 64), jnp.bfloat16), ((64, 16384), jnp.bfloat16)
    verbs = {
        "mode": lambda x, w, y: linear.mode(x, w, block_bytes=block),
        "sample": lambda x, w, y: linear.sample(key, x, w, block_bytes=block),
        "entropy": lambda x, w, y: linear.entropy(x, w, block_bytes=block),
        "log_prob": lambda x, w, y: linear.log_prob(y, x, w, block_bytes=block),
        "cross_entropy": lambda x, w, y: linear.cross_entropy(x, w, y, block_bytes=block),
    }
    for name, verb in verbs.items():
        program = compiled(verb, x, w, ((256,), jnp.int32))
        assert program.memory_analysis().temp_size_in_bytes <= 12 * block, name


@pytest.mark.parametrize("verb", ["log_prob", "cross_entropy"])
def test_gradients_of_blocks_of_low_precision_are_added_up_in_float32(verb):
    """Each of 512 tokens has a gradient of 1/2 in each of two equal classes. To 128 a bfloat16 cannot add 1/2."""
    x, w, y = jnp.ones((512, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16), jnp.zeros(512, jnp.int32)
    loss = {
        "log_prob": lambda w: -jnp.sum(linear.log_prob(y, x, w, block_bytes=8)),
        "cross_entropy": lambda w: linear.cross_entropy(x, w, y, reduction="sum", block_bytes=8),
    }
    slope = jax.jit(jax.grad(loss[verb]))(w)
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_array_equal(slope.astype(jnp.float32), [[-256, 256]])


@pytest.mark.parametrize(
    ("tokens", "block_bytes", "want"),
    [
        ((3, 4), None, (1, 12, 0)),
        ((12,), 5 * V * 4, (3, 4, 0)),  # four divide the tokens, five do not
        ((11,), 4 * V * 4, (2, 4, 3)),
        ((5,), 1, (5, 1, 0)),
        ((0,), None, (1, 0, 0)),
        ((), None, (1, 1, 0)),
    ],
)
def test_a_plan(tokens, block_bytes, want):
    hidden, kernel = jax.ShapeDtypeStruct((*tokens, H), jnp.bfloat16), jax.ShapeDtypeStruct((V, H), jnp.float32)
    plan = linear.plan(hidden, kernel, transposed_kernel=True, block_bytes=block_bytes)
    assert (plan.blocks, plan.block_size, plan.remainder) == want
    assert plan.bytes == plan.block_size * V * 4


@pytest.mark.parametrize(("num_classes", "tokens"), [(1000, 16_384), (32_000, 512), (131_072, 512)])
def test_a_block_is_64_mebibytes_or_512_tokens(num_classes, tokens):
    kernel = jax.ShapeDtypeStruct((4096, num_classes), jnp.bfloat16)
    assert linear.plan(jax.ShapeDtypeStruct((2**15, 4096), jnp.bfloat16), kernel).block_size == tokens


# Eight tokens of two examples in two blocks; eight classes, two on each of four devices.
SHARDED = normal(2, 8, H), normal(H, 8), normal(8), jnp.abs(normal(2, 8))
SHARDED_Y = jnp.asarray(_rng.integers(0, 8, (2, 8)))
ALL = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 9.0}


def sharded_loss(x, w, b, weights, y, **options):
    return linear.cross_entropy(x, w, y, bias=b, weights=weights, **ALL, **options)


@functools.cache
def unsharded():
    gradient = jax.value_and_grad(lambda *a: sharded_loss(*a, has_aux=True), (0, 1, 2, 3), has_aux=True)
    return jax.jit(gradient)(*SHARDED, SHARDED_Y)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_vocabulary_sharded_inside_shard_map(check_vma):
    """The loss that is reduced; those of single tokens are among the verbs below."""
    specs, tokens = (P("data"), P(None, "model"), P("model"), P("data"), P("data")), P("data")

    def local(x, w, b, weights, y):
        how = {"reduction": "sum", "has_aux": True, "axis_name": "model", "block_bytes": 4 * 2 * 4}
        total, aux = sharded_loss(x, w, b, weights, y, **how)
        total, weight = jax.lax.psum((total, aux.weight), "data")
        return total / weight, aux._replace(weight=weight)

    mapped = over_devices(local, specs, (P(), linear.Aux(*(tokens,) * 3, P())), check_vma=check_vma)
    (want, want_aux), want_slopes = unsharded()
    (total, aux), slopes = jax.jit(jax.value_and_grad(mapped, (0, 1, 2, 3), has_aux=True))(*SHARDED, SHARDED_Y)
    close((total, aux[:2], aux.weight), (want, want_aux[:2], want_aux.weight))
    np.testing.assert_array_equal(aux.correct, want_aux.correct)
    close(slopes, want_slopes, 128 * U)


# Two models of each token and a teacher's three best classes. Only five of the eight classes are possible under both:
# of the four devices one has half a part, and one has no class at all.
MODELS = *SHARDED[:2], SHARDED[2].at[5:].set(-jnp.inf), normal(2, 8, H), normal(H, 8), normal(8).at[5:].set(-jnp.inf)
TEACHER, FIVE_Y = normal(2, 8, 3), SHARDED_Y % 5
FIVE_TOP = jnp.asarray(np.argsort(_rng.uniform(size=(2, 8, 5)))[..., :3])
DIRECTION = tuple(normal(*a.shape) for a in (*MODELS, TEACHER))
KERNEL_SPECS = P(None, "model"), P("model")
MODELS_SPECS = P("data"), *KERNEL_SPECS, P("data"), *KERNEL_SPECS


def over_devices(function, in_specs, out_specs, data=2, **options):
    """`function` on the parts of its arguments: tokens over "data", and the vocabulary over all other devices."""
    mesh = jax.make_mesh((data, 8 // data), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)


def verbs(x, w, b, x2, w2, b2, log_probs, y, top, **how):
    """Everything per token that has a derivative."""
    how = {"softcap": 9.0, **how}
    distilled = functools.partial(linear.distillation_loss, x, w, student_bias=b, temperature=2.0, **how)
    loss = {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.01}
    return {
        "cross_entropy": linear.cross_entropy(x, w, y, bias=b, **loss, **how),
        "log_prob": linear.log_prob(y, x, w, bias=b, **how),
        "entropy": linear.entropy(x, w, bias=b, base=2, **how),
        "kl_divergence": linear.kl_divergence(x, w, x2, w2, p_bias=b, q_bias=b2, base=2, **how),
        "distillation_loss": distilled(x2, w2, teacher_bias=b2),
        "distillation_loss, top": distilled(top_log_probs=log_probs, top_indices=top),
    }


def test_js_of_a_sharded_vocabulary():
    def squares(*args, **how):
        x, w, b, x2, w2, b2 = args
        return jnp.sum(jnp.square(linear.js_divergence(x, w, x2, w2, p_bias=b, q_bias=b2, weight=0.9, **how)))

    def local(*args):
        return jax.lax.psum(squares(*args, axis_name="model"), "data")

    both = [jax.value_and_grad(f, range(6)) for f in (over_devices(local, MODELS_SPECS, P()), squares)]
    close(*jax.jit(lambda *args: [f(*args) for f in both])(*MODELS), 256 * U)


def second_derivatives(function):
    """Second derivatives of the entropy and a divergence, in both orders."""
    args = *MODELS, TEACHER

    def squares(*args):
        values = function(*args, FIVE_Y, FIVE_TOP)
        return sum(jnp.sum(jnp.square(values[name])) for name in ("entropy", "kl_divergence"))

    def push(*args):
        return jax.jvp(squares, args, DIRECTION)[1]

    return jax.jvp(jax.grad(squares, range(7)), args, DIRECTION)[1], jax.grad(push, range(7))(*args)


def of_five_classes(*args):
    """From five classes alone; the gradients in the others are 0."""
    return verbs(*(a[..., :5] if i in (1, 2, 4, 5) else a for i, a in enumerate(args)))


def of_shards(check_vma):
    """The verbs in blocks, within a loop over examples."""

    def local(*args):
        def one(tokens):
            x, x2, *labels = tokens
            return verbs(x, *args[1:3], x2, *args[4:6], *labels, axis_name="model", block_bytes=4 * 2 * 4)

        return jax.lax.map(one, (args[0], args[3], *args[6:]))

    return over_devices(local, (*MODELS_SPECS, *(P("data"),) * 3), P("data"), check_vma=check_vma)


WAYS = {"five classes": of_five_classes, "blocks": functools.partial(verbs, block_bytes=4 * 8 * 4),
        "shards": of_shards(True), "unchecked shards": of_shards(False)}  # fmt: skip


# The way of shards is in blocks too.
each_way = pytest.mark.parametrize(
    "way",
    ["five classes", "shards", *(pytest.param(w, marks=pytest.mark.slow) for w in ("blocks", "unchecked shards"))],
)


@functools.cache
def first_derivatives(way):
    """Values that the mask keeps, and their tangents; the gradient of the sum of their squares."""

    def derivatives(models, y, top, kept):
        def masked(*args):
            return {name: jnp.where(kept, value, 0) for name, value in WAYS[way](*args, y, top).items()}

        def squares(*args):
            return sum(jnp.sum(jnp.square(value)) for value in masked(*args).values())

        return jax.jvp(masked, models, DIRECTION), jax.grad(squares, range(7))(*models)

    return jax.jit(derivatives)


@each_way
def test_every_verb_in_blocks_of_a_sharded_vocabulary_whatever_a_mask_hides(way):
    """Classes that only fill up change nothing. A masked label out of range poisons nothing."""
    models, hidden = (*MODELS, TEACHER), jnp.zeros((2, 8), bool)
    want = first_derivatives("five classes")(models, FIVE_Y, FIVE_TOP, ~hidden)
    close(first_derivatives(way)(models, FIVE_Y, FIVE_TOP, ~hidden), want, 256 * U)

    hidden = hidden.at[0, 3].set(True).at[1, 6].set(True)
    y, top = jnp.where(hidden, -100, FIVE_Y), jnp.where(hidden[..., None], jnp.array([[[1, -100, 8]]]), FIVE_TOP)
    got, want = (first_derivatives(way)(models, *labels, ~hidden) for labels in ((y, top), (FIVE_Y, FIVE_TOP)))
    close(got, want, 256 * U)
    assert not any(got[1][i][hidden].any() for i in (0, 3, 6))


@each_way
def test_a_masked_infinity_poisons_nothing(way):
    """Each model excludes a class that the other expects, and the label is one of them: only the entropy is finite."""
    models = *MODELS[:2], MODELS[2].at[0].set(-jnp.inf), *MODELS[3:5], MODELS[5].at[1].set(-jnp.inf), TEACHER
    y, top = jnp.zeros_like(FIVE_Y), jnp.broadcast_to(jnp.arange(3), FIVE_TOP.shape)
    got = first_derivatives(way)(models, y, top, jnp.zeros(y.shape, bool))
    assert not any(x.any() for x in jax.tree.leaves(got))


@pytest.mark.slow
def test_second_derivatives_of_a_sharded_vocabulary():
    got, want = (jax.jit(lambda way=way: second_derivatives(WAYS[way]))() for way in ("shards", "five classes"))
    close(got, want, 256 * U)


def test_gradients_taken_inside_shard_map():
    """jax knows what varies there: the gradient of hidden is added up over the vocabulary, that of a kernel is not."""

    def slopes(**how):
        def total(*args):
            values = [
                linear.entropy(*args[:2], bias=args[2], **how),
                linear.kl_divergence(*args[:2], *args[3:5], **how),
            ]
            return sum(map(jnp.sum, values)) + linear.cross_entropy(*args[:2], FIVE_Y, reduction="sum", **how)

        return jax.grad(total, range(5))

    specs = P(), *KERNEL_SPECS, P(), KERNEL_SPECS[0]
    got = jax.jit(over_devices(slopes(axis_name="model"), specs, specs, data=1))(*MODELS[:5])
    close(got, jax.jit(slopes())(*MODELS[:5]), 128 * U)


@pytest.mark.optimized
def test_a_sharded_vocabulary_loses_no_digit():
    """Confident tokens, and two models that nearly agree: hidden is the unit matrix, so that no product rounds."""
    w = _rng.normal(0, 1, (H, 8))
    w[np.arange(H), [0, 3, 5, 7]] += [0, 12, 20, 40]  # on each of four devices
    w = np.asarray(w, np.float32)
    w2 = (w + 2.0**-14 * _rng.normal(0, 1, w.shape)).astype(np.float32)
    z, z2 = w.astype(np.float64), w2.astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    others = np.where(p > 0.5, 0, p).sum(1, keepdims=True)
    gap = np.where(p > 0.5, -np.log1p(-np.minimum(others, 0.5)), -np.log(p))
    d = z2 - z - (p * (z2 - z)).sum(1, keepdims=True)
    want = (p * gap).sum(1), np.log1p((p * (np.expm1(d) - d)).sum(1))

    def both(w, w2):
        x = jnp.eye(H)
        return linear.entropy(x, w, axis_name="model"), linear.kl_divergence(x, w, x, w2, axis_name="model")

    got = jax.jit(over_devices(both, (KERNEL_SPECS[0],) * 2, P()))(w, w2)
    span = np.ptp(z, axis=1)
    for value, truth in zip(got, want, strict=True):
        assert np.all(np.abs(value - truth) <= (16 + span) * U * truth)


@pytest.mark.parametrize(("classes", "data"), [(300, 2), (1024, 1)])
def test_draws_and_modes_of_a_sharded_vocabulary(classes, data):
    """They are those of one device, for any start of shards among the classes of a key and any filler."""
    x, key = normal(64, H), jax.random.key(5)
    padded = -(-classes // 64) * 64
    w = normal(H, padded).at[:, 9].set(0).at[:, 200].set(0)
    b = jnp.zeros(padded).at[classes:].set(-jnp.inf).at[jnp.array([9, 200])].set(40)  # two that tie, far apart

    def all_of(x, w, b, **how):
        def draw(temperature):
            return linear.sample(key, x, w, bias=b, softcap=3.0, temperature=temperature, **how)

        return linear.mode(x, w, bias=b, **how), *jax.vmap(draw)(jnp.array([0.0, 1.0, jnp.inf]))

    local = functools.partial(all_of, axis_name="model", block_bytes=16 * 4 * padded * data // 8)
    got = jax.jit(over_devices(local, (P(), *KERNEL_SPECS), P(), data=data))(x, w, b)
    want = jax.jit(all_of)(x, w[:, :classes], b[:classes])
    for draws, wanted in zip(got, want, strict=True):
        np.testing.assert_array_equal(draws, wanted)
    np.testing.assert_array_equal(got[0], np.full(64, 9))


def test_a_kernel_on_explicit_axes_beside_hidden_on_none():
    mesh = jax.make_mesh((7,), ("model",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:7])
    kernel = jax.device_put(W, NamedSharding(mesh, P(None, "model")))
    close(linear.cross_entropy(X, kernel, Y), linear.cross_entropy(X, W, Y))
    assert linear.log_prob(Y, X, kernel).shape == (N,)


def test_the_mode_of_a_sharded_vocabulary_is_the_first_nan():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    kernel, hidden = jnp.zeros((1, 12)).at[0, jnp.array([3, 7])].set(jnp.array([jnp.inf, jnp.nan])), jnp.ones((2, 1))
    mode = jax.shard_map(lambda x, w: linear.mode(x, w, axis_name="model"), mesh=mesh,
                         in_specs=(P(), P(None, "model")), out_specs=P())  # fmt: skip
    np.testing.assert_array_equal(mode(hidden, kernel), linear.mode(hidden, kernel))
    np.testing.assert_array_equal(mode(hidden, kernel), [7, 7])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_tokens_and_vocabulary_sharded_under_the_compiler(axis_type):
    """As unsharded; the kernel is gathered once and not in each block, and no device gets the logits of another."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type, axis_type))
    specs = P("data"), P("data", "model"), P("model"), P("data"), P("data")
    args = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((*SHARDED, SHARDED_Y), specs, strict=True)]
    loss = functools.partial(sharded_loss, has_aux=True, block_bytes=4 * 8 * 4)
    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)).lower(*args).compile()
    close(program(*args), unsharded(), 128 * U)
    with jax.set_mesh(mesh):
        draws = linear.sample(jax.random.key(0), args[0], args[1], block_bytes=4 * 8 * 4)
    np.testing.assert_array_equal(draws, linear.sample(jax.random.key(0), *SHARDED[:2]))
    outside, *bodies = re.split(r"\nENTRY ", program.as_text())[::-1]
    assert "all-gather" in outside
    gathered = re.findall(r"\[([\d,]+)\]\S* all-gather\(", bodies[0])
    # One number of each of four devices for the two tokens that a device has of a block, at most.
    assert all(math.prod(map(int, shape.split(","))) <= 2 * 4 for shape in gathered)
