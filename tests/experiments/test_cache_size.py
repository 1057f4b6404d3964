"""The cache-size model against the numbers of the papers, worked out by hand."""

import math

import numpy as np
import pytest

from mla_jax.cache import PagedKVCache
from mla_jax.cache_size import (
    BITS_PER_VALUE,
    DEEPSEEK_67B,
    DEEPSEEK_V2,
    CacheSize,
    Machine,
    decompose,
    largest_batch,
    schemes,
    throughput_ceiling,
)
from mla_jax.config import MLAConfig


@pytest.mark.parametrize(
    ("scheme", "values"), [("MHA", 2 * 128 * 128), ("GQA-8", 2048), ("MQA", 256), ("MLA", 576)]
)
@pytest.mark.parametrize("dtype", BITS_PER_VALUE)
def test_bytes_of_each_scheme_and_dtype(scheme, values, dtype):
    config = MLAConfig.preset("deepseek-v3")
    sizes = {size.scheme: size for size in schemes(config, bits=BITS_PER_VALUE[dtype])}
    assert sizes[scheme].bytes_per_token_and_layer == values * BITS_PER_VALUE[dtype] / 8
    assert sizes[scheme].bytes_per_token == 61 * values * BITS_PER_VALUE[dtype] / 8


def test_the_quoted_reduction_is_its_parts():
    assert DEEPSEEK_67B.bytes_per_token == 389_120
    assert DEEPSEEK_V2.bytes_per_token == 25_920
    assert round(DEEPSEEK_V2.reduction_from(DEEPSEEK_67B), 3) == 0.933

    attention, depth, bits = decompose(DEEPSEEK_67B, DEEPSEEK_V2)
    assert attention.factor == 2048 / 576
    assert depth.factor == 95 / 60
    assert round(depth.reduction, 3) == 0.822  # MLA and depth at bf16
    assert depth.bytes_per_token == pytest.approx(60 * 576 * 2)
    assert bits.factor == 16 / 6
    assert bits.bytes_per_token == pytest.approx(25_920)
    assert bits.reduction == pytest.approx(DEEPSEEK_V2.reduction_from(DEEPSEEK_67B))
    assert math.fsum(part.share for part in (attention, depth, bits)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("granularity", "expected"), [("token", 644), ("group", 656), ("tensor", 640)]
)
def test_int8_is_what_the_cache_takes(granularity, expected):
    config = MLAConfig.preset("deepseek-v3")
    size = CacheSize.mla_int8(config, scale_granularity=granularity)
    scale = 1.0 if granularity == "tensor" else None
    cache = PagedKVCache.create(2, dtype="int8", scale_granularity=granularity, scale=scale)
    assert size.bytes_per_token_and_layer == pytest.approx(expected)
    assert cache.bytes_per_token == expected
    assert size.bytes_per_token == pytest.approx(61 * expected)


def test_nothing_to_decompose():
    with pytest.raises(ValueError, match="after must differ"):
        decompose(DEEPSEEK_67B, DEEPSEEK_67B)


def test_largest_batch_counts_whole_requests():
    cache = CacheSize.mqa(64, bits=8)  # 128 bytes a token
    at = {"weights": 1000, "tokens_per_request": 10}
    assert largest_batch(cache, memory=1000 + 2 * 1280, **at) == 2
    assert largest_batch(cache, memory=1000 + 2 * 1280 - 1, **at) == 1
    assert largest_batch(cache, memory=1001, **at) == 0


def test_throughput_ceiling_of_a_full_memory_is_the_ratio_of_the_batches():
    """Whatever fills the memory is read once a step, so only the number of requests counts."""
    at = {"weights": 100e9, "tokens_per_request": 1000}
    ceilings, batches = [], []
    for cache in (DEEPSEEK_67B, DEEPSEEK_V2):
        batch = largest_batch(cache, memory=640e9, **at)
        batches.append(batch)
        ceilings.append(throughput_ceiling(cache, batch=batch, bandwidth=1e12, **at))
    assert ceilings[1] / ceilings[0] == pytest.approx(batches[1] / batches[0], rel=1e-2)
    assert throughput_ceiling(DEEPSEEK_V2, batch=0, bandwidth=1e12, **at) == 0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: CacheSize("MHA", 0), "values"),
        (lambda: CacheSize("MHA", 1, bits=-6), "bits"),
        (lambda: CacheSize("MHA", 1, layers=0), "layers"),
        (
            lambda: CacheSize.mla_int8(MLAConfig.preset("deepseek-v3"), scale_granularity="row"),
            "scale_granularity",
        ),
        (lambda: Machine("none", memory=math.nan, bandwidth=1), "memory"),
        (lambda: largest_batch(DEEPSEEK_V2, memory=1, weights=1, tokens_per_request=1), "weights"),
        (
            lambda: largest_batch(DEEPSEEK_V2, memory=2, weights=1, tokens_per_request=0),
            "tokens_per_request",
        ),
        (
            lambda: throughput_ceiling(
                DEEPSEEK_V2, batch=1, weights=1, tokens_per_request=1, bandwidth=0
            ),
            "bandwidth",
        ),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=f"^{named} must be"):
        call()


