"""Tables of errors, of cache sizes and of split plans, from results that were made on a CPU."""

from pathlib import Path
from typing import Any

from tables_common import load, measured, read, result_of, table

from experiments.speed.decode.checks import BOUND

ORDINARY = "token, bf16 P"  # the method of `int8_accuracy` that the int8 kernels follow


def parity(root: Path) -> str:
    """The largest error of each way to compute the layer, per checkpoint."""
    results = parity_results(root)
    ways = list(results[0]["errors"])
    rows = [
        [Path(r["options"]["checkpoint"]).name, *(f"{r['errors'][way]:.1e}" for way in ways)]
        for r in results
    ]
    return table(["checkpoint", *(way.replace("_", " ") for way in ways)], rows)


def parity_results(root: Path) -> list[dict[str, Any]]:
    """The results of `parity`, one per checkpoint."""
    return [read(path) for path in sorted((root / "benchmarks/results/parity").glob("*.json"))]


def demo(root: Path) -> str:
    """What `make demo` finds with `xla`, one line per cache."""
    phases = ("prefill", "decode", "MTP")
    rows = [
        [row["cache"], f"{row['cache_bytes']:,}", *(f"{row[f'{p}_error']:.1e}" for p in phases)]
        for row in load(root, "demo")["rows"]
        if row["implementation"] == "xla"
    ]
    return table(["cache", "bytes of all tokens", *(f"{p} error" for p in phases)], rows)


def summary(root: Path) -> str:
    """The largest error of each kind of comparison, and its bound; a grid may have no int8 rows."""
    layers = parity_results(root)
    kernel = [row["error"] for row in measured(root, "h200")["rows"] if row["variant"] == "hopper"]
    grid = result_of(root, "h200", "benchmark")["rows"]
    quantized = [
        row["error"]
        for row in grid
        if (row["implementation"], row["dtype"], row["status"]) == ("hopper", "int8", "measured")
    ]
    cache = load(root, "int8_accuracy")
    lines = [
        ("layer, float32, on a CPU", "Hugging Face transformers, float32",
         [error for r in layers for error in r["errors"].values()],
         max(r["options"]["tolerance"] for r in layers)),
        ("`hopper`, bfloat16 cache, on an H200", "float64 on the same values",
         kernel, BOUND["bf16"]),
        ("`hopper`, int8 cache, on an H200", "float64 on the same int8 values",
         quantized, BOUND["int8"]),
        ("attention, int8 cache, on a CPU", "float64 on the values before rounding",
         [cache["worst"][ORDINARY]], cache["bound"]),
    ]  # fmt: skip
    rows = [
        [what, other, f"{max(errors):.1e}", f"{bound:.0e}"]
        for what, other, errors, bound in lines
        if errors
    ]
    return table(["what", "compared with", "largest relative error", "bound"], rows, words=2)


def amla(root: Path) -> str:
    """The error of each way to rescale, per distribution."""
    methods = ("multiply", "exponent_add", "no compensation")
    rows = [
        [row["distribution"], f"{row['rescales']}", *(f"{row[method]:.1e}" for method in methods)]
        for row in load(root, "amla_accuracy")["rows"]
    ]
    return table(["keys and queries", "rescales", *methods], rows)


INT8_METHODS = {
    "bfloat16": "bfloat16 cache",
    "tensor": "int8, one scale in all",
    "token": "one scale per token",
    "group": "four scales per token",
    "token, bf16 P": "bf16 P",
    "token, int8 q, bf16 P": "int8 q, bf16 P",
    "token, int14 q, bf16 P": "14-bit q, bf16 P",
    "token, int8 q, int8 P": "int8 q, int8 P",
    "token, rotated": "rotated",
}


def int8_output(root: Path) -> str:
    """The output's error of each method in thousandths; errors over the bound are bold."""
    bound = load(root, "int8_accuracy")["bound"]

    def cell(row: dict[str, Any]) -> str:
        error = f"{1e3 * row['error']:.3g}"
        return f"**{error}**" if row["error"] > bound else error

    return _int8(root, cell)


def int8_lse(root: Path) -> str:
    """The log-sum-exp's error of each method in thousandths."""
    return _int8(root, lambda row: f"{float(f'{1e3 * row["lse_error"]:.2g}'):g}")


def _int8(root: Path, cell: Any) -> str:
    lines: dict[str, dict[str, str]] = {}
    for row in load(root, "int8_accuracy")["rows"]:
        name = row["distribution"] + (" *" if row["hard"] else "")
        lines.setdefault(name, {})[row["method"]] = cell(row)
    rows = [[name, *(line[method] for method in INT8_METHODS)] for name, line in lines.items()]
    return table(["data", *INT8_METHODS.values()], rows)


def cache_size(root: Path) -> str:
    """DeepSeek-V2's bytes per token with each scheme."""
    dtypes = ("bfloat16", "int8", "6-bit")
    found = {(row["scheme"], row["dtype"]): row for row in load(root, "cache_size")["rows"]}
    rows = [
        [
            scheme,
            f"{found[scheme, dtypes[0]]['values']:,}",
            *(f"{found[scheme, dtype]['bytes_per_token']:,.0f}" for dtype in dtypes),
        ]
        for scheme in dict.fromkeys(scheme for scheme, _ in found)
    ]
    header = ["scheme", "values per token and layer"]
    return table([*header, *(f"{dtype}, bytes per token" for dtype in dtypes)], rows)


def cache_steps(root: Path) -> str:
    """The steps from DeepSeek 67B's cache to DeepSeek-V2's."""
    rows = [
        [part["step"], f"{part['bytes_per_token']:,.0f}", f"{part['reduction']:.1%}"]
        for part in load(root, "cache_size")["parts"]
    ]
    return table(["step", "bytes per token", "smaller than DeepSeek 67B's by"], rows)


def split_kv(root: Path) -> str:
    """The efficiency of each planner by its own cost model (that of blocks for the first two)."""
    rows: dict[str, dict[str, Any]] = {}
    for row in load(root, "split_kv")["rows"]:
        model = "fia" if row["planner"] == "fia" else "blocks"
        rows.setdefault(row["batch"], {})[row["planner"]] = f"{row[f'efficiency_{model}']:.0%}"
    planners = list(next(iter(rows.values())))
    return table(["batch", *planners], [[batch, *row.values()] for batch, row in rows.items()])
