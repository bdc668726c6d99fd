"""Meshes with explicit axes, as `jax.make_mesh` makes them: one mechanism for the functions and for the loop.

Explicit axes are automatic inside, so that products, gathers and minibatches need not name the sharding of their
results. The results have explicit axes again.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


def automatic(function: Callable[..., Any], *operands: Any, spec: Sequence[Any] = ()) -> Any:
    """`function(*operands)`, with its mesh left to the compiler: its results are sharded by `spec`, scalars by nothing.

    On explicit axes, each product, gather and reshape would have to name the sharding of its result.
    """
    mesh = explicit_mesh(operands)
    with automatic_axes(mesh):
        out = function(*to_automatic(operands, mesh))
    return to_explicit(out, mesh, spec)


def explicit_mesh(tree: Any) -> Mesh | AbstractMesh | None:
    """The mesh of the first array that lies on one with explicit axes."""
    meshes = (sharding.mesh for x in jax.tree.leaves(tree) if (sharding := on_mesh(x)))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


@contextlib.contextmanager
def automatic_axes(mesh: Mesh | AbstractMesh | None) -> Iterator[None]:
    """Within, programs are traced for a mesh with explicit axes, if there is one, as if they were automatic."""
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(automatic_mesh(mesh).abstract_mesh):
        yield


def to_automatic(tree: Any, mesh: Mesh | AbstractMesh | None) -> Any:
    """The tree where it lies, with explicit axes made automatic, if there are any. Nothing is copied."""

    def move(x):
        sharding = on_mesh(x)
        if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
            return x
        if isinstance(x, Tracer):  # how it is spread is left to the compiler
            return jax.sharding.reshard(x, NamedSharding(automatic_mesh(sharding.mesh), PartitionSpec()))
        return put(x, NamedSharding(automatic_mesh(sharding.mesh), sharding.spec))

    return tree if mesh is None else jax.tree.map(move, tree)


def to_explicit(tree: Any, mesh: Mesh | AbstractMesh | None, spec: Sequence[Any] = (), like: Any = None) -> Any:
    """The way back from `to_automatic`, for all of the tree that lies on a mesh.

    Args:
      tree: arrays on automatic axes, or traced ones.
      mesh: the mesh with explicit axes; without one, the tree is returned as it is.
      spec: how a traced array with axes is sharded, unless `like` says so.
      like: arrays in the same structure. Each one on a mesh says how the corresponding array is sharded.
    """
    if mesh is None:
        return tree

    def move(x, like):
        if not x.size:
            return jnp.zeros(x.shape, x.dtype)  # on no mesh: where `vmap` spreads it, jax 0.10 cannot read it
        sharding = on_mesh(like) or on_mesh(x)
        if isinstance(x, Tracer):
            named = PartitionSpec(*(spec if x.ndim else ()))
            return jax.sharding.reshard(x, NamedSharding(mesh, sharding.spec if sharding else named))
        if not sharding:
            return x
        return put(x, NamedSharding(x.sharding.mesh.update(axis_types=mesh.axis_types), sharding.spec))

    return jax.tree.map(move, tree, tree if like is None else like)


def on_mesh(x: Any) -> NamedSharding | None:
    """How it is placed on a mesh. The type of a traced array tells, if the axes are explicit."""
    if isinstance(x, Tracer):
        sharding = jax.typeof(x).sharding
        return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
    placed = (isinstance(x, Array) and x.committed) or isinstance(x, jax.ShapeDtypeStruct)
    return x.sharding if placed and isinstance(x.sharding, NamedSharding) else None


def automatic_mesh(mesh: Any) -> Any:
    """The mesh with its explicit axes made automatic."""
    types = [AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types]
    return mesh.update(axis_types=tuple(types))


def put(x: Array, sharding: Any) -> Array:
    """The array, placed so. Nothing is copied where the devices stay."""
    if x.sharding == sharding:
        return x
    # `device_put` takes no key to the devices of other processes.
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.jit(lambda x: x, out_shardings=sharding)(x) if is_key else jax.device_put(x, sharding)


def entries(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """One entry of each row of `x` on `axis`, at an index in range. The result keeps that axis with length 1."""
    take = partial(jnp.take_along_axis, axis=axis, mode="promise_in_bounds")
    placed = [None if i == axis else name for i, name in enumerate(spec(x))]
    return automatic(take, x, index, spec=placed)


def spec(x: Any) -> tuple[Any, ...]:
    """How each axis of an array is sharded, by nothing on a mesh that is not explicit."""
    return tuple(jax.typeof(x).sharding.spec)


def diagonal(matrix: jax.Array) -> jax.Array:
    """The diagonals of matrices on the last two axes."""
    # The gradient of `jnp.diagonal` takes no explicit axes in jax 0.12.
    return automatic(partial(jnp.diagonal, axis1=-2, axis2=-1), matrix, spec=spec(matrix)[:-1])
