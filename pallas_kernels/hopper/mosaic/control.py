"""Counters between CTAs, registers per thread, indices, and the start of dependent kernels.

The interpreter has no atomics, so its callers do without counters. It ignores register counts and
dependent launches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.threads import SCALAR, Mode, element_pointer, read_number, thread

REGISTER_FILE = 65536  # registers of an SM


@dataclasses.dataclass(frozen=True)
class Control(Mode):
    """Counters in GMEM, register counts, and indices of a CTA and a warpgroup."""

    # A counter goes from 0 to limit - 1 and back to 0 after `limit` calls of `count_up`.
    def count_up(self, counters, index, limit, *, publishes: bool) -> None:
        """Increments counters[index] modulo limit, once for the warpgroup.

        publishes: whether other CTAs that see the new count also see all that this warpgroup has
        written.
        """

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
        def count(ctx, target, place, wrap):
            del ctx
            if publishes:
                mgpu.utils.warpgroup_barrier()
            wrap = wrap.registers.item()
            last = arith.subi(wrap, mgpu.utils.c(1, wrap.type))
            _one_thread(
                ("fence.acq_rel.gpu; " if publishes else "")
                + "red.relaxed.gpu.global.inc.u32 [$0], $1;",
                element_pointer(target, place.registers.item()),
                last,
            )

        count(counters, index, limit)

    def wait_for(self, counters, index, count) -> None:
        """Waits until counters[index] >= count.

        Then this warpgroup sees what others wrote before they counted up with `publishes`.
        """

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
        def wait(ctx, target, place, count):
            del ctx
            _one_thread(
                "{ .reg .pred less; .reg .u32 seen;"
                " again: ld.acquire.gpu.global.u32 seen, [$0];"
                " setp.lt.u32 less, seen, $1; @less bra again; }",
                element_pointer(target, place.registers.item()),
                count.registers.item(),
            )
            mgpu.utils.warpgroup_barrier()

        wait(counters, index, count)

    def count_in_warp(self, counter, limit) -> jax.Array:
        """Increments counter[0] modulo limit, once for this warp, and returns its value before.

        The interpreter has no atomics.
        """

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), SCALAR),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR),
        )
        def count(ctx, target, wrap):
            del ctx
            wrap = wrap.registers.item()
            last = arith.subi(wrap, mgpu.utils.c(1, wrap.type))
            before = llvm.inline_asm(
                wrap.type,
                [element_pointer(target, mgpu.utils.c(0, wrap.type)), last],
                "{ .reg .pred p; .reg .u32 x; mov.u32 x, %laneid; setp.eq.u32 p, x, 0;"
                " @p atom.relaxed.gpu.global.inc.u32 x, [$1], $2;"
                " shfl.sync.idx.b32 $0, x, 0, 0x1f, 0xffffffff; }",
                "=r,l,r",
                has_side_effects=True,
            )
            return mgpu.FragmentedArray.splat(before, shape=(), is_signed=True)

        return count(counter, limit)

    def is_last_cta(self, counter, num_ctas: int) -> jax.Array:
        """Returns whether all CTAs of the launch have called this before, as one flag.

        The last one sees what the others have written before their call. counter[0] goes from 0 to
        num_ctas - 1 and back to 0. In the interpreter CTAs run one after the other.
        """
        if self.interpreting:
            return lax.axis_index("cta") == num_ctas - 1

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR),
        )
        def count(ctx, target):
            del ctx
            mgpu.utils.warpgroup_barrier()
            i32 = ir.IntegerType.get_signless(32)
            is_last = llvm.inline_asm(
                i32,
                [
                    element_pointer(target, mgpu.utils.c(0, i32)),
                    mgpu.utils.c(num_ctas - 1, i32),
                    thread(),
                    mgpu.utils.warpgroup_barrier_idx(),
                ],
                "{ .reg .pred first, last; .reg .u32 before; mov.u32 before, 0xffffffff;"
                " setp.eq.u32 first, $3, 0;"
                " @first atom.acq_rel.gpu.global.inc.u32 before, [$1], $2;"
                " setp.eq.u32 last, before, $2;"
                " bar.red.or.pred last, $4, 128, last; selp.u32 $0, 1, 0, last; }",
                "=r,l,r,r,r",
                has_side_effects=True,
            )
            return mgpu.FragmentedArray.splat(is_last, shape=(), is_signed=True)

        return count(counter) > 0

    def take_registers(self, registers: Sequence[int], warpgroup: int) -> None:
        """Gives each thread of this warpgroup registers[warpgroup] registers from here on.

        All warpgroups start with an equal share. PTX leaves it undefined to decrease to more
        registers than a thread has, or to increase to fewer, so this chooses the direction.
        """
        share = REGISTER_FILE // (128 * len(registers)) // 8 * 8
        if not self.interpreting:
            count = registers[warpgroup]
            action: Literal["increase", "decrease"] = "increase" if count > share else "decrease"
            plgpu.set_max_registers(count, action=action)

    def cta_of_cluster(self) -> jax.Array:
        """Returns this CTA's index in its cluster.

        It is read where it is needed, so it takes no register in between.
        """
        if self.interpreting:
            return lax.axis_index("cluster")
        return read_number("mov.u32 $0, %cluster_ctarank;")

    def warpgroup(self) -> jax.Array:
        """Returns this warpgroup's index, which is also read where it is needed."""
        if self.interpreting:
            return lax.axis_index("wg")
        # The shuffle shows the compiler that the index is the same in all lanes of a warp.
        return read_number(
            "mov.u32 $0, %tid.x; shr.u32 $0, $0, 7; shfl.sync.idx.b32 $0, $0, 0, 0x1f, 0xffffffff;"
        )

    def wait_for_previous_kernel(self) -> None:
        """Waits for the earlier kernels of the stream.

        It must run before the first read of anything that they write.
        """
        if not self.interpreting:
            plgpu.griddepcontrol_wait()

    def let_next_kernel_start(self) -> None:
        """Allows the stream's next kernel to start before this one ends."""
        if not self.interpreting:
            plgpu.griddepcontrol_launch_dependents()


