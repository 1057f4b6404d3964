"""A decode plan: how the work of a batch is split, and with which tiles a kernel runs it."""

import dataclasses
import functools
from typing import Any

import jax

from mla_jax.splits.plan import SplitPlan


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["split", "work"],
    meta_fields=["tiles", "num_sms", "finish"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class DecodePlan:
    """What `mla_jax.plan_decode` makes, for `plan=` of the attention op and the layer; a pytree.

    Attributes:
        split: which worker computes which KV blocks; its arrays are data.
        tiles: config of the Hopper kernel (`pallas_kernels.hopper.config`), static; None: the plan
            is for plain JAX, or the kernel takes the tuned config for `split.rows_per_tile`.
        num_sms: SMs of the GPU that the plan is for, static; 0: for no GPU.
        work: the split as the Hopper kernel reads it, `pallas_kernels.hopper.work_items.WorkList`
            as a tuple of arrays; None: a launch makes it of `split`. Layers that share a plan
            share it too.
        finish: how the split tiles of `work` are combined, static; None: there is no `work`.
    """

    split: SplitPlan
    tiles: Any = None
    num_sms: int = 0
    work: tuple[jax.Array, ...] | None = None
    finish: str | None = None

    @staticmethod
    def of(plan: Any) -> "DecodePlan | None":
        """Returns a DecodePlan or None as it is, and a SplitPlan as a DecodePlan without tiles.

        Raises TypeError for anything else.
        """
        if plan is None or isinstance(plan, DecodePlan):
            return plan
        if isinstance(plan, SplitPlan):
            return DecodePlan(plan)
        raise TypeError(f"plan must be a DecodePlan or a SplitPlan, got {type(plan).__name__}")

    @property
    def profile(self) -> str | None:
        """Name of the hardware profile that the tiles were checked against; None: no tiles."""
        return None if self.tiles is None else self.tiles.profile
