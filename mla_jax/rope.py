"""Rotary position embedding (RoPE, arXiv 2104.09864), plain and with YaRN (arXiv 2309.00071).

A pair of channels turns by the angle position * frequency. Which channels make a pair is
`config.rope_interleave`: (0, 1), (2, 3), ... or (i, i + width / 2). Both leave a pair where it
was; `transformers` moves interleaved pairs to the half layout, in q and k alike, which no score
can tell.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.config import MLAConfig, YarnScaling


def rope_frequencies(config: MLAConfig) -> np.ndarray:
    """Radians a token by which each pair turns: [qk_rope_head_dim / 2] float32.

    Rounded to float32 at the steps at which `transformers` rounds: at position 10,000 a relative
    difference of 6e-8 in a frequency is one of 6e-4 in the angle.
    """
    width = config.qk_rope_head_dim
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    wavelengths = np.power(config.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / wavelengths
    if config.rope_scaling is None:
        return frequencies
    slowed = np.float32(1) / (np.float32(config.rope_scaling.factor) * wavelengths)
    kept = np.float32(1) - _yarn_ramp(config.rope_scaling, width, config.rope_theta)
    return slowed * (np.float32(1) - kept) + frequencies * kept


def _yarn_ramp(scaling: YarnScaling, width: int, theta: float) -> np.ndarray:
    """Share of the slowed frequency in each pair: 0 for fast pairs, 1 for slow: [width / 2]."""

    def pair_turning(times: float) -> float:
        """The (fractional) pair that turns so many times in the original length."""
        length = scaling.original_max_position_embeddings
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    pairs = np.arange(width // 2, dtype=np.float32)
    return np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)


def check_positions(positions: Any) -> None:
    """Raises TypeError unless positions are an array of integers, ValueError for a negative one.

    Traced ones are not looked at: there a negative position turns the channels backwards.
    """
    checks.require_array("positions", positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be an array of integers, got {positions.dtype}")
    if checks.is_concrete(positions) and positions.size and np.min(positions) < 0:
        raise ValueError(f"positions must be at least 0, got {np.min(positions)}")


def apply_rope(x: jax.Array, positions: jax.Array, config: MLAConfig) -> jax.Array:
    """Turns the channels of each token by its position, times YaRN's rotation scale.

    Args:
        x: [*tokens, *heads, qk_rope_head_dim], e.g. [B, S, H, 64] queries or [B, S, 64] keys.
        positions: [*tokens], the leading axes of `x`; integers from 0.
        config: gives frequencies, pairing and scale.

    Returns:
        Same shape and dtype as `x`; computed in float32.

    Raises:
        TypeError: `x` is not an array of floats, `positions` not one of integers, or `config` no
            MLAConfig.
        ValueError: `x` is not qk_rope_head_dim wide, `positions` aren't its leading axes, or a
            position is negative and not traced.
    """
    if not isinstance(config, MLAConfig):
        raise TypeError(f"config must be an MLAConfig, got {type(config).__name__}")
    checks.require_array("x", x)
    checks.require_float("x", x)
    check_positions(positions)
    if x.ndim == 0 or x.shape[-1] != config.qk_rope_head_dim:
        raise ValueError(f"x must end in qk_rope_head_dim = {config.qk_rope_head_dim}: {x.shape}")
    if positions.shape != x.shape[: positions.ndim] or positions.ndim >= x.ndim:
        raise ValueError(f"positions {positions.shape} must be the leading axes of x {x.shape}")

    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(config)
    angles = angles.reshape(*positions.shape, *[1] * (x.ndim - positions.ndim - 1), -1)
    scale = config.rope_scaling.rotation_scale if config.rope_scaling else 1.0
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale

    pairs = (-1, 2) if config.rope_interleave else (2, -1)
    axis = -1 if config.rope_interleave else -2
    first, second = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], *pairs), axis, 0)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=axis)
    return turned.reshape(x.shape).astype(x.dtype)
