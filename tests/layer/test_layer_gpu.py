"""GPU tests of the layer with the kernels: both forms against float64, and their gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_layer import new_cache, random_layer, relative_error

from mla_jax.config import MLAConfig
from mla_jax.layer import mla_layer
from mla_jax.reference.layer import layer_float64
from mla_jax.reference.naive import naive_mla_layer

# DeepSeek-V3's widths per head, which the kernels are made for.
WIDE = MLAConfig(hidden_size=256, num_heads=5, q_lora_rank=192, kv_lora_rank=512)
ROOM = 400  # tokens of a step
# Tokens of 3 requests: chunks of both forms in one step, behind prefixes, and empty requests.
STEPS = np.array([(400, 1, 0), (133, 260, 37), (1, 400, 200), (0, 3, 390)], np.int32)
LENS = STEPS.sum(0)
BOUND = {"bfloat16": 2e-2, "int8": 2e-2}


@functools.cache
def case(dtype):
    """Weights and hidden states, both rounded to dtype."""
    return random_layer(WIDE, batch=len(LENS), length=int(LENS.max()), dtype=jnp.dtype(dtype))


@functools.cache
def wanted():
    params, x = case("bfloat16")
    return layer_float64(WIDE, params, np.asarray(x, np.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("form", ["absorbed", "expanded", None])
def test_chunks_on_the_gpu(form, cache_dtype):
    """One program serves all steps. Padding and what no token has written yet are NaN.

    The tokens are in the last layer of a pool, and all page numbers exist in the other one too.
    With room for 1500 tokens, the last 100 of each prefix join the new ones.
    """
    params, x = case("bfloat16")
    options = {"page_size": 64, "dtype": cache_dtype, "num_layers": 2}
    cache, tables = new_cache(WIDE, len(LENS), int(LENS.max()), **options)
    if cache_dtype != "int8":
        cache = dataclasses.replace(cache, pages=jnp.full_like(cache.pages, jnp.nan))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(x, cache, lens, counts):
        room = 300 if form == "expanded" else 1500
        options = {"query_lens": counts, "form": form, "workspace_tokens": room}
        return mla_layer(params, WIDE, x, cache.layer(1), tables, lens, **options)

    lens = np.zeros(len(LENS), np.int32)
    for counts in STEPS:
        new = np.full((len(LENS), ROOM, WIDE.hidden_size), np.nan, x.dtype)
        for b, count in enumerate(counts):
            new[b, :count] = x[b, lens[b] : lens[b] + count]
        before, lens = lens, lens + counts
        out, cache = step(new, cache, lens, counts)
        out = np.asarray(out, np.float32)
        for b, count in enumerate(counts):
            assert not out[b, count:].any()
            if count:
                exact = wanted()[b, before[b] : lens[b]]
                assert relative_error(out[b, :count], exact) < BOUND[cache_dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["absorbed", None])
def test_packed_chunks_on_the_gpu(form):
    """As above with `cu_q_lens`; padding behind the tokens is NaN."""
    params, x = case("bfloat16")
    cache, tables = new_cache(WIDE, 3, int(LENS.max()), page_size=64, dtype="bfloat16")
    cache = dataclasses.replace(cache, pages=jnp.full_like(cache.pages, jnp.nan))
    count = int(STEPS.sum(axis=1).max()) + 3

    @functools.partial(jax.jit, donate_argnums=1)
    def step(x, cache, lens, cu_q_lens):
        options = {"cu_q_lens": cu_q_lens, "form": form, "workspace_tokens": 1500}
        return mla_layer(params, WIDE, x, cache, tables, lens, **options)

    lens = np.zeros(len(LENS), np.int32)
    for counts in STEPS:
        before, lens = lens, lens + counts
        new = [x[b, before[b] : lens[b]] for b in range(len(LENS))]
        new.append(np.full((count - counts.sum(), WIDE.hidden_size), np.nan, x.dtype))
        cu_q_lens = np.append(0, np.cumsum(counts)).astype(np.int32)
        out, cache = step(np.concatenate(new), cache, lens, cu_q_lens)
        out = np.asarray(out, np.float32)
        exact = np.concatenate([wanted()[b, before[b] : lens[b]] for b in range(len(LENS))])
        assert relative_error(out[: len(exact)], exact) < BOUND["bfloat16"]
        assert not out[len(exact) :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_gradients_on_the_gpu(form):
    """Of all weights and of x, of a prefill of 333 tokens, against the naive layer in float32."""
    length = 333
    exact_params, exact_x = jax.tree.map(lambda a: a.astype(jnp.float32), case("bfloat16"))
    weights = np.random.default_rng(0).standard_normal((2, length, WIDE.hidden_size))
    weights = weights.astype(np.float32)
    cache, tables = new_cache(WIDE, 2, length, page_size=64, dtype="bfloat16")
    lens = np.full(2, length, np.int32)

    def loss(params, x):
        out, _ = mla_layer(params, WIDE, x, cache, tables, lens, form=form, donate=False)
        return jnp.sum(out.astype(jnp.float32) * weights)

    def exact_loss(params, x):
        return jnp.sum(naive_mla_layer(params, WIDE, x) * weights)

    params, x = case("bfloat16")
    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x[:2, :length])
    exact = jax.jit(jax.grad(exact_loss, argnums=(0, 1)))(exact_params, exact_x[:2, :length])
    places = jax.tree_util.tree_flatten_with_path(exact)[0]
    for (path, right), got in zip(places, jax.tree.leaves(found), strict=True):
        error = relative_error(np.asarray(got, np.float32), right)
        assert error < 3e-2, (jax.tree_util.keystr(path), error)
