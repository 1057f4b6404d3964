"""Hands out the pages of a PagedKVCache to requests; plain Python on the host.

It counts pages and tokens and holds no cache: allocate or extend first, then write.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from mla_jax import checks
from mla_jax.cache import PagedKVCache


class OutOfPagesError(RuntimeError):
    """The request needs more pages than are free; nothing has changed."""


class PageAllocator:
    """Free pages, and the pages and token count of each live request.

    Freed pages are handed out again last-in first-out, while they are still in a processor's cache.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        checks.require_positive("num_pages", num_pages)
        checks.require_positive("page_size", page_size)
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(reversed(range(num_pages)))
        self._pages: dict[Hashable, list[int]] = {}
        self._tokens: dict[Hashable, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that no request holds."""
        return len(self._free)

    @property
    def requests(self) -> tuple[Hashable, ...]:
        """The live requests, oldest first."""
        return tuple(self._pages)

    def num_tokens(self, request_id: Hashable) -> int:
        """Tokens that the request has room for by its own count. KeyError if it is not live."""
        self._require_live(request_id)
        return self._tokens[request_id]

    def pages(self, request_id: Hashable) -> tuple[int, ...]:
        """The request's pages in token order. KeyError if it is not live."""
        self._require_live(request_id)
        return tuple(self._pages[request_id])

    def allocate(self, request_id: Hashable, num_tokens: int) -> None:
        """Makes a request of num_tokens (0 or more) live.

        Raises ValueError if it is live already or the count is negative, OutOfPagesError if its
        pages are not free; nothing has changed then.
        """
        if request_id in self._pages:
            raise ValueError(f"request_id must be a new one, got {request_id!r}, which is live")
        self._grow(request_id, num_tokens)

    def extend(self, request_id: Hashable, num_tokens: int) -> None:
        """Grows a live request to num_tokens in all (not fewer than it has).

        Raises KeyError if it is not live, ValueError if it would shrink, OutOfPagesError if the
        pages are not free; nothing has changed then.
        """
        self._require_live(request_id)
        if num_tokens < self._tokens[request_id]:
            raise ValueError(
                f"num_tokens must be at least the {self._tokens[request_id]} that request "
                f"{request_id!r} has, got {num_tokens}"
            )
        self._grow(request_id, num_tokens)

    def free(self, request_id: Hashable) -> None:
        """Gives a request's pages back. KeyError if it is not live."""
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
        """[len(request_ids), max_pages] int32: each request's pages, then `fill` in unused slots.

        Raises KeyError for a request that is not live, ValueError for one with more pages, or for
        a `cache` (if it is given, the one that the tables are for) of another page size or of
        fewer pages than this allocator hands out.
        """
        if cache is not None and cache.page_size != self.page_size:
            raise ValueError(
                f"page_size must be that of the cache = {cache.page_size}, got {self.page_size}"
            )
        if cache is not None and cache.num_pages < self.num_pages:
            raise ValueError(
                f"num_pages must be at most the cache's {cache.num_pages}, got {self.num_pages}"
            )
        tables = np.full((len(request_ids), max_pages), fill, np.int32)
        for row, request_id in zip(tables, request_ids, strict=True):
            pages = self.pages(request_id)
            if len(pages) > max_pages:
                raise ValueError(
                    f"max_pages must be at least the {len(pages)} of request {request_id!r}, "
                    f"got {max_pages}"
                )
            row[: len(pages)] = pages
        return tables

    def _grow(self, request_id: Hashable, num_tokens: int) -> None:
        if num_tokens < 0:
            raise ValueError(f"num_tokens must be at least 0, got {num_tokens}")
        held = self._pages.get(request_id, [])
        wanted = -(-num_tokens // self.page_size) - len(held)
        if wanted > len(self._free):
            raise OutOfPagesError(
                f"request {request_id!r} wants {wanted} more pages of {self.page_size} tokens, "
                f"{len(self._free)} of {self.num_pages} are free"
            )
        new = [self._free.pop() for _ in range(wanted)]
        self._pages[request_id] = held + new
        self._tokens[request_id] = num_tokens

    def _require_live(self, request_id: Hashable) -> None:
        if request_id not in self._pages:
            raise KeyError(f"request {request_id!r} is not live")
