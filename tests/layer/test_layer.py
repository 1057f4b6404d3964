"""The layer against transformers' golden vectors and float64, over every way of feeding tokens."""

import dataclasses
import json
from pathlib import Path

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from small_layer import (
    CONFIGS,
    SMALL,
    TOLERANCE,
    naive,
    new_cache,
    random_layer,
    relative_error,
    step,
)

from mla_jax.checkpoints.load import load_hf
from mla_jax.checkpoints.read import Checkpoint
from mla_jax.checkpoints.weights import rotate_latent
from mla_jax.config.mla import MODEL_TYPES
from mla_jax.layer import mla_layer, preprocess, project_output
from mla_jax.reference.layer import layer_float64
from mla_jax.reference.naive import naive_mla_layer

GOLDEN = sorted((Path(__file__).parents[1] / "data" / "golden").iterdir())


def feed(params, config, x, pieces, cache_dtype=None, **options):
    """Runs x [B, S, hidden] through the paged layer in pieces of so many tokens."""
    cache, tables = new_cache(config, *x.shape[:2], dtype=cache_dtype or x.dtype)
    x, outs, done = np.asarray(x), [], 0
    for piece in pieces:
        seq_lens = np.full(x.shape[:1], done + piece, np.int32)
        new = x[:, done : done + piece]
        out, cache = step(params, config, new, cache, tables, seq_lens, **options)
        outs.append(np.asarray(out))
        done += piece
    assert done == x.shape[1]
    return np.concatenate(outs, 1)


def golden(folder):
    """(config, params, x, out) of a shipped case, which has just one layer."""
    [layer] = Checkpoint(folder).layers
    vectors = np.load(folder / "golden.npz")
    return *load_hf(folder, layer), vectors["x"], vectors["out"]


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
class TestGolden:
    def test_naive(self, folder):
        config, params, x, out = golden(folder)
        assert relative_error(naive(params, config, x), out) < TOLERANCE

    def test_two_chunks(self, folder):
        config, params, x, out = golden(folder)
        assert relative_error(feed(params, config, x, [20] * 2), out) < TOLERANCE

    def test_oracle(self, folder):
        """The float64 oracle of the other tests is itself what transformers computes."""
        config, params, x, out = golden(folder)
        assert relative_error(layer_float64(config, params, x), out) < 2e-6


@pytest.mark.parametrize("pieces", [[40], [10, *[1] * 30]], ids=len)
def test_other_chunks(pieces):
    """A whole prompt, and a chunk before single tokens: of one golden layer.

    Every golden layer takes many tokens at once, without and with a prefix. No setting of a layer
    distinguishes chunks by their size.
    """
    config, params, x, out = golden(GOLDEN[0])
    assert relative_error(feed(params, config, x, pieces), out) < TOLERANCE


def test_golden_covers_the_published_dialects():
    raw = [json.loads((folder / "config.json").read_text()) for folder in GOLDEN]
    assert {c["model_type"] for c in raw} == set(MODEL_TYPES)
    assert any("rope_parameters" in c for c in raw)
    assert any("rope_scaling" in c for c in raw)
    assert {c.get("rope_interleave") for c in raw} == {None, True, False}
    assert any(c["q_lora_rank"] is None for c in raw)
    assert any("quantization_config" in c for c in raw)
    assert sum(f.stat().st_size for folder in GOLDEN for f in folder.iterdir()) < 2e6


# The layer's code does not ask whether it is traced, so one layer runs without jit.
WITH_AND_WITHOUT_JIT = [*((config, True) for config in CONFIGS), (next(iter(CONFIGS)), False)]


@pytest.mark.parametrize(("config", "jit"), WITH_AND_WITHOUT_JIT)
def test_naive(config, jit):
    config, layer = CONFIGS[config], naive if jit else naive_mla_layer
    params, x = random_layer(config)
    got = layer(params, config, x)
    chex.assert_shape(got, x.shape)
    assert relative_error(got, layer_float64(config, params, x)) < 2e-6


@pytest.mark.parametrize(("config", "jit"), WITH_AND_WITHOUT_JIT)
def test_paged(config, jit):
    config, layer = CONFIGS[config], step if jit else mla_layer
    params, x = random_layer(config)
    cache, tables = new_cache(config, 2, 9)
    lens = np.array([9, 9], np.int32)
    got, _ = layer(params, config, x, cache, tables, lens, query_lens=lens)
    chex.assert_shape(got, x.shape)
    assert relative_error(got, layer_float64(config, params, x)) < 2e-6


