"""The kernels of the published tables, each with its orders, its plan and the costs of its stages.

Nothing here is fitted. A kernel describes its instructions, its traffic through shared memory, its
barriers per block and its merge. The profile says how fast the device does each of them.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mla_jax.hal import orders, work
from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.schedule import Schedule, Step
from mla_jax.hal.simulator.one_core import Costs, StageCost
from mla_jax.hal.tiling import KEY, LATENT, ROPE
from mla_jax.hal.work import ITEMSIZE, Problem, Work

SOFTMAX_OPS = 8  # scale, mask, maximum, subtract, exponent's multiply, sum, convert, store
PERMUTED_VALUES = 4  # 8-bit values of a word, which one instruction permutes
COMBINING_CTAS = 16  # of 128 threads, per SM


@dataclass(frozen=True)
class Kernel:
    """A decode kernel.

    orders: its schedule, or the schedules that its warpgroups may follow, of which the fastest
        counts.
    plan: function that divides the work.
    matrix: "wgmma", where the tensor core reads operands from shared memory, or "mma_sync", where
        each warp loads its operands to registers first.
    copy: "tma", "cp_async", which the computing warps issue, or "gather", which looks up one
        address per row first.
    block_q, block_kv: its tile.
    warps: number of warps that compute.
    qk: "whole", "sharded" or "duplicated", as in `TilePlan`.
    barriers: block-wide barriers per KV block.
    merge: how partials are merged. "none" is not at all. "merge_first" and "merge" are FlashInfer's
        first and later version, in the same launch after a grid sync. "combine" and "stage2" are
        second kernels, of FlashMLA and of SGLang's Triton decode. "combine_rows" is that of
        FlashMLA's first version, with a CTA per row.
    partial_bytes: bytes per value of a partial output.
    value_loads: 2 if the values are loaded again after softmax.
    multicast: CTAs of a cluster that share the loading of every KV block.
    block_in_page: whether each block lies in one page, so that the page size is a multiple of
        block_kv.
    multiplies: the dtype of the operands in shared memory, "bf16", or "fp8" or "int8" for a kernel
        that multiplies an 8-bit cache as it is, at the rate `engine.tensor_int8`.
    transposes_apart: whether the stage TRANSPOSE transposes V of 8 bits. If not, PV does.
    """

    name: str
    orders: tuple[Callable[[int], Schedule], ...]
    plan: Callable[..., Work]
    matrix: str
    copy: str
    block_q: int
    block_kv: int
    warps: int
    qk: str = "whole"
    barriers: int = 1
    merge: str = "none"
    partial_bytes: int = 4
    value_loads: int = 1
    multicast: int = 1
    block_in_page: bool = False
    multiplies: str = "bf16"
    transposes_apart: bool = False

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{self.name}: {field} = {getattr(self, field)!r}, wanted one of "
                    f"{', '.join(map(str, allowed))}"
                )
        if self.transposes_apart and self.multiplies == "bf16":
            raise ValueError(
                f"{self.name}: transposes_apart = True, wanted False for operands of bf16"
            )
        for field, lowest, step in (("block_q", 16, 16), ("block_kv", 16, 16), ("warps", 1, 1),
                                    ("barriers", 0, 1), ("multicast", 1, 1)):  # fmt: skip
            value = getattr(self, field)
            if not isinstance(value, int) or value < lowest or value % step:
                steps = f", a multiple of {step}" * (step > 1)
                raise ValueError(
                    f"{self.name}: {field} = {value!r}, wanted a whole number from {lowest}{steps}"
                )


_CHOICES = {
    "matrix": ("wgmma", "mma_sync"),
    "copy": ("tma", "cp_async", "gather"),
    "qk": ("whole", "sharded", "duplicated"),
    "merge": ("none", "merge_first", "merge", "combine", "combine_rows", "stage2"),
    "multiplies": ("bf16", "fp8", "int8"),
    "partial_bytes": (1, 2, 4),
    "value_loads": (1, 2),
    "block_in_page": (False, True),
    "transposes_apart": (False, True),
}


def gpu_costs(
    profile: HardwareProfile, kernel: Kernel, rows: int, split: bool, kv: str, share: float
) -> Costs:
    """Returns the cost function of stages, for a tile with `rows` real rows.

    share: bytes per second of the device's memory for this core while all cores are working.
    """
    cycle = profile.cycle
    m, keys, item = kernel.block_q, kernel.block_kv, ITEMSIZE[kv]
    path = 1.0 if kernel.matrix == "wgmma" else profile["engine.mma_sync_share"]
    narrow = kernel.multiplies != "bf16"
    rate = profile["engine.tensor_int8" if narrow else "engine.tensor_bf16"]
    flop = cycle / (rate * profile["engine.tensor_efficiency"] * path)
    value = 1 if narrow else 2  # bytes of an operand's value in shared memory
    shared = cycle / (profile["engine.shared_pipe"] * profile["engine.shared_efficiency"])
    cuda = cycle / (profile["engine.cuda"] * profile["engine.cuda_efficiency"])
    sfu = cycle / profile["engine.sfu"]
    copy = 1.0 / min(profile["engine.copy"], share)
    store = 1.0 / min(profile["engine.store"], share)
    barrier, memory = profile["latency.barrier"], profile["latency.memory"]
    gather = kernel.copy == "gather"

    def operands(qk: bool) -> float:
        """Returns the bytes that QK, or half of PV, reads through the shared-memory pipe."""
        if kernel.matrix == "wgmma":
            return value * ((m + keys) * KEY if qk else keys * (m + LATENT // 2))
        row_warps = m // 16
        column_warps = kernel.warps // row_warps
        if not qk:
            return value * (16 * keys * kernel.warps / 2 + row_warps * keys * (LATENT // 2))
        split_keys = column_warps if kernel.qk == "sharded" else 1
        return value * kernel.warps * (16 + keys / split_keys) * KEY

    def load(columns: int) -> StageCost:
        bytes_ = keys * columns * item
        return StageCost({"copy": bytes_ * copy}, latency=memory * (2 if gather else 1))

    def stage(name: str) -> StageCost:
        match name:
            case "LOAD_Q":
                return StageCost({"copy": rows * KEY * 2 * copy}, latency=memory)
            case "LOAD_L":
                return load(LATENT // 2 + ROPE)
            case "LOAD_R":
                return load(LATENT // 2)
            case "ISSUE":
                return StageCost({"shared": keys * KEY * item * shared})
            case "QK":
                products = 2.0 * m * keys * KEY * (2 if kernel.qk == "duplicated" else 1)
                return StageCost({"tensor": products * flop, "shared": operands(True) * shared})
            case "SM":
                elements = m * keys * (2 if kernel.qk == "duplicated" else 1)
                return StageCost(
                    {"cuda": (elements * SOFTMAX_OPS + m * LATENT) * cuda, "sfu": elements * sfu},
                    hold=kernel.barriers * barrier + (kernel.value_loads - 1) * memory,
                )
            case "PV_L" | "PV_R":
                products = 2.0 * m * keys * LATENT / 2
                busy = {"tensor": products * flop, "shared": operands(False) * shared}
                # wgmma takes 8-bit values only if the keys of a column lie side by side. So each
                # value is read, permuted with its neighbours and written before the product.
                values = keys * LATENT / 2 if narrow and not kernel.transposes_apart else 0.0
                transposed = values * (2 * shared + cuda / PERMUTED_VALUES)
                return StageCost(busy, hold=transposed)
            case "TRANSPOSE":
                values = keys * LATENT
                permuted = values / PERMUTED_VALUES * cuda
                return StageCost({"shared": 2 * values * shared, "cuda": permuted})
            case "WIDEN":
                return StageCost({"cuda": keys * KEY * cycle / profile["engine.widen"]})
            case "STORE_L" | "STORE_R":
                item_out = kernel.partial_bytes if split else 2
                return StageCost({"copy": rows * LATENT / 2 * item_out * store}, hold=barrier)
        raise ValueError(f"{kernel.name}: no cost for stage {name}")

    def of_cta(step: Step) -> StageCost:
        """Returns the cost of a step; the second CTA of a cluster has engines of its own."""
        name, _, cta = step.stage.partition("@")
        cost = stage(name)
        cta = cta or step.unit.partition("@")[2]
        if not cta:
            return cost
        busy = {f"{engine}@{cta}": seconds for engine, seconds in cost.busy.items()}
        return dataclasses.replace(cost, busy=busy)

    return of_cta


def merge_seconds(profile: HardwareProfile, kernel: Kernel, problem: Problem, plan: Work) -> float:
    """Returns the seconds from the end of the last work item to the last merged row."""
    parts = int(plan.parts.max())
    memory = profile["memory.l2_bandwidth"]
    rows_split = float(plan.rows[plan.split].sum()) * plan.cores_per_item
    traffic = rows_split * LATENT * kernel.partial_bytes / memory
    load = profile["latency.l2"]
    if kernel.merge == "none":
        return 0.0
    if kernel.merge == "merge_first":
        # One cluster per tile merges two rows at a time.
        if parts == 1:
            return profile["latency.grid_sync"]
        rows = int(plan.rows.max())
        loads = math.ceil(rows / 2) * parts
        return profile["latency.grid_sync"] + max(loads * load, traffic)
    if kernel.merge == "merge":
        if parts == 1:
            return profile["latency.grid_sync"]
        chunks = max(max(problem.kv_lens) * plan.cores_per_item // plan.limit, 1)
        rows = math.ceil(int(plan.rows.max()) * plan.cores_per_item / chunks)
        loads = math.ceil(rows / 4) * parts
        return profile["latency.grid_sync"] + max(loads * load, traffic)
    if kernel.merge == "combine_rows":
        # Each CTA reads the number of its row's partials, then their maxima, then one by one.
        waves = math.ceil(problem.batch * problem.rows / (COMBINING_CTAS * profile.cores))
        loads = 2 + parts if parts > 1 else 1
        return profile["latency.memory"] + max(waves * loads * load, traffic)
    # A second kernel merges with one warp per row. FlashMLA's is already launched and waits on the
    # device (programmatic dependent launch), Triton's is launched in full.
    warps = problem.batch * problem.rows
    waves = math.ceil(warps / (64 * profile.cores))
    loads = parts if parts > 1 or kernel.merge == "stage2" else 0
    start = profile["latency.memory" if kernel.merge == "combine" else "latency.second_launch"]
    return start + max(waves * loads * load, traffic)


def _flashmla(profile: HardwareProfile) -> Kernel:
    plan = partial(work.walk_parts, tile_rows=64, block_kv=64, workers=profile.cores)
    both = (orders.seesaw, partial(orders.seesaw, ahead=1, name="seesaw-1-ahead"))
    return Kernel("flashmla_dense", both, plan, "wgmma", "tma", 64, 64, 8,
                  barriers=2, merge="combine", block_in_page=True)  # fmt: skip


def _flashinfer_tile(profile: HardwareProfile) -> tuple[int, int]:
    """Returns (block_kv, stages) of FlashInfer's FA2 template for the size of shared memory."""
    shared = profile.bytes("buffer.shared")
    return (64, 2) if shared >= 221696 else (32, 2) if shared >= 147968 else (16, 1)


