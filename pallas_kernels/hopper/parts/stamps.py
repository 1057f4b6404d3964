"""Time stamps of the stages of a kernel's first work items: its self-portrait.

A launch with `DecodeCall.stamps` writes the SM's clock at the points below, by one thread of each
warpgroup. A launch without them (the default) is the same machine code as if this file were not
there. `pallas_kernels.hopper.portrait` makes stages of the stamps, with the names of
`mla_jax.hal.hopper_orders`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.primitives import SCALAR
from pallas_kernels.hopper.mosaic.threads import element_pointer

ITEMS = 2  # the first work items of a CTA
BLOCKS = 16  # and their first KV blocks
VALUES = 2  # int32 per stamp: the SM's clock, and what `Clock` names

# Points in a block's row. A computing warpgroup passes them in this order, except that warpgroup 1
# of `decode` passes WAIT_P, PV and END of the first block of a pair around EXP and PUBLISHED of the
# second.
WAIT, QK, SM, WAIT_P, EXP, PUBLISHED, PV, END = range(8)
# Points in a block's row of the loader: before and after its three parts are waited for and issued.
LOAD, LOADED_1, LOADED_2, LOADED_3 = range(4)
# Points in an item's row, of a computing warpgroup. Those of COMBINE are in the first item's row.
ITEM, Q_READY, SUM, STORE, ITEM_END, COMBINE, COMBINE_END, KERNEL_END = range(8)
# Points in an item's row, of the loader.
LOAD_Q, LOADED_Q = 1, 2
POINTS = 8


def shape(ctas: int, warpgroups: int) -> tuple[int, ...]:
    """Returns the shape of the int32 array of stamps; an item's own row is behind its blocks'."""
    return ctas, warpgroups, ITEMS, BLOCKS + 1, POINTS, VALUES


@dataclasses.dataclass(frozen=True)
class Stamps:
    """Writes stamps of a work item, or nothing where there is no array.

    ref: `DecodeCall.stamps`, in GMEM. number: of the item among those of its CTA.
    """

    ref: Any | None
    number: Any = 0

    def of_item(self, number: Any) -> "Stamps":
        return dataclasses.replace(self, number=number)

    def block(self, point: int, block: Any) -> None:
        """Stamps a point of a KV block, which is counted from the item's first one."""
        if self.ref is not None:
            _stamp(self.ref, self.number, block, point, rows=BLOCKS, timer=False)

    def item(self, point: int) -> None:
        """Stamps a point of the item, with the device's timer (ns) as the second value."""
        if self.ref is not None:
            _stamp(self.ref, self.number, BLOCKS, point, rows=BLOCKS + 1, timer=True)


def _stamp(ref: Any, number: Any, row: Any, point: int, *, rows: int, timer: bool) -> None:
    """Stores a stamp, without a branch: a product may be in flight. CTAs are in launch order."""
    warpgroups = ref.shape[1]

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
            f" setp.eq.u32 p, x, 0; setp.lt.and.u32 q, $1, {ITEMS}, p;"
            f" setp.lt.and.u32 p, $2, {rows}, q;"
            " mov.u32 x, %nctaid.y; mov.u32 y, %ctaid.z; mov.u32 t, %ctaid.y;"
            " mad.lo.u32 t, y, x, t;"
            " mov.u32 x, %nctaid.x; mov.u32 y, %ctaid.x; mad.lo.u32 t, t, x, y;"
            f" mad.lo.u32 t, t, {warpgroups}, w; mad.lo.u32 t, t, {ITEMS}, $1;"
            f" mad.lo.u32 t, t, {BLOCKS + 1}, $2; mad.lo.u32 t, t, {POINTS}, {point};"
            f" mul.wide.u32 a, t, {4 * VALUES}; add.u64 a, a, $0;"
            " @p st.global.v2.u32 [a], {c, d}; }",
            element_pointer(target, mgpu.utils.c(0, i32)),
            number.registers.item(),
            row.registers.item(),
            has_side_effects=True,
        )

    write(ref, jnp.int32(number), jnp.int32(row))
