"""Compares the model of our own kernels with stages that time stamps showed, and writes both down.

    python -m experiments.simulated.fitting.portrait_errors
    python -m experiments.simulated.fitting.portrait_errors out/portrait/result.json

It writes benchmarks/measured/h200_portrait.json, from which `tools/tables.py` makes a table of
docs/hal.md. The measured times are those of that file, or those of a run of the experiment
`portrait` on an H200. The simulated ones are those of the model as it is now. It takes seconds.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.simulated.fitting.fit_hopper import DEVICE
from experiments.simulated.portrait import Portrait, portrait, rows_of, shape_of
from experiments.simulated.portrait_lanes import MOST_BLOCKS, Span, StageError, stage_errors
from experiments.simulated.tables.predictions import MEASURED
from mla_jax.hal import Problem, load_profile

RESULT = MEASURED / "h200_portrait.json"
GPU = "NVIDIA H200"
METHOD = (
    "time stamps of one thread per warpgroup (pallas_kernels/hopper/parts/stamps.py) in the first "
    "work item of three workers in four runs, uniform lengths, pages of 64 in random order; made "
    "by the experiment portrait at `commit`; the simulated times are those of the model in the "
    "checkout of this file (experiments/simulated/fitting/portrait_errors.py)"
)

Result = dict[str, Any]


def renewed(measured: Result) -> Result:
    """Returns measured stages beside the times of the model as it is now.

    measured: what this file writes, or the result of the experiment.
    """
    shapes = list(dict.fromkeys(row["shape"] for row in measured["rows"]))
    portraits = [
        with_stages(shape, [row for row in measured["rows"] if row["shape"] == shape])
        for shape in shapes
    ]
    return {
        "device": DEVICE,
        **origin(measured),
        "method": METHOD,
        "mean_error_percent": {p.shape: round(p.mean_error or 0.0, 1) for p in portraits},
        "weighted_error_percent": {p.shape: round(p.weighted_error or 0.0, 1) for p in portraits},
        "rows": [rounded(row) for p in portraits for row in rows_of(p)],
    }


def origin(measured: Result) -> dict[str, str]:
    """Returns the GPU, the date and the commit of a run."""
    if "environment" not in measured:
        return {key: measured[key] for key in ("gpu", "date", "commit")}
    environment = measured["environment"]
    (gpu,) = environment["devices"]
    if gpu != GPU:
        raise ValueError(f"environment.devices = [{gpu!r}], wanted [{GPU!r}]")
    commit = environment["versions"]["commit"]
    return {"gpu": gpu, "date": measured["started"][:10], "commit": commit}


def with_stages(shape: str, rows: Sequence[dict[str, Any]]) -> Portrait:
    """Returns the portrait of a shape whose stages have these measured times."""
    heads, requests, tokens = shape_of(shape)
    simulated = portrait(
        load_profile(DEVICE), shape, Problem((tokens,) * requests, heads), stamps=None
    )
    spans = [span for span in simulated.simulated if _is_compared(span)]
    of_model = {(e.lane, e.stage): e.simulated for e in stage_errors([spans], spans)}
    errors = [
        StageError(row["lane"], row["stage"], row["spans"], round(row["measured_us"], 4) * 1e-6,
                   of_model.get((row["lane"], row["stage"]), 0.0))
        for row in rows
    ]  # fmt: skip
    return dataclasses.replace(simulated, errors=errors)


def _is_compared(span: Span) -> bool:
    """Returns whether a span is of a block that has stamps, or of the item's end."""
    return span.block < MOST_BLOCKS or span.stage.startswith(("SUM", "STORE", "COMBINE"))


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}


def main(arguments: Sequence[str]) -> None:
    source = Path(arguments[0]) if arguments else RESULT
    result = renewed(json.loads(source.read_text()))
    rows = ",\n".join(f"    {json.dumps(row)}" for row in result.pop("rows"))
    head = json.dumps(result, indent=2).removesuffix("\n}")
    RESULT.write_text(f'{head},\n  "rows": [\n{rows}\n  ]\n}}\n')
    print(json.dumps({key: result[key] for key in result if key.endswith("percent")}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
