"""The weights of a whole model: from a Hugging Face folder, or random ones of given sizes.

`mla_jax.load_hf_layers` reads the attention. The library's `Checkpoint` reads the other tensors by
name, dequantized if they are fp8. Names and shapes are checked before weights are read. The host
holds one tensor at a time, which is written in place into an array of its layer.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from experiments.framework.console import track
from experiments.generate.config import read_config
from experiments.generate.model import Experts, FeedForward, Layer, ModelConfig, ModelParams
from mla_jax import init_params, load_hf_layers
from mla_jax.checkpoints.read import Checkpoint

Shape = tuple[int, ...]
DTYPES = ("float32", "bfloat16")


def weight_dtype(dtype: DTypeLike) -> Any:
    """Returns the dtype; raises ValueError unless it is one of DTYPES."""
    found = jnp.dtype(dtype)
    if found.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {found.name}")
    return found


# -------------------------------------------------------------------------------------- the arrays


def shapes_of(config: ModelConfig, dtype: DTypeLike) -> ModelParams:
    """Returns the shape and dtype of every array of a model; the router is always in float32."""
    c, hidden, experts = config, config.attention.hidden_size, config.routing.num_experts
    dtype = weight_dtype(dtype)

    def array(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def network(width: int, *leading: int) -> FeedForward:
        return FeedForward(array(*leading, hidden, 2 * width), array(*leading, width, hidden))

    mixture = Experts(
        router=array(hidden, experts, dtype=jnp.float32),
        bias=array(experts, dtype=jnp.float32) if c.routing.scoring == "sigmoid" else None,
        routed=network(c.expert_width, experts),
        shared=network(c.shared_width) if c.shared_width else None,
    )
    attention = jax.eval_shape(lambda key: init_params(key, c.attention, dtype), jax.random.key(0))
    dense = Layer(attention, array(hidden), network(c.dense_width), array(hidden))
    moe = dataclasses.replace(dense, feed_forward=mixture)
    return ModelParams(
        embedding=array(c.vocab_size, hidden),
        layers=(dense,) * c.num_dense_layers + (moe,) * c.num_moe_layers,
        norm=array(hidden),
        head=None if c.tied_head else array(c.vocab_size, hidden),
    )


def _name(path: Any) -> str:
    """Returns the name of an array of a model, such as layers.2.feed_forward.routed.down."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _with_attention(params: ModelParams, attention: list[Any]) -> ModelParams:
    """Returns the model with other weights of the attention, one per layer; they may be None."""
    layers = (
        dataclasses.replace(layer, attention=mine)
        for layer, mine in zip(params.layers, attention, strict=True)
    )
    return dataclasses.replace(params, layers=tuple(layers))


