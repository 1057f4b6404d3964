"""Signatures of other projects, for servers that are written for them."""

from mla_jax.adapters.jax_servers import mla_ragged_paged_attention

__all__ = ["mla_ragged_paged_attention"]
