"""The contract of `SplitPlan`, checked by work item, and sizes that the tests of plans share."""

import math

import jax
import numpy as np
from hypothesis import strategies as st

from mla_jax.splits.plan import check_plan as check_sound
from mla_jax.splits.planner import covered_requests

WORKERS = 40  # more than tiles
ROWS, ROWS_PER_TILE = 150, 64  # three row tiles, the last of 22 rows
lengths_strategy = st.lists(
    st.one_of(st.just(0), st.integers(1, 400), st.integers(1, 40000)), min_size=5, max_size=5
)


def i32(*values):
    return np.array(values, np.int32)


def keys_of_tile(seq_len, query_len, tile_rows, num_heads):
    """Returns the most keys that a real token of a tile sees, token by token."""
    real = [row // num_heads for row in tile_rows if row // num_heads < query_len]
    return max((seq_len - query_len + token + 1 for token in real), default=0)


def check_plan(plan, seq_lens, rows, query_lens=None):
    """The contract of SplitPlan, checked work item by work item.

    query_lens: of a plan with num_heads.
    """
    assert all(leaf.dtype == np.int32 for leaf in jax.tree.leaves(plan))
    p = jax.tree.map(np.asarray, plan)
    row_tiles = math.ceil(rows / plan.rows_per_tile)
    assert (p.num_row_tiles, p.num_tiles) == (row_tiles, len(seq_lens) * row_tiles)
    used = int((p.request >= 0).sum())
    assert (p.request[used:] == -1).all()
    for unused in (p.block_start, p.block_end):
        assert not unused[used:].any()
    assert (p.partial[used:] == -1).all()
    assert p.worker_start[0] == 0
    assert p.worker_start[-1] == used
    assert (np.diff(p.worker_start) >= 0).all()

    pieces = list(
        zip(*(x.tolist() for x in (p.request, p.row_tile, p.block_start, p.block_end)), strict=True)
    )
    piece, slot = 0, 0
    for tile in range(p.num_tiles):
        row_tile, request = divmod(tile, len(seq_lens))
        keys = max(0, seq_lens[request])
        if query_lens is not None:
            first = row_tile * plan.rows_per_tile
            tile_rows = range(first, min(first + plan.rows_per_tile, rows))
            keys = keys_of_tile(keys, query_lens[request], tile_rows, plan.num_heads)
        blocks = math.ceil(max(0, keys) / p.block_size)
        assert p.tile_partial_start[tile] == slot
        at, first = 0, piece
        while piece == first or at < blocks:
            *where, start, end = pieces[piece]
            assert (where, start) == ([request, row_tile], at)
            assert end > at or blocks == 0
            at, piece = end, piece + 1
        assert at == blocks
        if piece - first == 1:
            assert p.partial[first] == -1
        else:
            assert p.partial[first:piece].tolist() == list(range(slot, slot + piece - first))
            slot += piece - first
    assert piece == used
    assert p.tile_partial_start[-1] == slot <= p.num_partials
    lengths = i32(*seq_lens), None if query_lens is None else i32(*query_lens)
    assert np.asarray(covered_requests(plan, *lengths)).all()
    check_sound(plan, *lengths)
