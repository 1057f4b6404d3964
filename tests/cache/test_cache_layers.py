"""A pool of several layers: every layer against float64, poison in the others, bad page numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_batch import PURE, SCALE, TOLERANCE, assert_matches, make_batch
from random_layer import random_params

from mla_jax import MLAConfig, PagedKVCache, mla_layer, paged_mla_attention, plan_decode
from mla_jax.cache import layers
from mla_jax.reference.layer import layer_float64

L = 3
CONFIG = MLAConfig(
    hidden_size=20,
    num_heads=2,
    q_lora_rank=12,
    kv_lora_rank=32,
    qk_nope_head_dim=6,
    qk_rope_head_dim=16,
    v_head_dim=5,
)
WIDTHS = {"kv_lora_rank": CONFIG.kv_lora_rank, "rope_dim": CONFIG.qk_rope_head_dim}
SEQ_LENS, QUERY_LENS = [40, 0, 17, 33], [3, 0, 1, 3]


def i32(*values):
    return np.array(values, np.int32)


def pool_of(caches):
    arrays = {
        name: jax.device_put(np.concatenate([np.asarray(c.arrays()[name]) for c in caches]))
        for name in caches[0].arrays()
    }
    return dataclasses.replace(caches[0], num_layers=len(caches), **arrays)


@pytest.mark.parametrize(
    ("implementation", "dtype", "layout"),
    [
        *((name, "float32", "NZ") for name in PURE),
        ("xla", "int8", "ND"),
        ("blockwise", "int8", "NZ"),
    ],
)
def test_every_layer_matches_float64(implementation, dtype, layout):
    """Layers have their own rows, tables and lengths. A page number of another layer is invalid."""
    rng = np.random.default_rng()
    granularity = "token" if dtype == "int8" else None
    batches = [
        make_batch(
            rng,
            rng.permutation(SEQ_LENS).tolist(),
            [0] * 4,
            num_queries=1,
            heads=2,
            capacity=64,
            dtype=dtype,
            layout=layout,
            granularity=granularity,
        )
        for _ in range(L)
    ]
    pool = pool_of([batch.cache for batch in batches])

    @jax.jit
    def attend(index, pool, q, tables, lens):
        view, options = pool.layer(index), {"softmax_scale": SCALE}
        return paged_mla_attention(
            q, view, tables, lens, implementation=implementation, causal=False, **options
        )

    tolerance = TOLERANCE["float32"] if dtype == "float32" else 2e-2
    for index, batch in enumerate(batches):
        tables = batch.block_tables.copy()
        bad = int(np.argmax(batch.seq_lens == 17))
        tables[bad, 1] = rng.choice([-1, pool.num_pages, -pool.num_pages, 2**31 - 1])
        got = attend(np.int32(index), pool, batch.q, tables, batch.seq_lens)
        wanted = batch.oracle(query_lens=None, causal=False)
        assert np.isnan(got[0][bad]).all()
        good = np.arange(4) != bad
        got, wanted = ([np.asarray(x)[good] for x in pair] for pair in (got, wanted))
        assert_matches(got, wanted, tolerance, 1e-5 if dtype == "float32" else 2e-2)
    o, _ = attend(np.int32(L), pool, batch.q, batch.block_tables, batch.seq_lens)
    assert np.isnan(o[batch.seq_lens > 0]).all()


def scanned(weights, pool, x, tables, lens, **options):
    """Returns the hidden states after all layers, and the pool."""

    def layer(carry, of_layer):
        x, pool = carry
        params, index = of_layer
        out, pool = mla_layer(params, CONFIG, x, pool.layer(index), tables, lens, **options)
        return (x + out, pool), None

    count = len(weights.w_o)
    index = jnp.arange(count, dtype=jnp.int8)
    return jax.lax.scan(layer, (x, pool), (weights, index))[0]


def stacked(count):
    params = [random_params(CONFIG, seed=i) for i in range(count)]
    return params, jax.tree.map(lambda *x: jax.device_put(np.stack(x)), *params)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_scan_over_layers_matches_float64(form):
    """A prefill and a chunk behind it. All that no token has written stays NaN in every layer.

    The last request has page numbers that are those of the next layer in the pool.
    """
    params, weights = stacked(L)
    rng = np.random.default_rng()
    x = rng.standard_normal((3, 22, CONFIG.hidden_size)).astype(np.float32)
    wanted = x.astype(np.float64)
    for one in params:
        wanted = wanted + layer_float64(CONFIG, one, wanted)
    pool = PagedKVCache.create(7, page_size=16, dtype=jnp.float32, num_layers=L, **WIDTHS)
    pool = dataclasses.replace(pool, pages=jnp.full_like(pool.pages, jnp.nan))
    tables = i32([5, 2], [0, 6], [7, 8])
    run = jax.jit(functools.partial(scanned, form=form), donate_argnums=1)
    for done in (0, 11):
        old, new = pool, x[:, done : done + 11]
        got, pool = run(weights, pool, new, tables, np.full(3, done + 11, np.int32))
        assert old.pages.is_deleted()
        assert jax.tree.structure(pool) == jax.tree.structure(old)
        np.testing.assert_allclose(got[:2], wanted[:2, done : done + 11], rtol=0, atol=1e-4)
        assert np.isnan(got[2]).all()
    written = np.zeros((7, 16), bool)
    written[[5, 0]] = True
    written[[2, 6], :6] = True
    by_layer = np.asarray(pool.pages).reshape(L, 7, 16, -1)
    np.testing.assert_array_equal(np.isfinite(by_layer), np.tile(written[..., None], (L, 1, 1, 48)))


def test_eager_layers_and_int8_are_those_of_caches_of_one_layer():
    """Bit by bit, and donated; each layer's own rows."""
    rng = np.random.default_rng()
    tables, lens, new = i32([4, 1], [0, 3]), i32(20, 3), i32(20, 3)
    options = {"page_size": 16, "dtype": "int8", **WIDTHS}
    pool = PagedKVCache.create(5, num_layers=L, **options)
    assert (pool.num_pages, pool.pages.shape[0], pool.bytes_per_token) == (5, 15, L * 68)
    for index in (1, jnp.uint8(2), np.int64(0)):
        kv = rng.standard_normal((2, 20, 48)).astype(np.float32)
        single = PagedKVCache.create(5, **options)
        single = single.append(kv, tables, i32(0, 0), new)
        old, view = pool, pool.layer(index)
        assert view.pages is pool.pages
        pool = view.append(kv, tables, i32(0, 0), new)
        assert old.pages.is_deleted()
        assert jax.tree.structure(pool) == jax.tree.structure(old)
        view = pool.layer(0).layer(index)
        first = 5 * int(index)
        for name, x in single.arrays().items():
            np.testing.assert_array_equal(x, getattr(pool, name)[first : first + 5])
        for table in (tables, i32([9, 1], [-4, 3])):  # clipped to pages of the layer
            got, wanted = (c.gather(table, max_len=20, seq_lens=lens) for c in (view, single))
            np.testing.assert_array_equal(got, wanted)
    copies = pool.copy_pages(i32(4, -1), i32(2, -1))
    for x in copies.arrays().values():
        by_layer = np.asarray(x).reshape(L, 5, -1)
        np.testing.assert_array_equal(by_layer[:, 2], by_layer[:, 4])
        assert by_layer[:, 2].any()
    skipped = jax.jit(PagedKVCache.copy_pages)(copies, i32(5, 4), i32(1, 5))
    for name, x in skipped.arrays().items():
        np.testing.assert_array_equal(x, getattr(copies, name))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_scan_with_donation_copies_no_cache(dtype):
    """Nor does a step with unrolled layers. The programs are compiled and not run."""
    count = 27
    create = functools.partial(
        PagedKVCache.create, 16384, dtype=dtype, num_layers=count, page_size=16, **WIDTHS
    )
    pool = jax.eval_shape(create)
    _, one = stacked(1)
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), one)
    x, ints = jax.ShapeDtypeStruct((4, 1, CONFIG.hidden_size), jnp.float32), np.zeros(4, np.int32)
    arguments = weights, pool, x, np.zeros((4, 64), np.int32), ints

    def unrolled(weights, pool, x, tables, lens):
        for index in (0, count - 1):
            params = jax.tree.map(lambda w, index=index: w[index], weights)
            out, pool = mla_layer(params, CONFIG, x, pool.layer(index), tables, lens)
            x = x + out
        return x, pool

    size = sum(x.size * x.dtype.itemsize for x in pool.arrays().values())
    assert size == 16384 * 16 * pool.bytes_per_token
    for step in (scanned, unrolled) if dtype == "int8" else (scanned,):
        compiled = jax.jit(step, donate_argnums=1).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == size
        assert memory.temp_size_in_bytes < size / 100


