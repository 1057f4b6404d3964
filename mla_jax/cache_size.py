"""Size of a KV cache under MHA, GQA, MQA and MLA, and the batch and throughput that it allows.

DeepSeek-V2 (arXiv 2405.04434) reports a KV cache that is 93.3 % smaller than DeepSeek 67B's
(abstract) and a generation throughput that is 5.76 times as high (section 3.2.3). `DEEPSEEK_67B`
and `DEEPSEEK_V2` are the two caches of the first number, and `decompose` splits it into causes.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from mla_jax import checks, quantize
from mla_jax.config import MLAConfig

BITS_PER_VALUE: dict[str, float] = {
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "int8": 8,
    "6-bit": 6,  # "into 6 bits on average", DeepSeek-V2, section 3.2.3
}


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """The KV cache of a model: values per token and layer, bits per value, and layers.

    Raises TypeError for a field that is not a number, or not an integer where it counts something.
    Raises ValueError for a number that is not positive. The message names the field.
    """

    scheme: str
    values: int  # per token and layer
    bits: float = BITS_PER_VALUE["bfloat16"]  # per value
    layers: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, str):
            raise TypeError(f"scheme must be a str, got {self.scheme!r}")
        for name in ("values", "layers"):
            object.__setattr__(self, name, checks.require_positive(name, getattr(self, name)))
        object.__setattr__(self, "bits", _require_positive("bits", self.bits))

    @staticmethod
    def mha(num_heads: int, head_dim: int, *, bits: float = 16, layers: int = 1) -> "CacheSize":
        """Returns the cache of multi-head attention: a key and a value per head."""
        num_heads = checks.require_positive("num_heads", num_heads)
        head_dim = checks.require_positive("head_dim", head_dim)
        return CacheSize("MHA", 2 * num_heads * head_dim, bits, layers)

    @staticmethod
    def gqa(num_kv_heads: int, head_dim: int, *, bits: float = 16, layers: int = 1) -> "CacheSize":
        """Returns the cache of grouped-query attention: a key and a value per group of heads."""
        num_kv_heads = checks.require_positive("num_kv_heads", num_kv_heads)
        head_dim = checks.require_positive("head_dim", head_dim)
        return CacheSize(f"GQA-{num_kv_heads}", 2 * num_kv_heads * head_dim, bits, layers)

    @staticmethod
    def mqa(head_dim: int, *, bits: float = 16, layers: int = 1) -> "CacheSize":
        """Returns the cache of multi-query attention: one key and one value for all heads."""
        head_dim = checks.require_positive("head_dim", head_dim)
        return CacheSize("MQA", 2 * head_dim, bits, layers)

    @staticmethod
    def mla(config: MLAConfig, *, bits: float = 16, layers: int | None = None) -> "CacheSize":
        """Returns the cache of MLA, [c_kv | k_rope]; `layers` is by default the config's."""
        _require_is("config", config, MLAConfig)
        layers = config.num_hidden_layers if layers is None else layers
        return CacheSize("MLA", config.latent_dim, bits, layers)

    @staticmethod
    def mla_int8(
        config: MLAConfig, *, scale_granularity: str = "token", layers: int | None = None
    ) -> "CacheSize":
        """Returns the size of an int8 `PagedKVCache`: int8 c_kv, float32 scales, bfloat16 k_rope.

        `bits` is the mean over all values of a token.
        """
        _require_is("config", config, MLAConfig)
        checks.require_one_of("scale_granularity", scale_granularity, quantize.GRANULARITIES)
        scales = {"token": 1, "group": config.kv_lora_rank / quantize.GROUP, "tensor": 0}
        bits = 8.0 * config.kv_lora_rank + 16 * config.qk_rope_head_dim
        bits += 32 * scales[scale_granularity]
        return CacheSize.mla(config, bits=bits / config.latent_dim, layers=layers)

    @property
    def bytes_per_token_and_layer(self) -> float:
        """Bytes per token in one layer."""
        return self.values * self.bits / 8

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token in all layers."""
        return self.layers * self.bytes_per_token_and_layer

    def reduction_from(self, other: "CacheSize") -> float:
        """Returns the share of `other`'s bytes per token that this cache saves: 0.933 is 93.3 %."""
        _require_is("other", other, CacheSize)
        return 1 - self.bytes_per_token / other.bytes_per_token


