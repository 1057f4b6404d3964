"""config.json in its dialects: what is read, what is written, and what is refused by its key."""

import dataclasses
import json
import math

import numpy as np
import pytest
from deepseek_v3 import DEEPSEEK_V3, v3, without, yarn

from mla_jax.checkpoints.read import CheckpointError
from mla_jax.config import PRESETS, MLAConfig
from mla_jax.config.mla import MODEL_TYPES, OTHER_MODEL_TYPES


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


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_absent_rope_interleave_means_interleaved(model_type):
    assert MLAConfig.from_hf(v3(model_type=model_type)).rope_interleave


def test_rope_interleave_false():
    assert not MLAConfig.from_hf(v3(rope_interleave=False)).rope_interleave
    assert not MLAConfig.from_hf(v3(model_type="kimi_k2", rope_interleave=False)).rope_interleave
    # V2's code in transformers has no such switch and always interleaves.
    assert MLAConfig.from_hf(v3(model_type="deepseek_v2", rope_interleave=False)).rope_interleave


def test_latent_norm_eps_is_not_the_blocks():
    assert MLAConfig.from_hf(v3(rms_norm_eps=1e-5)).rms_norm_eps == 1e-6


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


# Published configs and what else is in them, without what test_from_hf_refuses has.
REST_OF_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_dropout": 0.1,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "vocab_size": 129280,
}
# What older and newer versions of transformers add when they save a config again.
RESAVED = {
    "_attn_implementation_autoset": True,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "head_dim": 64,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "mlp_layer_types": ["dense", "sparse"],
    "output_attentions": False,
    "pruned_heads": {},
    "qk_head_dim": 192,
    "remove_invalid_values": False,
    "temperature": 1.0,
    "top_k": 50,
}


@pytest.mark.parametrize(
    "changes",
    [
        REST_OF_V3,
        REST_OF_V3 | RESAVED,
        {"attn_module_list_cfg": [], "some_new_moe_option": 3, "rms_norm_eps": 1e-5},
        {"sliding_window": None, "layer_types": ["full_attention"] * 61, "attn_output_gate": False},
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 61},
        {"use_mla": True, "lm_head": True, "rm_head": False, "is_causal": True},
        {"final_logit_softcapping": 30.0, "index_topk": 0, "linear_attn_config": None},
        {"rope_interleave": np.bool_(True), "hidden_size": np.int32(7168)},
    ],
)
def test_keys_that_leave_attention_alone(changes):
    assert MLAConfig.from_hf(v3(**changes)) == MLAConfig.preset("deepseek-v3")


FOREIGN = {
    "index_topk": 2048,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "indexer_rope_interleave": True,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "attention_sink": True,
    "use_attn_sinks": 1,
    "attn_logit_softcapping": 50.0,
    "query_pre_attn_scalar": 256,
    "attention_multiplier": 0.0078125,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "use_qk_norm": True,
    "qk_layernorm": True,
    "k_norm": True,
    "q_norm": "rms",
    "attn_output_gate": True,
    "layer_types": ["full_attention", "linear_attention"],
    "layers_block_type": ["attention", "mamba"],
    "hybrid_override_pattern": "M*M*",
    "full_attention_interval": 4,
    "layer_group_size": 8,
    "linear_attn_config": {"kda_layers": [1, 2, 3], "full_attn_layers": [4]},
    "mla_use_nope": True,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "no_rope_layers": [1, 1, 0],
    "nope_layer_interval": 4,
    "alibi": True,
    "position_embedding_type": "alibi",
    "rotary_pct": 0.25,
    "use_mla": False,
    "is_causal": False,
    "use_bidirectional_attention": True,
    "compress_ratios": [4, 128],
    "o_lora_rank": 1024,
    "clip_qkv": 8,
    "num_kv_shared_layers": 4,
    "useAlibi": "yes",
    "softmax_scale": 0.1,
    "num_key_value_heads": 8,
    "head_dim": 100,
    "qk_head_dim": 576,
    "rotary_dim": 32,
    "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
    "floor_scale": 8192,
    "sm_scale": 0.1,
    "topk_tokens": 2048,
    "cross_layer_sharing": 2,
    "use_bias": True,
    "mscale": 1.0,
    "multi_latent_attention": False,
    "kv_norm": False,
}


@pytest.mark.parametrize("key", FOREIGN)
def test_keys_of_another_attention_are_named(key):
    with pytest.raises(CheckpointError, match=rf"^config\.json: .*\b{key} = "):
        MLAConfig.from_hf(v3(**{key: FOREIGN[key]}))
    if key not in DEEPSEEK_V3:
        with pytest.raises(CheckpointError, match=rf"\b{key} = "):
            MLAConfig.from_hf({"text_config": DEEPSEEK_V3, key: FOREIGN[key]})


def test_another_model_type_is_named_with_its_keys():
    message = r"'deepseek_v32', which attends only to .* selects \(with index_topk = 2048\)$"
    with pytest.raises(CheckpointError, match=message):
        MLAConfig.from_hf(v3(model_type="deepseek_v32", index_topk=2048))


@pytest.mark.parametrize(("model_type", "why"), OTHER_MODEL_TYPES.items())
def test_another_latent_attention_is_refused_with_the_reason(model_type, why):
    with pytest.raises(CheckpointError, match=f"got '{model_type}', which {why}$"):
        MLAConfig.from_hf({"model_type": "mistral3", "text_config": v3(model_type=model_type)})


