"""Paged absorbed MLA decode for Hopper over an int8 latent cache, up to 32 query rows.

The int8 form of `decode_transposed`: S^T = K Q^T and O^T = V^T P^T, KV tokens or dimensions as
the rows of a wgmma tile and queries as its columns. Per block of 64 tokens (41 KB, which take about
2100 cycles of a memory-bound SM)

    S^T  int8 x int8 -> int32 for the latent part, bfloat16 for the rope part
    s    (int32 * k_scale[token] + rope) * q_step[row]
    P    e^(s - m) * k_scale[token] in bfloat16: V's scale is K's, and is folded in before rounding
    V^T  int8 -> bfloat16 exactly, in registers, on its way to wgmma (`widen`)

Shared memory would be the limit otherwise: a widened copy there costs 64 KB written and 64 KB read
a block, 1000 cycles of its bandwidth, where TMA, QK and the bytes of V already take 1000.

One or two warpgroups compute, one loads. Two take the blocks in turns, each with an O^T of its own,
and add them up at the end of a piece. The plan, and what becomes of its pieces, are `decode`'s.
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
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS, WGMMA_OPERAND
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.mosaic.transposed import COLUMNS, WARPS
from pallas_kernels.hopper.parts.call import DecodeCall
from pallas_kernels.hopper.parts.quantize_q import ROW_GROUP, fetch_q
from pallas_kernels.hopper.work_items import (
    BLOCK,
    LN2,
    LOG2E,
    NO_KEY,
    block_sources,
    fits,
    range_of,
    run_items,
    valid_lengths,
)

FLAGS = 2  # the loader is a piece ahead: whether the keys of a piece could all be had


def decode_transposed_int8(call: DecodeCall) -> tuple[jax.Array, ...]:
    """Runs the plan; the plan, results and options as in `decode`.

    Args:
        q: [B, R or more, d_v + rope] bfloat16, a multiple of tiles.rows_per_tile rows, of which
            R = num_queries * num_heads are real.
        pages: [N, page, d_v] int8.
        rope_pages: [N, page, rope] bfloat16.
        scales: [N, page] float32, one a token.

    Writes whole tiles to o_ref [B, R, d_v] and lse_ref [B, R]; returns the partial
    (o [slots, rows_per_tile, d_v], lse [slots, rows_per_tile]) of cut tiles.
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
    rows, depth = tiles.rows_per_tile, tiles.kv_stages
    computing = len(tiles.registers) - 1  # warpgroups
    uneven = len(set(tiles.registers)) > 1
    if padded_rows % rows:
        raise ValueError(
            f"q must have a multiple of {rows} rows (rows_per_tile), got {padded_rows}"
        )
    half = latent // 2
    groups = half // GROUP  # of wgmma rows in half of O^T
    dtype = q.dtype
    scale = softmax_scale * LOG2E
    g = WideningBackend(interpreting=interpret is not None)
    num_partials = max(1, plan.num_partials)
    sharing = computing if rows % (computing * ROW_GROUP) == 0 else 1  # warpgroups that fetch q
    share = rows // sharing
    tile = (BLOCK, rows)
    o_shapes = ((half, rows), (half, rows))

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
        kv_smem,
        rope_smem,
        scale_smem,
        p_smem,
        top_smem,
        sum_smem,
        handed_smem,
        state_smem,
        lost_smem,
        by_all,
        piece_known,
        piece_done,
        full,
        empty,
        *accumulators,
    ):
        if query_lens is None:
            qlen_ref = None  # (in its place stands another operand)
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        wg = lax.axis_index("wg")

        # Of all that compute, in one array: its place and phases take registers.
        handed, taken = by_all.at[1], by_all.at[2]

        def q_ready(request):
            return by_all.at[request >> 30]  # 0, but computed here, and in no register before

        def my_walk():  # (What is read where it is used holds no register.)
            return walk_ref.at[lax.axis_index("worker")]

        def pieces() -> tuple[Any, Any]:
            """The worker's, from and to."""
            return range_of(my_walk())

        def meet(request, row_tile, count):
            tile = plan.tile_of(request, row_tile)
            return Meeting(g, counter_ref, tile, computing * count, computing * count)

        def rows_of(request, row_tile):
            """A tile's rows in the output."""
            total = num_queries * num_heads
            return Rows.of_tile(request, row_tile * rows, rows, total=total, rows_per_tile=rows)

        def merge_mine(me):
            merge_shares(
                row_parts(g, plan, rows, latent, warpgroups=computing),
                Refs(po_ref, plse_ref, o_ref, lse_ref),
                piece_ref,
                pieces(),
                meet=meet,
                place=lambda request, row_tile: Place(rows_of(request, row_tile), 0),
                wg=me,
                wgs=computing,
            )

        # ---------------------------------------------------------------- the loading warpgroup
        tokens = ((kv_ref, kv_smem), (rope_ref, rope_smem), (scale_ref, scale_smem))

        def load_piece(p, n, piece):
            request, _, begin, end, *_ = piece
            flag = lax.rem(p, FLAGS)
            kv_len, _ = lengths(len_ref, qlen_ref, request)
            plgpu.barrier_wait(piece_done.at[flag])
            lost_smem[flag] = (~fits(piece, kv_len)).astype(jnp.int32)
            plgpu.barrier_arrive(piece_known.at[flag])

            def block(i, _):
                ((page, mine, _),), exists = block_sources(
                    table_ref, request, begin + i, kv_len, page_size, num_pages
                )

                @pl.when(~exists)
                def _lost():
                    plgpu.commit_smem()  # each warp has written its 0 before
                    lost_smem[flag] = 1

                slot = lax.rem(n + i, depth)
                plgpu.barrier_wait(empty.at[slot])
                for source, target in tokens:
                    plgpu.copy_gmem_to_smem(source.at[page, mine], target.at[slot], full.at[slot])
                return ()

            lax.fori_loop(0, end - begin, block, ())

        def load():
            if uneven:
                g.take_registers(tiles.registers, computing)
            run_items(pieces(), my_walk(), piece_ref, load_piece)
            # See every release, so that no barrier ends with a phase that nobody saw.
            for flag in range(FLAGS):
                plgpu.barrier_wait(piece_done.at[flag])
            for slot in range(depth):
                plgpu.barrier_wait(empty.at[slot])

        # ------------------------------------------------------------- the computing warpgroups
        def across(columns, shape=tile):
            return lax.broadcast_in_dim(columns, shape, [1])

        def fetch_mine(me, request, row):
            """This warpgroup's share of q. (All have done with that of the piece before.)"""
            if me < sharing:
                into, first = (q_smem, q_rope_smem, q_step_smem), me * share
                fetch_q(g, q_ref, (request, row + first), into, first, share, unit=scale)
            plgpu.commit_smem()
            plgpu.barrier_arrive(q_ready(request))
            plgpu.barrier_wait(q_ready(request))

        def attend(me, p, n, piece, o_left, o_right):
            request, row_tile, begin, end, out_slot, _, slots_of_tile = piece
            kv_len, query_len = lengths(len_ref, qlen_ref, request)
            p_mine = p_smem.at[me]
            token = (g.iota(tile, 1) + row_tile * rows) // num_heads
            limit = jnp.minimum(kv_len - query_len + token + 1, kv_len) if causal else kv_len
            limit = jnp.where(token < query_len, limit, 0)
            position = g.iota(tile, 0)
            # Slots go round over all pieces, and a slot is one warpgroup's for good.
            skip = lax.rem(me + n, 2) if computing == 2 else 0
            mine = (end - begin - skip + computing - 1) // computing

            def block(turn, carry):
                m, norm = carry
                i = computing * turn + skip
                slot = lax.rem(n + i, depth)
                zero = ((end - begin) >> 30) & i  # 0, but not for the compiler
                plgpu.barrier_wait(full.at[slot])
                keys = kv_smem.at[slot]
                products = (
                    g.product_t(keys, q_smem.at[zero], jnp.int32),
                    g.product_t(rope_smem.at[slot], q_rope_smem.at[zero], jnp.float32),
                )
                g.wait_mma(0)
                s_halves, s_rope = map(g.landed, products)
                token_scale = lax.broadcast_in_dim(g.load_rows(scale_smem.at[slot]), tile, [0])
                # What no row may see is NaN, perhaps: it is selected away, never multiplied.
                visible = position + (begin + i) * BLOCK < limit
                token_scale = jnp.where(visible, token_scale, 0.0)
                row_scale = across(g.load_columns(q_step_smem.at[zero]))
                s = g.joined_halves(s_halves, quantize.HALF) * token_scale + s_rope
                s = jnp.where(visible, s * row_scale, -jnp.inf)
                m_new = jnp.maximum(m, g.reduce_rows(s, top_smem.at[me], "max"))
                p = jnp.exp2(s - across(m_new))
                g.store_t(p_mine, (p * token_scale).astype(dtype))
                alpha = jnp.exp2(m - m_new)
                for o_half in (o_left, o_right):
                    g.scale_columns(o_half, alpha)
                norm = norm * across(alpha) + p
                plgpu.commit_smem()
                begun = g.begin_widening(keys)
                g.mma_widened((o_left, o_right), keys, p_mine.transpose((1, 0)), begun)
                plgpu.barrier_arrive(empty.at[slot])
                g.wait_mma(0)
                return m_new, norm

            g.zero(o_left)
            g.zero(o_right)
            none = (g.full((rows,), NO_KEY, COLUMNS), g.full(tile, 0.0, plgpu.Layout.WGMMA))
            m, norm = lax.fori_loop(0, mine, block, none)

            total = g.reduce_rows(norm, sum_smem.at[me], "add")
            plgpu.commit_smem()  # the next piece may write sum_smem
            halves = ((0, o_left), (1, o_right))

            def finish(m, total, halves):
                """halves: (which, its value) pairs. Normalises and stores them."""
                flag = lax.rem(p, FLAGS)
                plgpu.barrier_wait(piece_known.at[flag])
                lost = lost_smem[flag] > 0  # written before the barrier of the last block
                plgpu.barrier_arrive(piece_done.at[flag])
                blank = jnp.where((kv_len < 0) | lost, jnp.nan, 0.0)
                seen = total != 0.0
                inverse = jnp.where(seen, (1.0 / WIDENED_UNIT) / total, 0.0) + blank
                lse = jnp.where(seen, m * LN2 + jnp.log(total), -jnp.inf) + blank
                stored = [(which, o * across(inverse, (half, rows))) for which, o in halves]

                @pl.when(out_slot < 0)
                def _store():
                    here = rows_of(request, row_tile)
                    for which, o in stored:
                        here.store_dimensions(g, o_ref, o.astype(dtype), which * groups)
                    if me == 0:
                        here.store_column_values(g, lse_ref, lse)

                @pl.when(out_slot >= 0)
                def _leave():
                    left = Rows.of_partial((out_slot,), 0, rows)
                    for which, o in stored:
                        left.store_dimensions(g, po_ref, o.astype(partial_dtype), which * groups)
                    if me == 0:
                        left.store_column_values(g, plse_ref, lse)
                    if merges:
                        meet(request, row_tile, slots_of_tile).leave()

            if computing == 1:
                finish(m, total, [(which, g.read(o_half)) for which, o_half in halves])
                return
            # Warpgroup 0 finishes the left half, 1 the right.
            (_, kept), (_, sent) = halves if me == 0 else halves[::-1]
            plgpu.barrier_wait(taken)
            g.hand_over(handed_smem.at[me], g.read(sent))
            state_smem.at[me, 0][...] = m
            state_smem.at[me, 1][...] = total
            plgpu.barrier_arrive(handed)
            plgpu.barrier_wait(handed)
            other_m, other_total = (g.load_columns(state_smem.at[1 - me, i]) for i in range(2))
            other_o = g.take_over(handed_smem.at[1 - me])
            plgpu.barrier_arrive(taken)
            # Rounded alike whichever of the two has which blocks (batch invariance).
            top = jnp.maximum(m, other_m)
            factor = jnp.exp2(jnp.minimum(m, other_m) - top)

            def meet_at_top(mine, other, spread=lambda columns: columns):
                mine_is_top = spread(m) >= spread(other_m)
                higher = jnp.where(mine_is_top, mine, other)
                lower = jnp.where(mine_is_top, other, mine)
                return higher + lower * spread(factor)

            wide = functools.partial(across, shape=(half, rows))
            o = meet_at_top(g.read(kept), other_o, wide)
            finish(top, meet_at_top(total, other_total), [(me, o)])

        def compute(me):
            if uneven:
                g.take_registers(tiles.registers, me)
            for slot in range(me, depth, computing):
                plgpu.barrier_arrive(empty.at[slot])  # every slot starts free
            for flag in range(FLAGS):
                plgpu.barrier_arrive(piece_done.at[flag])
            if computing == 2:
                plgpu.barrier_arrive(taken)

            def run(p, n, piece):
                def scoped(*accs):
                    attend(me, p, n, piece, *accs)

                request, row_tile, *_ = piece
                fetch_mine(me, request, row_tile * rows)
                g.with_accumulators(scoped, accumulators, me, *o_shapes)

            run_items(pieces(), my_walk(), piece_ref, run)
            if computing == 2:
                plgpu.barrier_wait(taken)
            if merges:
                merge_mine(me)

        # (A switch: what one branch needs isn't held through another.)
        lax.switch(wg, [*(functools.partial(compute, me) for me in range(computing)), load])

    def wide(*shape):
        return plgpu.SMEM(shape, dtype, transforms=WGMMA_OPERAND)

    def narrow(*shape):
        return plgpu.SMEM(shape, jnp.int8, transforms=INT8_OPERAND)

    def floats(*shape):
        return plgpu.SMEM(shape, jnp.float32)

    handed_rows = rows if computing == 2 else 1
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((num_partials, rows, latent), partial_dtype),
            jax.ShapeDtypeStruct((num_partials, rows), jnp.float32),
        ),
        scratch_types=(
            narrow(1, 2 * rows, latent),  # high, then low
            wide(1, rows, rope),
            floats(1, rows),
            narrow(depth, BLOCK, latent),
            wide(depth, BLOCK, rope),
            floats(depth, BLOCK),
            wide(computing, rows, BLOCK),  # P
            floats(computing, WARPS, rows),
            floats(computing, WARPS, rows),
            floats(computing, handed_rows, half),
            floats(computing, 2, rows),
            plgpu.SMEM((FLAGS,), jnp.int32),
            plgpu.Barrier(num_arrivals=computing, num_barriers=3),
            plgpu.Barrier(num_arrivals=1, num_barriers=FLAGS),  # piece_known
            plgpu.Barrier(num_arrivals=computing, num_barriers=FLAGS),  # piece_done
            plgpu.Barrier(num_arrivals=3, num_barriers=depth),  # full
            plgpu.Barrier(num_arrivals=1, num_barriers=depth),  # empty
            *g.accumulator_scratch(computing, *o_shapes),
        ),
        grid=(plan.num_workers,),
        grid_names=("worker",),
        num_threads=computing + 1,
        thread_name="wg",
        interpret=interpret,
        kernel_name="mla_decode_few_int8",
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
