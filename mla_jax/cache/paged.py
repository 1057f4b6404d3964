"""The cache as a pytree, `PagedKVCache`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks, quantize
from mla_jax.cache import int8, reads
from mla_jax.cache.arguments import (
    DTYPES,
    INT32,
    checked_dtype,
    checked_positions,
    require_copies,
    require_new_tokens,
)
from mla_jax.cache.int8 import ROPE_DTYPE, new_scales, scale_shape
from mla_jax.cache.layers import check_layers, first_page_of, require_one_layer
from mla_jax.cache.layout import LAYOUTS, PAGE_SIZES, page_shape
from mla_jax.cache.packed import require_no_query_lens, rows_to_append
from mla_jax.cache.writes import (
    append_in_place,
    append_to_copy,
    copy_pages_in_place,
    copy_pages_to_copy,
)
from mla_jax.sharding.key_shards import KeyShard


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["pages", "rope_pages", "scales", "first_page"],
    meta_fields=["kv_lora_rank", "rope_dim", "page_size", "layout", "num_layers"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class PagedKVCache:
    """The pages of a cache and their layout; a pytree whose leaves are the arrays.

    A float cache stores rows of D = kv_lora_rank + rope_dim values in `pages` and has no other
    array. An int8 cache stores c_kv in `pages` (D = kv_lora_rank), k_rope in `rope_pages` (D =
    rope_dim), and float32 `scales`. These are [num_pages, page_size] with granularity "token",
    [num_pages, page_size, kv_lora_rank / 128] with "group", and [] with "tensor".

    A cache of several layers is a pool, whose arrays have num_layers * num_pages pages. `layer(i)`
    is a view of one of its layers. Block tables have page numbers of one layer, 0 .. num_pages - 1.
    """

    pages: jax.Array  # ND [num_pages, page_size, D]; NZ [num_pages, D / C0, page_size, C0]
    kv_lora_rank: int
    rope_dim: int
    page_size: int
    layout: str
    rope_pages: jax.Array | None = None  # bfloat16, shaped like `pages`
    scales: jax.Array | None = None  # float32, the same in both layouts
    first_page: jax.Array | None = None  # [] int32, of a view's layer in the pool
    num_layers: int = 1  # of the pool

    @staticmethod
    def create(
        num_pages: int,
        *,
        page_size: int = 64,
        kv_lora_rank: int = 512,
        rope_dim: int = 64,
        dtype: Any = jnp.bfloat16,
        layout: str = "ND",
        scale_granularity: str | None = None,
        scale: jax.Array | float | None = None,
        num_layers: int = 1,
    ) -> "PagedKVCache":
        """Returns a cache of zeros.

        Args:
            num_pages: number of pages per layer.
            page_size: tokens per page, one of PAGE_SIZES.
            kv_lora_rank: values of c_kv per token.
            rope_dim: values of k_rope per token.
            dtype: of the values, one of DTYPES. With int8 it is the dtype of c_kv only.
            layout: one of LAYOUTS.
            scale_granularity: of an int8 cache, one of `quantize.GRANULARITIES`; None is "token".
            scale: with "tensor", the value of one int8 step, from calibration
                (`quantize.scales_of`). It must be a normal float32, and so must 127 times it.
                Larger values saturate when they are written. NaN and infinities are marked. A
                traced scale out of range becomes NaN. All layers have this scale.
            num_layers: layers of the pool.

        Raises TypeError for sizes that are not integers, an invalid dtype, or a scale that is not a
        real number. Raises ValueError for sizes that are not positive, an option that is not in its
        list, and a scale that is out of range, missing or not needed. Raises ValueError for rows
        that are not a multiple of 32 bytes in layout NZ.
        """
        num_pages = checks.require_positive("num_pages", num_pages)
        num_layers = checks.require_positive("num_layers", num_layers)
        if num_layers > INT32.max:
            raise ValueError(f"num_layers must be at most {INT32.max}, got {num_layers}")
        if num_pages * num_layers > INT32.max:
            raise ValueError(
                f"num_pages must be at most {INT32.max // num_layers}, got {num_pages}"
            )
        kv_lora_rank = checks.require_positive("kv_lora_rank", kv_lora_rank)
        rope_dim = checks.require_positive("rope_dim", rope_dim)
        page_size = checks.require_positive("page_size", page_size)
        checks.require_one_of("page_size", page_size, PAGE_SIZES)
        checks.require_one_of("layout", layout, LAYOUTS)
        dtype = checked_dtype(dtype)
        geometry = (kv_lora_rank, rope_dim, page_size, layout)
        in_pool = num_pages * num_layers
        if dtype != jnp.int8:
            if scale_granularity is not None or scale is not None:
                name = "scale" if scale_granularity is None else "scale_granularity"
                raise ValueError(f"{name} is for dtype int8, got dtype {dtype.name}")
            words = "kv_lora_rank + rope_dim"
            page = page_shape(words, page_size, kv_lora_rank + rope_dim, dtype, layout)
            pages = jnp.zeros((in_pool, *page), dtype)
            return PagedKVCache(pages, *geometry, num_layers=num_layers)
        page = page_shape("kv_lora_rank", page_size, kv_lora_rank, dtype, layout)
        rope_page = page_shape("rope_dim", page_size, rope_dim, ROPE_DTYPE, layout)
        return PagedKVCache(
            jnp.zeros((in_pool, *page), dtype),
            *geometry,
            rope_pages=jnp.zeros((in_pool, *rope_page), ROPE_DTYPE),
            scales=new_scales((in_pool, page_size), kv_lora_rank, scale_granularity, scale),
            num_layers=num_layers,
        )

    def layer(self, index: Any) -> "PagedKVCache":
        """Returns a view of one layer, for the op, `mla_layer` and the methods that take tables.

        No page is copied. What writes through a view returns the pool, whose `layer` gives the
        next view. A view has this method as well. The view of a cache of one layer is the cache.

        Args:
            index: 0 .. num_layers - 1, an integer or an integer array of shape [], which may be
                traced. If a traced one is out of range, requests with tokens are invalid, nothing
                is written, and what is read are rows of layer 0; with one layer it has no effect.

        Raises TypeError for an index of another type, ValueError for one that is out of range.
        """
        checks.require_positive("cache.num_layers", self.num_layers)
        first_page = first_page_of(index, self.num_layers, self.num_pages)
        if self.num_layers == 1:
            return self
        return dataclasses.replace(self, first_page=first_page)

    @property
    def pool(self) -> "PagedKVCache":
        """The cache with all layers that a view belongs to; no page is copied."""
        return self if self.first_page is None else dataclasses.replace(self, first_page=None)

    @property
    def num_pages(self) -> int:
        """The number of pages per layer."""
        return self.pages.shape[0] // self.num_layers

    @property
    def dtype(self) -> Any:
        """The dtype of `pages`."""
        return self.pages.dtype

    @property
    def row_dtype(self) -> Any:
        """The dtype of rows that are appended and read: `dtype`, or float32 for an int8 cache."""
        return self.dtype if self.scale_granularity is None else jnp.dtype(jnp.float32)

    @property
    def scale_granularity(self) -> str | None:
        """One of `quantize.GRANULARITIES`, or None for a float cache."""
        if self.scales is None:
            return None
        return {0: "tensor", 2: "token", 3: "group"}[self.scales.ndim]

    @property
    def latent_dim(self) -> int:
        """D, the values per token: kv_lora_rank + rope_dim."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token in all layers of the pool, without the single scale of "tensor"."""
        arrays = [x for x in self.arrays().values() if x.ndim]
        return sum(x.size * x.dtype.itemsize for x in arrays) // (self.num_pages * self.page_size)

    def arrays(self) -> dict[str, jax.Array]:
        """Returns the arrays that the cache has, by name."""
        named = {"pages": self.pages, "rope_pages": self.rope_pages, "scales": self.scales}
        return {name: array for name, array in named.items() if array is not None}

    def check(self) -> None:
        """Raises TypeError or ValueError if an array does not match the other fields."""
        checks.require_one_of("cache.layout", self.layout, LAYOUTS)
        for name in ("kv_lora_rank", "rope_dim", "page_size"):
            checks.require_positive(f"cache.{name}", getattr(self, name))
        for name, array in self.arrays().items():
            checks.require_array(f"cache.{name}", array)
        checks.require_one_of("cache.dtype", jnp.dtype(self.dtype).name, DTYPES)
        quantized = self.dtype == jnp.int8
        for name in ("rope_pages", "scales"):
            if (getattr(self, name) is not None) != quantized:
                wanted = "an array" if quantized else "None"
                raise ValueError(f"cache.{name} must be {wanted} where dtype is {self.dtype}")
        self._check_pages("pages", self.kv_lora_rank if quantized else self.latent_dim, None)
        check_layers(self)
        if self.rope_pages is None or self.scales is None:
            return
        in_pool = self.pages.shape[0]
        self._check_pages("rope_pages", self.rope_dim, in_pool)
        for name, dtype in (("rope_pages", ROPE_DTYPE), ("scales", jnp.float32)):
            if getattr(self, name).dtype != dtype:
                wanted = jnp.dtype(dtype).name
                raise TypeError(f"cache.{name} must be {wanted}, got {getattr(self, name).dtype}")
        shapes = {
            name: scale_shape((in_pool, self.page_size), self.kv_lora_rank, name)
            for name in quantize.GRANULARITIES
            if name != "group" or self.kv_lora_rank % quantize.GROUP == 0
        }
        if self.scales.shape not in shapes.values():
            wanted = " or ".join(f"{list(shape)} ({name})" for name, shape in shapes.items())
            raise ValueError(f"cache.scales must be {wanted}, got shape {list(self.scales.shape)}")

    def _check_pages(self, name: str, width: int, num_pages: int | None) -> None:
        array = getattr(self, name)
        page = page_shape(f"width of {name}", self.page_size, width, array.dtype, self.layout)
        words = f"pages of {self.page_size} tokens of {width} values in {self.layout}"
        checks.require_shape(f"cache.{name}", array, words, num_pages, *page)

    def append(
        self,
        kv: jax.Array,
        block_tables: jax.Array,
        seq_lens: jax.Array,
        query_lens: jax.Array | None = None,
        *,
        cu_q_lens: jax.Array | None = None,
        donate: bool = True,
        kv_axis: str | None = None,
    ) -> "PagedKVCache":
        """Writes new tokens after those that the requests have, and returns the new cache.

        The new cache of a view is the pool.

        Args:
            kv: [B, S, D] of the cache's dtype; for an int8 cache float32, bfloat16 or float16.
            block_tables: [B, max_pages] int32, with pages for the new tokens.
            seq_lens: [B] int32, tokens of each request BEFORE this call.
            query_lens: [B] int32, how many of the S tokens are real, left aligned; None is all S.
            cu_q_lens: [B + 1] int32, the bounds of packed new tokens kv [T, D], as in the op.
            donate: whether an eager call reuses this cache's memory for the returned cache, after
                which this one must not be used, nor another view of its pool. False copies it.
                Under an outer jit the argument has no effect: donate the cache there.
            kv_axis: as in `paged_mla_attention`; the device that has a token's page writes it.

        Raises:
            TypeError: a dtype other than those above, or a donate that is not a bool.
            ValueError: shapes that do not fit. Values that are not traced are also checked: lengths
                that are negative or exceed the block table, pages that the cache does not have, and
                two tokens with one position. Nothing has been written then. With traced
                values, the tokens of an invalid request are not written, and its attention is NaN.
        """
        write = append_in_place if checks.require_bool("donate", donate) else append_to_copy
        new = kv, block_tables, seq_lens, query_lens
        if cu_q_lens is not None:
            require_no_query_lens(query_lens)
            new = rows_to_append(self, kv, block_tables, seq_lens, cu_q_lens, kv_axis)
        self._check_append(*new, kv_axis)
        return write(self.pool, self.first_page, *map(checks.snapshot, new), kv_axis=kv_axis)

    def copy_pages(
        self, sources: jax.Array, targets: jax.Array, *, donate: bool = True
    ) -> "PagedKVCache":
        """Copies pages, all of which are read before one is written; returns the new cache.

        A pool copies them in every layer.

        Args:
            sources: [N] int32, pages; see `PageAllocator.take_copies`. A pair of -1 is skipped.
            targets: [N] int32, the pages that they are copied to, each at most once.
            donate: as in `append`.

        Raises TypeError or ValueError that names the invalid argument, before a page is copied. If
        the pages are traced, pairs with a page that the cache does not have are skipped.
        """
        self.check()
        if self.first_page is not None:
            raise ValueError("cache must be a pool, got a view of one layer: pass cache.pool")
        copy = copy_pages_in_place if checks.require_bool("donate", donate) else copy_pages_to_copy
        require_copies(sources, targets, self.num_pages)
        return copy(self, checks.snapshot(sources), checks.snapshot(targets))

    def gather(
        self, block_tables: jax.Array, *, max_len: int, seq_lens: jax.Array | None = None
    ) -> jax.Array:
        """Returns the first max_len rows of each request, [B, max_len, D] of `row_dtype`.

        Args:
            block_tables: [B, max_pages] int32.
            max_len: at most max_pages * page_size.
            seq_lens: [B] int32; rows past them are 0. With None those rows may hold anything.

        Raises TypeError or ValueError that names the invalid argument.
        """
        self._check_tables(block_tables)
        max_len = checks.require_positive("max_len", max_len)
        capacity = block_tables.shape[1] * self.page_size
        if max_len > capacity:
            raise ValueError(
                f"max_len must be at most {capacity} (block_tables has {block_tables.shape[1]} "
                f"pages of {self.page_size} per request), got {max_len}"
            )
        if seq_lens is not None:
            checks.require_shape("seq_lens", seq_lens, "[B]", block_tables.shape[0])
            checks.require_int32("seq_lens", seq_lens)
        tables, lengths = map(checks.snapshot, (block_tables, seq_lens))
        return reads.gather(self, tables, lengths, max_len=max_len)

    def rows(
        self, block_tables: jax.Array, positions: jax.Array, requests: jax.Array | None = None
    ) -> jax.Array:
        """Returns rows by position, [N, T, D] of `row_dtype`; arguments as in `stored_rows`."""
        return self._decode(self.stored_rows(block_tables, positions, requests))

    def stored_rows(
        self, block_tables: jax.Array, positions: jax.Array, requests: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns what each array of the cache holds for tokens, by the array's name.

        `pages` is [N, T, D]. An int8 cache also has `rope_pages` [N, T, rope_dim] and `scales`
        [N, T], [N, T, kv_lora_rank / 128] or []. Positions and pages are clipped to valid ones.

        Args:
            block_tables: [B, max_pages] int32.
            positions: [N, T] or [1, T], of any integer dtype.
            requests: [N] int32, the request of each row of positions; None is 0 .. B - 1.

        Raises TypeError or ValueError that names the invalid argument. Traced requests are not
        checked to be in 0 .. B - 1.
        """
        self._check_tables(block_tables)
        batch = block_tables.shape[0]
        if requests is None:
            requests = jnp.arange(batch, dtype=jnp.int32)
        checks.require_shape("requests", requests, "[N]", None)
        checks.require_int32("requests", requests)
        if checks.is_concrete(requests):
            for at in np.flatnonzero((np.asarray(requests) < 0) | (np.asarray(requests) >= batch)):
                raise ValueError(f"requests[{at}] must be in 0 .. {batch - 1}, got {requests[at]}")
        positions = checked_positions(positions, len(requests))
        block_tables, requests = (jnp.asarray(checks.snapshot(x)) for x in (block_tables, requests))
        return reads.stored_rows(self, block_tables, positions, requests)

    def _encode(self, kv: jax.Array) -> dict[str, jax.Array]:
        """Returns rows kv [..., D] in the form of `stored_rows`, without a scale of "tensor"."""
        granularity = self.scale_granularity
        if self.scales is None or granularity is None:
            return {"pages": kv}
        return int8.encode(kv, self.scales, granularity, self.kv_lora_rank)

    def _decode(self, stored: dict[str, jax.Array]) -> jax.Array:
        """Returns rows [..., D] of `row_dtype` from the result of `stored_rows`."""
        if self.scale_granularity is None:
            return stored["pages"]
        return int8.decode(stored, self.scale_granularity)

    def _check_tables(self, block_tables: Any) -> None:
        self.check()
        require_one_layer(self)
        checks.require_shape("block_tables", block_tables, "[B, max_pages]", None, None)
        checks.require_int32("block_tables", block_tables)
        checks.require_positive("max_pages of block_tables", block_tables.shape[1])

    def _check_append(
        self, kv: Any, block_tables: Any, seq_lens: Any, query_lens: Any, kv_axis: str | None
    ) -> None:
        self._check_tables(block_tables)
        batch = block_tables.shape[0]
        checks.require_array("kv", kv)
        checks.require_shape("kv", kv, "[B, S, D]", batch, None, self.latent_dim)
        if 0 in kv.shape:
            raise ValueError(f"kv must have no dim of 0, got shape {list(kv.shape)}")
        if self.scale_granularity is not None:
            checks.require_float("kv", kv)
        elif kv.dtype != self.dtype:
            raise TypeError(f"kv must be {self.dtype} as the cache is, got {kv.dtype}")
        lengths = {"seq_lens": seq_lens, "query_lens": query_lens}
        lengths = {name: value for name, value in lengths.items() if value is not None}
        for name, value in lengths.items():
            checks.require_shape(name, value, "[B]", batch)
            checks.require_int32(name, value)
        if kv_axis is not None:
            KeyShard.here(kv_axis, 1).require_split({"kv": kv} | lengths, cache=self.pages)
        elif checks.is_concrete(block_tables, *lengths.values()):
            require_new_tokens(
                kv.shape[1], block_tables, seq_lens, query_lens, self.page_size, self.num_pages
            )
