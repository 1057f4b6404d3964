"""RoPE: rotation by position, both pairings, and YaRN's frequencies against the paper's formula."""

import dataclasses
import math

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings

from mla_jax.config import MLAConfig
from mla_jax.rope import apply_rope, rope_frequencies

V3 = MLAConfig.preset("deepseek-v3")
PLAIN = dataclasses.replace(V3, rope_scaling=None)


def test_plain_frequencies():
    wanted = 10000.0 ** -(np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(rope_frequencies(PLAIN), wanted, rtol=2e-7)
    assert rope_frequencies(PLAIN).dtype == np.float32


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    ratio = rope_frequencies(V3) / rope_frequencies(PLAIN)
    turns = 4096 * rope_frequencies(PLAIN) / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 32], 1, rtol=1e-6)
    # The first pair below one turn is still on the ramp, whose ends are rounded outwards.
    np.testing.assert_allclose(ratio[np.flatnonzero(turns < 1)[1:]], 1 / 40, rtol=1e-6)
    assert np.all(np.diff(ratio) <= 1e-7)


def test_yarn_ramp_of_deepseek_v3():
    """Pairs 10 .. 23 of 32 are on the ramp: floor(10.47) and ceil(22.51) by hand."""
    ratio = rope_frequencies(V3) / rope_frequencies(PLAIN)
    ramp = np.clip((np.arange(32) - 10) / (23 - 10), 0, 1)
    np.testing.assert_allclose(ratio, (1 - ramp) + ramp / 40, rtol=1e-6)


def test_yarn_without_truncation_ramps_between_the_exact_pairs():
    scaling = dataclasses.replace(V3.rope_scaling, truncate=False)
    config = dataclasses.replace(V3, rope_scaling=scaling)
    low, high = (32 * math.log(4096 / (n * 2 * math.pi)) / math.log(10000) for n in (32, 1))
    ramp = np.clip((np.arange(32) - low) / (high - low), 0, 1)
    ratio = rope_frequencies(config) / rope_frequencies(PLAIN)
    np.testing.assert_allclose(ratio, (1 - ramp) + ramp / 40, rtol=1e-6)


def test_kimi_ramp_is_a_step_of_one_pair():
    kimi = MLAConfig.preset("kimi-k2")
    plain = rope_frequencies(dataclasses.replace(kimi, rope_scaling=None))
    ratio = rope_frequencies(kimi) / plain
    np.testing.assert_allclose(ratio[:20], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[20:], 1 / 32, rtol=1e-6)


class ApplyRope(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(interleave=[True, False], scaled=[True, False], heads=[(), (3,)])
    def test_turns_complex_pairs(self, interleave, scaled, heads):
        scaling = dataclasses.replace(V3.rope_scaling, mscale=0.5) if scaled else None
        config = dataclasses.replace(V3, rope_interleave=interleave, rope_scaling=scaling)
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2, 5, *heads, 64)).astype(np.float32)
        positions = rng.integers(0, 200, (2, 5))
        got = self.variant(lambda x, p: apply_rope(x, p, config))(x, jnp.asarray(positions))

        def as_complex(a):
            a = np.asarray(a, np.float64)
            first, second = (a[..., ::2], a[..., 1::2]) if interleave else np.split(a, 2, -1)
            return first + 1j * second

        angles = positions[..., None] * rope_frequencies(config).astype(np.float64)
        turn = np.exp(1j * angles).reshape(2, 5, *[1] * len(heads), 32)
        scale = scaling.rotation_scale if scaling else 1.0
        np.testing.assert_allclose(as_complex(got), as_complex(x) * turn * scale, atol=1e-4)
        chex.assert_shape(got, x.shape)


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 300), second=st.integers(0, 300), shift=st.integers(0, 300))
def test_score_depends_on_the_distance_only(first, second, shift):
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 64))

    def score(at_q, at_k):
        positions = jnp.array([at_q, at_k])
        turned_q, turned_k = (apply_rope(x, positions, V3) for x in (q, k))
        return float(turned_q[0] @ turned_k[1])

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=2e-2)


def test_keeps_the_dtype_and_computes_in_float32():
    x = jax.random.normal(jax.random.key(0), (4, 64)).astype(jnp.bfloat16)
    positions = jnp.arange(4) * 1000
    got = apply_rope(x, positions, V3)
    wanted = apply_rope(x.astype(jnp.float32), positions, V3).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(got, wanted)


def test_a_traced_function_may_close_over_the_positions():
    x, positions = jnp.ones((1, 2, 64)), jnp.array([[3, -1]], jnp.int32)
    with pytest.raises(ValueError, match="positions must be at least 0, got -1"):
        jax.jit(lambda: apply_rope(x, positions, V3))()
    assert jax.jit(lambda: apply_rope(x, abs(positions), V3))().shape == x.shape


def test_refuses_wrong_shapes():
    x = jnp.zeros((2, 3, 64))
    with pytest.raises(ValueError, match="x must end in qk_rope_head_dim = 64"):
        apply_rope(x[..., :32], jnp.zeros((2, 3), int), V3)
    with pytest.raises(ValueError, match=r"positions \(3, 2\) must be the leading axes of x"):
        apply_rope(x, jnp.zeros((3, 2), int), V3)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("positions", [[0, 1, 2]], TypeError, "positions must be an array, got"),
        ("positions", np.zeros((2, 3)), TypeError, "positions must be .*integers, got float64"),
        ("positions", np.ones((2, 3), bool), TypeError, "positions must be .*integers, got bool"),
        ("positions", np.full((2, 3), -7), ValueError, "positions must be at least 0, got -7"),
        ("x", [0.0] * 64, TypeError, "x must be an array, got .* of type list"),
        ("x", np.zeros((2, 3, 64), int), TypeError, "x must be an array of float32, .* got int64"),
        ("config", None, TypeError, "config must be an MLAConfig, got NoneType"),
    ],
)
def test_refuses_arguments_of_another_kind(name, value, error, message):
    good = {"x": jnp.zeros((2, 3, 64)), "positions": np.zeros((2, 3), np.int64), "config": V3}
    apply_rope(**good)
    with pytest.raises(error, match=message):
        apply_rope(**(good | {name: value}))
