"""The int8 kernel of Ascend, which executes the same schedules.

The arithmetic is that of `int8_dataflow` with weights in int8. S_nope is int8 q x int8 k -> int32,
S_rope is float32, and P is quantized per row and block. P.V is int8 x int8 -> int32, which UP
multiplies by the scales. With two signals after QK, DEQUANT multiplies the nope part by its scales
while the rope part is still being computed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax import quantize
from mla_jax.cache import PagedKVCache
from mla_jax.hal.orders import ASCEND_ORDERS, AscendOrder
from mla_jax.hal.schedule import Schedule
from mla_jax.hal.tiling import TilePlan
from mla_jax.online_softmax import finalize, rescale_output, weigh
from mla_jax.reference.int8_dataflow import scores_to_scale, weights_in_int8
from pallas_kernels.blockwise.launch import (
    Workspace,
    begin_state,
    key_rows,
    launch,
    read_state,
    write_state,
)
from pallas_kernels.blockwise.program import column, run_program


def blockwise_mla_int8(
    q: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    visible: jax.Array,
    *,
    softmax_scale: float,
    order: AscendOrder = ASCEND_ORDERS["int8-2-signals"],
    tiles: TilePlan | None = None,
    interpret: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over an int8 cache with one scale per token or for the whole cache.

    Args:
        q, block_tables, seq_lens, visible, softmax_scale, order, tiles, interpret: as in
            `blockwise_mla`.
        cache: int8, ND or NZ, any page size.

    Returns:
        o [B, R, kv_lora_rank] and lse [B, R], float32.

    The latent part of q and P are rounded to int8, as on Ascend. That changes o by about one
    percent. A row is NaN if the latent part of its q has NaN or an infinity, or if it sees a key
    whose scale is NaN or infinite.

    Raises ValueError for a cache with other scales or none, and for an AMLA order. AMLA adds P.V to
    O in memory, which int32 products do not allow.
    """
    if cache.scales is None or cache.scale_granularity == "group":
        raise ValueError(
            "cache must be int8 with scale_granularity token or tensor, got "
            f"{cache.dtype} with {cache.scale_granularity}"
        )
    if order.rescale != "multiply":
        raise ValueError(f"order {order.name} rescales by {order.rescale}, int8 needs multiply")
    width = cache.kv_lora_rank
    tokens = (cache.num_pages, cache.page_size)
    # An infinite scale could give a score of -inf, and the key would get weight 0.
    scales = jnp.broadcast_to(_or_nan(jnp.isfinite(cache.scales), cache.scales), tokens)
    cache = dataclasses.replace(cache, scales=scales)
    q_nope, q_rope = jnp.split(q, [width], axis=-1)
    # XLA's maximum on a CPU may ignore NaN, and int8 has none.
    q_scale = _or_nan(jnp.isfinite(q_nope).all(-1), quantize.scales_of(q_nope, "token"))
    # `launch` refuses derivatives by name before the rounding would.
    q_int8 = quantize.quantize(lax.stop_gradient(q_nope), lax.stop_gradient(q_scale))

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

    kernel = functools.partial(
        _kernel, meta=cache, softmax_scale=softmax_scale, two_signals=order.signals == 2
    )
    return launch(
        kernel, order, rows=[q_int8, q_scale, q_rope], cache=cache,
        block_tables=block_tables, seq_lens=seq_lens, visible=visible, width=width,
        tiles=tiles, kv_dtype="int8", workspace=workspace, interpret=interpret,
    )  # fmt: skip


def _or_nan(keep: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(keep, x, jnp.nan)


def _kernel(
    program_ref: Any,
    q_nope_ref: Any,
    q_scale_ref: Any,
    q_rope_ref: Any,
    pages_ref: Any,
    rope_pages_ref: Any,
    scales_ref: Any,
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
    meta: PagedKVCache,
    block_kv: int,
    softmax_scale: float,
    two_signals: bool,
) -> None:
    """Runs all steps for one tile. `work_ref` is O; `names` are the ops of the program."""
    length = length_ref[0]
    get = functools.partial(column, program_ref)
    begin_state(state_refs, work_ref)

    def positions(block: jax.Array) -> jax.Array:
        return block * block_kv + jnp.arange(block_kv, dtype=jnp.int32)

    def keys(i: jax.Array) -> dict[str, jax.Array]:
        refs = (pages_ref, rope_pages_ref, scales_ref)
        return key_rows(refs, meta, table_ref, positions(get("block", i)), length)

    def qk_nope(i: jax.Array) -> None:
        s_nope_ref[get("s", i)] = _times_transposed(q_nope_ref[0], keys(i)["pages"], jnp.int32)

    def qk_rope(i: jax.Array) -> None:
        rope = keys(i)["rope_pages"]
        s_rope_ref[get("s", i)] = _times_transposed(q_rope_ref[0], rope, jnp.float32)

    def qk(i: jax.Array) -> None:
        qk_nope(i)
        qk_rope(i)

    def dequantize(i: jax.Array) -> None:
        slot = get("s", i)
        s_ref[slot] = scores_to_scale(s_nope_ref[slot], q_scale_ref[0], keys(i)["scales"])

    def softmax(i: jax.Array) -> None:
        if not two_signals:
            dequantize(i)
        slot = get("s", i)
        hidden = positions(get("block", i)) >= visible_ref[0][:, None]
        scores = (lax.optimization_barrier(s_ref[slot]) + s_rope_ref[slot]) * softmax_scale
        state = read_state(state_refs, work_ref)
        new, p, factor = weigh(state, jnp.where(hidden, -jnp.inf, scores), jnp.float32)
        write_state(state_refs, new)
        p_ref[get("p", i)], p_scale_ref[get("p", i)] = weights_in_int8(p, keys(i)["scales"])
        factor_ref[get("p", i)] = factor

    def pv(i: jax.Array) -> None:
        otmp_ref[get("otmp", i)] = lax.dot_general(
            p_ref[get("p", i)], keys(i)["pages"], (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.int32,
        )  # fmt: skip

    def up(i: jax.Array) -> None:
        slot = get("p", i)
        added = otmp_ref[get("otmp", i)].astype(jnp.float32) * p_scale_ref[slot][:, None]
        kept = rescale_output(work_ref[...], factor_ref[slot])
        # The barrier keeps the compiler from fusing the product and the sum to one rounding.
        kept, added = lax.optimization_barrier((kept, added))
        work_ref[...] = kept + added

    ops: dict[str, Callable[[jax.Array], None]] = {
        "QK": qk,
        "QK_NOPE": qk_nope,
        "QK_ROPE": qk_rope,
        "DEQUANT": dequantize,
        "SM": softmax,
        "PV": pv,
        "UP": up,
    }
    run_program(program_ref, names, ops, lambda block: block * block_kv < jnp.maximum(length, 1))
    o_ref[0], lse_ref[0] = finalize(read_state(state_refs, work_ref))


def _times_transposed(q: jax.Array, keys: jax.Array, dtype: Any) -> jax.Array:
    """Returns q [R, D] times keys [T, D] transposed, [R, T], summed in `dtype`."""
    if dtype == jnp.float32:
        q, keys = q.astype(jnp.float32), keys.astype(jnp.float32)
    return lax.dot_general(
        q, keys, (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST, preferred_element_type=dtype,
    )  # fmt: skip
