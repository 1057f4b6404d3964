"""Assigns the pages of a PagedKVCache to requests; plain Python on the host.

The allocator counts pages and tokens and holds no cache. Call `allocate` or `extend` first, then
write the tokens.
"""

import threading
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from mla_jax import checks
from mla_jax.cache import PagedKVCache

_INT32 = np.iinfo(np.int32)


class OutOfPagesError(RuntimeError):
    """Raised if a request needs more pages than are free; the allocator is unchanged."""


class PageAllocator:
    """The free pages, and the pages and the token count of each live request.

    Freed pages are assigned again in last-in, first-out order, while they are still in a
    processor's cache. Threads may share an allocator, because each call is atomic. A copy by
    `copy.deepcopy` or `pickle` is independent.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = checks.require_positive("num_pages", num_pages)
        self.page_size = checks.require_positive("page_size", page_size)
        if self.num_pages > _INT32.max:
            raise ValueError(
                f"num_pages must be at most {_INT32.max}, as block tables are int32, "
                f"got {num_pages}"
            )
        self._free = list(reversed(range(self.num_pages)))
        self._pages: dict[Hashable, list[int]] = {}
        self._tokens: dict[Hashable, int] = {}
        self._lock = threading.RLock()

    @property
    def num_free(self) -> int:
        """The number of pages that no request has."""
        with self._lock:
            return len(self._free)

    @property
    def requests(self) -> tuple[Hashable, ...]:
        """The live requests, the oldest first."""
        with self._lock:
            return tuple(self._pages)

    def num_tokens(self, request_id: Hashable) -> int:
        """Returns the token count of a request. Raises KeyError if it is not live."""
        with self._lock:
            self._require_live(request_id)
            return self._tokens[request_id]

    def pages(self, request_id: Hashable) -> tuple[int, ...]:
        """Returns a request's pages in token order. Raises KeyError if it is not live."""
        with self._lock:
            self._require_live(request_id)
            return tuple(self._pages[request_id])

    def allocate(self, request_id: Hashable, num_tokens: int) -> None:
        """Makes a request of `num_tokens` (0 or more) live and assigns it pages.

        Raises TypeError for an id that is not hashable or a count that is not an integer. Raises
        ValueError if the request is already live or the count is negative. Raises OutOfPagesError
        if there are not enough free pages. After an error the allocator is unchanged.
        """
        _require_hashable(request_id)
        num_tokens = checks.require_int("num_tokens", num_tokens, 0)
        with self._lock:
            if request_id in self._pages:
                raise ValueError(f"request_id must be a new one, got {request_id!r}, which is live")
            self._grow(request_id, num_tokens)

    def extend(self, request_id: Hashable, num_tokens: int) -> None:
        """Grows a live request to `num_tokens` in total, at least as many as it has.

        Raises KeyError if the request is not live, TypeError for a count that is not an integer,
        and ValueError if the request would shrink. Raises OutOfPagesError if there are not enough
        free pages. After an error the allocator is unchanged.
        """
        with self._lock:
            self._require_live(request_id)
            num_tokens = checks.require_int("num_tokens", num_tokens, 0)
            if num_tokens < self._tokens[request_id]:
                raise ValueError(
                    f"num_tokens must be at least the {self._tokens[request_id]} that request "
                    f"{request_id!r} has, got {num_tokens}"
                )
            self._grow(request_id, num_tokens)

    def free(self, request_id: Hashable) -> None:
        """Frees a request's pages. Raises KeyError if it is not live."""
        with self._lock:
            self._require_live(request_id)
            del self._tokens[request_id]
            self._free.extend(reversed(self._pages.pop(request_id)))

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
        if not _is_sequence(request_ids):
            raise TypeError(
                "request_ids must be a sequence of request ids, "
                f"got {request_ids!r} of type {type(request_ids).__name__}"
            )
        max_pages = checks.require_positive("max_pages", max_pages)
        fill = checks.require_int("fill", fill, _INT32.min, _INT32.max)
        self._check_cache(cache)
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
                "_free": list(self._free),
                "_pages": {request: list(pages) for request, pages in self._pages.items()},
                "_tokens": dict(self._tokens),
            }
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def _check_cache(self, cache: Any) -> None:
        if cache is None:
            return
        if not isinstance(cache, PagedKVCache):
            raise TypeError(f"cache must be a PagedKVCache or None, got {type(cache).__name__}")
        if cache.page_size != self.page_size:
            raise ValueError(
                f"page_size must be that of the cache = {cache.page_size}, got {self.page_size}"
            )
        if cache.num_pages < self.num_pages:
            raise ValueError(
                f"num_pages must be at most the cache's {cache.num_pages}, got {self.num_pages}"
            )

    def _grow(self, request_id: Hashable, num_tokens: int) -> None:
        held = self._pages.get(request_id, [])
        needed = -(-num_tokens // self.page_size) - len(held)
        if needed > len(self._free):
            raise OutOfPagesError(
                f"request {request_id!r} needs {needed} more pages of {self.page_size} tokens, "
                f"{len(self._free)} of {self.num_pages} are free"
            )
        new = [self._free.pop() for _ in range(needed)]
        self._pages[request_id] = held + new
        self._tokens[request_id] = num_tokens

    def _require_live(self, request_id: Hashable) -> None:
        _require_hashable(request_id)
        if request_id not in self._pages:
            raise KeyError(f"request {request_id!r} is not live")


def _require_hashable(request_id: Any) -> None:
    try:
        hash(request_id)
    except TypeError as error:
        raise TypeError(
            f"request_id must be hashable, got {request_id!r} of type {type(request_id).__name__}"
        ) from error


def _is_sequence(value: Any) -> bool:
    """Returns whether the value is a sequence of ids; neither a str nor a set is one."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
