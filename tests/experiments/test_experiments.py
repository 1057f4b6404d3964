"""Every experiment in small, on this machine and on a described GPU, and its result.json."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import SMALL, run

from experiments import launch
from experiments.accounting import split_kv
from experiments.accuracy import int8_accuracy
from experiments.framework import results
from experiments.framework.results import SCHEMA, environment, validate_result, write_result
from experiments.speed import sharded, timing
from experiments.speed.decode.runner import Runner
from experiments.speed.decode.setup import Setup
from mla_jax.registry import IMPLEMENTATIONS

ON_A_GPU = {  # those that ask for devices or implementations; the demo is in test_demo.py
    "correctness": SMALL["correctness"],
    "benchmark": ("--preset=quick", "--heads=128", "--s_q=1"),
    "kernel_bench": ("--preset=quick", "--variants=multiply"),
}
NEED_A_GPU = {"kernel_bench", "calibrate"}
NEED_RESULTS = {"report"}  # tests/experiments/test_report.py
STARTS = {".png": b"\x89PNG", ".json": b"{", ".jsonl": b"{", ".csv": b"batch,", ".md": b"|"}


@dataclasses.dataclass(frozen=True)
class FakeGpu:
    """What experiments ask a device for."""

    device_kind: str = "NVIDIA H200"
    platform: str = "gpu"
    compute_capability: str = "9.0"
    core_count: int = 132
    id: int = 0

    def memory_stats(self):
        return {"bytes_limit": 100 << 30}


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU by its description, with 14 implementations.

    Two of them run, XLA's code under two names; the others refuse every problem that they are
    shown. Benchmarks have times without measuring any.
    """

    def time_nothing(self, pool, tasks, *_):
        for i, (row, who) in enumerate(tasks):
            self.journal.add(row, who.name, "measured", us=100.0 + i, error=1e-3)

    monkeypatch.setattr(jax, "devices", lambda *_: [FakeGpu()])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    xla = IMPLEMENTATIONS["xla"]
    names = [name for name in IMPLEMENTATIONS if name != "xla"]
    for name in [*names, *(f"odd {i}" for i in range(13 - len(names)))]:
        refuses = xla.refuses if name == "hopper" else lambda problem: "it is odd"
        fake = dataclasses.replace(xla, name=name, refuses=refuses)
        monkeypatch.setitem(IMPLEMENTATIONS, name, fake)
    rates = {"copy": 4000.0, "read": 4000.0, "matmul": 700.0, "matmul_int8": 1400.0}
    monkeypatch.setattr(timing, "ceilings", lambda **_: rates)
    monkeypatch.setattr(Runner, "_run_pool", time_nothing)
    monkeypatch.setattr(Runner, "_compile_ahead", lambda self, works: [{}] * len(works))


@pytest.fixture
def little_data(monkeypatch):
    """All data is drawn, but of data that the code does not distinguish only some is measured.

    These are two batches of `split_kv`, which share a program for each planner, two of the
    distributions of `int8_accuracy`, and a burst of two launches of `sharded`. The layer from which
    `int8_accuracy` draws latents is narrow but for its cache.
    """
    monkeypatch.setattr(sharded, "MOST_LAUNCHES", 2)
    narrow = {"hidden_size": 32, "num_heads": 2, "q_lora_rank": 16}
    config = dataclasses.replace(int8_accuracy.small_config(), **narrow)
    monkeypatch.setattr(int8_accuracy, "small_config", lambda: config)
    batches, cases = split_kv.batches, int8_accuracy.cases
    names = {"uniform", "scores of std 3"}

    def two_batches(seed):
        drawn = batches(seed)
        return {name: drawn[name] for name in (split_kv.PICTURED, "64 short, some empty")}

    monkeypatch.setattr(split_kv, "batches", two_batches)
    monkeypatch.setattr(
        int8_accuracy, "cases", lambda options: (c for c in cases(options) if c.name in names)
    )


class TestMachines:
    """Experiments on a machine that is described and not there, with many implementations.

    Those whose code asks neither for devices nor for implementations run on it in TestResult.
    """

    @pytest.mark.parametrize("name", ON_A_GPU)
    def test_a_gpu_with_many_implementations(self, tmp_path, fake_gpu, name):
        status, result = run(tmp_path, name, *ON_A_GPU[name])
        assert status == 0, result["summary"]
        validate_result(result)
        assert result["environment"]["devices"] == ["NVIDIA H200"]
        assert all((tmp_path / name / file).exists() for file in result["files"])
        ran = {"xla", "hopper", "jnp", "hopper multiply"}
        refused = [row for row in result["rows"] if row["implementation"] not in ran]
        assert not any(numbers_of(row) for row in refused)
        if name != "kernel_bench":
            assert {row["implementation"] for row in refused} == set(IMPLEMENTATIONS) - ran
        assert run(tmp_path / "page", "report", f"--results={tmp_path}")[0] == 0

    def test_memory_is_what_the_device_says(self, monkeypatch):
        monkeypatch.setattr(jax, "devices", lambda *_: [FakeGpu()])
        assert Setup.here(0, 512, 64, 0).memory == 60 << 30


