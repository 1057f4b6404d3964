"""q's latent part from bfloat16 to one int8 or two, a scale a row, on its way to shared memory.

The counterpart of `widen`. Two int8 are q in 15 bits, 128 * high + low: what 8 bits lose of q costs
as much as the int8 cache does (`mla_jax.quantize.quantize_in_halves`). A row's scale is
`mla_jax.quantize`'s. Where that divides by the scale, this multiplies with its inverse, which makes
another step of what stands within 1e-4 (of 15 bits: 3e-3) of a tie; and it rounds by an add, since
float32 holds whole numbers only from 2^23 on.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import quantize
from pallas_kernels.hopper.primitives import Backend

ROW_GROUP = 8  # rows that a warpgroup fetches at a time: those of a swizzled tile
# float32 around it are whole numbers, and the bits of n more are n more. Its own two lowest bytes
# are 0, and the lowest still is after a shift by 7.
_WHOLE = 1.5 * 2.0**23


def _rows_of_lanes(columns: int) -> Any:
    """Two rows a warp, 16 lanes side by side on each, which write a swizzled tile bank by bank."""
    tiling = mgpu.fragmented_array.Tiling(((ROW_GROUP, columns), (2, columns // 16)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1)


_LATENT, _ROPE = _rows_of_lanes(128), _rows_of_lanes(64)


def fetch_q(g: Backend, source: Any, parts: Sequence[Any], scales: Any, rope: Any) -> None:
    """Rows of q to shared memory, by one warpgroup; D columns of them as int8 times a scale.

    `commit_smem` and a barrier must stand between this and what reads it.

    Args:
        source: bfloat16 GMEM [n, D + E], n a multiple of ROW_GROUP, D of 128 and E of 64. A thread
            holds n * D / 256 registers of it.
        parts: int8 SMEM [n, D], tiled as `widen.INT8_OPERAND`: one, or (high, low) of 15 bits.
        scales: float32 SMEM [n], what a step of the last part is worth.
        rope: bfloat16 SMEM [n, E], tiled as `primitives.WGMMA_OPERAND`.
    """
    latent, width = parts[0].shape[-1], source.shape[-1]
    groups = [pl.ds(row, ROW_GROUP) for row in range(0, source.shape[0], ROW_GROUP)]
    fetched = [  # all of them on their way before the first is waited for
        (
            g.load_strided(source.at[rows, pl.ds(0, latent)], _LATENT),
            g.load_strided(source.at[rows, pl.ds(latent, width - latent)], _ROPE),
        )
        for rows in groups
    ]
    for rows, (x, rest) in zip(groups, fetched, strict=True):
        steps = quantize.scale_for(jnp.abs(x).max(axis=1)) * quantize.HALF ** (1.0 - len(parts))
        inverse = lax.broadcast_in_dim(1.0 / steps, x.shape, [0])
        if not g.interpreting:
            inverse = plgpu.layout_cast(inverse, _LATENT)
        whole = lax.bitcast_convert_type(x.astype(jnp.float32) * inverse + _WHOLE, jnp.int32)
        if len(parts) == 2:
            shifted = whole + quantize.HALF // 2
            high = shifted >> quantize.HALF.bit_length() - 1
            whole = (shifted & (quantize.HALF - 1)) - quantize.HALF // 2
            parts[0].at[rows][...] = high.astype(jnp.int8)
        parts[-1].at[rows][...] = whole.astype(jnp.int8)
        scales.at[rows][...] = steps
        rope.at[rows][...] = rest
