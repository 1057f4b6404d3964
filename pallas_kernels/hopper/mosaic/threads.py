"""Layouts of arrays in registers, and what each thread computes about its own part of them.

A warpgroup holds a (64, n) WGMMA tile as follows. Warp w holds rows 16 w to 16 w + 15. In each
block of 8 columns a lane holds two neighbouring columns of two rows that are 8 rows apart.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.wgmma import operand, panels

WGMMA_OPERAND = operand(2)  # tiling and swizzle of a 16-bit array in shared memory
PANELS = panels()  # swizzle of 16-bit panels [k / 64, rows, 64] in shared memory
CHUNK_BYTES = 16  # what a thread copies at once, and the unit that swizzling permutes

ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a (64, n) WGMMA tile
SCALAR = plgpu.Layout.WG_SPLAT(())
THREADS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)  # one value per thread of a warpgroup


@dataclasses.dataclass(frozen=True)
class Mode:
    """The base class of all groups of primitives.

    interpreting: whether the kernel runs in the interpreter on a CPU. False emits instructions.
    """

    interpreting: bool


def thread() -> ir.Value:
    """Returns this thread's index (i32) in its warpgroup, 0 to 127."""
    return arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(128, ir.IntegerType.get_signless(32)))


def first_row_of_warp() -> ir.Value:
    """Returns the first row (i32) of a WGMMA tile that this warp holds."""
    constant, mine = mgpu.utils.c, thread()
    warp = arith.divui(mine, constant(32, mine.type))
    return arith.muli(warp, constant(16, mine.type))


def place_in_tile() -> tuple[ir.Value, ir.Value]:
    """Returns row and column (i32) of the first element of a WGMMA tile that a thread holds."""
    constant, mine = mgpu.utils.c, thread()
    lane = arith.remui(mine, constant(32, mine.type))
    row = arith.addi(first_row_of_warp(), arith.divui(lane, constant(4, mine.type)))
    return row, arith.muli(arith.remui(lane, constant(4, mine.type)), constant(2, mine.type))


def own_four() -> ir.Value:
    """Returns the index (i32) of a thread's four neighbouring values in a block of 512."""
    mine = thread()
    return arith.muli(mine, mgpu.utils.c(4, mine.type))


def transposed_in_quads(words: Sequence[ir.Value]) -> list[ir.Value]:
    """Returns four words (i32): word i of lane c of a quad is what lane i had as its word c.

    All lanes of a warp run this. A quad is four lanes, of which a WGMMA tile has the same rows.
    """
    constant, mine = mgpu.utils.c, thread()
    words = list(words)
    for bit in (1, 2):
        is_set = arith.cmpi(
            arith.CmpIPredicate.ne,
            arith.andi(mine, constant(bit, mine.type)),
            constant(0, mine.type),
        )
        for low in (i for i in range(4) if not i & bit):
            high = low | bit
            sent = arith.select(is_set, words[low], words[high])
            got = nvvm.shfl_sync(
                constant(-1, mine.type),
                sent,
                constant(bit, mine.type),
                constant(31, mine.type),
                nvvm.ShflKind.bfly,
            )
            words[low] = arith.select(is_set, got, words[low])
            words[high] = arith.select(is_set, words[high], got)
    return words


def element_pointer(ref: ir.Value, index: ir.Value) -> ir.Value:
    """Returns a pointer to element `index` (i32) of a ref, counted from its first element."""
    start = mgpu.utils.memref_ptr(ref)
    if ir.MemRefType(ref.type).memory_space is None:  # in GMEM
        start = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), start)
    return mgpu.utils.getelementptr(start, [index], ir.MemRefType(ref.type).element_type)


def array_of(
    registers: Sequence[ir.Value], shape: tuple[int, ...], layout: Any, is_signed: Any = None
) -> mgpu.FragmentedArray:
    """Returns a Mosaic GPU array made of these registers, in the layout's order."""
    array = np.empty(layout.registers_shape(shape), dtype=object)
    array.flat[:] = registers
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=is_signed)


def scalar_of(register: ir.Value) -> ir.Value:
    """Returns the value of a register that holds one value, as a scalar or as a vector."""
    is_vector = isinstance(register.type, ir.VectorType)
    return vector.extract(register, [], [0]) if is_vector else register


def opaque(number: int) -> ir.Value:
    """Returns a constant (i32) that the compiler can't see. A loop up to it is not unrolled."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [], f"mov.u32 $0, {number};", "=r", has_side_effects=True)


def read_number(ptx: str) -> jax.Array:
    """Returns the i32 that these instructions leave in $0. The compiler does not move them."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR))
    def read(ctx):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        number = llvm.inline_asm(i32, [], ptx, "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(number, shape=(), is_signed=True)

    return read()
