"""The computation of the kernels over an int8 latent cache, integer for integer, in plain JAX.

Scores: q_nope is quantized to int8 with one scale per row. Its product with the latent is int8 x
int8 -> int32 and is multiplied by the scales. The rope part stays in floating point:

    S = (q_i8 . k_i8) * q_scale * k_scale + q_rope . k_rope

Quantizing q to 8 bits costs as much accuracy as quantizing the cache does. "int14" queries are two
int8 values, q = 128 * high + low, whose products with K are added in int32. Where K is converted to
bfloat16 anyway, q_nope may stay "bfloat16".

Output: V is the int8 latent, and its scale is multiplied into P. P is then rounded to one of
- "int8", on Ascend. Each row of a block has a scale of its largest entry / 127, and the products
  are int32.
- "bfloat16", on Hopper, whose 8-bit products can't read V in its layout. V is dequantized, exactly.
The sum of a row adds P before rounding. Blocks are combined as in `online_softmax`.

A latent with one scale per 128 columns needs one P per group of columns. No kernel supports it; it
is implemented here to measure the accuracy of such scales.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax import checks, quantize
from mla_jax.online_softmax import SoftmaxState, finalize, init_state, rescale_output, weigh

QUERIES = ("int8", "int14", "bfloat16")
WEIGHTS = ("int8", "bfloat16")


def scores_to_scale(products: jax.Array, q_scale: jax.Array, k_scale: jax.Array) -> jax.Array:
    """Returns int32 products [..., R, T] times q_scale [R] and k_scale [..., T], float32."""
    return products.astype(jnp.float32) * (q_scale[:, None] * k_scale[..., None, :])


def weights_in_int8(p: jax.Array, v_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantizes P [R, T] times v_scale [..., T]: int8 [..., R, T] and float32 scales [..., R].

    A weight of 0 stays 0, even if the key's scale is NaN, because the row may not see the key.
    """
    folded = jnp.where(p == 0, 0, p * v_scale[..., None, :])
    p_scale = quantize.scale_for(folded.max(-1))
    return quantize.quantize(folded, p_scale), p_scale


