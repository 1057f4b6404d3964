"""The whole model: logits of transformers, routing in float64, and what is refused."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from golden_logits import check_logits

from experiments.framework.errors import relative_error
from experiments.generate import model, weights
from experiments.generate.config import read_config
from experiments.generate.float64 import in_float64, logits_float64, mixture_float64
from experiments.generate.model import (
    Experts,
    FeedForward,
    Routing,
    forward,
    logits_of,
    mixture,
    next_tokens,
)
from mla_jax import CheckpointError, PagedKVCache, mla_layer


def test_logits_are_those_of_transformers(golden):
    """Of V3, in chunks of 16 tokens; test_engine.py does it for V2 in chunks of 3."""
    config, params, want = golden("deepseek_v3")

    @functools.partial(jax.jit, donate_argnums=1)
    def step(tokens, pool, *requests):
        hidden, pool = forward(params, config, tokens, pool, *requests)
        return logits_of(params, config, hidden), pool

    check_logits(config, want, step, rows=3, width=16, num_pages=16, wave=3)


def test_a_layer_is_traced_once_per_kind(golden, monkeypatch):
    """V3's four layers are one dense layer and three with experts."""
    config, params, _ = golden("deepseek_v3")
    traced = []

    def layer(*arguments, **options):
        traced.append(arguments)
        return mla_layer(*arguments, **options)

    monkeypatch.setattr(model, "mla_layer", layer)
    pool = PagedKVCache.create(
        5, page_size=16, kv_lora_rank=config.attention.kv_lora_rank,
        rope_dim=config.attention.qk_rope_head_dim, num_layers=4, dtype="float32",
    )  # fmt: skip
    batch = np.zeros((1, 3), np.int32), pool, np.zeros((1, 5), np.int32), *np.full((2, 1), 3)
    jax.eval_shape(lambda *batch: forward(params, config, *batch), *batch)
    assert len(traced) == 2


def test_a_mixture_of_experts():
    """Padding is NaN and must not reach the other tokens. There are no groups, nor shared experts.

    The models of the golden files have them, and V3's scores and bias.
    """
    routing = Routing("softmax", 8, 3, 1, 1, False, 16.0)
    rng = np.random.default_rng()
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    routed = FeedForward(normal(8, 16, 24) / 4, normal(8, 12, 16) / 4)
    params = Experts(router=normal(16, 8) / 3, bias=None, routed=routed, shared=None)
    x, real = normal(40, 16), rng.random(40) < 0.7
    padded = np.where(real[:, None], x, np.nan)
    got = jax.jit(mixture, static_argnums=1)(params, routing, padded, real)
    want = mixture_float64(in_float64(params), routing, x[real].astype(np.float64))
    assert relative_error(np.asarray(got)[real], want) < 1e-5


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_the_float64_model_is_that_of_transformers(golden, name):
    """The demo compares with it. Its greedy tokens are theirs, of V2 and of V3."""
    config, params, want = golden(name)
    exact = in_float64(params)
    length, tokens = want["prompt_lens"][0], want["tokens"][0]
    whole = np.concatenate([want["prompts"][0, :length], tokens[:-1]])
    logits = logits_float64(exact, config, whole)[length - 1 :]
    assert (logits.argmax(-1) == tokens).all()
    assert relative_error(want["decode"][0], logits[1:]) < 2e-5


