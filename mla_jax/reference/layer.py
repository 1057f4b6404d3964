"""Float64 reference of the whole layer in numpy, written from the papers alone.

It is slow and plain, and expands keys and values head by head. It shares no code with the rest of
`mla_jax` except the shapes of `MLAConfig` and `MLAParams`.
"""

import math

import numpy as np

from mla_jax.checkpoints.weights import MLAParams
from mla_jax.config import MLAConfig


def layer_float64(config: MLAConfig, params: MLAParams, x: np.ndarray) -> np.ndarray:
    """Computes the causal layer for x [B, S, hidden], positions from 0: [B, S, hidden] float64.

    Raises TypeError for a config or params of another type, ValueError for an x of another shape or
    with a dim of 0.
    """
    if not isinstance(config, MLAConfig):
        raise TypeError(f"config must be an MLAConfig, got {type(config).__name__}")
    if not isinstance(params, MLAParams):
        raise TypeError(f"params must be an MLAParams, got {type(params).__name__}")
    x = np.asarray(x, np.float64)
    if x.ndim != 3 or x.shape[2] != config.hidden_size or 0 in x.shape:
        raise ValueError(
            f"x must be [B, S, hidden_size] = [any, any, {config.hidden_size}] with no dim of 0, "
            f"got shape {list(x.shape)}"
        )
    return np.stack([_sequence(config, params, request) for request in x])


def _sequence(config: MLAConfig, params: MLAParams, x: np.ndarray) -> np.ndarray:
    """Computes the layer for one request: x [S, hidden] -> [S, hidden]."""
    p = {k: np.asarray(v, np.float64) for k, v in vars(params).items() if v is not None}
    rank, nope = config.kv_lora_rank, config.qk_nope_head_dim
    turn = np.exp(1j * np.arange(len(x))[:, None] * _frequencies(config)) * _rotation_scale(config)

    c_q = x
    if "w_dq" in p:
        c_q = _norm(config, x @ p["w_dq"] + p.get("b_dq", 0.0), p["norm_q"])
    down = x @ p["w_dkv"] + p.get("b_dkv", 0.0)
    c_kv = _norm(config, down[:, :rank], p["norm_kv"])
    k_rope = _turn(config, down[:, rank:], turn)

    out = np.zeros_like(x) + p.get("b_o", 0.0)
    unseen = np.triu(np.ones((len(x), len(x)), bool), 1)
    for head in range(config.num_heads):
        q = c_q @ p["w_uq"][:, head]
        q = np.concatenate([q[:, :nope], _turn(config, q[:, nope:], turn)], -1)
        k = np.concatenate([c_kv @ p["w_uk"][head].T, k_rope], -1)
        scores = np.where(unseen, -np.inf, q @ k.T * _softmax_scale(config))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out += weights @ (c_kv @ p["w_uv"][head]) @ p["w_o"][head]
    return out


def _norm(config: MLAConfig, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight


def _turn(config: MLAConfig, x: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Rotates channel pairs of x [S, rope] by complex factors `turn` [S, rope / 2]."""
    even, odd = (x[:, ::2], x[:, 1::2]) if config.rope_interleave else np.split(x, 2, -1)
    turned = (even + 1j * odd) * turn
    # q and k are reordered alike, so that the order of the channels does not change a score.
    return np.concatenate([turned.real, turned.imag], -1)


def _frequencies(config: MLAConfig) -> np.ndarray:
    """Returns YaRN's frequencies theta_d * ((1 - gamma) / s + gamma), arXiv 2309.00071, 3.2."""

    width, yarn = config.qk_rope_head_dim, config.rope_scaling
    theta = config.rope_theta ** (-np.arange(0, width, 2) / width)
    if yarn is None:
        return theta
    original = yarn.original_max_position_embeddings

    def pair(turns: float) -> float:
        return width / 2 * math.log(original / (2 * math.pi * turns), config.rope_theta)

    low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pairs = np.arange(width // 2)
    gamma = 1 - np.clip((pairs - low) / (high - low or 0.001), 0, 1)
    return theta * ((1 - gamma) / yarn.factor + gamma)


def _temperature(factor: float, mscale: float) -> float:
    return 1 + 0.1 * mscale * math.log(factor) if factor > 1 else 1.0


def _rotation_scale(config: MLAConfig) -> float:
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _temperature(yarn.factor, yarn.mscale) / _temperature(
            yarn.factor, yarn.mscale_all_dim
        )
    return _temperature(yarn.factor, 1.0)


def _softmax_scale(config: MLAConfig) -> float:
    yarn = config.rope_scaling
    squared = _temperature(yarn.factor, yarn.mscale_all_dim or 0.0) ** 2 if yarn else 1.0
    return squared / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
