"""The time of our own Hopper kernels, from the plan that they really run.

`pallas_kernels.hopper.model` makes a `HopperKernel` of `plan_decode`'s plan. A worker runs its work
items one after the other. The first begins with an idle memory pipe, and each later one with its
first block and its queries loaded while the item before was computed. At the end the workers of
split tiles combine their partials in the same launch.

Three constants are fitted on rows of our own kernels (profiles/hopper.json): the share of the
memory's bandwidth, the share of the tensor cores' rate, and the time of an empty launch. What a
stage takes besides its counted work (latencies of dependent instructions, barriers, fences) was
measured by the time stamps of `decode` (`stages` in that file). All others are those of the
profile.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import files

import numpy as np

from mla_jax.hal.hopper_orders import STAGES, hopper_decode, hopper_transposed
from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.schedule import Schedule, Step
from mla_jax.hal.simulator import many_cores as machine
from mla_jax.hal.simulator.loaded_times import active, fair_share
from mla_jax.hal.simulator.one_core import Costs, StageCost, Timeline
from mla_jax.hal.simulator.shared_engines import SharedBlockTimes, run_shared
from mla_jax.hal.tiling import KEY, LATENT, ROPE
from mla_jax.hal.work import Problem, Work

BLOCK = 64  # tokens per KV block
BEFORE = 8  # blocks of the item that precedes one that is not a worker's first
SOFTMAX_OPS = 8  # scale, maximum, subtract, exponent's multiply, sum, convert, store, vote
KERNELS = ("decode", "decode_transposed")
STORED, PARTIAL, KEPT = 0, 1, 2  # where the result of a work item goes


@dataclass(frozen=True)
class Merging:
    """How a worker combines its share of a split tile: parts, and partials loaded at once.

    A part is some columns or rows of a tile, which one warpgroup combines.
    """

    parts: int
    at_once: int
    warpgroups: int


@dataclass(frozen=True, eq=False)
class HopperKernel:
    """One of our kernels with the plan of one call.

    kernel: "decode" or "decode_transposed".
    work: the plan's work items.
    kept: which of them keep their result and combine it with one other item of their tile.
    rows_per_cta: rows of the tile that one CTA has, with padding.
    ctas_per_tile: CTAs of a cluster that share every KV block.
    partial_bytes: per value of a partial.
    merging: by the number of partials of a tile.
    kv_stages, q_stages: of `decode_transposed`, as in `hopper_transposed`.
    """

    kernel: str
    work: Work
    kept: np.ndarray
    rows_per_cta: int
    ctas_per_tile: int
    in_pairs: bool
    partial_bytes: int
    merging: Mapping[int, Merging]
    kv_stages: tuple[int, int, int] = (STAGES, STAGES, STAGES)
    q_stages: int = 2

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel = {self.kernel!r}, wanted one of {', '.join(KERNELS)}")

    @property
    def name(self) -> str:
        return f"hopper {self.kernel}"

    @property
    def block_kv(self) -> int:
        return BLOCK

    @property
    def block_bytes(self) -> float:
        """Bytes of a KV block that one CTA loads."""
        return BLOCK * KEY * 2 / self.ctas_per_tile

    @property
    def stage_bytes(self) -> float:
        """Bytes of KV that one CTA has in flight: all of its stages."""
        left, right, rope = self.kv_stages
        return BLOCK * 2 * ((left + right) * LATENT / 2 + rope * ROPE) / self.ctas_per_tile

    def order(self, num_blocks: int, before: int = 0) -> Schedule:
        """Returns the schedule of so many blocks, of which an earlier item has `before`."""
        if self.kernel == "decode":
            return hopper_decode(num_blocks, before=before)
        stages = self.kv_stages, self.q_stages
        return hopper_transposed(num_blocks, before=before, kv_stages=stages[0], q_stages=stages[1])


@functools.cache
def hopper_constants() -> dict:
    """Returns the three fitted constants, and the rows that they were fitted on."""
    return json.loads(files("mla_jax.hal.profiles").joinpath("hopper.json").read_text())


def tuned_for_hopper(
    profile: HardwareProfile, constants: Mapping[str, float] | None = None
) -> HardwareProfile:
    """Returns the profile with the constants that are fitted on our own kernels."""
    fit = hopper_constants()
    values = fit["constants"] if constants is None else constants
    return profile.with_values(values, f"fitted on {fit['rows']}")


def fixed_costs(profile: HardwareProfile, kernel: str) -> Mapping[str, float]:
    """Returns what stages take besides their counted work, in seconds.

    Those of `decode` were measured. `decode_transposed` has no measured stages, so it gets the
    profile's latencies: its rows are few, and so are its instructions.
    """
    if kernel == "decode":
        return hopper_constants()["stages"]
    barrier, l2 = profile["latency.barrier"], profile["latency.l2"]
    return {
        "product": 0.0,
        "softmax": 3 * barrier,
        "sum": 2 * barrier,
        "store": 2 * barrier,
        "store_partial": 2 * barrier + l2,
        "wait_for_partials": 4 * l2,
        "combine_round": l2,
    }


def hopper_costs(
    profile: HardwareProfile, kernel: HopperKernel, end: int, share: float, startup: float = 0.0
) -> Costs:
    """Returns the cost function of stages. end: STORED, PARTIAL or KEPT.

    share: bytes per second of the device's memory for this core while all cores are working.
    startup: seconds that q comes later at the start of a launch.
    """
    cycle, rows = profile.cycle, kernel.rows_per_cta
    flop = cycle / (profile["engine.tensor_bf16"] * profile["engine.tensor_efficiency"])
    shared = cycle / (profile["engine.shared_pipe"] * profile["engine.shared_efficiency"])
    cuda = cycle / (profile["engine.cuda"] * profile["engine.cuda_efficiency"])
    sfu = cycle / profile["engine.sfu"]
    copy = 1.0 / (min(profile["engine.copy"], share) * kernel.ctas_per_tile)
    one_copy = 1.0 / min(profile["engine.copy"], share)
    store = 1.0 / profile["engine.store"]  # to L2
    memory = profile["latency.memory"]
    fixed = fixed_costs(profile, kernel.kernel)
    transposed = kernel.kernel == "decode_transposed"
    half = rows * LATENT / 2

    def load(columns: int) -> StageCost:
        return StageCost({"copy": BLOCK * columns * 2 * copy}, latency=memory)

    def product(m: int, n: int, k: int) -> StageCost:
        """One product; wgmma reads A of each 64 rows, and B once for them."""
        operands = math.ceil(m / 64) * (64 + n) * k * 2
        busy = {"tensor": 2.0 * max(m, 64) * n * k * flop, "shared": operands * shared}
        return StageCost(busy, hold=fixed["product"])

    def softmax(second: bool) -> StageCost:
        elements = rows * BLOCK
        busy = {"cuda": elements * SOFTMAX_OPS * cuda, "sfu": elements * sfu}
        if transposed:  # O^T is rescaled always, and warps exchange their maxima
            busy["cuda"] += rows * LATENT * cuda
            return StageCost(busy, hold=fixed["softmax"])
        return StageCost(busy, hold=fixed["softmax_second" if second else "softmax"])

    def stored() -> StageCost:
        """Normalises half of O and stores it."""
        normalise = {"cuda": 3 * half * cuda}
        if end == STORED:
            return StageCost(normalise | {"copy": half * 2 * store}, hold=fixed["store"])
        if end == PARTIAL:
            copy_partial = {"copy": half * kernel.partial_bytes * store}
            return StageCost(normalise | copy_partial, hold=fixed["store_partial"])
        # Maxima and sums are exchanged, then half of O.
        exchange = half * (4 if kernel.in_pairs else kernel.partial_bytes) * one_copy
        return StageCost(normalise | {"copy": exchange}, hold=fixed["store_partial"])

    def stage(step: Step) -> StageCost:
        match step.stage:
            case "LOAD_Q":
                return StageCost({"copy": rows * KEY * 2 * one_copy}, latency=memory + startup)
            case "LOAD_L" | "LOAD_R":
                return load(LATENT // 2)
            case "LOAD_ROPE":
                return load(ROPE)
            case "QK":
                return product(BLOCK, rows, KEY) if transposed else product(rows, BLOCK, KEY)
            case "SM":
                return softmax(step.unit == "wg1")
            case "PV_L" | "PV_R":
                if transposed:
                    return product(LATENT // 2, rows, BLOCK)
                return product(rows, LATENT // 2, BLOCK)
            case "SUM_L" | "SUM_R":
                return StageCost({}, hold=fixed["sum"])
            case "STORE_L" | "STORE_R":
                return stored()
        raise ValueError(f"{kernel.name}: no cost for stage {step.stage}")

    return stage


class _ItemTimes:
    """Times of work items that end in one way.

    The loads of many cores are out of step, so the memory is never idle while it is what bounds
    them. So an item takes the longer of two times: its schedule's with the memory to itself, and
    that in which its share of the memory's bandwidth brings its bytes. At the start of a launch all
    cores load q and their first blocks at once, so that these come later than for one core alone.

    q_bytes: of a core's q, those that no other core reads.
    """

    RATES = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, math.inf)  # of loads, in shares

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
        self._kernel, self._share = kernel, share
        self._bytes = kernel.block_bytes / share
        self._signal = profile["latency.barrier"]
        alone = self._costs_at(math.inf)
        self._first, self._later = alone_times(profile, kernel, end)
        steps = {step.stage: alone(step).work for step in kernel.order(1).steps}
        load = steps["LOAD_L"] + steps["LOAD_R"] + steps["LOAD_ROPE"]
        self._around = self._first(1) - load
        together = (q_bytes + kernel.stage_bytes) / share
        loads = zip(("LOAD_L", "LOAD_R", "LOAD_ROPE"), kernel.kv_stages, strict=True)
        alone_too = steps["LOAD_Q"] + sum(number * steps[part] for part, number in loads)
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
        """Returns the timeline of a first item, with loads at the rate that its time implies."""
        wanted = self(num_blocks, False)[0]
        schedule = self._kernel.order(num_blocks)
        lines = (
            run_shared(schedule, self._costs_at(self._share * rate, self._startup), self._signal)
            for rate in self.RATES
        )
        return min(lines, key=lambda line: abs(line.total - wanted))


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
    alone, signal = hopper_costs(profile, kernel, end, math.inf), profile["latency.barrier"]
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
    if problem.kv_dtype not in ("bf16", "fp16"):
        raise ValueError(
            f"{kernel.name}: kv_dtype = {problem.kv_dtype!r}, wanted bf16 or fp16: there is no "
            "model of the kernels over an int8 cache"
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
