"""Which requests of a paged cache are valid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def valid_or_minus_one(
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array | None,
    page_size: int,
    num_pages: int,
    num_queries: int,
) -> jax.Array:
    """Returns seq_lens, with -1 for each request with invalid lengths or pages."""
    max_pages = block_tables.shape[1]
    pages = -(-seq_lens // page_size)
    used = jnp.arange(max_pages, dtype=jnp.int32) < pages[:, None]
    capacity = min(max_pages * page_size, np.iinfo(np.int32).max)
    exists = (block_tables >= 0) & (block_tables < num_pages)
    valid = (seq_lens >= 0) & (seq_lens <= capacity)
    valid &= jnp.all(exists | ~used, axis=1)
    if query_lens is not None:
        most = jnp.minimum(seq_lens, num_queries)
        valid &= (query_lens >= 0) & (query_lens <= most)
    return jnp.where(valid, seq_lens, -1)
