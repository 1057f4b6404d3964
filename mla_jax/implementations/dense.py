"""The implementation `reference`: gathers all keys of a request and computes one softmax."""

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.implementations.scores import scores_of
from mla_jax.online_softmax import mark_nonfinite
from mla_jax.problem import AttentionProblem


@jax.jit
def attend_reference(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
    """Computes attention by its definition: all keys at once, one softmax, float32 throughout.

    Returns o [B, S, H, kv_lora_rank] of q's dtype and lse [B, S, H] float32. It ignores `rescale`,
    because a single softmax has nothing to rescale.
    """
    cache = problem.cache
    capacity = problem.block_tables.shape[1] * cache.page_size
    kv = cache.gather(problem.block_tables, max_len=capacity, seq_lens=problem.seq_lens)
    kv = kv.astype(jnp.float32)
    positions = jnp.arange(capacity, dtype=jnp.int32)
    visible = problem.visible_keys()[..., None]
    seen = positions < visible
    # Padding is 0 as a query and in o, so that no NaN of it is a factor in a gradient.
    q = jnp.where(visible > 0, problem.query_rows(), 0)
    scores = scores_of(q, kv, problem.softmax_scale)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = lax.stop_gradient(scores.max(-1, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    values = kv[..., : cache.kv_lora_rank]
    finite = jnp.where(jnp.isfinite(values), values, 0)
    o = jnp.matmul(weights / total, finite, precision=lax.Precision.HIGHEST)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    o = jnp.where(empty, 0.0, mark_nonfinite(o, lse, seen, values))
    return problem.outputs(o, lse)
