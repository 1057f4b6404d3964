"""Time stamps of the stages of a kernel's first work items: its self-portrait.

A launch with `DecodeCall.stamps` or `PrefillCall.stamps` writes the SM's clock at the points below,
by one thread of each warpgroup. A launch without them (the default) is the same machine code as if
this file were not there. `pallas_kernels.hopper.portrait` runs kernels with stamps, and
`experiments.simulated.portrait_measured` makes stages of them, with the names of
`mla_jax.hal.hopper_orders` and `prefill_orders`. A kernel has the points that its stages need.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels.hopper.mosaic.control import stamp_clock

ITEMS = 2  # the first work items of a CTA
BLOCKS = 16  # and their first KV blocks
VALUES = 2  # int32 per stamp: the SM's clock, and what `Clock` names

# Points in a block's row. A computing warpgroup passes them in this order, except that warpgroup 1
# of `decode` passes WAIT_P, PV and END of the first block of a pair around EXP and PUBLISHED of the
# second. In `prefill`, EXP is between the maxima and the exponentials.
WAIT, QK, SM, WAIT_P, EXP, PUBLISHED, PV, END = range(8)
TURN = WAIT_P  # of `prefill`: the warpgroup has the turn to issue its products
# Points in a block's row of the loader: before and after its three parts are waited for and issued.
LOAD, LOADED_1, LOADED_2, LOADED_3 = range(4)
# Points in an item's row, of a computing warpgroup. In `prefill`, STORE is behind the last product.
# Those of COMBINE and KERNEL_END are in the first item's row.
ITEM, Q_READY, SUM, STORE, ITEM_END, COMBINE, COMBINE_END, KERNEL_END = range(8)
# Points in an item's row, of the loader, which has ITEM too.
LOAD_Q, LOADED_Q = 1, 2
POINTS = 8


def shape(ctas: int, warpgroups: int) -> tuple[int, ...]:
    """Returns the shape of the int32 array of stamps; an item's own row is behind its blocks'."""
    return ctas, warpgroups, ITEMS, BLOCKS + 1, POINTS, VALUES


@dataclasses.dataclass(frozen=True)
class Stamps:
    """Writes stamps of a work item, or nothing where there is no array.

    ref: `DecodeCall.stamps` or `PrefillCall.stamps`, in GMEM. number: of the item among those of
        its CTA.
    """

    ref: Any | None
    number: Any = 0

    def of_item(self, number: Any) -> "Stamps":
        return dataclasses.replace(self, number=number)

    def of_counted_item(self, count: Callable[[], Any]) -> "Stamps":
        """Returns the stamps of item count(), which is called only where stamps are written."""
        return self if self.ref is None else self.of_item(count())

    def block(self, point: int, block: Any) -> None:
        """Stamps a point of a KV block, which is counted from the item's first one."""
        if self.ref is not None:
            stamp_clock(self.ref, (self.number, block), point, rows=BLOCKS)

    def item(self, point: int) -> None:
        """Stamps a point of the item, with the device's timer (ns) as the second value."""
        if self.ref is not None:
            stamp_clock(self.ref, (self.number, BLOCKS), point, rows=BLOCKS + 1, timer=True)
