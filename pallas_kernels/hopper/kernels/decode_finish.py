"""The end of a work item in the decode kernel: combine, normalise, and store or leave a partial.

A work item is a whole tile, or one of several of a split tile. Where a split tile has two items
only, the CTA that reaches it last combines both in registers ("kept" items). Else the item leaves a
partial result, and the end of the launch or `merge` combines all partials of the tile.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.kernels.decode_refs import INVALID, KV_LEN, QUERY_LEN, Kernel
from pallas_kernels.hopper.mosaic.cluster import combine_softmax
from pallas_kernels.hopper.mosaic.primitives import ROWS
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.parts.combine import BLOCK_COLUMNS, TileCounter, row_scales
from pallas_kernels.hopper.work_items import BLOCK, LN2, LOG2E, NO_KEY, WorkItem, kept_partial


class Target(NamedTuple):
    """Where the result of a work item goes."""

    request: Any
    row_tile: Any
    partial: Any  # as in `WorkItem`
    num_partials: Any
    cta: Any  # which 64 rows of the tile this CTA has
    row: Any  # the first of them
    kept: Any  # whether this CTA combines the tile's two items
    next_partial: Any  # in a cluster of two: where the other item left its partial
    tile_counter: TileCounter  # counts that partial


@dataclasses.dataclass(frozen=True)
class Finish:
    """Finishes an item, for computing warpgroup `me`.

    q: this warpgroup's half of q, which is free now. item: `decode_compute.Item`.
    """

    k: Kernel
    me: int
    q: Any
    item: Any

    def run(self, top: jax.Array, total: jax.Array) -> None:
        """Writes the result of rows with these maxima (log2 units) and sums of P."""
        k, g, state = self.k, self.k.g, self.item.state
        # What is read here holds no register during the loops over blocks.
        *fields, kv_len = (state[i] for i in range(KV_LEN + 1))
        work = WorkItem(*fields)
        cta = k.part_of_tile()
        row = (work.row_tile * k.cluster + cta) * BLOCK
        invalid = state[INVALID] > 0  # Written before the barrier of the item's last block.
        total = self.sum_of_both(total)
        o = g.read(self.item.o_acc)
        if k.inputs.requests.query_lens is not None:
            # Rows without a query were never masked, and hold whatever q was there.
            query = (g.iota((BLOCK,), 0) + row) // k.call.num_heads < state[QUERY_LEN]
            top, total = jnp.where(query, top, NO_KEY), jnp.where(query, total, 0.0)
            o = jnp.where(self.across(query), o, 0.0)
        total += jnp.where((kv_len < 0) | invalid, jnp.nan, 0.0)
        target = Target(
            request=work.request,
            row_tile=work.row_tile,
            partial=work.partial,
            num_partials=work.num_partials,
            cta=cta,
            row=row,
            kept=work.partial < -1,
            next_partial=kept_partial(work.partial) + 1,
            tile_counter=k.counter_of(work.request, work.row_tile, 1),
        )
        self.combine_and_store(target, o, top, total)

    def combine_and_store(
        self, target: Target, o: jax.Array, top: jax.Array, total: jax.Array
    ) -> None:
        k, g = self.k, self.k.g

        def of_other_item():
            if k.pairs:
                return self.exchange_stats(top, total)
            return self.stats_of_partial(target)

        def nothing():
            return tuple(g.full((BLOCK,), value, ROWS) for value in (NO_KEY, 0.0))

        other = lax.cond(target.kept, of_other_item, nothing)
        top, total, weight, others_weight = combine_softmax(top, total, *other)
        seen = total != 0.0
        inverse, others_inverse = (jnp.where(seen, w / total, 0.0) for w in (weight, others_weight))
        # Written so that it can be contracted in one way only: the same bits in every program.
        lse = jnp.where(seen, (top + jnp.log(total) * LOG2E) * LN2, -jnp.inf)

        def scaled():
            scale, inverse_scale = row_scales(jnp.abs(o).max(axis=1) * inverse)
            self.partial_rows(target, target.partial, self.me).store_values(
                g, k.partials.scales, scale
            )
            return inverse * inverse_scale

        factor = inverse  # One factor for all, so that O is multiplied once.
        if k.scaled_partials:
            factor = lax.cond(target.partial >= 0, scaled, lambda: inverse)
        o *= self.across(factor)
        if k.pairs:
            # In a shared tile each CTA finishes the half of the columns that has its rank.
            sends = target.kept & (k.rank != self.me)
            pl.when(sends)(lambda: self.send(o))

            @pl.when(~sends)
            def _():
                whole = lax.cond(target.kept, lambda: o + self.received(), lambda: o)
                self.store(target, self.parts_of(whole), lse)
        else:
            parts = lax.cond(
                target.kept,
                lambda: self.with_partial(target, o, others_inverse),
                lambda: self.parts_of(o),
            )
            self.store(target, parts, lse)
            if k.call.combines:
                pl.when(target.kept)(target.tile_counter.count_combined)

    # -- both warpgroups, both CTAs, both items -------------------------------------------------
    def sum_of_both(self, total: jax.Array) -> jax.Array:
        """Each warpgroup has summed P of the blocks that it scored."""
        k, sums = self.k, self.k.scratch.row_sum
        sums.at[self.me][...] = total
        plgpu.commit_smem()
        plgpu.barrier_arrive(k.scratch.sums_ready)
        plgpu.barrier_wait(k.scratch.sums_ready)
        return k.g.load_rows(sums.at[0]) + k.g.load_rows(sums.at[1])

    def exchange_stats(self, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns maxima and sums of the other CTA's item of a shared tile.

        Each warpgroup sends one of the two. After the exchange, both CTAs have read q for the last
        time.
        """
        k, other = self.k, self.k.other_cta
        places = (k.scratch.others_max, k.half), (k.scratch.others_sum, k.half + 1)
        other.send_rows(*places[self.me], (top, total)[self.me])
        other.arrive(k.scratch.stats_sent)
        other.wait(k.scratch.stats_sent)
        maxima, sums = (other.received_rows(*place) for place in places)
        return maxima, sums

    def stats_of_partial(self, target: Target) -> tuple[jax.Array, jax.Array]:
        """Returns maxima and sums of the tile's other item, from its partial result."""
        if self.k.call.combines:
            target.tile_counter.wait()
        rows = pl.ds(target.cta * BLOCK, BLOCK)
        lse = self.k.g.load_rows(self.k.partials.lse.at[target.next_partial, rows])
        seen = lse != -jnp.inf
        return jnp.where(seen, lse * LOG2E, NO_KEY), jnp.where(seen, 1.0, 0.0)

    def send(self, o: jax.Array) -> None:
        """Sends this warpgroup's columns to where q was in the other CTA."""
        s = self.k.scratch
        self.k.other_cta.send_tile((s.q_left.at[0], s.q_right.at[0]), 0, o)
        self.k.other_cta.arrive(s.o_sent)

    def received(self) -> jax.Array:
        """Returns the other CTA's part of this warpgroup's columns."""
        k, s = self.k, self.k.scratch
        k.other_cta.wait(s.o_sent)
        places = (s.q_left.at[0], s.q_right.at[0])
        o = k.other_cta.received_tile(places, 0, (BLOCK, k.half))
        plgpu.commit_smem()  # All of it is read before any of it is overwritten.
        return o

    def with_partial(self, target: Target, o: jax.Array, weights: jax.Array) -> tuple:
        """Returns o and the other item's partial times its weights, in parts of 64 columns."""
        k, g = self.k, self.k.g
        if k.scaled_partials:
            rows = pl.ds(target.cta * BLOCK, BLOCK)
            scales = k.partials.scales.at[target.next_partial, self.me, rows]
            weights = weights * g.load_rows(scales)
        spread = lax.broadcast_in_dim(weights, (BLOCK, 64), [0])
        return tuple(
            part
            + g.load_blocks(self.partial_part(target, target.next_partial, i)).astype(jnp.float32)
            * spread
            for i, part in enumerate(self.parts_of(o))
        )

    # -- outputs --------------------------------------------------------------------------------
    def store(self, target: Target, parts: tuple, lse: jax.Array) -> None:
        """Stores the result as output, or as the item's partial."""
        pl.when(target.partial < 0)(lambda: self.store_output(target, parts, lse))
        pl.when(target.partial >= 0)(lambda: self.leave_partial(target, parts, lse))

    def store_output(self, target: Target, parts: tuple, lse: jax.Array) -> None:
        k, g = self.k, self.k.g
        rows = k.rows_of(target.request, target.row_tile)
        parts = tuple(part.astype(k.call.q.dtype) for part in parts)
        staging = self.q.at[self.item.opaque(0)]
        rows.store_parts(g, k.outputs.o, self.me * k.half, parts, staging)
        if self.me == 0:
            rows.store_values(g, k.outputs.lse, lse)

    def leave_partial(self, target: Target, parts: tuple, lse: jax.Array) -> None:
        k, g = self.k, self.k.g
        for i, part in enumerate(parts):
            part = part.astype(k.call.partial_dtype)
            place = self.partial_part(target, target.partial, i)
            g.store_blocks(place, part, k.call.num_rows - target.row)
        if self.me == 0:
            self.partial_rows(target, target.partial).store_values(g, k.partials.lse, lse)
        if k.call.combines:
            k.counter_of(target.request, target.row_tile, target.num_partials).count_partial()

    def partial_part(self, target: Target, partial: Any, i: int) -> Any:
        """Returns where part i of this warpgroup's columns is in a partial result."""
        zero = self.item.opaque(0)  # Without it, pointers would be held in registers.
        first = zero + (self.me * self.k.half + i * 64) // BLOCK_COLUMNS
        return self.k.partials.o.at[partial, zero + target.cta, pl.ds(first, 64 // BLOCK_COLUMNS)]

    def partial_rows(self, target: Target, *index: Any) -> Rows:
        """Returns this CTA's rows of a partial result."""
        return Rows.of_partial(index, target.cta * BLOCK, BLOCK)

    def parts_of(self, o: jax.Array) -> tuple:
        return tuple(o[:, c : c + 64] for c in range(0, self.k.half, 64))

    def across(self, rows: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(rows, (BLOCK, self.k.half), [0])
