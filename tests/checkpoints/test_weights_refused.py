"""Broken checkpoints, and arguments that do not fit: each is refused with its name."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_layer import random_params
from safetensors.numpy import save_file
from small_checkpoint import CONFIG, CONFIGS, PARAMS, PREFIX, edit_config, rewrite, shard, to_fp8

from mla_jax.checkpoints.load import load_hf
from mla_jax.checkpoints.read import CheckpointError
from mla_jax.checkpoints.sources import hf_shapes
from mla_jax.checkpoints.weights import (
    check_params,
    init_params,
    rotate_latent,
    save_hf,
)

KEY = jax.random.key(0)


def but(**changes):
    return dataclasses.replace(PARAMS, **changes)


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
        (lambda f: save_hf(f, CONFIG, {}), TypeError, "params must be an MLAParams, got {}"),
        (lambda f: save_hf(f / "config.json", CONFIG, PARAMS), FileExistsError, "folder must be"),
        (lambda f: check_params(None, CONFIG), TypeError, "params must be an MLAParams, got None"),
        (lambda f: check_params(PARAMS, {}), TypeError, "config must be an MLAConfig, got {}"),
        (lambda f: check_params(but(w_dkv=[1.0]), CONFIG), ValueError, r"params.w_dkv must be \("),
        (lambda f: check_params(but(norm_kv=[1.0] * 14), CONFIG), TypeError, "params.norm_kv must"),
        (
            lambda f: check_params(but(norm_kv=np.ones(14, np.int8)), CONFIG),
            TypeError,
            "params.norm_kv must be an array of float32, .* got int8",
        ),
        (lambda f: rotate_latent(None), TypeError, "params must be an MLAParams, got None"),
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


def test_check_params_names_what_is_missing():
    with pytest.raises(ValueError, match=r"params.w_dq must be \(24, 10\) .* got None"):
        check_params(dataclasses.replace(random_params(CONFIG), w_dq=None), CONFIG)
    with pytest.raises(ValueError, match=r"params.w_dq must be None for this config"):
        check_params(random_params(CONFIG), CONFIGS["direct_q"])
