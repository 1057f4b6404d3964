"""Plans for the Hopper kernels, made in NumPy: a planner in JAX compiles a program per shape."""

import functools
from typing import Any

import jax
import numpy as np

from mla_jax import SplitPlan
from mla_jax.splits.tile_keys import tile_keys
from pallas_kernels.hopper.work_items import BLOCK, PARTIAL, work_list

MOST_WORKERS = 4


def even_plan(
    seq_lens: Any,
    *,
    workers: int,
    rows: int,
    rows_per_tile: int,
    most_workers: int = MOST_WORKERS,
    query_lens: Any = None,
    num_heads: int = 0,
) -> SplitPlan:
    """Returns a plan that gives each worker an equal number of KV blocks.

    Its arrays have the shapes that `plan_splits` makes for `most_workers`, of which the ones after
    `workers` have no work. So batches of equal shapes share one program of a kernel, whatever
    their lengths and however their tiles are split. A tile without a key counts as one block.

    num_heads: query rows per token, of a plan that leaves out hidden blocks; 0: all tiles of a
    request have all its blocks.
    """
    lens = np.maximum(np.asarray(seq_lens), 0)
    row_tiles = -(-rows // rows_per_tile)
    sizes = {"num_row_tiles": row_tiles, "rows_per_tile": rows_per_tile, "num_heads": num_heads}
    blocks = -(-tile_keys(lens, query_lens, xp=np, **sizes).ravel() // BLOCK)
    places = np.maximum(blocks, 1)
    edges = np.append(0, np.cumsum(places))
    cuts = np.arange(workers + 1) * edges[-1] // workers
    starts = np.union1d(edges[:-1], cuts[:-1])
    tile = np.searchsorted(edges, starts, side="right") - 1
    taken = np.diff(starts, append=edges[-1])
    begin = starts - edges[tile]
    is_split = taken < places[tile]
    partials = np.bincount(tile[is_split], minlength=len(blocks))
    unused = len(blocks) + most_workers - len(starts)

    def of_items(values: Any, padding: int = 0) -> np.ndarray:
        return np.pad(values, (0, unused), constant_values=padding).astype(np.int32)

    worker_start = np.searchsorted(starts, cuts)
    worker_start = np.pad(worker_start, (0, most_workers - workers), mode="edge")
    plan = SplitPlan(
        request=of_items(tile % len(lens), -1),
        row_tile=of_items(tile // len(lens)),
        block_start=of_items(begin),
        block_end=of_items(np.minimum(begin + taken, blocks[tile])),
        partial=of_items(np.where(is_split, np.cumsum(is_split) - 1, -1), -1),
        worker_start=worker_start.astype(np.int32),
        tile_partial_start=np.append(0, np.cumsum(partials)).astype(np.int32),
        block_size=BLOCK,
        num_partials=2 * (most_workers - 1),
        **sizes,
    )
    plan.check()
    plan.check_covers(lens, query_lens)
    return plan


_work_list = functools.partial(jax.jit, static_argnums=1)(work_list)


def kept_items(plan: SplitPlan, finish: str) -> int:
    """Returns how many items of the work list keep their partial (`work_items.work_list`)."""
    return int((np.asarray(_work_list(plan, finish)[1])[:, PARTIAL] < -1).sum())
