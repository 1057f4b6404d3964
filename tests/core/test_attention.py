"""The op, every implementation against float64: ragged batches, options, poison, bad input."""

import dataclasses
import functools
import itertools
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
from paged_batch import (
    RANK,
    ROPE,
    SCALE,
    TOLERANCE,
    assert_matches,
    make_batch,
    relative_error,
)

from mla_jax.attention import paged_mla_attention, prepare
from mla_jax.cache import PAGE_SIZES, PagedKVCache
from mla_jax.implementations.choice import compute
from mla_jax.reference.attention import attention_float64
from mla_jax.registry import IMPLEMENTATIONS, available_implementations
from mla_jax.splits.planner import SlowPlanWarning, plan_splits
from pallas_kernels.hopper import device, planning

PURE = ("reference", "xla", "split_kv")
# Decode, MTP, a chunk behind a prefix, a whole prefill and an empty request, in one batch.
RAGGED = ([200, 131, 64, 5, 0], [1, 2, 5, 5, 0])
attend = functools.partial(paged_mla_attention, softmax_scale=SCALE)


def i32(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("implementation", "page_size", "layout", "dtype"),
    [
        *itertools.product(["xla"], PAGE_SIZES, ("ND", "NZ"), TOLERANCE),
        *itertools.product(["reference"], PAGE_SIZES, ("ND", "NZ"), ["float32"]),
    ],
)
def test_ragged_batch_matches_float64(implementation, page_size, layout, dtype):
    rng = np.random.default_rng([page_size, len(dtype), len(layout)])
    batch = make_batch(rng, *RAGGED, page_size=page_size, layout=layout, dtype=dtype)
    got = attend(*batch.args, query_lens=batch.query_lens, implementation=implementation)
    assert got[0].dtype == jnp.dtype(dtype)
    assert_matches(got, batch.oracle(), TOLERANCE[dtype], 1e-5)


@pytest.mark.parametrize(
    ("page_size", "layout", "dtype", "rescale"),
    [
        (1, "ND", "float32", "exponent_add"),
        (16, "NZ", "bfloat16", "multiply"),
        (64, "NZ", "float32", "multiply"),
        (64, "ND", "float16", "exponent_add"),
        (128, "NZ", "bfloat16", "exponent_add"),
    ],
)
def test_split_kv_plans_for_itself(page_size, layout, dtype, rescale):
    batch = make_batch(
        np.random.default_rng(page_size), *RAGGED, page_size=page_size, layout=layout, dtype=dtype
    )
    got = attend(
        *batch.args, query_lens=batch.query_lens, implementation="split_kv", rescale=rescale
    )
    assert_matches(got, batch.oracle(), TOLERANCE[dtype], 1e-5)


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


def test_blockwise_refuses_large_problems():
    batch = make_batch(np.random.default_rng(0), [40], [1], heads=128, capacity=8208)
    with pytest.raises(ValueError, match=r"'blockwise' can't run this.*at most 1048576 .* 1050624"):
        attend(*batch.args, implementation="blockwise")


@pytest.mark.parametrize(
    ("page_size", "dtype"),
    [(1, "float16"), (16, "float32"), (64, "bfloat16"), (128, "float32")],
)
def test_exponent_add_matches_float64(page_size, dtype):
    batch = make_batch(np.random.default_rng(3), *RAGGED, page_size=page_size, dtype=dtype)
    got = attend(*batch.args, query_lens=batch.query_lens, rescale="exponent_add")
    assert_matches(got, batch.oracle(), TOLERANCE[dtype], 1e-5)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(implementation=PURE, causal=(True, False))
    def test_with_and_without_jit(self, implementation, causal):
        batch = make_batch(np.random.default_rng(4), *RAGGED)
        run = self.variant(functools.partial(attend, implementation=implementation, causal=causal))
        got = run(*batch.args, query_lens=batch.query_lens)
        assert_matches(got, batch.oracle(causal=causal), 2e-5, 1e-5)


@pytest.mark.parametrize(
    ("implementation", "heads"),
    [*itertools.product(["xla"], [1, 3, 16, 128]), ("reference", 5), ("split_kv", 70)],
)
def test_any_head_count_and_no_query_lens(implementation, heads):
    """Without query_lens all tokens are real, and those before position 0 see no key."""
    rng = np.random.default_rng(heads)
    batch = make_batch(rng, [70, 1, 0], [2, 2, 2], heads=heads)
    got = attend(*batch.args, implementation=implementation)
    assert_matches(got, batch.oracle(query_lens=None), 2e-5, 1e-5)
    assert np.isneginf(got[1][1, 0]).all()


