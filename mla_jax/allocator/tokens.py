"""The keys of full pages, by their tokens and those of the pages before.

A key is the SHA-256 of the key of the page before and of the page's token ids. Two different
prefixes therefore have different keys, as far as anyone can find out.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

FIRST = b""  # the key before the first page


def require_tokens(tokens: Any) -> int:
    """Returns the number of tokens; raises TypeError unless `tokens` is a sequence or [T] array."""
    is_array = isinstance(tokens, np.ndarray) and tokens.ndim == 1
    if not is_array and (not isinstance(tokens, Sequence) or isinstance(tokens, str | bytes)):
        raise TypeError(
            "tokens must be a sequence of token ids or an array [T], "
            f"got {tokens!r} of type {type(tokens).__name__}"
        )
    return len(tokens)


def page_keys(before: bytes, tokens: Any, first: int, last: int, page_size: int) -> list[bytes]:
    """Returns the keys of pages first .. last - 1 of a request.

    Args:
        before: the key of page first - 1, or FIRST.
        tokens: all token ids of the request; those of other pages are not read.
        first: a page's index in the request.
        last: at least first.
        page_size: tokens per page.

    Raises TypeError for ids that are not integers, and ValueError for negative ones.
    """
    if first == last:
        return []
    ids = np.asarray(tokens[first * page_size : last * page_size])
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got an array {list(ids.shape)} of {ids.dtype}")
    if ids.min() < 0:
        raise ValueError(f"tokens must be ids of at least 0, got {ids.min()}")
    data = ids.astype("<i8").tobytes()
    size = 8 * page_size
    keys = []
    for start in range(0, len(data), size):
        before = hashlib.sha256(before + data[start : start + size]).digest()
        keys.append(before)
    return keys
