"""Writes the plan of one candidate and its work list."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from mla_jax.splits.line import quotient, remainder
from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.plan.boundaries import Boundary, CtaLine
from pallas_kernels.hopper.plan.call import THREADS, Outputs, PlanCall, Scratch
from pallas_kernels.hopper.work_items import (
    ITEM_FIELDS,
    PARTIAL,
    PLANNED,
    WorkItem,
    kept_partial,
)

UNUSED = WorkItem(-1, 0, 0, 0, -1, 0, 0)  # an item that does not exist


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
            self.store("split_tile", index, one.tile, is_new)
            self.store("split_taken", index, one.taken, is_new)
            self.store("split_tiles", index, split_tiles, is_new)
            self.store("first_split", split_tiles - 1, index, is_first)
            # An earlier boundary at the same place has the split and its work item.
            is_repeated = one.inner & (1 - is_new)
            item = one.rank + index - is_repeated
            exists = jnp.where(worker <= self.call.balance.num_workers, 1, 0)
            self.g.store_indexed(self.outputs.worker_start, worker, item, exists)
            self.store("worker_item", worker, item, exists)
            self.store("worker_partial", worker, index + split_tiles - is_repeated, exists)
            indices.append((index, split_tiles, is_new))
            index = index + is_new
        self.g.wait_for_warpgroup()
        for (_, one), (index, split_tiles, is_new) in zip(own, indices, strict=True):
            self.list_split(one, index, split_tiles, is_new, *totals)
        self.list_tiles(*totals)
        self.list_unused(totals[0])
        self.g.wait_for_warpgroup()
        if self.call.finish == "in_pairs":
            self.share_in_pairs()
            self.g.wait_for_warpgroup()
        self.store_ranges()
        chunks = -(-self.call.num_items // THREADS)
        lax.fori_loop(0, chunks, lambda chunk, _: self.store_items(chunk), None)

    # The items are listed in shared memory and then stored, because a worker's range has its first
    # item, and pairs change items.

    def list_split(
        self,
        one: Boundary,
        index: Any,
        split_tiles: Any,
        is_new: Any,
        num_splits: Any,
        num_split_tiles: Any,
    ) -> None:
        """Lists the work item behind the split of each thread that has a new one.

        index: of the split. split_tiles: how many tiles are split up to this one.
        """
        following = jnp.minimum(index + 1, self.call.most_splits - 1)
        goes_on = (index + 1 < num_splits) & (self.line.load("split_tile", following) == one.tile)
        stop = self.line.load("split_taken", following) << self.line.shift
        block_end = jnp.where(goes_on, stop, self.line.load("kv_blocks", one.tile))
        first = self.line.load("first_split", jnp.maximum(split_tiles - 1, 0))
        stop = self.next_split(split_tiles, num_splits, num_split_tiles)
        item = WorkItem(
            *self.names(one.tile),
            block_start=one.taken << self.line.shift,
            block_end=block_end,
            partial=index + split_tiles,
            first_partial=first + split_tiles - 1,
            num_partials=stop - first + 1,
        )
        self.list_item(one.tile + 1 + index, item, is_new)

    def next_split(self, split_tiles: Any, num_splits: Any, num_split_tiles: Any) -> Any:
        """Returns the first split behind the first `split_tiles` split tiles."""
        place = jnp.minimum(split_tiles, self.call.most_splits - 1)
        following = self.line.load("first_split", place)
        return jnp.where(split_tiles < num_split_tiles, following, num_splits)

    def list_tiles(self, num_splits: Any, num_split_tiles: Any) -> None:
        """Lists the first work item of each tile, and stores where its partials start."""
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
            split_tiles = self.line.load("split_tiles", count)
            end = self.next_split(jnp.where(is_split, split_tiles, 0), num_splits, num_split_tiles)
            item = WorkItem(
                *self.names(tile),
                block_start=jnp.zeros_like(tile),
                block_end=block_end,
                partial=jnp.where(is_split, first_partial, -1),
                first_partial=first_partial,
                num_partials=jnp.where(is_split, end - count + 1, 0),
            )
            self.list_item(entry + count, item, jnp.where(entry < call.num_tiles, 1, 0))
            exists = jnp.where(entry <= call.num_tiles, 1, 0)
            self.g.store_indexed(self.outputs.tile_partial_start, entry, first_partial, exists)

    def list_unused(self, num_splits: Any) -> None:
        thread, call = self.g.thread_index(), self.call
        item = WorkItem(*(jnp.full_like(thread, value) for value in UNUSED))
        for first in range(0, call.balance.num_workers, THREADS):
            index = call.num_tiles + num_splits + first + thread
            self.list_item(index, item, jnp.where(index < call.num_items, 1, 0))

    def share_in_pairs(self) -> None:
        """Marks the items of tiles that a pair combines by itself (`work_items.work_list`)."""
        num_pairs = self.call.balance.num_workers // 2
        for first in range(0, num_pairs, THREADS):
            pair = self.g.thread_index() + first
            exists = jnp.where(pair < num_pairs, 1, 0)
            workers = [jnp.minimum(2 * pair + i, 2 * num_pairs) for i in range(3)]
            begin, middle, end = (self.line.load("worker_item", worker) for worker in workers)
            left = jnp.maximum(middle - 1, 0)
            one, other = self.item(left), self.item(middle)
            before, _, behind = (self.line.load("worker_partial", worker) for worker in workers)
            alone = (begin < middle) & (middle < end) & (behind - before == 2)
            alone &= (one.request == other.request) & (one.row_tile == other.row_tile)
            alone &= one.num_partials == 2
            is_shared = exists & jnp.where(alone, 1, 0)
            self.store("is_shared", pair, is_shared, exists)
            for index, item in ((left, one), (middle, other)):
                place = PARTIAL * self.call.num_items + index
                self.store("items", place, kept_partial(item.partial), is_shared)

    def store_ranges(self) -> None:
        """Stores the first item and the range of each worker."""
        num_workers, width = self.call.balance.num_workers, self.call.range_fields
        for first_worker in range(0, num_workers, THREADS):
            worker = self.g.thread_index() + first_worker
            exists = jnp.where(worker < num_workers, 1, 0)
            worker = jnp.minimum(worker, num_workers - 1)
            first = self.line.load("worker_item", worker)
            stop = self.line.load("worker_item", worker + 1)
            head, steps = first, list[Any]()
            if self.call.finish == "in_pairs":
                is_backwards = (self.line.load("is_shared", worker >> 1) & worker & 1) == 1
                head = jnp.where(is_backwards, stop - 1, first)
                steps = [jnp.where(is_backwards, -1, 1)]
            fields = (*self.finished(self.item(head)), first, stop, *steps)
            for i, value in enumerate(fields):
                self.g.store_indexed(self.outputs.ranges, worker * width + i, value, exists)

    def store_items(self, chunk: Any) -> None:
        """Stores 128 items to the plan and to the work list."""
        index = self.g.thread_index() + chunk * THREADS
        exists = jnp.where(index < self.call.num_items, 1, 0)
        item = self.item(jnp.minimum(index, self.call.num_items - 1))
        planned = item._replace(partial=item.own_partial)
        for name in PLANNED:
            array = getattr(self.outputs, name)
            self.g.store_indexed(array, index, getattr(planned, name), exists)
        for i, value in enumerate(self.finished(item)):
            self.g.store_indexed(self.outputs.items, index * ITEM_FIELDS + i, value, exists)

    def finished(self, item: WorkItem) -> WorkItem:
        """Returns an item as in the work list."""
        if self.call.finish != "by_first":
            return item
        two = (item.partial >= 0) & (item.num_partials == 2)
        keeps, stores = two & (item.partial == item.first_partial), two
        stores &= item.partial > item.first_partial
        return item._replace(
            partial=jnp.where(keeps, kept_partial(item.partial), item.partial),
            first_partial=jnp.where(stores, item.partial, item.first_partial),
            num_partials=item.num_partials - jnp.where(stores, 1, 0),
        )

    def names(self, tile: Any) -> tuple[Any, Any]:
        """Returns a tile's request and row tile."""
        return remainder(tile, self.call.batch), quotient(tile, self.call.batch)

    def list_item(self, index: Any, item: WorkItem, exists: Any) -> None:
        for i, value in enumerate(item):
            self.store("items", i * self.call.num_items + index, value, exists)

    def item(self, index: Any) -> WorkItem:
        """Returns a listed item."""
        places = [i * self.call.num_items + index for i in range(ITEM_FIELDS)]
        return WorkItem(*(self.line.load("items", place) for place in places))

    def store(self, field: str, index: Any, value: Any, where: Any) -> None:
        self.g.store_indexed(getattr(self.scratch, field), index, value, where)
