"""Float64 reference of the attention in numpy, one request and one token at a time.

Every test and experiment compares with it. It shares no code with the implementations.
"""

from typing import Any

import numpy as np


def attention_float64(
    q: np.ndarray,
    kv: np.ndarray,
    *,
    softmax_scale: float,
    kv_lora_rank: int,
    causal: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes absorbed MLA attention of one request by its definition.

    Args:
        q: [S, H, D], queries of the last S tokens: token i is at position T - S + i.
        kv: [T, D]; V is its first kv_lora_rank columns.
        softmax_scale: factor of the scores.
        kv_lora_rank: columns of V.
        causal: whether a token sees no later keys.

    Returns:
        o [S, H, kv_lora_rank] and lse [S, H] (natural log), float64. A row without a key, or with
        scores of -inf only, has o = 0 and lse = -inf. A score of +inf or NaN makes both NaN.
    """
    q, kv = np.asarray(q, np.float64), np.asarray(kv, np.float64)
    o = np.zeros((*q.shape[:2], kv_lora_rank))
    lse = np.full(q.shape[:2], -np.inf)
    for token in range(len(q)):
        visible = kv[: max(0, len(kv) - len(q) + token + 1)] if causal else kv
        if len(visible) == 0:
            continue
        with np.errstate(invalid="ignore"):
            scores = softmax_scale * (q[token] @ visible.T)  # [H, keys]
            top = scores.max(axis=1)
            some = top != -np.inf  # also True for NaN
            weights = np.exp(scores[some] - top[some, None])
            total = weights.sum(axis=1)
            o[token, some] = (weights / total[:, None]) @ visible[:, :kv_lora_rank]
            lse[token, some] = top[some] + np.log(total)
    return o, lse


def read_pages_float64(cache: Any, block_table: np.ndarray, length: int) -> np.ndarray:
    """Reads the first `length` rows of one request from a PagedKVCache: [length, D] float64.

    A view gives the rows of its layer. Layout NZ stores element (t, d) at address
    ((d / C0) * page_size + t) * C0 + d % C0. An int8 value is multiplied by the scale of its
    token, of its 128 columns, or of the whole cache.
    """
    positions = np.arange(length)
    page = np.asarray(block_table)[positions // cache.page_size]
    if cache.first_page is not None:
        page = page + int(cache.first_page)
    t = positions % cache.page_size
    if cache.scales is None:
        return _read_array(cache, cache.pages, page, t, cache.latent_dim)
    rank, scales = cache.kv_lora_rank, np.asarray(cache.scales, np.float64)
    groups = scales.shape[2] if scales.ndim == 3 else 1
    scales = scales[page, t].reshape(length, groups) if scales.ndim else scales.reshape(1, 1)
    latent = _read_array(cache, cache.pages, page, t, rank)
    with np.errstate(invalid="ignore"):
        latent *= np.repeat(scales, rank // groups, axis=1)
    return np.append(latent, _read_array(cache, cache.rope_pages, page, t, cache.rope_dim), axis=1)


def _read_array(cache: Any, array: Any, page: np.ndarray, t: np.ndarray, width: int) -> np.ndarray:
    """Reads tokens t of pages `page` from one array of the cache: [length, width] float64."""
    values, columns = np.asarray(array), np.arange(width)
    address = t[:, None] * width + columns
    if cache.layout == "NZ":
        c0 = 32 // values.dtype.itemsize
        address = ((columns // c0) * cache.page_size + t[:, None]) * c0 + columns % c0
    return values.reshape(len(values), -1)[page[:, None], address].astype(np.float64)


def paged_attention_float64(
    q: np.ndarray,
    cache: Any,
    block_tables: np.ndarray,
    seq_lens: np.ndarray,
    *,
    softmax_scale: float,
    query_lens: np.ndarray | None = None,
    causal: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes `paged_mla_attention` in float64: o [B, S, H, kv_lora_rank] and lse [B, S, H]."""
    q = np.asarray(q).astype(np.float64)
    o = np.zeros((*q.shape[:3], cache.kv_lora_rank))
    lse = np.full(q.shape[:3], -np.inf)
    for request, length in enumerate(np.asarray(seq_lens)):
        queries = q.shape[1] if query_lens is None else int(np.asarray(query_lens)[request])
        kv = read_pages_float64(cache, np.asarray(block_tables)[request], int(length))
        o[request, :queries], lse[request, :queries] = attention_float64(
            q[request, :queries],
            kv,
            softmax_scale=softmax_scale,
            kv_lora_rank=cache.kv_lora_rank,
            causal=causal,
        )
    return o, lse
