"""Paged absorbed MLA over an int8 latent cache on a Hopper GPU: planned, decoded."""

from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.hal import TilePlan
from mla_jax.splits.planner import SplitPlan
from pallas_kernels.hopper.attention import launch, pad_rows, plan_decode, warn_if_slow
from pallas_kernels.hopper.kernels.decode_int8 import decode_int8
from pallas_kernels.hopper.kernels.decode_transposed_int8 import decode_transposed_int8
from pallas_kernels.hopper.tuning import tile_plan_of_height
from pallas_kernels.hopper.work_items import BLOCK
from pallas_kernels.modes import jit_with_defaults


@jit_with_defaults("num_heads", "softmax_scale", "causal", "partial_dtype", "tiles", "interpret")
def attend_int8(
    q: jax.Array,
    pages: jax.Array,
    rope_pages: jax.Array,
    scales: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array | None,
    plan: SplitPlan | None,
    *,
    num_heads: int,
    softmax_scale: float,
    causal: bool,
    partial_dtype: Any = None,
    tiles: TilePlan | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of R = S_q * num_heads rows a request; row r is token r // num_heads.

    Args:
        q: [B, R, kv_lora_rank + rope_dim] bfloat16. The kernel rounds its latent part to 14 bits,
            in a step each row (`narrow`).
        pages: [num_pages, page_size, kv_lora_rank] int8.
        rope_pages: [num_pages, page_size, rope_dim] bfloat16.
        scales: [num_pages, page_size] float32, a token's latent is its int8 times its scale.
        Others as in `attention.attend`.

    Returns:
        o [B, R, kv_lora_rank] bfloat16 and lse [B, R] float32, natural log.
    """
    _, page_size, latent = pages.shape
    rows = q.shape[1]
    capacity = block_tables.shape[1] * page_size
    if plan is None:
        lengths = jnp.clip(seq_lens, 0, capacity)
        plan = plan_decode(lengths, rows, capacity=capacity, cache="int8", tiles=tiles)
    elif tiles is None:
        warn_if_slow(plan, rows, capacity=capacity, cache="int8")
    tiles = tiles or tile_plan_of_height(
        plan.rows_per_tile, cache="int8", kv_lora_rank=latent, rope_dim=rope_pages.shape[2]
    )
    return launch(
        decode_transposed_int8 if plan.rows_per_tile < BLOCK else decode_int8,
        pad_rows(q, plan.rows_per_tile),
        (pages, rope_pages, scales),
        block_tables,
        seq_lens,
        query_lens,
        plan,
        rows=rows,
        kv_lora_rank=latent,
        num_heads=num_heads,
        tiles=tiles,
        partial_dtype=jnp.float32 if partial_dtype is None else partial_dtype,
        interpret=interpret,
        softmax_scale=softmax_scale,
        causal=causal,
    )
