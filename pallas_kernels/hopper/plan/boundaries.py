"""The line of tiles in a CTA's shared memory, and the boundaries of each candidate on it.

A boundary is known by its tile and by the blocks of this tile before it. The JAX version has its
place on the line alone, and searches for the rest.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from mla_jax.splits.line import (
    LARGEST,
    blocks_before,
    blocks_in_steps,
    doublings,
    quotient,
    remainder,
    share_of,
    without_spread_overhead,
)
from mla_jax.splits.tile_keys import keys_seen
from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.plan.call import Inputs, PlanCall, Scratch


class Boundary(NamedTuple):
    """Where the range of one worker ends and that of the next one begins."""

    place: Any  # on the line
    cost: Any  # of all work before it
    tile: Any  # that it is in, or behind
    taken: Any  # blocks of this tile before it
    inner: Any  # 1: it splits the tile
    rank: Any  # how many tiles start before it


@dataclasses.dataclass(frozen=True)
class CtaLine:
    """The line in shared memory, and its end. Arrays have one int32 per thread.

    Methods that take and return lists have an entry per boundary of a thread, so that the loads of
    their searches are in flight at the same time.
    """

    g: Backend
    call: PlanCall
    scratch: Scratch
    length: Any  # places of the line
    cost: Any  # of all tiles
    shift: Any  # a place is 2^shift KV blocks

    @staticmethod
    def lay(g: Backend, call: PlanCall, inputs: Inputs, scratch: Scratch) -> "CtaLine":
        """Writes the line to shared memory, and returns it."""
        balance = call.balance
        first = g.thread_index() * call.per_thread
        entries = [first + i for i in range(call.per_thread)]
        tiles = [jnp.minimum(entry, call.num_tiles - 1) for entry in entries]
        requests = [remainder(tile, call.batch) for tile in tiles]
        lens = [g.load_indexed(inputs.seq_lens, request) for request in requests]
        keys = [jnp.clip(length, 0, call.longest) for length in lens]
        shift = jnp.zeros_like(first)
        if call.unit_steps:
            upper = [
                jnp.where(entry < call.batch, _in_steps(call, length), 0)
                for entry, length in zip(entries, keys, strict=True)
            ]
            total = g.sum_over_threads(sum(upper[1:], upper[0]), scratch.units)
            shift = doublings(total * sum(balance.costs.full), call.unit_steps)
        if balance.num_heads:
            queries = [g.load_indexed(inputs.query_lens, request) for request in requests]
            seen = zip(tiles, keys, queries, strict=True)
            keys = [_keys_of_tile(call, *one) for one in seen]
        kv_blocks = [_blocks_in(call, count) for count in keys]
        blocks = [jnp.minimum(((count - 1) >> shift) + 1, balance.most) for count in kv_blocks]
        exists = [entry < call.num_tiles for entry in entries]
        places, costs = [], []
        for count, valid in zip(blocks, exists, strict=True):
            places.append(jnp.where(valid, jnp.maximum(count, 1), 0))
            costs.append(jnp.where(valid, count + call.overhead, 0))
        (edge, cost), (length, total) = g.scan(
            [sum(places[1:], places[0]), sum(costs[1:], costs[0])], jnp.add, 0, scratch.line
        )
        for i, entry in enumerate(entries):
            behind = entry > call.num_tiles  # The searches must not find these.
            g.store_indexed(scratch.edge, entry, jnp.where(behind, LARGEST, edge))
            g.store_indexed(scratch.cost, entry, jnp.where(behind, LARGEST, cost))
            g.store_indexed(scratch.kv_blocks, entry, kv_blocks[i])
            edge, cost = edge + places[i], cost + costs[i]
        g.wait_for_warpgroup()
        return CtaLine(g, call, scratch, length, total, shift)

    def shares_of(
        self, workers: Sequence[Any], shares: Sequence[tuple], count: Any, spread: Any
    ) -> list[Boundary]:
        """Returns the boundaries before these workers in equal shares for `count` workers."""
        most = self.call.balance.num_workers
        tiles = self.tiles_at([share for share, _ in shares])
        boundaries = []
        for worker, (share, rest), tile in zip(workers, shares, tiles, strict=True):
            start, blocks = self.start_and_blocks(tile)
            inside = share - start
            spread_out = without_spread_overhead(
                inside, rest, blocks, count, self.call.overhead, most
            )
            inside = jnp.where(spread, spread_out, inside - self.call.overhead)
            taken = blocks_before(inside, blocks, 1, 1, self.call.overhead)
            one = self.boundary(tile, taken, start, blocks)
            at_end = worker >= count
            num_tiles = self.call.num_tiles
            boundaries.append(
                Boundary(
                    place=jnp.where(at_end, self.length, one.place),
                    cost=jnp.where(at_end, self.cost, one.cost),
                    tile=tile,
                    taken=taken,
                    inner=jnp.where(at_end, 0, one.inner),
                    rank=jnp.where(at_end, num_tiles, one.rank),
                )
            )
        return boundaries

    def edges(self, workers: Sequence[Any], num_workers: int) -> list[Boundary]:
        """Returns the boundaries before these workers if no tile is split."""
        shares = [share_of(worker, self.cost, num_workers)[0] for worker in workers]
        boundaries = []
        for share, tile in zip(shares, self.tiles_at(shares), strict=True):
            start, stop = self.load("cost", tile), self.load("cost", tile + 1)
            edge = tile + jnp.where(start + ((stop - start) >> 1) < share, 1, 0)
            boundaries.append(
                Boundary(
                    place=self.load("edge", edge),
                    cost=self.load("cost", edge),
                    tile=edge,
                    taken=jnp.zeros_like(edge),
                    inner=jnp.zeros_like(edge),
                    rank=edge,
                )
            )
        return boundaries

    def halves(self, workers: Sequence[Any]) -> list[Boundary]:
        """Returns the boundaries if pairs of workers get whole tiles and each gets half of them."""
        pairs = self.call.balance.num_workers // 2
        begins = self.edges([worker >> 1 for worker in workers], pairs)
        ends = self.edges([jnp.minimum((w >> 1) + 1, pairs) for w in workers], pairs)
        tiles = self.tiles_at(
            [b.cost + ((e.cost - b.cost) >> 1) for b, e in zip(begins, ends, strict=True)]
        )
        boundaries = []
        for worker, begin, stop, tile in zip(workers, begins, ends, tiles, strict=True):
            start, blocks = self.start_and_blocks(tile)
            before, after = start - begin.cost, stop.cost - self.load("cost", tile + 1)
            taken = blocks_before((after - before + blocks) >> 1, blocks, 1, 1, self.call.overhead)
            middle = self.boundary(tile, taken, start, blocks)
            is_middle = ((worker & 1) == 1) & (begin.place < stop.place)
            boundaries.append(choose(is_middle, middle, begin))
        return boundaries

    def boundary(self, tile: Any, taken: Any, start: Any, blocks: Any) -> Boundary:
        """Returns the boundary behind so many blocks of a tile."""
        behind_some = taken > 0
        return Boundary(
            place=self.load("edge", tile) + taken,
            cost=start + taken + jnp.where(behind_some, self.call.overhead, 0),
            tile=tile,
            taken=taken,
            inner=jnp.where(behind_some & (taken < blocks), 1, 0),
            rank=tile + jnp.where(behind_some, 1, 0),
        )

    def tiles_at(self, costs: Sequence[Any]) -> list[Any]:
        """Returns the last tile with no more than this cost before it, for each."""
        tiles = [jnp.zeros_like(cost) for cost in costs]
        step = self.call.search_size // 2
        while step:
            nexts = [tile + step for tile in tiles]
            starts = [self.load("cost", tile) for tile in nexts]
            tiles = [
                jnp.where(start <= cost, following, tile)
                for start, cost, following, tile in zip(starts, costs, nexts, tiles, strict=True)
            ]
            step //= 2
        return [jnp.minimum(tile, self.call.num_tiles - 1) for tile in tiles]

    def start_and_blocks(self, tile: Any) -> tuple[Any, Any]:
        """Returns the cost of all tiles before one, and how many blocks it has."""
        start = self.load("cost", tile)
        return start, self.load("cost", tile + 1) - start - self.call.overhead

    def load(self, field: str, index: Any) -> Any:
        return self.g.load_indexed(getattr(self.scratch, field), index)


def _blocks_in(call: PlanCall, keys: Any) -> Any:
    return ((keys - 1) >> (call.balance.costs.block_size.bit_length() - 1)) + 1


def _in_steps(call: PlanCall, keys: Any) -> Any:
    return blocks_in_steps(_blocks_in(call, keys), call.unit_steps, most=call.balance.most)


def _keys_of_tile(call: PlanCall, tile: Any, seq_len: Any, query_len: Any) -> Any:
    """Returns how many keys a tile sees behind a causal mask."""
    rows = call.balance.costs.rows_per_tile
    row = quotient(tile, call.batch) * rows
    first, last = (quotient(at, call.balance.num_heads) for at in (row, row + rows - 1))
    return keys_seen(seq_len, query_len, first, last)


def choose(condition: Any, one: Boundary, other: Boundary) -> Boundary:
    return Boundary(*(jnp.where(condition, x, y) for x, y in zip(one, other, strict=True)))
