"""Simulates one attention call on a whole device.

The call is divided into work items. Each is timed on one core, and then all run together. The
report has the total time, what bounds it, when the matrix unit idles, and the timeline of the
longest item, which the Gantt chart draws.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from mla_jax.hal.orders import ASCEND_ORDERS, AscendOrder
from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.simulator import limits
from mla_jax.hal.simulator import many_cores as machine
from mla_jax.hal.simulator.ascend_call import call_on_ascend
from mla_jax.hal.simulator.ascend_costs import ASCEND_KERNELS, AscendKernel
from mla_jax.hal.simulator.gpu_costs import (
    KERNEL_OF_ORDER,
    KERNELS,
    Kernel,
    gpu_costs,
    merge_seconds,
)
from mla_jax.hal.simulator.hopper import HopperKernel, tuned_for_hopper
from mla_jax.hal.simulator.hopper_prefill import (
    HopperPrefill,
    prefill_times,
    tuned_for_prefill,
)
from mla_jax.hal.simulator.hopper_times import hopper_times
from mla_jax.hal.simulator.loaded_times import LoadedTimes, fair_share
from mla_jax.hal.simulator.one_core import Timeline
from mla_jax.hal.tiling import KEY, LATENT, ROPE, BufferUse, require_call, require_fits
from mla_jax.hal.work import ITEMSIZE, Problem, Work

ENGINE_KIND = {
    "tensor": "matrix", "cube": "matrix", "mte1": "matrix",
    "cuda": "vector", "sfu": "vector", "vector": "vector",
    "copy": "memory", "shared": "memory", "mte2": "memory", "mte2v": "memory", "mte3": "memory",
    "fixpipe": "memory",
}  # fmt: skip
SHOWN_BLOCKS = 64  # blocks of the timeline, which is long enough to show the steady state


@dataclass(frozen=True)
class Report:
    """The cost of a call in seconds; shares are of the time of the work item in `timeline`.

    timeline: the longest work item, or one of its first SHOWN_BLOCKS KV blocks if it has more.
    items: number of work items of the call.
    item_blocks: KV blocks of the longest work item.
    bound_by: "matrix", "vector", "memory" or "sync". `engine` is the busiest engine.
    bubbles: the share in which the matrix unit idles: before its first step ("head"), between steps
        ("steady"), after its last step ("tail"), and in steps that another engine holds longer ("in
        steps"). With `matrix_busy` they add up to 1.
    utilisation: share of the device's matrix peak for the dtypes that are multiplied, over the
        whole call.
    """

    name: str
    seconds: float
    launch: float
    cores: float
    merge: float
    flops: float
    bytes: float
    utilisation: float
    bound_by: str
    engine: str
    engine_share: dict[str, float]
    bubbles: dict[str, float]
    timeline: Timeline
    items: int
    item_blocks: int

    @property
    def matrix_busy(self) -> float:
        """The share of the longest work item in which the matrix unit computes."""
        return self.engine_share[matrix_engine(self.engine_share)]

    @property
    def tflops(self) -> float:
        """Operations per second, in 10^12."""
        return self.flops / self.seconds / 1e12

    @property
    def gb_per_s(self) -> float:
        """Bytes of memory traffic per second, in 10^9."""
        return self.bytes / self.seconds / 1e9


def simulate(
    profile: HardwareProfile,
    problem: Problem,
    kernel: str | Kernel | AscendKernel | AscendOrder | HopperKernel | HopperPrefill,
) -> Report:
    """Simulates one call.

    kernel: a kernel, its name, the name of an order, or an Ascend order. `HopperKernel` is one of
        our own kernels with the plan that it gets (`pallas_kernels.hopper.model`), and
        `HopperPrefill` our prefill kernel (`pallas_kernels.hopper.prefill.model`).

    Raises IllegalScheduleError for an illegal or incomplete schedule, TilePlanError for a tile that
    does not fit, and ValueError for what the device or the kernel can not run. TypeError is raised
    for an argument of another type.
    """
    require_call(profile, problem)
    if isinstance(kernel, str):
        kernel = named_kernel(profile, kernel, problem.kv_dtype)
    if isinstance(kernel, AscendOrder):
        kernel = AscendKernel(kernel.name, kernel, problem.kv_dtype)
    if not isinstance(kernel, Kernel | AscendKernel | HopperKernel | HopperPrefill):
        makes = "; call a function from a profile, as of gpu_kernel, first" * callable(kernel)
        raise TypeError(
            "kernel must be a name, a Kernel, a HopperKernel, a HopperPrefill, an AscendKernel or "
            f"an AscendOrder, got {kernel!r:.60}{makes}"
        )
    if isinstance(kernel, Kernel | HopperKernel | HopperPrefill):
        if profile.family != "nvidia":
            raise ValueError(f"kernel {kernel.name} does not run on family {profile.family!r}")
        if isinstance(kernel, HopperKernel):
            return _simulate_hopper(profile, problem, kernel)
        if isinstance(kernel, HopperPrefill):
            return _simulate_prefill(profile, problem, kernel)
        return _simulate_gpu(profile, problem, kernel)
    if profile.family != "ascend":
        raise ValueError(f"kernel {kernel.name} does not run on family {profile.family!r}")
    return _simulate_ascend(profile, problem, kernel)


def named_kernel(
    profile: HardwareProfile, name: str, kv_dtype: str = "bf16"
) -> Kernel | AscendKernel:
    """Returns a kernel by its name or its order's. Raises ValueError, which lists the names."""
    if profile.family == "nvidia":
        name = KERNEL_OF_ORDER.get(name, name)
        if name in KERNELS:
            return KERNELS[name](profile)
        raise _unknown(profile, name, [*KERNELS, *KERNEL_OF_ORDER])
    if name not in ASCEND_KERNELS and f"{kv_dtype}-{name}" in ASCEND_KERNELS:
        name = f"{kv_dtype}-{name}"
    if name in ASCEND_KERNELS:
        return ASCEND_KERNELS[name]
    raise _unknown(profile, name, [*ASCEND_KERNELS, *ASCEND_ORDERS])


def _unknown(profile: HardwareProfile, name: str, known: list[str]) -> ValueError:
    return ValueError(f"kernel = {name!r}, wanted one of {', '.join(known)} on {profile.name}")


def _simulate_gpu(profile: HardwareProfile, problem: Problem, kernel: Kernel) -> Report:
    orders = tuple(
        limits.checked_order(order, partial(limits.require_whole_on_gpu, kernel))
        for order in kernel.orders
    )
    first = orders[0](1)
    limits.require_gpu_runs(profile, problem, kernel, first)
    limits.require_memory(profile, problem)
    plan = kernel.plan(problem)
    limits.require_work(profile, problem, kernel, plan)
    if plan.sharers < kernel.multicast:
        raise ValueError(
            f"kernel {kernel.name} needs {kernel.multicast} row tiles of a request, "
            f"{problem.rows} rows make {plan.sharers}"
        )
    block_bytes = kernel.block_kv * KEY * ITEMSIZE[problem.kv_dtype] / kernel.multicast
    share = fair_share(profile, plan, first.buffers["kv_l"] * block_bytes, kernel.multicast)
    signal = profile["latency.barrier"]
    kinds, which = np.unique(
        np.stack([plan.blocks, plan.rows, plan.split.astype(int)]), axis=1, return_inverse=True
    )
    times: dict[tuple[int, int], LoadedTimes] = {}
    seconds = np.zeros((2, kinds.shape[1]))
    for i, (blocks, rows, split) in enumerate(kinds.T.tolist()):
        if (rows, split) not in times:
            costs_at = partial(gpu_costs, profile, kernel, rows, bool(split), problem.kv_dtype)
            times[rows, split] = LoadedTimes(orders, costs_at, share, block_bytes, signal)
        found = times[rows, split]
        seconds[:, i] = found(blocks)[0], found.alone(blocks)
    crowded, alone = seconds[:, which.reshape(-1)]
    cores = machine.makespan(crowded, alone, plan.worker, plan.num_workers)
    merge = merge_seconds(profile, kernel, problem, plan)

    longest = int(np.argmax(plan.blocks))
    shown = times[int(plan.rows[longest]), int(plan.split[longest])]
    timeline = shown.timeline(min(int(plan.blocks[longest]), SHOWN_BLOCKS))
    return _report(profile, problem, kernel.name, timeline, plan, cores, merge)


def _simulate_hopper(profile: HardwareProfile, problem: Problem, kernel: HopperKernel) -> Report:
    limits.require_memory(profile, problem)
    _require_hopper(profile, kernel.name)
    profile = tuned_for_hopper(profile)
    times = hopper_times(profile, problem, kernel)
    cores, merge, timeline = times.cores, times.merge, times.timeline(SHOWN_BLOCKS)
    return _report(profile, problem, kernel.name, timeline, kernel.work, cores, merge)


def _simulate_prefill(profile: HardwareProfile, problem: Problem, kernel: HopperPrefill) -> Report:
    _require_hopper(profile, kernel.name)
    uses = [BufferUse("hbm", "q, K, V and o", int(kernel.bytes))]
    require_fits(profile.name, uses, (), {"hbm": profile.bytes("memory.hbm_bytes")})
    profile = tuned_for_prefill(profile)
    times = prefill_times(profile, problem, kernel, SHOWN_BLOCKS)
    report = _report(profile, problem, kernel.name, times.timeline, kernel.work, times.cores, 0.0)
    return _expanded(report, kernel.flops, kernel.bytes, profile.peak("bf16"))


def _expanded(report: Report, flops: float, bytes_: float, peak: float) -> Report:
    """Returns the report with the operations and bytes of the expanded form of attention."""
    share = flops / peak / report.seconds
    return dataclasses.replace(report, flops=flops, bytes=bytes_, utilisation=share)


def _require_hopper(profile: HardwareProfile, name: str) -> None:
    capability = profile["core.compute_capability"]
    if not 9.0 <= capability < 10.0:
        raise ValueError(
            f"kernel {name} on {profile.name}: core.compute_capability = {capability:g}, "
            "wanted at least 9 and below 10 for wgmma"
        )


def _simulate_ascend(profile: HardwareProfile, problem: Problem, kernel: AscendKernel) -> Report:
    call = call_on_ascend(profile, problem, kernel)
    timeline = call.timeline(min(int(call.work.blocks.max()), SHOWN_BLOCKS))
    report = _report(profile, problem, kernel.name, timeline, call.work, call.cores, call.merge)
    if not kernel.expanded:
        return report
    return _expanded(report, call.flops, call.bytes, profile.peak(kernel.kv_dtype))


def _report(
    profile: HardwareProfile,
    problem: Problem,
    name: str,
    timeline: Timeline,
    plan: Work,
    cores: float,
    merge: float,
) -> Report:
    launch = profile["latency.launch"]
    total = launch + cores + merge
    busy = sorted(timeline.engine_busy().items())
    share = {engine: s / timeline.total for engine, s in busy if "@" not in engine}
    bound_by, engine = verdict(share, cores / total)
    return Report(
        name=name,
        seconds=total,
        launch=launch,
        cores=cores,
        merge=merge,
        flops=problem.flops,
        bytes=problem.bytes,
        utilisation=_seconds_at_peak(profile, problem) / total,
        bound_by=bound_by,
        engine=engine,
        engine_share=share,
        bubbles=matrix_bubbles(timeline),
        timeline=timeline,
        items=len(plan.blocks),
        item_blocks=int(plan.blocks.max()),
    )


def _seconds_at_peak(profile: HardwareProfile, problem: Problem) -> float:
    """Returns the seconds of the call's products at the peaks of their dtypes.

    An Ascend core multiplies an int8 cache in int8, except for the 64 rope values. GPU kernels
    multiply in bf16, also with an fp8 cache. Our own over an int8 cache multiply K twice, at twice
    the rate, which takes as long.
    """
    if profile.family == "nvidia" or problem.kv_dtype != "int8":
        return problem.flops / profile.peak("bf16")
    rope = problem.flops * ROPE / (KEY + LATENT)
    return rope / profile.peak("bf16") + (problem.flops - rope) / profile.peak("int8")


def verdict(share: dict[str, float], running: float) -> tuple[str, str]:
    """Returns (what bounds the call, the busiest engine).

    It is "sync" if the busiest engine works for less than half of the call, so that waiting,
    launching and merging take the rest.
    """
    engine = max(share, key=lambda e: share[e])
    return ("sync" if share[engine] * running < 0.5 else ENGINE_KIND[engine]), engine


def matrix_engine(engines: Iterable[str]) -> str:
    """Returns the name of the matrix unit among a core's engines."""
    return next(engine for engine in engines if engine in ("cube", "tensor"))


def matrix_bubbles(timeline: Timeline) -> dict[str, float]:
    """Returns the idle shares of the (first CTA's) matrix unit: head, steady, tail, in steps."""
    spans = sorted(
        (start, end)
        for step, start, end in zip(
            timeline.schedule.steps, timeline.start, timeline.end, strict=True
        )
        if step.stage.startswith(("QK", "PV")) and "@" not in step.stage
    )
    taken = reach = 0.0
    for start, end in spans:
        taken += max(end - max(start, reach), 0.0)
        reach = max(reach, end)
    total, first = timeline.total, spans[0][0]
    busy = timeline.engine_busy()
    return {
        "head": first / total,
        "steady": max(reach - first - taken, 0.0) / total,
        "tail": (total - reach) / total,
        "in steps": max(taken - busy[matrix_engine(busy)], 0.0) / total,
    }
