"""The README is true: its tables are those of the result files, its example runs."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import launch
from experiments.results import validate_result

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_results():
    script = [sys.executable, str(ROOT / "tools" / "readme_tables.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run python tools/readme_tables.py\n{done.stderr}"


def test_results_are_of_the_schema_and_passed():
    results = ROOT / "benchmarks" / "results"
    paths = [*results.glob("*.json"), *results.glob("parity/*.json")]
    paths += (ROOT / "benchmarks").glob("h?00/*/result.json")
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        validate_result(result)
        assert result["passed"], path


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.strip().splitlines()) <= 14
    exec(compile(example, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) < 1e-5


def test_paths_and_commands_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    status = launch.main([
        "launch", "--experiment=benchmark", f"--output_dir={folder}", "--preset=bars",
        "--heads=16", "--batch=1", "--kv_len=1024", "--implementations=xla,jnp",
    ])  # fmt: skip
    assert status == 0
    return folder / "benchmark"


class TestTakingABenchmark:
    """Of a small one, made here on the CPU, into a copy of the README."""

    @pytest.fixture
    def tool(self, tmp_path, monkeypatch):
        path = ROOT / "tools" / "readme_tables.py"
        spec = importlib.util.spec_from_file_location("readme_tables", path)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.setattr(tool, "README", tmp_path / "README.md")
        monkeypatch.setattr(tool, "BENCHMARKS", tmp_path / "benchmarks")
        for card in tool.CARDS:
            shutil.copytree(ROOT / "benchmarks" / card, tool.BENCHMARKS / card)
        shutil.copy(ROOT / "README.md", tool.README)
        return tool

    def test_is_one_command(self, tool, folder, monkeypatch, capsys):
        monkeypatch.setitem(tool.CARDS, "h200", "cpu")
        target = tool.BENCHMARKS / "h200" / "benchmark"
        (target / "old.csv").write_text("an earlier run's")
        assert tool.main([f"--take={folder}"]) == 0
        taken = {path.name for path in target.iterdir()}
        assert taken >= {"result.json", "benchmark.csv", "roofline.png"}
        assert not taken & {"old.csv", "rows.jsonl"}
        text = tool.README.read_text()
        assert "| 16 heads, one x below 8192 | 1 | " in text
        assert "(benchmarks/h200/benchmark/roofline.png)" in text
        assert tool.main(["--check"]) == 0
        tool.README.write_text(
            text.replace("| 16 heads, one x below 8192 | 1 |", "| 16 heads | 2 |")
        )
        assert tool.main(["--check"]) == 1

    def test_refuses_what_is_of_another_device_or_none(self, tool, folder, tmp_path, capsys):
        assert tool.main([f"--take={folder}"]) == 2
        assert "80GB HBM3 or NVIDIA H200, got ['cpu']" in capsys.readouterr().err
        assert tool.main([f"--take={tmp_path}"]) == 2
        assert "is no result of a benchmark" in capsys.readouterr().err
        for card in tool.CARDS:
            kept = (ROOT / "benchmarks" / card / "benchmark" / "result.json").read_bytes()
            assert (tool.BENCHMARKS / card / "benchmark" / "result.json").read_bytes() == kept
        assert tool.README.read_text() == README
