"""The op, every implementation against float64: ragged batches, options, poison."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged_batch import (
    PURE,
    RANK,
    ROPE,
    SCALE,
    TOLERANCE,
    assert_matches,
    make_batch,
    relative_error,
)

from mla_jax.attention import paged_mla_attention
from mla_jax.cache import PAGE_SIZES, PagedKVCache
from mla_jax.reference.attention import attention_float64
from mla_jax.splits.planner import plan_splits

# Decode, MTP, a chunk behind a prefix, a whole prefill and an empty request, in one batch.
RAGGED = ([200, 131, 64, 5, 0], [1, 2, 5, 5, 0])
attend = functools.partial(paged_mla_attention, softmax_scale=SCALE)


def i32(*values):
    return np.array(values, np.int32)


# Rows are read from pages before an implementation sees them: tests/cache has all page sizes,
# layouts and dtypes. Here every page size occurs with both layouts, in 4 and in 2 bytes, and every
# layout with all dtypes.
HALVES = ("bfloat16", "bfloat16", "float16", "float16")
PAIRWISE = [
    case
    for i, (page_size, half) in enumerate(zip(PAGE_SIZES, HALVES, strict=True))
    for case in (
        (page_size, ("ND", "NZ")[i % 2], "float32"),
        (page_size, ("NZ", "ND")[i % 2], half),
    )
]


@pytest.mark.parametrize(
    ("implementation", "page_size", "layout", "dtype"),
    [
        *(("xla", *case) for case in PAIRWISE),
        *(("reference", *case) for case in PAIRWISE[:4] if case[2] == "float32"),
    ],
)
def test_ragged_batch_matches_float64(implementation, page_size, layout, dtype):
    rng = np.random.default_rng([page_size, len(dtype), len(layout)])
    batch = make_batch(rng, *RAGGED, page_size=page_size, layout=layout, dtype=dtype)
    got = attend(*batch.args, query_lens=batch.query_lens, implementation=implementation)
    assert got[0].dtype == jnp.dtype(dtype)
    assert_matches(got, batch.oracle(), TOLERANCE[dtype], 1e-5)


def test_split_kv_plans_for_itself():
    """Here without a mask. In float32 with "multiply" and a mask: test_without_jit."""
    batch = make_batch(
        np.random.default_rng(64), *RAGGED, page_size=64, layout="NZ", dtype="float16"
    )
    got = attend(
        *batch.args,
        query_lens=batch.query_lens,
        implementation="split_kv",
        rescale="exponent_add",
        **(options := {"softmax_scale": 3.0, "causal": False}),
    )
    assert_matches(got, batch.oracle(**options), TOLERANCE["float16"], 2e-5)


@pytest.mark.parametrize(
    ("page_size", "layout", "dtype", "rescale"),
    [(16, "ND", "float32", "multiply"), (64, "NZ", "bfloat16", "exponent_add")],
)
def test_blockwise_under_jit(page_size, layout, dtype, rescale):
    """With a request whose lengths can't be: NaN, as from every implementation."""
    batch = make_batch(
        np.random.default_rng(page_size), *RAGGED, page_size=page_size, layout=layout, dtype=dtype
    )
    run = jax.jit(functools.partial(attend, implementation="blockwise", rescale=rescale))
    wanted = batch.oracle()
    batch.seq_lens = np.where(np.arange(5) == 2, -3, batch.seq_lens).astype(np.int32)
    o, lse = map(np.asarray, run(*batch.args, query_lens=batch.query_lens))
    assert np.isnan(o[2].astype(np.float32)).all()
    assert np.isnan(lse[2]).all()
    good = np.array([0, 1, 3, 4])
    assert_matches((o[good], lse[good]), [w[good] for w in wanted], TOLERANCE[dtype], 1e-5)


@pytest.mark.parametrize(
    ("page_size", "dtype"),
    [(1, "float16"), (64, "bfloat16")],  # float32: below, of any lengths
)
def test_exponent_add_matches_float64(page_size, dtype):
    batch = make_batch(np.random.default_rng(3), *RAGGED, page_size=page_size, dtype=dtype)
    got = attend(*batch.args, query_lens=batch.query_lens, rescale="exponent_add")
    assert_matches(got, batch.oracle(), TOLERANCE[dtype], 1e-5)


