"""Paged absorbed MLA decode for Hopper over an int8 latent cache, 64 query rows a CTA.

The seesaw of `decode`, with O transposed: S = Q K^T has a query a row and softmax stays within a
quad of lanes, but O^T = V^T P^T takes V^T from registers, where each warpgroup widens its half of
both blocks' dimensions on their way to wgmma (`widen`). So nothing is widened twice and nothing
goes back to shared memory. Two blocks of 64 tokens are in flight: warpgroup 0 scores the even one,
warpgroup 1 the odd one, and each holds 256 x 64 of O^T (128 registers a thread).

    S = int32 * q_scale[row] * k_scale[token] + rope    P = e^(s - m) * k_scale[token], bfloat16

P of a block lies in the block's own rope tile, which is dead after QK. A query is a row of S and a
column of O^T: the factors that rescale O go through shared memory, where any row's maximum grew.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.merge import Meeting, Place, Refs, merge_shares, row_parts
from pallas_kernels.hopper.primitives import ROWS, WGMMA_OPERAND
from pallas_kernels.hopper.walk import (
    BLOCK,
    LN2,
    LOG2E,
    NO_KEY,
    RECORD,
    block_sources,
    fits,
    records,
    valid_lengths,
    walk,
)
from pallas_kernels.hopper.widen import GROUP, INT8_OPERAND, WIDENED_UNIT, WideningBackend

QUERIES = 64  # rows of a tile
LAZY_GROWTH = 8.0  # log2 units that the running maximum may lag behind the true one
SLOTS = 4  # of a block each: two pairs
LOST = RECORD + 3  # of a record in shared memory: its keys can't all be had, so its rows are NaN


def decode_int8(
    q_int8,
    q_scales,
    q_rope,
    pages,
    rope_pages,
    scales,
    block_tables,
    seq_lens,
    query_lens,
    plan,
    counters,
    o_ref,
    lse_ref,
    *,
    num_heads,
    num_queries,
    softmax_scale,
    causal,
    tiles,
    merges,
    partial_dtype=jnp.float32,
    interpret=None,
):
    """Runs the plan; arguments and results as in `decode_few_int8`, R a multiple of 64."""
    _, rows_total, latent = q_int8.shape
    num_pages, page_size, rope = rope_pages.shape
    lengths = functools.partial(
        valid_lengths, capacity=block_tables.shape[1] * page_size, num_queries=num_queries
    )
    if rows_total % QUERIES or rope != BLOCK:
        raise ValueError(
            f"q must have a multiple of {QUERIES} rows and {BLOCK} rope columns, got {q_rope.shape}"
        )
    half = latent // 2
    groups = half // GROUP
    dtype = q_rope.dtype
    scale = softmax_scale * LOG2E
    g = WideningBackend(interpreting=interpret is not None)
    num_slots = max(1, plan.num_slots)
    tile = (QUERIES, BLOCK)
    accumulator_shapes = ((half, QUERIES), tile, tile)

    def body(
        q_ref,
        q_rope_ref,
        q_scale_ref,
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
        q_scale_smem,
        kv_smem,
        rope_smem,
        scale_smem,
        turn_smem,
        m_smem,
        l_smem,
        piece_smem,
        q_full,
        q_empty,
        full,
        empty,
        p_ready,
        l_ready,
        *accumulators,
    ):
        if query_lens is None:
            qlen_ref = None  # (in its place stands another operand)
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        wg = lax.axis_index("wg")
        worker = lax.axis_index("worker")
        my_walk = walk_ref.at[worker]
        pieces = my_walk[0], my_walk[1]
        queries = ((q_ref, q_smem), (q_rope_ref, q_rope_smem), (q_scale_ref, q_scale_smem))
        tokens = ((kv_ref, kv_smem), (rope_ref, rope_smem), (scale_ref, scale_smem))

        def meet(request, row_tile, count):
            tile = plan.tile_of(request, row_tile)
            return Meeting(g, counter_ref, tile, 2 * count, 2 * count)

        def merge_mine(me):
            merge_shares(
                row_parts(g, plan, QUERIES, latent, warpgroups=2),
                Refs(po_ref, plse_ref, o_ref, lse_ref),
                piece_ref,
                pieces,
                meet=meet,
                place=lambda request, row_tile: Place(request, row_tile * QUERIES, 0),
                wg=me,
                wgs=2,
            )

        # ---------------------------------------------------------------- the loading warpgroup
        def load_piece(k, n, piece):
            request, row_tile, begin, end, *_ = piece
            kv_len, query_len = lengths(len_ref, qlen_ref, request)
            plgpu.barrier_wait(q_empty)
            lost = (~fits(piece, kv_len)).astype(jnp.int32)
            for i, value in enumerate((*piece, kv_len, query_len, n, lost)):
                piece_smem[i] = value
            for source, target in queries:
                plgpu.copy_gmem_to_smem(
                    source.at[request, pl.ds(row_tile * QUERIES, QUERIES)], target.at[0], q_full
                )

            def block(i, _):
                ((page, mine, _),), exists = block_sources(
                    table_ref, request, begin + i, kv_len, page_size, num_pages
                )

                @pl.when(~exists)
                def _lost():
                    piece_smem[LOST] = 1

                slot = lax.rem(n + i, SLOTS)
                plgpu.barrier_wait(empty.at[slot])
                for source, target in tokens:
                    plgpu.copy_gmem_to_smem(source.at[page, mine], target.at[slot], full.at[slot])
                return ()

            lax.fori_loop(0, end - begin, block, ())

        @pl.when(wg == 2)
        def _load():
            g.set_max_registers(tiles.registers[-1], "decrease")
            walk(pieces, my_walk, piece_ref, load_piece, group=2)  # a pair has slots of its own
            # See every release, so that no barrier ends with a phase that nobody saw.
            plgpu.barrier_wait(q_empty)
            for slot in range(SLOTS):
                plgpu.barrier_wait(empty.at[slot])

        # ------------------------------------------------------------- the computing warpgroups
        def across(rows):
            return lax.broadcast_in_dim(rows, tile, [0])

        def down(columns, shape=tile):
            return lax.broadcast_in_dim(columns, shape, [1])

        def compute(me):
            def release(slot):
                """This warpgroup has read its half of V and P of the slot for the last time."""
                plgpu.barrier_arrive(empty.at[slot])

            def raised(m, top):
                """The running maximum after scores of row maximum `top`, in log2 units."""
                top = jnp.maximum(m, top)
                return jnp.where(top > m + LAZY_GROWTH, top, m)

            def rescale(o_acc, m_old, m_new):
                """O from scale 2^-m_old to 2^-m_new; nothing may be in flight on it."""
                alpha = jnp.exp2(m_old - m_new)

                @pl.when(g.any_less(m_old, m_new))
                def _rescale():
                    g.scale_columns(o_acc, g.columns_of(alpha, turn_smem.at[me]))

                return alpha

            def multiply(o_acc, slot):
                g.mma_widened((o_acc,), kv_smem.at[slot], rope_smem.at[slot], me * groups)

            def attend(o_acc, s_int, s_acc):
                plgpu.barrier_wait(q_full)
                row_tile, begin, end = (piece_smem[i] for i in (1, 2, 3))
                kv_len, query_len, blocks_before = (piece_smem[i] for i in range(RECORD, LOST))
                num_blocks = end - begin
                row = row_tile * QUERIES

                # Blocks that every row of the tile sees whole need no mask.
                shortest = kv_len
                if causal:
                    shortest = kv_len - query_len + row // num_heads + 1
                last_query = (rows_total - 1) // num_heads
                ragged = jnp.minimum((row + QUERIES - 1) // num_heads, last_query) >= query_len
                shortest = jnp.where(ragged, 0, shortest)

                def opaque(i):
                    """0, but not for the compiler: else it hoists every wgmma descriptor."""
                    return (num_blocks >> 30) & (begin + i)

                def score(slot, block):
                    """Scores of a block in log2 units; what a query may not see is -inf."""
                    zero = opaque(block)
                    valid = kv_len - block * BLOCK
                    mine = scale_smem.at[slot]
                    g.zero_integers(s_int)
                    plgpu.barrier_wait(full.at[slot])

                    @pl.when(valid < BLOCK)
                    def _clear():  # scales past the last token may be NaN, and multiply a P of 0
                        scales = g.load_rows(mine)
                        mine[...] = jnp.where(g.iota_rows(BLOCK) < valid, scales, 0.0)
                        plgpu.commit_smem()

                    g.mma_t(s_int, q_smem.at[zero], kv_smem.at[slot])
                    q_scale = across(g.load_rows(q_scale_smem.at[zero]))
                    token_scale = down(g.load_columns(mine))
                    g.wait_mma(0)
                    s_acc[...] = g.read(s_int).astype(jnp.float32) * q_scale * token_scale
                    g.mma_t(s_acc, q_rope_smem.at[zero], rope_smem.at[slot])
                    g.wait_mma(0)

                    @pl.when((block + 1) * BLOCK > shortest)
                    def _mask():
                        # (Adding zero keeps the compiler from holding places in registers.)
                        token = (g.iota(tile, 0) + (row + zero)) // num_heads
                        last = kv_len - query_len + token if causal else kv_len - 1
                        position = g.iota(tile, 1) + zero
                        visible = (position + block * BLOCK <= last) & (token < query_len)
                        visible &= position < valid
                        s_acc[...] = jnp.where(visible, g.read(s_acc), -jnp.inf)

                    return g.read(s_acc) * scale

                def publish(slot, p, m):
                    token_scale = down(g.load_columns(scale_smem.at[slot]))
                    rope_smem.at[slot][...] = (p * token_scale).astype(dtype)
                    m_smem.at[slot][...] = m
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(p_ready.at[slot])

                def own_first(carry, slot, block):
                    """Warpgroup 0 on an even block: score, publish, multiply."""
                    m, norm = carry
                    s = score(slot, block)
                    m0 = raised(m, s.max(axis=1))
                    p = jnp.exp2(s - across(m0))
                    publish(slot, p, m0)
                    alpha = rescale(o_acc, m, m0)
                    multiply(o_acc, slot)
                    norm = norm * alpha + p.sum(axis=1)
                    g.wait_mma(0)
                    release(slot)
                    return m0, norm

                def others(carry, slot):
                    """The other warpgroup's P, at its maximum."""
                    m, norm = carry
                    plgpu.barrier_wait(p_ready.at[slot])
                    m_new = g.load_rows(m_smem.at[slot])
                    alpha = rescale(o_acc, m, m_new)
                    multiply(o_acc, slot)
                    return m_new, norm * alpha

                def slot_of(i):
                    return lax.rem(blocks_before + 2 * i, SLOTS)

                def pair(i, carry):
                    block = begin + 2 * i
                    s0 = slot_of(i)
                    s1 = s0 + 1
                    if me == 0:
                        carry = own_first(carry, s0, block)
                        carry = others(carry, s1)
                        g.wait_mma(0)
                        release(s1)
                        return carry
                    s = score(s1, block + 1)
                    top = s.max(axis=1)
                    m0, norm = others(carry, s0)
                    m1 = raised(m0, top)
                    p = jnp.exp2(s - across(m1))
                    publish(s1, p, m1)
                    g.wait_mma(0)
                    release(s0)
                    norm = norm * rescale(o_acc, m0, m1) + p.sum(axis=1)
                    multiply(o_acc, s1)
                    g.wait_mma(0)
                    release(s1)
                    return m1, norm

                def single(_, carry):
                    """The last block of an odd number: warpgroup 0 scores, both multiply."""
                    slot = slot_of(num_blocks // 2)
                    if me == 0:
                        return own_first(carry, slot, begin + num_blocks - 1)
                    carry = others(carry, slot)
                    g.wait_mma(0)
                    release(slot)
                    return carry

                g.zero(o_acc)
                carry = (g.full((QUERIES,), NO_KEY, ROWS), g.full((QUERIES,), 0.0, ROWS))
                carry = lax.fori_loop(0, num_blocks // 2, pair, carry)
                m, norm = lax.fori_loop(0, num_blocks % 2, single, carry)
                # (What is read here holds no register around the loops.)
                request, row_tile, *_, out_slot, _, slots_of_tile = (
                    piece_smem[i] for i in range(RECORD)
                )
                row, kv_len = row_tile * QUERIES, piece_smem[RECORD]
                lost = piece_smem[LOST] > 0  # written before the barrier of the last block
                plgpu.barrier_arrive(q_empty)

                # Each warpgroup has summed its own blocks: exchange, normalise, store.
                l_smem.at[me][...] = norm
                plgpu.commit_smem()
                plgpu.barrier_arrive(l_ready)
                plgpu.barrier_wait(l_ready)
                blank = jnp.where((kv_len < 0) | lost, jnp.nan, 0.0)
                totals = g.load_columns(l_smem.at[0]) + g.load_columns(l_smem.at[1])
                inverse = jnp.where(totals > 0.0, (1.0 / WIDENED_UNIT) / totals, 0.0) + blank
                o = g.read(o_acc) * down(inverse, (half, QUERIES))
                total = g.load_rows(l_smem.at[0]) + g.load_rows(l_smem.at[1])
                lse = jnp.where(total > 0.0, m * LN2 + jnp.log(total), -jnp.inf) + blank

                @pl.when(out_slot < 0)
                def _store():
                    mine = pl.ds(row, QUERIES)
                    g.store_dimensions(o_ref.at[request, mine], o.astype(dtype), me * groups)
                    if me == 0:
                        lse_ref.at[request, mine][...] = lse

                @pl.when(out_slot >= 0)
                def _leave():
                    g.store_dimensions(po_ref.at[out_slot], o.astype(partial_dtype), me * groups)
                    if me == 0:
                        plse_ref.at[out_slot][...] = lse
                    if merges:
                        meet(request, row_tile, slots_of_tile).leave()

            g.set_max_registers(tiles.registers[0], "increase")
            for slot in range(SLOTS):
                release(slot)  # every slot starts free
            plgpu.barrier_arrive(q_empty)

            def run(p, _):
                g.with_score_accumulators(
                    lambda *accs: attend(*accs), accumulators, me, *accumulator_shapes
                )
                return ()

            lax.fori_loop(*pieces, run, ())
            if merges:
                merge_mine(me)

        pl.when(wg == 0)(functools.partial(compute, 0))
        pl.when(wg == 1)(functools.partial(compute, 1))

    def wide(*shape):
        return plgpu.SMEM(shape, dtype, transforms=WGMMA_OPERAND)

    def narrow(*shape):
        return plgpu.SMEM(shape, jnp.int8, transforms=INT8_OPERAND)

    def floats(*shape):
        return plgpu.SMEM(shape, jnp.float32)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((num_slots, QUERIES, latent), partial_dtype),
            jax.ShapeDtypeStruct((num_slots, QUERIES), jnp.float32),
        ),
        scratch_types=(
            narrow(1, QUERIES, latent),
            wide(1, QUERIES, rope),
            floats(1, QUERIES),
            narrow(SLOTS, BLOCK, latent),
            wide(SLOTS, BLOCK, rope),
            floats(SLOTS, BLOCK),
            floats(2, QUERIES),
            floats(SLOTS, QUERIES),
            floats(2, QUERIES),
            plgpu.SMEM((LOST + 1,), jnp.int32),
            plgpu.Barrier(num_arrivals=3),  # q_full
            plgpu.Barrier(num_arrivals=2),  # q_empty
            plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),  # full
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),  # empty
            plgpu.Barrier(num_arrivals=1, num_barriers=SLOTS),  # p_ready
            plgpu.Barrier(num_arrivals=2),  # l_ready
            *g.accumulator_scratch(2, *accumulator_shapes),
        ),
        grid=(plan.num_workers,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="wg",
        interpret=interpret,
        kernel_name="mla_decode_int8",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
    walks, records_ = records(plan)
    given = seq_lens if query_lens is None else query_lens
    return kernel(
        q_int8,
        q_rope,
        q_scales,
        pages,
        rope_pages,
        scales,
        block_tables,
        seq_lens,
        given,
        walks,
        records_,
        counters,
        o_ref,
        lse_ref,
    )
