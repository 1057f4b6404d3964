"""Compares the model of our own kernels with all rows that were measured, and writes both down.

    python -m experiments.simulated.fitting.hopper_errors

It writes benchmarks/hopper_model.json, from which `tools/tables.py` makes a table of
docs/hal.md. It takes less than a minute. `earlier_us` is the time of FlashMLA's order, with the
cache's dtype for its operands: what stood for our kernels before they had models. Prefill is that
of bursts, with a work list that was made before.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.framework.console import track
from experiments.simulated.fitting.fit_hopper import DEVICE
from experiments.simulated.tables.models import kernel_for
from experiments.simulated.tables.predictions import lengths_of
from experiments.speed.prefill_batches import Batch
from mla_jax.hal import Problem, load_profile, simulate
from pallas_kernels.hopper.model import simulated_kernel
from pallas_kernels.hopper.prefill.model import simulated_prefill

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RESULT = BENCHMARKS / "hopper_model.json"
CARDS = {"h200": "H200_SXM", "h100": "H100_SXM5"}
CAPACITY = 16384  # tokens that block tables of the int8 rows reach: those of their longest request
RAGGED_MEAN = 1000  # query tokens of the ragged batch of h200_prefill.json
FITTED, OTHER = "fitted", "other"

Row = dict[str, Any]


def decode_rows(card: str) -> Iterator[tuple[Row, str]]:
    """Yields the measured rows of our decode kernels, and whether constants were fitted on them."""
    rows = json.loads((BENCHMARKS / "measured" / f"{card}_decode.json").read_text())["rows"]
    for i, row in enumerate(row for row in rows if row["variant"] == "hopper"):
        yield row | {"dtype": "bf16"}, FITTED if (CARDS[card], i % 2) == (DEVICE, 0) else OTHER
    result = json.loads((BENCHMARKS / card / "benchmark" / "result.json").read_text())
    wanted = {"implementation": "hopper", "status": "measured", "dtype": "int8"}
    for row in result["rows"]:
        if wanted.items() <= row.items():
            yield row | {"capacity": CAPACITY}, OTHER


def compared(card: str, row: Row, used: str) -> Row:
    """Returns a row with its simulated time beside the measured one."""
    profile, dtype = load_profile(CARDS[card]), row["dtype"]
    lengths = lengths_of({key: str(value) for key, value in row.items()})
    problem = Problem(lengths, row["heads"], row["s_q"], dtype, row["page_size"])
    kernel = simulated_kernel(profile, problem, capacity=row.get("capacity"))
    flashmla = kernel_for(profile, "flashmla_int8" if dtype == "int8" else "flashmla_dense")
    shape = {key: row[key] for key in ("heads", "s_q", "batch", "lengths", "kv_len")}
    return {"card": card, "kernel": kernel.kernel, "rows": used, **shape} | {
        "us": round(row["us"], 2),
        "model_us": round(simulate(profile, problem, kernel).seconds * 1e6, 2),
        "earlier_us": round(simulate(profile, problem, flashmla).seconds * 1e6, 2),
    }


def prefill_rows() -> list[Row]:
    """Returns the measured rows of our prefill kernel."""
    rows = json.loads((BENCHMARKS / "measured" / "h200_prefill.json").read_text())["rows"]
    return [row for row in rows if row["variant"] == "hopper, planned before"]


def compared_prefill(row: Row) -> Row:
    """Returns a row of our prefill kernel with its simulated time beside the measured one."""
    profile = load_profile(CARDS["h200"])
    ragged = row["queries"] is None  # those of the preset "served" of the experiment `prefill`
    batch = Batch(row["requests"], row["queries"] or RAGGED_MEAN, row["prefix"], ragged)
    queries = tuple(batch.query_lens.tolist())
    keys = tuple(n + batch.earlier for n in queries)
    problem = Problem(keys, row["heads"], max(queries))
    kernel = simulated_prefill(profile, problem, queries)
    if round(kernel.flops) != row["flops"]:
        raise ValueError(f"flops = {row['flops']}, wanted {kernel.flops} of {batch.text}")
    shape = {"heads": row["heads"], "batch": batch.text}
    return {"card": "h200", "kernel": "prefill", "rows": OTHER, **shape} | {
        "us": round(row["ms_burst"] * 1e3, 1),
        "model_us": round(simulate(profile, problem, kernel).seconds * 1e6, 1),
    }


def main() -> None:
    rows = [(card, *found) for card in CARDS for found in decode_rows(card)]
    found = [compared(*row) for row in track(rows, "rows")]
    result = {"rows": found + [compared_prefill(row) for row in prefill_rows()]}
    lines = ",\n".join(json.dumps(row) for row in result["rows"])
    RESULT.write_text(f'{{"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
