"""The computing warpgroups of `decode_int8`: one makes P^T, two make O^T."""

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
    Destination,
    Kernel,
    opaque_zero,
    per_query,
    per_token,
)
from pallas_kernels.hopper.kernels.merge import Place, Refs, merge_shares, row_parts
from pallas_kernels.hopper.mosaic.dequantize import WIDENED_UNIT
from pallas_kernels.hopper.mosaic.primitives import ROWS
from pallas_kernels.hopper.mosaic.transposed import COLUMNS
from pallas_kernels.hopper.parts.quantize_q import fetch_q
from pallas_kernels.hopper.work_items import BLOCK, LN2, NO_KEY, WorkItem

SUM_LIMIT = 2.0**64  # of a row of e^(s - m): above it the work item is computed again
COMBINED_REGISTERS = 32  # partial O in flight per thread, what the registers allow


class Blocks(NamedTuple):
    """The KV blocks of the work item in hand, for the softmax warpgroup."""

    start: Any
    unmasked: Any  # blocks before this one are visible to every query of the tile
    running: Any  # whether every block raises the maxima, not only the first


class Progress(NamedTuple):
    """What the softmax warpgroup carries from one block to the next, in registers."""

    sums: Any  # per query and thread: the sum of e^(s - m) over the rows that the thread has
    stage: Any
    products: Any  # S^T of the block, in parts: (integer halves, rope part); (): no block is left


