"""The work list of a decode launch, and where a KV block lies in its pages.

A split plan says which worker computes which work items. A worker is a CTA, or a cluster of two
CTAs that share their tiles. A work item is a range of KV blocks of one tile. `work_list` turns the
plan into two integer arrays that kernels read: one row per work item, and one row per worker with
its range of items.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

BLOCK = 64  # KV tokens per block: the height of a wgmma tile
LOG2E = math.log2(math.e)
LN2 = math.log(2)
NO_KEY = -3e38  # a running maximum (log2 units) that no score has raised yet: below them all


class WorkItem(NamedTuple):
    """One row of the list: what to compute, and where its result goes.

    partial: where the result goes.
        0 or more: to the partial result with this index, because the item's tile is split;
        -1: to the output, because the item is a whole tile;
        below -1: nowhere yet. The worker keeps it (`kept_partial`) and combines the tile itself.
    first_partial, num_partials: the partials that are merged together. They are those of the item's
        tile, or after "by_first" (`work_list`) the item's own alone.
    """

    request: Any
    row_tile: Any
    block_start: Any
    block_end: Any
    partial: Any
    first_partial: Any
    num_partials: Any

    @staticmethod
    def read(ref: Any) -> "WorkItem":
        """Returns the item in the first values of a one-dimensional ref."""
        return WorkItem(*(ref[i] for i in range(ITEM_FIELDS)))

    @property
    def own_partial(self) -> Any:
        """The partial index that the plan gave the item, kept or not."""
        return jnp.where(self.partial < -1, kept_partial(self.partial), self.partial)


PLANNED = WorkItem._fields[:5]  # the fields that a split plan has, by the same names
ITEM_FIELDS = len(WorkItem._fields)
PARTIAL = WorkItem._fields.index("partial")
FIRST_PARTIAL = WorkItem._fields.index("first_partial")
NUM_PARTIALS = WorkItem._fields.index("num_partials")


class WorkList(NamedTuple):
    """What the kernels of one launch read of a plan.

    ranges [W, 9 or 10]: per worker its first item, then the range of its items, then the step.
    items [P, 7]: per work item, as `WorkItem`. The first item is beside the range, so that a worker
    starts with one read, and at the same offsets as in `items`, so that one pointer reads either.
    counters [tiles * CTAs per tile] int32: 0 before and after a launch (`combine.TileCounter`).
    Launches that share a list run one after the other.
    """

    ranges: Any
    items: Any
    counters: Any


def work_list(plan: Any, finish: str = "merge", ctas_per_tile: int = 1) -> WorkList:
    """Returns the work list of a split plan.

    ctas_per_tile: CTAs that share a tile.
    finish: how split tiles are combined.
    "merge": all workers of a tile merge its partials.
    "in_pairs": workers 2i and 2i + 1 share a cluster. A tile that only these two share is combined
        in their shared memories, without partials. Its two items have `kept_partial`, and the
        second worker runs its items backwards, so that both finish with this tile. Ranges have one
        column more, the step from an item to the next, and an even number of rows.
    "by_first": of a tile in two items, one is the last of worker w, the other the first of w + 1.
        So w + 1 stores its partial early, listed as a tile of one partial, so that nothing merges
        it. Worker w, at its end, keeps its own result (`kept_partial`) and adds the other's. It
        waits only for what another worker does first, so that no two wait for each other. Not for
        a fixed plan (`SplitPlan.fixed`), in which one worker may have both items.
    """
    tile = plan.tile_of(jnp.maximum(plan.request, 0), plan.row_tile)
    partial, first = plan.partial, plan.tile_partial_start[tile]
    count = jnp.where(plan.request < 0, 0, plan.tile_partial_start[tile + 1] - first)
    counters = new_counters(plan.num_tiles, ctas_per_tile)
    if finish == "by_first" and not plan.fixed:
        two = (partial >= 0) & (count == 2)
        keeps, stores = two & (partial == first), two & (partial > first)
        first, count = jnp.where(stores, partial, first), count - stores
        partial = jnp.where(keeps, kept_partial(partial), partial)
    fields = [getattr(plan, field) for field in PLANNED[:PARTIAL]]
    items = jnp.stack([*fields, partial, first, count], axis=1)
    if finish == "in_pairs":
        return WorkList(*_in_pairs(plan, items, tile), counters)
    start, stop = plan.worker_start[:-1], plan.worker_start[1:]
    return WorkList(jnp.column_stack([items[start], start, stop]), items, counters)


def finish_of(tiles: Any, *, workers_may_wait: bool) -> str:
    """Returns how a kernel with these tiles combines split tiles, as `work_list` takes it.

    tiles: the kernel's config.

    A worker that waits for a partial needs the other worker to run at the same time. (The
    interpreter runs one cluster after the other, the one that is waited for first.)
    """
    if tiles.ctas_per_tile > 1 and workers_may_wait:
        return "by_first"
    return "in_pairs" if tiles.in_pairs else "merge"


def _in_pairs(plan: Any, items: Any, tile: Any) -> tuple[Any, Any]:
    """Returns ranges and items of a `work_list` whose workers share clusters."""
    worker_start = plan.worker_start
    if plan.num_workers % 2:
        worker_start = jnp.append(worker_start, worker_start[-1])
    first, stop = worker_start[:-1], worker_start[1:]
    step = jnp.ones_like(first)
    if not plan.fixed:  # The items of a fixed plan are merged alike, wherever they are.
        shared, partial = _shared_in_pairs(items, tile, worker_start)
        items = items.at[:, PARTIAL].set(partial)
        step = step.at[1::2].set(jnp.where(shared, -1, 1))
    head = jnp.where(step < 0, stop - 1, first)
    return jnp.column_stack([items[head], first, stop, step]), items


def _shared_in_pairs(items: Any, tile: Any, worker_start: Any) -> tuple[Any, Any]:
    """Returns which pairs combine a tile by themselves, and all items' partials with those kept.

    A pair that has another merge to come does not: that would be one more thing to wait for
    (benchmarks/history.md).
    """
    partial = items[:, PARTIAL]
    begin, middle, end = worker_start[:-1:2], worker_start[1::2], worker_start[2::2]
    left = jnp.maximum(middle - 1, 0)
    alone = (begin < middle) & (middle < end) & (tile[left] == tile[middle])
    split_before = jnp.append(jnp.zeros(1, jnp.int32), jnp.cumsum(partial >= 0))
    alone &= (items[left, NUM_PARTIALS] == 2) & (split_before[end] - split_before[begin] == 2)
    shared = jnp.where(alone, jnp.stack([left, middle]), len(partial)).ravel()
    kept = kept_partial(partial)[jnp.minimum(shared, len(partial) - 1)]
    return alone, partial.at[shared].set(kept, mode="drop")


def new_counters(num_tiles: int, ctas_per_tile: int) -> Any:
    """Returns the counters of a `WorkList`."""
    return jnp.zeros(num_tiles * ctas_per_tile, jnp.int32)


def kept_partial(partial: Any) -> Any:
    """Maps a partial index to a number below -1 that marks it as kept, and such a number back."""
    return -2 - partial


def range_of(range_ref: Any) -> tuple[Any, Any]:
    """Returns a worker's items (from, to), from its row of `WorkList.ranges`."""
    return range_ref[ITEM_FIELDS], range_ref[ITEM_FIELDS + 1]


