"""Reads tensors by name from a published checkpoint folder, without reading whole files.

A folder holds either one `model.safetensors` or shards with `model.safetensors.index.json`.
DeepSeek-V3 and R1 store matrices as float8 e4m3, with one float32 factor per block of 128 x 128 in
a second tensor, `weight_scale_inv`. A value is its fp8 value times the factor of its block. The
last blocks of a matrix may be smaller.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from mla_jax.checkpoints.config_json import (
    CheckpointError,
    config_json_path,
    excerpt,
    language_model_config,
    read_json_object,
    shown,
)
from mla_jax.checkpoints.files import DTYPES, INDEX, Entry, TensorFile, read_index

__all__ = ["Checkpoint", "CheckpointError", "dequantize_blocks"]

# A layer of multi-head latent attention has a tensor with one of these names. Image encoders and
# layers of other attention also call theirs self_attn, but have none of them.
_MLA_LAYER = re.compile(
    r"(?P<prefix>(?P<stem>(?:.*\.)?)layers\.(?P<layer>[0-9]+)\.self_attn\.)"
    r"(?:kv_a_proj_with_mqa|kv_a_layernorm|kv_b_proj|q_a_proj|q_a_layernorm|q_b_proj)\.",
    re.DOTALL,
)

# The names of tensors that quantization libraries store beside or instead of a matrix's `weight`.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_(?!scale_inv$)\w+|weight\..+)|[._](blocks|scales)"
)
# Tensors that may accompany the weights without changing them: scales of activations, scales of an
# fp8 cache, and a table of frequencies.
_HARMLESS = re.compile(r"(^|\.)(input_scale|activation_scale|[qkv]_scale|rotary_emb\.inv_freq)$")

# A table is faster than a cast.
_FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Checkpoint:
    """A folder of safetensors files; opening it reads no tensor.

    Raises FileNotFoundError if the folder or its config.json is missing. Raises CheckpointError
    naming the file or tensor that is missing, corrupt, or of a wrong shape or dtype.
    """

    def __init__(self, folder: str | Path) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"folder must be a path, got {shown(folder)}")
        self.folder = Path(folder)
        self.config_path = config_json_path(self.folder)
        if self.config_path == self.folder:
            raise CheckpointError(f"folder must be the folder of a checkpoint, {folder} is a file")
        self.config = read_json_object(self.config_path)
        self._quantization = self._find_quantization()
        self._opened: dict[Path, TensorFile] = {}
        self._twice: dict[str, Path] = {}
        self._files = self._find_files()
        self._layers = self._find_layers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._opened.values():
            file.close()

    @property
    def files(self) -> Mapping[str, Path]:
        """The file of each tensor, by the tensor's name."""
        return self._files

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers with multi-head latent attention, in ascending order."""
        return sorted({layer for _, layer in self._layers.values()})

    def layer_prefix(self, layer: int | None = None, prefix: str | None = None) -> str:
        """Returns the part of the tensor names before a layer's own, `model.layers.3.self_attn.`.

        Args:
            layer: number of the layer; None selects the lowest in the folder.
            prefix: chooses a model if several have that layer: "model." or all of
                "model.layers.3.self_attn.".

        Raises CheckpointError unless exactly one layer fits.
        """
        found = self._layers
        if prefix is not None:
            wanted = prefix.removesuffix(".")
            found = {
                full: (stem, number)
                for full, (stem, number) in found.items()
                if wanted in (full.removesuffix("."), stem.removesuffix("."))
            }
            if not found:
                stems = sorted({stem for stem, _ in self._layers.values()})
                raise CheckpointError(
                    f"{self.folder}: prefix must be one of {', '.join(map(shown, stems))}, "
                    f"got {shown(prefix)}"
                )
        numbers = sorted({number for _, number in found.values()})
        if layer is None:
            layer = min(numbers, default=0)
        prefixes = [full for full, (_, number) in found.items() if number == layer]
        if len(prefixes) != 1:
            listed = f"{prefixes}: choose one by prefix" if prefixes else f"only layers {numbers}"
            raise CheckpointError(
                f"{self.folder}: layer {shown(layer)} must exist once, as "
                f"model.layers.{shown(layer)}.self_attn.* with kv_a_proj_with_mqa; found {listed}"
            )
        return prefixes[0]

    def check_names(self, prefix: str, names: Iterable[str]) -> None:
        """Raises CheckpointError if the layer lacks one of these tensors or has unknown others."""
        names = list(names)
        here = [name.removeprefix(prefix) for name in self._files if name.startswith(prefix)]
        modules = {name.rpartition(".")[0] for name in names}
        for module in sorted(modules):
            stored = [
                name
                for name in here
                if name.startswith(module) and _QUANTISED.fullmatch(name, len(module))
            ]
            if stored:
                listed = excerpt(", ".join(sorted(stored)))
                raise CheckpointError(
                    f"{self.folder}: {prefix}{module} is quantised as {listed}, which is not "
                    f"supported{self._quantisation_name()}"
                )
        for name in names:
            self._file(prefix + name)
        known = {*names, *(f"{name}_scale_inv" for name in names)}
        others = sorted(name for name in here if name not in known and not _HARMLESS.search(name))
        if others:
            listed = excerpt(", ".join(others))
            raise CheckpointError(
                f"{self.folder}: {prefix}* holds tensors that its config.json does not ask for: "
                f"{listed}"
            )

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError unless the tensor of that name has that shape and can be read.

        Only the header of its file is read, and that of its scale's file if it is fp8.
        """
        entry = self._entry(name)
        if entry.shape != shape:
            raise CheckpointError(f"{self.folder}: {name} must be {shape}, got {entry.shape}")
        scale_name = f"{name}_scale_inv"
        if entry.dtype != ml_dtypes.float8_e4m3fn:
            if scale_name in self._files:
                raise CheckpointError(
                    f"{self.folder}: {name} must be fp8, because {scale_name} exists, "
                    f"got {entry.dtype}"
                )
            return
        if len(shape) != 2:
            raise CheckpointError(f"{self.folder}: {name} is fp8 but not a matrix: {shape}")
        block = self._weight_block_size()
        scale = self._entry(scale_name)
        blocks = tuple(-(-size // edge) for size, edge in zip(shape, block, strict=True))
        if scale.shape != blocks:
            raise CheckpointError(
                f"{self.folder}: {scale_name} must be {blocks} for blocks of {block}, "
                f"got {scale.shape}"
            )
        if scale.dtype == ml_dtypes.float8_e4m3fn:
            raise CheckpointError(f"{self.folder}: {scale_name} must be wider than fp8")

    def place(self, name: str) -> tuple[str, int, int]:
        """Returns the file of a tensor, its first byte there, and its number of bytes."""
        path, entry = self._file(name), self._entry(name)
        return str(path), entry.start, entry.size

    def read(self, name: str, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        """Reads a range per dim of a tensor that was checked, in the file's dtype.

        A fp8 matrix is multiplied by its factors and returned as float32. NaN and infinity are
        values like any others.
        """
        value = self._read_raw(name, ranges)
        if value.dtype != ml_dtypes.float8_e4m3fn:
            return value
        scale_name = f"{name}_scale_inv"
        scale = self._read_raw(scale_name, [(0, n) for n in self._entry(scale_name).shape])
        (row, _), (column, _) = ranges
        return dequantize_blocks(value, scale, self._weight_block_size(), (row, column))

    def _find_files(self) -> dict[str, Path]:
        """Returns the file of each tensor, from the index or else from the headers of the files."""
        index = self.folder / INDEX
        if os.path.lexists(index):
            return read_index(index)
        single = self.folder / "model.safetensors"
        paths = [single] if os.path.lexists(single) else sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{self.folder} has no model.safetensors and no index of shards")
        files: dict[str, Path] = {}
        for path in paths:
            for name in self._tensors(path).header:
                if files.setdefault(name, path) != path:
                    self._twice[name] = path
        return files

    def _find_layers(self) -> dict[str, tuple[str, int]]:
        """Returns, per prefix of tensors, the part before `layers` and the layer's number."""
        layers = {}
        for name in self._files:
            match = _MLA_LAYER.match(name)
            if match is None:
                continue
            if len(match["layer"]) > 9:
                raise CheckpointError(
                    f"{self.folder}: tensor {shown(name)} has a layer number of "
                    f"{len(match['layer'])} digits"
                )
            layers[match["prefix"]] = match["stem"], int(match["layer"])
        return layers

    def _tensors(self, path: Path) -> TensorFile:
        if path not in self._opened:
            self._opened[path] = TensorFile(path)
        return self._opened[path]

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is missing{self._quantisation_name()}"
            )
        if name in self._twice:
            raise CheckpointError(
                f"tensor {name} is in {self._files[name]} and in {self._twice[name]}, "
                f"and no {INDEX} says which to read"
            )
        return self._files[name]

    def _entry(self, name: str) -> Entry:
        path = self._file(name)
        raw = self._tensors(path).header.get(name)
        if raw is None:
            raise CheckpointError(f"{path}: tensor {name} is missing, though the index has it")
        if raw["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} must be one of {', '.join(DTYPES)}, got {raw['dtype']}"
                + self._quantisation_name()
            )
        start, end = raw["data_offsets"]
        return Entry(np.dtype(DTYPES[raw["dtype"]]), tuple(raw["shape"]), start, end - start)

    def _read_raw(self, name: str, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        path, entry = self._file(name), self._entry(name)
        try:
            return self._tensors(path).read(entry, ranges)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {name} can't be read: {error}") from error

    def _find_quantization(self) -> Mapping[str, Any]:
        """Returns the quantization_config of config.json, or of its language model's part.

        The values are only checked when a quantized tensor is read.
        """
        inner, around = language_model_config(self.config, str(self.config_path))
        levels = [outer for _, outer in around] + [inner]
        found = [level["quantization_config"] for level in levels if "quantization_config" in level]
        found = [value for value in found if value is not None]
        if not found:
            return {}
        if any(value != found[0] for value in found):
            raise CheckpointError(f"{self.config_path}: two quantization_config differ")
        if not isinstance(found[0], Mapping):
            raise CheckpointError(
                f"{self.config_path}: quantization_config must be an object, got {shown(found[0])}"
            )
        return found[0]

    def _quantisation_name(self) -> str:
        """Returns the quantization method of config.json, as the end of an error message."""
        method = self._quantization.get("quant_method")
        return "" if method is None else f" (quantization_config.quant_method: {shown(method)})"

    def _weight_block_size(self) -> tuple[int, int]:
        """Returns the rows and columns that share a factor, by default DeepSeek's 128 x 128."""
        quantization = self._quantization
        where = f"{self.config_path}: quantization_config"
        method = quantization.get("quant_method", "fp8")
        if method != "fp8":
            raise CheckpointError(f"{where}.quant_method must be 'fp8', got {shown(method)}")
        block = quantization.get("weight_block_size", [128, 128])
        if not (
            isinstance(block, list)
            and len(block) == 2
            and all(type(n) is int and 0 < n < 2**31 for n in block)
        ):
            raise CheckpointError(
                f"{where}.weight_block_size must be two positive integers, got {shown(block)}"
            )
        return block[0], block[1]


def dequantize_blocks(
    weight: np.ndarray,
    scale_inv: np.ndarray,
    block: tuple[int, int] = (128, 128),
    origin: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """Returns weight times the factor of its block, float32.

    Args:
        weight: [out, in], fp8; a matrix or a box of one.
        scale_inv: [ceil(out / block[0]), ceil(in / block[1])] factors of the matrix. Despite
            DeepSeek's name, the weight is multiplied by them.
        block: rows and columns of a block; the last blocks may be smaller.
        origin: the row and the column of the matrix at which the box begins.
    """
    (first, column), (edge, width) = origin, block
    scaled = _FP8_VALUES[weight.view(np.uint8)]
    columns = np.arange(column, column + weight.shape[1]) // width
    for i in range(first // edge, -(-(first + len(weight)) // edge)):
        rows = slice(max(i * edge - first, 0), (i + 1) * edge - first)
        scaled[rows] *= scale_inv[i].astype(np.float32)[columns]
    return scaled
