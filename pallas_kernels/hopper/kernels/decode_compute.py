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
    KV_LEN,
    OPEN_PAIRS,
    QUERY_LEN,
    STAGES,
    Kernel,
    accumulator_shapes,
)
from pallas_kernels.hopper.mosaic.primitives import ROWS
from pallas_kernels.hopper.work_items import BLOCK, NO_KEY, range_of

ALL_WHOLE = 2.0**23  # float32 numbers from here on are whole
LAZY_GROWTH = 8.0  # log2 units that the running maximum may lag behind the true one


class Running(NamedTuple):
    """The state of the online softmax, per row."""

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

    k: Kernel
    me: int

    @property
    def q(self) -> Any:
        """This warpgroup's half of q; free when the item is computed."""
        return self.k.columns[self.me].q

    @property
    def v(self) -> Any:
        """This warpgroup's half of V."""
        return self.k.columns[self.me].kv

    @property
    def exponent_add(self) -> bool:
        return self.k.call.rescale == "exponent_add"

    @property
    def lazy(self) -> bool:
        return self.k.call.rescale != "multiply"

    def run(self) -> None:
        """Computes the worker's items, in their order."""
        k = self.k
        for stage in range(STAGES):
            self.release(stage)  # Every stage starts free.
        if k.inputs.q.shape[1] < BLOCK:
            self.clear_q()
        plgpu.barrier_arrive(k.scratch.q_empty)

        def run_item(n, _):
            k.g.with_accumulators(
                functools.partial(self.attend, n),
                k.scratch.accumulators,
                self.me,
                *accumulator_shapes(k.call),
            )
            return ()

        first, stop = range_of(k.range_ref)
        lax.fori_loop(0, stop - first, run_item, ())
        plgpu.wait_smem_to_gmem(0)

    def clear_q(self) -> None:
        """Makes rows of the tile that no copy fills finite. No row reaches another."""
        k = self.k
        for ref, width in ((self.q, k.half), (k.scratch.q_rope, k.call.rope_dim))[: 2 - self.me]:
            for c in range(0, width, 64):
                zeros = k.g.full((BLOCK, 64), 0.0, plgpu.Layout.WGMMA).astype(k.call.q.dtype)
                ref.at[0, :, pl.ds(c, 64)][...] = zeros
        plgpu.commit_smem()

    def attend(self, n: Any, o_acc: Any, s_acc: Any) -> None:
        """Computes the worker's n-th item."""
        k, g = self.k, self.k.g
        plgpu.barrier_wait(k.scratch.q_full)
        # AMLA's adds need the registers that the rope columns of q would take.
        q_rope = None if self.exponent_add else g.load_tile(k.scratch.q_rope.at[0])
        state = k.item(n)
        begin, end = state[2], state[3]
        item = Item(state, begin, end - begin, q_rope, o_acc, s_acc)
        g.zero(o_acc)
        carry = Running(g.full((BLOCK,), NO_KEY, ROWS), g.full((BLOCK,), 0.0, ROWS))
        # Pairs of blocks have no mask: with masks, their code would not fit the instruction cache.
        two_blocks = functools.partial(self.two_blocks, item)
        carry = lax.fori_loop(0, state[OPEN_PAIRS], two_blocks, carry)
        one_block = functools.partial(self.one_block, item)
        carry = lax.fori_loop(2 * state[OPEN_PAIRS], item.num_blocks, one_block, carry)
        Finish(k, self.me, self.q, item).run(*carry)
        plgpu.barrier_arrive(k.scratch.q_empty)

    # -- the schedule ---------------------------------------------------------------------------
    def two_blocks(self, item: Item, i: Any, carry: Running) -> Running:
        """Takes two blocks of which every row of the tile sees every key."""
        k, g = self.k, self.k.g
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
        s = g.read(item.s_acc) * k.call.log2_scale
        block_top = s.max(axis=1)
        top, total = self.multiply_others(item, carry, first, first)
        new_top = self.raised(top, block_top)
        p = jnp.exp2(s - across(new_top))
        rounded = p.astype(k.call.q.dtype)
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
        self.k.g.wait_mma(0)
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
        k, g = self.k, self.k.g
        top, total = carry
        self.score(item, zero, stage, barrier_set)
        g.wait_mma(0)
        s = g.read(item.s_acc) * k.call.log2_scale
        if masked_block is not None:
            self.clear_hidden(stage, item.state, masked_block, s)
            s = self.masked(s, item.state, masked_block)
        new_top = self.raised(top, s.max(axis=1))
        p = jnp.exp2(s - across(new_top))
        rounded = p.astype(k.call.q.dtype)
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
        plgpu.barrier_wait(self.k.scratch.p_ready.at[barrier_set])
        new_top = self.k.g.load_rows(self.k.scratch.row_max.at[stage])
        factor = self.rescale(item.o_acc, top, new_top)
        self.k.g.mma(item.o_acc, self.k.p_of(stage), self.v.at[stage])
        return Running(new_top, total * factor)

    # -- the steps of a block -------------------------------------------------------------------
    def score(self, item: Item, zero: Any, stage: Any, barrier_set: Any) -> None:
        """S = q K^T of a block, part by part as they arrive; left in flight."""
        k = self.k
        k.g.zero(item.s_acc)
        for columns in k.columns:
            plgpu.barrier_wait(columns.full.at[barrier_set])
            k.kv_blocks.make_visible()
            in_registers = columns.q is k.scratch.q_rope and item.q_rope is not None
            q = item.q_rope if in_registers else columns.q.at[zero]
            k.g.mma_t(item.s_acc, q, columns.kv.at[stage])

    def publish(self, stage: Any, barrier_set: Any, p: Any, top: Any) -> None:
        """Hands P and its maxima to the other warpgroup."""
        self.k.scratch.kv_rope.at[stage].at[:, pl.ds(0, BLOCK)][...] = p
        self.k.scratch.row_max.at[stage][...] = top
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.k.scratch.p_ready.at[barrier_set])

    def release(self, stage: Any) -> None:
        """Signals that this warpgroup has read its half of V, and P, for the last time."""
        if self.k.cluster > 1:
            plgpu.commit_smem()  # All four warps are done before one thread signals the cluster.
        empty = (self.k.scratch.empty_left, self.k.scratch.empty_right)[self.me]
        plgpu.barrier_arrive(empty.at[stage])

    def masked(self, s: jax.Array, state: Any, block: Any) -> jax.Array:
        """Returns scores with -inf for the keys of a block that a row must not see."""
        k = self.k
        kv_len, query_len = state[KV_LEN], state[QUERY_LEN]
        row = k.first_row(state[1])
        shape = (BLOCK, BLOCK)
        token = (k.g.iota(shape, 0) + row) // k.call.num_heads
        last = kv_len - query_len + token if k.call.causal else kv_len - 1
        position = k.g.iota(shape, 1) + block * BLOCK
        return jnp.where((position <= last) & (position < kv_len), s, -jnp.inf)

    def clear_hidden(self, stage: Any, state: Any, block: Any, s: jax.Array) -> None:
        """Makes finite what some row must not see of V: its P is 0, but 0 * NaN is NaN.

        s: scores before the mask. A key that is not finite makes every row's score not finite, so
        the scores say where to look, and rows that do see the key stay NaN.
        """
        k = self.k
        shared = state[KV_LEN]  # keys that every row sees
        if k.call.causal:
            row = k.first_row(state[1])
            shared += jnp.minimum(row // k.call.num_heads + 1 - state[QUERY_LEN], 0)
        shared -= block * BLOCK

        @pl.when(shared < BLOCK)
        def _():
            @pl.when(k.g.any_not_finite(s))
            def _():
                for kv in (k.scratch.kv_left, k.scratch.kv_right):
                    k.g.clear_not_finite(kv.at[stage], shared)
                plgpu.commit_smem()

    def raised(self, top: jax.Array, block_top: jax.Array) -> jax.Array:
        """Returns the running maximum after a block of this row maximum, in log2 units."""
        if self.exponent_add:
            # AMLA takes the whole number at or above it, so that O moves by powers of two.
            whole = block_top.astype(jnp.int32).astype(jnp.float32)
            whole += jnp.where(block_top > whole, 1.0, 0.0)
            block_top = jnp.where(jnp.abs(block_top) < ALL_WHOLE, whole, block_top)
        block_top = jnp.maximum(top, block_top)
        return jnp.where(block_top > top + LAZY_GROWTH, block_top, top) if self.lazy else block_top

    def rescale(self, o_acc: Any, top: jax.Array, new_top: jax.Array) -> jax.Array:
        """Rescales O to a new maximum and returns the factor per row.

        No product may be in flight on O.
        """
        g = self.k.g
        factor = jnp.exp2(top - new_top)

        def rescaled():
            o = g.read(o_acc)
            if self.exponent_add:
                return g.add_exponent(o, jnp.maximum(top - new_top, -300.0))
            return o * across(factor, o.shape)

        if self.lazy:
            # Each warp decides for its own rows. All of them write O, which takes a fence.
            grown = g.any_less_in_warp(top, new_top)
            o_acc[...] = lax.cond(grown, rescaled, lambda: g.read(o_acc))
        else:
            o_acc[...] = rescaled()
        return factor


def across(rows: jax.Array, shape: tuple[int, ...] = (BLOCK, BLOCK)) -> jax.Array:
    """Returns a tile whose columns are all this value per row."""
    return lax.broadcast_in_dim(rows, shape, [0])
