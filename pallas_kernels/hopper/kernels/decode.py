"""Paged absorbed MLA decode for Hopper: one persistent Pallas Mosaic GPU kernel.

A row of queries is (token, head). CTAs are launched in clusters of two: they have 64 rows each of
the same 128 and read the same KV by multicast, or they are two workers of the plan with tiles of 64
rows, and merge a tile that only they share in their shared memories. Three warpgroups a CTA: two
compute, one loads. The 512 output columns are halved between the computing warpgroups, and two
64-token KV blocks are in flight: warpgroup 0 scores the even block, warpgroup 1 the odd one, and
each multiplies both P's with its own half of V ("seesaw", after FlashMLA). docs/hopper_decode.md
draws the schedule.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.kernels.merge import (
    BLOCK_COLUMNS,
    Meeting,
    Place,
    Refs,
    block_parts,
    merge_shares,
    units,
)
from pallas_kernels.hopper.mosaic.cluster import Peer, joined, peer_barrier
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS, ROWS, WGMMA_OPERAND, Backend
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.parts.call import DecodeCall
from pallas_kernels.hopper.parts.kv_load import arrivals, blocks
from pallas_kernels.hopper.work_items import (
    BLOCK,
    ITEM_FIELDS,
    LN2,
    LOG2E,
    NO_KEY,
    WorkItem,
    first_of,
    fits,
    kept_partial,
    range_of,
    step_of,
    valid_lengths,
)

# Of a record in shared memory, behind the lengths:
LOST = ITEM_FIELDS + 2  # its keys can't all be had, so its rows are NaN
OPEN = ITEM_FIELDS + 3  # pairs of blocks that every row of the tile sees whole
ALL_WHOLE = 2.0**23  # float32 numbers from here on are whole
LAZY_GROWTH = 8.0  # log2 units that the running maximum may lag behind the true one


def decode(call: DecodeCall) -> tuple[jax.Array, ...]:
    """Runs the plan. q [B, R or more, D], a multiple of 8 rows; pages [N, page, D].

    rescale (of O): "multiply" at every block, "lazy" only where the maximum grew by more than
    LAZY_GROWTH, "exponent_add" likewise and as AMLA's integer add.
    R = num_queries * num_heads. Writes rows below R of whole tiles to o_ref [B, R, kv_lora_rank]
    and lse_ref [B, R]; and, if it `merges`
    (its CTAs must be resident together then), cut tiles too. Returns what it leaves of their
    pieces: o [slots, ctas, kv_lora_rank / 8, 512], in blocks of 64 rows x 8 columns,
    lse [slots, rows] and, of float16, the units [slots, 2, rows] of both halves of o.
    walks: the plan's `records`. counters: int32 [num_tiles * ctas], 0 before and after the launch.
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
    kv_lora_rank, rescale = call.kv_lora_rank, call.rescale
    _, padded_rows, width = q.shape
    page_size = pages.shape[1]
    lengths = functools.partial(
        valid_lengths, capacity=block_tables.shape[1] * page_size, num_queries=num_queries
    )
    half = kv_lora_rank // 2
    rope = width - kv_lora_rank
    rows_box = min(BLOCK, padded_rows)
    dtype = q.dtype
    cluster = tiles.cluster  # CTAs that share a KV block
    in_pairs = tiles.pairs  # or else of two workers, which merge in their shared memories
    assert in_pairs == (cluster == 1)
    scale = softmax_scale * LOG2E
    g = Backend(interpreting=interpret is not None)
    num_partials = max(1, plan.num_partials)
    in_units = partial_dtype == jnp.float16
    exponent_add = rescale == "exponent_add"
    lazy = rescale != "multiply"
    accumulator_shapes = ((BLOCK, half), (BLOCK, BLOCK))

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
        units_ref,
        q_l,
        q_r,
        q_t,
        kv_l,
        kv_r,
        kv_t,
        m_smem,
        l_smem,
        record_smem,
        q_full,
        q_empty,
        full_l,
        full_r,
        full_t,
        empty_l,
        empty_r,
        p_ready,
        l_ready,
        *rest,
    ):
        accumulators = rest
        if in_pairs:
            (m_of_peer, l_of_peer, told, sent), accumulators = rest[:4], rest[4:]
        if query_lens is None:
            qlen_ref = None  # (in its place stands another operand)
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        wg = lax.axis_index("wg")
        rank = lax.axis_index("cluster")
        group = lax.axis_index("group")
        if interpret is not None and not in_pairs:
            # (The interpreter runs cluster after cluster: first those that others take pieces of.)
            group = plan.num_workers - 1 - group
        peer = Peer(g, rank, through_ref.at[group])
        my_walk = walk_ref.at[2 * group + rank if in_pairs else group]
        columns = (
            (0, half, q_l, kv_l, full_l, empty_l),
            (half, half, q_r, kv_r, full_r, empty_r),
            # (Its rope keys, and the P in their place, are done with when both halves of V are.)
            (2 * half, rope, q_t, kv_t, full_t, None),
        )

        refs = Refs(po_ref, plse_ref, o_ref, lse_ref, units_ref if in_units else None)

        def part_of_tile():
            """Which 64 of its rows this CTA has; read again where it's needed, not held."""
            return 0 if in_pairs else g.cta_of_cluster()

        def rows_of(request, row_tile):
            """This CTA's rows of a tile in the output."""
            first = (row_tile * cluster + part_of_tile()) * BLOCK
            total = num_queries * num_heads
            return Rows.of_tile(
                request, first, BLOCK, total=total, rows_per_tile=plan.rows_per_tile
            )

        def place(request, row_tile):
            return Place(rows_of(request, row_tile), part_of_tile())

        def meet(request, row_tile, count):
            counter = plan.tile_of(request, row_tile) * cluster + part_of_tile()
            return Meeting(g, counter_ref, counter, leaving=2 * count, merging=2 * count)

        kv_blocks = blocks(g, table_ref, kv_ref, cluster)

        # ---------------------------------------------------------------- the loading warpgroup
        def load_block(found, slot, turn):
            for column, _, _, kv, full, empty in columns:
                if empty is not None:
                    plgpu.barrier_wait(empty.at[slot])
                kv_blocks.load(found, column, kv.at[slot], full.at[turn])

        def turn_of(i, open_pairs):
            """Which barriers tell of a block, so that who scores it sees all of their phases.

            Those of its slot; or, where warpgroup 0 scores it whatever its slot, two more.
            """
            return i % 2 + jnp.where(i < 2 * open_pairs, 0, 2)

        def load_piece(k, carry):
            at, *piece = carry
            request, row_tile, begin, end, slot, *slots_of_tile = piece
            num_blocks = end - begin
            row = (row_tile * cluster + (0 if in_pairs else rank)) * BLOCK
            kv_len, query_len = lengths(len_ref, qlen_ref, request)
            ahead = kv_blocks.ahead(request, begin, kv_len)
            following = kv_blocks.ahead(request, begin + 1, kv_len)
            found, all_exist = kv_blocks.find(ahead, request, begin, kv_len)
            record = record_smem.at[k % 2]
            own_slot = jnp.where(slot < -1, kept_partial(slot), slot)
            planned = (request, row_tile, begin, end, own_slot, *slots_of_tile)
            lost = ~fits(WorkItem(*planned), kv_len) | ((num_blocks > 0) & ~all_exist)
            shortest = kv_len  # keys that the tile's first row sees (of all its CTAs: they agree)
            if causal:
                shortest = kv_len - query_len + row_tile * cluster * BLOCK // num_heads + 1
            open_pairs = jnp.clip((shortest // BLOCK - begin) // 2, 0, num_blocks // 2)
            more = kv_len, query_len, lost.astype(jnp.int32), open_pairs
            for i, value in enumerate((*piece, *more)):
                record[i] = value
            plgpu.commit_smem()  # whichever of its warps reads or changes it

            def load_first():
                # (Slot 0, but not for the compiler: else it holds all addresses of it.)
                zero = num_blocks >> 30
                load_block(found, zero, turn_of(zero, record[OPEN]))

            # A later piece's first block comes under the end of the piece before; of the worker's
            # first piece, whose Q can come at once, Q is needed first.
            pl.when((num_blocks > 0) & (k > 0))(load_first)
            plgpu.barrier_wait(q_empty)
            for column, width_, q_smem, *_ in columns:
                plgpu.copy_gmem_to_smem(
                    q_ref.at[request, pl.ds(row, rows_box), pl.ds(column, width_)],
                    q_smem.at[0] if rows_box == BLOCK else q_smem.at[0, pl.ds(0, rows_box)],
                    q_full,
                )

            pl.when((num_blocks > 0) & (k == 0))(load_first)

            def block(i, ahead):
                request, kv_len = (
                    record[0],
                    record[ITEM_FIELDS],
                )  # read again
                following = kv_blocks.ahead(request, begin + i + 1, kv_len)
                found, all_exist = kv_blocks.find(ahead, request, begin + i, kv_len)

                @pl.when(~all_exist)
                def _lost():
                    record[LOST] = 1

                load_block(found, i % 2, turn_of(i, record[OPEN]))
                return following

            lax.fori_loop(1, num_blocks, block, following)
            following = at + (step_of(my_walk) if in_pairs else 1)
            following = jnp.clip(following, 0, piece_ref.shape[0] - 1)
            return following, *(piece_ref[following, i] for i in range(ITEM_FIELDS))

        def load():
            g.take_registers(tiles.registers, 2)
            # (Not `walk`, whose next record would take registers while a piece is loaded.)
            head = tuple(my_walk[i] for i in range(ITEM_FIELDS))
            first, stop = range_of(my_walk)
            at = first_of(my_walk) if in_pairs else first
            lax.fori_loop(0, stop - first, load_piece, (at, *head))
            # See every release: a CTA must outlive those that its peer sends it.
            plgpu.barrier_wait(q_empty)
            for empty in (empty_l, empty_r):
                for slot in (0, 1):
                    plgpu.barrier_wait(empty.at[slot])

        # ------------------------------------------------------------- the computing warpgroups
        def across(rows, shape=(BLOCK, BLOCK)):
            return lax.broadcast_in_dim(rows, shape, [0])

        def compute(me):
            q_mine, v, empty = ((q_l, kv_l, empty_l), (q_r, kv_r, empty_r))[me]

            def release(slot):
                """This warpgroup has read its half of V and P of the slot for the last time."""
                if cluster > 1:
                    plgpu.commit_smem()  # all four warps, before one thread tells the cluster
                plgpu.barrier_arrive(empty.at[slot])

            def scores(s_acc, q_rope, zero, slot, turn):
                g.zero(s_acc)
                for _, _, q_smem, kv, full, _ in columns:
                    plgpu.barrier_wait(full.at[turn])
                    kv_blocks.see()
                    in_registers = q_smem is q_t and q_rope is not None
                    g.mma_t(s_acc, q_rope if in_registers else q_smem.at[zero], kv.at[slot])

            def masked(s, record, block):
                kv_len, query_len = record[ITEM_FIELDS], record[ITEM_FIELDS + 1]
                row = (record[1] * cluster + part_of_tile()) * BLOCK
                shape = (BLOCK, BLOCK)
                token = (g.iota(shape, 0) + row) // num_heads
                last = kv_len - query_len + token if causal else kv_len - 1
                position = g.iota(shape, 1) + block * BLOCK
                return jnp.where((position <= last) & (position < kv_len), s, -jnp.inf)

            def clear_hidden(slot, record, block, s):
                """What some row may not see of V becomes finite: its P is 0, but 0 * NaN is NaN.

                s: scores before the mask. A key that is not finite makes every row's score so, and
                those of the rows that see it stay NaN.
                """
                shared = record[ITEM_FIELDS]  # keys that every row sees
                if causal:
                    row = (record[1] * cluster + part_of_tile()) * BLOCK
                    shared += jnp.minimum(row // num_heads + 1 - record[ITEM_FIELDS + 1], 0)
                shared -= block * BLOCK

                @pl.when(shared < BLOCK)
                def _look():
                    @pl.when(g.any_not_finite(s))
                    def _clear():
                        for kv in (kv_l, kv_r):
                            g.clear_not_finite(kv.at[slot], shared)
                        plgpu.commit_smem()

            def raised(m, top):
                """The running maximum after scores of row maximum `top`, in log2 units."""
                if exponent_add:
                    # The whole number at or above it: O then moves by powers of two.
                    whole = top.astype(jnp.int32).astype(jnp.float32)
                    whole += jnp.where(top > whole, 1.0, 0.0)
                    top = jnp.where(jnp.abs(top) < ALL_WHOLE, whole, top)
                top = jnp.maximum(m, top)
                return jnp.where(top > m + LAZY_GROWTH, top, m) if lazy else top

            def rescale_to(o_acc, m_old, m_new):
                """O from scale 2^-m_old to 2^-m_new; nothing may be in flight on it."""
                alpha = jnp.exp2(m_old - m_new)

                def rescaled():
                    o = g.read(o_acc)
                    if exponent_add:
                        return g.add_exponent(o, jnp.maximum(m_old - m_new, -300.0))
                    return o * across(alpha, o.shape)

                if lazy:
                    # (Each warp for itself: but all of them write o_acc, which takes a fence.)
                    grown = g.any_less_in_warp(m_old, m_new)
                    o_acc[...] = lax.cond(grown, rescaled, lambda: g.read(o_acc))
                else:
                    o_acc[...] = rescaled()
                return alpha

            def publish(slot, turn, p, m):
                kv_t.at[slot].at[:, pl.ds(0, BLOCK)][...] = p
                m_smem.at[slot][...] = m
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_ready.at[turn])

            def published_max(slot, turn):
                plgpu.barrier_wait(p_ready.at[turn])
                return g.load_rows(m_smem.at[slot])

            def multiply(o_acc, slot):
                p = kv_t.at[slot] if rope == BLOCK else kv_t.at[slot].at[:, pl.ds(0, BLOCK)]
                g.mma(o_acc, p, v.at[slot])

            def told_by_peer(m, total):
                """(Maxima, sums) of what the other CTA has of the tile.

                Both have read q for the last time when they have told each other.
                """
                peers = (m_of_peer, half), (l_of_peer, half + 1)
                # (A part for each warpgroup: both know both.)
                peer.send_rows(*peers[me], (m, total)[me])
                peer.arrive(told)
                peer.wait(told)
                return tuple(peer.received_rows(*of_peer) for of_peer in peers)

            def told_by_next(meeting, slot, cta):
                """The same of the tile's other piece, left by the next worker in that slot."""
                if merges:
                    meeting.wait()
                lse = g.load_rows(plse_ref.at[slot, pl.ds(cta * BLOCK, BLOCK)])
                seen = lse != -jnp.inf
                return jnp.where(seen, lse * LOG2E, NO_KEY), jnp.where(seen, 1.0, 0.0)

            def send(o):
                """This warpgroup's columns to where q was in the other CTA."""
                peer.send_tile((q_l.at[0], q_r.at[0]), 0, o)
                peer.arrive(sent)

            def received():
                peer.wait(sent)
                o = peer.received_tile((q_l.at[0], q_r.at[0]), 0, (BLOCK, half))
                plgpu.commit_smem()  # all of it is read before any is written over
                return o

            def attend(k, o_acc, s_acc):
                plgpu.barrier_wait(q_full)
                # (AMLA's adds need the registers.)
                q_rope = None if exponent_add else g.load_tile(q_t.at[0])
                record = record_smem.at[k % 2]
                begin, end = record[2], record[3]
                num_blocks = end - begin

                def opaque(i):
                    """0, but not for the compiler: else it hoists every wgmma descriptor."""
                    return (num_blocks >> 30) & (begin + i)

                def own(carry, zero, slot, turn, block=None):
                    """Warpgroup 0 scores a block, which is masked if named, and multiplies it."""
                    m, norm = carry
                    scores(s_acc, q_rope, zero, slot, turn)
                    g.wait_mma(0)
                    s = g.read(s_acc) * scale
                    if block is not None:
                        clear_hidden(slot, record, block, s)
                        s = masked(s, record, block)
                    m_new = raised(m, s.max(axis=1))
                    p = jnp.exp2(s - across(m_new))
                    half_p = p.astype(dtype)
                    publish(slot, turn, half_p, m_new)
                    alpha = rescale_to(o_acc, m, m_new)
                    g.mma(o_acc, half_p, v.at[slot])
                    norm = norm * alpha + p.sum(axis=1)
                    g.wait_mma(0)
                    release(slot)
                    return m_new, norm

                def of_other(carry, slot, turn):
                    """The other warpgroup's P, at its maximum."""
                    m, norm = carry
                    m_new = published_max(slot, turn)
                    alpha = rescale_to(o_acc, m, m_new)
                    multiply(o_acc, slot)
                    return m_new, norm * alpha

                def pair(i, carry):
                    """Two blocks that every row of the tile sees whole."""
                    zero = opaque(i)
                    s0, s1 = zero, zero + 1
                    if me == 0:
                        carry = own(carry, zero, s0, s0)
                        carry = of_other(carry, s1, s1)
                        g.wait_mma(0)
                        release(s1)
                        return carry
                    scores(s_acc, q_rope, zero, s1, s1)
                    g.wait_mma(0)
                    s = g.read(s_acc) * scale
                    top = s.max(axis=1)
                    m0, norm = of_other(carry, s0, s0)
                    m1 = raised(m0, top)
                    p = jnp.exp2(s - across(m1))
                    half_p = p.astype(dtype)
                    publish(s1, s1, half_p, m1)
                    g.wait_mma(0)
                    release(s0)
                    norm = norm * rescale_to(o_acc, m0, m1) + p.sum(axis=1)
                    g.mma(o_acc, half_p, v.at[s1])
                    g.wait_mma(0)
                    release(s1)
                    return m1, norm

                def one(i, carry):
                    """Any other block, masked: warpgroup 0 scores, both multiply."""
                    zero = opaque(i)
                    slot = zero + i % 2
                    turn = slot + 2
                    if me == 0:
                        return own(carry, zero, slot, turn, begin + i)
                    carry = of_other(carry, slot, turn)
                    g.wait_mma(0)
                    release(slot)
                    return carry

                g.zero(o_acc)
                carry = (g.full((BLOCK,), NO_KEY, ROWS), g.full((BLOCK,), 0.0, ROWS))
                # (Not pairs with masks as well: that code would not fit an SM's instruction cache.)
                carry = lax.fori_loop(0, record[OPEN], pair, carry)
                m, norm = lax.fori_loop(2 * record[OPEN], num_blocks, one, carry)

                # (What is read here holds no register around the loops.)
                request, row_tile, *_, out_slot, _, slots_of_tile, kv_len = (
                    record[i] for i in range(ITEM_FIELDS + 1)
                )
                cta = part_of_tile()
                row = (row_tile * cluster + cta) * BLOCK
                lost = record[LOST] > 0  # written before the last block's barrier
                # Each warpgroup has summed its own blocks: exchange, normalise, store.
                l_smem.at[me][...] = norm
                plgpu.commit_smem()
                plgpu.barrier_arrive(l_ready)
                plgpu.barrier_wait(l_ready)
                total = g.load_rows(l_smem.at[0]) + g.load_rows(l_smem.at[1])
                o = g.read(o_acc)
                if qlen_ref is not None:
                    # Rows of no query were never masked, and hold whatever q was there.
                    query = (g.iota((BLOCK,), 0) + row) // num_heads < record[ITEM_FIELDS + 1]
                    m, total = jnp.where(query, m, NO_KEY), jnp.where(query, total, 0.0)
                    o = jnp.where(across(query, (BLOCK, half)), o, 0.0)
                total += jnp.where((kv_len < 0) | lost, jnp.nan, 0.0)
                kept = out_slot < -1
                next_slot = kept_partial(out_slot) + 1
                meeting = meet(request, row_tile, 1)  # (the only one)

                def told_by_other():
                    return (
                        told_by_peer(m, total)
                        if in_pairs
                        else told_by_next(meeting, next_slot, cta)
                    )

                def nothing():
                    return tuple(g.full((BLOCK,), value, ROWS) for value in (NO_KEY, 0.0))

                other = lax.cond(kept, told_by_other, nothing)
                m, total, weight, others_weight = joined(m, total, *other)
                seen = total != 0.0
                inverse, others_inverse = (
                    jnp.where(seen, w / total, 0.0) for w in (weight, others_weight)
                )
                # (One way only to contract: the same bits in every program.)
                lse = jnp.where(seen, (m + jnp.log(total) * LOG2E) * LN2, -jnp.inf)

                def left_rows(*index):
                    return Rows.of_partial(index, cta * BLOCK, BLOCK)

                def in_own_units():
                    unit, inverse_unit = units(jnp.abs(o).max(axis=1) * inverse)
                    left_rows(out_slot, me).store_values(g, units_ref, unit)
                    return inverse * inverse_unit

                factor = inverse  # (one, so that O is multiplied once)
                if in_units:
                    factor = lax.cond(out_slot >= 0, in_own_units, lambda: inverse)
                o *= across(factor, (BLOCK, half))

                def store(parts):
                    rows = rows_of(request, row_tile)
                    parts = [part.astype(dtype) for part in parts]
                    rows.store_parts(g, o_ref, me * half, parts, q_mine.at[opaque(0)])
                    if me == 0:
                        rows.store_values(g, lse_ref, lse)

                def left(slot, i):
                    """Where part i of a piece's columns is, or goes, between CTAs."""
                    zero = opaque(0)  # (or pointers would be held)
                    first = zero + (me * half + i * 64) // BLOCK_COLUMNS
                    return po_ref.at[slot, zero + cta, pl.ds(first, 64 // BLOCK_COLUMNS)]

                def leave(parts):
                    for i, part in enumerate(parts):
                        part = part.astype(partial_dtype)
                        g.store_blocks(left(out_slot, i), part, num_queries * num_heads - row)
                    if me == 0:
                        left_rows(out_slot).store_values(g, plse_ref, lse)
                    if merges:
                        meet(request, row_tile, slots_of_tile).leave()

                def parts_of(o):
                    return tuple(o[:, c : c + 64] for c in range(0, half, 64))

                def with_others(o):
                    weights = others_inverse
                    if in_units:
                        unit = units_ref.at[next_slot, me, pl.ds(cta * BLOCK, BLOCK)]
                        weights = weights * g.load_rows(unit)
                    weights = across(weights)
                    return tuple(
                        part + g.load_blocks(left(next_slot, i)).astype(jnp.float32) * weights
                        for i, part in enumerate(parts_of(o))
                    )

                def finish(parts):
                    pl.when(out_slot < 0)(lambda: store(parts))
                    pl.when(out_slot >= 0)(lambda: leave(parts))

                if in_pairs:
                    # (Each CTA finishes the columns of its number, in a tile that they share.)
                    sends = kept & (rank != me)
                    pl.when(sends)(lambda: send(o))

                    @pl.when(~sends)
                    def _finish():
                        finish(parts_of(lax.cond(kept, lambda: o + received(), lambda: o)))
                else:
                    finish(lax.cond(kept, lambda: with_others(o), lambda: parts_of(o)))
                    if merges:
                        pl.when(kept)(meeting.end)
                plgpu.barrier_arrive(q_empty)

            for slot in (0, 1):
                release(slot)  # every slot starts free
            if rows_box < BLOCK:
                # Rows of the tile that no query fills begin finite. (No row reaches another.)
                for ref, width_ in ((q_mine, half), (q_t, rope))[: 2 - me]:
                    for c in range(0, width_, 64):
                        zeros = g.full((BLOCK, 64), 0.0, plgpu.Layout.WGMMA).astype(dtype)
                        ref.at[0, :, pl.ds(c, 64)][...] = zeros
                plgpu.commit_smem()
            plgpu.barrier_arrive(q_empty)

            def run(k, _):
                g.with_accumulators(
                    functools.partial(attend, k), accumulators, me, *accumulator_shapes
                )
                return ()

            first, stop = range_of(my_walk)
            lax.fori_loop(0, stop - first, run, ())
            plgpu.wait_smem_to_gmem(0)

        def merge_cut_tiles():
            merge_shares(
                block_parts(g, plan, kv_lora_rank, warpgroups=2),
                refs,
                piece_ref,
                range_of(my_walk),
                meet=meet,
                place=place,
                wg=g.warpgroup(),
                wgs=2,
            )

        def compute_and_merge():
            g.take_registers(tiles.registers, 0)
            lax.switch(wg, [functools.partial(compute, me) for me in (0, 1)])
            if merges:
                merge_cut_tiles()  # (One copy for both: an SM caches 128 KB of code.)

        # (Branches: what one needs isn't held through another.)
        lax.cond(wg < 2, compute_and_merge, load)

    def smem(*shape):
        return plgpu.SMEM(shape, dtype, transforms=WGMMA_OPERAND)

    def slot_free():
        if cluster > 1:
            return plgpu.ClusterBarrier(
                collective_axes=("cluster",), num_arrivals=1, num_barriers=2
            )
        return plgpu.Barrier(num_arrivals=1, num_barriers=2)

    of_pairs = [
        plgpu.SMEM((BLOCK,), jnp.float32),
        plgpu.SMEM((BLOCK,), jnp.float32),
        peer_barrier(2, interpreting=g.interpreting),  # told
        peer_barrier(1, interpreting=g.interpreting),  # sent
    ]

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(
                (num_partials, cluster, kv_lora_rank // BLOCK_COLUMNS, BLOCK * BLOCK_COLUMNS),
                partial_dtype,
            ),
            jax.ShapeDtypeStruct((num_partials, plan.rows_per_tile), jnp.float32),
            jax.ShapeDtypeStruct(
                (num_partials if in_units else 1, 2, plan.rows_per_tile), jnp.float32
            ),
        ),
        scratch_types=(
            smem(1, BLOCK, half),
            smem(1, BLOCK, half),
            smem(1, BLOCK, rope),
            smem(2, BLOCK, half),
            smem(2, BLOCK, half),
            smem(2, BLOCK, rope),
            plgpu.SMEM((2, BLOCK), jnp.float32),
            plgpu.SMEM((2, BLOCK), jnp.float32),
            plgpu.SMEM((2, OPEN + 1), jnp.int32),
            plgpu.Barrier(num_arrivals=3),  # q_full
            plgpu.Barrier(num_arrivals=2),  # q_empty
            plgpu.Barrier(num_arrivals=arrivals(page_size), num_barriers=4),
            plgpu.Barrier(num_arrivals=arrivals(page_size), num_barriers=4),
            plgpu.Barrier(num_arrivals=arrivals(page_size), num_barriers=4),
            slot_free(),
            slot_free(),
            plgpu.Barrier(num_arrivals=1, num_barriers=4),  # p_ready
            plgpu.Barrier(num_arrivals=2),  # l_ready
            *(of_pairs if in_pairs else ()),
            *g.accumulator_scratch(2, *accumulator_shapes),
        ),
        grid=(-(-plan.num_workers * cluster // 2),),
        grid_names=("group",),
        cluster=(2,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="wg",
        interpret=interpret,
        kernel_name="mla_decode",
        compiler_params=OWN_BARRIERS,
    )
    given = seq_lens if query_lens is None else query_lens
    through = counters  # (in its place stands another operand)
    if in_pairs and interpret is not None:
        shape = (len(walks[0]) // 2, 2, BLOCK, half + 2)
        through = jax.empty_ref(jax.ShapeDtypeStruct(shape, jnp.float32))
    partial_o, partial_lse, partial_units = kernel(
        q,
        pages,
        block_tables,
        seq_lens,
        given,
        *walks,
        counters,
        through,
        o_ref,
        lse_ref,
    )
    return (partial_o, partial_lse, partial_units) if in_units else (partial_o, partial_lse)
