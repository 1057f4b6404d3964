"""Reads the JSON files of a checkpoint and finds the language model's part of a config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The keys under which multimodal models store the config of their language model.
WRAPPERS = ("text_config", "language_config", "llm_config")


class CheckpointError(ValueError):
    """Raised for a checkpoint that can't be read as its config.json describes it."""


def shown(value: Any) -> str:
    """Returns a value for an error message, at most 60 characters long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python refuses huge integers and deep nesting
        text = f"a {type(value).__name__} that is too long to print"
    return excerpt(text, 60)


def excerpt(text: object, length: int = 200) -> str:
    """Returns the first `length` characters of a text from a file or from a library's error."""
    text = str(text)
    return text if len(text) <= length else text[: length - 3] + "..."


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file; raises CheckpointError naming the file if it has none."""
    try:
        return parse_json_object(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Parses a JSON object; raises ValueError unless the text is one, with unique keys."""
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {excerpt(error)}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"must hold a JSON object, got {type(raw).__name__}")
    return raw


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of key and value pairs; raises ValueError for a key that occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} occurs twice in one object")
    return found


def config_json_path(path: str | Path) -> Path:
    """Returns the path of a config.json, given the file or its folder.

    Raises FileNotFoundError if there is none, CheckpointError if it is not a file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = path / "config.json"
        found = path.exists()
    except (OSError, ValueError):  # the operating system refuses the name
        found = False
    if not found:
        raise FileNotFoundError(f"no config.json at {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} must be a file")
    return path


def language_model_config(
    raw: Mapping[str, Any], where: str
) -> tuple[Mapping[str, Any], list[tuple[str, Mapping[str, Any]]]]:
    """Returns the language model's part of a config, and the objects that enclose it.

    Args:
        raw: the dict of a config.json. The part may be nested under several of WRAPPERS.
        where: the name of the config in error messages.

    Returns:
        The innermost dict, and from the outside inwards pairs of a wrapper's key and the dict that
        has this key.

    Raises CheckpointError for a wrapper that is not an object, and for two wrappers that differ.
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
