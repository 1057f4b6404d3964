"""Split plans: every block once, balanced as the schedulers they come from are."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from split_plans import ROWS, ROWS_PER_TILE, WORKERS, check_plan, i32, lengths_strategy

from mla_jax.splits.numpy_planner import plan_in_numpy
from mla_jax.splits.planner import covered_requests, plan_fixed, plan_loads, plan_splits


def flash_mla_largest(blocks, num_workers, overhead):
    """The largest load of FlashMLA's scheduler: each worker fills its payload, in order."""
    payload = math.ceil((sum(blocks) + overhead * len(blocks)) / num_workers) + overhead
    loads, tile, taken = [], 0, 0
    for _ in range(num_workers):
        rest = payload
        while tile < len(blocks):
            if rest >= blocks[tile] - taken + overhead:
                rest -= blocks[tile] - taken + overhead
                tile, taken = tile + 1, 0
                continue
            if rest > overhead:
                taken += rest - overhead
                rest = 0
            break
        loads.append(payload - rest)
    assert tile == len(blocks)
    return max(loads)


def fia_largest(tiles, num_workers):
    """The largest load of Ascend's assignment: block after block, while half of it fits."""
    total, best = sum(map(sum, tiles)), math.inf
    blocks = [cost for tile in tiles for cost in tile]
    fewest = min(num_workers, max(1, math.isqrt(len(blocks))))
    for count in range(fewest, num_workers + 1):
        loads = [0.0]
        for cost in blocks:
            if loads[-1] + cost > total / count + cost / 2 and len(loads) < count:
                loads.append(0.0)
            loads[-1] += cost
        best = min(best, max(loads))
    return best


def fia_tiles(seq_lens):
    """Block costs of every tile, for ROWS rows and blocks of 64."""
    tiles = []
    for length in seq_lens:
        for rows in (64, 64, 22):
            by_rows = 6 * math.ceil(rows / 16)
            tiles.append([by_rows + 10] * math.ceil(length / 64))
    return tiles


# Sizes that tests share, so that they share a program.
SERVER = {"num_workers": 132, "rows": 16, "rows_per_tile": 16, "overhead": 2}


def test_of_plans_with_the_same_maximum_the_fewest_cuts():
    """64 x 64 blocks for 132 workers: two halves a tile, not 188 pieces of 32 blocks at most."""
    lens = np.full(64, 4096, np.int32)
    plan = plan_splits(lens, **SERVER)
    plan = jax.tree.map(np.asarray, plan)
    blocks = (plan.block_end - plan.block_start)[plan.request >= 0]
    assert blocks.tolist() == [32] * 128


TOKENS = 5  # of 30 heads: the row tiles have tokens 0 .. 2, 2 .. 4 and 4


@example([68, 320, 3, 66, 0], [5, 5, 5, 1, 0])  # tiles of 66, 68 and 68 keys; S > length
@given(
    lengths_strategy,
    st.lists(st.integers(0, TOKENS), min_size=5, max_size=5),
)
def test_tiles_end_with_the_keys_of_their_last_token(seq_lens, query_lens):
    sizes = {"rows": ROWS, "query_lens": i32(*query_lens)}
    heads = ROWS // TOKENS
    plan = plan_splits(i32(*seq_lens), num_workers=7, num_heads=heads, **sizes)
    assert plan.num_heads == heads
    check_plan(plan, seq_lens, ROWS, query_lens)
    loads = np.asarray(plan_loads(plan, i32(*seq_lens), **sizes))
    plan = jax.tree.map(np.asarray, plan)
    blocks = (plan.block_end - plan.block_start)[plan.request >= 0]
    assert loads.sum() == blocks.sum() + 5 * len(blocks)
    assert loads.max() <= loads.sum() / 7 + 7  # an overhead, a block, and a part of one


