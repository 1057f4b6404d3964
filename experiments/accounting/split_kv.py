"""Balance of split plans: how evenly the work of a batch is divided among workers.

Planners:
- naive: no splits; every worker gets the same number of whole tiles.
- fixed: splits at multiples of a fixed length, the batch-invariant mode.
- blocks: equal shares by KV blocks plus an overhead per work item (FlashMLA).
- fia: equal shares by Ascend's cost per block (fused infer attention).

Efficiency is the work divided by (workers x largest load). It is the share of a step in which an
average worker computes. Each plan has an efficiency under both cost models.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework import plotting
from experiments.framework.console import show_table, track
from experiments.framework.experiment import InputError, Outcome, Output, Row
from experiments.framework.options import flag, seed_flag
from mla_jax.splits.planner import SplitPlan, plan_fixed, plan_loads, plan_splits

SUMMARY = "balance of split plans: naive, fixed splits, planner a (blocks), planner b (fia)"

Planner = Callable[[jax.Array], SplitPlan]  # from seq_lens [B] int32

BLOCK = 64
ROWS_PER_TILE = 64
LONGEST = 131072
PICTURED = "64 normal"
MODELS = ("blocks", "fia")


@dataclasses.dataclass(frozen=True)
class Options:
    workers: int = flag(
        132, "workers that run at a time: 132 (SMs of an H200), 24 (Ascend)", lower_bound=1
    )
    rows: int = flag(128, "query rows per request: heads x query tokens", lower_bound=1)
    split_size: int = flag(1024, "tokens per work item of `fixed`", lower_bound=64)
    seed: int = seed_flag("of the lengths")


def run(options: Options, output: Output) -> Outcome:
    if options.split_size % BLOCK:
        raise InputError(f"--split_size must be a multiple of {BLOCK}, got {options.split_size}")
    planners = {name: with_loads(make(options), options) for name, make in PLANNERS.items()}
    rows: list[Row] = []
    pictured: dict[str, SplitPlan] = {}
    for batch, lengths in track(list(batches(options.seed).items()), "batches"):
        seq_lens = jnp.asarray(lengths, jnp.int32)
        plans = {name: planner(seq_lens) for name, planner in planners.items()}
        rows += [measure(batch, seq_lens, name, *plan, options) for name, plan in plans.items()]
        if batch == PICTURED:
            pictured = {name: plan for name, (plan, _) in plans.items()}
    show_table(
        f"Efficiency on {options.workers} workers, {options.rows} rows per request",
        rows,
        {
            "batch": "batch",
            "requests": "requests",
            "planner": "planner",
            "efficiency_blocks": "efficiency (blocks)",
            "efficiency_fia": "efficiency (fia)",
            "pieces": "work items",
            "partial_outputs": "partial outputs",
            "covers": "covers all once",
        },
    )
    draw(output.path("split_kv.png"), rows, pictured, options)

    def mean(planner: str, model: str) -> float:
        mine = [row[f"efficiency_{model}"] for row in rows if row["planner"] == planner]
        return float(np.mean(mine))

    better = mean("blocks", "blocks") > mean("naive", "blocks")
    better &= mean("fia", "fia") > mean("naive", "fia")
    return Outcome(
        passed=better and all(row["covers"] for row in rows),
        summary=(
            f"Mean efficiency by each planner's own model: blocks {mean('blocks', 'blocks'):.0%}, "
            f"fia {mean('fia', 'fia'):.0%}; without splitting {mean('naive', 'blocks'):.0%} and "
            f"{mean('naive', 'fia'):.0%}; with fixed splits of {options.split_size} "
            f"{mean('fixed', 'blocks'):.0%} and {mean('fixed', 'fia'):.0%}."
        ),
        rows=rows,
    )


def batches(seed: int) -> dict[str, list[int]]:
    """Returns the KV lengths of the requests of each batch, by the name of the batch."""
    r = random.Random(seed)
    return {
        "64 equal": [4096] * 64,
        PICTURED: [int(max(r.normalvariate(4096, 2048), 1)) for _ in range(64)],
        "64 log-normal": [int(min(r.lognormvariate(7, 1.5), LONGEST)) + 1 for _ in range(64)],
        "64 short, some empty": [r.randrange(2048) * (r.random() > 0.1) for _ in range(64)],
        "1 long, 63 short": [LONGEST] + [r.randrange(256, 4096) for _ in range(63)],
        "a single one": [LONGEST // 2],
    }


def naive(options: Options) -> Planner:
    """Returns a planner that gives whole tiles, in order, to all workers equally."""

    def plan(seq_lens: jax.Array) -> SplitPlan:
        row_tiles = -(-options.rows // ROWS_PER_TILE)
        tiles = len(seq_lens) * row_tiles
        tile = jnp.arange(tiles, dtype=jnp.int32)
        worker = jnp.arange(options.workers + 1, dtype=jnp.int32)
        return SplitPlan(
            request=tile % len(seq_lens),
            row_tile=tile // len(seq_lens),
            block_start=jnp.zeros_like(tile),
            block_end=-(-seq_lens[tile % len(seq_lens)] // BLOCK),
            partial=jnp.full_like(tile, -1),
            worker_start=worker * tiles // options.workers,
            tile_partial_start=jnp.zeros(tiles + 1, jnp.int32),
            block_size=BLOCK,
            rows_per_tile=ROWS_PER_TILE,
            num_row_tiles=row_tiles,
            num_partials=0,
        )

    return plan


def fixed(options: Options) -> Planner:
    """Returns the planner of batch-invariant plans."""
    return functools.partial(
        plan_fixed,
        split_size=options.split_size,
        max_seq_len=LONGEST,
        num_workers=options.workers,
        rows=options.rows,
        rows_per_tile=ROWS_PER_TILE,
        block_size=BLOCK,
    )


def balanced(options: Options, cost_model: str) -> Planner:
    """Returns the balancing planner with a cost model."""
    return functools.partial(
        plan_splits,
        num_workers=options.workers,
        rows=options.rows,
        rows_per_tile=ROWS_PER_TILE,
        block_size=BLOCK,
        cost_model=cost_model,
    )


PLANNERS: dict[str, Callable[[Options], Planner]] = {
    "naive": naive,
    "fixed": fixed,
    "blocks": functools.partial(balanced, cost_model="blocks"),
    "fia": functools.partial(balanced, cost_model="fia"),
}


def with_loads(
    planner: Planner, options: Options
) -> Callable[[jax.Array], tuple[SplitPlan, dict[str, jax.Array]]]:
    """Returns a function that makes a plan, and its loads by `loads_of`."""
    plan_of = jax.jit(planner)

    def run(seq_lens: jax.Array) -> tuple[SplitPlan, dict[str, jax.Array]]:
        plan = plan_of(seq_lens)
        return plan, loads_of(plan, seq_lens, rows=options.rows)

    return run


@functools.partial(jax.jit, static_argnames="rows")
def loads_of(plan: SplitPlan, seq_lens: jax.Array, *, rows: int) -> dict[str, jax.Array]:
    """Returns the loads of the workers under each cost model, and without overheads.

    Their names are those of the models, and e.g. "blocks work".
    """
    loads = {}
    for model in MODELS:
        arguments: dict[str, Any] = {"rows": rows, "cost_model": model}
        loads[model] = plan_loads(plan, seq_lens, **arguments)
        loads[f"{model} work"] = plan_loads(plan, seq_lens, overhead=0, **arguments)
    return loads


def measure(
    batch: str,
    seq_lens: jax.Array,
    name: str,
    plan: SplitPlan,
    loads: dict[str, jax.Array],
    options: Options,
) -> Row:
    """Returns a row: work items, and largest load and efficiency under each cost model."""
    row: Row = {"batch": batch, "requests": len(seq_lens), "planner": name}
    for model in MODELS:
        largest, work = float(loads[model].max()), float(loads[f"{model} work"].sum())
        row[f"max_load_{model}"] = largest
        row[f"efficiency_{model}"] = work / (options.workers * largest)
    row["pieces"] = int((plan.request >= 0).sum())
    row["partial_outputs"] = int((plan.partial >= 0).sum())
    row["covers"] = covers_once(plan, np.asarray(seq_lens))
    return row


def covers_once(plan: SplitPlan, seq_lens: np.ndarray) -> bool:
    """Returns whether the workers together compute each block of each tile exactly once."""
    plan = jax.tree.map(np.asarray, plan)
    blocks = -(-seq_lens // plan.block_size)
    times = np.zeros((len(seq_lens), plan.num_row_tiles, max(1, blocks.max())), int)
    for first, end in itertools.pairwise(plan.worker_start):
        for item in range(first, end):
            tile = plan.request[item], plan.row_tile[item]
            times[tile][plan.block_start[item] : plan.block_end[item]] += 1
    expected = np.arange(times.shape[2]) < blocks[:, None, None]
    return bool(np.array_equal(times, np.broadcast_to(expected, times.shape)))


def draw(path: Path, rows: list[Row], pictured: dict[str, SplitPlan], options: Options) -> None:
    """Draws the efficiency under both cost models, and the plans of one batch."""
    title = f"Split plans on {options.workers} workers"
    with plotting.figure(path, title, rows=3, size=(13, 10)) as (top, middle, bottom):
        _draw_efficiency(top, rows, "blocks")
        _draw_efficiency(middle, rows, "fia")
        top.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
        _draw_items(bottom, pictured)


def _draw_efficiency(axes: Any, rows: list[Row], model: str) -> None:
    names = list(dict.fromkeys(row["batch"] for row in rows))
    for i, planner in enumerate(PLANNERS):
        values = [row[f"efficiency_{model}"] for row in rows if row["planner"] == planner]
        places = [place + (i - 1.5) * 0.2 for place in range(len(names))]
        bars = axes.bar(places, values, 0.18, label=planner, color=plotting.look(i)["color"])
        axes.bar_label(bars, [f"{value:.0%}" for value in values], fontsize=8, padding=2)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_title(f"Efficiency, work / (workers x largest load), by the cost model of {model!r}")


def _draw_items(axes: Any, pictured: dict[str, SplitPlan]) -> None:
    """Draws a column per worker, with a box per work item in the colour of its request."""
    from matplotlib.collections import PolyCollection

    offset, ticks = 0, []
    for plan in (jax.tree.map(np.asarray, plan) for plan in pictured.values()):
        items = np.arange(plan.worker_start[-1])
        worker = np.searchsorted(plan.worker_start, items, side="right") - 1
        height = (plan.block_end - plan.block_start)[items]
        before = np.cumsum(height) - height
        bottom = before - before[plan.worker_start[worker]]  # above the worker's earlier items
        colours = [plotting.COLOURS[i % len(plotting.COLOURS)] for i in plan.request[items]]
        left = offset + worker - 0.5
        corners = np.stack([left, bottom, left + 1, bottom + height])
        boxes = corners[np.array([[0, 1], [2, 1], [2, 3], [0, 3]])].transpose(2, 0, 1)
        axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="none"))
        ticks.append(offset + plan.num_workers / 2)
        offset += plan.num_workers + max(4, plan.num_workers // 12)
    axes.autoscale_view()
    axes.set_ylim(bottom=0)
    axes.set_xticks(ticks, list(pictured))
    axes.set_ylabel("KV blocks")
    axes.set_title(f"{PICTURED}: work of each worker (a column per worker, a colour per request)")
