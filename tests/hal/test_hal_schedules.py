"""Schedules: every order is legal for any number of blocks, and whatever breaks one is named."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax.hal import ASCEND_ORDERS, GPU_ORDERS, AscendOrder, IllegalScheduleError, schedule_named
from mla_jax.hal.schedule import Schedule, Signal, Step

ORDERS = {**ASCEND_ORDERS, **GPU_ORDERS}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 7, 16])
def test_published_orders_are_legal(name: str, num_blocks: int) -> None:
    schedule = schedule_named(name)(num_blocks)
    schedule.check()
    stages = [step for step in schedule.steps if step.stage.startswith(("QK", "PV"))]
    assert {step.block for step in stages} == set(range(num_blocks))


@given(
    num_blocks=st.integers(1, 12),
    chunk=st.integers(0, 5),
    preload=st.integers(0, 3),
    rescale=st.sampled_from(["multiply", "exponent_add"]),
    signals=st.integers(1, 2),
    update=st.sampled_from(["block", "chunk"]),
    slots=st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_any_combination_of_options_is_legal(
    num_blocks: int, chunk: int, preload: int, rescale: str, signals: int, update: str, slots: int
) -> None:
    if rescale == "exponent_add":
        update = "block"
    order = AscendOrder("any", chunk, preload, rescale, signals, update, slots)
    order(num_blocks).check()


def test_a_lost_signal_is_a_deadlock_that_names_the_step() -> None:
    schedule = schedule_named("chunk1")(3)
    index = next(i for i, s in enumerate(schedule.steps) if s.stage == "PV" and s.block == 1)
    step = dataclasses.replace(schedule.steps[index], waits=(Signal("SM", 9),))
    with pytest.raises(
        IllegalScheduleError, match=rf"step {index}, PV\(1\) on cube: deadlock.*SM\(9\)"
    ):
        _with_step(schedule, index, step).check()


def test_circular_waits_are_a_deadlock() -> None:
    steps = (
        Step("cube", "QK", 0, waits=(Signal("SM", 0),), gives=(Signal("QK", 0),)),
        Step("vector", "SM", 0, waits=(Signal("QK", 0),), gives=(Signal("SM", 0),)),
    )
    with pytest.raises(IllegalScheduleError, match=r"step 0, QK\(0\) on cube: deadlock.*too late"):
        Schedule("circle", 1, 1, steps, {}).check()


def test_pv_before_its_softmax_is_named() -> None:
    schedule = schedule_named("serial")(2)
    steps = list(schedule.steps)
    steps[1], steps[2] = steps[2], dataclasses.replace(steps[1])
    steps[1] = dataclasses.replace(steps[1], waits=())
    with pytest.raises(
        IllegalScheduleError, match=r"PV\(0\) on cube: reads P\[0\] before anything"
    ):
        dataclasses.replace(schedule, steps=tuple(steps)).check()


def test_a_slot_used_again_too_early_is_named() -> None:
    schedule = schedule_named("chunk4")(4)
    fewer = tuple(
        dataclasses.replace(
            step,
            reads=tuple(a._replace(slot=0) if a.buffer == "S" else a for a in step.reads),
            writes=tuple(a._replace(slot=0) if a.buffer == "S" else a for a in step.writes),
        )
        for step in schedule.steps
    )
    with pytest.raises(IllegalScheduleError, match=r"QK\(1\) on cube: overwrites S\[0\] while"):
        dataclasses.replace(schedule, steps=fewer).check()


def test_a_slot_that_does_not_exist_is_named() -> None:
    schedule = schedule_named("chunk2")(4)
    with pytest.raises(IllegalScheduleError, match=r"S\[1\] does not exist, S has 1 slots"):
        dataclasses.replace(schedule, buffers=schedule.buffers | {"S": 1}).check()


def test_workspace_grows_with_the_chunk() -> None:
    def bytes_of(name: str, itemsize: int = 2) -> int:
        return ASCEND_ORDERS[name].workspace_bytes(16, 128, 512, itemsize)

    assert bytes_of("chunk1-no-preload") < bytes_of("chunk2") < bytes_of("chunk4")
    assert bytes_of("chunk4", itemsize=1) < bytes_of("chunk4", itemsize=2)
    assert bytes_of("amla") < bytes_of("chunk1")  # AMLA has no Otmp


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": -1}, "chunk = -1"),
        ({"preload": 9}, "preload = 9"),
        ({"rescale": "shift"}, "rescale = 'shift'"),
        ({"signals": 3}, "signals = 3"),
        ({"update": "row"}, "update = 'row'"),
        ({"rescale": "exponent_add", "update": "chunk"}, "AMLA has no UP"),
    ],
)
def test_impossible_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AscendOrder("wrong", **options)


def test_unknown_order_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"schedule = 'chunk3'.*chunk4.*seesaw"):
        schedule_named("chunk3")


def _with_step(schedule: Schedule, index: int, step: Step) -> Schedule:
    steps = (*schedule.steps[:index], step, *schedule.steps[index + 1 :])
    return dataclasses.replace(schedule, steps=steps)
