"""Arrays in registers: constants, indices, and loads and stores that choose the layout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.threads import (
    ROWS,
    SCALAR,
    Mode,
    element_pointer,
    first_row_of_warp,
    own_four,
)


def per_row(values, shape: tuple[int, ...]) -> jax.Array:
    """Returns a tile that has one value per row, the same in all columns."""
    return lax.broadcast_in_dim(values, shape, [0])


def per_column(values, shape: tuple[int, ...]) -> jax.Array:
    """Returns a tile that has one value per column, the same in all rows."""
    return lax.broadcast_in_dim(values, shape, [1])


def opaque_zero(number, varying=None) -> Any:
    """Returns 0, computed so that the compiler does not know it.

    An index that contains this 0 is computed where it is used. With a constant index, the compiler
    computes addresses early and holds them in registers through the loops in between.

    Args:
        number: traced, 0 .. 2^30 - 1.
        varying: a number that changes in each iteration of a loop, so that the 0 and what depends
            on it are computed in the loop. None: `number` does, or there is no such loop.
    """
    zero = number >> 30
    return zero if varying is None else zero & varying


@dataclasses.dataclass(frozen=True)
class Values(Mode):
    """Makes, loads and stores arrays in registers."""

    def full(self, shape, value, layout) -> jax.Array:
        """Returns a float32 array with the same value everywhere."""
        x = jnp.full(shape, value, jnp.float32)
        return x if self.interpreting else plgpu.layout_cast(x, layout)

    def iota(self, shape, dimension: int) -> jax.Array:
        """Returns indices along one dimension of a WGMMA tile.

        They are a line that is broadcast. An iota of the tile's shape would take one register per
        element.
        """
        line = self.iota_line(shape[dimension], plgpu.Layout.WGMMA.reduce(1 - dimension))
        return lax.broadcast_in_dim(line, shape, [dimension])

    def iota_line(self, count: int, layout: Any) -> jax.Array:
        """Returns 0, 1, ... with one value per row (ROWS) or per column (COLUMNS) of a tile."""
        layout = None if self.interpreting else layout
        return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)

    def load_rows(self, ref) -> jax.Array:
        """Loads one value per row of a WGMMA tile, as ROWS."""
        return ref[...] if self.interpreting else plgpu.load(ref, layout=ROWS, optimized=False)

    def load_tile(self, ref) -> jax.Array:
        """Loads a WGMMA tile."""
        return ref[...] if self.interpreting else plgpu.load(ref, layout=plgpu.Layout.WGMMA)

    def load_strided(self, ref, layout) -> jax.Array:
        """Loads an array in any layout."""
        return ref[...] if self.interpreting else plgpu.load(ref, layout=layout, optimized=False)

    # `store_blocks` writes a (64, n) tile in the order of the registers that hold it: for every 8
    # columns, 4 neighbouring values per thread. That fills whole sectors without shared memory.
    # Only `load_blocks` reads this order.
    def store_blocks(self, ref, value, count) -> None:
        """Stores at least the first `count` rows of a (64, n) WGMMA tile to GMEM [n / 8, 512].

        Each warp stores all of its 16 rows or none.
        """
        if self.interpreting:
            ref[...] = value.reshape(64, -1, 8).swapaxes(0, 1).reshape(-1, 512)
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, SCALAR))
        def store(ctx, target, tile, rows):
            del ctx
            start = element_pointer(target, own_four())
            used = arith.cmpi(arith.CmpIPredicate.slt, first_row_of_warp(), rows.registers.item())
            with mgpu.utils.when(used):
                for j, (upper, lower) in enumerate(tile.registers.reshape(-1, 2)):
                    place = mgpu.utils.getelementptr(start, [512 * j], tile.mlir_dtype)
                    four = vector.shuffle(upper, lower, [0, 1, 2, 3])
                    llvm.store(four, place, alignment=4 * mgpu.utils.bytewidth(tile.mlir_dtype))

        store(ref, value, count)

    def load_blocks(self, ref) -> jax.Array:
        """Loads what `store_blocks` wrote to GMEM [n / 8, 512], as a (64, n) WGMMA tile."""
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
