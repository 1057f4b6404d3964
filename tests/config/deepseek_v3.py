"""The published config.json of DeepSeek-V3, and changes to it."""

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


def yarn(**changes):
    return v3(rope_scaling=DEEPSEEK_V3["rope_scaling"] | changes)
