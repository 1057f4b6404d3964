"""Makes a balanced split plan in one kernel, equal to `planner.balanced_plan` to the bit.

Each CTA lays the line of tiles (`mla_jax.splits.line`) in its shared memory. Each warp of the
launch then computes the largest load and the number of splits of one candidate, with a few
boundaries per lane. The CTA that finishes last chooses the candidate and writes the plan. No CTA
waits for another one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.splits.line import LARGEST, quotient, remainder, share_of
from mla_jax.splits.plan import SplitPlan
from mla_jax.splits.planner import PAIR_OVERHEAD, Balance
from pallas_kernels.hopper.mosaic.per_thread import LANES, WARPS
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS, Backend
from pallas_kernels.hopper.plan.boundaries import Boundary, CtaLine, choose
from pallas_kernels.hopper.plan.call import (
    THREADS,
    Inputs,
    Outputs,
    PlanCall,
    Scratch,
    refusal,
)
from pallas_kernels.hopper.plan.write import PlanWriter
from pallas_kernels.hopper.work_items import ITEM_FIELDS, PLANNED
from pallas_kernels.modes import jit_with_defaults


@jit_with_defaults("balance", "finish", "longest", "interpret")
def make_plan(
    seq_lens: jax.Array,
    query_lens: jax.Array | None,
    balance: Balance,
    *,
    finish: str = "merge",
    longest: int = LARGEST,
    interpret: Any = None,
) -> tuple[SplitPlan, jax.Array, jax.Array]:
    """Returns a plan, and ranges and items of its work list.

    They are those of `planner.balanced_plan` and `work_items.work_list`, to the bit. There must be
    no `refusal`.

    finish: as in `work_list`; "in_pairs" for plans in pairs only.
    longest: a longer length counts as this.
    interpret: `plgpu.InterpretGPUParams()` runs the kernel on a CPU; None: on the GPU.
    """
    call = PlanCall(len(seq_lens), balance, finish, longest, interpret)
    assert refusal(call.batch, balance) is None
    assert finish != "in_pairs" or balance.in_pairs

    def body(inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
        _run(call, inputs, outputs, scratch)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def shared(size: int) -> Any:
        return plgpu.SMEM((size,), jnp.int32)

    entries, splits = call.per_thread * THREADS, call.most_splits
    outputs = Outputs(
        **{field: ints(call.num_items) for field in PLANNED},
        worker_start=ints(balance.num_workers + 1),
        tile_partial_start=ints(call.num_tiles + 1),
        ranges=ints(balance.num_workers, call.range_fields),
        items=ints(call.num_items, ITEM_FIELDS),
        scores=ints(2 * WARPS * (call.share_ctas + 1)),
    )
    plan_kernel = plgpu.kernel(
        body,
        out_type=(outputs,),
        scratch_types=(
            Scratch(
                edge=shared(entries),
                cost=shared(entries),
                kv_blocks=shared(entries),
                split_tile=shared(splits),
                split_taken=shared(splits),
                split_tiles=shared(splits),
                first_split=shared(splits),
                worker_item=shared(balance.num_workers + 1),
                worker_partial=shared(balance.num_workers + 1),
                is_shared=shared(balance.num_workers),
                items=shared(ITEM_FIELDS * call.num_items),
                units=shared(THREADS),
                line=shared(2 * THREADS),
                splits=shared(2 * THREADS),
            ),
        ),
        grid=(call.share_ctas + 1,),
        grid_names=("cta",),
        interpret=interpret,
        kernel_name="mla_decode_plan",
        compiler_params=OWN_BARRIERS,
    )
    # The kernel leaves zeros: XLA takes these for constants and may pass them to every launch.
    counter = jnp.zeros(1, jnp.int32)
    (made,) = plan_kernel(Inputs(seq_lens, query_lens, counter))
    costs = balance.costs
    names = (*PLANNED, "worker_start", "tile_partial_start")
    split = SplitPlan(
        **{name: getattr(made, name) for name in names},
        block_size=costs.block_size,
        rows_per_tile=costs.rows_per_tile,
        num_row_tiles=costs.num_row_tiles,
        num_partials=balance.num_partials,
        num_heads=balance.num_heads,
    )
    return split, made.ranges, made.items


def _run(call: PlanCall, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
    """Scores the candidates of a CTA's warps, and in the last CTA writes the plan."""
    g = Backend(interpreting=call.interpret is not None)
    g.wait_for_previous_kernel()
    g.let_next_kernel_start()
    line = CtaLine.lay(g, call, inputs, scratch)
    planner = Planner(g, call, outputs, line)
    writer = PlanWriter(g, call, outputs, scratch, line)
    cta = lax.axis_index("cta")
    pl.when(cta < call.share_ctas)(lambda: planner.score_shares(cta))
    pl.when(cta == call.share_ctas)(planner.score_whole_tiles)
    is_last = g.is_last_cta(inputs.counter, call.share_ctas + 1)
    pl.when(is_last)(lambda: writer.write(planner.chosen(writer.workers)))