def numbers_of(row):
    """Errors, times and rates of a row."""
    computed = {"error", "ms", "us", "tflops", "ceiling", "speed"}
    return [k for k, v in row.items() if v is not None and set(k.split("_")) & computed]


class TestResult:
    def test_every_experiment_is_run_below_or_needs_more(self):
        assert set(SMALL) | NEED_A_GPU | NEED_RESULTS == set(launch.EXPERIMENTS)

    @pytest.mark.parametrize("name", [name for name in launch.EXPERIMENTS if name in SMALL])
    def test_every_experiment_in_small(self, tmp_path, request, name):
        asks_for_devices = {*ON_A_GPU, "demo", "sharded", "portrait", "layer_step", "generate"}
        if name not in asks_for_devices:
            request.getfixturevalue("fake_gpu")
        request.getfixturevalue("little_data")
        status, result = run(tmp_path, name, *SMALL[name])
        assert status == 0, result["summary"]
        validate_result(result)
        assert result["experiment"] == name
        assert result["passed"] is True
        options = {field.name for field in dataclasses.fields(launch.load(name).Options)}
        assert set(result["options"]) == options
        assert {"result.json", *result["files"]} == {p.name for p in (tmp_path / name).iterdir()}
        for file in result["files"]:
            start = STARTS[Path(file).suffix]
            assert (tmp_path / name / file).read_bytes().startswith(start)
        assert run(tmp_path / "page", "report", f"--results={tmp_path}")[1]["left_out"] == []

    @pytest.fixture
    def result(self):
        example = {int: 1, float: 1.0, str: "x", bool: True, list: [], dict: {}}
        return {key: example[kind] for key, kind in SCHEMA.items()} | {"environment": environment()}

    def test_names_the_commit(self, monkeypatch):
        """The commit is that of the checkout, unless a variable says it."""
        monkeypatch.delenv("MLA_JAX_COMMIT", raising=False)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=results.ROOT, capture_output=True)
        commit = results._commit.__wrapped__()
        if head.returncode == 0:
            assert re.fullmatch(f"{head.stdout.decode()[:7]}\\w*\\+?", commit)
        # A folder inside a repository is not that repository.
        monkeypatch.setattr(results, "ROOT", results.ROOT / "experiments")
        monkeypatch.setenv("MLA_JAX_COMMIT", "1234567")
        assert results._commit.__wrapped__() == "1234567"
        monkeypatch.delenv("MLA_JAX_COMMIT")
        assert results._commit.__wrapped__() == "unknown"

    def test_schema_names_the_key(self, result):
        validate_result(result)
        for key in SCHEMA:
            with pytest.raises(ValueError, match=f"^{key} is missing"):
                validate_result({k: v for k, v in result.items() if k != key})
            with pytest.raises(ValueError, match=f"^{key} must be"):
                validate_result(result | {key: None})
        with pytest.raises(ValueError, match="schema_version must be 1"):
            validate_result(result | {"schema_version": 2})
        with pytest.raises(ValueError, match=r"rows\[0\].a must be a scalar"):
            validate_result(result | {"rows": [{"a": []}]})
        partial = {k: v for k, v in result["environment"].items() if k != "backend"}
        with pytest.raises(ValueError, match=r"environment.backend is missing"):
            validate_result(result | {"environment": partial})

    def test_numbers_that_json_does_not_have_are_null(self, tmp_path, result):
        path = tmp_path / "new" / "result.json"
        row = {"nan": np.float32("nan"), "inf": -np.inf, "one": np.int64(1), "pair": "(1, 2)"}
        write_result(path, result | {"rows": [row]})
        assert json.loads(path.read_text())["rows"] == [
            {"nan": None, "inf": None, "one": 1, "pair": "(1, 2)"}
        ]

    def test_a_bad_result_writes_nothing(self, tmp_path, result):
        with pytest.raises(ValueError, match="rows must be"):
            write_result(tmp_path / "new" / "result.json", result | {"rows": "none"})
        assert not (tmp_path / "new").exists()
