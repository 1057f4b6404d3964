"""Loads attention layers of a published checkpoint onto devices, one tensor at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mla_jax import checks
from mla_jax.checkpoints.config_json import shown
from mla_jax.checkpoints.placement import Placement, placements
from mla_jax.checkpoints.read import Checkpoint, CheckpointError
from mla_jax.checkpoints.sources import hf_shapes, hf_sources
from mla_jax.checkpoints.weights import MLAParams, layer_number, params_of
from mla_jax.config import MLAConfig, config_from_json

Progress = Callable[[int, int], object]

_CHUNK = 2**20  # values that are read and converted at a time, which a CPU's caches hold


def load_hf(
    folder: str | Path,
    layer: int | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    prefix: str | None = None,
) -> tuple[MLAConfig, MLAParams]:
    """Reads one attention layer of a published checkpoint; reads no other tensor from disk.

    Args:
        folder: holds config.json and the safetensors file or shards.
        layer: number of the layer from 0, also past num_hidden_layers for an MTP module. None
            selects the lowest in the folder.
        dtype: dtype of the returned weights (float32, bfloat16 or float16), whatever the file has.
            NaN and infinity are loaded unchanged.
        prefix: chooses among several models in the folder that have such a layer. It is the part of
            their tensor names before "layers.", such as "model." or "draft.model.".

    Raises:
        FileNotFoundError: the folder or its config.json does not exist.
        CheckpointError: a file, key or tensor is missing, corrupt, of a wrong shape, dtype or
            range, quantized in an unsupported way, or asks for another attention.
        TypeError, ValueError: an invalid argument. Every message names what is wrong.
    """
    layer = None if layer is None else layer_number(layer)
    dtype = checks.require_float_dtype("dtype", dtype)
    _require_prefix(prefix)
    with Checkpoint(folder) as checkpoint:
        config = config_from_json(checkpoint.config, str(checkpoint.config_path))
        stem = checkpoint.layer_prefix(layer, prefix)
        [params] = _load(checkpoint, config, [stem], placements(None, config, None), dtype)
    return config, params


@overload
def load_hf_layers(
    folder: str | Path,
    layers: Iterable[int] | None = ...,
    dtype: DTypeLike = ...,
    *,
    stacked: Literal[True] = ...,
    sharding: Any = ...,
    prefix: str | None = ...,
    progress: Progress | None = ...,
) -> tuple[MLAConfig, MLAParams]: ...


@overload
def load_hf_layers(
    folder: str | Path,
    layers: Iterable[int] | None = ...,
    dtype: DTypeLike = ...,
    *,
    stacked: Literal[False],
    sharding: Any = ...,
    prefix: str | None = ...,
    progress: Progress | None = ...,
) -> tuple[MLAConfig, list[MLAParams]]: ...


def load_hf_layers(
    folder: str | Path,
    layers: Iterable[int] | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    stacked: bool = True,
    sharding: Any = None,
    prefix: str | None = None,
    progress: Progress | None = None,
) -> tuple[MLAConfig, MLAParams | list[MLAParams]]:
    """Reads many attention layers of a published checkpoint in one pass over its files.

    Names, shapes and dtypes of all layers are checked before the first weight is read. The weights
    are then read in the order of the files and put on the devices one tensor at a time. The host
    holds two tensors at most. A process reads the slices that its own devices need.

    Args:
        folder, dtype, prefix: as in `load_hf`.
        layers: numbers of the layers, in the order of the result. None selects 0 to
            num_hidden_layers - 1, without an MTP module.
        stacked: return one `MLAParams` whose weights have a leading axis of layers, as
            `jax.lax.scan` takes them. False: return a list with an `MLAParams` per layer.
        sharding: where the weights of one layer are placed. Either one sharding for all weights or
            an `MLAParams` of them, which are NamedShardings, SingleDeviceShardings, or
            PartitionSpecs such as those of `param_specs` in a context of `jax.set_mesh`. The
            axis of layers is not split. None places all on the default device.
        progress: called as `progress(done, total)` after each tensor, with the bytes that have been
            read and those of all layers in the files.

    Raises:
        FileNotFoundError, CheckpointError: as `load_hf`; also for a layer that is missing or that
            has other tensors or widths than config.json says.
        TypeError, ValueError: an invalid argument. Every message names what is wrong.
    """
    numbers = _layer_numbers(layers)
    dtype = checks.require_float_dtype("dtype", dtype)
    stacked = checks.require_bool("stacked", stacked)
    _require_prefix(prefix)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable or None, got {shown(progress)}")
    with Checkpoint(folder) as checkpoint:
        config = config_from_json(checkpoint.config, str(checkpoint.config_path))
        stems = _stems(checkpoint, config, numbers, prefix)
        placed = placements(sharding, config, len(stems) if stacked else None)
        loaded = _load(checkpoint, config, stems, placed, dtype, progress)
    return config, loaded[0] if stacked else loaded


def _stems(
    checkpoint: Checkpoint, config: MLAConfig, numbers: list[int] | None, prefix: str | None
) -> list[str]:
    """Returns, per layer, the part of the tensor names before a layer's own."""
    if numbers is not None:
        return [checkpoint.layer_prefix(number, prefix) for number in numbers]
    count = config.num_hidden_layers
    try:
        return [checkpoint.layer_prefix(number, prefix) for number in range(count)]
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} (config.json has {count} layers; the argument layers chooses some of them)"
        ) from error


