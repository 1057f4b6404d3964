"""int8 and scales, and the integer dataflows, against float64 by the definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged_batch import OPTIMISED, assert_matches, make_batch, relative_error
from paged_batch import SCALE as BATCH_SCALE

from mla_jax import quantize
from mla_jax.attention import paged_mla_attention
from mla_jax.cache import PagedKVCache
from mla_jax.reference.attention import attention_float64
from mla_jax.reference.int8_dataflow import WEIGHTS, attend_int8, weights_in_int8

RANK, ROPE, SCALE = 256, 32, 0.05
X = np.ones((2, 256), np.float32)
SHAPES = {"token": (5, 3), "group": (5, 3, 2), "tensor": ()}


@given(
    st.sampled_from(quantize.GRANULARITIES),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    st.integers(0, 2**32 - 1),
)
def test_round_trip_is_off_by_half_a_step(granularity, size, seed):
    x = size * np.random.default_rng(seed).standard_normal((5, 3, RANK)).astype(np.float32)
    scales = quantize.scales_of(jnp.asarray(x), granularity)
    assert scales.shape == SHAPES[granularity]
    assert scales.dtype == jnp.float32
    steps = quantize.quantize(jnp.asarray(x), scales)
    assert steps.dtype == jnp.int8
    spread = np.broadcast_to(quantize.spread(scales, steps), x.shape)
    off = np.abs(quantize.dequantize(steps, scales) - x)
    assert (off <= 0.5001 * spread).all()
    groups = np.abs(steps).reshape(-1, quantize.GROUP if granularity == "group" else RANK).max(1)
    assert (groups == 127).all() if granularity != "tensor" else groups.max() == 127


def test_rounds_to_nearest_even_and_saturates():
    x = jnp.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -1e9])
    got = quantize.quantize(x, jnp.float32(1))
    np.testing.assert_array_equal(got, [0, 2, 2, 0, -2, 126, 127, -127])


@pytest.mark.parametrize("granularity", quantize.GRANULARITIES)
def test_nothing_is_nan_but_what_was(granularity):
    """Zeros, and what is too small for a normal scale, come out 0; a NaN stays loud."""
    for x in (np.zeros((2, RANK)), np.full((2, RANK), 1e-39)):
        x = jax.device_put(x.astype(np.float32))
        scales = quantize.scales_of(x, granularity)
        assert not np.asarray(quantize.dequantize(quantize.quantize(x, scales), scales)).any()
    x = np.ones((2, RANK), np.float32)
    x[1, 3] = np.nan
    scales = quantize.scales_of(x, granularity)
    assert np.isnan(quantize.dequantize(quantize.quantize(x, scales), scales)[1, :128]).all()


def test_the_same_bits_with_and_without_jit():
    x = jax.device_put(np.random.default_rng(0).standard_normal((500, RANK)).astype(jnp.bfloat16))
    jit = functools.partial(jax.jit, compiler_options=OPTIMISED)
    for granularity in quantize.GRANULARITIES:
        measure = functools.partial(quantize.scales_of, granularity=granularity)
        scales = measure(x)
        np.testing.assert_array_equal(jit(measure)(x), scales)
        steps = quantize.quantize(x, scales)
        np.testing.assert_array_equal(jit(quantize.quantize)(x, scales), steps)


def random_keys(seed, granularity, *, rows=5, keys=200):
    """(q, latent int8, scales, k_rope), and the same keys [T, D] dequantised in float64."""
    rng = np.random.default_rng(seed)
    q = jax.device_put(rng.standard_normal((rows, RANK + ROPE)).astype(jnp.bfloat16))
    latent = rng.standard_normal((keys, RANK)) * rng.uniform(0.2, 5, (keys, 1))
    latent = jax.device_put(latent.astype(np.float32))
    scales = quantize.scales_of(latent, granularity)
    steps = quantize.quantize(latent, scales)
    k_rope = jax.device_put(rng.standard_normal((keys, ROPE)).astype(jnp.bfloat16))
    wide = np.asarray(steps, np.float64) * np.asarray(quantize.spread(scales, steps), np.float64)
    return (q, steps, scales, k_rope), np.append(wide, np.asarray(k_rope, np.float64), axis=1)


def oracle(q, kv, softmax_scale=SCALE):
    o, lse = attention_float64(
        q[None], kv, softmax_scale=softmax_scale, kv_lora_rank=RANK, causal=False
    )
    return o[0], lse[0]


@given(st.integers(0, 2**32 - 1), st.floats(-60, 60))
def test_halves_hold_14_bits(seed, exponent):
    x = np.random.default_rng(seed).standard_normal((3, 128)).astype(np.float32) * 2.0**exponent
    x[0] = 0.0
    high, low, steps = quantize.quantize_in_halves(jnp.asarray(x))
    assert (high.dtype, low.dtype) == (jnp.int8, jnp.int8)
    assert np.abs(np.asarray(high, np.int32)).max() <= 63
    assert np.abs(np.asarray(low, np.int32)).max() <= 64
    step = np.asarray(steps, np.float64)[:, None]
    assert (np.frexp(step)[0] == 0.5).all()
    largest = np.abs(x).max(1, keepdims=True)
    assert (step[1:] >= largest[1:] / (63 * 128) * (1 - 1e-6)).all()
    assert (step <= np.maximum(largest, 2.0**-60) / (31.4 * 128)).all()
    held = (128.0 * np.asarray(high) + np.asarray(low)) * step
    assert (np.abs(held - x) <= step / 2).all()
    assert (held[0] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_halves_of_what_is_not_finite_come_to_nothing_finite(bad):
    x = np.ones((2, 128), np.float32)
    x[0, 3] = bad
    high, low, steps = map(np.asarray, quantize.quantize_in_halves(x))
    rope = np.ones((2, 64), np.float32) / steps[:, None]
    score = ((128 * high.astype(np.float32) + low).sum(1) + rope.sum(1)) * steps
    assert not np.isfinite(score[0])
    np.testing.assert_allclose(score[1], 128 + 64, rtol=1e-3)


@pytest.mark.parametrize(
    ("granularity", "queries"),
    [("token", "int8"), ("token", "bfloat16"), ("group", "int8"), ("tensor", "int8")],
)
def test_rounding_to_8_bits_is_all_that_the_dataflows_lose(granularity, queries):
    """Given queries that int8 holds exactly, only P is rounded: bf16 P is off by 2^-9, int8 P by
    a step of 1/127 of the block's largest; lse by nothing."""
    (q, *keys), kv = random_keys(1, granularity)
    q = np.array(q)
    q[:, :RANK] = np.clip(np.rint(q[:, :RANK] * 40), -127, 127)
    q[:, 0] = 127
    options = {"softmax_scale": SCALE / 40, "queries": queries, "block": 64}
    wanted = oracle(np.asarray(q, np.float64), kv, SCALE / 40)
    for weights, tolerance in (("bfloat16", 3e-3), ("int8", 1.5e-2)):
        got = attend_int8(q, *keys, weights=weights, **options)
        assert_matches(got, wanted, tolerance, 1e-4)
        assert relative_error(got[0], wanted[0]) > tolerance / 20  # it is really rounded


