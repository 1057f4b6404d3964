"""Split plans: every block once, balanced as the schedulers they come from are, and executed."""

import dataclasses
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from paged_batch import OPTIMISED, SCALE, assert_matches, make_batch

from mla_jax.attention import paged_mla_attention
from mla_jax.cache import PagedKVCache
from mla_jax.splits.plan import check_plan as check_sound
from mla_jax.splits.planner import SplitPlan, covered_requests, plan_fixed, plan_loads, plan_splits

WORKERS = (1, 7, 40)
ROWS, ROWS_PER_TILE = 150, 64  # three row tiles, the last of 22 rows
lengths_strategy = st.lists(
    st.one_of(st.just(0), st.integers(1, 400), st.integers(1, 40000)), min_size=5, max_size=5
)


def i32(*values):
    return np.array(values, np.int32)


def check_plan(plan, seq_lens, rows):
    """The contract of SplitPlan, walked piece by piece."""
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
        blocks = math.ceil(max(0, seq_lens[request]) / p.block_size)
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
    assert np.asarray(covered_requests(plan, i32(*seq_lens))).all()
    check_sound(plan, i32(*seq_lens))


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


def test_of_plans_with_the_same_maximum_the_fewest_cuts():
    """64 x 64 blocks for 132 workers: two halves a tile, not 188 pieces of 32 blocks at most."""
    lens = jnp.full(64, 4096, jnp.int32)
    plan = plan_splits(lens, num_workers=132, rows=16, rows_per_tile=16, overhead=2)
    blocks = np.asarray(plan.block_end - plan.block_start)[np.asarray(plan.request) >= 0]
    assert blocks.tolist() == [32] * 128


@given(lengths_strategy, st.sampled_from(WORKERS), st.sampled_from(["blocks", "fia"]))
def test_balanced_plan_takes_every_block_once(seq_lens, num_workers, cost_model):
    plan = plan_splits(i32(*seq_lens), num_workers=num_workers, rows=ROWS, cost_model=cost_model)
    assert plan.num_items == 15 + num_workers
    assert plan.num_partials == 2 * (num_workers - 1)
    check_plan(plan, seq_lens, ROWS)


@example([1, 1, 1, 193, 577], 2)  # in another order of its tiles FlashMLA's is 3 better
@given(lengths_strategy, st.sampled_from(WORKERS))
def test_blocks_model_balances_as_flash_mla(seq_lens, num_workers):
    plan = plan_splits(i32(*seq_lens), num_workers=num_workers, rows=ROWS)
    loads = np.asarray(plan_loads(plan, i32(*seq_lens), rows=ROWS))
    pieces = np.diff(plan.worker_start)
    blocks = np.asarray(plan.block_end - plan.block_start)
    by_hand = [
        blocks[start : start + count].sum() + 5 * count
        for start, count in zip(np.asarray(plan.worker_start), pieces, strict=False)
    ]
    np.testing.assert_array_equal(loads, by_hand)
    tiles = [math.ceil(length / 64) for _ in range(3) for length in seq_lens]  # the line's order
    assert loads.max() <= flash_mla_largest(tiles, num_workers, 5) + 2
    starts, ends = np.asarray(plan.block_start), np.asarray(plan.block_end)
    last = ends == np.ceil(np.array(seq_lens) / 64)[np.asarray(plan.request)]
    at_an_end = (np.asarray(plan.partial) >= 0) & ((starts == 0) | last)
    assert (blocks[at_an_end] >= 2).all()  # one block is not worth cutting off


@given(lengths_strategy, st.sampled_from(WORKERS))
def test_fia_model_balances_as_ascend(seq_lens, num_workers):
    plan = plan_splits(i32(*seq_lens), num_workers=num_workers, rows=ROWS, cost_model="fia")
    loads = plan_loads(plan, i32(*seq_lens), rows=ROWS, cost_model="fia")
    tiles = fia_tiles(seq_lens)
    assert float(loads.sum()) == sum(map(sum, tiles))
    assert float(loads.max()) <= fia_largest(tiles, num_workers) + 34  # one block


