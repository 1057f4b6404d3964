"""Refuses what a device can not run: incomplete schedules, kernels and plans that do not fit.

The checks raise IllegalScheduleError for a schedule, TilePlanError for a buffer, and ValueError
otherwise. The message names the step, the buffer or the argument.
"""

import functools
import re
from collections.abc import Callable, Iterable

import numpy as np

from mla_jax.hal.orders import ScheduleFn
from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.schedule import IllegalScheduleError, Schedule
from mla_jax.hal.simulator.ascend_costs import AscendKernel
from mla_jax.hal.simulator.gpu_costs import Kernel
from mla_jax.hal.tiling import KEY, LATENT, ROPE, BufferUse, require_fits
from mla_jax.hal.work import ITEMSIZE, Problem, Work


def checked_order(order: ScheduleFn, require_whole: Callable[[Schedule], None]) -> ScheduleFn:
    """Returns `order` with a check of each schedule: legal, of so many blocks, and whole."""

    @functools.cache
    def make(num_blocks: int) -> Schedule:
        schedule = order(num_blocks)
        if not isinstance(schedule, Schedule):
            raise TypeError(f"an order must return a Schedule, got {type(schedule).__name__}")
        if schedule.num_blocks != num_blocks:
            raise IllegalScheduleError(
                f"{schedule.name}: num_blocks = {schedule.num_blocks}, wanted {num_blocks}"
            )
        schedule.check()
        require_whole(schedule)
        return schedule

    return make


# What the steps of a stage read and write of their block, at least.
_GPU_DATA: dict[str, tuple[str, str]] = {
    "LOAD_Q": ("", "q"),
    "LOAD_L": ("", "kv_l"),
    "LOAD_R": ("", "kv_r"),
    "WIDEN": ("kv_l kv_r", "kv_l kv_r"),
    "TRANSPOSE": ("kv_l kv_r", "v_transposed"),
    "QK": ("q kv_l kv_r", "S"),
    "SM": ("S", "P"),
    "PV_L": ("P kv_l", "O_L"),
    "PV_R": ("P kv_r", "O_R"),
    "STORE_L": ("O_L", ""),
    "STORE_R": ("O_R", ""),
}
_ASCEND_DATA: dict[str, tuple[str, str]] = {
    "QK": ("", "S"),
    "QK_NOPE": ("", "S"),
    "QK_ROPE": ("", "S_rope"),
    "DEQUANT": ("S", "S"),
    "SM": ("S", "P"),
    "PV": ("P", ""),
    "UP": ("Otmp P", "O"),
    "ADD": ("P", ""),
}


# Instruction streams. A name that is not one of them would be a stream that no core has.
_GPU_UNITS = r"(load|warps|mma[0-9]?|wg[0-9]?)(@[0-9])?"
_ASCEND_UNITS = r"cube|vector"


def require_units(schedule: Schedule, pattern: str, wanted: str) -> None:
    """Raises IllegalScheduleError for a step on a unit whose name does not match."""
    for unit in schedule.units:
        if not re.fullmatch(pattern, unit):
            step = next(step for step in schedule.steps if step.unit == unit)
            raise IllegalScheduleError(
                f"{schedule.name}: {step}: {unit!r} is not a unit, wanted {wanted}"
            )


def require_warpgroups(kernel: Kernel, schedule: Schedule) -> None:
    """Raises IllegalScheduleError for units that need more warpgroups than the kernel has.

    "warps" is all of its warpgroups together, so that none of them is free beside it.
    """
    for cta in dict.fromkeys(unit.partition("@")[2] for unit in schedule.units):
        units = [u.partition("@")[0] for u in schedule.units if u.partition("@")[2] == cta]
        groups = [unit for unit in units if unit.startswith("wg")]
        if "warps" in units and groups:
            raise IllegalScheduleError(
                f"{schedule.name}: units warps and {', '.join(groups)}, wanted warps, which is all "
                "warpgroups together, or single ones"
            )
        for kind in (groups, [unit for unit in units if unit.startswith("mma")]):
            if 4 * len(kind) > kernel.warps:
                raise IllegalScheduleError(
                    f"{schedule.name}: units {', '.join(kind)} need {4 * len(kind)} warps, "
                    f"{kernel.name} has warps = {kernel.warps}"
                )


