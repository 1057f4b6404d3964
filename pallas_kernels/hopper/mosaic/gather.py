"""Copies single rows from GMEM to shared memory by cp.async, with a row index for each row.

The 128 threads of a warpgroup copy 64 rows, 16 bytes at a time. Threads 8 i to 8 i + 7 copy a line
of a swizzled tile for each of the rows i, 16 + i, 32 + i and 48 + i, so each warp copies 16 rows.
Each of its lanes looks up the index of one of these rows, and lanes 16 to 31 those of lanes 0 to 15
again. A shuffle hands an index to the lanes that copy the row.

In the interpreter gathered rows are plain loads and stores.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax._src import core as jax_core
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, nvvm, vector
from jax._src.pallas.mosaic_gpu import core as pallas_core
from jax._src.pallas.mosaic_gpu import lowering
from jax._src.pallas.mosaic_gpu import primitives as pallas_primitives
from jax._src.state.primitives import get_ref_and_transforms
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.threads import (
    CHUNK_BYTES,
    THREADS,
    WGMMA_OPERAND,
    Mode,
    element_pointer,
)


@dataclasses.dataclass(frozen=True)
class Gather(Mode):
    """Copies of rows by cp.async, and the barrier that counts them."""

    def gathered_row(self) -> jax.Array:
        """Returns [128] int32: the row whose index each thread looks up."""
        layout = None if self.interpreting else THREADS
        thread = plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=layout)
        return (thread // 4) % 4 * 16 + thread // 32 * 4 + thread % 4

    def gather_rows(self, source, column: int, rows, target) -> None:
        """Starts to copy 64 rows of a GMEM ref [a, b, n], from a column on, to a SMEM ref (64, m).

        A barrier that `track_copies` has named signals the end of the copies.

        Args:
            source: of 16-bit values.
            column: the first of m columns.
            rows: [128] int32, the index (of a * b rows) that each thread has looked up.
            target: tiled as WGMMA_OPERAND.
        """
        if self.interpreting:
            place = jnp.argsort(self.gathered_row(), stable=True)[::2]
            whole = source[...].reshape(-1, source.shape[-1])
            target[...] = whole[rows[place], column : column + target.shape[1]]
            return

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), THREADS, plgpu.RefType(WGMMA_OPERAND)),
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

            # The thread's index is read anew each time, so that the compiler does not keep what
            # follows from it in the caller's few registers.
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
        """Keeps a barrier's phase from completing before this thread's `gather_rows` copies so far.

        It does not arrive on the barrier. The thread does that afterwards.
        """
        if not self.interpreting:
            ref, transforms = get_ref_and_transforms(barrier, None, "track_copies")
            flat, tree = jax.tree.flatten(transforms)
            _track_copies_p.bind(ref, *flat, transforms_tree=tree)


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
