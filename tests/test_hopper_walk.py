"""What the Hopper kernels know of a plan: which pieces a worker walks, and what pairs share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_jax.split_kv import plan_fixed, plan_splits
from pallas_kernels.hopper.walk import RECORD, SLOT, SLOTS, first_of, records, shared_slot, step_of

jitted = jax.jit(records, static_argnums=1)
lengths_strategy = st.lists(st.integers(0, 3000), min_size=5, max_size=5)


def walks(plan, in_pairs):
    """For each worker the pieces that it walks, in its order; and all records."""
    mine, pieces = map(np.asarray, jitted(plan, in_pairs))
    found = []
    for row in mine:
        first, stop = row[RECORD], row[RECORD + 1]
        at, step = (int(first_of(row)), step_of(row)) if in_pairs else (first, 1)
        if stop > first:
            np.testing.assert_array_equal(row[:RECORD], pieces[at])
        found.append([at + step * k for k in range(stop - first)])
    return found, pieces


@given(lengths_strategy, st.sampled_from([1, 6, 7]))
def test_pairs_share_what_both_come_to_last(seq_lens, num_workers):
    lens, even = jnp.asarray(seq_lens, jnp.int32), num_workers % 2 == 0
    plan = plan_splits(lens, num_workers=num_workers, rows=100, in_pairs=even)
    apart, plain = walks(plan, False)
    walked, pieces = walks(plan, True)
    assert len(walked) == num_workers + num_workers % 2
    assert [sorted(mine) for mine in walked[:num_workers]] == apart
    marked = pieces[:, SLOT] < -1
    np.testing.assert_array_equal(shared_slot(pieces[marked, SLOT]), plain[marked, SLOT])
    np.testing.assert_array_equal(pieces[~marked], plain[~marked])
    for left, right in zip(walked[::2], walked[1::2], strict=True):
        cut = [p for p in left + right if plain[p, SLOT] >= 0]
        alone = len(cut) == 2 == plain[cut[0], SLOTS]
        alone = alone and (plain[cut[0], :2] == plain[cut[1], :2]).all()  # of one tile
        assert marked[left + right].sum() == (2 if alone else 0)
        if alone:
            assert [left[-1], right[-1]] == sorted(cut)


@pytest.mark.parametrize("in_pairs", [False, True])
def test_a_fixed_plan_shares_nothing(in_pairs):
    lens = jnp.asarray([256, 1000], jnp.int32)
    plan = plan_fixed(lens, split_size=128, max_seq_len=1024, num_workers=10, rows=64)
    walked, pieces = walks(plan, in_pairs)
    assert [mine for mine in walked if mine] == [[p] for p in range(10)]
    assert (pieces[:, SLOT] >= -1).all()
