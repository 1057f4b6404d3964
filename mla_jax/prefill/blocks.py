"""Blocks of packed queries and keys, which the pure-JAX forward and backward pass work through.

A block of queries may hold several requests. Requests are packed in order, so that the keys of one
block of queries lie between a lowest and a highest position. Key blocks outside are never read:
keys of other requests, and keys that the causal mask hides from the whole block.

The last block of an array starts early enough to have the size of the others. It overlaps the block
before it, and masks keep the rows in common from counting twice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax.implementations.scores import scores_of
from mla_jax.ragged.problem import RaggedProblem
from mla_jax.ragged.requests import KeyRanges

QUERIES = 128  # queries per block, at most
KEYS = 256  # keys per block, at most


class QueryBlock(NamedTuple):
    """A block of R queries; all heads of a query see the same keys."""

    start: jax.Array  # [] int32, the first query
    fresh: jax.Array  # [R] bool, whether no earlier block has the query
    q: jax.Array  # [H, R, nope + rope]
    first: jax.Array  # [R] int32, first key that the query sees
    end: jax.Array  # [R] int32, end of the keys that it sees; 0 where not fresh


class KeyBlock(NamedTuple):
    """A block of T keys."""

    start: jax.Array  # [] int32, the first key
    positions: jax.Array  # [T] int32; -1 where an earlier block has the key
    k_nope: jax.Array  # [H, T, nope]
    k_rope: jax.Array  # [T, rope]
    v: jax.Array  # [H, T, v_dim]


def num_query_blocks(problem: RaggedProblem) -> int:
    return -(-problem.num_queries // QUERIES)


def query_block(problem: RaggedProblem, ranges: KeyRanges, index: jax.Array) -> QueryBlock:
    """Returns block `index` of the queries."""
    start, rows = _place(index, QUERIES, problem.num_queries)
    fresh = rows >= index * np.int32(QUERIES)
    first = take(ranges.first, start, len(rows))
    end = jnp.where(fresh, take(ranges.end, start, len(rows)), np.int32(0))
    return QueryBlock(start, fresh, heads_first(take(problem.q, start, len(rows))), first, end)


def key_blocks(queries: QueryBlock) -> tuple[jax.Array, jax.Array]:
    """Returns the indices of the first key block that a query sees, and of the one past the last"""
    seeing = queries.first < queries.end
    last = jnp.max(jnp.where(seeing, queries.end, np.int32(0)))
    first = jnp.min(jnp.where(seeing, queries.first, last))
    return first // KEYS, -(-last // KEYS)


def key_block(problem: RaggedProblem, index: jax.Array) -> KeyBlock:
    """Returns block `index` of the keys."""
    start, positions = _place(index, KEYS, problem.num_keys)
    fresh = positions >= index * np.int32(KEYS)
    return KeyBlock(
        start=start,
        positions=jnp.where(fresh, positions, np.int32(-1)),
        k_nope=heads_first(take(problem.k_nope, start, len(positions))),
        k_rope=take(problem.k_rope, start, len(positions)),
        v=heads_first(take(problem.v, start, len(positions))),
    )


def seen_keys(queries: QueryBlock, keys: KeyBlock) -> jax.Array:
    """Returns [R, T] bool: whether a query sees a key."""
    at_least = keys.positions >= queries.first[:, None]
    return at_least & (keys.positions < queries.end[:, None])


def block_scores(queries: QueryBlock, keys: KeyBlock, softmax_scale: float) -> jax.Array:
    """Returns the scores [H, R, T] float32 of a block, without a mask."""
    q_nope, q_rope = jnp.split(queries.q, [keys.k_nope.shape[-1]], axis=-1)
    scores = scores_of(q_nope, keys.k_nope, softmax_scale)
    if q_rope.shape[-1] == 0:
        return scores
    # The rope part of a key is the same for all heads, so that their queries are rows of one head.
    rows = q_rope.reshape(1, -1, q_rope.shape[-1])
    return scores + scores_of(rows, keys.k_rope[None], softmax_scale).reshape(scores.shape)


def take(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns rows start .. start + size - 1."""
    return lax.dynamic_slice_in_dim(array, start, size)


def put(array: jax.Array, start: jax.Array, rows: jax.Array, where: jax.Array) -> jax.Array:
    """Writes rows [R, ...] from `start` on, except those with a False in `where` [R]."""
    where = where.reshape(-1, *[1] * (rows.ndim - 1))
    rows = jnp.where(where, rows.astype(array.dtype), take(array, start, len(rows)))
    return lax.dynamic_update_slice_in_dim(array, rows, start, 0)


def heads_first(rows: jax.Array) -> jax.Array:
    """Swaps the dims of tokens and heads, [T, H, ...] to [H, T, ...] or back."""
    return jnp.swapaxes(rows, 0, 1)


def _place(index: jax.Array, size: int, total: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first row of a block and the numbers of all its rows."""
    size = min(size, total)
    start = jnp.minimum(index * np.int32(size), np.int32(total - size))
    return start, start + jnp.arange(size, dtype=jnp.int32)
