"""Where each weight of a layer is in the published tensors.

The published names are those below `model.layers.N.self_attn.`, and matrices are [out, in]. A
weight is a view of one tensor, in another order of axes.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from mla_jax.config import MLAConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensor of a weight, and how the weight is made of it.

    The view divides each dim of the tensor into one or several axes. `part` is a range of the
    view's second axis; the weight has the rest of the view whole. `axes` has, for each axis of the
    weight, the axis of the view.
    """

    tensor: str
    view: tuple[Shape, ...]
    axes: Shape
    part: tuple[int, int] | None = None

    @property
    def tensor_shape(self) -> Shape:
        return tuple(math.prod(sizes) for sizes in self.view)

    @property
    def view_shape(self) -> Shape:
        """The shape of the part of the view that the weight has."""
        sizes = [size for dim in self.view for size in dim]
        if self.part is not None:
            sizes[1] = self.part[1] - self.part[0]
        return tuple(sizes)

    def box(self, indices: Iterable[tuple[slice, ...]]) -> list[tuple[int, int]]:
        """Returns, per dim of the tensor, the range that holds slices of the view."""
        indices = list(indices)
        ranges, axis = [], 0
        for outer, *inner in self.view:
            bounds = [index[axis].indices(outer) for index in indices]
            low, high = min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds)
            ranges.append((low * math.prod(inner), high * math.prod(inner)))
            axis += 1 + len(inner)
        return ranges

    def origin(self, box: Iterable[tuple[int, int]]) -> list[int]:
        """Returns the index in the view, per axis, at which a box of the tensor begins."""
        origin: list[int] = []
        for (low, _), (_, *inner) in zip(box, self.view, strict=True):
            origin += [low // math.prod(inner), *[0] * len(inner)]
        return origin

    def viewed(self, tensor: Any) -> Any:
        """Returns the weight's part of the view of a tensor, or of a box of it."""
        sizes: list[int] = []
        for size, (_, *inner) in zip(tensor.shape, self.view, strict=True):
            sizes += [size // math.prod(inner), *inner]
        view = tensor.reshape(sizes)
        return view if self.part is None else view[:, slice(*self.part)]

    def weight(self, tensor: Any) -> Any:
        """Returns the weight of a tensor."""
        return self.viewed(tensor).transpose(self.axes)


def hf_sources(config: MLAConfig) -> dict[str, Source]:
    """Returns the source of each field of `MLAParams` that is not None."""
    c, heads, nope = config, config.num_heads, config.qk_nope_head_dim
    latent, value = c.kv_lora_rank, c.v_head_dim
    q_up = "q_proj" if c.q_lora_rank is None else "q_b_proj"
    kv_up = ((heads, nope + value), (latent,))

    def vector(name: str, size: int) -> Source:
        return Source(name, ((size,),), (0,))

    def matrix(name: str, out: int) -> Source:
        return Source(f"{name}.weight", ((out,), (c.hidden_size,)), (1, 0))

    sources = {}
    if c.q_lora_rank is not None:
        sources["w_dq"] = matrix("q_a_proj", c.q_lora_rank)
        sources["norm_q"] = vector("q_a_layernorm.weight", c.q_lora_rank)
    q_up_view = ((heads, c.qk_head_dim), (c.q_lora_rank or c.hidden_size,))
    sources["w_uq"] = Source(f"{q_up}.weight", q_up_view, (2, 0, 1))
    sources["w_dkv"] = matrix("kv_a_proj_with_mqa", c.latent_dim)
    sources["norm_kv"] = vector("kv_a_layernorm.weight", latent)
    sources["w_uk"] = Source("kv_b_proj.weight", kv_up, (0, 1, 2), (0, nope))
    sources["w_uv"] = Source("kv_b_proj.weight", kv_up, (0, 2, 1), (nope, nope + value))
    sources["w_o"] = Source("o_proj.weight", ((c.hidden_size,), (heads, value)), (1, 2, 0))
    if c.attention_bias:
        if c.q_lora_rank is not None:
            sources["b_dq"] = vector("q_a_proj.bias", c.q_lora_rank)
        sources["b_dkv"] = vector("kv_a_proj_with_mqa.bias", c.latent_dim)
        sources["b_o"] = vector("o_proj.bias", c.hidden_size)
    return sources


def hf_shapes(config: MLAConfig) -> dict[str, Shape]:
    """Returns the published tensor names below `model.layers.N.self_attn.` and their shapes."""
    return {source.tensor: source.tensor_shape for source in hf_sources(config).values()}
