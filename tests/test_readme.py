"""The README is true: its tables are those of the result files, its example runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

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
