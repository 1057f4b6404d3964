"""Writes layers into a checkpoint folder; a crash leaves either the old layers or the new ones."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mla_jax.checkpoints.config_json import config_json_path, read_json_object
from mla_jax.checkpoints.files import INDEX
from mla_jax.checkpoints.read import Checkpoint
from mla_jax.config import MLAConfig, config_from_json

_SINGLE = "model.safetensors"
_OWN_FILE = re.compile(r"model(-layer-[0-9]+)?\.safetensors")
_OWN_TENSOR = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.self_attn\.[a-z_.]+")


def write_layer(
    folder: Path, config: MLAConfig, layer: int, tensors: Mapping[str, np.ndarray]
) -> None:
    """Adds or replaces one layer.

    Args:
        folder: created if it does not exist.
        config: must equal that of the folder's config.json if there is one, which is then kept.
        layer: number of the layer.
        tensors: by their names below `model.layers.{layer}.self_attn.`.

    Raises ValueError or FileExistsError before anything is written.
    """
    texts = {}
    if not os.path.lexists(folder / "config.json"):
        texts["config.json"] = _json(config.to_hf())
    files = _present(folder, config)

    prefix = f"model.layers.{layer}.self_attn."
    kept = {name: file for name, file in files.items() if not name.startswith(prefix)}
    before = {file for name, file in files.items() if name.startswith(prefix)}
    shared = set(kept.values())
    if not kept:
        target = _SINGLE
    elif len(before) == 1 and before.isdisjoint(shared):
        [target] = before
    else:
        target = f"model-layer-{layer:05}.safetensors"
    if target in shared:
        raise FileExistsError(f"{folder / target}: this file holds another layer already")
    named = {prefix + name: value for name, value in tensors.items()}
    if kept or os.path.lexists(folder / INDEX):
        weight_map = dict(sorted((kept | dict.fromkeys(named, target)).items()))
        texts[INDEX] = _json({"metadata": {}, "weight_map": weight_map})
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder, texts, target, named)


def _present(folder: Path, config: MLAConfig) -> dict[str, str]:
    """Returns the file of each tensor in the folder, by the tensor's name.

    Raises ValueError or FileExistsError if the folder has another config or files that this module
    did not write.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise FileExistsError(f"folder must be a folder or not exist yet, {folder} is a file")
    there = [*folder.glob("*.safetensors"), *folder.glob(f"*{INDEX.removeprefix('model')}")]
    if not os.path.lexists(folder / "config.json"):
        if there:
            raise FileExistsError(f"{there[0]}: the folder has weights but no config.json")
        return {}
    path = config_json_path(folder)
    found = config_from_json(read_json_object(path), str(path))
    for field in dataclasses.fields(MLAConfig):
        one, other = getattr(found, field.name), getattr(config, field.name)
        if one != other:
            raise ValueError(
                f"config must be that of {path}, where {field.name} is {one}, got {other}"
            )
    if not there:
        return {}
    files = {
        name: file.relative_to(folder).as_posix() for name, file in Checkpoint(folder).files.items()
    }
    for name, file in files.items():
        if not _OWN_FILE.fullmatch(file):
            raise FileExistsError(
                f"{folder}: a sharded checkpoint is here already, with {file}, "
                "which save_hf did not write"
            )
        if not _OWN_TENSOR.fullmatch(name):
            raise FileExistsError(f"{folder / file}: {name} is here, which save_hf did not write")
    return files


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _replace(
    folder: Path, texts: Mapping[str, str], target: str, tensors: dict[str, np.ndarray]
) -> None:
    """Writes all files under temporary names and then renames them, the index last."""
    names = [*(name for name in texts if name != INDEX), target]
    names += [INDEX] if INDEX in texts else []
    new = {name: folder / f".{name}.{os.getpid()}.tmp" for name in names}
    try:
        for name, path in new.items():
            if name == target:
                save_file(tensors, path, metadata={"format": "np"})
            else:
                path.write_text(texts[name], encoding="utf-8")
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for name, path in new.items():
            os.replace(path, folder / name)
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)
