"""The layers of a cache: which pages of the pool belong to a layer.

A cache of several layers is one pool. Page p of layer i is page i * num_pages + p of the arrays,
where num_pages counts the pages of one layer. A block table has page numbers of one layer. Each is
checked against num_pages before the layer's first page is added to it, so that a wrong number
never leads to a page of another layer.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks


def first_page_of(index: Any, num_layers: int, num_pages: int) -> jax.Array | None:
    """Returns the first page of layer `index`, [] int32; -1 for a traced index out of range.

    Returns None where there is one layer, so that nothing is added to its pages.

    Raises TypeError for an index that is not an integer, and ValueError for one out of range that
    is not traced.
    """
    if np.shape(index) != ():
        raise ValueError(f"index must be one integer, got shape {list(np.shape(index))}")
    if checks.is_concrete(index):
        if isinstance(index, jax.Array | np.ndarray):
            index = np.asarray(index)[()]
        index = checks.require_int("index", index, 0, num_layers - 1)
        return None if num_layers == 1 else jnp.asarray(index * num_pages, jnp.int32)
    if not jnp.issubdtype(index.dtype, np.integer):
        raise TypeError(f"index must be an integer, got one of dtype {index.dtype}")
    if num_layers == 1:
        return None
    if index.dtype.itemsize < 4:
        index = index.astype(jnp.int32)
    exists = (index >= 0) & (index < num_layers)
    return jnp.where(exists, index.astype(jnp.int32) * np.int32(num_pages), np.int32(-1))


def check_layers(cache: Any) -> None:
    """Raises TypeError or ValueError unless the layers of a cache fit its pages."""
    layers = checks.require_positive("cache.num_layers", cache.num_layers)
    if cache.pages.shape[0] % layers:
        raise ValueError(
            f"cache.pages must have equally many pages for each of {layers} layers, "
            f"got {cache.pages.shape[0]}"
        )
    if cache.first_page is None:
        return
    checks.require_array("cache.first_page", cache.first_page)
    checks.require_shape("cache.first_page", cache.first_page, "[]")
    checks.require_int32("cache.first_page", cache.first_page)
    if layers == 1:
        raise ValueError("cache.first_page must be None in a cache of one layer, got an array")
    if checks.is_concrete(cache.first_page):
        first, pages = int(cache.first_page), cache.num_pages
        if first % pages or not 0 <= first < layers * pages:
            raise ValueError(
                f"cache.first_page must be that of one of {layers} layers of {pages} pages, as "
                f"cache.layer(i) sets it, got {first}"
            )


def require_one_layer(cache: Any) -> None:
    """Raises ValueError for a cache of several layers unless it is a view of one of them."""
    if cache.num_layers > 1 and cache.first_page is None:
        raise ValueError(
            f"cache must be one layer, got all {cache.num_layers} layers of a pool: "
            "pass cache.layer(i)"
        )


def merged(cache: Any) -> Any:
    """Returns the whole pool as a cache of one layer, without a copy; see `pool_tables`."""
    if cache.num_layers == 1:
        return cache
    return dataclasses.replace(cache, num_layers=1, first_page=None)


def pool_tables(cache: Any, block_tables: Any) -> Any:
    """Returns the block tables of a layer as those of `merged`: [B, max_pages] int32.

    Numbers that are not pages of the layer become -1. A cache of one layer has its block tables.
    """
    if cache.first_page is None:
        return block_tables
    return _pool_tables(block_tables, cache.first_page, num_pages=cache.num_pages)


@functools.partial(jax.jit, static_argnames="num_pages")
def _pool_tables(block_tables: jax.Array, first_page: jax.Array, *, num_pages: int) -> jax.Array:
    return page_in_pool(block_tables, first_page, num_pages, otherwise=-1)


def page_in_pool(
    page: jax.Array, first_page: jax.Array, num_pages: int, *, otherwise: int
) -> jax.Array:
    """Returns pages of a layer as pages of the pool; `otherwise` where the layer lacks them."""
    exists = (page >= 0) & (page < num_pages) & (first_page >= 0)
    return jnp.where(exists, page + first_page, np.int32(otherwise))
