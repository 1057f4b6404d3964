"""Our decode kernel's own time stamps beside its simulated schedule, stage by stage.

    python -m experiments.launch --experiment=portrait --output_dir=out

On an H100 or H200 the kernel runs with time stamps: each warpgroup writes the SM's clock at the
stages of its first work item. Elsewhere only the simulated lanes are drawn.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework import plotting
from experiments.framework.console import say, show_table, track
from experiments.framework.experiment import InputError, Outcome, Output, Row, reading
from experiments.framework.options import flag, seed_flag
from experiments.simulated.portrait_lanes import (
    COMBINE,
    MOST_BLOCKS,
    WAIT_KV,
    WAIT_P,
    Span,
    StageError,
    measured_spans,
    simulated_spans,
    stage_errors,
)
from mla_jax.hal import HardwareProfile, Problem, Report, load_profile, simulate
from mla_jax.hal.simulator.hopper import HopperKernel
from mla_jax.hal.simulator.trace import OTHER_COLOUR, STAGE_COLOURS, stage_group
from pallas_kernels.hopper import device, planning
from pallas_kernels.hopper.model import simulated_kernel
from pallas_kernels.hopper.portrait import attend_with_stamps

SUMMARY = "the decode kernel's stages on an H100 or H200, beside the simulated ones"

SMALL_SHARE = 0.02  # of the item's time; the mean error leaves smaller stages out
WANTED = 15.0  # percent, the largest mean error of the stages
WARM_UP, RUNS = 3, 4
PAGE, WIDTH = 64, 576
COLOURS = STAGE_COLOURS | {"WAIT": "#E4E6EA", "SUM": "#F0E442", COMBINE: "#000000"}


@dataclasses.dataclass(frozen=True)
class Options:
    shapes: tuple[str, ...] = flag(
        ("128x64x4096", "128x1x16384", "64x32x2048", "16x64x4096"),
        "heads x requests x tokens per request",
        may_be_empty=False,
    )
    profile: str = flag("H200_SXM", "the simulated device, a name or a JSON file")
    stamps: str = flag("", "a folder with stamps of an earlier run, to read instead of running")
    seed: int = seed_flag("of queries, cache and page order")


@dataclasses.dataclass(frozen=True)
class Portrait:
    """One shape: the simulated item, and the measured ones if there is a GPU."""

    shape: str
    kernel: HopperKernel
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
    shapes = [shape_of(text) for text in options.shapes]
    problems = [Problem((tokens,) * batch, heads) for heads, batch, tokens in shapes]
    lacks = device.machine_lacks()
    stamps: Iterable[np.ndarray | None]
    if options.stamps:
        stamps = (saved_stamps(options.stamps, shape) for shape in shapes)
    elif lacks:
        say(f"simulated lanes only: {lacks}")
        stamps = [None] * len(shapes)
    else:
        stamps = stamped_runs(problems, options.seed)
    portraits = []
    inputs = zip(options.shapes, shapes, problems, stamps, strict=True)
    for text, shape, problem, found in track(list(inputs), "shapes"):
        portraits.append(portrait(profile, text, problem, found))
        if found is not None and not options.stamps:
            np.savez_compressed(output.path(_file_of(shape)), stamps=found)
    rows = [row for p in portraits for row in rows_of(p)]
    draw(output, portraits)
    measured = [p for p in portraits if p.errors]
    if not measured:
        times = ", ".join(f"{p.shape} {p.report.seconds * 1e6:.1f} us" for p in portraits)
        return Outcome(True, f"simulated only: {times}", rows, {"measured": []})
    show_table("Stages, mean microseconds per KV block or item", [r for r in rows if "lane" in r])
    mean = float(np.mean([p.mean_error for p in measured]))
    parts = ", ".join(f"{p.shape} {p.mean_error:.1f} %" for p in measured)
    headline = {
        "measured": [p.shape for p in measured],
        "mean_error_percent": {p.shape: p.mean_error for p in measured},
        "weighted_error_percent": {p.shape: p.weighted_error for p in measured},
    }
    return Outcome(mean <= WANTED, f"mean stage error {mean:.1f} % ({parts})", rows, headline)


def shape_of(text: str) -> tuple[int, int, int]:
    """Returns (heads, requests, tokens) of HEADSxREQUESTSxTOKENS; InputError for other text."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    sizes = tuple(int(n) for n in match.groups()) if match else ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise InputError(f"--shapes: got {text!r}, wanted HEADSxREQUESTSxTOKENS, each at least 1")
    heads, requests, tokens = sizes
    return heads, requests, tokens


