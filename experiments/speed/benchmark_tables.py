"""The rows of a benchmark in words: on the console, as CSV and as Markdown."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.framework.console import show_table
from experiments.framework.experiment import Row
from experiments.speed.shapes import (
    Shape,
)

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