@pytest.mark.parametrize("implementation", PURE)
def test_without_jit(implementation):
    batch = make_batch(np.random.default_rng(4), *RAGGED)
    options = {"implementation": implementation, "query_lens": batch.query_lens}
    got = attend(*batch.args, **options)
    assert_matches(got, batch.oracle(), 2e-5, 1e-5)
    alone = attend(*batch.args, **options, return_lse=False)
    np.testing.assert_array_equal(alone, got[0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_softmax_scale_and_all_keys_under_jit(implementation):
    batch = make_batch(np.random.default_rng(5), *RAGGED)
    options = {"softmax_scale": 3.0, "causal": False}
    run = jax.jit(functools.partial(paged_mla_attention, implementation=implementation, **options))
    got = run(*batch.args, query_lens=batch.query_lens)
    assert_matches(got, batch.oracle(**options), 2e-5, 2e-5)


@pytest.mark.parametrize(
    ("implementation", "heads"),
    [("xla", 1), ("xla", 128), ("reference", 5), ("split_kv", 70)],
)
def test_any_head_count_and_no_query_lens(implementation, heads):
    """Without query_lens all tokens are real, and those before position 0 see no key."""
    rng = np.random.default_rng(heads)
    batch = make_batch(rng, [70, 1, 0], [2, 2, 2], heads=heads)
    got = attend(*batch.args, implementation=implementation)
    assert_matches(got, batch.oracle(query_lens=None), 2e-5, 1e-5)
    assert np.isneginf(got[1][1, 0]).all()


@pytest.mark.parametrize("partial_dtype", ["float32", "bfloat16"])
def test_partial_dtype_rounds_cut_tiles_only(partial_dtype):
    batch = make_batch(np.random.default_rng(6), [256, 16], [1, 1])
    plan = plan_splits(batch.seq_lens, num_workers=4, rows=4, rows_per_tile=4, block_size=16)
    assert plan.tile_partial_start.tolist()[1:] == [3, 3]  # the first request is cut in three
    got = attend(*batch.args, implementation="split_kv", plan=plan, partial_dtype=partial_dtype)
    o, lse = batch.oracle()
    error = relative_error(got[0][0], o[0])
    assert error < TOLERANCE[partial_dtype]
    assert (error > 1e-5) == (partial_dtype != "float32")  # it is really used
    assert relative_error(got[0][1], o[1]) < 2e-6
    np.testing.assert_allclose(got[1], lse, rtol=0, atol=1e-5)


def test_mixed_dtypes_are_promoted():
    batch = make_batch(np.random.default_rng(7), *RAGGED, dtype="bfloat16")
    batch.q = jax.device_put(np.asarray(batch.q).astype(np.float32) * np.float32(1.001))
    for implementation in ("reference", "xla"):  # split_kv takes its scores as xla does
        got = attend(*batch.args, query_lens=batch.query_lens, implementation=implementation)
        assert got[0].dtype == jnp.float32
        assert_matches(got, batch.oracle(), TOLERANCE["bfloat16"], 1e-5)


@given(
    st.lists(st.integers(0, 96), min_size=3, max_size=3),
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
    st.sampled_from([(1, "NZ", "multiply"), (16, "ND", "exponent_add"), (64, "NZ", "multiply")]),
    st.integers(0, 2**32 - 1),
)
def test_any_paging_and_layout_is_the_contiguous_result(lens, queries, static, seed):
    """Random lengths, page order, garbage table slots and NaN page tails never show."""
    queries = [min(pair) for pair in zip(lens, queries, strict=True)]
    page_size, layout, rescale = static
    batch = make_batch(
        np.random.default_rng(seed),
        lens,
        queries,
        num_queries=4,
        page_size=page_size,
        layout=layout,
        capacity=128,
    )
    got = attend(*batch.args, query_lens=batch.query_lens, rescale=rescale)
    assert_matches(got, batch.oracle(), 2e-5, 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_decode_loop_traces_once(implementation):
    """Append and attend while lengths grow over page edges, a request finishes, one is empty.

    With split_kv and a plan for each step: tests/core/test_planning.py.
    """
    chex.clear_trace_counter()
    rng = np.random.default_rng(8)
    cache = PagedKVCache.create(24, page_size=16, kv_lora_rank=RANK, rope_dim=ROPE, dtype="float32")
    tables = rng.permutation(24).reshape(3, 8).astype(np.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(cache, q, kv, seq_lens, new):
        cache = cache.append(kv, tables, seq_lens, new)
        seq_lens = seq_lens + new
        plan = plan_splits(seq_lens, num_workers=4, rows=4, rows_per_tile=4, block_size=16)
        result = attend(
            q, cache, tables, seq_lens, query_lens=new, implementation=implementation, plan=plan
        )
        return cache, result

    rows, seq_lens = [np.zeros((0, RANK + ROPE))] * 3, i32(0, 0, 0)
    for new in [i32(2, 0, 2)] * 12 + [i32(1, 2, 0)] * 9:
        q, kv = (rng.standard_normal(s).astype(np.float32) for s in ((3, 2, 2, 48), (3, 2, 48)))
        cache, got = step(cache, q, kv, seq_lens, new)
        o = np.asarray(got[0])
        seq_lens = seq_lens + new
        rows = [np.concatenate([r, k[:n]]) for r, k, n in zip(rows, kv, new, strict=True)]
        for request, (count, length) in enumerate(zip(new, seq_lens, strict=True)):
            assert len(rows[request]) == length
            for token in range(count):
                keys = rows[request][: length - count + token + 1]
                scores = SCALE * np.asarray(q[request, token], np.float64) @ keys.T
                weights = np.exp(scores)
                wanted = weights @ keys[:, :RANK] / weights.sum(1, keepdims=True)
                assert relative_error(o[request, token], wanted) < 2e-5


@pytest.mark.parametrize(
    ("granularity", "page_size", "layout", "implementation"),
    [
        ("token", 64, "ND", "xla"),  # split_kv: tests/sharding/test_key_shards.py
        ("token", 128, "NZ", "xla"),
        ("token", 64, "NZ", "reference"),
        ("group", 1, "NZ", "xla"),
        ("tensor", 1, "ND", "xla"),
    ],
)
def test_int8_cache_matches_float64_on_its_dequantised_rows(
    granularity, page_size, layout, implementation
):
    """Garbage int8, NaN scales and NaN rope past the lengths never show."""
    batch = make_batch(
        np.random.default_rng([page_size, len(layout)]),
        *RAGGED,
        page_size=page_size,
        layout=layout,
        dtype="int8",
        granularity=granularity,
    )
    batch.q = jax.device_put(np.asarray(batch.q).astype(np.float32))
    got = attend(*batch.args, query_lens=batch.query_lens, implementation=implementation)
    assert_matches(got, batch.oracle(), 2e-5, 1e-5)


@pytest.mark.parametrize("rescale", ["multiply", "exponent_add"])
def test_int8_cache_and_bfloat16_queries(rescale):
    batch = make_batch(np.random.default_rng(16), *RAGGED, dtype="int8")
    got = attend(*batch.args, query_lens=batch.query_lens, implementation="xla", rescale=rescale)
    assert got[0].dtype == jnp.bfloat16
    assert_matches(got, batch.oracle(), 4e-3, 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_int8_decode_loop_traces_once(implementation):
    """Append quantises and attend reads in one compiled, donated step over page edges."""
    chex.clear_trace_counter()
    rng = np.random.default_rng(15)
    cache = PagedKVCache.create(6, page_size=16, kv_lora_rank=RANK, rope_dim=ROPE, dtype="int8")
    tables = rng.permutation(6).reshape(2, 3).astype(np.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(cache, q, kv, seq_lens):
        cache = cache.append(kv, tables, seq_lens)
        return cache, attend(q, cache, tables, seq_lens + 1, implementation=implementation)

    rows = np.zeros((2, 0, RANK + ROPE))
    for length in range(36):
        q = rng.standard_normal((2, 1, 4, RANK + ROPE)).astype(np.float32)
        kv = rng.standard_normal((2, 1, RANK + ROPE)).astype(np.float32)
        before = cache.pages
        cache, got = step(cache, q, kv, i32(length, length))
        assert before.is_deleted()
        rows = np.append(rows, kv, axis=1)
    held, got = np.asarray(cache.gather(tables, max_len=36)), [*map(np.asarray, got)]
    assert 1e-3 < relative_error(held, rows) < 1e-2
    for request in range(2):
        wanted = attention_float64(
            q[request], held[request], softmax_scale=SCALE, kv_lora_rank=RANK
        )
        assert_matches((got[0][request], got[1][request]), wanted, 2e-5, 1e-5)


def test_xla_needs_memory_for_one_block_only():
    def temporary_bytes(capacity):
        batch = make_batch(np.random.default_rng(9), [9], [1], capacity=capacity)
        lowered = jax.jit(functools.partial(attend, implementation="xla")).lower(*batch.args)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(64 * 1024) < 1.2 * temporary_bytes(1024) + 64 * 1024
