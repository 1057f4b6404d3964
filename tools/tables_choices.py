"""Table of the tiles that a profile chooses beside others that were timed, from `choices`."""

from pathlib import Path

from tables_common import SHAPE, Row, read, shape_cells, table, wrapped

from experiments.speed.decode.pools import reach
from experiments.speed.shapes import Shape
from experiments.speed.tiles.choices import NEAR, headline_of, row_of
from experiments.speed.tiles.drawn import Tilings
from mla_jax.hal import load_profile


def choices(root: Path, card: str) -> str:
    """The shapes whose tiles were timed: those of tuned.json, the simulator's, and the best."""
    path = root / "benchmarks" / "measured" / f"{card}_choices.json"
    if not path.is_file():
        return "No result is committed yet."
    result = read(path)
    profile, us = load_profile(result["device"]), _times(result["rows"])
    rows = [
        row_of(shape, Tilings.of(shape, profile, reach(shape)), found)
        for shape, found in us.items()
    ]
    headline, made = headline_of(rows), result["made"][-1]
    commits = ", ".join(dict.fromkeys(one["commit"] for one in result["made"]))
    caption = (
        f"Microseconds per launch. Up to {max(map(len, us.values()))} configs were timed for each "
        f"of {len(rows)} random shapes of seed {result['seed']}, on {made['gpu']}, {made['date']}, "
        f"our code at {commits}. "
        f"{_in_words('The choice of `tuned.json`', headline, 'chosen')} "
        f"{_in_words('That of the simulator', headline, 'simulated')}"
    )
    lines = [
        [
            *shape_cells(shape.heads, shape.s_q, shape.batch, shape.lengths, shape.kv_len),
            *_cells(row["us"], row["distance"]),
            *_cells(found.get(row["simulated"]), row["simulated_distance"]),
            f"{row['best_us']:.1f}",
        ]
        for row, (shape, found) in zip(rows, us.items(), strict=True)
    ]
    header = [*SHAPE, "`tuned.json`", "slower", "simulator", "slower", "best"]
    return f"{wrapped(caption)}\n\n{table(header, lines, words=0)}"


def _times(rows: list[Row]) -> dict[Shape, dict[str, float]]:
    found: dict[Shape, dict[str, float]] = {}
    for row in rows:
        found.setdefault(Shape.of(row), {})[row["tiles"]] = row["us"]
    return found


def _cells(us: float | None, distance: float | None) -> tuple[str, str]:
    return ("not timed", "") if us is None else (f"{us:.1f}", f"{distance:.0%}")


def _in_words(who: str, headline: Row, name: str) -> str:
    """Returns a sentence of `headline_of`. name: of the choice, in its keys."""
    if not headline[f"{name}_timed"]:
        return f"{who} is not timed."
    return (
        f"{who} is within {NEAR:.0%} of the best in {headline[f'{name}_near']} of "
        f"{headline[f'{name}_timed']}, and {headline[f'{name}_mean']:.0%} slower on average."
    )
