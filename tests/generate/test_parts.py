"""The kernels of a step by part and kind, and what of them is above 3 %."""

import jax
import pytest

from experiments.generate import parts
from experiments.generate.engine import Sizes, new_pool
from experiments.generate.step_kernels import attention_us, part_and_kind, rows_of_kernels
from experiments.speed import timing

BODY = "jit(decode_step)/while/body/"
OP_NAMES = {
    "fusion.1": BODY + "mla_w_o/bshv,hvd->bsd/dot_general",
    "fusion.2": BODY + "mla_w_o/transpose",
    "mpmd_map.1": BODY + "mla_attention/jit(attend)/mla_decode/mpmd_map",
    "mpmd_map.2": BODY + "moe/moe_experts/body/mpmd_map",
    "fusion.3": BODY + "moe/moe_experts/mul",
    "fusion.4": BODY + "moe/moe_gather/gather",
    "fusion.5": BODY + "moe/moe_scatter/reduce_sum",
    "fusion.6": BODY + "moe/dense_feed_forward/td,df->tf/dot_general",
    "fusion.7": BODY + "add",
    "mpmd_map.3": "jit(decode_step)/jit(make_plan)/mla_decode_plan/mpmd_map",
}
NS = dict(zip(OP_NAMES, (20e3, 6e3, 30e3, 90e3, 5e3, 4e3, 3e3, 30e3, 8e3, 4e3), strict=True))


def step_of(count=2):
    """The kernels of so many steps, one after the other, and the text of their program."""
    hlo = "\n".join(
        f'  %{name} = f32[2]{{0}} fusion(%a), metadata={{op_name="{op_name}"}}'
        for name, op_name in OP_NAMES.items()
    )
    kernels, at = [], 0.0
    for _ in range(count):
        for name, ns in NS.items():
            kernels.append(timing.Kernel("a_kernel", at, at + ns, name))
            at += ns
    return kernels, hlo


def test_kernels_by_part_and_kind():
    kernels, hlo = step_of()
    rows = rows_of_kernels(kernels, hlo, 2)
    found = {(row["part"], row["kind"]): row for row in rows}
    us = {key: row["gpu_us"] for key, row in found.items()}
    assert us == pytest.approx({
        ("experts", "matrix products"): 90, ("experts", "other"): 5,
        ("attention", "attention"): 30, ("plan of the attention", "other"): 4,
        ("dense and shared feed-forward", "matrix products"): 30,
        ("W_O", "matrix products"): 20, ("W_O", "other"): 6,
        ("experts' gather and scatter", "gather and scatter"): 7,
        ("sums, copies, counters", "other"): 8,
    })  # fmt: skip
    assert attention_us(rows) == pytest.approx(30)
    assert sum(row["of_gpu_time"] for row in rows) == pytest.approx(1)
    # 3 % of 200 us are 6: one part is above, one is not.
    assert [row["part"] for row in rows if row["above_3_percent"]] == ["sums, copies, counters"]
    assert found["experts' gather and scatter", "gather and scatter"]["kernels"] == 2
    assert part_and_kind("") == ("sums, copies, counters", "other")


def test_a_gpu_also_has_kernels(golden, monkeypatch):
    """The traced program is the step that was timed; a profiler that fails takes nothing else."""
    config, params, _ = golden("deepseek_v2")
    sizes = Sizes(slots=2, drafts=1, max_tokens=16, num_pages=2)
    steps = []

    def traced(burst, repeats):
        burst.run(repeats)
        steps.append(repeats)
        if len(steps) > 1:
            raise RuntimeError("no CUPTI\nhere")
        return step_of(repeats)[0]

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(parts, "NAMED_KERNELS", {})
    monkeypatch.setattr(parts, "_programs", lambda _: {})
    monkeypatch.setattr(parts, "WHOLE_PARTS", ())
    monkeypatch.setattr(timing, "ONE_AFTER_THE_OTHER", {})
    monkeypatch.setattr(timing, "traced_kernels", traced)
    monkeypatch.setattr(timing.ModelProgram, "burst", lambda *_: timing.Burst(1, int, int))
    monkeypatch.setattr(timing, "compile_model", lambda *_, **__: timing.ModelProgram(1, int))
    times = timing.Timing(100.0, 90.0, 110.0, False)
    monkeypatch.setattr(timing, "measure", lambda bursts, **_: dict.fromkeys(bursts, times))

    def measured():
        pool = new_pool(params, config, sizes)
        return parts.measured_parts(params, config, sizes, pool, 16, with_plan=False, rounds=1)

    found = measured()
    assert found.parts[0] == {"part": parts.STEP, "us": 100, "of_step": 1, "us_per_layer": None}
    assert [row["part"] for row in found.parts[1:3]] == [parts.NO_GRAPHS, parts.OP]
    assert found.parts[2]["us_per_layer"] == 100
    # The names of these kernels are not those of this program.
    assert [row["part"] for row in found.kernels] == ["sums, copies, counters"]
    assert found.over_alone == 0
    assert not found.failed
    again = measured()
    assert (again.kernels, again.over_alone, again.failed) == ([], None, "no CUPTI")
    assert steps == [parts.TRACED] * 2
