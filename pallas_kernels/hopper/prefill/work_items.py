"""The work list of a prefill launch, made on the device: which query rows see which keys.

A work item is a tile of up to 128 query rows of one request, for one head. `work_list` lists the
tiles, longest first. All heads have the same tiles, so an item's index says which tile and which
head it is (`place_of_item`), and only the tiles are listed.

    causal: tiles end where the positions of query tokens, counted as keys, are multiples of 128.
    KV blocks of 128 do too. So a row of the tile sees all keys of every block but the tile's last.
    With blocks of 64, it sees all keys of every block but the tile's last two.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.ragged.requests import valid_requests
from pallas_kernels.hopper.prefill.config import L2_BYTES, TILE_ROWS

NO_ITEM = -1  # the head of an item that does not exist


class Tile(NamedTuple):
    """One row of the list."""

    q_row: Any  # its first query row
    num_rows: Any  # 1 .. 128; 0: no tile
    kv_row: Any  # the first key of its request
    num_blocks: Any  # KV blocks that its rows see; 0: they see no key
    limit: Any  # the last key of the request that its first row sees
    invalid: Any  # 1: the request is invalid and its rows are NaN


TILE_FIELDS = len(Tile._fields)


class Item(NamedTuple):
    """A work item: a tile for one head."""

    head: Any  # NO_ITEM: there is no further item
    q_row: Any
    num_rows: Any
    kv_row: Any
    num_blocks: Any
    limit: Any
    invalid: Any

    @staticmethod
    def read(ref: Any) -> "Item":
        return Item(*(ref[i] for i in range(ITEM_FIELDS)))


ITEM_FIELDS = len(Item._fields)


class WorkList(NamedTuple):
    """The tiles of a launch, longest first."""

    tiles: Any  # [most tiles, TILE_FIELDS] int32, as `Tile`
    counts: Any  # [2] int32: how many tiles there are, and heads in work at the same time


def most_tiles(num_queries: int, num_requests: int) -> int:
    """Returns an upper limit of the tiles of requests with so many query rows together.

    The rows behind the last request have tiles too, as a request of their own.
    """
    with_rows = min(num_requests + 1, num_queries)
    return (num_queries + 2 * (TILE_ROWS - 1) * with_rows) // TILE_ROWS


def work_list(
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    num_heads: int,
    block_keys: int,
    bytes_per_key: int,
    heads_at_once: int | None = None,
) -> WorkList:
    """Returns the tiles of packed requests.

    The tiles cover every query row exactly once, whatever the arrays hold. A row belongs to the
    first request that ends behind it. Rows of invalid requests become NaN (`valid_requests`).

    Args:
        cu_q_lens: [B + 1] int32, where requests begin and end among the query rows.
        cu_kv_lens: [B + 1] int32, likewise among the keys.
        num_queries, num_keys: rows of q and of the keys.
        causal: whether query i of n sees the keys up to num_keys_of_request - n + i.
        num_heads: of q.
        block_keys: keys per KV block.
        bytes_per_key: of K and V of one head.
        heads_at_once: heads whose tiles are in work at the same time; None: as many as have keys
            and values that fit in L2.
    """
    valid = valid_requests(
        cu_q_lens, cu_kv_lens, num_queries=num_queries, num_keys=num_keys, causal=causal
    )
    ends = lax.cummax(jnp.clip(cu_q_lens, 0, num_queries))[1:]
    edges = jnp.concatenate([jnp.zeros(1, jnp.int32), ends, jnp.full(1, num_queries, jnp.int32)])
    first, queries = edges[:-1], jnp.diff(edges)
    # Rows behind the last request, and those of invalid ones, see no key.
    keys = jnp.pad(jnp.where(valid, jnp.diff(cu_kv_lens), 0), (0, 1))
    kv_first = jnp.pad(jnp.where(valid, cu_kv_lens[:-1], 0), (0, 1))
    invalid = jnp.pad((~valid).astype(jnp.int32), (0, 1))

    # `ahead` rows of a request's first tile are missing, so that the other tiles are aligned.
    ahead = (keys - queries) % TILE_ROWS if causal else jnp.zeros_like(keys)
    ahead = jnp.where(keys > 0, ahead, 0)
    tiles = jnp.where(queries > 0, (queries + ahead + TILE_ROWS - 1) // TILE_ROWS, 0)
    tile_end = jnp.cumsum(tiles)

    index = jnp.arange(most_tiles(num_queries, len(cu_q_lens) - 1), dtype=jnp.int32)
    request = jnp.sum(tile_end[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
    exists = request < len(tiles)
    request = jnp.minimum(request, len(tiles) - 1)
    begin = (index - (tile_end - tiles)[request]) * TILE_ROWS - ahead[request]
    stop = jnp.minimum(begin + TILE_ROWS, queries[request])
    begin = jnp.maximum(begin, 0)
    num_rows = jnp.where(exists, stop - begin, 0)
    keys_of_requests, keys, queries = keys, keys[request], queries[request]
    limit = keys - queries + begin if causal else keys - 1
    seen = limit + num_rows if causal else keys
    num_blocks = jnp.where(exists & (keys > 0), (seen + block_keys - 1) // block_keys, 0)

    tile = Tile(
        q_row=first[request] + begin,
        num_rows=num_rows,
        kv_row=kv_first[request],
        num_blocks=num_blocks,
        limit=limit,
        invalid=invalid[request],
    )
    # Tiles that do not exist are last.
    longest_first = jnp.argsort(jnp.where(exists, -num_blocks, 1), stable=True)
    if heads_at_once is None:
        kilobytes = jnp.sum(keys_of_requests) // 16 * bytes_per_key // 64
        groups = jnp.maximum(num_heads * kilobytes // (L2_BYTES // 1024), 1)
        heads = (num_heads + groups - 1) // groups
    else:
        heads = jnp.int32(min(heads_at_once, num_heads))
    return WorkList(jnp.stack(tile, axis=1)[longest_first], jnp.stack([tile_end[-1], heads]))


def place_of_item(index: Any, num_tiles: Any, num_heads: int, heads_at_once: Any) -> Any:
    """Returns (tile, head) of the work item with this index.

    The items of `heads_at_once` heads come before those of the next ones. Among these, all heads of
    a tile come before the next tile.
    """
    group = lax.div(index, num_tiles * heads_at_once)
    first_head = group * heads_at_once
    heads = jnp.minimum(heads_at_once, num_heads - first_head)
    within = index - group * num_tiles * heads_at_once
    return lax.div(within, heads), first_head + lax.rem(within, heads)
