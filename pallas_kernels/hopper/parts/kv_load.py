"""Loads blocks of 64 KV tokens from their pages into shared memory, by TMA or by cp.async.

TMA copies pages of 16 or more tokens, with one copy for each page and each range of columns of a
block. Smaller pages would need too many copies. A token is one row, which fills nine 128-byte lines
in nine swizzled tiles, so pages of one token would need 576 copies per block. For these all 128
threads of the loader warpgroup gather 16 bytes at a time by cp.async, and eight neighbouring
threads copy one line of a token.

Both ways have the same methods:

    prefetch_table  reads the part of the block table that the next block needs, one block early
    locate          returns where a block is
    load            copies some columns of the block to a stage, whose barrier counts `arrivals`
    make_visible    runs after the wait for that barrier and before wgmma reads the stage
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.work_items import BLOCK, block_sources, last_page

SMALLEST_COPIED = 16  # tokens per page, from which on TMA copies pages


def arrivals(page_size: int) -> int:
    """Returns the arrivals per phase of the barrier of a stage.

    There is one arrival per TMA copy, or one of the gathering warpgroup.
    """
    return max(1, BLOCK // page_size) if page_size >= SMALLEST_COPIED else 1


def blocks(
    g: Backend, table_ref: Any, pages_ref: Any, ctas_per_tile: int = 1
) -> "CopiedBlocks | GatheredBlocks":
    """Returns the blocks of a cache [num_pages, page_size, D] with a block table [B, max_pages].

    ctas_per_tile: CTAs of the cluster that loads them together.
    """
    if pages_ref.shape[1] >= SMALLEST_COPIED:
        return CopiedBlocks(table_ref, pages_ref, "cluster" if ctas_per_tile > 1 else None)
    return GatheredBlocks(g, table_ref, pages_ref)


@dataclasses.dataclass(frozen=True)
class CopiedBlocks:
    """Copies blocks by TMA. Each CTA of a cluster loads a part and multicasts it to all of them."""

    table_ref: Any
    pages_ref: Any
    collective_axes: str | None

    def prefetch_table(self, request: Any, block: Any, kv_len: Any) -> Any:
        """Returns nothing, because `locate` reads the few page ids itself."""
        del request, block, kv_len
        return ()

    def locate(self, page_ids: Any, request: Any, block: Any, kv_len: Any) -> tuple[Any, Any]:
        """Returns where the block is, and whether the cache has all of its pages."""
        del page_ids
        num_pages, page_size, _ = self.pages_ref.shape
        return block_sources(self.table_ref, request, block, kv_len, page_size, num_pages)

    def load(self, found: Any, column: int, stage: Any, full: Any) -> None:
        """Starts to copy columns from `column` on to a stage (64, n), which `full` signals."""
        columns = pl.ds(column, stage.shape[1])
        for page, source, target in found:
            plgpu.copy_gmem_to_smem(
                self.pages_ref.at[page, source, columns],
                stage if target is None else stage.at[target],
                full,
                collective_axes=self.collective_axes,
            )

    def make_visible(self) -> None:
        """Does nothing, because TMA writes through the same proxy as wgmma reads."""


@dataclasses.dataclass(frozen=True)
class GatheredBlocks:
    """Gathers blocks by cp.async, which has no multicast. Each CTA of a cluster gathers all rows.

    The CTAs of a cluster free their stages together, as they do for TMA. So they read the same
    lines at about the same time, and the second one finds them in L2.
    """

    g: Backend
    table_ref: Any
    pages_ref: Any

    def prefetch_table(self, request: Any, block: Any, kv_len: Any) -> Any:
        """Returns the page ids of the block's tokens, one per thread, without checking them."""
        page_size = self.pages_ref.shape[1]
        page = block * (BLOCK // page_size) + self.g.gathered_row() // page_size
        page = jnp.minimum(page, last_page(kv_len, page_size))
        return self.g.load_indexed(self.table_ref, request * self.table_ref.shape[1] + page)

    def locate(self, page_ids: Any, request: Any, block: Any, kv_len: Any) -> tuple[Any, Any]:
        """Returns rows of the cache as [num_pages * page_size, D], and whether all pages exist."""
        del request, block, kv_len
        num_pages, page_size, _ = self.pages_ref.shape
        exists = (page_ids >= 0) & (page_ids < num_pages)
        rows = jnp.where(exists, page_ids, 0) * page_size + self.g.gathered_row() % page_size
        return rows, ~self.g.any_outside(page_ids, num_pages)

    def load(self, found: Any, column: int, stage: Any, full: Any) -> None:
        """Starts to copy columns from `column` on to a stage (64, n), which `full` signals."""
        self.g.gather_rows(self.pages_ref, column, found, stage)
        # The barrier waits for the copies of each thread that arrives. The arrival itself publishes
        # what the thread has stored before.
        self.g.track_copies(full)
        plgpu.barrier_arrive(full)

    def make_visible(self) -> None:
        """Makes the gathered rows visible to wgmma."""
        # cp.async writes through the generic proxy, as a store does, and wgmma reads through the
        # async proxy. The wait for the barrier makes the copies visible to the waiting thread. A
        # fence of that thread makes them visible to the wgmma that it starts: by the PTX memory
        # model it may be anywhere between the two, within the CTA. So the loader never waits.
        self.g.fence_async_proxy()
