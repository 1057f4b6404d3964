"""Reads the shape of a whole model from its config.json.

`MLAConfig.from_hf` reads the attention's keys and refuses what asks for another attention. This
module does the same for the rest of the model: a key that is about the feed-forward part, the
experts, the norms or the logits, and that neither it nor `MLAConfig` reads, must have its neutral
value. Otherwise it is an error that names the key.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.generate.model import ModelConfig, Routing
from mla_jax import PRESETS, CheckpointError, MLAConfig, checks
from mla_jax.checkpoints.config_json import (
    config_json_path,
    language_model_config,
    read_json_object,
    shown,
)
from mla_jax.checkpoints.config_keys import READ as READ_BY_ATTENTION
from mla_jax.config.fields import bounded_number, positive_int
from mla_jax.config.rope_json import required

# Model types, and whether their experts are V3's. Kimi-K2 is published with V3's code.
IS_V3 = {"deepseek_v2": False, "deepseek_v3": True, "kimi_k2": True}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READ = _names(
    """
    vocab_size intermediate_size moe_intermediate_size first_k_dense_replace n_routed_experts
    n_shared_experts num_experts_per_tok scoring_func topk_method n_group topk_group norm_topk_prob
    routed_scaling_factor rms_norm_eps tie_word_embeddings hidden_act moe_layer_freq mlp_bias
    """
)
# Keys whose names are about these parts but that change nothing in inference. The layers of
# multi-token prediction come after the model's own and are not loaded.
_LEFT_ALONE = _names(
    """
    num_nextn_predict_layers num_nextn_predict_heads aux_loss_alpha seq_aux router_aux_loss_coef
    output_router_logits router_dtype moe_router_dtype ep_size moe_backend experts_implementation
    output_hidden_states return_hidden_states initializer_range hidden_dropout embd_pdrop
    resid_pdrop num_logits_to_keep output_logits expert_parallel expert_capacity_factor
    """
)
_STEMS = re.compile(
    "moe|expert|router|routed|top_?k_(?!$)|mlp|ffn|feed_forward|hidden_act|activation|(^|_)act_fn"
    "|(^|_)norm|scale|scaling|multiplier|logit|softcap|embed|residual|bias|dense|clamp|hyper"
    "|limit|tie_|engram|first_k|n_group|intermediate"
)
_ONES = re.compile("multiplier$|scale$|scaling$|^logits_scaling$")


def read_config(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """Reads the shape of a model from a config.json, from its folder, or from its dict.

    Raises FileNotFoundError if there is none, and CheckpointError that names the file and the key
    that is missing, malformed, or asks for a model that this experiment does not compute.
    """
    attention = MLAConfig.from_hf(source)
    where = "config.json"
    if not isinstance(source, Mapping):
        path = config_json_path(source)
        source, where = read_json_object(path), str(path)
    raw, _ = language_model_config(source, where)
    try:
        return _read(raw, attention)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _read(raw: Mapping[str, Any], attention: MLAConfig) -> ModelConfig:
    model_type = raw.get("model_type", "deepseek_v3")
    if model_type not in IS_V3:
        raise ValueError(
            f"model_type must be one of {', '.join(IS_V3)}, got {shown(model_type)}, of which "
            "only the attention is known"
        )
    foreign = [f"{key} = {shown(value)}" for key, value in raw.items() if _is_foreign(key, value)]
    if foreign:
        raise ValueError(f"asks for a model that is not computed here: {', '.join(foreign[:8])}")
    for key, neutral in (("hidden_act", "silu"), ("moe_layer_freq", 1), ("mlp_bias", False)):
        if raw.get(key, neutral) != neutral:
            raise ValueError(f"{key} must be {neutral!r}, got {shown(raw[key])}")
    layers = positive_int("num_hidden_layers", required(raw, "num_hidden_layers"))
    dense_layers = layers  # of a model without experts
    if raw.get("n_routed_experts") is not None:
        given = checks.require_int(
            "first_k_dense_replace", required(raw, "first_k_dense_replace"), 0
        )
        dense_layers = min(given, layers)
    has_moe, width = dense_layers < layers, 1
    if has_moe:
        width = positive_int("moe_intermediate_size", required(raw, "moe_intermediate_size"))
    shared = checks.require_int("n_shared_experts", raw.get("n_shared_experts") or 0, 0)
    return ModelConfig(
        attention=attention,
        vocab_size=positive_int("vocab_size", required(raw, "vocab_size")),
        num_layers=layers,
        num_dense_layers=dense_layers,
        dense_width=positive_int("intermediate_size", required(raw, "intermediate_size")),
        expert_width=width,
        shared_width=shared * width,
        routing=_routing(raw, IS_V3[model_type]) if has_moe else NO_ROUTING,
        norm_eps=bounded_number(
            "rms_norm_eps", raw.get("rms_norm_eps", 1e-6), "a positive number", 1e-30, 1.0
        ),
        tied_head=checks.require_bool("tie_word_embeddings", raw.get("tie_word_embeddings", False)),
    )


NO_ROUTING = Routing("softmax", 1, 1, 1, 1, False, 1.0)  # of a model without experts


# DeepSeek-V2-Lite, with the numbers of its published config.json.
LITE = ModelConfig(
    attention=PRESETS["deepseek-v2-lite"],
    vocab_size=102400,
    num_layers=27,
    num_dense_layers=1,
    dense_width=10944,
    expert_width=1408,
    shared_width=2 * 1408,
    routing=Routing("softmax", 64, 6, 1, 1, normalize=False, scale=1.0),
    norm_eps=1e-6,
)


def _routing(raw: Mapping[str, Any], is_v3: bool) -> Routing:
    experts = positive_int("n_routed_experts", raw["n_routed_experts"])
    chosen = positive_int("num_experts_per_tok", required(raw, "num_experts_per_tok"))
    scoring = raw.get("scoring_func", "sigmoid" if is_v3 else "softmax")
    method = raw.get("topk_method", "noaux_tc" if is_v3 else "greedy")
    wanted = ("noaux_tc",) if is_v3 else ("greedy", "group_limited_greedy")
    checks.require_one_of("scoring_func", scoring, ("sigmoid" if is_v3 else "softmax",))
    checks.require_one_of("topk_method", method, wanted)
    groups, kept = 1, 1
    if method != "greedy":
        groups = positive_int("n_group", required(raw, "n_group"))
        kept = positive_int("topk_group", required(raw, "topk_group"))
    if experts % groups or kept > groups or chosen > experts // groups * kept:
        raise ValueError(
            f"n_group = {groups} and topk_group = {kept} must divide {experts} experts and leave "
            f"num_experts_per_tok = {chosen} of them for a token"
        )
    if is_v3 and groups > 1 and experts // groups < 2:
        raise ValueError(f"n_group = {groups} must leave two experts per group, of {experts}")
    normalize = checks.require_bool("norm_topk_prob", required(raw, "norm_topk_prob"))
    scale = bounded_number(
        "routed_scaling_factor", required(raw, "routed_scaling_factor"), "a positive number",
        1e-6, 1e6,
    )  # fmt: skip
    if normalize and not is_v3:
        # DeepSeek's code of V2 normalizes instead of scaling. transformers ignores norm_topk_prob
        # there, and scales. All published models have False, where the two agree.
        scale = 1.0
    return Routing(scoring, experts, chosen, groups, kept, normalize, scale)


def _is_foreign(key: str, value: Any) -> bool:
    """Whether a key is about these parts, is not read, and has no neutral value."""
    if key in _READ or key in READ_BY_ATTENTION or key in _LEFT_ALONE:
        return False
    if value is None or value is False or value in ("", [], {}):
        return False
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    if not _STEMS.search(name) or re.search("quant|loss|dropout|attn|attention|rope", name):
        return False
    return not (_ONES.search(name) and value == 1)
