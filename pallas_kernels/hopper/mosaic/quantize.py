"""Extracts the two int8 halves of q from integers of 14 bits, several bytes per instruction."""

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.threads import array_of


def high_and_low(bits: jax.Array, layout: Any) -> tuple[jax.Array, jax.Array]:
    """Returns int8 arrays of bits 7 to 14 of each int32, and of bits 0 to 6 minus 64.

    layout: of `bits` and of the results. A thread holds neighbouring values by fours in it.
    """

    def byte_tile():
        return plgpu.ShapeDtypeStruct(bits.shape, jnp.int8, layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=(byte_tile(), byte_tile()))
    def split(ctx, whole):
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

    return split(bits)


def _bytes_of_four(values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
    """Returns the high and the low bytes of four values (i32), four bytes in each result."""
    i32 = ir.IntegerType.get_signless(32)
    result = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 2),
        values,
        "{ .reg .b32 a, b, c;"
        " prmt.b32 a, $2, $3, 0x5410;"  # the two low bytes of each value
        " prmt.b32 b, $4, $5, 0x5410;"
        " prmt.b32 c, a, b, 0x6420;"
        " and.b32 c, c, 0x7f7f7f7f;"
        " add.u32 c, c, 0x40404040;"  # no byte overflows: each is at most 127 + 64
        " xor.b32 $1, c, 0x80808080;"
        " add.u32 a, a, a;"
        " add.u32 b, b, b;"
        " prmt.b32 $0, a, b, 0x7531; }",
        "=r,=r,r,r,r,r",
    )
    return tuple(llvm.extractvalue(i32, result, [i]) for i in range(2))
