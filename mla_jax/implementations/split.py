"""The implementation `split_kv`: runs a split plan in plain JAX, in the order of the kernels."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.implementations.scores import attend_block, mark_drafts
from mla_jax.online_softmax import finalize, init_state
from mla_jax.problem import AttentionProblem
from mla_jax.sharding.axes import vary_like
from mla_jax.splits.plan import SplitPlan, covered_requests
from mla_jax.splits.planner import merge_partials, plan_splits
from mla_jax.splits.tile_keys import query_lens_of_plan

WORKERS = 16  # workers of the plan that is made if none is given
ROWS = 64  # query rows per tile, at most
BLOCK_TOKENS = 64  # tokens per KV block


def plan_split_kv(
    seq_lens: jax.Array, rows: int, query_lens: jax.Array | None, num_heads: int
) -> SplitPlan:
    """Returns the plan that `split_kv` makes for itself, for so many query rows per request.

    query_lens: as in `plan_splits`.
    """
    return plan_splits(
        seq_lens,
        num_workers=WORKERS,
        rows=rows,
        rows_per_tile=min(ROWS, rows),
        block_size=BLOCK_TOKENS,
        query_lens=query_lens,
        num_heads=num_heads,
    )


@jax.jit
def attend_split_kv(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
    """Runs a split plan: all workers step together, block by block through their work items.

    Partials are stored in `partial_dtype` and merged at the end. The shapes of a step depend on the
    plan's workers and tiles, not on the batch, so that with `plan_fixed` a row has the same bits in
    any batch. The rows of a request that the plan does not cover are NaN.

    Returns o [B, S, H, kv_lora_rank] of q's dtype and lse [B, S, H] float32.
    """
    plan = problem.plan.split if problem.plan else _plan_of(problem)
    covered = covered_requests(plan, problem.seq_lens, problem.all_query_lens())
    cache, seq_lens = problem.cache, jnp.where(covered, problem.seq_lens, -1)
    q = _row_tiles(problem.query_rows(), plan)  # [T, rows, D]
    visible = _row_tiles(problem.visible_keys(), plan)  # [T, rows]
    rows, width = (plan.num_workers, plan.rows_per_tile), cache.kv_lora_rank
    partial_dtype = jnp.float32 if problem.partial_dtype is None else problem.partial_dtype
    outputs = (
        jnp.zeros((plan.num_tiles, rows[1], width), jnp.float32),
        jnp.full((plan.num_tiles, rows[1]), -jnp.inf, jnp.float32),
        jnp.zeros((max(1, plan.num_partials), rows[1], width), partial_dtype),
        jnp.full((max(1, plan.num_partials), rows[1]), -jnp.inf, jnp.float32),
    )
    offsets = jnp.arange(plan.block_size, dtype=jnp.int32)

    def begin(item: jax.Array) -> tuple[jax.Array, jax.Array]:
        item = jnp.minimum(item, plan.num_items - 1)
        return item, plan.block_start[item]

    def step(_: jax.Array, carry: tuple) -> tuple:
        item, block, state, (o, lse, partial_o, partial_lse) = carry
        working = item < plan.worker_start[1:]
        here, _ = begin(item)
        request, end = jnp.maximum(plan.request[here], 0), plan.block_end[here]
        tile = plan.tile_of(request, plan.row_tile[here])
        positions = block[:, None] * plan.block_size + offsets
        kv = cache.rows(problem.block_tables, positions, request)
        length = jnp.minimum(seq_lens[request], end * plan.block_size)
        limit = jnp.minimum(visible[tile], length[:, None])
        state = attend_block(problem, state, q[tile], kv, positions, length, limit)

        done = working & (block + 1 >= end)
        to_partial, to_tile = done & (plan.partial[here] >= 0), done & (plan.partial[here] < 0)
        # An index past the end of an array drops the write.
        partial = jnp.where(to_partial, plan.partial[here], partial_o.shape[0])
        tile = jnp.where(to_tile, tile, plan.num_tiles)
        item_o, item_lse = finalize(state)
        written = (
            o.at[tile].set(item_o, mode="drop"),
            lse.at[tile].set(item_lse, mode="drop"),
            partial_o.at[partial].set(item_o.astype(partial_o.dtype), mode="drop"),
            partial_lse.at[partial].set(item_lse, mode="drop"),
        )
        state = jax.tree.map(
            lambda new, old: jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), new, old),
            init_state(rows, width),
            state,
        )
        item = item + done.astype(jnp.int32)
        return item, jnp.where(done, begin(item)[1], block + 1), state, written

    steps = jnp.maximum(plan.block_end - plan.block_start, 1)
    steps = jnp.append(jnp.zeros(1, jnp.int32), jnp.cumsum(steps, dtype=jnp.int32))[
        plan.worker_start
    ]
    item = plan.worker_start[:-1]
    carry = (item, begin(item)[1], init_state(rows, width), outputs)
    carry = vary_like(carry, plan, q, cache, problem.block_tables, visible)
    *_, (o, lse, partial_o, partial_lse) = lax.fori_loop(0, jnp.diff(steps).max(), step, carry)
    o, lse = merge_partials(plan, o, partial_o, lse, partial_lse)
    o, lse = _without_tiles(o, problem), _without_tiles(lse, problem)
    problem = dataclasses.replace(problem, seq_lens=seq_lens)
    return problem.outputs(mark_drafts(problem, o, lse), lse)


def _plan_of(problem: AttentionProblem) -> SplitPlan:
    tokens, heads = problem.q.shape[1:3]
    seq_lens, query_lens = problem.seq_lens, None
    if problem.causal:
        query_lens = query_lens_of_plan(problem.query_lens, seq_lens, tokens, BLOCK_TOKENS)
    return plan_split_kv(seq_lens, problem.num_rows, query_lens, heads)


def _row_tiles(rows: jax.Array, plan: SplitPlan) -> jax.Array:
    """Reshapes [B, R, ...] to tiles [T, rows_per_tile, ...]; zeros fill a request's last tile."""
    missing = plan.num_row_tiles * plan.rows_per_tile - rows.shape[1]
    padded = jnp.pad(rows, [(0, 0), (0, missing)] + [(0, 0)] * (rows.ndim - 2))
    tiles = padded.reshape(len(rows), plan.num_row_tiles, plan.rows_per_tile, *rows.shape[2:])
    return tiles.swapaxes(0, 1).reshape(plan.num_tiles, *tiles.shape[2:])


def _without_tiles(tiles: jax.Array, problem: AttentionProblem) -> jax.Array:
    """Reshapes tiles [T, rows_per_tile, ...] to [B, R, ...], without the zeros at the end."""
    batch = problem.q.shape[0]
    rows = tiles.reshape(-1, batch, *tiles.shape[1:]).swapaxes(0, 1)
    return rows.reshape(batch, -1, *tiles.shape[2:])[:, : problem.num_rows]
