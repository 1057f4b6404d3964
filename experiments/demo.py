"""The main job: a DeepSeek attention layer serves a ragged batch, every step checked.

It loads a layer from a Hugging Face folder, prefills prompts of different lengths in chunks into a
paged cache, decodes one token at a time, then two at a time as multi-token prediction (MTP) does,
with every implementation that this machine has, each on a cache of its own, of the layer's dtype
and of int8, and compares every step's output with the whole layer in float64.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import plotting
from experiments.console import say, show_table, track
from experiments.errors import LAYER_BOUND, relative_error
from experiments.experiment import Outcome, Output, Row, reading
from experiments.implementations import chosen, implementations_flag
from experiments.options import flag, seed_flag
from mla_jax import checks
from mla_jax.allocator import PageAllocator
from mla_jax.cache import LAYOUTS, PAGE_SIZES, PagedKVCache
from mla_jax.config import MLAConfig
from mla_jax.implementations import IMPLEMENTATIONS, available_implementations
from mla_jax.layer import mla_layer
from mla_jax.layer_reference import layer_float64
from mla_jax.problem import AttentionProblem
from mla_jax.weights import MLAParams, init_params, load_hf, save_hf

SUMMARY = "load a layer, prefill a ragged batch, decode, MTP; every step against float64"

GARBAGE_PAGE = 2**31 - 1
PHASES = ("prefill", "decode", "MTP")


@dataclasses.dataclass(frozen=True)
class Options:
    checkpoint: str | None = flag(None, "Hugging Face folder; a small seeded one if not given")
    layer: int | None = flag(
        None, "which layer of the checkpoint; the lowest if not given", lower_bound=0
    )
    requests: int = flag(6, "in the batch", lower_bound=1)
    max_prompt: int = flag(384, "tokens of the longest prompt", lower_bound=1)
    chunk: int = flag(64, "tokens that a request prefills a step", lower_bound=1)
    decode_steps: int = flag(8, "of one token", lower_bound=1)
    mtp_steps: int = flag(4, "of two tokens", lower_bound=1)
    page_size: int = flag(64, "tokens a page", choices=PAGE_SIZES)
    layout: str = flag("ND", "of the pages", choices=LAYOUTS)
    dtype: str | None = flag(
        None, "bfloat16 on a GPU, else float32, if not given", choices=checks.FLOAT_DTYPES
    )
    implementations: tuple[str, ...] = implementations_flag()
    int8: bool = flag(True, "whether to serve from an int8 cache too")
    seed: int = seed_flag("of the checkpoint, the prompts' lengths and the hidden states")


def small_config() -> MLAConfig:
    """DeepSeek-V3's head and cache widths and YaRN, with 16 heads and a narrow hidden state."""
    v3 = MLAConfig.preset("deepseek-v3")
    return dataclasses.replace(
        v3, hidden_size=1024, num_heads=16, q_lora_rank=384, num_hidden_layers=1
    )


def run(options: Options, output: Output) -> Outcome:
    names = chosen(options.implementations)
    dtype = options.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    config, params = load(options, output, dtype)
    batch = Batch.draw(options, config, dtype)
    say(
        f"{config.num_heads} heads, {config.latent_dim} values a token in the cache, {dtype}, on "
        f"{jax.devices()[0].device_kind}; prompts of {', '.join(map(str, batch.prompts))} tokens"
    )
    wanted = [
        layer_float64(config, params, np.asarray(x)[None])[0]
        for x in track(batch.hidden, "the whole layer in float64")
    ]
    caches = [dtype, "int8"] if options.int8 else [dtype]
    runners = [
        Runner(name, cache, options, config, params, batch) for cache in caches for name in names
    ]
    for step in track(batch.steps, "prefill, decode, MTP"):
        for runner in runners:
            runner.step(step, wanted)

    rows = [runner.row() for runner in runners]
    reasons = available_implementations()
    rows += [{"implementation": name, "note": why} for name, why in reasons.items() if why]
    show(rows, dtype)
    draw(output.path("demo.png"), batch, runners)
    by_cache = {runner.cache_dtype: runner for runner in runners}
    worst = ", ".join(
        f"{max(np.max(r.errors) for r in runners if r.cache_dtype == cache):.1e} with a cache in "
        f"{cache} (bound {one.bound:.0e})"
        for cache, one in by_cache.items()
    )
    cached = " or ".join(f"{one.cache_bytes:,} ({cache})" for cache, one in by_cache.items())
    expanded = config.num_heads * (config.qk_head_dim + config.v_head_dim) / config.latent_dim
    return Outcome(
        passed=all(row["passed"] for row in rows if "passed" in row),
        summary=(
            f"{len(batch.steps)} steps with {len(names)} implementations: the largest error "
            f"against float64 is {worst}. {sum(batch.totals)} tokens take {cached} bytes a layer; "
            f"expanded keys and values in {dtype} would take {expanded:.1f} times the first."
        ),
        rows=rows,
        headline={
            "bounds": {cache: one.bound for cache, one in by_cache.items()},
            "prompts": batch.prompts,
            "dtype": dtype,
        },
    )


