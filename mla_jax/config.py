"""The shape of a multi-head latent attention (MLA) layer: `MLAConfig`, its presets and its files.

Fields are named as in the published `config.json` files where they mean the same. The papers are
DeepSeek-V2 (arXiv 2405.04434, section 2.1), DeepSeek-V3 (arXiv 2412.19437) and YaRN (arXiv
2309.00071). Where papers and published code leave a choice, this library follows
`DeepseekV2Attention` and `DeepseekV3Attention` of Hugging Face `transformers`.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mla_jax import checks
from mla_jax.checkpoints.config_json import (
    WRAPPERS,
    CheckpointError,
    config_json_path,
    excerpt,
    language_model_config,
    read_json_object,
    shown,
)
from mla_jax.checkpoints.config_keys import READ, foreign_keys, foreign_shapes

# The default of `rope_interleave` by model type. DeepSeek-V2's code rotates interleaved pairs and
# reads no such key. V3's class defaults to True, and Kimi-K2 is published with V3's code.
ROPE_INTERLEAVE_DEFAULT = {"deepseek_v2": True, "deepseek_v3": True, "kimi_k2": True}


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension as DeepSeek configures it.

    `factor` is the new context length over `original_max_position_embeddings`. Channel pairs that
    turn more than `beta_fast` times within the original length keep their frequency. Pairs that
    turn less than `beta_slow` times are slowed down by `factor`. Between them is a linear ramp,
    whose ends are rounded outwards to whole pairs if `truncate`. `mscale` and `mscale_all_dim`
    determine the two temperatures below. None and 0 mean that they are not given, which differs
    from 1.

    Raises TypeError or ValueError that names the invalid field.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name, kind, low, high in (
            ("factor", "a positive number", 1.0, 1e6),
            ("beta_fast", "a positive number", 1e-3, 1e6),
            ("beta_slow", "a positive number", 1e-3, 1e6),
            ("mscale", "a number or null", 0.0, 100.0),  # published models have 0.7 to 1
            ("mscale_all_dim", "a number or null", 0.0, 100.0),
            ("attention_factor", "a number or null", 1e-3, 1e3),
        ):
            value = getattr(self, name)
            if value is not None or not kind.endswith("null"):
                _store(self, name, _number(f"rope_scaling.{name}", value, kind, low, high))
        original = self.original_max_position_embeddings
        name = "original_max_position_embeddings"
        _store(self, name, _positive_int(f"rope_scaling.{name}", original))
        _store(self, "truncate", checks.require_bool("rope_scaling.truncate", self.truncate))
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"rope_scaling.beta_fast must be at least beta_slow = {self.beta_slow}, "
                f"got {self.beta_fast}"
            )

    @property
    def rotation_scale(self) -> float:
        """The factor of the rotated (rope) part of q and of k."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return yarn_mscale(self.factor)

    @property
    def softmax_mscale(self) -> float:
        """The factor of q and of k in the softmax scale, which is multiplied by its square."""
        return yarn_mscale(self.factor, self.mscale_all_dim) if self.mscale_all_dim else 1.0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Returns YaRN's temperature 0.1 * mscale * ln(factor) + 1, or 1 for a factor up to 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


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
            _store(self, name, _positive_int(name, getattr(self, name)))
        if self.q_lora_rank is not None:
            _store(self, "q_lora_rank", _positive_int("q_lora_rank", self.q_lora_rank))
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        for name, kind, low, high in (
            ("rope_theta", "a number above 1", math.nextafter(1, 2), 1e30),
            ("rms_norm_eps", "a positive number", 1e-30, 1.0),
        ):
            _store(self, name, _number(name, getattr(self, name), kind, low, high))
        for name in ("rope_interleave", "attention_bias"):
            _store(self, name, checks.require_bool(name, getattr(self, name)))
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
                or asks for what this library does not compute. Examples are another model or rope
                type, sparse attention and a sliding window; see `config_keys`. The message names
                the file and the key.
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
    if not isinstance(model_type, str) or model_type not in ROPE_INTERLEAVE_DEFAULT:
        raise CheckpointError(
            f"{where}: model_type must be one of {', '.join(ROPE_INTERLEAVE_DEFAULT)}, "
            f"got {shown(model_type)}" + (f" (with {', '.join(foreign)})" if foreign else "")
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
    max_position = _positive_int(
        "max_position_embeddings", raw.get("max_position_embeddings", 4096)
    )
    interleave = checks.require_bool(
        "rope_interleave", raw.get("rope_interleave", ROPE_INTERLEAVE_DEFAULT[model_type])
    )
    rope_theta, rope_scaling = _rope_from_hf(raw, max_position)
    return MLAConfig(
        hidden_size=_required(raw, "hidden_size"),
        num_heads=_required(raw, "num_attention_heads"),
        q_lora_rank=_required(raw, "q_lora_rank"),
        kv_lora_rank=_required(raw, "kv_lora_rank"),
        qk_nope_head_dim=_required(raw, "qk_nope_head_dim"),
        qk_rope_head_dim=_required(raw, "qk_rope_head_dim"),
        v_head_dim=_required(raw, "v_head_dim"),
        rope_theta=rope_theta,
        # DeepSeek-V2's code has no such switch.
        rope_interleave=True if model_type == "deepseek_v2" else interleave,
        rope_scaling=rope_scaling,
        max_position_embeddings=max_position,
        num_hidden_layers=raw.get("num_hidden_layers", 1),
        attention_bias=raw.get("attention_bias", False),
    )


_ROPE_KEYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"})
_ROPE_KEYS |= {"original_max_position_embeddings"}
_YARN_KEYS = frozenset(field.name for field in dataclasses.fields(YarnScaling))


def _rope_from_hf(raw: Mapping[str, Any], max_position: int) -> tuple[Any, YarnScaling | None]:
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
    numbers["factor"] = _required(rope, "factor", f"{name}.factor")
    return theta, YarnScaling(**numbers | {"original_max_position_embeddings": original})


def _required(raw: Mapping[str, Any], key: str, name: str | None = None) -> Any:
    if key in raw:
        return raw[key]
    nested = [k for k, v in raw.items() if isinstance(v, Mapping) and "kv_lora_rank" in v]
    where = f"; is it in {excerpt(', '.join(map(str, nested)))}? Known are {', '.join(WRAPPERS)}"
    raise ValueError(f"{name or key} is missing" + (where if nested else ""))


def _list(found: list[str]) -> str:
    """Joins the entries of an error message, each once and at most 8."""
    found = list(dict.fromkeys(found))
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _store(instance: Any, name: str, value: Any) -> None:
    """Sets a field of a frozen dataclass; only for __post_init__."""
    object.__setattr__(instance, name, value)


def _number(name: str, value: Any, kind: str, low: float, high: float) -> float:
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


def _positive_int(name: str, value: Any) -> int:
    """Returns the value as a Python int that fits int32."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be a positive integer, got {shown(value)}")
    if not 0 < value < 2**31:
        limit = "" if value <= 0 else ", which is not below 2^31"
        raise ValueError(f"{name} must be a positive integer, got {shown(value)}{limit}")
    return int(value)


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
