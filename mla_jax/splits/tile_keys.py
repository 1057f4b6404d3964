"""How many keys the tiles of a request see, and so how many KV blocks each tile has.

Query token i of a request is at position seq_lens - query_lens + i. Behind a causal mask it sees
the keys up to this position. A tile sees the keys of its last token, and the blocks after them are
hidden: they would be masked for every row. Two tokens per tile, blocks of 4 keys, 11 keys:

    token    sees keys     tile   keys  blocks
      0      0 .. 6          0      8      2
      1      0 .. 7
      2      0 .. 8          1     10      3
      3      0 .. 9
      4      0 .. 10         2     11      3
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks

_LARGEST = np.iinfo(np.int32).max


def tile_keys(
    seq_lens: Any,
    query_lens: Any,
    *,
    num_row_tiles: int,
    rows_per_tile: int,
    num_heads: int,
    xp: Any = jnp,
) -> Any:
    """Returns how many keys each tile sees, [num_row_tiles, B]: this many, from key 0 on.

    Args:
        seq_lens: [B] integers; a length below 0 counts as 0.
        query_lens: [B], query tokens per request; a tile of padding alone sees no key.
        num_heads: query rows per token. 0: nothing is hidden, and each tile sees all keys of its
            request; query_lens may be None.
        xp: numpy or jax.numpy.
    """
    seq_lens = xp.maximum(seq_lens, 0)
    if not num_heads:
        return xp.broadcast_to(seq_lens, (num_row_tiles, len(seq_lens)))
    row = np.arange(num_row_tiles)[:, None] * rows_per_tile
    first, last = (
        np.minimum(at // num_heads, _LARGEST).astype(np.int32)
        for at in (row, row + rows_per_tile - 1)
    )
    return keys_seen(seq_lens, query_lens, first, last, xp)


def keys_seen(seq_lens: Any, query_lens: Any, first: Any, last: Any, xp: Any = jnp) -> Any:
    """Returns how many keys the query tokens `first` .. `last` see behind a causal mask.

    seq_lens: 0 or more.
    """
    last = xp.minimum(last, query_lens - 1)
    keys = seq_lens - query_lens + last + 1
    return xp.where(first < query_lens, xp.maximum(keys, 0), 0)


def query_lens_of_plan(
    query_lens: jax.Array | None, seq_lens: jax.Array, num_tokens: int, block_size: int
) -> jax.Array | None:
    """Returns the query_lens to plan for, behind a causal mask; None: for any.

    query_lens: as in the attention op. None: every request has all num_tokens tokens. Up to
        block_size of them hide less than a block from each other, so the plan is for any then.
    """
    if query_lens is None and num_tokens > block_size:
        return jnp.full_like(seq_lens, num_tokens)
    return query_lens


def num_heads_of_plan(
    query_lens: Any | None, num_heads: Any, *, rows: int, batch: int, tile: int
) -> int:
    """Returns num_heads, or 0 if all tiles of a request have the same blocks.

    They have without query_lens, and if a request has only one tile or only one token.
    """
    if query_lens is None:
        return 0
    num_heads = checks.require_positive("num_heads", num_heads)
    if rows % num_heads:
        raise ValueError(f"num_heads must divide rows = {rows}, got {num_heads}")
    check_query_lens(query_lens, batch, rows // num_heads)
    return 0 if rows <= tile or rows == num_heads else num_heads


def check_query_lens(query_lens: Any, batch: int, num_tokens: int) -> None:
    """Raises TypeError or ValueError unless query_lens are [B] int32 in 0 .. num_tokens."""
    checks.require_array("query_lens", query_lens)
    checks.require_shape("query_lens", query_lens, "[B]", batch)
    checks.require_int32("query_lens", query_lens)
    if checks.is_concrete(query_lens):
        lengths = np.asarray(query_lens)
        for request in np.flatnonzero((lengths < 0) | (lengths > num_tokens)):
            raise ValueError(
                f"query_lens[{request}] must be in 0 .. {num_tokens}, got {lengths[request]}"
            )
