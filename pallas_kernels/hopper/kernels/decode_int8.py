"""Paged absorbed MLA decode for Hopper over an int8 latent cache, 64 query rows per CTA.

Problem: wgmma reads 8-bit operands from shared memory only along the summed dimension, which V^T
has the wrong way round. So V^T becomes bfloat16 in registers, on its way to O^T = V^T P^T as the
register operand. A warpgroup that converts V^T can do nothing else meanwhile. Each warpgroup of a
CTA therefore has a role of its own, and they work on different blocks of 64 tokens at a time:

    warpgroup 3, loader    block i + 2: keys, rope keys and scales of the tokens, by TMA
    warpgroup 2, softmax   block i + 1: S^T = K q^T, then P^T
    warpgroups 0 and 1,    block i: O^T += V^T P^T, the first and the second half of its dimensions
      output

Blocks are in stages of shared memory, from one warpgroup to the next:

    loader --- full ---> softmax --- p_ready ---> output --- stage_free ---> loader
           --- full -----------------------------> output

Work items, too. The loader finds an item and checks its request; the softmax warpgroup hands the
row sums to the output warpgroups, and tells the loader whether the item has to be repeated:

    loader --- item_ready ---> softmax --- sums_ready ---> output --- sums_taken ---> softmax
    softmax --- q_ready, item_done ---> loader

S^T has a row per token and a column per query. q is two int8 values and a rope part, in steps of a
power of two per query (`parts/quantize_q.py`). One product of 128 columns computes high and low
parts together, because it reads a quarter less of shared memory than two of 64 columns.

    S = ((128 * high + low) * k_scale[token] + rope) * q_step[query]
    P = e^(s - m) * k_scale[token], bfloat16

The maximum m of a query is that of the work item's first block, so that later blocks rescale
nothing: bfloat16 holds a P of 2^64 as well as one of 1. If a sum says that some P may be larger,
the item is computed a second time. Then every block raises the maxima, and O is rescaled to them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.kernels.decode_int8_compute import Output, Softmax
from pallas_kernels.hopper.kernels.decode_int8_refs import (
    FIELD,
    LOADER_WARPGROUP,
    OUTPUT_WARPGROUPS,
    QUERIES,
    WARPGROUPS,
    Inputs,
    Int8Cache,
    Kernel,
    Partials,
    Scratch,
)
from pallas_kernels.hopper.mosaic.dequantize import WideningBackend
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs, float_struct
from pallas_kernels.hopper.work_items import BLOCK, WorkItem, block_sources, fits

class LoaderState(NamedTuple):
    """The loader's work item, and where it is."""

    p: Any  # the item's place in the work list
    items_left: Any  # this one included
    stage: Any  # of the item's first block
    item: WorkItem
    kv_len: Any
    query_len: Any


