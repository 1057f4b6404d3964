"""Paged absorbed MLA decode for Hopper with few query rows: the transposed form.

With 8 to 32 rows (16 heads, one token) a wgmma tile of 64 query rows is mostly padding. Here KV
tokens are the tile's rows and queries its columns: S^T = K Q^T is 64 tokens x n queries, and
O^T = V^T P^T is d_v x n, which one warpgroup holds alone (512 x 16: 64 registers a thread). So one
warpgroup computes, one loads, and nothing is exchanged between warpgroups. The kernel is bound by
memory: per block of 64 tokens the bytes take about 4000 cycles and the matrix work under 1500.

The plan, arguments and partial results are those of `decode`; only rows_per_tile differs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.kernels.merge import Meeting, Place, Refs, merge_shares, row_parts
from pallas_kernels.hopper.mosaic.cluster import TransposedPeer, joined, peer_barrier
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS, WGMMA_OPERAND
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.mosaic.transposed import COLUMNS, WARPS, TransposedBackend
from pallas_kernels.hopper.parts.call import DecodeCall
from pallas_kernels.hopper.parts.kv_load import arrivals, blocks
from pallas_kernels.hopper.work_items import (
    BLOCK,
    LN2,
    LOG2E,
    NO_KEY,
    WorkItem,
    fits,
    kept_partial,
    range_of,
    run_items,
    valid_lengths,
)


def decode_transposed(call: DecodeCall) -> tuple[jax.Array, ...]:
    """Runs the plan; arguments and results as in `decode`.

    q [B, R or more, D], a multiple of tiles.rows_per_tile rows, of which R = num_queries *
    num_heads are real. Writes those of whole tiles to o_ref [B, R, d_v] and lse_ref [B, R]; returns
    the partial (o [slots, rows_per_tile, d_v], lse [slots, rows_per_tile]) of cut tiles.
    """
    q, requests, plan, tiles, interpret = (
        call.q,
        call.requests,
        call.plan,
        call.tiles,
        call.interpret,
    )
    (pages,) = call.cache
    block_tables, seq_lens, query_lens, walks, counters = requests
    o_ref, lse_ref = call.outputs
    num_heads, num_queries = call.num_heads, call.num_queries
    softmax_scale, causal, merges = call.softmax_scale, call.causal, call.combines
    partial_dtype = call.partial_dtype
    kv_lora_rank = call.kv_lora_rank
    _, padded_rows, width = q.shape
    page_size = pages.shape[1]
    lengths = functools.partial(
        valid_lengths, capacity=block_tables.shape[1] * page_size, num_queries=num_queries
    )
    rows, q_buffers = tiles.rows_per_tile, tiles.slots("q")
    left, right, tail = (tiles.slots(f"kv {part}") for part in ("left", "right", "rope"))
    if padded_rows % rows:
        raise ValueError(
            f"q must have a multiple of {rows} rows (rows_per_tile), got {padded_rows}"
        )
    half = kv_lora_rank // 2
    rope = width - kv_lora_rank
    dtype = q.dtype
    scale = softmax_scale * LOG2E
    g = TransposedBackend(interpreting=interpret is not None)
    num_partials = max(1, plan.num_partials)
    in_pairs = tiles.pairs  # of workers, which merge in their shared memories
    accumulator_shapes = ((kv_lora_rank, rows), (BLOCK, rows))
    tile = (BLOCK, rows)

    def body(
        q_ref,
        kv_ref,
        table_ref,
        len_ref,
        qlen_ref,
        walk_ref,
        piece_ref,
        counter_ref,
        through_ref,
        o_ref,
        lse_ref,
        po_ref,
        plse_ref,
        q_t,
        q_l,
        q_r,
        kv_t,
        kv_l,
        kv_r,
        p_smem,
        top_smem,
        sum_smem,
        lost_smem,
        q_full,
        q_empty,
        full_t,
        full_l,
        full_r,
        empty_t,
        empty_l,
        empty_r,
        *rest,
    ):
        accumulators = rest
        if in_pairs:
            (of_peer, told, sent), accumulators = rest[:3], rest[3:]
        if query_lens is None:
            qlen_ref = None  # (in its place stands another operand)
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        wg = lax.axis_index("wg")
        worker = group = lax.axis_index("group")  # of one worker, or two
        if in_pairs:
            rank = lax.axis_index("cluster")
            worker = 2 * group + rank
            peer = TransposedPeer(g, rank, through_ref.at[group])
        # Rope first: what lands last decides when the last scores are ready, and V is a half each.
        columns = (
            (2 * half, rope, tail, q_t, kv_t, full_t, empty_t),
            (0, half, left, q_l, kv_l, full_l, empty_l),
            (half, half, right, q_r, kv_r, full_r, empty_r),
        )
        my_walk = walk_ref.at[worker]
        pieces = range_of(my_walk)

        def meet(request, row_tile, count):
            tile = plan.tile_of(request, row_tile)
            return Meeting(g, counter_ref, tile, leaving=count, merging=2 * count)

        def rows_of(request, row_tile):
            """A tile's rows in the output."""
            total = num_queries * num_heads
            return Rows.of_tile(request, row_tile * rows, rows, total=total, rows_per_tile=rows)

        kv_blocks = blocks(g, table_ref, kv_ref)

        # ---------------------------------------------------------------- the loading warpgroup
        def load_piece(p, n, piece):
            request, row_tile, begin, end, slot, *slots_of_tile = piece
            kv_len, _ = lengths(len_ref, qlen_ref, request)
            ahead = kv_blocks.ahead(request, begin, kv_len)
            buffer = lax.rem(p, q_buffers)
            plgpu.barrier_wait(q_empty.at[buffer])
            own_slot = jnp.where(slot < -1, kept_partial(slot), slot)
            planned = request, row_tile, begin, end, own_slot, *slots_of_tile
            lost_smem[buffer] = (~fits(WorkItem(*planned), kv_len)).astype(jnp.int32)
            for column, width_, _, q_smem, *_ in columns:
                plgpu.copy_gmem_to_smem(
                    q_ref.at[request, pl.ds(row_tile * rows, rows), pl.ds(column, width_)],
                    q_smem.at[buffer],
                    q_full.at[buffer],
                )

            def block(i, ahead):
                following = kv_blocks.ahead(request, begin + i + 1, kv_len)
                found, all_exist = kv_blocks.find(ahead, request, begin + i, kv_len)

                @pl.when(~all_exist)
                def _lost():
                    plgpu.commit_smem()  # each warp has written its 0 before
                    lost_smem[buffer] = 1

                for column, _, depth, _, kv, full, empty in columns:
                    slot = lax.rem(n + i, depth)
                    plgpu.barrier_wait(empty.at[slot])
                    kv_blocks.load(found, column, kv.at[slot], full.at[slot])
                return following

            lax.fori_loop(0, end - begin, block, ahead)

        @pl.when(wg == 1)
        def _load():
            run_items(pieces, my_walk, piece_ref, load_piece, in_pairs=in_pairs)
            # See every release, so that no barrier ends with a phase that nobody saw.
            for buffer in range(q_buffers):
                plgpu.barrier_wait(q_empty.at[buffer])
            for _, _, depth, *_, empty in columns:
                for slot in range(depth):
                    plgpu.barrier_wait(empty.at[slot])

        # -------------------------------------------------------------- the computing warpgroup
        def release(barrier, slot):
            plgpu.barrier_arrive(barrier.at[slot])

        def attend(p, n, piece, o_acc, s_acc):
            request, row_tile, begin, end, out_slot, _, slots_of_tile = piece
            kv_len, query_len = lengths(len_ref, qlen_ref, request)
            row = row_tile * rows
            buffer = lax.rem(p, q_buffers)
            token = (g.iota(tile, 1) + row) // num_heads
            limit = jnp.minimum(kv_len - query_len + token + 1, kv_len) if causal else kv_len
            limit = jnp.where(token < query_len, limit, 0)
            position = g.iota(tile, 0)
            shared = kv_len  # keys that every row sees
            if causal:
                shared += jnp.minimum(row // num_heads + 1 - query_len, 0)

            def clear_hidden(start, slots, s):
                """What some row may not see of V becomes finite: its P is 0, but 0 * NaN is NaN.

                s: scores before the mask. A key that is not finite makes every row's score so, and
                those of the rows that see it stay NaN.
                """

                @pl.when(shared - start < BLOCK)
                def _look():
                    @pl.when(g.any_not_finite(s))
                    def _clear():
                        for kv, slot in ((kv_l, slots[1]), (kv_r, slots[2])):
                            g.clear_not_finite(kv.at[slot], shared - start)

            def block(i, carry):
                m, norm = carry
                zero = ((end - begin) >> 30) & i  # 0, but not for the compiler
                slots = [lax.rem(n + i, depth) for _, _, depth, *_ in columns]
                g.zero(s_acc)
                for slot, (_, _, _, q_smem, kv, full, _) in zip(slots, columns, strict=True):
                    plgpu.barrier_wait(full.at[slot])
                    kv_blocks.see()
                    g.mma_t(s_acc, kv.at[slot], q_smem.at[buffer + zero])
                g.wait_mma(0)
                release(empty_t, slots[0])
                start = (begin + i) * BLOCK
                s = g.read(s_acc) * scale
                clear_hidden(start, slots, s)
                s = jnp.where(position + start < limit, s, -jnp.inf)
                m_new = jnp.maximum(m, g.reduce_rows(s, top_smem, "max"))
                p = jnp.exp2(s - lax.broadcast_in_dim(m_new, tile, [1]))
                g.store_t(p_smem, p.astype(dtype))
                alpha = jnp.exp2(m - m_new)
                g.scale_columns(o_acc, alpha)
                norm = norm * lax.broadcast_in_dim(alpha, tile, [1]) + p
                plgpu.commit_smem()
                for part, slot, kv in ((0, slots[1], kv_l), (half, slots[2], kv_r)):
                    g.mma_tt(o_acc, pl.ds(part, half), kv.at[slot], p_smem)
                g.wait_mma(0)
                release(empty_l, slots[1])
                release(empty_r, slots[2])
                return m_new, norm

            g.zero(o_acc)
            none = (g.full((rows,), NO_KEY, COLUMNS), g.full(tile, 0.0, plgpu.Layout.WGMMA))
            plgpu.barrier_wait(q_full.at[buffer])
            m, norm = lax.fori_loop(0, end - begin, block, none)
            lost = lost_smem[buffer] > 0  # written before the last block's barrier
            release(q_empty, buffer)

            total = g.reduce_rows(norm, sum_smem, "add")
            plgpu.commit_smem()  # the next piece may write sum_smem
            total += jnp.where((kv_len < 0) | lost, jnp.nan, 0.0)
            kept = out_slot < -1

            def told_by_peer():
                """Both have read q for the last time when they have told each other."""
                for i, mine in enumerate((m, total)):
                    peer.send_columns(of_peer.at[i], kv_lora_rank + i, mine)
                peer.arrive(told)
                peer.wait(told)
                return tuple(
                    peer.received_columns(of_peer.at[i], kv_lora_rank + i) for i in range(2)
                )

            def nothing():
                return tuple(g.full((rows,), value, COLUMNS) for value in (NO_KEY, 0.0))

            weight = 1.0
            if in_pairs:
                m, total, weight, _ = joined(m, total, *lax.cond(kept, told_by_peer, nothing))
            seen = total != 0.0
            inverse = jnp.where(seen, weight / total, 0.0)
            # (One way only to contract: the same bits in every program.)
            lse = jnp.where(seen, (m + jnp.log(total) * LOG2E) * LN2, -jnp.inf)
            # Selected, not multiplied: O of a row without a query may be NaN where others see NaN.
            whole = (kv_lora_rank, rows)
            o = g.read(o_acc) * lax.broadcast_in_dim(inverse, whole, [1])
            o = jnp.where(lax.broadcast_in_dim(seen, whole, [1]), o, 0.0)
            here = rows_of(request, row_tile)

            @pl.when(out_slot == -1)
            def _store():
                here.store_transposed(g, o_ref, o.astype(dtype))
                here.store_column_values(g, lse_ref, lse)

            def share():
                """Each of a pair finishes the columns of its number, in what was q's place."""
                its_buffer = lax.rem(p + 1 - 2 * rank, q_buffers)
                mine = peer.send_half((q_l.at[its_buffer], q_r.at[its_buffer]), o)
                peer.arrive(sent)
                peer.wait(sent)
                got = (q_l.at[buffer], q_r.at[buffer])
                mine += peer.received_tile(got, 0, (half, rows))
                here.store_transposed(g, o_ref, mine.astype(dtype), rank * half)
                pl.when(rank == 0)(lambda: here.store_column_values(g, lse_ref, lse))

            if in_pairs:
                pl.when(kept)(share)

            @pl.when(out_slot >= 0)
            def _leave():
                left = Rows.of_partial((out_slot,), 0, rows)
                left.store_transposed(g, po_ref, o.astype(partial_dtype))
                left.store_column_values(g, plse_ref, lse)
                if merges:
                    meet(request, row_tile, slots_of_tile).leave()

        @pl.when(wg == 0)
        def _compute():
            for _, _, depth, *_, empty in columns:
                for slot in range(depth):
                    release(empty, slot)  # every slot starts free
            for buffer in range(q_buffers):
                release(q_empty, buffer)

            def run(p, n, piece):
                def scoped(*accs):
                    attend(p, n, piece, *accs)

                g.with_accumulators(scoped, accumulators, 0, *accumulator_shapes)

            run_items(pieces, my_walk, piece_ref, run, in_pairs=in_pairs)

        if merges:
            merge_shares(
                row_parts(g, plan, rows, kv_lora_rank, warpgroups=2),
                Refs(po_ref, plse_ref, o_ref, lse_ref),
                piece_ref,
                pieces,
                meet=meet,
                place=lambda request, row_tile: Place(rows_of(request, row_tile), 0),
                wg=wg,
                wgs=2,
            )

    def smem(*shape):
        return plgpu.SMEM(shape, dtype, transforms=WGMMA_OPERAND)

    of_pairs = [
        plgpu.SMEM((2, rows), jnp.float32),  # maxima and sums of the peer
        peer_barrier(1, interpreting=g.interpreting),  # told
        peer_barrier(1, interpreting=g.interpreting),  # sent
    ]

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((num_partials, rows, kv_lora_rank), partial_dtype),
            jax.ShapeDtypeStruct((num_partials, rows), jnp.float32),
        ),
        scratch_types=(
            smem(q_buffers, rows, rope),
            smem(q_buffers, rows, half),
            smem(q_buffers, rows, half),
            smem(tail, BLOCK, rope),
            smem(left, BLOCK, half),
            smem(right, BLOCK, half),
            smem(rows, BLOCK),  # P
            plgpu.SMEM((WARPS, rows), jnp.float32),
            plgpu.SMEM((WARPS, rows), jnp.float32),
            plgpu.SMEM((q_buffers,), jnp.int32),
            plgpu.Barrier(num_arrivals=3, num_barriers=q_buffers),  # q_full
            plgpu.Barrier(num_arrivals=1, num_barriers=q_buffers),  # q_empty
            plgpu.Barrier(num_arrivals=arrivals(page_size), num_barriers=tail),
            plgpu.Barrier(num_arrivals=arrivals(page_size), num_barriers=left),
            plgpu.Barrier(num_arrivals=arrivals(page_size), num_barriers=right),
            plgpu.Barrier(num_arrivals=1, num_barriers=tail),
            plgpu.Barrier(num_arrivals=1, num_barriers=left),
            plgpu.Barrier(num_arrivals=1, num_barriers=right),
            *(of_pairs if in_pairs else ()),
            *g.accumulator_scratch(1, *accumulator_shapes),
        ),
        grid=(-(-plan.num_workers // (1 + in_pairs)),),
        grid_names=("group",),
        cluster=(2,) if in_pairs else (),
        cluster_names=("cluster",) if in_pairs else (),
        num_threads=2,
        thread_name="wg",
        interpret=interpret,
        kernel_name="mla_decode_few",
        compiler_params=OWN_BARRIERS,
    )
    lens = seq_lens, seq_lens if query_lens is None else query_lens
    through = counters  # (in its place stands another operand)
    if in_pairs and interpret is not None:
        shape = (len(walks[0]) // 2, 2, kv_lora_rank + 2, rows)
        through = jax.empty_ref(jax.ShapeDtypeStruct(shape, jnp.float32))
    return kernel(q, pages, block_tables, *lens, *walks, counters, through, o_ref, lse_ref)
