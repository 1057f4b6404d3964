"""Emits wgmma for a product that needs no zeroed accumulator.

Mosaic GPU's own wgmma adds to an accumulator, which must first be zeroed in registers. It also
computes descriptors in 64 bits, which takes registers that the int8 kernels do not have.
"""

from typing import Any

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

LINE_BYTES = 128  # bytes per line of a swizzled tile
K_BYTES = 32  # bytes per line that one wgmma reads
PANEL_RANK = 3  # of refs to panels


def operand(itemsize: int) -> Any:
    """Returns tiling and swizzle of an array in shared memory that wgmma reads.

    itemsize: bytes per element.
    """
    # mypy takes the protocol's empty method for an abstract one.
    return (
        plgpu.TilingTransform((8, LINE_BYTES // itemsize)),  # type: ignore[abstract]
        plgpu.SwizzleTransform(LINE_BYTES),  # type: ignore[abstract]
    )


def panels() -> Any:
    """Returns the swizzle of panels: arrays [lines, m, 128 bytes] in shared memory.

    A panel has the layout of one column of tiles of `operand`. TMA can begin a panel at any row,
    and a column of tiles only at a multiple of 8 rows.
    """
    return (plgpu.SwizzleTransform(LINE_BYTES),)  # type: ignore[abstract]


def products(a: ir.Value, b: ir.Value) -> list[ir.Value]:
    """Starts a @ b.T, leaves it in flight and returns its accumulators, n / 2 per thread.

    a, b: SMEM refs (64, k) and (n, k), as `operand` tiles them: [m / 8, lines, 8, 128 bytes]; or
        panels [lines, m, 128 bytes].
    """
    b_type = ir.MemRefType(b.type)
    element = b_type.element_type
    if len(b_type.shape) == PANEL_RANK:
        lines, n, _ = b_type.shape
    else:
        groups, lines, *_ = b_type.shape
        n = 8 * groups
    nvvm.wgmma_fence_aligned()
    starts = [(_start_in_sixteens(tile), tile) for tile in (a, b)]
    registers: list[ir.Value] = []
    for line in range(lines):
        for offset in range(0, LINE_BYTES, K_BYTES):
            descriptors = [_descriptor(*start, line, offset) for start in starts]
            registers = _wgmma(registers, n, element, *descriptors)
    nvvm.wgmma_commit_group_sync_aligned()
    return registers


def _start_in_sixteens(tile: ir.Value) -> ir.Value:
    """Returns the address of a SMEM ref divided by 16 (i32)."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.shrui(llvm.ptrtoint(i32, mgpu.utils.memref_ptr(tile)), mgpu.utils.c(4, i32))


def _descriptor(start: ir.Value, tile: ir.Value, line: int, offset: int) -> ir.Value:
    """Returns wgmma's descriptor (i64) of a K-major SMEM ref, from byte `offset` of a line on.

    It adds in 32 bits, because Mosaic GPU's 64-bit sums take twice the registers.

    Args:
        start: from `_start_in_sixteens`.
        tile: the ref, in swizzled tiles [m / 8, lines, 8, 128 bytes] or panels.
        line: the index of the line.
        offset: a multiple of K_BYTES.
    """
    strides, _ = ir.MemRefType(tile.type).get_strides_and_offset()
    if len(strides) == PANEL_RANK:
        line_stride, group_stride = strides[0], 8 * strides[1]
    else:
        group_stride, line_stride, *_ = strides
    itemsize = mgpu.utils.bytewidth(ir.MemRefType(tile.type).element_type)
    further = line * line_stride * itemsize + offset
    place = arith.addi(start, mgpu.utils.c(further >> 4, start.type))
    swizzled_128 = 1 << 62
    constant = swizzled_128 | (group_stride * itemsize >> 4) << 32
    i64 = ir.IntegerType.get_signless(64)
    return arith.ori(arith.extui(i64, place), mgpu.utils.c(constant, i64))


def _wgmma(
    registers: list[ir.Value], n: int, element: ir.Type, a: ir.Value, b: ir.Value
) -> list[ir.Value]:
    """Returns the accumulators, n / 2 per thread, after one wgmma of K-major operands.

    Args:
        registers: the accumulators before it. An empty list stands for zeros.
        n: rows of b.
        element: the type of the operands' elements.
        a: the descriptor of operand A.
        b: the descriptor of operand B.
    """
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
