"""A call of the expanded form: its requests, and the parts in which their keys are expanded."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.cache import PagedKVCache
from mla_jax.implementations.choice import Choice
from mla_jax.projections import einsum
from mla_jax.ragged.problem import RaggedProblem

BLOCK_TOKENS = 128  # parts of the prefix are multiples of it, where the workspace allows


class Expansion(NamedTuple):
    """The weights that expand a latent c_kv into the keys and values of all heads."""

    w_uk: jax.Array  # [H, nope, kv_lora]
    w_uv: jax.Array  # [H, kv_lora, v_dim]

    def keys_and_values(self, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns k_nope [T, H, nope], k_rope [T, rope] and v [T, H, v_dim] of rows [T, D]."""
        c_kv, k_rope = jnp.split(rows, [self.w_uk.shape[2]], axis=-1)
        k_nope = einsum("tc,hnc->thn", c_kv, self.w_uk)
        v = einsum("tc,hcv->thv", c_kv, self.w_uv)
        return k_nope.astype(rows.dtype), k_rope, v.astype(rows.dtype)


class Packed(NamedTuple):
    """The requests of packed tokens, as in `mla_layer`."""

    block_tables: jax.Array  # [B, max_pages] int32
    seq_lens: jax.Array  # [B] int32
    cu_q_lens: jax.Array  # [B + 1] int32


class Requests(NamedTuple):
    """The requests of a call."""

    block_tables: jax.Array  # [B, max_pages] int32
    seq_lens: jax.Array  # [B] int32, tokens with the new ones; -1: an invalid request
    query_lens: jax.Array  # [B] int32, new tokens; 0 where invalid

    def only(self, chosen: jax.Array) -> "Requests":
        """Returns the requests with lengths of 0 where `chosen` [B] is False."""
        lens = (jnp.where(chosen, x, 0) for x in (self.seq_lens, self.query_lens))
        return Requests(self.block_tables, *lens)


@dataclasses.dataclass(frozen=True)
class ExpandedForm:
    """How a call of the layer computes the expanded form; all of it is static."""

    softmax_scale: float
    causal: bool
    choice: Choice  # of the implementations of the ragged op
    workspace_tokens: int  # tokens of all prefixes that are expanded at a time, at most
    longest_prefix: int  # tokens before the new ones in a request, at most
    absorbed_tokens: int  # requests of up to so many new tokens take the absorbed form
    absorbed_choice: Choice | None  # None: absorbed_tokens is 0


class Call(NamedTuple):
    """What the expanded form is computed from."""

    q: jax.Array  # [Tq, H, nope + rope]
    expansion: Expansion
    cache: PagedKVCache
    requests: Requests
    starts: jax.Array  # [B] int32, where the queries of each request start

    @property
    def prefix_lens(self) -> jax.Array:
        return self.requests.seq_lens - self.requests.query_lens

    def bounds(self) -> tuple[jax.Array, jax.Array]:
        """Returns where the queries of each request start and end, [B] int32."""
        return self.starts, self.starts + self.requests.query_lens

    def tail(self, form: ExpandedForm) -> int:
        """Returns how many tokens of each prefix, its last ones, join the new tokens, at most."""
        batch = len(self.requests.seq_lens)
        room = form.workspace_tokens // batch - -(-len(self.q) // batch)
        return min(max(room, 0), form.longest_prefix)

    def last_keys(self, tail: int) -> "Part":
        """Returns the part of the keys that are the new tokens and up to `tail` before each."""
        first = jnp.maximum(self.prefix_lens - np.int32(tail), 0)
        size = len(self.q) + len(first) * tail
        return Part(first, self.requests.seq_lens - first, np.int32(0), size)

    def prefix(self, form: ExpandedForm) -> tuple[jax.Array, Callable[[jax.Array], "Part"]]:
        """Returns how many parts the keys before `last_keys` have, and part i of them."""
        tail = self.tail(form)
        lens = jnp.maximum(self.prefix_lens - np.int32(tail), 0)
        size = part_size(len(lens) * (form.longest_prefix - tail), form.workspace_tokens)
        parts = -(-jnp.sum(lens, dtype=jnp.int32) // np.int32(size))
        return parts, lambda i: Part(jnp.zeros_like(lens), lens, i * np.int32(size), size)


class Part(NamedTuple):
    """Packed tokens start .. start + size - 1, which lie one request after the other."""

    first: jax.Array  # [B] int32, position of the first token of each request that counts
    lens: jax.Array  # [B] int32, how many tokens of each request count
    start: Any  # [] int32, the packed token that the part begins with
    size: int

    def places(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns positions and requests of the tokens, [size], and which of them there are."""
        index = self.start + jnp.arange(self.size, dtype=jnp.int32)
        ends = jnp.cumsum(self.lens, dtype=jnp.int32)
        request = jnp.sum(index[:, None] >= ends, axis=1, dtype=jnp.int32)
        there = request < len(self.lens)
        request = jnp.minimum(request, np.int32(len(self.lens) - 1))
        return index - (ends - self.lens - self.first)[request], request, there

    def problem(
        self,
        form: ExpandedForm,
        call: Call,
        keys_and_values: tuple[jax.Array, jax.Array, jax.Array],
        *,
        causal: bool,
    ) -> RaggedProblem:
        """Returns the problem of all queries and the keys of these tokens."""
        batch = len(self.lens)
        # Padding behind the tokens of each request is a request of its own, without keys.
        cu_q_lens = jnp.stack(call.bounds(), axis=1).ravel()
        cu_q_lens = jnp.append(cu_q_lens, np.int32(len(call.q)))
        ends = jnp.repeat(jnp.cumsum(self.lens, dtype=jnp.int32), 2, total_repeat_length=2 * batch)
        ends = jnp.append(np.int32(0), ends) - self.start
        cu_kv_lens = jnp.clip(ends, 0, np.int32(self.size))
        scale = form.softmax_scale
        return RaggedProblem(call.q, *keys_and_values, cu_q_lens, cu_kv_lens, scale, causal)


def part_size(total: int, workspace_tokens: int) -> int:
    """Returns the tokens of each of the equal parts into which up to `total` tokens are divided."""
    equal = -(-total // -(-total // workspace_tokens))
    return min(workspace_tokens, -(-equal // BLOCK_TOKENS) * BLOCK_TOKENS)
