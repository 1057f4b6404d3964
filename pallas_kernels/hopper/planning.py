"""What the Hopper kernels take, and the decode plans that they run."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax import checks
from mla_jax.cache import PagedKVCache
from mla_jax.hal import PROFILES, HardwareProfile, TilePlanError
from mla_jax.splits.decode_plan import DecodePlan
from mla_jax.splits.plan import SlowPlanWarning, SplitPlan
from mla_jax.splits.planner import plan_splits
from pallas_kernels.hopper import device
from pallas_kernels.hopper.choice import tiles_for
from pallas_kernels.hopper.config import KernelConfig
from pallas_kernels.hopper.plan.where_lowered import plan_where_lowered
from pallas_kernels.hopper.tuned import choose_config, config_of_height, tile_heights
from pallas_kernels.hopper.work_items import BLOCK, WorkList, finish_of, new_counters, work_list

PAGE_SIZES = {  # by what the cache holds
    "float": (1, 2, 4, 8, 16, 32, 64, 128),
    "int8": (64, 128),
}
_MOST_KEYS = 2**31 - 1


def kind_of(cache: PagedKVCache) -> str:
    """Returns which kernels a cache takes: "float" for 16-bit caches, "int8"."""
    return "float" if cache.scale_granularity is None else "int8"


def refuses(q_dtype: Any, cache: PagedKVCache, rescale: str, plan: DecodePlan | None) -> str | None:
    """Returns why the kernels can't take a problem of this kind; None where they can."""
    q_dtype = jnp.dtype(q_dtype)
    kind = kind_of(cache)
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
            config_of_height(height, cache=kind, kv_lora_rank=latent, rope_dim=rope)
    except TilePlanError as error:
        return f"its tiles can't have these widths: {error}"
    if plan is None:
        return None
    return _refuses_plan(plan, heights, kind, rescale) or _refuses_tiles(plan, kind, latent, rope)


def _refuses_plan(
    plan: DecodePlan, heights: tuple[int, ...], kind: str, rescale: str
) -> str | None:
    split = plan.split
    if split.block_size != BLOCK or split.rows_per_tile not in heights:
        return (
            f"with rescale {rescale!r} and a cache of {kind} it takes plans of block_size {BLOCK} "
            f"and rows_per_tile {', '.join(map(str, heights))}, got {split.block_size} and "
            f"{split.rows_per_tile}"
        )
    return None


def refuses_sms(plan: DecodePlan, num_sms: int) -> str | None:
    """Returns why a plan is not for a GPU of so many SMs; None where it is.

    Fewer SMs than the GPU has are taken where the caller chose them: the number is not that of the
    profile with the plan's name. A plan for H100_SXM5 is also one for an H200, which has as many.
    """
    published = PROFILES.get(plan.profile or "")
    if plan.num_sms in (0, num_sms) or (
        plan.num_sms < num_sms and (published is None or published.cores != plan.num_sms)
    ):
        return None
    return (
        f"the plan is for {plan.num_sms} SMs (profile {plan.profile}), and the GPU that the "
        f"program is for has {num_sms}"
    )


def refuses_shared_memory(plan: DecodePlan, bytes_of_gpu: int | None) -> str | None:
    """Returns why a plan's tiles do not fit a GPU; None where they do, or it is not known.

    bytes_of_gpu: shared memory that a CTA can have.
    """
    needed = 0 if plan.tiles is None else plan.tiles.shared_memory_bytes
    if not bytes_of_gpu or needed <= bytes_of_gpu:
        return None
    return (
        f"the plan's tiles (profile {plan.profile}) take {needed} bytes of shared memory, and the "
        f"GPU that the program is for has {bytes_of_gpu}"
    )


def _refuses_tiles(plan: DecodePlan, kind: str, kv_lora_rank: int, rope_dim: int) -> str | None:
    """Returns why a plan's tiles are not for a cache of this kind and these widths, or None.

    The number of stages and the profile may be others than the table's.
    """
    if plan.tiles is None:
        return None
    wanted = config_of_height(
        plan.split.rows_per_tile, cache=kind, kv_lora_rank=kv_lora_rank, rope_dim=rope_dim
    )
    fields = ("rows_per_tile", "kv_lora_rank", "rope_dim")
    if type(plan.tiles) is type(wanted) and all(
        getattr(plan.tiles, field) == getattr(wanted, field) for field in fields
    ):
        return None
    return (
        f"the plan's tiles are for another cache than this one of {kind} with kv_lora_rank "
        f"{kv_lora_rank} and rope_dim {rope_dim}: make the plan with this cache"
    )


