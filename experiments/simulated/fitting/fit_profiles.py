"""Fits the constants of the GPUs that have published measurements; `fit_ascend` those of Ascend.

    python -m experiments.simulated.fitting.fit_profiles

The constants are those that neither a datasheet nor `calibrate` gives: efficiencies, some
latencies, and how fast one core loads. H100 and H200 are the same chip with other memory. So all
constants on the chip are the same for both, and each card has three of its own. One more belongs to
a table whose kernels were timed one call at a time.

Every second row of each table is used, and the others only for a report; each table counts the
same. The result is written to mla_jax/hal/profiles/fitted.json, which the profiles read. scipy,
which jax depends on, computes the least squares of log errors.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import mla_jax.hal
from experiments.simulated.tables.predictions import (
    MEASURED,
    Row,
    path_of,
    predict,
    published_quantity,
    read_table,
    without_ours,
)
from mla_jax.hal import HardwareProfile, Number, load_profile
from mla_jax.hal.profiles.nvidia import CHIP, H200_SXM

Bounds = dict[str, tuple[float, float, float]]  # field -> (lowest, start, highest)

LINK = 128 * 1.98e9  # bytes per second into the shared memory of an SM: 128 per cycle
ON_CHIP: Bounds = {
    "engine.cuda_efficiency": (0.3, 0.9, 1.0),
    "engine.shared_efficiency": (0.5, 0.8, 1.0),
    "engine.copy": (1e10, 8e10, LINK),
    "latency.l2": (1e-7, 2.2e-7, 6e-7),
    "latency.grid_sync": (5e-7, 3e-6, 1.5e-5),
    "latency.second_launch": (1e-6, 4e-6, 1e-5),
    "engine.widen": (1.0, 3.4, 16.0),
}
_CEILINGS = json.loads((MEASURED / "h200_decode.json").read_text())["ceilings"]
PRODUCTS = _CEILINGS["matmul"] * 1e12 / H200_SXM.matrix_peak  # share of the peak, under power
OF_CARD: Bounds = {
    "memory.hbm_efficiency": (0.7, 0.85, 0.95),
    # The clock under load is in it. No kernel is faster than large products of matrices.
    "engine.tensor_efficiency": (0.5, 0.98 * PRODUCTS, PRODUCTS),
    "latency.launch": (1e-6, 5e-6, 1e-5),
}
SINGLE_CALL = (5e-7, 8e-6, 2e-5)
TABLES = {
    "h200_mla_decode.csv": "H200_SXM",
    "flashinfer_mla_decode.csv": "H100_SXM5",
    "h100_decode.json": "H100_SXM5",
}
CARDS = tuple(dict.fromkeys(TABLES.values()))


@dataclasses.dataclass(frozen=True)
class Constants:
    """What is fitted: by field, by card and field, and the seconds of `SINGLE_CALL`."""

    on_chip: Mapping[str, float]
    by_card: Mapping[str, Mapping[str, float]]
    single_call: float

    @staticmethod
    def of(x: np.ndarray) -> "Constants":
        """Takes the logarithms in the order of `bounds`."""
        values = iter([float(f"{value:.4g}") for value in np.exp(x)])
        return Constants(
            {field: next(values) for field in ON_CHIP},
            {card: {field: next(values) for field in OF_CARD} for card in CARDS},
            next(values),
        )

    def profile(self, card: str) -> HardwareProfile:
        return changed(load_profile(card), {**self.on_chip, **self.by_card[card]})

    def log_errors(self, table: str, rows: Sequence[Row]) -> np.ndarray:
        return log_errors(self.profile(TABLES[table]), rows, self.single_call)


def bounds() -> list[tuple[float, float, float]]:
    return [*ON_CHIP.values(), *list(OF_CARD.values()) * len(CARDS), SINGLE_CALL]


def changed(profile: HardwareProfile, values: Mapping[str, float]) -> HardwareProfile:
    """Returns a profile with other constants."""
    numbers = dict(profile.numbers)
    for field, value in values.items():
        numbers[field] = Number(value, numbers[field].unit, "being fitted", "fitted")
    return dataclasses.replace(profile, numbers=numbers)


def log_errors(
    profile: HardwareProfile, rows: Sequence[Row], single_call: float | None = None
) -> np.ndarray:
    """Returns ln(model / published) of each row."""
    pairs = (
        (predict(row, profile, single_call), float(row[published_quantity(row)])) for row in rows
    )
    return np.array([math.log(model / published) for model, published in pairs])


def weight(rows: Sequence[Row], most: int) -> float:
    """Returns the factor of a table's errors with which each table counts the same."""
    return math.sqrt(most / len(rows))


def fit(tables: Mapping[str, Sequence[Row]]) -> Constants:
    """Returns the constants that fit rows best; large errors count less than their squares."""
    # This takes a second to import, and `published` imports this module for other functions.
    from scipy.optimize import least_squares

    most = max(len(rows) for rows in tables.values())

    def residuals(x: np.ndarray) -> np.ndarray:
        constants = Constants.of(x)
        return np.concatenate(
            [
                constants.log_errors(table, rows) * weight(rows, most)
                for table, rows in tables.items()
            ]
        )

    low, first, high = (np.log(column) for column in zip(*bounds(), strict=True))
    found = least_squares(residuals, first, bounds=(low, high), loss="soft_l1", f_scale=0.08,
                          diff_step=1e-2 / np.maximum(np.abs(first), 1), max_nfev=15,
                          x_scale=0.3)  # fmt: skip
    return Constants.of(found.x)


def mape(errors: np.ndarray) -> float:
    """Returns the mean absolute percentage error."""
    return float(np.mean(np.abs(np.exp(errors) - 1))) * 100


def main() -> None:
    rows = {table: without_ours(read_table(path_of(table))) for table in TABLES}
    constants = fit({table: of_table[::2] for table, of_table in rows.items()})
    errors = {table: constants.log_errors(table, of_table) for table, of_table in rows.items()}
    found = {
        "rows": f"every second row of others' kernels in {', '.join(TABLES)}",
        "constants": constants.on_chip,
        "by_card": constants.by_card,
        "single_call": constants.single_call,
        "mape_by_table": {
            table: {
                "fitted_rows": round(mape(both[::2]), 2),
                "other_rows": round(mape(both[1::2]), 2),
            }
            for table, both in errors.items()
        },
    }
    path = Path(mla_jax.hal.__file__).parent / "profiles" / "fitted.json"
    fitted = json.loads(path.read_text())
    kept = {name: fit for name, fit in fitted.items() if name.startswith("Ascend")}
    print(json.dumps(found, indent=2))
    path.write_text(json.dumps(kept | {CHIP: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