def _load(
    checkpoint: Checkpoint,
    config: MLAConfig,
    stems: Sequence[str],
    placed: Mapping[str, Placement],
    dtype: np.dtype,
    progress: Progress | None = None,
) -> list[MLAParams]:
    """Returns the weights of layers, given the parts of the tensor names before a layer's own.

    With placements of a stack, returns one `MLAParams` with all layers.
    """
    shapes = hf_shapes(config)
    for stem in stems:
        checkpoint.check_names(stem, shapes)
        for name, shape in shapes.items():
            checkpoint.check(stem + name, shape)
    fields: dict[str, list[str]] = {}
    for field, source in hf_sources(config).items():
        fields.setdefault(source.tensor, []).append(field)
    order = sorted(
        (checkpoint.place(stem + name), layer, name)
        for layer, stem in enumerate(stems)
        for name in shapes
    )
    done, total = 0, sum(size for (*_, size), _, _ in order)
    pending: list[jax.Array] = []
    for (*_, size), layer, name in order:
        boxes = [placed[field].box() for field in fields[name]]
        box = [(min(a for a, _ in dim), max(b for _, b in dim)) for dim in zip(*boxes, strict=True)]
        tensor = _read(checkpoint, stems[layer] + name, box, dtype)
        # A transfer keeps the host's copy of its tensor until it ends.
        jax.block_until_ready(pending)
        pending = [placed[field].put(layer, tensor, box) for field in fields[name]]
        done += size
        if progress is not None:
            progress(done, total)
    results = {field: placement.results() for field, placement in placed.items()}
    count = len(next(iter(results.values())))
    return [params_of({field: found[i] for field, found in results.items()}) for i in range(count)]


def _read(
    checkpoint: Checkpoint, name: str, box: Sequence[tuple[int, int]], dtype: np.dtype
) -> np.ndarray:
    """Returns a range per dim of a tensor in `dtype`, which is converted by blocks of rows."""
    (low, high), *rest = box
    found = np.empty([b - a for a, b in box], dtype)
    rows = max(1, _CHUNK * (high - low) // max(1, found.size))
    for start in range(low, high, rows):
        stop = min(start + rows, high)
        value = checkpoint.read(name, [(start, stop), *rest])
        found[start - low : stop - low] = _as_dtype(f"{checkpoint.folder}: {name}", value, dtype)
    return found


def _as_dtype(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts values of a tensor; raises CheckpointError if a finite value would overflow."""
    with np.errstate(over="ignore", invalid="ignore"):  # overflow is checked below
        converted = value.astype(dtype, copy=False)
    if jnp.finfo(value.dtype).max > jnp.finfo(dtype).max and not np.isfinite(converted).all():
        lost = np.isfinite(value) & ~np.isfinite(converted)
        if lost.any():
            raise CheckpointError(
                f"{name} holds {value[lost][0]}, which is past the range of {dtype.name}"
            )
    return converted


def _layer_numbers(layers: Any) -> list[int] | None:
    """Returns the numbers as Python ints; raises TypeError or ValueError naming `layers`."""
    if layers is None:
        return None
    if isinstance(layers, str | bytes | Mapping) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be layer numbers or None, got {shown(layers)}")
    numbers = [layer_number(layer, f"layers[{i}]") for i, layer in enumerate(layers)]
    if not numbers:
        raise ValueError("layers must name a layer, got none")
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise ValueError(f"layers must name each layer once, got {twice} twice")
    return numbers


def _require_prefix(prefix: Any) -> None:
    if not isinstance(prefix, str | None):
        raise TypeError(f"prefix must be a string or None, got {shown(prefix)}")
