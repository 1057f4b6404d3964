"""Reads rows of published tables, and predicts each with the model of `mla_jax.hal`.

A table is recognized by its columns: `us` (time of a kernel), `gb_per_s` without `us` (the
bandwidth reached), or `speedup_v11_over_v0` (one int8 kernel on Ascend relative to another). The
kernel is in the column `variant` or in `kernel`. A table without `lengths` has requests of equal
lengths, a row without a page size has a contiguous cache, and one without `dtype` has bf16 unless
the kernel's name says otherwise. `fia_rows` has the tables of CANN's operator. A table is a CSV
file, or a JSON file of rows that this project measured.
"""

import csv
import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from experiments.simulated.kernels import OURS, simulate_named
from experiments.simulated.tables.fia_rows import CONTIGUOUS, fia_report, is_fia
from experiments.simulated.tables.fia_rows import DEVICE as ASCEND_DEVICE
from experiments.simulated.tables.fia_rows import TABLES as FIA_TABLES
from experiments.simulated.tables.models import PREFILL, dtype_of, kernel_for, model_of, profile_of
from experiments.simulated.tables.prefill_model import prefill_seconds
from mla_jax.hal import HardwareProfile, Problem, load_profile, simulate
from mla_jax.hal.profiles.nvidia import CHIP
from mla_jax.hal.profiles.sources import fitted_constants
from mla_jax.hal.simulator.simulate import Report

FOLDER = Path(__file__).parents[3] / "benchmarks" / "published"
MEASURED = FOLDER.parent / "measured"
TABLES = (
    "h200_mla_decode.csv",
    "flashinfer_mla_decode.csv",
    "ascend_int8_v11_over_v0.csv",
    *FIA_TABLES,
    "h100_decode.json",
)
ASCEND_HEADS = 128  # assumed: those of DeepSeek-V3, with one query token
QUANTITIES = ("us", "gb_per_s", "speedup_v11_over_v0")  # published quantities, by precedence

_KERNEL = "variant"  # or "kernel"
_NEEDED = {
    "us": ("device", _KERNEL, "page_size", "batch", "kv_len", "heads", "s_q"),
    "gb_per_s": ("device", _KERNEL, "page_size", "batch", "kv_len", "heads"),
    "speedup_v11_over_v0": ("batch", "kv_len", "cores"),
}

_MEASURED = (*_NEEDED["us"][1:], "lengths", "us")

Row = Mapping[str, str]


def path_of(table: str) -> Path:
    """Returns where a table of `TABLES` is."""
    return (MEASURED if table.endswith(".json") else FOLDER) / table


def read_table(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a table. Raises ValueError unless its columns are those of one."""
    if path.suffix == ".json":
        return _measured_rows(path)
    # Excel writes a byte-order mark in front of the first column's name.
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            rows = list(csv.DictReader(file))
        except csv.Error as error:
            raise ValueError(f"{path.name} is no CSV: {error}") from error
    if not rows:
        raise ValueError(f"{path.name} has no rows")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"{path.name}, row {number} has not one cell for each column")
    try:
        quantity = published_quantity(rows[0])
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    for column in _NEEDED[quantity]:
        if column not in rows[0] and not (column == _KERNEL and "kernel" in rows[0]):
            also = " (or kernel)" if column == _KERNEL else ""
            raise ValueError(
                f"{path.name} has no column {column}{also}, which a table of {quantity} needs"
            )
    return rows


def _measured_rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a file in benchmarks/measured as the rows of a table."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        device, rows = data["device"], data["rows"]
        columns = [*_MEASURED, *(["capacity"] if all("capacity" in row for row in rows) else [])]
        found = [{"device": device, **{c: str(row[c]) for c in columns}} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} has no measured rows: {error!r}") from error
    if not found:
        raise ValueError(f"{path.name} has no rows")
    return found


def published_quantity(row: Row) -> str:
    """Returns the one of QUANTITIES that a row gives."""
    for quantity in QUANTITIES:
        if quantity in row:
            return quantity
    raise ValueError(f"no column of {', '.join(QUANTITIES)} among {', '.join(row)}")


def published_value(row: Row) -> float:
    """Returns the published quantity, which is above 0."""
    quantity = published_quantity(row)
    try:
        value = float(row[quantity])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{quantity} = {row[quantity]!r}, wanted a number above 0")
    return value


def kernel_of(row: Row) -> str:
    """Returns the name of a row's kernel."""
    return row["variant"] if "variant" in row else row["kernel"]


def without_ours[T: Row](rows: Iterable[T]) -> list[T]:
    """Returns the rows of other people's kernels, which have fitted constants of their own."""
    return [row for row in rows if row.get("variant") not in (OURS, f"{OURS}_int8")]


def label_of(row: Row) -> str:
    """Returns a row's kernel with its dtype, if a column says that it is not bf16."""
    if "speedup_v11_over_v0" in row:
        return "V11 over V0"
    dtype = row.get("dtype") or "bf16"
    return kernel_of(row) + f" {dtype}" * (dtype != "bf16")


def note_of(row: Row) -> str:
    """Returns what predicts a row's kernel."""
    if "speedup_v11_over_v0" in row:
        return "its own model"
    return model_of(kernel_of(row), dtype_of(kernel_of(row), row.get("dtype"))).note


def device_of(row: Row) -> str:
    """Returns a row's device, or the one that is assumed."""
    return row.get("device", ASCEND_DEVICE)


def whole_number(row: Row, column: str, default: int | None = None) -> int:
    """Returns a cell that is a whole number above 0. default: of a column that is missing."""
    if column not in row and default is not None:
        return default
    try:
        value = int(row[column])
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"{column} = {row[column]!r}, wanted a whole number above 0")
    return value


