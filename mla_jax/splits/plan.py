"""The split-KV plan: which worker computes what, as int32 arrays, and the checks of a plan."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.splits.tile_keys import check_query_lens, tile_keys

_OF_ITEMS = ("request", "row_tile", "block_start", "block_end", "partial")


class SlowPlanWarning(UserWarning):
    """Warns that a plan is valid for a problem, but another would make the kernel faster."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*_OF_ITEMS, "worker_start", "tile_partial_start"],
    meta_fields=[
        "block_size",
        "rows_per_tile",
        "num_row_tiles",
        "num_partials",
        "fixed",
        "num_heads",
    ],
)
@dataclasses.dataclass(frozen=True, eq=False)
class SplitPlan:
    """Assigns P work items to W workers (CTAs, or clusters of two); all arrays are int32.

    A work item is a range of KV blocks of one tile of query rows. Worker w runs the items
    worker_start[w] .. worker_start[w + 1]. An item without a partial is a whole tile, and its
    result is the tile's output. The items of a split tile leave (o, lse) as partial results. The
    output of tile t is the merge of partials tile_partial_start[t] .. tile_partial_start[t + 1],
    which are in KV order. A tile without blocks, e.g. of a request of length 0, has an item of 0
    blocks. Unused items are at the end and have request = partial = -1 and 0 elsewhere.

    A tile has all blocks of its request. With num_heads it has those that its last query token sees
    behind a causal mask (`tile_keys`), and the plan is for these query_lens only.
    """

    request: jax.Array  # [P]
    row_tile: jax.Array  # [P] rows row_tile * rows_per_tile ... of the request
    block_start: jax.Array  # [P]
    block_end: jax.Array  # [P]
    partial: jax.Array  # [P] index of its partial result; -1: none, the item is a whole tile
    worker_start: jax.Array  # [W + 1]
    tile_partial_start: jax.Array  # [num_tiles + 1]
    block_size: int  # KV tokens per block
    rows_per_tile: int
    num_row_tiles: int  # per request
    num_partials: int  # upper bound of the partials in use
    fixed: bool = False  # made by plan_fixed: a request is split and merged alike in any batch
    num_heads: int = 0  # query rows per token, where hidden blocks are left out; 0: none are

    def tile_of(self, request: jax.Array, row_tile: jax.Array) -> jax.Array:
        """Returns a tile's number.

        Row tiles of one request are far apart in the order of tiles, so that several workers read
        its keys at the same time, mostly from L2.
        """
        return row_tile * (self.num_tiles // self.num_row_tiles) + request

    @property
    def num_workers(self) -> int:
        """W."""
        return self.worker_start.shape[0] - 1

    @property
    def num_items(self) -> int:
        """P, unused ones included."""
        return self.request.shape[0]

    @property
    def num_tiles(self) -> int:
        """Requests times num_row_tiles."""
        return self.tile_partial_start.shape[0] - 1

    def tile_blocks(self, seq_lens: Any, query_lens: Any | None = None, xp: Any = jnp) -> Any:
        """Returns the number of KV blocks that each tile must have, [num_row_tiles, B].

        query_lens: [B]; not needed by a plan without num_heads. xp: numpy or jax.numpy.
        """
        keys = tile_keys(
            seq_lens,
            query_lens,
            num_row_tiles=self.num_row_tiles,
            rows_per_tile=self.rows_per_tile,
            num_heads=self.num_heads,
            xp=xp,
        )
        return num_blocks(keys, self.block_size, xp)

    def arrays(self) -> dict[str, jax.Array]:
        """Returns the plan's arrays, by name."""
        names = (*_OF_ITEMS, "worker_start", "tile_partial_start")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Raises TypeError or ValueError where the plan is not what its description says.

        Types, shapes and sizes are always checked, the values of the arrays unless they are traced.
        `check_covers` checks that a plan is made for given lengths.
        """
        for name in ("block_size", "rows_per_tile", "num_row_tiles"):
            checks.require_positive(f"plan.{name}", getattr(self, name))
        checks.require_int("plan.num_partials", self.num_partials, 0)
        checks.require_int("plan.num_heads", self.num_heads, 0)
        checks.require_bool("plan.fixed", self.fixed)
        for name, array in self.arrays().items():
            checks.require_int32(f"plan.{name}", array)
            size = len(self.request) if name in _OF_ITEMS and np.ndim(self.request) == 1 else None
            words = "[P]" if name in _OF_ITEMS else "[W + 1]"
            words = "[num_tiles + 1]" if name == "tile_partial_start" else words
            checks.require_shape(f"plan.{name}", array, words, size)
        checks.require_positive("workers of plan.worker_start", self.num_workers)
        if self.num_tiles < 1 or self.num_tiles % self.num_row_tiles:
            raise ValueError(
                f"plan.tile_partial_start must be of num_tiles + 1 values, with num_tiles a "
                f"positive multiple of num_row_tiles = {self.num_row_tiles}, got "
                f"{self.num_tiles + 1} values"
            )
        if checks.is_concrete(*self.arrays().values()):
            _check_items(self, **jax.device_get(self.arrays()))

    def check_covers(self, seq_lens: jax.Array, query_lens: jax.Array | None = None) -> None:
        """Raises ValueError if a plan that passes `check` is made for other lengths.

        seq_lens, query_lens: [B] int32, as in `tile_blocks`. Nothing is checked if the lengths or
        the plan are traced.
        """
        if not checks.is_concrete(seq_lens, query_lens, *self.arrays().values()):
            return
        names = ("request", "row_tile", "block_end")
        request, row_tile, end = jax.device_get(tuple(getattr(self, name) for name in names))
        lengths, used = np.asarray(seq_lens).astype(np.int64), request >= 0
        until = np.zeros((self.num_row_tiles, len(lengths)), np.int64)
        until[row_tile[used], request[used]] = end[used]  # a tile's last item is the last write
        queries = None if query_lens is None else np.asarray(query_lens).astype(np.int64)
        blocks = self.tile_blocks(lengths, queries, np)
        these = "these seq_lens and query_lens" if self.num_heads else "these seq_lens"
        for number in np.flatnonzero((until != blocks).any(axis=0)):
            raise ValueError(
                f"plan must be made for {these}, got one that does not cover request "
                f"{number} of {lengths[number]} keys"
            )


def check_plan(plan: Any, seq_lens: Any, query_lens: Any | None = None) -> None:
    """Raises TypeError or ValueError unless a plan is valid and covers these lengths.

    seq_lens: [B] int32. query_lens: [B] int32; required by a plan with num_heads. Traced values of
    the plan and the lengths are not checked.
    """
    if not isinstance(plan, SplitPlan):
        raise TypeError(f"plan must be a SplitPlan, got {type(plan).__name__}")
    plan.check()
    batch = plan.num_tiles // plan.num_row_tiles
    checks.require_shape("seq_lens", seq_lens, "[B of the plan]", batch)
    checks.require_int32("seq_lens", seq_lens)
    require_lengths(seq_lens)
    if plan.num_heads:
        rows = plan.num_row_tiles * plan.rows_per_tile
        check_query_lens(query_lens, batch, rows // plan.num_heads)
    plan.check_covers(seq_lens, query_lens)


@jax.jit
def covered_requests(
    plan: SplitPlan, seq_lens: jax.Array, query_lens: jax.Array | None = None
) -> jax.Array:
    """Returns [B] bool: whether the plan's items have as many blocks as each tile of a request.

    False marks a request of a plan that was made for other lengths. Only the number of blocks is
    compared. `check_plan` also checks which blocks they are, for a plan that is not traced.
    """
    taken = jnp.where(plan.request >= 0, plan.block_end - plan.block_start, 0)
    tile = plan.tile_of(plan.request, plan.row_tile)  # -1 of an unused item, which is dropped
    taken = jax.ops.segment_sum(taken, tile, plan.num_tiles)
    wanted = plan.tile_blocks(seq_lens, query_lens)
    return (taken.reshape(wanted.shape) == wanted).all(axis=0)


def require_lengths(seq_lens: jax.Array) -> None:
    """Raises ValueError for a length below 0, unless the lengths are traced."""
    if checks.is_concrete(seq_lens):
        lengths = np.asarray(seq_lens)
        for request in np.flatnonzero(lengths < 0):
            raise ValueError(f"seq_lens[{request}] must be at least 0, got {lengths[request]}")


def num_blocks(lengths: Any, block_size: int, xp: Any = jnp) -> Any:
    """Returns the number of blocks of each length; a length below 0 has none.

    xp: numpy or jax.numpy.
    """
    return (xp.maximum(lengths, 0) - 1) // block_size + 1


def _check_items(
    plan: SplitPlan,
    request: np.ndarray,
    row_tile: np.ndarray,
    block_start: np.ndarray,
    block_end: np.ndarray,
    partial: np.ndarray,
    worker_start: np.ndarray,
    tile_partial_start: np.ndarray,
) -> None:
    """Raises ValueError for the first value of the plan's arrays that is not as specified."""
    used = int((request >= 0).sum())
    batch = plan.num_tiles // plan.num_row_tiles
    _require("request", request, np.arange(len(request)) < used, request >= 0, "-1 at the end only")
    unused = np.zeros(len(request) - used, np.int32)
    for name, array in (("request", request), ("partial", partial)):
        _require_equal(name, array[used:], unused - 1, used)
    for name, array in (
        ("row_tile", row_tile),
        ("block_start", block_start),
        ("block_end", block_end),
    ):
        _require_equal(name, array[used:], unused, used)

    request, row_tile = request[:used].astype(np.int64), row_tile[:used].astype(np.int64)
    start, end = block_start[:used], block_end[:used]
    _require("request", request, request < batch, True, f"below the {batch} requests")
    rows = (row_tile >= 0) & (row_tile < plan.num_row_tiles)
    _require("row_tile", row_tile, rows, True, f"in 0 .. {plan.num_row_tiles - 1}")
    tile = row_tile * batch + request
    first = np.diff(tile, prepend=-1) != 0  # items that begin a tile
    in_order = tile == np.cumsum(first) - 1
    words = "of the tiles 0, 1, ... (row_tile * B + request) in order"
    _require("request and plan.row_tile", tile, in_order, True, words)
    if used == 0 or tile[-1] != plan.num_tiles - 1:
        got = tile[-1] + 1 if used else 0
        raise ValueError(f"plan.request must name all {plan.num_tiles} tiles, got {got}")
    _require_equal("block_start", start, np.where(first, 0, np.append(0, end[:-1])), 0)
    items = np.bincount(tile, minlength=plan.num_tiles)
    is_split = items[tile] > 1
    least = start.astype(np.int64) + is_split
    _require("block_end", end, end >= least, True, "past block_start where a tile is split")

    steps = np.diff(worker_start)
    _require("worker_start", worker_start, np.append(True, steps >= 0), True, "in rising order")
    for at, wanted in ((0, 0), (plan.num_workers, used)):
        _require_equal("worker_start", worker_start[[at]], np.array([wanted]), at)
    indices = np.where(is_split, np.cumsum(is_split) - 1, -1)
    _require_equal("partial", partial[:used], indices, 0)
    partials = np.where(items > 1, items, 0)
    _require_equal("tile_partial_start", tile_partial_start, np.append(0, np.cumsum(partials)), 0)
    if partials.sum() > plan.num_partials:
        raise ValueError(
            f"plan.num_partials must be at least the {partials.sum()} in use, "
            f"got {plan.num_partials}"
        )


def _require(name: str, values: np.ndarray, got: Any, wanted: Any, words: str) -> None:
    for at in np.flatnonzero(got != wanted):
        raise ValueError(f"plan.{name} must be {words}, got {values[at]} at {at}")


def _require_equal(name: str, values: np.ndarray, wanted: np.ndarray, offset: int) -> None:
    for at in np.flatnonzero(values != wanted):
        raise ValueError(f"plan.{name}[{offset + at}] must be {wanted[at]}, got {values[at]}")
