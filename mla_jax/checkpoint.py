"""Reads tensors by name from a published checkpoint folder, without loading the files whole.

A folder holds either one `model.safetensors` or shards with `model.safetensors.index.json`.
DeepSeek-V3 and R1 store matrices as float8 e4m3 with one float32 factor for each 128 x 128 block
beside it (`weight_scale_inv`; value = fp8 * factor, the last blocks ragged).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from mla_jax.config import read_config_json, text_config

_LAYER_PREFIX = re.compile(r"(.*\.)?layers\.(?P<layer>\d+)\.self_attn\.")

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}


class CheckpointError(ValueError):
    """A checkpoint that can't be read as what its config.json describes."""


class Checkpoint:
    """A folder of safetensors; opening it reads no tensor, `read` only the bytes of that one.

    Raises FileNotFoundError without folder or config.json, CheckpointError naming the file or
    tensor that is missing, corrupt, or of a wrong shape or dtype.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_config_json(self.folder)
        self._block = _weight_block_size(self.config)
        self._headers: dict[Path, dict[str, Any]] = {}
        self._files = self._find_files()

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers that have attention tensors here."""
        return sorted({layer for _, layer in self._layer_prefixes()})

    def layer_prefix(self, layer: int) -> str:
        """`model.layers.{layer}.self_attn.`, or whatever stands before `layers` here."""
        prefixes = [prefix for prefix, number in self._layer_prefixes() if number == layer]
        if len(prefixes) != 1:
            raise CheckpointError(
                f"{self.folder}: layer {layer} must be there once, as "
                f"model.layers.{layer}.self_attn.*; "
                f"found {prefixes or f'only layers {self.layers}'}"
            )
        return prefixes[0]

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor of that name and shape, of the file's dtype; fp8 comes as float32, scaled."""
        value = self._read_raw(name)
        if value.shape != shape:
            raise CheckpointError(f"{self.folder}: {name} must be {shape}, got {value.shape}")
        if value.dtype != ml_dtypes.float8_e4m3fn:
            return value
        if value.ndim != 2:
            raise CheckpointError(f"{self.folder}: {name} is fp8 but no matrix: {value.shape}")
        scale = self._read_raw(f"{name}_scale_inv")
        blocks = tuple(-(-size // edge) for size, edge in zip(shape, self._block, strict=True))
        if scale.shape != blocks:
            raise CheckpointError(
                f"{self.folder}: {name}_scale_inv must be {blocks} for blocks of {self._block}, "
                f"got {scale.shape}"
            )
        return dequantize_blocks(value, scale, self._block)

    def _find_files(self) -> dict[str, Path]:
        """Which file each tensor is in: as the index says, else as the files' headers do."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {name: self.folder / file for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} has no sound weight_map: {error!r}") from error
        single = self.folder / "model.safetensors"
        paths = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{self.folder} has no model.safetensors and no index of shards")
        return {name: path for path in paths for name in self._header(path)}

    def _layer_prefixes(self) -> set[tuple[str, int]]:
        matches = (_LAYER_PREFIX.match(name) for name in self._files)
        return {(match[0], int(match["layer"])) for match in matches if match}

    def _header(self, path: Path) -> dict[str, Any]:
        if path not in self._headers:
            self._headers[path] = _read_header(path)
        return self._headers[path]

    def _read_raw(self, name: str) -> np.ndarray:
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        path = self._files[name]
        entry = self._header(path).get(name)
        if entry is None:
            raise CheckpointError(f"{path}: tensor {name} is missing, though the index has it")
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} must be one of {', '.join(_DTYPES)}, got {entry['dtype']}"
            )
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        start, end = entry["data_offsets"]
        values = np.fromfile(path, dtype, (end - start) // dtype.itemsize, offset=start)
        return values.reshape(entry["shape"])


def dequantize_blocks(
    weight: np.ndarray, scale_inv: np.ndarray, block: tuple[int, int] = (128, 128)
) -> np.ndarray:
    """weight * its block's factor, float32.

    Args:
        weight: [out, in], fp8.
        scale_inv: [ceil(out / block[0]), ceil(in / block[1])]; DeepSeek's name, yet a multiplier.
        block: rows and columns of a block; the last ones may be ragged.
    """
    rows, columns = weight.shape
    factors = np.repeat(scale_inv.astype(np.float32), block[0], axis=0)[:rows]
    factors = np.repeat(factors, block[1], axis=1)[:, :columns]
    return weight.astype(np.float32) * factors


def _weight_block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """quantization_config.weight_block_size, by default DeepSeek's 128 x 128."""
    quantization = config.get("quantization_config") or text_config(config).get(
        "quantization_config"
    )
    block = (quantization or {}).get("weight_block_size", [128, 128])
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(type(n) is int for n in block)
        and min(block) > 0
    ):
        raise CheckpointError(
            "config.json: quantization_config.weight_block_size must be two positive integers, "
            f"got {block!r}"
        )
    return block[0], block[1]


def _read_header(path: Path) -> dict[str, Any]:
    """name -> {dtype, shape, data_offsets from the start of the file}, as the file's header says.

    The safetensors package checks the file; we read the bytes ourselves, because the package has
    no numpy type for fp8.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a sound safetensors file: {error}") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return header
