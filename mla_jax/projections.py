"""The layer's products with its weights: queries and latents of hidden states."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mla_jax.checkpoints.weights import MLAParams
from mla_jax.config import MLAConfig
from mla_jax.rope import apply_rope
from mla_jax.sharding.axes import dims_of, on_auto_axes, spec_of_dims


def queries_of(
    params: MLAParams, config: MLAConfig, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (q_nope [B, S, H, nope], q_rope [B, S, H, rope]) of hidden states [B, S, hidden]."""
    if params.w_dq is not None and params.norm_q is not None:
        x = add_bias(einsum("bsd,dr->bsr", x, params.w_dq), params.b_dq)
        x = _rms_norm(x, params.norm_q, config.rms_norm_eps)
    q = einsum("bsr,rhd->bshd", x, params.w_uq)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], -1)
    return q_nope, apply_rope(q_rope, positions, config)


def absorbed_queries(w_uk: jax.Array, q_nope: jax.Array, q_rope: jax.Array) -> jax.Array:
    """Returns [q_nope . W_UK | q_rope], [B, S, H, kv_lora + rope]."""
    return jnp.concatenate([einsum("bshn,hnc->bshc", q_nope, w_uk), q_rope], -1)


def latents_of(
    params: MLAParams, config: MLAConfig, x: jax.Array, positions: jax.Array
) -> jax.Array:
    """Returns [c_kv | k_rope], [B, S, kv_lora + rope], of hidden states [B, S, hidden]."""
    kv = add_bias(einsum("bsd,dc->bsc", x, params.w_dkv), params.b_dkv)
    c_kv, k_rope = jnp.split(kv, [config.kv_lora_rank], -1)
    c_kv = _rms_norm(c_kv, params.norm_kv, config.rms_norm_eps)
    return jnp.concatenate([c_kv, apply_rope(k_rope, positions, config)], -1)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Returns x / rms(x) * weight over the last axis, statistics in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes an einsum in full float32 precision, where accelerators would use tf32 or bf16.

    The product of one token is computed as one of two equal ones: XLA's GPU compiler makes sums of
    a product of a vector, and these read the weights at 0.9 of the speed of a matrix product
    (benchmarks/history.md). The second token takes no time there, where the product waits for
    memory. A product under `jax.vmap` or on a CPU computes it too.

    Batch axes are moved to the front of the product and the result is transposed. With batch axes
    between others, XLA's CPU dot accumulates bfloat16 products in bfloat16. That is 8 times the
    error, measured with jaxlib 0.11.2.
    """
    left, right, out = spec.replace("->", ",").split(",")
    one_token = left[:2] == out[:2] == "bs" and a.shape[:2] == (1, 1)
    if one_token:
        a = jnp.broadcast_to(a, (2, *a.shape[1:]))
    leading = sorted(out, key=lambda axis: not (axis in left and axis in right))
    precision = jax.lax.Precision.HIGHEST
    result = jnp.einsum(f"{left},{right}->{''.join(leading)}", a, b, precision=precision)
    result = result.transpose([leading.index(axis) for axis in out])
    return result[:1] if one_token else result


def add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias


def _specs_of_queries(params: MLAParams, x: jax.Array, _: jax.Array) -> tuple[PartitionSpec, ...]:
    tokens, heads = dims_of(x)[:2], dims_of(params.w_uq)[1]
    queries = spec_of_dims(*tokens, heads, None)
    return queries, queries, spec_of_dims(*tokens, None)


@on_auto_axes(_specs_of_queries)
@jax.named_scope("mla_projections")
def queries_and_latents(
    params: MLAParams, x: jax.Array, positions: jax.Array, *, config: MLAConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns q_nope, q_rope and [c_kv | k_rope] of checked arguments of `preprocess`."""
    q_nope, q_rope = queries_of(params, config, x, positions)
    return q_nope, q_rope, latents_of(params, config, x, positions)


def _specs_of_absorbed(_: MLAParams, q_nope: jax.Array, *__: jax.Array) -> PartitionSpec:
    return spec_of_dims(*dims_of(q_nope)[:3], None)


@on_auto_axes(_specs_of_absorbed)
@jax.named_scope("mla_absorb")
def absorbed(params: MLAParams, q_nope: jax.Array, q_rope: jax.Array) -> jax.Array:
    """Returns absorbed queries, sharded over explicit mesh axes as q_nope is."""
    return absorbed_queries(params.w_uk, q_nope, q_rope)


def specs_of_hidden(params: MLAParams, tokens: jax.Array, *_: jax.Array) -> PartitionSpec:
    """Returns how outputs [B, S, hidden] are sharded, over explicit mesh axes."""
    return spec_of_dims(*dims_of(tokens)[:2], dims_of(params.w_o)[2])
