"""Mutations: a changed wait, step, slot, buffer or cost changes the verdict or the time."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest

from mla_jax.hal import (
    ASCEND_ORDERS,
    GPU_ORDERS,
    PROFILES,
    AscendOrder,
    HardwareProfile,
    IllegalScheduleError,
    Problem,
    Schedule,
    TilePlanError,
    plan_tiles,
    simulate,
)
from mla_jax.hal.schedule import Signal, Step
from mla_jax.hal.simulator import limits
from mla_jax.hal.simulator.ascend_costs import ASCEND_KERNELS, AscendKernel, ascend_costs
from mla_jax.hal.simulator.gpu_costs import KERNELS, Kernel, gpu_costs, with_block
from mla_jax.hal.simulator.one_core import BlockTimes, StageCost, run_schedule
from mla_jax.hal.work import Work

H200, ASCEND = PROFILES["H200_SXM"], PROFILES["Ascend910B1"]
ORDERS = {**ASCEND_ORDERS, **GPU_ORDERS}
ASCEND_NAMES = ("bf16-serial", "bf16-chunk4", "amla", "int8-v0", "int8-v11")
CASES = [(H200, name) for name in KERNELS] + [(ASCEND, name) for name in ASCEND_NAMES]
IDS = [name for _, name in CASES]


def problem_for(name: str, kv_len: int = 20000, batch: int = 2) -> Problem:
    dtype = "int8" if name.startswith("int8") else "fp8" if name.endswith("fp8kv") else "bf16"
    return Problem((kv_len,) * batch, 128, kv_dtype=dtype)


def kernel_of(profile: HardwareProfile, name: str) -> Kernel | AscendKernel:
    return KERNELS[name](profile) if profile.family == "nvidia" else ASCEND_KERNELS[name]


class Changed(AscendOrder):
    """An Ascend order whose schedules are changed by a function."""

    def __init__(self, order: AscendOrder, change: Callable[[Schedule], Schedule]) -> None:
        super().__init__(**{f.name: getattr(order, f.name) for f in dataclasses.fields(order)})
        object.__setattr__(self, "_change", change)

    def __call__(self, num_blocks: int) -> Schedule:
        return self._change(super().__call__(num_blocks))  # type: ignore[attr-defined]


def with_orders(
    kernel: Kernel | AscendKernel, change: Callable[[Schedule], Schedule]
) -> Kernel | AscendKernel:
    """The kernel, with every schedule changed."""
    if isinstance(kernel, AscendKernel):
        return dataclasses.replace(kernel, order=Changed(kernel.order, change))
    orders = tuple(lambda n, order=order: change(order(n)) for order in kernel.orders)
    return dataclasses.replace(kernel, orders=orders)


def outcome(profile: HardwareProfile, problem: Problem, kernel: object) -> float | str:
    """Seconds of a call, or why it is refused."""
    try:
        return simulate(profile, problem, kernel).seconds  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)


def with_step(schedule: Schedule, index: int, *steps: Step) -> Schedule:
    """The schedule with other steps, or none, in the place of step `index`."""
    kept = schedule.steps
    return dataclasses.replace(schedule, steps=(*kept[:index], *steps, *kept[index + 1 :]))


@pytest.mark.parametrize("name", ORDERS)
def test_without_any_one_wait_nothing_times_a_schedule(name: str) -> None:
    """The builder puts in no wait too many, so that each is needed."""
    schedule = ORDERS[name](4)
    tried = 0
    for index, step in enumerate(schedule.steps):
        for dropped in step.waits:
            waits = tuple(signal for signal in step.waits if signal != dropped)
            changed = with_step(schedule, index, dataclasses.replace(step, waits=waits))
            with pytest.raises(IllegalScheduleError, match=rf"^{name}: step \d+, [\w@]+\(-?\d+\)"):
                run_schedule(changed, lambda _: StageCost({"tensor": 1.0}))
            tried += 1
    assert tried == schedule.num_signals > 4


@pytest.mark.parametrize(("profile", "name"), CASES, ids=IDS)
def test_simulate_refuses_each_kernel_without_a_wait_a_slot_or_a_step(
    profile: HardwareProfile, name: str
) -> None:
    kernel, problem = kernel_of(profile, name), problem_for(name)

    def refused(change: Callable[[Schedule], Schedule], message: str) -> None:
        with pytest.raises(IllegalScheduleError, match=message):
            simulate(profile, problem, with_orders(kernel, change))

    def unwaited(schedule: Schedule, which: int) -> Schedule:
        waiting = [i for i, step in enumerate(schedule.steps) if step.waits]
        index = waiting[which % len(waiting)]
        return with_step(schedule, index, dataclasses.replace(schedule.steps[index], waits=()))

    for which in (0, 7, -1):
        refused(functools.partial(unwaited, which=which), r"step \d+, [\w@]+\(")
    order = kernel.orders[0] if isinstance(kernel, Kernel) else kernel.order
    few = order(3)
    for buffer in few.buffers:

        def smaller(schedule: Schedule, buffer: str = buffer) -> Schedule:
            slots = schedule.buffers | {buffer: schedule.buffers[buffer] - 1}
            return dataclasses.replace(schedule, buffers=slots)

        refused(smaller, rf"step \d+, .*{buffer}\[\d+\] does not exist, {buffer} has \d+ slots")
    whole = (
        functools.partial(limits.require_whole_on_gpu, kernel)
        if isinstance(kernel, Kernel)
        else limits.require_whole_on_ascend
    )
    for index, step in enumerate(few.steps):
        if step.stage == "ISSUE":  # has a cost and no data
            continue

        def without(schedule: Schedule, index: int = index) -> Schedule:
            return with_step(schedule, index)

        with pytest.raises(IllegalScheduleError):
            limits.checked_order(lambda n: without(order(n)), whole)(3)
        mine = {access.buffer for access in step.reads if access.block in (step.block, -1)}
        for buffer in mine - {"state", "state@1", "S_rope"}:  # whose waits follow from other data
            reads = tuple(access for access in step.reads if access.buffer != buffer)
            changed = with_step(few, index, dataclasses.replace(step, reads=reads))
            with pytest.raises(IllegalScheduleError, match=rf"does not read {buffer}|no step UP"):
                whole(changed)


def test_an_order_must_return_a_schedule_of_so_many_blocks() -> None:
    kernel = kernel_of(H200, "flashmla_dense")
    refused = with_orders(kernel, lambda s: dataclasses.replace(s, num_blocks=s.num_blocks + 1))
    with pytest.raises(IllegalScheduleError, match="seesaw: num_blocks = 2, wanted 1"):
        simulate(H200, problem_for(""), refused)
    with pytest.raises(TypeError, match="an order must return a Schedule, got str"):
        simulate(H200, problem_for(""), dataclasses.replace(kernel, orders=(lambda _: "seesaw",)))
    with pytest.raises(TypeError, match=r"kernel must be a name, .*got 3"):
        simulate(H200, problem_for(""), 3)  # type: ignore[arg-type]
    steps = (
        Step("a", "QK", 0, waits=(Signal("PV", 0),)),
        Step("b", "PV", 0, gives=(Signal("PV", 0),)),
    )
    late = Schedule("late", 1, 1, steps)
    for run in (lambda: run_schedule(late, lambda _: StageCost({})),
                lambda: BlockTimes(lambda _: late, lambda _: StageCost({}))(1)):  # fmt: skip
        with pytest.raises(IllegalScheduleError, match=r"late: step 0, QK\(0\).*later step"):
            run()


# Stages that take too little to show at twice their cost, since another unit works meanwhile.
HIDDEN = {
    "flashinfer_fa3_fp8kv": {"ISSUE"},
}


@pytest.mark.parametrize(("profile", "name"), CASES, ids=IDS)
def test_each_stage_that_costs_twice_as_much_takes_time(
    profile: HardwareProfile, name: str
) -> None:
    """Other work may hide a stage in a long run, but not in each of the short ones."""
    kernel, problem = kernel_of(profile, name), problem_for(name)
    cases = [(rows, share) for rows in (1, 64) for share in (3e10, 1e12)]
    if isinstance(kernel, Kernel):
        order = kernel.orders[0]
        costs = [gpu_costs(profile, kernel, rows, True, problem.kv_dtype, share)
                 for rows, share in cases]  # fmt: skip
    else:
        order, tile = kernel.order, plan_tiles(profile, dataclasses.replace(problem, kv_lens=(1,)))
        costs = [ascend_costs(profile, kernel, tile, rows, share) for rows, share in cases]
    schedules = [order(blocks) for blocks in (1, 2, 3, 5)]
    times = [[run_schedule(schedule, cost).total for schedule in schedules] for cost in costs]

    def slower(cost: StageCost, by: float) -> StageCost:
        busy = {engine: by * seconds for engine, seconds in cost.busy.items()}
        return StageCost(busy, by * cost.hold, by * cost.latency)

    def takes_time(stage: str, by: float) -> bool:
        return any(
            run_schedule(
                schedule, lambda s, cost=cost: slower(cost(s), by if s.stage == stage else 1.0)
            ).total > total * (1 + 1e-6)
            for cost, totals in zip(costs, times, strict=True)
            for schedule, total in zip(schedules, totals, strict=True)
        )  # fmt: skip

    stages = {step.stage for step in schedules[-1].steps}
    assert {stage for stage in stages if not takes_time(stage, 2)} == HIDDEN.get(name, set())
    assert all(takes_time(stage, 50) for stage in stages)


@pytest.mark.parametrize(("profile", "name"), CASES, ids=IDS)
def test_a_buffer_one_byte_too_small_changes_the_plan_or_is_refused(
    profile: HardwareProfile, name: str
) -> None:
    """The plan, the time or the verdict."""
    problem, kernel = problem_for(name), kernel_of(profile, name)
    small = Problem((512,), 128, kv_dtype=problem.kv_dtype)
    if isinstance(kernel, Kernel):
        first = kernel.orders[0](1)
        uses = limits.gpu_uses(kernel, first.buffers, item=2)
        needed = {
            f"buffer.{memory}": sum(use.bytes for use in uses if use.buffer == memory)
            for memory in ("shared", "registers")
        }
        needed["buffer.registers"] //= 4
    else:
        needed = {f"buffer.{k}": v for k, v in plan_tiles(profile, small).used().items()}
    start = simulate(profile, problem, kernel).seconds
    for field, bytes_ in needed.items():
        assert outcome(profile.with_values({field: bytes_}), problem, kernel) == start, field
        smaller = profile.with_values({field: bytes_ - 1})
        short = outcome(smaller, problem, kernel)
        if isinstance(kernel, Kernel):
            assert f"{profile.name}, {name}: {field.partition('.')[2]} holds" in str(short)
        elif short == start:
            assert plan_tiles(smaller, small).tiles != plan_tiles(profile, small).tiles, field


# Kernels and problems by family. Together they depend on every field of a profile.
PROBES: dict[str, list[tuple[str, Problem]]] = {
    "nvidia": [
        ("flashmla_dense", Problem((16384, 300), 128)),
        ("flashinfer_fa2", Problem((4096,) * 4, 64)),
        ("flashmla_dense", Problem((8192,) * 8, 128)),
        ("flashinfer_fa3_fp8kv", Problem((16384,), 64, kv_dtype="fp8")),
        ("sglang_triton", Problem((4096,) * 8, 16)),
        ("flashmla_dense", Problem((200_000,), 16)),  # 230 MB
    ],
    "ascend": [
        ("bf16-chunk4", Problem((8192,) * 24, 128, 2)),
        ("bf16-serial", Problem((2048,) * 30, 16)),
        ("int8-v0", Problem((4096,), 128, kv_dtype="int8")),
        ("amla", Problem((8192,) * 24, 128, 2)),
        ("bf16-serial", Problem((4 * 10**7,), 16)),  # 46 of 64 GB
    ],
}


@pytest.mark.parametrize("profile", [H200, ASCEND], ids=lambda p: p.family)
def test_every_field_of_a_profile_counts(profile: HardwareProfile) -> None:
    """Each changes a time, a verdict or a peak, if it is made larger or smaller."""

    probes = PROBES[profile.family]
    before = [outcome(profile, problem, name) for name, problem in probes]

    def counts(field: str, value: float) -> bool:
        try:
            changed = profile.with_values({field: value})
        except ValueError:  # no such machine
            return False
        if changed.peak("int8") != profile.peak("int8") and profile.family == "nvidia":
            return True  # no kernel here multiplies int8 on a GPU
        return any(
            outcome(changed, problem, name) != was
            for (name, problem), was in zip(probes, before, strict=True)
        )

    for field, number in profile.numbers.items():
        assert any(counts(field, number.value * by) for by in (0.5, 0.125, 2, 0.62, 0.35, 1e-3)), (
            field
        )


@pytest.mark.parametrize(
    "change",
    [
        {"tail_row_sum": True}, {"unit_flags": True}, {"fractal_layout": False},
        {"convert_load": True}, {"head_group": 4}, {"update_ping_pong": True}, {"block_kv": 128},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_of_an_ascend_kernel_counts(change: dict) -> None:
    """Somewhere: the layout of S and P only where loading P is not hidden behind FixPipe."""
    nd = AscendKernel("nd", ASCEND_ORDERS["chunk4"], convert_load=True, q_tokens=2)
    cases = [(nd, Problem((8192,) * 24, 128, 2)), (ASCEND_KERNELS["int8-v0"], problem_for("int8"))]
    cases.append((ASCEND_KERNELS["bf16-chunk4"], problem_for("")))
    assert any(
        simulate(ASCEND, problem, kernel).seconds
        != simulate(ASCEND, problem, dataclasses.replace(kernel, **change)).seconds
        for kernel, problem in cases
    )


def _planned(change: Callable[[Work], Work]) -> Kernel:
    kernel = KERNELS["flashmla_dense"](H200)
    return dataclasses.replace(kernel, plan=lambda problem: change(kernel.plan(problem)))


def _without_item(plan: Work) -> Work:
    return dataclasses.replace(
        plan, blocks=plan.blocks[1:], rows=plan.rows[1:], worker=plan.worker[1:], tile=plan.tile[1:]
    )


@pytest.mark.parametrize(
    ("profile", "kernel", "problem", "error", "message"),
    [
        (H200, _planned(_without_item), Problem((1024,) * 64, 64), ValueError,
         "work items hold .* wanted at least"),
        (H200, _planned(lambda plan: dataclasses.replace(plan, num_workers=133)),
         Problem((64,), 64), ValueError, "133 workers of 1 cores, wanted at most 132"),
        (H200, _planned(lambda plan: dataclasses.replace(plan, worker=plan.worker + 132)),
         Problem((64,), 64), ValueError, "wanted items for workers 0 to 131"),
        (PROFILES["A100_SXM4_80GB"], "seesaw", problem_for(""), ValueError,
         r"flashmla_dense on A100.*compute_capability = 8, wanted at least 9 .*wgmma"),
        (PROFILES["L40"], with_block(KERNELS["flashinfer_fa2"](PROFILES["L40"]), 32),
         problem_for(""), TilePlanError, r"L40, flashinfer_fa2: shared holds 101376 bytes"),
        (H200, dataclasses.replace(KERNELS["flashmla_dense"](H200), block_q=128, block_kv=16),
         problem_for(""), TilePlanError, "registers holds 262144 bytes"),
        (H200, "flashmla_dense", problem_for("int8"), ValueError, "kv_dtype = 'int8', wanted bf16"),
        (H200, "fp8-widen", problem_for(""), ValueError, "kv_dtype = 'bf16', wanted fp8"),
        (H200, "seesaw", Problem((64,), 16, page_size=16), ValueError,
         "page_size = 16, wanted a multiple of block_kv = 64"),
        (H200, "seesaw", Problem((2 * 10**8,), 16), TilePlanError, "hbm holds 141000000000 bytes"),
        (ASCEND, "int8-v11", problem_for(""), ValueError, "kv_dtype = 'bf16', wanted 'int8'"),
        (ASCEND, "bf16-chunk-n", Problem((10**7,) * 24, 128), TilePlanError,
         "hbm holds .*workspace"),
        (ASCEND, AscendKernel("wide", ASCEND_ORDERS["chunk1"], block_kv=1024), problem_for(""),
         TilePlanError, "ub holds 196608 bytes"),
    ],
)  # fmt: skip
def test_what_a_device_can_not_run_is_refused(
    profile: HardwareProfile, kernel: object, problem: Problem, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        simulate(profile, problem, kernel)  # type: ignore[arg-type]


def test_three_stages_of_64_keys_do_not_fit() -> None:
    kernel = KERNELS["flashmla_dense"](H200)
    orders = tuple(functools.partial(order, stages=3) for order in kernel.orders)
    with pytest.raises(TilePlanError, match="shared holds 232448 bytes, the plan needs 295"):
        simulate(H200, problem_for(""), dataclasses.replace(kernel, orders=orders))


def test_p_takes_memory_only_beside_its_rope_keys() -> None:
    kernel = KERNELS["flashmla_dense"](H200)
    slots = kernel.orders[0](1).buffers
    for rows, bytes_ in ((64, 0), (128, 2 * 64 * (2 * 128 - 128))):  # two P of 64 keys
        uses = limits.gpu_uses(dataclasses.replace(kernel, block_q=rows), slots, item=2)
        assert sum(use.bytes for use in uses if use.what.startswith("P ")) == bytes_


def test_the_share_of_the_peak_is_that_of_the_dtypes() -> None:
    """An int8 call multiplies 64 of its 1088 values per row and token in bf16."""
    for profile, name, int8 in ((H200, "seesaw", 0), (ASCEND, "bf16-chunk4", 0),
                                (ASCEND, "int8-v11", 1024)):  # fmt: skip
        problem = problem_for(name)
        report = simulate(profile, problem, name)
        pairs = 2.0 * problem.rows * sum(problem.kv_lens)
        seconds = pairs * ((1088 - int8) / profile.peak("bf16") + int8 / profile.peak("int8"))
        assert report.utilisation == pytest.approx(seconds / report.seconds)


def test_l2_counts_where_it_no_longer_holds_what_is_shared() -> None:
    """Row tiles then read their keys from HBM each, and PV its values once more."""
    small = H200.with_values({"buffer.l2": 1e6})
    call = Problem((4096,) * 64, 128)
    assert simulate(small, call, "seesaw").seconds > 1.05 * simulate(H200, call, "seesaw").seconds
    long = Problem((32768,) * 24, 128)
    larger = ASCEND.with_values({"buffer.l2": 8e9})
    assert simulate(larger, long, "chunk-n").seconds < simulate(ASCEND, long, "chunk-n").seconds


def test_an_ascend_order_is_a_kernel() -> None:
    order = AscendOrder("mine", chunk=3, preload=1, update="chunk")
    report = simulate(ASCEND, problem_for(""), order)
    assert report.name == "mine"
    assert np.isfinite(report.seconds)
