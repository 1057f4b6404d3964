"""The errors of the simulator's models of our own kernels, from committed results."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from tables_common import Row, read, table

CARDS = {"h200": "H200", "h100": "H100"}


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


def _number_and_error(rows: Sequence[Row]) -> list[str]:
    return [str(len(rows)), _error(rows, "model_us")]


def _error(rows: Sequence[Row], column: str) -> str:
    if not rows or column not in rows[0]:
        return "-"
    return f"{100 * mean(abs(row[column] / row['us'] - 1) for row in rows):.1f} %"
