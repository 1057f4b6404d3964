"""MLAConfig: the published presets, config.json in its dialects, and what it refuses."""

import dataclasses
import json
import math

import pytest

from mla_jax.config import PRESETS, MLAConfig, YarnScaling

# The keys that matter of the published DeepSeek-V3 / R1 config.json.
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def v3(**changes):
    return DEEPSEEK_V3 | changes


def without(key):
    return {k: v for k, v in DEEPSEEK_V3.items() if k != key}


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


@pytest.mark.parametrize("name", PRESETS)
def test_to_hf_round_trip(name):
    config = MLAConfig.preset(name)
    assert MLAConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_from_hf_takes_file_folder_and_dict(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DEEPSEEK_V3))
    assert MLAConfig.from_hf(path) == MLAConfig.from_hf(tmp_path) == MLAConfig.from_hf(DEEPSEEK_V3)
    assert MLAConfig.from_hf(str(tmp_path)) == MLAConfig.from_hf({"text_config": DEEPSEEK_V3})


def test_rope_parameters_say_the_same_as_rope_scaling():
    newer = without("rope_scaling")
    del newer["rope_theta"]
    rope = {k: v for k, v in DEEPSEEK_V3["rope_scaling"].items() if k != "type"}
    newer["rope_parameters"] = rope | {"rope_type": "yarn", "rope_theta": 10000.0}
    assert MLAConfig.from_hf(newer) == MLAConfig.from_hf(DEEPSEEK_V3)


def test_default_rope_parameters_are_plain_rope():
    rope = {"rope_type": "default", "rope_theta": 5e5}
    config = MLAConfig.from_hf(without("rope_scaling") | {"rope_parameters": rope})
    assert (config.rope_theta, config.rope_scaling) == (5e5, None)
    assert MLAConfig.from_hf(v3(rope_scaling=None)).rope_scaling is None


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "kimi_k2"])
def test_absent_rope_interleave_means_interleaved(model_type):
    assert MLAConfig.from_hf(v3(model_type=model_type)).rope_interleave


def test_rope_interleave_false():
    assert not MLAConfig.from_hf(v3(rope_interleave=False)).rope_interleave
    assert not MLAConfig.from_hf(v3(model_type="kimi_k2", rope_interleave=False)).rope_interleave
    # V2's code in transformers has no such switch and always interleaves.
    assert MLAConfig.from_hf(v3(model_type="deepseek_v2", rope_interleave=False)).rope_interleave


def test_latent_norm_eps_is_not_the_blocks():
    assert MLAConfig.from_hf(v3(rms_norm_eps=1e-5)).rms_norm_eps == 1e-6


def test_yarn_temperatures():
    yarn = YarnScaling(factor=40.0, original_max_position_embeddings=4096)
    assert yarn.rotation_scale == pytest.approx(0.1 * math.log(40) + 1)
    assert yarn.softmax_mscale == 1.0
    both = dataclasses.replace(yarn, mscale=0.5, mscale_all_dim=1.0)
    ratio = (0.05 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    assert both.rotation_scale == pytest.approx(ratio)
    assert dataclasses.replace(both, attention_factor=1.25).rotation_scale == 1.25
    assert dataclasses.replace(both, factor=1.0).softmax_mscale == 1.0


def yarn(**changes):
    return v3(rope_scaling=DEEPSEEK_V3["rope_scaling"] | changes)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        *[(without(key), f"{key} is missing") for key in ("hidden_size", "q_lora_rank")],
        (without("num_attention_heads"), "num_attention_heads is missing"),
        (without("kv_lora_rank"), "kv_lora_rank is missing"),
        (v3(hidden_size="7168"), "hidden_size must be a positive integer, got '7168'"),
        (v3(num_attention_heads=0), "num_heads must be a positive integer, got 0"),
        (v3(q_lora_rank=-1), "q_lora_rank must be a positive integer, got -1"),
        (v3(qk_rope_head_dim=63), "qk_rope_head_dim must be even, got 63"),
        (v3(rope_theta=None), "rope_theta must be a number above 1, got None"),
        (v3(model_type="llama"), "model_type must be one of .*, got 'llama'"),
        (yarn(type="linear"), "rope type must be 'default' or 'yarn', got 'linear'"),
        (yarn(rope_type="llama3"), "rope type must be 'default' or 'yarn', got 'llama3'"),
        (yarn(factor="40"), "rope_scaling.factor must be a positive number, got '40'"),
        (yarn(mscale="1"), "rope_scaling.mscale must be a number or null, got '1'"),
        (yarn(original_max_position_embeddings=0), "original_max_position_embeddings must be"),
        (v3(rope_scaling={"full_attention": {"type": "yarn"}}), "must be flat"),
        (v3(rope_scaling=40), "must be flat"),
        (v3(partial_rotary_factor=0.5), "partial_rotary_factor must be absent or 1, got 0.5"),
        (v3(rope_scaling={"type": "yarn"}), "rope_scaling.factor is missing"),
    ],
)
def test_from_hf_refuses(raw, message):
    with pytest.raises(ValueError, match=message):
        MLAConfig.from_hf(raw)


def test_from_hf_refuses_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json at .*config.json"):
        MLAConfig.from_hf(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        MLAConfig.from_hf(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        MLAConfig.from_hf(path)


def test_to_hf_refuses_what_the_format_cannot_say():
    with pytest.raises(ValueError, match="rms_norm_eps"):
        dataclasses.replace(MLAConfig.preset("deepseek-v3"), rms_norm_eps=1e-5).to_hf()