def _fa2(profile: HardwareProfile, name: str, qk: str, plan: str) -> Kernel:
    keys, stages = _flashinfer_tile(profile)
    qk = "duplicated" if keys == 16 else qk
    plans: dict[str, Callable[[Problem], Work]] = {
        "whole": partial(work.whole_tiles, tile_rows=64, block_kv=keys, workers=profile.cores),
        "first": partial(work.heap_parts, tile_rows=64, block_kv=keys, workers=profile.cores,
                         steps_of=512),
        "later": partial(work.heap_parts, tile_rows=64, block_kv=keys, workers=profile.cores,
                         steps_of=256),
    }  # fmt: skip
    merge = {"whole": "none", "first": "merge_first", "later": "merge"}[plan]
    return Kernel(name, (partial(orders.fa2, stages=stages),), plans[plan], "mma_sync", "cp_async",
                  64, keys, 8, qk=qk, barriers=4 if qk == "sharded" else 2, merge=merge,
                  partial_bytes=2 if plan == "later" else 4)  # fmt: skip


def _fa3_first(profile: HardwareProfile) -> Kernel:
    plan = partial(work.heap_parts, tile_rows=64, block_kv=32, workers=profile.cores, steps_of=512)
    return Kernel("fa3_warp_specialized", (orders.fa3,), plan, "wgmma", "cp_async", 64, 32, 8,
                  barriers=3, merge="merge_first")  # fmt: skip


