"""PagedKVCache against plain numpy: append, gather, layouts, donation, what it refuses."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged_batch import RANK, ROPE, element

from mla_jax import quantize
from mla_jax.cache import PAGE_SIZES, PagedKVCache
from mla_jax.reference.attention import read_pages_float64

WIDTH = RANK + ROPE
GARBAGE = 2**31 - 1


def create(num_pages=40, page_size=16, dtype="float32", layout="ND"):
    return PagedKVCache.create(
        num_pages,
        page_size=page_size,
        kv_lora_rank=RANK,
        rope_dim=ROPE,
        dtype=dtype,
        layout=layout,
    )


def i32(*values):
    return np.array(values, np.int32)


def tables_for(rng, cache, lengths, max_pages):
    """Pages in random order, garbage past the length."""
    free = list(rng.permutation(cache.num_pages))
    tables = rng.choice(i32(-1, GARBAGE, -(2**31)), (len(lengths), max_pages)).astype(np.int32)
    for row, length in zip(tables, lengths, strict=True):
        for slot in range(-(-length // cache.page_size)):
            row[slot] = free.pop()
    return tables


def test_a_serving_loop_may_change_its_lengths_in_place():
    """JAX reads numpy arguments late where they lie on 64 bytes; what it reads must be ours."""
    memory = np.zeros(32, np.int32)
    start = -memory.ctypes.data % 64 // memory.itemsize
    lengths = memory[start : start + 1]
    rows = np.random.default_rng(0).standard_normal((1, 64, WIDTH)).astype(np.float32)
    slow = jax.jit(lambda x, big: x + 0 * (big @ big @ big).sum())
    big, tables, cache = jnp.ones((800, 800)), np.arange(4, dtype=np.int32)[None], create(4)
    for first in range(0, 64, 16):
        kv = slow(rows[:, first : first + 16], big)  # append has to wait for it
        cache = cache.append(kv, tables, lengths)
        lengths += 16
    np.testing.assert_array_equal(cache.gather(tables, max_len=64), rows)


@pytest.mark.parametrize(
    ("page_size", "layout", "dtype"),
    [
        *itertools.product(PAGE_SIZES, ("ND", "NZ"), ("float32",)),
        # A layout depends on the bytes of a value, and the two dtypes of 16 bits share them.
        *((64, "ND", "bfloat16"), (64, "NZ", "bfloat16"), (1, "NZ", "bfloat16")),
        *((16, "NZ", "float16"), (128, "ND", "float16")),
    ],
)
def test_chunks_then_mtp_then_decode(page_size, layout, dtype):
    """Ragged chunks, two tokens, one token: the pages hold each request's rows and nothing else."""
    rng = np.random.default_rng(page_size)
    capacity = 2 * max(page_size, 32)
    max_pages = capacity // page_size
    cache = create(3 * max_pages + 1, page_size, dtype, layout)
    # Which rows are written hangs on the lengths alone: arrays of 2 tokens and of 1 in two cases.
    few = (2, 1) if (page_size, dtype) == (64, "bfloat16") else (30, 30)
    steps = [(30, [30, 0, 7]), (30, [2, 3, 30]), (few[0], [2, 1, 2]), (few[1], [1, 1, 0])]
    total = np.sum([new for _, new in steps], axis=0)
    tables = tables_for(rng, cache, total, max_pages)
    lengths, expected = np.zeros(3, np.int32), [[], [], []]
    for count, new in steps:
        kv = rng.standard_normal((3, count, WIDTH)).astype(jnp.dtype(dtype))
        cache = cache.append(jax.device_put(kv), tables, lengths, i32(*new))
        for request, number in enumerate(new):
            expected[request].extend(kv[request, :number].astype(np.float64))
        lengths += i32(*new)

    gathered = np.asarray(cache.gather(tables, max_len=capacity, seq_lens=lengths))
    assert gathered.dtype == jnp.dtype(dtype)
    for request, rows in enumerate(expected):
        held = read_pages_float64(cache, tables[request], len(rows))
        np.testing.assert_array_equal(held, rows)
        np.testing.assert_array_equal(gathered[request, : len(rows)].astype(np.float64), rows)
        assert not gathered[request, len(rows) :].any()
    values = np.count_nonzero(np.asarray(cache.pages, np.float32))
    assert values <= sum(total) * WIDTH  # nothing was written anywhere else


