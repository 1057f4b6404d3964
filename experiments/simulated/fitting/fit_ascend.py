"""Fits the constants of the Ascend profiles.

    python -m experiments.simulated.fitting.fit_ascend

Three constants and the choice among three dies are fitted, the same for decode, prefill and the
int8 kernels: half of each published Ascend table, chosen by a seed, and each table counts the same.
The other constants are those of documents, or assumed as the profiles say. The figures that the
sources give in text, such as AMLA's share of the peak, are not fitted. The result is written to
mla_jax/hal/profiles/fitted.json. Each die takes some minutes.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import mla_jax.hal
from experiments.simulated.fitting.fit_profiles import Bounds, changed, log_errors, mape
from experiments.simulated.tables.fia_rows import DEVICES, SEED, halves
from experiments.simulated.tables.fia_rows import TABLES as FIA_TABLES
from experiments.simulated.tables.predictions import FOLDER, Row, read_table
from mla_jax.hal import HardwareProfile, load_profile

TABLES = (*FIA_TABLES, "ascend_int8_v11_over_v0.csv")
BOUNDS: Bounds = {
    "latency.launch": (1e-6, 1.3e-5, 1e-4),
    "latency.core_start": (1e-8, 1e-6, 1e-5),
    "latency.job": (1e-8, 4e-7, 5e-6),
}


def fit_die(
    start: HardwareProfile, tables: Sequence[Sequence[Row]]
) -> tuple[float, dict[str, float]]:
    """Returns (cost, constants) of the best fit; large errors count less than their squares."""
    from scipy.optimize import least_squares

    most = max(len(rows) for rows in tables)

    def residuals(x: np.ndarray) -> np.ndarray:
        profile = changed(start, dict(zip(BOUNDS, np.exp(x).tolist(), strict=True)))
        return np.concatenate(
            [log_errors(profile, rows) * math.sqrt(most / len(rows)) for rows in tables]
        )

    low, first, high = (np.log(column) for column in zip(*BOUNDS.values(), strict=True))
    found = least_squares(residuals, first, bounds=(low, high), loss="soft_l1", f_scale=0.08,
                          diff_step=1e-3, max_nfev=10, x_scale=0.3)  # fmt: skip
    values = {field: float(f"{math.exp(v):.4g}") for field, v in zip(BOUNDS, found.x, strict=True)}
    return float(found.cost), values


def main() -> None:
    path = Path(mla_jax.hal.__file__).parent / "profiles" / "fitted.json"
    parts = {name: halves(read_table(FOLDER / name)) for name in TABLES}
    found = {}
    for device in DEVICES:
        found[device] = fit_die(load_profile(device), [half for half, _ in parts.values()])
        print(f"{device}: cost {found[device][0]:.3f}, {found[device][1]}", flush=True)
    best = min(found, key=lambda device: found[device][0])
    profile = changed(load_profile(best), found[best][1])
    errors = {
        name: [round(mape(log_errors(profile, rows)), 2) for rows in both]
        for name, both in parts.items()
    }
    fitted = json.loads(path.read_text())
    kept = {name: fit for name, fit in fitted.items() if not name.startswith("Ascend")}
    fitted = {
        best: {
            "rows": f"half of benchmarks/published/ascend_*.csv, by seed {SEED}",
            "constants": found[best][1],
            "cost_by_die": {device: round(cost, 3) for device, (cost, _) in found.items()},
            "mape_by_table": {
                name: {"fitted_rows": pair[0], "other_rows": pair[1]}
                for name, pair in errors.items()
            },
        }
    } | kept
    print(json.dumps(fitted[best], indent=2))
    path.write_text(json.dumps(fitted, indent=2) + "\n")


if __name__ == "__main__":
    main()
