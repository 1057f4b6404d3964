"""The experiment `prefill`: batches as text, operations, and a check that sees wrong numbers."""

import json

import numpy as np
import pytest

from experiments import launch
from experiments.framework.experiment import InputError
from experiments.speed import prefill
from experiments.speed.prefill_batches import PRESETS, Batch

pytestmark = pytest.mark.usefixtures("unrendered")


def run(tmp_path, *flags):
    """(exit status, the row of `xla`) of the experiment."""
    always = ("--experiment=prefill", "--implementations=xla", "--rounds=3")
    status = launch.main(["launch", f"--output_dir={tmp_path}", *always, *flags])
    (row,) = json.loads((tmp_path / "prefill" / "result.json").read_text())["rows"]
    return status, row


@pytest.mark.parametrize("text", ["8x1024", "1x2048+14336", "64x~1000", "3x~40+7"])
def test_a_batch_is_its_text(text):
    batch = Batch.parse(text, seed=3)
    assert batch.text == text
    cu_q, cu_kv = batch.bounds
    assert (cu_q[-1], cu_kv[-1]) == (batch.num_queries, batch.num_keys)
    lens, totals = np.diff(cu_q), np.diff(cu_kv)
    assert len(lens) == batch.requests
    assert (lens >= 1).all()
    assert (totals - lens == batch.earlier).all()
    assert (len(set(lens)) > 1) == batch.ragged
    if batch.ragged:
        assert not np.array_equal(lens, Batch.parse(text, seed=4).query_lens)


def test_ragged_lengths_have_the_mean_of_their_text():
    assert abs(Batch.parse("4000x~1000").query_lens.mean() - 1000) < 50


@pytest.mark.parametrize("text", ["", "8", "0x4", "8x0", "x4", "8x~", "8x4+", "8x4-2", "8 x 4"])
def test_another_text_is_refused(text):
    with pytest.raises(InputError, match=r"--batches: wanted REQUESTSxTOKENS"):
        Batch.parse(text)


def test_operations_are_those_of_visible_keys():
    batch = Batch.parse("3x~12+5", seed=1)
    seen = np.concatenate([np.arange(n) + 1 + batch.earlier for n in batch.query_lens])
    assert batch.flops(7) == 2 * 7 * int(seen.sum()) * (192 + 128)


def test_presets_are_batches():
    for batches, heads in PRESETS.values():
        assert all(Batch.parse(text).text == text for text in batches)
        assert all(h > 0 for h in heads)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda o, lse: (o.at[0, 0].add(1.0), lse),
        lambda o, lse: (o, lse.at[-1, -1].add(0.01)),
        lambda o, lse: (o.at[5, 0, 3].set(np.nan), lse),  # in a row that is not compared
    ],
)
def test_wrong_numbers_fail(monkeypatch, tmp_path, wrong):
    right = prefill.ragged_mla_attention
    monkeypatch.setattr(prefill, "ragged_mla_attention", lambda *a, **kw: wrong(*right(*a, **kw)))
    status, row = run(tmp_path, "--batches=2x9+5", "--heads=2", "--dtype=float32")
    assert (status, row["passed"]) == (1, False)


def test_what_does_not_compile_has_no_numbers(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ValueError("no such kernel")

    monkeypatch.setattr(prefill, "ragged_mla_attention", fail)
    status, row = run(tmp_path, "--batches=1x3", "--heads=1")
    assert status == 1
    assert row["status"] == "failed: no such kernel"
    assert "tflops" not in row


def test_a_batch_that_fails_while_it_runs_is_a_failed_row(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("out of memory\nand more lines")

    monkeypatch.setattr(prefill, "time_bursts", fail)
    status, row = run(tmp_path, "--batches=1x3", "--heads=1", "--dtype=float32")
    assert (status, row["status"], row["passed"]) == (1, "failed: out of memory", False)
    assert "tflops" not in row
