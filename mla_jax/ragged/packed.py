"""Packed tokens over the paged cache: every token is computed as a request of one token.

The new tokens of all requests lie one after the other, without padding: request b has the tokens
cu_q_lens[b] .. cu_q_lens[b + 1] - 1, and they are its last ones. A token sees the keys up to its
own position. That is what a request of this one token sees, with the same pages and with as many
keys. So the implementations take packed tokens as they take a decode step of T requests. The keys
of a request are read once for each of its new tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.cache import PagedKVCache
from mla_jax.cache.requests import valid_or_minus_one
from mla_jax.ragged.requests import in_order, owners, require_rising
from mla_jax.sharding.key_shards import KeyShard


class PackedTokens(NamedTuple):
    """T packed tokens as T requests of one token."""

    block_tables: jax.Array  # [T, max_pages] int32, those of each token's request
    seq_lens: jax.Array  # [T] int32, keys that a token sees; 0: padding, -1: an invalid request
    query_lens: jax.Array  # [T] int32, 1; 0 for padding and tokens of invalid requests

    @staticmethod
    def of(
        name: str,
        count: int,
        cache: PagedKVCache,
        block_tables: jax.Array,
        seq_lens: jax.Array,
        cu_q_lens: jax.Array,
        *,
        causal: bool = True,
        kv_axis: str | None = None,
    ) -> "PackedTokens":
        """Returns the `count` tokens of the array `name`; arguments as in `paged_mla_attention`.

        Raises TypeError or ValueError for arguments that do not fit. Values are checked unless they
        are traced, or split over kv_axis.
        """
        requests = block_tables, seq_lens, cu_q_lens
        sizes = {"page_size": cache.page_size, "num_pages": cache.num_pages}
        _check(name, count, *requests, **sizes, kv_axis=kv_axis)
        return _packed(
            count, *map(checks.snapshot, requests), **sizes, causal=causal, kv_axis=kv_axis
        )


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("page_size", "num_pages", "causal", "kv_axis"),
)
def _packed(
    count: int,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    cu_q_lens: jax.Array,
    *,
    page_size: int,
    num_pages: int,
    causal: bool,
    kv_axis: str | None,
) -> PackedTokens:
    request, owned = owners(cu_q_lens, count)
    here = seq_lens if kv_axis is None else KeyShard.here(kv_axis, page_size).count(seq_lens)
    valid = valid_or_minus_one(block_tables, here, None, page_size, num_pages, count) >= 0
    valid &= in_order(cu_q_lens, count) & (jnp.diff(cu_q_lens) <= seq_lens)
    real = owned & valid[request]
    seen = seq_lens[request]
    if causal:
        seen += jnp.arange(1, count + 1, dtype=jnp.int32) - cu_q_lens[request + 1]
    seen = jnp.where(real, seen, jnp.where(owned, -1, 0))
    return PackedTokens(block_tables[request], seen, real.astype(jnp.int32))


def _check(
    name: str,
    count: int,
    block_tables: Any,
    seq_lens: Any,
    cu_q_lens: Any,
    *,
    page_size: int,
    num_pages: int,
    kv_axis: str | None = None,
) -> None:
    """Raises as `PackedTokens.of`."""
    checks.require_array("seq_lens", seq_lens)
    checks.require_shape("seq_lens", seq_lens, "[B]", None)
    batch = checks.require_positive("B of seq_lens", len(seq_lens))
    checks.require_array("cu_q_lens", cu_q_lens)
    checks.require_shape("cu_q_lens", cu_q_lens, "[B + 1]", batch + 1)
    checks.require_block_tables(block_tables, batch)
    for argument, value in {"seq_lens": seq_lens, "cu_q_lens": cu_q_lens}.items():
        checks.require_int32(argument, value)
    if kv_axis is not None or not checks.is_concrete(block_tables, seq_lens, cu_q_lens):
        return
    checks.require_pages("seq_lens", seq_lens, block_tables, page_size, num_pages)
    _require_bounds(name, count, seq_lens, cu_q_lens)


def _require_bounds(name: str, count: int, seq_lens: Any, cu_q_lens: Any) -> None:
    """Raises ValueError for concrete bounds that fall, or that give a request too many tokens.

    name: of the array of `count` tokens.
    """
    bounds, lengths = np.asarray(cu_q_lens), np.asarray(seq_lens)
    require_rising("cu_q_lens", bounds, name, count)
    queries = np.diff(bounds)
    for request in np.flatnonzero(queries > lengths):
        raise ValueError(
            f"cu_q_lens must give request {request} at most the {lengths[request]} tokens of "
            f"seq_lens[{request}], got {queries[request]}"
        )
