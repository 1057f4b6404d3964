"""Measures the on-chip constants of a profile on the GPU at hand.

    python -m experiments.launch --experiment=calibrate --output_dir=out

It takes under a minute on an H200 and writes profile.json, which `load_profile` and --profile read.
"""

import dataclasses
import time

from experiments.framework.console import say, show_table
from experiments.framework.experiment import InputError, Outcome, Output, Row, reading
from experiments.framework.options import flag
from experiments.speed.calibrate.constants import Constant, profile_data, rows_of, write_profile
from mla_jax.hal import HardwareProfile, load_profile
from pallas_kernels.hopper import device

SUMMARY = "measures the constants of a profile on an H100 or H200, and writes a profile file"

COLUMNS = {
    "name": "constant",
    "value": "measured",
    "low": "lowest",
    "high": "highest",
    "unit": "unit",
    "field": "field",
    "shipped": "shipped",
    "ratio": "ratio",
    "status": "status",
}


@dataclasses.dataclass(frozen=True)
class Options:
    like: str = flag("", "profile with the datasheet's numbers; by default that of the GPU")
    only: tuple[str, ...] = flag((), "benchmarks to run; by default all")


def run(options: Options, output: Output) -> Outcome:
    from experiments.speed.calibrate.microbenchmarks import BENCHES, Bench

    unknown = [name for name in options.only if name not in BENCHES]
    if unknown:
        raise InputError(f"--only: got {unknown[0]!r}, wanted some of {', '.join(BENCHES)}")
    if lacks := device.machine_lacks():
        raise InputError(f"calibrate measures a GPU: {lacks}")
    with reading("like"):
        profile = load_profile(options.like) if options.like else device.profile()
    if profile is None:
        raise InputError("--like must name a profile: there is none for this GPU")
    bench = Bench(profile, device.machine_sms())
    constants: list[Constant] = []
    failures: list[Row] = []
    for name in options.only or BENCHES:
        start = time.monotonic()
        try:
            constants.extend(getattr(bench, name)())
        except Exception as error:  # one that fails must not lose the others
            text = " ".join(f"{type(error).__name__}: {error}".split())
            failures.append({"name": name, "status": f"failed: {text[:500]}"})
            say(f"{name} failed: {text[:500]}", style="red")
        say(f"{name}: {time.monotonic() - start:.1f} s")
    return report(output, profile, constants, failures)


def report(
    output: Output, profile: HardwareProfile, constants: list[Constant], failures: list[Row]
) -> Outcome:
    """Writes the profile file, shows the table, and returns the outcome."""
    note = "; ".join(f"{c.name} {c.value:.4g} {c.unit}" for c in constants
                     if not c.field and not c.problem)  # fmt: skip
    data = profile_data(profile, f"{profile.name}_measured", constants, note)
    rows = rows_of(profile, constants)
    show_table(f"Constants of this GPU beside those of {profile.name}", rows, COLUMNS)
    problem = ""
    path = output.path("profile.json")
    write_profile(path, data)
    try:
        load_profile(path)
    except ValueError as error:
        problem = f"; profile.json does not load: {error}"
    failed = [row["name"] for row in (*rows, *failures) if row["status"] != "measured"]
    summary = f"measured {len(data['numbers'])} fields of {profile.name}{problem}" + (
        f"; failed: {', '.join(failed)}" if failed else ""
    )
    passed = not failed and not problem and bool(data["numbers"])
    return Outcome(passed, summary, [*rows, *failures], {"fields": sorted(data["numbers"])})
