"""Fits the three constants of our own kernels on the rows measured on an H200.

    python -m experiments.simulated.fitting.fit_hopper

Every second row is used for the fit, and the others only for a report. The result is written to
mla_jax/hal/profiles/hopper.json, which `mla_jax.hal.simulator.hopper` reads. Every row has the plan
that the kernel gets. The fit takes several minutes. It keeps the measured times of the stages.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import mla_jax.hal
from experiments.simulated.fitting.fit_profiles import PRODUCTS, Bounds, mape
from experiments.simulated.tables.predictions import MEASURED, lengths_of
from mla_jax.hal import Problem, load_profile
from mla_jax.hal.simulator.hopper import HopperKernel, hopper_constants, tuned_for_hopper
from mla_jax.hal.simulator.hopper_times import hopper_times
from pallas_kernels.hopper.model import simulated_kernel

MEASURED_ROWS = MEASURED / "h200_decode.json"
DEVICE = "H200_SXM"
BOUNDS: Bounds = {
    "memory.hbm_efficiency": (0.8, 0.93, 1.0),
    "engine.tensor_efficiency": (0.45, 0.98 * PRODUCTS, PRODUCTS),
    "latency.launch": (3e-7, 3e-6, 8e-6),
}

Case = tuple[float, Problem, HopperKernel]  # measured seconds


def cases(path: Path = MEASURED_ROWS) -> list[Case]:
    """Returns the rows of our kernels over a 16-bit cache, each with its plan."""
    profile = load_profile(DEVICE)
    found = []
    for row in json.loads(path.read_text())["rows"]:
        if row["variant"] != "hopper":
            continue
        lengths = lengths_of({key: str(value) for key, value in row.items()})
        problem = Problem(lengths, row["heads"], row["s_q"], page_size=row["page_size"])
        kernel = simulated_kernel(profile, problem, capacity=row["capacity"])
        found.append((row["us"] * 1e-6, problem, kernel))
    return found


def log_errors(constants: Mapping[str, float], rows: Sequence[Case]) -> np.ndarray:
    """Returns ln(model / measured) of each row."""
    profile = tuned_for_hopper(load_profile(DEVICE), constants)
    errors = []
    for seconds, problem, kernel in rows:
        times = hopper_times(profile, problem, kernel)
        model = profile["latency.launch"] + times.cores + times.merge
        errors.append(math.log(model / seconds))
    return np.array(errors)


def fit(rows: Sequence[Case]) -> dict[str, float]:
    """Returns the constants that fit `rows` best; large errors count less than their squares."""
    from scipy.optimize import least_squares

    low, first, high = (np.log(column) for column in zip(*BOUNDS.values(), strict=True))

    def constants(x: np.ndarray) -> dict[str, float]:
        return dict(zip(BOUNDS, np.exp(x).tolist(), strict=True))

    found = least_squares(lambda x: log_errors(constants(x), rows), first, bounds=(low, high),
                          loss="soft_l1", f_scale=0.08, diff_step=1e-3, max_nfev=12,
                          x_scale=0.3)  # fmt: skip
    return {field: float(f"{value:.4g}") for field, value in constants(found.x).items()}


def main() -> None:
    rows = cases()
    constants = fit(rows[::2])
    errors = log_errors(constants, rows)
    for (seconds, problem, kernel), error in zip(rows, errors, strict=True):
        longest = max(problem.kv_lens)
        print(
            f"{problem.batch:>4} x {longest:<6} rows {problem.rows:<4}{kernel.name:<26}"
            f"{seconds * 1e6:>8.1f} us, model {math.expm1(error) * 100:+.1f} %"
        )
    result = hopper_constants() | {
        "rows": "every second row of our kernels in benchmarks/measured/h200_decode.json",
        "constants": constants,
        "mape_fitted_rows": round(mape(errors[::2]), 2),
        "mape_other_rows": round(mape(errors[1::2]), 2),
    }
    print(json.dumps(result, indent=2))
    path = Path(mla_jax.hal.__file__).parent / "profiles" / "hopper.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
