"""The stored form of rows in an int8 cache, and the scales of a new one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks, quantize

ROPE_DTYPE = jnp.bfloat16  # dtype of k_rope in an int8 cache
_SMALLEST_SCALE = np.finfo(np.float32).tiny  # processors may treat smaller numbers as 0
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(quantize.LARGEST), 0)


def scale_shape(tokens: tuple[int, int], width: int, granularity: str) -> tuple[int, ...]:
    shapes = {"token": tokens, "group": (*tokens, width // quantize.GROUP), "tensor": ()}
    return shapes[granularity]


def new_scales(
    tokens: tuple[int, int],
    kv_lora_rank: int,
    granularity: str | None,
    scale: jax.Array | float | None,
) -> jax.Array:
    """Returns the scales of a new int8 cache; tokens is (num_pages, page_size)."""
    granularity = "token" if granularity is None else granularity
    checks.require_one_of("scale_granularity", granularity, quantize.GRANULARITIES)
    if granularity == "group" and kv_lora_rank % quantize.GROUP:
        raise ValueError(
            f"kv_lora_rank must be a multiple of {quantize.GROUP} with scale_granularity group, "
            f"got {kv_lora_rank}"
        )
    if (scale is not None) != (granularity == "tensor"):
        wanted = "given" if scale is None else "None"
        raise ValueError(f"scale must be {wanted} with scale_granularity {granularity}")
    if scale is None:
        return jnp.zeros(scale_shape(tokens, kv_lora_rank, granularity), jnp.float32)
    return _checked_scale(scale)


def _checked_scale(scale: Any) -> jax.Array:
    """Returns a scale as stored, [] float32; a traced scale that is out of range becomes NaN."""
    checks.require_shape("scale", scale, "a number")
    dtype = np.asarray(scale).dtype if checks.is_concrete(scale) else scale.dtype
    if not (jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer)):
        raise TypeError(
            f"scale must be a real number, got {scale!r} of type {type(scale).__name__}"
        )
    if not checks.is_concrete(scale):
        scale = scale.astype(jnp.float32)
        fits = (scale >= _SMALLEST_SCALE) & (scale <= _LARGEST_SCALE)
        return jnp.where(fits, scale, jnp.float32(jnp.nan))
    with np.errstate(over="ignore"):
        stored = np.float32(float(scale))
    if not _SMALLEST_SCALE <= stored <= _LARGEST_SCALE:
        raise ValueError(
            f"scale must be positive and finite, in {_SMALLEST_SCALE} .. {_LARGEST_SCALE} as "
            f"float32, got {scale}"
        )
    return jnp.array(stored)  # a copy, because appending donates the scale


def _or_nan(keeps: jax.Array, values: jax.Array) -> jax.Array:
    """Returns values [N, T, ...] with NaN where keeps [N, T] is False."""
    keeps = keeps.reshape(*keeps.shape, *[1] * (values.ndim - keeps.ndim))
    return jnp.where(keeps, values, jnp.asarray(jnp.nan, values.dtype))


def encode(
    kv: jax.Array, scales: jax.Array, granularity: str, kv_lora_rank: int
) -> dict[str, jax.Array]:
    """Returns rows kv [..., D] as the cache's arrays store them, without a scale of "tensor".

    Of `scales`, those of the cache, only the single scale of "tensor" is read.
    """
    latent, rope = jnp.split(kv, [kv_lora_rank], axis=-1)
    rope = rope.astype(ROPE_DTYPE)
    # int8 has no NaN. NaN is therefore stored in what belongs to this token alone: its scales,
    # or else its rope part. The maximum in `scales_of` does not suffice, because XLA's maximum
    # on a CPU may ignore NaN.
    finite = jnp.isfinite(latent).all(axis=-1)
    if granularity == "tensor":
        rope = _or_nan(finite, rope)
        return {"rope_pages": rope, "pages": quantize.quantize(latent, scales)}
    scales = quantize.scales_of(latent, granularity)
    stored = {"rope_pages": rope, "pages": quantize.quantize(latent, scales)}
    return stored | {"scales": _or_nan(finite, scales)}


def decode(stored: dict[str, jax.Array], granularity: str) -> jax.Array:
    """Returns rows [..., D] in float32 from what the cache's arrays store of them."""
    latent = quantize.dequantize(stored["pages"], stored["scales"])
    rope = stored["rope_pages"].astype(latent.dtype)
    if granularity == "tensor":
        latent = _or_nan(~jnp.isnan(rope).all(axis=-1), latent)  # marked by `encode`
    return jnp.concatenate([latent, rope], axis=-1)
