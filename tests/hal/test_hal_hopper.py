"""Our own Hopper kernels in the simulator: their schedules, their plans, and what they cost."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from experiments.simulated.fitting import hopper_errors, portrait_errors
from experiments.simulated.fitting.hopper_errors import compared, decode_rows
from experiments.simulated.kernels import simulate_named
from mla_jax.hal import PROFILES, IllegalScheduleError, Problem, simulate
from mla_jax.hal.hopper_orders import (
    hopper_decode,
    hopper_int8,
    hopper_transposed,
    hopper_transposed_int8,
)
from mla_jax.hal.schedule import Schedule, ScheduleBuilder, Step
from mla_jax.hal.simulator.hopper import (
    KEPT,
    PARTIAL,
    HopperKernel,
    Merging,
    hopper_constants,
    hopper_costs,
    tuned_for_hopper,
)
from mla_jax.hal.simulator.hopper_times import hopper_times, merge_seconds
from mla_jax.hal.simulator.one_core import StageCost, run_schedule
from mla_jax.hal.simulator.shared_engines import run_shared
from mla_jax.hal.work import Work
from pallas_kernels.hopper import model, planning

H200 = PROFILES["H200_SXM"]
CONSTANTS = hopper_constants()["constants"]


def kernel_of(blocks, worker, tile, *, kept=None, name="decode", **changes) -> HopperKernel:
    """A kernel with a plan that is written by hand."""
    blocks, worker, tile = (np.array(x) for x in (blocks, worker, tile))
    work = Work(blocks, np.full(len(blocks), 64), worker, tile, num_workers=132)
    kept = np.zeros(len(blocks), bool) if kept is None else np.array(kept)
    merging = {int(n): Merging(8, 2, 2) for n in np.unique(work.parts)}
    kernel = HopperKernel(name, work, kept, 64, 1, True, 2, merging)
    return dataclasses.replace(kernel, **changes)


def seconds(kernel: HopperKernel, heads: int = 64) -> float:
    problem = Problem((64 * int(kernel.work.blocks.sum()),), heads)
    return simulate(H200, problem, kernel).seconds


few_stages = functools.partial(hopper_transposed, kv_stages=(3, 1, 2), q_stages=1)
one_computes = functools.partial(hopper_transposed_int8, kv_stages=3, computing=1, quantizing=1)
FLOAT = {"LOAD_L", "LOAD_R", "LOAD_ROPE", "QK", "SM", "PV_L", "PV_R"}
INT8 = {"LOAD", "QK", "QK_ROPE", "SM", "PUBLISH", "PV_L", "PV_R"}
TRANSPOSED_INT8 = {"LOAD", "QK", "SM", "PV"}
ORDERS = [
    (hopper_decode, FLOAT), (hopper_transposed, FLOAT), (few_stages, FLOAT), (hopper_int8, INT8),
    (hopper_transposed_int8, TRANSPOSED_INT8), (one_computes, TRANSPOSED_INT8),
]  # fmt: skip


def refused(schedule: Schedule, **changes) -> None:
    with pytest.raises(IllegalScheduleError):
        run_schedule(dataclasses.replace(schedule, **changes), lambda _: StageCost({"tensor": 1.0}))


@pytest.mark.parametrize(("order", "stages"), ORDERS)
@pytest.mark.parametrize(("blocks", "before"), [(5, 0), (5, 2), (4, 3), (1, 0)])
def test_each_wait_of_a_schedule_is_needed(order, stages, blocks: int, before: int) -> None:
    schedule = order(blocks, before=before)
    schedule.check()
    for stage in stages:
        assert schedule.blocks_of(stage) == set(range(blocks)), stage
    ends = {blocks - 1, before - 1} if before else {blocks - 1}
    at_end = {step.stage for step in schedule.steps if step.stage.startswith(("SUM", "STORE"))}
    assert at_end >= {"STORE_L", "STORE_R"}
    for stage in at_end:
        assert schedule.blocks_of(stage) == ends
    first = {0, before} if before else {0}
    loads_q = {step.stage for step in schedule.steps if step.stage.startswith("LOAD_Q")}
    assert all(schedule.blocks_of(stage) == first for stage in loads_q)
    assert loads_q
    tried = 0
    for index, step in enumerate(schedule.steps):
        for dropped in step.waits:
            kept = tuple(signal for signal in step.waits if signal != dropped)
            steps = list(schedule.steps)
            steps[index] = dataclasses.replace(step, waits=kept)
            refused(schedule, steps=tuple(steps))
            tried += 1
    assert tried == schedule.num_signals > 0


@pytest.mark.parametrize(("order", "stages"), ORDERS)
def test_each_slot_and_each_step_of_a_schedule_is_needed(order, stages) -> None:
    schedule = order(9, before=4)
    for buffer, slots in schedule.buffers.items():
        if any(a.buffer == buffer for s in schedule.steps for a in (*s.reads, *s.writes)):
            refused(schedule, buffers=schedule.buffers | {buffer: slots - 1})
    for index, step in enumerate(schedule.steps):
        if not step.stage.startswith("STORE"):  # after which nothing comes
            refused(schedule, steps=(*schedule.steps[:index], *schedule.steps[index + 1 :]))


def kernel_over_int8(name: str, **changes) -> HopperKernel:
    changes = {"kv_stages": (3, 3, 3), "partial_bytes": 4, "in_pairs": False} | changes
    return kernel_of([64] * 128, range(128), range(128), name=name, **changes)


OVER_INT8 = [
    kernel_over_int8("decode_int8", computing=1),
    kernel_over_int8("decode_transposed_int8", rows_per_cta=16, kv_stages=(4, 4, 4)),
    kernel_over_int8("decode_transposed_int8", rows_per_cta=32, computing=1),
]


@pytest.mark.parametrize("kernel", OVER_INT8, ids=lambda k: f"{k.kernel}-{k.rows_per_cta}")
def test_each_stage_of_an_int8_kernel_takes_time(kernel: HopperKernel) -> None:
    """And nothing gets slower where a number of the machine gets better."""
    tuned = tuned_for_hopper(H200)
    schedules = [kernel.order(1), kernel.order(6, before=2)]
    costs = [hopper_costs(tuned, kernel, PARTIAL, queue) for queue in (4e-6, 0.0)]

    def totals(change=lambda step, cost: cost) -> list[float]:
        return [
            run_shared(schedule, lambda step, of=of: change(step, of(step)), 1e-8).total
            for of in costs
            for schedule in schedules
        ]  # fmt: skip

    def slower(stage: str, step: Step, cost: StageCost) -> StageCost:
        by = 4.0 if step.stage == stage else 1.0  # the halves of PV hide each other's double
        busy = {engine: by * seconds for engine, seconds in cost.busy.items()}
        return StageCost(busy, by * cost.hold, by * cost.latency)

    step = next(step for step in schedules[0].steps if step.stage in ("PV", "PV_L"))
    values = 512 * 64 if step.stage == "PV" else 256 * 64  # of V, 5 instructions for 4 of them
    assert costs[0](step).busy["cuda"] == pytest.approx(values * 5 / 4 / 128 * H200.cycle)
    usual = totals()
    assert usual[0] > usual[2] + 3e-6  # loads wait in the queue of the memory
    for stage in {step.stage for step in schedules[-1].steps}:
        changed = totals(functools.partial(slower, stage))
        assert any(b > a * (1 + 1e-6) for a, b in zip(usual, changed, strict=True)), stage
    slow = {"engine.tensor_int8": 2048, "engine.cuda": 32, "memory.hbm_bandwidth": 5e11,
            "latency.l2": 9e-7, "latency.memory": 2e-6, "engine.store": 2e10}  # fmt: skip
    for field, value in slow.items():
        worse = H200.with_values({field: value})
        assert seconds_of_int8(worse, kernel) > seconds_of_int8(H200, kernel), field


def seconds_of_int8(profile, kernel: HopperKernel) -> float:
    problem = Problem((4096,) * 128, kernel.rows_per_cta, kv_dtype="int8")
    return simulate(profile, problem, kernel).seconds


def test_products_at_the_same_time_share_the_tensor_cores() -> None:
    """And a step that starts late holds up no step of another unit."""
    build = ScheduleBuilder("two", 1, 1, {"a": 1, "b": 1, "c": 1})
    build.add("load", "LOAD", 0, writes=(build.slot("a", 0),))
    build.add("wg0", "LATE", 0, reads=(build.slot("a", 0),))
    build.add("wg1", "ONE", 0, writes=(build.slot("b", 0),))
    build.add("wg2", "TWO", 0, writes=(build.slot("c", 0),))
    busy = {"LOAD": ("copy", 5.0), "LATE": ("tensor", 1.0), "ONE": ("tensor", 1.0),
            "TWO": ("tensor", 2.0)}  # fmt: skip

    def cost(step: Step) -> StageCost:
        engine, seconds = busy[step.stage]
        return StageCost({engine: seconds}, hold=0.25)

    line = run_shared(build.build(), cost, signal=0.5)
    at = {
        s.stage: (a, b) for s, a, b in zip(line.schedule.steps, line.start, line.end, strict=True)
    }
    assert at["ONE"] == pytest.approx((0, 2.25))  # half of the tensor cores, then its hold
    assert at["TWO"] == pytest.approx((0, 3.25))  # half for 2 s, then all for its last second
    assert at["LATE"] == pytest.approx((5.75, 7.0))


def test_the_plan_is_the_kernels_own_and_its_merge_is_charged(monkeypatch) -> None:
    lengths = (9000, 100, 64, 2000)
    problem = Problem(lengths, 64)
    plans = []

    def plan_decode(*args, **kwargs):
        plans.append(planning.plan_decode(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(model, "plan_decode", plan_decode)
    report = simulate_named(H200, problem, "hopper", capacity=40000)
    (plan,) = plans
    kernel = model.simulated_kernel(H200, problem, plan=plan)
    split = plan.split
    used = np.asarray(split.request) >= 0
    assert kernel.kernel == "decode"
    assert kernel.work.num_workers == split.num_workers == 132
    blocks = (np.asarray(split.block_end) - np.asarray(split.block_start))[used]
    np.testing.assert_array_equal(kernel.work.blocks, blocks)
    assert blocks.sum() == sum(-(-n // 64) for n in lengths)
    items = np.diff(np.asarray(split.worker_start))
    np.testing.assert_array_equal(items, np.bincount(kernel.work.worker, minlength=132))
    np.testing.assert_array_equal(kernel.work.split, np.asarray(split.partial)[used] >= 0)
    assert report.merge == merge_seconds(H200, kernel) > 0
    assert report.seconds == pytest.approx(report.launch + report.cores + report.merge)
    assert report.seconds == simulate(H200, problem, kernel).seconds
    assert report.launch == CONSTANTS["latency.launch"]
    with pytest.raises(ValueError, match="kv_dtype"):
        model.simulated_kernel(H200, Problem(lengths, 64, kv_dtype="fp8"))
    with pytest.raises(ValueError, match="kv_dtype = 'int8', wanted bf16 or fp16"):
        simulate(H200, Problem(lengths, 64, kv_dtype="int8"), kernel)
    with pytest.raises(ValueError, match=r"on A100_SXM4_80GB: core.compute_capability = 8"):
        simulate(PROFILES["A100_SXM4_80GB"], problem, kernel)


def test_work_items_and_merges_cost_what_they_do() -> None:
    one = kernel_of([16], [0], [0])
    assert seconds(one) < seconds(kernel_of([17], [0], [0]))
    # A second item of a worker finds its first block loaded, and so takes less than the first.
    two = kernel_of([16, 16], [0, 0], [0, 1])
    assert seconds(two) - seconds(one) < seconds(one) - CONSTANTS["latency.launch"]
    split = kernel_of([16, 16], [0, 1], [0, 0])
    apart = kernel_of([16, 16], [0, 1], [0, 1])
    assert merge_seconds(H200, apart) == 0 < merge_seconds(H200, split)
    assert seconds(apart) < seconds(split)
    # Where a worker combines its tile's two items by itself, nothing merges later.
    assert merge_seconds(H200, dataclasses.replace(split, kept=np.array([True, True]))) == 0
    more = {2: Merging(64, 2, 2)}
    assert merge_seconds(H200, split) < merge_seconds(
        H200, dataclasses.replace(split, merging=more)
    )


@pytest.mark.parametrize(("name", "holds"), [("decode", 2), ("decode_transposed", 1)])
def test_a_pair_exchanges_once_per_warpgroup(name: str, holds: int) -> None:
    """One CTA sends half of O in float32, and stores the other half in 16 bits."""
    pair = kernel_of([16, 16], [0, 1], [0, 0], kept=[True, True], name=name)
    costs, tuned = hopper_costs(tuned_for_hopper(H200), pair, KEPT), tuned_for_hopper(H200)
    stores = [costs(step) for step in pair.order(1).steps if step.stage.startswith("STORE")]
    half = 64 * 512 / 2 / tuned["engine.store"]
    assert [cost.busy["copy"] for cost in stores] == pytest.approx([4 * half, 2 * half])
    exchange = hopper_constants()["stages"]["store_partial"]
    assert sum(cost.hold for cost in stores) == pytest.approx(holds * exchange)


def test_loads_wait_in_the_queue_of_the_memory() -> None:
    """An item's lanes take the time of the item, and its loads come late by one time."""
    kernel = kernel_of([64] * 128, range(128), range(128), name="decode_transposed")
    problem = Problem((4096,) * 128, 16)
    tuned = tuned_for_hopper(H200)
    times = hopper_times(tuned, problem, kernel)
    line = times.timeline(64)
    assert line.total == pytest.approx(times.cores, rel=1e-3)
    late = {
        cost.latency
        for step, cost in zip(line.schedule.steps, line.costs, strict=True)
        if step.stage.startswith("LOAD")
    }
    (latency,) = late
    assert latency > 3 * tuned["latency.memory"]
    alone = dataclasses.replace(kernel, work=dataclasses.replace(kernel.work, sharers=128))
    (latency,) = {
        cost.latency for cost in hopper_times(tuned, problem, alone).timeline(8).costs
        if cost.latency
    }  # fmt: skip
    assert latency == pytest.approx(tuned["latency.memory"], rel=0.05)


