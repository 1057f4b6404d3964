"""The blockwise kernel: every legal schedule gives the same result, whatever the pages are."""

import dataclasses
import functools
from typing import Any

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

from mla_jax.hal import ASCEND_ORDERS, AscendOrder, IllegalScheduleError, schedule_named
from mla_jax.hal.orders import ScheduleFn
from mla_jax.hal.tiling import TilePlan
from mla_jax.reference.int8_dataflow import attend_int8
from pallas_kernels.blockwise import blockwise_mla, blockwise_mla_int8


def small(block_q: int = 8, block_kv: int = 32) -> TilePlan:
    return TilePlan("test", block_q, block_kv, kv_stages=2)


PUBLISHED = (
    "chunk1", "chunk2", "chunk4-up-chunk", "chunk-n", "fa2", "fa3", "fp8-widen", "seesaw",
    "seesaw-cluster2",
)  # fmt: skip


def attend(
    batch: Batch, order: ScheduleFn | None = None, tiles: TilePlan | None = None, *, run: Any = None
) -> tuple[jax.Array, jax.Array]:
    """A kernel (the float one in `order` and `tiles`) on a batch, as o [B, S, H, rank] and lse."""
    b, s, h, d = batch.q.shape
    token = np.arange(s)
    visible = batch.seq_lens[:, None] - batch.query_lens[:, None] + token + 1
    visible = np.where(token < batch.query_lens[:, None], np.maximum(visible, 0), 0)
    run = run or functools.partial(blockwise_mla, order=order, tiles=tiles or small())
    o, lse = jax.jit(functools.partial(run, softmax_scale=SCALE), compiler_options=OPTIMISED)(
        batch.q.reshape(b, s * h, d), batch.cache, jnp.asarray(batch.block_tables),
        jnp.asarray(batch.seq_lens), jnp.asarray(np.repeat(visible, h, axis=1), jnp.int32),
    )  # fmt: skip
    return o.reshape(b, s, h, -1), lse.reshape(b, s, h)


@functools.cache
def ragged() -> Batch:
    return make_batch(np.random.default_rng(5), [100, 37, 0, 1], [2, 3, 0, 1], dtype="bfloat16",
                      capacity=128)  # fmt: skip


@functools.cache
def serial() -> tuple[np.ndarray, np.ndarray]:
    o, lse = attend(ragged(), schedule_named("serial"))
    return np.asarray(o), np.asarray(lse)


