"""A schedule, a kernel or a device of one's own is one file, and a bad one is named in a line."""

import ast
import functools
import json
import re
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks_of, run_blocks

from experiments import launch
from experiments.simulated.own_files import errors_of, load_kernel
from mla_jax.hal import (
    PROFILES,
    AscendKernel,
    AscendOrder,
    GpuScheduleBuilder,
    IllegalScheduleError,
    Kernel,
    Problem,
    Schedule,
    gpu_kernel,
    load_profile,
    simulate,
)

EXAMPLE = ROOT / "docs" / "examples" / "three_stages.py"
H200, DIE = PROFILES["H200_SXM"], PROFILES["Ascend910B1"]
CALL = Problem((4096,) * 16, 64)


def time_of(path: Path, profile=H200, problem: Problem = CALL) -> float:
    with errors_of(str(path)):
        kernel = load_kernel(profile, str(path), problem.kv_dtype)
        return simulate(profile, problem, kernel).seconds


def example_with(tmp_path: Path, old: str, new: str) -> Path:
    text = EXAMPLE.read_text()
    assert old in text
    path = tmp_path / "mine.py"
    path.write_text(text.replace(old, new))
    return path


def test_the_example_is_short_public_and_on_the_page() -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 25
    imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imported] == ["mla_jax.hal"]
    assert blocks_of("own_schedule.md")[0][1].strip() == text.partition('"""\n\n')[2].strip()


def test_the_pages_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    run_blocks("own_schedule.md", at_least=3)
    run_blocks("adding_a_profile.md", at_least=1)
    seconds = [float(line) for line in capsys.readouterr().out.split()]
    assert len(seconds) == 4
    assert all(1e-5 < s < 1e-2 for s in seconds)


def test_the_number_of_stages_changes_what_is_loaded_ahead(tmp_path: Path) -> None:
    one, three = (time_of(example_with(tmp_path, "STAGES = 3", f"STAGES = {n}")) for n in (1, 3))
    assert three < 0.8 * one
    kernel = load_kernel(H200, str(EXAMPLE), "bf16")
    assert isinstance(kernel, Kernel)
    schedule = kernel.orders[0](7)
    schedule.check()
    assert schedule.buffers["kv_l"] == 3
    assert (kernel.block_kv, kernel.matrix, kernel.merge) == (32, "wgmma", "merge")


@pytest.mark.usefixtures("unrendered")
def test_the_experiments_take_a_file(tmp_path: Path) -> None:
    status = launch.main(["launch", "--experiment=pipeline", f"--schedule={EXAMPLE}",
                          f"--output_dir={tmp_path}", "--batch=16", "--kv_len=4096"])  # fmt: skip
    assert status == 0
    result = json.loads((tmp_path / "pipeline" / "result.json").read_text())
    assert result["rows"][0]["kernel"] == "three_stages"
    assert result["rows"][0]["us"] == pytest.approx(time_of(EXAMPLE) * 1e6)


