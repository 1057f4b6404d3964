"""Paged MLA that walks a hal `Schedule` step by step, in portable Pallas (interpret mode on a CPU).

The dataflow is Ascend's: S, P, what P.V gives (Otmp) and O stand in workspace, the matrix stages
(QK, PV) and the vector stages (SM, UP, or AMLA's ADD) meet only there, and each stage touches just
the slots that the schedule names. GPU orders run too: they load keys into slots and keep O in two
halves. What a stage computes does not depend on when it is issued, so every legal schedule of one
kind gives the same bits.

One grid cell is one request and one tile of query rows (row r = token r // heads, head r % heads).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mla_jax.cache import PagedKVCache
from mla_jax.hal.orders import ASCEND_ORDERS
from mla_jax.hal.schedule import Schedule
from mla_jax.online_softmax import SoftmaxState, finalize, rescale_output, weigh, weighted_sum
from pallas_kernels.blockwise.program import OPS, compile_schedule

_STATE = ("m", "l", "residual", "lost")


def blockwise_mla(
    q: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    visible: jax.Array,
    *,
    softmax_scale: float,
    order: Callable[[int], Schedule] = ASCEND_ORDERS["chunk4"],
    block_kv: int = 512,
    block_q: int = 256,
    compensate: bool = True,
    interpret: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Attention of query rows over a paged latent cache, in the order of a schedule.

    Args:
        q: [B, R, D] query rows [q_latent | q_rope].
        cache: ND or NZ, any page size; int8 caches go to `blockwise_mla_int8`.
        block_tables: [B, max_pages] int32; unused slots may hold anything.
        seq_lens: [B] int32; pages past them may hold anything.
        visible: [B, R] int32: a row sees keys 0 .. visible - 1.
        order: the schedule for a number of blocks; an order that has ADD steps is AMLA.
        block_kv: keys of a block. block_q: most rows of a tile.

    Returns:
        o [B, R, kv_lora_rank] and lse [B, R], float32.

    Raises IllegalScheduleError for an order that is not legal, ValueError for block sizes below 1.
    """
    if block_kv < 1 or block_q < 1:
        raise ValueError(f"block_kv = {block_kv} and block_q = {block_q}, wanted at least 1")
    capacity = block_tables.shape[1] * cache.page_size
    schedule = order(max(math.ceil(capacity / block_kv), 1))
    program = jnp.asarray(compile_schedule(schedule))
    batch, rows, _ = q.shape
    tile = min(block_q, rows)
    tiles = math.ceil(rows / tile)
    missing = tiles * tile - rows
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0)))
    visible = jnp.pad(jnp.minimum(visible, seq_lens[:, None]), ((0, 0), (0, missing)))
    kernel = functools.partial(
        _walk,
        width=cache.kv_lora_rank,
        block_kv=block_kv,
        softmax_scale=softmax_scale,
        rescale="exponent_add" if "ADD" in {s.stage for s in schedule.steps} else "multiply",
        compensate=compensate,
        cache_meta=cache,
    )
    o, lse, *_ = _call(kernel, schedule, cache, tile, block_kv, (batch, tiles), interpret)(
        program, q, cache.pages, block_tables, seq_lens, visible
    )
    return o[:, :rows], lse[:, :rows]


def _call(
    kernel: Callable[..., None],
    schedule: Schedule,
    cache: PagedKVCache,
    tile: int,
    keys: int,
    grid: tuple[int, int],
    interpret: bool,
) -> Callable[..., Any]:
    """The pallas_call: row tiles of q and visible in, of o and lse out, and the workspace."""
    width, slots = cache.kv_lora_rank, schedule.buffers
    rows = (grid[0], grid[1] * tile)
    workspace: dict[str, tuple[tuple[int, ...], Any]] = {
        "s": ((slots["S"], tile, keys), jnp.float32),
        "p": ((slots["P"], tile, keys), cache.dtype),
        "factor": ((slots["P"], tile), jnp.int32 if _is_amla(schedule) else jnp.float32),
        "otmp": ((slots.get("Otmp", 1), tile, width), jnp.float32),
        "kv": ((slots.get("kv_l", 1), keys, cache.latent_dim), cache.dtype),
        "o_work": ((tile, width), jnp.float32),
    } | {name: ((tile,), jnp.float32) for name in _STATE}

    def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda b, t: (0,) * len(shape))

    def of_rows(*tail: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tile, *tail), lambda b, t: (b, t, *(0,) * len(tail)))

    def call(program: jax.Array, q: jax.Array, pages: jax.Array, *rest: jax.Array) -> Any:
        tables, lengths, visible = rest
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[
                whole(program.shape), of_rows(q.shape[-1]), whole(pages.shape),
                pl.BlockSpec((1, tables.shape[1]), lambda b, t: (b, 0)),
                pl.BlockSpec((1,), lambda b, t: (b,)), of_rows(),
            ],
            out_specs=[of_rows(width), of_rows(), *(whole(s) for s, _ in workspace.values())],
            out_shape=[
                jax.ShapeDtypeStruct((*rows, width), jnp.float32),
                jax.ShapeDtypeStruct(rows, jnp.float32),
                *(jax.ShapeDtypeStruct(s, dtype) for s, dtype in workspace.values()),
            ],
            interpret=interpret,
        )(program, q, pages, tables, lengths, visible)  # fmt: skip

    return call


