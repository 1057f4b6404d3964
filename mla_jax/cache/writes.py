"""The programs that write to a cache: new rows, and copies of pages.

Each is compiled twice: it writes in place to a donated cache, or to a copy.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.cache.arguments import INT32
from mla_jax.cache.layers import page_in_pool
from mla_jax.cache.layout import write
from mla_jax.sharding.axes import dims_of, on_auto_axes, spec_of_dims
from mla_jax.sharding.key_shards import KeyShard


def _specs_of_cache(cache: Any, *_: Any) -> Any:
    return jax.tree.map(lambda array: spec_of_dims(*dims_of(array)), cache)


@on_auto_axes(_specs_of_cache)
@jax.named_scope("mla_append")
def _append(
    cache: Any,
    first_page: jax.Array | None,
    kv: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array | None,
    *,
    kv_axis: str | None,
) -> Any:
    """Computes `PagedKVCache.append` for the layer of a pool that begins with `first_page`."""
    batch, count = kv.shape[:2]
    max_pages = block_tables.shape[1]
    if query_lens is None:
        query_lens = jnp.full(batch, count, jnp.int32)
    token = jnp.arange(count, dtype=jnp.int32)
    shard = None if kv_axis is None else KeyShard.here(kv_axis, cache.page_size)
    capacity = max_pages * cache.page_size * (1 if shard is None else shard.size)
    room = min(capacity, int(INT32.max)) - jnp.maximum(seq_lens, 0)
    fits = (seq_lens >= 0) & (query_lens <= jnp.minimum(room, count))
    written = (token < query_lens[:, None]) & fits[:, None]
    positions = seq_lens[:, None] + token
    if shard is not None:
        here, positions = shard.places(positions)
        written &= here
    entry = jnp.clip(positions // cache.page_size, 0, max_pages - 1)
    page = jnp.take_along_axis(block_tables, entry, axis=1)
    # A page past the end of the cache drops the row.
    end = cache.pages.shape[0]
    if first_page is not None:
        page = page_in_pool(page, first_page, cache.num_pages, otherwise=end)
    page = jnp.where(written & (page >= 0), page, end)
    offset = positions % cache.page_size
    arrays: dict[str, Any] = cache.arrays()
    for name, rows in cache._encode(kv).items():
        arrays[name] = write(arrays[name], page, offset, rows)
    return dataclasses.replace(cache, **arrays)


@on_auto_axes(_specs_of_cache)
def _copy_pages(cache: Any, sources: jax.Array, targets: jax.Array) -> Any:
    exist = (sources >= 0) & (sources < cache.num_pages) & (targets >= 0)
    # A target past the end of the cache drops the page.
    end = cache.pages.shape[0]
    targets = jnp.where(exist, targets, end)
    sources = jnp.where(exist, sources, 0)
    if cache.num_layers > 1:
        exist &= targets < cache.num_pages
        first = jnp.arange(0, end, cache.num_pages, dtype=jnp.int32)[:, None]
        sources = (sources + first).ravel()
        targets = jnp.where(exist, targets + first, end).ravel()

    def copy(array: jax.Array) -> jax.Array:
        pages = array.at[sources].get(mode="promise_in_bounds")
        return array.at[targets].set(pages, mode="drop")

    return dataclasses.replace(
        cache, **{name: copy(x) for name, x in cache.arrays().items() if x.ndim}
    )


append_in_place = jax.jit(_append, donate_argnums=0, static_argnames="kv_axis")
append_to_copy = jax.jit(_append, static_argnames="kv_axis")
copy_pages_in_place = jax.jit(_copy_pages, donate_argnums=0)
copy_pages_to_copy = jax.jit(_copy_pages)
