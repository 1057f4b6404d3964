"""Gradients of `ragged_mla_attention` against autodiff in float64; sharding, memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from paged_batch import assert_matches, relative_error
from ragged_batch import HEADS, SCALE, V_DIM, gradients_float64, make_ragged, ragged_float64

import mla_jax

QUERIES, KEYS = [0, 130, 1, 57, 0, 70, 33], [0, 130, 200, 57, 9, 270, 40]
NAMES = "q", "k_nope", "k_rope", "v"
attend = functools.partial(mla_jax.ragged_mla_attention, softmax_scale=SCALE, return_lse=True)


def pulled(floats, bounds, cotangents):
    """Returns o and lse, and the gradients of the float arrays."""
    out, pull = jax.vjp(lambda *floats: attend(*floats, *bounds), *floats)
    return out, pull(cotangents)


@functools.cache
def jitted():
    return jax.jit(pulled)


@functools.cache
def references():
    """Returns o and lse, and the gradients, of `case`."""
    batch, cotangents = case()
    return ragged_float64(batch), gradients_float64(batch, *cotangents)


@functools.cache
def case():
    rng = np.random.default_rng(6)
    batch = make_ragged(rng, QUERIES, KEYS)
    shape = len(batch.q), HEADS
    d_o, d_lse = rng.standard_normal((*shape, V_DIM)), rng.standard_normal(shape)
    d_o[-5:] = d_lse[-5:] = np.nan  # of padding
    return batch, (d_o.astype(np.float32), d_lse.astype(np.float32))


def test_gradients_match_autodiff_in_float64():
    batch, cotangents = case()
    _, got = jitted()(batch.floats, batch.args[4:], cotangents)
    for name, one, wanted in zip(NAMES, got, references()[1], strict=True):
        assert one.dtype == jnp.float32
        assert relative_error(one, wanted) < 1e-5, name
        np.testing.assert_allclose(one, wanted, rtol=0, atol=2e-5, err_msg=name)


def test_gradients_in_bfloat16():
    batch, (d_o, d_lse) = case()
    floats = [x.astype("bfloat16") for x in batch.floats]
    _, got = jitted()(floats, batch.args[4:], (d_o.astype("bfloat16"), d_lse))
    for name, one, wanted in zip(NAMES, got, references()[1], strict=True):
        assert one.dtype == jnp.bfloat16
        assert relative_error(one, wanted) < 2e-2, name


def test_forward_mode_and_bounds_without_gradient():
    """The tangents along a direction agree with the gradients."""
    batch, (d_o, d_lse) = case()
    rng = np.random.default_rng(7)
    along = tuple(rng.standard_normal(x.shape).astype(np.float32) for x in batch.floats)

    def pushed(floats, along, bounds):
        return jax.jvp(lambda *floats: attend(*floats, *bounds), floats, along)[1]

    tangents = jax.jit(pushed)(batch.floats, along, batch.args[4:])
    products = [
        np.vdot(np.nan_to_num(one), np.nan_to_num(other).astype(np.float64))
        for one, other in (*zip((d_o, d_lse), tangents, strict=True),
                           *zip(references()[1], along, strict=True))
    ]  # fmt: skip
    assert sum(products[:2]) == pytest.approx(sum(products[2:]), rel=1e-5)
    run = functools.partial(mla_jax.ragged_mla_attention, softmax_scale=SCALE)

    def of_bounds(*args):
        gradients = jax.vjp(run, *args)[1](d_o)[4:]
        assert [x.dtype for x in gradients] == [jax.dtypes.float0] * 2

    jax.eval_shape(of_bounds, *batch.args)
    second = jax.grad(lambda q: jax.grad(lambda q: run(q, *batch.args[1:]).sum())(q).sum())
    with pytest.raises(TypeError, match="the attention has first derivatives only"):
        jax.eval_shape(second, batch.q)


@pytest.mark.parametrize("name", [*NAMES, "cotangent", "bounds"])
def test_a_request_that_is_not_finite_keeps_to_itself(name):
    """Request 3 has NaN somewhere: the gradients of the others are as before, its own are not."""
    batch, (d_o, d_lse) = case()
    rows, keys = slice(131, 188), slice(330, 387)
    wanted = jitted()(batch.floats, batch.args[4:], (d_o, d_lse))[1]
    changed = batch
    cu_q, cu_kv = batch.args[4:]
    if name == "cotangent":
        d_o = d_o.copy()
        d_o[rows.start + 3, 1, 2] = np.inf
    elif name == "bounds":  # NaN rows have no gradient
        cu_kv = cu_kv.copy()
        cu_kv[4] = cu_kv[3] + 50  # less than its queries; request 4 has more keys and no query
    else:
        changed = batch.poke(name, (rows if name == "q" else keys).start + 3, np.nan)
    out, got = jitted()(changed.floats, (cu_q, cu_kv), (d_o, d_lse))
    for which, one, before in zip(NAMES, got, wanted, strict=True):
        one, before = np.array(one), np.array(before)
        own = rows if which == "q" else keys
        if name == "bounds":
            assert np.isnan(out[0][rows]).all()
            assert not one[own].any()
        elif which != "v" or name not in ("v", "k_rope", "k_nope"):
            assert np.isnan(one[own]).any(), which
        one[own] = before[own] = 0
        np.testing.assert_array_equal(one, before, err_msg=which)


def test_memory_is_linear_in_length():
    """No array of the program is larger than q."""
    batch = make_ragged(np.random.default_rng(0), [2**16], [2**16], padding=0)
    cotangents = jnp.ones((2**16, HEADS, V_DIM)), jnp.ones((2**16, HEADS))
    program = str(jax.make_jaxpr(pulled)(batch.floats, batch.args[4:], cotangents))
    shapes = re.findall(r"\w+\[([\d,]+)\]", program)
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) == batch.q.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_traces_with_64_bit_types_and_strict_promotion(dtype):
    batch, (d_o, d_lse) = case()
    floats = [x.astype(dtype) for x in batch.floats]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        args = floats, batch.args[4:], (d_o.astype(dtype), d_lse)
        (o, lse), gradients = jax.eval_shape(lambda *args: pulled(*args), *args)
    assert {x.dtype.name for x in (o, *gradients)} == {dtype}
    assert lse.dtype == jnp.float32


SPECS = P(None, "tp"), P(None, "tp"), P(), P(None, "tp")


@pytest.mark.parametrize("form", ["shard_map", "explicit"])
def test_heads_over_devices(form):
    """k_rope is equal on all devices, and its gradient is summed over them."""
    batch, cotangents = case()
    kind = AxisType.Auto if form == "shard_map" else AxisType.Explicit
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(kind,))
    run, heads = pulled, SPECS[0]
    if form == "shard_map":
        specs = {"in_specs": (SPECS, P(), (heads, heads)), "out_specs": ((heads, heads), SPECS)}
        run = jax.shard_map(pulled, mesh=mesh, **specs)

    def put(arrays, specs):
        return tuple(
            jax.device_put(np.asarray(x), NamedSharding(mesh, spec))
            for x, spec in zip(arrays, specs, strict=True)
        )

    args = put(batch.floats, SPECS), put(batch.args[4:], [P()] * 2), put(cotangents, [heads] * 2)
    out, got = jax.jit(run)(*args)
    out_wanted, wanted = references()
    assert_matches(out, out_wanted, 2e-5, 1e-5)
    for name, one, want, given in zip(NAMES, got, wanted, args[0], strict=True):
        assert one.sharding.is_equivalent_to(given.sharding, one.ndim), name
        assert relative_error(one, want) < 1e-5, name
