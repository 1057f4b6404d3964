"""Primitives of the transposed kernels, where queries are the columns of a wgmma tile.

S^T = K Q^T has one row per token and one column per query. So softmax reduces over rows, across
the four warps, and one value per query is a row vector (COLUMNS).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.mosaic.threads import place_in_tile
from pallas_kernels.hopper.mosaic.values import per_column

COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # one value per column of a (64, n) WGMMA tile
WARPS = 4  # of a warpgroup
LANE_DISTANCES = (4, 8, 16)  # between the lanes of a warp that hold the same column


@dataclasses.dataclass(frozen=True)
class TransposedBackend(Backend):
    """`Backend` with the primitives that only the transposed kernels need."""

    def mma_tt(self, acc, part, a, b) -> None:
        """Starts acc[part] += a.T @ b.T and leaves it in flight.

        part: a slice of the accumulator's rows. a, b: 16-bit operands.
        """
        if self.interpreting:
            acc[part, :] = acc[part, :] + jnp.dot(
                a[...].astype(jnp.float32).T, b[...].astype(jnp.float32).T, precision="highest"
            )
        else:
            self._fence_registers()
            plgpu.wgmma(acc.at[part], a.transpose((1, 0)), b.transpose((1, 0)))

    def scale_columns(self, acc, columns) -> None:
        """Multiplies each column of an accumulator by its value."""
        acc[...] = self.read(acc) * per_column(columns, acc.shape)

    def store_t(self, ref, value) -> None:
        """Stores the transpose of a (64, n) WGMMA tile to a tiled (n, 64) SMEM ref."""
        if self.interpreting:
            ref[...] = value.T
        else:
            tile = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
            ref.transpose((1, 0))[...] = tile

    def column_parts(self, x, kind: str) -> jax.Array:
        """Returns each thread's maximum or sum over the rows of a (64, n) tile that it holds.

        There are two such rows. The result is laid out as COLUMNS, but its copies in different
        lanes and warps differ until `over_rows` reduces them. kind: "max" or "add".
        """
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
        """Returns the maximum or sum of the results of `column_parts`, as COLUMNS.

        All warps get the same values. scratch: float32 SMEM (WARPS, n). The warpgroup must pass a
        barrier between two uses of the scratch.
        """
        if self.interpreting:
            return parts

        columns = parts.shape[0]

        @plgpu.inline_mgpu(
            arg_types=(COLUMNS, plgpu.RefType()),
            return_type=plgpu.ShapeDtypeStruct((columns,), jnp.float32, COLUMNS),
        )
        def reduce(ctx, parts, shared):
            del ctx
            combine = _combine(kind)
            index, constant = ir.IndexType.get(), mgpu.utils.c
            pair = ir.VectorType.get((2,), ir.F32Type.get())
            row, column = place_in_tile()
            warp = arith.index_cast(index, arith.divui(row, constant(16, row.type)))
            first = arith.index_cast(index, column)
            places = [arith.addi(first, constant(8 * j, index)) for j in range(columns // 8)]
            for place, both in zip(places, parts.registers.flat, strict=True):
                for distance in LANE_DISTANCES:
                    both = combine(both, mgpu.utils.shfl_bfly(both, distance))
                vector.store(both, shared, [warp, place])
            mgpu.utils.warpgroup_barrier()
            results = []
            for place in places:
                of_warps = [
                    vector.load(pair, shared, [constant(w, index), place]) for w in range(WARPS)
                ]
                results.append(combine(combine(*of_warps[:2]), combine(*of_warps[2:])))
            return _columns_array(results)

        return reduce(parts, scratch)

    def reduce_rows(self, x, scratch, kind: str) -> jax.Array:
        """Returns the maximum or sum over the rows of a (64, n) tile, as COLUMNS.

        scratch: as in `over_rows`.
        """
        return self.over_rows(self.column_parts(x, kind), scratch, kind)


def _combine(kind: str):
    return arith.maximumf if kind == "max" else arith.addf


def _columns_array(pairs) -> mgpu.FragmentedArray:
    """Returns COLUMNS of the pairs of values that a thread holds, one pair for every 8 columns."""
    layout = COLUMNS.to_mgpu()
    registers = np.empty(layout.registers_shape((8 * len(pairs),)), dtype=object)
    registers.flat[:] = pairs
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
