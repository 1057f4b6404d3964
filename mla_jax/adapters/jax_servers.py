"""The signature of MLA attention that JAX servers share (tpu-inference, SGLang-JAX, tokamax)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.attention import paged_mla_attention
from mla_jax.cache import PagedKVCache
from mla_jax.registry import check_names

LANES = 128  # the widths of c_kv and k_rope in the cache are multiples of it
_HIDDEN = -1e30  # a mask_value above it would give hidden keys a weight


def mla_ragged_paged_attention(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    new_kv_c: jax.Array,
    new_k_pe: jax.Array,
    cache_kv: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Appends packed new tokens to a paged cache and computes their causal attention over it.

    It has the arguments and the meaning of `mla_ragged_paged_attention` in tpu-inference, without
    the options that tune its TPU kernel. It is compiled, and the cache is donated. Lengths and
    pages that can't be give NaN rows, and their tokens are not written.

    Args:
        ql_nope: [T, H, kv_lora_rank] absorbed queries.
        q_pe: [T, H, rope], the part of the queries with positions.
        new_kv_c: [T, kv_lora_rank] latents of the new tokens, of the cache's dtype.
        new_k_pe: [T, rope] their rope keys, of the cache's dtype.
        cache_kv: [num_pages, page_size / packing, packing, width] of 16 or 32-bit floats. A row has
            the latent and the rope key, each with zeros behind it up to a multiple of 128.
        kv_lens: [B] int32, keys per request, its new tokens included.
        page_indices: [B * max_pages] int32, the block tables one after the other.
        cu_q_lens: [B + 1] int32, where the packed tokens of each request start.
        distribution: [3] int32; the last number, 0 .. B, says how many of the requests there are.
            The others have no meaning here: decode steps and chunks may be in any order.
        sm_scale: multiplies the scores; above 0 and known at trace time.
        sliding_window, soft_cap, q_scale, k_scale, v_scale: must be None.
        mask_value: None, or a score of at most -1e30. Hidden keys have no weight in any case.
        implementation: as in `paged_mla_attention`.

    Returns:
        o: [T, H, kv_lora_rank] of ql_nope's dtype; 0 for tokens of no request.
        cache_kv: with the new tokens.

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit; also a last number of
            distribution that is not in 0 .. B, unless it is traced.
    """
    unsupported: dict[str, Any] = {"sliding_window": sliding_window, "soft_cap": soft_cap}
    unsupported |= {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    arrays = {"ql_nope": ql_nope, "q_pe": q_pe, "new_kv_c": new_kv_c, "new_k_pe": new_k_pe}
    arrays |= {"cache_kv": cache_kv, "kv_lens": kv_lens, "page_indices": page_indices}
    arrays |= {"cu_q_lens": cu_q_lens, "distribution": distribution}
    for name, array in arrays.items():
        checks.require_array(name, array)
    for name, option in unsupported.items():
        if option is not None:
            raise ValueError(f"{name} must be None, got {option}")
    if mask_value is not None:
        mask_value = checks.require_number("mask_value", mask_value, finite=False)
        if not mask_value <= _HIDDEN:  # NaN is not
            raise ValueError(f"mask_value must be None or at most {_HIDDEN}, got {mask_value}")
    checks.require_shape("kv_lens", kv_lens, "[B]", None)
    batch = checks.require_positive("B of kv_lens", len(kv_lens))
    checks.require_shape("distribution", distribution, "[3]", 3)
    if checks.is_concrete(distribution):
        checks.require_int("distribution[2]", np.asarray(distribution)[2], 0, batch)
    sm_scale = checks.require_softmax_scale(sm_scale, name="sm_scale")
    return _append_and_attend(
        **arrays, sm_scale=sm_scale, implementation=check_names(implementation)
    )


@functools.partial(
    jax.jit, donate_argnames="cache_kv", static_argnames=("sm_scale", "implementation")
)
def _append_and_attend(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    new_kv_c: jax.Array,
    new_k_pe: jax.Array,
    cache_kv: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    sm_scale: float,
    implementation: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """Computes `mla_ragged_paged_attention`, whose docstring has the shapes, and checks the rest.

    Shapes and dtypes are checked here because jit makes float32 and int32 of 64-bit numpy arrays.
    """
    floats = {"ql_nope": ql_nope, "q_pe": q_pe, "cache_kv": cache_kv}
    for name, array in floats.items():
        checks.require_float(name, array)
    if q_pe.dtype != ql_nope.dtype:
        raise TypeError(f"q_pe must be {ql_nope.dtype} as ql_nope is, got {q_pe.dtype}")
    checks.require_shape("ql_nope", ql_nope, "[T, H, kv_lora_rank]", None, None, None)
    count, heads, rank = ql_nope.shape
    checks.require_shape("q_pe", q_pe, "[T, H, rope]", count, heads, None)
    rope = q_pe.shape[2]
    checks.require_shape("new_kv_c", new_kv_c, "[T, kv_lora_rank]", count, rank)
    checks.require_shape("new_k_pe", new_k_pe, "[T, rope]", count, rope)
    width = _aligned(rank) + _aligned(rope)
    words = "[num_pages, page_size / packing, packing, kv_lora_rank + rope, aligned]"
    checks.require_shape("cache_kv", cache_kv, words, None, None, None, width)
    for name, rows in {"new_kv_c": new_kv_c, "new_k_pe": new_k_pe}.items():
        if rows.dtype != cache_kv.dtype:
            raise TypeError(f"{name} must be {cache_kv.dtype} as cache_kv is, got {rows.dtype}")
    batch = len(kv_lens)
    checks.require_shape("cu_q_lens", cu_q_lens, "[B + 1]", batch + 1)
    checks.require_shape("page_indices", page_indices, "[B * max_pages]", None)
    integers = {"kv_lens": kv_lens, "page_indices": page_indices}
    integers |= {"cu_q_lens": cu_q_lens, "distribution": distribution}
    for name, value in integers.items():
        checks.require_int32(name, value)
    if len(page_indices) % batch:
        raise ValueError(
            f"page_indices must be [B * max_pages] for B = {batch}, got {len(page_indices)} values"
        )
    num_pages, page_size = cache_kv.shape[0], cache_kv.shape[1] * cache_kv.shape[2]
    pages = cache_kv.reshape(num_pages, page_size, width)
    cache = PagedKVCache(pages, _aligned(rank), _aligned(rope), page_size, "ND")
    there = jnp.arange(batch, dtype=jnp.int32) < distribution[2]
    seq_lens = jnp.where(there, kv_lens, 0)
    last = cu_q_lens[jnp.clip(distribution[2], 0, batch)]
    cu_q_lens = jnp.where(jnp.append(True, there), cu_q_lens, last)
    tables = page_indices.reshape(batch, -1)
    kv = _row(new_kv_c, new_k_pe)
    cache = cache.append(kv, tables, seq_lens - jnp.diff(cu_q_lens), cu_q_lens=cu_q_lens)
    o, _ = paged_mla_attention(
        _row(ql_nope, q_pe),
        cache,
        tables,
        seq_lens,
        softmax_scale=sm_scale,
        cu_q_lens=cu_q_lens,
        implementation=implementation,
    )
    return o[..., :rank], cache.pages.reshape(cache_kv.shape)


def _aligned(width: int) -> int:
    return -(-width // LANES) * LANES


def _row(latent: jax.Array, rope: jax.Array) -> jax.Array:
    """Returns [..., latent | rope], each with zeros up to a multiple of LANES."""

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, _aligned(x.shape[-1]) - x.shape[-1])])

    return jnp.concatenate([padded(latent), padded(rope)], axis=-1)
