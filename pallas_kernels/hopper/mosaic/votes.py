"""Votes: one flag for a warp or a warpgroup about values that its threads hold.

In the interpreter a vote is a reduction.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.threads import ROWS, SCALAR, THREADS, Mode


@dataclasses.dataclass(frozen=True)
class Votes(Mode):
    """Votes among the threads of a warp or a warpgroup."""

    def any_less_in_warp(self, a, b) -> jax.Array:
        """Returns a flag per warp, without a barrier: whether a < b in any of its rows.

        A branch on this flag must not contain instructions that need the whole warpgroup, such as
        wgmma's fence. The interpreter has one flag for all warps.
        """
        if self.interpreting:
            return jnp.max((a < b).astype(jnp.int32)) > 0

        @plgpu.inline_mgpu(
            arg_types=(ROWS, ROWS),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR),
        )
        def vote(ctx, x, y):
            del ctx
            mine = None
            for u, v in zip(x.registers.flat, y.registers.flat, strict=True):
                for i in range(ir.VectorType(u.type).shape[0]):
                    lanes = [vector.extract(w, [], [i]) for w in (u, v)]
                    less = arith.cmpf(arith.CmpFPredicate.OLT, *lanes)
                    mine = less if mine is None else arith.ori(mine, less)
            return _any_in_warp(mine)

        return vote(a, b) > 0

    def any_above(self, x, limit: float, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
        """Returns one flag for the warpgroup: whether any float32 of x is above the limit.

        NaN does not count as above. In the layout each thread holds 2^n values.
        """
        if self.interpreting:
            return jnp.any(x > limit)

        @plgpu.inline_mgpu(
            arg_types=(layout,),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR),
        )
        def vote(ctx, tile):
            del ctx
            tops = [vector.extract(r, [], [i]) for r in tile.registers.flat for i in range(2)]
            while len(tops) > 1:
                tops = [arith.maxnumf(*tops[i : i + 2]) for i in range(0, len(tops), 2)]
            bound = mgpu.utils.c(limit, ir.F32Type.get())
            above = arith.cmpf(arith.CmpFPredicate.OGT, tops[0], bound)
            return _any_in_warpgroup(above, broadcast=False)

        return vote(x) > 0

    def any_not_finite(self, x) -> jax.Array:
        """Returns one flag for the warpgroup: whether any float32 of a WGMMA tile is not finite."""
        if self.interpreting:
            return ~jnp.all(jnp.isfinite(x))

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA,),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR),
        )
        def vote(ctx, tile):
            del ctx
            # 0 times a finite number is 0. 0 times NaN or infinity is NaN, which a sum keeps.
            zero = mgpu.utils.c(0.0, ir.F32Type.get())
            total = zero
            for register in tile.registers.flat:
                for i in range(2):
                    value = vector.extract(register, [], [i])
                    total = arith.addf(arith.mulf(value, zero), total)
            is_nan = arith.cmpf(arith.CmpFPredicate.UNO, total, total)
            return _any_in_warpgroup(is_nan, broadcast=False)

        return vote(x) > 0

    def any_outside(self, values, stop: int) -> jax.Array:
        """Returns one flag for the warpgroup: whether any thread's value is not in 0 .. stop - 1.

        values: [128] int32, one per thread.
        """
        if self.interpreting:
            return jnp.any((values < 0) | (values >= stop))

        @plgpu.inline_mgpu(
            arg_types=(THREADS,),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR),
        )
        def vote(ctx, x):
            del ctx
            value = vector.extract(x.registers.item(), [], [0])
            limit = mgpu.utils.c(stop, value.type)
            return _any_in_warpgroup(arith.cmpi(arith.CmpIPredicate.uge, value, limit))

        return vote(values) > 0


def _any_in_warpgroup(mine: Any, *, broadcast: bool = True) -> mgpu.FragmentedArray:
    """Returns 1 in the whole warpgroup if any of its threads has the flag (i1), else 0.

    broadcast: whether a warp's first lane broadcasts the index of the barrier to the others. That
    takes one register more, and it takes time in `decode_int8` (benchmarks/history.md).
    """
    i32 = ir.IntegerType.get_signless(32)
    voted = llvm.inline_asm(
        i32,
        [mgpu.utils.warpgroup_barrier_idx(sync=broadcast), arith.extui(i32, mine)],
        "{ .reg .pred p, q; setp.ne.u32 p, $2, 0;"
        " bar.red.or.pred q, $1, 128, p; selp.u32 $0, 1, 0, q; }",
        "=r,r,r",
        has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(voted, shape=(), is_signed=True)


def _any_in_warp(mine: Any) -> mgpu.FragmentedArray:
    """Returns 1 in the whole warp if any of its threads has the flag (i1), else 0."""
    i32 = ir.IntegerType.get_signless(32)
    voted = llvm.inline_asm(
        i32,
        [arith.extui(i32, mine)],
        "{ .reg .pred p, q; setp.ne.u32 p, $1, 0;"
        " vote.sync.any.pred q, p, 0xffffffff; selp.u32 $0, 1, 0, q; }",
        "=r,r",
        has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(voted, shape=(), is_signed=True)
