"""Parts of a decode step as programs of their own, with the shapes that they have in the step.

Each program runs its part for all layers that have it. Its kernels run one after the other: a CUDA
graph could run those of two layers side by side. Parts overlap: the attention op is in the
attention layers, and the routed experts are in the mixtures.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.generate.engine import Batch, Sizes, decode_plan
from experiments.generate.grouped import ALIGN, grouped_product, num_rows
from experiments.generate.model import (
    Experts,
    FeedForward,
    ModelConfig,
    ModelParams,
    dense,
    logits_of,
    mixture,
    next_tokens,
    route,
    swiglu,
)
from experiments.speed import timing
from mla_jax import MLAParams, PagedKVCache, mla_layer, paged_mla_attention

Program = Callable[[PagedKVCache], Any]  # returns a result, and the pool that it got
ALONE_LAYERS = 2  # whose caches the op reads in turn; one exceeds the L2 cache of a GPU


def step_batch(config: ModelConfig, sizes: Sizes, tokens: int) -> Batch:
    """Returns a decode step in which every slot has a request of so many tokens."""
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


@dataclasses.dataclass(frozen=True)
class Parts:
    """The arrays of a decode step, and a program for each of its parts."""

    params: ModelParams
    config: ModelConfig
    batch: Batch
    with_plan: bool

    def normal(self, *shape: int) -> jax.Array:
        """Returns random values. NumPy makes them: each eager operation of JAX is a program."""
        rng = np.random.default_rng(1)
        return jax.device_put(rng.standard_normal(shape).astype(self.params.embedding.dtype))

    @property
    def q(self) -> jax.Array:
        attention = self.config.attention
        return self.normal(*self.batch.tokens.shape, attention.num_heads, attention.latent_dim)

    @property
    def flat(self) -> jax.Array:
        """Hidden states of all tokens, [T, hidden]."""
        return self.normal(self.batch.tokens.size, self.config.attention.hidden_size)

    def plan(self, pool: PagedKVCache) -> Any:
        heads = self.config.attention.num_heads
        return decode_plan(pool, self.batch, heads) if self.with_plan else None

    def attention(self) -> Program:
        """The attention layers: projections, append and the op."""
        batch = self.batch

        @jax.jit
        def one(mine: MLAParams, index: jax.Array, x: jax.Array, pool: PagedKVCache, plan: Any):
            out, pool = mla_layer(
                mine, self.config.attention, x, pool.layer(index), batch.block_tables,
                batch.seq_lens, query_lens=batch.query_lens, plan=plan,
            )  # fmt: skip
            return _after(x, out), pool

        def run(weights: list[MLAParams], pool: PagedKVCache, x: jax.Array) -> Any:
            plan = self.plan(pool)
            for index, mine in enumerate(weights):
                x, pool = one(mine, np.int32(index), x, pool, plan)
            return x, pool

        weights = [layer.attention for layer in self.params.layers]
        jitted = jax.jit(run, donate_argnums=1, compiler_options=dict(timing.ONE_AFTER_THE_OTHER))
        x = self.normal(*batch.tokens.shape, self.config.attention.hidden_size)
        return lambda pool: jitted(weights, pool, x)

    def op_alone(self, pool: PagedKVCache, passes: int) -> timing.Burst:
        """The attention op by itself, timed as the experiment `benchmark` does.

        A burst has launches for the caches of some layers in turn, with a plan that is given.
        """
        batch, config = self.batch, self.config

        def op(q: jax.Array, cache: PagedKVCache, plan: Any) -> Any:
            return paged_mla_attention(
                q, cache, batch.block_tables, batch.seq_lens,
                softmax_scale=config.attention.softmax_scale, query_lens=batch.query_lens,
                plan=plan,
            )  # fmt: skip

        plan = jax.jit(self.plan)(pool) if self.with_plan else None
        layers = [pool.layer(i) for i in range(min(ALONE_LAYERS, config.num_layers))]
        arguments = self.q, layers, plan
        return timing.compile_model(op, *arguments, passes=passes).burst(*arguments)

    def mixtures(self) -> Program:
        real = jax.device_put(np.ones(self.batch.tokens.size, bool))

        @jax.jit
        def one(experts: Experts, x: jax.Array) -> jax.Array:
            return _after(x, mixture(experts, self.config.routing, x, real))

        def run(layers: list[Experts], x: jax.Array) -> jax.Array:
            return functools.reduce(lambda x, experts: one(experts, x), layers, x)

        return _without_pool(run, self.of_kind(Experts), self.flat)

    def experts(self) -> Program:
        """The experts' products, with as many rows per expert as the first layer's router says."""
        routing = self.config.routing

        @jax.jit
        def one(routed: FeedForward, x: jax.Array, sizes: jax.Array) -> jax.Array:
            hidden = swiglu(grouped_product(x, routed.gate_up, sizes))
            return _after(x, grouped_product(hidden, routed.down, sizes))

        def run(layers: list[Experts], x: jax.Array) -> jax.Array:
            chosen, _ = route(layers[0], routing, x)
            counts = jnp.zeros(routing.num_experts, jnp.int32).at[chosen.reshape(-1)].add(1)
            sizes = -(-counts // ALIGN) * ALIGN
            x = jnp.resize(x, (num_rows(chosen.size, routing.num_experts), x.shape[-1]))
            return functools.reduce(lambda x, experts: one(experts.routed, x, sizes), layers, x)

        return _without_pool(run, self.of_kind(Experts), self.flat)

    def dense(self) -> Program:
        @jax.jit
        def one(network: FeedForward, x: jax.Array) -> jax.Array:
            return _after(x, dense(network, x))

        def run(layers: list[FeedForward], x: jax.Array) -> jax.Array:
            return functools.reduce(lambda x, network: one(network, x), layers, x)

        return _without_pool(run, self.of_kind(FeedForward), self.flat)

    def of_kind(self, kind: type) -> list[Any]:
        """Returns the feed-forward parts that are dense or of experts."""
        found = [layer.feed_forward for layer in self.params.layers]
        return [part for part in found if isinstance(part, kind)]

    def head(self) -> Program:
        batch, width = self.batch, self.batch.tokens.shape[1]
        a_row = batch.temperatures, batch.top_ps, batch.seeds
        rows = *(np.repeat(a, width) for a in a_row), np.zeros(batch.tokens.size, np.int32)

        def run(params: ModelParams, x: jax.Array, sampling: Any) -> jax.Array:
            return next_tokens(logits_of(params, self.config, x), *sampling)

        return _without_pool(run, self.params, self.flat, jax.device_put(rows))


def _after(x: jax.Array, out: jax.Array) -> jax.Array:
    """Returns x for the next layer, which waits for this layer's whole result.

    All layers get the same values but one: results of results would vanish or overflow.
    """
    out = jax.lax.optimization_barrier(out)
    return x.at[(0,) * x.ndim].set(out[(0,) * out.ndim].astype(x.dtype))


def _without_pool(function: Any, *arguments: Any) -> Program:
    jitted = jax.jit(function, compiler_options=dict(timing.ONE_AFTER_THE_OTHER))
    return lambda pool: (jitted(*arguments), pool)