def _fa3(profile: HardwareProfile, name: str, widen: bool) -> Kernel:
    plan = partial(work.heap_parts, tile_rows=64, block_kv=64, workers=profile.cores, steps_of=256)
    order = partial(orders.fa3_two, widen=widen)
    return Kernel(name, (order,), plan, "wgmma", "cp_async", 64, 64, 8,
                  barriers=5 if widen else 2, merge="merge", partial_bytes=2)  # fmt: skip


def _triton(profile: HardwareProfile) -> Kernel:
    plan = partial(work.fixed_splits, tile_rows=16, block_kv=32, workers=profile.cores, splits=16)
    return Kernel("sglang_triton", (orders.split_loop,), plan, "mma_sync", "gather", 16, 32, 4,
                  qk="sharded", barriers=3, merge="stage2", value_loads=2)  # fmt: skip


def _cluster(profile: HardwareProfile) -> Kernel:
    """Returns FlashMLA's order with two row tiles per cluster, which multicasts KV blocks."""
    order = orders.seesaw_cluster
    both = (order, partial(order, ahead=1, name="seesaw-cluster2-1-ahead"))
    return dataclasses.replace(_flashmla(profile), name="seesaw_cluster2", orders=both, multicast=2)


def _four(profile: HardwareProfile) -> Kernel:
    """Returns a hypothetical kernel: load, QK and the two halves of PV each have a warpgroup."""
    return dataclasses.replace(
        _flashmla(profile), name="four_warpgroups", orders=(orders.four_warpgroups,), warps=12
    )


