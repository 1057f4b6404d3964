"""The paged cache of absorbed MLA: one row [c_kv | k_rope] per token, shared by all heads.

A request's tokens are stored in pages, which its row of the block table lists in token order. This
is vLLM's PagedAttention (arXiv 2309.06180). A page has one of two layouts:
- "ND": [page_size, D], one row after the other.
- "NZ": [D / C0, page_size, C0], where C0 values are 32 bytes. It is the fractal layout of Ascend's
  matrix unit ("PA_NZ"). Element (t, d) is at address ((d / C0) * page_size + t) * C0 + d % C0.

An int8 cache stores c_kv as int8 with float32 scales (see `quantize`), and k_rope in bfloat16 in
pages with the same numbers. Ascend's kernels have such a cache. int8 has no NaN, so a token with
NaN or an infinity in c_kv is marked. Its scales are NaN, or with one scale for the whole cache its
k_rope is NaN. Its c_kv then reads as NaN, and so does the output of every row that sees the token.

Only pages up to a request's length are read. Other entries of a block table, and rows past the
length, may hold anything.

`paged` has the cache, `reads` and `writes` its programs, `layers` the pages of each layer, `layout`
the pages themselves, `int8` the stored form of int8 rows, and `arguments` the checks of what the
cache's methods get.
"""

from mla_jax.cache.arguments import DTYPES
from mla_jax.cache.layout import LAYOUTS, PAGE_SIZES
from mla_jax.cache.paged import PagedKVCache

__all__ = ["DTYPES", "LAYOUTS", "PAGE_SIZES", "PagedKVCache"]
