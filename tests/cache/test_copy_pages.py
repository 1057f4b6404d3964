"""PagedKVCache.copy_pages against numpy: every array and layout, padding, donation, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.cache import PagedKVCache

PAGES = 64


def i32(*values):
    return np.array(values, np.int32)


def random_cache(dtype="float32", layout="ND", granularity=None):
    """A cache with random values in every array but the scale of "tensor"."""
    rng = np.random.default_rng()
    cache = PagedKVCache.create(
        PAGES,
        page_size=16,
        kv_lora_rank=128,
        rope_dim=16,
        dtype=dtype,
        layout=layout,
        scale_granularity=granularity,
        scale=0.5 if granularity == "tensor" else None,
    )
    drawn = {
        name: jax.device_put(rng.integers(-99, 99, x.shape).astype(x.dtype))
        for name, x in cache.arrays().items()
        if x.ndim
    }
    return dataclasses.replace(cache, **drawn)


@pytest.mark.parametrize(
    ("dtype", "layout", "granularity"),
    [
        ("float32", "ND", None),
        ("bfloat16", "NZ", None),
        ("int8", "NZ", "token"),
        ("int8", "ND", "tensor"),
    ],
)
def test_copies_whole_pages_of_every_array(dtype, layout, granularity):
    """A chain, a page that is copied twice, and padding; no other page changes."""
    cache = random_cache(dtype, layout, granularity)
    before = {name: np.array(x) for name, x in cache.arrays().items()}
    cache = cache.copy_pages(i32(3, 5, 3, -1), i32(5, 7, 63, -1))
    for name, x in cache.arrays().items():
        wanted = before[name].copy()
        if x.ndim:
            wanted[[5, 7, 63]] = before[name][[3, 5, 3]]
        np.testing.assert_array_equal(np.asarray(x), wanted)


def test_donated_or_copied():
    cache = random_cache()
    pages = np.array(cache.pages)
    kept = cache.copy_pages(i32(0), i32(1), donate=False)
    np.testing.assert_array_equal(np.asarray(cache.pages), pages)
    np.testing.assert_array_equal(np.asarray(kept.pages)[1], pages[0])
    # JAX may share the memory of a numpy array, and then it does not reuse it. A result is its own.
    cache = cache.copy_pages(i32(0), i32(1))
    old, address = cache.pages, cache.pages.unsafe_buffer_pointer()
    cache = cache.copy_pages(i32(0), i32(2))
    assert old.is_deleted()
    assert cache.pages.unsafe_buffer_pointer() == address


def test_under_jit_pages_that_are_not_are_skipped_and_nothing_else_is_copied():
    cache = random_cache()
    program = jax.jit(PagedKVCache.copy_pages, donate_argnums=0)
    sources, targets = i32(2, -1, 64, 4, 9, 2**31 - 1), i32(1, 5, 6, -1, 64, 8)
    compiled = program.lower(cache, sources, targets).compile()
    page = cache.pages[0].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < (len(sources) + 1) * page
    before = np.array(cache.pages)
    got = np.asarray(compiled(cache, sources, targets).pages)
    before[1] = before[2]
    np.testing.assert_array_equal(got, before)


@pytest.mark.parametrize(
    ("sources", "targets", "error", "message"),
    [
        (i32(64), i32(1), ValueError, r"sources\[0\] must be a page in 0 .. 63, .* got 64"),
        (i32(0, 1), i32(2, -1), ValueError, r"targets\[1\] must be a page in 0 .. 63, .* got -1"),
        (i32(-1), i32(1), ValueError, r"sources\[0\] must be a page"),
        (i32(0, 1), i32(2, 2), ValueError, "targets must have every page at most once, got page 2"),
        (i32(0, 1), i32(2), ValueError, r"targets must be \[N\].* = \[2\], got shape \[1\]"),
        (i32(0)[None], i32(2), ValueError, r"sources must be \[N\]"),
        (np.zeros(1), i32(2), TypeError, "sources must be an int32 array, got float64"),
        ([0], i32(2), TypeError, "sources must be an int32 array, got list"),
    ],
)
def test_refuses_before_it_copies(sources, targets, error, message):
    cache = PagedKVCache.create(PAGES, page_size=1, kv_lora_rank=8, rope_dim=8)
    with pytest.raises(error, match=message):
        cache.copy_pages(sources, targets)
    with pytest.raises(TypeError, match="donate must be True or False"):
        cache.copy_pages(i32(0), i32(1), donate=None)
    assert not jnp.any(cache.pages)  # and it is not deleted
