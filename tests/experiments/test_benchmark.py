"""The decode benchmarks: what they time, check, skip, resume, put beside; on a CPU, by fakes."""

import contextlib
import dataclasses
import errno
import json
import os
import sys
import types
import unittest.mock

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import launch
from experiments.framework.experiment import Output
from experiments.framework.results import validate_result
from experiments.speed import baselines as peers
from experiments.speed import (
    benchmark,
    benchmark_comparisons,
    benchmark_pictures,
    benchmark_tables,
    kernel_bench,
    timing,
)
from experiments.speed.decode import pools, programs, runner
from experiments.speed.decode.contenders import Contender, contender
from experiments.speed.decode.inputs import Inputs
from experiments.speed.decode.pools import Pool
from experiments.speed.decode.programs import Work
from experiments.speed.decode.runner import Journal, Runner
from experiments.speed.decode.setup import Setup
from experiments.speed.shapes import HEADS, PRESETS, Shape, preset, shapes
from mla_jax.hal import PROFILES
from mla_jax.reference.attention import attention_float64

SMALL = (
    "--kv_lora_rank=32",
    "--rope_dim=16",
    "--preset=tiny",
    "--heads=4",
    "--s_q=1",
    "--kv_len=64",
)
SETUP = Setup(1 << 26, 32, 16, 1 << 16, 2, 2, 4, 4, rounds=2, page_rounds=3, pause=0.0)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    rates = {"copy": 4000.0, "read": 4000.0, "matmul": 700.0, "matmul_int8": 1400.0}
    monkeypatch.setattr(timing, "ceilings", lambda **_: rates)


def run(tmp_path, *arguments, name="benchmark"):
    status = launch.main(["launch", f"--experiment={name}", f"--output_dir={tmp_path}", *arguments])
    path = tmp_path / name / "result.json"
    return status, json.loads(path.read_text()) if path.exists() else None


class TestShapes:
    def test_standard_is_within_its_limits_and_on_the_grid(self):
        rows = preset("standard")
        assert 80 < len(rows) <= 200
        assert set(rows) <= set(preset("full"))
        for axis, values in {
            "heads": HEADS, "s_q": (1, 2, 4), "batch": (1, 4, 16, 64, 128),
            "kv_len": (1024, 4096, 16384, 65536), "page_size": (1, 16, 64, 128),
            "lengths": ("uniform", "varlen"), "dtype": ("bf16", "int8"),
        }.items():  # fmt: skip
            assert {getattr(row, axis) for row in rows} == set(values), axis

    def test_standard_holds_every_row_that_has_a_bar(self):
        assert set(preset("bars")) <= set(preset("standard"))
        for bar in kernel_bench.BARS:
            assert any(bar.concerns(row) for row in preset("bars")), bar.work

    @pytest.mark.parametrize("name", [name for name in PRESETS if name != "full"])
    def test_presets_fit_an_h200(self, name):
        setup = Setup(60 << 30)
        for row in preset(name):
            assert pools.lacks_memory(row, setup) is None

    def test_labels_tell_all_rows_apart(self):
        assert len({row.label for row in preset("full")}) == len(preset("full"))


