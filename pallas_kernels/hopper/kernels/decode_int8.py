"""Paged absorbed MLA decode for Hopper over an int8 latent cache, 64 query rows a CTA.

Four warpgroups a CTA, each with a part of its own: two make O, each half of its columns; one makes
P, a block or more ahead of them; one loads. So the tensor cores have PV of one block to do while
softmax of the next is computed. (The seesaw of `decode` has no such overlap here: V^T comes from
registers, where the warpgroup that multiplies by it has to widen it, and can do nothing else.)

S^T = K [high; low]^T has a token a row, and the two halves of q in one product of 128 columns: it
reads a quarter less of shared memory than one of 64 for each half. O^T = V^T P^T takes V^T from
registers: each warpgroup widens its half of the dimensions on their way to wgmma (`widen`), so
nothing is widened twice and nothing goes back to shared memory.

    S = ((128 * high + low) * k_scale[token] + rope) * q_step[query]
    P = e^(s - m) * k_scale[token], bfloat16

What makes P is one chain, S of a block, its softmax, S of the next, and takes longest: who makes O
has V^T of a block's first tokens ready when P comes, and is done before P of the next one.

A query is a column of S^T and of O^T. Its sum stays in parts, one in each thread, to a piece's end.
Its maximum is that of the piece's first block: P of a later one may be as large as 2^64, which
bfloat16 holds as well as 1. Where a sum says that one may be larger, the piece is made again, with
care: each block raises the maxima, and O is rescaled to them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import quantize
from pallas_kernels.hopper.kernels.merge import Meeting, Place, Refs, merge_shares, row_parts
from pallas_kernels.hopper.mosaic.dequantize import (
    GROUP,
    INT8_OPERAND,
    WIDENED_UNIT,
    WideningBackend,
)
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS, ROWS, WGMMA_OPERAND
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.mosaic.transposed import COLUMNS, WARPS
from pallas_kernels.hopper.parts.call import DecodeCall
from pallas_kernels.hopper.parts.quantize_q import fetch_q
from pallas_kernels.hopper.work_items import (
    BLOCK,
    ITEM_FIELDS,
    LN2,
    LOG2E,
    NO_KEY,
    WorkItem,
    block_sources,
    fits,
    range_of,
    valid_lengths,
)

QUERIES = 64  # rows of a tile
WIDENED = 32  # tokens at a time: what registers allow
MERGED = 32  # registers of partial O in flight: likewise
FAR = 2.0**64  # a sum of e^(s - m) that asks for more care
# Of a record in shared memory, behind the plan's: lengths, the first slot, and
LOST = ITEM_FIELDS + 3  # its keys can't all be had, so its rows are NaN
LEFT = ITEM_FIELDS + 4  # how many pieces the worker has left, this one included
AGAIN = ITEM_FIELDS + 5  # what was made last must be made again, with care
NOWHERE = 2**31 - 1  # a slot for what is made again
MAKERS = 2  # warpgroups that make O, and merge
SCORES, LOADS = MAKERS, MAKERS + 1  # the others


# P^T, of which wgmma takes WIDENED tokens at a time: as many as a line has columns.
P_OPERAND = (
    plgpu.TilingTransform((8, WIDENED)),  # type: ignore[abstract]
    plgpu.SwizzleTransform(WIDENED * 2),  # type: ignore[abstract]
)


def decode_int8(call: DecodeCall) -> tuple[jax.Array, ...]:
    """Runs the plan; arguments and results as in `decode_transposed_int8`, q a multiple of 64 rows.

    tiles: `tuning.roles_int8_tiles`. Raises ValueError for other rows, or rope keys that are not 64
    wide.
    """
    q, requests, plan, tiles, interpret = (
        call.q,
        call.requests,
        call.plan,
        call.tiles,
        call.interpret,
    )
    pages, rope_pages, scales = call.cache
    block_tables, seq_lens, query_lens, walks, counters = requests
    o_ref, lse_ref = call.outputs
    num_heads, num_queries = call.num_heads, call.num_queries
    softmax_scale, causal, merges = call.softmax_scale, call.causal, call.combines
    partial_dtype = call.partial_dtype
    padded_rows = q.shape[1]
    latent = pages.shape[2]
    num_pages, page_size, rope = rope_pages.shape
    lengths = functools.partial(
        valid_lengths, capacity=block_tables.shape[1] * page_size, num_queries=num_queries
    )
    if padded_rows % QUERIES or rope != BLOCK:
        raise ValueError(
            f"q must have a multiple of {QUERIES} rows and rope_pages {BLOCK} columns, got "
            f"{q.shape} and {rope_pages.shape}"
        )
    half = latent // MAKERS
    groups = half // GROUP
    slots = tiles.slots("kv latent")
    dtype = q.dtype
    scale = softmax_scale * LOG2E
    g = WideningBackend(interpreting=interpret is not None)
    num_partials = max(1, plan.num_partials)
    tile = (BLOCK, QUERIES)

    def body(
        q_ref,
        kv_ref,
        rope_ref,
        scale_ref,
        table_ref,
        len_ref,
        qlen_ref,
        walk_ref,
        piece_ref,
        counter_ref,
        o_ref,
        lse_ref,
        po_ref,
        plse_ref,
        q_smem,
        q_rope_smem,
        q_step_smem,
        keys_smem,
        kv_smem,
        rope_smem,
        p_smem,
        scale_smem,
        top_smem,
        meeting_smem,
        factor_smem,
        grew_smem,
        inverse_smem,
        end_smem,
        piece_smem,
        full,
        by_makers,
        by_one,
        *accumulators,
    ):
        if query_lens is None:
            qlen_ref = None  # (in its place stands another operand)
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        wg = lax.axis_index("wg")
        tokens = ((kv_ref, kv_smem), (rope_ref, rope_smem), (scale_ref, scale_smem))
        # Barriers of one count of arrivals share an array: its place and phases take registers.
        empty, p_ready = by_makers, by_one  # of the slots; behind these:

        def opaque(i):
            """0, but not for the compiler: what it is added to is computed where it is used, and
            holds no register before."""
            return i >> 30

        def inverse_empty(i):
            return by_makers.at[slots + opaque(i)]

        def piece_known(i):
            return by_one.at[slots + opaque(i)]

        def piece_done(i):
            return by_one.at[slots + 1 + opaque(i)]

        def inverse_full(i):
            return by_one.at[slots + 2 + opaque(i)]

        def q_fetched(i):
            return by_one.at[slots + 3 + opaque(i)]

        def across(rows):
            return lax.broadcast_in_dim(rows, tile, [0])

        def down(columns, shape=tile):
            return lax.broadcast_in_dim(columns, shape, [1])

        def after(slot):
            """The next slot. (Cheaper than a remainder for each block.)"""
            return jnp.where(slot == slots - 1, 0, slot + 1)

        def my_walk():  # (What is read where it is used holds no register.)
            return walk_ref.at[lax.axis_index("worker")]

        def pieces() -> tuple[Any, Any]:
            """The worker's, from and to."""
            return range_of(my_walk())

        def meet(request, row_tile, count):
            """A piece's O comes from two warpgroups, its lse from a third."""
            counter = plan.tile_of(request, row_tile)
            return Meeting(g, counter_ref, counter, (MAKERS + 1) * count, MAKERS * count)

        def rows_of(request, row_tile):
            """A tile's rows in the output."""
            total = num_queries * num_heads
            return Rows.of_tile(
                request, row_tile * QUERIES, QUERIES, total=total, rows_per_tile=QUERIES
            )

        def left_rows(slot):
            return Rows.of_partial((slot,), 0, QUERIES)

        # -------------------------------------------------------------------- who loads
        def with_lengths(piece):
            return (*piece, *lengths(len_ref, qlen_ref, jnp.maximum(piece[0], 0)))

        def record_of(p):
            known = piece_ref.at[jnp.minimum(p, piece_ref.shape[0] - 1)]
            return with_lengths([known[i] for i in range(ITEM_FIELDS)])

        def load_piece(carry):
            p, left, slot, *piece, kv_len, query_len = carry
            request, _, begin, end, *_ = piece
            lost = (~fits(WorkItem(*piece), kv_len)).astype(jnp.int32)
            plgpu.commit_smem()  # all its warps have read what was left
            for i, value in enumerate((*piece, kv_len, query_len, slot, lost, left)):
                piece_smem[i] = value
            plgpu.barrier_arrive(piece_known(begin))

            def block(i, slot):
                ((page, mine, _),), exists = block_sources(
                    table_ref, request, begin + i, kv_len, page_size, num_pages
                )

                @pl.when(~exists)
                def _lost():
                    plgpu.commit_smem()  # each warp has written its 0 before
                    piece_smem[LOST] = 1

                plgpu.barrier_wait(empty.at[slot])
                for source, target in tokens:
                    plgpu.copy_gmem_to_smem(source.at[page, mine], target.at[slot], full.at[slot])
                # q's loads would queue behind more keys: a piece's second block waits for q.
                pl.when(i == 0)(lambda: plgpu.barrier_wait(q_fetched(slot)))
                return after(slot)

            slot = lax.fori_loop(0, end - begin, block, slot)
            pl.when(end == begin)(lambda: plgpu.barrier_wait(q_fetched(slot)))
            # (Beside the blocks there is no register for what follows.)
            following = record_of(p + 1)
            plgpu.barrier_wait(piece_done(p))
            again = piece_smem[AGAIN]
            following = lax.cond(
                again > 0, lambda *_: record_of(p), lambda *known: known, *following
            )
            return (p + 1 - again, piece_smem[LEFT] - 1 + again, slot, *following)

        def load():
            g.take_registers(tiles.registers, LOADS)
            head = with_lengths([my_walk()[i] for i in range(ITEM_FIELDS)])
            first, stop = pieces()
            carry = (first, stop - first, jnp.int32(0), *head)
            lax.while_loop(lambda carry: carry[1] > 0, load_piece, carry)
            # See every release, so that no barrier ends with a phase that nobody saw.
            for slot in range(slots):
                plgpu.barrier_wait(empty.at[slot])

        # -------------------------------------------------------------------- who makes P
        def fetch_piece(left):
            plgpu.barrier_wait(piece_known(left))
            request, row_tile = piece_smem[0], piece_smem[1]
            into = q_smem, q_rope_smem, q_step_smem
            fetch_q(g, q_ref, (request, row_tile * QUERIES), into, 0, QUERIES, unit=scale)
            row_tile, kv_len, query_len = (piece_smem[i] for i in (1, ITEM_FIELDS, ITEM_FIELDS + 1))
            token = (g.iota_line(QUERIES, COLUMNS) + row_tile * QUERIES) // num_heads
            keys = kv_len - query_len + token + 1 if causal else kv_len
            keys_smem.at[0][...] = jnp.where(token < query_len, keys, 0)
            for i, value in enumerate((0.0, 1.0)):  # (for the first block to raise)
                top_smem.at[i][...] = g.full((QUERIES,), value, COLUMNS)
            plgpu.commit_smem()
            plgpu.barrier_arrive(q_fetched(row_tile))

        def make_p():
            # (What is read where it is used holds no register around the loops.)
            begin, end = piece_smem[2], piece_smem[3]

            def seen_whole():
                """Blocks up to here are seen whole by every row of the tile, and need no mask."""
                row, kv_len, query_len = (piece_smem[i] for i in (1, ITEM_FIELDS, ITEM_FIELDS + 1))
                row *= QUERIES
                shortest = kv_len
                if causal:
                    shortest = kv_len - query_len + row // num_heads + 1
                last_query = jnp.minimum((row + QUERIES - 1) // num_heads, num_queries - 1)
                ragged = last_query >= query_len
                return jnp.clip(jnp.where(ragged, 0, shortest) // BLOCK, begin, end)

            def scores(slot, zero):
                """S^T of a block, left in flight: the parts of its halves of q, and of its rope."""
                plgpu.barrier_wait(full.at[slot])
                halves = g.product_t(kv_smem.at[slot], q_smem.at[zero], jnp.int32)
                return halves, g.product_t(rope_smem.at[slot], q_rope_smem.at[zero], jnp.float32)

            def landed(products):
                g.wait_mma(0)
                return tuple(map(g.landed, products))

            def block(last, i, carry):
                """P of a block whose S is there, and then S of the next one."""
                norm, slot, (s_halves, s_rope) = carry
                zero, following = opaque(i), after(slot)
                token_scale = g.load_rows(scale_smem.at[slot])
                s = g.joined_halves(s_halves, quantize.HALF) * across(token_scale) + s_rope
                steps, top = (g.load_columns(ref.at[zero]) for ref in (q_step_smem, top_smem))
                above = s * down(steps) - down(top)  # the running maxima, in log2 units

                def hide(above, token_scale):
                    """(Chosen, not multiplied: what a row may not see may be NaN. The scale of such
                    a token becomes 0, and scores of the rows that see it stay NaN.)"""
                    position = g.iota_line(BLOCK, ROWS) + i * BLOCK
                    visible = across(position) < down(g.load_columns(keys_smem.at[zero]))
                    finite = jnp.abs(token_scale) < jnp.inf
                    usable = finite & (position < piece_smem[ITEM_FIELDS])
                    return jnp.where(visible, above, -jnp.inf), jnp.where(usable, token_scale, 0.0)

                both = above, token_scale
                above, token_scale = lax.cond(i >= unmasked, hide, lambda *both: both, *both)
                grew = (i == begin) | careful

                def rise(above, norm):
                    """Maxima by what the block has above them.

                    A row's first finite score sets its maximum, whichever block has it. Without
                    care that is the first block or none: then NO_KEY makes a later sum infinite.
                    """
                    top, unseen = (g.load_columns(top_smem.at[zero + n]) for n in range(2))
                    most = g.reduce_rows(above, meeting_smem, "max")
                    none = most == -jnp.inf
                    set_to = jnp.where(none, jnp.where(careful, 0.0, NO_KEY), most)
                    rises = jnp.where(unseen > 0.0, set_to, jnp.maximum(most, 0.0))
                    factor = jnp.exp2(jnp.minimum(-rises, 0.0))  # (O and norm are 0 at first)
                    top_smem.at[zero][...] = top + rises
                    top_smem.at[zero + 1][...] = jnp.where(none, unseen, 0.0)
                    factor_smem.at[slot][...] = factor
                    return above - down(rises), norm * factor

                above, norm = lax.cond(grew, rise, lambda *both: both, above, norm)
                p = jnp.exp2(above)
                norm = norm + g.column_parts(p, "add")
                grew_smem[slot] = grew.astype(jnp.int32)
                p_smem.at[slot][...] = (p * across(token_scale)).astype(dtype)
                started = () if last else scores(following, zero)
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_ready.at[slot])
                return norm, following, landed(started)

            first_slot = piece_smem[ITEM_FIELDS + 2]
            unmasked = seen_whole()
            careful = piece_smem[AGAIN] > 0
            no_sum = g.full((QUERIES,), 0.0, COLUMNS)

            def all_blocks(_, norm):
                carry = norm, first_slot, landed(scores(first_slot, opaque(end)))
                carry = lax.fori_loop(begin, end - 1, functools.partial(block, False), carry)
                norm, *_ = block(True, piece_smem[3] - 1, carry)
                return norm

            norm = lax.fori_loop(0, jnp.minimum(end - begin, 1), all_blocks, no_sum)
            request, row_tile, *_, out_slot, _, slots_of_tile = (
                piece_smem[i] for i in range(ITEM_FIELDS)
            )
            total = g.over_rows(norm, meeting_smem, "add")
            top = g.load_columns(top_smem.at[opaque(end)])
            again = (g.any_above(total, FAR, COLUMNS) & ~careful).astype(jnp.int32)
            piece_smem[AGAIN] = again
            out_slot = jnp.where(again > 0, NOWHERE, out_slot)
            left = piece_smem[LEFT] - 1 + again
            lost = piece_smem[LOST] > 0  # written before the barrier of the last block
            blank = jnp.where((piece_smem[ITEM_FIELDS] < 0) | lost, jnp.nan, 0.0)
            plgpu.barrier_arrive(piece_done(request))

            plgpu.barrier_wait(inverse_empty(request))
            inverse = jnp.where(total != 0.0, (1.0 / WIDENED_UNIT) / total, 0.0)
            inverse_smem.at[opaque(request)][...] = inverse + blank
            for i, value in enumerate((request, row_tile, out_slot, slots_of_tile)):
                end_smem[i] = value
            plgpu.commit_smem()
            plgpu.barrier_arrive(inverse_full(request))
            lse = jnp.where(total != 0.0, top * LN2 + jnp.log(total), -jnp.inf) + blank

            @pl.when(out_slot < 0)
            def _store():
                rows_of(request, row_tile).store_column_values(g, lse_ref, lse)

            @pl.when((out_slot >= 0) & (out_slot < NOWHERE))
            def _leave():
                left_rows(out_slot).store_column_values(g, plse_ref, lse)
                if merges:
                    meet(request, row_tile, slots_of_tile).leave()

            return left

        def score():
            g.take_registers(tiles.registers, SCORES)
            piece_smem[AGAIN] = 0

            def run(left):
                fetch_piece(left)
                return make_p()

            first, stop = pieces()
            # (How many are left comes with each piece, and holds no register while it is run.)
            none_left = lax.while_loop(lambda left: left > 0, run, stop - first)
            plgpu.barrier_wait(inverse_empty(none_left))

        # -------------------------------------------------------------------- who makes O
        def blocks_of(piece):
            return piece[3] - piece[2]

        def make_o(me, p, first_slot, num_blocks, o_acc):
            def block(i, slot):
                plgpu.barrier_wait(full.at[slot])
                mine = {"first_group": me * groups, "tokens": WIDENED}
                begun = g.begin_widening(kv_smem.at[slot], **mine)
                plgpu.barrier_wait(p_ready.at[slot])

                @pl.when(grew_smem[slot] > 0)
                def _rescale():
                    g.scale_columns(o_acc, g.load_columns(factor_smem.at[slot]))

                g.mma_widened((o_acc,), kv_smem.at[slot], p_smem.at[slot], begun, **mine)
                g.wait_mma(0)
                plgpu.barrier_arrive(empty.at[slot])
                return after(slot)

            g.zero(o_acc)
            slot = lax.fori_loop(0, num_blocks, block, first_slot)
            plgpu.barrier_wait(inverse_full(num_blocks))
            request, row_tile, out_slot, slots_of_tile = (end_smem[i] for i in range(4))
            following = p + jnp.where(out_slot == NOWHERE, 0, 1)
            next_blocks = blocks_of(piece_ref.at[jnp.minimum(following, piece_ref.shape[0] - 1)])
            inverse = g.load_columns(inverse_smem.at[0])
            o = g.read(o_acc) * down(inverse, (half, QUERIES))
            plgpu.barrier_arrive(inverse_empty(next_blocks))

            @pl.when(out_slot < 0)
            def _store():
                rows = rows_of(request, row_tile)
                rows.store_dimensions(g, o_ref, o.astype(dtype), me * groups)

            @pl.when((out_slot >= 0) & (out_slot < NOWHERE))
            def _leave():
                rows = left_rows(out_slot)
                rows.store_dimensions(g, po_ref, o.astype(partial_dtype), me * groups)
                if merges:
                    meet(request, row_tile, slots_of_tile).leave()

            return following, slot, next_blocks

        def make():
            g.take_registers(tiles.registers, 0)
            for slot in range(slots):
                plgpu.barrier_arrive(empty.at[slot])  # every slot starts free
            plgpu.barrier_arrive(inverse_empty(0))

            def mine(me):
                def piece(carry):
                    p, slot, num_blocks = carry
                    this_o = functools.partial(make_o, me, p, slot, num_blocks)
                    return g.with_accumulators(this_o, accumulators, me, (half, QUERIES))

                first, _ = pieces()
                carry = first, jnp.int32(0), blocks_of(my_walk())
                # (What stops it is read again: beside O^T there is no register for it.)
                lax.while_loop(lambda carry: carry[0] < pieces()[1], piece, carry)
                return jnp.int32(me)

            me = lax.switch(wg, [functools.partial(mine, me) for me in range(MAKERS)])
            if merges:
                merge_shares(
                    row_parts(g, plan, QUERIES, latent, MAKERS, in_flight=MERGED),
                    Refs(po_ref, plse_ref, o_ref, lse_ref),
                    piece_ref,
                    pieces(),
                    meet=meet,
                    place=lambda request, row_tile: Place(rows_of(request, row_tile), 0),
                    wg=me,
                    wgs=MAKERS,
                )

        # (Switches: what one branch needs isn't held through another.)
        lax.switch(jnp.maximum(wg - (MAKERS - 1), 0), [make, score, load])

    def wide(*shape):
        return plgpu.SMEM(shape, dtype, transforms=WGMMA_OPERAND)

    def narrow(*shape):
        return plgpu.SMEM(shape, jnp.int8, transforms=INT8_OPERAND)

    def floats(*shape):
        return plgpu.SMEM(shape, jnp.float32)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((num_partials, QUERIES, latent), partial_dtype),
            jax.ShapeDtypeStruct((num_partials, QUERIES), jnp.float32),
        ),
        scratch_types=(
            narrow(1, 2 * QUERIES, latent),  # high, then low
            wide(1, QUERIES, rope),
            floats(1, QUERIES),
            plgpu.SMEM((1, QUERIES), jnp.int32),  # keys that each query sees
            narrow(slots, BLOCK, latent),
            wide(slots, BLOCK, rope),
            plgpu.SMEM((slots, BLOCK, QUERIES), dtype, transforms=P_OPERAND),  # P^T
            floats(slots, BLOCK),
            floats(2, QUERIES),  # maxima, and 1 where no score has set one
            floats(WARPS, QUERIES),
            floats(slots, QUERIES),  # factors
            plgpu.SMEM((slots,), jnp.int32),  # whether any is not 1
            floats(1, QUERIES),  # 1 / row sum, and
            plgpu.SMEM((4,), jnp.int32),  # where the piece's O belongs
            plgpu.SMEM((AGAIN + 1,), jnp.int32),
            plgpu.Barrier(num_arrivals=3, num_barriers=slots),  # full
            plgpu.Barrier(num_arrivals=MAKERS, num_barriers=slots + 1),
            plgpu.Barrier(num_arrivals=1, num_barriers=slots + 4),
            *g.accumulator_scratch(MAKERS, (half, QUERIES)),
        ),
        grid=(plan.num_workers,),
        grid_names=("worker",),
        num_threads=MAKERS + 2,
        thread_name="wg",
        interpret=interpret,
        kernel_name="mla_decode_int8",
        compiler_params=OWN_BARRIERS,
    )
    given = seq_lens if query_lens is None else query_lens
    return kernel(
        q,
        pages,
        rope_pages,
        scales,
        block_tables,
        seq_lens,
        given,
        *walks,
        counters,
        o_ref,
        lse_ref,
    )
