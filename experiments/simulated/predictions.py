"""Reads rows of the published tables, and predicts each with the model of `mla_jax.hal`.

A table is recognized by its columns: `us` (time of a kernel), `gb_per_s` without `us` (the
bandwidth reached), or `speedup_v11_over_v0` (one int8 kernel on Ascend relative to another).
`fia_rows` has the tables of CANN's operator.
"""

import csv
import random
from collections.abc import Mapping
from pathlib import Path

from experiments.simulated.fia_rows import DEVICE as ASCEND_DEVICE
from experiments.simulated.fia_rows import TABLES as FIA_TABLES
from experiments.simulated.fia_rows import fia_report, is_fia
from mla_jax.hal import HardwareProfile, Problem, load_profile, simulate
from mla_jax.hal.simulator.simulate import Report

FOLDER = Path(__file__).parents[2] / "benchmarks" / "published"
TABLES = (
    "h200_mla_decode.csv",
    "flashinfer_mla_decode.csv",
    "ascend_int8_v11_over_v0.csv",
    *FIA_TABLES,
)
ASCEND_HEADS = 128  # assumed: those of DeepSeek-V3, with one query token
QUANTITIES = ("us", "gb_per_s", "speedup_v11_over_v0")  # published quantities, by precedence

_NEEDED = {
    "us": ("device", "variant", "lengths", "page_size", "batch", "kv_len", "heads", "s_q"),
    "fia": ("device", "kernel", "page_size", "batch", "kv_len", "heads", "s_q", "us"),
    "gb_per_s": ("device", "variant", "page_size", "batch", "kv_len", "heads"),
    "speedup_v11_over_v0": ("batch", "kv_len", "cores"),
}

Row = Mapping[str, str]


def read_table(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a table. Raises ValueError unless its columns are those of one."""
    with path.open(newline="", encoding="utf-8") as file:
        try:
            rows = list(csv.DictReader(file))
        except csv.Error as error:
            raise ValueError(f"{path.name} is no CSV: {error}") from error
    if not rows:
        raise ValueError(f"{path.name} has no rows")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"{path.name}, row {number} has not one cell for each column")
    quantity = published_quantity(rows[0])
    needed = _NEEDED["fia" if is_fia(rows[0]) else quantity]
    missing = [column for column in needed if column not in rows[0]]
    if missing:
        raise ValueError(
            f"{path.name} has no column {missing[0]}, which a table of {quantity} needs"
        )
    return rows


def published_quantity(row: Row) -> str:
    """Returns the one of QUANTITIES that a row gives."""
    for quantity in QUANTITIES:
        if quantity in row:
            return quantity
    raise ValueError(f"no column of {', '.join(QUANTITIES)} among {', '.join(row)}")


def lengths_of(row: Row) -> tuple[int, ...]:
    """Returns the KV lengths of a row; "varlen" draws them as the tables' README says."""
    batch, mean = int(row["batch"]), int(row["kv_len"])
    kind = row.get("lengths", "uniform")
    if kind == "uniform":
        return (mean,) * batch
    if kind != "varlen":
        raise ValueError(f"lengths = {kind!r}, wanted uniform or varlen")
    shortest = int(row.get("s_q", 1))
    draw = random.Random(0)
    return tuple(int(max(draw.normalvariate(mean, mean / 2), shortest)) for _ in range(batch))


def report_of(row: Row, profile: HardwareProfile | None = None) -> Report:
    """Returns the model's report for a row of a GPU table."""
    profile = profile or load_profile(row["device"])
    problem = Problem(
        kv_lens=lengths_of(row),
        heads=int(row["heads"]),
        s_q=int(row.get("s_q", 1)),
        kv_dtype="fp8" if row["variant"].endswith("fp8kv") else "bf16",
        page_size=int(row["page_size"]),
    )
    return simulate(profile, problem, row["variant"])


def predict(row: Row, profile: HardwareProfile | None = None) -> float:
    """Returns the model's prediction of a row's published quantity, in the same unit."""
    quantity = published_quantity(row)
    if is_fia(row):
        return fia_report(row, profile).seconds * 1e6
    if quantity == "us":
        return report_of(row, profile).seconds * 1e6
    if quantity == "gb_per_s":
        return report_of(row, profile).gb_per_s
    profile = profile or load_profile(ASCEND_DEVICE)
    profile = profile.with_values({"core.count": float(row["cores"])})
    problem = Problem(lengths_of(row), ASCEND_HEADS, kv_dtype="int8")
    first, last = (simulate(profile, problem, kernel) for kernel in ("int8-v0", "int8-v11"))
    return first.seconds / last.seconds
