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
    BLOCK_END,
    BLOCK_START,
    KV_LEN,
    OPEN_PAIRS,
    QUERY_LEN,
    ROW_TILE,
    STAGES,
    Cta,
    accumulator_shapes,
)
from pallas_kernels.hopper.mosaic.primitives import ROWS
from pallas_kernels.hopper.work_items import BLOCK, NO_KEY, range_of

ALL_WHOLE = 2.0**23  # float32 numbers from here on are whole
LAZY_GROWTH = 8.0  # log2 units that the running maximum may lag behind the true one


class Running(NamedTuple):
    """The state of the online softmax, per row.

    Between blocks `top` is the same in both warpgroups, because each takes over the maximum of the
    other's P before it multiplies it. `total` has only the blocks that this warpgroup scored.
    """

    top: Any  # the maximum that O and the sum are relative to, in log2 units
    total: Any  # this warpgroup's sum of P


class Item(NamedTuple):
    """The work item in hand."""

    state: Any  # its shared memory: `decode_refs.KV_LEN` and so on
    begin: Any  # its first KV block
    num_blocks: Any
    q_rope: Any | None  # the rope columns of q in registers; None: in shared memory
    o_acc: Any
    s_acc: Any

    def opaque(self, i: Any) -> Any:
        """Returns 0, but hidden from the compiler, which would hoist every wgmma descriptor."""
        return (self.num_blocks >> 30) & (self.begin + i)


