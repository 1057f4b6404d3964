"""The few primitives that Mosaic GPU's interpreter lacks, behind one small helper.

`Backend(interpreting=False)` emits the real instructions. `Backend(interpreting=True)` keeps the
kernel's schedule and barriers and swaps only these: accumulators become float32 scratch and wgmma
a plain product into it, the warpgroup vote becomes a reduction, register hints vanish.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

# How shared memory holds what wgmma reads. (mypy takes the protocol's empty method for abstract.)
WGMMA_OPERAND: Any = (
    plgpu.TilingTransform((8, 64)),  # type: ignore[abstract]
    plgpu.SwizzleTransform(128),  # type: ignore[abstract]
)
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row, beside a (64, n) WGMMA tile


@dataclasses.dataclass(frozen=True)
class Backend:
    interpreting: bool

    # -- accumulators -------------------------------------------------------------------------
    def accumulator_scratch(self, threads: int, *shapes: tuple[int, int]) -> tuple:
        """Scratch that stands in for each thread's accumulators; empty on the GPU."""
        if not self.interpreting:
            return ()
        return tuple(plgpu.SMEM((threads, *shape), jnp.float32) for shape in shapes)

    def with_accumulators(self, run, scratch, thread: int, *shapes: tuple[int, int]) -> None:
        """run(*accumulators), float32, of the given shapes."""
        if self.interpreting:
            run(*(ref.at[thread] for ref in scratch))
        else:
            pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def zero(self, acc) -> None:
        acc[...] = self.full(acc.shape, 0.0, plgpu.Layout.WGMMA)

    def read(self, acc) -> jax.Array:
        """The accumulator's value; the caller has waited for its products."""
        return acc[...] if self.interpreting else plgpu.wgmma_accumulator_load(acc, wait_n=None)

    def scale(self, acc, rows) -> None:
        acc[...] = self.read(acc) * lax.broadcast_in_dim(rows, acc.shape, [0])

    def add_exponent(self, acc, shift) -> None:
        """acc * 2^shift by an integer add to its bits (AMLA, arXiv 2509.25224).

        `shift` [rows] holds whole numbers from -300 to 0. What would fall below the smallest
        normal number becomes 0: a bare add would wrap through the sign bit.
        """
        bits = lax.bitcast_convert_type(self.read(acc), jnp.int32)
        shift = lax.broadcast_in_dim(shift.astype(jnp.int32), acc.shape, [0])
        sound = ((bits >> 23) & 255) + shift > 0
        moved = lax.bitcast_convert_type(bits + (shift << 23), jnp.float32)
        acc[...] = jnp.where(sound, moved, jnp.zeros_like(moved))

    def mma(self, acc, a, b) -> None:
        """acc += a @ b, left in flight."""
        if self.interpreting:
            acc[...] = acc[...] + jnp.dot(
                a[...].astype(jnp.float32), b[...].astype(jnp.float32), precision="highest"
            )
        else:
            self._arrive()
            plgpu.wgmma(acc, a, b)

    def mma_t(self, acc, a, b) -> None:
        """acc += a @ b.T, left in flight."""
        if self.interpreting:
            acc[...] = acc[...] + jnp.dot(
                a[...].astype(jnp.float32), b[...].astype(jnp.float32).T, precision="highest"
            )
        else:
            self._arrive()
            plgpu.wgmma(acc, a, b.transpose((1, 0)))

    def _arrive(self) -> None:
        """Orders register accesses before the next wgmma: a branch or a wait stands between.

        Without it ptxas puts one in itself (C7519) and may serialise every wgmma (C7520).
        """

        @plgpu.inline_mgpu()
        def fence(ctx):
            del ctx
            nvvm.wgmma_fence_aligned()

        fence()

    def wait_mma(self, in_flight: int) -> None:
        if self.interpreting:
            # wgmma reads shared memory through the async proxy; the loads that stand for it here
            # do not, and would race with the next TMA copy.
            plgpu.commit_smem()
        else:
            plgpu.wgmma_wait(in_flight)

    # -- values in registers ------------------------------------------------------------------
    def full(self, shape, value, layout) -> jax.Array:
        x = jnp.full(shape, value, jnp.float32)
        return x if self.interpreting else plgpu.layout_cast(x, layout)

    def iota(self, shape, dimension: int) -> jax.Array:
        layout = None if self.interpreting else plgpu.Layout.WGMMA
        return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=layout)

    def load_rows(self, ref) -> jax.Array:
        return ref[...] if self.interpreting else plgpu.load(ref, layout=ROWS, optimized=False)

    def load_tile(self, ref) -> jax.Array:
        return ref[...] if self.interpreting else plgpu.load(ref, layout=plgpu.Layout.WGMMA)

    def load_strided(self, ref, layout) -> jax.Array:
        return ref[...] if self.interpreting else plgpu.load(ref, layout=layout, optimized=False)

    def store_rows(self, ref, value, count) -> None:
        """The first `count` rows of a (64, n) WGMMA tile, rounded up to 16, to a GMEM ref."""
        if self.interpreting:
            ref[...] = value
            return

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(()))
        )
        def store(ctx, target, tile, rows):
            del ctx
            i32 = ir.IntegerType.get_signless(32)
            constant = mgpu.utils.c
            thread = arith.remui(mgpu.utils.thread_idx(), constant(128, i32))
            first_row = arith.muli(arith.divui(thread, constant(32, i32)), constant(16, i32))
            (limit,) = rows.registers.flat
            mine = arith.cmpi(arith.CmpIPredicate.slt, first_row, limit)
            with mgpu.utils.when(mine):
                tile.store_untiled(target, optimized=False)

        store(ref, value, count)

    def any_less(self, a, b) -> jax.Array:
        """One flag for the warpgroup: does any row have a < b?"""
        if self.interpreting:
            return jnp.max((a < b).astype(jnp.int32)) > 0

        @plgpu.inline_mgpu(
            arg_types=(ROWS, ROWS),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())),
        )
        def vote(ctx, x, y):
            del ctx
            i32 = ir.IntegerType.get_signless(32)
            mine = None
            for u, v in zip(x.registers.flat, y.registers.flat, strict=True):
                for i in range(ir.VectorType(u.type).shape[0]):
                    lanes = [vector.extract(w, [], [i]) for w in (u, v)]
                    less = arith.cmpf(arith.CmpFPredicate.OLT, *lanes)
                    mine = less if mine is None else arith.ori(mine, less)
            voted = llvm.inline_asm(
                i32,
                [mgpu.utils.warpgroup_barrier_idx(), arith.extui(i32, mine)],
                "{ .reg .pred p, q; setp.ne.u32 p, $2, 0;"
                " bar.red.or.pred q, $1, 128, p; selp.u32 $0, 1, 0, q; }",
                "=r,r,r",
                has_side_effects=True,
            )
            return mgpu.FragmentedArray.splat(voted, shape=(), is_signed=True)

        return vote(a, b) > 0

    # -- control ------------------------------------------------------------------------------
    def set_max_registers(self, count: int, action: Literal["increase", "decrease"]) -> None:
        if not self.interpreting:
            plgpu.set_max_registers(count, action=action)

    def wait_for_previous_kernel(self) -> None:
        """Before the first read of anything that an earlier kernel of the stream has written."""
        if not self.interpreting:
            plgpu.griddepcontrol_wait()

    def let_next_kernel_start(self) -> None:
        if not self.interpreting:
            plgpu.griddepcontrol_launch_dependents()
