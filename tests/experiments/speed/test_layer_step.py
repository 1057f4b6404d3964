"""The parts of a layer's step: which kernel belongs to which, and that no time is lost."""

import dataclasses

import jax
import pytest

from experiments.framework.experiment import Output
from experiments.speed.layer import layer_step
from experiments.speed.layer.parts import NAMES, PARTS, REST, Instructions, busy, exclusive, shares
from experiments.speed.layer.step import GIVEN, OWN, Case, Layer
from experiments.speed.timing import Kernel
from mla_jax import PRESETS

HLO = """
%fused (p: bf16[8]) -> bf16[8] {
  ROOT %dot.1 = bf16[8]{0} dot(%p), metadata={op_name="jit(step)/mla_projections/dot_general"}
}

ENTRY %main {
  %x.1 = bf16[8]{0} parameter(0), metadata={op_name="x"}
  %gemm_fusion_dot.13 = bf16[8]{0} fusion(%x.1), calls=%fused, metadata={op_name="jit(step)/mla_projections/dot_general" stack_frame_id=3}, backend_config={"a":"b"}
  %input_scatter_fusion = bf16[8]{0} fusion(%x.1), metadata={op_name="jit(step)/jit(_append)/mla_append/scatter"}
  %mpmd_map.2 = (bf16[8]{0}, f32[8]{0}) custom-call(%x.1), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/mla_attention/jit(attend)/mla_decode/mpmd_map"}
  %empty.4 = bf16[8]{0} custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="jit(step)/mla_w_uv/empty"}
  %inner.1 = f32[8]{0} fusion(%x.1), metadata={op_name="jit(step)/mla_attention/mla_absorb/mul"}
  %loop_broadcast_fusion = s32[8]{0} fusion(), metadata={scheduling_name="loop_broadcast_fusion"}
  ROOT %sub.9 = f32[8]{0} subtract(%x.1), metadata={op_name="jit(step)/sub"}
}
"""  # noqa: E501


def kernel(name, start, end, hlo=None):
    return Kernel(name, float(start), float(end), hlo)


STEP = [
    kernel("gemm_fusion_dot_13", 1000, 3000),
    # It starts early and waits for the kernel before it.
    kernel("input_scatter_fusion", 2500, 3600),
    kernel("mla_decode_mosaic_gpu_kernel", 4000, 9000),
    kernel("nvjet_tst_128x8", 4100, 8000, "gemm_fusion_dot.13"),  # wholly inside another
    kernel("loop_broadcast_fusion", 9000, 9100),
    kernel("sub_9", 9100, 9300),
    kernel("inner_1", 9300, 9350),
    kernel("MemcpyD2D", 9400, 9500),
]


def test_parts_of_a_made_up_profile():
    # A second step, in which all is the same.
    kernels = STEP + [dataclasses.replace(k, start=k.start + 1e4, end=k.end + 1e4) for k in STEP]
    found = shares(kernels[::-1], HLO, 2)
    expected = {
        "projections, norms, RoPE": (2.0, 2),
        "append": (0.6, 1),
        "attention": (5.0, 1),
        "absorption of W_UK": (0.05, 1),
        "W_UV": (0, 0),
        "W_O": (0, 0),
        REST: (0.1 + 0.2 + 0.1, 3),
    }
    assert set(found) == set(NAMES) == set(expected)
    for name, (us, count) in expected.items():
        assert (found[name].us, found[name].kernels) == (pytest.approx(us), count), name
    assert sum(share.us for share in found.values()) == pytest.approx(busy(kernels) / 2e3)
    assert busy(kernels) == pytest.approx(2 * 8050)
    assert busy([]) == 0


def test_the_sum_of_exclusive_times_is_the_busy_time():
    """Kernels that start and end anywhere, also at once, touching and of no length."""
    kernels = [kernel("k", 7 * i % 40, 7 * i % 40 + i * i % 11) for i in range(60)]
    covered = {t for k in kernels for t in range(int(k.start), int(k.end))}
    assert sum(ns for _, ns in exclusive(kernels)) == busy(kernels) == len(covered)


