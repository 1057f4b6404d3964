"""Times tile plans of the Hopper kernels and writes the best: python -m experiments.tune_hopper

Runs on the GPU it tunes for. For each class of query rows in pallas_kernels/hopper/tuned.json (or
those named: `tune_hopper 16 any int8-16`) every plan that fits is timed on three workloads, in turn
with the plan in the table; first the sizes, then what a piece of a split, and cutting at all, are
taken to cost. The table is changed where the geometric mean of the times falls by more than GAIN.
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
from experiments.timing import Burst, decode_rates, jax_burst, measure, rotating_block_tables
from mla_jax.hal import TilePlanError
from pallas_kernels.hopper.tuning import few_tokens, plan_of, tuned

Entry = dict[str, Any]
Timer = Callable[[Sequence[Entry], int], list[list[float]]]

WORKLOADS = ((64, 1024), (128, 4096), (4, 16384))  # requests, tokens of each
ANY_ROWS = 128  # timed for the class of all other rows
PAGE_SIZE = 64
GAIN = 0.01  # less is noise
DEPTHS = ((2, 2, 2), (2, 2, 3), (3, 2, 3), (3, 3, 3))
REGISTERS = ((240, 24), (232, 40))
CHOICES: dict[str, list[Entry]] = {
    "transposed": [{"depths": [*d], "q_buffers": q} for d in DEPTHS for q in (1, 2)],
    "transposed_int8": [
        {"computing": c, "depth": d} for c, d in itertools.product((1, 2), (2, 3, 4, 5))
    ],
    "seesaw": [{"registers": [*r]} for r in REGISTERS],
    "roles_int8": [{"depth": d} for d in (2, 3)],
}
FEW_BLOCKS, MORE_BLOCKS = (0, 1, 2, 3, 5), (2, 3, 5, 8)
OVERHEADS = {
    "transposed": FEW_BLOCKS,
    "transposed_int8": FEW_BLOCKS,
    "seesaw": MORE_BLOCKS,
    "roles_int8": MORE_BLOCKS,
}
MERGE_OVERHEADS = (0, 4, 8)  # blocks


def name_of(entry: Entry) -> str:
    """16, any, int8-16, int8-any, ..."""
    rows = str(entry["most_rows"] or "any")
    return f"int8-{rows}" if entry.get("cache") == "int8" else rows


def sizes(entry: Entry) -> Iterator[Entry]:
    """The entry with every choice of buffers and registers that fits; the entry itself first."""
    yield entry
    for choice in CHOICES[entry["kernel"]]:
        candidate = entry | choice
        if candidate != entry and fits(candidate):
            yield candidate


def overheads(entry: Entry) -> Iterator[Entry]:
    """The entry with other costs of a piece; the entry itself first."""
    yield entry
    for blocks in OVERHEADS[entry["kernel"]]:
        if blocks != entry["split_overhead"]:
            yield entry | {"split_overhead": blocks}
    for blocks in MERGE_OVERHEADS:
        if blocks != entry["merge_overhead"]:
            yield entry | {"merge_overhead": blocks}


def fits(entry: Entry) -> bool:
    """Whether the entry makes a legal plan."""
    try:
        plan_of(entry)
    except TilePlanError:
        return False
    return True


def tune(entry: Entry, time_all: Timer) -> Entry:
    """The fastest of the entry's relatives, with the times of its workloads in `timed`.

    time_all(entries, rows): microseconds [entry][workload].
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
    timed = {f"{b} x {kv}": round(t, 2) for (b, kv), t in zip(WORKLOADS, us, strict=True)}
    return best | {"timed": timed}


def time_on_gpu(entries: Sequence[Entry], rows: int) -> list[list[float]]:
    """Microseconds of each entry on each workload, back to back, KV from memory."""
    columns = [_time_workload(entries, rows, batch, kv_len) for batch, kv_len in WORKLOADS]
    return [list(times) for times in zip(*columns, strict=True)]


def _time_workload(entries: Sequence[Entry], rows: int, batch: int, kv_len: int) -> list[float]:
    from pallas_kernels.hopper.attention import attend
    from pallas_kernels.hopper.int8 import attend_int8

    narrow = entries[0].get("cache") == "int8"
    token_bytes = 644 if narrow else 1152
    tables, num_pages = rotating_block_tables(
        [kv_len] * batch, page_size=PAGE_SIZE, token_bytes=token_bytes
    )
    keys = jax.random.split(jax.random.key(0))
    q = jax.random.normal(keys[1], (batch, rows, 576), jnp.bfloat16)
    lens, queries = jnp.full(batch, kv_len, jnp.int32), jnp.ones(batch, jnp.int32)
    options: dict[str, Any] = {"num_heads": rows, "softmax_scale": 192**-0.5, "causal": True}
    attention: Callable[..., Any]
    cache: tuple[jax.Array, ...]
    if narrow:
        attention = attend_int8
        cache = (
            jax.random.randint(keys[0], (num_pages, PAGE_SIZE, 512), -127, 128, jnp.int8),
            jax.random.normal(keys[0], (num_pages, PAGE_SIZE, 64), jnp.bfloat16),
            jnp.full((num_pages, PAGE_SIZE), 1 / 74, jnp.float32),
        )
    else:
        attention = functools.partial(attend, kv_lora_rank=512)
        cache = (jax.random.normal(keys[0], (num_pages, PAGE_SIZE, 576), jnp.bfloat16),)
    calls = [(q, *cache, jnp.asarray(table), lens, queries) for table in tables]

    def burst(entry: Entry) -> Burst:
        run = functools.partial(attention, plan=None, **(options | {"tiles": plan_of(entry)}))
        return jax_burst(run, calls)

    with ThreadPoolExecutor(os.cpu_count() or 1) as executor:  # (most of compiling isn't Python)
        bursts = {str(i): made for i, made in enumerate(executor.map(burst, entries))}
    timings = measure(bursts, rounds=7)
    times = [timings[str(i)].us for i in range(len(entries))]
    _, gb_per_s = decode_rates(min(times), [kv_len] * batch, heads=rows, token_bytes=token_bytes)
    print(f"  {batch} x {kv_len}, {rows} rows: {np.round(times, 1)} us, best {gb_per_s:.0f} GB/s")
    return times


def write_table(path: Path, classes: Sequence[Entry], device: str | None) -> None:
    """One entry a line. What is kept for few tokens stays as it is."""
    head = {"device": device, "few_tokens": few_tokens()}
    lines = [f'  "{name}": {json.dumps(value)}' for name, value in head.items()]
    entries = ",\n".join(f"    {json.dumps(entry)}" for entry in classes)
    lines.append(f'  "classes": [\n{entries}\n  ]')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(names: Sequence[str], time_all: Timer = time_on_gpu, path: Path | None = None) -> None:
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