def plan_decode(
    seq_lens: jax.Array,
    rows: int,
    *,
    capacity: int | None = None,
    cache: str = "float",
    rescale: str = "multiply",
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
    tiles: KernelConfig | None = None,
    profile: HardwareProfile | None = None,
    query_lens: jax.Array | None = None,
    num_heads: int | None = None,
    clip: bool = False,
) -> DecodePlan:
    """Returns the plan with which the kernels are fastest on a batch, in equal shares per SM.

    On a Hopper GPU one kernel makes it, for up to `plan.call.MOST_TILES` tiles of all requests
    together. JAX makes larger plans, and plans on other platforms.

    Args:
        seq_lens: [B] int32, keys per request.
        rows: query rows per request: query tokens times heads.
        capacity: keys that a request's block table reaches; None: not known. A few short requests
            get other tiles.
        cache: "float" (16 bits) or "int8".
        rescale: "multiply" or "exponent_add".
        tiles: config of the kernel; None: that of `choice.tiles_for` for the profile.
        profile: of the GPU; None: of this machine's Hopper GPU, or else of an H200.
        query_lens, num_heads: as in `plan_splits`.
        clip: whether a length that is not in 0 .. capacity counts as the nearest that is.
    """
    if tiles is None:
        tiles, _ = tiles_for(
            rows,
            batch=seq_lens.shape[0],
            capacity=capacity,
            cache=cache,
            rescale=rescale,
            profile=profile or device.profile(),
            kv_lora_rank=kv_lora_rank,
            rope_dim=rope_dim,
        )
    sms = device.num_sms() if profile is None else profile.cores
    longest = min(capacity, _MOST_KEYS) if capacity is not None and clip else _MOST_KEYS
    finish = finish_of(tiles, workers_may_wait=True)  # they may on the GPU that the plan is for
    work: list[jax.Array] = []

    def make(*lens_and_balance: Any) -> SplitPlan:
        split, *work[:] = plan_where_lowered(*lens_and_balance, finish=finish, longest=longest)
        return split

    split = plan_splits(
        seq_lens,
        num_workers=tiles.num_workers(sms),
        rows=rows,
        rows_per_tile=tiles.rows_per_tile,
        overhead=tiles.split_overhead,
        merge_overhead=tiles.merge_overhead,
        in_pairs=tiles.in_pairs,
        max_seq_len=None if capacity is None else min(capacity, _MOST_KEYS),
        query_lens=query_lens,
        num_heads=num_heads,
        make=make,
    )
    counters = new_counters(split.num_tiles, tiles.ctas_per_tile)
    return DecodePlan(split, tiles, sms, (*work, counters), finish)


def work_of(plan: DecodePlan, finish: str) -> WorkList:
    """Returns a plan's work list: the one that it has, if it is for this finish, or a new one.

    Raises ValueError where the shapes of the one that it has are those of another split.
    """
    make = functools.partial(work_list, finish=finish, ctas_per_tile=plan.tiles.ctas_per_tile)
    if plan.work is None or plan.finish != finish:
        return make(plan.split)
    got, wanted = WorkList(*plan.work), jax.eval_shape(make, plan.split)
    for name, array, struct in zip(WorkList._fields, got, wanted, strict=True):
        checks.require_shape(f"plan.work ({name})", array, "[that of plan.split]", *struct.shape)
    return got


def with_tiles(
    plan: DecodePlan | SplitPlan, *, cache: str, kv_lora_rank: int, rope_dim: int
) -> DecodePlan:
    """Returns a plan that has tiles: those that it has, or the tuned ones for its split."""
    if isinstance(plan, DecodePlan) and plan.tiles is not None:
        return plan
    split = plan.split if isinstance(plan, DecodePlan) else plan
    tiles = config_of_height(
        split.rows_per_tile,
        num_tiles=split.num_tiles,
        cache=cache,
        kv_lora_rank=kv_lora_rank,
        rope_dim=rope_dim,
    )
    return DecodePlan(split, tiles, device.num_sms())


def warn_if_slow(
    plan: SplitPlan, rows: int, *, capacity: int, cache: str = "float", rescale: str = "multiply"
) -> None:
    """Warns, with SlowPlanWarning, of a plan with other tiles or workers than `plan_decode` takes.

    A plan of `plan_fixed` may have the tiles that suit an unknown batch: it is for results that do
    not depend on the batch. Arguments as in `plan_decode`.
    """
    batch = plan.num_tiles // plan.num_row_tiles
    kind: dict[str, Any] = {"cache": cache, "rescale": rescale}
    profile = device.profile()
    best, _ = tiles_for(rows, batch=batch, capacity=capacity, profile=profile, **kind)
    if plan.fixed and plan.rows_per_tile != best.rows_per_tile:
        best = choose_config(rows, **kind)
    workers = best.num_workers(device.num_sms())
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
