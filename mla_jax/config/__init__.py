"""The shape of a multi-head latent attention (MLA) layer: `MLAConfig`, its presets and its files.

Fields are named as in the published `config.json` files where they mean the same. The papers are
DeepSeek-V2 (arXiv 2405.04434, section 2.1), DeepSeek-V3 (arXiv 2412.19437) and YaRN (arXiv
2309.00071). Where papers and published code leave a choice, this library follows
`DeepseekV2Attention` and `DeepseekV3Attention` of Hugging Face `transformers`.
"""

from mla_jax.config.mla import PRESETS, MLAConfig, config_from_json
from mla_jax.config.yarn import YarnScaling, yarn_mscale

__all__ = ["PRESETS", "MLAConfig", "YarnScaling", "config_from_json", "yarn_mscale"]
