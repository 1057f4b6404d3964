"""The few primitives that Mosaic GPU's interpreter lacks, behind one small helper.

`Backend(interpreting=False)` emits the real instructions. `Backend(interpreting=True)` keeps the
kernel's schedule and barriers and swaps only these: accumulators become float32 scratch and wgmma
a plain product into it, the warpgroup vote becomes a reduction, gathered rows are plain loads and
stores, register hints vanish.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import core as jax_core
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm, vector
from jax._src.pallas.mosaic_gpu import core as pallas_core
from jax._src.pallas.mosaic_gpu import lowering
from jax._src.pallas.mosaic_gpu import primitives as pallas_primitives
from jax._src.state.primitives import get_ref_and_transforms
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.wgmma import operand, products

WGMMA_OPERAND = operand(2)
# Of a kernel that places all of its barriers itself, and reduces without scratch.
OWN_BARRIERS = plgpu.CompilerParams(
    approx_math=True,
    unsafe_no_auto_barriers=True,
    reduction_scratch_bytes=0,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row, beside a (64, n) WGMMA tile
REGISTER_FILE = 65536  # registers of an SM
CHUNK_BYTES = 16  # what a thread gathers at once, and what swizzling moves as one


SCALAR = plgpu.Layout.WG_SPLAT(())
_THREADS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)  # a value for each thread


def _thread() -> ir.Value:
    """This thread's number (i32) in its warpgroup."""
    return arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(128, ir.IntegerType.get_signless(32)))


def _first_row_of_warp() -> ir.Value:
    """The first row (i32) that this warp holds of a WGMMA tile."""
    constant, thread = mgpu.utils.c, _thread()
    warp = arith.divui(thread, constant(32, thread.type))
    return arith.muli(warp, constant(16, thread.type))


def place_in_tile() -> tuple[ir.Value, ir.Value]:
    """Row and column (i32) of the first element that a thread holds of a WGMMA tile."""
    constant, thread = mgpu.utils.c, _thread()
    lane = arith.remui(thread, constant(32, thread.type))
    row = arith.addi(_first_row_of_warp(), arith.divui(lane, constant(4, thread.type)))
    return row, arith.muli(arith.remui(lane, constant(4, thread.type)), constant(2, thread.type))


def own_four() -> ir.Value:
    """Where (i32) a thread's four values stand in a block of 512."""
    thread = _thread()
    return arith.muli(thread, mgpu.utils.c(4, thread.type))


def element_pointer(ref: ir.Value, index: ir.Value) -> ir.Value:
    """Pointer to the element (i32) of a GMEM ref, counted from its first one."""
    start = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), mgpu.utils.memref_ptr(ref))
    return mgpu.utils.getelementptr(start, [index], ir.MemRefType(ref.type).element_type)


