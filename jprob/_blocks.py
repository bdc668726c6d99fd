"""Tokens in blocks: the logits hidden @ kernel of some tokens at a time, and what is made of them, put together.

A side is a triple (hidden, kernel, bias), which gives one row of logits per token.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from . import _accurate

_BLOCK_BYTES, _BLOCK_TOKENS = 2**26, 512


class Plan(NamedTuple):
    """How `cross_entropy` goes through its tokens.

    Attributes:
      blocks: number of blocks of `block_size` tokens.
      block_size: tokens a block.
      remainder: tokens of the last, smaller block, which is no part of the loop; 0 for none.
      bytes: of the logits of one block.
    """

    blocks: int
    block_size: int
    remainder: int
    bytes: int


class Form(NamedTuple):
    """How logits follow from hidden and kernel, how many at once, and what the loss needs; static."""

    transposed: bool = False
    block_bytes: int | None = None
    axis: int | _accurate.Sharded = 1
    has_aux: bool = False
    has_bias: bool = False


class Numbers(NamedTuple):
    """Options that are traced; None leaves out what the option switches on."""

    softcap: Array | None = None
    temperature: Array | None = None
    label_smoothing: Array | None = None
    z_loss: Array | None = None
    weight: Array | None = None


def plan(form, hidden, kernel, dtype, per_token=1) -> Plan:
    """`per_token` rows of logits belong to a token."""
    num_tokens, row = math.prod(hidden.shape[:-1]), num_classes(form, kernel) * dtype.itemsize * per_token
    if not isinstance(num_tokens, int):
        return Plan(1, num_tokens, 0, num_tokens * row)  # symbolic: no number of blocks is known to hold them
    most = form.block_bytes // row if form.block_bytes else max(_BLOCK_BYTES // row, _BLOCK_TOKENS)
    size = min(num_tokens, max(1, most))
    size = next((n for n in range(size, size // 2, -1) if num_tokens % n == 0), size)
    blocks, remainder = divmod(num_tokens, size) if size else (1, 0)
    return Plan(blocks, size, remainder, size * row)


def num_classes(form, kernel):
    return kernel.shape[1 - int(form.transposed)]


def dtype_of(*operands):
    return _accurate.compute_dtype(*(operand.dtype for operand in operands if operand is not None))


def per_token(rows, form: Form, sides, numbers, *arrays, dtype=None):
    """`rows(*logits, *arrays)` of all tokens, block by block. Each side (hidden, kernel, bias) gives logits."""
    hidden, kernel, _ = sides[0]
    tokens = hidden.shape[:-1]
    dtype = dtype or dtype_of(*(x for side in sides for x in side))
    shape = plan(form, hidden, kernel, dtype, len(sides))
    # The biases, and a copy of the kernels, in the dtype computed in: gradients of blocks are added up in it.
    fixed = [(kernel, kernel.astype(dtype), None if bias is None else bias.astype(dtype)) for _, kernel, bias in sides]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(tokens) :]), ([side[0] for side in sides], arrays))

    def body(_, block):
        hiddens, arrays = block
        pairs = zip(hiddens, fixed, strict=True)
        logits = [cap(numbers, plus(bias, _wide_product(form, x, *kernels))) for x, (*kernels, bias) in pairs]
        return None, rows(*logits, *arrays)

    _, out = scan(shape, body, None, flat)
    return jax.tree.map(lambda x: x.reshape(tokens), out)


def scan(shape: Plan, body, carry, arrays, *, in_place: bool = False) -> Any:
    """`body(carry, block)` over blocks of arrays, whose results are put together; all at once where one block is all.

    A block takes every `blocks`-th token, so that tokens that lie on different devices stay there. Read and written in
    place, no array is copied into the order of the blocks; a derivative of that would go over whole arrays a block.
    """
    if shape.blocks == 1 and not shape.remainder:
        return body(carry, arrays)
    whole = shape.blocks * shape.block_size
    kept = jax.checkpoint(body, prevent_cse=False)  # a derivative makes the logits again and keeps none
    columns = jax.tree.map(lambda x: x[:whole].reshape(shape.block_size, shape.blocks, *x.shape[1:]), arrays)
    carry, out = (_scan_in_place if in_place else _scan_columns)(kept, carry, columns)
    out = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out)
    if shape.remainder:
        carry, last = kept(carry, jax.tree.map(lambda x: x[whole:], arrays))
        out = jax.tree.map(lambda *parts: jnp.concatenate(parts), out, last)
    return carry, out


def _scan_columns(body, carry, arrays):
    turned = partial(jax.tree.map, lambda x: jnp.swapaxes(x, 0, 1))
    carry, out = jax.lax.scan(body, carry, turned(arrays))
    return carry, turned(out)


def _scan_in_place(body, carry, arrays):
    blocks = jax.tree.leaves(arrays)[0].shape[1]

    def column(number):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 1, keepdims=False), arrays)

    def step(state, number):
        carry, out = state
        carry, results = body(carry, column(number))
        return (carry, jax.tree.map(partial(_put, number), out, results)), None

    # A result is one number per token, or one vector like that of the token: laid out as such an array is. The values
    # of the first block are not used, so the compiler leaves it out.
    like, (_, first) = {x.shape[2:]: x for x in jax.tree.leaves(arrays)}, body(carry, column(0))
    out = jax.tree.map(lambda x: varying(jnp.zeros_like(like[x.shape[1:]], x.dtype), x), first)
    return jax.lax.scan(step, (carry, out), jnp.arange(blocks))[0]


def _put(number, all, x):
    return jax.lax.dynamic_update_index_in_dim(all, x, number, 1)


def _dot(a, b, axes, dtype):
    return jax.lax.dot_general(a, b, ((axes[:1], axes[1:]), ((), ())), preferred_element_type=dtype)


def product(form: Form, hidden, kernel, dtype):
    """hidden @ kernel. Two operands of a smaller dtype are multiplied as they are."""
    common = hidden.dtype if hidden.dtype == kernel.dtype else dtype_of(hidden, kernel)
    return _dot(hidden.astype(common), kernel.astype(common), (1, int(form.transposed)), dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _wide_product(form: Form, hidden, kernel, wide):
    """hidden @ kernel. `wide`, the kernel in the dtype computed in, is there for the derivative alone."""
    return product(form, hidden, kernel, wide.dtype)


@_wide_product.defjvp
def _wide_product_jvp(form, primals, tangents):
    (hidden, kernel, wide), (dhidden, _, dwide) = primals, tangents
    slope = product(form, dhidden, wide, wide.dtype) + product(form, hidden, dwide, wide.dtype)
    return _wide_product(form, hidden, kernel, wide), slope


def plus(bias, z):
    return z if bias is None else z + bias.astype(z.dtype)[None]


def hidden_slope(form: Form, dz, kernel):
    return _dot(dz, kernel.astype(dz.dtype), (1, 1 - int(form.transposed)), dz.dtype)


def kernel_slope(form: Form, hidden, dz):
    pair = (dz, hidden.astype(dz.dtype)) if form.transposed else (hidden.astype(dz.dtype), dz)
    return _dot(*pair, (0, 0), dz.dtype)


def varying(x, *others):
    """x as it would be after meeting the others: in `shard_map` different on each device where one of them is."""
    # Sums of nothing, which the compiler takes for the 0 that they are.
    return x + sum(jnp.sum(other.ravel()[:0]).astype(x.dtype) for other in others)


def cap(numbers: Numbers, z):
    """The logits of a product. A class that the bias makes impossible stays so: 0 is added to any other."""
    if numbers.softcap is not None:
        impossible = jnp.minimum(z + jnp.finfo(z.dtype).max, 0)
        z = numbers.softcap * _tanh(z / numbers.softcap) + jax.lax.stop_gradient(impossible)
    return z if numbers.temperature is None else z / numbers.temperature


_tanh = jax.custom_jvp(jnp.tanh)


@_tanh.defjvp
def _tanh_jvp(primals, tangents):
    """The derivative `d tanh(x) = 4 e / (1 + e)^2 dx` with e = exp(-2 |x|): no digit cancels, unlike in 1 - tanh^2.

    A rematerialised scan takes a second derivative of what is written here. So the value has the plain derivative of
    2 / (1 + e) - 1 = tanh |x|. |x| has that of sign * x, which is right at 0 too.
    """
    (x,), (dx,) = primals, tangents
    sign = jnp.where(x < 0, -1, 1).astype(x.dtype)
    e = jnp.exp(-2 * sign * x)
    plain = 2 * sign / (1 + e)
    value = jax.lax.stop_gradient(jnp.tanh(x)) + (plain - jax.lax.stop_gradient(plain))
    return value, 4 * e / jnp.square(1 + e) * dx
