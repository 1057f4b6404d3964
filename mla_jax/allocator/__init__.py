"""Assigns the pages of a PagedKVCache to requests; plain Python on the host.

The allocator counts pages and tokens and holds no cache. A step first calls `allocate`, `fork` or
`extend`, then copies the pages of `take_copies`, then writes the tokens.

Requests share pages in two ways, as in vLLM (arXiv 2309.06180). `fork` starts a request with the
pages of another one. `commit` lets a lookup find a request's full pages by their tokens; with token
ids, `allocate` starts a request with those of its longest prefix (prefix caching). A page's
reference count is the number of requests that have it, and a page returns to the pool only when the
count is 0. Before a request writes to a page that another one has, too, `extend` gives it a new
page, and `take_copies` says which page to copy there.

`requests` has the allocator, `pool` the state of the pages, and `tokens` the keys of full pages.
"""

from mla_jax.allocator.requests import CachedPrefix, OutOfPagesError, PageAllocator

__all__ = ["CachedPrefix", "OutOfPagesError", "PageAllocator"]
