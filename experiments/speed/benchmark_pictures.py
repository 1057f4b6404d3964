"""The pictures of a benchmark: roofline, time by batch, and speed over `jnp` by length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.framework import plotting
from experiments.framework.experiment import Output, Row
from experiments.framework.journal import Journal
from experiments.speed.benchmark_comparisons import roofs_of


def draw(output: Output, table: Sequence[Row], journal: Journal) -> None:
    """Draws the roofline with every row, time by batch, and speed over `jnp` by length.

    There is a set of pictures per device, because times of different devices are not comparable.
    The legends also name those that were skipped in all rows.
    """
    skipped = {row["implementation"] for row in table if row["status"] == "skipped"}
    absent = sorted(skipped - {row["implementation"] for row in table if "device" in row})
    devices: dict[str, list[Row]] = {}
    for row in table:
        if row["status"] == "measured":
            devices.setdefault(row["device"], []).append(row)
    for i, (device, rows) in enumerate(devices.items()):
        _draw_device(output, device, rows, roofs_of(table, journal), absent,
                     f"_{i + 1}" if i else "")  # fmt: skip


def _draw_device(
    output: Output,
    device: str,
    rows: Sequence[Row],
    roofs: Sequence[Mapping[str, float]],
    absent: Sequence[str],
    suffix: str,
) -> None:
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    look = {name: _look(i) for i, name in enumerate(names)}
    rated = [row for row in rows if "tflops" in row]
    if rated:
        mine = [roofs[i] for i in sorted({row["session"] for row in rated}) if roofs[i]]
        highest = {key: max(roof[key] for roof in mine) for key in mine[0]} if mine else {}
        title = f"Roofline, {device}" if mine else f"Rates, {device}, which has no ceiling"
        with plotting.figure(output.path(f"roofline{suffix}.png"), title, size=(9, 6)) as axes:
            _draw_roofline(axes, rated, highest, look)
            _name_absent(axes, absent)
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    wanted = {"lengths": "uniform", "dtype": "bf16", "s_q": 1}
    usual = [row for row in rows if all(row[axis] == value for axis, value in wanted.items())]
    if usual:
        _draw_lines(
            output.path(f"time_by_batch{suffix}.png"), f"Time by batch, {device}", usual, look,
            absent, x="batch", y="us", hold="kv_len", y_label="us per launch",
        )  # fmt: skip
    faster = [row for row in usual if row.get("speed_over_jnp") and row["implementation"] != "jnp"]
    if faster:
        _draw_lines(
            output.path(f"speed_by_length{suffix}.png"), f"Speed over jnp under XLA, {device}",
            faster, look, absent, x="kv_len", y="speed_over_jnp", hold="batch",
            y_label="speed over jnp (above 1: faster)",
        )  # fmt: skip


def _look(i: int) -> dict[str, str]:
    """Returns colour and marker of series `i`; a colour is repeated with another marker."""
    colours, markers = plotting.COLOURS, plotting.MARKERS
    cycle, place = divmod(i, len(colours))
    return {"color": colours[place], "marker": markers[(place + cycle) % len(markers)]}


def _name_absent(axes: Any, names: Sequence[str]) -> None:
    """Adds an entry without a mark to the legend, for each name."""
    for name in names:
        axes.plot([], [], " ", label=f"{name}: skipped")


def _draw_roofline(axes: Any, rows: Sequence[Row], roof: Mapping[str, float], look: Any) -> None:
    """Draws each row below the roof of its dtype; {} is no roof."""
    intensity = {id(row): row["tflops"] * 1e3 / row["gb_per_s"] for row in rows}
    ends = [min(intensity.values()) / 2, max(intensity.values()) * 2]
    for dtype, dashes in (("bf16", "-"), ("int8", "--")):
        if roof and any(row["dtype"] == dtype for row in rows):
            knee = roof[dtype] * 1e3 / roof["read"]
            line = sorted({*ends, min(max(knee, ends[0]), ends[1])})
            height = [min(roof[dtype], x * roof["read"] / 1e3) for x in line]
            label = f"highest rates reached, {dtype}"
            axes.plot(line, height, dashes, color=plotting.GREY, label=label)
    for name, style in look.items():
        mine = [row for row in rows if row["implementation"] == name]
        if mine:
            axes.scatter([intensity[id(r)] for r in mine], [r["tflops"] for r in mine], s=22,
                         label=name, **style)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte (KV, q and o counted once)")
    axes.set_ylabel("TFLOP/s")


def _draw_lines(
    path: Path, title: str, rows: Sequence[Row], look: Any, absent: Sequence[str], *, x: str,
    y: str, hold: str, y_label: str,
) -> None:  # fmt: skip
    """Draws a panel per number of heads, with a line per implementation and value of `hold`."""
    page = 64 if any(row["page_size"] == 64 for row in rows) else rows[0]["page_size"]
    rows = [row for row in rows if row["page_size"] == page]
    heads = sorted({row["heads"] for row in rows})
    columns = min(2, len(heads))
    lines = -(-len(heads) // columns)
    size = (4.2 * columns + 2.5, 3.6 * lines + 0.6)
    with plotting.figure(path, title, columns=columns, rows=lines, size=size) as grid:
        panels = np.atleast_1d(grid).ravel()
        for unused in panels[len(heads) :]:
            unused.set_axis_off()
        for axes, count in zip(panels, heads, strict=False):
            mine = [row for row in rows if row["heads"] == count]
            held = sorted({row[hold] for row in mine})
            for name, style in look.items():
                for i, value in enumerate(held):
                    line = sorted(
                        (row[x], row[y])
                        for row in mine
                        if (row["implementation"], row[hold]) == (name, value)
                    )
                    axes.plot(
                        *zip(*line, strict=True) if line else ([], []),
                        linewidth=1.2,
                        markersize=5,
                        linestyle=("-", "--", "-.", ":")[i % 4],
                        label=f"{name}, {hold.replace('_', ' ')} {value}" if line else None,
                        **style,
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sorted({row[x] for row in mine}), sorted({row[x] for row in mine}))
            axes.set_xlabel(x.replace("_", " "))
            axes.set_title(f"{count} heads")
        for axes in panels[::columns]:
            axes.set_ylabel(y_label)
        _name_absent(panels[0], absent)
        labelled = {
            line.get_label(): line
            for axes in panels
            for line in axes.get_legend_handles_labels()[0]
        }
        panels[columns - 1].legend(
            *(labelled.values(), labelled.keys()), fontsize=8, loc="upper left",
            bbox_to_anchor=(1.01, 1),
        )  # fmt: skip
