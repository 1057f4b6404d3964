"""A small layer's weights, and changes to the checkpoint that holds them."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from random_layer import random_params
from safetensors.numpy import load_file, save_file

from mla_jax.checkpoints.weights import params_from_hf
from mla_jax.config import MLAConfig

CONFIG = MLAConfig(
    hidden_size=24,
    num_heads=3,
    q_lora_rank=10,
    kv_lora_rank=14,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
)
CONFIGS = {
    "low_rank_q": CONFIG,
    "direct_q": dataclasses.replace(CONFIG, q_lora_rank=None),
    "bias": dataclasses.replace(CONFIG, attention_bias=True),
    "direct_q_bias": dataclasses.replace(CONFIG, q_lora_rank=None, attention_bias=True),
}
PREFIX = "model.layers.0.self_attn."
PARAMS = random_params(CONFIG)


def rewrite(folder, change):
    """Applies `change` to the dict of tensors in the folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder, pieces=3):
    """Turns the folder's single file into shards with an index, as large checkpoints have them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(pieces):
        file = f"model-{i + 1:05}-of-{pieces:05}.safetensors"
        mine = sorted(tensors)[i::pieces]
        save_file({name: tensors[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def quantize(weight, block):
    """float8 e4m3 and the factor of each block, one block at a time."""
    rows, columns = (-(-n // b) for n, b in zip(weight.shape, block, strict=True))
    scale = np.empty((rows, columns), np.float32)
    quantized = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    expected = np.empty(weight.shape, np.float32)
    for i in range(rows):
        for j in range(columns):
            at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scale[i, j] = np.abs(weight[at]).max() / 448
            quantized[at] = (weight[at] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
            expected[at] = quantized[at].astype(np.float32) * scale[i, j]
    return quantized, scale, expected


def to_fp8(folder, block):
    """Stores the matrices of the folder's checkpoint as fp8 and returns what they then mean."""
    expected = {}

    def change(tensors):
        for name, value in list(tensors.items()):
            if value.ndim == 2:
                tensors[name], tensors[name + "_scale_inv"], value = quantize(value, block)
            expected[name.removeprefix(PREFIX)] = jnp.asarray(value)

    rewrite(folder, change)
    return params_from_hf(expected, CONFIG)
