"""The naive MLA layer: keys and values of every head and no cache, as models publish it."""

import jax
import jax.numpy as jnp

from mla_jax import checks
from mla_jax.arguments import check_input
from mla_jax.checkpoints.weights import MLAParams
from mla_jax.config import MLAConfig
from mla_jax.projections import add_bias, einsum, queries_and_latents, specs_of_hidden
from mla_jax.rope import check_positions
from mla_jax.sharding.axes import on_auto_axes


def naive_mla_layer(
    params: MLAParams, config: MLAConfig, x: jax.Array, positions: jax.Array | None = None
) -> jax.Array:
    """Computes the layer with keys and values expanded per head: contiguous, causal, no cache.

    Args:
        params: weights of the layer.
        config: shape of the layer; static under jit.
        x: [B, S, hidden].
        positions: [B, S] integers for RoPE; None is 0 .. S - 1. The causal mask ignores them: token
            i sees tokens 0 .. i.

    Returns:
        Hidden states [B, S, hidden] of x.dtype.

    Raises as `preprocess` does.
    """
    check_input(params, config, x)
    batch, length = x.shape[:2]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    check_positions(positions)
    checks.require_shape("positions", positions, "[B, S]", batch, length)
    return _expanded(params, x, positions, config=config)


@on_auto_axes(specs_of_hidden)
def _expanded(
    params: MLAParams, x: jax.Array, positions: jax.Array, *, config: MLAConfig
) -> jax.Array:
    """Computes `naive_mla_layer` for arguments that have been checked."""
    length = x.shape[1]
    q_nope, q_rope, kv = queries_and_latents(params, x, positions, config=config)
    q = jnp.concatenate([q_nope, q_rope], -1)  # [B, S, H, nope + rope]
    c_kv, k_rope = jnp.split(kv, [config.kv_lora_rank], -1)
    k_nope = einsum("btc,hnc->bthn", c_kv, params.w_uk)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    k = jnp.concatenate([k_nope, k_rope], -1)  # [B, T, H, nope + rope]
    v = einsum("btc,hcv->bthv", c_kv, params.w_uv)

    scores = einsum("bshd,bthd->bhst", q, k).astype(jnp.float32) * config.softmax_scale
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(x.dtype)
    values = einsum("bhst,bthv->bshv", weights, jnp.where(jnp.isfinite(v), v, 0))
    # A weight of 0 times NaN would be NaN: only rows that may see such a value get it.
    spoils = einsum("st,bthv->bshv", causal.astype(x.dtype), (~jnp.isfinite(v)).astype(x.dtype))
    values = jnp.where(spoils > 0, jnp.nan, values)
    out = add_bias(einsum("bshv,hvd->bsd", values, params.w_o), params.b_o)
    return out.astype(x.dtype)
