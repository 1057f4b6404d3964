"""Scores of a KV block and its step of the online softmax, in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.online_softmax import SoftmaxState, accumulate, common_dtype
from mla_jax.problem import AttentionProblem


def scores_of(q: jax.Array, kv: jax.Array, softmax_scale: float) -> jax.Array:
    """Returns q [N, R, D] times kv [N, T, D], scaled: [N, R, T] float32."""
    return product("nrd,ntd->nrt", q, kv, common_dtype(q, kv)) * softmax_scale


def product(spec: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Returns an einsum of a and b rounded to `dtype`, accumulated in float32."""
    return jnp.einsum(
        spec,
        a.astype(dtype),
        b.astype(dtype),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def finite_or_zero(x: jax.Array) -> jax.Array:
    """Returns x with 0 in the place of NaN and infinity, which 0 times x would be NaN for."""
    return jnp.where(jnp.isfinite(x), x, 0)


def attend_block(
    problem: AttentionProblem,
    state: SoftmaxState,
    q: jax.Array,
    kv: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    visible: jax.Array,
) -> SoftmaxState:
    """Updates the softmax state of N groups of rows with one block of keys each.

    Args:
        problem: gives the softmax scale, the causality and the kind of rescaling.
        state: of rows [N, R].
        q: [N, R, D].
        kv: [N, T, D]; rows at and past `lengths` may hold anything, also NaN.
        positions: [N, T] or [1, T] int32, positions of the keys.
        lengths: [N] int32, tokens per request.
        visible: [N, R] int32, the number of keys that each row sees, at most `lengths`.
    """
    kv = jnp.where((positions < lengths[:, None])[..., None], kv, 0)
    scores = scores_of(q, kv, problem.softmax_scale)
    scores = jnp.where(positions[:, None] < visible[..., None], scores, -jnp.inf)
    values = kv[..., : problem.cache.kv_lora_rank]
    if _has_drafts(problem):
        # A value that is not finite must not reach the rows that do not see its key, and 0 times it
        # would be NaN. It counts as 0 here, and `mark_drafts` marks the rows that do see it.
        first_hidden = jnp.where(visible > 0, visible, lengths[:, None]).min(-1, keepdims=True)
        kept = jnp.isfinite(values) | (positions < first_hidden)[..., None]
        values = jnp.where(kept, values, 0)
    return accumulate(state, scores, values, rescale=problem.rescale)


def _has_drafts(problem: AttentionProblem) -> bool:
    """Returns whether a request has keys that some of its rows see and others must not see.

    These can only be its last S - 1 keys, the tokens that its own queries belong to. Rows that see
    no key at all do not matter, because `finalize` sets them to 0.
    """
    return problem.causal and problem.q.shape[1] > 1


def mark_drafts(problem: AttentionProblem, o: jax.Array, lse: jax.Array) -> jax.Array:
    """Does what `mark_nonfinite` does for the keys that `_has_drafts` names.

    Each row sees the first of these keys up to some number, so that no array of all rows and keys
    is needed.

    Args:
        problem: the call.
        o: [B, R, kv_lora_rank] float32.
        lse: [B, R] float32.
    """
    if not _has_drafts(problem):
        return o
    cache, seq_lens = problem.cache, problem.seq_lens[:, None]
    drafts = problem.q.shape[1] - 1
    first = seq_lens - drafts
    positions = first + jnp.arange(drafts, dtype=jnp.int32)
    values = cache.rows(problem.block_tables, positions)[..., : cache.kv_lora_rank]
    nonfinite = ~jnp.isfinite(values) & (positions >= 0)[..., None]

    def marked() -> jax.Array:
        some = lax.cummax(nonfinite.astype(jnp.int32), axis=1)  # whether up to each key
        heads = problem.q.shape[2]
        last = problem.visible_keys()[:, ::heads] - first - 1  # [B, S], the last key that is seen
        marks = jnp.take_along_axis(some, jnp.maximum(last, 0)[..., None], axis=1)
        marks = jnp.repeat((marks > 0) & (last >= 0)[..., None], heads, axis=1)
        return jnp.where(marks & (lse != -jnp.inf)[..., None], jnp.nan, o)

    return lax.cond(nonfinite.any(), marked, lambda: o)
