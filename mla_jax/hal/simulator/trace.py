"""Presents a timeline: as a Gantt chart, as a Chrome or Perfetto trace, or in words."""

from typing import Any

from mla_jax.hal.simulator.one_core import Timeline
from mla_jax.hal.simulator.simulate import Report

# The colour of each group of stages; a stage has the same colour on every device.
STAGE_COLOURS = {
    "LOAD": "#8C6D31",
    "ISSUE": "#8C6D31",
    "WIDEN": "#CC79A7",
    "QK": "#0072B2",
    "DEQUANT": "#56B4E9",
    "SM": "#E69F00",
    "PV": "#009E73",
    "ADD": "#CC79A7",
    "UP": "#D55E00",
    "STORE": "#555555",
}


def stage_group(stage: str) -> str:
    """Returns the part of a stage's name that its colour follows: LOAD_L -> LOAD, QK_ROPE -> QK."""
    return stage.split("@")[0].split("_")[0]


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Returns the timeline in Chrome's trace event format, for Perfetto: one thread per unit."""
    units = timeline.schedule.units
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": timeline.schedule.name}}
    ]
    for thread, unit in enumerate(units):
        events.append(
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": thread, "args": {"name": unit}}
        )
    steps = zip(timeline.schedule.steps, timeline.start, timeline.end, timeline.costs, strict=True)
    for step, start, end, cost in steps:
        events.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": units.index(step.unit),
                "name": f"{step.stage} {step.block}",
                "cat": stage_group(step.stage),
                "ts": start * 1e6,
                "dur": (end - start) * 1e6,
                "args": {
                    "block": step.block,
                    "waits": [f"{signal.stage}({signal.block})" for signal in step.waits],
                    "busy_us": {engine: busy * 1e6 for engine, busy in cost.busy.items()},
                },
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def draw_gantt(axes: Any, timeline: Timeline, *, until: float | None = None) -> None:
    """Draws a Gantt chart on matplotlib axes: a lane per unit, a colour per stage, block numbers.

    Lanes are hatched where a matrix unit is idle between its steps. until: seconds on the axis;
    None is the whole timeline.
    """
    units = timeline.schedule.units
    total = until or timeline.total
    matrix = {s.unit for s in timeline.schedule.steps if stage_group(s.stage) in ("QK", "PV")}
    seen: set[str] = set()
    free: dict[str, float] = {}
    for step, start, end in zip(timeline.schedule.steps, timeline.start, timeline.end, strict=True):
        lane = len(units) - 1 - units.index(step.unit)
        group = stage_group(step.stage)
        gap = start - free.get(step.unit, 0.0)
        if step.unit in matrix and gap > total * 1e-4:
            _bar(axes, lane, start - gap, start, color="white", edgecolor="#c44", hatch="////")
        free[step.unit] = end
        _bar(axes, lane, start, end, color=STAGE_COLOURS[group], edgecolor="white",
             label=None if group in seen else group)  # fmt: skip
        seen.add(group)
        if (end - start) > total * 0.012:
            text = str(step.block) if step.block >= 0 else "Q"
            axes.text((start + end) / 2 * 1e6, lane, text, ha="center", va="center",
                      color="white", fontsize=7)  # fmt: skip
    axes.set_yticks(range(len(units)), list(reversed(units)))
    axes.set_xlim(0, total * 1e6)
    axes.grid(False)
    axes.set_xlabel("µs")
    axes.set_title(f"{timeline.schedule.name}: {timeline.total * 1e6:.1f} µs", fontsize=10)


def _bar(axes: Any, lane: int, start: float, end: float, **style: Any) -> None:
    width = 0.0 if "hatch" in style else 0.6
    axes.barh(lane, (end - start) * 1e6, left=start * 1e6, height=0.72, linewidth=width, **style)


def describe(report: Report) -> list[str]:
    """Returns the lines of a report in words, what bounds the call first."""
    idle = ", ".join(f"{where} {share:.1%}" for where, share in report.bubbles.items())
    busy = ", ".join(
        f"{engine} {share:.0%}"
        for engine, share in sorted(report.engine_share.items(), key=lambda item: -item[1])
    )
    return [
        f"bound by {report.bound_by} (busiest engine: {report.engine})",
        f"{report.seconds * 1e6:.1f} us: launch {report.launch * 1e6:.1f}, cores "
        f"{report.cores * 1e6:.1f}, merge {report.merge * 1e6:.1f}",
        f"{report.tflops:.0f} TFLOPS, {report.gb_per_s:.0f} GB/s, {report.utilisation:.1%} of the "
        "matrix-only peak",
        f"matrix unit of a core: busy {report.matrix_busy:.1%}, idle {1 - report.matrix_busy:.1%} "
        f"({idle})",
        f"engines busy: {busy}",
    ]