def require_data(schedule: Schedule, data: dict[str, tuple[str, str]], cta: str = "") -> None:
    """Raises IllegalScheduleError unless each step names the data that its stage works on.

    The checker finds a missing wait only between steps that say what they touch.

    cta: what the names of the stages and of the buffers end in.
    """
    for stage, wanted in data.items():
        if not schedule.blocks_of(stage + cta):
            continue
        found = schedule.touched_by(stage + cta)
        for verb, names, buffers in zip(("read", "write"), wanted, found, strict=True):
            needed = [name + cta for name in names.split()]
            for name in needed:
                if name not in buffers:
                    raise IllegalScheduleError(
                        f"{schedule.name}: a step {stage + cta} does not {verb} {name} of its "
                        f"block, wanted {', '.join(needed)}"
                    )


def require_stages(schedule: Schedule, stages: Iterable[str], first: int = 0) -> None:
    """Raises IllegalScheduleError unless each stage has a step for every block from `first` on."""
    for stage in stages:
        missing = set(range(first, schedule.num_blocks)) - schedule.blocks_of(stage)
        if missing:
            raise IllegalScheduleError(
                f"{schedule.name}: there is no step {stage}({min(missing)}), wanted one per block"
            )


def require_whole_on_gpu(kernel: Kernel, schedule: Schedule) -> None:
    """Raises IllegalScheduleError unless all blocks are loaded, multiplied and stored."""
    require_units(schedule, _GPU_UNITS, "load, warps, mma, mma0 to mma9, wg or wg0 to wg9")
    require_warpgroups(kernel, schedule)
    for buffer in ("q", "kv_l", "kv_r", "S", "P", "state"):
        if schedule.buffers.get(buffer, 0) < 1:
            raise IllegalScheduleError(f"{schedule.name}: there is no buffer {buffer}, wanted one")
    ctas = ["", *(f"@{cta}" for cta in range(1, kernel.multicast))]
    per_cta = ("QK", "SM", "PV_L", "PV_R")
    require_stages(schedule, ("LOAD_L", "LOAD_R", *(s + cta for cta in ctas for s in per_cta)))
    if kernel.transposes_apart:
        require_stages(schedule, ("TRANSPOSE",))
        require_data(schedule, {f"PV_{half}": ("v_transposed", "") for half in "LR"})
    for stage in (s + cta for cta in ctas for s in ("LOAD_Q", "STORE_L", "STORE_R")):
        if not schedule.blocks_of(stage):
            raise IllegalScheduleError(f"{schedule.name}: there is no step {stage}, wanted one")
    for cta in ctas:  # the first CTA's half of the loads serves the others, too
        shared = ("LOAD_L", "LOAD_R", "WIDEN") if cta else ()
        require_data(schedule, {s: d for s, d in _GPU_DATA.items() if s not in shared}, cta)


def require_whole_on_ascend(schedule: Schedule) -> None:
    """Raises IllegalScheduleError unless all blocks are multiplied and added to O."""
    require_units(schedule, _ASCEND_UNITS, "cube or vector")
    scores = ("QK",) if schedule.blocks_of("QK") else ("QK_NOPE", "QK_ROPE", "DEQUANT")
    require_stages(schedule, (*scores, "SM", "PV"))
    require_data(schedule, _ASCEND_DATA)
    if "Otmp" not in schedule.buffers:  # AMLA
        require_stages(schedule, ("ADD",), first=1)
        return
    added = {read.block for step in schedule.steps if step.stage == "UP" for read in step.reads
             if read.buffer == "Otmp"}  # fmt: skip
    if missing := set(range(schedule.num_blocks)) - added:
        raise IllegalScheduleError(
            f"{schedule.name}: no step UP reads Otmp of block {min(missing)}, wanted one"
        )


