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
NO_KEY = -1e30  # a running maximum (log2 units) that no score has raised yet
PIECE = ("request", "row_tile", "block_start", "block_end", "slot")  # a record of the plan
FIRST_SLOT, SLOTS = len(PIECE), len(PIECE) + 1  # behind them: the slots of the piece's tile
RECORD = SLOTS + 1


def records(plan: Any) -> tuple[Any, Any]:
    """For each worker (record of its first piece, first piece, end) [W, 9]; all records [P, 7].

    A worker's first record stands beside its range, so that it starts with one read, not two; and
    before it, so that a record's values have the same places in both and one pointer reads either.
    """
    tile = plan.tile_of(jnp.maximum(plan.request, 0), plan.row_tile)
    start = plan.tile_slot_start
    fields = [getattr(plan, field) for field in PIECE]
    pieces = jnp.stack([*fields, start[tile], start[tile + 1] - start[tile]], axis=1)
    first = plan.worker_start[:-1]
    return jnp.column_stack([pieces[first], first, plan.worker_start[1:]]), pieces


def pieces_of(mine_ref: Any) -> tuple[Any, Any]:
    """A worker's pieces (from, to), from its row of the first of `records`."""
    return mine_ref[RECORD], mine_ref[RECORD + 1]


def walk(
    pieces: tuple[Any, Any],
    mine_ref: Any,
    piece_ref: Any,
    run: Callable[[Any, Any, Any], None],
) -> None:
    """run(p, n, piece) for a worker's pieces p = from .. to.

    mine_ref, piece_ref: the worker's row of the first of `records`, and the second. piece: the
    RECORD values of one. n: blocks before the piece. The next record is read before a piece is run,
    so that nobody waits for it; it takes registers while the piece runs.
    """
    first, stop = pieces

    def step(p, carry):
        n, *piece = carry
        following = jnp.minimum(p + 1, piece_ref.shape[0] - 1)
        after = tuple(piece_ref[following, i] for i in range(RECORD))
        run(p, n, piece)
        return (n + piece[3] - piece[2], *after)

    head = tuple(mine_ref[i] for i in range(RECORD))
    lax.fori_loop(first, stop, step, (jnp.int32(0), *head))


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
