"""Runs a decode kernel that writes time stamps of its stages, and reads stages out of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.splits.decode_plan import DecodePlan
from pallas_kernels.hopper.attention import KERNELS, launch
from pallas_kernels.hopper.config import DecodeConfig
from pallas_kernels.hopper.parts import stamps as at
from pallas_kernels.hopper.parts.query_parts import QueryParts


@functools.partial(jax.jit, static_argnames=("num_heads", "softmax_scale"))
def attend_with_stamps(
    q: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    plan: DecodePlan,
    *,
    num_heads: int,
    softmax_scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns o and lse as `attention.attend` does for bfloat16, and the stamps.

    Arguments as in `attend`. The stamps are int32 of the shape `parts.stamps.shape`, with 0 where
    nothing was stamped. CTAs of a cluster follow each other.
    """
    is_decode = isinstance(plan.tiles, DecodeConfig)
    ctas = plan.tiles.num_ctas(plan.split.num_workers)
    shape = at.shape(ctas, 3 if is_decode else 2)
    stamps = jax.new_ref(jnp.zeros(shape, jnp.int32))
    options: dict[str, Any] = {"partial_dtype": jnp.float16 if is_decode else jnp.float32}
    o, lse = launch(
        KERNELS["float"][type(plan.tiles)],
        QueryParts.of(q),
        (pages,),
        (block_tables, seq_lens, None),
        plan,
        kv_lora_rank=512,
        num_heads=num_heads,
        interpret=None,
        softmax_scale=softmax_scale,
        causal=True,
        stamps=stamps,
        **options,
    )
    return o, lse, stamps[...]
