"""Checks of what the allocator gets."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mla_jax.cache import PagedKVCache


def require_hashable(request_id: Any) -> None:
    """Raises TypeError unless a request id is hashable."""
    try:
        hash(request_id)
    except TypeError as error:
        raise TypeError(
            f"request_id must be hashable, got {request_id!r} of type {type(request_id).__name__}"
        ) from error


def is_sequence(value: Any) -> bool:
    """Returns whether the value is a sequence of ids; neither a str nor a set is one."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def require_cache(cache: Any, page_size: int, num_pages: int) -> None:
    """Raises TypeError or ValueError unless a cache fits an allocator; None does."""
    if cache is None:
        return
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache must be a PagedKVCache or None, got {type(cache).__name__}")
    if cache.page_size != page_size:
        raise ValueError(
            f"page_size must be that of the cache = {cache.page_size}, got {page_size}"
        )
    if cache.num_pages < num_pages:
        raise ValueError(
            f"num_pages must be at most the cache's {cache.num_pages}, got {num_pages}"
        )
