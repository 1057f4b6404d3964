"""The hardware abstraction layer (hal): describes devices, chooses tile sizes, simulates kernels.

A profile holds a device's numbers, a tile plan fits its buffers, and a schedule is an order in
which work is issued. The simulator computes the time that a schedule takes.

    profile = load_profile("H200_SXM")
    problem = Problem(kv_lens=(4096,) * 128, heads=128)
    plan = plan_tiles(profile, problem)                # fits every buffer, or raises
    report = simulate(profile, problem, "flashmla_dense")
"""

import re
from pathlib import Path

from mla_jax.hal.choice import TileChoice, TimedTiles, fastest_tiles
from mla_jax.hal.forms import FormCosts, choose_form
from mla_jax.hal.orders import ASCEND_ORDERS, GPU_ORDERS, AscendOrder, schedule_named
from mla_jax.hal.own_kernel import GpuScheduleBuilder, gpu_kernel
from mla_jax.hal.profiles.ascend import (
    ASCEND910B1,
    ASCEND910B2,
    ASCEND910B3,
    ASCEND910B4,
    ASCEND910C,
    ASCEND910C_DIE,
)
from mla_jax.hal.profiles.nvidia import (
    A100_SXM4_40GB,
    A100_SXM4_80GB,
    H20,
    H100_SXM5,
    H200_SXM,
    H800_SXM5,
    L40,
)
from mla_jax.hal.profiles.profile import HardwareProfile, Number, read_profile, save_profile
from mla_jax.hal.schedule import (
    Access,
    IllegalScheduleError,
    Schedule,
    ScheduleBuilder,
    Signal,
    Step,
)
from mla_jax.hal.simulator.ascend_costs import AscendKernel
from mla_jax.hal.simulator.gpu_costs import Kernel
from mla_jax.hal.simulator.simulate import Report, simulate
from mla_jax.hal.tiling import TilePlan, TilePlanError, plan_tiles
from mla_jax.hal.work import Problem

PROFILES: dict[str, HardwareProfile] = {
    profile.name: profile
    for profile in (
        ASCEND910B1, ASCEND910B2, ASCEND910B3, ASCEND910B4, ASCEND910C, ASCEND910C_DIE,
        A100_SXM4_40GB, A100_SXM4_80GB, L40, H100_SXM5, H800_SXM5, H20, H200_SXM,
    )
}  # fmt: skip


def load_profile(name_or_path: str | Path) -> HardwareProfile:
    """Returns a profile by its name, or reads one from a JSON file. Raises ValueError otherwise."""
    if str(name_or_path) in PROFILES:
        return PROFILES[str(name_or_path)]
    if Path(name_or_path).is_file():
        return read_profile(name_or_path, PROFILES)
    missing = ", and there is no such file" if Path(name_or_path).suffix == ".json" else ""
    raise ValueError(
        f"profile = {str(name_or_path)!r}, wanted a JSON file or one of {', '.join(PROFILES)}"
        + missing
    )


def profile_of_device(device_kind: str) -> HardwareProfile | None:
    """Returns the profile for JAX's name of an NVIDIA device ("NVIDIA H200"), or None."""
    words = set(re.split(r"[^A-Za-z0-9]+", device_kind.upper()))
    for profile in PROFILES.values():
        model, *rest = profile.name.upper().split("_")
        sizes = [part for part in rest if part.endswith("GB")]
        if profile.family == "nvidia" and model in words and set(sizes) <= words:
            return profile
    return None


__all__ = [
    "ASCEND_ORDERS", "GPU_ORDERS", "PROFILES", "Access", "AscendKernel", "AscendOrder",
    "FormCosts", "GpuScheduleBuilder", "HardwareProfile", "IllegalScheduleError", "Kernel",
    "Number", "Problem", "Report", "Schedule", "ScheduleBuilder", "Signal", "Step", "TileChoice",
    "TilePlan", "TilePlanError", "TimedTiles", "choose_form", "fastest_tiles", "gpu_kernel",
    "load_profile", "plan_tiles", "profile_of_device", "read_profile", "save_profile",
    "schedule_named", "simulate",
]  # fmt: skip
