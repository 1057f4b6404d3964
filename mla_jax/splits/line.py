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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax.splits.costs import SplitCosts
from mla_jax.splits.plan import SplitPlan, num_blocks

LARGEST = 2**31 - 1
BEYOND = np.int32(LARGEST)  # place of an unused work item: it sorts after every place on the line
MOST_COST = 2**30  # largest cost of all blocks on a line; MOST_WORK can be added in int32


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
        worker = jnp.arange(num_workers + 1, dtype=jnp.int32)
        share, rest = share_of(worker, self.cost_total, count)
        tile = find(self.cost_start, share, side="right") - 1
        overhead, inside = self.costs.overhead, share - self.cost_start[tile]
        cost = self.cost_of_blocks(tile)
        spread_out = without_spread_overhead(inside, rest, cost, count, overhead, num_workers)
        place = self.place_in(tile, jnp.where(spread, spread_out, inside - overhead))
        return jnp.where(worker >= count, self.length, place).at[0].set(0)

    def place_in(self, tile: jax.Array, inside: jax.Array) -> jax.Array:
        """Returns the places at which the blocks before them cost `inside`, or a near tile edge."""
        blocks, full, last = self.blocks[tile], self.full[tile], self.last[tile]
        return self.edge[tile] + blocks_before(inside, blocks, full, last, self.costs.overhead)

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

    def plan(
        self, starts: jax.Array, worker_start: jax.Array, num_partials: int, **options: Any
    ) -> SplitPlan:
        """Returns the plan whose items start at the sorted places `starts`; unused are BEYOND.

        options: other fields of the plan.
        """
        batch = len(self.blocks) // self.costs.num_row_tiles
        used = starts < self.length
        tile = jnp.where(used, self.tile_at(starts), 0)
        begin = jnp.where(used, starts - self.edge[tile], 0)
        until = jnp.minimum(jnp.append(starts[1:], BEYOND), self.length)
        end = jnp.where(used, jnp.minimum(until - self.edge[tile], self.blocks[tile]), 0)
        partial = used & ((begin > 0) | (end < self.blocks[tile]))
        partials_used = running_sum(partial)
        before = jnp.append(jnp.zeros(1, jnp.int32), partials_used)
        to_tile_end = used & (end == self.blocks[tile])
        return SplitPlan(
            request=jnp.where(used, tile % batch, -1),
            row_tile=jnp.where(used, tile // batch, 0),
            block_start=begin * self.unit,
            block_end=jnp.where(to_tile_end, self.kv_blocks[tile], end * self.unit),
            partial=jnp.where(partial, partials_used - 1, -1),
            worker_start=worker_start,
            tile_partial_start=before[find(starts, jnp.append(self.edge, self.length))],
            block_size=self.costs.block_size,
            rows_per_tile=self.costs.rows_per_tile,
            num_row_tiles=self.costs.num_row_tiles,
            num_partials=num_partials,
            **options,
        )


def unit_of(blocks: jax.Array, *, most: int, factor: int = 1, overhead: int = 0) -> jax.Array | int:
    """Returns a power of two by which sum((blocks + overhead) * factor) fits MOST_COST.

    It is the smallest one, or twice as large where the sum is close to a limit.

    blocks: [n] int32, of which those past `most` do not count. If the sum of n times `most` fits,
        the unit is 1 without any computation.
    """
    steps = unit_steps(len(blocks), most=most, factor=factor, overhead=overhead)
    if steps == 0:
        return 1
    total = blocks_in_steps(blocks, steps, most=most, overhead=overhead).sum(dtype=jnp.int32)
    return jnp.left_shift(jnp.int32(1), doublings(total * factor, steps))


def unit_steps(count: int, *, most: int, factor: int = 1, overhead: int = 0) -> int:
    """Returns how often the largest unit is doubled; the sums of `blocks_in_steps` fit MOST_COST.

    count: of the blocks. Other arguments as in `unit_of`.
    """
    if count * (most + overhead) * factor <= MOST_COST:
        return 0
    above = 1 + (overhead > 0)
    steps = range(1, 32)
    return next(
        n for n in steps if count * ((most >> n) + (overhead >> n) + above) * factor <= MOST_COST
    )


def blocks_in_steps(blocks: Any, steps: int, *, most: int, overhead: int = 0) -> Any:
    """Returns upper bounds of (blocks + overhead) / 2^steps."""
    above = 1 + (overhead >> steps) + (overhead > 0)
    return (jnp.minimum(blocks, most) >> steps) + above


def doublings(total: Any, steps: int) -> Any:
    """Returns k, for which the unit is 2^k. total: sum of `blocks_in_steps` times the factor."""
    return sum(jnp.where(total > MOST_COST >> (steps - k), 1, 0) for k in range(steps))


def quotient(a: Any, b: Any) -> Any:
    """Returns a / b in int32, rounded to zero. Kernels have this division, and not a // b."""
    return lax.div(*jnp.broadcast_arrays(jnp.int32(a), jnp.int32(b)))


def remainder(a: Any, b: Any) -> Any:
    """Returns a - b * quotient(a, b)."""
    return lax.rem(*jnp.broadcast_arrays(jnp.int32(a), jnp.int32(b)))


def share_of(worker: Any, total: Any, count: Any) -> tuple[Any, Any]:
    """Returns worker * total / count without overflow for worker <= count, and the remainder."""
    some, rest = quotient(total, count), remainder(total, count)
    return worker * some + quotient(worker * rest, count), remainder(worker * rest, count)


def without_spread_overhead(
    inside: Any, rest: Any, cost: Any, count: Any, overhead: int, num_workers: int
) -> Any:
    """Returns the cost of the blocks before a boundary in a tile, rounded half to even.

    inside: the cost of this part of the tile with the tile's overhead spread over its blocks, less
        than `rest` / `count`. That is added to it first, so that nothing is rounded twice.
    cost: of all blocks of the tile.
    count: at most num_workers.
    """
    whole = cost + overhead
    # With x = inside + rest / count, the result is x - overhead * x / whole. The overhead is added,
    # and subtracted after the division, so that the quotient is positive.
    part = 2 * overhead * (count * whole - inside * count - rest)
    dividend, divisor = 2 * rest * whole + count * whole + part, 2 * count * whole
    # These sums leave int32 in tiles of millions of blocks. There a block more or less is nothing.
    fits = whole <= LARGEST // (num_workers * (2 * overhead + 3))
    per_overhead = quotient(whole, max(overhead, 1))
    dividend = jnp.where(fits, dividend, inside)
    divisor = jnp.maximum(jnp.where(fits, divisor, per_overhead), 1)
    above = quotient(dividend, divisor)
    exact = inside - overhead + above
    is_odd_tie = ((exact & 1) == 1) & (above * divisor == dividend)
    return jnp.where(fits, exact - jnp.where(is_odd_tie, 1, 0), inside - above)


def blocks_before(inside: Any, blocks: Any, full: Any, last: Any, overhead: int) -> Any:
    """Returns the blocks of a tile that cost `inside`, or none or all of them.

    That replaces a number of blocks that would leave a work item shorter than a third of its
    overhead. full, last: costs of a full block and of the last one.
    """
    taken = jnp.clip(quotient(inside + full // 2, full), 0, jnp.maximum(blocks - 1, 0))
    whole = (blocks > 0) & (inside - (blocks - 1) * full >= last - last // 2)
    shortest = max(1, -(-overhead // 3))
    taken = jnp.where(taken < shortest, 0, taken)
    return jnp.where(whole | ((taken > 0) & (blocks - taken < shortest)), blocks, taken)


def shares(total: jax.Array, num_workers: int, count: jax.Array) -> jax.Array:
    """Returns w * total / count for w = 0 .. W, [W + 1] int32, without overflow for w <= count."""
    return share_of(jnp.arange(num_workers + 1, dtype=jnp.int32), total, count)[0]


def running_sum(values: jax.Array) -> jax.Array:
    """Returns the cumulative sum in int32, also where JAX would sum integers in int64."""
    return jnp.cumsum(values, dtype=jnp.int32)


def find(values: jax.Array, queries: jax.Array, side: str = "left") -> jax.Array:
    """Returns `searchsorted` as int32, compiled to one kernel where JAX's default is a loop."""
    method = "compare_all" if values.size * queries.size <= 1 << 18 else "scan_unrolled"
    return jnp.searchsorted(values, queries, side=side, method=method).astype(jnp.int32)
