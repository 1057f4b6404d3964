"""Searches the best schedule and tile for a profile and a problem; compares with the default."""

import dataclasses

from experiments.framework.console import show_table, track
from experiments.framework.experiment import InputError, Outcome, Output, Row
from experiments.framework.machine_options import MachineOptions, machine_and_problem, report_row
from experiments.framework.options import flag
from experiments.simulated.our_tiles import measured_times, our_candidates, won
from mla_jax.hal import AscendOrder, HardwareProfile, Problem, Report, simulate
from mla_jax.hal.simulator.ascend_costs import AscendKernel
from mla_jax.hal.simulator.gpu_costs import KERNELS, Kernel, with_block

SUMMARY = "searches schedule and tile for a device and problem; the gain over the defaults"

# What the gain is measured from: our own kernel with the tiles of the tuned table, where it runs.
# Elsewhere it is the first of these that the device runs.
DEFAULTS = {
    "ascend": ("chunk1",),
    "nvidia": ("flashmla_dense", "flashinfer_fa3_fp8kv", "flashinfer_fa2"),
}


@dataclasses.dataclass(frozen=True)
class Options(MachineOptions):
    show: int = flag(10, "how many of the best to show", lower_bound=1)


def run(options: Options, output: Output) -> Outcome:
    profile, problem = machine_and_problem(options)
    ours, usual = our_candidates(profile, problem)
    default_name, default = (
        default_report(profile, problem)
        if usual is None
        else (usual, simulate(profile, problem, ours[usual]))
    )
    us = measured_times(profile, problem)
    rows: list[Row] = []
    refused: list[str] = []
    others = [(kernel.name, kernel) for kernel in candidates(profile, problem)]
    for name, kernel in track([*ours.items(), *others], "search"):
        try:
            report = simulate(profile, problem, kernel)
        except ValueError as error:  # the device can not run it
            refused.append(str(error))
            continue
        measured = {"gain": default.seconds / report.seconds, "measured_us": us.get(name)}
        rows.append({"name": name, "block_kv": kernel.block_kv} | report_row(report) | measured)
    rows.sort(key=lambda row: row["us"])
    if not rows:
        raise InputError(f"--profile: no kernel fits on {profile.name} with these sizes")
    columns = ("name", "block_kv", "us", "measured_us", "gain", "bound_by", "of_matrix_peak")
    show_table(f"Best of {len(rows)} on {profile.name}", rows[: options.show],
               {c: c.replace("_", " ") for c in columns})  # fmt: skip
    best = rows[0]
    beside = (
        f"{(best['gain'] - 1) * 100:.1f} % faster than {default_name} "
        f"({default.seconds * 1e6:.1f} us)"
        if best["gain"] > 1.0005
        else f"no faster than {default_name}, the default"
    )
    if ours:
        beside += f"; {won(best['name'], default_name, us)}"
    return Outcome(
        passed=True,
        summary=f"{best['name']} with {best['block_kv']} keys per block: {best['us']:.1f} us, "
        f"{beside}" + f"; {len(refused)} candidates refused" * bool(refused),
        rows=rows,
        headline={"best": best["name"], "gain": best["gain"], "default": default_name,
                  "refused": refused},
    )  # fmt: skip


def default_report(profile: HardwareProfile, problem: Problem) -> tuple[str, Report]:
    """Returns the first default that the device runs, and its report.

    Raises InputError if it runs none.
    """
    for name in DEFAULTS[profile.family]:
        try:
            return name, simulate(profile, problem, name)
        except ValueError as error:
            why = error
    raise InputError(f"--profile: none of the defaults runs on {profile.name}: {why}") from why


def candidates(profile: HardwareProfile, problem: Problem) -> list[Kernel | AscendKernel]:
    """Returns every kernel with every KV block size, also those that do not fit."""
    if profile.family == "ascend":
        return [*ascend_candidates(profile, problem)]
    kernels = [make(profile) for make in KERNELS.values()]
    sizes = (16, 32, 64, 128)
    return [
        *kernels,
        *(with_block(k, keys) for k in kernels for keys in sizes if keys != k.block_kv),
    ]


def ascend_candidates(profile: HardwareProfile, problem: Problem) -> list[AscendKernel]:
    """Returns the kernels of all combinations of chunk, preload, update, rescale and signals."""
    orders = [
        AscendOrder(f"chunk{chunk}-preload{preload}-{update}-{signals}", chunk, preload,
                    signals=signals, update=update)
        for chunk in (1, 2, 4, 8)
        for preload in (0, 1)
        for update in ("block", "chunk")
        for signals in ((1, 2) if problem.kv_dtype == "int8" else (1,))
    ]  # fmt: skip
    if problem.kv_dtype != "int8":
        orders += [
            AscendOrder(f"amla-preload{p}", preload=p, rescale="exponent_add") for p in (0, 1, 2)
        ]
    tokens = 2 if problem.s_q > 1 else 1
    return [
        AscendKernel(order.name, order, problem.kv_dtype, block_kv=keys, q_tokens=tokens)
        for order in orders
        for keys in (128, 256, 512)
    ]
