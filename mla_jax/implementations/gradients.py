"""The derivatives of `paged_mla_attention` in plain JAX, for every implementation.

The gradients are those of FlashAttention-2 (arXiv 2307.08691, section 3.1) in the absorbed form.
The probabilities of a block are computed again from lse, so that memory is linear in the number of
tokens. K are rows of the cache, and V is K's first kv_lora_rank columns. With P = e^(scores - lse)
and the cotangents dO of o and dlse of lse:

    dP = dO V^T        dS = P * (dP - rowsum(dO * O) + dlse) * softmax_scale
    dQ = dS K          dK = dS^T Q + [P^T dO | 0]

dK is added to the pages that hold K. The pages that several requests share get the sum.

A key that a row does not see has P = dS = 0. A product with 0 must not make NaN of a value that is
not finite. Such values of q, K and dO therefore count as 0 in the products with P and dS. The rows
that they belong to, or that see them, have NaN in P or dS.

Both ways of rescaling have the same derivative, and split plans do not change it. An int8 cache is
a constant: its rows count dequantized, and q alone has a derivative.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax.cache.layout import add
from mla_jax.cache.reads import places
from mla_jax.derivatives import differentiable, without_derivative
from mla_jax.implementations.blockwise_scan import attend_xla
from mla_jax.implementations.choice import Choice, compute, specs_of_outputs
from mla_jax.implementations.scores import finite_or_zero, product, scores_of
from mla_jax.online_softmax import common_dtype
from mla_jax.problem import AttentionProblem
from mla_jax.ragged.queries import like, whole
from mla_jax.sharding.axes import dims_of, on_auto_axes, spec_of_dims, vary_like

BLOCK_TOKENS = 256  # keys per block; a block has at least one page
BLOCK_ROWS = 1024  # query rows per block and request, where that is a token or more
Outputs = tuple[jax.Array, jax.Array]


class Gradients(NamedTuple):
    """Gradients of the float arrays of a problem."""

    q: jax.Array  # [B, S, H, D]
    pages: jax.Array | None  # like `cache.pages`; None: not asked for


class _Rows(NamedTuple):
    """A block of R query rows per request, and what is known of them; heads lie within tokens."""

    start: jax.Array  # [] int32, the first token
    fresh: jax.Array  # [tokens] bool, whether no earlier block has the token
    q: jax.Array  # [B, R, D]
    visible: jax.Array  # [B, R] int32, the keys that a row sees; 0 where not fresh
    shift: jax.Array  # [B, R] float32: lse, 0 where it is -inf
    d_o: jax.Array  # [B, R, kv_lora_rank], 0 where it is not finite
    delta: jax.Array  # [B, R] float32: rowsum(dO * O) - dlse


@jax.named_scope("mla_attention")
def attend(problem: AttentionProblem, choice: Choice) -> Outputs:
    """Computes o and lse as `compute` does, with derivatives for every implementation."""
    # With one type for all arrays in a shard_map, JAX sums the gradient of an array that is equal
    # on several devices.
    problem = vary_like(problem, problem)
    if choice.names[0] == "reference":
        return compute(problem, choice)  # plain JAX, with derivatives of every order
    problem = dataclasses.replace(problem, cache=constant_int8(problem.cache))
    run = functools.partial(compute, choice=choice)
    return differentiable(run, twin=_twin, gradients=_gradients)(problem)


def constant_int8(cache: Any) -> Any:
    """Returns the cache; where it is int8, its other arrays refuse to be differentiated."""
    if cache.scales is None:
        return cache
    refusing = without_derivative(
        lambda *arrays: arrays,
        "the attention has no derivative with respect to an int8 cache: use a cache of float32, "
        "bfloat16 or float16, or apply jax.lax.stop_gradient to the cache",
    )
    rope_pages, scales = refusing(cache.rope_pages, cache.scales)
    return dataclasses.replace(cache, rope_pages=rope_pages, scales=scales)


@on_auto_axes(specs_of_outputs)
def _twin(problem: AttentionProblem) -> Outputs:
    return attend_xla(dataclasses.replace(problem.mark_invalid(), rescale="multiply"))


def _gradients(
    wanted: AttentionProblem, problem: AttentionProblem, out: Outputs, cotangents: Outputs
) -> AttentionProblem:
    pages = problem.cache.pages if wanted.cache.pages else None
    in_one = dataclasses.replace(problem, q=whole(problem.q))
    found = paged_gradients(in_one, pages, *out, *cotangents)
    cache = dataclasses.replace(problem.cache, pages=found.pages)
    return dataclasses.replace(problem, q=like(problem.q, found.q), cache=cache)


def _specs_of_gradients(problem: AttentionProblem, pages: jax.Array | None, *_: jax.Array) -> Any:
    return jax.tree.map(lambda x: spec_of_dims(*dims_of(x)), Gradients(whole(problem.q), pages))


@on_auto_axes(_specs_of_gradients)
@jax.jit
def paged_gradients(
    problem: AttentionProblem,
    pages: jax.Array | None,
    o: jax.Array,
    lse: jax.Array,
    d_o: jax.Array,
    d_lse: jax.Array,
) -> Gradients:
    """Returns the gradients in the dtypes of q and the pages; 0 for invalid requests.

    Args:
        problem: the call, with q in one array.
        pages: those of the cache; None: only the gradient of q is asked for.
        o, lse: its results.
        d_o: cotangent of o, [B, S, H, kv_lora_rank].
        d_lse: cotangent of lse, [B, S, H] float32.
    """
    problem = problem.mark_invalid()
    cache = problem.cache
    batch, tokens, heads, _ = problem.q.shape
    size = min(tokens, max(1, BLOCK_ROWS // heads))  # tokens per block of rows
    page_size, max_pages = cache.page_size, problem.block_tables.shape[1]
    block = min(max(1, BLOCK_TOKENS // page_size), max_pages) * page_size
    requests = jnp.arange(batch, dtype=jnp.int32)

    def of_rows(i: jax.Array, sums: Gradients) -> Gradients:
        rows = _rows(problem, size, i, o, lse, d_o, d_lse)

        def of_keys(j: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            d_q, d_pages = carry
            positions = j * np.int32(block) + jnp.arange(block, dtype=jnp.int32)[None]
            kv = cache.rows(problem.block_tables, positions)  # [B, block, D]
            more, d_kv = _of_block(problem, rows, kv, positions)
            if d_pages is not None:
                where = places(cache, problem.block_tables, positions, requests)
                d_pages = add(d_pages, *where, d_kv)
            return d_q + more, d_pages

        d_q = jnp.zeros(rows.q.shape, jnp.float32)
        carry = vary_like((d_q, sums.pages), problem, d_o, d_lse)
        blocks = -(-jnp.max(rows.visible) // np.int32(block))
        d_q, d_pages = lax.fori_loop(np.int32(0), blocks, of_keys, carry)
        d_q = d_q.reshape(batch, size, heads, -1).astype(problem.q.dtype)
        before = _take(sums.q, rows.start, size)
        d_q = jnp.where(rows.fresh[:, None, None], d_q, before)
        return Gradients(lax.dynamic_update_slice_in_dim(sums.q, d_q, rows.start, 1), d_pages)

    d_pages = None if pages is None else jnp.zeros(pages.shape, jnp.float32)
    sums = vary_like(Gradients(jnp.zeros_like(problem.q), d_pages), problem, d_o, d_lse)
    blocks = np.int32(0), np.int32(-(-tokens // size))
    sums = lax.fori_loop(*blocks, of_rows, sums)
    return sums if pages is None else sums._replace(pages=sums.pages.astype(pages.dtype))


def _rows(
    problem: AttentionProblem,
    size: int,
    index: jax.Array,
    o: jax.Array,
    lse: jax.Array,
    d_o: jax.Array,
    d_lse: jax.Array,
) -> _Rows:
    """Returns block `index` of `size` tokens; the last begins early enough to have that size."""
    batch, tokens, heads, _ = problem.q.shape
    start = jnp.minimum(index * np.int32(size), np.int32(tokens - size))
    fresh = start + jnp.arange(size, dtype=jnp.int32) >= index * np.int32(size)
    visible = _take(problem.visible_keys().reshape(batch, tokens, heads), start, size)
    visible = jnp.where(fresh[:, None], visible, np.int32(0))
    q, o, d_o = (
        _take(x, start, size).reshape(batch, size * heads, -1) for x in (whole(problem.q), o, d_o)
    )
    visible, lse, d_lse = (
        x.reshape(batch, size * heads)
        for x in (visible, _take(lse, start, size), _take(d_lse, start, size))
    )
    delta = (d_o.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1) - d_lse
    bad = ~(jnp.isfinite(delta) & jnp.isfinite(q).all(-1) & jnp.isfinite(d_o).all(-1))
    # NaN in `shift` makes all of P and dS that the row sees NaN.
    shift = jnp.where(bad, jnp.nan, jnp.where(lse == -jnp.inf, 0.0, lse))
    return _Rows(start, fresh, q, visible, shift, finite_or_zero(d_o), delta)


def _of_block(
    problem: AttentionProblem, rows: _Rows, kv: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns what keys kv [B, T, D] add to dQ [B, R, D], and their dK [B, T, D], float32.

    Keys that no row sees may hold anything.
    """
    scale, rank = problem.softmax_scale, problem.cache.kv_lora_rank
    seen = positions[:, None] < rows.visible[..., None]
    p = jnp.where(seen, jnp.exp(scores_of(rows.q, kv, scale) - rows.shift[..., None]), 0.0)
    dtype = jnp.bfloat16 if common_dtype(rows.q, kv) == jnp.bfloat16 else jnp.float32
    d_p = product("brv,btv->brt", rows.d_o, kv[..., :rank], dtype)
    d_s = jnp.where(seen, p * (d_p - rows.delta[..., None]) * scale, 0.0)
    d_q = product("brt,btd->brd", d_s, finite_or_zero(kv), dtype)
    d_k = product("brt,brd->btd", d_s, finite_or_zero(rows.q), dtype)
    d_v = product("brt,brv->btv", p, rows.d_o, dtype)
    return d_q, d_k.at[..., :rank].add(d_v)


def _take(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns tokens start .. start + size - 1 of [B, S, ...]."""
    return lax.dynamic_slice_in_dim(array, start, size, axis=1)
