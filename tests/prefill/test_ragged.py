"""`ragged_mla_attention` against float64: packed requests, poison, invalid bounds, bad input."""

import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from paged_batch import TOLERANCE, assert_matches
from ragged_batch import HEADS, SCALE, V_DIM, make_ragged, ragged_float64

import mla_jax
import pallas_kernels
from mla_jax.prefill.registry import RAGGED_IMPLEMENTATIONS

# Empty requests, chunks behind prefixes and whole prefills, over several blocks of queries and keys
# whose edges are inside requests.
QUERIES, KEYS = [0, 130, 1, 57, 0, 70, 33], [0, 130, 200, 57, 9, 270, 40]
attend = functools.partial(mla_jax.ragged_mla_attention, softmax_scale=SCALE, return_lse=True)


@functools.cache
def jitted():
    return jax.jit(attend)


@functools.cache
def clean():
    return make_ragged(np.random.default_rng(1), QUERIES, KEYS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ragged_requests_match_float64(dtype):
    batch = make_ragged(np.random.default_rng(len(dtype)), QUERIES, KEYS, dtype=dtype)
    got = jitted()(*batch.args)
    assert got[0].dtype == jnp.dtype(dtype)
    assert_matches(got, ragged_float64(batch), TOLERANCE[dtype], 1e-5)


def test_every_query_sees_all_keys_without_a_causal_mask():
    """Also with more queries than keys, without keys, and without a rope part."""
    rng = np.random.default_rng(2)
    batch = make_ragged(rng, [20, 3, 0, 9], [7, 0, 4, 300], rope=0, dtype="float16")
    got = attend(*batch.args, causal=False)
    assert_matches(got, ragged_float64(batch, causal=False), TOLERANCE["float16"], 1e-5)
    alone = mla_jax.ragged_mla_attention(*batch.args, softmax_scale=SCALE, causal=False)
    np.testing.assert_array_equal(alone, got[0])


def test_a_row_depends_only_on_keys_that_it_may_see():
    """Keys and values of a token that the last 8 queries of request 5 see, and no other row."""
    hidden = int(np.sum(KEYS[:6])) - 8
    first = int(np.sum(QUERIES[:6])) - 8
    wanted = ragged_float64(clean())
    for name, value in (("k_nope", np.nan), ("k_rope", np.nan), ("v", np.nan), ("v", np.inf)):
        o, lse = (np.array(x) for x in jitted()(*clean().poke(name, hidden, value).args))
        seeing = np.zeros(len(o), bool)
        seeing[first : first + 8] = True
        assert not np.isfinite(o[seeing]).all(-1).any(), name
        if name == "v":  # the score is finite, and only one column of the value is not
            assert np.isfinite(np.delete(o[seeing], 2, -1)).all()
            np.testing.assert_allclose(lse, wanted[1], rtol=0, atol=1e-5)
        o[seeing], lse[seeing] = wanted[0][seeing], wanted[1][seeing]
        assert_matches((o, lse), wanted, TOLERANCE["float32"], 1e-5)


def bounds(array, **changes):
    array = array.copy()
    for index, value in changes.items():
        array[int(index[1:])] = value
    return array


Q, KV = np.cumsum([0, *QUERIES], dtype=np.int32), np.cumsum([0, *KEYS], dtype=np.int32)
LOWEST, HIGHEST = -(2**31), 2**31 - 1
BAD = {  # name -> bounds of queries and keys, rows that are NaN, what the error says
    "queries from 2": (bounds(Q, _0=2, _1=2), KV, range(2), r"cu_q_lens\[0\] must be 0, got 2"),
    "keys from 2": (Q, bounds(KV, _0=2), range(130), r"cu_kv_lens\[0\] must be 0, got 2"),
    "queries past the end": (
        bounds(Q, _7=400),
        KV,
        range(258, 296),
        r"cu_q_lens\[7\] .* 258 .. 296",
    ),
    "keys past the end": (Q, bounds(KV, _7=HIGHEST), range(258, 291), r"cu_kv_lens\[7\] must be"),
    "keys that fall": (Q, bounds(KV, _3=100), range(130, 188), r"cu_kv_lens\[3\] .* 130 .. .* 100"),
    "queries that fall": (bounds(Q, _3=100), KV, range(130, 188), r"cu_q_lens\[3\] .*, got 100"),
    "a negative bound": (Q, bounds(KV, _2=LOWEST), range(131), r"cu_kv_lens\[2\] .* got -2147"),
    "more queries than keys": (bounds(Q, _6=250), KV, range(250, 291), "41 queries and 40 keys"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_requests_are_nan_under_jit_and_refused_outside(name):
    cu_q, cu_kv, rows, message = BAD[name]
    batch = dataclasses.replace(clean(), cu_q_lens=cu_q, cu_kv_lens=cu_kv)
    o, lse = map(np.asarray, jitted()(*batch.args))
    nan = np.isin(np.arange(len(o)), rows)
    for array in (o, lse[..., None]):
        np.testing.assert_array_equal(np.isnan(array).all((1, 2)), nan)
        assert not np.isnan(array[~nan]).any()
    same = ~nan & (np.arange(len(o)) < 100)  # of requests with the bounds of the clean batch
    wanted = ragged_float64(clean())
    assert_matches((o[same], lse[same]), [x[same] for x in wanted], TOLERANCE["float32"], 1e-5)
    with pytest.raises(ValueError, match=message):
        attend(*batch.args)


def test_vmap_is_a_loop():
    few = make_ragged(np.random.default_rng(3), [4, 0, 6], [9, 2, 6])
    other = make_ragged(np.random.default_rng(4), [1, 8, 1], [8, 8, 1])
    stacked = [np.stack(pair) for pair in zip(few.args, other.args, strict=True)]
    got = jax.jit(jax.vmap(attend))(*stacked)
    for i, batch in enumerate((few, other)):
        assert_matches([x[i] for x in got], ragged_float64(batch), TOLERANCE["float32"], 1e-5)


def in_numpy(batch):
    """Returns a batch whose slices, made where tests are collected, compile no program."""
    floats = ("q", "k_nope", "k_rope", "v")
    return dataclasses.replace(batch, **{name: np.asarray(getattr(batch, name)) for name in floats})


GOOD = in_numpy(make_ragged(np.random.default_rng(5), [2, 1], [2, 3], padding=0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"q": [[1.0]]}, TypeError, "q must be an array, got"),
        ({"q": GOOD.q[0]}, ValueError, r"q must be \[Tq, H, nope \+ rope\]"),
        ({"q": GOOD.q[:0]}, ValueError, "q must have no dim of 0"),
        ({"k_nope": GOOD.k_nope[:, :2]}, ValueError, r"k_nope must be .* \[any, 4, any\], got"),
        (
            {"k_nope": GOOD.k_nope.repeat(2, 2)[..., :13]},
            ValueError,
            "k_nope must be .* at most q's 12, got 13",
        ),
        ({"k_rope": GOOD.k_rope[:, :2]}, ValueError, r"k_rope must be .* = \[5, 4\], got shape"),
        ({"k_rope": GOOD.k_rope[:4]}, ValueError, r"k_rope must be .* = \[5, 4\], got shape"),
        ({"v": GOOD.v[:4]}, ValueError, r"v must be \[Tk, H, v_dim\] = \[5, 4, any\]"),
        ({"v": GOOD.v[..., :0]}, ValueError, "v must have no dim of 0"),
        ({"v": GOOD.v.astype("bfloat16")}, TypeError, "v must have the dtype of q, float32, got b"),
        ({"q": np.ones((3, 4, 12))}, TypeError, "q must be an array of float32, .* got float64"),
        ({"cu_q_lens": [0, 2, 3]}, TypeError, "cu_q_lens must be an array"),
        ({"cu_q_lens": np.array([0, 2, 3])}, TypeError, "cu_q_lens must be an int32 array, got i"),
        ({"cu_q_lens": np.zeros(1, np.int32)}, ValueError, "B . 1, the size of cu_q_lens, must be"),
        ({"cu_kv_lens": np.zeros(4, np.int32)}, ValueError, r"cu_kv_lens must be .* = \[3\], got"),
        ({"softmax_scale": 0}, ValueError, "softmax_scale must be above 0"),
        ({"causal": 1}, TypeError, "causal must be True or False"),
        ({"return_lse": None}, TypeError, "return_lse must be True or False"),
        ({"implementation": "split_kv"}, ValueError, "implementation must be .* xla, hopper"),
    ],
)
def test_refuses(options, error, message):
    arguments = {f.name: getattr(GOOD, f.name) for f in dataclasses.fields(GOOD)}
    with pytest.raises(error, match=message):
        mla_jax.ragged_mla_attention(**({"softmax_scale": SCALE} | arguments | options))


def half(nope=128, rope=64, v=128):
    shapes = (4, 2, nope + rope), (4, 2, nope), (4, rope), (4, 2, v)
    floats = [np.ones(shape).astype("bfloat16") for shape in shapes]
    return *floats, *[np.array([0, 1, 4], np.int32)] * 2


def test_hopper_refuses_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "pallas_kernels.hopper.prefill", None)
    monkeypatch.delitem(sys.modules, "pallas_kernels.hopper.prefill.attention", raising=False)
    with pytest.raises(ValueError, match=r"this: pallas_kernels.hopper.prefill.* be imported"):
        attend(*half(), implementation="hopper")