@given(
    st.lists(st.integers(0, 4000), min_size=5, max_size=5),
    st.sampled_from(WORKERS),
    st.sampled_from([64, 512]),
)
def test_fixed_plan_cuts_at_multiples(seq_lens, num_workers, split_size):
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


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_plans_under_jit(self):
        seq_lens = i32(1000, 0, 70)
        for cost_model in ("blocks", "fia"):
            plan = self.variant(
                lambda lens, model=cost_model: plan_splits(
                    lens, num_workers=5, rows=64, cost_model=model
                )
            )(seq_lens)
            check_plan(plan, seq_lens, 64)
        plan = self.variant(
            lambda lens: plan_fixed(lens, split_size=128, max_seq_len=1024, num_workers=5, rows=64)
        )(seq_lens)
        check_plan(plan, seq_lens, 64)


def test_plans_trace_once_whatever_the_lengths():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def plan(seq_lens):
        return plan_splits(seq_lens, num_workers=6, rows=64)

    for seq_lens in (i32(3, 900), i32(0, 0), i32(64, 65)):
        check_plan(plan(seq_lens), seq_lens, 64)


def test_sizes_of_a_large_server_do_not_overflow():
    seq_lens = np.full(64, 1 << 21, np.int32)
    for cost_model, overhead in (("blocks", 5), ("fia", 0)):
        plan = plan_splits(
            seq_lens, num_workers=132, rows=128, rows_per_tile=128, cost_model=cost_model
        )
        check_plan(plan, seq_lens, 128)
        loads = plan_loads(plan, seq_lens, rows=128, cost_model=cost_model)
        assert loads.max() - loads.min() <= 2 * (58 + overhead)


def test_a_lone_long_request_goes_to_all_workers():
    plan = plan_splits(i32(64 * 1000), num_workers=100, rows=16)
    assert (np.diff(plan.worker_start) == 1).all()
    assert np.ptp(np.asarray(plan.block_end - plan.block_start)[:100]) <= 6
    few = plan_splits(i32(64 * 3), num_workers=100, rows=16)
    assert int((few.request >= 0).sum()) == 1  # not worth a cut


@pytest.mark.parametrize(("length", "whole"), [(1024, True), (4096, False)])
def test_cutting_at_all_has_its_price(length, whole):
    """64 requests and 132 workers: short ones are cheaper left whole, long ones in two."""
    lens = i32(*[length] * 64)
    plan = plan_splits(lens, num_workers=132, rows=64, merge_overhead=8)
    check_plan(plan, lens, 64)
    assert (int(plan.tile_partial_start[-1]) == 0) == whole
    assert int(plan_splits(lens, num_workers=132, rows=64).tile_partial_start[-1]) > 0


@given(lengths_strategy)
def test_pairs_cost_no_more_than_workers_apart(seq_lens):
    def largest(**options):
        plan = plan_splits(i32(*seq_lens), num_workers=6, rows=ROWS, **options)
        check_plan(plan, seq_lens, ROWS)
        return float(plan_loads(plan, i32(*seq_lens), rows=ROWS).max())

    assert largest(merge_overhead=8, in_pairs=True) <= largest() + 8


@pytest.mark.parametrize(("requests", "halved"), [(40, False), (48, True), (66, True), (67, False)])
def test_pairs_halve_whole_tiles_where_they_can(requests, halved):
    """132 workers, requests of 64 blocks: where cutting freely costs more than halves."""
    lens = i32(*[4096] * requests)
    plan = plan_splits(lens, num_workers=132, rows=64, merge_overhead=8, in_pairs=True)
    check_plan(plan, lens, 64)
    blocks = np.asarray(plan.block_end - plan.block_start)[np.asarray(plan.request) >= 0]
    assert (blocks.tolist() == [32] * 2 * requests) == halved
    first = np.asarray(plan.worker_start)[:-1:2]  # of each pair
    assert not halved or not np.asarray(plan.block_start)[first].any()


