"""The config of one MLA layer, `MLAConfig`, as a config.json, and of published models."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla_jax import checks
from mla_jax.checkpoints.config_json import (
    CheckpointError,
    config_json_path,
    language_model_config,
    read_json_object,
    shown,
)
from mla_jax.checkpoints.config_keys import READ, foreign_keys, foreign_shapes
from mla_jax.config.fields import bounded_number, positive_int, store_field
from mla_jax.config.rope_json import required, rope_from_hf
from mla_jax.config.yarn import YarnScaling

# The model types whose attention is that of DeepSeek-V2 or V3, each with a golden file. Their codes
# rotate interleaved pairs unless `rope_interleave` is False; DeepSeek-V2's reads no such key.
# Kimi-K2 is published with V3's code, Moonlight as deepseek_v3, GLM-4.7-Flash as glm4_moe_lite.
MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "youtu", "axk1")

# How latent attention of other model types differs, as clauses of an error message.
OTHER_MODEL_TYPES = {
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa", "mistral_large4", "axk2", "hy_v4"),
        "attends only to the keys that an indexer selects",
    ),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), "has layers of linear attention"),
    "mistral4": "multiplies a query by a factor that depends on its position",
    "longcat_flash": "has two attentions in a layer and scales queries and latents",
}


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """The shape and numerics of one MLA layer; immutable and hashable, so jit takes it as static.

    With `q_lora_rank=None` queries are projected straight from the hidden state (DeepSeek-V2-Lite).
    `rope_interleave` rotates the pairs (0, 1), (2, 3), ...; False rotates (i, i + rope / 2).
    `rms_norm_eps` belongs to the two latent norms. The published code fixes it at 1e-6, and so does
    `from_hf`. The key of that name in config.json is for the norms around the layer.
    `attention_bias` adds a bias to the two down-projections and to the output.
    `num_hidden_layers` only says how many such layers the model has.

    Integers and floats may be numpy's; they are stored as Python's. Raises TypeError or ValueError
    that names the invalid field.
    """

    hidden_size: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    rope_scaling: YarnScaling | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    num_hidden_layers: int = 1
    attention_bias: bool = False

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
            "num_hidden_layers",
        ):
            store_field(self, name, positive_int(name, getattr(self, name)))
        if self.q_lora_rank is not None:
            store_field(self, "q_lora_rank", positive_int("q_lora_rank", self.q_lora_rank))
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        for name, kind, low, high in (
            ("rope_theta", "a number above 1", math.nextafter(1, 2), 1e30),
            ("rms_norm_eps", "a positive number", 1e-30, 1.0),
        ):
            store_field(self, name, bounded_number(name, getattr(self, name), kind, low, high))
        for name in ("rope_interleave", "attention_bias"):
            store_field(self, name, checks.require_bool(name, getattr(self, name)))
        if not isinstance(self.rope_scaling, YarnScaling | None):
            raise TypeError(
                f"rope_scaling must be a YarnScaling or None, got {shown(self.rope_scaling)}"
            )

    @property
    def qk_head_dim(self) -> int:
        """Values per query or key head before absorption: nope + rope, 192 for DeepSeek."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values per cache row [c_kv | k_rope] and per absorbed query head, 576 for DeepSeek."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times YaRN's mscale squared if the config has `mscale_all_dim`.

        The width is that of the expanded head (192), not of the latent (576).
        """
        mscale = self.rope_scaling.softmax_mscale if self.rope_scaling else 1.0
        return self.qk_head_dim**-0.5 * mscale**2

    def shard(self, tensor_parallel: int) -> "MLAConfig":
        """Returns the config of one tensor-parallel shard, which has an equal share of the heads.

        Raises ValueError if the heads can't be divided equally.
        """
        tensor_parallel = checks.require_positive("tensor_parallel", tensor_parallel)
        if self.num_heads % tensor_parallel:
            raise ValueError(
                f"tensor_parallel must divide num_heads = {self.num_heads}, got {tensor_parallel}"
            )
        return dataclasses.replace(self, num_heads=self.num_heads // tensor_parallel)

    @staticmethod
    def preset(name: str) -> "MLAConfig":
        """Returns a published model's config by name, such as "deepseek-v3"; see `PRESETS`."""
        checks.require_one_of("name", name, tuple(PRESETS))
        return PRESETS[name]

    @staticmethod
    def from_hf(source: str | Path | Mapping[str, Any]) -> "MLAConfig":
        """Reads a published config from a config.json, from its folder, or from its dict.

        Accepts `rope_scaling` and the newer `rope_parameters`. Both may be nested in a
        `text_config`, `language_config` or `llm_config`.

        Raises:
            FileNotFoundError: no config.json.
            CheckpointError (a ValueError): the file is not JSON, or a key is missing or malformed,
                or asks for what this library does not compute. Examples are a model type that is
                not in `MODEL_TYPES`, another rope type, sparse attention and a sliding window; see
                `config_keys`. The message names the file and the key.
        """
        if isinstance(source, Mapping):
            return config_from_json(source, "config.json")
        if not isinstance(source, str | os.PathLike):
            raise TypeError(
                f"source must be a path or the dict of a config.json, got {shown(source)}"
            )
        path = config_json_path(source)
        return config_from_json(read_json_object(path), str(path))

    def to_hf(self) -> dict[str, Any]:
        """Returns the dict of a config.json that `from_hf` and `transformers` read as this config.

        Raises ValueError for a `rms_norm_eps` that the published format can't express.
        """
        if self.rms_norm_eps != 1e-6:
            raise ValueError(
                f"rms_norm_eps of the latent norms is 1e-6 in the published format, "
                f"got {self.rms_norm_eps}"
            )
        rope_scaling = None
        if self.rope_scaling is not None:
            given = dataclasses.asdict(self.rope_scaling).items()
            rope_scaling = {"type": "yarn"} | {k: v for k, v in given if v is not None}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope_scaling,
            "rope_interleave": self.rope_interleave,
            "attention_bias": self.attention_bias,
        }


