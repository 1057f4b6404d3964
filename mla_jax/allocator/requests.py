"""The allocator: the pages and the token count of each request."""

import dataclasses
import threading
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_jax import checks
from mla_jax.allocator.arguments import is_sequence, require_cache, require_hashable
from mla_jax.allocator.pool import PagePool
from mla_jax.allocator.tokens import FIRST, page_keys, token_ids
from mla_jax.cache import PagedKVCache

_INT32 = np.iinfo(np.int32)


class OutOfPagesError(RuntimeError):
    """Raised if a request needs more pages than are free; the allocator is unchanged."""


class CachedPrefix(NamedTuple):
    """The cached part of a sequence of tokens: how many tokens, and the pages that hold them."""

    num_tokens: int
    pages: tuple[int, ...]


@dataclasses.dataclass(slots=True)
class _Request:
    pages: list[int]  # ceil(num_tokens / page_size)
    num_tokens: int
    keys: list[bytes]  # of the first pages: those with known tokens

    def copy(self) -> "_Request":
        return _Request(self.pages.copy(), self.num_tokens, self.keys.copy())


class PageAllocator:
    """The pages of a cache, and the pages and the token count of each live request.

    Several requests may have one page: after `fork`, or if `allocate` finds cached tokens. The
    allocator never lets a request write to a page that another one has. It has no access to the
    cache, so the server copies pages. A step of a server calls, in this order:

    1. `allocate`, `fork` and `extend`, with the tokens that the step writes.
    2. `take_copies`. `PagedKVCache.copy_pages` then copies these pages in every layer's cache.
    3. The step, which writes the tokens.
    4. `truncate`, if tokens are rejected, and `commit`, if other requests may share the tokens.

    A page without a request keeps its content while a lookup can find it. If no other page is free,
    the page that was released first is evicted. A request releases its last page first.

    Threads may share an allocator, because each call is atomic. The order above is not checked: let
    one thread make all calls of a step. A copy by `copy.deepcopy` or `pickle` is independent.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = checks.require_positive("num_pages", num_pages)
        self.page_size = checks.require_positive("page_size", page_size)
        if self.num_pages > _INT32.max:
            raise ValueError(
                f"num_pages must be at most {_INT32.max}, as block tables are int32, "
                f"got {num_pages}"
            )
        self._pool = PagePool(self.num_pages)
        self._requests: dict[Hashable, _Request] = {}
        self._lock = threading.RLock()

    @property
    def num_free(self) -> int:
        """The number of pages that no request has, with cached ones among them."""
        with self._lock:
            return self._pool.num_free

    @property
    def requests(self) -> tuple[Hashable, ...]:
        """The live requests, the oldest first."""
        with self._lock:
            return tuple(self._requests)

    @property
    def ref_counts(self) -> np.ndarray:
        """The number of requests that have each page, [num_pages] int32."""
        with self._lock:
            return np.array(self._pool.ref_counts, np.int32)

    @property
    def cached_pages(self) -> frozenset[int]:
        """The pages that a lookup can find; requests may have them."""
        with self._lock:
            return frozenset(self._pool.key_of_page)

    def num_tokens(self, request_id: Hashable) -> int:
        """Returns the token count of a request. Raises KeyError if it is not live."""
        with self._lock:
            return self._live(request_id).num_tokens

    def pages(self, request_id: Hashable) -> tuple[int, ...]:
        """Returns a request's pages in token order. Raises KeyError if it is not live."""
        with self._lock:
            return tuple(self._live(request_id).pages)

    def lookup(self, tokens: Sequence[int] | np.ndarray) -> CachedPrefix:
        """Returns the longest prefix of the tokens that is cached, in full pages.

        Another thread may evict the pages; a request has to be allocated with them.

        Raises TypeError unless `tokens` is a sequence of integers, and ValueError for a negative
        token id.
        """
        ids = token_ids(tokens)
        with self._lock:
            pages, _ = self._find(ids, len(ids) // self.page_size)
        return CachedPrefix(len(pages) * self.page_size, tuple(pages))

    def allocate(
        self,
        request_id: Hashable,
        num_tokens: int,
        tokens: Sequence[int] | np.ndarray | None = None,
    ) -> int:
        """Makes a request live, assigns it pages, and returns how many of its tokens are cached.

        Args:
            request_id: a new one.
            num_tokens: how many tokens of the request get pages, 0 or more, with the cached ones
                counted. Below the number of cached tokens it counts as that number.
            tokens: token ids. The request starts with the cached pages of the longest prefix. The
                last token is never among these, because a step must compute its output.

        Raises TypeError for an id that is not hashable, a count or a token id that is not an
        integer. Raises ValueError if the request is already live or a number is negative. Raises
        OutOfPagesError if there are not enough free pages. After an error the allocator is
        unchanged.
        """
        require_hashable(request_id)
        num_tokens = checks.require_int("num_tokens", num_tokens, 0)
        ids = token_ids(() if tokens is None else tokens)
        with self._lock:
            self._require_new("request_id", request_id)
            cached, keys = self._find(ids, max(len(ids) - 1, 0) // self.page_size)
            found = len(cached) * self.page_size
            num_tokens = max(num_tokens, found)
            needed = self._pages_for(num_tokens) - len(cached)
            evictable = sum(not self._pool.ref_counts[page] for page in cached)
            self._require_free(request_id, needed, self._pool.num_free - evictable)
            for page in cached:
                self._pool.hold(page)
            pages = cached + [self._pool.take() for _ in range(needed)]
            self._requests[request_id] = _Request(pages, num_tokens, keys)
        return found

    def extend(self, request_id: Hashable, num_tokens: int) -> None:
        """Grows a live request to `num_tokens` in total, at least as many as it has.

        If the new tokens begin in a page that another request has, too, the request gets a new page
        in its place, and `take_copies` returns the pair.

        Raises KeyError if the request is not live, TypeError for a count that is not an integer,
        and ValueError if the request would shrink. Raises OutOfPagesError if there are not enough
        free pages. After an error the allocator is unchanged.
        """
        with self._lock:
            request = self._live(request_id)
            num_tokens = checks.require_int("num_tokens", num_tokens, 0)
            if num_tokens < request.num_tokens:
                raise ValueError(
                    f"num_tokens must be at least the {request.num_tokens} that request "
                    f"{request_id!r} has, got {num_tokens}"
                )
            pages, pool = request.pages, self._pool
            writes_last = num_tokens > request.num_tokens and request.num_tokens % self.page_size
            is_shared = writes_last and pool.ref_counts[pages[-1]] > 1
            new = self._pages_for(num_tokens) - len(pages)
            if new or is_shared:
                self._require_free(request_id, new + bool(is_shared), pool.num_free)
            if is_shared:
                pages[-1] = pool.copy_of(pages[-1])
            elif writes_last:
                pool.forget(pages[-1])  # It has a key if the request was truncated.
            for _ in range(new):
                pages.append(pool.take())
            request.num_tokens = num_tokens

    def fork(self, request_id: Hashable, new_request_id: Hashable) -> None:
        """Makes a request live that has the tokens and shares the pages of a live one.

        The tokens must have been written. Raises KeyError if `request_id` is not live, TypeError if
        `new_request_id` is not hashable, and ValueError if it is already live. After an error the
        allocator is unchanged.
        """
        with self._lock:
            request = self._live(request_id)
            require_hashable(new_request_id)
            self._require_new("new_request_id", new_request_id)
            for page in request.pages:
                self._pool.hold(page)
            self._requests[new_request_id] = request.copy()

    def truncate(self, request_id: Hashable, num_tokens: int) -> None:
        """Shrinks a live request to its first `num_tokens`, as after drafts that were rejected.

        The pages after these tokens are released. Raises KeyError if the request is not live,
        TypeError for a count that is not an integer, and ValueError if it is negative or more than
        the request has. After an error the allocator is unchanged.
        """
        with self._lock:
            request = self._live(request_id)
            num_tokens = checks.require_int("num_tokens", num_tokens, 0)
            if num_tokens > request.num_tokens:
                raise ValueError(
                    f"num_tokens must be at most the {request.num_tokens} that request "
                    f"{request_id!r} has, got {num_tokens}"
                )
            self._release(request, self._pages_for(num_tokens))
            del request.keys[num_tokens // self.page_size :]
            request.num_tokens = num_tokens

    def commit(self, request_id: Hashable, tokens: Sequence[int] | np.ndarray) -> None:
        """Makes the full pages of a request available to lookups.

        Args:
            request_id: a live request.
            tokens: the ids of the request's tokens from the first one on, all of which have been
                written. All are checked, and those of full pages that are not committed yet count.

        If a lookup finds the same tokens in another page already, it continues to do so.

        Raises KeyError if the request is not live, and TypeError unless `tokens` is a sequence of
        integers. Raises ValueError for more tokens than the request has, a negative id, or ids
        other than those that another request committed the page with. After an error the allocator
        is unchanged.
        """
        ids = token_ids(tokens)
        count = len(ids)
        with self._lock:
            request = self._live(request_id)
            if count > request.num_tokens:
                raise ValueError(
                    f"tokens must be at most the {request.num_tokens} that request "
                    f"{request_id!r} has, got {count}"
                )
            first = len(request.keys)
            last = max(first, count // self.page_size)
            before = request.keys[-1] if first else FIRST
            keys = page_keys(before, ids, first, last, self.page_size)
            new = list(zip(request.pages[first:last], keys, strict=True))
            for page, key in new:
                if self._pool.key_of_page.get(page, key) != key:
                    raise ValueError(
                        f"tokens must be those that page {page} of request {request_id!r} was "
                        "committed with, got others"
                    )
            for page, key in new:
                self._pool.register(page, key)
            request.keys.extend(keys)

    def free(self, request_id: Hashable) -> None:
        """Ends a request and releases its pages. Raises KeyError if it is not live.

        A page that another request has stays with that request.
        """
        with self._lock:
            self._release(self._live(request_id), 0)
            del self._requests[request_id]

    def take_copies(self, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pages to copy before tokens are written: sources and targets, [N] int32.

        The allocator forgets them. All sources are pages as they are before any of the copies.
        There is at most one copy per call of `extend`.

        Args:
            size: N, where -1 fills up both arrays; None is the number of copies.

        Raises TypeError for a size that is not an integer, and ValueError if it is negative or less
        than the number of copies. After an error the allocator is unchanged.
        """
        if size is not None:
            size = checks.require_int("size", size, 0)
        with self._lock:
            copies = self._pool.copies
            size = len(copies) if size is None else size
            if size < len(copies):
                raise ValueError(
                    f"size must be at least {len(copies)}, the number of copies, got {size}"
                )
            sources, targets = np.full((2, size), -1, np.int32)
            sources[: len(copies)] = list(copies.values())
            targets[: len(copies)] = list(copies)
            copies.clear()
        return sources, targets

    def block_tables(
        self,
        request_ids: Sequence[Hashable],
        max_pages: int,
        *,
        fill: int = -1,
        cache: PagedKVCache | None = None,
    ) -> np.ndarray:
        """Returns the block tables of requests, [len(request_ids), max_pages] int32.

        Args:
            request_ids: the requests, one per row.
            max_pages: entries per row.
            fill: value of the entries after a request's pages.
            cache: if given, the cache that the tables are for, which is checked.

        Raises KeyError for a request that is not live. Raises TypeError for ids that are not a
        sequence, a size or fill that is not an integer, or a cache that is not a PagedKVCache.
        Raises ValueError for a request with more than max_pages pages, or a fill that does not fit
        int32. Raises ValueError for a cache with another page size or fewer pages than this
        allocator.
        """
        if not is_sequence(request_ids):
            raise TypeError(
                "request_ids must be a sequence of request ids, "
                f"got {request_ids!r} of type {type(request_ids).__name__}"
            )
        max_pages = checks.require_positive("max_pages", max_pages)
        fill = checks.require_int("fill", fill, _INT32.min, _INT32.max)
        require_cache(cache, self.page_size, self.num_pages)
        with self._lock:
            held = [self.pages(request_id) for request_id in request_ids]
        for request_id, pages in zip(request_ids, held, strict=True):
            if len(pages) > max_pages:
                raise ValueError(
                    f"max_pages must be at least the {len(pages)} of request {request_id!r}, "
                    f"got {max_pages}"
                )
        tables = np.full((len(held), max_pages), fill, np.int32)
        for row, pages in zip(tables, held, strict=True):
            row[: len(pages)] = pages
        return tables

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state of a copy: everything except the lock."""
        with self._lock:
            state = self.__dict__ | {
                "_pool": self._pool.copy(),
                "_requests": {key: request.copy() for key, request in self._requests.items()},
            }
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def _find(self, ids: np.ndarray, most: int) -> tuple[list[int], list[bytes]]:
        """Returns the cached pages of a prefix, at most that many, and their keys."""
        keys = page_keys(FIRST, ids, 0, most, self.page_size)
        pages = []
        for key in keys:
            page = self._pool.page_of_key.get(key)
            if page is None:
                break
            pages.append(page)
        return pages, keys[: len(pages)]

    def _release(self, request: _Request, keep: int) -> None:
        """Releases the pages of a request after its first `keep`, the last one first."""
        pages = request.pages
        for _ in range(len(pages) - keep):
            self._pool.release(pages.pop())

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _require_free(self, request_id: Hashable, needed: int, free: int) -> None:
        if needed > free:
            raise OutOfPagesError(
                f"request {request_id!r} needs {needed} more pages of {self.page_size} tokens, "
                f"{free} of {self.num_pages} are free"
            )

    def _require_new(self, name: str, request_id: Hashable) -> None:
        if request_id in self._requests:
            raise ValueError(f"{name} must be a new one, got {request_id!r}, which is live")

    def _live(self, request_id: Hashable) -> _Request:
        try:
            request = self._requests.get(request_id)
        except TypeError:
            require_hashable(request_id)
            raise
        if request is None:
            raise KeyError(f"request {request_id!r} is not live")
        return request