@pytest.mark.parametrize(("layout", "dtype"), [("ND", "float32"), ("NZ", "float16")])
def test_layout_is_the_published_address(layout, dtype):
    cache = create(2, 16, dtype, layout)
    kv = jnp.arange(16 * WIDTH).reshape(1, 16, WIDTH).astype(dtype)
    cache = cache.append(kv, i32([1]), i32(0))
    page = np.asarray(cache.pages)[1].reshape(-1)
    for t, d in [(0, 0), (0, 47), (3, 9), (15, 16), (15, 47)]:
        assert page[element(layout, 16, cache.dtype, WIDTH, t, d)] == kv[0, t, d]


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_append_and_gather(self):
        rng = np.random.default_rng(1)
        kv = jnp.asarray(rng.standard_normal((2, 5, WIDTH)), jnp.float32)
        tables = i32([3, 1, GARBAGE], [0, GARBAGE, -1])

        @self.variant
        def run(cache, kv, tables, seq_lens, query_lens):
            cache = cache.append(kv, tables, seq_lens, query_lens)
            return cache.gather(tables, max_len=40, seq_lens=seq_lens + query_lens)

        rows = run(create(), kv, tables, i32(13, 0), i32(5, 2))
        np.testing.assert_array_equal(rows[0, 13:18], kv[0])
        np.testing.assert_array_equal(rows[1, :2], kv[1, :2])
        assert not rows[0, 18:].any()
        assert not rows[1, 2:].any()


