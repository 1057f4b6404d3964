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
from pallas_kernels.hopper.primitives import Backend

ROW_GROUP = 8  # rows that a warpgroup fetches at a time: those of a swizzled tile
# float32 around it, up to 2^22 away, are whole numbers, and the bits of n more are n more. Its own
# two lowest bytes are 0, and the lowest still is after a shift by 7.
WHOLE = 1.5 * 2.0**23


def _rows_of_lanes(columns: int) -> Any:
    """Two rows a warp, 16 lanes side by side on each, which write a swizzled tile bank by bank."""
    tiling = mgpu.fragmented_array.Tiling(((ROW_GROUP, columns), (2, columns // 16)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1)


_LATENT, _ROPE = _rows_of_lanes(128), _rows_of_lanes(64)


def fetch_q(
    g: Backend, source: Any, high: Any, low: Any, rope: Any, steps: Any, *, unit: float
) -> None:
    """Rows of q to shared memory, by one warpgroup: its parts and what their steps are worth.

    `commit_smem` and a barrier must stand between this and what reads it.

    Args:
        source: bfloat16 GMEM [n, D + E], n a multiple of ROW_GROUP, D of 128 and E of 64. A thread
            holds n * D / 256 registers of it.
        high, low: int8 SMEM [n, D], tiled as `widen.INT8_OPERAND`.
        rope: bfloat16 SMEM [n, E], tiled as `primitives.WGMMA_OPERAND`.
        steps: float32 SMEM [n], gets each row's step times unit.
    """
    latent, width = high.shape[-1], source.shape[-1]
    groups = [pl.ds(row, ROW_GROUP) for row in range(0, source.shape[0], ROW_GROUP)]
    fetched = [  # all of them on their way before the first is waited for
        (
            g.load_strided(source.at[rows, pl.ds(0, latent)], _LATENT),
            g.load_strided(source.at[rows, pl.ds(latent, width - latent)], _ROPE),
        )
        for rows in groups
    ]
    for rows, (x, rest) in zip(groups, fetched, strict=True):
        step = quantize.step_of_halves(jnp.abs(x).max(axis=1))
        inverse = 1.0 / step
        in_steps = x.astype(jnp.float32) * _beside(g, inverse, x.shape, _LATENT)
        whole = lax.bitcast_convert_type(in_steps + WHOLE, jnp.int32)
        shifted = whole + quantize.HALF // 2
        high.at[rows][...] = (shifted >> quantize.HALF.bit_length() - 1).astype(jnp.int8)
        low.at[rows][...] = ((shifted & quantize.HALF - 1) - quantize.HALF // 2).astype(jnp.int8)
        in_steps = rest.astype(jnp.float32) * _beside(g, inverse, rest.shape, _ROPE)
        rope.at[rows][...] = in_steps.astype(rest.dtype)
        steps.at[rows][...] = step * unit


def _beside(g: Backend, rows: Any, shape: tuple[int, ...], layout: Any) -> Any:
    spread = lax.broadcast_in_dim(rows, shape, [0])
    return spread if g.interpreting else plgpu.layout_cast(spread, layout)