@pytest.mark.parametrize("implementation", PURE)
def test_softmax_scale_and_return_lse(implementation):
    batch = make_batch(np.random.default_rng(5), *RAGGED)
    options = {"softmax_scale": 3.0, "query_lens": batch.query_lens}
    options["implementation"] = implementation
    got = paged_mla_attention(*batch.args, **options)
    assert_matches(got, batch.oracle(softmax_scale=3.0), 2e-5, 2e-5)
    alone = paged_mla_attention(*batch.args, **options, return_lse=False)
    np.testing.assert_array_equal(alone, got[0])


@pytest.mark.parametrize("partial_dtype", TOLERANCE)
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
    batch.q = batch.q.astype(jnp.float32) * 1.001
    for implementation in PURE:
        got = attend(*batch.args, query_lens=batch.query_lens, implementation=implementation)
        assert got[0].dtype == jnp.float32
        assert_matches(got, batch.oracle(), TOLERANCE["bfloat16"], 1e-5)


@given(
    st.lists(st.integers(0, 96), min_size=3, max_size=3),
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
    st.sampled_from([(1, "NZ"), (16, "ND"), (64, "NZ")]),
    st.sampled_from(["multiply", "exponent_add"]),
    st.integers(0, 2**32 - 1),
)
def test_any_paging_and_layout_is_the_contiguous_result(lens, queries, paging, rescale, seed):
    """Random lengths, page order, garbage table slots and NaN page tails never show."""
    queries = [min(pair) for pair in zip(lens, queries, strict=True)]
    batch = make_batch(
        np.random.default_rng(seed),
        lens,
        queries,
        num_queries=4,
        page_size=paging[0],
        layout=paging[1],
        capacity=128,
    )
    got = attend(*batch.args, query_lens=batch.query_lens, rescale=rescale)
    assert_matches(got, batch.oracle(), 2e-5, 1e-5)


@pytest.mark.parametrize("implementation", PURE)
def test_decode_loop_traces_once(implementation):
    """Append and attend while lengths grow over page edges, a request finishes, one is empty."""
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
        q, kv = (
            jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 2, 2, 48), (3, 2, 48))
        )
        cache, got = step(cache, q, kv, seq_lens, new)
        seq_lens = seq_lens + new
        rows = [np.concatenate([r, k[:n]]) for r, k, n in zip(rows, kv, new, strict=True)]
        for request, (count, length) in enumerate(zip(new, seq_lens, strict=True)):
            assert len(rows[request]) == length
            for token in range(count):
                keys = rows[request][: length - count + token + 1]
                scores = SCALE * np.asarray(q[request, token], np.float64) @ keys.T
                weights = np.exp(scores)
                wanted = weights @ keys[:, :RANK] / weights.sum(1, keepdims=True)
                assert relative_error(got[0][request, token], wanted) < 2e-5


