"""Checks of what the cache's methods get."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks

DTYPES = (*checks.FLOAT_DTYPES, "int8")
INT32 = np.iinfo(np.int32)


def checked_dtype(dtype: Any) -> Any:
    """Returns the np.dtype of a cache; raises TypeError or ValueError unless it is supported."""
    if dtype is None:
        raise TypeError("dtype must be a dtype, got None")
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        if isinstance(dtype, str):
            checks.require_one_of("dtype", dtype, DTYPES)
        raise TypeError(f"dtype must be a dtype, got {dtype!r}") from error
    checks.require_one_of("dtype", dtype.name, DTYPES)
    return dtype


def checked_positions(positions: Any, count: int) -> jax.Array:
    """Returns positions [count, T] or [1, T] as int32, saturated."""
    checks.require_array("positions", positions)
    if not jnp.issubdtype(positions.dtype, np.integer):
        raise TypeError(f"positions must be of an integer dtype, got {positions.dtype}")
    rows = 1 if np.shape(positions)[:1] == (1,) else count
    checks.require_shape("positions", positions, "[N, T] or [1, T]", rows, None)
    if positions.dtype != np.int32:
        own = jnp.iinfo(positions.dtype)
        low, high = max(own.min, INT32.min), min(own.max, INT32.max)
        # JAX would cut off the upper bits of numpy's wider integers.
        clip = np.clip if isinstance(positions, np.ndarray) else jnp.clip
        positions = clip(positions, low, high).astype(np.int32)
    return jnp.asarray(checks.snapshot(positions))


def require_new_tokens(
    count: int,
    block_tables: Any,
    seq_lens: Any,
    query_lens: Any,
    page_size: int,
    num_pages: int,
) -> None:
    """Raises ValueError unless every new token of concrete arguments has a place of its own.

    count: tokens per request in kv; the other arguments are those of `append` and of the cache.
    """
    before = np.asarray(seq_lens).astype(np.int64)
    new = np.full(len(before), count) if query_lens is None else np.asarray(query_lens)
    for request in np.flatnonzero((new < 0) | (new > count)):
        raise ValueError(
            f"query_lens[{request}] must be in 0 .. {count} (kv has {count} tokens per request), "
            f"got {new[request]}"
        )
    for request in np.flatnonzero(before < 0):
        raise ValueError(f"seq_lens[{request}] must be at least 0, got {before[request]}")
    checks.require_pages("seq_lens + query_lens", before + new, block_tables, page_size, num_pages)
    _require_own_places(np.asarray(block_tables), before, new, page_size)


def require_copies(sources: Any, targets: Any, num_pages: int) -> None:
    """Raises TypeError or ValueError unless pages [N] can be copied to pages [N].

    Values that are not traced must be pages of the cache, or -1 in both, and each target at most
    once.
    """
    checks.require_shape("sources", sources, "[N]", None)
    checks.require_shape("targets", targets, "[N], as sources is,", len(sources))
    for name, pages in {"sources": sources, "targets": targets}.items():
        checks.require_int32(name, pages)
    if not checks.is_concrete(sources, targets):
        return
    pairs = {"sources": np.asarray(sources), "targets": np.asarray(targets)}
    is_pair = (pairs["sources"] != -1) | (pairs["targets"] != -1)
    for name, pages in pairs.items():
        for at in np.flatnonzero(is_pair & ((pages < 0) | (pages >= num_pages))):
            raise ValueError(
                f"{name}[{at}] must be a page in 0 .. {num_pages - 1}, or -1 in a pair of -1, "
                f"got {pages[at]}"
            )
    targets, count = np.unique(pairs["targets"][is_pair], return_counts=True)
    for page in targets[count > 1]:
        raise ValueError(f"targets must have every page at most once, got page {page} again")


def _require_own_places(
    tables: np.ndarray, before: np.ndarray, new: np.ndarray, page_size: int
) -> None:
    """Raises ValueError if two of the new tokens would be written to the same row."""
    request = np.repeat(np.arange(len(new)), new)
    start = np.repeat(before - (np.cumsum(new) - new), new)
    position = start + np.arange(len(request))
    page = tables[request, position // page_size]
    place = page.astype(np.int64) * page_size + position % page_size
    places, count = np.unique(place, return_counts=True)
    for twice in places[count > 1]:
        raise ValueError(
            f"block_tables must give every new token a place of its own, got page "
            f"{twice // page_size} for requests {request[place == twice].tolist()}"
        )
