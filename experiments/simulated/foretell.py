"""Predicts times on devices that the project has no access to, or scores such predictions.

    python -m experiments.simulated.foretell 2026-11-30
    python -m experiments.simulated.foretell --score measured.csv

The first writes benchmarks/predictions/DATE.json, and never writes over a file. The second compares
all predictions with a table that has the columns of benchmarks/published/h200_mla_decode.csv.
`python tools/tables.py` writes the tables of benchmarks/predictions.md from the files.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.framework.results import ROOT, environment
from experiments.simulated.tables.predictions import kernel_of, published_value, read_table
from mla_jax.hal import HardwareProfile, Problem, load_profile, simulate

FOLDER = ROOT / "benchmarks" / "predictions"
# Requests and KV tokens per request, of one query token and of each number of heads.
CALLS = ((1, 16384), (1, 65536), (16, 4096), (64, 1024), (128, 4096), (128, 16384), (256, 4096))
HEADS = (16, 128)
PAGE_SIZE = 64
CASE = ("device", "lengths", "batch", "kv_len", "heads", "s_q")
NO_FASTER = "bound"  # variant of rows that no kernel can beat
FASTEST = "fastest"  # variant of rows that the fastest kernel of a device is expected to take

# What limits every kernel: bytes per second of memory, and operations per second in bf16. Ascend
# 950 has no profile: its numbers of cores, paths from cube to vector cores and latencies are not
# published, and a simulated time would rest on invented ones.
BOUNDS: dict[str, tuple[float, float, str]] = {
    "B200_SXM": (8.0e12, 2.25e15, "NVIDIA: up to 8 TB/s, 2.25 PFLOPS dense in bf16 (HGX B200)"),
    "Ascend950PR": (
        1.6e12, 0.5e15,
        "Huawei Connect 2025: 1.6 TB/s, 1 PFLOPS in fp8; half of it in bf16 is assumed",
    ),
    "Ascend950DT": (
        4.0e12, 0.5e15,
        "Huawei Connect 2025: 4 TB/s, 1 PFLOPS in fp8; half of it in bf16 is assumed",
    ),
    "Ascend910C": (3.2e12, 0.8e15, "two dies of 1.6 TB/s; Huawei Connect 2025: 800 TFLOPS in fp16"),
}  # fmt: skip


def simulated() -> list[tuple[HardwareProfile, str, str]]:
    """Returns (profile, kernel, dtype of the cache) of what is simulated.

    wgmma does not exist on a B200, and a kernel with its successor tcgen05 has no model.
    """
    b200 = load_profile(ROOT / "docs" / "examples" / "b200.json")
    ascend = load_profile("Ascend910C")
    return [
        (b200, "flashinfer_fa2", "bf16"),
        (ascend, "bf16-chunk4", "bf16"),
        (ascend, "amla", "bf16"),
        (ascend, "int8-v11", "int8"),
    ]


def problems(dtype: str) -> Iterator[Problem]:
    """Yields the calls that are predicted."""
    for heads in HEADS:
        for batch, kv_len in CALLS:
            yield Problem((kv_len,) * batch, heads, kv_dtype=dtype, page_size=PAGE_SIZE)


def at_efficiencies(profile: HardwareProfile, call: Problem) -> float:
    """Returns the seconds of a launch that reaches the profile's shares of both peaks."""
    memory = profile["memory.hbm_bandwidth"] * profile["memory.hbm_efficiency"]
    peak = profile.matrix_peak * profile["engine.tensor_efficiency"]
    return profile["latency.launch"] + max(call.bytes / memory, call.flops / peak)


def row_of(device: str, variant: str, problem: Problem, seconds: float) -> dict[str, Any]:
    """Returns a row with the columns of a published table."""
    return {
        "device": device, "variant": variant, "lengths": "uniform", "page_size": PAGE_SIZE,
        "batch": problem.batch, "kv_len": problem.kv_lens[0], "heads": problem.heads,
        "s_q": problem.s_q, "us": float(f"{seconds * 1e6:.4g}"),
    }  # fmt: skip


def predictions() -> list[dict[str, Any]]:
    """Returns all rows: what no kernel can beat, and the kernels that are simulated."""
    rows = []
    for device, (bandwidth, peak, _) in BOUNDS.items():
        for call in problems("bf16"):
            seconds = max(call.bytes / bandwidth, call.flops / peak)
            rows.append(row_of(device, NO_FASTER, call, seconds))
    b200 = load_profile(ROOT / "docs" / "examples" / "b200.json")
    for call in problems("bf16"):
        rows.append(row_of(b200.name, FASTEST, call, at_efficiencies(b200, call)))
    for profile, kernel, dtype in simulated():
        for call in problems(dtype):
            # The model does not split a request over Ascend's cores: few requests say nothing.
            if profile.family == "nvidia" or call.batch >= profile.cores:
                seconds = simulate(profile, call, kernel).seconds
                rows.append(row_of(profile.name, kernel, call, seconds))
    return rows


def write(date: str) -> Path:
    """Writes the predictions of a date; raises FileExistsError if there are some."""
    path = FOLDER / f"{date}.json"
    path.parent.mkdir(exist_ok=True)
    found = {
        "date": date,
        "commit": environment()["versions"]["commit"],
        "sources": {device: source for device, (*_, source) in BOUNDS.items()},
        "rows": predictions(),
    }
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(found, indent=1) + "\n")
    return path


def score(table: Path, folder: Path = FOLDER) -> list[str]:
    """Returns a line per date, device and kernel that a measured table has rows of.

    Raises ValueError if the table has none, or for a cell that is no number.
    """
    measured: dict[tuple[str, ...], dict[str, float]] = {}  # us by variant of each case
    for row in read_table(table):
        case = tuple(row.get(key, "") for key in CASE)
        measured.setdefault(case, {})[kernel_of(row)] = published_value(row)
    lines: list[str] = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        ratios: dict[tuple[str, str], list[float]] = {}
        for row in data["rows"]:
            times = measured.get(tuple(str(row[key]) for key in CASE), {})
            variant = row["variant"]
            us = min(times.values()) if variant in (NO_FASTER, FASTEST) and times else None
            if us := us or times.get(variant):
                ratios.setdefault((row["device"], variant), []).append(row["us"] / us)
        for (device, variant), found in ratios.items():
            if variant == NO_FASTER:
                beaten = sum(ratio > 1 for ratio in found)
                verdict = f"{beaten} of {len(found)} calls are faster"
            else:
                error = 100 * sum(abs(ratio - 1) for ratio in found) / len(found)
                verdict = f"MAPE {error:.1f} % over {len(found)} calls"
            lines.append(f"{data['date']}, {device}, {variant}: {verdict}")
    if not lines:
        raise ValueError(
            f"{table.name} has no row that was predicted: {', '.join(CASE)} must agree"
        )
    return lines


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    try:
        if len(arguments) == 2 and arguments[0] == "--score":
            print("\n".join(score(Path(arguments[1]))))
        elif len(arguments) == 1 and not arguments[0].startswith("-"):
            print(write(arguments[0]))
        else:
            raise ValueError("wanted a date, or --score and a table")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
