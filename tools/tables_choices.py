"""Table of the tiles that a profile chooses beside others that were timed, from `choices`."""

from pathlib import Path
from statistics import geometric_mean

from tables_common import SHAPE, Row, read, shape_cells, table, wrapped

from experiments.speed.shapes import Shape
from experiments.speed.tiles.choices import NEAR, row_of
from experiments.speed.tiles.drawn import Tilings
from mla_jax.hal import load_profile

FIELDS = ("batch", "dtype", "heads", "s_q", "page_size", "lengths", "kv_len")
GRAIN = 128  # tokens: block tables are taken to reach as far as the longest request


def choices(root: Path, card: str) -> str:
    """The shapes whose tiles were timed: the table's, the simulated favourite and the best."""
    path = root / "benchmarks" / "measured" / f"{card}_choices.json"
    if not path.is_file():
        return "No result is committed yet."
    result = read(path)
    profile, us = load_profile(result["device"]), _times(result["rows"])
    rows = []
    for shape, found in us.items():
        capacity = -(-max(shape.seq_lens) // GRAIN) * GRAIN
        rows.append((shape, row_of(shape, Tilings.of(shape, profile, capacity), found)))
    made = result["made"][-1]
    caption = (
        f"Microseconds per launch. Up to {max(map(len, us.values()))} configs were timed for each "
        f"of {len(rows)} random shapes of seed {result['seed']}, on {made['gpu']}, {made['date']}, "
        f"our code at {made['commit']}. {_in_words('The table', rows, 'distance')} "
        f"{_in_words('The simulator', rows, 'simulated_distance')}"
    )
    lines = [
        [
            *shape_cells(shape.heads, shape.s_q, shape.batch, shape.lengths, shape.kv_len),
            *_cells(row["us"], row["distance"]),
            *_cells(found.get(row["simulated"]), row["simulated_distance"]),
            f"{row['best_us']:.1f}",
        ]
        for (shape, row), found in zip(rows, us.values(), strict=True)
    ]
    header = [*SHAPE, "the table's", "slower", "simulated favourite", "slower", "best"]
    return f"{wrapped(caption)}\n\n{table(header, lines, words=0)}"


def _times(rows: list[Row]) -> dict[Shape, dict[str, float]]:
    found: dict[Shape, dict[str, float]] = {}
    for row in rows:
        shape = Shape(**{name: row[name] for name in FIELDS})
        found.setdefault(shape, {})[row["tiles"]] = row["us"]
    return found


def _cells(us: float | None, distance: float | None) -> tuple[str, str]:
    return ("not timed", "") if us is None else (f"{us:.1f}", f"{distance:.0%}")


def _in_words(who: str, rows: list[tuple[Shape, Row]], column: str) -> str:
    distances = [row[column] for _, row in rows if row[column] is not None]
    near = sum(distance <= NEAR for distance in distances)
    mean = geometric_mean([1 + distance for distance in distances]) - 1
    return (
        f"{who} is within {NEAR:.0%} of the best in {near} of {len(distances)}, and {mean:.0%} "
        f"slower on average."
    )
