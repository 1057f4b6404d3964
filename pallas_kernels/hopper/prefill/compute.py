"""A computing warpgroup of the prefill kernel: scores, online softmax, and O of 64 query rows.

A step adds a KV block. It starts the product of q and this block's K, and that of P and V of the
block before. While they run, the other warpgroup computes its softmax:

    wait for K | take the turn | start S_j = q K_j^T | wait for V | start O += P_(j-1) V_(j-1)
    | pass the turn | wait for S_j | release K | row maxima | wait for O | release V
    | P_j = exp2(...), sums, rescale O where scores rise far

Blocks are counted from a tile's last one, j = 0, which is computed first.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.primitives import ROWS
from pallas_kernels.hopper.mosaic.rows import CountedRows
from pallas_kernels.hopper.mosaic.values import per_row
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.normalize import LAZY_GROWTH, divided, natural_lse
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.prefill.config import CHECKERS, TILE_ROWS
from pallas_kernels.hopper.prefill.refs import Cta
from pallas_kernels.hopper.prefill.work_items import Item
from pallas_kernels.hopper.work_items import NO_KEY

HEIGHT = 64  # query rows of a warpgroup
SUM_COLUMNS = 8  # columns of the running sums: each thread keeps sums of its own


class Running(NamedTuple):
    """The state of the online softmax between blocks."""

    m: Any  # [64] what P is relative to, in log2 units: `softmax`
    total: Any  # [64, 8] sums of P, over every eighth column
    o: Any  # [64, v_dim] float32, without the block of p
    p: Any  # [64, block_keys] of q's dtype: P of the last block, relative to m


@dataclasses.dataclass(frozen=True)
class ComputingWarpgroup:
    """Warpgroup 0 or 1 of a CTA.

    index: its number, traced: both run the same code. stamps: of the item in hand.
    """

    cta: Cta
    index: Any
    stamps: Stamps

    def run(self) -> None:
        """Computes the items of the CTA."""
        cta, scratch = self.cta, self.cta.scratch
        cta.g.take_registers(cta.config.warpgroup_registers, 0)
        for stage in range(cta.config.stages):  # Every stage starts free.
            plgpu.barrier_arrive(scratch.k_empty.at[stage])
            plgpu.barrier_arrive(scratch.v_empty.at[stage])
        plgpu.barrier_arrive(scratch.q_empty.at[self.index])
        if cta.config.in_turns:  # Warpgroup 0 begins.
            plgpu.barrier_arrive(scratch.turn.at[0], predicate=self.index == 1)
        cta.run_items(
            lambda k, n, item: dataclasses.replace(self, stamps=cta.stamps.of_item(k)).run_item(
                n, item
            )
        )
        if cta.config.in_turns:
            pl.when(self.index == 0)(lambda: plgpu.barrier_wait(scratch.turn.at[0]))
        cta.stamps.item(at.KERNEL_END)

    def run_item(self, n: Any, item: Item) -> None:
        """Computes an item, or its rows that see no key, and stores it."""
        g, v_dim = self.cta.g, self.cta.config.v_dim
        self.stamps.item(at.ITEM)

        def nothing() -> tuple:
            zeros = g.full((HEIGHT, v_dim), 0.0, plgpu.Layout.WGMMA)
            return g.full((HEIGHT,), NO_KEY, ROWS), g.full((HEIGHT,), 0.0, ROWS), zeros

        attend = functools.partial(self.attend, n, item)
        m, total, o = lax.cond(item.num_blocks > 0, attend, nothing)
        total += jnp.where(item.invalid > 0, jnp.nan, 0.0)
        o = o * per_row(divided(1.0, total), o.shape)
        rows = CountedRows.of_ragged_tile(
            item.q_row + HEIGHT * self.index, item.num_rows - HEIGHT * self.index, HEIGHT
        )
        outputs = self.cta.outputs
        rows.store_tile_in_chunks(g, outputs.o.at[:, item.head], o.astype(self.cta.call.q.dtype), 0)
        lse = natural_lse(m, total, log2_sum=True)
        rows.store_values(g, outputs.lse.at[:, item.head], lse)
        self.stamps.item(at.ITEM_END)

    # -- the schedule ---------------------------------------------------------------------------
    def attend(self, n: Any, item: Item) -> tuple[Any, Any, Any]:
        """Returns maxima (log2 units), sums of P and O of an item with a block at least."""
        cta, g, scratch = self.cta, self.cta.g, self.cta.scratch
        masked = cta.call.masked_blocks
        first = self.pass_hidden_block(n, item) if self.passes_blocks else 0
        carry = self.first_block(n, item, first)
        step, begin = functools.partial(self.step, n, item), jnp.minimum(masked, item.num_blocks)
        if masked > 1:
            step_masked = functools.partial(step, masked=True)
            carry = lax.fori_loop(first + 1, begin, step_masked, carry)
        carry = lax.fori_loop(begin, item.num_blocks, step, carry)
        self.stamps.item(at.SUM)
        last = item.num_blocks - 1
        stage = cta.stage(n + last)
        pl.when(last >= masked)(lambda: plgpu.barrier_wait(scratch.v_full.at[stage]))
        self.take_turn()
        o = g.plus_product(carry.o, carry.p, scratch.v.at[stage])
        self.pass_turn()
        total = carry.total.sum(axis=1)
        g.wait_mma(0)
        o = g.completed(o)
        self.stamps.item(at.STORE)
        plgpu.barrier_arrive(scratch.v_empty.at[stage])
        return carry.m, total, o

    @property
    def passes_blocks(self) -> bool:
        """Whether a warpgroup can leave out a tile's last block."""
        return self.cta.config.trims and self.cta.call.masked_blocks > 1

    def pass_hidden_block(self, n: Any, item: Item) -> Any:
        """Releases K of an item's last block if the rows of this warpgroup see none of its keys.

        Returns the number of the block that they see first, 0 or 1. The item has that block too.
        `first_block` releases V, so that no row waits for V before its first scores.
        """
        cta, scratch = self.cta, self.cta.scratch
        _, last_seen = self.limit(item, 0)
        hidden = last_seen < 0

        @pl.when(hidden)
        def release() -> None:
            stage = cta.stage(n)
            plgpu.barrier_wait(scratch.k_full.at[stage])
            plgpu.barrier_arrive(scratch.k_empty.at[stage])
            self.take_turn()
            self.pass_turn()

        return hidden.astype(jnp.int32)

    def first_block(self, n: Any, item: Item, j: Any) -> Running:
        """Scores the first block of an item that this warpgroup sees, the j-th, with a mask."""
        cta, g, scratch = self.cta, self.cta.g, self.cta.scratch
        keys = cta.config.block_keys
        stage = cta.stage(n + j)
        limit, last_seen = self.limit(item, j)
        plgpu.barrier_wait(scratch.q_full.at[self.index])
        self.stamps.block(at.WAIT, j)
        plgpu.barrier_wait(scratch.k_full.at[stage])
        self.stamps.block(at.QK, j)

        def score(width: int) -> tuple[Any, Any, Any]:
            self.take_turn()
            self.stamps.block(at.TURN, j)
            product = self.start_scores(stage, width)
            self.pass_turn()
            g.wait_mma(0)
            s = g.completed(product)
            self.stamps.block(at.SM, j)
            self.release_k(stage, item.num_blocks == 1 + j)
            m, p = self.softmax(j, self.masked(s, limit), g.full((HEIGHT,), NO_KEY, ROWS))
            rounded = p.astype(cta.call.q.dtype)
            return m, partial_sums(p), g.with_zero_columns(rounded, keys)

        if cta.config.trims and keys == TILE_ROWS:
            half = functools.partial(score, keys // 2)
            m, total, p = lax.cond(last_seen < keys // 2, half, functools.partial(score, keys))
        else:
            m, total, p = score(keys)
        if self.passes_blocks:
            pl.when(j > 0)(functools.partial(self.release_unused_v, cta.stage(n)))
        self.stamps.block(at.PUBLISHED, j)
        total = self.poisoned(total, stage, limit)
        self.stamps.block(at.END, j)
        o = g.full((HEIGHT, cta.config.v_dim), 0.0, plgpu.Layout.WGMMA)
        return Running(m, total, o, p)

    def step(self, n: Any, item: Item, j: Any, carry: Running, masked: bool = False) -> Running:
        """Scores an item's j-th block, and adds the block before to O."""
        cta, g, scratch = self.cta, self.cta.g, self.cta.scratch
        stage, before = cta.stage(n + j), cta.stage(n + j - 1)
        plgpu.barrier_wait(scratch.k_full.at[stage])
        self.stamps.block(at.QK, j)
        self.take_turn()
        self.stamps.block(at.TURN, j)
        product = self.start_scores(stage, cta.config.block_keys)
        if not masked:  # The checkers have waited for the blocks with a mask.
            unchecked = j > cta.call.masked_blocks
            pl.when(unchecked)(lambda: plgpu.barrier_wait(scratch.v_full.at[before]))
        o = g.plus_product(carry.o, carry.p, scratch.v.at[before])
        self.pass_turn()
        g.wait_mma(1)
        s = g.completed(product)
        self.stamps.block(at.SM, j)
        self.release_k(stage, j == item.num_blocks - 1)
        if masked:
            limit, _ = self.limit(item, j)
            s = self.masked(s, limit)
        m, p = self.softmax(j, s, carry.m)
        factor = jnp.exp2(carry.m - m)
        total = carry.total * per_row(factor, carry.total.shape) + partial_sums(p)
        g.wait_mma(0)
        o = g.completed(o)
        plgpu.barrier_arrive(scratch.v_empty.at[before])
        # Each warp decides for its own rows.
        grown = g.any_less_in_warp(factor, g.full((HEIGHT,), 1.0, ROWS))
        o = lax.cond(grown, lambda o: o * per_row(factor, o.shape), lambda o: o, o)
        if masked:
            total = self.poisoned(total, stage, limit)
        self.stamps.block(at.END, j)
        return Running(m, total, o, p.astype(cta.call.q.dtype))

    # -- the parts of a step --------------------------------------------------------------------
    def start_scores(self, stage: Any, width: int) -> jax.Array:
        """Starts S = q K^T for the first keys of a block, and leaves it in flight."""
        scratch = self.cta.scratch
        k = scratch.k.at[stage]
        if width < self.cta.config.block_keys:
            k = k.at[:, pl.ds(0, width)]
        return self.cta.g.product_t(scratch.q.at[self.index], k, jnp.float32)

    def limit(self, item: Item, j: Any) -> tuple[Any, Any]:
        """Returns the last keys that the first and the last row see, counted in the j-th block."""
        limit = item.limit - (item.num_blocks - 1 - j) * self.cta.config.block_keys
        if not self.cta.call.causal:
            return limit, limit
        limit += HEIGHT * self.index
        return limit, limit + HEIGHT - 1

    def limits(self, limit: Any) -> Any:
        """Returns the last key that each row sees, [64]. limit: that of the first row."""
        rows = self.cta.g.iota_line(HEIGHT, ROWS)
        return limit + rows if self.cta.call.causal else limit + 0 * rows

    def masked(self, s: jax.Array, limit: Any) -> jax.Array:
        """Returns the scores of a block, -inf for keys that a row does not see."""
        seen = self.cta.g.iota(s.shape, 1) <= per_row(self.limits(limit), s.shape)
        return jnp.where(seen, s, -jnp.inf)

    def poisoned(self, total: jax.Array, stage: Any, limit: Any) -> jax.Array:
        """Waits for the checkers of V. Returns sums that are NaN in rows that see what changed."""
        scratch = self.cta.scratch
        plgpu.barrier_wait(scratch.v_checked.at[stage])
        changed = functools.reduce(
            jnp.minimum, (scratch.changed[stage, i] for i in range(CHECKERS))
        )
        poison = jnp.where(self.limits(limit) >= changed, jnp.nan, 0.0)
        return total + per_row(poison, total.shape)

    def softmax(self, j: Any, s: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the new reference of each row, in log2 units, and P of block j relative to it.

        The reference is a maximum that may lag behind the running one by `LAZY_GROWTH`. So O is
        rescaled only where scores rise far.
        """
        scale = self.cta.call.log2_scale
        top = s.max(axis=1) * scale
        m = jnp.where(top > m + LAZY_GROWTH, top, m)
        # Not after the exponentials: ptxas moves those behind the wait for O, if no stamp is there.
        self.stamps.block(at.EXP, j)
        return m, jnp.exp2(s * scale - per_row(m, s.shape))

    def release_k(self, stage: Any, is_last: Any) -> None:
        """Signals that the scores of a block are complete, and that q is free after the last."""
        scratch = self.cta.scratch
        plgpu.barrier_arrive(scratch.k_empty.at[stage])
        plgpu.barrier_arrive(scratch.q_empty.at[self.index], predicate=is_last)

    def release_unused_v(self, stage: Any) -> None:
        """Releases V of a block that this warpgroup does not see, when it has been checked."""
        plgpu.barrier_wait(self.cta.scratch.v_checked.at[stage])
        plgpu.barrier_arrive(self.cta.scratch.v_empty.at[stage])

    def take_turn(self) -> None:
        """Waits until the other warpgroup has issued its products."""
        if self.cta.config.in_turns:
            plgpu.barrier_wait(self.cta.scratch.turn.at[self.index])

    def pass_turn(self) -> None:
        if self.cta.config.in_turns:
            plgpu.barrier_arrive(self.cta.scratch.turn.at[1 - self.index])


def partial_sums(p: jax.Array) -> jax.Array:
    """Returns sums of P [64, n] over every eighth column, [64, 8]: each thread adds its own."""
    parts = [p[:, c : c + SUM_COLUMNS] for c in range(0, p.shape[1], SUM_COLUMNS)]
    while len(parts) > 1:
        parts = [sum(parts[i + 1 : i + 2], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]