@pytest.mark.parametrize(
    ("granularity", "page_size", "layout", "implementation"),
    [
        ("token", 64, "ND", "split_kv"),
        *itertools.product(["token"], [64, 128], ["ND", "NZ"], ["reference", "xla"]),
        *itertools.product(["group", "tensor"], [1], ["ND", "NZ"], ["xla"]),
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
    batch.q = batch.q.astype(jnp.float32)
    got = attend(*batch.args, query_lens=batch.query_lens, implementation=implementation)
    assert_matches(got, batch.oracle(), 2e-5, 1e-5)


@pytest.mark.parametrize("rescale", ["multiply", "exponent_add"])
def test_int8_cache_and_bfloat16_queries(rescale):
    batch = make_batch(np.random.default_rng(16), *RAGGED, dtype="int8")
    got = attend(*batch.args, query_lens=batch.query_lens, implementation="xla", rescale=rescale)
    assert got[0].dtype == jnp.bfloat16
    assert_matches(got, batch.oracle(), 4e-3, 1e-5)


def test_int8_cache_goes_to_an_implementation_that_has_it():
    batch = make_batch(np.random.default_rng(14), [40, 7], [1, 1], dtype="int8")
    assert_matches(attend(*batch.args), batch.oracle(), 1e-2, 5e-2)
    for name, reason in available_implementations().items():
        if reason is not None:
            with pytest.raises(ValueError, match=f"implementation '{name}' can't run this: "):
                attend(*batch.args, implementation=name)
    broken = dataclasses.replace(batch.cache, scales=batch.cache.scales[:, :8])
    with pytest.raises(ValueError, match=r"cache.scales must be .* \(token\) or .*, got shape"):
        attend(batch.q, broken, batch.block_tables, batch.seq_lens)


def test_blockwise_says_what_it_lacks_with_an_int8_cache():
    run = functools.partial(attend, implementation="blockwise")
    lens = [40], [1]
    batch = make_batch(np.random.default_rng(15), *lens, dtype="int8", granularity="group")
    with pytest.raises(ValueError, match=r"'blockwise' can't run this: .*token or tensor.* group"):
        run(*batch.args)
    batch = make_batch(np.random.default_rng(15), *lens, dtype="int8")
    with pytest.raises(ValueError, match=r"'blockwise' can't run this: .*rescale multiply.* AMLA"):
        run(*batch.args, rescale="exponent_add")


def test_hopper_says_what_cache_it_lacks(monkeypatch):
    """On a machine that has the GPU: the op refuses by name, and without one goes to xla."""
    monkeypatch.setattr(device, "machine_lacks", lambda: None)
    batch = make_batch(np.random.default_rng(17), [40, 7], [1, 1], page_size=16, dtype="int8")
    reason = "it takes page sizes 64, 128 of a cache of int8, got 16"
    with pytest.raises(ValueError, match=f"implementation 'hopper' can't run this: {reason}"):
        attend(*batch.args, implementation="hopper")
    assert_matches(attend(*batch.args), batch.oracle(), 1e-2, 5e-2)


@pytest.mark.parametrize("implementation", PURE)
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
        q = jnp.asarray(rng.standard_normal((2, 1, 4, RANK + ROPE)), jnp.float32)
        kv = jnp.asarray(rng.standard_normal((2, 1, RANK + ROPE)), jnp.float32)
        before = cache.pages
        cache, got = step(cache, q, kv, i32(length, length))
        assert before.is_deleted()
        rows = np.append(rows, kv, axis=1)
    held = np.asarray(cache.gather(tables, max_len=36))
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


BAD_REQUESTS = {  # name -> what to change in request 1 of a good batch
    "negative length": {"seq_lens": -1},
    "length past the block table": {"seq_lens": 257},
    "page past the cache": {"block_tables": 10**6},
    "negative page": {"block_tables": -1},
    "more queries than tokens": {"seq_lens": 1},
    "more queries than there are": {"query_lens": 4},
    "negative queries": {"query_lens": -1},
}


@pytest.mark.parametrize("implementation", PURE)
def test_invalid_requests_are_nan_under_jit_and_refused_outside(implementation):
    batch = make_batch(np.random.default_rng(10), [40, 40, 40], [3, 2, 1])
    run = functools.partial(attend, implementation=implementation)
    traced = jax.jit(run)
    wanted = batch.oracle()
    for name, change in BAD_REQUESTS.items():
        changed = {
            key: getattr(batch, key).copy() for key in ("block_tables", "seq_lens", "query_lens")
        }
        for key, value in change.items():
            changed[key][(1, 0) if key == "block_tables" else 1] = value
        o, lse = traced(batch.q, batch.cache, **changed)
        assert np.isnan(o[1]).all(), name
        assert np.isnan(lse[1]).all(), name
        good = np.array([0, 2])
        assert_matches((o[good], lse[good]), [x[good] for x in wanted], 2e-5, 1e-5)
        with pytest.raises(ValueError, match=r"(seq_lens|query_lens|block_tables)\[1"):
            run(batch.q, batch.cache, **changed)


def test_what_a_jitted_function_closes_over_is_checked():
    """Lengths and a plan that are known, though q is traced."""
    batch = make_batch(np.random.default_rng(12), [40, 41], [1, 1])
    plans = [plan_splits(i32(40, n), num_workers=2, rows=4, rows_per_tile=4) for n in (41, 100)]

    def run(q, plan):
        rest = batch.cache, batch.block_tables, batch.seq_lens
        return attend(q, *rest, implementation="split_kv", plan=plan)

    good, bad = (jax.jit(functools.partial(run, plan=plan)) for plan in plans)
    assert_matches(good(batch.q), batch.oracle(), 2e-5, 1e-5)
    with pytest.raises(ValueError, match="plan must be made for these seq_lens"):
        bad(batch.q)


def test_a_plan_for_other_lengths_is_loud():
    batch = make_batch(np.random.default_rng(11), [40, 41], [1, 1])
    plan = plan_splits(i32(40, 100), num_workers=2, rows=4, rows_per_tile=4, block_size=16)
    run = functools.partial(attend, implementation="split_kv")
    with pytest.raises(ValueError, match=r"plan must be made for these seq_lens.* request 1 of 41"):
        run(*batch.args, plan=plan)
    o, lse = jax.jit(run)(*batch.args, plan=plan)
    assert np.isnan(o[1]).all()
    assert np.isnan(lse[1]).all()
    assert np.isfinite(o[0]).all()


def test_implementations_say_what_they_can_run():
    available = available_implementations()
    assert tuple(available) == tuple(IMPLEMENTATIONS)
    assert all(available[name] is None for name in PURE)
    batch = make_batch(np.random.default_rng(12), [40], [1])
    for name, reason in available.items():
        if reason is not None:
            with pytest.raises(ValueError, match=f"implementation '{name}' can't run this: "):
                attend(*batch.args, implementation=name)
    if jax.default_backend() == "cpu":
        default, xla = attend(*batch.args), attend(*batch.args, implementation="xla")
        np.testing.assert_array_equal(default[0], xla[0])


CACHE = PagedKVCache.create(4, page_size=16, kv_lora_rank=RANK, rope_dim=ROPE, dtype="float32")
GOOD = {
    "q": np.ones((2, 1, 4, 48), np.float32),
    "cache": CACHE,
    "block_tables": i32([0, 1], [2, 3]),
    "seq_lens": i32(3, 20),
    "softmax_scale": 1.0,
}
PLAN = plan_splits(GOOD["seq_lens"], num_workers=2, rows=8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"q": np.ones((2, 4, 48), np.float32)}, ValueError, r"q must be \[B, S, H, .*\[2, 4, 48"),
        ({"q": np.ones((2, 1, 4, 47), np.float32)}, ValueError, r"q must be .* any, 48\], got"),
        ({"q": np.ones((2, 0, 4, 48), np.float32)}, ValueError, "q must have no dim of 0"),
        ({"q": np.ones((2, 1, 4, 48), np.int8)}, TypeError, "q must be an array of .* got int8"),
        ({"q": np.ones((2, 1, 4, 48))}, TypeError, "q must be an array of .* got float64"),
        ({"cache": CACHE.pages}, TypeError, "cache must be a PagedKVCache, got ArrayImpl"),
        (
            {"cache": dataclasses.replace(CACHE, page_size=64)},
            ValueError,
            r"cache.pages must be pages of 64 tokens .* = \[any, 64, 48\], got shape \[4, 16, 48\]",
        ),
        ({"block_tables": i32(0, 1)}, ValueError, r"block_tables must be \[B, max_pages\]"),
        ({"block_tables": i32([0, 1])}, ValueError, r"block_tables must be .* = \[2, any\]"),
        ({"block_tables": np.ones((2, 2))}, TypeError, "block_tables must be an int32 array"),
        ({"block_tables": i32([0, 1], [2, 4])}, ValueError, r"block_tables\[1, 1\] .* got 4"),
        ({"block_tables": np.ones((2, 0), np.int32)}, ValueError, "max_pages of block_tables"),
        ({"seq_lens": i32([3, 20])}, ValueError, r"seq_lens must be \[B\] = \[2\]"),
        ({"seq_lens": np.ones(2, np.int64)}, TypeError, "seq_lens must be an int32 .* int64"),
        ({"seq_lens": i32(3, 33)}, ValueError, r"seq_lens\[1\] must be in 0 .. 32 .* got 33"),
        ({"seq_lens": i32(-3, 3)}, ValueError, r"seq_lens\[0\] must be in 0 .. 32 .* got -3"),
        ({"query_lens": i32(1)}, ValueError, r"query_lens must be \[B\] = \[2\]"),
        ({"query_lens": np.ones(2)}, TypeError, "query_lens must be an int32 array, got float64"),
        ({"query_lens": i32(0, 2)}, ValueError, r"query_lens\[1\] must be in 0 .. 1 .* got 2"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number, got str"),
        ({"softmax_scale": True}, TypeError, "softmax_scale must be a number, got bool"),
        ({"softmax_scale": 1 + 1j}, TypeError, "softmax_scale must be a number, got complex"),
        ({"softmax_scale": np.ones(1)}, TypeError, "softmax_scale must be a number, got ndarray"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, got nan"),
        ({"softmax_scale": -float("inf")}, ValueError, "softmax_scale must be finite, got -inf"),
        ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be above 0"),
        ({"softmax_scale": -0.1}, ValueError, "softmax_scale must be above 0"),
        ({"softmax_scale": 1e-60}, ValueError, "softmax_scale must be in 1.17.*float32 holds"),
        ({"softmax_scale": 1e60}, ValueError, "softmax_scale must be in .*float32 holds, got 1e"),
        ({"causal": "no"}, TypeError, "causal must be True or False, got 'no'"),
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
        ({"return_lse": "no"}, TypeError, "return_lse must be True or False, got 'no'"),
        ({"q": [[1.0]]}, TypeError, r"q must be an array, got \[\[1.0\]\] of type list"),
        ({"cache": None}, TypeError, "cache must be a PagedKVCache, got NoneType"),
        ({"block_tables": None}, TypeError, "block_tables must be an array, got None"),
        ({"block_tables": [[0, 1], [2, 3]]}, TypeError, "block_tables must be an array, got"),
        ({"seq_lens": [3, 20]}, TypeError, r"seq_lens must be an array, got \[3, 20\] of"),
        ({"query_lens": [1, 1]}, TypeError, "query_lens must be an array, got"),
        ({"rescale": ["multiply"]}, TypeError, "rescale must be one of multiply, .*got"),
        ({"partial_dtype": 3}, TypeError, "partial_dtype must be one of .* got 3"),
        ({"implementation": []}, ValueError, "implementation must name at least one of"),
        ({"implementation": [3]}, TypeError, r"implementation must be .*got \[3\]"),
        ({"implementation": 3}, TypeError, "implementation must be .*got 3"),
        ({"implementation": {"xla"}}, TypeError, "implementation must be .*got {'xla'}"),
        ({"implementation": ["no such"]}, ValueError, r"implementation must be .*\['no such'\]"),
        ({"implementation": ["xla", "cuda"]}, ValueError, "implementation must be .*'cuda'"),
        ({"rescale": "add"}, ValueError, "rescale must be one of multiply, exponent_add"),
        ({"partial_dtype": "int8"}, ValueError, "partial_dtype must be one of .* got 'int8'"),
        ({"partial_dtype": "half-ish"}, ValueError, "partial_dtype must be one of .*'half-ish'"),
        ({"implementation": "cuda"}, ValueError, "implementation must be None or one of .*'cuda'"),
        (
            {"plan": PLAN.request},
            TypeError,
            "plan must be a DecodePlan or a SplitPlan, got ArrayImpl",
        ),
        (
            {"plan": plan_splits(i32(3), num_workers=2, rows=4)},
            ValueError,
            "plan must be for 2 req",
        ),
        ({"plan": plan_splits(i32(3, 20), num_workers=2, rows=90)}, ValueError, "plan must be for"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        paged_mla_attention(**(GOOD | options))


def test_numbers_of_every_kind_are_a_scale():
    problems = [
        prepare(**(GOOD | {"softmax_scale": kind(2), "causal": np.bool_(False)}))[0]
        for kind in (int, float, np.float16, np.int8, jnp.float32, jnp.int32)
    ]
    assert {(type(one.softmax_scale), one.softmax_scale) for one in problems} == {(float, 2.0)}
    assert not any(one.causal for one in problems)
    with pytest.raises(TypeError, match="softmax_scale must be a number, got a traced one"):
        jax.jit(lambda scale: paged_mla_attention(**(GOOD | {"softmax_scale": scale})))(1.0)


@pytest.fixture
def half_batch():
    return make_batch(np.random.default_rng(20), [40, 7], [1, 1], heads=4, dtype="bfloat16")


@pytest.fixture
def marked(monkeypatch):
    """A hopper that takes any problem and whose programs have a cosine in them, as no other's."""

    def run(problem):
        o, lse = IMPLEMENTATIONS["xla"].compute(problem)
        return jnp.cos(o), lse

    fake = dataclasses.replace(IMPLEMENTATIONS["hopper"], run=run, refuses=lambda problem: None)
    monkeypatch.setitem(IMPLEMENTATIONS, "hopper", fake)


def cosines(function, *args, platforms=("cuda",)):
    """How many are in the program; lowered anew, whatever has been lowered before."""
    traced = jax.jit(lambda *args: function(*args)).trace(*args)
    lowered = traced.lower(lowering_platforms=platforms)
    return lowered.as_text().count("stablehlo.cosine")


def test_the_choice_is_of_the_platform_that_is_lowered_for(marked, half_batch):
    args = half_batch.args
    assert cosines(attend, *args) == 1
    assert cosines(lambda: attend(*args)) == 1  # all constants, and traced all the same
    for platforms in (("cpu",), ("tpu",), ("rocm",)):
        assert cosines(attend, *args, platforms=platforms) == 0
    both = jax.jit(attend).trace(*args).lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert both.count("stablehlo.cosine") == 1
    assert "stablehlo.case" in both

    def loop(q, *rest):
        return jax.lax.scan(lambda _, one: (None, attend(one, *rest)), None, jnp.stack([q, q]))[1]

    assert cosines(loop, *args) == 1
    first = functools.partial(attend, implementation=("hopper", "reference"))
    assert cosines(first, *args) == 1
    assert cosines(first, *args, platforms=("cpu",)) == 0
    assert cosines(functools.partial(attend, implementation=["xla", "hopper"]), *args) == 0
    named = functools.partial(attend, implementation="hopper")
    assert cosines(named, *args) == 1
    with pytest.raises(ValueError, match=r"'hopper' can't run this.* 9\.0 .* here is tpu"):
        cosines(named, *args, platforms=("tpu",))


def test_a_plan_that_keeps_the_kernels_away_is_named(half_batch, monkeypatch):
    """The best implementation here does not take its blocks: another one runs, with a warning."""
    monkeypatch.setattr(device, "target_lacks", lambda platform, device: None)
    monkeypatch.setattr(planning, "refuses", lambda *problem: problem[3] and "its blocks are of 16")
    plan = plan_splits(half_batch.seq_lens, num_workers=2, rows=4, block_size=16)
    with pytest.warns(SlowPlanWarning, match=r"'hopper' does not .*'xla' runs: its blocks"):
        got = attend(*half_batch.args, plan=plan)
    assert_matches(got, half_batch.oracle(), TOLERANCE["bfloat16"], 1e-5)


def test_the_card_that_is_lowered_for_counts(marked, half_batch, monkeypatch):
    """An NVIDIA GPU of another kind beside the CPU: its programs are xla's."""

    class Card:
        platform, compute_capability, core_count = "gpu", "8.0", 108

    devices = jax.devices
    monkeypatch.setattr(
        jax, "devices", lambda name=None: [Card()] if name == "cuda" else devices(name)
    )
    assert cosines(attend, *half_batch.args) == 0
    with pytest.raises(ValueError, match=r"here is compute capability 8\.0"):
        cosines(functools.partial(attend, implementation="hopper"), *half_batch.args)
    monkeypatch.setattr(Card, "compute_capability", "9.0")
    assert cosines(attend, *half_batch.args) == 1
    assert device.num_sms() == 108
    o, _ = attend(*half_batch.args)  # on the CPU still
    assert o.devices() == {jax.devices()[0]}


def test_a_call_over_several_devices_needs_no_shard_map(marked, half_batch):
    """The compiler can partition no kernel: the choice is xla, but in the shards of a shard_map."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, whole = jax.P(None, None, "x"), jax.P()
    specs = (heads, whole, whole, whole)
    shards = jax.shard_map(
        attend, mesh=mesh, in_specs=specs, out_specs=(heads, heads), check_vma=False
    )
    assert cosines(shards, *half_batch.args) == 1
    placed = [
        jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))
        for value, spec in zip(half_batch.args, specs, strict=True)
    ]
    assert cosines(attend, *placed) == 0
    with pytest.raises(ValueError, match=r"can't partition it .* inside jax\.shard_map"):
        cosines(functools.partial(attend, implementation="hopper"), *placed)


def test_transforms_of_the_choice_are_those_of_xla(marked, half_batch):
    q, *rest = half_batch.args
    xla = functools.partial(attend, implementation="xla")

    def derivative(function):
        return lambda q: jax.jvp(lambda q: function(q, *rest)[0], (q,), (q + 1,))[1]

    def mapped(function):
        return jax.vmap(lambda q: function(q, *rest)[0])

    for transform, value in ((derivative, q), (mapped, jnp.stack([q, q + 1]))):
        got = jax.jit(transform(attend))(value)
        chex.assert_trees_all_equal(got, jax.jit(transform(xla))(value))
        assert cosines(transform(attend), value) == 0


def test_a_cpu_exports_a_program_for_cuda():
    cache = PagedKVCache.create(2, page_size=64)
    q = jnp.ones((1, 1, 8, 576), jnp.bfloat16)
    args = q, cache.pages, i32([0]), i32(5)

    def run(q, pages, tables, seq_lens):
        return attend(q, dataclasses.replace(cache, pages=pages), tables, seq_lens)

    exported = jax.export.export(jax.jit(run), platforms=("cpu", "cuda"))(*args)
    # Two launches, decode and merge: no card is known here on which all CTAs run at once.
    assert exported.mlir_module().count("mosaic_gpu_v2") == 2
    chex.assert_trees_all_equal(jax.jit(exported.call)(*args), run(*args))


def test_an_eager_call_runs_where_its_arrays_are(half_batch):
    here, there = jax.devices()[1:3]
    o, _ = attend(*jax.device_put(half_batch.args, there))
    assert o.devices() == {there}
    with jax.default_device(here):
        o, _ = attend(*half_batch.args[:2], *map(np.asarray, half_batch.args[2:]))
    assert o.devices() == {here}


def test_the_first_of_several_that_can_run():
    batch = make_batch(np.random.default_rng(21), [40, 7], [1, 1])  # float32: not for hopper
    for names in (["hopper", "reference"], ("hopper", "reference", "xla")):
        wanted = attend(*batch.args, implementation="reference")
        chex.assert_trees_all_equal(attend(*batch.args, implementation=names), wanted)
    with pytest.raises(ValueError, match=r"implementation 'hopper' can't run this: .*float32"):
        attend(*batch.args, implementation=["hopper"])
    int8 = make_batch(
        np.random.default_rng(21), [40, 7], [1, 1], dtype="int8", granularity="group", page_size=16
    )
    for run in (attend, jax.jit(attend, static_argnames="implementation")):
        message = r"none of those.*: blockwise: it takes scale_.*got group.*; hopper: .* got "
        with pytest.raises(ValueError, match=message):
            run(*int8.args, implementation=("blockwise", "hopper"))


@pytest.mark.parametrize("kind", ["package", "folder", "module"])
def test_another_pallas_kernels_shadows_only_the_kernels(kind, monkeypatch, tmp_path, half_batch):
    """As for a user whose script has a folder or file of that name beside it."""
    if kind == "module":
        (tmp_path / "pallas_kernels.py").touch()
    else:
        for name in ("pallas_kernels", "experiments"):
            (tmp_path / name).mkdir()
            if kind == "package":
                (tmp_path / name / "__init__.py").touch()
    ours = [str(path) for path in map(Path, sys.path) if (path / "pallas_kernels").is_dir()]
    if kind == "folder":  # of less weight than a package, wherever that is: ours is found otherwise
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ours])
    monkeypatch.syspath_prepend(tmp_path)
    for name in [*sys.modules]:
        if name.split(".")[0] in ("pallas_kernels", "experiments"):
            monkeypatch.delitem(sys.modules, name)
    reasons = available_implementations()
    for name in ("blockwise", "hopper"):
        shadow = tmp_path / ("pallas_kernels.py" if kind == "module" else "pallas_kernels")
        assert f"pallas_kernels is shadowed by {shadow}, " in reasons[name]
        with pytest.raises(ValueError, match=f"{name}' can't run this.* is shadowed by "):
            attend(*half_batch.args, implementation=name)
    assert [name for name, reason in reasons.items() if reason is None] == [*PURE]
    chex.assert_trees_all_equal(
        attend(*half_batch.args), attend(*half_batch.args, implementation="xla")
    )


def test_invalid_requests_are_found_in_every_mode(half_batch):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        for context in (jax.disable_jit(False), jax.disable_jit()):
            with context:
                problem, choice = prepare(*half_batch.args, softmax_scale=SCALE)
                past = dataclasses.replace(problem, seq_lens=i32(40, 10**6))
                assert past.mark_invalid().seq_lens.tolist() == [40, -1]
                assert past.visible_keys().dtype == jnp.int32
        assert_matches(compute(problem, choice), half_batch.oracle(), 4e-3, 1e-5)
