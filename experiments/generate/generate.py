"""Generates text tokens with a whole DeepSeek-V2 or V3 model, many requests at a time.

    python -m experiments.launch --experiment=generate --folder=DIR --output_dir=out

It loads a Hugging Face folder, or makes random weights of the size of DeepSeek-V2-Lite on a GPU. On
a CPU the default is a tiny model that is in this repository, with tokens and logits of Hugging Face
transformers. Requests arrive over time and are served by `engine.py`. Then each of some requests is
served again, alone and without drafts, and must get the same tokens. docs/generate.md explains the
model and the engine.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework import plotting
from experiments.framework.console import say, show_table
from experiments.framework.errors import relative_error
from experiments.framework.experiment import InputError, Outcome, Output, Row, reading
from experiments.framework.options import flag, seed_flag
from experiments.generate import weights
from experiments.generate.alone import served_alone
from experiments.generate.config import LITE
from experiments.generate.engine import Engine, Sizes
from experiments.generate.grouped import ALIGN, TILE_ROWS, grouped_product, takes
from experiments.generate.model import Experts, ModelConfig, ModelParams
from experiments.generate.parts import STEP, WHOLE_PARTS, Found, measured_parts
from experiments.generate.requests import Request, lookup_drafter, no_drafter
from experiments.generate.sharded import mesh_of, placed
from mla_jax.cache import PAGE_SIZES
from pallas_kernels.hopper import device

SUMMARY = "a whole model generates: continuous batching, shared prefixes, drafts; time by part"

MODELS = Path(__file__).resolve().parents[2] / "tests" / "data" / "models"
ARRIVALS = 2  # requests per step of the engine
KERNEL_BOUND = 4e-3  # on the error of a product that is rounded to 16 bits once


@dataclasses.dataclass(frozen=True)
class Load:
    """What is served, and how: the engine's sizes, and the requests."""

    sizes: Sizes
    requests: int
    prompt: int  # tokens of the longest prompt
    new: int  # tokens per request
    context: int  # tokens per request where the parts of a step are timed


