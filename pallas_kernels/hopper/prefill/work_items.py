"""The work list of a prefill launch, made on the device: which query rows see which keys.

A work item is a tile of up to 128 query rows of one request, for one head. `work_list` lists the
tiles. All heads have the same tiles, so an item's index says which tile and which head it is
(`place_of_item`), and only the tiles are listed.

Tiles are in one of two orders:

    longest first   where L2 holds the keys and values of several heads. CTAs then end together.
    by request      elsewhere: requests with the most keys first, and longest first within each.
                    Tiles that read the same keys and values follow each other, so L2 holds those.

    causal: tiles end where the positions of query tokens, counted as keys, are multiples of 128.
    KV blocks of 128 do too. So a row of the tile sees all keys of every block but the tile's last.
    With blocks of 64, it sees all keys of every block but the tile's last two.

The list counts KV blocks of 128 keys, whatever blocks the kernel loads (`Tile.blocks_of`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.ragged.requests import valid_requests
from pallas_kernels.hopper.prefill.config import L2_BYTES, TILE_ROWS

NO_ITEM = -1  # the head of an item that does not exist
L2_KILOBYTES = L2_BYTES // 1024
# Tiles are listed by request if L2 does not hold the keys and values of FEW_HEADS heads. Then at
# most MOST_HEADS_BY_REQUEST heads are in work at the same time. Both were chosen on an H200.
FEW_HEADS, MOST_HEADS_BY_REQUEST = 4, 8


class Tile(NamedTuple):
    """One row of the list."""

    q_row: Any  # its first query row
    num_rows: Any  # 1 .. 128; 0: no tile
    kv_row: Any  # the first key of its request
    num_blocks: Any  # KV blocks of 128 keys that its rows see; 0: they see no key
    limit: Any  # the last key of the request that its first row sees
    invalid: Any  # 1: the request is invalid and its rows are NaN

    def blocks_of(self, block_keys: int, causal: bool) -> Any:
        """Returns how many KV blocks of so many keys its rows see."""
        if block_keys == TILE_ROWS:
            return self.num_blocks
        seen = self.limit + (self.num_rows if causal else 1)
        blocks = lax.div(seen + (block_keys - 1), block_keys)
        return jnp.where(self.num_blocks > 0, blocks, 0)


TILE_FIELDS = len(Tile._fields)
NUM_BLOCKS = Tile._fields.index("num_blocks")


class Request(NamedTuple):
    """A request, or the rows behind the last one. The methods take numbers or arrays of numbers."""

    first: Any  # its first query row
    queries: Any  # how many it has
    kv_first: Any  # its first key
    keys: Any  # how many its rows see; 0: it is invalid, or has none
    invalid: Any  # 1: it is invalid and its rows are NaN

    def rows_ahead(self, causal: bool) -> Any:
        """Returns how many rows of its first tile are missing, so that other tiles are aligned."""
        return jnp.where(self.keys > 0, (self.keys - self.queries) & (TILE_ROWS - 1) * causal, 0)

    def num_tiles(self, causal: bool) -> Any:
        """Returns how many tiles its rows have."""
        tiles = tiles_in(self.queries + self.rows_ahead(causal))
        return jnp.where(self.queries > 0, tiles, 0)

    def tile(self, index: Any, causal: bool) -> Tile:
        """Returns the tile of it with this index, which must be below `num_tiles`."""
        begin = index * TILE_ROWS - self.rows_ahead(causal)
        stop = jnp.minimum(begin + TILE_ROWS, self.queries)
        begin = jnp.maximum(begin, 0)
        limit = self.keys - self.queries + begin if causal else self.keys - 1
        seen = limit + stop - begin if causal else self.keys
        return Tile(
            q_row=self.first + begin,
            num_rows=stop - begin,
            kv_row=self.kv_first,
            num_blocks=jnp.where(self.keys > 0, tiles_in(seen), 0),
            limit=limit,
            invalid=self.invalid,
        )


def tiles_in(rows: Any) -> Any:
    """Returns how many tiles, or KV blocks, so many rows or keys take."""
    return (rows + TILE_ROWS - 1) >> (TILE_ROWS.bit_length() - 1)


class Item(NamedTuple):
    """A work item: a tile for one head."""

    head: Any  # NO_ITEM: there is no further item
    q_row: Any
    num_rows: Any
    kv_row: Any
    num_blocks: Any  # KV blocks as the kernel loads them
    limit: Any
    invalid: Any

    @staticmethod
    def read(ref: Any) -> "Item":
        return Item(*(ref[i] for i in range(ITEM_FIELDS)))


ITEM_FIELDS = len(Item._fields)


class WorkList(NamedTuple):
    """The tiles of a launch, in the order in which they are taken."""

    tiles: Any  # [most tiles, TILE_FIELDS] int32, as `Tile`; 0 behind the last
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
        bytes_per_key: of K and V of one head.
        heads_at_once: heads whose tiles are in work at the same time; None: `heads_in_work`.
    """
    valid = valid_requests(
        cu_q_lens, cu_kv_lens, num_queries=num_queries, num_keys=num_keys, causal=causal
    )
    ends = lax.cummax(jnp.clip(cu_q_lens, 0, num_queries))[1:]
    edges = jnp.concatenate([jnp.zeros(1, jnp.int32), ends, jnp.full(1, num_queries, jnp.int32)])
    # Rows behind the last request, and those of invalid ones, see no key.
    requests = Request(
        first=edges[:-1],
        queries=jnp.diff(edges),
        kv_first=jnp.pad(jnp.where(valid, cu_kv_lens[:-1], 0), (0, 1)),
        keys=jnp.pad(jnp.where(valid, jnp.diff(cu_kv_lens), 0), (0, 1)),
        invalid=jnp.pad((~valid).astype(jnp.int32), (0, 1)),
    )
    tiles = requests.num_tiles(causal)
    tile_end = jnp.cumsum(tiles, dtype=jnp.int32)

    index = jnp.arange(most_tiles(num_queries, len(cu_q_lens) - 1), dtype=jnp.int32)
    request = jnp.sum(tile_end[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
    exists = request < len(tiles)
    request = jnp.minimum(request, len(tiles) - 1)
    within = index - (tile_end - tiles)[request]
    tile = jnp.stack(Request(*(x[request] for x in requests)).tile(within, causal), axis=1)
    total, longest = jnp.sum(requests.keys), jnp.max(requests.keys)
    rank = jnp.stack([-tiles_in(requests.keys), jnp.arange(len(tiles))])[:, request]
    rank = rank * is_by_request(total, bytes_per_key)
    # The last key counts most. Tiles that do not exist are last.
    order = jnp.lexsort((-tile[:, NUM_BLOCKS], rank[1], rank[0], ~exists))
    tile = jnp.where(exists[:, None], tile, 0)[order]
    heads = heads_in_work(total, longest, num_heads, bytes_per_key, heads_at_once)
    return WorkList(tile, jnp.stack([tile_end[-1], heads]))


def is_by_request(num_keys: Any, bytes_per_key: int) -> Any:
    """Whether tiles are listed by request, with so many keys of all valid requests, traced."""
    return FEW_HEADS * _kilobytes(num_keys, bytes_per_key) > L2_KILOBYTES


def heads_in_work(
    num_keys: Any, longest: Any, num_heads: int, bytes_per_key: int, heads_at_once: int | None
) -> Any:
    """Returns of how many heads the tiles are in work at the same time.

    They are about as many as have keys and values that fit in L2; by request, those of the longest
    request. The number of groups of heads is rounded down, so a group may need up to about twice
    `L2_BYTES`, which are less than L2 has.

    num_keys: of all valid requests, traced. longest: of the one that has most. The others as for
        `work_list`.
    """
    if heads_at_once is not None:
        return jnp.full_like(num_keys, min(heads_at_once, num_heads))
    by_request = is_by_request(num_keys, bytes_per_key)
    kilobytes = _kilobytes(jnp.where(by_request, longest, num_keys), bytes_per_key)
    groups = jnp.maximum(lax.div(num_heads * kilobytes, jnp.int32(L2_KILOBYTES)), 1)
    heads = lax.div(num_heads - 1 + groups, groups)
    return jnp.where(by_request, jnp.minimum(heads, MOST_HEADS_BY_REQUEST), heads)


def _kilobytes(num_keys: Any, bytes_per_key: int) -> Any:
    """Returns the size of the keys and values of a head, without overflow."""
    return ((num_keys >> 4) * bytes_per_key) >> 6


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
