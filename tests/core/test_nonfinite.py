"""What is infinite or NaN reaches the rows that may see it, as in float64, and no other row."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_batch import RANK, SCALE, TOLERANCE, Batch, element, make_batch

from mla_jax.attention import paged_mla_attention
from mla_jax.reference.attention import attention_float64
from mla_jax.reference.int8_dataflow import weights_in_int8

PAGE = 16
# Four draft tokens behind a prefix, a whole prefill, and a request with fewer queries than drafts.
LENS, QUERIES = [40, 4, 30], [4, 4, 2]


def poke(batch: Batch, name: str, places: dict[tuple[int, int], dict[int, float]]) -> Batch:
    """Writes values into an array of the cache: (request, position) -> column -> value."""
    array = np.array(getattr(batch.cache, name))
    for (request, position), columns in places.items():
        page, t = batch.block_tables[request, position // PAGE], position % PAGE
        for column, value in columns.items():
            if name == "scales":
                array[page, t] = value
            else:
                width = array[0].size // PAGE
                address = element(batch.cache.layout, PAGE, array.dtype, width, t, column)
                array[page].reshape(-1)[address] = value
    cache = dataclasses.replace(batch.cache, **{name: jax.device_put(array)})
    return dataclasses.replace(batch, cache=cache)


@functools.cache
def clean(dtype: str, layout: str = "ND") -> Batch:
    rng = np.random.default_rng(0)
    return make_batch(rng, LENS, QUERIES, dtype=dtype, layout=layout, capacity=48, heads=5)


@functools.cache
def compiled(implementation: str, rescale: str = "multiply"):
    run = functools.partial(
        paged_mla_attention, softmax_scale=SCALE, implementation=implementation, rescale=rescale
    )
    return jax.jit(lambda *args: run(*args[:4], query_lens=args[4]))


def assert_agrees(batch: Batch, implementation: str, rescale: str) -> None:
    """NaN and -inf exactly where float64 has them, the rest close."""
    rounds_q = implementation == "blockwise" and batch.cache.dtype == jnp.int8  # to 8 bits
    tolerance, lse_tolerance = (1.5e-2, 5e-2) if rounds_q else (TOLERANCE["bfloat16"], 1e-2)
    o, lse = compiled(implementation, rescale)(*batch.args, batch.query_lens)
    o, lse = np.asarray(o, np.float64), np.asarray(lse)
    o_wanted, lse_wanted = batch.oracle()
    np.testing.assert_array_equal(np.isnan(o), np.isnan(o_wanted))
    finite = np.isfinite(o_wanted)
    error = np.linalg.norm((o - o_wanted)[finite]) / np.linalg.norm(o_wanted[finite])
    assert error < tolerance
    np.testing.assert_allclose(lse, lse_wanted, rtol=0, atol=lse_tolerance)


@pytest.fixture(
    scope="module",
    params=[
        ("reference", "bfloat16", "multiply"),
        ("xla", "bfloat16", "multiply"),
        ("xla", "int8", "exponent_add"),
        ("split_kv", "bfloat16", "exponent_add"),
        ("blockwise", "bfloat16", "multiply"),
        ("blockwise", "int8", "multiply"),
    ],
    ids=" ".join,
)
def case(request):
    """Implementation, dtype of the cache, rescale. Its tests run in a row and compile once."""
    return request.param


def rope_of(dtype: str) -> tuple[str, int]:
    """The array that the rope part of a key is in, and its first column there."""
    return ("rope_pages", 0) if dtype == "int8" else ("pages", RANK)


def test_a_row_depends_only_on_keys_that_it_may_see(case):
    """A later draft, the token past query_lens's, a rope part: hidden they are nothing, seen loud.

    Column by column, as float64 has it: an infinite value whose score is -inf makes NaN of its own
    column only.
    """
    implementation, dtype, rescale = case
    rope, offset = rope_of(dtype)
    for value, position in itertools.product((np.nan, np.inf, -np.inf), (-1, -3)):
        places = {(request, LENS[request] + position): {3: value} for request in (0, 1)}
        rope_places = {(2, LENS[2] - 1): {offset + 5: value}}
        batch = poke(clean(dtype), "scales" if dtype == "int8" else "pages", places)
        batch = poke(batch, rope, rope_places)
        wanted = batch.oracle()[0]
        assert np.isnan(wanted).any(axis=(1, 2, 3)).all()
        assert not np.isnan(wanted[:2, 0]).any()
        assert_agrees(batch, implementation, rescale)


def test_scores_of_minus_infinity(case):
    """Whole blocks of them, then finite ones; or for all keys that a row sees: o = 0, lse = -inf.

    All of q is positive, so that -inf in a rope column gives -inf for every row.
    """
    implementation, dtype, rescale = case
    batch = clean(dtype)
    batch = dataclasses.replace(batch, q=jnp.abs(batch.q))
    rope, offset = rope_of(dtype)
    places = {(request, position): {offset + 3: -np.inf} for request in (0, 1)
              for position in range(32 if request == 0 else 4)}  # fmt: skip
    batch = poke(batch, rope, places)
    o, lse = batch.oracle()
    assert np.isfinite(lse[0]).all()
    assert np.isneginf(lse[1]).all()
    assert not o[1].any()
    assert_agrees(batch, implementation, rescale)


def test_large_scores_are_normalised_by_their_sum():
    """float32 does not hold the lse of scores past 10^7 to less than 1, o must not hang on it."""
    batch = make_batch(np.random.default_rng(0), [4], [1], heads=5, capacity=48)
    for position in range(4):
        batch = poke(batch, "pages", {(0, position): {RANK: 1e10}})
    q = np.zeros(batch.q.shape, np.float32)
    q[..., RANK] = 3.0
    o, _ = compiled("reference")(q, *batch.args[1:], batch.query_lens)
    np.testing.assert_allclose(o, dataclasses.replace(batch, q=q).oracle()[0], rtol=1e-4, atol=1e-6)


def test_weights_of_zero_stay_zero_beside_any_scale():
    steps, scale = weights_in_int8(jnp.array([[1.0, 0.0], [1.0, 0.5]]), jnp.array([1.0, jnp.nan]))
    np.testing.assert_array_equal(steps[0], [127, 0])
    np.testing.assert_array_equal(np.isnan(scale), [False, True])


def test_the_float64_reference_itself():
    """By hand: two keys, the second hidden from the first token."""
    q, kv = np.ones((2, 1, 3)), np.ones((2, 3))
    options = {"softmax_scale": 1.0, "kv_lora_rank": 2}
    for value, lse_wanted in ((np.nan, np.nan), (np.inf, np.nan), (-np.inf, 3.0)):
        changed = kv.copy()
        changed[1, 0] = value
        o, lse = attention_float64(q, changed, **options)
        np.testing.assert_array_equal(o[0], [[1, 1]])
        np.testing.assert_array_equal(lse, [[3.0], [lse_wanted]])
        np.testing.assert_array_equal(np.isnan(o[1, 0]), [True, value != -np.inf])
    kv[:, 2] = -np.inf
    o, lse = attention_float64(q, kv, **options)
    assert not o.any()
    assert np.isneginf(lse).all()
