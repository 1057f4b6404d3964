"""Split plans under jit, of lengths up to int32's largest, and in every mode of JAX."""

import functools
import math

import chex
import jax
import numpy as np
import pytest
from split_plans import check_plan, i32

from mla_jax.splits.planner import covered_requests, plan_fixed, plan_loads, plan_splits


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (plan_splits, {"cost_model": "fia", "max_seq_len": 1024}),
        (plan_fixed, {"split_size": 128, "max_seq_len": 1024}),
    ],
)
def test_plans_trace_once_whatever_the_lengths(make, options):
    """A traced length past the maximum is covered, too: by the last item of its request."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def plan(seq_lens):
        return make(seq_lens, num_workers=5, rows=64, **options)

    for seq_lens in (i32(1000, 0, 70), i32(3, 900, 0), i32(64, 65, 0), i32(128, 2000, 64)):
        check_plan(plan(seq_lens), seq_lens, 64)


def test_a_traced_function_may_close_over_the_lengths():
    """They are known while it is traced, so they are checked."""
    lens, options = jax.device_put(i32(5, 70)), {"num_workers": 4, "rows": 16}
    check_plan(jax.jit(lambda: plan_splits(lens, max_seq_len=128, **options))(), lens, 16)
    with pytest.raises(ValueError, match="at most max_seq_len = 64, got 70"):
        jax.jit(lambda: plan_splits(lens, max_seq_len=64, **options))()


LONGEST = ([2**31 - 1] * 5, {"block_size": 1, "rows": 150, "overhead": 2, "in_pairs": True})


@pytest.mark.parametrize(
    ("seq_lens", "options"),
    [
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
