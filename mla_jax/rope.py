"""Rotary position embedding (RoPE, arXiv 2104.09864), plain and with YaRN (arXiv 2309.00071).

A pair of channels is rotated by the angle position * frequency. `config.rope_interleave` selects
the pairs: (0, 1), (2, 3), ... or (i, i + width / 2). The channels stay where they are.
`transformers` reorders interleaved pairs to the half layout, in q and k alike. This does not change
a score.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.config import MLAConfig, YarnScaling


def rope_frequencies(config: MLAConfig) -> np.ndarray:
    """Returns the angle in radians per token of each pair, [qk_rope_head_dim / 2] float32.

    Values are rounded to float32 in the same steps as in `transformers`. At position 10,000, a
    relative difference of 6e-8 in a frequency changes the angle by 6e-4.
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
    """Returns the share of the slowed frequency per pair, [width / 2]: 0 for fast, 1 for slow."""

    def pair_turning(times: float) -> float:
        """Returns the pair, as a fraction, that turns so many times in the original length."""
        length = scaling.original_max_position_embeddings
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # avoids a division by 0 and gives a step
    pairs = np.arange(width // 2, dtype=np.float32)
    return np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)


def check_positions(positions: Any) -> None:
    """Raises TypeError unless positions are an array of integers, ValueError for a negative one.

    Traced positions are not checked. A negative one rotates the channels backwards.
    """
    checks.require_array("positions", positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be an array of integers, got {positions.dtype}")
    if checks.is_concrete(positions) and positions.size:
        lowest = np.min(np.asarray(positions))  # np.min of a JAX array may be traced
        if lowest < 0:
            raise ValueError(f"positions must be at least 0, got {lowest}")


def apply_rope(x: jax.Array, positions: jax.Array, config: MLAConfig) -> jax.Array:
    """Rotates the channels of each token by its position, and multiplies by YaRN's rotation scale.

    Args:
        x: [*tokens, *heads, qk_rope_head_dim], such as queries [B, S, H, 64] or keys [B, S, 64].
        positions: [*tokens], the leading axes of `x`; integers from 0.
        config: gives frequencies, pairs and scale.

    Returns:
        The rotated x in its shape and dtype, computed in float32.

    Raises:
        TypeError: `x` is not an array of floats, `positions` is not one of integers, or `config` is
            not an MLAConfig.
        ValueError: the last dim of `x` is not qk_rope_head_dim, `positions` are not its leading
            axes, or a position is negative and not traced.
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

    # Each channel is computed by itself, from the two channels of its pair: XLA then fuses the
    # rotation with what reads it. Pairs as an axis of their own would be transposed first.
    pairs, axis = ((-1, 2), -1) if config.rope_interleave else ((2, -1), -2)
    ones = np.ones(config.qk_rope_head_dim // 2, np.float32)
    frequencies = np.stack([rope_frequencies(config)] * 2, axis).ravel()
    signs = np.stack([-ones, ones], axis).ravel()
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    angles = angles.reshape(*positions.shape, *[1] * (x.ndim - positions.ndim - 1), -1)
    scale = config.rope_scaling.rotation_scale if config.rope_scaling else 1.0
    wide = x.astype(jnp.float32)
    others = jnp.flip(wide.reshape(*x.shape[:-1], *pairs), axis).reshape(x.shape)
    turned = wide * (jnp.cos(angles) * scale) + others * (jnp.sin(angles) * signs * scale)
    return turned.astype(x.dtype)
