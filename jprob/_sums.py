"""Sums of examples by an index, as for counts per class or per bin, and ratios of such sums."""

import math

import jax.numpy as jnp
from jax import Array

_LARGEST = 2**24  # partial sums: 64 MiB of float32


def sum_by(index: Array, values: Array, size: int) -> Array:
    """Row k of the result is the sum of `values[i]` over all i with index[i] = k, for k in [0, size).

    `index` has shape [n], each entry in [0, size), and `values` [n, ...]. Added one after the other, 10^7 equal floats
    lose 9 % of their sum: so b = sqrt(n) blocks are added apart, and then their sums, with an error of 2 sqrt(n) u
    (more where `size` leaves room for fewer blocks).
    """
    n = index.shape[0]
    blocks = 1
    if jnp.issubdtype(values.dtype, jnp.floating):
        blocks = max(1, min(math.isqrt(n), _LARGEST // max(1, size * math.prod(values.shape[1:]))))
    place = index + size * (jnp.arange(n, dtype=index.dtype) % blocks)
    partial = jnp.zeros((blocks * size, *values.shape[1:]), values.dtype).at[place].add(values)
    return jnp.sum(partial.reshape(blocks, size, *values.shape[1:]), axis=0)


def ratio(part: Array, total: Array) -> Array:
    """part / total, and 0 with a gradient of 0 where there is nothing to divide by."""
    # The inner select keeps 0 / 0 out of the gradient.
    return jnp.where(total == 0, 0, part / jnp.where(total == 0, 1, total))
