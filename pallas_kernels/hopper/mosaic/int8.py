"""Primitives of the int8 kernels: V^T becomes bfloat16 on its way to wgmma, q two int8 halves.

wgmma can't read 8-bit operands transposed, so O^T = V^T P^T needs V^T in 16 bits. V^T passes
through registers as operand A and is never written back to shared memory. `ldmatrix.trans` gives
each thread four bytes: two neighbouring dimensions of two neighbouring tokens. A register of
operand A holds two tokens of one dimension, so these four bytes become two registers.

The conversion is exact. The byte x ^ 0x80 is u = x + 128 in 0 .. 255. The bfloat16 with bits 0x00uu
is u * 2^-133, because subnormals and the first normal binade have the same spacing. One fused
multiply-add computes (u - 128) / 64 = x / 64. So the result is x * DEQUANTIZED_STEP.

The rows of O^T are in the order of `place_in_dimensions`. `Rows.store_dimensions` restores the
order of the dimensions.
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

from pallas_kernels.hopper.mosaic.threads import array_of, thread
from pallas_kernels.hopper.mosaic.transposed import COLUMNS, TransposedBackend
from pallas_kernels.hopper.mosaic.wgmma import operand

INT8_OPERAND = operand(1)  # tiling and swizzle of int8 in shared memory that wgmma reads
DEQUANTIZED_STEP = 2.0**-6  # the bfloat16 value of 1 in int8
GROUP = 64  # rows of O^T that one wgmma computes
TOKENS = 64  # tokens per block
_LDMATRIX_TOKENS = 32  # tokens that one ldmatrix loads


def _warp_and_lane() -> tuple[ir.Value, ir.Value]:
    """Returns this thread's warp in its warpgroup (0 to 3) and its lane, both i32."""
    constant, mine = mgpu.utils.c, thread()
    return arith.divui(mine, constant(32, mine.type)), arith.remui(mine, constant(32, mine.type))


def place_in_dimensions() -> tuple[ir.Value, ir.Value]:
    """Returns dimension and query (i32) of the first element of O^T that a thread holds."""
    i32, constant = ir.IntegerType.get_signless(32), mgpu.utils.c
    warp, lane = _warp_and_lane()
    query = arith.muli(arith.remui(lane, constant(4, i32)), constant(2, i32))
    dimension = arith.addi(
        arith.muli(warp, constant(128, i32)),
        arith.muli(arith.divui(lane, constant(4, i32)), constant(2, i32)),
    )
    return dimension, query


