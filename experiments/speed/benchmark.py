"""Times decode attention on a grid of shapes: all implementations here, plain JAX, and baselines.

    python -m experiments.launch --experiment=benchmark --preset=standard --output_dir=out

A second run with the same folder resumes where the first one ended. --seconds limits the time. A
run that was killed leaves its rows in rows.jsonl, and --collect makes a result of them on any
machine. Each row also has published and measured times of baselines (benchmarks/) and the
simulator's prediction for the device. docs/benchmarking.md explains the columns.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax

from experiments.framework.console import say
from experiments.framework.experiment import InputError, Outcome, Output
from experiments.framework.implementations import chosen
from experiments.framework.journal import Journal
from experiments.framework.options import flag, seed_flag
from experiments.framework.results import write_whole
from experiments.speed import baselines, timing
from experiments.speed.benchmark_comparisons import finished
from experiments.speed.benchmark_pictures import draw
from experiments.speed.benchmark_tables import best_words, markdown, show, write_csv
from experiments.speed.best_when import AXES, PEERS
from experiments.speed.decode.contenders import Contender, contender
from experiments.speed.decode.runner import Runner, Task
from experiments.speed.decode.setup import Setup
from experiments.speed.shapes import (
    DTYPES,
    LENGTHS,
    PAGE_SIZES,
    PRESETS,
    Shape,
    preset,
)

SUMMARY = "times decode attention on a grid, beside plain JAX, baselines and the simulator"


@dataclasses.dataclass(frozen=True)
class Options:
    preset: str | None = flag(
        None, "set of rows; by default tiny on a CPU, else quick", choices=tuple(PRESETS)
    )
    heads: tuple[int, ...] = flag((), "only rows with these values", lower_bound=1)
    s_q: tuple[int, ...] = flag((), "only rows with these values", lower_bound=1)
    batch: tuple[int, ...] = flag((), "only rows with these values", lower_bound=1)
    kv_len: tuple[int, ...] = flag((), "only rows with these values", lower_bound=1)
    lengths: tuple[str, ...] = flag((), "only rows with these values", choices=LENGTHS)
    page_size: tuple[int, ...] = flag((), "only rows with these values", choices=PAGE_SIZES)
    dtype: tuple[str, ...] = flag((), "only rows with these values, of the cache", choices=DTYPES)
    implementations: tuple[str, ...] = flag(
        (), "which to run; jnp is plain JAX over contiguous KV; by default all"
    )
    peers: tuple[str, ...] = flag(PEERS, "baselines to run if installed", choices=PEERS)
    seconds: float = flag(0.0, "time after which no work starts; 0: no limit", lower_bound=0)
    collect: bool = flag(False, "run nothing, make a result of the rows in the folder")
    memory_gib: float = flag(0.0, "for caches; 0 is 60 % of the device's", lower_bound=0)
    kv_lora_rank: int = flag(512, "of the cache", lower_bound=16)
    rope_dim: int = flag(64, "of the cache", lower_bound=16)
    seed: int = seed_flag("of all random numbers")


def run(options: Options, output: Output) -> Outcome:
    name = options.preset or ("tiny" if jax.default_backend() == "cpu" else "quick")
    rows = filtered(preset(name), options)
    if not rows:
        raise InputError(f"--preset={name} has no row that passes the filters")
    setup = Setup.here(options.memory_gib, options.kv_lora_rank, options.rope_dim, options.seed)
    reason: str | None = "nothing was run"
    if options.collect:
        journal = collected(output)
        who_ran = sorted({who for _, who in journal.rows} - set(PEERS))
        left = missing(journal, tasks_of(rows, [contender(who) for who in who_ran], name))
    else:
        tasks = tasks_of(rows, contenders_of(options.implementations), name)
        journal = Journal.open(output.rows_path())
        runner = Runner(setup, journal, options.seconds)
        journal.begin(measured_ceilings(), setup.widths)
        reason = baselines.unavailable() if options.peers else "none was requested"
        say(f"baselines: {', '.join(options.peers) if reason is None else reason}")
        left = runner.run(tasks, options.peers if reason is None else ())
    table = finished(journal, setup)
    show(table)
    write_csv(output.path("benchmark.csv"), table)
    write_whole(output.path("benchmark.md"), markdown(table))
    draw(output, table, journal)
    if not options.collect:
        journal.end()
    counts = {s: sum(r["status"] == s for r in table) for s in ("measured", "failed", "skipped")}
    counted = ", ".join(f"{count} {status}" for status, count in counts.items())
    remaining = f", {left} left for another run" if left else ""
    return Outcome(
        passed=counts["measured"] > 0 and not counts["failed"],
        summary=f"{counted}{remaining}: {best_words(table)}",
        rows=table,
        headline={
            "preset": name,
            "left": left,
            "counts": counts,
            "peers_missing": reason,
            "sessions": journal.sessions,
        },
        made=journal.made,
    )


def collected(output: Output) -> Journal:
    """Reads the rows in the folder."""
    if not (output.folder / "rows.jsonl").exists():
        raise InputError(f"--collect: there is no rows.jsonl in {output.folder}")
    journal = Journal.open(output.rows_path(), skipped=True)
    if not journal.sessions:
        raise InputError(f"--collect: there is no session in {journal.path}")
    return journal


def missing(journal: Journal, tasks: Iterable[Task]) -> int:
    """Returns how many tasks have no row."""
    return sum((row, who.name) not in journal.rows for row, who in tasks)


def filtered(rows: Iterable[Shape], options: Options) -> list[Shape]:
    """Returns the rows that pass every filter."""
    wanted = {axis: getattr(options, axis) for axis in AXES if getattr(options, axis)}
    return [row for row in rows if all(getattr(row, a) in v for a, v in wanted.items())]


def contenders_of(names: Sequence[str]) -> list[Contender]:
    """Returns those named, or all that can run here and `jnp`. Raises InputError otherwise."""
    ours = [name for name in names if name != "jnp"]
    found = chosen(tuple(ours)) if ours or not names else []
    return [contender(name) for name in [*found, *(["jnp"] if not names or "jnp" in names else [])]]


def tasks_of(rows: Sequence[Shape], contenders: Sequence[Contender], preset: str) -> list[Task]:
    """Returns the pairs of a row and a contender to run.

    `jnp` has no pages and reads bf16, so that it runs bf16 rows with one page size. In `standard`
    a kernel runs every row. Plain JAX then only runs the rows of one token, bf16 and pages of 64.
    """
    has_kernel = any(who.separated for who in contenders)
    first: dict[Shape, int] = {}
    for row in rows:
        key = dataclasses.replace(row, page_size=64)
        if row.page_size == 64 or key not in rows:
            first.setdefault(row.without_pages, row.page_size)

    def runs(row: Shape, who: Contender) -> bool:
        if who.implementation is None and (
            row.dtype != "bf16" or row.page_size != first.get(row.without_pages)
        ):
            return False
        usual = (row.s_q, row.page_size, row.dtype) == (1, 64, "bf16")
        return who.separated or usual or not (preset == "standard" and has_kernel)

    return [(row, who) for row in rows for who in contenders if runs(row, who)]


def measured_ceilings() -> dict[str, float]:
    """Measures rates of this device with XLA, {} on a CPU.

    They are copy and read (GB/s), matmul (TFLOPS) and matmul_int8 (TOPS). On a CPU no rate of one
    program bounds another's: its caches are faster than its memory, its vector units differ by
    dtype, and a launch may use only some of its threads.
    """
    return {} if jax.default_backend() == "cpu" else timing.ceilings()
