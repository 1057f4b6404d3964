"""The prefill kernel: one persistent launch, and its loader warpgroup.

A work item is a tile of 128 query rows of one head (work_items.py). A CTA takes items until there
are none. It has three warpgroups:

    0, 1   compute 64 rows of the tile each                            compute.py
    2      warp 0 schedules items and loads q and K   }
           warp 1 loads V                             }                here
           warps 2, 3 look for NaN and infinity in V  }

KV blocks are loaded by TMA, a tile's last block first. Only the last block needs a mask, or the
last two where a block has 64 keys.
docs/hopper_prefill.md describes the schedule.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS, Backend
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.prefill.compute import ComputingWarpgroup
from pallas_kernels.hopper.prefill.config import CHECKERS, COMPUTING, ITEM_STAGES, PANEL
from pallas_kernels.hopper.prefill.refs import LOADER, Cta, Inputs, Outputs, PrefillCall, Scratch
from pallas_kernels.hopper.prefill.work_items import NO_ITEM, Item, Tile, place_of_item

FIRST_CHECKER = 2  # the warp of the loader warpgroup that is the first checker


def prefill(call: PrefillCall) -> tuple[jax.Array, jax.Array]:
    """Runs the work items of a call, and returns o and lse as `Outputs` describes them."""
    g = Backend(interpreting=call.interpreting)
    config = call.config

    def body(inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        cta = Cta(call, g, inputs, outputs, scratch, lax.axis_index("cta"))
        warpgroup = lax.axis_index("wg")
        # In a branch of its own, what one role needs takes no register in the other role.
        compute = ComputingWarpgroup(cta, warpgroup, cta.stamps).run
        lax.cond(warpgroup < LOADER, compute, lambda: load(cta))

    rows, heads = call.num_queries, call.num_heads
    counter = jnp.zeros(1, jnp.int32)
    inputs = Inputs(call.q, call.k_nope, call.k_rope, call.v, call.work, counter, call.stamps)
    outputs = plgpu.kernel(
        body,
        out_type=(
            Outputs(
                jax.ShapeDtypeStruct((rows, heads, config.v_dim), call.q.dtype),
                jax.ShapeDtypeStruct((rows, heads), jnp.float32),
            ),
        ),
        scratch_types=(Scratch.types(call),),
        grid=(call.num_ctas,),
        grid_names=("cta",),
        num_threads=COMPUTING + 1,
        thread_name="wg",
        interpret=call.interpret,
        kernel_name="mla_prefill",
        compiler_params=OWN_BARRIERS,
    )(inputs)[0]
    return outputs.o, outputs.lse


def load(cta: Cta) -> None:
    """Runs the loader warpgroup, each of whose warps has a role of its own."""
    cta.g.take_registers(cta.config.warpgroup_registers, LOADER)

    def run_warp() -> None:
        warp = lax.axis_index("warp")
        pl.when(warp == 0)(Scheduler(cta).run)
        pl.when(warp == 1)(ValueLoader(cta).run)
        pl.when(warp >= FIRST_CHECKER)(Checker(cta, warp - FIRST_CHECKER).run)

    pl.kernel(run_warp, mesh=plgpu.WarpMesh(axis_name="warp"))()


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """Warp 0: takes items, writes their descriptors, and loads q and K."""

    cta: Cta

    def run(self) -> None:
        cta = self.cta
        num_items = cta.inputs.work.counts[0] * cta.call.num_heads

        def run_one(carry: tuple) -> tuple:
            k, n, index, *fields = carry
            item = Item(*fields)
            # The next item is known early, so that others can prepare it under this one.
            index, following = self.publish(k + 1, self.next_index(index, num_items), num_items)
            pl.when(item.num_blocks > 0)(lambda: self.load_item(k, n, item))
            return k + 1, n + item.num_blocks, index, *following

        cta.stamps.item(at.ITEM)
        index, first = self.publish(jnp.int32(0), cta.index, num_items)
        start = (jnp.int32(0), jnp.int32(0), index, *first)
        last, *_ = lax.while_loop(lambda carry: carry[3] != NO_ITEM, run_one, start)
        # Wait for every release, so that no barrier is signalled after the CTA has ended.
        pl.when(last > 0)(lambda: self.wait_until_read(last - 1))
        self.wait_until_read(last)
        for barriers in (cta.scratch.q_empty, cta.scratch.k_empty):
            for i in range(barriers.shape[0]):
                plgpu.barrier_wait(barriers.at[i])

    def next_index(self, index: Any, num_items: Any) -> Any:
        """Returns the index of the CTA's item after the one with this index.

        CTAs take items from a counter, which is 0 again when each has found that there are none.
        The interpreter has no atomics. There the items are dealt in turns.
        """
        cta = self.cta
        if cta.call.interpreting:
            return index + cta.call.num_ctas
        return cta.call.num_ctas + cta.g.count_in_warp(cta.inputs.counter, num_items)

    def publish(self, k: Any, index: Any, num_items: Any) -> tuple[Any, Item]:
        """Writes the descriptor of the CTA's k-th item, which has this index. Returns both."""
        cta = self.cta
        exists = index < num_items
        tile, head = place_of_item(
            jnp.where(exists, index, 0),
            jnp.maximum(cta.inputs.work.counts[0], 1),
            cta.call.num_heads,
            cta.inputs.work.counts[1],
        )
        fields = Tile(*(cta.inputs.work.tiles[tile, i] for i in range(len(Tile._fields))))
        num_blocks = fields.blocks_of(cta.config.block_keys, cta.call.causal)
        fields = fields._replace(num_blocks=num_blocks)
        item = Item(jnp.where(exists, head, NO_ITEM), *fields)
        stage = lax.rem(k, ITEM_STAGES)
        pl.when(k >= ITEM_STAGES)(lambda: self.wait_until_read(k - ITEM_STAGES))
        for i, field in enumerate(item):
            cta.scratch.items[stage, i] = field
        plgpu.barrier_arrive(cta.scratch.item_ready.at[stage])
        return index, item

    def wait_until_read(self, k: Any) -> None:
        """Waits until all others have read the descriptor of the CTA's k-th item."""
        plgpu.barrier_wait(self.cta.scratch.item_done.at[lax.rem(k, ITEM_STAGES)])

    def load_item(self, k: Any, n: Any, item: Item) -> None:
        """Loads q and all blocks of K."""
        cta, stamps = self.cta, self.cta.stamps.of_item(k)
        self.load_k(n, item, 0, stamps)
        stamps.item(at.LOAD_Q)
        for w in range(COMPUTING):
            plgpu.barrier_wait(cta.scratch.q_empty.at[w])
            rows = pl.ds(item.q_row + 64 * w, 64)
            for panel in range(cta.config.k_panels):
                plgpu.copy_gmem_to_smem(
                    cta.inputs.q.at[rows, item.head, pl.ds(PANEL * panel, PANEL)],
                    cta.scratch.q.at[w, panel],
                    cta.scratch.q_full.at[w],
                )
        stamps.item(at.LOADED_Q)
        lax.fori_loop(1, item.num_blocks, lambda j, _: self.load_k(n, item, j, stamps), None)

    def load_k(self, n: Any, item: Item, j: Any, stamps: Stamps) -> None:
        """Loads K of the item's j-th block, when its stage is free."""
        cta, config = self.cta, self.cta.config
        stage, rows = cta.stage(n + j), block_rows(cta, item, j)
        stamps.block(at.LOAD, j)
        plgpu.barrier_wait(cta.scratch.k_empty.at[stage])
        for panel in range(config.k_panels):
            if panel < config.nope_panels:
                source = cta.inputs.k_nope.at[rows, item.head, pl.ds(PANEL * panel, PANEL)]
            else:
                column = PANEL * (panel - config.nope_panels)
                assert cta.inputs.k_rope is not None
                source = cta.inputs.k_rope.at[rows, pl.ds(column, PANEL)]
            plgpu.copy_gmem_to_smem(
                source, cta.scratch.k.at[stage, panel], cta.scratch.k_full.at[stage]
            )
        stamps.block(at.LOADED_3, j)


