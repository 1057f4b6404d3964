"""One launch of the plan kernel: what it reads and writes, and its static numbers."""

import dataclasses
from typing import Any, NamedTuple

from mla_jax.splits.line import LARGEST, unit_steps
from mla_jax.splits.planner import Balance
from pallas_kernels.hopper.mosaic.per_thread import LANES, WARPS
from pallas_kernels.hopper.work_items import ITEM_FIELDS

THREADS = WARPS * LANES  # of a CTA
MOST_TILES = 4096  # each CTA keeps all of them in shared memory, and its threads in registers
MOST_WORKERS = 256  # a warp keeps their boundaries in registers


class Inputs(NamedTuple):
    seq_lens: Any  # [B] int32
    query_lens: Any  # [B] int32, or None for a plan without num_heads
    counter: Any  # [1] int32, 0; the kernel leaves 0


class Outputs(NamedTuple):
    request: Any  # these seven as in SplitPlan
    row_tile: Any
    block_start: Any
    block_end: Any
    partial: Any
    worker_start: Any
    tile_partial_start: Any
    ranges: Any  # these two as in WorkList
    items: Any
    scores: Any  # [2 * warps with a candidate]: largest load and number of splits of each


class Scratch(NamedTuple):
    """The line, with an entry behind the last tile for its end, and the plan's splits and items."""

    edge: Any  # [entries] the place at which a tile starts
    cost: Any  # [entries] cost of all tiles before it
    kv_blocks: Any  # [entries] its KV blocks
    split_tile: Any  # [most splits] the tile of each split, in their order
    split_taken: Any  # [most splits] the tile's blocks before it
    split_tiles: Any  # [most splits] how many tiles are split up to here
    first_split: Any  # [most splits] the first split of each split tile
    worker_item: Any  # [workers + 1] the first work item of each worker
    worker_partial: Any  # [workers + 1] number of partials before it
    is_shared: Any  # [workers] 1: these pairs combine a tile by themselves
    items: Any  # [ITEM_FIELDS * items] field by field
    units: Any  # [128] for `PerThread.sum_over_threads`
    line: Any  # [2 * 128] for `PerThread.scan`
    splits: Any  # [2 * 128]


@dataclasses.dataclass(frozen=True)
class PlanCall:
    """The static numbers of one launch."""

    batch: int
    balance: Balance
    finish: str  # as in `work_items.work_list`
    longest: int  # a longer length counts as this
    interpret: Any

    @property
    def overhead(self) -> int:
        return self.balance.costs.overhead

    @property
    def num_tiles(self) -> int:
        return self.batch * self.balance.costs.num_row_tiles

    @property
    def search_size(self) -> int:
        """Entries of the line that a search looks at, a power of two."""
        return 1 << (self.num_tiles - 1).bit_length()

    @property
    def per_thread(self) -> int:
        """Entries of the line that a thread lays."""
        return -(-(self.search_size + 1) // THREADS)

    @property
    def num_items(self) -> int:
        return self.num_tiles + self.balance.num_workers

    @property
    def range_fields(self) -> int:
        return ITEM_FIELDS + (3 if self.finish == "in_pairs" else 2)

    @property
    def share_ctas(self) -> int:
        """CTAs whose warps have equal shares as candidates. One more has the others."""
        return -(-2 * self.balance.num_workers // WARPS)

    @property
    def unit_steps(self) -> int:
        costs = self.balance.costs
        return unit_steps(self.batch, most=self.balance.most, factor=sum(costs.full))

    @property
    def most_splits(self) -> int:
        """A power of two above the number of splits."""
        return 1 << self.balance.num_workers.bit_length()


def refusal(batch: int, balance: Balance) -> str | None:
    """Returns why the kernel can't make a plan for so many requests; None where it can."""
    costs = balance.costs
    if set(costs.full) != {1} or not costs.overhead:
        return "it takes the cost model 'blocks' with an overhead"
    if costs.block_size & (costs.block_size - 1):
        return f"it takes a block_size that is a power of two, got {costs.block_size}"
    if batch * costs.num_row_tiles > MOST_TILES:
        return f"it takes up to {MOST_TILES} tiles, got {batch} * {costs.num_row_tiles}"
    if balance.num_workers > MOST_WORKERS:
        return f"it takes up to {MOST_WORKERS} workers, got {balance.num_workers}"
    if costs.num_row_tiles * costs.rows_per_tile > LARGEST:
        return "it takes tiles of fewer rows"
    return None
