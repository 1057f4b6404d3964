"""A language model of the DeepSeek-V2 and V3 family, in plain JAX.

The page reads from top to bottom: the shape of a model, its weights, a layer, the whole model, and
the choice of the next token. Attention is `mla_jax.mla_layer`; everything else is written out here.

    x = embedding[tokens]
    for each layer:
        x = x + attention(norm(x))          multi-head latent attention over a paged cache
        x = x + feed_forward(norm(x))       dense in the first layers, a mixture of experts after
    logits = head(norm(x))

Each layer has arrays of its own, and `forward` is a loop over the layers. `jax.lax.scan` over
stacked weights would copy the weights of each layer out of their stack in every step. A layer is
one function under `jax.jit`, so that each kind of layer is traced once, however many the model has.
One cache holds the pages of all layers.

DeepSeek-V2 is arXiv 2405.04434, DeepSeek-V3 arXiv 2412.19437. Where the papers leave a choice, this
is the code of Hugging Face `transformers`; comments say where DeepSeek's own code differs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.generate.grouped import ALIGN, grouped_product, num_rows, sums_before
from mla_jax import DecodePlan, MLAConfig, MLAParams, PagedKVCache, mla_layer
from mla_jax.projections import einsum

# ------------------------------------------------------------------------------ shape and weights


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a token chooses its experts, and the weight of each.

    With `scoring` "softmax" (V2) an expert's score is its share of a softmax; with "sigmoid" (V3)
    it is a sigmoid, and a bias is added for the choice, not for the weight. Experts are in
    `num_groups` groups of neighbours; a token takes experts from its best `groups_per_token` groups
    only. V2 ranks a group by its best expert, V3 by the sum of its two best.
    """

    scoring: str  # "softmax" or "sigmoid"
    num_experts: int
    experts_per_token: int
    num_groups: int  # 1: no groups
    groups_per_token: int
    normalize: bool  # divide a token's weights by their sum
    scale: float  # factor of all weights, after normalization


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model; hashable, so that jit takes it as static."""

    attention: MLAConfig
    vocab_size: int
    num_layers: int
    num_dense_layers: int  # the first layers, whose feed-forward part is dense
    dense_width: int  # inner width of a dense feed-forward part
    expert_width: int  # inner width of one expert
    shared_width: int  # inner width of the shared experts together; 0: none
    routing: Routing
    norm_eps: float
    tied_head: bool = False  # the head is the embedding

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeedForward:
    """Weights of a SwiGLU network: down(silu(gate(x)) * up(x)). Gate and up are one matrix."""

    gate_up: jax.Array  # [hidden, 2 * width]; of experts [E, hidden, 2 * width]
    down: jax.Array  # [width, hidden]; of experts [E, width, hidden]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """Weights of a mixture of experts."""

    router: jax.Array  # [hidden, E]
    bias: jax.Array | None  # [E] float32, added to the scores for the choice; None in V2
    routed: FeedForward
    shared: FeedForward | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """Weights of a layer: dense, or with a mixture of experts."""

    attention: MLAParams
    attention_norm: jax.Array  # [hidden]
    feed_forward: FeedForward | Experts
    feed_forward_norm: jax.Array  # [hidden]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelParams:
    """Weights of a model."""

    embedding: jax.Array  # [vocab, hidden]
    layers: tuple[Layer, ...]  # the dense ones first
    norm: jax.Array  # [hidden]
    head: jax.Array | None  # [vocab, hidden]; None: the embedding


# ------------------------------------------------------------------------------------- one layer


@jax.named_scope("norm")
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Returns x / rms(x) * weight, with statistics in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight


def swiglu(gate_up: jax.Array) -> jax.Array:
    """Returns silu(gate) * up, of [gate | up] along the last axis."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


@jax.named_scope("dense_feed_forward")
def dense(params: FeedForward, x: jax.Array) -> jax.Array:
    """Computes a SwiGLU network on tokens [T, hidden]."""
    return einsum("tf,fd->td", swiglu(einsum("td,df->tf", x, params.gate_up)), params.down)


