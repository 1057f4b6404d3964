"""Parts of a decode step as programs of their own, with the shapes that they have in the step.

Each program runs its part for all layers that have it. Parts overlap: the attention op is in the
attention layers, and the routed experts are in the mixtures.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.generate.engine import Batch, Sizes, decode_plan
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
        stacks = [
            (layers.attention, count)
            for layers, count in (
                (self.params.dense, self.config.num_dense_layers),
                (self.params.moe, self.config.num_moe_layers),
            )
            if layers is not None
        ]
        batch = self.batch

        def run(stacks: Any, pool: PagedKVCache, x: jax.Array) -> Any:
            plan = self.plan(pool)

            def layer(carry: Any, stacked: Any) -> Any:
                x, pool = carry
                out, pool = mla_layer(
                    stacked[0], self.config.attention, x, pool.layer(stacked[1]),
                    batch.block_tables, batch.seq_lens, query_lens=batch.query_lens, plan=plan,
                )  # fmt: skip
                return (_after(x, out), pool), None

            first, carry = 0, (x, pool)
            for weights, count in zip(stacks, counts, strict=True):
                carry, _ = jax.lax.scan(layer, carry, (weights, jnp.arange(first, first + count)))
                first += count
            return carry

        weights, counts = zip(*stacks, strict=True)
        jitted = jax.jit(run, donate_argnums=1)
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

    def mixtures(self, moe: Layers) -> Program:
        routed, rest = split_routed(moe)
        real = jax.device_put(np.ones(self.batch.tokens.size, bool))

        def run(routed: Any, rest: Any, x: jax.Array) -> jax.Array:
            def layer(x: jax.Array, stacked: Any) -> Any:
                one = dataclasses.replace(stacked[0], routed=routed)
                return _after(x, mixture(one, self.config.routing, x, real, stacked[1])), None

            return jax.lax.scan(layer, x, (rest, jnp.arange(self.config.num_moe_layers)))[0]

        return _without_pool(run, routed, rest.feed_forward, self.flat)

    def experts(self, moe: Layers) -> Program:
        """The experts' products, with as many rows per expert as the first layer's router says."""
        routed, rest = split_routed(moe)
        routing = self.config.routing

        def run(routed: Any, rest: Any, x: jax.Array) -> jax.Array:
            chosen, _ = route(jax.tree.map(lambda a: a[0], rest), routing, x)
            counts = jnp.zeros(routing.num_experts, jnp.int32).at[chosen.reshape(-1)].add(1)
            sizes = -(-counts // ALIGN) * ALIGN
            x = jnp.resize(x, (num_rows(chosen.size, routing.num_experts), x.shape[-1]))

            def layer(x: jax.Array, index: jax.Array) -> Any:
                hidden = swiglu(grouped_product(x, routed.gate_up, index, sizes))
                return _after(x, grouped_product(hidden, routed.down, index, sizes)), None

            return jax.lax.scan(layer, x, jnp.arange(self.config.num_moe_layers))[0]

        return _without_pool(run, routed, rest.feed_forward, self.flat)

    def dense(self, layers: Layers) -> Program:
        def run(stack: Any, x: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda x, one: (_after(x, dense(one, x)), None), x, stack)[0]

        return _without_pool(run, layers.feed_forward, self.flat)

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
    jitted = jax.jit(function)
    return lambda pool: (jitted(*arguments), pool)
