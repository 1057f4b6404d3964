"""Runs a kernel that writes time stamps of its stages."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.splits.decode_plan import DecodePlan
from pallas_kernels.hopper import device
from pallas_kernels.hopper.attention import KERNELS, launch
from pallas_kernels.hopper.config import DecodeConfig
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.query_parts import QueryParts
from pallas_kernels.hopper.prefill.attention import plan as plan_prefill
from pallas_kernels.hopper.prefill.config import TILE_ROWS, PrefillConfig
from pallas_kernels.hopper.prefill.kernel import prefill
from pallas_kernels.hopper.prefill.refs import PrefillCall


@functools.partial(jax.jit, static_argnames=("num_heads", "softmax_scale"))
def attend_with_stamps(
    q: jax.Array,
    cache: tuple[jax.Array, ...],
    block_tables: jax.Array,
    seq_lens: jax.Array,
    plan: DecodePlan,
    *,
    num_heads: int,
    softmax_scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns o and lse as `attention.attend` or `attend_int8` does for bfloat16, and the stamps.

    Arguments as in these, but cache: (pages,), or (pages, rope_pages, scales) of int8. The stamps
    are int32 of the shape `parts.stamps.shape`, with 0 where nothing was stamped. CTAs of a cluster
    follow each other.
    """
    tiles = plan.tiles
    stamps = _no_stamps(tiles.num_ctas(plan.split.num_workers), len(tiles.warpgroup_registers))
    scaled = isinstance(tiles, DecodeConfig)
    options: dict[str, Any] = {"partial_dtype": jnp.float16 if scaled else jnp.float32}
    o, lse = launch(
        KERNELS["float" if len(cache) == 1 else "int8"][type(tiles)],
        QueryParts.of(q),
        cache,
        (block_tables, seq_lens, None),
        plan,
        kv_lora_rank=512,
        num_heads=num_heads,
        interpret=None,
        softmax_scale=softmax_scale,
        causal=True,
        stamps=stamps,
        **options,
    )
    return o, lse, stamps[...]


@functools.partial(jax.jit, static_argnames=("softmax_scale",))
def prefill_with_stamps(
    q: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    *,
    softmax_scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns o and lse as `prefill.attention.attend_ragged` does with a causal mask, and stamps.

    Arguments as in `attend_ragged`, in DeepSeek-V3's widths, with at least 128 rows of each. The
    stamps are as those of `attend_with_stamps`. A CTA's first item is that of its number.

    Raises ValueError for fewer rows, which `attend_ragged` would pad.
    """
    num_queries, num_heads, _ = q.shape
    for name, x in (("q", q), ("k_nope", k_nope)):
        if len(x) < TILE_ROWS:
            raise ValueError(f"{name} has {len(x)} rows, wanted at least {TILE_ROWS}")
    config, num_ctas = PrefillConfig(), device.num_sms()
    stamps = _no_stamps(num_ctas, len(config.warpgroup_registers))
    lengths = cu_q_lens, cu_kv_lens
    work = plan_prefill(*lengths, num_queries, len(k_nope), num_heads, config, causal=True)
    o, lse = prefill(
        PrefillCall(
            q=q,
            k_nope=k_nope,
            k_rope=k_rope,
            v=v,
            work=work,
            num_queries=num_queries,
            softmax_scale=softmax_scale,
            causal=True,
            config=config,
            num_ctas=num_ctas,
            stamps=stamps,
        )
    )
    return o, lse, stamps[...]


def _no_stamps(ctas: int, warpgroups: int) -> Any:
    """Returns a reference to stamps, of which there are none yet."""
    return jax.new_ref(jnp.zeros(at.shape(ctas, warpgroups), jnp.int32))