class TestPools:
    def test_few_short_requests_have_short_tables(self):
        setup = Setup(60 << 30)

        def work(batch, kv_len):
            rows = list(shapes((16,), (1,), (batch,), (1024, kv_len, 65536)))
            row = next(row for row in rows if row.kv_len == kv_len)
            return Work(row, Pool.of(rows, setup), setup)

        assert [work(*row).capacity for row in ((1, 4096), (4, 4096))] == [4096, 4096]
        assert [work(*row).capacity for row in ((1, 16384), (16, 4096))] == [65536, 65536]
        assert work(1, 4096).key != work(1, 16384).key == work(1, 65536).key
        assert work(1, 4096).tables.shape == (1, 64)

    def test_the_smallest_row_rotates_past_l2_and_the_largest_fits(self):
        rows = list(shapes((16,), (1,), (1, 1), (1024, 16384)))
        pool = Pool.of(rows, Setup(60 << 30))
        assert (pool.tokens, pool.capacity, pool.layers) == (16384, 16384, 128)
        large = Pool.of(list(shapes(kv_len=(1024, 16384))), Setup(60 << 30))
        assert large.layers == 12
        assert large.tokens * large.layers * 1152 <= 60 << 30

    def test_a_row_too_large_is_refused_with_its_reason(self):
        row = next(shapes(kv_len=(65536,)))
        assert "layers of its cache take 36.0 GiB" in pools.lacks_memory(row, Setup(30 << 30))

    @pytest.mark.parametrize("page_size", [1, 16, 64])
    def test_inputs_lie_where_the_block_table_says(self, page_size):
        row = next(shapes((2,), (1,), (3,), (100,), ("varlen",), (page_size,)))
        pool = Pool.of([row], SETUP)
        inputs = Inputs.make(row, SETUP, pool.fill(SETUP), pool.capacity)
        used = [
            page
            for table, length in zip(inputs.tables, row.seq_lens, strict=True)
            for page in table[: -(-length // page_size)]
        ]
        assert len(set(used)) == len(used)
        for request, length in enumerate(row.seq_lens):
            got = inputs.rows_of(request, 1)
            flat = np.asarray(inputs.layers[1]["pages"]).astype(np.float64)
            page = inputs.tables[request, (length - 1) // page_size]
            assert got.shape == (length, 48)
            np.testing.assert_array_equal(
                got[-1], flat[page * page_size + (length - 1) % page_size]
            )

    def test_int8_layers_are_within_half_a_step_of_normal_numbers(self):
        row = next(shapes((2,), (1,), (2,), (128,), dtype=("int8",)))
        layer, *_ = Pool.of([row], SETUP).fill(SETUP)
        assert layer["pages"].dtype == jnp.int8
        assert int(jnp.abs(layer["pages"]).max()) == 127
        values = np.asarray(layer["pages"]) * np.asarray(layer["scales"])[:, None]
        assert 0.8 < values.std() < 1.2
        assert SETUP.token_bytes("int8") == 32 + 2 * 16 + 4


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
        monkeypatch.setattr(Runner, "_run_pool", lambda self, pool, mine, names: begun.append(mine))
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
        rows = list(shapes((1, 2, 4), (1,), (1,), (32,), page_size=(16,)))
        tasks = [(row, contender("xla")) for row in rows]
        ends.append(0.0)  # over, once the first is compiled
        journal = Journal(tmp_path / "rows.jsonl")
        journal.begin({"read": 1.0})
        assert Runner(SETUP, journal, 1000).run(tasks) == 3
        assert counts == [1]
        assert Runner(SETUP, journal, 0).run(tasks) == 0
        assert counts == [1] * 4

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
            lambda self, who, rows: compiled.append(rows) or compile_(self, who, rows),
        )
        rows = list(shapes((2,), (1,), (2,), (32, 64), ("uniform", "varlen"), (16,)))
        journal = Journal(tmp_path / "rows.jsonl")
        journal.begin({"read": 1.0})
        left = Runner(SETUP, journal, 0).run([(row, contender("xla")) for row in rows])
        assert left == 0
        assert [row["status"] for row in journal.rows.values()] == ["measured"] * 4
        assert [len(rows) for rows in compiled] == [4]

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
        sizes = (16, 64, 128)
        rows = [*shapes((1, 2), (1,), (1,), (32,), page_size=sizes),
                *shapes((2,), (1,), (1,), (32,), ("varlen",), page_size=(16,))]  # fmt: skip
        journal = Journal(tmp_path / "rows.jsonl")
        journal.begin({"read": 1.0})
        tasks = [(row, contender("xla")) for row in rows]
        assert Runner(SETUP, journal, 0).run(tasks) == 0
        assert compiled == [3, 3]
        assert timed == [(3, SETUP.page_rounds), (3, SETUP.page_rounds), (1, SETUP.rounds)]
        assert list(journal.rows) == [(row, "xla") for row in rows]


class TestBeside:
    def row(self, **columns):
        shape = Shape(128, "bf16", 64, 1, 64, "uniform", 4096)
        return {**dataclasses.asdict(shape), "implementation": "hopper", "status": "measured",
                "session": 0, "us": 150.0, "us_separated": 155.4, **columns}  # fmt: skip

    def table(self, tmp_path, *rows, device="NVIDIA H200"):
        journal = Journal(tmp_path / "rows.jsonl")
        ceilings = {"copy": 4000.0, "read": 4400.0, "matmul": 700.0}
        journal.sessions = [{"environment": {"devices": [device]}, "ceilings": ceilings}]
        for row in rows:
            journal._keep(row)
        return benchmark_comparisons.finished(journal, Setup(1 << 30))

    def test_peers_prediction_and_ceilings_of_an_h200(self, tmp_path):
        jnp_row = self.row(implementation="jnp", us=600.0)
        page_1 = self.row(page_size=1, us=300.0)
        _, *rows = self.table(tmp_path, page_1, self.row(), jnp_row)
        ours = next(row for row in rows if row["implementation"] == "hopper")
        committed = json.loads((benchmark_comparisons.MEASURED / "h200_decode.json").read_text())[
            "rows"
        ]
        (known,) = [
            row["us"]
            for row in committed
            if (row["variant"], row["batch"], row["heads"], row["kv_len"])
            == ("flashmla", 128, 64, 4096)
            and row["lengths"] == "uniform"
        ]
        assert 130 < known < 170  # (cards differ)
        assert ours["peer_us"] == known
        assert ours["peer_us_source"] == "flashmla, benchmarks/measured/h200_decode.json"
        assert ours["speed_over_peer_us"] == pytest.approx(known / 150)
        assert ours["speed_over_jnp"] == 4
        assert ours["gb_per_s"] == pytest.approx(4145, rel=1e-3)
        assert ours["of_ceiling"] == pytest.approx(ours["gb_per_s"] / 4400)
        assert 120 < ours["predicted_us"] < 180
        error = (ours["predicted_us"] / 150 - 1) * 100
        assert ours["prediction_error_percent"] == pytest.approx(error)

    def test_nothing_is_above_its_roof(self, tmp_path):
        """Faster than XLA's own probes: the rows are the roof then, int8 has its own."""
        rows = [
            self.row(us=100.0),
            self.row(us=90.0, implementation="faster"),
            self.row(us=25.0, dtype="int8", heads=128, kv_len=1024),
            self.row(us=60.0, kv_len=1024, heads=128),
            self.row(us=1e6, implementation="slow"),
        ]
        table = self.table(tmp_path, *rows)
        shares = [row[key] for row in table for key in ("of_read", "of_matmul", "of_ceiling")]
        assert max(shares) == 1
        assert min(shares) > 0
        fastest = next(row for row in table if row["implementation"] == "faster")
        assert fastest["of_read"] == 1
        assert fastest["gb_per_s"] > 4400

    def test_a_cpu_has_no_ceiling(self, tmp_path, monkeypatch):
        monkeypatch.setattr(timing, "ceilings", lambda **_: pytest.fail("measured a ceiling"))
        assert benchmark.measured_ceilings() == {}
        monkeypatch.setattr(benchmark_pictures, "_draw_lines", lambda *_, **__: None)
        roofs, output = [], Output(tmp_path)
        monkeypatch.setattr(
            benchmark_pictures, "_draw_roofline", lambda axes, rows, roof, look: roofs.append(roof)
        )
        monkeypatch.setattr(
            benchmark_pictures.plotting,
            "figure",
            lambda path, title, **_: contextlib.nullcontext(unittest.mock.MagicMock()),
        )
        for session in ({"environment": {"devices": ["cpu"], "backend": "cpu"},
                         "ceilings": {"read": 1.0, "matmul": 1.0}},
                        {"environment": {"devices": ["cpu"]}, "ceilings": {}}):  # fmt: skip
            journal = Journal(tmp_path / "rows.jsonl")
            journal.sessions = [session]
            journal._keep(self.row())
            (row,) = table = benchmark_comparisons.finished(journal, Setup(1 << 30))
            assert row["gb_per_s"] > 0
            assert not {"of_read", "of_matmul", "of_ceiling"} & set(row)
            benchmark_pictures.draw(output, table, journal)
        assert roofs == [{}, {}]
        assert output.files == ["roofline.png", "time_by_batch.png"] * 2

    def test_devices_are_not_compared_with_each_other(self, tmp_path, monkeypatch):
        monkeypatch.setattr(benchmark_pictures, "_draw_lines", lambda *_, **__: None)
        journal = Journal(tmp_path / "rows.jsonl")
        journal.sessions = [
            {"environment": {"devices": [name]}, "ceilings": {"read": 4400.0, "matmul": 700.0}}
            for name in ("NVIDIA H200", "NVIDIA L40")
        ]
        journal._keep(self.row(implementation="jnp", us=600.0, session=1))
        journal._keep(self.row())
        table = benchmark_comparisons.finished(journal, Setup(1 << 30))
        assert not any("speed_over_jnp" in row for row in table if row["session"] == 0)
        assert benchmark_tables.best_words(table) == "2 shapes, no two times of one"
        output = Output(tmp_path)
        benchmark_pictures.draw(output, table, journal)
        assert output.files == ["roofline.png", "time_by_batch.png", "roofline_2.png",
                                "time_by_batch_2.png"]  # fmt: skip

    def test_another_device_has_no_peers_beside_it(self, tmp_path):
        (row,) = self.table(tmp_path, self.row(), device="cpu")
        assert "peer_us" not in row
        assert "predicted_us" not in row

    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            ("NVIDIA H200", "H200_SXM"),
            ("NVIDIA H100 80GB HBM3", "H100_SXM5"),
            ("NVIDIA A100-SXM4-80GB", "A100_SXM4_80GB"),
            ("NVIDIA A100-SXM4-40GB", "A100_SXM4_40GB"),
            ("NVIDIA L40", "L40"),
            ("NVIDIA L40S", None),
            ("NVIDIA H20", "H20"),
            ("cpu", None),
        ],
    )
    def test_profiles_by_device_kind(self, kind, name):
        assert benchmark_comparisons.profile_of(kind) is PROFILES.get(name)

    def test_plain_jax_runs_the_usual_rows_of_standard_where_a_kernel_runs_all(self):
        rows = preset("standard")
        who = [contender(name) for name in ("hopper", "xla", "jnp")]
        tasks = benchmark.tasks_of(rows, who, "standard")
        count = {w.name: sum(task[1] == w for task in tasks) for w in who}
        assert count["hopper"] == len(rows)
        assert 40 < count["jnp"] == count["xla"] < 80
        alone = benchmark.tasks_of(rows, who[1:], "standard")
        assert sum(task[1] == who[1] for task in alone) == len(rows)


