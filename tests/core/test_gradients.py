"""Derivatives of the paged op against autodiff in float64: modes, poison, memory, refusals.

In the batch two requests share a page, one request is invalid, and rows of padding and of unused
pages are NaN, as are their cotangents.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from paged_batch import RANK, SCALE, make_batch, relative_error
from paged_gradients import gradients_float64, tangents_float64

import mla_jax
from mla_jax.implementations import gradients

SEQ_LENS, QUERY_LENS = [40, 0, 17, 330, 5, 64], [3, 0, 1, 4, 2, 3]
INVALID = 5
HEADS = P("dp", None, "tp")


@functools.cache
def case():
    """Returns the batch, cotangents, and the gradients of q and the pages."""
    rng = np.random.default_rng(8)
    batch = make_batch(rng, SEQ_LENS, QUERY_LENS, capacity=352, layout="NZ")
    batch.block_tables[3, 0] = batch.block_tables[0, 0]
    batch.block_tables[INVALID, 2] = 10**6
    shape = batch.q.shape[:3]
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((*shape, RANK), shape)]
    q = np.array(batch.q)
    for x in (q, *arrays):
        x[INVALID] = np.nan
        for request, count in enumerate(QUERY_LENS):
            x[request, count:] = np.nan
    batch = dataclasses.replace(batch, q=jax.device_put(q))
    valid = dataclasses.replace(batch, block_tables=batch.block_tables.copy())
    valid.block_tables[INVALID, 2] = 0
    wanted = gradients_float64(valid, tuple(arrays), skip=(INVALID,))
    return batch, tuple(arrays), wanted


def attend(cache, q, pages, tables, seq_lens, query_lens, **options):
    options = {"softmax_scale": SCALE, "query_lens": query_lens} | options
    cache = dataclasses.replace(cache, pages=pages)
    return mla_jax.paged_mla_attention(q, cache, tables, seq_lens, **options)


def pulled(args, cotangents, *, transform=lambda run: run, **options):
    """Returns the gradients of q and the pages."""
    run = functools.partial(attend, case()[0].cache, **options)
    moved = transform(lambda q, pages: run(q, pages, *args[2:]))
    return jax.vjp(moved, *args[:2])[1](cotangents)


def arguments(batch):
    lens = batch.seq_lens, batch.query_lens
    return batch.q, batch.cache.pages, batch.block_tables, *lens


@functools.cache
def through_remat():
    options = {"rescale": "exponent_add", "transform": jax.checkpoint}
    return jax.jit(functools.partial(pulled, **options))


def over_shards():
    specs = HEADS, P(), P("dp"), P("dp"), P("dp")
    return jax.jit(
        jax.shard_map(
            functools.partial(pulled, implementation="split_kv"),
            mesh=jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2),
            in_specs=(specs, (HEADS, HEADS)),
            out_specs=(HEADS, P()),
        )
    )


def by_reference():
    return jax.jit(functools.partial(pulled, implementation="reference"))


@pytest.mark.parametrize("program", [through_remat, over_shards, by_reference])
def test_gradients_match_autodiff_in_float64(program, monkeypatch):
    monkeypatch.setattr(gradients, "BLOCK_ROWS", 12)  # 3 tokens: the second block overlaps
    batch, cotangents, wanted = case()
    got = program()(arguments(batch), cotangents)
    for one, want in zip(got, wanted, strict=True):
        assert one.dtype == jnp.float32
        assert relative_error(one, want) < 1e-6
        np.testing.assert_allclose(one, want, rtol=0, atol=1e-5)


def test_vmap_and_keys_without_a_mask():
    """The gradient of shared pages is the sum over the mapped axis."""
    batch, cotangents, _ = case()
    q, pages, tables, *lens = arguments(batch)
    twice = jnp.stack([q, 2 * q]), pages

    def both(run):
        return jax.vmap(run, in_axes=(0, None))

    mapped = jax.jit(functools.partial(pulled, causal=False, transform=both))
    got = mapped((*twice, tables, *lens), tuple(np.stack([d, -d]) for d in cotangents))
    wanted = [
        gradients_float64(
            dataclasses.replace(batch, q=twice[0][i]),
            tuple(sign * d for d in cotangents),
            causal=False,
            skip=(INVALID,),
        )
        for i, sign in enumerate((1, -1))
    ]
    assert relative_error(got[0], np.stack([d_q for d_q, _ in wanted])) < 1e-6
    assert relative_error(got[1], wanted[0][1] + wanted[1][1]) < 1e-6


def test_forward_mode():
    """Of o and lse, along q and the pages; NaN in what no query sees has no influence."""
    batch, *_ = case()
    rng = np.random.default_rng(9)
    along = [rng.standard_normal(x.shape).astype(np.float32) for x in arguments(batch)[:2]]
    q, pages, *rest = arguments(batch)
    run = functools.partial(attend, batch.cache)
    push = jax.jit(lambda d, *rest: jax.jvp(lambda *at: run(*at, *rest), (q, pages), d)[1])
    wanted = tangents_float64(batch, along, skip=(INVALID,))
    for one, want in zip(push(tuple(along), *rest), wanted, strict=True):
        one = np.delete(one, INVALID, 0)
        assert relative_error(one, np.delete(want, INVALID, 0)) < 1e-6


@pytest.mark.parametrize("name", ["q", "key", "cotangent"])
def test_what_is_not_finite_keeps_to_those_who_see_it(name):
    batch, (d_o, d_lse), _ = case()
    q, pages, *rest = arguments(batch)
    if name == "q":
        q = q.at[3, 1, 2, 5].set(np.nan)
    elif name == "key":  # the last key of request 3, which only its last query sees
        page = batch.block_tables[3, 329 // 16]
        pages = pages.at[page, 0, 329 % 16, 3].set(np.inf)
    else:
        d_o = d_o.copy()
        d_o[3, 1, 2, 5] = np.inf
    before = through_remat()(arguments(batch), case()[1])
    d_q, d_pages = (np.array(x) for x in through_remat()((q, pages, *rest), (d_o, d_lse)))
    row = np.s_[3, 3] if name == "key" else np.s_[3, 1, 2]
    assert np.isnan(d_q[row]).all()
    mine = batch.block_tables[3, : -(-330 // 16)]
    assert np.isnan(d_pages[mine[0]]).any()
    d_q[row] = before[0][row]
    d_pages[mine] = before[1][mine]
    np.testing.assert_array_equal(d_q, before[0])
    np.testing.assert_array_equal(d_pages, before[1])


def test_memory_is_linear_in_length():
    """No array of the program has more values than o and q, or a block of scores of `xla`."""
    tokens = 2**15
    cache = mla_jax.PagedKVCache.create(tokens // 64, kv_lora_rank=24, rope_dim=8, dtype="float32")
    q = jax.ShapeDtypeStruct((1, tokens, 4, 32), jnp.float32)
    tables = np.arange(tokens // 64, dtype=np.int32)[None]

    def loss(q, cache):
        lens = jnp.full(1, tokens, jnp.int32)
        return mla_jax.paged_mla_attention(q, cache, tables, lens, softmax_scale=1.0)[0].sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(q, cache).as_text()
    shapes = re.findall(r"tensor<([\dx]+)x[a-z]", text)
    sizes = [math.prod(map(int, shape.split("x"))) for shape in shapes]
    assert tokens * 4 * 32 < max(sizes) == tokens * 4 * 256


def test_kernels_and_refusals(h200):
    """What has no derivative raises one error, in both modes and under jit."""
    half = make_batch(np.random.default_rng(3), [40, 7], [1, 1], page_size=64, dtype="bfloat16")
    cache = mla_jax.PagedKVCache.create(4, dtype=jnp.bfloat16)
    q = jnp.ones((2, 1, 16, 576), jnp.bfloat16)

    def loss(q, cache, implementation=None):
        run = functools.partial(mla_jax.paged_mla_attention, implementation=implementation)
        tables, lens = half.block_tables, half.seq_lens
        return run(q, cache, tables % 4, lens, softmax_scale=SCALE)[0].astype(jnp.float32).sum()

    of_hopper = functools.partial(loss, implementation="hopper")
    program = jax.jit(jax.grad(of_hopper, argnums=(0, 1))).trace(q, cache)
    assert [x.dtype for x in jax.tree.leaves(program.out_info)] == [jnp.bfloat16] * 2
    assert str(program.jaxpr).count("mla_attention[") == 1  # the forward pass, and once
    assert "mla_derivative" not in str(jax.make_jaxpr(of_hopper)(q, cache))

    int8 = mla_jax.PagedKVCache.create(4, dtype="int8")
    assert jax.eval_shape(jax.grad(loss), q, int8).dtype == jnp.bfloat16
    by_scales = lambda scales: loss(q, dataclasses.replace(int8, scales=scales))  # noqa: E731
    second = lambda q: jax.grad(lambda q: loss(q, cache))(q).sum()  # noqa: E731
    for function, at, message in (
        (by_scales, int8.scales, "with respect to an int8 cache: use a cache of float32, bfloat16"),
        (second, q, 'only, .* use paged_mla_attention or mla_layer with implementation="reference'),
    ):
        for derivative in (jax.grad(function), lambda x: jax.jvp(function, (x,), (x,))):  # noqa: B023
            with pytest.raises(TypeError, match=message):
                jax.eval_shape(jax.jit(derivative), at)
    twice = jax.hessian(lambda q: loss(q, cache, "reference"))
    assert jax.eval_shape(twice, q).shape == q.shape * 2
