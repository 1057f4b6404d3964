"""Paged absorbed MLA on a Hopper GPU: what it takes, how it is planned, decode and merge."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.cache import PagedKVCache
from mla_jax.hal import TilePlan, TilePlanError
from mla_jax.splits.planner import SlowPlanWarning, SplitPlan, plan_splits
from pallas_kernels.hopper.kernels.decode import decode
from pallas_kernels.hopper.kernels.decode_transposed import decode_transposed
from pallas_kernels.hopper.kernels.merge import merge
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs, Requests
from pallas_kernels.hopper.tuning import (
    ROW_GROUP,
    choose_tile_plan,
    tile_heights,
    tile_plan_of_height,
)
from pallas_kernels.hopper.work_items import BLOCK, work_list
from pallas_kernels.modes import jit_with_defaults

PAGE_SIZES = {  # by what the cache holds
    "float": (1, 2, 4, 8, 16, 32, 64, 128),
    "int8": (64, 128),
}
RESCALES = {"multiply": "lazy", "exponent_add": "exponent_add"}  # of the op -> of the kernel


def card() -> jax.Device | None:
    """The first NVIDIA GPU of this machine, the default device or not; None: it has none."""
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        return None


def target_lacks(platform: str, device: jax.Device | None) -> str | None:
    """Why a program for that platform can't have the kernels; None where it can.

    device: that the program is for; None: not known, e.g. where it is exported.
    """
    if platform == "cuda" and device is None:
        return None
    capability = getattr(device, "compute_capability", None)
    if platform != "cuda" or capability != "9.0":
        found = f"compute capability {capability}" if capability else platform
        return f"it needs an NVIDIA GPU of compute capability 9.0 (H100, H200), here is {found}"
    return None


def machine_lacks() -> str | None:
    """Why the kernels can't run on this machine; None where they can."""
    device = card()
    return target_lacks("cuda" if device else jax.devices()[0].platform, device)


def num_sms() -> int:
    """SMs to plan for: of this machine's GPU; without a Hopper GPU those of an H100 or H200 SXM."""
    return resident_ctas() or 132


def resident_ctas() -> int:
    """CTAs that certainly run at the same time, one on each SM of this machine's Hopper GPU.

    0 where it has none: a program that is exported here may run on a card with fewer SMs than
    `num_sms` assumes.
    """
    device = card()
    return device.core_count if device is not None and machine_lacks() is None else 0


def refuses(q_dtype: Any, cache: PagedKVCache, rescale: str, plan: SplitPlan | None) -> str | None:
    """Why the kernels can't take a problem of this kind; None where they can."""
    q_dtype = jnp.dtype(q_dtype)
    kind = "float" if cache.scale_granularity is None else "int8"
    if kind == "int8":
        if q_dtype != jnp.bfloat16:
            return f"over an int8 cache it takes q bfloat16, got {q_dtype.name}"
        if cache.scale_granularity != "token":
            return f"it takes an int8 cache with scales per token, got {cache.scale_granularity!r}"
        if rescale != "multiply":
            return f"over an int8 cache it takes rescale 'multiply', got {rescale!r}"
    elif q_dtype != cache.dtype or q_dtype.itemsize != 2:
        return (
            "it takes q and cache both bfloat16 or both float16, got "
            f"{q_dtype.name} and {cache.dtype.name}"
        )
    if cache.layout != "ND":
        return f"it takes cache layout ND, got {cache.layout}"
    if cache.page_size not in PAGE_SIZES[kind]:
        sizes = ", ".join(map(str, PAGE_SIZES[kind]))
        return f"it takes page sizes {sizes} of a cache of {kind}, got {cache.page_size}"
    heights = tile_heights(kind, rescale=rescale)
    latent, rope = cache.kv_lora_rank, cache.rope_dim
    try:
        for height in heights:
            tile_plan_of_height(height, cache=kind, kv_lora_rank=latent, rope_dim=rope)
    except TilePlanError as error:
        return f"its tiles can't have these widths: {error}"
    if plan is not None and (plan.block_size != BLOCK or plan.rows_per_tile not in heights):
        return (
            f"with rescale {rescale!r} and a cache of {kind} it takes plans of block_size {BLOCK} "
            f"and rows_per_tile {', '.join(map(str, heights))}, got {plan.block_size} and "
            f"{plan.rows_per_tile}"
        )
    return None