def _one_thread(ptx: str, *args: ir.Value) -> None:
    """Runs instructions in one thread of the warpgroup."""
    with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
        mgpu.utils.inline_ptx(ptx, *args, has_side_effects=True)


def stamp_clock(
    ref: Any, place: tuple[Any, Any], point: int, *, rows: int, timer: bool = False
) -> None:
    """Stores the SM's clock by one thread per warpgroup, without a branch: wgmma may be in flight.

    ref: int32 [CTAs in launch order, warpgroups, items, rows, points, 2]. place: (item, row); an
    item past the last, or a row that is not below `rows`, stores nothing. timer: whether the second
    value is the device's timer in ns; else it is the number of the SM.
    """
    _, warpgroups, items, of_item, points, values = ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def write(ctx, target, number, row):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        second = "%globaltimer_lo" if timer else "%smid"
        mgpu.utils.inline_ptx(
            "{ .reg .pred p, q; .reg .b32 t, w, x, y, c, d; .reg .b64 a;"
            " mov.u32 c, %clock;"
            f" mov.u32 d, {second};"
            " mov.u32 t, %tid.x; and.b32 x, t, 127; shr.u32 w, t, 7;"
            f" setp.eq.u32 p, x, 0; setp.lt.and.u32 q, $1, {items}, p;"
            f" setp.lt.and.u32 p, $2, {rows}, q;"
            " mov.u32 x, %nctaid.y; mov.u32 y, %ctaid.z; mov.u32 t, %ctaid.y;"
            " mad.lo.u32 t, y, x, t;"
            " mov.u32 x, %nctaid.x; mov.u32 y, %ctaid.x; mad.lo.u32 t, t, x, y;"
            f" mad.lo.u32 t, t, {warpgroups}, w; mad.lo.u32 t, t, {items}, $1;"
            f" mad.lo.u32 t, t, {of_item}, $2; mad.lo.u32 t, t, {points}, {point};"
            f" mul.wide.u32 a, t, {4 * values}; add.u64 a, a, $0;"
            " @p st.global.v2.u32 [a], {c, d}; }",
            element_pointer(target, mgpu.utils.c(0, i32)),
            number.registers.item(),
            row.registers.item(),
            has_side_effects=True,
        )

    write(ref, *map(jnp.int32, place))
