"""Times decode attention on a grid of shapes: all implementations here, plain JAX, and baselines.

    python -m experiments.launch --experiment=benchmark --preset=standard --output_dir=out

A second run with the same folder resumes where the first one ended. --seconds limits the time. A
run that was killed leaves its rows in rows.jsonl, and --collect makes a result of them on any
machine. Each row also has published and measured times of baselines (benchmarks/) and the
simulator's prediction for the device. docs/benchmarking.md explains the columns.
"""

import csv
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.framework import plotting
from experiments.framework.console import say, show_table
from experiments.framework.experiment import InputError, Outcome, Output, Row
from experiments.framework.implementations import chosen
from experiments.framework.journal import Journal
from experiments.framework.options import flag, seed_flag
from experiments.framework.results import write_whole
from experiments.simulated.predictions import FOLDER, read_table
from experiments.speed import baselines, timing
from experiments.speed.best_when import AXES, PEERS
from experiments.speed.decode_bench import Contender, Setup, contender
from experiments.speed.decode_runner import Runner, Task
from experiments.speed.shapes import (
    DTYPES,
    LENGTHS,
    PAGE_SIZES,
    PRESETS,
    Shape,
    preset,
)
from mla_jax.hal import PROFILES, HardwareProfile, Problem, simulate

SUMMARY = "times decode attention on a grid, beside plain JAX, baselines and the simulator"

DEEPSEEK_WIDTHS = (512, 64)  # kv_lora_rank and rope_dim of rates, baselines and predictions
MEASURED = FOLDER.parent / "measured"  # CARD_decode.json: hopper and baselines of one process
SIMULATED = {  # implementation -> the simulator's kernel of the same structure
    "hopper": "flashmla_dense",
    "hopper multiply": "flashmla_dense",
    "flashinfer_fa2": "flashinfer_fa2",
    "flashinfer_fa3": "flashinfer_fa3",
}


@dataclasses.dataclass(frozen=True)
class Options:
    preset: str | None = flag(
        None, "set of rows; by default tiny on a CPU, else quick", choices=tuple(PRESETS)
    )
    heads: tuple[int, ...] = flag((), "only rows with these values", lower_bound=1)
    s_q: tuple[int, ...] = flag((), "only rows with these values", lower_bound=1)
    batch: tuple[int, ...] = flag((), "only rows with these values", lower_bound=1)
    kv_len: tuple[int, ...] = flag((), "only rows with these values", lower_bound=1)
    lengths: tuple[str, ...] = flag((), "only rows with these values", choices=LENGTHS)
    page_size: tuple[int, ...] = flag((), "only rows with these values", choices=PAGE_SIZES)
    dtype: tuple[str, ...] = flag((), "only rows with these values, of the cache", choices=DTYPES)
    implementations: tuple[str, ...] = flag(
        (), "which to run; jnp is plain JAX over contiguous KV; by default all"
    )
    peers: tuple[str, ...] = flag(PEERS, "baselines to run if installed", choices=PEERS)
    seconds: float = flag(0.0, "time after which no work starts; 0: no limit", lower_bound=0)
    collect: bool = flag(False, "run nothing, make a result of the rows in the folder")
    memory_gib: float = flag(0.0, "for caches; 0 is 60 % of the device's", lower_bound=0)
    kv_lora_rank: int = flag(512, "of the cache", lower_bound=16)
    rope_dim: int = flag(64, "of the cache", lower_bound=16)
    seed: int = seed_flag("of all random numbers")


def run(options: Options, output: Output) -> Outcome:
    name = options.preset or ("tiny" if jax.default_backend() == "cpu" else "quick")
    rows = filtered(preset(name), options)
    if not rows:
        raise InputError(f"--preset={name} has no row that passes the filters")
    setup = Setup.here(options.memory_gib, options.kv_lora_rank, options.rope_dim, options.seed)
    reason: str | None = "nothing was run"
    if options.collect:
        journal = collected(output)
        who_ran = sorted({who for _, who in journal.rows} - set(PEERS))
        left = missing(journal, tasks_of(rows, [contender(who) for who in who_ran], name))
    else:
        tasks = tasks_of(rows, contenders_of(options.implementations), name)
        journal = Journal.open(output.rows_path())
        runner = Runner(setup, journal, options.seconds)
        journal.begin(measured_ceilings(), setup.widths)
        reason = baselines.unavailable() if options.peers else "none was requested"
        say(f"baselines: {', '.join(options.peers) if reason is None else reason}")
        left = runner.run(tasks, options.peers if reason is None else ())
    table = finished(journal, setup)
    show(table)
    write_csv(output.path("benchmark.csv"), table)
    write_whole(output.path("benchmark.md"), markdown(table))
    draw(output, table, journal)
    if not options.collect:
        journal.end()
    counts = {s: sum(r["status"] == s for r in table) for s in ("measured", "failed", "skipped")}
    counted = ", ".join(f"{count} {status}" for status, count in counts.items())
    remaining = f", {left} left for another run" if left else ""
    return Outcome(
        passed=counts["measured"] > 0 and not counts["failed"],
        summary=f"{counted}{remaining}: {best_words(table)}",
        rows=table,
        headline={
            "preset": name,
            "left": left,
            "counts": counts,
            "peers_missing": reason,
            "sessions": journal.sessions,
        },
        made=journal.made,
    )


