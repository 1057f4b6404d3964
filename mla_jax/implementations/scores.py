"""Scores of a KV block and its step of the online softmax, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.online_softmax import SoftmaxState, accumulate, common_dtype, mark_nonfinite
from mla_jax.problem import AttentionProblem


def scores_of(q: jax.Array, kv: jax.Array, softmax_scale: float) -> jax.Array:
    """Returns q [N, R, D] times kv [N, T, D], scaled: [N, R, T] float32."""
    dtype = common_dtype(q, kv)
    scores = jnp.einsum(
        "nrd,ntd->nrt",
        q.astype(dtype),
        kv.astype(dtype),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return scores * softmax_scale


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
    """Applies `mark_nonfinite` to o [B, R, kv_lora_rank] for the keys that `_has_drafts` names."""
    if not _has_drafts(problem):
        return o
    cache, seq_lens = problem.cache, problem.seq_lens[:, None]
    drafts = problem.q.shape[1] - 1
    positions = seq_lens - drafts + jnp.arange(drafts, dtype=jnp.int32)
    values = cache.rows(problem.block_tables, positions)[..., : cache.kv_lora_rank]
    values = jnp.where((positions >= 0)[..., None], values, 0)
    seen = positions[:, None] < problem.visible_keys()[..., None]
    return mark_nonfinite(o, lse, seen, values)
