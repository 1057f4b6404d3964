"""Puts the weights of layers on devices: transposed there, stacked, and sharded."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from mla_jax.checkpoints.config_json import shown
from mla_jax.checkpoints.sources import Source, hf_sources
from mla_jax.checkpoints.weights import MLAParams, param_shapes
from mla_jax.config import MLAConfig


class Placement:
    """The arrays of one weight: one per layer, or a stack of `num_layers` that is written in place.

    A tensor is put on the devices as the file has it, each device's slice of it. The device
    transposes it to the weight.
    """

    def __init__(self, source: Source, sharding: Sharding | None, num_layers: int | None) -> None:
        self._source = source
        self._num_layers = num_layers
        self._layers: dict[int, jax.Array] = {}
        self._stack: jax.Array | None = None
        self._in_file, self._in_stack = sharding, sharding
        self._in_layer = sharding
        if isinstance(sharding, NamedSharding):
            spec = [*sharding.spec, *[None] * (len(source.axes) - len(sharding.spec))]
            in_file = [spec[source.axes.index(axis)] for axis in range(len(spec))]
            self._in_file = _with_spec(sharding, in_file)
            self._in_stack = _with_spec(sharding, [None, *spec])

    def box(self) -> list[tuple[int, int]]:
        """Returns the range of the tensor, per dim, that the devices of this process need."""
        shape = self._source.view_shape
        if self._in_file is None:
            return self._source.box([(slice(None),) * len(shape)])
        indices = self._in_file.addressable_devices_indices_map(shape).values()
        return self._source.box(index for index in indices if index is not None)

    def put(self, layer: int, tensor: np.ndarray, box: Sequence[tuple[int, int]]) -> jax.Array:
        """Places a layer's tensor, of which the host has a box, and returns the array it is in."""
        value = self._on_devices(self._source.viewed(tensor), box)
        value = _transposing(self._source.axes, self._in_layer)(value)
        if self._num_layers is None:
            self._layers[layer] = value
            return value
        if self._stack is None:
            shape = (self._num_layers, *value.shape)
            self._stack = jnp.zeros(shape, value.dtype, device=self._in_stack)
        self._stack = _writing(self._in_stack)(self._stack, value, np.int32(layer))
        return self._stack

    def results(self) -> list[jax.Array]:
        """Returns the weight of each layer in order, or the stack alone."""
        if self._stack is not None:
            return [self._stack]
        return [self._layers[layer] for layer in sorted(self._layers)]

    def _on_devices(self, view: np.ndarray, box: Sequence[tuple[int, int]]) -> jax.Array:
        """Returns the view as an array in the order of the file, given a box of it."""
        if self._in_file is None:
            return jnp.asarray(view)
        shape = self._source.view_shape
        origin = self._source.origin(box)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or (slice(None),) * len(shape)
            bounds = [one.indices(size) for one, size in zip(index, shape, strict=True)]
            return view[
                tuple(slice(a - o, b - o) for (a, b, _), o in zip(bounds, origin, strict=True))
            ]

        return jax.make_array_from_callback(shape, self._in_file, part)


def placements(sharding: Any, config: MLAConfig, num_layers: int | None) -> dict[str, Placement]:
    """Returns the placement of each weight.

    Args:
        sharding: as `load_hf_layers` takes it.
        config: the shapes.
        num_layers: length of the leading axis; None: one array per layer.

    Raises TypeError or ValueError naming `sharding`, or its field.
    """
    found = {}
    for field, source in hf_sources(config).items():
        one, name = sharding, "sharding"
        if isinstance(sharding, MLAParams):
            one, name = getattr(sharding, field), f"sharding.{field}"
            if one is None:
                raise TypeError(f"{name} must be a sharding, got None")
        shape = param_shapes(config)[field]
        assert shape is not None
        found[field] = Placement(source, _sharding(name, one, field, shape), num_layers)
    if isinstance(sharding, MLAParams):
        for field in param_shapes(config).keys() - found.keys():
            if getattr(sharding, field) is not None:
                raise ValueError(f"sharding.{field} must be None: the config has no such weight")
    return found


def _sharding(name: str, value: Any, field: str, shape: tuple[int, ...]) -> Sharding | None:
    """Returns a sharding that divides a weight evenly."""
    if value is None:
        return None
    if isinstance(value, PartitionSpec):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(
                f"{name} is a PartitionSpec, which needs a mesh: load inside jax.set_mesh, or give "
                "NamedShardings"
            )
        try:
            value = NamedSharding(mesh, value)
        except ValueError as error:
            raise ValueError(f"{name} does not fit the mesh: {error}") from error
    if not isinstance(value, NamedSharding | SingleDeviceSharding):
        raise TypeError(
            f"{name} must be a NamedSharding, a SingleDeviceSharding, a PartitionSpec or an "
            f"MLAParams of them, got {shown(value)}"
        )
    try:
        if isinstance(value, NamedSharding) and len(value.spec) > len(shape):
            raise ValueError(f"{value.spec} has more dims")
        value.shard_shape(shape)
    except ValueError as error:
        raise ValueError(f"{name} does not fit {field} {list(shape)}: {error}") from error
    return value


def _with_spec(sharding: NamedSharding, spec: Sequence[Any]) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


@functools.lru_cache(maxsize=256)
def _transposing(
    axes: tuple[int, ...], sharding: Sharding | None
) -> Callable[[jax.Array], jax.Array]:
    if axes == tuple(range(len(axes))):
        return lambda value: value
    return jax.jit(lambda value: value.transpose(axes), out_shardings=sharding)


@functools.lru_cache(maxsize=256)
def _writing(
    sharding: Sharding | None,
) -> Callable[[jax.Array, jax.Array, np.int32], jax.Array]:
    """Returns a program that writes one layer of a donated stack.

    It does not transpose: XLA's CPU compiler would fuse that into a slow loop.
    """

    def write(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
