"""Times attention of packed requests in the expanded form, and compares it with float64.

    python -m experiments.launch --experiment=prefill --output_dir=out

A burst runs the attention of several layers with keys and values of their own, as a model's prefill
does. The layers share a work list. They share k_rope, too: the timing writes an element of it
between launches, and XLA may copy what is written, in every burst. A copy of q would take as long
as a third of a launch. On a GPU with FlashInfer, --peers=flashinfer times its ragged prefill in the
same process.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework import plotting
from experiments.framework.console import say, show_table, track
from experiments.framework.errors import LSE_BOUND, OUTPUT_BOUND, lse_error, relative_error
from experiments.framework.experiment import InputError, Outcome, Output, Row
from experiments.framework.options import flag, seed_flag
from experiments.framework.results import first_line
from experiments.speed import timing
from experiments.speed.benchmark_tables import write_csv
from experiments.speed.decode.bursts import time_bursts
from experiments.speed.decode.setup import SCALE
from experiments.speed.prefill_batches import PRESETS, Batch
from experiments.speed.prefill_peers import FlashInfer, unavailable
from mla_jax import ragged_mla_attention
from mla_jax.prefill.registry import RAGGED_IMPLEMENTATIONS
from mla_jax.ragged.problem import RaggedProblem

SUMMARY = "attention of prefill in the expanded form: time, TFLOPS and error"

NOPE, ROPE, V_DIM = 128, 64, 128  # widths of DeepSeek-V2 and V3
FLASHINFER = "flashinfer"
BURST_SECONDS = 4e-3  # of a fast kernel, approximately
MOST_LAUNCHES = 16  # of a program
CHECKED_ROWS, CHECKED_HEADS, CHECKED_REQUESTS = 4, 3, 3
COLUMNS = {
    "batch": "batch",
    "heads": "heads",
    "implementation": "by",
    "ms": "ms per layer",
    "tflops": "TFLOPS",
    "speed_over_xla": "x xla's speed",
    "error": "error",
    "lse_error": "lse error",
    "passed": "in bound",
}


@dataclasses.dataclass(frozen=True)
class Options:
    preset: str = flag("", "batches to time: served or quick; by default served on a GPU",
                       choices=("", *PRESETS))  # fmt: skip
    batches: tuple[str, ...] = flag((), "in place of the preset's, e.g. 8x1024, 1x2048+14336 "
                                    "(behind earlier tokens), 64x~1000 (ragged)")  # fmt: skip
    heads: tuple[int, ...] = flag((), "in place of the preset's", lower_bound=1)
    implementations: tuple[str, ...] = flag((), "to time; by default all that can run here",
                                            choices=tuple(RAGGED_IMPLEMENTATIONS))  # fmt: skip
    peers: tuple[str, ...] = flag((), "baselines to time, too", choices=(FLASHINFER,))
    dtype: str = flag("bfloat16", "of all arrays", choices=tuple(OUTPUT_BOUND))
    rounds: int = flag(7, "bursts whose median counts", lower_bound=3)
    seed: int = seed_flag("of lengths and values")


@dataclasses.dataclass(frozen=True)
class Job:
    """One implementation on one batch."""

    batch: Batch
    heads: int
    name: str
    options: Options

    @property
    def launches(self) -> tuple[int, int]:
        """How many layers a program has, and how often it runs them."""
        if self.name != "hopper":
            return 1, 1
        bytes_per_layer = 2 * self.batch.num_keys * self.heads * (NOPE + V_DIM)
        layers = min(4, 1 + 2 * timing.L2_BYTES // bytes_per_layer)
        seconds = self.batch.flops(self.heads) / 6e14
        return layers, min(max(1, round(BURST_SECONDS / seconds / layers)), MOST_LAUNCHES // layers)

    def shapes(self) -> tuple[Any, list[Any], Any]:
        """Returns k_rope, (k_nope, v) of each layer, and (q, cu_q_lens, cu_kv_lens), as shapes."""

        def array(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, self.options.dtype)

        keys, heads, layers = self.batch.num_keys, self.heads, self.launches[0]
        layer = array(keys, heads, NOPE), array(keys, heads, V_DIM)
        bounds = jax.ShapeDtypeStruct((self.batch.requests + 1,), jnp.int32)
        q = array(self.batch.num_queries, heads, NOPE + ROPE)
        return array(keys, ROPE), [layer] * layers, (q, bounds, bounds)

    @property
    def refused(self) -> str | None:
        """Why the implementation can't compute this batch, or None."""
        k_rope, ((k_nope, v), *_), (q, *bounds) = self.shapes()
        problem = RaggedProblem(*(q, k_nope, k_rope, v, *bounds, SCALE, True))
        return RAGGED_IMPLEMENTATIONS[self.name].refuses(problem)

    def compile(self) -> timing.ModelProgram | str:
        """Returns the program of a burst, or why there is none."""
        if (reason := self.refused) is not None:
            return f"refused: {reason}"

        def attend(k_rope: jax.Array, layer: tuple, shared: tuple) -> Any:
            (k_nope, v), (q, *bounds) = layer, shared
            return ragged_mla_attention(
                *(q, k_nope, k_rope, v, *bounds),
                softmax_scale=SCALE,
                return_lse=True,
                implementation=self.name,
            )

        try:
            return timing.compile_model(attend, *self.shapes(), passes=self.launches[1])
        except Exception as error:  # a compiler may raise anything, and the other rows still count
            return f"failed: {first_line(error)}"


