"""Gradients of the paged attention by autodiff in float64, of a dense definition of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from paged_batch import RANK, SCALE, Batch, element

Cotangents = tuple[np.ndarray, np.ndarray]


def row_addresses(batch: Batch) -> list[np.ndarray]:
    """Returns, per request, the index in flat pages of each value of its rows: [T, D]."""
    cache, width = batch.cache, batch.q.shape[-1]
    found = []
    for table, length in zip(batch.block_tables, batch.seq_lens, strict=True):
        rows = [
            int(table[t // cache.page_size]) * cache.page_size * width
            + element(
                cache.layout,
                cache.page_size,
                cache.pages.dtype,
                width,
                t % cache.page_size,
                np.arange(width),
            )
            for t in range(length)
        ]
        found.append(np.array(rows, np.int64).reshape(length, width))
    return found


def dense(batch: Batch, *, causal: bool = True, skip: tuple[int, ...] = ()) -> Any:
    """Returns a function of q and pages, one softmax for each request; those of `skip` are 0."""
    addresses = row_addresses(batch)

    def attend(q: Any, pages: Any) -> tuple[Any, Any]:
        outs = []
        for b, (where, queries) in enumerate(zip(addresses, batch.query_lens, strict=True)):
            o, lse = jnp.zeros((*q.shape[1:3], RANK)), jnp.zeros(q.shape[1:3])
            if b in skip or queries == 0:
                outs.append((o, lse))
                continue
            kv = pages.reshape(-1)[where]
            scores = SCALE * jnp.einsum("shd,td->sht", q[b, :queries], kv)
            last = len(kv) - queries + np.arange(queries) if causal else np.full(queries, len(kv))
            seen = np.arange(len(kv)) <= last[:, None]
            scores = jnp.where(seen[:, None], scores, -jnp.inf)
            mine = jnp.einsum("sht,tv->shv", jax.nn.softmax(scores), kv[:, :RANK])
            o = o.at[:queries].set(mine)
            outs.append((o, lse.at[:queries].set(jax.nn.logsumexp(scores, -1))))
        return jnp.stack([o for o, _ in outs]), jnp.stack([lse for _, lse in outs])

    return attend


def float64_of(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Returns q and pages in float64, 0 where they are not finite."""
    q, pages = (np.asarray(x).astype(np.float64) for x in (batch.q, batch.cache.pages))
    return np.nan_to_num(q), np.nan_to_num(pages)


def gradients_float64(batch: Batch, cotangents: Cotangents, **options: Any) -> list[np.ndarray]:
    """Returns the gradients of q and of the pages; cotangents of padding do not count."""
    with jax.enable_x64(True):
        run = jax.jit(lambda args, d: jax.vjp(dense(batch, **options), *args)[1](d))
        d = tuple(np.nan_to_num(x.astype(np.float64)) for x in cotangents)
        return [np.asarray(x) for x in run(float64_of(batch), d)]


def tangents_float64(batch: Batch, along: Any, **options: Any) -> list[np.ndarray]:
    """Returns the tangents of o and lse along those of q and the pages."""
    with jax.enable_x64(True):
        d = tuple(np.nan_to_num(x.astype(np.float64)) for x in along)
        run = jax.jit(lambda args, d: jax.jvp(dense(batch, **options), args, d)[1])
        return [np.asarray(x) for x in run(float64_of(batch), d)]
