"""Writes the plan of one candidate: its work items, its workers and its partials."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mla_jax.splits.line import quotient, remainder
from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.plan.boundaries import Boundary, CtaLine
from pallas_kernels.hopper.plan.call import ITEM_FIELDS, THREADS, Outputs, PlanCall, Scratch

UNUSED = (-1, 0, 0, 0, -1)  # the fields of an item that does not exist


@dataclasses.dataclass(frozen=True)
class PlanWriter:
    """The CTA that writes the plan. Arrays have one int32 per thread.

    A work item starts at each tile and at each split. So the index of an item is the number of
    tiles and splits before it, and nothing is sorted.
    """

    g: Backend
    call: PlanCall
    outputs: Outputs
    scratch: Scratch
    line: CtaLine

    @property
    def workers(self) -> list[Any]:
        """The workers before which a thread's boundaries are, and the one before these."""
        per_thread = -(-(self.call.balance.num_workers + 1) // THREADS)
        first = self.g.thread_index() * per_thread
        return [first + i for i in range(-1, per_thread)]

    def write(self, boundaries: Sequence[Boundary]) -> None:
        """Writes the plan with these boundaries before `workers`."""
        own, splits = list(zip(self.workers, boundaries, strict=True))[1:], []
        for before, one in itertools.pairwise(boundaries):
            is_new = one.inner & jnp.where(one.place != before.place, 1, 0)
            in_same_tile = before.inner & jnp.where(before.tile == one.tile, 1, 0)
            splits.append((is_new, is_new & (1 - in_same_tile)))
        counts = [sum(x[1:], x[0]) for x in zip(*splits, strict=True)]
        (index, split_tiles), totals = self.g.scan(counts, jnp.add, 0, self.scratch.splits)
        indices = []
        for (worker, one), (is_new, is_first) in zip(own, splits, strict=True):
            split_tiles = split_tiles + is_first
            for field, value in (
                ("split_tile", one.tile),
                ("split_taken", one.taken),
                ("split_tiles", split_tiles),
            ):
                self.g.store_indexed(getattr(self.scratch, field), index, value, is_new)
            exists = jnp.where(worker <= self.call.balance.num_workers, 1, 0)
            # An earlier boundary at the same place has the split and its work item.
            item = one.rank + index - (one.inner & (1 - is_new))
            self.g.store_indexed(self.outputs.worker_start, worker, item, exists)
            indices.append((index, split_tiles, is_new))
            index = index + is_new
        self.g.wait_for_warpgroup()
        for (_, one), (index, split_tiles, is_new) in zip(own, indices, strict=True):
            self.store_split(one, index, split_tiles, is_new, totals[0])
        self.store_tiles(*totals)
        self.store_unused(totals[0])

    def store_split(
        self, one: Boundary, index: Any, split_tiles: Any, is_new: Any, num_splits: Any
    ) -> None:
        """Stores the work item behind the split of each thread that has a new one.

        index: of the split. split_tiles: how many tiles are split up to this one.
        """
        following = jnp.minimum(index + 1, self.call.most_splits - 1)
        goes_on = (index + 1 < num_splits) & (self.line.load("split_tile", following) == one.tile)
        stop = self.line.load("split_taken", following) << self.line.shift
        block_end = jnp.where(goes_on, stop, self.line.load("kv_blocks", one.tile))
        fields = (one.taken << self.line.shift, block_end, index + split_tiles)
        self.store_item(one.tile + 1 + index, self.names(one.tile) + fields, is_new)

    def store_tiles(self, num_splits: Any, num_split_tiles: Any) -> None:
        """Stores the first work item of each tile, and where its partials start."""
        call = self.call
        entries = [self.g.thread_index() + first for first in range(0, call.num_tiles + 1, THREADS)]
        # How many splits are in the tiles before.
        counts = [jnp.zeros_like(entry) for entry in entries]
        step = call.most_splits // 2
        while step:
            nexts = [count + step for count in counts]
            found = [self.line.load("split_tile", following - 1) for following in nexts]
            counts = [
                jnp.where((following <= num_splits) & (tile < entry), following, count)
                for following, tile, entry, count in zip(nexts, found, entries, counts, strict=True)
            ]
            step //= 2
        for entry, count in zip(entries, counts, strict=True):
            tile = jnp.minimum(entry, call.num_tiles - 1)
            is_split = (count < num_splits) & (self.line.load("split_tile", count) == entry)
            before = self.line.load("split_tiles", jnp.maximum(count - 1, 0))
            first_partial = count + jnp.where(count > 0, before, 0)
            stop = self.line.load("split_taken", count) << self.line.shift
            block_end = jnp.where(is_split, stop, self.line.load("kv_blocks", tile))
            partial = jnp.where(is_split, first_partial, -1)
            fields = (jnp.zeros_like(tile), block_end, partial)
            is_tile = jnp.where(entry < call.num_tiles, 1, 0)
            self.store_item(entry + count, self.names(tile) + fields, is_tile)
            exists = jnp.where(entry <= call.num_tiles, 1, 0)
            self.g.store_indexed(self.outputs.tile_partial_start, entry, first_partial, exists)

    def store_unused(self, num_splits: Any) -> None:
        thread, call = self.g.thread_index(), self.call
        for first in range(0, call.balance.num_workers, THREADS):
            item = call.num_tiles + num_splits + first + thread
            fields = [jnp.full_like(thread, value) for value in UNUSED]
            self.store_item(item, fields, jnp.where(item < call.num_items, 1, 0))

    def names(self, tile: Any) -> tuple[Any, Any]:
        """Returns a tile's request and row tile."""
        return remainder(tile, self.call.batch), quotient(tile, self.call.batch)

    def store_item(self, index: Any, fields: Sequence[Any], exists: Any) -> None:
        for name, value in zip(ITEM_FIELDS, fields, strict=True):
            self.g.store_indexed(getattr(self.outputs, name), index, value, exists)
