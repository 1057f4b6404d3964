"""Whole tiny models for tests/data/models, computed by Hugging Face transformers in float32.

`make_golden.py --models=DIR` writes them. A model has the published names in config.json and
model.safetensors, whose matrices hold values that are exact in bfloat16. golden.npz has

- prompts [P, most tokens] int64 and prompt_lens [P],
- prefill [sum of prompt_lens, vocab] float32: the logits of all tokens of the prompts,
- decode [P, steps, vocab] float32: those of every decode step,
- tokens [P, steps + 1] int64: the greedy tokens, the first from the last logits of the prompt.
"""

import contextlib
import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

DIMS = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "rope_theta": 10000,
}
YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
}
MODELS = {
    # No low-rank query, as V2-Lite; groups as V2. YaRN's mscale is that of both. All layers have
    # experts, so that XLA compiles one layer; the dense one is V3's.
    "deepseek_v2": DIMS
    | {"num_hidden_layers": 3, "first_k_dense_replace": 0}
    | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
    | {"q_lora_rank": None, "n_shared_experts": 2, "rms_norm_eps": 1e-6}
    | {"scoring_func": "softmax", "topk_method": "group_limited_greedy"}
    | {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 3.0}
    | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    # Two groups of four, so that the sum of a group's two best is not that of all.
    "deepseek_v3": DIMS
    | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    | {"q_lora_rank": 40, "n_shared_experts": 1, "rms_norm_eps": 1e-2}
    | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    | {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    | {"num_nextn_predict_layers": 0}
    | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
}
CLASSES = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}
PROMPT_LENS = (37, 12, 21)
STEPS = 12
LEAST_MARGIN = 2e-2  # between the two largest logits, so that rounding does not change a token


class UnclearToken(ValueError):
    """Raised where the largest two logits are so close that rounding may choose between them."""


def write_models(folder: Path) -> None:
    for seed, (name, config) in enumerate(MODELS.items()):
        model = seeded_model(config, seed)
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(published(model), target / "model.safetensors", metadata={"format": "pt"})
        np.savez_compressed(target / "golden.npz", **golden(model, seed))
        print(f"wrote {target}")


def seeded_model(config: dict[str, Any], seed: int) -> Any:
    cls, model_cls = CLASSES[config["model_type"]]
    hf_config = cls.from_dict(copy.deepcopy(config))
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = model_cls(hf_config).float().eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.ndim >= 2:
            scale = 1.0 if "embed_tokens" in name else 1.4 * value.shape[-1] ** -0.5
            value.data = torch.randn_like(value) * scale
        elif name.endswith("e_score_correction_bias"):
            value.data = torch.randn_like(value) * 0.6  # some biased scores are negative
        elif "norm" in name:
            value.data = 1 + torch.randn_like(value) * 0.2
        else:
            continue  # the frequencies of RoPE
        if not name.endswith("e_score_correction_bias"):
            value.data = value.data.bfloat16().float()
    return model


def published(model: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors by their published names; transformers keeps experts in one array."""
    tensors = {}
    for name, value in model.state_dict().items():
        value = value if name.endswith("e_score_correction_bias") else value.bfloat16()
        module, _, leaf = name.rpartition(".")
        if not module.endswith("mlp.experts"):
            tensors[name] = value.contiguous()
            continue
        for expert, one in enumerate(value):
            if leaf == "gate_up_proj":
                gate, up = one.chunk(2)
                tensors[f"{module}.{expert}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{module}.{expert}.up_proj.weight"] = up.contiguous()
            else:
                tensors[f"{module}.{expert}.down_proj.weight"] = one.contiguous()
    return tensors


def golden(model: Any, seed: int) -> dict[str, np.ndarray]:
    """Returns the arrays of golden.npz, of the first prompts whose tokens are all clear."""
    for attempt in itertools.count():
        with contextlib.suppress(UnclearToken):
            return _golden(model, np.random.default_rng((seed, attempt)))
    raise AssertionError


def _golden(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    vocab = model.config.vocab_size
    prompts = np.zeros((len(PROMPT_LENS), max(PROMPT_LENS)), np.int64)
    prefill, decode, tokens = [], [], []
    for row, length in zip(prompts, PROMPT_LENS, strict=True):
        row[:length] = rng.integers(0, vocab, length)
        logits, chosen, steps = greedy(model, row[:length])
        prefill.append(logits)
        decode.append(steps)
        tokens.append(chosen)
    return {
        "prompts": prompts,
        "prompt_lens": np.array(PROMPT_LENS),
        "prefill": np.concatenate(prefill).astype(np.float32),
        "decode": np.stack(decode).astype(np.float32),
        "tokens": np.array(tokens),
    }


@torch.no_grad()
def greedy(model: Any, prompt: np.ndarray) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Returns the prompt's logits, STEPS + 1 greedy tokens, and the logits of each decode step."""
    out = model(torch.tensor(prompt)[None], use_cache=True)
    logits, steps = out.logits[0], []
    chosen = [checked_argmax(logits[-1])]
    for _ in range(STEPS):
        step = torch.tensor([[chosen[-1]]])
        out = model(step, cache=out.past_key_values, use_cache=True)
        steps.append(out.logits[0, -1].numpy())
        chosen.append(checked_argmax(out.logits[0, -1]))
    return logits.numpy(), chosen, np.stack(steps)


def checked_argmax(logits: torch.Tensor) -> int:
    best = logits.topk(2).values
    margin = (best[0] - best[1]).item()
    if margin < LEAST_MARGIN:
        raise UnclearToken(f"two tokens are almost equally likely, {margin:.1e} apart")
    return int(logits.argmax())
