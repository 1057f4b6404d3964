"""Builds profiles from numbers with their sources and from the constants that a fit found."""

import functools
import json
from collections.abc import Mapping
from importlib.resources import files

from mla_jax.hal.profiles.profile import FIELDS, Certainty, HardwareProfile, Number

Entry = tuple[float, str, Certainty]


@functools.cache
def fitted_constants() -> dict[str, dict]:
    """Returns the constants that the fits wrote, per chip, and how they were fitted."""
    return json.loads(files("mla_jax.hal.profiles").joinpath("fitted.json").read_text())


@functools.cache
def measured_constants(device: str, fields: tuple[str, ...], note: str = "") -> dict[str, Entry]:
    """Returns numbers that the experiment `calibrate` measured on a device.

    device: H200_SXM. note: what the source says after the method.
    """
    path = files("mla_jax.hal.profiles").joinpath(f"{device.split('_')[0].lower()}_measured.json")
    numbers = json.loads(path.read_text())["numbers"]
    return {
        field: (numbers[field]["value"], f"{numbers[field]['source']}{note}", "measured")
        for field in fields
    }


def build(
    name: str,
    family: str,
    entries: Mapping[str, Entry],
    fitted_on: str,
    note: str = "",
    chip: str = "",
) -> HardwareProfile:
    """Builds a profile from (value, source, certainty) entries and fitted constants.

    fitted_on: the device whose rows were fitted. chip: the name of the fit, if several devices
    share it; they have the same constants but for those that belong to one card.
    """
    units = FIELDS[family]
    numbers = {
        f: Number(v, units.get(f, ""), source, sure) for f, (v, source, sure) in entries.items()
    }
    fit = fitted_constants().get(chip or fitted_on, {})
    own = name == fitted_on
    of_card = fit.get("by_card", {}).get(fitted_on, {})
    for field, value in (fit.get("constants", {}) | of_card).items():
        source = f"fitted on {fit['rows']}" + (
            "" if own else f" of {fitted_on}, the nearest relative"
        )
        numbers[field] = Number(value, units[field], source, "fitted" if own else "assumed")
    return HardwareProfile(name, family, numbers, fitted_on if fit else "", note)  # type: ignore[arg-type]
