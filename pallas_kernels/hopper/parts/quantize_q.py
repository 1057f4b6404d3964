"""Quantizes q on its way to shared memory, for the kernels over an int8 cache.

Each row gets a step, a power of two. The latent part of q becomes two int8 values of 14 bits
together, q = (128 * high + low) * step, as `quantize.quantize_in_halves` defines it. Rounding q to
8 bits would cost as much accuracy as the int8 cache does. The rope part is divided by the step too,
which is exact, and stays bfloat16.

`mosaic/int8.py` is the counterpart for V.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import quantize
from pallas_kernels.hopper.mosaic.int8 import high_and_low
from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.mosaic.values import per_row
from pallas_kernels.hopper.parts.query_parts import QueryParts

ROW_GROUP = 8  # rows that a warpgroup quantizes at a time: those of a swizzled tile
# Adding this number rounds to a whole number, because float32 has no fractions between 2^23 and
# 2^24. The two lowest bytes of its bits are 0, so those of the sum are the whole number.
ROUNDING = 1.5 * 2.0**23


def _row_layout(columns: int) -> Any:
    """Returns a layout of 8 rows: two per warp, with 16 lanes side by side on each.

    Such lanes write a swizzled tile without bank conflicts.
    """
    tiling = mgpu.fragmented_array.Tiling(((ROW_GROUP, columns), (2, columns // 16)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1)


_LATENT, _ROPE = _row_layout(128), _row_layout(64)


def fetch_q(
    g: Backend,
    q: QueryParts,
    place: tuple[Any, Any],
    into: tuple[Any, Any, Any],
    begin: int,
    rows: int,
    *,
    unit: float,
) -> None:
    """Quantizes rows of q and writes them to shared memory, with one warpgroup.

    The caller runs `commit_smem` and then arrives at the barrier that the reader waits for.

    Args:
        q: bfloat16 GMEM of D + E columns, D a multiple of 128 and E of 64.
        place: the request and its first row.
        into: three SMEM refs with room for n rows: int8 [1, 2 * n, D], the high parts of n rows
            and then the low parts, tiled as `int8.INT8_OPERAND`; bfloat16 [1, n, E], the rope
            part, tiled as `primitives.WGMMA_OPERAND`; float32 [1, n], the step of each row times
            unit.
        begin: where the rows begin among these n.
        rows: their number, a multiple of ROW_GROUP.
        unit: the softmax scale, in log2 units.
    """
    halves, ropes, steps = into
    _, twice, latent = halves.shape
    q_latent, _ = q.column(0)
    q_rope, first_of_rope = q.column(latent)
    request, row = place
    groups = rows // ROW_GROUP

    def group_at(first, group):
        return pl.ds(first + pl.multiple_of(group * ROW_GROUP, ROW_GROUP), ROW_GROUP)

    def fetch(group):
        ref, ref_of_rope = (part.at[request, group_at(row, group)] for part in (q_latent, q_rope))
        x = g.load_strided(ref.at[:, pl.ds(0, latent)], _LATENT)
        return x, g.load_strided(ref_of_rope.at[:, pl.ds(first_of_rope, q.width - latent)], _ROPE)

    def write(group, x, rope):
        target = group_at(begin, group)
        step = quantize.step_of_halves(jnp.abs(x).max(axis=1))
        inverse = 1.0 / step
        in_steps = x.astype(jnp.float32) * _per_row(g, inverse, x.shape, _LATENT)
        high, low = _halves(g, in_steps)
        halves.at[0, target][...] = high
        halves.at[0, group_at(twice // 2 + begin, group)][...] = low
        in_steps = rope.astype(jnp.float32) * _per_row(g, inverse, rope.shape, _ROPE)
        ropes.at[0, target][...] = in_steps.astype(rope.dtype)
        steps.at[0, target][...] = step * unit

    if groups == 1:
        write(0, *fetch(0))
        return

    # A loop and not unrolled code: code that runs once has to be read from memory, as data does.
    def step(group, fetched):
        following = fetch(jnp.minimum(group + 1, groups - 1))
        write(group, *fetched)
        return following

    lax.fori_loop(0, groups, step, fetch(0))


def _halves(g: Backend, x: Any) -> tuple[Any, Any]:
    """Returns int8 (high, low) of float32 x: 128 * high + low = rint(x), low in -64 .. 63.

    The lowest 7 bits of rint(x) + 64 are low + 64, and the bits above are high.
    """
    bits = lax.bitcast_convert_type(x + (ROUNDING + quantize.HALF // 2), jnp.int32)
    if g.interpreting:
        high = (bits >> quantize.HALF.bit_length() - 1).astype(jnp.int8)
        return high, ((bits & quantize.HALF - 1) - quantize.HALF // 2).astype(jnp.int8)

    return high_and_low(bits, _LATENT)


def _per_row(g: Backend, values: Any, shape: tuple[int, ...], layout: Any) -> Any:
    """Returns a value per row, spread over the columns of an array."""
    spread = per_row(values, shape)
    return spread if g.interpreting else plgpu.layout_cast(spread, layout)