class TestKernelBench:
    def test_says_what_it_needs(self, tmp_path, capsys):
        assert run(tmp_path / "out", name="kernel_bench") == (2, None)
        assert "compute capability 9.0" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_variants_bars_and_costs(self, tmp_path, monkeypatch):
        monkeypatch.setattr(kernel_bench, "KERNEL", "xla")
        monkeypatch.setattr(
            kernel_bench,
            "preset",
            lambda _: list(shapes((2,), (1,), (1,), (64,), page_size=(16, 64))),
        )
        monkeypatch.setattr(kernel_bench.Setup, "here", staticmethod(lambda *_: SETUP))
        status, result = run(tmp_path, "--variants=multiply,exponent_add", name="kernel_bench")
        assert status == 0, result["summary"]
        validate_result(result)
        names = [row["implementation"] for row in result["rows"]]
        assert sorted(names) == ["jnp", "xla exponent_add", "xla multiply", "xla multiply"]
        assert all(
            "us_separated" in row for row in result["rows"] if row["implementation"] != "jnp"
        )
        assert [cost["options"] for cost in result["costs"]] == ["xla multiply", "xla exponent_add"]
        assert result["costs"][0]["time_most"] == 1
        assert {bar["met"] for bar in result["bars"]} == {None}
        status, again = run(tmp_path, "--collect", name="kernel_bench")
        assert (status, again["left"]) == (0, 2)  # with the variants that were not asked for
        assert (again["rows"], again["costs"]) == (result["rows"], result["costs"])

    def test_bars_take_the_worst_row(self):
        def row(us, **shape):
            shape = {"heads": 128, "s_q": 1, "batch": 64, "kv_len": 4096, "lengths": "uniform",
                     "page_size": 64, "dtype": "bf16", **shape}  # fmt: skip
            return {**shape, "implementation": "hopper multiply", "status": "measured", "us": us,
                    "speed_over_peer_us": 100 / us, "gb_per_s": 5000.0}  # fmt: skip

        table = [row(99.0), row(104.0, batch=128), row(900.0, kv_len=1024)]
        bars = {bar["bar"]: bar for bar in kernel_bench.bar_rows(table)}
        bar = bars["128 heads, large batches, back to back"]
        assert (bar["met"], bar["rows"]) == (True, 2)
        assert bar["worst"] == pytest.approx(100 / 104)
        table.append(row(110.0, kv_len=16384))
        bars = {bar["bar"]: bar for bar in kernel_bench.bar_rows(table)}
        assert bars["128 heads, large batches, back to back"]["met"] is False
        assert bars["1 x 1024"]["met"] is None
        pages = kernel_bench.with_pages([row(100.0), row(125.0, page_size=16)])
        assert pages[1]["speed_over_page_64"] == 0.8


