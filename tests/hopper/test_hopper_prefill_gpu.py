"""GPU tests of the prefill kernel: random lengths and heads, poison, repeats, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prefill_batch import SCALE, PrefillBatch, random_bounds, random_lengths

from pallas_kernels.hopper.prefill import attention
from pallas_kernels.hopper.prefill.list_kernel import MOST_REQUESTS, list_tiles
from pallas_kernels.hopper.prefill.work_items import work_list

BF16, F16 = jnp.bfloat16, jnp.float16
ROWS, KEYS, REQUESTS = 1100, 2300, 9


@functools.partial(jax.jit, static_argnames="causal")
def attend(*arguments, causal):
    return attention.attend_ragged(*arguments, softmax_scale=SCALE, causal=causal)


def bits_equal(a: jax.Array, b: jax.Array) -> bool:
    """Compares bytes: a NaN equals a NaN with the same bits."""
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "dtype", "widths", "causal", "joined"),
    [
        (1, BF16, (128, 64, 128), True, True),
        (3, F16, (128, 64, 128), True, False),
        (16, BF16, (128, 64, 128), True, True),
        (5, BF16, (128, 64, 128), False, True),
        (7, BF16, (128, 0, 128), True, False),
        (2, F16, (192, 0, 128), False, True),
        (3, BF16, (192, 64, 256), True, True),
        (2, F16, (192, 64, 256), False, False),
        (4, F16, (192, 64, 128), True, True),
        (5, BF16, (192, 64, 128), False, True),
        (2, BF16, (128, 64, 256), True, False),
        (3, F16, (128, 0, 256), True, True),
        (2, BF16, (192, 0, 256), True, True),
    ],
)
def test_random_lengths_on_the_gpu(heads, dtype, widths, causal, joined):
    """Requests of any length at any row; keys that are not finite where few rows see them."""
    rng = np.random.default_rng(heads)
    for draw in range(12):
        rows = (ROWS, 130, 3)[draw % 3]
        lens = random_lengths(rng, REQUESTS, rows, KEYS, causal=causal)
        batch = PrefillBatch(
            rng, lens, rows=ROWS, keys=KEYS, heads=heads, dtype=dtype, widths=widths, causal=causal
        )
        for key in rng.integers(0, max(1, batch.cu_kv[-1]), draw % 4):
            batch.poison(key, only_v=bool(rng.integers(2)))
        arguments = batch.arguments(joined=joined)
        o, lse = attend(*arguments, causal=causal)
        batch.check(o, lse, lse_of_spoiled=False)
        again = attend(*arguments, causal=causal)
        for first, second in zip((o, lse), again, strict=True):
            assert bits_equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(128, 64, 128), (192, 64, 256)])
def test_every_start_on_the_gpu(widths):
    """Requests that begin at each row and at each key, modulo 128."""
    rng = np.random.default_rng(0)
    for start in range(0, 128, 3):
        lens = [(start, start), (70, 70 + start), (140, 2 * start + 140), (130, 130)]
        batch = PrefillBatch(rng, lens, rows=ROWS, keys=KEYS, heads=2, widths=widths)
        batch.check(*attend(*batch.arguments(joined=True), causal=True))


@pytest.mark.gpu
def test_invalid_requests_on_the_gpu():
    """Each kind of invalid bounds makes the rows of its request NaN, and those of no other."""
    rng = np.random.default_rng(1)
    lens = [(100, 200), (300, 300), (50, 400), (200, 210)]
    for cu_q, cu_kv, invalid in [
        ([0, 100, 400, 450, 650], [0, 200, 499, 899, 1109], [1]),  # more queries than keys
        ([0, 100, 400, 450, 650], [0, 200, 500, 490, 1110], [2, 3]),  # decreasing
        ([0, 100, 400, 450, 650], [0, 200, 500, 900, KEYS + 1], [3]),
        ([0, 100, 400, 450, 650], [-1, 200, 500, 900, 1110], [0]),
        ([0, 100, 400, 450, ROWS + 1], [0, 200, 500, 900, 1110], [3]),
        ([0, 100, 90, 450, 650], [0, 200, 500, 900, 1110], [1, 2]),
        ([2**31 - 1] * 5, [-(2**31)] * 5, [0, 1, 2, 3]),
    ]:
        batch = PrefillBatch(rng, lens, rows=ROWS, keys=KEYS, heads=4)
        edges = np.maximum.accumulate(np.clip(cu_q, 0, ROWS))
        edges[0] = 0
        batch.cu_q, batch.cu_kv = (np.array(x, np.int32) for x in (cu_q, cu_kv))
        o, lse = attend(*batch.arguments(joined=True), causal=True)
        rows = [slice(edges[b], edges[b + 1]) for b in invalid]
        batch.lens = [
            (0, 0) if b in invalid else (cu_q[b + 1] - cu_q[b], cu_kv[b + 1] - cu_kv[b])
            for b in range(len(lens))
        ]
        batch.check(o, lse, invalid=rows)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "rows", "widths"),
    [
        (128, 2048, (128, 64, 128)),
        (16, 5000, (128, 64, 128)),
        (20, 5000, (192, 64, 256)),
        (64, 2048, (192, 64, 128)),
        (20, 3000, (128, 64, 256)),
        (20, 3000, (128, 0, 256)),
    ],
)
def test_long_requests_repeat_on_the_gpu(heads, rows, widths):
    """All CTAs have several items. 20 repeats have the same bits."""
    rng = np.random.default_rng(heads)
    lens = [(rows - 700, rows - 700), (600, 2500), (100, 101)]
    keys = sum(m for _, m in lens)
    batch = PrefillBatch(rng, lens, rows=rows, keys=keys, heads=heads, widths=widths)
    arguments = batch.arguments(joined=True)
    first = attend(*arguments, causal=True)
    for _ in range(20):
        for a, b in zip(first, attend(*arguments, causal=True), strict=True):
            assert bits_equal(a, b)
    chosen = [0, heads // 2, heads - 1]
    batch.q, batch.k, batch.v = (x[:, chosen] for x in (batch.q, batch.k, batch.v))
    batch.check(*(x[:, np.array(chosen)] for x in first))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("requests", "rows", "keys"),
    [(1, 5000, 9000), (16, 8192, 20_000), (130, 700, 5000), (512, 16_384, 40_000),
     (MOST_REQUESTS, 3000, 100_000)],
)  # fmt: skip
def test_one_kernel_makes_the_same_list_on_the_gpu(requests, rows, keys, causal):
    """The kernel's list equals that of `work_list`, also for bounds that can't be."""
    options = {
        "num_queries": rows,
        "num_keys": keys,
        "causal": causal,
        "num_heads": 128,
        "bytes_per_key": 512,
    }
    made = jax.jit(functools.partial(list_tiles, **options))
    specified = jax.jit(functools.partial(work_list, **options))
    rng = np.random.default_rng(requests)
    for _ in range(300):
        bounds = random_bounds(rng, requests, rows, keys)
        for got, wanted in zip(made(*bounds), specified(*bounds), strict=True):
            np.testing.assert_array_equal(got, wanted)