def gpu_uses(kernel: Kernel, slots: dict[str, int], item: int) -> list[BufferUse]:
    """Returns what one CTA holds in shared memory and in registers.

    P of a block replaces its rope keys, as in FlashMLA and FlashInfer; only the rest of P takes
    memory of its own. O and S are float32 in registers. KV is widened in place.

    slots: the buffers of the kernel's schedule.
    item: bytes of a KV value in shared memory.
    """
    m, keys = kernel.block_q, kernel.block_kv
    p, stages = slots["P"], min(slots["kv_l"], slots["kv_r"])
    own = max(p - stages, 0) * m * keys * 2
    own += min(p, stages) * keys * max(m * 2 - ROPE * item, 0)
    return [
        BufferUse("shared", "q", m * KEY * 2, slots["q"]),
        BufferUse("shared", "kv left and rope", keys * (LATENT // 2 + ROPE) * item, slots["kv_l"]),
        BufferUse("shared", "kv right", keys * (LATENT // 2) * item, slots["kv_r"]),
        BufferUse("shared", "P beside the rope keys", own),
        BufferUse("shared", "V transposed", keys * LATENT * item, slots.get("v_transposed", 0)),
        BufferUse("shared", "row max and sum", 2 * m * 4, slots["state"]),
        BufferUse("registers", "O", m * LATENT * 4),
        BufferUse("registers", "S", m * keys * 4, slots["S"]),
    ]


def require_gpu_runs(
    profile: HardwareProfile, problem: Problem, kernel: Kernel, schedule: Schedule
) -> None:
    """Raises ValueError unless the device has the kernel's instructions and room for its tile."""
    where = f"kernel {kernel.name} on {profile.name}"
    capability = profile["core.compute_capability"]
    for used, needs, lowest, below in (
        (kernel.matrix == "wgmma", "wgmma", 9.0, 10.0),
        (kernel.copy == "tma" or kernel.multicast > 1, "TMA", 9.0, 100.0),
        (True, "mma.sync and cp.async of bf16", 8.0, 100.0),
    ):
        if used and not lowest <= capability < below:
            raise ValueError(
                f"{where}: core.compute_capability = {capability:g}, wanted at least {lowest:g} "
                f"and below {below:g} for {needs}"
            )
    widens = bool(schedule.blocks_of("WIDEN"))
    narrow = kernel.multiplies != "bf16"
    wanted = ("fp8",) if widens else (kernel.multiplies,) if narrow else ("bf16", "fp16")
    if problem.kv_dtype not in wanted:
        raise ValueError(
            f"{where}: kv_dtype = {problem.kv_dtype!r}, wanted {' or '.join(wanted)}, since it "
            f"multiplies in {kernel.multiplies} and {'widens' if widens else 'does not widen'} KV"
        )
    if kernel.block_in_page and problem.page_size % kernel.block_kv:
        raise ValueError(
            f"{where}: page_size = {problem.page_size}, wanted a multiple of block_kv = "
            f"{kernel.block_kv}, since it loads each block from one page"
        )
    uses = gpu_uses(kernel, schedule.buffers, 2 if widens else ITEMSIZE[problem.kv_dtype])
    capacity = {
        "shared": profile.bytes("buffer.shared"),
        "registers": 4 * profile.bytes("buffer.registers"),
    }
    require_fits(f"{profile.name}, {kernel.name}", uses, (), capacity)


def require_work(profile: HardwareProfile, problem: Problem, kernel: Kernel, plan: Work) -> None:
    """Raises ValueError unless a plan covers the problem with cores that the device has."""
    where = f"the plan of kernel {kernel.name} on {profile.name}"
    if plan.num_workers * plan.cores_per_item > profile.cores:
        raise ValueError(
            f"{where}: {plan.num_workers} workers of {plan.cores_per_item} cores, wanted at most "
            f"{profile.cores} cores"
        )
    if not len(plan.blocks) or plan.worker.max() >= plan.num_workers:
        raise ValueError(
            f"{where}: work items for worker {plan.worker.max(initial=-1)}, wanted items for "
            f"workers 0 to {plan.num_workers - 1}"
        )
    planned = int(np.sum(plan.blocks * plan.rows)) * kernel.block_kv * plan.cores_per_item
    needed = sum(problem.kv_lens) * problem.rows
    if planned < needed:
        raise ValueError(
            f"{where}: its work items hold {planned} pairs of a row and a token, wanted at least "
            f"{needed}"
        )


def require_ascend_dtype(problem: Problem, kernel: AscendKernel) -> None:
    """Raises ValueError unless problem and kernel have one dtype of KV."""
    same = {problem.kv_dtype, kernel.kv_dtype} <= {"bf16", "fp16"}
    if problem.kv_dtype != kernel.kv_dtype and not same:
        raise ValueError(
            f"kernel {kernel.name}: kv_dtype = {problem.kv_dtype!r}, wanted {kernel.kv_dtype!r}"
        )


def require_memory(profile: HardwareProfile, problem: Problem, workspace: float = 0.0) -> None:
    """Raises TilePlanError unless q, o, the workspace and the longest request fit the memory.

    Requests may share pages, so the cache is at least as large as the longest of them.
    """
    uses = [
        BufferUse("hbm", "q and o", int(problem.query_bytes)),
        BufferUse("hbm", "KV of the longest request",
                  int(max(problem.kv_lens) * problem.token_bytes)),
        BufferUse("hbm", "workspace", int(workspace)),
    ]  # fmt: skip
    require_fits(profile.name, uses, (), {"hbm": profile.bytes("memory.hbm_bytes")})
