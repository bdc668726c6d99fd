"""The order in which a run meets its examples: for any step the batch, without the order of the epoch around it.

An epoch is shuffled by Hoang, Morris and Rogaway's swap-or-not (2012, An enciphering scheme based on a card shuffle,
CRYPTO). A round pairs each place x with pivot - x, modulo the number of examples. A hash of the higher place of a pair
says whether to swap the pair. Any number of rounds is a permutation. The end of a place follows from that place alone.
So a batch costs its own examples and no sort of all. A run in small pieces costs no more than one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, Key, UInt32

# After 20 the number of examples that keep their successor still shows, of 1000 examples in 20 000 orders; after 24, 32
# and 64 nothing does. The paper has 6 log2(n), against an adversary.
_ROUNDS = 64
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio, odd: its multiples lie far apart (Weyl)


def batches(
    key: Key[Array, ""] | UInt32[Array, " words"], step: Int[Array, ""], size: int, num_steps: int, batch_size: int
) -> Int[Array, "num_steps batch_size"]:
    """The numbers of the examples in the batches from `step` on, int32.

    Every number in [0, size) comes once an epoch. The order follows from the key and the number of the epoch. The
    number `size`, which no example has, fills up the last batch of an epoch.
    """
    steps = step + jnp.arange(num_steps, dtype=jnp.int32)[:, None]
    epochs, batch = jnp.divmod(steps, -(-size // batch_size))
    places = batch * batch_size + jnp.arange(batch_size, dtype=jnp.int32)[None]
    seeds = [mixed(seed ^ epochs.astype(jnp.uint32)) for seed in _seeds(key)]

    def swap_or_not(places, shift):
        pivots, salts = (mixed(seed + shift) for seed in seeds)
        partners = (pivots % jnp.uint32(size)).astype(jnp.int32) - places
        partners = jnp.where(partners < 0, partners + size, partners)
        swapped = mixed(jnp.maximum(places, partners).astype(jnp.uint32) ^ salts) >> 31 == 1
        return jnp.where(swapped, partners, places), None

    shifts = jnp.arange(_ROUNDS, dtype=jnp.uint32) * jnp.uint32(_GOLDEN)
    shuffled, _ = jax.lax.scan(swap_or_not, jnp.minimum(places, size - 1), shifts)
    return jnp.where(places < size, shuffled, size)


def _seeds(key):
    """Two numbers, one for the pivots and one for the salts.

    They are hashed from the words of a key of any implementation: some draw, under `vmap`, from the first key
    alone; and a program of random bits would take most of the time to compile `run`.
    """
    begin = jnp.array([_GOLDEN, ~_GOLDEN % 2**32], jnp.uint32)
    return functools.reduce(lambda seeds, word: mixed(seeds ^ word), jax.random.key_data(key), begin)


def mixed(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The finalizer of MurmurHash3 (Appleby, public domain): each bit in changes each bit out half of the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
