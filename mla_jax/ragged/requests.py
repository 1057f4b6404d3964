"""Packed requests of different lengths: which are valid, and which keys each query sees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class KeyRanges(NamedTuple):
    """The keys of each packed query: it sees keys first .. end - 1, none where end <= first."""

    first: jax.Array  # [Tq] int32
    end: jax.Array  # [Tq] int32
    invalid: jax.Array  # [Tq] bool, whether the query belongs to an invalid request


def valid_requests(
    cu_q_lens: jax.Array, cu_kv_lens: jax.Array, *, num_queries: int, num_keys: int, causal: bool
) -> jax.Array:
    """Returns [B] bool: whether the bounds of each request can be.

    A request is invalid if its queries or keys end before they start, start before an earlier
    request ends, or end past the packed arrays. The first request must start at 0. With a causal
    mask a request must not have more queries than keys.

    Args:
        cu_q_lens: [B + 1] int32, where the queries of each request start, and the end of the last.
        cu_kv_lens: [B + 1] int32, the same for the keys.
        num_queries: packed queries, Tq.
        num_keys: packed keys, Tk.
        causal: whether the mask is causal.
    """
    valid = in_order(cu_q_lens, num_queries) & in_order(cu_kv_lens, num_keys)
    if causal:
        valid &= jnp.diff(cu_q_lens) <= jnp.diff(cu_kv_lens)
    return valid


def in_order(bounds: jax.Array, total: int) -> jax.Array:
    """Returns [B] bool: whether a request starts where the one before ends, and ends in the array.

    bounds: [B + 1] int32. total: the size of the packed array.
    """
    starts, ends = bounds[:-1], bounds[1:]
    in_order = (starts >= 0) & (starts == lax.cummax(bounds)[:-1])
    in_order &= (starts <= ends) & (ends <= total)
    return in_order.at[0].set(in_order[0] & (starts[0] == 0))


def owners(cu_q_lens: jax.Array, num_queries: int) -> tuple[jax.Array, jax.Array]:
    """Returns the request of each packed query, [Tq] int32, and whether it has one, [Tq] bool.

    Queries behind the last request belong to none; their number is that of the last request. Where
    an end is less than an earlier one, the queries between belong to the earlier request.
    """
    num_requests = len(cu_q_lens) - 1
    ends = jnp.maximum(lax.cummax(cu_q_lens)[1:], 0)
    passed = jnp.zeros(num_queries, jnp.int32).at[ends].add(1, mode="drop")
    request = jnp.cumsum(passed, dtype=jnp.int32)  # requests that end at or before each query
    return jnp.minimum(request, num_requests - 1), request < num_requests


def key_ranges(
    cu_q_lens: jax.Array, cu_kv_lens: jax.Array, *, num_queries: int, num_keys: int, causal: bool
) -> KeyRanges:
    """Returns the keys that each packed query sees. Arguments are those of `valid_requests`.

    Queries behind the last request see no key, like those of invalid requests.
    """
    valid = valid_requests(
        cu_q_lens, cu_kv_lens, num_queries=num_queries, num_keys=num_keys, causal=causal
    )
    request, owned = owners(cu_q_lens, num_queries)
    seeing = owned & valid[request]
    first, end = cu_kv_lens[request], cu_kv_lens[request + 1]
    if causal:
        # The queries are the last tokens of the request.
        row = jnp.arange(num_queries, dtype=jnp.int32)
        end = end - cu_q_lens[request + 1] + row + 1
    nothing = jnp.zeros_like(first)
    return KeyRanges(
        first=jnp.where(seeing, first, nothing),
        end=jnp.where(seeing, end, nothing),
        invalid=owned & ~valid[request],
    )


def require_rising(name: str, bounds: np.ndarray, of: str, total: int) -> None:
    """Raises ValueError for the first bound that `in_order` finds wrong.

    name: of the bounds. of: the packed array, which has `total` tokens.
    """
    if bounds[0] != 0:
        raise ValueError(f"{name}[0] must be 0, got {bounds[0]}")
    for i in 1 + np.flatnonzero((bounds[1:] < bounds[:-1]) | (bounds[1:] > total)):
        raise ValueError(
            f"{name}[{i}] must be in {bounds[i - 1]} .. {total} (from {name}[{i - 1}] to the "
            f"tokens of {of}), got {bounds[i]}"
        )
