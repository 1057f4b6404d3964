"""Scores of a block of keys and their step of the online softmax, for plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.online_softmax import SoftmaxState, accumulate, common_dtype, mark_nonfinite
from mla_jax.problem import AttentionProblem


def scores_of(q: jax.Array, kv: jax.Array, softmax_scale: float) -> jax.Array:
    """q [N, R, D] . kv [N, T, D] * scale: [N, R, T] float32."""
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
    """Takes one block of keys into the recurrence.

    Args:
        q: [N, R, D].
        kv: [N, T, D]; at and past `lengths` anything, NaN too.
        positions: [N, T] or [1, T] of the keys.
        lengths: [N].
        visible: [N, R], the keys that each row sees; at most lengths.
    """
    kv = jnp.where((positions < lengths[:, None])[..., None], kv, 0)
    scores = scores_of(q, kv, problem.softmax_scale)
    scores = jnp.where(positions[:, None] < visible[..., None], scores, -jnp.inf)
    values = kv[..., : problem.cache.kv_lora_rank]
    if _has_drafts(problem):
        # What one row sees and another must not is taken as 0; `mark_drafts` makes up for it.
        first_hidden = jnp.where(visible > 0, visible, lengths[:, None]).min(-1, keepdims=True)
        kept = jnp.isfinite(values) | (positions < first_hidden)[..., None]
        values = jnp.where(kept, values, 0)
    return accumulate(state, scores, values, rescale=problem.rescale)


def _has_drafts(problem: AttentionProblem) -> bool:
    """Whether there are keys that some rows of a request see and others must not.

    Only the last S - 1 keys of a request can be such: the tokens that its own queries come from.
    Rows that see no key at all do not count: `finalize` makes them 0 whatever was summed up.
    """
    return problem.causal and problem.q.shape[1] > 1


def mark_drafts(problem: AttentionProblem, o: jax.Array, lse: jax.Array) -> jax.Array:
    """o [B, R, kv_lora_rank] with `mark_nonfinite` over the keys that `_has_drafts` speaks of."""
    if not _has_drafts(problem):
        return o
    cache, seq_lens = problem.cache, problem.seq_lens[:, None]
    drafts = problem.q.shape[1] - 1
    positions = seq_lens - drafts + jnp.arange(drafts, dtype=jnp.int32)
    values = cache.rows(problem.block_tables, positions)[..., : cache.kv_lora_rank]
    values = jnp.where((positions >= 0)[..., None], values, 0)
    seen = positions[:, None] < problem.visible_keys()[..., None]
    return mark_nonfinite(o, lse, seen, values)
