"""The end of a work item in the decode kernel: combine, normalise, and store.

An item ends in one of three ways, which its `WorkItem.partial` says:

    -1          whole tile: store the output;
    0 or more   one of several items of a split tile: store a partial result, which the end of the
                launch or `merge` combines with the others;
    below -1    one of the two items of a split tile, whose result the CTA keeps and combines here:
                tiles of 128 rows: this cluster waits for the other item's partial and adds it,
                tiles of 64 rows: the two CTAs of a cluster exchange halves of O, and each stores
                its half of the columns.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.kernels.decode_refs import FIELD, Cta
from pallas_kernels.hopper.mosaic.cluster import combine_softmax
from pallas_kernels.hopper.mosaic.primitives import ROWS
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.mosaic.values import per_row
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.combine import BLOCK_COLUMNS, TileCounter, row_scales
from pallas_kernels.hopper.parts.normalize import divided, nan_if_invalid, natural_lse
from pallas_kernels.hopper.work_items import BLOCK, LOG2E, NO_KEY, WorkItem, kept_partial


class Target(NamedTuple):
    """Where the result of a work item goes."""

    request: Any
    row_tile: Any
    partial: Any  # as in `WorkItem`
    num_partials: Any
    tile_part: Any  # which 64 rows of the tile this CTA has
    row: Any  # the first of them
    kept: Any  # whether this CTA combines the tile's two items
    next_partial: Any  # in a cluster of two: the index of the other item's partial
    tile_counter: TileCounter  # counts that partial


@dataclasses.dataclass(frozen=True)
class Finish:
    """Finishes an item, for computing warpgroup `side`.

    q: this warpgroup's half of q, which is free now. current: `decode_compute.CurrentItem`.
    """

    cta: Cta
    side: int
    q: Any
    current: Any

    def run(self, m: jax.Array, total: jax.Array) -> None:
        """Writes the result of rows with these maxima (log2 units) and sums of P."""
        cta, g, descriptor = self.cta, self.cta.g, self.current.descriptor
        # What is read here holds no register during the loops over blocks.
        item = WorkItem.read(descriptor)
        kv_len = descriptor[FIELD.kv_len]
        tile_part = cta.part_of_tile()
        row = (item.row_tile * cta.ctas_per_tile + tile_part) * BLOCK
        # The loader writes this before the item's last block arrives.
        invalid = descriptor[FIELD.invalid] > 0
        total = self.sum_of_both(total)
        self.current.stamps.item(at.STORE)
        o = g.read(self.current.o_acc)
        if cta.inputs.requests.query_lens is not None:
            # The masks do not hide keys from the rows of padding tokens. Here they become rows that
            # see no key.
            token = (g.iota((BLOCK,), 0) + row) // cta.call.num_heads
            real = token < descriptor[FIELD.query_len]
            m, total = jnp.where(real, m, NO_KEY), jnp.where(real, total, 0.0)
            o = jnp.where(per_row(real, o.shape), o, 0.0)
        total += nan_if_invalid(kv_len, invalid)
        target = Target(
            request=item.request,
            row_tile=item.row_tile,
            partial=item.partial,
            num_partials=item.num_partials,
            tile_part=tile_part,
            row=row,
            kept=item.partial < -1,
            next_partial=kept_partial(item.partial) + 1,
            tile_counter=cta.counter_of(item.request, item.row_tile, 1),
        )
        self.combine_and_store(target, o, m, total)

    def combine_and_store(
        self, target: Target, o: jax.Array, m: jax.Array, total: jax.Array
    ) -> None:
        """Adds the tile's other item where this CTA combines both, normalises O and stores it."""
        cta, g = self.cta, self.cta.g

        def of_other_item():
            if cta.in_pairs:
                return self.exchange_stats(m, total)
            return self.stats_of_partial(target)

        def nothing():
            return tuple(g.full((BLOCK,), value, ROWS) for value in (NO_KEY, 0.0))

        other = lax.cond(target.kept, of_other_item, nothing)
        m, total, weight, others_weight = combine_softmax(m, total, *other)
        weight, others_weight = divided(weight, total), divided(others_weight, total)
        lse = natural_lse(m, total, log2_sum=True)

        def scaled():
            scale, inverse_scale = row_scales(jnp.abs(o).max(axis=1) * weight)
            self.partial_rows(target, target.partial, self.side).store_values(
                g, cta.partials.scales, scale
            )
            return weight * inverse_scale

        # The weight and, for a scaled partial, 1 / scale form one factor, so O is multiplied once.
        # In a pair of CTAs, the other CTA applies its own weight before it sends.
        factor = weight
        if cta.scaled_partials:
            factor = lax.cond(target.partial >= 0, scaled, lambda: weight)
        o *= per_row(factor, o.shape)
        if cta.in_pairs:
            # In a shared tile each CTA finishes the half of the columns that has its rank.
            sends = target.kept & (cta.rank != self.side)
            pl.when(sends)(lambda: self.send(o))

            @pl.when(~sends)
            def _store():
                whole = lax.cond(target.kept, lambda: o + self.received(), lambda: o)
                self.store(target, self.parts_of(whole), lse)
        else:
            parts = lax.cond(
                target.kept,
                lambda: self.with_partial(target, o, others_weight),
                lambda: self.parts_of(o),
            )
            self.store(target, parts, lse)
            if cta.call.combines:
                pl.when(target.kept)(target.tile_counter.count_combined)

    # -- both warpgroups, both CTAs, both items -------------------------------------------------
    def sum_of_both(self, total: jax.Array) -> jax.Array:
        """Adds the sums of both warpgroups, each over the blocks that it scored.

        Both are relative to the same maximum (`decode_compute.Running`).
        """
        cta, sums = self.cta, self.cta.scratch.row_sum
        sums.at[self.side][...] = total
        plgpu.commit_smem()
        plgpu.barrier_arrive(cta.scratch.sums_ready)
        plgpu.barrier_wait(cta.scratch.sums_ready)
        return cta.g.load_rows(sums.at[0]) + cta.g.load_rows(sums.at[1])

    def exchange_stats(self, m: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns maxima and sums of the other CTA's item of a shared tile.

        Each warpgroup sends one of the two. After the exchange, both CTAs have read q for the last
        time.
        """
        cta, other = self.cta, self.cta.other_cta
        places = (cta.scratch.others_max, cta.half), (cta.scratch.others_sum, cta.half + 1)
        other.send_rows(*places[self.side], (m, total)[self.side])
        other.arrive(cta.scratch.stats_sent)
        other.wait(cta.scratch.stats_sent)
        maxima, sums = (other.received_rows(*place) for place in places)
        return maxima, sums

    def stats_of_partial(self, target: Target) -> tuple[jax.Array, jax.Array]:
        """Returns maxima and sums of the tile's other item, from its partial result."""
        if self.cta.call.combines:
            target.tile_counter.wait()
        rows = pl.ds(target.tile_part * BLOCK, BLOCK)
        lse = self.cta.g.load_rows(self.cta.partials.lse.at[target.next_partial, rows])
        seen = lse != -jnp.inf
        return jnp.where(seen, lse * LOG2E, NO_KEY), jnp.where(seen, 1.0, 0.0)

    def send(self, o: jax.Array) -> None:
        """Sends this warpgroup's columns to the other CTA, where they take the place of q."""
        s = self.cta.scratch
        self.cta.other_cta.send_tile((s.q_left.at[0], s.q_right.at[0]), 0, o)
        self.cta.other_cta.arrive(s.o_sent)

    def received(self) -> jax.Array:
        """Returns the other CTA's part of this warpgroup's columns."""
        cta, s = self.cta, self.cta.scratch
        cta.other_cta.wait(s.o_sent)
        places = (s.q_left.at[0], s.q_right.at[0])
        o = cta.other_cta.received_tile(places, 0, (BLOCK, cta.half))
        plgpu.commit_smem()  # All warps have read it before any of it is overwritten.
        return o

    def with_partial(self, target: Target, o: jax.Array, weights: jax.Array) -> tuple:
        """Returns o and the other item's partial times its weights, in parts of 64 columns."""
        cta, g = self.cta, self.cta.g
        if cta.scaled_partials:
            rows = pl.ds(target.tile_part * BLOCK, BLOCK)
            scales = cta.partials.scales.at[target.next_partial, self.side, rows]
            weights = weights * g.load_rows(scales)
        spread = per_row(weights, (BLOCK, 64))
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
        pl.when(target.partial >= 0)(lambda: self.store_partial(target, parts, lse))

    def store_output(self, target: Target, parts: tuple, lse: jax.Array) -> None:
        cta, g = self.cta, self.cta.g
        rows = cta.rows_of(target.request, target.row_tile)
        parts = tuple(part.astype(cta.call.q.dtype) for part in parts)
        staging = self.q.at[self.current.opaque_zero(0)]
        rows.store_parts(g, cta.outputs.o, self.side * cta.half, parts, staging)
        if self.side == 0:
            rows.store_values(g, cta.outputs.lse, lse)

    def store_partial(self, target: Target, parts: tuple, lse: jax.Array) -> None:
        cta, g = self.cta, self.cta.g
        for i, part in enumerate(parts):
            part = part.astype(cta.call.partial_dtype)
            place = self.partial_part(target, target.partial, i)
            g.store_blocks(place, part, cta.call.num_rows - target.row)
        if self.side == 0:
            self.partial_rows(target, target.partial).store_values(g, cta.partials.lse, lse)
        if cta.call.combines:
            cta.counter_of(target.request, target.row_tile, target.num_partials).count_partial()

    def partial_part(self, target: Target, partial: Any, i: int) -> Any:
        """Returns where part i of this warpgroup's columns is in a partial result."""
        zero = self.current.opaque_zero(0)  # Without it, pointers would be held in registers.
        first = zero + (self.side * self.cta.half + i * 64) // BLOCK_COLUMNS
        return self.cta.partials.o.at[
            partial, zero + target.tile_part, pl.ds(first, 64 // BLOCK_COLUMNS)
        ]

    def partial_rows(self, target: Target, *index: Any) -> Rows:
        """Returns this CTA's rows of a partial result."""
        return Rows.of_partial(index, target.tile_part * BLOCK, BLOCK)

    def parts_of(self, o: jax.Array) -> tuple:
        return tuple(o[:, c : c + 64] for c in range(0, self.cta.half, 64))
