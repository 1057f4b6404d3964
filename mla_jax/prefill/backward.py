"""The derivatives of `ragged_mla_attention` in pure JAX, for every implementation.

The probabilities of a block are computed again from lse, as in FlashAttention (arXiv 2205.14135),
so that memory is linear in the number of tokens. With P = e^(scores - lse) and the cotangents dO of
o and dlse of lse:

    dV = P^T dO        dP = dO V^T        dS = P * (dP - rowsum(dO * O) + dlse) * softmax_scale
                                          dQ = dS K        dK = dS^T Q

A key that a query does not see has P = dS = 0. A product with 0 must not make NaN of a value that
is not finite. Such values of q, K and dO therefore count as 0 in the products with P and dS. The
rows that they belong to, or that see them, have NaN in P or dS.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax.derivatives import differentiable
from mla_jax.implementations.choice import Choice, compute, specs_of_outputs
from mla_jax.implementations.scores import finite_or_zero, product
from mla_jax.prefill.blocks import (
    KeyBlock,
    QueryBlock,
    block_scores,
    heads_first,
    key_block,
    key_blocks,
    num_query_blocks,
    put,
    query_block,
    seen_keys,
    take,
)
from mla_jax.prefill.forward import Outputs, attend_ragged_xla
from mla_jax.ragged.problem import RaggedProblem
from mla_jax.sharding.axes import dims_of, on_auto_axes, spec_of_dims, vary_like


class Gradients(NamedTuple):
    """Gradients of the float arrays of a problem."""

    q: jax.Array  # [Tq, H, nope + rope]
    k_nope: jax.Array  # [Tk, H, nope]
    k_rope: jax.Array  # [Tk, rope]
    v: jax.Array  # [Tk, H, v_dim]


class _Rows(NamedTuple):
    """What the forward pass and the cotangents say about a block of R queries."""

    shift: jax.Array  # [H, R] float32: lse, 0 where it is -inf
    d_o: jax.Array  # [H, R, v_dim], 0 where it is not finite
    delta: jax.Array  # [H, R] float32: rowsum(dO * O) - dlse


def attend_ragged(problem: RaggedProblem, choice: Choice) -> Outputs:
    """Computes o and lse as `compute` does, with derivatives for every implementation."""
    # With one type for all arrays in a shard_map, JAX sums the gradient of an array that is equal
    # on several devices.
    problem = vary_like(problem, problem)
    run = functools.partial(compute, choice=choice)
    return differentiable(run, twin=_twin, gradients=_gradients)(problem)


@on_auto_axes(specs_of_outputs)
def _twin(problem: RaggedProblem) -> Outputs:
    return attend_ragged_xla(problem)


def _gradients(_: Any, problem: RaggedProblem, out: Outputs, cotangents: Outputs) -> RaggedProblem:
    found = ragged_gradients(problem, *out, *cotangents)
    return dataclasses.replace(problem, **found._asdict())


def _specs_of_gradients(problem: RaggedProblem, *_: jax.Array) -> Any:
    arrays = Gradients(problem.q, problem.k_nope, problem.k_rope, problem.v)
    return jax.tree.map(lambda array: spec_of_dims(*dims_of(array)), arrays)


@on_auto_axes(_specs_of_gradients)
@jax.jit
def ragged_gradients(
    problem: RaggedProblem, o: jax.Array, lse: jax.Array, d_o: jax.Array, d_lse: jax.Array
) -> Gradients:
    """Returns the gradients in the dtypes of the arguments; 0 for rows of invalid requests.

    Args:
        problem: the call.
        o, lse: its results.
        d_o: cotangent of o, [Tq, H, v_dim].
        d_lse: cotangent of lse, [Tq, H] float32.
    """
    ranges = problem.key_ranges()

    def of_queries(i: jax.Array, sums: Gradients) -> Gradients:
        queries = query_block(problem, ranges, i)
        rows = _rows(queries, o, lse, d_o, d_lse)
        # Only finite values may be multiplied with the zeros of P and dS.
        finite = queries._replace(q=finite_or_zero(queries.q))

        def of_keys(j: jax.Array, carry: tuple[jax.Array, Gradients]) -> tuple:
            d_q, sums = carry
            keys = key_block(problem, j)
            block = _of_block(problem, queries, finite, keys, rows)
            sums = sums._replace(
                k_nope=_add(sums.k_nope, keys.start, heads_first(block.k_nope)),
                k_rope=_add(sums.k_rope, keys.start, block.k_rope),
                v=_add(sums.v, keys.start, heads_first(block.v)),
            )
            return d_q + block.q, sums

        d_q = vary_like(jnp.zeros(queries.q.shape, jnp.float32), problem)
        d_q, sums = lax.fori_loop(*key_blocks(queries), of_keys, (d_q, sums))
        return sums._replace(q=put(sums.q, queries.start, heads_first(d_q), queries.fresh))

    # Only a key has contributions from several blocks, which are summed in float32.
    sums = Gradients(
        jnp.zeros_like(problem.q),
        *(jnp.zeros(x.shape, jnp.float32) for x in (problem.k_nope, problem.k_rope, problem.v)),
    )
    blocks = np.int32(0), np.int32(num_query_blocks(problem))
    sums = lax.fori_loop(*blocks, of_queries, vary_like(sums, problem, d_o, d_lse))
    return Gradients(*(x.astype(problem.q.dtype) for x in sums))


def _rows(
    queries: QueryBlock, o: jax.Array, lse: jax.Array, d_o: jax.Array, d_lse: jax.Array
) -> _Rows:
    o, lse, d_o, d_lse = (
        heads_first(take(x, queries.start, len(queries.first))) for x in (o, lse, d_o, d_lse)
    )
    delta = (d_o.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1) - d_lse
    bad = ~(jnp.isfinite(delta) & jnp.isfinite(queries.q).all(-1) & jnp.isfinite(d_o).all(-1))
    # NaN in `shift` makes all of P and dS that the row sees NaN.
    shift = jnp.where(bad, jnp.nan, jnp.where(lse == -jnp.inf, 0.0, lse))
    return _Rows(shift, finite_or_zero(d_o), delta)


def _of_block(
    problem: RaggedProblem, queries: QueryBlock, finite: QueryBlock, keys: KeyBlock, rows: _Rows
) -> Gradients:
    """Returns what one block adds to the gradients, float32, heads first."""
    scale = problem.softmax_scale
    seen = seen_keys(queries, keys)
    scores = block_scores(queries, keys, scale)
    p = jnp.where(seen, jnp.exp(scores - rows.shift[..., None]), 0.0)
    dtype = jnp.bfloat16 if problem.q.dtype == jnp.bfloat16 else jnp.float32
    d_p = product("hrv,htv->hrt", rows.d_o, keys.v, dtype)
    d_s = jnp.where(seen, p * (d_p - rows.delta[..., None]) * scale, 0.0)
    nope = keys.k_nope.shape[-1]
    d_q = jnp.concatenate(
        [
            product("hrt,htn->hrn", d_s, finite_or_zero(keys.k_nope), dtype),
            product("hrt,tn->hrn", d_s, finite_or_zero(keys.k_rope), dtype),
        ],
        axis=-1,
    )
    return Gradients(
        q=d_q,
        k_nope=product("hrt,hrn->htn", d_s, finite.q[..., :nope], dtype),
        k_rope=product("hrt,hrn->tn", d_s, finite.q[..., nope:], dtype),
        v=product("hrt,hrv->htv", p, rows.d_o, dtype),
    )


def _add(array: jax.Array, start: jax.Array, rows: jax.Array) -> jax.Array:
    rows = rows + take(array, start, len(rows))
    return lax.dynamic_update_slice_in_dim(array, rows, start, 0)
