"""The decode kernels as the hardware-abstraction layer simulates them, with the plan they get.

    from pallas_kernels.hopper.model import simulated_kernel
    report = simulate(profile, problem, simulated_kernel(profile, problem))

docs/hopper_decode.md describes the kernels, and `mla_jax.hal.hopper_orders` has their schedules.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.checks import require_one_of, require_type
from mla_jax.hal import HardwareProfile, Problem
from mla_jax.hal.simulator.hopper import HopperKernel
from mla_jax.splits.decode_plan import DecodePlan
from pallas_kernels.hopper.planning import plan_decode
from pallas_kernels.hopper.simulated import kernel_of


def simulated_kernel(
    profile: HardwareProfile,
    problem: Problem,
    *,
    capacity: int | None = None,
    plan: DecodePlan | None = None,
) -> HopperKernel:
    """Returns the kernel that `attend` runs for a problem, with its plan.

    Args:
        profile: of a Hopper GPU.
        problem: over a cache of bf16, fp16 or int8.
        capacity: tokens that block tables reach; None: those of the longest request.
        plan: with tiles; None: `plan_decode` makes it.

    Raises:
        TypeError: an argument of another type, such as the name of a profile.
        ValueError: a problem that no kernel takes, such as one over an fp8 cache.
    """
    require_type("profile", profile, HardwareProfile)
    require_type("problem", problem, Problem)
    require_one_of("kv_dtype", problem.kv_dtype, ("bf16", "fp16", "int8"))
    if plan is None:
        plan = _plan(profile, problem, capacity or max(*problem.kv_lens, 1))
    return kernel_of(plan.tiles, plan.split, problem, plan.finish or "merge")


def _plan(profile: HardwareProfile, problem: Problem, capacity: int) -> DecodePlan:
    lengths = np.asarray(problem.kv_lens, np.int32)
    with jax.default_device(jax.devices("cpu")[0]):
        make = functools.partial(
            plan_decode,
            rows=problem.rows,
            capacity=capacity,
            cache="int8" if problem.kv_dtype == "int8" else "float",
            profile=profile,
        )
        return jax.device_get(make(jnp.asarray(lengths)))
