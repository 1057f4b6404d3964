"""Paged absorbed MLA decode for Hopper over an int8 latent cache, 64 query rows per CTA.

Problem: wgmma reads 8-bit operands from shared memory only along the summed dimension, which V has
the wrong way round. So V^T becomes bfloat16 in registers and is the register operand of
O^T = V^T P^T. A warpgroup that converts V^T cannot compute softmax meanwhile. Therefore each
warpgroup of a CTA has one role, and the roles work on different blocks of 64 tokens at a time:

    warpgroup 3         loader    block i + 2: latents, rope keys and scales of its tokens, by TMA
    warpgroup 2         softmax   block i + 1: S^T = K q^T, then P^T
    warpgroups 0 and 1  output    block i: O^T += V^T P^T, half of the dimensions each

Blocks lie in stages of shared memory. Arrows are barriers; the warpgroup at the head waits:

    loader  -- full -------> softmax, output
    softmax -- p_ready ----> output
    output  -- stage_free -> loader

Per work item, the loader writes a work descriptor. The softmax warpgroup loads q, and writes the
row sums and the destination of the result at the end:

    loader  -- item_ready -> softmax
    softmax -- q_ready ----> loader, which copies no second block before
    softmax -- item_done --> loader, which reads whether the item is repeated
    softmax -- sums_ready -> output
    output  -- sums_taken -> softmax

S^T has a row per token and a column per query. q is two int8 parts and a rope part, in steps of a
power of two per query (`parts/quantize_q.py`). One product of 128 columns serves both int8 parts:
it reads a quarter less of shared memory than two of 64 columns.

    S = ((128 * high + low) * k_scale[token] + rope) * q_step[query]
    P = e^(S - m) * k_scale[token], rounded to bfloat16

The maximum m of a query is that of the work item's first block, so later blocks need no maxima and
rescale nothing: bfloat16 holds a P of 2^64 as well as one of 1. If a sum at the end says that some
P may be larger, the item is repeated. Then every block raises the maxima, and O is rescaled.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.config import DecodeInt8Config
from pallas_kernels.hopper.kernels.decode_int8_compute import Output, Softmax
from pallas_kernels.hopper.kernels.decode_int8_refs import (
    FIELD,
    LOADER_WARPGROUP,
    OUTPUT_WARPGROUPS,
    QUERIES,
    WARPGROUPS,
    Inputs,
    Int8Cache,
    Role,
    Scratch,
)
from pallas_kernels.hopper.mosaic.int8 import DequantizingBackend
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.parts.transposed import Partials
from pallas_kernels.hopper.work_items import BLOCK, WorkItem, block_sources, fits


class LoaderState(NamedTuple):
    """What the loader carries from one work item to the next."""

    index: Any  # of the item in the work list
    items_left: Any  # this one included
    stage: Any  # of its first block
    item: WorkItem
    kv_len: Any
    query_len: Any


class Loader(Role):
    """Warpgroup 3 reads work items, checks their requests and copies their KV blocks."""

    def run(self) -> None:
        self.g.take_registers(self.call.config.warpgroup_registers, LOADER_WARPGROUP)
        head = self._with_lengths(WorkItem.read(self.work_range()))
        first, stop = self.item_range()
        state = LoaderState(first, stop - first, jnp.int32(0), *head)
        lax.while_loop(lambda state: state.items_left > 0, self._load_item, state)
        # Every phase of a barrier must be waited for, that of the last release as well.
        for stage in range(self.stages):
            plgpu.barrier_wait(self.stage_free(stage))

    def _with_lengths(self, item: WorkItem) -> tuple[WorkItem, Any, Any]:
        """Returns (item, kv length, query length)."""
        return item, *self.call.lengths(self.inputs.requests, jnp.maximum(item.request, 0))

    def _listed(self, index: Any) -> tuple[WorkItem, Any, Any]:
        """Returns an item of the work list with its lengths."""
        return self._with_lengths(WorkItem.read(self.listed_item(index)))

    def _load_item(self, state: LoaderState) -> LoaderState:
        """Loads the blocks of an item. Returns the state for the next item, or for its repetition.

        The second block has to wait for q, because the loads of q would queue behind its copy.
        """
        item = state.item
        stamps = self.stamps.of_counted_item(lambda: state.index - self.item_range()[0])
        stamps.item(at.ITEM)
        self._write_descriptor(state)

        def block(i: Any, stage: Any) -> Any:
            stamps.block(at.LOAD, i)
            self._copy_block(state, item.block_start + i, stage)
            stamps.block(at.LOADED_3, i)
            pl.when(i == 0)(lambda: plgpu.barrier_wait(self.q_ready(stage)))
            return self.stage_after(stage)

        stage = lax.fori_loop(0, item.block_end - item.block_start, block, state.stage)
        no_blocks = item.block_end == item.block_start
        pl.when(no_blocks)(lambda: plgpu.barrier_wait(self.q_ready(stage)))
        # The next item is read after the loop, which leaves no registers for it.
        following = self._listed(state.index + 1)
        plgpu.barrier_wait(self.item_done(state.index))
        descriptor = self.scratch.descriptor
        repeats = descriptor[FIELD.repeats]
        following = lax.cond(
            repeats > 0, lambda _: self._listed(state.index), lambda known: known, following
        )
        index = state.index + 1 - repeats
        return LoaderState(index, descriptor[FIELD.items_left] - 1 + repeats, stage, *following)

    def _write_descriptor(self, state: LoaderState) -> None:
        """Writes all fields of the work descriptor but the last one, and signals it."""
        invalid = (~fits(state.item, state.kv_len, self.call.plan)).astype(jnp.int32)
        plgpu.commit_smem()  # all warps have read the fields of the item before
        lengths = state.kv_len, state.query_len
        fields = (*state.item, *lengths, state.stage, invalid, state.items_left)
        for i, value in enumerate(fields):
            self.scratch.descriptor[i] = value
        plgpu.barrier_arrive(self.item_ready(state.item.block_start))

    def _copy_block(self, state: LoaderState, block: Any, stage: Any) -> None:
        """Copies a block to a stage when the stage is free.

        Where the cache lacks its page, page 0 is copied instead and the item is marked as invalid.
        """
        cache, scratch = self.inputs.cache, self.scratch
        ((page, rows, _),), exists = block_sources(
            self.inputs.requests.block_tables,
            state.item.request,
            block,
            state.kv_len,
            self.call.page_size,
            cache.latent.shape[0],
        )

        @pl.when(~exists)
        def _mark_invalid() -> None:
            plgpu.commit_smem()  # every warp has written the field before
            scratch.descriptor[FIELD.invalid] = 1

        plgpu.barrier_wait(self.stage_free(stage))
        full = scratch.full.at[stage]
        targets = scratch.latent, scratch.rope, scratch.token_scales
        for source, target in zip(cache, targets, strict=True):
            plgpu.copy_gmem_to_smem(source.at[page, rows], target.at[stage], full)


def decode_int8(call: DecodeCall[DecodeInt8Config]) -> Partials:
    """Runs the plan of a call: one CTA per worker of the plan.

    The launch writes whole tiles to the call's outputs, and split tiles where it combines them.

    Returns:
        o [partials, 64, kv_lora_rank] and lse [partials, 64] of the work items of split tiles.

    Raises:
        ValueError: q does not have a multiple of 64 rows, or rope keys are not 64 wide.
    """
    if call.q.rows % QUERIES or call.rope_dim != BLOCK:
        raise ValueError(
            f"q must have a multiple of {QUERIES} rows and rope_pages {BLOCK} columns, got "
            f"{call.q.rows} rows and {call.cache[1].shape}"
        )
    g = DequantizingBackend(interpreting=call.interpreting)

    def body(inputs: Inputs, outputs: Outputs, partials: Partials, scratch: Scratch) -> None:
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        warpgroup = lax.axis_index("wg")
        refs = inputs, outputs, partials, scratch, Stamps(inputs.stamps)
        roles: list[Callable[[], None]] = [
            functools.partial(Output(call, g, *refs).run, warpgroup),
            Softmax(call, g, *refs).run,
            Loader(call, g, *refs).run,
        ]
        # In a switch, what one branch needs takes no register in another.
        lax.switch(jnp.maximum(warpgroup - (OUTPUT_WARPGROUPS - 1), 0), roles)

    kernel = plgpu.kernel(
        body,
        out_type=(Partials.structs(call),),
        scratch_types=(Scratch.types(call, g),),
        grid=(call.plan.num_workers,),
        grid_names=("worker",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        interpret=call.interpret,
        kernel_name="mla_decode_int8",
        compiler_params=OWN_BARRIERS,
    )
    inputs = Inputs(call.q, Int8Cache(*call.cache), call.requests, call.stamps)
    (partials,) = kernel(inputs, call.outputs)
    return partials
