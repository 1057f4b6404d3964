"""Times the attention of a decode step that is split over several devices, beside one device.

    python -m experiments.launch --experiment=sharded --output_dir=out

A step is split by its keys (`kv_axis`, merged by lse in one collective), by its heads, or by its
requests (docs/sharding.md). One program runs a burst of launches. Each launch takes the query of
the launch before, so that no two run at the same time and collectives are not merged. The plan is
made once per program. On GPUs without NVLink multicast set NCCL_NVLS_ENABLE=0.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.framework import plotting
from experiments.framework.console import say, show_table, track
from experiments.framework.errors import OUTPUT_BOUND, relative_error
from experiments.framework.experiment import InputError, Outcome, Output, Row
from experiments.framework.options import flag, seed_flag
from experiments.framework.results import first_line
from experiments.speed import timing
from experiments.speed.benchmark_tables import write_csv
from experiments.speed.decode.bursts import time_bursts
from experiments.speed.decode.setup import SCALE
from mla_jax import PagedKVCache, cache_specs, paged_mla_attention, plan_decode

SUMMARY = "attention of a decode step over several devices: time and speed over one device"

P = PartitionSpec
AXIS = "device"
KEYS, HEADS, REQUESTS = "keys", "heads", "requests"
BURST_SECONDS = 4e-3  # approximately
MOST_LAUNCHES = 32  # of a program
COLUMNS = {
    "split": "split by",
    "heads": "heads",
    "batch": "requests",
    "kv_len": "KV tokens per request",
    "devices": "devices",
    "us": "us per launch",
    "speed_over_one": "x one device's speed",
    "wanted": "target",
    "difference": "difference",
    "passed": "in bound",
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step, what it is split by, and the target for the speed of two devices over one."""

    split: str
    heads: int
    batch: int
    kv_len: int
    wanted: float | None = None