def plan_decode(
    seq_lens: jax.Array,
    rows: int,
    *,
    capacity: int | None = None,
    cache: str = "float",
    rescale: str = "multiply",
    tiles: TilePlan | None = None,
) -> SplitPlan:
    """Equal shares of the work of `rows` query rows a request for this GPU's SMs.

    capacity: tokens that a request's block table reaches, if that is known: few short requests get
    other tiles. tiles: of the kernel; None: the tuned ones for a cache of "float" or "int8".
    """
    tiles = tiles or choose_tile_plan(
        rows, batch=seq_lens.shape[0], capacity=capacity, cache=cache, rescale=rescale
    )
    return plan_splits(
        seq_lens,
        num_workers=_workers_for(tiles),
        rows=rows,
        rows_per_tile=tiles.rows_per_tile,
        overhead=tiles.split_overhead,
        merge_overhead=tiles.merge_overhead,
        in_pairs=tiles.pairs,
        max_seq_len=None if capacity is None else min(capacity, 2**31 - 1),
    )


def warn_if_slow(
    plan: SplitPlan, rows: int, *, capacity: int, cache: str = "float", rescale: str = "multiply"
) -> None:
    """Warns, with SlowPlanWarning, of a plan with other tiles or workers than `plan_decode` takes.

    A plan of `plan_fixed` may have the tiles that suit an unknown batch: it is for results that do
    not depend on the batch. Arguments as in `plan_decode`.
    """
    batch = plan.num_tiles // plan.num_row_tiles
    choose = functools.partial(choose_tile_plan, rows, cache=cache, rescale=rescale)
    best = choose(batch=batch, capacity=capacity)
    if plan.fixed and plan.rows_per_tile != best.rows_per_tile:
        best = choose()
    workers = _workers_for(best)
    if (plan.rows_per_tile, plan.num_workers) == (best.rows_per_tile, workers):
        return
    warnings.warn(
        f"plan has rows_per_tile {plan.rows_per_tile} and {plan.num_workers} workers, with which "
        f"the kernel is slower than it can be: for {batch} requests of {rows} rows and up to "
        f"{capacity} keys it is tuned for rows_per_tile {best.rows_per_tile} and {workers} "
        "workers. With plan=None it plans for itself",
        SlowPlanWarning,
        stacklevel=2,
    )


def _workers_for(tiles: TilePlan) -> int:
    """Workers of this GPU: CTAs or clusters, in pairs an even number of them."""
    workers = num_sms() // tiles.cluster
    return workers - workers % 2 if tiles.pairs else workers


