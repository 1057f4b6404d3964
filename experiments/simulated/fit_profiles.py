"""Fits the constants of the devices that have published measurements.

    python -m experiments.simulated.fit_profiles

Every second row is used for the fit, and the others only for a report. The constants are those that
a datasheet does not give: efficiencies, latencies, and how fast one core copies. They are the same
for all rows and variants of a device. The result is written to mla_jax/hal/profiles/fitted.json,
which the profiles read. scipy, which jax depends on, computes the least squares of log errors.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import mla_jax.hal
from experiments.simulated.predictions import (
    ASCEND_DEVICE,
    FOLDER,
    Row,
    predict,
    published_quantity,
    read_table,
)
from mla_jax.hal import HardwareProfile, Number, Problem, load_profile, simulate

Bounds = dict[str, tuple[float, float, float]]  # field -> (lowest, start, highest)

GPU: Bounds = {
    "memory.hbm_efficiency": (0.7, 0.9, 0.95),
    "engine.tensor_efficiency": (0.5, 0.75, 0.9),
    "engine.cuda_efficiency": (0.3, 0.8, 1.0),
    "engine.shared_efficiency": (0.5, 0.85, 1.0),
    "engine.copy": (1e10, 7e10, 1.5e11),
    "engine.store": (5e9, 4e10, 1e11),
    "latency.launch": (1e-6, 4e-6, 1e-5),
    "latency.memory": (3e-7, 5e-7, 1.2e-6),
    "latency.barrier": (1e-8, 2.5e-8, 3e-7),
    "latency.l2": (1e-7, 2.2e-7, 6e-7),
    "latency.grid_sync": (5e-7, 2.5e-6, 1.5e-5),
}
ASCEND: Bounds = {
    "latency.launch": (3e-6, 6e-6, 1.2e-5),
    "latency.job": (1e-7, 5e-7, 3e-6),
    "latency.flag": (1e-8, 5e-8, 5e-7),
    "latency.cross_core": (1e-7, 5e-7, 3e-6),
    "engine.dma_scale": (0.3, 1.0, 2.0),
}
DEVICES: dict[str, tuple[str, Bounds]] = {
    "H200_SXM": (
        "h200_mla_decode.csv",
        GPU
        | {
            "latency.second_launch": (1e-6, 3e-6, 1e-5),
            "engine.widen": (1.0, 3.4, 16.0),
        },
    ),
    "H100_SXM5": ("flashinfer_mla_decode.csv", GPU),
    ASCEND_DEVICE: ("ascend_int8_v11_over_v0.csv", ASCEND),
}

# Numbers published in text and not in a table: chunk 4 over chunk 1 with int8 and one request, and
# AMLA's share of the peak.
CHUNK_GAIN = {4096: 1.045, 2048: 1.092}
AMLA_SHARE = 0.868
ANCHOR_WEIGHT = 1.7  # single numbers weigh more, so that they agree within 2 and 3 points


def changed(profile: HardwareProfile, values: dict[str, float]) -> HardwareProfile:
    """Returns a profile with other constants."""
    numbers = dict(profile.numbers)
    for field, value in values.items():
        numbers[field] = Number(value, numbers[field].unit, "being fitted", "fitted")
    return dataclasses.replace(profile, numbers=numbers)


def ascend_anchors(profile: HardwareProfile) -> list[tuple[str, float, float]]:
    """Returns (what, model, published) for the numbers that the sources give in text."""
    found = []
    for kv_len, gain in CHUNK_GAIN.items():
        problem = Problem((kv_len,), 128, kv_dtype="int8")
        one, four = (simulate(profile, problem, k).seconds for k in ("int8-chunk1", "int8-chunk4"))
        found.append((f"chunk 4 over chunk 1, kv {kv_len}", one / four, gain))
    found.append(("AMLA, share of the cube's peak", amla_share(profile), AMLA_SHARE))
    return found


def amla_share(profile: HardwareProfile) -> float:
    """Returns AMLA's share of the peak for one request per core, of 256 rows and 16384 tokens."""
    return simulate(profile, Problem((16384,) * profile.cores, 128, 2), "amla").utilisation


def log_errors(profile: HardwareProfile, rows: Sequence[Row]) -> np.ndarray:
    """Returns ln(model / published) of each row."""
    pairs = ((predict(row, profile), float(row[published_quantity(row)])) for row in rows)
    return np.array([math.log(model / published) for model, published in pairs])


def fit(device: str, rows: Sequence[Row], bounds: Bounds) -> dict[str, float]:
    """Returns the constants that fit `rows` best; large errors count less than their squares."""
    # This takes a second to import, and `published` imports this module for other functions.
    from scipy.optimize import least_squares

    start = load_profile(device)

    def residuals(x: np.ndarray) -> np.ndarray:
        profile = changed(start, dict(zip(bounds, np.exp(x).tolist(), strict=True)))
        errors = log_errors(profile, rows)
        if device == ASCEND_DEVICE:
            anchors = [ANCHOR_WEIGHT * math.log(m / said) for _, m, said in ascend_anchors(profile)]
            errors = np.concatenate([errors, anchors])
        return errors

    low, first, high = (np.log(column) for column in zip(*bounds.values(), strict=True))
    found = least_squares(residuals, first, bounds=(low, high), loss="soft_l1", f_scale=0.08,
                          diff_step=1e-2 / np.maximum(np.abs(first), 1), max_nfev=25,
                          x_scale=0.3)  # fmt: skip
    return {field: float(f"{math.exp(v):.4g}") for field, v in zip(bounds, found.x, strict=True)}


def mape(errors: np.ndarray) -> float:
    """Returns the mean absolute percentage error."""
    return float(np.mean(np.abs(np.exp(errors) - 1))) * 100


def main(devices: Sequence[str]) -> None:
    path = Path(mla_jax.hal.__file__).parent / "profiles" / "fitted.json"
    fitted = json.loads(path.read_text())
    for device in devices or DEVICES:
        table, bounds = DEVICES[device]
        rows = read_table(FOLDER / table)
        half, other = rows[::2], rows[1::2]
        constants = fit(device, half, bounds)
        profile = changed(load_profile(device), constants)
        fitted[device] = {
            "rows": f"every second row of benchmarks/published/{table}",
            "constants": constants,
            "mape_fitted_rows": round(mape(log_errors(profile, half)), 2),
            "mape_other_rows": round(mape(log_errors(profile, other)), 2),
        }
        print(device, json.dumps(fitted[device], indent=2))
        path.write_text(json.dumps(fitted, indent=2) + "\n")
        if device == ASCEND_DEVICE:
            for what, model, said in ascend_anchors(profile):
                print(f"  {what}: {model:.4f}, published {said:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
