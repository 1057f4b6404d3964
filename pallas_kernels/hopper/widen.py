"""Primitives of the int8 decode kernel: V^T widened from int8 to bfloat16 on its way to wgmma.

wgmma can't read 8-bit operands transposed, so O^T = V^T P^T needs V^T in 16 bits. It goes through
registers, as operand A, and never back to shared memory: `ldmatrix.trans` hands each thread pairs
of neighbouring dimensions of two neighbouring tokens, four bytes, which are two of the registers
that operand A wants (two tokens of one dimension each) once the bytes are spread.

Spreading: byte ^ 0x80 is u = x + 128 in 0 .. 255, and the bfloat16 with bits 0x00uu is u * 2^-133
(a subnormal, or one of the first binade above, which lie on one line). One fused multiply-add gives
(u - 128) / 64 = x / 64, exactly. So V comes out in units of WIDENED_UNIT.

The rows of O^T come in an order of their own, that of `dimension`; `store_dimensions` undoes it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.quantize import HALF
from pallas_kernels.hopper.primitives import ROWS
from pallas_kernels.hopper.transposed import COLUMNS, TransposedBackend

# How shared memory holds int8 that wgmma reads.
INT8_OPERAND = (
    plgpu.TilingTransform((8, 128)),  # type: ignore[abstract]
    plgpu.SwizzleTransform(128),  # type: ignore[abstract]
)
WIDENED_UNIT = 2.0**-6  # what a step of int8 is worth after widening
GROUP = 64  # rows of O^T that one wgmma makes
TOKENS = 64  # of a block
EARLY_QUERIES = 32  # of a tile, at most
_BYTES = (GROUP * TOKENS // 4,)  # int32, the shape of what `_bytes` gives
_BYTES_LAYOUT = plgpu.Layout.WG_STRIDED(_BYTES, vec_size=1)


def _thread_of_warpgroup() -> tuple[ir.Value, ir.Value]:
    """Warp (0 .. 3) and lane, i32."""
    constant, i32 = mgpu.utils.c, ir.IntegerType.get_signless(32)
    thread = arith.remui(mgpu.utils.thread_idx(), constant(128, i32))
    return arith.divui(thread, constant(32, i32)), arith.remui(thread, constant(32, i32))


def _array(registers, shape, layout, is_signed=None) -> mgpu.FragmentedArray:
    array = np.empty(layout.registers_shape(shape), dtype=object)
    array.flat[:] = registers
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=is_signed)


def _ldmatrix_transposed(address: ir.Value) -> list[ir.Value]:
    """Four 8 x 8 matrices of byte pairs, transposed: i32 each; row addresses from 32 lanes."""
    i32 = ir.IntegerType.get_signless(32)
    result = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 4),
        [address],
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32, result, [i]) for i in range(4)]


def _spread(four: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Bytes 0 and 2, and bytes 1 and 3, of signed x, as bfloat16 pairs of x * WIDENED_UNIT."""
    i32 = ir.IntegerType.get_signless(32)
    result = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 2),
        [four],
        "{ .reg .b32 biased, even, odd, times, minus;"
        " xor.b32 biased, $2, 0x80808080;"
        " and.b32 even, biased, 0x00ff00ff;"
        " prmt.b32 odd, biased, 0, 0x4341;"
        " mov.b32 times, 0x7f007f00;"  # 2^127
        " mov.b32 minus, 0xc000c000;"  # -2
        " fma.rn.bf16x2 $0, even, times, minus;"
        " fma.rn.bf16x2 $1, odd, times, minus; }",
        "=r,=r,r",
    )
    return tuple(llvm.extractvalue(i32, result, [i]) for i in range(2))


