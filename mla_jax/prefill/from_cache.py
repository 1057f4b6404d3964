"""Attention in the expanded form over the paged cache: keys and values are expanded from latents.

The new tokens of a request attend first to each other and to the tokens right before them, as many
as the workspace has room for, with the causal mask. Earlier tokens are expanded in parts of a
bounded number of tokens. A loop over the parts has no mask, and merges the results by lse in
float32. It runs as often as the prefixes of this call need, often not at all.

The cache is read again for the new tokens, so that they have the values that it stores, and later
calls see the same keys.

Requests with few new tokens, as in a batch of prefill and decode, take the absorbed form in the
same call. That part runs only if the batch has such requests.

JAX cannot reverse a loop whose number of parts is traced. `_gradients` therefore goes over the
parts again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from mla_jax import checks
from mla_jax.cache import PagedKVCache
from mla_jax.cache.layers import merged, pool_tables
from mla_jax.cache.layout import add
from mla_jax.cache.reads import places
from mla_jax.cache.requests import valid_or_minus_one
from mla_jax.derivatives import differentiable
from mla_jax.implementations.choice import compute
from mla_jax.implementations.gradients import attend as attend_paged
from mla_jax.implementations.gradients import constant_int8
from mla_jax.online_softmax import merge_pair
from mla_jax.prefill.backward import ragged_gradients
from mla_jax.prefill.call import (
    Call,
    ExpandedForm,
    Expansion,
    Packed,
    Part,
    Requests,
)
from mla_jax.prefill.forward import Outputs, attend_ragged_xla
from mla_jax.problem import AttentionProblem
from mla_jax.projections import absorbed_queries, einsum
from mla_jax.ragged.problem import RaggedProblem
from mla_jax.ragged.requests import in_order, owners
from mla_jax.sharding.axes import dims_of, on_auto_axes, spec_of_dims, vary_like


def append_and_attend(
    form: ExpandedForm,
    q_nope: jax.Array,
    q_rope: jax.Array,
    kv: jax.Array,
    expansion: Expansion,
    cache: PagedKVCache,
    requests: Requests,
    *,
    donate: bool,
    packed: Packed | None = None,
) -> tuple[jax.Array, PagedKVCache]:
    """Appends the rows of new tokens to the cache and computes attention over all of it.

    Args:
        form: how.
        q_nope, q_rope: [B, S, H, nope] and [B, S, H, rope], left aligned, not scaled. All is
            computed in their dtype, promoted with that of W_UK.
        kv: [B, S, D], rows of the new tokens.
        expansion: the weights.
        cache: holds the rows of the earlier tokens; one layer.
        requests: block_tables, seq_lens and query_lens, as in `mla_layer`. Of packed tokens each is
            a request (`cache.packed`), with B = T and S = 1.
        donate: as in `mla_layer`.
        packed: the requests that packed tokens belong to.

    Returns:
        o: [B, S, H, v_dim]; 0 for padding, NaN for invalid requests.
        cache: with the new tokens appended; the pool of a view.
    """
    donate = checks.require_bool("donate", donate)
    if checks.is_concrete(*requests):
        tables, lens, _ = requests
        checks.require_pages("seq_lens", lens, tables, cache.page_size, cache.num_pages)
    requests = Requests(*map(checks.snapshot, requests))
    attend = functools.partial(_attend, form=form)
    queries = q_nope, q_rope, expansion
    call = _in_pool(cache, requests), None if packed is None else _in_pool(cache, packed)
    # Every check runs before anything is written and before the cache is donated.
    jax.eval_shape(attend, *queries, merged(cache), *call)
    tables, lens, new = requests
    kv = kv.astype(cache.row_dtype)
    cache = cache.append(kv, tables, lens - new, new, donate=donate)
    return attend(*queries, merged(cache), *call), cache


def _in_pool[T: (Requests, Packed)](cache: PagedKVCache, requests: T) -> T:
    return requests._replace(block_tables=pool_tables(cache, requests.block_tables))


def _specs_of_output(q_nope: jax.Array, *_: jax.Array) -> PartitionSpec:
    return spec_of_dims(*dims_of(q_nope)[:3], None)


@on_auto_axes(_specs_of_output)
@functools.partial(jax.jit, static_argnames="form")
def _attend(
    q_nope: jax.Array,
    q_rope: jax.Array,
    expansion: Expansion,
    cache: PagedKVCache,
    rows: Requests,
    packed: Packed | None,
    *,
    form: ExpandedForm,
) -> jax.Array:
    """Computes `append_and_attend` for a cache that has the rows of the new tokens.

    rows: the requests that the rows of q_nope and q_rope are of.
    """
    count = q_nope.shape[1]
    tables, lens, new = rows if packed is None else (*packed[:2], jnp.diff(packed.cu_q_lens))
    sizes = cache.page_size, cache.num_pages, count if packed is None else len(q_nope)
    seq_lens = valid_or_minus_one(tables, lens, new, *sizes)
    if packed is None:
        starts = jnp.arange(len(q_nope), dtype=jnp.int32) * np.int32(count)
    else:
        seq_lens = jnp.where(in_order(packed.cu_q_lens, len(q_nope)), seq_lens, -1)
        starts = jnp.clip(packed.cu_q_lens[:-1], 0, len(q_nope))
    invalid = seq_lens < 0
    requests = Requests(tables, seq_lens, jnp.where(invalid, 0, new))

    def of_rows(flags: jax.Array) -> jax.Array:
        """Returns the flags [B] of requests for the rows of q_nope, [B, S or 1, 1, 1]."""
        if packed is not None:
            request, owned = owners(packed.cu_q_lens, len(q_nope))
            flags = flags[request] & owned
        return flags[:, None, None, None]

    short = requests.query_lens <= np.int32(form.absorbed_tokens)
    call = q_nope, q_rope, expansion, cache, requests.only(~short), starts
    attend_long = functools.partial(_attend_long, form)
    if packed is None:
        o = attend_long(*call)
    else:  # In most steps all requests decode.
        result = jax.eval_shape(attend_long, *call)

        def nothing(*call: Any) -> jax.Array:
            return vary_like(jnp.zeros(result.shape, result.dtype), call)

        o = lax.cond((~short).any(), attend_long, nothing, *call)
    if form.absorbed_choice is not None:
        short &= requests.query_lens > 0
        queries = q_nope, q_rope
        if packed is None:
            few = slice(form.absorbed_tokens)
            queries = q_nope[:, few], q_rope[:, few]
        chosen = rows.only(of_rows(short)[:, 0, 0, 0])

        def with_short(o: jax.Array) -> jax.Array:
            mine = _attend_short(form, *queries, expansion, cache, chosen).astype(o.dtype)
            mine = jnp.pad(mine, ((0, 0), (0, count - mine.shape[1]), (0, 0), (0, 0)))
            return jnp.where(of_rows(short), mine, o)

        o = lax.cond(short.any(), with_short, lambda o: o, o)
    return jnp.where(of_rows(invalid), jnp.nan, o)


def _attend_long(
    form: ExpandedForm,
    q_nope: jax.Array,
    q_rope: jax.Array,
    expansion: Expansion,
    cache: PagedKVCache,
    requests: Requests,
    starts: jax.Array,
) -> jax.Array:
    """Computes the expanded form, [B, S, H, v_dim]; 0 for padding. starts: see `Call`."""
    batch, count, heads, _ = q_nope.shape
    q = jnp.concatenate([q_nope, q_rope], -1).reshape(batch * count, heads, -1)
    q = q.astype(jnp.promote_types(q.dtype, expansion.w_uk.dtype))
    call = Call(q, expansion, constant_int8(cache), requests, starts)
    # With one type for all arrays in a shard_map, JAX sums the gradient of an array that is equal
    # on several devices.
    call = vary_like(call, call)
    attend = differentiable(
        functools.partial(_over_parts, form, functools.partial(compute, choice=form.choice)),
        twin=functools.partial(_over_parts, form, attend_ragged_xla),
        gradients=functools.partial(_gradients, form),
    )
    o, _ = attend(call)
    return o.reshape(batch, count, heads, -1)


def _over_parts(
    form: ExpandedForm, compute_part: Callable[[RaggedProblem], Outputs], call: Call
) -> Outputs:
    """Returns o [Tq, H, v_dim], 0 for padding, and lse [Tq, H]."""

    def attend(part: Part, causal: bool) -> Outputs:
        positions, request, _ = part.places()
        rows = call.cache.rows(call.requests.block_tables, positions[:, None], request)[:, 0]
        keys_and_values = call.expansion.keys_and_values(rows.astype(call.q.dtype))
        return compute_part(part.problem(form, call, keys_and_values, causal=causal))

    tail = call.tail(form)
    without_prefix = functools.partial(attend, call.last_keys(0), form.causal)
    with_tail = functools.partial(attend, call.last_keys(tail), form.causal)
    if tail > 0:
        o, lse = lax.cond(jnp.any(call.prefix_lens > 0), with_tail, without_prefix)
    else:
        o, lse = without_prefix()
    # With a causal mask padding is invalid, because it has queries and no keys.
    starts, ends = call.bounds()
    inside = jnp.zeros(len(call.q), jnp.int32).at[starts].add(1, mode="drop")
    inside = inside.at[ends].add(-1, mode="drop")
    real = (jnp.cumsum(inside, dtype=jnp.int32) > 0)[:, None]
    o, lse = jnp.where(real[..., None], o, 0), jnp.where(real, lse, -jnp.inf)
    if form.longest_prefix > tail:
        parts, part = call.prefix(form)
        state = vary_like((o.astype(jnp.float32), lse), call)
        o, lse = lax.fori_loop(
            np.int32(0), parts, lambda i, state: merge_pair(state, attend(part(i), False)), state
        )
    return o.astype(call.q.dtype), lse


class _Sums(NamedTuple):
    """Gradients of a `Call`, float32."""

    q: jax.Array
    expansion: Expansion
    pages: jax.Array | None  # None: not asked for


def _gradients(
    form: ExpandedForm, wanted: Call, call: Call, out: Outputs, cotangents: Outputs
) -> Call:
    """Returns the gradients; each part is expanded again, and its P is e^(scores - lse).

    Here lse and o are those of all keys, so that the gradients of the parts add up.
    """
    table, cache = call.requests.block_tables, call.cache
    pages = cache.pages if wanted.cache.pages else None

    def add_part(sums: _Sums, part: Part, causal: bool) -> _Sums:
        positions, request, there = part.places()
        rows = cache.rows(table, positions[:, None], request)[:, 0]
        # Rows behind the last token may be NaN, and the gradients of their keys are 0.
        rows = jnp.where(there[:, None], rows, 0).astype(call.q.dtype)
        keys_and_values, pull = jax.vjp(Expansion.keys_and_values, call.expansion, rows)
        problem = part.problem(form, call, keys_and_values, causal=causal)
        found = ragged_gradients(problem, *out, *cotangents)
        d_expansion, d_rows = pull((found.k_nope, found.k_rope, found.v))
        d_pages = sums.pages
        if d_pages is not None:
            where = places(cache, table, positions[:, None], request)
            d_pages = add(d_pages, *where, d_rows[:, None].astype(jnp.float32))
        d_q, d_expansion = jax.tree.map(
            lambda total, more: total + more.astype(jnp.float32),
            (sums.q, sums.expansion),
            (found.q, d_expansion),
        )
        return _Sums(d_q, d_expansion, d_pages)

    sums = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32), _Sums(call.q, call.expansion, pages)
    )
    tail = call.tail(form)
    sums = add_part(vary_like(sums, call, cotangents), call.last_keys(tail), form.causal)
    if form.longest_prefix > tail:
        parts, part = call.prefix(form)
        sums = lax.fori_loop(
            np.int32(0), parts, lambda i, sums: add_part(sums, part(i), False), sums
        )
    d_q, d_expansion, d_pages = jax.tree.map(
        lambda total, x: total.astype(x.dtype), sums, _Sums(call.q, call.expansion, pages)
    )
    cache = dataclasses.replace(cache, pages=d_pages)
    return call._replace(q=d_q, expansion=d_expansion, cache=cache)


def _attend_short(
    form: ExpandedForm,
    q_nope: jax.Array,
    q_rope: jax.Array,
    expansion: Expansion,
    cache: PagedKVCache,
    requests: Requests,
) -> jax.Array:
    """Computes the absorbed form, [B, S, H, v_dim]."""
    assert form.absorbed_choice is not None
    problem = AttentionProblem(
        q=absorbed_queries(expansion.w_uk, q_nope, q_rope),
        cache=cache,
        block_tables=requests.block_tables,
        seq_lens=requests.seq_lens,
        query_lens=requests.query_lens,
        plan=None,
        softmax_scale=form.softmax_scale,
        causal=form.causal,
        rescale="multiply",
        partial_dtype=None,
    )
    o_latent, _ = attend_paged(problem, form.absorbed_choice)
    return einsum("bshc,hcv->bshv", o_latent, expansion.w_uv)
