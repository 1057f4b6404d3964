"""Kernels by name, with our own Hopper kernels among them."""

from mla_jax.hal import HardwareProfile, Problem, Report, simulate

OURS = "hopper"  # the kernel that `pallas_kernels.hopper` runs for a problem, with its plan


def simulate_named(
    profile: HardwareProfile, problem: Problem, name: str, capacity: int | None = None
) -> Report:
    """Returns the report of a kernel or an order; raises ValueError where there is no such time.

    capacity: tokens that block tables reach, on which tiles of our own kernels depend; None: those
        of the longest request.
    """
    if name not in (OURS, "hopper_int8"):
        return simulate(profile, problem, name)
    # JAX plans the batch. The other kernels do without.
    from pallas_kernels.hopper.model import simulated_kernel

    if name == "hopper_int8":
        raise ValueError("kernel = 'hopper_int8': there is no model of it yet")
    return simulate(profile, problem, simulated_kernel(profile, problem, capacity=capacity))
