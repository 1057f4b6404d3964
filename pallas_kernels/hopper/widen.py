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
import functools
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref, scf, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

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
_FOUR_AT_ONCE = 32  # tokens of an ldmatrix


def _thread_of_warpgroup() -> tuple[ir.Value, ir.Value]:
    """Warp (0 .. 3) and lane, i32."""
    constant, i32 = mgpu.utils.c, ir.IntegerType.get_signless(32)
    thread = arith.remui(mgpu.utils.thread_idx(), constant(128, i32))
    return arith.divui(thread, constant(32, i32)), arith.remui(thread, constant(32, i32))


def _array(registers, shape, layout, is_signed=None) -> mgpu.FragmentedArray:
    array = np.empty(layout.registers_shape(shape), dtype=object)
    array.flat[:] = registers
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=is_signed)


def _rows_array(values) -> mgpu.FragmentedArray:
    """Of the two rows of a tile that a thread has a value of."""
    one = ir.VectorType.get((1,), ir.F32Type.get())
    return _array([vector.broadcast(one, x) for x in values], (GROUP,), ROWS.to_mgpu())


def _any_of_warp(mine: ir.Value) -> ir.Value:
    """1 (i32) where any lane has a flag (i1), else 0."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(
        i32,
        [arith.extui(i32, mine)],
        "{ .reg .pred p, q; setp.ne.u32 p, $1, 0; vote.sync.any.pred q, p, 0xffffffff;"
        " selp.u32 $0, 1, 0, q; }",
        "=r,r",
        has_side_effects=True,
    )


def _over_quad(combine, value: ir.Value) -> ir.Value:
    """Of the four lanes that share a row of a tile."""
    for distance in (1, 2):
        value = combine(value, mgpu.utils.shfl_bfly(value, distance))
    return value


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

    def with_score_accumulators(self, run, scratch, thread: int, floats, integers):
        """What run(*accumulators) returns: float32 of shapes `floats`, then int32 of `integers`."""
        if self.interpreting:
            return run(*(ref.at[thread] for ref in scratch))
        shapes = [(shape, jnp.float32) for shape in floats]
        shapes += [(shape, jnp.int32) for shape in integers]
        return pl.run_scoped(run, *(plgpu.ACC(*shape) for shape in shapes))

    def fill_integers(self, acc, value: int) -> None:
        x = jnp.full(acc.shape, value, acc.dtype)
        acc[...] = x if self.interpreting else plgpu.layout_cast(x, plgpu.Layout.WGMMA)

    def iota_rows(self, count: int) -> jax.Array:
        """0, 1, ... beside the rows of a tile."""
        layout = None if self.interpreting else ROWS
        return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)

    # -- scores: (64, n) tiles with a query a row, which lies in a quad of lanes ------------------
    def raised(self, m, s, scale, lag: float) -> jax.Array:
        """m, but in rows of s that exceed it by more than lag their largest s * scale.

        m and scale are [64], scale not negative. Where no row of a warp does, that is one vote.
        """
        if self.interpreting:
            top = s.max(axis=1) * scale
            return jnp.where(top > m + lag, top, m)

        @plgpu.inline_mgpu(
            arg_types=(ROWS, ROWS, plgpu.Layout.WGMMA),
            return_type=plgpu.ShapeDtypeStruct(m.shape, m.dtype, ROWS),
        )
        def raise_(ctx, rows, scales, tile):
            del ctx
            f32 = ir.F32Type.get()
            old, by = (
                [vector.extract(x, [], [0]) for x in array.registers.flat]
                for array in (rows, scales)
            )
            tops, grows = [], []
            for row, before in enumerate(old):
                top = None
                for pair in tile.registers.reshape(-1, 2)[:, row]:
                    for i in range(2):
                        x = vector.extract(pair, [], [i])
                        top = x if top is None else arith.maximumf(top, x)
                top = arith.mulf(top, by[row])
                limit = arith.addf(before, mgpu.utils.c(lag, f32))
                more = arith.cmpf(arith.CmpFPredicate.OGT, top, limit)
                grows.append(more)
                tops.append((top, limit))
            some = _any_of_warp(arith.ori(*grows))
            some = arith.cmpi(arith.CmpIPredicate.ne, some, mgpu.utils.c(0, some.type))
            rise = scf.IfOp(some, [f32, f32], has_else=True)  # type: ignore[call-arg]
            with ir.InsertionPoint(rise.then_block):
                new = []
                for before, (top, limit) in zip(old, tops, strict=True):
                    top = _over_quad(arith.maximumf, top)
                    more = arith.cmpf(arith.CmpFPredicate.OGT, top, limit)
                    new.append(arith.select(more, top, before))
                scf.yield_(new)
            with ir.InsertionPoint(rise.else_block):
                scf.yield_(old)
            return _rows_array(rise.results)

        return raise_(m, scale, s)

    def lane_sums(self, p) -> jax.Array:
        """[64]: sums over the rows of p, of each lane those of its own; for `sum_lanes`."""
        if self.interpreting:
            return p.sum(axis=1)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA,),
            return_type=plgpu.ShapeDtypeStruct(p.shape[:1], p.dtype, ROWS),
        )
        def add(ctx, tile):
            del ctx
            sums = []
            for row in range(2):
                terms = [
                    vector.extract(pair, [], [i])
                    for pair in tile.registers.reshape(-1, 2)[:, row]
                    for i in range(2)
                ]
                while len(terms) > 1:
                    terms = [arith.addf(*terms[i : i + 2]) for i in range(0, len(terms), 2)]
                sums += terms
            return _rows_array(sums)

        return add(p)

    def sum_lanes(self, parts) -> jax.Array:
        """[64] sums, in every lane, of what `lane_sums` gave and factors of rows multiplied."""
        if self.interpreting:
            return parts

        @plgpu.inline_mgpu(
            arg_types=(ROWS,), return_type=plgpu.ShapeDtypeStruct(parts.shape, parts.dtype, ROWS)
        )
        def add(ctx, rows):
            del ctx
            parts = (vector.extract(x, [], [0]) for x in rows.registers.flat)
            return _rows_array([_over_quad(arith.addf, x) for x in parts])

        return add(parts)

    def mark_less(self, ref, a, b) -> None:
        """int32 SMEM ref [4], an element each warp: does any of its rows have a < b?"""
        if self.interpreting:
            ref[...] = jnp.full(4, jnp.max((a < b).astype(jnp.int32)))
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS, ROWS))
        def mark(ctx, target, x, y):
            del ctx
            less = [
                arith.cmpf(arith.CmpFPredicate.OLT, *(vector.extract(w, [], [0]) for w in (u, v)))
                for u, v in zip(x.registers.flat, y.registers.flat, strict=True)
            ]
            some = _any_of_warp(arith.ori(*less))
            warp, lane = _thread_of_warpgroup()
            first = arith.cmpi(arith.CmpIPredicate.eq, lane, mgpu.utils.c(0, lane.type))
            with mgpu.utils.when(first):
                memref.store(some, target, [arith.index_cast(ir.IndexType.get(), warp)])

        mark(ref, a, b)

    def any_marked(self, ref) -> jax.Array:
        """Is any of `mark_less`'s?"""
        return functools.reduce(operator.or_, (ref[warp] for warp in range(4))) > 0

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

    def mma_widened(self, accs, v, p, begun, *, first_group: int = 0, tokens: int = TOKENS) -> None:
        """O^T += V^T P^T, the last product left in flight.

        `tokens` of a group of rows are widened while those before them are multiplied.

        Args:
            accs: O^T in parts from group first_group on, (m, n) each, m a multiple of GROUP, in
                units of WIDENED_UNIT.
            v: int8 SMEM (TOKENS, d_v), tiled as INT8_OPERAND.
            p: bfloat16 SMEM (n, TOKENS), tiled for slices of `tokens`.
            begun: what `begin_widening` gave for the same first_group and tokens.
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
        steps = list(itertools.islice(_steps(first_group, tokens), len(places) * TOKENS // tokens))
        ready, following = begun
        for k, (group, first, _) in enumerate(steps):
            mine = p.at[:, pl.ds(first, tokens)] if tokens < TOKENS else p
            plgpu.wgmma(places[group - first_group], ready, mine.transpose((1, 0)))
            plgpu.wgmma_wait(1)  # until the registers of the step before are free
            if k + 1 < len(steps):
                ready = self._widened(following)
            if k + 2 < len(steps):
                following = self._bytes(v, *steps[k + 2])

    def _bytes(self, ref, group: int, first: int, tokens: int) -> jax.Array:
        """The bytes of rows 64 * group .. of V^T as `_widened` takes them, of some tokens.

        A row of V^T is a dimension: all of them once over the groups, in the order that
        `store_dimensions` knows.
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
            return _array(registers, shape, layout.to_mgpu(), is_signed=True)

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
