"""q from bfloat16 to two int8 and a rope part, in steps of each row, on its way to shared memory.

The counterpart of `widen`. Two int8 are q's latent part in 14 bits (`quantize.quantize_in_halves`):
what 8 bits lose of q costs as much as the int8 cache does. Steps are powers of two, so the rope
part can be in units of them as well, as it is. Rounding is by an add, since float32 holds whole
numbers only from 2^23 on.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import quantize
from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.mosaic.quantize import high_and_low

ROW_GROUP = 8  # rows that a warpgroup rounds at a time: those of a swizzled tile
# float32 around it, up to 2^22 away, are whole numbers, and the bits of n more are n more. Its own
# two lowest bytes are 0.
WHOLE = 1.5 * 2.0**23


def _rows_of_lanes(columns: int) -> Any:
    """Two rows a warp, 16 lanes side by side on each, which write a swizzled tile bank by bank."""
    tiling = mgpu.fragmented_array.Tiling(((ROW_GROUP, columns), (2, columns // 16)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1)


_LATENT, _ROPE = _rows_of_lanes(128), _rows_of_lanes(64)


def fetch_q(
    g: Backend,
    q_ref: Any,
    place: tuple[Any, Any],
    into: tuple[Any, Any, Any],
    begin: int,
    rows: int,
    *,
    unit: float,
) -> None:
    """Rows of q to shared memory, by one warpgroup: its parts and what their steps are worth.

    `commit_smem` and a barrier must stand between this and what reads it.

    Args:
        q_ref: bfloat16 GMEM [B, R, D + E], D a multiple of 128 and E of 64.
        place: the request and the first row.
        into: int8 SMEM [1, 2 * n, D], high of n rows and then low, tiled as `widen.INT8_OPERAND`;
            rope bfloat16 SMEM [1, n, E], tiled as `primitives.WGMMA_OPERAND`; and float32 SMEM
            [1, n], a row's step times unit.
        begin: the first of these n rows.
        rows: how many, a multiple of ROW_GROUP.
    """
    halves, ropes, steps = into
    _, twice, latent = halves.shape
    request, row = place
    groups = rows // ROW_GROUP

    def group_at(first, group):
        return pl.ds(first + pl.multiple_of(group * ROW_GROUP, ROW_GROUP), ROW_GROUP)

    def fetch(group):
        ref = q_ref.at[request, group_at(row, group)]
        x = g.load_strided(ref.at[:, pl.ds(0, latent)], _LATENT)
        return x, g.load_strided(ref.at[:, pl.ds(latent, ref.shape[1] - latent)], _ROPE)

    def write(group, x, rest):
        mine = group_at(begin, group)
        step = quantize.step_of_halves(jnp.abs(x).max(axis=1))
        inverse = 1.0 / step
        in_steps = x.astype(jnp.float32) * _beside(g, inverse, x.shape, _LATENT)
        high, low = _halves(g, in_steps)
        halves.at[0, mine][...] = high
        halves.at[0, group_at(twice // 2 + begin, group)][...] = low
        in_steps = rest.astype(jnp.float32) * _beside(g, inverse, rest.shape, _ROPE)
        ropes.at[0, mine][...] = in_steps.astype(rest.dtype)
        steps.at[0, mine][...] = step * unit

    if groups == 1:
        write(0, *fetch(0))
        return

    # (A loop: code that runs once waits for memory as data does.)
    def turn(group, fetched):
        following = fetch(jnp.minimum(group + 1, groups - 1))
        write(group, *fetched)
        return following

    lax.fori_loop(0, groups, turn, fetch(0))


def _halves(g: Backend, x: Any) -> tuple[Any, Any]:
    """int8 high and low of float32 x: 128 * high + low = rint(x), low in -64 .. 63.

    Two bytes of rint(x) + 64 hold low + 64 in 7 bits, and high above.
    """
    bits = lax.bitcast_convert_type(x + (WHOLE + quantize.HALF // 2), jnp.int32)
    if g.interpreting:
        high = (bits >> quantize.HALF.bit_length() - 1).astype(jnp.int8)
        return high, ((bits & quantize.HALF - 1) - quantize.HALF // 2).astype(jnp.int8)

    return high_and_low(bits, _LATENT)


def _beside(g: Backend, rows: Any, shape: tuple[int, ...], layout: Any) -> Any:
    spread = lax.broadcast_in_dim(rows, shape, [0])
    return spread if g.interpreting else plgpu.layout_cast(spread, layout)
