"""What both transposed decode kernels do alike: mask scores, and combine split tiles."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs, Requests, float_struct
from pallas_kernels.hopper.parts.combine import (
    CombineRefs,
    OutputRows,
    TileCounter,
    combine_shares,
    divide_into_rows,
)
from pallas_kernels.hopper.work_items import BLOCK, WorkItem


class Partials(NamedTuple):
    """The results of the work items of split tiles, in arrays that the launch returns."""

    o: Any  # [num_partials, rows_per_tile, kv_lora_rank] of call.partial_dtype
    lse: Any  # [num_partials, rows_per_tile] float32

    @staticmethod
    def structs(call: DecodeCall) -> "Partials":
        """Returns the shape and dtype of each array."""
        shape = call.num_partials, call.config.rows_per_tile
        return Partials(
            float_struct(*shape, call.kv_lora_rank, dtype=call.partial_dtype),
            float_struct(*shape),
        )


class Mask(NamedTuple):
    """Which keys the rows of a tile see, for scores with a token per row and a query per column."""

    limit: Any  # [BLOCK, rows_per_tile] int32: a query sees the keys before this one
    position: Any  # [BLOCK, rows_per_tile] int32: of a token in its block

    @staticmethod
    def of_tile(
        g: Backend, call: DecodeCall, first_row: Any, kv_len: Any, query_len: Any
    ) -> "Mask":
        """Returns the mask of the tile that begins at first_row of a request."""
        tile = (BLOCK, call.config.rows_per_tile)
        token = (g.iota(tile, 1) + first_row) // call.num_heads
        limit = jnp.minimum(kv_len - query_len + token + 1, kv_len) if call.causal else kv_len
        return Mask(jnp.where(token < query_len, limit, 0), g.iota(tile, 0))

    def visible(self, start: Any) -> Any:
        """Returns which scores of the block count whose first key is `start`."""
        return self.position + start < self.limit


def require_whole_tiles(call: DecodeCall) -> None:
    """Raises ValueError if the rows of q are not a multiple of a tile's."""
    have, rows = call.q.shape[1], call.config.rows_per_tile
    if have % rows:
        raise ValueError(f"q must have a multiple of {rows} rows (rows_per_tile), got {have}")


def rows_of(call: DecodeCall, request: Any, row_tile: Any) -> Rows:
    """Returns the rows of a tile in the outputs."""
    height = call.config.rows_per_tile
    return call.rows_of(request, row_tile * height, height)


@dataclasses.dataclass(frozen=True)
class SplitTiles:
    """Combines the partial results of split tiles inside of the launch.

    writers: how many warpgroups of a CTA store each partial result.
    combining: how many warpgroups of a CTA combine partial results.
    """

    g: Backend
    call: DecodeCall
    requests: Requests
    outputs: Outputs
    partials: Partials
    writers: int
    combining: int

    def _meeting(self, request: Any, row_tile: Any, num_partials: Any) -> TileCounter:
        """Returns the counter through which the CTAs of a tile wait for each other."""
        tile = self.call.plan.tile_of(request, row_tile)
        leaving, combining = self.writers * num_partials, self.combining * num_partials
        return TileCounter(self.g, self.requests.counters, tile, leaving, combining)

    def signal(self, item: WorkItem) -> None:
        """Signals that the calling warpgroup has stored its part of the item's partial result."""
        if self.call.combines:
            self._meeting(item.request, item.row_tile, item.num_partials).count_partial()

    def combine(self, items: tuple[Any, Any], warpgroup: Any) -> None:
        """Combines the calling warpgroup's share of the split tiles that its CTA has items of."""
        call = self.call
        combine_shares(
            divide_into_rows(
                self.g,
                call.plan,
                call.config.rows_per_tile,
                call.kv_lora_rank,
                warpgroups=self.combining,
            ),
            CombineRefs(*self.partials, *self.outputs),
            self.requests.work.items,
            items,
            counter_of=self._meeting,
            place=lambda request, row_tile: OutputRows(rows_of(call, request, row_tile), 0),
            wg=warpgroup,
            wgs=self.combining,
        )
