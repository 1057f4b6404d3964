"""The implementation `xla`: online softmax over blocks of keys, on any backend."""

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.implementations.scores import attend_block, mark_drafts
from mla_jax.online_softmax import SoftmaxState, finalize, init_state
from mla_jax.problem import AttentionProblem
from mla_jax.sharding.axes import vary_like

BLOCK_TOKENS = 256  # tokens per KV block; a block has at least one page


@jax.jit
def attend_xla(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
    """Computes online softmax over KV blocks, one block in memory at a time.

    Returns o [B, S, H, kv_lora_rank] of q's dtype and lse [B, S, H] float32. The loop has as many
    steps as the longest request has blocks.
    """
    cache, seq_lens = problem.cache, problem.seq_lens
    q, visible = problem.query_rows(), problem.visible_keys()
    pages = max(1, BLOCK_TOKENS // cache.page_size)
    block = min(pages, problem.block_tables.shape[1]) * cache.page_size

    def step(i: jax.Array, state: SoftmaxState) -> SoftmaxState:
        positions = i * block + jnp.arange(block, dtype=jnp.int32)[None]
        kv = cache.rows(problem.block_tables, positions)  # [B, block, D]
        return attend_block(problem, state, q, kv, positions, seq_lens, visible)

    state = init_state(q.shape[:2], cache.kv_lora_rank)
    state = vary_like(state, q, cache, problem.block_tables, visible)
    state = lax.fori_loop(0, -(-seq_lens.max() // block), step, state)
    o, lse = finalize(state)
    return problem.outputs(mark_drafts(problem, o, lse), lse)
