"""Context parallelism on CPU devices: the keys of every request are split over a mesh axis.

The references are float64 and one device. Rows that nobody may read are NaN, and each batch has
devices without a key.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from paged_batch import SCALE, TOLERANCE, assert_matches, make_batch
from random_layer import random_params

import mla_jax
from mla_jax.reference.layer import layer_float64

P = PartitionSpec
PAGE = 16
CAPACITY = 96  # tokens that a block table of one device reaches in the op's tests
SEQ_LENS, QUERY_LENS = [0, 1, 16, 50, 17, 49, 96, 33, 20], [0, 1, 3, 2, 3, 0, 3, 3, 3]
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
TOKENS = np.array([0, 36, 1, 20], np.int32)  # of each request, after all steps
STEP = 12  # tokens per step


def mesh_of(**sizes):
    count = int(np.prod(list(sizes.values())))
    kinds = (AxisType.Auto,) * len(sizes)
    devices = jax.devices()[:count]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def spread(rng, batch, devices, layers):
    """Returns the cache and the block tables of a batch, spread over devices: the arrays of one
    device after those of another, as `P("cp")` splits them. Each device has pages of its own.

    The last layer of the cache has the batch. The others hold poison."""
    tables, cache = batch.block_tables, batch.cache
    pages = -(-CAPACITY // (devices * PAGE))  # entries of one device's block tables
    first = (layers - 1) * len(tables) * pages
    owned = rng.choice([-1, 2**31 - 1, 0], (devices, len(tables), pages)).astype(np.int32)
    arrays = {}
    for name, x in cache.arrays().items():
        poison = 9 if x.dtype == "int8" else np.nan
        arrays[name] = np.full(
            (devices, layers * len(tables) * pages, *x.shape[1:]), poison, x.dtype
        )
    for device in range(devices):
        free = list(rng.permutation(len(tables) * pages))
        for request, length in enumerate(batch.seq_lens):
            for entry, page in enumerate(range(device, -(-length // PAGE), devices)):
                owned[device, request, entry] = to = free.pop()
                for name, array in cache.arrays().items():
                    arrays[name][device, first + to] = array[tables[request, page]]
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in arrays.items()}
    return dataclasses.replace(cache, num_layers=layers, **jax.device_put(flat)), owned.reshape(
        -1, pages
    )


def op(q, cache, tables, seq_lens, query_lens, *, implementation):
    cache, plan = cache.layer(cache.num_layers - 1), None
    if implementation == "split_kv":
        sizes = {"num_heads": q.shape[2], "num_query_tokens": q.shape[1], "cache": cache}
        plan = mla_jax.plan_decode(
            seq_lens, kv_axis="cp", query_lens=query_lens, implementation="split_kv", **sizes
        )
    options = {"implementation": implementation, "plan": plan, "query_lens": query_lens}
    return mla_jax.paged_mla_attention(
        q, cache, tables, seq_lens, softmax_scale=SCALE, kv_axis="cp", **options
    )


@pytest.mark.parametrize(
    ("implementation", "dtype", "devices", "layers"),
    [(None, "float32", 3, 2), ("split_kv", "int8", 8, 1)],
)
def test_op(implementation, dtype, devices, layers):
    """Every query token sees the keys up to its position, whichever device has them."""
    rng = np.random.default_rng(devices)
    granularity = "token" if dtype == "int8" else None
    sizes = {"capacity": CAPACITY, "dtype": dtype, "granularity": granularity}
    batch = make_batch(rng, SEQ_LENS, QUERY_LENS, **sizes)
    cache, tables = spread(rng, batch, devices, layers)
    seq_lens, o_lse = batch.seq_lens.copy(), batch.oracle()
    bad = {3: "query length", 4: "length", 7: "page"} if implementation is None else {}
    if bad:
        seq_lens[4] = -(-CAPACITY // (devices * PAGE)) * devices * PAGE + 1
        batch.query_lens[3] = 4
        tables[2 * len(SEQ_LENS) + 7, 0] = -1  # the third device's, for the last token only
    call = jax.shard_map(
        functools.partial(op, implementation=implementation),
        mesh=mesh_of(cp=devices),
        in_specs=(P(), mla_jax.cache_specs(cache, kv_axis="cp"), P("cp"), P(), P()),
        out_specs=P(),
    )
    o, lse = jax.jit(call)(batch.q, cache, tables, seq_lens, batch.query_lens)
    for request in bad:
        assert np.isnan(o[request]).all(), bad[request]
        assert np.isnan(lse[request]).all(), bad[request]
    good = [request for request in range(len(SEQ_LENS)) if request not in bad]
    tolerance = TOLERANCE["bfloat16" if dtype == "int8" else dtype]
    got, wanted = ([np.asarray(x)[good] for x in pair] for pair in ((o, lse), o_lse))
    assert_matches(got, wanted, tolerance, 1e-3 if dtype == "int8" else 2e-5)


def layer(params, cache, tables, seq_lens, query_lens, x, **options):
    cache = cache.layer(cache.num_layers - 1)
    return mla_jax.mla_layer(
        params, CONFIG, x, cache, tables, seq_lens, query_lens=query_lens, **options
    )


def layer_batch(pages=6, layers=1):
    """Weights, hidden states of all tokens, a cache of NaN, and block tables.

    The cache is for 4 devices, with requests 0, 1 on two of them and requests 2, 3 on the others.
    The entries of block tables are page numbers of one device, the same on both.
    """
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 3 * STEP, CONFIG.hidden_size)).astype(np.float32)
    tables = np.reshape([rng.permutation(pages) for _ in range(2)], (4, pages // 2))
    widths = {"kv_lora_rank": CONFIG.kv_lora_rank, "rope_dim": CONFIG.qk_rope_head_dim}
    widths |= {"page_size": PAGE, "dtype": jnp.float32, "num_layers": layers}
    cache = mla_jax.PagedKVCache.create(4 * pages, **widths)
    cache = dataclasses.replace(cache, pages=np.full(cache.pages.shape, np.nan, np.float32))
    return random_params(CONFIG), x, tables.astype(np.int32), cache


def layer_over(mesh, cache):
    """The layer with requests, keys and heads split over an axis each."""
    specs = mla_jax.param_specs(CONFIG, "tp"), mla_jax.cache_specs(cache, "dp", kv_axis="cp")
    return jax.shard_map(
        functools.partial(layer, head_axis="tp", kv_axis="cp"),
        mesh=mesh,
        in_specs=(*specs, *(P("dp"),) * 4),
        out_specs=(P("dp"), specs[1]),
    )


def test_layer_and_its_cache():
    """Steps of a prefill: outputs are those of the whole layer, a row is on its owner alone.

    Of two layers in each device's part of the pool, the second has the rows.
    """
    params, x, tables, cache = layer_batch(layers=2)
    first = cache.num_pages // 4
    step = jax.jit(layer_over(mesh_of(dp=2, cp=2, tp=2), cache), donate_argnums=1)
    outs = []
    for start in range(0, 3 * STEP, STEP):
        query_lens = np.clip(TOKENS - start, 0, STEP)
        arrays = np.minimum(TOKENS, start + STEP), query_lens, x[:, start : start + STEP]
        out, cache = step(params, cache, tables, *arrays)
        outs.append(np.asarray(out))
    out = np.concatenate(outs, 1)
    rows = np.array(cache.pages).reshape(2, 2, -1, *cache.pages.shape[1:])
    for request, count in enumerate(TOKENS):
        if count:
            mine = slice(request, request + 1), slice(0, count)
            wanted = layer_float64(CONFIG, params, x[mine])
            error = np.linalg.norm(out[mine] - wanted) / np.linalg.norm(wanted)
            assert error < 2e-5, (request, error)
        assert (out[request, count:] == np.asarray(params.b_o)).all()
        for position in range(count):  # take away what was to be written
            page, offset = divmod(position, PAGE)
            row = rows[request // 2, page % 2, first + tables[request, page // 2], offset]
            assert np.isfinite(row).all(), (request, position)
            row[:] = np.nan
    assert np.isnan(rows).all()


def test_gradients_of_the_layer():
    """As on one device: with respect to the weights, x and the pages; some devices have no key."""
    params, x, tables, cache = layer_batch()
    rng = np.random.default_rng(3)
    cache = dataclasses.replace(cache, pages=rng.standard_normal(cache.pages.shape, np.float32))
    page = np.arange(2 * tables.shape[1])  # of a request; below, its number in the whole cache
    device = 2 * (np.arange(4) // 2)[:, None] + page % 2
    whole = (device * (cache.num_pages // 4) + tables[:, page // 2]).astype(np.int32)
    lengths = TOKENS, np.array([0, 3, 1, 3], np.int32)
    d_out = rng.standard_normal((4, 3, CONFIG.hidden_size), np.float32)

    def gradients(step, tables):
        def loss(params, x, pages):
            out, new = step(params, dataclasses.replace(cache, pages=pages), tables, *lengths, x)
            return jnp.vdot(out, d_out) + jnp.vdot(new.pages, new.pages)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(params, x[:, :3], cache.pages)

    got = gradients(layer_over(mesh_of(dp=2, cp=2, tp=2), cache), tables)
    for ours, wanted in zip(*map(jax.tree.leaves, (got, gradients(layer, whole))), strict=True):
        assert np.linalg.norm(ours - wanted) < 2e-5 * np.linalg.norm(wanted)


def test_what_does_not_fit_is_named():
    mesh = mesh_of(dp=2, cp=2, tp=2)
    params, x, tables, cache = layer_batch()
    q, ones = np.zeros((4, 1, 4, 20), np.float32), np.ones(4, np.int32)

    def attend(cache, q, lens, *, axis="cp", tokens=1, planned_by=None, **options):
        sizes = {"cache": cache, "num_heads": 4, "num_query_tokens": tokens}
        if planned_by is not None:
            options["plan"] = mla_jax.plan_decode(
                lens, implementation="split_kv", kv_axis=planned_by or None, **sizes
            )
        lens = {"seq_lens": lens, "softmax_scale": SCALE}
        return mla_jax.paged_mla_attention(q, cache, tables, kv_axis=axis, **lens, **options)[0]

    def run_layer(cache, x, lens, *, config=CONFIG, axis="cp", **options):
        layer = functools.partial(mla_jax.mla_layer, params, config)
        return layer(x[:, :1], cache, tables, lens, kv_axis=axis, **options)[0]

    def append(cache, kv, lens):
        return cache.append(kv[:, :, 0], tables, lens, kv_axis="cp").pages

    def on_devices(function, *arguments, differs=None, **options):
        """Calls it with an argument that has other values on each device."""
        arguments = list(arguments)
        if differs is not None:
            arguments[differs] += jax.lax.axis_index("cp").astype(arguments[differs].dtype)
        return function(*arguments, **options)

    split = mla_jax.cache_specs(cache, kv_axis="cp")
    fits = split, P(), P()
    cases = (
        (attend, fits, {"axis": "model"}, "kv_axis must be an axis of jax.shard_map, got 'model'"),
        (attend, fits, {"axis": 1}, "kv_axis must be the name of a mesh axis, got 1"),
        (attend, (P(), P(), P()), {}, "cache must be split over kv_axis 'cp'"),
        (attend, fits, {"differs": 1}, "q must be equal on the devices of kv_axis 'cp'"),
        (attend, fits, {"differs": 2}, "seq_lens must be equal on the devices of kv_axis"),
        (attend, fits, {"planned_by": ""}, "plan must be split over kv_axis 'cp'"),
        (attend, fits, {"planned_by": "cp", "tokens": 2}, "plan must be for 4 requests of 4 rows"),
        (append, (P(), P(), P()), {}, "cache must be split over kv_axis 'cp'"),
        (append, fits, {"differs": 1}, "kv must be equal on the devices of kv_axis 'cp'"),
        (run_layer, fits, {"differs": 1}, "x must be equal on the devices of kv_axis 'cp'"),
        (run_layer, (P(), P(), P()), {}, "cache must be split over kv_axis 'cp'"),
        (run_layer, fits, {"head_axis": "cp"}, "kv_axis must be another axis than head_axis"),
        (run_layer, fits, {"form": "expanded"}, "kv_axis is for the absorbed form"),
    )
    for function, specs, options, message in cases:
        arguments = cache, x if function is run_layer else q, ones
        call = functools.partial(on_devices, function, **options)
        call = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P("cp"))
        with pytest.raises((TypeError, ValueError), match=message):
            jax.eval_shape(call, *arguments)

    with pytest.raises(ValueError, match=r"kv_axis must be .* got 'cp' outside of jax.shard_map"):
        attend(cache, q, ones)
    with pytest.raises(ValueError, match="kv_axis must be another axis than mesh_axis"):
        mla_jax.cache_specs(cache, "cp", kv_axis="cp")
    odd = dataclasses.replace(cache, pages=cache.pages[:6])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="kv_axis must have a size that div"):
        mla_jax.cache_specs(odd, "dp", kv_axis="cp")


def test_the_hopper_kernels_trace(h200):
    cache = jax.eval_shape(lambda: mla_jax.PagedKVCache.create(8))
    call = jax.shard_map(
        functools.partial(op, implementation="hopper"),
        mesh=mesh_of(cp=2),
        in_specs=(P(), mla_jax.cache_specs(cache, kv_axis="cp"), P(), P(), P()),
        out_specs=P(),
    )
    q, lens = jax.ShapeDtypeStruct((3, 2, 16, 576), jnp.bfloat16), np.ones(3, np.int32)
    o, lse = jax.eval_shape(call, q, cache, np.zeros((3, 2), np.int32), lens, lens)
    assert (o.shape, lse.shape) == ((3, 2, 16, 512), (3, 2, 16))
