"""The weights of a whole model: from a Hugging Face folder, or random ones of given sizes.

`mla_jax.load_hf_layers` reads the attention. The library's `Checkpoint` reads the other tensors by
name, dequantized if they are fp8. Names and shapes are checked before weights are read,
those of the attention for one kind of layers after the other.
The host holds one tensor at a time, which is written in place into the stack of its layers.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from experiments.framework.console import track
from experiments.generate.config import read_config
from experiments.generate.model import (
    Experts,
    FeedForward,
    Layers,
    ModelConfig,
    ModelParams,
)
from mla_jax import MLAParams, init_params, load_hf_layers
from mla_jax.checkpoints.read import Checkpoint

Shape = tuple[int, ...]
DTYPES = ("float32", "bfloat16")
DENSE, MOE = "dense", "moe"


def weight_dtype(dtype: DTypeLike) -> Any:
    """Returns the dtype; raises ValueError unless it is one of DTYPES."""
    found = jnp.dtype(dtype)
    if found.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {found.name}")
    return found


# ------------------------------------------------------------------------------- from a checkpoint


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A published tensor, and where it goes: into `stack`, from the index `start` on."""

    name: str
    shape: Shape  # in the file, where matrices are [out, in]
    stack: str
    start: Shape  # a leading part of an index; the other entries are 0
    offset: int = 0  # in the last axis


def load(folder: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[ModelConfig, ModelParams]:
    """Reads a whole model in `dtype`, one of DTYPES; the router is always in float32.

    Raises FileNotFoundError, or CheckpointError that names the file, key or tensor that is missing,
    malformed, or of another model.
    """
    dtype = weight_dtype(dtype)
    config = read_config(folder)
    kinds = {
        DENSE: range(config.num_dense_layers),
        MOE: range(config.num_dense_layers, config.num_layers),
    }
    with Checkpoint(folder) as checkpoint:
        for layer in range(config.num_layers):
            checkpoint.layer_prefix(layer)  # raises for a layer that is missing
        before = checkpoint.layer_prefix(0).removesuffix("layers.0.self_attn.")
        tensors = list(_tensors(config, kinds, before))
        for layer in range(config.num_layers):
            prefix = f"{before}layers.{layer}.mlp."
            names = [t.name.removeprefix(prefix) for t in tensors if t.name.startswith(prefix)]
            checkpoint.check_names(prefix, names)
        for tensor in tensors:
            checkpoint.check(tensor.name, tensor.shape)
        attention = {
            kind: load_hf_layers(folder, layers, dtype)[1]
            for kind, layers in kinds.items()
            if layers
        }
        stacks = _empty_stacks(config, dtype)
        tensors.sort(key=lambda tensor: checkpoint.place(tensor.name))
        for tensor in track(tensors, "loading weights"):
            value = checkpoint.read(tensor.name, [(0, n) for n in tensor.shape])
            stack = stacks[tensor.stack]
            if value.ndim == 2 and tensor.stack not in ("embedding", "head"):
                value = np.ascontiguousarray(value.T)
            start = [*tensor.start, *[0] * (stack.ndim - len(tensor.start))]
            start[-1] += tensor.offset
            stacks[tensor.stack] = _write(stack, value, tuple(start))
    return config, _assembled(config, attention, stacks)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty_stacks(config: ModelConfig, dtype: Any) -> dict[str, jax.Array]:
    shapes = _stack_shapes(config)
    return {name: jnp.zeros(shape, _dtype_of(name, dtype)) for name, shape in shapes.items()}


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: jax.Array, value: Any, start: tuple[int, ...]) -> jax.Array:
    value = value.reshape((1,) * (stack.ndim - value.ndim) + value.shape).astype(stack.dtype)
    return jax.lax.dynamic_update_slice(stack, value, start)


def _tensors(config: ModelConfig, kinds: dict[str, range], before: str) -> Iterator[_Tensor]:
    """Yields all tensors except those of the attention; `before` precedes "layers" in names."""
    hidden, vocab = config.attention.hidden_size, config.vocab_size
    yield _Tensor(f"{before}embed_tokens.weight", (vocab, hidden), "embedding", ())
    yield _Tensor(f"{before}norm.weight", (hidden,), "norm", ())
    if not config.tied_head:
        head = f"{before.removesuffix('model.')}lm_head.weight"
        yield _Tensor(head, (vocab, hidden), "head", ())
    for kind, layers in kinds.items():
        for index, layer in enumerate(layers):
            prefix = f"{before}layers.{layer}."
            for ours, theirs in (
                ("attention_norm", "input_layernorm"),
                ("feed_forward_norm", "post_attention_layernorm"),
            ):
                yield _Tensor(f"{prefix}{theirs}.weight", (hidden,), f"{kind}.{ours}", (index,))
            if kind == DENSE:
                width, mlp = config.dense_width, f"{prefix}mlp"
                yield from _feed_forward(mlp, hidden, width, DENSE, (index,))
                continue
            experts = config.routing.num_experts
            gate = f"{prefix}mlp.gate"
            yield _Tensor(f"{gate}.weight", (experts, hidden), "moe.router", (index,))
            if config.routing.scoring == "sigmoid":
                bias = f"{gate}.e_score_correction_bias"
                yield _Tensor(bias, (experts,), "moe.bias", (index,))
            for expert in range(experts):
                name, start = f"{prefix}mlp.experts.{expert}", (index, expert)
                yield from _feed_forward(name, hidden, config.expert_width, "moe.routed", start)
            if config.shared_width:
                name = f"{prefix}mlp.shared_experts"
                yield from _feed_forward(name, hidden, config.shared_width, "moe.shared", (index,))


