"""The Gantt chart: hatches are the idle shares, the legend is complete, numbers are readable."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mla_jax.hal import PROFILES, Problem, Report, simulate
from mla_jax.hal.simulator.trace import (
    IDLE,
    STAGE_COLOURS,
    caption,
    describe,
    draw_gantt,
    draw_legend,
    stage_group,
)

CASES = {
    "seesaw": ("H200_SXM", Problem((700,) * 132, 64)),
    "seesaw-cluster2": ("H200_SXM", Problem((300,) * 70, 128)),
    "fp8-widen": ("H200_SXM", Problem((320,) * 132, 64, kv_dtype="fp8")),
    "amla": ("Ascend910B1", Problem((2048,) * 24, 128, 2)),
}


def report_of(name: str) -> Report:
    device, problem = CASES[name]
    return simulate(PROFILES[device], problem, name)


def chart(reports: list[Report]) -> Figure:
    figure = Figure(figsize=(15, 4 * len(reports)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(reports), squeeze=False)[:, 0]
    for ax, report in zip(axes, reports, strict=True):
        draw_gantt(ax, report.timeline)
    draw_legend(list(axes))
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize("name", ["seesaw", "seesaw-cluster2", "amla"])
def test_hatches_are_the_idle_shares_and_numbers_fit_their_bars(name: str) -> None:
    report = report_of(name)
    figure = chart([report])
    (axes,) = figure.axes
    lanes: dict[float, float] = {}
    for bar in axes.patches:
        if bar.get_hatch():
            lanes[bar.get_y()] = lanes.get(bar.get_y(), 0.0) + bar.get_width()
    matrix = {
        s.unit for s in report.timeline.schedule.steps if stage_group(s.stage) in ("QK", "PV")
    }
    assert len(lanes) == len(matrix)
    idle = sum(report.bubbles[where] for where in ("head", "steady", "tail"))
    y = axes.get_yticks()[[label.get_text() for label in axes.get_yticklabels()].index(
        next(unit for unit in sorted(matrix) if "@" not in unit))]  # fmt: skip
    mine = next(share for at, share in lanes.items() if at < y < at + 0.72)
    assert mine / (report.timeline.total * 1e6) == pytest.approx(idle)
    spans = [bar.get_window_extent() for bar in axes.patches if not bar.get_hatch()]
    for text in axes.texts:
        box = text.get_window_extent()
        assert any(s.x0 <= box.x0 and box.x1 <= s.x1 and s.y0 < box.y0 < s.y1 for s in spans)


def test_one_legend_has_every_colour_and_hatch_of_all_charts() -> None:
    figure = chart([report_of("seesaw"), report_of("fp8-widen")])
    legend = figure.axes[0].get_legend()
    shown = {to_hex(patch.get_facecolor()) for patch in legend.get_patches()}
    assert shown == {to_hex(bar.get_facecolor()) for axes in figure.axes for bar in axes.patches}
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(set(labels)) == len(labels) == len(shown)
    assert {IDLE, "WIDEN", "ISSUE", "LOAD"} <= set(labels)
    assert len(set(STAGE_COLOURS.values())) == len(STAGE_COLOURS)


def test_the_text_says_what_the_chart_shows() -> None:
    report = simulate(PROFILES["H200_SXM"], Problem((4096,) * 128, 128), "seesaw")
    assert "the longest of 256 work items, 64 KV blocks, " in caption(report)
    assert f"the call {report.seconds * 1e6:.1f} µs" in caption(report)
    assert sum(line.startswith("unit ") for line in describe(report)) == 5
    long = simulate(PROFILES["H200_SXM"], Problem((16384,) * 132, 64), "seesaw")
    assert "a work item of 64 KV blocks (the longest of 132 items has 256 blocks)" in caption(long)
