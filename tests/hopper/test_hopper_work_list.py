"""The work list of the Hopper kernels: the items of each worker, and which tiles pairs share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from even_plan import even_plan
from hypothesis import given
from hypothesis import strategies as st

from mla_jax.splits.planner import plan_fixed, plan_splits
from pallas_kernels.hopper.simulated import kept_items
from pallas_kernels.hopper.work_items import (
    FIRST_PARTIAL,
    ITEM_FIELDS,
    NUM_PARTIALS,
    PARTIAL,
    first_of,
    kept_partial,
    step_of,
    work_list,
)  # fmt: skip

jitted = jax.jit(work_list, static_argnums=1)
lengths_strategy = st.lists(st.integers(0, 3000), min_size=5, max_size=5)


def schedules(plan, finish):
    """Returns per worker the indices of its items, in its order, and all items."""
    ranges, items, _ = map(np.asarray, jitted(plan, finish))
    np.testing.assert_array_equal(kept_items(plan, finish), items[:, PARTIAL] < -1)
    found = []
    for row in ranges:
        first, stop = row[ITEM_FIELDS], row[ITEM_FIELDS + 1]
        index, step = (int(first_of(row)), step_of(row)) if finish == "in_pairs" else (first, 1)
        if stop > first:
            np.testing.assert_array_equal(row[:ITEM_FIELDS], items[index])
        found.append([index + step * k for k in range(stop - first)])
    return found, items


def plan_for(seq_lens, num_workers):
    """Returns a plan in pairs for an even number of workers."""
    if num_workers % 2 == 0:
        lens = jnp.asarray(seq_lens, jnp.int32)
        return plan_splits(lens, num_workers=num_workers, rows=100, in_pairs=True)
    sizes = {"workers": num_workers, "most_workers": num_workers}
    return even_plan(seq_lens, rows=100, rows_per_tile=64, **sizes)


@given(lengths_strategy, st.sampled_from([6, 7]))
def test_pairs_share_the_tile_that_both_run_last(seq_lens, num_workers):
    plan = plan_for(seq_lens, num_workers)
    apart, plain = schedules(plan, "merge")
    scheduled, items = schedules(plan, "in_pairs")
    assert len(scheduled) == num_workers + num_workers % 2
    assert [sorted(own) for own in scheduled[:num_workers]] == apart
    marked = items[:, PARTIAL] < -1
    np.testing.assert_array_equal(kept_partial(items[marked, PARTIAL]), plain[marked, PARTIAL])
    np.testing.assert_array_equal(items[~marked], plain[~marked])
    for left, right in zip(scheduled[::2], scheduled[1::2], strict=True):
        split = [p for p in left + right if plain[p, PARTIAL] >= 0]
        alone = len(split) == 2 == plain[split[0], NUM_PARTIALS]
        alone = alone and (plain[split[0], :2] == plain[split[1], :2]).all()  # of one tile
        assert marked[left + right].sum() == (2 if alone else 0)
        if alone:
            assert [left[-1], right[-1]] == sorted(split)


@given(lengths_strategy)
def test_of_two_items_the_first_is_kept(seq_lens):
    plan = plan_for(seq_lens, 7)
    scheduled, plain = schedules(plan, "merge")
    again, items = schedules(plan, "by_first")
    assert again == scheduled
    two = (plain[:, PARTIAL] >= 0) & (plain[:, NUM_PARTIALS] == 2)
    np.testing.assert_array_equal(items[~two], plain[~two])
    for p in np.flatnonzero(two[:-1] & (plain[:, PARTIAL] == plain[:, FIRST_PARTIAL])[:-1]):
        np.testing.assert_array_equal(plain[p, :2], plain[p + 1, :2])  # of one tile
        assert p in [own[-1] for own in scheduled if own]
        assert p + 1 in [own[0] for own in scheduled if own]
        partial = plain[p, PARTIAL]
        np.testing.assert_array_equal(items[p, PARTIAL:], [kept_partial(partial), partial, 2])
        np.testing.assert_array_equal(items[p + 1, PARTIAL:], [partial + 1, partial + 1, 1])


@pytest.mark.parametrize("finish", ["merge", "in_pairs", "by_first"])
def test_a_fixed_plan_shares_nothing(finish):
    lens = jnp.asarray([256, 1000], jnp.int32)
    plan = plan_fixed(lens, split_size=128, max_seq_len=1024, num_workers=10, rows=64)
    scheduled, items = schedules(plan, finish)
    assert [own for own in scheduled if own] == [[p] for p in range(10)]
    assert (items[:, PARTIAL] >= -1).all()
