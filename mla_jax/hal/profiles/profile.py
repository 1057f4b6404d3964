"""Hardware profiles: a device described by numbers, each with unit, source and certainty.

A profile maps field names such as `memory.hbm_bandwidth` to a `Number`. The family determines which
fields a profile must have, and their units (`FIELDS`). Tile sizes, checks of buffers and simulated
times all read the same profile.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mla_jax import checks

Certainty = Literal[
    "official", "document", "paper", "community", "derived", "measured", "fitted", "assumed"
]
Family = Literal["ascend", "nvidia"]

# The fields of every family, then those of each. Unit "1" is a count or a ratio.
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
        "engine.gm_read": "B/s",
        "engine.fixpipe": "B/s",
        "engine.l1_to_l0a": "B/s",
        "engine.l1_to_l0b": "B/s",
        "engine.dma_scale": "1",
        "latency.core_start": "s",
        "latency.cross_core": "s",
        "latency.flag": "s",
        "latency.job": "s",
    },
    "nvidia": _COMMON
    | {
        "core.compute_capability": "1",
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
# The buffer on the left must fit in the memory on the right.
_NESTED = [
    ("buffer.l0a", "buffer.l1"),
    ("buffer.l0b", "buffer.l1"),
    ("buffer.l1", "buffer.l2"),
    ("buffer.ub", "buffer.l2"),
    ("buffer.shared", "buffer.l2"),
    ("buffer.l2", "memory.hbm_bytes"),
]
# The memory on the left is at most as fast as that on the right, which is nearer to the engines.
_ORDERED = [
    ("memory.hbm_bandwidth", "memory.l2_bandwidth"),
    ("engine.copy", "memory.l2_bandwidth"),
    ("engine.store", "memory.l2_bandwidth"),
    ("engine.gm_to_l1", "memory.l2_bandwidth"),
    ("engine.gm_to_ub", "memory.l2_bandwidth"),
    ("engine.ub_to_gm", "memory.l2_bandwidth"),
    ("engine.gm_read", "memory.l2_bandwidth"),
    ("engine.fixpipe", "memory.l2_bandwidth"),
    ("engine.gm_to_l1", "engine.l1_to_l0a"),
    ("engine.gm_to_l1", "engine.l1_to_l0b"),
]
# Lowest and highest value by field, or else by unit. They are far beyond any device, so that a
# value outside is a wrong unit or a typing error.
_RANGES: dict[str, tuple[float, float]] = {
    "core.count": (1, 1e5),
    "core.vector_cores": (1, 1e3),
    "core.compute_capability": (7, 99),
    "buffer.registers": (1, 1e9),
    "memory.hbm_bandwidth": (1e10, 1e16),
    "memory.l2_bandwidth": (1e10, 1e17),
    "memory.hbm_efficiency": (1e-3, 1),
    "engine.tensor_efficiency": (1e-3, 1),
    "engine.mma_sync_share": (1e-3, 1),
    "engine.cuda_efficiency": (1e-3, 1),
    "engine.shared_efficiency": (1e-3, 1),
    "engine.dma_scale": (1e-3, 1e3),
    "Hz": (1e7, 1e11),
    "B": (1, 1e16),
    "B/s": (1e7, 1e15),
    "s": (1e-12, 0.1),
    "cycle": (1e-3, 1e6),
    "flop/cycle": (1e-3, 1e8),
    "op/cycle": (1e-3, 1e8),
    "element/cycle": (1e-3, 1e8),
    "B/cycle": (1e-3, 1e8),
}
# The rate of the matrix unit by the dtype of its operands.
_MATRIX = {
    "ascend": dict.fromkeys(("bf16", "fp16"), "engine.cube_fp16") | {"int8": "engine.cube_int8"},
    "nvidia": dict.fromkeys(("bf16", "fp16"), "engine.tensor_bf16")
    | {"int8": "engine.tensor_int8"},
}
# Fields of unit "1" that are whole numbers. Bytes are whole numbers, too.
_WHOLE = ("core.count", "core.vector_cores", "buffer.registers")


@dataclass(frozen=True)
class Number:
    """A value in SI units, its source, and how certain it is."""

    value: float
    unit: str
    source: str
    certainty: Certainty


@dataclass(frozen=True)
class HardwareProfile:
    """The profile of one device.

    Values are converted to Python floats before they are checked. `fitted_on` names the device
    whose published measurements determined the fitted numbers: this device, a similar one, or ""
    when nothing was fitted.

    Raises TypeError for a wrong type and ValueError for numbers that describe no device. The
    message names the field.
    """

    name: str
    family: Family
    numbers: Mapping[str, Number]
    fitted_on: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        _require_text("name", self.name)
        for field in ("fitted_on", "note"):
            _require_text(f"{self.name}: {field}", getattr(self, field), empty=True)
        if not isinstance(self.family, str) or self.family not in FIELDS:
            raise ValueError(
                f"{self.name}: family is {self.family!r}, wanted one of {', '.join(FIELDS)}"
            )
        if not isinstance(self.numbers, Mapping):
            raise TypeError(
                f"{self.name}: numbers must be a mapping of field names to Number, "
                f"got {type(self.numbers).__name__}"
            )
        fields = FIELDS[self.family]
        for field in self.numbers:
            if field not in fields:
                raise _unknown_field(self, field)
        numbers = {}
        for field, unit in fields.items():
            if field not in self.numbers:
                raise ValueError(f"{self.name}: {field} is missing (wanted a number in {unit})")
            numbers[field] = _checked(self.name, field, unit, self.numbers[field])
        object.__setattr__(self, "numbers", numbers)
        for inner, outer in _NESTED:
            if inner in fields and outer in fields and self[inner] > self[outer]:
                raise ValueError(
                    f"{self.name}: {inner} = {self[inner]:.0f} B is larger than "
                    f"{outer} = {self[outer]:.0f} B"
                )
        for slower, faster in _ORDERED:
            if slower in fields and faster in fields and self[slower] > self[faster]:
                raise ValueError(
                    f"{self.name}: {slower} = {self[slower]:.4g} B/s, wanted at most "
                    f"{faster} = {self[faster]:.4g} B/s"
                )

    def __getitem__(self, field: str) -> float:
        return self.numbers[field].value

    def bytes(self, field: str) -> int:
        """Returns a capacity as a whole number of bytes."""
        return int(self[field])

    @property
    def cycle(self) -> float:
        """Seconds per clock cycle."""
        return 1.0 / self["core.clock"]

    @property
    def cores(self) -> int:
        """The number of cores: SMs, or Ascend's cube cores."""
        return int(self["core.count"])

    @property
    def matrix_peak(self) -> float:
        """Peak of bf16 matrix operations of the whole device in flop/s, at an efficiency of 1."""
        return self.peak("bf16")

    def peak(self, dtype: str) -> float:
        """Returns the device's peak of matrix operations on operands of a dtype, per second.

        dtype: "bf16", "fp16" or "int8". Raises ValueError for another one.
        """
        if dtype not in _MATRIX[self.family]:
            raise ValueError(
                f"{self.name}: dtype = {dtype!r}, wanted one of {', '.join(_MATRIX[self.family])}"
            )
        return self[_MATRIX[self.family][dtype]] * self["core.clock"] * self.cores

    def with_values(
        self, values: Mapping[str, float], source: str = "changed by the user"
    ) -> "HardwareProfile":
        """Returns a copy with some values changed, which are checked as in a new profile."""
        numbers = dict(self.numbers)
        for field, value in values.items():
            if field not in numbers:
                raise _unknown_field(self, field)
            numbers[field] = Number(value, numbers[field].unit, source, "assumed")
        return dataclasses.replace(self, numbers=numbers)

    def table(self) -> list[tuple[str, float, str, str, str]]:
        """Returns rows of (field, value, unit, certainty, source), for printing."""
        return [
            (field, n.value, n.unit, n.certainty, n.source)
            for field, n in sorted(self.numbers.items())
        ]


