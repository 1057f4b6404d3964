"""Finds what the time depends on: varies bandwidth, synchronization, chunk and tile one by one."""

import dataclasses
from collections.abc import Callable

from experiments.framework import plotting
from experiments.framework.console import show_table
from experiments.framework.experiment import InputError, Outcome, Output, Row, reading
from experiments.framework.machine_options import MachineOptions, machine_and_problem
from experiments.framework.options import flag
from experiments.simulated.own_files import errors_of, load_kernel, name_of
from mla_jax.hal import HardwareProfile, Problem, simulate
from mla_jax.hal.simulator.ascend_costs import AscendKernel
from mla_jax.hal.simulator.gpu_costs import Kernel, with_block

SUMMARY = "time against memory bandwidth, synchronisation cost, chunk and KV tile"

FACTORS = (0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)
Machine = tuple[HardwareProfile, Kernel | AscendKernel]


@dataclasses.dataclass(frozen=True)
class Options(MachineOptions):
    schedule: str = flag("seesaw", "an order, a kernel, or FILE.py with one")


def run(options: Options, output: Output) -> Outcome:
    profile, problem = machine_and_problem(options)
    with reading("schedule"), errors_of(options.schedule):
        kernel = load_kernel(profile, options.schedule, options.dtype)
        start = simulate(profile, problem, kernel).seconds
    name = name_of(options.schedule, kernel.name)
    rows: list[Row] = []
    for knob, values in knobs(profile, problem, kernel).items():
        for value, make in values:
            try:
                report = simulate(*_apply(make, problem))
            except ValueError as error:  # the value or the tile is refused
                rows.append({"knob": knob, "value": value, "us": None, "refused": str(error)})
                continue
            rows.append(
                {
                    "knob": knob,
                    "default": profile[knob] if knob in profile.numbers else 1,
                    "value": value,
                    "us": report.seconds * 1e6,
                    "of_default": report.seconds / start,
                    "bound_by": report.bound_by,
                }
            )
    show_table(
        f"{name} on {profile.name}",
        rows,
        {c: c.replace("_", " ") for c in ("knob", "value", "us", "of_default", "bound_by")},
    )
    spread = spreads(rows)
    if not spread:
        raise InputError("--schedule: none of the values fits on this profile")
    _draw(output, f"{name} on {profile.name}: sensitivity of the time", rows)
    most = max(spread, key=lambda knob: spread[knob])
    return Outcome(True, f"most sensitive to {most}: {spread[most]:.2f} times from best to worst",
                   rows, {"spread": spread, "default_us": start * 1e6})  # fmt: skip


def _apply(make: Callable[[], Machine], problem: Problem) -> tuple:
    profile, kernel = make()
    return profile, problem, kernel


def knobs(
    profile: HardwareProfile, problem: Problem, kernel: Kernel | AscendKernel
) -> dict[str, list[tuple[float, Callable[[], Machine]]]]:
    """Returns, by knob, pairs of a value and a function that makes the machine with it."""
    sync = "latency.cross_core" if profile.family == "ascend" else "latency.barrier"

    def scaled(field: str, factor: float) -> Callable[[], Machine]:
        values = {field: profile[field] * factor}
        if field == "memory.hbm_bandwidth":  # L2 is never slower than the memory behind it
            values["memory.l2_bandwidth"] = max(profile["memory.l2_bandwidth"], values[field])
        return lambda: (profile.with_values(values), kernel)

    found: dict[str, list[tuple[float, Callable[[], Machine]]]] = {
        field: [(profile[field] * f, scaled(field, f)) for f in FACTORS]
        for field in ("memory.hbm_bandwidth", sync)
    }
    if isinstance(kernel, AscendKernel):

        def with_chunk(chunk: int) -> Callable[[], Machine]:
            order = dataclasses.replace(kernel.order, chunk=chunk)
            return lambda: (profile, dataclasses.replace(kernel, order=order))

        def with_keys(keys: int) -> Callable[[], Machine]:
            return lambda: (profile, dataclasses.replace(kernel, block_kv=keys))

        found["chunk"] = [(c, with_chunk(c)) for c in (1, 2, 4, 8)]
        found["KV tile"] = [(k, with_keys(k)) for k in (128, 256, 512, 1024)]
        return found

    def with_tile(keys: int) -> Callable[[], Machine]:
        return lambda: (profile, with_block(kernel, keys))

    found["KV tile"] = [(k, with_tile(k)) for k in (16, 32, 64, 128)]
    return found


def spreads(rows: list[Row]) -> dict[str, float]:
    """Returns the worst time over the best time per knob."""

    times: dict[str, list[float]] = {}
    for row in rows:
        if row["us"] is not None:
            times.setdefault(row["knob"], []).append(row["us"])
    return {knob: max(found) / min(found) for knob, found in times.items()}


def _draw(output: Output, title: str, rows: list[Row]) -> None:
    names = list(dict.fromkeys(row["knob"] for row in rows))
    size = (4 * max(1, len(names)), 4)
    with plotting.figure(output.path("sweep.png"), title, columns=len(names), size=size) as axes:
        for i, (ax, knob) in enumerate(zip(plotting.several(axes), names, strict=False)):
            mine = [row for row in rows if row["knob"] == knob and row["us"] is not None]
            values = [r["value"] / r["default"] for r in mine]
            ax.set_xlabel(knob if "." not in knob else f"{knob}, of the profile's")
            ax.set_ylabel("µs")
            ax.set_ylim(0, plotting.highest(r["us"] for r in rows) * 1.05)
            if not mine:
                ax.text(0.5, 0.5, "no value fits", ha="center", transform=ax.transAxes)
                continue
            ax.plot(values, [r["us"] for r in mine], marker="o", color=plotting.look(i)["color"])
            ax.set_xscale("log", base=2)
            ax.minorticks_off()
            ax.set_xticks(values, [f"{value:.3g}" for value in values], fontsize=8)
