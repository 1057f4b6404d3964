"""The computing warpgroup of `decode_transposed`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.kernels.decode_transposed_refs import Cta, Pair, PerPart
from pallas_kernels.hopper.mosaic.cluster import combine_softmax
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.mosaic.transposed import COLUMNS
from pallas_kernels.hopper.mosaic.values import opaque_zero, per_column
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.call import Outputs
from pallas_kernels.hopper.parts.normalize import divided, nan_if_invalid, natural_lse
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.parts.transposed import Mask, Partials
from pallas_kernels.hopper.parts.visible_keys import VisibleKeys
from pallas_kernels.hopper.work_items import BLOCK, NO_KEY, WorkItem


class CurrentItem(NamedTuple):
    """The work item that the warpgroup has in hand."""

    number: Any  # in the work list
    blocks_before: Any  # KV blocks of the CTA's items before this one
    item: WorkItem
    kv_len: Any  # -1: invalid
    q_stage: Any
    mask: Mask
    seen_by_all: Any  # how many keys every row of the tile sees
    o_acc: Any  # O^T
    s_acc: Any  # S^T
    stamps: Stamps

    @property
    def num_blocks(self) -> Any:
        return self.item.block_end - self.item.block_start


class Softmax(NamedTuple):
    """The online softmax after some blocks."""

    m: Any  # [rows]: maximum of the scores, in log2 units
    norm: Any  # [BLOCK, rows]: sums of 2^(s - m), one per row of the score tile


@dataclasses.dataclass(frozen=True)
class Computer:
    """The warpgroup that computes all work items of a CTA and stores their results."""

    cta: Cta

    def run(self) -> None:
        """Computes all work items of the CTA."""
        cta = self.cta
        # At first every stage is empty.
        for part, stage in cta.kv_stages():
            part.release(stage)
        for stage in range(cta.sizes.q_stages):
            self._release_q(stage)

        def compute_item(*item):
            cta.g.with_accumulators(
                functools.partial(self._compute_item, *item),
                cta.scratch.accumulators,
                0,
                cta.sizes.output_tile,
                cta.sizes.score_tile,
            )

        cta.run_items(compute_item)

    def _release_q(self, stage: Any) -> None:
        plgpu.barrier_arrive(self.cta.scratch.q_empty.at[stage])

    def _compute_item(
        self, number: Any, blocks_before: Any, item: WorkItem, o_acc: Any, s_acc: Any
    ) -> None:
        g, call, sizes = self.cta.g, self.cta.call, self.cta.sizes
        stamps = self.cta.stamps.of_item(number - self.cta.items[0])
        stamps.item(at.ITEM)
        kv_len, query_len = self.cta.lengths(item)
        first_row = item.row_tile * sizes.rows
        q_stage = lax.rem(number, sizes.q_stages)
        mask = Mask.of_tile(g, call, first_row, kv_len, query_len)
        visible = VisibleKeys.of(call, kv_len, query_len)
        seen_by_all = visible.count_for_all_from(first_row // call.num_heads)
        current = CurrentItem(
            number, blocks_before, item, kv_len, q_stage, mask, seen_by_all, o_acc, s_acc, stamps
        )
        g.zero(o_acc)
        none = Softmax(
            g.full((sizes.rows,), NO_KEY, COLUMNS),
            g.full(sizes.score_tile, 0.0, plgpu.Layout.WGMMA),
        )
        plgpu.barrier_wait(self.cta.scratch.q_full.at[q_stage])
        stamps.item(at.Q_READY)
        add_block = functools.partial(self._add_block, current)
        softmax = lax.fori_loop(0, current.num_blocks, add_block, none)
        stamps.item(at.SUM)
        self._finish(current, softmax)
        stamps.item(at.ITEM_END)

    # -- a block ------------------------------------------------------------------------------
    def _add_block(self, current: CurrentItem, i: Any, softmax: Softmax) -> Softmax:
        """Adds block i of the item to O^T and to the softmax."""
        cta, g, tile = self.cta, self.cta.g, self.cta.sizes.score_tile
        zero = opaque_zero(current.num_blocks, varying=i)
        stages = PerPart(*(part.stage_of(current.blocks_before + i) for part in cta.parts))
        self._compute_scores(current, stages, zero, i)
        current.stamps.block(at.SM, i)
        start = (current.item.block_start + i) * BLOCK
        s = g.read(current.s_acc) * cta.call.log2_scale
        self._clear_hidden(current, stages, start, s)
        s = jnp.where(current.mask.visible(start), s, -jnp.inf)
        m = jnp.maximum(softmax.m, g.reduce_rows(s, cta.scratch.maxima, "max"))
        p = jnp.exp2(s - per_column(m, tile))
        g.store_t(cta.scratch.p, p.astype(cta.call.q.dtype))
        alpha = jnp.exp2(softmax.m - m)
        g.scale_columns(current.o_acc, alpha)
        norm = softmax.norm * per_column(alpha, tile) + p
        plgpu.commit_smem()  # wgmma must see P.
        current.stamps.block(at.PUBLISHED, i)
        self._add_values(current, stages)
        current.stamps.block(at.END, i)
        return Softmax(m, norm)

    def _compute_scores(self, current: CurrentItem, stages: PerPart, zero: Any, i: Any) -> None:
        """Computes S^T = K Q^T and releases the rope part, which V does not have."""
        g, parts = self.cta.g, self.cta.parts
        g.zero(current.s_acc)
        current.stamps.block(at.WAIT, i)
        for k, (part, stage) in enumerate(zip(parts, stages, strict=True)):
            plgpu.barrier_wait(part.full.at[stage])
            if k == 0:
                current.stamps.block(at.QK, i)
            self.cta.kv_blocks.make_visible()
            g.mma_t(current.s_acc, part.kv.at[stage], part.q.at[current.q_stage + zero])
        g.wait_mma(0)
        parts.rope.release(stages.rope)

    def _clear_hidden(self, current: CurrentItem, stages: PerPart, start: Any, s: Any) -> None:
        """Sets values of V to 0 that some row must not see and that are not finite.

        P is 0 for a hidden key, but 0 * NaN is NaN. A key that is not finite shows in the scores s
        before the mask, in those of every row. Rows that see such a key get NaN from its score.
        """
        g, parts = self.cta.g, self.cta.parts

        @pl.when(current.seen_by_all - start < BLOCK)
        def _look():
            @pl.when(g.any_not_finite(s))
            def _clear():
                for part, stage in ((parts.left, stages.left), (parts.right, stages.right)):
                    g.clear_not_finite(part.kv.at[stage], current.seen_by_all - start)

    def _add_values(self, current: CurrentItem, stages: PerPart) -> None:
        """Computes O^T += V^T P^T and releases both halves of V."""
        g, parts = self.cta.g, self.cta.parts
        halves = (parts.left, stages.left), (parts.right, stages.right)
        for part, stage in halves:
            dimensions = pl.ds(part.column, part.width)
            g.mma_tt(current.o_acc, dimensions, part.kv.at[stage], self.cta.scratch.p)
        g.wait_mma(0)
        for part, stage in halves:
            part.release(stage)

    # -- the end of a work item ---------------------------------------------------------------
    def _finish(self, current: CurrentItem, softmax: Softmax) -> None:
        """Normalises O^T and stores it, in the output or as a partial result."""
        cta, g, item, m = self.cta, self.cta.g, current.item, softmax.m
        # The loader stores this before the item's last block arrives.
        invalid = cta.scratch.invalid[current.q_stage] > 0
        self._release_q(current.q_stage)
        total = g.reduce_rows(softmax.norm, cta.scratch.sums, "add")
        plgpu.commit_smem()  # Every warp has read `sums`: the next item may write there.
        total += nan_if_invalid(current.kv_len, invalid)
        current.stamps.item(at.STORE)
        kept = item.partial < -1
        weight = 1.0
        if cta.pair is not None:
            m, total, weight = self._softmax_of_pair(cta.pair, kept, m, total)
        o, lse = self._normalised(current, m, total, weight)

        def write(rows: Rows, arrays: Outputs | Partials) -> None:
            rows.store_transposed(g, arrays.o, o.astype(arrays.o.dtype))
            rows.store_column_values(g, arrays.lse, lse)

        pl.when(item.partial == -1)(lambda: cta.results.store_output(item, write))
        if cta.pair is not None:
            pl.when(kept)(functools.partial(self._store_half, cta.pair, current, o, lse))
        pl.when(item.partial >= 0)(lambda: cta.results.store_partial(item, write))

    def _normalised(self, current: CurrentItem, m: Any, total: Any, weight: Any) -> tuple[Any, Any]:
        """Returns O^T times weight / total, and lse."""
        inverse = divided(weight, total)
        lse = natural_lse(m, total, log2_sum=True)
        # O^T may be NaN in a row without a visible key, where other rows see NaN. So it is replaced
        # there: multiplied by 0 it would stay NaN.
        tile = self.cta.sizes.output_tile
        o = self.cta.g.read(current.o_acc) * per_column(inverse, tile)
        return jnp.where(per_column(total != 0.0, tile), o, 0.0), lse

    # -- a tile that the two CTAs of a cluster share --------------------------------------------
    def _softmax_of_pair(self, pair: Pair, kept: Any, m: Any, total: Any) -> tuple[Any, Any, Any]:
        """Returns maxima and sums over both CTAs, and the factor of this CTA's O^T.

        They are this CTA's own, and 1, where the item is not one that the pair shares.
        """
        g, sizes = self.cta.g, self.cta.sizes
        _, other, scratch = pair
        first = sizes.latent  # The row of `Inputs.exchange` that has the maxima.

        def from_other():
            for i, mine in enumerate((m, total)):
                other.send_columns(scratch.softmax.at[i], first + i, mine)
            # When both CTAs have arrived, both have read q for the last time (see `_store_half`).
            other.arrive(scratch.softmax_sent)
            other.wait(scratch.softmax_sent)
            return tuple(other.received_columns(scratch.softmax.at[i], first + i) for i in range(2))

        def nothing():
            return tuple(g.full((sizes.rows,), value, COLUMNS) for value in (NO_KEY, 0.0))

        m, total, weight, _ = combine_softmax(m, total, *lax.cond(kept, from_other, nothing))
        return m, total, weight

    def _store_half(self, pair: Pair, current: CurrentItem, o: Any, lse: Any) -> None:
        """Stores the half of the output that belongs to this CTA's rank.

        Each CTA sends the other half of its O^T to the other CTA, where it takes the place of q.
        """
        g, sizes, outputs, q = self.cta.g, self.cta.sizes, self.cta.outputs, self.cta.scratch.q
        # The pair's items of the shared tile follow each other in the work list, rank 0's first.
        their_stage = lax.rem(current.number + 1 - 2 * pair.rank, sizes.q_stages)
        half = pair.other.send_half((q.left.at[their_stage], q.right.at[their_stage]), o)
        pair.other.arrive(pair.scratch.output_sent)
        pair.other.wait(pair.scratch.output_sent)
        received = q.left.at[current.q_stage], q.right.at[current.q_stage]
        half += pair.other.received_tile(received, 0, (sizes.half, sizes.rows))
        rows = self.cta.results.rows_of(current.item.request, current.item.row_tile)
        column = pair.rank * sizes.half
        rows.store_transposed(g, outputs.o, half.astype(self.cta.call.q.dtype), column)
        pl.when(pair.rank == 0)(lambda: rows.store_column_values(g, outputs.lse, lse))