def config_from_json(raw: Mapping[str, Any], where: str) -> MLAConfig:
    """Reads the dict of a config.json as `MLAConfig.from_hf` does; errors call the file `where`."""
    inner, around = language_model_config(raw, where)
    levels = [outer for _, outer in around] + [inner]
    foreign = [key for level in levels for key in foreign_keys(level)]
    model_type = inner.get("model_type", "deepseek_v3")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        why = OTHER_MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
        raise CheckpointError(
            f"{where}: model_type must be one of {', '.join(MODEL_TYPES)}, got {shown(model_type)}"
            + (f", which {why}" if why else "")
            + (f" (with {_list(foreign)})" if foreign else "")
        )
    if foreign:
        raise CheckpointError(
            f"{where}: asks for attention that this library does not compute: {_list(foreign)}"
        )
    for key, outer in around:
        for name in sorted((READ - {"model_type"}) & outer.keys()):
            if outer[name] is not None and (name not in inner or outer[name] != inner[name]):
                raise CheckpointError(f"{where}: {name} differs between {key} and around it")
    try:
        config = _config(inner, model_type)
    except (TypeError, ValueError) as error:
        key = " (num_attention_heads)" if str(error).startswith("num_heads ") else ""
        raise CheckpointError(f"{where}: {error}{key}") from error
    contradictions = [key for level in levels for key in foreign_shapes(level, config)]
    if contradictions:
        raise CheckpointError(
            f"{where}: does not fit multi-head latent attention: {_list(contradictions)}"
        )
    return config


def _config(raw: Mapping[str, Any], model_type: str) -> MLAConfig:
    """Returns the config of a language model's dict; error messages do not name the file."""
    max_position = positive_int("max_position_embeddings", raw.get("max_position_embeddings", 4096))
    interleave = checks.require_bool("rope_interleave", raw.get("rope_interleave", True))
    rope_theta, rope_scaling = rope_from_hf(raw, max_position)
    return MLAConfig(
        hidden_size=required(raw, "hidden_size"),
        num_heads=required(raw, "num_attention_heads"),
        q_lora_rank=required(raw, "q_lora_rank"),
        kv_lora_rank=required(raw, "kv_lora_rank"),
        qk_nope_head_dim=required(raw, "qk_nope_head_dim"),
        qk_rope_head_dim=required(raw, "qk_rope_head_dim"),
        v_head_dim=required(raw, "v_head_dim"),
        rope_theta=rope_theta,
        # DeepSeek-V2's code has no such switch.
        rope_interleave=True if model_type == "deepseek_v2" else interleave,
        rope_scaling=rope_scaling,
        max_position_embeddings=max_position,
        num_hidden_layers=raw.get("num_hidden_layers", 1),
        attention_bias=raw.get("attention_bias", False),
    )


def _list(found: list[str]) -> str:
    """Joins the entries of an error message, each once and at most 8."""
    found = list(dict.fromkeys(found))
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


_V2_YARN = YarnScaling(
    factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707
)
_V3_YARN = dataclasses.replace(_V2_YARN, mscale=1.0, mscale_all_dim=1.0)
_KIMI_YARN = dataclasses.replace(_V3_YARN, factor=32.0, beta_fast=1.0)
_V3 = MLAConfig(
    hidden_size=7168,
    num_heads=128,
    q_lora_rank=1536,
    rope_scaling=_V3_YARN,
    max_position_embeddings=163840,
    num_hidden_layers=61,
)
# Numbers as in the published config.json files.
PRESETS: dict[str, MLAConfig] = {
    "deepseek-v2-lite": dataclasses.replace(
        _V3,
        hidden_size=2048,
        num_heads=16,
        q_lora_rank=None,
        rope_scaling=_V2_YARN,
        num_hidden_layers=27,
    ),
    "deepseek-v2": dataclasses.replace(
        _V3, hidden_size=5120, rope_scaling=_V2_YARN, num_hidden_layers=60
    ),
    "deepseek-v3": _V3,
    "deepseek-r1": _V3,
    "kimi-k2": dataclasses.replace(
        _V3,
        num_heads=64,
        rope_theta=50000.0,
        rope_scaling=_KIMI_YARN,
        max_position_embeddings=131072,
    ),
}
"""The configs of published models by name."""
