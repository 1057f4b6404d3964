"""Writes the tables of README.md from the results in benchmarks.

    python tools/readme_tables.py            writes them
    python tools/readme_tables.py --check    exits with 1 where the README has something else
    python tools/readme_tables.py --take=DIR takes a benchmark that was made on one of CARDS, too

DIR is the folder of its result.json, as `experiments.launch --experiment=benchmark` leaves it; it
goes to the card's folder in benchmarks with its tables and pictures, in place of an earlier one.

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; `TABLES` says who writes it.
To renew a result, run its experiment and copy its result.json, e.g.

    python -m experiments.launch --experiment=cache_size --output_dir=out
    cp out/cache_size/result.json benchmarks/results/cache_size.json
"""

import dataclasses
import functools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments.speed.best_when import best_when  # noqa: E402
from experiments.speed.kernel_bench import KERNEL, bar_rows, variant, with_pages  # noqa: E402
from experiments.speed.shapes import Shape  # noqa: E402

README = ROOT / "README.md"
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
MEASURED = BENCHMARKS / "measured"  # CARD_decode.json: beside peers, in one process
# A folder of benchmarks, with one an experiment, and what JAX calls the card that it is of.
CARDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
BESIDE = ("flashmla", "flashinfer_fa3")
COLUMNS = ("us", "us_separated")
TAKEN = ("result.json", "*.csv", "*.png")


def parity() -> str:
    """The largest error of each way, by checkpoint."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("parity/*.json"))]
    ways = list(results[0]["errors"])
    rows = [
        [Path(r["options"]["checkpoint"]).name, *(f"{r['errors'][way]:.1e}" for way in ways)]
        for r in results
    ]
    return table(["checkpoint", *(way.replace("_", " ") for way in ways)], rows)


def demo() -> str:
    """What `make demo` finds with `xla`: a line a cache."""
    phases = ("prefill", "decode", "MTP")
    rows = [
        [row["cache"], f"{row['cache_bytes']:,}", *(f"{row[f'{p}_error']:.1e}" for p in phases)]
        for row in load("demo")["rows"]
        if row["implementation"] == "xla"
    ]
    return table(["cache", "bytes of all tokens", *(f"{p} error" for p in phases)], rows)


def cache_size() -> str:
    """DeepSeek-V2's bytes a token under each scheme, and the steps from DeepSeek 67B."""
    result = load("cache_size")
    dtypes = ("bfloat16", "int8", "6-bit")
    found = {(row["scheme"], row["dtype"]): row for row in result["rows"]}
    schemes = list(dict.fromkeys(scheme for scheme, _ in found))
    sizes = [
        [
            scheme,
            f"{found[scheme, dtypes[0]]['values']:,}",
            *(f"{found[scheme, dtype]['bytes_per_token']:,.0f}" for dtype in dtypes),
        ]
        for scheme in schemes
    ]
    steps = [
        [part["step"], f"{part['bytes_per_token']:,.0f}", f"{part['reduction']:.1%}"]
        for part in result["parts"]
    ]
    header = [
        "scheme",
        "values a token and layer",
        *(f"{dtype}, bytes a token" for dtype in dtypes),
    ]
    steps_header = ["from DeepSeek 67B to DeepSeek-V2", "bytes a token", "saved so far"]
    return f"{table(header, sizes)}\n\n{table(steps_header, steps)}"


def amla_accuracy() -> str:
    """Error of each rescaling, by distribution."""
    methods = ("multiply", "exponent_add", "no compensation")
    rows = [
        [row["distribution"], f"{row['rescales']}", *(f"{row[method]:.1e}" for method in methods)]
        for row in load("amla_accuracy")["rows"]
    ]
    return table(["keys and queries", "rescales", *methods], rows)


def int8_accuracy() -> str:
    """Error of output and of lse of each method, by data; those over the bound in bold."""
    result = load("int8_accuracy")
    columns = {
        "bfloat16": "bf16 cache",
        "tensor": "int8, a scale for all",
        "token": "a scale a token",
        "group": "four a token",
        "token, bf16 P": "a token: bf16 P",
        "token, int8 q, bf16 P": "a token: int8 q, bf16 P",
        "token, int14 q, bf16 P": "a token: 14-bit q, bf16 P",
        "token, int8 q, int8 P": "a token: int8 q and P",
        "token, rotated": "a token, rotated",
    }
    lines: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        name = row["distribution"] + (" *" if row["hard"] else "")
        error = f"{1e3 * row['error']:.3g}"
        error = f"**{error}**" if row["error"] > result["bound"] else error
        lines.setdefault(name, {})[row["method"]] = (
            f"{error} / {float(f'{1e3 * row["lse_error"]:.2g}'):g}"
        )
    rows = [[name, *(line[method] for method in columns)] for name, line in lines.items()]
    return table(["output / lse, in 1e-3", *columns.values()], rows)