def test_a_chunk_has_no_hidden_blocks_and_stays_balanced():
    """256 tokens, one per tile: with equal lengths 4 blocks each, 3 of 8 would be hidden."""
    lens, sizes = i32(256), {"rows": 256, "query_lens": i32(256)}
    plan = plan_splits(lens, num_workers=7, rows_per_tile=1, num_heads=1, **sizes)
    assert int((plan.block_end - plan.block_start).sum()) == 64 * sum(range(1, 5))
    loads = np.asarray(plan_loads(plan, lens, **sizes))
    assert loads.max() <= loads.mean() + 7


def test_a_plan_hides_nothing_from_a_single_tile_or_token():
    lens = i32(*[300] * 5)
    for rows, heads in ((60, 12), (ROWS, ROWS)):
        plan = jax.eval_shape(
            functools.partial(plan_splits, num_workers=7, rows=rows, num_heads=heads),
            lens,
            query_lens=i32(*[1] * 5),
        )
        assert plan.num_heads == 0


@example([1, 1, 1, 193, 577], 2)  # in another order of its tiles FlashMLA's is 3 better
@given(lengths_strategy, st.just(WORKERS))
def test_blocks_model_balances_as_flash_mla(seq_lens, num_workers):
    """Every block is in one work item."""
    plan = plan_splits(i32(*seq_lens), num_workers=num_workers, rows=ROWS)
    assert plan.num_items == 15 + num_workers
    assert plan.num_partials == 2 * (num_workers - 1)
    check_plan(plan, seq_lens, ROWS)
    loads = np.asarray(plan_loads(plan, i32(*seq_lens), rows=ROWS))
    pieces = np.diff(plan.worker_start)
    plan = jax.tree.map(np.asarray, plan)
    blocks = plan.block_end - plan.block_start
    by_hand = [
        blocks[start : start + count].sum() + 5 * count
        for start, count in zip(plan.worker_start, pieces, strict=False)
    ]
    np.testing.assert_array_equal(loads, by_hand)
    tiles = [math.ceil(length / 64) for _ in range(3) for length in seq_lens]  # the line's order
    assert loads.max() <= flash_mla_largest(tiles, num_workers, 5) + 2
    last = plan.block_end == np.ceil(np.array(seq_lens) / 64)[plan.request]
    at_an_end = (plan.partial >= 0) & ((plan.block_start == 0) | last)
    assert (blocks[at_an_end] >= 2).all()  # one block is not worth cutting off


@given(lengths_strategy)
def test_fia_model_balances_as_ascend(seq_lens):
    """Every block is in one work item."""
    num_workers = 7
    plan = plan_splits(i32(*seq_lens), num_workers=num_workers, rows=ROWS, cost_model="fia")
    check_plan(plan, seq_lens, ROWS)
    loads = np.asarray(plan_loads(plan, i32(*seq_lens), rows=ROWS, cost_model="fia"))
    tiles = fia_tiles(seq_lens)
    assert float(loads.sum()) == sum(map(sum, tiles))
    assert float(loads.max()) <= fia_largest(tiles, num_workers) + 34  # one block


@given(
    st.lists(st.integers(0, 4000), min_size=5, max_size=5),
    st.sampled_from([(1, 512), (40, 64)]),
)
def test_fixed_plan_cuts_at_multiples(seq_lens, static):
    num_workers, split_size = static
    plan = plan_fixed(
        i32(*seq_lens),
        split_size=split_size,
        max_seq_len=4000,
        num_workers=num_workers,
        rows=ROWS,
    )
    check_plan(plan, seq_lens, ROWS)
    used = np.asarray(plan.request) >= 0
    step = split_size // 64
    start, end = np.asarray(plan.block_start)[used], np.asarray(plan.block_end)[used]
    assert not (start % step).any()
    assert (end - start <= step).all()
    loads = np.asarray(plan_loads(plan, i32(*seq_lens), rows=ROWS))
    assert loads.max() <= loads.sum() / num_workers + step + 5