def _bytes_layout(tokens: int) -> tuple[tuple[int], Any]:
    """Returns shape and layout of the int32 array that `_bytes` returns."""
    shape = (GROUP * tokens // 4,)
    return shape, plgpu.Layout.WG_STRIDED(shape, vec_size=1)


def _steps(first_group: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yields the steps of dequantizing V^T: group of rows, first token, number of tokens."""
    for group in itertools.count(first_group):
        for first in range(0, TOKENS, tokens):
            yield group, first, tokens


def _ldmatrix_transposed(address: ir.Value) -> list[ir.Value]:
    """Loads four 8 x 8 matrices of byte pairs, transposed, one i32 each.

    address: each of the 32 lanes gives the address of one row of a matrix.
    """
    i32 = ir.IntegerType.get_signless(32)
    result = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 4),
        [address],
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32, result, [i]) for i in range(4)]


def _dequantize_bytes(four: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Returns x * DEQUANTIZED_STEP of four signed bytes x as two pairs of bfloat16.

    The first pair has bytes 0 and 2, the second one bytes 1 and 3.
    """
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
class DequantizingBackend(TransposedBackend):
    """`TransposedBackend` with the primitives of the int8 kernels."""

    # -- scores -----------------------------------------------------------------------------------
    def combine_halves(self, x, unit: int) -> jax.Array:
        """Returns unit * high + low as a float32 (64, n) tile.

        x: int32 (64, 2 n), high in its first n columns and low in the others.
        """
        n = x.shape[1] // 2
        if self.interpreting:
            return (x[:, :n] * unit + x[:, n:]).astype(jnp.float32)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA,),
            return_type=plgpu.ShapeDtypeStruct((64, n), jnp.float32, plgpu.Layout.WGMMA),
        )
        def combine(ctx, tile):
            del ctx
            registers = list(tile.registers.flat)
            floats = ir.VectorType.get((2,), ir.F32Type.get())
            factor = mgpu.utils.c(unit, registers[0].type)
            combined = [
                arith.sitofp(floats, arith.addi(arith.muli(high, factor), low))
                for high, low in zip(registers[: n // 4], registers[n // 4 :], strict=True)
            ]
            return array_of(combined, (64, n), mgpu.fragmented_array.WGMMA_LAYOUT)

        return combine(x)

    # -- O^T += V^T P^T ----------------------------------------------------------------------------
    def load_columns(self, ref) -> jax.Array:
        """Loads one value per column of a (64, n) WGMMA tile, as COLUMNS."""
        return ref[...] if self.interpreting else plgpu.load(ref, layout=COLUMNS, optimized=False)

    def begin_dequantizing(self, v, first_group: int = 0, tokens: int = TOKENS):
        """Returns the first steps of V^T for `mma_dequantized`, before P is known.

        The arguments are those of `mma_dequantized`.
        """
        if self.interpreting:
            return None
        steps = _steps(first_group, tokens)
        return self._dequantized(self._bytes(v, *next(steps))), self._bytes(v, *next(steps))

    def mma_dequantized(
        self, accs, v, p_t, begun, *, first_group: int = 0, tokens: int = TOKENS
    ) -> None:
        """Adds DEQUANTIZED_STEP * V^T P^T to O^T and leaves the last product in flight.

        It works in steps of one group of rows and `tokens` tokens. It dequantizes a step while
        wgmma multiplies the step before.

        Args:
            accs: accumulators (m, n) that together hold O^T from group first_group on. m is a
                multiple of GROUP.
            v: int8 SMEM (TOKENS, d_v), tiled as INT8_OPERAND.
            p_t: P^T, bfloat16 SMEM (TOKENS, n), tiled for slices of `tokens`.
            begun: from `begin_dequantizing` with the same first_group and tokens.
            first_group: the first group of GROUP rows of O^T.
            tokens: how many tokens a step dequantizes, TOKENS or a part of it.
        """
        if self.interpreting:
            first = GROUP * first_group
            for acc in accs:
                m = acc.shape[0]
                part = v[:, first : first + m].astype(jnp.float32).T * DEQUANTIZED_STEP
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
            # The product of the step before must end, because `ready` gets its registers.
            plgpu.wgmma_wait(1)
            if k + 1 < len(steps):
                ready = self._dequantized(following)
            if k + 2 < len(steps):
                following = self._bytes(v, *steps[k + 2])

    def _bytes(self, ref, group: int, first: int, tokens: int) -> jax.Array:
        """Loads a group of rows of V^T for some tokens, as `_dequantized` takes them.

        A row of V^T is a dimension. The groups together have each dimension once, in the order of
        `place_in_dimensions`.
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
            (token_stride, tile_stride, *_), _ = ir.MemRefType(tile.type).get_strides_and_offset()
            warp, lane = _warp_and_lane()
            matrix, token = (f(lane, constant(8, i32)) for f in (arith.divui, arith.remui))
            # Lane 8q + r gives the swizzled address of 16 bytes of token 8q + r. A warp's 128
            # columns are one swizzled tile, and `group` is the index of a 16-byte chunk in it.
            chunk = arith.xori(token, constant(group, i32))
            offset = arith.addi(
                arith.addi(arith.muli(matrix, constant(token_stride, i32)),
                           arith.muli(warp, constant(tile_stride, i32))),
                arith.addi(arith.muli(token, constant(128, i32)),
                           arith.muli(chunk, constant(16, i32))),
            )  # fmt: skip
            address = arith.addi(llvm.ptrtoint(i32, mgpu.utils.memref_ptr(tile)), offset)
            registers = []
            for row in range(first // 8, (first + tokens) // 8, _LDMATRIX_TOKENS // 8):
                here = arith.addi(address, constant(row * token_stride, i32))
                registers += [vector.broadcast(one, x) for x in _ldmatrix_transposed(here)]
            return array_of(registers, shape, layout.to_mgpu(), is_signed=True)

        return load(ref)

    def _dequantized(self, four_bytes) -> jax.Array:
        """Returns rows of DEQUANTIZED_STEP * V^T as bfloat16 (GROUP, tokens), for operand A."""
        tokens = four_bytes.shape[0] * 4 // GROUP
        shape, (_, layout) = (GROUP, tokens), _bytes_layout(tokens)

        @plgpu.inline_mgpu(
            arg_types=(layout,),
            return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, plgpu.Layout.WGMMA),
        )
        def dequantize(ctx, packed):
            del ctx
            pair = ir.VectorType.get((2,), ir.BF16Type.get())
            registers = [
                llvm.bitcast(pair, bits)
                for four in packed.registers.flat
                for bits in _dequantize_bytes(vector.extract(four, [], [0]))
            ]
            return array_of(registers, shape, mgpu.fragmented_array.WGMMA_LAYOUT)

        return dequantize(four_bytes)

    # -- between two warpgroups -----------------------------------------------------------------
    def store_registers(self, ref, value) -> None:
        """Stores an (m, n) WGMMA tile to a float32 SMEM ref (n, m), for `load_registers`.

        The values are in the order of the registers, so only `load_registers` can read them.
        """
        if self.interpreting:
            ref[...] = value.T
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
        def write(ctx, target, tile):
            del ctx
            for place, register in zip(_own_places(target), tile.registers.flat, strict=True):
                vector.store(register, target, place)

        write(ref, value)

    def load_registers(self, ref) -> jax.Array:
        """Loads the tile that another warpgroup's `store_registers` has stored."""
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
    """Returns the indices of a thread's pairs in a float32 ref (n, m).

    Each row holds 256 values: one register, which has two values, of each thread.
    """
    index, constant = ir.IndexType.get(), mgpu.utils.c
    n, m = ir.MemRefType(ref.type).shape
    warp, lane = _warp_and_lane()
    i32 = lane.type
    mine = arith.addi(arith.muli(warp, constant(32, i32)), lane)
    column = arith.index_cast(index, arith.muli(mine, constant(2, i32)))
    if m != 256:
        raise ValueError(f"store_registers takes halves of 256 dimensions, got {m}")
    return [[constant(k, index), column] for k in range(n)]


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
