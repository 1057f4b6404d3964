"""The demo's larger batch: attention of decode steps and of prefill, timed and checked.

Its size is that of a batch on a server. The implementations alternate, and their outputs are
compared with float64. Decode runs over the paged cache in the absorbed form, prefill over packed
prompts in the expanded form.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework import plotting
from experiments.framework.console import say, show_table
from experiments.framework.errors import relative_error
from experiments.framework.experiment import Row
from experiments.framework.results import first_line
from experiments.speed import prefill
from experiments.speed.decode.bursts import time_bursts
from experiments.speed.decode.checks import BOUND, BOUND_OF_LSE
from experiments.speed.decode.contenders import Contender
from experiments.speed.decode.inputs import Inputs
from experiments.speed.decode.pools import Pool
from experiments.speed.decode.programs import Programs, Work
from experiments.speed.decode.setup import SCALE, Setup
from experiments.speed.prefill_batches import Batch
from experiments.speed.shapes import Shape
from mla_jax.reference.attention import attention_float64

BASELINE = "xla"
BASELINE_LAYERS = 2  # layers of its program: its launches are long and take long to compile
CHECKED_REQUESTS, CHECKED_TOKENS = 3, 4  # at most, per shape

COLUMNS = {
    "phase": "phase",
    "batch": "batch",
    "heads": "heads",
    "implementation": "by",
    "ms": "ms per layer",
    "speed_over_xla": "x xla's speed",
    "tflops": "TFLOPS",
    "gb_per_s": "GB/s",
    "error": "error",
    "lse_error": "lse error",
    "passed": "in bound",
}


def contender(name: str) -> Contender:
    """Returns an implementation with default options."""
    layers = BASELINE_LAYERS if name == BASELINE else None
    return Contender(name, (("implementation", name),), most_layers=layers)


@dataclasses.dataclass(frozen=True)
class Job:
    """One implementation on one decode step."""

    work: Work
    name: str

    def compile(self) -> Programs | str:
        """Compiles its burst and its planner, which takes seconds, most of them outside Python.

        Returns the reason where the implementation can't compute this shape.
        """
        if (reason := self.work.refuses(self._contender)) is not None:
            return f"refused: {reason}"
        return self.work.compile(self._contender, [self.work.row])

    @property
    def _contender(self) -> Contender:
        """The implementation, timed back to back only, because bursts take long to compile."""
        return dataclasses.replace(contender(self.name), separated=False)


def jobs_of(shapes: Sequence[Shape], names: Sequence[str], setup: Setup) -> list[Job]:
    """Returns a job per implementation and shape; shapes with the same lengths share caches."""
    jobs = []
    for shape in shapes:
        alike = [other for other in shapes if other.seq_lens == shape.seq_lens]
        work = Work(shape, Pool.of(alike, setup), setup)
        jobs += [Job(work, name) for name in names]
    return jobs


def prefill_jobs(batch: Batch | None, heads: int, names: Sequence[str]) -> list[prefill.Job]:
    """Returns a job per implementation."""
    options = prefill.Options()
    return [prefill.Job(batch, heads, name, options) for name in names] if batch else []


def run_prefill(jobs: Sequence[prefill.Job], programs: Mapping[Any, Any]) -> list[Row]:
    """Runs the jobs of one batch; rows and programs are as in `run`."""
    batch, heads, options = jobs[0].batch, jobs[0].heads, jobs[0].options
    rows = prefill.time_batch(batch, heads, jobs, programs, options)
    for row in rows:
        row |= {"phase": "prefill", "batch": f"{batch.requests} x {batch.queries} tokens"}
        if (status := row.pop("status")) != "measured":
            row["ms"] = status
    return rows


def run(jobs: Sequence[Job], programs: Mapping[Any, Any]) -> list[Row]:
    """Runs the jobs of decode steps and returns a row for each.

    `programs` has, for each job, its programs or the reason why it has none. The row of a job
    without a result has this reason instead of numbers.
    """
    rows: list[Row] = []
    for pool in dict.fromkeys(job.work.pool for job in jobs):
        mine = [job for job in jobs if job.work.pool == pool]
        layers = pool.fill(mine[0].work.setup)
        for work in dict.fromkeys(job.work for job in mine):
            names = [job for job in mine if job.work == work]
            rows += _run_shape(work, names, programs, layers)
        del layers
    return rows


def _run_shape(
    work: Work,
    jobs: Sequence[Job],
    programs: Mapping[Any, Any],
    layers: list[dict[str, jax.Array]],
) -> list[Row]:
    reasons: dict[str, str] = {}
    ready: dict[str, Programs] = {}
    for job in jobs:
        found = programs[job]
        if isinstance(found, Programs):
            ready[job.name] = found
        else:
            reasons[job.name] = found
    measured: dict[str, Row] = {}
    try:
        inputs = make_inputs(work, layers)
        checked = check(inputs, ready)
        bursts = {name: _burst(inputs, one) for name, one in ready.items()}
        timings = time_bursts(bursts, rounds=work.setup.rounds, pause=work.setup.pause)
    except (RuntimeError, ValueError) as error:  # out of memory, or times below the noise
        reasons |= {name: f"failed: {first_line(error)}" for name in ready}
    else:
        for name, timing in timings.items():
            measured[name] = rates(work.row, timing.us) | {"host_bound": timing.host_bound}
            measured[name] |= checked[name]
    rows = []
    for job in jobs:
        row: Row = {
            "phase": "decode",
            "batch": f"{work.row.batch} x {work.row.kv_len} keys",
            "heads": work.row.heads,
            "implementation": job.name,
        }
        if job.name in measured:
            row |= measured[job.name]
            if job.name != BASELINE and BASELINE in measured:
                row["speed_over_xla"] = measured[BASELINE]["ms"] / row["ms"]
        else:
            reason = reasons[job.name]
            row |= {"ms": reason, "passed": False if reason.startswith("failed") else None}
        rows.append(row)
    return rows


def make_inputs(work: Work, layers: list[dict[str, jax.Array]]) -> Inputs:
    """Returns inputs with pages in random order and q of k's magnitude, made on the device."""
    row, setup = work.row, work.setup
    order = np.random.default_rng(setup.seed).permutation(work.pool.tokens // row.page_size)
    count = -(-row.kv_len // row.page_size)
    tables = np.zeros((row.batch, work.capacity // row.page_size), np.int32)
    tables[:, :count] = order[: row.batch * count].reshape(row.batch, count)
    draw = jax.jit(functools.partial(jax.random.normal, shape=work.q.shape, dtype=work.q.dtype))
    q = draw(jax.random.key(setup.seed))
    return Inputs(row, setup, layers, q, tables, jnp.asarray(row.seq_lens, jnp.int32))


def _burst(inputs: Inputs, programs: Programs) -> Any:
    (program,) = programs.bursts.values()
    return program.burst(inputs.q, inputs.layers[: programs.layers], inputs.shared(programs))


def check(inputs: Inputs, programs: Mapping[str, Programs]) -> dict[str, Row]:
    """Returns each implementation's errors relative to float64, and whether they are in bounds.

    A few tokens of a few requests are compared. All outputs must be finite.
    """
    row, found = inputs.row, {}
    requests = sorted({0, row.batch // 2, row.batch - 1})[:CHECKED_REQUESTS]
    tokens = sorted({0, row.s_q // 3, row.s_q // 2, row.s_q - 1})[:CHECKED_TOKENS]
    q = {(r, t): np.asarray(inputs.q[r, t]) for r in requests for t in tokens}
    wanted: dict[int, dict[tuple[int, int], Any]] = {}
    for name, one in programs.items():
        (program,) = one.bursts.values()
        layer = (program.launches - 1) % one.layers
        if layer not in wanted:
            wanted[layer] = {}
            for request in requests:
                keys = inputs.rows_of(request, layer)
                for token in tokens:
                    wanted[layer][request, token] = attention_float64(
                        q[request, token][None],
                        keys[: row.kv_len - row.s_q + token + 1],
                        softmax_scale=SCALE,
                        kv_lora_rank=inputs.setup.kv_lora_rank,
                    )
        layers, shared = inputs.layers[: one.layers], inputs.shared(one)
        o, lse = program.last_output(inputs.q, layers, shared)
        places = list(wanted[layer])
        got_o = np.stack([np.asarray(o[place]) for place in places])
        got_lse = np.stack([np.asarray(lse[place]) for place in places])
        error = relative_error(got_o, np.stack([wanted[layer][p][0][0] for p in places]))
        off = np.abs(got_lse - np.stack([wanted[layer][p][1][0] for p in places]))
        finite = bool(_all_finite(o) & _all_finite(lse))
        found[name] = {
            "error": error,
            "lse_error": float(off.max()),
            "bound": BOUND[row.dtype],
            "passed": bool(
                finite and error <= BOUND[row.dtype] and off.max() <= BOUND_OF_LSE[row.dtype]
            ),
        }
    return found


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def rates(row: Shape, us: float) -> Row:
    """Returns time, operations on visible keys, and bytes of q, o and KV, which is read once."""
    tokens = np.arange(row.s_q)
    pairs = row.batch * int((row.kv_len - row.s_q + tokens + 1).sum()) * row.heads
    vectors = 2 * row.batch * row.s_q * row.heads * (576 + 512)
    keys = 1152 * row.batch * row.kv_len
    return {
        "ms": us / 1e3,
        "tflops": 2 * pairs * (576 + 512) / us / 1e6,
        "gb_per_s": (keys + vectors) / us / 1e3,
    }


def compiling(job: Job | prefill.Job) -> Callable[[], Any]:
    """Returns a function that compiles a job, or returns why it can't be compiled."""

    def compile_job() -> Any:
        try:
            return job.compile()
        except Exception as error:  # a compiler may raise anything, and the other rows still count
            return f"failed: {first_line(error)}"

    return compile_job


def show(rows: Sequence[Row], device: str) -> None:
    """Prints the table of the larger batch."""
    title = f"Attention of one layer on {device}, bfloat16, pages of 64: median time, error"
    shown = [row | {"ms": "-" if isinstance(row["ms"], str) else row["ms"]} for row in rows]
    show_table(f"{title} against float64 on a sample", shown, COLUMNS)
    for row in rows:
        if isinstance(row["ms"], str):
            say(f"{row['implementation']}, {row['phase']}, {row['heads']} heads: {row['ms']}")
        elif row["host_bound"]:
            job = f"{row['implementation']}, {row['phase']}, {row['heads']} heads"
            say(f"{job}: launching took the host as long; the GPU's own time may be shorter")


def summary(rows: Sequence[Row]) -> str:
    """Returns how many times as fast as `xla` each other implementation is, per shape."""
    parts = [
        f"{row['implementation']} takes {row['ms']:.3g} ms for the {row['phase']} of "
        f"{row['batch']} with {row['heads']} heads, {row['speed_over_xla']:.1f} times as fast as "
        f"{BASELINE}"
        for row in rows
        if "speed_over_xla" in row
    ]
    return f"Attention as it is served: {'; '.join(parts)}." if parts else ""


def draw(path: Path, rows: Sequence[Row], device: str) -> None:
    """Draws a group of bars per shape and a bar per implementation, on a logarithmic axis."""

    groups = list(dict.fromkeys((row["phase"], row["batch"], row["heads"]) for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    height = 0.8 / max(1, len(names))
    size = (11, 1.6 + 0.42 * max(1, len(groups)) * max(2, len(names)))
    title = f"Attention of one layer, a batch as it is served: {device}"
    with plotting.figure(path, title, size=size) as axes:
        times = [row["ms"] for row in rows if isinstance(row["ms"], float)]
        left = plotting.lowest(times) / 3
        for i, name in enumerate(names):
            mine = {(r["phase"], r["batch"], r["heads"]): r for r in rows
                    if r["implementation"] == name}  # fmt: skip
            label: str | None = plotting.name(name)
            for place, group in enumerate(groups):
                if group not in mine:
                    continue
                y = place + (i - (len(names) - 1) / 2) * height
                ms = mine[group]["ms"]
                if isinstance(ms, str):
                    axes.text(left, y, f"  {plotting.name(name)} {plotting.name(ms, 60)}",
                              va="center", fontsize=8, color=plotting.GREY)  # fmt: skip
                    continue
                bar = axes.barh(y, ms, height * 0.92, color=plotting.look(i)["color"], label=label)
                label = None
                speed = mine[group].get("speed_over_xla")
                text = f" {ms:.3g} ms" + (f", {speed:.1f} x as fast as {BASELINE}" if speed else "")
                axes.bar_label(bar, [text], fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(left, plotting.highest(times) * 4)
        axes.grid(False)
        axes.grid(True, axis="x")
        labels = [f"{p}, {heads} heads\n{batch}" for p, batch, heads in groups]
        axes.set_yticks(range(len(groups)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("ms per layer, shorter is better")
        plotting.legend(axes)