def lengths_of(row: Row) -> tuple[int, ...]:
    """Returns the KV lengths of a row; "varlen" draws them as the tables' README says."""
    batch, mean = whole_number(row, "batch"), whole_number(row, "kv_len")
    kind = row.get("lengths", "uniform")
    if kind == "uniform":
        return (mean,) * batch
    if kind != "varlen":
        raise ValueError(f"lengths = {kind!r}, wanted uniform or varlen")
    shortest = whole_number(row, "s_q", 1)
    draw = random.Random(0)
    return tuple(int(max(draw.normalvariate(mean, mean / 2), shortest)) for _ in range(batch))


def problem_of(row: Row, dtype: str) -> Problem:
    """Returns the call of a row."""
    return Problem(
        kv_lens=lengths_of(row),
        heads=whole_number(row, "heads"),
        s_q=whole_number(row, "s_q", 1),
        kv_dtype=dtype,
        page_size=whole_number(row, "page_size") if row["page_size"] else CONTIGUOUS,
    )


def report_of(row: Row, profile: HardwareProfile | None = None) -> Report:
    """Returns the model's report for a row of a table of decode kernels."""
    dtype = dtype_of(kernel_of(row), row.get("dtype"))
    name = model_of(kernel_of(row), dtype).kernels[dtype]
    profile = profile or profile_of(row["device"])
    problem = problem_of(row, dtype)
    if name == OURS:
        capacity = whole_number(row, "capacity") if row.get("capacity") else None
        return simulate_named(profile, problem, name, capacity)
    return simulate(profile, problem, kernel_for(profile, name))


def predict(
    row: Row, profile: HardwareProfile | None = None, single_call: float | None = None
) -> float:
    """Returns the model's prediction of a row's published quantity, in the same unit.

    single_call: the seconds that a call takes longer after the L2 cache was flushed and nothing
        ran before it, as in tables of bandwidth. By default it is the fitted time.
    """
    quantity = published_quantity(row)
    if is_fia(row):
        return fia_report(row, profile).seconds * 1e6
    if quantity == "us":
        return _seconds(row, profile or profile_of(row["device"])) * 1e6
    if quantity == "gb_per_s":
        if single_call is None:
            single_call = fitted_constants()[CHIP]["single_call"]
        report = report_of(row, profile)
        return report.gb_per_s * report.seconds / (report.seconds + single_call)
    profile = profile or load_profile(ASCEND_DEVICE)
    profile = profile.with_values({"core.count": float(whole_number(row, "cores"))})
    problem = Problem(lengths_of(row), ASCEND_HEADS, kv_dtype="int8")
    first, last = (simulate(profile, problem, kernel) for kernel in ("int8-v0", "int8-v11"))
    return first.seconds / last.seconds


def _preparing(profile: HardwareProfile, problem: Problem) -> float:
    """Returns the seconds of a launch that rotates q, or converts all of it for an fp8 cache."""
    values = 576 * (2 + 1) if problem.kv_dtype == "fp8" else 64 * (2 + 2)
    memory = profile["memory.hbm_bandwidth"] * profile["memory.hbm_efficiency"]
    return profile["latency.second_launch"] + problem.batch * problem.rows * values / memory


def _seconds(row: Row, profile: HardwareProfile) -> float:
    """Returns the seconds of a row's call, with the launch that prepares it where there is one."""
    dtype = dtype_of(kernel_of(row), row.get("dtype"))
    model = model_of(kernel_of(row), dtype)
    if model.kernels[dtype] != PREFILL:
        before = _preparing(profile, problem_of(row, dtype)) if model.prepares else 0.0
        return before + report_of(row, profile).seconds
    if row.get("lengths", "uniform") != "uniform":
        raise ValueError(f"lengths = {row['lengths']!r}, wanted uniform for a prefill kernel")
    batch, heads, s_q, kv_len = (
        whole_number(row, column) for column in ("batch", "heads", "s_q", "kv_len")
    )
    return prefill_seconds(profile, batch, heads, s_q, kv_len, dtype)
