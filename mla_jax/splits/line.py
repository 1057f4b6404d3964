"""The line of all tiles, along which a planner assigns ranges of work to workers.

The line is the work list of a batch: tile after tile, each as long as it has KV blocks. A place is
a position on the line. It counts `unit` KV blocks, and a tile without blocks is one place long, so
that every tile starts at a place of its own. Three tiles of 4, 0 and 3 blocks (unit 1):

    tile      |    0    |1|   2   |
    place      0 1 2 3   4 5 6 7   8 = length
    edge       0         4 5

A boundary is the place at which one worker's range ends and the next one's begins. Boundaries 0, 3
and 8 give worker 0 the first 3 blocks of tile 0, and worker 1 the rest. A boundary inside a tile
splits it into two work items. A boundary at an edge splits nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_jax.splits.costs import SplitCosts
from mla_jax.splits.plan import num_blocks


class Line(NamedTuple):
    """All tiles one after the other, measured in places and in cost; the arrays are int32."""

    kv_blocks: jax.Array  # [T] KV blocks of each tile
    unit: jax.Array | int  # KV blocks per place, a power of two in balanced plans
    blocks: jax.Array  # [T] length of each tile in `unit` KV blocks, 0 for a tile without blocks
    edge: jax.Array  # [T] the place at which the tile starts
    length: jax.Array  # number of places on the line
    cost_start: jax.Array  # [T] cost of all tiles before this one
    cost_total: jax.Array
    full: jax.Array  # [T] cost of a full block
    last: jax.Array  # [T] cost of the tile's last block
    costs: SplitCosts

    @staticmethod
    def lay(tile_keys: jax.Array, costs: SplitCosts, unit: jax.Array | int, most: int) -> "Line":
        """Returns the line of tiles that see so many keys, [num_row_tiles, B].

        Blocks past `most` units per tile are not counted.
        """
        kv_blocks = num_blocks(tile_keys, costs.block_size).ravel()
        full, last = costs.block_costs(tile_keys)
        full, last = jnp.repeat(full, tile_keys.shape[1]), last.ravel()
        blocks = jnp.minimum((kv_blocks - 1) // unit + 1, most)
        cost = jnp.where(blocks > 0, (blocks - 1) * full + last, 0) + costs.overhead
        places = jnp.maximum(blocks, 1)
        end, cost_end = running_sum(places), running_sum(cost)
        return Line(
            kv_blocks=kv_blocks,
            unit=unit,
            blocks=blocks,
            edge=end - places,
            length=end[-1],
            cost_start=cost_end - cost,
            cost_total=cost_end[-1],
            full=full,
            last=last,
            costs=costs,
        )

    def tile_at(self, places: jax.Array) -> jax.Array:
        """Returns the index of the tile that each place is in."""
        return find(self.edge, places, side="right") - 1

    def split_evenly(self, num_workers: int, count: jax.Array, spread: jax.Array) -> jax.Array:
        """Returns boundaries [W + 1] of equal shares for the first `count` workers.

        The other workers get empty ranges. A tile's overhead counts before its blocks. With
        `spread` it is distributed over all of them. The former suits tiles longer than a share, the
        latter suits tiles that are split in two or three.
        """
        share = shares(self.cost_total, num_workers, count)
        tile = find(self.cost_start, share, side="right") - 1
        cost = self.cost_of_blocks(tile)
        worker = jnp.arange(num_workers + 1, dtype=jnp.int32)
        exact = to_float32(worker) * (to_float32(self.cost_total) / to_float32(count))
        part = (exact - to_float32(self.cost_start[tile])) / to_float32(cost + self.costs.overhead)
        inside = jnp.where(
            spread,
            jnp.round(part * to_float32(cost)).astype(jnp.int32),
            share - self.cost_start[tile] - self.costs.overhead,
        )
        place = self.place_in(tile, inside)
        return jnp.where(worker >= count, self.length, place).at[0].set(0)

    def place_in(self, tile: jax.Array, inside: jax.Array) -> jax.Array:
        """Returns the places at which the blocks before them cost `inside`, or a near tile edge.

        An edge replaces a place that would leave a work item shorter than a third of its overhead.
        """
        blocks, full, last = self.blocks[tile], self.full[tile], self.last[tile]
        taken = jnp.clip((inside + full // 2) // full, 0, jnp.maximum(blocks - 1, 0))
        whole = (blocks > 0) & (inside - (blocks - 1) * full >= last - last // 2)
        shortest = max(1, -(-self.costs.overhead // 3))
        taken = jnp.where(taken < shortest, 0, taken)
        taken = jnp.where(whole | ((taken > 0) & (blocks - taken < shortest)), blocks, taken)
        return self.edge[tile] + taken

    def split_at_edges(self, num_workers: int) -> jax.Array:
        """Returns boundaries [W + 1] at the edges nearest to equal shares: no tile is split."""
        share = shares(self.cost_total, num_workers, jnp.int32(num_workers))
        cost_end = jnp.append(self.cost_start[1:], self.cost_total)
        middle = self.cost_start + (cost_end - self.cost_start) // 2
        edges = jnp.append(self.edge, self.length)
        return edges[find(middle, share)].at[-1].set(self.length)

    def split_in_pairs(self, num_workers: int) -> jax.Array:
        """Returns boundaries [W + 1] that give each pair of workers whole tiles, half to each."""
        edges = self.split_at_edges(num_workers // 2)
        begin, end = edges[:-1], edges[1:]
        cost_at = jnp.append(self.cost_start, self.cost_total)
        first, stop = (find(self.edge, at) for at in (begin, end))
        start, stop = cost_at[first], cost_at[stop]
        # The middle of a pair's range lies in `tile`. Both halves cost the same if the first takes
        # so many of the tile's blocks that they make up for the difference around the tile.
        tile = find(self.cost_start, start + (stop - start) // 2, side="right") - 1
        before, after = cost_at[tile] - start, stop - cost_at[tile + 1]
        middle = self.place_in(tile, (after - before + self.cost_of_blocks(tile)) // 2)
        middle = jnp.where(begin < end, middle, begin)
        return jnp.append(jnp.stack([begin, middle], axis=1).ravel(), self.length)

    def cost_of_blocks(self, tile: jax.Array) -> jax.Array:
        """Returns the cost of tiles without their overhead."""
        cost = (self.blocks[tile] - 1) * self.full[tile] + self.last[tile]
        return jnp.where(self.blocks[tile] > 0, cost, 0)

    def inside_tiles(self, boundaries: jax.Array) -> jax.Array:
        """Returns [W + 1] bool: whether a boundary splits a tile; equal boundaries count once."""
        inside = self.edge[self.tile_at(boundaries)] < boundaries
        return inside & (boundaries < self.length) & (boundaries != jnp.roll(boundaries, 1))

    def largest_load(self, boundaries: jax.Array) -> jax.Array:
        """Returns the largest cost of a range between two boundaries."""
        # `before` is the cost of all work before each boundary. A worker whose range starts inside
        # a tile pays the tile's overhead `again`, because its part is a work item of its own.
        tile = self.tile_at(boundaries)  # the last tile for a boundary at the end of the line
        taken = jnp.minimum(boundaries - self.edge[tile], self.blocks[tile])
        whole = (taken > 0) & (taken == self.blocks[tile])
        before = taken * self.full[tile] + jnp.where(whole, self.last[tile] - self.full[tile], 0)
        before = before + jnp.where(taken > 0, self.costs.overhead, 0) + self.cost_start[tile]
        before = jnp.where(boundaries == self.length, self.cost_total, before)
        again = jnp.where((taken > 0) & (boundaries < self.length), self.costs.overhead, 0)
        return jnp.where(boundaries[1:] > boundaries[:-1], again[:-1] + jnp.diff(before), 0).max()


def shares(total: jax.Array, num_workers: int, count: jax.Array) -> jax.Array:
    """Returns w * total / count for w = 0 .. W, [W + 1] int32, without overflow for w <= count."""
    w = jnp.arange(num_workers + 1, dtype=jnp.int32)
    return w * (total // count) + w * (total % count) // count


def running_sum(values: jax.Array) -> jax.Array:
    """Returns the cumulative sum in int32, also where JAX would sum integers in int64."""
    return jnp.cumsum(values, dtype=jnp.int32)


def to_float32(values: jax.Array) -> jax.Array:
    """Returns the values as float32."""
    return values.astype(jnp.float32)


def find(values: jax.Array, queries: jax.Array, side: str = "left") -> jax.Array:
    """Returns `searchsorted` as int32, compiled to one kernel where JAX's default is a loop."""
    method = "compare_all" if values.size * queries.size <= 1 << 18 else "scan_unrolled"
    return jnp.searchsorted(values, queries, side=side, method=method).astype(jnp.int32)
