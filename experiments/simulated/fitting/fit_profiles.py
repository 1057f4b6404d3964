"""Fits the constants of the GPUs that have published measurements; `fit_ascend` those of Ascend.

    python -m experiments.simulated.fitting.fit_profiles

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
from experiments.simulated.tables.predictions import (
    FOLDER,
    Row,
    predict,
    published_quantity,
    read_table,
)
from mla_jax.hal import HardwareProfile, Number, load_profile

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
}


def changed(profile: HardwareProfile, values: dict[str, float]) -> HardwareProfile:
    """Returns a profile with other constants."""
    numbers = dict(profile.numbers)
    for field, value in values.items():
        numbers[field] = Number(value, numbers[field].unit, "being fitted", "fitted")
    return dataclasses.replace(profile, numbers=numbers)


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
        return log_errors(profile, rows)

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


if __name__ == "__main__":
    main(sys.argv[1:])
