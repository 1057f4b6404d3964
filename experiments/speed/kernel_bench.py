"""Times the Hopper decode kernel on the shapes that have a target, with each of its options.

    python -m experiments.launch --experiment=kernel_bench --output_dir=out

Columns, resuming and --collect are those of `benchmark`. It needs an H100 or H200.
"""

import dataclasses
from collections.abc import Callable, Sequence

from experiments.framework.console import show_table
from experiments.framework.experiment import InputError, Outcome, Output, Row
from experiments.framework.journal import Journal
from experiments.framework.options import flag, seed_flag
from experiments.framework.results import write_whole
from experiments.speed import baselines
from experiments.speed.benchmark import collected, measured_ceilings, missing
from experiments.speed.benchmark_comparisons import finished
from experiments.speed.benchmark_tables import markdown, show, write_csv
from experiments.speed.best_when import PEERS
from experiments.speed.decode.contenders import Contender, contender
from experiments.speed.decode.runner import Runner
from experiments.speed.decode.setup import Setup
from experiments.speed.shapes import PRESETS, Shape, preset
from mla_jax.registry import IMPLEMENTATIONS

SUMMARY = "the Hopper kernel and its targets, with each of its options: time and error"

KERNEL = "hopper"
VARIANTS: dict[str, dict[str, str]] = {  # options of the op that differ from the defaults
    "multiply": {},
    "exponent_add": {"rescale": "exponent_add"},
    "partials_bfloat16": {"partial_dtype": "bfloat16"},
    "partials_float32": {"partial_dtype": "float32"},
}
PAGE_BARS = {128: 0.98, 16: 0.9, 1: 0.75}  # page size -> speed relative to pages of 64


@dataclasses.dataclass(frozen=True)
class Options:
    preset: str = flag("bars", "set of rows; bars: those with a target", choices=tuple(PRESETS))
    variants: tuple[str, ...] = flag((), "options to run; default: all", choices=tuple(VARIANTS))
    peers: tuple[str, ...] = flag((), "baselines to run, too", choices=PEERS)
    seconds: float = flag(0.0, "time after which no work starts; 0: no limit", lower_bound=0)
    memory_gib: float = flag(0.0, "for caches; 0 is 60 % of the device's", lower_bound=0)
    seed: int = seed_flag("of all random numbers")
    collect: bool = flag(False, "run nothing, make a result of the rows in the folder")


@dataclasses.dataclass(frozen=True)
class Bar:
    """A target: the smallest value that a column should have in some rows."""

    work: str
    column: str
    wanted: float
    concerns: Callable[[Shape], bool]


def _is(**wanted: object) -> Callable[[Shape], bool]:
    """Returns whether a bf16 row has these values; a tuple allows several.

    Without a value for them, the page size is 64 and lengths are uniform.
    """
    full = {"page_size": 64, "lengths": "uniform", "dtype": "bf16", "s_q": 1} | wanted

    def concerns(row: Shape) -> bool:
        return all(
            getattr(row, axis) in (value if isinstance(value, tuple) else (value,))
            for axis, value in full.items()
        )

    return concerns


_LARGE = _is(heads=128, batch=(64, 128), kv_len=(4096, 16384), s_q=(1, 2))
_PEER, _PEER_SEPARATED = "speed_over_peer_us", "speed_over_peer_us_separated"
BARS = (
    Bar("128 heads, large batches, separated", _PEER_SEPARATED, 1.0, _LARGE),
    Bar("128 heads, large batches, back to back", _PEER, 0.95, _LARGE),
    Bar("64 heads, 128 x 4096, separated", _PEER_SEPARATED, 1.0,
        _is(heads=64, batch=128, kv_len=4096)),
    Bar("16 heads, 128 x 16384, GB/s", "gb_per_s", 4200.0,
        _is(heads=16, batch=128, kv_len=16384)),
    Bar("64 x 1024, 16 and 64 heads", _PEER, 1.1, _is(heads=(16, 64), batch=64, kv_len=1024)),
    Bar("16 requests", _PEER, 1.0,
        _is(heads=(16, 64, 128), batch=16, kv_len=(1024, 4096, 16384))),
    Bar("1 x 16384", _PEER, 1.1, _is(heads=(16, 128), batch=1, kv_len=16384)),
    Bar("1 x 1024", _PEER, 1.0, _is(heads=(16, 128), batch=1, kv_len=1024)),
    Bar("ragged 128 x 4096", _PEER, 1.0,
        _is(heads=(16, 64, 128), batch=128, kv_len=4096, lengths="varlen")),
    *(
        Bar(f"pages of {size} against 64", "speed_over_page_64", wanted,
            _is(heads=64, batch=128, kv_len=4096, page_size=size))
        for size, wanted in PAGE_BARS.items()
    ),
    Bar("against jnp under XLA", "speed_over_jnp", 3.5, _is(heads=(64, 128), batch=(64, 128),
        s_q=(1, 2), kv_len=(4096, 16384), lengths=("uniform", "varlen"))),
)  # fmt: skip