V3 = MLAConfig.preset("deepseek-v3")
SERVED = {"batch": 1, "weights": 1, "tokens_per_request": 1, "bandwidth": 1}
HELD = {"memory": 9, "weights": 1, "tokens_per_request": 1}


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: CacheSize.mla(V3, layers=0), ValueError, "layers"),
        (lambda: CacheSize.mla_int8(V3, layers=0), ValueError, "layers"),
        (lambda: CacheSize.mla(V3, layers=1.5), TypeError, "layers"),
        (lambda: CacheSize.mla("deepseek-v3"), TypeError, "config"),
        (lambda: CacheSize.mla_int8(None), TypeError, "config"),
        (lambda: schemes({}), TypeError, "config"),
        (lambda: schemes(V3, gqa_heads=0), ValueError, "gqa_heads"),
        (lambda: schemes(V3, bits="16"), TypeError, "bits"),
        (lambda: CacheSize(3, 1), TypeError, "scheme"),
        (lambda: CacheSize("MHA", 1.5), TypeError, "values"),
        (lambda: CacheSize("MHA", True), TypeError, "values"),
        (lambda: CacheSize("MHA", 1, bits=math.inf), ValueError, "bits"),
        (lambda: CacheSize.mha(-8, -128), ValueError, "num_heads"),
        (lambda: CacheSize.mha(8, 1.0), TypeError, "head_dim"),
        (lambda: CacheSize.gqa(0, 128), ValueError, "num_kv_heads"),
        (lambda: CacheSize.mqa(None), TypeError, "head_dim"),
        (lambda: DEEPSEEK_V2.reduction_from(3), TypeError, "other"),
        (lambda: decompose(3, DEEPSEEK_V2), TypeError, "before"),
        (lambda: decompose(DEEPSEEK_V2, None), TypeError, "after"),
        (lambda: Machine(None, 1, 1), TypeError, "name"),
        (lambda: Machine("none", "1", 1), TypeError, "memory"),
        (lambda: Machine("none", 1, True), TypeError, "bandwidth"),
        (lambda: largest_batch(576, **HELD), TypeError, "cache"),
        (lambda: largest_batch(DEEPSEEK_V2, **HELD | {"memory": math.inf}), ValueError, "memory"),
        (lambda: largest_batch(DEEPSEEK_V2, **HELD | {"weights": "1"}), TypeError, "weights"),
        (lambda: largest_batch(DEEPSEEK_V2, **HELD | {"weights": math.nan}), ValueError, "weights"),
        (lambda: throughput_ceiling(576, **SERVED), TypeError, "cache"),
        (lambda: throughput_ceiling(DEEPSEEK_V2, **SERVED | {"batch": -5}), ValueError, "batch"),
        (lambda: throughput_ceiling(DEEPSEEK_V2, **SERVED | {"batch": 1.5}), TypeError, "batch"),
        (
            lambda: throughput_ceiling(DEEPSEEK_V2, **SERVED | {"batch": math.nan}),
            TypeError,
            "batch",
        ),
        (
            lambda: throughput_ceiling(DEEPSEEK_V2, **SERVED | {"weights": -1}),
            ValueError,
            "weights",
        ),
        (
            lambda: throughput_ceiling(DEEPSEEK_V2, **SERVED | {"tokens_per_request": math.nan}),
            ValueError,
            "tokens_per_request",
        ),
    ],
)
def test_wrong_types_and_ranges_are_named(call, error, named):
    with pytest.raises(error, match=f"^{named} must be"):
        call()


def test_numpy_integers_count_as_what_they_are():
    narrow = CacheSize.mha(np.uint8(128), np.uint8(128), bits=np.uint8(16), layers=np.uint8(61))
    assert narrow == CacheSize.mha(128, 128, layers=61)
    assert {type(narrow.values), type(narrow.bits), type(narrow.layers)} == {int}
    assert narrow.bytes_per_token == 61 * 2 * 128 * 128 * 2
    at = {"weights": np.uint8(200), "tokens_per_request": np.uint8(200)}
    of = CacheSize.mqa(np.uint8(200), bits=8)
    assert largest_batch(of, memory=np.uint32(200 + 80_000 * 3), **at) == 3
    assert throughput_ceiling(of, batch=np.uint8(200), bandwidth=8e4, **at) == pytest.approx(
        200 * 8e4 / (200 + 200 * 80_000)
    )
