"""Times a decode step of a model, and its parts.

Parts are timed as programs of their own (`part_programs.py`), on every device. Nothing is measured
inside the step there, so that "everything else" is a difference: the step less the parts that cover
it. On a GPU the profiler also names the kernels of the step itself (`step_kernels.py`).
"""

import dataclasses
from typing import Any

import jax

from experiments.framework.console import track
from experiments.framework.experiment import Row
from experiments.framework.results import first_line
from experiments.generate.engine import Sizes, decode_step
from experiments.generate.model import ModelConfig, ModelParams
from experiments.generate.part_programs import Parts, Program, step_batch
from experiments.generate.step_kernels import attention_us, rows_of_kernels
from experiments.speed import timing
from experiments.speed.layer.step import NAMED_KERNELS
from mla_jax import PagedKVCache

STEP, REST = "whole decode step", "everything else (difference)"
NO_GRAPHS = "whole decode step, without CUDA graphs"
ATTENTION, OP = "attention layers", "- of these, the attention op, alone"
MIXTURES, EXPERTS = "mixtures of experts", "- of these, the experts' products"
DENSE, HEAD = "dense feed-forward", "head and next token"
WHOLE_PARTS = (ATTENTION, MIXTURES, DENSE, HEAD)  # cover the step, up to norms and sums
ALONE_PASSES = 4  # of the op over its layers in one burst on a GPU
TRACED = 4  # steps


@dataclasses.dataclass(frozen=True)
class Found:
    """What was measured of a step.

    Attributes:
        parts: the step and its parts, each as a program: microseconds, and the share of the step.
        kernels: the kernels of the step by part and kind; empty without a GPU.
        failed: why `kernels` is empty on a GPU.
        over_alone: the attention in the step over the op alone, by GPU time; None without a GPU.
    """

    parts: list[Row]
    kernels: list[Row]
    failed: str = ""
    over_alone: float | None = None


class _State:
    """The pool, which every program donates and returns."""

    def __init__(self, pool: PagedKVCache) -> None:
        self.pool = pool
        self.last: Any = None

    def call(self, program: Program) -> None:
        self.last, self.pool = program(self.pool)

    def burst(self, program: Program) -> timing.Burst:
        return timing.Burst(
            1, lambda: self.call(program), lambda: jax.block_until_ready((self.last, self.pool))
        )


def measured_parts(
    params: ModelParams,
    config: ModelConfig,
    sizes: Sizes,
    pool: PagedKVCache,
    tokens_per_request: int,
    *,
    with_plan: bool,
    rounds: int,
) -> Found:
    """Times the step and each part.

    Every slot decodes 1 + drafts tokens of a request that then has `tokens_per_request`. The pool
    is used up; what it holds does not matter.
    """
    batch = step_batch(config, sizes, tokens_per_request)
    parts = Parts(params, config, batch, with_plan)
    state = _State(pool)

    def step(pool: PagedKVCache) -> Any:
        return decode_step(params, config, pool, batch, with_plan)

    programs = _programs(parts) | {STEP: step}
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu:
        compiled = _without_graphs(parts, pool)
        programs[NO_GRAPHS] = lambda pool: compiled(params, pool, batch)
    bursts = {}
    for name, program in track(list(programs.items()), "compiling the parts"):
        state.call(program)
        bursts[name] = state.burst(program)
    pause = 0.03 if on_gpu else 0.0
    times = {
        name: one.us for name, one in timing.measure(bursts, rounds=rounds, pause=pause).items()
    }
    # Apart from the others: it reads the pool, which they donate.
    alone = {OP: parts.op_alone(state.pool, ALONE_PASSES if on_gpu else 1)}
    of_op = timing.measure(alone, rounds=rounds, pause=pause)[OP].us
    rows = _rows(config, times, of_op)
    if not on_gpu:
        return Found(rows, [])
    try:
        kernels = _traced(state.burst(programs[NO_GRAPHS]), compiled)
    except Exception as error:  # of a profiler; what was timed is still shown
        return Found(rows, [], first_line(error) or type(error).__name__)
    if not kernels:
        return Found(rows, [], "the profiler saw no kernel")
    of_all_layers = of_op * config.num_layers
    return Found(rows, kernels, over_alone=attention_us(kernels) / of_all_layers)


def _programs(parts: Parts) -> dict[str, Program]:
    found = {ATTENTION: parts.attention()}
    if parts.config.num_moe_layers:
        found[MIXTURES] = parts.mixtures()
        found[EXPERTS] = parts.experts()
    if parts.config.num_dense_layers:
        found[DENSE] = parts.dense()
    found[HEAD] = parts.head()
    return found


def _rows(config: ModelConfig, times: dict[str, float], of_op: float) -> list[Row]:
    """Returns rows of the step and its parts; `of_op` are the microseconds of one layer's op."""
    step = times[STEP]
    layers = {ATTENTION: config.num_layers, OP: config.num_layers, DENSE: config.num_dense_layers}
    layers |= dict.fromkeys((MIXTURES, EXPERTS), config.num_moe_layers)
    order = (STEP, NO_GRAPHS, ATTENTION, OP, MIXTURES, EXPERTS, DENSE, HEAD, REST)
    rest = step - sum(times[name] for name in WHOLE_PARTS if name in times)
    found = times | {OP: of_op * config.num_layers, REST: rest}
    return [
        {
            "part": name, "us": found[name], "of_step": found[name] / step,
            "us_per_layer": found[name] / layers[name] if name in layers else None,
        }
        for name in order if name in found
    ]  # fmt: skip


def _without_graphs(parts: Parts, pool: PagedKVCache) -> Any:
    """Compiles a step whose kernels are launched one by one, so that the profiler names them."""
    step = decode_step.lower(parts.params, parts.config, pool, parts.batch, parts.with_plan)
    return step.compile(compiler_options=dict(NAMED_KERNELS))


def _traced(step: timing.Burst, compiled: Any) -> list[Row]:
    """Profiles some steps, without CUDA graphs, and returns rows of their kernels."""
    kernels = timing.traced_kernels(step, TRACED)
    return rows_of_kernels(kernels, compiled.as_text() or "", TRACED)
