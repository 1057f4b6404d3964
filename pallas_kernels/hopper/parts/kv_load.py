"""How a block of 64 KV tokens comes from its pages into shared memory: by TMA, or gathered.

TMA brings pages of 16 tokens and more, a copy for each page and piece of a block. Of smaller pages
that would be too many: a token is one row, which lands as nine 128-byte lines in nine swizzled
tiles, so pages of one token take 576 copies a block. There all 128 threads of the loading
warpgroup gather, 16 bytes at a time (cp.async): eight neighbours take a line of a token.

Both are used alike: `ahead`, what of the block table is read a block early; `find`, where a block
lies; `load`, a piece of it (some columns) into a slot, whose barrier counts `arrivals`; `see`,
after the wait for that barrier and before wgmma reads the slot.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.work_items import BLOCK, block_sources, last_page

SMALLEST_COPIED = 16  # tokens of a page


def arrivals(page_size: int) -> int:
    """Of a barrier for a piece of a block: one for each copy, or one of the gathering threads."""
    return max(1, BLOCK // page_size) if page_size >= SMALLEST_COPIED else 1


def blocks(
    g: Backend, table_ref: Any, pages_ref: Any, cluster: int = 1
) -> "CopiedBlocks | GatheredBlocks":
    """Of a cache [num_pages, page_size, D] and its table [B, max_pages], for a cluster of CTAs."""
    if pages_ref.shape[1] >= SMALLEST_COPIED:
        return CopiedBlocks(table_ref, pages_ref, "cluster" if cluster > 1 else None)
    return GatheredBlocks(g, table_ref, pages_ref)


@dataclasses.dataclass(frozen=True)
class CopiedBlocks:
    """By TMA; a cluster's CTAs get a part each and send it to all."""

    table_ref: Any
    pages_ref: Any
    collective_axes: str | None

    def ahead(self, request: Any, block: Any, kv_len: Any) -> Any:
        del request, block, kv_len
        return ()

    def find(self, ahead: Any, request: Any, block: Any, kv_len: Any) -> tuple[Any, Any]:
        """Where the block lies, and whether the cache has all of its pages."""
        del ahead
        num_pages, page_size, _ = self.pages_ref.shape
        return block_sources(self.table_ref, request, block, kv_len, page_size, num_pages)

    def load(self, found: Any, column: int, slot: Any, full: Any) -> None:
        columns = pl.ds(column, slot.shape[1])
        for page, source, target in found:
            plgpu.copy_gmem_to_smem(
                self.pages_ref.at[page, source, columns],
                slot if target is None else slot.at[target],
                full,
                collective_axes=self.collective_axes,
            )

    def see(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class GatheredBlocks:
    """By cp.async, which has no multicast: each CTA of a cluster gathers all of a block.

    They free their slots together, as for TMA, and so read the same lines at about the same time:
    the second one finds them in L2.
    """

    g: Backend
    table_ref: Any
    pages_ref: Any

    def ahead(self, request: Any, block: Any, kv_len: Any) -> Any:
        """Ids of the pages of the block's tokens, unchecked."""
        page_size = self.pages_ref.shape[1]
        page = block * (BLOCK // page_size) + self.g.gathered_row() // page_size
        page = jnp.minimum(page, last_page(kv_len, page_size))
        return self.g.load_indexed(self.table_ref, request * self.table_ref.shape[1] + page)

    def find(self, ahead: Any, request: Any, block: Any, kv_len: Any) -> tuple[Any, Any]:
        """Rows of the cache as [num_pages * page_size, D], and whether it has all of the pages."""
        del request, block, kv_len
        num_pages, page_size, _ = self.pages_ref.shape
        exists = (ahead >= 0) & (ahead < num_pages)
        rows = jnp.where(exists, ahead, 0) * page_size + self.g.gathered_row() % page_size
        return rows, ~self.g.any_outside(ahead, num_pages)

    def load(self, found: Any, column: int, slot: Any, full: Any) -> None:
        self.g.gather_rows(self.pages_ref, column, found, slot)
        # The barrier then waits for the copies of each thread that arrives; and the arrival itself
        # publishes what the thread has stored before.
        self.g.track_copies(full)
        plgpu.barrier_arrive(full)

    def see(self) -> None:
        # cp.async writes as a store does (PTX: through the generic proxy), wgmma reads through the
        # async one. The wait for the barrier makes the copies visible to the waiting thread, and a
        # fence of that thread to what it has wgmma read (PTX memory model: the fence may stand
        # anywhere between the two, within the CTA). So the loading threads never wait for a copy.
        self.g.fence_async_proxy()
