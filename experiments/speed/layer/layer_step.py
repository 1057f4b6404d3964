"""Times one decode step of a whole layer on a GPU, and the kernels of each of its parts.

    python -m experiments.launch --experiment=layer_step --output_dir=out

A step is one call of `mla_layer` with its cache donated, with a plan that is given and with one
that the call makes itself. The times per part are of the same program without CUDA graphs, because
the profiler then names every kernel. Beside each part stand the bytes of its weights or its cache,
and the time in which the GPU's memory could deliver them.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework import plotting
from experiments.framework.console import say, show_table, track
from experiments.framework.errors import OUTPUT_BOUND, relative_error
from experiments.framework.experiment import Outcome, Output, Row, reading
from experiments.framework.options import flag, seed_flag
from experiments.framework.results import first_line
from experiments.speed import timing
from experiments.speed.benchmark_tables import write_csv
from experiments.speed.layer.parts import (
    NAMES,
    REST,
    Instructions,
    busy,
    exclusive,
    part_of_op,
    shares,
)
from experiments.speed.layer.step import (
    GIVEN,
    NAMED_KERNELS,
    PLANS,
    Arrays,
    Case,
    Layer,
    new_params,
)
from mla_jax import PRESETS as MODELS
from mla_jax.hal import profile_of_device

SUMMARY = "a decode step of a whole layer: time, and time and bytes of each part"

WHOLE = "whole step"
TRACED = 2  # bursts
# Cases, and fields of the config that differ from the model's.
PRESETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "served": (("128x4096", "16x1024", "1x1024"), {}),
    "quick": (("2x48",), {"hidden_size": 64, "num_heads": 2, "q_lora_rank": 32}),
}
STEP_COLUMNS = {
    "case": "requests x tokens",
    "plan": "plan",
    "us": "us per step",
    "us_sustained": "sustained",
    "gpu_us": "GPU busy",
    "kernels": "kernels",
    "memory_us": "us of the bytes",
    "host_bound": "host bound",
    "difference": "difference",
    "passed": "passed",
}


@dataclasses.dataclass(frozen=True)
class Options:
    preset: str = flag("", "cases and widths: served or quick; by default served on a GPU",
                       choices=("", *PRESETS))  # fmt: skip
    cases: tuple[str, ...] = flag((), "in place of the preset's, e.g. 16x1024: requests x tokens")
    model: str = flag("deepseek-v3", "whose layer to time", choices=tuple(MODELS))
    page_size: int = flag(64, "tokens per page", choices=(16, 32, 64, 128))
    rounds: int = flag(7, "bursts whose median counts", lower_bound=1)
    sustained_ms: float = flag(150.0, "of steps without a pause", lower_bound=1)
    steps: int = flag(8, "steps per burst", lower_bound=1)
    seed: int = seed_flag("of all values")


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled steps of a layer, by where their plan is made."""

    timed: Mapping[str, Any]
    named: Mapping[str, Any]  # the same without CUDA graphs


def run(options: Options, output: Output) -> Outcome:
    here = jax.devices()[0]
    preset = options.preset or ("served" if here.platform == "gpu" else "quick")
    cases, narrower = PRESETS[preset]
    config = dataclasses.replace(MODELS[options.model], **narrower)
    with reading("cases"):
        wanted = [Case.parse(text) for text in options.cases or cases]
    layers = [Layer(config, case, options.page_size) for case in wanted]
    params = jax.jit(new_params, static_argnums=0)(config, jax.random.key(options.seed))
    programs = _compile(layers, on_gpu=here.platform == "gpu")
    profile = profile_of_device(here.device_kind)
    bandwidth = None if profile is None else profile["memory.hbm_bandwidth"]
    rows: list[Row] = []
    kernels: list[Row] = []
    for layer in track(layers, "timing"):
        base = {"batch": layer.case.batch, "kv_len": layer.case.kv_len, "case": layer.case.text}
        try:
            arrays = Arrays.of(layer, params, options.seed)
            found, seen = _measured(layer, arrays, programs[layer], options, bandwidth)
            rows += [base | row for row in found]
            kernels += [base | row for row in seen]
        except RuntimeError as error:  # out of memory, or times below the noise
            rows.append(base | {"part": WHOLE, "status": f"failed: {first_line(error)}",
                                "passed": False})  # fmt: skip
    title = f"A decode step of a layer of {options.model} on {here.device_kind}, bfloat16"
    return report(title, output, rows, kernels)


