"""The op, the cache, plans and the layer on 8 devices: shard_map with default checks, jit, explicit
axes. The reference is float64, and each batch has a shard of empty requests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from paged_batch import SCALE, TOLERANCE, assert_matches, make_batch
from random_layer import random_params

import mla_jax
from mla_jax.prefill import form
from mla_jax.reference.layer import layer_float64

P = PartitionSpec
AXES = ("dp", "tp")
SEQ_LENS, QUERY_LENS = [0, 0, 5, 40, 17, 64, 1, 33], [0, 0, 1, 2, 2, 1, 1, 2]
OP_SPECS = (P("dp", None, "tp"), P(), P("dp"), P("dp"), P("dp"))

CONFIG = mla_jax.MLAConfig(
    hidden_size=16,
    num_heads=4,
    q_lora_rank=12,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    attention_bias=True,
)
TOKENS = np.array([0, 0, 5, 20, 17, 9, 1, 13], np.int32)  # of each request, after all steps
STEP = 7  # tokens per step


def mesh_of(kind):
    return jax.make_mesh((4, 2), AXES, axis_types=(kind, kind))


def put(mesh, arrays, specs):
    """Copies pytrees to a mesh. The copies can be donated: they share no memory."""

    def place(spec, tree):
        return jax.tree.map(lambda x: jax.device_put(np.array(x), NamedSharding(mesh, spec)), tree)

    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(place, tuple(specs), tuple(arrays), is_leaf=is_spec)


@functools.cache
def op_batch(dtype="float32"):
    granularity = "token" if dtype == "int8" else None
    rng = np.random.default_rng(0)
    sizes = {"num_queries": 2, "capacity": 64, "dtype": dtype, "granularity": granularity}
    batch = make_batch(rng, SEQ_LENS, QUERY_LENS, **sizes)
    return (*batch.args, batch.query_lens), batch.oracle()


def op(q, cache, tables, seq_lens, query_lens, *, implementation):
    """The op; split_kv gets a plan that is made in the same program."""
    plan = None
    if implementation == "split_kv":
        tokens, heads = q.shape[1:3]
        sizes = {"num_heads": heads, "num_query_tokens": tokens, "implementation": "split_kv"}
        plan = mla_jax.plan_decode(seq_lens, cache=cache, **sizes)
    options = {"implementation": implementation, "plan": plan, "query_lens": query_lens}
    return mla_jax.paged_mla_attention(q, cache, tables, seq_lens, softmax_scale=SCALE, **options)


def over_shards(implementation):
    return jax.shard_map(
        functools.partial(op, implementation=implementation),
        mesh=mesh_of(AxisType.Auto),
        in_specs=OP_SPECS,
        out_specs=(P("dp", None, "tp"), P("dp", None, "tp")),
    )


def test_op_under_shard_map():
    """With split_kv: test_key_shards, and tests/core/test_gradients.py with split heads."""
    args, wanted = op_batch("int8")
    assert_matches(jax.jit(over_shards(None))(*args), wanted, TOLERANCE["bfloat16"], 1e-3)


def test_other_implementations_trace(h200):
    """The types of a shard_map say what differs between devices; the values are as on one."""
    args, _ = op_batch()
    for implementation in ("reference", "xla", "split_kv", "blockwise"):
        jax.eval_shape(over_shards(implementation), *args)
    explicit = put(mesh_of(AxisType.Explicit), args, OP_SPECS)
    for implementation in ("reference", "split_kv", "blockwise"):
        jax.eval_shape(functools.partial(op, implementation=implementation), *explicit)
    cache = jax.eval_shape(lambda: mla_jax.PagedKVCache.create(4))
    args = (jnp.zeros((8, 1, 128, 576), jnp.bfloat16), cache, *args[2:4], np.ones(8, np.int32))
    o, _ = jax.eval_shape(over_shards("hopper"), *args)
    assert o.shape == (8, 1, 128, 512)


def test_op_on_explicit_axes():
    args, wanted = op_batch("int8")
    args = put(mesh_of(AxisType.Explicit), args, OP_SPECS)
    got = jax.jit(functools.partial(op, implementation=None))(*args)
    assert [tuple(x.sharding.spec)[:3] for x in got] == [("dp", None, "tp")] * 2  # as q is
    assert_matches(got, wanted, TOLERANCE["bfloat16"], 1e-3)


def test_a_plan_on_explicit_axes_is_that_of_one_device():
    (_, cache, _, seq_lens, _), _ = op_batch()
    [moved] = put(mesh_of(AxisType.Explicit), (seq_lens,), (P("dp"),))
    plan = functools.partial(mla_jax.plan_decode, cache=cache, num_heads=4)
    one, many = plan(seq_lens), plan(moved)
    for name, array in many.split.arrays().items():
        assert array.sharding.is_fully_replicated
        np.testing.assert_array_equal(array, one.split.arrays()[name])


def layer_batch(*, local_pages):
    """Weights, hidden states of all tokens, an empty cache and block tables of shuffled pages.

    local_pages: whether the pages of a block table are numbered from 0 in each of the 4 shards.
    """
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, 3 * STEP, CONFIG.hidden_size)).astype(np.float32)
    widths = {"kv_lora_rank": CONFIG.kv_lora_rank, "rope_dim": CONFIG.qk_rope_head_dim}
    cache = mla_jax.PagedKVCache.create(16, page_size=16, dtype=jnp.float32, **widths)
    pages = [rng.permutation(4) for _ in range(4)] if local_pages else rng.permutation(16)
    return random_params(CONFIG), x, cache, np.reshape(pages, (8, 2)).astype(np.int32)


def run_layer(step, mesh, params, x, cache, tables):
    """Feeds all tokens in steps of up to STEP; the outputs must be those of the whole layer."""
    batch = (P("dp"),) * 4
    specs = (mla_jax.param_specs(CONFIG, "tp"), mla_jax.cache_specs(cache, "dp"), *batch)
    params_on, cache_on = put(mesh, (params, cache), specs[:2])
    outs = []
    for start in range(0, 3 * STEP, STEP):
        query_lens = np.clip(TOKENS - start, 0, STEP)
        seq_lens = np.minimum(TOKENS, start + STEP)
        arrays = (tables, seq_lens, query_lens, x[:, start : start + STEP])
        before = cache_on.pages
        out, cache_on = step(params_on, cache_on, *put(mesh, arrays, batch))
        assert before.is_deleted()  # donated
        assert cache_on.pages.sharding.is_equivalent_to(before.sharding, 3)
        outs.append(np.asarray(out))
    out = np.concatenate(outs, 1)
    for request, count in enumerate(TOKENS):
        if count:
            mine = slice(request, request + 1), slice(0, count)
            wanted = layer_float64(CONFIG, params, x[mine])
            error = np.linalg.norm(out[mine] - wanted) / np.linalg.norm(wanted)
            assert error < 2e-5, (request, error)
        assert (out[request, count:] == np.asarray(params.b_o)).all()


def one_step(params, cache, tables, seq_lens, query_lens, x, **options):
    return mla_jax.mla_layer(
        params, CONFIG, x, cache, tables, seq_lens, query_lens=query_lens, **options
    )


def layer_over_shards(mesh, cache, **options):
    specs = mla_jax.param_specs(CONFIG, "tp"), mla_jax.cache_specs(cache, "dp")
    return jax.shard_map(
        functools.partial(one_step, head_axis="tp", **options),
        mesh=mesh,
        in_specs=(*specs, *(P("dp"),) * 4),
        out_specs=(P("dp"), specs[1]),
    )


def test_layer_on_sharded_arrays():
    """Page numbers are those of the whole cache."""
    mesh = mesh_of(AxisType.Auto)
    batch = layer_batch(local_pages=False)
    with jax.set_mesh(mesh):
        run_layer(jax.jit(one_step, donate_argnums=1), mesh, *batch)


def test_absorbed_form_on_explicit_axes():
    """Its output is sharded as x is. docs/sharding.md compares the values of a decode step."""
    mesh = mesh_of(AxisType.Explicit)
    params, x, cache, tables = layer_batch(local_pages=False)
    specs = mla_jax.param_specs(CONFIG, "tp"), mla_jax.cache_specs(cache, "dp"), *(P("dp"),) * 4
    args = params, cache, tables, TOKENS, np.minimum(TOKENS, STEP), x[:, :STEP]
    with jax.set_mesh(mesh):
        out, new = jax.eval_shape(one_step, *put(mesh, args, specs))
    assert tuple(out.sharding.spec) == ("dp", None, None)
    assert tuple(new.pages.sharding.spec) == ("dp", None, None)


def test_both_forms_under_shard_map(monkeypatch):
    """Requests of up to 5 tokens take the absorbed form and others the expanded one."""
    monkeypatch.setattr(form, "_cheaper", lambda count, *_: form.FORMS[count > 5])
    mesh = mesh_of(AxisType.Auto)
    params, x, cache, tables = layer_batch(local_pages=True)
    step = jax.jit(layer_over_shards(mesh, cache, workspace_tokens=9), donate_argnums=1)
    run_layer(step, mesh, params, x, cache, tables)


def test_expanded_form_on_explicit_axes():
    mesh = mesh_of(AxisType.Explicit)
    batch = layer_batch(local_pages=False)
    step = functools.partial(one_step, form="expanded", workspace_tokens=9)
    with jax.set_mesh(mesh):
        run_layer(jax.jit(step, donate_argnums=1), mesh, *batch)


def test_eager_append_and_gather_on_explicit_axes():
    """An int8 cache whose pages are split, to the bit as on one device."""
    rng = np.random.default_rng(2)
    make = functools.partial(mla_jax.PagedKVCache.create, 16, page_size=16, dtype=jnp.int8)
    cache = make(kv_lora_rank=16, rope_dim=4)
    kv = rng.standard_normal((8, 3, 20)).astype(np.float32)
    tables = rng.permutation(16).reshape(8, 2).astype(np.int32)
    args = kv, tables, TOKENS, np.minimum(TOKENS, 3)
    specs = mla_jax.cache_specs(cache, "dp")
    shard, *moved = put(mesh_of(AxisType.Explicit), (cache, *args), (specs, *(P("dp"),) * 4))
    one, many = cache.append(*args), shard.append(*moved)
    assert shard.pages.is_deleted()
    for name, array in many.arrays().items():
        assert array.sharding.spec[0] == "dp"
        np.testing.assert_array_equal(array, one.arrays()[name])
    rows = many.gather(moved[1], max_len=32, seq_lens=moved[2] + moved[3])
    wanted = one.gather(tables, max_len=32, seq_lens=TOKENS + args[3])
    np.testing.assert_allclose(rows, wanted, rtol=1e-6)


def test_bad_axes_are_named():
    mesh = mesh_of(AxisType.Auto)
    params, x, cache, tables = layer_batch(local_pages=True)
    three = dataclasses.replace(CONFIG, num_heads=3)
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="mesh_axis must be an axis of the mesh, one of 'dp'"):
            mla_jax.param_specs(CONFIG, "model")
        with pytest.raises(ValueError, match=r"divides config.num_heads = 3, got 'tp' of size 2"):
            mla_jax.param_specs(three, "tp")
        with pytest.raises(ValueError, match=r"divides cache.num_pages = 6, got 'dp' of size 4"):
            mla_jax.cache_specs(dataclasses.replace(cache, pages=cache.pages[:6]), "dp")
    with pytest.raises(TypeError, match="mesh_axis must be the name of a mesh axis, got 1"):
        mla_jax.cache_specs(cache, 1)
    with pytest.raises(TypeError, match="cache must be a PagedKVCache, got dict"):
        mla_jax.cache_specs({})
    with pytest.raises(TypeError, match="config must be an MLAConfig, got dict"):
        mla_jax.param_specs({}, "tp")

    def layer(config, head_axis, tokens):
        return mla_jax.mla_layer(
            params, config, x[:, :1], cache, tables, tokens, donate=False, head_axis=head_axis
        )[0]

    ones = np.ones(8, np.int32)
    with pytest.raises(ValueError, match=r"head_axis must be .* got 'tp' outside of jax.shard_map"):
        layer(CONFIG, "tp", ones)
    for config, axis, message in (
        (CONFIG, "model", r"head_axis must be .* got 'model' inside one over 'dp', 'tp'"),
        (three, "tp", r"head_axis must have a size that divides config.num_heads = 3"),
        (CONFIG, "tp", r"params must have 2 heads of 4 on each device of head_axis 'tp'"),
    ):
        call = jax.shard_map(
            functools.partial(layer, config, axis), mesh=mesh, in_specs=P(), out_specs=P()
        )
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call, ones)
