"""Our kernels' own time stamps beside their simulated schedules, stage by stage.

    python -m experiments.launch --experiment=portrait --output_dir=out

On an H100 or H200 each kernel runs with time stamps: each warpgroup writes the SM's clock at the
stages of its first work item. Elsewhere only the simulated lanes are drawn. `portrait.json` has
what was measured, as benchmarks/measured keeps it.
"""

import dataclasses
import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.framework import plotting
from experiments.framework.console import say, show_table, track
from experiments.framework.experiment import InputError, Outcome, Output, Row, reading
from experiments.framework.options import flag, seed_flag
from experiments.framework.results import environment, first_line, write_whole
from experiments.simulated.portrait_lanes import (
    COMBINE,
    MOST_BLOCKS,
    OF_LOADERS,
    Span,
    StageError,
    simulated_spans,
    stage_errors,
)
from experiments.simulated.portrait_measured import measured_spans
from experiments.simulated.portrait_runs import Shape, stamped_runs
from mla_jax.hal import HardwareProfile, Report, load_profile, simulate
from mla_jax.hal.simulator.hopper import HopperKernel
from mla_jax.hal.simulator.hopper_prefill import HopperPrefill
from mla_jax.hal.simulator.trace import OTHER_COLOUR, STAGE_COLOURS, stage_group
from pallas_kernels.hopper import device

SUMMARY = "the stages of our kernels on an H100 or H200, beside the simulated ones"

SMALL_SHARE = 0.02  # of the item's time; the mean error leaves smaller stages out
WANTED = 15.0  # percent, the largest mean error of the stages
LANES = (*OF_LOADERS, "wg0", "mma0", "wg1", "mma1", "wg2")
COLOURS = STAGE_COLOURS | {"WAIT": "#E4E6EA", "SUM": "#F0E442", COMBINE: "#000000",
                           "MAX": "#F2C879"}  # fmt: skip
METHOD = (
    "time stamps of one thread per warpgroup (pallas_kernels/hopper/parts/stamps.py) in the "
    "first work item of three CTAs in four runs, uniform lengths, pages of 64 in random order; "
    "made by the experiment portrait"
)


@dataclasses.dataclass(frozen=True)
class Options:
    shapes: tuple[str, ...] = flag(
        (
            *("128x64x4096", "128x1x16384", "64x32x2048", "16x64x4096"),
            *("int8:128x64x4096", "int8:16x64x4096", "prefill:16x1x4096"),
        ),
        "heads x requests x tokens per request, for decode; int8: before it is an int8 cache, and "
        "prefill: is the prefill kernel",
        may_be_empty=False,
    )
    profile: str = flag("H200_SXM", "the simulated device, a name or a JSON file")
    stamps: str = flag("", "a folder with stamps of an earlier run, to read instead of running")
    seed: int = seed_flag("of queries, cache and page order")


@dataclasses.dataclass(frozen=True)
class Portrait:
    """One shape: the simulated item, and the measured ones if there is a GPU."""

    shape: str
    kernel: HopperKernel | HopperPrefill
    report: Report
    simulated: list[Span]
    measured: list[list[Span]]
    errors: list[StageError]

    @property
    def mean_error(self) -> float | None:
        """Mean absolute error in percent of the stages that count; None without a measurement."""
        kept = [e for e in self.errors if e.measured * e.spans >= SMALL_SHARE * self._all]
        return float(np.mean([abs(e.percent) for e in kept])) if kept else None

    @property
    def weighted_error(self) -> float | None:
        """Sum of the stages' absolute errors over the sum of their times, in percent."""
        if not self.errors:
            return None
        wrong = sum(abs(e.simulated - e.measured) * e.spans for e in self.errors)
        return 100 * wrong / sum(e.measured * e.spans for e in self.errors)

    @property
    def _all(self) -> float:
        lanes: dict[str, float] = {}
        for e in self.errors:
            lanes[e.lane] = lanes.get(e.lane, 0.0) + e.measured * e.spans
        return max(lanes.values(), default=0.0)


