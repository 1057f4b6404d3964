"""Checks of the fields of a config, and how a frozen dataclass stores what they return."""

import math
from typing import Any

import numpy as np

from mla_jax import checks
from mla_jax.checkpoints.config_json import shown


def store_field(instance: Any, name: str, value: Any) -> None:
    """Sets a field of a frozen dataclass; only for __post_init__."""
    object.__setattr__(instance, name, value)


def bounded_number(name: str, value: Any, kind: str, low: float, high: float) -> float:
    """Returns the value as a Python float in low .. high.

    Within these bounds frequencies, temperatures and the softmax scale are normal float32 numbers.
    """
    try:
        number = checks.require_number(name, value)
    except TypeError:
        raise TypeError(f"{name} must be {kind}, got {shown(value)}") from None
    except ValueError:  # NaN or infinity
        number = math.nan
    if not low <= number <= high:
        raise ValueError(
            f"{name} must be {kind}, got {shown(value)}, which is not in {low:g} .. {high:g}"
        )
    return number


def positive_int(name: str, value: Any) -> int:
    """Returns the value as a Python int that fits int32."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be a positive integer, got {shown(value)}")
    if not 0 < value < 2**31:
        limit = "" if value <= 0 else ", which is not below 2^31"
        raise ValueError(f"{name} must be a positive integer, got {shown(value)}{limit}")
    return int(value)
