"""The block recurrence against float64; every hazard of AMLA that was measured."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_jax.online_softmax import finalize, init_state, merge_states, update

RESCALES = ("multiply", "exponent_add")
SEEDS = st.integers(0, 2**32 - 1)
TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3, "float16": 8e-4}
# What rounding P to the dtype may do to one element, whose terms may partly cancel.
PER_ELEMENT = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


@functools.partial(jax.jit, static_argnames=("block", "rescale", "compensate"))
def blockwise(scores, values, block, rescale, compensate=True):
    """The recurrence over all blocks of scores [R, T] and values [T, D]."""

    def step(state, keys):
        return update(state, *keys, rescale=rescale, compensate=compensate), None

    scores = scores.reshape(len(scores), -1, block).swapaxes(0, 1)
    values = values.reshape(-1, block, values.shape[1])
    state = init_state(scores.shape[1:2], values.shape[2])
    blocks = scores, values
    return finalize(jax.lax.scan(step, state, blocks)[0])


def softmax_float64(scores, values):
    scores, values = np.asarray(scores, np.float64), np.asarray(values).astype(np.float64)
    assert np.isfinite(values).all()
    seen = np.isfinite(scores)
    top = scores.max(1, keepdims=True, where=seen, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)
    weights = np.exp(np.where(seen, scores, -np.inf) - top)
    total = weights.sum(1, keepdims=True)
    empty = total == 0
    total = np.where(empty, 1, total)
    return weights @ values / total, np.where(empty, -np.inf, top + np.log(total))[:, 0]


def relative_error(got, wanted):
    return np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)


def draw(seed, rows=24, keys=512, dim=16, dtype="float32", spread=1.0):
    rng = np.random.default_rng(seed)
    scores = (spread * rng.standard_normal((rows, keys))).astype(np.float32)
    return jax.device_put((scores, rng.standard_normal((keys, dim)).astype(jnp.dtype(dtype))))


def flash_inputs(kind, rng, rows=64, keys=4096, width=576):
    """Rows, keys and latents of the accuracy table: scores [64, 4096], values [4096, 512], bf16."""
    if kind == "uniform":
        q, kv = rng.uniform(-1, 1, (rows, width)), rng.uniform(-1, 1, (keys, width))
    else:
        spread = 3.0 if kind == "normal 3" else 1.0
        q, kv = spread * rng.standard_normal((2, rows, width)), rng.standard_normal((keys, width))
        q, kv = q[0], spread * kv
        if kind == "ramp":
            kv = kv * np.linspace(0.2, 2.0, keys)[:, None]
    q, kv = (x.astype(jnp.bfloat16).astype(np.float64) for x in (q, kv))
    scores = (q @ kv.T * 192**-0.5).astype(np.float32)
    return scores, kv[:, :512].astype(jnp.bfloat16)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_recurrence_and_merge(self):
        scores, values = map(np.asarray, draw(0, keys=64))
        for rescale in RESCALES:
            take = self.variant(functools.partial(update, rescale=rescale))
            begin, end = (scores[:, :32], values[:32]), (scores[:, 32:], values[32:])
            first, second = (take(init_state((24,), 16), *part) for part in (begin, end))
            whole = self.variant(finalize)(take(first, *end))
            parts = zip(finalize(first), finalize(second), strict=True)
            parts = [np.stack(pair) for pair in parts]
            for o, lse in (whole, self.variant(merge_states)(*parts)):
                o_wanted, lse_wanted = softmax_float64(scores, values)
                assert relative_error(o, o_wanted) < 2e-6
                np.testing.assert_allclose(lse, lse_wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_blocks_match_float64(rescale, dtype, spread):
    scores, values = draw(1, dtype=dtype, spread=spread)
    o, lse = blockwise(scores, values, 32, rescale)
    o_wanted, lse_wanted = softmax_float64(scores, values)
    assert relative_error(o, o_wanted) < TOLERANCE[dtype]
    np.testing.assert_allclose(lse, lse_wanted, rtol=2e-7, atol=1e-6)


@given(SEEDS, st.sampled_from([16, 64]), st.floats(0.01, 50), st.floats(-300, 300))
def test_exponent_add_is_multiply_within_its_bound(seed, block, spread, offset):
    """In float32 nothing is rounded on the way, so only rounding errors of float32 remain."""
    scores, values = draw(seed, rows=8, keys=128, dim=8, spread=spread)
    unseen = np.random.default_rng(seed).random(scores.shape) < 0.2
    scores = np.where(unseen, np.float32(-np.inf), np.asarray(scores)) + np.float32(offset)
    multiply = blockwise(scores, values, block, "multiply")
    exponent_add = blockwise(scores, values, block, "exponent_add")
    np.testing.assert_array_equal(multiply[1], exponent_add[1])
    assert relative_error(exponent_add[0], np.asarray(multiply[0], np.float64)) < 2e-6


@pytest.mark.parametrize("kind", ["normal 1", "normal 3", "uniform", "ramp"])
def test_amla_is_as_accurate_as_flash_attention_in_bfloat16(kind):
    scores, values = flash_inputs(kind, np.random.default_rng(5))
    wanted, _ = softmax_float64(scores, values)
    flash = relative_error(blockwise(scores, values, 512, "multiply")[0], wanted)
    amla = relative_error(blockwise(scores, values, 512, "exponent_add")[0], wanted)
    assert amla < 1.25 * flash
    assert amla < 2.5e-3


def test_no_compensation_is_worse():
    ratios = []
    for seed in range(3):
        scores, values = flash_inputs("normal 1", np.random.default_rng(seed))
        wanted, _ = softmax_float64(scores, values)
        errors = [
            relative_error(blockwise(scores, values, 512, "exponent_add", on)[0], wanted)
            for on in (True, False)
        ]
        ratios.append(errors[1] / errors[0])
    assert min(ratios) > 1.2, ratios


class TestHazards:
    """What breaks an integer add to the bits of O: see the docstring of `_add_to_exponent`."""

    def test_a_column_that_is_zero_in_the_first_block_only(self):
        rng = np.random.default_rng(2)
        scores = rng.standard_normal((64, 1024)) + np.arange(1024) // 256 * 3.0  # m rises
        scores, values = jnp.asarray(scores, jnp.float32), np.ones((1024, 8), np.float32)
        values[:256, 3] = 0.0
        o, _ = blockwise(scores, jnp.asarray(values), 256, "exponent_add")
        wanted, _ = softmax_float64(scores, values)
        assert (o[:, 3] > 0.5).all()
        np.testing.assert_allclose(o, wanted, rtol=5e-6)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("rise", [15.0, 20.7, 21.0, 60.0])
    def test_a_total_rise_that_underflows_what_was_summed(self, rise, dtype):
        """Columns whose values are 0 from some block on fall below 2^-126 and must stay there."""
        scores = rise * np.arange(24).repeat(16) + np.random.default_rng(3).random((4, 24 * 16))
        scores = jnp.asarray(scores, jnp.float32)
        values = np.random.default_rng(4).standard_normal((24 * 16, 24))
        for column in range(24):
            values[16 * (column + 1) :, column] = 0.0
        values = jnp.asarray(values, dtype)
        o, _ = blockwise(scores, values, 16, "exponent_add")
        wanted, _ = softmax_float64(scores, values)
        assert np.isfinite(o).all()
        np.testing.assert_allclose(o, wanted, rtol=PER_ELEMENT[dtype], atol=2.0**-30)

    @pytest.mark.parametrize("rescale", RESCALES)
    @pytest.mark.parametrize("masked", [1, 3, 8])
    def test_first_blocks_that_a_row_does_not_see(self, rescale, masked):
        scores, values = draw(6, keys=8 * 32)
        scores = np.array(scores)
        scores[::2, : masked * 32] = -np.inf
        o, lse = blockwise(scores, values, 32, rescale)
        o_wanted, lse_wanted = softmax_float64(scores, values)
        o, lse = np.asarray(o), np.asarray(lse)
        assert np.isfinite(o).all()
        assert relative_error(o, o_wanted) < 2e-6
        np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(lse_wanted))
        if masked == 8:
            assert not o[::2].any()

    @pytest.mark.parametrize("offset", [-3000.0, -1e5, 3000.0, 1e5])
    def test_large_scores_keep_their_residual(self, offset):
        scores, values = draw(7, dtype="bfloat16")
        scores = scores + offset
        wanted, _ = softmax_float64(scores, values)
        errors = [relative_error(blockwise(scores, values, 32, how)[0], wanted) for how in RESCALES]
        assert errors[1] < 1.5 * errors[0]

    def test_nan_stays_loud(self):
        scores, values = draw(8)
        for rescale in RESCALES:
            o, lse = blockwise(scores.at[3, 100].set(jnp.nan), values, 32, rescale)
            assert np.isnan(o[3]).all()
            assert np.isnan(lse[3])
            assert np.isfinite(np.delete(o, 3, axis=0)).all()


class TestHiddenAndInfiniteValues:
    def test_what_a_row_must_not_see_never_reaches_it(self):
        """Mixed: each key is hidden from one row; inf, -inf, both, and NaN are seen by others."""
        scores, values = draw(11, rows=4, keys=64)
        values = np.array(values)
        values[5, 0], values[6, 1], values[7, 1], values[40, 2] = np.inf, -np.inf, np.inf, np.nan
        hidden = np.zeros(scores.shape, bool)
        hidden[0, [5, 6, 7, 40]] = hidden[1, [6, 40]] = hidden[2, [5, 7]] = True
        scores = jnp.where(hidden, -jnp.inf, scores)
        wanted = softmax_float64(scores, np.where(np.isfinite(values), values, 0))
        o_wanted = wanted[0]
        o_wanted[1, 0], o_wanted[1, 1], o_wanted[2, 1] = np.inf, np.inf, -np.inf
        o_wanted[2, 2] = np.nan
        o_wanted[3, :3] = np.inf, np.nan, np.nan
        for rescale in RESCALES:
            # The maximum rises by far more than float32 spans: what is infinite stays so.
            for rise in (0.0, 500.0):
                raised = scores.at[:, 48:].add(rise)
                o, lse = blockwise(raised, jnp.asarray(values), 16, rescale)
                finite = np.isfinite(o_wanted)
                np.testing.assert_array_equal(np.asarray(o)[~finite], o_wanted[~finite])
                assert np.isfinite(np.asarray(o)[finite]).all()
                if rise == 0.0:
                    np.testing.assert_allclose(o[finite], o_wanted[finite], rtol=1e-4, atol=1e-5)
                    np.testing.assert_allclose(lse, wanted[1], rtol=0, atol=2e-6)

    @pytest.mark.parametrize("rescale", RESCALES)
    def test_a_score_of_plus_infinity_makes_its_row_nan(self, rescale):
        scores, values = draw(12, rows=4, keys=64)
        o, lse = blockwise(scores.at[1, 20].set(jnp.inf), values, 16, rescale)
        np.testing.assert_array_equal(np.isnan(lse), [False, True, False, False])
        np.testing.assert_array_equal(np.isnan(o).all(1), [False, True, False, False])
        assert np.isfinite(np.asarray(o)[[0, 2, 3]]).all()

    def test_an_infinite_part_stays_so_when_merged(self):
        o = jnp.array([[[jnp.inf, 1.0]], [[2.0, 3.0]]])
        merged, _ = merge_states(o, jnp.array([[0.0], [500.0]]))
        np.testing.assert_array_equal(merged, [[np.inf, 3.0]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exponent_add_takes_scores_of_any_size(dtype):
    """Offsets, spreads and first blocks up to the ends of float32, against float64."""
    base, values = draw(13, rows=8, keys=128, dim=8, dtype=dtype)
    far = np.float32(3.4e38)
    first = np.arange(128) < 32
    cases = [base * np.float32(size) for size in (1e4, 1e10, 1e20, 1e37)]
    cases += [jnp.rint(base) * 1024 + np.float32(size) for size in (1e10, -1e10, 1e20, 1e38)]
    cases += [jnp.where(first, low, base) for low in (-1e30, -far)]
    cases += [jnp.where(first, base, far), jnp.where(first, -far, far), jnp.full_like(base, far)]
    for number, scores in enumerate(cases):
        scores = jnp.broadcast_to(scores, base.shape).astype(jnp.float32)
        wanted = softmax_float64(scores, values)
        for rescale in RESCALES:
            o, lse = blockwise(scores, values, 16, rescale)
            assert relative_error(o, wanted[0]) < TOLERANCE[dtype], (number, rescale)
            np.testing.assert_allclose(lse, wanted[1], rtol=3e-7, atol=2e-6)


def derivative_float64(scores, values, d_scores, d_values):
    """Of o and lse, by the softmax's own derivative."""
    scores, values, d_values = (np.asarray(x, np.float64) for x in (scores, values, d_values))
    d_scores = np.where(np.isfinite(scores), np.asarray(d_scores, np.float64), 0)
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    d_lse = (p * d_scores).sum(1)
    return (p * (d_scores - d_lse[:, None])) @ values + p @ d_values, d_lse


