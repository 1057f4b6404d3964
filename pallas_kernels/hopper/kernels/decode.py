"""Paged absorbed MLA decode for Hopper: one persistent kernel for tiles of 64 or 128 query rows.

A query row is one head of one query token. A work item is a tile of rows and a range of KV blocks
of 64 tokens. The plan gives each worker a range of work items. CTAs run in clusters of two:

    tiles of 128 rows: a cluster is one worker. Each CTA has 64 rows, loads half of every KV block
        and multicasts it to both;
    tiles of 64 rows: each CTA is a worker with items of its own (`in_pairs`). A tile that only the
        two CTAs of a cluster share is combined in their shared memories.

A CTA has three warpgroups:

    2  loads q and KV by TMA, or gathers small pages            `Loader`
    0  computes the left half of O's columns    }               decode_compute.py: S, softmax, O
    1  computes the right half of O's columns   }               decode_finish.py: combine, store

For each work item, the loader writes a work descriptor and loads q and the KV blocks. The computing
warpgroups add the KV blocks to O two at a time, and store the result: o and lse of a whole tile,
or a partial result. After its last item, a worker combines its share of the split tiles.

The latent is both key and value, so each block is loaded once. The overlap of the two computing
warpgroups is FlashMLA's "seesaw" pipeline (https://github.com/deepseek-ai/FlashMLA).
docs/hopper_decode.md draws it. Requests of up to 32 query rows run `decode_transposed` instead, and
so do a few short requests with more rows ("few_tokens" in tuned.json is the bound).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.config import DecodeConfig
from pallas_kernels.hopper.kernels.decode_compute import ComputingWarpgroup
from pallas_kernels.hopper.kernels.decode_refs import (
    FIELD,
    LOADER,
    STAGES,
    Cta,
    Inputs,
    Partials,
    Scratch,
)
from pallas_kernels.hopper.mosaic.cluster import OtherCta
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS, Backend
from pallas_kernels.hopper.mosaic.values import opaque_zero
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs, float_struct
from pallas_kernels.hopper.parts.combine import BLOCK_COLUMNS, combine_shares, divide_into_columns
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.parts.visible_keys import VisibleKeys
from pallas_kernels.hopper.work_items import (
    BLOCK,
    ITEM_FIELDS,
    WorkItem,
    first_of,
    fits,
    range_of,
    step_of,
)


def decode(call: DecodeCall[DecodeConfig]) -> tuple[jax.Array, ...]:
    """Runs the work items of a call.

    It writes to `call.outputs`, and never past row R: whole tiles, tiles that a CTA or the two CTAs
    of a cluster combine by themselves and, if the call combines, all other split tiles.

    Args:
        call: with q of bfloat16 or float16, its rows a multiple of 8, and a cache of one array of
            pages [num_pages, page_size, D] of q's dtype.

    Returns:
        The partial results of split tiles, as `Partials` describes them: o and lse, and the scales
        of float16 partials.
    """
    config, plan = call.config, call.plan
    g = Backend(interpreting=call.interpreting)

    def body(inputs: Inputs, outputs: Outputs, partials: Partials, scratch: Scratch) -> None:
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        warpgroup = lax.axis_index("wg")
        rank = lax.axis_index("cluster")
        group = lax.axis_index("group")
        if call.interpreting and not config.in_pairs:
            # The interpreter runs one cluster after the other. So the first ones must be those for
            # whose partials others wait.
            group = plan.num_workers - 1 - group
        exchange = None if inputs.exchange is None else inputs.exchange.at[group]
        ranges = inputs.requests.work.ranges
        cta = Cta(
            call=call,
            g=g,
            inputs=inputs,
            outputs=outputs,
            partials=partials,
            scratch=scratch,
            rank=rank,
            range_ref=ranges.at[2 * group + rank if config.in_pairs else group],
            other_cta=OtherCta(g, rank, exchange),
        )
        # In a branch of its own, what one role needs takes no register in the other role.
        lax.cond(warpgroup < LOADER, lambda: compute(cta, warpgroup), Loader(cta).run)

    partials = plgpu.kernel(
        body,
        out_type=(partial_types(call),),
        scratch_types=(Scratch.types(call, g),),
        grid=(config.num_ctas(plan.num_workers) // 2,),
        grid_names=("group",),
        cluster=(2,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="wg",
        interpret=call.interpret,
        kernel_name="mla_decode",
        compiler_params=OWN_BARRIERS,
    )(Inputs(call.q, call.cache[0], call.requests, exchange_of(call), call.stamps), call.outputs)[0]
    return tuple(array for array in partials if array is not None)


@dataclasses.dataclass(frozen=True)
class Loader:
    """The loader warpgroup: q of a work item, then its KV blocks, for all items of the worker.

    KV blocks go to two stages in turns. A stage is loaded again after both computing warpgroups, in
    every CTA that shares the block, have released their half of it.
    """

    cta: Cta

    def run(self) -> None:
        cta = self.cta
        cta.g.take_registers(cta.call.config.warpgroup_registers, LOADER)
        # This is not `run_items`, whose next item would take registers while an item is loaded.
        head = tuple(cta.range_ref[i] for i in range(ITEM_FIELDS))
        first, stop = range_of(cta.range_ref)
        index = first_of(cta.range_ref) if cta.in_pairs else first
        lax.fori_loop(0, stop - first, self.load_item, (index, *head))
        # Wait for every release: a CTA must not end before the other CTA has released its stages.
        plgpu.barrier_wait(cta.scratch.q_empty)
        for empty in (cta.scratch.empty_left, cta.scratch.empty_right):
            for stage in range(STAGES):
                plgpu.barrier_wait(empty.at[stage])

    def load_item(self, n: Any, carry: tuple) -> tuple:
        """Loads the worker's n-th item. carry: its index in the work list, and its fields."""
        cta = self.cta
        index, *fields = carry
        item = WorkItem(*fields)
        stamps = cta.stamps.of_item(n)
        stamps.item(at.ITEM)
        num_blocks = item.block_end - item.block_start
        rank = 0 if cta.in_pairs else cta.rank
        row = (item.row_tile * cta.ctas_per_tile + rank) * BLOCK
        kv_len, query_len = cta.call.lengths(cta.inputs.requests, item.request)
        page_ids = cta.kv_blocks.prefetch_table(item.request, item.block_start, kv_len)
        next_page_ids = cta.kv_blocks.prefetch_table(item.request, item.block_start + 1, kv_len)
        found, all_exist = cta.kv_blocks.locate(page_ids, item.request, item.block_start, kv_len)
        # This stage is free, because `load_q` of item n - 1 has waited for the end of item n - 2.
        descriptor = cta.descriptor(n)
        planned = item._replace(partial=item.own_partial)
        invalid = ~fits(planned, kv_len, cta.call.plan) | ((num_blocks > 0) & ~all_exist)
        unmasked_pairs = self.unmasked_pairs(item, kv_len, query_len, num_blocks)
        more = kv_len, query_len, invalid.astype(jnp.int32), unmasked_pairs
        for i, value in enumerate((*item, *more)):
            descriptor[i] = value
        plgpu.commit_smem()  # Any warp of this warpgroup may read or change it from here on.

        def load_first():
            zero = opaque_zero(num_blocks)  # the index of the block in the item, and its stage
            pairs = descriptor[FIELD.unmasked_pairs]
            self.load_block(found, zero, self.barrier_set(zero, pairs), stamps, 0)

        # The first block of a later item is loaded while the item before it is still computed. The
        # worker's first item needs q first, and has nothing to wait for.
        pl.when((num_blocks > 0) & (n > 0))(load_first)
        self.load_q(item.request, row, stamps)
        pl.when((num_blocks > 0) & (n == 0))(load_first)

        def load_next(i, page_ids):
            # These are read again for each block, so that they take no register in between.
            request, kv_len = descriptor[FIELD.request], descriptor[FIELD.kv_len]
            next_page_ids = cta.kv_blocks.prefetch_table(request, item.block_start + i + 1, kv_len)
            found, all_exist = cta.kv_blocks.locate(page_ids, request, item.block_start + i, kv_len)

            @pl.when(~all_exist)
            def _mark_invalid():
                descriptor[FIELD.invalid] = 1  # visible with the barrier of the block

            stage, pairs = i % STAGES, descriptor[FIELD.unmasked_pairs]
            self.load_block(found, stage, self.barrier_set(i, pairs), stamps, i)
            return next_page_ids

        lax.fori_loop(1, num_blocks, load_next, next_page_ids)
        return self.next_item(index)

    def next_item(self, index: Any) -> tuple:
        """Returns the index and the fields of the item after the one at this index."""
        cta, items = self.cta, self.cta.inputs.requests.work.items
        following = index + (step_of(cta.range_ref) if cta.in_pairs else 1)
        following = jnp.clip(following, 0, items.shape[0] - 1)
        return following, *(items[following, i] for i in range(ITEM_FIELDS))

    def unmasked_pairs(self, item: WorkItem, kv_len: Any, query_len: Any, num_blocks: Any) -> Any:
        """Returns how many pairs of the item's first blocks need no mask for any row of the tile.

        The tile's first row, over all CTAs that share it, sees the fewest keys.
        """
        call, first_row = self.cta.call, item.row_tile * self.cta.ctas_per_tile * BLOCK
        visible = VisibleKeys.of(call, kv_len, query_len)
        fewest_keys = visible.count(first_row // call.num_heads)
        return jnp.clip((fewest_keys // BLOCK - item.block_start) // 2, 0, num_blocks // 2)

    def load_q(self, request: Any, row: Any, stamps: Stamps) -> None:
        """Loads 64 rows of q, or all of them where there are fewer."""
        cta = self.cta
        q = cta.inputs.q
        rows = min(BLOCK, q.rows)
        plgpu.barrier_wait(cta.scratch.q_empty)
        stamps.item(at.LOAD_Q)
        for columns in cta.columns:
            part, start = q.column(columns.start)
            plgpu.copy_gmem_to_smem(
                part.at[request, pl.ds(row, rows), pl.ds(start, columns.width)],
                columns.q.at[0] if rows == BLOCK else columns.q.at[0, pl.ds(0, rows)],
                cta.scratch.q_full,
            )
        stamps.item(at.LOADED_Q)

    def load_block(
        self, found: Any, stage: Any, barrier_set: Any, stamps: Stamps, block: Any
    ) -> None:
        """Loads a KV block, found by `kv_blocks.locate`, when its stage is free.

        block: its number in the item.
        """
        stamps.block(at.LOAD, block)
        for i, columns in enumerate(self.cta.columns):
            if columns.empty is not None:
                plgpu.barrier_wait(columns.empty.at[stage])
            full = columns.full.at[barrier_set]
            self.cta.kv_blocks.load(found, columns.start, columns.kv.at[stage], full)
            stamps.block(at.LOADED_1 + i, block)

    @staticmethod
    def barrier_set(i: Any, unmasked_pairs: Any) -> Any:
        """Returns the index of the barrier set that signals block i of an item.

        There are two sets per stage: one for the blocks of unmasked pairs, and one for all others.
        Mosaic GPU keeps the parity of a barrier in the waiting thread and flips it with each wait,
        so a thread must wait for every phase. In a pair, one warpgroup scores the block of each
        stage. Any other block is scored by warpgroup 0, whatever its stage is. With a set for each
        case, the warpgroup that scores its blocks waits for all of its phases.
        """
        return i % STAGES + jnp.where(i < 2 * unmasked_pairs, 0, STAGES)


def compute(cta: Cta, warpgroup: jax.Array) -> None:
    """Runs a computing warpgroup: its items, then its share of the split tiles."""
    cta.g.take_registers(cta.call.config.warpgroup_registers, 0)
    lax.switch(warpgroup, [ComputingWarpgroup(cta, side).run for side in (0, 1)])
    if cta.call.combines:
        cta.stamps.item(at.COMBINE)
        # One copy of this code for both warpgroups: an SM caches 128 KB of instructions.
        combine_shares(
            divide_into_columns(cta.g, cta.call.plan, cta.call.kv_lora_rank, warpgroups=2),
            cta.combine_refs,
            cta.inputs.requests.work.items,
            cta.item_range,
            counter_of=cta.counter_of,
            place=cta.place,
            warpgroup=cta.g.warpgroup(),
            warpgroups=2,
        )
        cta.stamps.item(at.COMBINE_END)
    cta.stamps.item(at.KERNEL_END)


def partial_types(call: DecodeCall) -> Partials:
    """Returns shapes and dtypes of the partial results.

    float16 holds no large numbers, so its partials have a power-of-two scale per row and half of o.
    """
    rows, blocks = call.plan.rows_per_tile, call.kv_lora_rank // BLOCK_COLUMNS
    shape = (call.num_partials, call.config.ctas_per_tile, blocks, BLOCK * BLOCK_COLUMNS)
    scaled = call.partial_dtype == jnp.float16
    return Partials(
        o=float_struct(*shape, dtype=call.partial_dtype),
        lse=float_struct(call.num_partials, rows),
        scales=float_struct(call.num_partials, 2, rows) if scaled else None,
    )


def exchange_of(call: DecodeCall) -> jax.Ref | None:
    """Returns what the CTAs of a pair exchange results through in the interpreter.

    The interpreter has no access to another CTA's shared memory.
    """
    if not (call.config.in_pairs and call.interpreting):
        return None
    groups = len(call.requests.work.ranges) // 2
    return jax.empty_ref(float_struct(groups, 2, BLOCK, call.kv_lora_rank // 2 + 2))