def _voted(mine: Any, *, broadcast: bool = True) -> mgpu.FragmentedArray:
    """1 for the warpgroup where any of its threads has a flag (i1), else 0.

    broadcast: let a warp agree on its barrier first. That takes a register more, and time in
    `decode_int8` (benchmarks/history.md).
    """
    i32 = ir.IntegerType.get_signless(32)
    voted = llvm.inline_asm(
        i32,
        [mgpu.utils.warpgroup_barrier_idx(sync=broadcast), arith.extui(i32, mine)],
        "{ .reg .pred p, q; setp.ne.u32 p, $2, 0;"
        " bar.red.or.pred q, $1, 128, p; selp.u32 $0, 1, 0, q; }",
        "=r,r,r",
        has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(voted, shape=(), is_signed=True)


def _voted_in_warp(mine: Any) -> mgpu.FragmentedArray:
    """`_voted` for each warp, without a barrier."""
    i32 = ir.IntegerType.get_signless(32)
    voted = llvm.inline_asm(
        i32,
        [arith.extui(i32, mine)],
        "{ .reg .pred p, q; setp.ne.u32 p, $1, 0;"
        " vote.sync.any.pred q, p, 0xffffffff; selp.u32 $0, 1, 0, q; }",
        "=r,r",
        has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(voted, shape=(), is_signed=True)


def _opaque(number: int) -> ir.Value:
    """A constant (i32) that the compiler does not see: a loop of so many turns stays a loop."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [], f"mov.u32 $0, {number};", "=r", has_side_effects=True)


def _read_number(ptx: str) -> jax.Array:
    """The i32 that these instructions leave in $0; they stay where they are."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR))
    def read(ctx):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        number = llvm.inline_asm(i32, [], ptx, "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(number, shape=(), is_signed=True)

    return read()


def array_of(
    registers: Sequence[ir.Value], shape: tuple[int, ...], layout: Any, is_signed: Any = None
) -> mgpu.FragmentedArray:
    """A Mosaic GPU array of these registers, in the layout's order."""
    array = np.empty(layout.registers_shape(shape), dtype=object)
    array.flat[:] = registers
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=is_signed)


def _one_thread(ptx: str, *args: ir.Value) -> None:
    with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
        mgpu.utils.inline_ptx(ptx, *args, has_side_effects=True)


@dataclasses.dataclass(frozen=True)
class Backend:
    interpreting: bool

    # -- accumulators -------------------------------------------------------------------------
    def accumulator_scratch(self, threads: int, *shapes: tuple[int, int]) -> tuple:
        """Scratch that stands in for each thread's accumulators; empty on the GPU."""
        if not self.interpreting:
            return ()
        return tuple(plgpu.SMEM((threads, *shape), jnp.float32) for shape in shapes)

    def with_accumulators(self, run, scratch, thread: int, *shapes: tuple[int, int]):
        """What run(*accumulators) returns; they are float32, of the given shapes."""
        if self.interpreting:
            return run(*(ref.at[thread] for ref in scratch))
        return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def zero(self, acc) -> None:
        acc[...] = self.full(acc.shape, 0.0, plgpu.Layout.WGMMA)

    def read(self, acc) -> jax.Array:
        """The accumulator's value; the caller has waited for its products."""
        return acc[...] if self.interpreting else plgpu.wgmma_accumulator_load(acc, wait_n=None)

    def add_exponent(self, value, shift) -> jax.Array:
        """value * 2^shift by an integer add to its bits (AMLA, arXiv 2509.25224).

        `shift` [rows] holds whole numbers from -300 to 0. What would fall below the smallest
        normal number becomes 0: a bare add would wrap through the sign bit.
        """

        def across(rows):
            return lax.broadcast_in_dim(rows, value.shape, [0])

        bits = lax.bitcast_convert_type(value, jnp.int32) + across(shift.astype(jnp.int32) << 23)
        lost = jnp.abs(value) < across(jnp.exp2(-126.0 - shift))
        moved = lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(lost, jnp.zeros_like(moved), moved)

    def mma(self, acc, a, b) -> None:
        """acc += a @ b, left in flight."""
        if self.interpreting:
            acc[...] = acc[...] + jnp.dot(
                a[...].astype(jnp.float32), b[...].astype(jnp.float32), precision="highest"
            )
        else:
            self._arrive()
            plgpu.wgmma(acc, a, b)

    def mma_t(self, acc, a, b) -> None:
        """acc += a @ b.T, left in flight."""
        if self.interpreting:
            acc[...] = acc[...] + jnp.dot(
                a[...].astype(jnp.float32), b[...].astype(jnp.float32).T, precision="highest"
            )
        else:
            self._arrive()
            plgpu.wgmma(acc, a, b.transpose((1, 0)))

    def _arrive(self) -> None:
        """Orders register accesses before the next wgmma: a branch or a wait stands between.

        Without it ptxas puts one in itself (C7519) and may serialise every wgmma (C7520).
        """

        @plgpu.inline_mgpu()
        def fence(ctx):
            del ctx
            nvvm.wgmma_fence_aligned()

        fence()

    def wait_mma(self, in_flight: int) -> None:
        if self.interpreting:
            # wgmma reads shared memory through the async proxy; the loads that stand for it here
            # do not, and would race with the next TMA copy.
            plgpu.commit_smem()
        else:
            plgpu.wgmma_wait(in_flight)

    # A product on its own, which needs no accumulator filled first, as a value in registers.
    def product_t(self, a, b, dtype) -> jax.Array:
        """a @ b.T, left in flight: only `landed` may read it, after a wait.

        a, b: SMEM (64, k) and (n, k), n up to 256, of int8 (dtype int32) or 16 bits (float32), in
        lines of 128 bytes as wgmma reads them. int32 is right below 2^24 as interpreted.
        """
        if self.interpreting:
            operands = a[...].astype(jnp.float32), b[...].astype(jnp.float32).T
            return jnp.dot(*operands, precision="highest").astype(dtype)

        tiled, n = plgpu.RefType(operand(a.dtype.itemsize)), b.shape[0]

        @plgpu.inline_mgpu(
            arg_types=(tiled, tiled),
            return_type=plgpu.ShapeDtypeStruct((64, n), dtype, plgpu.Layout.WGMMA),
        )
        def start(ctx, a, b):
            del ctx
            registers = products(a, b)
            layout = mgpu.WGMMA_LAYOUT
            array = np.empty(layout.registers_shape((64, n)), dtype=object)
            pair = ir.VectorType.get((2,), registers[0].type)
            array.flat[:] = [
                vector.from_elements(pair, registers[i : i + 2])
                for i in range(0, len(registers), 2)
            ]
            signed = True if dtype == jnp.int32 else None
            return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=signed)

        return start(a, b)

    def landed(self, product) -> jax.Array:
        """What `product_t` has started; the caller has waited for it."""
        if self.interpreting:
            return product

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA,),
            return_type=plgpu.ShapeDtypeStruct(product.shape, product.dtype, plgpu.Layout.WGMMA),
        )
        def read(ctx, value):
            del ctx
            return mgpu.fragmented_array.optimization_barrier(value)

        return read(product)

    # -- values in registers ------------------------------------------------------------------
    def full(self, shape, value, layout) -> jax.Array:
        x = jnp.full(shape, value, jnp.float32)
        return x if self.interpreting else plgpu.layout_cast(x, layout)

    def iota(self, shape, dimension: int) -> jax.Array:
        """Of one dimension, then spread: a tile's own would hold every place in a register."""
        line = self.iota_line(shape[dimension], plgpu.Layout.WGMMA.reduce(1 - dimension))
        return lax.broadcast_in_dim(line, shape, [dimension])

    def iota_line(self, count: int, layout: Any) -> jax.Array:
        """0, 1, ... beside the rows of a tile (ROWS) or above its columns."""
        layout = None if self.interpreting else layout
        return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)

    def load_rows(self, ref) -> jax.Array:
        return ref[...] if self.interpreting else plgpu.load(ref, layout=ROWS, optimized=False)

    def load_tile(self, ref) -> jax.Array:
        return ref[...] if self.interpreting else plgpu.load(ref, layout=plgpu.Layout.WGMMA)

    def load_strided(self, ref, layout) -> jax.Array:
        return ref[...] if self.interpreting else plgpu.load(ref, layout=layout, optimized=False)

    # A (64, n) tile in the order of the registers that hold it: for every 8 columns 4 neighbouring
    # values a thread. Whole sectors, no shared memory; for what only `load_blocks` reads again.
    def store_blocks(self, ref, value, count) -> None:
        """The first `count` rows (and up to 15 more) of a (64, n) WGMMA tile to GMEM [n/8, 512]."""
        if self.interpreting:
            ref[...] = value.reshape(64, -1, 8).swapaxes(0, 1).reshape(-1, 512)
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, SCALAR))
        def store(ctx, target, tile, rows):
            del ctx
            start = element_pointer(target, own_four())
            used = arith.cmpi(arith.CmpIPredicate.slt, _first_row_of_warp(), rows.registers.item())
            with mgpu.utils.when(used):
                for j, (upper, lower) in enumerate(tile.registers.reshape(-1, 2)):
                    place = mgpu.utils.getelementptr(start, [512 * j], tile.mlir_dtype)
                    four = vector.shuffle(upper, lower, [0, 1, 2, 3])
                    llvm.store(four, place, alignment=4 * mgpu.utils.bytewidth(tile.mlir_dtype))

        store(ref, value, count)

    def load_blocks(self, ref) -> jax.Array:
        """What `store_blocks` left in GMEM [n/8, 512], as a (64, n) WGMMA tile."""
        blocks = ref.shape[0]
        if self.interpreting:
            return ref[...].reshape(blocks, 64, 8).swapaxes(0, 1).reshape(64, -1)

        shape = (64, 8 * blocks)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),),
            return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, plgpu.Layout.WGMMA),
        )
        def load(ctx, source):
            del ctx
            dtype = ir.MemRefType(source.type).element_type
            start = element_pointer(source, own_four())
            registers = np.empty((blocks, 2), dtype=object)
            four = ir.VectorType.get((4,), dtype)
            for j in range(blocks):
                place = mgpu.utils.getelementptr(start, [512 * j], dtype)
                values = llvm.load(four, place, alignment=4 * mgpu.utils.bytewidth(dtype))
                for half in (0, 1):
                    pair = [2 * half, 2 * half + 1]
                    registers[j, half] = vector.shuffle(values, values, pair)
            layout = mgpu.WGMMA_LAYOUT
            registers = registers.reshape(layout.registers_shape(shape))
            return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

        return load(ref)

    def any_less_in_warp(self, a, b) -> jax.Array:
        """A flag for each warp, without a barrier: has any of its rows a < b?

        What a branch on it runs may not be meant for the whole warpgroup, as wgmma's fence is.
        (The interpreter has one flag for all.)
        """
        if self.interpreting:
            return jnp.max((a < b).astype(jnp.int32)) > 0

        @plgpu.inline_mgpu(
            arg_types=(ROWS, ROWS),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())),
        )
        def vote(ctx, x, y):
            del ctx
            mine = None
            for u, v in zip(x.registers.flat, y.registers.flat, strict=True):
                for i in range(ir.VectorType(u.type).shape[0]):
                    lanes = [vector.extract(w, [], [i]) for w in (u, v)]
                    less = arith.cmpf(arith.CmpFPredicate.OLT, *lanes)
                    mine = less if mine is None else arith.ori(mine, less)
            return _voted_in_warp(mine)

        return vote(a, b) > 0

    def any_above(self, x, limit: float, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
        """One flag for the warpgroup: is any float32 of x above it? NaN is not.

        Of a layout in which a thread has 2^n of them.
        """
        if self.interpreting:
            return jnp.any(x > limit)

        @plgpu.inline_mgpu(
            arg_types=(layout,),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())),
        )
        def vote(ctx, tile):
            del ctx
            tops = [vector.extract(r, [], [i]) for r in tile.registers.flat for i in range(2)]
            while len(tops) > 1:
                tops = [arith.maxnumf(*tops[i : i + 2]) for i in range(0, len(tops), 2)]
            bound = mgpu.utils.c(limit, ir.F32Type.get())
            above = arith.cmpf(arith.CmpFPredicate.OGT, tops[0], bound)
            return _voted(above, broadcast=False)

        return vote(x) > 0

    def any_not_finite(self, x) -> jax.Array:
        """One flag for the warpgroup: is any float32 of a WGMMA tile NaN or infinite?"""
        if self.interpreting:
            return ~jnp.all(jnp.isfinite(x))

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA,),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR),
        )
        def vote(ctx, tile):
            del ctx
            # 0 times a number is 0, and times anything else NaN, which a sum keeps.
            zero = mgpu.utils.c(0.0, ir.F32Type.get())
            total = zero
            for register in tile.registers.flat:
                for i in range(2):
                    value = vector.extract(register, [], [i])
                    total = arith.addf(arith.mulf(value, zero), total)
            odd = arith.cmpf(arith.CmpFPredicate.UNO, total, total)
            return _voted(odd, broadcast=False)

        return vote(x) > 0

    def clear_not_finite(self, ref, first) -> None:
        """What is not finite in rows from `first` on of a 16-bit SMEM tile (64, n) becomes 0.

        ref: tiled as WGMMA_OPERAND. The caller runs `commit_smem` before anything reads it. This is
        a loop of little code, since it hardly ever runs and an SM's instruction cache is small.
        """
        if self.interpreting:
            kept = ref[...]
            clean = jnp.isfinite(kept) | (jnp.arange(64)[:, None] < first)
            ref[...] = jnp.where(clean, kept, jnp.zeros_like(kept))
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(WGMMA_OPERAND), SCALAR))
        def clear(ctx, target, first):
            del ctx
            i32 = ir.IntegerType.get_signless(32)
            element = ir.MemRefType(target.type).element_type
            exponent = 0x7F80 if element == ir.BF16Type.get() else 0x7C00

            def constant(value):
                return mgpu.utils.c(value, i32)

            # Lines of 128 bytes lie one after the other: 8 rows of a tile, then the next tile.
            groups, tiles, rows, line = ir.MemRefType(target.type).shape
            four = ir.VectorType.get((4,), i32)
            lines_at_once = 128 // 8  # by 128 threads, eight to a line
            thread = _thread()
            start = mgpu.utils.memref_ptr(target)
            turns = _opaque(groups * tiles * rows // lines_at_once)

            @mgpu.utils.fori(turns, [])
            def turn(i, _):
                chunk = arith.addi(arith.muli(i, constant(128)), thread)
                number = arith.divui(chunk, constant(8))  # of the line
                group = arith.divui(number, constant(rows * tiles))
                row = arith.addi(
                    arith.muli(group, constant(rows)), arith.remui(number, constant(rows))
                )
                hidden = arith.cmpi(arith.CmpIPredicate.sge, row, first.registers.item())
                place = mgpu.utils.getelementptr(start, [chunk], four)
                words = llvm.load(four, place, alignment=CHUNK_BYTES)
                kept = []
                for k in range(4):
                    word = vector.extract(words, [], [k])
                    for shift in (0, 16):
                        bits = constant(exponent << shift)
                        odd = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(word, bits), bits)
                        rest = arith.andi(word, constant(0xFFFF << (16 - shift)))
                        word = arith.select(arith.andi(odd, hidden), rest, word)
                    kept.append(word)
                llvm.store(vector.from_elements(four, kept), place, alignment=CHUNK_BYTES)
                return []

            assert line * mgpu.utils.bytewidth(element) == 8 * CHUNK_BYTES

        clear(ref, first)

    # -- gathering ------------------------------------------------------------------------------
    # 128 threads copy 64 rows, 16 bytes at a time: threads 8 i .. 8 i + 7 a line of a swizzled tile
    # of rows i, 16 + i, 32 + i and 48 + i. A warp has 16 rows so; each of its threads finds out
    # about one of them (the upper half about the same ones again) and hands it on in time.
    def gathered_row(self) -> jax.Array:
        """[128] int32: the row that each thread finds out about."""
        layout = None if self.interpreting else _THREADS
        thread = plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=layout)
        return (thread // 4) % 4 * 16 + thread // 32 * 4 + thread % 4

    def load_indexed(self, ref, index) -> jax.Array:
        """The int32 of a GMEM ref at an index for each thread, counted from its first one."""
        if self.interpreting:
            return ref[...].reshape(-1)[index]

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), _THREADS),
            return_type=plgpu.ShapeDtypeStruct((128,), jnp.int32, _THREADS),
        )
        def load(ctx, source, places):
            del ctx
            place = places.registers.item()
            i32 = ir.IntegerType.get_signless(32)
            value = llvm.load(i32, element_pointer(source, vector.extract(place, [], [0])))
            registers = np.full_like(places.registers, vector.broadcast(place.type, value))
            return mgpu.FragmentedArray(
                _registers=registers, _layout=places.layout, _is_signed=True
            )

        return load(ref, index)

    def any_outside(self, values, stop: int) -> jax.Array:
        """One flag for the warpgroup: has any thread a value that is not in 0 .. stop - 1?"""
        if self.interpreting:
            return jnp.any((values < 0) | (values >= stop))

        @plgpu.inline_mgpu(
            arg_types=(_THREADS,),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR),
        )
        def vote(ctx, x):
            del ctx
            value = vector.extract(x.registers.item(), [], [0])
            limit = mgpu.utils.c(stop, value.type)
            return _voted(arith.cmpi(arith.CmpIPredicate.uge, value, limit))

        return vote(values) > 0

    def gather_rows(self, source, column: int, rows, target) -> None:
        """Starts to copy 64 rows of a GMEM ref [a, b, n], from a column on, to a SMEM ref (64, m).

        rows: [128] int32, the row (of a * b) that each thread has found out. 16-bit values; the
        SMEM ref is tiled as WGMMA_OPERAND. `track_copies` says how to wait for it.
        """
        if self.interpreting:
            place = jnp.argsort(self.gathered_row(), stable=True)[::2]
            whole = source[...].reshape(-1, source.shape[-1])
            target[...] = whole[rows[place], column : column + target.shape[1]]
            return

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), _THREADS, plgpu.RefType(WGMMA_OPERAND)),
        )
        def copy(ctx, source, rows, target):
            del ctx
            from_type, to_type = ir.MemRefType(source.type), ir.MemRefType(target.type)
            (_, row_stride, _), _ = from_type.get_strides_and_offset()
            (group_stride, tile_stride, line_stride, _), _ = to_type.get_strides_and_offset()
            groups, tiles, group_rows, line = to_type.shape
            dtype = to_type.element_type
            assert line * mgpu.utils.bytewidth(dtype) == 8 * CHUNK_BYTES
            i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))

            def constant(value):
                return mgpu.utils.c(value, i32)

            # Read anew each time: what follows from it is not for the few registers of the caller.
            tid = mgpu.utils.inline_ptx(
                "mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True
            )
            thread = arith.remui(tid, constant(128))

            row, chunk = (f(thread, constant(8)) for f in (arith.divui, arith.remui))
            group, row = (f(row, constant(group_rows)) for f in (arith.divui, arith.remui))
            swizzled = arith.muli(arith.xori(chunk, row), constant(line // 8))
            place = arith.addi(
                arith.muli(group, constant(group_stride)),
                arith.addi(arith.muli(row, constant(line_stride)), swizzled),
            )
            to = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(target), [place], dtype)
            start = element_pointer(source, arith.muli(chunk, constant(line // 8)))
            found = vector.extract(rows.registers.item(), [], [0])
            quarter = arith.divui(arith.remui(thread, constant(32)), constant(8))
            for i in range(groups // 2):
                row = nvvm.shfl_sync(
                    constant(0xFFFFFFFF), found, arith.addi(quarter, constant(4 * i)),
                    constant(31), nvvm.ShflKind.idx,
                )  # fmt: skip
                first = arith.muli(arith.extui(i64, row), mgpu.utils.c(row_stride, i64))
                from_ = mgpu.utils.getelementptr(start, [first], dtype)
                for tile in range(tiles):
                    offset = 2 * i * group_stride + tile * tile_stride
                    nvvm.cp_async_shared_global(
                        mgpu.utils.getelementptr(to, [offset], dtype),
                        mgpu.utils.getelementptr(from_, [column + tile * line], dtype),
                        CHUNK_BYTES,
                        nvvm.LoadCacheModifierKind.CG,
                    )

        copy(source, rows, target)

    def track_copies(self, barrier) -> None:
        """The barrier's phase ends no sooner than the copies of this thread (`gather_rows`) so far.

        No arrival: that is for the thread to do afterwards.
        """
        if not self.interpreting:
            ref, transforms = get_ref_and_transforms(barrier, None, "track_copies")
            flat, tree = jax.tree.flatten(transforms)
            _track_copies_p.bind(ref, *flat, transforms_tree=tree)

    def fence_async_proxy(self) -> None:
        """What this thread sees in shared memory, wgmma and TMA that it starts now see too."""
        if self.interpreting:
            return

        @plgpu.inline_mgpu()
        def fence(ctx):
            del ctx
            nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

        fence()

    # -- between CTAs (the interpreter has no atomics: callers do without there) ----------------
    # A counter goes from 0 to limit - 1 and back to 0 by as many `count_up` as its limit says.
    def count_up(self, counters, index, limit, *, publishes: bool) -> None:
        """counters[index] += 1 modulo limit.

        publishes: only once the other CTAs can see all that this warpgroup has written.
        """

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
        def count(ctx, target, place, wrap):
            del ctx
            if publishes:
                mgpu.utils.warpgroup_barrier()
            wrap = wrap.registers.item()
            last = arith.subi(wrap, mgpu.utils.c(1, wrap.type))
            _one_thread(
                ("fence.acq_rel.gpu; " if publishes else "")
                + "red.relaxed.gpu.global.inc.u32 [$0], $1;",
                element_pointer(target, place.registers.item()),
                last,
            )

        count(counters, index, limit)

    def wait_for(self, counters, index, count) -> None:
        """Until counters[index] >= count; then sees what others wrote before they counted."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
        def wait(ctx, target, place, wanted):
            del ctx
            _one_thread(
                "{ .reg .pred less; .reg .u32 seen;"
                " again: ld.acquire.gpu.global.u32 seen, [$0];"
                " setp.lt.u32 less, seen, $1; @less bra again; }",
                element_pointer(target, place.registers.item()),
                wanted.registers.item(),
            )
            mgpu.utils.warpgroup_barrier()

        wait(counters, index, count)

    # -- control ------------------------------------------------------------------------------
    def take_registers(self, registers: Sequence[int], warpgroup: int) -> None:
        """From here on a thread of this warpgroup has registers[warpgroup] of them.

        All start with an equal share, and to go down to more than one has is undefined, as it is to
        go up to less.
        """
        share = REGISTER_FILE // (128 * len(registers)) // 8 * 8
        if not self.interpreting:
            count = registers[warpgroup]
            action: Literal["increase", "decrease"] = "increase" if count > share else "decrease"
            plgpu.set_max_registers(count, action=action)

    def cta_of_cluster(self) -> jax.Array:
        """This CTA's number in its cluster, read where it is needed: it holds no register."""
        if self.interpreting:
            return lax.axis_index("cluster")
        return _read_number("mov.u32 $0, %cluster_ctarank;")

    def warpgroup(self) -> jax.Array:
        """This warpgroup's number, likewise."""
        if self.interpreting:
            return lax.axis_index("wg")
        return _read_number(
            "mov.u32 $0, %tid.x; shr.u32 $0, $0, 7;"
            " shfl.sync.idx.b32 $0, $0, 0, 0x1f, 0xffffffff;"  # (the same in a warp)
        )

    def wait_for_previous_kernel(self) -> None:
        """Before the first read of anything that an earlier kernel of the stream has written."""
        if not self.interpreting:
            plgpu.griddepcontrol_wait()

    def let_next_kernel_start(self) -> None:
        if not self.interpreting:
            plgpu.griddepcontrol_launch_dependents()


# `inline_mgpu` takes no barriers, so this is a primitive of Pallas.
_track_copies_p = jax_core.Primitive("track_copies")
_track_copies_p.multiple_results = True


@_track_copies_p.def_effectful_abstract_eval
def _track_copies_abstract_eval(barrier, *transforms, transforms_tree):
    del barrier, transforms, transforms_tree
    return (), {pallas_core._memory_effect}


@lowering.register_lowering_rule(_track_copies_p, mgpu.LoweringSemantics.Lane)
def _track_copies_lowering(ctx, barrier, *transforms, transforms_tree):
    index = pallas_primitives._get_barrier_base_index(
        ctx.avals_in[0], transforms_tree.unflatten(transforms)
    )
    nvvm.cp_async_mbarrier_arrive((barrier if index is None else barrier[index]).get_ptr())
    return ()