@dataclasses.dataclass(frozen=True)
class ValueLoader:
    """Warp 1: loads V."""

    cta: Cta

    def run(self) -> None:
        self.cta.run_items(self.load_item)
        for i in range(self.cta.config.stages):
            plgpu.barrier_wait(self.cta.scratch.v_empty.at[i])

    def load_item(self, _: Any, n: Any, item: Item) -> None:
        """Loads all blocks of V of an item. Those with a mask go to the checkers."""
        scratch, masked = self.cta.scratch, self.cta.call.masked_blocks
        for j in range(masked):
            load = functools.partial(self.load_v, n, item, j, scratch.v_first)
            pl.when(item.num_blocks > j)(load)
        lax.fori_loop(
            masked, item.num_blocks, lambda j, _: self.load_v(n, item, j, scratch.v_full), None
        )

    def load_v(self, n: Any, item: Item, j: Any, full: Any) -> None:
        """Loads V of the item's j-th block, when its stage is free."""
        cta, config = self.cta, self.cta.config
        stage, rows = cta.stage(n + j), block_rows(cta, item, j)
        plgpu.barrier_wait(cta.scratch.v_empty.at[stage])
        values, column = cta.inputs.v, 0
        if values is None:
            values, column = cta.inputs.k_nope, config.nope_dim
        for panel in range(config.v_panels):
            plgpu.copy_gmem_to_smem(
                values.at[rows, item.head, pl.ds(column + PANEL * panel, PANEL)],
                cta.scratch.v.at[stage, panel],
                full.at[stage],
            )


@dataclasses.dataclass(frozen=True)
class Checker:
    """Warps 2 and 3: replace NaN and infinity by 0 in V where a row of the tile must not see it.

    P is 0 for a hidden key, but 0 * NaN is NaN. Only a tile's last blocks, which are loaded first,
    have hidden keys. A row that sees a changed row of V becomes NaN in the end
    (`ComputingWarpgroup.poisoned`). Each checker has half of a block's keys.
    """

    cta: Cta
    half: Any

    def run(self) -> None:
        self.cta.run_items(self.check_item)

    def check_item(self, _: Any, n: Any, item: Item) -> None:
        for j in range(self.cta.call.masked_blocks):
            pl.when(item.num_blocks > j)(functools.partial(self.check, n, item, j))

    def check(self, n: Any, item: Item, j: int) -> None:
        """Checks the item's j-th block."""
        cta, keys = self.cta, self.cta.config.block_keys
        stage = cta.stage(n + j)
        begin = keys // CHECKERS * self.half
        plgpu.barrier_wait(cta.scratch.v_first.at[stage])
        part = cta.scratch.v.at[stage, :, pl.ds(begin, keys // CHECKERS)]
        seen_by_all = item.limit + 1 - (item.num_blocks - 1 - j) * keys
        changed = cta.g.clear_not_finite_in_panels(part, seen_by_all - begin)
        cta.scratch.changed[stage, self.half] = changed + begin
        plgpu.barrier_arrive(cta.scratch.v_checked.at[stage])


def block_rows(cta: Cta, item: Item, j: Any) -> Any:
    """Returns where the keys of an item's j-th block are, the last block first.

    The block may end past the request and past the array, where TMA fills in zeros.
    """
    keys = cta.config.block_keys
    return pl.ds(item.kv_row + (item.num_blocks - 1 - j) * keys, keys)