def _unknown_field(profile: HardwareProfile, field: str) -> ValueError:
    """Returns the error for a field that a family does not have, with the one that is nearest."""
    fields = FIELDS[profile.family]
    near = difflib.get_close_matches(str(field), fields, n=1, cutoff=0.75)
    wanted = f"the nearest is {near[0]}" if near else f"its fields are {', '.join(fields)}"
    return ValueError(
        f"{profile.name}: {field} is not a field of family {profile.family!r}; {wanted}"
    )


def _require_text(what: str, value: Any, *, empty: bool = False) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a string, got {value!r} of type {type(value).__name__}")
    if not empty and not value.strip():
        raise ValueError(f"{what} must not be empty, got {value!r}")


def _checked(name: str, field: str, unit: str, number: Any) -> Number:
    """Returns the number of a field with a float value; raises an error that names the field."""
    where = f"{name}: {field}"
    if not isinstance(number, Number):
        raise TypeError(f"{where} must be a Number, got {type(number).__name__}")
    for part in ("unit", "source", "certainty"):
        _require_text(f"{where} has a {part} that", getattr(number, part), empty=True)
    if number.unit != unit:
        raise ValueError(f"{where} has unit {number.unit!r}, wanted {unit!r}")
    if number.certainty not in get_args(Certainty):
        raise ValueError(
            f"{where} has certainty {number.certainty!r}, wanted one of {get_args(Certainty)}"
        )
    if not number.source.strip():
        raise ValueError(f"{where} has no source")
    try:
        value = checks.require_number(where, number.value)
    except ValueError as error:
        raise ValueError(f"{where} = {number.value}, wanted a finite number") from error
    shown = "" if unit == "1" else f" {unit}"
    low, high = _RANGES[field if field in _RANGES else unit]
    if not low <= value <= high:
        raise ValueError(
            f"{where} = {value}{shown}, wanted at least {low:g} and at most {high:g}{shown}"
        )
    if (unit == "B" or field in _WHOLE) and not value.is_integer():
        raise ValueError(f"{where} = {value}{shown}, wanted a whole number")
    return dataclasses.replace(number, value=value)


