"""The loader warpgroup of the decode kernel: q of a work item, then its KV blocks in order.

KV blocks go to two stages in turns. A stage is loaded again when both computing warpgroups, in
every CTA that shares the block, have released their half of it.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.kernels.decode_kernel import (
    INVALID,
    KV_LEN,
    LOADER,
    OPEN_PAIRS,
    STAGES,
    Kernel,
)
from pallas_kernels.hopper.work_items import (
    BLOCK,
    ITEM_FIELDS,
    WorkItem,
    first_of,
    fits,
    range_of,
    step_of,
)


@dataclasses.dataclass(frozen=True)
class Loader:
    """Loads what the worker's items need, in their order."""

    k: Kernel

    def run(self) -> None:
        k = self.k
        k.g.take_registers(k.call.tiles.registers, LOADER)
        # Not `run_items`: its next item would hold registers while an item is loaded.
        head = tuple(k.range_ref[i] for i in range(ITEM_FIELDS))
        first, stop = range_of(k.range_ref)
        at = first_of(k.range_ref) if k.pairs else first
        lax.fori_loop(0, stop - first, self.load_item, (at, *head))
        # Wait for every release: a CTA must not end before the other CTA has released its stages.
        plgpu.barrier_wait(k.scratch.q_empty)
        for empty in (k.scratch.empty_left, k.scratch.empty_right):
            for stage in range(STAGES):
                plgpu.barrier_wait(empty.at[stage])

    def load_item(self, n: Any, carry: tuple) -> tuple:
        """Loads the worker's n-th item. carry: its index in the work list, and its fields."""
        k = self.k
        at, *fields = carry
        item = WorkItem(*fields)
        num_blocks = item.block_end - item.block_start
        rank = 0 if k.pairs else k.rank
        row = (item.row_tile * k.cluster + rank) * BLOCK
        kv_len, query_len = k.call.lengths(k.inputs.requests, item.request)
        ahead = k.kv_blocks.ahead(item.request, item.block_start, kv_len)
        following = k.kv_blocks.ahead(item.request, item.block_start + 1, kv_len)
        found, all_exist = k.kv_blocks.find(ahead, item.request, item.block_start, kv_len)
        state = k.item(n)
        planned = item._replace(partial=item.own_partial)
        invalid = ~fits(planned, kv_len) | ((num_blocks > 0) & ~all_exist)
        open_pairs = self.open_pairs(item, kv_len, query_len, num_blocks)
        more = kv_len, query_len, invalid.astype(jnp.int32), open_pairs
        for i, value in enumerate((*item, *more)):
            state[i] = value
        plgpu.commit_smem()  # Any warp of this warpgroup may read or change it from here on.

        def load_first():
            # Stage 0, but hidden from the compiler, which would hold all of its addresses.
            zero = num_blocks >> 30
            self.load_block(found, zero, self.barrier_set(zero, state[OPEN_PAIRS]))

        # The first block of a later item is loaded while the item before it is still computed. For
        # the worker's first item q is needed first, and nothing has to be waited for.
        pl.when((num_blocks > 0) & (n > 0))(load_first)
        self.load_q(item.request, row)
        pl.when((num_blocks > 0) & (n == 0))(load_first)

        def load_next(i, ahead):
            # Read again, so that they hold no register between blocks.
            request, kv_len = state[0], state[KV_LEN]
            following = k.kv_blocks.ahead(request, item.block_start + i + 1, kv_len)
            found, all_exist = k.kv_blocks.find(ahead, request, item.block_start + i, kv_len)

            @pl.when(~all_exist)
            def _():
                state[INVALID] = 1

            self.load_block(found, i % STAGES, self.barrier_set(i, state[OPEN_PAIRS]))
            return following

        lax.fori_loop(1, num_blocks, load_next, following)
        return self.next_item(at)

    def next_item(self, at: Any) -> tuple:
        """Returns the index and the fields of the item after the one at this index."""
        k, items = self.k, self.k.inputs.requests.work.items
        following = at + (step_of(k.range_ref) if k.pairs else 1)
        following = jnp.clip(following, 0, items.shape[0] - 1)
        return following, *(items[following, i] for i in range(ITEM_FIELDS))

    def open_pairs(self, item: WorkItem, kv_len: Any, query_len: Any, num_blocks: Any) -> Any:
        """Returns how many pairs of the item's blocks need no mask for any row of the tile.

        The tile's first row, over all CTAs that share it, sees the fewest keys.
        """
        shortest = kv_len
        if self.k.call.causal:
            first_row = item.row_tile * self.k.cluster * BLOCK
            shortest = kv_len - query_len + first_row // self.k.call.num_heads + 1
        return jnp.clip((shortest // BLOCK - item.block_start) // 2, 0, num_blocks // 2)

    def load_q(self, request: Any, row: Any) -> None:
        """Loads 64 rows of q, or all of them where there are fewer."""
        k = self.k
        rows = min(BLOCK, k.inputs.q.shape[1])
        plgpu.barrier_wait(k.scratch.q_empty)
        for columns in k.columns:
            plgpu.copy_gmem_to_smem(
                k.inputs.q.at[request, pl.ds(row, rows), pl.ds(columns.start, columns.width)],
                columns.q.at[0] if rows == BLOCK else columns.q.at[0, pl.ds(0, rows)],
                k.scratch.q_full,
            )

    def load_block(self, found: Any, stage: Any, barrier_set: Any) -> None:
        """Loads a KV block, found by `kv_blocks.find`, when its stage is free."""
        for columns in self.k.columns:
            if columns.empty is not None:
                plgpu.barrier_wait(columns.empty.at[stage])
            full = columns.full.at[barrier_set]
            self.k.kv_blocks.load(found, columns.start, columns.kv.at[stage], full)

    @staticmethod
    def barrier_set(i: Any, open_pairs: Any) -> Any:
        """Returns the index of the barrier set that signals block i of an item.

        The set of its stage; or one of two more for blocks that warpgroup 0 scores whatever their
        stage is. So the warpgroup that scores a block has seen every phase of its barriers.
        """
        return i % STAGES + jnp.where(i < 2 * open_pairs, 0, STAGES)
