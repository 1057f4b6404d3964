"""Packed tokens (`cu_q_lens`): prefill chunks, drafts and decode steps in one call, no padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from paged_batch import RANK, ROPE, SCALE, TOLERANCE, make_batch
from small_layer import SMALL, new_cache, random_layer, relative_error

from mla_jax import MLAConfig, PagedKVCache, attend, mla_layer, paged_mla_attention, plan_decode
from mla_jax.prefill import form as layer_form
from mla_jax.reference.layer import layer_float64
from mla_jax.reference.naive import naive_mla_layer
from mla_jax.splits.plan import check_plan

SEQ_LENS, QUERY_LENS = [40, 0, 70, 17, 33, 16], [5, 0, 33, 1, 2, 16]
PADDING = 4


def bounds(query_lens):
    return np.append(0, np.cumsum(query_lens)).astype(np.int32)


def packed(padded, query_lens, padding=PADDING, fill=np.nan):
    """Returns [T, ...]: the real tokens of [B, S, ...], then some that hold `fill`."""
    rows = [row[:count] for row, count in zip(np.asarray(padded), query_lens, strict=True)]
    return np.concatenate([*rows, np.full((padding, *rows[0].shape[1:]), fill, rows[0].dtype)])


def test_op():
    """One program serves a valid batch, and one in which every kind of request is invalid.

    q comes in two arrays; in test_keys_over_devices it is one.
    """
    batch = make_batch(np.random.default_rng(1), SEQ_LENS, QUERY_LENS)
    count = sum(QUERY_LENS) + PADDING

    @jax.jit
    def run(q, block_tables, seq_lens, cu_q_lens):
        options = {"softmax_scale": SCALE, "cu_q_lens": cu_q_lens}
        return paged_mla_attention(q, batch.cache, block_tables, seq_lens, **options)

    q, cu_q_lens = packed(batch.q, QUERY_LENS), bounds(QUERY_LENS)
    q = q[..., :RANK], q[..., RANK:]
    o, lse = run(q, batch.block_tables, batch.seq_lens, cu_q_lens)
    wanted_o, wanted_lse = (packed(x, QUERY_LENS, fill=0) for x in batch.oracle())
    tolerance = {"atol": TOLERANCE["float32"], "rtol": 0}
    real = np.arange(count) < cu_q_lens[-1]
    np.testing.assert_allclose(np.asarray(o)[real], wanted_o[real], **tolerance)
    np.testing.assert_allclose(np.asarray(lse)[real], wanted_lse[real], **tolerance)
    assert not np.asarray(o)[~real].any()
    assert np.isneginf(np.asarray(lse)[~real]).all()

    lens, tables = batch.seq_lens.copy(), batch.block_tables.copy()
    lens[0], lens[2], tables[4, 1] = 10**6, 32, 10**6  # past the table; fewer than tokens; a page
    o, lse = run(q, tables, lens, cu_q_lens)
    bad = np.repeat([True, False, True, False, True, False, False], [*QUERY_LENS, PADDING])
    assert np.isnan(np.asarray(o)[bad]).all()
    assert np.isnan(np.asarray(lse)[bad]).all()
    np.testing.assert_allclose(np.asarray(o)[real & ~bad], wanted_o[real & ~bad], **tolerance)
    falls = cu_q_lens.copy()
    falls[3] = 0  # request 2 ends before it starts, and request 3 starts in an earlier one
    o, _ = run(q, batch.block_tables, batch.seq_lens, falls)
    bad = np.repeat([False, False, True, True, False, False, False], [*QUERY_LENS, PADDING])
    assert np.isnan(np.asarray(o)[bad]).all()
    np.testing.assert_allclose(np.asarray(o)[real & ~bad], wanted_o[real & ~bad], **tolerance)


def test_plan():
    """A plan of packed tokens is one of requests of one token, with the keys that each sees."""
    cache = make_batch(np.random.default_rng(1), [1], [1]).cache
    options = {"cache": cache, "num_heads": 4, "implementation": "split_kv"}
    lens, count = np.array([7, 0, 2, 300], np.int32), 9
    cu_q_lens = bounds([3, 0, 1, 2])
    plan = plan_decode(lens, cu_q_lens=cu_q_lens, num_query_tokens=count, **options)
    seen = np.array([5, 6, 7, 2, 299, 300, 0, 0, 0], np.int32)
    check_plan(plan.split, seen)
    with pytest.raises(ValueError, match="does not cover request 4"):
        check_plan(plan.split, seen + 64 * (np.arange(count) == 4).astype(np.int32))


@pytest.mark.parametrize("form", ["absorbed", "expanded", None])
def test_layer_in_steps(form, monkeypatch):
    """Chunks behind prefixes, decode steps and requests without tokens, traced once.

    None: requests of up to four tokens in the absorbed form, the others in the expanded form, and
    steps that have only the ones or the others.
    Then one request per form is invalid: its rows are NaN, and it writes nothing.
    """
    monkeypatch.setattr(layer_form, "_cheaper", lambda count, *_: layer_form.FORMS[count > 4])
    steps = np.array([(9, 0, 1, 4), (0, 5, 4, 2), (1, 1, 1, 1), (7, 3, 6, 0), (6, 6, 5, 1)])
    total = steps.sum(axis=0)
    params, x = random_layer(SMALL, batch=4, length=int(total.max()))
    wanted, x = layer_float64(SMALL, params, x), np.asarray(x)
    cache, tables = new_cache(SMALL, 4, int(total.max()), num_layers=2)
    nan = jax.device_put(np.full(cache.pages.shape, np.nan, np.float32))
    cache = PagedKVCache(**vars(cache) | {"pages": nan})
    width, traces = 18, []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(x, cache, tables, lens, cu_q_lens):
        traces.append(1)
        options = {"cu_q_lens": cu_q_lens, "form": form, "workspace_tokens": 30}
        return mla_layer(params, SMALL, x, cache.layer(1), tables, lens, **options)

    lens = np.zeros(4, np.int32)
    for counts in steps:
        new = np.zeros((4, width, x.shape[2]), np.float32)
        for b, count in enumerate(counts):
            new[b, :count] = x[b, lens[b] : lens[b] + count]
        before, lens = lens, (lens + counts).astype(np.int32)
        used = np.arange(tables.shape[1]) * cache.page_size < lens[:, None]
        tokens = packed(new, counts, width - counts.sum())
        call = np.where(used, tables, -7), lens, bounds(counts)
        out, cache = step(tokens, cache, *call)
        exact = [row[a:b] for row, a, b in zip(wanted, before, lens, strict=True)]
        exact = np.concatenate(exact)
        out = np.asarray(out)
        assert relative_error(out[: len(exact)], exact) < 2e-6
        assert not out[len(exact) :].any()

    before, pages = lens, np.array(cache.pages)
    counts, lens = np.array([7, 3, 6, 1]), before + np.array([10, 3, 6, 1], np.int32)
    assert lens[0] == 33  # a table has 32 tokens
    new = np.zeros((4, width, x.shape[2]), np.float32)
    for b in (2, 3):
        new[b, : counts[b]] = x[b, before[b] : lens[b]]
    places = [
        (len(tables) * 2 + np.asarray(tables)[b, t // cache.page_size], t % cache.page_size)
        for b in (2, 3)
        for t in range(before[b], lens[b])
    ]  # the second layer's pages come after the first's
    wrong = np.array(tables)
    wrong[1, 1] = 10**6
    out, cache = step(packed(new, counts, 1), cache, wrong, lens, bounds(counts))
    out = np.asarray(out)
    assert np.isnan(out[:10]).all()
    assert relative_error(out[10:16], wanted[2, before[2] : lens[2]]) < 2e-6
    assert relative_error(out[16], wanted[3, before[3]]) < 2e-6
    assert not out[17].any()
    after = np.asarray(cache.pages)
    is_same = (after == pages) | (np.isnan(after) & np.isnan(pages))
    assert sorted(zip(*np.nonzero(~is_same.all(-1)), strict=True)) == sorted(places)
    assert len(traces) == 1


def test_gradients():
    """Compares the expanded form with packed tokens, behind a condition, with the naive layer.

    Outputs are those of float64.
    """
    params, x = random_layer(SMALL, batch=2, length=11)
    x = np.asarray(x)
    cache, tables = new_cache(SMALL, 2, 11)
    lens, cu_q_lens = np.array([11, 7], np.int32), bounds([11, 7])
    weights = np.random.default_rng(0).standard_normal((18, 20)).astype(np.float32)

    def loss(params, x):
        options = {"cu_q_lens": cu_q_lens, "form": "expanded", "donate": False}
        out, _ = mla_layer(params, SMALL, x, cache, tables, lens, **options)
        return jnp.vdot(out, weights), out

    def exact(params, x):
        out = naive_mla_layer(params, SMALL, x)
        return jnp.vdot(out[0], weights[:11]) + jnp.vdot(out[1, :7], weights[11:])

    tokens = jax.device_put(np.concatenate([x[0], x[1, :7]]))
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (of_params, of_x), out = gradients(params, tokens)
    wanted = layer_float64(SMALL, params, x)
    assert relative_error(out, np.concatenate([wanted[0], wanted[1, :7]])) < 2e-6
    exact_of_params, exact_of_x = jax.jit(jax.grad(exact, argnums=(0, 1)))(params, x)
    exact_of_x = np.asarray(exact_of_x)
    assert relative_error(of_x, np.concatenate([exact_of_x[0], exact_of_x[1, :7]])) < 1e-5
    for got, wanted in zip(*map(jax.tree.leaves, (of_params, exact_of_params)), strict=True):
        assert relative_error(got, wanted) < 1e-5


def test_keys_over_devices():
    """With kv_axis each device has every second page of a request."""
    batch = make_batch(np.random.default_rng(2), SEQ_LENS, QUERY_LENS)
    split = PartitionSpec("cp")
    kinds = (AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("cp",), axis_types=kinds, devices=jax.devices()[:2])
    pages = np.concatenate([batch.cache.pages] * 2)
    tables = np.stack([batch.block_tables[:, ::2], batch.block_tables[:, 1::2]])

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), split, split),
        out_specs=PartitionSpec(),
    )
    def run(q, pages, tables):
        cache = PagedKVCache(**vars(batch.cache) | {"pages": pages})
        lens = jnp.asarray(batch.seq_lens), jnp.asarray(bounds(QUERY_LENS))
        options = {"softmax_scale": SCALE, "kv_axis": "cp", "cu_q_lens": lens[1]}
        return paged_mla_attention(q, cache, tables[0], lens[0], **options)

    o, lse = run(packed(batch.q, QUERY_LENS), pages, tables)
    for got, wanted in zip((o, lse), batch.oracle(), strict=True):
        real = packed(wanted, QUERY_LENS, padding=0)
        np.testing.assert_allclose(np.asarray(got)[: len(real)], real, atol=2e-5)
    tables[1, 2, 1] = -1  # a page of request 2 on one device, which its first tokens do not see
    o, _ = run(packed(batch.q, QUERY_LENS), pages, tables)
    bad = np.isnan(np.asarray(o)).all(axis=(1, 2))
    assert np.flatnonzero(bad).tolist() == list(range(5, 38))


def test_append():
    """The rows of packed tokens are where the block tables say; nothing else is written."""
    batch = make_batch(np.random.default_rng(3), SEQ_LENS, QUERY_LENS)
    rows = np.random.default_rng(4).standard_normal((6, 33, 48)).astype(np.float32)
    before, wanted = batch.seq_lens - batch.query_lens, np.array(batch.cache.pages)
    for b, count in enumerate(QUERY_LENS):
        t = before[b] + np.arange(count)
        wanted[batch.block_tables[b, t // 16], t % 16] = rows[b, :count]
    got = batch.cache.append(
        packed(rows, QUERY_LENS), batch.block_tables, before,
        cu_q_lens=bounds(QUERY_LENS), donate=False,
    )  # fmt: skip
    np.testing.assert_array_equal(got.pages, wanted)


def test_attend():
    """The new tokens' rows are NaN in the cache until `attend` appends them; q is a pair."""
    batch = make_batch(np.random.default_rng(6), SEQ_LENS, QUERY_LENS)
    config = MLAConfig(
        hidden_size=8, num_heads=4, q_lora_rank=None, kv_lora_rank=RANK, qk_nope_head_dim=8,
        qk_rope_head_dim=ROPE, v_head_dim=8,
    )  # fmt: skip
    rows = []
    pages = np.array(batch.cache.pages)
    for b, count in enumerate(QUERY_LENS):
        t = SEQ_LENS[b] - count + np.arange(count)
        place = batch.block_tables[b, t // 16], t % 16
        rows.append(pages[place])
        pages[place] = np.nan
    cache = PagedKVCache(**vars(batch.cache) | {"pages": jnp.asarray(pages)})
    q, cu_q_lens = packed(batch.q, QUERY_LENS, padding=0), bounds(QUERY_LENS)
    call = (q[..., :RANK], q[..., RANK:]), np.concatenate(rows), cache, batch.block_tables
    step = jax.jit(attend, static_argnames="config")
    o, cache = step(config, *call, batch.seq_lens, cu_q_lens=cu_q_lens)
    wanted, _ = batch.oracle(softmax_scale=config.softmax_scale)
    np.testing.assert_allclose(o, packed(wanted, QUERY_LENS, padding=0), atol=2e-5)
    np.testing.assert_array_equal(cache.pages, batch.cache.pages)


def test_bad_arguments():
    batch = make_batch(np.random.default_rng(1), SEQ_LENS, QUERY_LENS)
    q, good = packed(batch.q, QUERY_LENS), bounds(QUERY_LENS)

    def op(q=q, lens=batch.seq_lens, cu_q_lens=good, **options):
        arguments = {"softmax_scale": SCALE, "cu_q_lens": cu_q_lens} | options
        return paged_mla_attention(q, batch.cache, batch.block_tables, lens, **arguments)

    falls, past = good.copy(), good.copy()
    falls[2], past[-1] = 3, 62
    many = bounds([5, 0, 33, 1, 2, 17])
    # Of nine requests, as in test_plan.
    lens = np.ones(9, np.int32)
    plan = plan_decode(lens, cache=batch.cache, num_heads=4, implementation="split_kv")
    for call, error, message in (
        (lambda: op(cu_q_lens=falls), ValueError, r"cu_q_lens\[2\] must be in 5 .. 61 .*, got 3"),
        (lambda: op(cu_q_lens=past), ValueError, r"cu_q_lens\[6\] must be in 41 .. 61 .*, got 62"),
        (lambda: op(cu_q_lens=good + 1), ValueError, r"cu_q_lens\[0\] must be 0, got 1"),
        (lambda: op(cu_q_lens=many), ValueError, "request 5 at most the 16 tokens .* got 17"),
        (lambda: op(cu_q_lens=good[:-1]), ValueError, r"cu_q_lens must be \[B \+ 1\] = \[7\]"),
        (lambda: op(cu_q_lens=good.astype(float)), TypeError, "cu_q_lens must be an int32 array"),
        (lambda: op(q=batch.q), ValueError, r"q must be \[T, H, kv_lora_rank \+ rope_dim\] with"),
        (lambda: op(query_lens=batch.query_lens), ValueError, "query_lens must be None with"),
        (lambda: op(lens=batch.seq_lens - 17), ValueError, r"seq_lens\[1\] must be at least 0"),
        (lambda: op(plan=plan, implementation="split_kv"), ValueError, "plan must be for 61 req"),
    ):
        with pytest.raises(error, match=message):
            call()
    params, x = random_layer(SMALL, batch=1, length=8)
    cache, tables = new_cache(SMALL, 1, 8)
    layer = functools.partial(mla_layer, params, SMALL, cache=cache, block_tables=tables)
    lens, cu_q_lens = np.array([8], np.int32), np.array([0, 8], np.int32)
    for options, message in (
        ({"x": x}, r"x must be \[T, hidden_size\] with cu_q_lens"),
        ({"x": x[0], "causal": False}, "causal must be True with cu_q_lens, got False"),
        ({"x": x[0], "query_lens": lens}, "query_lens must be None with cu_q_lens"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(seq_lens=lens, cu_q_lens=cu_q_lens, **options)
    with pytest.raises(ValueError, match=r"cu_q_lens\[1\] must be in 0 .. 4"):
        cache.append(np.zeros((4, 22), np.float32), tables, lens, cu_q_lens=cu_q_lens)
    with pytest.raises(ValueError, match=r"new tokens \+ seq_lens\[0\] must be in 0 .. 16"):
        cache.append(np.zeros((8, 22), np.float32), tables, lens + 1, cu_q_lens=cu_q_lens)
    sizes = {"cache": cache, "num_heads": 3, "num_query_tokens": 9}
    with pytest.raises(ValueError, match="cu_q_lens must give request 0 at most the 8 tokens"):
        plan_decode(lens, cu_q_lens=np.array([0, 9], np.int32), **sizes)