@pytest.mark.parametrize("experiment", ["sweep", "compare"])
def test_the_experiments_name_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, experiment: str
) -> None:
    path = example_with(tmp_path, "block_kv=32", "block_kv=64")
    flags = {"sweep": f"--schedule={path}", "compare": f"--schedules=seesaw,{path}"}
    arguments = [f"--experiment={experiment}", f"--output_dir={tmp_path}", flags[experiment]]
    assert launch.main(["launch", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert re.search(r"--schedules?: mine\.py: H200_SXM, three_stages: shared holds", error[0])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"warps", block)', '"wrps", block)', r"mine\.py: .*SM\(0\) on wrps: 'wrps' is not a unit"),
        (
            'build.store("warps")',
            'build.store("wg0")',
            r"mine\.py: .* units warps and wg0, wanted ",
        ),
        (
            "        build.softmax",
            "        build.softmax('warps', block)\n        build.softmax",
            r"mine\.py: .*step \d, SM\(0\) on warps: gives SM\(0\), as step \d, SM\(0\)",
        ),
        (
            "if block + STAGES < num_blocks",
            "if True",
            r"mine\.py: three-stages: .*LOAD_L\(3\) on load: no such block, wanted 0 to 0, or -1",
        ),
        ("block_kv=32", "block_kv=64", r"mine\.py: H200_SXM, three_stages: shared holds 232448"),
        ("block_kv=32", "block_kv=30", r"mine\.py.*block_kv = 30, wanted .* multiple of 16"),
        ("block_kv=32", "blocks=32", r"mine\.py, line 23: 'blocks' is not a field"),
        ("block_kv=32", 'copy="dma"', r"mine\.py.*copy = 'dma', wanted one of tma, cp_async"),
        ('"flashinfer_fa3"', '"fa9"', r"mine\.py, line 23: like = 'fa9', wanted one of flashmla"),
        ("stages=STAGES", "stages=0", r"mine\.py, line 9: .*stages = 0, wanted a whole number"),
        ("build.load(block)\n", "pass\n", r"mine\.py, line 13: .*QK\(0\) on mma: reads kv_l\[0\]"),
        ('"R", block', '"r", block', r"mine\.py, line 16: .*half = 'r', wanted 'L' or 'R'"),
        ('    build.store("warps")\n', "", r"mine\.py: three-stages: there is no step STORE_L"),
        ("build.build()", "build.bild()", r"mine\.py, line 20: AttributeError: .*'bild'"),
        ("build.build()", "3", r"mine\.py: TypeError: an order must return a Schedule, got int"),
        ("kernel = gpu", "other = gpu", r"mine\.py: it defines neither kernel nor schedule"),
        ("kernel = gpu_kernel(three", "kernel = (4, three", r"mine\.py, line 23: .*syntax"),
        ("STAGES = 3", "raise RuntimeError", r"mine\.py, line 5: RuntimeError$"),
        ("STAGES = 3", "raise SystemExit(3)", r"mine\.py, line 5: SystemExit: 3"),
    ],
)
def test_a_bad_schedule_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = example_with(tmp_path, old, new)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        time_of(path)
    assert str(caught.value).count("mine.py") == 1


def test_units_have_the_warpgroups_of_the_kernel() -> None:
    def in_turns(groups: int, num_blocks: int) -> Schedule:
        build = GpuScheduleBuilder("turns", num_blocks)
        for block in range(num_blocks):
            build.load(block)
            build.scores("mma0", block)
            build.softmax(f"wg{block % groups}", block)
            build.values("mma0", "L", block)
            build.values("mma1", "R", block)
        build.store("wg0")
        return build.build()

    two, three = (functools.partial(in_turns, groups) for groups in (2, 3))
    simulate(H200, CALL, gpu_kernel(two)(H200))
    message = "turns: units wg0, wg1, wg2 need 12 warps, own has warps = 8"
    with pytest.raises(IllegalScheduleError, match=message):
        simulate(H200, CALL, gpu_kernel(three)(H200))
    simulate(H200, CALL, gpu_kernel(three, warps=12)(H200))


def test_other_files(tmp_path: Path) -> None:
    """A schedule alone, Ascend orders and kernels, no file, and a file of the other family."""
    path = tmp_path / "mine.py"
    with pytest.raises(ValueError, match=r"mine\.py: No such file"):
        time_of(path)
    path.write_text("from mla_jax.hal import GPU_ORDERS\nschedule = GPU_ORDERS['fa3-2wg']\n")
    with_fa3_2wg = gpu_kernel(load_kernel(H200, str(path), "bf16").orders[0])  # type: ignore[union-attr]
    assert time_of(path) == simulate(H200, CALL, with_fa3_2wg(H200)).seconds
    with pytest.raises(ValueError, match=r"mine\.py: schedule must be an AscendOrder on Ascend"):
        time_of(path, DIE)
    path.write_text(
        "from mla_jax.hal import AscendOrder\nschedule = AscendOrder('x', chunk=3, preload=0)\n"
    )
    order = AscendOrder("x", chunk=3, preload=0)
    assert time_of(path, DIE) == simulate(DIE, CALL, order).seconds
    assert simulate(DIE, CALL, order).seconds != simulate(DIE, CALL, "chunk1").seconds
    with pytest.raises(ValueError, match=r"mine\.py: kernel x does not run on family 'nvidia'"):
        time_of(path)
    path.write_text("from mla_jax.hal import AscendKernel, AscendOrder\n"
                    "kernel = AscendKernel('x', AscendOrder(), block_kv=128)\n")  # fmt: skip
    kernel = AscendKernel("x", AscendOrder(), block_kv=128)
    assert time_of(path, DIE) == simulate(DIE, CALL, kernel).seconds
    path.write_text("kernel = 'seesaw'\n")
    with pytest.raises(ValueError, match=r"mine\.py: kernel must be a Kernel.*got 'seesaw'"):
        time_of(path)