def _compile(layers: Sequence[Layer], *, on_gpu: bool) -> dict[Layer, Programs]:
    """Compiles all programs. Those with names come second, and find the tuning of the first."""
    keys = [(layer, plan) for layer in layers for plan in PLANS]
    lowered = {key: key[0].lower(key[1]) for key in track(keys, "tracing")}

    def compiled(compiler_options: Mapping[str, str], label: str) -> dict[Any, Any]:
        with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
            futures = {
                key: executor.submit(one.compile, compiler_options=dict(compiler_options))
                for key, one in lowered.items()
            }
            for _ in track(as_completed(futures.values()), label, total=len(futures)):
                pass
        return {key: future.result() for key, future in futures.items()}

    timed = compiled({}, "compiling")
    named = compiled(NAMED_KERNELS, "compiling to name kernels") if on_gpu else timed
    return {
        layer: Programs(*({plan: found[layer, plan] for plan in PLANS} for found in (timed, named)))
        for layer in layers
    }


def _measured(
    layer: Layer, arrays: Arrays, programs: Programs, options: Options, bandwidth: float | None
) -> tuple[list[Row], list[Row]]:
    """Times both steps in turns, then traces them; returns rows as `rows_of_step` does."""
    outs = {plan: arrays.step(programs.timed[plan], plan) for plan in PLANS}
    bursts = {plan: arrays.burst(programs.timed[plan], plan, options.steps) for plan in PLANS}
    on_cpu = jax.default_backend() == "cpu"
    pause = 0.0 if on_cpu else 0.03
    short = timing.measure(bursts, rounds=options.rounds, pause=pause)
    seconds = options.sustained_ms / 1e3
    sustained = timing.measure(bursts, rounds=3, seconds=seconds, pause=0.0)
    rows, kernels = [], []
    for plan in PLANS:
        program = programs.named[plan]
        again = arrays.step(program, plan)
        difference = max(_difference(out, outs[GIVEN]) for out in (outs[plan], again))
        # Two results that are each within the bound of the exact one.
        close = difference <= 2 * OUTPUT_BOUND["bfloat16"]
        burst = arrays.burst(program, plan, options.steps)
        traced = [] if on_cpu else timing.traced_kernels(burst, TRACED)
        found, seen = rows_of_step(
            traced, program.as_text(), TRACED * options.steps, layer.bytes_read(), bandwidth
        )
        whole = {
            "status": "measured", "us": short[plan].us, "us_low": short[plan].low,
            "us_high": short[plan].high, "us_sustained": sustained[plan].us,
            "host_bound": short[plan].host_bound, "difference": difference,
            "passed": bool(found[0]["passed"] and close and (on_cpu or traced)),
        }  # fmt: skip
        rows += [{"plan": plan} | row for row in (found[0] | whole, *found[1:])]
        kernels += [{"plan": plan} | row for row in seen]
    return rows, kernels


def rows_of_step(
    traced: Sequence[timing.Kernel],
    hlo: str,
    steps: int,
    sizes: Mapping[str, int],
    bandwidth: float | None,
) -> tuple[list[Row], list[Row]]:
    """Returns a row for the step and one for each part of it, and a row for each kernel.

    The step has passed if the times of its parts add up to the time in which the GPU is busy.

    Args:
        traced: kernels of so many steps; none if the profiler saw no GPU.
        hlo: the compiled program.
        sizes: bytes of each part.
        bandwidth: of the GPU's memory in bytes per second, if it is known.
    """
    base: Row = {"status": "measured"}
    whole = base | {"part": WHOLE, "gpu_us": None, "kernels": None, "passed": True}
    whole |= _of_bytes(sum(sizes.values()), bandwidth)
    rows = [base | {"part": name} | _of_bytes(sizes[name], bandwidth) for name in NAMES]
    if not traced:
        return [whole, *rows], []
    parts = shares(traced, hlo, steps)
    for row in rows:
        share = parts[row["part"]]
        row |= {"gpu_us": share.us, "kernels": share.kernels}
    gpu_us = busy(traced) / steps / 1e3
    adds_up = abs(sum(share.us for share in parts.values()) - gpu_us) <= 1e-3 * gpu_us
    whole |= {"gpu_us": gpu_us, "kernels": len(traced) / steps, "passed": adds_up}
    return [whole, *rows], _kernels(traced, hlo, steps)


def _difference(out: jax.Array, other: jax.Array) -> float:
    """Returns the relative difference of two outputs; infinite where one is not finite."""
    if not bool(jnp.isfinite(out).all()):
        return float("inf")
    return relative_error(np.asarray(out, np.float64), np.asarray(other, np.float64))


