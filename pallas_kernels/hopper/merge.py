"""Merges the partial (o, lse) of tiles that the plan has cut; the tiles left whole cost nothing.

The launch starts while the decode kernel drains (programmatic dependent launch). Two shapes of
work: with few tiles, cut into many pieces each, the warpgroups of a CTA share the pieces of one
row and meet in shared memory; with many tiles, cut into two or three, each warpgroup has rows of
its own.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.primitives import Backend

WARPGROUPS = 8
NO_KEY = -1e30


def merge(o_ref, lse_ref, partial_o, partial_lse, tile_slot_start, *, num_row_tiles, interpret=None):
    """Writes merged rows into o_ref [B, R, d_v] and lse_ref [B, R], in place.

    partial_o [slots, rows, d_v] any float dtype, partial_lse [slots, rows] float32 (natural log);
    tile_slot_start [tiles + 1] int32, tile t = request * num_row_tiles + row tile.
    """
    batch, rows_total, width = o_ref.shape
    rows_per_tile = partial_o.shape[1]
    tiles = batch * num_row_tiles
    rows = min(rows_per_tile, rows_total)
    share_pieces = tiles * rows <= 2048
    columns = 128 if share_pieces else width
    rows_per_cta = 1 if share_pieces else WARPGROUPS
    unroll = 16 if share_pieces else 2  # loads in flight
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
        row = lax.axis_index("row") * rows_per_cta + (0 if share_pieces else wg)
        request = tile // num_row_tiles
        out_row = (tile % num_row_tiles) * rows_per_tile + row
        stride = WARPGROUPS if share_pieces else 1
        begin = wg if share_pieces else 0

        def chunk(c, carry):
            m, total, acc = carry
            lses, values = [], []
            for u in range(unroll):
                i = begin + (c * unroll + u) * stride
                slot = first + jnp.minimum(i, pieces - 1)
                lses.append(jnp.where(i < pieces, plse_ref[slot, row], -jnp.inf))
                values.append(
                    g.load_strided(po_ref.at[slot, row, column], layout).astype(jnp.float32)
                )
            top = m
            for lse in lses:
                top = jnp.maximum(top, lse)
            old = jnp.exp(m - top)
            total, acc = total * old, acc * old
            for lse, value in zip(lses, values, strict=True):
                weight = jnp.exp(lse - top)
                total, acc = total + weight, acc + value * weight
            return top, total, acc

        @pl.when((pieces > 0) & (out_row < rows_total) & (row < rows))
        def _():
            mine = (pieces - begin + stride - 1) // stride
            m, total, acc = lax.fori_loop(
                0,
                (mine + unroll - 1) // unroll,
                chunk,
                (jnp.float32(NO_KEY), jnp.float32(0.0), g.full((columns,), 0.0, layout)),
            )
            if share_pieces:
                acc_smem, m_smem, total_smem, meet = scratch
                acc_smem.at[wg][...] = acc
                m_smem[wg] = m
                total_smem[wg] = total
                plgpu.barrier_arrive(meet)
                plgpu.barrier_wait(meet)
                ms = [m_smem[w] for w in range(WARPGROUPS)]
                top = ms[0]
                for other in ms[1:]:
                    top = jnp.maximum(top, other)
                weights = [jnp.exp(other - top) for other in ms]
                total, acc = jnp.float32(0.0), g.full((columns,), 0.0, layout)
                for w, weight in enumerate(weights):
                    total += weight * total_smem[w]
                    acc += g.load_strided(acc_smem.at[w], layout) * weight
                m = top

            @pl.when((wg == 0) if share_pieces else True)
            def _():
                # An invalid request has NaN in lse, and so in its weights.
                inverse = jnp.where(total == 0.0, 0.0, 1.0 / total)
                o_ref.at[request, out_row, column][...] = (acc * inverse).astype(o_ref.dtype)

                @pl.when(lax.axis_index("column") == 0)
                def _():
                    lse = jnp.where(total == 0.0, -jnp.inf, m + jnp.log(total))
                    lse_ref[request, out_row] = lse

    scratch = ()
    if share_pieces:
        scratch = (
            plgpu.SMEM((WARPGROUPS, columns), jnp.float32),
            plgpu.SMEM((WARPGROUPS,), jnp.float32),
            plgpu.SMEM((WARPGROUPS,), jnp.float32),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        )
    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=scratch,
        grid=(width // columns, -(-rows // rows_per_cta), tiles),
        grid_names=("column", "row", "tile"),
        num_threads=WARPGROUPS,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="mla_merge",
    )(partial_o, partial_lse, tile_slot_start, o_ref, lse_ref)
