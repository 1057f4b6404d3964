"""The int8 path of Ascend's kernel, walked by the same schedules.

S_nope = int8 q x int8 k -> int32, S_rope -> float32, S = S_nope * descale + S_rope; P is quantised
per row with the row's block maximum, its sum stays unquantised; P.V is int8 x int8 -> int32; UP
brings it to scale. With two signals after QK the nope part is brought to scale (DEQUANT) while the
rope part is still being multiplied.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.cache import PagedKVCache
from mla_jax.hal.orders import ASCEND_ORDERS, AscendOrder
from mla_jax.hal.schedule import Schedule
from mla_jax.hal.tiling import TilePlan
from mla_jax.online_softmax import finalize, weigh
from pallas_kernels.blockwise.launch import (
    Workspace,
    begin_state,
    key_rows,
    launch,
    read_state,
    write_state,
)
from pallas_kernels.blockwise.program import column, run_program

_INT8_MAX = 127.0


def blockwise_mla_int8(
    q_nope: jax.Array,
    q_scale: jax.Array,
    q_rope: jax.Array,
    nope: PagedKVCache,
    rope: PagedKVCache,
    kv_scale: jax.Array | float,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    visible: jax.Array,
    *,
    softmax_scale: float,
    order: AscendOrder = ASCEND_ORDERS["int8-2-signals"],
    tiles: TilePlan | None = None,
    interpret: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Attention over an int8 latent cache with rope parts beside it.

    Args:
        q_nope: [B, R, kv_lora_rank] int8; q_scale: [B, R] float32, what one step of it is worth.
        q_rope: [B, R, rope_dim]. nope: pages of int8 values, rope_dim 0; rope: pages of rope
            values, kv_lora_rank 0 (both ND or NZ, of one page size). kv_scale: one step of nope.
        block_tables, seq_lens, visible, order, tiles: as `blockwise_mla` has them.

    Returns:
        o [B, R, kv_lora_rank] and lse [B, R], float32.

    Raises TypeError where q_nope or nope is not int8, ValueError for an AMLA order (its O is added
    to in memory, which int32 products can't be) and for page sizes that differ.
    """
    for name, dtype in (("q_nope", q_nope.dtype), ("nope", nope.dtype)):
        if dtype != jnp.int8:
            raise TypeError(f"{name} must be int8, got {dtype}")
    if order.rescale != "multiply":
        raise ValueError(f"order {order.name} rescales by {order.rescale}, int8 needs multiply")
    if nope.page_size != rope.page_size:
        raise ValueError(f"rope must have nope's page size {nope.page_size}, got {rope.page_size}")
    width = nope.kv_lora_rank

    def workspace(schedule: Schedule, tile: int, block_kv: int) -> Workspace:
        slots = schedule.buffers
        wide = (tile, block_kv)
        return {
            "s_nope": ((slots["S"], *wide), jnp.int32),
            "s_rope": ((slots.get("S_rope", slots["S"]), *wide), jnp.float32),
            "s": ((slots["S"], *wide), jnp.float32),
            "p": ((slots["P"], *wide), jnp.int8),
            "factor": ((slots["P"], tile), jnp.float32),
            "p_scale": ((slots["P"], tile), jnp.float32),
            "otmp": ((slots["Otmp"], tile, width), jnp.int32),
            "o": ((tile, width), jnp.float32),
        }

    walk = functools.partial(
        _walk, nope=nope, rope=rope, softmax_scale=softmax_scale,
        two_signals=order.signals == 2,
    )  # fmt: skip
    scale = jnp.broadcast_to(jnp.asarray(kv_scale, jnp.float32), q_scale.shape)
    return launch(
        walk, order, rows=[q_nope, q_scale, q_rope, scale], pages=[nope, rope],
        block_tables=block_tables, seq_lens=seq_lens, visible=visible, width=width,
        tiles=tiles, kv_dtype="int8", workspace=workspace, interpret=interpret,
    )  # fmt: skip


