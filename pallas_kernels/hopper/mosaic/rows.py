"""Stores rows of o and lse, and never past the last row.

Kernels write their results only through this module. The plan fixes the rows of a tile, but the
last tile of a request may have fewer. If two CTAs share that tile, one of them may have none.
`Rows` counts the rows that exist. Its methods store values to those rows only, from any layout in
which a kernel holds them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.int8 import GROUP, place_in_dimensions
from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.mosaic.threads import (
    ROWS,
    SCALAR,
    element_pointer,
    place_in_tile,
    scalar_of,
    transposed_in_quads,
)
from pallas_kernels.hopper.mosaic.transposed import COLUMNS

BLOCK = 64  # rows of a WGMMA tile, and columns of one of its parts
SWIZZLED_ROWS = 8  # rows per swizzled tile in shared memory
# One store of a thread: its row and its element, counted from the thread's first ones, and the
# register.
Store = tuple[int, int, ir.Value]
# The first row (i32) and the first element (i32) of a thread, and its stores. Where several threads
# hold copies of a value, all of them store it, because choosing one thread takes a register.
Places = tuple[ir.Value, ir.Value, Iterator[Store]]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows first .. first + height - 1 of an array, without those at or past `total`.

    at: indices of the array's dimensions before that of the rows, e.g. (request,).
    first: the first row, traced, a multiple of height.
    height, total: static.
    ragged: whether a tile can have fewer rows than height. False removes the comparison from the
        code.
    """

    at: tuple[Any, ...]
    first: Any
    height: int
    total: int
    ragged: bool

    @staticmethod
    def of_tile(request: Any, first: Any, height: int, *, total: int, rows_per_tile: int) -> "Rows":
        """Returns rows of an output with `total` rows per request, in tiles of rows_per_tile."""
        return Rows((request,), first, height, total, total % rows_per_tile != 0)

    @staticmethod
    def of_partial(at: tuple[Any, ...], first: Any, height: int) -> "Rows":
        """Returns rows of a partial result, whose array has every row of the tile."""
        return Rows(at, first, height, height, ragged=False)

    @property
    def count(self) -> Any:
        """Returns how many of the rows exist. It can be negative, or above height."""
        return self.total - self.first if self.ragged else self.height

    def row(self, index: Any) -> "Rows":
        """Returns one row of the tile. The tile must have it."""
        return Rows(self.at, self.first + index, 1, self.total, self.ragged)

    def when_there(self, store: Callable[[int], None]) -> None:
        """Calls store(n) if n > 0 rows exist: n is height, or total % height in the last tile."""
        if not self.ragged:
            store(self.height)
            return
        end, rest = self.first + self.height, self.total % self.height
        if self.total >= self.height:
            pl.when(end <= self.total)(lambda: store(self.height))
        if rest:
            pl.when((self.first < self.total) & (end > self.total))(lambda: store(rest))

    def store(self, ref: Any, value: Any, *columns: Any) -> None:
        """Stores value [height, ...] by an assignment to the reference.

        columns: slices of the dimensions after that of the rows.
        """

        def store(there: int) -> None:
            part = value if there == self.height else value[:there]
            ref.at[*self.at, pl.ds(self.first, there), *columns][...] = part

        self.when_there(store)

    def store_strided(self, ref: Any, value: Any, columns: Any) -> None:
        """Stores some columns of a single row."""

        def store(there: int) -> None:
            del there
            ref.at[*self.at, self.first, columns][...] = value

        self.when_there(store)

    def store_scalar(self, ref: Any, value: Any) -> None:
        """Stores one value, for a single row."""

        def store(there: int) -> None:
            del there
            ref[*self.at, self.first] = value

        self.when_there(store)

    def store_parts(self, g: Backend, ref: Any, column: int, parts: Any, staging: Any) -> None:
        """Stores WGMMA tiles (64, 64) side by side to ref [..., R, d], from a column on.

        TMA copies them if the array's rows are a multiple of 8, the rows per swizzled tile. Else
        threads store them from registers.

        staging: SMEM (64, n) that `WGMMA_OPERAND` tiles. It may be overwritten after this returns.
        """
        columns = range(0, BLOCK * len(parts), BLOCK)
        if self.total % SWIZZLED_ROWS:
            for c, part in zip(columns, parts, strict=True):
                self.store_tile(g, ref, part, column + c)
            return
        for c, part in zip(columns, parts, strict=True):
            staging.at[:, pl.ds(c, BLOCK)][...] = part
        plgpu.commit_smem()

        def copy(there: int) -> None:
            source = staging if there == self.height else staging.at[pl.ds(0, there)]
            rows = pl.ds(self.first, there)
            target = ref.at[*self.at, rows, pl.ds(column, BLOCK * len(parts))]
            plgpu.copy_smem_to_gmem(source, target)

        self.when_there(copy)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # -- one value per row ----------------------------------------------------------------------
    def store_values(self, g: Backend, ref: Any, values: Any) -> None:
        """Stores values [64], one per row of a WGMMA tile (ROWS), to ref [..., R]."""

        def places(array: Any, strides: list[int]) -> Places:
            row, _ = place_in_tile()
            stores = (
                (8 * i, 8 * i * strides[0], scalar_of(x))
                for i, x in enumerate(array.registers.flat)
            )
            return row, arith.muli(row, mgpu.utils.c(strides[0], row.type)), stores

        self._store(g, ref, values, ROWS, places)

    def store_column_values(self, g: Backend, ref: Any, values: Any) -> None:
        """Stores values [height], one per column of a WGMMA tile (COLUMNS), to ref [..., R]."""

        def places(array: Any, strides: list[int]) -> Places:
            del strides
            _, column = place_in_tile()
            stores = (
                (8 * j + i, 8 * j + i, vector.extract(pair, [], [i]))
                for j, pair in enumerate(array.registers.flat)
                for i in range(2)
            )
            return column, column, stores

        self._store(g, ref, values, COLUMNS, places)

    # -- several values per row -----------------------------------------------------------------
    def store_tile(self, g: Backend, ref: Any, value: Any, column: Any) -> None:
        """Stores a (64, n) WGMMA tile to ref [..., R, d], from a column on."""

        def places(tile: Any, strides: list[int]) -> Places:
            row, column = place_in_tile()
            registers = tile.registers.reshape(-1, 2)
            stores = (
                (8 * lower, 8 * lower * strides[0] + 8 * j, register)
                for lower in (0, 1)
                for j, register in enumerate(registers[:, lower])
            )
            return row, _index(row, strides[0], column), stores

        columns = pl.ds(column, value.shape[1])
        self._store(g, ref, value, plgpu.Layout.WGMMA, places, columns)

    def store_tile_in_chunks(self, g: Backend, ref: Any, value: Any, column: Any) -> None:
        """Stores a 16-bit tile as `store_tile` does, 16 bytes at once.

        The lanes of a quad first exchange values, so that each has 8 neighbouring ones of a row.
        The number of columns is a multiple of 32.
        """

        def places(tile: Any, strides: list[int]) -> Places:
            row, pair = place_in_tile()
            i32 = ir.IntegerType.get_signless(32)
            stores = []
            registers = tile.registers.reshape(-1, 4, 2)
            for (i, lower), _ in np.ndenumerate(registers[:, 0]):
                words = [mgpu.utils.bitcast(x, i32) for x in registers[i, :, lower]]
                chunk = vector.from_elements(
                    ir.VectorType.get((4,), i32), transposed_in_quads(words)
                )
                stores.append((8 * lower, 8 * lower * strides[0] + 32 * i, chunk))
            own = arith.muli(pair, mgpu.utils.c(4, pair.type))
            return row, _index(row, strides[0], own), iter(stores)

        columns = pl.ds(column, value.shape[1])
        self._store(g, ref, value, plgpu.Layout.WGMMA, places, columns)

    def store_transposed(self, g: Backend, ref: Any, value: Any, column: Any = 0) -> None:
        """Stores the transpose of an (m, height) WGMMA tile to ref [..., R, d], from a column on.

        Eight lanes write eight neighbouring values. In float32 these fill a sector of 32 bytes, so
        the transpose needs no shared memory.
        """

        def places(tile: Any, strides: list[int]) -> Places:
            m, n = tile.shape
            dimension, row = place_in_tile()
            registers = tile.registers.reshape(m // 64, n // 8, 2)
            stores = (
                (
                    8 * j + pair,
                    (8 * j + pair) * strides[0] + 64 * i + 8 * lower,
                    vector.extract(register, [], [pair]),
                )
                for (i, j, lower), register in np.ndenumerate(registers)
                for pair in range(2)
            )
            return row, _index(row, strides[0], dimension), stores

        columns = pl.ds(column, value.shape[0])
        self._store(g, ref, value, plgpu.Layout.WGMMA, places, columns, transposed=True)

    def store_dimensions(self, g: Backend, ref: Any, value: Any, first_group: int) -> None:
        """Stores a part of O^T (m, height), whose first group is first_group, to ref [..., R, d].

        `DequantizingBackend.mma_dequantized` computes O^T, in the order of `place_in_dimensions`.
        """

        def places(tile: Any, strides: list[int]) -> Places:
            m, n = tile.shape
            dimension, row = place_in_dimensions()
            registers = tile.registers.reshape(m // GROUP, n // 8, 2)
            two = ir.VectorType.get((2,), tile.mlir_dtype)
            stores = (
                (
                    8 * j + pair,
                    (8 * j + pair) * strides[0] + 16 * (first_group + i),
                    vector.from_elements(
                        two, [vector.extract(registers[i, j, h], [], [pair]) for h in range(2)]
                    ),
                )
                for i in range(m // GROUP)
                for j in range(n // 8)
                for pair in range(2)
            )
            return row, _index(row, strides[0], dimension), stores

        if g.interpreting:
            columns = pl.ds(GROUP * first_group, value.shape[0])
            self.store(ref, value.T, columns)
        else:
            self._store(g, ref, value, plgpu.Layout.WGMMA, places, slice(None))

    def _store(
        self,
        g: Backend,
        ref: Any,
        value: Any,
        layout: Any,
        places: Callable[[Any, list[int]], Places],
        *columns: Any,
        transposed: bool = False,
    ) -> None:
        """Stores each thread's registers, and compares row by row if the rows are ragged.

        Args:
            g: the primitives.
            ref: the array.
            value: what to store, [height, ...], or [..., height] if it is transposed.
            layout: the value's layout.
            places: returns a thread's stores, given the value and the strides of the array.
            *columns: slices of the dimensions after that of the rows.
            transposed: whether the rows are the value's columns.
        """
        if g.interpreting or not (columns or self.ragged):
            # Pallas's own store of one value per row takes fewer registers.
            self.store(ref, value.T if transposed else value, *columns)
            return

        limit = (self.count,) if self.ragged else ()

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, *(SCALAR for _ in limit)))
        def store(ctx, target, array, *limit):
            del ctx
            strides, _ = ir.MemRefType(target.type).get_strides_and_offset()
            row, index, stores = places(array, strides)
            start = element_pointer(target, index)
            if not limit:
                for _, element, register in stores:
                    _put(start, element, register, array.mlir_dtype)
                return
            # All comparisons use the same number, because a tile leaves few registers free.
            room = arith.subi(limit[0].registers.item(), row)
            by_row: dict[int, list[tuple[int, ir.Value]]] = {}
            for offset, element, register in stores:
                by_row.setdefault(offset, []).append((element, register))
            for offset, of_row in by_row.items():
                bound = mgpu.utils.c(offset, room.type)
                with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.sgt, room, bound)):
                    for element, register in of_row:
                        _put(start, element, register, array.mlir_dtype)

        # The view begins at the first row. The store's size is not limited to that of the view.
        rows = pl.ds(self.first, min(self.height, ref.shape[len(self.at)]))
        store(ref.at[*self.at, rows, *columns], value, *limit)


