"""The blockwise kernels: every legal schedule gives the same result, whatever the pages are.

A schedule is data to a compiled kernel, and compiling takes almost all the time. So orders of the
same stages share one program here. Programs of different stages must agree to the bit, too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import (
    OPTIMISED,
    SCALE,
    TOLERANCE,
    Batch,
    assert_matches,
    make_batch,
    relative_error,
)

from mla_jax.attention import paged_mla_attention
from mla_jax.hal import ASCEND_ORDERS, AscendOrder, IllegalScheduleError, schedule_named
from mla_jax.hal.orders import ScheduleFn
from mla_jax.hal.tiling import TilePlan
from mla_jax.reference.int8_dataflow import attend_int8
from pallas_kernels.blockwise import blockwise_mla, blockwise_mla_int8, launch, program

INT8_LENS, INT8_QUERIES = [100, 33, 0, 99], [2, 1, 0, 1]
BLOCKS = 4  # of `small` tiles in a capacity of 128 tokens


def small(block_q: int = 8, block_kv: int = 32) -> TilePlan:
    return TilePlan("test", block_q, block_kv, kv_stages=2)


# By the order of each kind that has the most slots.
PUBLISHED = {
    "chunk-n": ("chunk1", "chunk2", "chunk4-up-chunk", "chunk-n"),
    "fa3": ("fa2", "fa3", "fp8-widen", "seesaw", "seesaw-cluster2"),
}


def arguments(batch: Batch) -> tuple:
    """What the kernels take: q [B, R, D], the cache, tables, lengths and visible [B, R]."""
    b, s, h, d = batch.q.shape
    token = np.arange(s)
    visible = batch.seq_lens[:, None] - batch.query_lens[:, None] + token + 1
    visible = np.where(token < batch.query_lens[:, None], np.maximum(visible, 0), 0)
    return (
        batch.q.reshape(b, s * h, d), batch.cache, jnp.asarray(batch.block_tables),
        jnp.asarray(batch.seq_lens), jnp.asarray(np.repeat(visible, h, axis=1), jnp.int32),
    )  # fmt: skip


Result = tuple[np.ndarray, np.ndarray]


def shaped(batch: Batch, result: tuple[jax.Array, jax.Array]) -> Result:
    """o [B, S, H, rank] and lse [B, S, H]."""
    o, lse = map(np.asarray, result)
    return o.reshape(*batch.q.shape[:3], -1), lse.reshape(batch.q.shape[:3])


def attend(
    batch: Batch,
    order: ScheduleFn,
    tiles: TilePlan | None = None,
    *,
    run: Callable[..., Any] = blockwise_mla,
    bits: bool = False,
) -> Result:
    """A kernel in an order, compiled for it alone; bits: as users compile it."""
    run = functools.partial(run, softmax_scale=SCALE, order=order, tiles=tiles or small())
    compiled = jax.jit(run, compiler_options=OPTIMISED if bits else None)
    return shaped(batch, compiled(*arguments(batch)))


def attend_shared(
    batch: Batch, order: ScheduleFn, largest: ScheduleFn, *, run: Callable[..., Any] = blockwise_mla
) -> Result:
    """As `attend` with bits, in the program of `largest`, which has the same stages.

    `largest` has at least as many slots of each buffer.
    """
    schedule, slots = order(BLOCKS), largest(BLOCKS).buffers
    assert all(count <= slots[name] for name, count in schedule.buffers.items() if "@" not in name)
    _, table = program.compile_schedule(schedule)
    return shaped(batch, shared_program(run, largest)(table, *arguments(batch)))


@functools.cache
def shared_program(run: Callable[..., Any], largest: ScheduleFn) -> Callable[..., Any]:
    """A compiled kernel that takes the table of a schedule in front of its arguments."""
    ops, _ = program.compile_schedule(largest(BLOCKS))

    def of_table(table: jax.Array, *args: Any) -> Any:
        with mock.patch.object(launch, "compile_schedule", return_value=(ops, table)):
            return run(*args, softmax_scale=SCALE, order=largest, tiles=small())

    return jax.jit(of_table, compiler_options=OPTIMISED)


@functools.cache
def ragged() -> Batch:
    return make_batch(np.random.default_rng(5), [100, 37, 0, 1], [2, 3, 0, 1], dtype="bfloat16",
                      capacity=128)  # fmt: skip


@functools.cache
def serial() -> Result:
    return attend(ragged(), schedule_named("serial"), bits=True)


def assert_same_bits(got: Result, wanted: Result) -> None:
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])


def test_serial_is_right() -> None:
    assert_matches(serial(), ragged().oracle(), TOLERANCE["bfloat16"], 1e-3)


@pytest.mark.parametrize("largest", PUBLISHED)
def test_every_published_order_gives_the_same_bits(largest: str) -> None:
    for name in PUBLISHED[largest]:
        got = attend_shared(ragged(), schedule_named(name), schedule_named(largest))
        assert_same_bits(got, serial())


@given(
    chunk=st.integers(0, 4), preload=st.integers(0, 2), update=st.sampled_from(["block", "chunk"])
)
@settings(max_examples=25, deadline=None)
def test_any_legal_order_gives_the_same_bits(chunk: int, preload: int, update: str) -> None:
    order = AscendOrder("any", chunk, preload, update=update)
    assert_same_bits(attend_shared(ragged(), order, schedule_named("chunk-n")), serial())


def test_amla_orders_agree_with_each_other_and_with_float64() -> None:
    orders = [dataclasses.replace(ASCEND_ORDERS["amla"], preload=ahead) for ahead in (2, 1, 0)]
    wanted, *others = (attend_shared(ragged(), order, orders[0]) for order in orders)
    assert_matches(wanted, ragged().oracle(), TOLERANCE["bfloat16"], 1e-3)
    for got in others:
        assert_same_bits(got, wanted)


def test_amla_adds_to_exponents_that_fall_far() -> None:
    """Scores that rise a lot from block to block: O's exponents fall, to 0 but never below."""
    batch = make_batch(np.random.default_rng(1), [128], [1], dtype="float32", capacity=128)
    ramp = batch.cache.pages * jnp.linspace(0.1, 40, 16)[None, :, None]
    batch = dataclasses.replace(batch, cache=dataclasses.replace(batch.cache, pages=ramp))
    o, lse = attend(batch, ASCEND_ORDERS["amla"], tiles=small(block_kv=16))
    assert np.isfinite(o).all()
    assert_matches((o, lse), batch.oracle(), 1e-4, 1e-3)


