"""The decode benchmark: what it checks, skips, resumes and reports; on a CPU, by fakes."""

import errno
import json
import os
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from unittest.mock import Mock

import pytest
from benchmark_runs import SETUP, SMALL, run

from experiments.framework.results import validate_result
from experiments.speed import benchmark, timing
from experiments.speed.decode import programs, runner
from experiments.speed.decode.contenders import Contender, contender
from experiments.speed.decode.programs import Work
from experiments.speed.decode.runner import Journal, Runner
from experiments.speed.shapes import shapes

pytestmark = pytest.mark.usefixtures("small_ceilings", "unrendered")


class TestRuns:
    def test_measures_checks_and_resumes(self, tmp_path, monkeypatch, capsys):
        status, first = run(tmp_path, *SMALL, "--batch=1", "--implementations=xla,jnp")
        assert status == 0
        validate_result(first)
        assert [row["implementation"] for row in first["rows"]] == ["jnp", "xla"]
        assert all(row["error"] < 4e-3 and row["us"] > 0 for row in first["rows"])
        assert all(row["speed_over_jnp"] > 0 for row in first["rows"])
        monkeypatch.setattr(runner, "time_bursts", None)  # nothing is timed again
        status, second = run(tmp_path, *SMALL, "--batch=1", "--implementations=xla,jnp")
        assert status == 0
        assert second["rows"] == first["rows"]
        assert "2 done before, 0 to run" in capsys.readouterr().out
        assert len(second["sessions"]) == 2

    def test_ends_in_time_and_says_what_is_left(self, tmp_path, monkeypatch):
        status, result = run(
            tmp_path, *SMALL, "--batch=1,4", "--implementations=xla", "--seconds=1e-9"
        )
        assert status == 1  # nothing was measured
        assert (result["left"], result["rows"]) == (2, [])
        status, result = run(tmp_path, *SMALL, "--batch=1,4", "--implementations=xla")
        assert (status, result["left"], len(result["rows"])) == (0, 0, 2)

    def test_a_killed_run_becomes_a_result_anywhere(self, tmp_path, monkeypatch, capsys):
        def killed(*_):
            raise KeyboardInterrupt

        arguments = (*SMALL, "--batch=1,4", "--implementations=xla")
        add = runner.Journal.add
        monkeypatch.setattr(
            runner.Journal,
            "add",
            lambda self, *a, **k: killed() if self.rows else add(self, *a, **k),
        )
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *arguments)
        assert not (tmp_path / "benchmark" / "result.json").exists()
        monkeypatch.setattr(benchmark, "measured_ceilings", killed)  # it would run something
        status, result = run(tmp_path, *SMALL, "--batch=1,4", "--collect")
        assert (status, result["left"], len(result["rows"])) == (0, 1, 1)
        assert len(result["sessions"]) == 1
        last = json.loads((tmp_path / "benchmark" / "rows.jsonl").read_text().splitlines()[-1])
        assert result["duration_s"] == last["at_s"]
        assert result["started"] == result["sessions"][0]["started"]
        assert run(tmp_path / "other", *SMALL, "--collect") == (2, None)
        assert "no rows.jsonl in" in capsys.readouterr().err
        assert not (tmp_path / "other").exists()

    def test_no_pool_is_begun_late_and_the_one_of_most_rows_is_first(self, tmp_path, monkeypatch):
        begun = []
        monkeypatch.setattr(Runner, "_run_pool", lambda self, pool, mine, *_: begun.append(mine))
        rows = [*shapes((2,), (1,), (1,), (32,), page_size=(16,)),
                *shapes((2,), (1,), (2,), (32, 64), page_size=(16,))]  # fmt: skip
        journal = Journal(tmp_path / "rows.jsonl")
        tasks = [(row, contender("xla")) for row in rows]
        assert Runner(SETUP, journal, 0).run(tasks) == 3
        assert [len(tasks) for tasks in begun] == [2, 1]
        assert Runner(SETUP, journal, 1e-9).run(tasks) == 3
        assert len(begun) == 2

    def test_what_is_compiled_is_little_and_nothing_when_late(self, tmp_path, monkeypatch):
        counts, ends = [], []
        compile_ = Runner._compile

        def counted(self, pool, chunk):
            counts.append(len(chunk))
            programs = compile_(self, pool, chunk)
            self._end = ends.pop() if ends else self._end
            return programs

        monkeypatch.setattr(Runner, "_compile", counted)
        monkeypatch.setattr(runner, "WORKS_AT_A_TIME", 1)
        rows = list(shapes((1, 2), (1,), (1,), (32,), page_size=(16,)))
        tasks = [(row, contender("xla")) for row in rows]
        ends.append(0.0)  # over, once the first is compiled
        journal = Journal(tmp_path / "rows.jsonl")
        journal.begin({"read": 1.0})
        assert Runner(SETUP, journal, 1000).run(tasks) == 2
        assert counts == [1]
        assert Runner(SETUP, journal, 0).run(tasks) == 0
        assert counts == [1] * 3

    def test_wrong_numbers_fail_and_are_not_timed(self, tmp_path, monkeypatch):
        right = programs.paged_mla_attention

        def wrong(*arguments, **options):
            o, lse = right(*arguments, **options)
            return o * 1.02, lse

        monkeypatch.setattr(programs, "paged_mla_attention", wrong)
        status, result = run(tmp_path, *SMALL, "--batch=1", "--implementations=xla,jnp")
        assert status == 1
        rows = {row["implementation"]: row for row in result["rows"]}
        assert rows["jnp"]["status"] == "measured"
        assert rows["xla"]["status"] == "failed"
        assert "wrong: error 2" in rows["xla"]["reason"]
        assert "us" not in rows["xla"]

    def test_what_raises_is_a_row_and_stops_nothing(self, tmp_path, monkeypatch):
        def broken(*_):
            raise RuntimeError("no luck")

        monkeypatch.setattr(Work, "step", broken)
        status, result = run(tmp_path, *SMALL, "--batch=1", "--implementations=xla,jnp")
        rows = {row["implementation"]: row for row in result["rows"]}
        assert status == 1
        assert rows["xla"]["reason"] == "RuntimeError: no luck"
        assert rows["jnp"]["status"] == "measured"

    def test_a_lost_device_ends_the_run_without_a_row(self, tmp_path, monkeypatch):
        def broken(*_):
            monkeypatch.setattr(runner.jax, "block_until_ready", broken)
            raise RuntimeError("illegal address")

        monkeypatch.setattr(Work, "step", broken)
        status, result = run(tmp_path, *SMALL, "--batch=1", "--implementations=xla")
        assert (status, result["rows"], result["left"]) == (1, [], 1)

    def test_what_cannot_run_is_skipped_with_its_reason(self, tmp_path):
        status, result = run(
            tmp_path, *SMALL, "--batch=1", "--implementations=xla", "--memory_gib=1e-6"
        )
        assert status == 1
        assert "the limit is" in result["rows"][0]["reason"]
        assert result["rows"][0]["status"] == "skipped"
        _, again = run(tmp_path, *SMALL, "--batch=1", "--collect")
        assert (again["counts"]["skipped"], again["left"]) == (len(result["rows"]), 0)

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (("--implementations=abacus",), "abacus"),
            (("--preset=tiny", "--heads=99"), "no row that passes"),
            (("--page_size=7",), "--page_size=7"),
            (("--peers=abacus",), "--peers=abacus"),
        ],
    )
    def test_bad_flags_are_named(self, tmp_path, capsys, arguments, named):
        assert run(tmp_path / "out", *arguments) == (2, None)
        assert named in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_last_line_cut_anywhere_is_dropped_and_the_file_goes_on(self, tmp_path):
        journal = Journal(tmp_path / "rows.jsonl")
        journal.begin({"read": 1.0})
        first, second = shapes(batch=(1, 2))
        journal.add(first, "xla", "measured", us=1.0)
        start = journal.path.stat().st_size
        journal.add(second, "xla", "failed", reason="bad luck")
        # Another program's JSON may hold characters as they are, of several bytes each.
        whole = journal.path.read_bytes().replace(b"bad luck", "Pech, März".encode())
        for end in range(start, len(whole) + 1):
            journal.path.write_bytes(whole[:end])
            again = Journal.open(journal.path)
            kept = [(first, "xla"), (second, "xla")][: 1 + (end >= len(whole) - 1)]
            assert list(again.rows) == kept, end
            assert journal.path.read_bytes() == whole[:end]  # reading changes nothing
            if end % 16 and end < len(whole) - 2:
                continue
            again.add(first, "jnp", "measured", us=2.0)
            for _ in range(2):
                assert list(Journal.open(journal.path).rows) == [*kept, (first, "jnp")]

    def test_a_damaged_row_is_run_again_and_a_damaged_session_is_an_error(self, tmp_path, capsys):
        journal = Journal(tmp_path / "rows.jsonl")
        journal.begin({"read": 1.0})
        rows = list(shapes(batch=(1, 2)))
        for row in rows:
            journal.add(row, "xla", "measured", us=1.0)
        session, first, second = journal.path.read_bytes().splitlines(keepends=True)
        for damaged in (
            first[:30] + b"\n",  # what older versions left in the middle
            first.replace(b'"us": 1.0', b'"us": "x"'),
            first.replace(b'"session": 0', b'"session": 3'),
            first.replace(b'"batch": 1', b'"batch": null'),
            b'{"row": 7}\n',
            b'{"row": \xff}\n',
            b'{"row": ' + b"[" * 100_000 + b"\n",
        ):
            journal.path.write_bytes(session + damaged + second)
            assert list(Journal.open(journal.path).rows) == [(rows[1], "xla")]
            assert "rows.jsonl, line 2" in capsys.readouterr().err
        for damaged in (session[:30] + b"\n", b'{"session": 3}\n', b"3\n", b"\xff\n"):
            journal.path.write_bytes(damaged + first + second)
            with pytest.raises(benchmark.InputError, match="line 1"):
                Journal.open(journal.path)

    def test_a_full_disk_ends_the_run_in_one_line(self, tmp_path, capsys, monkeypatch):
        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("experiments.framework.journal.os.fsync", full)
        assert run(tmp_path, *SMALL, "--batch=1", "--implementations=xla") == (2, None)
        assert "No space left on device" in capsys.readouterr().err
        (tmp_path / "benchmark" / "rows.jsonl").unlink()
        (tmp_path / "benchmark" / "rows.jsonl").symlink_to("/dev/full")  # endless to a reader
        assert run(tmp_path, *SMALL, "--batch=1", "--implementations=xla") == (2, None)
        assert "rows.jsonl is not a file" in capsys.readouterr().err

    def test_what_ran_is_summed_over_sessions(self, tmp_path, monkeypatch):
        clock = 0.0
        monkeypatch.setattr("experiments.framework.journal.time.monotonic", lambda: clock)
        first, second = shapes(batch=(1, 2))
        for row, seconds in ((first, 300.0), (second, 100.0)):  # the first one was killed
            journal = Journal.open(tmp_path / "rows.jsonl")
            journal.begin({"read": 1.0})
            clock += seconds
            journal.add(row, "xla", "measured", us=1.0)
        clock += 5.0
        journal.end()
        for found in (journal, Journal.open(journal.path)):
            assert found.made.duration_s == pytest.approx(405)
            assert found.made.started == journal.sessions[0]["started"]

    def test_rows_of_other_widths_are_not_gone_on_with(self, tmp_path, capsys):
        arguments = (*SMALL, "--batch=1", "--implementations=xla", "--seconds=1e-9")
        assert run(tmp_path, *arguments)[0] == 1
        before = (tmp_path / "benchmark" / "rows.jsonl").read_bytes()
        assert run(tmp_path, *arguments, "--rope_dim=32")[0] == 2
        assert "(kv_lora_rank, rope_dim) = (32, 16), not (32, 32)" in capsys.readouterr().err
        assert (tmp_path / "benchmark" / "rows.jsonl").read_bytes() == before

    def test_programs_are_shared_by_rows_of_other_lengths(self, tmp_path, monkeypatch):
        compiled = []
        compile_ = Work.compile
        monkeypatch.setattr(
            Work,
            "compile",
            lambda self, who, rows, lowered: (
                compiled.append(rows) or compile_(self, who, rows, lowered)
            ),
        )
        rows = list(shapes((2,), (1,), (2,), (32, 64), ("uniform", "varlen"), (16,)))
        journal = Journal(tmp_path / "rows.jsonl")
        journal.begin({"read": 1.0})
        left = Runner(SETUP, journal, 0).run([(row, contender("xla")) for row in rows])
        assert left == 0
        assert [row["status"] for row in journal.rows.values()] == ["measured"] * 4
        assert [len(rows) for rows in compiled] == [4]

    def test_processes_lower_what_threads_compile(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Work, "step", None)  # in this process
        rows = list(shapes((1, 2), (1,), (1,), (32,), page_size=(16,)))  # two pools
        journal = Journal(tmp_path / "rows.jsonl")
        journal.begin({"read": 1.0})
        tasks = [(row, contender("xla")) for row in rows]
        assert Runner(SETUP, journal, 0, processes=1).run(tasks) == 0
        assert [found["status"] for found in journal.rows.values()] == ["measured"] * 2

    def test_few_pools_are_compiled_before_they_are_timed(self, tmp_path, monkeypatch):
        done = []

        def compile_ahead(self, works):
            done.append(len(works))
            return [{}] * len(works)

        monkeypatch.setattr(Runner, "_compile_ahead", compile_ahead)
        monkeypatch.setattr(Runner, "_run_pool", lambda *_: done.append("timed"))
        monkeypatch.setattr(runner, "TASKS_PER_PROCESS", 1)
        rows = shapes((2,), (1,), (1, 2, 3), (32,), page_size=(16,))
        tasks = [(row, contender("xla")) for row in rows]
        journal = Journal(tmp_path / "rows.jsonl")
        Runner(SETUP, journal, 0, processes=2).run(tasks)
        assert done == [2, "timed", "timed", 1, "timed"]
        assert Runner(SETUP, journal, 1e-9, processes=2).run(tasks) == 3
        assert len(done) == 5  # nothing is compiled late

    def test_a_killed_process_fails_no_row(self, tmp_path, monkeypatch):
        """One is killed while it lowers the first work, and the pool takes no second one."""
        given = Future()
        given.set_exception(BrokenProcessPool())

        class Killed:
            submit = staticmethod(Mock(side_effect=[given, BrokenProcessPool()]))
            shutdown = staticmethod(lambda **_: None)

        monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda *_: Killed)
        rows = list(shapes((2,), (1, 2), (1,), (32,), page_size=(16,)))
        journal = Journal(tmp_path / "rows.jsonl")
        journal.begin({"read": 1.0})
        Runner(SETUP, journal, 0, processes=1).run([(row, contender("xla")) for row in rows])
        assert [row["status"] for row in journal.rows.values()] == ["measured"] * 2
        assert Killed.submit.call_count == 2

    def test_every_time_has_its_spread_and_says_if_it_is_the_hosts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            runner,
            "time_bursts",
            lambda bursts, **_: {
                label: timing.Timing(*((5.0, 4.0, 6.0, True) if "separated" in label else
                                       (3.0, 2.0, 4.0, False)))
                for label in bursts
            },
        )  # fmt: skip
        (row,) = shapes((2,), (1,), (1,), (32,), page_size=(16,))
        journal = Journal(tmp_path / "rows.jsonl")
        journal.begin({"read": 1.0})
        who = Contender("xla", (("implementation", "xla"),), separated=True)
        assert Runner(SETUP, journal, 0).run([(row, who)]) == 0
        (found,) = journal.rows.values()
        wanted = {"us": 3.0, "us_low": 2.0, "us_high": 4.0, "us_host_bound": False,
                  "us_separated": 5.0, "us_separated_low": 4.0, "us_separated_high": 6.0,
                  "us_separated_host_bound": True}  # fmt: skip
        assert {key: found[key] for key in wanted} == wanted

    def test_pages_of_all_sizes_take_turns(self, tmp_path, monkeypatch):
        timed, compiled = [], []
        time_, compile_ = runner.time_bursts, Runner._compile
        monkeypatch.setattr(
            runner,
            "time_bursts",
            lambda bursts, rounds, pause: (
                timed.append((len(bursts), rounds)) or time_(bursts, rounds=rounds, pause=pause)
            ),
        )
        monkeypatch.setattr(
            Runner,
            "_compile",
            lambda self, pool, chunk: compiled.append(len(chunk)) or compile_(self, pool, chunk),
        )
        monkeypatch.setattr(runner, "WORKS_AT_A_TIME", 1)
        sizes = (16, 64)
        rows = [*shapes((1, 2), (1,), (1,), (32,), page_size=sizes),
                *shapes((2,), (1,), (1,), (32,), ("varlen",), page_size=(16,))]  # fmt: skip
        journal = Journal(tmp_path / "rows.jsonl")
        journal.begin({"read": 1.0})
        tasks = [(row, contender("xla")) for row in rows]
        assert Runner(SETUP, journal, 0).run(tasks) == 0
        assert compiled == [2, 2]
        assert timed == [(2, SETUP.page_rounds), (2, SETUP.page_rounds), (1, SETUP.rounds)]
        assert list(journal.rows) == [(row, "xla") for row in rows]
