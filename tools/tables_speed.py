"""Tables of times on a GPU, from committed results."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from tables_common import (
    CARDS,
    SHAPE,
    Row,
    day,
    measured,
    result_of,
    shape_cells,
    table,
    wrapped,
)

from experiments.speed.best_when import best_when
from experiments.speed.kernel_bench import KERNEL, bar_rows, variant, with_pages
from experiments.speed.shapes import Shape

OURS = "hopper"
BASELINES = {"flashmla": "FlashMLA", "flashinfer_fa3": "FlashInfer"}
COLUMNS = {  # how launches follow each other
    "us": "back to back",
    "us_separated": "with a small dependent kernel between launches, whose time is included",
    "us_sustained": "back to back for 0.15 seconds without a pause",
}
BAR_COLUMNS = "us", "us_separated"  # those that have targets
# The README's rows: (heads, query tokens, requests, lengths, KV tokens per request).
SUMMARY = (
    (16, 1, 1, "uniform", 16384),
    (16, 1, 128, "uniform", 4096),
    (64, 1, 64, "varlen", 1024),
    (64, 1, 128, "uniform", 4096),
    (128, 1, 128, "uniform", 4096),
    (128, 2, 64, "uniform", 16384),
)


def beside_baselines(root: Path, card: str) -> dict[Shape, dict[str, Row]]:
    """The rows of pages of 64 tokens, per shape and by the name of what ran."""
    shapes: dict[Shape, dict[str, Row]] = {}
    for row in measured(root, card)["rows"]:
        shape = Shape.of(row | {"dtype": "bf16"})
        if shape.page_size == 64:
            shapes.setdefault(shape, {})[row["variant"]] = row
    ordered = sorted(shapes.items(), key=lambda item: _order(item[0]))
    return dict(ordered)


def _order(shape: Shape) -> tuple[int, int, int, str]:
    return shape.heads * shape.s_q, shape.batch, shape.kv_len, shape.lengths


def _cells(shape: Shape) -> list[str]:
    return shape_cells(shape.heads, shape.s_q, shape.batch, shape.lengths, shape.kv_len)


def fastest(found: dict[str, Row], column: str) -> float:
    """The time of the faster baseline, in that column."""
    return min(found[name][column] for name in BASELINES)


def summary_rows(root: Path, card: str = "h200") -> list[tuple[Shape, dict[str, Row]]]:
    """The rows of `SUMMARY`. ValueError where the result has no such row."""
    shapes = beside_baselines(root, card)
    found = {
        (shape.heads, shape.s_q, shape.batch, shape.lengths, shape.kv_len): (shape, row)
        for shape, row in shapes.items()
    }
    absent = [key for key in SUMMARY if key not in found]
    if absent:
        raise ValueError(f"benchmarks/measured/{card}_decode.json has no row for {absent}")
    return [found[key] for key in SUMMARY]


def summary(root: Path) -> str:
    """Ours and the baselines, one time each."""
    column = "us_separated"
    lines = [
        [*_cells(shape), *_times(found, column), _speed(found, column)]
        for shape, found in summary_rows(root)
    ]
    header = [*SHAPE, "ours, µs", *(f"{name}, µs" for name in BASELINES.values())]
    found = table([*header, "speed over the faster baseline"], lines, words=0)
    return f"{found}\n\n{wrapped(f'{made(root, "h200")}.')}"


def _speed(found: dict[str, Row], column: str) -> str:
    return f"{fastest(found, column) / found[OURS][column]:.2f}"


def _times(found: dict[str, Row], column: str) -> list[str]:
    return [f"{found[name][column]:.1f}" for name in (OURS, *BASELINES)]


def made(root: Path, card: str) -> str:
    """The GPU, the date and the versions of the decode times."""
    result = measured(root, card)
    versions, rows = result["versions"], result["rows"]
    commits = sorted({row["kernel"] for row in rows if "kernel" in row} or {versions["mla_jax"]})
    libraries = f"FlashMLA {versions['flashmla'].split()[0]}, FlashInfer "
    libraries += versions["flashinfer"].split()[0]
    return (
        f"{CARDS[card]}, {result['date'][:10]}, jax {versions['jax']}, {libraries}, our kernels "
        f"at {' and '.join(commits)}"
    )


def decode(root: Path, card: str, column: str) -> str:
    """Our decode kernels and the baselines, in one of `COLUMNS`."""
    shapes = beside_baselines(root, card)
    versions = len({found[OURS].get("kernel") for found in shapes.values()}) > 1
    lines = []
    for shape, found in shapes.items():
        ours = found[OURS]
        cells = [*_cells(shape), *_times(found, column), _speed(found, column)]
        cells += [f"{ours['gb_per_s']:,.0f}"] if column == "us" else []
        cells += [ours["kernel"]] if versions else []
        lines.append(cells)
    header = [*SHAPE, "ours", *BASELINES.values(), "speed over the faster baseline"]
    header += ["ours, GB/s"] if column == "us" else []
    header += ["our commit"] if versions else []
    caption = (
        f"Microseconds per launch, {COLUMNS[column]}: bfloat16, pages of 64 tokens, "
        f"{made(root, card)}."
    )
    return f"{wrapped(caption)}\n\n{table(header, lines, words=0)}"


def int8_beside_bf16(root: Path, card: str, column: str) -> str:
    """The int8 kernels beside the bf16 ones: pairs of the standard grid, measured on one day."""
    result = result_of(root, card, "benchmark")
    rows = [
        row
        for row in result["rows"]
        if (row["implementation"], row["status"]) == (OURS, "measured")
    ]
    axes = ("heads", "s_q", "batch", "lengths", "kv_len", "page_size")
    found = {(row["dtype"], *(row[axis] for axis in axes)): row for row in rows}
    lines, dates = [], set()
    for (dtype, *shape), int8 in sorted(found.items()):
        bf16 = found.get(("bf16", *shape))
        if dtype != "int8" or bf16 is None or day(result, int8) != day(result, bf16):
            continue
        dates.add(day(result, int8))
        lines.append([
            *shape_cells(*shape[:-1]), f"{bf16[column]:.1f}", f"{int8[column]:.1f}",
            f"{bf16[column] / int8[column]:.2f}",
            *([f"{int8['gb_per_s']:,.0f}", f"{int8['error']:.1e}"] if column == "us" else []),
        ])  # fmt: skip
    header = [*SHAPE, "bf16", "int8", "speed over bf16"]
    header += ["int8, GB/s", "int8, relative error"] if column == "us" else []
    caption = (
        f"Microseconds per launch, {COLUMNS[column]}: `hopper`, pages of 64 tokens, "
        f"{CARDS[card]}, {', '.join(sorted(dates))}, {jax_version(result)}."
    )
    return f"{wrapped(caption)}\n\n{table(header, lines, words=0)}"


def jax_version(result: Row) -> str:
    """`jax 0.11.2`, and our commit where the result has it: `our kernels at 1234567`."""
    versions = [session["environment"]["versions"] for session in result["sessions"]]
    commits = dict.fromkeys(v["commit"] for v in versions if "commit" in v)
    ours = f", our kernels at {' and '.join(commits)}" if commits else ""
    return f"jax {versions[-1]['jax']}{ours}"


def targets(root: Path, card: str) -> str:
    """The targets for the bf16 kernels, and the worst row of each; one that is missed is bold.

    The comparison with the baselines takes times that were measured in one process with theirs.
    Other columns are those of `kernel_bench`, and of the grid for shapes that it does not run.
    """
    rows: list[Row] = []
    for shape, found in beside_baselines(root, card).items():
        ours = found[OURS]
        rates = {"gb_per_s": ours["gb_per_s"]}
        rates |= {f"speed_over_peer_{key}": fastest(found, key) / ours[key] for key in BAR_COLUMNS}
        rows.append(dataclasses.asdict(shape) | {"implementation": KERNEL} | rates)
    known = set()
    for experiment, name in (("kernel_bench", variant("multiply").name), ("benchmark", KERNEL)):
        for row in with_pages(result_of(root, card, experiment)["rows"]):
            shape = dataclasses.asdict(Shape.of(row))
            for column in ("speed_over_jnp", "speed_over_page_64"):
                key = column, *shape.values()
                if row["implementation"] == name and row.get(column) and key not in known:
                    known.add(key)
                    rows.append(shape | {"implementation": KERNEL, column: row[column]})
    lines = []
    for bar in bar_rows(rows, KERNEL):
        if bar["met"] is None:
            continue
        digits = 0 if bar["wanted"] > 100 else 2
        if not bar["met"] and round(bar["worst"], digits) >= bar["wanted"]:
            digits += 1  # so that the number shows why the target is missed
        what = "separated" if bar["column"].endswith("_separated") else ""
        met = "**" * (not bar["met"])
        lines.append([
            bar["bar"] if what in bar["bar"] else f"{bar['bar']}, {what}",
            f"{bar['wanted']:,.{digits}f}",
            f"{met}{bar['worst']:,.{digits}f}{met}",
            f"{bar['rows']}",
            bar["where"].removesuffix(", page 64, bf16").removesuffix(", bf16"),
        ])  # fmt: skip
    return table(["rows that it concerns", "target", "worst row", "rows", "the worst row"], lines)


def options(root: Path, card: str) -> str:
    """The time and the error of the op's options, from `kernel_bench`."""
    result = result_of(root, card, "kernel_bench")
    lines = [
        [cost["options"].removeprefix(f"{KERNEL} "), f"{cost['rows']}",
         f"{cost['time_least']:.2f}", f"{cost['time_most']:.2f}", f"{cost['largest_error']:.1e}"]
        for cost in result["costs"]
    ]  # fmt: skip
    header = ["option", "shapes", "least time ratio", "largest time ratio", "largest error"]
    caption = f"The experiment `kernel_bench` on one {CARDS[card]}, {jax_version(result)}, "
    caption += f"{result['sessions'][-1]['started'][:10]}."
    if result["left"]:
        tasks = len(result["rows"]) + result["left"]
        caption += f" {result['left']} of {tasks} tasks were not run."
    return f"{wrapped(caption)}\n\n{table(header, lines)}"


