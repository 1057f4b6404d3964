"""FIA on Ascend: work items, merge, tails, causal tiles, the shared read port, and AMLA's gain."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from experiments.simulated.msprof import main, read_pipes
from experiments.simulated.tables.fia_rows import amla_gains, fia_report, halves
from mla_jax.hal import PROFILES, Problem, plan_tiles, simulate
from mla_jax.hal.simulator.ascend_call import call_on_ascend, divide, merge_seconds
from mla_jax.hal.simulator.ascend_costs import ASCEND_KERNELS, output_in_ub, port_bytes
from mla_jax.hal.tiling import ascend_tiles

DIE = PROFILES["Ascend910B3"]
FIA, PREFILL = ASCEND_KERNELS["fia"], ASCEND_KERNELS["fia-prefill"]


@pytest.mark.parametrize(
    ("lengths", "heads"), [((70000,), 128), ((9, 0, 513, 6000, 1024), 384), ((700,) * 90, 16)]
)
def test_each_key_of_each_row_tile_is_in_one_item(lengths: tuple[int, ...], heads: int) -> None:
    problem = Problem(lengths, heads)
    work, tokens = divide(DIE, problem, FIA, 512)
    tiles = -(-heads // 256)
    found = np.bincount(work.tile, weights=tokens, minlength=tiles * len(lengths))
    assert found.tolist() == np.repeat(lengths, tiles).tolist()
    assert (np.diff(work.worker) >= 0).all()  # consecutive items, and all cores have some
    units = sum(max(-(-n // 512), 1) for n in lengths) * tiles
    assert len(np.unique(work.worker)) == min(DIE.cores, units)
    load = np.bincount(work.worker, weights=tokens)
    assert load.max() <= load.mean() + 2 * 512


def test_a_long_request_is_split_and_costs_as_much_as_the_same_work_spread() -> None:
    """Without splits one core does it alone."""
    long, spread = Problem((65536,), 128), Problem((3277,) * 20, 128)
    whole = dataclasses.replace(FIA, splits=False)
    alone, split, even = (
        simulate(DIE, p, k).seconds for p, k in ((long, whole), (long, FIA), (spread, FIA))
    )
    assert alone > 5 * split
    assert split == pytest.approx(even, rel=0.2)
    ragged = Problem((65536,) + (512,) * 19, 128)
    assert simulate(DIE, ragged, FIA).seconds < simulate(DIE, ragged, whole).seconds / 4


def test_merging_reads_each_partial_once() -> None:
    split, whole = Problem((8192,), 128), Problem((512,) * 16, 128)
    work, _ = divide(DIE, split, FIA, 512)
    assert merge_seconds(DIE, FIA, divide(DIE, whole, FIA, 512)[0]) == 0
    merge = merge_seconds(DIE, FIA, work)
    reading = len(work.rows) * 128 * 512 * 4 / DIE["engine.gm_read"] / DIE.cores
    assert reading + 3 * DIE["latency.cross_core"] < merge
    assert merge < 2 * reading + 4 * DIE["latency.cross_core"]
    assert simulate(DIE, split, FIA).merge == merge


def test_a_tail_costs_by_its_keys() -> None:
    times = [simulate(DIE, Problem((n,) * 200, 64), FIA).seconds for n in (128, 256, 512, 640)]
    assert times == sorted(times)
    assert times[3] - times[2] < 0.6 * (times[2] - DIE["latency.launch"])


def test_causal_tiles_read_up_to_their_last_token() -> None:
    problem = Problem((700, 300), 3, s_q=300)
    work, tokens = divide(DIE, problem, PREFILL, 512)
    assert work.rows.tolist() == [100] * 18  # 300 tokens in three even tiles of at most 128
    assert tokens.tolist() == [500, 600, 700] * 3 + [100, 200, 300] * 3
    call = call_on_ascend(DIE, problem, PREFILL)
    pairs = 3 * sum(n - 300 + i + 1 for n in (700, 300) for i in range(300))
    assert call.flops == 2 * 320 * pairs


def test_o_stays_in_ub_only_where_it_fits() -> None:
    """Of 128 rows 128 columns fit, 512 do not; then O is read back for each block."""
    shape = Problem((512,), 128)
    for kernel, fits in ((PREFILL, True), (FIA, False)):
        plan = ascend_tiles(DIE, shape, widths=kernel.widths)
        assert output_in_ub(plan, kernel, 128, 2) is fits
    assert plan == plan_tiles(DIE, shape)
    scores = 128 * 512 * 4
    assert port_bytes(FIA, 128, 512) == (512 * 2 * (576 + 512 + 128), scores + 2 * 128 * 512 * 4)
    assert port_bytes(ASCEND_KERNELS["amla"], 128, 512)[1] == scores
    once = dataclasses.replace(FIA.order, chunk=4, preload=0, update="chunk")
    per_chunk = dataclasses.replace(FIA, order=once)
    assert port_bytes(per_chunk, 128, 512)[1] == scores + 1.25 * 128 * 512 * 4


def test_no_block_is_faster_than_the_port_serves_it() -> None:
    call = Problem((131072,), 128)
    report = simulate(DIE, call, FIA)
    bytes_ = sum(port_bytes(FIA, 128, 512)) * 131072 / 512 / DIE.cores
    assert report.cores > bytes_ / DIE["engine.gm_read"]
    faster = simulate(DIE.with_values({"engine.gm_read": 2e11}), call, FIA)
    assert faster.seconds < report.seconds


def test_a_repeated_call_finds_in_l2_a_cache_that_fits() -> None:
    again = dataclasses.replace(FIA, replayed=True)
    for tokens, gains in ((131072, True), (262144, False)):  # 151 and 302 MB; L2 has 201 MB
        problem = Problem((tokens // 32,) * 32, 16)
        seconds = [simulate(DIE, problem, kernel).seconds for kernel in (FIA, again)]
        assert (seconds[1] < 0.95 * seconds[0]) is gains


def test_amla_gains_only_where_o_is_large() -> None:
    """Per core: with 256 rows the round trip of O is the bound, with 16 the keys are."""
    gains = {(row["s_q"], row["heads"]): row["gain"] for row in amla_gains(DIE)}
    assert gains[2, 128] > 1.05
    assert gains[1, 16] == pytest.approx(1, abs=0.02)


def test_rows_of_fia() -> None:
    row = {"device": "Ascend 910B (Atlas 800T A2)", "batch": "4", "heads": "32", "s_q": "1",
           "kernel": "CANN FIA npu_fused_infer_attention_score_v2 MLA decode", "kv_len": "1024",
           "page_size": "128", "dtype": "bf16"}  # fmt: skip
    assert fia_report(row).seconds == fia_report(row, DIE).seconds
    with pytest.raises(ValueError, match="dtype = 'fp8_kv', wanted bf16"):
        fia_report(row | {"dtype": "fp8_kv"})
    with pytest.raises(ValueError, match="fia-prefill2: expanded needs kv_dtype"):
        dataclasses.replace(PREFILL, name="fia-prefill2", kv_dtype="int8")
    one, other = halves(list(range(117)))
    assert sorted(one + other) == list(range(117))
    assert len(one) == 59
    assert one != list(range(59))


PIPES = """block_id,sub_block_id,aic_time(us),aic_cube_time(us),aic_mte1_time(us),\
aic_mte2_time(us),aic_fixpipe_time(us),aiv_time(us),aiv_vec_time(us),aiv_mte2_time(us),aiv_mte3_time(us)
0,cube0,80,20,10,60,30,NA,NA,NA,NA
0,vector0,NA,NA,NA,NA,NA,70,12,9,3
1,cube0,100,30,20,70,40,,,,
1,vector0,,,,,,90,14,11,5
"""


def test_msprofs_pipe_times_are_drawn_beside_simulated_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is made by hand in the format that `msprof op` documents."""
    path, picture = tmp_path / "PipeUtilization.csv", tmp_path / "pipes.png"
    path.write_text(PIPES)
    assert read_pipes(path) == {"cube": 25, "mte1": 15, "mte2": 65, "fixpipe": 35, "vector": 13,
                                "mte2v": 10, "mte3": 4, "total": 90}  # fmt: skip
    main([str(path), "--batch=20", f"--picture={picture}"])
    report = simulate(DIE, Problem((4096,) * 20, 128), "fia")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:2] == ["cube", "25.00"]
    assert lines[-1] == ["total", "90.00", f"{report.cores * 1e6:.2f}"]
    assert float(lines[0][2]) < float(lines[-1][2])
    assert picture.stat().st_size > 0
    path.write_text(PIPES.replace("aiv_mte3_time(us)", "other"))
    with pytest.raises(SystemExit):
        main([str(path)])
    assert "has no column aiv_mte3_time(us)" in capsys.readouterr().err
