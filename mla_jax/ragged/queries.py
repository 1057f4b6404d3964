"""Queries in one array, or in two that a layer's products make apart."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mla_jax import checks


class Queries(NamedTuple):
    """Absorbed queries q = [latent | rope] whose two parts are arrays of their own.

    To put them side by side copies them. The Hopper kernels read the parts where they are.
    """

    latent: jax.Array  # [..., kv_lora_rank]
    rope: jax.Array  # [..., rope_dim], of the same dtype and leading dims

    @property
    def shape(self) -> tuple[int, ...]:
        """That of q."""
        return (*self.latent.shape[:-1], self.latent.shape[-1] + self.rope.shape[-1])

    @property
    def dtype(self) -> Any:
        return self.latent.dtype


type AnyQueries = jax.Array | Queries


def as_queries(q: Any) -> AnyQueries:
    """Returns q, or a pair of arrays as `Queries`; raises TypeError for anything else."""
    if isinstance(q, tuple):
        if len(q) != 2:
            raise TypeError(f"q must be an array or a pair of arrays, got {len(q)} of them")
        q = Queries(*q)
    for name, array in _named(q).items():
        checks.require_array(name, array)
    return q


def require_queries(q: AnyQueries, dims: str, rank: int, rope_dim: int, *, when: str = "") -> None:
    """Raises TypeError or ValueError unless q has these dims and floats.

    dims: the leading dims in words, as in "B, S, H". when: words for the message.
    """
    widths = {"kv_lora_rank": rank, "rope_dim": rope_dim}
    if not isinstance(q, Queries):
        widths = {"kv_lora_rank + rope_dim": rank + rope_dim}
    leading: list[int | None] = [None] * (1 + dims.count(","))
    dtype = None
    for (name, array), (words, width) in zip(_named(q).items(), widths.items(), strict=True):
        checks.require_shape(name, array, f"[{dims}, {words}]{when}", *leading, width)
        checks.require_float(name, array)
        if 0 in array.shape[:-1]:
            raise ValueError(f"{name} must have no dim of 0, got shape {list(array.shape)}")
        if dtype not in (None, array.dtype):
            raise TypeError(f"{name} must have the dtype of q[0], {dtype}, got {array.dtype}")
        leading, dtype = list(array.shape[:-1]), array.dtype


def whole(q: AnyQueries) -> jax.Array:
    """Returns q as one array."""
    return jnp.concatenate(q, axis=-1) if isinstance(q, Queries) else q


def first_part(q: AnyQueries) -> jax.Array:
    """Returns q, or its latent part: an array with the leading dims of q."""
    return q.latent if isinstance(q, Queries) else q


def like(q: AnyQueries, gradient: jax.Array) -> AnyQueries:
    """Returns the gradient of `whole(q)` as one of q."""
    if not isinstance(q, Queries):
        return gradient
    return Queries(*jnp.split(gradient, [q.latent.shape[-1]], axis=-1))


def _named(q: AnyQueries) -> dict[str, Any]:
    return {"q[0]": q.latent, "q[1]": q.rope} if isinstance(q, Queries) else {"q": q}