def classes(root: Path, card: str, folder: str) -> str:
    """The standard grid in classes of shapes: which implementation is fastest and by how much.

    One query token, bf16, equal lengths, pages of 64; the report shows the rest. `folder` is the
    path from the page to the card's folder: "" or one that ends with a slash.
    """
    result = result_of(root, card, "benchmark")
    rows = [row for row in result["rows"] if row["status"] == "measured"]
    usual = {"s_q": 1, "dtype": "bf16", "lengths": "uniform", "page_size": 64}
    found = best_when(r for r in rows if all(r[key] == value for key, value in usual.items()))
    share = "of the ceiling, %"
    has_ceiling = all(c[share] is not None for c in found)  # a CPU has none
    lines = [
        [f"{c['heads']} heads, {c['requests']} x {c['context']}", c["fastest"], str(c["shapes"]),
         *_mean_least_most(c["ours against jnp under XLA"]),
         *([f"{c[share]:.0f}"] if has_ceiling else [])]
        for c in found
    ]  # fmt: skip
    header = ["heads, requests x KV tokens", "fastest", "shapes", "speed over jnp, mean", "least"]
    header += ["largest", *([share] if has_ceiling else [])]
    left = f" {result['left']} were not run." if result["left"] else ""
    caption = (
        f"The grid `{result['preset']}` on one {CARDS[card]}, {jax_version(result)}: {len(rows)} "
        f"rows measured{_dates(result, rows)}.{left} The table has rows of one query token, bf16, "
        "equal lengths and pages of 64 tokens, in classes. Means are geometric. A ceiling is the "
        "highest rate of the session: of a copy, a read, a matmul or a row."
    )
    picture = f"![Roofline of all rows]({folder}benchmark/roofline.png)"
    return f"{wrapped(caption)}\n\n{table(header, lines, words=2)}\n\n{picture}"


def _mean_least_most(words: str) -> list[str]:
    """The numbers of `best_when.ratio_words`, as three cells."""
    numbers = re.findall(r"\d+\.\d+", words)
    return (numbers * 3 if len(numbers) == 1 else [*numbers, "", "", ""])[:3]


def _dates(result: Row, rows: Iterable[Row]) -> str:
    days: dict[str, set[str]] = {}
    for row in rows:
        days.setdefault(day(result, row), set()).add(row["implementation"])
    dates = (f"{day} ({', '.join(sorted(names))})" for day, names in sorted(days.items()))
    return f", {', '.join(dates)}"