class Softmax(Kernel):
    """Warpgroup 2 turns each block into P^T, and computes the sums and lse of each work item.

    It starts S^T of the next block before it signals P^T of this one. So the tensor cores compute
    that S^T first, and this warpgroup, the slowest of the four, has no wait in its chain.
    """

    def run(self) -> None:
        self.g.take_registers(self.call.tiles.registers, SOFTMAX_WARPGROUP)
        self.scratch.descriptor[FIELD.repeats] = 0

        def run_item(items_left: Any) -> Any:
            self.load_queries(items_left)
            return self.compute_item()

        first, stop = self.item_range()
        # The descriptor says how many items are left, so the number takes no register meanwhile.
        none_left = lax.while_loop(lambda left: left > 0, run_item, stop - first)
        plgpu.barrier_wait(self.sums_taken(none_left))

    # -- the queries of an item -----------------------------------------------------------------
    def load_queries(self, items_left: Any) -> None:
        """Writes q, the keys that each query sees, and empty maxima to shared memory."""
        item, scratch = self.scratch.descriptor, self.scratch
        plgpu.barrier_wait(self.item_ready(items_left))
        request, row_tile = item[FIELD.request], item[FIELD.row_tile]
        fetch_q(
            self.g,
            self.inputs.q,
            (request, row_tile * QUERIES),
            (scratch.q_latent, scratch.q_rope, scratch.q_steps),
            0,
            QUERIES,
            unit=self.call.log2_scale,
        )
        row_tile, kv_len, query_len = self.query_fields()
        query = self.g.iota_line(QUERIES, COLUMNS) + row_tile * QUERIES
        token = query // self.call.num_heads
        keys = kv_len - query_len + token + 1 if self.call.causal else kv_len
        scratch.visible_keys.at[0][...] = jnp.where(token < query_len, keys, 0)
        for i, value in enumerate((0.0, 1.0)):
            scratch.maxima.at[i][...] = self.g.full((QUERIES,), value, COLUMNS)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.q_ready(row_tile))

    def query_fields(self) -> tuple[Any, Any, Any]:
        """Returns (row_tile, kv_len, query_len)."""
        item = self.scratch.descriptor
        return item[FIELD.row_tile], item[FIELD.kv_len], item[FIELD.query_len]

    def unmasked_end(self, start: Any, end: Any) -> Any:
        """Returns where the blocks end that every query of the tile sees whole."""
        row_tile, kv_len, query_len = self.query_fields()
        row = row_tile * QUERIES
        shortest = kv_len
        if self.call.causal:
            shortest = kv_len - query_len + row // self.call.num_heads + 1
        last_token = (row + QUERIES - 1) // self.call.num_heads
        absent = jnp.minimum(last_token, self.call.num_queries - 1) >= query_len
        return jnp.clip(jnp.where(absent, 0, shortest) // BLOCK, start, end)

    # -- one block ------------------------------------------------------------------------------
    def start_scores(self, stage: Any, zero: Any) -> tuple[Any, Any]:
        """Starts S^T of a block: one product for both halves of q's latent part, one for rope."""
        scratch = self.scratch
        plgpu.barrier_wait(self.scratch.full.at[stage])
        halves = self.g.product_t(scratch.latent.at[stage], scratch.q_latent.at[zero], jnp.int32)
        rope = self.g.product_t(scratch.rope.at[stage], scratch.q_rope.at[zero], jnp.float32)
        return halves, rope

    def finished(self, products: tuple[Any, ...]) -> tuple[Any, ...]:
        """Waits for products and returns their values."""
        self.g.wait_mma(0)
        return tuple(map(self.g.landed, products))

    def compute_block(self, blocks: Blocks, is_last: bool, i: Any, carry: Progress) -> Progress:
        """Makes P^T of block i, whose S^T is there, and S^T of the next block."""
        scratch = self.scratch
        sums, stage, (s_halves, s_rope) = carry
        zero, next_stage = opaque_zero(i), self.stage_after(stage)
        scales = self.g.load_rows(scratch.token_scales.at[stage])
        s = self.g.joined_halves(s_halves, quantize.HALF) * per_token(scales) + s_rope
        steps, maxima = (
            self.g.load_columns(ref.at[zero]) for ref in (scratch.q_steps, scratch.maxima)
        )
        above = s * per_query(steps) - per_query(maxima)  # the running maxima, in log2 units
        above, scales = lax.cond(
            i >= blocks.unmasked,
            functools.partial(self.mask, i, zero),
            lambda *unmasked: unmasked,
            above,
            scales,
        )
        raises = (i == blocks.start) | blocks.running
        above, sums = lax.cond(
            raises,
            functools.partial(self.raise_maxima, blocks, stage, zero),
            lambda *kept: kept,
            above,
            sums,
        )
        p = jnp.exp2(above)
        sums = sums + self.g.column_parts(p, "add")
        scratch.rescales[stage] = raises.astype(jnp.int32)
        scratch.p.at[stage][...] = (p * per_token(scales)).astype(self.call.q.dtype)
        products = () if is_last else self.start_scores(next_stage, zero)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.p_ready(stage))
        return Progress(sums, next_stage, self.finished(products))

    def mask(self, i: Any, zero: Any, above: Any, scales: Any) -> tuple[Any, Any]:
        """Hides keys of block i from the queries that must not see them.

        Scores are selected, not multiplied, because a hidden one may be NaN. The scale of a token
        that is past the length or has no finite scale becomes 0, so that P = 0 stays 0. Its scores
        stay NaN for the queries that see the token.
        """
        position = self.g.iota_line(BLOCK, ROWS) + i * BLOCK
        keys = self.g.load_columns(self.scratch.visible_keys.at[zero])
        visible = per_token(position) < per_query(keys)
        finite = jnp.abs(scales) < jnp.inf
        usable = finite & (position < self.scratch.descriptor[FIELD.kv_len])
        return jnp.where(visible, above, -jnp.inf), jnp.where(usable, scales, 0.0)

    def raise_maxima(
        self, blocks: Blocks, stage: Any, zero: Any, above: Any, sums: Any
    ) -> tuple[Any, Any]:
        """Raises the maxima to those of a block, and rescales the sums.

        The first finite score of a query sets its maximum, whichever block has it. If the maxima
        are not running, that is the first block. Where it has no such score the maximum becomes
        NO_KEY, which makes the sum infinite as soon as a later block has one: the item repeats.
        """
        scratch = self.scratch
        maxima, unset = (self.g.load_columns(scratch.maxima.at[zero + n]) for n in range(2))
        largest = self.g.reduce_rows(above, scratch.of_warps, "max")
        no_score = largest == -jnp.inf
        first = jnp.where(no_score, jnp.where(blocks.running, 0.0, NO_KEY), largest)
        rise = jnp.where(unset > 0.0, first, jnp.maximum(largest, 0.0))
        factor = jnp.exp2(jnp.minimum(-rise, 0.0))  # O and the sums are 0 at first
        scratch.maxima.at[zero][...] = maxima + rise
        scratch.maxima.at[zero + 1][...] = jnp.where(no_score, unset, 0.0)
        scratch.factors.at[stage][...] = factor
        return above - per_query(rise), sums * factor

    # -- one work item --------------------------------------------------------------------------
    def compute_item(self) -> Any:
        """Makes P^T of all blocks, then sums and lse. Returns how many items are left."""
        item = self.scratch.descriptor
        start, end = item[FIELD.block_start], item[FIELD.block_end]
        first_stage = item[FIELD.first_stage]
        blocks = Blocks(start, self.unmasked_end(start, end), item[FIELD.repeats] > 0)
        no_sums = self.g.full((QUERIES,), 0.0, COLUMNS)

        def all_blocks(_: Any, sums: Any) -> Any:
            products = self.finished(self.start_scores(first_stage, opaque_zero(end)))
            carry = Progress(sums, first_stage, products)
            block = functools.partial(self.compute_block, blocks)
            carry = lax.fori_loop(start, end - 1, functools.partial(block, False), carry)
            return block(True, item[FIELD.block_end] - 1, carry).sums

        # A loop of one step, or of none where a request has no keys.
        sums = lax.fori_loop(0, jnp.minimum(end - start, 1), all_blocks, no_sums)
        return self.finish_item(sums, blocks, opaque_zero(end))

    def finish_item(self, sums: Any, blocks: Blocks, zero: Any) -> Any:
        """Hands the sums to the output warpgroups and stores lse. Returns how many items are left.

        Decides whether the item repeats: P of a later block may be as large as the format allows,
        but not larger.
        """
        g, scratch, item = self.g, self.scratch, self.scratch.descriptor
        planned = WorkItem.read(item)
        total = g.over_rows(sums, scratch.of_warps, "add")
        maxima = g.load_columns(scratch.maxima.at[zero])
        repeats = (g.any_above(total, SUM_LIMIT, COLUMNS) & ~blocks.running).astype(jnp.int32)
        item[FIELD.repeats] = repeats
        partial = jnp.where(repeats > 0, DISCARDED, planned.partial)
        items_left = item[FIELD.items_left] - 1 + repeats
        # The loader has written the flag before the barrier of the last block.
        invalid = item[FIELD.invalid] > 0
        nan_if_invalid = jnp.where((item[FIELD.kv_len] < 0) | invalid, jnp.nan, 0.0)
        request, row_tile = planned.request, planned.row_tile
        plgpu.barrier_arrive(self.item_done(request))

        plgpu.barrier_wait(self.sums_taken(request))
        inverse = jnp.where(total != 0.0, (1.0 / WIDENED_UNIT) / total, 0.0)
        scratch.inverse_sums.at[opaque_zero(request)][...] = inverse + nan_if_invalid
        to = Destination(request, row_tile, partial, planned.num_partials)
        for i, value in enumerate(to):
            scratch.destination[i] = value
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.sums_ready(request))
        lse = jnp.where(total != 0.0, maxima * LN2 + jnp.log(total), -jnp.inf) + nan_if_invalid
        self.store(to, lambda rows, arrays: rows.store_column_values(g, arrays.lse, lse))
        return items_left