def _of_bytes(size: int, bandwidth: float | None) -> Row:
    """Returns bytes, and the microseconds that they take at a bandwidth in bytes per second."""
    return {"bytes": size, "memory_us": None if bandwidth is None else size / bandwidth * 1e6}


def _kernels(traced: Sequence[timing.Kernel], hlo: str, steps: int) -> list[Row]:
    """Returns a row for each kernel of a step, in the order of their first starts."""
    instructions = Instructions.of(hlo)
    rows: dict[tuple[str, str | None], Row] = {}
    for kernel, ns in exclusive(traced):
        op_name = instructions.op_name(kernel)
        row = rows.setdefault((kernel.name, kernel.hlo), {
            "part": part_of_op(op_name), "kernel": kernel.name, "hlo": kernel.hlo,
            "op_name": op_name, "per_step": 0.0, "gpu_us": 0.0, "us_with_waiting": 0.0,
        })  # fmt: skip
        row["per_step"] += 1 / steps
        row["gpu_us"] += ns / steps / 1e3
        row["us_with_waiting"] += (kernel.end - kernel.start) / steps / 1e3
    return list(rows.values())


def report(title: str, output: Output, rows: list[Row], kernels: list[Row]) -> Outcome:
    """Shows the tables, writes all files, and returns the outcome."""
    whole = [row for row in rows if row["part"] == WHOLE]
    show_table(title, whole, STEP_COLUMNS)
    for row in whole:
        if row["status"] != "measured":
            say(f"{row['case']}: {row['status']}")
    for case, parts in by_case(rows).items():
        show_table(f"{case}: GPU time of the parts, without CUDA graphs", parts, part_columns())
    write_csv(output.path("layer_step.csv"), rows)
    if kernels:
        write_csv(output.path("layer_step_kernels.csv"), kernels)
    _draw(output, rows, title)
    measured = [row for row in whole if row["status"] == "measured"]
    times = ", ".join(f"{r['case']} {r['us']:.4g}" for r in measured if r["plan"] == GIVEN)
    passed = bool(measured) and all(row["passed"] for row in whole)
    return Outcome(passed, f"us per step with a plan that is given: {times or 'none'}", rows)


def part_columns() -> dict[str, str]:
    columns = {"part": "part", "mb": "MB", "memory_us": "us of the bytes"}
    for plan in PLANS:
        columns |= {f"{plan}_us": f"us, {plan} plan", f"{plan}_kernels": "kernels"}
    return columns


def by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns a row for each part of each case, with columns for both plans."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["part"] == WHOLE or row["status"] != "measured":
            continue
        parts = cases.setdefault(row["case"], {})
        found = parts.setdefault(row["part"], {
            "part": row["part"], "mb": row["bytes"] / 1e6, "memory_us": row["memory_us"],
        })  # fmt: skip
        found |= {f"{row['plan']}_{key}": row.get(column)
                  for key, column in (("us", "gpu_us"), ("kernels", "kernels"))}  # fmt: skip
    return {case: list(parts.values()) for case, parts in cases.items()}


def _draw(output: Output, rows: Sequence[Row], title: str) -> None:
    """Draws a bar of parts per case and plan, and one of the bytes of the parts."""
    bars: list[tuple[str, list[float]]] = []
    for case, parts in by_case(rows).items():
        keys = {**{f"{plan}_us": f"{plan} plan" for plan in PLANS}, "memory_us": "bytes only"}
        for key, what in keys.items():
            heights = plotting.numbers(part.get(key) for part in parts)
            bars.append((f"{case}\n{what}", [0.0 if math.isnan(h) else h for h in heights]))
    size = (3 + 1.2 * max(1, len(bars)), 5.0)
    with plotting.figure(output.path("layer_step.png"), title, size=size) as axes:
        below = np.zeros(len(bars))
        for i, name in enumerate(NAMES):
            of_part = np.array([values[i] for _, values in bars])
            color = plotting.GREY if name == REST else plotting.look(i)["color"]
            axes.bar(range(len(bars)), of_part, 0.7, below, color=color, label=name)
            below += of_part
        for place, total in enumerate(below):
            axes.text(place, total, f"{total:.0f}", ha="center", va="bottom", fontsize=9)
        axes.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
        axes.set_ylabel("us of GPU time per step, less is better")
        axes.grid(False, axis="x")
        plotting.legend(axes)