def save_profile(profile: HardwareProfile, path: str | Path) -> None:
    """Writes a profile as JSON."""
    Path(path).write_text(json.dumps(dataclasses.asdict(profile), indent=2) + "\n")


def read_profile(
    path: str | Path, known: Mapping[str, "HardwareProfile"] | None = None
) -> HardwareProfile:
    """Reads a profile from JSON. Raises ValueError that names the file and its invalid part.

    known: profiles by name. A file may have `like`, the name of one of them. Then it gives only the
    numbers that differ, and the others are those of that device.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: not JSON ({error})") from error
    try:
        return _profile_of(data, known or {})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key in found:
        if sum(other == key for other, _ in pairs) > 1:
            raise ValueError(f"{key!r} is there twice")
    return found


def _profile_of(data: Any, known: Mapping[str, HardwareProfile]) -> HardwareProfile:
    """Returns the profile of a file's data."""
    like = isinstance(data, dict) and "like" in data
    needed = ("name", "numbers") if like else ("name", "family", "numbers")
    _require_keys("the file", data, needed, ("family", "like", "fitted_on", "note"))
    if not isinstance(data["numbers"], dict):
        raise ValueError(
            "numbers must be an object with a field's name for each number, "
            f"got {data['numbers']!r:.60}"
        )
    numbers = {}
    for field, entry in data["numbers"].items():
        _require_keys(f"{data['name']}: {field}", entry, ("value", "unit", "source", "certainty"))
        numbers[field] = Number(**entry)
    data = data | {"numbers": numbers}
    if like:
        name = data.pop("like")
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"like = {name!r}, wanted one of {', '.join(known)}")
        other = known[name]
        if data.setdefault("family", other.family) != other.family:
            raise ValueError(f"family is {data['family']!r}, that of {name} is {other.family!r}")
        taken = {
            field: dataclasses.replace(
                number, source=f"as {name}: {number.source}", certainty="assumed"
            )
            for field, number in other.numbers.items()
        }
        data = {"fitted_on": other.fitted_on} | data | {"numbers": taken | numbers}
    return HardwareProfile(**data)


def _require_keys(
    where: str, data: Any, needed: tuple[str, ...], allowed: tuple[str, ...] = ()
) -> None:
    """Raises ValueError unless data is an object with the needed keys and no unknown ones."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object with {', '.join(needed)}, got {data!r:.60}")
    for key in needed:
        if key not in data:
            raise ValueError(f"{where} has no {key}: {key} is missing")
    for key in data:
        if key not in (*needed, *allowed):
            raise ValueError(
                f"{where}: {key!r} is not a key, wanted {', '.join((*needed, *allowed))}"
            )