def test_the_name_of_an_instruction_wins_over_that_of_a_kernel():
    instructions = Instructions.of(HLO)
    assert instructions.op_name(kernel("sub_9", 0, 1, "input_scatter_fusion")).endswith("/scatter")
    assert instructions.op_name(kernel("mla_decode_mosaic_gpu", 0, 1)).endswith("/mpmd_map")
    for other in ("empty_mosaic_gpu_kernel", "gemm_fusion_dot_14", "x"):
        assert instructions.part(kernel(other, 0, 1)) == REST


def test_each_part_of_the_layer_has_its_scope_and_its_bytes():
    quick = layer_step.PRESETS["quick"][1]
    config = dataclasses.replace(PRESETS["deepseek-v3"], **quick)
    layer = Layer(config, Case(2, 40), 16)
    text = layer.lower(OWN).as_text(debug_info=True)
    assert [part.name for part in PARTS if f"{part.scope}/" not in text] == []
    params, _, cache, *_ = layer.shapes
    found = layer.bytes_read()
    assert (found["attention"], found["append"]) == (80 * 576 * 2, 2 * 576 * 2)
    weights = sum(x.size * 2 for x in jax.tree.leaves(params))
    assert sum(found.values()) == weights + 82 * 576 * 2
    assert found["absorption of W_UK"] == 2 * 2 * 128 * 512
    assert cache.num_pages == 6


def test_the_report_of_a_traced_step(tmp_path):
    """Rows, tables and files of a step whose kernels are known."""
    sizes = {name: 2000 * (i + 1) for i, name in enumerate(NAMES)}
    found, kernels = layer_step.rows_of_step(STEP, HLO, 1, sizes, 1e9)
    [whole, *parts] = found
    assert whole["passed"]
    assert (whole["gpu_us"], whole["kernels"]) == (pytest.approx(8.05), len(STEP))
    assert (whole["bytes"], whole["memory_us"]) == (56_000, pytest.approx(56))
    assert [row["memory_us"] for row in parts] == pytest.approx([2, 4, 6, 8, 10, 12, 14])
    assert sum(row["gpu_us"] for row in parts) == pytest.approx(8.05)
    assert sum(row["gpu_us"] for row in kernels) == pytest.approx(8.05)
    scatter = next(row for row in kernels if row["kernel"] == "input_scatter_fusion")
    assert (scatter["part"], scatter["us_with_waiting"]) == ("append", pytest.approx(1.1))

    case = {"batch": 1, "kv_len": 8, "case": "1 x 8", "us": 9.0, "host_bound": False}
    rows = [case | {"plan": plan} | row for plan in (GIVEN, OWN) for row in found]
    output = Output(tmp_path)
    outcome = layer_step.report("A step", output, rows, [case | row for row in kernels])
    assert outcome.passed
    assert outcome.summary == "us per step with a plan that is given: 1 x 8 9"
    assert {path.name for path in tmp_path.iterdir()} == set(output.files)
    [(shown, table)] = layer_step.by_case(rows).items()
    assert shown == "1 x 8"
    assert [row["part"] for row in table] == list(NAMES)
    append = next(row for row in table if row["part"] == "append")
    assert append["given_us"] == append["own_us"] == pytest.approx(0.6)
    assert (append["own_kernels"], append["mb"]) == (1, 0.006)
    rows[0]["passed"] = False
    assert not layer_step.report("A step", output, rows, []).passed


@pytest.mark.parametrize("text", ["0x4", "4", "4x", "x4", "4x0", "-1x4", "4x4x4", "4 x 4"])
def test_a_bad_case_is_refused(text):
    with pytest.raises(ValueError, match="wanted requests x tokens"):
        Case.parse(text)