def collected(output: Output) -> Journal:
    """Reads the rows in the folder."""
    if not (output.folder / "rows.jsonl").exists():
        raise InputError(f"--collect: there is no rows.jsonl in {output.folder}")
    journal = Journal.open(output.rows_path(), skipped=True)
    if not journal.sessions:
        raise InputError(f"--collect: there is no session in {journal.path}")
    return journal


def missing(journal: Journal, tasks: Iterable[Task]) -> int:
    """Returns how many tasks have no row."""
    return sum((row, who.name) not in journal.rows for row, who in tasks)


def filtered(rows: Iterable[Shape], options: Options) -> list[Shape]:
    """Returns the rows that pass every filter."""
    wanted = {axis: getattr(options, axis) for axis in AXES if getattr(options, axis)}
    return [row for row in rows if all(getattr(row, a) in v for a, v in wanted.items())]


def contenders_of(names: Sequence[str]) -> list[Contender]:
    """Returns those named, or all that can run here and `jnp`. Raises InputError otherwise."""
    ours = [name for name in names if name != "jnp"]
    found = chosen(tuple(ours)) if ours or not names else []
    return [contender(name) for name in [*found, *(["jnp"] if not names or "jnp" in names else [])]]


def tasks_of(rows: Sequence[Shape], contenders: Sequence[Contender], preset: str) -> list[Task]:
    """Returns the pairs of a row and a contender to run.

    `jnp` has no pages and reads bf16, so that it runs bf16 rows with one page size. In `standard`
    a kernel runs every row. Plain JAX then only runs the rows of one token, bf16 and pages of 64.
    """
    has_kernel = any(who.separated for who in contenders)
    first: dict[Shape, int] = {}
    for row in rows:
        key = dataclasses.replace(row, page_size=64)
        if row.page_size == 64 or key not in rows:
            first.setdefault(row.without_pages, row.page_size)

    def runs(row: Shape, who: Contender) -> bool:
        if who.implementation is None and (
            row.dtype != "bf16" or row.page_size != first.get(row.without_pages)
        ):
            return False
        usual = (row.s_q, row.page_size, row.dtype) == (1, 64, "bf16")
        return who.separated or usual or not (preset == "standard" and has_kernel)

    return [(row, who) for row in rows for who in contenders if runs(row, who)]


def measured_ceilings() -> dict[str, float]:
    """Measures rates of this device with XLA, {} on a CPU.

    They are copy and read (GB/s), matmul (TFLOPS) and matmul_int8 (TOPS). On a CPU no rate of one
    program bounds another's: its caches are faster than its memory, its vector units differ by
    dtype, and a launch may use only some of its threads.
    """
    return {} if jax.default_backend() == "cpu" else timing.ceilings()


def finished(journal: Journal, setup: Setup) -> list[Row]:
    """Returns the journal's rows in order, with their rates and what they are compared with."""
    rows = sorted(journal.rows.values(), key=lambda r: (Shape.of(r), r["implementation"]))
    rank, rope = journal.widths or setup.widths
    setup = dataclasses.replace(setup, kv_lora_rank=rank, rope_dim=rope)
    table = [_with_rates(dict(row), journal, setup) for row in rows]
    baseline = {
        (row["device"], Shape.of(row).without_pages): row["us"]
        for row in table
        if (row["implementation"], row["status"]) == ("jnp", "measured")
    }
    roofs = roofs_of(table, journal)
    published = published_times()
    return [
        _compared(row, roofs[row["session"]], baseline, published) if "device" in row else row
        for row in table
    ]


