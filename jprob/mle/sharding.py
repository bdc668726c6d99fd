"""Meshes and placement: data are placed, and jit follows.

Arrays that were placed on devices are trained on there, and come back as they lay. Explicit axes of a mesh are
automatic in between, by `_placement`: minibatches may be taken and cut in any way, and `nll` meets no types with a
sharding.
"""

from typing import Any

import jax
from jax import Array
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import PyTree

from .. import _placement


def is_placed(x: Any) -> bool:
    """It is an array that lies where it does on purpose."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding is not None
    return isinstance(x, Array) and not isinstance(x, Tracer) and x.committed


def layout(tree: PyTree) -> PyTree:
    """How the arrays of a tree lie, for `put_back`, without the arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if is_placed(x) else None), tree
    )


def in_one_place(state: PyTree, data: PyTree) -> PyTree:
    """The state with its unplaced arrays put where the placed ones are: on all devices of a mesh, else on one device.

    The first chunk would bring them there. The second would then need another program, since its arguments lie
    elsewhere.
    """
    placed = [x.sharding for x in jax.tree.leaves((state, data)) if is_placed(x)]
    on_meshes = [NamedSharding(x.mesh, PartitionSpec()) for x in placed if isinstance(x, NamedSharding)]
    where = on_meshes + [x for x in placed if isinstance(x, SingleDeviceSharding)]
    if not where:
        return state
    copied = jax.jit(lambda x: x, out_shardings=where[0])  # `device_put` takes no key to the devices of other processes
    return jax.tree.map(lambda x: x if x.committed else copied(x), state)


def places(data: PyTree) -> tuple[tuple[NamedSharding | None, int], ...]:
    """How each array is spread by its leading axis, and in how many parts, for `spread`.

    A program knows that of its arguments only where axes are explicit.
    """

    def place(x):
        sharding = _placement.on_mesh(x)
        if sharding is None or not x.ndim or not x.size:
            return None, 1
        sharding = NamedSharding(_placement.automatic_mesh(sharding.mesh), sharding.spec)
        return sharding, x.shape[0] // sharding.shard_shape(x.shape)[0]

    return tuple(map(place, jax.tree.leaves(data)))


def spread(batch: PyTree, places: tuple[tuple[NamedSharding | None, int], ...]) -> PyTree:
    """The batch, spread as the data are. Taken out of them as it is, all of it would come to every device."""

    def constrain(x, place):
        sharding, num_parts = place
        wanted = num_parts > 1 and x.shape[0] % num_parts == 0
        return jax.lax.with_sharding_constraint(x, sharding) if wanted else x

    leaves, treedef = jax.tree.flatten(batch)
    return treedef.unflatten(map(constrain, leaves, places))


def put_back(before: PyTree, after: PyTree, mesh: Mesh | AbstractMesh | None = None) -> PyTree:
    """The results, spread as the arguments were: the compiler is free to choose otherwise.

    Args:
      before: arrays that lie as those of `after` are to, if they were placed.
      after: the results, in the same structure.
      mesh: the mesh with explicit axes, if there is one: all results go back to it.
    """

    def move(old, new):
        if is_placed(old) and not isinstance(new, Tracer):
            return _placement.put(new, old.sharding)
        return _placement.to_explicit(new, mesh, like=old)

    return jax.tree.map(move, before, after)