def run(options: Options, output: Output) -> Outcome:
    with reading("profile"):
        profile = load_profile(options.profile)
    shapes = [Shape.of(text) for text in options.shapes]
    lacks = device.machine_lacks()
    runs: Iterable[np.ndarray | str | None]
    if options.stamps:
        runs = (saved_stamps(options.stamps, shape) for shape in shapes)
    elif lacks:
        say(f"simulated lanes only: {lacks}")
        runs = [None] * len(shapes)
    else:
        runs = stamped_runs(shapes, options.seed)
    portraits, failed = [], {}
    made = _saved_about(options.stamps, shapes) if options.stamps else _about()
    inputs = zip(options.shapes, shapes, runs, strict=True)
    for text, shape, found in track(inputs, "shapes", total=len(shapes)):
        if isinstance(found, np.ndarray) and not options.stamps:
            path = output.path(_file_of(shape))
            np.savez_compressed(path, stamps=found, about=json.dumps(made))
        try:
            if isinstance(found, str):
                raise InputError(found)
            portraits.append(portrait(profile, text, shape, found))
        except Exception as error:
            if options.stamps or lacks:
                raise
            # What the other shapes' runs on the GPU have found must not be lost.
            failed[text] = first_line(error)
            say(f"{text} is not measured: {failed[text]}")
            portraits.append(portrait(profile, text, shape, None))
    rows = [row for p in portraits for row in rows_of(p)]
    draw(output, portraits)
    measured = [p for p in portraits if p.errors]
    if not measured:
        times = ", ".join(f"{p.shape} {p.report.seconds * 1e6:.1f} us" for p in portraits)
        headline = {"measured": [], "failed": failed}
        return Outcome(not failed, f"simulated only: {times}", rows, headline)
    show_table("Stages, mean microseconds per KV block or item", [r for r in rows if "lane" in r])
    mean = float(np.mean([p.mean_error for p in measured]))
    parts = ", ".join(f"{p.shape} {p.mean_error:.1f} %" for p in measured)
    headline = {
        "measured": [p.shape for p in measured],
        "failed": failed,
        "kernels": {p.shape: p.kernel.name.removeprefix("hopper ") for p in measured},
        "mean_error_percent": {p.shape: p.mean_error for p in measured},
        "weighted_error_percent": {p.shape: p.weighted_error for p in measured},
    }
    if made is not None:
        stages = [row for row in rows if "lane" in row]
        about = {"device": options.profile} | made | headline
        write_whole(output.path("portrait.json"), kept(about, stages))
    summary = f"mean stage error {mean:.1f} % ({parts})"
    if failed:
        summary += f"; not measured: {', '.join(failed)}"
    return Outcome(mean <= WANTED and not failed, summary, rows, headline)


