"""Combines the partial o and lse of tiles that the split plan has split.

A decode kernel does this at the end of its launch. A worker writes its partials to GMEM and counts
up the tile's counter. When the counter says that all partials of the tile are there, the worker
combines its share of the tile. No worker waits before its own partials are done. So it is enough
that all workers are resident at the same time, as those of a persistent kernel are. Tiles that are
not split cost nothing here.

The tile is divided into parts, and each warpgroup combines some of them. How it is divided depends
on how the decode kernel stores a partial:

    rows    `decode_transposed` and the int8 kernels store rows.
    blocks  `decode` stores blocks of 64 rows x 8 columns in the order of its registers. float16
            partials have one power-of-two scale per row and half of the columns. So no value
            overflows, and only values more than 2^28 below the largest of their row lose bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.splits.plan import SplitPlan
from pallas_kernels.hopper.mosaic.primitives import ROWS, Backend
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.work_items import (
    BLOCK,
    FIRST_PARTIAL,
    NO_KEY,
    NUM_PARTIALS,
    PARTIAL,
)

LOADS_IN_FLIGHT = 64  # registers per thread
MANY = 16  # partials per tile
BLOCK_COLUMNS = 8  # columns per block of a partial
LARGEST_LOG2 = 14  # of a row's largest float16 value, rounded down; float16 ends below 2^16


class CombineRefs(NamedTuple):
    """The arrays that combining reads and writes."""

    partial_o: Any  # rows [partials, rows, d_v], or blocks [partials, ctas, d_v / 8, 512]
    partial_lse: Any  # [partials, rows]
    o: Any  # [B, R, d_v]
    lse: Any  # [B, R]
    partial_scales: Any = None  # scales [partials, 2, rows] of both halves of the columns


class OutputRows(NamedTuple):
    """Where a CTA's part of a tile is in the output."""

    rows: Rows
    cta: Any  # which of the CTAs that share the tile


class TileCounter(NamedTuple):
    """Lets the workers of a split tile wait until all of its partials are there.

    There is one counter per tile and per CTA of those that share the tile. It counts the warpgroups
    that have written a partial, then those that have combined. The last one resets it to 0.
    """

    g: Backend
    counters: Any  # int32 ref
    counter: Any  # index
    writers: Any  # how many warpgroups write partials
    combiners: Any  # how many warpgroups combine

    def count_partial(self) -> None:
        """Signals that this warpgroup has written its part of a partial."""
        self.g.count_up(self.counters, self.counter, self.writers + self.combiners, publishes=True)

    def wait(self) -> None:
        """Waits until all warpgroups have written their parts."""
        self.g.wait_for(self.counters, self.counter, self.writers)

    def count_combined(self) -> None:
        """Signals that this warpgroup has combined its share."""
        self.g.count_up(self.counters, self.counter, self.writers + self.combiners, publishes=False)


class Sums(NamedTuple):
    """Sums over some partials of their weights and of weight * o, both relative to e^m."""

    m: Any
    total: Any
    o: Any


class Segment(NamedTuple):
    """Some columns of one row, or of 64 rows, of a tile."""

    lse: Callable[[Any], Any]  # partial -> natural log, one value or one per row
    o: Callable[[Any], Any]  # partial -> float32
    scale: Callable[[Any], Any]  # partial -> the scale of its o, in the shape of lse
    spread: Callable[[Any], Any]  # broadcasts from the shape of lse to that of o
    nothing: Sums  # of no partials
    write: Callable[[Any, Any], None]  # (lse, o) to the output


class Division(NamedTuple):
    """How a tile is divided into parts."""

    number: int  # of parts
    partials_at_once: int  # loaded before they are added
    segments: Callable[[CombineRefs, OutputRows, Any], list[Segment]]  # of the part with that index


class Divisions(NamedTuple):
    """How tiles of up to `most` partials are divided, and how tiles of more partials are."""

    usual: Division
    most: int
    many: Division


