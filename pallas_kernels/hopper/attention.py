"""Decode and merge, one after the other: paged absorbed MLA on a Hopper GPU."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.hopper.decode import DecodeConfig, decode
from pallas_kernels.hopper.merge import merge

ROW_GROUP = 8  # rows come in groups of 8: the height of a swizzled tile in shared memory


def attend(
    q: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array,
    plan: Any,
    *,
    num_heads: int,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
    config: DecodeConfig,
    partial_dtype: Any = jnp.float32,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs a plan of `mla_jax.split_kv`.

    Args:
        q: [B, R, D] bfloat16 or float16, R = S_q * num_heads rows, row r is token r // num_heads.
        pages: [num_pages, page_size, D] of q's dtype, D = kv_lora_rank + rope_dim.
        block_tables: [B, max_pages] int32.
        seq_lens: [B] int32; -1 gives the request's rows NaN.
        query_lens: [B] int32, real tokens of each request.
        plan: a SplitPlan for these seq_lens with config.rows_per_tile and config.num_workers.

    Returns:
        o [B, R, kv_lora_rank] of q's dtype and lse [B, R] float32, natural log.
    """
    batch, rows, _ = q.shape
    spare = -rows % ROW_GROUP
    if spare:
        q = jnp.pad(q, ((0, 0), (0, spare), (0, 0)))
    o = jax.empty_ref(jax.ShapeDtypeStruct((batch, rows + spare, kv_lora_rank), q.dtype))
    lse = jax.empty_ref(jax.ShapeDtypeStruct((batch, rows + spare), jnp.float32))
    partial_o, partial_lse = decode(
        q,
        pages,
        block_tables,
        seq_lens,
        query_lens,
        plan,
        o,
        lse,
        num_heads=num_heads,
        kv_lora_rank=kv_lora_rank,
        softmax_scale=softmax_scale,
        causal=causal,
        config=config,
        partial_dtype=jnp.dtype(partial_dtype),
        interpret=interpret,
    )
    if plan.num_slots:
        merge(
            o,
            lse,
            partial_o,
            partial_lse,
            plan.tile_slot_start,
            num_row_tiles=plan.num_row_tiles,
            interpret=interpret,
        )
    return o[...][:, :rows], lse[...][:, :rows]
