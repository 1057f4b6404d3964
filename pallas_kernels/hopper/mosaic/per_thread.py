"""Arrays with one int32 per thread of a warpgroup: indexed access, and exchange within a warp.

Such an array has shape [128]. Element 32 w + i is held by lane i of warp w. In the interpreter
indexed loads and stores are NumPy's, and an exchange moves elements of the array.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.threads import (
    THREADS,
    Mode,
    element_pointer,
    scalar_of,
    thread,
)

WARPS, LANES = 4, 32  # of a warpgroup


@dataclasses.dataclass(frozen=True)
class PerThread(Mode):
    """What threads do with one value each. All threads of a warpgroup call a method together."""

    def thread_index(self) -> jax.Array:
        """Returns [128] int32: each thread's index in its warpgroup."""
        layout = None if self.interpreting else THREADS
        return plgpu.broadcasted_iota(jnp.int32, (WARPS * LANES,), 0, layout=layout)

    def load_indexed(self, ref, index) -> jax.Array:
        """Loads one int32 per thread from a contiguous ref.

        index: [128] int32, counted from the ref's first element.
        """
        if self.interpreting:
            return ref[...].reshape(-1)[index]

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), THREADS),
            return_type=plgpu.ShapeDtypeStruct((WARPS * LANES,), jnp.int32, THREADS),
        )
        def load(ctx, source, places):
            del ctx
            place = element_pointer(source, _value_of(places))
            return _with_value(places, llvm.load(ir.IntegerType.get_signless(32), place))

        return load(ref, _laid_out(index))

    def store_indexed(self, ref, index, value) -> None:
        """Stores one int32 per thread to a contiguous ref of this CTA's shared memory.

        index: [128] int32, all different, counted from the ref's first element.
        """
        if self.interpreting:
            ref[...] = ref[...].reshape(-1).at[index].set(value).reshape(ref.shape)
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), THREADS, THREADS))
        def store(ctx, target, places, values):
            del ctx
            llvm.store(_value_of(values), element_pointer(target, _value_of(places)))

        store(ref, _laid_out(index), _laid_out(value))

    def store_row_per_warp(self, ref, row, fields: Sequence[jax.Array]) -> None:
        """Stores one row per warp to a contiguous GMEM ref [n, an even number of fields] of int32.

        row, fields: [128] int32 each. Those of a warp's first lane count. A row from n on is not
            stored.
        """
        count = ref.shape[0]
        if self.interpreting:
            for first in range(0, WARPS * LANES, LANES):
                pl.when(row[first] < count)(functools.partial(_store_row, ref, row, fields, first))
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), THREADS, *(THREADS for _ in fields)))
        def store(ctx, target, rows, *columns):
            del ctx
            i32 = ir.IntegerType.get_signless(32)
            two = ir.VectorType.get((2,), i32)
            lane = arith.remui(thread(), mgpu.utils.c(LANES, i32))
            is_first = arith.cmpi(arith.CmpIPredicate.eq, lane, mgpu.utils.c(0, i32))
            row = _value_of(rows)
            is_stored = arith.cmpi(arith.CmpIPredicate.ult, row, mgpu.utils.c(count, i32))
            values = [_value_of(column) for column in columns]
            start = arith.muli(row, mgpu.utils.c(len(values), i32))
            with mgpu.utils.when(arith.andi(is_first, is_stored)):
                begin = element_pointer(target, start)
                for i in range(0, len(values), 2):
                    place = mgpu.utils.getelementptr(begin, [i], i32)
                    llvm.store(vector.from_elements(two, values[i : i + 2]), place, alignment=8)

        store(ref, *map(_laid_out, (row, *fields)))

    def from_lane_before(self, x, distance: int, fill: int) -> jax.Array:
        """Returns per lane the value of the lane so far before it in its warp, or else `fill`."""
        if self.interpreting:
            lanes = x.reshape(WARPS, LANES)
            filled = jnp.full((WARPS, distance), fill, x.dtype)
            return jnp.concatenate([filled, lanes[:, :-distance]], axis=1).reshape(-1)

        @plgpu.inline_mgpu(
            arg_types=(THREADS,),
            return_type=plgpu.ShapeDtypeStruct((WARPS * LANES,), jnp.int32, THREADS),
        )
        def shift(ctx, values):
            del ctx
            i32 = ir.IntegerType.get_signless(32)

            def constant(number):
                return mgpu.utils.c(number, i32)

            got = nvvm.shfl_sync(
                constant(-1),
                _value_of(values),
                constant(distance),
                constant(0),
                nvvm.ShflKind.up,
            )
            lane = arith.remui(thread(), constant(LANES))
            exists = arith.cmpi(arith.CmpIPredicate.uge, lane, constant(distance))
            return _with_value(values, arith.select(exists, got, constant(fill)))

        return shift(_laid_out(x))

    def sum_in_warp(self, x) -> jax.Array:
        """Returns in each lane the sum over its warp."""
        if self.interpreting:
            sums = jnp.sum(x.reshape(WARPS, LANES), axis=1, dtype=jnp.int32)
            return jnp.repeat(sums, LANES)

        @plgpu.inline_mgpu(
            arg_types=(THREADS,),
            return_type=plgpu.ShapeDtypeStruct((WARPS * LANES,), jnp.int32, THREADS),
        )
        def add(ctx, values):
            del ctx
            total = llvm.inline_asm(
                ir.IntegerType.get_signless(32),
                [_value_of(values)],
                "redux.sync.add.s32 $0, $1, 0xffffffff;",
                "=r,r",
                has_side_effects=True,
            )
            return _with_value(values, total)

        return add(_laid_out(x))

    def wait_for_warpgroup(self) -> None:
        """Waits for all threads of the warpgroup, and sees what they stored to shared memory."""
        if self.interpreting:
            return

        @plgpu.inline_mgpu()
        def wait(ctx):
            del ctx
            mgpu.utils.warpgroup_barrier()

        wait()


def _store_row(ref, row: jax.Array, fields: Sequence[jax.Array], thread_index: int) -> None:
    """Stores the row of one thread, in the interpreter."""
    for i, field in enumerate(fields):
        ref[row[thread_index], i] = field[thread_index]


def _laid_out(x: jax.Array) -> jax.Array:
    """Returns an array in the layout of one value per thread, also where all values are equal."""
    return plgpu.layout_cast(x, THREADS)


def _value_of(array: mgpu.FragmentedArray) -> ir.Value:
    """Returns this thread's value (i32) of an array with one value per thread."""
    return scalar_of(array.registers.item())


def _with_value(array: mgpu.FragmentedArray, value: ir.Value) -> mgpu.FragmentedArray:
    """Returns an array like this one, with another value (i32) in this thread."""
    register = vector.broadcast(array.registers.item().type, value)
    registers = np.full_like(array.registers, register)
    return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=True)
