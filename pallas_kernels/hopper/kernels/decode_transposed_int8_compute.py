"""The computing warpgroups of `decode_transposed_int8`."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import quantize
from pallas_kernels.hopper.kernels.decode_transposed_int8_refs import ITEM_STAGES, Cta
from pallas_kernels.hopper.mosaic.int8 import DEQUANTIZED_STEP, GROUP
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.mosaic.transposed import COLUMNS
from pallas_kernels.hopper.mosaic.values import opaque_zero, per_column, per_row
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.call import Outputs
from pallas_kernels.hopper.parts.normalize import divided, nan_if_invalid, natural_lse
from pallas_kernels.hopper.parts.quantize_q import fetch_q
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.parts.transposed import Mask, Partials
from pallas_kernels.hopper.work_items import BLOCK, NO_KEY, WorkItem


class CurrentItem(NamedTuple):
    """The work item that the warpgroup has in hand."""

    number: Any  # in the work list
    blocks_before: Any  # KV blocks of the CTA's items before this one
    item: WorkItem
    kv_len: Any  # -1: invalid
    mask: Mask
    first_block: Any  # the warpgroup's first block of the item: 0 or 1
    o_left: Any  # O^T of the first half of the dimensions
    o_right: Any  # of the second half
    stamps: Stamps

    @property
    def num_blocks(self) -> Any:
        return self.item.block_end - self.item.block_start


class Softmax(NamedTuple):
    """The online softmax after some blocks."""

    m: Any  # [rows]: maximum of the scores, in log2 units
    norm: Any  # [BLOCK, rows]: sums of 2^(s - m), one per row of the score tile


class Half(NamedTuple):
    """Half of the dimensions of O^T."""

    number: int  # 0: left, 1: right
    o: Any  # an accumulator, or its value


@dataclasses.dataclass(frozen=True)
class Computer:
    """A warpgroup that computes all blocks of a CTA, or every other one of them.

    With two of them, warpgroup 0 finishes the left half of O^T and warpgroup 1 the right half.
    """

    cta: Cta
    warpgroup: int

    @property
    def shared(self) -> bool:
        """Whether a second warpgroup computes."""
        return self.cta.sizes.computing == 2

    def run(self) -> None:
        """Computes all work items of the CTA, then combines its split tiles."""
        cta, sizes, scratch = self.cta, self.cta.sizes, self.cta.scratch
        cta.take_registers(self.warpgroup)
        # At first every stage is empty.
        for stage in range(self.warpgroup, sizes.stages, sizes.computing):
            plgpu.barrier_arrive(scratch.empty.at[stage])
        for stage in range(ITEM_STAGES):
            plgpu.barrier_arrive(scratch.item_done.at[stage])
        if self.shared:
            plgpu.barrier_arrive(scratch.taken)

        def compute_item(*item):
            stamps = cta.stamps_of(item[0])
            stamps.item(at.ITEM)
            self._quantize_q(item[-1])
            stamps.item(at.Q_READY)
            cta.g.with_accumulators(
                functools.partial(self._compute_item, stamps, *item),
                scratch.accumulators,
                self.warpgroup,
                *sizes.output_halves,
            )

        cta.run_items(compute_item)
        if self.shared:
            plgpu.barrier_wait(scratch.taken)
        if cta.call.combines:
            cta.stamps.item(at.COMBINE)
            cta.results.combine(cta.items, self.warpgroup)
            cta.stamps.item(at.COMBINE_END)
        cta.stamps.item(at.KERNEL_END)

    def _quantize_q(self, item: WorkItem) -> None:
        """Quantizes the warpgroup's share of q, and waits for the other share.

        Nothing reads the q of the work item before: both warpgroups have given its results.
        """
        cta, sizes = self.cta, self.cta.sizes
        row = item.row_tile * sizes.rows
        share = sizes.rows // sizes.quantizing
        if self.warpgroup < sizes.quantizing:
            first = self.warpgroup * share
            place = item.request, row + first
            unit = cta.call.log2_scale
            fetch_q(cta.g, cta.inputs.q, place, cta.scratch.q, first, share, unit=unit)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self._quantized(item))
        plgpu.barrier_wait(self._quantized(item))

    def _quantized(self, item: WorkItem) -> Any:
        """Returns the barrier at which q is quantized."""
        return self.cta.scratch.all_computing.at[opaque_zero(item.request)]

    def _compute_item(
        self,
        stamps: Stamps,
        number: Any,
        blocks_before: Any,
        item: WorkItem,
        o_left: Any,
        o_right: Any,
    ) -> None:
        g, sizes = self.cta.g, self.cta.sizes
        kv_len, query_len = self.cta.lengths(item)
        mask = Mask.of_tile(g, self.cta.call, item.row_tile * sizes.rows, kv_len, query_len)
        # A stage belongs to one warpgroup for all work items, which so waits for every phase of its
        # barriers.
        computing = sizes.computing
        first = lax.rem(self.warpgroup + blocks_before, 2) if self.shared else 0
        current = CurrentItem(
            number, blocks_before, item, kv_len, mask, first, o_left, o_right, stamps
        )
        mine = (item.block_end - item.block_start - first + computing - 1) // computing
        g.zero(o_left)
        g.zero(o_right)
        none = Softmax(
            g.full((sizes.rows,), NO_KEY, COLUMNS),
            g.full(sizes.score_tile, 0.0, plgpu.Layout.WGMMA),
        )
        m, norm = lax.fori_loop(0, mine, functools.partial(self._add_block, current), none)
        stamps.item(at.SUM)
        total = g.reduce_rows(norm, self.cta.scratch.sums.at[self.warpgroup], "add")
        plgpu.commit_smem()  # Every warp has read `sums`: the next item may write there.
        halves = Half(0, o_left), Half(1, o_right)
        if self.shared:
            m, total, half = self._add_up(current, m, total, halves)
            self._finish(current, m, total, [half])
        else:
            stamps.item(at.STORE)
            values = [Half(half.number, g.read(half.o)) for half in halves]
            self._finish(current, m, total, values)
        stamps.item(at.ITEM_END)

    # -- a block ------------------------------------------------------------------------------
    def _add_block(self, current: CurrentItem, turn: Any, softmax: Softmax) -> Softmax:
        """Adds the warpgroup's next block of the item to O^T and to the softmax."""
        sizes, scratch = self.cta.sizes, self.cta.scratch
        g, tile = self.cta.g, sizes.score_tile
        i = sizes.computing * turn + current.first_block
        stage = lax.rem(current.blocks_before + i, sizes.stages)
        s, token_scale = self._scores(current, i, stage)
        m = jnp.maximum(softmax.m, g.reduce_rows(s, scratch.maxima.at[self.warpgroup], "max"))
        p = jnp.exp2(s - per_column(m, tile))
        p_smem = scratch.p.at[self.warpgroup]
        # The scale of a token's V is that of its K.
        g.store_t(p_smem, (p * token_scale).astype(self.cta.call.q.dtype))
        alpha = jnp.exp2(softmax.m - m)
        for o_half in (current.o_left, current.o_right):
            g.scale_columns(o_half, alpha)
        norm = softmax.norm * per_column(alpha, tile) + p
        plgpu.commit_smem()  # wgmma must see P.
        current.stamps.block(at.PUBLISHED, i)
        values = scratch.kv.latent.at[stage]
        begun = g.begin_dequantizing(values)
        g.mma_dequantized(
            (current.o_left, current.o_right), values, p_smem.transpose((1, 0)), begun
        )
        # All of V is in registers, while its last product is still in flight. The threads have read
        # it themselves: the fence orders their reads before the copy that overwrites V.
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.empty.at[stage])
        g.wait_mma(0)
        current.stamps.block(at.END, i)
        return Softmax(m, norm)

    def _scores(self, current: CurrentItem, i: Any, stage: Any) -> tuple[Any, Any]:
        """Returns the scores of a block in log2 units, -inf where hidden, and its scales, there 0.

        Both are score tiles.
        """
        g, tile = self.cta.g, self.cta.sizes.score_tile
        q, kv = self.cta.scratch.q, self.cta.scratch.kv
        zero = opaque_zero(current.num_blocks, varying=i)
        current.stamps.block(at.WAIT, i)
        plgpu.barrier_wait(self.cta.scratch.full.at[stage])
        current.stamps.block(at.QK, i)
        products = (
            g.product_t(kv.latent.at[stage], q.halves.at[zero], jnp.int32),
            g.product_t(kv.rope.at[stage], q.rope.at[zero], jnp.float32),
        )
        g.wait_mma(0)
        s_halves, s_rope = map(g.completed, products)
        current.stamps.block(at.SM, i)
        token_scale = per_row(g.load_rows(kv.scales.at[stage]), tile)
        # Scales and scores that no row may see may be NaN. So they are replaced: multiplied by 0
        # they would stay NaN.
        visible = current.mask.visible((current.item.block_start + i) * BLOCK)
        token_scale = jnp.where(visible, token_scale, 0.0)
        row_scale = per_column(g.load_columns(q.step.at[zero]), tile)
        s = g.combine_halves(s_halves, quantize.HALF) * token_scale + s_rope
        return jnp.where(visible, s * row_scale, -jnp.inf), token_scale

    # -- the end of a work item ---------------------------------------------------------------
    def _add_up(
        self, current: CurrentItem, m: Any, total: Any, halves: tuple[Half, Half]
    ) -> tuple[Any, Any, Half]:
        """Adds the other warpgroup's results to those of this one.

        Returns the maxima, the sums, and the half of O^T that this warpgroup finishes.
        """
        g, scratch, other = self.cta.g, self.cta.scratch, 1 - self.warpgroup
        kept, given = halves[self.warpgroup], halves[other]
        plgpu.barrier_wait(scratch.taken)
        g.store_registers(scratch.given_o.at[self.warpgroup], g.read(given.o))
        scratch.given_softmax.at[self.warpgroup, 0][...] = m
        scratch.given_softmax.at[self.warpgroup, 1][...] = total
        plgpu.barrier_arrive(scratch.given)
        plgpu.barrier_wait(scratch.given)
        current.stamps.item(at.STORE)
        other_m, other_total = (
            g.load_columns(scratch.given_softmax.at[other, i]) for i in range(2)
        )
        other_o = g.load_registers(scratch.given_o.at[other])
        plgpu.barrier_arrive(scratch.taken)
        top = jnp.maximum(m, other_m)
        factor = jnp.exp2(jnp.minimum(m, other_m) - top)

        def add(mine, others, spread=lambda columns: columns):
            # The sum is rounded alike whichever warpgroup has which blocks. Otherwise the result of
            # a request would depend on the rest of the batch.
            mine_is_top = spread(m) >= spread(other_m)
            higher = jnp.where(mine_is_top, mine, others)
            lower = jnp.where(mine_is_top, others, mine)
            return higher + lower * spread(factor)

        half_tile, _ = self.cta.sizes.output_halves
        o = add(g.read(kept.o), other_o, functools.partial(per_column, shape=half_tile))
        return top, add(total, other_total), Half(kept.number, o)

    def _finish(self, current: CurrentItem, m: Any, total: Any, halves: Sequence[Half]) -> None:
        """Normalises halves of O^T and stores them, in the output or as a partial result."""
        cta, item, scratch = self.cta, current.item, self.cta.scratch
        item_stage = lax.rem(current.number, ITEM_STAGES)
        plgpu.barrier_wait(scratch.item_checked.at[item_stage])
        # The loader stores what it finds of a block before the block arrives.
        invalid = scratch.invalid[item_stage] > 0
        plgpu.barrier_arrive(scratch.item_done.at[item_stage])
        nan = nan_if_invalid(current.kv_len, invalid)
        inverse = divided(1.0 / DEQUANTIZED_STEP, total) + nan
        lse = natural_lse(m, total, log2_sum=False) + nan
        half_tile, _ = cta.sizes.output_halves
        halves = [Half(half.number, half.o * per_column(inverse, half_tile)) for half in halves]

        write = functools.partial(self._write, halves, lse)
        pl.when(item.partial < 0)(lambda: cta.results.store_output(item, write))
        pl.when(item.partial >= 0)(lambda: cta.results.store_partial(item, write))

    def _write(
        self, halves: Sequence[Half], lse: Any, rows: Rows, arrays: Outputs | Partials
    ) -> None:
        """Stores halves of O^T and, in one of the warpgroups, lse."""
        groups = self.cta.sizes.half // GROUP
        for half in halves:
            o = half.o.astype(arrays.o.dtype)
            rows.store_dimensions(self.cta.g, arrays.o, o, half.number * groups)
        if self.warpgroup == 0:
            rows.store_column_values(self.cta.g, arrays.lse, lse)