def test_a_plan_for_other_lengths_does_not_cover():
    plan = plan_splits(i32(100, 200, 0), num_workers=3, rows=64)
    assert covered_requests(plan, i32(100, 300, 1)).tolist() == [True, False, False]


def test_fixed_plan_takes_a_traced_length_past_its_maximum_whole():
    seq_lens = i32(128, 300, 64)
    plan = jax.jit(
        lambda lens: plan_fixed(lens, split_size=64, max_seq_len=128, num_workers=3, rows=64)
    )(seq_lens)
    check_plan(plan, seq_lens, 64)
    assert plan.block_end[3] == 5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seq_lens": i32([1])}, ValueError, r"seq_lens must be \[B\]"),
        ({"seq_lens": np.ones(2)}, TypeError, "seq_lens must be an int32 array, got float64"),
        ({"seq_lens": i32()}, ValueError, "B of seq_lens must be a positive integer, got 0"),
        ({"seq_lens": i32(3, -1)}, ValueError, r"seq_lens\[1\] must be at least 0, got -1"),
        ({"num_workers": 0}, ValueError, "num_workers must be a positive integer, got 0"),
        ({"rows": 0}, ValueError, "rows must be a positive integer, got 0"),
        ({"rows_per_tile": -1}, ValueError, "rows_per_tile must be a positive integer, got -1"),
        ({"block_size": 1.5}, TypeError, "block_size must be an integer, got 1.5"),
        ({"block_size": 2**31}, ValueError, "block_size must be at most 2147483647, got 21474836"),
        ({"rows_per_tile": 0}, ValueError, "rows_per_tile must be a positive integer, got 0"),
        ({"rows_per_tile": 4.0}, TypeError, "rows_per_tile must be an integer, got 4.0"),
        ({"rows": True}, TypeError, "rows must be an integer, got True"),
        ({"rows": 2**40}, ValueError, "row tiles, rows / rows_per_tile, must be at most"),
        ({"num_workers": 2.0}, TypeError, "num_workers must be an integer, got 2.0"),
        ({"num_workers": 2**16}, ValueError, "num_workers must be at most 32768, got 65536"),
        ({"overhead": math.nan}, TypeError, "overhead must be an integer, got nan"),
        ({"overhead": 1.5}, TypeError, "overhead must be an integer, got 1.5"),
        ({"overhead": 2**31}, ValueError, "overhead must be at most 536870912, got 2147483648"),
        ({"overhead": 2**28, "rows": 256}, ValueError, "seq_lens, rows, block_size and overhead"),
        ({"cost_model": "fia", "overhead": 0.5}, TypeError, "overhead must be an integer"),
        ({"merge_overhead": math.nan}, TypeError, "merge_overhead must be an integer, got nan"),
        ({"merge_overhead": 2**31}, ValueError, "merge_overhead must be at most 268435456"),
        ({"in_pairs": "no"}, TypeError, "in_pairs must be True or False, got 'no'"),
        ({"in_pairs": 1}, TypeError, "in_pairs must be True or False, got 1"),
        ({"seq_lens": [1]}, TypeError, "seq_lens must be an int32 array, got list"),
        ({"seq_lens": np.ones(1, np.int64)}, TypeError, "seq_lens must be an int32 .* int64"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len must be a positive integer, got 0"),
        ({"max_seq_len": 2**31}, ValueError, "max_seq_len must be at most 2147483647, got"),
        (
            {"seq_lens": i32(7), "max_seq_len": 6},
            ValueError,
            "seq_lens must be at most max_seq_len = 6, got 7",
        ),
        ({"overhead": -1}, ValueError, "overhead must be at least 0, got -1"),
        ({"merge_overhead": -1}, ValueError, "merge_overhead must be at least 0, got -1"),
        ({"cost_model": "x"}, ValueError, "cost_model must be one of blocks, fia, got 'x'"),
        (
            {"num_workers": 3, "in_pairs": True},
            ValueError,
            "num_workers must be even with in_pairs, got 3",
        ),
    ],
)
def test_plan_splits_refuses(options, error, message):
    options = {"seq_lens": i32(1), "num_workers": 2, "rows": 4} | options
    with pytest.raises(error, match=message):
        plan_splits(options.pop("seq_lens"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_size": 100}, "split_size must be a multiple of block_size = 64, got 100"),
        ({"split_size": 0}, "split_size must be a positive integer, got 0"),
        ({"max_seq_len": 0}, "max_seq_len must be a positive integer, got 0"),
        ({"max_seq_len": 9}, "seq_lens must be at most max_seq_len = 9, got 10"),
        ({"max_seq_len": 2**31}, "max_seq_len must be at most 2147483647, got 2147483648"),
        ({"max_seq_len": 2**31 - 1, "rows": 4096}, "max_seq_len / split_size must give at most"),
    ],
)
def test_plan_fixed_refuses(options, message):
    options = {"split_size": 64, "max_seq_len": 64, "num_workers": 2, "rows": 4} | options
    with pytest.raises(ValueError, match=message):
        plan_fixed(i32(10), **options)


