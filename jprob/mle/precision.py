"""Training params of low precision without losing the updates that are too small for them.

A bfloat16 has 8 binary digits: 1 + 0.001 is 1. Once updates fall below half the spacing of the params, training stands
still. A master copy in float32 takes every update, and the params are that copy, rounded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .state import wide


class MasterWeights(NamedTuple):
    """State of `master_weights`.

    Attributes:
      params: the params in float32 at least; rounded to their own dtype, they are the params, bit for bit.
      optimizer_state: what the optimizer remembers, made for these.
    """

    params: PyTree
    optimizer_state: PyTree


def master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer that updates a float32 copy of the params, which follow it rounded to their own dtype.

    Params in bfloat16 or float16 take half the memory and time in `nll`; the copy and the optimizer's state are as
    large as those of float32 params. Leaves that are float32 or float64 already are trained as they are.

    Args:
      optimizer: an optax gradient transformation. It sees the copy, and gradients in its dtype.

    Returns:
      An optax gradient transformation with the state `MasterWeights`; its `update` needs the params. Its updates are in
      float32 at least. They lead from the rounded params to the new copy. So their norm, `update_norm` in the metrics,
      includes what the last rounding left over. The copy is that of float32 training to a rounding of each step.
      `optax.apply_updates` gives the copy rounded.

    Raises:
      ValueError: `update` is not given the params.

    >>> from jprob import mle
    >>> nll = lambda w, x, key: w * x
    >>> optimizer = mle.master_weights(optax.sgd(0.001))
    >>> state = mle.init(jnp.array(1.0, jnp.bfloat16), optimizer, jax.random.key(0))
    >>> state, history = mle.run(nll, optimizer, state, jnp.ones(4, jnp.bfloat16), num_steps=100, batch_size=4)
    >>> print(state.params, f"{state.optimizer_state.params:.4f}")
    0.898438 0.9000
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):
        copy = jax.tree.map(lambda p: jnp.copy(wide(p)), params)  # its own buffers, so that a state can be donated
        return MasterWeights(copy, optimizer.init(copy))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("master_weights: update must be given the params, got None")
        updates = jax.tree.map(wide, updates)
        updates, optimizer_state = optimizer.update(updates, state.optimizer_state, state.params, **extra)
        updates = jax.tree.map(lambda p, copy, u: (copy + u) - wide(p), params, state.params, updates)
        # The same sum gives the new params: p + (c - p) may differ from c by a rounding.
        copy = jax.tree.map(lambda p, u: wide(p) + u, params, updates)
        return updates, MasterWeights(copy, optimizer_state)

    return optax.GradientTransformationExtraArgs(init, update)