def load(options: Options, output: Output, dtype: str) -> tuple[MLAConfig, MLAParams]:
    """The layer, from --checkpoint or from one written first."""
    folder = options.checkpoint
    if folder is None:
        config = small_config()
        seeded = init_params(jax.random.key(options.seed), config, jnp.bfloat16)
        folder = str(output.path("checkpoint"))
        save_hf(folder, config, seeded)
        say(f"wrote a seeded checkpoint to {folder}")
    with reading("checkpoint"):
        return load_hf(folder, layer=options.layer, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Step:
    """What every request does in one step; all [B] int32 but block_tables."""

    phase: str
    width: int  # S, tokens that a request may have in this step
    query_lens: np.ndarray
    seq_lens: np.ndarray  # after it
    block_tables: np.ndarray  # [B, max_pages]

    def tokens(self, hidden: list[np.ndarray]) -> np.ndarray:
        """x [B, S, hidden], left aligned; NaN where there is no token."""
        x = np.full((len(hidden), self.width, hidden[0].shape[1]), np.nan, hidden[0].dtype)
        for row, states, count, end in zip(x, hidden, self.query_lens, self.seq_lens, strict=True):
            row[:count] = states[end - count : end]
        return x

    def outputs(self, wanted: list[np.ndarray]) -> np.ndarray:
        """The oracle's outputs for the tokens of this step, one after the other."""
        spans = zip(wanted, self.query_lens, self.seq_lens, strict=True)
        return np.concatenate([out[end - count : end] for out, count, end in spans])


@dataclasses.dataclass(frozen=True)
class Batch:
    """The requests' hidden states and the steps in which they are served."""

    prompts: list[int]
    hidden: list[np.ndarray]  # of each request [tokens, hidden]
    steps: list[Step]
    num_pages: int

    @property
    def totals(self) -> list[int]:
        """Tokens of each request at the end."""
        return [len(states) for states in self.hidden]

    @staticmethod
    def draw(options: Options, config: MLAConfig, dtype: str) -> "Batch":
        rng = np.random.default_rng(options.seed)
        prompts = rng.integers(1, options.max_prompt + 1, options.requests)
        prompts[0] = options.max_prompt
        totals = prompts + options.decode_steps + 2 * options.mtp_steps
        hidden = [
            rng.normal(size=(total, config.hidden_size)).astype(jnp.dtype(dtype))
            for total in totals
        ]
        max_pages = -(-int(totals.max()) // options.page_size) + 1
        num_pages = int((-(-totals // options.page_size)).sum())
        allocator = PageAllocator(num_pages, options.page_size)
        for request in range(options.requests):
            allocator.allocate(request, 0)

        widths = [("prefill", options.chunk)] * -(-options.max_prompt // options.chunk)
        widths += [("decode", 1)] * options.decode_steps + [("MTP", 2)] * options.mtp_steps
        steps, lengths = [], np.zeros(options.requests, np.int64)
        for phase, width in widths:
            ends = np.minimum(lengths + width, prompts if phase == "prefill" else totals)
            for request, end in enumerate(ends):
                allocator.extend(request, int(end))
            tables = allocator.block_tables(range(options.requests), max_pages, fill=GARBAGE_PAGE)
            counts = (ends - lengths).astype(np.int32)
            steps.append(Step(phase, width, counts, ends.astype(np.int32), tables))
            lengths = ends
        return Batch(prompts.tolist(), hidden, steps, num_pages)


class Runner:
    """Serves the batch with one implementation, on its own cache, and keeps errors and times."""

    def __init__(
        self,
        name: str,
        cache_dtype: str,
        options: Options,
        config: MLAConfig,
        params: MLAParams,
        batch: Batch,
    ) -> None:
        self.name, self.cache_dtype = name, cache_dtype
        self.config, self.params, self.batch = config, params, batch
        self.bound = LAYER_BOUND[cache_dtype]
        with reading("layout"):
            self.cache = PagedKVCache.create(
                batch.num_pages,
                page_size=options.page_size,
                kv_lora_rank=config.kv_lora_rank,
                rope_dim=config.qk_rope_head_dim,
                dtype=cache_dtype,
                layout=options.layout,
            )
        self.errors: list[float] = []
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.refused: dict[str, str] = {}
        self._step = jax.jit(
            mla_layer, static_argnames=("config", "implementation"), donate_argnames="cache"
        )

    def step(self, step: Step, wanted: list[np.ndarray]) -> None:
        """One step of the layer; where the implementation can't run it, with the best that can."""
        reason = IMPLEMENTATIONS[self.name].unavailable(self._problem(step))
        if reason is not None:
            self.refused[step.phase] = reason
        arguments: dict[str, Any] = jax.device_put(
            {
                "x": step.tokens(self.batch.hidden),
                "block_tables": step.block_tables,
                "seq_lens": step.seq_lens,
                "query_lens": step.query_lens,
            }
        )
        start = time.perf_counter()
        out, self.cache = self._step(
            self.params,
            config=self.config,
            cache=self.cache,
            implementation=None if reason else self.name,
            **arguments,
        )
        out.block_until_ready()
        self.seconds[step.phase].append(time.perf_counter() - start)
        real = np.arange(step.width) < step.query_lens[:, None]
        self.errors.append(relative_error(np.asarray(out)[real], step.outputs(wanted)))

    @property
    def cache_bytes(self) -> int:
        """Of all tokens at the end, one layer."""
        return sum(self.batch.totals) * self.cache.bytes_per_token

    def row(self) -> Row:
        """The largest error of each phase and the median time of a step, compilation left out."""
        row: Row = {"implementation": self.name, "cache": self.cache_dtype}
        for phase in PHASES:
            errors = [
                e for e, s in zip(self.errors, self.batch.steps, strict=True) if s.phase == phase
            ]
            row[f"{phase}_error"] = float(np.max(errors))
        for phase in PHASES:
            row[f"{phase}_ms"] = float(np.median(self.seconds[phase][1:] or [np.nan])) * 1e3
        row["cache_bytes"] = self.cache_bytes
        row["passed"] = bool(np.max(self.errors) <= self.bound)
        row["note"] = "; ".join(f"{phase}: {reason}" for phase, reason in self.refused.items())
        return row

    def _problem(self, step: Step) -> AttentionProblem:
        """What the attention will be asked, in shapes and dtypes."""
        shape = (len(step.seq_lens), step.width, self.config.num_heads, self.config.latent_dim)
        return AttentionProblem(
            q=jnp.zeros(shape, self.batch.hidden[0].dtype),
            cache=self.cache,
            block_tables=jnp.asarray(step.block_tables),
            seq_lens=jnp.asarray(step.seq_lens),
            query_lens=jnp.asarray(step.query_lens),
            plan=None,
            softmax_scale=self.config.softmax_scale,
            causal=True,
            rescale="multiply",
            partial_dtype=None,
        )


def show(rows: list[Row], dtype: str) -> None:
    """Errors and times by phase, then who could not run what, and why."""
    columns = {"implementation": "implementation", "cache": "cache"}
    columns |= {f"{phase}_error": f"{phase} error" for phase in PHASES}
    columns |= {f"{phase}_ms": f"{phase} ms" for phase in PHASES}
    columns |= {"cache_bytes": "cache bytes", "passed": "in bound"}
    device = jax.devices()[0].device_kind
    title = f"{dtype} on {device}: largest error against float64, median ms of a step"
    show_table(title, [row for row in rows if "passed" in row], columns)
    for row in rows:
        if row["note"]:
            what = " on ".join(row[key] for key in ("implementation", "cache") if key in row)
            say(f"{what} can't run here: {row['note']}")


def draw(path: Path, batch: Batch, runners: list[Runner]) -> None:
    title = "A ragged batch through one attention layer"
    with plotting.figure(path, title, columns=2, size=(13, 4.8)) as (left, right):
        steps = np.arange(len(batch.steps))
        for i, runner in enumerate(runners):
            left.plot(
                steps,
                runner.errors,
                plotting.MARKERS[i],
                color=plotting.COLOURS[i],
                label=f"{runner.name}, {runner.cache_dtype}",
                markersize=7,
                markerfacecolor="none",
                markeredgewidth=1.5,
            )
        bounds = {runner.bound for runner in runners}
        for bound in bounds:
            left.axhline(bound, color=plotting.GREY, linestyle="--")
        left.set_yscale("log")
        left.set_ylim(min(bounds) / 300, max(bounds) * 3)
        left.set_ylabel("relative error of the layer's output")
        left.set_title("Every step against float64 (dashed: the bounds)")
        left.legend(loc="lower right", ncols=2)

        lengths = np.stack([step.seq_lens for step in batch.steps], axis=1)
        kib = lengths * runners[0].cache.bytes_per_token / 1024
        right.stackplot(steps, kib, colors=plotting.COLOURS, edgecolor="white", linewidth=0.5)
        for runner in [r for r in runners if r.cache_dtype != runners[0].cache_dtype][:1]:
            whole = lengths.sum(0) * runner.cache.bytes_per_token / 1024
            label = f"all of it in {runner.cache_dtype}"
            right.plot(steps, whole, color="black", linestyle="--", label=label)
            right.legend(loc="upper left", bbox_to_anchor=(0, 0.92))
        right.set_ylabel("KiB in the cache")
        right.set_title(f"The cache ({runners[0].cache_dtype}) fills, a colour a request")
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.set_xlim(-0.5, len(steps) - 0.5)
            for phase in PHASES:
                mine = [i for i, step in enumerate(batch.steps) if step.phase == phase]
                axes.axvline(mine[-1] + 0.5, color=plotting.GREY, linewidth=0.7)
                top = axes.get_xaxis_transform()
                axes.text(np.mean(mine), 0.98, phase, ha="center", va="top", transform=top)
