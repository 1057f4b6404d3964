"""The launcher, the schema of result.json, and every experiment in small: it passes, it fails."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import launch
from experiments.accounting import cache_size
from experiments.accuracy import correctness, int8_accuracy
from experiments.framework import console
from experiments.framework.errors import lse_error, relative_error
from experiments.framework.experiment import Outcome
from experiments.framework.options import define_flags, flag, read_options
from experiments.framework.results import SCHEMA, environment, validate_result, write_result
from experiments.serving import demo, soak
from experiments.speed import timing
from experiments.speed.decode.runner import Runner
from experiments.speed.decode.setup import Setup
from mla_jax.allocator import PageAllocator
from mla_jax.registry import IMPLEMENTATIONS

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
V2_LITE = GOLDEN / "v2_lite"
PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "published"

SMALL = {
    "demo": (
        f"--checkpoint={V2_LITE}",
        *("--requests=3", "--max_prompt=9", "--chunk=4", "--page_size=16"),
        *("--decode_steps=2", "--mtp_steps=1", "--implementations=reference,xla"),
    ),
    "correctness": (
        *("--page_sizes=16", "--dtypes=bfloat16", "--layouts=NZ", "--heads=2"),
        *("--kv_lora_rank=32", "--rope_dim=16"),
    ),
    "parity": (f"--checkpoint={V2_LITE}",),
    "soak": ("--steps=25", "--pages=10", "--max_tokens=90", "--kv_lora_rank=32", "--rope_dim=16"),
    "amla_accuracy": ("--rows=64", "--keys=512", "--block=64", "--repeats=2"),
    "int8_accuracy": ("--rows=16", "--keys=2048", "--long_keys=2048", "--spreads=1"),
    "cache_size": (),
    "split_kv": ("--workers=12",),
    "published": (f"--table={PUBLISHED / 'ascend_int8_v11_over_v0.csv'}",),
    "pipeline": ("--schedule=seesaw",),
    "compare": ("--profile=Ascend910B1",),
    "sweep": ("--profile=Ascend910B1", "--schedule=chunk4"),
    "best": ("--profile=L40",),
    "benchmark": (
        *("--preset=tiny", "--heads=4", "--s_q=1", "--batch=1", "--implementations=xla,jnp"),
        *("--kv_lora_rank=32", "--rope_dim=16"),
    ),
}

ON_A_GPU = {  # those that ask for devices or implementations; the demo is in test_demo.py
    "correctness": SMALL["correctness"],
    "benchmark": ("--preset=quick",),
    "kernel_bench": ("--preset=quick", "--variants=multiply"),
}
NEED_A_GPU = {"kernel_bench"}
NEED_RESULTS = {"report"}  # tests/experiments/test_report.py
STARTS = {".png": b"\x89PNG", ".json": b"{", ".jsonl": b"{", ".csv": b"batch,", ".md": b"|"}


def run(tmp_path, name, *arguments):
    """(exit status, result.json or None) of an experiment."""
    status = launch.main(["launch", f"--experiment={name}", f"--output_dir={tmp_path}", *arguments])
    path = tmp_path / name / "result.json"
    return status, json.loads(path.read_text()) if path.is_file() else None


def wrong_values(options):
    """(flag, text) for each kind of text that is no value of it."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kinds = {k for hint in [hints[field.name]] for k in (hint, *typing.get_args(hint))}
        low, high = (field.metadata.get(f"{end}_bound") for end in ("lower", "upper"))
        values = ["maybe"] if bool in kinds else []
        if int in kinds:
            values += ["many", "1.5", "nan", "", *([f"{low - 1}"] if low is not None else [])]
            values += [f"{high + 1}"] if high is not None else []
        if float in kinds:
            values += ["many", "nan", "inf", *(["-1"] if low is not None else [])]
        if field.metadata.get("choices"):
            values += ["no such"]
        is_tuple = typing.get_origin(hints[field.name]) is tuple
        if is_tuple and field.metadata["may_be_empty"]:
            values = [value for value in values if value]
        values += ["1,,2", "1,1"] if is_tuple else []
        yield from ((field.name, value) for value in values)


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

    def time_nothing(self, pool, tasks, peer_names):
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


