"""Mesh axes in the types of arrays: manual axes of `jax.shard_map`, and explicit axes.

Under `jax.shard_map` the type of an array names the manual axes over which its values vary. A loop
must return each array of its carry with the type that it got, so that what a loop starts with needs
`vary_like`.

On a mesh with axes of `AxisType.Explicit` the type of an array says how it is sharded, and JAX
refuses an operation whose result could be sharded in several ways. The op merges the dims of tokens
and heads, and reads pages by a request's numbers. Both are such operations. `on_auto_axes`
therefore leaves the shardings inside a function to the compiler, and fixes those of its results.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec


def varying_axes(*trees: Any) -> frozenset[str]:
    """Returns the manual mesh axes over which an array of the pytrees varies."""
    types = (jax.typeof(array) for array in jax.tree.leaves(trees))
    return frozenset().union(*(one.manual_axis_type.varying for one in types))


def require_manual_axis(name: str, axis: Any) -> int:
    """Returns the size of an axis of the `jax.shard_map` around the call.

    Raises TypeError unless the axis is a string, and ValueError unless there is such an axis.
    name: of the argument, for the message.
    """
    require_axis_name(name, axis)
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.manual_axes:
        got = f"inside one over {', '.join(map(repr, mesh.manual_axes))}"
        got = got if mesh.manual_axes else "outside of jax.shard_map"
        raise ValueError(f"{name} must be an axis of jax.shard_map, got {axis!r} {got}")
    return mesh.shape[axis]


def require_axis_name(name: str, axis: Any) -> None:
    """Raises TypeError unless the axis is a string."""
    if not isinstance(axis, str):
        raise TypeError(f"{name} must be the name of a mesh axis, got {axis!r}")


def vary_like(tree: Any, *like: Any) -> Any:
    """Returns the pytree, varying over each manual axis that an array of `like` varies over.

    The values stay as they are. Outside of `jax.shard_map` the pytree is returned unchanged.
    """
    axes = varying_axes(like)

    def cast(array: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(cast, tree) if axes else tree


def dims_of(array: Any) -> tuple[Any, ...]:
    """Returns how each dim of an array is sharded over explicit axes, as in a PartitionSpec."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return (*spec, *[None] * (array.ndim - len(spec)))


def spec_of_dims(*dims: Any) -> PartitionSpec:
    """Returns a PartitionSpec of these dims, in which only the first dim with an axis keeps it."""
    used: set[str] = set()
    kept: list[Any] = []
    for dim in dims:
        names = (dim,) if isinstance(dim, str) else tuple(dim or ())
        free = tuple(name for name in names if name not in used)
        used |= set(free)
        kept.append(free or None)
    return PartitionSpec(*kept)


def replicated(array: Any) -> Any:
    """Returns an array that is sharded over explicit axes whole on every device, others as is."""
    mesh = _explicit_mesh(array)
    if mesh is None or not any(dims_of(array)):
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))


def on_auto_axes(out_specs: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function so that mesh axes are not explicit inside it.

    Args:
        out_specs: takes the function's positional arguments and returns the PartitionSpecs of its
            results, a pytree like the results or a prefix of it.

    The decorated function takes pytrees of arrays as positional arguments. Its keyword arguments
    are static. Without explicit axes it is called as it is.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.partial(jax.jit, static_argnames="options")
        def run(*args: Any, options: tuple[tuple[str, Any], ...]) -> Any:
            mesh = _explicit_mesh(args)
            assert mesh is not None
            shardings = jax.tree.map(
                lambda spec: NamedSharding(mesh, spec),
                out_specs(*args),
                is_leaf=lambda node: isinstance(node, PartitionSpec),
            )
            on_auto = jax.sharding.auto_axes(
                functools.partial(function, **dict(options)),
                axes=mesh.explicit_axes,
                out_sharding=shardings,
            )
            return on_auto(*args)

        @functools.wraps(function)
        def decorated(*args: Any, **options: Any) -> Any:
            if _explicit_mesh(args) is None:
                return function(*args, **options)
            return run(*args, options=tuple(sorted(options.items())))

        return decorated

    return decorate


def _explicit_mesh(tree: Any) -> AbstractMesh | None:
    """Returns the mesh in use if an axis of it is explicit: that of the context, or of an array."""
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(tree)]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)