# ----------------------------------------------------------------------- every length, every mode


LONGEST = ([2**31 - 1] * 5, {"block_size": 1, "rows": 150, "overhead": 2, "in_pairs": True})


@pytest.mark.parametrize(
    ("seq_lens", "options"),
    [
        ([2**31 - 1] * 2, {}),
        ([2**31 - 1, 0, 7, 2**31 - 1, 2**30], {"cost_model": "fia", "rows": 150}),
        LONGEST,
        ([1000, 0, 70, 3, 5], {"overhead": 2**26, "merge_overhead": 2**28, "in_pairs": True}),
    ],
)
def test_no_sum_leaves_int32(seq_lens, options):
    """Work past int32, which wrapped: every block once, in shares that are as equal as ever."""
    options = {"num_workers": 6, "rows": 1} | options
    lens = i32(*seq_lens)
    plan = plan_splits(lens, **options)  # no value is looked at but whether it is below 0
    check_plan(plan, seq_lens, options["rows"])
    names = ("rows", "cost_model", "overhead")
    model = {name: options[name] for name in names if name in options}
    loads = np.asarray(plan_loads(plan, lens, **model), np.float64)

    by_rows = [math.ceil(min(64, options["rows"] - 64 * i) / 16) for i in range(plan.num_row_tiles)]
    blocks = [math.ceil(length / plan.block_size) for length in seq_lens]
    pieces = int((np.asarray(plan.request) >= 0).sum())
    if options.get("cost_model") == "fia":
        cost = [6 * rows + 10 * math.ceil(plan.block_size / 64) for rows in by_rows]
        total, overhead = sum(blocks) * sum(cost), 0
    else:
        total = sum(blocks) * len(by_rows)
        overhead = options.get("overhead", 5)
    assert loads.sum() == pytest.approx(total + pieces * overhead, rel=1e-5)
    if sum(blocks) > 1000:
        assert loads.max() <= (total + pieces * overhead) / 6 * 1.001 + 2 * overhead + 60


def test_fixed_plan_of_the_longest_lengths():
    """Pieces at multiples of split_size whatever the others are, and balanced past int32, too."""
    seq_lens = i32(2**31 - 1, 5, 2**31 - 1, 0, 2**30)
    options = {"split_size": 2**27, "max_seq_len": 2**31 - 1, "num_workers": 4, "rows": 1}
    plan = jax.jit(functools.partial(plan_fixed, block_size=1, **options))(seq_lens)
    check_plan(plan, seq_lens.tolist(), 1)
    start, end = np.asarray(plan.block_start)[:42], np.asarray(plan.block_end)[:42]
    assert not (start % 2**27).any()
    assert (end - start <= 2**27).all()
    loads = np.asarray(plan_loads(plan, seq_lens, rows=1))
    assert loads.max() <= loads.sum() / 4 + 2**27 + 5


