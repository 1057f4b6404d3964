"""What the decode kernels know of a plan and of pages."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

BLOCK = 64  # KV tokens a block: the height of a wgmma tile
LOG2E = math.log2(math.e)
LN2 = math.log(2)
NO_KEY = -3e38  # a running maximum (log2 units) that no score has raised yet: below them all
PIECE = ("request", "row_tile", "block_start", "block_end", "slot")  # a record of the plan
SLOT = PIECE.index("slot")
FIRST_SLOT, SLOTS = len(PIECE), len(PIECE) + 1  # behind them: the slots of the piece's tile
RECORD = SLOTS + 1


def records(plan: Any, finish: str = "merge") -> tuple[Any, Any]:
    """For each worker (record of its first piece, first piece, end) [W, 9]; all records [P, 7].

    A worker's first record stands beside its range, so that it starts with one read, not two; and
    before it, so that a record's values have the same places in both and one pointer reads either.

    finish: of cut tiles.
    "merge": all workers of a tile merge what they have left in slots.
    "in_pairs": workers 2i and 2i + 1 share a cluster, and merge a tile without slots if only they
        share it, and no other: then the two records have `kept_slot` of their slots, and the second
        worker walks backwards, from its last piece to its first, so that both come to the tile
        last. Rows have one column more, the way from a piece to the next; their number is even.
    "by_first": of a tile in two pieces the first one's worker, which comes to it last, keeps its
        own (`kept_slot`) and adds the other's, which that worker, who came to it first, has left
        long ago: its record has one slot, its own. Not of a fixed plan, where one may have both.
    """
    tile = plan.tile_of(jnp.maximum(plan.request, 0), plan.row_tile)
    start = plan.tile_slot_start
    fields = [getattr(plan, field) for field in PIECE]
    pieces = jnp.stack([*fields, start[tile], start[tile + 1] - start[tile]], axis=1)
    if finish == "in_pairs":
        return _in_pairs(plan, pieces, tile)
    if finish == "by_first" and not plan.fixed:
        slot, first = pieces[:, SLOT], pieces[:, FIRST_SLOT]
        two = (slot >= 0) & (pieces[:, SLOTS] == 2)
        keeps, leaves = two & (slot == first), two & (slot > first)
        pieces = pieces.at[:, SLOT].set(jnp.where(keeps, kept_slot(slot), slot))
        pieces = pieces.at[:, FIRST_SLOT].set(jnp.where(leaves, slot, first))
        pieces = pieces.at[:, SLOTS].add(-leaves.astype(jnp.int32))
    first, stop = plan.worker_start[:-1], plan.worker_start[1:]
    return jnp.column_stack([pieces[first], first, stop]), pieces


def _in_pairs(plan: Any, pieces: Any, tile: Any) -> tuple[Any, Any]:
    worker_start = plan.worker_start
    if plan.num_workers % 2:
        worker_start = jnp.append(worker_start, worker_start[-1])
    first, stop = worker_start[:-1], worker_start[1:]
    step = jnp.ones_like(first)
    if not plan.fixed:  # (whose pieces are merged alike, wherever they are)
        shared, slot = _shared_in_pairs(pieces, tile, worker_start)
        pieces = pieces.at[:, SLOT].set(slot)
        step = step.at[1::2].set(jnp.where(shared, -1, 1))
    head = jnp.where(step < 0, stop - 1, first)
    return jnp.column_stack([pieces[head], first, stop, step]), pieces


def _shared_in_pairs(pieces: Any, tile: Any, worker_start: Any) -> tuple[Any, Any]:
    """Which pairs merge by themselves; the slots of all pieces, with `kept_slot` of theirs.

    (With another merge to come it would only be one more to wait for: benchmarks/history.md.)
    """
    slot = pieces[:, SLOT]
    begin, middle, end = worker_start[:-1:2], worker_start[1::2], worker_start[2::2]
    left = jnp.maximum(middle - 1, 0)
    alone = (begin < middle) & (middle < end) & (tile[left] == tile[middle])
    cut_before = jnp.append(jnp.zeros(1, jnp.int32), jnp.cumsum(slot >= 0))
    alone &= (pieces[left, SLOTS] == 2) & (cut_before[end] - cut_before[begin] == 2)
    mine = jnp.where(alone, jnp.stack([left, middle]), len(slot)).ravel()
    theirs = kept_slot(slot)[jnp.minimum(mine, len(slot) - 1)]
    return alone, slot.at[mine].set(theirs, mode="drop")


def kept_slot(slot: Any) -> Any:
    """Below -1, for a slot that is not needed: its piece is kept. Of such a one the slot."""
    return -2 - slot


def pieces_of(mine_ref: Any) -> tuple[Any, Any]:
    """A worker's pieces (from, to), from its row of the first of `records`."""
    return mine_ref[RECORD], mine_ref[RECORD + 1]