@pytest.mark.parametrize("weights", WEIGHTS)
def test_int8_queries_cost_their_own_rounding(weights):
    (q, *keys), kv = random_keys(2, "token")
    got = attend_int8(q, *keys, softmax_scale=SCALE, weights=weights)
    scales = quantize.scales_of(q[:, :RANK], "token")
    held = quantize.dequantize(quantize.quantize(q[:, :RANK], scales), scales)
    rounded = np.array(q, np.float64)
    rounded[:, :RANK] = held
    assert_matches(got, oracle(rounded, kv), 1.5e-2 if weights == "int8" else 3e-3, 1e-4)
    assert np.abs(np.asarray(got[1]) - oracle(np.asarray(q, np.float64), kv)[1]).max() > 1e-3


def test_queries_of_14_bits_cost_next_to_nothing():
    """128 times less than int8: the output has P's rounding, lse hardly any."""
    (q, *keys), kv = random_keys(2, "token")
    options = {"softmax_scale": SCALE, "weights": "bfloat16"}
    wanted = oracle(np.asarray(q, np.float64), kv)
    fine, coarse = (attend_int8(q, *keys, queries=x, **options) for x in ("int14", "int8"))
    assert_matches(fine, wanted, 3e-3, 5e-4)
    off = [np.abs(np.asarray(got[1]) - wanted[1]).max() for got in (fine, coarse)]
    assert off[0] < off[1] / 30


def test_the_block_size_is_a_matter_of_rounding_and_the_last_may_be_short():
    (q, *keys), kv = random_keys(3, "token", keys=130)
    wanted = oracle(np.asarray(q, np.float64), kv)
    for block in (1, 64, 1000):
        got = attend_int8(
            q, *keys, softmax_scale=SCALE, weights="bfloat16", queries="bfloat16", block=block
        )
        assert_matches(got, wanted, 3e-3, 1e-4)


