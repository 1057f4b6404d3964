"""What a piece of split-KV work costs: the two models of the field that plans are balanced by.

- "blocks": FlashMLA's tile scheduler (get_mla_metadata): a piece costs its blocks + `overhead`,
  5 for blocks of 64 tokens on Hopper.
- "fia": Ascend's fused-infer-attention tiling: a block costs 6 * ceil(rows / 16) +
  10 * ceil(tokens / 64), and a piece nothing more.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_jax import checks

COST_MODELS = ("blocks", "fia")


class SplitCosts(NamedTuple):
    """A model's numbers for one shape of work; hashable, a static argument of jit."""

    overhead: int  # of a piece
    by_rows: tuple[int, ...]  # of a block, for the rows of each row tile
    by_tokens: int  # of a block, for every 64 of its tokens begun
    block_size: int
    rows_per_tile: int

    @property
    def num_row_tiles(self) -> int:
        """Row tiles of a request."""
        return len(self.by_rows)

    def block_costs(self, seq_lens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """int32 costs of a full block [num_row_tiles], and of each request's last
        [B, num_row_tiles]."""
        by_rows = jnp.asarray(self.by_rows, jnp.int32)
        rest = (seq_lens - 1) % self.block_size + 1
        last = by_rows + self.by_tokens * ((rest + 63) // 64)[:, None]
        return by_rows + self.by_tokens * math.ceil(self.block_size / 64), last


def split_costs(
    cost_model: str, *, rows: int, rows_per_tile: int, block_size: int, overhead: int
) -> SplitCosts:
    """The model of that name for requests of `rows` query rows; `overhead` in blocks.

    Raises ValueError naming the argument that can't be.
    """
    checks.require_one_of("cost_model", cost_model, COST_MODELS)
    checks.require_positive("rows", rows)
    checks.require_positive("rows_per_tile", rows_per_tile)
    checks.require_positive("block_size", block_size)
    if overhead < 0:
        raise ValueError(f"overhead must be at least 0, got {overhead}")
    full_tiles, rest = divmod(rows, rows_per_tile)
    tiles = [rows_per_tile] * full_tiles + [rest] * (rest > 0)
    if cost_model == "blocks":
        return SplitCosts(overhead, (1,) * len(tiles), 0, block_size, rows_per_tile)
    by_rows = tuple(6 * math.ceil(tile / 16) for tile in tiles)
    return SplitCosts(0, by_rows, 10, block_size, rows_per_tile)
