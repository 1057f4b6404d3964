"""Split-KV planning: divides the work on requests of different lengths into equal shares.

A plan is made of int32 arrays of static shape. The work is a line of tiles, drawn in `line`. Tile
row_tile * B + request is as many KV blocks long as its request, or as a causal mask leaves its rows
(`tile_keys`). Every worker gets a range of the line. Two workers that share a tile split it into
work items, whose partial results are merged. This is known as flash-decoding. Planning runs under
jit on traced lengths, without a loop over work items, so a decode loop traces once.

A range ends at the block edge nearest to an equal share of the cost, by one of the models in
`costs`. An edge that would leave a work item of less than a third of its own overhead moves to the
tile's edge. With an overhead of 5 that is a work item of one block. Moving the edge saves the work
item and its merge, and costs the neighbour a block.

All arithmetic of a balanced plan is in integers, so that a kernel can make the same plan to the bit
(`pallas_kernels.hopper.plan`). All sums are int32, whatever the lengths are. If the cost of all
blocks could exceed int32, the line counts units of 2^k blocks (`line.unit_of`), which keep the sums
in range. Such a plan splits at multiples of the unit, which is 2^-28 of the work or less. It still
covers every block once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.online_softmax import merge_states
from mla_jax.sharding.axes import replicated
from mla_jax.splits.costs import MOST_WORK, SplitCosts, split_costs
from mla_jax.splits.line import BEYOND, LARGEST, Line, find, running_sum, shares, unit_of
from mla_jax.splits.plan import (
    SlowPlanWarning,
    SplitPlan,
    check_plan,
    covered_requests,
    num_blocks,
    require_lengths,
)
from mla_jax.splits.tile_keys import num_heads_of_plan

__all__ = [
    "PAIR_OVERHEAD",
    "SlowPlanWarning",
    "SplitPlan",
    "check_plan",
    "covered_requests",
    "merge_partials",
    "plan_fixed",
    "plan_loads",
    "plan_splits",
]

PAIR_OVERHEAD = 1  # cost of merging a pair's partials through shared memory, in blocks
_MOST_WORKERS = 2**15  # the product of two worker counts fits int32


class Balance(NamedTuple):
    """What a balanced plan is for besides the lengths; hashable, so jit takes it as static."""

    num_workers: int
    costs: SplitCosts
    merge_overhead: int
    in_pairs: bool
    most: int  # blocks that a request has at most
    num_heads: int  # as in SplitPlan

    @property
    def num_partials(self) -> int:
        return 2 * (self.num_workers - 1)


@functools.partial(jax.jit, static_argnums=2)
def balanced_plan(seq_lens: jax.Array, query_lens: jax.Array | None, balance: Balance) -> SplitPlan:
    """Returns the plan of `plan_splits`.

    The candidates are equal shares for 1 .. num_workers workers, twice: with a tile's overhead
    before its blocks, and spread over them.
    """
    num_workers, costs, merge_overhead, in_pairs, most, num_heads = balance
    blocks = num_blocks(seq_lens, costs.block_size)
    unit = unit_of(blocks, most=most, factor=sum(costs.full))
    line = Line.lay(costs.tile_keys(seq_lens, query_lens, num_heads), costs, unit, most)
    counts = jnp.tile(jnp.arange(1, num_workers + 1, dtype=jnp.int32), 2 if costs.overhead else 1)
    spread = jnp.arange(len(counts)) >= num_workers
    candidates = jax.vmap(functools.partial(line.split_evenly, num_workers))(counts, spread)
    # A number of workers below the square root of the number of blocks is not tried: the longest
    # range would have at least that many blocks.
    tried = (counts == num_workers) | ((counts + 1) ** 2 > line.blocks.sum(dtype=jnp.int32))
    largest = jnp.where(tried, jax.vmap(line.largest_load)(candidates), BEYOND)
    splits = jax.vmap(line.inside_tiles)(candidates).sum(axis=1, dtype=jnp.int32)
    best = jnp.argmin(jnp.where(largest == largest.min(), splits, BEYOND))
    boundaries = candidates[best]
    if costs.overhead:
        whole = line.split_at_edges(num_workers)
        least = largest[best] + merge_overhead
        boundaries = jnp.where(line.largest_load(whole) <= least, whole, boundaries)
        if in_pairs:
            least = jnp.minimum(line.largest_load(whole), least)
            halves = line.split_in_pairs(num_workers)
            is_cheaper = line.largest_load(halves) + PAIR_OVERHEAD < least
            boundaries = jnp.where(is_cheaper, halves, boundaries)
    inside = jnp.where(line.inside_tiles(boundaries), boundaries, BEYOND)
    starts = jnp.sort(jnp.append(line.edge, inside[1:]))
    worker_start = find(starts, boundaries)
    return line.plan(starts, worker_start, balance.num_partials, num_heads=num_heads)


def plan_splits(
    seq_lens: jax.Array,
    *,
    num_workers: int,
    rows: int,
    rows_per_tile: int = 64,
    block_size: int = 64,
    cost_model: str = "blocks",
    overhead: int = 5,
    merge_overhead: int = 0,
    in_pairs: bool = False,
    max_seq_len: int | None = None,
    query_lens: jax.Array | None = None,
    num_heads: int | None = None,
    make: Callable[[jax.Array, jax.Array | None, Balance], SplitPlan] = balanced_plan,
) -> SplitPlan:
    """Returns a balanced plan: loads differ by about one overhead and one block at most.

    Args:
        seq_lens: [B] int32. A traced length below 0 counts as 0.
        num_workers: number of CTAs, clusters or cores that run at the same time.
        rows: query rows per request, S * H.
        rows_per_tile: query rows that one worker computes at a time.
        block_size: KV tokens per block.
        cost_model: "blocks" or "fia". The planner tries several numbers of workers and keeps the
            plan whose largest load is smallest. Among equals it prefers fewer split tiles, then
            fewer workers. "blocks" splits no tile where that gains nothing, for example with as
            many equal requests as workers, because whole tiles need no merge.
        overhead: cost of a work item besides its blocks, in blocks. "fia" ignores it.
        merge_overhead: cost of a plan that splits any tile, once, in blocks. The plan of whole
            tiles is kept if its largest load is at most this much larger. "fia" and an
            overhead of 0 ignore it.
        in_pairs: whether workers 2i and 2i + 1 can merge the tiles that only they share at little
            cost, as the CTAs of a cluster can. The planner then also tries a plan that gives whole
            tiles to pairs and halves each pair's range. It keeps that plan if its largest load is
            smaller by more than PAIR_OVERHEAD. "fia" and an overhead of 0 ignore it.
        max_seq_len: largest length that can occur, or None for any. Planning is cheaper if the work
            of all requests at this length fits int32. A longer traced length gets a correct plan in
            which its last work item is too long.
        query_lens: [B] int32, query tokens per request, for causal attention of these alone: a tile
            then has only the blocks that its last token sees. None: for any, with all blocks.
        num_heads: H, query rows per token; not needed without query_lens.
        make: returns the same plan as `balanced_plan`, from checked arguments.

    Returns:
        A plan of num_tiles + num_workers work items and 2 * (num_workers - 1) partials.

    Raises TypeError or ValueError that names the invalid argument.
    """
    costs = split_costs(
        cost_model,
        rows=rows,
        rows_per_tile=rows_per_tile,
        block_size=block_size,
        overhead=overhead,
    )
    if max_seq_len is not None:
        max_seq_len = check_max_seq_len(max_seq_len)
    num_workers = _check(seq_lens, num_workers, costs, max_seq_len)
    merge_overhead = checks.require_int("merge_overhead", merge_overhead, 0)
    if merge_overhead > MOST_WORK // 2:
        raise ValueError(f"merge_overhead must be at most {MOST_WORK // 2}, got {merge_overhead}")
    in_pairs = checks.require_bool("in_pairs", in_pairs)
    if in_pairs and num_workers % 2:
        raise ValueError(f"num_workers must be even with in_pairs, got {num_workers}")
    batch = len(seq_lens)
    num_heads = num_heads_of_plan(query_lens, num_heads, rows=rows, batch=batch, tile=rows_per_tile)
    lengths = _whole(seq_lens), _whole(query_lens) if num_heads else None
    most = math.ceil((max_seq_len or LARGEST) / costs.block_size)
    balance = Balance(num_workers, costs, merge_overhead, in_pairs, most, num_heads)
    return make(*lengths, balance)


def plan_fixed(
    seq_lens: jax.Array,
    *,
    split_size: int,
    max_seq_len: int,
    num_workers: int,
    rows: int,
    rows_per_tile: int = 64,
    block_size: int = 64,
    overhead: int = 5,
) -> SplitPlan:
    """Returns the batch-invariant plan, which splits every request at multiples of split_size.

    The work items of a request depend on its own length alone, and their partials are merged in KV
    order. The rows of a request therefore have the same bits whatever else is in the batch.
    Workers get whole work items, balanced as well as that allows.

    Args:
        split_size: tokens per work item, a multiple of block_size.
        max_seq_len: largest length that can occur, which determines the plan's shape. A longer
            traced length gets a correct plan in which its last work item exceeds split_size.
        seq_lens, num_workers, rows, rows_per_tile, block_size, overhead: as in `plan_splits`, with
            the cost model "blocks".

    Raises TypeError or ValueError that names the invalid argument.
    """
    split_size = checks.require_positive("split_size", split_size)
    max_seq_len = check_max_seq_len(max_seq_len)
    costs = split_costs(
        "blocks", rows=rows, rows_per_tile=rows_per_tile, block_size=block_size, overhead=overhead
    )
    if split_size % costs.block_size:
        raise ValueError(
            f"split_size must be a multiple of block_size = {block_size}, got {split_size}"
        )
    num_workers = _check(seq_lens, num_workers, costs, max_seq_len)
    split_blocks = min(split_size, LARGEST) // costs.block_size
    most = math.ceil(max_seq_len / split_size)
    items = len(seq_lens) * costs.num_row_tiles * most
    if items > MOST_WORK:
        raise ValueError(
            f"max_seq_len / split_size must give at most {MOST_WORK} work items, got {most} for "
            f"each of {items // most} tiles"
        )
    return _plan_fixed(_whole(seq_lens), num_workers, costs, split_blocks, most)


def plan_loads(
    plan: SplitPlan,
    seq_lens: jax.Array,
    *,
    rows: int,
    cost_model: str = "blocks",
    overhead: int = 5,
    query_lens: jax.Array | None = None,
) -> jax.Array:
    """Returns the cost of each worker's work items under a cost model, [W] float32.

    Args:
        plan: from `plan_splits` or `plan_fixed`, for these seq_lens.
        seq_lens, rows, cost_model, overhead: as in `plan_splits`.
        query_lens: those of the plan, if it has num_heads.

    Raises TypeError or ValueError that names the invalid argument.
    """
    check_plan(plan, seq_lens, query_lens)
    costs = split_costs(
        cost_model,
        rows=rows,
        rows_per_tile=plan.rows_per_tile,
        block_size=plan.block_size,
        overhead=overhead,
    )
    if costs.num_row_tiles != plan.num_row_tiles:
        raise ValueError(
            f"rows must be those of the plan, {plan.num_row_tiles} tiles of {plan.rows_per_tile}, "
            f"got {rows}"
        )
    lengths = _whole(seq_lens), jax.tree.map(_whole, query_lens)
    return _plan_loads(jax.tree.map(replicated, plan), *lengths, costs)


def merge_partials(
    plan: SplitPlan, o: jax.Array, partial_o: jax.Array, lse: jax.Array, partial_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs of all tiles, merging the partials of split tiles in KV order.

    Args:
        plan: names the partials of each tile.
        o: [num_tiles, rows_per_tile, D_v]; ignored for split tiles.
        partial_o: [num_partials, rows_per_tile, D_v].
        lse: [num_tiles, rows_per_tile] float32; ignored for split tiles.
        partial_lse: [num_partials, rows_per_tile] float32.

    Returns:
        o [num_tiles, rows_per_tile, D_v] of o's dtype, merged in float32, and lse, float32.
    """
    first, end = plan.tile_partial_start[:-1], plan.tile_partial_start[1:]

    def take(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        partial = jnp.minimum(first + k, partial_lse.shape[0] - 1)
        part = jnp.where((first + k < end)[:, None], partial_lse[partial], -jnp.inf)
        return partial_o[partial].astype(jnp.float32), part

    def add(k: jax.Array, merged: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part_o, part_lse = take(k)
        return merge_states(jnp.stack([merged[0], part_o]), jnp.stack([merged[1], part_lse]))

    merged_o, merged_lse = jax.lax.fori_loop(1, (end - first).max(), add, take(jnp.int32(0)))
    is_split = (end > first)[:, None]
    o = jnp.where(is_split[..., None], merged_o.astype(o.dtype), o)
    return o, jnp.where(is_split, merged_lse, lse)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _plan_fixed(
    seq_lens: jax.Array, num_workers: int, costs: SplitCosts, split_blocks: int, most: int
) -> SplitPlan:
    """Returns the plan of `plan_fixed`: each place is a work item, at most `most` per tile."""
    line = Line.lay(costs.tile_keys(seq_lens), costs, split_blocks, most)
    place = jnp.arange(len(line.blocks) * most, dtype=jnp.int32)
    starts = jnp.where(place < line.length, place, BEYOND)
    num_partials = len(place) if most > 1 else 0
    unbalanced = jnp.zeros(num_workers + 1, jnp.int32)
    plan = line.plan(starts, unbalanced, num_partials, fixed=True)
    # Worker w starts at the first item whose middle is past w equal shares of the cost.
    blocks = jnp.clip(plan.block_end - plan.block_start, 1, split_blocks)
    unit = unit_of(blocks, most=split_blocks, overhead=costs.overhead)
    cost = (blocks - 1) // unit + 1 + (costs.overhead + unit - 1) // unit
    cost = jnp.where(starts < line.length, cost, 0)
    end = running_sum(cost)
    share = shares(end[-1], num_workers, jnp.int32(num_workers))
    worker_start = find(end - (cost + 1) // 2, share).at[-1].set(line.length)
    return dataclasses.replace(plan, worker_start=worker_start)


@functools.partial(jax.jit, static_argnums=3)
def _plan_loads(
    plan: SplitPlan, seq_lens: jax.Array, query_lens: jax.Array | None, costs: SplitCosts
) -> jax.Array:
    keys = costs.tile_keys(seq_lens, query_lens, plan.num_heads)
    tile = plan.row_tile, jnp.maximum(plan.request, 0)
    full, last = (cost.astype(jnp.float32) for cost in costs.block_costs(keys))
    full, last = full[plan.row_tile], last[tile]
    blocks = plan.block_end - plan.block_start
    has_last = (blocks > 0) & (plan.block_end == num_blocks(keys, plan.block_size)[tile])
    cost = np.float32(costs.overhead) + blocks.astype(jnp.float32) * full
    cost = jnp.where(plan.request >= 0, cost + jnp.where(has_last, last - full, 0), 0)
    worker = find(plan.worker_start, jnp.arange(plan.num_items, dtype=jnp.int32), "right") - 1
    return jax.ops.segment_sum(cost, worker, plan.num_workers)  # drops unused items


def _whole(seq_lens: Any) -> Any:
    """Returns lengths that planning may read later, the batch's on every device."""
    return replicated(checks.snapshot(seq_lens))


def _check(seq_lens: Any, num_workers: Any, costs: SplitCosts, max_seq_len: int | None) -> int:
    """Returns num_workers as a Python int; raises unless lengths and workers suit a planner."""
    checks.require_shape("seq_lens", seq_lens, "[B]", None)
    checks.require_int32("seq_lens", seq_lens)
    checks.require_positive("B of seq_lens", seq_lens.shape[0])
    num_workers = checks.require_positive("num_workers", num_workers)
    if num_workers > _MOST_WORKERS:
        raise ValueError(f"num_workers must be at most {_MOST_WORKERS}, got {num_workers}")
    costs.require_work(len(seq_lens))
    require_lengths(seq_lens)
    # In a function that is being traced, np.max of a JAX array would be traced.
    longest = np.max(np.asarray(seq_lens)) if checks.is_concrete(seq_lens) else 0
    if max_seq_len is not None and longest > max_seq_len:
        raise ValueError(f"seq_lens must be at most max_seq_len = {max_seq_len}, got {longest}")
    return num_workers


def check_max_seq_len(max_seq_len: Any) -> int:
    """Returns max_seq_len as a Python int; raises unless it is a positive int32."""
    max_seq_len = checks.require_positive("max_seq_len", max_seq_len)
    if max_seq_len > LARGEST:
        raise ValueError(f"max_seq_len must be at most {LARGEST}, got {max_seq_len}")
    return max_seq_len
