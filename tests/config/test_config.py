"""MLAConfig: the published presets, what follows from its fields, shards, what it refuses."""

import dataclasses
import math

import numpy as np
import pytest
from deepseek_v3 import DEEPSEEK_V3, yarn

from mla_jax.config import MLAConfig, YarnScaling
from mla_jax.rope import rope_frequencies


def test_preset_is_the_published_v3():
    assert MLAConfig.from_hf(DEEPSEEK_V3) == MLAConfig.preset("deepseek-v3")
    assert MLAConfig.preset("deepseek-r1") == MLAConfig.preset("deepseek-v3")


@pytest.mark.parametrize(
    ("name", "hidden", "heads", "q_lora", "layers"),
    [
        ("deepseek-v2-lite", 2048, 16, None, 27),
        ("deepseek-v2", 5120, 128, 1536, 60),
        ("deepseek-v3", 7168, 128, 1536, 61),
        ("kimi-k2", 7168, 64, 1536, 61),
    ],
)
def test_presets(name, hidden, heads, q_lora, layers):
    c = MLAConfig.preset(name)
    got = (c.hidden_size, c.num_heads, c.q_lora_rank, c.num_hidden_layers)
    assert got == (hidden, heads, q_lora, layers)
    assert (c.kv_lora_rank, c.latent_dim, c.qk_head_dim, c.v_head_dim) == (512, 576, 192, 128)
    assert hash(c) == hash(dataclasses.replace(c))


def test_softmax_scale_is_that_of_the_expanded_head_with_mscale_squared():
    mscale = 0.1 * math.log(40) + 1
    assert MLAConfig.preset("deepseek-v3").softmax_scale == pytest.approx(192**-0.5 * mscale**2)
    mscale = 0.1 * 0.707 * math.log(40) + 1
    lite = MLAConfig.preset("deepseek-v2-lite")
    assert lite.softmax_scale == pytest.approx(192**-0.5 * mscale**2)
    assert dataclasses.replace(lite, rope_scaling=None).softmax_scale == 192**-0.5


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_shards_have_an_equal_share_of_the_heads(tensor_parallel):
    whole = MLAConfig.preset("deepseek-v3")
    shard = whole.shard(tensor_parallel)
    assert shard.num_heads * tensor_parallel == 128
    assert dataclasses.replace(shard, num_heads=128) == whole


def test_shard_refuses_an_uneven_split():
    with pytest.raises(ValueError, match="tensor_parallel must divide num_heads = 128, got 3"):
        MLAConfig.preset("deepseek-v3").shard(3)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"deepseek-v2-lite, .*got 'gpt'"):
        MLAConfig.preset("gpt")


def test_yarn_temperatures():
    yarn = YarnScaling(factor=40.0, original_max_position_embeddings=4096)
    assert yarn.rotation_scale == pytest.approx(0.1 * math.log(40) + 1)
    assert yarn.softmax_mscale == 1.0
    both = dataclasses.replace(yarn, mscale=0.5, mscale_all_dim=1.0)
    ratio = (0.05 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    assert both.rotation_scale == pytest.approx(ratio)
    assert dataclasses.replace(both, attention_factor=1.25).rotation_scale == 1.25
    assert dataclasses.replace(both, factor=1.0).softmax_mscale == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"factor": 1, "mscale": 0, "mscale_all_dim": 0, "beta_fast": 1, "beta_slow": 1},
        {"factor": 1e6, "mscale": 100, "mscale_all_dim": None, "beta_fast": 1e6, "beta_slow": 1e-3},
        {"factor": 1e6, "mscale": 1e-3, "mscale_all_dim": 100, "original": 1},
        {"factor": 2, "attention_factor": 1e-3, "mscale_all_dim": 100, "original": 2**31 - 1},
    ],
)
@pytest.mark.parametrize("theta", [math.nextafter(1, 2), 1e4, 1e30])
def test_at_the_limits_all_derived_numbers_are_normal(changes, theta):
    changes = {
        k.replace("original", "original_max_position_embeddings"): v for k, v in changes.items()
    }
    raw = yarn(**changes) | {"rope_theta": theta, "max_position_embeddings": 2**31 - 1}
    config = MLAConfig.from_hf(raw)
    assert config.rope_scaling is not None
    derived = [config.softmax_scale, config.rope_scaling.rotation_scale, *rope_frequencies(config)]
    assert np.isfinite(np.asarray(derived, np.float32)).all()
    assert (np.asarray(derived, np.float32) >= np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        *[({"num_heads": v}, TypeError) for v in (True, 4.0, "4", None)],
        *[({"num_heads": v}, ValueError) for v in (0, -1, 2**31, np.int64(-1))],
        *[({"rope_theta": v}, TypeError) for v in (True, "1e4", None, 1j)],
        *[({"rms_norm_eps": v}, ValueError) for v in (0, math.nan, 1e-60, 1e300)],
        *[({"attention_bias": v}, TypeError) for v in (0, "no", None)],
        ({"rope_scaling": {"factor": 2}}, TypeError),
        ({"q_lora_rank": False}, TypeError),
    ],
)
def test_fields_are_named(changes, error):
    [name] = changes
    with pytest.raises(error, match=rf"^{name} must be "):
        dataclasses.replace(MLAConfig.preset("deepseek-v3"), **changes)


def test_numpys_numbers_become_pythons():
    shape = {"hidden_size": np.uint8(200), "num_heads": np.int64(16), "q_lora_rank": np.int32(8)}
    config = MLAConfig(**shape, rope_theta=np.float32(500), attention_bias=np.bool_(True))
    kinds = {type(getattr(config, name)) for name in shape}
    assert (kinds, type(config.rope_theta), config.attention_bias) == ({int}, float, True)
    assert type(YarnScaling(np.int16(4), np.int16(64)).factor) is float
    assert config.shard(np.uint8(2)).num_heads == 8


@pytest.mark.parametrize("name", [[], None, 3, "DeepSeek-V3"])
def test_presets_are_strings_of_the_list(name):
    with pytest.raises(ValueError, match="name must be one of deepseek-v2-lite, "):
        MLAConfig.preset(name)


@pytest.mark.parametrize("value", [True, 2.0, "2", 0])
def test_shard_takes_a_positive_integer(value):
    with pytest.raises((TypeError, ValueError), match="tensor_parallel must be a"):
        MLAConfig.preset("deepseek-v3").shard(value)
