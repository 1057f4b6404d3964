"""Checkpoints as published: one file or shards, any layer, fp8 blocks; each way to be broken."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_layer import random_params
from safetensors.numpy import load_file, save_file

from mla_jax.checkpoints.read import Checkpoint, CheckpointError, dequantize_blocks
from mla_jax.checkpoints.weights import (
    check_params,
    hf_shapes,
    init_params,
    load_hf,
    param_shapes,
    params_from_hf,
    params_to_hf,
    rotate_latent,
    save_hf,
)
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
KEY = jax.random.key(0)


def but(**changes):
    return dataclasses.replace(PARAMS, **changes)


@pytest.fixture
def checkpoint(tmp_path):
    save_hf(tmp_path, CONFIG, random_params(CONFIG))
    return tmp_path


def rewrite(folder, change):
    """Applies `change` to the dict of tensors in the folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


@pytest.mark.parametrize("shape", [(128, 128), (256, 128), (576, 300), (130, 1), (5, 129)])
def test_dequantize_blocks_of_128_with_ragged_edges(shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight *= np.linspace(0.1, 10, shape[1], dtype=np.float32)
    quantized, scale, expected = quantize(weight, (128, 128))
    np.testing.assert_array_equal(dequantize_blocks(quantized, scale), expected)
    # Half a step of e4m3 at its top, 256 .. 448, is 16 of 448.
    np.testing.assert_allclose(expected, weight, rtol=0, atol=16.1 / 448 * np.abs(weight).max())


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


@pytest.mark.parametrize("block", [(128, 128), (7, 9), (16, 4)])
def test_fp8_weights_with_block_scales(checkpoint, block):
    expected = to_fp8(checkpoint, block)
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    edit_config(checkpoint, quantization_config=quantization)
    chex.assert_trees_all_equal(load_hf(checkpoint)[1], expected)


def test_fp8_blocks_are_128_by_default(checkpoint):
    expected = to_fp8(checkpoint, (128, 128))
    chex.assert_trees_all_equal(load_hf(checkpoint)[1], expected)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("name", hf_shapes(CONFIG))
def test_missing_tensor_is_named(checkpoint, name):
    rewrite(checkpoint, lambda t: t.pop(PREFIX + name))
    with pytest.raises(CheckpointError, match=rf"tensor {PREFIX}{name} is missing"):
        load_hf(checkpoint)


@pytest.mark.parametrize("name", hf_shapes(CONFIG))
def test_wrong_shape_is_named(checkpoint, name):
    rewrite(checkpoint, lambda t: t.update({PREFIX + name: t[PREFIX + name][:-1].copy()}))
    with pytest.raises(CheckpointError, match=rf"{PREFIX}{name} must be \(.*\), got \("):
        load_hf(checkpoint)


def test_missing_and_wrong_fp8_scales_are_named(checkpoint):
    to_fp8(checkpoint, (16, 4))
    with pytest.raises(CheckpointError, match=r"weight_scale_inv must be .* blocks of \(128, 128"):
        load_hf(checkpoint)
    fp8 = ml_dtypes.float8_e4m3fn
    for name in (
        "q_a_proj.weight_scale_inv is missing",
        "q_a_layernorm.weight is fp8 but not a matrix",
    ):
        tensors = {PREFIX + k: np.ones(s, fp8) for k, s in hf_shapes(CONFIG).items()}
        if "layernorm" in name:
            tensors[PREFIX + "q_a_proj.weight"] = np.ones((10, 24), np.float32)
        save_file(tensors, checkpoint / "model.safetensors")
        with pytest.raises(CheckpointError, match=name):
            load_hf(checkpoint)


def test_layer_that_is_not_there(checkpoint):
    with pytest.raises(CheckpointError, match=r"layer 7 must exist once.* only layers \[0\]"):
        load_hf(checkpoint, 7)
    with pytest.raises(ValueError, match="layer must be 0 or more, got -1"):
        load_hf(checkpoint, -1)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a sound safetensors file"):
        load_hf(checkpoint)


def test_garbage_file(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 4096)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a sound safetensors file"):
        load_hf(checkpoint)


def test_shard_that_is_not_there(checkpoint):
    shard(checkpoint)
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is missing"):
        load_hf(checkpoint)


def test_index_that_lies(checkpoint):
    index = shard(checkpoint)
    content = json.loads(index.read_text())
    name = PREFIX + "o_proj.weight"
    content["weight_map"][name] = next(
        file for file in content["weight_map"].values() if file != content["weight_map"][name]
    )
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing, though the index has it"):
        load_hf(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_broken_index(checkpoint, text):
    (checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json has no sound weight_map"):
        load_hf(checkpoint)


def test_dtype_that_is_not_a_weights(checkpoint):
    name = PREFIX + "o_proj.weight"
    rewrite(checkpoint, lambda t: t.update({name: t[name].astype(np.int8)}))
    with pytest.raises(CheckpointError, match=f"{name} must be one of F64, .*, got I8"):
        load_hf(checkpoint)


def test_layer_that_is_there_twice(checkpoint):
    rewrite(checkpoint, lambda t: t.update({f"draft.{k}": v for k, v in t.items()}))
    with pytest.raises(CheckpointError, match=r"layer 0 must exist once.* found \['"):
        load_hf(checkpoint)


def test_folder_without_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    with pytest.raises(CheckpointError, match=r"has no model.safetensors and no index"):
        load_hf(tmp_path)


@pytest.mark.parametrize("block", [None, 128, [128], [128, 0], ["a", 1]])
def test_broken_block_size(checkpoint, block):
    edit_config(checkpoint, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    chex.assert_trees_all_equal(load_hf(checkpoint)[1], random_params(CONFIG))  # no use of blocks
    to_fp8(checkpoint, (128, 128))
    with pytest.raises(CheckpointError, match="weight_block_size must be two positive integers"):
        load_hf(checkpoint)


def test_save_writes_nothing_on_error(tmp_path):
    wrong = dataclasses.replace(random_params(CONFIG), w_uk=jnp.zeros((4, 6, 14)))
    with pytest.raises(ValueError, match=r"params.w_uk must be \(3, 6, 14\) .* got \(4, 6, 14\)"):
        save_hf(tmp_path / "new", CONFIG, wrong)
    with pytest.raises(ValueError, match="rms_norm_eps"):
        save_hf(
            tmp_path / "new", dataclasses.replace(CONFIG, rms_norm_eps=1e-5), random_params(CONFIG)
        )
    assert not (tmp_path / "new").exists()


def test_save_refuses_a_folder_with_shards(checkpoint):
    shard(checkpoint)
    with pytest.raises(FileExistsError, match="a sharded checkpoint is here already"):
        save_hf(checkpoint, CONFIG, random_params(CONFIG))
    chex.assert_trees_all_equal(load_hf(checkpoint)[1], random_params(CONFIG))


def test_load_refuses_a_dtype_that_is_no_float(checkpoint):
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*, got 'int8'"):
        load_hf(checkpoint, dtype=jnp.int8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: load_hf(f, layer="0"), TypeError, "layer must be an integer, got '0'"),
        (lambda f: load_hf(f, layer=True), TypeError, "layer must be an integer, got True"),
        (lambda f: load_hf(f, layer=1.0), TypeError, "layer must be an integer, got 1.0"),
        (lambda f: load_hf(f, layer=10**5000), ValueError, "layer must be 0 or more, got a int"),
        (lambda f: load_hf(f, dtype="x"), TypeError, "dtype must be one of float32, .* got 'x'"),
        (lambda f: load_hf(f, dtype=None), TypeError, "dtype must be one of .* got None"),
        (lambda f: load_hf(f, dtype=[3]), TypeError, r"dtype must be one of .* got \[3\]"),
        (lambda f: load_hf(f, dtype=jnp.int8), ValueError, "dtype must be one of .* got 'int8'"),
        (lambda f: load_hf(f, dtype="float64"), ValueError, "dtype must be one of"),
        (lambda f: load_hf(f, prefix=3), TypeError, "prefix must be a string or None, got 3"),
        (lambda f: load_hf(None), TypeError, "folder must be a path, got None"),
        (lambda f: load_hf(f / "config.json"), CheckpointError, "folder must be .* is a file"),
        (lambda f: load_hf(f / "missing"), FileNotFoundError, "no config.json at .*missing"),
        (lambda f: load_hf("x" * 5000), FileNotFoundError, "no config.json at"),
        (lambda f: load_hf("a\0b"), FileNotFoundError, "no config.json at"),
        (lambda f: save_hf(f, CONFIG, PARAMS, layer="0"), TypeError, "layer must be an integer"),
        (lambda f: save_hf(f, CONFIG, PARAMS, layer=-1), ValueError, "layer must be 0 or more"),
        (lambda f: save_hf(None, CONFIG, PARAMS), TypeError, "folder must be a path, got None"),
        (lambda f: save_hf(f, None, PARAMS), TypeError, "config must be an MLAConfig, got None"),
        (lambda f: save_hf(f, CONFIG, {}), TypeError, "params must be MLAParams, got {}"),
        (lambda f: save_hf(f / "config.json", CONFIG, PARAMS), FileExistsError, "folder must be"),
        (lambda f: check_params(None, CONFIG), TypeError, "params must be MLAParams, got None"),
        (lambda f: check_params(PARAMS, {}), TypeError, "config must be an MLAConfig, got {}"),
        (lambda f: check_params(but(w_dkv=[1.0]), CONFIG), ValueError, r"params.w_dkv must be \("),
        (lambda f: check_params(but(norm_kv=[1.0] * 14), CONFIG), TypeError, "params.norm_kv must"),
        (
            lambda f: check_params(but(norm_kv=np.ones(14, np.int8)), CONFIG),
            TypeError,
            "params.norm_kv must be an array of float32, .* got int8",
        ),
        (lambda f: rotate_latent(None), TypeError, "params must be MLAParams, got None"),
        (lambda f: rotate_latent(but(w_uk=None)), TypeError, "params.w_uk must be an array"),
        (lambda f: rotate_latent(but(w_uk=PARAMS.w_uv)), ValueError, "params.w_uk must be .H, nop"),
        (lambda f: init_params(KEY, CONFIG, jnp.int8), ValueError, "dtype must be .* got 'int8'"),
        (lambda f: init_params(KEY, CONFIG, bool), ValueError, "dtype must be .* got 'bool'"),
        (lambda f: init_params(KEY, CONFIG, "x"), TypeError, "dtype must be .* got 'x'"),
        (lambda f: init_params(KEY, None), TypeError, "config must be an MLAConfig, got None"),
        (lambda f: init_params(0, CONFIG), TypeError, "key must be one key of jax.random, got 0"),
        (lambda f: init_params(jnp.ones(2), CONFIG), TypeError, "key must be one key"),
    ],
)
def test_arguments_are_named(checkpoint, call, error, message):
    with pytest.raises(error, match=message):
        call(checkpoint)
    chex.assert_trees_all_equal(load_hf(checkpoint)[1], PARAMS)


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


def test_check_params_names_what_is_missing():
    with pytest.raises(ValueError, match=r"params.w_dq must be \(24, 10\) .* got None"):
        check_params(dataclasses.replace(random_params(CONFIG), w_dq=None), CONFIG)
    with pytest.raises(ValueError, match=r"params.w_dq must be None for this config"):
        check_params(random_params(CONFIG), CONFIGS["direct_q"])
