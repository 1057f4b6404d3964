"""Arrays with one int32 per thread of a warpgroup: indexed access, and exchange within a warp.

Such an array has shape [128]. Element 32 w + i is held by lane i of warp w. In the interpreter
indexed loads and stores are NumPy's, and an exchange moves elements of the array.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

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

    def load_indexed(self, ref, index, *, written_by_others: bool = False) -> jax.Array:
        """Loads one int32 per thread from a contiguous ref.

        index: [128] int32, counted from the ref's first element.
        written_by_others: whether other CTAs of the launch may have written it: then it is not
            read from this SM's cache.
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
            i32 = ir.IntegerType.get_signless(32)
            return _with_value(places, llvm.load(i32, place, volatile_=written_by_others))

        return load(ref, _laid_out(index))

    def store_indexed(self, ref, index, value, where=None) -> None:
        """Stores one int32 per thread to a contiguous ref.

        index: [128] int32, all different, counted from the ref's first element.
        where: [128] int32, which threads store: those with a value other than 0; None: all.
        """
        if self.interpreting:
            if where is not None:
                index = jnp.where(where != 0, index, ref.size)
            ref[...] = ref[...].reshape(-1).at[index].set(value, mode="drop").reshape(ref.shape)
            return
        flags = () if where is None else (where,)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(THREADS for _ in range(2 + len(flags)))))
        def store(ctx, target, places, values, *flags):
            del ctx
            place = element_pointer(target, _value_of(places))
            if not flags:
                llvm.store(_value_of(values), place)
                return
            (flag,) = map(_value_of, flags)
            zero = mgpu.utils.c(0, flag.type)
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ne, flag, zero)):
                llvm.store(_value_of(values), place)

        store(ref, *map(_laid_out, (index, value, *flags)))

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
        return self._reduce_in_warp(x, "add", jnp.sum)

    def min_in_warp(self, x) -> jax.Array:
        """Returns in each lane the smallest value of its warp."""
        return self._reduce_in_warp(x, "min", jnp.min)

    def max_in_warp(self, x) -> jax.Array:
        """Returns in each lane the largest value of its warp."""
        return self._reduce_in_warp(x, "max", jnp.max)

    def _reduce_in_warp(self, x, operation: str, interpreted: Callable[..., Any]) -> jax.Array:
        if self.interpreting:
            results = interpreted(x.reshape(WARPS, LANES), axis=1).astype(jnp.int32)
            return jnp.repeat(results, LANES)

        @plgpu.inline_mgpu(
            arg_types=(THREADS,),
            return_type=plgpu.ShapeDtypeStruct((WARPS * LANES,), jnp.int32, THREADS),
        )
        def reduce(ctx, values):
            del ctx
            result = llvm.inline_asm(
                ir.IntegerType.get_signless(32),
                [_value_of(values)],
                f"redux.sync.{operation}.s32 $0, $1, 0xffffffff;",
                "=r,r",
                has_side_effects=True,
            )
            return _with_value(values, result)

        return reduce(_laid_out(x))

    def scan(
        self, values: Sequence[Any], combine: Callable[[Any, Any], Any], identity: int, ref: Any
    ) -> tuple[list[Any], list[Any]]:
        """Returns for each array what the threads before have together, and what all have.

        combine: an associative operation. ref: [128 * arrays] int32 of shared memory that no other
            scan has.
        """
        thread, threads = self.thread_index(), WARPS * LANES
        distance = 1
        while distance < LANES:  # The exchanges of several arrays are in flight at the same time.
            earlier = [self.from_lane_before(value, distance, identity) for value in values]
            values = list(map(combine, values, earlier))
            distance *= 2
        for k, value in enumerate(values):
            self.store_indexed(ref, k * threads + thread, value)
        within = [self.from_lane_before(value, 1, identity) for value in values]
        self.wait_for_warpgroup()
        before, total = [], []
        for k, value in enumerate(within):
            together = jnp.full_like(value, identity)
            for warp in range(WARPS):
                last = jnp.full_like(thread, k * threads + LANES * warp + LANES - 1)
                value = jnp.where(thread // LANES == warp, combine(value, together), value)
                together = combine(together, self.load_indexed(ref, last))
            before.append(value)
            total.append(together)
        return before, total

    def sum_over_threads(self, x, ref) -> jax.Array:
        """Returns in each thread the sum over all; ref: as in `scan`, for one array."""
        thread = self.thread_index()
        self.store_indexed(ref, thread, self.sum_in_warp(x))
        self.wait_for_warpgroup()
        firsts = [jnp.full_like(thread, LANES * warp) for warp in range(WARPS)]
        sums = [self.load_indexed(ref, first) for first in firsts]
        return sum(sums[1:], sums[0])

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