@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=6),
    st.sampled_from([(1, "NZ"), (16, "ND")]),
    st.integers(0, 2**32 - 1),
)
def test_any_chunking_and_paging_holds_the_same_rows(chunks, paging, seed):
    rng = np.random.default_rng(seed)
    page_size, layout = paging
    kv = rng.standard_normal((1, 60, WIDTH)).astype(np.float32)
    cache = create(66, page_size, "float32", layout)
    tables = tables_for(rng, cache, [sum(chunks)], 64 // page_size)
    at = 0
    for new in chunks:
        chunk = np.roll(kv, -at, axis=1)[:, :10]
        cache = cache.append(chunk, tables, i32(at), i32(new))
        at += new
    rows = np.asarray(cache.gather(tables, max_len=60, seq_lens=i32(at)))
    np.testing.assert_array_equal(rows[0, :at], kv[0, :at])
    assert not rows[0, at:].any()


@pytest.mark.parametrize("layout", ["ND", "NZ"])
def test_append_is_donated(layout):
    cache = create(layout=layout)
    pages, address = cache.pages, cache.pages.unsafe_buffer_pointer()
    cache = cache.append(jnp.ones((1, 1, WIDTH)), i32([7]), i32(0))
    assert pages.is_deleted()
    assert cache.pages.unsafe_buffer_pointer() == address


@pytest.mark.parametrize("layout", ["ND", "NZ"])
def test_append_without_donation_leaves_the_cache_as_it_is(layout):
    before = create(layout=layout).append(jnp.ones((1, 1, WIDTH)), i32([7]), i32(0))
    after = before.append(jnp.full((1, 1, WIDTH), 2.0), i32([7]), i32(1), donate=False)
    assert not before.pages.is_deleted()
    assert np.asarray(before.pages).sum() == WIDTH
    np.testing.assert_array_equal(after.gather(i32([7]), max_len=2)[0, :, 0], [1, 2])
    with pytest.raises(TypeError, match="donate must be True or False, got 0 of type int"):
        before.append(jnp.ones((1, 1, WIDTH)), i32([7]), i32(1), donate=0)


def test_donation_through_an_outer_jit():
    @jax.jit
    def keeps(cache):
        return cache.append(jnp.ones((1, 1, WIDTH)), i32([7]), i32(0))

    cache = create()
    keeps(cache)
    assert not cache.pages.is_deleted()  # an outer jit that does not donate leaves it alone
    jax.jit(keeps, donate_argnums=0)(cache)
    assert cache.pages.is_deleted()


def test_traced_appends_that_do_not_fit_write_nothing():
    cache = create(4)
    append = jax.jit(lambda cache, *args: cache.append(jnp.ones((5, 2, WIDTH)), *args))
    tables = i32([0, 1], [2, 3], [-1, -1], [4, GARBAGE], [1, 2])
    # fits; past the block table; negative length; pages that are not; more tokens than there are
    cache = append(cache, tables, i32(3, 31, -1, 3, 40), i32(2, 2, 2, 2, 9))
    assert np.count_nonzero(np.asarray(cache.pages)) == 2 * WIDTH
    np.testing.assert_array_equal(cache.pages[0, 3:5], 1)


def test_garbage_slots_are_never_read_out_of_range():
    cache = create(2)
    cache = cache.append(jnp.ones((1, 32, WIDTH)), i32([1, 0]), i32(0))
    rows = cache.gather(i32([1, GARBAGE, -5]), max_len=48, seq_lens=i32(16))
    np.testing.assert_array_equal(rows[0, :16], 1)
    assert not rows[0, 16:].any()
    assert np.isfinite(cache.gather(i32([-1, GARBAGE, -(2**31)]), max_len=48)).all()


def test_describes_itself():
    cache = PagedKVCache.create(3)
    assert (cache.num_pages, cache.page_size, cache.latent_dim) == (3, 64, 576)
    assert cache.dtype == jnp.bfloat16
    assert cache.bytes_per_token == 1152
    assert cache.pages.shape == (3, 64, 576)
    assert PagedKVCache.create(3, layout="NZ").pages.shape == (3, 36, 64, 16)
    assert PagedKVCache.create(3, layout="NZ", dtype="float32").pages.shape == (3, 72, 64, 8)
    assert len(jax.tree.leaves(cache)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pages": 0}, "num_pages must be a positive integer, got 0"),
        ({"page_size": 32}, "page_size must be one of 1, 16, 64, 128, got 32"),
        ({"layout": "DN"}, "layout must be one of ND, NZ, got 'DN'"),
        ({"dtype": "uint8"}, "dtype must be one of .*, float16, int8, got 'uint8'"),
        ({"kv_lora_rank": -1}, "kv_lora_rank must be a positive integer, got -1"),
        ({"rope_dim": 0}, "rope_dim must be a positive integer, got 0"),
        ({"rope_dim": 8, "layout": "NZ"}, "rope_dim must be a multiple of 16 in layout NZ"),
        ({"num_pages": 2**31}, "num_pages must be at most 2147483647, got 2147483648"),
        ({"layout": 3}, "layout must be one of ND, NZ, got 3"),
        ({"dtype": "x"}, "dtype must be one of .*, int8, got 'x'"),
        ({"dtype": float}, "dtype must be one of .*, int8, got 'float64'"),
        ({"scale_granularity": ""}, "scale_granularity is for dtype int8, got dtype bfloat16"),
    ],
)
def test_create_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PagedKVCache.create(**({"num_pages": 1} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pages": 1.0}, "num_pages must be an integer, got 1.0"),
        ({"num_pages": True}, "num_pages must be an integer, got True"),
        ({"page_size": 64.0}, "page_size must be an integer, got 64.0"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank must be an integer, got '512'"),
        ({"rope_dim": None}, "rope_dim must be an integer, got None"),
        ({"dtype": None}, "dtype must be a dtype, got None"),
        ({"dtype": 3}, "dtype must be a dtype, got 3"),
    ],
)
def test_create_refuses_other_types(options, message):
    with pytest.raises(TypeError, match=message):
        PagedKVCache.create(**({"num_pages": 1} | options))


def test_numpy_integers_count_as_what_they_are():
    """kv_lora_rank + rope_dim was 44 of uint8."""
    sizes = {"page_size": np.uint8(128), "kv_lora_rank": np.uint8(200), "rope_dim": np.uint8(100)}
    cache = PagedKVCache.create(np.uint8(2), **sizes)
    assert (cache.pages.shape, cache.latent_dim) == ((2, 128, 300), 300)
    state = (cache.num_pages, cache.page_size, cache.kv_lora_rank, cache.rope_dim)
    assert {type(value) for value in state} == {int}
    assert cache.gather(i32([0, 1]), max_len=np.uint8(200)).shape == (1, 200, 300)


GOOD = {
    "kv": np.ones((2, 3, WIDTH), np.float32),
    "block_tables": i32([0, 1], [2, 3]),
    "seq_lens": i32(0, 16),
    "query_lens": i32(3, 2),
}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("kv", np.ones((3, WIDTH), np.float32), ValueError, "kv must be .B, S, D. .* got shape"),
        ("kv", np.ones((2, 3, 47), np.float32), ValueError, r"kv must be .* = \[2, any, 48\]"),
        ("kv", np.ones((3, 3, WIDTH), np.float32), ValueError, r"kv must be .*got shape \[3, 3"),
        ("kv", np.ones((2, 3, WIDTH), np.float16), TypeError, "kv must be float32 .* got float16"),
        ("block_tables", i32(0, 1), ValueError, r"block_tables must be \[B, max_pages\]"),
        ("block_tables", np.ones((2, 2)), TypeError, "block_tables must be an int32 .* float64"),
        ("block_tables", i32([0, 1], [2, 9]), ValueError, r"block_tables\[1, 1\] must be a page"),
        ("block_tables", i32([0, 1], [2, 0]), ValueError, r"a place of its own.*page 0.*\[0, 1\]"),
        ("seq_lens", i32(0), ValueError, r"seq_lens must be \[B\] = \[2\], got shape \[1\]"),
        ("seq_lens", np.zeros(2), TypeError, "seq_lens must be an int32 array, got float64"),
        ("seq_lens", [0, 0], TypeError, "seq_lens must be an int32 array, got list"),
        ("seq_lens", i32(0, -1), ValueError, r"seq_lens\[1\] must be at least 0, got -1"),
        ("seq_lens", i32(0, 31), ValueError, r"seq_lens \+ query_lens\[1\] .* 0 .. 32 .* got 33"),
        ("query_lens", i32(0, 4), ValueError, r"query_lens\[1\] must be in 0 .. 3"),
        ("query_lens", i32(-1, 0), ValueError, r"query_lens\[0\] must be in 0 .. 3 .* got -1"),
        ("query_lens", i32([1]), ValueError, r"query_lens must be \[B\]"),
        ("kv", None, TypeError, "kv must be an array, got None of"),
        ("kv", GOOD["kv"].tolist(), TypeError, "kv must be an array, got "),
        ("kv", GOOD["kv"][:, :0], ValueError, r"kv must have no dim of 0, got shape \[2, 0, 48\]"),
        ("seq_lens", np.zeros(2, np.int64), TypeError, "seq_lens must be an int32 .* int64"),
        ("seq_lens", i32(0, 2**31 - 1), ValueError, r"seq_lens \+ query_lens\[1\] .* 2147483649"),
    ],
)
def test_append_refuses_and_writes_nothing(name, value, error, message):
    cache = create(4)
    with pytest.raises(error, match=message):
        cache.append(**(GOOD | {name: value}))
    assert not cache.pages.is_deleted()
    assert not np.asarray(cache.pages).any()


