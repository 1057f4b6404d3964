"""A decode plan: how the work of a batch is split, and with which tiles a kernel runs it."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from mla_jax import checks
from mla_jax.splits.plan import SplitPlan

WORK = ("ranges", "items", "counters")
UNCHANGED = ("request", "row_tile", "block_start", "block_end")  # first columns of items


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
            share it too. (In an exported program, where no CTA waits for another one, a launch
            whose tiles are shared by two CTAs makes its own.)
        finish: how the split tiles of `work` are combined, static; None: there is no `work`.
    """

    split: SplitPlan
    tiles: Any = None
    num_sms: int = 0
    work: tuple[jax.Array, ...] | None = None
    finish: str | None = None

    def check(self) -> None:
        """Raises TypeError or ValueError where a field is not what it should be.

        That `work` is of this split is checked unless it is traced.
        """
        checks.require_type("plan.split", self.split, SplitPlan)
        self.split.check()
        # The configs are a class of the kernels, which may not be installed.
        if self.tiles is not None and not isinstance(getattr(self.tiles, "profile", None), str):
            got = type(self.tiles).__name__
            raise TypeError(f"plan.tiles must be the config of a Hopper kernel or None, got {got}")
        checks.require_int("plan.num_sms", self.num_sms, 0)
        if self.finish is not None:
            checks.require_type("plan.finish", self.finish, str)
        if self.work is None:
            return
        if not isinstance(self.work, tuple) or len(self.work) != len(WORK):
            got = type(self.work).__name__
            got += f" of {len(self.work)}" if isinstance(self.work, tuple | list) else ""
            raise TypeError(f"plan.work must be a tuple of {', '.join(WORK)}, got a {got}")
        for name, array in zip(WORK, self.work, strict=True):
            checks.require_int32(f"plan.work ({name})", array)
        items, planned = self.work[1], self.split.arrays()
        columns = len(UNCHANGED)
        checks.require_shape("plan.work (items)", items, "[P, 7]", self.split.num_items, 7)
        if not checks.is_concrete(items, *planned.values()):
            return
        wanted = np.stack([np.asarray(planned[name]) for name in UNCHANGED], axis=1)
        if (np.asarray(items)[:, :columns] != wanted).any():
            raise ValueError(
                "plan.work must be that of plan.split, got the work list of another split: "
                "replace both, or set work and finish to None"
            )

    @property
    def split_of_work(self) -> SplitPlan:
        """The split whose blocks a kernel computes that reads `work`; `split` without one."""
        if self.work is None:
            return self.split
        fields: dict[str, Any] = {name: self.work[1][:, i] for i, name in enumerate(UNCHANGED)}
        return dataclasses.replace(self.split, **fields)

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