# ------------------------------------------------------------------------------- from a checkpoint


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A published tensor, and where it goes: into an array, from the index `start` on."""

    name: str
    shape: Shape  # in the file, where matrices are [out, in]
    array: str  # as `_name` names it
    start: Shape = ()  # a leading part of an index; the other entries are 0
    offset: int = 0  # in the last axis


def load(folder: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[ModelConfig, ModelParams]:
    """Reads a whole model in `dtype`, one of DTYPES; the router is always in float32.

    Raises FileNotFoundError, or CheckpointError that names the file, key or tensor that is missing,
    malformed, or of another model.
    """
    dtype = weight_dtype(dtype)
    config = read_config(folder)
    with Checkpoint(folder) as checkpoint:
        for layer in range(config.num_layers):
            checkpoint.layer_prefix(layer)  # raises for a layer that is missing
        before = checkpoint.layer_prefix(0).removesuffix("layers.0.self_attn.")
        tensors = list(_tensors(config, before))
        for layer in range(config.num_layers):
            prefix = f"{before}layers.{layer}.mlp."
            names = [t.name.removeprefix(prefix) for t in tensors if t.name.startswith(prefix)]
            checkpoint.check_names(prefix, names)
        for tensor in tensors:
            checkpoint.check(tensor.name, tensor.shape)
        numbers = range(config.num_layers)
        attention = load_hf_layers(folder, numbers, dtype, stacked=False)[1]
        others = _with_attention(shapes_of(config, dtype), [None] * config.num_layers)
        paths, structure = jax.tree.flatten_with_path(others)
        arrays = _zeros(tuple((_name(path), shape) for path, shape in paths))
        tensors.sort(key=lambda tensor: checkpoint.place(tensor.name))
        for tensor in track(tensors, "loading weights"):
            value = checkpoint.read(tensor.name, [(0, n) for n in tensor.shape])
            array = arrays[tensor.array]
            if value.ndim == 2 and tensor.array not in ("embedding", "head"):
                value = np.ascontiguousarray(value.T)
            start = [*tensor.start, *[0] * (array.ndim - len(tensor.start))]
            start[-1] += tensor.offset
            arrays[tensor.array] = _write(array, value, tuple(start))
    leaves = [arrays[_name(path)] for path, _ in paths]
    return config, _with_attention(jax.tree.unflatten(structure, leaves), attention)


@functools.partial(jax.jit, static_argnums=0)
def _zeros(shapes: tuple[tuple[str, jax.ShapeDtypeStruct], ...]) -> dict[str, jax.Array]:
    return {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes}


@functools.partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, value: Any, start: tuple[int, ...]) -> jax.Array:
    value = value.reshape((1,) * (array.ndim - value.ndim) + value.shape).astype(array.dtype)
    return jax.lax.dynamic_update_slice(array, value, start)


def _tensors(config: ModelConfig, before: str) -> Iterator[_Tensor]:
    """Yields all tensors except those of the attention; `before` precedes "layers" in names."""
    hidden, vocab = config.attention.hidden_size, config.vocab_size
    yield _Tensor(f"{before}embed_tokens.weight", (vocab, hidden), "embedding")
    yield _Tensor(f"{before}norm.weight", (hidden,), "norm")
    if not config.tied_head:
        yield _Tensor(f"{before.removesuffix('model.')}lm_head.weight", (vocab, hidden), "head")
    for layer in range(config.num_layers):
        prefix, ours = f"{before}layers.{layer}.", f"layers.{layer}."
        norm = f"{prefix}input_layernorm.weight"
        yield _Tensor(norm, (hidden,), f"{ours}attention_norm")
        norm = f"{prefix}post_attention_layernorm.weight"
        yield _Tensor(norm, (hidden,), f"{ours}feed_forward_norm")
        prefix, ours = f"{prefix}mlp", f"{ours}feed_forward"
        if layer < config.num_dense_layers:
            yield from _feed_forward(prefix, hidden, config.dense_width, ours)
            continue
        experts = config.routing.num_experts
        yield _Tensor(f"{prefix}.gate.weight", (experts, hidden), f"{ours}.router")
        if config.routing.scoring == "sigmoid":
            bias = f"{prefix}.gate.e_score_correction_bias"
            yield _Tensor(bias, (experts,), f"{ours}.bias")
        for expert in range(experts):
            name, routed = f"{prefix}.experts.{expert}", f"{ours}.routed"
            yield from _feed_forward(name, hidden, config.expert_width, routed, (expert,))
        if config.shared_width:
            name, shared = f"{prefix}.shared_experts", f"{ours}.shared"
            yield from _feed_forward(name, hidden, config.shared_width, shared)


def _feed_forward(
    name: str, hidden: int, width: int, ours: str, start: Shape = ()
) -> Iterator[_Tensor]:
    into = f"{ours}.gate_up"
    yield _Tensor(f"{name}.gate_proj.weight", (width, hidden), into, start)
    yield _Tensor(f"{name}.up_proj.weight", (width, hidden), into, start, offset=width)
    yield _Tensor(f"{name}.down_proj.weight", (hidden, width), f"{ours}.down", start)


# ---------------------------------------------------------------------------------- random weights


def random_params(key: jax.Array, config: ModelConfig, dtype: DTypeLike) -> ModelParams:
    """Returns random weights that keep the variance of hidden states about 1, made on the device.

    Arrays of one shape share a compiled program.
    """
    numbers = itertools.count()

    def drawn(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = _name(path)
        if name.endswith("norm"):
            return jnp.ones(shape.shape, shape.dtype)
        if name == "embedding":
            scale = 1.0
        elif name.endswith("bias"):
            scale = 0.1
        else:
            scale = shape.shape[-1 if name == "head" else -2] ** -0.5
        return _normal(key, next(numbers), shape.shape, shape.dtype, scale)

    key, of_attention = jax.random.split(key)
    keys = jax.random.split(of_attention, config.num_layers)
    attention = [_attention(one, config.attention, weight_dtype(dtype)) for one in keys]
    others = _with_attention(shapes_of(config, dtype), [None] * config.num_layers)
    return _with_attention(jax.tree.map_with_path(drawn, others), attention)


_attention = jax.jit(init_params, static_argnums=(1, 2))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _normal(key: jax.Array, number: int, shape: Shape, dtype: Any, scale: float) -> jax.Array:
    drawn = jax.random.normal(jax.random.fold_in(key, number), shape, dtype)
    return (scale * drawn).astype(dtype)