class TestLauncher:
    def test_lists_every_experiment_with_a_line(self, capsys):
        assert launch.main(["launch", "--list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(launch.EXPERIMENTS)
        assert all(len(line.split()) > 3 and len(line) <= 100 for line in lines)

    def test_help_shows_an_experiments_own_flags(self, capsys):
        assert launch.main(["launch", "--help", "--experiment=soak"]) == 0
        out = capsys.readouterr().out
        assert "--steps" in out
        assert soak.SUMMARY in out

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ((), "--experiment must be given"),
            (("--experiment=soup",), "--experiment=soup"),
            (("--experiment=soak", "--stps=3"), "stps"),
            (("--experiment=soak", "--steps=many"), "--steps=many"),
            (("--experiment=soak", "--steps=0"), "--steps=0: must be 1 or more"),
            (("--experiment=soak", "--layout=XY"), "--layout=XY: must be one of ND, NZ"),
            (("--experiment=soak", "steps"), "not a flag: steps"),
            (("--experiment=soak", "--max_tokens=9999"), "--max_tokens must fit"),
            (("--experiment=correctness", "--implementations=abacus"), "abacus"),
            (("--experiment=correctness", "--page_sizes=16,17"), "--page_sizes=16,17"),
            (("--experiment=split_kv", "--split_size=100"), "--split_size must be a multiple"),
            (("--experiment=amla_accuracy", "--keys=100"), "--keys must be a multiple"),
            (("--experiment=demo", "--checkpoint=/no/such/folder"), "/no/such/folder"),
            (("--experiment=parity",), "--checkpoint must be given"),
        ],
    )
    def test_bad_flags_are_named_and_nothing_is_written(self, tmp_path, capsys, arguments, named):
        output = tmp_path / "out"
        assert launch.main(["launch", f"--output_dir={output}", *arguments]) == 2
        assert named in capsys.readouterr().err
        assert not output.exists()

    @pytest.mark.parametrize("name", launch.EXPERIMENTS)
    def test_every_wrong_value_of_every_flag_is_one_line(self, tmp_path, capsys, name):
        """By type and bounds; the experiment itself must not start."""
        options = launch.load(name).Options
        seeds = [("seed", value) for value in (-1, 2**31) if hasattr(options, "seed")]
        for flag_name, value in [*wrong_values(options), *seeds]:
            argument = f"--{flag_name}={value}"
            assert run(tmp_path / "out", name, argument) == (2, None), argument
            said = capsys.readouterr().err
            assert said.count("\n") == 1, said
            assert f"--{flag_name}" in said
            assert "stopped" not in said
        assert not (tmp_path / "out").exists()

    def test_flags_count_after_a_word_that_is_none(self, capsys):
        assert launch.main(["launch", "--steps", "3", "--experiment=soak", "--help"]) == 0
        assert soak.SUMMARY in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (("soak", "--implementation=hopper"), "hopper can't run this here: it needs"),
            (("soak", "--implementation=blockwise", "--max_tokens=768", "--slots=9",
              "--chunk=99"), "blockwise can't run this here"),
            (("parity", f"--checkpoint={V2_LITE}", "--implementation=hopper"), "hopper can't run"),
            (("soak", "--layout=NZ", "--rope_dim=7"), "--layout: kv_lora_rank + rope_dim must"),
            (("correctness", "--layouts=NZ", "--rope_dim=7", "--heads=1"), "--layouts: kv_lora"),
            (("correctness", "--dtypes="), "--dtypes=: must have one element"),
            (("benchmark", "--implementations=xla,xla"), "has xla twice"),
            (("report", "--results="), "--results must name a folder"),
            (("soak", "--output_dir="), "--output_dir must name a folder"),
        ],
    )  # fmt: skip
    def test_what_cannot_run_is_refused_in_one_line(self, tmp_path, capsys, arguments, named):
        name, *flags = arguments
        assert run(tmp_path / "out", name, *flags) == (2, None)
        said = capsys.readouterr().err
        assert (said.count("\n"), named in said) == (1, True), said
        assert not (tmp_path / "out").exists()

    def test_an_output_folder_that_is_none_is_one_line(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(cache_size, "run", lambda *_: pytest.fail("it was run"))
        (tmp_path / "file").write_text("")
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
        (tmp_path / "held" / "cache_size" / "result.json").mkdir(parents=True)
        for name in ("file", "dangling", "held", "x" * 300):
            arguments = ["--experiment=cache_size", f"--output_dir={tmp_path / name}"]
            assert launch.main(["launch", *arguments]) == 2, name
            said = capsys.readouterr().err
            assert said.startswith("error: --output_dir: ")
            assert said.count("\n") == 1
        assert {p.name for p in tmp_path.iterdir()} == {"file", "dangling", "held"}

    def test_a_full_disk_is_one_line_and_keeps_the_old_result(self, tmp_path, capsys, monkeypatch):
        found = Outcome(True, "found", [])
        monkeypatch.setattr(cache_size, "run", lambda *_: found)
        assert run(tmp_path, "cache_size")[0] == 0
        path = tmp_path / "cache_size" / "result.json"
        before = path.read_bytes()
        path.with_name("result.json.part").symlink_to("/dev/full")
        capsys.readouterr()
        assert run(tmp_path, "cache_size")[0] == 2
        said = capsys.readouterr().err
        assert "No space left on device" in said
        assert said.count("\n") == 1
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["result.json"]

    def test_an_error_of_the_experiment_is_one_line_and_a_traceback_elsewhere(
        self, tmp_path, capsys, monkeypatch
    ):
        def broken(*_):
            raise RuntimeError("no\nluck \ud800")

        monkeypatch.setattr(cache_size, "run", broken)
        monkeypatch.setattr(launch.tempfile, "tempdir", str(tmp_path))
        assert run(tmp_path / "out", "cache_size") == (2, None)
        said = capsys.readouterr().err
        assert said.startswith("error: cache_size stopped: RuntimeError: no luck ")
        assert said.count("\n") == 1
        (kept,) = tmp_path.iterdir()
        assert str(kept) in said
        assert "raise RuntimeError" in kept.read_text()

    def test_two_launches_in_one_folder_are_refused(self, tmp_path, capsys, monkeypatch):
        """The first is another process, as a lock is between processes; it dies by a signal."""
        monkeypatch.setattr(cache_size, "run", lambda *_: Outcome(True, "found", []))
        code = (
            "import time\nfrom pathlib import Path\n"
            "from experiments.framework.experiment import Output\n"
            f"with Output.opened(Path({str(tmp_path / 'cache_size')!r})):\n"
            "    print('locked', flush=True); time.sleep(60)\n"
        )
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
            assert first.stdout.readline() == "locked\n"
            assert run(tmp_path, "cache_size") == (2, None)
            assert "another launch is writing to" in capsys.readouterr().err
            first.kill()
        assert run(tmp_path, "cache_size")[0] == 0

    @pytest.mark.parametrize(("signal_name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
    def test_a_signal_is_one_line_that_says_how_to_go_on(self, tmp_path, signal_name, status):
        """A launch with rows that waits for more, in a process of its own and without JAX."""
        code = (
            "import signal, sys, time, types, experiments.launch as launch\n"
            "def run(options, output):\n"
            "    output.rows_path().write_text('a row')\n"
            "    print('running', flush=True)\n"
            "    time.sleep(60)\n"
            "Options = __import__('dataclasses').make_dataclass('Options', [], frozen=True)\n"
            "launch.load = lambda name: types.SimpleNamespace(Options=Options, run=run)\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"sys.argv = ['launch', '--experiment=benchmark', {f'--output_dir={tmp_path}'!r}]\n"
            "launch.command()\n"
        )
        command, pipes = [sys.executable, "-c", code], {"stdout": -1, "stderr": -1, "text": True}
        with subprocess.Popen(command, **pipes) as launched:
            assert launched.stdout.readline() == "running\n"
            launched.send_signal(signal.Signals[signal_name])
            _, said = launched.communicate(timeout=30)
        assert launched.returncode == status
        assert said.startswith("interrupted: the rows so far are in ")
        assert said.count("\n") == 1
        assert (tmp_path / "benchmark" / "rows.jsonl").read_text() == "a row"

    def test_as_a_command_without_matplotlib(self):
        """Exit status of the process; and drawing is what loads matplotlib, not importing."""
        code = (
            "import sys, experiments.launch as launch\n"
            "for name in launch.EXPERIMENTS: launch.load(name)\n"
            "assert 'matplotlib' not in sys.modules\n"
            "sys.exit(launch.main(['launch', '--experiment=soup']))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "soup" in done.stderr


class TestResult:
    def test_every_experiment_is_run_below_or_needs_more(self):
        assert set(SMALL) | NEED_A_GPU | NEED_RESULTS == set(launch.EXPERIMENTS)

    @pytest.mark.parametrize("name", [name for name in launch.EXPERIMENTS if name in SMALL])
    def test_every_experiment_in_small(self, tmp_path, request, name):
        if name not in (*ON_A_GPU, "demo"):
            request.getfixturevalue("fake_gpu")
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

    @pytest.fixture
    def result(self):
        example = {int: 1, float: 1.0, str: "x", bool: True, list: [], dict: {}}
        return {key: example[kind] for key, kind in SCHEMA.items()} | {"environment": environment()}

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


def test_options_become_flags():
    from absl import flags

    @dataclasses.dataclass(frozen=True)
    class Options:
        count: int = flag(3, "a number")
        scale: float | None = flag(None, "one or none")
        sizes: tuple[int, ...] = flag((1, 2), "several")
        loud: bool = flag(False, "a switch")

    def parse(*arguments):
        values = flags.FlagValues()
        define_flags(Options, values)
        values(["program", *arguments])
        return read_options(Options, values)

    assert parse() == Options()
    assert parse("--count=4", "--scale=.5", "--sizes=4, 5,6", "--loud") == Options(
        4, 0.5, (4, 5, 6), True
    )
    assert parse("--sizes=").sizes == ()


def test_errors_are_loud():
    wanted = np.array([3.0, 4.0])
    assert relative_error(wanted * 1.1, wanted) == pytest.approx(0.1)
    assert np.isnan(relative_error(np.array([3.0, np.nan]), wanted))
    empty = np.array([0.0, -np.inf])
    assert lse_error(empty + 1e-3, empty) == pytest.approx(1e-3)
    assert lse_error(np.zeros(2), empty) == np.inf
    assert np.isnan(lse_error(np.array([np.nan, -np.inf]), empty))


def test_progress_has_a_total(monkeypatch, capsys):
    monkeypatch.setattr(console, "_PLAIN_INTERVAL", -1.0)
    items = {"a": 1, "b": 2}
    for sized in (items.values(), items, {3, 4}, range(2), [5, 6]):
        assert len(list(console.track(sized, "work"))) == 2
        assert [line[:12] for line in capsys.readouterr().out.splitlines()] == [
            "work: 0 of 2", "work: 1 of 2",
        ]  # fmt: skip
    assert list(console.track(iter("xy"), "work", total=2)) == ["x", "y"]
    with pytest.raises(TypeError, match="work: items without a length need a total"):
        list(console.track(iter("xy"), "work"))


def test_a_reader_that_leaves_is_not_a_failed_experiment():
    code = "import sys, experiments.launch as l; sys.exit(l.main(['launch', '--help']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) as done:
        done.stdout.close()
        said = done.stderr.read()
    assert done.returncode == 2
    assert said == "error: the launcher stopped: nobody reads the output any more\n"


class TestParity:
    def test_finds_the_layer_and_reports_four_errors(self, tmp_path):
        status, result = run(
            tmp_path,
            "parity",
            f"--checkpoint={GOLDEN / 'v3_half_resaved'}",  # holds layer 3 only
            "--layout=NZ",
            "--page_size=1",
            "--chunk=100",
        )
        assert status == 0
        assert set(result["errors"]) == {"naive", "absorbed", "chunked", "token_by_token"}
        assert max(result["errors"].values()) < 2e-6

    def test_fails_above_the_tolerance(self, tmp_path):
        status, result = run(tmp_path, "parity", f"--checkpoint={V2_LITE}", "--tolerance=1e-9")
        assert status == 1
        assert result["passed"] is False
        assert min(result["errors"].values()) > 1e-9

    def test_fails_on_nan(self, tmp_path):
        folder = shutil.copytree(V2_LITE, tmp_path / "checkpoint")
        with np.load(V2_LITE / "golden.npz") as golden:
            np.savez(folder / "golden.npz", x=golden["x"] * np.nan, out=golden["out"])
        status, result = run(tmp_path, "parity", f"--checkpoint={folder}")
        assert status == 1
        assert set(result["errors"].values()) == {None}

    @pytest.mark.parametrize(
        ("golden", "named"),
        [
            (None, "No such file"),
            (b"PK", "golden.npz"),
            ({"x": np.zeros((1, 2, 64))}, "out is not a file"),
            ({"x": np.zeros((1, 2, 65)), "out": np.zeros((1, 2, 64))}, "x in .* must be"),
            ({"x": np.zeros((1, 2, 64)), "out": np.zeros((2, 64))}, "out in .* must be"),
            ({"x": np.zeros((1, 2, 64)), "out": np.zeros((1, 3, 64))}, "out is"),
        ],
    )
    def test_names_what_is_wrong_with_golden(self, tmp_path, capsys, golden, named):
        folder = shutil.copytree(V2_LITE, tmp_path / "checkpoint")
        (folder / "golden.npz").unlink()
        if isinstance(golden, dict):
            np.savez(folder / "golden.npz", **golden)
        elif golden is not None:
            (folder / "golden.npz").write_bytes(golden)
        status, result = run(tmp_path, "parity", f"--checkpoint={folder}")
        assert (status, result) == (2, None)
        error = " ".join(capsys.readouterr().err.split())
        assert error.startswith("error: --checkpoint: ")
        assert re.search(named, error)

    def test_names_a_bad_checkpoint(self, tmp_path, capsys):
        folder = shutil.copytree(V2_LITE, tmp_path / "checkpoint")
        (folder / "model.safetensors").write_bytes(b"nonsense")
        assert run(tmp_path, "parity", f"--checkpoint={folder}") == (2, None)
        assert "model.safetensors" in capsys.readouterr().err
        assert run(tmp_path, "parity", f"--checkpoint={V2_LITE}", "--layer=7") == (2, None)
        assert "layer 7" in capsys.readouterr().err


class TestWrongNumbersAreCaught:
    """An experiment that can't fail shows nothing: break what each one watches over."""

    @staticmethod
    def scaled(function, factor):
        def broken(*arguments, **options):
            first, second = function(*arguments, **options)
            return first * jnp.asarray(factor, first.dtype), second

        return broken

    def test_correctness(self, tmp_path, monkeypatch):
        broken = self.scaled(correctness.paged_mla_attention, 1.01)
        monkeypatch.setattr(correctness, "paged_mla_attention", broken)
        status, result = run(tmp_path, "correctness", *SMALL["correctness"])
        assert status == 1
        assert not any(row["passed"] for row in result["rows"])

    def test_soak(self, tmp_path, monkeypatch):
        broken = self.scaled(soak.paged_mla_attention, 1.001)
        monkeypatch.setattr(soak, "paged_mla_attention", broken)
        status, result = run(tmp_path, "soak", *SMALL["soak"])
        assert status == 1
        assert result["steps"] == 25
        assert result["failures"] == len(result["rows"]) > 25

    @pytest.mark.parametrize(("back", "found"), [(0, "lost at the end"), (2, "are shared")])
    def test_soak_pages(self, tmp_path, monkeypatch, back, found):
        """The first page that is freed comes back not at all, or twice."""
        free, broken = PageAllocator.free, []

        def free_wrong(self, request_id):
            pages = self.pages(request_id)
            free(self, request_id)
            if pages and not broken:
                broken.append(pages[0])
                self._free.remove(pages[0])
                self._free.extend(pages[:1] * back)

        monkeypatch.setattr(PageAllocator, "free", free_wrong)
        status, result = run(tmp_path, "soak", *SMALL["soak"])
        assert status == 1
        assert any(found in row["what"] for row in result["rows"])

    def test_int8_accuracy(self, tmp_path, monkeypatch):
        """On the least data that it draws: the easy kind is within the bound where nothing is
        broken."""

        def two_cases(options):
            yield int8_accuracy.normal(options, "easy")
            yield int8_accuracy.normal(options, "hard", spread=3.0, hard=True)

        monkeypatch.setattr(int8_accuracy, "cases", two_cases)
        broken = self.scaled(int8_accuracy.paged_mla_attention, 1.02)
        monkeypatch.setattr(int8_accuracy, "paged_mla_attention", broken)
        status, result = run(tmp_path, "int8_accuracy", *SMALL["int8_accuracy"])
        assert status == 1
        assert 1.9e-2 < result["worst"]["token"] < 4e-2
        assert result["worst"]["token, bf16 P"] < 1e-2

    def test_demo(self, tmp_path, monkeypatch):
        monkeypatch.setattr(demo, "mla_layer", self.scaled(demo.mla_layer, 1.05))
        status, result = run(tmp_path, "demo", *SMALL["demo"], "--implementations=xla")
        assert status == 1
        assert not any(row["passed"] for row in result["rows"] if "passed" in row)


def test_soak_traces_once_and_lives_a_full_life(tmp_path):
    """Everything that can happen to a request does, in one compiled step."""
    _, result = run(tmp_path, "soak", *SMALL["soak"], "--steps=120", "--seed=1")
    assert (result["steps"], result["failures"], result["traces"]) == (120, 0, 1)
    assert all(count > 0 for count in result["counts"].values())
    assert result["mean_occupancy"] > 0.7
    assert result["peak_occupancy"] == 1


def test_demo_writes_and_reads_its_own_checkpoint(tmp_path, monkeypatch):
    small = dataclasses.replace(
        demo.small_config(),
        hidden_size=32,
        num_heads=2,
        q_lora_rank=16,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    )
    monkeypatch.setattr(demo, "small_config", lambda: small)
    status, result = run(
        tmp_path,
        "demo",
        *SMALL["demo"][1:],
        "--layout=NZ",
        "--dtype=bfloat16",
        "--implementations=xla",
    )
    assert status == 0
    assert result["files"] == ["checkpoint", "demo.png"]
    assert {p.name for p in (tmp_path / "demo" / "checkpoint").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