PRESETS = {
    "served": (
        Step(KEYS, 128, 1, 2**20, 1.65),
        Step(KEYS, 16, 1, 2**20, 1.5),
        Step(HEADS, 128, 128, 4096, 1.4),
        Step(REQUESTS, 128, 128, 4096, 1.9),
    ),
    "quick": (
        Step(KEYS, 2, 1, 512), Step(HEADS, 4, 2, 128), Step(REQUESTS, 2, 4, 128),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    preset: str = flag("", "steps to time: served or quick; by default served on a GPU",
                       choices=("", *PRESETS))  # fmt: skip
    splits: tuple[str, ...] = flag((), "to time; default: all", choices=(KEYS, HEADS, REQUESTS))
    devices: int = flag(2, "devices to split over", lower_bound=2)
    page_size: int = flag(64, "tokens per page", choices=(16, 32, 64, 128))
    rounds: int = flag(7, "bursts whose median counts", lower_bound=1)
    seed: int = seed_flag("of all values")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the arrays of a step lie on the devices: a spec for each argument, and of the results."""

    step: Step
    devices: int
    page_size: int

    @property
    def specs(self) -> tuple[Any, ...]:
        """Specs of q, cache, block_tables and seq_lens."""
        return {
            KEYS: (P(), cache_specs(self.shapes[1], kv_axis=AXIS), P(), P()),
            HEADS: (P(None, None, AXIS), cache_specs(self.shapes[1]), P(), P()),
            REQUESTS: (P(AXIS), cache_specs(self.shapes[1], AXIS), P(AXIS), P(AXIS)),
        }[self.step.split]

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The arrays' shapes, over all devices. Block tables are those of one device."""
        step = self.step
        pages = step.batch * step.kv_len // self.page_size
        table = step.kv_len // self.page_size // (self.devices if step.split == KEYS else 1)
        cache = jax.eval_shape(lambda: PagedKVCache.create(pages, page_size=self.page_size))
        return (
            jax.ShapeDtypeStruct((step.batch, 1, step.heads, cache.latent_dim), jnp.bfloat16),
            cache,
            jax.ShapeDtypeStruct((step.batch, table), jnp.int32),
            jax.ShapeDtypeStruct((step.batch,), jnp.int32),
        )

    def values(self, seed: int) -> tuple[Any, ...]:
        """Returns the arguments, on the devices: pages in random order, q of k's magnitude."""
        q, cache, tables, _ = self.shapes
        kv_len, order = self.step.kv_len, np.random.default_rng(seed)
        local = cache.num_pages // (1 if self.step.split == HEADS else self.devices)
        rows = tables.shape[0] // (self.devices if self.step.split == REQUESTS else 1)
        shards = tables.shape[0] // rows
        own = [order.permutation(local).reshape(rows, -1) for _ in range(shards)]
        mesh, specs = self.mesh, self.specs
        keys = jax.random.split(jax.random.key(seed))

        def normal(key: jax.Array, like: Any, spec: P) -> jax.Array:
            make = functools.partial(jax.random.normal, shape=like.shape, dtype=like.dtype)
            return jax.jit(make, out_shardings=NamedSharding(mesh, spec))(key)

        cache = dataclasses.replace(cache, pages=normal(keys[1], cache.pages, specs[1].pages))
        numbers = np.concatenate(own).astype(np.int32), np.full(tables.shape[0], kv_len, np.int32)
        places = (NamedSharding(mesh, spec) for spec in specs[2:])
        return normal(keys[0], q, specs[0]), cache, *map(jax.device_put, numbers, places)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        kinds, chosen = (AxisType.Auto,), jax.devices()[: self.devices]
        return jax.make_mesh((self.devices,), (AXIS,), axis_types=kinds, devices=chosen)

    def on_one_device(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the same step for one device: block tables with pages of the whole cache."""
        q, cache, tables, seq_lens = jax.device_put(values, jax.devices()[0])
        of_one = cache.num_pages // self.devices
        table = np.asarray(tables)
        if self.step.split == KEYS:
            first = of_one * np.arange(self.devices, dtype=np.int32)
            table = (table[:, :, None] + first).reshape(len(table), -1)
        elif self.step.split == REQUESTS:
            device = np.arange(len(table), dtype=np.int32) * self.devices // len(table)
            table = table + (of_one * device)[:, None]
        return q, cache, jax.device_put(table, jax.devices()[0]), seq_lens


def program(step: Step, launches: int, kv_axis: str | None) -> Any:
    """Returns a function that runs the attention of a step so often; it returns o and lse."""

    def run(q: jax.Array, cache: PagedKVCache, tables: jax.Array, seq_lens: jax.Array) -> Any:
        reached = tables.shape[1] * cache.page_size
        plan = plan_decode(
            seq_lens, cache=cache, num_heads=q.shape[2], max_seq_len=reached, kv_axis=kv_axis
        )

        def attend(q: jax.Array) -> Any:
            return paged_mla_attention(
                q, cache, tables, seq_lens, softmax_scale=SCALE, plan=plan, kv_axis=kv_axis
            )

        def next_query(_: Any, q: jax.Array) -> jax.Array:
            o, _ = attend(q)
            return q + 0 * o[..., :1].astype(q.dtype)

        return attend(lax.fori_loop(0, launches - 1, next_query, q))

    return run


def run(options: Options, output: Output) -> Outcome:
    here = jax.devices()
    if len(here) < options.devices:
        raise InputError(f"--devices: wanted {options.devices}, here are {len(here)}")
    preset = options.preset or ("served" if here[0].platform == "gpu" else "quick")
    steps = [s for s in PRESETS[preset] if not options.splits or s.split in options.splits]
    rows: list[Row] = []
    for step in track(steps, "timing"):
        try:
            rows += _rows(step, options)
        except RuntimeError as error:  # out of memory, or times below the noise
            base = _fields(step) | {"devices": options.devices, "passed": False}
            rows.append(base | {"status": f"failed: {first_line(error)}"})
    kind = here[0].device_kind
    show_table(f"Attention of a decode step on {kind}, bfloat16", rows, COLUMNS)
    for row in rows:
        if row["status"] != "measured":
            say(f"{row['split']}, {row['heads']} heads: {row['status']}")
    write_csv(output.path("sharded.csv"), rows)
    _draw(output, rows, f"Attention of a decode step, over {options.devices} devices: {kind}")
    split = [row for row in rows if "speed_over_one" in row]
    found = ", ".join(f"{row['split']} {row['speed_over_one']:.2f}" for row in split)
    passed = bool(split) and all(row["passed"] for row in rows)
    return Outcome(passed, f"speed over one device by split: {found or 'nothing measured'}", rows)


def _rows(step: Step, options: Options) -> list[Row]:
    """Times a step on one device and on several in turn, and compares their results."""
    layout = Layout(step, options.devices, options.page_size)
    values = layout.values(options.seed)
    # A guess: keys at 4 TB/s, and longer where products of more than 64 heads take the time.
    seconds = 2 * step.batch * step.kv_len * 576 * max(1, step.heads / 64) / 4e12
    launches = min(max(2, round(BURST_SECONDS / max(seconds, 1e-5))), MOST_LAUNCHES)
    kv_axis = AXIS if step.split == KEYS else None
    result = layout.specs[0]
    split = jax.shard_map(
        program(step, launches, kv_axis),
        mesh=layout.mesh, in_specs=layout.specs, out_specs=(result, P(*result)),
    )  # fmt: skip
    arguments = {1: layout.on_one_device(values), options.devices: values}
    functions = {1: program(step, launches, None), options.devices: split}
    compiled = {n: jax.jit(f).lower(*arguments[n]).compile() for n, f in functions.items()}
    outs = {n: jax.device_get(run(*arguments[n])) for n, run in compiled.items()}
    bursts = {
        str(n): timing.asynchronous(call, arguments[n], launches) for n, call in compiled.items()
    }
    pause = 0.0 if jax.default_backend() == "cpu" else 0.03
    timings = time_bursts(bursts, rounds=options.rounds, pause=pause)
    return _compared(step, timings, outs, options.devices)


def _compared(
    step: Step, timings: Mapping[str, timing.Timing], outs: Mapping[int, Any], devices: int
) -> list[Row]:
    base = _fields(step) | {"status": "measured"}
    one, several = (timings[str(n)] for n in (1, devices))
    differences = [relative_error(*(x.astype(np.float64) for x in pair))
                   for pair in zip(outs[devices], outs[1], strict=True)]  # fmt: skip
    # Two results that are each within the bound of the exact one.
    passed = max(differences) <= 2 * OUTPUT_BOUND["bfloat16"]
    return [
        base | {"devices": 1, "us": one.us, "host_bound": one.host_bound, "wanted": None,
                "passed": bool(all(np.isfinite(x).all() for x in outs[1]))},
        base | {"devices": devices, "us": several.us, "host_bound": several.host_bound,
                "speed_over_one": one.us / several.us, "difference": max(differences),
                "passed": bool(passed)},
    ]  # fmt: skip


def _fields(step: Step) -> Row:
    return {"batch": step.batch} | dataclasses.asdict(step)


def _draw(output: Output, rows: Sequence[Row], title: str) -> None:
    """Draws the speed over one device of each step, and its target."""
    split = [row for row in rows if "speed_over_one" in row]
    with plotting.figure(output.path("sharded.png"), title, size=(9, 4)) as axes:
        speeds = [row["speed_over_one"] for row in split]
        bars = axes.bar(range(len(split)), speeds, 0.6, color=plotting.look(0)["color"])
        axes.bar_label(bars, [f"{speed:.2f}" for speed in speeds])
        for place, row in enumerate(split):
            if row["wanted"]:
                axes.hlines(row["wanted"], place - 0.4, place + 0.4, color=plotting.GREY)
        names = [f"{r['split']}\n{r['heads']} heads, {r['batch']} x {r['kv_len']}" for r in split]
        axes.set_xticks(range(len(split)), names)
        axes.set_ylabel("times one device's speed; a line is the target for two")
        axes.grid(False, axis="x")
