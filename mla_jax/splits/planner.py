"""Split-KV planning: ragged work cut into equal shares, as int32 arrays of static shape.

The work is a line: tile after tile, tile t = row_tile * B + request, each as many KV
blocks long as its request. Every worker takes a stretch of the line; a tile that two workers
share is cut into pieces, whose partial results are merged (flash-decoding). Everything here runs
under jit on traced lengths, without a loop over pieces, so that a decode loop plans on the device
once a step and traces once.

Cuts lie at the block edge nearest to an equal share of the cost (`split_costs` has the models).
One that would leave a piece of less than a third of its own overhead (with 5: a single block)
moves to the tile's edge: that saves a piece and its merge, and costs the neighbour a block.

All sums are int32 whatever the lengths are. Where the cost of all blocks could leave it, blocks
are counted in units of a power of two of them, the smallest with which it does not: such a plan
cuts at multiples of the unit, 2^-30 of the work or less, and still takes every block once.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.online_softmax import merge_states
from mla_jax.splits.costs import MOST_WORK, SplitCosts, split_costs
from mla_jax.splits.line import Line, find, running_sum, shares, to_float32
from mla_jax.splits.plan import (
    SlowPlanWarning,
    SplitPlan,
    check_plan,
    covered_requests,
    num_blocks,
    require_lengths,
)

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

PAIR_OVERHEAD = 1  # blocks that it costs two workers to merge in their shared memories
_MOST_WORKERS = 2**15  # so that the product of two counts of workers is an int32
_MOST_COST = 2**30  # of the blocks on a line; MOST_WORK more is still an int32
_LARGEST = 2**31 - 1
_BEYOND = np.int32(_LARGEST)  # sorts behind every place on the line


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
) -> SplitPlan:
    """A balanced plan: shares that are equal within about one overhead and one block.

    Args:
        seq_lens: [B] int32, may be traced, and then below 0 counts as 0.
        num_workers: what runs at a time (CTAs, clusters, cores).
        rows: query rows of a request, S_q * H.
        rows_per_tile: rows that one worker holds at a time.
        block_size: KV tokens a block.
        cost_model: "blocks" or "fia". Of the worker counts tried, the plan with the smallest
            maximum is kept, among equals the one with the fewest cuts, then the fewest workers.
            "blocks" cuts no tile where that gains nothing (as many equal requests as workers,
            say), which spares the merge.
        overhead: of a piece, in blocks; "fia" has none and takes no notice.
        merge_overhead: what it costs, once and in blocks, that tiles are cut at all: the plan of
            whole tiles is kept if it is no more than that behind. Not of "fia".
        in_pairs: workers 2i and 2i + 1 merge what only they share at next to no cost (a cluster's
            CTAs, through their shared memories): whole tiles for pairs are tried, too, each pair's
            cut in the middle, and kept if more than PAIR_OVERHEAD cheaper. Like whole tiles, not
            with an overhead of 0 or "fia".
        max_seq_len: the longest length there may be, if that is known, which makes planning
            cheaper where the work of all requests of that length fits int32; None: any. If a
            traced length is past it, its last piece is longer: right, but not balanced.

    Returns:
        A plan of num_tiles + num_workers pieces and 2 * (num_workers - 1) slots.

    Raises TypeError or ValueError naming the argument that can't be.
    """
    costs = split_costs(
        cost_model,
        rows=rows,
        rows_per_tile=rows_per_tile,
        block_size=block_size,
        overhead=overhead,
    )
    if max_seq_len is not None:
        max_seq_len = _check_max_seq_len(max_seq_len)
    num_workers = _check(seq_lens, num_workers, costs, max_seq_len)
    merge_overhead = checks.require_int("merge_overhead", merge_overhead, 0)
    if merge_overhead > MOST_WORK // 2:
        raise ValueError(f"merge_overhead must be at most {MOST_WORK // 2}, got {merge_overhead}")
    in_pairs = checks.require_bool("in_pairs", in_pairs)
    if in_pairs and num_workers % 2:
        raise ValueError(f"num_workers must be even where they are in pairs, got {num_workers}")
    seq_lens = checks.snapshot(seq_lens)
    most = math.ceil((max_seq_len or _LARGEST) / costs.block_size)
    return _plan_splits(seq_lens, num_workers, costs, merge_overhead, in_pairs, most)


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
    """The batch-invariant plan: a request is cut at multiples of split_size tokens, always.

    What a request is cut into depends on its own length alone, and pieces are merged in KV order,
    so its rows have the same bits whatever else is in the batch. Workers get whole pieces, balanced
    as well as that allows.

    Args:
        split_size: tokens, a multiple of block_size.
        max_seq_len: the longest length there may be; it fixes the plan's shape.
        seq_lens, num_workers, rows, rows_per_tile, block_size, overhead: as in `plan_splits`, with
            the cost model "blocks".

    Raises TypeError or ValueError naming the argument that can't be. If a traced length is past
    max_seq_len, its last piece is longer than split_size: right, but not balanced.
    """
    split_size = checks.require_positive("split_size", split_size)
    max_seq_len = _check_max_seq_len(max_seq_len)
    costs = split_costs(
        "blocks", rows=rows, rows_per_tile=rows_per_tile, block_size=block_size, overhead=overhead
    )
    if split_size % costs.block_size:
        raise ValueError(
            f"split_size must be a multiple of block_size = {block_size}, got {split_size}"
        )
    num_workers = _check(seq_lens, num_workers, costs, max_seq_len)
    split_blocks = min(split_size, _LARGEST) // costs.block_size
    most = math.ceil(max_seq_len / split_size)
    pieces = len(seq_lens) * costs.num_row_tiles * most
    if pieces > MOST_WORK:
        raise ValueError(
            f"max_seq_len / split_size must give at most {MOST_WORK} pieces, got {most} for each "
            f"of {pieces // most} tiles"
        )
    return _plan_fixed(checks.snapshot(seq_lens), num_workers, costs, split_blocks, most)


def plan_loads(
    plan: SplitPlan,
    seq_lens: jax.Array,
    *,
    rows: int,
    cost_model: str = "blocks",
    overhead: int = 5,
) -> jax.Array:
    """[W] float32: what each worker's pieces cost under a model.

    Args:
        plan: from `plan_splits` or `plan_fixed`, for these seq_lens.
        seq_lens, rows, cost_model, overhead: as in `plan_splits`.

    Raises TypeError or ValueError naming the argument that can't be.
    """
    check_plan(plan, seq_lens)
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
    return _plan_loads(plan, checks.snapshot(seq_lens), costs)


def merge_partials(
    plan: SplitPlan, o: jax.Array, partial_o: jax.Array, lse: jax.Array, partial_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Outputs of all tiles: as they are, or for cut tiles the merge of their slots in KV order.

    Args:
        o: [num_tiles, rows_per_tile, D_v]; of cut tiles anything.
        partial_o: [slots, rows_per_tile, D_v].
        lse: [num_tiles, rows_per_tile] float32; of cut tiles anything.
        partial_lse: [slots, rows_per_tile] float32.

    Returns o (o's dtype, merged in float32) and lse.
    """
    first, end = plan.tile_partial_start[:-1], plan.tile_partial_start[1:]

    def take(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        slot = jnp.minimum(first + k, partial_lse.shape[0] - 1)
        part = jnp.where((first + k < end)[:, None], partial_lse[slot], -jnp.inf)
        return partial_o[slot].astype(jnp.float32), part

    def add(k: jax.Array, merged: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part_o, part_lse = take(k)
        return merge_states(jnp.stack([merged[0], part_o]), jnp.stack([merged[1], part_lse]))

    merged_o, merged_lse = jax.lax.fori_loop(1, (end - first).max(), add, take(jnp.int32(0)))
    cut = (end > first)[:, None]
    o = jnp.where(cut[..., None], merged_o.astype(o.dtype), o)
    return o, jnp.where(cut, merged_lse, lse)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _plan_splits(
    seq_lens: jax.Array,
    num_workers: int,
    costs: SplitCosts,
    merge_overhead: int,
    in_pairs: bool,
    most: int,
) -> SplitPlan:
    """The plan of `plan_splits`; most: blocks of a request."""
    blocks = num_blocks(seq_lens, costs.block_size)
    total = to_float32(blocks).sum() * np.float32(sum(costs.full))
    unit = _unit(total, len(seq_lens) * most * sum(costs.full))
    line = Line.lay(seq_lens, costs, unit, most)
    counts = jnp.tile(jnp.arange(1, num_workers + 1, dtype=jnp.int32), 2 if costs.overhead else 1)
    spread = jnp.arange(len(counts)) >= num_workers
    all_cuts = jax.vmap(functools.partial(line.cut, num_workers))(counts, spread)
    fewest = jnp.sqrt(to_float32(line.blocks.sum(dtype=jnp.int32))).astype(jnp.int32)
    tried = counts >= jnp.minimum(fewest, num_workers)
    largest = jnp.where(tried, jax.vmap(line.largest_load)(all_cuts), _BEYOND)
    inner = jax.vmap(line.inner)(all_cuts).sum(axis=1, dtype=jnp.int32)
    cuts = all_cuts[jnp.argmin(jnp.where(largest == largest.min(), inner, _BEYOND))]
    if costs.overhead:
        whole = line.cut_at_edges(num_workers)
        least = line.largest_load(cuts) + merge_overhead
        cuts = jnp.where(line.largest_load(whole) <= least, whole, cuts)
        if in_pairs:
            least = jnp.minimum(line.largest_load(whole), least)
            halves = line.cut_in_pairs(num_workers)
            cuts = jnp.where(line.largest_load(halves) + PAIR_OVERHEAD < least, halves, cuts)
    starts = jnp.sort(jnp.append(line.edge, jnp.where(line.inner(cuts), cuts, _BEYOND)[1:]))
    return _assemble(line, starts, find(starts, cuts), 2 * (num_workers - 1))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _plan_fixed(
    seq_lens: jax.Array, num_workers: int, costs: SplitCosts, split_blocks: int, most: int
) -> SplitPlan:
    """The plan of `plan_fixed`: every place on the line is a piece; most: pieces of a tile."""
    line = Line.lay(seq_lens, costs, split_blocks, most)
    place = jnp.arange(len(line.blocks) * most, dtype=jnp.int32)
    starts = jnp.where(place < line.length, place, _BEYOND)
    num_partials = len(place) if most > 1 else 0
    unbalanced = jnp.zeros(num_workers + 1, jnp.int32)
    plan = _assemble(line, starts, unbalanced, num_partials, fixed=True)
    # Worker w starts at the first piece whose middle lies past w equal shares of the cost.
    blocks = jnp.clip(plan.block_end - plan.block_start, 1, split_blocks)
    total = to_float32(blocks).sum() + np.float32(len(place) * costs.overhead)
    unit = _unit(total, len(place) * (split_blocks + costs.overhead))
    cost = (blocks - 1) // unit + 1 + (costs.overhead + unit - 1) // unit
    cost = jnp.where(starts < line.length, cost, 0)
    end = running_sum(cost)
    share = shares(end[-1], num_workers, jnp.int32(num_workers))
    worker_start = find(end - (cost + 1) // 2, share).at[-1].set(line.length)
    return dataclasses.replace(plan, worker_start=worker_start)


@functools.partial(jax.jit, static_argnums=2)
def _plan_loads(plan: SplitPlan, seq_lens: jax.Array, costs: SplitCosts) -> jax.Array:
    seq_lens = jnp.maximum(seq_lens, 0)
    request = jnp.maximum(plan.request, 0)
    full, last = (to_float32(cost) for cost in costs.block_costs(seq_lens))
    full, last = full[plan.row_tile], last[request, plan.row_tile]
    blocks = plan.block_end - plan.block_start
    has_last = (blocks > 0) & (plan.block_end == num_blocks(seq_lens, plan.block_size)[request])
    cost = np.float32(costs.overhead) + to_float32(blocks) * full
    cost = jnp.where(plan.request >= 0, cost + jnp.where(has_last, last - full, 0), 0)
    worker = find(plan.worker_start, jnp.arange(plan.num_items, dtype=jnp.int32), "right") - 1
    return jax.ops.segment_sum(cost, worker, plan.num_workers)  # drops unused pieces


def _assemble(
    line: Line, starts: jax.Array, worker_start: jax.Array, num_partials: int, fixed: bool = False
) -> SplitPlan:
    """The plan whose pieces start at the sorted places `starts` (unused ones: _BEYOND)."""
    batch = len(line.blocks) // line.costs.num_row_tiles
    used = starts < line.length
    tile = jnp.where(used, line.tile_at(starts), 0)
    begin = jnp.where(used, starts - line.edge[tile], 0)
    until = jnp.minimum(jnp.append(starts[1:], _BEYOND), line.length)
    end = jnp.where(used, jnp.minimum(until - line.edge[tile], line.blocks[tile]), 0)
    partial = used & ((begin > 0) | (end < line.blocks[tile]))
    slots = running_sum(partial)
    before = jnp.append(jnp.zeros(1, jnp.int32), slots)
    to_tile_end = used & (end == line.blocks[tile])
    return SplitPlan(
        request=jnp.where(used, tile % batch, -1),
        row_tile=jnp.where(used, tile // batch, 0),
        block_start=begin * line.unit,
        block_end=jnp.where(to_tile_end, line.kv_blocks[tile], end * line.unit),
        partial=jnp.where(partial, slots - 1, -1),
        worker_start=worker_start,
        tile_partial_start=before[find(starts, jnp.append(line.edge, line.length))],
        block_size=line.costs.block_size,
        rows_per_tile=line.costs.rows_per_tile,
        num_row_tiles=line.costs.num_row_tiles,
        num_partials=num_partials,
        fixed=fixed,
    )


def _check(seq_lens: Any, num_workers: Any, costs: SplitCosts, max_seq_len: int | None) -> int:
    """The number of workers as a Python int, if lengths and workers are what a planner takes."""
    checks.require_shape("seq_lens", seq_lens, "[B]", None)
    checks.require_int32("seq_lens", seq_lens)
    checks.require_positive("B of seq_lens", seq_lens.shape[0])
    num_workers = checks.require_positive("num_workers", num_workers)
    if num_workers > _MOST_WORKERS:
        raise ValueError(f"num_workers must be at most {_MOST_WORKERS}, got {num_workers}")
    costs.require_work(len(seq_lens))
    require_lengths(seq_lens)
    longest = np.max(seq_lens) if checks.is_concrete(seq_lens) else 0
    if max_seq_len is not None and longest > max_seq_len:
        raise ValueError(f"seq_lens must be at most max_seq_len = {max_seq_len}, got {longest}")
    return num_workers


def _check_max_seq_len(max_seq_len: Any) -> int:
    max_seq_len = checks.require_positive("max_seq_len", max_seq_len)
    if max_seq_len > _LARGEST:
        raise ValueError(f"max_seq_len must be at most {_LARGEST}, got {max_seq_len}")
    return max_seq_len


def _unit(total: jax.Array, bound: int) -> jax.Array | int:
    """The smallest power of two with which total / unit is _MOST_COST or less.

    total: float32, a sum that may be past int32. bound: its largest value as far as that is known
    beforehand; one that is small enough leaves nothing to compute.
    """
    if bound <= _MOST_COST:
        return 1
    limits = np.float32(_MOST_COST) * np.exp2(np.arange(30, dtype=np.float32))
    return jnp.left_shift(jnp.int32(1), (total > limits).sum(dtype=jnp.int32))