@pytest.mark.parametrize(
    ("layout", "page_size", "name", "dtype", "tiles"),
    [
        ("NZ", 16, "chunk4", "float32", small(3, 48)),  # neither divides the rows or the capacity
        ("ND", 1, "amla", "float16", small()),
        ("NZ", 64, "seesaw", "float16", small()),
    ],
)
def test_layouts_page_sizes_dtypes_and_tiles(
    layout: str, page_size: int, name: str, dtype: str, tiles: TilePlan
) -> None:
    batch = make_batch(np.random.default_rng(2), [90, 128], [1, 2], layout=layout, dtype=dtype,
                       page_size=page_size, capacity=128)  # fmt: skip
    got = attend(batch, schedule_named(name), tiles)
    assert_matches(got, batch.oracle(), TOLERANCE[dtype], 1e-4 if dtype == "float32" else 1e-3)


def test_an_illegal_order_does_not_run() -> None:
    def broken(num_blocks: int):  # type: ignore[no-untyped-def]
        schedule = schedule_named("chunk1")(num_blocks)
        steps = tuple(dataclasses.replace(step, waits=()) for step in schedule.steps)
        return dataclasses.replace(schedule, steps=steps)

    with pytest.raises(
        IllegalScheduleError, match=r"SM\(0\) on vector: reads S\[0\] without waiting"
    ):
        attend(ragged(), broken)


@functools.cache
def int8_batch(granularity: str) -> Batch:
    return make_batch(np.random.default_rng(7), INT8_LENS, INT8_QUERIES, dtype="int8",
                      capacity=128, granularity=granularity)  # fmt: skip


@functools.cache
def int8_two_signals() -> Result:
    order = ASCEND_ORDERS["int8-2-signals"]
    return attend(int8_batch("token"), order, run=blockwise_mla_int8, bits=True)


