"""Small layers with random weights, and the jitted steps that the tests of the layer share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from random_layer import random_params

from mla_jax.cache import PagedKVCache
from mla_jax.config import MLAConfig, YarnScaling
from mla_jax.layer import mla_layer
from mla_jax.reference.naive import naive_mla_layer

TOLERANCE = 2e-5  # relative Frobenius error, float32
SMALL = MLAConfig(
    hidden_size=20,
    num_heads=3,
    q_lora_rank=12,
    kv_lora_rank=18,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    rope_scaling=YarnScaling(4.0, 8, mscale=1.0, mscale_all_dim=0.7),
)
naive = jax.jit(naive_mla_layer, static_argnames="config")
step = jax.jit(mla_layer, static_argnames=("config", "implementation"), donate_argnames="cache")


def relative_error(got, wanted):
    wanted = np.asarray(wanted, np.float64)
    return np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)


def new_cache(config, batch, length, page_size=16, dtype=jnp.float32, num_layers=1):
    """An empty cache and a block table of shuffled pages for `batch` requests."""
    width = -(-length // page_size)
    pages = np.random.default_rng(0).permutation(batch * width).astype(np.int32)
    cache = PagedKVCache.create(
        batch * width,
        page_size=page_size,
        kv_lora_rank=config.kv_lora_rank,
        rope_dim=config.qk_rope_head_dim,
        dtype=dtype,
        num_layers=num_layers,
    )
    return cache, jax.device_put(pages.reshape(batch, width))


CONFIGS = {
    "low_rank_q_yarn": SMALL,
    "direct_q_half": dataclasses.replace(SMALL, q_lora_rank=None, rope_interleave=False),
    "bias_plain": dataclasses.replace(SMALL, attention_bias=True, rope_scaling=None),
    "one_head": dataclasses.replace(SMALL, num_heads=1, v_head_dim=9, qk_rope_head_dim=2),
}


def random_layer(config, batch=2, length=9, dtype=jnp.float32, seed=0):
    """(params, x [batch, length, hidden])."""
    x = np.random.default_rng(~np.uint32(seed)).standard_normal((batch, length, config.hidden_size))
    return random_params(config, dtype, seed), jax.device_put(x.astype(jnp.dtype(dtype)))
