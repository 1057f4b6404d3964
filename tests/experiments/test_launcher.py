"""The launcher: flags, errors in one line, signals, and what it prints."""

import dataclasses
import signal
import subprocess
import sys
import typing

import pytest
from small_runs import V2_LITE, run

from experiments import launch
from experiments.accounting import cache_size
from experiments.framework import console
from experiments.framework.experiment import Outcome
from experiments.framework.options import define_flags, flag, read_options
from experiments.serving import soak


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

    def test_as_a_command(self):
        """The exit status of the process."""
        command = [sys.executable, "-m", "experiments.launch", "--experiment=soup"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "soup" in done.stderr


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
