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
from mla_jax.cache.requests import valid_or_minus_one
from mla_jax.ragged.requests import in_order, owners, require_rising
from mla_jax.sharding.key_shards import KeyShard
from mla_jax.splits.plan import require_lengths


class PackedTokens(NamedTuple):
    """T packed tokens as T requests of one token."""

    block_tables: jax.Array  # [T, max_pages] int32, those of each token's request
    seq_lens: jax.Array  # [T] int32, keys that a token sees; 0: padding, -1: an invalid request
    query_lens: jax.Array  # [T] int32, 1; 0 for padding and tokens of invalid requests

    @staticmethod
    def of(
        name: str,
        count: int,
        cache: Any,
        block_tables: jax.Array,
        seq_lens: jax.Array,
        cu_q_lens: jax.Array,
        *,
        causal: bool = True,
        kv_axis: str | None = None,
    ) -> "PackedTokens":
        """Returns the `count` tokens of the array `name`; arguments as in `paged_mla_attention`.

        cache: a `PagedKVCache`, of which the page size and the number of pages count.

        Raises TypeError or ValueError for arguments that do not fit. Values are checked unless they
        are traced, or split over kv_axis.
        """
        if kv_axis is not None:
            KeyShard.here(kv_axis, cache.page_size)  # It checks the axis.
        requests = block_tables, seq_lens, cu_q_lens
        sizes = {"page_size": cache.page_size, "num_pages": cache.num_pages}
        check_lengths(name, count, seq_lens, cu_q_lens, kv_axis=kv_axis)
        checks.require_block_tables(block_tables, len(seq_lens))
        if kv_axis is None and checks.is_concrete(block_tables, seq_lens):
            checks.require_pages("seq_lens", seq_lens, block_tables, **sizes)
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
    seen = keys_seen(seq_lens, cu_q_lens, count) if causal else seq_lens[request]
    here = seq_lens if kv_axis is None else KeyShard.here(kv_axis, page_size).count(seq_lens)
    has_pages = valid_or_minus_one(block_tables, here, None, page_size, num_pages, count) >= 0
    valid = in_order(cu_q_lens, count) & (seq_lens >= 0) & (jnp.diff(cu_q_lens) <= seq_lens)
    if kv_axis is None:
        valid &= has_pages
    else:  # Lengths stay equal along the axis. A token that sees a key here finds no page.
        block_tables = jnp.where(has_pages[:, None], block_tables, -1)
    real = owned & valid[request]
    seen = jnp.where(real, seen, jnp.where(owned, -1, 0))
    return PackedTokens(block_tables[request], seen, real.astype(jnp.int32))


@functools.partial(jax.jit, static_argnums=2)
def keys_seen(seq_lens: jax.Array, cu_q_lens: jax.Array, count: int) -> jax.Array:
    """Returns how many keys each of `count` packed tokens sees, up to its own, [count] int32.

    It is 0 for padding and where the bounds leave no key. Pages are not looked at.
    """
    request, owned = owners(cu_q_lens, count)
    behind = cu_q_lens[request + 1] - jnp.arange(count, dtype=jnp.int32) - 1
    keys = jnp.maximum(jnp.maximum(seq_lens[request], 0) - behind, 0)
    return jnp.where(owned & (behind >= 0), keys, 0)


def check_lengths(
    name: str, count: int, seq_lens: Any, cu_q_lens: Any, *, kv_axis: str | None = None
) -> None:
    """Raises TypeError or ValueError unless these are the requests of `count` packed tokens.

    name: of the array of tokens. Values are not checked if they are traced, or split over kv_axis.
    """
    checks.require_array("seq_lens", seq_lens)
    checks.require_shape("seq_lens", seq_lens, "[B]", None)
    batch = checks.require_positive("B of seq_lens", len(seq_lens))
    checks.require_array("cu_q_lens", cu_q_lens)
    checks.require_shape("cu_q_lens", cu_q_lens, "[B + 1]", batch + 1)
    for argument, value in {"seq_lens": seq_lens, "cu_q_lens": cu_q_lens}.items():
        checks.require_int32(argument, value)
    if kv_axis is not None or not checks.is_concrete(seq_lens, cu_q_lens):
        return
    require_lengths(seq_lens)
    bounds, lengths = np.asarray(cu_q_lens), np.asarray(seq_lens)
    require_rising("cu_q_lens", bounds, name, count)
    queries = np.diff(bounds)
    for request in np.flatnonzero(queries > lengths):
        raise ValueError(
            f"cu_q_lens must give request {request} at most the {lengths[request]} tokens of "
            f"seq_lens[{request}], got {queries[request]}"
        )


def require_no_query_lens(query_lens: Any) -> None:
    """Raises ValueError unless query_lens is None, beside cu_q_lens."""
    if query_lens is not None:
        raise ValueError("query_lens must be None with cu_q_lens, which has the lengths")


def rows_to_append(
    cache: Any,
    kv: jax.Array,
    block_tables: jax.Array,
    before: jax.Array,
    cu_q_lens: jax.Array,
    kv_axis: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the arguments of `PagedKVCache.append` for packed kv [T, D], as T requests.

    before: [B] int32, the seq_lens of `append`, tokens of each request before these.
    """
    cache.check()
    checks.require_array("kv", kv)
    checks.require_shape("kv", kv, "[T, D] with cu_q_lens", None, cache.latent_dim)
    count = checks.require_positive("T of kv", kv.shape[0])
    checks.require_array("cu_q_lens", cu_q_lens)
    checks.require_shape("cu_q_lens", cu_q_lens, "[B + 1]", None)
    checks.require_int("B + 1, the size of cu_q_lens,", len(cu_q_lens), 2)
    checks.require_array("seq_lens", before)
    checks.require_shape("seq_lens", before, "[B]", len(cu_q_lens) - 1)
    for argument, value in {"seq_lens": before, "cu_q_lens": cu_q_lens}.items():
        checks.require_int32(argument, value)
    if kv_axis is None and checks.is_concrete(block_tables, before, cu_q_lens):
        require_lengths(before)
        require_rising("cu_q_lens", np.asarray(cu_q_lens), "kv", count)
        after = np.asarray(before).astype(np.int64) + np.diff(np.asarray(cu_q_lens))
        sizes = {"page_size": cache.page_size, "num_pages": cache.num_pages}
        checks.require_block_tables(block_tables, len(before))
        words = "new tokens + seq_lens"
        checks.require_pages(words, after, block_tables, **sizes)
    after = _after(*map(checks.snapshot, (before, cu_q_lens)))
    tokens = PackedTokens.of("kv", count, cache, block_tables, after, cu_q_lens, kv_axis=kv_axis)
    return kv[:, None], tokens.block_tables, tokens.seq_lens - tokens.query_lens, tokens.query_lens


@jax.jit
def _after(before: jax.Array, cu_q_lens: jax.Array) -> jax.Array:
    """Returns the lengths of requests with their new tokens; -1 where they can't be."""
    new = jnp.diff(cu_q_lens)
    possible = (before >= 0) & (new >= 0) & (before <= np.int32(2**31 - 1) - new)
    return jnp.where(possible, before + new, -1)
