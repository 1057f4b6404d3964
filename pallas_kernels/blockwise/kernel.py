"""Paged MLA that executes a hal `Schedule` step by step, in portable Pallas.

On a CPU it runs in Pallas's interpret mode. The dataflow is Ascend's. S, P, the result of P.V
(Otmp) and O are in workspace memory. The matrix stages (QK, PV) and the vector stages (SM, UP, or
AMLA's ADD) exchange data only there, and each stage uses only the slots that the schedule names.
GPU orders run too: they load keys into slots and keep O in two halves.

The result of a stage does not depend on when it is issued, so that every legal schedule of one kind
gives the same bits. Optimization barriers keep the compiler from contracting a product and a sum in
one program and not in another.

One grid cell computes one tile of query rows of one request.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.cache import PagedKVCache
from mla_jax.hal.orders import ASCEND_ORDERS
from mla_jax.hal.schedule import Schedule
from mla_jax.hal.tiling import TilePlan
from mla_jax.online_softmax import (
    common_dtype,
    finalize,
    mark_nonfinite,
    rescale_output,
    weigh,
    weighted_sum,
)
from pallas_kernels.blockwise.launch import (
    Workspace,
    begin_state,
    key_rows,
    launch,
    read_state,
    write_state,
)
from pallas_kernels.blockwise.program import column, run_program


def blockwise_mla(
    q: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    visible: jax.Array,
    *,
    softmax_scale: float,
    order: Callable[[int], Schedule] = ASCEND_ORDERS["chunk4"],
    tiles: TilePlan | None = None,
    compensate: bool = True,
    interpret: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention of query rows over a paged latent cache, in the order of a schedule.

    Args:
        q: [B, R, D] query rows [q_latent | q_rope].
        cache: ND or NZ, any page size, float32, bfloat16 or float16.
        block_tables: [B, max_pages] int32; unused entries may hold anything.
        seq_lens: [B] int32; rows of pages past them may hold anything.
        visible: [B, R] int32: a row sees keys 0 .. visible - 1.
        softmax_scale: factor of the scores.
        order: the schedule for a number of blocks. An order with ADD steps is AMLA.
        tiles: block sizes (block_q rows, block_kv keys); None is what fits an Ascend 910B.
        compensate: whether AMLA corrects for the rounding of the residual.
        interpret: whether Pallas interprets the kernel, as on a CPU.

    Returns:
        o [B, R, kv_lora_rank] and lse [B, R], float32.

    Raises IllegalScheduleError for an order that is not legal.
    """

    def workspace(schedule: Schedule, tile: int, block_kv: int) -> Workspace:
        slots = schedule.buffers
        factor = jnp.int32 if _is_amla(schedule) else jnp.float32
        return {
            "s": ((slots["S"], tile, block_kv), jnp.float32),
            "p": ((slots["P"], tile, block_kv), cache.dtype),
            "factor": ((slots["P"], tile), factor),
            "otmp": ((slots.get("Otmp", 1), tile, cache.kv_lora_rank), jnp.float32),
            "kv": ((slots.get("kv_l", 1), block_kv, cache.latent_dim), cache.dtype),
            "o": ((tile, cache.kv_lora_rank), jnp.float32),
        }

    kernel = functools.partial(
        _kernel, meta=cache, softmax_scale=softmax_scale, compensate=compensate
    )
    o, lse = launch(
        kernel, order, rows=[q], cache=cache, block_tables=block_tables, seq_lens=seq_lens,
        visible=visible, width=cache.kv_lora_rank, tiles=tiles, kv_dtype="bf16",
        workspace=workspace, interpret=interpret,
    )  # fmt: skip
    capacity = block_tables.shape[1] * cache.page_size
    rows = cache.gather(block_tables, max_len=capacity, seq_lens=seq_lens)
    seen = jnp.arange(capacity, dtype=jnp.int32) < visible[..., None]
    return mark_nonfinite(o, lse, seen, rows[..., : cache.kv_lora_rank]), lse