def first_of(range_ref: Any) -> Any:
    """Returns the item that a worker in a pair begins with."""
    first, stop = range_of(range_ref)
    return jnp.where(step_of(range_ref) < 0, stop - 1, first)


def step_of(range_ref: Any) -> Any:
    """Returns the step from one of a worker's items to the next, 1 or -1."""
    return range_ref[ITEM_FIELDS + 2]


def run_items(
    items: tuple[Any, Any],
    range_ref: Any,
    item_ref: Any,
    run: Callable[[Any, Any, WorkItem], None],
    *,
    in_pairs: bool = False,
) -> None:
    """Calls run(index, n, item) for each of a worker's items, after n KV blocks of items before.

    items: the worker's, from and to. range_ref: its row of `WorkList.ranges`; item_ref:
    `WorkList.items`. The next item is read before an item is run, so that nothing waits for the
    read; it takes registers while the item runs.
    """
    first, stop = items
    start, step = (first_of(range_ref), step_of(range_ref)) if in_pairs else (first, 1)

    def run_one(k, carry):
        n, *item = carry
        item = WorkItem(*item)
        index = start + k * step
        following = jnp.clip(index + step, 0, item_ref.shape[0] - 1)
        after = tuple(item_ref[following, i] for i in range(ITEM_FIELDS))
        run(index, n, item)
        return (n + item.block_end - item.block_start, *after)

    head = tuple(range_ref[i] for i in range(ITEM_FIELDS))
    lax.fori_loop(0, stop - first, run_one, (jnp.int32(0), *head))


