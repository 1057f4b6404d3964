"""Primitives of the int8 decode kernel: V^T widened from int8 to bfloat16 on its way to wgmma.

wgmma can't read 8-bit operands transposed, so O^T = V^T P^T needs V^T in 16 bits. It goes through
registers, as operand A, and never back to shared memory: `ldmatrix.trans` hands each thread pairs
of neighbouring dimensions of two neighbouring tokens, four bytes, which are two of the registers
that operand A wants (two tokens of one dimension each) once the bytes are spread.

Spreading: byte ^ 0x80 is u = x + 128 in 0 .. 255, and the bfloat16 with bits 0x00uu is u * 2^-133
(a subnormal, or one of the first binade above, which lie on one line). One fused multiply-add gives
(u - 128) / 64 = x / 64, exactly. So V comes out in units of WIDENED_UNIT.

The rows of O^T are in an order of their own (`place_in_dimensions`); `Rows.store_dimensions` undoes
it.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.primitives import array_of
from pallas_kernels.hopper.mosaic.transposed import COLUMNS, TransposedBackend
from pallas_kernels.hopper.mosaic.wgmma import operand

# How shared memory holds int8 that wgmma reads.
INT8_OPERAND = operand(1)
WIDENED_UNIT = 2.0**-6  # what a step of int8 is worth after widening
GROUP = 64  # rows of O^T that one wgmma makes
TOKENS = 64  # of a block
_FOUR_AT_ONCE = 32  # tokens of an ldmatrix


def _thread_of_warpgroup() -> tuple[ir.Value, ir.Value]:
    """Warp (0 .. 3) and lane, i32."""
    constant, i32 = mgpu.utils.c, ir.IntegerType.get_signless(32)
    thread = arith.remui(mgpu.utils.thread_idx(), constant(128, i32))
    return arith.divui(thread, constant(32, i32)), arith.remui(thread, constant(32, i32))


def place_in_dimensions() -> tuple[ir.Value, ir.Value]:
    """Dimension and query (i32) of the first element that a thread holds of O^T (see above)."""
    i32, constant = ir.IntegerType.get_signless(32), mgpu.utils.c
    warp, lane = _thread_of_warpgroup()
    query = arith.muli(arith.remui(lane, constant(4, i32)), constant(2, i32))
    dimension = arith.addi(
        arith.muli(warp, constant(128, i32)),
        arith.muli(arith.divui(lane, constant(4, i32)), constant(2, i32)),
    )
    return dimension, query


def _bytes_layout(tokens: int) -> tuple[tuple[int], Any]:
    """Shape and layout, int32, of what `_bytes` gives."""
    shape = (GROUP * tokens // 4,)
    return shape, plgpu.Layout.WG_STRIDED(shape, vec_size=1)


def _steps(first_group: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Group of rows, first token, tokens: what is widened at a time."""
    for group in itertools.count(first_group):
        for first in range(0, TOKENS, tokens):
            yield group, first, tokens


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

    # -- scores -----------------------------------------------------------------------------------
    def joined_halves(self, x, unit: int) -> jax.Array:
        """(64, n) float32, unit * high + low, of an int32 (64, 2 n) tile of high's and low's."""
        n = x.shape[1] // 2
        if self.interpreting:
            return (x[:, :n] * unit + x[:, n:]).astype(jnp.float32)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA,),
            return_type=plgpu.ShapeDtypeStruct((64, n), jnp.float32, plgpu.Layout.WGMMA),
        )
        def join(ctx, tile):
            del ctx
            registers = list(tile.registers.flat)
            floats = ir.VectorType.get((2,), ir.F32Type.get())
            units = mgpu.utils.c(unit, registers[0].type)
            joined = [
                arith.sitofp(floats, arith.addi(arith.muli(high, units), low))
                for high, low in zip(registers[: n // 4], registers[n // 4 :], strict=True)
            ]
            return array_of(joined, (64, n), mgpu.fragmented_array.WGMMA_LAYOUT)

        return join(x)

    # -- O^T += V^T P^T ----------------------------------------------------------------------------
    def load_columns(self, ref) -> jax.Array:
        """(n,) beside the columns of a (64, n) tile."""
        return ref[...] if self.interpreting else plgpu.load(ref, layout=COLUMNS, optimized=False)

    def begin_widening(self, v, first_group: int = 0, tokens: int = TOKENS):
        """What of V^T `mma_widened` needs first: it needs no P. v: int8 SMEM (TOKENS, d_v)."""
        if self.interpreting:
            return None
        steps = _steps(first_group, tokens)
        return self._widened(self._bytes(v, *next(steps))), self._bytes(v, *next(steps))

    def mma_widened(
        self, accs, v, p_t, begun, *, first_group: int = 0, tokens: int = TOKENS
    ) -> None:
        """O^T += V^T P^T, the last product left in flight.

        `tokens` of a group of rows are widened while those before them are multiplied.

        Args:
            accs: O^T in parts from group first_group on, (m, n) each, m a multiple of GROUP, in
                units of WIDENED_UNIT.
            v: int8 SMEM (TOKENS, d_v), tiled as INT8_OPERAND.
            p_t: P^T, bfloat16 SMEM (TOKENS, n), tiled for slices of `tokens`.
            begun: what `begin_widening` gave for the same first_group and tokens.
        """
        if self.interpreting:
            first = GROUP * first_group
            for acc in accs:
                m = acc.shape[0]
                part = v[:, first : first + m].astype(jnp.float32).T * WIDENED_UNIT
                product = jnp.dot(part, p_t[...].astype(jnp.float32), precision="highest")
                acc[...] = acc[...] + product
                first += m
            return
        places = [
            acc.at[pl.ds(row, GROUP)] for acc in accs for row in range(0, acc.shape[0], GROUP)
        ]
        steps = list(itertools.islice(_steps(first_group, tokens), len(places) * TOKENS // tokens))
        ready, following = begun
        for k, (group, first, _) in enumerate(steps):
            mine = p_t.at[pl.ds(first, tokens)] if tokens < TOKENS else p_t
            plgpu.wgmma(places[group - first_group], ready, mine)
            plgpu.wgmma_wait(1)  # until the registers of the step before are free
            if k + 1 < len(steps):
                ready = self._widened(following)
            if k + 2 < len(steps):
                following = self._bytes(v, *steps[k + 2])

    def _bytes(self, ref, group: int, first: int, tokens: int) -> jax.Array:
        """The bytes of rows 64 * group .. of V^T as `_widened` takes them, of some tokens.

        A row of V^T is a dimension: all of them once over the groups, in the order that
        `Rows.store_dimensions` knows.
        """
        shape, layout = _bytes_layout(tokens)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(INT8_OPERAND),),
            return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout),
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
            for row in range(first // 8, (first + tokens) // 8, _FOUR_AT_ONCE // 8):
                here = arith.addi(address, constant(row * tokens_down, i32))
                registers += [vector.broadcast(one, x) for x in _ldmatrix_transposed(here)]
            return array_of(registers, shape, layout.to_mgpu(), is_signed=True)

        return load(ref)

    def _widened(self, four_bytes) -> jax.Array:
        """Rows of V^T, bfloat16 in units of WIDENED_UNIT: (GROUP, tokens) for operand A."""
        tokens = four_bytes.shape[0] * 4 // GROUP
        shape, (_, layout) = (GROUP, tokens), _bytes_layout(tokens)

        @plgpu.inline_mgpu(
            arg_types=(layout,),
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
            return array_of(registers, shape, mgpu.fragmented_array.WGMMA_LAYOUT)

        return widen(four_bytes)

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
            return array_of(registers, (m, n), mgpu.fragmented_array.WGMMA_LAYOUT)

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
