"""Tables of other kernels: every form of columns is read, every row predicted, or one is named."""

import csv
import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest

from experiments import launch
from experiments.simulated import foretell
from experiments.simulated.tables.first_flashmla import first_flashmla, first_flashmla_kernel
from experiments.simulated.tables.models import kernel_for
from experiments.simulated.tables.predictions import predict, read_table
from experiments.simulated.tables.prefill_model import prefill_seconds
from mla_jax.hal import PROFILES, IllegalScheduleError, Problem, Schedule, simulate
from mla_jax.hal.prefill_orders import two_consumers
from mla_jax.hal.simulator.gpu_costs import merge_seconds
from mla_jax.hal.tiling import TilePlanError

pytestmark = pytest.mark.usefixtures("unrendered")

H100, H200 = PROFILES["H100_SXM5"], PROFILES["H200_SXM"]
TRT = "TensorRT-LLM 1.3.0rc20 MLA decode op"
CONTEXT = "TensorRT-LLM 1.3.0rc20 MLA context op"
FIA = "CANN FIA npu_fused_infer_attention_score_v2 MLA decode"
ASCEND = "Ascend 910B (Atlas 800T A2)"


def row(kernel: str, device: str = "H200_SXM", **cells: object) -> dict[str, str]:
    usual = {"device": device, "kernel": kernel, "batch": 8, "heads": 64, "s_q": 1, "kv_len": 1000,
             "page_size": 64, "dtype": "bf16", "us": 20}  # fmt: skip
    return {key: str(value) for key, value in (usual | cells).items()}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def published(tmp_path: Path, rows: list[dict[str, str]]) -> tuple[int, dict]:
    path = write(tmp_path / "mine.csv", rows)
    status = launch.main(["launch", "--experiment=published", f"--table={path}",
                          f"--output_dir={tmp_path}"])  # fmt: skip
    result = tmp_path / "published" / "result.json"
    return status, json.loads(result.read_text()) if result.exists() else {}


def test_every_row_is_predicted_and_summed_up_by_kernel(tmp_path: Path) -> None:
    call = Problem((1000,) * 8, 64)
    wanted = {}
    for name, profile in (("H200_SXM", H200), ("H100_SXM5", H100)):
        first = simulate(profile, call, first_flashmla_kernel(profile, "bf16")).seconds * 1e6
        memory = profile["memory.hbm_bandwidth"] * profile["memory.hbm_efficiency"]
        rotated = profile["latency.second_launch"] + 8 * 64 * 64 * 4 / memory
        wanted[name] = first + rotated * 1e6
    rows = [
        row(TRT, us=wanted["H200_SXM"] * 1.25),
        row(TRT, "H100_SXM5", us=wanted["H100_SXM5"] * 2),
        row(TRT, dtype="fp8_kv", us=wanted["H200_SXM"] * 1.5),  # slower than bf16, not in the model
        row(TRT, kv_len=4000, us=wanted["H200_SXM"] * 9),
        row(TRT, kv_len=4000, dtype="fp8_kv", us=wanted["H200_SXM"]),
        row("SGLang 0.5.14 FA3 MLA decode", page_size=1),
        row("flashmla_dense", page_size=""),
        row(CONTEXT, s_q=1000, page_size=""),
        row(CONTEXT, s_q=300, page_size="", dtype="fp8_kv"),
        row(FIA, ASCEND, page_size=128),
        row("CANN FIA causal prefill MHA 192/128", ASCEND, s_q=512, kv_len=512, page_size=128),
        row("hopper"),
        row("hopper_int8", dtype=""),
    ]
    status, result = published(tmp_path, rows)
    assert status == 0
    assert [r["kernel"] for r in result["rows"]] == [r["kernel"] for r in rows]
    assert all(r["predicted"] > 0 and r["model"] for r in result["rows"])
    kernels = {(k["kernel"], k["device"]): k for k in result["kernels"]}
    assert len(kernels) == 11
    assert kernels[TRT, "H100_SXM5"]["mape"] == pytest.approx(50)
    assert kernels[TRT, "H200_SXM"]["rows"] == 2
    assert result["rows"][0]["error_percent"] == pytest.approx(-20)
    flashmla = simulate(H200, call, "flashmla_dense").seconds * 1e6
    assert result["rows"][6]["predicted"] == pytest.approx(flashmla)
    # bf16 against fp8: named wrongly at 1000 tokens, rightly at 4000.
    assert predict(rows[2]) < predict(rows[0])
    assert predict(rows[4]) < predict(rows[3])
    assert result["pairs"] > result["pairs_right"] >= 1


