"""Times configs of the Hopper kernels and writes the best ones to the table.

    python -m experiments.speed.tune_hopper

It runs on the GPU to be tuned. The classes of query rows are those of
pallas_kernels/hopper/tuned.json, or those named: `tune_hopper 16 any int8-16`. For each class,
every config that fits is timed on some workloads and compared with the one in the table. Sizes are
varied first, then the overhead of a work item and of splitting at all. The table is changed if the
geometric mean of the times falls by more than GAIN.
"""

import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels.hopper
from experiments.framework.results import write_whole
from experiments.speed.decode.checks import errors_of
from experiments.speed.decode.inputs import Inputs
from experiments.speed.decode.pools import Pool, cache_struct
from experiments.speed.decode.programs import Work
from experiments.speed.decode.setup import SCALE, Setup
from experiments.speed.shapes import Shape
from experiments.speed.timing import Burst, ModelProgram, compile_model, measure
from mla_jax.hal import TilePlanError
from mla_jax.registry import IMPLEMENTATIONS
from pallas_kernels.hopper.config import KernelConfig
from pallas_kernels.hopper.tuned import config_of, few_tokens, tuned

Entry = dict[str, Any]
Timer = Callable[[Sequence[Entry], int], list[list[float]]]

WORKLOADS = (  # requests, tokens per request, kind of lengths
    (16, 1024, "uniform"),
    (64, 1024, "uniform"),
    (64, 1024, "varlen"),
    (128, 4096, "uniform"),
    (128, 4096, "varlen"),
    (4, 16384, "uniform"),
)
ANY_ROWS = 128  # query rows that are timed for the class of all other rows
GAIN = 0.01  # smaller gains are noise
KV_STAGES = ((2, 2, 2), (2, 2, 3), (3, 2, 3), (3, 3, 3))
REGISTERS = ((240, 24), (232, 40))
CHOICES: dict[str, list[Entry]] = {
    "decode_transposed": [{"kv_stages": [*n], "q_stages": q} for n in KV_STAGES for q in (1, 2)],
    "decode_transposed_int8": [
        {"computing": c, "kv_stages": n} for c, n in itertools.product((1, 2), (2, 3, 4, 5))
    ],
    "decode": [{"registers": [*r]} for r in REGISTERS],
    "decode_int8": [{"kv_stages": n} for n in (2, 3)],
}
FEW_BLOCKS, MORE_BLOCKS = (0, 1, 2, 3, 5), (2, 3, 5, 8)
OVERHEADS = {
    "decode_transposed": FEW_BLOCKS,
    "decode_transposed_int8": FEW_BLOCKS,
    "decode": MORE_BLOCKS,
    "decode_int8": MORE_BLOCKS,
}
MERGE_OVERHEADS = (0, 4, 8)  # in blocks
OVERHEADS_OF = "split_overhead", "merge_overhead"


def name_of(entry: Entry) -> str:
    """Returns the name of a class: 16, any, int8-16, int8-any, ..."""
    rows = str(entry["most_rows"] or "any")
    return f"int8-{rows}" if entry.get("cache") == "int8" else rows


def sizes(entry: Entry) -> Iterator[Entry]:
    """Yields the entry, then the entry with every choice of buffers and registers that fits."""
    yield entry
    for choice in CHOICES[entry["kernel"]]:
        candidate = entry | choice
        if candidate != entry and fits(candidate):
            yield candidate


def overheads(entry: Entry) -> Iterator[Entry]:
    """Yields the entry, then the entry with other overheads of work items and of merging."""
    yield entry
    choices = itertools.product(OVERHEADS[entry["kernel"]], MERGE_OVERHEADS)
    for candidate in (entry | dict(zip(OVERHEADS_OF, each, strict=True)) for each in choices):
        if candidate != entry:
            yield candidate


def fits(entry: Entry) -> bool:
    """Returns whether the entry makes a legal config."""
    try:
        config_of(entry)
    except TilePlanError:
        return False
    return True


def tune(entry: Entry, time_all: Timer) -> Entry:
    """Returns the fastest variant of the entry, with the times of its workloads in `timed`.

    time_all(entries, rows): returns microseconds [entry][workload].
    """
    rows = entry["most_rows"] or ANY_ROWS
    best = entry | {"timed": None}
    for relatives in (sizes, overheads):
        found = list(relatives(best))
        times = time_all(found, rows)
        score = [math.exp(math.fsum(map(math.log, us)) / len(us)) for us in times]
        fastest = min(range(len(found)), key=score.__getitem__)
        if score[fastest] > score[0] * (1 - GAIN):
            fastest = 0
        best, us = found[fastest], times[fastest]
    names = [f"{b} x {'~' * (kind == 'varlen')}{kv}" for b, kv, kind in WORKLOADS]
    return best | {"timed": {n: round(t, 2) for n, t in zip(names, us, strict=True)}}