def test_measured_rows_are_predicted() -> None:
    """Rows of benchmarks/measured/h200_decode.json and h200/benchmark whose plans split no tile."""
    worker = [*range(62), *range(62), *range(62, 66)]
    few = kernel_of([64] * 128, range(128), range(128), name="decode_transposed", rows_per_cta=16)
    many = kernel_of([64] * 128, sorted(worker), range(128), ctas_per_tile=2, in_pairs=False)
    work = dataclasses.replace(many.work, num_workers=66, cores_per_item=2, sharers=2)
    many = dataclasses.replace(many, work=work)
    for kernel, heads, us in ((few, 16, 139.9), (many, 128, 230.2)):
        report = simulate(H200, Problem((4096,) * 128, heads), kernel)
        assert report.seconds * 1e6 == pytest.approx(us, rel=0.08)
    for kernel, us in zip(OVER_INT8, (116.8, 82.7), strict=False):
        assert seconds_of_int8(H200, kernel) * 1e6 == pytest.approx(us, rel=0.05)
    # The memory bounds 16 heads, whatever the schedule allows.
    bandwidth = H200["memory.hbm_bandwidth"] * CONSTANTS["memory.hbm_efficiency"]
    least = 128 * 4096 * 1152 / bandwidth
    cores = simulate(H200, Problem((4096,) * 128, 16), few).cores
    assert least < cores < 1.05 * least