def test_a_pair_counts_once_and_is_named_by_the_model(tmp_path: Path) -> None:
    names = ("flashmla_dense", "flashinfer_fa2")
    fast, slow = sorted(names, key=lambda name: predict(row(name, batch=128, heads=128)))
    cells = {"batch": 128, "heads": 128}
    times = ((10, 20), (12, 20), (20, 10), (100, 104))  # right twice, wrong, and too near
    rows = [
        row(name, us=us, kv_len=1000 + i, **cells)
        for i, pair in enumerate(times)
        for name, us in zip((fast, slow), pair, strict=True)
    ]
    status, result = published(tmp_path, rows)
    assert (status, result["pairs"], result["pairs_right"]) == (0, 3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "mystery"}, "row 1: kernel = 'mystery' has no model, wanted one of"),
        ({"kernel": None}, r"mine\.csv has no column variant \(or kernel\)"),
        ({"page_size": None}, r"mine\.csv has no column page_size"),
        ({"heads": None}, r"mine\.csv has no column heads"),
        ({"dtype": "fp4"}, "row 1: dtype = 'fp4', wanted bf16 or fp8_kv"),
        ({"kernel": "SGLang 0.5.14 FA3 MLA decode", "dtype": "fp8_kv"}, "not for dtype fp8"),
        ({"page_size": "many"}, "row 1: page_size = 'many', wanted a whole number above 0"),
        ({"page_size": "48"}, "row 1: .*page_size = 48, wanted a multiple of block_kv = 64"),
        ({"heads": "-3"}, "row 1: heads = '-3', wanted a whole number above 0"),
        ({"us": "0"}, "row 1: us = '0', wanted a number above 0"),
        ({"us": "nan"}, "row 1: us = 'nan', wanted a number above 0"),
        ({"kernel": CONTEXT, "s_q": "2000"}, "row 1: s_q = 2000, wanted .* at most kv_len = 1000"),
        ({"device": "Ascend 950"}, "row 1: profile = 'Ascend 950', wanted a JSON file or one of"),
    ],
)
def test_a_row_that_has_no_prediction_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    cells = {k: v for k, v in (row("flashmla_dense") | change).items() if v is not None}
    assert published(tmp_path, [cells]) == (2, {})
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert re.search(message, error[0])


def test_a_file_that_is_no_table_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, odd = tmp_path / "missing.csv", tmp_path / "odd.csv"
    odd.write_text("device;variant;us\nH200_SXM;flashmla_dense;20\n")
    for path in (missing, odd):
        arguments = ["--experiment=published", f"--table={path}", f"--output_dir={tmp_path}"]
        assert launch.main(["launch", *arguments]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: --table: {missing}: No such file or directory",
        "error: --table: odd.csv: no column of us, gb_per_s, speedup_v11_over_v0 among "
        "device;variant;us",
    ]


