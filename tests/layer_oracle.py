"""The layer in float64 numpy, head by head and token by token: slow, plain, and written from the
papers alone. It shares no code with `mla_jax` but the shapes of `MLAConfig` and `MLAParams`.
Beside it, random weights to try it on."""

import math

import jax.numpy as jnp
import numpy as np

from mla_jax.weights import MLAParams, param_shapes


def random_params(config, dtype=jnp.float32, seed=0):
    """Weights of unit gain, with norms and biases that aren't the neutral 1 and 0."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if shape is None:
            return None
        scale = 0.2 if len(shape) == 1 else shape[name in ("w_uk", "w_uv", "w_o")] ** -0.5
        return jnp.asarray(rng.standard_normal(shape) * scale + name.startswith("norm"), dtype)

    return MLAParams(**{name: draw(name, shape) for name, shape in param_shapes(config).items()})


def layer_float64(config, params, x):
    """x [B, S, hidden] -> out [B, S, hidden], causal, positions from 0, float64."""
    return np.stack([_sequence(config, params, request) for request in np.asarray(x, np.float64)])


def _sequence(config, params, x):
    """One request: x [S, hidden] -> [S, hidden]."""
    p = {k: None if v is None else np.asarray(v, np.float64) for k, v in vars(params).items()}
    rank, nope = config.kv_lora_rank, config.qk_nope_head_dim
    turn = np.exp(1j * np.arange(len(x))[:, None] * _frequencies(config)) * _rotation_scale(config)

    c_q = x
    if p["w_dq"] is not None:
        c_q = _norm(config, x @ p["w_dq"] + _or_zero(p["b_dq"]), p["norm_q"])
    down = x @ p["w_dkv"] + _or_zero(p["b_dkv"])
    c_kv = _norm(config, down[:, :rank], p["norm_kv"])
    k_rope = _turn(config, down[:, rank:], turn)

    out = np.zeros_like(x) + _or_zero(p["b_o"])
    for head in range(config.num_heads):
        q = c_q @ p["w_uq"][:, head]
        q = np.concatenate([q[:, :nope], _turn(config, q[:, nope:], turn)], -1)
        k = np.concatenate([c_kv @ p["w_uk"][head].T, k_rope], -1)
        v = c_kv @ p["w_uv"][head]
        for i in range(len(x)):
            scores = k[: i + 1] @ q[i] * _softmax_scale(config)
            weights = np.exp(scores - scores.max())
            out[i] += weights @ v[: i + 1] / weights.sum() @ p["w_o"][head]
    return out


def _or_zero(bias):
    return 0.0 if bias is None else bias


def _norm(config, x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight


def _turn(config, x, turn):
    """Channel pairs as complex numbers, times exp(i * angle)."""
    even, odd = (x[:, ::2], x[:, 1::2]) if config.rope_interleave else np.split(x, 2, -1)
    turned = (even + 1j * odd) * turn
    return np.concatenate([turned.real, turned.imag], -1)  # q and k alike, so the order is free


def _frequencies(config):
    """YaRN, arXiv 2309.00071 section 3.2: theta_d * ((1 - gamma) / s + gamma)."""
    width, yarn = config.qk_rope_head_dim, config.rope_scaling
    theta = config.rope_theta ** (-np.arange(0, width, 2) / width)
    if yarn is None:
        return theta

    def pair(turns):
        wavelength = yarn.original_max_position_embeddings / (2 * math.pi * turns)
        return width / 2 * math.log(wavelength, config.rope_theta)

    low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pairs = np.arange(width // 2)
    gamma = 1 - np.clip((pairs - low) / (high - low or 0.001), 0, 1)
    return theta * ((1 - gamma) / yarn.factor + gamma)


def _temperature(factor, mscale):
    return 1 + 0.1 * mscale * math.log(factor) if factor > 1 else 1.0


def _rotation_scale(config):
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


def _softmax_scale(config):
    yarn = config.rope_scaling
    squared = _temperature(yarn.factor, yarn.mscale_all_dim or 0.0) ** 2 if yarn else 1.0
    return squared / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