class GpuStopwatch:
    """Times entries back to back through the layers of a model, with KV from memory.

    The plan is made once before, as in a step. Entries that differ only in the plan share a
    program. A wrong result raises RuntimeError.
    """

    def __init__(self) -> None:
        self.setup = Setup.here(0, 512, 64, 0)
        self.programs: dict[tuple, ModelProgram] = {}

    def __call__(self, entries: Sequence[Entry], rows: int) -> list[list[float]]:
        """Returns microseconds [entry][workload]."""
        dtype = "int8" if entries[0].get("cache") == "int8" else "bf16"
        shapes = [Shape(b, dtype, rows, 1, 64, kind, kv) for b, kv, kind in WORKLOADS]
        times: dict[Shape, list[float]] = {}
        for batch in dict.fromkeys(shape.batch for shape in shapes):
            times |= self._time([shape for shape in shapes if shape.batch == batch], entries)
        return [list(each) for each in zip(*(times[shape] for shape in shapes), strict=True)]

    def _time(self, shapes: list[Shape], entries: Sequence[Entry]) -> dict[Shape, list[float]]:
        """Times shapes that differ only in their lengths."""
        pool = Pool.of(shapes, self.setup)
        work = Work(shapes[0], pool, self.setup)
        wanted = {(work.row, _kernel_of(entry)): entry for entry in entries}
        new = {key: entry for key, entry in wanted.items() if key not in self.programs}
        with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
            compiled = executor.map(lambda e: self._compile(e, work, shapes), new.values())
            self.programs |= zip(new, compiled, strict=True)
        layers = pool.fill(self.setup)
        planners = [jax.jit(_planner(entry, work.row)) for entry in entries]
        found = {}
        for shape in shapes:
            inputs = Inputs.make(shape, self.setup, layers, work.capacity)
            tables, oracle = jnp.asarray(inputs.tables), None
            bursts: dict[str, Burst] = {}
            for i, entry in enumerate(entries):
                program = self.programs[work.row, _kernel_of(entry)]
                shared = tables, inputs.seq_lens, planners[i](inputs.seq_lens)
                oracle = oracle or inputs.oracle((program.launches - 1) % len(layers))
                output = program.last_output(inputs.q, layers, shared)
                if not errors_of(output, oracle, shape.dtype)["correct"]:
                    raise RuntimeError(f"{shape.label}: wrong with {json.dumps(entry)}")
                bursts[str(i)] = program.burst(inputs.q, layers, shared)
            timings = measure(bursts, rounds=self.setup.rounds, pause=self.setup.pause)
            found[shape] = [timings[str(i)].us for i in range(len(entries))]
            print(f"  {shape.label}: {np.round(found[shape], 1)} us", flush=True)
        return found

    def _compile(self, entry: Entry, work: Work, shapes: Sequence[Shape]) -> ModelProgram:
        from pallas_kernels.hopper.attention import attend, attend_int8

        rows, struct = work.row.heads, cache_struct(work.pool, work.row.page_size, self.setup)
        attention: Callable[..., Any] = attend_int8
        if work.pool.dtype == "bf16":
            attention = functools.partial(attend, kv_lora_rank=self.setup.kv_lora_rank)
        options = {"num_heads": rows, "softmax_scale": SCALE, "causal": True}

        def step(q: jax.Array, layer: dict[str, jax.Array], shared: tuple) -> Any:
            tables, seq_lens, plan = shared
            cache = [x.reshape(getattr(struct, name).shape) for name, x in layer.items()]
            o, lse = attention(
                q.reshape(len(q), rows, -1), *cache, tables, seq_lens, None, plan,
                tiles=_tiles(entry, work.row), **options,
            )  # fmt: skip
            return o[:, None], lse[:, None]

        layers = [work.pool.structs(self.setup)] * work.pool.layers
        plan = jax.eval_shape(_planner(entry, work.row), work.seq_lens)
        shared = work.tables, work.seq_lens, plan
        return compile_model(
            step, work.q, layers, shared, passes=work.passes(shapes, work.pool.layers)
        )


def _kernel_of(entry: Entry) -> str:
    """Returns the part of an entry that determines its program: all but overheads and times."""
    return json.dumps({k: v for k, v in entry.items() if k not in (*OVERHEADS_OF, "timed")})


def _planner(entry: Entry, shape: Shape) -> Callable[[jax.Array], Any]:
    from pallas_kernels.hopper.planning import plan_decode

    # The split alone: entries that differ in their costs of splitting share one compiled kernel.
    return lambda seq_lens: plan_decode(seq_lens, shape.heads, tiles=_tiles(entry, shape)).split


def _tiles(entry: Entry, shape: Shape) -> KernelConfig:
    return config_of(entry, num_tiles=shape.batch * -(-shape.heads // entry["rows_per_tile"]))


def write_table(path: Path, classes: Sequence[Entry], device: str | None) -> None:
    """Writes the table, one entry per line; the entries for few tokens stay as they are."""

    head = {"device": device, "few_tokens": few_tokens()}
    lines = [f'  "{name}": {json.dumps(value)}' for name, value in head.items()]
    entries = ",\n".join(f"    {json.dumps(entry)}" for entry in classes)
    lines.append(f'  "classes": [\n{entries}\n  ]')
    write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")


def main(names: Sequence[str], time_all: Timer | None = None, path: Path | None = None) -> None:
    if time_all is None:
        reason = IMPLEMENTATIONS["hopper"].unavailable(None)
        if reason is not None:
            raise SystemExit(f"tune_hopper times the Hopper kernels: {reason}")
        time_all = GpuStopwatch()
    path = path or Path(pallas_kernels.hopper.__path__[0]) / "tuned.json"
    device = jax.devices()[0].device_kind
    classes = list(tuned())
    known = [name_of(entry) for entry in classes]
    for name in names:
        if name not in known:
            raise SystemExit(f"class {name!r}, wanted {', '.join(known)}")
    for i, name in enumerate(known):
        if not names or name in names:
            classes[i] = tune(classes[i], time_all)
            print(name, json.dumps(classes[i]))
            write_table(path, classes, device)


if __name__ == "__main__":
    main(sys.argv[1:])
