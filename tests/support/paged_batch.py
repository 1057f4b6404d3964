"""Random ragged batches over a poisoned paged cache, and comparison with a float64 reference."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.cache import PagedKVCache
from mla_jax.reference.attention import paged_attention_float64

RANK, ROPE = 32, 16
GROUPED_RANK = 256  # of an int8 cache with scales per 128 columns
SCALE = 0.2
# For jax.jit where bits are compared: what users get, though `make test` compiles the rest without.
OPTIMISED = {"xla_backend_optimization_level": 3}
PURE = ("reference", "xla", "split_kv")  # implementations in JAX that take every problem
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 1.5e-3}


@dataclasses.dataclass
class Batch:
    """Arguments of the op.

    Rows past a length are NaN, or any number in int8 pages. Entries of block tables past it hold
    garbage.
    """

    q: Any
    cache: PagedKVCache
    block_tables: np.ndarray
    seq_lens: np.ndarray
    query_lens: np.ndarray

    @property
    def args(self) -> tuple:
        return self.q, self.cache, self.block_tables, self.seq_lens

    def oracle(self, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        options = {"softmax_scale": SCALE, "query_lens": self.query_lens} | options
        return paged_attention_float64(*self.args, **options)


def make_batch(
    rng: np.random.Generator,
    seq_lens: list[int],
    query_lens: list[int],
    *,
    num_queries: int | None = None,
    heads: int = 4,
    page_size: int = 16,
    layout: str = "ND",
    dtype: str = "float32",
    capacity: int = 256,
    granularity: str | None = None,
) -> Batch:
    """Returns a batch whose pages are in random order, in a cache that has more pages.

    Values are written element by element, not by `append`. With dtype int8, q is bfloat16 and
    `granularity` is that of the scales.
    """
    seq, queries = np.array(seq_lens, np.int32), np.array(query_lens, np.int32)
    batch, max_pages = len(seq), capacity // page_size
    num_pages = batch * max_pages + 3
    rank = GROUPED_RANK if granularity == "group" else RANK
    create = functools.partial(
        PagedKVCache.create,
        num_pages,
        page_size=page_size,
        kv_lora_rank=rank,
        rope_dim=ROPE,
        dtype=dtype,
        layout=layout,
        scale_granularity=granularity,
        scale=0.02 if granularity == "tensor" else None,
    )
    # Eagerly JAX would compile a program for each array that NumPy fills below.
    cache = create() if granularity == "tensor" else jax.eval_shape(create)
    free = list(rng.permutation(num_pages))
    garbage = np.array([-1, -(2**31), 2**31 - 1, num_pages, 0], np.int32)
    tables = rng.choice(garbage, (batch, max_pages)).astype(np.int32)
    arrays = {name: _poison(rng, x) for name, x in cache.arrays().items() if x.ndim}
    for request, length in enumerate(seq):
        for slot in range(-(-length // page_size)):
            tables[request, slot] = free.pop()
        for position in range(length):
            page, t = tables[request, position // page_size], position % page_size
            for name, array in arrays.items():
                if name == "scales":
                    array[page, t] = rng.uniform(0.01, 0.02, array.shape[2:])
                    continue
                width = array[0].size // page_size
                row = rng.standard_normal(width)
                if array.dtype == np.int8:
                    row = np.clip(np.rint(row * 50), -127, 127)
                address = element(layout, page_size, array.dtype, width, t, np.arange(width))
                array[page].reshape(-1)[address] = row.astype(array.dtype)
    cache = dataclasses.replace(cache, **jax.device_put(arrays))
    shape = (batch, num_queries or max(1, *query_lens), heads, rank + ROPE)
    q_dtype = jnp.dtype("bfloat16" if dtype == "int8" else dtype)
    # NumPy rounds without a compiled program, and device_put copies without one.
    q = jax.device_put(rng.standard_normal(shape).astype(q_dtype))
    return Batch(q, cache, tables, seq, queries)


def _poison(rng: np.random.Generator, array: Any) -> np.ndarray:
    if array.dtype == np.int8:
        return rng.integers(-128, 128, array.shape).astype(np.int8)
    return np.full(array.shape, np.nan, array.dtype)


def element(layout: str, page_size: int, dtype: Any, width: int, t: int, d: Any) -> Any:
    """Returns the index of value d, or of each of d, of token t in a page of rows of `width`."""
    if layout == "ND":
        return t * width + d
    c0 = 32 // dtype.itemsize
    return ((d // c0) * page_size + t) * c0 + d % c0


def relative_error(got: Any, wanted: np.ndarray) -> float:
    """Returns the Frobenius norm of the difference over that of the reference."""
    got = np.asarray(got).astype(np.float64)
    return float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-30))


def assert_matches(got: tuple, wanted: tuple, tolerance: float, lse_tolerance: float) -> None:
    """Asserts relative error of o and absolute error of lse; rows without a key are 0 and -inf."""
    (o, lse), (o_wanted, lse_wanted) = got, wanted
    o, lse = np.asarray(o).astype(np.float64), np.asarray(lse)
    assert o.shape == o_wanted.shape
    assert lse.dtype == np.float32
    empty = np.isneginf(lse_wanted)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert not o[empty].any()
    np.testing.assert_allclose(lse[~empty], lse_wanted[~empty], rtol=0, atol=lse_tolerance)
    assert relative_error(o, o_wanted) <= tolerance
