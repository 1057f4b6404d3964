"""The errors of the simulator's predictions in docs/hal.md, from committed results."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from tables_common import Row, read, table

CARDS = {"h200": "H200", "h100": "H100"}
PROFILES = Path("mla_jax") / "hal" / "profiles"
# Name in the page, and the largest error that the project wants, in percent.
TABLES = {
    "h200_mla_decode.csv": ("H200, measured, other kernels", 6.0),
    "h100_decode.json": ("H100, measured, other kernels", 9.0),
    "flashinfer_mla_decode.csv": ("H100, FlashInfer", 5.0),
    "ascend_910b_fia_mla_decode.csv": ("Ascend FIA, decode", 15.0),
    "ascend_910b_fia_mla_prefill.csv": ("Ascend FIA, causal prefill", 15.0),
    "ascend_int8_v11_over_v0.csv": ("Ascend int8, V11 over V0", 2.4),
}
OURS = ("H200, our float kernels", 8.0)


def errors(root: Path) -> str:
    """The mean absolute percentage error of each table, over its fitted rows and the others."""
    fits = read(root / PROFILES / "fitted.json")
    found = {name: both for fit in fits.values() for name, both in fit["mape_by_table"].items()}
    ours = read(root / PROFILES / "hopper.json")
    lines = [
        _line_of_table(*TABLES[name], found[name]["fitted_rows"], found[name]["other_rows"])
        for name in TABLES
    ]
    lines.insert(1, _line_of_table(*OURS, ours["mape_fitted_rows"], ours["mape_other_rows"]))
    return table(["table", "fitted half", "other half", "target"], lines, words=1)


def hopper_errors(root: Path) -> str:
    """The mean absolute errors by GPU and kernel, of rows that constants were fitted on or not."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in read(root / "benchmarks" / "hopper_model.json")["rows"]:
        groups.setdefault((row["card"], row["kernel"]), []).append(row)
    lines = [
        [
            CARDS[card],
            f"`{kernel}`",
            *_number_and_error([row for row in rows if row["rows"] == "fitted"]),
            *_number_and_error([row for row in rows if row["rows"] == "other"]),
            _error(rows, "earlier_us"),
        ]
        for (card, kernel), rows in groups.items()
    ]
    header = ["GPU", "kernel", "fitted rows", "error", "other rows", "error", "earlier model"]
    return table(header, lines, words=2)


def portrait(root: Path, card: str) -> str:
    """The errors of the stages that time stamps showed, by shape."""
    result = read(root / "benchmarks" / "measured" / f"{card}_portrait.json")
    errors = (result["mean_error_percent"], result["weighted_error_percent"])
    lines = [
        [
            f"`{result['kernels'][shape]}`",
            shape.split(":")[-1].replace("x", " x "),
            *(f"{error[shape]:.1f} %" for error in errors),
        ]
        for shape in errors[0]
    ]
    header = ["kernel", "heads x requests x tokens", "mean error", "weighted error"]
    found = table(header, lines, words=2)
    return f"{result['gpu']}, {result['date']}, our kernels at {result['commit']}.\n\n{found}"


def _number_and_error(rows: Sequence[Row]) -> list[str]:
    return [str(len(rows)), _error(rows, "model_us")]


def _error(rows: Sequence[Row], column: str) -> str:
    if not rows or column not in rows[0]:
        return "-"
    return f"{100 * mean(abs(row[column] / row['us'] - 1) for row in rows):.1f} %"


def _line_of_table(name: str, target: float, fitted: float, other: float) -> list[str]:
    missed = other > target
    return [name, f"{fitted:.1f} %", f"{other:.1f} %", f"{target:g} %" + ", missed" * missed]
