"""A model split over devices: heads, experts, and the widths of dense networks (tensor parallel).

`jax.shard_map` runs a step on every device, with its share of the weights: some heads of the
attention, some experts whole, and some columns of dense and shared networks. Sums over the axis put
the parts together, one after the attention and one after the feed-forward part of each layer. The
cache, the embedding, the head, norms and routers are whole on every device. So is the batch: each
device routes all tokens, and computes those of its own experts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.generate.model import Experts, FeedForward, Layer, ModelConfig, ModelParams
from mla_jax import param_specs

AXIS = "tp"


def mesh_of(config: ModelConfig, devices: int) -> Mesh:
    """Returns a mesh of the first devices; raises ValueError if one cannot have an equal share."""
    if devices > len(jax.devices()):
        raise ValueError(f"must be at most the {len(jax.devices())} devices here, got {devices}")
    shares = {"num_heads": config.attention.num_heads}
    if config.num_dense_layers:
        shares["dense_width"] = config.dense_width
    if config.num_moe_layers:
        shares |= {"experts": config.routing.num_experts, "shared_width": config.shared_width}
    for name, value in shares.items():
        if value % devices:
            raise ValueError(f"must divide {name} = {value}, got {devices}")
    return jax.make_mesh((devices,), (AXIS,), devices=jax.devices()[:devices])


def specs_of(params: ModelParams, config: ModelConfig) -> ModelParams:
    """Returns the PartitionSpecs of a model's weights."""
    attention = param_specs(config.attention, AXIS)
    network = FeedForward(gate_up=P(None, AXIS), down=P(AXIS, None))  # type: ignore[arg-type]

    def specs(layer: Layer) -> Layer:
        feed_forward: Any = network
        if isinstance(layer.feed_forward, Experts):
            experts = FeedForward(gate_up=P(AXIS), down=P(AXIS))  # type: ignore[arg-type]
            given = layer.feed_forward
            feed_forward = Experts(
                router=P(),  # type: ignore[arg-type]
                bias=None if given.bias is None else P(),  # type: ignore[arg-type]
                routed=experts,
                shared=None if given.shared is None else network,
            )
        return Layer(attention, P(), feed_forward, P())  # type: ignore[arg-type]

    return ModelParams(
        embedding=P(),  # type: ignore[arg-type]
        layers=tuple(map(specs, params.layers)),
        norm=P(),  # type: ignore[arg-type]
        head=None if params.head is None else P(),  # type: ignore[arg-type]
    )


def placed(params: ModelParams, config: ModelConfig, mesh: Mesh) -> ModelParams:
    """Puts each device's share of the weights on it.

    The columns of gate and up of a dense network are reordered, so that the share of a device has
    columns of both.
    """
    devices = mesh.size

    def reordered(network: FeedForward) -> FeedForward:
        matrix = network.gate_up
        parts = matrix.reshape(*matrix.shape[:-1], 2, devices, -1)
        return dataclasses.replace(network, gate_up=parts.swapaxes(-3, -2).reshape(matrix.shape))

    def with_order(layer: Layer) -> Layer:
        inner = layer.feed_forward
        if isinstance(inner, FeedForward):
            return dataclasses.replace(layer, feed_forward=reordered(inner))
        shared = None if inner.shared is None else reordered(inner.shared)
        return dataclasses.replace(layer, feed_forward=dataclasses.replace(inner, shared=shared))

    params = dataclasses.replace(params, layers=tuple(map(with_order, params.layers)))
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs_of(params, config),
        is_leaf=lambda node: isinstance(node, P),
    )
    return jax.device_put(params, shardings)


def on_mesh(
    mesh: Mesh | None,
    step: Callable[..., Any],
    params: ModelParams,
    config: ModelConfig,
    *rest: Any,
) -> Any:
    """Calls step(params, *rest, axis) on each device of the mesh; without a mesh, axis is None.

    `rest`, and all that the step returns, is the same on all devices.
    """
    if mesh is None:
        return step(params, *rest, None)
    split = jax.shard_map(
        lambda params, *rest: step(params, *rest, AXIS),
        mesh=mesh,
        in_specs=(specs_of(params, config), *(P() for _ in rest)),
        out_specs=P(),
    )
    return split(params, *rest)
