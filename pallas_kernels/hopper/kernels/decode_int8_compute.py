"""The computing warpgroups of `decode_int8`: one makes P^T, two make O^T."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import quantize
from pallas_kernels.hopper.kernels.decode_int8_refs import (
    DISCARDED,
    FIELD,
    OUTPUT_WARPGROUPS,
    QUERIES,
    SOFTMAX_WARPGROUP,
    STEP_TOKENS,
    TILE,
    Destination,
    Role,
)
from pallas_kernels.hopper.mosaic.int8 import DEQUANTIZED_STEP, GROUP
from pallas_kernels.hopper.mosaic.primitives import ROWS
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.mosaic.transposed import COLUMNS
from pallas_kernels.hopper.mosaic.values import opaque_zero, per_column, per_row
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.call import Outputs
from pallas_kernels.hopper.parts.normalize import divided, nan_if_invalid, natural_lse
from pallas_kernels.hopper.parts.quantize_q import fetch_q
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.parts.transposed import Partials
from pallas_kernels.hopper.parts.visible_keys import VisibleKeys
from pallas_kernels.hopper.work_items import BLOCK, NO_KEY, WorkItem

SUM_LIMIT = 2.0**64  # where a query's sum of e^(s - m) is larger, the work item is repeated


class Blocks(NamedTuple):
    """The KV blocks of the work item that is computed now."""

    start: Any
    unmasked_end: Any  # blocks before this one are visible to every query of the tile
    running: Any  # whether every block raises the maxima, and not only the first one


class Progress(NamedTuple):
    """What the softmax warpgroup carries from one block to the next, in registers."""

    sums: Any  # per query: each thread's part of the sum of e^(s - m)
    stage: Any
    products: tuple[Any, ...]  # S^T of the block: the integer part and the rope part; () at the end


class Softmax(Role):
    """Warpgroup 2 makes P^T of each block, and sums and lse of each work item.

    S^T, softmax and S^T of the next block are one chain. It takes longer than the output
    warpgroups need for a block, so they are ready when P^T is. The next S^T is started before P^T
    is signalled, ahead of the products of the output warpgroups.

    It has no register left for time stamps. Each more makes it spill more, so there are few.
    """

    def run(self) -> None:
        self.g.take_registers(self.call.config.warpgroup_registers, SOFTMAX_WARPGROUP)
        self.scratch.descriptor[FIELD.repeats] = 0

        def run_item(items_left: Any) -> Any:
            def number() -> Any:
                begin, end = self.item_range()
                return end - begin - items_left

            role = dataclasses.replace(self, stamps=self.stamps.of_counted_item(number))
            role._load_queries(items_left)
            return role._compute_item()

        first, stop = self.item_range()
        # The number of items left is in the descriptor, so it takes no register while one runs.
        none_left = lax.while_loop(lambda left: left > 0, run_item, stop - first)
        plgpu.barrier_wait(self.sums_taken(none_left))

    # -- the queries of an item -----------------------------------------------------------------
    def _load_queries(self, items_left: Any) -> None:
        """Writes q, the number of keys that each query sees, and unset maxima."""
        item, scratch = self.scratch.descriptor, self.scratch
        plgpu.barrier_wait(self.item_ready(items_left))
        self.stamps.item(at.ITEM)
        request, row_tile = item[FIELD.request], item[FIELD.row_tile]
        targets = scratch.q_latent, scratch.q_rope, scratch.q_steps
        first = request, row_tile * QUERIES
        fetch_q(self.g, self.inputs.q, first, targets, 0, QUERIES, unit=self.call.log2_scale)
        row_tile, kv_len, query_len = self._query_fields()
        # The zero keeps the division by a power of two from being hoisted, where it would spill.
        row = self.g.iota_line(QUERIES, COLUMNS) + (row_tile * QUERIES + opaque_zero(kv_len))
        token = row // self.call.num_heads
        keys = VisibleKeys.of(self.call, kv_len, query_len).count(token)
        scratch.visible_keys.at[0][...] = jnp.where(token < query_len, keys, 0)
        for i, value in enumerate((0.0, 1.0)):
            scratch.maxima.at[i][...] = self.g.full((QUERIES,), value, COLUMNS)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.q_ready(row_tile))
        self.stamps.item(at.Q_READY)

    def _query_fields(self) -> tuple[Any, Any, Any]:
        """Returns (row_tile, kv_len, query_len)."""
        item = self.scratch.descriptor
        return item[FIELD.row_tile], item[FIELD.kv_len], item[FIELD.query_len]

    def _unmasked_end(self, start: Any, end: Any) -> Any:
        """Returns the end of the blocks that every query of the tile sees completely."""
        row_tile, kv_len, query_len = self._query_fields()
        row = row_tile * QUERIES
        visible = VisibleKeys.of(self.call, kv_len, query_len)
        fewest_keys = visible.count(row // self.call.num_heads)
        last_token = (row + QUERIES - 1) // self.call.num_heads
        some_absent = jnp.minimum(last_token, self.call.num_queries - 1) >= query_len
        return jnp.clip(jnp.where(some_absent, 0, fewest_keys) // BLOCK, start, end)

    # -- one block ------------------------------------------------------------------------------
    def _start_scores(self, block: Any, stage: Any, zero: Any) -> tuple[Any, Any]:
        """Starts S^T of a block: one product for both int8 parts of q, one for the rope part.

        block: counted from the item's first one.
        """
        scratch = self.scratch
        self.stamps.block(at.WAIT, block)
        plgpu.barrier_wait(scratch.full.at[stage])
        halves = self.g.product_t(scratch.latent.at[stage], scratch.q_latent.at[zero], jnp.int32)
        return halves, self.g.product_t(
            scratch.rope.at[stage], scratch.q_rope.at[zero], jnp.float32
        )

    def _finished(self, products: tuple[Any, ...]) -> tuple[Any, ...]:
        """Waits for products and returns their values."""
        self.g.wait_mma(0)
        return tuple(map(self.g.completed, products))

    def _compute_block(self, blocks: Blocks, is_last: bool, i: Any, progress: Progress) -> Progress:
        """Makes P^T of block i from its S^T, and S^T of the next block."""
        scratch, (sums, stage, products) = self.scratch, progress
        zero, next_stage = opaque_zero(i), self.stage_after(stage)
        number = i - blocks.start
        self.stamps.block(at.SM, number)
        above, scales = self._above_maxima(stage, zero, products)

        mask = functools.partial(self._mask, i, zero)
        above, scales = lax.cond(i >= blocks.unmasked_end, mask, lambda *same: same, above, scales)
        raises = (i == blocks.start) | blocks.running
        raise_maxima = functools.partial(self._raise_maxima, blocks, stage, zero)
        above, sums = lax.cond(raises, raise_maxima, lambda *same: same, above, sums)

        p = jnp.exp2(above)
        sums = sums + self.g.column_parts(p, "add")
        scratch.rescales[stage] = raises.astype(jnp.int32)
        scratch.p.at[stage][...] = (p * per_row(scales, TILE)).astype(self.call.q.dtype)
        started = () if is_last else self._start_scores(number + 1, next_stage, zero)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.p_ready(stage))
        return Progress(sums, next_stage, self._finished(started))

    def _above_maxima(self, stage: Any, zero: Any, products: tuple[Any, ...]) -> tuple[Any, Any]:
        """Returns scores less the maxima so far, in log2 units, and the scales of the tokens."""
        halves, rope = products
        scales = self.g.load_rows(self.scratch.token_scales.at[stage])
        s = self.g.combine_halves(halves, quantize.HALF) * per_row(scales, TILE) + rope
        refs = self.scratch.q_steps, self.scratch.maxima
        steps, maxima = (self.g.load_columns(ref.at[zero]) for ref in refs)
        return s * per_column(steps, TILE) - per_column(maxima, TILE), scales

    def _mask(self, i: Any, zero: Any, above: Any, scales: Any) -> tuple[Any, Any]:
        """Hides keys of block i from the queries that must not see them.

        A hidden score may be NaN, so it is replaced and not multiplied. The scale of a token past
        the length, or one that is not finite, becomes 0, so that its P is 0 times 0. A query that
        sees such a token has a score of NaN already.
        """
        position = self.g.iota_line(BLOCK, ROWS) + i * BLOCK
        keys = self.g.load_columns(self.scratch.visible_keys.at[zero])
        visible = per_row(position, TILE) < per_column(keys, TILE)
        finite = jnp.abs(scales) < jnp.inf
        usable = finite & (position < self.scratch.descriptor[FIELD.kv_len])
        return jnp.where(visible, above, -jnp.inf), jnp.where(usable, scales, 0.0)

    def _raise_maxima(
        self, blocks: Blocks, stage: Any, zero: Any, above: Any, sums: Any
    ) -> tuple[Any, Any]:
        """Raises the maxima to those of a block, and rescales the sums.

        The first finite score of a query sets its maximum, whichever block has it. If only the
        first block raises maxima and has no score for a query, the maximum becomes NO_KEY. A score
        in a later block then makes the sum infinite, and the item is repeated.
        """
        scratch = self.scratch
        maxima, unset = (self.g.load_columns(scratch.maxima.at[zero + n]) for n in range(2))
        largest = self.g.reduce_rows(above, scratch.per_warp, "max")
        no_score = largest == -jnp.inf
        first = jnp.where(no_score, jnp.where(blocks.running, 0.0, NO_KEY), largest)
        rise = jnp.where(unset > 0.0, first, jnp.maximum(largest, 0.0))
        factor = jnp.exp2(jnp.minimum(-rise, 0.0))  # a first maximum may fall: O and sums are 0
        scratch.maxima.at[zero][...] = maxima + rise
        scratch.maxima.at[zero + 1][...] = jnp.where(no_score, unset, 0.0)
        scratch.factors.at[stage][...] = factor
        return above - per_column(rise, TILE), sums * factor

    # -- one work item --------------------------------------------------------------------------
    def _compute_item(self) -> Any:
        """Makes P^T of all blocks, then sums and lse. Returns how many items are left."""
        item = self.scratch.descriptor
        start, end = item[FIELD.block_start], item[FIELD.block_end]
        first_stage = item[FIELD.first_stage]
        blocks = Blocks(start, self._unmasked_end(start, end), item[FIELD.repeats] > 0)
        no_sums = self.g.full((QUERIES,), 0.0, COLUMNS)

        def all_blocks(_: Any, sums: Any) -> Any:
            products = self._finished(self._start_scores(0, first_stage, opaque_zero(end)))
            progress = Progress(sums, first_stage, products)
            block = functools.partial(self._compute_block, blocks)
            progress = lax.fori_loop(start, end - 1, functools.partial(block, False), progress)
            return block(True, item[FIELD.block_end] - 1, progress).sums

        # This runs once, or not at all for a request without keys.
        sums = lax.fori_loop(0, jnp.minimum(end - start, 1), all_blocks, no_sums)
        return self._finish_item(sums, blocks.running, opaque_zero(end))

    def _finish_item(self, sums: Any, running: Any, zero: Any) -> Any:
        """Signals the sums and stores lse. Returns how many items are left.

        Where a sum is too large the item is repeated with running maxima, and this result is
        discarded.
        """
        g, scratch, item = self.g, self.scratch, self.scratch.descriptor
        self.stamps.item(at.SUM)
        planned = WorkItem.read(item)
        total = g.over_rows(sums, scratch.per_warp, "add")
        maxima = g.load_columns(scratch.maxima.at[zero])
        repeats = (g.any_above(total, SUM_LIMIT, COLUMNS) & ~running).astype(jnp.int32)
        item[FIELD.repeats] = repeats
        partial = jnp.where(repeats > 0, DISCARDED, planned.partial)
        to = Destination(planned.request, planned.row_tile, partial, planned.num_partials)
        items_left = item[FIELD.items_left] - 1 + repeats
        # The loader has written the field before the barrier of the last block.
        invalid = item[FIELD.invalid] > 0
        nan = nan_if_invalid(item[FIELD.kv_len], invalid)
        plgpu.barrier_arrive(self.item_done(to.request))

        plgpu.barrier_wait(self.sums_taken(to.request))
        inverse = divided(1.0 / DEQUANTIZED_STEP, total)
        scratch.inverse_sums.at[opaque_zero(to.request)][...] = inverse + nan
        for i, value in enumerate(to):
            scratch.destination[i] = value
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.sums_ready(to.request))
        lse = natural_lse(maxima, total, log2_sum=False) + nan
        self.store(to, lambda rows, arrays: rows.store_column_values(g, arrays.lse, lse))
        return items_left


class OutputState(NamedTuple):
    """What an output warpgroup carries from one work item to the next."""

    index: Any  # of the item in the work list
    stage: Any  # of its first block
    num_blocks: Any


class Output(Role):
    """Warpgroups 0 and 1 compute O^T += V^T P^T, half of the dimensions each.

    They normalize and store it, and at the end they combine the split tiles of the CTA. Each holds
    half of O^T in registers and has few others. So it takes the number of blocks from the work
    list, and the destination of the result from the softmax warpgroup when all blocks are done.
    """

    @property
    def half(self) -> int:
        """Dimensions per output warpgroup."""
        return self.call.kv_lora_rank // OUTPUT_WARPGROUPS

    def run(self, warpgroup: Any) -> None:
        self.g.take_registers(self.call.config.warpgroup_registers, 0)
        for stage in range(self.stages):
            plgpu.barrier_arrive(self.stage_free(stage))  # every stage starts free
        plgpu.barrier_arrive(self.sums_taken(0))
        halves = [functools.partial(self._run_items, side) for side in range(OUTPUT_WARPGROUPS)]
        side = lax.switch(warpgroup, halves)
        if self.call.combines:
            self.stamps.item(at.COMBINE)
            self.results.combine(self.item_range(), side)
            self.stamps.item(at.COMBINE_END)
        self.stamps.item(at.KERNEL_END)

    def _run_items(self, side: int) -> Any:
        """Computes the first (0) or the second (1) half of all items. Returns side as an array."""

        def run_item(state: OutputState) -> OutputState:
            compute = functools.partial(self._compute_item, side, state)
            accumulators = self.scratch.accumulators
            return self.g.with_accumulators(compute, accumulators, side, (self.half, QUERIES))

        first, _ = self.item_range()
        state = OutputState(first, jnp.int32(0), self._num_blocks(self.work_range()))
        # The end of the range is read for each item, since no register is left for it beside O^T.
        lax.while_loop(lambda state: state.index < self.item_range()[1], run_item, state)
        return jnp.int32(side)

    def _num_blocks(self, item: Any) -> Any:
        """Returns the number of blocks of an item of the work list, which is a ref."""
        return item[FIELD.block_end] - item[FIELD.block_start]

    def _compute_item(self, side: int, state: OutputState, o_acc: Any) -> OutputState:
        """Computes and stores half of O^T of an item. Returns the state for the next one."""
        scratch, g = self.scratch, self.g
        stamps = self.stamps.of_counted_item(lambda: state.index - self.item_range()[0])
        stamps.item(at.ITEM)
        first_group = side * self.half // GROUP
        g.zero(o_acc)
        add_block = functools.partial(self._add_block, stamps, first_group, o_acc)
        stage = lax.fori_loop(0, state.num_blocks, add_block, state.stage)
        plgpu.barrier_wait(self.sums_ready(state.num_blocks))
        stamps.item(at.STORE)
        to = Destination.read(scratch.destination)
        next_index = state.index + jnp.where(to.partial == DISCARDED, 0, 1)
        next_num_blocks = self._num_blocks(self.listed_item(next_index))
        inverse = g.load_columns(scratch.inverse_sums.at[0])
        o = g.read(o_acc) * per_column(inverse, (self.half, QUERIES))
        plgpu.barrier_arrive(self.sums_taken(next_num_blocks))

        def write(rows: Rows, arrays: Outputs | Partials) -> None:
            rows.store_dimensions(g, arrays.o, o.astype(arrays.o.dtype), first_group)

        self.store(to, write)
        stamps.item(at.ITEM_END)
        return OutputState(next_index, stage, next_num_blocks)

    def _add_block(self, stamps: Stamps, first_group: int, o_acc: Any, i: Any, stage: Any) -> Any:
        """Adds V^T P^T of a block to O^T. Returns the next stage.

        The first tokens of V^T are dequantized before P^T is ready.
        """
        scratch, g = self.scratch, self.g
        plgpu.barrier_wait(scratch.full.at[stage])
        v = scratch.latent.at[stage]
        part: dict[str, int] = {"first_group": first_group, "tokens": STEP_TOKENS}
        begun = g.begin_dequantizing(v, **part)
        plgpu.barrier_wait(self.p_ready(stage))
        stamps.block(at.PV, i)

        @pl.when(scratch.rescales[stage] > 0)
        def _rescale() -> None:
            g.scale_columns(o_acc, g.load_columns(scratch.factors.at[stage]))

        g.mma_dequantized((o_acc,), v, scratch.p.at[stage], begun, **part)
        g.wait_mma(0)
        plgpu.barrier_arrive(self.stage_free(stage))
        stamps.block(at.END, i)
        return self.stage_after(stage)
