"""The files of a checkpoint folder: the index of shards, and safetensors files."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from mla_jax.checkpoints.config_json import (
    CheckpointError,
    excerpt,
    parse_json_object,
    shown,
)

INDEX = "model.safetensors.index.json"

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # the first byte, from the start of the file
    size: int  # bytes


class TensorFile:
    """A safetensors file. Its header is read at once; the file is opened at the first `read`.

    Raises CheckpointError naming the file if it is missing or not sound.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self.header = _read_header(path)

    def read(self, entry: Entry, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        """Reads a range per dim of a tensor, and nothing else of the file.

        Raises OSError or ValueError if the file is shorter than its header says.
        """
        if self._file is None:
            self._file = FileIO(self._path)
        shape = tuple(high - low for low, high in ranges)
        low, high = ranges[0] if ranges else (0, 1)
        row = math.prod(entry.shape[1:])
        if all(span == (0, n) for span, n in zip(ranges[1:], entry.shape[1:], strict=True)):
            return self._values(entry, low * row, (high - low) * row).reshape(shape)
        [(first, last)] = ranges[1:]
        found = np.empty(shape, entry.dtype)
        for i in range(high - low):
            found[i] = self._values(entry, (low + i) * row + first, last - first)
        return found

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _values(self, entry: Entry, first: int, count: int) -> np.ndarray:
        """Returns `count` values of a tensor in the order of the file, from its value `first`."""
        assert self._file is not None
        self._file.seek(entry.start + first * entry.dtype.itemsize)
        values = np.fromfile(self._file, entry.dtype, count)
        if len(values) < count:
            raise ValueError("the file ends before the tensor does")
        return values


def read_index(index: Path) -> dict[str, Path]:
    """Reads the weight_map of an index: the file of each tensor, inside the index's folder.

    A file may be a symbolic link out of the folder, as in the cache of Hugging Face.
    """
    try:
        weight_map = parse_json_object(index.read_bytes()).get("weight_map")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} has no sound weight_map: {error}") from error
    if not isinstance(weight_map, Mapping):
        raise CheckpointError(f"{index} has no sound weight_map: it is {shown(weight_map)}")
    paths: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{index} has no sound weight_map: {shown(name)} is in {shown(file)}"
            )
        if file not in paths:
            if not _is_inside(file):
                raise CheckpointError(
                    f"{index}: weight_map puts {shown(name)} in {shown(file)}, "
                    "which does not name a file in this folder"
                )
            paths[file] = index.parent / file
    return {name: paths[file] for name, file in weight_map.items()}


def _is_inside(file: str) -> bool:
    """Returns whether a relative path stays below its folder on any operating system."""
    return (
        file.isprintable()
        and not re.search(r'[\\:*?"<>|]', file)
        and not PurePosixPath(file).is_absolute()
        and all(
            part not in ("", ".", "..") and len(part.encode()) <= 255 for part in file.split("/")
        )
        and len(file.encode()) <= 1024
    )


def _read_header(path: Path) -> dict[str, Any]:
    """Returns name -> {dtype, shape, data_offsets from the start of the file} of a file's header.

    The safetensors package checks the file. The tensors are read without it, because it has no
    numpy dtype for fp8.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json_object(file.read(length))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a sound safetensors file: {excerpt(error)}"
        ) from error
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return header