def test_a_traced_length_past_the_maximum_is_covered():
    seq_lens = i32(128, 300, 64)
    plan = jax.jit(functools.partial(plan_splits, max_seq_len=128, num_workers=3, rows=64))(
        seq_lens
    )
    check_plan(plan, seq_lens, 64)


def test_plans_do_not_hang_on_the_modes_of_jax():
    """int32 and the same bits, with 64 bits as JAX's default width and no implicit promotion."""
    lens = i32(*LONGEST[0])
    pairs = functools.partial(plan_splits, num_workers=6, **LONGEST[1])
    others = [
        functools.partial(plan_splits, num_workers=2, rows=150, cost_model="fia", block_size=1),
        functools.partial(
            plan_fixed, num_workers=2, rows=150, split_size=2**24, max_seq_len=2**31 - 1
        ),
    ]
    wanted = pairs(lens)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        got = pairs(lens)
        for make in (pairs, *others):
            plan = jax.eval_shape(make, lens)
            assert {leaf.dtype for leaf in jax.tree.leaves(plan)} == {np.dtype(np.int32)}
            loads = jax.eval_shape(
                functools.partial(plan_loads, rows=64 * plan.num_row_tiles), plan, lens
            )
            assert loads.dtype == np.float32
            assert jax.eval_shape(covered_requests, plan, lens).dtype == bool
    chex.assert_trees_all_equal(got, wanted)
    chex.assert_trees_all_equal_dtypes(got, wanted)


def test_numpy_integers_count_as_what_they_are():
    narrow = np.uint8
    make = functools.partial(
        plan_splits,
        num_workers=narrow(200),
        rows=narrow(200),
        rows_per_tile=narrow(64),
        block_size=narrow(128),
        overhead=narrow(255),
        merge_overhead=narrow(255),
        in_pairs=np.bool_(True),
        max_seq_len=np.int16(1000),
    )
    plan = jax.eval_shape(make, i32(1000, 0, 70))
    static = plan.block_size, plan.rows_per_tile, plan.num_row_tiles, plan.num_partials
    assert static == (128, 64, 4, 398)
    assert {type(value) for value in static} == {int}


LENGTHS = i32(1000, 70, 0)
CUT = jax.tree.map(np.asarray, plan_splits(LENGTHS, num_workers=3, rows=64, overhead=1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seq_lens": np.ones(3)}, TypeError, "seq_lens must be an int32 array, got float64"),
        ({"seq_lens": i32(100, -1, 0)}, ValueError, r"seq_lens\[1\] must be at least 0, got -1"),
        ({"seq_lens": i32(1, 2)}, ValueError, r"seq_lens must be .* = \[3\], got shape \[2\]"),
        ({"seq_lens": i32(1000, 9, 0)}, ValueError, "plan must be made for these seq_lens"),
        ({"plan": None}, TypeError, "plan must be a SplitPlan, got NoneType"),
        ({"rows": 65}, ValueError, "rows must be those of the plan, 1 tiles of 64, got 65"),
        ({"overhead": 0.5}, TypeError, "overhead must be an integer, got 0.5"),
        ({"cost_model": None}, ValueError, "cost_model must be one of"),
    ],
)
def test_plan_loads_refuses(change, error, message):
    arguments = {"seq_lens": LENGTHS, "plan": CUT, "rows": 64} | change
    with pytest.raises(error, match=message):
        plan_loads(arguments.pop("plan"), arguments.pop("seq_lens"), **arguments)


# --------------------------------------------------------------------------------- what is refused


