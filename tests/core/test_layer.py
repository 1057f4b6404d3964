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
from absl.testing import parameterized
from hypothesis import given, settings
from random_layer import random_params

from mla_jax.cache import PagedKVCache
from mla_jax.checkpoints.read import Checkpoint
from mla_jax.checkpoints.weights import load_hf, rotate_latent
from mla_jax.config import MLAConfig, YarnScaling
from mla_jax.layer import attend, mla_layer, naive_mla_layer, preprocess, project_output
from mla_jax.reference.layer import layer_float64

GOLDEN = sorted((Path(__file__).parents[1] / "data" / "golden").iterdir())
TOLERANCE = 2e-5  # relative Frobenius error, float32

SMALL = MLAConfig(
    hidden_size=20,
    num_heads=3,
    q_lora_rank=12,
    kv_lora_rank=18,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    rope_scaling=YarnScaling(4.0, 8, mscale=1.0, mscale_all_dim=0.7),
)

naive = jax.jit(naive_mla_layer, static_argnames="config")
step = jax.jit(mla_layer, static_argnames=("config", "implementation"), donate_argnames="cache")


def relative_error(got, wanted):
    wanted = np.asarray(wanted, np.float64)
    return np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)


def new_cache(config, batch, length, page_size=16, dtype=jnp.float32):
    """An empty cache and a block table of shuffled pages for `batch` requests."""
    width = -(-length // page_size)
    pages = np.random.default_rng(0).permutation(batch * width).astype(np.int32)
    cache = PagedKVCache.create(
        batch * width,
        page_size=page_size,
        kv_lora_rank=config.kv_lora_rank,
        rope_dim=config.qk_rope_head_dim,
        dtype=dtype,
    )
    return cache, jnp.asarray(pages.reshape(batch, width))


def feed(params, config, x, pieces, cache_dtype=None, **options):
    """Runs x [B, S, hidden] through the paged layer in pieces of so many tokens."""
    cache, tables = new_cache(config, *x.shape[:2], dtype=cache_dtype or x.dtype)
    outs, done = [], 0
    for piece in pieces:
        seq_lens = jnp.full(x.shape[:1], done + piece, jnp.int32)
        new = x[:, done : done + piece]
        out, cache = step(params, config, new, cache, tables, seq_lens, **options)
        outs.append(out)
        done += piece
    assert done == x.shape[1]
    return jnp.concatenate(outs, 1)


def golden(folder):
    """(config, params, x, out) of a shipped case, which has just one layer."""
    [layer] = Checkpoint(folder).layers
    vectors = np.load(folder / "golden.npz")
    return *load_hf(folder, layer), jnp.asarray(vectors["x"]), vectors["out"]


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
class TestGolden:
    def test_naive(self, folder):
        config, params, x, out = golden(folder)
        assert relative_error(naive(params, config, x), out) < TOLERANCE

    def test_prefill(self, folder):
        config, params, x, out = golden(folder)
        assert relative_error(feed(params, config, x, [40]), out) < TOLERANCE

    def test_chunked_prefill(self, folder):
        config, params, x, out = golden(folder)
        assert relative_error(feed(params, config, x, [10] * 4), out) < TOLERANCE

    def test_token_by_token(self, folder):
        config, params, x, out = golden(folder)
        assert relative_error(feed(params, config, x, [1] * 40), out) < TOLERANCE

    def test_two_at_a_time(self, folder):
        config, params, x, out = golden(folder)
        assert relative_error(feed(params, config, x, [10, *[2] * 15]), out) < TOLERANCE

    def test_oracle(self, folder):
        """The float64 oracle of the other tests is itself what transformers computes."""
        config, params, x, out = golden(folder)
        assert relative_error(layer_float64(config, params, x), out) < 2e-6


def test_golden_covers_the_published_dialects():
    raw = [json.loads((folder / "config.json").read_text()) for folder in GOLDEN]
    assert {c["model_type"] for c in raw} == {"deepseek_v2", "deepseek_v3", "kimi_k2"}
    assert any("rope_parameters" in c for c in raw)
    assert any("rope_scaling" in c for c in raw)
    assert {c.get("rope_interleave") for c in raw} == {None, True, False}
    assert any(c["q_lora_rank"] is None for c in raw)
    assert any("quantization_config" in c for c in raw)
    assert sum(f.stat().st_size for folder in GOLDEN for f in folder.iterdir()) < 2e6


CONFIGS = {
    "low_rank_q_yarn": SMALL,
    "direct_q_half": dataclasses.replace(SMALL, q_lora_rank=None, rope_interleave=False),
    "bias_plain": dataclasses.replace(SMALL, attention_bias=True, rope_scaling=None),
    "one_head": dataclasses.replace(SMALL, num_heads=1, v_head_dim=9, qk_rope_head_dim=2),
}


def random_layer(config, batch=2, length=9, dtype=jnp.float32, seed=0):
    """(params, x [batch, length, hidden])."""
    x = np.random.default_rng(~np.uint32(seed)).standard_normal((batch, length, config.hidden_size))
    return random_params(config, dtype, seed), jnp.asarray(x, dtype)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(CONFIGS.items())
    def test_naive(self, config):
        params, x = random_layer(config)
        got = self.variant(lambda p, x: naive_mla_layer(p, config, x))(params, x)
        chex.assert_shape(got, x.shape)
        assert relative_error(got, layer_float64(config, params, x)) < 2e-6

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(CONFIGS.items())
    def test_paged(self, config):
        params, x = random_layer(config)
        cache, tables = new_cache(config, 2, 9)
        layer = self.variant(lambda *args: mla_layer(args[0], config, *args[1:])[0])
        got = layer(params, x, cache, tables, jnp.array([9, 9], jnp.int32))
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
    x = x * scale
    wanted = naive(params, config, x)
    cache, tables = new_cache(config, 2, 9)
    done = 0
    for piece in [*pieces, 9]:
        piece = min(piece, 9 - done)
        new = jnp.roll(x, -done, axis=1)  # the next tokens, then others that are not to count
        seq_lens, query_lens = (jnp.full(2, n, jnp.int32) for n in (done + piece, piece))
        out, cache = step(params, config, new, cache, tables, seq_lens, query_lens=query_lens)
        if piece:
            got = out[:, :piece]
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
        lens = (jnp.asarray(seq_lens), jnp.asarray(query_lens, jnp.int32))
        out, cache = step(params, SMALL, new, cache, tables, lens[0], query_lens=lens[1])
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
    for got in (naive(params, SMALL, x), feed(params, SMALL, x, [5, *[1] * 4])):
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
    params, x = random_layer(SMALL, length=4)
    positions = jnp.broadcast_to(jnp.arange(4), (2, 4))
    q, kv = preprocess(params, SMALL, x, positions)
    chex.assert_shape(q, (2, 4, 3, SMALL.latent_dim))
    chex.assert_shape(kv, (2, 4, SMALL.latent_dim))
    cache, tables = new_cache(SMALL, 2, 4)
    _, cache = mla_layer(params, SMALL, x, cache, tables, jnp.array([4, 4], jnp.int32))
    chex.assert_trees_all_close(cache.gather(tables, max_len=4), kv, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla", "split_kv"])
def test_any_implementation(implementation):
    params, x = random_layer(SMALL)
    got = feed(params, SMALL, x, [5, 2, 2], implementation=implementation)
    assert relative_error(got, layer_float64(SMALL, params, x)) < TOLERANCE


def test_int8_cache():
    """The cache costs what 8 bits cost, in whatever pieces the tokens come."""
    params, x = random_layer(SMALL)
    at_once = feed(params, SMALL, x, [9], cache_dtype="int8")
    pieces = feed(params, SMALL, x, [5, *[1] * 4], cache_dtype="int8")
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
    channels = jnp.array([3, 77])  # loud in the cache, and heard as little as any other
    loud = dataclasses.replace(
        plain,
        norm_kv=plain.norm_kv.at[channels].set(30.0),
        w_uk=plain.w_uk.at[:, :, channels].divide(30.0),
        w_uv=plain.w_uv.at[:, channels].divide(30.0),
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
        seq_lens = jnp.full(2, i + 1, jnp.int32)
        out, cache = traced(params, SMALL, x[:, i : i + 1], cache, tables, seq_lens)
        outs.append(out)
    wanted = layer_float64(SMALL, params, x)
    assert relative_error(jnp.concatenate(outs, 1), wanted) < TOLERANCE


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
    ({"params": {}}, TypeError, "params must be an MLAParams, got dict"),
    ({"params": None}, TypeError, "params must be an MLAParams, got NoneType"),
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


def test_layers_under_64_bits_strict_promotion_and_debug_nans():
    """All at once; without jit both run among the variants above."""
    params, x = random_layer(SMALL)
    cache, tables = new_cache(SMALL, 2, 9)
    lens = jnp.array([9, 9], jnp.int32)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        got = naive(params, SMALL, x)
        paged, _ = step(params, SMALL, x, cache, tables, lens, implementation="xla")
    for out in (got, paged):
        assert out.dtype == jnp.float32
        assert relative_error(out, layer_float64(SMALL, params, x)) < 2e-6
