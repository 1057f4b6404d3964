"""Adds to measured rows their rates and what they are compared with.

A row is compared with the roof of its device, with plain JAX (`jnp`), with published and measured
times of baselines, and with the simulator's prediction.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from experiments.framework.experiment import Row
from experiments.framework.journal import Journal
from experiments.simulated.tables.predictions import FOLDER, MEASURED, read_table
from experiments.speed import timing
from experiments.speed.decode.setup import Setup
from experiments.speed.shapes import (
    Shape,
)
from mla_jax.hal import Problem, profile_of_device, simulate

DEEPSEEK_WIDTHS = (512, 64)  # kv_lora_rank and rope_dim of rates, baselines and predictions
SIMULATED = {  # implementation -> the simulator's kernel of the same structure
    "hopper": "flashmla_dense",
    "hopper multiply": "flashmla_dense",
    "flashinfer_fa2": "flashinfer_fa2",
    "flashinfer_fa3": "flashinfer_fa3",
}


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
    profile = profile_of_device(row["device"])
    if profile is None or "tflops" not in row:
        return row
    row |= beside(shape, row, published.get((profile.name, same), []))
    kernel = SIMULATED.get(row["implementation"])
    if kernel is not None and shape.dtype == "bf16":
        # The page size is that of FlashMLA's kernel, whose times depend on no other.
        problem = Problem(shape.seq_lens, shape.heads, shape.s_q, "bf16", page_size=64)
        row["predicted_us"] = simulate(profile, problem, kernel).seconds * 1e6
        row["prediction_error_percent"] = (row["predicted_us"] / row["us"] - 1) * 100
    return row


def published_times() -> dict[tuple[str, Shape], list[Row]]:
    """Returns the bf16 times of baselines from benchmarks/ with sources, by (device, shape)."""
    tables = [
        (f"published/{path.name}", row)
        for path in sorted(FOLDER.glob("*_mla_decode.csv"))
        for row in read_table(path)
        if "us_separated" in row  # as the tables of GPUs that were timed by this method
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
