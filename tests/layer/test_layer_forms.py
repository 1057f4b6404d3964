"""The expanded form of the layer against float64, and the choice of the form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_layer import SMALL, TOLERANCE, new_cache, random_layer, relative_error

from mla_jax.cache import PagedKVCache
from mla_jax.hal import choose_form
from mla_jax.layer import mla_layer
from mla_jax.prefill import form as layer_form
from mla_jax.reference.layer import layer_float64
from mla_jax.splits.planner import plan_fixed


def traced_once(**options):
    """Returns the jitted layer, which fails if it is traced a second time."""
    traces = []

    def layer(params, config, *args, query_lens):
        traces.append(1)
        assert len(traces) == 1
        return mla_layer(params, config, *args, query_lens=query_lens, **options)

    return jax.jit(layer, static_argnames="config")


def poisoned_cache(batch, length, dtype="float32"):
    """A cache of NaN, and block tables of shuffled pages whose unused entries are no pages."""
    cache, tables = new_cache(SMALL, batch, length, dtype=dtype)
    nan = {
        name: np.full(array.shape, np.nan, array.dtype)
        for name, array in cache.arrays().items()
        if array.dtype != jnp.int8
    }
    return dataclasses.replace(cache, **jax.device_put(nan)), np.asarray(tables)


def feed_ragged(layer, params, x, steps, cache, tables):
    """Feeds requests in steps of (count of each request,); returns all outputs of each request.

    A step has room for as many tokens as a block table, so that S says nothing about prefixes.
    """
    batch, width = len(x), tables.shape[1] * cache.page_size
    lengths, outs = np.zeros(batch, np.int32), [[] for _ in range(batch)]
    for counts in np.array(steps, np.int32):
        new = np.full((batch, width, x.shape[2]), np.nan, np.float32)  # padding is NaN
        for b, count in enumerate(counts):
            new[b, :count] = x[b, lengths[b] : lengths[b] + count]
        lengths = lengths + counts
        used = np.arange(tables.shape[1]) * cache.page_size < lengths[:, None]
        poisoned = np.where(used, tables, -7)
        new = jnp.asarray(new, params.w_dkv.dtype)
        out, cache = layer(params, SMALL, new, cache, poisoned, lengths, query_lens=counts)
        out = np.asarray(out, np.float32)
        for b, count in enumerate(counts):
            assert not out[b, count:].any()
            outs[b].append(out[b, :count])
    return [np.concatenate(out) for out in outs], lengths


# Behind prefixes of up to 33 tokens in all, one of them empty, and with requests without tokens.
STEPS = [(5, 0, 13), (14, 1, 0), (0, 17, 2), (3, 2, 5)]


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "workspace_tokens"),
    [("float32", "float32", 7), ("float32", "int8", 3 * (32 + 2)), ("bfloat16", "bfloat16", None)],
)
def test_expanded_in_chunks(dtype, cache_dtype, workspace_tokens):
    """Parts of the prefix begin and end inside of requests, and one program serves all chunks.

    Of each prefix no token, the last two or all of them join the new tokens.
    """
    params, x = random_layer(SMALL, batch=3, length=24)
    wanted = layer_float64(SMALL, params, x)
    params = jax.tree.map(lambda weight: weight.astype(dtype), params)
    layer = traced_once(form="expanded", workspace_tokens=workspace_tokens)
    cache, tables = poisoned_cache(3, 24, cache_dtype)
    outs, lengths = feed_ragged(layer, params, np.asarray(x), STEPS, cache, tables)
    tolerance = {"float32": 2e-6, "int8": 1e-2, "bfloat16": 2e-2}[cache_dtype]
    for out, reference, length in zip(outs, wanted, lengths, strict=True):
        assert relative_error(out, reference[:length]) < tolerance


def test_requests_with_few_tokens_take_the_absorbed_form(monkeypatch):
    """Both forms in one call, and calls in which no request takes the one or the other."""
    monkeypatch.setattr(layer_form, "_cheaper", lambda count, *_: layer_form.FORMS[count > 4])
    params, x = random_layer(SMALL, batch=3, length=24)
    program = programs_of(mla_layer, params, 17, 48, query_lens=np.full(3, 4, np.int32))
    assert program == {"absorbed", "expanded"}
    steps = [(4, 3, 1), (5, 0, 17), (1, 5, 4), (4, 16, 2)]
    cache, tables = poisoned_cache(3, 24)
    outs, lengths = feed_ragged(traced_once(), params, np.asarray(x), steps, cache, tables)
    wanted = layer_float64(SMALL, params, x)
    for out, reference, length in zip(outs, wanted, lengths, strict=True):
        assert relative_error(out, reference[:length]) < 2e-6


def programs_of(layer, params, count, table_tokens, *, batch=3, config=SMALL, **options):
    """Returns the forms that a call computes, read from its traced program."""
    cache = PagedKVCache.create(
        8,
        page_size=16,
        kv_lora_rank=config.kv_lora_rank,
        rope_dim=config.qk_rope_head_dim,
        dtype=options.pop("cache_dtype", jnp.float32),
    )
    x = jnp.zeros((batch, count, config.hidden_size), params.w_dkv.dtype)
    tables = np.zeros((batch, table_tokens // 16), np.int32)
    lens = np.full(batch, table_tokens, np.int32)
    call = functools.partial(layer, config=config, **options)
    text = str(jax.make_jaxpr(lambda *args: call(params=params, x=x, cache=args[0],
               block_tables=args[1], seq_lens=args[2]))(cache, tables, lens))  # fmt: skip
    names = {"absorbed": "name=attend_xla", "expanded": "name=attend_ragged_xla"}
    return {form for form, name in names.items() if name in text}


def test_the_cost_model_chooses():
    params, _ = random_layer(SMALL)
    cheaper = {
        count: choose_form(
            count, num_heads=3, table_tokens=128, kv_lora_rank=18, qk_nope_head_dim=6,
            qk_rope_head_dim=4, v_head_dim=5, dtype=jnp.float32,
        ).form
        for count in range(1, 129)
    }  # fmt: skip
    first = next(count for count, form in cheaper.items() if form == "expanded")
    assert 1 < first < 128
    for count in (1, first - 1, first):
        assert programs_of(mla_layer, params, count, 128) == {cheaper[count]}
    # Where the expanded form can't do what is asked for, the absorbed one does.
    half = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), params)
    for options in (
        {"form": "absorbed"},
        {"rescale": "exponent_add"},
        {"partial_dtype": jnp.float32},
        {"implementation": ["xla", "split_kv"]},
    ):
        assert programs_of(mla_layer, params, 128, 128, **options) == {"absorbed"}
    assert programs_of(mla_layer, half, 128, 128) == {"absorbed"}  # of a float32 cache
    wide = dataclasses.replace(SMALL, kv_lora_rank=512, qk_rope_head_dim=64)
    wide_params, _ = random_layer(wide, dtype=jnp.bfloat16)
    call = functools.partial(programs_of, mla_layer, wide_params, 128, 128, config=wide)
    # The Hopper kernels have these widths of the latents, but not of the keys of a head.
    assert call(cache_dtype=jnp.bfloat16) == {"absorbed"}
    assert call(cache_dtype=jnp.bfloat16, implementation="xla") == {"expanded"}


def test_the_model_of_deepseek_v3():
    def form(count, table_tokens=16384, **options):
        return choose_form(count, num_heads=128, table_tokens=table_tokens, **options).form

    assert [form(count) for count in (1, 180, 200, 4096)] == ["absorbed"] * 2 + ["expanded"] * 2
    assert form(1, 1) == form(1, 2**20) == "absorbed"
    assert form(256, 256) == form(10**6, 256) == "expanded"  # no prefix; a table bounds the tokens
    costs = choose_form(2048, num_heads=128, table_tokens=16384)
    # 2048 tokens behind 14,336: 2.58 TFLOP of attention at 642 TFLOPS, 0.55 of products at 696.
    assert costs.expanded == pytest.approx(2.58e12 / 642e12 + 0.55e12 / 696e12, rel=0.02)
    assert costs.absorbed > 2 * costs.expanded
    for options, error, message in (
        ({"num_query_tokens": 0}, ValueError, "num_query_tokens must be a positive integer, got 0"),
        ({"qk_rope_head_dim": -1}, ValueError, "qk_rope_head_dim must be at least 0, got -1"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of float32, .* got 'int8'"),
        ({"dtype": "x"}, TypeError, "dtype must be one of float32, .* got 'x'"),
        ({"causal": None}, TypeError, "causal must be True or False, got None"),
        ({"profile": "H200"}, TypeError, "profile must be a HardwareProfile, got str"),
    ):
        with pytest.raises(error, match=message):
            choose_form(**({"num_query_tokens": 1, "num_heads": 1, "table_tokens": 1} | options))


def test_invalid_requests_of_the_expanded_form():
    params, x = random_layer(SMALL, batch=4)
    cache, tables = new_cache(SMALL, 4, 9)
    x, lens = np.asarray(x), np.array([9, 9, 17, 9], np.int32)  # a table has 16 tokens
    tables = np.asarray(tables).copy()
    tables[0] = 99  # a page that the cache does not have
    queries = np.array([9, 9, 9, 10], np.int32)
    layer = traced_once(form="expanded")
    out, cache = layer(params, SMALL, x, cache, tables, lens, query_lens=queries)
    assert np.isnan(out).all(axis=(1, 2)).tolist() == [True, False, True, True]
    assert relative_error(out[1], layer_float64(SMALL, params, x[1:2])[0]) < TOLERANCE
    assert np.flatnonzero(np.any(cache.pages, axis=(1, 2))).tolist() == tables[1].tolist()


def test_a_call_without_a_prefix_and_without_a_mask():
    """Every token sees all keys, so that only the last one has the output of a causal call."""
    params, x = random_layer(SMALL, length=16)
    cache, tables = new_cache(SMALL, 2, 16)
    lens = np.full(2, 16, np.int32)
    layer = jax.jit(functools.partial(mla_layer, form="expanded", causal=False), static_argnums=1)
    out = np.asarray(layer(params, SMALL, x, cache, tables, lens)[0])
    wanted = layer_float64(SMALL, params, x)
    assert relative_error(out[:, -1], wanted[:, -1]) < 2e-6
    assert relative_error(out[:, 0], wanted[:, 0]) > 1e-2


def test_refuses_what_the_expanded_form_can_not_do():
    params, x = random_layer(SMALL, length=16)
    cache, tables = new_cache(SMALL, 2, 16)
    lens = np.full(2, 16, np.int32)
    plan = plan_fixed(lens, split_size=64, max_seq_len=16, num_workers=4, rows=48)
    for options, error, message in (
        ({"plan": plan}, ValueError, "form must be 'absorbed' or None here, .*: plan is for the"),
        ({"partial_dtype": "float32"}, ValueError, "partial_dtype is for the absorbed form"),
        ({"rescale": "exponent_add"}, ValueError, "rescale='exponent_add' is for the absorbed"),
        ({"implementation": "split_kv"}, ValueError, "'split_kv' has the absorbed form only"),
        ({"implementation": "hopper"}, ValueError, "'hopper' can't run this: .*float32"),
        ({"form": "naive"}, ValueError, "form must be one of absorbed, expanded, got 'naive'"),
        ({"workspace_tokens": 0}, ValueError, "workspace_tokens must be a positive integer, got 0"),
        ({"block_tables": tables[0]}, ValueError, r"block_tables must be \[B, max_pages\]"),
        ({"seq_lens": lens + 1}, ValueError, r"seq_lens\[0\] must be in 0 .. 16"),
        ({"donate": None}, TypeError, "donate must be True or False, got None"),
    ):
        given = {"form": "expanded", "block_tables": tables, "seq_lens": lens} | options
        with pytest.raises(error, match=message):
            mla_layer(params, SMALL, x, cache, **given)
    half = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match="a float32 cache would be rounded to bfloat16"):
        mla_layer(half, SMALL, x.astype(jnp.bfloat16), cache, tables, lens, form="expanded")
    assert not np.any(cache.pages)  # nothing was written, and the cache is still there
