"""Our own prefill kernel in the simulator: its schedule, its work list, and what they cost."""

import dataclasses
import functools

import numpy as np
import pytest

from experiments.simulated.kernels import simulate_named
from mla_jax.hal import PROFILES, IllegalScheduleError, Problem, TilePlanError, simulate
from mla_jax.hal.prefill_orders import hopper_prefill
from mla_jax.hal.schedule import Schedule, Step
from mla_jax.hal.simulator.hopper import hopper_constants
from mla_jax.hal.simulator.hopper_prefill import own_stages, prefill_costs, tuned_for_prefill
from mla_jax.hal.simulator.one_core import StageCost, run_schedule
from pallas_kernels.hopper.prefill.model import simulated_prefill
from pallas_kernels.hopper.prefill.work_items import work_list

H200 = PROFILES["H200_SXM"]
trimmed = functools.partial(hopper_prefill, trims=True)


def refused(schedule: Schedule, **changes) -> None:
    with pytest.raises(IllegalScheduleError):
        run_schedule(dataclasses.replace(schedule, **changes), lambda _: StageCost({"tensor": 1.0}))


@pytest.mark.parametrize("order", [trimmed, functools.partial(hopper_prefill, stages=3)])
@pytest.mark.parametrize(("blocks", "before"), [(5, 0), (5, 2), (3, 2), (1, 0)])
def test_each_wait_slot_and_step_is_needed(order, blocks: int, before: int) -> None:
    schedule = order(blocks, before=before)
    schedule.check()
    every = set(range(blocks))
    first = {0, before} if before else {0}
    last = {before - 1, blocks - 1} if before else {blocks - 1}
    for w in "01":
        scored = schedule.blocks_of(f"QK_{w}") | schedule.blocks_of(f"QK_HALF_{w}")
        assert all(schedule.blocks_of(f"{s}_{w}") == every for s in ("MAX", "SM", "PV"))
        assert scored == schedule.blocks_of("LOAD_K") == schedule.blocks_of("LOAD_V") == every
        assert schedule.blocks_of(f"LOAD_Q_{w}") == schedule.blocks_of("CHECK") == first
        assert schedule.blocks_of(f"STORE_{w}") == last
    for index, step in enumerate(schedule.steps):
        around = schedule.steps[:index], schedule.steps[index + 1 :]
        for dropped in step.waits:
            kept = tuple(signal for signal in step.waits if signal != dropped)
            changed = dataclasses.replace(step, waits=kept)
            refused(schedule, steps=(*around[0], changed, *around[1]))
        if not step.stage.startswith("STORE"):  # after which nothing comes
            refused(schedule, steps=(*around[0], *around[1]))
    for buffer, slots in schedule.buffers.items():
        if {a.slot for s in schedule.steps for a in s.writes if a.buffer == buffer} == set(
            range(slots)
        ):
            refused(schedule, buffers=schedule.buffers | {buffer: slots - 1})


def test_each_stage_takes_time() -> None:
    stages = own_stages(hopper_constants()["stages"])
    costs = prefill_costs(tuned_for_prefill(H200), stages)
    schedules = [trimmed(1), trimmed(7, before=3)]

    def totals(slow: str | None = None) -> list[float]:
        def cost(step: Step) -> StageCost:
            of_step, by = costs(step), 20.0 if step.stage == slow else 1.0
            busy = {engine: by * seconds for engine, seconds in of_step.busy.items()}
            return StageCost(busy, by * of_step.hold, by * of_step.latency)

        return [run_schedule(schedule, cost, 1e-8).total for schedule in schedules]

    usual = totals()
    for stage in {step.stage for schedule in schedules for step in schedule.steps}:
        assert any(b > a * (1 + 1e-6) for a, b in zip(usual, totals(stage), strict=True)), stage


def test_the_work_list_is_the_kernels_own() -> None:
    queries, keys, heads = (300, 1, 129), (300, 1000, 400), 3
    problem = Problem(keys, heads, max(queries))
    kernel = simulated_prefill(H200, problem, queries)
    bounds = (np.cumsum([0, *each]).astype(np.int32) for each in (queries, keys))
    made = work_list(*bounds, sum(queries), sum(keys), causal=True, num_heads=heads,
                     bytes_per_key=512)  # fmt: skip
    tiles = np.asarray(made.tiles)[: int(made.counts[0])]
    assert kernel.work.blocks.tolist() == np.repeat(tiles[:, 3], heads).tolist()
    assert kernel.work.rows.sum() == heads * sum(queries)
    # The tile of one query sees 1000 keys: its only row is no first row of a half block.
    assert kernel.trimmed[kernel.work.blocks == 8].tolist() == [False] * heads
    assert kernel.trimmed.any()
    pairs = sum(k - i for n, k in zip(queries, keys, strict=True) for i in range(n))
    assert kernel.flops == 2 * heads * pairs * 320
    report = simulate(H200, problem, kernel)
    assert report.flops == kernel.flops
    assert report.utilisation == pytest.approx(kernel.flops / report.seconds / H200.peak("bf16"))
    with pytest.raises(ValueError, match="hopper prefill: problem = "):
        simulate(H200, Problem(keys, heads, 299), kernel)
    with pytest.raises(ValueError, match="query tokens = "):
        simulated_prefill(H200, Problem((100,), heads, 101))
    with pytest.raises(ValueError, match="kv_dtype"):
        simulated_prefill(H200, Problem((100,), heads, 100, kv_dtype="int8"))
    with pytest.raises(ValueError, match=r"on A100_SXM4_80GB: core.compute_capability = 8"):
        simulate(PROFILES["A100_SXM4_80GB"], problem, kernel)
    small = H200.with_values({"buffer.l2": 1e6, "memory.hbm_bytes": kernel.bytes - 1})
    with pytest.raises(TilePlanError, match="hbm holds"):
        simulate(small, problem, kernel)


def test_measured_rows_are_predicted_and_causal() -> None:
    """Rows of benchmarks/measured/h200_prefill.json, bursts, within the error of docs/hal.md."""
    for lens, s_q, heads, ms in ((4096, 4096, 16, 0.1415), (16384, 2048, 16, 0.4942)):
        report = simulate_named(H200, Problem((lens,), heads, s_q), "hopper-prefill")
        assert report.seconds * 1e3 == pytest.approx(ms, rel=0.09)
        assert report.bound_by == "matrix"
    # A query behind a prefix sees that much more.
    short, behind = (
        simulate(H200, problem, simulated_prefill(H200, problem)).cores
        for problem in (Problem((n,) * 8, 16, 1024) for n in (1024, 4096))
    )
    assert behind > 4 * short
    worse = {"engine.sfu": 2, "engine.cuda": 8, "memory.hbm_bandwidth": 1e10, "engine.copy": 1e10,
             "engine.tensor_efficiency": 0.3, "engine.shared_efficiency": 0.2}  # fmt: skip
    problem = Problem((1024,) * 8, 16, 1024)
    kernel = simulated_prefill(H200, problem)
    usual = simulate(H200, problem, kernel).seconds
    for field, value in worse.items():
        assert simulate(H200.with_values({field: value}), problem, kernel).seconds > usual, field