def split_kv() -> str:
    """Efficiency of each planner by its own cost model (that of blocks for the first two)."""
    rows: dict[str, dict[str, Any]] = {}
    for row in load("split_kv")["rows"]:
        model = "fia" if row["planner"] == "fia" else "blocks"
        rows.setdefault(row["batch"], {})[row["planner"]] = f"{row[f'efficiency_{model}']:.0%}"
    planners = list(next(iter(rows.values())))
    return table(["batch", *planners], [[batch, *row.values()] for batch, row in rows.items()])


def beside_peers(card: str) -> dict[Shape, dict[str, dict[str, Any]]]:
    """Rows by who ran it, of pages of 64."""
    shapes: dict[Shape, dict[str, dict[str, Any]]] = {}
    for row in json.loads((MEASURED / f"{card}_decode.json").read_text())["rows"]:
        shape = Shape.of(row | {"dtype": "bf16"})
        if shape.page_size == 64:
            shapes.setdefault(shape, {})[row["variant"]] = row
    return shapes


def fastest(found: dict[str, dict[str, Any]], column: str) -> float:
    """Of the peers, in that column."""
    return min(found[name][column] for name in BESIDE)


def decode(card: str) -> str:
    """Our kernels beside the CUDA peers, as measured in one process on one card."""
    rows = []
    for shape, found in sorted(
        beside_peers(card).items(),
        key=lambda item: (item[0].heads * item[0].s_q, item[0].batch, item[0].kv_len),
    ):
        ours = found["hopper"]
        each = (ours, *(found[name] for name in BESIDE))
        cells = [f"{x['us']:.1f} / {x['us_separated']:.1f}" for x in each]
        ratio = [f"{fastest(found, key) / ours[key]:.2f}" for key in COLUMNS]
        ragged = "ragged " if shape.lengths == "varlen" else ""
        tokens = f"{shape.s_q} token{'s' * (shape.s_q > 1)}"
        name = f"{shape.heads} heads, {tokens}, {shape.batch} x {ragged}{shape.kv_len}"
        kernel = [ours["kernel"]] if "kernel" in ours else []  # (of one commit all, on the H100)
        rows.append([name, *cells, " / ".join(ratio), f"{ours['gb_per_s']:,.0f}", *kernel])
    header = ["bf16, page size 64", "ours, us", "FlashMLA", "FlashInfer fa3"]
    header += ["speed against the better peer", "our GB/s", "kernel of"]
    return table(header[: len(rows[0])], rows)


def int8_beside_bf16(card: str) -> str:
    """The int8 kernels beside the bf16 ones, from the standard grid: pairs of one day."""
    result = result_of(card, "benchmark")
    rows = [
        row
        for row in result["rows"]
        if (row["implementation"], row["status"]) == ("hopper", "measured")
    ]
    axes = ("heads", "s_q", "batch", "lengths", "kv_len", "page_size")
    found = {(row["dtype"], *(row[axis] for axis in axes)): row for row in rows}
    lines = []
    for (dtype, *shape), int8 in sorted(found.items()):
        bf16 = found.get(("bf16", *shape))
        if dtype != "int8" or bf16 is None or day(result, int8) != day(result, bf16):
            continue
        heads, s_q, batch, lengths, kv_len, _ = shape
        ragged = "ragged " * (lengths == "varlen")
        lines.append([
            f"{heads} heads, {s_q} token{'s' * (s_q > 1)}, {batch} x {ragged}{kv_len}",
            *(f"{row['us']:.1f} / {row['us_separated']:.1f}" for row in (bf16, int8)),
            " / ".join(f"{bf16[key] / int8[key]:.2f}" for key in ("us", "us_separated")),
            f"{int8['gb_per_s']:,.0f}",
            f"{int8['error']:.1e}",
        ])  # fmt: skip
    header = ["page size 64", "bf16, us", "int8, us", "speed against bf16", "int8, GB/s"]
    return table([*header, "error of the kernel"], lines)


def bars(card: str) -> str:
    """What the project wants of the bf16 kernels, and the worst row of each.

    Against peers: of the call that ran both. The rest of `kernel_bench`, and what it did not run of
    the grid.
    """
    rows: list[dict[str, Any]] = []
    for shape, found in beside_peers(card).items():
        ours = found["hopper"]
        rates = {"gb_per_s": ours["gb_per_s"]}
        rates |= {f"speed_over_peer_{key}": fastest(found, key) / ours[key] for key in COLUMNS}
        rows.append(dataclasses.asdict(shape) | {"implementation": KERNEL} | rates)
    known = set()
    for experiment, name in (("kernel_bench", variant("multiply").name), ("benchmark", KERNEL)):
        for row in with_pages(result_of(card, experiment)["rows"]):
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
        what = "separated" if bar["column"].endswith("_separated") else ""
        met = "**" * (not bar["met"])
        lines.append([
            bar["bar"] if what in bar["bar"] else f"{bar['bar']}, {what}",
            f"{bar['wanted']:,.{digits}f}",
            f"{met}{bar['worst']:,.{digits}f}{met}",
            f"{bar['rows']}",
            bar["where"].removesuffix(", page 64, bf16").removesuffix(", bf16"),
        ])  # fmt: skip
    return table(["bf16", "wanted", "worst row", "rows", "which it is"], lines)


