"""The simulator: what must hold for any machine, and that its shortcuts change nothing."""

import dataclasses
import functools
import math
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax.hal import (
    PROFILES,
    Problem,
    fastest_tiles,
    gpu_kernel,
    plan_tiles,
    schedule_named,
    simulate,
)
from mla_jax.hal.orders import ASCEND_ORDERS, GPU_ORDERS, AscendOrder
from mla_jax.hal.schedule import Schedule, Step
from mla_jax.hal.simulator.ascend_costs import (
    ASCEND_KERNELS,
    INGREDIENTS,
    AscendKernel,
    with_ingredients,
)
from mla_jax.hal.simulator.gpu_costs import KERNELS
from mla_jax.hal.simulator.many_cores import makespan
from mla_jax.hal.simulator.one_core import BlockTimes, StageCost, run_schedule
from mla_jax.hal.work import split_plan_work, whole_tiles
from mla_jax.splits.planner import plan_splits
from pallas_kernels.hopper.choice import choose_tiles
from pallas_kernels.hopper.model import simulated_kernel
from pallas_kernels.hopper.prefill.model import simulated_prefill

H200, TINY = PROFILES["H200_SXM"], Problem((1,), 1)
ORDERS = sorted({**ASCEND_ORDERS, **GPU_ORDERS})
CASES = [("H200_SXM", kernel) for kernel in KERNELS] + [
    ("Ascend910B2", kernel)
    for kernel in ("bf16-serial", "bf16-chunk4", "amla", "int8-v0", "int8-v11")
]


def problem_for(kernel: str, kv_len: int = 3000, batch: int = 7, heads: int = 64) -> Problem:
    dtype = "int8" if kernel.startswith("int8") else "fp8" if kernel.endswith("fp8kv") else "bf16"
    heads = max(heads, 128) if "cluster" in kernel else heads  # two row tiles
    return Problem((kv_len,) * batch, heads, kv_dtype=dtype)


def random_costs(seed: int):  # type: ignore[no-untyped-def]
    """Stage costs drawn by name: the same for the same seed."""

    def costs(step: Step) -> StageCost:
        draw = np.random.default_rng([seed, *map(ord, step.unit + step.stage)])
        engine = {"c": "cube", "m": "tensor", "l": "copy"}.get(step.unit[0], step.unit)
        return StageCost({engine: draw.uniform(0.1, 2)}, draw.uniform(0, 0.5), draw.uniform(0, 1))

    return costs


