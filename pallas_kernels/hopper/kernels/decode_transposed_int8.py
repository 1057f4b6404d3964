"""Paged absorbed MLA decode for Hopper over an int8 latent cache, up to 32 query rows per tile.

The int8 form of `decode_transposed`: KV tokens are the rows of a wgmma tile and queries its
columns. An entry of the cache is an int8 latent part with one scale per token, and a bfloat16 rope
part. The kernel quantizes q (`quantize_q`): a row is (128 high + low, rope) times the row's step.

    S^T = K Q^T    int8 x int8 -> int32 for the latent part, bfloat16 for the rope part
    s              (int32 * scale[token] + rope part) * step[row]
    P              e^(s - m) * scale[token] in bfloat16
    O^T = V^T P^T  bfloat16; V^T becomes bfloat16 in registers, exactly, on its way to wgmma

V and K have the same scale, which P takes on before it is rounded. A copy of V in bfloat16 in
shared memory would make its bandwidth the limit: 64 KB written and 64 KB read per block take 1000
cycles, and TMA, K Q^T and the bytes of V take 1000 already. The 41 KB of a block (64 tokens) take
about 2100 cycles of a memory-bound SM.

One or two warpgroups compute, one loads. Two take turns with the blocks. Each has an O^T of its
own, and they add both up at the end of a work item:

    loader warpgroup                                computing warpgroups
    for each work item:                             for each work item:
        check it          -- item_checked ->            quantize q, a share each
                          <- item_done -----            for each own block:
        for each block:   -- full --------->                S, softmax, P
            load it       <- empty ---------                O^T += V^T P^T
                                                        add up, normalise and store O^T

The split plan, and what becomes of the results of work items, are as in `decode_transposed`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.config import DecodeTransposedInt8Config
from pallas_kernels.hopper.kernels.decode_transposed_int8_compute import Computer
from pallas_kernels.hopper.kernels.decode_transposed_int8_refs import (
    ITEM_STAGES,
    Cta,
    Inputs,
    Int8Cache,
    Scratch,
    Sizes,
)
from pallas_kernels.hopper.mosaic.int8 import DequantizingBackend
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.call import DecodeCall
from pallas_kernels.hopper.parts.transposed import Partials, require_whole_tiles
from pallas_kernels.hopper.work_items import WorkItem, block_sources, fits


def decode_transposed_int8(call: DecodeCall[DecodeTransposedInt8Config]) -> Partials:
    """Runs the plan: stores whole tiles in call.outputs, returns the results of split tiles.

    call.q is bfloat16 and has a multiple of rows_per_tile rows per request; those after the real
    ones are padding. call.cache is as `Int8Cache`, with pages of a multiple of 64 tokens.
    """
    require_whole_tiles(call)
    sizes = Sizes.of(call)
    g = DequantizingBackend(interpreting=call.interpreting)

    def body(inputs, outputs, partials, scratch):
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        cta = Cta(g, call, sizes, inputs, outputs, partials, scratch)
        computers = [Computer(cta, warpgroup).run for warpgroup in range(sizes.computing)]
        # In a switch, no branch holds registers for what only another branch needs.
        lax.switch(lax.axis_index("wg"), [*computers, Loader(cta).run])

    kernel = plgpu.kernel(
        body,
        out_type=(Partials.structs(call),),
        scratch_types=(Scratch.types(g, call, sizes),),
        grid=(call.plan.num_workers,),
        grid_names=("worker",),
        num_threads=sizes.computing + 1,
        thread_name="wg",
        interpret=call.interpret,
        kernel_name="mla_decode_transposed_int8",
        compiler_params=OWN_BARRIERS,
    )
    inputs = Inputs(call.q, Int8Cache(*call.cache), call.requests, call.stamps)
    (partials,) = kernel(inputs, call.outputs)
    return partials


@dataclasses.dataclass(frozen=True)
class Loader:
    """The warpgroup that checks all work items and loads their blocks, ahead of the others."""

    cta: Cta

    def run(self) -> None:
        """Loads all work items of the CTA."""
        cta, scratch = self.cta, self.cta.scratch
        cta.take_registers(cta.sizes.computing)
        cta.run_items(self._load_item)
        # A barrier must not end with a phase that nothing has waited for.
        for stage in range(ITEM_STAGES):
            plgpu.barrier_wait(scratch.item_done.at[stage])
        for stage in range(cta.sizes.stages):
            plgpu.barrier_wait(scratch.empty.at[stage])

    def _load_item(self, number: Any, blocks_before: Any, item: WorkItem) -> None:
        scratch, stamps = self.cta.scratch, self.cta.stamps_of(number)
        stamps.item(at.ITEM)
        item_stage = lax.rem(number, ITEM_STAGES)
        kv_len, _ = self.cta.lengths(item)
        plgpu.barrier_wait(scratch.item_done.at[item_stage])
        invalid = ~fits(item, kv_len, self.cta.call.plan)
        scratch.invalid[item_stage] = invalid.astype(jnp.int32)
        plgpu.barrier_arrive(scratch.item_checked.at[item_stage])

        def load_block(i, _):
            stamps.block(at.LOAD, i)
            self._load_block(item, item_stage, kv_len, blocks_before, i)
            stamps.block(at.LOADED_3, i)
            return ()

        lax.fori_loop(0, item.block_end - item.block_start, load_block, ())

    def _load_block(
        self, item: WorkItem, item_stage: Any, kv_len: Any, blocks_before: Any, i: Any
    ) -> None:
        cache, scratch = self.cta.inputs.cache, self.cta.scratch
        num_pages, page_size, _ = cache.rope.shape
        ((page, tokens, _),), exists = block_sources(
            self.cta.inputs.requests.block_tables,
            item.request,
            item.block_start + i,
            kv_len,
            page_size,
            num_pages,
        )

        @pl.when(~exists)
        def _mark_invalid():
            plgpu.commit_smem()  # Every warp must have stored what `fits` says before this 1.
            scratch.invalid[item_stage] = 1

        stage = lax.rem(blocks_before + i, self.cta.sizes.stages)
        plgpu.barrier_wait(scratch.empty.at[stage])
        for source, target in zip(cache, scratch.kv, strict=True):
            plgpu.copy_gmem_to_smem(
                source.at[page, tokens], target.at[stage], scratch.full.at[stage]
            )