@jit_with_defaults(
    "num_heads",
    "kv_lora_rank",
    "softmax_scale",
    "causal",
    "rescale",
    "partial_dtype",
    "tiles",
    "interpret",
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
    partial_dtype: Any = None,
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
        partial_dtype: of the pieces of cut tiles; None: float16 of bfloat16 tiles of 64 rows and
            more, which hold it in units, so that it adds an eighth of what rounding o does to
            the error; else float32.
        tiles: sizes of the kernel; None: the tuned ones.
        interpret: `plgpu.InterpretGPUParams()` runs the schedule on a CPU.

    Returns:
        o [B, R, kv_lora_rank] of q's dtype and lse [B, R] float32, natural log.
    """
    rows = q.shape[1]
    capacity = block_tables.shape[1] * pages.shape[1]
    if plan is None:
        lengths = jnp.clip(seq_lens, 0, capacity)
        plan = plan_decode(lengths, rows, capacity=capacity, rescale=rescale, tiles=tiles)
    elif tiles is None:
        warn_if_slow(plan, rows, capacity=capacity, rescale=rescale)
    tiles = tiles or tile_plan_of_height(
        plan.rows_per_tile,
        num_tiles=plan.num_tiles,
        kv_lora_rank=kv_lora_rank,
        rope_dim=q.shape[2] - kv_lora_rank,
    )
    transposed = plan.rows_per_tile < BLOCK
    if partial_dtype is None:
        exact = transposed or q.dtype == jnp.float16
        partial_dtype = jnp.float32 if exact else jnp.float16
    return launch(
        decode_transposed if transposed else decode,
        pad_rows(q, plan.rows_per_tile if transposed else ROW_GROUP),
        (pages,),
        block_tables,
        seq_lens,
        query_lens,
        plan,
        rows=rows,
        kv_lora_rank=kv_lora_rank,
        num_heads=num_heads,
        tiles=tiles,
        partial_dtype=partial_dtype,
        interpret=interpret,
        softmax_scale=softmax_scale,
        causal=causal,
        rescale=RESCALES[rescale],
    )


def pad_rows(q: jax.Array, multiple: int) -> jax.Array:
    """q [B, R, D] with rows of zeros behind it, up to a multiple."""
    spare = -q.shape[1] % multiple
    return jnp.pad(q, ((0, 0), (0, spare), (0, 0))) if spare else q


def launch(
    kernel: Callable[[DecodeCall], tuple[jax.Array, ...]],
    q: jax.Array,
    cache: tuple[jax.Array, ...],
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array | None,
    plan: SplitPlan,
    *,
    rows: int,
    num_heads: int,
    tiles: TilePlan,
    partial_dtype: Any,
    interpret: Any,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs a decode kernel, which combines the tiles that the plan has split, or else `merge`.

    Args:
        q: [B, rows or more, D]; cache: the cache's arrays.
        rows: R, how many rows of q are real.
        options: fields of the `DecodeCall`. Others as in `attend`.

    Returns:
        o and lse as `attend` does.
    """
    o, lse = new_outputs(q.shape[0], rows, options["kv_lora_rank"], q.dtype)
    # The workers of one launch wait for each other, so all of them have to run at the same time.
    # Where that is not certain, `merge` is a launch of its own, in which nothing waits.
    ctas = (plan.num_workers + plan.num_workers % 2 * tiles.pairs) * tiles.cluster
    resident = interpret is None and ctas <= resident_ctas()
    combines = plan.num_partials > 0 and resident
    finish = "in_pairs" if tiles.pairs else "merge"
    # A worker that waits for a partial needs the other worker to run at the same time. The
    # interpreter runs one cluster after the other, the one that is waited for first.
    if tiles.cluster > 1 and (combines or interpret is not None):
        finish = "by_first"
    work = work_list(plan, finish)
    # The kernel leaves zeros: XLA takes these for constants and may pass them to every launch.
    counters = jnp.zeros(plan.num_tiles * tiles.cluster, jnp.int32)
    call = DecodeCall(
        q=q,
        cache=cache,
        requests=Requests(block_tables, seq_lens, query_lens, work, counters),
        outputs=Outputs(o, lse),
        plan=plan,
        num_heads=num_heads,
        num_queries=rows // num_heads,
        tiles=tiles,
        combines=combines,
        partial_dtype=jnp.dtype(partial_dtype),
        interpret=interpret,
        **options,
    )
    partials = kernel(call)
    if plan.num_partials and not combines:
        merge(o, lse, partials, plan, work, num_rows=rows, interpret=interpret)
    # The barrier keeps XLA from writing the merge's outputs straight into a slice of a larger array
    # (those of a scan, say): its dynamic-slice fusion forgets that they alias the inputs.
    return jax.lax.optimization_barrier((o[...], lse[...]))


def new_outputs(batch: int, rows: int, kv_lora_rank: int, dtype: Any) -> tuple[Any, Any]:
    """References to o [B, R, kv_lora_rank] and lse [B, R], which kernels fill; uninitialised."""
    o = jax.ShapeDtypeStruct((batch, rows, kv_lora_rank), dtype)
    lse = jax.ShapeDtypeStruct((batch, rows), jnp.float32)
    return jax.empty_ref(o), jax.empty_ref(lse)