def test_serial_is_right() -> None:
    o, lse = serial()
    assert_matches((o, lse), ragged().oracle(), TOLERANCE["bfloat16"], 1e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_order_gives_the_same_bits(name: str) -> None:
    o, lse = attend(ragged(), schedule_named(name))
    np.testing.assert_array_equal(o, serial()[0])
    np.testing.assert_array_equal(lse, serial()[1])


@given(
    chunk=st.integers(0, 4), preload=st.integers(0, 2), update=st.sampled_from(["block", "chunk"])
)
@settings(max_examples=4, deadline=None)
def test_any_legal_order_gives_the_same_bits(chunk: int, preload: int, update: str) -> None:
    o, lse = attend(ragged(), AscendOrder("any", chunk, preload, update=update))
    np.testing.assert_array_equal(o, serial()[0])
    np.testing.assert_array_equal(lse, serial()[1])


@pytest.mark.parametrize("preload", [0, 2])
def test_amla_orders_agree_with_each_other_and_with_float64(preload: int) -> None:
    order = dataclasses.replace(ASCEND_ORDERS["amla"], preload=preload)
    got = attend(ragged(), order)
    assert_matches(got, ragged().oracle(), TOLERANCE["bfloat16"], 1e-3)
    np.testing.assert_array_equal(got[0], attend(ragged(), ASCEND_ORDERS["amla"])[0])


def test_amla_adds_to_exponents_that_fall_far() -> None:
    """Scores that rise a lot from block to block: O's exponents fall, to 0 but never below."""
    batch = make_batch(np.random.default_rng(1), [128], [1], dtype="float32", capacity=128)
    ramp = batch.cache.pages * jnp.linspace(0.1, 40, 16)[None, :, None]
    batch = dataclasses.replace(batch, cache=dataclasses.replace(batch.cache, pages=ramp))
    o, lse = attend(batch, ASCEND_ORDERS["amla"], tiles=small(block_kv=16))
    assert np.isfinite(o).all()
    assert_matches((o, lse), batch.oracle(), 1e-4, 1e-3)


@pytest.mark.parametrize(
    ("layout", "page_size", "name"),
    [("NZ", 16, "chunk4"), ("ND", 1, "amla"), ("NZ", 64, "seesaw"), ("ND", 128, "amla")],
)
def test_layouts_and_page_sizes(layout: str, page_size: int, name: str) -> None:
    batch = make_batch(np.random.default_rng(2), [90, 128], [1, 2], layout=layout,
                       page_size=page_size, capacity=128)  # fmt: skip
    got = attend(batch, schedule_named(name))
    assert_matches(got, batch.oracle(), TOLERANCE["float32"], 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtypes(dtype: str) -> None:
    batch = make_batch(np.random.default_rng(3), [70], [2], dtype=dtype, capacity=128)
    assert_matches(attend(batch, schedule_named("chunk2")), batch.oracle(), TOLERANCE[dtype], 1e-3)


def test_tiles_come_from_the_profile_when_none_are_given() -> None:
    batch = make_batch(np.random.default_rng(6), [600], [1], capacity=1024, page_size=64)
    visible = jnp.full((1, 4), 600, jnp.int32)
    o, _ = blockwise_mla(batch.q[:, 0], batch.cache, jnp.asarray(batch.block_tables),
                         jnp.asarray(batch.seq_lens), visible, softmax_scale=SCALE)  # fmt: skip
    assert relative_error(o[:, None], batch.oracle()[0]) < TOLERANCE["float32"]


def test_blocks_that_do_not_divide_the_capacity() -> None:
    batch = make_batch(np.random.default_rng(4), [100, 3], [1, 1], capacity=112)
    got = attend(batch, schedule_named("chunk1"), tiles=small(3, 48))
    assert_matches(got, batch.oracle(), TOLERANCE["float32"], 1e-4)


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
def int8_batch(granularity: str, layout: str) -> Batch:
    return make_batch(np.random.default_rng(7), [100, 33, 0], [2, 1, 0], dtype="int8",
                      layout=layout, capacity=128, granularity=granularity)  # fmt: skip


@functools.cache
def int8_attend(
    order: AscendOrder, granularity: str = "token", layout: str = "ND"
) -> tuple[np.ndarray, np.ndarray]:
    run = functools.partial(blockwise_mla_int8, order=order, tiles=small(block_q=4))
    o, lse = attend(int8_batch(granularity, layout), run=run)
    return np.asarray(o), np.asarray(lse)


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_int8_matches_float64(granularity: str) -> None:
    """The oracle reads the same int8 cache, so what is left is rounding q and P to 8 bits."""
    got = int8_attend(ASCEND_ORDERS["int8-2-signals"], granularity)
    assert_matches(got, int8_batch(granularity, "ND").oracle(), 1.5e-2, 5e-2)


@pytest.mark.parametrize("name", ["chunk4-up-chunk", "int8-2-signals"])
def test_int8_orders_give_the_same_bits(name: str) -> None:
    got, wanted = (int8_attend(ASCEND_ORDERS[n]) for n in (name, "int8-1-signal"))
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])


def test_int8_is_the_integer_dataflow_of_plain_jax() -> None:
    """Row by row: the same integers, only float sums are in another order."""
    batch, (o, lse) = int8_batch("token", "ND"), int8_attend(ASCEND_ORDERS["int8-2-signals"])
    for request, token, keys in [(0, 0, 99), (0, 1, 100), (1, 0, 33)]:
        table = jnp.asarray(batch.block_tables[request : request + 1])
        stored = batch.cache.stored_rows(table, jnp.arange(keys)[None])
        wanted = attend_int8(
            batch.q[request, token], *(stored[n][0] for n in ("pages", "scales", "rope_pages")),
            softmax_scale=SCALE, weights="int8", block=32,
        )  # fmt: skip
        assert relative_error(o[request, token], np.asarray(wanted[0], np.float64)) < 1e-6
        np.testing.assert_allclose(lse[request, token], wanted[1], rtol=1e-6)


def test_int8_fractal_layout() -> None:
    order = ASCEND_ORDERS["int8-2-signals"]
    np.testing.assert_array_equal(int8_attend(order, "token", "NZ")[0], int8_attend(order)[0])


def test_int8_refuses_what_it_can_not_do() -> None:
    with pytest.raises(ValueError, match="amla rescales by exponent_add"):
        int8_attend(ASCEND_ORDERS["amla"])
    with pytest.raises(ValueError, match="granularity token or tensor, got int8 with group"):
        int8_attend(ASCEND_ORDERS["int8-2-signals"], "group")
    with pytest.raises(ValueError, match="granularity token or tensor, got bfloat16 with None"):
        attend(ragged(), run=blockwise_mla_int8)


def test_refuses_to_be_differentiated() -> None:
    batch = ragged()

    def run(q: jax.Array) -> jax.Array:
        return attend(dataclasses.replace(batch, q=q), schedule_named("serial"))[0].sum()

    with pytest.raises(TypeError, match="the blockwise kernels have no derivative"):
        jax.eval_shape(jax.grad(run), batch.q)