@pytest.fixture
def marked(monkeypatch):
    """A kernel whose programs have a cosine in them, as no other's; it records its arguments."""
    calls = []

    def attend_ragged(q, k_nope, k_rope, v, cu_q_lens, cu_kv_lens, **options):
        calls.append((q, k_nope, k_rope, v, cu_q_lens, cu_kv_lens, options))
        return jnp.cos(q[..., : v.shape[-1]]), jnp.zeros(q.shape[:2], jnp.float32)

    package = types.ModuleType("pallas_kernels.hopper.prefill")
    package.attention = types.ModuleType(f"{package.__name__}.attention")
    package.attention.attend_ragged = attend_ragged
    package.attention.refusal = lambda dtype, **widths: str(widths) if dtype != "bfloat16" else None
    package.attention.__file__ = pallas_kernels.__file__
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, package.attention.__name__, package.attention)
    return calls


def cosines(function, *args, platforms=("cuda",)):
    traced = jax.jit(lambda *args: function(*args)).trace(*args)
    return traced.lower(lowering_platforms=platforms).as_text().count("stablehlo.cosine")


def test_the_choice_is_of_the_platform_that_is_lowered_for(marked):
    assert cosines(attend, *half()) == 1
    [(q, k_nope, k_rope, v, *bounds, options)] = marked
    assert [x.shape for x in (q, k_nope, k_rope, v, *bounds)] == [x.shape for x in half()]
    assert options == {"softmax_scale": SCALE, "causal": True}
    assert cosines(attend, *half(), platforms=("cpu",)) == 0
    with pytest.raises(ValueError, match=r"'hopper' can't run this.* here is cpu"):
        cosines(functools.partial(attend, implementation="hopper"), *half(), platforms=("cpu",))
    for platform, count in (("cuda", 1), ("cpu", 0)):
        exported = export.export(jax.jit(attend), platforms=(platform,))(*half())
        assert exported.mlir_module().count("stablehlo.cosine") == count

    widths = "'nope_dim': 8, 'rope_dim': 4, 'v_dim': 6"
    with pytest.raises(ValueError, match=f"'hopper' can't run this: .{widths}"):
        attend(*GOOD.args, implementation="hopper")

    def gradient(*floats):
        run = lambda *floats: attend(*floats, *half()[4:])[0].astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(run, argnums=(0, 3))(*floats)

    assert cosines(gradient, *half()[:4]) == 1  # hopper forward, the backward pass in plain JAX
    assert tuple(RAGGED_IMPLEMENTATIONS) == ("xla", "hopper")
    assert attend(*GOOD.args)[0][0].size == HEADS * V_DIM  # here by xla
