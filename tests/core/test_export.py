"""`jax.export` of decode steps and ops on a CPU: the kernels that they hold, and the pytrees."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doc_blocks import run_blocks
from jax import export
from paged_batch import relative_error
from random_layer import random_params

import mla_jax
from mla_jax import DecodePlan, MLAConfig, PagedKVCache, plan_decode
from mla_jax.export import pytrees
from mla_jax.export.pytrees import StoredForm
from mla_jax.reference.layer import layer_float64
from pallas_kernels.hopper import device
from pallas_kernels.hopper.tuned import config_of_height, tile_heights

KERNEL = "mosaic_gpu_v2"
CONFIG = MLAConfig(
    hidden_size=32,
    num_heads=8,
    q_lora_rank=None,
    kv_lora_rank=128,
    qk_nope_head_dim=16,
    qk_rope_head_dim=64,
    v_head_dim=16,
)
TABLES = np.array([[2], [0]], np.int32)


def new_cache(**options):
    widths = {"kv_lora_rank": 128, "rope_dim": 64}
    return PagedKVCache.create(3, page_size=64, **widths | options)


@jax.jit
def planned(seq_lens, cache):
    return plan_decode(seq_lens, cache=cache, num_heads=8, max_seq_len=64, profile="H200_SXM")


def test_the_page_and_the_decode_loop_that_it_begins():
    """The page's program is for both platforms. Three steps of a loop give the layer's outputs,
    with the plan and the donated cache as arguments."""
    page = run_blocks("export.md", at_least=2)
    assert page["exported"].mlir_module().count(KERNEL) == 2  # decode and merge
    params, tables, config = page["params"], page["tables"], page["config"]
    new = np.random.default_rng(1).standard_normal((2, 2, config.hidden_size))
    x = np.concatenate([page["x"], new.astype(jnp.bfloat16)], 1)
    plan_of, cache, out = jax.jit(page["plan_of"]), page["cache"], [page["out"]]
    for i in (1, 2):
        old, lens = cache, np.full(2, i + 1, np.int32)
        plan = plan_of(lens, cache)
        o, cache = page["run"](params, x[:, i : i + 1], cache, tables, lens, plan)
        assert old.pages.is_deleted()
        out.append(o)
    got, wanted = np.concatenate(out, 1).astype(np.float64), layer_float64(config, params, x)
    assert relative_error(got, wanted) < 1e-2
    other = jax.eval_shape(
        functools.partial(plan_decode, cache=cache, num_heads=8, profile="H20"), lens
    )
    with pytest.raises(ValueError, match=r"(?s)same pytree structure .*H20'.*H200_SXM"):
        jax.eval_shape(page["loaded"].call, params, x[:, :1], cache, tables, lens, other)


def test_no_cta_of_an_exported_program_waits_for_another(monkeypatch):
    """On a machine with an H200 too: the program may run on a GPU with fewer SMs."""
    monkeypatch.setattr(device, "machine_sms", lambda: 132)
    attend = functools.partial(
        mla_jax.paged_mla_attention, softmax_scale=0.1, implementation="hopper"
    )
    q = jnp.ones((2, 1, 8, 192), jnp.bfloat16)
    exported = export.export(jax.jit(attend), platforms=("cuda",))(
        q, new_cache(), TABLES, np.ones(2, np.int32)
    )
    # The plan is a launch, and the merge is one of its own.
    assert exported.mlir_module().count(KERNEL) == 3


def stored(tree):
    """The tree's structure as a program on a CPU stores it."""
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    return bytes(export.export(jax.jit(lambda tree: tree), platforms=("cpu",))(structs).serialize())


def test_pytrees_are_stored_whole():
    split = planned(np.ones(2, np.int32), new_cache()).split
    caches = [
        new_cache(),
        new_cache(layout="NZ"),
        new_cache(dtype="int8", scale_granularity="group"),
        new_cache(dtype="int8", scale_granularity="tensor", scale=0.1),
        new_cache(num_layers=2),
        new_cache(num_layers=2).layer(1),
    ]
    tiles = [
        config_of_height(rows, cache=cache)
        for cache in ("float", "int8")
        for rows in tile_heights(cache)
    ]
    assert len({type(one) for one in tiles}) == 4
    plans = [DecodePlan(split, one, 132) for one in tiles]
    bias = dataclasses.replace(CONFIG, q_lora_rank=8, attention_bias=True)
    params = [random_params(config, jnp.bfloat16) for config in (CONFIG, bias)]
    tree = caches, plans, params, split, DecodePlan(split)
    loaded = export.deserialize(stored(tree))
    assert loaded.out_tree == jax.tree.structure(tree)


def test_reading_loads_what_compiles_kernels(monkeypatch):
    form, loaded = StoredForm.of(PagedKVCache), []
    stored = form.to_bytes([16] * len(form.static))
    monkeypatch.setattr(pytrees.importlib, "import_module", loaded.append)
    form.from_bytes(stored)
    assert loaded == ["jax.experimental.mosaic.gpu"]


def test_what_another_version_stored_is_refused_by_name():
    plan = planned(np.ones(2, np.int32), new_cache())
    data = stored(plan)
    for old, new, message in (
        (
            b'"version": 1, "arrays": ["split", "work"]',
            b'"version": 2, "arrays": ["split", "work"]',
            "DecodePlan",
        ),
        (b'"fixed"', b'"mixed"', "mla_jax.SplitPlan has mixed, wanted only request, row_tile"),
        (b'"decode_transposed"', b'"decode_transposer"', "kernel must be one of decode_t"),
        (b'"q_stages"', b'"z_stages"', "config of decode_transposed has no field z_stages"),
        (b'"rows_per_tile": 8, "kv_', b'"rows_per_tile": 9, "kv_', "H200_SXM: rows_per_tile = 9"),
    ):
        assert old in data
        assert len(new) == len(old)  # the blob has offsets
        with pytest.raises(ValueError, match=message):
            export.deserialize(bytearray(data.replace(old, new)))


def test_a_field_that_is_added_later_has_its_default():
    @functools.partial(
        jax.tree_util.register_dataclass, data_fields=["pages"], meta_fields=["page_size"]
    )
    @dataclasses.dataclass(frozen=True)
    class Before:
        pages: jax.Array
        page_size: int

    @functools.partial(
        jax.tree_util.register_dataclass,
        data_fields=["first_page", "pages"],
        meta_fields=["layers", "page_size"],
    )
    @dataclasses.dataclass(frozen=True)
    class After:
        pages: jax.Array
        page_size: int
        first_page: jax.Array | None = None
        layers: int = 1

    before, after = StoredForm.of(Before), StoredForm.of(After)
    assert (after.arrays, after.static) == (("first_page", "pages"), ("layers", "page_size"))
    data = before.to_bytes([np.int64(64)])
    assert json.loads(data)["static"] == {"page_size": 64}
    assert after.build(after.from_bytes(data), [0.0]) == After(0.0, 64)


def test_a_plan_names_the_gpu_that_it_is_for(monkeypatch):
    class Card:
        platform, compute_capability, core_count, device_kind = "gpu", "9.0", 78, "NVIDIA H20"

    def planned_for():
        make = functools.partial(plan_decode, cache=new_cache(), num_heads=8)
        plan = jax.eval_shape(make, jax.ShapeDtypeStruct((2,), jnp.int32))
        return plan.profile, plan.num_sms

    assert planned_for() == ("H200_SXM", 132)
    monkeypatch.setattr(device, "card", Card)
    assert planned_for() == ("H20", 78)