def test_the_builder_makes_the_published_order() -> None:
    """Step by step the same as fa3-2wg, which is written without it."""
    kernel = load_kernel(H200, "fa3-2wg", "bf16")
    for num_blocks in (1, 2, 5):
        build = GpuScheduleBuilder("fa3-2wg", num_blocks)
        for block in range(min(2, num_blocks)):
            build.load(block)
        for block in range(num_blocks):
            build.scores("wg1", block)
            build.softmax("wg1", block)
            build.values("wg0", "L", block)
            build.values("wg1", "R", block)
            if block + 2 < num_blocks:
                build.add("wg0", "ISSUE", block + 2)
                build.load(block + 2)
        build.store("wg0", "wg1")
        assert build.build() == kernel.orders[0](num_blocks)  # type: ignore[union-attr]


def profile_file(tmp_path: Path, change: dict) -> Path:
    """The page's JSON example, changed; {"numbers": ...} are added to its numbers."""
    page = (ROOT / "docs" / "adding_a_profile.md").read_text()
    data = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    data["numbers"] |= change.get("numbers", {})
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data | {k: v for k, v in change.items() if k != "numbers"}))
    return path


def test_a_device_like_another(tmp_path: Path) -> None:
    mine = load_profile(profile_file(tmp_path, {}))
    assert (mine.name, mine.family, mine.fitted_on) == ("mine", "nvidia", "H200_SXM")
    assert (mine.cores, mine["memory.hbm_bandwidth"]) == (78, 4e12)
    for field, number in mine.numbers.items():
        if field not in ("core.count", "memory.hbm_bandwidth"):
            assert number.value == H200[field]
            assert (number.certainty, number.source[:13]) == ("assumed", "as H200_SXM: ")
    assert simulate(mine, CALL, "seesaw").seconds > simulate(H200, CALL, "seesaw").seconds


NUMBER = {"value": 1.0, "unit": "s", "source": "x", "certainty": "assumed"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"like": "H300"}, "like = 'H300', wanted one of Ascend910B1"),
        ({"like": ["H200_SXM"]}, r"like = \['H200_SXM'\], wanted one of"),
        ({"family": "ascend"}, "family is 'ascend', that of H200_SXM is 'nvidia'"),
        ({"color": 3}, "'color' is not a key, wanted name, numbers, family, like"),
        ({"numbers": {"engine.fixpipe": NUMBER}}, r"mine: engine\.fixpipe is not a field"),
        ({"numbers": {"core.clok": NUMBER}}, r"core\.clok is not .*; the nearest is core\.clock$"),
        ({"numbers": {"latency.l2": NUMBER | {"unit": "us"}}}, r"latency\.l2 has unit 'us', want"),
        ({"numbers": {"latency.l2": NUMBER}}, r"latency\.l2 = 1\.0 s, wanted at least"),
        ({"numbers": {"core.count": NUMBER | {"unit": "1", "value": 2.5}}},
         r"core\.count = 2\.5, wanted a whole number"),
        ({"numbers": {"latency.l2": {"value": 1e-6}}}, r"latency\.l2 has no unit"),
    ],
)  # fmt: skip
def test_a_bad_profile_is_named(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^mine\.json: .*{message}"):
        load_profile(profile_file(tmp_path, change))


def test_a_key_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = profile_file(tmp_path, {})
    path.write_text(path.read_text().replace('"core.count"', '"name": 1, "name": 2, "core.count"'))
    with pytest.raises(ValueError, match=r"mine\.json: not JSON \('name' is there twice\)"):
        load_profile(path)