def _with_rates(row: Row, journal: Journal, setup: Setup) -> Row:
    """Adds the device and, with DeepSeek's widths, the rates to a measured row."""
    if row["status"] != "measured":
        return row
    shape = Shape.of(row)
    row["device"] = journal.sessions[row["session"]]["environment"]["devices"][0]
    if setup.widths == DEEPSEEK_WIDTHS:
        row["tflops"], row["gb_per_s"] = timing.decode_rates(
            row["us"], shape.seq_lens, heads=shape.heads, seq_q=shape.s_q,
            token_bytes=setup.token_bytes(shape.dtype),
        )  # fmt: skip
    return row


def roofs_of(table: Iterable[Row], journal: Journal) -> list[dict[str, float]]:
    """Returns the roof per session: `read` (GB/s), `bf16` and `int8` (TFLOPS); {} without ceilings.

    A roof is the highest rate that anything reached in the session, whether a probe of
    `measured_ceilings` or a row. No row can exceed it.
    """
    roofs: list[dict[str, float]] = []
    for session in journal.sessions:
        rates, backend = session["ceilings"], session["environment"].get("backend")
        if backend == "cpu" or "read" not in rates or "matmul" not in rates:
            roofs.append({})
            continue
        read = max(rates["read"], rates.get("copy", 0.0))
        int8 = max(rates["matmul"], rates.get("matmul_int8", 0.0))
        roofs.append({"read": read, "bf16": rates["matmul"], "int8": int8})
    for row in table:
        if roofs and "tflops" in row and (roof := roofs[row["session"]]):
            roof["read"] = max(roof["read"], row["gb_per_s"])
            # With an int8 cache some products are int8 and some bf16; the faster dtype bounds it.
            for dtype in ("bf16", "int8") if row["dtype"] == "bf16" else ("int8",):
                roof[dtype] = max(roof[dtype], row["tflops"])
    return roofs


def _compared(
    row: Row,
    roof: Mapping[str, float],
    baseline: Mapping[tuple[str, Shape], float],
    published: Mapping[tuple, list[Row]],
) -> Row:
    """Adds to a measured row what it is compared with: roof, `jnp`, baselines, the simulator."""
    shape = Shape.of(row)
    if roof and "tflops" in row:
        row["of_read"] = row["gb_per_s"] / roof["read"]
        row["of_matmul"] = row["tflops"] / roof[shape.dtype]
        row["of_ceiling"] = max(row["of_read"], row["of_matmul"])
    same = dataclasses.replace(shape, dtype="bf16")
    if (row["device"], same.without_pages) in baseline:
        row["speed_over_jnp"] = baseline[row["device"], same.without_pages] / row["us"]
    profile = profile_of(row["device"])
    if profile is None or "tflops" not in row:
        return row
    row |= beside(shape, row, published.get((profile.name, same), []))
    kernel = SIMULATED.get(row["implementation"])
    if kernel is not None and shape.dtype == "bf16":
        problem = Problem(shape.seq_lens, shape.heads, shape.s_q, "bf16", shape.page_size)
        row["predicted_us"] = simulate(profile, problem, kernel).seconds * 1e6
        row["prediction_error_percent"] = (row["predicted_us"] / row["us"] - 1) * 100
    return row


def profile_of(device_kind: str) -> HardwareProfile | None:
    """Returns the simulator's profile for JAX's name of a device ("NVIDIA H200"), or None."""
    words = set(re.split(r"[^A-Za-z0-9]+", device_kind.upper()))
    for profile in PROFILES.values():
        model, *rest = profile.name.upper().split("_")
        sizes = [part for part in rest if part.endswith("GB")]
        if profile.family == "nvidia" and model in words and set(sizes) <= words:
            return profile
    return None


def published_times() -> dict[tuple[str, Shape], list[Row]]:
    """Returns the bf16 times of baselines from benchmarks/ with sources, by (device, shape)."""
    tables = [
        (f"published/{path.name}", row)
        for path in sorted(FOLDER.glob("*_mla_decode.csv"))
        for row in read_table(path)
        if "us" in row
    ]
    for path in sorted(MEASURED.glob("*_decode.json")):
        committed = json.loads(path.read_text())
        tables += [
            (f"measured/{path.name}", {"device": committed["device"], **row})
            for row in committed["rows"]
            if row["variant"] not in ("hopper", "xla")
        ]
    found: dict[tuple[str, Shape], list[Row]] = {}
    for source, row in tables:
        if row["variant"].endswith("fp8kv"):
            continue
        shape = Shape(
            *(int(row["batch"]), "bf16", int(row["heads"]), int(row["s_q"])),
            *(int(row["page_size"]), row["lengths"], int(row["kv_len"])),
        )
        times = {key: float(row[key]) for key in ("us", "us_separated")}
        entry = {"variant": row["variant"], "source": f"benchmarks/{source}", **times}
        found.setdefault((row["device"], shape), []).append(entry)
    return found


