"""Cost models for work items: a planner balances the sum of these costs over the workers.

- "blocks" is the model of FlashMLA's tile scheduler (get_mla_metadata). A work item costs its KV
  blocks plus `overhead`, which is 5 on Hopper with blocks of 64 tokens.
- "fia" is the model of Ascend's fused-infer-attention tiling. A block costs 6 * ceil(rows / 16) +
  10 * ceil(tokens / 64), and a work item has no overhead.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_jax import checks
from mla_jax.splits.tile_keys import tile_keys

COST_MODELS = ("blocks", "fia")
# Upper bound of a plan's total cost with one block per tile. It is a quarter of int32's range,
# which leaves room for the sums that the planner makes.
MOST_WORK = 2**29
_MOST_ROW_TILES = 2**20
MOST_ROWS = 64 * _MOST_ROW_TILES  # per request, in tiles of 64 rows
_LARGEST = 2**31 - 1


class SplitCosts(NamedTuple):
    """The numbers of a cost model for one shape of work; hashable, so jit takes it as static."""

    overhead: int  # cost per work item, besides its blocks
    by_rows: tuple[int, ...]  # [num_row_tiles] cost per block that depends on the tile's rows
    by_tokens: int  # cost per block and 64 tokens of it, rounded up
    block_size: int
    rows_per_tile: int

    @property
    def num_row_tiles(self) -> int:
        """Row tiles per request."""
        return len(self.by_rows)

    @property
    def full(self) -> tuple[int, ...]:
        """Cost of a full block of each row tile."""
        by_tokens = self.by_tokens * math.ceil(self.block_size / 64)
        return tuple(rows + by_tokens for rows in self.by_rows)

    @property
    def least(self) -> int:
        """Cost of one request if each of its row tiles is a work item of one full block."""
        return sum(self.full) + self.num_row_tiles * self.overhead

    def require_work(self, batch: int) -> None:
        """Raises ValueError if one block per tile already costs more than MOST_WORK."""
        if batch * self.least > MOST_WORK:
            raise ValueError(
                f"seq_lens, rows, block_size and overhead must be such that one block and one "
                f"overhead of each tile cost at most {MOST_WORK} in all, got {batch * self.least} "
                f"for {batch} requests of {self.num_row_tiles} tiles with overhead {self.overhead}"
            )

    def tile_keys(
        self, seq_lens: jax.Array, query_lens: jax.Array | None = None, num_heads: int = 0
    ) -> jax.Array:
        """Returns how many keys each tile sees, as `tile_keys.tile_keys` does."""
        return tile_keys(
            seq_lens,
            query_lens,
            num_row_tiles=self.num_row_tiles,
            rows_per_tile=self.rows_per_tile,
            num_heads=num_heads,
        )

    def block_costs(self, tile_keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns int32 costs of a full block [num_row_tiles] and of the last block of each tile.

        tile_keys: [num_row_tiles, B] int32, 0 or more. The costs of the last blocks are alike.
        """
        by_rows = jnp.asarray(self.by_rows, jnp.int32)
        before_last = (tile_keys - 1) % self.block_size  # the last block's tokens, minus one
        last = by_rows[:, None] + self.by_tokens * (before_last // 64 + 1)
        return jnp.asarray(self.full, jnp.int32), last


def split_costs(
    cost_model: str, *, rows: int, rows_per_tile: int, block_size: int, overhead: int
) -> SplitCosts:
    """Returns the cost model of that name for requests of `rows` query rows.

    overhead: cost of a work item besides its blocks, in blocks.

    Raises TypeError or ValueError that names the invalid argument. Rows and overhead are also
    limited so that no sum of costs can leave int32.
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
