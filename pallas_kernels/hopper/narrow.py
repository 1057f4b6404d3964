"""q's latent part from bfloat16 to int8, a scale a row, on its way to shared memory.

The counterpart of `widen`. A row's scale is `mla_jax.quantize`'s. Where that divides by the scale,
this multiplies with its inverse, which makes another step of what stands within 1e-4 of a tie; and
it rounds by an add, since float32 holds whole numbers only from 2^23 on.
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
_WHOLE = 1.5 * 2.0**23  # float32 around it are whole numbers, and their lowest byte is int8's


def _rows_of_lanes(columns: int) -> Any:
    """Two rows a warp, 16 lanes side by side on each, which write a swizzled tile bank by bank."""
    tiling = mgpu.fragmented_array.Tiling(((ROW_GROUP, columns), (2, columns // 16)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1)


_LATENT, _ROPE = _rows_of_lanes(128), _rows_of_lanes(64)


def fetch_q(g: Backend, source: Any, values: Any, scales: Any, rope: Any) -> None:
    """Rows of q to shared memory, by one warpgroup; D columns of them as values * scales[:, None].

    `commit_smem` and a barrier must stand between this and what reads it.

    Args:
        source: bfloat16 GMEM [n, D + E], n a multiple of ROW_GROUP, D of 128 and E of 64. A thread
            holds n * D / 256 registers of it.
        values: int8 SMEM [n, D], tiled as `widen.INT8_OPERAND`.
        scales: float32 SMEM [n].
        rope: bfloat16 SMEM [n, E], tiled as `primitives.WGMMA_OPERAND`.
    """
    latent, width = values.shape[-1], source.shape[-1]
    x = g.load_strided(source.at[:, pl.ds(0, latent)], _LATENT)
    rest = g.load_strided(source.at[:, pl.ds(latent, width - latent)], _ROPE)
    steps = quantize.scale_for(jnp.abs(x).max(axis=1))
    inverse = lax.broadcast_in_dim(1.0 / steps, x.shape, [0])
    if not g.interpreting:
        inverse = plgpu.layout_cast(inverse, _LATENT)
    whole = x.astype(jnp.float32) * inverse + _WHOLE
    values[...] = lax.bitcast_convert_type(whole, jnp.int32).astype(jnp.int8)
    scales[...] = steps
    rope[...] = rest
