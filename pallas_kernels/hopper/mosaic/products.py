"""Accumulators and matrix products by wgmma.

In the interpreter an accumulator is float32 scratch, and a product is a plain one that is added to
it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import nvvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.threads import PANELS, array_of
from pallas_kernels.hopper.mosaic.values import Values, per_row
from pallas_kernels.hopper.mosaic.wgmma import PANEL_RANK, operand, products


@dataclasses.dataclass(frozen=True)
class Products(Values):
    """Accumulators, and products that are added to them or kept in registers of their own."""

    def accumulator_scratch(self, threads: int, *shapes: tuple[int, int]) -> tuple:
        """Returns scratch that replaces the accumulators of each thread in the interpreter.

        On the GPU it is empty.
        """
        if not self.interpreting:
            return ()
        return tuple(plgpu.SMEM((threads, *shape), jnp.float32) for shape in shapes)

    def with_accumulators(self, run, scratch, thread: int, *shapes: tuple[int, int]):
        """Returns run(*accumulators), with float32 accumulators of the given shapes."""
        if self.interpreting:
            return run(*(ref.at[thread] for ref in scratch))
        return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def zero(self, acc) -> None:
        """Fills an accumulator with zeros."""
        acc[...] = self.full(acc.shape, 0.0, plgpu.Layout.WGMMA)

    def read(self, acc) -> jax.Array:
        """Returns the accumulator's value. The caller has waited for its products."""
        return acc[...] if self.interpreting else plgpu.wgmma_accumulator_load(acc, wait_n=None)

    def add_exponent(self, value, shift) -> jax.Array:
        """Returns value * 2^shift by an integer add to its bits (AMLA, arXiv 2509.25224).

        `shift` [rows] holds whole numbers from -300 to 0. A result below the smallest normal
        number becomes 0, because a bare add would wrap through the sign bit.
        """
        shifted = per_row(shift.astype(jnp.int32) << 23, value.shape)
        bits = lax.bitcast_convert_type(value, jnp.int32) + shifted
        underflows = jnp.abs(value) < per_row(jnp.exp2(-126.0 - shift), value.shape)
        scaled = lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(underflows, jnp.zeros_like(scaled), scaled)

    def mma(self, acc, a, b) -> None:
        """Starts acc += a @ b and leaves it in flight."""
        if self.interpreting:
            acc[...] = acc[...] + jnp.dot(
                a[...].astype(jnp.float32), b[...].astype(jnp.float32), precision="highest"
            )
        else:
            self._fence_registers()
            plgpu.wgmma(acc, a, b)

    def mma_t(self, acc, a, b) -> None:
        """Starts acc += a @ b.T and leaves it in flight."""
        if self.interpreting:
            acc[...] = acc[...] + jnp.dot(
                a[...].astype(jnp.float32), b[...].astype(jnp.float32).T, precision="highest"
            )
        else:
            self._fence_registers()
            plgpu.wgmma(acc, a, b.transpose((1, 0)))

    def _fence_registers(self) -> None:
        """Orders register accesses before the next wgmma, where a branch or a wait is between.

        Without this fence ptxas inserts one (C7519), and it may serialise every wgmma (C7520).
        """

        @plgpu.inline_mgpu()
        def fence(ctx):
            del ctx
            nvvm.wgmma_fence_aligned()

        fence()

    def wait_mma(self, in_flight: int) -> None:
        """Waits until at most `in_flight` groups of products are still in flight."""
        if self.interpreting:
            # wgmma reads shared memory through the async proxy. The interpreter's plain loads do
            # not, so without this they would race with the next TMA copy.
            plgpu.commit_smem()
        else:
            plgpu.wgmma_wait(in_flight)

    def product_t(self, a, b, dtype) -> jax.Array:
        """Starts a @ b.T into new registers, which need not be zeroed, and leaves it in flight.

        Only `completed` may read the result, after a wait. In the interpreter int32 results are
        exact below 2^24.

        Args:
            a: SMEM (64, k) of int8 or of 16 bits, tiled by `operand`; or 16-bit panels
                [k / 64, 64, 64].
            b: SMEM (n, k), likewise, with n up to 256.
            dtype: int32 for int8 operands, float32 for others.
        """
        in_panels = len(b.shape) == PANEL_RANK
        if self.interpreting:
            left, right = (
                _joined(x[...]) if in_panels else x[...].astype(jnp.float32) for x in (a, b)
            )
            return jnp.dot(left, right.T, precision="highest").astype(dtype)

        tiled = plgpu.RefType(PANELS if in_panels else operand(a.dtype.itemsize))
        n = b.shape[-2]

        @plgpu.inline_mgpu(
            arg_types=(tiled, tiled),
            return_type=plgpu.ShapeDtypeStruct((64, n), dtype, plgpu.Layout.WGMMA),
        )
        def start(ctx, a, b):
            del ctx
            return _of_accumulators(products(a, b), (64, n), dtype)

        return start(a, b)

    def plus_product(self, value, a, b) -> jax.Array:
        """Starts value + a @ b, in the registers of value, and leaves it in flight.

        Only `completed` may read the result, after a wait.

        Args:
            value: float32 (64, n).
            a: (64, k) of 16 bits in registers, k a multiple of 64.
            b: SMEM panels [n / 64, k, 64] of a's dtype.
        """
        if self.interpreting:
            left = a.astype(jnp.float32)
            return value + jnp.dot(left, _joined(b[...]), precision="highest")

        tile, result = (
            plgpu.Layout.WGMMA,
            plgpu.ShapeDtypeStruct(value.shape, value.dtype, plgpu.Layout.WGMMA),
        )

        @plgpu.inline_mgpu(arg_types=(tile, tile, plgpu.RefType(PANELS)), return_type=result)
        def start(ctx, value, a, b):
            del ctx
            value = mgpu.fragmented_array.optimization_barrier(value)
            # wgmma itself fences the registers of a, and so those of the accumulator.
            acc = mgpu.WGMMAAccumulator.from_registers(value, sync=False)
            tiles = mgpu.utils.memref_unfold(b, 1, [None, 8])
            acc = mgpu.wgmma(acc, a, mgpu.utils.memref_transpose(tiles, (1, 0, 2, 3)))
            nvvm.wgmma_commit_group_sync_aligned()
            return acc.value

        return start(value, a, b)

    def completed(self, product) -> jax.Array:
        """Returns the value of a product in flight. The caller has waited for it."""
        if self.interpreting:
            return product

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA,),
            return_type=plgpu.ShapeDtypeStruct(product.shape, product.dtype, plgpu.Layout.WGMMA),
        )
        def read(ctx, value):
            del ctx
            return mgpu.fragmented_array.optimization_barrier(value)

        return read(product)

    def with_zero_columns(self, value, n: int) -> jax.Array:
        """Returns a (64, m) WGMMA tile with columns of 0 behind it, up to n."""
        if self.interpreting:
            return jnp.pad(value, ((0, 0), (0, n - value.shape[1])))

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA,),
            return_type=plgpu.ShapeDtypeStruct((64, n), value.dtype, plgpu.Layout.WGMMA),
        )
        def widen(ctx, tile):
            del ctx
            registers = list(tile.registers.flat)
            zero = mgpu.utils.c(0.0, registers[0].type)
            more = len(registers) * n // tile.shape[1] - len(registers)
            return array_of([*registers, *(zero for _ in range(more))], (64, n), mgpu.WGMMA_LAYOUT)

        return widen(value)


def _of_accumulators(
    registers: list[ir.Value], shape: tuple[int, int], dtype: Any = jnp.float32
) -> mgpu.FragmentedArray:
    """Returns the WGMMA tile that accumulators of wgmma are, one value per register."""
    pair = ir.VectorType.get((2,), registers[0].type)
    pairs = [vector.from_elements(pair, registers[i : i + 2]) for i in range(0, len(registers), 2)]
    return array_of(pairs, shape, mgpu.WGMMA_LAYOUT, True if dtype == jnp.int32 else None)


def _joined(panels: jax.Array) -> jax.Array:
    """Returns the float32 array (rows, columns) that panels [columns / 64, rows, 64] hold."""
    return jnp.concatenate(list(panels.astype(jnp.float32)), axis=1)
