"""Repairs values in shared memory, and makes stores to it visible to wgmma and TMA."""

import dataclasses

import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.threads import (
    CHUNK_BYTES,
    SCALAR,
    WGMMA_OPERAND,
    Mode,
    opaque,
    thread,
)


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
