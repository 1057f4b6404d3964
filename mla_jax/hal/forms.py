"""The cost model that chooses the form of the attention: absorbed or expanded.

Both forms compute the same layer from the same cached latents. For H heads, S query tokens of a
request and T tokens in the cache, the new ones included, the multiplications that differ are

    absorbed: pairs * (2 rank + rope)     + S * rank * (nope + v)     per head
    expanded: tiles * (nope + rope + v)   + T * rank * (nope + v)     per head

`pairs` counts the pairs of a query token and a key that it sees. A tile of the absorbed form holds
all heads of a token, so that little is computed in vain. The expanded form computes whole tiles of
TILE query tokens of one head by TILE keys, and `tiles` counts the pairs in those that have a
visible key. The absorbed form multiplies the query tokens by W_UK and W_UV, and the expanded form
all tokens of the cache.

The model leaves out: memory traffic, which long queries do not wait for; launches; SMs that a small
batch leaves without work; the merge of parts of the prefix; and lengths. Every request counts with
S tokens at the end of a full block table, because only sizes are known when a program is traced.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.hal.profiles.nvidia import H200_SXM
from mla_jax.hal.profiles.profile import HardwareProfile

ABSORBED, EXPANDED = "absorbed", "expanded"
FORMS = (ABSORBED, EXPANDED)
TILE = 128  # query tokens, and keys, of a tile of the expanded form


class Rates(NamedTuple):
    """Shares of a device's matrix peak that long products reach."""

    absorbed: float
    expanded: float
    projection: float  # products with W_UK and W_UV


# Shares of an H200's 1070 TFLOPS at the boost clock. Measured: 610 to 690 TFLOPS by the prefill
# kernel on 4096 tokens and more, and 640 to 660 by the decode kernel on 4096. Assumed: 700 by
# products with weights, since large products of XLA reach 807 to 844.
_KERNELS = Rates(absorbed=0.6, expanded=0.6, projection=0.65)
# Plain JAX computes float32. All three are products by XLA there.
_PLAIN = Rates(1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class FormCosts:
    """Seconds that each form takes per request, as far as the forms differ."""

    absorbed: float
    expanded: float

    @property
    def form(self) -> str:
        """The form that takes less time: "absorbed" or "expanded"."""
        return EXPANDED if self.expanded < self.absorbed else ABSORBED


def choose_form(
    num_query_tokens: int,
    *,
    num_heads: int,
    table_tokens: int,
    kv_lora_rank: int = 512,
    qk_nope_head_dim: int = 128,
    qk_rope_head_dim: int = 64,
    v_head_dim: int = 128,
    causal: bool = True,
    dtype: Any = jnp.bfloat16,
    profile: HardwareProfile = H200_SXM,
) -> FormCosts:
    """Returns what each form of the attention costs; `.form` is the one to compute.

    Args:
        num_query_tokens: S, new tokens per request. Those that a block table can't hold don't
            count. One token is always computed in the absorbed form.
        num_heads: H. It scales both times alike.
        table_tokens: T, tokens that a block table reaches: its width times the page size.
        kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: widths; those of DeepSeek-V3
            by default.
        causal: whether a token sees only the keys up to its own position.
        dtype: in which the attention is computed: float32, bfloat16 or float16. Kernels compute
            the 16-bit types and plain JAX computes float32, at other rates.
        profile: the device. It scales both times alike.

    Raises TypeError or ValueError that names the argument.
    """
    sizes = {
        "num_query_tokens": num_query_tokens,
        "num_heads": num_heads,
        "table_tokens": table_tokens,
        "kv_lora_rank": kv_lora_rank,
        "qk_nope_head_dim": qk_nope_head_dim,
        "v_head_dim": v_head_dim,
    }
    tokens, heads, keys, rank, nope, v_dim = (
        checks.require_positive(name, size) for name, size in sizes.items()
    )
    rope = checks.require_int("qk_rope_head_dim", qk_rope_head_dim, 0)
    causal = checks.require_bool("causal", causal)
    dtype = checks.require_float_dtype("dtype", dtype)
    checks.require_type("profile", profile, HardwareProfile)

    rates = _PLAIN if dtype == jnp.float32 else _KERNELS
    tokens = min(tokens, keys)
    pairs = tokens * keys - (tokens * (tokens - 1) // 2 if causal else 0)
    weights = rank * (nope + v_dim)
    absorbed = pairs * (2 * rank + rope) / rates.absorbed + tokens * weights / rates.projection
    expanded = _pairs_of_tiles(tokens, keys, causal) * (nope + rope + v_dim) / rates.expanded
    expanded += keys * weights / rates.projection
    second = profile.matrix_peak / (2 * heads)  # multiplications of one head
    if tokens == 1:
        expanded = max(expanded, absorbed)
    return FormCosts(absorbed / second, expanded / second)


def _pairs_of_tiles(tokens: int, keys: int, causal: bool) -> int:
    """Returns the pairs in tiles of TILE query tokens, the last of `keys`, by TILE keys."""
    last = np.minimum(np.arange(TILE, tokens + TILE, TILE), tokens)  # token of each tile, from 1
    seen = keys - tokens + last if causal else np.full(len(last), keys)
    return TILE * TILE * int((-(-seen // TILE)).sum())
