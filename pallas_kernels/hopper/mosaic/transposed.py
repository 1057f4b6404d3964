"""Primitives of the transposed form, where queries are the columns of a wgmma tile.

S^T = K Q^T has a token a row and a query a column, so softmax reduces over rows, across the four
warps, and one value a query lies beside the tile as a row vector.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.primitives import Backend, place_in_tile

COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # one value a column, above a (64, n) WGMMA tile
WARPS = 4
LANES_DOWN = (4, 8, 16)  # lane distances between the rows of a column, within a warp


@dataclasses.dataclass(frozen=True)
class TransposedBackend(Backend):
    """`Backend` with what the transposed form needs besides."""

    def mma_tt(self, acc, part, a, b) -> None:
        """acc[part] += a.T @ b.T, left in flight; 16-bit operands, part a slice of rows."""
        if self.interpreting:
            acc[part, :] = acc[part, :] + jnp.dot(
                a[...].astype(jnp.float32).T, b[...].astype(jnp.float32).T, precision="highest"
            )
        else:
            self._arrive()
            plgpu.wgmma(acc.at[part], a.transpose((1, 0)), b.transpose((1, 0)))

    def scale_columns(self, acc, columns) -> None:
        acc[...] = self.read(acc) * lax.broadcast_in_dim(columns, acc.shape, [1])

    def store_t(self, ref, value) -> None:
        """ref[...] = value.T for a (64, n) WGMMA tile and a tiled (n, 64) SMEM ref."""
        if self.interpreting:
            ref[...] = value.T
        else:
            tile = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
            ref.transpose((1, 0))[...] = tile

    # A value a column in parts, as COLUMNS: each thread's of the two rows that it holds.
    def column_parts(self, x, kind: str) -> jax.Array:
        """max or sum over rows of a (64, n) tile, a part in each thread; for `over_rows`."""
        if self.interpreting:
            return x.max(axis=0) if kind == "max" else x.sum(axis=0)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA,),
            return_type=plgpu.ShapeDtypeStruct(x.shape[1:], jnp.float32, COLUMNS),
        )
        def combine(ctx, tile):
            del ctx
            pairs = tile.registers.reshape(-1, 2)
            return _columns_array([_combine(kind)(*pair) for pair in pairs])

        return combine(x)

    def over_rows(self, parts, scratch, kind: str) -> jax.Array:
        """max or sum of what `column_parts` gave, one value a column, the same in all warps.

        scratch: float32 SMEM (WARPS, n). A barrier of the warpgroup must stand between two uses.
        """
        if self.interpreting:
            return parts

        columns = parts.shape[0]

        @plgpu.inline_mgpu(
            arg_types=(COLUMNS, plgpu.RefType()),
            return_type=plgpu.ShapeDtypeStruct((columns,), jnp.float32, COLUMNS),
        )
        def reduce(ctx, parts, meeting):
            del ctx
            combine = _combine(kind)
            index, constant = ir.IndexType.get(), mgpu.utils.c
            pair = ir.VectorType.get((2,), ir.F32Type.get())
            row, column = place_in_tile()
            warp = arith.index_cast(index, arith.divui(row, constant(16, row.type)))
            first = arith.index_cast(index, column)
            places = [arith.addi(first, constant(8 * j, index)) for j in range(columns // 8)]
            for place, both in zip(places, parts.registers.flat, strict=True):
                for distance in LANES_DOWN:
                    both = combine(both, mgpu.utils.shfl_bfly(both, distance))
                vector.store(both, meeting, [warp, place])
            mgpu.utils.warpgroup_barrier()
            results = []
            for place in places:
                of_warps = [
                    vector.load(pair, meeting, [constant(w, index), place]) for w in range(WARPS)
                ]
                results.append(combine(combine(*of_warps[:2]), combine(*of_warps[2:])))
            return _columns_array(results)

        return reduce(parts, scratch)

    def reduce_rows(self, x, scratch, kind: str) -> jax.Array:
        """max or sum over the rows of a (64, n) tile; scratch and result as of `over_rows`."""
        return self.over_rows(self.column_parts(x, kind), scratch, kind)


def _combine(kind: str):
    return arith.maximumf if kind == "max" else arith.addf


def _columns_array(pairs) -> mgpu.FragmentedArray:
    """Of the pairs of values that a thread has, one pair every 8 columns."""
    layout = COLUMNS.to_mgpu()
    registers = np.empty(layout.registers_shape((8 * len(pairs),)), dtype=object)
    registers.flat[:] = pairs
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
