"""Grouped products: plain JAX and the Hopper kernel, compared with float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import compile_sm90a
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments.framework.errors import relative_error
from experiments.generate.grouped import ALIGN, grouped_product, hopper_product, num_rows, takes

BOUND = 4e-3  # of sums that are rounded to bfloat16 once


def case(sizes, depth, columns, unused=np.nan, dtype=jnp.bfloat16):
    """Rows, the experts' matrices, which are `unused` for experts without rows, and sizes."""
    rng = np.random.default_rng()
    count = num_rows(sum(sizes), len(sizes))
    x = rng.normal(size=(count, depth))
    weights = rng.normal(size=(len(sizes), depth, columns))
    weights[np.array(sizes) == 0] = unused
    aligned = -(-np.array(sizes, np.int32) // ALIGN) * ALIGN
    rows, weights = jax.device_put((x.astype(dtype), weights.astype(dtype)))
    return rows, weights, aligned


def check(got, x, weights, sizes):
    rows, weights, got = (np.asarray(a, np.float64) for a in (x, weights, got))
    start = 0
    for expert, size in enumerate(sizes):
        mine = slice(start, start + size)
        want = rows[mine] @ weights[expert]
        assert relative_error(got[mine], want) < BOUND, expert
        start += size


# An expert without rows, one with two tiles, one whose last tile is full.
SIZES = (3, 0, 70, 64, 1)


def test_plain_jax():
    arguments = case(SIZES, 64, 128, unused=0)  # XLA multiplies it by 0
    check(jax.jit(grouped_product)(*arguments), *arguments)


def test_the_kernel_interpreted(races):
    races.in_global = False  # of two CTAs that store to rows of their own
    arguments = case(SIZES, 128, 256)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    product = functools.partial(hopper_product, num_sms=3, interpret=interpret)
    check(jax.jit(product)(*arguments), *arguments)
    assert not races.found


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 2816), (1408, 2048)])
def test_the_kernel_on_a_gpu(shape):
    """V2-Lite's widths; a batch of 64 requests, and a chunk of a prompt."""
    rng = np.random.default_rng()
    for pairs in (384, 6144):
        sizes = rng.multinomial(pairs, np.full(64, 1 / 64)).tolist()
        arguments = case(sizes, *shape)
        assert takes(*arguments[:2])
        check(jax.jit(grouped_product)(*arguments), *arguments)


@pytest.mark.gpu
@pytest.mark.compile
def test_the_kernel_compiles_without_spills():
    x = jax.ShapeDtypeStruct((num_rows(384, 64), 2048), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((64, 2048, 2816), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((64,), jnp.int32)
    [report] = compile_sm90a(lambda *a: hopper_product(*a, num_sms=132), x, weights, sizes)
    assert report.spill_stores == report.spill_loads == 0
    assert not report.serialized
