"""The programs that read rows of a cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mla_jax.cache.layout import read
from mla_jax.sharding.axes import dims_of, on_auto_axes, spec_of_dims


def _rows_specs(
    cache: Any, block_tables: jax.Array, positions: jax.Array, requests: jax.Array
) -> dict[str, PartitionSpec]:
    """Returns the PartitionSpecs of `stored_rows`: by request, as requests or tables are."""
    by_request = requests if any(dims_of(requests)) else block_tables
    split = spec_of_dims(dims_of(by_request)[0])
    return {name: split if x.ndim else PartitionSpec() for name, x in cache.arrays().items()}


@on_auto_axes(_rows_specs)
def stored_rows(
    cache: Any, block_tables: jax.Array, positions: jax.Array, requests: jax.Array
) -> dict[str, jax.Array]:
    """Returns what `PagedKVCache.stored_rows` does, for arguments that have been checked."""
    page, offset = places(cache, block_tables, positions, requests)
    return {name: read(x, page, offset) for name, x in cache.arrays().items()}


def places(
    cache: Any, block_tables: jax.Array, positions: jax.Array, requests: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns pages and offsets in them, [N, T], of `stored_rows`; clipped to valid ones."""
    entry = jnp.clip(positions // cache.page_size, 0, block_tables.shape[1] - 1)
    page = block_tables.at[requests[:, None], entry].get(mode="promise_in_bounds")
    page = jnp.clip(page, 0, cache.num_pages - 1)
    if cache.first_page is not None:
        page += jnp.maximum(cache.first_page, 0)
    return page, positions % cache.page_size


@functools.partial(jax.jit, static_argnames="max_len")
def gather(
    cache: Any, block_tables: jax.Array, seq_lens: jax.Array | None, *, max_len: int
) -> jax.Array:
    """Returns what `PagedKVCache.gather` does, for arguments that have been checked."""
    positions = jnp.arange(max_len, dtype=jnp.int32)[None]
    rows = cache.rows(block_tables, positions)
    if seq_lens is None:
        return rows
    return jnp.where((positions < seq_lens[:, None])[..., None], rows, 0)
