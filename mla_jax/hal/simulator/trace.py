"""Presents a timeline: as a Gantt chart, as a Chrome or Perfetto trace, or in words."""

from collections.abc import Sequence
from typing import Any

from mla_jax.hal.simulator.one_core import Timeline
from mla_jax.hal.simulator.simulate import Report

# The colour of each group of stages; a stage has the same colour on every device.
STAGE_COLOURS = {
    "LOAD": "#8C6D31",
    "ISSUE": "#B8A36E",
    "WIDEN": "#CC79A7",
    "QK": "#0072B2",
    "DEQUANT": "#56B4E9",
    "SM": "#E69F00",
    "PV": "#009E73",
    "ADD": "#7A5195",
    "UP": "#D55E00",
    "STORE": "#555555",
}
OTHER_COLOUR = "#999999"  # of a stage that STAGE_COLOURS does not name
IDLE = "no matrix step"
_DIGIT = 4.5  # points, the width of a digit of a block number
_AXES_SHARE = 0.75  # of a picture's width at least, beside lane names and legend


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


def caption(report: Report) -> str:
    """Returns what a Gantt chart of `report.timeline` shows, and of what it is a part."""
    shown, blocks = report.timeline.schedule.num_blocks, report.item_blocks
    what = (
        f"the longest of {report.items} work items, {blocks} KV blocks"
        if shown == blocks
        else f"a work item of {shown} KV blocks (the longest of {report.items} items has "
        f"{blocks} blocks)"
    )
    return (
        f"{report.name}: {what}, {report.timeline.total * 1e6:.1f} µs; "
        f"the call {report.seconds * 1e6:.1f} µs"
    )


def matrix_gaps(timeline: Timeline) -> dict[str, list[tuple[float, float]]]:
    """Returns, per matrix lane, the intervals in which the matrix unit of its CTA has no step.

    Several lanes may issue to one matrix unit. It is idle where none of them has a step.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    lanes: dict[str, str] = {}
    for step, start, end in zip(timeline.schedule.steps, timeline.start, timeline.end, strict=True):
        if stage_group(step.stage) in ("QK", "PV"):
            cta = lanes[step.unit] = step.unit.partition("@")[2]
            spans.setdefault(cta, []).append((start, end))
    gaps: dict[str, list[tuple[float, float]]] = {}
    for cta, taken in spans.items():
        reach, gaps[cta] = 0.0, []
        for start, end in [*sorted(taken), (timeline.total, timeline.total)]:
            if start > reach:
                gaps[cta].append((reach, start))
            reach = max(reach, end)
    return {unit: gaps[cta] for unit, cta in lanes.items()}


def draw_gantt(axes: Any, timeline: Timeline, *, until: float | None = None) -> None:
    """Draws a Gantt chart on matplotlib axes: a lane per unit, a colour per stage, block numbers.

    Lanes of matrix work are hatched where the matrix unit has no step in any lane, and none of
    another stage runs in this one. A block number is left out where its bar is too narrow.

    until: seconds on the axis; None is the whole timeline.
    """
    units = timeline.schedule.units
    total = until or timeline.total
    points = axes.figure.get_size_inches()[0] * 72 * _AXES_SHARE / total  # per second
    for unit, gaps in matrix_gaps(timeline).items():
        lane = len(units) - 1 - units.index(unit)
        for start, end in gaps:
            _bar(axes, lane, start, end, color="white", edgecolor="#c44", hatch="////", zorder=1,
                 label=IDLE)  # fmt: skip
    for step, start, end in zip(timeline.schedule.steps, timeline.start, timeline.end, strict=True):
        lane = len(units) - 1 - units.index(step.unit)
        group = stage_group(step.stage)
        _bar(axes, lane, start, end, color=STAGE_COLOURS.get(group, OTHER_COLOUR),
             edgecolor="white", zorder=2,
             label=group if group in STAGE_COLOURS else "other")  # fmt: skip
        text = str(step.block) if step.block >= 0 else "Q"
        if (end - start) * points >= _DIGIT * (len(text) + 1):
            axes.text((start + end) / 2 * 1e6, lane, text, ha="center", va="center",
                      color="white", fontsize=7, zorder=3)  # fmt: skip
    axes.set_yticks(range(len(units)), list(reversed(units)))
    axes.set_xlim(0, total * 1e6)
    axes.grid(False)
    axes.set_xlabel("µs")
    axes.set_title(f"{timeline.schedule.name}: {timeline.total * 1e6:.1f} µs", fontsize=10)


def draw_legend(charts: Sequence[Any]) -> None:
    """Draws one legend for several Gantt charts, with every colour and hatch of any of them."""
    entries: dict[str, Any] = {}
    for axes in charts:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    charts[0].legend(list(entries.values()), list(entries), loc="upper left",
                     bbox_to_anchor=(1.0, 1.0), fontsize=8)  # fmt: skip


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
    shares = report.timeline.unit_shares().items()
    return [
        f"bound by {report.bound_by} (busiest engine: {report.engine})",
        f"{report.seconds * 1e6:.1f} us: launch {report.launch * 1e6:.1f}, cores "
        f"{report.cores * 1e6:.1f}, merge {report.merge * 1e6:.1f}",
        f"{report.tflops:.0f} TFLOPS, {report.gb_per_s:.0f} GB/s, {report.utilisation:.1%} of the "
        "matrix-only peak",
        f"shares of {caption(report)}",
        f"matrix unit of a core: busy {report.matrix_busy:.1%}, idle {1 - report.matrix_busy:.1%} "
        f"({idle})",
        f"engines busy: {busy}",
        *(
            f"unit {unit}: engines {share['engines']:.1%}, held {share['held']:.1%}, "
            f"idle {share['idle']:.1%}"
            for unit, share in shares
        ),
    ]