def test_sampling():
    """Rows of one distribution: none leaves the nucleus, and shares are those of float64."""
    rng = np.random.default_rng()
    logits = rng.permutation(np.log([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])).astype(np.float32)
    rows, temperature, top_p = 4000, 0.7, 0.8
    tiled = np.tile(logits, (rows + 1, 1))
    temperatures = np.full(rows + 1, temperature, np.float32)
    temperatures[rows] = 0
    seeds = np.full(rows + 1, rng.integers(2**32), np.uint32)
    top_ps = np.full(rows + 1, top_p, np.float32)
    got = np.asarray(jax.jit(next_tokens)(tiled, temperatures, top_ps, seeds, np.arange(rows + 1)))
    shares = np.exp(logits.astype(np.float64) / temperature)
    shares /= shares.sum()
    order = np.argsort(-shares)
    nucleus = order[: 1 + np.searchsorted(np.cumsum(shares[order]), top_p)]
    want = np.where(np.isin(np.arange(6), nucleus), shares, 0)
    counts = np.bincount(got[:rows], minlength=6) / rows
    assert not counts[want == 0].any()
    assert np.abs(counts - want / want.sum()).max() < 5 * (0.25 / rows) ** 0.5
    assert got[rows] == logits.argmax()


class TestRefused:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("model_type", "glm4_moe_lite"),
            ("hidden_act", "gelu"),
            ("scoring_func", "softmax"),
            ("topk_method", "greedy"),
            ("moe_layer_freq", 2),
            ("mlp_bias", True),
            ("n_group", 3),
            ("num_experts_per_tok", 5),
            ("routed_scaling_factor", None),
            ("residual_multiplier", 0.5),
            ("final_logit_softcapping", 30.0),
            ("moe_router_activation", "tanh"),
            ("sliding_window", 16),
        ],
    )
    def test_configs(self, models, key, value):
        raw = json.loads((models / "deepseek_v3" / "config.json").read_text())
        with pytest.raises(CheckpointError, match=key):
            read_config(raw | {key: value})

    def test_harmless_keys_are_not(self, models):
        raw = json.loads((models / "deepseek_v3" / "config.json").read_text())
        more = {"aux_loss_alpha": 0.001, "torch_dtype": "bfloat16", "ep_size": 1, "use_cache": True}
        more |= {"pretraining_tp": 1, "initializer_range": 0.02, "bos_token_id": 0, "seq_aux": True}
        assert read_config(raw | more) == read_config(raw)

    def test_normalized_weights_of_v2_have_no_scale(self, models):
        raw = json.loads((models / "deepseek_v2" / "config.json").read_text())
        routing = read_config(raw | {"norm_topk_prob": True}).routing
        assert (routing.normalize, routing.scale) == (True, 1.0)

    @pytest.fixture
    def tensors(self, models):
        """All tensors of a model, by name."""
        with safetensors.safe_open(models / "deepseek_v3" / "model.safetensors", "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    @pytest.mark.parametrize(
        ("missing", "named"),
        [
            ("lm_head.weight", "lm_head.weight is missing"),
            ("model.norm.weight", "model.norm.weight is missing"),
            ("model.layers.2.mlp.experts.5.up_proj.weight", r"experts.5.up_proj.weight is missing"),
            ("model.layers.1.mlp.gate.e_score_correction_bias", "correction_bias is missing"),
            ("model.layers.3.", "layer 3 must exist"),
            ("model.layers.2.post_attention", "post_attention_layernorm.weight is missing"),
        ],
    )
    def test_missing_tensors(self, models, tensors, tmp_path, missing, named):
        shutil.copy(models / "deepseek_v3" / "config.json", tmp_path)
        kept = {name: value for name, value in tensors.items() if not name.startswith(missing)}
        assert len(kept) < len(tensors)
        safetensors.numpy.save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=named):
            weights.load(tmp_path)

    def test_other_widths_and_unknown_tensors(self, models, tensors, tmp_path):
        shutil.copy(models / "deepseek_v3" / "config.json", tmp_path)
        name = "model.layers.1.mlp.shared_experts.down_proj.weight"
        unknown = {"model.layers.1.mlp.gate.bias": tensors[name]}
        for more, named in (({name: tensors[name][1:]}, name), (unknown, "ask for: gate.bias")):
            safetensors.numpy.save_file(tensors | more, tmp_path / "model.safetensors")
            with pytest.raises(CheckpointError, match=named):
                weights.load(tmp_path)