def test_one_layer_costs_nothing():
    """`layer` of a cache of one layer is the cache, and the op gets its tables as they are."""
    cache = PagedKVCache.create(2, page_size=16, **WIDTHS)
    tables = i32([0])
    assert cache.layer(0) is cache
    assert layers.merged(cache) is cache
    assert layers.pool_tables(cache, tables) is tables
    assert len(jax.tree.leaves(cache)) == 1


def test_gradients_stay_in_their_layer():
    """The gradients of q and of the layer's pages are those of the reference implementation."""
    batch = make_batch(np.random.default_rng(), SEQ_LENS, QUERY_LENS, heads=2, capacity=64)
    finite = dataclasses.replace(batch.cache, pages=jnp.nan_to_num(batch.cache.pages))
    pool = pool_of([batch.cache, finite, batch.cache])

    def gradients(pool, implementation):
        def loss(q, pool):
            o, lse = paged_mla_attention(
                q,
                pool.layer(pool.num_layers // 2),
                *batch.args[2:],
                softmax_scale=SCALE,
                query_lens=batch.query_lens,
                implementation=implementation,
            )
            return (o**2).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(batch.q, pool)

    d_q, d_pool = gradients(pool, "xla")
    wanted_q, wanted = gradients(finite, "reference")
    np.testing.assert_allclose(d_q, wanted_q, rtol=0, atol=1e-5)
    before, mine, after = np.split(np.asarray(d_pool.pages), L)
    np.testing.assert_allclose(mine, wanted.pages, rtol=0, atol=1e-5)
    assert mine.any()
    assert not before.any()
    assert not after.any()


def test_what_is_refused():
    create = functools.partial(PagedKVCache.create, 4, page_size=16, dtype=jnp.float32, **WIDTHS)
    pool = create(num_layers=L)
    for index in (-1, L, jnp.int32(L), np.int8(-1)):
        with pytest.raises(ValueError, match=r"index must be in 0 .. 2, got"):
            pool.layer(index)
    for index in (True, 1.0, "0", None, np.bool_(True), np.float32(0)):
        with pytest.raises(TypeError, match="index must be an integer"):
            pool.layer(index)
    with pytest.raises(TypeError, match="index must be an integer, got one of dtype float32"):
        jax.eval_shape(pool.layer, jnp.float32(0))
    with pytest.raises(ValueError, match=r"index must be one integer, got shape \[1\]"):
        pool.layer(i32(0))
    with pytest.raises(ValueError, match=r"index must be in 0 .. 0, got 1"):
        create().layer(1)
    for count, error in ((0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="num_layers must be"):
            create(num_layers=count)
    with pytest.raises(ValueError, match="num_pages must be at most 1073741823, got 1073741824"):
        PagedKVCache.create(2**30, num_layers=2)
    with pytest.raises(ValueError, match="num_layers must be at most 2147483647, got 2147483648"):
        PagedKVCache.create(1, num_layers=2**31)
    for first in (-4, 1, 12):
        view = dataclasses.replace(pool.layer(0), first_page=jnp.int32(first))
        with pytest.raises(ValueError, match=f"first_page must be that of one of 3 .*got {first}"):
            view.check()
    tables, lens, q = i32([0]), i32(1), jnp.zeros((1, 1, 2, 48))
    _, weights = stacked(1)
    params = jax.tree.map(lambda x: x[0], weights)
    uses = [
        lambda cache: paged_mla_attention(q, cache, tables, lens, softmax_scale=1.0),
        lambda cache: mla_layer(params, CONFIG, jnp.zeros((1, 1, 20)), cache, tables, lens),
        lambda cache: cache.append(jnp.zeros((1, 1, 48)), tables, i32(0)),
        lambda cache: cache.gather(tables, max_len=1),
        lambda cache: cache.rows(tables, i32([0])),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"got all 3 layers of a pool: pass cache.layer\(i\)"):
            use(pool)
    tables = i32([4])  # of the next layer
    for use in uses[::2][:2]:
        with pytest.raises(ValueError, match=r"block_tables\[0, 0\] must be a page in 0 .. 3"):
            use(pool.layer(0))
    with pytest.raises(ValueError, match=r"pass cache\.pool"):
        pool.layer(0).copy_pages(i32(0), i32(1))
    with pytest.raises(ValueError, match=r"targets\[0\] must be a page in 0 .. 3"):
        pool.copy_pages(i32(0), i32(4))
    for name, value, error, message in (
        ("num_layers", 0, ValueError, "cache.num_layers must be a positive integer, got 0"),
        ("num_layers", 5, ValueError, "equally many pages for each of 5 layers, got 12"),
        ("first_page", i32(0), ValueError, r"cache.first_page must be \[\]"),
        ("first_page", jnp.float32(0), TypeError, "cache.first_page must be an int32 array"),
        ("first_page", 0, TypeError, "cache.first_page must be an array, got 0"),
    ):
        with pytest.raises(error, match=message):
            dataclasses.replace(pool, **{name: value}).check()
    with pytest.raises(ValueError, match="first_page must be None in a cache of one layer"):
        dataclasses.replace(create(), first_page=jnp.int32(0)).check()
    assert not pool.pages.is_deleted()
    plan = functools.partial(plan_decode, cache=pool, num_heads=2, implementation="split_kv")
    jax.eval_shape(plan, lens)  # one for all layers
