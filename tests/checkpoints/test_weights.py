"""Weights of checkpoints as published: one file or shards, any layer, fp8 blocks."""

import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_layer import random_params
from safetensors.numpy import load_file, save_file
from small_checkpoint import CONFIG, CONFIGS, PREFIX, edit_config, quantize, rewrite, shard, to_fp8

from mla_jax.checkpoints.load import load_hf
from mla_jax.checkpoints.read import Checkpoint, CheckpointError, dequantize_blocks
from mla_jax.checkpoints.sources import hf_shapes
from mla_jax.checkpoints.weights import (
    check_params,
    init_params,
    param_shapes,
    params_from_hf,
    params_to_hf,
    save_hf,
)
from mla_jax.config import MLAConfig


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_init_has_the_shapes_of_the_config(config):
    params = jax.eval_shape(lambda key: init_params(key, config, jnp.bfloat16), jax.random.key(0))
    check_params(params, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert len(jax.tree.leaves(params)) == sum(s is not None for s in param_shapes(config).values())


def test_init_is_seeded_and_keeps_unit_variance():
    wide = MLAConfig(hidden_size=256, num_heads=4, q_lora_rank=128, kv_lora_rank=128)
    params = init_params(jax.random.key(1), wide)
    chex.assert_trees_all_equal(params, init_params(jax.random.key(1), wide))
    assert not np.array_equal(params.w_uk, init_params(jax.random.key(2), wide).w_uk)
    for weight, fan_in in ((params.w_dq, 256), (params.w_uk, 128), (params.w_o, 4 * 128)):
        assert float(jnp.std(weight)) == pytest.approx(fan_in**-0.5, rel=0.05)


@pytest.mark.parametrize("layer", [0, 11])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_save_load_round_trip(tmp_path, config, layer):
    params = random_params(config)
    save_hf(tmp_path / "new", config, params, layer=layer)
    loaded_config, loaded = load_hf(tmp_path / "new", layer)
    assert loaded_config == config
    chex.assert_trees_all_equal(loaded, params)
    shapes = {k: v.shape for k, v in params_to_hf(params, config).items()}
    assert shapes == hf_shapes(config)
    chex.assert_trees_all_equal(params_from_hf(params_to_hf(params, config), config), params)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_loads_any_stored_dtype_as_any_dtype(checkpoint, stored, wanted):
    rewrite(checkpoint, lambda t: t.update({k: v.astype(stored) for k, v in t.items()}))
    _, params = load_hf(checkpoint, dtype=wanted)
    expected = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x).astype(stored), wanted), random_params(CONFIG)
    )
    chex.assert_trees_all_equal(params, expected)


def test_kv_b_proj_is_split_by_head(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    params = load_hf(checkpoint)[1]
    kv_b = tensors[PREFIX + "kv_b_proj.weight"]
    np.testing.assert_array_equal(params.w_uk[1], kv_b[11 : 11 + 6])
    np.testing.assert_array_equal(params.w_uv[1], kv_b[11 + 6 : 22].T)


def test_shards_with_an_index(checkpoint):
    shard(checkpoint)
    chex.assert_trees_all_equal(load_hf(checkpoint)[1], random_params(CONFIG))


def test_only_the_shards_of_the_layer_need_to_be_there(checkpoint):
    index = shard(checkpoint)
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.1.self_attn.o_proj.weight"] = "not-downloaded.safetensors"
    index.write_text(json.dumps(content))
    chex.assert_trees_all_equal(load_hf(checkpoint)[1], random_params(CONFIG))


def test_one_of_many_layers_under_any_prefix(tmp_path):
    tensors = {}
    for layer in (1, 11, 61):  # 61: DeepSeek-V3's MTP module, past its 61 layers
        params = random_params(CONFIG, seed=layer)
        for name, value in params_to_hf(params, CONFIG).items():
            tensors[f"language_model.model.layers.{layer}.self_attn.{name}"] = value
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": CONFIG.to_hf()}))
    assert Checkpoint(tmp_path).layers == [1, 11, 61]
    for layer in (1, 11, 61):
        chex.assert_trees_all_equal(load_hf(tmp_path, layer)[1], random_params(CONFIG, seed=layer))
    chex.assert_trees_all_equal(load_hf(tmp_path)[1], random_params(CONFIG, seed=1))


@pytest.mark.parametrize("shape", [(128, 128), (256, 128), (576, 300), (130, 1), (5, 129)])
def test_dequantize_blocks_of_128_with_ragged_edges(shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight *= np.linspace(0.1, 10, shape[1], dtype=np.float32)
    quantized, scale, expected = quantize(weight, (128, 128))
    np.testing.assert_array_equal(dequantize_blocks(quantized, scale), expected)
    # Half a step of e4m3 at its top, 256 .. 448, is 16 of 448.
    np.testing.assert_allclose(expected, weight, rtol=0, atol=16.1 / 448 * np.abs(weight).max())


@pytest.mark.parametrize("block", [(128, 128), (7, 9), (16, 4)])
def test_fp8_weights_with_block_scales(checkpoint, block):
    expected = to_fp8(checkpoint, block)
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    edit_config(checkpoint, quantization_config=quantization)
    chex.assert_trees_all_equal(load_hf(checkpoint)[1], expected)


def test_fp8_blocks_are_128_by_default(checkpoint):
    expected = to_fp8(checkpoint, (128, 128))
    chex.assert_trees_all_equal(load_hf(checkpoint)[1], expected)


def test_layers_and_dtypes_may_be_numpys_and_names(checkpoint):
    for layer, dtype in ((np.uint8(0), "bfloat16"), (np.int64(0), np.dtype("bfloat16"))):
        params = load_hf(checkpoint, layer, dtype)[1]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_nan_is_loaded_and_overflow_is_not(checkpoint):
    name = PREFIX + "o_proj.weight"
    rewrite(checkpoint, lambda t: t[name].__setitem__((0, 0), np.nan))
    for dtype in (jnp.float32, jnp.float16):
        assert np.isnan(np.asarray(load_hf(checkpoint, dtype=dtype)[1].w_o)[0, 0, 0])
    rewrite(checkpoint, lambda t: t[name].__setitem__((0, 1), 1e5))
    assert np.asarray(load_hf(checkpoint)[1].w_o)[0, 1, 0] == 1e5
    with pytest.raises(CheckpointError, match=rf"{name} holds 100000.0, .* range of float16"):
        load_hf(checkpoint, dtype=jnp.float16)