def test_weights_fold_the_scales_of_v_before_they_are_rounded():
    p = jnp.array([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    steps, scale = weights_in_int8(p, jnp.array([1.0, 4.0, 9.0]))
    np.testing.assert_array_equal(steps, [[64, 127, 0], [0, 0, 0]])  # 63.5 goes to even
    np.testing.assert_allclose(scale, [2 / 127, 1 / 127], rtol=1e-6)
    assert weights_in_int8(p, jnp.ones((2, 3)))[0].shape == (2, 2, 3)


def test_attend_int8_refuses():
    (q, *keys), _ = random_keys(4, "token", keys=3)
    with pytest.raises(ValueError, match="weights must be one of int8, bfloat16, got 'fp8'"):
        attend_int8(q, *keys, softmax_scale=SCALE, weights="fp8")
    with pytest.raises(ValueError, match="queries must be one of int8, int14, bfloat16, got 'fp8'"):
        attend_int8(q, *keys, softmax_scale=SCALE, weights="int8", queries="fp8")
    with pytest.raises(TypeError, match="latent must be int8, got float32"):
        attend_int8(q, keys[0].astype(jnp.float32), *keys[1:], softmax_scale=SCALE, weights="int8")


def refused_derivatives():
    """name -> a function of x [2, 128] that rounds x to int8 on its way to a float."""
    scales = np.ones(2, np.float32)
    cache = functools.partial(
        PagedKVCache.create, 1, page_size=16, kv_lora_rank=96, rope_dim=32, dtype="int8"
    )
    tables, zero = np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
    latent, k_rope = np.ones((3, 96), np.int8), np.ones((3, 32), np.float32)

    def attend(x):
        options = {"softmax_scale": 1.0, "weights": "bfloat16"}
        return attend_int8(x, latent, np.full((), 0.1, np.float32), k_rope, **options)[0].sum()

    return {
        "round trip": lambda x: quantize.dequantize(quantize.quantize(x, scales), scales).sum(),
        "halves": lambda x: quantize.quantize_in_halves(x)[2].sum(),
        "append": lambda x: cache().append(x[None], tables, zero).gather(tables, max_len=2).sum(),
        "queries": attend,
    }


@pytest.mark.parametrize("name", refused_derivatives())
def test_rounding_refuses_to_be_differentiated(name):
    x = jax.ShapeDtypeStruct((2, 128), jnp.float32)
    function = refused_derivatives()[name]
    for derivative in (jax.grad(function), lambda x: jax.jvp(function, (x,), (x,))):
        with pytest.raises(TypeError, match=r"rounding to int8 has no derivative.*stop_gradient"):
            jax.eval_shape(derivative, x)


def test_the_derivative_by_scales_and_of_queries_over_an_int8_cache_is_right():
    """By finite differences in float64; queries meet the dequantised rows, which are constants."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 128)), jnp.float32)
    scales = quantize.scales_of(x, "token")
    steps = quantize.quantize(x, scales)
    by_scales = jax.grad(lambda s: quantize.dequantize(quantize.quantize(x, s), s).sum())(scales)
    np.testing.assert_array_equal(by_scales, steps.astype(jnp.float32).sum(1))
    batch = make_batch(np.random.default_rng(0), [40, 7], [1, 1], dtype="int8", capacity=48)
    q = batch.q.astype(jnp.float32)
    along = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)
    moved = [np.asarray(q, np.float64) + h * np.asarray(along, np.float64) for h in (1e-5, -1e-5)]
    above, below = (dataclasses.replace(batch, q=x).oracle()[0] for x in moved)

    def run(q):
        options = {"softmax_scale": BATCH_SCALE, "implementation": "xla", "return_lse": False}
        return paged_mla_attention(q, *batch.args[1:], rescale="exponent_add", **options)

    _, got = jax.jvp(run, (q,), (along,))
    assert relative_error(got, (above - below) / 2e-5) < 1e-5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize.scales_of(X, "row"), ValueError, "granularity must be one of token, gr"),
        (lambda: quantize.scales_of(X[:, :90], "group"), ValueError, "multiple of 128 .* got 90"),
        (lambda: quantize.scales_of([1.0], "token"), TypeError, "x must be an array, got list"),
        (
            lambda: quantize.quantize(X.astype(np.int8), np.float32(1)),
            TypeError,
            "x must be .*int8",
        ),
        (lambda: quantize.quantize(X, 1.0), TypeError, "scales must be an array, got float"),
        (lambda: quantize.quantize(X, np.ones(2, np.int32)), TypeError, "scales must be float32"),
        (lambda: quantize.quantize(X, X[0, :3]), ValueError, r"scales must be .* shape \[3\]"),
        (lambda: quantize.quantize(X, X[:, :3]), ValueError, r"scales must be .* shape \[2, 3\]"),
        (lambda: quantize.dequantize(X, np.float32(1)), TypeError, "values must be an int8 array"),
    ],
)
def test_refuses_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": 0}, ValueError, "block must be a positive integer, got 0"),
        ({"softmax_scale": np.nan}, ValueError, "softmax_scale must be finite"),
        ({"latent": None}, TypeError, "latent must be int8, got NoneType"),
        ({"k_rope": np.ones((4, 32), np.float32)}, ValueError, r"k_rope must be .* = \[3, any\]"),
        ({"q": np.ones((2, 130), np.float32)}, ValueError, r"q must be .* = \[any, 160\]"),
        ({"q": np.ones((2, 160), np.int32)}, TypeError, "q must be an array of .* got int32"),
        ({"scales": np.ones(4, np.float32)}, ValueError, r"scales must be .* got shape \[4\]"),
        ({"scales": np.ones(3, np.int8)}, TypeError, "scales must be a float32 array, got int8"),
    ],
)
def test_attend_int8_refuses_arguments(change, error, message):
    good = {
        "q": np.ones((2, 160), np.float32),
        "latent": np.ones((3, 128), np.int8),
        "scales": np.ones(3, np.float32),
        "k_rope": np.ones((3, 32), np.float32),
        "softmax_scale": 1.0,
        "weights": "int8",
    }
    with pytest.raises(error, match=message):
        attend_int8(**(good | change))
