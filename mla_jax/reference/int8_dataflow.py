"""What the kernels compute over an int8 latent, integer for integer, in plain JAX.

Scores: q_nope is rounded to int8 with a scale for each row; the nope part is an int8 x int8 ->
int32 product brought to scale, the rope part stays float:
    S = (q_i8 . k_i8) * q_scale * k_scale + q_rope . k_rope.
Rounding q to 8 bits costs as much as rounding the cache does; "int14" queries are two int8,
q = 128 * high + low, whose products with K meet in one int32. (Where K is widened to bfloat16
anyway, q_nope may stay "bfloat16".)
The output takes the int8 latent as V, with V's scale folded into P. P is then rounded to
- "int8" on Ascend: each row of a block in steps of its largest entry / 127, products in int32;
- "bfloat16" on Hopper, whose 8-bit products can't read V as it lies: V is widened, exactly.
The row's sum takes P before it is rounded. Blocks meet as in `online_softmax`.

A latent with a scale for each 128 columns needs a P for each group of columns. That is here to
measure what such scales are worth; no kernel does it.
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
    """float32 of products [..., R, T] of steps, with q_scale [R] and k_scale [..., T]."""
    return products.astype(jnp.float32) * (q_scale[:, None] * k_scale[..., None, :])


def weights_in_int8(p: jax.Array, v_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """P [R, T] with v_scale [..., T] folded in: int8 [..., R, T], and each row's scale [..., R].

    Weights of 0 stay so, whatever the key's scale is: the row may not see the key.
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
    """R query rows over T keys, all of which they see.

    Args:
        q: [R, W + rope_dim] = [q_latent | q_rope], float.
        latent: [T, W] int8, in steps of `scales`: [T], [T, W / 128] or [].
        k_rope: [T, rope_dim], float.
        weights, queries: what P and q_nope are rounded to, one of WEIGHTS and QUERIES.
        block: keys that share a row's scale of P, and after which the output is rescaled.

    Returns:
        o [R, W] and lse [R] (natural log), float32.

    Raises ValueError for other weights or queries, or shapes that do not fit; TypeError for arrays
    of other dtypes, a latent that is not int8 first of all, and where q is differentiated that is
    rounded to int8.
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
    """`attend_int8`, its arguments checked."""
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
            came = _product("grt,gtc->grc", p, latent).astype(jnp.float32) * p_scale[..., None]
        else:
            p = (p * scales[:, None]).astype(jnp.bfloat16)
            came = _product("grt,gtc->grc", p, latent)
        o = rescale_output(state.o, decay) + jnp.moveaxis(came, 0, 1).reshape(state.o.shape)
        return dataclasses.replace(new, o=o), None

    def blocks(keys: jax.Array) -> jax.Array:
        missing = [(0, -count % block)] + [(0, 0)] * (keys.ndim - 1)
        return jnp.pad(keys, missing).reshape(-1, block, *keys.shape[1:])

    keys = tuple(map(blocks, (jnp.ones(count, bool), latent, scales, k_rope)))
    state, _ = lax.scan(step, init_state(q.shape[:1], width), keys)
    return finalize(state)


def _columns(x: jax.Array, groups: int) -> jax.Array:
    """[N, W] as [G, N, W / G]."""
    return jnp.moveaxis(x.reshape(len(x), groups, -1), 1, 0)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum: int32 of two int8, else float32, which holds a product of two bfloat16 exactly."""
    if a.dtype == b.dtype == jnp.int8:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.int32)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST)
