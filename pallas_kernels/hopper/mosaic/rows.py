"""Stores rows of o and lse: the only way for a kernel to write them, and never past the last one.

A tile has as many rows as its plan says, but the last tile of a request may have fewer, and one of
two CTAs that share a tile may have none. `Rows` knows how many exist; its methods store what a
kernel holds, in whatever layout it holds it, to those rows and to no other.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.dequantize import GROUP, place_in_dimensions
from pallas_kernels.hopper.mosaic.primitives import (
    ROWS,
    SCALAR,
    Backend,
    element_pointer,
    place_in_tile,
)
from pallas_kernels.hopper.mosaic.transposed import COLUMNS

BLOCK = 64  # rows of a WGMMA tile, and columns of a part of one
SWIZZLED_ROWS = 8  # of a tile in shared memory
# What a thread stores: (row, counted from its first one; element, likewise; the register).
Store = tuple[int, int, ir.Value]
# The first row (i32) and the first element (i32) of a thread, and its stores. Where threads hold
# copies of a value all of them store it, because choosing one takes a register.
Places = tuple[ir.Value, ir.Value, Iterator[Store]]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows first .. first + height of an array, those at or past `total` left out.

    at: indices of the array's dimensions before that of the rows, e.g. (request,). first: traced, a
    multiple of height. height, total: static. ragged: whether there can be a tile with fewer rows
    than height; False leaves the comparison out of the code.
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
        """Returns rows of a partial result, whose array has a row for every row of the tile."""
        return Rows(at, first, height, height, ragged=False)

    @property
    def count(self) -> Any:
        """How many of the rows exist; it may be negative, or above height."""
        return self.total - self.first if self.ragged else self.height

    def row(self, index: Any) -> "Rows":
        """One row of the tile, which must have it."""
        return Rows(self.at, self.first + index, 1, self.total, self.ragged)

    def when_there(self, store: Callable[[int], None]) -> None:
        """Calls store(n) where n of the rows exist: all of them, or total % height."""
        if not self.ragged:
            store(self.height)
            return
        end, rest = self.first + self.height, self.total % self.height
        if self.total >= self.height:
            pl.when(end <= self.total)(lambda: store(self.height))
        if rest:
            pl.when((self.first < self.total) & (end > self.total))(lambda: store(rest))

    def store(self, ref: Any, value: Any, *columns: Any) -> None:
        """Stores value [height, ...] as JAX does; columns: slices of the other dimensions."""

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

        By TMA, through a SMEM ref (64, n) that `WGMMA_OPERAND` tiles; it may be written again when
        this returns. TMA takes arrays with rows by eights: others are stored from registers.
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

    # -- a value per row ------------------------------------------------------------------------
    def store_values(self, g: Backend, ref: Any, values: Any) -> None:
        """Stores values [64] that lie beside a WGMMA tile, as ROWS, to ref [..., R]."""

        def places(array: Any, strides: list[int]) -> Places:
            del strides
            row, _ = place_in_tile()
            stores = ((8 * i, 8 * i, _scalar(x)) for i, x in enumerate(array.registers.flat))
            return row, row, stores

        self._store(g, ref, values, ROWS, places)

    def store_column_values(self, g: Backend, ref: Any, values: Any) -> None:
        """Stores values [height] that lie above a WGMMA tile, as COLUMNS, to ref [..., R]."""

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

    # -- a row of values ------------------------------------------------------------------------
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

    def store_transposed(self, g: Backend, ref: Any, value: Any, column: Any = 0) -> None:
        """Stores the transpose of an (m, height) WGMMA tile to ref [..., R, d], from a column on.

        Eight lanes write eight neighbours: 32-byte sectors of float32, no shared memory.
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
        """Stores rows of O^T (m, height), from groups first_group .., to ref [..., R, d].

        O^T comes from `WideningBackend.mma_widened`, in the order of dimensions that `widen` has.
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
        """Stores from registers, each thread what it holds, row by row where they are ragged."""
        if g.interpreting or not (columns or self.ragged):
            # Pallas's own store of a value per row takes fewer registers.
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
            # One number to compare with, since few registers are left beside a tile.
            room = arith.subi(limit[0].registers.item(), row)
            by_row: dict[int, list[tuple[int, ir.Value]]] = {}
            for further, element, register in stores:
                by_row.setdefault(further, []).append((element, register))
            for further, of_row in by_row.items():
                bound = mgpu.utils.c(further, room.type)
                with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.sgt, room, bound)):
                    for element, register in of_row:
                        _put(start, element, register, array.mlir_dtype)

        # The view begins at the first row. Its size is not that of the store.
        rows = pl.ds(self.first, min(self.height, ref.shape[len(self.at)]))
        store(ref.at[*self.at, rows, *columns], value, *limit)


def _index(row: ir.Value, stride: int, column: ir.Value) -> ir.Value:
    return arith.addi(arith.muli(row, mgpu.utils.c(stride, row.type)), column)


def _scalar(register: ir.Value) -> ir.Value:
    is_vector = isinstance(register.type, ir.VectorType)
    return vector.extract(register, [], [0]) if is_vector else register


def _put(start: ir.Value, element: int, register: ir.Value, dtype: ir.Type) -> None:
    llvm.store(register, mgpu.utils.getelementptr(start, [element], dtype))
