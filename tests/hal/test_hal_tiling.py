"""Tile plans: the published tilings come out by themselves; what does not fit is refused."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax.hal import PROFILES, Problem, TilePlanError, plan_tiles
from mla_jax.hal.tiling import BufferUse, Tile

CALL = Problem((4096,) * 4, heads=128, s_q=2)


@pytest.mark.parametrize("name", [n for n, p in PROFILES.items() if p.family == "ascend"])
def test_ascend_arrives_at_fia(name: str) -> None:
    plan = plan_tiles(PROFILES[name], CALL)
    assert plan.tiles == (
        Tile("task", "QK", 256, 576, 512),
        Tile("task", "PV", 256, 512, 512),
        Tile("l1", "QK", 128, 288, 128),
        Tile("l1", "PV", 128, 256, 128),
        Tile("l0", "QK", 128, 96, 128),
        Tile("l0", "PV", 128, 128, 128),
    )
    l1 = [use for use in plan.uses if use.buffer == "l1"]
    assert [(use.bytes_each, use.count) for use in l1] == [(72 * 1024, 4), (72 * 1024, 3)]
    assert plan.used()["l0c"] == 128 * 1024
    assert plan.used()["l0a"] == plan.used()["l0b"] == 64 * 1024


@pytest.mark.parametrize(
    ("name", "block_kv", "stages", "qk"),
    [
        ("H100_SXM5", 64, 2, "sharded"),
        ("H200_SXM", 64, 2, "sharded"),
        ("A100_SXM4_40GB", 32, 2, "sharded"),
        ("A100_SXM4_80GB", 32, 2, "sharded"),
        ("L40", 16, 1, "duplicated"),
    ],
)
def test_gpus_arrive_at_flashinfers(name: str, block_kv: int, stages: int, qk: str) -> None:
    plan = plan_tiles(PROFILES[name], CALL)
    assert (plan.block_q, plan.block_kv, plan.kv_stages, plan.qk) == (64, block_kv, stages, qk)
    assert plan.num_workers == PROFILES[name].cores


@pytest.mark.parametrize(
    ("rows", "block_q"), [(16, 16), (100, 112), (256, 256), (300, 160), (320, 160)]
)
def test_ascend_splits_rows_evenly(rows: int, block_q: int) -> None:
    assert plan_tiles(PROFILES["Ascend910B2"], Problem((512,), rows)).block_q == block_q


def test_int8_takes_half_the_rows() -> None:
    plan = plan_tiles(PROFILES["Ascend910B2"], dataclasses.replace(CALL, kv_dtype="int8"))
    assert plan.block_q == 128


@given(
    name=st.sampled_from(sorted(PROFILES)),
    heads=st.integers(1, 128),
    s_q=st.integers(1, 4),
    dtype=st.sampled_from(["bf16", "int8", "fp8"]),
)
@settings(max_examples=80, deadline=None)
def test_every_plan_fits(name: str, heads: int, s_q: int, dtype: str) -> None:
    plan = plan_tiles(PROFILES[name], Problem((1000,), heads, s_q, dtype))
    for buffer, used in plan.used().items():
        assert 0 < used <= plan.capacity[buffer]


def test_what_does_not_fit_is_refused_with_buffer_and_excess() -> None:
    with pytest.raises(
        TilePlanError, match=r"H200_SXM: shared holds 232448 bytes.*\d+ too many.*kv latent"
    ):
        plan_tiles(PROFILES["H200_SXM"], CALL, block_kv=128, kv_stages=2)
    with pytest.raises(TilePlanError, match=r"Ascend910B1: ub holds 196608 bytes.*65536 too many"):
        plan_tiles(PROFILES["Ascend910B1"], CALL, block_kv=1024)
    with pytest.raises(TilePlanError, match=r"Ascend910B1: l1 holds"):
        plan_tiles(PROFILES["Ascend910B1"], CALL, block_q=512)
    plan = plan_tiles(PROFILES["H200_SXM"], CALL)
    with pytest.raises(
        TilePlanError, match=r"registers holds 65536.*\(255, 255, 24\).*2816 too many"
    ):
        dataclasses.replace(plan, registers=(255, 255, 24))
    with pytest.raises(TilePlanError, match="kv_stages = 2, wanted None or 3"):
        plan_tiles(PROFILES["Ascend910B1"], CALL, kv_stages=2)
    with pytest.raises(TilePlanError, match="texture is not a buffer"):
        dataclasses.replace(plan, uses=(BufferUse("texture", "q", 1),))


def test_odd_tiles_are_refused() -> None:
    with pytest.raises(TilePlanError, match="block_kv = 40, wanted a multiple of 16"):
        plan_tiles(PROFILES["H200_SXM"], CALL, block_kv=40)
    plan = plan_tiles(PROFILES["H200_SXM"], CALL)
    with pytest.raises(TilePlanError, match="kv_stages = 0"):
        dataclasses.replace(plan, kv_stages=0)
    with pytest.raises(TilePlanError, match="qk = 'both'"):
        dataclasses.replace(plan, qk="both")
