"""int8 and scales, and the integer dataflows, against float64 by the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged_batch import OPTIMISED, assert_matches, relative_error

from mla_jax import quantize
from mla_jax.int8_dataflow import WEIGHTS, attend_int8, weights_in_int8
from mla_jax.reference import attention_float64

RANK, ROPE, SCALE = 256, 32, 0.05
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
        x = jnp.asarray(x, jnp.float32)
        scales = quantize.scales_of(x, granularity)
        assert not np.asarray(quantize.dequantize(quantize.quantize(x, scales), scales)).any()
    x = jnp.ones((2, RANK)).at[1, 3].set(jnp.nan)
    scales = quantize.scales_of(x, granularity)
    assert np.isnan(quantize.dequantize(quantize.quantize(x, scales), scales)[1, :128]).all()


def test_the_same_bits_with_and_without_jit():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((500, RANK)), jnp.bfloat16)
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
    q = jnp.asarray(rng.standard_normal((rows, RANK + ROPE)), jnp.bfloat16)
    latent = jnp.asarray(rng.standard_normal((keys, RANK)) * rng.uniform(0.2, 5, (keys, 1)))
    scales = quantize.scales_of(latent, granularity)
    steps = quantize.quantize(latent, scales)
    k_rope = jnp.asarray(rng.standard_normal((keys, ROPE)), jnp.bfloat16)
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
    x = jnp.ones((2, 128)).at[0, 3].set(bad)
    high, low, steps = quantize.quantize_in_halves(x)
    rope = jnp.ones((2, 64)) / steps[:, None]
    score = ((128.0 * high.astype(jnp.float32) + low).sum(1) + rope.sum(1)) * steps
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
    q = q.at[:, :RANK].set(jnp.clip(jnp.rint(q[:, :RANK] * 40), -127, 127).at[:, 0].set(127))
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
    rounded = np.asarray(q.astype(jnp.float32).at[:, :RANK].set(held), np.float64)
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
    for block in (1, 64, 128, 1000):
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
