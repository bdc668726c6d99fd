"""The order in which a run meets its examples: for any step the batch, without the order of the epoch around it.

An epoch is shuffled by Hoang, Morris and Rogaway's swap-or-not (2012, An enciphering scheme based on a card shuffle,
CRYPTO). A round pairs each place x with pivot - x, modulo the number of examples, and swaps a pair or not, as a hash of
the higher of the two says. However often that is done, it is a permutation; where a place ends up follows from that
place alone. So a batch costs its own examples and not a sort of all, and a run in small pieces costs what it does in
one.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, Key, UInt32

# After 20 the number of examples that keep their successor still shows, of 1000 examples in 20 000 orders; after 24, 32
# and 64 nothing does. The paper has 6 log2(n), against an adversary.
_ROUNDS = 64


def batches(
    key: Key[Array, ""], step: Int[Array, ""], size: int, num_steps: int, batch_size: int
) -> Int[Array, "num_steps batch_size"]:
    """The numbers of the examples in the batches from `step` on, int32.

    Every number in [0, size) comes once an epoch, in an order that follows from the key and the number of the epoch.
    The number `size`, which no example has, fills up the last batch of an epoch.
    """
    steps_per_epoch = -(-size // batch_size)
    steps = step + jnp.arange(num_steps, dtype=jnp.int32)
    places = steps[:, None] % steps_per_epoch * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    first, epochs = step // steps_per_epoch, steps[:, None] // steps_per_epoch
    # A run that starts within an epoch may touch one epoch more than it is long.
    touched = first + jnp.arange((num_steps - 1) // steps_per_epoch + 2, dtype=jnp.int32)
    pivots, salts = jax.vmap(lambda epoch: _rounds(jax.random.fold_in(key, epoch), size))(touched)

    def swap_or_not(places, round):
        pivot, salt = jax.tree.map(lambda x: x[epochs - first], round)
        partners = pivot - places
        partners = jnp.where(partners < 0, partners + size, partners)
        swapped = _hash(jnp.maximum(places, partners).astype(jnp.uint32) ^ salt) >> 31 == 1
        return jnp.where(swapped, partners, places), None

    shuffled, _ = jax.lax.scan(swap_or_not, jnp.minimum(places, size - 1), (pivots.T, salts.T))
    return jnp.where(places < size, shuffled, size)


def _rounds(key, size):
    """Pivots and salts of the rounds of an epoch."""
    for_pivots, for_salts = jax.random.split(key)
    pivots = jax.random.randint(for_pivots, (_ROUNDS,), 0, size, jnp.int32)
    return pivots, jax.random.bits(for_salts, (_ROUNDS,), jnp.uint32)


def _hash(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The finalizer of MurmurHash3 (Appleby, public domain): each bit in changes each bit out half of the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
