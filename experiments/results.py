"""result.json: one schema for all experiments.

Every result holds the keys of `SCHEMA`; an experiment may add others at the top level (`errors`,
`steps`, ...), its headline. JSON has no NaN or infinity: a number that isn't finite is null.
"""

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

SCHEMA_VERSION = 1

SCHEMA: dict[str, type] = {
    "schema_version": int,
    "experiment": str,
    "passed": bool,
    "summary": str,  # the verdict in a sentence
    "started": str,  # ISO 8601, UTC
    "duration_s": float,
    "options": dict,  # every flag of the experiment
    "environment": dict,  # ENVIRONMENT
    "rows": list,  # the table: dicts of scalars
    "files": list,  # what stands beside result.json
}
ENVIRONMENT: dict[str, type] = {
    "versions": dict,  # of python, mla-jax, jax, jaxlib, numpy
    "backend": str,  # "cpu", "gpu", ...
    "devices": list,  # the kind of each
    "machine": str,
    "cpu_count": int,
}


def environment() -> dict[str, Any]:
    """What the numbers were made with."""
    packages = ("mla-jax", "jax", "jaxlib", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count() or 0,
    }


def validate_result(result: dict[str, Any]) -> None:
    """Raises ValueError naming the key that is missing, or not what the schema says."""
    _check_keys(result, SCHEMA, "")
    _check_keys(result["environment"], ENVIRONMENT, "environment.")
    if result["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {result['schema_version']}")
    for i, row in enumerate(result["rows"]):
        if not isinstance(row, dict):
            raise ValueError(f"rows[{i}] must be a dict, got {row!r}")
        for column, value in row.items():
            if not isinstance(value, str | int | float | None):
                raise ValueError(f"rows[{i}].{column} must be a scalar, got {value!r}")


def write_result(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Validates, writes (whole or not at all) and returns the result as a reader will find it."""
    found = plain(result)
    validate_result(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)
    return found


def _check_keys(found: dict[str, Any], wanted: dict[str, type], where: str) -> None:
    for key, kind in wanted.items():
        if key not in found:
            raise ValueError(f"{where}{key} is missing")
        if type(found[key]) is not kind:
            raise ValueError(f"{where}{key} must be of type {kind.__name__}, got {found[key]!r}")


def plain(value: Any) -> Any:
    """The value in JSON's types."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
