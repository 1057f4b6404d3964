"""Paged absorbed MLA over an int8 latent cache on a Hopper GPU: planned, decoded, merged."""

from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.split_kv import SplitPlan, plan_splits
from pallas_kernels.hopper.attention import num_sms
from pallas_kernels.hopper.decode_few_int8 import MOST_ROWS, FewInt8Config, decode_few_int8
from pallas_kernels.hopper.decode_int8 import Int8Config, decode_int8
from pallas_kernels.hopper.merge import merge
from pallas_kernels.hopper.walk import BLOCK


def plan_decode(seq_lens: jax.Array, rows: int) -> SplitPlan:
    """The plan that suits the kernels: tiles of up to 32 rows, or of 64."""
    few = rows <= MOST_ROWS
    return plan_splits(
        seq_lens,
        num_workers=num_sms(),
        rows=rows,
        rows_per_tile=rows + -rows % 8 if few else BLOCK,
        overhead=2 if few else 5,
    )


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
    query_lens: jax.Array | None,
    plan: SplitPlan | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """`attention.attend` over an int8 cache with a scale each token.

    Args:
        q: [B, R, D] bfloat16, D = kv_lora_rank + rope_dim; its latent part is quantised here, by
            token and head.
        Others as in `attend_quantized`.
    """
    latent = pages.shape[2]
    return attend_quantized(
        *quantize_rows(q[..., :latent]),
        q[..., latent:],
        pages,
        rope_pages,
        scales,
        block_tables,
        seq_lens,
        query_lens,
        plan,
        **options,
    )


def attend_quantized(
    q_int8: jax.Array,
    q_scales: jax.Array,
    q_rope: jax.Array,
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
    config: FewInt8Config | Int8Config | None = None,
    partial_dtype: Any = jnp.float32,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of R = S_q * num_heads rows a request; row r is token r // num_heads.

    Args:
        q_int8: [B, R, kv_lora_rank] int8, the latent part of q in steps of q_scales.
        q_scales: [B, R] float32.
        q_rope: [B, R, rope_dim] bfloat16.
        pages: [num_pages, page_size, kv_lora_rank] int8.
        rope_pages: [num_pages, page_size, rope_dim] bfloat16.
        scales: [num_pages, page_size] float32, a token's latent is its int8 times its scale.
        config: of the kernel; None: what suits the plan.
        Others as in `attention.attend`.

    Returns:
        o [B, R, kv_lora_rank] of q_rope's dtype and lse [B, R] float32, natural log.
    """
    batch, rows, latent = q_int8.shape
    if plan is None:
        capacity = block_tables.shape[1] * pages.shape[1]
        plan = plan_decode(jnp.clip(seq_lens, 0, capacity), rows)
    few = plan.rows_per_tile < BLOCK
    kernel: Any = decode_few_int8 if few else decode_int8
    if config is None:
        config = FewInt8Config.of(plan.rows_per_tile) if few else Int8Config()
    spare = -rows % plan.rows_per_tile
    if spare:
        q_int8, q_rope = (jnp.pad(x, ((0, 0), (0, spare), (0, 0))) for x in (q_int8, q_rope))
        q_scales = jnp.pad(q_scales, ((0, 0), (0, spare)))
    o = jax.empty_ref(jax.ShapeDtypeStruct((batch, rows + spare, latent), q_rope.dtype))
    lse = jax.empty_ref(jax.ShapeDtypeStruct((batch, rows + spare), jnp.float32))
    # As in `attention.attend`: workers that wait for each other must be resident together, and the
    # counters are zeros again at the end.
    merges = plan.num_slots > 0 and interpret is None and plan.num_workers <= num_sms()
    counters = jnp.zeros(plan.num_tiles, jnp.int32)
    partial_o, partial_lse = kernel(
        q_int8,
        q_scales,
        q_rope,
        pages,
        rope_pages,
        scales,
        block_tables,
        seq_lens,
        query_lens,
        plan,
        counters,
        o,
        lse,
        num_heads=num_heads,
        num_queries=rows // num_heads,
        softmax_scale=softmax_scale,
        causal=causal,
        config=config,
        merges=merges,
        partial_dtype=jnp.dtype(partial_dtype),
        interpret=interpret,
    )
    if plan.num_slots and not merges:
        merge(o, lse, partial_o, partial_lse, plan, interpret=interpret)
    # As in `attention.attend`: XLA's dynamic-slice fusion forgets that these alias inputs.
    whole_o, whole_lse = jax.lax.optimization_barrier((o[...], lse[...]))
    return whole_o[:, :rows], whole_lse[:, :rows]