def valid_lengths(
    len_ref: Any, query_len_ref: Any | None, request: Any, *, capacity: int, num_queries: int
) -> tuple[Any, Any]:
    """Returns (kv length, query length) of a request; a kv length of -1 where they are invalid.

    query_len_ref: None: all of the num_queries tokens. capacity: keys that a block table reaches.
    """
    kv_len = len_ref[request]
    valid = (kv_len >= 0) & (kv_len <= capacity)
    query_len = jnp.int32(num_queries)
    if query_len_ref is not None:
        query_len = query_len_ref[request]
        valid &= (query_len >= 0) & (query_len <= jnp.minimum(kv_len, num_queries))
    return jnp.where(valid, kv_len, -1), query_len


def fits(item: WorkItem, kv_len: Any, plan: Any) -> Any:
    """Whether an item's plan is for this length: no block past it, and none missing.

    A launch of a plan with num_heads, whose tiles may end early, finds missing blocks beforehand.
    """
    blocks = (jnp.maximum(kv_len, 0) + (BLOCK - 1)) // BLOCK
    if plan.num_heads:
        return item.block_end <= blocks
    last = (item.partial < 0) | (item.partial == item.first_partial + item.num_partials - 1)
    return (item.block_end == blocks) | ((item.block_end < blocks) & ~last)


def last_page(kv_len: Any, page_size: int) -> Any:
    """Returns the index of a request's last valid block-table entry; 0 where there is none."""
    return jnp.maximum(kv_len - 1, 0) // page_size


def block_sources(
    table_ref: Any, request: Any, block: Any, kv_len: Any, page_size: int, num_pages: int
) -> tuple[list[tuple[Any, Any, Any]], Any]:
    """Returns where a block lies, and whether the cache has all of its pages.

    Where it lies: (page, rows of the page, rows of the stage or None for all) per page. A page that
    the cache does not have is read as page 0. Entries of the block table past the length hold
    garbage: the last valid page is read instead, and masked.
    """
    last = last_page(kv_len, page_size)

    def page_at(index: Any) -> tuple[Any, Any]:
        page = table_ref[request, jnp.minimum(index, last)]
        exists = (page >= 0) & (page < num_pages)
        return jnp.where(exists, page, 0), exists

    if page_size >= BLOCK:
        per_page = page_size // BLOCK
        page, exists = page_at(block // per_page)
        return [(page, pl.ds((block % per_page) * BLOCK, BLOCK), None)], exists
    per_block = BLOCK // page_size
    sources, all_exist = [], True
    for i in range(per_block):
        page, exists = page_at(block * per_block + i)
        sources.append((page, pl.ds(0, page_size), pl.ds(i * page_size, page_size)))
        all_exist &= exists
    return sources, all_exist
