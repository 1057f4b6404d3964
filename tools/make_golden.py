"""Writes the golden vectors in tests/data/golden with Hugging Face transformers' own attention.

Each case is a small checkpoint as published (config.json, safetensors with one attention layer)
and a golden.npz: x and out, both [batch, seq, hidden] float32, positions 0 .. seq-1, causal.

This needs torch and transformers, which nothing else here does, so give it an environment of its
own; from the root of the repository:

    python3 -m venv golden-env
    golden-env/bin/pip install torch transformers safetensors
    golden-env/bin/python tools/make_golden.py --output=tests/data/golden
    golden-env/bin/python tools/make_golden.py --models=tests/data/models

The second command writes whole tiny models (`golden_models.py`). The shipped layers were made with
torch 2.13.0 and transformers 5.23.0, the shipped models with torch 2.14.1 and transformers 5.24.0.
"""

import argparse
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import golden_models
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    AXK1Config,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeLiteConfig,
    YoutuConfig,
)
from transformers.models.axk1 import modeling_axk1 as axk1
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite as glm
from transformers.models.youtu import modeling_youtu as youtu

DIMS = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
}
ODD_DIMS = DIMS | {
    "hidden_size": 72,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 14,
}
YARN = golden_models.YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}


@dataclass
class Case:
    config: dict[str, Any]  # as config.json, in the words of the published file
    layer: int = 0
    resave: bool = False  # config.json as the installed transformers writes it
    fp8_block: tuple[int, int] | None = None  # e4m3 matrices with weight_scale_inv
    shards: int = 1


CASES = {
    # DeepSeek-V2-Lite in small: no low-rank query, YaRN with mscale 0.707.
    "v2_lite": Case(
        DIMS
        | {"model_type": "deepseek_v2", "q_lora_rank": None, "max_position_embeddings": 64}
        | {"rope_theta": 10000, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}
    ),
    "v2_plain": Case(
        DIMS
        | {"model_type": "deepseek_v2", "max_position_embeddings": 64}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        layer=1,
    ),
    # DeepSeek-V3's published keys, which leave out rope_interleave; odd heads, v unlike nope.
    "v3_yarn": Case(
        ODD_DIMS
        | {"model_type": "deepseek_v3", "max_position_embeddings": 64}
        | {"rope_theta": 10000, "rope_scaling": YARN},
        layer=2,
    ),
    "v3_half_resaved": Case(
        DIMS
        | {"model_type": "deepseek_v3", "max_position_embeddings": 128, "rope_interleave": False}
        | {"rope_theta": 20000.0, "rope_scaling": YARN | {"mscale": 0.8, "mscale_all_dim": 1.3}},
        layer=3,
        resave=True,
    ),
    "v3_bias_truncate": Case(
        ODD_DIMS
        | {"model_type": "deepseek_v3", "max_position_embeddings": 64, "attention_bias": True}
        | {"rope_interleave": True, "rope_theta": 10000.0, "rms_norm_eps": 1e-3}
        | {"rope_scaling": YARN | {"attention_factor": 1.2, "truncate": False, "factor": 3.5}},
    ),
    "v3_fp8_sharded": Case(
        ODD_DIMS
        | {"model_type": "deepseek_v3", "max_position_embeddings": 64}
        | {"rope_theta": 10000, "rope_scaling": YARN}
        | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}},
        layer=1,
        fp8_block=(32, 32),
        shards=2,
    ),
    "kimi_k2": Case(
        DIMS
        | {"model_type": "kimi_k2", "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
        | {"rope_theta": 50000.0}
        | {"rope_scaling": YARN | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0}},
    ),
    # Three cases have the numbers of another one, so that tests compile no program for them.
    # V3's code without a low-rank query, as in Moonlight.
    "v3_direct_q": Case(
        DIMS
        | {"model_type": "deepseek_v3", "q_lora_rank": None, "max_position_embeddings": 64}
        | {"rope_theta": 10000, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}
    ),
    "youtu": Case(
        DIMS
        | {"model_type": "youtu", "max_position_embeddings": 64, "qk_head_dim": 24}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
        | {"rope_interleave": True},
    ),
    "axk1": Case(
        DIMS
        | {"model_type": "axk1", "max_position_embeddings": 512}
        | {"rope_theta": 50000.0}
        | {"rope_scaling": YARN | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0}},
    ),
    # GLM-4.7-Flash: nope is three times rope, and v is as wide as the two together.
    "glm4_moe_lite": Case(
        DIMS
        | {"model_type": "glm4_moe_lite", "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
        | {"num_attention_heads": 5, "num_key_value_heads": 5}
        | {"qk_nope_head_dim": 24, "v_head_dim": 32}
        | {"rope_theta": 1000000, "rope_scaling": None, "partial_rotary_factor": 1.0},
    ),
}

