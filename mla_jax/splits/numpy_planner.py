"""The balanced plan of `planner.plan_splits` in NumPy, for a choice of tiles at trace time.

JAX compiles a program for each shape of a plan, which takes seconds. A choice of tiles compares
many plans of one batch, and none of them is run. So it makes them here, in milliseconds. The cost
model is "blocks" without query_lens, and sums are int64. The result is the planner's to the bit
where its line counts single blocks, that is for less than 2^30 KV blocks in all.
"""

from typing import Any

import numpy as np

from mla_jax.splits.plan import SplitPlan, num_blocks
from mla_jax.splits.planner import PAIR_OVERHEAD

_BEYOND = np.int64(2**62)  # sorts after every place on the line


def plan_in_numpy(
    seq_lens: Any,
    *,
    num_workers: int,
    rows: int,
    rows_per_tile: int,
    block_size: int = 64,
    overhead: int = 5,
    merge_overhead: int = 0,
    in_pairs: bool = False,
) -> SplitPlan:
    """Returns the plan of `planner.plan_splits`, with arrays of NumPy. Arguments as there."""
    lengths = np.asarray(seq_lens, np.int64)
    num_row_tiles = -(-rows // rows_per_tile)
    line = _Line(np.tile(num_blocks(lengths, block_size, np), num_row_tiles), overhead)
    best = _boundaries(line, num_workers, merge_overhead, in_pairs)
    inside = best[1:][line.inside_tiles(best)[1:]]
    starts = np.sort(np.append(line.edge, inside))
    arrays: dict[str, Any] = line.items(starts, len(lengths), num_workers)
    arrays["worker_start"] = np.searchsorted(starts, best).astype(np.int32)
    return SplitPlan(
        **arrays,
        block_size=block_size,
        rows_per_tile=rows_per_tile,
        num_row_tiles=num_row_tiles,
        num_partials=2 * (num_workers - 1),
    )


def _boundaries(line: "_Line", workers: int, merge_overhead: int, in_pairs: bool) -> np.ndarray:
    """Returns the places [W + 1] at which the ranges of workers begin."""
    counts = np.arange(1, workers + 1)
    counts = counts[(counts == workers) | ((counts + 1) ** 2 > line.blocks.sum())]
    candidates = line.split_evenly(workers, counts, spread=False)
    if line.overhead:
        candidates = np.vstack([candidates, line.split_evenly(workers, counts, spread=True)])
    largest = line.largest_load(candidates)
    splits = line.inside_tiles(candidates).sum(axis=-1)
    best = int(np.argmin(np.where(largest == largest.min(), splits, _BEYOND)))
    chosen, load = candidates[best], int(largest[best])
    if not line.overhead:
        return chosen
    whole = line.split_at_edges(workers)
    least, load_whole = load + merge_overhead, int(line.largest_load(whole))
    if load_whole <= least:
        chosen = whole
    if in_pairs:
        halves = line.split_in_pairs(workers)
        if int(line.largest_load(halves)) + PAIR_OVERHEAD < min(load_whole, least):
            chosen = halves
    return chosen


class _Line:
    """The line of all tiles, as in `line.Line`, where every KV block costs 1."""

    def __init__(self, blocks: np.ndarray, overhead: int) -> None:
        self.blocks, self.overhead = blocks, overhead
        places = np.maximum(blocks, 1)
        self.edge = np.cumsum(places) - places
        self.length = int(places.sum())
        cost = blocks + overhead
        self.cost_end = np.cumsum(cost)
        self.cost_start = self.cost_end - cost
        self.cost_total = int(self.cost_end[-1])

    def tile_at(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.edge, places, side="right") - 1

    def split_evenly(self, workers: int, counts: np.ndarray, *, spread: bool) -> np.ndarray:
        """Returns boundaries [counts, W + 1]."""
        worker, count = np.arange(workers + 1), counts[:, None]
        share, rest = np.divmod(worker * self.cost_total, count)
        tile = np.searchsorted(self.cost_start, share, side="right") - 1
        inside = share - self.cost_start[tile]
        if spread:
            inside = self._without_spread_overhead(inside, rest, self.blocks[tile], count)
        else:
            inside = inside - self.overhead
        places = np.where(worker >= count, self.length, self.place_in(tile, inside))
        places[:, 0] = 0
        return places

    def _without_spread_overhead(
        self, inside: np.ndarray, rest: np.ndarray, cost: np.ndarray, count: np.ndarray
    ) -> np.ndarray:
        whole = cost + self.overhead
        part = 2 * self.overhead * (count * whole - inside * count - rest)
        divisor = np.maximum(2 * count * whole, 1)
        above, left = np.divmod(2 * rest * whole + count * whole + part, divisor)
        exact = inside - self.overhead + above
        return exact - ((exact % 2 == 1) & (left == 0))

    def place_in(self, tile: np.ndarray, inside: np.ndarray) -> np.ndarray:
        blocks = self.blocks[tile]
        taken = np.clip(inside, 0, np.maximum(blocks - 1, 0))
        shortest = max(1, -(-self.overhead // 3))
        taken = np.where(taken < shortest, 0, taken)
        whole = (blocks > 0) & (inside >= blocks)
        whole |= (taken > 0) & (blocks - taken < shortest)
        return self.edge[tile] + np.where(whole, blocks, taken)

    def split_at_edges(self, workers: int) -> np.ndarray:
        share = np.arange(workers + 1) * self.cost_total // workers
        middle = self.cost_start + (self.cost_end - self.cost_start) // 2
        found = np.append(self.edge, self.length)[np.searchsorted(middle, share)]
        found[-1] = self.length
        return found

    def split_in_pairs(self, workers: int) -> np.ndarray:
        edges = self.split_at_edges(workers // 2)
        begin, end = edges[:-1], edges[1:]
        cost_at = np.append(self.cost_start, self.cost_total)
        start, stop = (cost_at[np.searchsorted(self.edge, at)] for at in (begin, end))
        middle = start + (stop - start) // 2
        tile = np.searchsorted(self.cost_start, middle, side="right") - 1
        before, after = cost_at[tile] - start, stop - cost_at[tile + 1]
        places = self.place_in(tile, (after - before + self.blocks[tile]) // 2)
        halves = np.stack([begin, np.where(begin < end, places, begin)], axis=1)
        return np.append(halves.ravel(), self.length)

    def inside_tiles(self, boundaries: np.ndarray) -> np.ndarray:
        inside = self.edge[self.tile_at(boundaries)] < boundaries
        again = boundaries == np.roll(boundaries, 1, axis=-1)
        return inside & (boundaries < self.length) & ~again

    def largest_load(self, boundaries: np.ndarray) -> np.ndarray:
        tile = self.tile_at(boundaries)
        taken = np.minimum(boundaries - self.edge[tile], self.blocks[tile])
        paid = np.where(taken > 0, self.overhead, 0)
        before = np.where(
            boundaries == self.length, self.cost_total, taken + paid + self.cost_start[tile]
        )
        again = np.where(boundaries < self.length, paid, 0)[..., :-1]
        busy = boundaries[..., 1:] > boundaries[..., :-1]
        return np.where(busy, again + np.diff(before, axis=-1), 0).max(axis=-1)

    def items(self, starts: np.ndarray, batch: int, workers: int) -> dict[str, np.ndarray]:
        """Returns the arrays of a plan whose items start at these places, but `worker_start`."""
        tile = self.tile_at(starts)
        begin = starts - self.edge[tile]
        until = np.append(starts[1:], self.length)
        end = np.minimum(until - self.edge[tile], self.blocks[tile])
        partial = (begin > 0) | (end < self.blocks[tile])
        used = np.append(0, np.cumsum(partial))
        unused = len(self.blocks) + workers - len(starts)

        def padded(values: np.ndarray, fill: int = 0) -> np.ndarray:
            return np.pad(values, (0, unused), constant_values=fill).astype(np.int32)

        edges = np.append(self.edge, self.length)
        return {
            "request": padded(tile % batch, -1),
            "row_tile": padded(tile // batch),
            "block_start": padded(begin),
            "block_end": padded(end),
            "partial": padded(np.where(partial, used[1:] - 1, -1), -1),
            "tile_partial_start": used[np.searchsorted(starts, edges)].astype(np.int32),
        }
