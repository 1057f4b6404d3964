"""Assigns the pages of a PagedKVCache to requests; plain Python on the host.

The allocator counts pages and tokens and holds no cache. Call `allocate` or `extend` first, then
write the tokens.

Requests share pages in two ways, as in vLLM (arXiv 2309.06180). `fork` starts a request with the
pages of another one. With token ids, `allocate` starts a request with the full pages that hold the
same tokens (prefix caching). A page's reference count is the number of requests that have it, and a
page returns to the pool only when the count is 0. Before a request writes to a page that another
one has, too, `extend` gives it a new page, and `take_copies` says which page to copy there.

`requests` has the allocator, `pool` the state of the pages, and `tokens` the keys of full pages.
"""

from mla_jax.allocator.requests import CachedPrefix, OutOfPagesError, PageAllocator

__all__ = ["CachedPrefix", "OutOfPagesError", "PageAllocator"]
