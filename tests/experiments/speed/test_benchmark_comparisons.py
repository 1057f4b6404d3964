"""What measured rows are compared with: roofs, baselines, plain JAX and predictions."""

import contextlib
import dataclasses
import json
import unittest.mock

import pytest

from experiments.framework.experiment import Output
from experiments.speed import (
    benchmark,
    benchmark_comparisons,
    benchmark_pictures,
    benchmark_tables,
    timing,
)
from experiments.speed.decode.contenders import contender
from experiments.speed.decode.runner import Journal
from experiments.speed.decode.setup import Setup
from experiments.speed.shapes import Shape, preset

pytestmark = pytest.mark.usefixtures("small_ceilings")


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

    def test_plain_jax_runs_the_usual_rows_of_standard_where_a_kernel_runs_all(self):
        rows = preset("standard")
        who = [contender(name) for name in ("hopper", "xla", "jnp")]
        tasks = benchmark.tasks_of(rows, who, "standard")
        count = {w.name: sum(task[1] == w for task in tasks) for w in who}
        assert count["hopper"] == len(rows)
        assert 40 < count["jnp"] == count["xla"] < 80
        alone = benchmark.tasks_of(rows, who[1:], "standard")
        assert sum(task[1] == who[1] for task in alone) == len(rows)
