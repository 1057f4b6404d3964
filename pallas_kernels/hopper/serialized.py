"""Configs of the kernels as JSON: the static part of a plan in an exported program."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pallas_kernels.hopper.config import KernelConfig, SmLimits
from pallas_kernels.hopper.tuned import CONFIGS


def config_to_json(config: KernelConfig) -> dict[str, Any]:
    """Returns a config as what JSON holds: its kernel, and its fields by name."""
    (kernel,) = (name for name, kind in CONFIGS.items() if kind is type(config))
    return {"kernel": kernel, **dataclasses.asdict(config)}


def config_from_json(stored: Mapping[str, Any]) -> KernelConfig:
    """Returns the config, checked as a new one is.

    Raises ValueError for a kernel or a field that this version does not have, TilePlanError for
    values that the kernel can't have.
    """
    fields = dict(stored)
    kernel = fields.pop("kernel")
    if kernel not in CONFIGS:
        raise ValueError(f"kernel must be one of {', '.join(CONFIGS)}, got {kernel!r}")
    known = {field.name for field in dataclasses.fields(CONFIGS[kernel])}
    if unknown := {*fields} - known:
        raise ValueError(f"a config of {kernel} has no field {', '.join(sorted(unknown))}")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return CONFIGS[kernel](**fields | {"limits": SmLimits(**fields["limits"])})
