"""The keys of full pages, by their tokens and those of the pages before.

A key is the SHA-256 of the key of the page before and of the page's token ids. Two different
prefixes therefore have different keys, as far as anyone can find out.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

FIRST = b""  # the key before the first page


def token_ids(tokens: Any) -> np.ndarray:
    """Returns token ids as an array [T] of integers, in time linear in T.

    Raises TypeError unless `tokens` is a sequence of integers or an [T] array of them, and
    ValueError for a negative one.
    """
    is_array = isinstance(tokens, np.ndarray) and tokens.ndim == 1
    if not is_array and (not isinstance(tokens, Sequence) or isinstance(tokens, str | bytes)):
        raise TypeError(
            "tokens must be a sequence of token ids or an array [T], "
            f"got {tokens!r} of type {type(tokens).__name__}"
        )
    if not len(tokens):
        return np.zeros(0, np.int64)
    try:
        ids = np.asarray(tokens)
    except ValueError:  # sequences of several lengths
        ids = np.empty(len(tokens), object)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got an array {list(ids.shape)} of {ids.dtype}")
    if ids.min() < 0:
        raise ValueError(f"tokens must be ids of at least 0, got {ids.min()}")
    return ids


def page_keys(
    before: bytes, tokens: np.ndarray, first: int, last: int, page_size: int
) -> list[bytes]:
    """Returns the keys of pages first .. last - 1 of a request.

    Args:
        before: the key of page first - 1, or FIRST.
        tokens: all token ids of the request, as `token_ids` returns them.
        first: a page's index in the request.
        last: at least first.
        page_size: tokens per page.
    """
    data = tokens[first * page_size : last * page_size].astype("<i8").tobytes()
    size = 8 * page_size
    keys = []
    for start in range(0, len(data), size):
        before = hashlib.sha256(before + data[start : start + size]).digest()
        keys.append(before)
    return keys
