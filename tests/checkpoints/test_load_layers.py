"""Many layers in one pass: stacked or listed, on shards, reading no more than they need."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from random_layer import random_params
from safetensors.numpy import load_file, save_file
from small_checkpoint import CONFIGS, quantize

from mla_jax import load_hf, load_hf_layers, param_specs
from mla_jax.checkpoints import files, load
from mla_jax.checkpoints.placement import placements
from mla_jax.checkpoints.read import Checkpoint, CheckpointError
from mla_jax.checkpoints.sources import hf_shapes, hf_sources
from mla_jax.checkpoints.weights import params_from_hf, params_to_hf, save_hf

CONFIG = dataclasses.replace(CONFIGS["bias"], num_heads=4, num_hidden_layers=3)
BLOCK = (16, 4)
LAYERS = [random_params(CONFIG, seed=seed) for seed in range(4)]  # 3 is an MTP module
OTHERS = ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight")


def stack(params):
    return jax.tree.map(lambda *weights: np.stack(weights), *params)


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory):
    """Four layers in three shards, whose matrices are fp8, and what they mean."""
    folder = tmp_path_factory.mktemp("fp8")
    tensors = {name: np.full((3, 5), np.nan, np.float32) for name in OTHERS}
    expected = []
    for layer, params in enumerate(LAYERS):
        meaning = params_to_hf(params, CONFIG)
        for name, value in list(meaning.items()):
            full = f"model.layers.{layer}.self_attn.{name}"
            tensors[full] = value
            if value.ndim == 2:
                tensors[full], tensors[full + "_scale_inv"], meaning[name] = quantize(value, BLOCK)
        expected.append(params_from_hf(meaning, CONFIG))
    weight_map = {}
    for i in range(3):
        file = f"model-{i}.safetensors"
        mine = sorted(tensors)[i::3]  # a matrix and its factors are in two files
        save_file({name: tensors[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    (folder / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    quantization = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    config = CONFIG.to_hf() | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, expected


@pytest.fixture
def folder(tmp_path):
    """Three layers in a file each."""
    for layer, params in enumerate(LAYERS[:3]):
        save_hf(tmp_path, CONFIG, params, layer=layer)
    return tmp_path


def test_one_pass_over_the_files(fp8_folder, monkeypatch):
    folder, expected = fp8_folder
    headers, opened, reads, reported = [], [], [], []
    read_header, read_values, file_io = files._read_header, files.TensorFile._values, files.FileIO

    def values(self, entry, first, count):
        start = entry.start + first * entry.dtype.itemsize
        reads.append((self._path, start, start + count * entry.dtype.itemsize))
        return read_values(self, entry, first, count)

    monkeypatch.setattr(files, "_read_header", lambda p: headers.append(p) or read_header(p))
    monkeypatch.setattr(files, "FileIO", lambda p: opened.append(p) or file_io(p))
    monkeypatch.setattr(files.TensorFile, "_values", values)
    config, params = load_hf_layers(folder, progress=lambda *done: reported.append(done))
    assert config == CONFIG
    chex.assert_trees_all_equal(params, stack(expected[:3]))

    assert len(headers) == len(set(headers)) == len(opened) == len(set(opened)) == 3
    wanted = [
        (path, *entry["data_offsets"])
        for path in sorted(headers)
        for name, entry in sorted(read_header(path).items(), key=lambda i: i[1]["data_offsets"])
        if name not in OTHERS and ".layers.3." not in name and not name.endswith("_scale_inv")
    ]
    assert [read for read in reads if read in wanted] == wanted  # in order, each once
    factors = {read for read in reads if read not in wanted}
    assert len(factors) == 3 * 5  # of each matrix of three layers

    assert [total for _, total in reported] == [reported[-1][0]] * len(reported)
    assert [done for done, _ in reported] == sorted({done for done, _ in reported})
    assert len(reported) == 3 * len(hf_shapes(CONFIG))


def test_a_list_in_the_order_that_was_asked_for(fp8_folder, monkeypatch):
    monkeypatch.setattr(load, "_CHUNK", 100)  # several blocks of rows, which end within a factor's
    folder, expected = fp8_folder
    config, params = load_hf_layers(folder, np.array([3, 0]), "bfloat16", stacked=False)
    assert config == CONFIG
    wanted = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected[i]) for i in (3, 0)]
    chex.assert_trees_all_equal(params, wanted)
    chex.assert_trees_all_equal(load_hf(folder, 3, jnp.bfloat16)[1], wanted[0])


class TestSharded:
    @pytest.mark.parametrize("stacked", [True, False])
    def test_specs_of_a_mesh(self, fp8_folder, stacked):
        folder, expected = fp8_folder
        mesh = jax.make_mesh((4, 2), ("dp", "tp"))
        with jax.set_mesh(mesh):
            specs = dataclasses.replace(param_specs(CONFIG, "dp"), w_dkv=P("dp", "tp"))
            _, params = load_hf_layers(folder, stacked=stacked, sharding=specs)
        chex.assert_trees_all_equal(
            jax.device_get(params), stack(expected[:3]) if stacked else expected[:3]
        )
        one = params if stacked else params[1]
        layer = (None,) * stacked
        for weight, spec in ((one.w_o, P(*layer, "dp")), (one.w_dkv, P(*layer, "dp", "tp"))):
            assert weight.sharding.is_equivalent_to(NamedSharding(mesh, spec), weight.ndim)

    def test_one_sharding_for_all_weights(self, folder):
        device = jax.devices()[3]
        _, params = load_hf_layers(
            folder, [1], stacked=False, sharding=SingleDeviceSharding(device)
        )
        chex.assert_trees_all_equal(params, LAYERS[1:2])
        assert {leaf.device for leaf in jax.tree.leaves(params)} == {device}

    def test_a_process_reads_its_own_slices(self, fp8_folder, monkeypatch):
        folder, _ = fp8_folder
        mesh = jax.make_mesh((2, 2), ("dp", "tp"))
        specs = dataclasses.replace(param_specs(CONFIG, "tp"), w_dkv=P("dp", "tp"))
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda spec: isinstance(spec, P)
        )
        placed = placements(shardings, CONFIG, None)
        monkeypatch.setattr(  # of this process only the last device
            NamedSharding,
            "addressable_devices_indices_map",
            lambda self, shape: dict([list(self.devices_indices_map(shape).items())[-1]]),
        )
        with Checkpoint(folder) as checkpoint:
            for field, source in hf_sources(CONFIG).items():
                name, box = f"model.layers.0.self_attn.{source.tensor}", placed[field].box()
                whole = checkpoint.read(name, [(0, size) for size in source.tensor_shape])
                mine = source.viewed(checkpoint.read(name, box))
                at = zip(source.origin(box), mine.shape, strict=True)
                there = source.viewed(whole)[tuple(slice(o, o + size) for o, size in at)]
                np.testing.assert_array_equal(mine, there, err_msg=field)
                halves = np.s_[12:, 9:] if field == "w_dkv" else ()
                if field in ("w_uk", "w_uv", "w_o"):
                    halves = np.s_[2:]
                elif field == "w_uq":
                    halves = np.s_[:, 2:]
                half = source.weight(whole)[halves]
                np.testing.assert_array_equal(mine.transpose(source.axes), half, err_msg=field)

    @pytest.mark.parametrize(
        ("sharding", "error", "message"),
        [
            ("tp", TypeError, "sharding must be a NamedSharding, .* got 'tp'"),
            (P("sp"), ValueError, "sharding does not fit the mesh: .*sp"),
            (P(None, None, None), ValueError, r"sharding does not fit w_dq \[24, 10\]: .* dims"),
            ({"w_uq": P(None, ("dp", "tp"))}, ValueError, r"sharding.w_uq does not fit .* 8 times"),
            ({"w_o": None}, TypeError, r"sharding.w_o must be a sharding, got None"),
        ],
    )
    def test_shardings_that_do_not_fit(self, folder, sharding, error, message):
        mesh = jax.make_mesh((4, 2), ("dp", "tp"))
        if isinstance(sharding, dict):
            sharding = dataclasses.replace(param_specs(CONFIG, "tp"), **sharding)
        with jax.set_mesh(mesh), pytest.raises(error, match=message):
            load_hf_layers(folder, sharding=sharding)

    def test_specs_without_a_mesh(self, folder):
        with pytest.raises(ValueError, match=r"sharding is a PartitionSpec, which needs a mesh"):
            load_hf_layers(folder, sharding=P())

    def test_a_sharding_of_a_weight_that_is_not_there(self, tmp_path):
        config = CONFIGS["direct_q"]
        save_hf(tmp_path, config, random_params(config))
        specs = dataclasses.replace(
            jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), random_params(config)),
            b_o=SingleDeviceSharding(jax.devices()[0]),
        )
        with pytest.raises(ValueError, match=r"sharding.b_o must be None: the config has no such"):
            load_hf_layers(tmp_path, sharding=specs)


class TestRefused:
    """Each before a weight is read."""

    @pytest.fixture(autouse=True)
    def unread(self, monkeypatch):
        monkeypatch.setattr(files.TensorFile, "_values", None)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"layers": [0, 7]}, CheckpointError, r"layer 7 must exist once.* \[0, 1, 2\]$"),
            ({"layers": []}, ValueError, "layers must name a layer, got none"),
            ({"layers": [2, 1, 2]}, ValueError, "layers must name each layer once, got 2 twice"),
            ({"layers": 3}, TypeError, "layers must be layer numbers or None, got 3"),
            ({"layers": "01"}, TypeError, "layers must be layer numbers or None, got '01'"),
            ({"layers": [0, -1]}, ValueError, r"layers\[1\] must be 0 or more, got -1"),
            ({"layers": [True]}, TypeError, r"layers\[0\] must be an integer, got True"),
            ({"dtype": "int8"}, ValueError, "dtype must be one of float32, .*, got 'int8'"),
            ({"stacked": 1}, TypeError, "stacked must be True or False, got 1"),
            ({"progress": 3}, TypeError, "progress must be callable or None, got 3"),
            ({"prefix": 3}, TypeError, "prefix must be a string or None, got 3"),
        ],
    )
    def test_arguments(self, folder, arguments, error, message):
        with pytest.raises(error, match=message):
            load_hf_layers(folder, **arguments)

    def test_fewer_layers_than_the_config_has(self, folder):
        text = json.dumps(CONFIG.to_hf() | {"num_hidden_layers": 2**31 - 1})
        (folder / "config.json").write_text(text)
        message = r"layer 3 must exist once.*\(config.json has 2147483647 layers; the argument lay"
        with pytest.raises(CheckpointError, match=message):
            load_hf_layers(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda value: value[:-1].copy(), r"2.self_attn.o_proj.weight must be \(24, 20\), got"),
            (lambda value: None, r"tensor model.layers.2.self_attn.o_proj.weight is missing"),
            (lambda value: value.astype(np.int8), r"2.self_attn.o_proj.weight must be .* got I8"),
            (
                lambda value: value.astype(ml_dtypes.float8_e4m3fn),
                r"2.self_attn.o_proj.weight_scale_inv is missing",
            ),
        ],
    )
    def test_a_layer_that_differs(self, folder, change, message):
        path, name = (
            folder / "model-layer-00002.safetensors",
            "model.layers.2.self_attn.o_proj.weight",
        )
        tensors = load_file(path)
        changed = change(tensors.pop(name))
        save_file(tensors if changed is None else tensors | {name: changed}, path)
        with pytest.raises(CheckpointError, match=message):
            load_hf_layers(folder)

    def test_a_file_that_the_index_names(self, folder):
        (folder / "model-layer-00001.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model-layer-00001.safetensors is missing"):
            load_hf_layers(folder)
