"""Merges the partial (o, lse) of tiles that the plan has cut; tiles left whole cost nothing.

It happens at the end of the decode launch. A worker leaves its pieces in memory, counts up the
tile's counter, waits until all pieces of the tile are there, and merges its share of the tile's
parts. Nobody waits before its own pieces are done, so it is enough that the workers are resident
together, as those of a persistent kernel are.

`merge` is a launch of its own: for plans with more workers than the GPU has SMs, and for the
interpreter, which has no atomics.

A part depends on how the decode kernel leaves a piece: `decode_transposed` as rows, `decode` as
blocks of 64 rows x 8 columns in the order of its registers; as float16 in units (`units`), a power
of two for each row and half of the columns: none is too large, and of what lies more than 2^28
below the largest of them bits are lost.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.splits.planner import SplitPlan
from pallas_kernels.hopper.mosaic.primitives import ROWS, Backend
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.work_items import BLOCK, FIRST_PARTIAL, NO_KEY, NUM_PARTIALS, range_of

LOADS_IN_FLIGHT = 64  # registers a thread
MANY = 16  # pieces
BLOCK_COLUMNS = 8
HALF_TOP = 14  # log2 of a unit's multiple that a row's largest float16 is: it ends at 16


class Refs(NamedTuple):
    """What a merge reads and writes."""

    partial_o: Any  # rows [slots, rows, d_v], or blocks [slots, ctas, d_v / 8, 512]
    partial_lse: Any  # [slots, rows]
    o: Any  # [B, R, d_v]
    lse: Any  # [B, R]
    partial_units: Any = None  # [slots, 2, rows]: what 1 counts in each half of the columns


class Place(NamedTuple):
    """Where a CTA's part of a tile goes in the output."""

    rows: Rows
    cta: Any  # which of the CTAs that share the tile


class Merged(NamedTuple):
    """The merge of some pieces: the sum of their weights relative to e^m, and of o times them."""

    m: Any
    total: Any
    o: Any


class Lane(NamedTuple):
    """A part of a tile with one weight, or one weight a row, for each piece."""

    lse: Callable[[Any], Any]  # slot -> natural log
    o: Callable[[Any], Any]  # slot -> float32
    unit: Callable[[Any], Any]  # slot -> what 1 of it counts, beside its lse
    spread: Callable[[Any], Any]  # a value for each lse -> one for each o
    nothing: Merged
    write: Callable[[Any, Any], None]  # (lse, o)


class Parts(NamedTuple):
    """How a tile is parted."""

    number: int
    pieces_at_once: int
    lanes: Callable[[Refs, Place, Any], list[Lane]]  # of the part of that index


class Ways(NamedTuple):
    """How tiles of up to `most` pieces are parted, and how others."""

    few: Parts
    most: int
    many: Parts


def _pieces_of_a_tile(plan: SplitPlan) -> int:
    """On average, as the shape of the plan has it."""
    return max(1, round(plan.num_workers / plan.num_tiles))


