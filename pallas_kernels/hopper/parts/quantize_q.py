"""q from bfloat16 to two int8 and a rope part, in steps of each row, on its way to shared memory.

The counterpart of `widen`. Two int8 are q's latent part in 14 bits (`quantize.quantize_in_halves`):
what 8 bits lose of q costs as much as the int8 cache does. Steps are powers of two, so the rope
part can be in units of them as well, as it is. Rounding is by an add, since float32 holds whole
numbers only from 2^23 on.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import quantize
from pallas_kernels.hopper.mosaic.primitives import Backend, array_of

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

    def byte_tile():
        return plgpu.ShapeDtypeStruct(x.shape, jnp.int8, _LATENT)

    @plgpu.inline_mgpu(arg_types=(_LATENT,), return_type=(byte_tile(), byte_tile()))
    def part(ctx, whole):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        parts: tuple[list, list] = ([], [])
        for register in whole.registers.flat:
            count = ir.VectorType(register.type).shape[0]
            fours = [_bytes_of_four([vector.extract(register, [], [i + k]) for k in range(4)])
                     for i in range(0, count, 4)]  # fmt: skip
            for found, words in zip(parts, zip(*fours, strict=True), strict=True):
                packed = vector.from_elements(ir.VectorType.get((len(words),), i32), words)
                bytes_ = ir.VectorType.get((count,), ir.IntegerType.get_signless(8))
                found.append(vector.bitcast(bytes_, packed))
        return tuple(array_of(found, whole.shape, whole.layout, is_signed=True) for found in parts)

    return part(bits)


def _bytes_of_four(values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
    """High and low of four values, four bytes each: bits 7 to 14, and bits 0 to 6 less 64."""
    i32 = ir.IntegerType.get_signless(32)
    result = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 2),
        values,
        "{ .reg .b32 a, b, c;"
        " prmt.b32 a, $2, $3, 0x5410;"  # two bytes of each
        " prmt.b32 b, $4, $5, 0x5410;"
        " prmt.b32 c, a, b, 0x6420;"
        " and.b32 c, c, 0x7f7f7f7f;"
        " add.u32 c, c, 0x40404040;"  # no byte overflows: up to 127 + 64
        " xor.b32 $1, c, 0x80808080;"
        " add.u32 a, a, a;"
        " add.u32 b, b, b;"
        " prmt.b32 $0, a, b, 0x7531; }",
        "=r,=r,r,r,r,r",
    )
    return tuple(llvm.extractvalue(i32, result, [i]) for i in range(2))


def _beside(g: Backend, rows: Any, shape: tuple[int, ...], layout: Any) -> Any:
    spread = lax.broadcast_in_dim(rows, shape, [0])
    return spread if g.interpreting else plgpu.layout_cast(spread, layout)