def run(options: Options, output: Output) -> Outcome:
    here = jax.default_backend()
    batches, heads = PRESETS[options.preset or ("quick" if here == "cpu" else "served")]
    with_options = [Batch.parse(text, options.seed) for text in options.batches or batches]
    names = _names(options)
    if options.peers and (reason := unavailable()) is not None:
        raise InputError(f"--peers: {reason}")
    work = {(batch, h): [Job(batch, h, name, options) for name in names]
            for h in options.heads or heads for batch in with_options}  # fmt: skip
    programs = _compile([job for jobs in work.values() for job in jobs])
    rows: list[Row] = []
    for (batch, h), jobs in track(work.items(), "timing", total=len(work)):
        rows += time_batch(batch, h, jobs, programs, options)
    kind = jax.devices()[0].device_kind
    show_table(f"Prefill attention of one layer on {kind}, {options.dtype}, causal", rows, COLUMNS)
    for row in rows:
        if row["status"] != "measured":
            say(f"{row['implementation']}, {row['batch']}, {row['heads']} heads: {row['status']}")
    write_csv(output.path("prefill.csv"), rows)
    _draw(output, rows, f"Prefill attention of one layer on {kind}, {options.dtype}")
    measured = [row for row in rows if row["status"] == "measured"]
    wrong = any(row["passed"] is False for row in rows)
    rates = [row["tflops"] for row in measured]
    found = f"{min(rates):.3g} to {max(rates):.3g} TFLOPS" if rates else "nothing measured"
    text = f"{len(measured)} of {len(rows)} rows measured, {found}"
    return Outcome(bool(measured) and not wrong, text, rows)


def _names(options: Options) -> list[str]:
    reasons = {name: one.unavailable() for name, one in RAGGED_IMPLEMENTATIONS.items()}
    for name in options.implementations:
        if reasons[name] is not None:
            raise InputError(f"--implementations: {name} can't run here: {reasons[name]}")
    return list(options.implementations) or [n for n, reason in reasons.items() if reason is None]


def _compile(jobs: Sequence[Job]) -> dict[Job, timing.ModelProgram | str]:
    with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
        futures = {job: executor.submit(job.compile) for job in jobs}
        for _ in track(as_completed(futures.values()), "compiling", total=len(futures)):
            pass
    return {job: future.result() for job, future in futures.items()}


def time_batch(
    batch: Batch,
    heads: int,
    jobs: Sequence[Job],
    programs: Mapping[Job, timing.ModelProgram | str],
    options: Options,
) -> list[Row]:
    """Checks and times the contenders of one batch in turns, and returns a row for each.

    A program may be the reason why there is none.
    """
    try:
        return _time(batch, heads, jobs, programs, options)
    except RuntimeError as error:  # out of memory, or times below the noise
        base = {"batch": batch.text, "heads": heads, "status": f"failed: {first_line(error)}"}
        return [base | {"implementation": job.name, "passed": False} for job in jobs]


def _time(
    batch: Batch,
    heads: int,
    jobs: Sequence[Job],
    programs: Mapping[Job, timing.ModelProgram | str],
    options: Options,
) -> list[Row]:
    base = {"batch": batch.text, "heads": heads}
    rows, bursts, checks = [], {}, {}
    most = max(jobs, key=lambda job: job.launches[0])
    k_rope, layers, shared = _arrays(most, options.seed)
    q = shared[0]
    exact = _reference(batch, q, k_rope, layers[0])
    for job in jobs:
        program = programs[job]
        if isinstance(program, str):
            passed = False if program.startswith("failed") else None
            rows.append(base | {"implementation": job.name, "status": program, "passed": passed})
            continue
        mine = layers[: job.launches[0]]
        bursts[job.name] = program.burst(k_rope, mine, shared)
        # The last launch attends to the last layer, so the one that is checked goes to the end.
        o, lse = program.last_output(k_rope, [*mine[1:], mine[0]], shared)
        checks[job.name] = _errors(o, lse, exact, options.dtype)
    if FLASHINFER in options.peers:
        peer = FlashInfer(batch, q, k_rope, layers, scale=SCALE)
        bursts[FLASHINFER] = timing.torch_burst(peer.launch, max(2, most.launches[0]))
        checks[FLASHINFER] = _errors(*peer.output(), exact, options.dtype)
    pause = 0.0 if jax.default_backend() == "cpu" else 0.03
    timings = time_bursts(bursts, rounds=options.rounds, pause=pause) if bursts else {}
    for name, found in timings.items():
        row = base | {"implementation": name, "status": "measured", "ms": found.us / 1e3}
        row |= {"tflops": batch.flops(heads) / found.us / 1e6, "host_bound": found.host_bound}
        if "xla" in timings and name != "xla":
            row["speed_over_xla"] = timings["xla"].us / found.us
        rows.append(row | checks[name])
    return rows


