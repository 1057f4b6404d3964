"""Reads the rotary embedding of a config.json: `rope_scaling` or the newer `rope_parameters`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mla_jax.checkpoints.config_json import WRAPPERS, excerpt, shown
from mla_jax.config.yarn import YarnScaling

_ROPE_KEYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"})
_ROPE_KEYS |= {"original_max_position_embeddings"}
_YARN_KEYS = frozenset(field.name for field in dataclasses.fields(YarnScaling))


def rope_from_hf(raw: Mapping[str, Any], max_position: int) -> tuple[Any, YarnScaling | None]:
    """Returns (rope_theta, scaling) of a config dict.

    As in `transformers`, a non-empty `rope_scaling` takes precedence over `rope_parameters`, and a
    rope_theta inside of them over one beside them.
    """
    given = [key for key in ("rope_scaling", "rope_parameters") if raw.get(key) not in (None, {})]
    name = given[0] if given else "rope_scaling"
    rope = raw[name] if given else {}
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        raise ValueError(f"{name} must be flat, an object of numbers, got {shown(rope)}")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    for where in (rope, raw):
        share = where.get("partial_rotary_factor")
        if share is not None and (isinstance(share, bool) or share != 1):
            raise ValueError(f"partial_rotary_factor must be absent or 1, got {shown(share)}")
    kinds = [rope[key] for key in ("rope_type", "type") if key in rope]
    for kind in kinds:
        if not isinstance(kind, str) or kind not in ("default", "yarn"):
            raise ValueError(f"rope type must be 'default' or 'yarn', got {shown(kind)} in {name}")
    if len(set(kinds)) == 2:
        raise ValueError(f"{name}.rope_type and {name}.type differ")
    is_yarn = "yarn" in kinds
    known = _ROPE_KEYS | _YARN_KEYS if is_yarn else _ROPE_KEYS
    for key, value in rope.items():
        if key not in known and value is not None:
            raise ValueError(
                f"{name}.{excerpt(key, 60)} = {shown(value)} is not known for rope type "
                f"{'yarn' if is_yarn else 'default'}"
                + ("" if kinds else f" ({name}.rope_type is missing)")
            )
    if not is_yarn:
        return theta, None
    original = raw.get(
        "original_max_position_embeddings",
        rope.get("original_max_position_embeddings", max_position),
    )
    numbers: dict[str, Any] = {
        key: rope[key] for key in _YARN_KEYS & rope.keys() if rope[key] is not None
    }
    numbers["factor"] = required(rope, "factor", f"{name}.factor")
    return theta, YarnScaling(**numbers | {"original_max_position_embeddings": original})


def required(raw: Mapping[str, Any], key: str, name: str | None = None) -> Any:
    """Returns raw[key]; raises ValueError that says where else the key may be."""
    if key in raw:
        return raw[key]
    nested = [k for k, v in raw.items() if isinstance(v, Mapping) and "kv_lora_rank" in v]
    where = f"; is it in {excerpt(', '.join(map(str, nested)))}? Known are {', '.join(WRAPPERS)}"
    raise ValueError(f"{name or key} is missing" + (where if nested else ""))
