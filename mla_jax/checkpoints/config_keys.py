"""Finds keys of a config.json that ask for another attention than this library computes.

`MLAConfig` reads the keys in `READ`. Any other key may be present if it is in `LEFT_ALONE`, or if
its name has nothing to do with attention. The remaining keys must have their neutral value, which
asks for the attention that this library computes.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from mla_jax.checkpoints.config_json import WRAPPERS, excerpt, shown


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The keys that `MLAConfig.from_hf` reads.
READ = _names(
    """
    model_type hidden_size num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim
    qk_rope_head_dim v_head_dim rope_theta rope_scaling rope_parameters rope_interleave
    original_max_position_embeddings max_position_embeddings num_hidden_layers attention_bias
    partial_rotary_factor
    """
)

# Keys whose names are about attention but that do not change its results in inference: dropout,
# the choice of a kernel, what is returned, and heads and layers outside of attention.
LEFT_ALONE = _names(
    """
    attention_dropout attn_dropout attn_pdrop attention_probs_dropout_prob attention_dropout_prob
    attn_implementation _attn_implementation _attn_implementation_internal
    _attn_implementation_autoset attn_impl use_flash_attention use_flash_attention_2 use_flash_attn
    _flash_attn_2_enabled attention_backend output_attentions return_attentions
    attention_softmax_in_fp32 lm_head rm_head tie_lm_head chunk_size_feed_forward
    decoder_sparse_step mlp_layer_types n_positions max_positions num_nextn_predict_heads
    final_logit_softcapping logits_scaling logit_scale kv_cache_dtype kv_cache_scheme
    kv_cache_quant_algo position_ids
    """
)
_LEFT_ALONE_PREFIXES = (
    *("moe_", "router_", "expert_", "shared_expert", "mlp_", "ffn_", "lm_head_", "mtp_", "aux_"),
    *("mm_", "projector_", "medusa_", "eagle_", "global_view_"),
)

_STEMS = re.compile(
    "attn|attention|rotary|sliding|window|softcap|alibi|causal|bidirectional|qkv|softmax"
    "|^index_(?!token)|^indexer|^k_|(^|_)k_(norm|layernorm|proj|bias|scale)"
    "|^(layer|block|mixer)s?_(block_)?types?$|^is_encoder_decoder$|^layer_group_size$"
    "|llama_?4|^sm_scale$|^floor_scale$|^cross_layer|^topk_tokens$|^use_bias$"
    "|^mscale|^beta_(fast|slow)$"
)
_OTHER_MODELS = _names("vision visual image images video audio media")
_WORDS = _names(
    """
    mla mha mqa gqa gla nsa dsa swa moba kda gdn cla yoco rope nope rotary yarn ntk logn xpos
    position positional positions pos head heads q v o qk kv query queries key keys value values
    lora latent latents sink sinks chunk chunked cap linear mamba ssm rwkv delta retention recurrent
    lightning conv shortconv sparse hybrid compress compressed compression compressor causal
    """
)

_NUMBER = int | float


def _is_one(value: Any) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool) and value == 1


def _is_true(value: Any) -> bool:
    return value is True


def _is_never(value: Any) -> bool:
    return False


def _is_full(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(item == "full_attention" for item in value)


def _one_of(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value.lower() in names


# The neutral values of keys whose neutral value is not False or empty. None is always neutral.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        (
            *("rotary_pct", "rotary_percent", "rope_pct", "rope_ratio"),
            *("attention_in_multiplier", "attention_out_multiplier", "key_multiplier"),
            *("attention_value_scale", "layer_group_size", "full_attention_interval"),
        ),
        _is_one,
    ),
    **dict.fromkeys(
        (
            *("use_mla", "is_mla", "is_causal", "causal", "use_causal_mask", "causal_attention"),
            *("use_rope", "apply_rope", "use_rotary_embedding", "use_rotary_position_embeddings"),
            *("use_rotary", "scale_attn_weights", "scale_attention", "qk_latent_layernorm"),
            *("multi_latent_attention", "kv_norm"),
        ),
        _is_true,
    ),
    **dict.fromkeys(
        (
            *("query_pre_attn_scalar", "attention_multiplier", "softmax_scale", "attn_scale"),
            *("attention_scale", "qk_scale", "rope_interleaved", "is_neox_style", "rope_style"),
        ),
        _is_never,
    ),
    "layer_types": _is_full,
    "layer_type": _one_of("full_attention"),
    "attention_type": _one_of("mla", "full", "full_attention"),
    "attn_type": _one_of("mla", "full", "full_attention"),
    "attention_method": _one_of("mla"),
    "attention_types": _is_full,
    "position_embedding_type": _one_of("rope", "rotary"),
    "pos_emb_type": _one_of("rope", "rotary"),
}

# The neutral values of these keys follow from the shape of the layer.
_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "num_query_groups"),
    *("num_heads", "n_heads", "n_head", "multi_query_group_num"),
)
_WIDTHS = ("head_dim", "kv_channels", "d_head", "head_size", "attention_head_dim", "d_kv")
_SHAPED = frozenset((*_HEADS, *_WIDTHS, "qk_head_dim", "rotary_dim", "rope_head_dim"))


def foreign_keys(raw: Mapping[str, Any]) -> list[str]:
    """Returns the keys that ask for another attention, as "key = value", without `_SHAPED` keys."""
    slides = raw.get("use_sliding_window") is not False  # Qwen's configs keep an unused window
    return [
        f"{excerpt(key, 60)} = {shown(value)}"
        for key, value in raw.items()
        if _is_of_attention(key)
        and key not in _SHAPED
        and not _is_neutral(key, value)
        and (slides or key not in ("sliding_window", "max_window_layers"))
    ]


def foreign_shapes(raw: Mapping[str, Any], config: Any) -> list[str]:
    """Returns the keys that contradict the shape of an `MLAConfig`, as "key = value (not x)"."""
    c = config
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(_HEADS, (c.num_heads,))
    widths = (c.qk_rope_head_dim, c.qk_nope_head_dim, c.v_head_dim, c.qk_head_dim, c.latent_dim)
    wanted |= dict.fromkeys(_WIDTHS, (*widths, c.hidden_size // c.num_heads))
    wanted |= {"qk_head_dim": (c.qk_head_dim,)}
    wanted |= dict.fromkeys(("rotary_dim", "rope_head_dim"), (c.qk_rope_head_dim,))
    return [
        f"{key} = {shown(raw[key])} (not {' or '.join(map(str, dict.fromkeys(values)))})"
        for key, values in wanted.items()
        if raw.get(key) is not None and not (type(raw[key]) is int and raw[key] in values)
    ]


def _is_of_attention(key: Any) -> bool:
    if not isinstance(key, str) or key in READ or key in LEFT_ALONE or key in WRAPPERS:
        return False
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    if snake.startswith(_LEFT_ALONE_PREFIXES):
        return False
    words = set(re.findall("[a-z0-9]+", snake))
    if words & _OTHER_MODELS:
        return False
    return bool(_STEMS.search(snake) or words & _WORDS)


def _is_neutral(key: str, value: Any) -> bool:
    if value is None:
        return True
    if key in _NEUTRAL:
        return _NEUTRAL[key](value)
    if isinstance(value, _NUMBER) and not isinstance(value, bool):
        return value == 0 and bool(re.search("^(num|n|index)_|_layers$", key))
    return value is False or (isinstance(value, str | list | tuple | Mapping) and not value)