def test_sizes_of_a_large_server_do_not_overflow():
    seq_lens = np.full(64, 1 << 21, np.int32)
    fia = {"num_workers": 132, "rows": 128, "rows_per_tile": 128, "cost_model": "fia"}
    for sizes, most in ((SERVER, 1 + 2), (fia, 58)):
        plan = plan_splits(seq_lens, **sizes)
        check_plan(plan, seq_lens, sizes["rows"])
        model = {name: sizes[name] for name in ("rows", "overhead", "cost_model") if name in sizes}
        loads = np.asarray(plan_loads(plan, seq_lens, **model))
        assert loads.max() - loads.min() <= 2 * most


def test_a_lone_long_request_goes_to_all_workers():
    plan = jax.tree.map(np.asarray, plan_splits(i32(64 * 1000), num_workers=100, rows=16))
    assert (np.diff(plan.worker_start) == 1).all()
    assert np.ptp((plan.block_end - plan.block_start)[:100]) <= 6
    few = plan_splits(i32(64 * 3), num_workers=100, rows=16)
    assert int((np.asarray(few.request) >= 0).sum()) == 1  # not worth a cut


@pytest.mark.parametrize(("length", "whole"), [(1024, True), (4096, False)])
def test_cutting_at_all_has_its_price(length, whole):
    """64 requests and 132 workers: short ones are cheaper left whole, long ones in two."""
    lens = i32(*[length] * 64)
    plan = plan_splits(lens, **SERVER, merge_overhead=8)
    check_plan(plan, lens, 16)
    check_in_numpy(plan, lens, **SERVER, merge_overhead=8)
    assert (int(np.asarray(plan.tile_partial_start)[-1]) == 0) == whole
    free = plan_splits(lens, **SERVER)
    assert int(np.asarray(free.tile_partial_start)[-1]) > 0


def check_in_numpy(plan, seq_lens, **options):
    """The planner in NumPy makes the same plan."""
    in_numpy = plan_in_numpy(seq_lens, **options)
    for name, array in plan.arrays().items():
        np.testing.assert_array_equal(in_numpy.arrays()[name], array, name)
    assert in_numpy.num_partials == plan.num_partials


@given(lengths_strategy)
def test_pairs_cost_no_more_than_workers_apart(seq_lens):
    def largest(**options):
        plan = plan_splits(i32(*seq_lens), num_workers=WORKERS, rows=ROWS, **options)
        check_plan(plan, seq_lens, ROWS)
        options |= {"rows_per_tile": ROWS_PER_TILE}
        check_in_numpy(plan, seq_lens, num_workers=WORKERS, rows=ROWS, **options)
        return float(np.asarray(plan_loads(plan, i32(*seq_lens), rows=ROWS)).max())

    assert largest(merge_overhead=8, in_pairs=True) <= largest() + 8


@pytest.mark.parametrize(
    ("requests", "empty", "halved"),
    [(47, 20, True), (67, 0, False), (66, 0, True)],
)
def test_pairs_halve_whole_tiles_where_they_can(requests, empty, halved):
    """132 workers, requests of 64 blocks: where cutting freely costs more than halves.

    Empty requests fill one batch up to 67, so that two cases share a program.
    """
    lens = i32(*[4096] * requests, *[0] * empty)
    plan = plan_splits(lens, num_workers=132, rows=64, merge_overhead=8, in_pairs=True)
    plan = jax.tree.map(np.asarray, plan)
    check_plan(plan, lens, 64)
    blocks = (plan.block_end - plan.block_start)[plan.request >= 0]
    assert (blocks[blocks > 0].tolist() == [32] * 2 * requests) == halved
    first = np.asarray(plan.worker_start)[:-1:2]  # of each pair
    assert not halved or not np.asarray(plan.block_start)[first].any()


def test_a_plan_for_other_lengths_does_not_cover():
    plan = plan_splits(i32(100, 200, 0, 0, 0), num_workers=WORKERS, rows=ROWS)
    covered = covered_requests(plan, i32(100, 300, 1, 0, 64))
    assert np.asarray(covered).tolist() == [True, False, False, True, False]
