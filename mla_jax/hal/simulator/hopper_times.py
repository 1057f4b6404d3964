"""The time of a call of our own Hopper decode kernels, from the plan that they really run.

A worker runs its work items one after the other. The first begins with an idle memory pipe, and
each later one with its first block loaded while the item before was computed. At the end the
workers of split tiles combine their partials in the same launch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.simulator import many_cores as machine
from mla_jax.hal.simulator.hopper import (
    KEPT,
    PARTIAL,
    STORED,
    HopperKernel,
    fixed_costs,
    hopper_costs,
)
from mla_jax.hal.simulator.loaded_times import active, fair_share
from mla_jax.hal.simulator.one_core import Timeline
from mla_jax.hal.simulator.shared_engines import SharedBlockTimes, run_shared
from mla_jax.hal.tiling import KEY, LATENT
from mla_jax.hal.work import Problem

BEFORE = 8  # blocks of the item that precedes one that is not a worker's first


class _ItemTimes:
    """Times of work items that end in one way.

    The loads of many cores are out of step, so the memory is never idle while it is what bounds
    them. So an item takes the longer of two times: its schedule's with the memory to itself, and
    that in which its share of the memory's bandwidth brings its bytes. At the start of a launch all
    cores load q and their first blocks at once, so that these come later than for one core alone.

    q_bytes: of a core's q, those that no other core reads.
    """

    HALVINGS = 16  # in the search for the queue of the memory

    def __init__(
        self,
        profile: HardwareProfile,
        kernel: HopperKernel,
        end: int,
        share: float,
        q_bytes: float,
        alone_times: "AloneTimes",
    ) -> None:
        self._costs_at = partial(hopper_costs, profile, kernel, end)
        self._kernel = kernel
        self._bytes = kernel.block_bytes / share
        self._signal = profile["latency.barrier"]
        alone = self._costs_at()
        self._first, self._later = alone_times(profile, kernel, end)
        steps = {step.stage: alone(step) for step in kernel.order(1).steps}
        loads = {
            stage: cost.work
            for stage, cost in steps.items()
            if stage.startswith("LOAD") and not stage.startswith("LOAD_Q")
        }
        self._around = self._first(1) - sum(loads.values())
        if kernel.is_int8:  # The other blocks wait until q is there.
            together = (q_bytes + kernel.block_bytes) / share
            alone_too = loads["LOAD"]
        else:
            together = (q_bytes + kernel.stage_bytes) / share
            counts = zip(("LOAD_L", "LOAD_R", "LOAD_ROPE"), kernel.kv_stages, strict=True)
            alone_too = steps["LOAD_Q"].work + sum(n * loads[part] for part, n in counts)
        self._startup = max(together - alone_too, 0.0)

    def __call__(self, num_blocks: int, later: bool) -> tuple[float, float]:
        """Returns seconds with all cores working, and with the memory to itself.

        later: whether another item is before it, so that its first block is there in time.
        """
        if later:
            alone = self._later(BEFORE + num_blocks) - self._first(BEFORE)
            return max(alone, num_blocks * self._bytes), alone
        alone = self._first(num_blocks)
        crowded = max(alone + self._startup, self._around + num_blocks * self._bytes)
        return crowded, alone

    def timeline(self, num_blocks: int) -> Timeline:
        """Returns the timeline of a first item, whose loads wait in the memory's queue.

        The memory serves the loads of all cores in turn, so that each is late by the same time, and
        a block that was asked for soon after another one arrives soon after it. The queue's time is
        the one with which the item takes its seconds.
        """
        wanted = self(num_blocks, False)[0]
        schedule = self._kernel.order(num_blocks)

        def line(queue: float) -> Timeline:
            return run_shared(schedule, self._costs_at(queue), self._signal)

        low, high = 0.0, wanted
        for _ in range(self.HALVINGS):
            queue = (low + high) / 2
            low, high = (queue, high) if line(queue).total < wanted else (low, queue)
        return line(low)


@dataclass(frozen=True)
class HopperTimes:
    """The seconds of a call without its launch, and how its longest item runs."""

    cores: float
    merge: float
    longest: _ItemTimes
    longest_blocks: int

    def timeline(self, most: int) -> Timeline:
        """Returns the timeline of the longest item, or of its first `most` blocks."""
        return self.longest.timeline(min(self.longest_blocks, most))


# Seconds of so many blocks with the memory to itself.
Seconds = Callable[[int], float]
# profile, kernel, end -> those of a first item, and of two items of which the first has BEFORE.
AloneTimes = Callable[[HardwareProfile, HopperKernel, int], tuple[Seconds, Seconds]]


def exact_times(
    profile: HardwareProfile, kernel: HopperKernel, end: int
) -> tuple[Seconds, Seconds]:
    """Returns times that are simulated until they repeat."""
    alone, signal = hopper_costs(profile, kernel, end), profile["latency.barrier"]
    first = SharedBlockTimes(kernel.order, alone, signal)
    return first, SharedBlockTimes(partial(kernel.order, before=BEFORE), alone, signal)


def hopper_times(
    profile: HardwareProfile,
    problem: Problem,
    kernel: HopperKernel,
    alone_times: AloneTimes = exact_times,
    most_items: float = math.inf,
) -> HopperTimes:
    """Returns the times of one call.

    profile: with our own constants (`tuned_for_hopper`).
    most_items: above so many work items, all cores count as working until the end.
    """
    wanted = ("int8",) if kernel.is_int8 else ("bf16", "fp16")
    if problem.kv_dtype not in wanted:
        raise ValueError(
            f"{kernel.name}: kv_dtype = {problem.kv_dtype!r}, wanted {' or '.join(wanted)}"
        )
    plan = kernel.work
    share = fair_share(profile, plan, kernel.stage_bytes, kernel.ctas_per_tile)
    end = np.where(kernel.kept, KEPT, np.where(plan.split, PARTIAL, STORED))
    later = np.diff(plan.worker, prepend=-1) == 0
    kinds, which = np.unique(np.stack([plan.blocks, end, later]), axis=1, return_inverse=True)
    cores = active(plan)
    q_bytes = problem.batch * problem.rows * KEY * 2 / cores
    q_bytes = min(q_bytes, kernel.rows_per_cta * KEY * 2)
    times = {
        e: _ItemTimes(profile, kernel, e, share, q_bytes, alone_times) for e in set(end.tolist())
    }
    seconds = np.array([times[e](n, bool(after)) for n, e, after in kinds.T.tolist()])
    crowded, alone = seconds[which.reshape(-1)].T
    if len(crowded) > most_items:
        alone = crowded
    seconds_of_cores = machine.makespan(crowded, alone, plan.worker, plan.num_workers)
    longest = int(np.argmax(plan.blocks))
    return HopperTimes(seconds_of_cores, merge_seconds(profile, kernel), times[int(end[longest])],
                       int(plan.blocks[longest]))  # fmt: skip


def merge_seconds(profile: HardwareProfile, kernel: HopperKernel) -> float:
    """Returns the seconds from a worker's last partial to its last combined row.

    It publishes its partial and sees those of the others. Then its warpgroups combine their parts
    of each of its tiles, in rounds of loads that wait for one another.
    """
    plan, fixed = kernel.work, fixed_costs(profile, kernel.kernel)
    writes = plan.split & ~kernel.kept
    # A tile that one of its two workers combines by itself is done when that item is.
    kept_tiles = np.unique(plan.tile[kernel.kept])
    writes &= ~np.isin(plan.tile, kept_tiles)
    if not writes.any():
        return 0.0
    parts = plan.parts
    rounds = np.zeros(plan.num_workers)
    for worker, tile in zip(plan.worker[writes].tolist(), plan.tile[writes].tolist(), strict=True):
        merging = kernel.merging[int(parts[tile])]
        of_a_warpgroup = math.ceil(merging.parts / (parts[tile] * merging.warpgroups))
        rounds[worker] += of_a_warpgroup * math.ceil(parts[tile] / merging.at_once)
    values = float(plan.rows[writes].sum()) * LATENT
    traffic = values * kernel.partial_bytes / profile["memory.l2_bandwidth"]
    waiting = fixed["wait_for_partials"]
    return waiting + max(float(rounds.max()) * fixed["combine_round"], traffic)
