"""Compares the tiles that a profile chooses with all legal ones, on random shapes.

    python -m experiments.launch --experiment=choices --seconds=1500 --output_dir=out

On an H100 or H200 it times every legal config of every shape, the simulated favourites first. A
second run with the same folder resumes; --collect makes a result of the rows in it. choices.json
is for benchmarks/measured/h200_choices.json, where the experiment `best` finds it. Elsewhere it
simulates an H200 only.
"""

import dataclasses
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.framework.console import say, show_table, track
from experiments.framework.experiment import Outcome, Output, Row
from experiments.framework.journal import Journal
from experiments.framework.options import flag, seed_flag
from experiments.framework.results import write_whole
from experiments.speed.benchmark import collected, measured_ceilings
from experiments.speed.decode.runner import Runner, Task
from experiments.speed.decode.setup import Setup
from experiments.speed.shapes import Shape
from experiments.speed.tiles.drawn import SEED, Tilings, capacities, drawn
from mla_jax.hal import load_profile
from mla_jax.registry import IMPLEMENTATIONS
from pallas_kernels.hopper import device

SUMMARY = "the tiles that a profile chooses, beside all legal ones: simulated and timed"

NEAR = 0.03  # a choice is near the best one if it is at most so much slower
COLUMNS = {  # result.json has the names of the tiles, too
    "shape": "shape",
    "us": "us of the choice",
    "best_us": "of the best",
    "distance": "slower by",
    "simulated_distance": "simulated best slower by",
    "simulated_gain": "simulated gain over the choice",
    "rank_correlation": "rank correlation",
}


@dataclasses.dataclass(frozen=True)
class Options:
    shapes: int = flag(60, "random shapes", lower_bound=1)
    seed: int = seed_flag("of the shapes", SEED)
    most: int = flag(0, "configs per shape, the simulated favourites; 0: all", lower_bound=0)
    seconds: float = flag(0.0, "time after which no work starts; 0: no limit", lower_bound=0)
    memory_gib: float = flag(0.0, "for caches; 0 is 60 % of the device's", lower_bound=0)
    collect: bool = flag(False, "run nothing, make a result of the rows in the folder")


def run(options: Options, output: Output) -> Outcome:
    setup = Setup.here(options.memory_gib, 512, 64, options.seed)
    setup = dataclasses.replace(setup, exact_tables=True)
    profile = device.profile() or load_profile("H200_SXM")
    shapes = drawn(options.seed, options.shapes)
    fitting = capacities(shapes, setup)
    say(f"{len(shapes)} shapes of seed {options.seed}, of which {len(fitting)} fit the memory")
    tilings = {
        shape: Tilings.of(shape, profile, capacity)
        for shape, capacity in track(fitting.items(), "simulating")
    }
    tasks = [
        (shape, who)
        for shape, tiling in tilings.items()
        for who in tiling.contenders()[: options.most or None]
    ]
    reason = IMPLEMENTATIONS["hopper"].unavailable(None)
    journal, left = None, 0
    if options.collect:
        journal = collected(output)
    elif reason is None:
        journal, left = timed(tasks, setup, options, output)
    else:
        say(f"nothing is timed: {reason}")
    us, failed = times(journal)
    rows = [row_of(shape, tiling, us.get(shape, {})) for shape, tiling in tilings.items()]
    show_table(f"Tiles on {profile.name}", rows, COLUMNS)
    measured = [
        {**dataclasses.asdict(shape), "tiles": name, "us": value,
         "simulated_us": tilings[shape].simulated.get(name)}
        for shape, found in us.items() if shape in tilings for name, value in found.items()
    ]  # fmt: skip
    made = [] if journal is None else [session_words(s) for s in journal.sessions]
    content = {"device": profile.name, "seed": options.seed, "made": made, "rows": measured}
    write_whole(output.path("choices.json"), json.dumps(content, indent=1) + "\n")
    headline = headline_of(rows)
    return Outcome(
        passed=not failed and (journal is None or bool(us)),
        summary=words(headline, len(rows)) + f"; {failed} failed" * bool(failed)
        + f", {left} left for another run" * bool(left),
        rows=rows,
        headline={"seed": options.seed, "profile": profile.name, "left": left, **headline},
        made=None if journal is None else journal.made,
    )  # fmt: skip


def timed(
    tasks: Sequence[Task], setup: Setup, options: Options, output: Output
) -> tuple[Journal, int]:
    """Times the tasks; returns their rows, and how many were left for lack of time."""
    journal = Journal.open(output.rows_path())
    runner = Runner(setup, journal, options.seconds, processes=os.cpu_count() or 1)
    journal.begin(measured_ceilings(), setup.widths)
    left = runner.run(tasks)
    journal.end()
    return journal, left


