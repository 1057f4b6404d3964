"""What the op refuses by name, which requests it finds invalid, and plans for other lengths."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_batch import PURE, RANK, ROPE, SCALE, assert_matches, make_batch

from mla_jax.attention import paged_mla_attention, prepare
from mla_jax.cache import PagedKVCache
from mla_jax.implementations.choice import compute
from mla_jax.splits.planner import plan_splits

attend = functools.partial(paged_mla_attention, softmax_scale=SCALE)


def i32(*values):
    return np.array(values, np.int32)


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
    options = {"num_workers": 2, "rows": 4, "rows_per_tile": 4, "block_size": 16}
    plans = [plan_splits(i32(40, n), **options) for n in (41, 100)]

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


def test_a_plan_for_other_query_lens_is_loud():
    """Request 0 has tiles of 2 and 3 blocks. Request 1 has one token, and the plan is for two."""
    batch = make_batch(np.random.default_rng(3), [33, 40], [2, 1])
    tokens = {"query_lens": i32(2, 2), "num_heads": 4}
    plan = plan_splits(
        batch.seq_lens, num_workers=2, rows=8, rows_per_tile=4, block_size=16, **tokens
    )
    run = functools.partial(attend, implementation="split_kv", query_lens=batch.query_lens)
    with pytest.raises(ValueError, match=r"these seq_lens and query_lens.* request 1 of 40"):
        run(*batch.args, plan=plan)
    with pytest.raises(ValueError, match="plan must be for causal=False and 4 heads"):
        run(*batch.args, plan=plan, causal=False)
    o, lse = jax.jit(run)(*batch.args, plan=plan)
    assert np.isnan(o[1]).all()
    wanted = batch.oracle()
    assert_matches((o[0], lse[0]), [x[0] for x in wanted], 2e-5, 1e-5)


CACHE = PagedKVCache.create(4, page_size=16, kv_lora_rank=RANK, rope_dim=ROPE, dtype="float32")
LATENT, OF_ROPE = np.ones((2, 1, 4, RANK), np.float32), np.ones((2, 1, 4, ROPE), np.float32)
GOOD = {
    "q": np.ones((2, 1, 4, 48), np.float32),
    "cache": CACHE,
    "block_tables": i32([0, 1], [2, 3]),
    "seq_lens": i32(3, 20),
    "softmax_scale": 1.0,
}


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
        ({"q": (LATENT, OF_ROPE, OF_ROPE)}, TypeError, "q must be an array or a pair of arrays"),
        ({"q": (LATENT, 3)}, TypeError, r"q\[1\] must be an array, got 3"),
        ({"q": (OF_ROPE, LATENT)}, ValueError, r"q\[0\] must be \[B, S, H, kv_lora_rank\]"),
        ({"q": (LATENT, OF_ROPE[:1])}, ValueError, r"q\[1\] must be \[B, S, H, rope_dim\] = \[2, "),
        (
            {"q": (LATENT, OF_ROPE.astype(np.float16))},
            TypeError,
            r"q\[1\] must have the dtype of q\[0\], float32, got float16",
        ),
        ({"implementation": 3}, TypeError, "implementation must be .*got 3"),
        ({"implementation": {"xla"}}, TypeError, "implementation must be .*got {'xla'}"),
        ({"implementation": ["no such"]}, ValueError, r"implementation must be .*\['no such'\]"),
        ({"implementation": ["xla", "cuda"]}, ValueError, "implementation must be .*'cuda'"),
        ({"rescale": "add"}, ValueError, "rescale must be one of multiply, exponent_add"),
        ({"partial_dtype": "int8"}, ValueError, "partial_dtype must be one of .* got 'int8'"),
        ({"partial_dtype": "half-ish"}, ValueError, "partial_dtype must be one of .*'half-ish'"),
        ({"implementation": "cuda"}, ValueError, "implementation must be None or one of .*'cuda'"),
        (
            {"plan": i32(0)},
            TypeError,
            "plan must be a DecodePlan or a SplitPlan, got ndarray",
        ),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        paged_mla_attention(**(GOOD | options))


@pytest.mark.parametrize(
    ("seq_lens", "rows", "message"),
    [(i32(3), 4, "plan must be for 2 req"), (i32(3, 20), 90, "plan must be for")],
)
def test_refuses_a_plan_of_other_sizes(seq_lens, rows, message):
    def call(seq_lens):
        plan = plan_splits(seq_lens, num_workers=2, rows=rows)
        return paged_mla_attention(**(GOOD | {"plan": plan}))

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, seq_lens)


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


def test_invalid_requests_are_found_in_every_mode(half_batch):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        for context in (jax.disable_jit(False), jax.disable_jit()):
            with context:
                problem, choice = prepare(*half_batch.args, softmax_scale=SCALE)
                past = dataclasses.replace(problem, seq_lens=i32(40, 10**6))
                assert past.mark_invalid().seq_lens.tolist() == [40, -1]
                assert past.visible_keys().dtype == jnp.int32
        assert_matches(compute(problem, choice), half_batch.oracle(), 4e-3, 1e-5)