def test_gather_refuses():
    cache, tables = create(4), GOOD["block_tables"]
    with pytest.raises(ValueError, match=r"max_len must be at most 32 .* got 33"):
        cache.gather(tables, max_len=33)
    with pytest.raises(ValueError, match="max_len must be a positive integer, got 0"):
        cache.gather(tables, max_len=0)
    with pytest.raises(ValueError, match=r"seq_lens must be \[B\] = \[2\]"):
        cache.gather(tables, max_len=4, seq_lens=i32(1))
    with pytest.raises(ValueError, match="block_tables must be"):
        cache.gather(tables[0], max_len=4)
    with pytest.raises(TypeError, match=r"max_len must be an integer, got 4\.0"):
        cache.gather(tables, max_len=4.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": np.zeros((1, 2))}, TypeError, "positions must be of an integer .* float64"),
        (
            {"positions": np.ones((1, 2), bool)},
            TypeError,
            "positions must be of an integer .* bool",
        ),
        ({"positions": [[0, 1]]}, TypeError, "positions must be an array, got "),
        ({"positions": None}, TypeError, "positions must be an array, got None of"),
        ({"positions": i32(0, 1)}, ValueError, r"positions must be \[N, T\] or \[1, T\]"),
        ({"positions": i32([0], [1], [2])}, ValueError, r"positions must be .* = \[2, any\]"),
        ({"requests": i32(0, 2)}, ValueError, r"requests\[1\] must be in 0 .. 1, got 2"),
        ({"requests": i32(-1)}, ValueError, r"requests\[0\] must be in 0 .. 1, got -1"),
        ({"requests": [0]}, TypeError, "requests must be an int32 array, got list"),
        ({"requests": np.zeros(1)}, TypeError, "requests must be an int32 array, got float64"),
        ({"block_tables": [[0, 1]]}, TypeError, "block_tables must be an int32 array, got list"),
        ({"block_tables": None}, ValueError, r"block_tables must be \[B, max_pages\]"),
    ],
)
def test_rows_refuse(change, error, message):
    arguments = {"block_tables": GOOD["block_tables"], "positions": i32([0, 1])} | change
    for method in (PagedKVCache.rows, PagedKVCache.stored_rows):
        with pytest.raises(error, match=message):
            method(create(4), **arguments)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64])
