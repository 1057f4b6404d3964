"""The attention layer: MLAPO -> MLAPA -> Einsum over the paged latent cache, and its naive twin.

The three operators, in the names of the field (Ascend):
- MLAPO, `preprocess`: norms, down- and up-projections, RoPE, and W_UK absorbed into the query, so
  that each head's query meets the latent itself (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
- MLAPA, `attend`: the new latents go to the cache, then paged attention over it.
- Einsum, `project_output`: W_UV, then W_O.
`naive_mla_layer` expands keys and values for every head instead, as the models' published code
does; it computes the same function.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax import checks
from mla_jax.attention import paged_mla_attention
from mla_jax.cache import PagedKVCache
from mla_jax.config import MLAConfig
from mla_jax.rope import apply_rope
from mla_jax.weights import MLAParams, check_params


def mla_layer(
    params: MLAParams,
    config: MLAConfig,
    x: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    *,
    query_lens: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, PagedKVCache]:
    """One step of the layer for a ragged batch: prefill, a chunk of it, decode or MTP.

    Args:
        params, config: the layer; under jit `config` is static.
        x: [B, S, hidden] hidden states of the new tokens, left aligned.
        cache: holds the earlier tokens' latents; use the returned one from here on.
        block_tables: [B, max_pages] int32, with room for the new tokens.
        seq_lens: [B] int32, tokens of each request including the new ones.
        query_lens: [B] int32, how many of the S tokens are real; None: all.
        **options: of `paged_mla_attention`, e.g. implementation, plan, rescale.

    Returns:
        out: [B, S, hidden], x.dtype; past query_lens it is the output bias or 0.
        cache: with the new tokens appended.

    Raises:
        ValueError, TypeError: shapes, dtypes or lengths that don't fit; names the argument.
    """
    checks.require_shape("x", x, "[B, S, hidden_size]", None, None, config.hidden_size)
    batch, count = x.shape[:2]
    if query_lens is None:
        query_lens = jnp.full(batch, count, jnp.int32)
    for name, lengths in (("seq_lens", seq_lens), ("query_lens", query_lens)):
        checks.require_shape(name, lengths, "[B]", batch)
        checks.require_int32(name, lengths)
    positions = (seq_lens - query_lens)[:, None] + jnp.arange(count, dtype=jnp.int32)
    q, kv = preprocess(params, config, x, positions)
    o_latent, cache = attend(
        config, q, kv, cache, block_tables, seq_lens, query_lens=query_lens, **options
    )
    return project_output(params, o_latent).astype(x.dtype), cache


def preprocess(
    params: MLAParams, config: MLAConfig, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """MLAPO: hidden states to absorbed queries and to the rows that the cache holds.

    Args:
        x: [B, S, hidden].
        positions: [B, S] integers, each token's place in its request, from 0.

    Returns:
        q: [B, S, H, kv_lora + rope] = [q_nope . W_UK | q_rope], not yet scaled.
        kv: [B, S, kv_lora + rope] = [c_kv | k_rope].

    Raises:
        ValueError: params, x or positions of the wrong shape.
    """
    _check_input(params, config, x, positions)
    q_nope, q_rope = _queries(params, config, x, positions)
    q_latent = _einsum("bshn,hnc->bshc", q_nope, params.w_uk)
    return jnp.concatenate([q_latent, q_rope], -1), _latents(params, config, x, positions)


def attend(
    config: MLAConfig,
    q: jax.Array,
    kv: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    *,
    query_lens: jax.Array,
    **options: Any,
) -> tuple[jax.Array, PagedKVCache]:
    """MLAPA: appends kv [B, S, D] to the cache and attends with q [B, S, H, D] over all of it.

    Arguments as in `mla_layer`. Returns (o_latent [B, S, H, kv_lora], the new cache).
    """
    widths = {"kv_lora_rank": config.kv_lora_rank, "rope_dim": config.qk_rope_head_dim}
    for name, wanted in widths.items():
        if getattr(cache, name) != wanted:
            raise ValueError(f"cache.{name} must be {wanted}, got {getattr(cache, name)}")
    attention = functools.partial(
        paged_mla_attention,
        block_tables=block_tables,
        seq_lens=seq_lens,
        softmax_scale=config.softmax_scale,
        query_lens=query_lens,
        return_lse=True,
        **options,
    )
    jax.eval_shape(attention, q, cache)  # what it refuses it refuses before anything is written
    cache = cache.append(
        kv.astype(cache.row_dtype), block_tables, seq_lens - query_lens, query_lens
    )
    o_latent, _ = attention(q, cache)
    return o_latent, cache


def project_output(params: MLAParams, o_latent: jax.Array) -> jax.Array:
    """Einsum: o_latent [B, S, H, kv_lora] through W_UV of its head, then W_O: [B, S, hidden].

    Raises ValueError where the heads or the rank are not those of `params`.
    """
    heads, rank = params.w_uv.shape[:2]
    checks.require_shape("o_latent", o_latent, "[B, S, H, kv_lora_rank]", None, None, heads, rank)
    values = _einsum("bshc,hcv->bshv", o_latent, params.w_uv)
    return _add_bias(_einsum("bshv,hvd->bsd", values, params.w_o), params.b_o)


def naive_mla_layer(
    params: MLAParams, config: MLAConfig, x: jax.Array, positions: jax.Array | None = None
) -> jax.Array:
    """The same layer with K and V expanded for every head; contiguous, causal, no cache.

    Args:
        x: [B, S, hidden].
        positions: [B, S] integers; None: 0 .. S-1. They only turn the rope channels: token i sees
            tokens 0 .. i.

    Returns:
        [B, S, hidden], x.dtype.
    """
    checks.require_shape("x", x, "[B, S, hidden_size]", None, None, config.hidden_size)
    batch, length = x.shape[:2]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    _check_input(params, config, x, positions)
    q = jnp.concatenate(_queries(params, config, x, positions), -1)  # [B, S, H, nope + rope]
    c_kv, k_rope = jnp.split(_latents(params, config, x, positions), [config.kv_lora_rank], -1)
    k_nope = _einsum("btc,hnc->bthn", c_kv, params.w_uk)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    k = jnp.concatenate([k_nope, k_rope], -1)  # [B, T, H, nope + rope]
    v = _einsum("btc,hcv->bthv", c_kv, params.w_uv)

    scores = _einsum("bshd,bthd->bhst", q, k).astype(jnp.float32) * config.softmax_scale
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(x.dtype)
    values = _einsum("bhst,bthv->bshv", weights, v)
    out = _add_bias(_einsum("bshv,hvd->bsd", values, params.w_o), params.b_o)
    return out.astype(x.dtype)


def _queries(
    params: MLAParams, config: MLAConfig, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(q_nope [B, S, H, nope], q_rope [B, S, H, rope]) of hidden states x [B, S, hidden]."""
    if params.w_dq is not None and params.norm_q is not None:
        x = _add_bias(_einsum("bsd,dr->bsr", x, params.w_dq), params.b_dq)
        x = _rms_norm(x, params.norm_q, config.rms_norm_eps)
    q = _einsum("bsr,rhd->bshd", x, params.w_uq)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], -1)
    return q_nope, apply_rope(q_rope, positions, config)