PRESETS = {
    "small": Load(Sizes(slots=4, chunk=16, max_tokens=64, num_pages=20), 12, 48, 16, 48),
    # All slots at 4096 tokens just fit.
    "v2_lite": Load(
        Sizes(slots=64, drafts=0, prefill_rows=2, chunk=512, max_tokens=4096, num_pages=4096,
              page_size=64),
        requests=192, prompt=1024, new=128, context=4096,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    folder: str | None = flag(None, "Hugging Face folder; by default as --preset says")
    preset: str = flag("", "small: a tiny model of this repository; v2_lite: random weights, the "
                       "default on a GPU", choices=("", *PRESETS))  # fmt: skip
    dtype: str | None = flag(
        None, "by default bfloat16 on a GPU, else float32", choices=weights.DTYPES
    )
    requests: int | None = flag(None, "to serve", lower_bound=1)
    slots: int | None = flag(None, "requests that run at a time", lower_bound=1)
    max_prompt: int | None = flag(None, "tokens of the longest prompt", lower_bound=1)
    new_tokens: int | None = flag(None, "per request", lower_bound=1)
    drafts: int | None = flag(None, "guesses per request and decode step", lower_bound=0)
    chunk: int | None = flag(None, "tokens per request in a prefill step", lower_bound=1)
    page_size: int | None = flag(None, "tokens per page", choices=PAGE_SIZES)
    shared: float = flag(0.5, "share of the prompts that begin alike", lower_bound=0, upper_bound=1)
    temperature: float = flag(0.8, "of every second request; the others are greedy", lower_bound=0)
    top_p: float = flag(0.95, "of every second request", lower_bound=1e-3, upper_bound=1)
    tensor_parallel: int = flag(1, "devices over which heads and experts are split", lower_bound=1)
    alone: int = flag(4, "requests that are served again, alone", lower_bound=0)
    parts: bool = flag(True, "whether to time a decode step by part, on one device")
    rounds: int = flag(5, "bursts whose median counts", lower_bound=1)
    seed: int = seed_flag("of random weights, prompts and sampling")


def run(options: Options, output: Output) -> Outcome:
    on_gpu = jax.default_backend() == "gpu"
    preset = options.preset or ("v2_lite" if on_gpu and options.folder is None else "small")
    load = load_of(options, PRESETS[preset])
    config, params, folder = model_of(options, preset, on_gpu)
    dtype = params.embedding.dtype.name
    count = sum(x.size for x in jax.tree.leaves(params))
    say(f"{config.num_layers} layers, {count:,} weights in {dtype}, on {jax.devices()[0]}")
    requests = drawn_requests(options, load, config)
    mesh = None
    if options.tensor_parallel > 1:
        with reading("tensor_parallel"):
            mesh = mesh_of(config, options.tensor_parallel)
        params = placed(params, config, mesh)
    new_engine = functools.partial(Engine, params, config, mesh=mesh)
    served, timeline = serve(new_engine, load.sizes, requests)
    rows: list[Row] = [{"event": name, "times": n} for name, n in sorted(served.counts.items())]
    show_table("What happened", rows)

    again = requests[: options.alone]
    say(f"serving {len(again)} of them again, alone")
    alone = served_alone(new_engine, load.sizes, again, served)
    golden = None  # the file's tokens are those of float32
    if folder is not None and dtype == "float32":
        golden = golden_tokens(new_engine, load.sizes, folder)
    error = kernel_error(params, config) if mesh is None else None
    seconds = timeline[-1][0]
    new = sum(map(len, served.finished.values()))
    headline = {
        "preset": preset, "dtype": dtype, "devices": options.tensor_parallel,
        "weights": count, "seconds": seconds,
        "new_tokens_per_second": new / seconds, "tokens": new,
        "prefilled_tokens": served.counts["prefilled tokens"],
        "served_alone": len(again), "differ_when_alone": alone.differ,
        "gap_of_choices": alone.gap, "bound_on_gap": alone.bound, "golden_tokens_equal": golden,
        "grouped_kernel_error": error, "counts": dict(served.counts),
    }  # fmt: skip
    found = Found([], [])
    if options.parts and mesh is None:
        found = time_parts(options, load, params, config, served)
        headline["step"] = {
            "requests": load.sizes.slots, "context": load.context,
            "new_tokens_per_request": 1 + load.sizes.drafts,
            "attention_over_op_alone": found.over_alone, "kernels": found.kernels,
            "kernels_failed": found.failed,
        }  # fmt: skip
    draw(output, timeline, found.parts, f"{config.num_layers} layers, {dtype}")
    passed = alone.passed and golden is not False
    passed = passed and (error is None or error < KERNEL_BOUND)
    words = (
        "" if golden is None else f" transformers' tokens: {'equal' if golden else 'DIFFERENT'}."
    )
    return Outcome(
        passed=passed,
        summary=(
            f"{len(requests)} requests, {new} new tokens in {seconds:.2f} s, "
            f"{new / seconds:.4g} per second; {alone.in_words(len(again))}.{words}"
            + step_in_words(found)
        ),
        rows=rows + found.parts,
        headline=headline,
    )


def load_of(options: Options, preset: Load) -> Load:
    """Returns the preset with what flags change; the pool grows with the slots and the lengths."""
    o = options

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    prompt, new = given(o.max_prompt, preset.prompt), given(o.new_tokens, preset.new)
    page_size = given(o.page_size, preset.sizes.page_size)
    slots = given(o.slots, preset.sizes.slots)
    longest = max(preset.sizes.max_tokens, prompt + new)
    per_slot = preset.sizes.num_pages * preset.sizes.page_size // preset.sizes.slots
    sizes = dataclasses.replace(
        preset.sizes, slots=slots, max_tokens=longest,
        num_pages=slots * -(-max(per_slot, longest) // page_size), page_size=page_size,
        drafts=given(o.drafts, preset.sizes.drafts), chunk=given(o.chunk, preset.sizes.chunk),
    )  # fmt: skip
    return Load(sizes, given(o.requests, preset.requests), prompt, new, preset.context)


def model_of(
    options: Options, preset: str, on_gpu: bool
) -> tuple[ModelConfig, ModelParams, Path | None]:
    """Returns the model, and its folder if it has one."""
    if options.folder is None and preset == "v2_lite":
        dtype = weights.weight_dtype(options.dtype or "bfloat16")
        params = weights.random_params(jax.random.key(options.seed), LITE, dtype)
        return LITE, params, None
    folder = Path(options.folder) if options.folder else MODELS / "deepseek_v3"
    is_own = options.folder is None
    dtype = options.dtype or ("bfloat16" if on_gpu and not is_own else "float32")
    with reading("folder"):
        config, params = weights.load(folder, dtype)
    return config, params, folder


def drawn_requests(options: Options, load: Load, config: ModelConfig) -> list[Request]:
    """Returns requests with random prompts; some begin with the same half of a prompt."""
    rng = np.random.default_rng(options.seed)
    beginning = rng.integers(0, config.vocab_size, load.prompt // 2)
    requests = []
    for i in range(load.requests):
        prompt = rng.integers(0, config.vocab_size, rng.integers(load.prompt // 2, load.prompt) + 1)
        if rng.random() < options.shared:
            prompt[: len(beginning)] = beginning[: len(prompt)]
        sampled = i % 2 == 1
        requests.append(
            Request(
                i,
                prompt.tolist(),
                load.new,
                temperature=options.temperature if sampled else 0.0,
                top_p=options.top_p if sampled else 1.0,
                seed=options.seed + i,
            )
        )
    return requests


def serve(
    new_engine: Callable[..., Engine], sizes: Sizes, requests: Sequence[Request]
) -> tuple[Engine, list[tuple[float, int, int]]]:
    """Serves requests that arrive a few per step.

    Returns the engine, and per step of it the seconds so far, and the tokens that were prefilled
    and decoded so far. The programs are compiled before the first step.
    """
    drafter = lookup_drafter if sizes.drafts else no_drafter
    say("compiling the steps")
    warm = new_engine(sizes, drafter)
    most = min(2 + sizes.chunk, sizes.max_tokens - 3)
    warm.run([Request("warm-up", [0] * most, 3)])
    pool, warm.pool = warm.pool, None  # type: ignore[assignment]
    engine = new_engine(sizes, drafter, pool=pool)
    say(f"serving {len(requests)} requests")
    waiting, timeline = list(requests), [(0.0, 0, 0)]
    start = time.perf_counter()
    while waiting or engine.is_busy:
        for request in waiting[:ARRIVALS]:
            engine.submit(request)
        del waiting[:ARRIVALS]
        engine.step()
        seen = engine.counts["prefilled tokens"], engine.counts["decoded tokens"]
        timeline.append((time.perf_counter() - start, *seen))
    return engine, timeline


def golden_tokens(new_engine: Callable[..., Engine], sizes: Sizes, folder: Path) -> bool | None:
    """Whether the greedy tokens are those of golden.npz; None if the folder has no such file."""
    path = folder / "golden.npz"
    if not path.is_file():
        return None
    with np.load(path) as file:
        prompts, lengths, tokens = (file[name] for name in ("prompts", "prompt_lens", "tokens"))
    requests = [
        Request(i, prompt[:length].tolist(), tokens.shape[1])
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    try:
        found = new_engine(sizes).run(requests)
    except ValueError as error:
        raise InputError(f"--folder: {path}: {error}") from error
    return all(found[i] == row.tolist() for i, row in enumerate(tokens))


def kernel_error(params: ModelParams, config: ModelConfig) -> float | None:
    """Returns the relative error of the kernel for grouped products; None where it does not run."""
    inner = params.layers[-1].feed_forward
    if not isinstance(inner, Experts) or device.card() is None:
        return None
    matrices = inner.routed.gate_up
    sizes = np.full(config.routing.num_experts, ALIGN, np.int32)
    sizes[0], sizes[1:2] = 80, 0  # more than one tile, and none
    rows = int(sizes.sum())
    shape = rows + TILE_ROWS, matrices.shape[1]
    x = jax.random.normal(jax.random.key(0), shape, matrices.dtype)
    if not takes(x, matrices):
        return None
    got = jax.jit(grouped_product)(x, matrices, jnp.asarray(sizes))[:rows]
    dense = functools.partial(jax.lax.ragged_dot, preferred_element_type=jnp.float32)
    want = jax.jit(dense)(x, matrices, jnp.asarray(sizes))[:rows]
    return relative_error(np.asarray(got, np.float64), np.asarray(want, np.float64))


def time_parts(
    options: Options, load: Load, params: ModelParams, config: ModelConfig, served: Engine
) -> Found:
    found = measured_parts(
        params, config, load.sizes, served.pool, load.context,
        with_plan=served.with_plan, rounds=options.rounds,
    )  # fmt: skip
    title = (
        f"A decode step of {load.sizes.slots} requests of {load.context} tokens, "
        f"{1 + load.sizes.drafts} new ones each; parts are programs of their own"
    )
    columns = {"part": "part", "us": "us", "us_per_layer": "us per layer", "of_step": "of step"}
    show_table(title, found.parts, columns)
    if found.kernels:
        show_table("The kernels of that step, as the profiler saw them", found.kernels)
    if found.failed:
        say(f"The kernels of the step have no names: {found.failed}")
    return found


def step_in_words(found: Found) -> str:
    """Returns the time of a step, and what of the targets on a GPU it misses."""
    if not found.parts:
        return ""
    us = {row["part"]: row["us"] for row in found.parts}
    words = f" A decode step takes {us[STEP] / 1e3:.4g} ms."
    if found.over_alone is None:
        return words
    above = [f"{r['part']} ({r['of_gpu_time']:.1%})" for r in found.kernels if r["above_3_percent"]]
    return (
        f"{words} Its attention takes {found.over_alone:.3f} times the op alone. Above 3 % of its "
        "GPU time, beside matrix products, attention, and the experts' gather and scatter: "
        f"{', '.join(above) or 'nothing'}."
    )


def draw(
    output: Output, timeline: Sequence[tuple[float, int, int]], parts: Sequence[Row], title: str
) -> None:
    """Draws the tokens over time, and beside them the time of each part of a decode step."""
    columns = 2 if parts else 1
    size = (6.0 * columns, 4.0)
    with plotting.figure(
        output.path("generate.png"), f"Generating with {title}", columns=columns, size=size
    ) as axes:
        left, *others = np.atleast_1d(axes)
        seconds, prefilled, decoded = zip(*timeline, strict=True)
        for i, (name, values) in enumerate((("prefilled", prefilled), ("decoded", decoded))):
            left.plot(seconds, values, label=name, color=plotting.look(i)["color"])
        left.set_xlabel("seconds")
        left.set_ylabel("tokens of all requests")
        left.legend()
        for right in others:
            bars = [row for row in parts if row["part"] in WHOLE_PARTS]
            names = [row["part"] for row in bars]
            right.barh(names, [row["us"] / 1e3 for row in bars], color=plotting.look(0)["color"])
            right.invert_yaxis()
            right.set_xlabel("ms of a decode step, less is better")
            right.grid(axis="x")
            right.grid(False, axis="y")
