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
MOST_WORK = 2**29  # a quarter of int32, of what a plan's pieces cost at the least
_MOST_ROW_TILES = 2**20
_LARGEST = 2**31 - 1


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

    @property
    def full(self) -> tuple[int, ...]:
        """Costs of a full block, for the rows of each row tile."""
        by_tokens = self.by_tokens * math.ceil(self.block_size / 64)
        return tuple(rows + by_tokens for rows in self.by_rows)

    @property
    def least(self) -> int:
        """What one request costs, if each of its row tiles is a piece of one full block."""
        return sum(self.full) + self.num_row_tiles * self.overhead

    def require_work(self, batch: int) -> None:
        """Raises ValueError where already one block of each tile is past MOST_WORK."""
        if batch * self.least > MOST_WORK:
            raise ValueError(
                f"seq_lens, rows, block_size and overhead must be such that one block and one "
                f"overhead of each tile cost at most {MOST_WORK} in all, got {batch * self.least} "
                f"for {batch} requests of {self.num_row_tiles} tiles with overhead {self.overhead}"
            )

    def block_costs(self, seq_lens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """int32 costs of a full block [num_row_tiles], and of each request's last
        [B, num_row_tiles]; seq_lens of 0 or more."""
        by_rows = jnp.asarray(self.by_rows, jnp.int32)
        before_last = (seq_lens - 1) % self.block_size  # tokens of the last block but one
        last = by_rows + self.by_tokens * (before_last // 64 + 1)[:, None]
        return jnp.asarray(self.full, jnp.int32), last


def split_costs(
    cost_model: str, *, rows: int, rows_per_tile: int, block_size: int, overhead: int
) -> SplitCosts:
    """The model of that name for requests of `rows` query rows; `overhead` in blocks.

    Raises TypeError or ValueError naming the argument that can't be; too many rows or too large an
    overhead are those for which a sum of costs could leave int32.
    """
    checks.require_one_of("cost_model", cost_model, COST_MODELS)
    rows = checks.require_positive("rows", rows)
    rows_per_tile = checks.require_positive("rows_per_tile", rows_per_tile)
    block_size = checks.require_positive("block_size", block_size)
    overhead = checks.require_int("overhead", overhead, 0)
    _require_at_most("block_size", block_size, _LARGEST)
    _require_at_most("overhead", overhead, MOST_WORK)
    full_tiles, rest = divmod(rows, rows_per_tile)
    _require_at_most("row tiles, rows / rows_per_tile,", full_tiles + (rest > 0), _MOST_ROW_TILES)
    tiles = [rows_per_tile] * full_tiles + [rest] * (rest > 0)
    if cost_model == "blocks":
        costs = SplitCosts(overhead, (1,) * len(tiles), 0, block_size, rows_per_tile)
    else:
        by_rows = tuple(6 * math.ceil(tile / 16) for tile in tiles)
        costs = SplitCosts(0, by_rows, 10, block_size, rows_per_tile)
    costs.require_work(1)
    return costs


def _require_at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