@dataclasses.dataclass(frozen=True)
class CountedRows(Rows):
    """Rows first .. first + number - 1 of an array, at most `height`.

    first: any row. number: traced. The rows are the first dimension of the array.
    """

    number: Any = None

    @staticmethod
    def of_ragged_tile(first: Any, number: Any, height: int) -> "CountedRows":
        return CountedRows((), first, height, height, ragged=True, number=number)

    @property
    def count(self) -> Any:
        return self.number

    def store(self, ref: Any, value: Any, *columns: Any) -> None:
        """Stores the rows by assignments of 2^n rows, in the interpreter only."""
        number = jnp.clip(self.number, 0, self.height)

        def part(size: int) -> None:
            begin = number // (2 * size) * (2 * size)
            rows = pl.ds(self.first + begin, size)
            ref.at[rows, *columns][...] = lax.dynamic_slice_in_dim(value, begin, size)

        size = self.height
        while size:
            pl.when((number & size) > 0)(functools.partial(part, size))
            size //= 2


def _index(row: ir.Value, stride: int, column: ir.Value) -> ir.Value:
    """Returns the index (i32) of an element in an array with this many elements per row."""
    return arith.addi(arith.muli(row, mgpu.utils.c(stride, row.type)), column)


def _put(start: ir.Value, element: int, register: ir.Value, dtype: ir.Type) -> None:
    llvm.store(register, mgpu.utils.getelementptr(start, [element], dtype))
