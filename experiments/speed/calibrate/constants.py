"""From time stamps to constants, and from constants to a profile file."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mla_jax.hal import HardwareProfile

CLOCK, TIMER = 0, 1  # the two values of a stamp
NS = 1e-9


@dataclasses.dataclass(frozen=True)
class Constant:
    """A measured number: the median of its samples, with the lowest and the highest one.

    field: of a profile, or "" where no field means the same. how: what was run. least, most: bounds
    that physics sets; a number outside is not written.
    """

    name: str
    samples: tuple[float, ...]
    unit: str
    how: str
    least: float
    most: float
    field: str = ""

    @property
    def value(self) -> float:
        return float(np.median(self.samples))

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)

    @property
    def problem(self) -> str:
        """Says why the number can't be true, or is empty."""
        if np.isfinite(self.samples).all() and self.least <= self.value <= self.most:
            return ""
        return f"{self.value:.4g} {self.unit}, possible are {self.least:.4g} to {self.most:.4g}"

    @property
    def source(self) -> str:
        return (
            f"calibrate: {self.how}; median of {len(self.samples)}, "
            f"{self.low:.4g} to {self.high:.4g} {self.unit}"
        )


def scaled(samples: Sequence[float], factor: float) -> tuple[float, ...]:
    """Returns samples times a factor."""
    return tuple(float(s * factor) for s in samples)


def rates(samples: Sequence[float], work: float) -> tuple[float, ...]:
    """Returns work over each sample; a sample that is not positive gives NaN."""
    return tuple(work / s if s > 0 else float("nan") for s in samples)


def slopes(stamps: np.ndarray, count: int, value: int = CLOCK) -> list[float]:
    """Returns clock cycles (or ns, by TIMER) per repetition: one sample for each pair of rows.

    stamps: int32 [CTAs, warpgroups, 1, rows, 2, 2] of `calibration`. A sample is the mean over the
    warpgroups of all CTAs. The first pair is a warm-up and left out.
    """
    taken = np.diff(stamps.view(np.uint32), axis=-2)[:, :, 0, :, 0, value]  # wraps modulo 2^32
    of_row = taken.astype(np.float64).mean((0, 1))
    return list(((of_row[1::2] - of_row[::2]) / count)[1:])


def span(stamps: np.ndarray) -> float:
    """Returns seconds from the first start to the last end of all CTAs, by the device's timer."""
    timer = stamps.view(np.uint32)[..., TIMER]
    since = (timer - timer.flat[0]).view(np.int32).astype(np.float64)
    return float(since[..., 1].max() - since[..., 0].min()) * NS


def clock_rate(stamps: np.ndarray) -> list[float]:
    """Returns the SM clock in Hz, a sample per row: cycles over the device's timer."""
    taken = np.diff(stamps.view(np.uint32), axis=-2)[:, :, 0, :, 0].astype(np.float64).mean((0, 1))
    return list(taken[:, CLOCK] / taken[:, TIMER] / NS)


def profile_data(
    profile: HardwareProfile, name: str, constants: Sequence[Constant], note: str
) -> dict[str, Any]:
    """Returns a profile file's data: what was measured, and `like` for everything else."""
    numbers = {
        c.field: {
            "value": c.value,
            "unit": profile.numbers[c.field].unit,
            "source": c.source,
            "certainty": "measured",
        }
        for c in constants
        if c.field and not c.problem
    }
    return {"name": name, "like": profile.name, "note": note, "numbers": numbers}


def write_profile(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def rows_of(profile: HardwareProfile, constants: Sequence[Constant]) -> list[dict[str, Any]]:
    """Returns a row per constant, with the shipped profile's value where it has one."""

    def finite(x: float) -> float | None:
        return x if np.isfinite(x) else None

    rows = []
    for c in constants:
        shipped = profile[c.field] if c.field else None
        rows.append({
            "name": c.name, "value": finite(c.value), "low": finite(c.low),
            "high": finite(c.high), "unit": c.unit, "field": c.field, "shipped": shipped,
            "ratio": finite(c.value / shipped) if shipped else None,
            "status": f"failed: {c.problem}" if c.problem else "measured", "how": c.how,
        })  # fmt: skip
    return rows
