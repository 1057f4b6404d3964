"""The forms in which a case gives its arrays to the op: packed tokens, q in two arrays, a pool."""

from typing import Any

import jax.numpy as jnp

from mla_jax import PagedKVCache

from .cases import Case

GARBAGE = 113  # in int8 pages of other layers


def cache_of(case: Case, arrays: dict[str, Any], layer: Any) -> PagedKVCache:
    """Returns the cache, or this layer of a pool whose other layers hold NaN."""
    geometry = case.rank, case.rope, case.page_size, case.layout
    if case.num_layers > 1:
        arrays = {name: _in_pool(case, x, layer) for name, x in arrays.items()}
    cache = PagedKVCache(
        arrays["pages"], *geometry, rope_pages=arrays.get("rope_pages"),
        scales=arrays.get("scales"), num_layers=case.num_layers,
    )  # fmt: skip
    return cache.layer(layer) if case.num_layers > 1 else cache


def _in_pool(case: Case, pages: Any, layer: Any) -> Any:
    garbage = GARBAGE if pages.dtype == jnp.int8 else jnp.nan
    pool = jnp.full((case.num_layers, *pages.shape), garbage, pages.dtype)
    return pool.at[layer].set(pages).reshape(-1, *pages.shape[1:])


def parts(case: Case, q: Any) -> Any:
    """Returns q, or its latent and its rope part as two arrays."""
    return (q[..., : case.rank], q[..., case.rank :]) if case.q_in_parts else q


def packed(case: Case, q: Any, query_lens: Any) -> tuple[Any, dict[str, Any]]:
    """Returns q [T, H, D] of q [B, S, H, D], with NaN behind the last token, and its bounds."""
    places, bounds = _places(case, query_lens)
    rows = jnp.full((case.batch * case.tokens, *q.shape[2:]), jnp.nan, q.dtype)
    return rows.at[places].set(q, mode="drop"), {"cu_q_lens": bounds}


def unpacked(case: Case, results: dict[str, Any], query_lens: Any) -> dict[str, Any]:
    """Returns results [B, S, ...] of packed ones, all NaN if what is behind the last is not empty.

    Rows past a request's tokens are what the op returns for rows without a key.
    """
    places, bounds = _places(case, query_lens)
    found = {}
    for name, x in results.items():
        empty = 0 if name == "o" else -jnp.inf
        behind = jnp.arange(len(x)) >= bounds[-1]
        is_empty = (x == empty).reshape(len(x), -1).all(axis=1)
        rows = x.at[places].get(mode="fill", fill_value=empty)
        found[name] = jnp.where((is_empty | ~behind).all(), rows, jnp.nan)
    return found


def _places(case: Case, query_lens: Any) -> tuple[Any, Any]:
    """Returns where the packed array has each token, [B, S], and cu_q_lens."""
    bounds = jnp.append(0, jnp.cumsum(query_lens)).astype(jnp.int32)
    token = jnp.arange(case.tokens)
    places = jnp.where(
        token < query_lens[:, None], bounds[:-1, None] + token, jnp.iinfo("int32").max
    )
    return places, bounds
