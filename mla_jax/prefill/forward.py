"""The implementation `xla` of `ragged_mla_attention`: online softmax by blocks, on any backend."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax.online_softmax import SoftmaxState, finalize, init_state, update
from mla_jax.prefill.blocks import (
    block_scores,
    heads_first,
    key_block,
    key_blocks,
    num_query_blocks,
    put,
    query_block,
    seen_keys,
)
from mla_jax.ragged.problem import RaggedProblem
from mla_jax.sharding.axes import vary_like

Outputs = tuple[jax.Array, jax.Array]


@jax.jit
def attend_ragged_xla(problem: RaggedProblem) -> Outputs:
    """Computes online softmax for one block of queries after the other, one key block at a time.

    Returns o [Tq, H, v_dim] of q's dtype and lse [Tq, H] float32. Beside them it needs memory for
    one block of scores. Rows that see no key have o = 0 and lse = -inf, and rows of invalid
    requests are NaN.
    """
    ranges = problem.key_ranges()
    heads, width = problem.v.shape[1:]

    def attend_queries(i: jax.Array, outputs: Outputs) -> Outputs:
        queries = query_block(problem, ranges, i)

        def attend_keys(j: jax.Array, state: SoftmaxState) -> SoftmaxState:
            keys = key_block(problem, j)
            scores = block_scores(queries, keys, problem.softmax_scale)
            scores = jnp.where(seen_keys(queries, keys), scores, -jnp.inf)
            return update(state, scores, keys.v)

        state = vary_like(init_state((heads, len(queries.first)), width), problem)
        state = lax.fori_loop(*key_blocks(queries), attend_keys, state)
        o, lse = map(heads_first, finalize(state))
        start, fresh = queries.start, queries.fresh
        return put(outputs[0], start, o, fresh), put(outputs[1], start, lse, fresh)

    rows = problem.num_queries, heads
    outputs = jnp.zeros((*rows, width), problem.q.dtype), jnp.zeros(rows, jnp.float32)
    outputs = vary_like(outputs, problem)
    blocks = np.int32(0), np.int32(num_query_blocks(problem))
    o, lse = lax.fori_loop(*blocks, attend_queries, outputs)
    invalid = ranges.invalid[:, None]
    return jnp.where(invalid[..., None], jnp.nan, o), jnp.where(invalid, jnp.nan, lse)
