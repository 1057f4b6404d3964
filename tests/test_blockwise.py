"""The blockwise kernel: every legal schedule gives the same result, whatever the pages are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import SCALE, TOLERANCE, Batch, assert_matches, make_batch, relative_error

from mla_jax.cache import PagedKVCache
from mla_jax.hal import ASCEND_ORDERS, AscendOrder, IllegalScheduleError, schedule_named
from mla_jax.hal.orders import ScheduleFn
from mla_jax.hal.tiling import TilePlan
from pallas_kernels.blockwise import blockwise_mla, blockwise_mla_int8


def small(block_q: int = 8, block_kv: int = 32) -> TilePlan:
    return TilePlan("test", block_q, block_kv, kv_stages=2)


PUBLISHED = (
    "chunk1", "chunk2", "chunk4-up-chunk", "chunk-n", "fa2", "fa3", "fp8-widen", "seesaw",
    "seesaw-cluster2",
)  # fmt: skip


def attend(
    batch: Batch, order: ScheduleFn, tiles: TilePlan | None = None
) -> tuple[jax.Array, jax.Array]:
    """The kernel on a batch, as o [B, S, H, rank] and lse [B, S, H]."""
    b, s, h, d = batch.q.shape
    token = np.arange(s)
    visible = batch.seq_lens[:, None] - batch.query_lens[:, None] + token + 1
    visible = np.where(token < batch.query_lens[:, None], np.maximum(visible, 0), 0)
    run = functools.partial(blockwise_mla, softmax_scale=SCALE, order=order, tiles=tiles or small())
    o, lse = jax.jit(run)(
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


@dataclasses.dataclass
class Int8Case:
    """An int8 cache beside its rope part, and the float64 answer on the very same int8 values."""

    args: tuple
    wanted: np.ndarray


@functools.cache
def int8_case(layout: str = "ND") -> Int8Case:
    rng = np.random.default_rng(7)
    lengths, rank, rope_dim, rows, pages = np.array([100, 33]), 32, 16, 6, 20
    tables = rng.permutation(pages)[:16].reshape(2, 8).astype(np.int32)
    nope = rng.integers(-127, 128, (2, 128, rank)).astype(np.int8)
    rope = rng.standard_normal((2, 128, rope_dim)).astype(np.float32)
    q_nope = rng.integers(-127, 128, (2, rows, rank)).astype(np.int8)
    q_rope = rng.standard_normal((2, rows, rope_dim)).astype(np.float32)
    q_scale, kv_scale = rng.uniform(0.01, 0.02, (2, rows)).astype(np.float32), 0.015
    caches = []
    for values, width, r in ((nope, rank, 0), (rope, 0, rope_dim)):
        flat = values.reshape(2 * 8, 16, -1)
        paged = np.zeros((pages, *flat.shape[1:]), values.dtype)
        paged[tables.reshape(-1)] = flat
        if layout == "NZ":
            c0 = 32 // values.dtype.itemsize
            paged = paged.reshape(pages, 16, -1, c0).transpose(0, 2, 1, 3)
        caches.append(PagedKVCache(jnp.asarray(paged), width, r, 16, layout))
    o = np.zeros((2, rows, rank))
    for b, length in enumerate(lengths):
        k, kr = nope[b, :length].astype(np.float64) * kv_scale, rope[b, :length].astype(np.float64)
        q = q_nope[b].astype(np.float64) * q_scale[b][:, None].astype(np.float64)
        s = (q @ k.T + q_rope[b].astype(np.float64) @ kr.T) * SCALE
        p = np.exp(s - s.max(1, keepdims=True))
        o[b] = p / p.sum(1, keepdims=True) @ k
    visible = jnp.asarray(np.repeat(lengths[:, None], rows, 1), jnp.int32)
    args = (
        q_nope,
        q_scale,
        q_rope,
        *caches,
        kv_scale,
        tables,
        jnp.asarray(lengths, jnp.int32),
        visible,
    )
    return Int8Case(args, o)


@functools.cache
def int8_attend(order: AscendOrder, layout: str = "ND") -> np.ndarray:
    q_nope, q_scale, q_rope, nope, rope, kv_scale, tables, lengths, visible = int8_case(layout).args
    run = functools.partial(
        blockwise_mla_int8, softmax_scale=SCALE, order=order, tiles=small(block_q=4)
    )
    return np.asarray(jax.jit(run)(jnp.asarray(q_nope), jnp.asarray(q_scale), jnp.asarray(q_rope),
                                   nope, rope, kv_scale, tables, lengths, visible)[0])  # fmt: skip


@pytest.mark.parametrize("name", ["chunk4-up-chunk", "int8-2-signals"])
def test_int8_orders_give_the_same_bits(name: str) -> None:
    got = int8_attend(ASCEND_ORDERS[name])
    assert relative_error(got, int8_case().wanted) < 1e-2  # P has 7 bits
    np.testing.assert_array_equal(got, int8_attend(ASCEND_ORDERS["int8-1-signal"]))


def test_int8_fractal_layout() -> None:
    order = ASCEND_ORDERS["int8-2-signals"]
    np.testing.assert_array_equal(int8_attend(order, "NZ"), int8_attend(order))


def test_int8_refuses_what_it_can_not_do() -> None:
    with pytest.raises(ValueError, match="amla rescales by exponent_add"):
        int8_attend(ASCEND_ORDERS["amla"])
    args = list(int8_case().args)
    args[0] = args[0].astype(np.float32)
    with pytest.raises(TypeError, match="q_nope must be int8, got float32"):
        blockwise_mla_int8(*args, softmax_scale=SCALE)
    args = list(int8_case().args)
    args[4] = dataclasses.replace(args[4], page_size=8)
    with pytest.raises(ValueError, match="page size 16, got 8"):
        blockwise_mla_int8(*args, softmax_scale=SCALE)
