"""Simulates one schedule on one profile: Gantt chart, Perfetto trace and report."""

import dataclasses
import json

from experiments.framework import plotting
from experiments.framework.console import say
from experiments.framework.experiment import Outcome, Output, reading
from experiments.framework.machine_options import MachineOptions, machine_and_problem, report_row
from experiments.framework.options import flag
from experiments.simulated.kernels import simulate_named
from experiments.simulated.own_files import name_of
from mla_jax.hal.simulator.trace import caption, chrome_trace, describe, draw_gantt, draw_legend

SUMMARY = "a schedule on a device: Gantt chart, Perfetto trace, what bounds it"


@dataclasses.dataclass(frozen=True)
class Options(MachineOptions):
    schedule: str = flag(
        "seesaw",
        "an order (seesaw, chunk4, ...), a kernel (flashmla_dense, hopper, hopper-prefill, ...) or "
        "FILE.py",
    )


def run(options: Options, output: Output) -> Outcome:
    profile, problem = machine_and_problem(options)
    with reading("schedule"):
        report = simulate_named(profile, problem, options.schedule)
    timeline = report.timeline
    lines = describe(report)
    title = (
        f"{name_of(options.schedule, report.name)} on {profile.name}: bound by {report.bound_by}"
    )
    height = 2.2 + 0.45 * len(timeline.schedule.units)
    with plotting.figure(output.path("pipeline.png"), title, size=(15, height)) as axes:
        draw_gantt(axes, timeline)
        axes.set_title(caption(report), fontsize=10)
        draw_legend([axes])
    trace = output.path("trace.json")
    trace.write_text(json.dumps(chrome_trace(timeline)) + "\n")
    say(title, style="bold")
    for line in lines:
        say("  " + line)
    return Outcome(True, f"{title}; {lines[1]}", [report_row(report)], {
        "report": lines,
        "engine_share": report.engine_share,
        "unit_shares": timeline.unit_shares(),
        "signals": timeline.schedule.num_signals,
    })  # fmt: skip