class TestPeers:
    """FlashInfer by a fake of its module and of what it takes from torch."""

    @pytest.fixture
    def flashinfer(self, monkeypatch):
        torch, module = types.ModuleType("torch"), types.ModuleType("flashinfer.mla")

        class Tensor(np.ndarray):
            def float(self):
                return self.astype(np.float32).view(Tensor)

            def cpu(self):
                return self

            def numpy(self):
                return np.asarray(self)

        def tensor(values, dtype=None, device=None):
            return np.array(values, dtype).view(Tensor)

        class Wrapper:
            made: list = []  # noqa: RUF012
            log2 = True

            def __init__(self, workspace, backend):
                self.backend, self.runs = backend, 0
                Wrapper.made.append(self)

            def plan(self, **arguments):
                self.arguments = arguments

            def run(self, *, q_nope, q_pe, ckv_cache, kpe_cache, out, lse, return_lse):
                assert return_lse
                a, self.runs = self.arguments, self.runs + 1
                q = np.concatenate([q_nope, q_pe], -1)
                for i, length in enumerate(a["kv_len_arr"]):
                    pages = a["kv_indices"][a["kv_indptr"][i] : a["kv_indptr"][i + 1]]
                    kv = np.concatenate([ckv_cache[pages], kpe_cache[pages]], -1)
                    kv = kv.reshape(-1, kv.shape[-1])[:length].astype(np.float64)
                    here = slice(a["qo_indptr"][i], a["qo_indptr"][i + 1])
                    rank, scale = a["head_dim_ckv"], a["sm_scale"]
                    o, e = attention_float64(
                        q[here].astype(np.float64), kv, softmax_scale=scale, kv_lora_rank=rank
                    )
                    out[here], lse[here] = o, e / np.log(2)

        class Graph:
            def replay(self):
                pass

        torch.from_dlpack = lambda x: np.array(x).view(Tensor)
        torch.empty = lambda shape, dtype, device: np.zeros(shape, dtype).view(Tensor)
        torch.tensor = tensor
        torch.int8, torch.int32, torch.float32 = np.int8, np.int32, np.float32
        torch.bfloat16 = jnp.bfloat16
        torch.cuda = types.SimpleNamespace(
            is_available=lambda: True, CUDAGraph=Graph, synchronize=lambda: None,
            graph=lambda graph: contextlib.nullcontext(),
        )  # fmt: skip
        module.BatchMLAPagedAttentionWrapper = Wrapper
        for name, fake in (("torch", torch), ("flashinfer", types.ModuleType("flashinfer")),
                           ("flashinfer.mla", module)):  # fmt: skip
            monkeypatch.setitem(sys.modules, name, fake)
        peers.unavailable.cache_clear()
        yield module
        peers.unavailable.cache_clear()
        Wrapper.made.clear()

    def test_runs_beside_ours(self, tmp_path, flashinfer):
        status, result = run(
            tmp_path, *SMALL, "--batch=4", "--lengths=uniform", "--implementations=xla"
        )
        assert status == 0, result["rows"]
        rows = {row["implementation"]: row for row in result["rows"]}
        assert set(rows) == {"xla", "flashinfer_fa2", "flashinfer_fa3"}
        wrappers = flashinfer.BatchMLAPagedAttentionWrapper.made
        assert [wrapper.backend for wrapper in wrappers] == ["fa2", "fa3"]
        assert wrappers[0].arguments["page_size"] == 16
        assert wrappers[0].runs > 2
        assert rows["flashinfer_fa3"]["error"] < 4e-3
        assert "us_separated" in rows["flashinfer_fa3"]

    def test_one_that_fails_is_reported(self, tmp_path, flashinfer):
        def plan(self, **_):
            raise RuntimeError("no nvcc")

        flashinfer.BatchMLAPagedAttentionWrapper.plan = plan
        _, result = run(tmp_path, *SMALL, "--batch=4", "--implementations=xla")
        rows = {row["implementation"]: row for row in result["rows"]}
        assert rows["flashinfer_fa2"]["reason"] == "RuntimeError: no nvcc"
        assert rows["xla"]["status"] == "measured"

    def test_one_that_is_wrong_is_reported(self, tmp_path, flashinfer):
        run_ = flashinfer.BatchMLAPagedAttentionWrapper.run

        def wrong(self, *, out, **arguments):
            run_(self, out=out, **arguments)
            out *= 1.05

        flashinfer.BatchMLAPagedAttentionWrapper.run = wrong
        _, result = run(tmp_path, *SMALL, "--batch=4", "--implementations=xla")
        rows = {row["implementation"]: row for row in result["rows"]}
        assert "wrong: error" in rows["flashinfer_fa2"]["reason"]

    def test_missing_packages_are_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        peers.unavailable.cache_clear()
        assert "torch can't be imported" in peers.unavailable()
        peers.unavailable.cache_clear()
