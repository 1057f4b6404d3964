"""Time stamps of our Hopper kernels: nothing of them is in a kernel without, and what they mean."""

import dataclasses
import functools
import json
import re

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.framework.experiment import Output
from experiments.simulated import portrait as experiment
from experiments.simulated.portrait_lanes import simulated_spans, stage_errors
from experiments.simulated.portrait_measured import measured_spans
from mla_jax.hal import PROFILES
from mla_jax.hal.hopper_orders import hopper_decode, hopper_int8, hopper_transposed_int8
from mla_jax.hal.prefill_orders import hopper_prefill
from mla_jax.hal.schedule import Step
from mla_jax.hal.simulator.one_core import StageCost, run_schedule
from pallas_kernels.hopper import attention, device, planning, portrait
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.prefill.attention import attend_ragged

HEADS = {"decode": 64, "decode_transposed": 16, "decode_int8": 64, "decode_transposed_int8": 16}
KERNELS = (*HEADS, "prefill")


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


ints = functools.partial(struct, dtype=jnp.int32)


@functools.cache
def arguments(kernel: str):
    """The shapes of q, cache, tables, lens and plan; of prefill, those of `attend_ragged`."""
    if kernel == "prefill":
        shapes = (512, 2, 192), (512, 2, 128), (512, 64), (512, 2, 128)
        return *(struct(*shape) for shape in shapes), ints(2), ints(2)
    heads, is_int8 = HEADS[kernel], kernel.endswith("int8")
    plan = jax.eval_shape(
        functools.partial(
            planning.plan_decode, rows=heads, profile=PROFILES["H200_SXM"],
            cache="int8" if is_int8 else "float",
        ),
        ints(40),
    )  # fmt: skip
    cache = (struct(1000, 64, 576),)
    if is_int8:
        cache = (
            struct(1000, 64, 512, dtype=jnp.int8),
            struct(1000, 64, 64),
            struct(1000, 64, dtype=jnp.float32),
        )
    return struct(40, heads, 576), cache, ints(40, 50), ints(40), plan


def plain(kernel: str):
    if kernel == "prefill":
        return functools.partial(attend_ragged.__wrapped__, softmax_scale=0.1, causal=True)
    options = {"num_heads": HEADS[kernel], "softmax_scale": 0.1, "causal": True}

    def attend(q, cache, tables, lens, plan):
        if len(cache) == 3:
            attend_int8 = attention.attend_int8.__wrapped__
            return attend_int8(q, *cache, tables, lens, None, plan, **options)
        attend_float = attention.attend.__wrapped__
        return attend_float(q, *cache, tables, lens, None, plan, kv_lora_rank=512, **options)

    return attend


def stamped(kernel: str):
    if kernel == "prefill":
        return functools.partial(portrait.prefill_with_stamps.__wrapped__, softmax_scale=0.1)
    return functools.partial(
        portrait.attend_with_stamps.__wrapped__, num_heads=HEADS[kernel], softmax_scale=0.1
    )


def program(kernel: str, attend) -> str:
    """The whole program of a launch, its kernel included, which alone decides the machine code."""
    traced = jax.make_jaxpr(attend)(*arguments(kernel))
    return re.sub(r" at 0x[0-9a-f]+", "", str(traced))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_without_stamps_is_as_if_there_were_none(monkeypatch, kernel: str) -> None:
    with_option_off = program(kernel, plain(kernel))
    for method in ("block", "item"):
        monkeypatch.setattr(at.Stamps, method, lambda *_: None)
    monkeypatch.setattr(at.Stamps, "of_counted_item", lambda stamps, _: stamps)
    assert program(kernel, plain(kernel)) == with_option_off
    monkeypatch.undo()
    written = program(kernel, stamped(kernel)).count("inline_mgpu")
    assert written > with_option_off.count("inline_mgpu") + 15


@pytest.mark.parametrize(
    ("kernel", "spilled"),
    [
        ("prefill", 0),
        *(aot.on_gpu_machines(kernel, 0) for kernel in HEADS if kernel != "decode_int8"),
        # Its softmax warpgroup has no register left.
        aot.on_gpu_machines("decode_int8", 160),
    ],
)
def test_a_kernel_with_stamps_compiles_for_sm90a(h200, monkeypatch, kernel, spilled) -> None:
    monkeypatch.setattr(device, "num_sms", lambda: 132)
    reports = aot.compile_sm90a(stamped(kernel), *arguments(kernel))
    (report,) = (r for r in reports if "work_list" not in r.name and "merge" not in r.name)
    assert report.ptx.count("mov.u32 c, %clock;") > 10
    assert report.spill_stores <= spilled
    assert not report.serialized
    assert not report.ignores_setmaxnreg