def test_the_committed_comparison_is_the_models() -> None:
    """A row with a merge of each int8 kernel, and the ragged one of prefill, of docs/hal.md."""
    committed = json.loads(hopper_errors.RESULT.read_text())["rows"]
    measured = [(card, *found) for card in ("h200", "h100") for found in decode_rows(card)]
    prefill = hopper_errors.prefill_rows()
    assert len(committed) == len(measured) + len(prefill)
    some = {
        row["kernel"]: i
        for i, row in enumerate(committed)
        if (row["card"], row["batch"], row.get("lengths")) == ("h200", 64, "uniform")
        if row["heads"] < 128 and row["kv_len"] == 1024 and row["kernel"].endswith("int8")
    }
    assert len(some) == 2
    for i in some.values():
        assert compared(*measured[i]) == committed[i]
    (ragged,) = (i for i, row in enumerate(prefill) if row["queries"] is None)
    assert hopper_errors.compared_prefill(prefill[ragged]) == committed[len(measured) + ragged]


def test_the_committed_stages_are_the_models() -> None:
    """Of all shapes, as docs/hal.md shows them, and of a run on a GPU that has the same stages."""
    text = portrait_errors.RESULT.read_text()
    committed = json.loads(text)
    assert portrait_errors.renewed(committed) == text
    rows = [row for row in committed["rows"] if row["shape"] == "16x64x4096"]
    assert max(abs(row["error_percent"]) for row in rows) < 25
    run = {"gpu": "NVIDIA H200", "date": "2026-12-02", "commit": "abc1234", "rows": rows[:2]}
    found = json.loads(portrait_errors.renewed(run))
    assert run.items() <= found.items()
    with pytest.raises(ValueError, match="gpu = 'NVIDIA H100', wanted 'NVIDIA H200'"):
        portrait_errors.renewed(run | {"gpu": "NVIDIA H100"})


def test_the_chip_of_an_h100_is_that_of_an_h200() -> None:
    """All constants on the chip are equal; what the user changes is kept."""
    h100 = PROFILES["H100_SXM5"]
    differ = {field for field in h100.numbers if h100[field] != H200[field]}
    of_memory = {f"memory.hbm_{name}" for name in ("bytes", "bandwidth", "efficiency")}
    assert differ == {*of_memory, "engine.tensor_efficiency", "latency.launch"}
    tuned = tuned_for_hopper(h100.with_values({"latency.barrier": 3e-8}))
    assert (tuned["latency.barrier"], tuned["engine.copy"]) == (3e-8, H200["engine.copy"])
    assert tuned["memory.hbm_bandwidth"] == h100["memory.hbm_bandwidth"]