def _is_amla(schedule: Schedule) -> bool:
    return schedule.buffers.get("Otmp") is None and "O" in schedule.buffers


def _kernel(
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
    names: tuple[str, ...],
    meta: PagedKVCache,
    block_kv: int,
    softmax_scale: float,
    compensate: bool,
) -> None:
    """Runs all steps for one tile. `work_ref` is O; the program's rows give slots and blocks."""
    width = meta.kv_lora_rank
    half = width // 2
    left, right, rope = slice(0, half), slice(half, width), slice(width, None)
    rescale = "exponent_add" if factor_ref.dtype == jnp.int32 else "multiply"
    length = length_ref[0]
    get = functools.partial(column, program_ref)
    begin_state(state_refs, work_ref)

    def positions(block: jax.Array) -> jax.Array:
        return block * block_kv + jnp.arange(block_kv, dtype=jnp.int32)

    def keys(i: jax.Array) -> jax.Array:
        rows = key_rows([pages_ref], meta, table_ref, positions(get("block", i)), length)
        return rows["pages"]

    def scores(i: jax.Array, kv: jax.Array) -> None:
        dtype = common_dtype(q_ref, kv)
        products = lax.dot_general(
            q_ref[0].astype(dtype), kv.astype(dtype), (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
        )  # fmt: skip
        s_ref[get("s", i)] = products * softmax_scale

    def load(*parts: slice) -> Callable[[jax.Array], None]:
        def run(i: jax.Array) -> None:
            for columns in parts:
                kv_ref[get("kv", i), :, columns] = keys(i)[:, columns]

        return run

    def softmax(i: jax.Array) -> None:
        hidden = positions(get("block", i)) >= visible_ref[0][:, None]
        seen = jnp.where(hidden, -jnp.inf, s_ref[get("s", i)])
        state = read_state(state_refs, work_ref)
        new, p, factor = weigh(state, seen, p_ref.dtype, rescale=rescale, compensate=compensate)
        write_state(state_refs, new)
        p_ref[get("p", i)] = p
        factor_ref[get("p", i)] = factor

    def product(i: jax.Array, values: jax.Array) -> jax.Array:
        finite = jnp.where(jnp.isfinite(values), values, 0)  # `mark_nonfinite` marks these rows
        return weighted_sum(p_ref[get("p", i)], finite)

    def pv(i: jax.Array) -> None:
        otmp_ref[get("otmp", i)] = product(i, keys(i)[:, :width])

    def accumulate(i: jax.Array) -> None:
        work_ref[...] = work_ref[...] + product(i, keys(i)[:, :width])

    def add(i: jax.Array) -> None:
        work_ref[...] = rescale_output(work_ref[...], factor_ref[get("p", i)])

    def up(i: jax.Array) -> None:
        kept = rescale_output(work_ref[...], factor_ref[get("p", i)])
        work_ref[...] = lax.optimization_barrier(kept) + otmp_ref[get("otmp", i)]

    def pv_half(columns: slice) -> Callable[[jax.Array], None]:
        def run(i: jax.Array) -> None:
            kept = rescale_output(work_ref[:, columns], factor_ref[get("p", i)])
            added = product(i, kv_ref[get("kv", i), :, columns])
            work_ref[:, columns] = lax.optimization_barrier(kept) + added

        return run

    ops: dict[str, Callable[[jax.Array], None]] = {
        "LOAD_L": load(left, rope),
        "LOAD_R": load(right),
        "QK": lambda i: scores(i, keys(i)),
        "QK_LOADED": lambda i: scores(i, kv_ref[get("kv", i)]),
        "SM": softmax,
        "PV": pv,
        "ACCUMULATE": accumulate,
        "ADD": add,
        "UP": up,
        "PV_L": pv_half(left),
        "PV_R": pv_half(right),
    }
    run_program(program_ref, names, ops, lambda block: block * block_kv < jnp.maximum(length, 1))
    o_ref[0], lse_ref[0] = finalize(read_state(state_refs, work_ref))