def _walk(
    program_ref: Any,
    q_nope_ref: Any,
    q_scale_ref: Any,
    q_rope_ref: Any,
    kv_scale_ref: Any,
    nope_ref: Any,
    rope_ref: Any,
    table_ref: Any,
    length_ref: Any,
    visible_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    s_nope_ref: Any,
    s_rope_ref: Any,
    s_ref: Any,
    p_ref: Any,
    factor_ref: Any,
    p_scale_ref: Any,
    otmp_ref: Any,
    work_ref: Any,
    *state_refs: Any,
    names: tuple[str, ...],
    nope: PagedKVCache,
    rope: PagedKVCache,
    block_kv: int,
    softmax_scale: float,
    two_signals: bool,
) -> None:
    """All steps for one tile; `work_ref` is O."""
    length = length_ref[0]
    kv_scale = kv_scale_ref[0]
    get = functools.partial(column, program_ref)
    begin_state(state_refs, work_ref)

    def positions(block: jax.Array) -> jax.Array:
        return block * block_kv + jnp.arange(block_kv, dtype=jnp.int32)

    def values(i: jax.Array) -> jax.Array:
        return key_rows(nope_ref, nope, table_ref, positions(get("block", i)), length)

    def qk_nope(i: jax.Array) -> None:
        s_nope_ref[get("s", i)] = _times_transposed(q_nope_ref[0], values(i), jnp.int32)

    def qk_rope(i: jax.Array) -> None:
        keys = key_rows(rope_ref, rope, table_ref, positions(get("block", i)), length)
        s_rope_ref[get("s", i)] = _times_transposed(q_rope_ref[0], keys, jnp.float32)

    def qk(i: jax.Array) -> None:
        qk_nope(i)
        qk_rope(i)

    def dequantise(i: jax.Array) -> None:
        slot = get("s", i)
        descale = q_scale_ref[0] * kv_scale
        s_ref[slot] = s_nope_ref[slot].astype(jnp.float32) * descale[:, None]

    def softmax(i: jax.Array) -> None:
        if not two_signals:
            dequantise(i)
        slot = get("s", i)
        hidden = positions(get("block", i)) >= visible_ref[0][:, None]
        scores = (lax.optimization_barrier(s_ref[slot]) + s_rope_ref[slot]) * softmax_scale
        state = read_state(state_refs, work_ref)
        new, p, factor = weigh(state, jnp.where(hidden, -jnp.inf, scores), jnp.float32)
        write_state(state_refs, new)
        largest = p.max(-1)  # e^(row's block maximum - m)
        scale = jnp.where(largest > 0, largest, 1.0) / _INT8_MAX
        p_ref[get("p", i)] = jnp.rint(p / scale[:, None]).astype(jnp.int8)
        p_scale_ref[get("p", i)] = scale
        factor_ref[get("p", i)] = factor

    def pv(i: jax.Array) -> None:
        otmp_ref[get("otmp", i)] = lax.dot_general(
            p_ref[get("p", i)], values(i), (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.int32,
        )  # fmt: skip

    def up(i: jax.Array) -> None:
        slot = get("p", i)
        descale = kv_scale * p_scale_ref[slot]
        came = otmp_ref[get("otmp", i)].astype(jnp.float32) * descale[:, None]
        kept = work_ref[...] * factor_ref[slot][:, None]
        kept, came = lax.optimization_barrier((kept, came))
        work_ref[...] = kept + came

    ops: dict[str, Callable[[jax.Array], None]] = {
        "QK": qk,
        "QK_NOPE": qk_nope,
        "QK_ROPE": qk_rope,
        "DEQUANT": dequantise,
        "SM": softmax,
        "PV": pv,
        "UP": up,
    }
    run_program(program_ref, names, ops, lambda block: block * block_kv < jnp.maximum(length, 1))
    o_ref[0], lse_ref[0] = finalize(read_state(state_refs, work_ref))


def _times_transposed(q: jax.Array, keys: jax.Array, dtype: Any) -> jax.Array:
    """q [R, D] . keys [T, D] -> [R, T], summed in `dtype`."""
    if dtype == jnp.float32:
        q, keys = q.astype(jnp.float32), keys.astype(jnp.float32)
    return lax.dot_general(
        q, keys, (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST, preferred_element_type=dtype,
    )  # fmt: skip