class OutputState(NamedTuple):
    """What an output warpgroup carries from one work item to the next."""

    p: Any  # the item's place in the work list
    stage: Any
    num_blocks: Any


class Output(Kernel):
    """Warpgroups 0 and 1 compute O^T += V^T P^T, `half` of the dimensions each.

    They normalize and store it, and combine the split tiles of the CTA at the end. They do not read
    the work descriptor: beside O^T there are registers for the number of blocks and little else.
    """

    def run(self, wg: Any) -> None:
        self.g.take_registers(self.call.tiles.registers, 0)
        for stage in range(self.stages):
            plgpu.barrier_arrive(self.stage_free(stage))  # every stage starts free
        plgpu.barrier_arrive(self.sums_taken(0))
        halves = [functools.partial(self.run_items, which) for which in range(OUTPUT_WARPGROUPS)]
        which = lax.switch(wg, halves)
        if self.call.combines:
            self.combine(which)

    def run_items(self, which: int) -> Any:
        """Computes the left (0) or the right (1) half of all items. Returns `which`, traced."""

        def run_item(state: OutputState) -> OutputState:
            compute = functools.partial(self.compute_item, which, state)
            accumulators = self.scratch.accumulators
            return self.g.with_accumulators(compute, accumulators, which, (self.half, QUERIES))

        first, _ = self.item_range()
        state = OutputState(first, jnp.int32(0), self.blocks_of(self.work_range()))
        # The end is read again each time, because there is no register for it beside O^T.
        lax.while_loop(lambda state: state.p < self.item_range()[1], run_item, state)
        return jnp.int32(which)

    def blocks_of(self, item: Any) -> Any:
        """Returns the number of blocks of an item in a ref."""
        return item[FIELD.block_end] - item[FIELD.block_start]

    def compute_item(self, which: int, state: OutputState, o_acc: Any) -> OutputState:
        """Computes and stores half of O^T of an item. Returns the state for the next one."""
        scratch, g = self.scratch, self.g
        block = functools.partial(self.add_block, which, o_acc)
        g.zero(o_acc)
        stage = lax.fori_loop(0, state.num_blocks, block, state.stage)
        plgpu.barrier_wait(self.sums_ready(state.num_blocks))
        to = Destination.read(scratch.destination)
        following = state.p + jnp.where(to.partial == DISCARDED, 0, 1)
        next_blocks = self.blocks_of(self.listed(following))
        inverse = g.load_columns(scratch.inverse_sums.at[0])
        o = g.read(o_acc) * per_query(inverse, (self.half, QUERIES))
        plgpu.barrier_arrive(self.sums_taken(next_blocks))
        first_group = which * self.groups

        def store(rows: Any, arrays: Any) -> None:
            rows.store_dimensions(g, arrays.o, o.astype(arrays.o.dtype), first_group)

        self.store(to, store)
        return OutputState(following, stage, next_blocks)

    def add_block(self, which: int, o_acc: Any, _: Any, stage: Any) -> Any:
        """O^T += V^T P^T for a block. Returns the next stage.

        The first tokens of V^T are dequantized before P^T is there.
        """
        scratch, g = self.scratch, self.g
        plgpu.barrier_wait(scratch.full.at[stage])
        v = scratch.latent.at[stage]
        part = {"first_group": which * self.groups, "tokens": STEP_TOKENS}
        begun = g.begin_widening(v, **part)
        plgpu.barrier_wait(self.p_ready(stage))

        @pl.when(scratch.rescales[stage] > 0)
        def _rescale() -> None:
            g.scale_columns(o_acc, g.load_columns(scratch.factors.at[stage]))

        g.mma_widened((o_acc,), v, scratch.p.at[stage], begun, **part)
        g.wait_mma(0)
        plgpu.barrier_arrive(self.stage_free(stage))
        return self.stage_after(stage)

    def combine(self, which: Any) -> None:
        """Combines this warpgroup's share of the split tiles of the CTA."""
        merge_shares(
            row_parts(
                self.g,
                self.call.plan,
                QUERIES,
                self.call.kv_lora_rank,
                OUTPUT_WARPGROUPS,
                in_flight=COMBINED_REGISTERS,
            ),
            Refs(self.partials.o, self.partials.lse, self.outputs.o, self.outputs.lse),
            self.inputs.requests.work.items,
            self.item_range(),
            meet=self.meeting,
            place=lambda request, row_tile: Place(self.rows_of(request, row_tile), 0),
            wg=which,
            wgs=OUTPUT_WARPGROUPS,
        )
