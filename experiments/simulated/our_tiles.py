"""Our own Hopper kernels among the candidates of `best`: their legal tiles, and measurements.

The experiment `choices` writes choices.json on a GPU. Those of
benchmarks/measured/CARD_choices.json are committed.
"""

import json
from pathlib import Path
from typing import Any

from experiments.simulated.tables.predictions import lengths_of
from mla_jax.hal import HardwareProfile, Problem
from mla_jax.hal.simulator.hopper import HopperKernel

MEASURED = Path(__file__).parents[2] / "benchmarks" / "measured"
RUNNERS_UP = 5  # that are simulated in full


def our_candidates(
    profile: HardwareProfile, problem: Problem
) -> tuple[dict[str, HopperKernel], str | None]:
    """Returns kernels by the names of their tiles, and the name of those of the tuned table.

    There are none where the kernels or the simulator can't take the problem. The table's name is
    None where its tiles are not legal.
    """
    from pallas_kernels.hopper.choice import choose_tiles, planned_kernel, table_tiles

    try:
        choice = choose_tiles(profile, problem)
    except ValueError:
        return {}, None
    found = [choice.tiles, *(tiles for tiles, _ in choice.runners_up[:RUNNERS_UP])]
    usual = table_tiles(profile, problem)
    if usual is not None and usual not in found:
        found.append(usual)
    kernels = {name_of(tiles): planned_kernel(tiles, profile, problem) for tiles in found}
    return kernels, None if usual is None else name_of(usual)


def name_of(tiles: Any) -> str:
    """Returns a name for tiles: "hopper 32 pairs, stages 2.2.2 and 2, costs 2 and 8".

    These are their rows, whether CTAs are in pairs, the stages of a KV block's left half, right
    half and rope part and of q, and the costs of splitting and of merging in blocks.
    """
    words = f"hopper {tiles.rows_per_tile}" + " pairs" * tiles.in_pairs
    if hasattr(tiles, "q_stages"):
        words += f", stages {'.'.join(map(str, tiles.kv_stages))} and {tiles.q_stages}"
    return f"{words}, costs {tiles.split_overhead} and {tiles.merge_overhead}"


def measured_times(
    profile: HardwareProfile, problem: Problem, folder: Path = MEASURED
) -> dict[str, float]:
    """Returns the microseconds of tiles that were timed on this device and problem, by name."""
    found: dict[str, float] = {}
    for path in sorted(folder.glob("*_choices.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["rows"] if content["device"] == profile.name else ():
            if (row["heads"], row["s_q"], row["batch"]) != (
                problem.heads, problem.s_q, problem.batch,
            ):  # fmt: skip
                continue
            if lengths_of({key: str(value) for key, value in row.items()}) == problem.kv_lens:
                found[row["tiles"]] = row["us"]
    return found


def won(best: str, default: str, us: dict[str, float]) -> str:
    """Returns in words what the best tiles won over the default by measurement."""
    if best not in us or default not in us:
        return "not measured on this device"
    gain = us[default] / us[best] - 1
    return f"measured: {us[best]:.1f} against {us[default]:.1f} us, {gain:+.1%}"
