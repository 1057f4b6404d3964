"""The line of all tiles, on which a planner places its cuts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_jax.splits.costs import SplitCosts
from mla_jax.splits.plan import num_blocks


class Line(NamedTuple):
    """All tiles in a row, measured in cost and in places.

    A place counts `unit` blocks, and 1 for a tile without any, so that each tile's edge is its own.
    """

    kv_blocks: jax.Array  # [T] of each tile
    unit: jax.Array | int  # KV blocks that count as one on the line
    blocks: jax.Array  # [T] of each tile, in units
    edge: jax.Array  # [T] the place where the tile starts
    length: jax.Array  # places in all
    cost_start: jax.Array  # [T] what stands before the tile
    cost_total: jax.Array
    full: jax.Array  # [T] cost of a full block
    last: jax.Array  # [T] cost of the tile's last block
    costs: SplitCosts

    @staticmethod
    def lay(seq_lens: jax.Array, costs: SplitCosts, unit: jax.Array | int, most: int) -> "Line":
        """The line of these lengths; what a request has past `most` units is not measured."""
        seq_lens = jnp.maximum(seq_lens, 0)
        kv_blocks = num_blocks(seq_lens, costs.block_size)
        full, last = costs.block_costs(seq_lens)
        full, last = jnp.repeat(full, len(seq_lens)), last.T.ravel()
        kv_blocks = jnp.tile(kv_blocks, costs.num_row_tiles)
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
        """The tile that each place is in."""
        return find(self.edge, places, side="right") - 1

    def cut(self, num_workers: int, count: jax.Array, spread: jax.Array) -> jax.Array:
        """Places [W + 1] that cut the line in `count` equal shares; the other workers get none.

        A tile's overhead stands before its blocks, or, with `spread`, on all of them alike: the
        one suits tiles longer than a share, the other tiles cut in two or three.
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
        """The places in tiles that so much cost of their blocks stands before, or an edge."""
        blocks, full, last = self.blocks[tile], self.full[tile], self.last[tile]
        taken = jnp.clip((inside + full // 2) // full, 0, jnp.maximum(blocks - 1, 0))
        whole = (blocks > 0) & (inside - (blocks - 1) * full >= last - last // 2)
        shortest = max(1, -(-self.costs.overhead // 3))
        taken = jnp.where(taken < shortest, 0, taken)
        taken = jnp.where(whole | ((taken > 0) & (blocks - taken < shortest)), blocks, taken)
        return self.edge[tile] + taken

    def cut_at_edges(self, num_workers: int) -> jax.Array:
        """Places [W + 1] that give every worker whole tiles: the edges nearest to equal shares."""
        share = shares(self.cost_total, num_workers, jnp.int32(num_workers))
        cost_end = jnp.append(self.cost_start[1:], self.cost_total)
        middle = self.cost_start + (cost_end - self.cost_start) // 2
        edges = jnp.append(self.edge, self.length)
        return edges[find(middle, share)].at[-1].set(self.length)

    def cut_in_pairs(self, num_workers: int) -> jax.Array:
        """Places [W + 1] that give each pair of workers whole tiles, half of them to each."""
        edges = self.cut_at_edges(num_workers // 2)
        begin, end = edges[:-1], edges[1:]
        cost_at = jnp.append(self.cost_start, self.cost_total)
        first, stop = (find(self.edge, at) for at in (begin, end))
        start, stop = cost_at[first], cost_at[stop]
        # The tile that the middle lies in, and what of its blocks makes both halves cost the same.
        tile = find(self.cost_start, start + (stop - start) // 2, side="right") - 1
        before, after = cost_at[tile] - start, stop - cost_at[tile + 1]
        middle = self.place_in(tile, (after - before + self.cost_of_blocks(tile)) // 2)
        middle = jnp.where(begin < end, middle, begin)
        return jnp.append(jnp.stack([begin, middle], axis=1).ravel(), self.length)

    def cost_of_blocks(self, tile: jax.Array) -> jax.Array:
        """What tiles cost but for their overhead."""
        cost = (self.blocks[tile] - 1) * self.full[tile] + self.last[tile]
        return jnp.where(self.blocks[tile] > 0, cost, 0)

    def inner(self, cuts: jax.Array) -> jax.Array:
        """[W + 1] bool: which of them cut a tile, each place once."""
        inside = self.edge[self.tile_at(cuts)] < cuts
        return inside & (cuts < self.length) & (cuts != jnp.roll(cuts, 1))

    def largest_load(self, cuts: jax.Array) -> jax.Array:
        """The cost of the costliest stretch between two cuts."""
        tile = self.tile_at(cuts)  # behind the end: the last
        taken = jnp.minimum(cuts - self.edge[tile], self.blocks[tile])
        whole = (taken > 0) & (taken == self.blocks[tile])
        before = taken * self.full[tile] + jnp.where(whole, self.last[tile] - self.full[tile], 0)
        before = before + jnp.where(taken > 0, self.costs.overhead, 0) + self.cost_start[tile]
        before = jnp.where(cuts == self.length, self.cost_total, before)
        again = jnp.where((taken > 0) & (cuts < self.length), self.costs.overhead, 0)
        return jnp.where(cuts[1:] > cuts[:-1], again[:-1] + jnp.diff(before), 0).max()


def shares(total: jax.Array, num_workers: int, count: jax.Array) -> jax.Array:
    """[W + 1] int32: w * total / count, without the overflow of that product; w <= count."""
    w = jnp.arange(num_workers + 1, dtype=jnp.int32)
    return w * (total // count) + w * (total % count) // count


def running_sum(values: jax.Array) -> jax.Array:
    """int32, whatever JAX's width of a sum of integers is."""
    return jnp.cumsum(values, dtype=jnp.int32)


def to_float32(values: jax.Array) -> jax.Array:
    return values.astype(jnp.float32)


def find(values: jax.Array, queries: jax.Array, side: str = "left") -> jax.Array:
    """searchsorted as one fused kernel: by default it would be a loop of kernels."""
    method = "compare_all" if values.size * queries.size <= 1 << 18 else "scan_unrolled"
    return jnp.searchsorted(values, queries, side=side, method=method).astype(jnp.int32)
