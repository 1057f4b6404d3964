"""wgmma by its instruction: a product that needs no accumulator filled first.

Mosaic's own adds to an accumulator, which has to be zeroed in registers before, and computes
descriptors in 64 bits, which takes registers that the int8 kernels do not have.
"""

from typing import Any

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

LINE_BYTES, K_BYTES = 128, 32  # a line of a swizzled tile, and what one wgmma takes of it


def operand(itemsize: int) -> Any:
    """How shared memory holds what wgmma reads, of items of so many bytes."""
    return (  # (mypy takes the protocol's empty method for abstract.)
        plgpu.TilingTransform((8, LINE_BYTES // itemsize)),  # type: ignore[abstract]
        plgpu.SwizzleTransform(LINE_BYTES),  # type: ignore[abstract]
    )


def products(a: ir.Value, b: ir.Value) -> list[ir.Value]:
    """The accumulators (n / 2 a thread) of a @ b.T, left in flight.

    a, b: SMEM refs (64, k) and (n, k), as `operand` tiles them: [m / 8, lines, 8, 128 bytes].
    """
    (rows, lines, *_), element = ir.MemRefType(b.type).shape, ir.MemRefType(b.type).element_type
    nvvm.wgmma_fence_aligned()
    starts = [(_sixteens(tile), tile) for tile in (a, b)]
    registers: list[ir.Value] = []
    for line in range(lines):
        for offset in range(0, LINE_BYTES, K_BYTES):
            descriptors = [_descriptor(*start, line, offset) for start in starts]
            registers = _wgmma(registers, 8 * rows, element, *descriptors)
    nvvm.wgmma_commit_group_sync_aligned()
    return registers


def _sixteens(tile: ir.Value) -> ir.Value:
    """Where (i32, in 16 bytes) a SMEM ref begins."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.shrui(llvm.ptrtoint(i32, mgpu.utils.memref_ptr(tile)), mgpu.utils.c(4, i32))


def _descriptor(start: ir.Value, tile: ir.Value, line: int, offset: int) -> ir.Value:
    """Of a SMEM ref in swizzled tiles [m / 8, lines, 8, 128 bytes], K-major, from a byte of a line
    on, for wgmma. (By 32-bit sums: Mosaic's own take twice the registers.)"""
    i64 = ir.IntegerType.get_signless(64)
    (down, across, *_), _ = ir.MemRefType(tile.type).get_strides_and_offset()
    itemsize = mgpu.utils.bytewidth(ir.MemRefType(tile.type).element_type)
    further = line * across * itemsize + offset
    place = arith.addi(start, mgpu.utils.c(further >> 4, start.type))
    swizzled_128 = 1 << 62
    constant = swizzled_128 | (down * itemsize >> 4) << 32
    return arith.ori(arith.extui(i64, place), mgpu.utils.c(constant, i64))


def _wgmma(
    registers: list[ir.Value], n: int, element: ir.Type, a: ir.Value, b: ir.Value
) -> list[ir.Value]:
    """The accumulators (n / 2 a thread) after a wgmma of K-major operands; [] before the first."""
    if element == ir.IntegerType.get_signless(8):
        shape, kind, signs = f"m64n{n}k32.s32.s8.s8", "r", ""
        field: ir.Type = ir.IntegerType.get_signless(32)
    else:
        shape, kind, signs = f"m64n{n}k16.f32.{element}.{element}", "f", ", 1, 1, 0, 0"
        field = ir.F32Type.get()
    count, kept = n // 2, len(registers)
    names = ", ".join(f"${i}" for i in range(count))
    result = llvm.inline_asm(
        llvm.StructType.get_literal([field] * count),
        [*registers, a, b],
        f"{{ .reg .pred p; setp.ne.b32 p, {int(kept > 0)}, 0;"
        f" wgmma.mma_async.sync.aligned.{shape} {{{names}}},"
        f" ${count + kept}, ${count + kept + 1}, p{signs}; }}",
        ",".join([f"={kind}"] * count + [str(i) for i in range(kept)] + ["l", "l"]),
        has_side_effects=True,
    )
    return [llvm.extractvalue(field, result, [i]) for i in range(count)]
