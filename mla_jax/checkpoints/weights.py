"""The weights of one attention layer: `MLAParams`, random or from a checkpoint, and its writer.

The published format is Hugging Face's: a folder with config.json and safetensors files. Tensors are
named `model.layers.{layer}.self_attn.q_a_proj.weight` and so on, and matrices are [out, in].
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mla_jax import checks, quantize
from mla_jax.checkpoints.config_json import shown
from mla_jax.checkpoints.sources import Shape, hf_sources
from mla_jax.checkpoints.write import write_layer
from mla_jax.config import MLAConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLAParams:
    """The weights of one layer, named as in the DeepSeek-V2 paper; heads are an axis.

    `kv_b_proj` is stored as its two halves, in the orientation in which absorption uses them. A
    field is None if the config has no such weight: `w_dq` and `norm_q` without a low-rank query,
    and the biases without `attention_bias`.
    """

    w_dq: jax.Array | None  # [hidden, q_lora]
    norm_q: jax.Array | None  # [q_lora]
    w_uq: jax.Array  # [q_lora or hidden, H, nope + rope]
    w_dkv: jax.Array  # [hidden, kv_lora + rope]
    norm_kv: jax.Array  # [kv_lora]
    w_uk: jax.Array  # [H, nope, kv_lora]
    w_uv: jax.Array  # [H, kv_lora, v]
    w_o: jax.Array  # [H, v, hidden]
    b_dq: jax.Array | None = None  # [q_lora]
    b_dkv: jax.Array | None = None  # [kv_lora + rope]
    b_o: jax.Array | None = None  # [hidden]


_FIELDS = dataclasses.fields(MLAParams)


def param_shapes(config: MLAConfig) -> dict[str, Shape | None]:
    """Returns the shape of each field of `MLAParams`, or None for a field that is None."""
    c, heads, q_lora = config, config.num_heads, config.q_lora_rank
    bias = config.attention_bias
    return {
        "w_dq": None if q_lora is None else (c.hidden_size, q_lora),
        "norm_q": None if q_lora is None else (q_lora,),
        "w_uq": (q_lora or c.hidden_size, heads, c.qk_head_dim),
        "w_dkv": (c.hidden_size, c.latent_dim),
        "norm_kv": (c.kv_lora_rank,),
        "w_uk": (heads, c.qk_nope_head_dim, c.kv_lora_rank),
        "w_uv": (heads, c.kv_lora_rank, c.v_head_dim),
        "w_o": (heads, c.v_head_dim, c.hidden_size),
        "b_dq": (q_lora,) if bias and q_lora is not None else None,
        "b_dkv": (c.latent_dim,) if bias else None,
        "b_o": (c.hidden_size,) if bias else None,
    }


def check_params(params: MLAParams, config: MLAConfig) -> None:
    """Raises TypeError or ValueError naming the first field of `params` that does not fit `config`.

    Each field must be an array of float32, bfloat16 or float16, or None if the config has no such
    weight.
    """
    _require_params(params)
    _require_config(config)
    for name, wanted in param_shapes(config).items():
        value = getattr(params, name)
        got = None if value is None else np.shape(value)
        if got != wanted:
            raise ValueError(f"params.{name} must be {wanted} for this config, got {got}")
        if value is not None:  # a ShapeDtypeStruct will do
            checks.require_float(f"params.{name}", value)


def check_params_type(params: Any) -> None:
    """Raises TypeError unless `params` is an MLAParams of float arrays, of any shapes."""
    _require_params(params)
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value is not None:
            checks.require_array(f"params.{field.name}", value)
            checks.require_float(f"params.{field.name}", value)


def _require_params(params: Any) -> None:
    if not isinstance(params, MLAParams):
        raise TypeError(f"params must be an MLAParams, got {shown(params)}")


def _require_config(config: MLAConfig) -> None:
    if not isinstance(config, MLAConfig):
        raise TypeError(f"config must be an MLAConfig, got {shown(config)}")


def layer_number(layer: int, name: str = "layer") -> int:
    """Returns a layer number as a Python int; raises TypeError or ValueError unless it is one."""
    if not isinstance(layer, int | np.integer) or isinstance(layer, bool):
        raise TypeError(f"{name} must be an integer, got {shown(layer)}")
    if not 0 <= layer < 10**9:
        raise ValueError(f"{name} must be 0 or more, got {shown(layer)}")
    return int(layer)


def init_params(key: jax.Array, config: MLAConfig, dtype: DTypeLike = jnp.float32) -> MLAParams:
    """Returns random weights that keep unit variance: normal, scaled by fan-in; norms 1, biases 0.

    Args:
        key: one key of `jax.random.key` or `jax.random.PRNGKey`.
        config: gives the shapes.
        dtype: float32, bfloat16 or float16.
    """
    _require_config(config)
    dtype = checks.require_float_dtype("dtype", dtype)
    kind, shape = getattr(key, "dtype", None), np.shape(key)
    if not (
        (kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key) and shape == ())
        or (kind == jnp.uint32 and len(shape) == 1)
    ):
        raise TypeError(f"key must be one key of jax.random, got {shown(key)}")
    fan_in = {"w_uk": config.kv_lora_rank, "w_uv": config.kv_lora_rank}
    fan_in["w_o"] = config.num_heads * config.v_head_dim

    def init(key: jax.Array, name: str, shape: Shape | None) -> jax.Array | None:
        if shape is None:
            return None
        if len(shape) == 1:
            return jnp.full(shape, 1.0 if name.startswith("norm") else 0.0, dtype)
        value = jax.random.normal(key, shape, jnp.float32) * fan_in.get(name, shape[0]) ** -0.5
        return value.astype(dtype)

    shapes = param_shapes(config)
    keys = jax.random.split(key, len(shapes))
    drawn = {
        name: init(k, name, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return MLAParams(**drawn)  # type: ignore[arg-type]


def rotate_latent(params: MLAParams) -> MLAParams:
    """Returns weights of the same layer with a rotated latent, for more accurate int8 caches.

    The rotation is a Hadamard matrix R. The norm of a latent does not change when the latent is
    rotated, so that W_DKV can absorb R. W_UK and W_UV absorb its inverse and norm_kv, which becomes
    1. A step costs the same as before. The magnitudes of the channels are then similar. Products
    are computed in float32 and rounded to the weights' dtypes.

    Raises TypeError unless params are an `MLAParams` of floats. Raises ValueError for wrong shapes,
    or a kv_lora_rank that is not a power of 2.
    """
    check_params_type(params)
    for field in ("norm_kv", "w_dkv", "w_uk", "w_uv"):
        checks.require_float(f"params.{field}", getattr(params, field))
    checks.require_shape("params.norm_kv", params.norm_kv, "[kv_lora]", None)
    rank = params.norm_kv.shape[0]
    checks.require_shape("params.w_dkv", params.w_dkv, "[hidden, kv_lora + rope]", None, None)
    checks.require_shape("params.w_uk", params.w_uk, "[H, nope, kv_lora]", None, None, rank)
    checks.require_shape("params.w_uv", params.w_uv, "[H, kv_lora, v]", None, rank, None)
    turn = jnp.asarray(quantize.hadamard(rank), jnp.float32)
    norm = params.norm_kv.astype(jnp.float32)

    def product(spec: str, weight: jax.Array, turn: jax.Array) -> jax.Array:
        wide = weight.astype(jnp.float32)
        return jnp.einsum(spec, wide, turn, precision="highest").astype(weight.dtype)

    def down(weight: jax.Array) -> jax.Array:
        return weight.at[..., :rank].set(product("...c,cr->...r", weight[..., :rank], turn))

    return dataclasses.replace(
        params,
        w_dkv=down(params.w_dkv),
        b_dkv=None if params.b_dkv is None else down(params.b_dkv),
        norm_kv=jnp.ones_like(params.norm_kv),
        w_uk=product("hnc,cr->hnr", params.w_uk, norm[:, None] * turn),
        w_uv=product("hcv,cr->hrv", params.w_uv, norm[:, None] * turn),
    )


def params_from_hf(tensors: Mapping[str, Any], config: MLAConfig) -> MLAParams:
    """Makes `MLAParams` from tensors with the names and shapes of `hf_shapes(config)`."""
    sources = hf_sources(config)
    return params_of({name: s.weight(tensors[s.tensor]) for name, s in sources.items()})


def params_of(weights: Mapping[str, Any]) -> MLAParams:
    """Makes `MLAParams` from values by field; the other fields are None."""
    return MLAParams(**{field.name: weights.get(field.name) for field in _FIELDS})  # type: ignore[arg-type]


def params_to_hf(params: MLAParams, config: MLAConfig) -> dict[str, np.ndarray]:
    """Returns the tensors of `params` by name, as `params_from_hf` takes them: numpy, contiguous.

    Raises ValueError naming the field of `params` that does not have `config`'s shape.
    """
    check_params(params, config)
    p = jax.tree.map(np.asarray, params)
    kv_up = np.concatenate([p.w_uk, p.w_uv.swapaxes(1, 2)], axis=1)
    q_up = "q_proj.weight" if config.q_lora_rank is None else "q_b_proj.weight"
    tensors = {
        "q_a_proj.weight": None if p.w_dq is None else p.w_dq.T,
        "q_a_layernorm.weight": p.norm_q,
        q_up: p.w_uq.reshape(p.w_uq.shape[0], -1).T,
        "kv_a_proj_with_mqa.weight": p.w_dkv.T,
        "kv_a_layernorm.weight": p.norm_kv,
        "kv_b_proj.weight": kv_up.reshape(-1, config.kv_lora_rank),
        "o_proj.weight": p.w_o.reshape(-1, config.hidden_size).T,
        "q_a_proj.bias": p.b_dq,
        "kv_a_proj_with_mqa.bias": p.b_dkv,
        "o_proj.bias": p.b_o,
    }
    return {k: np.ascontiguousarray(v) for k, v in tensors.items() if v is not None}


def save_hf(folder: str | Path, config: MLAConfig, params: MLAParams, *, layer: int = 0) -> None:
    """Adds one attention layer to a checkpoint in the published format, which it may create.

    The first layer is written to model.safetensors. Each further layer has its own file, and
    model.safetensors.index.json lists them. A layer that exists is replaced. Each file is replaced
    as a whole, the index last. A concurrent reader, or one after a crash, therefore finds either
    the old layers or the new ones. Only one process at a time may write.

    All errors are raised before anything is written.

    Raises:
        TypeError, ValueError: an invalid argument, `params` that do not have `config`'s shapes, a
            `config` that the format can't express, or a folder with another config.
        FileExistsError: the folder holds weights that `save_hf` did not write.
    """

    layer = layer_number(layer)
    _require_config(config)
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {shown(folder)}")
    write_layer(Path(folder), config, layer, params_to_hf(params, config))