def _latents(params: MLAParams, config: MLAConfig, x: jax.Array, positions: jax.Array) -> jax.Array:
    """[c_kv | k_rope] of hidden states x [B, S, hidden]: [B, S, kv_lora + rope]."""
    kv = _add_bias(_einsum("bsd,dc->bsc", x, params.w_dkv), params.b_dkv)
    c_kv, k_rope = jnp.split(kv, [config.kv_lora_rank], -1)
    c_kv = _rms_norm(c_kv, params.norm_kv, config.rms_norm_eps)
    return jnp.concatenate([c_kv, apply_rope(k_rope, positions, config)], -1)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last axis; the statistics in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum that leaves float32 alone (by default an accelerator may round it to tf32 or bf16).

    It lets batch axes lead and transposes after: where they stand between others, XLA's CPU dot
    sums bfloat16 in bfloat16 (8 times the error, measured with jaxlib 0.11.2).
    """
    left, right, out = spec.replace("->", ",").split(",")
    leading = sorted(out, key=lambda axis: not (axis in left and axis in right))
    precision = jax.lax.Precision.HIGHEST
    result = jnp.einsum(f"{left},{right}->{''.join(leading)}", a, b, precision=precision)
    return result.transpose([leading.index(axis) for axis in out])


def _add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias


def _check_input(params: MLAParams, config: MLAConfig, x: jax.Array, positions: jax.Array) -> None:
    check_params(params, config)
    checks.require_shape("x", x, "[B, S, hidden_size]", None, None, config.hidden_size)
    checks.require_float("x", x)
    checks.require_shape("positions", positions, "[B, S]", *x.shape[:2])
