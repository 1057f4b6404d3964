"""A GPU kernel of one's own: its issue order, and how it differs from a kernel that has a model.

    def schedule(num_blocks):
        build = GpuScheduleBuilder("mine", num_blocks, stages=3)
        ...
        return build.build()

    kernel = gpu_kernel(schedule, like="flashinfer_fa3", block_kv=32)
    simulate(profile, problem, kernel(profile))

docs/own_schedule.md has a whole example.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from mla_jax.checks import require_type
from mla_jax.hal.orders import ScheduleFn
from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.schedule import Access, IllegalScheduleError, ScheduleBuilder
from mla_jax.hal.simulator.gpu_costs import KERNELS, Kernel, with_block

# What `gpu_kernel` may change. The order and the division of the work are not among them.
CHANGES = tuple(
    field.name for field in dataclasses.fields(Kernel) if field.name not in ("orders", "plan")
)


class GpuScheduleBuilder(ScheduleBuilder):
    """A `ScheduleBuilder` with the stages of a decode kernel on a GPU.

    Each method appends the steps of one stage of a block, in issue order. They wait for what they
    need and for nothing else. The constructor appends the load of Q.
    """

    def __init__(
        self,
        name: str,
        num_blocks: int,
        *,
        stages: int = 2,
        scores_in_flight: int = 1,
        transposes: bool = False,
        period: int | None = None,
    ) -> None:
        """Starts a schedule.

        Args:
            name: of the order.
            num_blocks: KV blocks.
            stages: KV blocks that shared memory holds.
            scores_in_flight: blocks whose S, and whose P, exist at a time.
            transposes: whether `transpose` makes V of each block, in a buffer of its own.
            period: blocks after which the pattern repeats; None is the least common multiple of
                the two numbers above.

        Raises ValueError that names the argument.
        """
        counts = {"num_blocks": num_blocks, "stages": stages, "scores_in_flight": scores_in_flight}
        if period is not None:
            counts["period"] = period
        for field, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}: {field} = {count!r}, wanted a whole number above 0")
        slots = {"q": 1, "kv_l": stages, "kv_r": stages, "S": scores_in_flight,
                 "P": scores_in_flight, "state": 1, "O_L": 1, "O_R": 1}  # fmt: skip
        if transposes:
            slots["v_transposed"] = 1
        self._transposes = transposes
        super().__init__(name, num_blocks, period or math.lcm(stages, scores_in_flight), slots)
        self._last = num_blocks - 1
        self.add("load", "LOAD_Q", -1, writes=(Access("q", 0, -1),))

    def load(self, block: int, unit: str = "load") -> None:
        """Loads a block: the left half with the rope columns, and the right half."""
        for half in "LR":
            self.add(unit, f"LOAD_{half}", block, writes=(self.slot(f"kv_{half.lower()}", block),))

    def widen(self, unit: str, block: int) -> None:
        """Converts an fp8 block to bf16."""
        kv = (self.slot("kv_l", block), self.slot("kv_r", block))
        self.add(unit, "WIDEN", block, reads=kv, writes=kv)

    def transpose(self, unit: str, block: int) -> None:
        """Transposes V of a block, for a kernel that `transposes_apart`."""
        kv = (self.slot("kv_l", block), self.slot("kv_r", block))
        self.add(unit, "TRANSPOSE", block, reads=kv, writes=(self.slot("v_transposed", block),))

    def scores(self, unit: str, block: int) -> None:
        """Multiplies Q and the keys of a block: S."""
        keys = (self.slot("kv_l", block), self.slot("kv_r", block))
        self.add(unit, "QK", block, reads=(Access("q", 0, -1), *keys),
                 writes=(self.slot("S", block),))  # fmt: skip

    def softmax(self, unit: str, block: int) -> None:
        """Computes P of a block, and updates maxima and sums."""
        state = (Access("state", 0, block - 1),) if block else ()
        self.add(unit, "SM", block, reads=(self.slot("S", block), *state),
                 writes=(self.slot("P", block), Access("state", 0, block)))  # fmt: skip

    def values(self, unit: str, half: str, block: int) -> None:
        """Multiplies P and half of a block's values, and adds the product to O. half: "L", "R"."""
        if half not in ("L", "R"):
            raise IllegalScheduleError(f"{self._name}: half = {half!r}, wanted 'L' or 'R'")
        before = (Access(f"O_{half}", 0, block - 1),) if block else ()
        kv = self.slot(f"kv_{half.lower()}", block)
        v = (self.slot("v_transposed", block),) if self._transposes else ()
        self.add(unit, f"PV_{half}", block, reads=(self.slot("P", block), kv, *v, *before),
                 writes=(Access(f"O_{half}", 0, block),))  # fmt: skip

    def store(self, left: str, right: str | None = None) -> None:
        """Stores both halves of O. left, right: units; by default one unit stores both."""
        for half, unit in (("L", left), ("R", right or left)):
            reads = (Access(f"O_{half}", 0, self._last), Access("state", 0, self._last))
            self.add(unit, f"STORE_{half}", self._last, reads=reads)


def gpu_kernel(
    order: ScheduleFn, *, like: str = "flashmla_dense", **changes: Any
) -> Callable[[HardwareProfile], Kernel]:
    """Returns a function from a profile to a kernel with this order.

    Args:
        order: function from a number of KV blocks to a `Schedule`.
        like: the kernel whose tile, instructions, division of the work and merge it has.
        changes: fields of `Kernel` that differ, such as block_kv = 32.

    Raises ValueError that names the argument, and TypeError for an order that is no function. The
    function that is returned raises TypeError for what is no profile, such as the name of one.
    """
    if not callable(order):
        raise TypeError(f"order must be a function from a number of KV blocks, got {order!r:.60}")
    if like not in KERNELS:
        raise ValueError(f"like = {like!r}, wanted one of {', '.join(KERNELS)}")
    for field in changes:
        if field not in CHANGES:
            raise ValueError(f"{field!r} is not a field that can differ: {', '.join(CHANGES)}")
    block_kv = changes.pop("block_kv", None)

    def make(profile: HardwareProfile) -> Kernel:
        require_type("profile", profile, HardwareProfile)
        kernel = KERNELS[like](profile)
        if block_kv is not None:
            kernel = with_block(kernel, block_kv)
        name = changes.get("name", getattr(order, "__name__", "own"))
        return dataclasses.replace(kernel, **changes | {"name": name, "orders": (order,)})

    return make
