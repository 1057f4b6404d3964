"""The demo's whole model: its tokens are float64's, and a wrong one is seen."""

import numpy as np
import pytest

from experiments.serving import demo_model
from experiments.serving.demo import small_config


def test_tokens_are_those_of_float64(monkeypatch):
    """Served in a batch with chunks, a shared prefix and drafts; one token that is wrong fails."""
    monkeypatch.setattr(demo_model, "REQUESTS", 3)
    monkeypatch.setattr(demo_model, "NEW", 6)
    row = demo_model.run(small_config(), "float32", 3)
    assert row["passed"], row
    assert row["furthest_below_best"] < 1e-4
    assert row["new_tokens"] == 18
    assert row["counts"]["prefill steps"] > 2
    assert row["counts"]["drafts"] > row["counts"]["drafts kept"]
    assert row["counts"]["tokens from the prefix cache"] > 0
    assert "18 tokens for 3 requests" in demo_model.in_words(row)

    run = demo_model.Engine.run

    def spoiled(engine, requests):
        found = run(engine, requests)
        found[1][2] = (found[1][2] + 1) % 128
        return found

    monkeypatch.setattr(demo_model.Engine, "run", spoiled)
    assert not demo_model.run(small_config(), "float32", 3)["passed"]


def test_a_failure_is_a_row(monkeypatch):
    def dies(*_):
        raise RuntimeError("ptxas has died\nof something")

    monkeypatch.setattr(demo_model, "Engine", dies)
    row = demo_model.run(small_config(), "bfloat16", 0)
    assert not row["passed"]
    assert demo_model.in_words(row).endswith("failed: ptxas has died.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_keep_the_scale(dtype):
    """Logits have a deviation of about 1, so that no token wins by much more than rounding."""
    config = demo_model.model_config(small_config())
    params = demo_model.in_float64(demo_model.random_params(config, dtype, 0))
    logits = demo_model.logits_float64(params, config, np.arange(20))
    assert 0.8 < logits.std() < 1.2