def _about() -> dict[str, Any]:
    """Returns by what and when this launch measures."""
    found = environment()
    return {
        "gpu": found["devices"][0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": found["versions"]["commit"],
        "method": METHOD,
    }


def _saved_about(folder: str, shapes: Sequence[Shape]) -> dict[str, Any] | None:
    """Returns by what and when the saved stamps were measured, if their files say so."""
    for path in (Path(folder) / _file_of(shape) for shape in shapes):
        if path.exists():
            with reading("stamps"), np.load(path) as saved:
                return json.loads(str(saved["about"])) if "about" in saved else None
    return None


def kept(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """Returns the JSON of a result, a line for each stage."""
    lines = ",\n".join(f"    {json.dumps(_rounded(row, 4))}" for row in rows)
    headline = json.dumps({key: _rounded(value, 1) for key, value in about.items()}, indent=2)
    return f'{headline.removesuffix("}").rstrip()},\n  "rows": [\n{lines}\n  ]\n}}\n'


def _rounded(value: Any, digits: int) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: round(v, digits) if isinstance(v, float) else v for k, v in value.items()}


def portrait(
    profile: HardwareProfile, text: str, shape: Shape, stamps: np.ndarray | None
) -> Portrait:
    """Returns the portrait of a batch of equal requests.

    stamps: [runs, CTAs, ...] as `attend_with_stamps` returns them; None: not measured.
    """
    with reading("shapes"):
        kernel = shape.kernel(profile)
        report = simulate(profile, shape.problem, kernel)
    simulated = simulated_spans(report.timeline, report.merge)
    measured = []
    for run_ in stamps if stamps is not None else ():
        with reading("stamps"):
            for cta, blocks, trims in _items(kernel):
                name = kernel.kernel if isinstance(kernel, HopperKernel) else "prefill"
                measured.append(measured_spans(run_[cta], name, blocks, trims))
    errors = stage_errors(measured, simulated) if measured else []
    return Portrait(text, kernel, report, simulated, measured, errors)


def saved_stamps(folder: str, shape: Shape) -> np.ndarray | None:
    """Returns the stamps of a shape that an earlier run has saved, or None."""
    path = Path(folder) / _file_of(shape)
    if not path.exists():
        say(f"not measured: there is no {path.name} in --stamps")
        return None
    with reading("stamps"), np.load(path) as saved:
        if "stamps" not in saved:
            raise ValueError(f"{path.name} has no array stamps")
        return saved["stamps"]


def _file_of(shape: Shape) -> str:
    return f"stamps_{shape.label}.npz"


def _items(kernel: HopperKernel | HopperPrefill) -> list[tuple[int, int, bool]]:
    """Returns a few CTAs whose first work item is as long as the longest one.

    With each are the KV blocks of that item, and whether its first warpgroup sees half of one.
    """
    blocks, trims = kernel.work.blocks, np.zeros(len(kernel.work.blocks), bool)
    if isinstance(kernel, HopperPrefill):
        # CTA i begins with item i. Its rows see as much as those of the simulated item.
        trims = kernel.trimmed
        first = np.arange(min(len(blocks), kernel.work.num_workers))
        first = first[trims[first] == trims[np.argmax(blocks)]]
        ctas = first
    else:
        first = np.flatnonzero(np.diff(kernel.work.worker, prepend=-1))
        ctas = kernel.work.worker[first] * kernel.ctas_per_tile
    longest = np.flatnonzero(blocks[first] == blocks[first].max())
    chosen = longest[sorted({0, len(longest) // 2, len(longest) - 1})]
    return [(int(ctas[i]), int(blocks[first[i]]), bool(trims[first[i]])) for i in chosen]


def rows_of(p: Portrait) -> list[Row]:
    """Returns a row per stage; without a measurement, a row for the shape."""
    if not p.errors:
        return [{"shape": p.shape, "kernel": p.kernel.name, "us": p.report.seconds * 1e6}]
    return [
        {
            "shape": p.shape,
            "lane": e.lane,
            "stage": e.stage,
            "spans": e.spans,
            "measured_us": e.measured * 1e6,
            "simulated_us": e.simulated * 1e6,
            "error_percent": e.percent if e.measured else None,
        }
        for e in p.errors
    ]


def draw(output: Output, portraits: Sequence[Portrait]) -> None:
    """Draws, per shape, the measured lanes (if any) above the simulated ones."""
    for p in portraits:
        items = [("simulated", p.simulated)]
        if p.measured:
            items.insert(0, ("measured", p.measured[0]))
        blocks = p.report.item_blocks
        until = 1e6 * max(
            s.end
            for _, spans in items
            for s in spans
            if s.block < MOST_BLOCKS or blocks <= MOST_BLOCKS
        )
        path = output.path(f"portrait_{p.shape.replace(':', '_')}.png")
        shown = min(blocks, MOST_BLOCKS)
        title = (
            f"{p.kernel.name}, {p.shape} (heads x requests x tokens): the first {shown} of "
            f"{blocks} KV blocks of one CTA's first item"
        )
        lanes = sum(len({s.lane for s in spans}) for _, spans in items)
        size = (15.0, 1.6 * len(items) + 0.42 * lanes)
        with plotting.figure(path, title, rows=len(items), size=size) as axes:
            charts = plotting.several(axes)
            for chart, (what, spans) in zip(charts, items, strict=True):
                _draw_lanes(chart, what, spans, until)
            _draw_legend(charts[0], items)


def _draw_lanes(axes: Any, what: str, spans: list[Span], until: float) -> None:
    lanes = [n for n in LANES if any(s.lane == n for s in spans)]
    for s in spans:
        place = len(lanes) - 1 - lanes.index(s.lane)
        axes.barh(place, (s.end - s.start) * 1e6, left=s.start * 1e6, height=0.72, linewidth=0.4,
                  edgecolor="white", color=_colour(s.stage))  # fmt: skip
    axes.set_yticks(range(len(lanes)), list(reversed(lanes)))
    axes.set_xlim(0, until)
    axes.grid(False)
    axes.set_xlabel("µs")
    axes.set_title(what, fontsize=10)


def _colour(stage: str) -> str:
    return COLOURS.get(stage_group(stage), OTHER_COLOUR)


def _draw_legend(axes: Any, items: list[tuple[str, list[Span]]]) -> None:
    from matplotlib.patches import Patch

    names = dict.fromkeys(stage_group(s.stage) for _, spans in items for s in spans)
    handles = [Patch(color=_colour(n), label=n) for n in names]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
