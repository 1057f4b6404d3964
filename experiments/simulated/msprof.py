"""Draws the pipe times that msprof measured on an Ascend NPU beside simulated ones.

    python -m experiments.simulated.msprof PipeUtilization.csv --kernel=fia --batch=32 \
        --kv_len=4096 --heads=128 --profile=Ascend910B3 --picture=pipes.png

The file is the one of this name that `msprof op` writes: a row per block, that is per cube or
vector core, with its busy microseconds per pipe. The times are means over blocks. The simulated
ones are the shares of the longest work item, times the time of all cores.
"""

import argparse
import csv
import math
from collections.abc import Mapping
from pathlib import Path

from experiments.framework import plotting
from mla_jax.hal import Problem, load_profile
from mla_jax.hal.simulator.simulate import Report, simulate

COLUMNS = {  # by engine of the simulator
    "cube": "aic_cube_time(us)",
    "mte1": "aic_mte1_time(us)",
    "mte2": "aic_mte2_time(us)",
    "fixpipe": "aic_fixpipe_time(us)",
    "vector": "aiv_vec_time(us)",
    "mte2v": "aiv_mte2_time(us)",
    "mte3": "aiv_mte3_time(us)",
}
TOTAL = "aic_time(us)"


def read_pipes(path: Path) -> dict[str, float]:
    """Returns the mean microseconds per engine, and "total" of a cube core.

    A cell of another kind of core is empty or no number. Raises ValueError for a missing column or
    one without any number.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path.name} has no rows")
    found = {}
    for engine, column in {**COLUMNS, "total": TOTAL}.items():
        if column not in rows[0]:
            raise ValueError(f"{path.name} has no column {column}")
        values = [value for row in rows if (value := _number(row[column])) is not None]
        if not values:
            raise ValueError(f"{path.name}: column {column} has no number")
        found[engine] = math.fsum(values) / len(values)
    return found


def _number(cell: str | None) -> float | None:
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def beside(measured: Mapping[str, float], report: Report) -> list[dict[str, float | str]]:
    """Returns measured and simulated microseconds of each engine, and the total."""
    microseconds = report.cores * 1e6
    simulated = {e: report.engine_share.get(e, 0.0) * microseconds for e in COLUMNS}
    simulated["total"] = microseconds
    return [
        {"engine": engine, "measured_us": measured[engine], "simulated_us": simulated[engine]}
        for engine in simulated
    ]


def draw(path: Path, title: str, rows: list[dict[str, float | str]]) -> None:
    """Draws two bars per engine."""
    with plotting.figure(path, title, size=(8, 4)) as axes:
        for i, key in enumerate(("measured_us", "simulated_us")):
            places = [n + 0.4 * i for n in range(len(rows))]
            axes.bar(places, [row[key] for row in rows], 0.38, label=key.removesuffix("_us"),
                     color=plotting.look(i)["color"])  # fmt: skip
        axes.set_xticks([n + 0.2 for n in range(len(rows))], [str(r["engine"]) for r in rows])
        axes.set_ylabel("µs busy per core")
        plotting.legend(axes)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="msprof's pipe times beside simulated ones")
    parser.add_argument("file", type=Path)
    parser.add_argument("--profile", default="Ascend910B3")
    parser.add_argument("--kernel", default="fia")
    for name, value in (("batch", 1), ("kv_len", 4096), ("heads", 128), ("s_q", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--picture", type=Path, default=Path("pipes.png"))
    given = parser.parse_args(arguments)
    try:
        problem = Problem((given.kv_len,) * given.batch, given.heads, given.s_q, given.dtype)
        report = simulate(load_profile(given.profile), problem, given.kernel)
        rows = beside(read_pipes(given.file), report)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for row in rows:
        print(f"{row['engine']:<8} {row['measured_us']:10.2f} {row['simulated_us']:10.2f}")
    draw(given.picture, f"{given.kernel} on {given.profile}", rows)


if __name__ == "__main__":
    main()
