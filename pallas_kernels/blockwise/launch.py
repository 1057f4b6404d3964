"""The common parts of the bf16 and the int8 kernel: row tiles, workspace and the Pallas call."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import ManualAxisType

from mla_jax.cache import PagedKVCache
from mla_jax.hal.profiles.ascend import ASCEND910B1
from mla_jax.hal.schedule import Schedule
from mla_jax.hal.tiling import TilePlan, plan_tiles
from mla_jax.hal.work import Problem
from mla_jax.online_softmax import SoftmaxState
from mla_jax.sharding.axes import varying_axes
from pallas_kernels.blockwise.program import compile_schedule

Workspace = dict[str, tuple[tuple[int, ...], Any]]  # name -> shape, dtype
STATE = ("m", "l", "residual", "lost")


def launch(
    kernel: Callable[..., None],
    order: Callable[[int], Schedule],
    *,
    rows: Sequence[jax.Array],
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    visible: jax.Array,
    width: int,
    tiles: TilePlan | None,
    kv_dtype: str,
    workspace: Callable[[Schedule, int, int], Workspace],
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Runs `kernel` for every (request, row tile).

    Args:
        kernel: gets refs in the order program, rows, arrays of the cache, block table, length,
            visible, o, lse, workspace, state. By name it gets `names` (the program's ops) and
            `block_kv`.
        order: the schedule for a number of blocks.
        rows: arrays [B, R, ...] that are divided into row tiles.
        cache, block_tables, seq_lens, visible, tiles, interpret: as in `blockwise_mla`.
        width: columns of o.
        kv_dtype: dtype for which tiles are chosen, if there are none.
        workspace: makes the workspace from a schedule and the rows and keys of a tile.

    Returns:
        o [B, R, width] and lse [B, R], float32.
    """
    capacity = block_tables.shape[1] * cache.page_size
    if tiles is None:
        problem = Problem((capacity,), heads=visible.shape[1], kv_dtype=kv_dtype)
        tiles = plan_tiles(ASCEND910B1, problem)
    schedule = order(max(math.ceil(capacity / tiles.block_kv), 1))
    names, table = compile_schedule(schedule)
    program = jnp.asarray(table)
    batch, count = visible.shape
    tile = min(tiles.block_q, count)
    num_tiles = math.ceil(count / tile)

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, num_tiles * tile - count)) + ((0, 0),) * (x.ndim - 2))

    def of_rows(x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        tail = x.shape[2:]
        return pl.BlockSpec((1, tile, *tail), lambda b, t: (b, t, *(0,) * len(tail)))

    def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda b, t: (0,) * len(shape))

    pages = list(cache.arrays().values())
    row_inputs = [padded(x) for x in rows]
    seen = padded(jnp.minimum(visible, seq_lens[:, None]))
    scratch = workspace(schedule, tile, tiles.block_kv) | {
        name: ((tile,), jnp.float32) for name in STATE
    }
    inputs = (program, *row_inputs, *pages, block_tables, seq_lens, seen)
    axes = ManualAxisType(varying=varying_axes(inputs))

    def of_output(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)

    outputs = [
        of_output((batch, num_tiles * tile, width), jnp.float32),
        of_output((batch, num_tiles * tile), jnp.float32),
    ]
    run = pl.pallas_call(
        functools.partial(kernel, names=names, block_kv=tiles.block_kv),
        grid=(batch, num_tiles),
        in_specs=[
            whole(program.shape),
            *(of_rows(x) for x in row_inputs),
            *(whole(x.shape) for x in pages),
            pl.BlockSpec((1, block_tables.shape[1]), lambda b, t: (b, 0)),
            pl.BlockSpec((1,), lambda b, t: (b,)),
            of_rows(seen),
        ],
        out_specs=[*(of_rows(x) for x in outputs), *(whole(s) for s, _ in scratch.values())],
        out_shape=[*outputs, *(of_output(s, d) for s, d in scratch.values())],
        interpret=interpret,
    )

    @jax.custom_jvp
    @jax.jit  # so that `jax_debug_nans` checks these two outputs and not unused workspace
    def attended(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        o, lse, *_ = run(*inputs)
        return o[:, :count], lse[:, :count]

    @attended.defjvp
    def refuse(primals: tuple, tangents: tuple) -> Any:
        raise TypeError(
            "the blockwise kernels have no derivative: differentiate implementation reference, xla "
            "or split_kv, or apply jax.lax.stop_gradient to their arguments"
        )

    return attended(*inputs)


def key_rows(
    refs: Sequence[Any],
    meta: PagedKVCache,
    table_ref: Any,
    positions: jax.Array,
    length: jax.Array,
) -> dict[str, jax.Array]:
    """Reads the tokens at `positions` from the cache whose arrays are `refs`, by array name.

    Each result is [T, ...], and 0 at and past `length`, whatever the cache holds there.
    """
    arrays: dict[str, Any] = {n: r[...] for n, r in zip(meta.arrays(), refs, strict=True)}
    cache = dataclasses.replace(meta, **arrays)
    there = positions < length
    stored = cache.stored_rows(table_ref[...], positions[None])
    return {
        name: jnp.where(there.reshape(-1, *[1] * (rows.ndim - 2)), rows[0], jnp.zeros_like(rows[0]))
        for name, rows in stored.items()
    }


def begin_state(state_refs: Sequence[Any], o_ref: Any) -> None:
    """Initializes the state and o: no key has been seen."""
    m_ref, l_ref, residual_ref, lost_ref = state_refs
    m_ref[...] = jnp.full(m_ref.shape, -jnp.inf, m_ref.dtype)
    for ref, value in ((l_ref, 0), (residual_ref, 1), (lost_ref, 1), (o_ref, 0)):
        ref[...] = jnp.full(ref.shape, value, ref.dtype)


def read_state(state_refs: Sequence[Any], o_ref: Any) -> SoftmaxState:
    """Returns the softmax state from its refs."""
    m_ref, l_ref, residual_ref, lost_ref = state_refs
    return SoftmaxState(m_ref[...], l_ref[...], o_ref[...], residual_ref[...], lost_ref[...])


def write_state(state_refs: Sequence[Any], state: SoftmaxState) -> None:
    """Writes the softmax state to its refs, without o."""
    values = (state.m, state.l, state.residual, state.lost)
    for ref, value in zip(state_refs, values, strict=True):
        ref[...] = value