def test_prefill_with_stamps_takes_a_tile_of_rows() -> None:
    _, *keys = arguments("prefill")
    with pytest.raises(ValueError, match="q has 127 rows, wanted at least 128"):
        jax.eval_shape(stamped("prefill"), struct(127, 2, 192), *keys)


ITEM_ROW = at.BLOCKS
# Nanoseconds of an item of two blocks, by warpgroup, row and point.
DECODE = {
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
# When a stage starts and ends, in nanoseconds, by lane, stage and block.
DECODE_SPANS = {
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
DECODE_INT8 = {
    (3, ITEM_ROW, at.ITEM): 0, (3, 0, at.LOAD): 90, (0, ITEM_ROW, at.ITEM): 20,
    (0, ITEM_ROW, at.KERNEL_END): 5020, (2, ITEM_ROW, at.ITEM): 100, (2, ITEM_ROW, at.Q_READY): 700,
    (2, 0, at.WAIT): 700, (2, 0, at.SM): 1300, (2, 1, at.WAIT): 1700, (2, 1, at.SM): 2000,
    (2, ITEM_ROW, at.SUM): 2400,
    (0, 0, at.PV): 1800, (0, 0, at.END): 2200, (0, 1, at.PV): 2450, (0, 1, at.END): 2800,
    (0, ITEM_ROW, at.STORE): 2900, (0, ITEM_ROW, at.ITEM_END): 3300,
    (1, 0, at.PV): 1810, (1, 0, at.END): 2300, (1, 1, at.PV): 2460, (1, 1, at.END): 2900,
    (1, ITEM_ROW, at.STORE): 2950, (1, ITEM_ROW, at.ITEM_END): 3500,
}  # fmt: skip
DECODE_INT8_SPANS = {
    ("load", "ITEM", 0): (0, 90), ("wg2", "LOAD_Q", 0): (100, 700),
    ("wg2", "QK", 0): (700, 1300), ("wg2", "SM", 0): (1300, 1700), ("wg2", "QK", 1): (1700, 2000),
    ("wg2", "SM", 1): (2000, 2400), ("wg2", "SUM", 1): (2400, 2900),
    ("wg0", "WAIT_P", 0): (700, 1800), ("wg0", "PV_L", 0): (1800, 2200),
    ("wg0", "WAIT_P", 1): (2200, 2450), ("wg0", "PV_L", 1): (2450, 2800),
    ("wg0", "STORE_L", 1): (2900, 3300),
    ("wg1", "WAIT_P", 0): (700, 1810), ("wg1", "PV_R", 0): (1810, 2300),
    ("wg1", "WAIT_P", 1): (2300, 2460), ("wg1", "PV_R", 1): (2460, 2900),
    ("wg1", "STORE_R", 1): (2950, 3500),
}  # fmt: skip
# Two warpgroups that compute do the same here, one 10 ns after the other and each its own block.
TRANSPOSED_INT8 = {(2, ITEM_ROW, at.ITEM): 0, (2, 0, at.LOAD): 90} | {
    (w, row, point): ns + 10 * w
    for w in range(2)
    for row, point, ns in (
        (ITEM_ROW, at.ITEM, 20), (ITEM_ROW, at.Q_READY, 400), (w, at.WAIT, 450), (w, at.QK, 800),
        (w, at.SM, 1200), (w, at.PUBLISHED, 1500), (w, at.END, 2000), (ITEM_ROW, at.SUM, 2100),
        (ITEM_ROW, at.STORE, 2300), (ITEM_ROW, at.ITEM_END, 3000), (ITEM_ROW, at.KERNEL_END, 5020),
    )
}  # fmt: skip
TRANSPOSED_INT8_SPANS = {("load", "ITEM", 0): (0, 90)} | {
    (f"wg{w}", stage, block): (begin + 10 * w, end + 10 * w)
    for w in range(2)
    for stage, block, begin, end in (
        (f"LOAD_Q_{'LR'[w]}", 0, 20, 400), ("WAIT_KV", w, 450, 800), ("QK", w, 800, 1200),
        ("SM", w, 1200, 1500), ("PV", w, 1500, 2000), (f"SUM_{'LR'[w]}", 1, 2100, 2300),
        (f"STORE_{'LR'[w]}", 1, 2300, 3000),
    )
}  # fmt: skip
PREFILL = {
    (2, ITEM_ROW, at.ITEM): 0, (2, 0, at.LOAD): 90, (2, ITEM_ROW, at.LOAD_Q): 200,
    (2, ITEM_ROW, at.LOADED_Q): 250,
} | {
    (w, row, point): ns + 10 * w
    for w in range(2)
    for row, point, ns in (
        (ITEM_ROW, at.ITEM, 20), (0, at.WAIT, 400), (0, at.QK, 500), (0, at.TURN, 600),
        (0, at.SM, 900), (0, at.EXP, 1000), (0, at.PUBLISHED, 1200), (0, at.END, 1300),
        (1, at.QK, 1400), (1, at.TURN, 1500), (1, at.SM, 2000), (1, at.EXP, 2100),
        (1, at.END, 2600), (ITEM_ROW, at.SUM, 2650), (ITEM_ROW, at.STORE, 3000),
        (ITEM_ROW, at.ITEM_END, 3500), (ITEM_ROW, at.KERNEL_END, 5020),
    )
}  # fmt: skip
PREFILL_SPANS = {("load_k", "ITEM", 0): (0, 90), ("load_k", "LOAD_Q", 0): (200, 250)} | {
    (f"{lane}{w}", stage, block): (begin + 10 * w, end + 10 * w)
    for w in range(2)
    for lane, stage, block, begin, end in (
        ("mma", "WAIT_KV", 0, 400, 500), ("mma", "WAIT_TURN", 0, 500, 600),
        ("mma", ("QK_HALF_0", "QK_1")[w], 0, 600, 900), ("wg", f"MAX_{w}", 0, 900, 1000),
        ("wg", f"SM_{w}", 0, 1000, 1200), ("mma", "WAIT_KV", 1, 1200, 1400),
        ("mma", "WAIT_TURN", 1, 1400, 1500), ("mma", f"QK_{w}", 1, 1500, 2000),
        ("wg", f"MAX_{w}", 1, 2000, 2100), ("wg", f"SM_{w}", 1, 2100, 2600),
        ("wg", f"PV_{w}", 1, 2650, 3000), ("wg", f"STORE_{w}", 1, 3000, 3500),
    )
}  # fmt: skip
# Warpgroups, stamps, spans, and the simulated order of an item of two blocks.
EXAMPLES = {
    "decode": (3, DECODE, DECODE_SPANS, hopper_decode),
    "decode_int8": (4, DECODE_INT8, DECODE_INT8_SPANS, hopper_int8),
    "decode_transposed_int8": (
        3, TRANSPOSED_INT8, TRANSPOSED_INT8_SPANS, hopper_transposed_int8,
    ),
    "prefill": (3, PREFILL, PREFILL_SPANS, functools.partial(hopper_prefill, trims=True)),
}  # fmt: skip


def written(kernel: str, first_clock: int = 1000) -> np.ndarray:
    """The stamps of an example, with a clock of 0.5 ns."""
    warpgroups, example, *_ = EXAMPLES[kernel]
    stamps = np.zeros(at.shape(1, warpgroups)[1:], np.uint32)
    for (warpgroup, row, point), ns in example.items():
        stamps[warpgroup, 0, row, point] = (first_clock + 2 * ns) % 2**32, 7 + ns
    return stamps.view(np.int32)


@pytest.mark.parametrize(
    ("kernel", "first_clock"), [*((kernel, 1000) for kernel in EXAMPLES), ("decode", 2**32 - 3000)]
)
def test_stamps_are_read_as_stages(kernel: str, first_clock: int) -> None:
    """Also where the clock passes 2^32."""
    spans = EXAMPLES[kernel][2]
    measured = measured_spans(written(kernel, first_clock), kernel, 2, trims=kernel == "prefill")
    found = {span[:3]: span[3:] for span in measured if span.stage != "ISSUE"}
    assert found.keys() == spans.keys()
    for key, times in spans.items():
        assert found[key] == pytest.approx([ns * 1e-9 for ns in times], abs=1e-12), key
    with pytest.raises(ValueError, match="no stamps"):
        measured_spans(np.zeros_like(written(kernel)), kernel, 2)


COSTS = {"LOAD": 9e-7, "QK": 5e-7, "SM": 3e-7, "PV": 4e-7, "SUM": 1e-7, "STORE": 7e-7}


def simulated(kernel: str, merge: float = 0.0):
    def cost(step: Step) -> StageCost:
        engine = "tensor" if step.stage[:2] in ("QK", "PV") else step.unit
        return StageCost({engine: COSTS.get(step.stage.split("_")[0], 1e-7)})

    return simulated_spans(run_schedule(EXAMPLES[kernel][3](2), cost), merge=merge)


def test_stages_of_a_schedule_have_the_names_of_the_measured_ones() -> None:
    simulated_ = simulated("decode", merge=1e-6)
    named = {span[:2] for span in simulated_ if span.lane != "load"}
    assert named >= {key[:2] for key in DECODE_SPANS if key[0] != "load"} - {("wg0", "WAIT_P")}
    errors = stage_errors([simulated_, simulated_], simulated_)
    assert {e.percent for e in errors if e.measured} == {0}
    slow = [s._replace(end=s.end + 1e-6) if s.stage == "QK" else s for s in simulated_]
    found = {(e.lane, e.stage): e.percent for e in stage_errors([slow], simulated_)}
    # Scores wait for three loads after that of q, and are compared together with that wait.
    assert found["wg0", "QK"] == pytest.approx(100 * (3.2e-6 / 4.2e-6 - 1))
    assert found["wg1", "SM"] == 0


@pytest.mark.parametrize("kernel", ["decode_int8", "decode_transposed_int8", "prefill"])
def test_each_measured_stage_has_a_simulated_one(kernel: str) -> None:
    """A wait is a part of the stage behind it, or may be 0."""
    spans = EXAMPLES[kernel][2]
    measured = measured_spans(written(kernel), kernel, 2, trims=kernel == "prefill")
    errors = stage_errors([measured], simulated(kernel))
    wanted = {key[:2] for key in spans if not key[0].startswith("load")}
    waits = {key for key in wanted if key[1] in ("WAIT_KV", "WAIT_TURN")}
    assert {(e.lane, e.stage) for e in errors} == wanted - waits
    assert all(e.simulated > 0 for e in errors)


def test_scores_over_int8_have_the_signal_of_p_and_the_rope_part() -> None:
    measured = measured_spans(written("decode_int8"), "decode_int8", 2)
    errors = stage_errors([measured], simulated("decode_int8"))
    (scores,) = (e.simulated for e in errors if e.stage == "QK")
    assert scores == pytest.approx((10e-7 + 11e-7) / 2)


def test_prefill_stages_have_their_waits() -> None:
    """Scores wait for K and the turn, softmax for O, and P V for the other warpgroup's products."""
    measured = measured_spans(written("prefill"), "prefill", 2, trims=True)
    errors = stage_errors([measured], simulated("prefill"))
    ns = {(e.lane, e.stage): (e.measured * 1e9, e.simulated * 1e9) for e in errors}
    # In the simulation, the second scores of warpgroup 1 wait 900 ns for the other's two products.
    assert ns["mma1", "QK_1"] == pytest.approx(((500 + 800) / 2, (500 + 1400) / 2))
    assert ns["wg0", "SM_0"] == pytest.approx(((200 + 500) / 2, (300 + 600) / 2))
    assert ns["wg0", "PV_0"] == pytest.approx((350, 600 + 400))


def test_a_shape_that_fails_does_not_lose_the_others(monkeypatch, tmp_path) -> None:
    run = np.stack([np.stack([written("prefill")] * 2)] * 2)  # two CTAs, two runs
    monkeypatch.setattr(device, "machine_lacks", lambda: None)
    monkeypatch.setattr(experiment, "stamped_runs", lambda *_: iter(["no memory", run]))
    shapes = "int8:16x1x200", "prefill:1x1x256"
    options = experiment.Options(shapes=shapes)
    outcome = experiment.run(options, Output(tmp_path))
    assert not outcome.passed
    assert "not measured: int8:16x1x200" in outcome.summary
    result = json.loads((tmp_path / "portrait.json").read_text())
    assert result["failed"] == {"int8:16x1x200": "no memory"}
    assert result["kernels"] == {"prefill:1x1x256": "prefill"}
    assert {row["shape"] for row in result["rows"]} == {"prefill:1x1x256"}
    # The same stamps, read from the files of that run.
    again = tmp_path / "again"
    again.mkdir()
    options = dataclasses.replace(options, shapes=shapes[1:], stamps=str(tmp_path))
    assert experiment.run(options, Output(again)).headline["measured"] == [shapes[1]]
    saved = json.loads((again / "portrait.json").read_text())
    assert saved["rows"] == result["rows"]
    assert saved["date"] == result["date"]