@jax.named_scope("moe_router")
def route(params: Experts, routing: Routing, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the experts of each token and their weights: [T, K] int32 and float32.

    The router is computed in float32, as in all published code: a choice between two experts is not
    continuous, so that rounding would change it.
    """
    r = routing
    scores = einsum("td,de->te", x.astype(jnp.float32), params.router.astype(jnp.float32))
    scores = jax.nn.softmax(scores) if r.scoring == "softmax" else jax.nn.sigmoid(scores)
    choice = scores if params.bias is None else scores + params.bias
    if r.num_groups > 1:
        grouped = choice.reshape(len(x), r.num_groups, -1)
        best = jax.lax.top_k(grouped, 1 if r.scoring == "softmax" else 2)[0].sum(-1)
        _, groups = jax.lax.top_k(best, r.groups_per_token)  # [T, groups_per_token]
        allowed = (groups[..., None] == jnp.arange(r.num_groups)).any(-2)
        # transformers writes 0 here in V2, as DeepSeek's code does: no softmax is below it. With
        # V3's bias a score may be negative and a 0 would win, so that both write -inf there.
        choice = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(choice.shape)
    _, experts = jax.lax.top_k(choice, r.experts_per_token)
    weights = jnp.take_along_axis(scores, experts, axis=-1)  # without the bias
    if r.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return experts, weights * r.scale


@jax.named_scope("moe")
def mixture(
    params: Experts,
    routing: Routing,
    x: jax.Array,
    is_real: jax.Array,
    axis: str | None = None,
) -> jax.Array:
    """Computes a mixture of experts on tokens [T, hidden], of which `is_real` [T] are no padding.

    The rows of all (token, expert) pairs are sorted by expert, so that each expert has one product
    with its own rows. Padding is in no product.

    axis: of a `jax.shard_map` whose devices each have some experts and a part of the shared ones.
    The result is then the part of this device, which the caller sums over the axis.
    """
    experts, weights = route(params, routing, x)
    num_experts = len(params.routed.gate_up)  # on this device
    with jax.named_scope("moe_gather"):
        if axis is not None:
            experts = experts - jax.lax.axis_index(axis) * num_experts
        is_mine = is_real[:, None] & (experts >= 0) & (experts < num_experts)
        pairs = jnp.where(is_mine, experts, num_experts).reshape(-1)  # [T * K]
        counts = (pairs == jnp.arange(num_experts)[:, None]).sum(1, dtype=jnp.int32)
        sizes = -(-counts // ALIGN) * ALIGN
        # The row of a pair: where its expert's rows begin, and how many earlier pairs have that
        # expert. Comparing all pairs is one kernel on a GPU; sorting them would be several.
        index = jnp.arange(len(pairs))
        is_before = (pairs == pairs[:, None]) & (index < index[:, None])
        first = jnp.append(sums_before(sizes), 0)[pairs]
        num = num_rows(len(pairs), num_experts)
        row = jnp.where(pairs < num_experts, first + is_before.sum(1, dtype=jnp.int32), num)
        # A row without a pair has the index of no token, which reads 0.
        token_of_row = jnp.full(num, len(x), jnp.int32)
        token_of_row = token_of_row.at[row].set(index // routing.experts_per_token, mode="drop")
        rows = x.at[token_of_row].get(mode="fill", fill_value=0)
    with jax.named_scope("moe_experts"):
        hidden = swiglu(grouped_product(rows, params.routed.gate_up, sizes))
        out = grouped_product(hidden, params.routed.down, sizes)
    with jax.named_scope("moe_scatter"):
        of_token = out.at[row].get(mode="fill", fill_value=0).reshape(*weights.shape, -1)
        mixed = (of_token.astype(jnp.float32) * weights[..., None]).sum(1).astype(x.dtype)
    return mixed if params.shared is None else mixed + dense(params.shared, x)


@functools.partial(jax.jit, static_argnames=("config", "implementation", "axis"))
def run_layer(
    layer: Layer,
    config: ModelConfig,
    index: jax.Array,
    x: jax.Array,
    pool: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array,
    plan: DecodePlan | None,
    *,
    implementation: Any,
    axis: str | None,
) -> tuple[jax.Array, PagedKVCache]:
    """Computes layer number `index` on x [B, S, hidden]; the other arguments are of `forward`.

    The number is an array, so that layers of one kind share a trace. XLA inlines the function.
    """
    out, pool = mla_layer(
        layer.attention,
        config.attention,
        rms_norm(x, layer.attention_norm, config.norm_eps),
        pool.layer(index),
        block_tables,
        seq_lens,
        query_lens=query_lens,
        plan=plan,
        implementation=implementation,
        head_axis=axis,
    )
    x = x + out
    flat = rms_norm(x, layer.feed_forward_norm, config.norm_eps).reshape(-1, x.shape[-1])
    if isinstance(layer.feed_forward, Experts):
        is_real = (jnp.arange(x.shape[1]) < query_lens[:, None]).reshape(-1)
        out = mixture(layer.feed_forward, config.routing, flat, is_real, axis)
    else:
        out = dense(layer.feed_forward, flat)
    if axis is not None:
        out = jax.lax.psum(out, axis)
    return x + out.reshape(x.shape), pool


# --------------------------------------------------------------------------------- the whole model


def forward(
    params: ModelParams,
    config: ModelConfig,
    tokens: jax.Array,
    pool: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array,
    *,
    plan: DecodePlan | None = None,
    implementation: Any = None,
    axis: str | None = None,
) -> tuple[jax.Array, PagedKVCache]:
    """Runs all layers on the new tokens of a batch of requests.

    Args:
        params, config: the model.
        tokens: [B, S] int32, left aligned.
        pool: the cache of all layers, which holds the earlier tokens. Donate it.
        block_tables: [B, max_pages] int32, with pages for the new tokens.
        seq_lens: [B] int32, tokens of each request including the new ones.
        query_lens: [B] int32, how many of the S tokens are real.
        plan: of a decode step, from `mla_jax.plan_decode`: all layers share it.
        implementation: of the attention, as in `mla_layer`.
        axis: of a `jax.shard_map` whose devices each have a share of the weights (`sharded.py`).

    Returns:
        hidden: [B, S, hidden], after the last layer and before the last norm.
        pool: with the new tokens.
    """
    x = params.embedding[tokens]
    for index, layer in enumerate(params.layers):
        x, pool = run_layer(
            layer, config, np.int32(index), x, pool, block_tables, seq_lens, query_lens, plan,
            implementation=implementation, axis=axis,
        )  # fmt: skip
    return x, pool


@jax.named_scope("head")
def logits_of(params: ModelParams, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Returns logits [..., vocab] float32 of hidden states [..., hidden] of `forward`."""
    head = params.embedding if params.head is None else params.head
    x = rms_norm(hidden, params.norm, config.norm_eps).reshape(-1, hidden.shape[-1])
    precision = "highest" if x.dtype == jnp.float32 else None
    logits = jnp.einsum(
        "td,vd->tv", x, head, precision=precision, preferred_element_type=jnp.float32
    )
    return logits.reshape(*hidden.shape[:-1], -1)


# ---------------------------------------------------------------------------------- the next token


@jax.named_scope("sampling")
def next_tokens(
    logits: jax.Array,
    temperatures: jax.Array,
    top_ps: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """Chooses a token for each row of logits [N, vocab]; returns [N] int32.

    A temperature of 0 takes the most likely token. Otherwise a token is drawn from the smallest set
    of most likely tokens whose probability reaches `top_ps`. The random bits depend on the seed of
    the request and on the token's position in it, and on nothing else, so that a result is the same
    in every batch, and also if the token was guessed before.
    """

    def sampled() -> jax.Array:
        scaled, least, noise = draws(logits, temperatures, top_ps, seeds, positions)
        drawn = jnp.where(scaled >= least, scaled + noise, -jnp.inf)
        return jnp.where(temperatures > 0, drawn.argmax(-1), greedy)

    greedy = logits.argmax(-1)
    return jax.lax.cond(jnp.any(temperatures > 0), sampled, lambda: greedy).astype(jnp.int32)


def draws(
    logits: jax.Array,
    temperatures: jax.Array,
    top_ps: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what a draw of `next_tokens` compares.

    Returns:
        scaled: [N, vocab], logits divided by the temperature, where that is not 0.
        least: [N, 1], the least of them that may be drawn.
        noise: [N, vocab], from the Gumbel distribution. The largest scaled + noise is drawn.
    """
    scaled = logits / jnp.where(temperatures > 0, temperatures, 1.0)[:, None]
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares  # probability of all likelier tokens
    least = jnp.where(before < top_ps[:, None], ordered, jnp.inf).min(axis=-1, keepdims=True)
    keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(seeds, positions)
    noise = jax.vmap(functools.partial(jax.random.gumbel, shape=logits.shape[-1:]))(keys)
    return scaled, least, noise