def _is_amla(schedule: Schedule) -> bool:
    return any(step.stage == "ADD" for step in schedule.steps)


def _walk(
    program_ref: Any,
    q_ref: Any,
    pages_ref: Any,
    table_ref: Any,
    length_ref: Any,
    visible_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    s_ref: Any,
    p_ref: Any,
    factor_ref: Any,
    otmp_ref: Any,
    kv_ref: Any,
    work_ref: Any,
    *state_refs: Any,
    width: int,
    block_kv: int,
    softmax_scale: float,
    rescale: str,
    compensate: bool,
    cache_meta: PagedKVCache,
) -> None:
    """Runs all steps for one tile. Slots and blocks come from the program's rows."""
    half = width // 2
    m_ref, l_ref, residual_ref, lost_ref = state_refs
    rows = q_ref.shape[1]
    m_ref[...] = jnp.full((rows,), -jnp.inf)
    l_ref[...] = jnp.zeros((rows,))
    residual_ref[...] = jnp.ones((rows,))
    lost_ref[...] = jnp.ones((rows,))
    work_ref[...] = jnp.zeros((rows, width))
    length = length_ref[0]

    def positions(block: jax.Array) -> jax.Array:
        return block * block_kv + jnp.arange(block_kv, dtype=jnp.int32)

    def keys(block: jax.Array) -> jax.Array:
        """[block_kv, D] of the cache; 0 past the request's length."""
        where = positions(block)
        cache = PagedKVCache(
            pages_ref[...], cache_meta.kv_lora_rank, cache_meta.rope_dim,
            cache_meta.page_size, cache_meta.layout,
        )  # fmt: skip
        found = cache.rows(table_ref[...], where[None])[0]
        return jnp.where((where < length)[:, None], found, 0)

    def state() -> SoftmaxState:
        return SoftmaxState(m_ref[...], l_ref[...], work_ref[...], residual_ref[...], lost_ref[...])

    def scores(kv: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(q_ref.dtype, kv.dtype)
        return softmax_scale * lax.dot_general(
            q_ref[0].astype(dtype), kv.astype(dtype), (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def column(name: str, index: jax.Array) -> jax.Array:
        return program_ref[index, _COLUMN[name]]

    def nop(_: jax.Array) -> None:
        pass

    def load(columns: slice) -> Callable[[jax.Array], None]:
        def run(i: jax.Array) -> None:
            kv_ref[column("kv", i), :, columns] = keys(column("block", i))[:, columns]

        return run

    def load_left(i: jax.Array) -> None:
        load(slice(0, half))(i)
        load(slice(width, None))(i)

    def qk(i: jax.Array) -> None:
        s_ref[column("s", i)] = scores(keys(column("block", i)))

    def qk_loaded(i: jax.Array) -> None:
        s_ref[column("s", i)] = scores(kv_ref[column("kv", i)])

    def softmax(i: jax.Array) -> None:
        hidden = positions(column("block", i)) >= visible_ref[0][:, None]
        seen = jnp.where(hidden, -jnp.inf, s_ref[column("s", i)])
        new, p, factor = weigh(state(), seen, p_ref.dtype, rescale=rescale, compensate=compensate)
        m_ref[...], l_ref[...] = new.m, new.l
        residual_ref[...], lost_ref[...] = new.residual, new.lost
        p_ref[column("p", i)] = p
        factor_ref[column("p", i)] = factor

    def values(i: jax.Array) -> jax.Array:
        return keys(column("block", i))[:, :width]

    def pv(i: jax.Array) -> None:
        otmp_ref[column("otmp", i)] = weighted_sum(p_ref[column("p", i)], values(i))

    def accumulate(i: jax.Array) -> None:
        work_ref[...] = work_ref[...] + weighted_sum(p_ref[column("p", i)], values(i))

    def add(i: jax.Array) -> None:
        work_ref[...] = rescale_output(work_ref[...], factor_ref[column("p", i)])

    def up(i: jax.Array) -> None:
        kept = rescale_output(work_ref[...], factor_ref[column("p", i)])
        work_ref[...] = kept + otmp_ref[column("otmp", i)]

    def pv_half(columns: slice) -> Callable[[jax.Array], None]:
        def run(i: jax.Array) -> None:
            kept = rescale_output(work_ref[:, columns], factor_ref[column("p", i)])
            kv = kv_ref[column("kv", i), :, columns]
            work_ref[:, columns] = kept + weighted_sum(p_ref[column("p", i)], kv)

        return run

    run_op: dict[str, Callable[[jax.Array], None]] = {
        "LOAD_L": load_left, "LOAD_R": load(slice(half, width)), "QK": qk,
        "QK_LOADED": qk_loaded, "SM": softmax, "PV": pv, "ACCUMULATE": accumulate, "ADD": add,
        "UP": up, "PV_L": pv_half(slice(0, half)), "PV_R": pv_half(slice(half, width)),
    }  # fmt: skip
    branches = [run_op.get(name, nop) for name in OPS]

    def step(i: jax.Array, carry: None) -> None:
        @pl.when(positions(column("block", i))[0] < jnp.maximum(length, 1))
        def _() -> None:
            lax.switch(column("op", i), branches, i)

    lax.fori_loop(0, program_ref.shape[0], step, None)
    o, lse = finalize(state())
    o_ref[0] = o
    lse_ref[0] = lse


_COLUMN = {"op": 0, "block": 1, "kv": 2, "s": 3, "p": 4, "otmp": 5}