def _divisions(plan: SplitPlan, divide: Callable[[int, int], Division]) -> Divisions:
    """Returns a division for the usual number of partials per tile, and one for many partials.

    A long request among short ones has many partials, because many workers share it.

    How many partials are added at once decides how sums are rounded. For a fixed plan that must not
    depend on the batch.

    divide: (partials, partials at once) -> Division.
    """
    usual = max(1, round(plan.num_workers / plan.num_tiles))
    if plan.fixed:
        return Divisions(divide(usual, 2), MANY // 2, divide(plan.num_workers, MANY))
    many = divide(max(plan.num_workers, usual), max(MANY, usual))
    return Divisions(divide(usual, max(2, usual)), max(MANY // 2, 2 * usual), many)


def _in_even_rounds(partials: int, most: int) -> int:
    """Returns how many partials to add at once, up to `most`, so that no round is nearly empty."""
    rounds = -(-partials // most)
    return -(-partials // rounds)


def divide_into_rows(
    g: Backend,
    plan: SplitPlan,
    rows: int,
    width: int,
    warpgroups: int,
    in_flight: int | None = None,
) -> Divisions:
    """Divides a tile into groups of rows, or into columns of single rows.

    Columns are divided where a tile has more partials than rows.

    Args:
        g: the primitives.
        plan: the split plan.
        rows: rows per tile.
        width: columns, d_v.
        warpgroups: how many of a worker combine.
        in_flight: registers per thread for loads, in a kernel that has few. Then more rounds, of
            even sizes, add the partials. None: LOADS_IN_FLIGHT, with which even rounds were
            a little slower (benchmarks/history.md).
    """
    return _divisions(plan, functools.partial(_divide_rows, g, rows, width, warpgroups, in_flight))


def _divide_rows(
    g: Backend,
    rows: int,
    width: int,
    warpgroups: int,
    in_flight: int | None,
    partials: int,
    at_once: int,
) -> Division:
    share = rows * width // (partials * warpgroups)  # values per warpgroup
    columns = next(c for c in (512, 256, 128) if (share >= c or c == 128) and width % c == 0)
    group = min(max(1, share // columns), 4, rows)
    per_row = width // columns  # parts
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // 128)

    def segments(refs: CombineRefs, place: OutputRows, part: Any) -> list[Segment]:
        real_rows = jnp.minimum(rows, place.rows.count)
        first, index = (part // per_row) * group, part % per_row
        column = pl.ds(index * columns, columns)

        def segment(i: int) -> Segment:
            # Past the last row, the last row is computed again and not written.
            row = jnp.minimum(first + i, real_rows - 1)
            output = place.rows.row(row)

            def o(partial):
                value = g.load_strided(refs.partial_o.at[partial, row, column], layout)
                return value.astype(jnp.float32)

            def write(lse, o):
                @pl.when(first + i < real_rows)
                def _write_row():
                    output.store_strided(refs.o, o.astype(refs.o.dtype), column)
                    pl.when(index == 0)(lambda: output.store_scalar(refs.lse, lse))

            zeros = g.full((columns,), 0.0, layout)
            return Segment(
                lse=lambda partial: refs.partial_lse[partial, row],
                o=o,
                scale=lambda partial: 1.0,
                spread=lambda weight: weight,
                nothing=Sums(jnp.float32(NO_KEY), jnp.float32(0), zeros),
                write=write,
            )

        return [segment(i) for i in range(group)]

    count = -(-rows // group) * per_row
    registers = group * columns // 128  # per thread and partial
    if in_flight is None:
        at_once = min(at_once, LOADS_IN_FLIGHT // registers)
    else:
        at_once = _in_even_rounds(at_once, in_flight // registers)
    return Division(count, at_once, segments)


def divide_into_columns(g: Backend, plan: SplitPlan, width: int, warpgroups: int) -> Divisions:
    """Divides a tile of 64 rows into ranges of columns.

    The arguments are as in `divide_into_rows`.
    """
    return _divisions(plan, functools.partial(_divide_blocks, g, width, warpgroups))


def _divide_blocks(
    g: Backend, width: int, warpgroups: int, partials: int, at_once: int
) -> Division:
    share = width // (partials * warpgroups)  # columns per warpgroup
    columns = 64 if share >= 64 else 32 if share >= 32 else 16 if share >= 16 else BLOCK_COLUMNS

    def segments(refs: CombineRefs, place: OutputRows, part: Any) -> list[Segment]:
        column = part * columns

        def write(lse, o):
            place.rows.store_tile(g, refs.o, o.astype(refs.o.dtype), column)
            pl.when(part == 0)(lambda: place.rows.store_values(g, refs.lse, lse))

        def o(partial):
            blocks = pl.ds(column // BLOCK_COLUMNS, columns // BLOCK_COLUMNS)
            value = g.load_blocks(refs.partial_o.at[partial, place.cta, blocks])
            return value.astype(jnp.float32)

        def scale(partial):
            if refs.partial_scales is None:
                return 1.0
            return g.load_rows(refs.partial_scales.at[partial, 2 * column // width, partial_rows])

        partial_rows = pl.ds(place.cta * BLOCK, BLOCK)
        empty_rows = g.full((BLOCK,), NO_KEY, ROWS), g.full((BLOCK,), 0.0, ROWS)
        segment = Segment(
            lse=lambda partial: g.load_rows(refs.partial_lse.at[partial, partial_rows]),
            o=o,
            scale=scale,
            spread=lambda weights: lax.broadcast_in_dim(weights, (BLOCK, columns), [0]),
            nothing=Sums(*empty_rows, g.full((BLOCK, columns), 0.0, plgpu.Layout.WGMMA)),
            write=write,
        )
        return [segment]

    return Division(width // columns, min(at_once, LOADS_IN_FLIGHT // (columns // 2)), segments)


def _combine_part(segments: list[Segment], first: Any, count: Any, at_once: int) -> None:
    """Writes the combination of partials first .. first + count - 1, added in this order."""

    def add_chunk(c, states):
        loaded: list[tuple[list, list, list]] = [([], [], []) for _ in segments]
        for segment, (lses, scales, values) in zip(segments, loaded, strict=True):
            for k in range(at_once):
                index = c * at_once + k
                # Past the last partial, the last one is loaded again with weight 0.
                partial = first + jnp.minimum(index, count - 1)
                lses.append(segment.lse(partial) + jnp.where(index < count, 0.0, -jnp.inf))
                scales.append(segment.scale(partial))
                values.append(segment.o(partial))
        return tuple(
            add(segment, state, *partials)
            for segment, state, partials in zip(segments, states, loaded, strict=True)
        )

    def add(segment, state, lses, scales, values):
        m = functools.reduce(jnp.maximum, lses, state.m)
        old = jnp.exp(state.m - m)
        total, o = state.total * old, state.o * segment.spread(old)
        for lse, scale, value in zip(lses, scales, values, strict=True):
            weight = jnp.exp(lse - m)
            total, o = total + weight, o + value * segment.spread(weight * scale)
        return Sums(m, total, o)

    chunks = (count + at_once - 1) // at_once
    states = lax.fori_loop(0, chunks, add_chunk, tuple(segment.nothing for segment in segments))
    for segment, (m, total, o) in zip(segments, states, strict=True):
        unseen = total == 0.0  # no partial has a visible key
        inverse = jnp.where(unseen, 0.0, 1.0 / total)
        segment.write(jnp.where(unseen, -jnp.inf, m + jnp.log(total)), o * segment.spread(inverse))


def _combine_share(
    refs: CombineRefs,
    place: OutputRows,
    partials: tuple[Any, Any, Any],
    warpgroup: Any,
    warpgroups: int,
    division: Division,
) -> None:
    """Combines the parts of a tile that a warpgroup takes for one of the CTA's partials.

    partials: the worker's own, the tile's first one, and how many the tile has.
    """
    own, first, count = partials
    begin, stride = warpgroup * count + own - first, count * warpgroups

    def part(i, _):
        segments = division.segments(refs, place, begin + i * stride)
        _combine_part(segments, first, count, division.partials_at_once)
        return ()

    lax.fori_loop(0, jnp.maximum(division.number - begin + stride - 1, 0) // stride, part, ())


def combine_shares(
    divisions: Divisions,
    refs: CombineRefs,
    items_ref: Any,
    items: tuple[Any, Any],
    counter_of: Callable[[Any, Any, Any], TileCounter | None],
    place: Callable[[Any, Any], OutputRows],
    warpgroup: Any,
    warpgroups: int,
) -> None:
    """Combines, in one warpgroup of a worker, its share of each tile of which it has a partial.

    Args:
        divisions: how to divide a tile.
        refs: the arrays.
        items_ref: `WorkList.items`. A tile of one partial is not combined here.
        items: the worker's range of items, from and to.
        counter_of: (request, row tile, partials of the tile) -> TileCounter, or None where no
            warpgroup has to wait.
        place: (request, row tile) -> OutputRows.
        warpgroup: the index of this warpgroup among those that combine.
        warpgroups: how many of the worker's warpgroups combine.
    """

    def combine_item(i, _):
        request, row_tile, own = (items_ref[i, field] for field in (0, 1, PARTIAL))
        first, count = items_ref[i, FIRST_PARTIAL], items_ref[i, NUM_PARTIALS]

        @pl.when((own >= 0) & (count > 1))
        def _split():
            tile_counter = counter_of(request, row_tile, count)
            if tile_counter:
                tile_counter.wait()
            partials = own, first, count
            share = functools.partial(
                _combine_share, refs, place(request, row_tile), partials, warpgroup, warpgroups
            )
            if divisions.usual[:2] == divisions.many[:2]:
                share(divisions.many)
            else:
                pl.when(count <= divisions.most)(functools.partial(share, divisions.usual))
                pl.when(count > divisions.most)(functools.partial(share, divisions.many))
            if tile_counter:
                tile_counter.count_combined()

        return ()

    lax.fori_loop(*items, combine_item, ())


def row_scales(largest: Any) -> tuple[Any, Any]:
    """Returns power-of-two scales for rows of float16, and their inverses.

    Division by a power of two is exact.

    largest: the largest magnitude of each row, float32.
    """
    exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    exponent = jnp.minimum(jnp.maximum(exponent, LARGEST_LOG2 + 1), 254)

    def power(exponent):
        return lax.bitcast_convert_type(exponent << 23, jnp.float32)

    return power(exponent - LARGEST_LOG2), power(254 + LARGEST_LOG2 - exponent)