class Loader(Kernel):
    """Warpgroup 3 reads work items, checks their requests and copies their KV blocks."""

    def run(self) -> None:
        self.g.take_registers(self.call.tiles.registers, LOADER_WARPGROUP)
        head = self.with_lengths(WorkItem.read(self.work_range()))
        first, stop = self.item_range()
        state = LoaderState(first, stop - first, jnp.int32(0), *head)
        lax.while_loop(lambda state: state.items_left > 0, self.load_item, state)
        # Every phase of a barrier must be seen, the last release of each stage as well.
        for stage in range(self.stages):
            plgpu.barrier_wait(self.stage_free(stage))

    def with_lengths(self, item: WorkItem) -> tuple[WorkItem, Any, Any]:
        """Returns (item, kv length, query length)."""
        return item, *self.call.lengths(self.inputs.requests, jnp.maximum(item.request, 0))

    def load_item(self, state: LoaderState) -> LoaderState:
        """Loads the blocks of an item. Returns the state for the next item, or for its repetition.

        q's loads would queue behind those of keys: only the first block is copied before q is
        there.
        """
        item = state.item
        self.publish(state)

        def block(i: Any, stage: Any) -> Any:
            self.copy_block(state, item.block_start + i, stage)
            pl.when(i == 0)(lambda: plgpu.barrier_wait(self.q_ready(stage)))
            return self.stage_after(stage)

        stage = lax.fori_loop(0, item.block_end - item.block_start, block, state.stage)
        no_blocks = item.block_end == item.block_start
        pl.when(no_blocks)(lambda: plgpu.barrier_wait(self.q_ready(stage)))
        # The next item is read only now, because the loop above leaves no registers for it.
        planned = self.with_lengths(WorkItem.read(self.listed(state.p + 1)))
        plgpu.barrier_wait(self.item_done(state.p))
        descriptor = self.scratch.descriptor
        repeats = descriptor[FIELD.repeats]
        following = lax.cond(
            repeats > 0,
            lambda _: self.with_lengths(WorkItem.read(self.listed(state.p))),
            lambda planned: planned,
            planned,
        )
        p = state.p + 1 - repeats
        return LoaderState(p, descriptor[FIELD.items_left] - 1 + repeats, stage, *following)

    def publish(self, state: LoaderState) -> None:
        """Writes the work descriptor, all but its last field."""
        misfit = (~fits(state.item, state.kv_len)).astype(jnp.int32)
        plgpu.commit_smem()  # all warps have read the descriptor of the item before
        fields = (*state.item, state.kv_len, state.query_len, state.stage, misfit, state.items_left)
        for i, value in enumerate(fields):
            self.scratch.descriptor[i] = value
        plgpu.barrier_arrive(self.item_ready(state.item.block_start))

    def copy_block(self, state: LoaderState, block: Any, stage: Any) -> None:
        """Copies a block to a stage as soon as it is free.

        Where the cache lacks its page, page 0 is copied instead and the item is marked as invalid.
        """
        inputs, scratch = self.inputs, self.scratch
        ((page, rows, _),), exists = block_sources(
            inputs.requests.block_tables,
            state.item.request,
            block,
            state.kv_len,
            self.call.page_size,
            inputs.cache.rope.shape[0],
        )

        @pl.when(~exists)
        def _mark_invalid() -> None:
            plgpu.commit_smem()  # each warp has written its 0 before
            scratch.descriptor[FIELD.invalid] = 1

        plgpu.barrier_wait(self.stage_free(stage))
        targets = scratch.latent, scratch.rope, scratch.token_scales
        for source, target in zip(inputs.cache, targets, strict=True):
            full = scratch.full.at[stage]
            plgpu.copy_gmem_to_smem(source.at[page, rows], target.at[stage], full)


def decode_int8(call: DecodeCall) -> tuple[jax.Array, ...]:
    """Runs the plan of a call whose q has a multiple of 64 rows per request.

    Writes whole tiles to the outputs, and split tiles as well where the launch combines them.
    Tile sizes are from `tuning.roles_int8_tiles`.

    Returns:
        o [partials, 64, kv_lora_rank] and lse [partials, 64] of split tiles.

    Raises:
        ValueError: q has other rows, or the rope keys are not 64 wide.
    """
    if call.q.shape[1] % QUERIES or call.rope_dim != BLOCK:
        raise ValueError(
            f"q must have a multiple of {QUERIES} rows and rope_pages {BLOCK} columns, got "
            f"{call.q.shape} and {call.cache[1].shape}"
        )
    g = WideningBackend(interpreting=call.interpreting)

    def body(inputs: Inputs, outputs: Outputs, partials: Partials, scratch: Scratch) -> None:
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        warpgroup = lax.axis_index("wg")
        refs = call, g, inputs, outputs, partials, scratch
        roles = [functools.partial(Output(*refs).run, warpgroup), Softmax(*refs).run]
        roles.append(Loader(*refs).run)
        # A switch, since what one branch needs takes no register in another.
        lax.switch(jnp.maximum(warpgroup - (OUTPUT_WARPGROUPS - 1), 0), roles)

    kernel = plgpu.kernel(
        body,
        out_type=(
            Partials(
                o=float_struct(
                    call.num_partials, QUERIES, call.kv_lora_rank, dtype=call.partial_dtype
                ),
                lse=float_struct(call.num_partials, QUERIES),
            ),
        ),
        scratch_types=(Scratch.types(call, g),),
        grid=(call.plan.num_workers,),
        grid_names=("worker",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        interpret=call.interpret,
        kernel_name="mla_decode_int8",
        compiler_params=OWN_BARRIERS,
    )
    (partials,) = kernel(Inputs(call.q, Int8Cache(*call.cache), call.requests), call.outputs)
    return tuple(partials)
