"""The benchmark of the Hopper kernel's options, on a CPU, by fakes."""

import pytest
from benchmark_runs import SETUP, run

from experiments.framework.results import validate_result
from experiments.speed import kernel_bench
from experiments.speed.shapes import shapes

pytestmark = pytest.mark.usefixtures("small_ceilings", "unrendered")


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
