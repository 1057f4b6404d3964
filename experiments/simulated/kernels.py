"""Kernels by the value of a flag: a name of the simulator, our own, or a file of one's own."""

from experiments.simulated.own_files import errors_of, load_kernel
from mla_jax.hal import HardwareProfile, Problem, Report, simulate

OURS = "hopper"  # the kernel that `pallas_kernels.hopper` runs for a problem, with its plan
OUR_PREFILL = (
    "hopper-prefill"  # that of `pallas_kernels.hopper.prefill`, causal, with its work list
)


def simulate_named(
    profile: HardwareProfile, problem: Problem, name: str, capacity: int | None = None
) -> Report:
    """Returns the report of a kernel or an order; raises ValueError where there is no such time.

    name: also a Python file, as in docs/own_schedule.md.
    capacity: tokens that block tables reach, on which tiles of our own kernels depend; None: those
        of the longest request.
    """
    if name == OURS:
        # JAX plans the batch. The other kernels do without.
        from pallas_kernels.hopper.model import simulated_kernel

        return simulate(profile, problem, simulated_kernel(profile, problem, capacity=capacity))
    if name == OUR_PREFILL:
        from pallas_kernels.hopper.prefill.model import simulated_prefill

        return simulate(profile, problem, simulated_prefill(profile, problem))
    with errors_of(name):
        return simulate(profile, problem, load_kernel(profile, name, problem.kv_dtype))