def changed(name, at, value):
    """CUT with other values in one of its arrays."""
    array = getattr(CUT, name).copy()
    array[at] = value
    return dataclasses.replace(CUT, **{name: array})


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (changed("block_start", slice(1, 3), [5, 10]), ValueError, r"plan.block_start\[1\] must"),
        (changed("block_start", 0, 1), ValueError, r"plan.block_start\[0\] must be 0, got 1"),
        (changed("block_end", 0, 5), ValueError, r"plan.block_start\[1\] must be 5, got 6"),
        (
            dataclasses.replace(
                changed("block_end", 0, 0), block_start=changed("block_start", 1, 0).block_start
            ),
            ValueError,
            "plan.block_end must be past block_start",
        ),
        (changed("worker_start", slice(None), 0), ValueError, r"plan.worker_start\[3\] must be 5"),
        (changed("worker_start", 0, 1), ValueError, r"plan.worker_start\[0\] must be 0, got 1"),
        (changed("worker_start", 1, 4), ValueError, "plan.worker_start must be in rising order"),
        (changed("partial", slice(0, 3), 0), ValueError, r"plan.partial\[1\] must be 1, got 0"),
        (changed("partial", slice(0, 3), -1), ValueError, r"plan.partial\[0\] must be 0, got -1"),
        (changed("partial", 4, 3), ValueError, r"plan.partial\[4\] must be -1, got 3"),
        (
            changed("tile_partial_start", 1, 2),
            ValueError,
            r"plan.tile_partial_start\[1\] must be 3",
        ),
        (changed("request", 4, 3), ValueError, "plan.request must be below the 3 requests, got 3"),
        (changed("request", 4, 1), ValueError, "plan.request must name all 3 tiles, got 2"),
        (changed("request", 3, 2), ValueError, "row_tile must be of the tiles 0, 1, .* got 2 at 3"),
        (changed("request", 2, -1), ValueError, "plan.request must be -1 at the end only"),
        (changed("request", 5, -2), ValueError, r"plan.request\[5\] must be -1, got -2"),
        (changed("row_tile", 0, 1), ValueError, "plan.row_tile must be in 0 .. 0, got 1 at 0"),
        (changed("block_end", 5, 1), ValueError, r"plan.block_end\[5\] must be 0, got 1"),
        (
            changed("block_end", 3, 1),
            ValueError,
            "plan must be made for these seq_lens.* request 1",
        ),
        (
            dataclasses.replace(CUT, num_partials=2),
            ValueError,
            "plan.num_partials must be at least the 3",
        ),
        (dataclasses.replace(CUT, block_size=0), ValueError, "plan.block_size must be a positive"),
        (
            dataclasses.replace(CUT, block_size=64.0),
            TypeError,
            "plan.block_size must be an integer",
        ),
        (
            dataclasses.replace(CUT, block_size=32),
            ValueError,
            "plan must be made for these seq_len",
        ),
        (
            dataclasses.replace(CUT, rows_per_tile=0),
            ValueError,
            "plan.rows_per_tile must be a posi",
        ),
        (
            dataclasses.replace(CUT, num_row_tiles=2),
            ValueError,
            "multiple of num_row_tiles = 2, got",
        ),
        (
            dataclasses.replace(CUT, num_partials=-1),
            ValueError,
            "plan.num_partials must be at least 0",
        ),
        (dataclasses.replace(CUT, fixed=1), TypeError, "plan.fixed must be True or False, got 1"),
        (
            dataclasses.replace(CUT, partial=CUT.partial[:-1]),
            ValueError,
            r"plan.partial must be \[P\] = \[6",
        ),
        (
            dataclasses.replace(CUT, partial=[-1] * 6),
            TypeError,
            "plan.partial must be an int32 array",
        ),
        (
            dataclasses.replace(CUT, request=CUT.request.astype(np.int64)),
            TypeError,
            "plan.request must be an int32 array, got int64",
        ),
        (
            dataclasses.replace(CUT, worker_start=CUT.worker_start[:1]),
            ValueError,
            "workers of plan.worker_start must be a positive integer, got 0",
        ),
        (
            dataclasses.replace(CUT, worker_start=np.int32(0)),
            ValueError,
            r"plan.worker_start must be \[W \+ 1\]",
        ),
        (
            dataclasses.replace(CUT, tile_partial_start=CUT.tile_partial_start[:1]),
            ValueError,
            "plan.tile_partial_start must be of num_tiles",
        ),
    ],
)
def test_a_forged_plan_is_refused(plan, error, message):
    tables = np.arange(3 * 63, dtype=np.int32).reshape(3, 63)
    with pytest.raises(error, match=message):
        paged_mla_attention(
            np.zeros((3, 1, 64, 48), np.float32),
            PagedKVCache.create(
                3 * 63, page_size=16, kv_lora_rank=32, rope_dim=16, dtype="float32"
            ),
            tables,
            LENGTHS,
            softmax_scale=1.0,
            implementation="split_kv",
            plan=plan,
        )