@dataclasses.dataclass(frozen=True)
class WideningBackend(TransposedBackend):
    """`TransposedBackend` with int8 products and widening."""

    def with_score_accumulators(self, run, scratch, thread: int, *shapes):
        """What run(*accumulators) returns; the last two are for scores of int8 (int32) and of rope
        keys, the others, if any, for O^T; all but that one are float32."""
        if self.interpreting:
            return run(*(ref.at[thread] for ref in scratch))
        dtypes = [jnp.float32] * len(shapes)
        dtypes[-2] = jnp.int32
        refs = (plgpu.ACC(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        return pl.run_scoped(run, *refs)

    def zero_integers(self, acc) -> None:
        zeros = jnp.zeros(acc.shape, acc.dtype)
        acc[...] = zeros if self.interpreting else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)

    def mma_t_in_parts(self, acc, products) -> None:
        """acc += a @ b.T of int8 (a, b), then of each next pair with HALF times what there is.

        The last one is left in flight. One int32 holds it all, exactly: see `quantize_in_halves`.
        """
        for i, (a, b) in enumerate(products):
            if i:
                self.wait_mma(0)
                acc[...] = self.read(acc) * HALF
            self.mma_t(acc, a, b)

    def iota_rows(self, count: int) -> jax.Array:
        """0, 1, ... beside the rows of a tile."""
        layout = None if self.interpreting else ROWS
        return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)

    def load_columns(self, ref) -> jax.Array:
        """(n,) beside the columns of a (64, n) tile."""
        return ref[...] if self.interpreting else plgpu.load(ref, layout=COLUMNS, optimized=False)

    def mma_widened(self, accs, v, p, first_group: int = 0) -> None:
        """O^T += V^T P^T, the last product left in flight where n is up to EARLY_QUERIES.

        accs: O^T in parts from group first_group on, (m, n) each, m a multiple of GROUP, in
        units of WIDENED_UNIT; v: int8 SMEM (TOKENS, d_v), tiled as INT8_OPERAND; p: bfloat16
        SMEM (n, TOKENS). Up to EARLY_QUERIES a group of rows is widened while the one before is
        multiplied; beside more of O^T there are no registers for two groups.
        """
        if self.interpreting:
            first = GROUP * first_group
            for acc in accs:
                m = acc.shape[0]
                part = v[:, first : first + m].astype(jnp.float32).T * WIDENED_UNIT
                p_t = p[...].astype(jnp.float32).T
                acc[...] = acc[...] + jnp.dot(part, p_t, precision="highest")
                first += m
            return
        places = [
            acc.at[pl.ds(row, GROUP)] for acc in accs for row in range(0, acc.shape[0], GROUP)
        ]
        # Where O^T leaves registers for it, bytes come in a step ahead of their widening.
        early = p.shape[0] <= EARLY_QUERIES
        following = self._bytes(v, first_group)
        for group, place in enumerate(places, first_group + 1):
            mine, more = following, group < first_group + len(places)
            if more and early:
                following = self._bytes(v, group)
            plgpu.wgmma(place, self._widened(mine), p.transpose((1, 0)))
            if more and not early:
                following = self._bytes(v, group)
            plgpu.wgmma_wait(1 if early else 0)  # until the registers of a group are free

    def _bytes(self, ref, group: int) -> jax.Array:
        """The bytes of rows 64 * group .. of V^T as `_widened` takes them, 8 registers a thread.

        A row of V^T is a dimension: all of them once over the groups, in the order that
        `store_dimensions` knows.
        """

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(INT8_OPERAND),),
            return_type=plgpu.ShapeDtypeStruct(_BYTES, jnp.int32, _BYTES_LAYOUT),
        )
        def load(ctx, tile):
            del ctx
            i32, constant = ir.IntegerType.get_signless(32), mgpu.utils.c
            one = ir.VectorType.get((1,), i32)
            (tokens_down, tile_across, *_), _ = ir.MemRefType(tile.type).get_strides_and_offset()
            warp, lane = _thread_of_warpgroup()
            matrix, token = (f(lane, constant(8, i32)) for f in (arith.divui, arith.remui))
            # Lane 8q + r gives the address of 16 bytes of token 8q + r, where the swizzle has
            # them: a warp's 128 columns are one swizzled tile, and `group` counts chunks in it.
            chunk = arith.xori(token, constant(group, i32))
            offset = arith.addi(
                arith.addi(arith.muli(matrix, constant(tokens_down, i32)),
                           arith.muli(warp, constant(tile_across, i32))),
                arith.addi(arith.muli(token, constant(128, i32)),
                           arith.muli(chunk, constant(16, i32))),
            )  # fmt: skip
            address = arith.addi(llvm.ptrtoint(i32, mgpu.utils.memref_ptr(tile)), offset)
            registers = []
            for first in range(0, TOKENS // 8, 4):
                here = arith.addi(address, constant(first * tokens_down, i32))
                registers += [vector.broadcast(one, x) for x in _ldmatrix_transposed(here)]
            return _array(registers, _BYTES, _BYTES_LAYOUT.to_mgpu(), is_signed=True)

        return load(ref)

    def _widened(self, four_bytes) -> jax.Array:
        """64 rows of V^T, bfloat16 in units of WIDENED_UNIT: (GROUP, TOKENS) for operand A."""
        shape = (GROUP, TOKENS)

        @plgpu.inline_mgpu(
            arg_types=(_BYTES_LAYOUT,),
            return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, plgpu.Layout.WGMMA),
        )
        def widen(ctx, packed):
            del ctx
            pair = ir.VectorType.get((2,), ir.BF16Type.get())
            registers = [
                llvm.bitcast(pair, bits)
                for four in packed.registers.flat
                for bits in _spread(vector.extract(four, [], [0]))
            ]
            return _array(registers, shape, mgpu.fragmented_array.WGMMA_LAYOUT)

        return widen(four_bytes)

    def store_dimensions(self, ref, value, first_group: int) -> None:
        """The rows of O^T from groups first_group .., (m, n), to row-major GMEM ref (n, d_v)."""
        m, n = value.shape
        if self.interpreting:
            ref[:, GROUP * first_group : GROUP * first_group + m] = value.T
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
        def store(ctx, target, tile):
            del ctx
            i32, constant = ir.IntegerType.get_signless(32), mgpu.utils.c
            (stride, _), _ = ir.MemRefType(target.type).get_strides_and_offset()
            warp, lane = _thread_of_warpgroup()
            query = arith.muli(arith.remui(lane, constant(4, i32)), constant(2, i32))
            dimension = arith.addi(
                arith.muli(warp, constant(128, i32)),
                arith.muli(arith.divui(lane, constant(4, i32)), constant(2, i32)),
            )
            first = arith.addi(arith.muli(query, constant(stride, i32)), dimension)
            start = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), mgpu.utils.memref_ptr(target))
            start = mgpu.utils.getelementptr(start, [first], tile.mlir_dtype)
            registers = tile.registers.reshape(m // GROUP, n // 8, 2)
            for i in range(m // GROUP):
                for j in range(n // 8):
                    for lane_pair in range(2):
                        both = [
                            vector.extract(registers[i, j, h], [], [lane_pair]) for h in range(2)
                        ]
                        value = vector.from_elements(ir.VectorType.get((2,), tile.mlir_dtype), both)
                        offset = (8 * j + lane_pair) * stride + 16 * (first_group + i)
                        place = mgpu.utils.getelementptr(start, [offset], tile.mlir_dtype)
                        llvm.store(value, place)

        store(ref, value)

    # -- between two warpgroups -----------------------------------------------------------------
    def hand_over(self, ref, value) -> None:
        """An (m, n) WGMMA tile to float32 SMEM ref (n, m), for `take_over` alone to read."""
        if self.interpreting:
            ref[...] = value.T
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
        def write(ctx, target, tile):
            del ctx
            for place, register in zip(_own_places(target), tile.registers.flat, strict=True):
                vector.store(register, target, place)

        write(ref, value)

    def take_over(self, ref) -> jax.Array:
        """What another warpgroup's `hand_over` has put there."""
        if self.interpreting:
            return ref[...].T
        n, m = ref.shape

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),),
            return_type=plgpu.ShapeDtypeStruct((m, n), jnp.float32, plgpu.Layout.WGMMA),
        )
        def read(ctx, source):
            del ctx
            pair = ir.VectorType.get((2,), ir.F32Type.get())
            registers = [vector.load(pair, source, place) for place in _own_places(source)]
            return _array(registers, (m, n), mgpu.fragmented_array.WGMMA_LAYOUT)

        return read(ref)


def _own_places(ref: ir.Value) -> list[list[ir.Value]]:
    """Indices of a thread's pairs in a float32 ref (n, m): one row of 256 values a register."""
    index, constant = ir.IndexType.get(), mgpu.utils.c
    n, m = ir.MemRefType(ref.type).shape
    warp, lane = _thread_of_warpgroup()
    i32 = lane.type
    thread = arith.addi(arith.muli(warp, constant(32, i32)), lane)
    column = arith.index_cast(index, arith.muli(thread, constant(2, i32)))
    if m != 256:
        raise ValueError(f"hand_over takes halves of 256 dimensions, got {m}")
    return [[constant(k, index), column] for k in range(n)]
