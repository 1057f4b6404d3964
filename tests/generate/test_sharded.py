"""A model whose heads and experts are split over two devices: its tokens are those of float64."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.generate import weights
from experiments.generate.engine import Engine, Sizes
from experiments.generate.float64 import in_float64, logits_float64
from experiments.generate.model import ModelConfig, Routing
from experiments.generate.requests import Request
from experiments.generate.sharded import mesh_of, placed
from mla_jax import MLAConfig

# Both kinds of layers, groups and shared experts.
CONFIG = ModelConfig(
    attention=MLAConfig(
        hidden_size=16, num_heads=2, q_lora_rank=8, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8,
    ),
    vocab_size=64, num_layers=2, num_dense_layers=1, dense_width=24, expert_width=12,
    shared_width=12, routing=Routing("sigmoid", 8, 3, 4, 2, True, 1.5), norm_eps=1e-6,
)  # fmt: skip
SIZES = Sizes(slots=2, drafts=1, prefill_rows=1, chunk=8, max_tokens=32, num_pages=5)


def drawn_params(seed):
    rng = np.random.default_rng(seed)
    shapes = weights.shapes_of(CONFIG, "float32")
    return jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(s.dtype), shapes)


def test_tokens_are_those_of_float64():
    """The weights are split, and each greedy token is the likeliest of the whole model."""
    params = drawn_params(0)
    rng = np.random.default_rng()
    requests = [Request(i, rng.integers(0, 64, 9 + i).tolist(), 6) for i in range(3)]
    mesh = mesh_of(CONFIG, 2)
    split = placed(params, CONFIG, mesh)
    dense, moe = split.layers
    assert moe.feed_forward.routed.down.addressable_shards[0].data.shape == (4, 12, 16)
    assert dense.attention.w_uq.addressable_shards[0].data.shape[1] == 1
    served = Engine(split, CONFIG, SIZES, mesh=mesh)
    found, exact = served.run(requests), in_float64(params)
    for request in requests:
        new = found[request.id]
        logits = logits_float64(exact, CONFIG, np.array([*request.prompt, *new[:-1]]))
        logits = logits[len(request.prompt) - 1 :]
        below = logits.max(-1) - logits[np.arange(len(new)), new]
        assert len(new) == 6
        assert below.max() < 1e-4 * logits.std()
    assert len(served.pool.pages.sharding.device_set) == 2


@pytest.mark.parametrize(
    ("devices", "changes", "named"),
    [
        (99, {}, "at most the 8 devices"),
        (4, {}, "must divide num_heads = 2, got 4"),
        (2, {"dense_width": 9}, "must divide dense_width = 9"),
        (2, {"shared_width": 9}, "must divide shared_width = 9"),
    ],
)
def test_refused_numbers_of_devices(devices, changes, named):
    with pytest.raises(ValueError, match=named):
        mesh_of(dataclasses.replace(CONFIG, **changes), devices)
