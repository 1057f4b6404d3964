"""Repairs values in shared memory, and makes stores to it visible to wgmma and TMA."""

import dataclasses

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.threads import (
    CHUNK_BYTES,
    PANELS,
    SCALAR,
    WGMMA_OPERAND,
    Mode,
    opaque,
    thread,
)

NO_ROW = 1 << 30  # above all rows


@dataclasses.dataclass(frozen=True)
class SharedMemory(Mode):
    """What a warpgroup does to shared memory besides loads and stores."""

    def clear_not_finite(self, ref, first) -> None:
        """Replaces NaN and infinity by 0 in rows from `first` on of a 16-bit SMEM tile (64, n).

        ref: tiled as WGMMA_OPERAND. The caller runs `commit_smem` before anything reads it. This is
        a short loop, because it hardly ever runs and an SM's instruction cache is small.
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

            # Lines of 128 bytes are contiguous: 8 rows of a tile, then those of the next tile.
            groups, tiles, rows, line = ir.MemRefType(target.type).shape
            four = ir.VectorType.get((4,), i32)
            lines_at_once = 128 // 8  # 128 threads, eight per line
            mine = thread()
            start = mgpu.utils.memref_ptr(target)
            rounds = opaque(groups * tiles * rows // lines_at_once)

            @mgpu.utils.fori(rounds, [])
            def one_round(i, _):
                chunk = arith.addi(arith.muli(i, constant(128)), mine)
                line_index = arith.divui(chunk, constant(8))
                group = arith.divui(line_index, constant(rows * tiles))
                row = arith.addi(
                    arith.muli(group, constant(rows)), arith.remui(line_index, constant(rows))
                )
                hidden = arith.cmpi(arith.CmpIPredicate.sge, row, first.registers.item())
                place = mgpu.utils.getelementptr(start, [chunk], four)
                words = llvm.load(four, place, alignment=CHUNK_BYTES)
                kept = []
                for k in range(4):
                    word = vector.extract(words, [], [k])
                    for shift in (0, 16):
                        bits = constant(exponent << shift)
                        special = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(word, bits), bits)
                        cleared = arith.andi(word, constant(0xFFFF << (16 - shift)))
                        word = arith.select(arith.andi(special, hidden), cleared, word)
                    kept.append(word)
                llvm.store(vector.from_elements(four, kept), place, alignment=CHUNK_BYTES)
                return []

            assert line * mgpu.utils.bytewidth(element) == 8 * CHUNK_BYTES

        clear(ref, first)

    def clear_not_finite_in_panels(self, ref, first) -> jax.Array:
        """Replaces NaN and infinity by 0 in rows from `first` on of 16-bit SMEM panels [p, 64, 64].

        A single warp does this. It returns the first row that it has changed, or else NO_ROW. What
        it has changed is visible to wgmma after the next barrier. The search is a loop over all
        values; the repair is one that hardly ever runs.
        """
        if self.interpreting:
            kept = ref[...]
            rows = jnp.arange(kept.shape[1])
            bad = ~jnp.isfinite(kept) & (rows >= first)[None, :, None]
            ref[...] = jnp.where(bad, jnp.zeros_like(kept), kept)
            plgpu.commit_smem()
            return jnp.min(jnp.where(bad.any((0, 2)), rows, NO_ROW)).astype(jnp.int32)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(PANELS), SCALAR),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR),
        )
        def clear(ctx, target, first):
            del ctx
            changed = _clear_panels(target, first.registers.item())
            return mgpu.FragmentedArray.splat(changed, shape=(), is_signed=True)

        return clear(ref, first)

    def fence_async_proxy(self) -> None:
        """Makes visible to wgmma and TMA what this thread sees in shared memory.

        It holds for operations that this thread starts after the fence.
        """
        if self.interpreting:
            return

        @plgpu.inline_mgpu()
        def fence(ctx):
            del ctx
            nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

        fence()


def _clear_panels(target: ir.Value, first: ir.Value) -> ir.Value:
    """Does what `clear_not_finite_in_panels` says. target: memref [p, rows, 64]."""
    i32 = ir.IntegerType.get_signless(32)
    panels, rows, columns = ir.MemRefType(target.type).shape
    (panel_stride, *_), _ = ir.MemRefType(target.type).get_strides_and_offset()
    element = ir.MemRefType(target.type).element_type
    exponent = 0x7F80 if element == ir.BF16Type.get() else 0x7C00
    four = ir.VectorType.get((4,), i32)
    at_once, unrolled = 4, 4  # rows of 8 chunks: those that 32 lanes read, and how many times
    per_panel = rows // (at_once * unrolled)

    def constant(value):
        return mgpu.utils.c(value, i32)

    lane = arith.remui(thread(), constant(32))
    start = mgpu.utils.memref_ptr(target)

    def places(i):
        """Returns (row, pointer) of the chunks of round i that this lane reads."""
        panel, group = arith.divui(i, constant(per_panel)), arith.remui(i, constant(per_panel))
        base = arith.addi(
            arith.muli(panel, constant(panel_stride)),
            arith.addi(
                arith.muli(group, constant(at_once * unrolled * columns)),
                arith.muli(lane, constant(8)),
            ),
        )
        begin = mgpu.utils.getelementptr(start, [base], element)
        row = arith.addi(
            arith.muli(group, constant(at_once * unrolled)), arith.divui(lane, constant(8))
        )
        for k in range(unrolled):
            place = mgpu.utils.getelementptr(begin, [k * at_once * columns], element)
            yield arith.addi(row, constant(k * at_once)), place

    @mgpu.utils.fori(opaque(panels * per_panel), [constant(0)])
    def search(i, found):
        (found,) = found
        for _, place in places(i):
            words = llvm.load(four, place, alignment=CHUNK_BYTES)
            for k in range(4):
                word = arith.andi(vector.extract(words, [], [k]), constant(0x7FFF7FFF))
                # A full exponent carries into the sign bit.
                carried = arith.addi(word, constant((0x8000 - exponent) * 0x10001))
                found = arith.ori(found, carried)
        return [found]

    (found,) = search.results
    any_found = llvm.inline_asm(
        i32,
        [found],
        "{ .reg .pred p, q; .reg .b32 x; and.b32 x, $1, 0x80008000; setp.ne.u32 p, x, 0;"
        " vote.sync.any.pred q, p, 0xffffffff; selp.u32 $0, 1, 0, q; }",
        "=r,r",
        has_side_effects=True,
    )

    @mgpu.utils.fori(arith.muli(any_found, constant(panels * per_panel)), [constant(NO_ROW)])
    def repair(i, changed):
        (changed,) = changed
        for row, place in places(i):
            words = llvm.load(four, place, alignment=CHUNK_BYTES)
            hidden = arith.cmpi(arith.CmpIPredicate.sge, row, first)
            kept = []
            for k in range(4):
                word = vector.extract(words, [], [k])
                for shift in (0, 16):
                    bits = constant(exponent << shift)
                    special = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(word, bits), bits)
                    special = arith.andi(special, hidden)
                    cleared = arith.andi(word, constant(0xFFFF << (16 - shift)))
                    word = arith.select(special, cleared, word)
                    changed = arith.select(special, arith.minsi(changed, row), changed)
                kept.append(word)
            llvm.store(vector.from_elements(four, kept), place, alignment=CHUNK_BYTES)
        return [changed]

    (changed,) = repair.results
    # The fence makes the repaired values visible to wgmma.
    return llvm.inline_asm(
        i32,
        [changed],
        "redux.sync.min.s32 $0, $1, 0xffffffff; fence.proxy.async.shared::cta;",
        "=r,r",
        has_side_effects=True,
    )