CLASSES = {
    "deepseek_v2": (DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding),
    "deepseek_v3": (DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding),
    "glm4_moe_lite": (Glm4MoeLiteConfig, glm.Glm4MoeLiteAttention, glm.Glm4MoeLiteRotaryEmbedding),
    "youtu": (YoutuConfig, youtu.YoutuAttention, youtu.YoutuRotaryEmbedding),
    "axk1": (AXK1Config, axk1.AXK1Attention, axk1.AXK1RotaryEmbedding),
}


def attention(config: dict[str, Any], layer: int, seed: int) -> tuple[Any, Any, Any]:
    """(transformers config, attention module, rotary module) with seeded weights."""
    if config["model_type"] == "kimi_k2":  # published with V3's code
        config = config | {"model_type": "deepseek_v3"}
    cls, module, rotary = CLASSES[config["model_type"]]
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    hf_config = cls.from_dict(copy.deepcopy(config))  # which it writes into
    hf_config._attn_implementation = "eager"
    torch.manual_seed(seed)
    layer_module = module(hf_config, layer).float().eval()
    for parameter in layer_module.parameters():
        if parameter.ndim == 2:  # unit variance in, a little more out, so that scores are peaked
            parameter.data = torch.randn_like(parameter) * 1.4 * parameter.shape[1] ** -0.5
        else:
            parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.data != 0)
    return hf_config, layer_module, rotary(hf_config)


def run(module: Any, rotary: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's output [batch, seq, hidden], causal from position 0."""
    length = x.shape[1]
    causal = torch.triu(torch.full((length, length), torch.finfo(x.dtype).min), 1)[None, None]
    positions = torch.arange(length)[None].expand(x.shape[0], -1)
    with torch.no_grad():
        return module(
            hidden_states=x,
            position_embeddings=rotary(x, positions),
            attention_mask=causal,
        )[0]


def quantize_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 weight, float32 factor of each block); edge blocks are ragged."""
    rows, columns = (-(-n // b) for n, b in zip(weight.shape, block, strict=True))
    factors = torch.empty(rows, columns)
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            factors[i, j] = weight[part].abs().max() / torch.finfo(torch.float8_e4m3fn).max
            quantized[part] = (weight[part] / factors[i, j]).to(torch.float8_e4m3fn)
            weight[part] = quantized[part].float() * factors[i, j]
    return quantized, factors


def write(folder: Path, case: Case, seed: int, batch: int, length: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    hf_config, module, rotary = attention(case.config, case.layer, seed)
    prefix = f"model.layers.{case.layer}.self_attn."
    tensors = {}
    for name, parameter in module.named_parameters():
        value = parameter.data
        if case.fp8_block and value.ndim == 2:  # the module keeps the rounded weights
            value, factors = quantize_fp8(value, case.fp8_block)
            tensors[f"{prefix}{name}_scale_inv"] = factors
        tensors[prefix + name] = value.contiguous()

    x = torch.randn(batch, length, case.config["hidden_size"])
    np.savez(folder / "golden.npz", x=x.numpy(), out=run(module, rotary, x).numpy())

    text = hf_config.to_json_string() if case.resave else json.dumps(case.config, indent=2) + "\n"
    (folder / "config.json").write_text(text)
    names = sorted(tensors)
    if case.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(case.shards):
        file = f"model-{shard + 1:05}-of-{case.shards:05}.safetensors"
        mine = names[shard :: case.shards]
        save_file({n: tensors[n] for n in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for the cases, which have one layer")
    parser.add_argument("--models", type=Path, help="folder for whole tiny models")
    arguments = parser.parse_args()
    if arguments.models is not None:
        golden_models.write_models(arguments.models)
    if arguments.output is None:
        return
    output = arguments.output
    for seed, (name, case) in enumerate(CASES.items()):
        write(output / name, case, seed, batch=2, length=40)
        print(f"wrote {output / name}")


if __name__ == "__main__":
    main()