def _fa3_duplicated(profile: HardwareProfile) -> Kernel:
    """Returns the first FA3 template with QK in both consumers, which need not exchange P."""
    return dataclasses.replace(
        _fa3_first(profile), name="fa3_qk_duplicated", qk="duplicated", barriers=1
    )


KERNELS: dict[str, Callable[[HardwareProfile], Kernel]] = {
    "flashmla_dense": _flashmla,
    "flashinfer_fa2": lambda p: _fa2(p, "flashinfer_fa2", "sharded", "later"),
    "flashinfer_fa3": lambda p: _fa3(p, "flashinfer_fa3", False),
    "flashinfer_fa3_fp8kv": lambda p: _fa3(p, "flashinfer_fa3_fp8kv", True),
    "sglang_triton": _triton,
    "fa2_qk_shard_allgather_p": lambda p: _fa2(p, "fa2_qk_shard_allgather_p", "sharded", "whole"),
    "fa2_qk_duplicated": lambda p: _fa2(p, "fa2_qk_duplicated", "duplicated", "whole"),
    "fa2_no_split_k": lambda p: _fa2(p, "fa2_no_split_k", "sharded", "whole"),
    "fa2_split_k": lambda p: _fa2(p, "fa2_split_k", "sharded", "first"),
    "fa3_warp_specialized": _fa3_first,
    "fa3_qk_duplicated": _fa3_duplicated,
    "four_warpgroups": _four,
    "seesaw_cluster2": _cluster,
}
KERNEL_OF_ORDER = {
    "fa2": "flashinfer_fa2",
    "fa3": "fa3_warp_specialized",
    "fa3-2wg": "flashinfer_fa3",
    "four-wg": "four_warpgroups",
    "seesaw": "flashmla_dense",
    "seesaw-1-ahead": "flashmla_dense",
    "seesaw-cluster2": "seesaw_cluster2",
    "fp8-widen": "flashinfer_fa3_fp8kv",
    "triton-split": "sglang_triton",
}


def with_block(kernel: Kernel, block_kv: int) -> Kernel:
    """Returns the kernel with another KV block size and a plan for it."""
    return dataclasses.replace(
        kernel, block_kv=block_kv, plan=partial(kernel.plan, block_kv=block_kv)
    )
