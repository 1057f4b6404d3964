"""Paged absorbed MLA over an int8 latent cache on a Hopper GPU: planned, decoded, merged."""

from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.split_kv import SplitPlan
from pallas_kernels.hopper.attention import plan_decode
from pallas_kernels.hopper.decode_few_int8 import MOST_ROWS_OF_TWO, FewInt8Config, decode_few_int8
from pallas_kernels.hopper.merge import merge


def quantize_rows(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [..., D] and float32 scales [...] of q [..., D], a scale each row: amax / 127."""
    q = q.astype(jnp.float32)
    amax = jnp.abs(q).max(axis=-1)
    scales = jnp.where(amax > 2.0**-100, amax, 1.0) * (1 / 127)
    return jnp.rint(q / scales[..., None]).astype(jnp.int8), scales


def attend_int8(
    q: jax.Array,
    pages: jax.Array,
    rope_pages: jax.Array,
    scales: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array,
    plan: SplitPlan | None,
    *,
    num_heads: int,
    softmax_scale: float,
    causal: bool,
    config: FewInt8Config | None = None,
    partial_dtype: Any = jnp.float32,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`attention.attend` over an int8 cache with a scale each token.

    Args:
        q: [B, R, D] bfloat16, D = kv_lora_rank + rope_dim; its latent part is quantised here, by
            token and head.
        pages: [num_pages, page_size, kv_lora_rank] int8.
        rope_pages: [num_pages, page_size, rope_dim] bfloat16.
        scales: [num_pages, page_size] float32.
        Others as in `attention.attend`.

    Returns:
        o [B, R, kv_lora_rank] of q's dtype and lse [B, R] float32, natural log.
    """
    batch, rows, _ = q.shape
    latent = pages.shape[2]
    plan = plan_decode(seq_lens, rows) if plan is None else plan
    if config is None:
        config = FewInt8Config(
            plan.rows_per_tile, computing=2 if plan.rows_per_tile <= MOST_ROWS_OF_TWO else 1
        )
    spare = -rows % plan.rows_per_tile
    if spare:
        q = jnp.pad(q, ((0, 0), (0, spare), (0, 0)))
    q_int8, q_scales = quantize_rows(q[..., :latent])
    o = jax.empty_ref(jax.ShapeDtypeStruct((batch, rows + spare, latent), q.dtype))
    lse = jax.empty_ref(jax.ShapeDtypeStruct((batch, rows + spare), jnp.float32))
    partial_o, partial_lse = decode_few_int8(
        q_int8,
        q_scales,
        q[..., latent:],
        pages,
        rope_pages,
        scales,
        block_tables,
        seq_lens,
        query_lens,
        plan,
        o,
        lse,
        num_heads=num_heads,
        softmax_scale=softmax_scale,
        causal=causal,
        config=config,
        partial_dtype=jnp.dtype(partial_dtype),
        interpret=interpret,
    )
    if plan.num_slots:
        merge(o, lse, partial_o, partial_lse, plan, interpret=interpret)
    whole_o, whole_lse = jax.lax.optimization_barrier((o[...], lse[...]))
    return whole_o[:, :rows], whole_lse[:, :rows]
