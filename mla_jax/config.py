"""The shape of a multi-head latent attention (MLA) layer: `MLAConfig`, presets, config.json.

The field names are those of the published `config.json` files where they mean the same thing.
Papers: DeepSeek-V2 (arXiv 2405.04434, section 2.1), DeepSeek-V3 (arXiv 2412.19437); YaRN (arXiv
2309.00071). Where published code and papers leave a choice, we do what Hugging Face
`transformers` does in `DeepseekV2Attention` and `DeepseekV3Attention`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What an absent `rope_interleave` means, by model type. DeepSeek-V2's code rotates interleaved
# pairs and reads no such key; V3's class defaults to it; Kimi-K2 ships V3's code.
ROPE_INTERLEAVE_DEFAULT = {"deepseek_v2": True, "deepseek_v3": True, "kimi_k2": True}


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension as DeepSeek configures it.

    `factor` is new length over `original_max_position_embeddings`. Pairs that turn more than
    `beta_fast` times within the original length keep their frequency, those that turn less than
    `beta_slow` times are slowed down by `factor`, with a linear ramp between (its ends rounded
    outwards to whole pairs if `truncate`). `mscale` and `mscale_all_dim` give the two
    temperatures below; None (or 0) means not given, which is not the same as 1.
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
        _require_positive_number("rope_scaling.factor", self.factor)
        _require_positive_int(
            "rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings
        )
        _require_positive_number("rope_scaling.beta_fast", self.beta_fast)
        _require_positive_number("rope_scaling.beta_slow", self.beta_slow)
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise ValueError(f"rope_scaling.{name} must be a number or null, got {value!r}")

    @property
    def rotation_scale(self) -> float:
        """What the rotated (rope) part of q and of k is multiplied with."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return yarn_mscale(self.factor)

    @property
    def softmax_mscale(self) -> float:
        """What q and k are each scaled with in the softmax scale, so that it enters squared."""
        return yarn_mscale(self.factor, self.mscale_all_dim) if self.mscale_all_dim else 1.0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature: 0.1 * mscale * ln(factor) + 1, and 1 where nothing is extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """The shape and numerics of one MLA layer. Immutable and hashable: a static argument of jit.

    `q_lora_rank=None` projects queries straight from the hidden state (DeepSeek-V2-Lite).
    `rope_interleave` rotates pairs (0, 1), (2, 3), ...; False rotates (i, i + rope / 2).
    `rms_norm_eps` is that of the two latent norms; the published modelling code fixes it at 1e-6
    whatever the config's key of that name says (which is for the norms around the layer), and so
    does `from_hf`. `attention_bias` puts a bias on the two down-projections and the output.
    `num_hidden_layers` only says how many such layers the model has.

    Raises ValueError naming the field that can't be.
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
            _require_positive_int(name, getattr(self, name))
        if self.q_lora_rank is not None:
            _require_positive_int("q_lora_rank", self.q_lora_rank)
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if not _is_number(self.rope_theta) or self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be a number above 1, got {self.rope_theta!r}")
        _require_positive_number("rms_norm_eps", self.rms_norm_eps)

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head before absorption: nope + rope (192 for DeepSeek)."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a cache row [c_kv | k_rope], and of an absorbed query (576 for DeepSeek)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times YaRN's mscale squared where the config gives `mscale_all_dim`.

        The width is that of the expanded head (192), not of the latent (576).
        """
        mscale = self.rope_scaling.softmax_mscale if self.rope_scaling else 1.0
        return self.qk_head_dim**-0.5 * mscale**2

    def shard(self, tensor_parallel: int) -> "MLAConfig":
        """The config of one tensor-parallel shard: an equal share of the heads, all else the same.

        Raises ValueError where the heads don't divide.
        """
        _require_positive_int("tensor_parallel", tensor_parallel)
        if self.num_heads % tensor_parallel:
            raise ValueError(
                f"tensor_parallel must divide num_heads = {self.num_heads}, got {tensor_parallel}"
            )
        return dataclasses.replace(self, num_heads=self.num_heads // tensor_parallel)

    @staticmethod
    def preset(name: str) -> "MLAConfig":
        """A published model's config by name, e.g. "deepseek-v3"; see `PRESETS`."""
        if name not in PRESETS:
            raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
        return PRESETS[name]

    @staticmethod
    def from_hf(source: str | Path | Mapping[str, Any]) -> "MLAConfig":
        """Reads a published config: a config.json, the folder it is in, or its dict.

        Takes `rope_scaling` and the newer `rope_parameters`, and a `text_config` around both.
        Raises FileNotFoundError without a config.json, ValueError naming the key that is missing,
        malformed, or asks for what this library does not do (model type, rope type, ...).
        """
        raw = text_config(source if isinstance(source, Mapping) else read_config_json(source))
        model_type = raw.get("model_type", "deepseek_v3")
        if model_type not in ROPE_INTERLEAVE_DEFAULT:
            raise ValueError(
                f"config.json: model_type must be one of {', '.join(ROPE_INTERLEAVE_DEFAULT)}, "
                f"got {model_type!r}"
            )
        interleave = ROPE_INTERLEAVE_DEFAULT[model_type]
        if model_type != "deepseek_v2":  # V2's code has no such switch
            interleave = bool(raw.get("rope_interleave", interleave))
        rope_theta, rope_scaling = _rope_from_hf(raw)
        return MLAConfig(
            hidden_size=_required(raw, "hidden_size"),
            num_heads=_required(raw, "num_attention_heads"),
            q_lora_rank=_required(raw, "q_lora_rank"),
            kv_lora_rank=_required(raw, "kv_lora_rank"),
            qk_nope_head_dim=_required(raw, "qk_nope_head_dim"),
            qk_rope_head_dim=_required(raw, "qk_rope_head_dim"),
            v_head_dim=_required(raw, "v_head_dim"),
            rope_theta=rope_theta,
            rope_interleave=interleave,
            rope_scaling=rope_scaling,
            max_position_embeddings=raw.get("max_position_embeddings", 4096),
            num_hidden_layers=raw.get("num_hidden_layers", 1),
            attention_bias=bool(raw.get("attention_bias", False)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The dict of a config.json that `from_hf` and `transformers` read back as this config.

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


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The dict in a config.json, given the file or its folder."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json at {path}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config (multimodal models nest it in `text_config`)."""
    nested = raw.get("text_config")
    return nested if isinstance(nested, Mapping) else raw


def _rope_from_hf(raw: Mapping[str, Any]) -> tuple[float, YarnScaling | None]:
    """(rope_theta, scaling) of a config dict; a non-empty `rope_scaling` outranks
    `rope_parameters`, a theta inside them the one beside them, as in `transformers`."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        raise ValueError(f"config.json: rope_scaling / rope_parameters must be flat, got {rope!r}")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    for where in (rope, raw):
        if where.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError(
                "config.json: partial_rotary_factor must be absent or 1, "
                f"got {where['partial_rotary_factor']!r}"
            )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"config.json: rope type must be 'default' or 'yarn', got {kind!r}")
    original = raw.get(
        "original_max_position_embeddings",
        rope.get("original_max_position_embeddings", raw.get("max_position_embeddings", 4096)),
    )
    _require_positive_int("rope_scaling.original_max_position_embeddings", original)
    factor = _required(rope, "factor", "rope_scaling.factor")
    if factor is None:
        factor = raw.get("max_position_embeddings", 4096) / original
    return theta, YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
        attention_factor=rope.get("attention_factor"),
        truncate=bool(rope.get("truncate", True)),
    )


def _required(raw: Mapping[str, Any], key: str, name: str | None = None) -> Any:
    if key not in raw:
        raise ValueError(f"config.json: {name or key} is missing")
    return raw[key]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_positive_number(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _require_positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


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

# The numbers of the published config.json files.
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