def session_words(session: Mapping[str, Any]) -> dict[str, str]:
    """Returns when, on which card and by which commit the rows of a session were made."""
    environment = session["environment"]
    return {
        "date": session["started"][:10],
        "gpu": environment["devices"][0],
        "commit": environment["versions"]["commit"],
    }


def times(journal: Journal | None) -> tuple[dict[Shape, dict[str, float]], int]:
    """Returns the measured microseconds of each shape by tiles, and how many rows failed."""
    rows = [] if journal is None else list(journal.rows.values())
    found: dict[Shape, dict[str, float]] = {}
    for row in rows:
        if row["status"] == "measured":
            found.setdefault(Shape.of(row), {})[row["implementation"]] = row["us"]
    return found, sum(row["status"] == "failed" for row in rows)


def row_of(shape: Shape, tilings: Tilings, us: Mapping[str, float]) -> Row:
    """Returns a row of the result. us: measured microseconds by tiles, {} without a GPU."""
    row: Row = {
        "shape": shape.label,
        **dataclasses.asdict(shape),
        "configs": len(tilings.configs),
        "timed": len(us),
        "chosen": tilings.chosen,
        "source": tilings.source,
        "simulated": tilings.fastest,
        "simulated_us": tilings.simulated[tilings.fastest],
        "simulated_gain": _gain(tilings),
        **dict.fromkeys(("us", "best", "best_us", "distance", "simulated_distance")),
        "rank_correlation": None,
    }
    if us:
        best = min(us, key=lambda name: us[name])
        row |= {"best": best, "best_us": us[best], "us": us.get(tilings.chosen)}
        for column, name in (
            ("distance", tilings.chosen),
            ("simulated_distance", row["simulated"]),
        ):
            row[column] = us[name] / us[best] - 1 if name in us else None
        both = [name for name in us if name in tilings.simulated]
        simulated = [tilings.simulated[name] for name in both]
        row["rank_correlation"] = rank_correlation(simulated, [us[name] for name in both])
    return row


def _gain(tilings: Tilings) -> float | None:
    """Returns by how much the simulated best is faster than the choice, in the simulator."""
    chosen = tilings.simulated.get(tilings.chosen)
    return None if chosen is None else chosen / tilings.simulated[tilings.fastest] - 1


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Returns Spearman's: that of the ranks, with equal ranks for ties; None: not defined."""
    if len(a) < 3:
        return None
    ranks = [_ranks(values) for values in (a, b)]
    try:
        return statistics.correlation(*ranks)
    except statistics.StatisticsError:  # all values are equal
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    """Returns ranks; values within 0.01 % of each other count as equal."""
    rounded = [float(f"{value:.4g}") for value in values]
    below = [sum(other < value for other in rounded) for value in rounded]
    return [n + (rounded.count(value) - 1) / 2 for n, value in zip(below, rounded, strict=True)]


def headline_of(rows: Sequence[Row]) -> Row:
    """Returns how near the choices are to the best tiles, over the shapes with times."""
    found: Row = {"shapes": len(rows)}
    for name, column in (("chosen", "distance"), ("simulated", "simulated_distance")):
        distances = [row[column] for row in rows if row[column] is not None]
        found |= {
            f"{name}_timed": len(distances),
            f"{name}_near": sum(d <= NEAR for d in distances),
            f"{name}_worst": max(distances, default=None),
            f"{name}_mean": statistics.geometric_mean([1 + d for d in distances]) - 1
            if distances
            else None,
        }
    correlations = [r["rank_correlation"] for r in rows if r["rank_correlation"] is not None]
    return found | {
        "rank_correlation": statistics.fmean(correlations) if correlations else None,
        "agreed": sum(row["chosen"] == row["simulated"] for row in rows),
    }


def words(headline: Row, shapes: int) -> str:
    """Returns the finding in a sentence."""
    if not headline["chosen_timed"]:
        return (
            f"{shapes} shapes simulated, nothing timed: the chosen tiles are the simulated best "
            f"in {headline['agreed']}"
        )
    said = [
        f"{who}: {headline[f'{who}_near']} of {headline[f'{who}_timed']} within {NEAR:.0%} of the "
        f"best, {headline[f'{who}_mean']:.1%} slower on average, worst "
        f"{headline[f'{who}_worst']:.1%}"
        for who in ("chosen", "simulated")
        if headline[f"{who}_timed"]
    ]
    correlation = headline["rank_correlation"]
    if correlation is not None:
        said.append(f"rank correlation of simulated and measured times {correlation:.2f}")
    return "; ".join(said)
