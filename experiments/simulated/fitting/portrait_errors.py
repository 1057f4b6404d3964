"""Compares the model of our own kernels with stages that time stamps showed, and writes both down.

    python -m experiments.simulated.fitting.portrait_errors
    python -m experiments.simulated.fitting.portrait_errors out/portrait/portrait.json

It writes benchmarks/measured/h200_portrait.json, from which `tools/tables.py` makes a table of
docs/hal.md. The measured times are those of that file, or those that the experiment `portrait` has
measured on an H200. The simulated ones are those of the model as it is now. It takes seconds.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.simulated.fitting.fit_hopper import DEVICE
from experiments.simulated.portrait import METHOD, Portrait, kept, portrait, rows_of
from experiments.simulated.portrait_lanes import AT_END, MOST_BLOCKS, StageError, stage_errors
from experiments.simulated.portrait_runs import Shape
from experiments.simulated.tables.predictions import MEASURED
from mla_jax.hal import load_profile

RESULT = MEASURED / "h200_portrait.json"
GPU = "NVIDIA H200"

Result = dict[str, Any]


def renewed(measured: Result) -> str:
    """Returns measured stages beside the times of the model as it is now, as JSON.

    measured: what this file writes, or the experiment `portrait`.
    """
    if measured["gpu"] != GPU:
        raise ValueError(f"gpu = {measured['gpu']!r}, wanted {GPU!r}")
    shapes = list(dict.fromkeys(row["shape"] for row in measured["rows"]))
    portraits = [
        with_stages(shape, [row for row in measured["rows"] if row["shape"] == shape])
        for shape in shapes
    ]
    about = {
        "device": DEVICE,
        **{key: measured[key] for key in ("gpu", "date", "commit")},
        "method": f"{METHOD}; the simulated times are those of the model beside this file",
        "kernels": {p.shape: p.kernel.name.removeprefix("hopper ") for p in portraits},
        "mean_error_percent": {p.shape: p.mean_error for p in portraits},
        "weighted_error_percent": {p.shape: p.weighted_error for p in portraits},
    }
    return kept(about, [row for p in portraits for row in rows_of(p)])


def with_stages(shape: str, rows: Sequence[dict[str, Any]]) -> Portrait:
    """Returns the portrait of a shape whose stages have these measured times."""
    simulated = portrait(load_profile(DEVICE), shape, Shape.of(shape), stamps=None)
    spans = [s for s in simulated.simulated if s.block < MOST_BLOCKS or s.stage.startswith(AT_END)]
    of_model = {(e.lane, e.stage): e.simulated for e in stage_errors([spans], spans)}
    errors = [
        StageError(row["lane"], row["stage"], row["spans"], round(row["measured_us"], 4) * 1e-6,
                   of_model.get((row["lane"], row["stage"]), 0.0))
        for row in rows
    ]  # fmt: skip
    return dataclasses.replace(simulated, errors=errors)


def main(arguments: Sequence[str]) -> None:
    source = Path(arguments[0]) if arguments else RESULT
    text = renewed(json.loads(source.read_text()))
    RESULT.write_text(text)
    result = json.loads(text)
    print(json.dumps({key: result[key] for key in result if key.endswith("percent")}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