def first_of(mine_ref: Any) -> Any:
    """The piece that a worker in a pair begins with."""
    first, stop = pieces_of(mine_ref)
    return jnp.where(step_of(mine_ref) < 0, stop - 1, first)


def step_of(mine_ref: Any) -> Any:
    """From one of its pieces to the next."""
    return mine_ref[RECORD + 2]


def walk(
    pieces: tuple[Any, Any],
    mine_ref: Any,
    piece_ref: Any,
    run: Callable[[Any, Any, Any], None],
    *,
    in_pairs: bool = False,
) -> None:
    """run(p, n, piece) for a worker's pieces p.

    mine_ref, piece_ref: the worker's row of the first of `records`, and the second. piece: the
    RECORD values of one. n: blocks before the piece. The next record is read before a piece is run,
    so that nobody waits for it; it takes registers while the piece runs.
    """
    first, stop = pieces
    start, way = (first_of(mine_ref), step_of(mine_ref)) if in_pairs else (first, 1)

    def step(k, carry):
        n, *piece = carry
        p = start + k * way
        following = jnp.clip(p + way, 0, piece_ref.shape[0] - 1)
        after = tuple(piece_ref[following, i] for i in range(RECORD))
        run(p, n, piece)
        return (n + piece[3] - piece[2], *after)

    head = tuple(mine_ref[i] for i in range(RECORD))
    lax.fori_loop(0, stop - first, step, (jnp.int32(0), *head))


def valid_lengths(
    len_ref: Any, query_len_ref: Any | None, request: Any, *, capacity: int, num_queries: int
) -> tuple[Any, Any]:
    """(kv length, query length) of a request; a kv length of -1 where the two can't be.

    query_len_ref: None: all of the num_queries tokens. capacity: keys that a block table reaches.
    """
    kv_len = len_ref[request]
    valid = (kv_len >= 0) & (kv_len <= capacity)
    query_len = jnp.int32(num_queries)
    if query_len_ref is not None:
        query_len = query_len_ref[request]
        valid &= (query_len >= 0) & (query_len <= jnp.minimum(kv_len, num_queries))
    return jnp.where(valid, kv_len, -1), query_len


def fits(record: Any, kv_len: Any) -> Any:
    """Whether a piece is of a plan for this length: none of its tile past it, none missing."""
    _, _, _, end, slot, first_slot, slots = record
    blocks = (jnp.maximum(kv_len, 0) + (BLOCK - 1)) // BLOCK
    last = (slot < 0) | (slot == first_slot + slots - 1)
    return (end == blocks) | ((end < blocks) & ~last)


def last_page(kv_len: Any, page_size: int) -> Any:
    """Index of the last valid entry of a request's row of the block table; 0 without one."""
    return jnp.maximum(kv_len - 1, 0) // page_size


def block_sources(
    table_ref: Any, request: Any, block: Any, kv_len: Any, page_size: int, num_pages: int
) -> tuple[list[tuple[Any, Any, Any]], Any]:
    """Where a block lies: (page, rows of the page, rows of the slot or None for all); and whether
    the cache has all of these pages. One that it does not have is read as page 0.

    Pages past the length hold garbage: the last valid one is read in their place, and masked.
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
