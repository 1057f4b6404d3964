"""What the Hopper kernels know of a plan: which pieces a worker walks, and what pairs share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_jax.splits.planner import plan_fixed, plan_splits
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


def walks(plan, finish):
    """For each worker the pieces that it walks, in its order; and all records."""
    mine, pieces = map(np.asarray, jitted(plan, finish))
    found = []
    for row in mine:
        first, stop = row[ITEM_FIELDS], row[ITEM_FIELDS + 1]
        at, step = (int(first_of(row)), step_of(row)) if finish == "in_pairs" else (first, 1)
        if stop > first:
            np.testing.assert_array_equal(row[:ITEM_FIELDS], pieces[at])
        found.append([at + step * k for k in range(stop - first)])
    return found, pieces


@given(lengths_strategy, st.sampled_from([1, 6, 7]))
def test_pairs_share_what_both_come_to_last(seq_lens, num_workers):
    lens, even = jnp.asarray(seq_lens, jnp.int32), num_workers % 2 == 0
    plan = plan_splits(lens, num_workers=num_workers, rows=100, in_pairs=even)
    apart, plain = walks(plan, "merge")
    walked, pieces = walks(plan, "in_pairs")
    assert len(walked) == num_workers + num_workers % 2
    assert [sorted(mine) for mine in walked[:num_workers]] == apart
    marked = pieces[:, PARTIAL] < -1
    np.testing.assert_array_equal(kept_partial(pieces[marked, PARTIAL]), plain[marked, PARTIAL])
    np.testing.assert_array_equal(pieces[~marked], plain[~marked])
    for left, right in zip(walked[::2], walked[1::2], strict=True):
        cut = [p for p in left + right if plain[p, PARTIAL] >= 0]
        alone = len(cut) == 2 == plain[cut[0], NUM_PARTIALS]
        alone = alone and (plain[cut[0], :2] == plain[cut[1], :2]).all()  # of one tile
        assert marked[left + right].sum() == (2 if alone else 0)
        if alone:
            assert [left[-1], right[-1]] == sorted(cut)


@given(lengths_strategy, st.sampled_from([1, 2, 5, 7]))
def test_of_two_pieces_the_first_is_kept(seq_lens, num_workers):
    lens = jnp.asarray(seq_lens, jnp.int32)
    plan = plan_splits(lens, num_workers=num_workers, rows=100, rows_per_tile=128)
    walked, plain = walks(plan, "merge")
    again, pieces = walks(plan, "by_first")
    assert again == walked
    two = (plain[:, PARTIAL] >= 0) & (plain[:, NUM_PARTIALS] == 2)
    np.testing.assert_array_equal(pieces[~two], plain[~two])
    for p in np.flatnonzero(two[:-1] & (plain[:, PARTIAL] == plain[:, FIRST_PARTIAL])[:-1]):
        np.testing.assert_array_equal(plain[p, :2], plain[p + 1, :2])  # of one tile
        assert p in [mine[-1] for mine in walked if mine]
        assert p + 1 in [mine[0] for mine in walked if mine]
        slot = plain[p, PARTIAL]
        np.testing.assert_array_equal(pieces[p, PARTIAL:], [kept_partial(slot), slot, 2])
        np.testing.assert_array_equal(pieces[p + 1, PARTIAL:], [slot + 1, slot + 1, 1])


@pytest.mark.parametrize("finish", ["merge", "in_pairs", "by_first"])
def test_a_fixed_plan_shares_nothing(finish):
    lens = jnp.asarray([256, 1000], jnp.int32)
    plan = plan_fixed(lens, split_size=128, max_seq_len=1024, num_workers=10, rows=64)
    walked, pieces = walks(plan, finish)
    assert [mine for mine in walked if mine] == [[p] for p in range(10)]
    assert (pieces[:, PARTIAL] >= -1).all()