@dataclasses.dataclass(frozen=True)
class ComputingWarpgroup:
    """Warpgroup `me`, 0 or 1, of a CTA."""

    cta: Cta
    me: int

    @property
    def q(self) -> Any:
        """This warpgroup's half of q; free when the item is computed."""
        return self.cta.columns[self.me].q

    @property
    def v(self) -> Any:
        """This warpgroup's half of V."""
        return self.cta.columns[self.me].kv

    def run(self) -> None:
        """Computes the worker's items, in their order."""
        cta = self.cta
        for stage in range(STAGES):
            self.release(stage)  # Every stage starts free.
        if cta.inputs.q.shape[1] < BLOCK:
            self.clear_q()
        plgpu.barrier_arrive(cta.scratch.q_empty)

        def run_item(n, _):
            cta.g.with_accumulators(
                functools.partial(self.attend, n),
                cta.scratch.accumulators,
                self.me,
                *accumulator_shapes(cta.call),
            )
            return ()

        first, stop = range_of(cta.range_ref)
        lax.fori_loop(0, stop - first, run_item, ())
        plgpu.wait_smem_to_gmem(0)

    def clear_q(self) -> None:
        """Makes rows finite that no copy fills because q has fewer than 64. No row reaches another.

        (Rows past the end of a longer q are zeros: TMA fills them.) Warpgroup 0 also clears the
        rope columns.
        """
        cta = self.cta
        columns = [(self.q, cta.half)]
        if self.me == 0:
            columns.append((cta.scratch.q_rope, cta.call.rope_dim))
        for ref, width in columns:
            for c in range(0, width, 64):
                zeros = cta.g.full((BLOCK, 64), 0.0, plgpu.Layout.WGMMA).astype(cta.call.q.dtype)
                ref.at[0, :, pl.ds(c, 64)][...] = zeros
        plgpu.commit_smem()

    def attend(self, n: Any, o_acc: Any, s_acc: Any) -> None:
        """Computes the worker's n-th item."""
        cta, g = self.cta, self.cta.g
        plgpu.barrier_wait(cta.scratch.q_full)
        # AMLA's adds need the registers that the rope columns of q would take.
        q_rope = None if self.cta.call.exponent_add else g.load_tile(cta.scratch.q_rope.at[0])
        state = cta.item(n)
        begin, end = state[BLOCK_START], state[BLOCK_END]
        item = Item(state, begin, end - begin, q_rope, o_acc, s_acc)
        g.zero(o_acc)
        carry = Running(g.full((BLOCK,), NO_KEY, ROWS), g.full((BLOCK,), 0.0, ROWS))
        # Pairs of blocks have no mask: with masks, their code would not fit the instruction cache.
        two_blocks = functools.partial(self.two_blocks, item)
        carry = lax.fori_loop(0, state[OPEN_PAIRS], two_blocks, carry)
        one_block = functools.partial(self.one_block, item)
        carry = lax.fori_loop(2 * state[OPEN_PAIRS], item.num_blocks, one_block, carry)
        Finish(cta, self.me, self.q, item).run(*carry)
        plgpu.barrier_arrive(cta.scratch.q_empty)

    # -- the schedule ---------------------------------------------------------------------------
    def two_blocks(self, item: Item, i: Any, carry: Running) -> Running:
        """Takes two blocks of which every row of the tile sees every key."""
        cta, g = self.cta, self.cta.g
        zero = item.opaque(i)
        first, second = zero, zero + 1
        if self.me == 0:
            carry = self.score_and_multiply(item, carry, zero, first, first)
            carry = self.multiply_others(item, carry, second, second)
            g.wait_mma(0)
            self.release(second)
            return carry
        self.score(item, zero, second, second)
        g.wait_mma(0)
        s = g.read(item.s_acc) * cta.call.log2_scale
        block_top = s.max(axis=1)
        top, total = self.multiply_others(item, carry, first, first)
        new_top = self.raised(top, block_top)
        p = jnp.exp2(s - across(new_top))
        rounded = p.astype(cta.call.q.dtype)
        self.publish(second, second, rounded, new_top)
        g.wait_mma(0)
        self.release(first)
        total = total * self.rescale(item.o_acc, top, new_top) + p.sum(axis=1)
        g.mma(item.o_acc, rounded, self.v.at[second])
        g.wait_mma(0)
        self.release(second)
        return Running(new_top, total)

    def one_block(self, item: Item, i: Any, carry: Running) -> Running:
        """Takes any other block, masked: warpgroup 0 scores it and both multiply."""
        zero = item.opaque(i)
        stage = zero + i % STAGES
        barrier_set = stage + STAGES
        if self.me == 0:
            block = item.begin + i
            return self.score_and_multiply(item, carry, zero, stage, barrier_set, block)
        carry = self.multiply_others(item, carry, stage, barrier_set)
        self.cta.g.wait_mma(0)
        self.release(stage)
        return carry

    def score_and_multiply(
        self,
        item: Item,
        carry: Running,
        zero: Any,
        stage: Any,
        barrier_set: Any,
        masked_block: Any = None,
    ) -> Running:
        """Scores a block, publishes its P and multiplies.

        masked_block: the number of a block that needs a mask; None: it needs none.
        """
        cta, g = self.cta, self.cta.g
        top, total = carry
        self.score(item, zero, stage, barrier_set)
        g.wait_mma(0)
        s = g.read(item.s_acc) * cta.call.log2_scale
        if masked_block is not None:
            self.clear_hidden(stage, item.state, masked_block, s)
            s = self.masked(s, item.state, masked_block)
        new_top = self.raised(top, s.max(axis=1))
        p = jnp.exp2(s - across(new_top))
        rounded = p.astype(cta.call.q.dtype)
        self.publish(stage, barrier_set, rounded, new_top)
        factor = self.rescale(item.o_acc, top, new_top)
        g.mma(item.o_acc, rounded, self.v.at[stage])
        total = total * factor + p.sum(axis=1)
        g.wait_mma(0)
        self.release(stage)
        return Running(new_top, total)

    def multiply_others(self, item: Item, carry: Running, stage: Any, barrier_set: Any) -> Running:
        """Multiplies the other warpgroup's P, at its maximum; left in flight."""
        top, total = carry
        plgpu.barrier_wait(self.cta.scratch.p_ready.at[barrier_set])
        new_top = self.cta.g.load_rows(self.cta.scratch.row_max.at[stage])
        factor = self.rescale(item.o_acc, top, new_top)
        self.cta.g.mma(item.o_acc, self.cta.p_of(stage), self.v.at[stage])
        return Running(new_top, total * factor)

    # -- the steps of a block -------------------------------------------------------------------
    def score(self, item: Item, zero: Any, stage: Any, barrier_set: Any) -> None:
        """S = q K^T of a block, part by part as they arrive; left in flight."""
        cta = self.cta
        cta.g.zero(item.s_acc)
        for columns in cta.columns:
            plgpu.barrier_wait(columns.full.at[barrier_set])
            cta.kv_blocks.make_visible()
            in_registers = columns.q is cta.scratch.q_rope and item.q_rope is not None
            q = item.q_rope if in_registers else columns.q.at[zero]
            cta.g.mma_t(item.s_acc, q, columns.kv.at[stage])

    def publish(self, stage: Any, barrier_set: Any, p: Any, top: Any) -> None:
        """Hands P and its maxima to the other warpgroup."""
        self.cta.scratch.kv_rope.at[stage].at[:, pl.ds(0, BLOCK)][...] = p
        self.cta.scratch.row_max.at[stage][...] = top
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.cta.scratch.p_ready.at[barrier_set])

    def release(self, stage: Any) -> None:
        """Signals that this warpgroup has read its half of V, and P, for the last time."""
        if self.cta.ctas_per_tile > 1:
            # A local barrier counts every thread, a cluster barrier one: all warps must be done.
            plgpu.commit_smem()
        empty = (self.cta.scratch.empty_left, self.cta.scratch.empty_right)[self.me]
        plgpu.barrier_arrive(empty.at[stage])

    def masked(self, s: jax.Array, state: Any, block: Any) -> jax.Array:
        """Returns scores with -inf for the keys of a block that a row must not see."""
        cta = self.cta
        kv_len, query_len = state[KV_LEN], state[QUERY_LEN]
        row = cta.first_row(state[ROW_TILE])
        shape = (BLOCK, BLOCK)
        token = (cta.g.iota(shape, 0) + row) // cta.call.num_heads
        last = kv_len - query_len + token if cta.call.causal else kv_len - 1
        position = cta.g.iota(shape, 1) + block * BLOCK
        return jnp.where((position <= last) & (position < kv_len), s, -jnp.inf)

    def clear_hidden(self, stage: Any, state: Any, block: Any, s: jax.Array) -> None:
        """Makes finite what some row must not see of V: its P is 0, but 0 * NaN is NaN.

        s: scores before the mask. A key that is not finite makes every row's score not finite, so
        the scores say where to look, and rows that do see the key stay NaN.
        """
        cta = self.cta
        seen_by_all = state[KV_LEN]  # keys that every row sees
        if cta.call.causal:
            row = cta.first_row(state[ROW_TILE])
            seen_by_all += jnp.minimum(row // cta.call.num_heads + 1 - state[QUERY_LEN], 0)
        seen_by_all -= block * BLOCK

        @pl.when(seen_by_all < BLOCK)
        def _():
            @pl.when(cta.g.any_not_finite(s))
            def _():
                for kv in (cta.scratch.kv_left, cta.scratch.kv_right):
                    cta.g.clear_not_finite(kv.at[stage], seen_by_all)
                plgpu.commit_smem()

    def raised(self, top: jax.Array, block_top: jax.Array) -> jax.Array:
        """Returns the running maximum after a block of this row maximum, in log2 units."""
        if self.cta.call.exponent_add:
            # AMLA takes the whole number at or above it, so that O moves by powers of two.
            whole = block_top.astype(jnp.int32).astype(jnp.float32)
            whole += jnp.where(block_top > whole, 1.0, 0.0)
            block_top = jnp.where(jnp.abs(block_top) < ALL_WHOLE, whole, block_top)
        block_top = jnp.maximum(top, block_top)
        return jnp.where(block_top > top + LAZY_GROWTH, block_top, top)

    def rescale(self, o_acc: Any, top: jax.Array, new_top: jax.Array) -> jax.Array:
        """Rescales O to a new maximum and returns the factor per row.

        No product may be in flight on O.
        """
        g = self.cta.g
        factor = jnp.exp2(top - new_top)

        def rescaled():
            o = g.read(o_acc)
            if self.cta.call.exponent_add:
                return g.add_exponent(o, jnp.maximum(top - new_top, -300.0))
            return o * across(factor, o.shape)

        # Each warp decides for its own rows. All write O, outside of the branch: the fence of
        # the write needs the whole warpgroup.
        grown = g.any_less_in_warp(top, new_top)
        o_acc[...] = lax.cond(grown, rescaled, lambda: g.read(o_acc))
        return factor


def across(rows: jax.Array, shape: tuple[int, ...] = (BLOCK, BLOCK)) -> jax.Array:
    """Returns a tile whose columns are all this value per row."""
    return lax.broadcast_in_dim(rows, shape, [0])
