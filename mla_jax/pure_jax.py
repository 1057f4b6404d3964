"""The implementations of the op in plain JAX, for any backend: `reference`, `xla`, `split_kv`."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.online_softmax import (
    SoftmaxState,
    accumulate,
    common_dtype,
    finalize,
    init_state,
    mark_nonfinite,
)
from mla_jax.problem import AttentionProblem
from mla_jax.split_kv import SplitPlan, covered_requests, merge_partials, plan_splits

BLOCK_TOKENS = 256  # that `xla` reads at a time, at least a page
SPLIT_WORKERS = 16  # that `split_kv` plans for if it is given no plan
SPLIT_ROWS = 64
SPLIT_BLOCK = 64


@jax.jit
def attend_reference(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
    """The definition: gathers all keys, one softmax, float32 throughout. Has nothing to rescale."""
    cache = problem.cache
    capacity = problem.block_tables.shape[1] * cache.page_size
    kv = cache.gather(problem.block_tables, max_len=capacity, seq_lens=problem.seq_lens)
    kv = kv.astype(jnp.float32)
    positions = jnp.arange(capacity, dtype=jnp.int32)
    seen = positions < problem.visible_keys()[..., None]
    scores = _scores(problem.query_rows(), kv, problem.softmax_scale)
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
    return problem.outputs(mark_nonfinite(o, lse, seen, values), lse)


@jax.jit
def attend_xla(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
    """Online softmax over KV blocks, as many as the longest request has: memory of one block."""
    cache, seq_lens = problem.cache, problem.seq_lens
    q, visible = problem.query_rows(), problem.visible_keys()
    pages = max(1, BLOCK_TOKENS // cache.page_size)
    block = min(pages, problem.block_tables.shape[1]) * cache.page_size

    def step(i: jax.Array, state: SoftmaxState) -> SoftmaxState:
        positions = i * block + jnp.arange(block, dtype=jnp.int32)[None]
        kv = cache.rows(problem.block_tables, positions)  # [B, block, D]
        return _attend_block(problem, state, q, kv, positions, seq_lens, visible)

    state = init_state(q.shape[:2], cache.kv_lora_rank)
    state = lax.fori_loop(0, -(-seq_lens.max() // block), step, state)
    o, lse = finalize(state)
    return problem.outputs(_mark_drafts(problem, o, lse), lse)


@jax.jit
def attend_split_kv(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
    """Runs a SplitPlan to the letter: all workers step together, each block by block through its
    pieces; partial results wait in their slots in partial_dtype, and are merged at the end.

    The shapes of a step depend on the plan's workers and tiles, not on the batch, so that with
    `plan_fixed` a row's bits don't either. A request that the plan doesn't cover comes out NaN.
    """
    plan = problem.plan
    if plan is None:
        plan = plan_splits(
            problem.seq_lens,
            num_workers=SPLIT_WORKERS,
            rows=problem.num_rows,
            rows_per_tile=min(SPLIT_ROWS, problem.num_rows),
            block_size=SPLIT_BLOCK,
        )
    covered = covered_requests(plan, problem.seq_lens)
    cache, seq_lens = problem.cache, jnp.where(covered, problem.seq_lens, -1)
    q = _row_tiles(problem.query_rows(), plan)  # [T, rows, D]
    visible = _row_tiles(problem.visible_keys(), plan)  # [T, rows]
    rows, width = (plan.num_workers, plan.rows_per_tile), cache.kv_lora_rank
    partial_dtype = jnp.float32 if problem.partial_dtype is None else problem.partial_dtype
    outputs = (
        jnp.zeros((plan.num_tiles, rows[1], width), jnp.float32),
        jnp.full((plan.num_tiles, rows[1]), -jnp.inf, jnp.float32),
        jnp.zeros((max(1, plan.num_slots), rows[1], width), partial_dtype),
        jnp.full((max(1, plan.num_slots), rows[1]), -jnp.inf, jnp.float32),
    )
    offsets = jnp.arange(plan.block_size, dtype=jnp.int32)

    def begin(piece: jax.Array) -> tuple[jax.Array, jax.Array]:
        piece = jnp.minimum(piece, plan.num_pieces - 1)
        return piece, plan.block_start[piece]

    def step(_: jax.Array, carry: tuple) -> tuple:
        piece, block, state, (o, lse, partial_o, partial_lse) = carry
        working = piece < plan.worker_start[1:]
        here, _ = begin(piece)
        request, end = jnp.maximum(plan.request[here], 0), plan.block_end[here]
        tile = plan.tile_of(request, plan.row_tile[here])
        positions = block[:, None] * plan.block_size + offsets
        kv = cache.rows(problem.block_tables, positions, request)
        length = jnp.minimum(seq_lens[request], end * plan.block_size)
        limit = jnp.minimum(visible[tile], length[:, None])
        state = _attend_block(problem, state, q[tile], kv, positions, length, limit)

        done = working & (block + 1 >= end)
        to_slot, to_tile = done & (plan.slot[here] >= 0), done & (plan.slot[here] < 0)
        slot = jnp.where(to_slot, plan.slot[here], partial_o.shape[0])  # past the end: dropped
        tile = jnp.where(to_tile, tile, plan.num_tiles)
        piece_o, piece_lse = finalize(state)
        written = (
            o.at[tile].set(piece_o, mode="drop"),
            lse.at[tile].set(piece_lse, mode="drop"),
            partial_o.at[slot].set(piece_o.astype(partial_o.dtype), mode="drop"),
            partial_lse.at[slot].set(piece_lse, mode="drop"),
        )
        state = jax.tree.map(
            lambda new, old: jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), new, old),
            init_state(rows, width),
            state,
        )
        piece = piece + done.astype(jnp.int32)
        return piece, jnp.where(done, begin(piece)[1], block + 1), state, written

    steps = jnp.maximum(plan.block_end - plan.block_start, 1)
    steps = jnp.append(jnp.zeros(1, jnp.int32), jnp.cumsum(steps, dtype=jnp.int32))[
        plan.worker_start
    ]
    piece = plan.worker_start[:-1]
    carry = (piece, begin(piece)[1], init_state(rows, width), outputs)
    *_, (o, lse, partial_o, partial_lse) = lax.fori_loop(0, jnp.diff(steps).max(), step, carry)
    o, lse = merge_partials(plan, o, partial_o, lse, partial_lse)
    o, lse = _without_tiles(o, problem), _without_tiles(lse, problem)
    problem = dataclasses.replace(problem, seq_lens=seq_lens)
    return problem.outputs(_mark_drafts(problem, o, lse), lse)


def _attend_block(
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
    scores = _scores(q, kv, problem.softmax_scale)
    scores = jnp.where(positions[:, None] < visible[..., None], scores, -jnp.inf)
    values = kv[..., : problem.cache.kv_lora_rank]
    if _has_drafts(problem):
        # What one row sees and another must not is taken as 0; `_mark_drafts` makes up for it.
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


def _mark_drafts(problem: AttentionProblem, o: jax.Array, lse: jax.Array) -> jax.Array:
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


def _scores(q: jax.Array, kv: jax.Array, softmax_scale: float) -> jax.Array:
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


def _row_tiles(rows: jax.Array, plan: SplitPlan) -> jax.Array:
    """[B, R, ...] to tiles [T, rows_per_tile, ...], the last of a request filled up with 0."""
    missing = plan.num_row_tiles * plan.rows_per_tile - rows.shape[1]
    padded = jnp.pad(rows, [(0, 0), (0, missing)] + [(0, 0)] * (rows.ndim - 2))
    tiles = padded.reshape(len(rows), plan.num_row_tiles, plan.rows_per_tile, *rows.shape[2:])
    return tiles.swapaxes(0, 1).reshape(plan.num_tiles, *tiles.shape[2:])


def _without_tiles(tiles: jax.Array, problem: AttentionProblem) -> jax.Array:
    """[T, rows_per_tile, ...] back to [B, R, ...]."""
    batch = problem.q.shape[0]
    rows = tiles.reshape(-1, batch, *tiles.shape[1:]).swapaxes(0, 1)
    return rows.reshape(batch, -1, *tiles.shape[2:])[:, : problem.num_rows]
