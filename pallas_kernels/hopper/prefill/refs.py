"""What the warpgroups of the prefill kernel share: the call, references and barriers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.primitives import PANELS, Backend
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.prefill.config import (
    CHECKERS,
    COMPUTING,
    ITEM_STAGES,
    PANEL,
    TILE_ROWS,
    PrefillConfig,
)
from pallas_kernels.hopper.prefill.work_items import ITEM_FIELDS, NO_ITEM, Item, WorkList
from pallas_kernels.hopper.work_items import LOG2E

LOADER = COMPUTING  # index of the loader warpgroup; those before it compute


class Inputs(NamedTuple):
    q: Any  # [Tq, H, nope_dim + rope_dim]
    k_nope: Any  # [Tk, H, nope_dim], or [Tk, H, nope_dim + v_dim] with V behind
    k_rope: Any | None  # [Tk, rope_dim], of all heads; None: rope_dim is 0
    v: Any | None  # [Tk, H, v_dim]; None: in k_nope
    work: WorkList
    counter: Any  # [1] int32, 0 before and after the launch
    stamps: Any | None  # `PrefillCall.stamps`


class Outputs(NamedTuple):
    o: Any  # [Tq, H, v_dim] of q's dtype
    lse: Any  # [Tq, H] float32, natural log


class Scratch(NamedTuple):
    """Shared memory of a CTA. Panels have 64 columns each."""

    q: Any  # [warpgroup, panels, 64, 64]
    k: Any  # [stages, panels, keys of a block, 64]
    v: Any  # likewise
    items: Any  # [item stages, fields of `Item`] int32
    changed: Any  # [stages, checkers] int32: first row of V that a checker has changed
    item_ready: Any  # per item stage; the scheduler arrives
    item_done: Any  # per item stage; all others that read it arrive
    q_full: Any  # per warpgroup; the copies of the panels arrive
    q_empty: Any  # per warpgroup, which arrives
    k_full: Any  # per stage; the copies of the panels arrive
    k_empty: Any  # per stage; the computing warpgroups arrive
    v_full: Any  # likewise, for the blocks that no row of the tile masks
    v_empty: Any
    v_first: Any  # per stage; the copies of a tile's masked blocks of V arrive, the first ones
    v_checked: Any  # per stage; the checkers of that block arrive
    turn: Any  # per computing warpgroup; the other one arrives

    @staticmethod
    def types(call: "PrefillCall") -> "Scratch":
        """Returns the types of the allocations."""
        config = call.config
        stages, keys = config.stages, config.block_keys

        def panels(*shape: int) -> Any:
            return plgpu.SMEM((*shape, PANEL), call.q.dtype, transforms=PANELS)

        def barriers(arrivals: int, number: int) -> Any:
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

        return Scratch(
            q=panels(COMPUTING, config.k_panels, 64),
            k=panels(stages, config.k_panels, keys),
            v=panels(stages, config.v_panels, keys),
            items=plgpu.SMEM((ITEM_STAGES, ITEM_FIELDS), jnp.int32),
            changed=plgpu.SMEM((stages, CHECKERS), jnp.int32),
            item_ready=barriers(1, ITEM_STAGES),
            item_done=barriers(COMPUTING + 1 + CHECKERS, ITEM_STAGES),
            q_full=barriers(config.k_panels, COMPUTING),
            q_empty=barriers(1, COMPUTING),
            k_full=barriers(config.k_panels, stages),
            k_empty=barriers(COMPUTING, stages),
            v_full=barriers(config.v_panels, stages),
            v_empty=barriers(COMPUTING, stages),
            v_first=barriers(config.v_panels, stages),
            v_checked=barriers(CHECKERS, stages),
            turn=barriers(1, COMPUTING),
        )


@dataclasses.dataclass(frozen=True)
class PrefillCall:
    """One launch: what it reads, and its options.

    Attributes:
        q, k_nope, k_rope, v: as in `Inputs`, with at least 64 rows of q and a block of keys.
        num_queries: rows of the outputs, at most those of q.
        num_ctas: of the launch.
        stamps: int32 ref of shape `stamps.shape` for the kernel's time stamps; None: no stamps.
        interpret: `plgpu.InterpretGPUParams()` runs the kernel on a CPU; None: on the GPU.
    """

    q: jax.Array
    k_nope: jax.Array
    k_rope: jax.Array | None
    v: jax.Array | None
    work: WorkList
    num_queries: int
    softmax_scale: float
    causal: bool
    config: PrefillConfig
    num_ctas: int
    stamps: Any = None
    interpret: Any = None

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def log2_scale(self) -> float:
        """Scores times this are in log2 units."""
        return self.softmax_scale * LOG2E

    @property
    def masked_blocks(self) -> int:
        """KV blocks of a tile that need a mask: its last ones, which are computed first."""
        return TILE_ROWS // self.config.block_keys if self.causal else 1

    @property
    def interpreting(self) -> bool:
        return self.interpret is not None


@dataclasses.dataclass(frozen=True)
class Cta:
    """One CTA of the launch."""

    call: PrefillCall
    g: Backend
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch
    index: Any

    @property
    def config(self) -> PrefillConfig:
        return self.call.config

    @property
    def stamps(self) -> Stamps:
        return Stamps(self.inputs.stamps)

    def stage(self, block: Any) -> Any:
        """Returns the stage of a block, counted over all items of this CTA."""
        return lax.rem(block, self.config.stages)

    def run_items(self, run: Callable[[Any, Any, Item], None]) -> None:
        """Calls run(k, n, item) for the CTA's k-th item, after n KV blocks of items before.

        The scheduler has written the items to shared memory.
        """
        scratch = self.scratch

        def read(k: Any) -> Item:
            stage = lax.rem(k, ITEM_STAGES)
            plgpu.barrier_wait(scratch.item_ready.at[stage])
            item = Item.read(scratch.items.at[stage])
            plgpu.barrier_arrive(scratch.item_done.at[stage])
            return item

        def run_one(carry: tuple) -> tuple:
            k, n, *fields = carry
            item = Item(*fields)
            run(k, n, item)
            return k + 1, n + item.num_blocks, *read(k + 1)

        zero = jnp.int32(0)
        lax.while_loop(lambda carry: carry[2] != NO_ITEM, run_one, (zero, zero, *read(zero)))
