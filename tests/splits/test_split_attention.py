"""Attention by split plans: any split gives the whole result, and fixed splits keep its bits."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged_batch import OPTIMISED, SCALE, assert_matches, make_batch
from split_plans import check_plan, i32

from mla_jax.attention import paged_mla_attention
from mla_jax.splits.planner import SplitPlan, plan_fixed, plan_splits

BLOCK = 16
RAGGED = ([150, 0, 33, 256], [3, 0, 3, 1])


def attend_plan(q, cache, tables, lens, queries, plan):
    options = {"softmax_scale": SCALE, "implementation": "split_kv"}
    return paged_mla_attention(q, cache, tables, lens, query_lens=queries, plan=plan, **options)


jitted = jax.jit(attend_plan)
optimised = jax.jit(attend_plan, compiler_options=OPTIMISED)


def plan_of_cuts(seq_lens, num_row_tiles, rows_per_tile, cuts, num_workers):
    """A plan whose workers start at any blocks of the line (sorted), built by hand."""
    request, row_tile, start, end, slot, worker_start = [], [], [], [], [], [0]
    tile_partial_start, line = [0], 0
    for tile in range(len(seq_lens) * num_row_tiles):
        blocks = math.ceil(seq_lens[tile % len(seq_lens)] / BLOCK)
        inner = sorted({c - line for c in cuts if 0 < c - line < blocks})
        edges = [0, *inner, blocks]
        for begin, until in itertools.pairwise(edges):
            whole = len(edges) == 2
            slot.append(-1 if whole else tile_partial_start[-1] + edges.index(begin))
            request.append(tile % len(seq_lens))
            row_tile.append(tile // len(seq_lens))
            start.append(begin)
            end.append(until)
        tile_partial_start.append(
            tile_partial_start[-1] + (len(edges) - 1 if len(edges) > 2 else 0)
        )
        line += blocks
    position = np.cumsum([0] + [b - a for a, b in zip(start, end, strict=True)])[:-1]
    worker_start += [int(np.searchsorted(position, c)) for c in sorted(cuts)] + [len(request)]
    unused = len(seq_lens) * num_row_tiles + num_workers - len(request)
    return SplitPlan(
        request=i32(*request, *[-1] * unused),
        row_tile=i32(*row_tile, *[0] * unused),
        block_start=i32(*start, *[0] * unused),
        block_end=i32(*end, *[0] * unused),
        partial=i32(*slot, *[-1] * unused),
        worker_start=i32(*worker_start),
        tile_partial_start=i32(*tile_partial_start),
        block_size=BLOCK,
        rows_per_tile=rows_per_tile,
        num_row_tiles=num_row_tiles,
        num_partials=2 * (num_workers - 1),
    )


@given(st.lists(st.integers(0, 2 * (10 + 0 + 3 + 16)), min_size=4, max_size=4))
def test_any_split_is_the_whole(cuts):
    batch = make_batch(np.random.default_rng(sum(cuts)), *RAGGED, heads=4)
    plan = plan_of_cuts(RAGGED[0], 2, 8, cuts, num_workers=5)
    check_plan(plan, RAGGED[0], 12)
    got = jitted(*batch.args, batch.query_lens, plan)
    assert_matches(got, batch.oracle(), 2e-5, 2e-6)


@pytest.mark.parametrize(
    ("num_workers", "rows_per_tile", "cost_model", "hides"),
    [
        (1, 16, "blocks", False),
        (5, 8, "fia", False),  # the sizes of `test_any_split_is_the_whole`
        (5, 4, "blocks", True),  # three tiles, one token each
    ],
)
def test_planned_splits_match_float64(num_workers, rows_per_tile, cost_model, hides):
    lens = [150, 0, 34, 256] if hides else RAGGED[0]  # tokens of 34 keys see 2, 2 and 3 blocks
    batch = make_batch(np.random.default_rng(0), lens, RAGGED[1], heads=4)
    plan = plan_splits(
        batch.seq_lens,
        num_workers=num_workers,
        rows=12,
        rows_per_tile=rows_per_tile,
        block_size=BLOCK,
        cost_model=cost_model,
        query_lens=batch.query_lens if hides else None,
        num_heads=4,
    )
    assert plan.num_heads == (4 if hides else 0)
    got = jitted(*batch.args, batch.query_lens, plan)
    assert_matches(got, batch.oracle(), 2e-5, 2e-6)


def test_fixed_splits_are_batch_invariant():
    """A request's rows keep their bits alone, among others, at any place, in any paging."""

    def attend(batch):
        plan = plan_fixed(
            batch.seq_lens,
            split_size=2 * BLOCK,
            max_seq_len=256,
            num_workers=4,
            rows=8,
            rows_per_tile=8,
            block_size=BLOCK,
        )
        return optimised(*batch.args, batch.query_lens, plan)

    for seed, length in enumerate((201, 32, 7)):
        alone = make_batch(np.random.default_rng(seed), [length], [2])
        wanted = [np.asarray(x)[0] for x in attend(alone)]
        for others in ([9, 256, 140], [2, 2, 2], [130, 64, 255]):
            for place in (0, 3):
                lengths = [*others[:place], length, *others[place:]]
                batch = make_batch(np.random.default_rng(99), lengths, [2, 2, 2, 2])
                pages = np.asarray(batch.cache.pages).copy()
                for slot in range(-(-length // 16)):
                    here, there = batch.block_tables[place, slot], alone.block_tables[0, slot]
                    pages[here] = np.asarray(alone.cache.pages)[there]
                batch.cache = dataclasses.replace(batch.cache, pages=jax.device_put(pages))
                q = np.array(batch.q)
                q[place] = np.asarray(alone.q)[0]
                batch.q = jax.device_put(q)
                for got, want in zip(attend(batch), wanted, strict=True):
                    np.testing.assert_array_equal(np.asarray(got)[place], want)
