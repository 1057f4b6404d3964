"""PartitionSpecs of the layer's weights and cache, and the checks of the mesh axis they name."""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from mla_jax.cache import PagedKVCache
from mla_jax.checkpoints.weights import MLAParams, param_shapes
from mla_jax.config import MLAConfig
from mla_jax.sharding.axes import require_axis_name, require_manual_axis


def param_specs(config: MLAConfig, mesh_axis: str) -> MLAParams:
    """Returns the PartitionSpecs of tensor-parallel weights: heads are split over a mesh axis.

    Args:
        config: shape of the layer.
        mesh_axis: name of the axis.

    Returns:
        An `MLAParams` of PartitionSpecs, for `jax.shard_map`, or as NamedShardings for `jax.jit`
        and `jax.device_put`. The weights that have no heads are whole on every device.

    Raises:
        TypeError: an argument of another type.
        ValueError: in a context of `jax.set_mesh`, an axis that the mesh does not have, or whose
            size does not divide `config.num_heads`.
    """
    _require_config(config)
    size = _size_in_context("mesh_axis", mesh_axis)
    if size is not None:
        _require_divides("mesh_axis", mesh_axis, size, "config.num_heads", config.num_heads)
    head_dims = {"w_uq": 1, "w_uk": 0, "w_uv": 0, "w_o": 0}
    specs: dict[str, Any] = {
        name: None if shape is None else PartitionSpec()
        for name, shape in param_shapes(config).items()
    }
    for name, dim in head_dims.items():
        specs[name] = PartitionSpec(*[None] * dim, mesh_axis)
    return MLAParams(**specs)


def cache_specs(
    cache: PagedKVCache, mesh_axis: str | None = None, *, kv_axis: str | None = None
) -> PagedKVCache:
    """Returns the PartitionSpecs of a cache: its pages are split over one or two mesh axes.

    With `jax.shard_map` each device then has pages of its own, which it numbers from 0. Elsewhere
    the numbers in a block table are those of the whole cache. In a pool of several layers each
    device has pages of every layer, `num_pages` divided by the number of devices. Use such a pool
    either inside `jax.shard_map` or elsewhere: the layer of a page differs between the two.

    Args:
        cache: the whole cache, of arrays or of their shapes (`jax.eval_shape`).
        mesh_axis: the axis that splits the requests; None: none does.
        kv_axis: the axis that splits the keys of every request, as in `mla_layer`; None: none
            does. With neither axis every device has all pages, as where only heads are split.

    Returns:
        A `PagedKVCache` of PartitionSpecs.

    Raises:
        TypeError: an argument of another type.
        ValueError: in a context of `jax.set_mesh`, an axis that the mesh does not have, or axes
            whose sizes do not divide the number of pages; one axis for both.
    """
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache must be a PagedKVCache, got {type(cache).__name__}")
    given = {"mesh_axis": mesh_axis, "kv_axis": kv_axis}
    axes = {name: axis for name, axis in given.items() if axis is not None}
    if kv_axis is not None and kv_axis == mesh_axis:
        raise ValueError(f"kv_axis must be another axis than mesh_axis, got {kv_axis!r} for both")
    rest = cache.num_pages
    for name, axis in axes.items():
        size = _size_in_context(name, axis)
        if size is not None:
            of = "cache.num_pages" if name == next(iter(axes)) else "the pages per mesh_axis device"
            _require_divides(name, axis, size, of, rest)
            rest //= size
    names = tuple(axes.values())
    pages = names if len(names) > 1 else next(iter(names), None)
    # An array without dims, such as a single scale, belongs to the whole cache, on every device.
    return jax.tree.map(lambda x: PartitionSpec(*[pages][: len(x.shape)]), cache)


def config_of_shard(params: Any, config: Any, head_axis: Any) -> MLAConfig:
    """Returns the config of one device's heads, where `jax.shard_map` splits them over an axis.

    Raises TypeError for a config or an axis of another type. Raises ValueError outside of a
    `jax.shard_map` over that axis, for heads that the axis does not divide, and for `params` that
    have all heads.
    """
    _require_config(config)
    size = require_manual_axis("head_axis", head_axis)
    _require_divides("head_axis", head_axis, size, "config.num_heads", config.num_heads)
    heads = config.num_heads // size
    if size > 1 and isinstance(params, MLAParams) and params.w_o.shape[0] == config.num_heads:
        raise ValueError(
            f"params must have {heads} heads of {config.num_heads} on each device of head_axis "
            f"{head_axis!r} (param_specs), got all of them"
        )
    return config.shard(size)


def _size_in_context(name: str, axis: Any) -> int | None:
    """Returns the size of an axis of the mesh in the context, None without a mesh."""
    require_axis_name(name, axis)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    if axis not in mesh.axis_names:
        axes = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(f"{name} must be an axis of the mesh, one of {axes}, got {axis!r}")
    return mesh.shape[axis]


def _require_config(config: Any) -> None:
    if not isinstance(config, MLAConfig):
        raise TypeError(f"config must be an MLAConfig, got {type(config).__name__}")


def _require_divides(name: str, axis: str, size: int, of: str, count: int) -> None:
    if count % size:
        raise ValueError(
            f"{name} must have a size that divides {of} = {count}, got {axis!r} of size {size}"
        )
