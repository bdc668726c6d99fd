"""Functions on meshes with explicit axes, as `jax.make_mesh` makes them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def automatic(function: Callable[..., Any], *operands: Any, spec: Sequence[Any] = ()) -> Any:
    """`function(*operands)`, with its mesh left to the compiler: its results are sharded by `spec`, scalars by nothing.

    On explicit axes, each product, gather and reshape would have to name the sharding of its result.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(operands)]
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        return function(*operands)
    one, many = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), spec))
    placed = partial(jax.sharding.auto_axes, function, axes=mesh.explicit_axes)
    shapes = jax.eval_shape(placed(out_sharding=one), *operands) if spec else one
    shardings = jax.tree.map(lambda out: many if getattr(out, "ndim", 0) else one, shapes)
    return placed(out_sharding=shardings)(*operands)


def entries(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """One entry of each row of `x` on `axis`, at an index in range, which keeps that axis with length 1."""
    take = partial(jnp.take_along_axis, axis=axis, mode="promise_in_bounds")
    placed = [None if i == axis else name for i, name in enumerate(spec(x))]
    return automatic(take, x, index, spec=placed)


def spec(x: Any) -> tuple[Any, ...]:
    """How each axis of an array is sharded, by nothing on a mesh that is not explicit."""
    return tuple(jax.typeof(x).sharding.spec)
