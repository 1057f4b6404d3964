"""Paged absorbed MLA on a Hopper GPU: what it takes, how it is planned, decode and merge."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.hal import TilePlan
from mla_jax.split_kv import SplitPlan, plan_splits
from pallas_kernels.hopper.decode import decode
from pallas_kernels.hopper.decode_few import decode_few
from pallas_kernels.hopper.merge import merge
from pallas_kernels.hopper.tuning import ROW_GROUP, choose_tile_plan, tile_plan_of_height
from pallas_kernels.hopper.walk import BLOCK

PAGE_SIZES = (16, 64, 128)
RESCALES = {"multiply": "lazy", "exponent_add": "exponent_add"}  # of the op -> of the kernel


def machine_lacks() -> str | None:
    """Why the kernels can't run on the default device; None where they can."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability != "9.0":
        found = f"compute capability {capability}" if capability else device.platform
        return f"it needs an NVIDIA GPU of compute capability 9.0 (H100, H200), here is {found}"
    return None


def num_sms() -> int:
    """SMs of the default device; without a Hopper GPU those of an H100 or H200 SXM."""
    return jax.devices()[0].core_count if machine_lacks() is None else 132


def refuses(
    q_dtype: Any,
    cache_dtype: Any,
    layout: str,
    page_size: int,
    kv_lora_rank: int,
    rope_dim: int,
    rescale: str,
    plan: SplitPlan | None,
) -> str | None:
    """Why the kernels can't take a problem of this kind; None where they can."""
    if jnp.dtype(q_dtype) != jnp.dtype(cache_dtype) or jnp.dtype(q_dtype).itemsize != 2:
        return (
            "it takes q and cache both bfloat16 or both float16, got "
            f"{jnp.dtype(q_dtype).name} and {jnp.dtype(cache_dtype).name}"
        )
    if layout != "ND":
        return f"it takes cache layout ND, got {layout}"
    if page_size not in PAGE_SIZES:
        return f"it takes page sizes {', '.join(map(str, PAGE_SIZES))}, got {page_size}"
    if (kv_lora_rank, rope_dim) != (512, 64):
        return f"it takes kv_lora_rank 512 and rope_dim 64, got {kv_lora_rank} and {rope_dim}"
    heights = (8, 16, 24, 32, 64, 128) if rescale == "multiply" else (64, 128)
    if plan is not None and (plan.block_size != BLOCK or plan.rows_per_tile not in heights):
        return (
            f"with rescale {rescale!r} it takes plans of block_size {BLOCK} and rows_per_tile "
            f"{', '.join(map(str, heights))}, got {plan.block_size} and {plan.rows_per_tile}"
        )
    return None


def plan_decode(
    seq_lens: jax.Array, rows: int, *, rescale: str = "multiply", tiles: TilePlan | None = None
) -> SplitPlan:
    """Equal shares of the work of `rows` query rows a request for this GPU's SMs.

    tiles: of the kernel; None: the tuned ones.
    """
    tiles = tiles or choose_tile_plan(rows, rescale=rescale)
    return plan_splits(
        seq_lens,
        num_workers=num_sms() // tiles.cluster,
        rows=rows,
        rows_per_tile=tiles.rows_per_tile,
        overhead=tiles.split_overhead,
        merge_overhead=tiles.merge_overhead,
    )


def attend(
    q: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array | None,
    plan: SplitPlan | None,
    *,
    num_heads: int,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
    rescale: str = "multiply",
    partial_dtype: Any = jnp.float32,
    tiles: TilePlan | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of R = S_q * num_heads rows a request; row r is token r // num_heads.

    Args:
        q: [B, R, D] bfloat16 or float16.
        pages: [num_pages, page_size, D] of q's dtype, D = kv_lora_rank + rope_dim.
        block_tables: [B, max_pages] int32.
        seq_lens: [B] int32. A request whose lengths or pages can't be gets NaN.
        query_lens: [B] int32, real tokens of each request; None: all.
        plan: for these seq_lens; None: `plan_decode`.
        rescale: "multiply" or "exponent_add" (AMLA's integer add).
        tiles: sizes of the kernel; None: the tuned ones.
        interpret: `plgpu.InterpretGPUParams()` runs the schedule on a CPU.

    Returns:
        o [B, R, kv_lora_rank] of q's dtype and lse [B, R] float32, natural log.
    """
    batch, rows, _ = q.shape
    if plan is None:
        capacity = block_tables.shape[1] * pages.shape[1]
        plan = plan_decode(jnp.clip(seq_lens, 0, capacity), rows, rescale=rescale, tiles=tiles)
    tiles = tiles or tile_plan_of_height(plan.rows_per_tile)
    few = plan.rows_per_tile < BLOCK
    kernel: Any = decode_few if few else functools.partial(decode, rescale=RESCALES[rescale])
    spare = -rows % (plan.rows_per_tile if few else ROW_GROUP)
    if spare:
        q = jnp.pad(q, ((0, 0), (0, spare), (0, 0)))
    o = jax.empty_ref(jax.ShapeDtypeStruct((batch, rows + spare, kv_lora_rank), q.dtype))
    # A tile's lse leaves in one piece, the rows past R included.
    lse_rows = rows + -rows % min(BLOCK, plan.rows_per_tile)
    lse = jax.empty_ref(jax.ShapeDtypeStruct((batch, lse_rows), jnp.float32))
    # The workers of one launch wait for each other, which takes all of them to be resident.
    resident = interpret is None and plan.num_workers * tiles.cluster <= num_sms()
    merges = plan.num_slots > 0 and resident
    # Zeros again at the end: XLA, which takes them for constants, may hand them to every launch.
    counters = jnp.zeros(plan.num_tiles * tiles.cluster, jnp.int32)
    partial_o, partial_lse = kernel(
        q,
        pages,
        block_tables,
        seq_lens,
        query_lens,
        plan,
        counters,
        o,
        lse,
        num_heads=num_heads,
        num_queries=rows // num_heads,
        kv_lora_rank=kv_lora_rank,
        softmax_scale=softmax_scale,
        causal=causal,
        tiles=tiles,
        merges=merges,
        partial_dtype=jnp.dtype(partial_dtype),
        interpret=interpret,
    )
    if plan.num_slots and not merges:
        merge(o, lse, partial_o, partial_lse, plan, interpret=interpret)
    # The barrier keeps XLA from writing the merge's outputs straight into a slice of a larger array
    # (those of a scan, say): its dynamic-slice fusion forgets that they alias the inputs.
    whole_o, whole_lse = jax.lax.optimization_barrier((o[...], lse[...]))
    return whole_o[:, :rows], whole_lse[:, :rows]
