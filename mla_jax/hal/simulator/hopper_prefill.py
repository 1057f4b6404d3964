"""Causal prefill kernels on a GPU, in the expanded form: stage costs, and our own Hopper kernel.

`prefill_costs` are those of a kernel with two warpgroups of 64 query rows, in an order of
`mla_jax.hal.prefill_orders`. `HopperPrefill` is our own kernel with the work list of one call,
which `pallas_kernels.hopper.prefill.model` makes.

No constant is fitted on rows of prefill kernels. The tensor cores have the rate that was fitted on
published decode kernels, and not that of our decode kernels. A prefill call keeps them busy from
its start to its end, at the card's limit of power, as the longest of those rows do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from mla_jax.hal.prefill_orders import hopper_prefill
from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.schedule import Schedule, Step
from mla_jax.hal.simulator.hopper import hopper_constants, tuned_for_hopper
from mla_jax.hal.simulator.many_cores import makespan
from mla_jax.hal.simulator.one_core import BlockTimes, Costs, StageCost, Timeline, run_schedule
from mla_jax.hal.work import Problem, Work

ROWS, BLOCK = 64, 128  # query rows of a warpgroup, and keys of a block
KEY, VALUE, ROPE = 192, 128, 64  # columns of q and k, of v, and of k that all heads share
BEFORE = 8  # blocks of the tile that precedes one that is not a core's first


@dataclass(frozen=True)
class PrefillStages:
    """What differs between prefill kernels in the costs of stages.

    item: bytes of a value of q, K and V.
    max_ops, softmax_ops: instructions per score, before P and for P. rescales: whether O is
        rescaled in each step.
    product, softmax, store: seconds besides counted work: from the end of a product until its
        result can be read, and of a softmax and a store.
    """

    item: int = 2
    max_ops: float = 0.0
    softmax_ops: float = 8.0  # as in the decode kernels
    rescales: bool = True
    product: float = 0.0
    softmax: float = 0.0
    store: float = 0.0


def prefill_costs(profile: HardwareProfile, stages: PrefillStages) -> Costs:
    """Returns the cost function of the stages of a prefill kernel. K and V are in L2."""
    cycle, item = profile.cycle, stages.item
    rate = profile["engine.tensor_bf16" if item == 2 else "engine.tensor_int8"]
    flop = cycle / (rate * profile["engine.tensor_efficiency"])
    shared = cycle / (profile["engine.shared_pipe"] * profile["engine.shared_efficiency"])
    cuda = cycle / (profile["engine.cuda"] * profile["engine.cuda_efficiency"])
    share = profile["memory.l2_bandwidth"] / profile.cores
    copy, store = (min(profile[f"engine.{name}"], share) for name in ("copy", "store"))
    scores = ROWS * BLOCK

    def load(rows: int, columns: int) -> StageCost:
        bytes_ = rows * columns * item
        return StageCost({"copy": bytes_ / copy}, latency=profile["latency.memory"])

    def product(keys: int, columns: int, operands: int) -> StageCost:
        busy = {"tensor": 2.0 * ROWS * keys * columns * flop, "shared": operands * item * shared}
        return StageCost(busy, latency=stages.product)

    def costs(step: Step) -> StageCost:
        match step.stage.removesuffix("_0").removesuffix("_1"):
            case "ITEM":  # the counter, the numbers of tiles and heads, and the tile
                return StageCost({}, hold=3 * profile["latency.l2"])
            case "LOAD_Q":
                return load(ROWS if step.unit == "load_k" else 2 * ROWS, KEY)
            case "LOAD_K":
                return load(BLOCK, KEY)
            case "LOAD_V":
                return load(BLOCK, VALUE)
            case "CHECK":  # all of a block of V is read
                busy = {"shared": BLOCK * VALUE * item * shared}
                return StageCost(busy, hold=profile["latency.barrier"])
            case "QK":
                return product(BLOCK, KEY, (ROWS + BLOCK) * KEY)
            case "QK_HALF":
                return product(BLOCK // 2, KEY, (ROWS + BLOCK // 2) * KEY)
            case "PV":  # P is in registers
                return product(BLOCK, VALUE, BLOCK * VALUE)
            case "MAX":
                return StageCost({"cuda": scores * stages.max_ops * cuda})
            case "SM":
                ops = scores * stages.softmax_ops + stages.rescales * ROWS * VALUE
                exponentials = scores * cycle / profile["engine.sfu"]
                return StageCost({"cuda": ops * cuda, "sfu": exponentials}, hold=stages.softmax)
            case "STORE":
                busy = {"copy": ROWS * VALUE * 2 / store, "cuda": 3 * ROWS * VALUE * cuda}
                return StageCost(busy, hold=stages.store)
        raise ValueError(f"no cost for stage {step.stage}")

    return costs


@dataclass(frozen=True, eq=False)
class HopperPrefill:
    """Our prefill kernel with the work list of one call, in DeepSeek-V3's widths.

    work: a tile of one head per work item, in the order in which free cores take them.
    trimmed: whether the first warpgroup of a work item sees half of its last block only.
    query_lens, kv_lens: per request, keys including those before its queries.
    """

    work: Work
    trimmed: np.ndarray
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: int
    stages: int = 2

    @property
    def name(self) -> str:
        return "hopper prefill"

    @property
    def flops(self) -> float:
        """Operations of pairs of a query and a key that it sees."""
        pairs = sum(
            n * kv - n * (n - 1) / 2 for n, kv in zip(self.query_lens, self.kv_lens, strict=True)
        )
        return 2.0 * self.heads * pairs * (KEY + VALUE)

    @property
    def bytes(self) -> float:
        """Bytes of q, K, V and o, each read or written once."""
        keys = sum(self.kv_lens) * (self.heads * (KEY - ROPE + VALUE) + ROPE)
        return 2.0 * (keys + sum(self.query_lens) * self.heads * (KEY + VALUE))

    def order(self, trims: bool, num_blocks: int, before: int = 0) -> Schedule:
        """Returns the schedule of a tile, after another one of `before` blocks."""
        return hopper_prefill(num_blocks, before=before, stages=self.stages, trims=trims)


@dataclass(frozen=True)
class PrefillTimes:
    """The seconds of a call without its launch, and the timeline of its longest work item."""

    cores: float
    longest: Schedule
    costs: Costs
    signal: float

    @property
    def timeline(self) -> Timeline:
        return run_schedule(self.longest, self.costs, self.signal)


def own_stages(fixed: Mapping[str, float]) -> PrefillStages:
    """Returns the stages of our kernel. fixed: measured times of the stages of `decode`.

    A step has 426 instructions per thread besides rescaling, for 64 scores each. It rescales O only
    where scores rise far.
    """
    return PrefillStages(
        max_ops=1.0, softmax_ops=426 / 64 - 1, rescales=False, product=fixed["product"],
        softmax=fixed["softmax"], store=fixed["sum"],
    )  # fmt: skip


def prefill_times(
    profile: HardwareProfile, problem: Problem, kernel: HopperPrefill, most_blocks: int
) -> PrefillTimes:
    """Returns the times of one call.

    profile: `tuned_for_prefill`. most_blocks: of the timeline.

    Raises ValueError for a problem that is not that of the kernel.
    """
    wanted = kernel.kv_lens, kernel.heads, max(kernel.query_lens)
    if (problem.kv_lens, problem.heads, problem.s_q) != wanted or problem.kv_dtype not in (
        "bf16", "fp16",
    ):  # fmt: skip
        raise ValueError(
            f"{kernel.name}: problem = {problem!r:.200}, wanted the lengths, heads and query "
            "tokens of the kernel, in bf16 or fp16"
        )
    costs = prefill_costs(profile, own_stages(hopper_constants()["stages"]))
    signal = profile["latency.barrier"]
    work = kernel.work
    kinds, which = np.unique(
        np.stack([work.blocks, kernel.trimmed.astype(int)]), axis=1, return_inverse=True
    )
    seconds = np.zeros(kinds.shape[1])
    for trims in (False, True):
        of_kind = np.flatnonzero(kinds[1] == trims)
        first = BlockTimes(partial(kernel.order, trims), costs, signal)
        later = BlockTimes(partial(kernel.order, trims, before=BEFORE), costs, signal)
        for i in of_kind.tolist():
            seconds[i] = later(BEFORE + int(kinds[0, i])) - first(BEFORE)
        if trims == bool(kernel.trimmed[0]):  # All cores begin alike: with nothing loaded.
            start = first(int(work.blocks[0])) - seconds[which.reshape(-1)[0]]
    each = seconds[which.reshape(-1)]
    cores = start + makespan(each, each, work.worker, work.num_workers)
    memory = profile["memory.hbm_bandwidth"] * profile["memory.hbm_efficiency"]
    longest = int(np.argmax(work.blocks))
    shown = kernel.order(bool(kernel.trimmed[longest]), min(int(work.blocks[longest]), most_blocks))
    return PrefillTimes(max(cores, kernel.bytes / memory), shown, costs, signal)


def tuned_for_prefill(profile: HardwareProfile) -> HardwareProfile:
    """Returns the profile with our own constants, but for the rate of the tensor cores."""
    own = tuned_for_hopper(profile)
    field = "engine.tensor_efficiency"
    return own.with_values({field: profile[field]}, profile.numbers[field].source)
