"""Profiles: what is shipped, what a user may write, and what is refused with the field named."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mla_jax.hal import (
    PROFILES,
    HardwareProfile,
    Number,
    load_profile,
    profile_of_device,
    read_profile,
    save_profile,
)

IDS = {
    "Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4", "Ascend910C", "Ascend910C_die",
    "A100_SXM4_40GB", "A100_SXM4_80GB", "L40", "H100_SXM5", "H800_SXM5", "H20", "H200_SXM",
}  # fmt: skip


def test_every_device_is_there() -> None:
    assert set(PROFILES) == IDS
    assert PROFILES["A100_SXM4_40GB"]["memory.hbm_bandwidth"] == 1555e9
    assert PROFILES["Ascend910C"].cores == 2 * PROFILES["Ascend910C_die"].cores


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "H200_SXM"),
        ("NVIDIA H100 80GB HBM3", "H100_SXM5"),
        ("NVIDIA A100-SXM4-80GB", "A100_SXM4_80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100_SXM4_40GB"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", None),
        ("NVIDIA H20", "H20"),
        ("cpu", None),
    ],
)
def test_profiles_by_device_kind(kind: str, name: str | None) -> None:
    assert profile_of_device(kind) is PROFILES.get(name or "")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("Ascend910B1", 363.7), ("Ascend910B2", 353.9), ("Ascend910B3", 294.9), ("Ascend910B4", 245.8),
     ("Ascend910C", 707.8), ("A100_SXM4_80GB", 312), ("H20", 148)],
)  # fmt: skip
def test_matrix_peaks(name: str, tflops: float) -> None:
    assert PROFILES[name].matrix_peak / 1e12 == pytest.approx(tflops, rel=2e-3)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_every_number_says_where_it_comes_from(profile: HardwareProfile) -> None:
    for field, value, unit, certainty, source in profile.table():
        assert value > 0, field
        assert source, field
        assert unit, field
        if certainty == "fitted":
            assert profile.fitted_on == profile.name


@pytest.mark.parametrize("name", ["A100_SXM4_40GB", "L40", "H20", "H800_SXM5", "Ascend910C"])
def test_a_device_without_rows_says_whose_efficiencies_it_has(name: str) -> None:
    profile = PROFILES[name]
    assert profile.fitted_on in profile.note
    assert "nearest relative" in profile.numbers["latency.launch"].source


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    mine = dataclasses.replace(PROFILES["H200_SXM"], name="mine")
    save_profile(mine, path)
    assert load_profile(path) == mine
    assert read_profile(path).numbers["core.clock"] == mine.numbers["core.clock"]


def _changed(name: str, field: str, value: float, unit: str | None = None) -> HardwareProfile:
    profile = PROFILES[name]
    number = Number(value, unit or profile.numbers[field].unit, "test", "assumed")
    return dataclasses.replace(profile, numbers={**profile.numbers, field: number})


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("H200_SXM", "memory.hbm_bandwidth", 0.0, r"memory\.hbm_bandwidth = 0"),
        ("H200_SXM", "core.clock", float("nan"), r"core\.clock = nan"),
        ("Ascend910B1", "buffer.l0a", 1e6, r"buffer\.l0a = 1000000 B is larger than buffer\.l1"),
        ("Ascend910B1", "buffer.l1", 1e9, r"buffer\.l1 .* is larger than buffer\.l2"),
        (
            "H200_SXM",
            "engine.tensor_efficiency",
            1.2,
            r"engine\.tensor_efficiency = 1\.2, .*at most 1",
        ),
    ],
)
def test_impossible_machines_are_refused(name: str, field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _changed(name, field, value)


def test_a_wrong_or_missing_unit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"core\.clock has unit 'GHz', wanted 'Hz'"):
        _changed("H200_SXM", "core.clock", 1.98, "GHz")
    path = tmp_path / "mine.json"
    save_profile(PROFILES["H200_SXM"], path)
    data = json.loads(path.read_text())
    del data["numbers"]["core.clock"]["unit"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"core\.clock has no unit"):
        read_profile(path)


@pytest.mark.parametrize("field", ["engine.cube_fp16", "latency.cross_core", "buffer.ub"])
def test_a_missing_field_is_named(field: str) -> None:
    profile = PROFILES["Ascend910B1"]
    numbers = {k: v for k, v in profile.numbers.items() if k != field}
    with pytest.raises(ValueError, match=rf"{field} is missing"):
        dataclasses.replace(profile, numbers=numbers)


def test_unknown_fields_families_and_names(tmp_path: Path) -> None:
    profile = PROFILES["Ascend910B1"]
    with pytest.raises(
        ValueError, match=r"engine\.warp is not a field.*; its fields are core\.count"
    ):
        profile.with_values({"engine.warp": 1.0})
    with pytest.raises(
        ValueError, match=r"bandwith is not .*; the nearest is memory\.hbm_bandwidth"
    ):
        profile.with_values({"memory.hbm_bandwith": 1.0})
    with pytest.raises(
        ValueError, match=r"profile = 'x\.json', wanted .*, and there is no such file"
    ):
        load_profile("x.json")
    with pytest.raises(ValueError, match="family is 'tpu'"):
        dataclasses.replace(profile, family="tpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"profile = 'H300'.*H200_SXM"):
        load_profile("H300")
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: not JSON"):
        load_profile(path)
    path.write_text('{"name": "x", "family": "nvidia"}')
    with pytest.raises(ValueError, match="numbers is missing"):
        load_profile(path)


@pytest.mark.parametrize(
    ("name", "field", "value", "error", "message"),
    [
        ("H200_SXM", "core.count", 0.5, ValueError, "at least 1"),
        ("H200_SXM", "core.count", 131.5, ValueError, "whole"),
        ("H200_SXM", "core.count", 1e12, ValueError, "at most"),
        ("H200_SXM", "latency.launch", 1e300, ValueError, "at most"),
        ("H200_SXM", "core.clock", -1.98e9, ValueError, "at least"),
        ("H200_SXM", "engine.copy", float("inf"), ValueError, "finite"),
        ("H200_SXM", "buffer.shared", 1024.5, ValueError, "whole"),
        (
            "H200_SXM",
            "memory.hbm_bandwidth",
            1e13,
            ValueError,
            r"at most memory\.l2_bandwidth = 9",
        ),
        ("Ascend910C", "engine.gm_to_l1", 2.4e11, ValueError, r"at most engine\.l1_to_l0b = "),
        ("Ascend910C", "memory.hbm_bandwidth", 1e9, ValueError, "at least"),
        ("Ascend910C", "engine.dma_scale", True, TypeError, "real number"),
        ("Ascend910C", "engine.fixpipe", "7e10", TypeError, "real number"),
        ("Ascend910C", "core.clock", None, TypeError, "real number"),
        ("Ascend910C", "core.clock", 10**400, TypeError, "real number"),
        ("Ascend910C", "core.clock", np.array([1e9]), TypeError, "real number"),
    ],
)
def test_a_number_out_of_range_or_of_another_type_is_refused(
    name: str, field: str, value: object, error: type[Exception], message: str
) -> None:
    for change in (_changed, lambda n, f, v: PROFILES[n].with_values({f: v})):
        with pytest.raises(error, match=rf"{name}: {field}.*{message}"):
            change(name, field, value)  # type: ignore[arg-type]


def test_numbers_are_stored_as_python_floats() -> None:
    for value in (np.float32(64), np.int16(64), 64, np.array(64)):
        stored = PROFILES["H200_SXM"].with_values({"core.count": value}).numbers["core.count"].value  # type: ignore[dict-item]
        assert type(stored) is float
        assert stored == 64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": None}, TypeError, "name must be a string, got None"),
        ({"name": " "}, ValueError, "name must not be empty"),
        ({"numbers": []}, TypeError, "numbers must be a mapping"),
        ({"numbers": {}}, ValueError, "is missing"),
        ({"numbers": {"core.count": 3}}, TypeError, "core.count must be a Number"),
        ({"family": []}, ValueError, "family is "),
        ({"note": 3}, TypeError, "note must be a string"),
        ({"fitted_on": None}, TypeError, "fitted_on must be a string"),
    ],
)
def test_other_parts_are_checked(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(PROFILES["H200_SXM"], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "name must be a string, got None"),
        ({"numbers": []}, "numbers must be an object"),
        ({"numbers": None}, "numbers must be an object"),
        ({"colour": "red"}, "'colour' is not a key"),
        ({"family": 3}, "family is 3"),
        ({"note": []}, "note must be a string"),
        ({"core.clock": 3}, "core.clock must be an object"),
        ({"core.clock": {"value": True}}, r"core\.clock must be a real number, got True"),
        ({"core.clock": {"value": "1e9"}}, r"core\.clock must be a real number"),
        ({"core.clock": {"value": 10**400}}, r"core\.clock must be a real number"),
        ({"core.clock": {"value": float("nan")}}, r"core\.clock = nan"),
        ({"core.clock": {"unit": 3}}, r"core\.clock has a unit that must be a string"),
        ({"core.clock": {"source": ""}}, r"core\.clock has no source"),
        ({"core.clock": {"certainty": []}}, r"core\.clock has a certainty that must be a string"),
        ({"core.clock": {"colour": "red"}}, r"core\.clock: 'colour' is not a key"),
    ],
)
def test_a_file_is_checked_by_name(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "mine.json"
    save_profile(PROFILES["H200_SXM"], path)
    data = json.loads(path.read_text())
    clock = change.get("core.clock")
    if isinstance(clock, dict):
        data["numbers"]["core.clock"] |= clock
    elif clock is not None:
        data["numbers"]["core.clock"] = clock
    else:
        data |= change
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_profile(path)


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", "[" * 100_000, "\xff", '{"name": 1' + "0" * 5000]
)
def test_a_file_that_holds_no_profile_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"mine\.json"):
        load_profile(path)