@settings(max_examples=25, deadline=None)
@given(
    config=st.sampled_from(list(CONFIGS.values())),
    seed=st.integers(0, 2**31 - 1),
    pieces=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_absorbed_is_naive(config, seed, pieces, scale):
    """Whatever the layer and its values, and wherever the tokens are cut."""
    params, x = random_layer(config, seed=seed)
    x = np.asarray(x) * np.float32(scale)
    wanted = np.asarray(naive(params, config, x))
    cache, tables = new_cache(config, 2, 9)
    done = 0
    for piece in [*pieces, 9]:
        piece = min(piece, 9 - done)
        new = np.roll(x, -done, axis=1)  # the next tokens, then others that are not to count
        seq_lens, query_lens = (np.full(2, n, np.int32) for n in (done + piece, piece))
        out, cache = step(params, config, new, cache, tables, seq_lens, query_lens=query_lens)
        if piece:
            got = np.asarray(out)[:, :piece]
            assert relative_error(got, wanted[:, done : done + piece]) < TOLERANCE
        done += piece


def test_ragged_batch():
    """Requests of their own lengths, fed in chunks of their own, end as if each were alone."""
    params, x = random_layer(SMALL, batch=3, length=20)
    cache, tables = new_cache(SMALL, 3, 20)
    seq_lens = np.zeros(3, np.int32)
    outs = [[] for _ in range(3)]
    for query_lens in ([7, 1, 0], [0, 7, 2], [1, 1, 1], [7, 7, 5], [5, 0, 7]):
        new = np.full((3, 7, SMALL.hidden_size), 1e3, np.float32)  # what pads is not to matter
        for b, count in enumerate(query_lens):
            new[b, :count] = x[b, seq_lens[b] : seq_lens[b] + count]
        seq_lens += query_lens
        lens = seq_lens.copy(), np.array(query_lens, np.int32)
        out, cache = step(params, SMALL, new, cache, tables, lens[0], query_lens=lens[1])
        out = np.asarray(out)
        for b, count in enumerate(query_lens):
            outs[b].append(out[b, :count])
            assert not np.any(out[b, count:])
    wanted = layer_float64(SMALL, params, x)
    for b in range(3):
        assert relative_error(np.concatenate(outs[b]), wanted[b, : seq_lens[b]]) < TOLERANCE


def test_shards_add_up_to_the_whole():
    """Tensor parallelism: each shard has its heads and the whole cache; the outputs add up."""
    config = dataclasses.replace(SMALL, num_heads=4)
    params, x = random_layer(config)
    total = 0
    for rank in range(2):
        mine = slice(2 * rank, 2 * rank + 2)
        shard = dataclasses.replace(
            params,
            w_uq=params.w_uq[:, mine],
            w_uk=params.w_uk[mine],
            w_uv=params.w_uv[mine],
            w_o=params.w_o[mine],
        )
        total += feed(shard, config.shard(2), x, [9])
    assert relative_error(total, layer_float64(config, params, x)) < TOLERANCE


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    params, x = random_layer(SMALL, dtype=dtype)
    wanted = layer_float64(SMALL, *jax.tree.map(lambda a: a.astype(jnp.float32), (params, x)))
    eps = float(jnp.finfo(dtype).eps)
    for got in (naive(params, SMALL, x), feed(params, SMALL, x, [3] * 3)):
        assert got.dtype == dtype
        assert relative_error(got, wanted) < 4 * eps


def test_bfloat16_sums_in_float32():
    """Each head's W_UK and W_UV: XLA's CPU dot would round every partial sum to bfloat16."""
    config = dataclasses.replace(SMALL, kv_lora_rank=512, qk_nope_head_dim=128, q_lora_rank=None)
    params, x = random_layer(config, dtype=jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    wide_params, wide_x = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    q, _ = preprocess(params, config, x, positions)
    wanted, _ = preprocess(wide_params, config, wide_x, positions)
    assert relative_error(q, wanted) < float(jnp.finfo(jnp.bfloat16).eps)
    o_latent = jnp.sin(jnp.arange(2 * 512 * config.num_heads)).reshape(1, 2, -1, 512)
    o_latent = o_latent.astype(jnp.bfloat16)
    out = project_output(params, o_latent)
    wanted = project_output(wide_params, o_latent.astype(jnp.float32))
    assert relative_error(out, wanted) < float(jnp.finfo(jnp.bfloat16).eps)


def test_preprocess_makes_the_cache_rows():
    """q . kv is the score of the expanded heads, and kv is what the cache then holds."""
    params, x = random_layer(SMALL)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    q, kv = preprocess(params, SMALL, x, positions)
    chex.assert_shape(q, (2, 9, 3, SMALL.latent_dim))
    chex.assert_shape(kv, (2, 9, SMALL.latent_dim))
    cache, tables = new_cache(SMALL, 2, 9)
    lens = np.array([9, 9], np.int32)
    _, cache = step(params, SMALL, x, cache, tables, lens, query_lens=lens)
    chex.assert_trees_all_close(cache.gather(tables, max_len=9), kv, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_any_implementation(implementation):
    """The layer hands the name on, so that one other than the default shows it."""
    params, x = random_layer(SMALL)
    got = feed(params, SMALL, x, [3] * 3, implementation=implementation)
    assert relative_error(got, layer_float64(SMALL, params, x)) < TOLERANCE


def test_int8_cache():
    """The cache costs what 8 bits cost, in whatever pieces the tokens come."""
    params, x = random_layer(SMALL)
    at_once = feed(params, SMALL, x, [9], cache_dtype="int8")
    pieces = feed(params, SMALL, x, [3] * 3, cache_dtype="int8")
    assert 1e-3 < relative_error(pieces, layer_float64(SMALL, params, x)) < 1e-2
    assert relative_error(pieces, np.asarray(at_once, np.float64)) < TOLERANCE


def test_int8_cache_of_a_bfloat16_layer():
    params, x = random_layer(SMALL, dtype=jnp.bfloat16)
    wanted = layer_float64(SMALL, *jax.tree.map(lambda a: a.astype(jnp.float32), (params, x)))
    got = feed(params, SMALL, x, [9], cache_dtype="int8")
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, wanted) < 1e-2 + 4 * float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize("name", ["direct_q_half", "bias_plain"])
def test_a_rotated_latent_is_the_same_layer(name):
    config = dataclasses.replace(CONFIGS[name], kv_lora_rank=32)
    params, x = random_layer(config)
    rotated = rotate_latent(params)
    wanted = layer_float64(config, params, x)
    assert relative_error(naive(rotated, config, x), wanted) < TOLERANCE
    assert relative_error(feed(rotated, config, x, [9]), wanted) < TOLERANCE
    assert relative_error(rotated.w_dkv[:, :32], params.w_dkv[:, :32]) > 0.5


def test_a_rotated_latent_has_no_outlier_channels():
    config = dataclasses.replace(SMALL, kv_lora_rank=128)
    plain, x = random_layer(config, length=30)
    channels = np.array([3, 77])  # loud in the cache, and heard as little as any other
    norm_kv, w_uk, w_uv = (np.array(x) for x in (plain.norm_kv, plain.w_uk, plain.w_uv))
    norm_kv[channels] = 30.0
    w_uk[:, :, channels] /= 30.0
    w_uv[:, channels] /= 30.0
    loud = dataclasses.replace(
        plain, **jax.device_put({"norm_kv": norm_kv, "w_uk": w_uk, "w_uv": w_uv})
    )
    plain, loud, rotated = (
        relative_error(
            feed(params, config, x, [30], cache_dtype="int8"), layer_float64(config, params, x)
        )
        for params in (plain, loud, rotate_latent(loud))
    )
    assert loud > 5 * plain
    assert rotated < 1.5 * plain


def test_rotation_refuses_other_ranks():
    with pytest.raises(ValueError, match="Hadamard matrix must be a power of 2, got 18"):
        rotate_latent(random_layer(SMALL)[0])


def test_a_growing_decode_traces_once():
    params, x = random_layer(SMALL, length=40)
    traced = jax.jit(chex.assert_max_traces(mla_layer, n=1), static_argnames="config")
    cache, tables = new_cache(SMALL, 2, 40)
    outs = []
    for i in range(40):
        seq_lens = np.full(2, i + 1, np.int32)
        new = np.asarray(x)[:, i : i + 1]
        out, cache = traced(params, SMALL, new, cache, tables, seq_lens)
        outs.append(np.asarray(out))
    wanted = layer_float64(SMALL, params, x)
    assert relative_error(np.concatenate(outs, 1), wanted) < TOLERANCE


def test_layers_under_64_bits_strict_promotion_and_debug_nans():
    """All at once; without jit both run among the variants above."""
    params, x = random_layer(SMALL)
    cache, tables = new_cache(SMALL, 2, 9)
    lens = np.array([9, 9], np.int32)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        got = naive(params, SMALL, x)
        paged, _ = step(params, SMALL, x, cache, tables, lens, implementation="xla")
    for out in (got, paged):
        assert out.dtype == jnp.float32
        assert relative_error(out, layer_float64(SMALL, params, x)) < 2e-6


def test_in_the_naive_layer_no_later_token_reaches_an_earlier_one():
    params, x = random_layer(SMALL, batch=2, length=6)
    spoiled = np.array(x)
    spoiled[0, 4, 3] = np.nan
    run = jax.jit(naive_mla_layer, static_argnums=1)
    clean, rows = (np.asarray(run(params, SMALL, values)) for values in (x, spoiled))
    assert np.isnan(rows[0, 4:]).all()
    np.testing.assert_array_equal(rows[1], clean[1])
    np.testing.assert_array_equal(rows[0, :4], clean[0, :4])
