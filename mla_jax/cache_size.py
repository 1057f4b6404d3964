"""How many bytes a KV cache takes under MHA, GQA, MQA and MLA, and the batch that a memory allows.

DeepSeek-V2 (arXiv 2405.04434) quotes a KV cache 93.3 % smaller than DeepSeek 67B's (abstract) and a
generation throughput 5.76 times as high (section 3.2.3). `DEEPSEEK_67B` and `DEEPSEEK_V2` hold
what both sides of the first number are made of; `decompose` takes it apart.
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
    """The KV cache of a model: `layers` layers that keep `values` values of `bits` bits a token.

    Raises TypeError naming the field that is no number (values and layers: no integer), ValueError
    for one that isn't positive.
    """

    scheme: str
    values: int  # of one token in one layer
    bits: float = BITS_PER_VALUE["bfloat16"]  # of one value
    layers: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, str):
            raise TypeError(f"scheme must be a str, got {self.scheme!r}")
        for name in ("values", "layers"):  # frozen: a numpy scalar becomes a Python int
            object.__setattr__(self, name, checks.require_positive(name, getattr(self, name)))
        object.__setattr__(self, "bits", _require_positive("bits", self.bits))

    @staticmethod
    def mha(num_heads: int, head_dim: int, *, bits: float = 16, layers: int = 1) -> "CacheSize":
        """Multi-head attention: a key and a value of `head_dim` for every head."""
        num_heads = checks.require_positive("num_heads", num_heads)
        head_dim = checks.require_positive("head_dim", head_dim)
        return CacheSize("MHA", 2 * num_heads * head_dim, bits, layers)

    @staticmethod
    def gqa(num_kv_heads: int, head_dim: int, *, bits: float = 16, layers: int = 1) -> "CacheSize":
        """Grouped-query attention: a key and a value for every group of heads."""
        num_kv_heads = checks.require_positive("num_kv_heads", num_kv_heads)
        head_dim = checks.require_positive("head_dim", head_dim)
        return CacheSize(f"GQA-{num_kv_heads}", 2 * num_kv_heads * head_dim, bits, layers)

    @staticmethod
    def mqa(head_dim: int, *, bits: float = 16, layers: int = 1) -> "CacheSize":
        """Multi-query attention: one key and one value for all heads."""
        head_dim = checks.require_positive("head_dim", head_dim)
        return CacheSize("MQA", 2 * head_dim, bits, layers)

    @staticmethod
    def mla(config: MLAConfig, *, bits: float = 16, layers: int | None = None) -> "CacheSize":
        """Multi-head latent attention: [c_kv | k_rope]; `layers` is the config's if not given."""
        _require_is("config", config, MLAConfig)
        layers = config.num_hidden_layers if layers is None else layers
        return CacheSize("MLA", config.latent_dim, bits, layers)

    @staticmethod
    def mla_int8(
        config: MLAConfig, *, scale_granularity: str = "token", layers: int | None = None
    ) -> "CacheSize":
        """MLA as an int8 `PagedKVCache` keeps it: c_kv in int8, float32 scales, k_rope in bfloat16.

        `bits` is the mean over the values.
        """
        _require_is("config", config, MLAConfig)
        checks.require_one_of("scale_granularity", scale_granularity, quantize.GRANULARITIES)
        scales = {"token": 1, "group": config.kv_lora_rank / quantize.GROUP, "tensor": 0}
        bits = 8.0 * config.kv_lora_rank + 16 * config.qk_rope_head_dim
        bits += 32 * scales[scale_granularity]
        return CacheSize.mla(config, bits=bits / config.latent_dim, layers=layers)

    @property
    def bytes_per_token_and_layer(self) -> float:
        return self.values * self.bits / 8

    @property
    def bytes_per_token(self) -> float:
        """Of the whole model."""
        return self.layers * self.bytes_per_token_and_layer

    def reduction_from(self, other: "CacheSize") -> float:
        """The share of `other`'s bytes a token that this cache saves: 0.933 for 93.3 %."""
        _require_is("other", other, CacheSize)
        return 1 - self.bytes_per_token / other.bytes_per_token


def schemes(config: MLAConfig, *, bits: float = 16, gqa_heads: int = 8) -> tuple[CacheSize, ...]:
    """The cache of this model, had it MHA, GQA, MQA, and as it is, with MLA.

    The three that it does not have keep keys and values of `qk_nope_head_dim` for every head or
    group, as the rope channels of MLA only exist because they can't be absorbed.
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
    """One of the steps from a cache to a smaller one."""

    name: str
    factor: float  # how many times smaller this step alone makes it
    share: float  # of the whole: ln(factor) / ln(product of the factors)
    bytes_per_token: float  # after this step
    reduction: float  # after this step, against the start


def decompose(before: CacheSize, after: CacheSize) -> tuple[Part, ...]:
    """What of `after`'s saving comes from the attention, what from depth and from fewer bits.

    The three factors multiply to the whole, so their shares are those of the logarithm. The first
    two at equal bits are the part that the architecture has.

    Raises ValueError where both take the same bytes a token: there is nothing to share out.
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
    """What serves a model: memory in bytes and its bandwidth in bytes a second, of all devices."""

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
    """How many requests of that length fit, in whole requests, beside `weights` in `memory` bytes.

    Raises TypeError for what is no number, ValueError where the weights alone don't fit or the
    memory or the length isn't positive.
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
    """Tokens a second that decoding can't exceed: each step reads the weights and the cache once.

    A larger batch always raises it, so the largest that fits gives the ceiling of a machine. It
    says nothing of arithmetic, communication or scheduling, which measured numbers include. Of a
    mixture of experts `weights` are all of them: a large batch meets every expert.

    Raises TypeError for what is no number (batch: no integer), ValueError for a batch or weights
    below 0, and a length or bandwidth that isn't positive.
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
    """The value as a finite number; a Python int stays one, so that a count has no `.0`."""
    number = checks.require_number(name, value)
    return int(value) if isinstance(value, int | np.integer) else number


def _require_positive(name: str, value: Any) -> float:
    number = _require_number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return number


# Both as in the 93.3 %: DeepSeek 67B (arXiv 2401.02954, table 2) in bf16, DeepSeek-V2 as deployed.
DEEPSEEK_67B = CacheSize.gqa(8, 128, layers=95)
DEEPSEEK_V2 = CacheSize.mla(MLAConfig.preset("deepseek-v2"), bits=BITS_PER_VALUE["6-bit"])
# The node on which DeepSeek-V2's paper measured 5.76 times the throughput.
H800_NODE = Machine("8 x H800", memory=8 * 80e9, bandwidth=8 * 3.35e12)