@pytest.mark.parametrize(
    ("granularity", "page_size", "layout", "longest"),
    [
        ("tensor", 1, "ND", 100),
        ("token", 64, "NZ", 600),  # two blocks of the profile's tiles, whose size is 512
    ],
)
def test_int8_behind_the_op_matches_float64(
    granularity: str, page_size: int, layout: str, longest: int
) -> None:
    """The oracle reads the same int8 cache, so what is left is rounding q and P to 8 bits.

    The third request's length is out of range, and one value of the last request's q is NaN.
    """
    lens = [longest, *INT8_LENS[1:]]
    batch = make_batch(np.random.default_rng(8), lens, INT8_QUERIES, dtype="int8", layout=layout,
                       page_size=page_size, capacity=128 if longest < 128 else 640,
                       granularity=granularity)  # fmt: skip
    wanted = batch.oracle()
    batch.q = batch.q.at[3, 0, 1, 5].set(jnp.nan)
    batch.seq_lens = np.where(np.arange(4) == 2, -1, batch.seq_lens).astype(np.int32)
    run = functools.partial(paged_mla_attention, softmax_scale=SCALE, implementation="blockwise")
    o, lse = map(np.asarray, jax.jit(run)(*batch.args, query_lens=batch.query_lens))
    o = o.astype(np.float32)
    assert_matches((o[:2], lse[:2]), (wanted[0][:2], wanted[1][:2]), 1.5e-2, 5e-2)
    assert np.isnan(o[2]).all()
    assert np.isnan(lse[2]).all()
    np.testing.assert_array_equal(np.isnan(o[3, 0]).all(-1), np.arange(4) == 1)
    np.testing.assert_array_equal(np.isnan(lse[3, 0]), np.arange(4) == 1)


def test_int8_orders_give_the_same_bits() -> None:
    for name in ("chunk4-up-chunk", "int8-1-signal"):
        order, largest = ASCEND_ORDERS[name], ASCEND_ORDERS["chunk-n"]
        got = attend_shared(int8_batch("token"), order, largest, run=blockwise_mla_int8)
        assert_same_bits(got, int8_two_signals())


def test_int8_is_the_integer_dataflow_of_plain_jax() -> None:
    """Row by row: the same integers, only float sums are in another order."""
    batch, (o, lse) = int8_batch("token"), int8_two_signals()
    keys = 99
    for request in (0, 3):  # the first token of each
        table = jnp.asarray(batch.block_tables[request : request + 1])
        stored = batch.cache.stored_rows(table, jnp.arange(keys)[None])
        wanted = attend_int8(
            batch.q[request, 0], *(stored[n][0] for n in ("pages", "scales", "rope_pages")),
            softmax_scale=SCALE, weights="int8", block=32,
        )  # fmt: skip
        assert relative_error(o[request, 0], np.asarray(wanted[0], np.float64)) < 1e-6
        np.testing.assert_allclose(lse[request, 0], wanted[1], rtol=1e-6)


def test_int8_refuses_what_it_can_not_do() -> None:
    run = functools.partial(attend, run=blockwise_mla_int8)
    with pytest.raises(ValueError, match="amla rescales by exponent_add"):
        run(int8_batch("token"), ASCEND_ORDERS["amla"])
    with pytest.raises(ValueError, match="granularity token or tensor, got int8 with group"):
        run(int8_batch("group"), ASCEND_ORDERS["int8-2-signals"])
    with pytest.raises(ValueError, match="granularity token or tensor, got bfloat16 with None"):
        run(ragged(), ASCEND_ORDERS["int8-2-signals"])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_refuses_to_be_differentiated(dtype: str) -> None:
    batch = ragged() if dtype == "bfloat16" else int8_batch("token")

    kernel, order = blockwise_mla, "chunk4"
    if dtype == "int8":
        kernel, order = blockwise_mla_int8, "int8-2-signals"
    q, *rest = arguments(batch)

    def run(q: jax.Array) -> jax.Array:
        return kernel(q, *rest, softmax_scale=SCALE, order=ASCEND_ORDERS[order])[0].sum()

    with pytest.raises(TypeError, match="the blockwise kernels have no derivative"):
        jax.eval_shape(jax.grad(run), q)
