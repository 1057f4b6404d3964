"""The paged cache of absorbed MLA: one row [c_kv | k_rope] a token, shared by all heads.

A request's tokens stand in pages that its row of the block table names in order (vLLM's
PagedAttention, arXiv 2309.06180). Two layouts of a page:
- "ND": [page_size, D], rows whole.
- "NZ": [D / C0, page_size, C0] with C0 = 32 bytes of values, the fractal of Ascend's matrix unit
  ("PA_NZ"): element (t, d) at ((d / C0) * page_size + t) * C0 + d % C0.
An int8 cache keeps c_kv as int8 with float32 scales (`quantize`) and k_rope beside it in bfloat16,
in pages of the same numbers; no kernel of a peer on NVIDIA GPUs has one, Ascend's have. A token
with NaN or an infinity in c_kv has scales of NaN there or, with one scale for the whole cache, a
rope part of NaN: c_kv reads as NaN, and so does the output of every row that sees the token.
Only pages that a length reaches are ever looked at; the other slots of a block table, and the
rows of a page past the length, may hold anything.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks, quantize

PAGE_SIZES = (1, 16, 64, 128)
LAYOUTS = ("ND", "NZ")
DTYPES = (*checks.FLOAT_DTYPES, "int8")
_ROPE_DTYPE = jnp.bfloat16  # of an int8 cache
_FRACTAL_BYTES = 32
_INT32 = np.iinfo(np.int32)
_SMALLEST_SCALE = np.finfo(np.float32).tiny  # below it processors may take a number for 0
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(quantize.LARGEST), 0)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["pages", "rope_pages", "scales"],
    meta_fields=["kv_lora_rank", "rope_dim", "page_size", "layout"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class PagedKVCache:
    """The pages and how to read them; a pytree whose leaves are the arrays that it has.

    A float cache holds rows of D = kv_lora_rank + rope_dim values in `pages`, and has no more. An
    int8 cache holds c_kv in `pages` (D = kv_lora_rank), k_rope in `rope_pages` (D = rope_dim), and
    `scales`: [num_pages, page_size] (granularity "token"), [num_pages, page_size, kv_lora_rank /
    128] ("group") or [] ("tensor").
    """

    pages: jax.Array  # ND [num_pages, page_size, D]; NZ [num_pages, D / C0, page_size, C0]
    kv_lora_rank: int
    rope_dim: int
    page_size: int
    layout: str
    rope_pages: jax.Array | None = None  # bfloat16, as `pages`
    scales: jax.Array | None = None  # float32, the same in both layouts

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
    ) -> "PagedKVCache":
        """A cache of zeros.

        Args:
            num_pages, page_size: how many pages, of how many tokens.
            dtype: of the values, or int8: of c_kv.
            scale_granularity: of an int8 cache, one of `quantize.GRANULARITIES`; None: "token".
            scale: for "tensor": what one step of int8 is worth, from calibration
                (`quantize.scales_of`), a number that is normal and 127 times finite in float32.
                Values written later saturate at 127 times it, which is quantisation; NaN and
                infinities stay visible. A traced scale that is none of that becomes NaN.

        Raises TypeError for sizes that are no integers, a dtype that is none and a scale that is no
        real number; ValueError for sizes that are not positive, a page size, dtype, layout or
        granularity that is not one of PAGE_SIZES, DTYPES, LAYOUTS and GRANULARITIES, a scale out of
        range, or missing, or there without need, and in NZ rows of no multiple of 32 bytes.
        """
        num_pages = checks.require_positive("num_pages", num_pages)
        if num_pages > _INT32.max:
            raise ValueError(f"num_pages must be at most {_INT32.max}, got {num_pages}")
        kv_lora_rank = checks.require_positive("kv_lora_rank", kv_lora_rank)
        rope_dim = checks.require_positive("rope_dim", rope_dim)
        page_size = checks.require_positive("page_size", page_size)
        checks.require_one_of("page_size", page_size, PAGE_SIZES)
        checks.require_one_of("layout", layout, LAYOUTS)
        dtype = _checked_dtype(dtype)
        geometry = (kv_lora_rank, rope_dim, page_size, layout)
        if dtype != jnp.int8:
            if scale_granularity is not None or scale is not None:
                name = "scale" if scale_granularity is None else "scale_granularity"
                raise ValueError(f"{name} is for dtype int8, got dtype {dtype.name}")
            words = "kv_lora_rank + rope_dim"
            page = _page_shape(words, page_size, kv_lora_rank + rope_dim, dtype, layout)
            return PagedKVCache(jnp.zeros((num_pages, *page), dtype), *geometry)
        page = _page_shape("kv_lora_rank", page_size, kv_lora_rank, dtype, layout)
        rope_page = _page_shape("rope_dim", page_size, rope_dim, _ROPE_DTYPE, layout)
        return PagedKVCache(
            jnp.zeros((num_pages, *page), dtype),
            *geometry,
            rope_pages=jnp.zeros((num_pages, *rope_page), _ROPE_DTYPE),
            scales=_new_scales((num_pages, page_size), kv_lora_rank, scale_granularity, scale),
        )

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self.pages.shape[0]

    @property
    def dtype(self) -> Any:
        """Of the values in `pages`."""
        return self.pages.dtype

    @property
    def row_dtype(self) -> Any:
        """Of the rows that go in and come out: `dtype`, or float32 where they are quantised."""
        return self.dtype if self.scale_granularity is None else jnp.dtype(jnp.float32)

    @property
    def scale_granularity(self) -> str | None:
        """One of `quantize.GRANULARITIES`; None for a float cache."""
        if self.scales is None:
            return None
        return {0: "tensor", 2: "token", 3: "group"}[self.scales.ndim]

    @property
    def latent_dim(self) -> int:
        """D, the values a token: kv_lora_rank + rope_dim."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's row (one layer); the one scale of "tensor" belongs to no token."""
        arrays = [x for x in self.arrays().values() if x.ndim]
        return sum(x.size * x.dtype.itemsize for x in arrays) // (self.num_pages * self.page_size)

    def arrays(self) -> dict[str, jax.Array]:
        """The arrays that the cache has, by name."""
        named = {"pages": self.pages, "rope_pages": self.rope_pages, "scales": self.scales}
        return {name: array for name, array in named.items() if array is not None}

    def check(self) -> None:
        """Raises ValueError or TypeError where an array is not what the other fields say."""
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
        if self.rope_pages is None or self.scales is None:
            return
        self._check_pages("rope_pages", self.rope_dim, self.num_pages)
        for name, dtype in (("rope_pages", _ROPE_DTYPE), ("scales", jnp.float32)):
            if getattr(self, name).dtype != dtype:
                wanted = jnp.dtype(dtype).name
                raise TypeError(f"cache.{name} must be {wanted}, got {getattr(self, name).dtype}")
        shapes = {
            name: _scale_shape((self.num_pages, self.page_size), self.kv_lora_rank, name)
            for name in quantize.GRANULARITIES
            if name != "group" or self.kv_lora_rank % quantize.GROUP == 0
        }
        if self.scales.shape not in shapes.values():
            wanted = " or ".join(f"{list(shape)} ({name})" for name, shape in shapes.items())
            raise ValueError(f"cache.scales must be {wanted}, got shape {list(self.scales.shape)}")

    def _check_pages(self, name: str, width: int, num_pages: int | None) -> None:
        array = getattr(self, name)
        page = _page_shape(f"width of {name}", self.page_size, width, array.dtype, self.layout)
        words = f"pages of {self.page_size} tokens of {width} values in {self.layout}"
        checks.require_shape(f"cache.{name}", array, words, num_pages, *page)

    def append(
        self,
        kv: jax.Array,
        block_tables: jax.Array,
        seq_lens: jax.Array,
        query_lens: jax.Array | None = None,
        *,
        donate: bool = True,
    ) -> "PagedKVCache":
        """Writes new tokens behind those that the requests have: decode, MTP or a chunk.

        Args:
            kv: [B, S, D], of the cache's dtype; for an int8 cache float32, bfloat16 or float16.
            block_tables: [B, max_pages] int32, pages for the new tokens included.
            seq_lens: [B] int32, tokens of each request BEFORE this append.
            query_lens: [B] int32, how many of the S tokens are real (left aligned); None: all.
            donate: whether an eager call hands this cache's memory to the one that it returns;
                this one is used up then. False: this cache stays as it is, and the call copies
                it. Under an outer jit it has no effect: donate the cache there.

        Raises:
            TypeError: a dtype other than those above, or a donate that is no bool.
            ValueError: shapes that don't fit; and, unless they are traced, lengths that are
                negative or past the block table, pages in use that the cache does not have, or
                two tokens with one place. Nothing is written then. Traced, the tokens of a
                request that does not fit are not written, and attending to it gives NaN.
        """
        donate = checks.require_bool("donate", donate)
        self._check_append(kv, block_tables, seq_lens, query_lens)
        write = _append_in_place if donate else _append_to_copy
        return write(self, *map(checks.snapshot, (kv, block_tables, seq_lens, query_lens)))

    def gather(
        self, block_tables: jax.Array, *, max_len: int, seq_lens: jax.Array | None = None
    ) -> jax.Array:
        """The first max_len rows of each request, contiguous: [B, max_len, D] of `row_dtype`.

        Args:
            block_tables: [B, max_pages] int32.
            max_len: at most max_pages * page_size.
            seq_lens: [B] int32; rows past them are 0. None: those rows hold anything.

        Raises TypeError or ValueError naming the argument that doesn't fit.
        """
        self._check_tables(block_tables)
        max_len = checks.require_positive("max_len", max_len)
        capacity = block_tables.shape[1] * self.page_size
        if max_len > capacity:
            raise ValueError(
                f"max_len must be at most {capacity} (block_tables has {block_tables.shape[1]} "
                f"pages of {self.page_size} a request), got {max_len}"
            )
        if seq_lens is not None:
            checks.require_shape("seq_lens", seq_lens, "[B]", block_tables.shape[0])
            checks.require_int32("seq_lens", seq_lens)
        tables, lengths = map(checks.snapshot, (block_tables, seq_lens))
        return _gather(self, tables, lengths, max_len=max_len)

    def rows(
        self, block_tables: jax.Array, positions: jax.Array, requests: jax.Array | None = None
    ) -> jax.Array:
        """Token rows by position, [N, T, D] of `row_dtype`; arguments as in `stored_rows`."""
        return self._decode(self.stored_rows(block_tables, positions, requests))

    def stored_rows(
        self, block_tables: jax.Array, positions: jax.Array, requests: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """What each array of the cache, by its name, holds for tokens: [N, T, ...], as stored.

        `pages` [N, T, D] and, of an int8 cache, `rope_pages` [N, T, rope_dim] and `scales` [N, T],
        [N, T, kv_lora_rank / 128] or []. Any position or page is clipped to one that exists.

        Args:
            block_tables: [B, max_pages] int32.
            positions: [N, T] or [1, T], of any integer dtype.
            requests: [N] int32, whose rows; None: every request once (N = B).

        Raises TypeError or ValueError naming the argument that doesn't fit; unless they are traced,
        also for requests that are not in 0 .. B - 1.
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
        positions = _checked_positions(positions, len(requests))
        block_tables, requests = (jnp.asarray(checks.snapshot(x)) for x in (block_tables, requests))
        slot = jnp.clip(positions // self.page_size, 0, block_tables.shape[1] - 1)
        page = block_tables.at[requests[:, None], slot].get(mode="promise_in_bounds")
        page = jnp.clip(page, 0, self.num_pages - 1)
        offset = positions % self.page_size
        return {name: _read(x, page, offset) for name, x in self.arrays().items()}

    def _encode(self, kv: jax.Array) -> dict[str, jax.Array]:
        """Rows [..., D] as `stored_rows` would give them, but for a scale that stays as it is."""
        granularity = self.scale_granularity
        if self.scales is None or granularity is None:
            return {"pages": kv}
        latent, rope = jnp.split(kv, [self.kv_lora_rank], axis=-1)
        rope, scales = rope.astype(_ROPE_DTYPE), self.scales
        # int8 has no NaN: what belongs to the token alone holds it, its scales or else its rope
        # part. (XLA's maximum on a CPU may leave out NaN, so that scales say nothing of it.)
        finite = jnp.isfinite(latent).all(axis=-1)
        if granularity == "tensor":
            rope = _or_nan(finite, rope)
            return {"rope_pages": rope, "pages": quantize.quantize(latent, scales)}
        scales = quantize.scales_of(latent, granularity)
        stored = {"rope_pages": rope, "pages": quantize.quantize(latent, scales)}
        return stored | {"scales": _or_nan(finite, scales)}

    def _decode(self, stored: dict[str, jax.Array]) -> jax.Array:
        """Rows [..., D] of `row_dtype` from what `stored_rows` gave."""
        if self.scale_granularity is None:
            return stored["pages"]
        latent = quantize.dequantize(stored["pages"], stored["scales"])
        rope = stored["rope_pages"].astype(latent.dtype)
        if self.scale_granularity == "tensor":
            latent = _or_nan(~jnp.isnan(rope).all(axis=-1), latent)  # as `_encode` marks it
        return jnp.concatenate([latent, rope], axis=-1)

    def _check_tables(self, block_tables: Any) -> None:
        self.check()
        checks.require_shape("block_tables", block_tables, "[B, max_pages]", None, None)
        checks.require_int32("block_tables", block_tables)
        checks.require_positive("max_pages of block_tables", block_tables.shape[1])

    def _check_append(self, kv: Any, block_tables: Any, seq_lens: Any, query_lens: Any) -> None:
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
        lengths = {"seq_lens": seq_lens}
        if query_lens is not None:
            lengths["query_lens"] = query_lens
        for name, value in lengths.items():
            checks.require_shape(name, value, "[B]", batch)
            checks.require_int32(name, value)
        if not checks.is_concrete(block_tables, *lengths.values()):
            return
        before = np.asarray(seq_lens).astype(np.int64)
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


def _page_shape(words: str, page_size: int, width: int, dtype: Any, layout: str) -> tuple[int, ...]:
    if layout == "ND":
        return page_size, width
    fractal = _FRACTAL_BYTES // jnp.dtype(dtype).itemsize
    if width % fractal:
        raise ValueError(
            f"{words} must be a multiple of {fractal} in layout NZ with dtype "
            f"{jnp.dtype(dtype).name}, got {width}"
        )
    return width // fractal, page_size, fractal


def _scale_shape(tokens: tuple[int, int], width: int, granularity: str) -> tuple[int, ...]:
    shapes = {"token": tokens, "group": (*tokens, width // quantize.GROUP), "tensor": ()}
    return shapes[granularity]


def _new_scales(
    tokens: tuple[int, int],
    kv_lora_rank: int,
    granularity: str | None,
    scale: jax.Array | float | None,
) -> jax.Array:
    """Those of a new int8 cache of tokens = (pages, page size)."""
    granularity = "token" if granularity is None else granularity
    checks.require_one_of("scale_granularity", granularity, quantize.GRANULARITIES)
    if granularity == "group" and kv_lora_rank % quantize.GROUP:
        raise ValueError(
            f"kv_lora_rank must be a multiple of {quantize.GROUP} with scale_granularity group, "
            f"got {kv_lora_rank}"
        )
    if (scale is not None) != (granularity == "tensor"):
        wanted = "given" if scale is None else "None"
        raise ValueError(f"scale must be {wanted} with scale_granularity {granularity}")
    if scale is None:
        return jnp.zeros(_scale_shape(tokens, kv_lora_rank, granularity), jnp.float32)
    return _checked_scale(scale)


def _checked_scale(scale: Any) -> jax.Array:
    """A scale as it is stored: [] float32. One that is traced and out of range becomes NaN."""
    checks.require_shape("scale", scale, "a number")
    dtype = np.asarray(scale).dtype if checks.is_concrete(scale) else scale.dtype
    if not (jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer)):
        raise TypeError(
            f"scale must be a real number, got {scale!r} of type {type(scale).__name__}"
        )
    if not checks.is_concrete(scale):
        scale = scale.astype(jnp.float32)
        fits = (scale >= _SMALLEST_SCALE) & (scale <= _LARGEST_SCALE)
        return jnp.where(fits, scale, jnp.float32(jnp.nan))
    with np.errstate(over="ignore"):
        stored = np.float32(float(scale))
    if not _SMALLEST_SCALE <= stored <= _LARGEST_SCALE:
        raise ValueError(
            f"scale must be positive and finite, in {_SMALLEST_SCALE} .. {_LARGEST_SCALE} as "
            f"float32, got {scale}"
        )
    return jnp.array(stored)  # a copy: appending donates it


def _checked_dtype(dtype: Any) -> Any:
    """The np.dtype of a cache that has this dtype; raises TypeError or ValueError if none can."""
    if dtype is None:
        raise TypeError("dtype must be a dtype, got None")
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        if isinstance(dtype, str):
            checks.require_one_of("dtype", dtype, DTYPES)
        raise TypeError(f"dtype must be a dtype, got {dtype!r}") from error
    checks.require_one_of("dtype", dtype.name, DTYPES)
    return dtype


def _checked_positions(positions: Any, count: int) -> jax.Array:
    """positions [count, T] or [1, T] as int32, saturated; raises TypeError or ValueError."""
    checks.require_array("positions", positions)
    if not jnp.issubdtype(positions.dtype, np.integer):
        raise TypeError(f"positions must be of an integer dtype, got {positions.dtype}")
    rows = 1 if np.shape(positions)[:1] == (1,) else count
    checks.require_shape("positions", positions, "[N, T] or [1, T]", rows, None)
    if positions.dtype != np.int32:
        own = jnp.iinfo(positions.dtype)
        low, high = max(own.min, _INT32.min), min(own.max, _INT32.max)
        clip = np.clip if isinstance(positions, np.ndarray) else jnp.clip  # JAX would cut off bits
        positions = clip(positions, low, high).astype(np.int32)
    return jnp.asarray(checks.snapshot(positions))


def _or_nan(keeps: jax.Array, values: jax.Array) -> jax.Array:
    """values [N, T, ...], NaN where keeps [N, T] is False."""
    keeps = keeps.reshape(*keeps.shape, *[1] * (values.ndim - keeps.ndim))
    return jnp.where(keeps, values, jnp.asarray(jnp.nan, values.dtype))


def _read(array: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
    """What an array of the cache holds for tokens: [N, T, ...]; page and offset [N, T]."""
    if array.ndim == 0:
        return array
    if array.ndim < 4:
        return array.at[page, offset].get(mode="promise_in_bounds")
    fractals = array.at[page, :, offset, :].get(mode="promise_in_bounds")
    return fractals.reshape(*page.shape, -1)  # from [N, T, D / C0, C0]


def _write(array: jax.Array, page: jax.Array, offset: jax.Array, rows: jax.Array) -> jax.Array:
    """The array with rows [N, T, ...] at those tokens; a page past the end is dropped."""
    if array.ndim < 4:
        return array.at[page, offset].set(rows, mode="drop")
    fractals = rows.reshape(*page.shape, array.shape[1], array.shape[3])
    return array.at[page, :, offset, :].set(fractals, mode="drop")


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
    room = min(max_pages * cache.page_size, int(_INT32.max)) - jnp.maximum(seq_lens, 0)
    fits = (seq_lens >= 0) & (query_lens <= jnp.minimum(room, count))
    written = (token < query_lens[:, None]) & fits[:, None]
    positions = seq_lens[:, None] + token
    slot = jnp.clip(positions // cache.page_size, 0, max_pages - 1)
    page = jnp.take_along_axis(block_tables, slot, axis=1)
    page = jnp.where(written & (page >= 0), page, cache.num_pages)  # past the end: dropped
    offset = positions % cache.page_size
    arrays: dict[str, Any] = cache.arrays()
    for name, rows in cache._encode(kv).items():
        arrays[name] = _write(arrays[name], page, offset, rows)
    return dataclasses.replace(cache, **arrays)


_append_in_place = jax.jit(_append, donate_argnums=0)
_append_to_copy = jax.jit(_append)


@functools.partial(jax.jit, static_argnames="max_len")
def _gather(
    cache: PagedKVCache, block_tables: jax.Array, seq_lens: jax.Array | None, *, max_len: int
) -> jax.Array:
    positions = jnp.arange(max_len, dtype=jnp.int32)[None]
    rows = cache.rows(block_tables, positions)
    if seq_lens is None:
        return rows
    return jnp.where((positions < seq_lens[:, None])[..., None], rows, 0)