def run(options: Options, output: Output) -> Outcome:
    variants = [variant(name) for name in options.variants or VARIANTS]
    rows = preset(options.preset)
    # The options are only timed with pages of 64, because their cost does not depend on pages.
    tasks = [
        (row, who)
        for row in rows
        for who in [*variants[:1], *(variants[1:] if row.page_size == 64 else ())]
    ] + [(row, contender("jnp")) for row in rows if row.page_size == 64 and row.dtype == "bf16"]
    setup = Setup.here(options.memory_gib, 512, 64, options.seed)
    if options.collect:
        journal = collected(output)
        left = missing(journal, tasks)
    else:
        reason = IMPLEMENTATIONS[KERNEL].unavailable(None)
        if reason is not None:
            raise InputError(f"kernel_bench runs the implementation {KERNEL!r}: {reason}")
        journal = Journal.open(output.rows_path())
        runner = Runner(setup, journal, options.seconds)
        journal.begin(measured_ceilings(), setup.widths)
        left = runner.run(tasks, options.peers if baselines.unavailable() is None else ())
    table = with_pages(finished(journal, setup))
    show(table)
    bars, costs = bar_rows(table), cost_rows(table)
    show_table("Targets", bars)
    show_table("Cost of the options, relative to the first", costs)
    write_csv(output.path("kernel_bench.csv"), table)
    write_whole(output.path("kernel_bench.md"), markdown(table))
    if not options.collect:
        journal.end()
    failed = sum(row["status"] == "failed" for row in table)
    measured = sum(row["status"] == "measured" for row in table)
    met = sum(bar["met"] is True for bar in bars)
    return Outcome(
        passed=measured > 0 and not failed,
        summary=f"{met} of {len(bars)} targets met; {measured} measured, {failed} failed"
        f"{f', {left} left for another run' if left else ''}",
        rows=table,
        headline={"bars": bars, "costs": costs, "left": left, "sessions": journal.sessions},
        made=journal.made,
    )


def variant(name: str) -> Contender:
    """Returns the kernel with the options of that name."""
    options = {"implementation": KERNEL, **VARIANTS[name]}
    return Contender(f"{KERNEL} {name}", tuple(options.items()), separated=True)


def with_pages(table: list[Row]) -> list[Row]:
    """Adds `speed_over_page_64` to the rows for which it is known on the same device."""

    def key(row: Row) -> tuple:
        same = dataclasses.replace(Shape.of(row), page_size=64)
        return row.get("device"), same, row["implementation"]

    known = {
        key(row): row["us"]
        for row in table
        if row["status"] == "measured" and row["page_size"] == 64
    }
    for row in table:
        base = known.get(key(row))
        if row["status"] == "measured" and base is not None:
            row["speed_over_page_64"] = base / row["us"]
    return table


def bar_rows(table: Sequence[Row], implementation: str | None = None) -> list[Row]:
    """Returns each target with the worst of its rows; `met` is None if nothing is known.

    implementation: whose rows; None is the kernel with default options.
    """
    implementation = implementation or variant(next(iter(VARIANTS))).name
    found: list[Row] = []
    for bar in BARS:
        values = [
            (row[bar.column], Shape.of(row).label)
            for row in table
            if row["implementation"] == implementation
            and row.get(bar.column) is not None
            and bar.concerns(Shape.of(row))
        ]
        worst, where = min(values, default=(None, None))
        met = None if worst is None else bool(worst >= bar.wanted)
        found.append({"bar": bar.work, "column": bar.column, "wanted": bar.wanted,
                      "worst": worst, "met": met, "rows": len(values), "where": where})  # fmt: skip
    return found


def cost_rows(table: Sequence[Row]) -> list[Row]:
    """Returns the smallest and largest time relative to the defaults, and the largest error."""
    first, *others = (variant(name).name for name in VARIANTS)
    measured = {
        ((row.get("device"), Shape.of(row)), row["implementation"]): row
        for row in table
        if row["status"] == "measured"
    }
    found: list[Row] = []
    for name in (first, *others):
        mine = [(shape, row) for (shape, who), row in measured.items() if who == name]
        ratios = [
            row["us"] / measured[shape, first]["us"]
            for shape, row in mine
            if (shape, first) in measured
        ]
        if ratios:
            found.append({"options": name, "rows": len(mine), "time_least": min(ratios),
                          "time_most": max(ratios),
                          "largest_error": max(row["error"] for _, row in mine)})  # fmt: skip
    return found
