"""Paged absorbed MLA decode for Hopper with up to 32 query rows per tile: the transposed form.

The problem: q has R rows per request (query tokens times heads). Each row attends to the tokens of
a paged cache, whose entries are [latent | rope]. K is the whole entry, V is the latent part. With
8 to 32 rows (16 heads, one token) a wgmma tile of 64 query rows is mostly padding. So here KV
tokens are the rows of a tile and queries its columns:

    S^T = K Q^T    64 tokens x n queries
    O^T = V^T P^T  kv_lora_rank x n queries

One warpgroup holds all of O^T: 512 x 16 take 64 registers per thread. So one warpgroup computes,
one loads, and the two exchange nothing but stages of shared memory:

    loader warpgroup                                  computing warpgroup
    for each work item:                               for each work item:
        q of the tile         -- q_full  -------->        zero O^T
        for each block:       <- q_empty ---------        for each block:
            entries, in       -- kv_full -------->            S^T = K Q^T
            three parts       <- kv_empty --------            P = softmax; O^T += V^T P^T
                                                          normalise O^T, store it

A block is 64 tokens. Its entries are loaded in three parts: the rope part, and the left and the
right half of the latent part. The kernel is bound by memory: the bytes of a block take about 4000
cycles, and the matrix work takes less than 1500.

A split plan gives each CTA a range of work items; an item is a range of blocks of one tile. The
item's result is the output of a whole tile, or a partial result of a split tile. A split tile is
combined in one of three places: at the end of the launch, by all CTAs that have a part of it; in a
launch of its own; or, where the two CTAs of a cluster share it, in their shared memories.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.config import DecodeTransposedConfig
from pallas_kernels.hopper.kernels.decode_transposed_compute import Computer
from pallas_kernels.hopper.kernels.decode_transposed_refs import (
    COMPUTING,
    LOADING,
    WARPGROUPS,
    Cta,
    Inputs,
    Scratch,
    Sizes,
)
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS
from pallas_kernels.hopper.mosaic.transposed import TransposedBackend
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.call import DecodeCall, float_struct
from pallas_kernels.hopper.parts.transposed import Partials, require_whole_tiles
from pallas_kernels.hopper.work_items import WorkItem, fits


def decode_transposed(call: DecodeCall[DecodeTransposedConfig]) -> Partials:
    """Runs the plan: stores whole tiles in call.outputs, returns the results of split tiles.

    call.q has a multiple of rows_per_tile rows per request; those after the real ones are padding.
    """
    require_whole_tiles(call)
    sizes = Sizes.of(call)
    g = TransposedBackend(interpreting=call.interpreting)

    def body(inputs, outputs, partials, scratch):
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        warpgroup = lax.axis_index("wg")
        cta = Cta.of_grid(g, call, sizes, inputs, outputs, partials, scratch)
        pl.when(warpgroup == LOADING)(Loader(cta).run)
        pl.when(warpgroup == COMPUTING)(Computer(cta).run)
        if call.combines:
            cta.stamps.item(at.COMBINE)
            cta.results.combine(cta.items, warpgroup)
            cta.stamps.item(at.COMBINE_END)
        cta.stamps.item(at.KERNEL_END)

    kernel = plgpu.kernel(
        body,
        out_type=(Partials.structs(call),),
        scratch_types=(Scratch.types(g, call, sizes),),
        grid=(-(-call.plan.num_workers // (1 + sizes.in_pairs)),),
        grid_names=("group",),
        cluster=(2,) if sizes.in_pairs else (),
        cluster_names=("cluster",) if sizes.in_pairs else (),
        num_threads=WARPGROUPS,
        thread_name="wg",
        interpret=call.interpret,
        kernel_name="mla_decode_transposed",
        compiler_params=OWN_BARRIERS,
    )
    (cache,) = call.cache
    inputs = Inputs(call.q, cache, call.requests, _exchange(call, sizes), call.stamps)
    (partials,) = kernel(inputs, call.outputs)
    return partials


def _exchange(call: DecodeCall, sizes: Sizes) -> Any | None:
    """Returns `Inputs.exchange`."""
    if not (sizes.in_pairs and call.interpreting):
        return None
    clusters = len(call.requests.work.ranges) // 2
    return jax.empty_ref(float_struct(clusters, 2, sizes.latent + 2, sizes.rows))


@dataclasses.dataclass(frozen=True)
class Loader:
    """The warpgroup that loads q and the blocks of all work items, ahead of the computing one."""

    cta: Cta

    def run(self) -> None:
        """Loads all work items of the CTA."""
        self.cta.run_items(self._load_item)
        # A barrier must not end with a phase that nothing has waited for.
        for stage in range(self.cta.sizes.q_stages):
            plgpu.barrier_wait(self.cta.scratch.q_empty.at[stage])
        for part, stage in self.cta.kv_stages():
            plgpu.barrier_wait(part.empty.at[stage])

    def _load_item(self, number: Any, blocks_before: Any, item: WorkItem) -> None:
        cta, kv_blocks, invalid = self.cta, self.cta.kv_blocks, self.cta.scratch.invalid
        stamps = cta.stamps.of_item(number - cta.items[0])
        stamps.item(at.ITEM)
        kv_len, _ = cta.lengths(item)
        first_page_ids = kv_blocks.prefetch_table(item.request, item.block_start, kv_len)
        q_stage = lax.rem(number, cta.sizes.q_stages)
        plgpu.barrier_wait(cta.scratch.q_empty.at[q_stage])
        planned = item._replace(partial=item.own_partial)
        invalid[q_stage] = (~fits(planned, kv_len, cta.call.plan)).astype(jnp.int32)
        stamps.item(at.LOAD_Q)
        self._load_q(item, q_stage)
        stamps.item(at.LOADED_Q)

        def load_block(i, page_ids):
            # A block's part of the block table is read while the block before it is loaded.
            next_page_ids = kv_blocks.prefetch_table(item.request, item.block_start + i + 1, kv_len)
            found, all_exist = kv_blocks.locate(
                page_ids, item.request, item.block_start + i, kv_len
            )

            @pl.when(~all_exist)
            def _mark_invalid():
                plgpu.commit_smem()  # Every warp must have stored its 0 above before this 1.
                invalid[q_stage] = 1

            stamps.block(at.LOAD, i)
            for k, part in enumerate(cta.parts):
                stage = part.stage_of(blocks_before + i)
                plgpu.barrier_wait(part.empty.at[stage])
                kv_blocks.load(found, part.column, part.kv.at[stage], part.full.at[stage])
                stamps.block(at.LOADED_1 + k, i)
            return next_page_ids

        lax.fori_loop(0, item.block_end - item.block_start, load_block, first_page_ids)

    def _load_q(self, item: WorkItem, q_stage: Any) -> None:
        rows = self.cta.sizes.rows
        for part in self.cta.parts:
            of_tile = pl.ds(item.row_tile * rows, rows)
            q, column = self.cta.inputs.q.column(part.column)
            plgpu.copy_gmem_to_smem(
                q.at[item.request, of_tile, pl.ds(column, part.width)],
                part.q.at[q_stage],
                self.cta.scratch.q_full.at[q_stage],
            )
