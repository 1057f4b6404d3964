"""Reads JSON files of a checkpoint, and finds the language model's part of a config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Under which keys multimodal models keep the config of their language model.
WRAPPERS = ("text_config", "language_config", "llm_config")


class CheckpointError(ValueError):
    """A checkpoint that can't be read as what its config.json describes."""


def shown(value: Any) -> str:
    """A value in an error message: at most 60 characters, whatever a file holds."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits, or deeper, than Python prints
        text = f"a {type(value).__name__} that is too long to print"
    return excerpt(text, 60)


def excerpt(text: object, length: int = 200) -> str:
    """The first characters of a text that a file, or a library's error, made."""
    text = str(text)
    return text if len(text) <= length else text[: length - 3] + "..."


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file unless it holds one."""
    try:
        return parse_json_object(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error


def parse_json_object(text: bytes) -> dict[str, Any]:
    """The JSON object in a text. Raises ValueError unless it is one, of unique keys."""
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {excerpt(error)}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"must hold a JSON object, got {type(raw).__name__}")
    return raw


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a key that is there twice, of which readers take either."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice in one object")
    return found


def config_json_path(path: str | Path) -> Path:
    """Where a config.json is, given the file or its folder; raises FileNotFoundError without."""
    path = Path(path)
    try:
        if path.is_dir():
            path = path / "config.json"
        found = path.exists()
    except (OSError, ValueError):  # a name that no file system takes
        found = False
    if not found:
        raise FileNotFoundError(f"no config.json at {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} must be a file")
    return path


def language_model_config(
    raw: Mapping[str, Any], where: str
) -> tuple[Mapping[str, Any], list[tuple[str, Mapping[str, Any]]]]:
    """The language model's part of a config, and what encloses it.

    Args:
        raw: a config.json's dict; the part may be inside of WRAPPERS, also of several.
        where: what the config is called in errors.

    Returns:
        The innermost dict, and from the outside in (the wrapper's key, the dict that has it).

    Raises CheckpointError for a wrapper that is no object, and for two that differ.
    """
    around: list[tuple[str, Mapping[str, Any]]] = []
    while True:
        inside = {key: raw[key] for key in WRAPPERS if raw.get(key) not in (None, {})}
        if not inside:
            return raw, around
        for key, value in inside.items():
            if not isinstance(value, Mapping):
                raise CheckpointError(f"{where}: {key} must be an object, got {shown(value)}")
        key, value = next(iter(inside.items()))
        if any(other != value for other in inside.values()):
            raise CheckpointError(
                f"{where}: {' and '.join(inside)} differ, and either may be the language model's"
            )
        if len(around) == 8:
            raise CheckpointError(f"{where}: {key} is nested more than 8 times")
        around.append((key, raw))
        raw = value
