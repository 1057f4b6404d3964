"""What the kernels that compute O^T do alike: mask scores, store results, combine split tiles.

These are `decode_transposed`, `decode_transposed_int8` and `decode_int8`. They store partial
results by rows.
"""

import dataclasses
from collections.abc import Callable
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
from pallas_kernels.hopper.parts.visible_keys import VisibleKeys
from pallas_kernels.hopper.work_items import BLOCK


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
        limit = jnp.minimum(VisibleKeys.of(call, kv_len, query_len).count(token), kv_len)
        return Mask(jnp.where(token < query_len, limit, 0), g.iota(tile, 0))

    def visible(self, start: Any) -> Any:
        """Returns which scores of the block count whose first key is `start`."""
        return self.position + start < self.limit


def require_whole_tiles(call: DecodeCall) -> None:
    """Raises ValueError if the rows of q are not a multiple of a tile's."""
    have, rows = call.q.rows, call.config.rows_per_tile
    if have % rows:
        raise ValueError(f"q must have a multiple of {rows} rows (rows_per_tile), got {have}")


# Stores o and lse of a work item to rows of the outputs, or to rows of the partial results.
type Write = Callable[[Rows, Outputs | Partials], None]


@dataclasses.dataclass(frozen=True)
class Results:
    """Stores the results of work items, and combines the partial results of split tiles.

    writers: how many warpgroups of a CTA store each partial result.
    combining: how many warpgroups of a CTA combine partial results.
    in_flight: as in `combine.divide_into_rows`.
    """

    g: Backend
    call: DecodeCall
    requests: Requests
    outputs: Outputs
    partials: Partials
    writers: int
    combining: int
    in_flight: int | None = None

    def rows_of(self, request: Any, row_tile: Any) -> Rows:
        """Returns the rows of a tile in the outputs."""
        height = self.call.plan.rows_per_tile
        return self.call.rows_of(request, row_tile * height, height)

    # An item needs the fields request, row_tile, partial and num_partials of a `WorkItem`.
    def store_output(self, item: Any, write: Write) -> None:
        """Stores the result of an item as output."""
        write(self.rows_of(item.request, item.row_tile), self.outputs)

    def store_partial(self, item: Any, write: Write) -> None:
        """Stores the result of an item as its partial result.

        Where the launch combines split tiles, the calling warpgroup then signals that its part of
        the partial result is stored.
        """
        write(Rows.of_partial((item.partial,), 0, self.call.plan.rows_per_tile), self.partials)
        if self.call.combines:
            self._counter_of(item.request, item.row_tile, item.num_partials).count_partial()

    def _counter_of(self, request: Any, row_tile: Any, num_partials: Any) -> TileCounter:
        """Returns the counter through which the CTAs of a tile wait for each other."""
        tile = self.call.plan.tile_of(request, row_tile)
        writers, combining = self.writers * num_partials, self.combining * num_partials
        return TileCounter(self.g, self.requests.work.counters, tile, writers, combining)

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
                in_flight=self.in_flight,
            ),
            CombineRefs(*self.partials, *self.outputs),
            self.requests.work.items,
            items,
            counter_of=self._counter_of,
            place=lambda request, row_tile: OutputRows(self.rows_of(request, row_tile), 0),
            warpgroup=warpgroup,
            warpgroups=self.combining,
        )
