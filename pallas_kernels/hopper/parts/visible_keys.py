"""The causal limit: which keys of its request a query token sees. All decode kernels use it."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.hopper.parts.call import DecodeCall


class VisibleKeys(NamedTuple):
    """The keys of a request that each of its query tokens sees.

    The query tokens are the last query_len tokens of the request, so token t has the position
    kv_len - query_len + t. With a causal mask it sees the keys up to this position, without one it
    sees all keys. Tokens at or past query_len are padding: `last` and `count` give them positions
    past the end, so callers compare with kv_len or query_len too.
    """

    causal: bool
    kv_len: Any
    query_len: Any
    first_position: Any  # of query token 0

    @staticmethod
    def of(call: DecodeCall, kv_len: Any, query_len: Any) -> "VisibleKeys":
        return VisibleKeys(call.causal, kv_len, query_len, kv_len - query_len)

    def last(self, token: Any) -> Any:
        """Returns the index of the last key that a token sees."""
        return self.first_position + token if self.causal else self.kv_len - 1

    def count(self, token: Any) -> Any:
        """Returns how many keys a token sees: this many, from key 0 on."""
        return self.last(token) + 1

    def count_for_all_from(self, token: Any) -> Any:
        """Returns how many keys this token and all after it see, if they see fewer than kv_len.

        It is min(count(token), kv_len), computed so that kv_len is added last.
        """
        if not self.causal:
            return self.kv_len
        return self.kv_len + jnp.minimum(token + 1 - self.query_len, 0)