def attend_int8(
    q: jax.Array,
    latent: jax.Array,
    scales: jax.Array,
    k_rope: jax.Array,
    *,
    softmax_scale: jax.Array | float,
    weights: str,
    queries: str = "int8",
    block: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention of R query rows over T keys, all of which they see.

    Args:
        q: [R, W + rope_dim] = [q_latent | q_rope], float.
        latent: [T, W] int8.
        scales: float32 scales of the latent: [T], [T, W / 128] or [].
        k_rope: [T, rope_dim], float.
        softmax_scale: factor of the scores.
        weights: dtype that P is rounded to, one of WEIGHTS.
        queries: dtype that q_nope is rounded to, one of QUERIES.
        block: keys per step of the online softmax, which share one scale of P per row.

    Returns:
        o [R, W] and lse [R] (natural log), float32.

    Raises ValueError for other weights or queries, or shapes that do not fit. Raises TypeError for
    other dtypes, and if q is both quantized to int8 and differentiated.
    """
    checks.require_one_of("weights", weights, WEIGHTS)
    checks.require_one_of("queries", queries, QUERIES)
    block = checks.require_positive("block", block)
    if getattr(latent, "dtype", None) != jnp.int8:
        raise TypeError(
            f"latent must be int8, got {getattr(latent, 'dtype', type(latent).__name__)}"
        )
    checks.require_shape("latent", latent, "[T, W]", None, None)
    count, width = latent.shape
    checks.require_positive("T of latent", count)
    checks.require_float("k_rope", k_rope)
    checks.require_shape("k_rope", k_rope, "[T, rope_dim]", count, None)
    checks.require_float("q", q)
    checks.require_shape("q", q, "[R, W + rope_dim]", None, width + k_rope.shape[1])
    if getattr(scales, "dtype", None) != jnp.float32:
        got = getattr(scales, "dtype", type(scales).__name__)
        raise TypeError(f"scales must be a float32 array, got {got}")
    shapes = [(), (count,), (count, width // quantize.GROUP)]
    if scales.shape not in shapes[: 3 if width % quantize.GROUP == 0 else 2]:
        raise ValueError(
            f"scales must be [], [T] or [T, W / {quantize.GROUP}] for a latent of "
            f"{list(latent.shape)}, got shape {list(scales.shape)}"
        )
    if not isinstance(softmax_scale, jax.core.Tracer):
        softmax_scale = checks.require_number("softmax_scale", softmax_scale)
    return _attend_int8(
        q, latent, scales, k_rope, softmax_scale, weights=weights, queries=queries, block=block
    )


@functools.partial(jax.jit, static_argnames=("weights", "queries", "block"))
def _attend_int8(
    q: jax.Array,
    latent: jax.Array,
    scales: jax.Array,
    k_rope: jax.Array,
    softmax_scale: jax.Array | float,
    *,
    weights: str,
    queries: str,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes `attend_int8` for arguments that have been checked."""
    count, width = latent.shape
    softmax_scale = jnp.asarray(softmax_scale, jnp.float32)
    groups = scales.shape[1] if scales.ndim == 2 else 1
    scales = jnp.broadcast_to(scales.reshape(-1, groups), (count, groups))
    q_nope, q_rope = jnp.split(q.astype(jnp.float32), [width], axis=-1)
    parts: Sequence[jax.Array]
    q_scale = quantize.scales_of(q_nope, "token")
    if queries == "int8":
        parts = (quantize.quantize(q_nope, q_scale),)
    elif queries == "int14":
        *parts, q_scale = quantize.quantize_in_halves(q_nope)
    else:
        q_scale, parts = jnp.ones(len(q), jnp.float32), (q_nope.astype(jnp.bfloat16),)
    parts = tuple(_columns(part, groups) for part in parts)

    def step(state: SoftmaxState, keys: tuple[jax.Array, ...]) -> tuple[SoftmaxState, None]:
        exists, latent, scales, k_rope = keys
        latent, scales = _columns(latent, groups), scales.T  # [G, block, C] and [G, block]
        products = _product("grc,gtc->grt", parts[0], latent)
        for lower in parts[1:]:
            products = quantize.HALF * products + _product("grc,gtc->grt", lower, latent)
        scores = scores_to_scale(products, q_scale, scales).sum(0)
        scores = (scores + _product("rd,td->rt", q_rope, k_rope)) * softmax_scale
        new, p, decay = weigh(state, jnp.where(exists, scores, -jnp.inf), jnp.float32)
        if weights == "int8":
            p, p_scale = weights_in_int8(p, scales)
            added = _product("grt,gtc->grc", p, latent).astype(jnp.float32) * p_scale[..., None]
        else:
            p = (p * scales[:, None]).astype(jnp.bfloat16)
            added = _product("grt,gtc->grc", p, latent)
        o = rescale_output(state.o, decay) + jnp.moveaxis(added, 0, 1).reshape(state.o.shape)
        return dataclasses.replace(new, o=o), None

    def blocks(keys: jax.Array) -> jax.Array:
        missing = [(0, -count % block)] + [(0, 0)] * (keys.ndim - 1)
        return jnp.pad(keys, missing).reshape(-1, block, *keys.shape[1:])

    keys = tuple(map(blocks, (jnp.ones(count, bool), latent, scales, k_rope)))
    state, _ = lax.scan(step, init_state(q.shape[:1], width), keys)
    return finalize(state)


def _columns(x: jax.Array, groups: int) -> jax.Array:
    """Reshapes [N, W] to [G, N, W / G], one part per group of columns."""
    return jnp.moveaxis(x.reshape(len(x), groups, -1), 1, 0)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes an einsum: int32 of two int8 arrays, otherwise float32, exact for bfloat16."""
    if a.dtype == b.dtype == jnp.int8:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.int32)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST)
