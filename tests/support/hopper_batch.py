"""Poisoned batches for the Hopper kernels, and FlashMLA's rule for passing."""

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fuzz.judge import SUM_ERROR, TAIL, UNIT

from mla_jax import paged_mla_attention
from mla_jax.cache import PagedKVCache
from mla_jax.reference.attention import paged_attention_float64

SCALE = 192**-0.5
GARBAGE_PAGE = 2147480000
LEAST_CACHED, LEAST_TABLE = 1792, 768  # tokens of a batch's pages and of a block table, at least
MANY_TOKENS = 1 << 17  # tokens per block table, above the limit of `tuned.few_tokens`


class HopperBatch:
    """Latents and rope keys, of DeepSeek's widths by default, in pages of random order.

    Page tails, unused pages and rows of q past a request's query length hold NaN. Unused entries of
    block tables hold GARBAGE_PAGE. A length of -1 is that of a request that the op found invalid.

    Batches of few tokens have equally many pages, and block tables of equal widths. So the ones
    with equally many requests share one program. `requests` adds requests without keys, up to that
    number.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        seq_lens: list[int],
        *,
        heads: int,
        requests: int = 0,
        num_queries: int = 1,
        query_lens: list[int] | None = None,
        page_size: int = 64,
        dtype: Any = jnp.bfloat16,
        kv_lora_rank: int = 512,
        rope_dim: int = 64,
    ):
        width = kv_lora_rank + rope_dim
        lens = np.array(seq_lens + [0] * (requests - len(seq_lens)), np.int32)
        pages_of = -(-np.maximum(lens, 0) // page_size)
        num_pages, table_width = cache_sizes(pages_of, page_size)
        order = rng.permutation(num_pages)
        tables = np.full((len(lens), table_width), GARBAGE_PAGE, np.int32)
        pages = np.full((num_pages, page_size, width), np.nan, np.float32)
        stop = np.cumsum(pages_of)
        for row, length, count, end in zip(tables, lens, pages_of, stop, strict=True):
            row[:count] = order[end - count : end]
            kv = np.full((count * page_size, width), np.nan, np.float32)
            kv[: max(length, 0)] = rng.standard_normal((max(length, 0), width)) * 0.1
            pages[row[:count]] = kv.reshape(count, page_size, width)
        # KV has the magnitude of FlashMLA's tests, because their absolute tolerance fits it.
        # Queries are large enough that the softmax is not flat.
        q = rng.standard_normal((len(lens), num_queries, heads, width)).astype(np.float32) * 10
        queries = query_lengths(lens, num_queries, query_lens)
        q[np.arange(num_queries) >= queries[:, None]] = np.nan
        # numpy rounds, because JAX would compile a program per shape.
        self.q = jnp.asarray(q.astype(dtype))
        pages = jnp.asarray(pages.astype(dtype))
        self.cache = PagedKVCache(pages, kv_lora_rank, rope_dim, page_size, "ND")
        self.block_tables = jnp.asarray(tables)
        self.seq_lens = jnp.asarray(lens)
        self.query_lens = jnp.asarray(queries, jnp.int32)

    def reference(self, *, causal: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Returns o and lse in float64, of requests without a key where a request is invalid."""
        seq_lens = np.asarray(self.seq_lens)
        return paged_attention_float64(
            self.q,
            self.cache,
            np.asarray(self.block_tables),
            np.maximum(seq_lens, 0),
            softmax_scale=SCALE,
            query_lens=np.where(seq_lens < 0, 0, np.asarray(self.query_lens)),
            causal=causal,
        )

    def check(self, o: Any, lse: Any, *, causal: bool = True) -> None:
        """Asserts that o and lse pass FlashMLA's rule, compared with float64.

        Infinities and NaN are exactly where they belong. o is within 8e-4 absolute or 2.01/128
        relative, with a cosine difference below 5e-6. lse is within 1e-6 absolute or 8.01/65536
        relative. Where lse is near 0 that is less than float32 can hold: a score is a sum of
        terms that cancel, and may be off by the rounding of these terms (see `fuzz.judge`).
        """
        invalid = np.asarray(self.seq_lens) < 0
        expected, expected_lse = self.reference(causal=causal)
        o = np.asarray(o).astype(np.float64).reshape(expected.shape)
        lse = np.asarray(lse).astype(np.float64).reshape(expected_lse.shape)
        assert np.isnan(o[invalid]).all()
        assert np.isnan(lse[invalid]).all()
        o, expected, lse, expected_lse = (x[~invalid] for x in (o, expected, lse, expected_lse))
        finite = np.isfinite(expected_lse)
        np.testing.assert_array_equal(lse[~finite], -np.inf)
        np.testing.assert_array_equal(o[~finite], 0.0)
        assert np.isfinite(o).all()
        assert np.isfinite(lse[finite]).all()
        off = np.abs(o - expected)
        passes = (off < 8e-4) | (off < 2.01 / 128 * np.abs(expected))
        assert passes.all(), f"{(~passes).sum()} of {passes.size} values off, by {off.max():.2e}"
        if finite.any():
            cosine = 2 * (o * expected).sum() / (o**2 + expected**2).sum()
            assert 1 - cosine < 5e-6, f"cosine difference {1 - cosine:.2e}"
            off = np.abs(lse[finite] - expected_lse[finite])
            absolute = np.maximum(1e-6, self._score_rounding()[~invalid][finite])
            rule = (off < absolute) | (off < 8.01 / 65536 * np.abs(expected_lse[finite]))
            assert rule.all(), f"lse off by {off.max():.2e}"

    def _score_rounding(self) -> np.ndarray:
        """Returns by how much a float32 sum may be off in the scores of each row, [B, S, H]."""
        q, pages = (np.asarray(x).astype(np.float32) for x in (self.q, self.cache.pages))
        key_norm = np.sqrt(np.nanmax(np.einsum("...d,...d->...", pages, pages)))
        size = SCALE * np.linalg.norm(q, axis=-1) * key_norm / q.shape[-1] ** 0.5
        return TAIL * SUM_ERROR * UNIT["float32"] * size


