"""Times a decode step of a model, and parts of it as programs of their own with the same shapes.

Each part is a program that runs it for all layers that have it. Parts overlap: the attention op is
in the attention layers, and the routed experts are in the mixtures. Nothing is measured inside the
step, so that "everything else" is a difference: the step less the parts that cover it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework.console import track
from experiments.framework.experiment import Row
from experiments.generate.engine import Batch, Sizes, decode_plan, decode_step
from experiments.generate.grouped import ALIGN, grouped_product, num_rows
from experiments.generate.model import (
    Layers,
    ModelConfig,
    ModelParams,
    dense,
    logits_of,
    mixture,
    next_tokens,
    route,
    split_routed,
    swiglu,
)
from experiments.speed import timing
from mla_jax import PagedKVCache, mla_layer, paged_mla_attention

STEP, REST = "whole decode step", "everything else (difference)"
ATTENTION, OP = "attention layers", "- of these, the attention op"
MIXTURES, EXPERTS = "mixtures of experts", "- of these, the experts' products"
DENSE, HEAD = "dense feed-forward", "head and next token"
WHOLE_PARTS = (ATTENTION, MIXTURES, DENSE, HEAD)  # cover the step, up to norms and sums


def measured_parts(
    params: ModelParams,
    config: ModelConfig,
    sizes: Sizes,
    pool: PagedKVCache,
    tokens_per_request: int,
    *,
    with_plan: bool,
    rounds: int,
) -> list[Row]:
    """Returns a row for the step and for each part: microseconds, and the share of the step.

    Every slot decodes 1 + drafts tokens of a request that then has `tokens_per_request`. The pool
    is used up; what it holds does not matter.
    """
    batch = _batch(config, sizes, tokens_per_request)
    state = _State(pool)
    programs = _programs(params, config, batch, with_plan)
    bursts = {}
    for name, program in track(list(programs.items()), "compiling the parts"):
        state.call(program)
        bursts[name] = state.burst(program)
    on_cpu = jax.default_backend() == "cpu"
    times = timing.measure(bursts, rounds=rounds, pause=0.0 if on_cpu else 0.03)
    step = times[STEP].us
    rest = step - sum(times[name].us for name in WHOLE_PARTS if name in times)
    found = {name: times[name].us for name in programs} | {REST: rest}
    layers = {ATTENTION: config.num_layers, OP: config.num_layers, DENSE: config.num_dense_layers}
    layers |= dict.fromkeys((MIXTURES, EXPERTS), config.num_moe_layers)
    return [
        {
            "part": name, "us": us, "of_step": us / step,
            "us_per_layer": us / layers[name] if name in layers else None,
        }
        for name, us in found.items()
    ]  # fmt: skip


class _State:
    """The pool, which every program donates and returns."""

    def __init__(self, pool: PagedKVCache) -> None:
        self.pool = pool
        self.last: Any = None

    def call(self, program: Callable[[PagedKVCache], Any]) -> None:
        self.last, self.pool = program(self.pool)

    def burst(self, program: Callable[[PagedKVCache], Any]) -> timing.Burst:
        return timing.Burst(
            1, lambda: self.call(program), lambda: jax.block_until_ready((self.last, self.pool))
        )


def _batch(config: ModelConfig, sizes: Sizes, tokens: int) -> Batch:
    rows, width = sizes.slots, 1 + sizes.drafts
    pages = -(-tokens // sizes.page_size)
    if rows * pages > sizes.num_pages or pages > sizes.max_pages:
        raise ValueError(f"{rows} requests of {tokens} tokens do not fit in the engine's pool")
    rng = np.random.default_rng(0)
    tables = np.full((rows, sizes.max_pages), -1, np.int32)
    tables[:, :pages] = rng.permutation(sizes.num_pages)[: rows * pages].reshape(rows, pages)
    return jax.device_put(Batch(
        rng.integers(0, config.vocab_size, (rows, width)).astype(np.int32), tables,
        np.full(rows, tokens, np.int32), np.full(rows, width, np.int32),
        np.zeros(rows, np.float32), np.ones(rows, np.float32), np.zeros(rows, np.uint32),
    ))  # fmt: skip


def _programs(
    params: ModelParams, config: ModelConfig, batch: Batch, with_plan: bool
) -> Mapping[str, Callable[[PagedKVCache], Any]]:
    """Returns a function of the pool per part, which returns a result and the pool."""
    c, dtype = config, params.embedding.dtype
    rows, width = batch.tokens.shape
    shape = (rows, width, c.attention.num_heads, c.attention.latent_dim)
    # NumPy makes all arrays: each eager operation of JAX would be a program.
    rng = np.random.default_rng(1)
    host_x = rng.standard_normal((rows, width, c.attention.hidden_size)).astype(dtype)
    x, flat = jax.device_put((host_x, host_x.reshape(rows * width, -1)))
    q = jax.device_put(rng.standard_normal(shape).astype(dtype))
    tables = batch.block_tables, batch.seq_lens
    a_row = batch.temperatures, batch.top_ps, batch.seeds
    flat_rows = *(np.repeat(a, width) for a in a_row), np.zeros(rows * width, np.int32)
    sampling = jax.device_put(flat_rows)

    def plan_of(pool: PagedKVCache) -> Any:
        return decode_plan(c, pool, batch) if with_plan else None

    def whole_layers(params: ModelParams, pool: PagedKVCache, x: jax.Array) -> Any:
        plan = plan_of(pool)

        def layer(carry: Any, stacked: Any) -> Any:
            x, pool = carry
            out, pool = mla_layer(
                stacked[0], c.attention, x, pool.layer(stacked[1]), *tables,
                query_lens=batch.query_lens, plan=plan,
            )  # fmt: skip
            return (_after(x, out), pool), None

        first, carry = 0, (x, pool)
        for layers, count in _stacks(params, c):
            indices = jnp.arange(first, first + count)
            carry, _ = jax.lax.scan(layer, carry, (layers.attention, indices))
            first += count
        return carry

    def op(params: ModelParams, pool: PagedKVCache, q: jax.Array) -> Any:
        plan = plan_of(pool)

        def layer(q: jax.Array, index: jax.Array) -> Any:
            o, _ = paged_mla_attention(
                q, pool.layer(index), *tables, softmax_scale=c.attention.softmax_scale,
                query_lens=batch.query_lens, plan=plan,
            )  # fmt: skip
            return _after(q, o), None

        return jax.lax.scan(layer, q, jnp.arange(c.num_layers))[0], pool

    def feed_forward(params: Layers, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, one: Any) -> Any:
            return _after(x, dense(one, x)), None

        return jax.lax.scan(layer, x, params.feed_forward)[0]

    def mixtures(params: Layers, x: jax.Array) -> jax.Array:
        real = jnp.ones(len(x), bool)
        routed, rest = split_routed(params)

        def layer(x: jax.Array, stacked: Any) -> Any:
            one = dataclasses.replace(stacked[0], routed=routed)
            return _after(x, mixture(one, c.routing, x, real, stacked[1])), None

        return jax.lax.scan(layer, x, (rest.feed_forward, jnp.arange(c.num_moe_layers)))[0]

    def experts(params: Layers, x: jax.Array) -> jax.Array:
        """Multiplies the experts' rows, as many per expert as the first layer's router says."""
        routed, rest = split_routed(params)
        first = jax.tree.map(lambda a: a[0], rest.feed_forward)
        chosen, _ = route(first, c.routing, x)
        counts = jnp.zeros(c.routing.num_experts, jnp.int32).at[chosen.reshape(-1)].add(1)
        sizes = -(-counts // ALIGN) * ALIGN
        x = jnp.resize(x, (num_rows(chosen.size, c.routing.num_experts), x.shape[-1]))

        def layer(x: jax.Array, index: jax.Array) -> Any:
            hidden = swiglu(grouped_product(x, routed.gate_up, index, sizes))
            return _after(x, grouped_product(hidden, routed.down, index, sizes)), None

        return jax.lax.scan(layer, x, jnp.arange(c.num_moe_layers))[0]

    def head(params: ModelParams, x: jax.Array) -> jax.Array:
        return next_tokens(logits_of(params, c, x), *sampling)

    found: dict[str, Callable[[PagedKVCache], Any]] = {
        STEP: lambda pool: decode_step(params, c, pool, batch, with_plan),
        ATTENTION: _with_pool(whole_layers, params, x),
        OP: _with_pool(op, params, q),
    }
    if params.moe is not None:
        found[MIXTURES] = _without_pool(mixtures, params.moe, flat)
        found[EXPERTS] = _without_pool(experts, params.moe, flat)
    if params.dense is not None:
        found[DENSE] = _without_pool(feed_forward, params.dense, flat)
    found[HEAD] = _without_pool(head, params, flat)
    return found


def _after(x: jax.Array, out: jax.Array) -> jax.Array:
    """Returns x for the next layer, which waits for this layer's whole result.

    All layers get the same values but one: results of results would vanish or overflow.
    """
    out = jax.lax.optimization_barrier(out)
    return x.at[(0,) * x.ndim].set(out[(0,) * out.ndim].astype(x.dtype))


def _stacks(params: ModelParams, config: ModelConfig) -> list[tuple[Layers, int]]:
    both = (params.dense, config.num_dense_layers), (params.moe, config.num_moe_layers)
    return [(layers, count) for layers, count in both if layers is not None]


def _with_pool(function: Any, params: Any, x: jax.Array) -> Callable[[PagedKVCache], Any]:
    jitted = jax.jit(function, donate_argnums=1)
    return lambda pool: jitted(params, pool, x)


def _without_pool(function: Any, params: Any, x: jax.Array) -> Callable[[PagedKVCache], Any]:
    jitted = functools.partial(jax.jit(function), params, x)
    return lambda pool: (jitted(), pool)
