"""Time stamps of the decode kernels: nothing of them is in a kernel without, and what they mean."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.simulated.portrait_lanes import measured_spans, simulated_spans, stage_errors
from mla_jax.hal import PROFILES
from mla_jax.hal.hopper_orders import hopper_decode
from mla_jax.hal.schedule import Step
from mla_jax.hal.simulator.one_core import StageCost, run_schedule
from pallas_kernels.hopper import attention, planning, portrait
from pallas_kernels.hopper.parts import stamps as at


@functools.cache
def arguments(heads: int):
    """The shapes of q, pages, tables, lens and plan."""

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    plan = jax.eval_shape(
        functools.partial(planning.plan_decode, rows=heads, profile=PROFILES["H200_SXM"]), ints(40)
    )
    q = jax.ShapeDtypeStruct((40, heads, 576), jnp.bfloat16)
    pages = jax.ShapeDtypeStruct((1000, 64, 576), jnp.bfloat16)
    return q, pages, ints(40, 50), ints(40), plan


def program(attend, heads: int) -> str:
    """The whole program of a launch, its kernel included, which alone decides the machine code."""
    traced = jax.make_jaxpr(attend)(*arguments(heads))
    return re.sub(r" at 0x[0-9a-f]+", "", str(traced))


def plain(heads: int):
    def attend(q, pages, tables, lens, plan):
        return attention.attend.__wrapped__(
            q, pages, tables, lens, None, plan, num_heads=heads, kv_lora_rank=512,
            softmax_scale=0.1, causal=True,
        )  # fmt: skip

    return attend


@pytest.mark.parametrize("heads", [16, 64])
def test_a_kernel_without_stamps_is_as_if_there_were_none(monkeypatch, heads: int) -> None:
    with_option_off = program(plain(heads), heads)
    for method in ("block", "item"):
        monkeypatch.setattr(at.Stamps, method, lambda *_: None)
    assert program(plain(heads), heads) == with_option_off
    monkeypatch.undo()
    stamped = functools.partial(
        portrait.attend_with_stamps.__wrapped__, num_heads=heads, softmax_scale=0.1
    )
    assert len(program(stamped, heads)) > len(with_option_off)


ITEM_ROW = at.BLOCKS
STAMPED = {  # (warpgroup, row, point) -> nanoseconds, of an item of two blocks
    (2, ITEM_ROW, at.LOAD_Q): 0, (2, ITEM_ROW, at.LOADED_Q): 100,
    (0, ITEM_ROW, at.ITEM): 20, (0, ITEM_ROW, at.KERNEL_END): 5020,
    (0, 0, at.WAIT): 50, (0, 0, at.QK): 900, (0, 0, at.SM): 1500, (0, 0, at.PUBLISHED): 1800,
    (0, 0, at.END): 2300, (0, 1, at.WAIT_P): 2310, (0, 1, at.PV): 2600, (0, 1, at.END): 3000,
    (1, 1, at.WAIT): 60, (1, 1, at.QK): 1000, (1, 1, at.SM): 1900, (1, 0, at.WAIT_P): 2000,
    (1, 0, at.PV): 2100, (1, 1, at.EXP): 2150, (1, 1, at.PUBLISHED): 2550, (1, 0, at.END): 2700,
    (1, 1, at.PV): 2750, (1, 1, at.END): 3200,
    (0, ITEM_ROW, at.SUM): 3000, (0, ITEM_ROW, at.STORE): 3300, (0, ITEM_ROW, at.ITEM_END): 4000,
    (1, ITEM_ROW, at.SUM): 3200, (1, ITEM_ROW, at.STORE): 3300, (1, ITEM_ROW, at.ITEM_END): 4100,
    (1, ITEM_ROW, at.COMBINE): 4100, (1, ITEM_ROW, at.COMBINE_END): 5000,
}  # fmt: skip
SPANS = {  # (lane, stage, block) -> when it starts and ends, in nanoseconds
    ("load", "LOAD_Q", 0): (0, 100),
    ("wg0", "WAIT_KV", 0): (50, 900), ("wg0", "QK", 0): (900, 1500), ("wg0", "SM", 0): (1500, 1800),
    ("wg0", "PV_L", 0): (1800, 2300), ("wg0", "WAIT_P", 1): (2310, 2600),
    ("wg0", "PV_L", 1): (2600, 3000),
    ("wg1", "WAIT_KV", 1): (60, 1000), ("wg1", "QK", 1): (1000, 1900),
    ("wg1", "WAIT_P", 1): (2000, 2100), ("wg1", "SM", 1): (2000, 2550),
    ("mma1", "PV_R", 0): (2100, 2700), ("wg1", "PV_R", 1): (2700, 3200),
    ("wg0", "SUM_L", 1): (3000, 3300), ("wg0", "STORE_L", 1): (3300, 4000),
    ("wg1", "SUM_R", 1): (3200, 3300), ("wg1", "STORE_R", 1): (3300, 4100),
    ("wg1", "COMBINE", 1): (4100, 5000),
}  # fmt: skip


@pytest.mark.parametrize("first_clock", [1000, 2**32 - 3000])
def test_stamps_are_read_as_stages(first_clock: int) -> None:
    """Also where the clock, of 0.5 ns here, passes 2^32."""
    stamps = np.zeros(at.shape(1, 3)[1:], np.uint32)
    for (warpgroup, row, point), ns in STAMPED.items():
        stamps[warpgroup, 0, row, point] = (first_clock + 2 * ns) % 2**32, 7 + ns
    measured = measured_spans(stamps.view(np.int32), "decode", 2)
    found = {span[:3]: span[3:] for span in measured if span.stage != "ISSUE"}
    assert found.keys() == SPANS.keys()
    for key, times in SPANS.items():
        assert found[key] == pytest.approx([ns * 1e-9 for ns in times], abs=1e-12), key
    with pytest.raises(ValueError, match="no stamps"):
        measured_spans(np.zeros(at.shape(1, 3)[1:], np.int32), "decode", 2)


def test_stages_of_a_schedule_have_the_names_of_the_measured_ones() -> None:
    costs = {"LOAD": 9e-7, "QK": 5e-7, "SM": 3e-7, "PV": 4e-7, "SUM": 1e-7, "STORE": 7e-7}

    def cost(step: Step) -> StageCost:
        engine = "tensor" if step.stage[:2] in ("QK", "PV") else step.unit
        return StageCost({engine: costs[step.stage.split("_")[0]]})

    simulated = simulated_spans(run_schedule(hopper_decode(2), cost), merge=1e-6)
    named = {span[:2] for span in simulated if span.lane != "load"}
    assert named >= {key[:2] for key in SPANS if key[0] != "load"} - {("wg0", "WAIT_P")}
    assert {e.percent for e in stage_errors([simulated, simulated], simulated) if e.measured} == {0}
    slow = [s._replace(end=s.end + 1e-6) if s.stage == "QK" else s for s in simulated]
    found = {(e.lane, e.stage): e.percent for e in stage_errors([slow], simulated)}
    # Scores wait for three loads after that of q, and are compared together with that wait.
    assert found["wg0", "QK"] == pytest.approx(100 * (3.2e-6 / 4.2e-6 - 1))
    assert found["wg1", "SM"] == 0