def test_positions_of_any_integer_dtype(dtype):
    kv = jnp.arange(2 * 32 * WIDTH, dtype=jnp.float32).reshape(2, 32, WIDTH)
    cache = create(4).append(kv, GOOD["block_tables"], i32(0, 0))
    positions = np.array([[0, 17, 2**40 if dtype == np.int64 else 31]], dtype)
    rows = cache.rows(GOOD["block_tables"], positions)
    np.testing.assert_array_equal(rows, kv[:, [0, 17, 31]])


def test_traced_lengths_at_the_end_of_int32_write_nothing():
    """seq_lens + query_lens past it was negative, so it seemed to fit and wrote into page 0."""
    cache = create(4)
    append = jax.jit(lambda cache, *args: cache.append(jnp.ones((5, 2, WIDTH)), *args))
    tables = i32([0, 1], [2, 3], [-1, -1], [4, GARBAGE], [1, 2])
    lengths = i32(2**31 - 1, 2**31 - 2, -(2**31), 2**31 - 1, 0)
    cache = append(cache, tables, lengths, i32(2, 2, 2, 2**31 - 1, 3))
    assert not np.asarray(cache.pages).any()


@pytest.mark.parametrize("granularity", [None, *quantize.GRANULARITIES])
def test_dtypes_do_not_hang_on_the_modes_of_jax(granularity):
    """With 64 bits as JAX's default width and no implicit promotion."""
    options = {"dtype": "int8" if granularity else "float32", "page_size": 16, "rope_dim": ROPE}
    scale = 0.5 if granularity == "tensor" else None
    tables = GOOD["block_tables"]

    def run(kv, lengths):
        cache = PagedKVCache.create(
            4, kv_lora_rank=128, scale_granularity=granularity, scale=scale, **options
        )
        cache = cache.append(kv, tables, lengths, lengths)
        return cache, cache.gather(tables, max_len=9), cache.rows(tables, lengths[:, None])

    arguments = np.ones((2, 3, 128 + ROPE), np.float32), i32(1, 2)
    wanted = jax.eval_shape(run, *arguments)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(run, *arguments), wanted)
