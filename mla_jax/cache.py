"""The paged cache of absorbed MLA: one row [c_kv | k_rope] a token, shared by all heads.

A request's tokens stand in pages that its row of the block table names in order (vLLM's
PagedAttention, arXiv 2309.06180). Two layouts of a page:
- "ND": [page_size, D], rows whole.
- "NZ": [D / C0, page_size, C0] with C0 = 32 bytes of values, the fractal of Ascend's matrix unit
  ("PA_NZ"): element (t, d) at ((d / C0) * page_size + t) * C0 + d % C0.
Only pages that a length reaches are ever looked at; the other slots of a block table, and the
rows of a page past the length, may hold anything.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks

PAGE_SIZES = (1, 16, 64, 128)
LAYOUTS = ("ND", "NZ")
_FRACTAL_BYTES = 32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["pages"],
    meta_fields=["kv_lora_rank", "rope_dim", "page_size", "layout"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class PagedKVCache:
    """The pages and how to read them; a pytree whose only leaf is `pages`."""

    pages: jax.Array  # ND [num_pages, page_size, D]; NZ [num_pages, D / C0, page_size, C0]
    kv_lora_rank: int
    rope_dim: int
    page_size: int
    layout: str

    @staticmethod
    def create(
        num_pages: int,
        *,
        page_size: int = 64,
        kv_lora_rank: int = 512,
        rope_dim: int = 64,
        dtype: Any = jnp.bfloat16,
        layout: str = "ND",
    ) -> "PagedKVCache":
        """A cache of zeros.

        Raises ValueError for sizes that are not positive, a page size, dtype or layout that is not
        one of PAGE_SIZES, float32 / bfloat16 / float16 and LAYOUTS, or, in NZ, rows that are no
        multiple of 32 bytes.
        """
        checks.require_positive("num_pages", num_pages)
        checks.require_positive("kv_lora_rank", kv_lora_rank)
        checks.require_positive("rope_dim", rope_dim)
        checks.require_one_of("page_size", page_size, PAGE_SIZES)
        checks.require_one_of("layout", layout, LAYOUTS)
        checks.require_one_of("dtype", jnp.dtype(dtype).name, checks.FLOAT_DTYPES)
        width, fractal = kv_lora_rank + rope_dim, _FRACTAL_BYTES // jnp.dtype(dtype).itemsize
        if layout == "NZ" and width % fractal:
            raise ValueError(
                f"kv_lora_rank + rope_dim must be a multiple of {fractal} in layout NZ with "
                f"dtype {jnp.dtype(dtype).name}, got {width}"
            )
        page = _page_shape(page_size, width, dtype, layout)
        pages = jnp.zeros((num_pages, *page), dtype)
        return PagedKVCache(pages, kv_lora_rank, rope_dim, page_size, layout)

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self.pages.shape[0]

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.pages.dtype

    @property
    def latent_dim(self) -> int:
        """D, the values a token: kv_lora_rank + rope_dim."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's row (one layer)."""
        return self.latent_dim * self.dtype.itemsize

    def check(self) -> None:
        """Raises ValueError where `pages` is not what the other fields say, e.g. the page size."""
        checks.require_one_of("cache.layout", self.layout, LAYOUTS)
        page = _page_shape(self.page_size, self.latent_dim, self.dtype, self.layout)
        words = f"pages of {self.page_size} tokens of {self.latent_dim} values in {self.layout}"
        checks.require_shape("cache.pages", self.pages, words, None, *page)

    def append(
        self,
        kv: jax.Array,
        block_tables: jax.Array,
        seq_lens: jax.Array,
        query_lens: jax.Array | None = None,
    ) -> "PagedKVCache":
        """Writes new tokens behind those that the requests have: decode, MTP or a chunk.

        The pages are donated: called eagerly, this cache is used up and the returned one takes
        its memory; under an outer jit, donate the cache there.

        Args:
            kv: [B, S, D], of the cache's dtype.
            block_tables: [B, max_pages] int32, pages for the new tokens included.
            seq_lens: [B] int32, tokens of each request BEFORE this append.
            query_lens: [B] int32, how many of the S tokens are real (left aligned); None: all.

        Raises:
            TypeError: a dtype other than those above.
            ValueError: shapes that don't fit; and, unless they are traced, lengths that are
                negative or past the block table, pages in use that the cache does not have, or
                two tokens with one place. Nothing is written then. Traced, the tokens of a
                request that does not fit are not written, and attending to it gives NaN.
        """
        self._check_append(kv, block_tables, seq_lens, query_lens)
        return _append(self, *map(checks.snapshot, (kv, block_tables, seq_lens, query_lens)))

    def gather(
        self, block_tables: jax.Array, *, max_len: int, seq_lens: jax.Array | None = None
    ) -> jax.Array:
        """The first max_len rows of each request, contiguous: [B, max_len, D] of the cache's dtype.

        Args:
            block_tables: [B, max_pages] int32.
            max_len: at most max_pages * page_size.
            seq_lens: [B] int32; rows past them are 0. None: those rows hold anything.

        Raises TypeError or ValueError naming the argument that doesn't fit.
        """
        self._check_tables(block_tables)
        checks.require_positive("max_len", max_len)
        capacity = block_tables.shape[1] * self.page_size
        if max_len > capacity:
            raise ValueError(
                f"max_len must be at most {capacity} (block_tables has {block_tables.shape[1]} "
                f"pages of {self.page_size} a request), got {max_len}"
            )
        if seq_lens is not None:
            checks.require_shape("seq_lens", seq_lens, "[B]", block_tables.shape[0])
            checks.require_int32("seq_lens", seq_lens)
        return _gather(self, block_tables, seq_lens, max_len=max_len)

    def rows(
        self, block_tables: jax.Array, positions: jax.Array, requests: jax.Array | None = None
    ) -> jax.Array:
        """Token rows by position, [N, T, D]; any position or page is clipped to one that exists.

        Args:
            block_tables: [B, max_pages] int32.
            positions: [N, T] or [1, T] int32.
            requests: [N] int32, whose rows; None: every request once (N = B).
        """
        if requests is None:
            requests = jnp.arange(block_tables.shape[0], dtype=jnp.int32)
        slot = jnp.clip(positions // self.page_size, 0, block_tables.shape[1] - 1)
        page = block_tables.at[requests[:, None], slot].get(mode="promise_in_bounds")
        page = jnp.clip(page, 0, self.num_pages - 1)
        offset = positions % self.page_size
        if self.layout == "ND":
            return self.pages.at[page, offset].get(mode="promise_in_bounds")
        fractals = self.pages.at[page, :, offset, :].get(mode="promise_in_bounds")
        return fractals.reshape(*page.shape, self.latent_dim)  # from [N, T, D / C0, C0]

    def _check_tables(self, block_tables: Any) -> None:
        self.check()
        checks.require_shape("block_tables", block_tables, "[B, max_pages]", None, None)
        checks.require_int32("block_tables", block_tables)
        checks.require_positive("max_pages of block_tables", block_tables.shape[1])

    def _check_append(self, kv: Any, block_tables: Any, seq_lens: Any, query_lens: Any) -> None:
        self._check_tables(block_tables)
        batch = block_tables.shape[0]
        checks.require_shape("kv", kv, "[B, S, D]", batch, None, self.latent_dim)
        if kv.dtype != self.dtype:
            raise TypeError(f"kv must be {self.dtype} as the cache is, got {kv.dtype}")
        lengths = {"seq_lens": seq_lens}
        if query_lens is not None:
            lengths["query_lens"] = query_lens
        for name, value in lengths.items():
            checks.require_shape(name, value, "[B]", batch)
            checks.require_int32(name, value)
        if not checks.is_concrete(block_tables, *lengths.values()):
            return
        before = np.asarray(seq_lens)
        new = np.full(batch, kv.shape[1]) if query_lens is None else np.asarray(query_lens)
        for request in np.flatnonzero((new < 0) | (new > kv.shape[1])):
            raise ValueError(
                f"query_lens[{request}] must be in 0 .. {kv.shape[1]} (kv has {kv.shape[1]} "
                f"tokens a request), got {new[request]}"
            )
        for request in np.flatnonzero(before < 0):
            raise ValueError(f"seq_lens[{request}] must be at least 0, got {before[request]}")
        checks.require_pages(
            "seq_lens + query_lens", before + new, block_tables, self.page_size, self.num_pages
        )
        self._check_places(np.asarray(block_tables), before, new)

    def _check_places(self, tables: np.ndarray, before: np.ndarray, new: np.ndarray) -> None:
        """Raises ValueError where two of the new tokens would be written to one place."""
        request = np.repeat(np.arange(len(new)), new)
        start = np.repeat(before - (np.cumsum(new) - new), new)
        position = start + np.arange(len(request))
        page = tables[request, position // self.page_size]
        place = page.astype(np.int64) * self.page_size + position % self.page_size
        places, count = np.unique(place, return_counts=True)
        for twice in places[count > 1]:
            raise ValueError(
                f"block_tables must give every new token a place of its own, got page "
                f"{twice // self.page_size} for requests {request[place == twice].tolist()}"
            )


def _page_shape(page_size: int, width: int, dtype: Any, layout: str) -> tuple[int, ...]:
    if layout == "ND":
        return page_size, width
    fractal = _FRACTAL_BYTES // jnp.dtype(dtype).itemsize
    return width // fractal, page_size, fractal


@functools.partial(jax.jit, donate_argnums=0)
def _append(
    cache: PagedKVCache,
    kv: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array | None,
) -> PagedKVCache:
    batch, count = kv.shape[:2]
    max_pages = block_tables.shape[1]
    if query_lens is None:
        query_lens = jnp.full(batch, count, jnp.int32)
    token = jnp.arange(count, dtype=jnp.int32)
    fits = (seq_lens >= 0) & (seq_lens + query_lens <= max_pages * cache.page_size)
    written = (token < query_lens[:, None]) & fits[:, None]
    positions = seq_lens[:, None] + token
    slot = jnp.clip(positions // cache.page_size, 0, max_pages - 1)
    page = jnp.take_along_axis(block_tables, slot, axis=1)
    page = jnp.where(written & (page >= 0), page, cache.num_pages)  # past the end: dropped
    offset = positions % cache.page_size
    if cache.layout == "ND":
        pages = cache.pages.at[page, offset].set(kv, mode="drop")
    else:
        fractals = kv.reshape(batch, count, cache.pages.shape[1], cache.pages.shape[3])
        pages = cache.pages.at[page, :, offset, :].set(fractals, mode="drop")
    return dataclasses.replace(cache, pages=pages)


@functools.partial(jax.jit, static_argnames="max_len")
def _gather(
    cache: PagedKVCache, block_tables: jax.Array, seq_lens: jax.Array | None, *, max_len: int
) -> jax.Array:
    positions = jnp.arange(max_len, dtype=jnp.int32)[None]
    rows = cache.rows(block_tables, positions)
    if seq_lens is None:
        return rows
    return jnp.where((positions < seq_lens[:, None])[..., None], rows, 0)