class TestDerivative:
    """Through exponent_add it is the multiplication's, over all blocks."""

    def draw(self, seed=14):
        """Maxima that rise from block to block, hidden first blocks, and tangents."""
        scores, values = draw(seed, rows=6, keys=64, dim=4)
        scores = scores + jnp.arange(64) // 16 * 0.7
        scores = scores.at[::2, :20].set(-jnp.inf)
        tangents = draw(seed + 1, rows=6, keys=64, dim=4)
        return (scores, values), tangents

    def test_forward_and_backward_under_scan_match_float64(self):
        primals, tangents = self.draw()

        def run(scores, values):
            return blockwise(scores, values, 16, "exponent_add")

        wanted = derivative_float64(*primals, *tangents)
        got = jax.jit(lambda *d: jax.jvp(run, primals, d)[1])(*tangents)
        for one, right in zip(got, wanted, strict=True):
            assert relative_error(one, right) < 1e-5
        weights = draw(20, rows=6, keys=4)[0]

        def loss(scores, values):
            o, lse = run(scores, values)
            return (weights * o).sum() + lse.sum()

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(*primals)
        along = sum(np.vdot(g, t) for g, t in zip(gradients, tangents, strict=True))
        right = (np.asarray(weights, np.float64) * wanted[0]).sum() + wanted[1].sum()
        np.testing.assert_allclose(along, right, rtol=1e-4)
        assert np.abs(np.asarray(gradients[0])[1::2, :16]).max() > 1e-3  # of the earliest block

    def test_under_vmap(self):
        """Row by row, each with its tangent, in two blocks."""
        (scores, values), (d_scores, d_values) = self.draw(16)

        def run(scores, values):
            state = init_state((1,), 4)
            for part in (slice(None, 32), slice(32, None)):
                state = update(state, scores[None, part], values[part], rescale="exponent_add")
            o, lse = finalize(state)
            return o[0], lse[0]

        @jax.jit
        def derivative(row, d_row):
            return jax.jvp(run, (row, values), (d_row, d_values))[1]

        got = jax.vmap(derivative)(scores, d_scores)
        wanted = derivative_float64(scores, values, d_scores, d_values)
        for one, right in zip(got, wanted, strict=True):
            assert relative_error(one, right) < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rescale": "x"}, ValueError, "rescale must be one of multiply, exponent_add, got 'x'"),
        ({"compensate": 1}, TypeError, "compensate must be True or False"),
        ({"state": None}, TypeError, "state must be a SoftmaxState, got NoneType"),
        ({"scores": [[1.0]]}, TypeError, "scores must be an array, got list"),
        ({"scores": np.ones((2, 3), np.int32)}, TypeError, "scores must be an array of .* int32"),
        ({"scores": jnp.ones((2, 3), jnp.bfloat16)}, TypeError, "scores .* float32, got bfloat16"),
        ({"scores": np.ones((3, 3), np.float32)}, ValueError, r"scores must be .*\[2\].*\[3, 3\]"),
        ({"scores": np.ones((2, 0), np.float32)}, ValueError, "scores must be .* T at least 1"),
        ({"values": None}, TypeError, "values must be an array, got NoneType"),
        ({"values": np.ones((3, 4), np.int8)}, TypeError, "values must be an array of .* int8"),
        ({"values": np.ones((2, 4), np.float32)}, ValueError, r"values must be .* \[3, 4\], got"),
        ({"values": np.ones((2, 3, 4), np.float32)}, ValueError, r"values must be .* \[2, 3, 4\]"),
    ],
)
def test_update_refuses(change, error, message):
    good = {
        "state": init_state((2,), 4),
        "scores": np.ones((2, 3), np.float32),
        "values": np.ones((3, 4), np.float32),
    }
    with pytest.raises(error, match=message):
        update(**(good | change))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: finalize(None), TypeError, "state must be a SoftmaxState, got NoneType"),
        (lambda: finalize((1, 2)), TypeError, "state must be a SoftmaxState, got tuple"),
        (lambda: init_state(2, 4), TypeError, "rows_shape must be a tuple, .* got 2 of type int"),
        (lambda: init_state((-1,), 4), ValueError, r"rows_shape\[0\] must be at least 0, got -1"),
        (lambda: init_state((2,), 1.5), TypeError, "value_dim must be an integer, got 1.5"),
    ],
)
def test_states_are_checked(call, error, message):
    with pytest.raises(error, match=message):
        call()