def _ways(plan: SplitPlan, part: Callable[[int, int], Parts]) -> Ways:
    """For about as many pieces as tiles have on average, and for one long request among short ones,
    which many more workers share: part(pieces, pieces at once).

    How many pieces are added up at once decides how sums are rounded: for a fixed plan the batch
    has no say in it.
    """
    usual = _pieces_of_a_tile(plan)
    if plan.fixed:
        return Ways(part(usual, 2), MANY // 2, part(plan.num_workers, MANY))
    many = part(max(plan.num_workers, usual), max(MANY, usual))
    return Ways(part(usual, max(2, usual)), max(MANY // 2, 2 * usual), many)


def _in_even_turns(pieces: int, most: int) -> int:
    """How many pieces to add up at once, up to `most`, so that no turn of them is nearly empty."""
    turns = -(-pieces // most)
    return -(-pieces // turns)


def row_parts(
    g: Backend,
    plan: SplitPlan,
    rows: int,
    width: int,
    warpgroups: int,
    in_flight: int | None = None,
) -> Ways:
    """A few rows, or where a tile has more pieces than rows, some columns of one.

    in_flight: registers of loads in a kernel that has few. Then there are more turns, even ones.
    (Turns of LOADS_IN_FLIGHT were a little slower when even: benchmarks/history.md.)
    """
    return _ways(plan, functools.partial(_row_parts, g, rows, width, warpgroups, in_flight))


def _row_parts(
    g: Backend,
    rows: int,
    width: int,
    warpgroups: int,
    in_flight: int | None,
    pieces: int,
    at_once: int,
) -> Parts:
    share = rows * width // (pieces * warpgroups)  # values a warpgroup
    columns = next(c for c in (512, 256, 128) if (share >= c or c == 128) and width % c == 0)
    group = min(max(1, share // columns), 4, rows)
    across = width // columns
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // 128)

    def lanes(refs: Refs, place: Place, part: Any) -> list[Lane]:
        real_rows = jnp.minimum(rows, place.rows.count)
        top, index = (part // across) * group, part % across
        column = pl.ds(index * columns, columns)

        def lane(i: int) -> Lane:
            row = jnp.minimum(top + i, real_rows - 1)  # the last one again, and not written
            output = place.rows.row(row)

            def o(slot):
                value = g.load_strided(refs.partial_o.at[slot, row, column], layout)
                return value.astype(jnp.float32)

            def write(lse, o):
                @pl.when(top + i < real_rows)
                def _write_row():
                    output.store_strided(refs.o, o.astype(refs.o.dtype), column)
                    pl.when(index == 0)(lambda: output.store_scalar(refs.lse, lse))

            zeros = g.full((columns,), 0.0, layout)
            return Lane(
                lse=lambda slot: refs.partial_lse[slot, row],
                o=o,
                unit=lambda slot: 1.0,
                spread=lambda weight: weight,
                nothing=Merged(jnp.float32(NO_KEY), jnp.float32(0), zeros),
                write=write,
            )

        return [lane(i) for i in range(group)]

    count = -(-rows // group) * across
    registers = group * columns // 128  # of a piece
    if in_flight is None:
        at_once = min(at_once, LOADS_IN_FLIGHT // registers)
    else:
        at_once = _in_even_turns(at_once, in_flight // registers)
    return Parts(count, at_once, lanes)


def block_parts(g: Backend, plan: SplitPlan, width: int, warpgroups: int) -> Ways:
    """Some columns of all 64 rows."""
    return _ways(plan, functools.partial(_block_parts, g, width, warpgroups))


def _block_parts(g: Backend, width: int, warpgroups: int, pieces: int, at_once: int) -> Parts:
    share = width // (pieces * warpgroups)  # columns a warpgroup
    columns = 64 if share >= 64 else 32 if share >= 32 else 16 if share >= 16 else BLOCK_COLUMNS

    def lanes(refs: Refs, place: Place, part: Any) -> list[Lane]:
        column = part * columns

        def write(lse, o):
            place.rows.store_tile(g, refs.o, o.astype(refs.o.dtype), column)
            pl.when(part == 0)(lambda: place.rows.store_values(g, refs.lse, lse))

        def o(slot):
            blocks = pl.ds(column // BLOCK_COLUMNS, columns // BLOCK_COLUMNS)
            return g.load_blocks(refs.partial_o.at[slot, place.cta, blocks]).astype(jnp.float32)

        def unit(slot):
            if refs.partial_units is None:
                return 1.0
            return g.load_rows(refs.partial_units.at[slot, 2 * column // width, partial_rows])

        partial_rows = pl.ds(place.cta * BLOCK, BLOCK)
        empty_rows = g.full((BLOCK,), NO_KEY, ROWS), g.full((BLOCK,), 0.0, ROWS)
        lane = Lane(
            lse=lambda slot: g.load_rows(refs.partial_lse.at[slot, partial_rows]),
            o=o,
            unit=unit,
            spread=lambda weights: lax.broadcast_in_dim(weights, (BLOCK, columns), [0]),
            nothing=Merged(*empty_rows, g.full((BLOCK, columns), 0.0, plgpu.Layout.WGMMA)),
            write=write,
        )
        return [lane]

    return Parts(width // columns, min(at_once, LOADS_IN_FLIGHT // (columns // 2)), lanes)


def _merge_slots(lanes: list[Lane], first: Any, count: Any, at_once: int) -> None:
    """Writes the merge of slots first .. first + count, taken in this order."""

    def chunk(c, states):
        loaded: list[tuple[list, list, list]] = [([], [], []) for _ in lanes]
        for lane, (lses, units, values) in zip(lanes, loaded, strict=True):
            for k in range(at_once):
                piece = c * at_once + k
                slot = first + jnp.minimum(piece, count - 1)
                lses.append(lane.lse(slot) + jnp.where(piece < count, 0.0, -jnp.inf))
                units.append(lane.unit(slot))
                values.append(lane.o(slot))
        return tuple(
            add(lane, state, *pieces)
            for lane, state, pieces in zip(lanes, states, loaded, strict=True)
        )

    def add(lane, state, lses, units, values):
        top = functools.reduce(jnp.maximum, lses, state.m)
        old = jnp.exp(state.m - top)
        total, o = state.total * old, state.o * lane.spread(old)
        for lse, unit, value in zip(lses, units, values, strict=True):
            weight = jnp.exp(lse - top)
            total, o = total + weight, o + value * lane.spread(weight * unit)
        return Merged(top, total, o)

    chunks = (count + at_once - 1) // at_once
    states = lax.fori_loop(0, chunks, chunk, tuple(lane.nothing for lane in lanes))
    for lane, (m, total, o) in zip(lanes, states, strict=True):
        unseen = total == 0.0
        inverse = jnp.where(unseen, 0.0, 1.0 / total)
        lane.write(jnp.where(unseen, -jnp.inf, m + jnp.log(total)), o * lane.spread(inverse))


def _merge_share(
    refs: Refs, place: Place, slots: tuple[Any, Any, Any], wg: Any, wgs: int, parts: Parts
) -> None:
    """What one of `wgs` warpgroups merges for one piece of a tile.

    slots: of this piece, the tile's first one, and how many there are.
    """
    slot, first, count = slots
    begin, stride = wg * count + slot - first, count * wgs

    def part(i, _):
        lanes = parts.lanes(refs, place, begin + i * stride)
        _merge_slots(lanes, first, count, parts.pieces_at_once)
        return ()

    lax.fori_loop(0, jnp.maximum(parts.number - begin + stride - 1, 0) // stride, part, ())


class Meeting(NamedTuple):
    """Where the workers of a cut tile find that its pieces are there.

    A counter for each tile, and for each CTA of those that share it, counts the warpgroups that
    have left a piece, then those that have merged; the last one takes it back to 0.
    """

    g: Backend
    counters: Any  # int32 ref
    counter: Any
    leaving: Any  # warpgroups that leave something
    merging: Any  # that merge

    def leave(self) -> None:
        """This warpgroup has written its part of a piece."""
        self.g.count_up(self.counters, self.counter, self.leaving + self.merging, publishes=True)

    def wait(self) -> None:
        """Until all of them have."""
        self.g.wait_for(self.counters, self.counter, self.leaving)

    def end(self) -> None:
        """This warpgroup has merged."""
        self.g.count_up(self.counters, self.counter, self.leaving + self.merging, publishes=False)


def merge_shares(
    ways: Ways, refs: Refs, piece_ref: Any, pieces: tuple[Any, Any],
    meet: Callable, place: Callable, wg: Any, wgs: int,
) -> None:  # fmt: skip
    """The end of a launch for one warpgroup of a worker, which merges its share of its tiles.

    Args:
        ways: to part a tile.
        piece_ref: records of `walk`; a tile of one slot is not merged here.
        pieces: the worker's, from and to.
        meet: (request, row tile, pieces of the tile) -> Meeting, or None if none is needed.
        place: (request, row tile) -> Place.
        wg, wgs: which warpgroup of how many.
    """

    def piece(p, _):
        request, row_tile, slot = (piece_ref[p, i] for i in (0, 1, 4))
        first, count = piece_ref[p, FIRST_PARTIAL], piece_ref[p, NUM_PARTIALS]

        @pl.when((slot >= 0) & (count > 1))
        def _cut():
            meeting = meet(request, row_tile, count)
            if meeting:
                meeting.wait()
            slots = slot, first, count
            share = functools.partial(_merge_share, refs, place(request, row_tile), slots, wg, wgs)
            if ways.few[:2] == ways.many[:2]:
                share(ways.many)
            else:
                pl.when(count <= ways.most)(functools.partial(share, ways.few))
                pl.when(count > ways.most)(functools.partial(share, ways.many))
            if meeting:
                meeting.end()

        return ()

    lax.fori_loop(*pieces, piece, ())


def units(largest: Any) -> tuple[Any, Any]:
    """For rows with these largest magnitudes (float32): the units to hold them as float16 in, and
    one over those. Powers of two, so that dividing by them loses nothing."""
    exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    exponent = jnp.minimum(jnp.maximum(exponent, HALF_TOP + 1), 254)

    def power(exponent):
        return lax.bitcast_convert_type(exponent << 23, jnp.float32)

    return power(exponent - HALF_TOP), power(254 + HALF_TOP - exponent)


def merge(
    o_ref: Any,
    lse_ref: Any,
    partials: tuple[Any, ...],
    plan: SplitPlan,
    walks: tuple[Any, Any],
    *,
    num_rows: int,
    interpret: Any = None,
) -> None:
    """Writes merged rows into o_ref [B, R, d_v] and lse_ref [B, R], in place.

    Args:
        num_rows: R, the rows of a request; an output may have more, which stay as they are.
        partials: as a decode kernel leaves them: o of any float dtype, lse, and units if it has.
        plan: whose slots these are.
        walks: the plan's `records`: what is kept there has been merged.
    """
    g = Backend(interpreting=interpret is not None)
    width, warpgroups = o_ref.shape[2], 4
    partial_o, partial_lse = partials[:2]
    in_blocks = partial_o.ndim == 4
    ctas = partial_o.shape[1] if in_blocks else 1
    rows = partial_lse.shape[1] // ctas
    if in_blocks:
        ways = block_parts(g, plan, width, warpgroups)
    else:
        ways = row_parts(g, plan, rows, width, warpgroups)

    def body(po_ref, plse_ref, *rest):
        *units_ref, walk_ref, piece_ref, o_ref, lse_ref = rest
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        worker, cta = lax.axis_index("worker"), lax.axis_index("cta")

        def place(request, row_tile):
            first = (row_tile * ctas + cta) * rows
            part = Rows.of_tile(
                request, first, rows, total=num_rows, rows_per_tile=plan.rows_per_tile
            )
            return Place(part, cta)

        merge_shares(
            ways,
            Refs(po_ref, plse_ref, o_ref, lse_ref, *units_ref),
            piece_ref,
            range_of(walk_ref.at[worker]),
            meet=lambda *_: None,
            place=place,
            wg=lax.axis_index("wg"),
            wgs=warpgroups,
        )

    ranges, items = walks
    plgpu.kernel(
        body,
        out_type=(),
        grid=(len(ranges), ctas),
        grid_names=("worker", "cta"),
        num_threads=warpgroups,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="mla_merge",
    )(*partials, ranges, items, o_ref, lse_ref)
