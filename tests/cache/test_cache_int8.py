"""An int8 PagedKVCache: what it stores, in every granularity and layout, and what it refuses."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_batch import OPTIMISED

from mla_jax import quantize
from mla_jax.attention import paged_mla_attention
from mla_jax.cache import PAGE_SIZES, PagedKVCache
from mla_jax.reference.attention import read_pages_float64

RANK, ROPE = 256, 16
WIDTH = RANK + ROPE
GARBAGE = 2**31 - 1
SCALE = 0.03  # of "tensor": 127 steps reach 3.8
LEAVES = ("pages", "rope_pages", "scales")
# A layout orders the values of a page and knows nothing of scales: one granularity has both.
CASES = [("ND", granularity) for granularity in quantize.GRANULARITIES] + [("NZ", "token")]
stored_rows = jax.jit(PagedKVCache.stored_rows)


def create(num_pages=40, page_size=16, layout="ND", granularity="token"):
    return PagedKVCache.create(
        num_pages,
        page_size=page_size,
        kv_lora_rank=RANK,
        rope_dim=ROPE,
        dtype=jnp.int8,
        layout=layout,
        scale_granularity=granularity,
        scale=SCALE if granularity == "tensor" else None,
    )


def poisoned(cache):
    """NaN where a float can be NaN, 127 elsewhere; a scale for the whole cache stays."""
    return dataclasses.replace(
        cache,
        pages=jax.device_put(np.full(cache.pages.shape, 127, np.int8)),
        rope_pages=jax.device_put(np.full(cache.rope_pages.shape, np.nan, jnp.bfloat16)),
        scales=jax.device_put(np.full(cache.scales.shape, np.nan, np.float32))
        if cache.scales.ndim
        else cache.scales,
    )


def i32(*values):
    return np.array(values, np.int32)


def in_steps(kv, granularity):
    """(int8 steps [T, RANK], scale of each value [T, RANK]) in float64, by the definition."""
    latent = np.asarray(kv, np.float64)[:, :RANK]
    if granularity == "tensor":
        scale = np.full(latent.shape, SCALE)
    else:
        width = RANK if granularity == "token" else 128
        amax = np.abs(latent).reshape(len(latent), -1, width).max(-1)
        scale = np.repeat(np.where(amax > 0, amax, 1) / 127, width, axis=1)
    return np.clip(np.rint(latent / scale), -127, 127), scale


@pytest.mark.parametrize(
    ("page_size", "layout", "granularity"),
    [
        *itertools.product(PAGE_SIZES, ("ND", "NZ"), ["token"]),
        (16, "ND", "group"),
        (16, "NZ", "tensor"),
    ],
)
def test_ragged_chunks_then_decode(page_size, layout, granularity):
    """Every page holds its tokens' steps, scales and rope by the definition, and nothing else."""
    rng = np.random.default_rng([page_size, len(granularity)])
    max_pages = 2 * max(page_size, 32) // page_size
    cache = poisoned(create(3 * max_pages + 1, page_size, layout, granularity))
    steps = [[20, 0, 7], [2, 3, 30], [1, 1, 0]]
    tables = rng.permutation(3 * max_pages + 1)[: 3 * max_pages].reshape(3, -1).astype(np.int32)
    lengths, expected = np.zeros(3, np.int32), [np.zeros((0, WIDTH))] * 3
    for new in steps:
        kv = rng.standard_normal((3, 30, WIDTH)).astype(np.float32)
        cache = cache.append(jax.device_put(kv.copy()), tables, lengths, i32(*new))
        kv[..., RANK:] = kv[..., RANK:].astype(jnp.bfloat16)
        rows = kv.astype(np.float64)
        expected = [
            np.append(e, r[:n], axis=0) for e, r, n in zip(expected, rows, new, strict=True)
        ]
        lengths += i32(*new)

    gathered = np.asarray(cache.gather(tables, max_len=max_pages * page_size, seq_lens=lengths))
    assert gathered.dtype == jnp.float32 == cache.row_dtype
    written = np.zeros((cache.num_pages, page_size), bool)
    for request, rows in enumerate(expected):
        count = len(rows)
        values, scale = in_steps(rows, granularity)
        held = read_pages_float64(cache, tables[request], count)
        off = np.abs(held[:, :RANK] / scale - values)
        assert (off > 1e-3).mean() < 1e-4  # a tie may fall the other way in float32
        assert off.max(initial=0) < 1.001
        np.testing.assert_array_equal(held[:, RANK:], rows[:, RANK:])
        np.testing.assert_allclose(gathered[request, :count], held, rtol=1e-6)
        assert not gathered[request, count:].any()
        written[tables[request, np.arange(count) // page_size], np.arange(count) % page_size] = True
    rope = np.isnan(np.asarray(cache.rope_pages, np.float32))
    rope = (
        rope.transpose(0, 2, 1, 3).reshape(rope.shape[0], page_size, -1) if layout == "NZ" else rope
    )
    np.testing.assert_array_equal(rope.all(-1), ~written)


@pytest.mark.parametrize("granularity", quantize.GRANULARITIES)
def test_append_of_the_quantised_is_the_quantised_of_append(granularity):
    """Eagerly, under jit, token by token or at once, from float32 or bfloat16: the same bits."""
    kv = np.random.default_rng(0).standard_normal((2, 9, WIDTH)).astype(jnp.bfloat16)
    tables, zero = i32([3, GARBAGE], [1, GARBAGE]), i32(0, 0)
    latent = jnp.asarray(kv[..., :RANK])
    scales = SCALE if granularity == "tensor" else quantize.scales_of(latent, granularity)
    scales = jnp.asarray(scales, jnp.float32)
    wanted = quantize.quantize(latent, scales)

    at_once = create(granularity=granularity).append(kv, tables, zero)
    wide = create(granularity=granularity).append(kv.astype(np.float32), tables, zero)
    append = jax.jit(lambda cache: cache.append(kv, tables, zero), compiler_options=OPTIMISED)
    jitted = append(create(granularity=granularity))
    one_by_one = create(layout="NZ", granularity=granularity)
    for token in range(9):
        one_by_one = one_by_one.append(kv[:, token : token + 1], tables, zero + token)
    for cache in (at_once, wide, jitted, one_by_one):
        stored = stored_rows(cache, tables, np.arange(9)[None])
        np.testing.assert_array_equal(stored["pages"], wanted)
        np.testing.assert_array_equal(stored["scales"], scales)
        np.testing.assert_array_equal(stored["rope_pages"], kv[..., RANK:])
        np.testing.assert_array_equal(
            cache.gather(tables, max_len=9)[..., :RANK], quantize.dequantize(wanted, scales)
        )


@pytest.mark.parametrize(("layout", "granularity"), CASES)
def test_append_is_donated(layout, granularity):
    cache = create(layout=layout, granularity=granularity)
    before = [getattr(cache, name) for name in LEAVES]
    addresses = [array.unsafe_buffer_pointer() for array in before]
    cache = cache.append(jnp.ones((1, 1, WIDTH)), i32([7]), i32(0))
    assert all(array.is_deleted() for array in before)
    assert [getattr(cache, name).unsafe_buffer_pointer() for name in LEAVES] == addresses


def test_a_scale_may_serve_two_caches():
    scale = jnp.float32(0.5)
    options = {"dtype": "int8", "scale_granularity": "tensor", "scale": scale}
    first, second = (PagedKVCache.create(2, page_size=16, **options) for _ in range(2))
    first.append(jnp.ones((1, 1, 576)), i32([0]), i32(0))
    second = second.append(jnp.full((1, 1, 576), 100.0), i32([0]), i32(0))
    assert not scale.is_deleted()
    assert second.gather(i32([0]), max_len=1)[0, 0, 0] == 63.5  # saturated


def test_decode_loop_traces_once():
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def step(cache, kv, seq_lens):
        cache = cache.append(kv, tables, seq_lens)
        return cache, cache.gather(tables, max_len=48, seq_lens=seq_lens + 1)

    step = jax.jit(step, donate_argnums=0)
    tables, cache = i32([3, 1, 0]), create(4)
    kv = jnp.asarray(np.random.default_rng(1).standard_normal((40, 1, 1, WIDTH)), jnp.float32)
    for token in range(40):
        cache, rows = step(cache, kv[token], i32(token))
    error = np.linalg.norm(rows[0, :40] - kv[:, 0, 0]) / np.linalg.norm(kv)
    assert 1e-3 < error < 1e-2
    assert not rows[0, 40:].any()


def test_traced_appends_that_do_not_fit_write_nothing():
    cache = create(4)
    append = jax.jit(lambda cache, *args: cache.append(jnp.ones((3, 2, WIDTH)), *args))
    cache = append(cache, i32([0, 1], [2, 3], [-1, -1]), i32(3, 31, -1), i32(2, 2, 2))
    assert np.count_nonzero(cache.pages) == 2 * RANK
    assert np.count_nonzero(cache.scales) == 2
    assert np.count_nonzero(cache.rope_pages.astype(jnp.float32)) == 2 * ROPE


def test_describes_itself():
    sizes = {}
    for granularity in (None, *quantize.GRANULARITIES):
        scale = 0.1 if granularity == "tensor" else None
        cache = PagedKVCache.create(
            3, dtype="int8", scale_granularity=granularity, scale=scale, layout="NZ"
        )
        cache.check()
        assert cache.pages.shape == (3, 16, 64, 32)
        assert cache.rope_pages.shape == (3, 4, 64, 16)
        assert cache.rope_pages.dtype == jnp.bfloat16
        assert (cache.dtype, cache.latent_dim) == (jnp.int8, 576)
        assert cache.scale_granularity == granularity or granularity is None
        sizes[granularity] = (cache.bytes_per_token, cache.scales.shape)
    assert sizes == {
        None: (644, (3, 64)),
        "token": (644, (3, 64)),
        "group": (656, (3, 64, 4)),
        "tensor": (640, ()),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_granularity": "row"}, "scale_granularity must be one of token, group, tensor"),
        ({"scale_granularity": "tensor"}, "scale must be given with scale_granularity tensor"),
        ({"scale": 0.1}, "scale must be None with scale_granularity token"),
        ({"scale_granularity": "tensor", "scale": 0.0}, "scale must be positive and finite"),
        ({"scale_granularity": "tensor", "scale": np.nan}, "scale must be positive .* got nan"),
        ({"scale_granularity": "tensor", "scale": np.ones(2)}, "scale must be a number"),
        ({"scale_granularity": "tensor", "scale": 1e-60}, "scale must be positive .* got 1e-60"),
        ({"scale_granularity": "tensor", "scale": 1e-40}, "scale must be positive .* got 1e-40"),
        ({"scale_granularity": "tensor", "scale": 1e300}, "scale must be positive .* got 1e[+]300"),
        ({"scale_granularity": "tensor", "scale": 1e38}, "scale must be positive .* got 1e[+]38"),
        ({"scale_granularity": "tensor", "scale": np.int64(-3)}, "scale must be .* got -3"),
        ({"scale_granularity": ""}, "scale_granularity must be one of token, group, tensor"),
        ({"scale_granularity": "group", "kv_lora_rank": 96}, "kv_lora_rank must be .* of 128"),
        ({"kv_lora_rank": 48, "layout": "NZ"}, "kv_lora_rank must be a multiple of 32 .* got 48"),
        ({"rope_dim": 8, "layout": "NZ"}, "rope_dim must be a multiple of 16 .* got 8"),
        ({"dtype": "float16", "scale_granularity": "token"}, "scale_granularity is for dtype int8"),
        ({"dtype": "float16", "scale": 1.0}, "scale is for dtype int8, got dtype float16"),
    ],
)
def test_create_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PagedKVCache.create(1, **({"dtype": "int8"} | options))


@pytest.mark.parametrize("scale", ["1", True, 1j, np.bool_(1), b"1", 10**400, object()])
def test_a_scale_is_a_real_number(scale):
    with pytest.raises(TypeError, match="scale must be a real number, got"):
        PagedKVCache.create(1, dtype="int8", scale_granularity="tensor", scale=scale)


def test_scales_are_checked_as_they_are_stored():
    """The smallest and the largest, numpy's and JAX's; a traced one out of range becomes NaN."""

    def stored(scale):
        options = {"dtype": "int8", "kv_lora_rank": 1, "rope_dim": 1}
        return PagedKVCache.create(1, scale_granularity="tensor", scale=scale, **options).scales

    largest = np.nextafter(np.finfo(np.float32).max / np.float32(127), 0)
    assert np.isfinite(largest * np.float32(127))
    for scale in (2.0**-126, largest, np.float16(0.5), jnp.bfloat16(0.5), 3, np.uint8(3)):
        assert stored(scale).dtype == jnp.float32
        assert stored(scale) == np.float32(scale)
    traced = jax.jit(stored)
    assert [float(traced(x)) for x in (0.5, 3)] == [0.5, 3]
    assert np.isnan([traced(x) for x in (0.0, -1.0, np.nan, np.inf, 1e38)]).all()
    with pytest.raises(TypeError, match="scale must be a real number"):
        traced(True)


@pytest.mark.parametrize(("layout", "granularity"), CASES)
def test_what_is_not_finite_stays_visible(layout, granularity):
    """NaN or an infinity in a latent makes all of it NaN; other tokens keep their bits."""
    kv = np.array(np.random.default_rng(3).standard_normal((1, 16, WIDTH)), np.float32)
    tables, clean = i32([3]), create(layout=layout, granularity=granularity)
    clean = clean.append(kv, tables, i32(0)).gather(tables, max_len=16)
    bad = {2: (0, np.nan), 5: (RANK - 1, np.inf), 7: (130, -np.inf), 11: (RANK, np.nan)}
    for token, (column, value) in bad.items():
        kv[0, token, column] = value
    cache = create(layout=layout, granularity=granularity).append(kv, tables, i32(0))
    rows = np.asarray(cache.gather(tables, max_len=16))[0]
    good = np.setdiff1d(np.arange(16), list(bad))
    np.testing.assert_array_equal(rows[good], clean[0, good])
    for token, (column, _) in bad.items():
        assert np.isnan(rows[token, column:RANK]).all(), token
        assert np.isnan(rows[token]).any(), token

    if (layout, granularity) != ("ND", "token"):
        return  # attention reads it through the same rows
    q = jnp.ones((1, 16, 1, WIDTH), jnp.float32)  # token i sees keys up to i
    o, lse = paged_mla_attention(q, cache, tables, i32(16), softmax_scale=0.1, implementation="xla")
    assert np.isnan(lse[0, 2:]).all()
    assert np.isnan(o[0, 2:]).any(axis=-1).all()
    assert np.isfinite(lse[0, :2]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pages": [0]}, TypeError, "cache.pages must be an array, got "),
        ({"page_size": 0}, ValueError, "cache.page_size must be a positive integer, got 0"),
        ({"kv_lora_rank": 256.0}, TypeError, "cache.kv_lora_rank must be an integer, got 256.0"),
        ({"scales": None}, ValueError, "cache.scales must be an array where dtype is int8"),
        ({"rope_pages": None}, ValueError, "cache.rope_pages must be an array where .* int8"),
        (
            {"scales": np.ones((40, 8), np.float32)},
            ValueError,
            r"cache.scales must be \[40, 16\] \(token\) or \[40, 16, 2\] \(group\) or \[\] "
            r"\(tensor\), got shape \[40, 8\]",
        ),
        ({"scales": np.ones(40, np.float32)}, ValueError, r"cache.scales must be .* shape \[40\]"),
        ({"scales": np.ones((40, 16))}, TypeError, "cache.scales must be float32, got float64"),
        (
            {"rope_pages": np.ones((40, 16, ROPE), np.float16)},
            TypeError,
            "cache.rope_pages must be bfloat16, got float16",
        ),
        (
            {"rope_pages": jnp.ones((39, 16, ROPE), jnp.bfloat16)},
            ValueError,
            r"cache.rope_pages must be pages of 16 tokens of 16 values in ND = \[40, 16, 16\]",
        ),
        ({"pages": np.ones((40, 16, WIDTH), np.float32)}, ValueError, "rope_pages must be None"),
        ({"pages": np.ones((40, 16, RANK), np.uint8)}, ValueError, "cache.dtype must be one of"),
        ({"page_size": 64}, ValueError, "cache.pages must be pages of 64 tokens of 256 values"),
    ],
)
def test_check_names_the_array(change, error, message):
    cache = dataclasses.replace(create(), **change)
    with pytest.raises(error, match=message):
        cache.append(jnp.ones((1, 1, WIDTH)), i32([7]), i32(0))


def test_append_refuses_int8_rows():
    with pytest.raises(TypeError, match="kv must be an array of float32, bfloat16, float16, got"):
        create().append(jnp.ones((1, 1, WIDTH), jnp.int8), i32([7]), i32(0))
