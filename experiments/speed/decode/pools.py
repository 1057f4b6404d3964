"""The caches of benchmark rows: one flat array of tokens per layer.

Rows with the same batch and cache dtype share a `Pool`. Its arrays are viewed as pages of any size.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.speed.decode.setup import Setup
from experiments.speed.shapes import Shape
from mla_jax import PagedKVCache

GRAIN = 128  # pools have a multiple of so many tokens: the largest page


@dataclasses.dataclass(frozen=True)
class Pool:
    """The caches of some rows, one per layer."""

    tokens: int
    capacity: int  # tokens per block table at most
    layers: int
    dtype: str

    @staticmethod
    def of(rows: Sequence[Shape], setup: Setup) -> "Pool":
        """Returns a pool with tokens for the largest of the rows and layers for the smallest."""
        tokens, token_bytes = max(map(pool_tokens, rows)), setup.token_bytes(rows[0].dtype)
        capacity = max(map(reach, rows))
        smallest = min(sum(row.seq_lens) for row in rows) * token_bytes
        layers = min(
            max(setup.usual_layers, math.ceil(setup.rotate / max(1, smallest))),
            setup.max_layers,
            setup.memory // (tokens * token_bytes),
        )
        return Pool(tokens, capacity, layers, rows[0].dtype)

    def structs(self, setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the arrays of a layer by the cache's field, with one row per token."""
        if self.dtype == "bf16":
            return {"pages": array_struct((self.tokens, setup.width), jnp.bfloat16)}
        return {
            "pages": array_struct((self.tokens, setup.kv_lora_rank), jnp.int8),
            "rope_pages": array_struct((self.tokens, setup.rope_dim), jnp.bfloat16),
            "scales": array_struct((self.tokens,), jnp.float32),
        }

    def fill(self, setup: Setup) -> list[dict[str, jax.Array]]:
        """Returns random layers, the same for the same seed."""
        make = jax.jit(functools.partial(_random_layer, self, setup))
        return [make(key) for key in jax.random.split(jax.random.key(setup.seed), self.layers)]


def _random_layer(pool: Pool, setup: Setup, key: jax.Array) -> dict[str, jax.Array]:
    if pool.dtype == "bf16":
        return {"pages": jax.random.normal(key, (pool.tokens, setup.width), jnp.bfloat16)}
    latent_key, rope_key = jax.random.split(key)
    values = jax.random.normal(latent_key, (pool.tokens, setup.kv_lora_rank), jnp.bfloat16)
    scales = jnp.max(jnp.abs(values), axis=1).astype(jnp.float32) / 127
    return {
        "pages": jnp.round(values / scales[:, None]).astype(jnp.int8),
        "rope_pages": jax.random.normal(rope_key, (pool.tokens, setup.rope_dim), jnp.bfloat16),
        "scales": scales,
    }


def pool_tokens(row: Shape) -> int:
    """Returns the tokens of a row's pages, which are the same for every page size."""
    return sum(-(-length // GRAIN) for length in row.seq_lens) * GRAIN


def reach(row: Shape) -> int:
    """Returns the tokens of block tables that reach no further than a row's longest request."""
    return -(-max(row.seq_lens) // GRAIN) * GRAIN


def lacks_memory(row: Shape, setup: Setup) -> str | None:
    """Returns why a row's caches do not fit here, or None if they do."""
    needed = pool_tokens(row) * setup.token_bytes(row.dtype) * setup.min_layers
    if needed <= setup.memory:
        return None
    return (
        f"{setup.min_layers} layers of its cache take {needed / 2**30:.1f} GiB, "
        f"the limit is {setup.memory / 2**30:.1f} (--memory_gib)"
    )


def cache_struct(pool: Pool, page_size: int, setup: Setup) -> PagedKVCache:
    """Returns a cache of ShapeDtypeStructs for the pool; raises ValueError if there is none."""
    return jax.eval_shape(
        lambda: PagedKVCache.create(
            pool.tokens // page_size,
            page_size=page_size,
            kv_lora_rank=setup.kv_lora_rank,
            rope_dim=setup.rope_dim,
            dtype={"bf16": jnp.bfloat16, "int8": jnp.int8}[pool.dtype],
        )
    )


def array_struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an array that a program gets."""
    return jax.ShapeDtypeStruct(shape, dtype)
