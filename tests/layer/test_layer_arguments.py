"""What the layer's functions refuse, and what a refused or an eager call leaves of the cache."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_layer import CONFIGS, SMALL, TOLERANCE, new_cache, random_layer, relative_error, step

from mla_jax.cache import PagedKVCache
from mla_jax.layer import attend, mla_layer, preprocess, project_output
from mla_jax.reference.layer import layer_float64
from mla_jax.reference.naive import naive_mla_layer


def test_refuses_what_does_not_fit():
    params, x = random_layer(SMALL)
    cache, tables = new_cache(SMALL, 2, 9)
    lens = jnp.array([9, 9], jnp.int32)
    with pytest.raises(
        ValueError, match=r"x must be \[B, S, hidden_size\] = .*, 20\], got shape \[2, 9, 19\]"
    ):
        mla_layer(params, SMALL, x[..., :19], cache, tables, lens)
    with pytest.raises(
        ValueError, match=r"x must be \[B, S, hidden_size\] = .*, got shape \[9, 20\]"
    ):
        naive_mla_layer(params, SMALL, x[0])
    with pytest.raises(ValueError, match=r"positions must be \[B, S\] = \[2, 9\], got shape \[9\]"):
        preprocess(params, SMALL, x, jnp.arange(9))
    with pytest.raises(ValueError, match=r"params.w_uq must be \(12, 3, 10\) .* got \(12, 2, 10\)"):
        naive_mla_layer(dataclasses.replace(params, w_uq=params.w_uq[:, :2]), SMALL, x)
    with pytest.raises(ValueError, match=r"params.w_dq must be None for this config"):
        preprocess(params, CONFIGS["direct_q_half"], x, jnp.zeros((2, 9), int))
    with pytest.raises(
        ValueError, match=r"o_latent must be .*, 3, 18\], got shape \[2, 9, 2, 18\]"
    ):
        project_output(params, jnp.zeros((2, 9, 2, 18)))
    with pytest.raises(ValueError, match=r"seq_lens must be \[B\] = \[2\], got shape \[1\]"):
        mla_layer(params, SMALL, x, cache, tables, lens[:1])
    query_lens = jnp.ones(3, jnp.int32)
    with pytest.raises(ValueError, match=r"query_lens must be \[B\] = \[2\], got shape \[3\]"):
        mla_layer(params, SMALL, x, cache, tables, lens, query_lens=query_lens)
    with pytest.raises(ValueError, match=r"implementation must be .*, got 'abacus'"):
        mla_layer(params, SMALL, x, cache, tables, lens, implementation="abacus")
    narrow = PagedKVCache.create(2, page_size=16, kv_lora_rank=16, rope_dim=6, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"cache.kv_lora_rank must be 18, got 16"):
        mla_layer(params, SMALL, x, narrow, tables, lens)
    with pytest.raises(ValueError, match=r"seq_lens\[1\] must be in 0 .. 16"):
        mla_layer(params, SMALL, x, cache, tables, jnp.array([9, 17], jnp.int32))
    with pytest.raises(
        ValueError, match=r"seq_lens\[0\] must be at least 9: without query_lens all 9 .*, got 8"
    ):
        mla_layer(params, SMALL, x, cache, tables, jnp.array([8, 9], jnp.int32))
    short = {"seq_lens": jnp.array([8, 4], jnp.int32), "query_lens": jnp.array([2, 5], jnp.int32)}
    with pytest.raises(ValueError, match=r"query_lens\[1\] must be in 0 .. 4 \(x has 9 tokens"):
        mla_layer(params, SMALL, x, cache, tables, **short)
    assert not np.any(cache.pages)  # nothing was written, and the cache is still there


def test_traced_lengths_below_the_tokens_are_nan():
    """What an eager call refuses by name; the other request is as it would be."""
    params, x = random_layer(SMALL)
    cache, tables = new_cache(SMALL, 2, 9)
    out, cache = step(params, SMALL, x, cache, tables, jnp.array([3, 9], jnp.int32))
    assert np.isnan(out[0]).all()
    assert relative_error(out[1], layer_float64(SMALL, params, x)[1]) < TOLERANCE
    assert np.isnan(cache.pages[tables[0, 0]]).sum() == 0


def test_an_eager_call_uses_the_cache_up_unless_it_is_told_not_to():
    params, x = random_layer(SMALL)
    cache, tables = new_cache(SMALL, 2, 9)
    lens = jnp.array([9, 9], jnp.int32)
    out, kept = mla_layer(params, SMALL, x, cache, tables, lens, donate=False)
    assert not np.any(cache.pages)
    again, used = mla_layer(params, SMALL, x, cache, tables, lens)
    assert cache.pages.is_deleted()
    chex.assert_trees_all_equal((out, kept), (again, used))
    q, kv = preprocess(params, SMALL, x, jnp.broadcast_to(jnp.arange(9), (2, 9)))
    attend(SMALL, q, kv, kept, tables, lens, donate=False)
    assert not kept.pages.is_deleted()
    kept = jax.tree.map(jnp.copy, kept)  # numpy, which has compared it, would keep its memory
    attend(SMALL, q, kv, kept, tables, lens, query_lens=lens)
    assert kept.pages.is_deleted()


LAYER_ERRORS = [  # what is given instead of a good argument, by its name
    ({"params": {}}, TypeError, r"params must be an MLAParams, got (\{\}|dict)"),
    ({"params": None}, TypeError, "params must be an MLAParams, got None"),
    ({"config": {"hidden_size": 20}}, TypeError, "config must be an MLAConfig, got dict"),
    ({"x": [[[1.0] * 20]]}, TypeError, "x must be an array, got .* of type list"),
    ({"x": None}, TypeError, "x must be an array, got None"),
    ({"x": np.ones((2, 9, 20), int)}, TypeError, "x must be an array of float32, .* got int64"),
    ({"x": np.ones((2, 0, 20), np.float32)}, ValueError, r"x must have no dim of 0.* \[2, 0, 20"),
    ({"x": np.ones((0, 9, 20), np.float32)}, ValueError, r"x must have no dim of 0.* \[0, 9, 20"),
]


@pytest.mark.parametrize(("bad", "error", "message"), LAYER_ERRORS)
def test_every_function_of_the_layer_names_what_it_is_given(bad, error, message):
    params, x = random_layer(SMALL)
    good = {"params": params, "config": SMALL, "x": x}
    cache, tables = new_cache(SMALL, 2, 9)
    lens = jnp.array([9, 9], jnp.int32)
    positions = jnp.zeros((2, 9), jnp.int32)
    given = good | bad
    for call in (
        lambda: mla_layer(**given, cache=cache, block_tables=tables, seq_lens=lens),
        lambda: preprocess(**given, positions=positions),
        lambda: naive_mla_layer(**given),
    ):
        with pytest.raises(error, match=message):
            call()
    if error is ValueError or "x" not in bad:  # numpy takes lists, and integers
        with pytest.raises(error, match="x must be|" + message):
            layer_float64(given["config"], given["params"], given["x"])


def test_refuses_arguments_of_another_type():
    params, x = random_layer(SMALL)
    cache, tables = new_cache(SMALL, 2, 9)
    lens = jnp.array([9, 9], jnp.int32)
    good = {"x": x, "cache": cache, "block_tables": tables, "seq_lens": lens}
    for name, value, message in (
        ("cache", None, "cache must be a PagedKVCache, got NoneType"),
        ("cache", [cache.pages], "cache must be a PagedKVCache, got list"),
        ("block_tables", None, "block_tables must be an array, got None"),
        ("seq_lens", [9, 9], "seq_lens must be an array, got"),
        ("seq_lens", np.array([9, 9]), "seq_lens must be an int32 array, got int64"),
        ("query_lens", [9, 9], "query_lens must be an array, got"),
        ("donate", "no", "donate must be True or False, got 'no'"),
        ("causal", 1, "causal must be True or False, got 1"),
        ("implementations", "xla", "unexpected keyword argument 'implementations'"),
        ("softmax_scale", 1.0, "unexpected keyword argument 'softmax_scale'"),
    ):
        with pytest.raises(TypeError, match=message):
            mla_layer(params, SMALL, **(good | {name: value}))
    q, kv = jnp.zeros((2, 9, 3, 22)), jnp.zeros((2, 9, 22))
    for name, value, error, message in (
        ("config", None, TypeError, "config must be an MLAConfig, got NoneType"),
        ("q", None, TypeError, "q must be an array, got None"),
        ("kv", [1], TypeError, r"kv must be an array, got \[1\]"),
        ("kv", kv.astype(int), TypeError, "kv must be an array of float32, .* got int32"),
        ("kv", kv[:, :3], ValueError, r"kv must be \[B, S, D\] = \[2, 9, 22\], got .*2, 3, 22"),
        ("q", q[..., :9], ValueError, r"q must be \[B, S, H, D\] = .* got shape \[2, 9, 3, 9\]"),
        ("seq_lens", lens - 1, ValueError, r"seq_lens\[0\] must be at least 9: .* q count, got 8"),
    ):
        arguments = {"config": SMALL, "q": q, "kv": kv} | good
        del arguments["x"]
        with pytest.raises(error, match=message):
            attend(**(arguments | {name: value}))
    with pytest.raises(TypeError, match=r"params.w_uk must be an array, got \[1\]"):
        naive_mla_layer(dataclasses.replace(params, w_uk=[1]), SMALL, x)
    with pytest.raises(TypeError, match="o_latent must be an array, got None"):
        project_output(params, None)
    with pytest.raises(TypeError, match="positions must be an array of integers, got float32"):
        naive_mla_layer(params, SMALL, x, jnp.zeros((2, 9)))
    with pytest.raises(ValueError, match="positions must be at least 0, got -1"):
        preprocess(params, SMALL, x, np.full((2, 9), -1))
    assert not np.any(cache.pages)  # nothing was written, and the cache is still there


def test_what_is_refused_late_leaves_the_cache():
    """An implementation that fails only as it is traced or lowered has not cost the cache."""
    params, x = random_layer(SMALL)
    cache, tables = new_cache(SMALL, 2, 9)
    lens = jnp.array([9, 9], jnp.int32)
    for implementation in ("hopper", ["hopper"]):
        with pytest.raises(ValueError, match="'hopper' can't run this"):
            mla_layer(params, SMALL, x, cache, tables, lens, implementation=implementation)
    with pytest.raises(TypeError, match="plan must be a DecodePlan or a SplitPlan"):
        mla_layer(params, SMALL, x, cache, tables, lens, plan=3)
    assert not np.any(cache.pages)
