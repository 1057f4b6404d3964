"""What the functions of split plans refuse: arguments by name, and plans that are no plans."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from split_plans import i32

from mla_jax.attention import paged_mla_attention
from mla_jax.cache import PagedKVCache
from mla_jax.splits.planner import SplitPlan, plan_fixed, plan_loads, plan_splits


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
        ({"query_lens": i32(2)}, TypeError, "num_heads must be an integer, got None"),
        ({"query_lens": i32(2), "num_heads": 3}, ValueError, "num_heads must divide rows = 4"),
        (
            {"query_lens": i32(3), "num_heads": 2},
            ValueError,
            r"query_lens\[0\] must be in 0 .. 2, got 3",
        ),
        ({"query_lens": i32(1, 1), "num_heads": 2}, ValueError, r"query_lens must be \[B\]"),
        ({"query_lens": np.ones(1), "num_heads": 2}, TypeError, "query_lens must be an int32"),
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


LENGTHS = i32(1000, 70, 0)
# A sound plan, written out: otherwise every process that collects this file compiles a planner.
CUT = SplitPlan(
    request=i32(0, 0, 0, 1, 2, -1),
    row_tile=i32(0, 0, 0, 0, 0, 0),
    block_start=i32(0, 6, 13, 0, 0, 0),
    block_end=i32(6, 13, 16, 2, 0, 0),
    partial=i32(0, 1, 2, -1, -1, -1),
    worker_start=i32(0, 1, 2, 5),
    tile_partial_start=i32(0, 3, 3, 3),
    block_size=64,
    rows_per_tile=64,
    num_row_tiles=1,
    num_partials=4,
)


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
        (
            dataclasses.replace(CUT, num_heads=-1),
            ValueError,
            "plan.num_heads must be at least 0, got -1",
        ),
        (
            dataclasses.replace(CUT, num_heads=32),
            ValueError,
            "plan must be for causal=True and 64 heads: made with query_lens and no kv_axis, it",
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