def test_a_table_of_excel_begins_with_a_mark(tmp_path: Path) -> None:
    rows = [row("flashmla_dense")]
    path = write(tmp_path / "mine.csv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_table(path) == rows


def test_prefill_has_causal_work_and_a_peak() -> None:
    for blocks in (1, 2, 5):
        two_consumers(blocks).check()
    flops = 2.0 * 128 * (16384 * 16385 / 2) * (192 + 128)
    long = prefill_seconds(H200, 1, 128, 16384, 16384)
    assert H200["engine.tensor_efficiency"] > flops / long / H200.matrix_peak > 0.4
    faster = H200.with_values({"engine.sfu": 32, "engine.cuda": 256, "engine.tensor_bf16": 8192})
    assert prefill_seconds(faster, 1, 128, 16384, 16384) < 0.9 * long
    assert prefill_seconds(H200, 1, 128, 16384, 16384, "fp8") < 0.9 * long
    new = prefill_seconds(H200, 1, 128, 8192, 16384)  # 3/4 of the pairs of a query and a key
    assert 0.70 < new / long < 0.80
    with pytest.raises(ValueError, match="device = Ascend910B3, wanted a GPU"):
        prefill_seconds(PROFILES["Ascend910B3"], 1, 32, 4096, 4096)


def test_8_bit_operands_are_multiplied_at_their_rate() -> None:
    for dtype, name in (("fp8", "first_flashmla_fp8"), ("int8", "flashmla_int8")):
        kernel = kernel_for(H200, name)
        call = Problem((8192,) * 132, 128, kv_dtype=dtype)
        seconds = simulate(H200, call, kernel).seconds
        faster = H200.with_values({"engine.tensor_int8": 16384, "engine.shared_pipe": 256})
        assert simulate(faster, call, kernel).seconds < 0.9 * seconds
        bf16 = dataclasses.replace(call, kv_dtype="bf16")
        assert simulate(H200, bf16, "flashmla_dense").seconds > 1.3 * seconds
        with pytest.raises(ValueError, match=f"kv_dtype = 'bf16', wanted {dtype}, since it mult"):
            simulate(H200, bf16, kernel)
        other = H200.with_values({"engine.tensor_bf16": 8192})
        assert simulate(other, call, kernel).seconds == seconds


@pytest.mark.parametrize("transposes", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_each_wait_of_the_first_flashmla_is_needed(blocks: int, transposes: bool) -> None:
    schedule = first_flashmla(blocks, transposes=transposes)
    schedule.check()
    assert schedule.blocks_of("TRANSPOSE") == (set(range(blocks)) if transposes else set())
    # A block is copied only when the one before is there.
    issues = [step for step in schedule.steps if step.stage == "ISSUE"]
    assert [step.block for step in issues] == list(range(1, blocks))
    assert all({a.block for a in step.reads} == {step.block - 1} for step in issues)
    for index, step in enumerate(schedule.steps):
        for dropped in step.waits:
            waits = tuple(signal for signal in step.waits if signal != dropped)
            steps = list(schedule.steps)
            steps[index] = dataclasses.replace(step, waits=waits)
            with pytest.raises(IllegalScheduleError):
                dataclasses.replace(schedule, steps=tuple(steps)).check()


def test_v_is_transposed_beside_softmax() -> None:
    """One warpgroup does so while the other one computes P, and products then need not do it."""
    call = Problem((8192,) * 132, 64, kv_dtype="fp8")
    apart = first_flashmla_kernel(H200, "fp8")
    report = simulate(H200, call, apart)
    line = report.timeline
    at = {
        step.stage: (start, end, cost)
        for step, start, end, cost in zip(
            line.schedule.steps, line.start, line.end, line.costs, strict=True
        )
        if step.block == 5
    }
    assert at["TRANSPOSE"][0] < at["SM"][1] <= at["PV_L"][0]
    assert at["TRANSPOSE"][1] <= at["PV_R"][0]
    assert at["PV_L"][2].hold == 0 < at["TRANSPOSE"][2].busy["shared"]
    plain = dataclasses.replace(apart, orders=(first_flashmla,))
    together = simulate(H200, call, dataclasses.replace(plain, transposes_apart=False))
    assert max(cost.hold for cost in together.timeline.costs) > 0.1e-6
    slow = H200.with_values({"engine.shared_pipe": 64})
    assert simulate(slow, call, apart).seconds > 1.3 * report.seconds
    with pytest.raises(IllegalScheduleError, match=r"no step TRANSPOSE\(0\), wanted one per block"):
        simulate(H200, call, plain)

    def without(stage: str, buffer: str, num_blocks: int) -> Schedule:
        whole = first_flashmla(num_blocks, transposes=True)
        steps = tuple(
            dataclasses.replace(s, reads=tuple(a for a in s.reads if a.buffer != buffer))
            if s.stage == stage else s for s in whole.steps
        )  # fmt: skip
        return dataclasses.replace(whole, steps=steps)

    for stage, buffer in (("PV_R", "v_transposed"), ("TRANSPOSE", "kv_r")):
        order = functools.partial(without, stage, buffer)
        with pytest.raises(IllegalScheduleError, match=f"{stage} does not read {buffer}"):
            simulate(H200, call, dataclasses.replace(apart, orders=(order,)))
    with pytest.raises(ValueError, match="transposes_apart = True, wanted False for operands of b"):
        dataclasses.replace(apart, multiplies="bf16")
    small = H200.with_values({"buffer.shared": 200 * 1024})
    with pytest.raises(TilePlanError, match="V transposed"):
        simulate(small.with_values({"buffer.shared": 150 * 1024}), call, apart)
    simulate(small, call, apart)


def test_the_first_flashmla_merges_a_row_per_cta() -> None:
    """A row's partials are loaded one by one; rows beyond 16 per SM wait for others."""
    kernel, l2 = first_flashmla_kernel(H200, "bf16"), H200["latency.l2"]
    split, many = Problem((1024,), 16), Problem((64,) * 1024, 64)
    start = H200["latency.memory"]
    assert merge_seconds(H200, kernel, split, kernel.plan(split)) == pytest.approx(start + 18 * l2)
    waves = -(-1024 * 64 // (16 * 132))
    assert merge_seconds(H200, kernel, many, kernel.plan(many)) == pytest.approx(start + waves * l2)


def test_predictions_are_scored_and_never_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foretell, "FOLDER", tmp_path / "predictions")
    monkeypatch.setattr(foretell, "CALLS", ((64, 1024), (128, 4096)))
    path = foretell.write("2030-01-02")
    rows = json.loads(path.read_text())["rows"]
    assert foretell.main(["2030-01-02"]) == 2
    for cells in rows:  # nothing that is simulated beats its bound in the dtype of the bound
        bound = next(r["us"] for r in rows if r["variant"] == "bound" and all(
            r[key] == cells[key] for key in foretell.CASE))  # fmt: skip
        assert cells["us"] >= bound or cells["variant"] == "int8-v11"
    mine = [r for r in rows if r["device"] == "B200_SXM" and r["variant"] == "flashinfer_fa2"]
    measured = [{k: str(v) for k, v in r.items()} | {"us": str(r["us"] / 1.5)} for r in mine]
    measured.append(measured[0] | {"variant": "other", "us": "1.0"})
    table = write(tmp_path / "measured.csv", measured)
    lines = foretell.score(table, path.parent)
    assert lines[0] == "2030-01-02, B200_SXM, bound: 1 of 4 calls are faster"
    assert lines[2] == "2030-01-02, B200_SXM, flashinfer_fa2: MAPE 50.0 % over 4 calls"
    write(table, [measured[0] | {"heads": "17"}])
    with pytest.raises(ValueError, match=r"measured\.csv has no row that was predicted"):
        foretell.score(table, path.parent)