def portrait(
    profile: HardwareProfile, text: str, problem: Problem, stamps: np.ndarray | None
) -> Portrait:
    """Returns the portrait of a batch of equal requests.

    stamps: [runs, CTAs, ...] as `attend_with_stamps` returns them; None: not measured.
    """
    with reading("shapes"):
        kernel = simulated_kernel(profile, problem)
        report = simulate(profile, problem, kernel)
    simulated = simulated_spans(report.timeline, report.merge)
    measured = []
    for run_ in stamps if stamps is not None else ():
        for worker in _workers(kernel):
            blocks = int(kernel.work.blocks[np.flatnonzero(kernel.work.worker == worker)[0]])
            with reading("stamps"):
                of_cta = run_[worker * kernel.ctas_per_tile]
                measured.append(measured_spans(of_cta, kernel.kernel, blocks))
    errors = stage_errors(measured, simulated) if measured else []
    return Portrait(text, kernel, report, simulated, measured, errors)


def saved_stamps(folder: str, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Returns the stamps of a shape that an earlier run has saved, or None."""
    path = Path(folder) / _file_of(shape)
    if not path.exists():
        say(f"not measured: there is no {path.name} in --stamps")
        return None
    with reading("stamps"), np.load(path) as saved:
        if "stamps" not in saved:
            raise ValueError(f"{path.name} has no array stamps")
        return saved["stamps"]


def _file_of(shape: tuple[int, int, int]) -> str:
    return f"stamps_{'_'.join(map(str, shape))}.npz"


def _workers(kernel: HopperKernel) -> list[int]:
    """Returns a few workers whose first work item is as long as the longest one."""
    items = np.flatnonzero(np.diff(kernel.work.worker, prepend=-1))
    blocks = kernel.work.blocks[items]
    longest = kernel.work.worker[items[blocks == blocks.max()]]
    return [int(longest[i]) for i in sorted({0, len(longest) // 2, len(longest) - 1})]


def stamped_runs(problems: Sequence[Problem], seed: int) -> Iterator[np.ndarray]:
    """Yields the stamps of some runs of each problem on this machine's GPU.

    All programs are compiled first, at the same time: each takes most of ten seconds.
    """
    with ThreadPoolExecutor(len(problems)) as pool:
        compiled = list(pool.map(_compiled, problems))
    for problem, (attend, plan, copies) in zip(problems, compiled, strict=True):
        batch, pages = problem.batch, -(-problem.kv_lens[0] // PAGE)
        order = np.random.default_rng(seed).permutation(copies * batch * pages).astype(np.int32)
        tables = jnp.asarray(order.reshape(copies, batch, pages))
        keys = jax.random.split(jax.random.key(seed))
        cache = jax.random.normal(keys[1], (order.size, PAGE, WIDTH), jnp.bfloat16)
        q = jax.random.normal(keys[0], (batch, problem.rows, WIDTH), jnp.bfloat16)
        lengths = jnp.asarray(problem.kv_lens, jnp.int32)
        found = []
        for i in range(RUNS):
            for j in range(WARM_UP + 1):
                stamps = attend(q, cache, tables[(i + j) % copies], lengths, plan)[2]
            found.append(np.asarray(stamps))
        yield np.stack(found)


def _compiled(problem: Problem) -> tuple[Any, Any, int]:
    """Returns the compiled kernel of a problem, its plan, and how many caches take turns.

    They take turns so that no run finds its keys in L2.
    """
    batch, tokens = problem.batch, problem.kv_lens[0]
    pages = -(-tokens // PAGE)
    copies = max(1, min(4, 1 + int(2e8 // (batch * pages * PAGE * WIDTH * 2))))
    make = functools.partial(planning.plan_decode, rows=problem.rows, capacity=tokens)
    plan = jax.jit(make)(jnp.asarray(problem.kv_lens, jnp.int32))
    structs = (
        jax.ShapeDtypeStruct((batch, problem.rows, WIDTH), jnp.bfloat16),
        jax.ShapeDtypeStruct((copies * batch * pages, PAGE, WIDTH), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, pages), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    scale = WIDTH**-0.5
    lowered = attend_with_stamps.lower(*structs, plan, num_heads=problem.heads, softmax_scale=scale)
    return lowered.compile(), plan, copies


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
        path = output.path(f"portrait_{p.shape}.png")
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
    lanes = [n for n in ("load", "wg0", "wg1", "mma1") if any(s.lane == n for s in spans)]
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
    if stage in (WAIT_KV, WAIT_P):
        return COLOURS["WAIT"]
    return COLOURS.get(stage_group(stage), OTHER_COLOUR)


def _draw_legend(axes: Any, items: list[tuple[str, list[Span]]]) -> None:
    from matplotlib.patches import Patch

    names = dict.fromkeys(stage_group(s.stage) for _, spans in items for s in spans)
    handles = [Patch(color=_colour(WAIT_KV if n == "WAIT" else n), label=n) for n in names]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