def schemes(config: MLAConfig, *, bits: float = 16, gqa_heads: int = 8) -> tuple[CacheSize, ...]:
    """Returns the caches that this model would have under MHA, GQA and MQA, and its own, MLA.

    The first three have keys and values of `qk_nope_head_dim` per head or group. The rope channels
    are left out, because MLA has them only since RoPE can't be absorbed.
    """
    _require_is("config", config, MLAConfig)
    gqa_heads = checks.require_positive("gqa_heads", gqa_heads)
    head_dim, layers = config.qk_nope_head_dim, config.num_hidden_layers
    return (
        CacheSize.mha(config.num_heads, head_dim, bits=bits, layers=layers),
        CacheSize.gqa(gqa_heads, head_dim, bits=bits, layers=layers),
        CacheSize.mqa(head_dim, bits=bits, layers=layers),
        CacheSize.mla(config, bits=bits),
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """One step from a cache to a smaller one, and what it contributes."""

    name: str
    factor: float  # size before this step / size after it
    share: float  # of the whole reduction: ln(factor) / ln(product of all factors)
    bytes_per_token: float  # after this step
    reduction: float  # after this step, relative to the start


def decompose(before: CacheSize, after: CacheSize) -> tuple[Part, ...]:
    """Splits the reduction from `before` to `after` into attention, depth and bits per value.

    The three factors multiply to the whole reduction, so that the shares add up in logarithms. The
    steps for attention and depth, at equal bits, are the reduction by the architecture.

    Raises ValueError if both caches have the same bytes per token.
    """
    _require_is("before", before, CacheSize)
    _require_is("after", after, CacheSize)
    steps = (
        (f"{before.scheme} to {after.scheme}", before.values / after.values),
        (f"{before.layers} to {after.layers} layers", before.layers / after.layers),
        (f"{before.bits:g} to {after.bits:g} bits a value", before.bits / after.bits),
    )
    whole = math.prod(factor for _, factor in steps)
    if math.isclose(whole, 1):
        raise ValueError(f"after must differ in size from before, {before.bytes_per_token} B/token")
    parts, so_far = [], 1.0
    for name, factor in steps:
        so_far *= factor
        left = before.bytes_per_token / so_far
        parts.append(Part(name, factor, math.log(factor) / math.log(whole), left, 1 - 1 / so_far))
    return tuple(parts)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine: memory in bytes and bandwidth in bytes per second, summed over its devices."""

    name: str
    memory: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str, got {self.name!r}")
        for name in ("memory", "bandwidth"):
            object.__setattr__(self, name, _require_positive(name, getattr(self, name)))


def largest_batch(
    cache: CacheSize, *, memory: float, weights: float, tokens_per_request: float
) -> int:
    """Returns how many requests of a length fit beside `weights` bytes in `memory` bytes.

    Raises TypeError for an argument that is not a number. Raises ValueError if the weights alone do
    not fit, or if the memory or the length is not positive.
    """
    _require_is("cache", cache, CacheSize)
    memory = _require_positive("memory", memory)
    weights = _require_number("weights", weights)
    tokens_per_request = _require_positive("tokens_per_request", tokens_per_request)
    if not 0 <= weights < memory:
        raise ValueError(f"weights must be 0 to memory = {memory:g} bytes, got {weights:g}")
    return int((memory - weights) // (cache.bytes_per_token * tokens_per_request))


def throughput_ceiling(
    cache: CacheSize, *, batch: int, weights: float, tokens_per_request: float, bandwidth: float
) -> float:
    """Returns an upper bound of decode throughput in tokens per second.

    Each step reads the weights and the cache of the batch once. A larger batch raises the bound, so
    that the largest batch that fits gives the bound of a machine. Arithmetic, communication and
    scheduling are not included. For a mixture of experts `weights` counts all experts, because a
    large batch uses all of them.

    Raises TypeError for an argument that is not a number, or a batch that is not an integer. Raises
    ValueError for a batch or weights below 0, and a length or bandwidth that is not positive.
    """
    _require_is("cache", cache, CacheSize)
    batch = checks.require_int("batch", batch, 0)
    weights = _require_number("weights", weights)
    if weights < 0:
        raise ValueError(f"weights must be at least 0, got {weights!r}")
    tokens_per_request = _require_positive("tokens_per_request", tokens_per_request)
    bandwidth = _require_positive("bandwidth", bandwidth)
    step_bytes = weights + batch * tokens_per_request * cache.bytes_per_token
    return batch * bandwidth / step_bytes if batch else 0.0


def _require_is(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")


def _require_number(name: str, value: Any) -> float:
    """Returns the value as a finite number; an int stays an int, to be printed without `.0`."""
    number = checks.require_number(name, value)
    return int(value) if isinstance(value, int | np.integer) else number


def _require_positive(name: str, value: Any) -> float:
    number = _require_number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return number


# The caches behind the 93.3 %: DeepSeek 67B (arXiv 2401.02954, table 2) in bfloat16, and
# DeepSeek-V2 as deployed.
DEEPSEEK_67B = CacheSize.gqa(8, 128, layers=95)
DEEPSEEK_V2 = CacheSize.mla(MLAConfig.preset("deepseek-v2"), bits=BITS_PER_VALUE["6-bit"])
# The node on which DeepSeek-V2's paper measured 5.76 times the throughput.
H800_NODE = Machine("8 x H800", memory=8 * 80e9, bandwidth=8 * 3.35e12)