def cache_sizes(pages_of: np.ndarray, page_size: int) -> tuple[int, int]:
    """Returns the number of pages and the width of a block table, for requests of so many pages."""
    num_pages, table_width = int(pages_of.sum()) + 3, max(1, int(pages_of.max())) + 2
    return max(num_pages, LEAST_CACHED // page_size), max(table_width, LEAST_TABLE // page_size)


def query_lengths(lens: np.ndarray, num_queries: int, given: list[int] | None) -> np.ndarray:
    """Returns query lengths as given, 0 after them; None: as many as a request has room for."""
    if given is None:
        return np.clip(lens, 0, num_queries)
    return np.array(given + [0] * (len(lens) - len(given)), np.int32)


SPOILED_LENGTHS = [300, 200, 130, 70, 70, 90]


def spoiled(batch: Any) -> tuple[Any, Any]:
    """Returns a batch with four invalid requests, and the batch that checks its result.

    batch: has SPOILED_LENGTHS and two query tokens. Its requests 1 to 4 become invalid, each in
    another way.
    """
    found, expected = copy.copy(batch), copy.copy(batch)
    tables, lens, queries = (
        np.array(x) for x in (batch.block_tables, batch.seq_lens, batch.query_lens)
    )
    page_size = batch.cache.page_size
    tables[1, (lens[1] - 1) // page_size] = batch.cache.num_pages  # the last page in use
    tables[2, 0] = -1
    tables[3] = tables[0, 0]  # Pages that exist, so that only its length is wrong.
    lens[3] = tables.shape[1] * page_size + 1
    queries[4] = 3
    found.block_tables, found.seq_lens, found.query_lens = map(jnp.asarray, (tables, lens, queries))
    set_invalid(expected, slice(1, 5))
    return found, expected


def set_invalid(batch: Any, requests: slice) -> None:
    """Makes a batch expect NaN for some requests."""
    lens = np.array(batch.seq_lens)
    lens[requests] = -1
    batch.seq_lens = jnp.asarray(lens)


def invalid_requests(heads: int, page_size: int, **shape: Any) -> tuple[HopperBatch, HopperBatch]:
    """Returns `spoiled` for a batch of floats."""
    rng = np.random.default_rng(heads)
    shape |= {"heads": heads, "num_queries": 2, "page_size": page_size}
    return spoiled(HopperBatch(rng, SPOILED_LENGTHS, **shape))


def with_latents_times(batch: HopperBatch, factor: float) -> HopperBatch:
    """Returns a batch with exactly the same scores and outputs times `factor`, a power of two."""
    scaled = copy.copy(batch)
    q, pages = np.array(batch.q), np.array(batch.cache.pages)
    for array, times in ((q, 1 / factor), (pages, factor)):
        array[..., : batch.cache.kv_lora_rank] *= np.asarray(times, array.dtype)
    scaled.q = jnp.asarray(q)
    scaled.cache = dataclasses.replace(batch.cache, pages=jnp.asarray(pages))
    return scaled


def op(batch: Any, plan: Any = None, *, few_tokens: bool = False, **options: Any) -> Any:
    """Runs the attention op on a batch, under jit.

    few_tokens: keeps the batch's short block tables. Otherwise they get unused entries until they
    have room for MANY_TOKENS, because kernels select their tile sizes by that.
    """
    missing = (
        0 if few_tokens else MANY_TOKENS // batch.cache.page_size - batch.block_tables.shape[1]
    )
    added = ((0, 0), (0, max(0, missing)))
    tables = np.pad(np.asarray(batch.block_tables), added, constant_values=GARBAGE_PAGE)
    arrays = batch.q, batch.cache, jnp.asarray(tables), batch.seq_lens, batch.query_lens, plan
    return _op(*arrays, tuple(options.items()))


@functools.partial(jax.jit, static_argnums=6)
def _op(q, cache, tables, seq_lens, query_lens, plan, options):
    """Runs the op. It is one function, so that batches of the same shapes share a program."""
    return paged_mla_attention(
        q, cache, tables, seq_lens, query_lens=query_lens, plan=plan, softmax_scale=SCALE,
        implementation="hopper", **dict(options),
    )  # fmt: skip