def _arrays(job: Job, seed: int) -> tuple[jax.Array, list[Any], tuple[jax.Array, ...]]:
    """Returns normal values in the shapes of a job, and the bounds of its requests."""
    k_rope, layers, (q, *_) = job.shapes()
    structs, tree = jax.tree.flatten((k_rope, layers, q))
    keys = jax.random.split(jax.random.key(seed), len(structs))
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    values = [draw(key, x.shape, x.dtype) for key, x in zip(keys, structs, strict=True)]
    k_rope, layers, q = jax.tree.unflatten(tree, values)
    return k_rope, layers, (q, *(jax.device_put(x) for x in job.batch.bounds))


def _reference(batch: Batch, q: jax.Array, k_rope: jax.Array, layer: tuple) -> list[tuple]:
    """Returns (row, head, o, lse) in float64 of a few rows of a few requests."""
    found = []
    heads = sorted({0, q.shape[1] // 2, q.shape[1] - 1})[:CHECKED_HEADS]
    cu_q, cu_kv = batch.bounds
    requests = sorted({0, batch.requests // 2, batch.requests - 1})[:CHECKED_REQUESTS]
    for b in requests:
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_kv[b], cu_kv[b + 1])
        count, total = rows.stop - rows.start, keys.stop - keys.start
        rope_keys = np.asarray(k_rope[keys]).astype(np.float64)
        for head in heads:
            k_nope, v = (np.asarray(x[keys, head]).astype(np.float64) for x in layer)
            for i in sorted({0, count // 3, count // 2, count - 1})[:CHECKED_ROWS]:
                row, seen = (
                    np.asarray(q[rows.start + i, head]).astype(np.float64),
                    total - count + i,
                )
                scores = k_nope[: seen + 1] @ row[:NOPE] + rope_keys[: seen + 1] @ row[NOPE:]
                scores *= SCALE
                p = np.exp(scores - scores.max())
                lse = np.log(p.sum()) + scores.max()
                found.append((rows.start + i, head, p @ v[: seen + 1] / p.sum(), lse))
    return found


def _errors(o: Any, lse: Any, exact: Sequence[tuple], dtype: str) -> Row:
    """Returns the errors relative to float64, and whether they are in bounds and all is finite."""
    rows, heads, wanted_o, wanted_lse = zip(*exact, strict=True)
    places = np.array(rows), np.array(heads)
    error = relative_error(np.asarray(o[places]), np.stack(wanted_o))
    off = lse_error(np.asarray(lse[places]), np.stack(wanted_lse))
    finite = bool(jnp.isfinite(o).all() & jnp.isfinite(lse).all())
    passed = finite and error <= OUTPUT_BOUND[dtype] and off <= LSE_BOUND
    return {"error": error, "lse_error": off, "passed": bool(passed)}


def _draw(output: Output, rows: Sequence[Row], title: str) -> None:
    """Draws a group of bars per batch and a bar per contender."""
    groups = list(dict.fromkeys((row["batch"], row["heads"]) for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    width = 0.8 / len(names)
    size = (3 + 1.1 * len(groups) * max(1, len(names) / 2), 4.5)
    with plotting.figure(output.path("prefill.png"), title, size=size) as axes:
        for i, name in enumerate(names):
            mine = {(r["batch"], r["heads"]): r["tflops"] for r in rows
                    if r["implementation"] == name and r["status"] == "measured"}  # fmt: skip
            places = [groups.index(group) + (i - (len(names) - 1) / 2) * width for group in mine]
            color = plotting.look(i)["color"]
            bars = axes.bar(places, list(mine.values()), width * 0.92, color=color, label=name)
            axes.bar_label(bars, [f"{rate:.3g}" for rate in mine.values()], fontsize=8)
        axes.set_xticks(range(len(groups)), [f"{batch}\n{heads} heads" for batch, heads in groups])
        axes.set_ylabel("TFLOPS, more is better")
        axes.grid(False, axis="x")
        plotting.legend(axes)