@given(name=st.sampled_from(ORDERS), blocks=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_no_engine_and_no_unit_is_outrun(name: str, blocks: int, seed: int) -> None:
    line = run_schedule(schedule_named(name)(blocks), random_costs(seed), 0.1)
    assert line.total >= max(line.engine_busy().values()) * (1 - 1e-12)
    work: dict[str, float] = {}
    for step, cost in zip(line.schedule.steps, line.costs, strict=True):
        work[step.unit] = work.get(step.unit, 0.0) + cost.work
    assert line.total >= max(work.values()) * (1 - 1e-12)
    ends = zip(line.schedule.steps, line.end, line.costs, strict=True)
    ended = {given: end + cost.latency for step, end, cost in ends for given in step.gives}
    for step, start in zip(line.schedule.steps, line.start, strict=True):
        assert all(start >= ended[signal] + 0.1 - 1e-12 for signal in step.waits)


def test_units_take_turns_on_an_engine_that_they_share() -> None:
    steps = (Step("a", "QK", 0), Step("b", "PV", 0), Step("a", "QK", 1))
    costs = {
        "a": StageCost({"tensor": 2.0, "cuda": 1.0}, hold=5.0),
        "b": StageCost({"tensor": 3.0}),
    }
    line = run_schedule(Schedule("two", 2, 1, steps), lambda step: costs[step.unit])
    assert (line.start, line.end) == ((0.0, 2.0, 7.0), (7.0, 5.0, 14.0))


@given(name=st.sampled_from(ORDERS), blocks=st.integers(1, 60), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_steady_state_shortcut_equals_the_plain_loop(name: str, blocks: int, seed: int) -> None:
    order, costs = schedule_named(name), random_costs(seed)
    plain = run_schedule(order(blocks), costs, 0.1).total
    assert BlockTimes(order, costs, 0.1)(blocks) == pytest.approx(plain, rel=1e-9)


@given(
    name=st.sampled_from(ORDERS),
    seed=st.integers(0, 99),
    factor=st.floats(1.0, 3.0),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_faster_stage_never_costs_time(
    name: str, seed: int, factor: float, data: st.DataObject
) -> None:
    schedule, slow = schedule_named(name)(9), random_costs(seed)
    stage = data.draw(st.sampled_from(sorted({step.stage for step in schedule.steps})))

    def fast(step: Step) -> StageCost:
        cost = slow(step)
        if step.stage != stage:
            return cost
        return StageCost({e: s / factor for e, s in cost.busy.items()}, cost.hold, cost.latency)

    before, after = run_schedule(schedule, slow).total, run_schedule(schedule, fast).total
    assert after <= before * (1 + 1e-12)


def test_unit_times_leave_the_idle_shares_that_the_field_quotes() -> None:
    """QK = PV = 1, SM 1.2, UP 0.8, sync 0.3, 32 blocks: cube idle 48, 4, 21 and 2 %."""
    seconds = {"QK": 1.0, "PV": 1.0, "SM": 1.2, "UP": 0.8}

    def costs(step: Step) -> StageCost:
        return StageCost({step.unit: seconds[step.stage]})

    quoted = {"chunk1-no-preload": 0.48, "chunk1": 0.04, "chunk2": 0.21, "chunk4": 0.02}
    for name, idle in quoted.items():
        line = run_schedule(schedule_named(name)(32), costs, 0.3)
        assert 1 - 64 / line.total == pytest.approx(idle, abs=0.02), name


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_serial_is_the_sum_of_its_stages(blocks: int) -> None:
    line = run_schedule(schedule_named("serial")(blocks), random_costs(3), 0.0)
    latency = sum(
        c.latency for s, c in zip(line.schedule.steps, line.costs, strict=True) if s.gives
    )
    last = line.costs[-1].latency
    assert line.total == pytest.approx(sum(c.work for c in line.costs) + latency + last)


@pytest.mark.parametrize(("device", "kernel"), CASES)
def test_same_input_same_output(device: str, kernel: str) -> None:
    problem = problem_for(kernel)
    assert simulate(PROFILES[device], problem, kernel).seconds == (
        simulate(PROFILES[device], problem, kernel).seconds
    )


@pytest.mark.parametrize(("device", "kernel"), CASES)
def test_never_faster_than_matrix_unit_or_memory(device: str, kernel: str) -> None:
    profile, problem = PROFILES[device], problem_for(kernel, 16384, 128, 128)
    report = simulate(profile, problem, kernel)
    assert report.seconds >= problem.bytes / profile["memory.hbm_bandwidth"]
    assert report.utilisation < 1.0
    assert sum(report.bubbles.values()) + report.matrix_busy == pytest.approx(1)
    for shares in report.timeline.unit_shares().values():
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) > -1e-9
    assert report.bound_by in ("matrix", "vector", "memory", "sync")
    assert report.seconds == pytest.approx(report.launch + report.cores + report.merge)


@pytest.mark.parametrize(("device", "kernel"), CASES)
def test_time_falls_as_each_part_of_the_machine_speeds_up(device: str, kernel: str) -> None:
    profile = PROFILES[device]
    for batch, kv_len in ((1, 5000), (128, 1800)):  # (a short run has no steady state)
        problem = problem_for(kernel, kv_len, batch)
        start = simulate(profile, problem, kernel).seconds
        for field in profile.numbers:
            if field.startswith(
                ("engine.", "latency.", "memory.l2", "memory.hbm_band", "core.clock")
            ):
                slower_when_more = field.startswith("latency.") or field.endswith("_head")
                factor = 0.7 if slower_when_more else 1.4
                value = profile[field] * factor
                if field.endswith(("efficiency", "share")):
                    value = min(value, 1.0)
                faster = simulate(profile.with_values({field: value}), problem, kernel)
                assert faster.seconds <= start * (1 + 1e-9), field


def test_large_case_is_quick() -> None:
    """(Its own time: the other tests use the same cores.)"""
    for kernel in KERNELS:
        problem = problem_for(kernel, 16384, 128, 128)
        begin = time.process_time()
        simulate(PROFILES["H200_SXM"], problem, kernel)
        assert time.process_time() - begin < 1.0


@given(seed=st.integers(0, 999), workers=st.integers(1, 9), pieces=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_sharing_the_memory_lies_between_crowded_and_alone(
    seed: int, workers: int, pieces: int
) -> None:
    draw = np.random.default_rng(seed)
    crowded = draw.uniform(0.5, 2, pieces)
    alone = crowded * draw.uniform(0.3, 1, pieces)
    worker = draw.integers(0, workers, pieces)
    shared = makespan(crowded, alone, worker, workers)
    assert makespan(alone, alone, worker, workers) <= shared * (1 + 1e-9)
    assert shared <= makespan(crowded, crowded, worker, workers) * (1 + 1e-9)


@pytest.mark.parametrize("worker", [np.arange(8) % 4, np.full(8, -1)])
def test_both_ways_of_handing_out_agree(worker: np.ndarray) -> None:
    """Times that differ by nothing that counts take the event loop, equal ones do not."""
    seconds = np.linspace(1, 2, 8)
    whole = makespan(seconds, seconds, worker, 4)
    assert makespan(seconds, seconds * (1 - 1e-12), worker, 4) == pytest.approx(whole)


def test_the_last_worker_has_the_memory_to_itself() -> None:
    crowded, alone = np.array([2.0, 4.0]), np.array([1.0, 2.0])
    # Both run at half speed till the first is done at 2; the other is then half way, and needs
    # half of 2 + (4 - 2) / 2.
    assert makespan(crowded, alone, np.arange(2), 2) == pytest.approx(3.5)


def test_our_own_split_plan_can_be_timed() -> None:
    """A kernel that walks a SplitPlan: a ragged batch, balanced, beats whole tiles."""
    lengths = (9000, 100, 4000, 64, 2000)
    problem = Problem(lengths, 64)
    plan = plan_splits(jnp.asarray(lengths), num_workers=132, rows=64)
    ours = split_plan_work(plan, problem)
    assert ours.blocks.sum() == sum(-(-n // 64) for n in lengths)
    assert ours.worker.max() < 132
    seesaw = KERNELS["flashmla_dense"](H200)
    split = dataclasses.replace(seesaw, plan=lambda _: ours)
    whole = dataclasses.replace(
        seesaw, plan=functools.partial(whole_tiles, tile_rows=64, block_kv=64, workers=132)
    )
    assert simulate(H200, problem, split).seconds < simulate(H200, problem, whole).seconds / 3
    assert simulate(H200, problem, split).seconds == pytest.approx(
        simulate(H200, problem, seesaw).seconds, rel=0.25
    )


def test_verdicts() -> None:
    h200 = PROFILES["H200_SXM"]
    few_heads = simulate(h200, Problem((16384,) * 128, 16), "flashmla_dense")
    many = simulate(h200, Problem((16384,) * 128, 128), "flashmla_dense")
    alone = simulate(h200, Problem((64,), 16), "flashmla_dense")
    assert (few_heads.bound_by, many.bound_by, alone.bound_by) == ("memory", "matrix", "sync")


def test_the_round_trip_of_o_costs_chunk_4_what_amla_gains() -> None:
    """With 256 rows per tile. With int8, or without O's traffic, the cube is not the bound."""
    profile, problem = PROFILES["Ascend910B2"], Problem((16384,) * 24, 128, 2)
    kernel = dataclasses.replace(ASCEND_KERNELS["bf16-chunk4"], q_tokens=2)
    chunk4, amla = (simulate(profile, problem, k) for k in (kernel, "amla"))
    assert (chunk4.bound_by, amla.bound_by) == ("memory", "matrix")
    assert amla.bubbles["steady"] < 0.01
    assert 1.05 < chunk4.seconds / amla.seconds < 1.4
    wide = profile.with_values({"engine.gm_read": 1e12})  # O costs nothing
    assert simulate(wide, problem, kernel).seconds < 1.03 * simulate(wide, problem, "amla").seconds
    int8 = simulate(profile, Problem((16384,) * 24, 128, kv_dtype="int8"), "int8-chunk4")
    assert int8.bound_by != "matrix"


def test_amla_needs_no_round_trip() -> None:
    problem = Problem((8192,) * 24, 128, 2)
    amla = simulate(PROFILES["Ascend910B2"], problem, "amla").timeline.engine_busy()
    two = dataclasses.replace(ASCEND_KERNELS["bf16-chunk1"], q_tokens=2)
    multiply = simulate(PROFILES["Ascend910B2"], problem, two).timeline.engine_busy()
    assert amla["mte2v"] < multiply["mte2v"] / 2


@pytest.mark.parametrize("name", INGREDIENTS)
def test_each_ingredient_of_v11_helps_or_costs_little(name: str) -> None:
    profile, problem = PROFILES["Ascend910B1"], Problem((4096,), 128, kv_dtype="int8")
    first = ASCEND_KERNELS["int8-v0"]
    changed = with_ingredients(first, name)
    assert changed != first
    ratio = simulate(profile, problem, first).seconds / simulate(profile, problem, changed).seconds
    assert 0.95 < ratio < 1.3


def test_nd_cache_costs_a_conversion() -> None:
    profile, problem = PROFILES["Ascend910B1"], Problem((8192,) * 24, 128)
    nz = ASCEND_KERNELS["bf16-chunk4"]
    nd = dataclasses.replace(nz, convert_load=True)
    assert simulate(profile, problem, nd).seconds > simulate(profile, problem, nz).seconds


def test_q2_jobs_pay_under_mtp() -> None:
    profile, problem = PROFILES["Ascend910B1"], Problem((8192,) * 24, 128, 2)
    one = ASCEND_KERNELS["bf16-chunk4"]
    two = dataclasses.replace(one, q_tokens=2)
    gain = simulate(profile, problem, one).seconds / simulate(profile, problem, two).seconds
    assert 1.1 < gain < 1.3  # the field quotes about 20 % for it and load balancing


def test_amla_on_the_package_of_two_dies() -> None:
    profile = PROFILES["Ascend910C"]
    report = simulate(profile, Problem((16384,) * profile.cores, 128, 2), "amla")
    assert report.tflops == pytest.approx(614, rel=0.03)
    assert report.bound_by == "matrix"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AscendKernel("x", AscendOrder(), head_group=0), "head_group = 0"),
        (lambda: AscendKernel("x", AscendOrder(), q_tokens=3), "q_tokens = 3"),
        (lambda: AscendKernel("x", AscendOrder(), kv_dtype="fp4"), "kv_dtype = 'fp4'"),
        (lambda: AscendKernel("x", AscendOrder(signals=2)), "signals = 2 needs kv_dtype"),
        (lambda: AscendKernel("x", ASCEND_ORDERS["amla"], kv_dtype="int8"), "AMLA"),
        (lambda: Problem((1, -1), 16), r"kv_lens\[1\] must be at least 0, got -1"),
        (lambda: Problem((), 16), "the number of kv_lens must be a positive integer, got 0"),
        (lambda: Problem((1,), 0), "Problem: heads must be a positive integer, got 0"),
        (lambda: Problem((1,), 1, kv_dtype="int3"), "kv_dtype must be one of bf16, .* got 'int3'"),
        (lambda: plan_tiles(H200, TINY, block_kv=0), "block_kv must be a positive integer, got 0"),
        (lambda: simulate(H200, TINY, "amla"), "kernel = 'amla'.*seesaw"),
        (lambda: simulate(PROFILES["Ascend910B1"], TINY, "fa2"), "kernel = 'fa2'.*chunk4"),
        (lambda: simulate(H200, TINY, ASCEND_KERNELS["amla"]), "does not run"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Problem((64.5,), 16), r"kv_lens\[0\] must be an integer, got 64.5 of type float"),
        (lambda: Problem((True,), 16), r"kv_lens\[0\] must be an integer, got True"),
        (lambda: Problem(np.array([math.nan]), 16), r"kv_lens\[0\] must be an integer, got .*nan"),
        (lambda: Problem("64", 16), "kv_lens must be a tuple, .* got '64' of type str"),
        (lambda: Problem(3, 16), "kv_lens must be a tuple, .* got 3 of type int"),
        (lambda: Problem((64,), True), "Problem: heads must be an integer, got True"),
        (lambda: Problem((64,), "16"), "Problem: heads must be an integer, got '16'"),
        (lambda: Problem((64,), None), "Problem: heads must be an integer, got None"),
        (lambda: Problem((64,), 16, s_q=1.5), "Problem: s_q must be an integer, got 1.5"),
        (lambda: simulate("H200", TINY, "seesaw"), "profile must be a HardwareProfile, got str"),
        (lambda: simulate(H200, None, "seesaw"), "problem must be a Problem, got NoneType"),
        (lambda: plan_tiles("H200_SXM", TINY), "profile must be a HardwareProfile, got str"),
        (lambda: choose_tiles("H200_SXM", TINY), "profile must be a HardwareProfile, got str"),
        (lambda: choose_tiles(H200, None), "problem must be a Problem, got NoneType"),
        (lambda: simulated_kernel("H200_SXM", TINY), "profile must be a HardwareProfile, got str"),
        (lambda: simulated_prefill("H200_SXM", TINY), "profile must be a HardwareProfile, got str"),
        (lambda: gpu_kernel(len)("H200_SXM"), "profile must be a HardwareProfile, got str"),
        (lambda: gpu_kernel(3), "order must be a function from a number of KV blocks, got 3"),
        (lambda: simulate(H200, TINY, gpu_kernel(len)), "; call a function from a profile, as"),
        (lambda: plan_tiles(H200, None), "problem must be a Problem, got NoneType"),
        (lambda: plan_tiles(H200, TINY, block_q=1.5), "block_q must be an integer, got 1.5"),
        (lambda: fastest_tiles(H200, None, ()), "problem must be a Problem, got NoneType"),
    ],
)
def test_bad_types_are_named(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypeError, match=message):
        make()


def test_lengths_may_be_a_numpy_array() -> None:
    problem = Problem(np.array([64, 3], np.int32), np.int64(16))
    assert problem == Problem((64, 3), 16)
    assert {type(n) for n in (*problem.kv_lens, problem.heads)} == {int}


def test_empty_and_odd_lengths() -> None:
    for device, kernel in CASES:
        report = simulate(
            PROFILES[device], dataclasses.replace(problem_for(kernel), kv_lens=(0, 1, 65)), kernel
        )
        assert math.isfinite(report.seconds)
        assert report.seconds > 0
