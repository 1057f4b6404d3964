"""One checked call of the attention op, which every implementation takes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.cache import PagedKVCache
from mla_jax.cache.requests import valid_or_minus_one
from mla_jax.ragged.queries import AnyQueries, whole
from mla_jax.splits.decode_plan import DecodePlan


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "cache", "block_tables", "seq_lens", "query_lens", "plan"],
    meta_fields=["softmax_scale", "causal", "rescale", "partial_dtype"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class AttentionProblem:
    """The arguments of `paged_mla_attention`; a pytree, its options static.

    The rows of a request with invalid lengths or pages are NaN. `mark_invalid` finds such requests;
    an implementation may do so itself.
    """

    q: AnyQueries  # [B, S, H, D]
    cache: PagedKVCache
    block_tables: jax.Array  # [B, max_pages] int32
    seq_lens: jax.Array  # [B] int32
    query_lens: jax.Array | None  # [B] int32; None: all S tokens of every request
    plan: DecodePlan | None
    softmax_scale: float
    causal: bool
    rescale: str
    partial_dtype: Any  # np.dtype, or None: the implementation's choice

    def mark_invalid(self) -> "AttentionProblem":
        """Returns the problem with seq_lens = -1 for each request with invalid lengths or pages."""
        cache = self.cache
        arrays = self.block_tables, self.seq_lens, self.query_lens
        seq_lens = valid_or_minus_one(*arrays, cache.page_size, cache.num_pages, self.q.shape[1])
        return dataclasses.replace(self, seq_lens=seq_lens)

    @property
    def num_rows(self) -> int:
        """R = S * H, the query rows of a request; row r is token r // H, head r % H."""
        return self.q.shape[1] * self.q.shape[2]

    def query_rows(self) -> jax.Array:
        """Returns q as [B, R, D]: all heads of all tokens share one K and V."""
        return whole(self.q).reshape(self.q.shape[0], self.num_rows, self.q.shape[3])

    def visible_keys(self) -> jax.Array:
        """Returns [B, R] int32: a row sees keys 0 .. visible - 1; 0 or less: none."""
        token = jnp.arange(self.q.shape[1], dtype=jnp.int32)
        seq_lens = self.seq_lens[:, None]
        query_lens = self.q.shape[1] if self.query_lens is None else self.query_lens[:, None]
        visible = seq_lens - query_lens + token + 1 if self.causal else seq_lens
        visible = jnp.where(token < query_lens, visible, 0)
        return jnp.repeat(visible, self.q.shape[2], axis=1)

    def all_query_lens(self) -> jax.Array:
        """Returns query_lens, [B] int32; S for every request where none are given."""
        if self.query_lens is None:
            return jnp.full_like(self.seq_lens, self.q.shape[1])
        return self.query_lens

    def outputs(self, o: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns what the op returns, from rows o [B, R, kv_lora_rank] and lse [B, R] float32."""
        bad = (self.seq_lens < 0)[:, None]
        o = jnp.where(bad[..., None], jnp.nan, o).astype(self.q.dtype)
        lse = jnp.where(bad, jnp.nan, lse)
        heads = self.q.shape[:3]
        return o.reshape(*heads, self.cache.kv_lora_rank), lse.reshape(heads)