def beside(shape: Shape, row: Row, known: Sequence[Row]) -> Row:
    """Returns the fastest known baseline and our speed over it; int8 rows get a bf16 baseline."""
    columns: Row = {}
    for key in ("us", "us_separated"):
        if known and row.get(key):
            best = min(known, key=lambda baseline: baseline[key])
            columns[f"peer_{key}"] = best[key]
            columns[f"speed_over_peer_{key}"] = best[key] / row[key]
            columns[f"peer_{key}_source"] = f"{best['variant']}, {best['source']}"
    return columns


COLUMNS = {
    "implementation": "implementation",
    "us": "us",
    "us_separated": "separated",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
    "of_ceiling": "of ceiling",
    "speed_over_jnp": "x jnp",
    "peer_us": "peer us",
    "speed_over_peer_us": "x peer",
    "predicted_us": "predicted us",
    "prediction_error_percent": "error %",
    "error": "o error",
}
SHOWN = (  # the columns of the table on the console
    *("implementation", "us", "us_separated", "gb_per_s", "of_ceiling"),
    *("speed_over_jnp", "speed_over_peer_us"),
)


def show(table: Sequence[Row]) -> None:
    """Prints the measured rows, and why others failed or were skipped."""
    rows = [{"row": Shape.of(row).label, **row} for row in table]
    measured = [row for row in rows if row["status"] == "measured"]
    used = {k: COLUMNS[k] for k in SHOWN if any(row.get(k) is not None for row in measured)}
    show_table("Decode attention", measured, {"row": "row", **used})
    for status in ("failed", "skipped"):
        others = [row for row in rows if row["status"] == status]
        reasons: dict[tuple[str, str], int] = {}
        for row in others:
            key = row["implementation"], row["reason"]
            reasons[key] = reasons.get(key, 0) + 1
        if reasons:
            show_table(
                status.capitalize(),
                [{"who": w, "rows": n, "reason": r} for (w, r), n in reasons.items()],
            )


def write_csv(path: Path, table: Sequence[Row]) -> None:
    """Writes all rows with all columns."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)


def markdown(table: Sequence[Row]) -> str:
    """Returns the measured rows as a Markdown table, the others as a list of reasons."""
    measured = [row for row in table if row["status"] == "measured"]
    used = {k: v for k, v in COLUMNS.items() if any(row.get(k) is not None for row in measured)}
    lines = [
        f"| row | {' | '.join(used.values())} |",
        f"| --- | --- |{' ---: |' * (len(used) - 1)}",
        *(
            f"| {Shape.of(row).label} | {' | '.join(_cell(row.get(key)) for key in used)} |"
            for row in measured
        ),
    ]
    reasons = dict.fromkeys(
        f"- {row['status']}: {row['implementation']}, {Shape.of(row).label}: {row['reason']}"
        for row in table
        if row["status"] != "measured"
    )
    return "\n".join([*lines, "", *reasons]).rstrip() + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:,.4g}"
    return str(value)


def best_words(table: Sequence[Row]) -> str:
    """Returns how often each was fastest, among shapes with two or more times on one device."""
    by_shape: dict[tuple[str, Shape], list[Row]] = {}
    for row in table:
        if row["status"] == "measured":
            by_shape.setdefault((row["device"], Shape.of(row)), []).append(row)
    races = [rows for rows in by_shape.values() if len(rows) > 1]
    if not races:
        return (
            f"{len(by_shape)} shapes, no two times of one" if by_shape else "nothing was measured"
        )
    fastest: dict[str, int] = {}
    for rows in races:
        name = min(rows, key=lambda row: row["us"])["implementation"]
        fastest[name] = fastest.get(name, 0) + 1
    ordered = sorted(fastest.items(), key=lambda item: -item[1])
    return f"fastest of {len(races)} shapes: {', '.join(f'{w} {n}' for w, n in ordered)}"


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
