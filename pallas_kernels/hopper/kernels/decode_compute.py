"""The two computing warpgroups of the decode kernel: scores, online softmax, and O.

Each warpgroup has half of O's columns. Two KV blocks are in flight. Warpgroup 0 scores the first
and warpgroup 1 the second, and each multiplies the P of both by its own half of V:

    warpgroup 0:  S0  softmax  P0 -> smem  O += P0 V0 ...................  O += P1 V1
    warpgroup 1:  S1  row max ...........  O += P0 V0  softmax  P1 -> smem  O += P1 V1

Blocks that need a mask, and the last one of an odd number, are scored by warpgroup 0 alone.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.kernels.decode_finish import Finish
from pallas_kernels.hopper.kernels.decode_refs import (
    FIELD,
    STAGES,
    Cta,
    accumulator_shapes,
)
from pallas_kernels.hopper.mosaic.primitives import ROWS
from pallas_kernels.hopper.mosaic.values import opaque_zero, per_row
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.normalize import LAZY_GROWTH
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.parts.visible_keys import VisibleKeys
from pallas_kernels.hopper.work_items import BLOCK, NO_KEY, range_of

ALL_WHOLE = 2.0**23  # float32 numbers from here on are whole


class Running(NamedTuple):
    """The state of the online softmax, per row.

    Between blocks `m` is the same in both warpgroups, because each takes over the maximum of the
    other's P before it multiplies it. `total` has only the blocks that this warpgroup scored.
    """

    m: Any  # the maximum that O and the sum are relative to, in log2 units
    total: Any  # this warpgroup's sum of P


class CurrentItem(NamedTuple):
    """The work item that the warpgroups compute now."""

    descriptor: Any  # `decode_refs.Descriptor` in shared memory
    begin: Any  # its first KV block
    num_blocks: Any
    q_rope: Any | None  # the rope columns of q in registers; None: in shared memory
    o_acc: Any  # accumulator of this warpgroup's half of O
    s_acc: Any  # accumulator of S of a block
    stamps: Stamps

    def opaque_zero(self, i: Any) -> Any:
        """Returns 0, hidden from the compiler, which would compute all wgmma descriptors early."""
        return opaque_zero(self.num_blocks, varying=self.begin + i)


@dataclasses.dataclass(frozen=True)
class ComputingWarpgroup:
    """Warpgroup 0 or 1 of a CTA.

    side: its number. Warpgroup 0 has the left half of O's columns, warpgroup 1 the right half.
    """

    cta: Cta
    side: int

    @property
    def q(self) -> Any:
        """This warpgroup's half of q; free when the item is computed."""
        return self.cta.columns[self.side].q

    @property
    def v(self) -> Any:
        """This warpgroup's half of V."""
        return self.cta.columns[self.side].kv

    def run(self) -> None:
        """Computes the worker's items, in their order."""
        cta = self.cta
        for stage in range(STAGES):
            self.release(stage)  # Every stage starts free.
        if cta.inputs.q.rows < BLOCK:
            self.clear_q()
        plgpu.barrier_arrive(cta.scratch.q_empty)

        def run_item(n, _):
            cta.g.with_accumulators(
                functools.partial(self.attend, n),
                cta.scratch.accumulators,
                self.side,
                *accumulator_shapes(cta.call),
            )
            return ()

        first, stop = range_of(cta.range_ref)
        lax.fori_loop(0, stop - first, run_item, ())
        plgpu.wait_smem_to_gmem(0)

    def clear_q(self) -> None:
        """Clears the rows of the tile that no copy fills, because q has fewer than 64.

        What they hold reaches no other row, but it must be finite. TMA itself fills the rows past
        the end of a longer q with zeros. Warpgroup 0 also clears the rope columns.
        """
        cta = self.cta
        columns = [(self.q, cta.half)]
        if self.side == 0:
            columns.append((cta.scratch.q_rope, cta.call.rope_dim))
        for ref, width in columns:
            for c in range(0, width, 64):
                zeros = cta.g.full((BLOCK, 64), 0.0, plgpu.Layout.WGMMA).astype(cta.call.q.dtype)
                ref.at[0, :, pl.ds(c, 64)][...] = zeros
        plgpu.commit_smem()

    def attend(self, n: Any, o_acc: Any, s_acc: Any) -> None:
        """Computes the worker's n-th item."""
        cta, g = self.cta, self.cta.g
        stamps = cta.stamps.of_item(n)
        stamps.item(at.ITEM)
        plgpu.barrier_wait(cta.scratch.q_full)
        stamps.item(at.Q_READY)
        # AMLA's adds need the registers that the rope columns of q would take.
        q_rope = None if self.cta.call.exponent_add else g.load_tile(cta.scratch.q_rope.at[0])
        descriptor = cta.descriptor(n)
        begin, end = descriptor[FIELD.block_start], descriptor[FIELD.block_end]
        current = CurrentItem(descriptor, begin, end - begin, q_rope, o_acc, s_acc, stamps)
        g.zero(o_acc)
        carry = Running(g.full((BLOCK,), NO_KEY, ROWS), g.full((BLOCK,), 0.0, ROWS))
        # Pairs of blocks have no mask: with masks, their code would not fit the instruction cache.
        two_blocks = functools.partial(self.two_blocks, current)
        carry = lax.fori_loop(0, descriptor[FIELD.unmasked_pairs], two_blocks, carry)
        one_block = functools.partial(self.one_block, current)
        carry = lax.fori_loop(
            2 * descriptor[FIELD.unmasked_pairs], current.num_blocks, one_block, carry
        )
        stamps.item(at.SUM)
        Finish(cta, self.side, self.q, current).run(*carry)
        stamps.item(at.ITEM_END)
        plgpu.barrier_arrive(cta.scratch.q_empty)

    # -- the schedule ---------------------------------------------------------------------------
    def two_blocks(self, current: CurrentItem, i: Any, carry: Running) -> Running:
        """Adds two blocks of which every row of the tile sees every key."""
        cta, g = self.cta, self.cta.g
        zero = current.opaque_zero(i)
        first, second = zero, zero + 1
        stamp, block = current.stamps.block, 2 * i
        if self.side == 0:
            carry = self.score_and_multiply(current, carry, zero, first, first, block)
            carry = self.multiply_others(current, carry, second, second, block + 1)
            g.wait_mma(0)
            self.release(second)
            stamp(at.END, block + 1)
            return carry
        self.score(current, zero, second, second, block + 1)
        g.wait_mma(0)
        stamp(at.SM, block + 1)
        s = g.read(current.s_acc) * cta.call.log2_scale
        block_max = s.max(axis=1)
        m, total = self.multiply_others(current, carry, first, first, block)
        stamp(at.EXP, block + 1)
        new_m = self.raised(m, block_max)
        p = jnp.exp2(s - per_row(new_m, s.shape))
        rounded = p.astype(cta.call.q.dtype)
        self.publish(second, second, rounded, new_m)
        stamp(at.PUBLISHED, block + 1)
        g.wait_mma(0)
        self.release(first)
        stamp(at.END, block)
        total = total * self.rescale(current.o_acc, m, new_m) + p.sum(axis=1)
        stamp(at.PV, block + 1)
        g.mma(current.o_acc, rounded, self.v.at[second])
        g.wait_mma(0)
        self.release(second)
        stamp(at.END, block + 1)
        return Running(new_m, total)

    def one_block(self, current: CurrentItem, i: Any, carry: Running) -> Running:
        """Adds any other block, with a mask: warpgroup 0 scores it and both multiply."""
        zero = current.opaque_zero(i)
        stage = zero + i % STAGES
        barrier_set = stage + STAGES
        if self.side == 0:
            block = current.begin + i
            return self.score_and_multiply(current, carry, zero, stage, barrier_set, i, block)
        carry = self.multiply_others(current, carry, stage, barrier_set, i)
        self.cta.g.wait_mma(0)
        self.release(stage)
        current.stamps.block(at.END, i)
        return carry

    def score_and_multiply(
        self,
        current: CurrentItem,
        carry: Running,
        zero: Any,
        stage: Any,
        barrier_set: Any,
        block: Any,
        masked_block: Any = None,
    ) -> Running:
        """Scores a block, publishes its P and adds P V to O.

        block: its number in the item.
        masked_block: the number of a block that needs a mask; None: it needs none.
        """
        cta, g, stamp = self.cta, self.cta.g, current.stamps.block
        m, total = carry
        self.score(current, zero, stage, barrier_set, block)
        g.wait_mma(0)
        stamp(at.SM, block)
        s = g.read(current.s_acc) * cta.call.log2_scale
        if masked_block is not None:
            self.clear_hidden(stage, current.descriptor, masked_block, s)
            s = self.masked(s, current.descriptor, masked_block)
        new_m = self.raised(m, s.max(axis=1))
        p = jnp.exp2(s - per_row(new_m, s.shape))
        rounded = p.astype(cta.call.q.dtype)
        self.publish(stage, barrier_set, rounded, new_m)
        stamp(at.PUBLISHED, block)
        factor = self.rescale(current.o_acc, m, new_m)
        g.mma(current.o_acc, rounded, self.v.at[stage])
        total = total * factor + p.sum(axis=1)
        g.wait_mma(0)
        self.release(stage)
        stamp(at.END, block)
        return Running(new_m, total)

    def multiply_others(
        self, current: CurrentItem, carry: Running, stage: Any, barrier_set: Any, block: Any
    ) -> Running:
        """Starts O += P V with the other warpgroup's P, and leaves it in flight.

        O is rescaled first, to the maximum that this P is relative to. block: its number in the
        item.
        """
        m, total = carry
        current.stamps.block(at.WAIT_P, block)
        plgpu.barrier_wait(self.cta.scratch.p_ready.at[barrier_set])
        current.stamps.block(at.PV, block)
        new_m = self.cta.g.load_rows(self.cta.scratch.row_max.at[stage])
        factor = self.rescale(current.o_acc, m, new_m)
        self.cta.g.mma(current.o_acc, self.cta.p_of(stage), self.v.at[stage])
        return Running(new_m, total * factor)

    # -- the steps of a block -------------------------------------------------------------------
    def score(
        self, current: CurrentItem, zero: Any, stage: Any, barrier_set: Any, block: Any
    ) -> None:
        """Starts S = q K^T of a block, part by part as they arrive, and leaves it in flight.

        zero: from `CurrentItem.opaque_zero`, the index of q. block: its number in the item.
        """
        cta = self.cta
        cta.g.zero(current.s_acc)
        current.stamps.block(at.WAIT, block)
        for number, columns in enumerate(cta.columns):
            plgpu.barrier_wait(columns.full.at[barrier_set])
            if number == 0:
                current.stamps.block(at.QK, block)
            cta.kv_blocks.make_visible()
            in_registers = columns.q is cta.scratch.q_rope and current.q_rope is not None
            q = current.q_rope if in_registers else columns.q.at[zero]
            cta.g.mma_t(current.s_acc, q, columns.kv.at[stage])

    def publish(self, stage: Any, barrier_set: Any, p: Any, m: Any) -> None:
        """Stores P and its maxima for the other warpgroup, and signals them."""
        self.cta.scratch.kv_rope.at[stage].at[:, pl.ds(0, BLOCK)][...] = p
        self.cta.scratch.row_max.at[stage][...] = m
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.cta.scratch.p_ready.at[barrier_set])

    def release(self, stage: Any) -> None:
        """Signals that this warpgroup has read its half of V, and P, for the last time."""
        if self.cta.ctas_per_tile > 1:
            # A local barrier counts every thread, a cluster barrier one: all warps must be done.
            plgpu.commit_smem()
        empty = (self.cta.scratch.empty_left, self.cta.scratch.empty_right)[self.side]
        plgpu.barrier_arrive(empty.at[stage])

    def masked(self, s: jax.Array, descriptor: Any, block: Any) -> jax.Array:
        """Returns scores with -inf for the keys of a block that a row must not see."""
        cta = self.cta
        kv_len, query_len = descriptor[FIELD.kv_len], descriptor[FIELD.query_len]
        row = cta.first_row(descriptor[FIELD.row_tile])
        shape = (BLOCK, BLOCK)
        token = (cta.g.iota(shape, 0) + row) // cta.call.num_heads
        last = VisibleKeys.of(cta.call, kv_len, query_len).last(token)
        position = cta.g.iota(shape, 1) + block * BLOCK
        return jnp.where((position <= last) & (position < kv_len), s, -jnp.inf)

    def clear_hidden(self, stage: Any, descriptor: Any, block: Any, s: jax.Array) -> None:
        """Replaces NaN and infinity by 0 in the rows of V that some row of the tile must not see.

        P is 0 for a hidden key, but 0 * NaN is NaN. s: scores before the mask. A key that is not
        finite makes the scores of all rows not finite, so V is searched only if some score is not
        finite. Rows that do see such a key get NaN from its score.
        """
        cta = self.cta
        kv_len = descriptor[FIELD.kv_len]
        first_token = cta.first_row(descriptor[FIELD.row_tile]) // cta.call.num_heads
        visible = VisibleKeys.of(cta.call, kv_len, descriptor[FIELD.query_len])
        seen_by_all = visible.count_for_all_from(first_token) - block * BLOCK

        @pl.when(seen_by_all < BLOCK)
        def _look():
            @pl.when(cta.g.any_not_finite(s))
            def _clear():
                for kv in (cta.scratch.kv_left, cta.scratch.kv_right):
                    cta.g.clear_not_finite(kv.at[stage], seen_by_all)
                plgpu.commit_smem()

    def raised(self, m: jax.Array, block_max: jax.Array) -> jax.Array:
        """Returns the running maximum after a block of this row maximum, in log2 units."""
        if self.cta.call.exponent_add:
            # AMLA takes the whole number at or above it, so that O moves by powers of two.
            whole = block_max.astype(jnp.int32).astype(jnp.float32)
            whole += jnp.where(block_max > whole, 1.0, 0.0)
            block_max = jnp.where(jnp.abs(block_max) < ALL_WHOLE, whole, block_max)
        block_max = jnp.maximum(m, block_max)
        return jnp.where(block_max > m + LAZY_GROWTH, block_max, m)

    def rescale(self, o_acc: Any, m: jax.Array, new_m: jax.Array) -> jax.Array:
        """Rescales O to a new maximum and returns the factor per row.

        No product may be in flight on O.
        """
        g = self.cta.g
        factor = jnp.exp2(m - new_m)

        def rescaled():
            o = g.read(o_acc)
            if self.cta.call.exponent_add:
                return g.add_exponent(o, jnp.maximum(m - new_m, -300.0))
            return o * per_row(factor, o.shape)

        # Each warp decides for its own rows. All warps write O outside of the branch, because the
        # fence of the write needs the whole warpgroup.
        grown = g.any_less_in_warp(m, new_m)
        o_acc[...] = lax.cond(grown, rescaled, lambda: g.read(o_acc))
        return factor