def _feed_forward(
    name: str, hidden: int, width: int, stack: str, start: Shape
) -> Iterator[_Tensor]:
    into = f"{stack}.gate_up"
    yield _Tensor(f"{name}.gate_proj.weight", (width, hidden), into, start)
    yield _Tensor(f"{name}.up_proj.weight", (width, hidden), into, start, offset=width)
    yield _Tensor(f"{name}.down_proj.weight", (hidden, width), f"{stack}.down", start)


# ---------------------------------------------------------------------------------- random weights


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_params(key: jax.Array, config: ModelConfig, dtype: Any) -> ModelParams:
    """Returns random weights that keep the variance of hidden states about 1, made on the device.

    Layers are made one after the other, so that the random bits of one are in memory at a time.
    """
    keys = iter(jax.random.split(key, 64))
    counts = {DENSE: config.num_dense_layers, MOE: config.num_moe_layers}
    attention = {
        kind: jax.lax.map(
            lambda one: init_params(one, config.attention, dtype), jax.random.split(next(keys), n)
        )
        for kind, n in counts.items()
        if n
    }
    stacks = {}
    for name, shape in _stack_shapes(config).items():
        dtype_of = _dtype_of(name, dtype)
        if name.endswith("norm"):
            stacks[name] = jnp.ones(shape, dtype_of)
        elif name.endswith("bias"):
            stacks[name] = 0.1 * jax.random.normal(next(keys), shape, dtype_of)
        elif name in ("embedding", "head"):
            scale = 1.0 if name == "embedding" else shape[-1] ** -0.5
            stacks[name] = scale * jax.random.normal(next(keys), shape, dtype_of)
        else:
            stacks[name] = jax.lax.map(
                lambda one, shape=shape, dtype_of=dtype_of: (
                    shape[-2] ** -0.5 * jax.random.normal(one, shape[1:], dtype_of)
                ).astype(dtype_of),
                jax.random.split(next(keys), shape[0]),
            )
    return _assembled(config, attention, stacks)


# -------------------------------------------------------------------------------------------- both


def _stack_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Returns the shape of every array of a model except those of the attention, by name."""
    c, hidden = config, config.attention.hidden_size
    dense, moe, experts = c.num_dense_layers, c.num_moe_layers, c.routing.num_experts
    shapes: dict[str, Shape] = {"embedding": (c.vocab_size, hidden), "norm": (hidden,)}
    if not c.tied_head:
        shapes["head"] = (c.vocab_size, hidden)
    for kind, count in ((DENSE, dense), (MOE, moe)):
        if count:
            shapes[f"{kind}.attention_norm"] = shapes[f"{kind}.feed_forward_norm"] = (count, hidden)
    if dense:
        shapes |= _feed_forward_shapes(DENSE, (dense,), hidden, c.dense_width)
    if moe:
        shapes["moe.router"] = (moe, hidden, experts)
        if c.routing.scoring == "sigmoid":
            shapes["moe.bias"] = (moe, experts)
        shapes |= _feed_forward_shapes("moe.routed", (moe, experts), hidden, c.expert_width)
        if c.shared_width:
            shapes |= _feed_forward_shapes("moe.shared", (moe,), hidden, c.shared_width)
    return shapes


def _feed_forward_shapes(name: str, leading: Shape, hidden: int, width: int) -> dict[str, Shape]:
    return {
        f"{name}.gate_up": (*leading, hidden, 2 * width),
        f"{name}.down": (*leading, width, hidden),
    }


def _dtype_of(name: str, dtype: Any) -> Any:
    return jnp.float32 if name in ("moe.router", "moe.bias") else dtype


def _assembled(
    config: ModelConfig, attention: dict[str, MLAParams], stacks: dict[str, jax.Array]
) -> ModelParams:
    def network(name: str) -> FeedForward:
        return FeedForward(stacks[f"{name}.gate_up"], stacks[f"{name}.down"])

    def layers(kind: str) -> Layers | None:
        if kind not in attention:
            return None
        experts = kind == MOE
        feed_forward = (
            Experts(
                router=stacks["moe.router"],
                bias=stacks.get("moe.bias"),
                routed=network("moe.routed"),
                shared=network("moe.shared") if config.shared_width else None,
            )
            if experts
            else network(DENSE)
        )
        norms = stacks[f"{kind}.attention_norm"], stacks[f"{kind}.feed_forward_norm"]
        return Layers(attention[kind], norms[0], feed_forward, norms[1])

    return ModelParams(
        embedding=stacks["embedding"],
        dense=layers(DENSE),
        moe=layers(MOE),
        norm=stacks["norm"],
        head=stacks.get("head"),
    )
