"""Compares several schedules on one profile and problem."""

import dataclasses

from experiments.framework import plotting
from experiments.framework.console import say, show_table
from experiments.framework.experiment import InputError, Outcome, Output
from experiments.framework.machine_options import MachineOptions, machine_and_problem, report_row
from experiments.framework.options import flag
from experiments.simulated.kernels import simulate_named
from experiments.simulated.own_files import name_of
from mla_jax.hal.simulator.simulate import SHOWN_BLOCKS
from mla_jax.hal.simulator.trace import caption, draw_gantt, draw_legend

SUMMARY = "schedules compared on one device: Gantt charts and a table"

_DEFAULTS = {
    "ascend": ("serial", "chunk1", "chunk2", "chunk4", "amla"),
    "nvidia": ("triton-split", "fa2", "fa3", "fa3-2wg", "four-wg", "seesaw"),
}


@dataclasses.dataclass(frozen=True)
class Options(MachineOptions):
    schedules: tuple[str, ...] = flag(
        (), "orders, kernels or files of one's own (FILE.py); by default the published orders"
    )


def run(options: Options, output: Output) -> Outcome:
    profile, problem = machine_and_problem(options)
    if len(options.schedules) == 1:
        raise InputError("--schedules must name two schedules or more")
    reports = []
    names: list[str] = []
    for name in options.schedules or _DEFAULTS[profile.family]:
        try:
            reports.append(simulate_named(profile, problem, name))
        except ValueError as error:  # the device can not run it
            if options.schedules:
                raise InputError(f"--schedules: {error}") from error
            say(f"left out: {error}")
            continue
        names.append(name_of(name, reports[-1].name))
    if not names:
        raise InputError(f"--profile: {profile.name} runs none of the published orders")
    rows = [{"name": n} | report_row(r) for n, r in zip(names, reports, strict=True)]
    show_table(
        f"Schedules on {profile.name}; busy and idle: the matrix unit in the longest work item",
        rows,
        {
            "name": "name",
            "us": "us",
            "bound_by": "bound by",
            "tflops": "TFLOPS",
            "gb_per_s": "GB/s",
            "utilisation": "busy",
            "bubble_head": "idle: head",
            "bubble_steady": "steady",
            "bubble_tail": "tail",
            "bubble_in_steps": "in steps",
        },
    )
    until = max(report.timeline.total for report in reports)
    lanes = sum(len(report.timeline.schedule.units) for report in reports)
    title = f"Schedules on {profile.name}, the longest work item or {SHOWN_BLOCKS} KV blocks of it"
    size = (15.0, 1.1 * len(reports) + 0.42 * lanes)
    path = output.path("compare.png")
    with plotting.figure(path, title, rows=len(reports), size=size) as axes:
        for ax, name, report in zip(plotting.several(axes), names, reports, strict=True):
            draw_gantt(ax, report.timeline, until=until)
            ax.set_title(f"{name}, bound by {report.bound_by}. {caption(report)}", fontsize=10)
        draw_legend(plotting.several(axes))
    best = min(rows, key=lambda row: row["us"])
    return Outcome(True, f"fastest on {profile.name}: {best['name']}, {best['us']:.1f} us", rows)