def test_a_forged_plan_is_refused_whatever_the_lengths_are():
    """Its pieces are known where the lengths are traced."""
    forged = changed("partial", slice(0, 3), 0)
    with pytest.raises(ValueError, match=r"plan.partial\[1\] must be 1, got 0"):
        jax.eval_shape(functools.partial(plan_loads, forged, rows=64), LENGTHS)


# ----------------------------------------------------------------------------------- execution

BLOCK = 16
RAGGED = ([150, 0, 33, 256], [3, 0, 3, 1])
attend_plan = jax.jit(
    lambda q, cache, tables, lens, queries, plan: paged_mla_attention(
        q,
        cache,
        tables,
        lens,
        query_lens=queries,
        softmax_scale=SCALE,
        implementation="split_kv",
        plan=plan,
    ),
    compiler_options=OPTIMISED,
)


def run(batch, plan):
    return attend_plan(*batch.args, batch.query_lens, plan)


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
    assert_matches(run(batch, plan), batch.oracle(), 2e-5, 2e-6)


@pytest.mark.parametrize(
    ("num_workers", "rows_per_tile", "cost_model"),
    [(1, 16, "blocks"), (3, 4, "blocks"), (9, 8, "fia"), (30, 12, "fia")],
)
def test_planned_splits_match_float64(num_workers, rows_per_tile, cost_model):
    batch = make_batch(np.random.default_rng(0), *RAGGED, heads=4, page_size=64)
    plan = plan_splits(
        batch.seq_lens,
        num_workers=num_workers,
        rows=12,
        rows_per_tile=rows_per_tile,
        block_size=BLOCK,
        cost_model=cost_model,
    )
    assert_matches(run(batch, plan), batch.oracle(), 2e-5, 2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fixed_splits_are_batch_invariant(dtype):
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
        return run(batch, plan)

    for seed, length in enumerate((201, 32, 7)):
        alone = make_batch(np.random.default_rng(seed), [length], [2], dtype=dtype)
        wanted = [np.asarray(x)[0] for x in attend(alone)]
        for others in ([9, 256, 140], [2, 2, 2], [130, 64, 255]):
            for place in (0, 3):
                lengths = [*others[:place], length, *others[place:]]
                batch = make_batch(np.random.default_rng(99), lengths, [2, 2, 2, 2], dtype=dtype)
                pages = np.asarray(batch.cache.pages).copy()
                for slot in range(-(-length // 16)):
                    here, there = batch.block_tables[place, slot], alone.block_tables[0, slot]
                    pages[here] = np.asarray(alone.cache.pages)[there]
                batch.cache = dataclasses.replace(batch.cache, pages=jnp.asarray(pages))
                batch.q = batch.q.at[place].set(alone.q[0])
                for got, want in zip(attend(batch), wanted, strict=True):
                    np.testing.assert_array_equal(np.asarray(got)[place], want)