@dataclasses.dataclass(frozen=True)
class Planner:
    """Scores candidates and chooses one. Arrays have one int32 per thread."""

    g: Backend
    call: PlanCall
    outputs: Outputs
    line: CtaLine

    def score_shares(self, cta: Any) -> None:
        """Stores the scores of equal shares, of a number of workers for each warp."""
        num_workers = self.call.balance.num_workers
        candidate = cta * WARPS + self.g.thread_index() // LANES
        spread = candidate >= num_workers
        count = jnp.where(spread, candidate - num_workers, candidate) + 1
        workers = self.workers_of_lane()
        share, rest = quotient(self.line.cost, count), remainder(self.line.cost, count)
        # shares[i + 1] is shares[i] and one more `share` and `rest` / `count`.
        more, left = share_of(workers[0], rest, count)
        shares = []
        for worker in workers:
            shares.append((worker * share + more, left))
            left = left + rest
            carry = left >= count
            left, more = jnp.where(carry, left - count, left), more + jnp.where(carry, 1, 0)
        load, splits = self.score(self.line.shares_of(workers, shares, count, spread))
        num_blocks = self.line.cost - self.call.num_tiles * self.call.overhead
        tried = (count == num_workers) | ((count + 1) * (count + 1) > num_blocks)
        tried &= candidate < 2 * num_workers
        self.store_score(candidate, jnp.where(tried, load, LARGEST), splits)

    def score_whole_tiles(self) -> None:
        """Stores the scores of whole tiles per worker, and of whole tiles per pair of workers."""
        warp = self.g.thread_index() // LANES
        workers = self.workers_of_lane()
        workers = [jnp.minimum(worker, self.call.balance.num_workers) for worker in workers]
        load, splits = self.score(self.line.edges(workers, self.call.balance.num_workers))
        if self.call.balance.in_pairs:
            of_pairs, splits_of_pairs = self.score(self.line.halves(workers))
            load = jnp.where(warp == 0, load, of_pairs)
            splits = jnp.where(warp == 0, splits, splits_of_pairs)
        self.store_score(self.call.share_ctas * WARPS + warp, load, splits)

    def workers_of_lane(self) -> list[Any]:
        """Returns the workers, and so boundaries, of each lane: a few neighbouring ones."""
        per_lane = -(-(self.call.balance.num_workers + 1) // LANES)
        first = (self.g.thread_index() % LANES) * per_lane
        return [first + i for i in range(per_lane)]

    def score(self, boundaries: list[Boundary]) -> tuple[Any, Any]:
        """Returns the largest cost of a range and the number of splits, for each warp."""
        last = boundaries[-1]
        before = Boundary(*(self.g.from_lane_before(x, 1, LARGEST) for x in last))
        largest = splits = jnp.zeros_like(last.cost)
        for one in boundaries:
            again = jnp.where(before.inner == 1, self.call.overhead, 0)
            load = jnp.where(one.place > before.place, again + one.cost - before.cost, 0)
            largest = jnp.maximum(largest, load)
            splits = splits + jnp.where(one.place != before.place, one.inner, 0)
            before = one
        return self.g.max_in_warp(largest), self.g.sum_in_warp(splits)

    def store_score(self, candidate: Any, load: Any, splits: Any) -> None:
        is_first = jnp.where(self.g.thread_index() % LANES == 0, 1, 0)
        for i, value in enumerate((load, splits)):
            self.g.store_indexed(self.outputs.scores, 2 * candidate + i, value, is_first)

    def load_score(self, candidate: Any) -> list[Any]:
        """Returns the largest load and the splits of a candidate that another CTA has scored."""
        return [
            self.g.load_indexed(self.outputs.scores, 2 * candidate + i, written_by_others=True)
            for i in range(2)
        ]

    def chosen(self, workers: Sequence[Any]) -> list[Boundary]:
        """Returns the boundaries of the candidate with the smallest largest load."""
        balance, g = self.call.balance, self.g
        num_workers = balance.num_workers
        workers = [jnp.clip(worker, 0, num_workers) for worker in workers]
        lane = g.thread_index() % LANES
        scores = []
        for first in range(0, WARPS * self.call.share_ctas, LANES):
            index = jnp.minimum(first + lane, WARPS * self.call.share_ctas - 1)
            scores.append((index, *self.load_score(index)))
        others = jnp.full_like(lane, WARPS * self.call.share_ctas)
        whole_load, _ = self.load_score(others)
        halves_load, _ = self.load_score(others + 1) if balance.in_pairs else (LARGEST, None)
        # These need no score, so they are computed while the scores are loaded.
        whole = self.line.edges(workers, num_workers)
        halves = self.line.halves(workers) if balance.in_pairs else []
        smallest = scores[0][1]
        for _, load, _ in scores[1:]:
            smallest = jnp.minimum(smallest, load)
        smallest = g.min_in_warp(smallest)
        # Among equals the one with fewest splits, then the first.
        best = jnp.full_like(lane, LARGEST)
        for index, load, splits in scores:
            best = jnp.minimum(best, jnp.where(load == smallest, (splits << 16) + index, LARGEST))
        best = g.min_in_warp(best) & 0xFFFF
        spread = best >= num_workers
        count = jnp.where(spread, best - num_workers, best) + 1
        shares = [share_of(worker, self.line.cost, count) for worker in workers]
        boundaries = self.line.shares_of(workers, shares, count, spread)

        least = smallest + balance.merge_overhead
        boundaries = list(map(lambda w, b: choose(whole_load <= least, w, b), whole, boundaries))
        if balance.in_pairs:
            is_cheaper = halves_load + PAIR_OVERHEAD < jnp.minimum(whole_load, least)
            boundaries = list(map(lambda h, b: choose(is_cheaper, h, b), halves, boundaries))
        return boundaries
