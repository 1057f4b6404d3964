"""What a checkpoint's folder may hold: other models, quantisation, foreign tensors, odd files."""

import dataclasses
import json
import os
import random

import chex
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_layer import random_params
from safetensors.numpy import load_file, save_file

from mla_jax.checkpoints import write as checkpoint_write
from mla_jax.checkpoints.files import INDEX
from mla_jax.checkpoints.load import load_hf
from mla_jax.checkpoints.read import Checkpoint, CheckpointError, dequantize_blocks
from mla_jax.checkpoints.weights import params_to_hf, save_hf
from mla_jax.config import MLAConfig

CONFIG = MLAConfig(
    hidden_size=24,
    num_heads=3,
    q_lora_rank=10,
    kv_lora_rank=14,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    rope_scaling=MLAConfig.preset("deepseek-v3").rope_scaling,
)
LAYERS = [random_params(CONFIG, seed=seed) for seed in range(3)]
PREFIX = "model.layers.0.self_attn."
ONES = np.ones((2, 2), np.float32)


@pytest.fixture
def folder(tmp_path):
    save_hf(tmp_path / "model", CONFIG, LAYERS[0])
    return tmp_path / "model"


def rewrite(folder, added=(), removed=()):
    """Adds and removes tensors of the folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if name not in removed}
    save_file(tensors | dict(added), folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def loads(folder, params=LAYERS[0], **arguments):
    chex.assert_trees_all_equal(load_hf(folder, **arguments)[1], params)


class TestPrefixes:
    @pytest.mark.parametrize(
        "name",
        [
            "vision_tower.encoder.layers.0.self_attn.q_proj.weight",
            "model.vision.layers.0.self_attn.o_proj.weight",
            "layers.7.self_attn.k_proj.weight",
            "model.layers.1.self_attn.q_proj.weight",
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.٣.self_attn.kv_b_proj.weight",
        ],
    )
    def test_only_mla_layers_count(self, folder, name):
        rewrite(folder, {name: ONES})
        assert Checkpoint(folder).layers == [0]
        loads(folder)

    def test_an_argument_chooses_among_several(self, folder):
        draft = params_to_hf(LAYERS[1], CONFIG)
        rewrite(folder, {f"draft.layers.0.self_attn.{k}": v for k, v in draft.items()})
        listed = r"found \['.*'draft.layers.0.self_attn.'.*'\]: choose one by prefix"
        with pytest.raises(CheckpointError, match=listed.replace(".*'draft", ".*draft")):
            load_hf(folder)
        for prefix in ("draft.", "draft", "draft.layers.0.self_attn."):
            loads(folder, LAYERS[1], prefix=prefix)
        loads(folder, prefix="model.")
        with pytest.raises(
            CheckpointError, match=r"prefix must be one of 'draft\.', 'model\.', got"
        ):
            load_hf(folder, prefix="vision.")
        with pytest.raises(
            CheckpointError, match=r"layer 1 must exist once.* found only layers \[0\]"
        ):
            load_hf(folder, 1, prefix="draft.")

    def test_a_layer_number_of_5000_digits(self, folder):
        rewrite(folder, {f"model.layers.{'1' * 5000}.self_attn.kv_b_proj.weight": ONES})
        with pytest.raises(CheckpointError, match=r"model: tensor 'model.layers.1.* 5000 digits"):
            load_hf(folder)


class TestQuantisation:
    @pytest.mark.parametrize(
        "quantization",
        [
            None,
            {"quant_method": "fp8", "weight_block_size": None},
            {"quant_method": "compressed-tensors", "ignore": ["re:.*self_attn.*"]},
            {"quant_method": 3, "weight_block_size": [0]},
        ],
    )
    def test_a_description_is_looked_at_where_it_is_needed(self, folder, quantization):
        edit_config(folder, quantization_config=quantization)
        loads(folder)

    @pytest.mark.parametrize("value", ["fp8", 3, [], True])
    def test_a_description_is_an_object(self, folder, value):
        edit_config(folder, quantization_config=value)
        with pytest.raises(CheckpointError, match=r"config.json: quantization_config must be an"):
            load_hf(folder)

    @pytest.mark.parametrize(
        ("method", "stored"),
        [
            ("gptq", ["qweight", "qzeros", "scales", "g_idx"]),
            ("awq", ["qweight", "qzeros", "scales"]),
            ("compressed-tensors", ["weight_packed", "weight_scale", "weight_shape"]),
            ("mxfp4", ["weight_blocks", "weight_scales"]),
        ],
    )
    def test_another_form_is_refused_by_its_name(self, folder, method, stored):
        name = PREFIX + "q_b_proj"
        rewrite(folder, {f"{name}.{form}": ONES for form in stored}, [f"{name}.weight"])
        with pytest.raises(CheckpointError, match=rf"{name} is quantised as {stored[0]}|{name}"):
            load_hf(folder)
        edit_config(folder, quantization_config={"quant_method": method})
        with pytest.raises(CheckpointError, match=f"not supported .*quant_method: '{method}'"):
            load_hf(folder)

    def test_int8_and_4_bit_weights_with_their_scales(self, folder):
        name = PREFIX + "q_b_proj.weight"
        edit_config(folder, quantization_config={"quant_method": "bitsandbytes"})
        for extra, message in (
            (name + "_scale_inv", r"must be one of F64, .* I8 .*'bitsandbytes'"),
            (name + ".absmax", r"not supported .*'bitsandbytes'"),
            (PREFIX + "q_b_proj.SCB", r"not supported .*'bitsandbytes'"),
        ):
            rewrite(folder, {name: np.ones((30, 10), np.int8), extra: ONES})
            with pytest.raises(CheckpointError, match=message):
                load_hf(folder)

    def test_fp8_needs_a_sound_description_and_scale(self, folder):
        name = PREFIX + "q_b_proj.weight"
        fp8 = {name: np.ones((30, 10), ml_dtypes.float8_e4m3fn)}
        rewrite(folder, fp8 | {name + "_scale_inv": np.ones((1, 1), ml_dtypes.float8_e4m3fn)})
        with pytest.raises(CheckpointError, match=f"{name}_scale_inv must be wider than fp8"):
            load_hf(folder)
        edit_config(folder, quantization_config={"quant_method": "fbgemm_fp8"})
        with pytest.raises(
            CheckpointError, match=r"config.json: .*quant_method must be 'fp8', got"
        ):
            load_hf(folder)

    def test_a_scale_beside_a_float_weight(self, folder):
        name = PREFIX + "q_b_proj.weight"
        rewrite(folder, {name + "_scale_inv": np.ones((1, 1), np.float32)})
        with pytest.raises(CheckpointError, match=f"{name} must be fp8, because .* got float32"):
            load_hf(folder)

    def test_blocks_may_be_far_wider_than_the_matrix(self):
        weight = np.ones((3, 2), ml_dtypes.float8_e4m3fn)
        scaled = dequantize_blocks(weight, np.full((1, 1), 5, np.float32), (2**31 - 1, 2**31 - 1))
        np.testing.assert_array_equal(scaled, np.full((3, 2), 5, np.float32))


@pytest.mark.parametrize(
    "name",
    [
        *("indexer.wq_b.weight", "sinks", "q_norm.weight", "o_proj.bias", "q_proj.weight"),
        *("kv_b_proj.lora_A.weight", "gate_proj.weight"),
    ],
)
def test_tensors_that_the_config_does_not_ask_for(folder, name):
    rewrite(folder, {PREFIX + name: ONES})
    with pytest.raises(CheckpointError, match=rf"does not ask for: {name}$"):
        load_hf(folder)


def test_tensors_that_change_nothing(folder):
    names = ("rotary_emb.inv_freq", "q_b_proj.input_scale", "k_scale", "attn.v_scale")
    rewrite(folder, {PREFIX + name: ONES for name in names})
    loads(folder)


class TestFiles:
    @pytest.mark.parametrize(
        "file",
        [
            *("../x.safetensors", "/x.safetensors", "a/../../x", "..", ".", "", "a//b", "..\\x"),
            *("a\\b", "C:x", "C:/x", "\\\\host\\x", "a\0b", "x" * 5000, "\ud800", "a\n"),
            *(None, 3, [], {}, True),
        ],
    )
    def test_an_index_names_files_of_its_folder(self, folder, file):
        weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
        (folder.parent / "x.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        name = "model.layers.9.mlp.up_proj.weight"  # not of the layer that is read
        index = folder / INDEX
        index.write_text(json.dumps({"weight_map": weight_map | {name: file}}))
        with pytest.raises(CheckpointError, match=rf"{INDEX}\b.* weight_map.*'{name}'") as caught:
            load_hf(folder)
        assert len(str(caught.value)) < 1000

    def test_links_and_folders_below_are_followed(self, folder):
        """As in the cache of Hugging Face, whose files are links to ../../blobs."""
        names = list(load_file(folder / "model.safetensors"))
        blobs = folder.parent / "blobs"
        blobs.mkdir()
        (folder / "model.safetensors").rename(blobs / "0123abcd")
        (folder / "config.json").rename(blobs / "4567")
        (folder / "config.json").symlink_to(blobs / "4567")
        (folder / "shards").mkdir()
        (folder / "shards" / "a b.safetensors").symlink_to("../../blobs/0123abcd")
        weight_map = dict.fromkeys(names, "shards/a b.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        loads(folder)
        (blobs / "0123abcd").unlink()
        with pytest.raises(CheckpointError, match=r"a b.safetensors is missing"):
            load_hf(folder)

    def test_a_tensor_in_two_files(self, folder):
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        loads(folder)
        save_file({PREFIX + "o_proj.weight": ONES}, folder / "b.safetensors")
        with pytest.raises(CheckpointError, match=r"o_proj.weight is in .*a.saf.* in .*b.saf"):
            load_hf(folder)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
    def test_a_folder_in_place_of_a_file(self, folder, name):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        with pytest.raises(CheckpointError, match=name):
            load_hf(folder)

    @pytest.mark.parametrize(
        "text",
        [
            *(b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}"),
            *(b"[]", b'{"model_type": "deepseek_v3", "model_type": "llama"}', b"\xef\xbb\xbf{}"),
        ],
        ids=range(8),
    )
    @pytest.mark.parametrize("name", ["config.json", INDEX])
    def test_text_that_is_no_sound_json(self, folder, name, text):
        (folder / name).write_bytes(text)
        with pytest.raises(CheckpointError, match=rf"{name} .*(is not JSON|must hold a JSON obj)"):
            load_hf(folder)


class TestSave:
    def test_layers_are_added_and_replaced(self, folder):
        save_hf(folder, CONFIG, LAYERS[1], layer=1)
        save_hf(folder, CONFIG, LAYERS[2], layer=61)
        assert Checkpoint(folder).layers == [0, 1, 61]
        for layer, params in zip((0, 1, 61), LAYERS, strict=True):
            loads(folder, params, layer=layer)
        before = sorted(path.name for path in folder.iterdir())
        save_hf(folder, CONFIG, LAYERS[2], layer=0)
        save_hf(folder, CONFIG, LAYERS[0], layer=1)
        assert sorted(path.name for path in folder.iterdir()) == before
        for layer, params in zip((0, 1, 61), [LAYERS[2], LAYERS[0], LAYERS[2]], strict=True):
            loads(folder, params, layer=layer)

    def test_a_layer_of_a_shared_file_is_replaced(self, folder):
        other = params_to_hf(LAYERS[1], CONFIG)
        rewrite(folder, {f"model.layers.1.self_attn.{k}": v for k, v in other.items()})
        save_hf(folder, CONFIG, LAYERS[2], layer=0)
        loads(folder, LAYERS[2], layer=0)
        loads(folder, LAYERS[1], layer=1)

    def test_the_folders_config_stays(self, folder):
        edit_config(folder, vocab_size=129280)
        save_hf(folder, CONFIG, LAYERS[1], layer=1)
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == 129280

    @pytest.mark.parametrize("layer", [0, 1])
    def test_another_config_is_refused(self, folder, layer):
        other = dataclasses.replace(CONFIG, rope_theta=5e5)
        with pytest.raises(ValueError, match=r"config.json, where rope_theta is 10000.0, got 5000"):
            save_hf(folder, other, LAYERS[1], layer=layer)
        loads(folder)

    @pytest.mark.parametrize(
        "name", ["model.embed_tokens.weight", "draft." + PREFIX + "o_proj.weight"]
    )
    def test_foreign_weights_are_not_touched(self, folder, name):
        rewrite(folder, {name: ONES})
        before = (folder / "model.safetensors").read_bytes()
        with pytest.raises(FileExistsError, match=f"{name} is here, which save_hf did not write"):
            save_hf(folder, CONFIG, LAYERS[1], layer=1)
        assert (folder / "model.safetensors").read_bytes() == before
        (folder / "config.json").unlink()
        with pytest.raises(FileExistsError, match=r"has weights but no config\.json"):
            save_hf(folder, CONFIG, LAYERS[1])

    @pytest.mark.parametrize("layer", [0, 1])
    @pytest.mark.parametrize("step", range(4))
    def test_a_crash_leaves_the_old_or_the_new(self, folder, monkeypatch, layer, step):
        """Each of the calls that change the folder fails in turn; the one after it never runs."""
        save_hf(folder, CONFIG, LAYERS[1], layer=1)
        left = iter(range(step, -1, -1))

        def failing(function):
            def call(*arguments, **options):
                if next(left) == 0:
                    raise OSError("no space left on device")
                return function(*arguments, **options)

            return call

        monkeypatch.setattr(checkpoint_write, "save_file", failing(save_file))
        monkeypatch.setattr(os, "fsync", failing(os.fsync))
        monkeypatch.setattr(os, "replace", failing(os.replace))
        with pytest.raises(OSError, match="no space left"):
            save_hf(folder, CONFIG, LAYERS[2], layer=layer)
        monkeypatch.undo()
        loads(folder, LAYERS[1 - layer], layer=1 - layer)
        loads(folder, LAYERS[layer], layer=layer)
        assert not list(folder.glob(".*"))


# Values that no key of these files may have, or that few may.
ODD = [None, True, False, 0, -1, 1.5, "x", "", [], {}, [1], {"a": 1}, 10**400, 1e300, 1e-308]
ODD += [float("nan"), float("inf"), "false", "1", 2**31, 2**63, [[[]]], "../x", "/etc/passwd"]
ODD += ["a" * 5000, "\0", "\ud800", {"type": "yarn"}, {"kv_lora_rank": 3}]
KEYS = ["index_topk", "x" * 5000, "1" * 5000, "text_config", "quantization_config"]
KEYS += [f"model.layers.{'1' * 5000}.self_attn.kv_b_proj.weight"]


def odd_json(rng, raw):
    """The bytes of a JSON object of which one value is odd, gone, or under another key too."""
    node = raw
    while True:
        key = rng.choice(list(node))
        if not isinstance(node[key], dict) or not node[key] or rng.random() < 0.3:
            break
        node = node[key]
    kind = rng.random()
    if kind < 0.2:
        del node[key]
    elif kind < 0.3:
        node[rng.choice(KEYS)] = node[key]
    else:
        node[key] = rng.choice(ODD)
    return json.dumps(raw).encode()


def odd_bytes(rng, content):
    """The bytes cut somewhere, or with some others near their start."""
    if rng.random() < 0.4:
        return content[: rng.randrange(len(content))]
    content = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        content[rng.randrange(min(len(content), 1500))] = rng.randrange(256)
    return bytes(content)


def odd_tensors(rng, content):
    """A safetensors file whose header is odd, or is said to be of an odd length."""
    length = int.from_bytes(content[:8], "little")
    header = odd_json(rng, json.loads(content[8 : 8 + length]))
    lengths = [0, 1, 2**63, 2**64 - 1, len(header) - 1, len(header) + 10, *[len(header)] * 20]
    return rng.choice(lengths).to_bytes(8, "little") + header + content[8 + length :]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_a_file_holds_it_loads_or_is_named(folder, seed):
    save_hf(folder, CONFIG, LAYERS[1], layer=1)
    files = sorted(folder.iterdir())
    rng = random.Random(seed)
    messages = []
    for _ in range(70):
        path = rng.choice(files)
        content = path.read_bytes()
        if rng.random() < 0.3:
            path.write_bytes(odd_bytes(rng, content))
        elif path.suffix == ".json":
            path.write_bytes(odd_json(rng, json.loads(content)))
        else:
            path.write_bytes(odd_tensors(rng, content))
        try:
            load_hf(folder, rng.choice([None, 0, 1]), jnp.float32)
        except CheckpointError as error:
            messages.append(str(error))
        path.write_bytes(content)
    assert len(messages) > 20
    assert all(str(folder) in message and len(message) < 1500 for message in messages)
    loads(folder)
