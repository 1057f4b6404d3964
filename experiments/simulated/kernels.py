"""Kernels by the value of a flag: a name of the simulator, or a file of one's own."""

from experiments.simulated.own_files import errors_of, load_kernel
from mla_jax.hal import HardwareProfile, Problem, Report, simulate


def simulate_named(profile: HardwareProfile, problem: Problem, name: str) -> Report:
    """Returns the report of a kernel or an order; raises ValueError where there is no such time.

    name: also a Python file, as in docs/own_schedule.md.
    """
    with errors_of(name):
        return simulate(profile, problem, load_kernel(profile, name, problem.kv_dtype))
