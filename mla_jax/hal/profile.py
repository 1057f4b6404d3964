"""What a machine is, in numbers: every one with its unit, its source and how sure we are of it.

A profile is flat data: a field name such as `memory.hbm_bandwidth` to a `Number`. The family
says which fields a profile must have and in what unit (`FIELDS`). Tile sizes, legality and
simulated time all read the same profile.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Certainty = Literal[
    "official", "document", "paper", "community", "derived", "measured", "fitted", "assumed"
]
Family = Literal["ascend", "nvidia"]

# Fields of every family, then of each. Units: "1" is a count or a ratio.
_COMMON = {
    "core.count": "1",
    "core.clock": "Hz",
    "memory.hbm_bytes": "B",
    "memory.hbm_bandwidth": "B/s",
    "memory.hbm_efficiency": "1",
    "memory.l2_bandwidth": "B/s",
    "buffer.l2": "B",
    "latency.launch": "s",
}
FIELDS: dict[str, dict[str, str]] = {
    "ascend": _COMMON
    | {
        "core.vector_cores": "1",
        "core.dies": "1",
        "buffer.l1": "B",
        "buffer.l0a": "B",
        "buffer.l0b": "B",
        "buffer.l0c": "B",
        "buffer.ub": "B",
        "engine.cube_fp16": "flop/cycle",
        "engine.cube_int8": "op/cycle",
        "engine.cube_head": "cycle",
        "engine.vector_wide": "element/cycle",
        "engine.vector_narrow": "element/cycle",
        "engine.vector_head": "cycle",
        "engine.gm_to_l1": "B/s",
        "engine.gm_to_ub": "B/s",
        "engine.ub_to_gm": "B/s",
        "engine.fixpipe": "B/s",
        "engine.l1_to_l0a": "B/s",
        "engine.l1_to_l0b": "B/s",
        "engine.dma_scale": "1",
        "latency.cross_core": "s",
        "latency.flag": "s",
        "latency.job": "s",
    },
    "nvidia": _COMMON
    | {
        "buffer.shared": "B",
        "buffer.registers": "1",
        "engine.tensor_bf16": "flop/cycle",
        "engine.tensor_int8": "op/cycle",
        "engine.tensor_efficiency": "1",
        "engine.mma_sync_share": "1",
        "engine.cuda": "element/cycle",
        "engine.cuda_efficiency": "1",
        "engine.sfu": "element/cycle",
        "engine.shared_pipe": "B/cycle",
        "engine.shared_efficiency": "1",
        "engine.copy": "B/s",
        "engine.store": "B/s",
        "engine.widen": "element/cycle",
        "latency.memory": "s",
        "latency.barrier": "s",
        "latency.l2": "s",
        "latency.grid_sync": "s",
        "latency.second_launch": "s",
    },
}
# A buffer on the left must fit in the one on the right; an efficiency is at most 1.
_NESTED = [
    ("buffer.l0a", "buffer.l1"),
    ("buffer.l0b", "buffer.l1"),
    ("buffer.l1", "buffer.l2"),
    ("buffer.ub", "buffer.l2"),
    ("buffer.shared", "buffer.l2"),
    ("buffer.l2", "memory.hbm_bytes"),
]
_RATIOS = [
    "memory.hbm_efficiency",
    "engine.tensor_efficiency",
    "engine.mma_sync_share",
    "engine.cuda_efficiency",
    "engine.shared_efficiency",
]


@dataclass(frozen=True)
class Number:
    """A value in SI units, where it comes from and how sure that is."""

    value: float
    unit: str
    source: str
    certainty: Certainty


@dataclass(frozen=True)
class HardwareProfile:
    """One device. Raises ValueError naming the field when the numbers describe no machine.

    `fitted_on` names the device whose published rows fixed the fitted numbers: its own name, a
    relative's, or "" when nothing was fitted.
    """

    name: str
    family: Family
    numbers: Mapping[str, Number]
    fitted_on: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.family not in FIELDS:
            raise ValueError(f"{self.name}: family is {self.family!r}, wanted one of {set(FIELDS)}")
        fields = FIELDS[self.family]
        for field in self.numbers:
            if field not in fields:
                raise ValueError(f"{self.name}: {field} is no field of family {self.family!r}")
        for field, unit in fields.items():
            if field not in self.numbers:
                raise ValueError(f"{self.name}: {field} is missing (wanted a number in {unit})")
            number = self.numbers[field]
            if number.unit != unit:
                raise ValueError(f"{self.name}: {field} has unit {number.unit!r}, wanted {unit!r}")
            if number.certainty not in get_args(Certainty):
                raise ValueError(
                    f"{self.name}: {field} has certainty {number.certainty!r}, "
                    f"wanted one of {get_args(Certainty)}"
                )
            if not number.source:
                raise ValueError(f"{self.name}: {field} has no source")
            if not (math.isfinite(number.value) and number.value > 0):
                raise ValueError(f"{self.name}: {field} = {number.value} {unit}, wanted above zero")
        for inner, outer in _NESTED:
            if inner in fields and outer in fields and self[inner] > self[outer]:
                raise ValueError(
                    f"{self.name}: {inner} = {self[inner]:.0f} B is larger than "
                    f"{outer} = {self[outer]:.0f} B"
                )
        for field in _RATIOS:
            if field in fields and self[field] > 1:
                raise ValueError(f"{self.name}: {field} = {self[field]}, wanted at most 1")

    def __getitem__(self, field: str) -> float:
        return self.numbers[field].value

    def bytes(self, field: str) -> int:
        """A capacity as a whole number of bytes."""
        return int(self[field])

    @property
    def cycle(self) -> float:
        """Seconds a clock cycle takes."""
        return 1.0 / self["core.clock"]

    @property
    def cores(self) -> int:
        return int(self["core.count"])

    @property
    def matrix_peak(self) -> float:
        """bf16 matrix FLOP/s of the whole device at the profile's clock, no efficiency taken."""
        engine = "engine.cube_fp16" if self.family == "ascend" else "engine.tensor_bf16"
        return self[engine] * self["core.clock"] * self.cores

    def with_values(
        self, values: Mapping[str, float], source: str = "changed by the user"
    ) -> "HardwareProfile":
        """A copy with some fields changed."""
        numbers = dict(self.numbers)
        for field, value in values.items():
            if field not in numbers:
                raise ValueError(f"{self.name}: {field} is no field of family {self.family!r}")
            numbers[field] = Number(value, numbers[field].unit, source, "assumed")
        return dataclasses.replace(self, numbers=numbers)

    def table(self) -> list[tuple[str, float, str, str, str]]:
        """(field, value, unit, certainty, source) rows, for people."""
        return [
            (field, n.value, n.unit, n.certainty, n.source)
            for field, n in sorted(self.numbers.items())
        ]


def save_profile(profile: HardwareProfile, path: str | Path) -> None:
    """Writes a profile as JSON."""
    Path(path).write_text(json.dumps(dataclasses.asdict(profile), indent=2) + "\n")


def read_profile(path: str | Path) -> HardwareProfile:
    """Reads a profile that `save_profile` or a user wrote. ValueError names what is wrong."""
    path = Path(path)
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON ({error})") from error
    for key in ("name", "family", "numbers"):
        if key not in data:
            raise ValueError(f"{path.name}: {key} is missing")
    numbers = {}
    for field, entry in data["numbers"].items():
        missing = {"value", "unit", "source", "certainty"} - set(entry)
        if missing:
            raise ValueError(f"{data['name']}: {field} has no {sorted(missing)[0]}")
        numbers[field] = Number(
            float(entry["value"]), entry["unit"], entry["source"], entry["certainty"]
        )
    return HardwareProfile(
        name=data["name"],
        family=data["family"],
        numbers=numbers,
        fitted_on=data.get("fitted_on", ""),
        note=data.get("note", ""),
    )
