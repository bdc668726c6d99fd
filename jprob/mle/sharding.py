"""Meshes and placement: data are placed, and jit follows.

What was placed on devices is trained on there, and comes back as it lay. Axes of a mesh that are explicit (those that
`jax.make_mesh` makes) are automatic in between, so that minibatches may be taken and cut in any way, and `nll` meets no
types that a sharding is a part of.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import PyTree


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
    """The state with what was not placed put where something was: on all devices of a mesh, else on one device.

    The first chunk would bring it there, and the second need a program of its own, since its arguments lie elsewhere.
    """
    placed = [x.sharding for x in jax.tree.leaves((state, data)) if is_placed(x)]
    on_meshes = [NamedSharding(x.mesh, PartitionSpec()) for x in placed if isinstance(x, NamedSharding)]
    where = on_meshes + [x for x in placed if isinstance(x, SingleDeviceSharding)]
    if not where:
        return state
    copied = jax.jit(_same, out_shardings=where[0])  # `device_put` takes no key to the devices of other processes
    return jax.tree.map(lambda x: x if x.committed else copied(x), state)


def places(data: PyTree) -> tuple[tuple[NamedSharding | None, int], ...]:
    """How each array is spread by its leading axis, and in how many parts, for `spread`.

    Of its arguments, a program knows that only where axes are explicit.
    """

    def place(x):
        sharding = _on_mesh(x)
        if sharding is None or not x.ndim or not x.size:
            return None, 1
        sharding = NamedSharding(_automatic(sharding.mesh), sharding.spec)
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


def explicit_mesh(tree: PyTree) -> Mesh | AbstractMesh | None:
    """The mesh of the first array that lies on one with explicit axes."""
    meshes = (sharding.mesh for x in jax.tree.leaves(tree) if (sharding := _on_mesh(x)))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


@contextlib.contextmanager
def automatic_axes(mesh: Mesh | AbstractMesh | None) -> Iterator[None]:
    """Within, programs are traced for a mesh with explicit axes, if there is one, as if they were automatic."""
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(_automatic(mesh).abstract_mesh):
        yield


def with_automatic_axes(function: Callable[..., Any], *arguments: PyTree) -> Any:
    """What a function of arrays gives where the explicit axes of their mesh are automatic, with explicit axes again."""
    mesh = explicit_mesh(arguments)
    with automatic_axes(mesh):
        out = function(*automatic(arguments, mesh))
    return explicit(out, mesh)


def automatic(tree: PyTree, mesh: Mesh | AbstractMesh | None) -> PyTree:
    """The tree where it lies, with explicit axes made automatic, if there are any. Nothing is copied."""

    def move(x):
        sharding = _on_mesh(x)
        if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
            return x
        if isinstance(x, Tracer):  # how it is spread is left to the compiler
            return jax.sharding.reshard(x, NamedSharding(_automatic(sharding.mesh), PartitionSpec()))
        return _put(x, NamedSharding(_automatic(sharding.mesh), sharding.spec))

    return tree if mesh is None else jax.tree.map(move, tree)


def explicit(tree: PyTree, mesh: Mesh | AbstractMesh | None) -> PyTree:
    """The way back from `automatic`, for all of the tree that lies on a mesh."""
    return tree if mesh is None else jax.tree.map(lambda x: _explicit(x, mesh, x), tree)


def put_back(before: PyTree, after: PyTree, mesh: Mesh | AbstractMesh | None = None) -> PyTree:
    """What came out, spread as what went in: the compiler is free to choose otherwise.

    Args:
      before: arrays that lie as those of `after` are to, if they were placed.
      after: what came out, in the same structure.
      mesh: the mesh with explicit axes, if there is one: all that came out goes back to it.
    """

    def move(old, new):
        if is_placed(old) and not isinstance(new, Tracer):
            return _put(new, old.sharding)
        return new if mesh is None else _explicit(new, mesh, old)

    return jax.tree.map(move, before, after)


def _explicit(x, mesh, like):
    """An array on this mesh with explicit axes, spread as `like` if that lies on one."""
    sharding = _on_mesh(like) or _on_mesh(x)
    if not x.size:
        return jnp.zeros(x.shape, x.dtype)  # on no mesh: where `vmap` spreads it, jax 0.10 cannot read it
    if isinstance(x, Tracer):
        return jax.sharding.reshard(x, NamedSharding(mesh, sharding.spec if sharding else PartitionSpec()))
    return _put(x, NamedSharding(x.sharding.mesh.update(axis_types=mesh.axis_types), sharding.spec)) if sharding else x


def _on_mesh(x):
    """How it is placed on a mesh. The type of a traced array tells, if the axes are explicit."""
    if isinstance(x, Tracer):
        sharding = jax.typeof(x).sharding
        return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
    return x.sharding if is_placed(x) and isinstance(x.sharding, NamedSharding) else None


def _automatic(mesh):
    types = [AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types]
    return mesh.update(axis_types=tuple(types))


def _put(x, sharding):
    if x.sharding == sharding:
        return x
    # `device_put` copies nothing where the devices stay, but takes no key to those of other processes.
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.jit(_same, out_shardings=sharding)(x) if is_key else jax.device_put(x, sharding)


def _same(x):
    return x
