"""The demo's results on the small batch, by implementation and cache, as a table and a picture.

A number belongs to the implementation that computed it. A step that an implementation refuses is
not computed by another one under its name; the result has the reason instead.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.framework import plotting
from experiments.framework.console import say, show_table
from experiments.framework.experiment import Row
from experiments.serving.demo_batch import PHASES, Batch


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One step of the layer, under the name of the implementation that computed its attention."""

    implementation: str
    cache: str
    step: int
    phase: str
    error: float
    seconds: float


class Lane(Protocol):
    """What a result is made from: an implementation, its cache, and what it refuses by phase."""

    name: str
    cache_dtype: str
    bound: float
    refused: dict[str, str]

    @property
    def cache_bytes(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """The measurements of one implementation on one cache, and what it refused."""

    implementation: str
    cache: str
    bound: float
    cache_bytes: int
    refused: Mapping[str, str]
    measured: list[Measurement]

    @staticmethod
    def of(runner: Lane, measured: Sequence[Measurement]) -> "Result":
        """Selects the measurements of the runner's implementation on its cache."""
        mine = (runner.name, runner.cache_dtype)
        return Result(
            *mine,
            runner.bound,
            runner.cache_bytes,
            runner.refused,
            [m for m in measured if (m.implementation, m.cache) == mine],
        )

    @property
    def label(self) -> str:
        """The label in the picture, which includes what was refused."""
        refused = f", refused: {', '.join(self.refused)}" if self.refused else ""
        return f"{self.implementation}, {self.cache}{refused}"

    def row(self) -> Row:
        """Returns the largest error and the median time of a step, per phase.

        The first step is not counted in the time. A refused phase has the reason instead.
        """
        row: Row = {"implementation": self.implementation, "cache": self.cache}
        for phase in PHASES:
            errors = [m.error for m in self.measured if m.phase == phase]
            row[f"{phase}_error"] = float(np.max(errors)) if errors else self._refusal(phase)
        for phase in PHASES:
            seconds = [m.seconds for m in self.measured if m.phase == phase]
            # The first run of a program takes longer, because it loads its code and constants.
            row[f"{phase}_ms"] = (
                float(np.median(seconds[1:] or seconds)) * 1e3 if seconds else "refused"
            )
        row["cache_bytes"] = self.cache_bytes
        errors = [m.error for m in self.measured]
        row["passed"] = bool(np.max(errors) <= self.bound) if errors else None
        by_reason: dict[str, list[str]] = {}
        for phase, reason in self.refused.items():
            by_reason.setdefault(reason, []).append(phase)
        row["note"] = "; ".join(
            f"refused {', '.join(phases)}: {reason}" for reason, phases in by_reason.items()
        )
        return row

    def _refusal(self, phase: str) -> str:
        return f"refused: {self.refused[phase]}"


def show(results: Sequence[Result], rows: list[Row], dtype: str, device: str) -> None:
    """Prints errors and times by phase, then the reasons for what was refused or did not run."""
    columns = {"implementation": "by", "cache": "cache"}
    columns |= {f"{phase}_error": f"{phase} error" for phase in PHASES}
    columns |= {f"{phase}_ms": f"{phase} ms" for phase in PHASES}
    columns |= {"cache_bytes": "cache bytes", "passed": "in bound"}
    title = f"{dtype} on {device}: largest error against float64, median ms per step"
    # The reasons are sentences, too long for a cell. They are printed below the table.
    short = [
        row | {f"{phase}_error": "refused" for phase in result.refused}
        for result, row in zip(results, rows, strict=False)
    ]
    show_table(title, short, columns)
    for row in rows:
        if row["note"]:
            what = " on ".join(row[key] for key in ("implementation", "cache") if key in row)
            say(f"{what}: {row['note']}")


def draw(
    path: Path, batch: Batch, results: Sequence[Result], dtype: str, bytes_per_token: int
) -> None:
    """Draws the error of every step, and how the cache fills."""
    title = "A batch of requests through one attention layer"
    with plotting.figure(path, title, columns=2, size=(13, 4.8)) as (left, right):
        _draw_errors(left, results)
        lengths = np.stack([step.seq_lens for step in batch.steps], axis=1)
        kib, steps = lengths * bytes_per_token / 1024, np.arange(len(batch.steps))
        right.stackplot(steps, kib, colors=plotting.COLOURS, edgecolor="white", linewidth=0.5)
        for result in [r for r in results if r.cache != dtype][:1]:
            whole = lengths.sum(0) * (result.cache_bytes / sum(batch.totals)) / 1024
            label = f"all of it in {result.cache}"
            right.plot(steps, whole, color="black", linestyle="--", label=label)
            right.legend(loc="upper left", bbox_to_anchor=(0, 0.92))
        right.set_ylim(0, 1.15 * kib.sum(0).max())
        right.set_ylabel("KiB in the cache")
        right.set_title(f"The cache ({dtype}) fills, a colour per request")
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.set_xlim(-0.5, len(steps) - 0.5)
            for phase in batch.first_steps:
                mine = [i for i, step in enumerate(batch.steps) if step.phase == phase]
                axes.axvline(mine[-1] + 0.5, color=plotting.GREY, linewidth=0.7)
                top = axes.get_xaxis_transform()
                axes.text(np.mean(mine), 0.98, phase, ha="center", va="top", transform=top)


def _draw_errors(axes: Any, results: Sequence[Result]) -> None:
    for i, result in enumerate(results):
        steps = [m.step for m in result.measured]
        errors = [m.error for m in result.measured]
        label = plotting.name(result.label, 60)
        axes.plot(steps, errors, **plotting.points(i), label=label, markersize=7)
    bounds = sorted({result.bound for result in results})
    for bound in bounds:
        axes.axhline(bound, color=plotting.GREY, linestyle="--")
    axes.set_yscale("log")
    errors = [m.error for result in results for m in result.measured]
    axes.set_ylim(plotting.lowest(errors + bounds) / 3, plotting.highest(errors + bounds) * 3)
    axes.set_ylabel("relative error of the layer's output")
    axes.set_title("Every step against float64 (dashed: the bounds)")
    plotting.legend(axes)
