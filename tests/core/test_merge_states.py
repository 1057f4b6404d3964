"""`merge_states` against float64: any number of parts in any order, some of them empty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_jax.online_softmax import merge_states

SEEDS = st.integers(0, 2**32 - 1)
jitted = jax.jit(merge_states)


def draw_parts(seed, parts, rows=6, dim=8):
    """Normalised parts, some of them empty with garbage in o."""
    rng = np.random.default_rng(seed)
    o = rng.standard_normal((parts, rows, dim)).astype(np.float32)
    lse = (20 * rng.standard_normal((parts, rows))).astype(np.float32)
    empty = rng.random((parts, rows)) < 0.4
    lse[empty], o[empty] = -np.inf, np.nan
    return o, lse


def fill_up(o, lse, parts):
    """With empty parts, which do not count, up to so many: one compiled program serves them all."""
    missing = (0, parts - len(o))
    return (
        np.pad(o, [missing, (0, 0), (0, 0)], constant_values=np.nan),
        np.pad(lse, [missing, (0, 0)], constant_values=-np.inf),
    )


def merge_float64(o, lse):
    merged, merged_lse = np.zeros(o.shape[1:]), np.full(lse.shape[1:], -np.inf)
    for row in range(lse.shape[1]):
        seen = np.isfinite(lse[:, row])
        if seen.any():
            top = lse[seen, row].max()
            weights = np.exp(lse[seen, row].astype(np.float64) - top)
            merged[row] = weights @ o[seen, row] / weights.sum()
            merged_lse[row] = top + np.log(weights.sum())
    return merged, merged_lse


@given(SEEDS, st.integers(1, 6))
def test_merge_matches_float64_and_ignores_empty_parts(seed, parts):
    o, lse = draw_parts(seed, parts)
    wanted = merge_float64(o, lse)
    got = jitted(*fill_up(o, lse, 6))
    np.testing.assert_allclose(got[0], wanted[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(got[1], wanted[1], rtol=3e-7, atol=2e-6)
    assert not np.asarray(got[0])[np.isneginf(wanted[1])].any()


@given(SEEDS, st.integers(3, 6), st.data())
def test_merge_is_associative_and_takes_any_order(seed, parts, data):
    o, lse = draw_parts(seed, parts)
    order = data.draw(st.permutations(range(parts)))
    cut = data.draw(st.integers(1, parts - 1))
    whole = jitted(*fill_up(o, lse, 6))
    o, lse = o[np.array(order)], lse[np.array(order)]
    parts = slice(None, cut), slice(cut, None)
    halves = [jitted(*fill_up(o[part], lse[part], 6)) for part in parts]
    nested = jitted(*(np.stack(pair) for pair in zip(*halves, strict=True)))
    np.testing.assert_allclose(nested[0], whole[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(nested[1], whole[1], rtol=3e-7, atol=2e-6)


def test_merge_of_one_part_with_empty_ones_keeps_its_bits():
    o, lse = draw_parts(9, 1)
    o = np.where(np.isneginf(lse)[..., None], 0, o)
    empty = np.full_like(o, np.nan), np.full_like(lse, -np.inf)
    for parts in ([(o, lse)], [(o, lse), empty], [empty, empty, (o, lse)]):
        merged = jitted(*(np.concatenate(pair) for pair in zip(*parts, strict=True)))
        np.testing.assert_array_equal(merged[0], o[0])
        np.testing.assert_array_equal(merged[1], lse[0])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_merge_axis_and_dtype(axis):
    o, lse = draw_parts(10, 3)
    o = np.nan_to_num(o).astype(jnp.bfloat16)
    merged, merged_lse = merge_states(np.moveaxis(o, 0, axis % 2), np.moveaxis(lse, 0, axis), axis)
    assert merged.dtype == jnp.bfloat16
    assert merged_lse.dtype == jnp.float32
    wanted = merge_float64(o.astype(np.float64), lse)[0]
    np.testing.assert_allclose(np.asarray(merged, np.float64), wanted, rtol=1e-2, atol=1e-2)


def test_merge_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"lse must be o's shape without the last = \(2, 3\)"):
        merge_states(jnp.ones((2, 3, 4)), jnp.ones((2, 4)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"axis": 7}, ValueError, r"axis must be in -2 .. 1, got 7"),
        ({"axis": -3}, ValueError, r"axis must be in -2 .. 1, got -3"),
        ({"axis": 1.0}, TypeError, "axis must be an integer, got 1.0"),
        ({"axis": None}, TypeError, "axis must be an integer, got None"),
        ({"o": np.ones((2, 3, 4), np.int32)}, TypeError, "o must be an array of .* got int32"),
        ({"o": [[[1.0]]]}, TypeError, "o must be an array, got list"),
        ({"lse": np.ones((2, 3), np.int32)}, TypeError, "lse must be an array of .* got int32"),
        ({"lse": None}, TypeError, "lse must be an array, got NoneType"),
        ({"o": np.ones(4, np.float32), "lse": np.ones(1, np.float32)},
         ValueError, "lse must be o's shape"),
        ({"o": np.ones((0, 3, 4), np.float32), "lse": np.ones((0, 3), np.float32)},
         ValueError, "the number of parts must be a positive integer"),
    ],
)  # fmt: skip
def test_merge_refuses(change, error, message):
    good = {"o": np.ones((2, 3, 4), np.float32), "lse": np.ones((2, 3), np.float32)}
    with pytest.raises(error, match=message):
        merge_states(**(good | change))
