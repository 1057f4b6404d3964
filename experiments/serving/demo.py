"""A DeepSeek attention layer serves a batch of requests, and every step is checked.

It loads a layer from a Hugging Face folder and prefills prompts of different lengths in chunks into
a paged cache. Then it decodes one token at a time, and two at a time as multi-token prediction
(MTP) does. Each implementation has its own cache, of the layer's dtype and of int8. The output of
every step is compared with the whole layer in float64. Meanwhile a small whole model generates
tokens (`demo_model`). On a GPU the attention of a larger batch, as servers have it, is also timed.
`demo_plan` says which implementations run on which machine.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework.console import say, track
from experiments.framework.errors import LAYER_BOUND, layer_bound, relative_error
from experiments.framework.experiment import Outcome, Output, reading
from experiments.framework.implementations import chosen, implementations_flag
from experiments.framework.options import flag, seed_flag
from experiments.serving import demo_model, demo_plan, demo_served
from experiments.serving.demo_batch import Batch, Step
from experiments.serving.demo_results import Measurement, Result, draw, show
from mla_jax import checks
from mla_jax.cache import LAYOUTS, PAGE_SIZES, PagedKVCache
from mla_jax.checkpoints.load import load_hf
from mla_jax.checkpoints.weights import MLAParams, init_params, save_hf
from mla_jax.config import MLAConfig
from mla_jax.layer import mla_layer
from mla_jax.problem import AttentionProblem
from mla_jax.reference.layer import layer_float64
from mla_jax.registry import IMPLEMENTATIONS

SUMMARY = "prefill and decode with a layer, generate with a model, compared with float64"

FILLER = "xla"  # fills the cache if no chosen implementation can


@dataclasses.dataclass(frozen=True)
class Options:
    checkpoint: str | None = flag(None, "Hugging Face folder; by default a small random one")
    layer: int | None = flag(
        None, "number of the layer in the checkpoint; by default the lowest", lower_bound=0
    )
    requests: int = flag(6, "in the batch", lower_bound=1)
    max_prompt: int = flag(384, "tokens of the longest prompt", lower_bound=1)
    chunk: int = flag(64, "tokens per request in a prefill step", lower_bound=1)
    decode_steps: int = flag(8, "steps of one token", lower_bound=1)
    mtp_steps: int = flag(4, "steps of two tokens", lower_bound=1)
    page_size: int = flag(64, "tokens per page", choices=PAGE_SIZES)
    layout: str = flag("ND", "of the pages", choices=LAYOUTS)
    dtype: str | None = flag(
        None, "by default bfloat16 on a GPU, else float32", choices=checks.FLOAT_DTYPES
    )
    implementations: tuple[str, ...] = implementations_flag()
    int8: bool = flag(True, "whether to serve from an int8 cache, too")
    served: bool = flag(True, "whether to time a larger batch if there is a GPU")
    model: bool = flag(True, "whether a small whole model generates tokens")
    seed: int = seed_flag("of the checkpoint, the prompts' lengths and the hidden states")


def small_config() -> MLAConfig:
    """Returns a config with DeepSeek-V3's head and cache widths and YaRN, but 16 heads.

    The hidden state is narrow, so that the checkpoint is small.
    """
    v3 = MLAConfig.preset("deepseek-v3")
    return dataclasses.replace(
        v3, hidden_size=1024, num_heads=16, q_lora_rank=384, num_hidden_layers=1
    )


def run(options: Options, output: Output) -> Outcome:
    if options.implementations:
        chosen(options.implementations)
    machine = demo_plan.Machine.here()
    plan = demo_plan.plan(
        machine,
        dtype=options.dtype,
        implementations=options.implementations,
        served=options.served,
    )
    config, params = load(options, output, plan.dtype)
    batch = Batch.draw(options, config, plan.dtype)
    say(
        f"{config.num_heads} heads, {config.latent_dim} values per token in the cache, "
        f"{plan.dtype}, on {machine.kind}; prompts of {', '.join(map(str, batch.prompts))} tokens"
    )
    caches = [plan.dtype, "int8"] if options.int8 else [plan.dtype]
    lanes = [(name, cache) for cache in caches for name in plan.implementations]
    runners = make_runners(lanes, options, config, params, batch)
    setup = demo_plan.served_setup(machine.memory)
    steps = demo_served.jobs_of(plan.served, plan.timed, setup)
    prompts = demo_served.prefill_jobs(plan.prefilled, demo_plan.PREFILL_HEADS, plan.timed)
    # The model's programs are compiled beside those of the layer.
    with ThreadPoolExecutor(1) as beside:
        generating = None
        if options.model:
            generating = beside.submit(demo_model.run, small_config(), plan.dtype, options.seed)
        programs = compile_all(runners, [*steps, *prompts])
    generated = [] if generating is None else [generating.result()]
    wanted = [
        layer_float64(config, params, np.asarray(x)[None])[0]
        for x in track(batch.hidden, "the whole layer in float64")
    ]
    measured = serve(runners, batch, programs, wanted)
    served = demo_served.run(steps, programs) if steps else []
    served += demo_served.run_prefill(prompts, programs) if prompts else []

    shown = [runner for runner in runners if (runner.name, runner.cache_dtype) in lanes]
    results = [Result.of(runner, measured) for runner in shown]
    rows = [result.row() for result in results]
    rows += [{"implementation": name, "note": why} for name, why in plan.not_run.items()]
    show(results, rows, plan.dtype, machine.kind)
    draw(output.path("demo.png"), batch, results, plan.dtype, shown[0].cache.bytes_per_token)
    if served:
        demo_served.show(served, machine.kind)
        demo_served.draw(output.path("served.png"), served, machine.kind)
    for row in generated:
        say(demo_model.in_words(row))
    verdicts = [
        row["passed"] for row in [*rows, *served, *generated] if row.get("passed") is not None
    ]
    return Outcome(
        passed=any(result.row()["passed"] for result in results) and all(verdicts),
        summary=" ".join(
            filter(
                None,
                [
                    summary(batch, results, config, plan),
                    demo_served.summary(served),
                    *map(demo_model.in_words, generated),
                ],
            )
        ),
        rows=rows,
        headline={
            "bounds": {result.cache: LAYER_BOUND[result.cache] for result in results},
            "prompts": batch.prompts,
            "dtype": plan.dtype,
        }
        | ({"served": served} if served else {})
        | ({"generated": generated[0]} if generated else {}),
    )


def summary(
    batch: Batch, results: Sequence[Result], config: MLAConfig, plan: demo_plan.Plan
) -> str:
    """Returns the largest errors and the sizes of the caches in words."""
    by_cache: dict[str, list[Result]] = {}
    for result in results:
        by_cache.setdefault(result.cache, []).append(result)
    worst = []
    for cache, mine in by_cache.items():
        for bound in sorted({result.bound for result in mine}):
            alike = [result for result in mine if result.bound == bound]
            errors = [m.error for result in alike for m in result.measured]
            if errors:
                which = f"a cache in {cache}"
                if bound != LAYER_BOUND[cache]:
                    which += f" and {', '.join(result.implementation for result in alike)}"
                worst.append(f"{np.max(errors):.1e} with {which} (bound {bound:g})")
    sizes = [f"{mine[0].cache_bytes:,} ({cache})" for cache, mine in by_cache.items()]
    expanded = config.num_heads * (config.qk_head_dim + config.v_head_dim) / config.latent_dim
    return (
        f"{len(batch.steps)} steps with {', '.join(plan.implementations)}: the largest error "
        f"against float64 is {', '.join(worst) or 'unknown, all was refused'}. "
        f"{sum(batch.totals)} tokens take {' or '.join(sizes)} bytes per layer; expanded keys and "
        f"values in {plan.dtype} would take {expanded:.1f} times the first."
    )


def load(options: Options, output: Output, dtype: str) -> tuple[MLAConfig, MLAParams]:
    """Loads the layer from --checkpoint, or from a new random checkpoint."""
    folder = options.checkpoint
    if folder is None:
        config = small_config()
        seeded = init_params(jax.random.key(options.seed), config, jnp.bfloat16)
        folder = str(output.path("checkpoint"))
        save_hf(folder, config, seeded)
        say(f"wrote a seeded checkpoint to {folder}")
    with reading("checkpoint"):
        return load_hf(folder, layer=options.layer, dtype=dtype)


class Runner:
    """Serves the batch with one implementation, on its own cache.

    `refused` gives, by phase, the reason why the implementation can't compute it. Such a phase is
    not computed under its name. The runner later copies a cache that another runner has filled.
    """

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
        self.bound = layer_bound(name, cache_dtype)
        with reading("layout"):
            self.cache = PagedKVCache.create(
                batch.num_pages,
                page_size=options.page_size,
                kv_lora_rank=config.kv_lora_rank,
                rope_dim=config.qk_rope_head_dim,
                dtype=cache_dtype,
                layout=options.layout,
            )
        reasons = {
            phase: IMPLEMENTATIONS[name].unavailable(self._problem(step))
            for phase, step in batch.first_steps.items()
        }
        self.refused = {phase: reason for phase, reason in reasons.items() if reason is not None}

    def compile(self, phase: str) -> Callable[..., Any]:
        """Compiles the layer's step for a phase that is not refused."""
        step = jax.jit(
            mla_layer, static_argnames=("config", "implementation"), donate_argnames="cache"
        )
        lowered = step.lower(
            self.params,
            config=self.config,
            cache=self.cache,
            implementation=self.name,
            **self._arguments(self.batch.first_steps[phase]),
        )
        # XLA's search for the fastest matmuls takes most of the time to compile a step, so it is
        # off. Speed is measured with the larger batch.
        on_gpu = jax.default_backend() == "gpu"
        return lowered.compile({"xla_gpu_autotune_level": 0} if on_gpu else None)

    def run(
        self, program: Callable[..., Any], index: int, step: Step, wanted: list[np.ndarray]
    ) -> Measurement:
        """Runs one step of the layer with this implementation's program."""
        arguments = jax.device_put(self._arguments(step))
        start = time.perf_counter()
        out, self.cache = program(self.params, cache=self.cache, **arguments)
        out.block_until_ready()
        seconds = time.perf_counter() - start
        real = np.arange(step.width) < step.query_lens[:, None]
        error = relative_error(np.asarray(out)[real], step.outputs(wanted))
        return Measurement(self.name, self.cache_dtype, index, step.phase, error, seconds)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all tokens at the end, in one layer."""
        return sum(self.batch.totals) * self.cache.bytes_per_token

    def _arguments(self, step: Step) -> dict[str, Any]:
        return {
            "x": step.tokens(self.batch.hidden),
            "block_tables": step.block_tables,
            "seq_lens": step.seq_lens,
            "query_lens": step.query_lens,
        }

    def _problem(self, step: Step) -> AttentionProblem:
        """Returns the attention problem of a step, in shapes and dtypes."""
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


def make_runners(
    lanes: Sequence[tuple[str, str]],
    options: Options,
    config: MLAConfig,
    params: MLAParams,
    batch: Batch,
) -> list[Runner]:
    """Returns one runner per (implementation, cache dtype), and one that fills caches if needed.

    It is needed if each of the others refuses a phase and one of them can continue after it.
    """
    runners = [Runner(name, cache, options, config, params, batch) for name, cache in lanes]
    for cache in dict.fromkeys(cache for _, cache in lanes):
        mine = [runner for runner in runners if runner.cache_dtype == cache]
        if all(runner.refused for runner in mine) and any(map(_continues, mine)):
            runners.append(Runner(FILLER, cache, options, config, params, batch))
    return runners


def _continues(runner: Runner) -> bool:
    """Returns whether a runner computes a phase although it refuses another one."""
    return 0 < len(runner.refused) < len(runner.batch.first_steps)


def compile_all(runners: Sequence[Runner], jobs: Sequence[Any]) -> dict[Any, Any]:
    """Compiles all programs in threads; returns them by (runner, width of the step) or by job."""
    work: dict[Any, Callable[[], Any]] = {}
    for runner in runners:
        for phase, step in runner.batch.first_steps.items():
            if phase not in runner.refused:
                work[runner, step.width] = functools.partial(runner.compile, phase)
    work |= {job: demo_served.compiling(job) for job in jobs}
    with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
        futures = {key: executor.submit(compile_one) for key, compile_one in work.items()}
        for _ in track(as_completed(futures.values()), "compiling", total=len(futures)):
            pass
    return {key: future.result() for key, future in futures.items()}


def serve(
    runners: Sequence[Runner],
    batch: Batch,
    programs: Mapping[Any, Any],
    wanted: list[np.ndarray],
) -> list[Measurement]:
    """Runs every step with every runner that computes it."""
    measured = []
    whole = {runner.cache_dtype: runner for runner in reversed(runners) if not runner.refused}
    behind = dict.fromkeys(runners, False)  # whether a runner's cache lacks tokens
    for index, step in enumerate(track(batch.steps, "prefill, decode, MTP")):
        ready = [runner for runner in runners if step.phase not in runner.refused]
        for runner in ready:
            if behind[runner]:  # copied before any runner writes the tokens of this step
                runner.cache = jax.tree.map(jnp.copy, whole[runner.cache_dtype].cache)
        for runner in ready:
            measured.append(runner.run(programs[runner, step.width], index, step, wanted))
        behind = {runner: step.phase in runner.refused for runner in runners}
    return measured
