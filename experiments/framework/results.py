"""result.json: one schema for all experiments.

Every result has the keys of `SCHEMA`. An experiment may add others at the top level, its headline.
JSON has no NaN or infinity, so that a number that is not finite is null.
"""

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_VERSION = 1
DEEPEST = 32  # levels of nested lists and objects

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
    "files": list,  # names of the other files in the folder
}
ENVIRONMENT: dict[str, type] = {
    "versions": dict,  # of python, mla-jax, jax, jaxlib, numpy; and the commit
    "backend": str,  # "cpu", "gpu", ...
    "devices": list,  # the kind of each device
    "machine": str,
    "cpu_count": int,
}
SESSION: dict[str, type] = {
    "started": str,
    "environment": dict,
    "ceilings": dict,  # rates by name; empty if none was measured
}


def environment() -> dict[str, Any]:
    """Returns the versions and the machine that results are made with."""
    import jax  # imported here, so that an interrupt during it reaches a ready launcher

    packages = ("mla-jax", "jax", "jaxlib", "numpy")
    return {
        "versions": {"python": platform.python_version()}
        | {p: _version(p) for p in packages}
        | {"commit": _commit()},
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count() or 0,
    }


def validate_result(result: dict[str, Any]) -> None:
    """Raises ValueError naming the first key that is missing or does not follow the schema."""
    _check_keys(result, SCHEMA, "")
    check_values(result, "")
    _check_environment(result["environment"], "environment.")
    if result["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {result['schema_version']}")
    for i, row in enumerate(result["rows"]):
        if not isinstance(row, dict):
            raise ValueError(f"rows[{i}] must be a dict, got {short(row)}")
        for column, value in row.items():
            if not isinstance(value, str | int | float | None):
                raise ValueError(f"rows[{i}].{column} must be a scalar, got {short(value)}")
    for i, name in enumerate(result["files"]):
        if not isinstance(name, str):
            raise ValueError(f"files[{i}] must be a name, got {short(name)}")
    sessions = result.get("sessions", [])
    if not isinstance(sessions, list):
        raise ValueError(f"sessions must be a list, got {short(sessions)}")
    for i, session in enumerate(sessions):
        validate_session(session, f"sessions[{i}]")


def validate_session(session: Any, where: str) -> None:
    """Raises ValueError unless this is a session of a benchmark: time, machine and ceilings."""
    if not isinstance(session, dict):
        raise ValueError(f"{where} must be an object, got {short(session)}")
    check_values(session, f"{where}.")
    _check_keys(session, SESSION, f"{where}.")
    _check_environment(session["environment"], f"{where}.environment.")
    if not session["environment"]["devices"]:
        raise ValueError(f"{where}.environment.devices is empty")
    for name, rate in session["ceilings"].items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0:
            raise ValueError(f"{where}.ceilings.{name} must be a number above 0, got {short(rate)}")


def write_result(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Validates and writes a result, whole or not at all; returns it as a reader will find it."""
    found = plain(result)
    validate_result(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(found, indent=2, allow_nan=False) + "\n")
    return found


def write_whole(path: Path, content: str) -> None:
    """Writes a file and flushes it to disk, whole or not at all if the process ends."""
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def short(value: Any) -> str:
    """Returns a value for an error message, at most 80 characters long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, at most 200 characters, or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_environment(found: dict[str, Any], where: str) -> None:
    _check_keys(found, ENVIRONMENT, where)
    for name, version in found["versions"].items():
        if not isinstance(version, str):
            raise ValueError(f"{where}versions.{name} must be a string, got {short(version)}")
    for i, kind in enumerate(found["devices"]):
        if not isinstance(kind, str):
            raise ValueError(f"{where}devices[{i}] must be a string, got {short(kind)}")


def check_values(value: Any, where: str, depth: int = DEEPEST) -> None:
    """Raises ValueError for a value that a reader could not show or that JSON does not have."""
    where = where.removesuffix(".")
    if isinstance(value, dict | list):
        if depth == 0:
            raise ValueError(f"{where[:80]} is nested more than {DEEPEST} deep")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_values(key, f"a key of {where}", 1)
            check_values(item, f"{where}.{key}" if where else str(key), depth - 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} must be finite or null, got {value}")
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            raise ValueError(f"{where} must be an integer of 64 bits, got {len(str(value))} digits")
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} holds half a character: {error.reason}") from error


def _check_keys(found: dict[str, Any], wanted: dict[str, type], where: str) -> None:
    for key, kind in wanted.items():
        if key not in found:
            raise ValueError(f"{where}{key} is missing")
        if type(found[key]) is not kind:
            raise ValueError(
                f"{where}{key} must be of type {kind.__name__}, got {short(found[key])}"
            )


def plain(value: Any) -> Any:
    """Converts a value to JSON's types."""
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


@functools.cache
def _commit() -> str:
    """Returns the commit of the checkout, "+" where files differ from it, or "unknown".

    The variable MLA_JAX_COMMIT says it where it is set, for a copy of a checkout on another
    machine. A repository around the checkout does not count.
    """
    if os.environ.get("MLA_JAX_COMMIT"):
        return os.environ["MLA_JAX_COMMIT"]
    command = ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    try:
        if not (ROOT / ".git").exists():
            raise FileNotFoundError(ROOT / ".git")
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