def options(card: str) -> str:
    """What the op's options cost, from `kernel_bench`."""
    result = result_of(card, "kernel_bench")
    lines = [
        [cost["options"].removeprefix(f"{KERNEL} "), f"{cost['rows']}",
         f"{cost['time_least']:.2f} to {cost['time_most']:.2f}", f"{cost['largest_error']:.1e}"]
        for cost in result["costs"]
    ]  # fmt: skip
    found = table(["options", "shapes", "time", "largest error"], lines)
    if not result["left"]:
        return found
    tasks = len(result["rows"]) + result["left"]
    return f"{found}\n\n({result['left']} of {tasks} tasks were not run.)"


def classes(card: str) -> str:
    """Classes of shapes of the standard grid, who is fastest and by how much.

    One token, bf16, equal lengths, pages of 64; the rest is in the report.
    """
    result = result_of(card, "benchmark")
    rows = [row for row in result["rows"] if row["status"] == "measured"]
    usual = {"s_q": 1, "dtype": "bf16", "lengths": "uniform", "page_size": 64}
    found = best_when(r for r in rows if all(r[key] == value for key, value in usual.items()))
    baseline, share = "ours against jnp under XLA", "of the ceiling, %"
    has_ceiling = all(c[share] is not None for c in found)  # a CPU has none
    lines = [
        [f"{c['heads']} heads, {c['requests']} x {c['context']}", str(c["shapes"]), c["fastest"],
         c[baseline], *([f"{c[share]:.0f} %"] if has_ceiling else [])]
        for c in found
    ]  # fmt: skip
    header = ["heads, requests x KV tokens", "shapes", "fastest", baseline]
    header += ["of the ceiling"] if has_ceiling else []
    days: dict[str, set[str]] = {}
    for row in rows:
        days.setdefault(day(result, row), set()).add(row["implementation"])
    dates = ", ".join(f"{day} ({', '.join(sorted(names))})" for day, names in sorted(days.items()))
    left = f"; {result['left']} were not run" if result["left"] else ""
    picture = BENCHMARKS / card / "benchmark" / "roofline.png"
    return (
        f"The grid `{result['preset']}` on one {CARDS[card]}, jax "
        f"{result['sessions'][-1]['environment']['versions']['jax']}, {dates}: {len(rows)} rows "
        f"measured{left}. Of one token, bf16, equal lengths and pages of 64, in classes; ratios of "
        "speed are geometric means (least to largest), a ceiling is the card's own read or matmul "
        f"rate in the same run.\n\n{table(header, lines)}\n\n"
        f"![Roofline of all rows]({picture.relative_to(README.parent).as_posix()})"
    )


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "h100_decode": functools.partial(decode, "h100"),
    "h200_decode": functools.partial(decode, "h200"),
    "h200_bars": functools.partial(bars, "h200"),
    "h200_options": functools.partial(options, "h200"),
    "h200_int8": functools.partial(int8_beside_bf16, "h200"),
    "h200_benchmark": functools.partial(classes, "h200"),
    "parity": parity,
    "cache_size": cache_size,
    "amla_accuracy": amla_accuracy,
    "int8_accuracy": int8_accuracy,
    "split_kv": split_kv,
}


def result_of(card: str, experiment: str) -> dict[str, Any]:
    """The committed result of an experiment on a card."""
    return json.loads((BENCHMARKS / card / experiment / "result.json").read_text(encoding="utf-8"))


def day(result: dict[str, Any], row: dict[str, Any]) -> str:
    """When a row of a benchmark was measured."""
    return result["sessions"][row["session"]]["started"][:10]


def load(name: str) -> dict[str, Any]:
    """The result of that experiment."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(text: str) -> str:
    """The text with every table of `TABLES` in its place. KeyError where a place is missing."""
    for name, write in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise KeyError(f"no {begin} ... {end}")
        block = "\n".join(filter(None, (begin, write(), end)))
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def take(source: Path) -> None:
    """Copies a result to its card's folder. ValueError where it is none, or not of one of CARDS."""
    path = source / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        measured = [row for row in result["rows"] if row["status"] == "measured"]
        devices = sorted({str(row["device"]) for row in measured})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of a benchmark: {error!r}") from error
    cards = [card for card, device in CARDS.items() if [device] == devices]
    if not cards:
        wanted = " or ".join(CARDS.values())
        raise ValueError(f"{path}: rows must be measured on {wanted}, got {devices or 'none'}")
    target = BENCHMARKS / cards[0] / result["experiment"]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for pattern in TAKEN:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, target / file.name)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    for argument in arguments:
        if argument.startswith("--take="):
            try:
                take(Path(argument.removeprefix("--take=")))
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
    text = README.read_text(encoding="utf-8")
    filled = fill(text)
    if "--check" in arguments:
        return int(filled != text)
    README.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