@pytest.mark.parametrize("model_type", ["glm4_moe_lite", "youtu", "axk1"])
@pytest.mark.parametrize(
    "change",
    [
        *({"index_topk": 64}, {"sliding_window": 128}, {"use_qk_norm": True}, {"head_dim": 9}),
        *({"partial_rotary_factor": 0.5}, {"attn_output_gate": True}),
        {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        {"rope_scaling": None, "rope_parameters": {"llama_4_scaling_beta": 0.1}},
    ],
    ids=str,
)
def test_model_types_of_the_same_attention_refuse_another(model_type, change):
    raw = v3(model_type=model_type)
    assert MLAConfig.from_hf(raw) == MLAConfig.preset("deepseek-v3")
    with pytest.raises(CheckpointError, match=list(change)[-1]):
        MLAConfig.from_hf(raw | change)


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config"])
def test_the_language_models_part_is_found(key):
    outer = {"model_type": "kimi_vl", "vision_config": {"hidden_size": 3}, "image_token_index": 5}
    outer |= {"use_unified_vision_chunk": True, "global_view_pos": "head", "text_config": None}
    assert MLAConfig.from_hf(outer | {key: DEEPSEEK_V3}) == MLAConfig.preset("deepseek-v3")
    nested = {"text_config": {key: DEEPSEEK_V3}}
    assert MLAConfig.from_hf(nested) == MLAConfig.preset("deepseek-v3")
    both = {"llm_config": DEEPSEEK_V3, "text_config": dict(DEEPSEEK_V3)} | DEEPSEEK_V3
    assert MLAConfig.from_hf(both) == MLAConfig.preset("deepseek-v3")
    assert MLAConfig.from_hf(v3(**{key: {}})) == MLAConfig.preset("deepseek-v3")


CIRCLE: dict = {}
CIRCLE["text_config"] = CIRCLE


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"text_config": DEEPSEEK_V3, "language_config": v3(hidden_size=3)}, "and .* differ"),
        ({"text_config": "x"}, "text_config must be an object, got 'x'"),
        (
            {"my_config": DEEPSEEK_V3},
            r"hidden_size is missing; is it in my_config\? Known are text",
        ),
        (CIRCLE, "text_config is nested more than 8 times"),
        (
            {"text_config": DEEPSEEK_V3, "rope_theta": 5e5},
            "rope_theta differs between text_config and around",
        ),
        ({"text_config": without("rope_theta"), "rope_theta": 5e5}, "rope_theta differs between"),
    ],
)
def test_wrappers_that_are_refused(raw, message):
    with pytest.raises(CheckpointError, match=message):
        MLAConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        *[(v3(attention_bias=value), "attention_bias must be True or") for value in ("false", 0)],
        *[(v3(rope_interleave=value), "rope_interleave must be") for value in ("false", 1, None)],
        (
            v3(model_type="deepseek_v2", rope_interleave="x"),
            "rope_interleave must be True or False",
        ),
        (yarn(truncate="false"), r"rope_scaling.truncate must be True or False, got 'false'"),
        *[(yarn(mscale_all_dim=v), r"mscale_all_dim must be") for v in (-100, 1e300, True, [])],
        *[(yarn(mscale=v), r"rope_scaling.mscale must be") for v in (-1, 1e300, 10**400, True)],
        *[(yarn(attention_factor=v), "attention_factor must be") for v in (0, -1, 1e-308, 1e300)],
        *[(yarn(beta_fast=v), "beta_fast must be") for v in (0, 1e-308, 1e300, "32", 0.5)],
        *[(yarn(beta_slow=v), "beta_slow must be") for v in (0, 1e-308, math.inf, False)],
        *[(yarn(factor=v), "factor must be") for v in (0, 0.5, 1e300, math.nan, True, None)],
        (yarn(factor=10**400), "factor must be a positive number, got 1000"),
        *[(v3(rope_theta=v), "rope_theta must be a number above 1") for v in (1, "1e4", 1e300)],
        *[(v3(hidden_size=v), "hidden_size must be a pos") for v in (True, 7168.0, 10**400, None)],
        (v3(max_position_embeddings=None), "max_position_embeddings must be a positive integer"),
        (v3(num_hidden_layers=2**31), "num_hidden_layers must be .* not below 2"),
        (v3(num_attention_heads="x"), r"num_heads must be .*, got 'x' \(num_attention_heads\)"),
        *[(v3(model_type=v), "model_type must be one of") for v in ([], {}, None, 3, "x" * 5000)],
        *[(v3(rope_scaling=v), "must be flat") for v in (False, 0, "", "yarn", [1])],
        (yarn(type=[]), r"rope type must be 'default' or 'yarn', got \[\]"),
        (yarn(rope_type="default"), "rope_scaling.rope_type and rope_scaling.type differ"),
        (yarn(llama_4_scaling_beta=0.1), "llama_4_scaling_beta = 0.1 is not known for rope type y"),
        (v3(rope_scaling={"factor": 40}), "rope_scaling.factor .*rope_scaling.rope_type is missin"),
        (v3(rope_scaling={"type": "default", "mscale": 2}), "rope_scaling.mscale = 2 is not known"),
        (v3(partial_rotary_factor=True), "partial_rotary_factor must be absent or 1, got True"),
    ],
)
def test_values_are_taken_by_type_and_range(raw, message):
    with pytest.raises(CheckpointError, match=rf"^config\.json: .*{message}") as caught:
        MLAConfig.from_hf(raw)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [None, 3, [], b"config.json"])
def test_from_hf_takes_a_path_or_a_dict(value):
    with pytest.raises(TypeError, match="source must be a path or the dict"):
        MLAConfig.from_hf(value)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(v3(index_topk=2048)))
    with pytest.raises(CheckpointError) as caught:
        MLAConfig.from_hf(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


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
