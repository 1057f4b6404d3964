"""What experiments find and check: each one fails if what it watches over is broken."""

import dataclasses
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import GOLDEN, SMALL, V2_LITE, run

from experiments.accuracy import correctness, int8_accuracy
from experiments.framework.errors import lse_error, relative_error
from experiments.serving import demo, soak
from mla_jax.allocator import PageAllocator

pytestmark = pytest.mark.usefixtures("unrendered")


def test_errors_are_loud():
    wanted = np.array([3.0, 4.0])
    assert relative_error(wanted * 1.1, wanted) == pytest.approx(0.1)
    assert np.isnan(relative_error(np.array([3.0, np.nan]), wanted))
    empty = np.array([0.0, -np.inf])
    assert lse_error(empty + 1e-3, empty) == pytest.approx(1e-3)
    assert lse_error(np.zeros(2), empty) == np.inf
    assert np.isnan(lse_error(np.array([np.nan, -np.inf]), empty))


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
        small = *SMALL["correctness"], "--implementations=xla"
        status, result = run(tmp_path, "correctness", *small)
        assert status == 1
        assert len(result["rows"]) == 1
        assert not any(row["passed"] for row in result["rows"])

    def test_soak(self, tmp_path, monkeypatch):
        broken = self.scaled(soak.paged_mla_attention, 1.001)
        monkeypatch.setattr(soak, "paged_mla_attention", broken)
        status, result = run(tmp_path, "soak", *SMALL["soak"])
        assert status == 1
        assert result["steps"] == 25
        assert result["failures"] == len(result["rows"]) > 25

    @pytest.mark.parametrize(("back", "found"), [(0, "lost at the end"), (2, "reference counts")])
    def test_soak_pages(self, tmp_path, monkeypatch, back, found):
        """The first page that is freed comes back not at all, or twice."""
        free, broken = PageAllocator.free, []

        def free_wrong(self, request_id):
            pages = self.pages(request_id)
            free(self, request_id)
            freed = [page for page in pages if page in self._pool.free]
            if freed and not broken:
                broken.append(freed[0])
                self._pool.free.remove(freed[0])
                self._pool.free.extend(freed[:1] * back)

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
        small = *SMALL["demo"], "--requests=1", "--noint8"
        status, result = run(tmp_path, "demo", *small)
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
        "--requests=1",
        "--noint8",
    )
    assert status == 0
    assert result["files"] == ["checkpoint", "demo.png"]
    assert {p.name for p in (tmp_path / "demo" / "checkpoint").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
