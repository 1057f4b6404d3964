"""The work list of a prefill launch, made on the device: which query rows see which keys.

A work item is a tile of up to 128 query rows of one request, for one head. `work_list` lists the
tiles, longest first. All heads have the same tiles, so an item's index says which tile and which
head it is (`place_of_item`), and only the tiles are listed.

    causal: tiles end where the positions of query tokens, counted as keys, are multiples of 128.
    KV blocks do too. So a row of the tile sees all keys of every block but the tile's last.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.prefill.config import TILE_ROWS

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
    num_tiles: Any  # [1] int32


def most_tiles(num_queries: int, num_requests: int) -> int:
    """Returns an upper limit of the tiles of requests with so many query rows together.

    Rows before the first request and behind the last have tiles too, as requests of their own.
    """
    with_rows = min(num_requests + 2, num_queries)
    return (num_queries + 2 * (TILE_ROWS - 1) * with_rows) // TILE_ROWS


def work_list(
    cu_q_lens: jax.Array, cu_kv_lens: jax.Array, num_queries: int, num_keys: int, *, causal: bool
) -> WorkList:
    """Returns the tiles of packed requests.

    The tiles cover every query row exactly once, whatever the arrays hold. A request is invalid if
    its rows of q or of the keys decrease, end past the arrays or begin before an earlier request
    ends, or if it is causal and has more queries than keys, but some keys. Its rows are those from the latest end
    before it up to its own end.

    Args:
        cu_q_lens: [B + 1] int32, where requests begin and end among the query rows.
        cu_kv_lens: [B + 1] int32, likewise among the keys.
        num_queries, num_keys: rows of q and of the keys.
        causal: whether query i of n sees the keys up to num_keys_of_request - n + i.
    """
    ends = lax.cummax(jnp.clip(cu_q_lens, 0, num_queries))
    edges = jnp.concatenate([jnp.zeros(1, jnp.int32), ends, jnp.full(1, num_queries, jnp.int32)])
    first, end = edges[:-1], edges[1:]
    queries = end - first

    kv_first, kv_end = cu_kv_lens[:-1], cu_kv_lens[1:]
    keys = kv_end - kv_first
    valid = (cu_q_lens[:-1] == ends[:-1]) & (cu_q_lens[1:] == ends[1:])
    valid &= (kv_first >= 0) & (keys >= 0) & (kv_end <= num_keys)
    if causal:
        valid &= (keys >= cu_q_lens[1:] - cu_q_lens[:-1]) | (keys == 0)
    # Rows of no request see no key.
    keys, kv_first = (jnp.pad(jnp.where(valid, x, 0), 1) for x in (keys, kv_first))
    invalid = jnp.pad((~valid).astype(jnp.int32), 1)

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
    keys, queries = keys[request], queries[request]
    limit = keys - queries + begin if causal else keys - 1
    seen = limit + num_rows if causal else keys
    num_blocks = jnp.where(exists & (keys > 0), (seen + TILE_ROWS - 1) // TILE_ROWS, 0)

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
    return WorkList(jnp.stack(tile, axis=1)[longest_first], tile_end[-1:])


def place_of_item(index: Any, num_tiles: Any, num_heads: int, heads_at_once: int) -> Any:
    """Returns (tile, head) of the work item with this index.

    The items of `heads_at_once` heads come before those of the next ones. Among these, all heads of
    a tile come before the next tile.
    """
    group = index // (num_tiles * heads_at_once)
    first_head = group * heads_at_once
    heads = jnp.minimum(heads_at_once, num_heads - first_head)
    within = index - group * num_tiles * heads_at_once
    return within // heads, first_head + within % heads
