"""Merges the partial (o, lse) of tiles that the plan has cut; tiles left whole cost nothing.

The launch starts while the decode kernel drains (programmatic dependent launch). Two shapes of
work, told apart by the shape alone: a few rows, cut into many pieces each, where the warpgroups of
a CTA share the pieces of one row and meet in shared memory; or many rows, cut into two or three,
where a warpgroup has a few rows of its own. Both keep many wide loads in flight.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.split_kv import SplitPlan
from pallas_kernels.hopper.primitives import Backend
from pallas_kernels.hopper.walk import NO_KEY

FEW_ROWS = 144  # up to here a row has a CTA of its own, for every 128 columns


def merge(
    o_ref: Any,
    lse_ref: Any,
    partial_o: Any,
    partial_lse: Any,
    plan: SplitPlan,
    *,
    interpret: Any = None,
) -> None:
    """Writes merged rows into o_ref [B, R, d_v] and lse_ref [B, R], in place.

    Args:
        partial_o: [slots, rows, d_v], any float dtype.
        partial_lse: [slots, rows] float32, natural log.
        plan: whose slots these are. A fixed plan's rows are merged in one way whatever the batch.
    """
    _, rows_total, width = o_ref.shape
    rows_per_tile = partial_o.shape[1]
    tiles, num_row_tiles = plan.num_tiles, plan.num_row_tiles
    rows = min(rows_per_tile, rows_total)
    shared = tiles * rows <= FEW_ROWS and not plan.fixed
    warpgroups = 8 if shared else 4
    columns = 128 if shared else width
    group = 1 if shared else 4  # rows of a warpgroup
    unroll = 16 if shared else 2  # pieces loaded at a time
    g = Backend(interpreting=interpret is not None)
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // 128)

    def body(po_ref, plse_ref, start_ref, o_ref, lse_ref, *scratch):
        wg = lax.axis_index("wg")
        tile = lax.axis_index("tile")
        column = pl.ds(lax.axis_index("column") * columns, columns)
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        first = start_ref[tile]
        pieces = start_ref[tile + 1] - first
        request = tile // num_row_tiles
        tile_row = (tile % num_row_tiles) * rows_per_tile
        lane = 0 if shared else wg
        top_row = (lax.axis_index("row") * (1 if shared else warpgroups) + lane) * group
        begin, stride = (wg, warpgroups) if shared else (0, 1)
        # Rows past the last one are read again and not written.
        spare_rows = jnp.minimum(rows, rows_total - tile_row) - 1
        mine = [jnp.minimum(top_row + i, spare_rows) for i in range(group)]

        def chunk(c, carry):
            states = []
            for (m, total, acc), row in zip(carry, mine, strict=True):
                lses, values = [], []
                for u in range(unroll):
                    i = begin + (c * unroll + u) * stride
                    slot = first + jnp.minimum(i, pieces - 1)
                    lses.append(jnp.where(i < pieces, plse_ref[slot, row], -jnp.inf))
                    value = g.load_strided(po_ref.at[slot, row, column], layout)
                    values.append(value.astype(jnp.float32))
                states.append((m, total, acc, lses, values))
            return tuple(combine(*state) for state in states)

        def combine(m, total, acc, lses, values):
            top = m
            for lse in lses:
                top = jnp.maximum(top, lse)
            old = jnp.exp(m - top)
            total, acc = total * old, acc * old
            for lse, value in zip(lses, values, strict=True):
                weight = jnp.exp(lse - top)
                total, acc = total + weight, acc + value * weight
            return top, total, acc

        def write(row, m, total, acc):
            inverse = jnp.where(total == 0.0, 0.0, 1.0 / total)
            o_ref.at[request, tile_row + row, column][...] = (acc * inverse).astype(o_ref.dtype)

            @pl.when(lax.axis_index("column") == 0)
            def _():
                lse = jnp.where(total == 0.0, -jnp.inf, m + jnp.log(total))
                lse_ref[request, tile_row + row] = lse

        @pl.when((pieces > 0) & (top_row <= spare_rows))
        def _():
            empty = (jnp.float32(NO_KEY), jnp.float32(0.0), g.full((columns,), 0.0, layout))
            chunks = ((pieces - begin + stride - 1) // stride + unroll - 1) // unroll
            states = lax.fori_loop(0, chunks, chunk, (empty,) * group)
            if not shared:
                for i, (row, state) in enumerate(zip(mine, states, strict=True)):
                    pl.when(top_row + i <= spare_rows)(functools.partial(write, row, *state))
                return
            acc_smem, m_smem, total_smem, meet = scratch
            m_smem[wg], total_smem[wg], acc_smem.at[wg][...] = states[0]
            plgpu.barrier_arrive(meet)
            plgpu.barrier_wait(meet)

            @pl.when(wg == 0)
            def _():
                parts = range(warpgroups)
                ms = [m_smem[w] for w in parts]
                top = ms[0]
                for other in ms[1:]:
                    top = jnp.maximum(top, other)
                total, acc = jnp.float32(0.0), g.full((columns,), 0.0, layout)
                for w in parts:
                    weight = jnp.exp(ms[w] - top)
                    total += weight * total_smem[w]
                    acc += g.load_strided(acc_smem.at[w], layout) * weight
                write(mine[0], top, total, acc)

    scratch: tuple = ()
    if shared:
        scratch = (
            plgpu.SMEM((warpgroups, columns), jnp.float32),
            plgpu.SMEM((warpgroups,), jnp.float32),
            plgpu.SMEM((warpgroups,), jnp.float32),
            plgpu.Barrier(num_arrivals=warpgroups),
        )
    rows_per_cta = group * (1 if shared else warpgroups)
    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=scratch,
        grid=(width // columns, -(-rows // rows_per_cta), tiles),
        grid_names=("column", "row", "tile"),
        num_threads=warpgroups,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="mla_merge",
    )(partial_o, partial_lse, plan.tile_slot_start, o_ref, lse_ref)
